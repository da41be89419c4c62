"""A GenerationEngine whose calls go to the replicas of a Serve deployment."""

from __future__ import annotations

import asyncio
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
    """A GenerationEngine that passes calls on to the replicas of a deployment; Serve chooses the replica."""

    def __init__(self, name: str, handle: DeploymentHandle, *, affinity_tokens: int = 0):
        self._name = name
        self._handle = handle
        self._affinity_tokens = affinity_tokens

    async def submit(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[GenerationEvent, None]:
        events: Any = self._to(token_ids, stream=True).submit.remote(list(token_ids), sampling)
        try:
            async for event in events:
                yield event
        except (RayError, RayServeException) as error:
            raise self._named(error) from error
        except (GeneratorExit, asyncio.CancelledError):  # the client has left
            events.cancel()
            raise

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0) -> PromptScore:
        return await self._call(self._to(token_ids).score.remote(list(token_ids), num_top))

    async def stats(self) -> EngineStats:
        """The sum over all replicas."""
        try:
            of_replica: list[Any] = await self._handle.broadcast("stats").results_async()
        except (RayError, RayServeException) as error:
            raise self._named(error) from error
        fields = [field.name for field in dataclasses.fields(EngineStats)]
        return EngineStats(**{name: sum(getattr(stats, name) for stats in of_replica) for name in fields})

    def _to(self, token_ids: Sequence[int], **options: Any) -> Any:
        """The handle; where `affinity_tokens` are set, one that leads to the replica of this beginning."""
        if self._affinity_tokens:
            beginning = array("q", token_ids[: self._affinity_tokens]).tobytes()
            options["session_id"] = hashlib.sha256(beginning).hexdigest()
        return self._handle.options(**options) if options else self._handle

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
