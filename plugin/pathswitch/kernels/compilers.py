"""The compilers of the kernels, and the commands that compile them; neither torch nor a GPU is needed."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import subprocess
import sysconfig
from ctypes import byref, c_char_p, c_size_t, c_void_p
from dataclasses import dataclass
from pathlib import Path

from pathswitch.errors import KernelError

SOURCES = Path(__file__).parent / "csrc"
ISAS = {
    "portable": (),
    "avx2": ("-mavx2", "-mf16c"),
    "avx512": (
        *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mf16c"),
        "-mprefer-vector-width=512",
    ),
}
CPU_FLAGS = (
    *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden"),
)
CUDA_FLAGS = ("-std=c++17", "-O3", "-fmad=false")
ARCHITECTURES = ("80", "90", "100")
CUDA_PACKAGES = "nvidia-cuda-nvcc or nvidia-cuda-nvrtc (pip), or NVIDIA's toolkit"
LAST_LINES = 12


@dataclass(frozen=True)
class Compiler:
    """A compiler: its name, where it is, and what it says of its version."""

    name: str
    path: str
    version: str


def machine_isas() -> tuple[str, ...]:
    """Return the instruction sets that this machine can run, the best first."""
    found = set()
    if platform.machine() in ("x86_64", "AMD64"):
        try:
            flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags"))
            found = set(flags.split())
        except (OSError, StopIteration):
            pass
    isas = []
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"} <= found:
        isas.append("avx512")
    if {"avx2", "f16c"} <= found:
        isas.append("avx2")
    return (*isas, "portable")


def cpp_compiler() -> Compiler | None:
    """Return the first C++ compiler of $CXX, c++, g++ and clang++."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return Compiler(name, path, _version(path))
    return None


def nvcc() -> Compiler | None:
    """Return the nvcc of $CUDA_HOME, PATH, or the package nvidia-cuda-nvcc of this environment."""
    home = os.environ.get("CUDA_HOME")
    packaged = sorted(_site_packages().glob("nvidia/cu*/bin/nvcc"), reverse=True)
    for candidate in (f"{home}/bin/nvcc" if home else None, "nvcc", *map(str, packaged)):
        if candidate and (path := shutil.which(candidate)):
            return Compiler("nvcc", path, _version(path))
    return None


def nvrtc() -> Compiler | None:
    """Return NVRTC, the compiler as a library, of the package nvidia-cuda-nvrtc or of the system."""
    folder = _site_packages() / "nvidia"
    packaged = sorted(
        [*folder.glob("cu*/lib/libnvrtc.so.*"), *folder.glob("cuda_nvrtc/lib/libnvrtc.so.*")], reverse=True
    )
    for candidate in (*map(str, packaged), "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
        try:
            library = ctypes.CDLL(candidate)
        except OSError:
            continue
        major, minor = ctypes.c_int(), ctypes.c_int()
        library.nvrtcVersion(byref(major), byref(minor))
        return Compiler("nvrtc", candidate, f"NVRTC {major.value}.{minor.value}")
    return None


def compile_cpu(compiler: Compiler, isa: str, output: Path) -> None:
    """Compile the CPU backend.

    Raises:
        KernelError: the compiler failed.
    """
    _run([compiler.path, *CPU_FLAGS, *ISAS[isa], str(SOURCES / "cpu.cpp"), "-o", str(output)])


def compile_cuda(compiler: Compiler, architectures: tuple[str, ...], output: Path) -> None:
    """Compile the CUDA kernels into one image: for all architectures with nvcc, for one with NVRTC.

    Raises:
        KernelError: the compiler failed.
    """
    if compiler.name == "nvrtc":
        output.write_bytes(nvrtc_image(compiler, architectures[0]))
        return
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")  # for later ones
    _run([compiler.path, *CUDA_FLAGS, *codes, "-fatbin", str(SOURCES / "kernels.cu"), "-o", str(output)])


def nvrtc_image(compiler: Compiler, architecture: str, *, ptx: bool = False) -> bytes:
    """Return the kernels compiled by NVRTC for one architecture, a cubin or, if asked for, PTX.

    Raises:
        KernelError: the compiler failed.
    """
    library = ctypes.CDLL(compiler.path)
    library.nvrtcGetErrorString.restype = c_char_p
    program = c_void_p()

    def call(name: str, *arguments: object) -> None:
        if code := getattr(library, name)(*arguments):
            said = _nvrtc_log(library, program)
            raise KernelError(f"NVRTC: {name}: {library.nvrtcGetErrorString(code).decode()}{said}")

    text = (SOURCES / "kernels.cu").read_bytes()
    call("nvrtcCreateProgram", byref(program), c_char_p(text), c_char_p(b"kernels.cu"), 0, None, None)
    kind = "compute" if ptx else "sm"
    options = [*CUDA_FLAGS, f"-arch={kind}_{architecture}", f"-I{SOURCES}"]
    options.remove("-O3")  # NVRTC's own default
    array = (c_char_p * len(options))(*(option.encode() for option in options))
    call("nvrtcCompileProgram", program, len(options), array)
    size, name = c_size_t(), "PTX" if ptx else "CUBIN"
    call(f"nvrtcGet{name}Size", program, byref(size))
    image = ctypes.create_string_buffer(size.value)
    call(f"nvrtcGet{name}", program, image)
    call("nvrtcDestroyProgram", byref(program))
    return image.raw


def _nvrtc_log(library: ctypes.CDLL, program: c_void_p) -> str:
    size = c_size_t()
    if library.nvrtcGetProgramLogSize(program, byref(size)) or size.value <= 1:
        return ""
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    return "\n" + "\n".join(log.value.decode(errors="replace").splitlines()[-LAST_LINES:])


def _run(command: list[str]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if result.returncode:
        said = "\n".join((result.stderr or result.stdout).splitlines()[-LAST_LINES:])
        raise KernelError(f"{' '.join(command)}: exit code {result.returncode}\n{said}")


def _version(path: str) -> str:
    try:
        result = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    # nvcc's version stands in its last line, the others' in their first.
    return (lines[-1] if "nvcc" in Path(path).name else lines[0]) if lines else "unknown"


def _site_packages() -> Path:
    return Path(sysconfig.get_path("purelib"))
