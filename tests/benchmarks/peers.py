"""Our training step beside TRL's SFTTrainer and Hugging Face's Trainer: same model, data, precision and checkpointing.

The first layers of the quickstart's model and its conversations, already tokenised, for one epoch with AdamW on one
rank and one thread, each trainer in a process of its own. The peers' settings are the best that keep sequences apart on
a CPU: no truncation; TRL's own packing needs flash-attn there. Tokens are those of the conversations, not of padding.
Installs TRL and datasets into a directory that is deleted in the end.
Run: python -m tests.benchmarks.peers [--examples 40] [--layers 6]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from longalign_ray.data.store import TokenStore
from longalign_ray.model_source import local_model_dir
from tests.benchmarks.packed_vs_padded import packed_plan, quickstart_store
from tests.benchmarks.packers import TRL

CAPACITY = 1_536
A_STEP = 8  # sequences of an optimizer step of the peers; ours takes as many packs as hold about those


def features(store: TokenStore) -> list[dict[str, list[int]]]:
    made = []
    for row in range(len(store.index)):
        example = store.example(row)
        ids, targets = example.input_ids.tolist(), (example.loss_weight > 0).tolist()
        labels = [token if target else -100 for token, target in zip(ids, targets, strict=True)]
        made.append({"input_ids": ids, "labels": labels, "completion_mask": [int(target) for target in targets]})
    return made


def settings(kind: Callable[..., Any], directory: Path, *, batch: int, **more: Any) -> Any:
    return kind(
        output_dir=str(directory / "out"),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=A_STEP // batch,
        num_train_epochs=1,
        learning_rate=1e-5,
        gradient_checkpointing=True,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        **more,
    )


def model_of(directory: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory / "model", dtype=torch.float32)


def trl(directory: Path, store: TokenStore, *, batch: int) -> Callable[[], object]:
    from datasets import Dataset  # pyright: ignore[reportMissingImports]
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    grouped = {"train_sampling_strategy": "group_by_length"} if batch > 1 else {}
    rows = [{name: row[name] for name in ("input_ids", "completion_mask")} for row in features(store)]
    trainer = SFTTrainer(
        model=model_of(directory),
        args=settings(SFTConfig, directory, batch=batch, max_length=None, completion_only_loss=True, **grouped),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(directory / "model"),
    )
    return trainer.train


def flattened(directory: Path, store: TokenStore) -> Callable[[], object]:
    """Sequences end to end in a row, which transformers tells apart by their positions."""
    from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in features(store)]
    arguments = settings(TrainingArguments, directory, batch=4, remove_unused_columns=False)
    collator = DataCollatorWithFlattening()
    return Trainer(
        model=model_of(directory),
        args=arguments,
        train_dataset=rows,  # pyright: ignore[reportArgumentType]
        data_collator=collator,
    ).train


def ours(directory: Path, store: TokenStore) -> Callable[[], object]:
    from torch import distributed as dist

    from longalign_ray.config import TrainConfig
    from longalign_ray.data.packed import PackReader
    from longalign_ray.train.engine import TrainEngine
    from longalign_ray.train.loop import train_loop
    from longalign_ray.train.model import load_for_training

    dist.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{directory / 'world'}")
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    plan = packed_plan(store, capacity=CAPACITY, world_size=1)
    config = TrainConfig(num_workers=1, zero_stage=0, learning_rate=1e-5, heldout_every=0, checkpoint_every=10**9)
    model = load_for_training(directory / "model", dtype="float32", config=config)
    engine = TrainEngine(model, config, dtype="float32", micro_steps=plan.shape[1])
    packs = PackReader(plan, store_dir=store.directory, packed_dir=Path("none"))
    return lambda: train_loop(engine, packs, config)


TRAINERS: dict[str, Callable[[Path, TokenStore], Callable[[], object]]] = {
    "TRL SFTTrainer, one sequence at a time": lambda directory, store: trl(directory, store, batch=1),
    "TRL SFTTrainer, padded batches of 4 of like lengths": lambda directory, store: trl(directory, store, batch=4),
    "Hugging Face Trainer, 4 flattened sequences": flattened,
    f"longalign_ray, packs of {CAPACITY}": ours,
}


def measure(name: str, directory: Path) -> None:
    """Prints CPU seconds of one epoch, and the peak of the process before and after."""
    torch.set_num_threads(1)
    train = TRAINERS[name](directory, TokenStore(directory / "store"))
    before, started = peak_gb(), time.process_time()
    train()
    print(json.dumps({"seconds": time.process_time() - started, "before": before, "peak": peak_gb()}))


def peak_gb() -> float:
    """VmHWM of this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1_024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=40)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--measure", nargs=2, metavar=("TRAINER", "DIRECTORY"))
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure[0], Path(arguments.measure[1]))
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory, packages = Path(scratch), Path(scratch) / "packages"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(packages), *TRL]
        subprocess.run(pip, check=True, stderr=subprocess.DEVNULL)
        store = quickstart_store(directory, arguments.examples)
        write_model(directory / "model", arguments.layers)
        environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{packages}", "DS_ACCELERATOR": "cpu"}
        tokens, found = int(store.index.length.sum()), {}
        for name in TRAINERS:
            command = [sys.executable, "-m", "tests.benchmarks.peers", "--measure", name, str(directory)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3_000:]}")
            found[name] = json.loads(done.stdout.splitlines()[-1])
    fastest = min(one["seconds"] for name, one in found.items() if not name.startswith("longalign"))
    print(f"{arguments.examples} conversations, {tokens:,} tokens, {arguments.layers} layers, float32\n")
    print("| trainer | real tokens per CPU second | over the fastest peer | peak GB | of it training |")
    print("|---|---|---|---|---|")
    for name, one in found.items():
        rate, grown = tokens / one["seconds"], one["peak"] - one["before"]
        print(f"| {name} | {rate:,.0f} | {fastest / one['seconds']:.2f} | {one['peak']:.2f} | {grown:.2f} |")


def write_model(directory: Path, layers: int) -> None:
    """The first layers of the quickstart's model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    whole = local_model_dir("bundled:smollm2-135m-instruct")
    AutoModelForCausalLM.from_pretrained(whole, num_hidden_layers=layers, dtype=torch.float32).save_pretrained(
        directory
    )
    AutoTokenizer.from_pretrained(whole).save_pretrained(directory)


if __name__ == "__main__":
    main()
