"""How long an optimizer step takes, as a forecast from the plan's work and an assumed rate; seen on no GPU of ours."""

from __future__ import annotations

import math
from dataclasses import dataclass

from longalign_ray.train.memory import Levers
from longalign_ray.train.model_shape import ModelShape

RECOMPUTATION = 8 / 6
"""With gradient checkpointing the forward pass runs twice: 8 FLOPs a weight and token in place of 6."""
NODE_BYTES_PER_SECOND = 400e9
NETWORK_BYTES_PER_SECOND = 50e9
"""Of a GPU to those of other nodes."""
SECONDS_A_MICRO_STEP = 0.03
SECONDS_A_STEP = 0.1


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Seconds of an optimizer step, nothing of it overlapped. Updates and transfers to the host are not in it."""

    compute: float
    all_to_all: float
    ring: float
    overhead: float

    @property
    def total(self) -> float:
        return self.compute + self.all_to_all + self.ring + self.overhead


def step_seconds(
    shape: ModelShape, levers: Levers, *, compute_seconds: float, tokens_per_rank: float, micro_steps: int
) -> StepSeconds:
    """From the seconds of forward and backward without recomputation, and the tokens that a rank has in a step.

    Of the P ranks of a pack, U = gcd(P, heads) send queries, keys, values and outputs through an all-to-all in each of
    the passes: a rank keeps 1/U of what it has and sends the rest. It then holds lcm(kv heads, U) / U key/value heads
    of U times the tokens, which go on to the next of R = P / U ranks in a ring: R - 1 times in each pass, and in the
    backward pass their gradients R times, in fp32.
    """
    passes, factor = (3, RECOMPUTATION) if levers.gradient_checkpointing else (2, 1.0)
    heads_degree = math.gcd(levers.sp_degree, shape.heads)
    ring_degree = levers.sp_degree // heads_degree
    keys_values = 2 * math.lcm(shape.kv_heads, heads_degree) * shape.head_dim * tokens_per_rank
    queries_outputs = 2 * shape.width * tokens_per_rank
    traded = levers.weight_bytes * (queries_outputs + keys_values) * (heads_degree - 1) / heads_degree
    passed = passes * levers.weight_bytes * keys_values * (ring_degree - 1)
    passed += 4 * keys_values * ring_degree if ring_degree > 1 else 0
    return StepSeconds(
        compute=factor * compute_seconds,
        all_to_all=passes * shape.layers * traded / _rate(levers, heads_degree),
        ring=shape.layers * passed / _rate(levers, levers.sp_degree),
        overhead=SECONDS_A_STEP + micro_steps * SECONDS_A_MICRO_STEP,
    )


def _rate(levers: Levers, ranks: int) -> float:
    """Bytes a second between so many ranks in a row."""
    return NODE_BYTES_PER_SECOND if ranks <= levers.ranks_on_node else NETWORK_BYTES_PER_SECOND
