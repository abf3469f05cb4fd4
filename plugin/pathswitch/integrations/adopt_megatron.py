"""What adoption has to know of a checkpoint that stock Megatron-LM wrote, in its formats torch_dist and torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathswitch.checkpoint import MEGATRON_PACKAGE, Parallelism, iteration_folder, iteration_of
from pathswitch.checkpoint.files import regular_size
from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.integrations.megatron_settings import BATCHES, DATA, STATE_KEY, VOCABULARY, data_settings
from pathswitch.integrations.megatron_state import (
    FORMAT_FILE,
    METADATA_FILE,
    UNREADABLE,
    TorchDistCheckpoint,
    is_stand_in,
    load_harmless,
    require_arguments,
)

SIZES = ("world_size", "data_parallel_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
NEEDED = ("consumed_train_samples", "seq_length", *SIZES)
# What a checkpoint was saved without -> what nobody can go on without.
LEFT_OUT = {"no_save_optim": "the optimizer's state", "no_save_rng": "the random states"}


def is_megatrons(folder: Path) -> bool:
    """Return whether a folder looks like a checkpoint of Megatron's: by its name, or by a file."""
    return iteration_of(folder.name) is not None or (folder / FORMAT_FILE).exists()


def read_megatrons(folder: Path) -> tuple[dict[str, Any], object]:
    """Return the manifest's fields that a checkpoint tells of itself, and the state of ours in it, None without one.

    Raises:
        CheckpointError: it is incomplete, cannot be read, or nothing can go on from it.
    """
    iteration = iteration_of(folder.name)
    if iteration is None:
        raise CheckpointError(f"{folder}: given {folder.name!r}; allowed: a name like {iteration_folder(40)}")
    if not (folder / FORMAT_FILE).exists() and any(folder.glob("mp_rank_*")):
        state = _read_torch(folder)
    else:
        state = _read_torch_dist(folder)
    if state["iteration"] != iteration:
        raise CheckpointError(f"{folder}: of iteration {state['iteration']}, as its own state says; was it renamed?")
    arguments = vars(state["args"])
    _require_usable(folder, arguments)
    samples = int(arguments["consumed_train_samples"])
    fields = {
        "global_steps": iteration,
        "samples_seen": samples,
        "tokens_seen": samples * int(arguments["seq_length"]),
        "data_digests": None,
        "parallelism": _sizes(arguments),
        "dtype": "bf16" if arguments.get("bf16") else "fp16" if arguments.get("fp16") else "fp32",
        "versions": {MEGATRON_PACKAGE: "unknown"},  # no format of Megatron's tells it
        "settings": data_settings(state["args"]),
    }
    return fields, _scheduler_state(folder, state.get("opt_param_scheduler"))


def require_samples(folder: Path, fields: Mapping[str, Any], step: int) -> None:
    """Refuse a step that the samples seen contradict, where the size of the batches never changes.

    Raises:
        ConfigError: every load would refuse the checkpoint.
    """
    settings, samples = fields["settings"], fields["samples_seen"]
    batch = settings.get("global_batch_size")
    if batch is None or any(settings.get(name) is not None for name in BATCHES if name != "global_batch_size"):
        return
    steps, rest = divmod(samples, batch)
    if (steps, rest) != (step, 0):
        allowed = f"{'none' if rest else steps}: {folder} has {samples:,} samples behind it, {batch} in each step"
        raise ConfigError("--step", given=step, allowed=allowed)


def _read_torch_dist(folder: Path) -> Mapping[str, Any]:
    """Return the common state of a checkpoint whose files are all there.

    Raises:
        CheckpointError: a file is missing or cut short, or the common state cannot be read.
    """
    # Megatron writes the first of these last.
    _require_files(folder, {FORMAT_FILE: 1, METADATA_FILE: 1})
    checkpoint = TorchDistCheckpoint(folder)
    _require_files(folder, checkpoint.file_sizes())
    return checkpoint.common_state()


def _read_torch(folder: Path) -> Mapping[str, Any]:
    """Return the first rank's state of a checkpoint in Megatron's older format, without its tensors.

    Raises:
        CheckpointError: a rank's file is missing or empty, the first cannot be read, or experts are cut over ranks.
    """
    first = min(folder.glob("mp_rank_*")).name
    _require_files(folder, {f"{first}/model_optim_rng.pt": 1})
    try:
        state: Mapping[str, Any] = load_harmless(folder / first / "model_optim_rng.pt", mmap=True)
        require_arguments(state)
        arguments = vars(state["args"])
        tensor, pipeline = (int(arguments[name]) for name in SIZES[2:])
    except UNREADABLE as error:
        raise CheckpointError(f"{folder / first}: holds no arguments of Megatron's ({error})") from None
    if arguments.get("expert_model_parallel_size") not in (None, 1):
        raise CheckpointError(f"{folder}: cut by experts in the format torch; allowed: --ckpt-format torch_dist")
    files = ["model_optim_rng.pt", *["distrib_optim.pt"] * bool(arguments.get("use_distributed_optimizer"))]
    stages = [""] if pipeline == 1 else [f"_{stage:03d}" for stage in range(pipeline)]
    names = [f"mp_rank_{rank:02d}{stage}/{file}" for rank in range(tensor) for stage in stages for file in files]
    _require_files(folder, dict.fromkeys(names, 1))
    return state


def _require_files(folder: Path, sizes: Mapping[str, int]) -> None:
    for name, least in sizes.items():
        size = regular_size(folder / name)
        if size is None or size < least:
            state = "missing" if size is None else "empty" if size == 0 else f"cut short ({size} of {least} bytes)"
            raise CheckpointError(f"{folder}: incomplete: {name} is {state}")


def _require_usable(folder: Path, arguments: Mapping[str, Any]) -> None:
    missing = [name for name in NEEDED if type(arguments.get(name)) is not int]
    if missing:
        raise CheckpointError(f"{folder}: its arguments hold no {', '.join(missing)}, as Megatron-LM's do")
    without = [what for name, what in LEFT_OUT.items() if arguments.get(name)]
    if without:
        raise CheckpointError(f"{folder}: was saved without {' and '.join(without)}: nothing can go on from it exactly")
    # A job would write such a value as text, which only its own class can make.
    unknown = [name for name in (*DATA, *BATCHES, *VOCABULARY) if is_stand_in(arguments.get(name))]
    if unknown:
        raise CheckpointError(f"{folder}: its arguments {', '.join(unknown)} are of a class that is not known here")


def _sizes(arguments: Mapping[str, Any]) -> Parallelism:
    world, data, tensor, pipeline = (arguments[name] for name in SIZES)
    return Parallelism(
        zero_stage=int(bool(arguments.get("use_distributed_optimizer"))),
        world_size=world,
        data_parallel_size=data,
        tensor_parallel_size=tensor,
        pipeline_parallel_size=pipeline,
    )


def _scheduler_state(folder: Path, state: object) -> object:
    """Return our state in that of Megatron's scheduler; raises CheckpointError where it is none."""
    if not isinstance(state, Mapping) or STATE_KEY not in state:
        return None
    try:
        return json.loads(state[STATE_KEY])
    except (TypeError, ValueError):
        raise CheckpointError(
            f"{folder}: the scheduler's state {STATE_KEY!r} is none that a plan's job saves"
        ) from None
