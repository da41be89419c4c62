"""Mangled records: what years of scripts, editors and full disks leave in a corpus. Seeded."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

GOOD = [
    {
        "id": "chat",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Was ist 2 + 2? 二加二？ 😀"},
            {"role": "assistant", "content": "Four.", "loss_weight": 0.5},
        ],
    },
    {
        "id": "call",
        "tools": [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Add 2 and 2."}]},
            {"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}]},
            {"role": "tool", "content": "4", "tool_call_id": "c1"},
            {"role": "assistant", "content": "Four."},
        ],
    },
    {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}], "system": "Be kind."},
    {"instruction": "Sort.", "input": "3 1 2", "output": "1 2 3", "history": [["Hi", "Hello"]]},
    {"id": 7, "prompt": "The sky is", "completion": "blue."},
    {"text": "Once upon a time, there was a king."},
]
ODD: list[Any] = [
    *(None, True, 0, -1, 10**100, 10**4200, 1.5, float("nan"), float("inf"), "", " \n", "x", "\ud800", "\0", "user"),
    *([], [None], [[]], {}, {"role": "user"}, [{"role": "assistant", "content": "x"}], "[[[", '{"a": NaN}'),
]


def mangled_lines(number: int, *, seed: int) -> Iterator[bytes]:
    """That many lines, each a good record with one or more wounds; none holds a line break."""
    source = random.Random(seed)
    for _ in range(number):
        record = json.loads(json.dumps(source.choice(GOOD)))
        for _ in range(source.choice([1, 1, 2, 4])):
            _wound(source, record)
        if source.random() < 0.3:
            line = _wounded_bytes(source, json.dumps(record, ensure_ascii=source.random() < 0.5))
        else:
            line = json.dumps(record).encode()
        yield line.replace(b"\n", b" ")


def _places(value: Any, *, depth: int = 6) -> list[tuple[Any, Any]]:
    """Every (container, key) inside a JSON value, down to a depth."""
    if depth == 0 or not isinstance(value, dict | list):
        return []
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    return [(value, key) for key in keys] + [place for key in keys for place in _places(value[key], depth=depth - 1)]


def _wound(source: random.Random, record: Any) -> None:
    places = _places(record)
    if not places:
        return
    container, key = source.choice(places)
    kind = source.choice(["type", "type", "remove", "rename", "double", "swap", "deep", "surrogate", "cut"])
    if kind == "type":
        container[key] = copy.deepcopy(source.choice(ODD))
    elif kind == "remove":
        del container[key]
    elif kind == "rename" and isinstance(container, dict):
        container[source.choice([key[:-1], key.upper(), "x", "role", "content", "text"])] = container.pop(key)
    elif kind == "double" and isinstance(container, list):
        container.insert(key, copy.deepcopy(container[key]))
    elif kind == "swap" and isinstance(container, list):
        source.shuffle(container)
    elif kind == "deep":
        for _ in range(source.choice([3, 70, 200])):
            container[key] = [container[key]] if source.random() < 0.5 else {"content": container[key]}
    elif isinstance(container[key], str) and kind == "surrogate":
        container[key] += source.choice(["\ud83d", "\ude00x", "\ue000", "\0", "\u2028", "\x1b[0m"])
    elif isinstance(container[key], str):
        container[key] = container[key][: len(container[key]) // 2]


def _wounded_bytes(source: random.Random, text: str) -> bytes:
    line = text.encode("utf-8", "surrogatepass")
    kind = source.choice(["truncate", "flip", "nul", "invalid", "latin", "bom", "trailing", "deep", "empty"])
    middle = source.randrange(len(line))
    changed = {
        "truncate": line[:middle],
        "flip": line[:middle] + bytes([line[middle] ^ 1 << source.randrange(8)]) + line[middle + 1 :],
        "nul": line[:middle] + b"\0" + line[middle:],
        "invalid": line[:middle] + source.choice([b"\xff", b"\xc3", b"\xed\xa0\x80"]) + line[middle:],
        "latin": text.encode("latin-1", "replace"),
        "bom": b"\xef\xbb\xbf" + line,
        "trailing": line + source.choice([b",", b"}", b" {}", b"\r"]),
        "deep": b"[" * 100_000,
        "empty": b'""',
    }
    return changed[kind]
