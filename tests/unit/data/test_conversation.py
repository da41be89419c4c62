from __future__ import annotations

import json

import pytest

from longalign_ray.data.conversation import Message, RecordError, parse_record


def parse(record: object):
    return parse_record(json.dumps(record), source="a.jsonl", line_number=7)


def test_a_record_keeps_its_messages_and_gets_a_name() -> None:
    talk = parse({"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]})
    assert talk.messages == (Message("user", "Hi"), Message("assistant", "Hello"))
    assert (talk.example_id, talk.source) == ("a.jsonl:7", "a.jsonl")
    assert talk.as_dicts() == [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert parse({"id": "x1", "messages": talk.as_dicts()}).example_id == "x1"


USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ([], "no_messages", "messages"),
        ({"text": "x"}, "no_messages", "messages"),
        ({"messages": []}, "no_messages", "messages"),
        ({"messages": ["Hi"]}, "no_messages", "message 0 is a str"),
        ({"messages": [USER]}, "no_assistant_turn", "nothing to learn"),
        ({"messages": [{"role": "alien", "content": "x"}, ASSISTANT]}, "unknown_role", "'alien'"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "empty_assistant_turn", "message 1"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "no_text", "NoneType"),
    ],
)
def test_bad_records_have_a_reason_and_a_detail(record: object, reason: str, detail: str) -> None:
    with pytest.raises(RecordError, match=detail) as caught:
        parse(record)
    assert caught.value.reason == reason


@pytest.mark.parametrize("line", ["{broken", b"\xff\xfe", ""])
def test_broken_json(line: str | bytes) -> None:
    with pytest.raises(RecordError, match="not valid JSON") as caught:
        parse_record(line, source="a", line_number=1)
    assert caught.value.reason == "broken_json"
