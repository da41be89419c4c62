"""Packers and planners side by side: packs, fill, CPU seconds, and how long the ranks wait for each other.

Lengths: 90 % lognormal (median 900, sigma 1, at most 8,192), 10 % uniform in 8,192..65,536; capacity 65,536. Cost of a
sequence: 6 P l + 6 L h l^2 of Llama-2-7B. Waiting: time of all steps over their time with perfectly shared work; 1 is
ideal. CPU seconds are those of the process, after compilation.

Other packers are measured where they are installed (no dependencies needed):
    pip install --no-deps seqpacker llamafactory trl
Run: python -m tests.benchmarks.packers [--number 100000] [--large 1000000] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longalign_ray.data.balance import imbalance
from longalign_ray.data.best_fit import lower_bound
from longalign_ray.data.cost import LLAMA_2_7B
from longalign_ray.data.make_plan import PlanSettings, plan_lengths
from longalign_ray.data.planners import PLANNERS, next_fit
from tests.unit.data.mixes import long_context_mix

CAPACITY = 65_536
Packed = list[np.ndarray]
"""Lengths of the sequences of each pack."""


@dataclass(frozen=True, slots=True)
class Packer:
    """A way from lengths to packs; `slow`: only run on the smaller number of sequences."""

    name: str
    pack: Callable[[np.ndarray], Packed]
    slow: bool = False


def own(name: str) -> Packer:
    def pack(lengths: np.ndarray) -> Packed:
        packs = PLANNERS[name](lengths, CAPACITY)
        return np.split(lengths[packs.members], packs.offsets[1:-1])

    return Packer(name, pack)


def paper(lengths: np.ndarray) -> Packed:
    """LongAlign's script, with all that it loses."""
    kept = lengths[lengths < CAPACITY]
    packs = next_fit(kept, CAPACITY - 1)
    return np.split(kept[packs.members], packs.offsets[1:-1])[:-1]


def peers() -> list[Packer]:
    """Those that are installed."""
    found: list[Packer] = []
    if importlib.util.find_spec("seqpacker") is not None:
        import seqpacker  # pyright: ignore[reportMissingImports]

        def obfd(lengths: np.ndarray) -> Packed:
            result = seqpacker.Packer(capacity=CAPACITY, strategy="obfd").pack(lengths.tolist())
            return [lengths[np.asarray(bin_)] for bin_ in result.bins]

        found.append(Packer("seqpacker obfd", obfd))
    if (knapsack := module_of("llamafactory", "data/processor/processor_utils.py")) is not None:

        def windows(lengths: np.ndarray) -> Packed:
            parts = [lengths[first : first + 1_000].tolist() for first in range(0, len(lengths), 1_000)]
            return [np.array(pack) for part in parts for pack in knapsack.greedy_knapsack(part, CAPACITY)]

        found.append(Packer("LLaMA-Factory knapsack, its default of 1,000 rows", windows))
    if (trl := module_of("trl", "data_utils.py")) is not None:
        found.append(Packer("TRL bfd, its default of 1,000 rows", lambda lengths: _trl(trl, lengths), slow=True))
    return found


def _trl(trl: Any, lengths: np.ndarray) -> Packed:
    import pyarrow as pa

    packs: Packed = []
    for first in range(0, len(lengths), 1_000):
        own_lengths = lengths[first : first + 1_000]
        offsets = np.concatenate([[0], np.cumsum(own_lengths)]).astype(np.int64)
        tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
        made = trl._pack_bfd(pa.table({"input_ids": tokens}), CAPACITY)
        packs += [np.array(pack) for pack in made["seq_lengths"].to_pylist()]
    return packs


def module_of(package: str, path: str) -> Any:
    """One file of an installed package, without the packages that the rest of it needs; None where that fails."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    try:
        file = Path(next(iter(spec.submodule_search_locations))) / path
        own_spec = importlib.util.spec_from_file_location(f"{package}_packer", file)
        assert own_spec is not None
        assert own_spec.loader is not None
        module = importlib.util.module_from_spec(own_spec)
        sys.modules[own_spec.name] = module
        own_spec.loader.exec_module(module)
    except ImportError:
        return None
    return module


def waiting(packs: Packed, ranks: int, seed: int) -> float:
    """Packs in random order, one a rank and step."""
    costs = np.array([LLAMA_2_7B(pack).sum() for pack in packs])
    costs = np.random.default_rng(seed).permutation(costs)[: len(costs) // ranks * ranks]
    per_step = costs.reshape(-1, 1, ranks)
    return float((imbalance(per_step) * per_step.mean(axis=2).sum(axis=1)).sum() / per_step.mean(axis=2).sum())


def packer_table(packers: list[Packer], number: int, large: int, seed: int) -> None:
    lengths = long_context_mix(number, seed=seed)
    many = long_context_mix(large, seed=seed)
    random = np.random.default_rng(seed)
    third = number // 3
    cases = {
        "thirds": np.repeat(
            [CAPACITY // 2 + 1, CAPACITY // 3 + 1, CAPACITY - CAPACITY // 2 - CAPACITY // 3 - 2], third
        ),
        "halves": random.integers(CAPACITY // 2 + 1, CAPACITY // 2 + 65, third),
        "equal": np.full(number, CAPACITY // 8),
    }
    bound = lower_bound(lengths, CAPACITY)
    print(f"{number:,} sequences, {lengths.sum():,} tokens, at least {bound:,} packs; seed {seed}\n")
    print(
        "| packer | packs | over the bound | fill | lost | CPU s | CPU s, "
        f"{large:,} | wait, 8 ranks | 64 ranks | thirds | halves (best {CAPACITY / 2 / CAPACITY:.1%}) | equal |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|")
    for packer in packers:
        packer.pack(lengths[:2_000])  # compiles
        seconds, packs = timed(packer, lengths)
        of_many = "-" if packer.slow else f"{timed(packer, many)[0]:.2f}"
        fills = []
        for case in cases.values():
            made = packer.pack(random.permutation(case))
            fills.append(f"{case.sum() / (len(made) * CAPACITY):.2%}")
        lost = number - sum(map(len, packs))
        fill = sum(int(pack.sum()) for pack in packs) / (len(packs) * CAPACITY)
        print(
            f"| {packer.name} | {len(packs):,} | {len(packs) / bound:.4f} | {fill:.2%} | {lost} | {seconds:.2f} | "
            f"{of_many} | {waiting(packs, 8, seed):.3f} | {waiting(packs, 64, seed):.3f} | {' | '.join(fills)} |"
        )
    print()


def timed(packer: Packer, lengths: np.ndarray) -> tuple[float, Packed]:
    started = time.process_time()
    packs = packer.pack(lengths)
    return time.process_time() - started, packs


def plan_table(number: int, large: int, seed: int) -> None:
    """Whole plans: strategy, balance, degree and micro-steps."""
    lengths = long_context_mix(number, seed=seed)
    many = long_context_mix(large, seed=seed)
    kinds = [
        ("best_fit", "none", 1, (1,)),
        ("best_fit", "lock_step", 1, (4, 16, 64)),
        ("deal", "lock_step", 1, (4, 16, 64)),
        ("best_fit", "sums", 1, (4,)),
        ("deal", "sums", 1, (4,)),
        ("best_fit", "none", 2, (1,)),
        ("deal", "lock_step", 2, (1,)),
    ]
    print(
        "| strategy | balance | sp | micro-steps | wait, 8 ranks | worst | fill | 64 ranks | worst | fill | "
        f"CPU s, {large:,}, 8 ranks |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for strategy, balance, degree, steps in kinds:
        for micro_steps in steps:
            cells = []
            for ranks in (8, 64):
                settings = PlanSettings(
                    capacity=CAPACITY,
                    packs_per_step=ranks * micro_steps,
                    world_size=ranks,
                    sp_degree=degree,
                    strategy=strategy,
                    balance=balance,
                    seed=seed,
                )
                plan = plan_lengths(lengths, settings, cost=LLAMA_2_7B)
                cells.append(f"{plan.time_over_ideal():.4f} | {plan.step_imbalance().max():.3f} | {plan.fill():.1%}")
                if ranks == 8:
                    started = time.process_time()
                    plan_lengths(many, settings, cost=LLAMA_2_7B)
                    seconds = time.process_time() - started
            print(f"| {strategy} | {balance} | {degree} | {micro_steps} | {' | '.join(cells)} | {seconds:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100_000, help="sequences")
    parser.add_argument("--large", type=int, default=1_000_000, help="sequences for the CPU seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ours = [Packer("LongAlign's script", paper), *(own(name) for name in ("next_fit", "streaming", "best_fit"))]
    packer_table([*ours, *peers()], arguments.number, arguments.large, arguments.seed)
    plan_table(arguments.number, arguments.large, arguments.seed)


if __name__ == "__main__":
    main()
