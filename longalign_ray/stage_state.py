"""Which stages of a run are done: a digest of all that the result of a stage depends on, in its manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from longalign_ray.config import EvaluateConfig, RunConfig
from longalign_ray.config.section import Section
from longalign_ray.run_dir import STAGES, Manifest, RunDir, digest

WATCHING = ("heldout_every", "max_loss_ratio", "profile_steps", "sinks")
"""Settings of `train` that change no weight: a run may continue with others."""
RESUMES_WITH_OTHER = (
    "num_workers", "cpus_per_worker", "use_gpu", "zero_stage", "offload_optimizer", "offload_parameters",
    "offload_checkpoints", "tiled_mlp", "gradient_checkpointing", "head_chunk", "checkpoint_every", "keep_checkpoints",
    "keep_best", "checkpoint_storage", "async_checkpoint", "max_failures", "sp_degree", *WATCHING,
)  # fmt: skip
"""Settings of `train` that an interrupted run may change and still continue: the steps stay the same."""


def stage_digest(config: RunConfig, run_dir: RunDir, stage: str) -> str:
    """Digest of everything that the result of `stage` depends on: its settings and its upstream manifest."""
    dump = config.model_dump(mode="json")
    sections: dict[str, list[Any]] = {
        "construct": [dump["construct"]],
        "prepare": [
            dump["corpus"],
            dump["mixture"],
            dump["data"],
            dump["packing"],
            dump["model"],
            _input_state(config),
            config.train.epochs,
            config.train.max_steps,
        ],
        "train": [{name: value for name, value in dump["train"].items() if name not in WATCHING}],
        "export": [dump["export"]],
        "evaluate": [dump["evaluate"], _benchmark_state(config.evaluate) if stage == "evaluate" else []],
    }
    upstream = {"prepare": "construct", "train": "prepare", "export": "train", "evaluate": "export"}.get(stage)
    if stage == "prepare" and config.corpus.named:
        upstream = None
    above = [run_dir.manifest(upstream)] if upstream else []
    if stage == "prepare" and config.before is not None:
        above.append(first_run_dir(run_dir).manifest("export"))
    manifests = [Manifest.load(path) for path in above]
    return digest(stage, config.seed, sections[stage], [made.config_digest if made else None for made in manifests])


def resume_digest(config: RunConfig, prepared: str | None) -> str:
    """Digest of what must stay as it was for training to continue: all but where it runs and what it leaves behind.

    prepared: the digest of `prepare`, of which an interrupted run may change nothing.
    """
    same = config.train.model_dump(mode="json", exclude=set(RESUMES_WITH_OTHER))
    return digest("train", config.seed, same, prepared)


def changed_settings(recipe: dict[str, Any], config: RunConfig) -> list[str]:
    """What a run that was trained with `recipe` may not change and has, such as `train.max_steps (was 4)`."""

    def flat(tree: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(tree, dict):
            return {name: tree}
        return {key: value for part, below in tree.items() for key, value in flat(below, f"{name}.{part}").items()}

    may = {
        "run_dir",
        "export",
        "serve",
        "evaluate",
        "generate",
        "ray",
        *(f"train.{name}" for name in RESUMES_WITH_OTHER),
    }
    was, now = (
        {key[1:]: value for key, value in flat(tree).items()} for tree in (recipe, config.model_dump(mode="json"))
    )
    return [
        f"{name} (was {was.get(name)})"
        for name in dict.fromkeys([*now, *was])
        if was.get(name) != now.get(name) and not {name, name.split(".")[0]} & may
    ]


def is_done(config: RunConfig, run_dir: RunDir, stage: str) -> Manifest | None:
    """The manifest of a stage that is complete for this configuration, else None."""
    manifest = Manifest.load(run_dir.manifest(stage))
    if manifest is None or manifest.config_digest != stage_digest(config, run_dir, stage):
        return None
    return manifest if all(Path(output).exists() for output in manifest.outputs) else None


def stage_states(config: RunConfig, run_dir: RunDir) -> list[tuple[str, str]]:
    """What `run` would do: each stage with `done`, `to do`, or why it is left out."""
    states = []
    stale = False
    if (first := config.first) is not None:
        states = [(f"before: {name}", state) for name, state in stage_states(first, first_run_dir(run_dir))[:-2]]
        stale = any(state == "to do" for _, state in states)
    for stage in STAGES[:-1]:
        if stage == "construct" and config.corpus.named:
            states.append((stage, f"not needed: corpus.{'paths' if config.corpus.paths else 'sources'} is given"))
            continue
        stale = stale or is_done(config, run_dir, stage) is None
        states.append((stage, "to do" if stale else "done"))
    return [*states, ("report", "to do")]


def first_run_dir(run_dir: RunDir) -> RunDir:
    """Where the run that comes before the one of `run_dir` has its artefacts."""
    return RunDir(run_dir.root / "before")


def _input_state(config: RunConfig) -> list[Any]:
    """Name, size and version of each file of the corpus and of the evaluation sets that it must not hold, and what the
    tokenizer and the chat template hold, so that with any of them changed the corpus is prepared anew."""
    from longalign_ray.data.corpus_files import source_files
    from longalign_ray.data.decontaminate import evaluation_state
    from longalign_ray.data.template import tokenising_state

    states = [file.state for files in source_files(config.corpus, config.corpus.named).values() for file in files]
    evaluation = evaluation_state(config.data.decontaminate.paths, endpoint=config.corpus.storage_endpoint)
    return [states, evaluation, tokenising_state(config.model.path, config.model.chat_template)]


def _benchmark_state(config: EvaluateConfig) -> list[tuple[str, int, int]]:
    """Name, size and time of each file that a benchmark's section names, or that is below a directory which it names,
    so that with any of them changed the stage runs anew; answers to the same requests are kept. Data of the hub is
    taken to be what it was: its address may name a revision."""
    sections = [section for _, section in config if isinstance(section, Section)]
    paths = [Path(value) for section in sections for _, value in section if isinstance(value, str) and value]
    files = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()}
    return [(str(file), (status := file.stat()).st_size, status.st_mtime_ns) for file in sorted(files)]
