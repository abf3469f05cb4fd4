"""Which sources of DeepSpeed are known: what replaces one of its functions must know what that function does.

``python -m pathswitch.integrations.upstream`` prints the digests of the installed DeepSpeed.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import deepspeed
from deepspeed.runtime import utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

ZERO_METHODS = (
    "__init__",
    "_build_compact_grad_partition_buffer",
    "_check_overflow",
    "_get_flat_partition_unpadded",
    "_get_preflattened_grad_partition",
    "_lazy_init_hp_params_optimizer_state",
    "_model_parallel_all_reduce",
    "_optimizer_step",
    "_release_preflattened_grad_buffers",
    "_update_model_bit16_weights",
    "_update_scale",
    "check_overflow",
    "free_grad_in_param_list",
    "get_flat_partition",
    "get_grad_norm_direct",
    "has_overflow",
    "has_overflow_partitioned_grads_serial",
    "independent_gradient_partition_epilogue",
    "scaled_global_norm",
    "step",
    "unscale_and_clip_grads",
    "zero_grad",
)
ZERO_FUNCTIONS = (
    "all_gather_dp_groups",
    "combine_grad_norm_groups",
    "is_invalid_grad_norm",
    "is_model_parallel_parameter",
    "mask_nan_or_inf_with_val_inplace",
)
BF16_METHODS = (
    "__init__",
    "_lazy_init_hp_params_optimizer_state",
    "_setup_for_real_optimizer",
    "clear_hp_grads",
    "clear_lp_grads",
    "get_grads_for_norm",
    "step",
    "update_lp_params",
)
BF16_FUNCTIONS = (
    "all_gather_dp_groups",
    "clip_tensors_by_global_norm",
    "get_global_norm_of_tensors",
    "is_invalid_grad_norm",
)
ASSUMED: dict[type[Any], tuple[tuple[str, ...], tuple[str, ...]]] = {
    DeepSpeedZeroOptimizer: (ZERO_METHODS, ZERO_FUNCTIONS),
    BF16_Optimizer: (BF16_METHODS, BF16_FUNCTIONS),
}
KNOWN = {
    "c2cac838e15ef91d43425b8c5343273b897c73eed6bbf20ecc6f229580ee9684": "0.19.8 DeepSpeedZeroOptimizer",
    "6c1146432af91cb653175d0100deecc27e14ce7756a21df9ce47c9636b733382": "0.19.8 BF16_Optimizer",
}
"""Digests of sources that are known, and the DeepSpeed that they are of."""


def known(optimizer_class: type[Any]) -> bool:
    """Return whether an optimizer of DeepSpeed's steps as the versions do that this package knows."""
    return source_digest(optimizer_class) in KNOWN


def source_digest(optimizer_class: type[Any]) -> str:
    """Return the SHA-256 of the sources of all functions whose behaviour is assumed."""
    methods, functions = ASSUMED[optimizer_class]
    assumed = [getattr(optimizer_class, name, None) for name in methods]
    assumed += [getattr(utils, name, None) for name in functions]
    return _digest(tuple(assumed))


@cache
def _digest(functions: tuple[Callable[..., Any] | None, ...]) -> str:
    return hashlib.sha256("\0".join(_described(functions)).encode()).hexdigest()


def _described(functions: Iterable[Callable[..., Any] | None]) -> Iterable[str]:
    for function in functions:
        if function is None:
            yield "missing"
            continue
        # inspect looks through wrappers, and another tool's wrapper is a change too.
        wrappers, inner = 0, function
        while hasattr(inner, "__wrapped__"):
            wrappers, inner = wrappers + 1, inner.__wrapped__
        try:
            yield f"{wrappers} {inspect.getsource(inner)}"
        except (OSError, TypeError):
            yield "without source"


def main() -> None:
    """Print the installed DeepSpeed's digests."""
    for optimizer_class in ASSUMED:
        digest = source_digest(optimizer_class)
        print(f'"{digest}": "{deepspeed.__version__} {optimizer_class.__name__}",', KNOWN.get(digest, "unknown"))


if __name__ == "__main__":
    main()
