"""The forecast of memory: published peaks, numbers worked by hand, searches against plain loops."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any, TypedDict

import pytest

from longalign_ray.errors import ConfigError
from longalign_ray.train.memory import (
    CPU_FIXED,
    GRANULARITY,
    LADDER,
    USABLE,
    Levers,
    cheapest_levers,
    longest_context,
    memory_terms,
    sp_degrees,
    with_levers,
)
from longalign_ray.train.model_shape import ModelShape

LLAMA_8B = ModelShape(layers=32, hidden=4_096, heads=32, kv_heads=8, head_dim=128, mlp=14_336, vocabulary=128_256)
LLAMA_70B = ModelShape(layers=80, hidden=8_192, heads=64, kv_heads=8, head_dim=128, mlp=28_672, vocabulary=128_256)
QWEN_32B = ModelShape(
    layers=64, hidden=5_120, heads=64, kv_heads=8, head_dim=128, mlp=25_600, vocabulary=151_936, qk_norm=True
)


class Room(TypedDict):
    gpu_bytes: float
    host_bytes: float


ROOM: Room = {"gpu_bytes": 80e9, "host_bytes": 1_800e9}

ALL_ON_HOST = ("optimizer_on_host", "parameters_on_host")
LONG = ("tiled_mlp", "checkpoints_on_host", "optimizer_on_host")

# From the notes in ArcticTraining's recipe files for H100 and H200: tokens of a pack, ranks, all of which share it,
# levers, whether the head is tiled, and the peak in GB of a GPU.
PUBLISHED = [
    (LLAMA_8B, 32_000, 1, ALL_ON_HOST, False, 71.91),
    (LLAMA_8B, 65_000, 1, ALL_ON_HOST, False, 137.36),
    (LLAMA_8B, 300_000, 1, ALL_ON_HOST, True, 134.96),
    (LLAMA_8B, 650_000, 1, (*ALL_ON_HOST, "checkpoints_on_host"), True, 126.81),
    (LLAMA_8B, 1_200_000, 1, (*ALL_ON_HOST, "checkpoints_on_host", "tiled_mlp"), True, 136.15),
    (QWEN_32B, 7_000_000, 32, LONG, True, 71.55),
    (QWEN_32B, 15_000_000, 64, LONG, True, 71.0),
    (LLAMA_70B, 4_000_000, 32, LONG, True, 47.70),
    (LLAMA_70B, 10_000_000, 64, LONG, True, 53.83),
]


def published_levers(ranks: int, names: tuple[str, ...]) -> Levers:
    return with_levers(Levers(ranks=ranks, sp_degree=ranks), names)


def test_published_peaks() -> None:
    """With the head of those runs: 12 bytes a logit, of all positions or of 1,024, and no gradient of its own."""
    errors = []
    for shape, tokens, ranks, names, tiled_head, peak in PUBLISHED:
        terms = memory_terms(shape, tokens_per_rank=tokens / ranks, levers=published_levers(ranks, names))
        their_head = 12 * shape.vocabulary * (1_024 if tiled_head else tokens / ranks)
        errors.append(replace(terms, head=their_head).rank / 1e9 / peak - 1)
    told = [f"{error:+.1%}" for error in errors]
    assert max(map(abs, errors)) < 0.1, told  # the worst is +9.5 %, of 8B at 300k
    assert abs(sum(errors) / len(errors)) < 0.01, told


def test_host_memory_of_the_published_run_at_its_brink() -> None:
    terms = memory_terms(LLAMA_70B, tokens_per_rank=4_000_000 / 32, levers=published_levers(32, LONG))
    assert terms.node == pytest.approx(1_593e9, rel=1e-3)  # of 1,900 GB


@pytest.mark.parametrize(
    ("shape", "ranks", "degree", "names", "expected"),
    [
        (LLAMA_8B, 1, 1, (), 0),
        (LLAMA_8B, 1, 1, ALL_ON_HOST, 171e3),
        (LLAMA_8B, 4, 4, (), 326e3),
        (LLAMA_8B, 8, 8, (), 1.01e6),
        (LLAMA_8B, 8, 8, ("optimizer_on_host", "checkpoints_on_host"), 4.87e6),
        (LLAMA_8B, 512, 8, (), 1.36e6),
        (LLAMA_70B, 16, 16, (), 0),
        (LLAMA_70B, 32, 32, (), 360e3),
        (LLAMA_70B, 8, 8, ("optimizer_on_host",), 188e3),
        (LLAMA_70B, 8, 8, ("optimizer_on_host", "checkpoints_on_host"), 512e3),  # the host binds
        (LLAMA_70B, 64, 64, ("optimizer_on_host", "checkpoints_on_host"), 10.1e6),
    ],
)
def test_longest_contexts_of_cards_with_80_gb(
    shape: ModelShape, ranks: int, degree: int, names: tuple[str, ...], expected: float
) -> None:
    levers = with_levers(Levers(ranks=ranks, sp_degree=degree), ("tiled_mlp", *names))
    found = longest_context(shape, levers, **ROOM)
    assert found == pytest.approx(expected, rel=0.005, abs=GRANULARITY * degree)


SMALL = ModelShape(layers=3, hidden=8, heads=4, kv_heads=2, head_dim=2, mlp=16, vocabulary=100)
N = 3 * (2 * 8 * 8 + 2 * 8 * 4 + 3 * 8 * 16) + 2 * 100 * 8  # 3,328


@pytest.mark.parametrize(
    ("zero_stage", "parameters", "gradients", "optimizer", "gathered"),
    [
        (0, 2 * N, 2 * N, 12 * N, 0),
        (1, 2 * N, 2 * N, 3 * N, 0),
        (2, 2 * N, N / 2, 3 * N, 0),
        (3, N / 2, N / 2, 3 * N, 2 * (2 * 576 + 800)),
    ],
)
def test_states_by_hand(
    zero_stage: int, parameters: float, gradients: float, optimizer: float, gathered: float
) -> None:
    assert SMALL.parameters == N
    terms = memory_terms(SMALL, tokens_per_rank=10, levers=Levers(ranks=4, zero_stage=zero_stage))
    found = (terms.parameters, terms.gradients, terms.optimizer, terms.gathered)
    assert found == (parameters, gradients, optimizer, gathered)
    added_up = memory_terms(SMALL, tokens_per_rank=10, levers=Levers(ranks=4, zero_stage=zero_stage, micro_steps=2))
    assert added_up.gradients == (N if zero_stage >= 2 else gradients)  # 4 N / 4 ranks


def test_activations_by_hand() -> None:
    """10 tokens, of 4 ranks that share a pack: each of the 2 key/value heads is then held twice."""
    terms = memory_terms(SMALL, tokens_per_rank=10, levers=Levers(ranks=4, sp_degree=4))
    assert terms.checkpoints == 2 * 8 * 3 * 10
    assert terms.attention == 2 * (7 * 8 + 2 * 4 + 2 * 4 * 2) * 10 + 8 * 8 * 10
    assert terms.mlp == 10 * 16 * 10 + 8 * 8 * 10
    assert terms.head == (2 + 4) * 100 * (10 + 8) + 12 * 8 * 10
    sizes = [terms.parameters, terms.gradients, terms.optimizer, terms.gathered, terms.checkpoints, terms.head, 8e9]
    assert terms.rank == pytest.approx(1.045 * sum(sizes), rel=1e-12)
    assert terms.node == 0
    tiled = memory_terms(SMALL, tokens_per_rank=10, levers=Levers(ranks=4, tiled_mlp=True, head_chunk=4))
    assert tiled.mlp == 10 * 16 * 8 + 8 * 8 * 10  # 8 tokens, the hidden width, at a time
    assert tiled.head == (2 + 4) * 100 * (4 + 8) + 12 * 8 * 10
    assert tiled.attention == 2 * (7 * 8 + 2 * 4 + 2 * 4) * 10 + 8 * 8 * 10


def test_norms_of_queries_are_held_in_fp32() -> None:
    def attention(shape: ModelShape) -> float:
        return memory_terms(shape, tokens_per_rank=10, levers=Levers()).attention

    assert attention(replace(SMALL, qk_norm=True)) - attention(SMALL) == 8 * 8 * 10


def test_levers_by_hand() -> None:
    levers = Levers(ranks=16, checkpoints_on_host=True, optimizer_on_host=True, parameters_on_host=True)
    terms = memory_terms(SMALL, tokens_per_rank=10, levers=levers)
    assert (terms.parameters, terms.gradients, terms.optimizer, terms.checkpoints) == (0, 0, 0, 0)
    host = (terms.host_parameters, terms.host_optimizer, terms.host_checkpoints)
    assert host == (2 * N / 16, N, 480)
    assert terms.node == 8 * sum(host)
    stage_1 = memory_terms(SMALL, tokens_per_rank=10, levers=Levers(zero_stage=1, optimizer_on_host=True))
    assert (stage_1.parameters, stage_1.gradients, stage_1.optimizer) == (2 * N, 2 * N, 0)


@pytest.mark.parametrize(
    ("stage", "bytes_of_node"),
    # 16 ranks, 8 a node, the first node: the weights and Adam of ZeRO-0; the weights and 8 shards; the 8 shards alone
    [(0, 2 * N + 12 * N), (1, 2 * N + 8 * 12 * N / 16), (2, 2 * N + 8 * 12 * N / 16), (3, 8 * 12 * N / 16)],
)
def test_copy_of_a_checkpoint_by_hand(stage: int, bytes_of_node: float) -> None:
    def terms(**settings: Any) -> Any:
        return memory_terms(SMALL, tokens_per_rank=10, levers=Levers(ranks=16, zero_stage=stage, **settings))

    with_copy, without = terms(async_checkpoint=True), terms()
    assert with_copy.node - without.node == pytest.approx(bytes_of_node, rel=1e-12)
    assert with_copy.rank == without.rank
    on_cpu = {"on_gpu": False, "weight_bytes": 4}
    added = terms(async_checkpoint=True, **on_cpu).rank - terms(**on_cpu).rank
    assert added == pytest.approx((4 * N * (stage < 3) + 8 * N * (stage == 0)) / 8 + 12 * N / 16 * (stage > 0))


def test_on_a_cpu_by_hand() -> None:
    """Weights of 4 bytes; what is on the host stays in the same memory; attention and MLP exist together."""
    levers = Levers(ranks=2, zero_stage=0, weight_bytes=4, on_gpu=False, optimizer_on_host=False)
    terms = memory_terms(SMALL, tokens_per_rank=1_000, levers=levers)
    assert (terms.parameters, terms.gradients, terms.optimizer) == (4 * N, 4 * N, 8 * N)
    attention, mlp = 4 * (56 + 8 + 8) * 1_000 + 16 * 8 * 1_000, 20 * 16 * 1_000 + 16 * 8 * 1_000
    assert (terms.attention, terms.mlp) == (attention, mlp)
    assert terms.head == 4 * 100 * (1_000 + 8) + 20 * 8 * 1_000  # nothing is rounded
    assert terms.working == max(attention + mlp, terms.head) == attention + mlp
    assert terms.rank == 16 * N + 4 * 8 * 3 * 1_000 + terms.working + CPU_FIXED
    assert terms.node == 2 * terms.rank
    kept = memory_terms(
        SMALL, tokens_per_rank=1_000, levers=Levers(gradient_checkpointing=False, weight_bytes=4, on_gpu=False)
    )
    assert kept.checkpoints == 3 * 1_000 * (4 * (3 * 8 + 2 * 4 + 4 * 16) + 24 * 8)
    assert (kept.attention, kept.mlp) == (attention - 1_000 * (4 * 32 + 12 * 8), mlp - 1_000 * (16 * 16 + 12 * 8))


@pytest.mark.parametrize("on_gpu", [True, False])
def test_more_tokens_need_more(on_gpu: bool) -> None:
    for names in ((), LADDER):
        levers = with_levers(Levers(on_gpu=on_gpu), names)
        made = [memory_terms(LLAMA_8B, tokens_per_rank=1_000 * 2**n, levers=levers) for n in range(12)]
        assert all(less.rank <= more.rank and less.node <= more.node for less, more in pairwise(made))
        assert made[4].rank < made[5].rank < made[-1].rank  # below, the tiled head is the largest


@pytest.mark.parametrize("names", [(), LADDER, LONG])
@pytest.mark.parametrize("degree", [1, 8])
def test_the_longest_context_is_the_longest(names: tuple[str, ...], degree: int) -> None:
    levers = with_levers(Levers(ranks=8, sp_degree=degree), names)
    found = longest_context(LLAMA_8B, levers, **ROOM)
    assert found > 0
    assert found % (GRANULARITY * degree) == 0

    def fits(tokens: int) -> bool:
        terms = memory_terms(LLAMA_8B, tokens_per_rank=tokens / degree, levers=levers)
        assert terms.fit(**ROOM) == (terms.rank <= 75e9 and terms.node <= 1_800e9)
        return terms.fit(**ROOM)

    assert USABLE * 80 == 75
    assert fits(found)
    assert not fits(found + GRANULARITY * degree)


@pytest.mark.parametrize(
    ("shape", "ranks", "tokens", "expected"),
    [
        (LLAMA_8B, 8, 16_384, ()),
        (LLAMA_8B, 8, 124_000, ("tiled_mlp",)),
        (LLAMA_8B, 8, 200_000, ("checkpoints_on_host",)),
        (LLAMA_8B, 8, 400_000, ("tiled_mlp", "checkpoints_on_host")),
        (LLAMA_8B, 8, 550_000, LONG),
        (LLAMA_8B, 1, 32_768, ("optimizer_on_host",)),
        (LLAMA_70B, 8, 30_000, ("checkpoints_on_host", "optimizer_on_host")),
        (LLAMA_70B, 8, 2**20, None),
    ],
)
def test_cheapest_levers(shape: ModelShape, ranks: int, tokens: int, expected: tuple[str, ...] | None) -> None:
    levers = Levers(ranks=ranks, sp_degree=ranks, parameters_on_host=True)
    found = cheapest_levers(shape, levers, tokens_per_rank=tokens, **ROOM)
    assert found == (None if expected is None else with_levers(levers, expected))
    if expected is not None:  # each of them is needed, and dearer ones would not be
        for lever in expected:
            fewer = with_levers(levers, [name for name in expected if name != lever])
            assert not memory_terms(shape, tokens_per_rank=tokens, levers=fewer).fit(**ROOM)


def test_cheapest_of_those_that_the_stage_has() -> None:
    stage_1 = Levers(ranks=8, sp_degree=8, zero_stage=1)
    found = cheapest_levers(LLAMA_8B, stage_1, tokens_per_rank=65_536, **ROOM)
    assert found == replace(stage_1, checkpoints_on_host=True)
    assert cheapest_levers(LLAMA_70B, stage_1, tokens_per_rank=1_024, **ROOM) is None  # parameters stay where they are


@pytest.mark.parametrize(
    ("ranks", "ranks_per_node", "sp_degree", "expected"),
    [
        (12, 8, 1, [1, 2, 4]),  # 3 and 6 divide the ranks but not the 32 heads, and 8 not the ranks
        (12, 2, 1, [1, 2]),
        (16, 8, 2, [2, 4, 8]),  # not below what is set
        (16, 8, 16, [16]),
    ],
)
def test_degrees_inside_a_node(ranks: int, ranks_per_node: int, sp_degree: int, expected: list[int]) -> None:
    levers = Levers(ranks=ranks, ranks_per_node=ranks_per_node, sp_degree=sp_degree)
    assert sp_degrees(LLAMA_8B, levers) == expected


@pytest.mark.parametrize(
    ("tokens", "degree", "names"),
    [(2**16, 1, ()), (2**17, 2, ()), (2**18, 4, ()), (2**20, 8, ("checkpoints_on_host",)), (2**22, 8, LONG)],
)
def test_sequence_parallelism_comes_before_other_levers(tokens: int, degree: int, names: tuple[str, ...]) -> None:
    """The packs stay as long: two ranks of a pack have half of its tokens each."""
    found = cheapest_levers(LLAMA_8B, Levers(), tokens_per_rank=tokens, **ROOM)
    assert found is not None
    assert found == replace(with_levers(Levers(), names), sp_degree=degree)
    for tried in (1, 2, 4, 8):
        held = memory_terms(LLAMA_8B, tokens_per_rank=tokens / tried, levers=replace(found, sp_degree=tried))
        assert held.fit(**ROOM) == (tried >= degree)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranks": 0, "sp_degree": -1}, "ranks = 0: give 1 or more\nsp_degree = -1"),
        ({"ranks": 6, "sp_degree": 4}, "sp_degree = 4 does not divide ranks = 6"),
        ({"zero_stage": 4}, "zero_stage = 4"),
        ({"zero_stage": 0, "optimizer_on_host": True}, "optimizer on the host needs ZeRO stage 1 to 3"),
        ({"zero_stage": 2, "parameters_on_host": True}, "parameters on the host need ZeRO stage 3"),
    ],
)
def test_levers_that_make_no_sense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Levers(**options)
