"""The machine code for each architecture: vector loads and stores, few registers, nothing in local memory."""

from __future__ import annotations

import pytest
from gates import MAX_REGISTERS, machine_code_gate
from toolchain import machine_code, package_source

from pathswitch.kernels.compilers import ARCHITECTURES
from pathswitch.kernels.cuda import KERNELS


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_machine_code(architecture: str) -> None:
    kernels = machine_code(package_source(), architecture)
    assert sorted(kernels) == sorted(KERNELS)
    for name, code in kernels.items():
        assert machine_code_gate(code, name)[0] <= MAX_REGISTERS
