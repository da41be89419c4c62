"""Long documents out of the standard library that every Python has, cut along top-level definitions.

The text belongs to the Python Software Foundation and its contributors (PSF licence). It is read from the
installation of the running interpreter and is no part of this package.

Modules stand on shelves of a few modules each; the pieces of a shelf are dealt into its documents in order:

    shelf (cmd, json.decoder)   document 0: "# Module: cmd" <first pieces> "# Module: json.decoder" <first pieces>
                                document 1: the same two headings, <the pieces that follow>

A heading stands alone on its line. The same Python version and seed give the same documents.
"""

from __future__ import annotations

import os
import random
import sysconfig
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from longalign_ray.construct.pieces import Constant, Definition, Piece

HEADING = "# Module: "
FOREIGN_DIRS = {"site-packages", "dist-packages", "lib-dynload", "__pycache__"}
# Tests and demos, data written as code, and copies of other projects: little to ask about.
EXCLUDED_DIRS = {
    "test", "tests", "idlelib", "turtledemo", "lib2to3", "ensurepip", "encodings", "pydoc_data", "__phello__"
}  # fmt: skip
EXCLUDED_FILES = {"__hello__.py", "this.py", "antigravity.py", "sitecustomize.py", "usercustomize.py"}
# Files that describe the machine rather than Python.
EXCLUDED_PREFIXES = ("_sysconfigdata", "config-")
SOURCE_SHARE = 0.65
# Modules on a shelf, by the form in which it shows them.
SIZES = {"source": (1, 2, 3, 4), "manual": (3, 4, 5, 6)}
SIZE_WEIGHTS = (55, 20, 15, 10)


@dataclass(frozen=True, slots=True)
class Shelf:
    """Modules (paths below the standard library) whose pieces share documents."""

    shelf_id: int
    form: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Document:
    """Text with what is known to be in it; definitions and constants in order of appearance."""

    document_id: str
    form: str
    text: str
    modules: tuple[str, ...]
    definitions: tuple[Definition, ...]
    constants: tuple[Constant, ...]


def stdlib_root() -> Path:
    """Directory of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def module_files(root: Path) -> tuple[list[str], int]:
    """Sorted paths below `root` of the modules worth reading, and the number of its other .py files."""
    kept, num_excluded = [], 0
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in FOREIGN_DIRS]
        place = PurePosixPath(Path(folder).relative_to(root).as_posix())
        for name in names:
            if not name.endswith(".py"):
                continue
            parts = (*place.parts, name)
            if EXCLUDED_DIRS.intersection(parts) or name in EXCLUDED_FILES or parts[0].startswith(EXCLUDED_PREFIXES):
                num_excluded += 1
            else:
                kept.append("/".join(parts))
    return sorted(kept), num_excluded


def module_name(file: str) -> str:
    """`json/decoder.py` -> `json.decoder`, `json/__init__.py` -> `json`."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def shelves(files: Sequence[str], *, max_chars: int, seed: int) -> list[Shelf]:
    """Every file once as source and once as a manual, in orders drawn by seed; longer documents get more modules."""
    rng = random.Random(f"shelves:{seed}")
    # A module has 19,000 characters on average, a quarter of that as a manual.
    per_document = 1 + max_chars // 30_000
    waiting = {form: rng.sample(files, len(files)) for form in SIZES}
    made: list[Shelf] = []
    while any(waiting.values()):
        form = "source" if rng.random() < SOURCE_SHARE else "manual"
        if waiting[form]:
            size = rng.choices(SIZES[form], SIZE_WEIGHTS)[0] * per_document
            made.append(Shelf(len(made), form, tuple(waiting[form][:size])))
            del waiting[form][:size]
    return made


def cut_documents(
    shelf: Shelf, modules: Mapping[str, Sequence[Piece]], *, min_chars: int, max_chars: int, rng: random.Random
) -> tuple[list[Document], Counter[str]]:
    """Documents of `min_chars` to `max_chars` characters, and what was dropped by reason.

    `modules` has the pieces of each module by name. Lengths aim at a log-uniform draw over the range: many short
    documents, a long tail. A module's pieces stay in order, and no two documents share one.
    """
    dropped: Counter[str] = Counter()
    queues: dict[str, deque[Piece]] = {}
    for name, pieces in modules.items():
        room = max_chars - len(f"{HEADING}{name}\n")
        fitting = [piece for piece in pieces if len(piece.text) <= room]
        dropped["definitions_too_long"] += len(pieces) - len(fitting)
        queues[name] = deque(fitting)
    made: list[Document] = []
    while any(queues.values()):
        target = min_chars * (max_chars / min_chars) ** rng.random()
        excerpts = _deal(queues, target=target, min_chars=min_chars, max_chars=max_chars)
        document = _document(f"stdlib-{shelf.shelf_id:04d}-{len(made):02d}", shelf.form, excerpts)
        if min_chars <= len(document.text) <= max_chars:
            made.append(document)
        else:
            dropped["documents_too_short"] += 1
    return made, dropped


def _deal(
    queues: Mapping[str, deque[Piece]], *, target: float, min_chars: int, max_chars: int
) -> dict[str, list[Piece]]:
    """Pieces taken off the queues: an equal share of `target` from each module, then up to `min_chars` from any."""
    excerpts: dict[str, list[Piece]] = {}
    size = 0

    def take(name: str, limit: float) -> bool:
        nonlocal size
        if not queues[name]:
            return False
        # What `_document` puts before a piece: a newline, or the heading and what parts it from the text above.
        before = 1 if name in excerpts else len(f"{HEADING}{name}\n") + 2 * bool(excerpts)
        new_size = size + before + len(queues[name][0].text)
        if new_size > limit:
            return False
        excerpts.setdefault(name, []).append(queues[name].popleft())
        size = new_size
        return True

    waiting = [name for name in queues if queues[name]]
    for position, name in enumerate(waiting):
        share = size + (target - size) / (len(waiting) - position)
        take(name, max_chars)
        while take(name, share):
            pass
    for name in waiting:
        while size < min_chars and take(name, max_chars):
            pass
    return excerpts


def _document(document_id: str, form: str, excerpts: Mapping[str, Sequence[Piece]]) -> Document:
    texts = []
    for name, pieces in excerpts.items():
        body = "\n".join(piece.text for piece in pieces).strip("\n")
        texts.append(f"{HEADING}{name}\n{body}")
    return Document(
        document_id=document_id,
        form=form,
        text="\n\n".join(texts),
        modules=tuple(excerpts),
        definitions=tuple(item for pieces in excerpts.values() for piece in pieces for item in piece.definitions),
        constants=tuple(item for pieces in excerpts.values() for piece in pieces for item in piece.constants),
    )
