"""Each policy keeps what it says, fits, and counts what it cut; the template stays whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import decoders

from longalign_ray.config import DataConfig
from longalign_ray.data.conversation import Conversation, Message, RecordError
from longalign_ray.data.template import Tokenizer, load_tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer
from tests.unit.data.talks import talk, targets, tokenized
from tests.unit.evaluate.tokenizers import make_tokenizer

LONG = talk("one " * 20, "1.", "two " * 20, "2.", "three " * 20, "3.", system="Be kind.")


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_dir)


def cut(tokenizer: Tokenizer, conversation: Conversation, max_length: int, too_long: Any) -> tuple[str, int]:
    """The text of the example and the number of tokens cut."""
    maker = ConversationTokenizer(tokenizer, DataConfig(max_length=max_length, too_long=too_long))
    made = maker.one(conversation)
    (example,) = made.examples
    assert made.cut_answer == (example.input_ids[example.loss_weight > 0][-1] != tokenizer.eos_token_id)
    whole = tokenized(tokenizer, conversation).length
    assert example.length <= max_length
    assert made.num_cut == whole - example.length
    return tokenizer.decode(example.input_ids), made.num_cut


@pytest.mark.parametrize("too_long", ["skip", "error"])
def test_too_long_is_an_error_of_its_own(tokenizer: Tokenizer, too_long: Any) -> None:
    whole = tokenized(tokenizer, LONG).length
    assert tokenized(tokenizer, LONG, max_length=whole, too_long=too_long).length == whole
    with pytest.raises(RecordError, match=rf"{whole} tokens, and data\.max_length = {whole - 1}") as caught:
        tokenized(tokenizer, LONG, max_length=whole - 1, too_long=too_long)
    assert caught.value.reason == "too_long"


def test_cut_right(tokenizer: Tokenizer) -> None:
    short = talk("Hi", "Hello!")
    whole = tokenized(tokenizer, short)
    example = tokenized(tokenizer, short, max_length=whole.length - 4, too_long="cut_right")
    assert example.input_ids.tolist() == whole.input_ids[:-4].tolist()
    assert targets(tokenizer, example) == ["Hell"]  # cut: o ! <|im_end|> newline
    assert cut(tokenizer, short, whole.length - 4, "cut_right")[1] == 4
    with pytest.raises(RecordError, match=r"beyond data\.max_length = 10") as caught:
        tokenized(tokenizer, short, max_length=10, too_long="cut_right")
    assert caught.value.reason == "no_target_left"


def test_cut_left_drops_whole_exchanges_then_the_beginning_of_the_last_question(tokenizer: Tokenizer) -> None:
    whole = tokenized(tokenizer, LONG).length
    text, _ = cut(tokenizer, LONG, whole - 1, "cut_left")
    assert text == tokenizer.decode(
        tokenized(tokenizer, talk(*["two " * 20, "2.", "three " * 20, "3."], system="Be kind.")).input_ids
    )
    last = talk("three " * 20, "3.", system="Be kind.")
    shortest = tokenized(tokenizer, last).length
    text, _ = cut(tokenizer, LONG, shortest, "cut_left")
    assert text == tokenizer.decode(tokenized(tokenizer, last).input_ids)
    text, _ = cut(tokenizer, LONG, shortest - 50, "cut_left")
    question = ("three " * 20)[50:]
    assert text == tokenizer.decode(tokenized(tokenizer, talk(question, "3.", system="Be kind.")).input_ids)


def test_cut_left_keeps_as_many_exchanges_as_fit(tokenizer: Tokenizer) -> None:
    turns = [f"{'question' if n % 2 == 0 else 'answer'} {n:02} {'.' * (n % 7)}" for n in range(60)]
    fitting = tokenized(tokenizer, talk(*turns[-6:], system="Be kind."))
    text, _ = cut(tokenizer, talk(*turns, system="Be kind."), fitting.length + 5, "cut_left")
    assert text == tokenizer.decode(fitting.input_ids)


def test_cut_middle_keeps_head_and_tail_of_the_longest_question(tokenizer: Tokenizer) -> None:
    conversation = talk("short", "1.", "HEAD" + "." * 100 + "TAIL", "2.")
    whole = tokenized(tokenizer, conversation).length
    text, num_cut = cut(tokenizer, conversation, whole - 81, "cut_middle")
    assert num_cut == 81
    assert text == tokenizer.decode(
        tokenized(tokenizer, talk("short", "1.", "HEAD" + "." * 19 + "TAIL", "2.")).input_ids
    )


@pytest.mark.parametrize("too_long", ["cut_left", "cut_middle"])
def test_where_only_the_answer_is_long_its_end_is_cut(tokenizer: Tokenizer, too_long: Any) -> None:
    text, _ = cut(tokenizer, talk("Hi", "x" * 200), 100, too_long)
    assert text.startswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nxxx")
    greeting = Conversation("g", (Message("assistant", "x" * 200),), "test")
    assert cut(tokenizer, greeting, 100, too_long)[0].startswith("<|im_start|>assistant\nxxx")


@pytest.mark.parametrize("too_long", ["cut_left", "cut_middle"])
@pytest.mark.parametrize("kind", ["mistral", "qwen"])
def test_real_tokenizers_fit_and_keep_characters_whole(
    too_long: Any, kind: str, tmp_path: Path, shared_data: Path
) -> None:
    tokenizer = make_tokenizer(kind, scratch=tmp_path, data=shared_data)
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel() if kind == "qwen" else decoders.Metaspace()
    conversation = talk("先看这份文件🙂。" * 60 + " What does it say?", "没有什么。", system="Be kind.")
    whole = tokenized(tokenizer, conversation).length
    for max_length in range(60, whole, 97):
        text, _ = cut(tokenizer, conversation, max_length, too_long)
        assert "\ufffd" not in text
        assert text.count("Be kind.") == 1
        assert "没有什么。" in text
        assert "say?" in text
