"""`prepare` on Ray Data: everything kept, cut and rejected is counted, and nothing is lost."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from longalign_ray import stages
from longalign_ray.data.packed import PackReader
from longalign_ray.data.plan import StepPlan
from longalign_ray.data.store import TokenStore
from longalign_ray.data.template import load_tokenizer
from longalign_ray.errors import CorpusError, ModelError
from longalign_ray.run_dir import RunDir
from tests.integration.recipes import write_corpus, write_recipe

pytestmark = pytest.mark.usefixtures("local_ray")


def prepare(recipe: Path, *overrides: str):
    config, run_dir = stages.open_run(recipe, overrides)
    return stages.prepare(config, run_dir), run_dir


def test_bad_records_are_rejected_with_file_line_and_reason(tiny_model_dir: Path, tmp_path: Path) -> None:
    good = write_corpus(tmp_path / "good.jsonl", 60)
    bad = tmp_path / "bad.jsonl"
    talk = json.loads(good.read_text().splitlines()[0])
    lines = [
        json.dumps(talk),
        "{broken",
        "",
        json.dumps({"messages": [{"role": "alien", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": " "}]}),
        json.dumps({"messages": [{"role": "user", "content": "x" * 1200}, {"role": "assistant", "content": "y"}]}),
    ]
    bad.write_text("\n".join(lines))
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": [str(good), str(bad)]})
    manifest, run_dir = prepare(recipe)
    rejects = [json.loads(line) for line in run_dir.rejects.read_text().splitlines()]
    assert [(reject["line"], reject["reason"]) for reject in rejects] == [
        (2, "broken_json"),
        (4, "unknown_role"),
        (5, "empty_assistant_turn"),
        (6, "too_long"),
    ]
    assert {reject["file"] for reject in rejects} == {str(bad)}
    counts, dropped = manifest.counts, manifest.dropped_by_reason
    assert dropped == {"broken_json": 1, "unknown_role": 1, "empty_assistant_turn": 1, "too_long": 1}
    assert counts["records"] == 65 == counts["examples"] + sum(dropped.values())
    assert counts["planned"] + counts["heldout"] == counts["examples"] == 61


def test_every_example_is_in_one_pack_and_decodes_to_its_conversation(tiny_model_dir: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 80)
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": [str(corpus)]})
    _, run_dir = prepare(recipe)
    plan = StepPlan.load(run_dir.plan)
    reader = PackReader(plan, store_dir=run_dir.store, packed_dir=run_dir.packed)
    assert reader.is_sequential
    talks = {talk["id"]: talk["messages"] for talk in map(json.loads, corpus.read_text().splitlines())}
    tokenizer = load_tokenizer(tiny_model_dir)
    seen: list[str] = []
    for slot in np.ndindex(*plan.shape):
        pack = reader.pack(*slot)
        if pack is None:
            continue
        assert len(pack.input_ids) <= 1024
        for name, start, end in zip(pack.example_ids, pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
            targets = tokenizer.decode(pack.input_ids[start:end][pack.loss_weight[start:end] > 0])
            assert targets == "".join(f"{m['content']}<|im_end|>" for m in talks[name] if m["role"] == "assistant")
        seen += pack.example_ids
    index = TokenStore(run_dir.store).index
    assert sorted(seen) == sorted(index.example_id[~index.heldout])
    assert len(set(seen)) == len(seen)
    packs = [reader.pack(*slot) for slot in np.ndindex(*plan.shape)]
    manifest, _ = prepare(recipe, "packing.write_blocks=false")
    assert not run_dir.packed.exists()
    assert manifest.counts["packs"] == sum(pack is not None for pack in packs)
    gathered = PackReader(StepPlan.load(run_dir.plan), store_dir=run_dir.store, packed_dir=run_dir.packed)
    for slot, pack in zip(np.ndindex(*plan.shape), packs, strict=True):
        other = gathered.pack(*slot)
        assert (pack and pack.example_ids) == (other and other.example_ids)
        assert pack is None or pack.loss_weight.tobytes() == other.loss_weight.tobytes()  # pyright: ignore


def test_done_is_skipped_and_a_changed_corpus_is_not(tiny_model_dir: Path, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus.jsonl", 30)
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": [str(corpus)]})
    first, run_dir = prepare(recipe)
    written = run_dir.plan.stat().st_mtime_ns
    prepare(recipe)
    assert run_dir.plan.stat().st_mtime_ns == written
    write_corpus(corpus, 31)
    again, _ = prepare(recipe)
    assert (first.counts["examples"], again.counts["examples"]) == (30, 31)


def test_the_store_is_the_same_whatever_the_slices(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longalign_ray.data import corpus as corpus_module

    corpus = write_corpus(tmp_path / "corpus.jsonl", 50)
    stores = []
    for name, slice_bytes in [("one", 1 << 20), ("many", 2_000)]:
        (tmp_path / name).mkdir()
        monkeypatch.setattr(corpus_module.cut_into_slices, "__kwdefaults__", {"slice_bytes": slice_bytes})
        _, run_dir = prepare(write_recipe(tmp_path / name, tiny_model_dir, corpus={"paths": [str(corpus)]}))
        stores.append(TokenStore(run_dir.store))
    one, many = stores
    assert many.index.file.max() > 3
    assert one.index.example_id.tolist() == many.index.example_id.tolist()
    for row in range(50):
        example, other = one.example(row), many.example(row)
        assert example.input_ids.tolist() == other.input_ids.tolist()
        assert example.loss_weight.tolist() == other.loss_weight.tolist()


def test_an_interrupted_prepare_continues_with_what_is_finished(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it: some slices and packed files are there, others, the index and the manifest are not."""
    from longalign_ray.data import corpus as corpus_module

    monkeypatch.setattr(corpus_module.cut_into_slices, "__kwdefaults__", {"slice_bytes": 2_000})
    corpus = write_corpus(tmp_path / "corpus.jsonl", 60)
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": [str(corpus)]}, packing={"steps_per_file": 1})
    _, run_dir = prepare(recipe)
    digest = StepPlan.load(run_dir.plan).layout_digest
    summaries, packed = sorted(run_dir.store.glob("part-*.json")), sorted(run_dir.packed.glob("part-*.arrow"))
    assert len(summaries) > 4
    assert len(packed) > 2
    lost = [summaries[1], summaries[3], packed[0], run_dir.store / "index.parquet", run_dir.manifest("prepare")]
    for path in lost:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in [*summaries, *packed] if path.exists()}
    prepare(recipe)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert all(path.exists() for path in lost)
    assert StepPlan.load(run_dir.plan).layout_digest == digest


def test_a_killed_prepare_continues_and_one_worker_writes_what_four_write(tiny_model_dir: Path, tmp_path: Path) -> None:
    """SIGKILL in the middle of the slices; the rest on more workers gives the bytes of an undisturbed run."""
    paths = [str(write_corpus(tmp_path / f"part{n}.jsonl", 100, seed=n)) for n in range(10)]
    sections = {"corpus": {"paths": paths}, "packing": {"packs_per_step": 8, "steps_per_file": 5}}
    (tmp_path / "whole").mkdir()
    _, undisturbed = prepare(write_recipe(tmp_path / "whole", tiny_model_dir, **sections))
    recipe = write_recipe(tmp_path, tiny_model_dir, **sections)
    store = RunDir(tmp_path / "run").store
    command = [sys.executable, "-m", "longalign_ray.cli", "prepare", str(recipe), "ray.num_cpus=1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    try:
        while process.poll() is None and len(list(store.glob("part-*.json"))) < 3:
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    time.sleep(2)  # its Ray dies with it
    finished = {path: path.stat().st_mtime_ns for path in store.glob("part-*.json")}
    assert 3 <= len(finished) < len(paths)
    assert not (store / "index.parquet").exists()
    _, run_dir = prepare(recipe)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    for made, expected in ((run_dir.store, undisturbed.store), (run_dir.packed, undisturbed.packed)):
        files = sorted(path.name for pattern in ("*.arrow", "*.parquet") for path in expected.glob(pattern))
        assert len(files) > 3
        for name in files:
            assert (made / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_file_that_cannot_be_written_is_named_and_what_was_done_is_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    paths = [str(write_corpus(tmp_path / f"part{n}.jsonl", 40, seed=n)) for n in range(3)]
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": paths})
    manifest, run_dir = prepare(recipe)
    middle = TokenStore(run_dir.store).index.parts[1]
    for path in [*run_dir.store.glob(f"{Path(middle).stem}.*"), run_dir.manifest("prepare")]:
        path.unlink()
    kept = {path: path.stat().st_mtime_ns for path in run_dir.store.glob("part-*")}
    (run_dir.store / middle).mkdir()  # where the file is to be
    with pytest.raises(CorpusError, match=f"{run_dir.store} cannot be written; is there space left"):
        prepare(recipe)
    (run_dir.store / middle).rmdir()
    assert {path: path.stat().st_mtime_ns for path in run_dir.store.glob("part-*")} == kept
    assert prepare(recipe)[0].counts == manifest.counts


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "the corpus is empty"), ("{broken\n", "1 of 1 records are broken.*line 1"), ("\n\n", "no usable")],
)
def test_a_corpus_without_conversations(tiny_model_dir: Path, tmp_path: Path, text: str, message: str) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(text)
    with pytest.raises(CorpusError, match=message):
        prepare(write_recipe(tmp_path, tiny_model_dir, corpus={"paths": [str(corpus)]}))


def test_missing_file_and_missing_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": [str(tmp_path / "none.jsonl")]})
    with pytest.raises(CorpusError, match=r"none\.jsonl"):
        prepare(recipe)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text((tiny_model_dir / "config.json").read_text())
    corpus = write_corpus(tmp_path / "corpus.jsonl", 3)
    with pytest.raises(ModelError, match="no tokenizer"):
        prepare(recipe, f"corpus.paths=[{corpus}]", f"model.path={tmp_path / 'model'}")
