"""The stages of a run, in order; the CLI and the jobs call these and nothing else.

Each stage leaves a manifest in the run directory. `run` skips a stage whose manifest says that it is done for the same
configuration and the same upstream results.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longalign_ray.config import DEFAULT_SOURCE, RunConfig, ServeConfig, SourceConfig
from longalign_ray.config_load import dump_config, load_config
from longalign_ray.errors import CheckpointError, ConfigError, LongAlignError, PlanMismatchError
from longalign_ray.model_source import local_model_dir
from longalign_ray.run_dir import Manifest, RunDir, write_json
from longalign_ray.stage_state import changed_settings, first_run_dir, is_done, resume_digest, stage_digest

if TYPE_CHECKING:
    from longalign_ray.evaluate.task import EvalCase

logger = logging.getLogger(__name__)

PACKAGES = ("longalign_ray", "ray", "torch", "transformers", "deepspeed", "pyarrow")


def open_run(recipe: str | Path, overrides: Sequence[str] = ()) -> tuple[RunConfig, RunDir]:
    """Loads the recipe and makes its run directory, where the resolved config of what was done last is kept."""
    return open_run_of(load_config(recipe, overrides))


def open_run_of(config: RunConfig) -> tuple[RunConfig, RunDir]:
    """The same for a recipe that is loaded."""
    run_dir = RunDir(Path(config.run_dir))
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ and not run_dir.root.is_absolute():
        raise ConfigError(
            f"run_dir = {config.run_dir} is relative, and a Ray job runs in a copy of its working directory that goes "
            "with the cluster: give an absolute path that all machines share, run_dir=/shared/runs/NAME"
        )
    try:
        run_dir.root.mkdir(parents=True, exist_ok=True)
        if not run_dir.config.exists():
            run_dir.config.write_text(dump_config(config), encoding="utf-8")
    except OSError as error:
        raise LongAlignError(
            f"run_dir = {config.run_dir} cannot be written ({error.strerror}); choose another"
        ) from error
    return config, run_dir


def set_ray_environment() -> None:
    """What the processes of a Ray that is started here inherit; a cluster has its own."""
    os.environ.setdefault("RAY_worker_niceness", "0")  # else workers run at nice +15 and starve on a shared machine
    # Serve calls from process to process by gRPC, in one thread of a replica: a streamed token costs half the CPU time.
    os.environ.setdefault("RAY_SERVE_USE_GRPC_BY_DEFAULT", "1")
    os.environ.setdefault("RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD", "0")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def connect_ray(config: RunConfig) -> None:
    """Joins the cluster of `ray.address` or of the environment, else starts Ray on this machine; once a process."""
    import ray

    if ray.is_initialized():
        return
    set_ray_environment()
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    settings: dict[str, Any] = {
        "address": config.ray.address,
        "logging_level": logging.WARNING,
        "log_to_driver": config.ray.log_to_driver,
    }
    if config.ray.address is None and "RAY_ADDRESS" not in os.environ:
        settings |= {"num_cpus": config.ray.num_cpus, "include_dashboard": False}
    _check_answers(config.ray.address or os.environ.get("RAY_ADDRESS", ""))
    ray.init(**settings)
    import ray.data  # its loggers are set up on import, with a line for every execution

    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _check_answers(address: str) -> None:
    """Ray itself would try a dead `host:port` for many minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise LongAlignError(
            f"no Ray cluster answers at {address} ({error.strerror or error}): start it, or correct ray.address or the "
            "environment variable RAY_ADDRESS"
        ) from error


def construct(config: RunConfig, run_dir: RunDir) -> Manifest:
    """Long instruction data from documents, where the recipe names no corpus of its own."""
    from longalign_ray.construct.pipeline import construct as build

    def work() -> Manifest:
        connect_ray(config)
        counts, dropped = build(config.construct, run_dir.conversations, seed=config.seed)
        return _manifest(config, run_dir, "construct", [], [run_dir.conversations], counts, dropped)

    return _stage(config, run_dir, "construct", work)


def prepare(config: RunConfig, run_dir: RunDir) -> Manifest:
    """Tokenises the corpus into the store, plans packs, and sorts the store into packed blocks if asked for."""
    from longalign_ray.data.pipeline import prepare as build

    corpus = corpus_sources(config, run_dir)

    def check() -> None:
        _check_recipe(config, run_dir, prepared=stage_digest(config, run_dir, "prepare"))  # its data would be lost

    def work() -> Manifest:
        model_dir = starting_model(config, run_dir)
        _check_window(config, model_dir)
        connect_ray(config)
        made = build(config, run_dir, model_dir=model_dir, corpus=corpus)
        outputs = [run_dir.store, run_dir.plan, *([run_dir.packed] if config.packing.write_blocks else [])]
        inputs = [path for source in corpus.values() for path in source.paths]
        return _manifest(config, run_dir, "prepare", inputs, outputs, made.counts, made.dropped_by_reason)

    return _stage(config, run_dir, "prepare", work, check=check)


def train(config: RunConfig, run_dir: RunDir) -> Manifest:
    """Trains from the packed blocks or, without, the store; an interrupted run continues from its newest checkpoint."""
    from longalign_ray.data.pipeline import model_shape, plan_for, plan_settings
    from longalign_ray.data.plan import StepPlan
    from longalign_ray.data.store import ExampleIndex
    from longalign_ray.logs import read_metrics
    from longalign_ray.train import ray_train
    from longalign_ray.train.disk import check_disk
    from longalign_ray.train.sequence_parallel import check_model

    _need(run_dir.plan, "prepare")

    prepared = getattr(Manifest.load(run_dir.manifest("prepare")), "config_digest", None)

    def check() -> None:
        _check_recipe(config, run_dir, prepared=prepared)

    def work() -> Manifest:
        may_resume = _check_recipe(config, run_dir, prepared=prepared)
        model_dir = starting_model(config, run_dir)
        check_model(model_shape(model_dir), config.train.sp_degree)
        here = config.ray.address is None and "RAY_ADDRESS" not in os.environ
        check_disk(config, run_dir, model_dir=model_dir, ranks_are_here=here)
        _check_window(config, model_dir)
        plan, ranks = StepPlan.load(run_dir.plan), config.train.max_workers
        if (plan.world_size, plan.sp_degree, plan.balance) != (ranks, config.train.sp_degree, config.balance):
            index = ExampleIndex.load(run_dir.store / "index.parquet")
            settings = plan_settings(config, world_size=ranks, strategy=plan.strategy)
            anew = plan_for(config, index, model_dir, settings)
            anew.save(run_dir.plan)
            steps = "stay the same" if anew.digest == plan.digest else "change"
            logger.info("train: planned anew for %d ranks, %d a pack; the steps %s", ranks, anew.sp_degree, steps)
        if not may_resume:
            ray_train.clear_training(config, run_dir)
        write_json(run_dir.trained_recipe, _recipe(config, prepared))
        connect_ray(config)
        checkpoint = ray_train.train(config, run_dir, model_dir=model_dir)
        rows = read_metrics(run_dir.metrics)
        counts = {
            "steps": len(rows),
            "tokens": sum(row["num_tokens"] for row in rows),
            "sequences": sum(row["num_sequences"] for row in rows),
            "first_loss": rows[0]["loss"],
            "last_loss": rows[-1]["loss"],
        }
        outputs = [run_dir.metrics, *([] if config.train.checkpoint_storage else [Path(checkpoint)])]
        return _manifest(config, run_dir, "train", [run_dir.plan], outputs, counts, {})

    return _stage(config, run_dir, "train", work, check=check)


def export(config: RunConfig, run_dir: RunDir) -> Manifest:
    """The newest whole checkpoint, or with `train.keep_best` the best, in Hugging Face layout: `model/` of the run."""
    from longalign_ray.train.checkpoint import export_model
    from longalign_ray.train.ray_checkpoints import checkpoint_store

    def work() -> Manifest:
        store = checkpoint_store(config, run_dir)
        stored = store.newest(best=config.train.keep_best)
        if stored is None:
            raise CheckpointError(f"no finished checkpoint below {store.path}; run `longalign train` first")
        base = starting_model(config, run_dir)
        dtype = "bfloat16" if config.model.dtype == "auto" else config.model.dtype
        if run_dir.model.exists():
            shutil.rmtree(run_dir.model)  # the other form of an adapter leaves files of other names
        with store.local_copy(stored.name) as directory:
            num_parameters = export_model(
                directory,
                base,
                run_dir.model,
                dtype=dtype,
                rope=config.model.rope,
                adapter=config.train.adapter,
                form=config.export.adapter,
            )
        counts = {"parameters": num_parameters, "steps": stored.state.step}
        return _manifest(config, run_dir, "export", [store.path_of(stored.name)], [run_dir.model], counts, {})

    return _stage(config, run_dir, "export", work)


def served_models(config: RunConfig, run_dir: RunDir) -> tuple[dict[str, Path], ServeConfig]:
    """Names and directories of `base`, the recipe's model, and `aligned`, the exported one; and the section `serve`.

    An adapter that was exported alone is among those of `serve`, over the model that its training started from.
    """
    if not (run_dir.model / "adapter_config.json").exists():
        _need(run_dir.model / "config.json", "export")
        return {"base": local_model_dir(config.model.path), "aligned": run_dir.model}, config.serve
    if config.model.rope.scaling != "none":
        raise LongAlignError(
            f"{run_dir.model} holds an adapter alone, and model.rope.scaling = {config.model.rope.scaling} was trained "
            "beside it, which the base model's config.json does not have: set export.adapter=merged and export again"
        )
    adapters = config.serve.adapters | {"aligned": str(run_dir.model)}
    return {"base": starting_model(config, run_dir)}, config.serve.model_copy(update={"adapters": adapters})


def serve(config: RunConfig, run_dir: RunDir) -> None:
    """Serves the models of the run until interrupted."""
    from longalign_ray.serve.app import serve_forever

    models, settings = served_models(config, run_dir)
    connect_ray(config)
    serve_forever(models, settings, chat_template=config.model.chat_template, dtype=config.model.dtype)


def write_serve_config(config: RunConfig, run_dir: RunDir, file: Path) -> None:
    """Writes the Serve config of the same models, for `serve deploy FILE` on a cluster that runs already."""
    from longalign_ray.serve.deploy import deploy_config

    models, settings = served_models(config, run_dir)
    text = deploy_config(models, settings, chat_template=config.model.chat_template, dtype=config.model.dtype)
    file.write_text(text, encoding="utf-8")
    logger.info("serve: wrote %s; start it with `serve deploy %s`", file, file)


def generate(config: RunConfig, run_dir: RunDir) -> Manifest:
    """Answers the requests of a file with the engines of `serve`, and no HTTP between; a killed run continues."""
    from longalign_ray.serve.generate import generate as answer

    if config.generate.requests is None:
        raise ConfigError("generate.requests is not set: name a file of JSON lines, generate.requests=FILE.jsonl")
    if config.generate.model == "base":
        model_dir, weights = local_model_dir(config.model.path), config.model.path
    else:
        models, _ = served_models(config, run_dir)
        if "aligned" not in models:
            raise LongAlignError(
                f"{run_dir.model} holds an adapter alone, with which `longalign generate` does not answer: set "
                "export.adapter=merged and export again, or ask `longalign serve`"
            )
        model_dir = models["aligned"]
        weights = Manifest.load(run_dir.manifest("export"))
    output = run_dir.generated if config.generate.output is None else Path(config.generate.output)
    started = time.perf_counter()
    counts, dropped = answer(
        config.generate,
        config.serve,
        connect=lambda: connect_ray(config),
        output=output,
        model_dir=model_dir,
        weights=weights,
        chat_template=config.model.chat_template,
        dtype=config.model.dtype,
    )
    manifest = Manifest(
        stage="generate",
        config_digest="",
        inputs=[config.generate.requests, str(model_dir)],
        outputs=[str(output)],
        counts=counts,
        dropped_by_reason=dropped,
        versions=_versions(),
        seconds=time.perf_counter() - started,
    )
    manifest.save(output / "manifest.json")
    _tell(manifest)
    return manifest


def evaluate(config: RunConfig, run_dir: RunDir) -> Manifest:
    """Benchmarks over HTTP, from `evaluate.endpoint` or an application started for the purpose."""
    from longalign_ray.evaluate.runner import evaluate as ask
    from longalign_ray.evaluate.short_tasks import load_short_tasks, score_short_tasks
    from longalign_ray.serve.app import running_app

    def work() -> Manifest:
        cases = evaluation_cases(config, run_dir)  # first: what is missing is told before servers start
        short_tasks = [] if config.evaluate.lm_eval is None else load_short_tasks(config.evaluate.lm_eval)

        def measure(base_url: str, key_place: str | None) -> tuple[dict[str, Any], dict[str, int]]:
            key = _first_key(key_place)
            counts, dropped = ask(config.evaluate, run_dir, base_url=base_url, cases=cases, api_key=key)
            if short_tasks:
                model_dir = local_model_dir(config.model.path)
                counts |= score_short_tasks(
                    config.evaluate, run_dir, base_url=base_url, tasks=short_tasks, tokenizer_dir=model_dir, api_key=key
                )
            return counts, dropped

        if config.evaluate.endpoint is not None:
            counts, dropped = measure(config.evaluate.endpoint, config.evaluate.api_key)
        else:
            models, settings = evaluated_models(config, run_dir)
            connect_ray(config)
            with running_app(
                models, settings, chat_template=config.model.chat_template, dtype=config.model.dtype
            ) as base_url:
                counts, dropped = measure(base_url, config.serve.api_keys)
        return _manifest(config, run_dir, "evaluate", [run_dir.model], [run_dir.scores], counts, dropped)

    return _stage(config, run_dir, "evaluate", work)


def evaluated_models(config: RunConfig, run_dir: RunDir) -> tuple[dict[str, Path], ServeConfig]:
    """Those of `served_models` that `evaluate.models` names, and the model under an adapter among them."""
    models, settings = served_models(config, run_dir)
    wanted = config.evaluate.models
    adapters = {name: path for name, path in settings.adapters.items() if name in wanted}
    needed = {*wanted, *(["base"] if adapters else [])}
    needed_models = {name: path for name, path in models.items() if name in needed}
    return needed_models, settings.model_copy(update={"adapters": adapters})


def _first_key(place: str | None) -> str | None:
    from longalign_ray.api_keys import read_key

    return read_key(place) if place else None


def evaluation_cases(config: RunConfig, run_dir: RunDir) -> dict[str, list[EvalCase]]:
    """The cases of each benchmark; those of the held-out loss need what `prepare` has written."""
    from longalign_ray.data.store import TokenStore
    from longalign_ray.data.template import load_tokenizer
    from longalign_ray.evaluate.benchmarks import task_cases
    from longalign_ray.evaluate.haystack import default_haystack
    from longalign_ray.evaluate.task import TaskInputs

    heldout = []
    if config.evaluate.heldout_loss:
        _need(run_dir.store, "prepare", otherwise="or leave the held-out loss out with evaluate.heldout_loss=false")
        store = TokenStore(run_dir.store)
        heldout = [store.example(int(row)) for row in store.index.heldout.nonzero()[0]]
    lengths = [task.lengths for task in (config.evaluate.needle, config.evaluate.ruler) if task is not None]
    longest = max((max(of_task) for of_task in lengths), default=0)
    tokenizer = load_tokenizer(local_model_dir(config.model.path), chat_template=config.model.chat_template)
    haystack = default_haystack(config.seed, min_chars=8 * longest)
    return task_cases(config.evaluate, TaskInputs(heldout, haystack, tokenizer, config.seed))


def report(config: RunConfig, run_dir: RunDir) -> dict[str, Any]:
    """Writes report.html and report.json from whatever the run directory holds; returns the summary."""
    from longalign_ray.evaluate.report import write_report

    return write_report(run_dir)


def run(config: RunConfig, run_dir: RunDir) -> dict[str, Any]:
    """Every stage in order; returns the summary of the report."""
    _make_model(config, run_dir)
    evaluate(config, run_dir)
    return report(config, run_dir)


def _make_model(config: RunConfig, run_dir: RunDir) -> None:
    """The stages that end in `run_dir.model`, after those of the run that comes before."""
    if config.first is not None:
        first, first_dir = open_run_of(config.first)
        logger.info("before: %s", first_dir.root)
        _make_model(first, first_dir)
    if not config.corpus.named:
        construct(config, run_dir)
    for stage in (prepare, train, export):
        stage(config, run_dir)


def starting_model(config: RunConfig, run_dir: RunDir) -> Path:
    """Directory of the model that training starts from: the recipe's, or what the run before it has exported."""
    if config.before is None:
        return local_model_dir(config.model.path)
    model = first_run_dir(run_dir).model
    _need(model / "config.json", "run")
    return model


def corpus_sources(config: RunConfig, run_dir: RunDir) -> dict[str, SourceConfig]:
    """The recipe's corpus by the names of its sources, or the output of `construct`."""
    if config.corpus.named:
        return config.corpus.named
    _need(run_dir.conversations, "construct")
    return {DEFAULT_SOURCE: SourceConfig(paths=(str(run_dir.conversations),), style=config.corpus.style)}


def _stage(
    config: RunConfig,
    run_dir: RunDir,
    stage: str,
    work: Callable[[], Manifest],
    *,
    check: Callable[[], None] = lambda: None,
) -> Manifest:
    """Does `work` unless it is done; what `check` refuses leaves the run as it is."""
    if (done := is_done(config, run_dir, stage)) is not None:
        logger.info("%s: done before, %.0f s", stage, done.seconds)
        return done
    check()
    logger.info("%s: started", stage)
    started = time.perf_counter()
    run_dir.manifest(stage).unlink(missing_ok=True)
    made = work()
    manifest = Manifest(
        stage=stage,
        config_digest=made.config_digest,
        inputs=made.inputs,
        outputs=made.outputs,
        counts=made.counts,
        dropped_by_reason=made.dropped_by_reason,
        versions=made.versions,
        seconds=time.perf_counter() - started,
    )
    manifest.save(run_dir.manifest(stage))
    run_dir.config.write_text(dump_config(config), encoding="utf-8")  # only now: a refused command changes nothing
    _tell(manifest)
    return manifest


def _tell(manifest: Manifest) -> None:
    numbers = ", ".join(
        f"{name} {value:,.4g}" if isinstance(value, float) else f"{name} {value:,}"
        for name, value in manifest.counts.items()
    )
    dropped = ", ".join(f"{reason} {number}" for reason, number in manifest.dropped_by_reason.items())
    logger.info(
        "%s: %.0f s; %s%s", manifest.stage, manifest.seconds, numbers, f"; dropped: {dropped}" if dropped else ""
    )


def _manifest(
    config: RunConfig,
    run_dir: RunDir,
    stage: str,
    inputs: Sequence[Any],
    outputs: Sequence[Path],
    counts: dict[str, Any],
    dropped: dict[str, int],
) -> Manifest:
    return Manifest(
        stage=stage,
        config_digest=stage_digest(config, run_dir, stage),
        inputs=[str(path) for path in inputs],
        outputs=[str(path) for path in outputs],
        counts=counts,
        dropped_by_reason=dropped,
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {name: metadata.version(name) for name in PACKAGES}


def _need(path: Path, stage: str, *, otherwise: str = "or `longalign run` for all stages") -> None:
    if not path.exists():
        raise LongAlignError(f"{path} does not exist: run `longalign {stage}` first, {otherwise}")


def _recipe(config: RunConfig, prepared: str | None) -> dict[str, Any]:
    """What `RunDir.trained_recipe` holds."""
    return {"digest": resume_digest(config, prepared), "recipe": config.model_dump(mode="json")}


def _check_recipe(config: RunConfig, run_dir: RunDir, *, prepared: str | None) -> bool:
    """Whether training may continue from what another start has left, if it has.

    prepared: the digest of `prepare`. Raises PlanMismatchError where finished checkpoints belong to another recipe.
    """
    try:
        trained = json.loads(run_dir.trained_recipe.read_bytes())
    except (FileNotFoundError, ValueError):
        return True
    if trained["digest"] == resume_digest(config, prepared):
        return True
    from longalign_ray.train.ray_checkpoints import checkpoint_store

    store = checkpoint_store(config, run_dir)
    finished, _ = store.finished()
    if finished:
        changed = ", ".join(changed_settings(trained["recipe"], config)) or "the corpus, or the run before this one"
        raise PlanMismatchError(
            f"{store.path} holds checkpoints up to step {finished[0].state.step} of another recipe, with which this "
            f"one cannot continue; changed: {changed}. Restore that, choose another run_dir, or remove {store.path} to "
            "train anew"
        )
    return False


def _check_window(config: RunConfig, model_dir: Path) -> None:
    from longalign_ray.train.rope import check_window

    one_per_pack = config.packing.strategy in ("sorted", "naive")
    check_window(model_dir, config.model.rope, max_length=config.data.max_length, one_per_pack=one_per_pack)
