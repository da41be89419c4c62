"""What an evaluation costs before anything is asked: tokens, and hours of the GPUs that serve.

A prompt costs a forward pass, a third of training on it (data/cost.py). Of a document's questions only the first
computes the prefix that they share, as an engine with a prefix cache does. An answer's token costs memory traffic: the
weights once for all requests of a batch, and the request's own keys and values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import takewhile
from operator import eq
from typing import Any

from longalign_ray.data.cost import SequenceCost
from longalign_ray.evaluate.document_order import by_document
from longalign_ray.evaluate.task import EvalCase
from longalign_ray.train.model_shape import ModelShape

BYTES = 2
"""Of a weight and of an element of the KV cache: bf16."""


@dataclass(frozen=True, slots=True)
class ServingRates:
    """What a GPU that serves reaches, assumed."""

    tflops: float
    """TFLOP/s of prompts."""
    bandwidth: float
    """GB/s that weights, keys and values are read with."""
    batch: int
    """Requests that a forward pass has."""


@dataclass(frozen=True, slots=True)
class TaskCost:
    """Of the cases of one task, asked of one model."""

    cases: int
    documents: int
    prompt_tokens: int
    computed_tokens: int
    """Prompt tokens less those that another question about the document has left in the cache."""
    answer_tokens: int
    """At most: answers as long as they may be."""
    gpu_hours: float

    def __add__(self, other: TaskCost) -> TaskCost:
        return TaskCost(*(ours + theirs for ours, theirs in zip(astuple(self), astuple(other), strict=True)))


def task_cost(cases: Sequence[EvalCase], cost: SequenceCost, shape: ModelShape, rates: ServingRates) -> TaskCost:
    """What these cases cost a model of that training cost and shape."""
    groups = by_document(cases)
    flops, computed, read, answers = 0.0, 0, 0.0, 0
    kv_bytes = 2 * BYTES * shape.layers * shape.kv_width
    for first, *others in groups:
        for case in (first, *others):
            cached = 0 if case is first else shared_prefix(first, case)
            flops += float(cost(case.num_tokens) - cost(cached)) / 3
            computed += case.num_tokens - cached
            longest = int(case.request.get("max_tokens") or 0)
            answers += longest
            read += longest * (BYTES * shape.parameters / rates.batch + kv_bytes * (case.num_tokens + longest / 2))
    seconds = flops / (rates.tflops * 1e12) + read / (rates.bandwidth * 1e9)
    prompt_tokens = sum(case.num_tokens for case in cases)
    return TaskCost(len(cases), len(groups), prompt_tokens, computed, answers, seconds / 3_600)


def shared_prefix(first: EvalCase, other: EvalCase) -> int:
    """About how many tokens of the other's prompt the first one begins with too, by their texts."""
    ours, theirs = _prompt(other), _prompt(first)
    alike = sum(1 for _ in takewhile(bool, map(eq, ours, theirs)))
    return int(other.num_tokens * alike / max(len(ours), 1))


def _prompt(case: EvalCase) -> Any:
    """A text, or token ids."""
    if (messages := case.request.get("messages")) is not None:
        return "\n".join(message["content"] for message in messages)
    return case.request["prompt"]


def cost_table(costs: Mapping[str, TaskCost], *, num_models: int, rates: ServingRates) -> str:
    """Markdown: a line a task, asked of one model, and the sum of all models."""
    names = ["task", *(field.name.replace("_", " ").replace("gpu", "GPU") for field in fields(TaskCost))]
    rows = {**costs}
    if costs:
        whole, *rest = costs.values()
        one = sum(rest, whole)
        rows[f"all, of {num_models} models"] = sum([one] * (num_models - 1), one)
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for name, cost in rows.items():
        *counts, hours = astuple(cost)
        lines.append(f"| {' | '.join([name, *(f'{count:,}' for count in counts), f'{hours:.2f}'])} |")
    lines.append(
        f"\nAnswers as long as they may be. Assumed: {rates.tflops:g} TFLOP/s for prompts, {rates.bandwidth:g} GB/s "
        f"and {rates.batch} requests at a time for answers, bf16. Not counted: judges, follow-up requests, lm_eval."
    )
    return "\n".join(lines)
