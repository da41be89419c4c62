"""One copy of a model as a Serve replica, which knows nothing of Ray: the engine, and whether it still moves."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING

from longalign_ray.config import ServeConfig
from longalign_ray.errors import ServingError
from longalign_ray.serve.engine import EngineStats, GenerationEvent, PromptScore, Sampling

if TYPE_CHECKING:
    from longalign_ray.serve.transformers_engine import TransformersEngine
    from longalign_ray.serve.vllm_engine import VllmEngine

GATHER_SECONDS = 0.05
"""A call from process to process costs about as much as a step of a small model; pauses of 1/20 s are not seen."""


class Progress:
    """Whether an engine that has requests does anything, by its counts."""

    def __init__(self, *, stuck_seconds: float):
        self._stuck_seconds = stuck_seconds
        self._seen: EngineStats | None = None
        self._moved = 0.0

    def check(self, stats: EngineStats, *, now: float) -> None:
        """Raises ServingError where nothing has moved for `stuck_seconds`; called from time to time."""
        if stats != self._seen or stats.active + stats.waiting == 0:
            self._seen, self._moved = stats, now
        elif now - self._moved > self._stuck_seconds:
            raise ServingError(
                f"the engine has done nothing for {now - self._moved:.0f} s with {stats.active} requests active and "
                f"{stats.waiting} waiting; if a step takes that long, raise serve.stuck_seconds = "
                f"{self._stuck_seconds:g}"
            )


def load_engine(
    model_dir: str, config: ServeConfig, *, dtype: str, adapters: Mapping[str, str] | None = None
) -> TransformersEngine | VllmEngine:
    """The engine that the recipe names, with adapters by name over its model.

    Raises ModelError or ServingError where it cannot be had.
    """
    from transformers.utils.logging import disable_progress_bar

    from longalign_ray.precision import resolve_dtype

    disable_progress_bar()
    dtype = resolve_dtype(dtype, use_gpu=config.use_gpu)
    if config.engine == "vllm":
        from longalign_ray.serve.vllm_engine import VllmEngine

        return VllmEngine(
            model_dir,
            dtype=dtype,
            max_tokens=config.max_prompt_tokens + config.max_output_tokens,
            prefill_chunk=config.prefill_chunk,
            max_sequences=config.max_sequences,
            tensor_parallel=config.tensor_parallel,
            adapters=adapters,
            engine_args=config.vllm_args,
        )
    from longalign_ray.serve.transformers_engine import TransformersEngine

    return TransformersEngine(
        model_dir,
        dtype=dtype,
        prefill_chunk=config.prefill_chunk,
        max_sequences=config.max_sequences,
        prefix_cache_bytes=int(config.prefix_cache_gb * 1e9),
        adapters=adapters,
        device="cuda" if config.use_gpu else "cpu",
        num_threads=config.cpus_per_replica,
    )


async def gathered(
    events: AsyncGenerator[GenerationEvent, None], *, seconds: float
) -> AsyncGenerator[GenerationEvent, None]:
    """The same tokens in fewer events, at most one in so many seconds but for the last; none is held for longer."""
    held: GenerationEvent | None = None
    due = 0.0
    async with aclosing(events):
        coming = asyncio.ensure_future(anext(events, None))
        try:
            while True:
                await asyncio.wait([coming], timeout=None if held is None else max(due - time.monotonic(), 0.0))
                if coming.done():
                    event = coming.result()
                    if event is None:
                        return
                    held = event if held is None else dataclasses.replace(event, tokens=held.tokens + event.tokens)
                    coming = asyncio.ensure_future(anext(events, None))
                if held is not None and (held.finish_reason is not None or time.monotonic() >= due):
                    yield held
                    held, due = None, time.monotonic() + seconds
        finally:
            coming.cancel()
            await asyncio.wait([coming])  # the generator cannot be closed while it runs


class EngineReplica:
    """Serve replaces it when `check_health` raises."""

    def __init__(self, model_dir: str, config: ServeConfig, *, dtype: str, adapters: Mapping[str, str] | None = None):
        self._engine = load_engine(model_dir, config, dtype=dtype, adapters=adapters)
        self._progress = Progress(stuck_seconds=config.stuck_seconds)

    async def submit(
        self, token_ids: list[int], sampling: Sampling, adapter: str | None = None
    ) -> AsyncGenerator[GenerationEvent, None]:
        events = gathered(self._engine.submit(token_ids, sampling, adapter=adapter), seconds=GATHER_SECONDS)
        async with aclosing(events):
            async for event in events:
                yield event

    async def score(self, token_ids: list[int], num_top: int, adapter: str | None = None) -> PromptScore:
        return await self._engine.score(token_ids, num_top=num_top, adapter=adapter)

    async def stats(self) -> EngineStats:
        return await self._engine.stats()

    async def check_health(self) -> None:
        """Raises ServingError where the engine has ended, or has requests and did nothing for `stuck_seconds`."""
        if not self._engine.is_alive:
            raise ServingError("the engine that owns the model has ended")
        self._progress.check(await self._engine.stats(), now=time.monotonic())
