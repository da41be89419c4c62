"""Which examples an epoch trains on: caps, weights and repeats of the sources of a corpus. Pure and seeded.

Every source is an endless repetition of its examples in an order fixed by the seed, of which each epoch takes the next
part. So over the epochs no example is ever more than one use ahead of another of its source, and what one epoch leaves
out for its share comes first in the next:

    source of 5, 3 an epoch      a b c d e a b c d e a b ...
    epochs                       0 0 0 1 1 1 2 2 2 3 3 3

1. Held-out examples are in no source. Of the others with `long_from` tokens or more, `max_long_examples` stay.
2. A source keeps its first `max_examples`.
3. The part of an epoch is repeat * examples, without weights. With weights, shares are weight / sum of weights, and
   an epoch is as large as it can be with no source going beyond its `repeat`: its size is the least of
   repeat * (examples or tokens) / share, and each part is share * size.
4. Parts are exact fractions. Epoch e takes what starts in [e * part, (e + 1) * part): by examples it has its part
   rounded up or down, by tokens it differs from it by less than the longest example; over many epochs the shares are
   exact.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from longalign_ray.config import MixtureConfig, SourceConfig
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import CorpusError

PLAIN = SourceConfig(paths=("*",))  # the settings of a source that the recipe says nothing about


@dataclass(frozen=True, slots=True)
class SourceUse:
    """What becomes of a source: available = different examples used + sum of left_out."""

    available: int
    """Examples that are not held out."""
    examples: int
    """Uses of its examples, repeats included."""
    tokens: int
    """Tokens of those."""
    left_out: dict[str, int]
    """Examples not used, by reason: `over_max_long_examples`, `over_max_examples`, `over_share`."""


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    order: np.ndarray
    """int64[n]: index rows in the order in which epochs take them."""
    sizes: np.ndarray
    """int64[n]: what each counts: 1, or its tokens."""
    available: int
    left_out: dict[str, int]


def training_rows(
    index: ExampleIndex, mixture: MixtureConfig, sources: Mapping[str, SourceConfig], *, seed: int, epoch: int
) -> tuple[np.ndarray, dict[str, SourceUse]]:
    """int64[n]: rows of the index that the epoch trains on, ascending, a row once for each use; and what became of
    each source.

    A source of the index that `sources` lacks has the default settings. Without any settings, that is each row that is
    not held out, once. Raises CorpusError where a source with a weight has no example.
    """
    return _use(index, mixture, sources, seed=seed, epochs=range(epoch, epoch + 1))


def use_of_sources(
    index: ExampleIndex, mixture: MixtureConfig, sources: Mapping[str, SourceConfig], *, seed: int, epochs: int
) -> dict[str, SourceUse]:
    """What becomes of each source over all epochs; `left_out` counts what no epoch has."""
    return _use(index, mixture, sources, seed=seed, epochs=range(epochs))[1]


def _use(
    index: ExampleIndex, mixture: MixtureConfig, sources: Mapping[str, SourceConfig], *, seed: int, epochs: range
) -> tuple[np.ndarray, dict[str, SourceUse]]:
    settings = {name: sources.get(name, PLAIN) for name in _names(index, sources)}
    weighted = any(source.weight is not None for source in settings.values())
    by_tokens = weighted and mixture.by == "tokens"
    made = _sources(index, mixture, settings, seed=seed, by_tokens=by_tokens)
    parts = _parts_by_weight(made, settings) if weighted else _parts_by_repeat(made, settings)
    chosen: list[np.ndarray] = []
    uses: dict[str, SourceUse] = {}
    for name, source in made.items():
        rows = _rows_of_epochs(source, parts[name], epochs)
        over_share = len(source.order) - min(
            len(rows), len(source.order)
        )  # rows follow each other, so differ if they can
        uses[name] = SourceUse(
            available=source.available,
            examples=len(rows),
            tokens=int(index.length[rows].sum(dtype=np.int64)),
            left_out=source.left_out | ({"over_share": over_share} if over_share else {}),
        )
        chosen.append(rows)
    return np.sort(np.concatenate(chosen)), uses


def _names(index: ExampleIndex, sources: Mapping[str, SourceConfig]) -> list[str]:
    """Those of the recipe in its order, then any others of the index by name."""
    return [*sources, *sorted(set(index.source.tolist()) - set(sources))]


def _sources(
    index: ExampleIndex, mixture: MixtureConfig, settings: Mapping[str, SourceConfig], *, seed: int, by_tokens: bool
) -> dict[str, _Source]:
    """Rules 1 and 2."""
    training = ~index.heldout
    too_many = np.zeros(len(index), dtype=np.bool_)
    if mixture.max_long_examples is not None:
        long = np.flatnonzero(training & (index.length >= mixture.long_from))
        too_many[_shuffled(long, seed, "long examples")[mixture.max_long_examples :]] = True
    made: dict[str, _Source] = {}
    for name, source in settings.items():
        rows = np.flatnonzero(training & (index.source == name))
        order = _shuffled(rows, seed, f"source {name}")
        order = order[~too_many[order]]
        kept = order[: source.max_examples]
        left_out = {"over_max_long_examples": len(rows) - len(order), "over_max_examples": len(order) - len(kept)}
        sizes = index.length[kept].astype(np.int64) if by_tokens else np.ones(len(kept), np.int64)
        made[name] = _Source(kept, sizes, len(rows), {reason: number for reason, number in left_out.items() if number})
    return made


def _shuffled(rows: np.ndarray, seed: int, name: str) -> np.ndarray:
    """A permutation that depends on the seed, the name and the rows, not on what other sources there are."""
    return np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(rows)


def _parts_by_repeat(made: Mapping[str, _Source], settings: Mapping[str, SourceConfig]) -> dict[str, Fraction]:
    return {name: _exact(settings[name].repeat) * int(source.sizes.sum()) for name, source in made.items()}


def _parts_by_weight(made: Mapping[str, _Source], settings: Mapping[str, SourceConfig]) -> dict[str, Fraction]:
    """A source that the caps left empty leaves its share to the others."""
    weights = {name: _exact(settings[name].weight or 0.0) for name in made}
    for name, source in made.items():
        if weights[name] and not source.available:
            raise CorpusError(
                f"corpus.sources.{name}: its weight is {settings[name].weight} and it has no example to train on; see "
                f"rejects.jsonl for what was left out, give it other paths, or leave it out"
            )
        if not len(source.order):
            weights[name] = Fraction(0)
    limits = _parts_by_repeat(made, settings)
    size = min((limits[name] / weight for name, weight in weights.items() if weight), default=Fraction(0))
    return {name: weight * size for name, weight in weights.items()}


def _rows_of_epochs(source: _Source, part: Fraction, epochs: range) -> np.ndarray:
    """Rows that start in [first epoch * part, (last epoch + 1) * part) of the endless repetition."""
    if not part:
        return np.empty(0, np.int64)
    ends = np.cumsum(source.sizes)
    starts, period = ends - source.sizes, int(ends[-1])

    def starts_before(position: Fraction) -> int:
        rounds, rest = divmod(math.ceil(position), period)
        return rounds * len(starts) + int(np.searchsorted(starts, rest, side="left"))

    numbers = np.arange(starts_before(epochs.start * part), starts_before(epochs.stop * part))
    return source.order[numbers % len(starts)]


def _exact(number: float) -> Fraction:
    """The decimal fraction that the recipe says, so that 0.1 is 1/10."""
    return Fraction(repr(number))
