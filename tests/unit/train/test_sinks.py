from __future__ import annotations

import importlib.util
import logging
import struct
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest

from longalign_ray.errors import LongAlignError
from longalign_ray.train.sinks import Sinks, check_installed, open_sinks, scalars

ROW = {
    "step": 3,
    "loss": 2.5,
    "num_tokens": 100,
    "mfu": None,
    "grad_norm": float("nan"),
    "heldout_by_length": {"0-4k": 2.25, "8-16k": 2.75},
}
VALUES = {"loss": 2.5, "num_tokens": 100.0, "heldout_by_length/0-4k": 2.25, "heldout_by_length/8-16k": 2.75}


def opened(names: list[str], directory: Path, *, first_step: int = 0) -> Sinks:
    return Sinks(open_sinks(names, directory, run_name="mine", settings={"epochs": 2}, first_step=first_step))


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for member, value in members.items():
        setattr(module, member, value)
    monkeypatch.setitem(sys.modules, name, module)


def events(directory: Path) -> list[tuple[int, str, float]]:
    """(step, tag, value) of every scalar of TensorBoard's event files, in order."""
    from tensorboardX.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]

    found = []
    for file in sorted(directory.glob("events.out.tfevents*")):
        content, position = file.read_bytes(), 0
        while position < len(content):
            (length,) = struct.unpack_from("<Q", content, position)
            event = Event.FromString(content[position + 12 : position + 12 + length])
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
            position += 12 + length + 4
    return found


def test_numbers_of_a_row() -> None:
    assert scalars(ROW) == VALUES


def test_tensorboard_always_gets_every_number(tmp_path: Path) -> None:
    sinks = opened([], tmp_path)
    sinks.write(ROW)
    sinks.write({"step": 4, "loss": 2.0})
    sinks.close()
    expected = [(3, name, value) for name, value in VALUES.items()] + [(4, "loss", 2.0)]
    assert sorted(events(tmp_path / "tensorboard")) == sorted(expected)


def test_wandb_gets_the_numbers_and_a_resumed_run_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def init(**settings: Any) -> Any:
        calls.append(settings)
        return SimpleNamespace(
            id="w1", log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finish")
        )

    stand_in(monkeypatch, "wandb", init=init)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    for first_step in (0, 3):
        sinks = opened(["wandb"], tmp_path, first_step=first_step)
        sinks.write(ROW)
        sinks.close()
    started, resumed = calls[0], calls[3]
    assert (started["project"], started["name"], started["config"]) == ("longalign_ray", "mine", {"epochs": 2})
    assert (started["id"], started["resume"]) == (None, None)
    assert (resumed["id"], resumed["resume"]) == ("w1", "allow")
    assert calls[1:3] == calls[4:] == [(3, VALUES), "finish"]


def test_mlflow_gets_the_numbers_and_a_resumed_run_continues_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []

    def start_run(**settings: Any) -> Any:
        calls.append(settings)
        return SimpleNamespace(info=SimpleNamespace(run_id="m1"))

    stand_in(
        monkeypatch,
        "mlflow",
        set_tracking_uri=calls.append,
        set_experiment=calls.append,
        start_run=start_run,
        log_params=calls.append,
        log_metrics=lambda values, step: calls.append((step, values)),
        end_run=lambda: calls.append("end"),
    )
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    for first_step in (0, 3):
        sinks = opened(["mlflow"], tmp_path, first_step=first_step)
        sinks.write(ROW)
        sinks.close()
    uri = f"sqlite:///{tmp_path.resolve()}/mlflow.db"
    first = [uri, "theirs", {"run_id": None, "run_name": "mine"}, {"epochs": 2}, (3, VALUES), "end"]
    assert calls == [*first, uri, "theirs", {"run_id": "m1", "run_name": None}, (3, VALUES), "end"]


@pytest.mark.skipif(importlib.util.find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_itself_holds_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    for first_step in (0, 4):
        sinks = opened(["mlflow"], tmp_path, first_step=first_step)
        sinks.write({**ROW, "step": first_step})
        sinks.close()
    client = mlflow.MlflowClient((tmp_path / "mlruns").as_uri())
    run_id = (tmp_path / "mlflow_run_id").read_text()
    history = client.get_metric_history(run_id, "heldout_by_length/0-4k")
    assert [(metric.step, metric.value) for metric in history] == [(0, 2.25), (4, 2.25)]
    assert client.get_run(run_id).data.params == {"epochs": "2"}


class Failing:
    """A sink that fails at its `fails_at`-th row."""

    def __init__(self, fails_at: int):
        self.rows, self.fails_at = 0, fails_at

    def write(self, step: int, values: Any) -> None:
        self.rows += 1
        if self.rows == self.fails_at:
            raise ConnectionError("no route")

    def close(self) -> None:
        raise AssertionError("a sink that failed is left alone")


def test_a_failing_sink_is_told_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    failing, kept = Failing(2), []
    good = cast(Any, SimpleNamespace(write=lambda step, values: kept.append(step), close=lambda: kept.append("closed")))
    with caplog.at_level(logging.WARNING):
        sinks = Sinks({"failing": lambda: failing, "good": lambda: good})
        for step in range(5):
            sinks.write({"step": step, "loss": 1.0})
        sinks.close()
    assert kept == [0, 1, 2, 3, 4, "closed"]
    assert failing.rows == 2
    assert [message for message in caplog.messages if "failing" in message] == [
        "failing gets no more metrics of this run (ConnectionError: no route); metrics.jsonl has them all"
    ]


def test_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        sinks = opened(["wandb"], tmp_path)
        sinks.write(ROW)  # TensorBoard still takes it
        sinks.close()
    assert len(caplog.messages) == 1
    assert "pip install wandb" in caplog.messages[0]
    assert len(events(tmp_path / "tensorboard")) == len(VALUES)


def test_a_missing_package_stops_the_run_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch, "wandb")
    check_installed(["wandb"])
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LongAlignError, match=r"train\.sinks has wandb.*pip install wandb"):
        check_installed(["wandb"])
