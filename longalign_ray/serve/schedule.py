"""How many tokens of each request the next step computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Demand:
    """Tokens that a request could have computed now: one while it decodes, else what is left of its prompt."""

    num_tokens: int
    kind: Literal["decode", "prompt", "score"]


def share_tokens(demands: Sequence[Demand], *, prefill_chunk: int, score_chunk: int) -> list[int]:
    """Tokens of each request in the next step: one of each that decodes, and up to `prefill_chunk` of prompts.

    Requests are in the order of their arrival. Half of the chunk is the oldest prompt's, which so never starves; the
    rest goes to the shortest first, so that a question does not wait behind a book. All tokens that are scored, whose
    logits a step holds at once, come to at most `score_chunk`.
    """
    shares = [1 if demand.kind == "decode" else 0 for demand in demands]
    prompts = [number for number, demand in enumerate(demands) if demand.kind != "decode"]
    left, left_to_score = prefill_chunk, score_chunk

    def give(number: int, most: int) -> None:
        nonlocal left, left_to_score
        demand = demands[number]
        given = min(most, demand.num_tokens - shares[number])
        if demand.kind == "score":
            given = min(given, left_to_score)
            left_to_score -= given
        shares[number] += given
        left -= given

    if prompts:
        give(prompts[0], -(-left // 2))
    for number in sorted(prompts, key=lambda number: demands[number].num_tokens - shares[number]):
        give(number, left)
    return shares
