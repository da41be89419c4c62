"""The embedded engine: a transformers model owned by one thread that turns to its requests in round robin."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from longalign_ray.errors import ModelError, ServingError
from longalign_ray.serve.engine import EngineStats, GenerationEvent, PromptScore, Sampling

logger = logging.getLogger(__name__)

Steps = Generator[Any, None, None]


@dataclass(slots=True, eq=False)
class _Job:
    """A request: `start(model)` gives its steps; what they yield goes to `results` on the caller's event loop."""

    start: Callable[[Any], Steps]
    num_prompt_tokens: int
    loop: asyncio.AbstractEventLoop
    results: asyncio.Queue[Any] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    steps: Steps | None = None

    def deliver(self, result: Any) -> None:
        try:
            self.loop.call_soon_threadsafe(self.results.put_nowait, result)
        except RuntimeError:  # the caller's loop is closed, so nobody waits any more
            self.cancelled = True


class TransformersEngine:
    """A GenerationEngine on one model directory (safetensors, no remote code).

    Every step is one forward pass of one request: a chunk of its prompt or one token. At most `max_sequences` requests
    hold a KV cache at a time; the others wait in order.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str,
        prefill_chunk: int = 2_048,
        max_sequences: int = 8,
        device: str = "cpu",
        num_threads: int | None = None,
    ):
        import torch

        if num_threads is not None:
            torch.set_num_threads(num_threads)
        self._model = load_model(model_dir, dtype=dtype, device=device)
        self._end_ids = end_token_ids(self._model)
        self._prefill_chunk = prefill_chunk
        self._max_sequences = max_sequences
        self._wake = threading.Condition()
        self._waiting: deque[_Job] = deque()
        self._active: deque[_Job] = deque()
        self._closed = False
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._thread.start()

    async def submit(self, token_ids: Sequence[int], sampling: Sampling) -> AsyncGenerator[GenerationEvent, None]:
        from longalign_ray.serve.generate import generate

        def start(model: Any) -> Steps:
            return generate(model, token_ids, sampling, end_ids=self._end_ids, prefill_chunk=self._prefill_chunk)

        job = self._enqueue(start, len(token_ids))
        try:
            while True:
                event = await self._next_result(job)
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            job.cancelled = True

    async def score(self, token_ids: Sequence[int], *, num_top: int = 0) -> PromptScore:
        from longalign_ray.serve.generate import score

        job = self._enqueue(lambda model: score(model, token_ids, num_top=num_top), len(token_ids))
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

    def _enqueue(self, start: Callable[[Any], Steps], num_prompt_tokens: int) -> _Job:
        if num_prompt_tokens == 0:
            raise ServingError("the prompt has no tokens; send at least one")
        job = _Job(start, num_prompt_tokens, asyncio.get_running_loop())
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

    # The methods below run on the engine's thread. It alone removes jobs and steps them; the lock guards the queues
    # and counts that `stats` reads.

    def _work(self) -> None:
        try:
            while (job := self._next_job()) is not None:
                self._advance(job)
        finally:
            with self._wake:
                self._closed = True
                abandoned = [*self._active, *self._waiting]
            for job in abandoned:
                job.deliver(ServingError("the engine has stopped before the answer was complete; ask again"))

    def _next_job(self) -> _Job | None:
        """The job whose turn it is, waiting for one if need be; None when the engine is closed."""
        with self._wake:
            while True:
                if self._closed:
                    return None
                for job in [job for job in self._waiting if job.cancelled]:
                    self._waiting.remove(job)
                    self._counts["cancelled"] += 1
                while self._waiting and len(self._active) < self._max_sequences:
                    self._active.append(self._waiting.popleft())
                if self._active:
                    return self._active[0]
                self._wake.wait()

    def _advance(self, job: _Job) -> None:
        """One step; then the job goes to the end of the line, or leaves it."""
        if job.cancelled:
            return self._leave(job, "cancelled")
        try:
            if job.steps is None:
                job.steps = job.start(self._model)
            result = next(job.steps)
        except Exception as error:  # out of memory and the like: this request fails, the others go on
            logger.exception("a request with %d prompt tokens failed", job.num_prompt_tokens)
            reason = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
            job.deliver(ServingError(f"generation failed: {type(error).__name__}: {reason}"))
            return self._leave(job, "failed")
        if result is not None:
            job.deliver(result)
        if isinstance(result, PromptScore) or (result is not None and result.finish_reason is not None):
            generated = 0 if isinstance(result, PromptScore) else result.num_generated
            return self._leave(job, "finished", generated=generated)
        with self._wake:
            self._active.rotate(-1)
        return None

    def _leave(self, job: _Job, outcome: str, *, generated: int = 0) -> None:
        """Drops the job and, with its steps, its KV cache."""
        if job.steps is not None:
            job.steps.close()
            job.steps = None
        with self._wake:
            self._active.remove(job)
            self._counts[outcome] += 1
            if outcome == "finished":
                self._counts["prompt_tokens"] += job.num_prompt_tokens
                self._counts["generated_tokens"] += generated


def load_model(model_dir: str | Path, *, dtype: str, device: str) -> Any:
    """A causal language model in eval mode. Raises ModelError where the directory does not hold one."""
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    from longalign_ray.precision import DTYPES

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(model_dir),
            dtype=DTYPES[dtype],
            attn_implementation="sdpa",
            use_safetensors=True,
            trust_remote_code=False,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{model_dir} cannot be loaded for serving ({error}); give a directory with config.json and safetensors"
        ) from error
    return model.to(device).eval()


def end_token_ids(model: Any) -> frozenset[int]:
    """Tokens at which the model's own generation config ends a text; there may be none, one or several."""
    configured = model.generation_config.eos_token_id
    if configured is None:
        return frozenset()
    return frozenset(configured if isinstance(configured, list) else [configured])
