"""RULER's tracing and aggregation (arXiv 2404.06654, sections 3.2 and 3.3): a chain of variables in noise, the most
common words of a list, the most frequent words of a text whose words follow a zeta distribution.

Differences from the benchmark: above 4,096 tokens words are compounds (`word_lists.py`), as plain ones would run out,
and the solved example of the list stands in the user's message, as that of the variables does.
"""

from __future__ import annotations

import math
import random
import string
from itertools import pairwise

from longalign_ray.evaluate.ruler.samples import UNBOUNDED, Sample, Sampler
from longalign_ray.evaluate.ruler.word_lists import compound_words, plain_words
from longalign_ray.evaluate.ruler.words import RulerWords

NUM_HOPS = 4
EXAMPLE_LINES = 10  # of noise in the solved example, which then has about 400 tokens; the benchmark's has up to 500
NUM_COMMON = 10
# Below this length the benchmark repeats words less often, as too few would fit. Up to it words are plain ones, as too
# few compounds would fit.
SHORT_LENGTH = 4_096
ALPHA = 2.0
ZETA = math.pi**2 / 6  # of 2
CODED_CHARS = 6
NUM_FREQUENT = 3
TOKENS_PER_CODED_WORD = 50  # the vocabulary has a word for so many tokens of the length
FEWEST_CODED = 60  # with fewer the third word that is asked for may stand as often as the next one


def variable_sampler(words: RulerWords) -> Sampler:
    """Sizes are lines of noise among which a chain of five variables is assigned."""

    def one(size: int, rng: random.Random, *, num_chars: int) -> Sample:
        names: list[str] = []
        while len(names) <= NUM_HOPS:
            name = "".join(rng.choices(string.ascii_uppercase, k=num_chars))
            names += [name] if name not in names else []
        value = str(rng.randrange(10_000, 99_999))
        chain = [f"VAR {names[0]} = {value}"]
        chain += [f"VAR {later} = VAR {earlier}" for earlier, later in pairwise(names)]
        places = sorted(rng.sample(range(size), len(chain)))
        lines = [words.noise] * size
        for number, (place, statement) in enumerate(zip(places, chain, strict=True)):
            lines.insert(place + number, statement)
        values = {"context": "\n".join(lines), "query": value, "num_v": str(len(names))}
        return Sample(words.templates["variable_tracking"], values, names, shown_answer=" ".join(names))

    def make(size: int, number: int, rng: random.Random) -> Sample:
        example = one(EXAMPLE_LINES, rng, num_chars=3)
        sample = one(size, rng, num_chars=5)
        return Sample(sample.template, sample.values, sample.answers, example=example)

    return Sampler(make, least=NUM_HOPS + 1, most=UNBOUNDED)


def common_words_sampler(words: RulerWords, *, length: int) -> Sampler:
    """Sizes are different words, ten of which stand in the list 30 times and the others 3 times."""
    short = length < SHORT_LENGTH
    common_times, other_times = (6, 1) if short else (30, 3)
    of_example = (20, 3, 1) if short else (40, 10, 3)
    pool = plain_words() if length <= SHORT_LENGTH else compound_words()

    def one(size: int, often: int, seldom: int, rng: random.Random) -> Sample:
        drawn = rng.sample(pool, len(pool))[:size]  # a larger size begins with the smaller
        common = drawn[:NUM_COMMON]
        entries = common * often + drawn[NUM_COMMON:] * seldom
        rng.shuffle(entries)
        values = {"context": _numbered(entries), "query": ""}
        return Sample(words.templates["common_words_extraction"], values, common, shown_answer=_numbered(common))

    def make(size: int, number: int, rng: random.Random) -> Sample:
        example = one(*of_example, rng)
        sample = one(size, common_times, other_times, rng)
        return Sample(sample.template, sample.values, sample.answers, example=example)

    return Sampler(make, least=NUM_COMMON + 1, most=len(pool))


def frequent_words_sampler(words: RulerWords, *, length: int) -> Sampler:
    """Sizes are words of the text; word k of the vocabulary stands there size / (k^2 zeta(2)) times, and the first is
    dots, which are noise."""
    num_words = length // TOKENS_PER_CODED_WORD

    def make(size: int, number: int, rng: random.Random) -> Sample:
        coded: dict[str, None] = {}
        while len(coded) < num_words:
            coded["".join(rng.choices(string.ascii_lowercase, k=CODED_CHARS))] = None
        vocabulary = ["...", *list(coded)[1:]]
        text: list[str] = []
        for rank, word in enumerate(vocabulary, start=1):
            text += [word] * int(size * rank**-ALPHA / ZETA)
        rng.shuffle(text)
        values = {"context": " ".join(text), "query": ""}
        return Sample(words.templates["freq_words_extraction"], values, vocabulary[1 : NUM_FREQUENT + 1])

    return Sampler(make, least=FEWEST_CODED, most=UNBOUNDED)


def _numbered(entries: list[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(entries, start=1))
