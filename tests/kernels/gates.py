"""The gates that a kernel passes before it is believed: each returns what it has seen, or raises Violation.

standin       the kernels' source on CPU fibers, threads in three orders, against the reference's bits and guards
ptx           what the compiler made of it: the same bits; bounds, alignment, races, values that nobody has written
far           the same for the last block of tensors with 2^31 to 2^33 elements
traffic       bytes and sectors of 32 bytes that the compiled kernel asks memory for
rounding      only operations that are rounded correctly, in the whole PTX
machine code  vector instructions, registers, no local memory, for each architecture
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from engines import FORWARD, RANDOM, REVERSE, Ptx, Standin, regions, require_equal
from problems import (
    DIGESTS,
    GUARD_BYTES,
    SIZES,
    TYPES,
    VARIANTS,
    Problem,
    Size,
    Variant,
    adamw_problem,
    digest_problem,
    norm_problem,
    prepare_problem,
    sum_problem,
)
from problems_far import far_problems
from problems_prepare import PREPARATIONS
from ptx.memory import Region, Violation
from toolchain import MachineCode

from pathswitch.kernels.cuda import LOW_NAMES
from pathswitch.kernels.layouts import TYPES as TYPE_NAMES

ORDERS = {"forward": FORWARD, "reverse": REVERSE, "random": RANDOM}
MAX_REGISTERS = 64  # of 65536: four blocks of 256 threads on a multiprocessor
SPREAD = 1.1  # sectors over payload, at most
ADAMW_NAMES: dict[str, Variant] = {
    f"ps_adamw_{TYPE_NAMES[g]}_{LOW_NAMES[low]}{'_average' * average}": (g, low, average)
    for g, low, average in VARIANTS
}
NORM_NAMES = {f"ps_norm_{TYPE_NAMES[dtype]}": dtype for dtype in TYPES}
DIGEST_NAMES = {"ps_digest_32": 4, "ps_digest_16": 2}
STREAMING = (*ADAMW_NAMES, *NORM_NAMES, *DIGEST_NAMES)  # those that go over tensors


def problems_of(kernel: str, guard_bytes: int = GUARD_BYTES) -> list[Callable[[], Problem]]:
    """Return what makes the problems of a kernel, each call anew."""
    if kernel in ADAMW_NAMES:
        return [partial(adamw_problem, ADAMW_NAMES[kernel], SIZES, guard_bytes)]
    if kernel in NORM_NAMES:
        return [partial(norm_problem, NORM_NAMES[kernel], (), guard_bytes)]
    if kernel in DIGEST_NAMES:
        cases = [case for case in DIGESTS if case[0] == DIGEST_NAMES[kernel]]
        return [partial(digest_problem, *case, guard_bytes) for case in cases]
    if kernel == "ps_prepare":
        return [partial(prepare_problem, spec, guard_bytes) for spec in PREPARATIONS]
    return [partial(sum_problem, tiles, guard_bytes) for tiles in (0, 7, 256, 700)]


def needs(kernel: str) -> tuple[str, ...]:
    """Return the kernels that the problems of a kernel launch."""
    return (kernel, *(("ps_sum_tiles",) if kernel in NORM_NAMES else ()))


@cache
def expected_of(kernel: str) -> list[Problem]:
    """Return a kernel's problems as the reference solves them."""
    solved = []
    for make in problems_of(kernel):
        solved.append(make())
        solved[-1].expect()
    return solved


def standin_gate(engine: Standin, kernel: str) -> int:
    """Run a kernel's problems on the stand-in driver in each order; return how often."""
    runs = 0
    for make, expected in zip(problems_of(kernel), expected_of(kernel), strict=True):
        for name, order in ORDERS.items():
            found = make()
            engine.run(found.launches(), order)
            require_equal(found, expected, f"{kernel}, threads in {name} order")
            runs += 1
    return runs


def ptx_gate(engine: Ptx, kernel: str) -> int:
    """Run a kernel's problems in the interpreter; return how many."""
    for make, expected in zip(problems_of(kernel), expected_of(kernel), strict=True):
        found = make()
        engine.run(found.launches(), regions(found))
        require_equal(found, expected, kernel)
    return len(problems_of(kernel))


def far_gate(engine: Ptx, kernel: str) -> list[int]:
    """Run the last blocks of huge tensors; return their numbers of elements."""
    sizes = []
    for far in far_problems(kernel):
        engine.run(far.launches, far.memory, far.blocks)
        require_equal(far.found, far.expected, f"{kernel}, {far.numel} elements")
        sizes.append(far.numel)
    return sizes


def traffic_gate(engine: Ptx, kernel: str) -> tuple[float, float]:
    """Return bytes and sector bytes per element for aligned tensors; scalars, partial sums and results not counted."""
    problem, numel, wanted = _aligned(kernel)
    memory = regions(problem)
    engine.run(problem.launches(), memory)
    tensors = [region for region in memory.regions if re.fullmatch(r"[gwmvlax]\d*", region.name)]
    others = [region for region in memory.regions if region not in tensors]
    payload, sectors = _bytes(tensors)
    if payload != wanted * numel:
        raise Violation(f"{kernel}: {payload / numel} bytes per element; it needs {wanted}")
    if sectors > SPREAD * payload:
        raise Violation(f"{kernel}: {sectors / numel} bytes in sectors per element, for {wanted} of payload")
    if _bytes(others)[1] > numel:
        raise Violation(f"{kernel}: {_bytes(others)[1] / numel} bytes per element beside the tensors")
    return payload / numel, sectors / numel


def _aligned(kernel: str) -> tuple[Problem, int, int]:
    """Return a problem of aligned tensors, its elements, and the bytes that each must cost."""
    if kernel in ADAMW_NAMES:
        grad, low, average = ADAMW_NAMES[kernel]
        size = grad.itemsize + 24 + (0 if low is None else low.itemsize) + 8 * average
        return adamw_problem((grad, low, average), [Size(3 * 2048), Size(2048, row=1)]), 4 * 2048, size
    if kernel in NORM_NAMES:
        dtype = NORM_NAMES[kernel]
        return norm_problem(dtype, [(2 * 16384, 0), (16384, 0)]), 3 * 16384, dtype.itemsize
    size = DIGEST_NAMES[kernel]
    return digest_problem(size, 8 * 1024, 1024, 0), 8 * 1024, size


def _bytes(tensors: Sequence[Region]) -> tuple[int, int]:
    traffic = [part for region in tensors for part in (region.loads, region.stores)]
    return sum(part.payload for part in traffic), sum(part.sectors for part in traffic)


def rounding_gate(text: str) -> int:
    """Return how many float operations the PTX has, all of them rounded correctly."""
    count = 0
    for opcode in re.findall(r"^\s+(?:@!?%p\d+\s+)?([a-z][\w.:]+)\s", text, re.MULTILINE):
        root, *modifiers = opcode.split(".")
        floats = [word for word in modifiers if re.fullmatch(r"b?f\d+(x2)?", word)]
        if not floats or root in ("ld", "st", "mov", "selp", "setp", "neg", "abs"):
            continue
        narrows = root == "cvt" and len(floats) == 2 and int(floats[0][-2:]) > int(floats[1][-2:])
        to_integer = root == "cvt" and modifiers[-2][0] in "us"
        allowed = [] if narrows else ["rzi"] if to_integer else ["rn"]
        if root not in ("add", "sub", "mul", "div", "sqrt", "rcp", "cvt") or modifiers[:-1][: len(allowed)] != allowed:
            raise Violation(f"{opcode} is not an operation that every machine rounds alike")
        if {"ftz", "approx", "sat"} & set(modifiers):
            raise Violation(f"{opcode} is not an operation that every machine rounds alike")
        count += 1
    return count


def machine_code_gate(code: MachineCode, kernel: str) -> tuple[int, int, int]:
    """Return registers, 128-bit loads and 128-bit stores of a kernel's machine code."""
    if local := [name for name in code.instructions if name.startswith(("LDL", "STL"))]:
        raise Violation(f"{kernel}: local memory: {local}")
    if code.stack_bytes or code.local_bytes:
        raise Violation(f"{kernel}: {code.stack_bytes} bytes of stack, {code.local_bytes} of local memory")
    if code.registers > MAX_REGISTERS:
        raise Violation(f"{kernel}: {code.registers} registers; allowed: {MAX_REGISTERS}")
    loads, stores = (
        sum(name.startswith(word) and ".128" in name for name in code.instructions) for word in ("LDG", "STG")
    )
    for what, found, wanted in zip(("loads", "stores"), (loads, stores), _vectors(kernel), strict=True):
        if found < wanted:
            raise Violation(f"{kernel}: {found} {what} of 128 bits; at least {wanted} wanted")
    return code.registers, loads, stores


def _vectors(kernel: str) -> tuple[int, int]:
    """Return the 128-bit loads and stores of the vector path at least: two groups of four float32 for each tensor."""
    if kernel in ADAMW_NAMES:
        grad, low, average = ADAMW_NAMES[kernel]
        return 2 * (3 + average + (grad.itemsize == 4)), 2 * (3 + average + (low == torch.float32))
    return int(kernel in ("ps_norm_f32", "ps_digest_32")), 0
