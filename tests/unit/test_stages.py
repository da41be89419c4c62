"""Which stages are done for a recipe, and what stops a run before it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from longalign_ray import stage_state, stages
from longalign_ray.config import RunConfig
from longalign_ray.config_load import load_config
from longalign_ray.errors import ConfigError, CorpusError, LongAlignError, ModelError, PlanMismatchError
from longalign_ray.run_dir import Manifest, RunDir, write_json
from longalign_ray.train.checkpoint import TrainState
from longalign_ray.train.checkpoint_store import CheckpointStore


def config_of(tmp_path: Path, *overrides: str) -> RunConfig:
    if not (tmp_path / "corpus.jsonl").exists():
        (tmp_path / "corpus.jsonl").touch()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"run_dir: {tmp_path / 'run'}\n")
    return load_config(recipe, [f"corpus.paths=[{tmp_path / 'corpus.jsonl'}]", *overrides])


def mark_done(config: RunConfig, run_dir: RunDir, *names: str) -> None:
    for name in names:
        digest = stage_state.stage_digest(config, run_dir, name)
        Manifest(name, digest, inputs=[], outputs=[], counts={}, dropped_by_reason={}).save(run_dir.manifest(name))


@pytest.mark.parametrize(
    ("override", "to_do"),
    [
        ("seed=0", []),
        ("serve.port=9000", []),
        ("evaluate.concurrency=2", ["evaluate"]),
        ("train.learning_rate=1.0e-3", ["train", "export", "evaluate"]),
        ("train.num_workers=4", ["train", "export", "evaluate"]),
        ("data.max_length=2048", ["prepare", "train", "export", "evaluate"]),
        ("train.epochs=2", ["prepare", "train", "export", "evaluate"]),
        ("seed=1", ["prepare", "train", "export", "evaluate"]),
    ],
)
def test_a_changed_setting_makes_its_stage_and_the_later_ones_due(
    tmp_path: Path, override: str, to_do: list[str]
) -> None:
    run_dir = RunDir(tmp_path / "run")
    mark_done(config_of(tmp_path), run_dir, "prepare", "train", "export", "evaluate")
    states = dict(stage_state.stage_states(config_of(tmp_path, override), run_dir))
    assert [stage for stage, state in states.items() if state == "to do" and stage != "report"] == to_do
    assert "not needed" in states["construct"]


def test_a_changed_corpus_or_a_lost_output_is_due(tmp_path: Path) -> None:
    config, run_dir = config_of(tmp_path), RunDir(tmp_path / "run")
    mark_done(config, run_dir, "prepare")
    assert stage_state.is_done(config, run_dir, "prepare")
    (tmp_path / "corpus.jsonl").write_text("{}")
    assert stage_state.is_done(config, run_dir, "prepare") is None
    digest = stage_state.stage_digest(config, run_dir, "prepare")
    Manifest("prepare", digest, [], [str(tmp_path / "gone")], {}, {}).save(run_dir.manifest("prepare"))
    assert stage_state.is_done(config, run_dir, "prepare") is None


def test_changed_data_of_a_benchmark_is_measured_anew(tmp_path: Path) -> None:
    data, prompts = tmp_path / "bench" / "data", tmp_path / "bench" / "prompts.json"
    data.mkdir(parents=True)
    for path in (data / "hotpotqa.jsonl", prompts):
        path.write_text("{}")
    config = config_of(tmp_path, f"evaluate.longbench.data={data}", f"evaluate.longbench.prompts={prompts}")
    run_dir = RunDir(tmp_path / "run")
    changes = {
        "other content": lambda: prompts.write_text("{ }"),
        "content of the same size": lambda: os.utime(data / "hotpotqa.jsonl", ns=(1, 1)),
        "one more file": lambda: (data / "lcc.jsonl").write_text("{}"),
        "one less": lambda: (data / "hotpotqa.jsonl").unlink(),
    }
    for what, change in changes.items():
        mark_done(config, run_dir, "evaluate")
        assert stage_state.is_done(config, run_dir, "evaluate")
        change()
        assert stage_state.is_done(config, run_dir, "evaluate") is None, what


def test_a_changed_template_or_tokenizer_or_format_is_due(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir, template, model = RunDir(tmp_path / "run"), tmp_path / "own.jinja", tmp_path / "model"
    model.mkdir()
    for path in (template, model / "tokenizer.json", model / "model.safetensors"):
        path.write_text("one")
    config = config_of(tmp_path, f"model.chat_template={template}", f"model.path={model}")

    def due() -> bool:
        found = stage_state.is_done(config, run_dir, "prepare") is None
        mark_done(config, run_dir, "prepare")
        return found

    assert due()
    assert not due()
    for path in (template, model / "tokenizer.json", model / "chat_template.jinja"):
        path.write_text("two")
        assert due(), path
        os.utime(path, ns=(1, 1))  # the same text at another time
        assert not due(), path
    (model / "model.safetensors").write_text("two")
    assert not due()
    monkeypatch.setattr("longalign_ray.data.template.STORE_FORMAT", 1_000)
    assert due()
    template.unlink()
    with pytest.raises(ModelError, match=r"own\.jinja is no built-in template"):
        due()


def test_what_comes_before_makes_the_rest_due(tmp_path: Path) -> None:
    config, run_dir = config_of(tmp_path, "before.train.epochs=2"), RunDir(tmp_path / "run")
    assert config.first is not None
    with pytest.raises(LongAlignError, match=r"before/model/config.json does not exist: run `longalign run` first"):
        stages.starting_model(config, run_dir)
    first_dir = stage_state.first_run_dir(run_dir)
    mark_done(config.first, first_dir, "prepare", "train", "export")
    mark_done(config, run_dir, "prepare", "train", "export", "evaluate")
    assert "to do" not in [state for _, state in stage_state.stage_states(config, run_dir)][:-1]
    changed = config_of(tmp_path, "before.train.epochs=3")
    states = stage_state.stage_states(changed, run_dir)
    assert [stage for stage, state in states if state == "to do"] == [
        "before: prepare", "before: train", "before: export", "prepare", "train", "export", "evaluate", "report",
    ]  # fmt: skip
    assert changed.first is not None
    mark_done(changed.first, first_dir, "prepare", "train", "export")
    assert stage_state.is_done(changed, run_dir, "prepare") is None  # it starts from another model


def test_what_an_interrupted_run_may_change(tmp_path: Path) -> None:
    """Where and in how little memory it trains, but not what."""

    def digest(*overrides: str) -> str:
        return stage_state.resume_digest(config_of(tmp_path, *overrides), "prepared")

    where = ("num_workers=4", "sp_degree=2", "zero_stage=2", "tiled_mlp=true", "offload_checkpoints=true")
    assert digest(*(f"train.{setting}" for setting in where)) == digest("train.offload_parameters=true") == digest()
    for what in ("learning_rate=1", "loss=token", "epochs=7", "max_grad_norm=0.5", "adapter={rank: 4}"):
        assert digest(f"train.{what}") != digest()


def test_checkpoints_of_another_recipe_are_kept_and_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Complete or not; those that were never finished are removed, and where it trains may change."""
    monkeypatch.setattr(stages, "starting_model", lambda *arguments: pytest.fail("went on"))
    config, run_dir = stages.open_run_of(config_of(tmp_path, "train.max_steps=4"))
    write_json(run_dir.trained_recipe, stages._recipe(config, stage_state.stage_digest(config, run_dir, "prepare")))
    run_dir.plan.parent.mkdir()
    run_dir.plan.touch()
    store = CheckpointStore.at(run_dir.checkpoints)
    (run_dir.checkpoints / "step-00000002-1").mkdir(parents=True)
    store.finish("step-00000002-1", 0, {})
    changed = config_of(tmp_path, "train.max_steps=8", "train.num_workers=1", "seed=3")
    assert not stages._check_recipe(changed, run_dir, prepared="another")
    store.finish("step-00000002-1", 0, {}, TrainState(2, 0, "plan", 1, 3))
    mark_done(config, run_dir, "prepare")
    before = {path: path.read_bytes() for path in (run_dir.config, run_dir.manifest("prepare"))}
    for stage in (stages.prepare, stages.train):
        with pytest.raises(PlanMismatchError) as error:
            stage(*stages.open_run_of(changed))
        assert {path: path.read_bytes() for path in before} == before
        assert "up to step 2 of another recipe" in str(error.value)
        assert "changed: seed (was 0), train.max_steps (was 4). Restore that, choose another run_dir" in str(
            error.value
        )
    assert store.names() == ["step-00000002-1"]
    prepared = stage_state.stage_digest(config, run_dir, "prepare")
    assert stages._check_recipe(
        config_of(tmp_path, "train.max_steps=4", "train.zero_stage=2"), run_dir, prepared=prepared
    )
    with pytest.raises(PlanMismatchError, match="changed: the corpus, or the run before"):
        stages._check_recipe(config, run_dir, prepared="of other files")


def test_runs_before_one_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, run_dir = config_of(tmp_path, "before={before: {seed: 5}, seed: 6}", "seed=7"), RunDir(tmp_path / "run")
    done: list[tuple[str, int, str]] = []
    for name in ("prepare", "train", "export", "evaluate", "report"):
        monkeypatch.setattr(stages, name, lambda c, d, name=name: done.append((name, c.seed, d.root.name)))
    stages.run(config, run_dir)
    made = [(name, seed, where) for seed, where in ((5, "before"), (6, "before"), (7, "run"))
            for name in ("prepare", "train", "export")]  # fmt: skip
    assert done == [*made, ("evaluate", 7, "run"), ("report", 7, "run")]
    assert (run_dir.root / "before" / "before" / "config.yaml").exists()
    names = [name for name, _ in stage_state.stage_states(config, run_dir)]
    assert [names.count(f"{depth}train") for depth in ("", "before: ", "before: before: ")] == [1, 1, 1]


def test_a_missing_corpus_is_named(tmp_path: Path) -> None:
    config, run_dir = config_of(tmp_path), RunDir(tmp_path / "run")
    mark_done(config, run_dir, "prepare")
    (tmp_path / "corpus.jsonl").unlink()
    with pytest.raises(CorpusError, match=r"corpus\.jsonl"):
        stage_state.is_done(config, run_dir, "prepare")


def test_an_adapter_alone_is_served_over_the_model_it_was_trained_on(tmp_path: Path, tiny_model_dir: Path) -> None:
    of_model = (f"model.path={tiny_model_dir}", "serve.adapters={other: o}", "evaluate.models=[aligned, other]")
    config, run_dir = config_of(tmp_path, *of_model), RunDir(tmp_path / "run")
    run_dir.model.mkdir(parents=True)
    with pytest.raises(LongAlignError, match="export"):
        stages.served_models(config, run_dir)
    (run_dir.model / "config.json").touch()
    models, settings = stages.served_models(config, run_dir)
    assert (models, settings) == ({"base": tiny_model_dir, "aligned": run_dir.model}, config.serve)
    assert set(stages.evaluated_models(config, run_dir)[0]) == {"base", "aligned"}, "the base of the other adapter"
    (run_dir.model / "config.json").rename(run_dir.model / "adapter_config.json")
    models, settings = stages.served_models(config, run_dir)
    assert models == {"base": tiny_model_dir}
    assert settings.adapters == {"other": "o", "aligned": str(run_dir.model)}
    models, settings = stages.evaluated_models(config_of(tmp_path, *of_model, "evaluate.models=[base]"), run_dir)
    assert (models, settings.adapters) == ({"base": tiny_model_dir}, {})
    extended = config_of(tmp_path, *of_model, "model.rope={scaling: linear, window: 131072}")
    with pytest.raises(LongAlignError, match=r"model\.rope\.scaling = linear .*export\.adapter=merged"):
        stages.served_models(extended, run_dir)


@pytest.mark.parametrize("name", ["base", "aligned"])
def test_an_adapter_does_not_take_the_name_of_a_model_of_the_run(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"serve.adapters names '{name}'"):
        config_of(tmp_path, f"serve.adapters={{{name}: there}}")
