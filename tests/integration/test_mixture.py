"""Sources, duplicates and evaluation sets through `prepare` on Ray Data: everything kept or left out is counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longalign_ray import stages
from longalign_ray.data import corpus as corpus_module
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import CorpusError
from tests.integration.recipes import write_corpus, write_recipe

pytestmark = pytest.mark.usefixtures("local_ray")

WORDS = [f"w{i}" for i in range(4_000)]
QUESTION = "which of the three rivers that meet below the old mill is the longest one"


def prepare(recipe: Path, *overrides: str):
    config, run_dir = stages.open_run(recipe, overrides)
    return stages.prepare(config, run_dir), run_dir


def rejects_of(run_dir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_dir.rejects.read_text(encoding="utf-8").splitlines()]


def test_sources_are_mixed_by_weight(tiny_model_dir: Path, tmp_path: Path) -> None:
    chat = write_corpus(tmp_path / "chat.jsonl", 80)
    alpaca = tmp_path / "alpaca.jsonl"
    rows = [{"instruction": f"say {i}", "input": "", "output": f"{i} " * 20} for i in range(20)]
    alpaca.write_text("\n".join(map(json.dumps, rows)))
    sources = {
        "chat": {"paths": [str(chat)], "weight": 0.5},
        "tasks": {"paths": [str(alpaca)], "style": "alpaca", "weight": 0.5, "repeat": 1.5, "max_examples": 16},
    }
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"sources": sources}, data={"heldout_fraction": 0.0})
    manifest, run_dir = prepare(recipe)
    index, plan = ExampleIndex.load(run_dir.store / "index.parquet"), StepPlan.load(run_dir.plan)
    assert Counter(index.source) == {"chat": 80, "tasks": 20}
    # 16 tasks, 1.5 times each, are half of an epoch of 48.
    times = np.bincount(plan.example_rows, minlength=100)
    assert Counter(times[:80].tolist()) == {0: 56, 1: 24}
    assert Counter(times[80:].tolist()) == {0: 4, 1: 8, 2: 8}
    assert manifest.dropped_by_reason == {"over_share.chat": 56, "over_max_examples.tasks": 4}
    counts = manifest.counts
    assert (counts["examples.chat"], counts["examples.tasks"]) == (24, 24)
    assert counts["tokens.tasks"] == index.length[plan.example_rows][plan.example_rows >= 80].sum()
    assert counts["planned"] + sum(manifest.dropped_by_reason.values()) == counts["examples"] == 100
    # Three epochs reach more of the chats, and another world size gets the same steps.
    more, _ = prepare(recipe, "train.epochs=3")
    assert more.dropped_by_reason == {"over_share.chat": 8, "over_max_examples.tasks": 4}
    digest = StepPlan.load(run_dir.plan).digest
    prepare(recipe, "train.epochs=3", "train.num_workers=4")
    assert StepPlan.load(run_dir.plan).digest == digest


def test_the_amount_of_long_examples(tiny_model_dir: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    recipe = write_recipe(
        tmp_path,
        tiny_model_dir,
        corpus={"sources": {"only": {"paths": [str(corpus)], "repeat": 3}}},
        mixture={"long_from": 100},
    )
    manifest, run_dir = prepare(recipe, "mixture.max_long_examples=3")
    index, plan = ExampleIndex.load(run_dir.store / "index.parquet"), StepPlan.load(run_dir.plan)
    long = (index.length >= 100) & ~index.heldout
    assert long.sum() > 10
    assert (index.length[np.unique(plan.example_rows)] >= 100).sum() == 3
    assert manifest.dropped_by_reason == {"over_max_long_examples.only": long.sum() - 3}
    assert manifest.counts["examples.only"] == len(plan.example_rows) == 3 * manifest.counts["planned"]


def text(seed: int, number: int = 80) -> str:
    return " ".join(np.random.default_rng(seed).choice(WORDS, number))


def write_repetitive(directory: Path) -> tuple[Path, Path, Path]:
    """Two corpus files with planted duplicates and evaluation texts, and the evaluation set."""
    first, second, evaluation = directory / "a.jsonl", directory / "b.jsonl", directory / "test.jsonl"
    texts = {f"a{i}": text(i) for i in range(30)}
    texts["a30"] = texts["a3"]  # line 31
    texts["a31"] = f"So: {QUESTION.upper()}?"  # line 32
    others = {f"b{i}": text(100 + i) for i in range(10)}
    others["b10"] = texts["a5"]  # line 11
    others["b11"] = texts["a7"].replace(" ", ", ") + " and more"  # line 12
    others["b12"] = " ".join(QUESTION.split()[:12])  # line 13: 12 words of 13
    others["b13"] = others["b11"]  # line 14
    for path, content in ((first, texts), (second, others)):
        talks = [
            {"id": name, "messages": [{"role": "user", "content": value}, {"role": "assistant", "content": "yes"}]}
            for name, value in content.items()
        ]
        path.write_text("\n".join(map(json.dumps, talks)), encoding="utf-8")
    evaluation.write_text(json.dumps({"question": QUESTION, "answers": ["no"]}) + "\n", encoding="utf-8")
    return first, second, evaluation


def test_duplicates_and_contamination_whatever_the_slices(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, evaluation = write_repetitive(tmp_path)
    found = []
    for name, slice_bytes in (("one", 1 << 20), ("many", 1_500)):
        (tmp_path / name).mkdir()
        recipe = write_recipe(
            tmp_path / name,
            tiny_model_dir,
            corpus={"paths": [str(first), str(second)], "max_bad_fraction": 0.0},
            data={"dedup": "near", "decontaminate": {"paths": [str(evaluation)]}},
        )
        monkeypatch.setattr(corpus_module.cut_into_slices, "__kwdefaults__", {"slice_bytes": slice_bytes})
        manifest, run_dir = prepare(recipe)
        index, plan = ExampleIndex.load(run_dir.store / "index.parquet"), StepPlan.load(run_dir.plan)
        found.append((index.example_id.tolist(), plan.digest, rejects_of(run_dir), manifest.dropped_by_reason))
        counts = manifest.counts
        assert counts["records"] == 46 == counts["examples"] + sum(manifest.dropped_by_reason.values())
        assert counts["planned"] + counts["heldout"] == counts["examples"] == len(index) == 41
        assert (counts["evaluation_texts"], counts["evaluation_texts_too_short"]) == (2, 1)
    assert found[0] == found[1]
    ids, _, rejects, dropped = found[0]
    assert dropped == {"contaminated": 1, "duplicate": 3, "near_duplicate": 1}
    assert ids == [f"a{i}" for i in range(30)] + [f"b{i}" for i in (*range(10), 12)]
    assert [(reject["file"], reject["line"], reject["reason"], reject.get("kept")) for reject in rejects] == [
        (str(first), 31, "duplicate", "a3"),
        (str(first), 32, "contaminated", None),
        (str(second), 11, "duplicate", "a5"),
        (str(second), 12, "near_duplicate", "a7"),
        (str(second), 14, "duplicate", "a7"),
    ]
    assert rejects[1]["detail"].endswith(": " + " ".join(QUESTION.split()[:13]))
    assert rejects[2]["detail"] == f"the text of a5 ({first}, line 6), which is kept"


@pytest.mark.slow
def test_one_worker_drops_the_same_and_writes_the_same_bytes(tiny_model_dir: Path, tmp_path: Path) -> None:
    first, second, evaluation = write_repetitive(tmp_path)
    written = []
    for name in ("four", "one"):
        (tmp_path / name).mkdir()
        recipe = write_recipe(
            tmp_path / name,
            tiny_model_dir,
            corpus={"paths": [str(first), str(second)], "max_bad_fraction": 0.0},
            data={"dedup": "near", "decontaminate": {"paths": [str(evaluation)]}},
        )
        if name == "one":  # a Ray of its own
            command = [sys.executable, "-m", "longalign_ray.cli", "prepare", str(recipe), "ray.num_cpus=1"]
            subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": os.getcwd()}, timeout=300)
            run_dir = stages.open_run(recipe, ["ray.num_cpus=1"])[1]
        else:
            run_dir = prepare(recipe)[1]
        files = [path for kind in (run_dir.store, run_dir.packed) for path in kind.iterdir()]
        written.append({path.name: path.read_bytes() for path in files if path.suffix in (".arrow", ".parquet")})
        rejects = [(reject["line"], reject["reason"], reject.get("kept")) for reject in rejects_of(run_dir)]
        assert rejects[3:] == [(12, "near_duplicate", "a7"), (14, "duplicate", "a7")]
        assert len(rejects) == 5
    assert len(written[0]) > 2
    assert written[0] == written[1]


def test_a_changed_evaluation_set_and_a_bad_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    first, _, evaluation = write_repetitive(tmp_path)
    recipe = write_recipe(
        tmp_path,
        tiny_model_dir,
        corpus={"paths": [str(first)]},
        data={"decontaminate": {"paths": [str(evaluation)]}, "dedup": "exact"},
    )
    assert prepare(recipe)[0].dropped_by_reason == {"contaminated": 1, "duplicate": 1}
    evaluation.write_text(json.dumps(["of no interest"]) + "\n")
    assert prepare(recipe)[0].dropped_by_reason == {"duplicate": 1}
    evaluation.write_text("{broken\n")
    with pytest.raises(CorpusError, match=r"data\.decontaminate\.paths: .*test\.jsonl, record 1"):
        prepare(recipe)
