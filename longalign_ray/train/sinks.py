"""Where metrics go beside metrics.jsonl, which is the record: TensorBoard, W&B, MLflow. Only rank 0 opens any.

A sink is a convenience: one that fails is told once and left out, and training goes on.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from longalign_ray.errors import LongAlignError

logger = logging.getLogger(__name__)

PROJECT = "longalign_ray"  # of W&B, and experiment of MLflow, where the environment names none


class Sink(Protocol):
    """Takes the numbers of one step; names may hold slashes."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class TensorBoardSink:
    """Event files in `directory`/tensorboard; a resumed run hides the steps that it replays."""

    def __init__(self, directory: Path, *, first_step: int = 0):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(directory / "tensorboard"), flush_secs=10, purge_step=first_step or None)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """A run of Weights & Biases; a resumed run continues it. WANDB_PROJECT, WANDB_MODE and so on apply."""

    def __init__(self, directory: Path, *, run_name: str, settings: Mapping[str, Any], first_step: int = 0):
        import wandb  # pyright: ignore[reportMissingImports]

        known = _read_id(directory, "wandb") if first_step else None
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run_name,
            dir=str(directory),
            config=dict(settings),
            id=known,
            resume="allow" if known else None,
        )
        _write_id(directory, "wandb", self._run.id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowSink:
    """A run of MLflow, in `directory`/mlflow.db unless MLFLOW_TRACKING_URI says other; a resumed run continues it."""

    def __init__(self, directory: Path, *, run_name: str, settings: Mapping[str, Any], first_step: int = 0):
        import mlflow  # pyright: ignore[reportMissingImports]

        self._mlflow = mlflow
        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(directory / 'mlflow.db').resolve()}")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT))
        known = _read_id(directory, "mlflow") if first_step else None
        run = mlflow.start_run(run_id=known, run_name=None if known else run_name)
        if known is None:
            mlflow.log_params(dict(settings))
            _write_id(directory, "mlflow", run.info.run_id)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        self._mlflow.end_run()


TRACKERS = {"wandb": WandbSink, "mlflow": MlflowSink}


def check_installed(names: Sequence[str]) -> None:
    """Raises LongAlignError, before any rank starts, for the first of `train.sinks` whose package is missing."""
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise LongAlignError(f"train.sinks has {name}, which is not installed: pip install {name}, or leave it out")


class Sinks:
    """All sinks of a run as one. The first failure of each is a warning, and it is not asked again."""

    def __init__(self, opened: Mapping[str, Callable[[], Sink]]):
        """opened: by name, what makes the sink."""
        self._sinks: dict[str, Sink] = {}
        for name, make in opened.items():
            self._guarded(name, lambda name=name, make=make: self._sinks.__setitem__(name, make()))

    def write(self, row: Mapping[str, Any]) -> None:
        """row: a line of metrics.jsonl."""
        values = scalars(row)
        for name, sink in list(self._sinks.items()):
            self._guarded(name, lambda sink=sink: sink.write(row["step"], values))

    def close(self) -> None:
        for name, sink in list(self._sinks.items()):
            self._guarded(name, sink.close)

    def _guarded(self, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except ImportError as error:
            self._leave_out(name, f"{error}; pip install {error.name or name}")
        except Exception as error:  # whatever a tracker raises, the run is worth more
            self._leave_out(name, f"{type(error).__name__}: {error}")

    def _leave_out(self, name: str, why: str) -> None:
        self._sinks.pop(name, None)
        logger.warning("%s gets no more metrics of this run (%s); metrics.jsonl has them all", name, why)


def open_sinks(
    names: Sequence[str], directory: Path, *, run_name: str, settings: Mapping[str, Any], first_step: int = 0
) -> dict[str, Callable[[], Sink]]:
    """TensorBoard and the named trackers, to be made by `Sinks`. `directory`: train/ of the run."""
    makers: dict[str, Callable[[], Sink]] = {"tensorboard": lambda: TensorBoardSink(directory, first_step=first_step)}
    for name in names:
        makers[name] = lambda make=TRACKERS[name]: make(
            directory, run_name=run_name, settings=settings, first_step=first_step
        )
    return makers


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row but its step; those of a nested mapping as `heldout_by_length/0-4k`."""
    values: dict[str, float] = {}
    for name, value in row.items():
        parts = {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
        values |= {
            key: float(part) for key, part in parts.items() if isinstance(part, int | float) and math.isfinite(part)
        }
    values.pop("step", None)
    return values


def _id_file(directory: Path, name: str) -> Path:
    return directory / f"{name}_run_id"


def _read_id(directory: Path, name: str) -> str | None:
    file = _id_file(directory, name)
    return file.read_text(encoding="utf-8") if file.exists() else None


def _write_id(directory: Path, name: str, run_id: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    _id_file(directory, name).write_text(run_id, encoding="utf-8")
