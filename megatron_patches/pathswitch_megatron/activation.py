"""When and where the hooks come in: after the import of a Megatron's training module, if a plan is named."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from pathswitch.errors import ConfigError, UpstreamError
from pathswitch_megatron import PLAN_VARIABLE


def register() -> None:
    """Entry point of the group ``torch.backends``: without PATHSWITCH_PLAN in the environment it does nothing."""
    if os.environ.get(PLAN_VARIABLE):
        install()


def install() -> None:
    """Wait for the import of a Megatron; idempotent.

    Raises:
        UpstreamError: it is already being imported, too late to hook in.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, _Finder())
    for name in _Finder.modules:
        module = sys.modules.get(name)
        if module is None or hasattr(module, "__path__"):
            continue
        if getattr(module.__spec__, "_initializing", False):
            raise UpstreamError(
                f"{name} is being imported already: import torch before it, or launch with `-m pathswitch_megatron`"
            )
        hook_into(module)


class _Finder(MetaPathFinder):
    """Finds nothing itself: it has the hooks run after the import of some modules that others find."""

    modules = ("megatron.training.training", "megatron.training", "megatron.bridge.training.optim")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return another finder's spec, with a loader that runs the hooks."""
        if fullname not in self.modules:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        spec = next((found for finder in others if (found := finder.find_spec(fullname, path, target))), None)
        if spec is not None and spec.loader is not None:
            _run_hooks_after(spec.loader)
        return spec


def _run_hooks_after(loader: Any) -> None:
    # On the loader of this one module: its class, which `inspect` and others look at, stays the same.
    execute = loader.exec_module

    def exec_module(module: ModuleType) -> None:
        execute(module)
        hook_into(module)

    loader.exec_module = exec_module


def hook_into(module: ModuleType) -> bool:
    """Patch the framework that this module belongs to; return whether it is one.

    Raises:
        ConfigError: the environment names no usable plan.
        UpstreamError: the framework lacks a function that is to be replaced.
    """
    # Imported here: a job whose plan is never asked for does not pay for it.
    from pathswitch_megatron.upstream import MEGATRON_BRIDGE, MEGATRON_LM, is_first_process, patch, upstream_of

    upstream = upstream_of(module)
    if upstream is None:
        return False
    from pathswitch_megatron.hooks import MegatronBridgeHooks, MegatronDeepSpeedHooks, MegatronLMHooks
    from pathswitch_megatron.job import job_from_environment

    job = job_from_environment()
    hooks: MegatronBridgeHooks | MegatronDeepSpeedHooks | MegatronLMHooks
    if upstream is MEGATRON_BRIDGE:
        hooks = MegatronBridgeHooks(job)
    elif upstream is MEGATRON_LM:
        hooks = MegatronLMHooks(job, module, _calculator, _core_version())
    else:
        hooks = MegatronDeepSpeedHooks(job, module, lambda: None)
    if job.optimizer == "pathswitch":
        if upstream not in (MEGATRON_LM, MEGATRON_BRIDGE):
            allowed = "megatron: under DeepSpeed the ds_config names the optimizer, of type PathSwitchAdamW"
            raise ConfigError("[megatron] optimizer", given=job.optimizer, allowed=allowed)
        from pathswitch_megatron.optimizer_hooks import replace_optimizer

        replace_optimizer()
    patch(upstream, hooks.replacements())
    if is_first_process():
        print(f"pathswitch: training path {job.path.name!r} of {os.environ[PLAN_VARIABLE]}", flush=True)
    return True


def _calculator() -> Any:
    from megatron.core import num_microbatches_calculator

    return num_microbatches_calculator._GLOBAL_NUM_MICROBATCHES_CALCULATOR


def _core_version() -> str:
    import megatron.core

    return str(megatron.core.__version__)
