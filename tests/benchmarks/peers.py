"""Our training step beside TRL's, Hugging Face's and LLaMA-Factory's trainers: same model, data and precision.

The first layers of the quickstart's model and its conversations, already tokenised, for one epoch with AdamW on one
rank and one thread, each trainer in a process of its own. The peers' settings are the best that keep sequences apart on
a CPU: no truncation; TRL's own packing needs flash-attn there. Tokens are those of the conversations, not of padding.
All with transformers' gradient checkpointing. "Fixed" is what any trainer in float32 with AdamW holds, whatever it
trains on: the process before training, weights, gradients and two moments. What the trainers do with conversations that
are too long: `over_long`. Ours has the allocator's settings that `train` gives its workers (`CPU_ALLOCATOR`).
Installs the peers into a directory that is deleted in the end; a row says so where LLaMA-Factory cannot run. It asks
for older transformers, so its check is turned off; its own gradient checkpointing fails with these and is not used.
Ends with 1 where a goal is missed.
Run: python -m tests.benchmarks.peers [--examples 40] [--layers 6]
"""

from __future__ import annotations

import argparse
import json
import os
import re
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
from longalign_ray.train.memory import CPU_ALLOCATOR
from tests.benchmarks.packed_vs_padded import packed_plan, quickstart_store
from tests.benchmarks.packers import LLAMA_FACTORY, TRL, install

CAPACITY = 1_536
LLAMA_FACTORY_NEEDS = ("omegaconf==2.4.0", "trl==0.24.0", "torchaudio==2.11.0")
GOALS = {"speed": 1.5, "memory": 0.5}
"""Over the fastest peer; peak of the process over the least of the peers."""
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


def chats_of(directory: Path, store: TokenStore) -> list[list[dict[str, str]]]:
    """The messages of the conversations, from their tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory / "model")
    texts = [tokenizer.decode(store.example(row).input_ids.tolist()) for row in range(len(store.index))]
    turns = [re.findall(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>", text, re.DOTALL) for text in texts]
    return [[{"role": role, "content": content} for role, content in one] for one in turns]


def llama_factory(directory: Path, chats: list[list[dict[str, str]]], *, cutoff: int) -> Any:
    """Its trainer, with packs of `cutoff` tokens whose sequences a mask keeps apart."""
    from llamafactory import data, hparams, model  # pyright: ignore[reportMissingImports]
    from llamafactory.train.sft.trainer import CustomSeq2SeqTrainer  # pyright: ignore[reportMissingImports]

    tags = {f"{role}_tag": role for role in ("role", "content", "user", "assistant", "system")}
    about = {"file_name": "chats.json", "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    (directory / "dataset_info.json").write_text(json.dumps({"chats": about}), encoding="utf-8")
    (directory / "chats.json").write_text(json.dumps([{"messages": one} for one in chats]), encoding="utf-8")
    asked = settings(dict, directory, batch=1)
    asked |= {"gradient_accumulation_steps": 2, "report_to": "none", "flash_attn": "sdpa", "overwrite_cache": True}
    asked |= {"stage": "sft", "do_train": True, "finetuning_type": "full", "template": "smollm2", "cutoff_len": cutoff}
    asked |= {"dataset": "chats", "dataset_dir": str(directory), "model_name_or_path": str(directory / "model")}
    asked |= {"packing": True, "neat_packing": True, "disable_gradient_checkpointing": True}
    model_args, data_args, arguments, finetuning, _ = hparams.get_train_args(asked)
    tools = model.load_tokenizer(model_args)
    template = data.get_template_and_fix_tokenizer(tools["tokenizer"], data_args)
    datasets = data.get_dataset(template, model_args, data_args, arguments, stage="sft", **tools)
    loaded = model.load_model(tools["tokenizer"], model_args, finetuning, True)
    collator = data.SFTDataCollatorWith4DAttentionMask(
        template=template,
        model=loaded,
        pad_to_multiple_of=8,
        label_pad_token_id=-100,
        block_diag_attn=model_args.block_diag_attn,
        neat_packing=True,
        attn_implementation="sdpa",
        compute_dtype=model_args.compute_dtype,
        **tools,
    )
    own = {"finetuning_args": finetuning, "gen_kwargs": {}}
    return CustomSeq2SeqTrainer(model=loaded, args=arguments, data_collator=collator, **own, **datasets, **tools)


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
    "LLaMA-Factory, neat_packing": lambda directory, store: (
        llama_factory(directory, chats_of(directory, store), cutoff=CAPACITY).train
    ),
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
        directory = Path(scratch)
        store = quickstart_store(directory, arguments.examples)
        write_model(directory / "model", arguments.layers)
        tokens, found, failed = int(store.index.length.sum()), {}, []
        packages = {kind: install_peer(kind, directory / kind) for kind in ("TRL", "LLaMA-Factory")}
        for name in TRAINERS:
            kind = name.split(" ")[0].rstrip(",")
            done = run_with(
                packages.get(kind, packages["TRL"] if kind == "Hugging" else ""),
                "peers",
                "--measure",
                name,
                str(directory),
            )
            if done.returncode and name.startswith("LLaMA"):
                failed.append(f"| {name}: not measured, {done.stderr.strip().splitlines()[-1][:200]} |{' - |' * 5}")
            elif done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3_000:]}")
            else:
                found[name] = json.loads(done.stdout.splitlines()[-1])
        fixed = 16 * sum(weights.numel() for weights in model_of(directory).parameters()) / 1e9
    peers = [one for name, one in found.items() if not name.startswith("longalign")]
    fastest, least = min(one["seconds"] for one in peers), min(one["peak"] for one in peers)
    print(f"{arguments.examples} conversations, {tokens:,} tokens, {arguments.layers} layers, float32\n")
    print("| trainer | real tokens per CPU second | over the fastest peer | peak GB | of it training | fixed | rest |")
    print("|---|---|---|---|---|---|---|")
    for name, one in found.items():
        grown, always = one["peak"] - one["before"], fixed + one["before"] - fixed / 4  # weights were there before
        print(f"| {name} | {tokens / one['seconds']:,.0f} | {fastest / one['seconds']:.2f} | ", end="")
        print(f"{one['peak']:.2f} | {grown:.2f} | {always:.2f} | {one['peak'] - always:.2f} |")
    print("\n".join(failed))
    own = next(one for name, one in found.items() if name.startswith("longalign"))
    speed, memory = fastest / own["seconds"], own["peak"] / least
    print(f"\nWeights, gradients and moments take {fixed:.2f} GB in any of them.")
    goals = {
        f"{speed:.2f} times the fastest peer, at least {GOALS['speed']}": speed >= GOALS["speed"],
        f"{memory:.2f} of the least peak of the peers, at most {GOALS['memory']}": memory <= GOALS["memory"],
    }
    if missed := [goal for goal, met in goals.items() if not met]:
        raise SystemExit("\ngoals missed:\n" + "\n".join(missed))


def install_peer(kind: str, directory: Path) -> str:
    """Directory of the packages of a peer, without what they depend on."""
    install(TRL if kind == "TRL" else (*LLAMA_FACTORY, *LLAMA_FACTORY_NEEDS), directory)
    for library in directory.glob("torchaudio/lib/*.so"):  # wants CUDA; without it torchaudio can be imported
        library.unlink()
    return str(directory)


def run_with(packages: str, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`arguments` of a script of this directory in a process that finds `packages`."""
    environment = {**os.environ, "PYTHONPATH": f"{os.getcwd()}:{packages}", "DS_ACCELERATOR": "cpu"}
    environment |= {"DISABLE_VERSION_CHECK": "1"} if packages else CPU_ALLOCATOR  # the check is LLaMA-Factory's
    command = [sys.executable, "-m", f"tests.benchmarks.{script}", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


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
