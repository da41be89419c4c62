"""Questions about a document whose answers are true by construction: each writer reads what it asks for off the text.

A writer is `(document, rng) -> Task | None`; None where the document gives no question with exactly one answer.
Names are asked for only where the text defines them once.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from longalign_ray.construct.documents import Document
from longalign_ray.construct.facts import Fact, draw_facts
from longalign_ray.construct.pieces import Definition, times_defined
from longalign_ray.construct.wordings import ANSWERS, FRAMES, QUESTIONS, enumerated

# Longest answer, so that none is a second long document.
MAX_ANSWER_CHARS = 600
# Draws of a fact until one has words that the document does not know.
MAX_FACT_DRAWS = 8


@dataclass(frozen=True, slots=True)
class Task:
    """A question and its answer.

    `subject` are the strings that say what is asked about, `key` those that a right answer contains, in order; `text`
    is the document with what the writer added.
    """

    kind: str
    text: str
    subject: tuple[str, ...]
    key: tuple[str, ...]
    question: str
    answer: str


Item = TypeVar("Item")
Writer = Callable[[Document, random.Random], Task | None]


def write_task(document: Document, rng: random.Random) -> Task | None:
    """A task of a kind drawn by weight; the next kind drawn where the document has none of it, None after the last."""
    weights = {kind: weight for kind, (_, weight) in TASKS.items()}
    while weights:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        del weights[kind]
        task = TASKS[kind][0](document, rng)
        if task is not None and len(task.answer) <= MAX_ANSWER_CHARS:
            return task
    return None


def user_message(task: Task, rng: random.Random) -> str:
    """The document, then the question."""
    return rng.choice(FRAMES).format(text=task.text, question=task.question)


def _fact(document: Document, rng: random.Random) -> Task | None:
    return _hidden_fact("fact", document, rng, count=1)


def _fact_among_others(document: Document, rng: random.Random) -> Task | None:
    return _hidden_fact("fact_among_others", document, rng, count=rng.choice((2, 3, 4)))


def _hidden_fact(kind: str, document: Document, rng: random.Random, *, count: int) -> Task | None:
    """Sentences of one family at random depths and a question about one of them."""
    for _ in range(MAX_FACT_DRAWS):
        facts = draw_facts(rng, count=count)
        if not any(word in document.text for fact in facts for word in (*fact.subject, fact.value)):
            text = _hide(facts, document, rng)
            return Task(kind, text, facts[0].subject, (facts[0].value,), facts[0].question, facts[0].answer)
    return None


def _hide(facts: Sequence[Fact], document: Document, rng: random.Random) -> str:
    """The text with each sentence between two lines: a paragraph, or in code a comment as deep as the next line."""
    lines = document.text.split("\n")
    for fact in facts:
        place = rng.randrange(1, len(lines) + 1)
        if document.form == "source" and rng.random() < 0.5:
            following = lines[place] if place < len(lines) else ""
            indent = following[: len(following) - len(following.lstrip())]
            lines.insert(place, f"{indent}# {fact.sentence}")
        else:
            lines[place:place] = ["", fact.sentence, ""]
    return "\n".join(lines)


def _follows(document: Document, rng: random.Random) -> Task | None:
    if (pair := _neighbours(document, rng)) is None:
        return None
    first, second = pair
    words = {"first": first.name, "second": second.name, "kind": second.kind}
    return _task("follows", document, rng, subject=(first.name,), key=(second.name,), words=words)


def _precedes(document: Document, rng: random.Random) -> Task | None:
    if (pair := _neighbours(document, rng)) is None:
        return None
    first, second = pair
    words = {"first": first.name, "second": second.name, "kind": first.kind}
    return _task("precedes", document, rng, subject=(second.name,), key=(first.name,), words=words)


def _docstring(document: Document, rng: random.Random) -> Task | None:
    def suits(item: Definition) -> bool:
        line = item.docstring.split("\n")[0]
        return len(line) >= 12 and line in document.text  # not where an escape makes it differ from the source

    if (item := _pick(document, rng, ("class", "function", "method"), suits)) is None:
        return None
    line = item.docstring.split("\n")[0].strip()
    words = {"name": item.name, "kind": item.kind, "path": item.path, "line": line}
    return _task("docstring", document, rng, subject=(item.name,), key=(line,), words=words)


def _module_of(document: Document, rng: random.Random) -> Task | None:
    item = _pick(document, rng, ("class", "function")) if len(document.modules) > 1 else None
    if item is None:
        return None
    words = {"name": item.name, "kind": item.kind, "module": item.module}
    return _task("module_of", document, rng, subject=(item.name,), key=(item.module,), words=words)


def _class_of(document: Document, rng: random.Random) -> Task | None:
    item = _pick(document, rng, ("method",), lambda item: times_defined(document.text, item.owner) == 1)
    if item is None:
        return None
    words = {"name": item.name, "owner": item.owner}
    return _task("class_of", document, rng, subject=(item.name,), key=(item.owner,), words=words)


def _parameters(document: Document, rng: random.Random) -> Task | None:
    item = _pick(document, rng, ("function", "method"), lambda item: 2 <= len(item.parameters) <= 9)
    if item is None:
        return None
    words = {"path": item.path, "kind": item.kind, "names": enumerated(item.parameters)}
    return _task("parameters", document, rng, subject=(item.name,), key=item.parameters, words=words)


def _top_level(document: Document, rng: random.Random) -> Task | None:
    choices = []
    for module in document.modules:
        items = [item for item in document.definitions if item.module == module and item.kind != "method"]
        if not any(item.conditional for item in items):
            for kind, plural in (("class", "classes"), ("function", "functions")):
                names = tuple(item.name for item in items if item.kind == kind)
                if 2 <= len(names) <= 12 and len(set(names)) == len(names):
                    choices.append((module, plural, names))
    if not choices:
        return None
    module, plural, names = rng.choice(choices)
    words = {"module": module, "plural": plural, "names": enumerated(names)}
    return _task("top_level", document, rng, subject=(module, plural), key=names, words=words)


def _constant(document: Document, rng: random.Random) -> Task | None:
    def suits(name: str, value: str) -> bool:
        if len(name) < 3 or name.startswith("__") or len(value) > 60 or "\n" in value:
            return False
        # Lines where the name stands left of an equals sign: assignments of any form, keyword arguments, prose.
        return len(re.findall(rf"(?m)^.*\b{name}\b.*?(?<![=!<>])=(?!=)", document.text)) == 1

    item = _first(document.constants, rng, lambda item: suits(item.name, item.value))
    if item is None:
        return None
    words = {"name": item.name, "value": item.value}
    return _task("constant", document, rng, subject=(item.name,), key=(item.value,), words=words)


def _exception(document: Document, rng: random.Random) -> Task | None:
    def suits(item: Definition) -> bool:
        return len(item.exceptions) == 1 and min(item.exceptions)[0].isupper()

    if (item := _pick(document, rng, ("function", "method"), suits)) is None:
        return None
    words = {"path": item.path, "kind": item.kind, "exception": min(item.exceptions)}
    return _task("exception", document, rng, subject=(item.name,), key=tuple(item.exceptions), words=words)


def _base(document: Document, rng: random.Random) -> Task | None:
    item = _pick(document, rng, ("class",), lambda item: len(item.bases) == 1 and len(item.bases[0]) <= 60)
    if item is None:
        return None
    words = {"name": item.name, "base": item.bases[0]}
    return _task("base", document, rng, subject=(item.name,), key=item.bases, words=words)


def _home_of_line(document: Document, rng: random.Random) -> Task | None:
    item = _pick(document, rng, ("function", "method"), lambda item: item.body.count("def ") == 1)
    if item is None:
        return None
    inside = [line.strip() for line in item.body.split("\n")[1:]]
    lines = [line for line in inside if 25 <= len(line) <= 100 and document.text.count(line) == 1]
    if not lines:
        return None
    line = rng.choice(lines)
    words = {"line": line, "kind": item.kind, "path": item.path}
    return _task("home_of_line", document, rng, subject=(line,), key=(item.name,), words=words)


def _next_line(document: Document, rng: random.Random) -> Task | None:
    lines = [line.strip() for line in document.text.split("\n")]
    seen = Counter(lines)
    pairs = [
        (line, following)
        for line, following in pairwise(lines)
        if seen[line] == 1 and 20 <= len(line) <= 100 and 10 <= len(following) <= 100
    ]
    if not pairs:
        return None
    line, following = rng.choice(pairs)
    words = {"line": line, "following": following}
    return _task("next_line", document, rng, subject=(line,), key=(following,), words=words)


def _task(
    kind: str,
    document: Document,
    rng: random.Random,
    *,
    subject: tuple[str, ...],
    key: tuple[str, ...],
    words: dict[str, str],
) -> Task:
    question, answer = rng.choice(QUESTIONS[kind]).format(**words), rng.choice(ANSWERS[kind]).format(**words)
    return Task(kind, document.text, subject, key, question, answer)


def _pick(
    document: Document,
    rng: random.Random,
    kinds: Sequence[str],
    suits: Callable[[Definition], bool] = lambda item: True,
) -> Definition | None:
    """A definition of one of `kinds` whose name the text defines once."""
    return _first(document.definitions, rng, lambda item: item.kind in kinds and suits(item) and _once(document, item))


def _neighbours(document: Document, rng: random.Random) -> tuple[Definition, Definition] | None:
    """Two top-level definitions of one module, one after the other."""
    outer = [item for item in document.definitions if item.kind != "method"]
    pairs = [(first, second) for first, second in pairwise(outer) if first.module == second.module]
    return _first(pairs, rng, lambda pair: _once(document, pair[0]) and _once(document, pair[1]))


def _once(document: Document, item: Definition) -> bool:
    return not (item.conditional or item.name.startswith("__")) and times_defined(document.text, item.name) == 1


def _first(items: Sequence[Item], rng: random.Random, suits: Callable[[Item], bool]) -> Item | None:
    """An item that suits, all such equally likely; few are looked at, since a look reads the whole text."""
    return next((item for item in rng.sample(items, len(items)) if suits(item)), None)


TASKS: dict[str, tuple[Writer, float]] = {
    # Finding one sentence in a long text is the skill that most long instructions share: 2 of 5 tasks in the end, since
    # every document has room for a fact and only some have a constant, an exception, ...
    "fact": (_fact, 15.0),
    "fact_among_others": (_fact_among_others, 8.0),
    "follows": (_follows, 6.0),
    "precedes": (_precedes, 3.0),
    "docstring": (_docstring, 8.0),
    "module_of": (_module_of, 6.0),
    "class_of": (_class_of, 5.0),
    "parameters": (_parameters, 6.0),
    "top_level": (_top_level, 5.0),
    "constant": (_constant, 9.0),
    "exception": (_exception, 4.0),
    "base": (_base, 4.0),
    "home_of_line": (_home_of_line, 4.0),
    "next_line": (_next_line, 3.0),
}
