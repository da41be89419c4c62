"""Names of examples made unique over a corpus, so that a pack, a reject or a held-out set can point at one."""

from __future__ import annotations

import numpy as np
import pyarrow as pa


def unique_ids(names: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """object[n] of str, and how many were renamed: the first of equal names keeps it, the others get #2, #3, ...

    a b a a#2 a  ->  a b a#3 a#2 a#4
    """
    made = names.to_numpy(zero_copy_only=False)
    codes = names.combine_chunks().dictionary_encode().indices.to_numpy()
    uses = np.bincount(codes)
    if len(uses) == len(codes):
        return made, 0
    rows = np.flatnonzero(uses[codes] > 1)
    made = made.copy()
    taken = set(made)
    number: dict[str, int] = {}
    num_renamed = 0
    for row in rows:
        name = made[row]
        if name in number:
            while (candidate := f"{name}#{number[name] + 1}") in taken:
                number[name] += 1
            made[row] = candidate
            num_renamed += 1
        number[name] = number.get(name, 0) + 1
    return made, num_renamed
