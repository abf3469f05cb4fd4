"""Building the kernels: compiled at their first use, kept in a cache by the hash of all that they are made of.

A file is written under a temporary name and renamed when it is whole, so that a build may be killed at any moment. The
builders of one machine wait for each other by a lock that the kernel takes from a dead process; if that takes too
long, or cannot be done, each builds for itself.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pathswitch.errors import KernelError
from pathswitch.kernels.compilers import (
    ARCHITECTURES,
    CPU_FLAGS,
    CUDA_FLAGS,
    CUDA_PACKAGES,
    ISAS,
    SOURCES,
    Compiler,
    compile_cpu,
    compile_cuda,
    cpp_compiler,
    machine_isas,
    nvcc,
    nvrtc,
)

logger = logging.getLogger("pathswitch")

FOLDER_VARIABLE = "PATHSWITCH_KERNELS"
LOCK_SECONDS = 300.0
LEFTOVER_SECONDS = 3600.0
NO_COMPILER = (
    "where nothing can be compiled, run `pathswitch kernels build` on a machine like this one and take its folder "
    f"along (${FOLDER_VARIABLE}), or choose PathSwitchAdamW's backend 'reference'"
)


def best_isa() -> str:
    """Return the best instruction set of this machine: avx512, avx2 or portable."""
    return machine_isas()[0]


def cache_folder() -> Path:
    """Return the folder of the compiled kernels: $PATHSWITCH_KERNELS, or pathswitch/kernels in the user's cache."""
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "pathswitch" / "kernels"


def cpu_library(isa: str) -> Path:
    """Return the compiled CPU backend for an instruction set, and compile it before if it is not there.

    Raises:
        KernelError: there is no C++ compiler, or it failed.
    """
    name = f"cpu-{isa}-{_digest(CPU_FLAGS, ISAS[isa], ('cpu.cpp', 'maths.h', 'vectors.h'))}.so"

    def build(output: Path) -> None:
        compiler = cpp_compiler()
        if compiler is None:
            raise KernelError(f"no C++ compiler ($CXX, c++, g++, clang++) for the CPU kernels; {NO_COMPILER}")
        compile_cpu(compiler, isa, output)

    return _cached(name, f"the CPU kernels for {isa}", build)


def cuda_image(architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """Return the compiled CUDA kernels, and compile them before if they are not there.

    Args:
        architectures: compute capabilities without the point, as "90"; NVRTC takes the first alone.

    Raises:
        KernelError: there is neither nvcc nor NVRTC, or it failed.
    """
    name = f"cuda-{'-'.join(architectures)}-{_digest(CUDA_FLAGS, (), ('kernels.cu', 'kernels.cuh', 'maths.h'))}.bin"

    def build(output: Path) -> None:
        compile_cuda(_cuda_compiler(), architectures, output)

    return _cached(name, f"the CUDA kernels for {', '.join(f'sm_{arch}' for arch in architectures)}", build)


def _cuda_compiler() -> Compiler:
    compiler = nvcc() or nvrtc()
    if compiler is None:
        raise KernelError(f"neither nvcc nor NVRTC for the CUDA kernels: install {CUDA_PACKAGES}; {NO_COMPILER}")
    return compiler


def _digest(flags: tuple[str, ...], more_flags: tuple[str, ...], sources: tuple[str, ...]) -> str:
    """Return a hash of what a file is made of. Not of the compiler: a folder may come from another machine."""
    content = hashlib.sha256(repr((flags, more_flags)).encode())
    for name in sources:
        content.update((SOURCES / name).read_bytes())
    return content.hexdigest()[:16]


def _cached(name: str, what: str, build: Callable[[Path], None]) -> Path:
    folder = cache_folder()
    if _is_whole(folder / name):
        return folder / name
    folder = _writable(folder)
    with _one_builder(name):
        if not _is_whole(folder / name):
            _remove_leftovers(folder)
            started = time.monotonic()
            logger.info("pathswitch: compiling %s, once", what)
            _build_into(folder / name, build)
            logger.info("pathswitch: compiled %s in %.0f s: %s", what, time.monotonic() - started, folder / name)
    return folder / name


def _build_into(target: Path, build: Callable[[Path], None]) -> None:
    """Build under another name; the file's digest, beside it, is there before the file itself."""
    temp = target.with_name(f"{target.stem}.{uuid.uuid4().hex}.tmp")
    try:
        build(temp)
        digest = temp.with_suffix(".tmp-digest")
        digest.write_text(_file_digest(temp))
        os.replace(digest, _digest_file(target))
        os.replace(temp, target)
    finally:
        temp.unlink(missing_ok=True)


def _is_whole(path: Path) -> bool:
    """Return whether the file is there and has not been damaged since it was built."""
    try:
        return _file_digest(path) == _digest_file(path).read_text()
    except OSError:
        return False


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _writable(folder: Path) -> Path:
    """Return the folder, or one of this user's in the machine's temporary folder where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = Path(tempfile.gettempdir()) / f"pathswitch-kernels-{os.getuid()}"
        logger.warning("pathswitch: %s cannot be written (%s): the kernels go to %s", folder, error.strerror, other)
        other.mkdir(mode=0o700, exist_ok=True)
        if other.stat().st_uid != os.getuid():
            raise KernelError(f"{other} belongs to another user; set ${FOLDER_VARIABLE} to a folder of yours") from None
        return other


def _remove_leftovers(folder: Path) -> None:
    """Remove what builders left that were killed; younger files may be those of builders on other machines."""
    for leftover in folder.glob("*.tmp*"):
        try:
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()
        except OSError:
            continue


@contextmanager
def _one_builder(name: str) -> Iterator[None]:
    """Wait until no other process of this machine builds the file, but not for ever."""
    path = Path(tempfile.gettempdir()) / f"pathswitch-{os.getuid()}-{name}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError:
        yield
        return
    try:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)
