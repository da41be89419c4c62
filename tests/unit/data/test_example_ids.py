from __future__ import annotations

import pyarrow as pa
import pytest

from longalign_ray.data.example_ids import unique_ids


@pytest.mark.parametrize(
    ("names", "made"),
    [
        ("", ""),
        ("a b c", "a b c"),
        ("a a a", "a a#2 a#3"),
        ("a b a b b", "a b a#2 b#2 b#3"),
        ("a b a a#2 a", "a b a#3 a#2 a#4"),
        ("a a#2 a#2 a", "a a#2 a#2#2 a#3"),
    ],
)
def test_equal_names_are_numbered(names: str, made: str) -> None:
    for chunk in (1, 2, 100):
        words = names.split()
        chunks = [words[first : first + chunk] for first in range(0, len(words), chunk)]
        unique, num_renamed = unique_ids(pa.chunked_array(chunks, pa.string()))
        assert unique.tolist() == made.split()
        assert num_renamed == sum(a != b for a, b in zip(words, made.split(), strict=True))
