"""Run by test_watched.py as each rank: a short training with an eye on the held-out loss, the clock and bad losses.

Prints a JSON object: the rows of metrics.jsonl, those of the same run without a held-out loss, and an error message.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import distributed as dist

from longalign_ray.config import TrainConfig
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import PlanSettings, make_plan
from longalign_ray.data.packed import PackReader
from longalign_ray.data.store import Example, ExampleIndex, part_name, write_examples
from longalign_ray.errors import LongAlignError
from longalign_ray.train import attention
from longalign_ray.train.heldout import heldout_loss, heldout_packs, length_bucket
from longalign_ray.train.loop import StepMetrics, train_loop
from longalign_ray.train.sequence_parallel import join_groups

CAPACITY = 64
HELDOUT = {1: 0.3, 4: 1.0, 6: 0.0, 9: 0.1, 11: 0.7, 14: 0.9, 17: 0.5}  # row: share of targets

SPOILT = (("loss", 3), ("gradient", 3), ("gradient", 1), ("gradient", 0))


def write_training(directory: Path, *, world_size: int, sp_degree: int = 1) -> PackReader:
    """The packs of twenty examples of 2 to 60 tokens, of which seven are held out, one of those without a target."""
    store = directory / "store"
    if not (store / "index.parquet").exists():
        _write_store(store)
    settings = PlanSettings(capacity=CAPACITY, packs_per_step=2, world_size=world_size, sp_degree=sp_degree)
    cost = SequenceCost(linear=1.0, quadratic=0.01)
    plan = make_plan(ExampleIndex.load(store / "index.parquet"), settings, cost=cost)
    return PackReader(plan, store_dir=store, packed_dir=directory / "packed")


def _write_store(store: Path) -> None:
    store.mkdir()
    random = np.random.default_rng(0)
    examples = []
    for row, length in enumerate(random.integers(2, 60, 20).tolist()):
        weight = np.where(random.random(length) < HELDOUT.get(row, 0.5), random.choice([100, 30, 1], length), 0)
        weight[-1] = 0 if row == 6 else 100
        ids = random.integers(1, 64, length, dtype=np.int32)
        examples.append(Example(f"e{row}", ids, weight.astype(np.uint8)))
    write_examples(store / part_name(0), examples)
    ExampleIndex(
        example_id=np.array([example.example_id for example in examples], dtype=object),
        length=np.array([example.length for example in examples], np.int32),
        num_targets=np.array([example.num_targets for example in examples], np.int32),
        sum_weights=np.array([example.sum_weights for example in examples]),
        file=np.zeros(len(examples), np.int32),
        row=np.arange(len(examples), dtype=np.int32),
        source=np.full(len(examples), "corpus", object),
        heldout=np.isin(np.arange(len(examples)), list(HELDOUT)),
        parts=(part_name(0),),
    ).save(store / "index.parquet")


def scored_rows(index: ExampleIndex) -> list[int]:
    return [row for row in HELDOUT if index.num_targets[row]]


def build(dtype: torch.dtype, *, packed: bool) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,  # else all sequences have nearly the same loss
        pad_token_id=0,
    )
    torch.manual_seed(0)
    name = attention.register() if packed else "sdpa"
    return AutoModelForCausalLM.from_config(config, attn_implementation=name).to(dtype)


@torch.no_grad()
def reference(packs: PackReader, state: dict[str, torch.Tensor] | None = None) -> dict[str, Any]:
    """By the definition, one held-out sequence at a time, in fp64."""
    model = build(torch.float64, packed=False)
    if state is not None:
        model.load_state_dict(state)
    sums, weights, lengths = [], [], []
    for row in scored_rows(packs.store.index):
        one = packs.store.example(row)
        ids = torch.tensor(one.input_ids, dtype=torch.int64)
        losses = F.cross_entropy(model(ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")
        weight = torch.tensor(one.loss_weight[1:], dtype=torch.float64) / 100
        sums.append((losses * weight).sum().item())
        weights.append(weight.sum().item())
        lengths.append(one.length)
    means = np.array(sums) / np.array(weights)
    by_length: dict[str, list[float]] = {}
    for length, mean in sorted(zip(lengths, means.tolist(), strict=True)):
        by_length.setdefault(length_bucket(length), []).append(mean)
    return {
        "loss": float(means.mean()),
        "token_loss": sum(sums) / sum(weights),
        "by_length": {bucket: float(np.mean(values)) for bucket, values in by_length.items()},
    }


def train(
    packs: PackReader, directory: Path, *, spoilt: str = "", zero_stage: Any = 3, **settings: Any
) -> tuple[list[dict[str, Any]], Any]:
    """(rows, engine) of a run; from step 1 on rank 1's loss is a NaN, or its gradient is infinite, if `spoilt`."""
    from longalign_ray.train.engine import TrainEngine
    from longalign_ray.train.model import prepare_model

    config = TrainConfig(zero_stage=zero_stage, learning_rate=0.01, checkpoint_every=100, **settings)
    model = prepare_model(build(torch.float32, packed=True), gradient_checkpointing=True, head_chunk=8)
    engine = TrainEngine(model, config, dtype="float32", micro_steps=packs.plan.shape[1])
    rows: list[dict[str, Any]] = []

    def on_step(metrics: StepMetrics) -> None:
        rows.append(metrics.row())
        if len(rows) == 1 and dist.get_rank() == 1:
            if spoilt == "loss":
                engine.module.register_forward_hook(lambda *results: results[2] * float("nan"))
            if spoilt == "gradient":
                head = engine.module.model.lm_head
                head.register_forward_pre_hook(
                    lambda _, given: given[0].register_hook(lambda g: g * float("inf")) and None
                )

    train_loop(engine, packs, config, on_step=on_step, profile_dir=directory / "profile")
    return rows, engine


def main(directory: Path) -> dict[str, Any]:
    import deepspeed

    own = directory / f"rank-{dist.get_rank()}"
    own.mkdir()
    packs = write_training(own, world_size=dist.get_world_size())
    rows, engine = train(packs, directory, heldout_every=2, profile_steps=(1, 1))
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        named = engine.module.named_parameters()
        state = {name.removeprefix("model."): parameter.detach().double().clone() for name, parameter in named}
    heldout = heldout_packs(write_training(own, world_size=2, sp_degree=2))
    assert heldout is not None
    shared = heldout_loss(engine.module, heldout, sequence_group=join_groups(2, num_heads=4))
    without, _ = train(packs, directory, heldout_every=0)
    messages = {}
    for spoilt, zero_stage in SPOILT:
        try:
            train(packs, directory, heldout_every=0, spoilt=spoilt, zero_stage=zero_stage)
        except LongAlignError as error:
            messages[f"{spoilt}-{zero_stage}"] = str(error)
    made = {"rows": rows, "without": without, "messages": messages, "shared": [shared.row()]}
    return {**made, "reference": reference(packs, state)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    made = main(Path(sys.argv[1]))
    print(json.dumps(made))
    dist.destroy_process_group()
