"""Learning rate as a pure function of the step, so that a resumed run needs no scheduler state."""

from __future__ import annotations

import math


def learning_rate(step: int, num_steps: int, *, peak: float, warmup_ratio: float, minimum: float = 0.0) -> float:
    """Rate of 0-based `step` out of `num_steps`: rises linearly over ceil(warmup_ratio * num_steps) steps to `peak`,
    then falls along a cosine that reaches `minimum` one step past the end (LongAlign section 4.1)."""
    warmup = math.ceil(warmup_ratio * num_steps)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(num_steps - warmup, 1)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * progress))
