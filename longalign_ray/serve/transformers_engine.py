"""The embedded engine: a transformers model owned by one thread that computes all its requests together."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longalign_ray.errors import ServingError
from longalign_ray.serve.engine import EngineStats, GenerationEvent, PromptScore, Sampling
from longalign_ray.serve.schedule import share_tokens

if TYPE_CHECKING:
    import torch

    from longalign_ray.serve.requests import GenerateRequest, ScoreRequest

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Job:
    """A request and where its results go: a queue on the caller's event loop."""

    request: GenerateRequest | ScoreRequest
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False

    def deliver(self, result: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the caller's loop is closed, so nobody waits any more
            self.cancelled = True


class TransformersEngine:
    """A GenerationEngine on one model directory (safetensors, no remote code), and on LoRA adapters over its weights.

    A step is one forward pass over a token of every request that decodes and up to `prefill_chunk` tokens of prompts.
    At most `max_sequences` requests hold a KV cache at a time; the others wait in order. Caches of finished requests
    stay for prompts that begin alike, up to `prefix_cache_bytes`.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str,
        prefill_chunk: int = 2_048,
        max_sequences: int = 8,
        prefix_cache_bytes: int = 2**30,
        adapters: Mapping[str, str | Path] | None = None,
        device: str = "cpu",
        num_threads: int | None = None,
    ):
        import torch

        from longalign_ray.serve.batch_forward import load_model
        from longalign_ray.serve.prefix_cache import PrefixCache

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._model = load_model(model_dir, dtype=dtype, device=device, adapters=adapters)
        self._adapters = frozenset(adapters or ())
        self._end_ids = end_token_ids(self._model)
        self._prefill_chunk = prefill_chunk
        self._max_sequences = max_sequences
        self._prefixes = PrefixCache(prefix_cache_bytes)
        self._wake = threading.Condition()
        self._waiting: list[_Job] = []
        self._active: list[_Job] = []
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def submit(
        self, token_ids: Sequence[int], sampling: Sampling, *, adapter: str | None = None
    ) -> AsyncGenerator[GenerationEvent, None]:
        from longalign_ray.serve.requests import GenerateRequest

        job = self._enqueue(GenerateRequest(token_ids, sampling, end_ids=self._end_ids, adapter=adapter))
        try:
            while True:
                event = await self._next_result(job)
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            job.cancelled = True

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0, adapter: str | None = None) -> PromptScore:
        from longalign_ray.serve.requests import ScoreRequest

        job = self._enqueue(ScoreRequest(token_ids, num_top=num_top, adapter=adapter))
        try:
            return await self._next_result(job)
        finally:
            job.cancelled = True

    async def stats(self) -> EngineStats:
        with self._wake:
            return EngineStats(
                active=len(self._active),
                waiting=len(self._waiting),
                finished=self._counts["finished"],
                cancelled=self._counts["cancelled"],
                failed=self._counts["failed"],
                prompt_tokens=self._counts["prompt_tokens"],
                generated_tokens=self._counts["generated_tokens"],
                cached_tokens=self._counts["cached_tokens"],
                computed_tokens=self._counts["computed_tokens"],
            )

    @property
    def is_alive(self) -> bool:
        """Whether the thread that owns the model still runs."""
        return self._thread.is_alive()

    def close(self) -> None:
        """Fails what is under way and ends the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    def _enqueue(self, request: GenerateRequest | ScoreRequest) -> _Job:
        if request.num_prompt_tokens == 0:
            raise ServingError("the prompt has no tokens; send at least one")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise ServingError(f"there is no adapter {request.adapter!r} here; served: {sorted(self._adapters)}")
        job = _Job(request, asyncio.get_running_loop())
        with self._wake:
            if self._closed or not self.is_alive:
                raise ServingError("the engine has stopped; restart the replica")
            self._waiting.append(job)
            self._wake.notify()
        return job

    async def _next_result(self, job: _Job) -> Any:
        result = await job.results.get()
        if isinstance(result, ServingError):
            raise result
        return result

    # The methods below run on the engine's thread. It alone moves jobs and steps them; the lock guards the lists and
    # counts that `stats` reads.

    def _work(self) -> None:
        try:
            while jobs := self._next_jobs():
                self._step(jobs)
        finally:
            with self._wake:
                self._closed = True
                abandoned = [*self._active, *self._waiting]
            for job in abandoned:
                job.deliver(ServingError("the engine has stopped before the answer was complete; ask again"))

    def _next_jobs(self) -> list[_Job]:
        """The jobs of the next step in order of arrival, waiting for one if need be; none when the engine is closed."""
        while True:
            with self._wake:
                while not (self._closed or self._active or self._waiting):
                    self._wake.wait()
                if self._closed:
                    return []
                jobs = [*self._active, *self._waiting]
            for job in jobs:
                if job.cancelled:
                    self._leave(job, "cancelled")
            for job in [job for job in self._waiting if not job.cancelled]:
                if len(self._active) == self._max_sequences:
                    break
                self._admit(job)
            if self._active:
                return list(self._active)

    def _admit(self, job: _Job) -> None:
        """Makes a waiting job active, unless another is about to compute the document that it begins with."""
        try:
            opened = job.request.open(self._prefixes)
        except Exception as error:
            return self._fail(job, error)
        if opened:
            with self._wake:
                self._waiting.remove(job)
                self._active.append(job)
        return None

    def _step(self, jobs: list[_Job]) -> None:
        """A forward pass; where it fails, room is made and each job tried alone, so that only the cause fails."""
        from longalign_ray.serve.requests import SCORE_CHUNK

        demands = [job.request.demand for job in jobs]
        shares = share_tokens(demands, prefill_chunk=self._prefill_chunk, score_chunk=SCORE_CHUNK)
        chosen = [(job, share) for job, share in zip(jobs, shares, strict=True) if share]
        try:
            return self._compute(chosen)
        except Exception as error:
            logger.warning("a step of %d requests failed (%s); each is tried alone", len(chosen), type(error).__name__)
        self._prefixes.clear()
        for job, share in chosen:
            try:
                self._compute([(job, share)])
            except Exception as error:  # out of memory and the like: this request fails, the others go on
                self._fail(job, error)
        return None

    def _compute(self, chosen: list[tuple[_Job, int]]) -> None:
        from longalign_ray.serve import batch_forward

        logits = batch_forward.forward(self._model, [job.request.piece(share) for job, share in chosen])
        with self._wake:
            self._counts["computed_tokens"] += sum(share for _, share in chosen)
        for (job, _), logits_RV in zip(chosen, logits, strict=True):
            self._advance(job, logits_RV)

    def _advance(self, job: _Job, logits_RV: torch.Tensor) -> None:
        try:
            result = job.request.advance(logits_RV)
        except Exception as error:
            return self._fail(job, error)
        if isinstance(result, PromptScore) or (result is not None and result.finish_reason is not None):
            self._leave(job, "finished")  # first, so that the counts are right when the answer is there
        if result is not None:
            job.deliver(result)
        return None

    def _fail(self, job: _Job, error: Exception) -> None:
        logger.error("a request with %d prompt tokens failed", job.request.num_prompt_tokens, exc_info=error)
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
        self._leave(job, "failed")
        job.deliver(ServingError(f"generation failed: {type(error).__name__}: {reason}"))

    def _leave(self, job: _Job, outcome: str) -> None:
        """Drops the job; what it computed stays for others, unless it failed."""
        request = job.request
        if request.cache is not None:
            if outcome == "failed":
                self._prefixes.drop(request.cache)
            else:
                self._prefixes.retain(request.cache, request.token_ids)
            request.cache = None
        with self._wake:
            (self._active if job in self._active else self._waiting).remove(job)
            self._counts[outcome] += 1
            if outcome == "finished":
                self._counts["prompt_tokens"] += request.num_prompt_tokens
                self._counts["generated_tokens"] += request.num_generated
                self._counts["cached_tokens"] += request.num_cached


def end_token_ids(model: Any) -> frozenset[int]:
    """Tokens at which the model's own generation config ends a text; there may be none, one or several."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset(configured if isinstance(configured, list) else [configured])
