"""PathSwitchAdamW in the place of Transformer Engine's FusedAdam: its arguments, its state, its calls from Megatron.

The clipping of gradients is fused: Megatron's norm becomes one number that the update multiplies each gradient by.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.kernels.layouts import TYPES, ShardTensors
from pathswitch.kernels.ops import OperatorKernels, backend
from pathswitch.kernels.optimizer import PathSwitchAdamW, ShardUpdate, _Request, in_order_of

MASTER = "master_param"
NAMES = ("exp_avg", "exp_avg_sq", MASTER)
WHERE = "Megatron with [megatron] optimizer = 'pathswitch'"
_instances: WeakSet[FusedAdam] = WeakSet()


class FusedAdam(PathSwitchAdamW):
    """AdamW with the arguments, the state and the param groups of Transformer Engine's FusedAdam.

    The state of a parameter is ``exp_avg``, ``exp_avg_sq`` and, with master weights, ``master_param``, all float32; the
    number of updates is the param group's ``step``.

    Args:
        params: parameters or groups of them, on one device.
        lr: the LR.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled.
        amsgrad: False.
        bias_correction: True.
        adam_w_mode: True.
        capturable: False.
        master_weights: keep float32 weights in the state, and write them to the parameters in their own precision.
        master_weight_dtype: float32, as are the moments.
        exp_avg_dtype: float32.
        exp_avg_sq_dtype: float32.
        use_decoupled_grad: gradients are in ``decoupled_grad``, float32, bfloat16 or float16, not in ``grad``.
        store_param_remainders: False, unless there are no master weights.
        set_grad_none: None.
        backend: see PathSwitchAdamW.
        others: refused by name.

    Raises:
        ConfigError: an argument has another value than the ones here.
    """

    _step_supports_amp_scaling = False  # Megatron scales back the gradients, and leaves steps out
    step_in_state = False
    """Whether a state_dict gives each parameter the step too, as torch's AdamW reads it."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        *,
        bias_correction: bool = True,
        adam_w_mode: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
        master_weight_dtype: torch.dtype = torch.float32,
        exp_avg_dtype: torch.dtype = torch.float32,
        exp_avg_sq_dtype: torch.dtype = torch.float32,
        use_decoupled_grad: bool = False,
        store_param_remainders: bool = False,
        set_grad_none: None = None,
        backend: str = "kernels",
        **others: object,
    ) -> None:
        given = {
            "amsgrad": (amsgrad, False),
            "bias_correction": (bias_correction, True),
            "adam_w_mode": (adam_w_mode, True),
            "capturable": (capturable, False),
            "master_weight_dtype": (master_weight_dtype, torch.float32),
            "exp_avg_dtype": (exp_avg_dtype, torch.float32),
            "exp_avg_sq_dtype": (exp_avg_sq_dtype, torch.float32),
            "store_param_remainders": (store_param_remainders and master_weights, False),
            "set_grad_none": (set_grad_none, None),
        }
        for name, (value, allowed) in given.items():
            if value is not allowed and value != allowed:
                raise ConfigError(f"{WHERE}: {name}", given=value, allowed=str(allowed))
        if others:
            allowed_names = ", ".join(["lr", "betas", "eps", "weight_decay", *given, "master_weights"])
            raise ConfigError(WHERE, given=", ".join(others), allowed=f"{allowed_names}, use_decoupled_grad")
        super().__init__(params, lr, betas, eps, weight_decay, backend=backend)
        self.master_weights, self.use_decoupled_grad = master_weights, use_decoupled_grad
        self._steps: dict[int, tuple[Tensor, int]] = {}
        self._counted: dict[int, int] = {}
        self._has_loaded = False
        self._clip: Tensor | None = None
        _instances.add(self)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, where this optimizer reads them."""
        self._clip = None
        name = "decoupled_grad" if self.use_decoupled_grad else "grad"
        for p in self._parameters():
            if (grad := getattr(p, name, None)) is not None:
                if set_to_none:
                    setattr(p, name, None)
                else:
                    grad.detach().zero_()

    def clip_next(self, coefficient: float) -> None:
        """Multiply the gradients of the next update by a number if it is below 1, in its own pass over them."""
        clips = coefficient < 1.0
        self._clip = torch.tensor([coefficient], dtype=torch.float32, device=self._device()) if clips else None

    def compile_kernels(self) -> None:
        """Compile and load the kernels, which the first update would do otherwise.

        Raises:
            KernelError: they cannot be.
        """
        if isinstance(self._kernels, OperatorKernels):
            backend(self._device())

    def updates_all(self, parameters: Sequence[Tensor]) -> bool:
        """Return whether these are all parameters of this optimizer."""
        own = self._parameters()
        return len(own) == len(parameters) and all(a is b for a, b in zip(own, parameters, strict=True))

    def initialize_state(self, param: Tensor, store_param_remainders: bool = False) -> None:
        """Make the state of a parameter that has none.

        Raises:
            ConfigError: remainders of master weights are wanted, or the parameter needs master weights.
        """
        if store_param_remainders:
            raise ConfigError(f"{WHERE}: store_param_remainders", given=True, allowed="False")
        state = self.state[param]
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
        if self.master_weights and MASTER not in state:
            state[MASTER] = param.detach().to(torch.float32, copy=True)
        if param.dtype != torch.float32 and MASTER not in state:
            allowed = "float32 parameters, or master_weights"
            raise ConfigError(f"{WHERE}: parameters", given=param.dtype, allowed=allowed)

    def get_unscaled_state(self, param: Tensor, state_name: str) -> Tensor:
        """Return a state's tensor, float32."""
        tensor: Tensor = self.state[param][state_name]
        return tensor

    def set_scaled_state(self, param: Tensor, state_name: str, unscaled_state: Tensor) -> None:
        """Write a state's tensor; what is none of this optimizer's states is left out.

        Raises:
            CheckpointError: it is not float32: nothing here could tell what it means.
        """
        if state_name not in NAMES:  # Megatron hands over everything of a bucket's, ``padding`` too
            return
        if unscaled_state.dtype != torch.float32:
            raise CheckpointError(f"{state_name} of {unscaled_state.dtype}: {WHERE} takes float32 states alone")
        state = self.state[param]
        if state_name not in state:
            state[state_name] = torch.empty_like(param, dtype=torch.float32, memory_format=torch.preserve_format)
        state[state_name].copy_(unscaled_state)
        self._has_loaded = True

    def state_dict(self) -> dict[str, Any]:
        """Return the state; see ``step_in_state``."""
        content = super().state_dict()
        if self.step_in_state:
            steps = {
                key: group["step"] for group in content["param_groups"] if "step" in group for key in group["params"]
            }
            content["state"] = {
                key: {**state, "step": torch.tensor(float(steps[key]))} if key in steps else dict(state)
                for key, state in content["state"].items()
            }
        return content

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class, of Transformer Engine's or of torch's AdamW."""
        super().load_state_dict(state_dict)
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        for key, p in zip(saved, self._parameters(), strict=True):
            master = state_dict["state"].get(key, {}).get(MASTER)
            if master is not None:
                self.state[p].pop(MASTER)  # torch has rounded it to the parameter's type
                self.set_scaled_state(p, MASTER, torch.as_tensor(master))
        for group in self.param_groups:
            states = [self.state[p] for p in group["params"] if p in self.state]
            steps = [int(state.pop("step")) for state in states if "step" in state]
            # torch's AdamW keeps a group's step as it was loaded, and counts in the state.
            if (step := max(steps, default=group.get("step"))) is not None:
                group["step"] = int(step)
        self._steps.clear()
        self._clip = None

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch."""
        param_group.setdefault("bias_correction", True)  # Transformer Engine reads it in a state that it loads
        super().add_param_group(param_group)

    def _own_request(self) -> _Request:
        updates = []
        for p in self._parameters():
            grad = getattr(p, "decoupled_grad", None) if self.use_decoupled_grad else p.grad
            if grad is not None:
                updates.append(ShardUpdate(p, 0, _ordered(grad, p), p if self.master_weights else None))
        return _Request(updates, None, self._clip, None, [0.0])

    def _update(self, request: _Request) -> None:
        """Update, and count it as Transformer Engine does: in every group that has parameters."""
        if request.sums_of_squares is not None or request.found_inf is not None:
            raise ConfigError(f"{WHERE}: one_pass", given="sums_of_squares or found_inf", allowed="none: Megatron asks")
        if not self._parameters():
            return
        if self._has_loaded:
            self._check_masters()
            self._has_loaded = False
        self._counted = {id(p): int(group.get("step") or 0) for group in self.param_groups for p in group["params"]}
        super()._update(request)
        for group in self.param_groups:
            if group["params"]:
                group["step"] = int(group.get("step") or 0) + 1
        self._clip = None

    def _parameter_state(self, p: Tensor) -> dict[str, Any]:
        self.initialize_state(p)
        count = self._counted[id(p)]
        step, known = self._steps.get(id(p), (None, 0))
        if step is None or step.device != p.device:
            step = torch.tensor(float(count), dtype=torch.float32, device=p.device)
        elif known != count:
            step.fill_(count)
        self._steps[id(p)] = (step, count + 1)
        return {**self.state[p], "step": step}

    def _shard(self, update: ShardUpdate, row: int) -> ShardTensors:
        p, state = update.parameter, self.state[update.parameter]
        tensors: tuple[Any, ...] = (state.get(MASTER, p), state["exp_avg"], state["exp_avg_sq"], None)
        if update.grad.numel() != p.numel():
            tensors = self._piece(update, tensors)
        weight, exp_avg, exp_avg_sq, _ = tensors
        return ShardTensors(update.grad, weight, exp_avg, exp_avg_sq, update.low, None, row)

    def _check_masters(self) -> None:
        """Refuse what a loader has made of 16-bit remainders: it turns them into float32 without a word."""
        for p in self._parameters():
            master = self.state.get(p, {}).get(MASTER)
            if master is not None and not torch.equal(master.to(p.dtype), p):
                raise CheckpointError(
                    f"{MASTER} does not round to the model's weights. Transformer Engine's store_param_remainders "
                    f"saves 16 bits of it alone: {WHERE} takes whole float32 master weights"
                )

    def _updates_done(self) -> int:
        return max((int(group.get("step") or 0) for group in self.param_groups), default=0)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]


def owner_of(parameters: Sequence[Tensor]) -> FusedAdam | None:
    """Return the optimizer whose parameters are exactly these, in this order, None if there is none."""
    return next((optimizer for optimizer in _instances if optimizer.updates_all(parameters)), None)


def _ordered(grad: Tensor, p: Tensor) -> Tensor:
    """Return a gradient in the order in which its parameter lies in memory."""
    if grad.layout != torch.strided or grad.dtype not in TYPES:
        allowed = f"dense gradients of {', '.join(map(str, TYPES))}"
        raise ConfigError(f"{WHERE}: gradients", given=f"{grad.layout}, {grad.dtype}", allowed=allowed)
    return in_order_of(p, grad)
