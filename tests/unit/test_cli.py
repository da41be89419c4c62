from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from longalign_ray import stages
from longalign_ray.cli import HELP, main
from longalign_ray.errors import CorpusError, LongAlignError
from longalign_ray.run_dir import STAGES


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    before = root.level, root.handlers[:]
    yield
    root.level, root.handlers = before


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"run_dir: {tmp_path / 'run'}\n", encoding="utf-8")
    return path


def replace_stage(monkeypatch: pytest.MonkeyPatch, outcome: Any) -> None:
    def prepare(config: Any, run_dir: Any) -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(stages, "prepare", prepare)


def run(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = int(stop.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def test_done_is_0_and_leaves_the_resolved_config(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stage(monkeypatch, None)
    assert run(capsys, "prepare", recipe, "train.epochs=3")[0] == 0
    saved = (recipe.parent / "run" / "config.yaml").read_text(encoding="utf-8")
    assert "epochs: 3" in saved
    assert "capacity: 4096" in saved


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (CorpusError("corpus.paths: x.jsonl is empty; give a file with records"), 1, "x.jsonl is empty"),
        (OSError(28, "No space left on device", "/run/store"), 1, "/run/store: No space left on device; free some"),
        (OSError(2, "No such file or directory", "t.jinja"), 1, "t.jinja: No such file or directory\n"),
        (ConnectionResetError("closed by peer"), 1, "ConnectionResetError: closed by peer\n"),
        (KeyboardInterrupt(), 130, "interrupted; the same command continues"),
    ],
)
def test_a_foreseen_failure_is_one_line(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    message: str,
) -> None:
    replace_stage(monkeypatch, error)
    found, _, err = run(capsys, "prepare", recipe)
    assert found == code
    assert message in err
    assert "Traceback" not in err


def test_an_unforeseen_failure_ends_with_a_plain_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stage(monkeypatch, ZeroDivisionError("division by zero"))
    code, _, err = run(capsys, "prepare", recipe)
    assert code == 1
    assert err.splitlines()[-1].endswith("`prepare` failed with ZeroDivisionError: division by zero")


def test_an_error_that_came_through_ray_is_shown_without_the_workers_traceback(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class AsRayRaisesIt(CorpusError):
        cause = CorpusError("corpus.paths: x.jsonl is empty")

    replace_stage(monkeypatch, AsRayRaisesIt("ray::task()\nTraceback ..."))
    code, _, err = run(capsys, "prepare", recipe)
    assert code == 1
    assert "x.jsonl is empty" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "arguments", [["prepare", "none.yaml"], ["prepare"], ["nonsense", "x.yaml"], [], ["prepare", "{}", "trian.x=1"]]
)
def test_bad_config_or_usage_is_2(recipe: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, err = run(capsys, *(argument.format(recipe) for argument in arguments))
    assert code == 2
    assert out == ""
    assert err
    assert "Traceback" not in err
    assert not (recipe.parent / "run").exists()


def test_a_run_dir_that_cannot_be_written_is_named(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (recipe.parent / "file").write_text("", encoding="utf-8")
    code, _, err = run(capsys, "prepare", recipe, f"run_dir={recipe.parent}/file/run")
    assert code == 1
    assert f"run_dir = {recipe.parent}/file/run cannot be written" in err


def test_dry_run_shows_config_and_stages_and_writes_nothing(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "run", recipe, "seed=7", "--dry-run")
    assert code == 0
    assert "seed: 7" in out
    assert [line.split()[0] for line in out.splitlines()[-6:]] == [*STAGES]
    assert not (recipe.parent / "run").exists()


def test_a_stage_before_its_turn_says_which_comes_first(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(capsys, "train", recipe)
    assert code == 1
    assert "run `longalign prepare` first" in err


def test_a_job_with_a_relative_run_dir_is_refused(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace_stage(monkeypatch, None)
    monkeypatch.chdir(recipe.parent)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    code, _, err = run(capsys, "prepare", recipe, "run_dir=runs/a")
    assert code == 2
    assert "run_dir = runs/a is relative" in err
    assert not (recipe.parent / "runs").exists()
    assert run(capsys, "prepare", recipe)[0] == 0


def test_a_cluster_that_does_not_answer_is_named_at_once(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.init", lambda **settings: pytest.fail("ray.init would wait for minutes"))
    code, _, err = run(capsys, "construct", recipe, "ray.address=127.0.0.1:1")
    assert code == 1
    assert "no Ray cluster answers at 127.0.0.1:1" in err


def test_subcommands_without_a_file_of_their_own_are_stages() -> None:
    assert all(
        callable(getattr(stages, name)) for name in set(HELP) - {"doctor", "plan", "inspect", "score", "compare"}
    )
    assert issubclass(LongAlignError, Exception)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\nfrom longalign_ray.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.stderr.write(' '.join({'torch', 'ray', 'transformers', 'pydantic', 'numpy', 'yaml'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "evaluate" in found.stdout
    assert found.stderr == ""


def test_config_and_stages_import_without_warnings_or_heavy_packages() -> None:
    code = (
        "import sys, longalign_ray.stages, longalign_ray.config_load\n"
        "sys.stdout.write(' '.join({'torch', 'ray', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (found.returncode, found.stdout, found.stderr) == (0, "", "")


@pytest.mark.parametrize("job", ["construct", "prepare", "train", "serve", "generate", "evaluate", "pipeline"])
def test_jobs_report_like_the_command(job: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    found = subprocess.run(
        [sys.executable, root / "jobs" / f"{job}.py", "none.yaml"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert found.returncode == 2
    assert "cannot read the recipe none.yaml" in found.stderr
    assert "Traceback" not in found.stderr


def test_settings_may_stand_behind_options(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "prepare", recipe, "--dry-run", "train.epochs=7")
    assert code == 0
    assert "epochs: 7" in out
    code, _, err = run(capsys, "prepare", recipe, "--dryrun", "train.epochs=7")
    assert code == 2
    assert "unrecognized arguments: --dryrun" in err
    code, _, err = run(capsys, "score", "longbench", "here", "train.epochs=7")
    assert code == 2
    assert "unrecognized arguments: train.epochs=7" in err


def test_estimate_of_an_evaluation_needs_no_server(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path / 'run'}\nmodel: {{path: {tiny_model_dir}}}\n"
        "evaluate: {needle: {lengths: [700], depths: [10, 50], max_new_tokens: 8}, models: [aligned]}\n"
    )
    code, _, err = run(capsys, "evaluate", recipe, "--estimate")
    assert code == 1
    assert "run `longalign prepare` first, or leave the held-out loss out with evaluate.heldout_loss=false" in err
    code, out, _ = run(capsys, "evaluate", recipe, "--estimate", "evaluate.heldout_loss=false")
    assert code == 0
    task, cases, documents, prompt, computed, answers, _ = [
        cell.strip() for cell in out.splitlines()[2].split("|")[1:-1]
    ]
    assert (task, cases, documents, answers) == ("needle", "2", "1", "16")
    assert 1_300 < int(prompt.replace(",", "")) <= 1_400
    assert int(computed.replace(",", "")) < int(prompt.replace(",", "")) - 60  # a tenth of a haystack is shared
    assert not (tmp_path / "run").exists()
    code, _, err = run(capsys, "evaluate", recipe, "--estimate", "--tflops", "0")
    assert code == 2
    assert "--tflops = 0: give a rate above 0" in err
