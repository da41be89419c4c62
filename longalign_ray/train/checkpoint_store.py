"""The checkpoints of a run on disk or in an object store: written, listed, verified, kept.

    step-00000200-20260131-081500/    name: steps done, and when
        deepspeed/*.pt                shards of all ranks
        files-00000.json              size and SHA-256 of rank 0's files, written after them; one a rank
        state.json                    rank 0's last; says how many ranks there are

What lacks one of the JSON files was not finished, as a killed run leaves it. What has them all, but not the files they
name, is damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from pyarrow import fs

from longalign_ray.data.corpus_files import file_system
from longalign_ray.errors import CheckpointError, StorageError
from longalign_ray.train.checkpoint import STATE_FILE, TrainState

logger = logging.getLogger(__name__)

PREFIX = "step-"
STEP_DIGITS = 8
FileList = Mapping[str, tuple[int, str]]  # path inside the checkpoint -> size, SHA-256


@dataclass(frozen=True, slots=True)
class StoredCheckpoint:
    """A finished checkpoint: its directory's name, its state, and the files of all ranks."""

    name: str
    state: TrainState
    files: FileList


def checkpoint_name(step: int) -> str:
    """Sorts by step, then by time: a step that is taken again has another name."""
    return f"{PREFIX}{step:0{STEP_DIGITS}d}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"


def list_files(directory: Path) -> FileList:
    """Size and SHA-256 of every file below a local directory; reads them all."""
    files = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            files[path.relative_to(directory).as_posix()] = (
                path.stat().st_size,
                hashlib.file_digest(file, "sha256").hexdigest(),
            )
    return files


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """All checkpoints of a run: directories below `path`. Pickles, so that every rank may have it.

    Every method raises StorageError where the store does not answer: what cannot be looked at is not taken for damaged.
    """

    filesystem: fs.FileSystem
    path: str

    @staticmethod
    def at(address: str | Path, *, endpoint: str | None = None) -> CheckpointStore:
        """Of a local directory, s3://bucket/path or gs://bucket/path. Raises CheckpointError where there is no way."""
        try:
            if isinstance(address, Path):
                return CheckpointStore(fs.LocalFileSystem(), str(address.resolve()))
            system, path = file_system(address, endpoint)
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(
                f"train.checkpoint_storage = {address} cannot be reached ({error}): check the address, the "
                "credentials, and corpus.storage_endpoint where the store is not the public one"
            ) from error
        return CheckpointStore(system, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, fs.LocalFileSystem)

    def unreachable(self, error: Exception) -> StorageError:
        """What to raise for an error of the file system."""
        if self.is_local:
            where, remedy = self.path, "the disk is there, has room and may be written"
        else:
            where, remedy = f"{self.path} in {self.filesystem.type_name}", "the store answers and takes the credentials"
        return StorageError(
            f"the checkpoints below {where} cannot be read or written ({error}): see that {remedy}; the same command "
            "then continues from the newest of them"
        )

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Around what asks the file system: turns its errors into ours, but for that of a file that is not there."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise self.unreachable(error) from error

    def path_of(self, name: str) -> str:
        return f"{self.path}/{name}"

    def upload(self, directory: Path, name: str) -> None:
        """Adds the files of a local directory to a checkpoint."""
        threads = not isinstance(self.filesystem, fs.S3FileSystem)  # Arrow's threaded uploads to S3 may lock up
        with self._reached():
            self.filesystem.create_dir(self.path_of(name))
            fs.copy_files(
                str(directory),
                self.path_of(name),
                source_filesystem=fs.LocalFileSystem(),
                destination_filesystem=self.filesystem,
                chunk_size=64 << 20,
                use_threads=threads,
            )

    def finish(self, name: str, rank: int, files: FileList, state: TrainState | None = None) -> None:
        """Says that all files of a rank are there; with `state`, which rank 0 gives, that it may be loaded."""
        self._write(f"{name}/{_list_name(rank)}", files)
        if state is not None:
            self._write(f"{name}/{STATE_FILE}", dataclasses.asdict(state))

    def _write(self, name: str, value: object) -> None:
        with self._reached(), self.filesystem.open_output_stream(self.path_of(name)) as stream:
            stream.write(json.dumps(value, indent=1).encode())

    def _read(self, name: str) -> bytes:
        with self._reached(), self.filesystem.open_input_stream(self.path_of(name)) as stream:
            return stream.read()

    def names(self) -> list[str]:
        """Of all checkpoints, finished or not, the newest first."""
        # To the bottom: Google Storage lists only those directories that were made as such, and copying them loses it.
        below = {info.path.removeprefix(f"{self.path}/").partition("/")[0] for info in self._listed(recursive=True)}
        return sorted((name for name in below if name.startswith(PREFIX)), reverse=True)

    def _listed(self, name: str = "", *, recursive: bool = False) -> list[fs.FileInfo]:
        """What lies below the store, or one of its checkpoints."""
        below = self.path_of(name) if name else self.path
        with self._reached():
            return self.filesystem.get_file_info(fs.FileSelector(below, allow_not_found=True, recursive=recursive))

    def state(self, name: str) -> TrainState:
        """By state.json and the names of the files of all ranks. CheckpointError where it was not finished."""
        part = STATE_FILE
        try:
            state = TrainState.parse(self._read(f"{name}/{part}"))
        except FileNotFoundError as error:
            raise CheckpointError(f"checkpoint {self.path_of(name)} was not finished: it has no {part}") from error
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"checkpoint {self.path_of(name)}: {part} cannot be read ({error})") from error
        there = {info.base_name for info in self._listed(name)}
        for rank in range(state.world_size):
            if _list_name(rank) not in there:
                raise CheckpointError(f"checkpoint {self.path_of(name)} was not finished: it has no {_list_name(rank)}")
        return state

    def read(self, name: str) -> StoredCheckpoint:
        """Raises CheckpointError where the checkpoint was not finished."""
        state, part = self.state(name), ""
        files: dict[str, tuple[int, str]] = {}
        try:
            for rank in range(state.world_size):
                part = _list_name(rank)
                files |= {
                    path: (size, digest) for path, (size, digest) in json.loads(self._read(f"{name}/{part}")).items()
                }
        except (FileNotFoundError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"checkpoint {self.path_of(name)}: {part} cannot be read ({error})") from error
        return StoredCheckpoint(name, state, files)

    def finished(self) -> tuple[list[StoredCheckpoint], list[str]]:
        """The finished checkpoints, newest first, and what is wrong with the others."""
        found, problems = [], []
        for name in self.names():
            try:
                found.append(self.read(name))
            except CheckpointError as error:
                problems.append(str(error))
        return found, problems

    def problem(self, stored: StoredCheckpoint, *, part: int = 0, parts: int = 1) -> str | None:
        """What is wrong with the files of a checkpoint, None where nothing is.

        Looks for each file and its size, and reads every `parts`-th from `part` on for its checksum; 0 parts: none.
        """
        paths = sorted(stored.files)
        with self._reached():
            infos = self.filesystem.get_file_info([self.path_of(f"{stored.name}/{path}") for path in paths])
        for path, info in zip(paths, infos, strict=True):
            size = stored.files[path][0]
            if info.type != fs.FileType.File:
                return f"{path} is missing"
            if info.size != size:
                return f"{path} has {info.size:,} bytes instead of {size:,}"
        for path in paths[part::parts] if parts else ():
            try:
                digest = self._sha256(f"{stored.name}/{path}")
            except OSError as error:  # of a disk; of an object store it would say nothing of the file
                if not self.is_local:
                    raise self.unreachable(error) from error
                return f"{path} cannot be read ({error})"
            if digest != stored.files[path][1]:
                return f"{path} has other bytes than were written"
        return None

    def _sha256(self, name: str) -> str:
        digest = hashlib.sha256()
        with self.filesystem.open_input_stream(self.path_of(name)) as stream:
            while chunk := stream.read(4 << 20):
                digest.update(chunk)
        return digest.hexdigest()

    def newest(self, *, best: bool = False, checksums: bool = True) -> StoredCheckpoint | None:
        """The newest whole checkpoint, with `best` the one of the lowest held-out loss if any was measured.

        Warns of each that it passes over. None where none was ever finished; raises CheckpointError where all that were
        are damaged.
        """
        candidates, problems = self.finished()
        for problem in problems:
            logger.warning("%s; passed over", problem)
        if best:
            candidates = sorted(
                candidates, key=lambda stored: _loss_order(stored.state)
            )  # stable: the newest of equals first
        for stored in candidates:
            if (problem := self.problem(stored, parts=int(checksums))) is None:
                return stored
            logger.warning("%s", self.damage(stored, problem))
        if candidates:
            raise self.all_damaged(len(candidates))
        return None

    def damage(self, stored: StoredCheckpoint, problem: str) -> str:
        return f"checkpoint {self.path_of(stored.name)} is damaged: {problem}; passed over"

    def all_damaged(self, number: int) -> CheckpointError:
        return CheckpointError(
            f"all {number} finished checkpoints below {self.path} are damaged (see the warnings above): restore one "
            f"from a copy, or remove {self.path} to train from the beginning"
        )

    def prune(self, *, upto: str, keep: int, keep_best: bool) -> None:
        """Removes what is older than the checkpoint `upto` but the newest `keep` steps, and the best if asked for.

        An unfinished one goes as well; one that is being written is newer than `upto`.
        """
        names = [name for name in self.names() if name <= upto]
        states: dict[str, TrainState] = {}
        for name in names:
            with suppress(CheckpointError):
                states[name] = self.state(name)
        kept: dict[int, str] = {}
        for name, state in states.items():
            if len(kept) < keep:
                kept.setdefault(state.step, name)  # of the same step the newest, the others may be damaged
        best = [min(states, key=lambda name: _loss_order(states[name]))] if keep_best and states else []
        for name in names:
            if name < upto and name not in (*kept.values(), *best):
                self._remove(name)

    def _remove(self, name: str) -> None:
        with self._reached():
            self.filesystem.delete_dir(self.path_of(name))

    def clear(self) -> None:
        """Removes all checkpoints and what Ray Train notes beside them; nothing else that lies there."""
        for name in self.names():
            self._remove(name)
        self.forget_ray_notes()

    def forget_ray_notes(self) -> None:
        """Removes Ray Train's own list of checkpoints, with which it would not start where one of them is gone."""
        for info in self._listed():
            if info.type == fs.FileType.File and info.extension == "json":
                with self._reached():
                    self.filesystem.delete_file(info.path)

    def download(self, name: str, directory: Path) -> None:
        with self._reached():
            fs.copy_files(self.path_of(name), str(directory), self.filesystem, fs.LocalFileSystem())

    @contextmanager
    def local_copy(self, name: str) -> Iterator[Path]:
        """The directory of a checkpoint on this machine, downloaded for the time being where it is elsewhere."""
        if self.is_local:
            yield Path(self.path_of(name))
            return
        with tempfile.TemporaryDirectory(prefix="longalign-checkpoint-") as directory:
            self.download(name, Path(directory))
            yield Path(directory)


def _list_name(rank: int) -> str:
    return f"files-{rank:05d}.json"


def _loss_order(state: TrainState) -> float:
    loss = state.heldout_loss
    return float("inf") if loss is None or math.isnan(loss) else loss
