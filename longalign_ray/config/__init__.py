"""The one typed recipe: a section a stage. `config_load` reads it from YAML; the docstring under a field is its help.

Paths are relative to the directory in which the command runs. Functions below the glue take their own section.
"""

from __future__ import annotations

import warnings
from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from longalign_ray.config.construct import ConstructConfig
from longalign_ray.config.corpus import DEFAULT_SOURCE, CorpusConfig, MixtureConfig, SourceConfig
from longalign_ray.config.data import DataConfig, DecontaminateConfig, DedupConfig, PackingConfig
from longalign_ray.config.evaluate import (
    EvaluateConfig,
    JudgeConfig,
    LmEvalConfig,
    LongBenchChatConfig,
    LongBenchConfig,
    LongBenchV2Config,
    LongEvalConfig,
    MTBenchConfig,
    NeedleConfig,
    RulerConfig,
)
from longalign_ray.config.generate import GenerateConfig
from longalign_ray.config.model import ModelConfig, RopeConfig
from longalign_ray.config.section import Section, Style
from longalign_ray.config.serve import ServeConfig
from longalign_ray.config.train import AdapterConfig, ExportConfig, TrainConfig

# pydantic 1 had a method `construct`, which pydantic 2 keeps as a deprecated alias; our section may shadow it.
warnings.filterwarnings("ignore", message='Field name "construct" in "RunConfig" shadows')

__all__ = [
    "DEFAULT_SOURCE",
    "AdapterConfig",
    "ConstructConfig",
    "CorpusConfig",
    "DataConfig",
    "DecontaminateConfig",
    "DedupConfig",
    "EvaluateConfig",
    "ExportConfig",
    "GenerateConfig",
    "JudgeConfig",
    "LmEvalConfig",
    "LongBenchChatConfig",
    "LongBenchConfig",
    "LongBenchV2Config",
    "LongEvalConfig",
    "MTBenchConfig",
    "MixtureConfig",
    "ModelConfig",
    "NeedleConfig",
    "PackingConfig",
    "RayConfig",
    "RopeConfig",
    "RulerConfig",
    "RunConfig",
    "ServeConfig",
    "SourceConfig",
    "Style",
    "TrainConfig",
    "tree_of_first",
]


class RayConfig(Section):
    """How to reach Ray."""

    address: str | None = None
    """`auto` or `ray://...`; none: the cluster that the environment names, else one on this machine."""
    num_cpus: PositiveInt | None = None
    """Logical CPUs of a local Ray; none: those of the machine."""
    log_to_driver: bool = False
    """Show what the workers print; their metrics and errors are shown either way."""


class RunConfig(Section):
    """A recipe."""

    run_dir: str
    """Directory of every artefact of the run; on a cluster a shared file system."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """Seed of every random choice."""
    before: dict[str, Any] | None = None
    """Settings of a run that comes first, in place of this recipe's, such as continual pre-training on plain text:
    `{corpus: {paths: [books.jsonl]}, train: {epochs: 1}}`. Its exported model is where this recipe starts; each has its
    own schedule. `corpus` and `mixture` are taken whole, of other sections what is named. Run directory: `before/`."""
    model: ModelConfig = ModelConfig()
    construct: ConstructConfig = ConstructConfig()
    corpus: CorpusConfig = CorpusConfig()
    mixture: MixtureConfig = MixtureConfig()
    data: DataConfig = DataConfig()
    packing: PackingConfig = PackingConfig()
    train: TrainConfig = TrainConfig()
    export: ExportConfig = ExportConfig()
    serve: ServeConfig = ServeConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    generate: GenerateConfig = GenerateConfig()
    ray: RayConfig = RayConfig()

    @property
    def first(self) -> RunConfig | None:
        """The recipe of the run that comes before this one."""
        return None if self.before is None else RunConfig.model_validate(tree_of_first(self.model_dump(mode="json")))

    @property
    def balance(self) -> str:
        """`packing.balance`, with `auto` resolved."""
        if self.packing.balance != "auto":
            return self.packing.balance
        return "lock_step" if self.train.zero_stage >= 2 else "sums"

    @model_validator(mode="after")
    def _capacity_holds_longest(self) -> RunConfig:
        degree, room = self.train.sp_degree, self.packing.capacity * self.train.sp_degree
        if room < self.data.max_length:
            of_group = f" on each of train.sp_degree = {degree} ranks" if degree > 1 else ""
            raise ValueError(
                f"packing.capacity = {self.packing.capacity}{of_group} is below data.max_length = "
                f"{self.data.max_length}: raise packing.capacity or set data.max_length <= {room}"
            )
        return self

    @model_validator(mode="after")
    def _whole_packs(self) -> RunConfig:
        """By the longest example that there may be; the plan knows the longest that there is."""
        packs, degree, longest = self.packing.packs_per_step, self.train.sp_degree, self.data.max_length
        fitting = [d for d in range(1, degree + 1) if degree % d == 0 and longest <= self.packing.capacity * d]
        if fitting and packs % fitting[0]:
            raise ValueError(
                f"packing.packs_per_step = {packs} is no multiple of {fitting[0]}, the ranks of train.sp_degree = "
                f"{degree} that share a pack of data.max_length = {longest} tokens: set it to a multiple of "
                f"{fitting[0]}, such as {-(-packs // fitting[0]) * fitting[0]}"
            )
        return self

    @model_validator(mode="after")
    def _best_by_something(self) -> RunConfig:
        if self.train.keep_best and not (self.data.heldout_fraction and self.data.max_heldout):
            raise ValueError(
                "train.keep_best = true needs held-out examples, and data.heldout_fraction = "
                f"{self.data.heldout_fraction} with data.max_heldout = {self.data.max_heldout} keeps none: raise them"
            )
        return self

    @model_validator(mode="after")
    def _kernels_of_the_gpu(self) -> RunConfig:
        if self.train.use_gpu and self.model.dtype == "float32":
            raise ValueError(
                "model.dtype = float32 is not for train.use_gpu = true, whose attention kernels take bfloat16 alone: "
                "set model.dtype=bfloat16 (master weights stay in float32)"
            )
        return self

    @model_validator(mode="after")
    def _context_extended_once(self) -> RunConfig:
        own = {} if self.before is None else self.before.get("model") or {}
        if self.before is not None and self.model.rope.scaling != "none" and "rope" not in own:
            raise ValueError(
                f"model.rope.scaling = {self.model.rope.scaling} would extend the context in the run before and again "
                "in this one: move model.rope to before.model.rope"
            )
        return self

    @model_validator(mode="after")
    def _adapters_have_names_of_their_own(self) -> RunConfig:
        if taken := sorted({"base", "aligned"} & set(self.serve.adapters)):
            raise ValueError(f"serve.adapters names {taken[0]!r}, which is a model of the run: give it another name")
        return self

    @model_validator(mode="after")
    def _window_holds_longest(self) -> RunConfig:
        window = self.model.rope.window
        if window is not None and window < self.data.max_length:
            raise ValueError(
                f"model.rope.window = {window} is below data.max_length = {self.data.max_length}: raise the window or "
                f"set data.max_length <= {window}"
            )
        return self


def tree_of_first(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings that `before` describes, of a recipe as a tree of sections."""

    def merged(whole: dict[str, Any], part: dict[str, Any]) -> dict[str, Any]:
        both = {
            key: merged(whole[key], value) if isinstance(whole.get(key), dict) and isinstance(value, dict) else value
            for key, value in part.items()
        }
        return whole | both

    rest = {key: value for key, value in tree.items() if key != "before"}
    before = tree["before"]
    replaced = {key: {} for key in ("corpus", "mixture") if key in before}
    place = {"run_dir": f"{tree['run_dir']}/before"} if "run_dir" in tree else {}
    return merged(rest | replaced, before) | place
