"""The digest of an engine's optimizer state: it depends neither on how many ranks share it nor on the ZeRO stage."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pathswitch.checkpoint import Finding, StreamDigest
from pathswitch.integrations.collective import gather

logger = logging.getLogger("pathswitch")

WEIGHTS = "weights"
# Of AdamW, AMSGrad, momentum and PathSwitchAdamW. Others may well differ from rank to rank, or start anew with a load.
STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "average")

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
    yield from _fragments(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups)


def _bf16(engine: Any) -> Iterator[Piece]:
    yield from _fragments(engine.optimizer.bf16_groups, engine.optimizer.fp32_groups_flat_partition)


def _fragments(groups: list[list[Any]], masters: list[Tensor]) -> Iterator[Piece]:
    """Yield what this rank's part of each flat group has of its parameters, without the padding between and behind."""
    for group, master in zip(groups, masters, strict=True):
        for parameter in group:
            if (mapping := parameter._hp_mapping) is not None:
                place = mapping.hp_fragment_address
                yield Piece(parameter, mapping.lp_fragment_address.start, master, place.start, place.numel)


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
            if dist.get_world_size(process_group) != engine.seq_dp_world_size:
                raise NotUnderstood("parameters are cut among a part of the ranks")
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
