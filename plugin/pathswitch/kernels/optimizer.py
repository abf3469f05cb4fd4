"""PathSwitchAdamW: AdamW in one pass over memory, with float32 state, and the LR from the host or from a path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from pathswitch.errors import ConfigError
from pathswitch.kernels.averaging import AverageChoice, read_average
from pathswitch.kernels.device_state import DeviceState
from pathswitch.kernels.layouts import TYPES, GroupSettings, Kernels, ShardTensors
from pathswitch.kernels.ops import OperatorKernels
from pathswitch.kernels.paths import device_path
from pathswitch.kernels.reference import ReferenceKernels
from pathswitch.schedule import LRPath

BACKENDS: dict[str, type[Kernels]] = {"kernels": OperatorKernels, "reference": ReferenceKernels}
FLOAT_STATE = ("exp_avg", "exp_avg_sq", "master", "average")


@dataclass(frozen=True)
class ShardUpdate:
    """A piece of one parameter's update.

    Attributes:
        parameter: a parameter of the optimizer.
        start: the piece's first element in the parameter.
        grad: the piece's gradient, contiguous, float32, bfloat16 or float16, at any address.
        low: where the piece's new weights go in the model's precision, or None.
        norm: which of the sums of squares the parameter's gradient is clipped by.
    """

    parameter: Tensor
    start: int
    grad: Tensor
    low: Tensor | None = None
    norm: int = 0


@dataclass(frozen=True)
class _Request:
    """What ``one_pass`` hands to ``step``, which runs the hooks of torch's optimizers."""

    updates: Sequence[ShardUpdate]
    sums_of_squares: Tensor | None
    inv_scale: Tensor | None
    found_inf: Tensor | None
    max_norms: Sequence[float]


class PathSwitchAdamW(Optimizer):
    """AdamW with float32 moments, in place of torch.optim.AdamW, whose state it loads and gives.

    Parameters in bfloat16 or float16 have float32 master weights in the state, and gradients may have either type.

    Args:
        params: parameters or groups of them, on one device; float32, bfloat16 or float16.
        lr: the LR, unless the optimizer follows a path.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled: the weights shrink by lr * weight_decay in each update.
        max_norm: the norm of all gradients together is clipped to it; 0: it is not, and gradients are not checked.
        average: keep a running average of the weights: the decay of an exponential one, or {shape, steps, start_step}
            of a decay that it imitates (start_step in updates of the parameter).
        backend: ``kernels``, compiled for this device, or ``reference``, torch's own operations.

    Raises:
        ConfigError: a value is out of range, or a parameter cannot be optimized.
        KernelError: the kernels cannot be compiled or loaded.
    """

    _step_supports_amp_scaling = True  # GradScaler sets grad_scale and found_inf instead of waiting for the device

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_norm: float = 0.0,
        average: AverageChoice = None,
        backend: str = "kernels",
    ) -> None:
        if backend not in BACKENDS:
            raise ConfigError("PathSwitchAdamW backend", given=backend, allowed=" or ".join(BACKENDS))
        _require("max_norm", max_norm, math.isfinite(max_norm) and max_norm >= 0, "a finite norm >= 0 (0: no clipping)")
        self._averaging, self._average_weights = read_average(average)
        self.keeps_average = average is not None
        self.max_norm = max_norm
        self._kernels = BACKENDS[backend]()
        self._device_state: DeviceState | None = None
        self._request: _Request | None = None
        self._follows = False
        self._first_step: int | None = None
        self._pieces: dict[tuple[int, int, int], tuple[list[int], tuple[Any, ...]]] = {}
        self._checked: dict[int, tuple[Any, ...]] = {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch.

        Raises:
            ConfigError: a setting is out of range, or a parameter cannot be optimized.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        _check_group(group)
        devices = {p.device for g in self.param_groups for p in g["params"]}
        where = ", ".join(map(str, devices))
        _require("params", f"parameters on {where}", len(devices) <= 1, "one device")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update all parameters that have gradients."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._update(self._request or self._own_request())
        return loss

    def one_pass(
        self,
        updates: Sequence[ShardUpdate],
        *,
        sums_of_squares: Tensor | None = None,
        inv_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
        max_norm: float | Sequence[float] = 0.0,
    ) -> None:
        """Do one step on pieces of parameters, in one pass over each piece; hooks run as around ``step``.

        Args:
            updates: every piece that is to be updated; other elements of their parameters stay as they are.
            sums_of_squares: float64[k] of the gradients as they are, summed over all ranks. A step whose norm is not
                finite is left out, and counted in ``skipped_steps``. None: gradients are neither clipped nor checked.
            inv_scale: float32[1], 1 over the loss scale that the gradients carry; None: 1.
            found_inf: float32[1]; not 0: the step is left out.
            max_norm: gradients are scaled by max_norm / (norm + 1e-6) where that is below 1; one for each norm, or one
                for all; 0: they are not clipped.
        """
        n_norms = 1 if sums_of_squares is None else sums_of_squares.numel()
        max_norms = [max_norm] * n_norms if isinstance(max_norm, int | float) else list(max_norm)
        self._request = _Request(updates, sums_of_squares, inv_scale, found_inf, max_norms)
        try:
            self.step()
        finally:
            self._request = None

    @torch.no_grad()
    def sum_of_squares(self, tensors: Iterable[Tensor]) -> Tensor:
        """Return the sum of the squares of all elements, float64[1], with the same bits on every backend."""
        kinds: dict[torch.dtype, list[Tensor]] = {}
        for tensor in tensors:
            kinds.setdefault(tensor.dtype, []).append(tensor)
        total = torch.zeros(1, dtype=torch.float64, device=self._device())
        for kind in kinds.values():
            part = torch.zeros_like(total)
            self._kernels.norm(kind, part)
            total = total + part
        return total

    def follow(self, path: LRPath, step: int | None = None, lr_multiples: Sequence[float] | None = None) -> None:
        """Take the LR of every later update from a path, on the device, by a counter that only real updates move.

        The param groups' own LRs do not count any more. In the order of the current stream, and at any time between
        the replays of a captured graph.

        Args:
            path: of pathswitch.schedule; ``plan.path(name).lr_path`` of a plan.
            step: updates done so far, so that the next one uses the path's lr(step); None: as counted until now.
            lr_multiples: each group's multiple of the path's LR; None: 1.

        Raises:
            ConfigError: it is no path, or starts behind ``step``.
        """
        state, described = self._state_on_device(), device_path(path)
        multiples = [1.0] * len(self.param_groups) if lr_multiples is None else list(lr_multiples)
        _require("follow lr_multiples", multiples, len(multiples) == len(self.param_groups), "one for each param group")
        if step is None and described.first_step != (self._first_step or 0):
            step = self.path_step()
        if step is not None:
            allowed = f"a whole number of updates >= {described.first_step}, the first of the path"
            _require("follow step", step, step >= described.first_step, allowed)
            state.write_step(step - described.first_step)
        state.write_path(described)
        self._first_step, self._follows, self._multiples = described.first_step, True, multiples

    def path_step(self) -> int:
        """Return the updates done on the path; waits for the device."""
        return int(self._state_on_device().step_state.counters[0]) + (self._first_step or 0)

    def skipped_steps(self) -> int:
        """Return the steps left out because gradients were not finite; waits for the device."""
        return int(self._state_on_device().step_state.counters[1])

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the running average into the parameters for as long as the context lasts.

        Raises:
            ConfigError: the optimizer keeps none.
        """
        _require("averaged()", "no average", self.keeps_average, "an optimizer with average=...")
        parameters = [p for group in self.param_groups for p in group["params"] if "average" in self.state[p]]
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.copy_(self.state[p]["average"].view_as(p))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, own in zip(parameters, kept, strict=True):
                    p.copy_(own)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class or of torch.optim.AdamW; moments stay float32, whatever the parameters are.

        Raises:
            ConfigError: it comes from an AdamW with amsgrad or maximize.
        """
        for group in state_dict["param_groups"]:
            for option in ("amsgrad", "maximize"):
                _require(f"the loaded state's {option}", group.get(option), not group.get(option), "False")
        super().load_state_dict(dict(state_dict))
        saved = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(saved, parameters, strict=True):
            content = state_dict["state"].get(key, {})
            for name in ("step", *FLOAT_STATE):  # torch has rounded them to the parameter's type, or shares them
                if name in content:
                    self.state[p][name] = torch.as_tensor(content[name]).to(p.device, torch.float32, copy=True)
        self._first_step = self._first_step if self._follows else None

    def _own_request(self) -> _Request:
        """Return the update of all parameters by their own gradients."""
        updates = [
            ShardUpdate(p, 0, _gradient(p), None if p.dtype == torch.float32 else p)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        inv_scale = None if scale is None else scale.reciprocal()
        sums = self.sum_of_squares(update.grad for update in updates) if self.max_norm > 0 else None
        return _Request(updates, sums, inv_scale, found_inf, [self.max_norm])

    def _update(self, request: _Request) -> None:
        state = self._state_on_device()
        if self._first_step is None:
            state.write_step(self._updates_done())
            self._first_step = 0
        group_of = {id(p): index for index, group in enumerate(self.param_groups) for p in group["params"]}
        rows: dict[int, int] = {}
        settings: dict[tuple[int, int], int] = {}
        parameters: list[tuple[Tensor, int]] = []
        kinds: dict[object, list[ShardTensors]] = {}
        for update in request.updates:
            key = id(update.parameter)
            if key not in rows:
                chosen = settings.setdefault((group_of[key], update.norm), len(settings))
                rows[key] = len(parameters)
                parameters.append((self._parameter_state(update.parameter)["step"], chosen))
            shard = self._shard(update, rows[key])
            kinds.setdefault(shard.kind, []).append(shard)
        _check_steps_distinct(parameters)
        state.write_groups([self._settings(group, norm, request) for group, norm in settings])
        step_state = state.step_state
        step_state.sums_of_squares, step_state.inv_scale = request.sums_of_squares, request.inv_scale
        step_state.found_inf = request.found_inf
        scalars = state.rows(len(parameters))
        self._kernels.prepare(parameters, step_state, scalars)
        for shards in kinds.values():
            self._kernels.adamw(shards, scalars)

    def _settings(self, index: int, norm: int, request: _Request) -> GroupSettings:
        group = self.param_groups[index]
        beta1, beta2 = group["betas"]
        multiple = self._multiples[index] if self._follows else float(group["lr"])
        max_norm = request.max_norms[norm]
        return GroupSettings(multiple, beta1, beta2, group["eps"], group["weight_decay"], max_norm, norm)

    def _shard(self, update: ShardUpdate, row: int) -> ShardTensors:
        p, state = update.parameter, self.state[update.parameter]
        average = state["average"] if self.keeps_average else None
        tensors = (state.get("master", p), state["exp_avg"], state["exp_avg_sq"], average)
        if update.grad.numel() != p.numel():
            tensors = self._piece(update, tensors)
        weight, exp_avg, exp_avg_sq, average = tensors
        return ShardTensors(update.grad, weight, exp_avg, exp_avg_sq, update.low, average, row)

    def _piece(self, update: ShardUpdate, tensors: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return views of a piece, made once: ZeRO updates the same hundreds of pieces in every step."""
        key = (id(update.parameter), update.start, update.grad.numel())
        addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
        if (known := self._pieces.get(key)) is None or known[0] != addresses:
            end = update.start + update.grad.numel()
            views = tuple(None if tensor is None else _flat(tensor)[update.start : end] for tensor in tensors)
            known = self._pieces[key] = (addresses, views)
        return known[1]

    def _parameter_state(self, p: Tensor) -> dict[str, Any]:
        """Return a parameter's state, with whatever it lacks: a loaded one may have come without masters."""
        state: dict[str, Any] = self.state[p]
        names = ("step", *FLOAT_STATE)
        checked = self._checked.get(id(p))
        if checked is not None and all(state.get(name) is tensor for name, tensor in zip(names, checked, strict=True)):
            return state
        step = state.get("step", 0.0)
        if not (torch.is_tensor(step) and step.dtype == torch.float32 and step.device == p.device):
            state["step"] = torch.tensor(float(step), dtype=torch.float32, device=p.device)
        for name in ("exp_avg", "exp_avg_sq"):
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
        if p.dtype != torch.float32 and "master" not in state:
            state["master"] = p.detach().to(torch.float32)
        if self.keeps_average and "average" not in state:
            state["average"] = state.get("master", p).detach().clone()
        for name in FLOAT_STATE:
            if name in state and (state[name].dtype != torch.float32 or state[name].stride() != p.stride()):
                fitting = torch.empty_like(p, dtype=torch.float32, memory_format=torch.preserve_format)
                state[name] = fitting.copy_(state[name])
        self._checked[id(p)] = tuple(state.get(name) for name in names)
        return state

    def _state_on_device(self) -> DeviceState:
        if self._device_state is None:
            self._device_state = DeviceState(self._device(), self._averaging, self._average_weights)
        return self._device_state

    def _device(self) -> torch.device:
        device: torch.device = next(p.device for group in self.param_groups for p in group["params"])
        return device

    def _updates_done(self) -> int:
        return max((int(state["step"]) for state in self.state.values() if "step" in state), default=0)


def _require(where: str, given: object, is_met: bool, allowed: str) -> None:
    if not is_met:
        raise ConfigError(f"PathSwitchAdamW {where}", given=given, allowed=allowed)


def _check_group(group: Mapping[str, Any]) -> None:
    lr, betas = group["lr"], group["betas"]
    _require("lr", lr, math.isfinite(lr) and lr >= 0, "a finite LR >= 0")
    allowed = "two numbers 0 <= beta < 1"
    _require("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas), allowed)
    for name in ("eps", "weight_decay"):
        _require(name, group[name], math.isfinite(group[name]) and group[name] >= 0, "a finite number >= 0")
    for p in group["params"]:
        _require("params", f"a parameter of {p.dtype}", p.dtype in TYPES, ", ".join(map(str, TYPES)))
        _require("params", f"strides {p.stride()} of {tuple(p.shape)}", _is_dense(p), "parameters without gaps")


def _is_dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or bool(torch.ops.aten.is_non_overlapping_and_dense(tensor))


def _gradient(p: Tensor) -> Tensor:
    """Return a parameter's gradient in the order in which the parameter lies in memory."""
    assert p.grad is not None
    _require("gradients", f"layout {p.grad.layout}", p.grad.layout == torch.strided, "dense gradients")
    _require("gradients", f"gradients of {p.grad.dtype}", p.grad.dtype in TYPES, ", ".join(map(str, TYPES)))
    return in_order_of(p, p.grad)


def in_order_of(p: Tensor, grad: Tensor) -> Tensor:
    """Return a gradient whose elements lie in memory as the parameter's do: itself, or a copy."""
    if grad.stride() == p.stride():
        return grad
    return torch.empty_like(p, dtype=grad.dtype, memory_format=torch.preserve_format).copy_(grad)


def _flat(tensor: Tensor) -> Tensor:
    """Return all elements in the order in which they lie in memory."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _check_steps_distinct(parameters: Sequence[tuple[Tensor, int]]) -> None:
    addresses = {step.data_ptr() for step, _ in parameters}
    shared = f"one step tensor for {len(parameters) - len(addresses) + 1} parameters"
    _require("state", shared, len(addresses) == len(parameters), "a step tensor for each parameter")
