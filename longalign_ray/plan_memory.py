"""The memory part of `longalign plan`: bytes by term, the longest context, the levers that hold it, and the time."""

from __future__ import annotations

import argparse
import dataclasses
import os
from dataclasses import dataclass, replace
from typing import Any

from longalign_ray.config import RunConfig
from longalign_ray.data.cost import SequenceCost
from longalign_ray.data.make_plan import PlanSettings
from longalign_ray.data.plan_score import PlanScore
from longalign_ray.errors import ConfigError
from longalign_ray.train.memory import (
    LADDER,
    USABLE,
    Levers,
    MemoryTerms,
    cheapest_levers,
    longest_context,
    memory_terms,
    sp_degrees,
    with_levers,
)
from longalign_ray.train.model_shape import ModelShape
from longalign_ray.train.step_time import StepSeconds, step_seconds

SETTINGS = {
    "tiled_mlp": "tiled_mlp",
    "checkpoints_on_host": "offload_checkpoints",
    "optimizer_on_host": "offload_optimizer",
    "parameters_on_host": "offload_parameters",
}
"""The setting in the recipe's `train` section that a lever is."""
HOST_MEMORY_GB = 1_800.0
"""Of a machine with eight GPUs, when nothing is said."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """All that is told about the memory of a plan."""

    shape: ModelShape
    levers: Levers
    terms: MemoryTerms
    tokens_per_rank: int
    gpu_bytes: float
    host_bytes: float

    @property
    def room(self) -> dict[str, float]:
        return {"gpu_bytes": self.gpu_bytes, "host_bytes": self.host_bytes}

    @property
    def rungs(self) -> list[tuple[str, Levers]]:
        """No lever, the first, the first two, ..., then higher sp degrees alone, each with what it is called.

        On a CPU those that move bytes to the host move nothing.
        """
        names = LADDER if self.levers.on_gpu else LADDER[:1]
        if self.levers.zero_stage < 3:
            names = names[:3] if self.levers.zero_stage else names[:2]
        alone = with_levers(self.levers, ())
        rungs = [("no lever", alone)]
        rungs += [(f"+ {_words(names[n - 1 : n])}", with_levers(alone, names[:n])) for n in range(1, len(names) + 1)]
        degrees = sp_degrees(self.shape, self.levers)[1:]
        return rungs + [(f"sp degree {degree} alone", replace(alone, sp_degree=degree)) for degree in degrees]

    def under(self, levers: Levers) -> MemoryTerms:
        """Of packs as long as the plan's, under other levers."""
        tokens = self.tokens_per_rank * self.levers.sp_degree / levers.sp_degree
        return memory_terms(self.shape, tokens_per_rank=tokens, levers=levers)

    def cheapest(self) -> Levers | None:
        return cheapest_levers(self.shape, self.levers, tokens_per_rank=self.tokens_per_rank, **self.room)

    def zero_1(self) -> MemoryTerms:
        return self.under(replace(self.levers, zero_stage=1, parameters_on_host=False))


@dataclass(frozen=True, slots=True)
class Times:
    """Of an optimizer step on average; `longest_over_step` is the time of the longest sequence alone over it."""

    step: StepSeconds
    gpu_hours: float
    longest_tokens: int
    longest_over_step: float


def levers_of_recipe(config: RunConfig) -> Levers:
    """The levers that the trainer will use. Raises ConfigError where the recipe's ZeRO stage does not have them."""
    on_gpu, own, dtype = config.train.use_gpu, config.train, config.model.dtype
    if dtype == "auto":
        from longalign_ray.precision import resolve_dtype

        dtype = resolve_dtype(dtype, use_gpu=on_gpu)
    levers = Levers(
        ranks=own.max_workers,
        zero_stage=own.zero_stage,
        gradient_checkpointing=own.gradient_checkpointing,
        head_chunk=own.head_chunk,
        async_checkpoint=own.async_checkpoint,
        weight_bytes=4 if dtype == "float32" else 2,
        on_gpu=on_gpu,
    )
    return with_levers(levers, [name for name in LADDER if getattr(own, SETTINGS[name])])


def forecast(shape: ModelShape, levers: Levers, settings: PlanSettings, arguments: argparse.Namespace) -> Forecast:
    """For full packs on the plan's world. Raises ConfigError with all that the command line says wrongly."""
    sizes = {"--gpu-memory": arguments.gpu_memory, "--host-memory": arguments.host_memory}
    wrong = [
        f"{o} = {value:g}: give a size above 0" for o, value in sizes.items() if value is not None and not value > 0
    ]
    if arguments.gpus_per_node is not None and arguments.gpus_per_node < 1:
        wrong.append(f"--gpus-per-node = {arguments.gpus_per_node}: give 1 or more")
    if wrong:
        raise ConfigError("\n".join(wrong))
    changed: dict[str, Any] = {"ranks": settings.world_size, "sp_degree": settings.sp_degree}
    changed["micro_steps"] = settings.micro_steps
    changed["ranks_per_node"] = arguments.gpus_per_node or (8 if levers.on_gpu else settings.world_size)
    if arguments.zero is not None:
        changed["zero_stage"] = arguments.zero
    if arguments.on_host is not None:
        changed |= {f"{name}_on_host": name in arguments.on_host for name in ("checkpoints", "optimizer", "parameters")}
    levers = replace(levers, **changed)
    host_memory = arguments.host_memory or (HOST_MEMORY_GB if levers.on_gpu else _own_memory_gb())
    return Forecast(
        shape=shape,
        levers=levers,
        terms=memory_terms(shape, tokens_per_rank=settings.capacity, levers=levers),
        tokens_per_rank=settings.capacity,
        gpu_bytes=arguments.gpu_memory * 1e9,
        host_bytes=host_memory * 1e9,
    )


def times(
    made: Forecast, score: PlanScore, settings: PlanSettings, *, cost: SequenceCost, longest: int, tflops: float
) -> Times:
    """From the score of the plan and the longest sequence in it."""
    room = settings.capacity * settings.sp_degree
    tokens = score.utilisation * score.num_packs * room / settings.world_size / score.num_steps
    compute = 3_600 * score.hours / score.num_steps
    step = step_seconds(
        made.shape, made.levers, compute_seconds=compute, tokens_per_rank=tokens, micro_steps=settings.micro_steps
    )
    alone = (cost.linear * longest + cost.quadratic * longest**2) / settings.sp_degree / (tflops * 1e12)
    return Times(
        step=step,
        gpu_hours=step.total * score.num_steps * settings.world_size / 3_600,
        longest_tokens=longest,
        longest_over_step=alone / (compute / score.time_over_ideal),
    )


def as_json(made: Forecast, took: Times | None) -> dict[str, Any]:
    """The same in bytes and seconds."""
    terms = {name: value for name, value in dataclasses.asdict(made.terms).items() if name != "levers"}
    zero_1, cheapest = made.zero_1(), made.cheapest()
    told: dict[str, Any] = {
        "model": {**dataclasses.asdict(made.shape), "parameters": made.shape.parameters},
        "levers": dataclasses.asdict(made.levers),
        "tokens_per_rank": made.tokens_per_rank,
        "terms": terms,
        "rank_bytes": made.terms.rank,
        "node_bytes": made.terms.node,
        "fits": made.terms.fit(**made.room),
        "longest_context": longest_context(made.shape, made.levers, **made.room),
        "cheapest_levers": cheapest and _names(cheapest),
        "cheapest_sp_degree": cheapest and cheapest.sp_degree,
        "zero_1": {"rank_bytes": zero_1.rank, "fits": zero_1.fit(**made.room)},
    }
    if took is not None:
        told |= {
            "step_seconds": {**dataclasses.asdict(took.step), "total": took.step.total},
            "gpu_hours": took.gpu_hours,
            "longest_sequence": took.longest_tokens,
            "longest_over_step": took.longest_over_step,
        }
    return told


def as_text(made: Forecast, took: Times | None, tflops: float) -> str:
    """The part that follows the table of the plan."""
    parts = [_terms(made), _ladder(made), _zero_1(made)]
    if took is not None:
        parts.append(_time(made, took, tflops))
    return "\n\n".join(parts)


def _terms(made: Forecast) -> str:
    levers, terms = made.levers, made.terms
    unit = "GPU" if levers.on_gpu else "process"
    largest = "attention + MLP" if terms.working > max(terms.attention, terms.mlp, terms.head) else "the largest"
    rows = [
        ("parameters", terms.parameters, terms.host_parameters),
        ("gradients", terms.gradients, 0.0),
        ("optimizer", terms.optimizer, terms.host_optimizer),
        ("gathered layers", terms.gathered, 0.0),
        ("checkpoints" if levers.gradient_checkpointing else "activations", terms.checkpoints, terms.host_checkpoints),
        ("one layer's attention", terms.attention, 0.0),
        ("one layer's MLP", terms.mlp, 0.0),
        ("head", terms.head, 0.0),
        ("fixed", terms.fixed, 0.0),
        ("copy of a checkpoint", 0.0 if levers.on_gpu else terms.host_copy, terms.host_copy),
    ]
    head = (
        f"Memory, forecast in GB for {made.tokens_per_rank:,} tokens a rank: {made.shape.parameters / 1e9:.2f} billion "
        f"parameters, ZeRO-{levers.zero_stage}, {levers.ranks} ranks, {levers.ranks_on_node} a node"
    )
    lines = [f"{'':<22} {unit:>8}" + (f" {'host, a rank':>13}" if levers.on_gpu else "")]
    for name, on_device, on_host in rows:
        host = f" {on_host / 1e9:>13.2f}" if levers.on_gpu else ""
        lines.append(f"{name:<22} {on_device / 1e9:>8.2f}{host}")
    fits = "fits" if terms.fit(**made.room) else "DOES NOT FIT"
    of_card = f" of {USABLE * made.gpu_bytes / 1e9:.1f} on a card" if levers.on_gpu else ""
    total = (
        f"{fits}: {terms.rank / 1e9:.2f} a {unit}{of_card}, {terms.node / 1e9:,.1f} of {made.host_bytes / 1e9:,.1f} "
        f"of host memory a node. Of attention, MLP and head {largest} counts."
    )
    return f"{head}\n\n" + "\n".join(lines) + f"\n\n{total}"


def _ladder(made: Forecast) -> str:
    levers = made.levers
    lines = [f"{'levers':<24} {'GB a rank':>9} {'GB a node':>10} {'longest pack':>13}"]
    for name, tried in made.rungs:
        terms, longest = made.under(tried), longest_context(made.shape, tried, **made.room)
        most = f"{longest:,}" if longest else "-"
        lines.append(f"{name:<24} {terms.rank / 1e9:>9.2f} {terms.node / 1e9:>10.1f} {most:>13}")
    own = longest_context(made.shape, levers, **made.room)
    cheapest = made.cheapest()
    found = "no set of levers" if cheapest is None else _words(_names(cheapest))
    if cheapest is not None and cheapest.sp_degree > levers.sp_degree:
        found = f"sp degree {cheapest.sp_degree}, {found}"
    notes = [
        f"Longest pack with the levers as set ({_words(_names(levers))}): {own:,} tokens on {levers.sp_degree} ranks. "
        f"Cheapest that holds packs of {made.tokens_per_rank * levers.sp_degree:,} tokens: {found}."
    ]
    written = replace(levers, async_checkpoint=False)
    if cheapest is None and replace(made, levers=written).cheapest() is not None:
        notes.append("With train.async_checkpoint=false, which copies no checkpoint to the host, there is one.")
    if made.shape.heads % levers.sp_degree:
        notes.append(f"{levers.sp_degree} ranks do not divide the {made.shape.heads} heads: that needs a ring.")
    return "\n".join(lines) + "\n\n" + "\n".join(notes)


def _zero_1(made: Forecast) -> str:
    terms = made.zero_1()
    if terms.fit(**made.room):
        return f"ZeRO-1 fits ({terms.rank / 1e9:.2f} GB a rank): ranks then meet once a step, so sums can be balanced."
    return f"ZeRO-1 does not fit ({terms.rank / 1e9:.2f} GB a rank): ranks meet in every micro-step."


def _time(made: Forecast, took: Times, tflops: float) -> str:
    recomputed = " and recomputation" if made.levers.gradient_checkpointing else ""
    ring = f"{took.step.ring:,.2f} ring, " if took.step.ring else ""
    lines = [
        f"A step takes {took.step.total:,.2f} s ({took.step.compute:,.2f} forward, backward{recomputed} at {tflops:g} "
        f"TFLOP/s a rank, {took.step.all_to_all:,.2f} all-to-all, {ring}{took.step.overhead:,.2f} fixed; all assumed), "
        f"the run {took.gpu_hours:,.2f} {'GPU' if made.levers.on_gpu else 'rank'} hours. Updates and transfers to the "
        "host are not counted."
    ]
    if took.longest_over_step > 1:
        lines.append(
            f"The longest sequence ({took.longest_tokens:,} tokens) alone takes {took.longest_over_step:.2f} times "
            f"the work of a mean step on its {made.levers.sp_degree} ranks, and the others wait: more micro-steps or "
            "more ranks a pack help."
        )
    return "\n".join(lines)


def _names(levers: Levers) -> tuple[str, ...]:
    return tuple(name for name in LADDER if getattr(levers, name))


def _words(names: tuple[str, ...]) -> str:
    return ", ".join(name.replace("_", " ").replace("mlp", "MLP") for name in names) or "no lever"


def _own_memory_gb() -> float:
    """Of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
