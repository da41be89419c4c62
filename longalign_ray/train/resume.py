"""Where training continues: the ranks agree on a whole checkpoint and, on another number of ranks, convert it."""

from __future__ import annotations

import argparse
import io
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from torch import distributed as dist

from longalign_ray.errors import CheckpointError
from longalign_ray.run_dir import digest
from longalign_ray.train.checkpoint_store import CheckpointStore, StoredCheckpoint
from longalign_ray.train.engine import TAG, quiet_deepspeed

logger = logging.getLogger(__name__)

READY = "ready"


def agree_on_checkpoint(store: CheckpointStore) -> StoredCheckpoint | None:
    """The newest whole checkpoint, the same on every rank, each of which reads its share of the files (collective).

    None where no checkpoint was ever finished; raises CheckpointError where all that were are damaged.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    listed: list[Any] = [store.finished() if rank == 0 else None]
    dist.broadcast_object_list(listed)
    candidates, unfinished = listed[0]
    warn = logger.warning if rank == 0 else logger.debug
    for problem in unfinished:
        warn("%s; passed over", problem)
    for stored in candidates:
        problems: list[Any] = [None] * world_size
        dist.all_gather_object(problems, store.problem(stored, part=rank, parts=world_size))
        if not any(problems):
            return stored
        warn("%s", store.damage(stored, next(filter(None, problems))))
    if candidates:
        raise store.all_damaged(len(candidates))
    return None


@contextmanager
def loadable(store: CheckpointStore, stored: StoredCheckpoint, *, convert: bool, local_rank: int) -> Iterator[Path]:
    """A directory that this rank's DeepSpeed can load, in universal form if `convert` (collective).

    In place where nothing is to be done. A conversion lies beside checkpoints that are on a file system of all ranks,
    and is made by rank 0; from an object store a rank of each machine downloads to local disk. Gone when all have read.
    """
    if store.is_local and not convert:
        yield Path(store.path_of(stored.name))
        return
    if store.is_local:
        directory, makes_it = Path(store.path).with_name("resume"), dist.get_rank() == 0
    else:
        name = f"longalign-resume-{digest(store.path)}"
        directory, makes_it = Path(tempfile.gettempdir()) / name, local_rank == 0
    if makes_it:
        shutil.rmtree(directory, ignore_errors=True)
    dist.barrier()
    if makes_it:
        directory.mkdir(parents=True)
        _make(store, stored, directory, convert=convert)
        (directory / READY).touch()
    while not (directory / READY).exists():  # a barrier would time out: a terabyte takes longer
        time.sleep(0.2)
    yield directory
    dist.barrier()
    if makes_it:
        shutil.rmtree(directory, ignore_errors=True)


def _make(store: CheckpointStore, stored: StoredCheckpoint, directory: Path, *, convert: bool) -> None:
    started, source = time.perf_counter(), Path(store.path_of(stored.name))
    if not store.is_local:
        source = directory / "downloaded" if convert else directory
        source.mkdir(exist_ok=True)
        store.download(stored.name, source)
    if convert:
        to_universal(source, directory)
        logger.warning(
            "checkpoint %s of %d ranks was converted for %d in %.1f s",
            stored.name, stored.state.world_size, dist.get_world_size(), time.perf_counter() - started,
        )  # fmt: skip


def to_universal(checkpoint_dir: Path, directory: Path) -> None:
    """Writes DeepSpeed's universal form of a checkpoint: for each parameter its fp32 weights and both moments, whole.

    It loads on any number of ranks. ZeRO-1 and ZeRO-2 may change into each other; ZeRO-3 stays.
    """
    quiet_deepspeed()
    from deepspeed.checkpoint import ds_to_universal

    try:
        with (
            tempfile.TemporaryDirectory(prefix="longalign-links-") as links,
            redirect_stdout(io.StringIO()),  # it prints its progress
            redirect_stderr(io.StringIO()),
        ):
            # DeepSpeed takes the paths for patterns, in which a + or a bracket would mean something.
            (Path(links) / "from").symlink_to((checkpoint_dir / TAG).resolve())
            (Path(links) / "to").symlink_to(directory.resolve())
            ds_to_universal.main(
                argparse.Namespace(
                    input_folder=f"{links}/from",
                    output_folder=f"{links}/to/{TAG}",
                    num_extract_workers=1,  # in this process: a rank has threads, and must not fork
                    num_merge_workers=1,
                    keep_temp_folder=False,
                    strict=True,
                    inject_missing_state=True,
                )
            )
    except Exception as error:  # DeepSpeed and torch raise whatever comes
        raise CheckpointError(
            f"{checkpoint_dir} could not be converted for another number of ranks ({type(error).__name__}: {error}): "
            "free disk space for three copies of it, or continue with the ranks and the ZeRO stage that wrote it"
        ) from error
