"""Faults planted in the kernels' sources: each is found by the gate that is there for it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from engines import Ptx, Standin
from gates import far_gate, machine_code_gate, needs, ptx_gate, rounding_gate, standin_gate, traffic_gate
from mutants import MUTANTS, Mutant
from ptx.memory import Violation
from sanitized import sanitizer_gate
from toolchain import Source, machine_code, ptx_text, standin_driver

from pathswitch.kernels.compilers import CUDA_FLAGS


def _ptx_text(source: Source, mutant: Mutant) -> str:
    return ptx_text(source, flags=CUDA_FLAGS if mutant.flags is None else mutant.flags)


GATES: dict[str, Callable[[Source, Mutant], object]] = {
    "standin": lambda source, m: standin_gate(Standin(standin_driver(source)), m.kernel),
    "sanitizer": lambda source, m: sanitizer_gate(source, m.kernel),
    "ptx": lambda source, m: ptx_gate(Ptx(_ptx_text(source, m)), m.kernel),
    "far": lambda source, m: far_gate(Ptx(_ptx_text(source, m)), m.kernel),
    "traffic": lambda source, m: traffic_gate(Ptx(_ptx_text(source, m)), m.kernel),
    "rounding": lambda source, m: rounding_gate(_ptx_text(source, m)),
    "machine code": lambda source, m: machine_code_gate(machine_code(source, "90")[m.kernel], m.kernel),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "_"))
def test_a_planted_fault_is_found(mutant: Mutant) -> None:
    source = mutant.source().only(*needs(mutant.kernel))
    with pytest.raises(Violation):
        GATES[mutant.gate](source, mutant)


@pytest.mark.slow
@pytest.mark.parametrize(("gate", "kernel"), sorted({(m.gate, m.kernel) for m in MUTANTS}))
def test_the_gates_let_the_package_pass(gate: str, kernel: str) -> None:
    """The same gates, with the same choice of kernels, on the sources as they are."""
    plain = Mutant("none", gate, kernel, "", "")
    GATES[gate](plain.source().only(*needs(kernel)), plain)
