"""What Ray Serve and HTTP add to a request, against the same engine called directly. Prints a Markdown table.

    python -m tests.benchmarks.serve_overhead [--rounds 5] [--streams 16]

A tiny random model, so that little but the overhead is measured; both take turns with the same prompts, 16 streams at a
time, and medians over all requests of all rounds are shown; `a request` is what is added to a round's time, over its
requests, and `CPU` what all processes together (engine, ingress, proxy, Ray's own, client) compute for one. Everything
runs on this machine and shares its CPUs: with fewer cores than processes the difference holds their computing too.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import socket
import statistics
import tempfile
import time
from pathlib import Path

PROMPT = "What does the overhead of a request come to? " * 4
TOKENS = (1, 32)


async def direct(engine: object, token_ids: list[int], num_tokens: int) -> tuple[float, float]:
    """Milliseconds to the first token and to the end."""
    from longalign_ray.serve.engine import Sampling

    started, first = time.perf_counter(), 0.0
    async for _ in engine.submit(token_ids, Sampling(max_tokens=num_tokens, temperature=0.0)):  # pyright: ignore
        first = first or time.perf_counter()
    return 1e3 * (first - started), 1e3 * (time.perf_counter() - started)


async def over_http(client: object, token_ids: list[int], num_tokens: int) -> tuple[float, float]:
    started, first = time.perf_counter(), 0.0
    body = {"model": "tiny", "prompt": token_ids, "max_tokens": num_tokens, "temperature": 0, "stream": True}
    async with client.stream("POST", "/v1/completions", json=body) as response:  # pyright: ignore
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
    return 1e3 * (first - started), 1e3 * (time.perf_counter() - started)


async def measure(model_dir: Path, root: str, *, rounds: int, streams: int) -> None:
    import httpx
    import psutil

    from longalign_ray.serve.transformers_engine import TransformersEngine

    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]  # Ray runs below this one

    def cpu_seconds() -> float:
        return sum(sum(process.cpu_times()[:2]) for process in processes if process.is_running())

    engine = TransformersEngine(model_dir, dtype="float32", max_sequences=streams, num_threads=1)
    token_ids = list(PROMPT.encode())
    print(
        f"| tokens of an answer, {streams} at once | direct ms | Serve ms | added ms | first token | a request | "
        "CPU direct ms | CPU Serve ms |"
    )
    print("|---|---|---|---|---|---|---|---|")
    limits = httpx.Limits(max_connections=streams)
    async with httpx.AsyncClient(base_url=root, timeout=300, trust_env=False, limits=limits) as client:
        for num_tokens in TOKENS:
            times: dict[str, list[tuple[float, float]]] = {"direct": [], "serve": []}
            of_round: dict[str, list[float]] = {"direct": [], "serve": []}
            of_cpu: dict[str, list[float]] = {"direct": [], "serve": []}
            for number in range(rounds + 1):
                ways = {
                    "direct": [direct(engine, token_ids, num_tokens) for _ in range(streams)],
                    "serve": [over_http(client, token_ids, num_tokens) for _ in range(streams)],
                }
                for way, calls in ways.items():
                    started, computed = time.perf_counter(), cpu_seconds()
                    measured = await asyncio.gather(*calls)
                    if number:  # the first round warms up
                        of_round[way].append(1e3 * (time.perf_counter() - started) / streams)
                        of_cpu[way].append(1e3 * (cpu_seconds() - computed) / streams)
                        times[way] += measured
            first, whole = (
                {way: statistics.median(pair[place] for pair in pairs) for way, pairs in times.items()}
                for place in (0, 1)
            )
            each, cpu = (
                {way: statistics.median(milliseconds) for way, milliseconds in measured.items()}
                for measured in (of_round, of_cpu)
            )
            print(
                f"| {num_tokens} | {whole['direct']:.0f} | {whole['serve']:.0f} | "
                f"{whole['serve'] - whole['direct']:.1f} | {first['serve'] - first['direct']:.1f} | "
                f"{each['serve'] - each['direct']:.1f} | {cpu['direct']:.1f} | {cpu['serve']:.1f} |"
            )
    engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    arguments = parser.parse_args()

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    from longalign_ray.config import ServeConfig
    from longalign_ray.serve.app import running_app
    from longalign_ray.stages import set_ray_environment
    from tests.tiny_model import write_tiny_model

    set_ray_environment()
    ray.init(num_cpus=4, include_dashboard=False, logging_level=logging.WARNING, object_store_memory=200_000_000)
    with tempfile.TemporaryDirectory() as scratch, socket.socket() as probe:
        model_dir = write_tiny_model(Path(scratch))
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = ServeConfig(port=port, max_sequences=arguments.streams)
        with running_app({"tiny": model_dir}, config, chat_template=None, dtype="float32") as base_url:
            root = base_url.removesuffix("/v1")
            asyncio.run(measure(model_dir, root, rounds=arguments.rounds, streams=arguments.streams))
    ray.shutdown()


if __name__ == "__main__":
    main()
