"""Mixtures worked by hand, and over a grid: nothing is lost without a count, shares are exact."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from longalign_ray.config import MixtureConfig, SourceConfig
from longalign_ray.data.mixture import training_rows, use_of_sources
from longalign_ray.data.store import ExampleIndex
from longalign_ray.errors import CorpusError


def make_index(lengths: dict[str, list[int]], heldout: tuple[int, ...] = ()) -> ExampleIndex:
    """Rows in order of the sources."""
    source = np.array([name for name, values in lengths.items() for _ in values], dtype=object)
    n = len(source)
    return ExampleIndex(
        example_id=np.array([f"e{i}" for i in range(n)], dtype=object),
        length=np.array([length for values in lengths.values() for length in values], np.int32),
        num_targets=np.ones(n, np.int32),
        sum_weights=np.ones(n),
        file=np.zeros(n, np.int32),
        row=np.arange(n, dtype=np.int32),
        source=source,
        heldout=np.isin(np.arange(n), heldout),
    )


def sources_of(**settings: dict[str, Any]) -> dict[str, SourceConfig]:
    return {name: SourceConfig.model_validate({"paths": ["x"], **values}) for name, values in settings.items()}


def uses_by_source(index: ExampleIndex, rows: np.ndarray) -> dict[str, list[int]]:
    """Times that each example is used, in order of the index."""
    times = np.bincount(rows, minlength=len(index))
    return {name: times[index.source == name].tolist() for name in dict.fromkeys(index.source)}


def test_without_settings_every_example_is_used_once() -> None:
    index = make_index({"corpus": [5, 9, 2, 7]}, heldout=(1,))
    for epoch in (0, 3):
        rows, uses = training_rows(index, MixtureConfig(), {}, seed=1, epoch=epoch)
        assert rows.tolist() == [0, 2, 3]
        assert rows.dtype == np.int64
        use = uses["corpus"]
        assert (use.available, use.examples, use.tokens, use.left_out) == (3, 3, 14, {})


def test_repeats() -> None:
    index = make_index({"a": [1] * 4, "b": [1] * 4, "c": [1] * 4})
    sources = sources_of(a={"repeat": 2}, b={"repeat": 1.5}, c={"repeat": 0.25})
    rows, uses = training_rows(index, MixtureConfig(), sources, seed=0, epoch=0)
    times = uses_by_source(index, rows)
    assert times["a"] == [2, 2, 2, 2]
    assert sorted(times["b"]) == [1, 1, 2, 2]
    assert sorted(times["c"]) == [0, 0, 0, 1]
    assert uses["c"].left_out == {"over_share": 3}


def test_weights_by_examples_fill_the_epoch_until_a_source_is_used_up() -> None:
    # Shares 1/4 and 3/4: 10 / (1/4) = 40 and 60 / (3/4) = 80, so the epoch has 40 examples: 10 and 30.
    index = make_index({"long": [100] * 10, "chat": [10] * 60})
    sources = sources_of(long={"weight": 0.5}, chat={"weight": 1.5})
    rows, uses = training_rows(index, MixtureConfig(), sources, seed=0, epoch=0)
    assert (uses["long"].examples, uses["chat"].examples, len(rows)) == (10, 30, 40)
    assert uses["long"].left_out == {}
    assert uses["chat"].left_out == {"over_share": 30}
    # The second epoch takes the other 30.
    later, _ = training_rows(index, MixtureConfig(), sources, seed=0, epoch=1)
    assert sorted(uses_by_source(index, np.concatenate([rows, later]))["chat"]) == [1] * 60
    assert use_of_sources(index, MixtureConfig(), sources, seed=0, epochs=2)["chat"].left_out == {}


def test_repeat_stretches_a_weighted_epoch() -> None:
    # 2 x 10 / (1/4) = 80 = 60 / (3/4): both used up, the first twice.
    index = make_index({"long": [100] * 10, "chat": [10] * 60})
    sources = sources_of(long={"weight": 1, "repeat": 2}, chat={"weight": 3})
    rows, uses = training_rows(index, MixtureConfig(), sources, seed=0, epoch=0)
    assert uses_by_source(index, rows) == {"long": [2] * 10, "chat": [1] * 60}
    assert uses["chat"].left_out == {}


def test_weights_by_tokens() -> None:
    # 1,000 tokens of each; shares 0.8 and 0.2: min(1,000 / 0.8, 1,000 / 0.2) = 1,250 tokens: 1,000 and 250.
    index = make_index({"long": [100] * 10, "chat": [10] * 100})
    sources = sources_of(long={"weight": 0.8}, chat={"weight": 0.2})
    _, uses = training_rows(index, MixtureConfig(by="tokens"), sources, seed=0, epoch=0)
    assert (uses["long"].tokens, uses["chat"].tokens) == (1000, 250)
    assert (uses["long"].examples, uses["chat"].examples) == (10, 25)
    assert uses["chat"].left_out == {"over_share": 75}


def test_fractions_of_an_example_are_carried_into_the_next_epoch() -> None:
    # Shares 1/6 and 5/6; 10 / (5/6) = 12: 2 and 10 an epoch. With half of it, 1 and 5; with a quarter, 1/2 and 2 1/2.
    index = make_index({"a": [1] * 4, "b": [1] * 10, "c": [1] * 100})
    for repeat, expected in (
        (1, [(2, 10), (2, 10)]),
        (0.5, [(1, 5), (1, 5)]),
        (0.25, [(1, 3), (0, 2), (1, 3), (0, 2)]),
    ):
        sources = sources_of(a={"weight": 0.1}, b={"weight": 0.5, "repeat": repeat}, c={"weight": 0})
        for epoch, numbers in enumerate(expected):
            _, uses = training_rows(index, MixtureConfig(), sources, seed=0, epoch=epoch)
            assert (uses["a"].examples, uses["b"].examples) == numbers
            assert uses["c"].left_out == {"over_share": 100}


def test_caps_are_the_same_examples_in_every_epoch() -> None:
    index = make_index({"a": [1] * 50, "b": [1] * 10})
    sources = sources_of(a={"max_examples": 7}, b={})
    found = [training_rows(index, MixtureConfig(), sources, seed=3, epoch=epoch) for epoch in range(3)]
    assert len({tuple(rows.tolist()) for rows, _ in found}) == 1
    assert found[0][1]["a"].left_out == {"over_max_examples": 43}
    assert found[0][1]["a"].examples == 7
    assert found[0][1]["b"].examples == 10


def test_amounts_of_long_examples_are_nested() -> None:
    index = make_index({"chat": [10] * 30 + [8_192] * 3, "long": [20_000] * 40}, heldout=(31, 40))
    short = set(np.flatnonzero((index.length < 8_192) & ~index.heldout).tolist())
    chosen = []
    for amount in (0, 5, 10, 41, 1_000):
        rows, uses = training_rows(index, MixtureConfig(max_long_examples=amount), {}, seed=0, epoch=0)
        assert short <= set(rows.tolist())
        chosen.append(set(rows.tolist()) - short)
        left_out = sum(use.left_out.get("over_max_long_examples", 0) for use in uses.values())
        assert len(chosen[-1]) == min(amount, 41) == 41 - left_out
    assert all(fewer <= more for fewer, more in itertools.pairwise(chosen))


def test_a_source_without_examples() -> None:
    index = make_index({"a": [1] * 5, "b": [9_000] * 5})
    sources = sources_of(a={"weight": 1}, b={"weight": 1}, none={"weight": 1})
    with pytest.raises(CorpusError, match=r"corpus\.sources\.none: its weight is 1\.0 and it has no example"):
        training_rows(index, MixtureConfig(), sources, seed=0, epoch=0)
    del sources["none"]
    rows, uses = training_rows(index, MixtureConfig(max_long_examples=0), sources, seed=0, epoch=0)
    assert rows.tolist() == [0, 1, 2, 3, 4]  # what the knob emptied leaves its share to the rest
    assert uses["b"].left_out == {"over_max_long_examples": 5}


def test_seed_and_other_sources() -> None:
    index = make_index({"a": [1] * 50, "b": [1] * 50})
    sources = sources_of(a={"repeat": 0.5}, b={"repeat": 0.5})

    def rows_of(seed: int, epoch: int, **others: SourceConfig) -> list[int]:
        rows, _ = training_rows(index, MixtureConfig(), {**sources, **others}, seed=seed, epoch=epoch)
        return rows[rows < 50].tolist()

    assert rows_of(0, 0) == rows_of(0, 0)
    assert rows_of(0, 0) != rows_of(1, 0)
    assert rows_of(0, 0) != rows_of(0, 1)
    assert rows_of(0, 0) == rows_of(0, 0, b=SourceConfig(paths=("x",), max_examples=3))


GRID = list(
    itertools.product(
        ("examples", "tokens"),
        (None, (1, 1, 1), (0.1, 0.7, 0.2), (5, 0, 1)),
        ((1, 1, 1), (0.3, 2.5, 1)),
        (None, 0, 4),
        (None, 6),
    )
)


@pytest.mark.parametrize(("by", "weights", "repeats", "max_long", "cap"), GRID)
@pytest.mark.parametrize("seed", [0, 1])
def test_conservation_and_shares(by, weights, repeats, max_long, cap, seed: int) -> None:
    random = np.random.default_rng([seed, 7])
    index = make_index(
        {name: random.integers(1, 400, size).tolist() for name, size in (("a", 13), ("b", 61), ("c", 29))},
        heldout=(0, 20, 90),
    )
    sources = {
        name: SourceConfig(paths=("x",), repeat=repeat, weight=weights and weights[number], max_examples=cap)
        for number, (name, repeat) in enumerate(zip("abc", repeats, strict=True))
    }
    mixture = MixtureConfig(by=by, max_long_examples=max_long, long_from=350)
    longest = {name: int(index.length[index.source == name].max()) for name in sources}
    pool, plain = training_rows(
        index, mixture, sources_of(**{n: {"max_examples": cap} for n in "abc"}), seed=seed, epoch=0
    )
    amounts = {name: plain[name].tokens if by == "tokens" else plain[name].examples for name in sources}
    every_epoch = []
    for epoch in range(5):
        rows, uses = training_rows(index, mixture, sources, seed=seed, epoch=epoch)
        every_epoch.append(rows)
        assert not index.heldout[rows].any()
        assert len(rows) == sum(use.examples for use in uses.values())
        for name, use in uses.items():
            own = rows[index.source[rows] == name]
            assert use.available == ((index.source == name) & ~index.heldout).sum()
            assert use.available == len(set(own.tolist())) + sum(use.left_out.values())
            assert (use.examples, use.tokens) == (len(own), index.length[own].sum())
            assert cap is None or len(set(own.tolist())) <= cap
        assert max_long is None or (index.length[np.unique(rows)] >= 350).sum() <= max_long
        if weights:
            limits = [
                repeat * amounts[name] / weight
                for name, repeat, weight in zip("abc", repeats, weights, strict=True)
                if weight and amounts[name]
            ]
            size = min(limits)
            for name, weight in zip("abc", weights, strict=True):
                if amounts[name]:
                    got = uses[name].tokens if by == "tokens" else uses[name].examples
                    assert abs(got - weight * size) < (longest[name] if by == "tokens" else 1)
        else:
            for name, repeat in zip("abc", repeats, strict=True):
                kept = uses[name].available - sum(
                    uses[name].left_out.get(reason, 0) for reason in ("over_max_long_examples", "over_max_examples")
                )
                assert abs(uses[name].examples - repeat * kept) < 1
    # Within a source no example is more than one use ahead of another over all epochs.
    over_all = use_of_sources(index, mixture, sources, seed=seed, epochs=5)
    times = uses_by_source(index, np.concatenate(every_epoch))
    for name, use in over_all.items():
        used = sorted(number for number in times[name] if number)
        assert use.available == len(used) + sum(use.left_out.values())
        if sources[name].weight == 0:
            assert not used
            continue
        assert (used[-1] - used[0] if used else 0) <= 1
        assert set(np.concatenate(every_epoch).tolist()) <= set(pool.tolist())
        if use.left_out.get("over_share"):
            assert used[-1:] in ([], [1])  # nothing twice while others of the source wait


def test_observed_token_shares_of_a_large_mixture() -> None:
    random = np.random.default_rng(0)
    index = make_index(
        {
            "chat": np.minimum(random.lognormal(6.8, 1, 9_000), 8_192).astype(int).clip(1).tolist(),
            "long": random.integers(8_192, 65_536, 1_000).tolist(),
        }
    )
    sources = sources_of(chat={"weight": 0.25, "repeat": 3}, long={"weight": 0.75})
    rows, uses = training_rows(index, MixtureConfig(by="tokens"), sources, seed=0, epoch=2)
    tokens = index.length[rows].sum()
    assert abs(uses["long"].tokens / tokens - 0.75) < 65_536 / tokens
    assert len(rows) > 1_000  # 9,000 chats hold a third of their tokens, so some of them are used twice
