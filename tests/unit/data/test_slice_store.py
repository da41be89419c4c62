"""One slice to its files: every record is counted, and what is done is not done again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from longalign_ray.config import DataConfig
from longalign_ray.data import slice_store
from longalign_ray.data.packed import write_packed_slice
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.slice_store import EVALUATION_FILE, index_file, summary_file, tokenise_slice, tokens_file
from longalign_ray.data.store import BatchFile
from tests.unit.data.test_store import plan_for, random_examples, write_store


def settings_of(store: Path, model_dir: Path, **data: Any) -> dict[str, Any]:
    store.mkdir(exist_ok=True)
    np.save(store / EVALUATION_FILE, np.empty(0, np.uint64))
    return {
        "data": DataConfig(**data).model_dump(),
        "role_order": "any",
        "model_dir": str(model_dir),
        "chat_template": None,
        "tokenising": "",
        "store": str(store),
    }


def item_of(path: Path, name: str = "part-a") -> dict[str, Any]:
    part = {"path": str(path), "start": 0, "end": path.stat().st_size, "first_line": 1, "format": "jsonl"}
    return {"name": name, "setting": "corpus.paths", "style": "auto", "compression": None, "endpoint": None, **part}


def test_records_are_kept_cut_or_rejected_and_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    def talk(name: str, question: str) -> dict[str, Any]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": "a" * 60}]
        return {"id": name, "messages": turns}

    records = [talk("short", "q"), talk("cut", "q" * 40), {"text": "t" * 230}, {"id": "x"}, talk("gone", "q" * 200)]
    corpus, store = tmp_path / "corpus.jsonl", tmp_path / "store"
    corpus.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    settings = settings_of(store, tiny_model_dir, max_length=100, too_long="cut_right")
    assert tokenise_slice(item_of(corpus), settings) == {"name": "part-a", "problem": ""}

    summary = json.loads(summary_file(store, "part-a").read_text(encoding="utf-8"))
    index = pq.read_table(index_file(store, "part-a")).to_pydict()
    file = BatchFile(tokens_file(store, "part-a"))
    whole = 40 + 60 + (index["length"][0] - 61)  # what the short one has beside its 1 + 60 letters
    assert index["length"] == [index["length"][0], 100, 100, 100, 31]
    assert summary["counts"] == {
        "records": 5, "examples": 5, "cut_examples": 1, "cut_answers": 1, "cut_tokens": whole - 100, "text_pieces": 3
    }  # fmt: skip
    assert [(reject["line"], reject["reason"]) for reject in summary["rejects"]][1:] == [(5, "no_target_left")]
    assert summary["rejects"][0]["line"] == 4
    assert index["line"] == [1, 2, 3, 3, 3]
    assert index["row"] == list(range(5))
    examples = [file.example(row) for row in range(5)]
    assert [example.example_id for example in examples] == index["example_id"]
    assert [example.num_targets for example in examples] == index["num_targets"]
    assert [example.sum_weights for example in examples] == index["sum_weights"]


def test_index_rows_are_written_some_at_a_time(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("\n".join(json.dumps({"text": "x" * (n + 1)}) for n in range(7)), encoding="utf-8")
    tables = []
    for name, rows in (("part-a", 1 << 16), ("part-b", 3)):
        monkeypatch.setattr(slice_store, "INDEX_ROWS", rows)
        tokenise_slice(item_of(corpus, name), settings_of(tmp_path / "store", tiny_model_dir))
        with pq.ParquetFile(index_file(tmp_path / "store", name)) as file:
            assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == (
                [7] if name == "part-a" else [3, 3, 1]
            )
            tables.append(file.read())
    assert tables[0].equals(tables[1])
    assert tables[0]["row"].to_pylist() == list(range(7))


def test_a_slice_that_is_done_is_not_read_again(tiny_model_dir: Path, tmp_path: Path) -> None:
    corpus, settings = tmp_path / "corpus.jsonl", settings_of(tmp_path / "store", tiny_model_dir)
    corpus.write_text(json.dumps({"text": "some text"}), encoding="utf-8")
    item = item_of(corpus)
    tokenise_slice(dict(item), settings)
    corpus.unlink()
    assert tokenise_slice(dict(item), settings)["problem"] == ""
    summary_file(tmp_path / "store", "part-a").unlink()
    assert tokenise_slice(dict(item), settings)["problem"].startswith(f"corpus.paths: {corpus} cannot be read")


def test_a_worker_that_outlives_a_chat_template_reads_it_anew(tiny_model_dir: Path, tmp_path: Path) -> None:
    corpus, template = tmp_path / "corpus.jsonl", tmp_path / "own.jinja"
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    corpus.write_text(json.dumps({"messages": turns}), encoding="utf-8")
    settings = settings_of(tmp_path / "store", tiny_model_dir) | {"chat_template": str(template)}
    lengths = []
    for cue in ("A", "AAAA"):
        text = "{% for m in messages %}{{ '" + cue + "' + m.content }}<|im_end|>{% endfor %}"
        template.write_text(text, encoding="utf-8")
        assert tokenise_slice(item_of(corpus, f"part-{cue}"), settings | {"tokenising": cue})["problem"] == ""
        lengths += pq.read_table(index_file(tmp_path / "store", f"part-{cue}"))["length"].to_pylist()
    assert lengths[1] - lengths[0] == 2 * 3


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, where every write fails")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the disk full for files whose name ends so."""

    def fill(ending: str) -> None:
        def temporary(path: Path) -> Path:
            made = path.with_name(f"{path.name}.x.tmp")
            if path.name.endswith(ending):
                made.symlink_to("/dev/full")
            return made

        monkeypatch.setattr("longalign_ray.run_dir._temporary", temporary)

    return fill


@FULL
@pytest.mark.parametrize("ending", [".arrow", ".parquet", ".json"])
def test_a_full_disk_is_named_and_the_slice_is_not_done(
    tiny_model_dir: Path, tmp_path: Path, full_disk: Callable[[str], None], ending: str
) -> None:
    corpus, settings = tmp_path / "corpus.jsonl", settings_of(tmp_path / "store", tiny_model_dir)
    corpus.write_text(json.dumps({"text": "some text"}), encoding="utf-8")
    full_disk(ending)
    problem = tokenise_slice(item_of(corpus), settings)["problem"]
    assert problem.startswith(f"{tmp_path / 'store'} cannot be written; is there space left? ")
    assert not summary_file(tmp_path / "store", "part-a").exists()
    assert not list((tmp_path / "store").glob("*.tmp"))
    full_disk("nothing")
    assert tokenise_slice(item_of(corpus), settings)["problem"] == ""


@FULL
def test_a_full_disk_under_packed_blocks_is_named(tmp_path: Path, full_disk: Callable[[str], None]) -> None:
    store = write_store(tmp_path / "store", [random_examples(20)])
    plan_for(store, world_size=2).save(tmp_path / "plan.npz")
    names = {"store": str(store.directory), "plan": str(tmp_path / "plan.npz"), "packed": str(tmp_path / "packed")}
    (tmp_path / "packed").mkdir()
    full_disk(".arrow")
    problem = write_packed_slice({"number": 0}, {**names, "steps_per_file": 1, "layout": "x"})["problem"]
    assert problem.startswith(f"{tmp_path / 'packed'} cannot be written; is there space left? ")
    assert not list((tmp_path / "packed").iterdir())


def test_a_process_reads_store_and_plan_once_for_all_packed_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = write_store(tmp_path / "store", [random_examples(20)])
    plan_for(store, world_size=2).save(tmp_path / "plan.npz")
    names = {"store": str(store.directory), "plan": str(tmp_path / "plan.npz"), "packed": str(tmp_path / "packed")}
    loads: list[Path] = []
    load = StepPlan.load
    monkeypatch.setattr(StepPlan, "load", staticmethod(lambda path: loads.append(path) or load(path)))
    for number, layout in ((0, "one"), (1, "one"), (2, "two")):  # the second is another plan at the same place
        settings = {**names, "steps_per_file": 1, "layout": layout}
        assert write_packed_slice({"number": number}, settings)["problem"] == ""
    assert len(loads) == 2
    assert len(list((tmp_path / "packed").iterdir())) == 3
