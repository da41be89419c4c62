"""Ray Train glue: starts the ranks, hands each its part of the plan, and keeps checkpoints and metrics."""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

from longalign_ray.config import RopeConfig, RunConfig, TrainConfig
from longalign_ray.data.plan import StepPlan
from longalign_ray.errors import LongAlignError, PlanMismatchError
from longalign_ray.logs import MetricsWriter, progress, read_metrics
from longalign_ray.run_dir import RunDir
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore
from longalign_ray.train.failures import Kind, explain, kind_of
from longalign_ray.train.memory import CPU_ALLOCATOR
from longalign_ray.train.ray_checkpoints import Uploads, checkpoint_store, pruning
from longalign_ray.train.sinks import Sinks, check_installed, open_sinks

logger = logging.getLogger(__name__)


def train(config: RunConfig, run_dir: RunDir, *, model_dir: Path) -> str:
    """Trains to the end of the plan, resuming from the newest whole checkpoint; returns the path of the last one.

    Raises LongAlignError where a rank refuses to go on, or the ranks failed more than `train.max_failures` times;
    CheckpointError where the checkpoints there are cannot continue this run.
    """
    from ray.train import FailureConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchTrainer

    from longalign_ray.train.adapters import check_installed as check_peft

    check_installed(config.train.sinks)
    if config.train.adapter is not None:
        check_peft(config.train.adapter)
    plan = StepPlan.load(run_dir.plan)
    store = checkpoint_store(config, run_dir)
    if (newest := store.newest(checksums=False)) is not None:  # the ranks look at every byte, each at its share
        newest.state.check(plan_digest=plan.digest, zero_stage=config.train.zero_stage)
        if newest.state.step == plan.num_steps and store.problem(newest) is None:
            return store.path_of(newest.name)
    store.forget_ray_notes()
    resources: dict[str, float] = {"CPU": config.train.cpus_per_worker}
    if config.train.use_gpu:
        resources["GPU"] = 1
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "train": config.train.model_dump(),
            "dtype": config.model.dtype,
            "rope": config.model.rope.model_dump(),
            "model_dir": str(model_dir.resolve()),
            "plan": str(run_dir.plan.resolve()),
            "store": str(run_dir.store.resolve()),
            "packed": str(run_dir.packed.resolve()),
            "metrics": str(run_dir.metrics.resolve()),
            "checkpoints": store,
            "recipe": config.model_dump(mode="json"),
        },
        scaling_config=ScalingConfig(
            num_workers=config.train.num_workers, use_gpu=config.train.use_gpu, resources_per_worker=resources
        ),
        run_config=RayRunConfig(
            name=PurePosixPath(store.path).name,
            storage_path=str(PurePosixPath(store.path).parent),
            storage_filesystem=store.filesystem,
            failure_config=FailureConfig(max_failures=config.train.max_failures),
            # glibc reads it when a process starts, so it cannot be set by the worker itself
            worker_runtime_env={} if config.train.use_gpu else {"env_vars": CPU_ALLOCATOR},
            callbacks=[
                pruning(store, keep=config.train.keep_checkpoints, keep_best=config.train.keep_best),
                _refusals(config),
            ],
        ),
    )
    with _watched_metrics(run_dir.metrics, plan.num_steps):
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps a worker's error in one of several types of its own
            failures: dict[int, BaseException] = getattr(error, "worker_failures", {})
            cause = getattr(error, "controller_failure", error)  # it writes beside the checkpoints
            of_ray = store.unreachable(cause) if isinstance(cause, OSError) else cause
            raise LongAlignError(f"training failed: {explain(failures, config) if failures else of_ray}") from error
    last = store.newest(checksums=False)
    if last is None:
        raise LongAlignError("training ended without a checkpoint; see the log of the workers above")
    return store.path_of(last.name)


def _refusals(config: RunConfig) -> Any:
    """What Ray Train calls when ranks failed: ends the run where one raised a LongAlignError, which would come again.

    Ray itself would start the ranks anew up to `train.max_failures` times, whatever they failed of. An error of a
    callback it does not try again.
    """
    from ray.train import UserCallback

    class Refusals(UserCallback):
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if any(kind_of(error) is Kind.REFUSED for error in worker_exceptions.values()):
                raise LongAlignError(explain(worker_exceptions, config))

    return Refusals()


def _train_worker(settings: dict[str, Any]) -> None:
    """What every rank runs."""
    import ray.train
    import torch

    from longalign_ray.data.packed import PackReader
    from longalign_ray.precision import resolve_dtype
    from longalign_ray.train.adapters import add_adapter
    from longalign_ray.train.engine import TrainEngine, quiet_deepspeed
    from longalign_ray.train.loop import StepMetrics, train_loop
    from longalign_ray.train.model import load_for_training, model_digest, verify_isolation, verify_loss
    from longalign_ray.train.resume import agree_on_checkpoint, loadable

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    quiet_deepspeed()
    config = TrainConfig(**settings["train"])
    dtype = resolve_dtype(settings["dtype"], use_gpu=config.use_gpu)
    context = ray.train.get_context()
    world_size = context.get_world_size()
    if not config.use_gpu:
        torch.set_num_threads(config.cpus_per_worker)
    plan = _plan_for_ranks(settings, world_size)
    packs = PackReader(plan, store_dir=Path(settings["store"]), packed_dir=Path(settings["packed"]))
    rope = RopeConfig(**settings["rope"])
    model = load_for_training(settings["model_dir"], dtype=dtype, config=config, rope=rope)
    if config.adapter is not None:
        add_adapter(model, config.adapter, seed=plan.seed)
    vocab_size, trained = int(model.model.config.vocab_size), model_digest(model)
    store: CheckpointStore = settings["checkpoints"]
    first_step = tokens_seen = 0
    convert = False
    if (stored := agree_on_checkpoint(store)) is not None:
        stored.state.check(plan_digest=plan.digest, zero_stage=config.zero_stage, model_digest=trained)
        convert = not stored.state.fits(world_size=world_size, zero_stage=config.zero_stage)
    engine = TrainEngine(model, config, dtype=dtype, micro_steps=plan.shape[1], load_universal=convert)
    for verify in (verify_isolation, verify_loss):
        verify(engine.module, vocab_size=vocab_size, device=engine.device, sequence_group=engine.sequence_group)
    if stored is not None:
        with loadable(store, stored, convert=convert, local_rank=context.get_local_rank()) as directory:
            engine.load(directory)
        first_step, tokens_seen = stored.state.step, stored.state.tokens_seen
        logger.warning("resumed after step %d", first_step)
    is_first = context.get_world_rank() == 0
    metrics_file = Path(settings["metrics"])
    recent_losses = [row["loss"] for row in read_metrics(metrics_file) if row["step"] < first_step]
    metrics = MetricsWriter(metrics_file, first_step=first_step) if is_first else None
    sinks = _open_sinks(settings, first_step=first_step) if is_first else None
    last_row: dict[str, Any] = {}

    def on_step(step_metrics: StepMetrics) -> None:
        nonlocal tokens_seen
        tokens_seen += step_metrics.num_tokens
        row = step_metrics.row()
        last_row.clear()  # else a checkpoint would be reported with the held-out loss of an earlier step
        last_row.update(row)
        if metrics is not None and sinks is not None:
            metrics.write(row)
            sinks.write(row)

    uploads = Uploads(store, rank=context.get_world_rank(), local_rank=context.get_local_rank())

    def on_checkpoint(step: int) -> None:
        state = TrainState(
            step=step,
            tokens_seen=tokens_seen,
            plan_digest=plan.digest,
            world_size=world_size,
            zero_stage=config.zero_stage,
            heldout_loss=last_row.get("heldout_loss"),
            model_digest=trained,
        )
        uploads.start(engine.begin_save, state, last_row)

    try:
        train_loop(
            engine,
            packs,
            config,
            first_step=first_step,
            recent_losses=recent_losses,
            profile_dir=metrics_file.parent / "profile",
            on_step=on_step,
            on_checkpoint=on_checkpoint,
        )
    finally:
        if sinks is not None:
            sinks.close()


def _open_sinks(settings: dict[str, Any], *, first_step: int) -> Sinks:
    directory = Path(settings["metrics"]).parent
    run_name = directory.parent.name
    opened = open_sinks(
        settings["train"]["sinks"], directory, run_name=run_name, settings=settings["train"], first_step=first_step
    )
    return Sinks({**opened, "prometheus": lambda: PrometheusSink(run_name)})


class PrometheusSink:
    """Gauges `ray_longalign_<metric>` with the tag `run`, on the metrics port of the rank's node."""

    def __init__(self, run_name: str):
        self._tags, self._gauges = {"run": run_name}, {}

    def write(self, step: int, values: Mapping[str, float]) -> None:
        from ray.util.metrics import Gauge

        for name, value in {"step": step, **values}.items():
            if name not in self._gauges:
                metric = "longalign_" + re.sub(r"\W", "_", name)
                self._gauges[name] = Gauge(metric, description=f"{name} of metrics.jsonl", tag_keys=("run",))
            self._gauges[name].set(value, tags=self._tags)

    def close(self) -> None:
        pass


def _plan_for_ranks(settings: dict[str, Any], world_size: int) -> StepPlan:
    """The run's plan, made anew where it was made for another number of ranks than Ray Train could start."""
    from longalign_ray.data.pipeline import plan_for, plan_settings
    from longalign_ray.data.store import ExampleIndex

    plan = StepPlan.load(Path(settings["plan"]))
    if plan.world_size == world_size:
        return plan
    config = RunConfig.model_validate(settings["recipe"])
    index = ExampleIndex.load(Path(settings["store"]) / "index.parquet")
    made = plan_for(
        config, index, Path(settings["model_dir"]), plan_settings(config, world_size=world_size, strategy=plan.strategy)
    )
    if made.digest != plan.digest:
        raise PlanMismatchError(
            f"the plan for {world_size} ranks has other steps than {settings['plan']}; run `longalign prepare` again"
        )
    return made


@contextmanager
def _watched_metrics(path: Path, num_steps: int, *, poll_seconds: float = 1.0) -> Iterator[None]:
    """Shows each new row of the metrics file while the workers write it."""
    finished = threading.Event()

    def watch() -> None:
        shown = len(read_metrics(path))
        with progress("train", num_steps) as bar:
            while True:
                last_look = finished.wait(poll_seconds)
                rows = read_metrics(path)
                for row in rows[min(shown, len(rows)) :]:
                    bar.advance(row["step"] + 1, _step_line(row))
                    if "heldout_loss" in row:
                        bar.advance(row["step"] + 1, _heldout_line(row))
                shown = len(rows)
                if last_look:
                    return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        finished.set()
        watcher.join()


def _step_line(row: dict[str, Any]) -> str:
    seen, mfu, norm = row.get("seen_imbalance"), row.get("mfu"), row["grad_norm"]
    return (
        f"loss {row['loss']:.4f}  {'' if norm is None else f'grad norm {norm:.2f}  '}lr {row['learning_rate']:.2e}  "
        f"{row['tokens_per_second']:,.0f} tokens/s  {'' if mfu is None else f'MFU {mfu:.1%}  '}"
        f"imbalance {row['rank_imbalance']:.3f}{'' if seen is None else f', seen {seen:.3f}'}  "
        f"data wait {row.get('data_seconds', 0.0) / row['seconds']:.1%}  {row['max_memory_gb']:.1f} GB a rank"
    )


def _heldout_line(row: dict[str, Any]) -> str:
    def told(loss: float | None) -> str:
        return "not finite" if loss is None else f"{loss:.4f}"

    by_length = ", ".join(f"{bucket} {told(loss)}" for bucket, loss in row["heldout_by_length"].items())
    return (
        f"held-out loss {told(row['heldout_loss'])} ({by_length}), by tokens {told(row['heldout_token_loss'])}  "
        f"{row['heldout_seconds']:.1f} s"
    )


def clear_training(config: RunConfig, run_dir: RunDir) -> None:
    """Removes what an earlier recipe has left that never finished a checkpoint."""
    logger.info("train: begun with another recipe, of which no checkpoint was finished; started anew")
    checkpoint_store(config, run_dir).clear()
    if (boards := run_dir.metrics.parent / "tensorboard").exists():
        shutil.rmtree(boards)
    run_dir.metrics.unlink(missing_ok=True)
