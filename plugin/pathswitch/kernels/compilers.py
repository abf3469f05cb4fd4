"""The compilers of the kernels, and the commands that compile them; neither torch nor a GPU is needed."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import shutil
import subprocess
from ctypes import byref, c_char_p, c_size_t, c_void_p
from dataclasses import dataclass
from importlib.util import find_spec
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
COMPILER_SECONDS = 900.0


@dataclass(frozen=True)
class Compiler:
    """A compiler: its name, where it is, what it says of its version, and arguments that always follow its path."""

    name: str
    path: str
    version: str
    arguments: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{shlex.join([self.path, *self.arguments])} ({self.version})"


def machine_isas() -> tuple[str, ...]:
    """Return the instruction sets that this machine can run, the best first."""
    try:
        return isas_of(Path("/proc/cpuinfo").read_text(), platform.machine())
    except OSError:
        return ("portable",)


def isas_of(cpuinfo: str, machine: str) -> tuple[str, ...]:
    """Return the instruction sets of a machine, the best first, by what Linux says of its processors."""
    lines = (line for line in cpuinfo.splitlines() if line.startswith("flags"))
    found = set(next(lines, "").split()) if machine in ("x86_64", "AMD64") else set()
    isas = []
    if {"avx512f", "avx512bw", "avx512dq", "avx512vl", "f16c"} <= found:
        isas.append("avx512")
    if {"avx2", "f16c"} <= found:
        isas.append("avx2")
    return (*isas, "portable")


def cpp_compilers() -> list[Compiler]:
    """Return the C++ compilers among $CXX, which may have arguments, c++, g++ and clang++, each once."""
    names = (shlex.split(os.environ.get("CXX", "")), ["c++"], ["g++"], ["clang++"])
    return _present([name for name in names if name])


def nvccs() -> list[Compiler]:
    """Return the nvcc of $CUDA_HOME, of PATH, and of the package nvidia-cuda-nvcc in this environment, each once."""
    home = os.environ.get("CUDA_HOME")
    packaged = _nvidia_files("cu*/bin/nvcc")
    return _present([[name] for name in (f"{home}/bin/nvcc" if home else "", "nvcc", *packaged) if name])


def _present(commands: list[list[str]]) -> list[Compiler]:
    found: dict[tuple[str, ...], Compiler] = {}
    for name, *arguments in commands:
        if path := shutil.which(name):
            key = (os.path.realpath(path), *arguments)
            if key not in found:
                found[key] = Compiler(Path(name).name, path, _version([path, *arguments]), tuple(arguments))
    return list(found.values())


def nvcc_architectures(compiler: Compiler) -> set[str]:
    """Return the compute capabilities that an nvcc knows, as "90"; none if it does not say."""
    try:
        done = _start([compiler.path, "--list-gpu-arch"], 60)
    except (OSError, subprocess.SubprocessError):
        return set()
    return {word.removeprefix("compute_") for word in done.stdout.split()}


def nvrtc() -> Compiler | None:
    """Return NVRTC, the compiler as a library, of the package nvidia-cuda-nvrtc, of $CUDA_HOME or of the system."""
    home = os.environ.get("CUDA_HOME")
    packaged = _nvidia_files("cu*/lib/libnvrtc.so.*")  # cu13; cuda_nvrtc in CUDA 12
    toolkit = [f"{home}/lib64/libnvrtc.so"] if home else []
    for candidate in (*packaged, *toolkit, "libnvrtc.so", "libnvrtc.so.13", "libnvrtc.so.12"):
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
    _run([compiler.path, *compiler.arguments, *CPU_FLAGS, *ISAS[isa], str(SOURCES / "cpu.cpp"), "-o", str(output)])


def compile_cuda(compiler: Compiler, architectures: tuple[str, ...], output: Path) -> None:
    """Compile the CUDA kernels into one image: for all architectures that an nvcc knows, for one with NVRTC.

    Raises:
        KernelError: the compiler failed, or cannot do it.
    """
    if compiler.name == "nvrtc":
        if len(architectures) > 1:
            raise KernelError("NVRTC compiles for one architecture at a time")
        output.write_bytes(nvrtc_image(compiler, architectures[0]))
        return
    known = nvcc_architectures(compiler)
    binaries = [arch for arch in architectures if arch in known] or list(architectures)
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in binaries]
    codes.append(f"-gencode=arch=compute_{binaries[-1]},code=compute_{binaries[-1]}")  # for later ones
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
    try:
        result = _start(command, COMPILER_SECONDS)
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(str(error)) from error
    if result.returncode:
        said = "\n".join((result.stderr or result.stdout).splitlines()[-LAST_LINES:])
        raise KernelError(f"{shlex.join(command)}: exit code {result.returncode}\n{said}")


def _start(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL, timeout=seconds
    )


def _version(command: list[str]) -> str:
    try:
        result = _start([*command, "--version"], 60)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    # nvcc's version stands in its last line, the others' in their first.
    return (lines[-1] if "nvcc" in Path(command[0]).name else lines[0]) if lines else "unknown"


def _nvidia_files(pattern: str) -> list[str]:
    """Return files of NVIDIA's Python packages, which torch with CUDA brings along; the highest version first."""
    spec = find_spec("nvidia")
    roots = (spec.submodule_search_locations or ()) if spec is not None else ()
    return sorted((str(file) for root in roots for file in Path(root).glob(pattern)), reverse=True)
