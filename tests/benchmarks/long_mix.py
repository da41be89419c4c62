"""Packed training against padded micro-batches of 4 on a mix of short and long sequences: same model, data, precision.

Lengths are those of LongAlign's kind, scaled from packs of 65,536 tokens to `--capacity`: 90 % lognormal, 10 % uniform
from an eighth of the capacity to all of it. Real tokens per CPU second of forward and backward on one rank:
micro-batches of 4 in random order and sorted by length, with the loss head on targets alone as packs have it, and with
the loss that transformers computes. The model has the shape of SmolLM2-135M with `--layers` of its layers and random
weights, in float32. With transformers' loss and a capacity of 4,096 a micro-batch of 4 takes up to 11 GB;
`--no-own-loss` leaves that out.
Ends with 1 where the goal is missed.
Run: python -m tests.benchmarks.long_mix [--examples 40] [--layers 2] [--capacity 4096] [--no-own-loss]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from longalign_ray.data.cost import sequence_cost
from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import FULL_WEIGHT, Example, Pack, TokenStore
from longalign_ray.train.batch import to_batch
from tests.benchmarks.packed_vs_padded import (
    SHAPE,
    build,
    packed_tokens_per_cpu_second,
    padded_tokens_per_cpu_second,
    store_of,
)
from tests.unit.data.mixes import long_context_mix

GOAL = 2.2
"""Over micro-batches of 4 in random order with the same loss head."""


def long_mix_store(directory: Path, number: int, *, capacity: int, seed: int = 0) -> TokenStore:
    """Random tokens. The last half of a short sequence is the answer, of a long one the last capacity / 128 tokens."""
    random = np.random.default_rng(seed)
    examples = []
    for row, length in enumerate(np.maximum(long_context_mix(number, seed=seed) * capacity // 65_536, 8).tolist()):
        weights = np.zeros(length, np.uint8)
        weights[-(length // 2 if length <= capacity // 8 else capacity // 128) :] = FULL_WEIGHT
        examples.append(Example(f"e{row}", random.integers(0, SHAPE["vocab_size"], length, dtype=np.int32), weights))
    return store_of(examples, directory)


def plan_of(store: TokenStore, strategy: str, *, capacity: int, packs_per_step: int, world_size: int = 1) -> StepPlan:
    """`deal` balances for ranks in lock-step; packs of other strategies run shuffled, as trainers feed them."""
    settings = PlanSettings(
        strategy=strategy,
        balance="lock_step" if strategy == "deal" else "none",
        capacity=capacity,
        packs_per_step=packs_per_step,
        world_size=world_size,
    )
    return make_plan(store.index, settings, cost=sequence_cost({**SHAPE, "num_hidden_layers": 1}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--capacity", type=int, default=4_096)
    parser.add_argument("--own-loss", action=argparse.BooleanOptionalAction, default=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    model = build(arguments.layers)
    rates: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        store = long_mix_store(Path(scratch) / "store", arguments.examples, capacity=arguments.capacity)
        lengths = store.index.length
        model(to_batch(Pack.of([store.example(int(lengths.argmin()))]), loss="sequence")).backward()  # warms up
        orders = {
            "micro-batches of 4 in random order": np.random.default_rng(0).permutation(len(lengths)),
            "micro-batches of 4 sorted by length": np.argsort(lengths, kind="stable"),
        }
        for name, order in orders.items():
            rates[name] = padded_tokens_per_cpu_second(model, store, order.tolist(), own_loss=False)
        for strategy in ("best_fit", "deal"):
            plan = plan_of(store, strategy, capacity=arguments.capacity, packs_per_step=4)
            rates[f"packs, {strategy}"] = packed_tokens_per_cpu_second(model, store, plan)
        for name, order in orders.items() if arguments.own_loss else ():
            rate = padded_tokens_per_cpu_second(model, store, order.tolist(), own_loss=True)
            rates[f"{name}, transformers' own loss"] = rate
    naive, by_length = (rates[name] for name in orders)
    print(
        f"{len(lengths)} sequences of {lengths.min()}-{lengths.max()} tokens (median {np.median(lengths):.0f}), ",
        end="",
    )
    print(f"{lengths.sum():,} tokens, {store.index.num_targets.sum():,} of them targets; {arguments.layers} layers\n")
    print("| one rank, forward and backward | real tokens per CPU second | over random order | over sorted |")
    print("|---|---|---|---|")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} | {rate / naive:.2f} | {rate / by_length:.2f} |")
    found = rates["packs, deal"] / naive
    print(f"\nGoal: dealt packs at least {GOAL} x random order: {found:.2f}, {'met' if found >= GOAL else 'missed'}.")
    if found < GOAL:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
