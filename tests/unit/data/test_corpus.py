from __future__ import annotations

import dataclasses
import gzip
import json
import os
import random
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longalign_ray.data import record_readers
from longalign_ray.data.conversation import RecordError
from longalign_ray.data.corpus import CorpusSlice, corpus_files, cut_into_slices, read_records
from longalign_ray.errors import CorpusError


def read_all(*patterns: object, **settings: Any) -> list[tuple[int, Any]]:
    slices = [part for file in corpus_files([str(p) for p in patterns]) for part in cut_into_slices(file, **settings)]
    return [numbered for part in slices for numbered in read_records(part)]


def records(number: int) -> list[dict[str, Any]]:
    source = random.Random(1)
    return [
        {"id": f"r{i}", "text": "".join(source.choices('ab "\\,{}[]\n😀龙', k=source.randint(0, 90)))}
        for i in range(number)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in the format and compression that the name asks for; gzip in two members, as parallel writers do."""
    kind, compression = path.name.split(".")[1], path.name.split(".")[2:]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    plain = path.read_bytes()
    if compression == ["gz"]:
        path.write_bytes(gzip.compress(plain[:100]) + gzip.compress(plain[100:]))
    elif compression == ["zst"]:
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(plain)
    return path


FORMATS = [f"a.{kind}{end}" for kind in ("jsonl", "ndjson", "json", "parquet") for end in ("", ".gz", ".zst")]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_every_record_with_its_number(tmp_path: Path, name: str) -> None:
    rows = records(40)
    path = write(tmp_path / name, rows)
    assert read_all(path, slice_bytes=500) == list(enumerate(rows, 1))
    slices = cut_into_slices(corpus_files([str(path)])[0], slice_bytes=500)
    assert (len(slices) > 1) == (name in ("a.jsonl", "a.ndjson", "a.parquet"))


@pytest.mark.parametrize("slice_bytes", [1, 7, 64, 10_000])
@pytest.mark.parametrize("ending", ["\n", ""])
def test_slices_hold_every_line_once_with_its_number(
    tmp_path: Path, slice_bytes: int, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record_readers, "CHUNK_BYTES", 5)
    lines = [json.dumps(f"line {i} " + "x" * (i % 13)) for i in range(1, 60)]
    lines[10] = " "  # line 11 is blank and is not given
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines) + ending)
    slices = cut_into_slices(corpus_files([str(path)])[0], slice_bytes=slice_bytes)
    assert [part.start for part in slices[1:]] == [part.end for part in slices[:-1]]
    read = [numbered for part in slices for numbered in read_records(part)]
    assert read == [(number, json.loads(line)) for number, line in enumerate(lines, 1) if line.strip()]


@pytest.mark.parametrize("name", FORMATS)
def test_an_empty_file_has_no_records(tmp_path: Path, name: str) -> None:
    assert read_all(write(tmp_path / name, [])) == []
    (tmp_path / name).write_bytes(b"")
    if "parquet" in name:
        with pytest.raises(CorpusError, match=f"{name} cannot be read.*leave it out"):
            read_all(tmp_path / name)
    else:
        assert read_all(tmp_path / name) == []


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_a_json_file_may_hold_lines(tmp_path: Path, name: str) -> None:
    rows = records(20)
    text = "\ufeff" + "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    assert read_all(tmp_path / name, slice_bytes=300) == list(enumerate(rows, 1))


@pytest.mark.parametrize("chunk", [1, 2, 3, 1 << 20])
def test_a_json_array_is_read_through_a_window(tmp_path: Path, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record_readers, "CHUNK_BYTES", chunk)
    values = [1, 12345, -1.5e10, "a,]", [], {}, None, True, {"a": [1, {"b": '\\"'}]}, "龙😀", *records(5)]
    for text in (json.dumps(values), json.dumps(values, indent=2, ensure_ascii=False), f" \n{json.dumps(values)}\n "):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert [value for _, value in read_all(tmp_path / "a.json")] == values


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('[{"a": 1}, {"a": 2', "beyond record 1.*element 2 is not valid JSON"),
        ("[1 2]", "beyond record 1.*no ',' after element 1"),
        ("[1,]", "beyond record 1.*element 2"),
        ("[1", "cannot be read"),
        ("[1] x", "beyond record 1.*'x' after the array's end"),
        ("[" * 100_000, "element 1 is nested too deeply"),
    ],
)
def test_a_broken_json_array_stops_with_its_place(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CorpusError, match=rf"a\.json cannot be read.*{problem}|{problem}"):
        read_all(tmp_path / "a.json")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("a.jsonl", "a.ndjson")])
def test_a_file_cut_short_is_named(tmp_path: Path, name: str) -> None:
    whole = write(tmp_path / name, records(40)).read_bytes()
    for length in (len(whole) - 1, len(whole) // 2, 1):
        (tmp_path / name).write_bytes(whole[:length])
        with pytest.raises(CorpusError, match=rf"{name} cannot be read.*copy it again whole, or leave it out"):
            read_all(tmp_path / name)


def test_a_jsonl_file_cut_short_loses_one_record_and_says_which(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(9))
    path.write_bytes(path.read_bytes()[:-10])
    *whole, (number, last) = read_all(path)
    assert len(whole) == 8
    assert isinstance(last, RecordError)
    assert (number, last.reason) == (9, "broken_json")


def test_a_damaged_parquet_page_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [{"text": str(random.Random(i).random()) * 50} for i in range(500)]
    pq.write_table(pa.Table.from_pylist(rows), path, compression="zstd", use_dictionary=False)
    damaged = bytearray(path.read_bytes())
    damaged[100:3_000] = b"\0" * 2_900
    path.write_bytes(damaged)
    with pytest.raises(CorpusError, match=r"a\.parquet cannot be read"):
        read_all(path)


def test_parquet_rows_with_nulls_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"fine", b"\xff\xfe", None]).buffers())
    pq.write_table(pa.table({"text": texts, "irrelevant": [1, 2, 3]}), tmp_path / "a.parquet")
    (_, first), (number, second), (_, third) = read_all(tmp_path / "a.parquet")
    assert (first, third) == ({"text": "fine"}, {"text": None})  # of the columns only those that mean something
    assert (number, second.reason) == (2, "not_utf8")
    pq.write_table(pa.table({"other": [1]}), tmp_path / "b.parquet")
    assert read_all(tmp_path / "b.parquet") == [(1, {"other": 1})]


def test_a_line_above_the_limit_is_counted_and_never_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.jsonl"
    with path.open("w") as file:
        file.write('"before"\n"')
        for _ in range(50):
            file.write("x" * 1_000_000)
        file.write('"\n"after"\n')
    gzip_path = tmp_path / "b.jsonl.gz"
    gzip_path.write_bytes(gzip.compress(path.read_bytes(), compresslevel=1))
    monkeypatch.setattr(record_readers, "MAX_RECORD_BYTES", 1 << 20)
    for file in (path, gzip_path):
        tracemalloc.start()
        (_, before), (number, error), (_, after) = read_all(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert (before, after) == ("before", "after")
        assert (number, error.reason) == (2, "record_too_large")
        assert "50,000,002 bytes" in str(error)
        assert peak < 20e6


@pytest.mark.parametrize("of_hub", [False, True])
def test_a_row_above_the_limit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_hub: bool) -> None:
    """The limit is of a row, however large the 64 are that are decoded together; 350 letters have 700 bytes."""
    monkeypatch.setattr(record_readers, "MAX_RECORD_BYTES", 500)
    rows = [{"text": text} for text in ("a" * 400, "é" * 350, "b" * 400)]
    path = write(tmp_path / ("a.jsonl" if of_hub else "a.parquet"), rows)
    if of_hub:
        pytest.importorskip("datasets")
    (_, before), (number, error), (_, after) = read_all(f"hf://{tmp_path}" if of_hub else path)
    assert (before, after) == (rows[0], rows[2])
    assert (number, error.reason) == (2, "record_too_large")
    assert str(error).startswith("7")  # 700 and what Arrow keeps beside the text


@pytest.mark.parametrize("name", ["a.json", "a.json.gz", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str) -> None:
    def peak(number: int) -> int:
        path = write(tmp_path / name, [{"text": f"{i} " + "x" * 20_000} for i in range(number)])
        if name == "a.parquet":
            pq.write_table(pq.read_table(path), path, row_group_size=number, use_dictionary=False, compression="none")
        parts = [part for file in corpus_files([str(path)]) for part in cut_into_slices(file)]
        tracemalloc.start()
        arrow_before, arrow = pa.total_allocated_bytes(), 0
        for part in parts:
            for _ in read_records(part):
                arrow = max(arrow, pa.total_allocated_bytes() - arrow_before)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size + arrow

    assert peak(2_000) < 1.5 * peak(200) + 1e6  # 40 MB of text against 4


def test_patterns_are_sorted_and_every_problem_named(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl.gz", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "gone.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    found = corpus_files([f"{tmp_path}/[ab].jsonl", f"{tmp_path}/**/*.gz"])
    assert [Path(file.path).name for file in found] == ["a.jsonl", "b.jsonl", "c.jsonl.gz"]
    patterns = ["d.jsonl", "*.json", "", "*", "notes.txt"]
    with pytest.raises(CorpusError) as caught:
        corpus_files([f"{tmp_path}/{pattern}" for pattern in patterns])
    message = str(caught.value)
    for problem in (
        "d.jsonl does not exist",
        "*.json matches no file",
        "/ is a directory; give files or a pattern",
        "/sub is a directory",
        "gone.jsonl is a link to nothing",
        "notes.txt has none of the known endings (.jsonl, .ndjson, .json, .parquet, each also with .gz or .zst)",
    ):
        assert problem in message


def test_a_name_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).touch()
    with pytest.raises(CorpusError, match=r"caf\\udce9\.jsonl has a name that is not UTF-8; rename it"):
        corpus_files([f"{tmp_path}/*.jsonl"])


def test_only_the_first_problems_are_listed(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="and 5 more"):
        corpus_files([f"{tmp_path}/{number}.jsonl" for number in range(15)])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch(mode=0)
    with pytest.raises(CorpusError, match=r"a\.jsonl cannot be read \(no permission\)"):
        corpus_files([f"{tmp_path}/*.jsonl"])


def test_a_file_that_goes_away_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(3))
    (part,) = cut_into_slices(corpus_files([str(path)])[0])
    path.unlink()
    with pytest.raises(CorpusError, match=r"a\.jsonl cannot be read"):
        list(read_records(part))


def test_a_changed_file_has_another_state(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", records(3))
    (before,) = corpus_files([str(path)])
    os.utime(path, ns=(1, 1))
    (touched,) = corpus_files([str(path)])
    assert before.state != touched.state == (str(path), path.stat().st_size, "1")


def test_any_file_system_of_fsspec_is_read(tmp_path: Path) -> None:
    import fsspec

    rows = records(30)
    for name in ("a.jsonl", "b.json.gz", "c.parquet"):
        with fsspec.open(f"memory://corpus/x/{name}", "wb") as file:
            file.write(write(tmp_path / name, rows).read_bytes())  # type: ignore[union-attr]
    numbered = list(enumerate(rows, 1))
    assert read_all("memory://corpus/x/a.jsonl", slice_bytes=300) == numbered
    assert read_all("memory://corpus/**/*.*", slice_bytes=300) == 3 * numbered
    with pytest.raises(CorpusError, match="matches no file"):
        corpus_files(["memory://corpus/x/*.zst"])
    with pytest.raises(CorpusError, match="is a directory"):
        corpus_files(["memory://corpus/x"])
    with pytest.raises(CorpusError, match=r"x/gone\.jsonl does not exist"):
        corpus_files(["memory://corpus/x/gone.jsonl"])
    with pytest.raises(CorpusError, match=r"nosuch://a\.jsonl cannot be read"):
        corpus_files(["nosuch://a.jsonl"])


@pytest.fixture
def hub_dataset(tmp_path: Path) -> Path:
    """A directory in the layout of a data set of the hub, which `datasets` loads like one."""
    pytest.importorskip("datasets")
    for shard in range(3):
        write(tmp_path / f"train-{shard}.jsonl", [{"text": f"{shard} {i}"} for i in range(4)])
    write(tmp_path / "test-0.jsonl", [{"text": "test"}])
    return tmp_path


def test_a_hub_data_set_is_read_shard_by_shard(hub_dataset: Path) -> None:
    read = read_all(f"hf://{hub_dataset}")
    assert sorted(record["text"] for _, record in read) == [f"{shard} {i}" for shard in range(3) for i in range(4)]
    assert sorted(number for number, _ in read) == list(range(1, 13))
    assert read_all(f"hf://{hub_dataset}?split=test") == [(1, {"text": "test"})]
    before = corpus_files([f"hf://{hub_dataset}"])
    os.utime(hub_dataset / "train-1.jsonl", ns=(1, 1))
    assert corpus_files([f"hf://{hub_dataset}"]) != before
    with pytest.raises(CorpusError, match="the argument 'subset'; known: name, split"):
        read_all(f"hf://{hub_dataset}?subset=a")
    with pytest.raises(CorpusError, match="neither a file here nor a data set"):
        read_all(f"hf://{hub_dataset}?split=validation")


def test_a_hub_data_set_is_read_at_the_commit_it_was_found_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a hub that has one data set, at one commit and then at another."""
    pytest.importorskip("datasets")
    commits, loaded = ["a" * 40, "b" * 40], []

    def dataset_info(_: Any, path: str, *, revision: str | None, timeout: float) -> Any:
        if path != "org/name":
            raise ConnectionError("no network")
        return SimpleNamespace(sha=commits.pop(0))

    def load_dataset(path: str, **arguments: Any) -> Any:
        loaded.append((path, arguments["revision"]))
        return SimpleNamespace(num_shards=1, shard=lambda **_: [{"text": "t"}])

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    states = []
    for commit in list(commits):
        (file,) = corpus_files(["org/name"])
        (part,) = cut_into_slices(file)
        assert list(read_records(part)) == [(1, {"text": "t"})]
        assert loaded == [("org/name", commit)] * 2
        loaded.clear()
        states.append(file.state)
    assert states[0] != states[1]
    pinned = f"hf://org/name?revision={'c' * 40}"  # nothing to ask
    assert [file.version for file in corpus_files([pinned, "hf://org/gone"])] == ["c" * 40, ""]


def test_without_datasets_a_hub_id_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match=r"org/name is no file here.*pip install 'longalign_ray\[hub\]'"):
        read_all("org/name")


def test_slices_travel_as_plain_values(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json.gz", records(3))
    (part,) = cut_into_slices(corpus_files([str(path)])[0])
    again = CorpusSlice(**json.loads(json.dumps(dataclasses.asdict(part))))
    assert again == part
    assert len(list(read_records(again))) == 3
