from __future__ import annotations

from pathlib import Path

import pytest

from longalign_ray.config import RunConfig
from longalign_ray.config_load import dump_config, load_config
from longalign_ray.data.template import BUILT_IN
from longalign_ray.errors import ConfigError

RECIPES = sorted((Path(__file__).parents[2] / "jobs" / "recipes").glob("*.yaml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems(recipe: Path, *overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(recipe, overrides)
    first, *listed = str(caught.value).splitlines()
    assert first == f"{len(listed)} problem(s) in the recipe {recipe}:"
    return [line.removeprefix("  - ") for line in listed]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_recipes_load_and_read_back_equal(recipe: Path, tmp_path: Path) -> None:
    config = load_config(recipe)
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_recipes_name_templates_that_exist() -> None:
    templates = [template for path in RECIPES if (template := load_config(path).model.chat_template)]
    assert templates
    assert set(templates) <= set(BUILT_IN)


def test_prompt_loss_weight_goes_in_steps_of_a_hundredth(tmp_path: Path) -> None:
    recipe = write(tmp_path, "run_dir: runs/a\ndata:\n  prompt_loss_weight: 0.29\n")
    assert load_config(recipe).data.prompt_loss_weight == 0.29
    with pytest.raises(ConfigError, match=r"data\.prompt_loss_weight = 0\.005 is no multiple of 0\.01"):
        load_config(recipe, ["data.prompt_loss_weight=0.005"])


def test_defaults_and_overrides(tmp_path: Path) -> None:
    recipe = write(tmp_path, "run_dir: runs/a\ntrain:\n  epochs: 3\n")
    config = load_config(
        recipe, ["train.learning_rate=1e-4", "corpus.paths=[a.jsonl, b.jsonl]", "evaluate.needle=null", "run_dir=b=c"]
    )
    assert (config.train.epochs, config.train.learning_rate) == (3, 1e-4)
    assert config.corpus.paths == ("a.jsonl", "b.jsonl")
    assert config.evaluate.needle is None
    assert config.run_dir == "b=c"  # only the first `=` divides
    assert config.packing == RunConfig(run_dir="x").packing


def test_a_section_with_every_setting_commented_out_is_the_default(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "run_dir: a\ntrain:\n  # epochs: 3\nserve:\n"))
    assert config == RunConfig(run_dir="a")


def test_all_problems_come_together_with_place_and_remedy(tmp_path: Path) -> None:
    recipe = write(
        tmp_path,
        """\
train:
  num_workes: 3
  zero_stage: 7
  epochs: 1
  epochs: 2
packing:
  capacity: 1024
evaluate:
  needle:
    lenghts: [512]
    depths: [10, 200]
construct:
  min_chars: 10
  max_chars: 5
""",
    )
    found = problems(recipe, "train.learning_rate=fast", "seed", "zzz=1")
    assert found == [
        "train.epochs is given twice (recipe.yaml, line 4 and recipe.yaml, line 5): remove one",
        "override 'seed' is not of the form section.key=value",
        "run_dir is missing: add it to the recipe or give run_dir=VALUE",
        "construct.min_chars = 10 is above construct.max_chars = 5: lower min_chars or raise max_chars"
        " (recipe.yaml, line 13)",
        "train.zero_stage = 7: input should be 0, 1, 2 or 3 (recipe.yaml, line 3)",
        "train.learning_rate = 'fast': input should be a valid number, unable to parse string as a number"
        " (override train.learning_rate=fast)",
        "train.num_workes is not a known key: did you mean 'num_workers'? (recipe.yaml, line 2)",
        "evaluate.needle.depths.1 = 200: input should be less than or equal to 100 (recipe.yaml, line 11)",
        "evaluate.needle.lenghts is not a known key: did you mean 'lengths'? (recipe.yaml, line 10)",
        "zzz is not a known key: known keys: " + ", ".join(RunConfig.model_fields) + " (override zzz=1)",
        "packing.capacity = 1024 is below data.max_length = 4096: raise packing.capacity or set data.max_length <= 1024"
        " (recipe.yaml, line 7)",
    ]


def test_ranks_that_share_packs(tmp_path: Path) -> None:
    recipe = write(
        tmp_path, "run_dir: a\ndata: {max_length: 4096}\npacking: {capacity: 1024}\ntrain: {num_workers: 6}\n"
    )
    assert problems(recipe, "train.sp_degree=3") == [
        "packing.capacity = 1024 on each of train.sp_degree = 3 ranks is below data.max_length = 4096: raise "
        "packing.capacity or set data.max_length <= 3072 (recipe.yaml, line 3)"
    ]
    assert problems(recipe, "train.sp_degree=4", "data.max_length=1000") == [
        "train.sp_degree = 4 does not divide train.num_workers = 6: set train.sp_degree to one of 1, 2, 3, 6, or "
        "train.num_workers to a multiple of 4 (override train.sp_degree=4)"
    ]
    assert problems(recipe, "train.sp_degree=6") == [
        "packing.packs_per_step = 8 is no multiple of 6, the ranks of train.sp_degree = 6 that share a pack of "
        "data.max_length = 4096 tokens: set it to a multiple of 6, such as 12"
    ]
    assert load_config(recipe, ["train.sp_degree=6", "packing.packs_per_step=12"]).train.sp_degree == 6
    assert load_config(recipe, ["train.sp_degree=6", "data.max_length=1024"]).packing.packs_per_step == 8


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ("{factor: 200}", "set scaling=base"),
        ("{scaling: yarn}", "model.rope.scaling = yarn needs model.rope.window"),
        ("{scaling: base, window: 2048}", "model.rope.window = 2048 is below data.max_length = 4096"),
        ("{scaling: base, window: 8192, factor: 1}", "model.rope.factor = 1: input should be greater than 1"),
    ],
)
def test_context_extension_names_what_is_missing(tmp_path: Path, rope: str, message: str) -> None:
    [only] = problems(write(tmp_path, f"run_dir: a\nmodel:\n  rope: {rope}\n"))
    assert message in only


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["train.heldout_every=null"],
            "train.heldout_every = None does not measure it there: set train.heldout_every=10",
        ),
        (["train.heldout_every=0"], "train.heldout_every = 0 does not"),
        (["train.heldout_every=3"], "train.heldout_every = 3 does not"),
        (
            ["data.heldout_fraction=0"],
            "train.keep_best = true needs held-out examples, and data.heldout_fraction = 0.0",
        ),
        (["data.max_heldout=0"], "data.max_heldout = 0 keeps none: raise them"),
        (["train.use_gpu=true", "model.dtype=float32"], "model.dtype = float32 is not for train.use_gpu = true"),
    ],
)
def test_a_setting_that_would_do_nothing_or_fail_late_is_refused(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    recipe = write(tmp_path, "run_dir: a\ntrain: {keep_best: true, heldout_every: 5, checkpoint_every: 10}\n")
    for fine in ([], ["train.use_gpu=true"], ["model.dtype=float32"], ["train.keep_best=false", "data.max_heldout=0"]):
        load_config(recipe, fine)
    [only] = problems(recipe, *overrides)
    assert message in only


def test_a_rule_across_fields_is_reported_once_and_not_about_a_wrong_field(tmp_path: Path) -> None:
    recipe = write(tmp_path, "run_dir: a\npacking: {capacity: 1024}\n")
    assert len(problems(recipe)) == 1
    [only] = problems(recipe, "data.max_length=long")
    assert only.startswith("data.max_length = 'long': input should be a valid integer")


TWO_STAGES = """\
run_dir: a
corpus: {paths: [chats.jsonl], max_bad_fraction: 0.5}
data: {max_length: 512, heldout_fraction: 0.5}
packing: {capacity: 512}
train: {epochs: 3, learning_rate: 0.001}
before:
  corpus: {paths: [books.jsonl]}
  data: {max_length: 1024}
  packing: {capacity: 1024}
  train: {epochs: 1}
"""


def test_the_run_before_has_the_recipe_s_settings_but_for_those_named(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TWO_STAGES), ["before.train.loss=token", "seed=3"])
    first = config.first
    assert first is not None
    assert (first.run_dir, first.seed, first.before) == ("a/before", 3, None)
    assert (first.data.max_length, first.data.heldout_fraction) == (1024, 0.5)
    assert (first.train.epochs, first.train.learning_rate, first.train.loss) == (1, 0.001, "token")
    assert first.corpus == RunConfig(run_dir="x", corpus={"paths": ["books.jsonl"]}).corpus  # pyright: ignore
    assert (config.train.epochs, config.train.loss, config.data.max_length) == (3, "sequence", 512)
    assert first.first is None
    (tmp_path / "again.yaml").write_text(dump_config(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config


def test_mistakes_in_the_run_before_are_told_once_with_their_place(tmp_path: Path) -> None:
    recipe = write(tmp_path, TWO_STAGES.replace("capacity: 1024", "capacity: 600").replace("epochs: 1}", "epoch: 1}"))
    assert problems(recipe, "train.zero_stage=9") == [
        "train.zero_stage = 9: input should be 0, 1, 2 or 3 (override train.zero_stage=9)",
        "before.train.epoch is not a known key: did you mean 'epochs'? (recipe.yaml, line 10)",
        "before.packing.capacity = 600 is below data.max_length = 1024: raise packing.capacity or set data.max_length "
        "<= 600 (recipe.yaml, line 9)",
    ]
    rope = problems(write(tmp_path, TWO_STAGES), "model.rope={scaling: base, window: 1024}")
    assert rope == [
        "model.rope.scaling = base would extend the context in the run before and again in this one: move model.rope "
        "to before.model.rope"
    ]
    assert problems(recipe, "before=4") == ["before = 4: input should be a valid dictionary (override before=4)"]


def test_offloading_what_is_not_there(tmp_path: Path) -> None:
    nothing = ["train.zero_stage=0", "train.gradient_checkpointing=false"]
    assert problems(
        write(tmp_path, "run_dir: a"),
        *nothing,
        *(f"train.offload_{what}=true" for what in ("optimizer", "parameters", "checkpoints")),
    ) == [
        "train.offload_optimizer = true needs ZeRO, and train.zero_stage = 0: set it to 1, 2 or 3; "
        "train.offload_parameters = true needs weights in shards, and train.zero_stage = 0: set it to 3; "
        "train.offload_checkpoints = true needs train.gradient_checkpointing = true, which makes them "
        "(override train.offload_optimizer=true)"
    ]
    assert load_config(write(tmp_path, "run_dir: a"), ["train.offload_parameters=true"]).train.offload_parameters


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train", "override 'train' is not of the form section.key=value"),
        ("=1", "override '=1' is not of the form section.key=value"),
        ("a..b=1", "override 'a..b=1' is not of the form section.key=value"),
        ("corpus.paths=[*.jsonl]", "override 'corpus.paths=[*.jsonl]': '[*.jsonl]' is not a YAML value; quote it"),
        ("run_dir=2024-13-45", "override 'run_dir=2024-13-45': '2024-13-45' is not a YAML value; quote it"),
        ("corpus.paths=a", "corpus.paths = 'a': give a list, e.g. [a, b] (override corpus.paths=a)"),
        ("serve=4", "serve = 4: give a section, e.g. {key: value} (override serve=4)"),
        ("train={epochs: 0}", "train.epochs = 0: input should be greater than 0 (override train={epochs: 0})"),
        (
            "train.num_workers=[4, 2]",
            "train.num_workers = [4, 2]: give a whole number of ranks, 1 or more, or two, [fewest, most]"
            " (override train.num_workers=[4, 2])",
        ),
        (
            "train.checkpoint_storage=s3://bucket",
            "train.checkpoint_storage = 's3://bucket': give a directory in a bucket, s3://bucket/path or"
            " gs://bucket/path; without the setting the checkpoints are in run_dir"
            " (override train.checkpoint_storage=s3://bucket)",
        ),
        ("seed=-1", "seed = -1: input should be greater than or equal to 0 (override seed=-1)"),
        ("model.path.x=1", "model.path = {'x': 1}: input should be a valid string (override model.path.x=1)"),
    ],
)
def test_bad_override(tmp_path: Path, override: str, message: str) -> None:
    recipe = write(tmp_path, "run_dir: a\ntrain:\n  epochs: 2\nmodel:\n  path: b\n")
    assert problems(recipe, override) == [message]


@pytest.mark.parametrize("value", ["0", "[0, 2]", "[1]", "[1, 2, 3]", "two", "true", "1.5", "[2, x]"])
def test_ranks_are_a_number_or_two(tmp_path: Path, value: str) -> None:
    [only] = problems(write(tmp_path, "run_dir: a\n"), f"train.num_workers={value}")
    assert "give a whole number of ranks" in only


def test_fewest_and_most_ranks(tmp_path: Path) -> None:
    recipe = write(tmp_path, "run_dir: a\ntrain: {num_workers: [2, 8]}\n")
    train = load_config(recipe).train
    assert (train.min_workers, train.max_workers) == (2, 8)
    assert RunConfig.model_validate(load_config(recipe).model_dump(mode="json")).train == train
    fixed = load_config(recipe, ["train.num_workers=3"]).train
    assert (fixed.min_workers, fixed.max_workers) == (3, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: [1", "is not valid YAML"),
        (b"run_dir: 2024-13-45", "is not valid YAML"),
        (b"- 1\n- 2\n", "holds a list; a recipe is a mapping of sections"),
        (b"\xff\xfe\x00", "is not a text file in UTF-8"),
        (b"", "run_dir is missing"),
    ],
)
def test_unreadable_recipe(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        load_config(path)


def test_missing_recipe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="Is a directory"):
        load_config(tmp_path)


def test_every_setting_has_help() -> None:
    def bare(section: type, prefix: str = "") -> list[str]:
        names = []
        for name, field in section.model_fields.items():  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(field.default, type(None)) or not hasattr(field.default, "model_fields"):
                names += [] if field.description else [prefix + name]
            else:
                names += bare(type(field.default), f"{prefix}{name}.")
        return names

    assert bare(RunConfig) == []


def test_sources_of_the_corpus(tmp_path: Path) -> None:
    text = """\
run_dir: runs/a
corpus:
  style: sharegpt
  sources:
    chat: {paths: [a.jsonl], weight: 0.75}
    long: {paths: [b.jsonl], weight: 0.25, style: text}
"""
    config = load_config(write(tmp_path, text), ["corpus.sources.chat.repeat=2", "data.dedup=near"])
    assert {name: (source.style, source.repeat) for name, source in config.corpus.named.items()} == {
        "chat": ("sharegpt", 2.0),
        "long": ("text", 1.0),
    }
    assert (config.data.dedup.method, config.data.dedup.threshold) == ("near", 0.8)
    assert load_config(write(tmp_path, dump_config(config))) == config
    alone = load_config(write(tmp_path, "run_dir: a\ncorpus: {paths: [x]}"))
    assert {name: source.paths for name, source in alone.corpus.named.items()} == {"corpus": ("x",)}
    assert load_config(write(tmp_path, "run_dir: a")).corpus.named == {}


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ("{a: {paths: [x], weight: 1}, b: {paths: [y]}}", "corpus.sources has weights, but not for b: give each"),
        ("{a: {paths: [x], weight: 0}}", "corpus.sources has the weight 0 everywhere: give at least one"),
        ("{a: {paths: [x], wieght: 1}}", "corpus.sources.a.wieght is not a known key: did you mean 'weight'?"),
        ("{a: {paths: [x], repeat: 0}}", "corpus.sources.a.repeat = 0: input should be greater than 0"),
        ("{a: {paths: [x], weight: .inf}}", "corpus.sources.a.weight = inf: input should be a finite number"),
        ("{a: {weight: 1}}", "corpus.sources.a.paths is missing: add it to the recipe"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, sources: str, message: str) -> None:
    found = problems(write(tmp_path, f"run_dir: a\ncorpus:\n  sources: {sources}\n"))
    assert any(problem.startswith(message) for problem in found), found


def test_paths_and_sources_exclude_each_other(tmp_path: Path) -> None:
    recipe = write(tmp_path, "run_dir: a\ncorpus: {paths: [x], sources: {a: {paths: [y]}}}")
    (problem,) = problems(recipe)
    assert problem.startswith("corpus.sources and corpus.paths are both given: name the paths as one more source")
