"""PTX text as instructions: the part of the language that nvcc and NVRTC write for the kernels."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

WIDTHS = {"pred": 0, "b16": 2, "b32": 4, "b64": 8, "f32": 4, "f64": 8}


class Unsupported(Exception):
    """The text has something that the interpreter does not know."""


@dataclass(frozen=True)
class Register:
    """A register by name, a special one such as %tid.x, or _ for what nobody wants."""

    name: str


@dataclass(frozen=True)
class Immediate:
    """A constant: its bits, and whether they are those of a float."""

    bits: int
    is_float: bool = False


@dataclass(frozen=True)
class Symbol:
    """The name of a parameter or of a shared variable, as its address."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset]."""

    base: Register | Symbol
    offset: int


@dataclass(frozen=True)
class Several:
    """{a, b, ...}, or a|b of a shuffle."""

    registers: tuple[Register, ...]


Operand = Register | Immediate | Symbol | Address | Several


@dataclass(frozen=True)
class Instruction:
    """One instruction; ``guard`` is the predicate under which it runs."""

    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Register | None = None
    negated: bool = False


@dataclass
class Kernel:
    """An entry: sizes of its parameters and shared variables in bytes, widths of its registers, instructions."""

    name: str
    parameters: dict[str, int]
    shared: dict[str, tuple[int, int]] = field(default_factory=dict)  # offset, size
    widths: dict[str, int] = field(default_factory=dict)  # by the register's prefix
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)

    @property
    def shared_bytes(self) -> int:
        """The size of all shared variables."""
        return max((offset + size for offset, size in self.shared.values()), default=0)


def kernel_names(text: str) -> list[str]:
    """Return the names of a module's kernels."""
    return re.findall(r"\.entry (\w+)\(", text)


def parse(text: str, name: str) -> Kernel:
    """Return one kernel of a module.

    Raises:
        Unsupported: the kernel has something that the interpreter does not know.
    """
    if found := re.search(rf"\.entry {name}\((.*?)\)[^{{]*\n\{{\n(.*?)\n\}}", text, re.DOTALL):
        header, body = found.groups()
    else:
        raise Unsupported(f"no kernel {name}")
    sizes = {"u64": 8, "b64": 8, "u32": 4, "b32": 4, "f32": 4, "s32": 4, "s64": 8}
    kernel = Kernel(name, {})
    for declaration in header.split(","):
        words = declaration.split()
        array = re.fullmatch(r"(\w+)\[(\d+)\]", words[-1])
        if array:
            kernel.parameters[array[1]] = int(array[2])
        else:
            kernel.parameters[words[-1]] = sizes[words[1].lstrip(".")]
    for line in body.splitlines():
        _parse_line(kernel, line.split("//")[0].strip())
    return kernel


def _parse_line(kernel: Kernel, line: str) -> None:
    if not line or line in "{}" or line.startswith((".pragma", ".loc")):
        return
    if found := re.fullmatch(r"\.reg \.(\w+)\s+%(\w+)<\d+>;", line):
        kernel.widths[found[2]] = WIDTHS[found[1]]
    elif found := re.fullmatch(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\];", line):
        offset = -(-kernel.shared_bytes // int(found[1])) * int(found[1])
        kernel.shared[found[2]] = (offset, int(found[3]))
    elif found := re.fullmatch(r"([$\w]+):", line):
        kernel.labels[found[1]] = len(kernel.code)
    elif found := re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*?);", line):
        negated, guard, opcode, rest = found.groups()
        parts = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,]*", rest)
        operands = tuple(_operand(part.strip()) for part in parts)
        register = Register(guard) if guard else None
        kernel.code.append(Instruction(line, opcode, operands, register, bool(negated)))
    else:
        raise Unsupported(line)


def _operand(text: str) -> Operand:
    if text[0] == "[":
        base, _, offset = text[1:-1].partition("+")
        named = Register(base) if base[0] == "%" else Symbol(base)
        return Address(named, int(offset or 0))
    if text[0] == "{" or "|" in text:
        return Several(tuple(Register(name) for name in re.findall(r"%[\w.]+|\b_\b", text)))
    if text[0] == "%":
        return Register(text)
    if found := re.fullmatch(r"0[fFdD]([0-9A-Fa-f]+)", text):
        return Immediate(int(found[1], 16), is_float=True)
    if re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)U?", text):
        return Immediate(int(text.rstrip("U"), 0))
    return Symbol(text)
