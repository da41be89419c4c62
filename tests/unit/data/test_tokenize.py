"""Targets decode to exactly what the assistant says, with the token that ends its turn, whatever the template does."""

from __future__ import annotations

import copy
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from longalign_ray.data.conversation import Conversation, Message, RecordError
from longalign_ray.data.store import Example
from longalign_ray.data.template import Tokenizer, load_tokenizer
from longalign_ray.data.tokenize import render, tokenize_conversation

LLAMA_2 = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'].strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
NO_END_OF_TURN = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
UPPER = "{% for m in messages %}{{ '<|im_start|>' + m['content'].upper() + '<|im_end|>' }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_dir)


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed


def conversation(*turns: str, roles: tuple[str, ...] = ("user", "assistant")) -> Conversation:
    messages = tuple(Message(role, text) for role, text in zip(itertools.cycle(roles), turns, strict=False))
    return Conversation("c", messages, "test")


def tokenized(tokenizer: Tokenizer, *turns: str, max_length: int = 10_000) -> Example:
    return tokenize_conversation(conversation(*turns), tokenizer, max_length=max_length, too_long="reject")[0]


def target_texts(tokenizer: Tokenizer, example: Example) -> list[str]:
    """Text of each run of targets."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], (example.loss_weight > 0).astype(np.int8), [0]])))
    return [tokenizer.decode(example.input_ids[a:b]) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize(
    "turns",
    [
        ("Hi", "Hello!"),
        ("Hi", "Hello!", "Bye", "See you."),
        ("same", "same", "same", "same"),  # the answer repeats the question
        ("你好", "你好！我能帮你什么？🙂"),
        ("x", "  spaces and\n\nnewlines  "),
        ("write <|im_end|>?", "it is <|im_end|> so"),
        ("a \ue000 b", "c \ue0001\ue001 d", "e", "f"),  # the characters that marks are made of
    ],
)
def test_targets_are_the_turns_and_their_end(tokenizer: Tokenizer, turns: tuple[str, ...]) -> None:
    example = tokenized(tokenizer, *turns)
    assert target_texts(tokenizer, example) == [f"{answer}<|im_end|>" for answer in turns[1::2]]


def test_whole_text_is_the_template_rendering(tokenizer: Tokenizer) -> None:
    example = tokenized(tokenizer, "Hi", "Hello!")
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert tokenizer.decode(example.input_ids) == expected
    assert example.loss_weight[-1] == 0  # the newline after the end of the turn is the template's


def test_template_that_strips_and_adds_spaces(tokenizer: Tokenizer) -> None:
    """The space before EOS is a target too: without it the model could not reach EOS."""
    llama = with_template(tokenizer, LLAMA_2)
    example = tokenized(llama, "  Hi  ", "\nHello!\n", "Bye", " See you. ")
    assert target_texts(llama, example) == ["Hello! <|im_end|>", "See you. <|im_end|>"]


def test_template_without_end_of_turn_gets_eos_at_the_end(tokenizer: Tokenizer) -> None:
    plain = with_template(tokenizer, NO_END_OF_TURN)
    example = tokenized(plain, "Hi", "Hello!", "Bye", "See you.")
    assert target_texts(plain, example) == ["Hello!", "See you.", "<|im_end|>"]  # the newline between is the template's
    assert example.input_ids[-1] == plain.eos_token_id


def test_template_that_refuses_or_alters(tokenizer: Tokenizer) -> None:
    with pytest.raises(RecordError, match="only user and assistant") as caught:
        render(with_template(tokenizer, LLAMA_2), [{"role": "system", "content": "x"}])
    assert caught.value.reason == "template_refuses"
    with pytest.raises(RecordError, match="message 1") as caught:
        tokenized(with_template(tokenizer, UPPER), "hi", "hello")
    assert caught.value.reason == "template_changes_turn"


def test_length_limits(tokenizer: Tokenizer) -> None:
    whole = tokenized(tokenizer, "Hi", "Hello!")
    assert tokenized(tokenizer, "Hi", "Hello!", max_length=whole.length).length == whole.length
    with pytest.raises(RecordError, match=rf"{whole.length} tokens") as caught:
        tokenized(tokenizer, "Hi", "Hello!", max_length=whole.length - 1)
    assert caught.value.reason == "too_long"


def test_cut_right_counts_what_it_cuts(tokenizer: Tokenizer) -> None:
    whole = tokenized(tokenizer, "Hi", "Hello!")
    talk = conversation("Hi", "Hello!")
    cut, num_cut = tokenize_conversation(talk, tokenizer, max_length=whole.length - 4, too_long="cut_right")
    assert (cut.length, num_cut) == (whole.length - 4, 4)
    assert cut.input_ids.tolist() == whole.input_ids[:-4].tolist()
    assert target_texts(tokenizer, cut) == ["Hell"]  # cut: o ! <|im_end|> newline
    with pytest.raises(RecordError, match=r"beyond data\.max_length = 10") as caught:
        tokenize_conversation(talk, tokenizer, max_length=10, too_long="cut_right")
    assert caught.value.reason == "no_target_left"


def test_real_conversations_decode_to_the_assistant_turns(tokenizer: Tokenizer, shared_data: Path) -> None:
    checked = 0
    for name in ("chat/self_instruct.jsonl", "chat/dpo_zh_demo.jsonl", "chat/longchat_topics.jsonl"):
        for line in (shared_data / name).read_text(encoding="utf-8").splitlines()[:60]:
            messages = tuple(Message(m["role"], m["content"]) for m in json.loads(line)["messages"])
            if not all(m.content.strip() for m in messages if m.role == "assistant"):
                continue
            talk = Conversation("real", messages, name)
            example, _ = tokenize_conversation(talk, tokenizer, max_length=10**6, too_long="reject")
            answers = [f"{m.content}<|im_end|>" for m in messages if m.role == "assistant"]
            assert target_texts(tokenizer, example) == answers
            checked += len(answers)
    assert checked > 100
