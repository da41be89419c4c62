"""A GenerationEngine whose calls go to the replicas of a Serve deployment."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import hashlib
from array import array
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from longalign_ray.errors import OverloadedError, ReplicaLostError, ServingError
from longalign_ray.serve.engine import EngineStats, GenerationEvent, PromptScore, Sampling


class RemoteEngine:
    """A GenerationEngine that passes calls on to the replicas of a deployment; Serve chooses the replica.

    adapter: over the deployment's model; none: that model as it is.
    """

    def __init__(self, name: str, handle: DeploymentHandle, *, adapter: str | None = None, affinity_tokens: int = 0):
        self._name = name
        # From process to process over gRPC, without Ray's objects in between: a token costs half the CPU time.
        self._handle = handle.options(_by_reference=False)
        self._adapter = adapter
        self._affinity_tokens = affinity_tokens

    async def submit(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[GenerationEvent, None]:
        events: Any = self._start("submit", token_ids, sampling, self._adapter, stream=True)
        try:
            async for event in events:
                yield event
        except (RayError, RayServeException) as error:
            raise self._named(error) from error
        except (GeneratorExit, asyncio.CancelledError):  # the client has left
            events.cancel()
            raise

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0) -> PromptScore:
        return await self._call(self._start("score", token_ids, num_top, self._adapter))

    async def stats(self) -> EngineStats:
        """The sum over all replicas."""
        try:
            of_replica: list[Any] = await self._handle.broadcast("stats").results_async()
        except (RayError, RayServeException) as error:
            raise self._named(error) from error
        fields = [field.name for field in dataclasses.fields(EngineStats)]
        return EngineStats(**{name: sum(getattr(stats, name) for stats in of_replica) for name in fields})

    def _start(self, method: str, token_ids: Sequence[int], *arguments: Any, **options: Any) -> Any:
        """The response of a call, which with `affinity_tokens` goes to the replica of this prompt's beginning.

        It starts in a context of its own: there Serve finds the id of the HTTP request and gives it to the call, and a
        router that tells waiting calls apart by that id loses one of two that a request with n = 2 makes.
        """
        if self._affinity_tokens:
            beginning = array("q", token_ids[: self._affinity_tokens]).tobytes()
            options["session_id"] = hashlib.sha256(beginning).hexdigest()
        handle = self._handle.options(**options)
        return contextvars.Context().run(getattr(handle, method).remote, list(token_ids), *arguments)

    async def _call(self, response: Any) -> Any:
        try:
            return await response
        except (RayError, RayServeException) as error:
            raise self._named(error) from error
        except asyncio.CancelledError:
            response.cancel()
            raise

    def _named(self, error: Exception) -> ServingError:
        """Ray's error as one of ours: what failed and what to do, without its stack trace."""
        if isinstance(error, BackPressureError):
            return OverloadedError(f"{self._name}: {error.args[0]} requests wait already; send this one again later")
        if isinstance(error, RayTaskError):
            return ServingError(f"{self._name}: {error.cause}")
        reason = type(error).__name__
        return ReplicaLostError(f"{self._name}: the replica was lost ({reason}); send the request again")
