"""Run every gate on every kernel and print what each has seen, as a Markdown table.

    python tests/kernels/verified.py

Takes about two minutes of CPU. A gate that cannot run here says what is missing; one that finds something ends the run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
from engines import Ptx, Standin
from gates import STREAMING, far_gate, machine_code_gate, ptx_gate, rounding_gate, standin_gate, traffic_gate
from mutants import MUTANTS
from toolchain import MachineCode, machine_code, package_source, ptx_text, standin_driver

from pathswitch.kernels.compilers import ARCHITECTURES
from pathswitch.kernels.cuda import KERNELS

COLUMNS = (
    "kernel",
    "source on a CPU",
    "PTX",
    "largest tensor",
    "bytes/element",
    "in sectors",
    *(f"sm_{arch}: registers, 128-bit loads, stores" for arch in ARCHITECTURES),
)
Cell = Callable[[], str]


def cells(kernel: str, codes: dict[str, Callable[[], dict[str, MachineCode]]]) -> list[Cell]:
    """Return what makes the cells of a kernel's row."""
    source = package_source()
    ptx = lambda: Ptx(ptx_text(source))  # noqa: E731
    traffic = lambda place: f"{traffic_gate(ptx(), kernel)[place]:g}"  # noqa: E731
    streams = kernel in STREAMING
    return [
        lambda: f"{standin_gate(Standin(standin_driver(source)), kernel)} runs",
        lambda: f"{ptx_gate(ptx(), kernel)} problems",
        lambda: f"{max(far_gate(ptx(), kernel)):,}" if streams else "",
        *((lambda place=place: traffic(place) if streams else "") for place in (0, 1)),
        *(partial(_machine_code, code, kernel) for code in codes.values()),
    ]


def _machine_code(codes: Callable[[], dict[str, MachineCode]], kernel: str) -> str:
    return ", ".join(map(str, machine_code_gate(codes()[kernel], kernel)))


def main() -> None:
    """Print the table."""
    source, missing = package_source(), set()
    codes: dict[str, Callable[[], dict[str, MachineCode]]] = {
        arch: partial(machine_code, source, arch) for arch in ARCHITECTURES
    }
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for kernel in KERNELS:
        row = [f"`{kernel}`"]
        for cell in cells(kernel, codes):
            try:
                row.append(cell())
            except pytest.skip.Exception as skipped:
                missing.add(str(skipped))
                row.append("not run")
        print(f"| {' | '.join(row)} |", flush=True)
    try:
        print(f"\n{rounding_gate(ptx_text(source))} float operations in the PTX, all of them rounded correctly.")
    except pytest.skip.Exception as skipped:
        missing.add(str(skipped))
    print(f"{len(MUTANTS)} planted faults have their gates in test_mutants.py.")
    for reason in sorted(missing):
        print(f"Not run: {reason}.")


if __name__ == "__main__":
    main()
