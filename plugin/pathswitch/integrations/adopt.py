"""Adoption: a manifest for what stock DeepSpeed, stock Megatron-LM or pathswitch 0.1.0 wrote, from what it says."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import torch

from pathswitch.atomic import sync_folder, write_bytes_atomic
from pathswitch.checkpoint import MANIFEST_FILE, Manifest, Parallelism, hash_file, shard_names
from pathswitch.checkpoint.files import regular_size
from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.integrations.adopt_megatron import is_megatrons, read_megatrons, require_samples
from pathswitch.schedule import BranchPath, ConstantRun, DecayRun, LRPath, MainPath, make_shape
from pathswitch.versions import MAIN, Plan

State = Mapping[str, Any]


def adopt_checkpoint(
    folder: Path, *, step: int | None, path: str | None, plan: Plan | None, key: bytes | None
) -> Manifest:
    """Commit the checkpoint in ``folder`` as it is, and return its manifest.

    Args:
        folder: the checkpoint, under its final name.
        step: optimizer updates behind it, where its scheduler did not follow a plan.
        path: the path that it belongs to, where it has none; the main path if not given.
        plan: the plan whose LR the next update has, where it has none.
        key: signs the manifest.

    Raises:
        CheckpointError: it has a manifest, is incomplete, or cannot be read.
        ConfigError: a value is missing, or is not what the checkpoint says.
    """
    if (folder / MANIFEST_FILE).exists():
        raise CheckpointError(f"{folder}: has a manifest already ({MANIFEST_FILE}); `pathswitch verify` checks it")
    names = shard_names(folder)
    if is_megatrons(folder):
        fields, saved = read_megatrons(folder)
        place = _place(folder, saved, step, path, plan)
        require_samples(folder, fields, place["step"])
    else:
        fields, saved = _read_deepspeeds(folder, names)
        place = _place(folder, saved, step, path, plan)
    try:
        files = {name: hash_file(folder / name, sync=True) for name in sorted(names)}
        for directory in {(folder / name).parent for name in names}:
            sync_folder(directory)
        # What else wrote it is not known.
        versions = {"pathswitch": package_version("pathswitch"), **fields.pop("versions")}
        manifest = Manifest(
            tag=folder.name, **place, **fields, versions=versions, git_commit=None, parent=None, files=files
        )
        write_bytes_atomic(folder / MANIFEST_FILE, manifest.encode(key))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be committed: {error.strerror} ({error.filename})") from None
    return manifest


def _read_deepspeeds(folder: Path, names: set[str]) -> tuple[dict[str, Any], object]:
    """Return the manifest's fields that a checkpoint tells of itself, and its scheduler's state.

    Raises:
        CheckpointError: it is incomplete, or cannot be read.
    """
    state = _model_states(folder, names)
    sizes = _sizes(state, names)
    _require_all_shards(folder, sizes)
    fields = {
        "global_steps": int(state["global_steps"]),
        "samples_seen": int(state["global_samples"]),
        "tokens_seen": None,
        "data_digests": state.get("pathswitch_data"),
        "parallelism": sizes,
        "dtype": _dtype(state["module"]),
        "versions": {"deepspeed": str(state["ds_version"])},
    }
    return fields, state.get("lr_scheduler")


def _model_states(folder: Path, names: set[str]) -> State:
    """Return what DeepSpeed's first model-states file holds; unpickling it runs whatever it says.

    Raises:
        CheckpointError: there is none, it cannot be read, or DeepSpeed did not write it.
    """
    if any(re.fullmatch(r"layer_.*_states\.pt", name) for name in names):
        raise CheckpointError(f"{folder}: of a pipeline engine (layer_* files); allowed: data and tensor parallelism")
    first = min((name for name in names if name.endswith("model_states.pt")), default=None)
    if first is None:
        raise CheckpointError(f"{folder}: holds no *model_states.pt: not a checkpoint of DeepSpeed")
    try:
        state: State = torch.load(folder / first, map_location="cpu", mmap=True, weights_only=False)
    except (OSError, RuntimeError, ValueError, EOFError, ImportError, AttributeError, pickle.UnpicklingError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{folder / first}: cannot be read: {reason}") from None
    needed = ("module", "dp_world_size", "mp_world_size", "global_steps", "global_samples", "ds_version")
    missing = [name for name in needed if not isinstance(state, Mapping) or state.get(name) is None]
    if missing:
        raise CheckpointError(f"{folder / first}: holds no {', '.join(missing)}, as DeepSpeed's files do")
    return state


def _sizes(state: State, names: set[str]) -> Parallelism:
    data_parallel, tensor_parallel = int(state["dp_world_size"]), int(state["mp_world_size"])
    return Parallelism(
        zero_stage=_zero_stage(state.get("ds_config"), names),
        world_size=data_parallel * tensor_parallel,
        data_parallel_size=data_parallel,
        tensor_parallel_size=tensor_parallel,
        pipeline_parallel_size=1,
    )


def _zero_stage(ds_config: object, names: set[str]) -> int:
    if isinstance(ds_config, Mapping):
        return int(ds_config.get("zero_optimization", {}).get("stage", 0))
    # Of a configuration in a file DeepSpeed keeps the name alone. Stages 1 and 2 are cut alike.
    if any(re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name) for name in names):
        return 3
    return 1 if any(name.endswith("_optim_states.pt") for name in names) else 0


def _require_all_shards(folder: Path, sizes: Parallelism) -> None:
    """Refuse a folder that lacks a rank's shard, or has one without content."""
    ranks = range(sizes.data_parallel_size)
    patterns = []
    for mp_rank in range(sizes.tensor_parallel_size):
        shards = [f"zero_pp_rank_{rank}_mp_rank_{mp_rank:02d}" for rank in ranks]
        partitioned = sizes.zero_stage == 3
        patterns += [f"{s}_model_states.pt" for s in (shards if partitioned else [f"mp_rank_{mp_rank:02d}"])]
        patterns += [f"*{shard}_optim_states.pt" for shard in shards] if sizes.zero_stage > 0 else []
    for pattern in patterns:
        found = list(folder.glob(pattern))
        if not found or not regular_size(found[0]):
            raise CheckpointError(
                f"{folder}: incomplete: {pattern} is {'empty' if found else 'missing'}; saved under ZeRO stage "
                f"{sizes.zero_stage} by {sizes.data_parallel_size} data-parallel and {sizes.tensor_parallel_size} "
                "tensor-parallel ranks"
            )


def _dtype(module: Mapping[str, Any]) -> str:
    dtypes = [value.dtype for value in module.values() if torch.is_tensor(value) and value.is_floating_point()]
    return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtypes[0], "fp32") if dtypes else "fp32"


def _place(folder: Path, saved: object, step: int | None, path: str | None, plan: Plan | None) -> dict[str, Any]:
    """Return where on which path the checkpoint stands, and the LR of its next update.

    Raises:
        CheckpointError: it was trained by another schedule than the plan's.
        ConfigError: a value is missing, or is not what the checkpoint says.
    """
    if not isinstance(saved, Mapping) or "schedule" not in saved or "step" not in saved:
        return _given_place(folder, step, path, plan)
    for option, given, own in (("--step", step, saved["step"]), ("--path", path, saved["path"])):
        if given not in (None, own):
            raise ConfigError(option, given=given, allowed=f"{own}, as the scheduler's state in {folder} says")
    place = {name: saved[name] for name in ("paradigm", "path", "step")}
    if plan is None:
        try:
            lr_path = _lr_path(saved["schedule"])
        except (KeyError, TypeError, ConfigError):
            lr_path = None
        if lr_path is None or lr_path.fields() != dict(saved["schedule"]):
            raise CheckpointError(
                f"{folder}: its schedule {saved['schedule']} is not known here: give its plan (--plan)"
            )
        next_lr = lr_path.schedule()(saved["step"])
        return {**place, "next_lr": next_lr, "schedule_digest": saved["digest"], "plan_digest": "unknown"}
    planned = plan.path(saved["path"], saved["paradigm"])
    if planned.digest != saved["digest"]:
        raise CheckpointError(f"{folder}: trained by another schedule than path {planned.name!r} of the given plan")
    digests = {"schedule_digest": planned.digest, "plan_digest": plan.digest}
    return {**place, "next_lr": planned.lr(saved["step"]), **digests}


def _given_place(folder: Path, step: int | None, path: str | None, plan: Plan | None) -> dict[str, Any]:
    for option, given in (("--step", step), ("--plan", plan)):
        if given is None:
            allowed = f"a value: {folder} holds no scheduler's state of ours, which would tell its step and LR"
            raise ConfigError(option, given="nothing", allowed=allowed)
    assert step is not None and plan is not None
    planned = plan.path(path or MAIN)
    if step < planned.start_step or (step > planned.end_step and not planned.open_ended):
        allowed = f"{planned.start_step} to {planned.end_step}, the steps of path {planned.name!r}"
        raise ConfigError("--step", given=step, allowed=allowed)
    digests = {"schedule_digest": planned.digest, "plan_digest": plan.digest}
    place = {"paradigm": planned.paradigm, "path": planned.name, "step": step}
    return {**place, "next_lr": planned.lr(step), **digests}


def _lr_path(fields: Mapping[str, Any]) -> LRPath:
    """Return the LR path with these fields, as the scheduler's state holds them."""
    if "constant_lr" in fields:
        return ConstantRun(fields["constant_lr"])
    own: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    main = MainPath(own.pop("max_lr"), own.pop("init_lr"), own.pop("warmup_steps"))
    if not own:
        return main
    bounds = {key: own.pop(key) for key in ("fork_step", "decay_steps", "start_step", "end_step") if key in own}
    final_lr, shape_name = own.pop("final_lr"), own.pop("shape")
    shape = make_shape(shape_name, own, "the checkpoint's schedule")
    if "fork_step" in bounds:
        return BranchPath(main, **bounds, shape=shape, final_lr=final_lr)
    return DecayRun(main, **bounds, shape=shape, final_lr=final_lr)
