"""What stands beside DeepSpeed's shards in a checkpoint, and the export to Hugging Face layout."""

from __future__ import annotations

import dataclasses
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from longalign_ray.config import AdapterConfig, RopeConfig
from longalign_ray.errors import CheckpointError, PlanMismatchError
from longalign_ray.run_dir import write_json
from longalign_ray.train.engine import TAG, quiet_deepspeed, unreadable
from longalign_ray.train.failures import Kind, kind_of
from longalign_ray.train.rope import model_config

STATE_FILE = "state.json"


FORMATS = {0: 0, 1: 1, 2: 1, 3: 3}  # by ZeRO stage: how DeepSpeed lays out its shards


@dataclass(frozen=True, slots=True)
class TrainState:
    """Where a run stands: `step` optimizer steps are done. The plan says which data that was."""

    step: int
    tokens_seen: int
    plan_digest: str
    world_size: int
    zero_stage: int
    heldout_loss: float | None = None
    """Measured after this step, if it was."""
    model_digest: str | None = None
    """Of the model that was trained (`model.model_digest`); older checkpoints have none."""

    def save(self, directory: Path) -> None:
        write_json(directory / STATE_FILE, dataclasses.asdict(self))

    @staticmethod
    def parse(text: str | bytes) -> TrainState:
        """Raises ValueError or TypeError where the text is no state."""
        return TrainState(**json.loads(text))

    @staticmethod
    def load(directory: Path) -> TrainState:
        """Raises CheckpointError where the directory holds no finished checkpoint."""
        try:
            return TrainState.parse((directory / STATE_FILE).read_bytes())
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory} is no finished checkpoint ({error}); remove it") from error

    def check(self, *, plan_digest: str, zero_stage: int, model_digest: str | None = None) -> None:
        """Raises where the checkpoint cannot continue this run, on however many ranks; no digest: of any model."""
        if self.plan_digest != plan_digest:
            raise PlanMismatchError(
                f"the checkpoint of step {self.step} belongs to plan {self.plan_digest}, the recipe now makes plan "
                f"{plan_digest}: restore the data settings, or start anew in another run_dir"
            )
        if None not in (model_digest, self.model_digest) and self.model_digest != model_digest:
            raise CheckpointError(
                f"the checkpoint of step {self.step} belongs to another model ({self.model_digest}; model.path now has "
                f"{model_digest}): its parameters have other names or shapes, or its config.json other attention "
                "settings. Restore the model that was trained, or start anew in another run_dir"
            )
        if FORMATS[self.zero_stage] != FORMATS[zero_stage]:
            raise CheckpointError(
                f"the checkpoint of step {self.step} was written with ZeRO-{self.zero_stage}, which cannot be turned "
                f"into ZeRO-{zero_stage}: set train.zero_stage={self.zero_stage}, or start anew in another run_dir"
            )

    def fits(self, *, world_size: int, zero_stage: int) -> bool:
        """Whether DeepSpeed can load the shards as they are, without a conversion."""
        return zero_stage == 0 or (self.world_size, self.zero_stage) == (world_size, zero_stage)


def export_model(
    checkpoint_dir: Path,
    base_model_dir: Path,
    output_dir: Path,
    *,
    dtype: str,
    rope: RopeConfig | None = None,
    adapter: AdapterConfig | None = None,
    form: Literal["merged", "adapter"] = "merged",
) -> int:
    """Writes the weights of a checkpoint as a Hugging Face directory with the base model's tokenizer.

    Returns the number of parameters. The fp32 master weights are rounded once, to `dtype`; the configuration carries
    the `rope` that was trained with. An adapter is merged into the base model, or by `form` written alone in peft's
    layout, to be loaded with the base model and its tokenizer.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from longalign_ray.precision import DTYPES
    from longalign_ray.train.adapters import load_adapter

    disable_progress_bar()
    quiet_deepspeed()
    weights = _trained_weights(checkpoint_dir)
    model = AutoModelForCausalLM.from_pretrained(
        str(base_model_dir), config=model_config(base_model_dir, rope), dtype=DTYPES[dtype]
    )
    if adapter is not None:
        model = load_adapter(model, weights, adapter, form=form)
    else:
        _load_weights(model, weights, checkpoint_dir, base_model_dir)
    model.save_pretrained(output_dir)
    if form == "merged":  # beside a tokenizer peft would cut the base model's vocabulary down to it
        AutoTokenizer.from_pretrained(str(base_model_dir)).save_pretrained(output_dir)
    return model.num_parameters()


def _trained_weights(checkpoint_dir: Path) -> dict[str, Any]:
    """By the names of the Hugging Face model, in fp32. Raises CheckpointError where the shards cannot be read."""
    import torch

    whole = TrainState.load(checkpoint_dir).zero_stage == 0
    try:
        if whole:
            file = checkpoint_dir / TAG / "mp_rank_00_model_states.pt"
            weights: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False)["module"]
        else:
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # it prints its progress
                weights = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint_dir), tag=TAG) or {}
    except Exception as error:  # DeepSpeed and torch raise whatever comes
        if kind_of(error) is not Kind.OTHER:
            raise
        raise unreadable(checkpoint_dir, error) from error
    prefix = "model."  # the wrapper PackedLM holds the Hugging Face model under this name
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}


def _load_weights(model: Any, weights: dict[str, Any], checkpoint_dir: Path, base_model_dir: Path) -> None:
    """Copies and rounds all weights into the model."""
    try:
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise CheckpointError(
            f"{checkpoint_dir} does not fit the model {base_model_dir} ({error}); export with the model.path that was "
            "trained"
        ) from error
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    if unexpected or set(missing) - tied:
        raise CheckpointError(
            f"{checkpoint_dir} does not fit the model {base_model_dir}: missing {sorted(set(missing) - tied)[:3]}, "
            f"unexpected {sorted(unexpected)[:3]}; export with the model.path that was trained"
        )
