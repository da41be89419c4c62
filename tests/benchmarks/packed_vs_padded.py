"""Packed training against padded micro-batches, on the quickstart mix: same model, data and precision, one run.

Real tokens per CPU second of forward and backward on one rank, of packs and of micro-batches of 4 in random order, with
the loss that transformers computes (logits of every position), and with the loss head on targets alone as packs have.
Two ranks in lock-step: `lock_step`; a mix of short and long sequences: `long_mix`.

The model has the shape of SmolLM2-135M with `--layers` of its layers and random weights, in float32.
Run: python -m tests.benchmarks.packed_vs_padded [--examples 60] [--layers 4]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
    return store_of([whole.example(row) for row in chosen.tolist()], directory / "store")


def store_of(examples: Sequence[Example], directory: Path) -> TokenStore:
    directory.mkdir()
    write_examples(directory / part_name(0), examples)
    number = len(examples)
    ExampleIndex(
        example_id=np.array([example.example_id for example in examples], dtype=object),
        length=np.array([example.length for example in examples], np.int32),
        num_targets=np.array([example.num_targets for example in examples], np.int32),
        sum_weights=np.array([example.sum_weights for example in examples]),
        file=np.zeros(number, np.int32),
        row=np.arange(number, dtype=np.int32),
        source=np.full(number, "benchmark", dtype=object),
        heldout=np.zeros(number, np.bool_),
        parts=(part_name(0),),
    ).save(directory / "index.parquet")
    return TokenStore(directory)


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


def packed_tokens_per_cpu_second(model: PackedLM, store: TokenStore, plan: StepPlan) -> float:
    """Of a plan for one rank."""
    packs = PackReader(plan, store_dir=store.directory, packed_dir=Path("none"))
    started, tokens = time.process_time(), 0
    for step, micro_step, group in np.ndindex(*plan.shape):
        pack = packs.pack(step, micro_step, group)
        if pack is not None:
            model(to_batch(pack, loss="sequence")).backward()
            tokens += len(pack.input_ids)
    return tokens / (time.process_time() - started)


def padded_tokens_per_cpu_second(model: PackedLM, store: TokenStore, order: Sequence[int], *, own_loss: bool) -> float:
    """Micro-batches of the next 4 rows padded on the right to the longest, with transformers' own attention.

    The loss is transformers' own too, which scores every position, or else on the targets alone by our chunked head.
    """
    backbone: Any = model.model
    backbone.set_attn_implementation("sdpa")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=60)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--capacity", type=int, default=1_536)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        store = quickstart_store(Path(scratch), arguments.examples)
        lengths = store.index.length
        model = build(arguments.layers)
        model(to_batch(Pack.of([store.example(0)]), loss="sequence")).backward()  # first call warms up
        order = np.random.default_rng(0).permutation(len(lengths)).tolist()
        plan = packed_plan(store, capacity=arguments.capacity, world_size=1)
        per_second = {
            "padded micro-batches of 4, transformers' own loss": padded_tokens_per_cpu_second(
                model, store, order, own_loss=True
            ),
            "the same, loss head on targets alone": padded_tokens_per_cpu_second(model, store, order, own_loss=False),
            f"packs of {arguments.capacity}": packed_tokens_per_cpu_second(model, store, plan),
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


if __name__ == "__main__":
    main()
