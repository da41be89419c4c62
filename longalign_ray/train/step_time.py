"""How long an optimizer step takes, as a forecast from the plan's work and an assumed rate; seen on no GPU of ours."""

from __future__ import annotations

from dataclasses import dataclass

from longalign_ray.train.memory import Levers
from longalign_ray.train.model_shape import ModelShape

RECOMPUTATION = 8 / 6
"""With gradient checkpointing the forward pass runs twice: 8 FLOPs a weight and token in place of 6."""
NODE_BYTES_PER_SECOND = 400e9
NETWORK_BYTES_PER_SECOND = 50e9
"""Of a GPU to those of other nodes."""
SECONDS_A_MICRO_STEP = 0.03
SECONDS_A_STEP = 0.1


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of an optimizer step, nothing of it overlapped. Updates and transfers to the host are not in it."""

    compute: float
    all_to_all: float
    overhead: float

    @property
    def total(self) -> float:
        return self.compute + self.all_to_all + self.overhead


def step_seconds(
    shape: ModelShape, levers: Levers, *, compute_seconds: float, tokens_per_rank: float, micro_steps: int
) -> StepSeconds:
    """From the seconds of forward and backward without recomputation, and the tokens that a rank has in a step.

    Ulysses sends queries, keys, values and outputs through an all-to-all in each of the passes: a rank keeps 1/P of
    what it has and sends the rest.
    """
    passes, factor = (3, RECOMPUTATION) if levers.gradient_checkpointing else (2, 1.0)
    degree = levers.sp_degree
    kv_width = shape.kv_width * max(1, degree / shape.kv_heads)
    sent = levers.weight_bytes * (2 * shape.width + 2 * kv_width) * tokens_per_rank * (degree - 1) / degree
    rate = NODE_BYTES_PER_SECOND if degree <= levers.ranks_on_node else NETWORK_BYTES_PER_SECOND
    return StepSeconds(
        compute=factor * compute_seconds,
        all_to_all=passes * shape.layers * sent / rate,
        overhead=SECONDS_A_STEP + micro_steps * SECONDS_A_MICRO_STEP,
    )
