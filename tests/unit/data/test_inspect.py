from __future__ import annotations

import numpy as np
import pytest

from longalign_ray.data.inspect import Segment, segments, sequences, show_example, show_pack, show_segments
from longalign_ray.data.store import Example, Pack
from longalign_ray.train.positions import reset_position_ids

ONE = Example("a", np.array([104, 105, 33, 46], np.int32), np.array([100, 0, 100, 100], np.uint8))
TWO = Example("b", np.array([120, 121, 122], np.int32), np.array([0, 30, 100], np.uint8))


def decode(ids: np.ndarray) -> str:
    return "".join(map(chr, ids.tolist()))


def test_segments_end_where_the_weight_changes_and_the_first_token_is_no_target() -> None:
    assert segments(ONE, decode) == [Segment("hi", 0), Segment("!.", 100)]
    assert segments(TWO, decode) == [Segment("x", 0), Segment("y", 30), Segment("z", 100)]


def test_brackets_and_colours_mark_the_same_text() -> None:
    parts = [*segments(ONE, decode), *segments(TWO, decode)]
    assert show_segments(parts, colour=False).plain == "hi[[!.]]x[[30 %: y]][[z]]"
    coloured = show_segments(parts, colour=True)
    assert coloured.plain == "hi!.x30 %: yz"
    styles = {coloured.plain[span.start : span.end]: str(span.style) for span in coloured.spans}
    assert styles["hi"] == styles["x"] == "dim"
    assert styles["!."] == styles["z"] == "bold green"
    assert styles["y"] == "yellow"


@pytest.mark.parametrize("colour", [False, True])
def test_markup_in_a_text_is_shown_as_it_is(colour: bool) -> None:
    assert "[bold]x[/bold]" in show_segments([Segment("[bold]x[/bold]", 100)], colour=colour).plain


def test_long_texts_are_shortened_and_say_so() -> None:
    assert Segment("abcdefghij", 0).shortened(4) == "ab ... 6 characters ... ij"
    assert Segment("abcd", 0).shortened(4) == Segment("abcd", 0).shortened(None) == "abcd"


def test_an_example_is_headed_by_its_numbers() -> None:
    shown = show_example(TWO, decode, note="held out, ", colour=False, max_chars=None).plain
    assert shown == "b: held out, 3 tokens, 2 targets of weight 1.30 in all\nx[[30 %: y]][[z]]"


def test_a_pack_shows_its_boundaries_and_positions() -> None:
    pack = Pack.of([ONE, TWO])
    assert [one.example_id for one in sequences(pack)] == ["a", "b"]
    shown = show_pack(pack, decode, place="step 0", colour=False, max_chars=None).plain.splitlines()
    assert shown[0] == "step 0: 2 sequences, 7 tokens, 4 targets; cu_seqlens [0, 4, 7]"
    assert [line for line in shown if line.startswith("---")] == [
        "--- tokens 0 to 3, positions 0 to 3 ---",
        "--- tokens 4 to 6, positions 0 to 2 ---",
    ]
    assert reset_position_ids(pack.cu_seqlens).tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert shown[-1] == "x[[30 %: y]][[z]]"
