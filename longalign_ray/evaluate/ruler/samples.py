"""A sample of RULER, of any size: what the makers of the tasks give, and what `prompts.py` fits to a length."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from longalign_ray.evaluate.ruler.words import Template

UNBOUNDED = 10**8


@dataclass(frozen=True, slots=True)
class Sample:
    """What the template is filled with, and the right answers. `shared_chars`: how much of the context's beginning
    other samples of the task have too. `example`: another sample that is shown before, solved."""

    template: Template
    values: Mapping[str, str]
    answers: Sequence[str]
    shared_chars: int = 0
    example: Sample | None = None
    shown_answer: str = ""

    def texts(self) -> tuple[str, str]:
        """Question and beginning of the answer."""
        question, prefix = self.template.fill(self.values)
        if self.example is None:
            return question, prefix
        solved, solved_prefix = self.example.texts()
        return f"{solved}{solved_prefix.rstrip()} {self.example.shown_answer}\n\n{question}", prefix


@dataclass(frozen=True, slots=True)
class Sampler:
    """`make(size, number, rng)` gives sample `number` of a size from `least` to `most`; with an rng in the same state
    a larger size gives the same sample with more in it."""

    make: Callable[[int, int, random.Random], Sample]
    least: int
    most: int
