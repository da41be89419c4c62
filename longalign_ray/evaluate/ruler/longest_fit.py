"""The longest prompt that fits, where a tokenizer alone can say how long one is."""

from __future__ import annotations

from collections.abc import Callable


def longest_fit(count_tokens: Callable[[int], int], *, limit: int, least: int, most: int, guess: int) -> int | None:
    """The largest size from `least` to `most` that has at most `limit` tokens; None where `least` has more.

    count_tokens: tokens of a prompt of a size, growing with it; where it wavers, the size found fits and the next one
    does not. It is called as seldom as may be: first at `guess`, then where a straight line through the ends of what is
    left meets the limit, and in the middle where the line did not halve what is left.
    """
    least_tokens = count_tokens(least)
    if least_tokens > limit:
        return None
    low, low_tokens = least, least_tokens
    high, high_tokens = most + 1, None
    size = guess
    while high - low > 1:
        left = high - low
        size = min(max(size, low + 1), high - 1)
        tokens = count_tokens(size)
        if tokens <= limit:
            low, low_tokens = size, tokens
        else:
            high, high_tokens = size, tokens
        if high_tokens is None:  # most + 1 was never asked: the line so far goes on
            slope = (low_tokens - least_tokens) / (low - least)
        else:
            slope = (high_tokens - low_tokens) / (high - low)
        on_line = low + int((limit - low_tokens) / slope) if slope > 0 else most
        size = (low + high) // 2 if high_tokens is not None and 2 * (high - low) > left else on_line
    return low
