from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from longalign_ray.data.words import ngram_hashes, words


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't  STOP, 再见!", ["don", "t", "stop", "再", "见"]),
        ("", []),
        ("?!…—", []),
        ("snake_case x2", ["snake", "case", "x2"]),
        ("Straße ＡＢＣ ﬁn", ["strasse", "abc", "fin"]),
        ("ひらがなカタ", ["ひ", "ら", "が", "な", "カ", "タ"]),
        ("한국어 문장", ["한국어", "문장"]),
        ("GPT4模型v2", ["gpt4", "模", "型", "v2"]),
        ("𠀀𠀁", ["𠀀", "𠀁"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_equal_runs_and_no_others_have_equal_hashes() -> None:
    random = np.random.default_rng(0)
    text = [f"w{i}" for i in random.integers(0, 6, 3_000)]
    for n in (1, 2, 5, 13):
        hashes = ngram_hashes(text, n)
        assert hashes.dtype == np.uint64
        runs = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
        assert len(hashes) == len(runs)
        assert len(set(zip(runs, hashes.tolist(), strict=True))) == len(set(runs)) == len(set(hashes.tolist()))


def test_order_and_repetition_count() -> None:
    a, b = ngram_hashes(["x", "y", "z", "z", "y", "x"], 3)[[0, 3]]
    assert a != b
    assert len(set(ngram_hashes(["x"] * 5, 3).tolist())) == 1
    assert ngram_hashes(["x"], 3).tolist() == []
    assert ngram_hashes([], 1).tolist() == []


def test_hashes_are_the_same_in_another_process() -> None:
    code = "from longalign_ray.data.words import ngram_hashes; print(ngram_hashes(['a', '再', 'c'], 2).tolist())"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert printed == {str(ngram_hashes(["a", "再", "c"], 2).tolist())}


def test_the_parts_of_a_hash_are_spread() -> None:
    low = ngram_hashes([str(i) for i in range(20_000)], 3) & np.uint64(0xFFFF)
    counts = np.bincount(low.astype(np.int64) >> 8, minlength=256)
    assert np.abs(counts - counts.mean()).max() < 6 * np.sqrt(counts.mean())
