"""What compilers make of the CUDA kernels, executed: the reference's bits, nothing out of bounds, no byte too many."""

from __future__ import annotations

import pytest
from engines import Ptx, regions
from gates import (
    ADAMW_NAMES,
    NORM_NAMES,
    STREAMING,
    far_gate,
    ptx_gate,
    rounding_gate,
    traffic_gate,
)
from problems import Size, adamw_problem
from ptx.text import kernel_names
from toolchain import nvrtc_ptx_text, package_source, ptx_text

from pathswitch.kernels.compilers import ARCHITECTURES
from pathswitch.kernels.cuda import KERNELS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def text() -> str:
    return ptx_text(package_source())


@pytest.fixture(scope="module")
def engine(text: str) -> Ptx:
    return Ptx(text)


def test_the_module_has_the_launchers_kernels(text: str) -> None:
    assert sorted(kernel_names(text)) == sorted(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_ptx_gives_the_references_bits(engine: Ptx, kernel: str) -> None:
    assert ptx_gate(engine, kernel) >= 1


@pytest.mark.parametrize("kernel", STREAMING)
def test_the_last_block_of_huge_tensors(engine: Ptx, kernel: str) -> None:
    assert max(far_gate(engine, kernel)) > 2**33


@pytest.mark.parametrize("kernel", STREAMING)
def test_a_kernel_moves_each_byte_once_in_whole_sectors(engine: Ptx, kernel: str) -> None:
    traffic_gate(engine, kernel)


@pytest.mark.parametrize(("update", "norm", "total"), [("bf16_bf16", "bf16", 30), ("f32_bf16", "f32", 34)])
def test_bytes_per_parameter_of_a_whole_step(engine: Ptx, update: str, norm: str, total: int) -> None:
    payload = traffic_gate(engine, f"ps_adamw_{update}")[0]
    assert traffic_gate(engine, f"ps_adamw_{update}_average")[0] == payload + 8
    assert traffic_gate(engine, f"ps_norm_{norm}")[0] + payload == total


@pytest.mark.parametrize("kernel", ["ps_adamw_bf16_bf16", "ps_adamw_f32_f32"])
def test_tensors_that_are_not_aligned_cost_no_more_payload(engine: Ptx, kernel: str) -> None:
    numel = 4096
    problem = adamw_problem(ADAMW_NAMES[kernel], [Size(numel, grad=1, low=1)])
    memory = regions(problem)
    engine.run(problem.launches(), memory)
    grad, low, _ = ADAMW_NAMES[kernel]
    assert low is not None
    payload = {region.name: (region.loads.payload, region.stores.payload) for region in memory.regions}
    assert payload["g0"] == (grad.itemsize * numel, 0) and payload["l0"] == (0, low.itemsize * numel)


def test_every_operation_is_rounded_correctly(text: str) -> None:
    assert rounding_gate(text) > 1000


@pytest.mark.parametrize("architecture", [arch for arch in ARCHITECTURES if arch != "90"])
def test_other_architectures(architecture: str) -> None:
    text = ptx_text(package_source(), architecture)
    rounding_gate(text)
    for kernel in KERNELS:
        ptx_gate(Ptx(text), kernel)
    for kernel in STREAMING:
        traffic_gate(Ptx(text), kernel)


def test_nvrtc_makes_the_same_of_them() -> None:
    text = nvrtc_ptx_text()
    rounding_gate(text)
    engine = Ptx(text)
    for kernel in ("ps_prepare", "ps_adamw_bf16_bf16", "ps_adamw_f16_f32_average", *NORM_NAMES, "ps_digest_16"):
        ptx_gate(engine, kernel)
    for kernel in STREAMING:
        traffic_gate(engine, kernel)
