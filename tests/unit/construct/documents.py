"""Documents of a seeded part of the standard library, for the tests beside this file."""

from __future__ import annotations

import random
from functools import cache

from longalign_ray.construct.documents import Document, cut_documents, module_files, module_name, shelves, stdlib_root
from longalign_ray.construct.pieces import pieces_of


@cache
def some_documents(num_shelves: int = 45, *, min_chars: int = 1_500, max_chars: int = 14_000) -> tuple[Document, ...]:
    """Documents of the first shelves of seed 3, both forms among them."""
    root = stdlib_root()
    made: list[Document] = []
    for shelf in shelves(module_files(root)[0], max_chars=max_chars, seed=3)[:num_shelves]:
        modules = {}
        for file in shelf.files:
            name = module_name(file)
            text = (root / file).read_text(encoding="utf-8").replace("\f", "")
            modules[name] = pieces_of(text, module=name, form=shelf.form)
        rng = random.Random(shelf.shelf_id)
        made += cut_documents(shelf, modules, min_chars=min_chars, max_chars=max_chars, rng=rng)[0]
    return tuple(made)
