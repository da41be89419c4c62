"""`longalign plan --lengths`: its numbers are those that anyone gets from the plan file."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign_ray.cli import main
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import ExampleIndex
from longalign_ray.run_dir import Manifest, RunDir
from tests.unit.data.mixes import long_context_mix

LINEAR, QUADRATIC = 6 * 6.738e9, 6 * 32 * 4_096


@pytest.fixture
def lengths(tmp_path: Path) -> np.ndarray:
    made = long_context_mix(3_000, seed=0)
    np.save(tmp_path / "lengths.npy", made)
    return made


def plan(capsys: pytest.CaptureFixture[str], tmp_path: Path, *options: str) -> tuple[int, str, str]:
    code = main(["plan", "--lengths", str(tmp_path / "lengths.npy"), "--capacity", "65536", *options])
    told = capsys.readouterr()
    return code, told.out, told.err


def rescore(path: Path, lengths: np.ndarray, *, capacity: int, meets: str) -> dict[str, Any]:
    """From the three arrays of the file and the lengths alone, a slot at a time."""
    with np.load(path) as file:
        rows, offsets, shape, degree = (file[name] for name in ("example_rows", "offsets", "shape", "sp_degree"))
    tokens, costs = [], []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        own = lengths[rows[first:last]].astype(float)
        tokens.append(own.sum())
        costs.append((LINEAR * own + QUADRATIC * own**2).sum())
    assert max(tokens) <= capacity * degree
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    per_step = np.array(costs).reshape(shape)
    took = per_step.max(axis=2).sum(axis=1) if meets == "micro-step" else per_step.sum(axis=1).max(axis=1)
    ideal = per_step.sum(axis=(1, 2)) / shape[2]
    return {
        "num_packs": int(np.count_nonzero(tokens)),
        "num_steps": int(shape[0]),
        "utilisation": sum(tokens) / (np.count_nonzero(tokens) * capacity * degree),
        "imbalance_mean": (took / ideal).mean(),
        "imbalance_worst": (took / ideal).max(),
        "time_over_ideal": took.sum() / ideal.sum(),
        "steps_per_epoch": int(shape[0]),
    }


@pytest.mark.parametrize(
    "options",
    [
        "--world-size 8 --sp 2",
        "--world-size 4 --micro-steps 4 --strategy best_fit",
        "--world-size 8 --micro-steps 4 --strategy best_fit --balance sums --seed 3",
        "--world-size 4 --sp 4 --micro-steps 2 --strategy streaming --balance none",
        "--world-size 2 --micro-steps 8 --strategy sorted",
        "--world-size 4 --strategy auto",
    ],
)
def test_the_file_rescored(
    lengths: np.ndarray, options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.npz"
    code, told, _ = plan(capsys, tmp_path, *options.split(), "--json", "--out", str(out))
    assert code == 0
    score = json.loads(told)
    again = rescore(out, lengths, capacity=65_536, meets="step" if "sums" in options else "micro-step")
    assert {name: score[name] for name in again} == pytest.approx(again, rel=1e-9)
    assert (score["num_sequences"], score["dropped"]) == (3_000, 0)
    assert score["lower_bound_packs"] <= score["num_packs"]
    assert score["cpu_seconds"] >= 0
    assert [other["strategy"] for other in score["beside"]] == ["next_fit", "naive"]
    hours = score["time_over_ideal"] * (LINEAR * lengths + QUADRATIC * lengths**2.0).sum() / 2e14 / 3_600
    ranks = int(options.split("--world-size ")[1].split()[0])
    assert score["hours"] == pytest.approx(hours / ranks)


def test_table(lengths: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = plan(capsys, tmp_path, "--world-size", "8", "--sp", "2", "--tflops", "400")
    assert code == 0
    assert "3,000 sequences, 8 ranks in groups of 2, 1 micro-steps, 65,536 tokens a rank" in told
    assert [line.split()[0] for line in told.splitlines()[2:6]] == ["strategy", "deal", "next_fit", "naive"]
    assert "at 400 TFLOP/s a rank (assumed)" in told


def test_what_no_pack_holds_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "lengths.npy", np.array([5, 0, 65_536, 65_537, 1, -3]))
    code, told, _ = plan(capsys, tmp_path, "--world-size", "1", "--json")
    assert code == 0
    assert json.loads(told)["dropped"] == 3
    assert json.loads(told)["num_sequences"] == 6
    code, told, err = plan(capsys, tmp_path, "--world-size", "2", "--sp", "2")
    assert code == 0
    assert "2 of 6 lengths are left out: below 1 or above 131072 tokens" in err


def test_another_model(lengths: np.ndarray, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(shape), encoding="utf-8")
    code, small, _ = plan(capsys, tmp_path, "--json", "--model", str(tmp_path))
    assert code == 0
    assert json.loads(small)["hours"] < 1e-3
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    code, _, err = plan(capsys, tmp_path, "--model", str(tmp_path / "config.json"))
    assert code == 2
    assert "does not describe a decoder" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--world-size 6 --sp 4", "--sp = 4 does not divide --world-size = 6"),
        ("--world-size 0 --micro-steps -1", "--world-size = 0: give 1 or more\n--micro-steps = -1: give 1 or more"),
        ("--fill 1.5", "--fill = 1.5"),
        ("recipe.yaml", "both given"),
        ("--dry-run", "--dry-run checks a recipe, and none is given"),
    ],
)
def test_wrong_options(
    lengths: np.ndarray, options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = plan(capsys, tmp_path, *options.split())
    assert code == 2
    assert message in err


@pytest.mark.parametrize("made", [np.zeros((2, 2), int), np.zeros(3), np.zeros(0, int), None])
def test_wrong_files(made: np.ndarray | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if made is not None:
        np.save(tmp_path / "lengths.npy", made)
    code, _, err = plan(capsys, tmp_path)
    assert code == 2
    assert "lengths.npy" in err


def test_neither_recipe_nor_lengths(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan"]) == 2
    assert "longalign plan RECIPE.yaml, or --lengths FILE.npy" in capsys.readouterr().err


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A recipe whose corpus is tokenised: 300 examples, 10 of them held out."""
    lengths = np.random.default_rng(0).integers(1, 513, 300).astype(np.int32)
    run_dir = RunDir(tmp_path / "run")
    run_dir.store.mkdir(parents=True)
    ExampleIndex(
        example_id=np.array([f"e{number}" for number in range(300)], dtype=object),
        length=lengths,
        num_targets=lengths // 2,
        sum_weights=(lengths // 2).astype(np.float64),
        file=np.zeros(300, np.int32),
        row=np.arange(300, dtype=np.int32),
        source=np.full(300, "corpus", object),
        heldout=np.arange(300) >= 290,
    ).save(run_dir.store / "index.parquet")
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run_dir: {run_dir.root}\nmodel:\n  path: {tiny_model_dir}\ndata:\n  max_length: 512\n"
        "packing:\n  capacity: 512\n  packs_per_step: 8\ntrain:\n  num_workers: 2\n",
        encoding="utf-8",
    )
    return path


def test_a_recipe(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(recipe)]) == 0
    told = capsys.readouterr().out
    assert "290 sequences, 2 ranks in groups of 1, 4 micro-steps, 512 tokens a rank" in told
    by_ranks = [line.split() for line in told.split("time / ideal")[-1].splitlines()[1:]]
    assert [(row[0], row[2]) for row in by_ranks] == [("1", "8"), ("2", "4"), ("4", "2"), ("8", "1")]
    assert len({row[1] for row in by_ranks}) == 1, "the number of steps depends on the ranks"
    assert by_ranks[1][-1] == "recipe"


def test_options_replace_what_the_recipe_says(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, record = tmp_path / "plan.npz", tmp_path / "run" / "config.yaml"
    record.write_text("as trained", encoding="utf-8")
    Manifest("prepare", "", [], [], {}, {"not_json": 3, "duplicate": 4}).save(
        RunDir(tmp_path / "run").manifest("prepare")
    )
    options = "--world-size 8 --sp 4 --micro-steps 2 --strategy best_fit --balance none --json"
    assert main(["plan", str(recipe), "train.epochs=2", *options.split(), "--out", str(out)]) == 0
    score = json.loads(capsys.readouterr().out)
    plan = StepPlan.load(out)
    assert (plan.shape[1:], plan.sp_degree, plan.strategy, plan.balance) == ((2, 2), 4, "best_fit", "none")
    assert (score["num_sequences"], score["dropped"], score["num_steps"]) == (587, 7, plan.num_steps)
    naive = score["beside"][1]  # 16 of 290 a step: 19 steps, and 37 of two epochs, which share one
    assert (naive["strategy"], naive["steps_per_epoch"], naive["num_steps"]) == ("naive", 19, 37)
    assert score["steps_per_epoch"] == round(plan.num_steps / 2) == np.count_nonzero(plan.epoch == 0)
    assert sorted(plan.example_rows.tolist()) == sorted(2 * list(range(290)))
    assert record.read_text(encoding="utf-8") == "as trained"


def test_auto_chooses_once_for_any_number_of_ranks(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On 2 ranks it takes `deal`, and on others it would `best_fit`, whose steps are fewer."""

    def chosen(plans: dict[str, StepPlan]) -> StepPlan:
        return plans["deal" if plans["deal"].world_size == 2 else "best_fit"]

    def steps_by_ranks(strategy: str) -> list[str]:
        assert main(["plan", str(recipe), "--strategy", strategy]) == 0
        table = capsys.readouterr().out.split("time / ideal")[-1].splitlines()[1:]
        assert [line.split()[0] for line in table] == ["1", "2", "4", "8"]
        return [line.split()[1] for line in table]

    monkeypatch.setattr("longalign_ray.data.make_plan._best_of", chosen)
    assert steps_by_ranks("auto") == steps_by_ranks("deal") != steps_by_ranks("best_fit")


def test_a_recipe_whose_corpus_is_not_tokenised(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(recipe), f"run_dir={tmp_path / 'other'}"]) == 0
    told = capsys.readouterr()
    assert "run `longalign prepare` first" in told.err
    assert told.out.startswith("Memory, forecast in GB for 512 tokens a rank")
    assert "a step takes" not in told.out.lower()
    assert main(["plan", str(recipe), f"run_dir={tmp_path / 'other'}", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == ["memory"]
    assert not (tmp_path / "other").exists()
    assert main(["plan", str(recipe), "--model", "config.json"]) == 2
    assert "model.path" in capsys.readouterr().err


def test_a_model_of_the_hub_is_planned_by_its_config_alone(
    recipe: Path,
    tmp_path: Path,
    tiny_model_dir: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its weights may be 26 GB. The run before this one is named as not counted."""
    fetched: list[tuple[str, list[str]]] = []

    def snapshot_download(hub_id: str, *, allow_patterns: list[str]) -> str:
        fetched.append((hub_id, allow_patterns))
        shutil.copy(tiny_model_dir / "config.json", tmp_path / "config.json")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert main(["plan", str(recipe), "model.path=org/name"]) == 0
    told = capsys.readouterr()
    assert fetched == [("org/name", ["config.json"])]
    assert "290 sequences" in told.out
    assert "before" not in told.err
    assert main(["plan", str(recipe), "model.path=org/name", "before.corpus.paths=[long.jsonl]"]) == 0
    assert "the run that comes first (`before`) is not counted" in capsys.readouterr().err
