"""The compilers of the verification: g++ for the stand-in driver, nvcc and NVRTC for PTX, cuobjdump for machine code.

What is compiled is kept in the machine's temporary folder by the hash of its sources, for all workers of a test run.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pathswitch.kernels.compilers import CUDA_FLAGS, SOURCES, Compiler, cpp_compilers, nvccs, nvrtc, nvrtc_image

HERE = Path(__file__).parent
STANDIN = HERE / "standin"
HOW_TO_GET = "pip install 'pathswitch[test]' has it, as nvidia-cuda-nvcc, nvidia-cuda-nvrtc, nvidia-cuda-cuobjdump"
CPP_FLAGS = ("-std=c++17", "-O1", "-ffp-contract=off", "-Wno-unknown-pragmas", "-fPIC", "-shared")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-DPS_SANITIZED")


@dataclass(frozen=True)
class Source:
    """The kernels' sources: the package's own, or a changed copy; and which kernels of them, () for all."""

    files: tuple[tuple[str, str], ...]
    wanted: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the files, and the header that says which kernels are wanted."""
        for name, text in self.files:
            (folder / name).write_text(text)
        lines = [f"#define PS_WANTED_{name} ,1\n" for name in self.wanted]
        (folder / "wanted.h").write_text("".join(lines))

    def only(self, *wanted: str) -> Source:
        """Return the same with only some of the kernels."""
        return Source(self.files, wanted)


def package_source() -> Source:
    """Return the sources that the package ships."""
    return Source(tuple((name, (SOURCES / name).read_text()) for name in ("kernels.cu", "kernels.cuh", "maths.h")))


def standin_driver(source: Source, *, sanitized: bool = False) -> Path:
    """Return a libcuda.so that runs the kernels on this CPU."""
    compilers = cpp_compilers()
    if not compilers:
        pytest.skip("the stand-in for the CUDA driver needs a C++ compiler: apt-get install g++")
    command = [compilers[0].path, *compilers[0].arguments]
    flags = [*CPP_FLAGS, *(SANITIZERS if sanitized else ()), *(["-DPS_SOME"] if source.wanted else [])]
    own = [(file.name, file.read_text()) for file in sorted(STANDIN.iterdir()) if file.suffix in (".h", ".cpp")]

    def build(folder: Path, output: Path) -> None:
        _run([*command, *flags, f"-I{folder}", f"-I{STANDIN}", str(STANDIN / "libcuda.cpp"), "-o", str(output)])

    return _compiled("libcuda.so", source, [str(compilers[0]), *flags, *map(str, own)], build)


def ptx_text(source: Source, architecture: str = "90", flags: Iterable[str] = CUDA_FLAGS) -> str:
    """Return what nvcc makes of the kernels."""
    compiler, options = _nvcc(), [*flags, *_some(source)]

    def build(folder: Path, output: Path) -> None:
        command = [compiler.path, *options, f"-arch=compute_{architecture}", "-ptx", f"-I{folder}"]
        _run([*command, str(folder / "kernels.cu"), "-o", str(output)])

    return _compiled("kernels.ptx", source, [compiler.version, architecture, *options], build).read_text()


def nvrtc_ptx_text(architecture: str = "90") -> str:
    """Return what NVRTC makes of the package's kernels."""
    compiler = nvrtc()
    if compiler is None:
        pytest.skip(f"no NVRTC: {HOW_TO_GET}")
    return nvrtc_image(compiler, architecture, ptx=True).rstrip(b"\0").decode()


@dataclass(frozen=True)
class MachineCode:
    """One kernel's instructions for an architecture, and its resources as the assembler counts them."""

    instructions: tuple[str, ...]
    registers: int
    stack_bytes: int
    local_bytes: int


def machine_code(source: Source, architecture: str) -> dict[str, MachineCode]:
    """Return the machine code of each kernel for an architecture, as the GPU would run it."""
    compiler, tool, options = _nvcc(), _cuobjdump(), [*CUDA_FLAGS, *_some(source)]

    def build(folder: Path, output: Path) -> None:
        command = [compiler.path, *options, f"-arch=sm_{architecture}", "-cubin", f"-I{folder}"]
        _run([*command, str(folder / "kernels.cu"), "-o", str(output)])

    image = _compiled("kernels.cubin", source, [compiler.version, architecture, *options], build)
    path = f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    usage, code = (
        subprocess.run([tool, option, str(image)], env=os.environ | {"PATH": path}, capture_output=True, text=True)
        for option in ("-res-usage", "-sass")
    )
    for result in (usage, code):
        assert result.returncode == 0, result.stderr
    resources = {
        name: (int(registers), int(stack), int(local))
        for name, registers, stack, local in re.findall(
            r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage.stdout
        )
    }
    kernels = {}
    for part in code.stdout.split("Function : ")[1:]:
        name = part.split()[0]
        instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", part)
        kernels[name] = MachineCode(tuple(instructions), *resources[name])
    return kernels


def _some(source: Source) -> list[str]:
    return [f"-include={STANDIN / 'device.h'}", f"-I{STANDIN}", "-DPS_SOME"] if source.wanted else []


def _nvcc() -> Compiler:
    compilers = nvccs()
    if not compilers:
        pytest.skip(f"no nvcc: {HOW_TO_GET}")
    return compilers[0]


def _cuobjdump() -> str:
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/cuobjdump"), reverse=True)
    for candidate in (*map(str, packaged), "cuobjdump"):
        if path := shutil.which(candidate):
            return path
    pytest.skip(f"no cuobjdump: {HOW_TO_GET}")


def _compiled(name: str, source: Source, inputs: list[str], build: Callable[[Path, Path], None]) -> Path:
    digest = hashlib.sha256(repr((source, inputs, name)).encode()).hexdigest()[:24]
    root = Path(tempfile.gettempdir()) / f"pathswitch-kernel-tests-{os.getuid()}"
    output = root / digest / name
    if not output.exists():
        temp = root / f"{digest}.{uuid.uuid4().hex}"
        temp.mkdir(parents=True, mode=0o700)
        try:
            source.write(temp)
            build(temp, temp / name)
            if not output.parent.exists():
                temp.rename(output.parent)
        except OSError:
            assert output.exists()  # another worker was faster
        finally:
            shutil.rmtree(temp, ignore_errors=True)
    return output


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, f"{' '.join(command)}\n{result.stderr}"
