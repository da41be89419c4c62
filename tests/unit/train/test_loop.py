"""The loop with a stand-in for the engine: what stops it, and that no checkpoint holds what did."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from longalign_ray.config import TrainConfig
from longalign_ray.errors import LongAlignError
from longalign_ray.train.engine import TrainEngine
from longalign_ray.train.loop import StepMetrics, train_loop
from longalign_ray.train.sequence_parallel import ALONE
from tests.integration import watched_ranks
from tests.unit.train.process_group import alone


class Norms:
    """An engine that computes nothing: every loss is 1, and the gradient norms are those given."""

    def __init__(self, *norms: float | None):
        config = SimpleNamespace(hidden_size=8, vocab_size=64)
        self.module = SimpleNamespace(model=SimpleNamespace(config=config))
        self.device, self.sequence_group = torch.device("cpu"), ALONE
        self._norms: Iterator[float | None] = iter(norms)

    def forward_backward(self, batch: Any, *, step_total: float, last: bool) -> torch.Tensor:
        return torch.tensor(1.0 if last else 0.0)

    def step(self, learning_rate: float) -> float | None:
        return next(self._norms)


def run(directory: Path, *norms: float | None) -> tuple[list[StepMetrics], list[int], str]:
    """Metrics, checkpoints and the error of three steps, with a checkpoint after each."""
    packs = watched_ranks.write_training(directory, world_size=1)
    metrics: list[StepMetrics] = []
    checkpoints: list[int] = []
    config = TrainConfig(checkpoint_every=1, heldout_every=0)
    first_step = packs.plan.num_steps - len(norms)
    with alone():
        try:
            train_loop(
                cast(TrainEngine, Norms(*norms)),
                packs,
                config,
                first_step=first_step,
                on_step=metrics.append,
                on_checkpoint=lambda step: checkpoints.append(step - first_step),
            )
        except LongAlignError as error:
            return metrics, checkpoints, str(error)
    return metrics, checkpoints, ""


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_stops_before_it_is_saved(tmp_path: Path, bad: float) -> None:
    metrics, checkpoints, message = run(tmp_path, 1.0, bad, 1.0)
    assert "the gradient norm of step" in message
    assert f"is {bad}: not finite" in message
    assert len(metrics) == 1
    assert checkpoints == [1]


def test_a_norm_that_is_not_told_is_no_reason_to_stop(tmp_path: Path) -> None:
    metrics, checkpoints, message = run(tmp_path, 1.0, None, 2.0)
    assert message == ""
    assert [one.grad_norm for one in metrics] == [1.0, None, 2.0]
    assert checkpoints == [1, 2, 3]


@pytest.mark.parametrize(
    ("told", "expected"), [(2.5, 2.5), (None, None), (-1.0, float("inf")), (float("nan"), float("inf"))]
)
def test_what_deepspeed_tells_of_the_norm(told: float | None, expected: float | None) -> None:
    """-1 is its word for a group of gradients that are not finite."""
    engine = TrainEngine.__new__(TrainEngine)
    engine._engine = SimpleNamespace(
        optimizer=SimpleNamespace(param_groups=[{}]),
        step=lambda: None,
        get_global_grad_norm=lambda: told,
        zero_optimization_stage=lambda: 3,
    )
    assert engine.step(0.1) == expected
    assert engine._engine.optimizer.param_groups == [{"lr": 0.1}]
