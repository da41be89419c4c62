"""Stops a run whose loss or gradient is no longer a number, or whose loss leaps.

With the step, the rank and the examples that it saw.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from statistics import median

import numpy as np

from longalign_ray.data.packed import PackReader
from longalign_ray.errors import LongAlignError

WINDOW = 50
"""Steps whose median a loss is compared with."""
MIN_STEPS = 10
"""Steps before which there is no comparison: the first losses fall too fast to have a typical value."""
LEAST_USUAL = 1.0
"""Nats a token: losses below it are all alike to the comparison, as those of a model that learns its texts by heart
leap by any ratio."""


class LossWatch:
    """Looks at the loss of every step. All ranks give it the same numbers, so all stop, or none."""

    def __init__(self, packs: PackReader, *, max_ratio: float | None, recent: Iterable[float] = ()):
        """recent: losses of the steps before the first, where a run continues."""
        self.packs, self.max_ratio = packs, max_ratio
        self.recent = deque(recent, maxlen=WINDOW)

    def check(self, step: int, shares_R: np.ndarray) -> float:
        """The loss of the step, from the share of each rank. Raises LongAlignError where it cannot be right."""
        loss = float(shares_R.sum())
        if not math.isfinite(loss):
            ranks = np.flatnonzero(~np.isfinite(shares_R)).tolist() or list(range(len(shares_R)))
            raise LongAlignError(self._describe("loss", step, f"is {loss}: not finite", ranks))
        if self.max_ratio is not None and len(self.recent) >= MIN_STEPS:
            usual = max(median(self.recent), LEAST_USUAL)
            if loss > self.max_ratio * usual:
                what = (
                    f"is {loss:.4g}, more than train.max_loss_ratio = {self.max_ratio:g} times {usual:.4g}, the median "
                    f"of the {len(self.recent)} steps before (raise it, or set null, if that is as it should be): the "
                    "largest share"
                )
                raise LongAlignError(self._describe("loss", step, what, [int(shares_R.argmax())]))
        self.recent.append(loss)
        return loss

    def check_gradient(self, step: int, norm: float | None) -> None:
        """Raises LongAlignError where the norm of the step's whole gradient is known, and not finite.

        The weights are lost then, or DeepSpeed has left out the update. Whose part it was cannot be told any more.
        """
        if norm is not None and not math.isfinite(norm):
            what = f"is {norm}: not finite, though the loss is,"
            raise LongAlignError(self._describe("gradient norm", step, what, list(range(self.packs.plan.world_size))))

    def _describe(self, name: str, step: int, what: str, ranks: list[int]) -> str:
        plan = self.packs.plan
        examples = [
            f"rank {rank}, micro-step {micro_step}: {', '.join(pack.example_ids)}"
            for rank in ranks
            for micro_step in range(plan.shape[1])
            if (pack := self.packs.pack(step, micro_step, rank // plan.sp_degree)) is not None
        ]
        return (
            f"the {name} of step {step} {what} on rank {', '.join(map(str, ranks))} of {plan.world_size}, whose "
            f"examples were {'; '.join(examples)}. Lower train.learning_rate, or look at these examples; the last "
            "checkpoint is from before this step"
        )
