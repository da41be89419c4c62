from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch

from longalign_ray.train.profiler import StepProfiler
from tests.unit.train.process_group import alone


def steps_in(file: Path) -> list[int]:
    """Numbers of the steps whose range is in a trace."""
    trace = json.loads(gzip.decompress(file.read_bytes()))
    return [int(e["name"].split()[1]) for e in trace["traceEvents"] if e.get("name", "").startswith("step ")]


@pytest.mark.parametrize(
    ("steps", "first_step", "file", "recorded"),
    [
        ((2, 3), 0, "steps-2-3-rank-0.json.gz", [2, 3]),
        ((1, 3), 2, "steps-2-3-rank-0.json.gz", [2, 3]),  # resumed in the middle
        ((4, 9), 0, "steps-4-5-rank-0.json.gz", [4, 5]),  # ends before
    ],
)
def test_a_trace_holds_the_steps_asked_for(
    tmp_path: Path, steps: tuple[int, int], first_step: int, file: str, recorded: list[int]
) -> None:
    run(StepProfiler(steps, tmp_path / "profile"), first_step)
    assert [path.name for path in (tmp_path / "profile").iterdir()] == [file]
    assert sorted(set(steps_in(tmp_path / "profile" / file))) == recorded


@pytest.mark.parametrize("steps", [None, (7, 8)])
def test_no_trace_where_none_is_asked_for(tmp_path: Path, steps: tuple[int, int] | None) -> None:
    run(StepProfiler(steps, tmp_path / "profile"), 0)
    assert not (tmp_path / "profile").exists()


def run(profiler: StepProfiler, first_step: int) -> None:
    with alone():
        for step in range(first_step, 6):
            profiler.start(step)
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(2).sum()
            profiler.stop(step, is_last=step == 5)
