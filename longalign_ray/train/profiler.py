"""Traces of torch.profiler over some steps, for chrome://tracing or Perfetto: one file a rank."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import distributed as dist
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps first .. last, both included, of those that run; nothing where `steps` is None."""

    def __init__(self, steps: tuple[int, int] | None, directory: Path):
        self._steps, self._directory = steps, directory
        self._running: profile | None = None

    def start(self, step: int) -> None:
        """Called before a step."""
        if self._running is None and self._steps is not None and self._steps[0] <= step <= self._steps[1]:
            activities = [ProfilerActivity.CPU]
            if torch.cuda.is_available():
                activities.append(ProfilerActivity.CUDA)
            self._running = profile(activities=activities)
            self._running.start()
            self._first = step

    def stop(self, step: int, *, is_last: bool) -> None:
        """Called after a step; writes the trace after the last step that it holds."""
        if self._running is None or self._steps is None or (step < self._steps[1] and not is_last):
            return
        self._running.stop()
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / f"steps-{self._first}-{step}-rank-{dist.get_rank()}.json.gz"
        self._running.export_chrome_trace(str(file))
        self._running = None
        logger.info("profile of steps %d to %d: %s", self._first, step, file)
