"""Pieces of a module: what they show and what they say that they define."""

from __future__ import annotations

import pytest

from longalign_ray.construct.pieces import Constant, pieces_of, times_defined

SOURCE = '''"""Doc of the module."""
import os; import sys

# The limit.
LIMIT = 0x10


class Store(dict):
    """Keeps things.

    For long."""

    @property
    def size(self, /, *, unit="b", **rest):
        """Number of entries."""
        def inner():
            raise KeyError
        raise ValueError("no")

    def plain(self): pass


if os:
    def maybe(): raise
async def fetch(url, *urls): raise os.error
'''


def test_source_pieces_carry_the_text_unchanged():
    pieces = pieces_of(SOURCE, module="m", form="source")
    assert "\n".join(piece.text for piece in pieces) == SOURCE.rstrip("\n")
    assert [len(piece.definitions) for piece in pieces] == [0, 0, 0, 3, 1, 1]
    assert pieces[1].text == "import os; import sys"
    assert pieces[2].text == "\n# The limit.\nLIMIT = 0x10"
    assert pieces[2].constants == (Constant("LIMIT", "0x10", "m"),)


def test_definitions_know_their_class_signature_docstring_and_exceptions():
    store, size, plain, maybe, fetch = (
        item for piece in pieces_of(SOURCE, module="m", form="source") for item in piece.definitions
    )
    assert (store.kind, store.bases, store.docstring) == ("class", ("dict",), "Keeps things.\n\nFor long.")
    assert (size.kind, size.path, size.parameters) == ("method", "Store.size", ("self", "unit", "**rest"))
    assert size.exceptions == {"ValueError"}, "the raise of the nested function is not its own"
    assert size.body.startswith("    def size(self")
    assert size.body.endswith('raise ValueError("no")')
    assert (plain.owner, plain.exceptions) == ("Store", frozenset())
    assert (maybe.conditional, maybe.kind, maybe.exceptions) == (True, "function", {"?"})
    assert (fetch.conditional, fetch.parameters, fetch.exceptions) == (False, ("url", "*urls"), {"?"})


def test_manual_shows_signatures_and_docstrings_of_what_is_documented():
    pieces = pieces_of(SOURCE, module="m", form="manual")
    assert "\n".join(piece.text for piece in pieces) == (
        "Doc of the module.\n\n"
        "class Store(dict)\n    Keeps things.\n\n    For long.\n\n"
        "    method size(self, /, *, unit='b', **rest)\n        Number of entries.\n"
    )
    assert [item.path for item in pieces[1].definitions] == ["Store", "Store.size"]
    assert all(item.body == "" for item in pieces[1].definitions)


@pytest.mark.parametrize("form", ["source", "manual"])
def test_what_is_no_python_is_refused(form: str):
    with pytest.raises(SyntaxError):
        pieces_of("def broken(:\n", module="m", form=form)
    with pytest.raises((SyntaxError, ValueError)):
        pieces_of("a = 1\0", module="m", form=form)


def test_an_empty_module_has_no_pieces():
    assert pieces_of("", module="m", form="source") == pieces_of("# note\n", module="m", form="manual") == []


def test_times_defined_counts_code_manuals_and_prose_but_no_longer_names():
    text = "def run():\nclass run_all:\n    method run(self)\nasync def  run(x): the function runs"
    assert times_defined(text, "run") == 3
    assert times_defined(text, "r.n") == 0
