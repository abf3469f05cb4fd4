"""What is replaced in which Megatron, and how: each function once, by name, or not at all."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from pathswitch.errors import UpstreamError

Replacement = Callable[..., Any]
"""Called with the original function and the call's arguments by name."""


@dataclass(frozen=True)
class Function:
    """A function of an upstream module, with the parameters that its replacement reads."""

    module: str
    name: str
    parameters: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.module}.{self.name}({', '.join(self.parameters)})"


@dataclass(frozen=True)
class Upstream:
    """A training framework that these hooks know."""

    name: str
    module: str
    """The module whose import calls for the hooks."""
    supported: str
    functions: tuple[Function, ...]


_TRAINING, _CHECKPOINTING = "megatron.training.training", "megatron.training.checkpointing"
MEGATRON_LM = Upstream(
    "Megatron-LM",
    _TRAINING,
    "Megatron-LM with Megatron core 0.12 to 0.20",
    (
        Function(_TRAINING, "get_optimizer_param_scheduler", ("optimizer",)),
        Function(_TRAINING, "train_step", ("opt_param_scheduler",)),
        Function(_TRAINING, "checkpoint_and_decide_exit", ("opt_param_scheduler", "iteration")),
        Function(_TRAINING, "load_checkpoint", ("opt_param_scheduler", "load_arg")),
        Function(_TRAINING, "save_checkpoint", ("iteration", "opt_param_scheduler", "non_persistent_ckpt")),
        Function(_CHECKPOINTING, "get_checkpoint_name", ("checkpoints_path", "iteration")),
        Function(_CHECKPOINTING, "get_checkpoint_tracker_filename", ("checkpoints_path",)),
        Function(_CHECKPOINTING, "schedule_async_save", ("async_request",)),
    ),
)
# A module here, a package in Megatron-LM.
_DEEPSPEED_TRAINING = "megatron.training"
MEGATRON_DEEPSPEED = Upstream(
    "Megatron-DeepSpeed",
    _DEEPSPEED_TRAINING,
    "Megatron-DeepSpeed of July 2025 (4efb479)",
    (
        Function(_DEEPSPEED_TRAINING, "get_optimizer_param_scheduler", ("optimizer",)),
        Function(_DEEPSPEED_TRAINING, "train_step", ("opt_param_scheduler",)),
        Function(_DEEPSPEED_TRAINING, "load_checkpoint", ("opt_param_scheduler", "load_arg")),
        Function(_DEEPSPEED_TRAINING, "save_checkpoint", ("opt_param_scheduler",)),
    ),
)
_BRIDGE_OPTIM = "megatron.bridge.training.optim"
MEGATRON_BRIDGE = Upstream(
    "Megatron-Bridge",
    _BRIDGE_OPTIM,
    "Megatron-Bridge of August 2026 (067f987)",
    (Function(_BRIDGE_OPTIM, "_get_scheduler", ("optimizer_config", "scheduler_config", "optimizer")),),
)
UPSTREAMS = (MEGATRON_LM, MEGATRON_DEEPSPEED, MEGATRON_BRIDGE)


def upstream_of(module: ModuleType) -> Upstream | None:
    """Return the framework that an imported module calls for, None if it is none of ours."""
    for upstream in UPSTREAMS:
        if upstream.module == module.__name__ and not (upstream is MEGATRON_DEEPSPEED and hasattr(module, "__path__")):
            return upstream
    return None


def patch(upstream: Upstream, replacements: dict[str, Replacement]) -> None:
    """Replace the upstream's functions, each one once; all of them or none.

    Args:
        upstream: the framework, whose modules have been imported.
        replacements: by the names of its functions.

    Raises:
        UpstreamError: a function is missing or has other parameters; nothing is replaced then.
    """
    found = [_find(upstream, function) for function in upstream.functions]
    for function, original in zip(upstream.functions, found, strict=True):
        if not getattr(original, "pathswitch_patch", False):
            _replace(function, original, replacements[function.name])
    if is_first_process():
        names = ", ".join(f"{function.module}.{function.name}" for function in upstream.functions)
        print(f"pathswitch: patched {upstream.name}: {names}", flush=True)


def is_first_process() -> bool:
    """Return whether this is rank 0 itself, not a process that it has started to write checkpoints."""
    return os.environ.get("RANK", "0") == "0" and multiprocessing.parent_process() is None


def _find(upstream: Upstream, function: Function) -> Callable[..., Any]:
    original = getattr(sys.modules.get(function.module), function.name, None)
    parameters = inspect.signature(original).parameters if callable(original) else {}
    if original is None or not set(function.parameters) <= parameters.keys():
        state = "is not there" if original is None else f"has the parameters {', '.join(parameters)}"
        raise UpstreamError(
            f"{upstream.name}: looked for {function}, which {state}: this version is not supported; supported: "
            f"{upstream.supported}"
        )
    return original  # type: ignore[no-any-return]


def _replace(function: Function, original: Callable[..., Any], replacement: Replacement) -> None:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        return replacement(lambda: original(*bound.args, **bound.kwargs), bound.arguments)

    patched.pathswitch_patch = True  # type: ignore[attr-defined]
    # A function that another module has imported by name lives there too.
    for module in [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "megatron"]:
        if vars(module).get(function.name) is original:
            setattr(module, function.name, patched)
