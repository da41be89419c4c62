"""Equal and similar conversations, constructed and real."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from longalign_ray.config import DedupConfig
from longalign_ray.data import dedup
from longalign_ray.data.conversation import Conversation, Message, parse_record
from longalign_ray.data.corpus import corpus_files, cut_into_slices, read_records
from longalign_ray.data.dedup import (
    Duplicates,
    content_hash,
    find_duplicates,
    fingerprint,
    fingerprint_bytes,
    signature,
    without_duplicates,
)
from longalign_ray.data.words import ngram_hashes, words
from longalign_ray.errors import ConfigError

NEAR = DedupConfig(method="near")


def talk(*texts: str, system: str | None = None) -> Conversation:
    roles = ("user", "assistant")
    turns = [Message(roles[number % 2], text) for number, text in enumerate(texts)]
    first = [] if system is None else [Message("system", system)]
    return Conversation("x", tuple(first + turns), "f")


def find(conversations: list[Conversation], config: DedupConfig = NEAR) -> Duplicates:
    fingerprints = [np.frombuffer(fingerprint(item, config), np.uint8) for item in conversations]
    assert {len(one) for one in fingerprints} == {fingerprint_bytes(config)}
    return find_duplicates(np.stack(fingerprints), config)


def test_the_hash_is_of_roles_and_texts_without_the_system() -> None:
    same = [talk("a", "b"), talk(" a\n", "b"), talk("a", "b", system="s")]
    assert len({content_hash(item) for item in same}) == 1
    call = ({"type": "function", "function": {"name": "f", "arguments": {}}},)
    others = [
        talk("a", "c"),
        talk("b", "a"),
        talk("ab", ""),
        talk("a", "b", "c", "d"),
        talk("A", "b"),
        Conversation("x", (Message("user", "a"), Message("assistant", "b", tool_calls=call)), "f"),
        Conversation("x", (), "f", text="a b"),
    ]
    assert len({content_hash(item) for item in [*same, *others]}) == 1 + len(others)


def test_exact_keeps_the_first() -> None:
    found = find([talk(text, "yes") for text in "abacba"], DedupConfig(method="exact"))
    assert found.kept.tolist() == [0, 1, 0, 3, 1, 0]
    assert found.equal.tolist() == [False, False, True, False, True, True]
    none = find([talk(text, "yes") for text in "aa"], DedupConfig())
    assert (none.kept.tolist(), none.equal.tolist()) == ([0, 1], [False, False])


@pytest.mark.parametrize("config", [DedupConfig(method="exact"), NEAR])
def test_rows_of_a_record_go_together(config: DedupConfig) -> None:
    # (file, line, text): a record is one or more examples of the same line
    rows = [(0, 1, "a"), (0, 1, "a"), (0, 2, "b"), (1, 1, "a"), (1, 1, "a"), (1, 2, "c"), (2, 5, "b"), (2, 6, "a")]
    table = pa.table(
        {
            "example_id": [f"e{number}" for number in range(len(rows))],
            "file": [file for file, _, _ in rows],
            "line": [line for _, line, _ in rows],
            "fingerprint": pa.array(
                [fingerprint(talk(text, "yes"), config) for _, _, text in rows], pa.binary(fingerprint_bytes(config))
            ),
        }
    )
    for given in (table, pa.concat_tables([table.slice(0, 3), table.slice(3)])):
        left, rejects = without_duplicates(given, ["x", "y", "z"], config)
        assert left["example_id"].to_pylist() == ["e0", "e1", "e2", "e5"]
        assert {file: [(r["file"], r["line"], r["kept"]) for r in of] for file, of in rejects.items()} == {
            1: [("y", 1, "e0")],
            2: [("z", 5, "e2"), ("z", 6, "e0")],
        }
        assert rejects[2][1]["detail"] == "the text of e0 (x, line 1), which is kept"
    assert without_duplicates(table, ["x", "y", "z"], DedupConfig()) == (table, {})


def sentences(seed: int, number: int = 60) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(f"w{i}" for i in random.integers(0, 5_000, 10)) for _ in range(number)]


def jaccard(one: Conversation, other: Conversation) -> float:
    sets = [set(ngram_hashes(words("\n".join(m.content for m in item.messages)), 5).tolist()) for item in (one, other)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_near_finds_small_changes_and_leaves_large_ones() -> None:
    base = sentences(0)
    document = " ".join(base)
    conversations = [
        talk(document, "an answer"),
        talk(document.upper().replace(" ", ", "), "An answer!"),  # case and punctuation
        talk(" ".join([*base[:50], "quite other words here", *base[50:]]), "an answer"),
        talk(" ".join(base[:30] + sentences(1)[:30]), "an answer"),  # half of it
        talk(" ".join(sentences(2)), "an answer"),
        talk(document, "an answer"),
        talk(" ".join([*base[:50], "quite other words here", *base[50:]]), "an answer"),
    ]
    assert jaccard(conversations[0], conversations[2]) > 0.95
    assert jaccard(conversations[0], conversations[3]) < 0.5
    found = find(conversations)
    assert found.kept.tolist() == [0, 0, 0, 3, 4, 0, 0]
    assert found.equal.tolist() == [False, False, False, False, False, True, True]


def test_near_in_chinese() -> None:
    random = np.random.default_rng(0)
    text = "".join(chr(0x4E00 + int(i)) for i in random.integers(0, 3_000, 400))
    other = "".join(chr(0x4E00 + int(i)) for i in random.integers(0, 3_000, 400))
    found = find([talk(text, "好"), talk(text[:200] + "一二三" + text[200:], "好。"), talk(other, "好")])
    assert found.kept.tolist() == [0, 0, 2]


def test_a_chain_loses_only_what_is_like_a_kept_one() -> None:
    base = sentences(3)
    chain = [talk(" ".join(sentences(4)[:shift] + base[shift:]), "yes") for shift in (0, 5, 10, 15)]
    similarity = [jaccard(chain[0], item) for item in chain]
    assert similarity[1] > 0.83 > 0.77 > similarity[2]
    assert find(chain).kept.tolist() == [0, 0, 2, 2]
    between = [chain[0], chain[2], chain[1]]  # like both of those that stay: named is the first
    assert find(between).kept.tolist() == [0, 1, 0]


def test_short_and_wordless_texts() -> None:
    conversations = [talk("hi", "yo"), talk("Hi!", "yo"), talk("??", "!"), talk("??", "..."), talk("hi", "no")]
    assert find(conversations).kept.tolist() == [0, 0, 2, 3, 4]


def test_the_threshold_decides() -> None:
    base = sentences(5)
    pair = [talk(" ".join(base), "yes"), talk(" ".join(sentences(6)[:15] + base[15:]), "yes")]
    assert 0.55 < jaccard(*pair) < 0.65
    assert find(pair, DedupConfig(method="near", threshold=0.8)).kept.tolist() == [0, 1]
    assert find(pair, DedupConfig(method="near", threshold=0.4)).kept.tolist() == [0, 0]


def test_signatures_estimate_the_similarity(monkeypatch: pytest.MonkeyPatch) -> None:
    base = sentences(7, 200)
    whole = talk(" ".join(base), "yes")
    config = DedupConfig(method="near", num_permutations=1_024)
    first = np.frombuffer(signature(whole, config), "<u4")
    for share in (20, 100, 180):
        other = talk(" ".join(sentences(8, 200)[:share] + base[share:]), "yes")
        estimate = float((first == np.frombuffer(signature(other, config), "<u4")).mean())
        true = jaccard(whole, other)
        assert abs(estimate - true) < 4 * np.sqrt(true * (1 - true) / 1_024)
    monkeypatch.setattr(dedup, "SHINGLES_AT_A_TIME", 7)
    assert signature(whole, config) == first.tobytes()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasketch", None)
    dedup.check_dedup(DedupConfig(method="exact"))
    with pytest.raises(ConfigError, match=r"longalign_ray\[dedup\]"):
        dedup.check_dedup(NEAR)


def test_real_chats(shared_data) -> None:
    """v1_sft_demo holds the same chats as other files under other keys."""
    conversations = []
    for name in ("alpaca_en_demo", "fastchat_dummy", "v1_sft_demo"):
        (file,) = corpus_files([str(shared_data / "chat" / f"{name}.jsonl")])
        for part in cut_into_slices(file):
            conversations += [
                parse_record(record, source=name, line_number=line) for line, record in read_records(part)
            ]
    found = find(conversations)
    left_out = np.flatnonzero(found.kept != np.arange(len(conversations)))
    assert len(left_out) > 100
    assert (found.kept[left_out] < left_out).all()
    assert (found.kept[found.kept] == found.kept).all()
    near = [row for row in left_out.tolist() if not found.equal[row]]
    assert near
    assert min(jaccard(conversations[row], conversations[found.kept[row]]) for row in near) > 0.8 - 5 * 0.035
