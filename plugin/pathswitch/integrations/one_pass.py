"""DeepSpeed's optimizer step in one pass over memory, for ZeRO 1 and 2 with PathSwitchAdamW.

Upstream copies the gradients into one float32 tensor, scales it, updates the weights by it and copies these to the
model's precision. Here the update reads the gradients as they are, and writes the weights in both precisions. Whatever
upstream does to gradients or computes from them, it does here to one number that stands for them: to a 1, which becomes
the scale of all gradients, and to the norm of this rank's gradients, which becomes that of all ranks' by its methods.
"""

from __future__ import annotations

import functools
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime import utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.constants import PIPE_REPLICATED
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import Tensor

from pathswitch.errors import ConfigError, UpstreamError
from pathswitch.integrations.adamw import PathSwitchAdamW
from pathswitch.integrations.upstream import ASSUMED, known
from pathswitch.kernels import optimizer as kernels
from pathswitch.kernels.ops import OperatorKernels, backend
from pathswitch.kernels.optimizer import ShardUpdate

logger = logging.getLogger("pathswitch")


def adopt_optimizer() -> None:
    """Make ZeRO know PathSwitchAdamW, and engines give it their step where it asks for that; idempotent."""
    for optimizer_class in (PathSwitchAdamW, kernels.PathSwitchAdamW):
        if optimizer_class not in ZERO_SUPPORTED_OPTIMIZERS:
            ZERO_SUPPORTED_OPTIMIZERS.append(optimizer_class)
    original = DeepSpeedEngine._configure_optimizer
    if getattr(original, "pathswitch_optimizer", False):
        return

    @functools.wraps(original)
    def configure(engine: Any, *args: Any, **kwargs: Any) -> None:
        original(engine, *args, **kwargs)
        optimizer = getattr(engine, "basic_optimizer", None)
        if isinstance(optimizer, kernels.PathSwitchAdamW):
            _adopt(engine, optimizer)

    configure.pathswitch_optimizer = True  # type: ignore[attr-defined]
    DeepSpeedEngine._configure_optimizer = configure


def _adopt(engine: Any, optimizer: kernels.PathSwitchAdamW) -> None:
    if optimizer.max_norm != 0:
        allowed = "0, or no such key: under DeepSpeed gradients are clipped by gradient_clipping in the ds_config"
        raise ConfigError("PathSwitchAdamW max_norm", given=optimizer.max_norm, allowed=allowed)
    if isinstance(optimizer._kernels, OperatorKernels):  # compiled here, or the reason why not said, on every rank
        backend(torch.device("cpu") if engine.zero_use_cpu_optimizer() else torch.device(engine.device))
    if not isinstance(optimizer, PathSwitchAdamW) or not optimizer.wants_one_pass:
        return
    reason = why_not(engine)
    if reason is None:
        engine.optimizer.step = _step_of(engine.optimizer, optimizer).step
    elif comm.get_rank() == 0:
        logger.warning("pathswitch: one_pass: %s: DeepSpeed's own step is used, with PathSwitchAdamW in it", reason)


def why_not(engine: Any) -> str | None:
    """Return why an engine's step is not replaced, None where it is."""
    wrapper = engine.optimizer
    kind = type(wrapper)
    if kind not in ASSUMED:
        return f"{kind.__name__} (ZeRO stage {engine.zero_optimization_stage()}) keeps its own step"
    if "step" in vars(wrapper):
        return f"another tool has replaced the step of this {kind.__name__}"
    if not known(kind):
        return f"this {kind.__name__} is not one of those whose source is known"
    features = {
        "offload of the optimizer": getattr(wrapper, "cpu_offload", False),
        "ZenFlow": getattr(wrapper, "zenflow", False),
        "mixture of experts": wrapper.has_moe_layers,
        "a gradient scaler of torch.autocast": wrapper.torch_autocast_gradscaler is not None,
        "master weights in low precision": getattr(wrapper, "low_precision_master_weights_and_grads", False),
        "DeepCompile": engine.is_deepcompile_enabled(),
    }
    used = [name for name, is_used in features.items() if is_used]
    return f"not together with {used[0]}" if used else None


class OnePassStep(ABC):
    """The step of one optimizer of DeepSpeed's."""

    def __init__(self, wrapper: Any, optimizer: PathSwitchAdamW) -> None:
        self.wrapper = wrapper
        self.optimizer = optimizer

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Do what the wrapper's own step does."""
        if closure is not None:
            raise NotImplementedError("DeepSpeed's optimizers take no closure")
        norm = self.measure()
        if self.wrapper.overflow:
            self.discard()
            return
        self._update(norm)
        self.gather()

    def _update(self, norm: Tensor | None) -> None:
        with self.timed(stage_1_and_2.OPTIMIZER_GRADIENTS_TIMER):
            scale = torch.ones(1, dtype=torch.float32, device=self.weights()[0].device)
            self.apply_scale(scale, norm)
            updates = self.updates()
        with self.timed(stage_1_and_2.OPTIMIZER_STEP_TIMER):
            self.optimizer.one_pass(updates, inv_scale=scale)
            self.wrapper._lazy_init_hp_params_optimizer_state()
            del updates
            self.release()

    @abstractmethod
    def measure(self) -> Tensor | None:
        """Find the norm of all gradients, whether they are finite, and update the loss scale."""

    @abstractmethod
    def weights(self) -> list[Tensor]:
        """Return the float32 partitions, a flat one for each param group."""

    @abstractmethod
    def apply_scale(self, scale: Tensor, norm: Tensor | None) -> None:
        """Do to ``scale`` what upstream does to gradients: undo the loss scale, and clip."""

    @abstractmethod
    def updates(self) -> list[ShardUpdate]:
        """Return the gradients and where they belong."""

    @abstractmethod
    def release(self) -> None:
        """Free the gradients."""

    @abstractmethod
    def discard(self) -> None:
        """Free gradients that are not finite."""

    @abstractmethod
    def gather(self) -> None:
        """Give every rank the whole weights."""

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Run one of the wrapper's timers."""
        yield

    def own_partition(self, partitions: list[list[Tensor]], index: int) -> Tensor:
        """Return this rank's partition of a param group in the model's precision."""
        rank: int = comm.get_rank(group=self.wrapper.real_dp_process_group[index])
        return partitions[index][rank]

    def all_gather(self, groups: list[Tensor], partitions: list[list[Tensor]]) -> None:
        """Gather the partitions of all param groups."""
        wrapper = self.wrapper
        utils.all_gather_dp_groups(
            groups_flat=groups,
            partitioned_param_groups=partitions,
            dp_process_group=wrapper.real_dp_process_group,
            start_alignment_factor=wrapper.nccl_start_alignment_factor,
            allgather_bucket_size=wrapper.allgather_bucket_size,
        )


class ZeroStep(OnePassStep):
    """DeepSpeedZeroOptimizer's step: ZeRO 1 and 2, whose gradients are a list of pieces for each param group."""

    def measure(self) -> Tensor | None:
        """See OnePassStep."""
        zero, norm = self.wrapper, None
        zero.micro_step_id = stage_1_and_2.INITIAL_MICRO_STEP_ID
        zero.overflow = False
        if not zero.compute_grad_norm:
            zero._global_grad_norm = None
        # Without model parallelism the norm says the same without another pass: it is finite where all gradients are.
        if zero.check_grad_overflow and (zero.mpu is not None or not zero.compute_grad_norm):
            zero.check_overflow(partition_gradients=zero.partition_gradients)
        if zero.compute_grad_norm and not zero.overflow:
            norm = utils.combine_grad_norm_groups([self._norm(index) for index in range(len(zero.bit16_groups))])
            if zero.dtype != torch.bfloat16 or zero.check_grad_overflow:
                zero.overflow = utils.is_invalid_grad_norm(norm)
        scale = zero.loss_scale
        zero._update_scale(zero.overflow)
        if norm is not None:
            zero._global_grad_norm = float("inf") if zero.overflow else norm / scale
        return norm

    def _norm(self, index: int) -> Tensor:
        zero = self.wrapper
        pieces = [piece for piece in zero.averaged_gradients[index] if not getattr(piece, "_zero_padding", False)]
        counted = [
            (piece.reshape(-1), parameter)
            for piece, parameter in zip(pieces, zero.params_in_partition[index], strict=False)  # padding may come last
            if not getattr(parameter, PIPE_REPLICATED, False)
            and (utils.is_model_parallel_parameter(parameter) or zero.model_parallel_rank == 0)
        ]
        own = self.optimizer.sum_of_squares([piece for piece, _ in counted]).sqrt()
        norm: Tensor = zero.get_grad_norm_direct([own], [parameter for _, parameter in counted[:1]])
        return norm

    def weights(self) -> list[Tensor]:
        """See OnePassStep."""
        weights: list[Tensor] = self.wrapper.single_partition_of_fp32_groups
        return weights

    def apply_scale(self, scale: Tensor, norm: Tensor | None) -> None:
        """See OnePassStep."""
        self.wrapper.unscale_and_clip_grads([scale], norm)

    def updates(self) -> list[ShardUpdate]:
        """See OnePassStep."""
        zero, updates = self.wrapper, []
        for index, weight in enumerate(self.weights()):
            low = self.own_partition(zero.parallel_partitioned_bit16_groups, index)
            whole, start = zero._get_preflattened_grad_partition(index), 0
            for piece in zero.averaged_gradients[index] if whole is None else [whole]:
                grad = piece.reshape(-1)
                updates.append(ShardUpdate(weight, start, grad, low[start : start + grad.numel()]))
                start += grad.numel()
            if start != weight.numel():
                raise UpstreamError(f"ZeRO's gradients have {start} elements, their partition {weight.numel()}")
        return updates

    def release(self) -> None:
        """See OnePassStep."""
        zero = self.wrapper
        for index in range(len(zero.bit16_groups)):
            zero.free_grad_in_param_list(zero.params_not_in_partition[index])
            zero.free_grad_in_param_list(zero.params_in_partition[index])
        self._forget()

    def discard(self) -> None:
        """See OnePassStep."""
        if self.wrapper.compute_grad_norm:
            self.wrapper._global_grad_norm = float("inf")
        self.wrapper.zero_grad(set_to_none=True)
        self._forget()
        for name in stage_1_and_2.OPTIMIZER_TIMERS:
            with self.timed(name):
                pass

    def _forget(self) -> None:
        self.wrapper._release_preflattened_grad_buffers()
        for index in self.wrapper.averaged_gradients:
            self.wrapper.averaged_gradients[index] = self.wrapper.all_grad_tensors[index] = None

    def gather(self) -> None:
        """See OnePassStep."""
        zero = self.wrapper
        with self.timed(stage_1_and_2.OPTIMIZER_ALLGATHER_TIMER):
            self.all_gather(zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups)
        for index in range(len(zero.bit16_groups)):
            zero._update_model_bit16_weights(index)
        zero.timers.log(stage_1_and_2.OPTIMIZER_TIMERS)

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """See OnePassStep."""
        timer = self.wrapper.timers(name)
        timer.start()
        yield
        timer.stop()


class BF16Step(OnePassStep):
    """BF16_Optimizer's step: ZeRO 1 in bfloat16 with gradients accumulated in one flat float32 tensor."""

    def measure(self) -> Tensor | None:
        """See OnePassStep."""
        bf16 = self.wrapper
        grads, _ = bf16.get_grads_for_norm()
        own = self.optimizer.sum_of_squares(grads).sqrt()
        norm: Tensor = utils.get_global_norm_of_tensors([own], norm_type=bf16.norm_type, mpu=bf16.mpu)
        bf16.overflow = utils.is_invalid_grad_norm(norm)
        bf16._global_grad_norm = float("inf") if bf16.overflow else norm
        return norm

    def weights(self) -> list[Tensor]:
        """See OnePassStep."""
        weights: list[Tensor] = self.wrapper.fp32_groups_flat_partition
        return weights

    def apply_scale(self, scale: Tensor, norm: Tensor | None) -> None:
        """See OnePassStep."""
        bf16 = self.wrapper
        if bf16.clip_grad > 0:
            utils.clip_tensors_by_global_norm([scale], max_norm=bf16.clip_grad, global_norm=norm, mpu=bf16.mpu)

    def updates(self) -> list[ShardUpdate]:
        """See OnePassStep."""
        grads, lows = self.wrapper.fp32_groups_gradient_flat_partition, self.wrapper.bf16_partitioned_groups
        return [
            ShardUpdate(weight, 0, grads[index], self.own_partition(lows, index))
            for index, weight in enumerate(self.weights())
        ]

    def release(self) -> None:
        """See OnePassStep."""
        self.wrapper.clear_hp_grads()

    def discard(self) -> None:
        """See OnePassStep."""
        self.wrapper.clear_hp_grads()
        self.wrapper.clear_lp_grads()

    def gather(self) -> None:
        """See OnePassStep."""
        self.all_gather(self.wrapper.bf16_groups_flat, self.wrapper.bf16_partitioned_groups)


def _step_of(wrapper: Any, optimizer: PathSwitchAdamW) -> OnePassStep:
    steps: dict[type[Any], type[OnePassStep]] = {DeepSpeedZeroOptimizer: ZeroStep, BF16_Optimizer: BF16Step}
    return steps[type(wrapper)](wrapper, optimizer)
