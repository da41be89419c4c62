"""Planted runs of words, near misses, and the files that evaluation sets come in."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.conversation import Conversation, Message
from longalign_ray.data.decontaminate import EvaluationRuns, contamination, evaluation_texts
from longalign_ray.errors import CorpusError

QUESTION = "which of the three rivers that meet below the old mill is the longest one"  # 15 words
CHINESE = "下列哪一条河流在老磨坊下面与其他两条河流汇合呢"


def talk(user: str, assistant: str = "I do not know.") -> Conversation:
    return Conversation("x", (Message("user", user), Message("assistant", assistant)), "f")


def found(conversation: Conversation, texts: list[str], n: int = 13) -> str | None:
    runs = EvaluationRuns.of(texts, n)
    return contamination(conversation, runs.hashes, n)


def test_a_planted_run_is_found_and_named() -> None:
    words = QUESTION.split()
    inside = f"Some filler. {' '.join(words[1:14]).upper()}, and so on"
    assert found(talk(inside), ["another text", QUESTION]) == " ".join(words[1:14])
    assert found(talk("Well?", inside), [QUESTION]) == " ".join(words[1:14])
    assert found(talk(QUESTION.replace(" ", " - ") + "?"), [QUESTION]) == " ".join(words[:13])


def test_near_misses_are_not_found() -> None:
    words = QUESTION.split()
    assert found(talk(f"so {' '.join(words[:12])} then"), [QUESTION]) is None  # 12 of 13
    assert found(talk(" ".join([*words[:7], "very", *words[7:]])), [QUESTION]) is None  # a word put in
    assert found(talk(" ".join(words[:7]), " ".join(words[7:])), [QUESTION]) is None  # over two turns
    assert found(talk(" ".join(reversed(words))), [QUESTION]) is None
    assert found(talk(QUESTION), [" ".join(words[:8]), " ".join(words[8:])]) is None  # over two texts


def test_chinese_is_compared_by_characters() -> None:
    assert found(talk(f"请问，{CHINESE[3:16]}？"), [CHINESE]) == " ".join(CHINESE[3:16])
    assert found(talk(f"请问，{CHINESE[3:15]}？"), [CHINESE]) is None
    assert found(talk("，".join(CHINESE)), [CHINESE]) == " ".join(CHINESE[:13])


def test_system_turns_and_documents() -> None:
    system = Conversation("x", (Message("system", QUESTION), *talk("a").messages), "f")
    assert found(system, [QUESTION]) is not None
    assert found(Conversation("x", (), "f", text=QUESTION), [QUESTION]) is not None
    assert found(Conversation("x", (), "f", text="short"), [QUESTION]) is None
    assert found(talk(QUESTION), []) is None


def test_short_texts_are_counted() -> None:
    runs = EvaluationRuns.of([QUESTION, "too short", QUESTION.upper(), ""], 13)
    assert (runs.num_texts, runs.num_short_texts) == (4, 2)
    assert len(runs.hashes) == 3
    assert (np.diff(runs.hashes.astype(object)) > 0).all()


def test_every_run_of_a_long_text_is_found() -> None:
    random = np.random.default_rng(0)
    words = [f"w{i}" for i in random.integers(0, 10_000, 400)]
    runs = EvaluationRuns.of([" ".join(words)], 8)
    for start in range(len(words) - 7):
        assert contamination(talk(" ".join(words[start : start + 8])), runs.hashes, 8) is not None
        assert contamination(talk(" ".join(words[start : start + 7])), runs.hashes, 8) is None


def test_all_strings_of_all_kinds_of_files(tmp_path: Path) -> None:
    rows = [{"question": "q1", "answers": ["a1", {"deep": "a2"}], "n": 3, "none": None}, ["b1"], "c1"]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(json.dumps(rows[0]).encode()))
    (tmp_path / "d.txt").write_text("line 1\nline 2", encoding="utf-8")
    assert list(evaluation_texts([str(tmp_path / "a.jsonl")])) == ["q1", "a1", "a2", "b1", "c1"]
    assert list(evaluation_texts([str(tmp_path / "*.json")])) == ["q1", "a1", "a2", "b1", "c1"]
    assert list(evaluation_texts([str(tmp_path / "c*"), str(tmp_path / "*.txt")])) == [
        "q1",
        "a1",
        "a2",
        "line 1\nline 2",
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text('{"q": "a"}\n{oops\n')
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for name, message in [
        ("none.jsonl", "none.jsonl does not exist"),
        ("no*.txt", "matches no file"),
        ("none.txt", "cannot be read"),
        ("bytes.txt", "cannot be read"),
        ("broken.jsonl", "broken.jsonl, record 2: not valid JSON"),
    ]:
        with pytest.raises(CorpusError, match=rf"^data\.decontaminate\.paths: .*{message}"):
            list(evaluation_texts([str(tmp_path / name)]))


def test_a_real_evaluation_set(shared_data: Path) -> None:
    texts = list(evaluation_texts([str(shared_data / "longbench_chat" / "*.json*")]))
    runs = EvaluationRuns.of(texts, 13)
    assert len(runs.hashes) > 100
    planted = max(texts, key=len)
    assert contamination(talk(f"Tell me. {planted[:2_000]}"), runs.hashes, 13) is not None
    assert contamination(talk("Tell me about the mill and the rivers of the valley."), runs.hashes, 13) is None
