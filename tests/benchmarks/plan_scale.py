"""Time and memory of planning very many sequences, group by group; the arithmetic for more.

The lengths lie in a file of 4 bytes a sequence, which is mapped, and the plan is written as it is made. So the process
needs the memory of one group beside the pages of the file. Ends with 1 where 10^8 take more than 16 bytes a sequence.
Run: python -m tests.benchmarks.plan_scale [--number 100000000] [--strategy deal] [--world-size 64] [--sp 2]
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

from longalign_ray.data.cost import LLAMA_2_7B
from longalign_ray.data.make_plan import GROUP, PlanSettings
from longalign_ray.data.plan_file import PlanWriter
from longalign_ray.data.plan_groups import plan_groups
from longalign_ray.data.plan_score import score, warm_up
from tests.unit.data.mixes import long_context_mix

CAPACITY = 65_536
MOST_BYTES = 16  # a sequence, of 10^8; of fewer, one group weighs more


def write_lengths(path: Path, number: int) -> None:
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i4", "fortran_order": False, "shape": (number,)})
        for first in range(0, number, 1_000_000):
            long_context_mix(min(1_000_000, number - first), seed=first).astype("<i4").tofile(file)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * resource.getpagesize()


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100_000_000)
    parser.add_argument("--strategy", default="deal")
    parser.add_argument("--world-size", type=int, default=64)
    parser.add_argument("--sp", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        file, out = Path(directory) / "lengths.npy", Path(directory) / "plan.npz"
        write_lengths(file, arguments.number)
        lengths = np.load(file, mmap_mode="r")
        settings = PlanSettings(
            capacity=CAPACITY,
            packs_per_step=arguments.world_size,
            world_size=arguments.world_size,
            sp_degree=arguments.sp,
            strategy=arguments.strategy,
        )
        warm_up(lengths, settings, LLAMA_2_7B)
        before, started = resident_bytes(), time.perf_counter()
        told = score(plan_groups(lengths, settings, cost=LLAMA_2_7B), settings, 200, PlanWriter(out))
        seconds, grown = time.perf_counter() - started, peak_bytes() - before
        print("| sequences | strategy | groups | CPU s of planning | s with writing | peak memory | bytes a sequence |")
        print("|---|---|---|---|---|---|---|")
        print(
            f"| {arguments.number:,} | {told.strategy} | {-(-arguments.number // GROUP)} | {told.cpu_seconds:.0f} | "
            f"{seconds:.0f} | {grown / 1e6:,.0f} MB | {grown / arguments.number:.1f} |"
        )
        in_file = out.stat().st_size / arguments.number
        print(
            f"\n{told.num_steps:,} steps, {told.utilisation:.1%} full, time / ideal {told.time_over_ideal:.4f}; "
            f"{in_file:.1f} bytes a sequence in the plan file. The peak is above the "
            "process before it; the 4 bytes of each length are in it, as far as their pages were in memory."
        )
        hours = told.cpu_seconds / arguments.number * 1e10 / 3_600
        print(
            f"10^10 sequences: 40 GB of lengths in a file that all read; {1e10 / GROUP:,.0f} groups of {GROUP:,}, each "
            f"planned alone, on any machine and in the memory of one group; {hours:.1f} CPU hours in all; "
            f"{in_file * 10:.0f} GB of plan."
        )
        if arguments.number >= 100_000_000 and grown > MOST_BYTES * arguments.number:
            raise SystemExit(f"goal missed: {grown / arguments.number:.1f} bytes a sequence, at most {MOST_BYTES}")


if __name__ == "__main__":
    main()
