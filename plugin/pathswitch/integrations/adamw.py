"""PathSwitchAdamW by ds_config alone: ``"optimizer": {"type": "PathSwitchAdamW", "params": {...}}``.

DeepSpeed looks an optimizer's name up in ``torch.optim``, and ZeRO wants to know its type. In plain torch loops it is
the optimizer of the kernels room, with its parameters checked.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from pathswitch.errors import ConfigError, choices
from pathswitch.kernels import optimizer as kernels
from pathswitch.kernels.averaging import AverageChoice

OWN = ("lr", "betas", "eps", "weight_decay", "one_pass", "average", "backend", "max_norm")
ALIKE: dict[str, tuple[object, ...]] = {
    "adam_w_mode": (True,),
    "bias_correction": (True,),
    "torch_adam": (False,),
    "amsgrad": (False,),
    "maximize": (False,),
    "differentiable": (False,),
    "decoupled_weight_decay": (True,),
    "foreach": (None, False, True),
    "fused": (None, False, True),
    "capturable": (False, True),
}
"""Parameters of other AdamWs, and the values with which this one does the same."""


class PathSwitchAdamW(kernels.PathSwitchAdamW):
    """AdamW with the update in one pass over memory; torch.optim.PathSwitchAdamW.

    Args:
        params: see pathswitch.kernels.optimizer.PathSwitchAdamW, as for all that is not here.
        lr: the LR.
        betas: decay rates of the moments.
        eps: added to the denominator.
        weight_decay: decoupled weight decay.
        one_pass: under ZeRO 1 and 2, replace DeepSpeed's step by one without a float32 copy of the gradients.
        average: keep a running average of the weights.
        backend: ``kernels`` or ``reference``.
        max_norm: 0 under DeepSpeed, which clips by its own key ``gradient_clipping``.
        alike: parameters of other AdamWs, with values that ask for what this one does.

    Raises:
        ConfigError: a parameter is unknown, of the wrong type or out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        one_pass: bool = False,
        average: AverageChoice = None,
        backend: str = "kernels",
        max_norm: float = 0.0,
        **alike: object,
    ) -> None:
        _check_alike(alike)
        numbers = {"lr": lr, "eps": eps, "weight_decay": weight_decay, "max_norm": max_norm}
        for name, value in numbers.items():
            _require(name, value, _is_number(value), "a number")
        pair = isinstance(betas, list | tuple) and len(betas) == 2 and all(map(_is_number, betas))
        _require("betas", betas, pair, "two numbers 0 <= beta < 1")
        _require("one_pass", one_pass, isinstance(one_pass, bool), "true or false")
        _require("backend", backend, backend in kernels.BACKENDS, choices(kernels.BACKENDS))
        self.wants_one_pass = one_pass
        super().__init__(
            params, lr, (betas[0], betas[1]), eps, weight_decay, max_norm=max_norm, average=average, backend=backend
        )
        if "deepspeed.runtime.engine" in sys.modules:
            from pathswitch.integrations.one_pass import adopt_optimizer

            adopt_optimizer()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; see torch."""
        param_group.setdefault("bias_correction", True)  # DeepSpeed's own Adams read it, and may go on from our states
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a state of this class, of torch.optim.AdamW, or of an Adam of DeepSpeed's.

        Raises:
            ConfigError: it comes from an Adam that does something else.
        """
        for group in state_dict["param_groups"]:
            for name, allowed in ALIKE.items():
                _require(
                    f"{name} of a loaded state", group.get(name), group.get(name, allowed[0]) in allowed, _or(name)
                )
        super().load_state_dict(state_dict)
        for group in self.param_groups:
            group.setdefault("bias_correction", True)
            step = group.pop("step", None)  # where old checkpoints of DeepSpeed's Adams count the group's updates
            for p in group["params"]:
                state = self.state[p]
                if step is not None and "exp_avg" in state and "step" not in state:
                    state["step"] = torch.tensor(float(step), dtype=torch.float32, device=p.device)


def _check_alike(alike: Mapping[str, object]) -> None:
    for name, value in alike.items():
        if name not in ALIKE:
            raise ConfigError("PathSwitchAdamW params", given=name, allowed=choices((*OWN, *ALIKE), name))
        _require(name, value, any(value is one for one in ALIKE[name]), f"{_or(name)}, or leave the key out")


def _or(name: str) -> str:
    return " or ".join(repr(value) for value in ALIKE[name])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(name: str, given: object, is_met: bool, allowed: str) -> None:
    if not is_met:
        raise ConfigError(f"PathSwitchAdamW {name}", given=given, allowed=allowed)
