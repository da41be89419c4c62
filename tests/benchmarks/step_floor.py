"""Forward and backward of a pack beside its floor: what the matrix products in it cost alone, on the same core.

The products are recorded from a pass of the model (forward, recomputation, gradients) and run again on tensors of the
same shapes and strides, one after another. Of attention they are those of the lower triangle: two forward, two of the
recomputation, four backward. CPU seconds on one thread, the fastest of `--rounds`, which take turns. The second table
is torch.profiler's: operators by their own time. Without AVX512-BF16 or AMX a CPU computes bfloat16 products slower
than float32 ones, so the goal is judged in both. Ends with 1 where it is missed.
The model has the shape of SmolLM2-135M with `--layers` of its layers and random weights.
Run: python -m tests.benchmarks.step_floor [--tokens 2048] [--layers 2] [--rounds 2]
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from longalign_ray.data.store import FULL_WEIGHT, Pack
from longalign_ray.precision import DTYPES
from longalign_ray.train.batch import PackedBatch, to_batch
from longalign_ray.train.model import PackedLM
from tests.benchmarks.packed_vs_padded import SHAPE, build

GOAL = 0.6
PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"
Operand = tuple[tuple[int, ...], tuple[int, ...]]
"""Shape and strides."""


class Products(TorchDispatchMode):
    """Counts the matrix products that run inside it, by shapes and strides, and the calls of attention by theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.products: Counter[tuple[Operand, Operand]] = Counter()
        self.attention: Counter[tuple[int, int, int, int]] = Counter()
        """(products of a triangle, query heads, tokens, head width)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name in PRODUCTS:
            left, right = args[-2:]
            self.products[(tuple(left.shape), left.stride()), (tuple(right.shape), right.stride())] += 1
        elif name.startswith(ATTENTION):
            query = args[1] if name.endswith("backward") else args[0]
            self.attention[4 if name.endswith("backward") else 2, *query.shape[1:]] += 1
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True, slots=True)
class Floor:
    """CPU seconds of the products alone."""

    layers: float
    head: float
    attention: float

    @property
    def total(self) -> float:
        return self.layers + self.head + self.attention


def cpu_seconds(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def floor(recorded: Products, dtype: torch.dtype) -> Floor:
    seconds = dict.fromkeys(("layers", "head", "attention"), 0.0)
    for (left, right), count in recorded.products.items():
        a, b = filled(left, dtype), filled(right, dtype)
        part = "head" if SHAPE["vocab_size"] in (*left[0], *right[0]) else "layers"
        seconds[part] += count * cpu_seconds(lambda a=a, b=b: a @ b)
    for (products, heads, tokens, width), count in recorded.attention.items():
        q, k = torch.randn(heads, tokens, width, dtype=dtype), torch.randn(heads, width, tokens, dtype=dtype)
        scores = torch.randn(heads, tokens, tokens, dtype=dtype)
        pair = cpu_seconds(lambda q=q, k=k: torch.bmm(q, k)) + cpu_seconds(lambda q=q, s=scores: torch.bmm(s, q))
        seconds["attention"] += count * products / 2 * pair / 2  # half: below the diagonal
    return Floor(**seconds)


def filled(operand: Operand, dtype: torch.dtype) -> torch.Tensor:
    shape, strides = operand
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides, strict=True))
    return torch.randn(size, dtype=dtype).as_strided(shape, strides)


def pack_of(tokens: int) -> Pack:
    """Sequences of a half, a quarter and so on of the tokens; a tenth of the tokens, spread evenly, are targets."""
    lengths = [tokens >> power for power in range(1, 7)]
    boundaries = np.cumsum([0, *lengths, tokens - sum(lengths)]).astype(np.int32)
    ids = np.random.default_rng(0).integers(0, SHAPE["vocab_size"], tokens, dtype=np.int32)
    weights = np.where(np.arange(tokens) % 10 == 9, FULL_WEIGHT, 0).astype(np.uint8)
    return Pack(ids, weights, boundaries, tuple(f"e{number}" for number in range(len(boundaries) - 1)))


def measure(model: PackedLM, batch: PackedBatch, dtype: torch.dtype, rounds: int) -> tuple[float, Floor]:
    def step() -> None:
        model(batch).backward()

    step()  # warms up
    with Products() as recorded:
        step()
    ours, floors = [], []
    for _ in range(rounds):
        ours.append(cpu_seconds(step))
        floors.append(floor(recorded, dtype))
    return min(ours), min(floors, key=lambda one: one.total)


def profiled(model: PackedLM, batch: PackedBatch, most: int = 14) -> list[tuple[str, int, float]]:
    """(operator, calls, share of the time), those that take most."""
    with profile(activities=[ProfilerActivity.CPU]) as told:
        model(batch).backward()
    events = sorted(told.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return [(event.key, event.count, event.self_cpu_time_total / total) for event in events[:most]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2_048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], choices=list(DTYPES))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8").split() if Path("/proc/cpuinfo").exists() else []
    fast = [name for name in ("avx512_bf16", "amx_bf16", "bf16") if name in flags]
    batch = to_batch(pack_of(arguments.tokens), loss="sequence")
    print(f"{arguments.tokens:,} tokens, {len(batch.labels_N)} targets, {arguments.layers} layers; ", end="")
    print(f"bfloat16 in hardware: {', '.join(fast) or 'no'}\n")
    print("| precision | forward and backward, CPU s | matrix products alone | layers | head | attention | share |")
    print("|---|---|---|---|---|---|---|")
    missed, operators = [], {}
    for name in arguments.dtypes:
        model = build(arguments.layers).to(DTYPES[name])
        ours, least = measure(model, batch, DTYPES[name], arguments.rounds)
        share = least.total / ours
        print(f"| {name} | {ours:.2f} | {least.total:.2f} | {least.layers:.2f} | {least.head:.2f} | ", end="")
        print(f"{least.attention:.2f} | {share:.1%} |", flush=True)
        operators[name] = profiled(model, batch)
        if share < GOAL:
            missed.append(f"{name}: {share:.1%} of the time is matrix products, at least {GOAL:.0%}")
    for name, rows in operators.items():
        print(f"\n| {name}, operator | calls | of the time |\n|---|---|---|")
        for operator, calls, share in rows:
            print(f"| {operator} | {calls} | {share:.1%} |")
    if missed:
        raise SystemExit("\ngoals missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
