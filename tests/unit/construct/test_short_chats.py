"""The short chats of the package: valid, varied, and with code that compiles."""

from __future__ import annotations

import ast
import json
import re
from importlib import resources

from longalign_ray.data.conversation import parse_record

LINES = resources.files("longalign_ray.construct").joinpath("short_chats.jsonl").read_text("utf-8").splitlines()
CHATS = [json.loads(line) for line in LINES]
ANSWERS = [message["content"] for chat in CHATS for message in chat["messages"][1::2]]


def _num_words(text: str) -> int:
    return len(text.split()) + len(re.findall(r"[\u4e00-\u9fff]", text))


def test_every_line_is_a_conversation_of_one_or_two_turns():
    assert len(CHATS) >= 80
    assert len({chat["id"] for chat in CHATS}) == len(CHATS)
    assert len({chat["messages"][0]["content"] for chat in CHATS}) == len(CHATS)
    for number, line in enumerate(LINES, start=1):
        conversation = parse_record(json.loads(line), source="short_chats.jsonl", line_number=number)
        roles = [message.role for message in conversation.messages]
        assert roles in (["user", "assistant"], ["user", "assistant"] * 2)


def test_answers_are_neither_curt_nor_long():
    assert all(20 <= _num_words(answer) <= 150 for answer in ANSWERS)
    assert len(set(ANSWERS)) == len(ANSWERS)


def test_some_are_chinese():
    assert sum(bool(re.search(r"[\u4e00-\u9fff]", chat["messages"][0]["content"])) for chat in CHATS) >= 6


def test_python_in_the_answers_compiles():
    blocks = [block for answer in ANSWERS for block in re.findall(r"```python\n(.*?)```", answer, re.DOTALL)]
    assert len(blocks) >= 8
    for block in blocks:
        ast.parse(block)


def test_equations_in_the_answers_hold():
    """Every `a × b ... = c` in plain numbers, as written; fractions such as 2/3 are left out."""
    number = r"\d[\d,]*(?:\.\d+)?"
    found = []
    for answer in ANSWERS:
        for match in re.finditer(rf"(?<![\d/.,])({number}(?: [×÷+−] {number})+) = ({number})(?!\d|/|\.\d)", answer):
            left, right = (part.replace(",", "").translate(str.maketrans("×÷−", "*/-")) for part in match.groups())
            found.append(match[0])
            assert abs(eval(left) - float(right)) < 1e-9, match[0]
    assert len(found) >= 12
