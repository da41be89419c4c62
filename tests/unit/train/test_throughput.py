from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import PlanSettings, plan_lengths
from longalign_ray.train import throughput
from longalign_ray.train.throughput import StepClock, mfu, peak_flops, peak_flops_of, step_flops
from tests.unit.train.process_group import alone


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA H20", 148),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA B200", 2_250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
    ],
)
def test_peak_by_the_name_that_torch_gives(name: str, tflops: float) -> None:
    assert peak_flops_of(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA A10G", "NVIDIA GeForce RTX 3090", "H1000"])
def test_an_unknown_device_has_no_peak_and_no_mfu(name: str) -> None:
    assert peak_flops_of(name) is None
    assert peak_flops(torch.device("cpu")) is None
    assert mfu(1e12, 1.0, world_size=2, peak=None) is None


def test_flops_of_a_step_by_hand() -> None:
    """Two steps of one sequence: 10 a token + 2 a pair of tokens, and 6 * 3 * 5 for each of the l - 1 targets."""
    settings = PlanSettings(strategy="naive", balance="none", capacity=8, packs_per_step=1)
    plan = plan_lengths(np.array([4, 8]), settings, cost=SequenceCost(linear=10.0, quadratic=2.0))
    expected = {4: 4 * 10 + 16 * 2 + 90 * 3, 8: 8 * 10 + 64 * 2 + 90 * 7}
    frozen = {4: 4 * 20 / 3 + 16 * 2 + 60 * 3, 8: 8 * 20 / 3 + 64 * 2 + 60 * 7}
    lengths = plan.lengths.tolist()
    assert step_flops(plan, hidden_size=3, vocab_size=5).tolist() == [expected[length] for length in lengths]
    assert step_flops(plan, hidden_size=3, vocab_size=5, frozen=True) == pytest.approx([frozen[n] for n in lengths])
    assert mfu(6e12, 2.0, world_size=3, peak=4e12) == pytest.approx(0.25)


def clock(balance: str = "lock_step") -> StepClock:
    return StepClock(torch.nn.Linear(1, 1), torch.device("cpu"), balance=balance, zero_stage=3)


def test_the_clock_counts_work_and_not_waiting() -> None:
    measured = clock()
    measured.start_step()
    with measured.data():
        time.sleep(0.05)
    with measured.compute():
        time.sleep(0.2)  # as in a collective
    with measured.compute():
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
    waiting, working = measured.compute_seconds()
    assert waiting < 0.02
    assert working >= 0.05
    with alone():
        report = measured.gather(torch.tensor(1.5))
    assert report.losses.tolist() == [1.5]
    assert report.data_seconds >= 0.05
    assert report.seen_imbalance == pytest.approx(1)
    assert 0.05 < report.max_memory_gb < 1_000
    measured.start_step()
    assert (measured.data_seconds, measured.compute_seconds()) == (0.0, [])


@pytest.mark.parametrize(("balance", "expected"), [("lock_step", (3 + 4) / 5), ("sums", 5 / 5)])
def test_seen_imbalance_by_hand(monkeypatch: pytest.MonkeyPatch, balance: str, expected: float) -> None:
    """Two ranks that take 3 and 2, then 1 and 4 seconds: they meet after each micro-step, or at the end."""
    table = np.array([[0.5, 0.1, 2.0, 3.0, 2.0], [0.25, 0.3, 1.0, 1.0, 4.0]])  # loss, data, memory, micro-steps
    monkeypatch.setattr(throughput, "gather_ranks", lambda values, device: table)
    report = clock(balance).gather(torch.zeros(()))
    assert report.seen_imbalance == pytest.approx(expected)
    assert report.losses.tolist() == [0.5, 0.25]
    assert (report.data_seconds, report.max_memory_gb) == (0.3, 2.0)


def test_nothing_measured_is_nothing_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "gather_ranks", lambda values, device: np.array([[0.5, 0.1, 2.0]] * 2))
    assert clock().gather(torch.zeros(())).seen_imbalance is None
