"""A Python module cut into pieces: each top-level statement with the comments above it, and what it defines.

A piece has one of two forms. `source` is the code as written; `manual` is signatures and docstrings:

    class JSONDecoder(object)
        Simple JSON decoder.

        method decode(self, s)
            Return the Python representation of s.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

Function = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True, slots=True)
class Definition:
    """A class, function or method, as far as its piece shows it."""

    name: str
    kind: Literal["class", "function", "method"]
    module: str
    owner: str = ""
    """Class of a method."""
    conditional: bool = False
    """Defined inside a top-level `if`, `try` or the like."""
    docstring: str = ""
    parameters: tuple[str, ...] = ()
    """Names in the order of the signature, `*args` and `**kwargs` with their stars."""
    bases: tuple[str, ...] = ()
    exceptions: frozenset[str] = frozenset()
    """Names in the raise statements of the body, nested functions left out; `?` for one that is no plain name."""
    body: str = ""
    """Its source; empty in a manual."""

    @property
    def path(self) -> str:
        """`function`, `Class` or `Class.method`."""
        return f"{self.owner}.{self.name}" if self.owner else self.name


@dataclass(frozen=True, slots=True)
class Constant:
    """A top-level assignment of a literal; `value` as it is written."""

    name: str
    value: str
    module: str


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of lines that is never cut."""

    text: str
    definitions: tuple[Definition, ...] = ()
    constants: tuple[Constant, ...] = ()


def pieces_of(text: str, *, module: str, form: str) -> list[Piece]:
    """Pieces of a module in order; raises SyntaxError or ValueError where `text` is no Python source."""
    return FORMS[form](text, module)


def _source_pieces(text: str, module: str) -> list[Piece]:
    lines = text.split("\n")
    pieces, previous_end = [], 0
    for start, group in _statements(ast.parse(text)):
        end = group[-1].end_lineno or start
        definitions = [item for node in group for item in _definitions(node, module, lines)]
        constants = [item for node in group for item in _constants(node, module, text)]
        pieces.append(Piece("\n".join(lines[previous_end:end]), tuple(definitions), tuple(constants)))
        previous_end = end
    return pieces


def _statements(tree: ast.Module) -> Iterator[tuple[int, list[ast.stmt]]]:
    """Top-level statements by first line; those that share a line (`a = 1; b = 2`) come together."""
    group: list[ast.stmt] = []
    for node in tree.body:
        if group and node.lineno > (group[-1].end_lineno or 0):
            yield group[0].lineno, group
            group = []
        group.append(node)
    if group:
        yield group[0].lineno, group


def _definitions(node: ast.stmt, module: str, lines: list[str]) -> Iterator[Definition]:
    """What a top-level statement defines: itself, its methods, or the definitions inside a condition."""
    if isinstance(node, DEFINITIONS):
        yield _definition(node, module, lines)
        if isinstance(node, ast.ClassDef):
            for child in node.body:
                if isinstance(child, Function):
                    yield _definition(child, module, lines, owner=node.name)
        return
    for child in ast.walk(node):
        if isinstance(child, DEFINITIONS):
            yield _definition(child, module, lines, conditional=True)


def _definition(
    node: Function | ast.ClassDef, module: str, lines: list[str] | None, *, owner: str = "", conditional: bool = False
) -> Definition:
    is_class = isinstance(node, ast.ClassDef)
    return Definition(
        name=node.name,
        kind="class" if is_class else "method" if owner else "function",
        module=module,
        owner=owner,
        conditional=conditional,
        docstring=ast.get_docstring(node) or "",
        parameters=() if is_class else _parameters(node.args),
        bases=tuple(ast.unparse(base) for base in node.bases) if is_class else (),
        exceptions=frozenset() if is_class or lines is None else frozenset(_exceptions(node)),
        body="" if lines is None else "\n".join(lines[node.lineno - 1 : node.end_lineno]),
    )


def _parameters(arguments: ast.arguments) -> tuple[str, ...]:
    names = [item.arg for item in (*arguments.posonlyargs, *arguments.args)]
    if arguments.vararg:
        names.append(f"*{arguments.vararg.arg}")
    names += [item.arg for item in arguments.kwonlyargs]
    if arguments.kwarg:
        names.append(f"**{arguments.kwarg.arg}")
    return tuple(names)


def _exceptions(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Raise):
            raised = child.exc.func if isinstance(child.exc, ast.Call) else child.exc
            yield raised.id if isinstance(raised, ast.Name) else "?"
        if not isinstance(child, (*DEFINITIONS, ast.Lambda)):
            yield from _exceptions(child)


def _constants(node: ast.stmt, module: str, text: str) -> Iterator[Constant]:
    if not isinstance(node, ast.Assign) or len(node.targets) != 1 or not isinstance(node.targets[0], ast.Name):
        return
    try:
        ast.literal_eval(node.value)
    except ValueError:
        return
    yield Constant(node.targets[0].id, ast.get_source_segment(text, node.value) or "", module)


def _manual_pieces(text: str, module: str) -> list[Piece]:
    """The module's docstring, then each top-level definition that has a docstring itself or in one of its methods."""
    tree = ast.parse(text)
    pieces = [Piece(docstring + "\n")] if (docstring := ast.get_docstring(tree)) else []
    for node in tree.body:
        if isinstance(node, DEFINITIONS):
            entries = [_definition(node, module, None)]
            signatures = [node]
            for child in node.body if isinstance(node, ast.ClassDef) else ():
                if isinstance(child, Function) and ast.get_docstring(child):
                    entries.append(_definition(child, module, None, owner=node.name))
                    signatures.append(child)
            if any(entry.docstring for entry in entries):
                shown = [_entry(entry, signature) for entry, signature in zip(entries, signatures, strict=True)]
                pieces.append(Piece("\n".join(shown), tuple(entries)))
    return pieces


def _entry(definition: Definition, node: Function | ast.ClassDef) -> str:
    inside = ", ".join(definition.bases) if isinstance(node, ast.ClassDef) else ast.unparse(node.args)
    text = f"{definition.kind} {definition.name}({inside})\n"
    if definition.docstring:
        text += textwrap.indent(definition.docstring, "    ") + "\n"
    return textwrap.indent(text, "    ") if definition.owner else text


FORMS: dict[str, Callable[[str, str], list[Piece]]] = {"source": _source_pieces, "manual": _manual_pieces}


def times_defined(text: str, name: str) -> int:
    """How often a document seems to define `name`, in code, in a manual, or in prose that reads like either."""
    return len(re.findall(rf"\b(?:def|class|function|method)\s+{re.escape(name)}\b", text))
