"""The endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, field_validator, model_validator

from longalign_ray.config.section import Count, Section, key_place, whole_or_range


class ServeConfig(Section):
    """The OpenAI-compatible endpoint."""

    host: str = "127.0.0.1"
    """Address to bind; 0.0.0.0 is open to other machines, and then api_keys should be set."""
    api_keys: Annotated[str | None, key_place("serve.api_keys")] = None
    """Where the keys are that clients may send, `env:NAME` or `file:PATH`, separated by white space; never a key
    itself. Without, every client is answered. /health needs no key."""
    port: Annotated[int, Field(ge=1, le=65_535)] = 8_000
    """Port to bind."""
    num_replicas: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Replicas of each model; as [fewest, most] their number follows the load, upwards within about 30 s."""
    target_ongoing_requests: PositiveInt = 8
    """With [fewest, most]: requests under way or waiting for which there shall be a replica."""
    busy_seconds: PositiveInt = 10
    """With [fewest, most]: how long more replicas must have been wanted before they are started."""
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
    vllm_args: dict[str, Any] = Field(default_factory=dict)
    """Further settings of vLLM's engine by vLLM's own names, such as gpu_memory_utilization."""
    adapters: dict[str, str] = Field(default_factory=dict)
    """LoRA adapters served as further models over one copy of the weights of `base`, {name: directory}, each as peft or
    `export.adapter=adapter` writes it. Those of a batch are computed together."""
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
    """A replica that has requests and has computed no token for so long is replaced. vLLM does not tell of a prompt's
    chunks: with it, more than the longest prompt takes."""
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
        return whole_or_range("serve.num_replicas", value, of="replicas")

    @property
    def min_replicas(self) -> int:
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[0]

    @property
    def max_replicas(self) -> int:
        return self.num_replicas if isinstance(self.num_replicas, int) else self.num_replicas[1]
