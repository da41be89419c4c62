"""Incremental text: pieces join to the whole, characters stay whole, stop strings cut exactly."""

from __future__ import annotations

from pathlib import Path

import pytest

from longalign_ray.serve.text import MAX_HELD_TOKENS, Detokenizer, StopStrings


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_model_dir)


def test_pieces_join_to_the_text_and_hold_no_broken_character(tokenizer):
    text = "naïve 长文本 🙂👩‍👩‍👧 end"
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([token_id]) for token_id in tokenizer(text)["input_ids"]]  # one byte a token
    assert "".join(pieces) + detokenizer.finish() == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert sum(piece == "" for piece in pieces) > 20  # the bytes before the last of each character


def test_all_tokens_at_once_give_the_same(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(tokenizer("长文本 🙂")["input_ids"]) == "长文本 🙂"
    assert detokenizer.finish() == ""


def test_unfinished_character_at_the_end_is_left_out(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    assert detokenizer.push(tokenizer("ab🙂")["input_ids"][:-1]) == "ab"
    assert detokenizer.finish() == ""


def test_undecodable_tokens_are_not_held_for_ever(tokenizer):
    lone_byte = tokenizer("🙂")["input_ids"][-1]
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.push([lone_byte]) for _ in range(MAX_HELD_TOKENS)]
    assert "".join(pieces) == "\ufffd" * MAX_HELD_TOKENS


def test_special_tokens_are_no_text(tokenizer):
    detokenizer = Detokenizer(tokenizer)
    ids = tokenizer("a<|im_start|>b")["input_ids"]
    assert len(ids) == 3
    assert "".join(detokenizer.push([token_id]) for token_id in ids) + detokenizer.finish() == "ab"


def test_space_before_a_word_survives():
    """SentencePiece drops the space at the beginning of a decoded text, so a token alone would lose it."""

    class SentencePieceLike:
        def decode(self, ids, **_):
            return "".join({0: "▁Hello", 1: "▁world"}[token_id] for token_id in ids).replace("▁", " ").removeprefix(" ")

    detokenizer = Detokenizer(SentencePieceLike())
    assert [detokenizer.push([token_id]) for token_id in (0, 1, 1)] == ["Hello", " world", " world"]


@pytest.mark.parametrize(
    ("stop", "pushed", "released", "found"),
    [
        ((), ["abc", "def"], ["abc", "def"], False),
        (("STOP",), ["abcST", "OP tail"], ["abc", ""], True),  # across a border
        (("STOP",), ["abcST", "AR"], ["abc", "STAR"], False),  # held back, then let go
        (("STOP",), ["a", "b", "STO"], ["a", "b", ""], False),
        (("aab",), ["aa", "ab!"], ["", "a"], True),  # the match begins inside what was held
        (("cd", "bc"), ["abcd"], ["a"], True),  # the earliest place wins, not the first in the list
        (("\n\n",), ["x\n", "\n", "y"], ["x", "", ""], True),
    ],
)
def test_stop_strings(stop, pushed, released, found):
    stop_strings = StopStrings(stop)
    assert [stop_strings.push(text) for text in pushed] == released
    assert stop_strings.found is found
    assert stop_strings.finish() == ("STO" if pushed[-1] == "STO" else "")


def test_stop_strings_cut_the_same_wherever_the_text_is_split():
    text, stop = "one two  three two three", ("two t", "ee t")
    for first in range(len(text)):
        for second in range(first, len(text)):
            stop_strings = StopStrings(stop)
            parts = (text[:first], text[first:second], text[second:])
            assert "".join(map(stop_strings.push, parts)) + stop_strings.finish() == "one two  thr"
            assert stop_strings.found
