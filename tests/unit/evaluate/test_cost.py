from __future__ import annotations

from typing import Any

import pytest

from longalign_ray.data.cost import SequenceCost
from longalign_ray.evaluate.cost import ServingRates, TaskCost, cost_table, shared_prefix, task_cost
from longalign_ray.evaluate.task import EvalCase
from longalign_ray.train.model_shape import ModelShape

# 4 bytes of keys and values a token; 10 weights in the layer and 4 in the tied head.
SHAPE = ModelShape(layers=1, hidden=1, heads=1, kv_heads=1, head_dim=1, mlp=2, vocabulary=4, tied=True)
COST = SequenceCost(linear=6.0, quadratic=3.0)


def case(name: str, document: str, num_tokens: int, **request: Any) -> EvalCase:
    return EvalCase(name, "t", "/completions", request, None, document, num_tokens)


def test_worked_by_hand():
    cases = [
        case("long", "a", 10, prompt="aaaaaaaabb", max_tokens=2),
        case("short", "a", 8, messages=[{"role": "user", "content": "aaaaaabb"}], max_tokens=0),
        case("ids", "b", 4, prompt=[1, 2, 3, 4]),
    ]
    # Prompts, a third of training: 2*10 + 100; 2*8 + 64 less 2*6 + 36; 2*4 + 16. Answers: two tokens that read the
    # 14 weights of 2 bytes for one of 2 requests, and 4 bytes of each of 11 positions (10 and, on average, 1 more).
    assert SHAPE.parameters == 14
    rates = ServingRates(tflops=176 / 3_600e12, bandwidth=1e-9 / 3_600, batch=2)
    found = task_cost(cases, COST, SHAPE, rates)
    assert (found.cases, found.documents, found.prompt_tokens) == (3, 2, 22)
    assert (found.computed_tokens, found.answer_tokens) == (10 + 2 + 4, 2)
    assert found.gpu_hours == pytest.approx((120 + 80 - 48 + 24) / 176 + 2 * (2 * 14 / 2 + 4 * 11))


def test_shared_prefix_is_a_share_of_the_tokens():
    first = case("1", "a", 50, prompt="x" * 100)
    assert shared_prefix(first, case("2", "a", 40, prompt="x" * 75 + "y" * 25)) == 30
    assert shared_prefix(first, case("2", "a", 40, prompt="y" * 100)) == 0
    assert shared_prefix(first, case("2", "a", 40, prompt="x" * 100)) == 40
    assert shared_prefix(case("1", "a", 3, prompt=[7, 8, 9]), case("2", "a", 4, prompt=[7, 8, 5, 5])) == 2


def test_table_adds_the_tasks_up_for_every_model():
    costs = {"needle": TaskCost(1, 1, 10, 5, 2, 0.25), "longeval": TaskCost(2, 2, 1_000, 995, 4, 1.0)}
    table = cost_table(costs, num_models=2, rates=ServingRates(200, 1_500, 8)).splitlines()
    assert table[2] == "| needle | 1 | 1 | 10 | 5 | 2 | 0.25 |"
    assert table[4] == "| all, of 2 models | 6 | 6 | 2,020 | 2,000 | 12 | 2.50 |"
    assert "200 TFLOP/s" in table[-1]
