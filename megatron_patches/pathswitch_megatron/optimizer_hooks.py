"""Megatron's Adam becomes ours, and its clipping of gradients a number that our update takes with it.

``python -m pathswitch_megatron.optimizer_hooks`` prints the digest of the installed Megatron core's optimizer.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from pathswitch.errors import ConfigError, UpstreamError
from pathswitch_megatron.optimizer import WHERE, FusedAdam, owner_of
from pathswitch_megatron.upstream import Function, Upstream, is_first_process, patch

Call = Callable[[], Any]
Arguments = Mapping[str, Any]

_OPTIMIZERS = "megatron.core.optimizer"
_DISTRIBUTED, _OPTIMIZER, _CLIPPING = (
    f"{_OPTIMIZERS}.{name}" for name in ("distrib_optimizer", "optimizer", "clip_grads")
)
# Which Adam Megatron makes, and how it reads that one's state: names of modules, and what they become.
SYMBOLS: dict[str, dict[str, Any]] = {
    _OPTIMIZERS: {"Adam": FusedAdam, "USING_PYTORCH_OPTIMIZER": False},
    _DISTRIBUTED: {"Adam": FusedAdam, "HAVE_APEX_OR_TE": True, "USING_TE_OPTIMIZER": True},
}
BUILDER = Upstream(
    "Megatron core's optimizer",
    _OPTIMIZERS,
    "Megatron core 0.15 to 0.20",
    (Function(_OPTIMIZERS, "_get_megatron_optimizer_based_on_param_groups", ("config",)),),
)
CLIPPING = Upstream(
    "Megatron core's clipping",
    _CLIPPING,
    "Megatron core 0.15 to 0.20",
    (
        Function(
            _CLIPPING, "clip_grad_by_total_norm_fp32", ("parameters", "max_norm", "total_norm", "use_decoupled_grad")
        ),
    ),
)
# Between the clipping and the update nobody may read the gradients: so these do, as far as they are known.
ASSUMED = (
    (_CLIPPING, "clip_grad_by_total_norm_fp32"),
    (_OPTIMIZER, "MegatronOptimizer.clip_grad_norm"),
    *((_OPTIMIZER, f"MixedPrecisionOptimizer.{name}") for name in ("step", "step_with_ready_grads")),
    *((_OPTIMIZER, f"FP32Optimizer.{name}") for name in ("step", "step_with_ready_grads")),
    *((_OPTIMIZER, f"ChainedOptimizer.{name}") for name in ("step", "step_with_ready_grads")),
    (_DISTRIBUTED, "DistributedOptimizer.step_with_ready_grads"),
)
KNOWN = {
    "ceab98c2a16b05d32ed6507c1f6090db7c352079c397d1bc748a71e15ad08f06": "0.15 and 0.16",
    "bc39b58f5176e24e8a1ecdae228e5e68990e689e7e058c04c64b51a8d9453f78": "0.17",
    "d4659f0090911248cf5f7aa7d86a56714eee5a6b603b808f6bb5df0a2ec4b971": "0.18",
    "961ba6b92cf2bdc8b1684bf8bedf477b20afe79d6977952124f8b0a4ec8b58a1": "0.19, and 0.20.0dev of August 2026",
}
"""Digests of sources that are known, and the Megatron core that they are of."""


def replace_optimizer() -> None:
    """Let Megatron core make FusedAdam of this package, and fuse its clipping where its source is known; idempotent.

    Raises:
        UpstreamError: a name that is to be replaced is not there; nothing is replaced then.
    """
    modules = {name: _module(name, symbols) for name, symbols in SYMBOLS.items()}
    # A state that goes back to torch's AdamW needs a step for each parameter, which Transformer Engine does not take.
    if modules[_OPTIMIZERS].Adam is not FusedAdam:
        FusedAdam.step_in_state = bool(modules[_OPTIMIZERS].USING_PYTORCH_OPTIMIZER)
    patch(BUILDER, {BUILDER.functions[0].name: _build})
    for name, symbols in SYMBOLS.items():
        vars(modules[name]).update(symbols)
    fused = source_digest() in KNOWN
    if fused:
        patch(CLIPPING, {CLIPPING.functions[0].name: _clip})
    if is_first_process():
        names = ", ".join(f"{module}.{name}" for module, symbols in SYMBOLS.items() for name in symbols)
        clipping = "in the update" if fused else "by Megatron's own pass: its source is not one of those known"
        print(f"pathswitch: optimizer {FusedAdam.__name__} of pathswitch in {names}; clipping {clipping}", flush=True)


def source_digest() -> str:
    """Return the SHA-256 of the sources of all functions whose behaviour is assumed."""
    return hashlib.sha256("\0".join(_source(module, name) for module, name in ASSUMED).encode()).hexdigest()


def _build(original: Call, arguments: Arguments) -> Any:
    """Refuse what this optimizer is not, and keep whole master weights: Megatron has no flag for their remainders."""
    config = arguments["config"]
    if config.optimizer != "adam":
        raise ConfigError(f"{WHERE}: --optimizer", given=config.optimizer, allowed="adam")
    if getattr(config, "optimizer_cpu_offload", False):
        raise ConfigError(f"{WHERE}: --optimizer-cpu-offload", given=True, allowed="False")
    if getattr(config, "store_param_remainders", False):
        config.store_param_remainders = False
    built = original()
    if isinstance(inner := getattr(built, "optimizer", None), FusedAdam):
        inner.compile_kernels()  # here, or the reason why not said, on every rank
    return built


def _clip(original: Call, arguments: Arguments) -> Any:
    """Leave the gradients as they are, and tell their optimizer what to multiply them by."""
    parameters, norm = arguments["parameters"], arguments["total_norm"]
    optimizer = owner_of(parameters) if isinstance(parameters, list) else None
    is_number = isinstance(norm, int | float)
    if optimizer is None or not is_number or optimizer.use_decoupled_grad != arguments.get("use_decoupled_grad", False):
        return original()
    optimizer.clip_next(arguments["max_norm"] / (norm + 1.0e-6))
    return None


def _module(name: str, symbols: Mapping[str, Any]) -> ModuleType:
    module = sys.modules.get(name)
    missing = [symbol for symbol in symbols if not hasattr(module, symbol)]
    if module is None or missing:
        looked_for = ", ".join(f"{name}.{symbol}" for symbol in missing or symbols)
        raise UpstreamError(
            f"{BUILDER.name}: looked for {looked_for}, which is not there: this version is not supported; supported: "
            f"{BUILDER.supported}"
        )
    return module


def _source(module: str, name: str) -> str:
    function: Any = sys.modules.get(module)
    for part in name.split("."):
        function = getattr(function, part, None)
    if function is None:
        return "missing"
    # inspect looks through wrappers, and another tool's wrapper is a change too; torch's no_grad is one of Megatron's.
    wrappers = 0
    while not getattr(function, "pathswitch_patch", False) and hasattr(function, "__wrapped__"):
        wrappers, function = wrappers + 1, function.__wrapped__
    try:
        return f"{wrappers} {inspect.getsource(inspect.unwrap(function))}"
    except (OSError, TypeError):
        return "without source"


def main() -> None:
    """Print the installed Megatron core's digest."""
    core = importlib.import_module("megatron.core")
    importlib.import_module(_OPTIMIZERS)
    print(f'"{source_digest()}": "{core.__version__}",', KNOWN.get(source_digest(), "unknown"))


if __name__ == "__main__":
    main()
