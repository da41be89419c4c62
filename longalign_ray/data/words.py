"""Words of a text, and hashes of runs of them: what texts are compared by, whatever their case and punctuation.

"Don't  STOP, 再见!"  ->  don t stop 再 见
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

# Scripts written without spaces, in which a character stands for a word: kana and Han. Korean has spaces.
UNSPACED = "\u3041-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so that multiplying by it loses nothing


def words(text: str) -> list[str]:
    """Runs of letters and digits, and single Chinese and Japanese characters; case folded, compatible forms (full
    width, ligatures) made one."""
    return WORD.findall(text.lower() if text.isascii() else unicodedata.normalize("NFKC", text).casefold())


def ngram_hashes(text_words: Sequence[str], n: int) -> np.ndarray:
    """uint64[max(len - n + 1, 0)]: a hash of each run of n words, the same in every process."""
    hashes = np.fromiter(map(_word_hash, text_words), np.uint64, len(text_words))
    runs = np.zeros(max(len(hashes) - n + 1, 0), np.uint64)
    for start in range(n):  # Horner's rule over the words of a run, modulo 2^64
        runs = runs * FACTOR + hashes[start : start + len(runs)]
    return _mixed(runs)


def hash_of(data: bytes) -> int:
    """64 bits."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return hash_of(word.encode("utf-8", "surrogatepass"))


def _mixed(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64: spreads each bit over all 64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
