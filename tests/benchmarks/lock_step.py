"""Whether a plan's score is its speed: two ranks in lock-step under ZeRO-3, measured beside what the plan predicts.

Epochs of the same examples take turns, in both orders: one sequence a rank and micro-step, best-fit packs shuffled, and
dealt plans. Wall seconds are medians. Beside them is the processor time that passes in lock-step (of each micro-step
the slower rank's), which other load on the machine changes less. "Formula": the plan's own cost model; "fitted": with
the constants of this machine, from single sequences on one rank. Lengths and model as in `long_mix`.
Ends with 1 where less than 95 % of a predicted speed-up is measured.
Run: python -m tests.benchmarks.lock_step [--examples 60] [--layers 4] [--rounds 3]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from longalign_ray.config import TrainConfig
from longalign_ray.data.balance import step_times
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.packed import PackReader
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import Pack
from longalign_ray.train.batch import dummy_pack, to_batch
from longalign_ray.train.model import PackedLM
from tests.benchmarks.long_mix import long_mix_store, plan_of
from tests.benchmarks.packed_vs_padded import SHAPE, build

RANKS = 2
CAPACITY = 4_096
PACKS_PER_STEP = 8
GOAL = 0.95
PLANS = {"naive": "one sequence a rank", "best_fit": "best-fit packs, shuffled", "deal": "dealt"}


def train_rank(directory: Path, layers: int, rounds: int) -> None:
    """One rank: writes, for each plan, the wall seconds of its epochs and the CPU seconds of their parts."""
    from torch import distributed as dist

    from longalign_ray.train.engine import TrainEngine

    rank = int(os.environ["RANK"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plans = {name: StepPlan.load(directory / f"{name}.npz") for name in PLANS}
    config = TrainConfig(checkpoint_every=10**9)
    engine = TrainEngine(build(layers), config, dtype="float32", micro_steps=PACKS_PER_STEP // RANKS)

    def epoch(plan: StepPlan) -> tuple[float, list[float]]:
        packs = PackReader(plan, store_dir=directory / "store", packed_dir=Path("none"))
        steps, micro_steps, _ = plan.shape
        dist.barrier()
        started, parts = time.perf_counter(), [time.process_time()]
        for step in range(steps):
            for micro_step in range(micro_steps):
                batch = to_batch(packs.pack(step, micro_step, rank) or dummy_pack(), loss="sequence")
                total = float(plan.num_sequences[step])
                engine.forward_backward(batch, step_total=total, last=micro_step == micro_steps - 1)
                parts.append(time.process_time())
            engine.step(1e-6)
            parts.append(time.process_time())
        return time.perf_counter() - started, np.diff(parts).tolist()

    epoch(plans["deal"])  # warms up
    found: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in plans}
    for number in range(rounds):
        for name in list(plans)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(epoch(plans[name]))
    (directory / f"rank-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Epoch:
    """Medians over the rounds, in seconds."""

    wall: float
    lock_step: float


def measure(directory: Path, layers: int, rounds: int) -> dict[str, Epoch]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = []
    for rank in range(RANKS):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "tests.benchmarks.lock_step", "--rank", str(directory)]
        command += ["--layers", str(layers), "--rounds", str(rounds)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", **{name: str(value) for name, value in world.items()}}
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL))
    exits = [rank.wait() for rank in ranks]
    if any(exits):
        raise SystemExit(f"ranks ended with {exits}")
    found = [json.loads((directory / f"rank-{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    epochs = {}
    for name in PLANS:
        cpu = np.array([[parts for _, parts in rank[name]] for rank in found])  # [ranks, rounds, parts]
        wall = np.array([[seconds for seconds, _ in rank[name]] for rank in found])
        epochs[name] = Epoch(
            wall=float(np.median(wall.max(axis=0))), lock_step=float(np.median(cpu.max(axis=0).sum(axis=-1)))
        )
    return epochs


def fitted_cost(model: PackedLM, *, rounds: int = 3) -> tuple[float, SequenceCost]:
    """(seconds of a micro-step whatever its length, seconds by length), with equal relative errors.

    Of single sequences without targets, as the formula leaves the head out; the fastest of the rounds.
    """
    lengths = np.array([64, 256, 512, 1_024, 2_048, CAPACITY])
    fastest = np.full(len(lengths), np.inf)
    for _ in range(rounds):
        for number, length in enumerate(lengths.tolist()):
            ids = np.random.default_rng(length).integers(0, SHAPE["vocab_size"], length, dtype=np.int32)
            pack = Pack(ids, np.zeros(length, np.uint8), np.array([0, length], np.int32), ("e",))
            batch = to_batch(pack, loss="sequence")
            started = time.process_time()
            model(batch).backward()
            fastest[number] = min(fastest[number], time.process_time() - started)
    terms = np.stack([np.ones(len(lengths)), lengths, lengths.astype(float) ** 2], axis=1)
    fixed, linear, quadratic = np.linalg.lstsq(terms / fastest[:, None], np.ones(len(lengths)), rcond=None)[0]
    return float(fixed), SequenceCost(float(linear), float(quadratic))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rank", type=Path, metavar="DIRECTORY", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank:
        train_rank(arguments.rank, arguments.layers, arguments.rounds)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        store = long_mix_store(directory / "store", arguments.examples, capacity=CAPACITY)
        dealt = plan_of(store, "deal", capacity=CAPACITY, packs_per_step=PACKS_PER_STEP, world_size=RANKS)
        plans = {"deal": dealt}
        plans["best_fit"] = plan_of(
            store, "best_fit", capacity=CAPACITY, packs_per_step=PACKS_PER_STEP, world_size=RANKS
        )
        a_step = RANKS * -(-len(store.index) // (RANKS * dealt.num_steps))  # as many steps as the dealt plan
        plans["naive"] = plan_of(store, "naive", capacity=CAPACITY, packs_per_step=a_step, world_size=RANKS)
        for name, plan in plans.items():
            plan.save(directory / f"{name}.npz")
        epochs = measure(directory, arguments.layers, arguments.rounds)
    fixed, machine = fitted_cost(build(arguments.layers))
    print(f"{len(store.index)} sequences, {store.index.length.sum():,} tokens, {arguments.layers} layers, ", end="")
    print(f"{RANKS} ranks, packs of {CAPACITY:,}; medians of {arguments.rounds} epochs\n")
    print("| plan | micro-steps | time over ideal | wall s | lock-step CPU s | fitted s |\n|---|---|---|---|---|---|")
    formula, fitted = {}, {}
    for name, told in PLANS.items():
        plan, epoch = plans[name], epochs[name]
        micro_steps = plan.shape[0] * plan.shape[1]
        formula[name] = step_times(plan.slot_costs()).sum()
        fitted[name] = fixed * micro_steps + step_times(replace(plan, cost=machine).slot_costs()).sum()
        print(
            f"| {told} | {micro_steps} | {plan.time_over_ideal():.3f} | {epoch.wall:.1f} | {epoch.lock_step:.1f} | ",
            end="",
        )
        print(f"{fitted[name]:.1f} |")
    print("\n| dealt over | formula | fitted | wall | of the formula | lock-step CPU | of the formula |")
    print("|---|---|---|---|---|---|---|")
    missed = []
    for name in ("naive", "best_fit"):
        expected = formula[name] / formula["deal"]
        wall = epochs[name].wall / epochs["deal"].wall
        cpu = epochs[name].lock_step / epochs["deal"].lock_step
        print(f"| {PLANS[name]} | {expected:.3f} | {fitted[name] / fitted['deal']:.3f} | {wall:.3f} | ", end="")
        print(f"{wall / expected:.1%} | {cpu:.3f} | {cpu / expected:.1%} |")
        if wall < GOAL * expected:
            missed.append(f"over {PLANS[name]}: {wall / expected:.1%} of the predicted speed-up, at least {GOAL:.0%}")
    assumed = plans["deal"].cost
    off = (machine.quadratic / machine.linear) / (assumed.quadratic / assumed.linear)
    print(
        f"\nA FLOP of attention takes {off:.2f} times as long here as one of the linear layers, by formula once. "
        f"A micro-step takes {fixed:.2f} s whatever its length."
    )
    if missed:
        raise SystemExit("\ngoals missed:\n" + "\n".join(missed))


if __name__ == "__main__":
    main()
