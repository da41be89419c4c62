"""What a training rank needs in memory, term by term, before a GPU is rented: arithmetic on shapes, nothing else.

The coefficients of attention and the margin were adjusted on nine published peaks (8B to 70B, 1 to 64 GPUs, ZeRO-3),
which they meet within 10 % with the head of those runs in place of ours: tests/unit/train/test_memory.py holds them to
those, and tests/integration/test_memory.py all of it to measured peaks on a CPU.
Letters: N parameters, L layers, h hidden width, a query width, kv key/value width, f MLP width, V vocabulary, R ranks,
P ranks that share a pack, t tokens of a pack on one rank, w bytes of a weight (2 for bfloat16, 4 for float32).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from itertools import compress, product

from longalign_ray.errors import ConfigError
from longalign_ray.train.model_shape import ModelShape

GPU_FIXED = 8e9
"""Bytes of the CUDA context, communication buffers and fragments."""
CPU_FIXED = 0.68e9
"""Bytes of a Ray worker that has loaded torch, transformers, DeepSpeed and the data reader."""
GPU_MARGIN = 1.045
USABLE = 75 / 80
"""Share of a card that a forecast may fill."""
CPU_ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": str(2**22), "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
"""Environment of a training process on a CPU. glibc keeps freed blocks below 32 MB in a heap that fragments: at 16,384
tokens of a 34M model the peak was 1.42 times the forecast without and 1.0 times with it, in no more CPU time."""
LADDER = ("tiled_mlp", "checkpoints_on_host", "optimizer_on_host", "parameters_on_host")
"""Levers by what they cost in time, cheapest first."""
GRANULARITY = 1_024
"""Tokens a rank by which the longest context is found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Levers:
    """Everything beside the model and the tokens that memory depends on. Raises ConfigError with all that is wrong."""

    ranks: int = 8
    ranks_per_node: int = 8
    sp_degree: int = 1
    """P: ranks that share a pack."""
    zero_stage: int = 3
    micro_steps: int = 1
    """Over several, ZeRO-2 and 3 add bfloat16 gradients up in float32."""
    gradient_checkpointing: bool = True
    head_chunk: int = 1_024
    """Positions whose logits exist at a time."""
    tiled_mlp: bool = False
    """The MLP runs over h tokens at a time."""
    checkpoints_on_host: bool = False
    optimizer_on_host: bool = False
    parameters_on_host: bool = False
    async_checkpoint: bool = False
    """Checkpoints are copied in host memory before they are written."""
    weight_bytes: int = 2
    on_gpu: bool = True
    """Otherwise all is in host memory, and what `..._on_host` says makes no difference."""

    def __post_init__(self) -> None:
        counts = ("ranks", "ranks_per_node", "sp_degree")
        wrong = [f"{name} = {getattr(self, name)}: give 1 or more" for name in counts if getattr(self, name) < 1]
        if not wrong and self.ranks % self.sp_degree:
            wrong.append(f"sp_degree = {self.sp_degree} does not divide ranks = {self.ranks}: give a divisor")
        if self.zero_stage not in (0, 1, 2, 3):
            wrong.append(f"zero_stage = {self.zero_stage}: give 0, 1, 2 or 3")
        if self.optimizer_on_host and self.zero_stage < 1:
            wrong.append(f"the optimizer on the host needs ZeRO stage 1 to 3, and zero_stage = {self.zero_stage}")
        if self.parameters_on_host and self.zero_stage < 3:
            wrong.append(f"parameters on the host need ZeRO stage 3, and zero_stage = {self.zero_stage}")
        if wrong:
            raise ConfigError("\n".join(wrong))

    @property
    def ranks_on_node(self) -> int:
        return min(self.ranks, self.ranks_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryTerms:
    """Bytes by term, of one rank; those that begin with `host_` lie in the memory of its node."""

    parameters: float
    gradients: float
    optimizer: float
    gathered: float
    """Whole layers and the head, which ZeRO-3 gathers for their computation."""
    checkpoints: float
    """What the forward pass keeps for the backward pass."""
    attention: float
    """Of one layer in its backward pass, as is `mlp`; of these and `head` only the largest exists at a time."""
    mlp: float
    head: float
    fixed: float
    host_parameters: float
    host_optimizer: float
    host_checkpoints: float
    host_copy: float
    """Of what a checkpoint stores. What rank 0 alone copies is divided over the ranks of its node."""
    levers: Levers

    @property
    def working(self) -> float:
        """The most that is computed with at a time.

        On a CPU a recomputed layer was seen to hold its attention and its MLP together, unless the MLP is tiled.
        """
        both = not self.levers.on_gpu and not self.levers.tiled_mlp
        return max(self.attention + self.mlp if both else max(self.attention, self.mlp), self.head)

    @property
    def rank(self) -> float:
        """Bytes on the device of a rank, margin included; on a CPU of its process."""
        resident = self.parameters + self.gradients + self.optimizer + self.gathered + self.checkpoints + self.fixed
        if not self.levers.on_gpu:
            return resident + self.working + self.host_copy
        return GPU_MARGIN * (resident + self.working)

    @property
    def node(self) -> float:
        """Bytes of host memory on a node."""
        host = self.host_parameters + self.host_optimizer + self.host_checkpoints + self.host_copy
        return self.levers.ranks_on_node * (host if self.levers.on_gpu else self.rank)

    def fit(self, *, gpu_bytes: float, host_bytes: float) -> bool:
        """Whether a card holds a rank and a node holds what its ranks keep there."""
        on_card = not self.levers.on_gpu or self.rank <= USABLE * gpu_bytes
        return on_card and self.node <= host_bytes


def memory_terms(shape: ModelShape, *, tokens_per_rank: float, levers: Levers) -> MemoryTerms:
    """Bytes by term for t = `tokens_per_rank` tokens of a pack on each rank.

    ZeRO: the optimizer (12N: fp32 weights and two moments) is divided by R from stage 1 on, the gradients (w N; 4N to
    add up several micro-steps) from stage 2 on, the parameters (w N) in stage 3, which alone gathers. So stage 1 needs
    2wN + 12N/R. Stage 0 in float32 updates the weights themselves: 8N. An optimizer on the host takes 16N/R there (fp32
    gradients too) and, from stage 2 on, the gradients along; parameters on the host take w N/R.

    A checkpoint stores the optimizer, from stage 1 on a rank's part each, and up to stage 2 the weights, of rank 0.

    The head runs with all checkpoints alive. The logits of a chunk are in fp32, and so is the gradient of its weight:
    4 V (chunk + h). Beside them is, in bfloat16, the rounded gradient of the logits while a product of the size of the
    weight is added to the other one, which backward rounds as well: 2 V (chunk + h) more. The last norm keeps its input
    in fp32 and its result, from which come its output, the states of the targets and their gradient, 4wht at most, as
    every token may be a target: together (4 + 4w) h t.

    Without gradient checkpointing every layer keeps w(3a + 2kv) t of its attention, 4wf t of its MLP and 12 h t of the
    norm before each, and its backward pass needs that much less; seen on a CPU only.
    """
    t, w, n, ranks = tokens_per_rank, levers.weight_bytes, shape.parameters, levers.ranks
    h, a, kv, f, stage = shape.hidden, shape.width, shape.kv_width, shape.mlp, levers.zero_stage
    parameters = w * n / (ranks if stage == 3 else 1)
    gradients = (4 if levers.micro_steps > 1 else w) * n / ranks if stage >= 2 else w * n
    optimizer = 12 * n / ranks if stage >= 1 else (8 if w == 4 else 12) * n
    kept_attention = kept_mlp = 0.0
    if not levers.gradient_checkpointing:
        kept_attention, kept_mlp = (w * (3 * a + 2 * kv) + 12 * h) * t, (4 * w * f + 12 * h) * t
    whole = (w * n if stage < 3 else 0) + (optimizer if stage == 0 else 0)
    copy = whole / levers.ranks_on_node + (optimizer if stage else 0)
    checkpoints = shape.layers * ((kept_attention + kept_mlp) or w * h * t)
    optimizer_off = levers.optimizer_on_host and levers.on_gpu
    parameters_off = levers.parameters_on_host and levers.on_gpu
    checkpoints_off = levers.checkpoints_on_host and levers.on_gpu
    gathered_kv = 2 * kv * max(1, levers.sp_degree / shape.kv_heads)  # heads are repeated until each rank has one
    norms = 4 * w * h * t
    attention = (w * (7 * a + 2 * kv + gathered_kv) + (8 * a if shape.qk_norm else 0)) * t + norms
    mlp = 5 * w * f * (min(t, h) if levers.tiled_mlp else t) + norms
    head = (4 if w == 4 else 4 + w) * shape.vocabulary * (min(t, levers.head_chunk) + h) + (4 + 4 * w) * h * t
    return MemoryTerms(
        parameters=0 if parameters_off else parameters,
        gradients=0 if optimizer_off and stage >= 2 else gradients,
        optimizer=0 if optimizer_off else optimizer,
        gathered=w * (2 * shape.layer_parameters + shape.vocabulary * h) if stage == 3 else 0,
        checkpoints=0 if checkpoints_off else checkpoints,
        attention=max(attention - kept_attention, 0.0),
        mlp=max(mlp - kept_mlp, 0.0),
        head=head,
        fixed=GPU_FIXED if levers.on_gpu else CPU_FIXED,
        host_parameters=parameters if parameters_off else 0,
        host_optimizer=16 * n / ranks if optimizer_off else 0,
        host_checkpoints=checkpoints if checkpoints_off else 0,
        host_copy=copy if levers.async_checkpoint else 0,
        levers=levers,
    )


def longest_context(shape: ModelShape, levers: Levers, *, gpu_bytes: float, host_bytes: float) -> int:
    """Most tokens of one pack, over its P ranks, that card and host hold: a multiple of P * GRANULARITY; 0 for none."""

    def fits(units: int) -> bool:
        terms = memory_terms(shape, tokens_per_rank=units * GRANULARITY, levers=levers)
        return terms.fit(gpu_bytes=gpu_bytes, host_bytes=host_bytes)

    above = 1
    while fits(above):
        above *= 2
    fitting = above // 2  # fits, or is 0
    while above - fitting > 1:
        middle = (above + fitting) // 2
        fitting, above = (middle, above) if fits(middle) else (fitting, middle)
    return fitting * GRANULARITY * levers.sp_degree


def cheapest_levers(
    shape: ModelShape, levers: Levers, *, tokens_per_rank: int, gpu_bytes: float, host_bytes: float
) -> Levers | None:
    """`levers` with those of LADDER that hold packs of this length at the least cost, whatever it says of them.

    A lever costs more than all before it together, so the sets are tried in the order of binary numbers; each with the
    degrees of sequence parallelism from the least up, which cost less than any lever. None: no set holds them.
    """
    for chosen in product((False, True), repeat=len(LADDER)):  # the last of LADDER is the highest digit
        for degree in sp_degrees(shape, levers):
            try:
                tried = replace(with_levers(levers, tuple(compress(LADDER, reversed(chosen)))), sp_degree=degree)
            except ConfigError:  # a lever that this ZeRO stage does not have
                continue
            terms = memory_terms(shape, tokens_per_rank=tokens_per_rank * levers.sp_degree / degree, levers=tried)
            if terms.fit(gpu_bytes=gpu_bytes, host_bytes=host_bytes):
                return tried
    return None


def sp_degrees(shape: ModelShape, levers: Levers) -> list[int]:
    """The degree as set, then the higher ones that need no ring and stay in a node, where the all-to-all is fast."""
    inside = range(levers.sp_degree + 1, levers.ranks_on_node + 1)
    return [levers.sp_degree, *(degree for degree in inside if not (levers.ranks % degree or shape.heads % degree))]


def with_levers(levers: Levers, names: Collection[str]) -> Levers:
    """`levers` with exactly these of LADDER. Raises ConfigError where the ZeRO stage does not have one of them."""
    return replace(levers, **{name: name in names for name in LADDER})
