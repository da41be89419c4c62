"""Answers are true: each is derived again from the text of the conversation, by syntax tree or by reading lines."""

from __future__ import annotations

import ast
import random
import re
from collections import Counter
from functools import cache

import pytest

from longalign_ray.construct.documents import HEADING, Document
from longalign_ray.construct.facts import FAMILIES, draw_facts
from longalign_ray.construct.pieces import Constant, Definition
from longalign_ray.construct.task_writer import TASKS, Task, user_message, write_task
from longalign_ray.construct.wordings import ANSWERS, QUESTIONS
from tests.unit.construct.documents import some_documents

FACTS = {"fact", "fact_among_others"}


@cache
def tasks_of(kind: str) -> tuple[tuple[Document, Task], ...]:
    """A task of the kind from every document that has one."""
    made = []
    for document in some_documents():
        task = TASKS[kind][0](document, random.Random(f"{kind}:{document.document_id}"))
        if task is not None:
            made.append((document, task))
    return tuple(made)


def excerpts(text: str) -> dict[str, str]:
    """Module name -> what stands under its heading."""
    parts = re.split(rf"(?m)^{HEADING}(\S+)\n", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def outline(document: Document) -> list[dict]:
    """Every class, function and method, read off the text: from the tree of a source, by line from a manual."""
    return _outline(document.text, document.form)


@cache
def _outline(whole: str, form: str) -> list[dict]:
    rows = []
    for module, text in excerpts(whole).items():
        rows += _source_outline(text, module) if form == "source" else _manual_outline(text, module)
    return rows


def _source_outline(text: str, module: str) -> list[dict]:
    rows = []

    def visit(node: ast.AST, owner: str, depth: int) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                is_class = isinstance(child, ast.ClassDef)
                arguments = [] if is_class else re.findall(r"\*{0,2}\w+", _signature(child))
                docstring = ast.get_docstring(child) or ""
                rows.append(
                    {
                        "name": child.name,
                        "module": module,
                        "owner": owner,
                        "depth": depth,
                        "kind": "class" if is_class else "function",
                        "parameters": arguments,
                        "docstring": docstring.strip().split("\n")[0].strip(),
                        "bases": [ast.unparse(base) for base in child.bases] if is_class else [],
                        "node": child,
                        "lines": text.split("\n")[child.lineno - 1 : child.end_lineno],
                    }
                )
                visit(child, child.name if is_class else "", depth + 1)
            else:
                visit(child, owner, depth + (not isinstance(node, ast.Module)) if child._fields else depth)

    for statement in ast.parse(text).body:
        visit(ast.Module([statement], []), "", 0 if hasattr(statement, "name") else 1)
    return rows


def _signature(node: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    """Names and stars alone: annotations and defaults blanked."""
    arguments = node.args
    for item in ast.walk(arguments):
        if isinstance(item, ast.arg):
            item.annotation = None
    text = ast.unparse(arguments)
    for default in [*arguments.defaults, *[item for item in arguments.kw_defaults if item]]:
        text = text.replace(f"={ast.unparse(default)}", "", 1)
    return text


def _manual_outline(text: str, module: str) -> list[dict]:
    rows, owner = [], ""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        found = re.fullmatch(r"( {4})?(class|function|method) (\w+)\((.*)\)", line)
        if not found or bool(found[1]) != (found[2] == "method"):
            continue
        owner = found[3] if found[2] == "class" else owner if found[1] else ""
        node = None if found[2] == "class" else ast.parse(f"def f({found[4]}): pass").body[0]
        rows.append(
            {
                "name": found[3],
                "module": module,
                "owner": owner if found[1] else "",
                "depth": 1 if found[1] else 0,
                "kind": "class" if found[2] == "class" else "function",
                "parameters": re.findall(r"\*{0,2}\w+", _signature(node)) if isinstance(node, ast.FunctionDef) else [],
                "docstring": lines[number + 1].strip() if number + 1 < len(lines) else "",
                "bases": [found[4]],
            }
        )
    return rows


def the_one(document: Document, name: str) -> dict:
    rows = [row for row in outline(document) if row["name"] == name]
    assert len(rows) == 1, f"{name} is defined {len(rows)} times"
    return rows[0]


@pytest.mark.parametrize("kind", TASKS)
def test_every_kind_is_possible_and_well_formed(kind: str):
    made = tasks_of(kind)
    assert len(made) >= (12 if kind not in FACTS else 100), "else the truth of this kind is tested on too little"
    questions = Counter()
    for document, task in made:
        assert task.kind == kind
        assert task.key
        assert all(task.key)
        position = 0
        for part in task.key:
            position = task.answer.index(part, position) + len(part)
        assert all(part in task.question for part in task.subject if kind != "top_level" or part != "kind")
        message = user_message(task, random.Random(0))
        assert message.index(task.text) < message.rindex(task.question)
        assert not re.search(r"\{(name|path|kind|line|module|value|first|second)\}", task.question + task.answer)
        if kind not in FACTS:
            assert task.text == document.text
        questions[re.sub(r"\W\w*", "", task.question[:12])] += 1
    assert len(questions) >= 2, "wordings vary"


@pytest.mark.parametrize("kind", sorted(FACTS))
def test_exactly_one_sentence_states_the_fact(kind: str):
    depths = []
    for document, task in tasks_of(kind):
        left = task.text.split("\n")
        for line in document.text.split("\n"):
            if line:
                left.remove(line)
        added = [line for line in left if line]
        assert len(added) == 1 if kind == "fact" else 2 <= len(added) <= 4
        stating = [line for line in added if all(part in line for part in task.subject)]
        assert len(stating) == 1
        assert [task.key[0] in line for line in added] == [line is stating[0] for line in added]
        assert task.text.count(task.key[0]) == 1
        assert task.answer.count(task.key[0]) == 1
        depths.append(task.text.index(stating[0]) / len(task.text))
    assert min(depths) < 0.1
    assert max(depths) > 0.9
    assert 0.4 < sum(depths) / len(depths) < 0.6


@pytest.mark.parametrize("kind", ["follows", "precedes"])
def test_neighbours_stand_next_to_each_other(kind: str):
    for document, task in tasks_of(kind):
        rows = outline(document)
        module = the_one(document, task.subject[0])["module"]
        outer = [row["name"] for row in rows if row["module"] == module and row["depth"] == 0]
        step = 1 if kind == "follows" else -1
        assert outer[outer.index(task.subject[0]) + step] == task.key[0]


def test_docstring_begins_with_the_line():
    for document, task in tasks_of("docstring"):
        assert the_one(document, task.subject[0])["docstring"] == task.key[0]
        assert task.key[0] in document.text


def test_module_is_the_heading_above_the_definition():
    for document, task in tasks_of("module_of"):
        module = ""
        modules = []
        for line in document.text.split("\n"):
            if line.startswith(HEADING):
                module = line.removeprefix(HEADING)
            if re.match(rf"(async )?(def|class|function) {task.subject[0]}\b", line):
                modules.append(module)
        assert modules == [task.key[0]]
        assert document.text.count(HEADING) > 1


def test_class_is_the_one_around_the_method():
    for document, task in tasks_of("class_of"):
        assert the_one(document, task.subject[0])["owner"] == task.key[0]


def test_parameters_are_those_of_the_signature():
    for document, task in tasks_of("parameters"):
        assert the_one(document, task.subject[0])["parameters"] == list(task.key)


def test_top_level_list_is_complete_and_in_order():
    for document, task in tasks_of("top_level"):
        module, plural = task.subject
        word = {"classes": "class", "functions": r"(?:async )?def|function"}[plural]
        names = re.findall(rf"(?m)^(?:{word}) (\w+)", excerpts(document.text)[module])
        assert names == list(task.key)


def test_constant_has_the_value():
    for document, task in tasks_of("constant"):
        values = []
        for node in ast.walk(ast.parse(document.text)):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(target, ast.Name) and target.id == task.subject[0] for target in targets):
                values.append(ast.literal_eval(node.value))  # type: ignore[attr-defined]
        assert values == [ast.literal_eval(task.key[0])]


def test_exception_is_the_only_one_raised():
    for document, task in tasks_of("exception"):
        code = "\n".join(the_one(document, task.subject[0])["lines"])
        assert task.key[0] in re.findall(r"\braise (\w+)", code)
        node = the_one(document, task.subject[0])["node"]
        inner = {
            id(item)
            for child in ast.walk(node)
            if child is not node and isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef))
            for item in ast.walk(child)
        }
        raised = {
            re.split(r"[(\s]", ast.unparse(item))[1]
            for item in ast.walk(node)
            if isinstance(item, ast.Raise) and item.exc and id(item) not in inner
        }
        assert raised == {task.key[0]}


def test_base_is_the_only_one():
    for document, task in tasks_of("base"):
        assert the_one(document, task.subject[0])["bases"] == list(task.key)


def test_line_stands_in_the_function():
    for document, task in tasks_of("home_of_line"):
        assert document.text.count(task.subject[0]) == 1
        homes = [row for row in outline(document) if any(line.strip() == task.subject[0] for line in row["lines"])]
        assert homes[-1]["name"] == task.key[0], "the innermost comes last"


def test_next_line_comes_next():
    for document, task in tasks_of("next_line"):
        after = document.text.split(task.subject[0], 1)[1]
        assert document.text.count("\n" + task.subject[0] + "\n") <= 1
        assert after.split("\n")[1].strip() == task.key[0]


def _document(text: str, *definitions: Definition, constants: tuple[Constant, ...] = ()) -> Document:
    return Document("d", "source", text, ("m", "n"), definitions, constants)


def test_ambiguous_names_are_not_asked_for():
    """Each text has a second definition of the name, seen only in the text."""
    rng = random.Random(0)
    twice = "class A(B):\n  def f(x, y): raise KeyError\nmore = 'def f(x): pass'\n# class A"
    items = (
        Definition("A", "class", "m", bases=("B",), docstring="A long first line."),
        Definition("f", "method", "m", "A", parameters=("x", "y"), exceptions=frozenset({"KeyError"})),
    )
    for kind in ("docstring", "module_of", "class_of", "parameters", "exception", "base", "follows", "home_of_line"):
        assert TASKS[kind][0](_document(twice, *items), rng) is None, kind
    once = twice.split("\nmore")[0]
    for kind in ("module_of", "class_of", "parameters", "exception", "base"):
        assert TASKS[kind][0](_document(once, *items), rng) is not None, kind


def test_a_method_of_a_class_defined_twice_is_not_asked_for():
    method = Definition("go", "method", "m", "A")
    text = "class A:\n  def go(self): 0\n"
    assert TASKS["class_of"][0](_document(text, method), random.Random(0)) is not None
    assert TASKS["class_of"][0](_document(text + "class A: 0", method), random.Random(0)) is None


def test_a_docstring_that_the_text_spells_otherwise_is_not_asked_for():
    """The docstring holds a real tab, the text the two characters that stand for it."""
    item = Definition("f", "function", "m", docstring="Splits at each \t sign.\nMore.")
    assert (
        TASKS["docstring"][0](_document('def f():\n  """Splits at each \t sign.', item), random.Random(0)) is not None
    )
    assert TASKS["docstring"][0](_document('def f():\n  """Splits at each \\t sign.', item), random.Random(0)) is None


@pytest.mark.parametrize("again", ["PORT = 2", "  PORT += 1", "f(PORT=3)", "PORT: int = 4", "if (PORT := 5): pass"])
def test_a_constant_assigned_again_is_not_asked_for(again: str):
    constants = (Constant("PORT", "1", "m"),)
    writer = TASKS["constant"][0]
    assert writer(_document("PORT = 1\nif PORT == 1: pass", constants=constants), random.Random(0)) is not None
    assert writer(_document(f"PORT = 1\n{again}", constants=constants), random.Random(0)) is None


def test_conditional_definitions_are_no_neighbours():
    rng = random.Random(0)
    text = "def a(): 0\nif x:\n  def b(): 0\ndef c(): 0"
    a, b, c = (Definition(name, "function", "m", conditional=name == "b") for name in "abc")
    assert TASKS["follows"][0](_document(text, a, b, c), rng) is None
    assert TASKS["top_level"][0](_document(text, a, b, c), rng) is None


def test_facts_whose_words_the_document_knows_are_not_hidden():
    slots = [words for family in FAMILIES.values() for words in family.slots.values()]
    known = " ".join(word for words in slots if isinstance(words, tuple) for word in words)
    known += " ".join(map(str, range(100, 1_000)))
    for seed in range(20):
        task = TASKS["fact"][0](_document(known), random.Random(seed))
        assert task is None or "parcel" in task.question, "only a parcel's label is not in the text"


def test_facts_of_one_draw_share_no_word():
    rng = random.Random(5)
    families = set()
    for _ in range(300):
        facts = draw_facts(rng, count=4)
        families.add(facts[0].family)
        words = [word for fact in facts for word in (*fact.subject, fact.value)]
        assert len(words) == len(set(words))
        for fact in facts:
            assert fact.value in fact.sentence
            assert fact.value in fact.answer
            assert fact.value not in fact.question
            assert all(word in fact.sentence and word in fact.question for word in fact.subject)
    assert families == set(FAMILIES)


def test_the_subject_of_the_evaluation_stays_unseen():
    everything = repr(FAMILIES) + repr(QUESTIONS) + repr(ANSWERS)
    for family in range(2_000):
        everything += draw_facts(random.Random(family), count=1)[0].sentence
    assert not re.search(r"san francisco|sandwich|dolores|best thing to do|sunny", everything, re.IGNORECASE)


def test_mix_is_two_fifths_facts_and_the_same_for_the_same_seed():
    kinds = Counter()
    for document in some_documents():
        task = write_task(document, random.Random(document.document_id))
        assert task == write_task(document, random.Random(document.document_id))
        kinds[task.kind if task else None] += 1
    total = sum(kinds.values())
    assert kinds[None] == 0
    assert 0.3 < (kinds["fact"] + kinds["fact_among_others"]) / total < 0.5
    assert len(kinds) >= 12
    assert max(number for kind, number in kinds.items() if kind not in FACTS) < 0.2 * total
