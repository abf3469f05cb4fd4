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
import re
import stat
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from pathswitch.errors import ConfigError, KernelError, choices
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
    cpp_compilers,
    machine_isas,
    nvccs,
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
        return Path(given).expanduser().absolute()
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # a user without a home folder
        return spare_folder()
    return Path(cache).absolute() / "pathswitch" / "kernels"


def spare_folder() -> Path:
    """Return this user's folder in the machine's temporary folder, used where the cache cannot be written."""
    return Path(tempfile.gettempdir()) / f"pathswitch-kernels-{os.getuid()}"


def cpu_library(isa: str) -> Path:
    """Return the compiled CPU backend for an instruction set, and compile it before if it is not there.

    Raises:
        ConfigError: there is no such instruction set.
        KernelError: there is no C++ compiler, or it failed.
    """

    def build(output: Path) -> None:
        none = (
            "no C++ compiler ($CXX, c++, g++, clang++) for the CPU kernels: install one (Debian: apt-get install g++)"
        )
        _try_each(cpp_compilers(), lambda compiler: compile_cpu(compiler, isa, output), none)

    return _cached(cpu_name(isa), f"the CPU kernels for {isa}", build)


def cpu_name(isa: str) -> str:
    """Return the file name of the CPU backend for an instruction set.

    Raises:
        ConfigError: there is no such instruction set.
    """
    if isa not in ISAS:
        raise ConfigError("instruction set", given=isa, allowed=choices(ISAS, isa))
    return f"cpu-{isa}-{_digest(CPU_FLAGS, ISAS[isa], ('cpu.cpp', 'maths.h', 'vectors.h'))}.so"


def cuda_image(architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """Return the compiled CUDA kernels, and compile them before if they are not there.

    Args:
        architectures: compute capabilities without the point, as "90"; NVRTC compiles for one at a time.

    Raises:
        ConfigError: this is no compute capability.
        KernelError: there is neither nvcc nor NVRTC, or it failed.
    """
    compilers = nvccs()
    if (library := nvrtc()) is not None and (len(architectures) == 1 or not compilers):
        compilers.append(library)

    def build(output: Path) -> None:
        none = f"neither nvcc nor NVRTC for the CUDA kernels: install {CUDA_PACKAGES}"
        _try_each(compilers, lambda compiler: compile_cuda(compiler, architectures, output), none)

    what = f"the CUDA kernels for {', '.join(f'sm_{arch}' for arch in architectures)}"
    return _cached(cuda_name(architectures), what, build)


def cuda_name(architectures: tuple[str, ...] = ARCHITECTURES) -> str:
    """Return the file name of the CUDA kernels for some compute capabilities.

    Raises:
        ConfigError: this is no compute capability.
    """
    for arch in architectures:
        if not re.fullmatch("[0-9]{2,3}", arch):
            raise ConfigError("CUDA architecture", given=arch, allowed="a compute capability without the point, as 90")
    return f"cuda-{'-'.join(architectures)}-{_digest(CUDA_FLAGS, (), ('kernels.cu', 'kernels.cuh', 'maths.h'))}.bin"


def device_image(architecture: str) -> Path:
    """Return the compiled CUDA kernels for one device: of all architectures if they are there or nvcc is, or its own.

    Args:
        architecture: the device's compute capability without the point, as "90".

    Raises:
        ConfigError: this is no compute capability.
        KernelError: there is neither nvcc nor NVRTC, or it failed.
    """
    names = device_names(architecture)
    for name in names:
        if (path := find_cached(name)) is not None:
            return path
    if len(names) > 1 and nvccs():
        try:
            return cuda_image()
        except KernelError as error:
            if nvrtc() is None:
                raise
            logger.warning("pathswitch: nvcc failed, and NVRTC is tried: %s", error)
    return cuda_image((architecture,))


def device_names(architecture: str) -> list[str]:
    """Return the names of the files that a device can use: its own, and the one of all architectures if it can."""
    own = cuda_name((architecture,))
    # That one has PTX for those that come after the last.
    return [cuda_name(), own] if int(architecture) >= int(ARCHITECTURES[0]) else [own]


def find_cached(name: str) -> Path | None:
    """Return the compiled file of this name, if it is there and has not been damaged."""
    if is_whole(cache_folder() / name):
        return cache_folder() / name
    spare = spare_folder()
    return spare / name if _is_ours(spare) and is_whole(spare / name) else None


def _try_each(compilers: list[Compiler], compile_with: Callable[[Compiler], None], none_found: str) -> None:
    failures = []
    for compiler in compilers:
        try:
            return compile_with(compiler)
        except KernelError as error:
            failures.append(f"{compiler} failed: {error}")
    raise KernelError("\n".join([*(failures or [none_found]), NO_COMPILER]))


def _digest(flags: tuple[str, ...], more_flags: tuple[str, ...], sources: tuple[str, ...]) -> str:
    """Return a hash of what a file is made of. Not of the compiler: a folder may come from another machine."""
    content = hashlib.sha256(repr((flags, more_flags)).encode())
    for name in sources:
        content.update((SOURCES / name).read_bytes())
    return content.hexdigest()[:16]


def _cached(name: str, what: str, build: Callable[[Path], None]) -> Path:
    if (path := find_cached(name)) is not None:
        return path
    with _one_builder(name):
        if (path := find_cached(name)) is not None:
            return path
        folder = _writable(cache_folder())
        _remove_leftovers(folder)
        started = time.monotonic()
        logger.info("pathswitch: compiling %s, once", what)
        try:
            _build_into(folder / name, build)
        except OSError as error:
            raise KernelError(f"{folder}: {what} cannot be written: {error}; set ${FOLDER_VARIABLE}") from error
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


def is_whole(path: Path) -> bool:
    """Return whether the file is there and has not been damaged since it was built."""
    try:
        return _file_digest(path).encode() == _digest_file(path).read_bytes()
    except OSError:
        return False


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _digest_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _writable(folder: Path) -> Path:
    """Return the folder, or the spare one where it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        other = spare_folder()
        logger.warning("pathswitch: %s cannot be written (%s): the kernels go to %s", folder, error.strerror, other)
        try:
            other.mkdir(mode=0o700, exist_ok=True)
        except OSError as second:
            raise KernelError(f"{folder}: {error}; {other}: {second}; set ${FOLDER_VARIABLE}") from second
        if not _is_ours(other):
            text = f"{other}: another user may write to it; set ${FOLDER_VARIABLE} to a folder of yours"
            raise KernelError(text) from None
        return other


def _is_ours(folder: Path) -> bool:
    try:
        info = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.getuid() and not info.st_mode & 0o022


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
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(descriptor)
