"""Conversations that hold a piece of an evaluation set, found by their runs of n words.

As published for GPT-3 (Brown et al. 2020, appendix C): texts are compared without case and punctuation, and one shared
run of 13 words is enough to leave a training text out. There the document was cut around the run; a conversation with
a hole would teach nothing, so here it goes whole. Chinese and Japanese characters are words. An evaluation text of
fewer than n words cannot be found; such texts are counted.

The runs are kept as a sorted array of 64-bit hashes, 8 bytes each, without a filter's false positives: two different
runs have the same hash with a chance of 2^-64, so among 10^6 evaluation runs and 10^10 of training once in 1,800 times.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from longalign_ray.data.conversation import Conversation, RecordError
from longalign_ray.data.corpus import corpus_files, cut_into_slices, read_records
from longalign_ray.data.words import ngram_hashes, words
from longalign_ray.errors import CorpusError

TEXT_ENDINGS = (".txt", ".md")
SETTING = "data.decontaminate.paths"


@dataclass(frozen=True, slots=True, eq=False)
class EvaluationRuns:
    """Runs of n words of evaluation sets."""

    hashes: np.ndarray
    """uint64[m], ascending, each once."""
    n: int
    num_texts: int
    num_short_texts: int
    """Texts of fewer than n words, which are not looked for."""

    @staticmethod
    def of(texts: Iterable[str], n: int) -> EvaluationRuns:
        found: list[np.ndarray] = []
        num_texts = num_short = 0
        for text in texts:
            runs = ngram_hashes(words(text), n)
            num_texts += 1
            num_short += not len(runs)
            found.append(runs)
        hashes = np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)
        return EvaluationRuns(hashes, n, num_texts, num_short)


def contamination(conversation: Conversation, hashes: np.ndarray, n: int) -> str | None:
    """The first run of n words, separated by spaces, that the conversation shares with those of `hashes`; None where
    there is none. Every turn is looked at, the system's too, each by itself."""
    if not len(hashes):
        return None
    texts = [conversation.text] if conversation.text is not None else [m.content for m in conversation.messages]
    for text in texts:
        text_words = words(text)
        runs = ngram_hashes(text_words, n)
        places = np.searchsorted(hashes, runs)
        shared = np.flatnonzero(hashes[np.minimum(places, len(hashes) - 1)] == runs)
        if len(shared):
            return " ".join(text_words[shared[0] : shared[0] + n])
    return None


def evaluation_texts(patterns: Sequence[str], *, endpoint: str | None = None) -> Iterator[str]:
    """Every string of the files: whole text files, and all values of records however deep.

    Raises CorpusError where a pattern matches nothing, a file cannot be read or a record is broken.
    """
    for pattern in patterns:
        if pattern.endswith(TEXT_ENDINGS):
            for path in _text_paths(pattern):
                with _naming(path):
                    yield Path(path).read_text(encoding="utf-8")
            continue
        for file in corpus_files([pattern], endpoint=endpoint, setting=SETTING):
            try:
                for part in cut_into_slices(file):
                    for number, record in read_records(part):
                        if isinstance(record, RecordError):
                            raise CorpusError(f"{file.path}, record {number}: {record}")
                        yield from _strings(record)
            except CorpusError as error:
                raise CorpusError(f"{SETTING}: {error}") from error


def evaluation_state(patterns: Sequence[str], *, endpoint: str | None = None) -> list[tuple[str, int, str]]:
    """Name, size and version of each file. Raises CorpusError as `evaluation_texts` does."""
    states: list[tuple[str, int, str]] = []
    for pattern in patterns:
        if pattern.endswith(TEXT_ENDINGS):
            for path in _text_paths(pattern):
                with _naming(path):
                    status = Path(path).stat()
                states.append((path, status.st_size, str(status.st_mtime_ns)))
        else:
            states += [file.state for file in corpus_files([pattern], endpoint=endpoint, setting=SETTING)]
    return states


def _text_paths(pattern: str) -> list[str]:
    paths = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
    if not paths:
        raise CorpusError(f"{SETTING}: {pattern} matches no file; check the pattern")
    return paths


@contextmanager
def _naming(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{SETTING}: {path} cannot be read ({error}); check it") from error


def _strings(value: Any) -> Iterator[str]:
    """The strings in a JSON value, without the keys of its objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
