"""Equal and similar conversations: what is compared, and which of them stays.

Each example brings a fingerprint, made where it is tokenised: a hash of its text and, for `near`, a MinHash signature
(datasketch). The driver decides on these alone, in the order of the corpus, so the result is the same for any number of
workers. The first of a group stays: an example is left out where one that stays is equal or similar enough to it. So a
chain of texts, each like the next, loses only those like a kept one.

Memory of the driver: about 60 bytes an example for `exact`; for `near` also the signature (4 bytes a permutation: 512)
and about 4.5 kB for each different example in the LSH index: 5 GB for a million.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from longalign_ray.config import DedupConfig
from longalign_ray.data.conversation import Conversation
from longalign_ray.data.words import hash_of, ngram_hashes, words
from longalign_ray.errors import ConfigError

HASH_BYTES = 16
SHINGLES_AT_A_TIME = 16_384  # 8 MB at 128 permutations
LSH_WEIGHTS = (0.1, 0.9)  # of false positives and negatives: candidates are checked, what is never met is lost


@dataclass(frozen=True, slots=True, eq=False)
class Duplicates:
    """kept[i] = i where example i stays, else the example because of which it is left out."""

    kept: np.ndarray
    """int64[n]."""
    equal: np.ndarray
    """bool[n]: left out for a text that came before; others that are left out are similar to kept[i]."""


def check_dedup(config: DedupConfig) -> None:
    """Raises ConfigError where the method needs a package that is not there."""
    if config.method == "near":
        _datasketch()


def fingerprint(conversation: Conversation, config: DedupConfig) -> bytes:
    """The content hash and, for `near`, after it the signature; nothing where no duplicates are looked for."""
    if config.method == "none":
        return b""
    return content_hash(conversation) + (signature(conversation, config) if config.method == "near" else b"")


def fingerprint_bytes(config: DedupConfig) -> int:
    """Length of a fingerprint."""
    return {"none": 0, "exact": HASH_BYTES, "near": HASH_BYTES + 4 * config.num_permutations}[config.method]


def content_hash(conversation: Conversation) -> bytes:
    """A hash of the roles and texts, white space around them aside, of all but the system's turns."""
    turns = [[role, text.strip()] for role, text in _turns(conversation)]
    return hashlib.blake2b(
        json.dumps(turns, ensure_ascii=False).encode("utf-8", "surrogatepass"), digest_size=HASH_BYTES
    ).digest()


def signature(conversation: Conversation, config: DedupConfig) -> bytes:
    """The MinHash of the set of runs of `shingle_words` words: num_permutations values of 4 bytes.

    A text of fewer words is one run, and a text without words is itself.
    """
    text = "\n".join(text for _, text in _turns(conversation))
    text_words = words(text)
    runs = ngram_hashes(text_words, min(config.shingle_words, max(len(text_words), 1)))
    if not len(runs):
        runs = np.array([hash_of(text.encode("utf-8", "surrogatepass"))], np.uint64)
    low = np.unique(runs & np.uint64(0xFFFFFFFF))
    minhash = _minhash(config.num_permutations)
    for first in range(0, len(low), SHINGLES_AT_A_TIME):
        minhash.update_batch(low[first : first + SHINGLES_AT_A_TIME].tolist())
    return minhash.hashvalues.astype("<u4").tobytes()


def find_duplicates(fingerprints: np.ndarray, config: DedupConfig) -> Duplicates:
    """What stays of the examples whose fingerprints (uint8[n, fingerprint_bytes]) come in the order of the corpus."""
    rows = np.arange(len(fingerprints))
    if config.method == "none":
        return Duplicates(rows, np.zeros(len(rows), np.bool_))
    hashes = np.ascontiguousarray(fingerprints[:, :HASH_BYTES]).view(f"V{HASH_BYTES}").ravel()
    _, first, group = np.unique(hashes, return_index=True, return_inverse=True)
    earliest = first[group]
    equal = earliest != rows
    kept = rows.copy()
    if config.method == "near":
        signatures = np.ascontiguousarray(fingerprints[:, HASH_BYTES:]).view("<u4")
        for row, similar in _similar_to_earlier(np.flatnonzero(~equal), signatures, config.threshold):
            kept[row] = similar
    return Duplicates(kept[earliest], equal)


def without_duplicates(
    table: pa.Table, paths: Sequence[str], config: DedupConfig
) -> tuple[pa.Table, dict[int, list[dict[str, Any]]]]:
    """The index rows of the examples that stay, and the rejects of each store file that has some.

    `table` has the columns file, line, example_id and fingerprint; the rows of one record stand together and have one
    fingerprint. paths[file] is where a store file's records came from.
    """
    if config.method == "none" or not len(table):
        return table, {}
    file, line = (table[name].to_numpy().astype(np.int64) for name in ("file", "line"))
    starts = np.flatnonzero(np.concatenate([[True], (file[1:] != file[:-1]) | (line[1:] != line[:-1])]))
    column = table["fingerprint"].take(starts).combine_chunks()
    width = fingerprint_bytes(config)
    values = np.frombuffer(column.buffers()[1], np.uint8)[column.offset * width :][: len(column) * width]
    found = find_duplicates(values.reshape(-1, width), config)
    stays = found.kept == np.arange(len(starts))
    rejects: dict[int, list[dict[str, Any]]] = {}
    for record in np.flatnonzero(~stays).tolist():
        row, kept = int(starts[record]), int(starts[found.kept[record]])
        equal = bool(found.equal[record])
        place = f"{table['example_id'][kept]} ({paths[file[kept]]}, line {line[kept]})"
        reject = {
            "file": paths[file[row]],
            "line": int(line[row]),
            "reason": "duplicate" if equal else "near_duplicate",
            "detail": f"{'the text of' if equal else 'much like'} {place}, which is kept",
            "kept": table["example_id"][kept].as_py(),
        }
        rejects.setdefault(int(file[row]), []).append(reject)
    rows_of_record = np.diff(np.append(starts, len(table)))
    return table.filter(pa.array(np.repeat(stays, rows_of_record))), rejects


def _similar_to_earlier(rows: np.ndarray, signatures: np.ndarray, threshold: float) -> Iterator[tuple[int, int]]:
    """(row, the first kept row that is similar) of each row that has one."""
    index = _datasketch().MinHashLSH(threshold=threshold, num_perm=signatures.shape[1], weights=LSH_WEIGHTS)
    for row in rows.tolist():
        minhash = _minhash(signatures.shape[1], signatures[row])
        candidates = np.sort(np.array(index.query(minhash), dtype=np.int64))
        similarity = (signatures[candidates] == signatures[row]).mean(axis=1)
        similar = candidates[similarity >= threshold]
        if len(similar):
            yield row, int(similar[0])
        else:
            index.insert(row, minhash, check_duplication=False)


def _turns(conversation: Conversation) -> list[tuple[str, str]]:
    """Role and text of each turn but the system's; a tool call is text too."""
    if conversation.text is not None:
        return [("text", conversation.text)]
    return [
        (message.role, message.content + (json.dumps(message.tool_calls, sort_keys=True) if message.tool_calls else ""))
        for message in conversation.messages
        if message.role != "system"
    ]


def _minhash(num_permutations: int, values: np.ndarray | None = None) -> Any:
    """A MinHash over hashes of 32 bits, empty or with the values of a signature."""
    return _datasketch().MinHash(
        num_perm=num_permutations,
        permutations=_permutations(num_permutations),
        hashvalues=values,
        hashfunc=int,
        scheme="affine32",
    )


@lru_cache(maxsize=4)
def _permutations(num_permutations: int) -> np.ndarray:
    return _datasketch().MinHash(num_perm=num_permutations, seed=1, scheme="affine32").permutations


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise ConfigError(
            "data.dedup = near needs the package datasketch: pip install 'longalign_ray[dedup]', or choose exact"
        ) from error
    return datasketch
