"""One optimizer step over ranks, micro-steps and parts of packs: its gradient is that of one sequence at a time."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path
from typing import Any

import pytest

from longalign_ray.train.loss import LossKind
from tests.integration.deepspeed_ranks import Case, Stage

FAMILIES = ("llama", "qwen3", "mistral", "glm4")
LOSSES: tuple[LossKind, ...] = ("sequence", "token", "pack", "sqrt")
PLACES = ((1, 1), (1, 2), (2, 1), (2, 2))  # ranks over the sequence-parallel degree, and that degree


def exact(stages: tuple[Stage, ...], dtype: str) -> list[tuple[int, Case]]:
    """(ranks, case) of every stage, place and family; losses and micro-steps go round: any three occur together."""
    return [
        (
            groups * degree,
            Case(
                zero_stage=stages[i],
                sp_degree=degree,
                family=FAMILIES[k],
                loss=LOSSES[i ^ j ^ k],  # another for each value of one, the other two held fast
                micro_steps=(1, 3)[(i + j // 2 + k + k // 2) % 2],
                dtype=dtype,
            ),
        )
        for i, (j, (groups, degree)), k in product(range(len(stages)), enumerate(PLACES), range(len(FAMILIES)))
    ]


STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
GRID = exact(STAGES, "float32") + exact((None,), "float64")
# Heads that the degree does not divide: a ring of 2, on 4 ranks beside an all-to-all of 2.
RING = [
    Case(zero_stage=3, sp_degree=2, family="llama-3-heads", micro_steps=3),
    Case(zero_stage=None, sp_degree=2, family="llama-3-heads", dtype="float64"),
    Case(zero_stage=None, sp_degree=2, family="mistral-3-heads", dtype="float64", micro_steps=1, loss="token"),
]
FOUR_RANKS = [
    Case(zero_stage=2, sp_degree=4, family="mistral-2-heads", micro_steps=3),
    Case(zero_stage=None, sp_degree=4, family="llama-3-heads", dtype="float64"),
]
BFLOAT16 = [
    Case(zero_stage=stage, sp_degree=degree, family=FAMILIES[i], loss=LOSSES[i], micro_steps=3, dtype="bfloat16")
    for degree, (i, stage) in product((1, 2), enumerate(STAGES))
]
LEVERS = [
    Case(zero_stage=3, levers=True),
    Case(zero_stage=3, sp_degree=2, family="glm4", micro_steps=3, loss="token", levers=True),
    Case(zero_stage=1, family="qwen3", levers=True),
]
CASES = {n: [case for ranks, case in GRID if ranks == n] for n in (1, 2, 4)}
CASES[2] += RING + BFLOAT16 + LEVERS
CASES[4] += FOUR_RANKS

GOLDEN = [4.16907, 3.07127, 2.43638]  # of steps 0, 10 and 20
Results = dict[int, dict[str, Any]]


def run_worlds(cases: dict[int, list[Case]], directory: Path) -> Results:
    """What the ranks write, by world size; its errors by case."""
    asked = {number: [dataclasses.asdict(case) for case in some] for number, some in cases.items()}
    command = [sys.executable, "-m", "tests.integration.deepspeed_ranks", json.dumps(asked), str(directory)]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-5_000:]
    results = {number: json.loads((directory / f"{number}.json").read_text(encoding="utf-8")) for number in cases}
    return {n: {**found, "errors": dict(zip(cases[n], found["errors"], strict=True))} for n, found in results.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return run_worlds(CASES, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("world_size", "case"), [(n, case) for n, some in CASES.items() for case in some], ids=str)
def test_gradient_loss_and_norm_are_exact(results: Results, world_size: int, case: Case) -> None:
    found = results[world_size]["errors"][case]
    limit = {"float64": 1e-10, "float32": 1e-5, "bfloat16": 2e-2}[case.dtype]
    assert found["total"] < 1e-10
    for name in ("gradient", "loss", "norm"):  # not their maximum, which may leave out a NaN
        assert found[name] < limit, name


def test_any_three_settings_occur_together() -> None:
    settings = (STAGES, PLACES, FAMILIES, LOSSES, (1, 3))
    occurring = [
        (case.zero_stage, (ranks // case.sp_degree, case.sp_degree), case.family, case.loss, case.micro_steps)
        for ranks, case in exact(STAGES, "float32")
    ]
    for axes in combinations(range(5), 3):
        found = {tuple(values[axis] for axis in axes) for values in occurring}
        assert found == set(product(*(settings[axis] for axis in axes)))


def test_a_loss_curve_is_that_of_one_sequence_at_a_time(results: Results) -> None:
    """Thirty steps of AdamW with clipping, decay and a schedule; and the values that it has always had."""
    curve = results[2]["curve"]
    assert curve == pytest.approx(results[1]["curve"], rel=1e-4)
    assert curve[::10] == pytest.approx(GOLDEN, rel=1e-3)


def test_zero_3_divides_a_model_as_it_is_read(results: Results) -> None:
    """With an adapter, another RoPE, tiled MLPs, and the checkpoint of a run that had loaded it whole."""
    whole, divided = results[2]["loaded"]["whole"], results[2]["loaded"]["divided"]
    assert divided["held"] == 0  # each weight is its share of it and a placeholder
    assert whole["held"] > 10_000
    assert divided["digest"] == whole["digest"]
    assert divided["losses"] == whole["losses"]
    assert len(set(whole["losses"])) == 3


def test_weights_and_optimizer_on_the_host_take_the_same_steps(results: Results) -> None:
    if (errors := results[2]["offload"]) is None:
        pytest.skip("DeepSpeed's CPU Adam is not compiled: BUILD_CPU_ADAM=1 does it, in two minutes of CPU time")
    assert set(errors) == {"offload_optimizer", "offload_parameters", "offload_optimizer+offload_parameters"}
    for name, error in errors.items():
        assert error < 1e-5, name


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_updated_in_float32(results: Results, stage: int) -> None:
    """And micro-steps are added up in float32 where DeepSpeed can: else not even 16 equal ones give their sum."""
    errors = results[2]["bfloat16"][stage]
    assert errors["update"] < 1e-2
    assert errors["added_up"] < (1e-6 if stage >= 2 else 1e-2)


@pytest.mark.parametrize("world_size", [2, 4])
def test_some_parts_have_no_targets(results: Results, world_size: int) -> None:
    """Else the cases above would not show that they are fine."""
    assert any(found["idle_parts"] > 0 for case, found in results[world_size]["errors"].items() if case.sp_degree > 1)


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_leak_between_sequences_is_seen_by_the_ranks_of_a_pack(results: Results, world_size: int) -> None:
    assert results[world_size]["leaks_found"] == world_size
