"""What the runner itself costs: cases a second against a server that answers at once, and the share of a server's
capacity that is used where it answers after a fixed time and so many requests together.

    python -m tests.benchmarks.evaluate_runner

Goals: at least 300 cases a second, and 95 % of the capacity whatever the server allows. The server is aiohttp in a
process of its own, and a bare client asks it in the same run, to tell its speed and the runner's apart. With as many
requests on the way as the server takes, each that ends leaves a place empty until the client has sent another, and of N
that end together the last waits for the CPU time of N: no client keeps 95 % so. With more, the server has the next one
already.
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from longalign_ray.config import EvaluateConfig
from longalign_ray.evaluate.runner import evaluate
from longalign_ray.evaluate.task import EvalCase
from longalign_ray.run_dir import RunDir

NUM_CASES = 500
PROMPT_CHARS = 2_000
DELAY_SECONDS = 0.2
ROUNDS = 15  # a server that allows N together is asked 15 N times
LIMITS = (1, 4, 16, 48)
MODEL = "stub"


def main() -> None:
    logging.disable(logging.INFO)
    with server(delay=0.0, limit=10**6) as base_url:
        run(base_url, make_cases(20), concurrency=8)  # imports and the first connection
        before = time.process_time()
        bare = asyncio.run(_bare_client(base_url, NUM_CASES, concurrency=32))
        bare_cpu = time.process_time() - before
        print(f"{NUM_CASES} cases of {PROMPT_CHARS:,} characters, a server that answers at once\n")
        print("| together | cases/s | ms a case | of a bare client's rate | CPU ms a case |\n|---|---|---|---|---|")
        for concurrency in (8, 32, 128):
            before = time.process_time()
            seconds = run(base_url, make_cases(NUM_CASES), concurrency=concurrency)
            cpu, rate = 1_000 * (time.process_time() - before) / NUM_CASES, NUM_CASES / seconds
            print(f"| {concurrency} | {rate:.0f} | {1_000 / rate:.2f} | {rate / bare:.0%} | {cpu:.2f} |")
        each = 1_000 * bare_cpu / NUM_CASES
        print(f"\nA bare aiohttp client, 32 together: {bare:.0f} requests/s, {each:.2f} CPU ms a request.\n")
    print(f"A server that answers after {DELAY_SECONDS:g} s, at most N together; {ROUNDS} N questions\n")
    print("| N | bare client, N together | runner, N | five questions a document, N | runner, 2 N |")
    print("|---|---|---|---|---|")
    for limit in LIMITS:
        best, number = ROUNDS * DELAY_SECONDS, ROUNDS * limit
        with server(delay=DELAY_SECONDS, limit=limit) as base_url:
            bare = asyncio.run(_bare_client(base_url, number, concurrency=limit)) * best / number
            used = [
                best / run(base_url, make_cases(number, questions=questions), concurrency=together)
                for questions, together in ((1, limit), (5, limit), (1, 2 * limit))
            ]
        print(f"| {limit} | {bare:.1%} | " + " | ".join(f"{share:.1%}" for share in used) + " |")


def make_cases(number: int, *, questions: int = 1) -> list[EvalCase]:
    """Cases of LongEval's form with prompts of equal length."""
    text = "The register content is 7. " * (PROMPT_CHARS // 27)
    return [
        EvalCase(
            case_id=str(place),
            task="longeval",
            path="/chat/completions",
            request={"messages": [{"role": "user", "content": f"{place} {text}"}], "max_tokens": 8, "temperature": 0.0},
            reference={"group": "7 lines", "answer": 7},
            document=str(place // questions),
            num_tokens=PROMPT_CHARS // 4,
        )
        for place in range(number)
    ]


def run(base_url: str, cases: list[EvalCase], *, concurrency: int) -> float:
    """Seconds of a whole evaluation: all are asked, written down and scored."""
    config = EvaluateConfig(models=(MODEL,), concurrency=concurrency, needle=None, heldout_loss=False)
    with tempfile.TemporaryDirectory() as root:
        start = time.perf_counter()
        counts, failed = evaluate(config, RunDir(Path(root)), base_url=base_url, cases={"longeval": cases})
        seconds = time.perf_counter() - start
    assert (counts["answered"], failed, counts["retries"]) == (len(cases), {}, 0)
    assert counts[f"{MODEL}_longeval_accuracy"] == 1.0
    return seconds


async def _bare_client(base_url: str, number: int, *, concurrency: int) -> float:
    """Requests a second of a client that does nothing with the answers."""
    import aiohttp

    bodies = iter([{"model": MODEL, **case.request} for case in make_cases(number)])

    async def ask(session: aiohttp.ClientSession) -> None:
        for body in bodies:
            async with session.post(f"{base_url}/chat/completions", json=body) as response:
                await response.json()

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=concurrency)) as session:
        start = time.perf_counter()
        await asyncio.gather(*(ask(session) for _ in range(concurrency)))
        return number / (time.perf_counter() - start)


@contextmanager
def server(*, delay: float, limit: int) -> Iterator[str]:
    """Base URL of a server in a process of its own."""
    mine, its = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(its, delay, limit), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{mine.recv()}/v1"
    finally:
        process.terminate()
        process.join()


def _serve(port: Connection, delay: float, limit: int) -> None:
    from aiohttp import web

    answer = json.dumps(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": "7"}, "finish_reason": "stop"}]}
    )

    async def chat(request: web.Request) -> web.Response:
        await request.read()
        async with free:
            if delay:
                await asyncio.sleep(delay)
        return web.Response(text=answer, content_type="application/json")

    async def models(request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": MODEL}]})

    async def start() -> None:
        app = web.Application()
        app.add_routes([web.post("/v1/chat/completions", chat), web.get("/v1/models", models)])
        runner: Any = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        port.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    free = asyncio.Semaphore(limit)
    asyncio.run(start())


if __name__ == "__main__":
    main()
