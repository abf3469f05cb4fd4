"""The digest of an optimizer's state: 128 bits that do not depend on how the state is cut into shards.

A stream (weights, first moments, second moments) has the sum over its parameters of key(name) times the parameter's
digest, in two lanes modulo 2^64. Parts of several ranks add up, so equal digests before and after a fork, a conversion
or another number of ranks show that no bit was lost. It finds damage, not an adversary: it is no cryptographic hash.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from pathswitch.errors import KernelError
from pathswitch.kernels.layouts import Kernels
from pathswitch.kernels.ops import backend
from pathswitch.kernels.reference import ReferenceKernels

logger = logging.getLogger("pathswitch")

_MASK = 2**64 - 1
Parts = Mapping[str, Mapping[str, Any]]


class StateDigest:
    """Adds up the pieces of a state that one rank has; each element must be added by exactly one rank."""

    def __init__(self) -> None:
        self._pieces: dict[str, list[tuple[str, Tensor]]] = {}
        self._elements: dict[str, int] = {}

    def add(self, stream: str, name: str, piece: Tensor, first_element: int) -> None:
        """Add elements ``first_element`` on of the parameter ``name``; contiguous, of 16 or 32 bits."""
        out = torch.zeros(2, dtype=torch.int64, device=piece.device)
        _kernels(piece.device).digest(piece.detach(), first_element, out)
        self._pieces.setdefault(stream, []).append((name, out))
        self._elements[stream] = self._elements.get(stream, 0) + piece.numel()

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Return for each stream its digest, 32 hex digits, and the number of elements that were added."""
        result = {}
        for stream, pieces in self._pieces.items():
            lanes = [0, 0]
            for name, out in pieces:
                for lane, value in enumerate(out.tolist()):
                    lanes[lane] = (lanes[lane] + _name_key(name, lane) * (value & _MASK)) & _MASK
            result[stream] = _stream(lanes, self._elements[stream])
        return result


def merged(parts: Iterable[Parts]) -> dict[str, dict[str, Any]]:
    """Return the digests of a state whose parts were added up separately."""
    totals: dict[str, tuple[list[int], int]] = {}
    for part in parts:
        for stream, content in part.items():
            value, elements = int(content["digest"], 16), int(content["elements"])
            lanes, count = totals.get(stream, ([0, 0], 0))
            sums = [(lanes[0] + (value >> 64)) & _MASK, (lanes[1] + (value & _MASK)) & _MASK]
            totals[stream] = (sums, count + elements)
    return {stream: _stream(lanes, count) for stream, (lanes, count) in sorted(totals.items())}


def _stream(lanes: list[int], elements: int) -> dict[str, Any]:
    return {"digest": f"{lanes[0]:016x}{lanes[1]:016x}", "elements": elements}


@cache
def _name_key(name: str, lane: int) -> int:
    content = hashlib.blake2b(name.encode(), digest_size=16).digest()
    return int.from_bytes(content[8 * lane : 8 * lane + 8], "little") | 1


@cache
def _kernels(device: torch.device) -> Kernels:
    """Return the compiled kernels, or torch's operations, which are slower, where nothing can be compiled."""
    try:
        return backend(device)
    except KernelError as error:
        logger.warning("pathswitch: the state's digest is computed by torch's own operations, slower: %s", error)
        return ReferenceKernels()
