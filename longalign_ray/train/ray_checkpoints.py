"""Ray Train glue of the checkpoints: uploaded while training goes on, and removed when newer ones are whole."""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from longalign_ray.config import RunConfig
from longalign_ray.errors import StorageError
from longalign_ray.run_dir import RunDir, digest
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore, checkpoint_name, list_files

logger = logging.getLogger(__name__)


def checkpoint_store(config: RunConfig, run_dir: RunDir) -> CheckpointStore:
    """Where the checkpoints of the run lie."""
    address = config.train.checkpoint_storage
    return CheckpointStore.at(
        run_dir.checkpoints if address is None else address, endpoint=config.corpus.storage_endpoint
    )


def pruning(store: CheckpointStore, *, keep: int, keep_best: bool) -> Any:
    """What Ray Train calls when all ranks have uploaded a checkpoint: removes older ones.

    Its own rule knows only the checkpoints of this start, and keeps the best in place of the newest.
    """
    from ray.train import UserCallback

    class Pruning(UserCallback):
        def after_report(self, run_context: Any, metrics: Any, checkpoint: Any) -> None:
            if checkpoint is None:
                return
            try:
                store.prune(upto=PurePosixPath(checkpoint.path).name, keep=keep, keep_best=keep_best)
            except (OSError, StorageError) as error:  # an error here would end the run
                logger.warning("old checkpoints below %s could not be removed: %s", store.path, error)

    return Pruning()


class Uploads:
    """Hands a rank's part of a checkpoint to Ray Train, which uploads it while training goes on.

    One is under way at a time, so that no more than one waits on the local disk.
    """

    def __init__(self, store: CheckpointStore, *, rank: int, local_rank: int):
        """Made before the first step: so no rank of the machine has begun to write when its first one clears up."""
        self._store, self._rank = store, rank
        of_store = f"longalign-{digest(store.path)}-"
        self._prefix = f"{of_store}{rank}-"
        for left in Path(tempfile.gettempdir()).glob(f"{of_store}*") if local_rank == 0 else ():  # by ranks killed
            shutil.rmtree(left, ignore_errors=True)
        self._idle = threading.Event()
        self._idle.set()

    def start(
        self, begin_save: Callable[[Path], Callable[[], None]], state: TrainState, metrics: dict[str, Any]
    ) -> None:
        """Calls `begin_save` with an empty local directory; all ranks do so at the same step (collective).

        What that returns is called beside training, before the upload.
        """
        import ray.train
        from ray.train import CheckpointUploadMode

        self._idle.wait()
        directory = Path(tempfile.mkdtemp(prefix=self._prefix))
        end_save = begin_save(directory)
        self._idle.clear()
        ray.train.report(
            dict(metrics),
            checkpoint=ray.train.Checkpoint.from_directory(directory),
            checkpoint_dir_name=checkpoint_name(state.step),  # rank 0's is taken
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=lambda checkpoint, name: self._upload(Path(checkpoint.path), name, state, end_save),
            delete_local_checkpoint_after_upload=True,
        )

    def _upload(self, directory: Path, name: str, state: TrainState, end_save: Callable[[], None]) -> Any:
        from ray.train import Checkpoint

        try:
            end_save()
            files = list_files(directory)
            self._store.upload(directory, name)
            self._store.finish(name, self._rank, files, state if self._rank == 0 else None)
        finally:
            self._idle.set()
        return Checkpoint(self._store.path_of(name), filesystem=self._store.filesystem)
