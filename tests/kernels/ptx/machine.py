"""Blocks of threads that execute PTX in lock-step: those that stand at the lowest instruction take the next step."""

from __future__ import annotations

import re
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from ptx.memory import Region, Space, Threads, Violation
from ptx.operations import DTYPES, operation
from ptx.text import Address, Immediate, Instruction, Kernel, Operand, Register, Several, Symbol, Unsupported

Array = NDArray[Any]
WARP = 32
PARAMETERS_AT, SHARED_AT = 1 << 12, 1 << 16
UNSIGNED = {0: np.bool_, 2: np.uint16, 4: np.uint32, 8: np.uint64}
READY, AT_BARRIER, AT_SHUFFLE = 0, 1, 2


class Machine:
    """One launch: registers of all its threads, parameters, shared memory of each block."""

    def __init__(
        self,
        kernel: Kernel,
        grid: int,
        block: int,
        arguments: Sequence[bytes],
        memory: Space,
        blocks: Sequence[int] | None = None,
    ) -> None:
        """Prepare the launch of ``grid`` blocks, or of these ``blocks`` of them alone.

        Raises:
            Violation: the arguments have not the kernel's number and sizes.
        """
        chosen = np.arange(grid) if blocks is None else np.array(blocks)
        self._kernel, self._memory, self._block_size = kernel, memory, block
        count = len(chosen) * block
        thread = np.arange(count)
        self._block, self._warp = thread // block, thread // block * (-(-block // WARP)) + thread % block // WARP
        self._lane, self._thread = thread % block % WARP, thread
        self._special = {
            "%tid.x": (thread % block).astype(np.uint32),
            "%ctaid.x": chosen[self._block].astype(np.uint32),
            "%ntid.x": np.full(count, block, np.uint32),
            "%nctaid.x": np.full(count, grid, np.uint32),
        }
        self._registers: dict[str, Array] = {}
        self._parameters, self._symbols = _parameters(kernel, arguments)
        self._symbols |= {name: SHARED_AT + offset for name, (offset, _) in kernel.shared.items()}
        size = kernel.shared_bytes
        self._shared = Region("shared memory", 0, np.zeros(len(chosen) * size, np.uint8), written=False)
        self._counter, self._state = np.zeros(count, np.int64), np.zeros(count, np.int64)
        self._epoch = np.zeros(count, np.int64)
        self.executed: Counter[str] = Counter()
        memory.begin()

    def run(self) -> None:
        """Run all threads to their end.

        Raises:
            Violation: a kernel has done what it must not do.
            Unsupported: an instruction is not known.
        """
        end = len(self._kernel.code)
        with np.errstate(all="ignore"):
            while (self._counter < end).any():
                ready = (self._counter < end) & (self._state == READY)
                if not ready.any():
                    self._release()
                    continue
                place = int(self._counter[ready].min())
                self._step(self._kernel.code[place], place, np.nonzero(ready & (self._counter == place))[0])

    def _step(self, instruction: Instruction, place: int, threads: Array) -> None:
        self.executed[instruction.opcode] += len(threads)
        self._counter[threads] = place + 1
        if instruction.guard is not None:
            condition = self._registers[instruction.guard.name][threads]
            threads = threads[condition != instruction.negated]
            if not len(threads):
                return
        root = instruction.opcode.partition(".")[0]
        if root == "bra":
            target = instruction.operands[-1]
            assert isinstance(target, Symbol)
            self._counter[threads] = self._kernel.labels[target.name]
        elif root in ("ret", "exit"):
            self._counter[threads] = len(self._kernel.code)
        elif root in ("bar", "barrier"):
            self._counter[threads], self._state[threads] = place, AT_BARRIER
        elif root == "shfl":
            self._shuffle(instruction, place, threads)
        elif root in ("ld", "st"):
            self._access(instruction, threads)
        elif root in ("atom", "red"):
            self._atomic(instruction, threads)
        else:
            self._compute(instruction, threads)

    def _release(self) -> None:
        """Let the blocks go on whose threads all stand at one barrier; where there is none, nobody ever will."""
        released = False
        for block in np.unique(self._block[self._state == AT_BARRIER]):
            members = self._block == block  # those that have ended too: a barrier is for all threads or for none
            if (self._state[members] == AT_BARRIER).all() and len(np.unique(self._counter[members])) == 1:
                self._state[members] = READY
                self._counter[members] += 1
                self._epoch[members] += 1
                released = True
        if not released:
            raise Violation("threads wait for each other at different barriers or shuffles")

    def _shuffle(self, instruction: Instruction, place: int, threads: Array) -> None:
        """Exchange within the warps whose lanes are all here; the others wait for theirs."""
        if not instruction.opcode.startswith("shfl.sync.down"):
            raise Unsupported(instruction.text)
        target, source, offset, clamp, mask = instruction.operands
        if (self._get(mask, "b32", threads) != 0xFFFFFFFF).any():
            raise Unsupported(instruction.text)
        waiting = np.nonzero((self._state == AT_SHUFFLE) & (self._counter == place))[0]
        here = np.union1d(threads, waiting)
        present = np.bincount(self._warp[here], minlength=int(self._warp.max()) + 1)
        complete = present[self._warp[here]] == WARP
        self._counter[here[~complete]], self._state[here[~complete]] = place, AT_SHUFFLE
        here = here[complete]
        if not len(here):
            return
        self._counter[here], self._state[here] = place + 1, READY
        lane, distance = self._lane[here], self._get(offset, "u32", here).astype(np.int64)
        control = self._get(clamp, "u32", here).astype(np.int64)
        segment, limit = control >> 8 & 31, control & 31
        last = (lane & segment) | (limit & ~segment)
        inside = lane + distance <= last
        values = self._get(source, "b32", np.arange(len(self._thread)))
        result = values[np.where(inside, here + distance, here)]
        names = target.registers if isinstance(target, Several) else (target,)
        for name, value in zip(names, (result, inside), strict=False):
            self._set(name, value, here)

    def _access(self, instruction: Instruction, threads: Array) -> None:
        root, *modifiers = instruction.opcode.split(".")
        modifiers = [word for word in modifiers if word not in ("nc", "volatile", "weak")]
        space, kind = modifiers[0], modifiers[-1]
        where, what = instruction.operands if root == "st" else reversed(instruction.operands)
        registers = what.registers if isinstance(what, Several) else (what,)
        width = DTYPES[kind].itemsize
        assert isinstance(where, Address)
        addresses = self._addresses(where, threads)
        who = Threads(self._thread[threads], self._block[threads], self._epoch[threads])
        if root == "st":
            columns = [self._get(register, kind, threads).view(np.uint8).reshape(-1, width) for register in registers]
            self._store(space, addresses, np.concatenate(columns, axis=1), who)
            return
        content = self._load(space, addresses, width * len(registers), who)
        for number, register in enumerate(registers):
            piece = np.ascontiguousarray(content[:, number * width : (number + 1) * width])
            self._set(register, piece.view(DTYPES[kind])[:, 0], threads)

    def _addresses(self, where: Address, threads: Array) -> Array:
        short = isinstance(where.base, Register) and self._width(where.base) == 4
        base = self._get(where.base, "u32" if short else "u64", threads).astype(np.uint64)
        result: Array = base + np.uint64(where.offset % 2**64)
        return result

    def _load(self, space: str, addresses: Array, width: int, who: Threads) -> Array:
        if space == "global":
            return self._memory.load(addresses, width, who)
        if space == "shared":
            return self._shared.load(self._in_shared(addresses, width, who), width, who.of(np.arange(len(addresses))))
        if space != "param":
            raise Unsupported(f"ld.{space}")
        offsets = addresses.astype(np.int64) - PARAMETERS_AT
        if (
            (addresses % np.uint64(width)).any()
            or (offsets + width > len(self._parameters)).any()
            or (offsets < 0).any()
        ):
            raise Violation("a read outside the kernel's parameters")
        return self._parameters[offsets[:, None] + np.arange(width)]

    def _store(self, space: str, addresses: Array, values: Array, who: Threads) -> None:
        if space == "global":
            self._memory.store(addresses, values, who)
        elif space == "shared":
            everyone = np.arange(len(addresses))
            self._shared.store(self._in_shared(addresses, values.shape[1], who), values, who.of(everyone))
        else:
            raise Unsupported(f"st.{space}")

    def _in_shared(self, addresses: Array, width: int, who: Threads) -> Array:
        size, offsets = self._kernel.shared_bytes, addresses.astype(np.int64) - SHARED_AT
        if (offsets < 0).any() or (offsets + width > size).any() or (offsets % width).any():
            raise Violation("shared memory: out of bounds or misaligned")
        result: Array = who.block * size + offsets
        return result

    def _atomic(self, instruction: Instruction, threads: Array) -> None:
        opcode = instruction.opcode.replace(".relaxed.gpu", "")  # what no qualifier means
        if opcode not in ("atom.global.add.u64", "red.global.add.u64"):
            raise Unsupported(instruction.text)
        *target, where, value = instruction.operands
        assert isinstance(where, Address)
        addresses = self._addresses(where, threads)
        before = self._memory.add(addresses, self._get(value, "u64", threads))
        if target:
            self._set(target[0], before, threads)

    def _compute(self, instruction: Instruction, threads: Array) -> None:
        opcode, (target, *sources) = instruction.opcode, instruction.operands
        if opcode.startswith("mov") and isinstance(target, Several):
            bits = int(opcode[-2:]) // len(target.registers)
            value = self._get(sources[0], opcode.split(".")[1], threads)
            for number, register in enumerate(target.registers):
                part = np.right_shift(value, value.dtype.type(number * bits)).astype(f"u{bits // 8}")
                self._set(register, part, threads)
        elif opcode.startswith("mov") and isinstance(sources[0], Several):
            kind, registers = f"u{opcode[-2:]}", sources[0].registers
            bits = int(opcode[-2:]) // len(registers)
            whole = np.zeros(len(threads), DTYPES[kind])
            for number, register in enumerate(registers):
                part = self._get(register, f"u{bits}", threads).astype(whole.dtype)
                whole |= np.left_shift(part, whole.dtype.type(number * bits))
            self._set(target, whole, threads)
        elif opcode.startswith("cvta"):
            self._set(target, self._get(sources[0], "u64", threads), threads)
        else:
            known = operation(opcode)
            values = [self._get(s, kind, threads) for s, kind in zip(sources, known.sources, strict=True)]
            self._set(target, known.function(*values), threads)

    def _get(self, operand: Operand, kind: str, threads: Array) -> Array:
        dtype = DTYPES[kind]
        if isinstance(operand, Register):
            if operand.name in self._special:
                return self._special[operand.name][threads].view(dtype)
            if operand.name not in self._registers:
                raise Violation(f"{operand.name} is read and was never written")
            bits = self._registers[operand.name][threads]
            narrow = bits if kind == "pred" else bits.astype(f"u{dtype.itemsize}", copy=False)
            return narrow.view(dtype)
        if isinstance(operand, Immediate):
            size = np.dtype(dtype).itemsize
            scalar = np.frombuffer(struct.pack("<Q", operand.bits % 2 ** (8 * size))[:size], dtype)[0]
            return np.full(len(threads), scalar)
        if isinstance(operand, Symbol):
            return np.full(len(threads), self._symbols[operand.name], np.uint64).astype(dtype)
        raise Unsupported(str(operand))

    def _width(self, register: Register) -> int:
        return self._kernel.widths[re.sub(r"\d+$", "", register.name[1:])]

    def _set(self, operand: Operand, value: Array, threads: Array) -> None:
        if not isinstance(operand, Register):
            raise Unsupported(str(operand))
        if operand.name == "_":
            return
        width = self._width(operand)
        if operand.name not in self._registers:
            self._registers[operand.name] = np.zeros(len(self._thread), UNSIGNED[width])
        register = self._registers[operand.name]
        if width and value.dtype.itemsize < width:  # a wider register keeps the value, with its sign
            value = value.astype(f"{value.dtype.kind}{width}")
        register[threads] = value.view(f"u{value.dtype.itemsize}") if width else value


def _parameters(kernel: Kernel, arguments: Sequence[bytes]) -> tuple[Array, dict[str, int]]:
    """Return the parameters' bytes as a kernel finds them, and their addresses."""
    sizes, given = list(kernel.parameters.values()), [len(argument) for argument in arguments]
    if sizes != given:
        raise Violation(f"{kernel.name}: given arguments of {given} bytes; it takes {sizes}")
    content, places = b"", {}
    for (name, _), argument in zip(kernel.parameters.items(), arguments, strict=True):
        content += b"\0" * (-len(content) % 8)
        places[name] = PARAMETERS_AT + len(content)
        content += argument
    return np.frombuffer(content, np.uint8), places
