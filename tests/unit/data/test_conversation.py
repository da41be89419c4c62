from __future__ import annotations

import json
import math
import pickle
import re

import pytest

from longalign_ray.data.conversation import Conversation, Message, RecordError, decode_record, parse_record

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def parse(record: object, **settings) -> Conversation:
    return parse_record(record, source="a.jsonl", line_number=7, **settings)


def chat(*messages: object, **fields: object) -> dict[str, object]:
    return {"messages": list(messages), **fields}


def refusal(record: object, **settings) -> RecordError:
    with pytest.raises(RecordError) as caught:
        parse(record, **settings)
    return caught.value


def test_a_record_keeps_its_messages_and_gets_a_name() -> None:
    talk = parse(chat(USER, ASSISTANT))
    assert talk.messages == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert (talk.example_id, talk.source, talk.text, talk.tools) == ("a.jsonl:7", "a.jsonl", None, ())
    assert talk.as_dicts() == [USER, ASSISTANT]


@pytest.mark.parametrize(
    ("given", "name"),
    [("x1", "x1"), (12, "12"), (10**190, str(10**190)), ("\ud800x", "\\ud800x")]
    + [(value, "a.jsonl:7") for value in (None, "", True, 1.5, math.nan, [1], {}, "x" * 201, 10**300)],
)
def test_a_record_is_named_by_its_id_where_that_is_a_short_text_or_number(given: object, name: str) -> None:
    assert parse(chat(USER, ASSISTANT, id=given)).example_id == name


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        (["x"], "not_an_object", "a list"),
        ("x", "not_an_object", "a str"),
        (None, "not_an_object", "NoneType"),
        (chat(), "no_messages", "list of 0"),
        ({"messages": "Hi"}, "no_messages", "a str of 2"),
        (chat("Hi"), "no_messages", "message 0 is a str"),
        (chat(USER), "no_assistant_turn", "nothing to learn"),
        (chat({"role": "alien", "content": "x"}, ASSISTANT), "unknown_role", "'alien'"),
        (chat(USER, {"role": "assistent", "content": "x"}), "unknown_role", "did you mean 'assistant'"),
        (chat({"rol": "user", "content": "x"}, ASSISTANT), "no_role", "did you mean 'role' for 'rol'"),
        (chat({"role": ["user"], "content": "x"}, ASSISTANT), "unknown_role", "['user']"),
        (chat(USER, {"role": "assistant", "content": " \n"}), "empty_assistant_turn", "message 1"),
        (chat(USER, {"role": "assistant", "content": None}), "no_text", "NoneType"),
        (chat({"role": "user", "content": 3}, ASSISTANT), "no_text", "int"),
        (chat(USER, {"role": "assistant", "content": "a\ud800"}), "lone_surrogate", "message 1.*character 1"),
        (chat({"role": "user", "content": [{"type": "image_url"}]}, ASSISTANT), "not_text", "'image_url'"),
        (chat({"role": "user", "content": [{"type": "text", "text": 1}]}, ASSISTANT), "not_text", "message 0"),
        (chat({"role": "user", "content": ["Hi"]}, ASSISTANT), "not_text", "'str'"),
        (chat(USER, {**ASSISTANT, "loss_weight": 1.5}), "bad_loss_weight", r"1\.5"),
        (chat(USER, {**ASSISTANT, "loss_weight": -0.1}), "bad_loss_weight", r"\[0, 1\]"),
        (chat(USER, {**ASSISTANT, "loss_weight": "1"}), "bad_loss_weight", "'1'"),
        (chat(USER, {**ASSISTANT, "weight": True}), "bad_loss_weight", "True"),
        (chat(USER, {**ASSISTANT, "weight": 0.0705}), "bad_loss_weight", r"0\.01"),
        (chat(USER, {**ASSISTANT, "weight": 10**400}), "bad_loss_weight", "1000"),
        (chat(USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": "{"}]}), "bad_tool_call", "message 1"),
        (chat(USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": [1]}]}), "bad_tool_call", "a list"),
        (chat(USER, {**ASSISTANT, "tool_calls": [3]}), "bad_tool_call", "name"),
        (chat(USER, {"role": "function_call", "content": "now"}), "bad_tool_call", "JSON"),
        (chat({**USER, "tool_calls": [{"name": "f"}]}, ASSISTANT), "bad_tool_call", "only the assistant"),
        (chat(USER, ASSISTANT, tools="[{"), "bad_tools", "JSON"),
        (chat(USER, ASSISTANT, tools=[3]), "bad_tools", "a int"),
        (chat(USER, ASSISTANT, tools=[{"name": math.inf}]), "bad_tools", "JSON"),
    ],
)
def test_bad_records_have_a_reason_and_a_detail(record: object, reason: str, detail: str) -> None:
    error = refusal(record)
    assert error.reason == reason
    assert re.search(detail, str(error)), str(error)


SYSTEM, TOOL = {"role": "system", "content": "Be brief."}, {"role": "tool", "content": "4"}
CALL = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 2}}]}


@pytest.mark.parametrize(
    ("messages", "place"),
    [
        ([USER, USER, ASSISTANT], "message 1"),
        ([USER, ASSISTANT, ASSISTANT], "message 2"),
        ([ASSISTANT, USER, ASSISTANT], "message 0"),
        ([SYSTEM, ASSISTANT], "message 1"),
        ([USER, SYSTEM, ASSISTANT], "message 1"),
        ([USER, TOOL, ASSISTANT], "message 1"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT, USER, ASSISTANT, USER], None),
        ([USER, CALL, TOOL, TOOL, ASSISTANT, USER, ASSISTANT], None),
        ([USER, CALL, ASSISTANT], None),
        ([USER, ASSISTANT, TOOL, ASSISTANT], None),
    ],
)
def test_turns_answer_each_other(messages: list[object], place: str | None) -> None:
    assert len(parse(chat(*messages), role_order="any").messages) == len(messages)
    if place is None:
        parse(chat(*messages))
    else:
        error = refusal(chat(*messages))
        assert error.reason == "role_order"
        assert place in str(error)
        assert "corpus.role_order=any" in str(error)


def test_parts_are_joined_and_weights_kept_to_the_hundredth() -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    weights = {"weight": 1, "loss_weight": 0.07}
    talk = parse(chat({**USER, "content": parts, "weight": 0}, {**ASSISTANT, **weights}, {**USER, "loss_weight": 1}))
    assert [message.loss_weight for message in talk.messages] == [0.0, 0.07, 1.0]
    assert talk.messages[0].content == "Hello"
    for hundredths in range(101):
        weighted = parse(chat(USER, {**ASSISTANT, "loss_weight": hundredths / 100}))
        assert weighted.messages[1].loss_weight == hundredths / 100
    assert parse(chat(USER, {**USER, "loss_weight": 0.5}), role_order="any").messages[1].loss_weight == 0.5


def test_tool_calls_of_every_style_become_one() -> None:
    call = {"name": "add", "arguments": {"a": 2, "b": "2"}}
    function = {"type": "function", "function": call}
    openai = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps(call["arguments"])}}
    asked = {"role": "assistant", "content": None, "tool_calls": [openai]}
    answered = {"role": "tool", "tool_call_id": "c1", "name": "add", "content": "4"}
    talk = parse(chat(USER, asked, answered, ASSISTANT, tools=json.dumps([{"name": "add"}])))
    assert talk.as_dicts()[1] == {"role": "assistant", "content": "", "tool_calls": [{**function, "id": "c1"}]}
    assert talk.as_dicts()[2] == answered
    assert talk.tools == ({"type": "function", "function": {"name": "add"}},)

    shared = [("human", "Hi"), ("function_call", json.dumps([call, call])), ("observation", "4"), ("gpt", "It is 4.")]
    talk = parse({"conversations": [{"from": role, "value": value} for role, value in shared], "tools": [function]})
    assert [message.role for message in talk.messages] == ["user", "assistant", "tool", "assistant"]
    assert talk.messages[1].tool_calls == (function, function)
    assert talk.tools == (function,)

    old = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": "{}"}}
    talk = parse(chat(USER, old, {"role": "function", "name": "add", "content": "4"}, ASSISTANT))
    assert talk.messages[1].tool_calls[0]["function"] == {"name": "add", "arguments": {}}
    assert talk.messages[2].role == "tool"


def nested(levels: int) -> object:
    return [nested(levels - 1)] if levels else "x"


def test_tools_are_nested_as_deeply_as_templates_can_follow() -> None:
    assert parse(chat(USER, ASSISTANT, tools=[{"name": nested(40)}])).tools
    assert refusal(chat(USER, ASSISTANT, tools=[{"name": nested(60)}])).reason == "too_deep"
    call = {"name": "f", "arguments": {"a": nested(60)}}
    assert refusal(chat(USER, {**ASSISTANT, "tool_calls": [call]})).reason == "too_deep"


def test_deep_nesting_is_a_bad_record() -> None:
    deep: object = "x"
    for _ in range(100_000):
        deep = [deep]
    for record in (chat(USER, {**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": deep}}]}), chat(deep)):
        assert refusal(record).reason in ("too_deep", "no_messages")
    assert refusal(chat(USER, ASSISTANT, tools=[{"name": deep}])).reason == "too_deep"
    with pytest.raises(RecordError) as caught:
        decode_record(b"[" * 1_000_000)
    assert caught.value.reason == "too_deep"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"{broken", "broken_json"),
        (b"", "broken_json"),
        (b'{"a": "\x00"}', "broken_json"),
        (b"1" * 5_000, "broken_json"),
        (b'"\xff\xfe"', "not_utf8"),
        (b'"\xed\xa0\x80"', "not_utf8"),  # a surrogate's half in UTF-8
    ],
)
def test_lines_that_are_no_json(line: bytes, reason: str) -> None:
    with pytest.raises(RecordError) as caught:
        decode_record(line)
    assert caught.value.reason == reason


def test_a_line_may_begin_with_a_byte_order_mark() -> None:
    assert decode_record(b'\xef\xbb\xbf{"a": "\\u0000"}\r') == {"a": "\0"}


def test_a_refusal_is_short_printable_and_pickles() -> None:
    error = RecordError("some_reason", "\ud800" + "x" * 10_000)
    assert len(str(error)) == 300
    assert str(error).startswith("\\ud800x")
    again = pickle.loads(pickle.dumps(error))
    assert (again.reason, str(again)) == (error.reason, str(error))
    with pytest.raises(RecordError, match="ud800"):
        parse(error)
