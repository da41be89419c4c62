"""What the endpoint counts, as Prometheus reads it from /metrics: of this HTTP layer, and of the engines behind it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing

from fastapi import Response
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longalign_ray.errors import ReplicaLostError, ServingError
from longalign_ray.serve.answer import Asked, Piece
from longalign_ray.serve.engine import GenerationEngine

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1_000, 3_000)  # from a short prompt to 128k tokens on CPUs
STATS_SECONDS = 5
CLIENT_LEFT = "499"


class Metrics:
    """Counts of one application; they are its own, so that several may live in a process.

    A Serve application has one ingress replica, which sees every request, so its counts are the whole. Ray's own
    metrics, those of the replicas among them, are exported by each of its nodes.
    """

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self.requests = Counter("longalign_requests", "Requests answered", ["path", "status"], registry=registry)
        self.seconds = Histogram(
            "longalign_request_seconds", "Time to the end of the answer", ["path"], registry=registry, buckets=SECONDS
        )
        self.in_progress = Gauge("longalign_requests_in_progress", "Requests under way", registry=registry)
        self._first_token = Histogram(
            "longalign_first_token_seconds", "Time to the first token", ["model"], registry=registry, buckets=SECONDS
        )
        self._prompt = Counter("longalign_prompt_tokens", "Prompt tokens", ["model"], registry=registry)
        self._cached = Counter(
            "longalign_cached_prompt_tokens", "Of these, from the cache", ["model"], registry=registry
        )
        self._generated = Counter("longalign_generated_tokens", "Tokens generated", ["model"], registry=registry)
        self._lost = Counter(
            "longalign_lost_answers",
            "Answers whose replica was lost, streams under way too",
            ["model"],
            registry=registry,
        )
        self._engines = Gauge(
            "longalign_engine_requests", "Requests in the engines", ["model", "state"], registry=registry
        )

    async def watched(
        self, model: str, asked: Asked, pieces: AsyncGenerator[Piece, None]
    ) -> AsyncGenerator[Piece, None]:
        """The same pieces; their tokens are counted, those of an answer that its client left too."""
        started = time.perf_counter()
        last = None
        try:
            async with aclosing(pieces):
                async for piece in pieces:
                    if last is None:
                        self._first_token.labels(model).observe(time.perf_counter() - started)
                        self._prompt.labels(model).inc(len(asked.token_ids))
                        self._cached.labels(model).inc(piece.num_cached)
                    last = piece
                    yield piece
        except ReplicaLostError:
            self._lost.labels(model).inc()
            raise
        finally:
            if last is not None:
                self._generated.labels(model).inc(last.num_generated)

    async def response(self, engines: Mapping[str, GenerationEngine]) -> Response:
        """Everything in Prometheus' text format; an engine that does not answer in time has no values."""
        self._engines.clear()
        await asyncio.gather(*(self._ask(name, engine) for name, engine in engines.items()))
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)

    async def _ask(self, name: str, engine: GenerationEngine) -> None:
        try:
            async with asyncio.timeout(STATS_SECONDS):
                stats = await engine.stats()
        except (TimeoutError, ServingError):
            return
        self._engines.labels(name, "active").set(stats.active)
        self._engines.labels(name, "waiting").set(stats.waiting)


class Metered:
    """ASGI middleware that counts requests by path and status; paths that do not exist are one, `other`."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics, paths: frozenset[str]):
        self._app = app
        self._metrics = metrics
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"] if scope["path"] in self._paths else "other"
        status = CLIENT_LEFT

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        started = time.perf_counter()
        self._metrics.in_progress.inc()
        try:
            await self._app(scope, receive, noting_send)
        except Exception:  # the layer outside answers it
            status = "500"
            raise
        finally:
            self._metrics.in_progress.dec()
            self._metrics.requests.labels(path, status).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)
