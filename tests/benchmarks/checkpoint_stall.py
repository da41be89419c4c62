"""Seconds that training stands still for a checkpoint, and what its upload costs the steps beside it. Markdown table.

    python -m tests.benchmarks.checkpoint_stall [--steps 6]

Two ranks under Ray Train and ZeRO-3 on this machine, a random Llama of the shape of SmolLM2-135M in fp32 (1.6 GB of
shards), 128 tokens a rank. `report` waits for the upload, `background` is what training does.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

SHAPE = {
    "vocab_size": 49_152,
    "hidden_size": 576,
    "intermediate_size": 1_536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
TOKENS = 128
BESIDE = 3  # steps after a checkpoint: by then it has been uploaded


def work(settings: dict[str, Any]) -> None:
    import ray.train
    import torch
    from ray.train import CheckpointUploadMode
    from transformers import AutoModelForCausalLM, LlamaConfig

    from longalign_ray.config import TrainConfig
    from longalign_ray.data.store import Example, Pack
    from longalign_ray.train import attention
    from longalign_ray.train.batch import to_batch
    from longalign_ray.train.checkpoint import TrainState
    from longalign_ray.train.checkpoint_store import CheckpointStore
    from longalign_ray.train.engine import TrainEngine
    from longalign_ray.train.model import prepare_model
    from longalign_ray.train.ray_checkpoints import Uploads

    torch.set_num_threads(1)
    rank, store = ray.train.get_context().get_world_rank(), CheckpointStore.at(Path(settings["directory"]))
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPE), attn_implementation=attention.register())
    engine = TrainEngine(
        prepare_model(model, gradient_checkpointing=True, head_chunk=256), TrainConfig(), dtype="float32", micro_steps=1
    )
    ids = np.random.default_rng(rank).integers(1, 49_152, TOKENS, dtype=np.int32)
    batch = to_batch(Pack.of([Example("e", ids, np.full(TOKENS, 100, np.uint8))]), loss="sequence")
    uploads = Uploads(store, rank=rank, local_rank=rank)

    def step() -> float:
        started = time.perf_counter()
        engine.forward_backward(batch, step_total=2, last=True)
        engine.step(1e-5)
        return time.perf_counter() - started

    def report() -> None:
        directory = Path(tempfile.mkdtemp(prefix="longalign-stall-"))
        engine.save(directory)
        ray.train.report(
            {},
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_upload_mode=CheckpointUploadMode.SYNC,
            delete_local_checkpoint_after_upload=True,
        )

    def background(number: int) -> None:
        uploads.start(engine.begin_save, TrainState(number, 0, "plan", 2, 3), {})

    step()  # makes the optimizer's state
    background(0)  # and this the memory of the copy
    rows = []
    for number in range(settings["steps"]):
        for kind, checkpoint in (("report", report), ("background", lambda: background(number))):  # noqa: B023
            alone = step()
            started, started_cpu = time.perf_counter(), time.thread_time()
            checkpoint()
            stall, cpu = time.perf_counter() - started, time.thread_time() - started_cpu
            beside = [step() for _ in range(BESIDE)]
            rows.append([kind, stall, cpu, alone, sum(beside) - BESIDE * alone])
    if rank == 0:
        Path(settings["rows"]).write_text(json.dumps(rows), encoding="utf-8")


def main() -> None:
    import ray
    from ray.train import CheckpointConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from longalign_ray.stages import set_ray_environment

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    set_ray_environment()
    ray.init(num_cpus=3, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    directory = Path(tempfile.mkdtemp(prefix="longalign-stall-"))
    try:
        TorchTrainer(
            work,
            train_loop_config={
                "directory": str(directory / "checkpoints"),
                "rows": str(directory / "rows.json"),
                "steps": parser.parse_args().steps,
            },
            scaling_config=ScalingConfig(num_workers=2),
            run_config=RunConfig(
                name="checkpoints", storage_path=str(directory), checkpoint_config=CheckpointConfig(num_to_keep=1)
            ),
        ).fit()
        rows = json.loads((directory / "rows.json").read_text(encoding="utf-8"))
    finally:
        shutil.rmtree(directory)
    print("| checkpoint | stands still, s | its CPU, s | a step alone, s | stands still, % of it | steps after, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for kind in ("report", "background"):
        stall, cpu, alone, lost = np.median([row[1:] for row in rows if row[0] == kind], axis=0)
        print(f"| {kind} | {stall:.2f} | {cpu:.2f} | {alone:.2f} | {100 * stall / alone:.1f} | {lost:.2f} |")


if __name__ == "__main__":
    main()
