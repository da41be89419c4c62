from __future__ import annotations

import logging
from pathlib import Path

import pytest

from longalign_ray.logs import MetricsWriter, configure_logging, progress, read_metrics


def write(path: Path, steps: range, *, first_step: int) -> None:
    writer = MetricsWriter(path, first_step=first_step)
    for step in steps:
        writer.write({"step": step, "loss": 1 / (1 + step)})
    writer.close()


def test_a_resumed_writer_replays_its_steps_once(tmp_path: Path) -> None:
    path = tmp_path / "train" / "metrics.jsonl"
    write(path, range(5), first_step=0)
    write(path, range(3, 6), first_step=3)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4, 5]
    write(path, range(1), first_step=0)
    assert read_metrics(path) == [{"step": 0, "loss": 1.0}]
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def test_rows_are_on_disk_as_soon_as_they_are_written(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 0})
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 0}]
    writer.close()


def test_numbers_that_json_does_not_have_are_null(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.write({"step": 0, "loss": float("nan"), "by_length": {"0-4k": float("inf"), "4-8k": 1.5}})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    assert text == '{"step": 0, "loss": null, "by_length": {"0-4k": null, "4-8k": 1.5}}\n'


def test_half_written_line_of_a_killed_writer_is_no_row(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1, "lo', encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        assert read_metrics(path) == [{"step": 0}]
    assert "half-written" in caplog.text
    write(path, range(1, 3), first_step=1)
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2]


def test_no_file_is_no_rows(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(("total", "expected"), [(100, 11), (5, 6), (0, 1)])
def test_progress_without_a_terminal_is_a_line_for_each_tenth(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, total: int, expected: int
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, logger="longalign_ray"), progress("packs", total) as bar:
        for done in range(total + 1):
            bar.advance(done)
    assert len(caplog.messages) == expected
    assert caplog.messages[-1].startswith(f"packs {total}/")


def test_progress_lines_show_every_message(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: False, raising=False)
    with caplog.at_level(logging.INFO, logger="longalign_ray"), progress("steps", 1_000) as bar:
        bar.advance(1, "loss 2.5")
        bar.advance(2, "loss 2.4")
    assert caplog.messages == ["steps 1/1000 loss 2.5", "steps 2/1000 loss 2.4"]


def test_progress_on_a_terminal_is_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("steps", 3) as bar:
        bar.advance(3, "loss 2.5")
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss 2.5" in shown


def test_messages_of_the_package_and_warnings_of_others_go_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    try:
        configure_logging()
        logging.getLogger("longalign_ray.data").info("ours")
        logging.getLogger("other").info("chatter")
        logging.getLogger("other").warning("theirs")
    finally:
        root.level, root.handlers = before
    out, err = capsys.readouterr()
    assert out == ""
    assert "ours" in err
    assert "theirs" in err
    assert "chatter" not in err
