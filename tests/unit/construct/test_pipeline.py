"""What the workers and the short chats of the construct stage do, without Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from longalign_ray.construct import pipeline
from longalign_ray.construct.pipeline import _short_chats, _write_shelf
from longalign_ray.errors import ConfigError


def _shelf(*files: str) -> dict:
    return {"shelf": 3, "form": "source", "files": list(files)}


def test_a_shelf_becomes_conversations_that_name_their_source():
    row = _write_shelf(_shelf("queue.py", "heapq.py"), min_chars=1_500, max_chars=6_000, seed=0)
    made = json.loads(row["conversations"])
    assert len(made) >= 3
    assert [item["round"] for item in made] == list(range(len(made)))
    for item in made:
        user, assistant = item["conversation"]["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert user["content"].strip()
        assert assistant["content"].strip()
        assert item["conversation"]["id"].endswith(item["kind"])
        assert "PSF" in item["conversation"]["source"]
        assert "# Module: queue" in user["content"] or "# Module: heapq" in user["content"]
    assert row == _write_shelf(_shelf("queue.py", "heapq.py"), min_chars=1_500, max_chars=6_000, seed=0)
    assert row != _write_shelf(_shelf("queue.py", "heapq.py"), min_chars=1_500, max_chars=6_000, seed=1)


def test_files_that_cannot_be_used_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "latin.py").write_bytes("# caf\u00e9\n".encode("latin-1"))
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "good.py").write_text("def f():\n    return 1\n\n\n" * 10)
    monkeypatch.setattr(pipeline, "stdlib_root", lambda: tmp_path)
    row = _write_shelf(_shelf("latin.py", "broken.py", "missing.py", "good.py"), min_chars=100, max_chars=1_000, seed=0)
    assert len(json.loads(row["conversations"])) >= 1
    dropped = json.loads(row["dropped"])
    assert {reason: dropped[reason] for reason in ("files_not_utf8", "files_unparsable", "files_unreadable")} == {
        "files_not_utf8": 1,
        "files_unparsable": 1,
        "files_unreadable": 1,
    }


def test_short_chats_are_drawn_by_seed_without_repeats():
    first, again, other = (_short_chats(20, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len({chat["id"] for chat in first}) == 20
    assert _short_chats(0, seed=0) == []


def test_more_short_chats_than_there_are_is_an_error_with_the_number():
    with pytest.raises(ConfigError, match=r"construct.num_short = 5000 is above the \d+ short chats.*set it to \d+"):
        _short_chats(5_000, seed=0)
