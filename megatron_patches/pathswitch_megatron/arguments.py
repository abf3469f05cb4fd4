"""Megatron's arguments: those that path switching refuses, and those that must not change between two jobs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.integrations.megatron_settings import BATCHES, DATA, VOCABULARY
from pathswitch.versions import Path, Plan

# Argument -> why a job of a plan cannot have it.
REFUSED = {
    "finetune": "it forgets the iteration, the optimizer's state and the place in the data",
    "no_load_optim": "a branch goes on with the main path's optimizer state",
    "no_load_rng": "a branch goes on with the main path's random states",
    "no_save_optim": "nothing could be resumed or forked from such a checkpoint",
    "no_save_rng": "nothing could be resumed or forked exactly from such a checkpoint",
    "pretrained_checkpoint": "it implies --finetune",
    "reset_iteration": "it forgets the place in the data",
    "non_persistent_ckpt_type": "Megatron loads such checkpoints unverified, whatever --load says",
}


def check_arguments(args: Any) -> None:
    """Refuse arguments that break the promises of a plan.

    Raises:
        ConfigError: naming each of them.
    """
    given = [name for name in REFUSED if getattr(args, name, None)]
    if given:
        reasons = "; ".join(f"not {_flag(name)}: {REFUSED[name]}" for name in given)
        raise ConfigError("Megatron's arguments", given=", ".join(map(_flag, given)), allowed=reasons)
    for name in ("save", "load"):
        if "://" in str(getattr(args, name, None)):
            allowed = "a folder of a file system: checkpoints are committed by renaming folders"
            raise ConfigError(_flag(name), given=getattr(args, name), allowed=allowed)


def check_same_settings(plan: Plan, path: Path, step: int, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that would silently change what a checkpoint's path trains on.

    Raises:
        CheckpointError: naming each argument, its value in the checkpoint, and the one given.
    """
    at_version_end = step in plan.end_steps or step == 0
    names = (*BATCHES, *VOCABULARY) if at_version_end else (*DATA, *BATCHES, *VOCABULARY)
    differing = [name for name in names if saved.get(name) != given.get(name)]
    if not differing:
        return
    lines = "; ".join(f"{_flag(name)}: checkpoint {saved.get(name)!r}, now {given.get(name)!r}" for name in differing)
    message = f"path {path.name!r} at step {step}: arguments that differ from the checkpoint's: {lines}"
    if data := [_flag(name) for name in differing if name in DATA]:
        ends = ", ".join(map(str, plan.end_steps)) or "none yet"
        message += f". {', '.join(data)}: may change only where a version's data ends (steps {ends})"
    if batches := [_flag(name) for name in differing if name in BATCHES]:
        message += f". {', '.join(batches)}: may not change, since the plan counts in steps and Megatron in samples"
    if vocabulary := [_flag(name) for name in differing if name in VOCABULARY]:
        message += (
            f". {', '.join(vocabulary)}: may not change; the padded vocabulary follows from the vocabulary, "
            "--make-vocab-size-divisible-by and --tensor-model-parallel-size"
        )
    raise CheckpointError(message)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
