"""Documents: which modules they come from, how they are cut, and that the same seed gives the same."""

from __future__ import annotations

import ast
import random
from collections import Counter
from pathlib import Path

import pytest

from longalign_ray.construct.documents import (
    HEADING,
    Shelf,
    cut_documents,
    module_files,
    module_name,
    shelves,
    stdlib_root,
)
from longalign_ray.construct.pieces import Definition, Piece
from tests.unit.construct.documents import some_documents


def test_module_files_leaves_out_tests_other_projects_and_the_machine(tmp_path: Path):
    wanted = ["json/__init__.py", "json/decoder.py", "queue.py"]
    unwanted = ["test/test_a.py", "json/tests/b.py", "idlelib/c.py", "_sysconfigdata_x.py", "this.py", "encodings/d.py"]
    foreign = ["site-packages/e/f.py", "json/__pycache__/g.py", "notes.txt"]
    for name in wanted + unwanted + foreign:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert module_files(tmp_path) == (wanted, len(unwanted))
    assert [module_name(name) for name in wanted] == ["json", "json.decoder", "queue"]
    assert module_files(tmp_path / "nowhere") == ([], 0)


def test_the_running_python_has_hundreds_of_modules():
    files, _ = module_files(stdlib_root())
    assert len(files) > 250
    assert {"argparse.py", "json/decoder.py", "collections/__init__.py"} <= set(files)


def test_shelves_hold_every_file_once_in_each_form():
    files = [f"m{number}.py" for number in range(100)]
    made = shelves(files, max_chars=14_000, seed=1)
    for form in ("source", "manual"):
        assert sorted(file for shelf in made if shelf.form == form for file in shelf.files) == sorted(files)
    assert [shelf.shelf_id for shelf in made] == list(range(len(made)))
    assert made == shelves(files, max_chars=14_000, seed=1)
    assert made != shelves(files, max_chars=14_000, seed=2)
    assert len(shelves(files, max_chars=140_000, seed=1)) < len(made) / 3, "longer documents, more modules on a shelf"


def _piece(name: str, size: int) -> Piece:
    text = f"# {name}".ljust(size, ".")
    return Piece(text, (Definition(name, "function", "m"),))


def test_pieces_are_dealt_in_order_and_never_twice():
    modules = {name: [_piece(f"{name}{number}", 90) for number in range(40)] for name in "ab"}
    made, dropped = cut_documents(
        Shelf(7, "source", ("a.py", "b.py")), modules, min_chars=300, max_chars=2_000, rng=random.Random(0)
    )
    assert len(made) > 3
    assert [document.document_id for document in made[:2]] == ["stdlib-0007-00", "stdlib-0007-01"]
    for name in "ab":
        seen = [item.name for document in made for item in document.definitions if item.name.startswith(name)]
        numbers = [int(item[1:]) for item in seen]
        assert numbers == sorted(set(numbers))
    assert sum(len(document.definitions) for document in made) >= 80 - 3 * dropped["documents_too_short"]
    for document in made:
        assert 300 <= len(document.text) <= 2_000
        assert all(f"# {item.name}." in document.text for item in document.definitions)
        assert [line.removeprefix(HEADING) for line in document.text.split("\n") if line.startswith(HEADING)] == list(
            document.modules
        )


def test_what_does_not_fit_is_dropped_with_a_number():
    modules = {"a": [_piece("small", 50), _piece("huge", 5_000), _piece("large", 400), _piece("rest", 20)]}
    made, dropped = cut_documents(
        Shelf(0, "source", ("a.py",)), modules, min_chars=200, max_chars=500, rng=random.Random(0)
    )
    names = [[item.name for item in document.definitions] for document in made]
    assert names in ([["small", "large"]], [["small", "large", "rest"]])
    assert dropped["definitions_too_long"] == 1
    assert dropped["documents_too_short"] == 2 - len(names[0]) + 1


@pytest.mark.parametrize("size", [477, 478, 479])
def test_a_definition_of_exactly_the_longest_document_survives(size: int):
    made, dropped = cut_documents(
        Shelf(0, "source", ("a.py",)), {"a": [_piece("x", size)]}, min_chars=100, max_chars=490, rng=random.Random(0)
    )
    fits = len(f"{HEADING}a\n") + size <= 490
    assert [len(document.text) for document in made] == ([len(f"{HEADING}a\n") + size] if fits else [])
    assert dropped["definitions_too_long"] == (not fits)


def test_lengths_cover_the_range_with_a_long_tail():
    lengths = sorted(len(document.text) for document in some_documents())
    assert lengths[0] >= 1_500
    assert lengths[-1] <= 14_000
    assert lengths[-1] > 10_000
    tenth, median, nine_tenths = (lengths[len(lengths) * part // 10] for part in (1, 5, 9))
    assert tenth < 3_000 < median < 7_000 < nine_tenths


def test_real_documents_show_what_they_claim():
    documents = some_documents()
    assert Counter(document.form for document in documents).keys() == {"source", "manual"}
    for document in documents:
        for item in document.definitions:
            word = {"method": "def"}.get(item.kind, item.kind).replace("function", "def")
            if document.form == "source":
                assert f"{word} {item.name}" in document.text
            else:
                assert f"{item.kind} {item.name}(" in document.text
        if document.form == "source":
            ast.parse(document.text)
