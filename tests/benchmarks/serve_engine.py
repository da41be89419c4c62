"""The embedded engine: tokens a second beside transformers' own continuous batching, shared documents, peak memory.

    python -m tests.benchmarks.serve_engine [--dtypes bfloat16 float32] [--concurrent 1 8 16] [--parts speed ...]

Prefill ends when the last request has its first token; decode is what comes after. The former engine computed one
request at a time in round robin, so its rates for any number of requests are those of one.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from longalign_ray.model_source import local_model_dir
from longalign_ray.serve.engine import Sampling
from longalign_ray.serve.transformers_engine import TransformersEngine
from tests.conftest import SHARED_DATA

CHATS = SHARED_DATA / "chat"
PROMPT_TOKENS, NEW_TOKENS = 512, 64
LONG_PROMPT, CHUNK = 32_768, 2_048


@dataclass(frozen=True, slots=True)
class Rates:
    """Tokens a second of wall time, and CPU seconds of the whole."""

    prefill: float
    decode: float
    cpu_seconds: float

    @classmethod
    def of(cls, started: float, times: Sequence[Sequence[float]], prompt_tokens: int, cpu_seconds: float) -> Rates:
        """`times` has, for each request, when each of its tokens came."""
        prefilled, ended = max(each[0] for each in times), max(each[-1] for each in times)
        later = sum(time > prefilled for each in times for time in each)
        return cls(prompt_tokens / (prefilled - started), later / max(ended - prefilled, 1e-9), cpu_seconds)


def random_prompts(number: int, length: int, *, seed: int, vocabulary: int = 40_000) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(100, vocabulary, (number, length), generator=generator).tolist()


def new_engine(model_dir: Path, dtype: str, **settings: Any) -> TransformersEngine:
    """An engine that no end token stops."""
    engine = TransformersEngine(model_dir, dtype=dtype, max_sequences=16, **settings)
    engine._end_ids = frozenset()
    return engine


async def token_times(engine: TransformersEngine, prompt: list[int], num_tokens: int) -> list[float]:
    sampling = Sampling(max_tokens=num_tokens, temperature=0.0)
    return [time.perf_counter() async for _ in engine.submit(prompt, sampling)]


def our_rates(engine: TransformersEngine, prompts: list[list[int]], num_tokens: int) -> Rates:
    async def ask_all() -> list[list[float]]:
        return await asyncio.gather(*(token_times(engine, prompt, num_tokens) for prompt in prompts))

    cpu, started = time.process_time(), time.perf_counter()
    times = asyncio.run(ask_all())
    return Rates.of(started, times, sum(map(len, prompts)), time.process_time() - cpu)


def stock_rates(model: Any, prompts: list[list[int]], num_tokens: int) -> Rates:
    """transformers' continuous batching, which on a CPU makes one dense mask over the batch and all of its cache."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    generation = GenerationConfig(max_new_tokens=num_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
    pages = ContinuousBatchingConfig(num_blocks=4 * len(prompts) + 4, max_batch_tokens=CHUNK, page_size=256)
    cpu, started = time.process_time(), time.perf_counter()
    made = model.generate_batch(
        prompts, generation_config=generation, continuous_batching_config=pages, record_timestamps=True, warmup=False
    )
    times = [output.timestamps for output in made.values()]
    return Rates.of(started, times, sum(map(len, prompts)), time.process_time() - cpu)


def vllm_rates(llm: Any, prompts: list[list[int]], num_tokens: int) -> Rates:
    """vLLM's offline engine: the prompts with one token, then the same anew with all of them."""

    def seconds(length: int) -> float:
        started = time.perf_counter()
        params = importlib.import_module("vllm").SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - started

    cpu = time.process_time()
    prefill, whole = seconds(1), seconds(num_tokens)
    decoded = len(prompts) * (num_tokens - 1)
    return Rates(sum(map(len, prompts)) / prefill, decoded / max(whole - prefill, 1e-9), time.process_time() - cpu)


def print_speed(model_dir: Path, dtypes: list[str], concurrent: list[int], stock_limit: int) -> None:
    from transformers import AutoModelForCausalLM

    print(f"SmolLM2-135M, prompts of {PROMPT_TOKENS} tokens, {NEW_TOKENS} new, {torch.get_num_threads()} threads\n")
    print("| dtype | at a time | engine | prefill tokens/s | decode tokens/s | CPU s | prefill ratio | decode ratio |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in dtypes:
        systems: dict[str, Callable[[list[list[int]], int], Rates]] = {}
        stock: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()
        systems["transformers' own"] = lambda prompts, new, stock=stock: stock_rates(stock, prompts, new)
        engine = new_engine(model_dir, dtype, prefix_cache_bytes=0)
        systems["ours"] = lambda prompts, new, engine=engine: our_rates(engine, prompts, new)
        if importlib.util.find_spec("vllm"):
            llm = importlib.import_module("vllm").LLM(
                str(model_dir),
                dtype=dtype,
                max_model_len=1_024,
                enforce_eager=True,
                enable_prefix_caching=False,
                gpu_memory_utilization=0.5,  # of the host's memory, where there is no GPU
            )
            systems["vLLM"] = lambda prompts, new, llm=llm: vllm_rates(llm, prompts, new)
        for rates in systems.values():
            rates(random_prompts(1, 64, seed=0), 2)  # first call warms up
        for number in concurrent:
            first = None
            for name, rates in systems.items():
                if name.startswith("transformers") and number > stock_limit:
                    continue
                found = rates(random_prompts(number, PROMPT_TOKENS, seed=number), NEW_TOKENS)
                first = first or found
                print(
                    f"| {dtype} | {number} | {name} | {found.prefill:,.0f} | {found.decode:,.0f} "
                    f"| {found.cpu_seconds:.1f} | {found.prefill / first.prefill:.2f} "
                    f"| {found.decode / first.decode:.2f} |",
                    flush=True,
                )
        engine.close()
    if not importlib.util.find_spec("vllm"):
        print("\nvLLM is not installed here, so it is not measured.")
    print()


def print_questions(model_dir: Path, dtype: str) -> None:
    """Ten questions of 32 tokens on one document of 4096, one after another and all at once."""
    document = random_prompts(1, 4_096, seed=1)[0]
    questions = [document + question for question in random_prompts(10, 32, seed=2)]
    print("| ten questions on a document of 4096 tokens | retained KV off | on | ratio | tokens taken over |")
    print("|---|---|---|---|---|")

    async def one_by_one(engine: TransformersEngine) -> None:
        for question in questions:
            await token_times(engine, question, 1)

    async def at_once(engine: TransformersEngine) -> None:
        await asyncio.gather(*(token_times(engine, question, 1) for question in questions))

    for name, ask in (("one after another", one_by_one), ("all at once", at_once)):
        seconds, cached = [], 0
        for prefix_cache_bytes in (0, 2**30):
            engine = new_engine(model_dir, dtype, prefix_cache_bytes=prefix_cache_bytes)
            asyncio.run(token_times(engine, document[:64], 2))
            started = time.perf_counter()
            asyncio.run(ask(engine))
            seconds.append(time.perf_counter() - started)
            cached = asyncio.run(engine.stats()).cached_tokens
            engine.close()
        print(f"| {name}, {dtype}, prefill s | {seconds[0]:.1f} | {seconds[1]:.1f} ", end="")
        print(f"| {seconds[0] / seconds[1]:.1f} | {cached:,} |", flush=True)
    print()


def peak_growth(prompt_tokens: int) -> dict[str, int]:
    """Bytes that the resident set grew by, at most, while a prompt was computed, and those of its KV cache."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=259, hidden_size=256, intermediate_size=688, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=65_536,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        LlamaForCausalLM(config).save_pretrained(scratch)
        engine = new_engine(Path(scratch), "float32", prefill_chunk=CHUNK)
    asyncio.run(token_times(engine, [1] * 64, 2))
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory("VmRSS")
    asyncio.run(token_times(engine, [1 + place % 250 for place in range(prompt_tokens)], 2))
    weights = sum(parameter.nbytes for parameter in engine._model.parameters())
    cache = prompt_tokens * 2 * 2 * 2 * 64 * 4  # keys and values, layers, heads, width, bytes
    return {"peak": memory("VmHWM") - before, "weights": weights, "cache": cache}


def memory(name: str) -> int:
    """Bytes, of /proc/self/status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def print_memory() -> None:
    """One chunk's need is that of a prompt of one chunk, less its KV cache."""
    command = [sys.executable, "-m", "tests.benchmarks.serve_engine", "--peak"]
    found = [
        json.loads(subprocess.run([*command, str(length)], check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        for length in (CHUNK, LONG_PROMPT)
    ]
    chunk = found[0]["peak"] - found[0]["cache"]
    weights, cache = found[1]["weights"], found[1]["cache"]
    expected, peak = weights + cache + chunk, weights + found[1]["peak"]
    print(f"| prompt of {LONG_PROMPT} tokens, tiny model, MB | weights | KV cache | a chunk | sum | peak | ratio |")
    print("|---|---|---|---|---|---|---|")
    sizes = " | ".join(f"{size / 1e6:.1f}" for size in (weights, cache, chunk, expected, peak))
    print(f"| fp32, chunks of {CHUNK} | {sizes} | {peak / expected:.2f} |\n", flush=True)


def print_equality(model_dir: Path, number: int) -> None:
    """Greedy answers to real prompts of mixed lengths, asked all at once, beside those of generate()."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    files = sorted(CHATS.glob("*.jsonl"))
    if not files:
        print(f"No chats at {CHATS}, so answers are not compared with generate().\n")
        return
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    prompts: list[list[int]] = []
    for place in range(number):
        lines = files[place % len(files)].read_text(encoding="utf-8").splitlines()
        turns = json.loads(lines[(37 * place) % len(lines)])["messages"][:1]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"][:1_000])
    engine = TransformersEngine(model_dir, dtype="float32", max_sequences=16, prefill_chunk=512)
    sampling = Sampling(max_tokens=32, temperature=0.0)

    async def answer(prompt: list[int]) -> list[int]:
        return [token.token_id async for event in engine.submit(prompt, sampling) for token in event.tokens]

    async def ask_all() -> list[list[int]]:
        return await asyncio.gather(*(answer(prompt) for prompt in prompts))

    answers = asyncio.run(ask_all())
    engine.close()
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    equal = 0
    for prompt, ours in zip(prompts, answers, strict=True):
        inputs = torch.tensor([prompt])
        made = model.generate(inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=32)
        theirs = [token_id for token_id in made[0, len(prompt) :].tolist() if token_id not in engine._end_ids]
        equal += ours == theirs
    lengths = sorted(map(len, prompts))
    print(f"Greedy, fp32: {equal} of {number} answers of 32 tokens equal generate(), ", end="")
    print(f"prompts of {lengths[0]} to {lengths[-1]} tokens (median {lengths[number // 2]}).\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--concurrent", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--parts", nargs="+", default=["speed", "questions", "memory", "equality"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=50)
    parser.add_argument("--stock-limit", type=int, default=8, help="transformers' own is measured up to so many")
    parser.add_argument("--peak", type=int)
    arguments = parser.parse_args()
    disable_progress_bar()
    set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.peak:
        print(json.dumps(peak_growth(arguments.peak)))
        return
    model_dir = local_model_dir("bundled:smollm2-135m-instruct")
    if "speed" in arguments.parts:
        print_speed(model_dir, arguments.dtypes, arguments.concurrent, arguments.stock_limit)
    if "questions" in arguments.parts:
        print_questions(model_dir, arguments.dtypes[0])
    if "memory" in arguments.parts:
        print_memory()
    if "equality" in arguments.parts:
        print_equality(model_dir, arguments.prompts)


if __name__ == "__main__":
    main()
