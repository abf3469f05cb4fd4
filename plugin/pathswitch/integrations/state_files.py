"""The digest of the optimizer state as the shards of a checkpoint hold it, without a job: ZeRO 1 to 3."""

from __future__ import annotations

import math
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pathswitch.checkpoint import Manifest
from pathswitch.errors import CheckpointError
from pathswitch.integrations.state_digest import STATES, WEIGHTS, Digests, digests_of, part_of

SHARD = re.compile(r"zero_pp_rank_(\d+)_mp_rank_(\d+)_(optim|model)_states\.pt$")
Part = tuple[str, str, Tensor, int]
"""Stream, parameter, values, and the place in the parameter of the first of them."""


def digest_of_files(folder: Path, manifest: Manifest) -> Digests:
    """Return what a load with the same number of ranks would compare with the manifest's.

    The shards are unpickled, which runs whatever code they hold: verify them before.

    Raises:
        CheckpointError: the shards do not tell, or cannot be read.
    """
    sizes = manifest.parallelism
    if sizes.zero_stage == 0 or sizes.tensor_parallel_size * sizes.pipeline_parallel_size > 1:
        kind = "under ZeRO 0" if sizes.zero_stage == 0 else "of model-parallel ranks"
        raise CheckpointError(f"{folder}: shards {kind} do not name the elements: only a load compares them")
    try:
        parts = _zero_3(folder, manifest) if sizes.zero_stage == 3 else _zero_1_and_2(folder, manifest)
        return digests_of(parts)
    except (OSError, EOFError, ImportError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder}: its shards are not understood: {type(error).__name__}: {error}") from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{folder}: a shard cannot be unpickled: {error}") from None


def _zero_1_and_2(folder: Path, manifest: Manifest) -> Iterator[Part]:
    """Yield the parts of each rank: of every flat group an equally long one, wherever parameters begin and end."""
    groups = _load(folder / "mp_rank_00_model_states.pt")["param_shapes"]
    for rank, path in enumerate(_shards(folder, manifest, "optim")):
        state = _load(path)["optimizer_state_dict"]
        base, gaps = state["base_optimizer_state"], state.get("param_alignment_paddings")
        for group, weights in enumerate(state["single_partition_of_fp32_groups"]):
            moments = base["state"][group] if isinstance(base, Mapping) else base[group]
            # DeepSpeed's ZeRO optimizer saves the weights without the padding behind them, its BF16_Optimizer with it.
            size = weights.numel() + (state["group_paddings"][group] if "zero_stage" in state else 0)
            shapes, offset = groups[group], 0
            for (name, shape), gap in zip(shapes.items(), gaps[group] if gaps else [0] * len(shapes), strict=True):
                first, start, numel = part_of(offset, shape.numel(), rank * size, size)
                yield from _parts(name, _streams(weights, moments), start, numel, first)
                offset += shape.numel() + gap


def _zero_3(folder: Path, manifest: Manifest) -> Iterator[Part]:
    """Yield the parts of each rank: of every parameter one, all equally long but for the padding."""
    groups = _load(_shards(folder, manifest, "model")[0])["param_shapes"]
    shards = _shards(folder, manifest, "optim")
    for rank, path in enumerate(shards):
        state = _load(path)["optimizer_state_dict"]
        for group, shapes in enumerate(groups):
            moments = state["optimizer_state_dict"]["state"][group]
            streams, start = _streams(state["fp32_flat_groups"][group], moments), 0
            for name, shape in shapes.items():
                size = math.ceil(shape.numel() / len(shards))
                yield from _parts(name, streams, start, min(size, shape.numel() - rank * size), rank * size)
                start += size


def _parts(name: str, streams: dict[str, Tensor], start: int, numel: int, first_element: int) -> Iterator[Part]:
    if numel > 0:
        for stream, values in streams.items():
            yield stream, name, values[start : start + numel], first_element


def _streams(weights: Tensor, moments: Mapping[str, Any]) -> dict[str, Tensor]:
    found = {key: moments[key] for key in STATES if torch.is_tensor(moments.get(key))}
    return {stream: values.detach().view(-1) for stream, values in {WEIGHTS: weights, **found}.items()}


def _shards(folder: Path, manifest: Manifest, kind: str) -> list[Path]:
    """Return the shards of one kind in the order of the ranks."""
    matches = [match for name in manifest.files if (match := SHARD.search(name)) and match[3] == kind]
    return [folder / match.string for match in sorted(matches, key=lambda match: int(match[1]))]


def _load(path: Path) -> Any:
    # Mapped, so that of a large shard only what is read takes memory.
    return torch.load(path, map_location="cpu", weights_only=False, mmap=zipfile.is_zipfile(path))
