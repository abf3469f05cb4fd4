"""``pathswitch kernels``: compiling before a job has to, and what is shown of a machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pathswitch.kernels.compilers import machine_isas, nvrtc

pytestmark = pytest.mark.slow

COMMAND = str(Path(sys.executable).with_name("pathswitch"))
NO_CUDA = {"PATH": "/nowhere", "CUDA_HOME": "/nowhere"}


def kernels(cache: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, COMMAND, "kernels", *map(str, arguments)]
    given = os.environ | {"PATHSWITCH_KERNELS": str(cache)} | environment
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=given)


def status(cache: Path, **environment: str) -> dict[str, Any]:
    shown = kernels(cache, "status", "--json", **environment)
    assert shown.returncode == 0, shown.stderr
    content: dict[str, Any] = json.loads(shown.stdout)
    return content


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the CPU kernels of one instruction set."""
    cache = tmp_path_factory.mktemp("a cache")
    done = kernels(cache, "build", "--isa", "portable")
    assert done.returncode == 0, done.stderr
    (library,) = cache.glob("*.so")
    assert done.stdout == f"CPU, portable: {library}\n"
    return cache


def test_a_second_build_takes_what_is_there(built: Path) -> None:
    (library,) = built.glob("*.so")
    before = library.stat().st_mtime_ns
    assert kernels(built, "build", "--isa", "portable", PATH="/nowhere", CXX="").returncode == 0
    assert library.stat().st_mtime_ns == before


def test_status_tells_whole_files_from_damaged_and_foreign_ones(built: Path, tmp_path: Path) -> None:
    (library,) = built.glob("*.so")
    digest = library.with_name(f"{library.name}.sha256").read_bytes()
    (tmp_path / library.name).write_bytes(library.read_bytes()[:-1])
    (tmp_path / f"{library.name}.sha256").write_bytes(digest)
    (tmp_path / "cpu-portable-0123456789abcdef.so").write_bytes(library.read_bytes())
    (tmp_path / "cpu-portable-0123456789abcdef.so.sha256").write_bytes(digest)
    for folder, expected in (
        (built, {library.name: "whole"}),
        (tmp_path, {library.name: "damaged", "cpu-portable-0123456789abcdef.so": "of other sources or flags"}),
    ):
        files = {Path(file["name"]): file["state"] for file in status(folder)["files"]}
        assert {path.name: state for path, state in files.items() if path.parent == folder} == expected


def test_status_says_what_a_run_would_use(tmp_path: Path) -> None:
    isa = machine_isas()[0]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    cache = tmp_path / "cache"
    assert "c++" in status(cache, TMPDIR=str(temporary))["uses"]["CPU"]
    none = status(cache, TMPDIR=str(temporary), CXX="", **NO_CUDA)
    assert (none["cpp"], none["files"]) == ([], [])
    assert "backend 'reference'" in none["uses"]["CPU"]
    assert kernels(cache, "build", "--cpu").returncode == 0
    found = status(cache, TMPDIR=str(temporary), CXX="", **NO_CUDA)
    assert found["uses"]["CPU"].startswith(str(cache / f"cpu-{isa}-"))
    assert found["isas"] == list(machine_isas())
    if nvrtc() is None and not none["nvcc"]:  # CUDA is left out where it cannot be compiled, unless it is asked for
        both = kernels(cache, "build", CXX="", **NO_CUDA)
        assert (both.returncode, "CUDA: skipped" in both.stdout) == (0, True)
        cuda = kernels(cache, "build", "--cuda", CXX="", **NO_CUDA)
        assert (cuda.returncode, "neither nvcc nor NVRTC" in cuda.stderr) == (2, True)


def test_status_is_readable(built: Path) -> None:
    shown = kernels(built, "status").stdout
    (library,) = built.glob("*.so")
    assert f"folder        {built}" in shown
    assert f"{library}, {library.stat().st_size} bytes, whole" in shown
    for title in ("instructions", "C++", "nvcc", "NVRTC", "CUDA driver", "a run on CPU uses"):
        assert f"\n{title}" in shown


def test_what_is_asked_for_and_cannot_be_compiled_is_an_error(tmp_path: Path) -> None:
    done = kernels(tmp_path, "build", "--cpu", PATH="/nowhere", CXX="")
    assert done.returncode == 2
    assert "no C++ compiler" in done.stderr
    assert "Traceback" not in done.stderr
    done = kernels(tmp_path, "build", "--isa", "avx3")
    assert (done.returncode, "allowed: portable, avx2, avx512" in done.stderr) == (2, True)
    done = kernels(tmp_path, "build", "--arch", "9.0")
    assert (done.returncode, "given '9.0'" in done.stderr) == (2, True)


def test_one_architecture(tmp_path: Path) -> None:
    done = kernels(tmp_path, "build", "--arch", "sm_90")
    if "neither nvcc nor NVRTC" in done.stderr:
        pytest.skip("neither nvcc nor NVRTC")
    (image,) = tmp_path.glob("*.bin")
    assert done.stdout == f"CUDA, sm_90: {image}\n"
    assert image.name.startswith("cuda-90-")
