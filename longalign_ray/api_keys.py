"""API keys: read from a file or the environment where the recipe names the place, and known to servers as digests."""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Sequence
from pathlib import Path

from longalign_ray.errors import ServingError

MIN_KEY_CHARS = 16


def read_key(place: str) -> str:
    """The key that a client sends, the first one there. Raises ServingError where there is none."""
    return read_keys(place, min_chars=1)[0]


def read_keys(place: str, *, min_chars: int = MIN_KEY_CHARS) -> tuple[str, ...]:
    """The keys at `env:NAME` or `file:PATH`, separated by white space.

    Raises ServingError, without showing any of it, where there are none or one is too short or not ASCII.
    """
    kind, _, name = place.partition(":")
    if kind == "env":
        text, what = os.environ.get(name, ""), f"the environment variable {name}"
    else:
        what = f"the file {name}"
        try:
            text = Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ServingError(
                f"the API keys of {place} cannot be read ({type(error).__name__}): make {what}"
            ) from None
    keys = tuple(text.split())
    if not keys:
        raise ServingError(f"{what} holds no API key: put one there, for example from `openssl rand -hex 24`")
    for number, key in enumerate(keys, start=1):
        if len(key) < min_chars or not key.isascii():
            raise ServingError(
                f"key {number} of {len(keys)} in {what} has {len(key)} characters; give at least {min_chars}, all "
                "ASCII, for example from `openssl rand -hex 24`"
            )
    return keys


def digests(keys: Sequence[str]) -> tuple[bytes, ...]:
    """SHA-256 of each key: what travels to the server's processes, and is of one length, whatever the key's."""
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def is_known(key: bytes, known: Sequence[bytes]) -> bool:
    """Whether the digest of `key` is among `known`; the time taken tells neither which one nor how much of it fits."""
    digest = hashlib.sha256(key).digest()
    same = [hmac.compare_digest(digest, each) for each in known]
    return any(same)  # only now, so that all were compared
