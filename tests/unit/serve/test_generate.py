"""Answers to a file of requests: its parts, and that each answer is the one that the endpoint gives."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.errors import ServingError
from longalign_ray.serve import part_answerer
from longalign_ray.serve.answer import ServedModel
from longalign_ray.serve.part_answerer import PartAnswerer
from longalign_ray.serve.request_parts import counts_of, open_parts, request_parts
from longalign_ray.serve.transformers_engine import TransformersEngine
from tests.unit.serve.test_api import CONFIG, MESSAGES, client_of

GREEDY: dict[str, Any] = {"messages": MESSAGES, "temperature": 0, "max_tokens": 12}
REQUESTS: list[dict[str, Any]] = [
    GREEDY,
    {**GREEDY, "temperature": 1.5, "seed": 7, "n": 2, "logprobs": True, "top_logprobs": 2},
    {"prompt": "def f", "max_tokens": 6, "temperature": 0, "echo": True, "logprobs": 1},
    {"prompt": ["ab", "cd"], "max_tokens": 5, "temperature": 0, "stop": ["q"]},
    {"prompt": "x" * 500, "max_tokens": 1},
    {**GREEDY, "temperature": -1},
    {"messages": []},
    {},
]


def file_of(path: Path, requests: list[dict[str, Any]], *more: str) -> Path:
    lines = [json.dumps({"id": f"r{number}", **request}) for number, request in enumerate(requests)]
    path.write_text("\n".join([*lines, *more]), encoding="utf-8")
    return path


def answerer(tiny_model_dir: Path, output: Path) -> PartAnswerer:
    settings: dict[str, Any] = {"name": "tiny", "dtype": "float32", "chat_template": None}
    return PartAnswerer(str(tiny_model_dir), CONFIG, **settings, output=str(output))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def assert_alike(one: Any, other: Any) -> None:
    """Equal, but for the last digits of log-probabilities: what is computed together sums in another order."""
    if isinstance(one, dict | list):
        pairs = [(key, one[key]) for key in one] if isinstance(one, dict) else list(enumerate(one))
        assert (type(one), len(one)) == (type(other), len(other))
        for key, value in pairs:
            assert_alike(value, other[key])
    else:
        assert one == (pytest.approx(other, abs=1e-3) if isinstance(other, float) else other)


def test_parts_are_whole_lines(tmp_path: Path):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"a\n\nbb\n\xc3\xa9\nlast")
    parts = request_parts(path, num_lines=2, tied="model")
    assert [part.lines() for part in parts] == [[(1, b"a")], [(3, b"bb"), (4, b"\xc3\xa9")], [(5, b"last")]]
    assert [(part.start, part.stop, part.first_line) for part in parts] == [(0, 3, 1), (3, 9, 3), (9, 13, 5)]
    path.write_bytes(b"a\n\nbc\n\xc3\xa9\nlast")
    changed = [new.digest != old.digest for new, old in zip(request_parts(path, num_lines=2, tied="model"), parts)]  # noqa: B905
    assert changed == [False, True, False]
    assert (
        request_parts(path, num_lines=9, tied="other")[0].digest != request_parts(path, num_lines=9, tied=1)[0].digest
    )
    path.write_bytes(b"")
    for wrong in (path, tmp_path / "none.jsonl"):
        with pytest.raises(ServingError, match=r"generate\.requests"):
            request_parts(wrong, num_lines=2, tied="model")


def test_answers_are_those_of_the_endpoint(
    model: ServedModel,
    engine: TransformersEngine,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(part_answerer, "load_engine", lambda *_, **__: engine)
    more = ['{"id": "half', "", '{"messages": []}', '{"id": 7, "model": "gpt", "prompt": "a"}', "[]"]
    path = file_of(tmp_path / "requests.jsonl", REQUESTS, *more)
    parts = request_parts(path, num_lines=5, tied="model")
    answer = answerer(tiny_model_dir, tmp_path / "out")
    assert [answer(asdict(part)) for part in parts] == [{"problem": ""}] * 3
    rows = [row for part in parts for row in read(part.answers(tmp_path / "out"))]

    client = client_of(model)
    for number, request in enumerate(REQUESTS):
        path_of_kind = "/v1/chat/completions" if "messages" in request else "/v1/completions"
        expected = client.post(path_of_kind, json={"model": "tiny", **request}).json()
        row = rows[number]
        assert row.pop("id") == f"r{number}"
        for name in ("id", "created"):
            expected.pop(name, None)
            row.pop(name, None)
        for each in (expected, row):
            each.get("usage", {}).pop("prompt_tokens_details", None)
        assert_alike(row, expected)
    assert ["error" in row for row in rows] == [False] * 4 + [True] * 8
    assert [row["error"]["code"] for row in rows[8:]] == ["bad_json", "no_id", "model_not_found", "no_id"]
    assert rows[9]["error"]["message"].startswith("line 11 is no JSON object with an id")

    (first, second, third) = counts_of(parts, tmp_path / "out")
    assert (first["counts"]["requests"], first["counts"]["answered"]) == (5, 4)
    assert first["counts"]["completion_tokens"] == 12 + 24 + 6 + sum(
        row["usage"]["completion_tokens"] for row in rows[3:4]
    )
    assert second["dropped"] == {"bad_request": 3, "bad_json": 1}
    assert third["dropped"] == {"no_id": 2, "model_not_found": 1}


def test_done_parts_are_kept_and_others_refused(
    engine: TransformersEngine, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(part_answerer, "load_engine", lambda *_, **__: engine)
    path, output = file_of(tmp_path / "requests.jsonl", [GREEDY] * 4), tmp_path / "out"
    parts = request_parts(path, num_lines=2, tied="model")
    assert open_parts(parts, output) == parts
    answerer(tiny_model_dir, output)(asdict(parts[1]))
    assert open_parts(parts, output) == parts[:1]
    with pytest.raises(ServingError, match="holds 1 parts of answers to other requests, or of another model"):
        open_parts(request_parts(path, num_lines=2, tied="retrained"), output)


def test_what_ends_the_engine_ends_the_part(tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    part = request_parts(file_of(tmp_path / "requests.jsonl", [GREEDY]), num_lines=2, tied="model")[0]
    assert "cannot be loaded" in answerer(tmp_path / "no_model", tmp_path / "out")(asdict(part))["problem"]
    engine = TransformersEngine(tiny_model_dir, dtype="float32")
    engine.close()
    monkeypatch.setattr(part_answerer, "load_engine", lambda *_, **__: engine)
    assert "has ended" in answerer(tiny_model_dir, tmp_path / "out")(asdict(part))["problem"]
    assert open_parts([part], tmp_path / "out") == [part]
