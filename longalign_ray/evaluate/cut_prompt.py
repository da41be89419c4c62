"""Prompts that are too long, cut as LongBench cuts them: the middle goes, the instructions at both ends stay."""

from __future__ import annotations

from longalign_ray.data.template import Tokenizer


def without_middle(text: str, *, max_tokens: int, tokenizer: Tokenizer) -> tuple[str, int]:
    """The text with exactly 2 * int(max_tokens / 2) of its tokens, half from each end, and their number; whole and with
    the number of its tokens where there are no more than `max_tokens`, at least 2.

    As in the benchmark, the tokens that the tokenizer itself adds count, and the text is decoded without special ones;
    so the result may have a few tokens more or less when it is tokenised again.
    """
    ids = tokenizer(text, verbose=False)["input_ids"]
    if len(ids) <= max_tokens:
        return text, len(ids)
    half = max_tokens // 2
    ends = (ids[:half], ids[-half:])
    return "".join(tokenizer.decode(end, skip_special_tokens=True) for end in ends), 2 * half
