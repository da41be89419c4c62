"""How fast a step was: the seconds of each rank, how evenly they were spread, and the share of the devices' peak."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import distributed as dist
from torch import nn

from longalign_ray.data.balance import imbalance
from longalign_ray.data.plan import StepPlan

PEAK_TFLOPS = {
    r"\bGB200\b": 2_500.0,
    r"\bB200\b": 2_250.0,
    r"\bH100 PCIe\b": 756.0,
    r"\bH[12]00 NVL\b": 835.0,
    r"\b(H100|H200|GH200)\b": 989.0,
    r"\bH20\b": 148.0,
    r"\bA(100|800)\b": 312.0,
    r"\bL40S\b": 362.0,
    r"\bL4\b": 121.0,
    r"\bA10\b": 125.0,
    r"\bA40\b": 150.0,
    r"\bMI300X\b": 1_307.0,
}
"""Dense bf16 peak by a part of the device's name, from the makers' data sheets; the first that fits counts."""


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of bf16 matrix products at best, or None for a CPU or a GPU that the table does not have."""
    if device.type != "cuda":
        return None
    return peak_flops_of(torch.cuda.get_device_name(device))


def peak_flops_of(device_name: str) -> float | None:
    for pattern, tflops in PEAK_TFLOPS.items():
        if re.search(pattern, device_name):
            return tflops * 1e12
    return None


def step_flops(plan: StepPlan, *, hidden_size: int, vocab_size: int, frozen: bool = False) -> np.ndarray:
    """float64[steps]: FLOPs that every step needs, forward and backward, on all ranks together.

    The plan's cost (data/cost.py: 6 a weight and token, causal attention) and the head at 6 * hidden_size * vocab_size
    for each target, as other positions are not scored. What is computed again in the backward pass is not counted, nor
    is what an idle rank does. Frozen weights need no gradient of their own, so 4 instead of 6 (adapters; their own
    weights are not counted).
    """
    flops = plan.slot_costs().sum(axis=(1, 2)) + 6.0 * hidden_size * vocab_size * plan.num_targets
    if frozen:
        flops -= plan.cost.linear / 3 * plan.slot_tokens().sum(axis=(1, 2))
        flops -= 2.0 * hidden_size * vocab_size * plan.num_targets
    return flops


def mfu(flops: float, seconds: float, *, world_size: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation: FLOPs a second of all ranks over their peak; None where the peak is not known."""
    return None if peak is None else flops / (seconds * world_size * peak)


@dataclass(frozen=True, slots=True, eq=False)
class RankReport:
    """What the ranks told each other at the end of a step's backward passes."""

    losses: np.ndarray
    """float64[ranks]: the share of each in the step's loss."""
    seen_imbalance: float | None
    """As `imbalance` of data/balance.py, by measured seconds instead of planned FLOPs."""
    data_seconds: float
    """Of the rank that waited longest for its packs."""
    max_memory_gb: float
    """Of the rank that held most."""


class StepClock:
    """Measures one rank's step: seconds until its packs were there, and of computing in each micro-step.

    Ranks wait for each other inside a step, wherever a collective needs all, so elapsed time looks alike on all ranks.
    On a CPU the processor time of this process is taken instead, which does not grow while it waits. On a GPU it is the
    forward pass, by events on its stream: it takes the same share of the work on every rank, and under ZeRO-0 to 2 no
    collective is in it. ZeRO-3 gathers weights in the forward pass: there nothing is seen (None).
    """

    def __init__(self, module: nn.Module, device: torch.device, *, balance: str, zero_stage: int):
        self.device, self.balance = device, balance
        self.is_seen = device.type != "cuda" or zero_stage < 3
        self.data_seconds = 0.0
        self._processor_seconds: list[float] = []
        self._events: list[torch.cuda.Event] = []
        self._is_computing = False
        if device.type == "cuda" and self.is_seen:
            module.register_forward_pre_hook(self._mark)
            module.register_forward_hook(self._mark)

    def start_step(self) -> None:
        self.data_seconds, self._processor_seconds, self._events = 0.0, [], []

    @contextmanager
    def data(self) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.data_seconds += time.perf_counter() - started

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Around one micro-step."""
        started, self._is_computing = time.process_time(), True
        yield
        self._is_computing = False
        self._processor_seconds.append(time.process_time() - started)

    def _mark(self, *_: object) -> None:
        if self._is_computing:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append(event)

    def compute_seconds(self) -> list[float]:
        """One number a micro-step; none where nothing is seen. On a GPU its work must be done."""
        if self.device.type != "cuda":
            return self._processor_seconds
        starts, ends = self._events[::2], self._events[1::2]
        return [start.elapsed_time(end) / 1e3 for start, end in zip(starts, ends, strict=True)]

    def gather(self, loss: torch.Tensor) -> RankReport:
        """The report of all ranks, alike on each (collective): one all_gather of a few numbers."""
        share = loss.item()  # waits for the device
        own = [share, self.data_seconds, max_memory_bytes() / 1e9, *self.compute_seconds()]
        table = gather_ranks(own, device=self.device)
        seconds = table[:, 3:].T[None]  # [1 step, micro-steps, ranks]
        return RankReport(
            losses=table[:, 0],
            seen_imbalance=float(imbalance(seconds, self.balance)[0]) if seconds.any() else None,
            data_seconds=float(table[:, 1].max()),
            max_memory_gb=float(table[:, 2].max()),
        )


def gather_ranks(values: list[float], *, device: torch.device) -> np.ndarray:
    """float64[ranks, len(values)]: the values of every rank, of which all have equally many (collective)."""
    own = torch.tensor(values, dtype=torch.float64, device=device)
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).cpu().numpy()


def max_memory_bytes() -> int:
    """Most memory that this process has held: of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
