"""Run by test_resume.py: six steps on two ranks, and the same with steps 2 and 3 on one rank and the rest on two.

Argument: a directory. Prints JSON: case -> [step, loss, gradient norm] of each step of four runs: the first, its steps
2 and 3 taken again on two ranks, on one, and the rest on two. All ranks are forked from this process, so that
everything is imported once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import distributed as dist

from longalign_ray.config import AdapterConfig, TrainConfig
from longalign_ray.data.store import Example, Pack
from longalign_ray.train import attention
from longalign_ray.train.adapters import add_adapter
from longalign_ray.train.batch import to_batch
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore, checkpoint_name, list_files
from longalign_ray.train.engine import TrainEngine, all_reduce_sum
from longalign_ray.train.model import prepare_model
from longalign_ray.train.resume import agree_on_checkpoint, loadable
from tests.integration.deepspeed_ranks import import_all

Stage = Literal[0, 1, 2, 3]
PACKS_PER_STEP, NUM_STEPS = 2, 6
Row = tuple[int, float, float]


@dataclass(frozen=True, slots=True)
class Case:
    stages: tuple[Stage, Stage, Stage]
    """Of ZeRO: on two ranks, on one, on two again."""
    dtype: str = "float32"
    adapter: bool = False
    async_checkpoint: bool = True

    def __str__(self) -> str:
        ways = ["adapter"] * self.adapter + ["written-at-once"] * (not self.async_checkpoint)
        return "-".join([*map(str, self.stages), self.dtype, *ways])


CASES = [
    Case((3, 3, 3)),
    Case((1, 2, 1)),
    Case((0, 0, 0), "bfloat16"),
    Case((1, 2, 1), "bfloat16"),
    Case((3, 3, 3), "bfloat16"),
    Case((3, 3, 3), adapter=True),
    Case((2, 1, 2), async_checkpoint=False),
]


def pack(step: int, number: int) -> Pack:
    random = np.random.default_rng([step, number])
    length = int(random.integers(9, 30))
    return Pack.of([Example("e", random.integers(1, 61, length, dtype=np.int32), np.full(length, 100, np.uint8))])


def run(case: Case, directory: Path, *, number: int, last_step: int, save_after: tuple[int, ...] = ()) -> list[Row]:
    """Continues from the newest whole checkpoint below `directory`, or from step 0. `number`: of the ZeRO stage."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    rank, world_size, stage = dist.get_rank(), dist.get_world_size(), case.stages[number]
    store, first_step, convert = CheckpointStore.at(directory), 0, False
    if (stored := agree_on_checkpoint(store)) is not None:
        stored.state.check(plan_digest="plan", zero_stage=stage)
        convert = not stored.state.fits(world_size=world_size, zero_stage=stage)
    shape = LlamaConfig(
        vocab_size=61,  # odd sizes: no parameter parts evenly
        hidden_size=36,
        intermediate_size=45,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0 if case.adapter else rank)  # what is not loaded differs, but for the model below an adapter
    built = AutoModelForCausalLM.from_config(shape, attn_implementation=attention.register())
    if stored is None:
        for parameter in built.parameters():
            dist.broadcast(parameter.data, 0)
    micro_steps = PACKS_PER_STEP // world_size
    dtype = getattr(torch, case.dtype)
    model = prepare_model(built.to(dtype), gradient_checkpointing=False, head_chunk=64)
    if case.adapter:
        add_adapter(model, AdapterConfig(rank=3), seed=1 + (stored is not None))
    config = TrainConfig(zero_stage=stage, async_checkpoint=case.async_checkpoint)
    engine = TrainEngine(model, config, dtype=case.dtype, micro_steps=micro_steps, load_universal=convert)
    if stored is not None:
        with loadable(store, stored, convert=convert, local_rank=rank) as loaded:
            engine.load(loaded)
        first_step = stored.state.step
    rows: list[Row] = []
    end_save: Callable[[], None] | None = None
    for step in range(first_step, last_step):
        loss = torch.zeros(())
        for micro_step in range(micro_steps):
            batch, last = to_batch(pack(step, micro_step * world_size + rank), loss="sequence"), micro_step + 1
            loss += engine.forward_backward(batch, step_total=PACKS_PER_STEP, last=last == micro_steps)
        grad_norm = engine.step(1e-2 / (step + 1))
        assert grad_norm is not None
        rows.append((step, all_reduce_sum(loss).item(), grad_norm))
        if end_save is not None:  # of the step before: this one has changed all that it copied
            end_save()
        end_save = None
        if step + 1 in save_after:
            state = TrainState(step + 1, 0, "plan", world_size, stage)
            end_save = begin_save(engine, store, state, at_once=not case.async_checkpoint)
    if end_save is not None:
        end_save()
    return rows


def begin_save(engine: TrainEngine, store: CheckpointStore, state: TrainState, *, at_once: bool) -> Callable[[], None]:
    rank, local = dist.get_rank(), Path(store.path).parent / f"local-{dist.get_rank()}-{state.step}"
    write = engine.begin_save(local)
    assert bool(list(local.rglob("*.pt"))) is at_once

    def end() -> None:
        write()
        store.upload(local, checkpoint_name(state.step)[:13])
        store.finish(checkpoint_name(state.step)[:13], rank, list_files(local), state if rank == 0 else None)
        dist.barrier()

    return end


def in_world(world_size: int, work: Callable[[], Any]) -> Any:
    """What `work` returns on rank 0 of so many ranks."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    results = fork.SimpleQueue()

    def one_rank(rank: int) -> None:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        dist.init_process_group("gloo", timeout=timedelta(seconds=120))
        result = work()
        if rank == 0:
            results.put(result)
        dist.destroy_process_group()

    ranks = [fork.Process(target=one_rank, args=(rank,)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    if any(rank.exitcode for rank in ranks):
        raise SystemExit(1)
    return results.get()


def flip_a_byte_of_step(step: int, directory: Path) -> None:
    [shard, *_] = sorted(directory.glob(f"{checkpoint_name(step)[:13]}/deepspeed/*.pt"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)


if __name__ == "__main__":
    torch.set_num_threads(1)
    import_all(["llama"])
    places = [Path(sys.argv[1]) / f"run+{number}" / "checkpoints" for number in range(len(CASES))]
    both = list(zip(CASES, places, strict=True))
    whole = in_world(2, lambda: [run(case, at, number=0, last_step=NUM_STEPS, save_after=(2,)) for case, at in both])
    same = in_world(2, lambda: [run(case, at, number=0, last_step=4) for case, at in both])
    one_rank = in_world(1, lambda: [run(case, at, number=1, last_step=4, save_after=(3, 4)) for case, at in both])
    for place in places:
        flip_a_byte_of_step(4, place)
    two_again = in_world(2, lambda: [run(case, at, number=2, last_step=NUM_STEPS) for case, at in both])
    runs = zip(CASES, whole, same, one_rank, two_again, strict=True)
    print(json.dumps({str(case): rows for case, *rows in runs}))
