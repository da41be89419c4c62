"""DeepSpeed: the one place that knows its configuration and what its backward pass divides by."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import distributed as dist

from longalign_ray.config import TrainConfig
from longalign_ray.errors import CheckpointError
from longalign_ray.train.batch import PackedBatch
from longalign_ray.train.failures import Kind, kind_of
from longalign_ray.train.loss import backward_scale
from longalign_ray.train.model import PackedLM
from longalign_ray.train.sequence_parallel import check_model, join_groups
from longalign_ray.train.tiled_mlp import plain_mlps

if TYPE_CHECKING:
    from longalign_ray.train.async_checkpoint import CopyThenWrite

logger = logging.getLogger(__name__)

TAG = "deepspeed"  # sub-directory of a checkpoint that DeepSpeed fills


def deepspeed_config(
    config: TrainConfig, *, dtype: str, micro_steps: int, load_universal: bool = False
) -> dict[str, Any]:
    """The DeepSpeed configuration of a recipe; `load_universal`: it will load a converted checkpoint."""
    optimizer = {
        "lr": config.learning_rate,
        "betas": list(config.betas),
        "weight_decay": config.weight_decay,
        "torch_adam": not config.offload_optimizer,  # no compiler needed; offload wants DeepSpeed's CPU kernel
        "adam_w_mode": True,
    }
    # DeepSpeed's own bucket of 5e8 elements is a buffer of 2 GB in fp32; this one is a square of width 4,096.
    zero: dict[str, Any] = {"stage": config.zero_stage, "reduce_bucket_size": 2**24}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": config.use_gpu}
    if config.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.use_gpu}
    # By default bf16 gradients add up in bf16, so that those of later micro-steps lose their last bits: an error of
    # 0.7 % over 16 micro-steps and of 3 % over 64. ZeRO-0 refuses anything else, and ZeRO-1 would hold all of them in
    # fp32 on every rank.
    in_fp32 = dtype == "bfloat16" and config.zero_stage >= 2 and micro_steps > 1
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_steps,
        "gradient_clipping": config.max_grad_norm,
        "bf16": {"enabled": dtype == "bfloat16"},
        "data_types": {"grad_accum_dtype": "fp32" if in_fp32 else None},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": zero,
        "checkpoint": {"load_universal": load_universal},
        "steps_per_print": 10**9,
    }


def quiet_deepspeed() -> None:
    """Called before deepspeed is imported: names the device it would otherwise guess, and lowers its log level."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


def _import_deepspeed() -> Any:
    quiet_deepspeed()
    import deepspeed

    if not torch.cuda.is_available():
        # The shared-memory collectives would be compiled at the first run; gloo needs no compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed


@contextmanager
def sharded_loading(config: TrainConfig, *, dtype: str) -> Iterator[None]:
    """In ZeRO-3, a model that transformers loads in here is divided over the ranks weight by weight (collective).

    DeepSpeed would else move the whole of it to every GPU before it divides it: 141 GB of a 70B model in bf16. Rank 0
    reads the files, mapped into memory; every rank keeps its share of each weight. Without a process group: whole.
    """
    # 4-bit weights are divided once they are quantized
    if config.zero_stage < 3 or config.quantized or not dist.is_initialized():
        yield
        return
    _import_deepspeed()
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    loading = HfDeepSpeedConfig(deepspeed_config(config, dtype=dtype, micro_steps=1))
    try:
        yield
    finally:
        del loading  # transformers knows of it as long as it lives


class TrainEngine:
    """One rank of a data-parallel world under DeepSpeed. Needs an initialised process group.

    Ranks that share packs are data-parallel ranks to DeepSpeed, with a part of the loss each.
    """

    def __init__(
        self, model: PackedLM, config: TrainConfig, *, dtype: str, micro_steps: int, load_universal: bool = False
    ):
        deepspeed = _import_deepspeed()
        check_model(model.model.config, config.sp_degree)
        self.sequence_group = join_groups(config.sp_degree, num_heads=model.model.config.num_attention_heads)
        if config.tiled_mlp:
            # Gathered whole: ranks have packs of other lengths, and would gather another number of times.
            for mlp in plain_mlps(model):
                deepspeed.utils.set_z3_leaf_module(mlp, True)
        self._engine: Any = deepspeed.initialize(
            model=model,
            model_parameters=cast(Any, [p for p in model.parameters() if p.requires_grad]),  # hinted as a Module
            config=deepspeed_config(config, dtype=dtype, micro_steps=micro_steps, load_universal=load_universal),
            dist_init_required=False,
        )[0]
        if config.zero_stage == 0 and dtype == "bfloat16":
            _undo_first_step(self._engine.optimizer)
        self._copies: CopyThenWrite | None = None
        if config.async_checkpoint:
            from longalign_ray.train.async_checkpoint import CopyThenWrite

            self._engine.checkpoint_engine = self._copies = CopyThenWrite(self._engine._config)
        self._quantized = config.quantized
        self.world_size = dist.get_world_size()
        self.device = self._engine.device

    @property
    def module(self) -> PackedLM:
        return self._engine.module

    def forward_backward(self, batch: PackedBatch, *, step_total: float, last: bool) -> torch.Tensor:
        """Adds the gradient of one micro-step; returns this rank's share of the step's loss, detached.

        step_total: M of Eq. 4, or what else the step's weights sum to. `last` marks the last micro-step before `step`.
        DeepSpeed's backward would also divide by the accumulation steps, which `scale_wrt_gas=False` turns off.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        weighted_sum = self._engine(batch)
        self._engine.backward(weighted_sum * backward_scale(self.world_size, step_total), scale_wrt_gas=False)
        return weighted_sum.detach().float() / (step_total or 1.0)

    def step(self, learning_rate: float) -> float | None:
        """Clips, updates the weights and clears the gradients; returns the gradient norm before clipping.

        inf where it is not finite: DeepSpeed then updates nothing, or makes every weight a NaN. None: not told.
        """
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        own = self._whole_norm()
        self._engine.step()
        norm = own if own is not None else self._engine.get_global_grad_norm()
        if norm is None:
            return None
        norm = float(norm)
        return norm if 0 <= norm < math.inf else math.inf  # DeepSpeed has -1 for some that are not finite

    def _whole_norm(self) -> float | None:
        """Of the gradients of ZeRO-0 in fp32, which DeepSpeed does not tell: every rank has all of them, averaged."""
        if self._engine.zero_optimization_stage() or self._engine.bfloat16_enabled():
            return None
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(gradients).item()

    def full_gradient(self, parameter: torch.nn.Parameter) -> torch.Tensor | None:
        """The whole averaged gradient of a parameter between backward and step, in every ZeRO stage (collective)."""
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)

    def save(self, directory: Path) -> None:
        """Writes this rank's shards below `directory`/deepspeed (collective)."""
        self.begin_save(directory)()

    def begin_save(self, directory: Path) -> Callable[[], None]:
        """`save` up to where training may go on (collective); what it returns ends it, in any thread.

        Training goes on when the shards are copied, with `train.async_checkpoint=false` when they are written. The
        next one must not begin before this one has ended.
        """
        self._engine.save_checkpoint(str(directory), tag=TAG)
        return self._copies.write if self._copies else lambda: None

    def load(self, directory: Path) -> None:
        """Restores weights and optimizer. Raises CheckpointError where the shards are missing or unreadable."""
        try:
            # bitsandbytes writes more beside the frozen weights than it reads back
            loaded, _ = self._engine.load_checkpoint(str(directory), tag=TAG, load_module_strict=not self._quantized)
        except Exception as error:  # DeepSpeed and torch raise whatever comes
            if kind_of(error) is not Kind.OTHER:  # too little memory, or a peer that is gone
                raise
            raise unreadable(directory, error) from error
        if loaded is None:
            raise CheckpointError(f"{directory / TAG} holds no checkpoint that DeepSpeed can load; remove {directory}")


def unreadable(directory: Path, error: Exception) -> CheckpointError:
    """What to raise where shards are missing, damaged, or of another model."""
    return CheckpointError(
        f"the shards below {directory / TAG} cannot be loaded ({type(error).__name__}: {error}): restore the model and "
        f"the settings that wrote them, or remove {directory} to continue from the checkpoint before"
    )


def _undo_first_step(optimizer: Any) -> None:
    """For ZeRO-0 in bfloat16: DeepSpeed makes Adam's state by a step without gradients.

    It decays the weights once more, and counts for the bias correction: the first true update would be 0.74 of Adam's.
    """
    optimizer.optimizer.state.clear()
    for masters, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for master, weight in zip(masters, weights, strict=True):
            master.data.copy_(weight.data)


def all_reduce_sum(value: torch.Tensor) -> torch.Tensor:
    """The sum over ranks, in place."""
    dist.all_reduce(value)
    return value
