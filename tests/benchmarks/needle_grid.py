"""A needle grid of 10 lengths by 10 depths against a served tiny model: what asking and serving add to the engine's own
time, and how many prompt tokens are computed that another cell has had already. Prints a Markdown table.

    python -m tests.benchmarks.needle_grid [--concurrency 8]

Goals: wall time at most 1.2 times the time for which the engine computes (one replica), and at most 1.05 times as many
prompt tokens as there are different beginnings of prompts: cells share the text before their needle, and each of its
tokens need be computed once. The model is served over HTTP in a process of its own, without Ray, and asked by the
runner of `longalign evaluate`; the engine is timed by its steps.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

LENGTHS = tuple(range(400, 4_001, 400))
DEPTHS = tuple(100 * number / 9 for number in range(10))
WALL_GOAL, TOKENS_GOAL = 1.2, 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--concurrency", type=int, default=8)
    arguments = parser.parse_args()
    logging.disable(logging.INFO)
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from longalign_ray.config import EvaluateConfig, NeedleConfig
    from longalign_ray.data.template import encode_prompt, load_tokenizer
    from longalign_ray.evaluate.haystack import default_haystack
    from longalign_ray.evaluate.needle import needle_cases
    from longalign_ray.evaluate.runner import evaluate
    from longalign_ray.run_dir import RunDir
    from tests.tiny_model import write_tiny_model

    with tempfile.TemporaryDirectory() as scratch:
        model_dir = Path(scratch) / "model"
        model_dir.mkdir()
        write_tiny_model(model_dir)
        tokenizer = load_tokenizer(model_dir)
        config = NeedleConfig(lengths=LENGTHS, depths=DEPTHS, max_new_tokens=8)
        haystack = default_haystack(0, min_chars=8 * max(LENGTHS))
        cases = needle_cases(config, haystack=haystack, tokenizer=tokenizer, seed=0)
        prompts = [encode_prompt(tokenizer, case.request["messages"]) for case in cases]
        settings = EvaluateConfig(models=("tiny",), concurrency=arguments.concurrency, heldout_loss=False)
        with served(model_dir, concurrency=arguments.concurrency) as base_url:
            before = read_engine(base_url)
            started = time.perf_counter()
            counts, failed = evaluate(
                settings, RunDir(Path(scratch) / "run"), base_url=base_url, cases={"needle": cases}
            )
            wall = time.perf_counter() - started
            after = read_engine(base_url)
    assert (counts["answered"], failed) == (len(cases), {})
    used = {name: after[name] - before[name] for name in after}
    computed, least = used["prompt_tokens"] - used["cached_tokens"], distinct_beginnings(prompts)
    assert used["prompt_tokens"] == sum(map(len, prompts))
    rows = [
        ("wall seconds over the engine's", wall, used["seconds"], WALL_GOAL),
        ("prompt tokens computed over the least", computed, least, TOKENS_GOAL),
    ]
    print(f"{len(cases)} cells, {arguments.concurrency} at a time, {used['prompt_tokens']:,.0f} prompt tokens\n")
    print("| what | measured | least | ratio | goal |\n|---|---|---|---|---|")
    for what, measured, least_possible, goal in rows:
        print(f"| {what} | {measured:,.4g} | {least_possible:,.4g} | {measured / least_possible:.3f} | {goal} |")
    sys.exit(any(measured > goal * least_possible for _, measured, least_possible, goal in rows))


def distinct_beginnings(prompts: Sequence[Sequence[int]]) -> int:
    """Nodes of the prefix tree of all prompts. In order, each shares with the one before all that it shares with any
    earlier one."""
    total, before = 0, []
    for prompt in sorted(list(prompt) for prompt in prompts):
        pairs = zip(prompt, before, strict=False)
        shared = next(
            (number for number, (one, other) in enumerate(pairs) if one != other), min(len(prompt), len(before))
        )
        total += len(prompt) - shared
        before = prompt
    return total


def read_engine(base_url: str) -> dict[str, float]:
    """The engine's totals: seconds in its steps, prompt tokens, and those that it had in its cache."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(f"{base_url}/engine") as response:
        return json.load(response)


@contextmanager
def served(model_dir: Path, *, concurrency: int) -> Iterator[str]:
    """Base URL of the model in a process of its own."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=_serve, args=(its, str(model_dir), concurrency), daemon=True
    )
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def _serve(port: Connection, model_dir: str, concurrency: int) -> None:
    import socket

    import uvicorn

    from longalign_ray.config import ServeConfig
    from longalign_ray.serve.answer import served_model
    from longalign_ray.serve.api import build_api
    from longalign_ray.serve.transformers_engine import TransformersEngine

    class TimedEngine(TransformersEngine):
        seconds = 0.0

        def _step(self, jobs: list[Any]) -> None:
            started = time.perf_counter()
            super()._step(jobs)
            self.seconds += time.perf_counter() - started

    async def health() -> dict[str, bool]:
        return {"tiny": True}

    engine = TimedEngine(model_dir, dtype="float32", max_sequences=concurrency, num_threads=1)
    model = served_model("tiny", engine, Path(model_dir), chat_template=None)
    api = build_api({"tiny": model}, ServeConfig(), health=health)

    @api.get("/v1/engine")
    async def totals() -> dict[str, float]:
        stats = await engine.stats()
        return {
            "seconds": engine.seconds, "prompt_tokens": stats.prompt_tokens, "cached_tokens": stats.cached_tokens
        }  # fmt: skip

    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()  # who asks before the server is up waits
        port.send(listening.getsockname()[1])
        config = uvicorn.Config(api, log_level="warning", access_log=False)
        uvicorn.Server(config).run(sockets=[listening])


if __name__ == "__main__":
    main()
