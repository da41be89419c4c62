from __future__ import annotations

import math
from pathlib import Path

import pytest

from longalign_ray.data.conversation import Conversation, RecordError, decode_record, parse_record


def parse(record: object, **settings) -> Conversation:
    return parse_record(record, source="a", line_number=1, **settings)


def turns(record: object, **settings) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in parse(record, **settings).messages]


HI, HELLO = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
ONE_TURN = [("user", "Hi"), ("assistant", "Hello")]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [HI, HELLO]},
        {"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"conversations": [{"role": "User", "content": "Hi", "from": None}, {**HELLO, "value": None}]},
        {"conversation": [HI, HELLO]},
        {"instruction": "Hi", "output": "Hello"},
        {"instruction": "Hi", "input": "", "output": "Hello", "history": [], "system": ""},
        {"instruction": "Hi", "input": None, "response": "Hello"},
        {"instruction": "Hi", "input": math.nan, "output": "Hello", "text": "rendered once more"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [HI], "completion": [HELLO]},
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI]},
        {"prompt": "Hi", "completion": HELLO},
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "Hello"}},
        {"messages": [HI, HELLO], "chosen": [HI, HELLO], "prompt": "Hi"},
    ],
)
def test_every_style_says_the_same(record: object) -> None:
    assert turns(record) == ONE_TURN


def test_instruction_with_everything() -> None:
    record = {
        "system": "Be brief.",
        "instruction": "Translate.",
        "input": "Bonjour",
        "output": "Good day",
        "history": [["Hi", "Hello"], ("More", "Yes")],
    }
    assert turns(record) == [
        ("system", "Be brief."),
        *ONE_TURN,
        ("user", "More"),
        ("assistant", "Yes"),
        ("user", "Translate.\n\nBonjour"),
        ("assistant", "Good day"),
    ]


def test_a_prompt_of_messages_is_context_and_not_learnt() -> None:
    asked = [HI, HELLO, {"role": "user", "content": "And?"}]
    talk = parse({"prompt": asked, "completion": [{"role": "assistant", "content": "Bye"}]})
    assert [message.loss_weight for message in talk.messages] == [0.0, 0.0, 0.0, None]
    talk = parse({"prompt": [HI, {**HELLO, "weight": 1}, asked[2]], "completion": "Bye"})
    assert [message.loss_weight for message in talk.messages] == [0.0, 1.0, 0.0, None]


def test_a_text_is_a_document() -> None:
    talk = parse({"id": 3, "text": "Once upon a time."})
    assert talk == Conversation("3", (), "a", text="Once upon a time.")


def refused(record: object, **settings) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse(record, **settings)
    return caught.value


@pytest.mark.parametrize(
    ("record", "hint"),
    [
        ({"mesages": []}, "did you mean 'messages' for 'mesages'"),
        ({"Conversations": []}, "did you mean 'conversations' for 'Conversations'"),
        ({"instructions": "a", "output": "b"}, "did you mean 'instruction' for 'instructions'"),
        ({"prompt": "a", "completions": "b"}, "did you mean 'completion' for 'completions'"),
        ({"question": "a", "answer": "b"}, "the keys 'question', 'answer'. A record has 'messages', or "),
        ({"prompt": "a", "completion": None}, "prompt_completion needs 'completion' or 'response' or 'chosen' as well"),
        ({}, "the keys (none). A record has"),
        ({"messages": None}, "the keys 'messages'"),
        ({str(i): i for i in range(99)}, "and 87 more"),
        ({"x" * 10_000: 1}, "x" * 40 + "'. A record has 'messages', or 'conversations', or 'instruction' and 'output'"),
    ],
)
def test_other_records_are_refused_with_a_hint(record: object, hint: str) -> None:
    error = refused(record)
    assert error.reason == "unknown_style"
    assert hint in str(error)
    assert len(str(error)) <= 300


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": ["a"], "output": "b"}, "no_text"),
        ({"instruction": "a", "input": {"b": 1}, "output": "b"}, "no_text"),
        ({"instruction": "a", "output": ["b", "c"]}, "not_text"),
        ({"instruction": "a", "output": ""}, "empty_assistant_turn"),
        ({"instruction": "a", "output": "b", "history": "c"}, "bad_history"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "bad_history"),
        ({"prompt": {"a": 1}, "completion": "b"}, "no_text"),
        ({"prompt": ["a"], "completion": "b"}, "no_messages"),
        ({"text": ""}, "empty_text"),
        ({"text": 7}, "no_text"),
        ({"text": "\udfff"}, "lone_surrogate"),
    ],
)
def test_wrong_values_in_every_style(record: object, reason: str) -> None:
    assert refused(record).reason == reason


def test_a_named_style_wins_over_the_order_of_auto() -> None:
    record = {"text": "a document", "messages": [HI, HELLO]}
    assert parse(record).text is None
    assert parse(record, style="text").text == "a document"
    error = refused(record, style="alpaca")
    assert "corpus.style = alpaca needs 'instruction' and 'output' or 'response'" in str(error)
    assert "'text', 'messages'" in str(error)


def test_real_conversations_are_all_taken(shared_data: Path) -> None:
    for path in [*sorted((shared_data / "chat").glob("*.jsonl")), shared_data / "documents.jsonl"]:
        calls = 0
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            talk = parse_record(decode_record(line), source=path.name, line_number=number)
            assert bool(talk.messages) != bool(talk.text)
            calls += sum(len(message.tool_calls) for message in talk.messages)
            assert bool(talk.tools) == path.name.startswith("glaive") or not talk.tools
        assert calls == {"glaive_toolcall_en_demo.jsonl": 182, "glaive_toolcall_zh_demo.jsonl": 167}.get(path.name, 0)
