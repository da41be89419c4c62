"""Peak memory of a process that trains on ever longer packs, beside its forecast: a Llama of 34M parameters, 32k words.

One forward and backward pass in float32 with gradient checkpointing and the loss head in chunks, sequences of 2,048
tokens of which every token is a target, each size in its own process; with and without the allocator's settings
(`CPU_ALLOCATOR`). Linux only: the peak is VmHWM, as the maximum that getrusage tells begins with the parent's.
Run: python -m tests.benchmarks.memory_by_tokens [--tokens 16384 32768]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from longalign_ray.train.memory import CPU_ALLOCATOR, Levers, MemoryTerms, memory_terms
from longalign_ray.train.model_shape import ModelShape

LLAMA_34M = {
    "hidden_size": 384,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "intermediate_size": 1_024,
    "vocab_size": 32_000,
}
SEQUENCE = 2_048
GOALS_GIB = {16_384: 2.5, 32_768: 3.0}


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one process, in bytes."""

    fixed: int
    """After the model was built, without its weights."""
    peak: int
    cpu_seconds: float


def measure(
    config: Mapping[str, Any], tokens: int, *, steps: int = 0, checkpointing: bool = True, tuned: bool = True
) -> Measured:
    """In a process of its own; `steps` AdamW steps, or one forward and backward pass without an optimizer."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    for name, value in CPU_ALLOCATOR.items():
        environment.pop(name, None)
        if tuned:
            environment[name] = value
    asked = json.dumps([config, tokens, steps, checkpointing])
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.memory_by_tokens", "--one", asked],
        env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"{tokens} tokens: exit {done.returncode} (-9: killed, memory ran out) {done.stderr}")
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def forecast(config: Mapping[str, Any], tokens: int, *, fixed: float, checkpointing: bool = True) -> MemoryTerms:
    """Of the same on one rank without ZeRO, in a process that takes `fixed` bytes itself."""
    levers = Levers(ranks=1, zero_stage=0, gradient_checkpointing=checkpointing, weight_bytes=4, on_gpu=False)
    return replace(memory_terms(ModelShape.of(config), tokens_per_rank=tokens, levers=levers), fixed=fixed)


def _one(config: dict[str, Any], tokens: int, steps: int, checkpointing: bool) -> None:
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from longalign_ray.data.store import Pack
    from longalign_ray.train import attention
    from longalign_ray.train.batch import to_batch
    from longalign_ray.train.model import prepare_model

    torch.set_num_threads(1)
    made = AutoModelForCausalLM.from_config(LlamaConfig(**config), attn_implementation=attention.register())
    model = prepare_model(made, gradient_checkpointing=checkpointing, head_chunk=1_024)
    optimizer = torch.optim.AdamW(model.parameters()) if steps else None
    if optimizer is not None:
        optimizer.step()  # without gradients: loads what the optimizer needs
    boundaries = np.minimum(np.arange(0, tokens + SEQUENCE, SEQUENCE), tokens).astype(np.int32)
    ids = np.random.default_rng(0).integers(0, config["vocab_size"], tokens, dtype=np.int32)
    names = tuple(f"e{number}" for number in range(len(boundaries) - 1))
    batch = to_batch(Pack(ids, np.full(tokens, 100, np.uint8), boundaries, names), loss="sequence")
    fixed = _status("VmRSS") - 4 * sum(parameter.numel() for parameter in model.parameters())
    started = time.process_time()
    for _ in range(max(steps, 1)):
        model(batch).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    print(json.dumps({"fixed": fixed, "peak": _status("VmHWM"), "cpu_seconds": time.process_time() - started}))


def _status(field: str) -> int:
    """Bytes, from the kernel's own account of this process."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field + ":")) * 1_024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16_384, 32_768])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        _one(*json.loads(arguments.one))
        return
    print("| tokens | allocator | peak GiB | forecast | error | goal | process | CPU s |")
    print("|---|---|---|---|---|---|---|---|")
    peaks: dict[tuple[int, bool], int] = {}
    for tokens in arguments.tokens:
        for tuned in (True, False):
            measured = measure(LLAMA_34M, tokens, tuned=tuned)
            terms = forecast(LLAMA_34M, tokens, fixed=measured.fixed)
            expected = terms.rank - terms.optimizer
            peaks[tokens, tuned] = measured.peak
            goal = f"{GOALS_GIB[tokens]:.1f}" if tokens in GOALS_GIB else "-"
            print(
                f"| {tokens:,} | {'CPU_ALLOCATOR' if tuned else 'default'} | {measured.peak / 2**30:.2f} | "
                f"{expected / 2**30:.2f} | {expected / measured.peak - 1:+.0%} | {goal} | "
                f"{measured.fixed / 2**30:.2f} | {measured.cpu_seconds:.0f} |",
                flush=True,
            )
    first, last = min(arguments.tokens), max(arguments.tokens)
    if last > first:
        for tuned in (True, False):
            slope = (peaks[last, tuned] - peaks[first, tuned]) / (last - first) / 1_024
            print(f"\nSlope, {'CPU_ALLOCATOR' if tuned else 'default'}: {slope:.1f} KiB a token.", end="")
        above = forecast(LLAMA_34M, last, fixed=0).rank - forecast(LLAMA_34M, first, fixed=0).rank
        print(f" Forecast: {above / (last - first) / 1_024:.1f}.")


if __name__ == "__main__":
    main()
