"""How a model is trained, and what is written of it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, field_validator, model_validator

from longalign_ray.config.section import Count, Fraction, Section, whole_or_range


class AdapterConfig(Section):
    """LoRA: the model's weights are frozen, and a product of two small matrices is trained beside each (needs the extra
    `lora`)."""

    rank: PositiveInt = 16
    """Columns of the first matrix and rows of the second."""
    alpha: PositiveFloat = 32
    """The product is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of an adapter's inputs that is dropped. Above 0, a resumed run is not bitwise the undisturbed one."""
    target_modules: tuple[str, ...] = ()
    """Names of the linear layers that get one, such as q_proj; empty: all but the head."""
    quantize: Literal["none", "4bit"] = "none"
    """`4bit`: the frozen weights of linear layers but the head are held in 4 bits (QLoRA, arXiv 2305.14314; needs the
    extra `qlora`), and the export adds the adapter to the model as it was. Tried on CPUs alone."""


class TrainConfig(Section):
    """The optimizer run. Defaults are those of the LongAlign paper (section 4.1)."""

    num_workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 2
    """Training ranks, one device each. `[fewest, most]`: as many as the cluster has room for; when that changes, Ray
    Train goes on from the last checkpoint with the new number."""
    sp_degree: PositiveInt = 1
    """Ranks that share a pack by sequence parallelism. Each holds up to packing.capacity tokens of it, so an example
    may have sp_degree * capacity. Divides num_workers; best a divisor of the model's attention heads as well."""
    cpus_per_worker: PositiveInt = 1
    """Logical CPUs of a rank; on a CPU-only machine also its number of threads."""
    use_gpu: bool = False
    """One GPU a rank."""
    zero_stage: Literal[0, 1, 2, 3] = 3
    """DeepSpeed ZeRO stage. Of a model in bfloat16, 2 and 3 add the gradients of micro-steps up in float32, and 0 and 1
    in bfloat16: an error of 0.7 % over 16 micro-steps, 3 % over 64."""
    offload_optimizer: bool = False
    """Keep the optimizer state in host memory; ZeRO 1 to 3."""
    offload_parameters: bool = False
    """Keep the weights in host memory, but for the layers at work; ZeRO 3."""
    offload_checkpoints: bool = False
    """Keep what gradient checkpointing saves of each layer in host memory."""
    tiled_mlp: bool = False
    """Compute MLPs a tile of tokens at a time, and once more in the backward pass: their memory then does not grow with
    the context."""
    epochs: PositiveInt = 1
    """Passes over the corpus; every epoch is planned anew by seed."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimizer steps even if epochs remain."""
    learning_rate: PositiveFloat = 2e-5
    """Peak learning rate."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps with a linearly rising rate; then cosine to `min_learning_rate`."""
    min_learning_rate: Annotated[float, Field(ge=0.0)] = 0.0
    """Rate at the last step."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW betas."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """AdamW weight decay."""
    max_grad_norm: PositiveFloat = 1.0
    """Global gradient norm is clipped to this."""
    loss: Literal["sequence", "token", "pack", "sqrt"] = "sequence"
    """`sequence`: every sequence counts equally (Eq. 2/4); `token`: every target token of the step does; `sqrt`: every
    sequence by the root of its targets; `pack`: every pack (Eq. 3, the paper's packing without weighting, to compare
    with: it favours long answers, and depends on how the examples were packed)."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass."""
    head_chunk: PositiveInt = 1_024
    """Target positions scored at a time by the loss head."""
    checkpoint_every: PositiveInt = 200
    """Optimizer steps between checkpoints; the last step always has one."""
    keep_checkpoints: PositiveInt = 2
    """Newest checkpoints kept."""
    keep_best: bool = False
    """Keep the checkpoint with the lowest held-out loss as well, and export that one. Needs a train.heldout_every that
    divides train.checkpoint_every."""
    checkpoint_storage: str | None = None
    """Directory of this run's checkpoints in an object store, s3://bucket/path or gs://bucket/path; none: in run_dir.
    A store that is not Amazon's or Google's own: see corpus.storage_endpoint."""
    async_checkpoint: bool = True
    """Training stands still only until a checkpoint is copied in the host's memory, which must hold the copy (up to 16
    bytes a trained weight over all ranks); false: until it is written to the local disk."""
    max_failures: Count = 2
    """Times a lost worker group is restarted from its last checkpoint."""
    adapter: AdapterConfig | None = None
    """Train a LoRA adapter in place of the weights; a learning rate ten times as high is usual."""
    heldout_every: Count | None = None
    """Optimizer steps between measurements of the held-out loss, by length; none: once, at the end; 0: never."""
    max_loss_ratio: Annotated[float, Field(gt=1.0)] | None = 5.0
    """The run stops when a step's loss is more than this many times the median of the last 50 steps, which counts as 1
    nat at least; null: only when it is no number. In a sound run of 282 steps none was above 1.1 times it, while a
    model that has lost everything has ln(vocabulary): 10.4 nats for 32,000 words."""
    sinks: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Trackers that get every row of metrics.jsonl as well, as TensorBoard always does; their own environment variables
    (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...) say where."""
    profile_steps: tuple[Count, Count] | None = None
    """First and last step, counted from 0 as in metrics.jsonl, that torch.profiler traces, into train/profile/."""

    @field_validator("profile_steps")
    @classmethod
    def _first_then_last(cls, value: tuple[int, int] | None) -> tuple[int, int] | None:
        if value is not None and value[0] > value[1]:
            raise ValueError(f"train.profile_steps = {list(value)} ends before it begins: give [first, last]")
        return value

    @model_validator(mode="after")
    def _something_to_offload(self) -> TrainConfig:
        wrong = []
        if self.offload_optimizer and self.zero_stage == 0:
            wrong.append("train.offload_optimizer = true needs ZeRO, and train.zero_stage = 0: set it to 1, 2 or 3")
        if self.offload_parameters and self.zero_stage < 3:
            wrong.append(
                f"train.offload_parameters = true needs weights in shards, and train.zero_stage = {self.zero_stage}: "
                "set it to 3"
            )
        if self.offload_checkpoints and not self.gradient_checkpointing:
            wrong.append("train.offload_checkpoints = true needs train.gradient_checkpointing = true, which makes them")
        if wrong:
            raise ValueError("; ".join(wrong))
        return self

    @model_validator(mode="after")
    def _best_is_measured(self) -> TrainConfig:
        every = self.heldout_every
        if self.keep_best and (not every or self.checkpoint_every % every):
            raise ValueError(
                f"train.keep_best = true needs the held-out loss at each checkpoint, and train.heldout_every = {every} "
                f"does not measure it there: set train.heldout_every={self.checkpoint_every}, or another divisor of "
                "train.checkpoint_every"
            )
        return self

    @field_validator("num_workers", mode="before")
    @classmethod
    def _some_ranks(cls, value: Any) -> Any:
        return whole_or_range("train.num_workers", value, of="ranks")

    @field_validator("checkpoint_storage")
    @classmethod
    def _in_a_bucket(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"(s3|gs)://[^/]+/.*[^/].*", value):
            raise ValueError(
                f"train.checkpoint_storage = {value!r}: give a directory in a bucket, s3://bucket/path or "
                "gs://bucket/path; without the setting the checkpoints are in run_dir"
            )
        return value

    @property
    def min_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def quantized(self) -> bool:
        return self.adapter is not None and self.adapter.quantize == "4bit"

    @property
    def max_workers(self) -> int:
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @model_validator(mode="after")
    def _whole_groups(self) -> TrainConfig:
        ranks, degree = self.max_workers, self.sp_degree
        if degree > 1 and not isinstance(self.num_workers, int):
            raise ValueError(
                f"train.sp_degree = {degree} needs a fixed number of ranks, and train.num_workers = "
                f"{list(self.num_workers)} lets it change: give one number, a multiple of {degree}"
            )
        if ranks % degree:
            divisors = ", ".join(str(d) for d in range(1, ranks + 1) if ranks % d == 0)
            raise ValueError(
                f"train.sp_degree = {degree} does not divide train.num_workers = {ranks}: set train.sp_degree to one "
                f"of {divisors}, or train.num_workers to a multiple of {degree}"
            )
        return self


class ExportConfig(Section):
    """The trained model in Hugging Face layout."""

    adapter: Literal["merged", "adapter"] = "merged"
    """Of a run with `train.adapter`: a plain model with the adapter merged into its weights, or the adapter alone. peft
    loads that beside the base model and its tokenizer, and `serve` computes both from one copy of the weights."""
