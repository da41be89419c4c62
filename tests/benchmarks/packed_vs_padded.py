"""Packed training against two unpacked ways, on the quickstart mix: same model, data and precision, one run.

1. Padded micro-batches of 4 in random order: real tokens per CPU second of forward and backward, on one rank; with the
   loss that transformers computes (logits of every position), and with the loss head on targets alone as packs have it.
2. One sequence a rank in random order on two ranks in lock-step: wall seconds of an epoch under ZeRO-3.

The model has the shape of SmolLM2-135M with `--layers` of its layers and random weights, in float32.
Run: python -m tests.benchmarks.packed_vs_padded [--examples 60] [--layers 4]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longalign_ray.config import TrainConfig
from longalign_ray.data.cost import sequence_cost
from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.packed import PackReader
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import Example, ExampleIndex, Pack, TokenStore, part_name, write_examples
from longalign_ray.train import attention
from longalign_ray.train.batch import to_batch
from longalign_ray.train.model import PackedLM, prepare_model

RECIPE = "jobs/recipes/quickstart.yaml"
SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}


def quickstart_store(directory: Path, number: int) -> TokenStore:
    """A store of `number` examples of the quickstart's corpus, chosen by seed."""
    import ray

    from longalign_ray import stages

    config, run_dir = stages.open_run(RECIPE, [f"run_dir={directory / 'run'}"])
    stages.construct(config, run_dir)
    stages.prepare(config, run_dir)
    ray.shutdown()
    whole = TokenStore(run_dir.store)
    chosen = np.random.default_rng(0).permutation(len(whole.index))[:number]
    store = directory / "store"
    store.mkdir()
    write_examples(store / part_name(0), [whole.example(row) for row in chosen.tolist()])
    index = whole.index
    ExampleIndex(
        example_id=index.example_id[chosen],
        length=index.length[chosen],
        num_targets=index.num_targets[chosen],
        sum_weights=index.sum_weights[chosen],
        file=np.zeros(len(chosen), np.int32),
        row=np.arange(len(chosen), dtype=np.int32),
        source=index.source[chosen],
        heldout=np.zeros(len(chosen), np.bool_),
        parts=(part_name(0),),
    ).save(store / "index.parquet")
    return TokenStore(store)


def build(layers: int) -> PackedLM:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=layers)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention.register())
    return prepare_model(model, gradient_checkpointing=True, head_chunk=1_024)


def packed_plan(store: TokenStore, *, capacity: int, world_size: int) -> StepPlan:
    cost = sequence_cost({**SHAPE, "num_hidden_layers": 1})
    settings = PlanSettings(
        strategy="best_fit", capacity=capacity, packs_per_step=4 * world_size, world_size=world_size
    )
    return make_plan(store.index, settings, cost=cost)


def one_a_rank_plan(store: TokenStore, packed: StepPlan) -> StepPlan:
    """As many steps as `packed`, each with its share of the examples, one a rank and micro-step, in random order."""
    steps, _, groups = packed.shape
    rows = np.random.default_rng(0).permutation(len(store.index))
    micro_steps = -(-len(rows) // (steps * groups))
    slots = np.full(steps * micro_steps * groups, -1)
    slots[np.linspace(0, len(slots) - 1, len(rows)).astype(int)] = rows  # idle slots are spread evenly
    used = slots >= 0
    targets = np.where(used, store.index.num_targets[slots], 0).reshape(steps, -1)
    return replace(
        packed,
        example_rows=slots[used],
        lengths=store.index.length[slots[used]],
        offsets=np.concatenate([[0], np.cumsum(used)]),
        shape=(steps, micro_steps, groups),
        num_sequences=(targets > 0).sum(axis=1),
        num_targets=targets.sum(axis=1),
        sum_weights=targets.sum(axis=1, dtype=np.float64),
    )


def packed_tokens_per_cpu_second(model: PackedLM, store: TokenStore, capacity: int) -> float:
    plan = packed_plan(store, capacity=capacity, world_size=1)
    packs = PackReader(plan, store_dir=store.directory, packed_dir=Path("none"))
    started, tokens = time.process_time(), 0
    for step, micro_step, group in np.ndindex(*plan.shape):
        pack = packs.pack(step, micro_step, group)
        if pack is not None:
            model(to_batch(pack, loss="sequence")).backward()
            tokens += len(pack.input_ids)
    return tokens / (time.process_time() - started)


def padded_tokens_per_cpu_second(model: PackedLM, store: TokenStore, *, own_loss: bool) -> float:
    """Micro-batches of 4 padded on the right to the longest, with transformers' own attention.

    The loss is transformers' own too, which scores every position, or else on the targets alone by our chunked head.
    """
    backbone: Any = model.model
    backbone.set_attn_implementation("sdpa")
    order = np.random.default_rng(0).permutation(len(store.index)).tolist()
    started, tokens = time.process_time(), 0
    for first in range(0, len(order), 4):
        examples = [store.example(row) for row in order[first : first + 4]]
        ids, mask, labels = padded(examples)
        if own_loss:
            loss = backbone(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        else:
            hidden = backbone.base_model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
            targets = labels[:, 1:] != -100
            weights = torch.full((int(targets.sum()),), 1 / int(targets.sum()))
            loss = backbone.lm_head(hidden[:, :-1][targets], labels[:, 1:][targets], weights)
        loss.backward()
        tokens += sum(example.length for example in examples)
    backbone.set_attn_implementation(attention.NAME)
    return tokens / (time.process_time() - started)


def padded(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, attention mask and labels, each [examples, longest]; a label is -100 where there is no target."""
    ids = torch.zeros(len(examples), max(example.length for example in examples), dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for number, example in enumerate(examples):
        ids[number, : example.length] = torch.tensor(example.input_ids)
        mask[number, : example.length] = 1
        targets = torch.tensor(example.loss_weight > 0).nonzero()[:, 0]
        labels[number, targets] = ids[number, targets]
    return ids, mask, labels


def train_rank(store_dir: Path, plan_file: Path, layers: int) -> None:
    """One of two ranks: prints the wall seconds of the plan's steps after the first."""
    from torch import distributed as dist

    from longalign_ray.train.engine import TrainEngine
    from longalign_ray.train.loop import train_loop

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    plan = StepPlan.load(plan_file)
    config = TrainConfig(checkpoint_every=10**9)
    engine = TrainEngine(build(layers), config, dtype="float32", micro_steps=plan.shape[1])
    packs = PackReader(plan, store_dir=store_dir, packed_dir=Path("none"))
    seconds: list[float] = []
    train_loop(engine, packs, config, on_step=lambda metrics: seconds.append(metrics.seconds))
    if dist.get_rank() == 0:
        print(json.dumps({"seconds": sum(seconds), "tokens": int(plan.lengths.sum())}))
    dist.destroy_process_group()


def lock_step_seconds(store: TokenStore, plan: StepPlan, layers: int, directory: Path) -> dict[str, float]:
    plan_file = directory / "plan.npz"
    plan.save(plan_file)
    ranks = []
    for rank in range(2):
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29_577}
        command = [sys.executable, "-m", "tests.benchmarks.packed_vs_padded", "--rank", str(store.directory)]
        command += [str(plan_file), "--layers", str(layers)]
        environment = {**os.environ, **{name: str(value) for name, value in world.items()}}
        ranks.append(
            subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
    output = [rank.communicate()[0] for rank in ranks]
    if any(rank.returncode for rank in ranks):
        raise SystemExit("a rank failed; run this script's --rank by hand to see why")
    return json.loads(output[0].splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=1_536)
    parser.add_argument("--rank", nargs=2, type=Path, metavar=("STORE", "PLAN"))
    arguments = parser.parse_args()
    if arguments.rank:
        train_rank(arguments.rank[0], arguments.rank[1], arguments.layers)
        return
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        store = quickstart_store(Path(scratch), arguments.examples)
        lengths = store.index.length
        model = build(arguments.layers)
        model(to_batch(Pack.of([store.example(0)]), loss="sequence")).backward()  # first call warms up
        per_second = {
            "padded micro-batches of 4, transformers' own loss": padded_tokens_per_cpu_second(
                model, store, own_loss=True
            ),
            "the same, loss head on targets alone": padded_tokens_per_cpu_second(model, store, own_loss=False),
            f"packs of {arguments.capacity}": packed_tokens_per_cpu_second(model, store, arguments.capacity),
        }
        print(
            f"{len(lengths)} examples of {lengths.min()}-{lengths.max()} tokens (median {np.median(lengths):.0f}), ",
            end="",
        )
        print(f"{arguments.layers} layers\n")
        print("| one rank, forward and backward | real tokens per CPU second | ratio |\n|---|---|---|")
        naive = next(iter(per_second.values()))
        for name, rate in per_second.items():
            print(f"| {name} | {rate:,.0f} | {rate / naive:.2f} |")
        print()
        plan = packed_plan(store, capacity=arguments.capacity, world_size=2)
        runs = {"one sequence a rank, random order": one_a_rank_plan(store, plan), "packed, balanced in bands": plan}
        print("| two ranks in lock-step, ZeRO-3, one epoch | micro-steps | time / ideal by cost | wall s | ratio |")
        print("|---|---|---|---|---|")
        first = None
        for name, one in runs.items():
            seconds = lock_step_seconds(store, one, arguments.layers, Path(scratch))["seconds"]
            first = first or seconds
            micro_steps = one.shape[0] * one.shape[1]
            print(f"| {name} | {micro_steps} | {one.time_over_ideal():.2f} | {seconds:.1f} | {first / seconds:.2f} |")


if __name__ == "__main__":
    main()
