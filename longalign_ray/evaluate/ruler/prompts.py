"""The prompt of a sample of RULER, and the longest one that leaves room for the answer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Literal

from longalign_ray.data.template import Tokenizer, encode_prompt, render_prompt, tokenizer_prefix
from longalign_ray.evaluate.ruler.longest_fit import longest_fit
from longalign_ray.evaluate.ruler.samples import Sample, Sampler

PrefixOf = Literal["assistant", "user"]
PATHS: dict[PrefixOf, str] = {"assistant": "/completions", "user": "/chat/completions"}


@dataclass(frozen=True, slots=True)
class RulerPrompt:
    """`size` is the sampler's; `request` has the prompt alone; `shared_tokens` about how much other samples share."""

    sample: Sample
    size: int
    request: dict[str, Any]
    num_tokens: int
    shared_tokens: int


def longest_prompt(
    sampler: Sampler, *, limit: int, number: int, seed: str, guess: int, tokenizer: Tokenizer, prefix_of: PrefixOf
) -> RulerPrompt | None:
    """Sample `number` as long as at most `limit` tokens allow; None where there is no room for the smallest."""
    made: dict[int, RulerPrompt] = {}

    def count_tokens(size: int) -> int:
        sample = sampler.make(size, number, random.Random(seed))
        made[size] = _prompt(sample, size, tokenizer, prefix_of)
        return made[size].num_tokens

    size = longest_fit(count_tokens, limit=limit, least=sampler.least, most=sampler.most, guess=guess)
    return None if size is None else made[size]


def _prompt(sample: Sample, size: int, tokenizer: Tokenizer, prefix_of: PrefixOf) -> RulerPrompt:
    """The assistant's prefix follows the rendered chat template, of which what a server puts before every text, such as
    BOS, is left out. It is sent as text, which takes a tenth of the memory of token ids."""
    question, prefix = sample.texts()
    if prefix_of == "user":
        messages = [{"role": "user", "content": f"{question}{prefix}"}]
        request, num_tokens = {"messages": messages}, len(encode_prompt(tokenizer, messages))
        num_chars = len(question)
    else:
        rendered = render_prompt(tokenizer, [{"role": "user", "content": question}])
        text = rendered.removeprefix(tokenizer_prefix(tokenizer)) + prefix
        request, num_tokens = {"prompt": text}, len(tokenizer(text, verbose=False)["input_ids"])
        num_chars = len(text)
    return RulerPrompt(sample, size, request, num_tokens, num_tokens * sample.shared_chars // num_chars)
