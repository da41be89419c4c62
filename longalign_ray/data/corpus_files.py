"""Corpus files, wherever they lie: found by path, glob or address, and opened as streams of their plain bytes.

    data/*.jsonl  data/**/*.json.gz  s3://bucket/chats/*.parquet  gs://bucket/a.jsonl.zst  hf://org/name?split=train

S3 and Google Storage are read by pyarrow, everything else with an address by fsspec.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pyarrow as pa
from pyarrow import fs

from longalign_ray.config import CorpusConfig, SourceConfig
from longalign_ray.data.hub_datasets import hub_version
from longalign_ray.data.record_styles import printable
from longalign_ray.errors import CorpusError

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".parquet": "parquet"}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = f"{', '.join(FORMATS)}, each also with {' or '.join(COMPRESSIONS)}"
DATASET_ID = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
MAX_PROBLEMS = 10


@dataclass(frozen=True, slots=True)
class CorpusFile:
    """A file of the corpus, or a data set of the Hugging Face hub (format `hf`)."""

    path: str
    format: Literal["jsonl", "json", "parquet", "hf"]
    compression: Literal["gzip", "zstd"] | None = None
    size: int = 0
    version: str = ""
    """Changes when the file does: its time of change, as local and object stores keep it, or the hub's commit."""
    endpoint: str | None = None
    """Address of the object store, for one that is not Amazon's or Google's own."""

    @property
    def state(self) -> tuple[str, int, str]:
        """Name, size and version: what is compared to see that a corpus has changed."""
        return self.path, self.size, self.version


def source_files(corpus: CorpusConfig, sources: Mapping[str, SourceConfig]) -> dict[str, list[CorpusFile]]:
    """Files of each source. Raises CorpusError with the problems of all of them."""
    files: dict[str, list[CorpusFile]] = {}
    problems: list[str] = []
    for name, source in sources.items():
        try:
            setting = corpus.setting_of(name)
            files[name] = corpus_files(source.paths, endpoint=corpus.storage_endpoint, setting=setting)
        except CorpusError as error:
            problems.append(str(error))
    if problems:
        raise CorpusError("\n".join(problems))
    return files


def corpus_files(
    patterns: Sequence[str], *, endpoint: str | None = None, setting: str = "corpus.paths"
) -> list[CorpusFile]:
    """Files of the patterns in their order, each pattern's own sorted by name.

    Raises CorpusError that names `setting`, every pattern that matches nothing and every match that cannot be read.
    """
    files: list[CorpusFile] = []
    problems: list[str] = []
    for pattern in patterns:
        try:
            files += _matches(os.path.expanduser(pattern), endpoint, problems)
        except (OSError, ValueError, ImportError) as error:
            problems.append(f"{pattern} cannot be read ({_short(error)}); {_remedy(pattern)}")
    if problems:
        raise CorpusError(f"{setting}: {listed(problems)}")
    return files


def listed(problems: Sequence[str]) -> str:
    """The first of them, a line each, and how many more there are."""
    more = [f"and {len(problems) - MAX_PROBLEMS} more"] if len(problems) > MAX_PROBLEMS else []
    return "\n  ".join([*problems[:MAX_PROBLEMS], *more])


def open_random(file: CorpusFile) -> pa.NativeFile:
    """The file as it is stored, to be read from any position."""
    system, path = file_system(file.path, file.endpoint)
    return system.open_input_file(path)


def open_plain(file: CorpusFile) -> pa.NativeFile:
    """The file's bytes from its beginning, decompressed as they are read."""
    system, path = file_system(file.path, file.endpoint)
    return system.open_input_stream(path, compression=file.compression)


def unreadable(path: str, error: Exception, *, place: str = "") -> CorpusError:
    """What to raise where a file that was found cannot be read to its end."""
    return CorpusError(f"{path} cannot be read{place} ({_short(error)}): copy it again whole, or leave it out")


def _matches(pattern: str, endpoint: str | None, problems: list[str]) -> Iterator[CorpusFile]:
    if pattern.startswith("hf://") and not pattern.startswith("hf://datasets/"):
        yield CorpusFile(pattern, "hf", version=hub_version(pattern))
        return
    if "://" in pattern:
        found = _remote_infos(pattern, endpoint)
    else:
        names = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        if not os.path.exists(pattern) and names == [pattern] and _is_dataset_id(pattern):
            yield CorpusFile(f"hf://{pattern}", "hf", version=hub_version(f"hf://{pattern}"))
            return
        found = [(name, *_local_state(name)) for name in names]
    if not found:
        problems.append(f"{pattern} matches no file; check the pattern")
    for path, problem, size, version in found:
        kind, compression = _format(path)
        if path != printable(path):
            problems.append(f"{printable(path)} has a name that is not UTF-8; rename it")
        elif problem:
            problems.append(f"{path} {problem}")
        elif kind is None:
            problems.append(f"{path} has none of the known endings ({SUFFIXES}); rename or convert it")
        else:
            yield CorpusFile(path, kind, compression, size, version, endpoint)


def _is_dataset_id(path: str) -> bool:
    """`org/name` that stands for no file here and does not look like one."""
    return bool(DATASET_ID.fullmatch(path)) and _format(path)[0] is None and not Path(path).parent.exists()


def _format(path: str) -> tuple[Any, Any]:
    suffixes = [suffix.lower() for suffix in PurePosixPath(path).suffixes[-2:]]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression is not None:
        suffixes.pop()
    return FORMATS.get(suffixes[-1]) if suffixes else None, compression


def _local_state(path: str) -> tuple[str, int, str]:
    """Problem (empty: none), size and version."""
    try:
        status = os.stat(path)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            state = "is a link to nothing" if os.path.islink(path) else "does not exist"
            return f"{state}; check the path, or leave it out of the pattern", 0, ""
        return f"cannot be read ({error.strerror}); check its permissions", 0, ""
    if os.path.isdir(path):
        return "is a directory; give files or a pattern such as data/*.jsonl", 0, ""
    if not os.path.isfile(path):
        return "is no regular file; copy it into one", 0, ""
    if not os.access(path, os.R_OK):
        return "cannot be read (no permission); check its permissions", 0, ""
    return "", status.st_size, str(status.st_mtime_ns)


def _remote_infos(pattern: str, endpoint: str | None) -> list[tuple[str, str, int, str]]:
    """Address, problem, size and version of what the pattern matches, sorted by name."""
    scheme = pattern.partition("://")[0]
    system, path = file_system(pattern, endpoint)
    if not glob.has_magic(path):
        return [(pattern, *_remote_state(system.get_file_info(path)))]
    base = path[: re.search(r"[*?[]", path).start()].rpartition("/")[0]  # type: ignore[union-attr]
    infos = system.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
    matching = [
        info for info in infos if info.type == fs.FileType.File and _glob_match(info.path.split("/"), path.split("/"))
    ]
    return sorted((f"{scheme}://{info.path}", *_remote_state(info)) for info in matching)


def _remote_state(info: fs.FileInfo) -> tuple[str, int, str]:
    if info.type == fs.FileType.NotFound:
        return "does not exist; check the address", 0, ""
    if info.type == fs.FileType.Directory:
        return "is a directory; give files or a pattern such as s3://bucket/data/*.jsonl", 0, ""
    return "", info.size or 0, str(info.mtime_ns)


def _glob_match(names: Sequence[str], patterns: Sequence[str]) -> bool:
    """`**` stands for any number of directories, everything else for one name."""
    if not patterns or not names:
        return not patterns and not names
    if patterns[0] == "**":
        return _glob_match(names, patterns[1:]) or _glob_match(names[1:], patterns)
    return fnmatchcase(names[0], patterns[0]) and _glob_match(names[1:], patterns[1:])


def file_system(path: str, endpoint: str | None) -> tuple[fs.FileSystem, str]:
    """Where the address leads, and the path there; `endpoint` is that of an object store."""
    scheme, found, rest = path.partition("://")
    if not found:
        return fs.LocalFileSystem(), path
    if scheme == "s3":
        return _s3(rest.partition("/")[0], endpoint or _environment("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")), rest
    if scheme == "gs":
        return _google(endpoint or _environment("STORAGE_EMULATOR_HOST")), rest
    import fsspec

    system, inner = fsspec.core.url_to_fs(path)
    return fs.PyFileSystem(fs.FSSpecHandler(system)), inner


@lru_cache(maxsize=16)
def _s3(bucket: str, endpoint: str | None) -> fs.FileSystem:
    """Credentials as AWS's own tools find them; none at all in the environment AWS_ANONYMOUS=1."""
    anonymous = _environment("AWS_ANONYMOUS") is not None
    region = _environment("AWS_REGION", "AWS_DEFAULT_REGION")
    if endpoint is None:
        return fs.S3FileSystem(region=region or fs.resolve_s3_region(bucket), anonymous=anonymous)
    scheme, host = _split_endpoint(endpoint)
    return fs.S3FileSystem(
        region=region or "us-east-1", endpoint_override=host, scheme=scheme, anonymous=anonymous, connect_timeout=10
    )


@lru_cache(maxsize=16)
def _google(endpoint: str | None) -> fs.FileSystem:
    if endpoint is None:
        return fs.GcsFileSystem()
    scheme, host = _split_endpoint(endpoint)
    return fs.GcsFileSystem(anonymous=True, endpoint_override=host, scheme=scheme)


def _split_endpoint(endpoint: str) -> tuple[str, str]:
    scheme, found, host = endpoint.rstrip("/").partition("://")
    return (scheme, host) if found else ("https", endpoint)


def _environment(*names: str) -> str | None:
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def _remedy(pattern: str) -> str:
    if pattern.startswith(("s3://", "gs://")):
        return "check the address, the credentials, and corpus.storage_endpoint where the store is not the public one"
    return "check the path and its permissions"


def _short(error: Exception) -> str:
    text = " ".join(str(getattr(error, "strerror", None) or error).split())
    return text if len(text) <= 300 else f"{text[:297]}..."
