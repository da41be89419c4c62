"""Packers and planners side by side: packs, fill, CPU seconds, and how long the ranks wait for each other.

Lengths: 90 % lognormal (median 900, sigma 1, at most 8,192), 10 % uniform in 8,192..65,536; capacity 65,536. Cost of a
sequence: 6 P l + 6 L h l^2 of Llama-2-7B. Waiting: time of all steps over their time with perfectly shared work; 1 is
ideal. CPU seconds are those of the process, after compilation.

Other packers are installed, without what they depend on, into a directory that is deleted in the end; a row says so
where that fails. Of LLaMA-Factory and TRL only the file with the packer is imported. Theirs get 1,000 rows at a time,
their default; TRL's moves the tokens as well. Ends with 1 where a goal is missed, and names the row.
Run: python -m tests.benchmarks.packers [--number 100000] [--large 1000000] [--seed 0]
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
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
SEQPACKER = ("seqpacker==0.1.3",)
LLAMA_FACTORY = ("llamafactory==0.9.5",)
TRL = ("trl==1.16.0", "datasets==5.2.0", "multiprocess==0.70.19", "dill==0.4.1", "xxhash==4.1.0")
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


def install(packages: tuple[str, ...], directory: Path) -> None:
    """Raises CalledProcessError where there is no wheel, or no package index."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary", ":all:"]
    subprocess.run([*pip, "--target", str(directory), *packages], check=True, stderr=subprocess.DEVNULL)


def seqpacker(directory: Path) -> Packer:
    install(SEQPACKER, directory)
    module = importlib.import_module("seqpacker")

    def obfd(lengths: np.ndarray) -> Packed:
        result = module.Packer(capacity=CAPACITY, strategy="obfd").pack(lengths.tolist())
        return [lengths[np.asarray(bin_)] for bin_ in result.bins]

    return Packer("seqpacker obfd", obfd)


def llama_factory(directory: Path) -> Packer:
    install(LLAMA_FACTORY, directory)
    knapsack = module_of(directory / "llamafactory/data/processor/processor_utils.py")

    def windows(lengths: np.ndarray) -> Packed:
        parts = [lengths[first : first + 1_000].tolist() for first in range(0, len(lengths), 1_000)]
        return [np.array(pack) for part in parts for pack in knapsack.greedy_knapsack(part, CAPACITY)]

    return Packer("LLaMA-Factory knapsack", windows)


def trl(directory: Path) -> Packer:
    install(TRL, directory)
    module = module_of(directory / "trl/data_utils.py")
    return Packer("TRL bfd", lambda lengths: _trl(module, lengths), slow=True)


PEERS = {"seqpacker": seqpacker, "LLaMA-Factory": llama_factory, "TRL": trl}


def _trl(module: Any, lengths: np.ndarray) -> Packed:
    import pyarrow as pa

    packs: Packed = []
    for first in range(0, len(lengths), 1_000):
        own_lengths = lengths[first : first + 1_000]
        offsets = np.concatenate([[0], np.cumsum(own_lengths)]).astype(np.int64)
        tokens = pa.LargeListArray.from_arrays(offsets, pa.array(np.zeros(offsets[-1], np.int8)))
        made = module._pack_bfd(pa.table({"input_ids": tokens}), CAPACITY)
        packs += [np.array(pack) for pack in made["seq_lengths"].to_pylist()]
    return packs


def module_of(file: Path) -> Any:
    """One file of a package, without the packages that the rest of it needs."""
    spec = importlib.util.spec_from_file_location(f"{file.stem}_of_a_peer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def waiting(packs: Packed, ranks: int, seed: int) -> float:
    """Packs in random order, one a rank and step."""
    costs = np.array([LLAMA_2_7B(pack).sum() for pack in packs])
    costs = np.random.default_rng(seed).permutation(costs)[: len(costs) // ranks * ranks]
    per_step = costs.reshape(-1, 1, ranks)
    return float((imbalance(per_step) * per_step.mean(axis=2).sum(axis=1)).sum() / per_step.mean(axis=2).sum())


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    num_packs: int
    fill: float
    lost: int
    seconds: float
    seconds_of_many: float | None
    waits: tuple[float, float]
    """Of 8 and of 64 ranks."""
    cases: dict[str, tuple[int, float]]
    """Packs and fill."""


def packer_table(ours: list[Packer], number: int, large: int, seed: int, directory: Path) -> list[str]:
    """Prints the table; returns the goals that are missed."""
    lengths = long_context_mix(number, seed=seed)
    many = long_context_mix(large, seed=seed)
    third = number // 3
    parts = [CAPACITY // 2 + 1, CAPACITY // 3 + 1, CAPACITY - CAPACITY // 2 - CAPACITY // 3 - 2]
    random = np.random.default_rng(seed)
    cases = {  # with the fewest packs possible
        "thirds": (random.permutation(np.repeat(parts, third)), third),
        "halves": (random.integers(CAPACITY // 2 + 1, CAPACITY // 2 + 65, third), third),
        "equal": (np.full(number, CAPACITY // 8), -(-number // 8)),
    }
    bound = lower_bound(lengths, CAPACITY)
    rows = [measured(packer, lengths, many, cases, seed) for packer in ours]
    failed = []
    for name, peer in PEERS.items():
        try:
            rows.append(measured(peer(directory), lengths, many, cases, seed))
        except (subprocess.CalledProcessError, ImportError) as error:
            why = f"cannot be imported ({error})" if isinstance(error, ImportError) else "no wheel installs here"
            failed.append(f"| {name}: not measured, {why} |{' - |' * 12}")
    best = next(row for row in rows if row.name == "best_fit")
    print(f"{number:,} sequences, {lengths.sum():,} tokens, at least {bound:,} packs; seed {seed}\n")
    print(
        f"| packer | packs | over the bound | fill | lost | CPU s | of best_fit's | CPU s, {large:,} | of best_fit's | "
        "wait, 8 ranks | 64 ranks | thirds | halves | equal |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        many_cells = "- | -"
        if row.seconds_of_many is not None and best.seconds_of_many is not None:
            many_cells = f"{row.seconds_of_many:.2f} | {row.seconds_of_many / best.seconds_of_many:.1f}"
        print(
            f"| {row.name} | {row.num_packs:,} | {row.num_packs / bound:.4f} | {row.fill:.2%} | {row.lost} | "
            f"{row.seconds:.2f} | {row.seconds / best.seconds:.1f} | {many_cells} | {row.waits[0]:.3f} | "
            f"{row.waits[1]:.3f} | {' | '.join(f'{fill:.2%}' for _, fill in row.cases.values())} |"
        )
    best_halves = cases["halves"][0].sum() / third / CAPACITY
    print("\n".join([*failed, "", f"Halves can fill {best_halves:.2%} at best: no two of them share a pack.\n"]))
    streaming = next(row for row in rows if row.name == "streaming")
    goals = {
        f"best_fit: {best.num_packs} packs, at most 1.0005 x {bound}": best.num_packs <= 1.0005 * bound,
        f"streaming: fill {streaming.fill:.4%}, at least 99.95 %": streaming.fill >= 0.9995,
    }
    for name, (_, fewest) in cases.items():
        goals[f"best_fit, {name}: {best.cases[name][0]} packs of {fewest}"] = best.cases[name][0] == fewest
    return [goal for goal, met in goals.items() if not met]


def measured(
    packer: Packer, lengths: np.ndarray, many: np.ndarray, cases: dict[str, tuple[np.ndarray, int]], seed: int
) -> Row:
    packer.pack(lengths[:2_000])  # compiles
    seconds, packs = timed(packer, lengths)
    of_cases = {}
    for name, (case, _) in cases.items():
        made = packer.pack(case)
        of_cases[name] = (len(made), float(case.sum() / (len(made) * CAPACITY)))
    return Row(
        name=packer.name,
        num_packs=len(packs),
        fill=sum(int(pack.sum()) for pack in packs) / (len(packs) * CAPACITY),
        lost=len(lengths) - sum(map(len, packs)),
        seconds=seconds,
        seconds_of_many=None if packer.slow else timed(packer, many)[0],
        waits=(waiting(packs, 8, seed), waiting(packs, 64, seed)),
        cases=of_cases,
    )


def timed(packer: Packer, lengths: np.ndarray) -> tuple[float, Packed]:
    started = time.process_time()
    packs = packer.pack(lengths)
    return time.process_time() - started, packs


def goal_of(strategy: str, balance: str, degree: int, micro_steps: int, ranks: int) -> float | None:
    """How many times its ideal time a step may take."""
    if balance == "sums":
        return 1.01
    if strategy == "deal" and degree == 2:
        return {8: 1.012, 64: 1.003}[ranks]
    return {16: 1.03, 64: 1.01}.get(micro_steps) if strategy == "deal" else None


def plan_table(number: int, large: int, seed: int) -> list[str]:
    """Whole plans: strategy, balance, degree and micro-steps; returns the goals that are missed."""
    missed: list[str] = []
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
                name = f"{strategy}, {balance}, sp {degree}, {micro_steps} micro-steps, {ranks} ranks"
                most = goal_of(strategy, balance, degree, micro_steps, ranks)
                found = max(plan.time_over_ideal(), float(plan.step_imbalance().mean()))
                if most is not None and found > most:
                    missed.append(f"{name}: wait {found:.4f}, at most {most}")
                if strategy == "deal" and degree == 2 and plan.fill() < 0.85:
                    missed.append(f"{name}: fill {plan.fill():.1%}, at least 85 %")
                cells.append(f"{plan.time_over_ideal():.4f} | {plan.step_imbalance().max():.3f} | {plan.fill():.1%}")
                if ranks == 8:
                    started = time.process_time()
                    plan_lengths(many, settings, cost=LLAMA_2_7B)
                    seconds = time.process_time() - started
                    if seconds > (longest := (2 if strategy == "deal" else 1) * large / 1e6):
                        missed.append(f"{name}: {seconds:.2f} CPU s for {large:,}, at most {longest:g}")
            print(f"| {strategy} | {balance} | {degree} | {micro_steps} | {' | '.join(cells)} | {seconds:.2f} |")
    return missed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100_000, help="sequences")
    parser.add_argument("--large", type=int, default=1_000_000, help="sequences for the CPU seconds")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    ours = [Packer("LongAlign's script", paper), *(own(name) for name in ("next_fit", "streaming", "best_fit"))]
    with tempfile.TemporaryDirectory() as directory:
        sys.path.insert(0, directory)
        missed = packer_table(ours, arguments.number, arguments.large, arguments.seed, Path(directory))
    missed += plan_table(arguments.number, arguments.large, arguments.seed)
    if missed:
        raise SystemExit("\ngoals missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
