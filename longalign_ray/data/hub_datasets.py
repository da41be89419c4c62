"""Data sets of the Hugging Face hub, streamed through the package `datasets`, shard by shard.

An address is `hf://ORG/NAME` with the arguments of `load_dataset` behind it: `?name=CONFIG&split=train&revision=main`.
The hub is asked which commit that is; all tasks read the same one, and another one is prepared anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from longalign_ray.data.record_readers import within_limit
from longalign_ray.errors import CorpusError
from longalign_ray.run_dir import digest

logger = logging.getLogger(__name__)

COMMIT = re.compile(r"[0-9a-f]{40}")
ARGUMENTS = ("name", "split", "revision", "data_dir")


def hub_shards(address: str, version: str) -> int:
    """Number of shards that the data set of that commit is read in. Raises CorpusError."""
    return _load(address, version).num_shards


def hub_version(address: str) -> str:
    """The commit that the data set is at, for a directory here a digest of its files' states; empty where the hub does
    not answer. A `revision` that is a whole commit hash needs no answer.
    """
    path, arguments = _taken_apart(address)
    revision = arguments.get("revision")
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    if Path(path).is_dir():
        files = [(file.name, file.stat()) for file in sorted(Path(path).rglob("*")) if file.is_file()]
        return digest([(name, state.st_size, state.st_mtime_ns) for name, state in files])
    try:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError
    except ImportError:  # what is missing is said where the data set is read
        return ""
    errors = (*HfHubHTTPError.__bases__, OSError, ValueError)  # the first base: any error of the hub's HTTP package
    try:
        return HfApi().dataset_info(path, revision=revision, timeout=10).sha or ""
    except errors as error:  # pyright: ignore
        logger.warning("%s: the hub does not tell its commit (%s)", address, " ".join(str(error).split())[:200])
        return ""


def read_hub_shard(address: str, version: str, shard: int) -> Iterator[tuple[int, Any]]:
    """Number and record of each row of a shard. Rows of shard s are numbered s, s + shards, ... from 1."""
    dataset = _load(address, version)
    for row, record in enumerate(dataset.shard(num_shards=dataset.num_shards, index=shard)):
        yield row * dataset.num_shards + shard + 1, within_limit(record)


def _taken_apart(address: str) -> tuple[str, dict[str, Any]]:
    path, _, query = address.removeprefix("hf://").partition("?")
    arguments: dict[str, Any] = {"split": "train", **dict(parse_qsl(query))}
    if unknown := set(arguments) - set(ARGUMENTS):
        raise CorpusError(f"{address} has the argument {min(unknown)!r}; known: {', '.join(ARGUMENTS)}")
    return path, arguments


def _load(address: str, version: str) -> Any:
    path, arguments = _taken_apart(address)
    if COMMIT.fullmatch(version):
        arguments["revision"] = version
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
