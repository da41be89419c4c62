"""The construct stage on a real Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longalign_ray.config import ConstructConfig
from longalign_ray.construct import pipeline
from longalign_ray.construct.pipeline import construct
from longalign_ray.data.conversation import parse_record
from longalign_ray.errors import CorpusError

pytestmark = pytest.mark.usefixtures("local_ray")


def test_conversations_are_as_many_as_asked_for_and_the_same_for_the_same_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    config = ConstructConfig(num_long=6, num_short=3, min_chars=1_000, max_chars=5_000)
    counts, dropped = construct(config, tmp_path / "new" / "a.jsonl", seed=1)
    assert construct(config, tmp_path / "b.jsonl", seed=1) == (counts, dropped)
    assert capsys.readouterr().out == ""
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]
    text = (tmp_path / "new" / "a.jsonl").read_text(encoding="utf-8")
    assert text == (tmp_path / "b.jsonl").read_text(encoding="utf-8")

    rows = [json.loads(line) for line in text.splitlines()]
    assert all(set(row) == {"id", "source", "messages"} for row in rows)
    conversations = [parse_record(json.loads(line), source="a", line_number=1) for line in text.splitlines()]
    assert len({item.example_id for item in conversations}) == 9
    short = [item for item in conversations if item.example_id.startswith("short-")]
    long = [item for item in conversations if not item.example_id.startswith("short-")]
    assert (counts["long"], counts["short"], counts["conversations"]) == (len(long), len(short), 9) == (6, 3, 9)
    assert all("-00-" in item.example_id for item in long), "the first document of each shelf comes first"
    assert all(1_000 <= len(item.messages[0].content) <= 5_000 + 1_500 for item in long)
    assert [item in short for item in conversations] not in ([True] * 3 + [False] * 6, [False] * 6 + [True] * 3)
    assert sum(number for name, number in counts.items() if name.startswith("task_")) == 6
    assert counts["characters"] == sum(len(message.content) for item in conversations for message in item.messages)
    assert counts["documents_not_chosen"] > 0
    assert counts["shelves_not_needed"] > 100

    more = construct(config.model_copy(update={"num_long": 9}), tmp_path / "more.jsonl", seed=1)
    assert more[0]["long"] == 9
    assert set(text.splitlines()) < set((tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines())


def test_too_few_documents_is_an_error_with_their_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "module_files", lambda root: (["queue.py"], 0))
    config = ConstructConfig(num_long=500, num_short=0)
    with pytest.raises(CorpusError, match=r"num_long = 500 is above the \d+ documents of 1500 to 14000 .* lower"):
        construct(config, tmp_path / "out.jsonl", seed=0)
    assert not (tmp_path / "out.jsonl").exists()


def test_a_python_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(pipeline, "stdlib_root", lambda: tmp_path)
    with pytest.raises(CorpusError, match=r"holds no sources of the standard library; .*corpus\.paths"):
        construct(ConstructConfig(), tmp_path / "out.jsonl", seed=0)
