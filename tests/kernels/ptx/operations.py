"""What the instructions compute, on arrays with one element per thread; numpy rounds as IEEE 754 does.

An instruction that is not here is refused. Floats have only what is rounded correctly: no fma, no approximation, no
flushing of subnormal numbers, so that a result of the interpreter is the GPU's to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.text import Unsupported

Array = NDArray[Any]
DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"b{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"u{8 * size}": np.dtype(f"u{size}") for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": np.dtype(f"i{size}") for size in (1, 2, 4, 8)},
    **{f"f{8 * size}": np.dtype(f"f{size}") for size in (2, 4, 8)},
    "bf16": np.dtype("u2"),
}
WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}
BITWISE: dict[str, Callable[..., Array]] = {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
}
ROUNDED: dict[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.divide(x.dtype.type(1), x),
}


@dataclass(frozen=True)
class Operation:
    """A function of arrays of the types ``sources`` that gives an array of the type ``result``."""

    function: Callable[..., Array]
    sources: tuple[str, ...]
    result: str


@cache
def operation(opcode: str) -> Operation:
    """Return what an instruction computes.

    Raises:
        Unsupported: it is none of those that the kernels may have.
    """
    root, *modifiers = opcode.split(".")
    kind = modifiers[-1]
    if root == "cvt":
        return _conversion(opcode, modifiers)
    if root == "mov" and len(modifiers) == 1:
        return Operation(lambda x: x, (kind,), kind)
    if root in BITWISE and len(modifiers) == 1 and kind[0] in "bp":
        return Operation(BITWISE[root], (kind,) * (1 if root == "not" else 2), kind)
    if root == "setp":
        return _comparison(opcode, modifiers)
    if root == "selp" and len(modifiers) == 1:
        return Operation(lambda a, b, condition: np.where(condition, a, b), (kind, kind, "pred"), kind)
    if root == "bfi":
        return Operation(_inserted, (kind, kind, "u32", "u32"), kind)
    if root in ("shl", "shr") and len(modifiers) == 1:
        return _shift(root, kind)
    if kind in ("f32", "f64"):
        if root in ROUNDED and modifiers == ["rn", kind]:
            return Operation(ROUNDED[root], (kind,) * (1 if root in ("sqrt", "rcp") else 2), kind)
        if root in ("neg", "abs") and len(modifiers) == 1:
            return Operation(np.negative if root == "neg" else np.abs, (kind,), kind)
    elif integer := _integer(root, modifiers):
        return integer
    raise Unsupported(opcode)


def _integer(root: str, modifiers: list[str]) -> Operation | None:
    kind = modifiers[-1]
    functions: dict[str, Callable[..., Array]] = {
        "add": np.add,
        "sub": np.subtract,
        "min": np.minimum,
        "max": np.maximum,
        "neg": np.negative,
        "abs": np.abs,
    }
    if root in functions and len(modifiers) == 1:
        return Operation(functions[root], (kind,) * (1 if root in ("neg", "abs") else 2), kind)
    if root == "mul" and modifiers[0] == "lo":
        return Operation(np.multiply, (kind, kind), kind)
    if root == "mad" and modifiers[0] == "lo":
        return Operation(lambda a, b, c: a * b + c, (kind,) * 3, kind)
    if modifiers[0] == "wide":
        wide = WIDER[kind]
        if root == "mul":
            return Operation(lambda a, b: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]), (kind, kind), wide)
        if root == "mad":
            return Operation(
                lambda a, b, c: a.astype(DTYPES[wide]) * b.astype(DTYPES[wide]) + c, (kind, kind, wide), wide
            )
    return None


def _shift(root: str, kind: str) -> Operation:
    bits = 8 * DTYPES[kind].itemsize

    def shifted(value: Array, amount: Array) -> Array:
        count = np.minimum(amount, bits - 1).astype(value.dtype)
        result = np.left_shift(value, count) if root == "shl" else np.right_shift(value, count)
        if root == "shl" or kind[0] != "s":  # only a signed number keeps its sign when all its bits are out
            result = np.where(amount >= bits, value.dtype.type(0), result)
        return result

    return Operation(shifted, (kind, "u32"), kind)


def _inserted(field: Array, into: Array, position: Array, length: Array) -> Array:
    one = into.dtype.type(1)
    ones = np.where(length >= 8 * into.dtype.itemsize, ~into.dtype.type(0), (one << length.astype(into.dtype)) - one)
    place = position.astype(into.dtype)
    return (into & ~(ones << place)) | ((field & ones) << place)


def _comparison(opcode: str, modifiers: list[str]) -> Operation:
    if len(modifiers) != 2:
        raise Unsupported(opcode)
    name, kind = modifiers
    if name in COMPARISONS:
        if name == "ne" and kind[0] == "f":  # false for a NaN, unlike numpy's
            return Operation(lambda a, b: (a < b) | (a > b), (kind, kind), "pred")
        return Operation(COMPARISONS[name], (kind, kind), "pred")
    if kind[0] == "f" and name[:-1] in COMPARISONS and name[-1] == "u":
        compare = COMPARISONS[name[:-1]]
        return Operation(lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b), (kind, kind), "pred")
    raise Unsupported(opcode)


def _conversion(opcode: str, modifiers: list[str]) -> Operation:
    *rounding, to, source = modifiers
    if (to, rounding) == ("bf16", ["rn"]) and source == "f32":
        return Operation(_to_bf16, ("f32",), "b16")
    if (to, rounding) == ("f16", ["rn"]) and source == "f32":
        return Operation(_to_f16, ("f32",), "f16")
    floats = to[0] == "f", source[0] == "f"
    widens = floats == (True, True) and DTYPES[to].itemsize > DTYPES[source].itemsize
    expected = {(False, False): [], (True, False): ["rn"], (False, True): ["rzi"]}.get(floats, [] if widens else ["rn"])
    if rounding != expected or source == "bf16" or to == "bf16":
        raise Unsupported(opcode)
    return Operation(lambda x: x.astype(DTYPES[to]), (source,), to)


def _to_bf16(value: Array) -> Array:
    bits = value.view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(value), 0x7FFF, rounded).astype(np.uint16)


def _to_f16(value: Array) -> Array:
    bits = np.where(np.isnan(value), np.float32(0), value).astype(np.float16).view(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FFF), bits).view(np.float16)
