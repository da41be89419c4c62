"""The parts of the token store: one a slice of the corpus, named by a digest of all that its contents depend on.

So a part that is there is right, and what was done before is kept whatever changes around it: where a file is added,
mended or left out, its slices alone are tokenised.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longalign_ray.config import CorpusConfig, SourceConfig
from longalign_ray.data.corpus import CorpusSlice, cut_into_slices
from longalign_ray.data.corpus_files import CorpusFile
from longalign_ray.errors import CorpusError
from longalign_ray.run_dir import digest

FILES_AT_A_TIME = 16


@dataclass(frozen=True, slots=True)
class StorePart:
    """A slice of the corpus, and the name of what is made of it. Equal slices of two sources share a part."""

    name: str
    """`part-` and the digest."""
    source: str
    style: str
    setting: str
    """Where the recipe names the file, for what is said about it."""
    slice: CorpusSlice

    @property
    def task(self) -> dict[str, Any]:
        """What `tokenise_slice` takes, as plain values."""
        return {"name": self.name, "style": self.style, "setting": self.setting, **dataclasses.asdict(self.slice)}


def store_parts(
    corpus: CorpusConfig, sources: Mapping[str, SourceConfig], files: Mapping[str, Sequence[CorpusFile]], contents: Any
) -> tuple[list[StorePart], list[str]]:
    """The parts in the order of the corpus, and what is wrong with files that cannot be cut into slices.

    `contents` is all but the corpus that tokens and index rows depend on.
    """
    parts: list[StorePart] = []
    problems: list[str] = []
    with ThreadPoolExecutor(FILES_AT_A_TIME) as threads:  # JSONL is read to its end for this: the wait is for its store
        cut = {source: list(threads.map(_slices, found)) for source, found in files.items()}
    for source, found in files.items():
        style, setting = sources[source].style or "auto", corpus.setting_of(source)
        for file, slices in zip(found, cut[source], strict=True):
            if isinstance(slices, CorpusError):
                problems.append(f"{setting}: {slices}")
                continue
            for part in slices:
                name = f"part-{digest(dataclasses.asdict(part), file.state, style, contents)}"
                parts.append(StorePart(name, source, style, setting, part))
    return parts, problems


def _slices(file: CorpusFile) -> list[CorpusSlice] | CorpusError:
    try:
        return cut_into_slices(file)
    except CorpusError as error:
        return error


def remove_others(store: Path, names: Collection[str] | None) -> None:
    """Removes the parts that are not among `names` (None: keeps all), and what killed writers left."""
    stale = [
        path
        for path in store.iterdir()
        if path.suffix == ".tmp" or (names is not None and path.name.startswith("part-") and path.stem not in names)
    ]
    if any(path.suffix != ".tmp" for path in stale):
        (store / "index.parquet").unlink(missing_ok=True)  # first, as it names them
    for path in sorted(stale, key=lambda path: path.suffix != ".json"):  # what says that a part is whole goes first
        path.unlink(missing_ok=True)
