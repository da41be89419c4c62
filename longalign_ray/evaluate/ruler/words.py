"""The wording of RULER's tasks: the benchmark's own, read from its files, or this package's for the same tasks.

What a text says is the task; how it is said moves scores by some points. So published scores compare with those of the
benchmark's own words alone.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign_ray.errors import EvaluationError
from longalign_ray.evaluate.benchmark_rows import filled, read_prompt

PLACEHOLDER = r"\{(context|query|type_needle_v|num_v|key|value)\}"
SETTING = "evaluate.ruler.prompts"
REMEDY = "give the directory scripts/data/synthetic of the repository NVIDIA/RULER, with constants.py and niah.py"


@dataclass(frozen=True, slots=True)
class Template:
    """A task's text with `{context}` and `{query}`, and how its answer begins."""

    question: str
    answer_prefix: str

    def fill(self, values: Mapping[str, str]) -> tuple[str, str]:
        return (
            filled(self.question, values, placeholder=PLACEHOLDER),
            filled(self.answer_prefix, values, placeholder=PLACEHOLDER),
        )


@dataclass(frozen=True, slots=True)
class RulerWords:
    """`needle` states a key's value; `noise` is the text that is repeated; `templates` go by the kind of a task."""

    needle: str
    noise: str
    templates: Mapping[str, Template]


OWN_WORDS = RulerWords(
    needle="One of the secret {type_needle_v} of {key} is: {value}.",
    noise="The sand is warm. The gulls cry. The boats sway in the wind. We walk on. The way back is short.",
    templates={
        "niah": Template(
            "Some secret {type_needle_v} are noted in the text below, and the question after it asks about the secret "
            "{type_needle_v}.\n{context}\nWhat are all the secret {type_needle_v} of {query} noted in the text?",
            " The secret {type_needle_v} of {query} noted in the text are",
        ),
        "variable_tracking": Template(
            "Follow the assignments of variables that are hidden in the text below.\n\n{context}\nQuestion: Which "
            "variables hold the value {query}, be it by way of other variables?",
            " Answer: By the assignments in the text {num_v} variables hold the value {query}, namely:",
        ),
        "common_words_extraction": Template(
            "In the numbered list below some words stand more often than others. Find those that stand most often."
            "\n{context}\nQuestion: Which 10 words stand most often in the list?",
            " Answer: The 10 words that stand most often in the list are:",
        ),
        "freq_words_extraction": Template(
            "The text below is made of coded words; count how often each of them stands there. {context}\nQuestion: "
            "Leave out the dots '...' and explain nothing. Which three coded words stand most often in the text?",
            " Answer: The three coded words that stand most often in the text are:",
        ),
        "qa": Template(
            "Answer a question from the documents below, with the answer alone.\n\n{context}\n\nAnswer the question "
            "from the documents above, with the answer alone.\n\nQuestion: {query}",
            " Answer:",
        ),
    },
)


def read_words(directory: str) -> RulerWords:
    """The benchmark's own wording: literals of constants.py and niah.py, which are read and never run.

    Raises EvaluationError where a file is missing or does not hold them.
    """
    kinds = list(OWN_WORDS.templates)
    tasks = _literals(Path(directory) / "constants.py").get("TASKS", {})
    of_needles = _literals(Path(directory) / "niah.py")
    try:
        templates = {kind: Template(str(tasks[kind]["template"]), str(tasks[kind]["answer_prefix"])) for kind in kinds}
        return RulerWords(str(of_needles["needle"]), str(of_needles["haystack"]).strip(), templates)
    except (KeyError, TypeError) as error:
        raise EvaluationError(
            f"{SETTING}: {directory} does not set TASKS, with a template and an answer_prefix for each of "
            f"{', '.join(kinds)}, needle and haystack ({error!r}); {REMEDY}"
        ) from error


def _literals(path: Path) -> dict[str, Any]:
    """The value of each name that a Python file sets to a literal, anywhere; the first where there are several."""
    found: dict[str, Any] = {}
    try:
        tree = ast.parse(read_prompt(path, setting=SETTING, remedy=REMEDY))
    except (SyntaxError, ValueError) as error:
        raise EvaluationError(f"{SETTING}: {path} is not Python ({error}); {REMEDY}") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            try:
                found.setdefault(node.targets[0].id, ast.literal_eval(node.value))
            except ValueError:
                continue
    return found
