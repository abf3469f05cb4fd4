"""The CUDA launcher over a driver that runs the kernels' source on a CPU: the reference's bits, in every order."""

from __future__ import annotations

import pytest
import torch
from engines import IMAGE, Standin
from gates import ADAMW_NAMES, standin_gate
from problems import SCALARS, Problem, Size, adamw_problem, differences, norm_problem
from sanitized import sanitizer_gate
from toolchain import package_source, standin_driver

from pathswitch.errors import KernelError
from pathswitch.kernels.cuda import KERNELS, Driver, Launch
from pathswitch.kernels.layouts import MAX_SHARDS, MAX_SPANS, struct_bytes


@pytest.fixture(scope="module")
def engine() -> Standin:
    return Standin(standin_driver(package_source()))


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_source_gives_the_references_bits_in_every_order_of_threads(engine: Standin, kernel: str) -> None:
    assert standin_gate(engine, kernel) >= 3


def test_lists_longer_than_a_launch_takes_are_cut(engine: Standin) -> None:
    sizes = [Size(3 + 700 * i % 2600, row=i % 3) for i in range(2 * MAX_SHARDS + 5)]
    variant = ADAMW_NAMES["ps_adamw_bf16_f16_average"]
    found, expected = (adamw_problem(variant, sizes) for _ in range(2))
    expected.expect()
    launches = list(found.launches())
    assert [launch.arguments[0].count for launch in launches] == [MAX_SHARDS, MAX_SHARDS, 5]
    engine.run(launches)
    assert differences(found, expected) == []
    spans = norm_problem(torch.float32, [(1 + 5000 * (i % 5), 0) for i in range(MAX_SPANS + 1)])
    assert [launch.kernel for launch in spans.launches()] == ["ps_norm_f32", "ps_norm_f32", "ps_sum_tiles"]


def test_launches_are_a_pure_function_of_the_tensors() -> None:
    problem = adamw_problem(ADAMW_NAMES["ps_adamw_f32_none"])
    first, second = (
        [(x.kernel, x.grid, x.block, [bytes(argument) for argument in x.arguments]) for x in problem.launches()]
        for _ in range(2)
    )
    assert first == second


def test_nothing_to_do_launches_nothing() -> None:
    assert list(adamw_problem(ADAMW_NAMES["ps_adamw_f32_none"], [Size(0), Size(0)]).launches()) == []


def test_no_driver_is_an_error_that_says_so() -> None:
    with pytest.raises(KernelError, match="the CUDA driver cannot be loaded: libno-such-driver"):
        Driver(IMAGE, "libno-such-driver.so.1")


def test_a_refused_image_names_the_call_and_the_error() -> None:
    with pytest.raises(KernelError, match=r"cuLibraryLoadData: CUDA_ERROR_INVALID_IMAGE \(200\)"):
        Driver(b"something else", str(standin_driver(package_source())))


def test_a_library_that_is_no_driver_is_refused() -> None:
    with pytest.raises(KernelError, match=r"has no cuInit; allowed: a driver for CUDA 12\.0 or later"):
        Driver(IMAGE, "libm.so.6")


def test_a_failed_launch_names_kernel_grid_and_error(engine: Standin) -> None:
    driver = Driver(IMAGE, str(standin_driver(package_source())))
    rows = struct_bytes(SCALARS)
    launch = next(adamw_problem(ADAMW_NAMES["ps_adamw_f32_none"]).launches())
    assert len(rows) == 64
    with pytest.raises(KernelError, match=r"of ps_adamw_f32_none, 3 x 512 threads: CUDA_ERROR_INVALID_HANDLE \(400\)"):
        driver.launch(Launch(launch.kernel, 3, 512, launch.arguments), stream=0)
    with pytest.raises(KernelError, match=r"ps_adamw_f32_none: 2147483648 blocks; allowed: at most 2147483647"):
        driver.launch(Launch(launch.kernel, 2**31, 256, launch.arguments), stream=0)


def test_guards_show_what_lies_beside_a_tensor() -> None:
    left, right = Problem(), Problem()
    for problem in (left, right):
        problem.add("x", torch.zeros(3), offset=1)
    left.buffers["x"][-1] = 0
    assert differences(left, right) == ["x"]


@pytest.mark.slow
def test_the_sanitizers_find_nothing() -> None:
    assert sanitizer_gate(package_source(), *KERNELS) == len(KERNELS)
