"""Corpora of every kind through `prepare`: mixed formats and styles, object stores, and files that are broken."""

from __future__ import annotations

import gzip
import json
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from longalign_ray import stages
from longalign_ray.data.corpus import corpus_files, cut_into_slices, read_records
from longalign_ray.data.store import TokenStore
from longalign_ray.errors import CorpusError
from tests.integration.recipes import write_corpus, write_recipe
from tests.mangled import mangled_lines

NUM_EACH = 12


def prepare(recipe: Path, *overrides: str):
    config, run_dir = stages.open_run(recipe, overrides)
    return stages.prepare(config, run_dir), run_dir


def write_mixed(directory: Path) -> list[str]:
    """The same kind of talk in every style, in all formats; the paths as a recipe gives them."""
    directory.mkdir(exist_ok=True)
    ask, say = [f"How much is {i} + {i}?" for i in range(NUM_EACH)], [f"It is {2 * i}." for i in range(NUM_EACH)]
    pairs = list(zip(ask, say, strict=True))
    chats = [
        {"id": f"chat-{i}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(pairs)
    ]
    shared = [{"conversations": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs]
    alpaca = [{"instruction": "Add.", "input": q, "output": a} for q, a in pairs]
    prompts = [{"prompt": q, "completion": a} for q, a in pairs]
    (directory / "chats.jsonl").write_text("\n".join(map(json.dumps, chats)))
    (directory / "shared.json").write_text(json.dumps(shared, indent=1))
    (directory / "alpaca.json.gz").write_bytes(gzip.compress(json.dumps(alpaca).encode()))
    with pa.CompressedOutputStream(str(directory / "again.jsonl.zst"), "zstd") as stream:
        stream.write("\n".join(map(json.dumps, chats)).encode())
    pq.write_table(pa.Table.from_pylist(prompts), directory / "prompts.parquet", row_group_size=5)
    return [
        f"{directory}/{name}" for name in ("chats.jsonl", "*.json", "alpaca.json.gz", "*.parquet", "again.jsonl.zst")
    ]


def check_mixed(manifest: Any, run_dir: Any) -> None:
    counts = manifest.counts
    assert counts["records"] == counts["examples"] == counts["planned"] + counts["heldout"] == 5 * NUM_EACH
    assert counts["duplicate_ids"] == NUM_EACH
    names = TokenStore(run_dir.store).index.example_id.tolist()
    assert len(set(names)) == 5 * NUM_EACH
    assert {f"chat-{NUM_EACH - 1}", f"chat-{NUM_EACH - 1}#2"} < set(names)
    by_file = Counter(name.rpartition("/")[2].partition(":")[0].partition("-")[0] for name in names)
    assert by_file == {"chat": 2 * NUM_EACH} | dict.fromkeys(
        ("shared.json", "alpaca.json.gz", "prompts.parquet"), NUM_EACH
    )


@pytest.mark.usefixtures("local_ray")
def test_formats_and_styles_are_mixed(tiny_model_dir: Path, tmp_path: Path) -> None:
    paths = write_mixed(tmp_path / "data")
    manifest, run_dir = prepare(write_recipe(tmp_path, tiny_model_dir, corpus={"paths": paths}))
    check_mixed(manifest, run_dir)
    assert not run_dir.rejects.read_text()
    store = TokenStore(run_dir.store)
    for row, name in enumerate(store.index.example_id):  # the examples carry the names of the index
        assert store.example(row).example_id == name


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """Address of a server with the S3 protocol on this machine."""
    pytest.importorskip("moto.server")
    yield from _server([sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "{port}"])


@pytest.fixture(scope="module")
def google_storage() -> Iterator[str]:
    """Address of a server with the protocol of Google Storage on this machine."""
    pytest.importorskip("gcp_storage_emulator")
    start = "from gcp_storage_emulator.server import create_server as c; c('127.0.0.1', {port}, in_memory=True).run()"
    yield from _server([sys.executable, "-c", start])


def _server(command: list[str]) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = [argument.format(port=port) for argument in command]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait_for(port, process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.1)
    raise AssertionError("the server does not answer")


def s3_bucket(endpoint: str, bucket: str) -> fs.S3FileSystem:
    system = fs.S3FileSystem(endpoint_override=endpoint, scheme="http", region="us-east-1", allow_bucket_creation=True)
    system.create_dir(bucket)
    return system


def google_bucket(endpoint: str, bucket: str) -> fs.GcsFileSystem:
    host = endpoint.removeprefix("http://")
    system = fs.GcsFileSystem(anonymous=True, endpoint_override=host, scheme="http", project_id="test")
    system.create_dir(bucket)
    return system


def upload(system: fs.FileSystem, directory: Path, prefix: str) -> None:
    for path in directory.iterdir():
        with system.open_output_stream(f"{prefix}/{path.name}", compression=None) as stream:
            stream.write(path.read_bytes())


@pytest.mark.usefixtures("local_ray")
def test_a_corpus_in_s3_is_the_corpus_on_disk(tiny_model_dir: Path, tmp_path: Path, s3: str) -> None:
    paths = write_mixed(tmp_path / "data")
    upload(s3_bucket(s3, "mixed"), tmp_path / "data", "mixed/data")
    in_s3 = [path.replace(str(tmp_path), "s3://mixed") for path in paths]
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": in_s3, "storage_endpoint": s3})
    manifest, run_dir = prepare(recipe)
    check_mixed(manifest, run_dir)
    local, local_dir = prepare(recipe, f"corpus.paths={json.dumps(paths)}", f"run_dir={tmp_path / 'local'}")
    for count in ("records", "examples", "tokens", "targets", "duplicate_ids"):
        assert local.counts[count] == manifest.counts[count]
    one, two = TokenStore(run_dir.store), TokenStore(local_dir.store)
    for row in range(len(one.index)):
        assert one.example(row).input_ids.tolist() == two.example(row).input_ids.tolist()
        assert one.index.example_id[row].replace("s3://mixed", str(tmp_path)) == two.index.example_id[row]


@pytest.mark.usefixtures("local_ray")
def test_a_changed_object_is_prepared_anew(tiny_model_dir: Path, tmp_path: Path, s3: str) -> None:
    system = s3_bucket(s3, "changing")
    (tmp_path / "up").mkdir()
    recipe = write_recipe(
        tmp_path, tiny_model_dir, corpus={"paths": ["s3://changing/x/**/*.jsonl"], "storage_endpoint": s3}
    )
    counts = []
    for number in (20, 20, 21):
        if not counts or number != 20:
            write_corpus(tmp_path / "up" / "a.jsonl", number)
            upload(system, tmp_path / "up", "changing/x/deep")
        manifest, run_dir = prepare(recipe)
        counts.append((manifest.counts["examples"], run_dir.plan.stat().st_mtime_ns))
    assert [examples for examples, _ in counts] == [20, 20, 21]
    assert counts[0] == counts[1]


def read_numbers(pattern: str, endpoint: str, *, slice_bytes: int) -> list[int]:
    files = corpus_files([pattern], endpoint=endpoint)
    slices = [part for file in files for part in cut_into_slices(file, slice_bytes=slice_bytes)]
    assert len(slices) > 5
    return [number for part in slices for number, _ in read_records(part)]


def test_objects_are_cut_into_slices_and_problems_named(tmp_path: Path, s3: str) -> None:
    system = s3_bucket(s3, "cut")
    (tmp_path / "up").mkdir()
    write_corpus(tmp_path / "up" / "a.jsonl", 200)
    upload(system, tmp_path / "up", "cut/up")
    assert read_numbers("s3://cut/up/*.jsonl", s3, slice_bytes=5_000) == list(range(1, 201))
    for pattern, problem in [
        ("s3://cut/up/b.jsonl", "does not exist"),
        ("s3://cut/up/*.parquet", "matches no file"),
        ("s3://cut/none/**/*.jsonl", "matches no file"),
        ("s3://cut/up", "is a directory"),
        ("s3://nobucket/a.jsonl", "does not exist"),
    ]:
        with pytest.raises(CorpusError, match=problem):
            corpus_files([pattern], endpoint=s3)


def test_an_object_store_that_does_not_answer_is_named() -> None:
    with pytest.raises(CorpusError, match=r"s3://cut/a\.jsonl cannot be read.*corpus\.storage_endpoint"):
        corpus_files(["s3://cut/a.jsonl"], endpoint="http://127.0.0.1:9")


def test_the_environment_names_the_object_store(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    upload(s3_bucket(s3, "named"), tmp_path, "named")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3)
    assert [file.path for file in corpus_files(["s3://named/*.jsonl"])] == ["s3://named/a.jsonl"]


def test_google_storage_is_read(google_storage: str, tmp_path: Path) -> None:
    system = google_bucket(google_storage, "cut")
    (tmp_path / "up").mkdir()
    write_corpus(tmp_path / "up" / "a.jsonl", 200)
    upload(system, tmp_path / "up", "cut/up")
    assert read_numbers("gs://cut/up/*.jsonl", google_storage, slice_bytes=5_000) == list(range(1, 201))
    with pytest.raises(CorpusError, match="does not exist"):
        corpus_files(["gs://cut/up/b.jsonl"], endpoint=google_storage)


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("name", ["cut.jsonl.gz", "cut.parquet", "cut.json"])
def test_a_broken_file_stops_prepare_and_the_rest_is_kept(tiny_model_dir: Path, tmp_path: Path, name: str) -> None:
    good = write_corpus(tmp_path / "good.jsonl", 30)
    talks = [json.loads(line) for line in good.read_text().splitlines()]
    whole = tmp_path / name
    if name.endswith("parquet"):
        pq.write_table(pa.Table.from_pylist(talks), whole)
    else:
        text = json.dumps(talks) if name.endswith("json") else good.read_text()
        whole.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    whole_bytes = whole.read_bytes()
    whole.write_bytes(whole_bytes[:-20])
    worse = tmp_path / "worse.parquet"
    worse.write_bytes(b"PAR1 and no more")
    sources = {"a": {"paths": [str(worse), str(good)]}, "b": {"paths": [str(whole)]}}
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"sources": sources})
    with pytest.raises(CorpusError) as caught:
        prepare(recipe)
    message = str(caught.value)
    for setting, path in (("corpus.sources.a.paths", worse), ("corpus.sources.b.paths", whole)):
        assert f"{setting}: {path} cannot be read" in message
    assert message.count("copy it again whole, or leave it out") == 2
    assert len(message) < 900
    assert "Traceback" not in message
    done = {path: path.stat().st_mtime_ns for path in (tmp_path / "run/prepare/store").glob("part-*")}
    assert len(done) == 3
    # One is copied again, the other left out, and a setting is changed that touches no token.
    whole.write_bytes(whole_bytes)
    mended = f"corpus.sources={json.dumps(sources | {'a': {'paths': [str(good)]}})}"
    manifest, run_dir = prepare(recipe, mended, "data.heldout_fraction=0.2")
    assert manifest.counts["examples"] == 60
    assert {path: path.stat().st_mtime_ns for path in done} == done
    store = TokenStore(run_dir.store)
    assert [store.index.source[row] for row in (0, 29, 30, 59)] == ["a", "a", "b", "b"]
    assert store.index.example_id[[0, 30]].tolist() == ["talk-0", "talk-0#2"]
    assert [store.example(row).length for row in range(60)] == store.index.length.tolist()
    assert len(list(run_dir.store.glob("part-*"))) == 6


@pytest.mark.usefixtures("local_ray")
def test_ten_thousand_mangled_records_are_kept_or_counted(tiny_model_dir: Path, tmp_path: Path) -> None:
    lines = list(mangled_lines(10_000, seed=5))
    lines[77] = b'{"text": "' + b"x" * 50_000_000 + b'"}'
    path = tmp_path / "mangled.jsonl"
    path.write_bytes(b"\n".join(lines))
    corpus = {"paths": [str(path)], "max_bad_fraction": 1.0}
    manifest, run_dir = prepare(write_recipe(tmp_path, tiny_model_dir, corpus=corpus))
    rejects = [json.loads(line) for line in run_dir.rejects.read_text(encoding="utf-8").splitlines()]
    counts = manifest.counts
    assert counts["records"] == sum(bool(line.strip()) for line in lines) == counts["examples"] + len(rejects)
    assert Counter(reject["reason"] for reject in rejects) == manifest.dropped_by_reason
    assert counts["examples"] > 1_000
    assert [reject["line"] for reject in rejects if reject["reason"] == "record_too_large"] == [78]
    assert {reject["file"] for reject in rejects} == {str(path)}
    assert max(len(reject["detail"]) for reject in rejects) <= 300
    names = TokenStore(run_dir.store).index.example_id
    assert len(set(names)) == len(names)
    assert counts["duplicate_ids"] > 100


TOOL_TEMPLATE = """
{%- if tools %}<|im_start|>system
{{ tools | tojson }}<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<call>{{ call.function | tojson }}</call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.mark.usefixtures("local_ray")
def test_real_conversations_are_prepared(tiny_model_dir: Path, tmp_path: Path, shared_data: Path) -> None:
    paths = [
        str(shared_data / "chat" / f"{name}.jsonl") for name in ("glaive_toolcall_*", "v1_sft_demo", "dpo_zh_demo")
    ]
    (tmp_path / "tools.jinja").write_text(TOOL_TEMPLATE)
    recipe = write_recipe(tmp_path, tiny_model_dir, corpus={"paths": paths}, data={"max_length": 1024})
    manifest, _ = prepare(recipe, f"model.chat_template={tmp_path / 'tools.jinja'}")
    assert manifest.counts["records"] == 244 + 234 + 449 + 262
    assert manifest.dropped_by_reason == {"too_long": 612}
    assert (manifest.counts["examples"], manifest.counts["targets"]) == (577, 145_443)
