"""The digest of an engine's optimizer state: it depends neither on how many ranks share it nor on the ZeRO stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pathswitch.checkpoint import Finding, StreamDigest
from pathswitch.integrations.collective import gather

logger = logging.getLogger("pathswitch")

WEIGHTS, AVERAGE = "weights", "average"
# Of AdamW, AMSGrad, momentum and PathSwitchAdamW. Others may well differ from rank to rank, or start anew with a load.
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", AVERAGE)

Digests = dict[str, StreamDigest]


class NotUnderstood(Exception):
    """The engine keeps its state in a way that is not known here; says what it is."""


@dataclass(frozen=True)
class Piece:
    """Neighbouring elements of one parameter, as this rank has them."""

    parameter: Tensor
    """The model's, which has the name."""
    first_element: int
    """Of the parameter, counted row by row."""
    master: Tensor
    """Holds the weights that the optimizer updates, and is its key to the moments."""
    start: int
    """Where in the master, and in each of its moments, the elements begin."""
    numel: int


def state_digest(engine: Any) -> Digests | None:
    """Return the digest of each part of the optimizer's state, over all ranks, on all ranks; None where it has none.

    Weights are the float32 ones. States that do not exist yet are left out, as before the first update; so is
    everything where the layout is not known, and a line of the log says so.
    """
    leaders = gather(_first_rank_of_replicas(engine))
    shards = sorted(set(leaders))
    # Model-parallel ranks have other elements under the same name. Their number is that of all jobs of a checkpoint.
    suffix = f"@{shards.index(leaders[dist.get_rank()])}" if len(shards) > 1 else ""
    parts = gather(_own_part(engine, suffix))
    reasons = [reason for _, reason in parts if reason]
    if reasons:
        if dist.get_rank() == 0:
            _warn_once(reasons[0])
        return None
    from pathswitch.kernels.digest import merged

    return _from_dict(merged(part for part, _ in parts)) or None


def digests_of(parts: Iterable[tuple[str, str, Tensor, int]]) -> Digests:
    """Return the digests of (stream, parameter's name, values, place of the first in the parameter)."""
    from pathswitch.kernels.digest import StateDigest

    digest = StateDigest()
    for stream, name, values, first_element in parts:
        digest.add(stream, name, values, first_element)
    return _from_dict(digest.to_dict())


def part_of(offset: int, numel: int, begin: int, size: int) -> tuple[int, int, int]:
    """Return which elements of a parameter a rank's partition of a flat group has, if the last number is above 0.

    Args:
        offset: where the parameter begins in the flat group.
        numel: its elements.
        begin: where the partition begins in the flat group.
        size: the partition's elements.

    Returns:
        The first of the elements in the parameter, its place in the partition, and how many there are.
    """
    first = max(0, begin - offset)
    return first, offset + first - begin, min(numel, begin + size - offset) - first


def _from_dict(streams: Mapping[str, Mapping[str, Any]]) -> Digests:
    return {stream: StreamDigest(**content) for stream, content in streams.items()}


def differences(expected: Digests, found: Digests) -> list[Finding]:
    """Return which of the expected streams are others; more streams than expected are none of its business."""
    return [
        Finding(stream, str(digest), str(found.get(stream, "nothing")))
        for stream, digest in expected.items()
        if found.get(stream) != digest
    ]


@cache
def _warn_once(reason: str) -> None:
    logger.warning("pathswitch: checkpoints have no digest of the optimizer state: %s", reason)


def _first_rank_of_replicas(engine: Any) -> int:
    """Return the first of the ranks among which data parallelism has replicated, or ZeRO has cut, the same state."""
    try:
        return int(dist.get_process_group_ranks(engine.seq_data_parallel_group)[0])
    except (AttributeError, RuntimeError, ValueError, IndexError):
        return -1


def _own_part(engine: Any, suffix: str) -> tuple[dict[str, dict[str, Any]], str | None]:
    """Return the digest of this rank's pieces, or why there is none."""
    try:
        # Imported where it is used: what loads and saves nothing needs no kernels.
        from pathswitch.kernels.digest import StateDigest

        digest = StateDigest()
        for piece in _pieces(engine):
            name = engine.param_names[piece.parameter] + suffix
            for stream, values in _streams(piece, _base_optimizer(engine).state.get(piece.master, {})):
                digest.add(stream, name, values, piece.first_element)
        return digest.to_dict(), None
    except NotUnderstood as reason:
        return {}, str(reason)
    except Exception as error:  # another DeepSpeed may keep other things in its attributes: no reason to lose a save
        return {}, f"{type(engine.optimizer).__name__}: {type(error).__name__}: {error}"


def _streams(piece: Piece, state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    yield WEIGHTS, _elements(piece, piece.master)
    for key in STATES:
        values = state.get(key)
        if torch.is_tensor(values) and values.shape == piece.master.shape:
            yield key, _elements(piece, values)


def _elements(piece: Piece, values: Tensor) -> Tensor:
    if not values.dtype.is_floating_point or values.element_size() not in (2, 4):
        raise NotUnderstood(f"values of type {values.dtype}")
    return values.detach().contiguous().view(-1).narrow(0, piece.start, piece.numel)


def _base_optimizer(engine: Any) -> Any:
    optimizer = engine.optimizer
    return optimizer if isinstance(optimizer, torch.optim.Optimizer) else optimizer.optimizer


def _pieces(engine: Any) -> Iterator[Piece]:
    """Yield the pieces of which this rank is in charge: all ranks' together are every element once.

    Raises:
        NotUnderstood: the optimizer is not one of those that are known here, or set up in another way.
    """
    optimizer = engine.optimizer
    if any(not getattr(parameter, "allreduce", True) for parameter in engine.module.parameters()):
        raise NotUnderstood("experts, of which ranks have others under the same name")
    # By exact class: those derived from them keep parts of the state elsewhere.
    cut = _CUT.get(type(optimizer).__name__)
    if cut is not None:
        yield from cut(engine)
        return
    replicated = _REPLICATED.get(type(optimizer).__name__)
    if replicated is None and isinstance(optimizer, torch.optim.Optimizer):
        replicated = _plain
    if replicated is None:
        raise NotUnderstood(f"{type(optimizer).__name__} is not known")
    if dist.get_rank(engine.seq_data_parallel_group) == 0:
        yield from replicated(optimizer)


def _zero_1_and_2(engine: Any) -> Iterator[Piece]:
    optimizer = engine.optimizer
    # Not DeepSpeed's own map from parameters to partitions, which is wrong with round_robin_gradients.
    groups = optimizer.round_robin_bit16_groups
    offsets = getattr(optimizer, "round_robin_bit16_offsets", None)  # from DeepSpeed 0.19 on: they may be aligned
    yield from _flat_partitions(engine, groups, offsets, optimizer.single_partition_of_fp32_groups)


def _bf16(engine: Any) -> Iterator[Piece]:
    optimizer = engine.optimizer
    if optimizer.using_real_optimizer:
        yield from _flat_partitions(engine, optimizer.bf16_groups, None, optimizer.fp32_groups_flat_partition)


def _flat_partitions(
    engine: Any, groups: list[list[Any]], offsets: list[list[int]] | None, masters: list[Tensor]
) -> Iterator[Piece]:
    """Yield what this rank's part of each flat group has of its parameters, without the padding between and behind.

    Raises:
        NotUnderstood: a group is cut among fewer ranks than there are.
    """
    for index, (group, master, process_group) in enumerate(
        zip(groups, masters, engine.optimizer.real_dp_process_group, strict=True)
    ):
        _require_all_ranks(engine, process_group)
        begin = dist.get_rank(process_group) * master.numel()
        places = accumulate((p.numel() for p in group), initial=0) if offsets is None else offsets[index]
        for parameter, offset in zip(group, places, strict=False):
            first, start, numel = part_of(offset, parameter.numel(), begin, master.numel())
            if numel > 0:
                yield Piece(parameter, first, master, start, numel)


def _require_all_ranks(engine: Any, process_group: Any) -> None:
    if dist.get_world_size(process_group) != engine.seq_dp_world_size:
        raise NotUnderstood("parameters are cut among a part of the ranks")


def _zero_3(engine: Any) -> Iterator[Piece]:
    """Yield this rank's part of each parameter: all ranks' parts are equally long, and the last ones padded.

    Raises:
        NotUnderstood: on NVMe, or cut among fewer ranks than there are.
    """
    optimizer = engine.optimizer
    if optimizer.swap_optimizer:
        raise NotUnderstood("the optimizer state is offloaded to NVMe")
    if getattr(optimizer, "zenflow", False):
        raise NotUnderstood("ZenFlow keeps parts of the state of its own")
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True):
        start = 0
        for parameter in group:
            process_group, size = parameter.ds_process_group, parameter.partition_numel()
            _require_all_ranks(engine, process_group)
            first = dist.get_rank(process_group) * size
            numel = min(size, parameter.ds_numel - first)
            if numel > 0:
                yield Piece(parameter, first, master, start, numel)
            start += size


def _flat_groups(optimizer: Any) -> Iterator[Piece]:
    for group, master in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
        start = 0
        for parameter in group:
            yield Piece(parameter, 0, master, start, parameter.numel())
            start += parameter.numel()


def _master_copies(optimizer: Any) -> Iterator[Piece]:
    for group, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
        for parameter, master in zip(group, masters, strict=True):
            yield Piece(parameter, 0, master, 0, parameter.numel())


def _plain(optimizer: Any) -> Iterator[Piece]:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:  # as DeepSpeed's optimizers have it, which keep no frozen ones
                yield Piece(parameter, 0, parameter, 0, parameter.numel())


_CUT: dict[str, Callable[[Any], Iterator[Piece]]] = {
    "DeepSpeedZeroOptimizer": _zero_1_and_2,
    "BF16_Optimizer": _bf16,
    "DeepSpeedZeroOptimizer_Stage3": _zero_3,
}
_REPLICATED: dict[str, Callable[[Any], Iterator[Piece]]] = {
    "FP16_Optimizer": _flat_groups,
    "FP16_UnfusedOptimizer": _master_copies,
}
