"""Data sets of the Hugging Face hub, streamed through the package `datasets`, shard by shard.

An address is `hf://ORG/NAME` with the arguments of `load_dataset` behind it: `?name=CONFIG&split=train&revision=main`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qsl

from longalign_ray.errors import CorpusError

ARGUMENTS = ("name", "split", "revision", "data_dir")


def hub_shards(address: str) -> int:
    """Number of shards that the data set is read in. Raises CorpusError."""
    return _load(address).num_shards


def read_hub_shard(address: str, shard: int) -> Iterator[tuple[int, Any]]:
    """Number and record of each row of a shard. Rows of shard s are numbered s, s + shards, ... from 1."""
    dataset = _load(address)
    for row, record in enumerate(dataset.shard(num_shards=dataset.num_shards, index=shard)):
        yield row * dataset.num_shards + shard + 1, record


def _load(address: str) -> Any:
    path, _, query = address.removeprefix("hf://").partition("?")
    arguments: dict[str, Any] = {"split": "train", **dict(parse_qsl(query))}
    if unknown := set(arguments) - set(ARGUMENTS):
        raise CorpusError(f"{address} has the argument {min(unknown)!r}; known: {', '.join(ARGUMENTS)}")
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise CorpusError(
            f"{path} is no file here, and to read it as a data set of the Hugging Face hub the package "
            "`datasets` is needed: pip install 'longalign_ray[hub]', or correct the path"
        ) from error
    try:
        return load_dataset(path, streaming=True, **arguments)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CorpusError(
            f"{address} is neither a file here nor a data set that the Hugging Face hub gives "
            f"({' '.join(str(error).split())[:300]}); correct the path, or check the network and HF_TOKEN"
        ) from error
