"""A fixed random order of n things, computed element by element in constant memory."""

from __future__ import annotations

import hashlib
import math

import numpy as np
import numpy.typing as npt

_20, _27, _30 = np.uint64(20), np.uint64(27), np.uint64(30)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def permutation(key: str, size: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where the permutation of ``0 .. size - 1`` named by ``key`` sends each ``index``.

    A Feistel network over pairs (a, b), a < rows and b < columns, with rows x columns the first such product that holds
    ``size``; a result outside is sent through again, which keeps the map one to one and is rare: fewer than
    1 + sqrt(size) pairs lie outside. Only integer arithmetic and SHA-512 of ``key`` go in, so the order is the same on
    every machine and for ever. ``size`` is 1 to 2**62, and every index lies below it. With fewer than about 16 things
    some orders come up more often than others.
    """
    columns = math.isqrt(size - 1) + 1
    rows = -(-size // columns)
    round_keys = np.frombuffer(hashlib.sha512(key.encode("utf-8")).digest(), dtype="<u8").reshape(4, 2)
    sides = (np.uint64(rows), np.uint64(columns))
    result = _rounds(index.astype(np.uint64), round_keys, sides)
    while (outside := result >= size).any():
        result[outside] = _rounds(result[outside], round_keys, sides)
    return result.astype(np.int64)


def _rounds(
    value: npt.NDArray[np.uint64], round_keys: npt.NDArray[np.uint64], sides: tuple[np.uint64, np.uint64]
) -> npt.NDArray[np.uint64]:
    rows, columns = sides
    a, b = np.divmod(value, columns)
    for key_a, key_b in round_keys:
        a = (a + _mix(b, key_a)) % rows
        b = (b + _mix(a, key_b)) % columns
    return a * columns + b


def _mix(value: npt.NDArray[np.uint64], round_key: np.uint64) -> npt.NDArray[np.uint64]:
    """Hash 64 bits to the upper 44 bits of SplitMix64's finaliser (Steele, Lea and Flood, OOPSLA 2014).

    44 bits leave room: ``a + _mix(b)`` must not wrap at 2**64, or a round would no longer be one to one.
    """
    mixed = value ^ round_key
    mixed = (mixed ^ (mixed >> _30)) * _FACTOR_1
    mixed = (mixed ^ (mixed >> _27)) * _FACTOR_2
    return mixed >> _20
