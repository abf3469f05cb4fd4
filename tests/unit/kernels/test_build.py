"""Building the kernels: with real compilers, in processes that are killed, start at once, or have no compiler."""

from __future__ import annotations

import ctypes
import os
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from pathswitch.errors import ConfigError, KernelError
from pathswitch.kernels import build, compilers
from pathswitch.kernels.compilers import isas_of, nvccs, nvrtc

pytestmark = pytest.mark.slow

# Small sources in place of the kernels': the compiler is real and quick.
BUILD = """
import logging, sys
from pathlib import Path
from pathswitch.kernels import build, compilers
logging.basicConfig(level=logging.INFO, format="%(message)s")
build.SOURCES = compilers.SOURCES = Path(sys.argv[1])
try:
    print(build.cpu_library("portable"))
except Exception as error:
    print(f"{type(error).__name__}: {error}", file=sys.stderr)
    sys.exit(3)
"""


@dataclass
class Place:
    """Sources, a cache, temporary files and a compiler that counts its calls, in folders whose names have spaces."""

    root: Path
    extra: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for folder in (self.sources, self.temp, self.bin):
            folder.mkdir(parents=True)
        for name in ("maths.h", "vectors.h"):
            (self.sources / name).write_text("#pragma once\n")
        self.write_source(42)
        self.write_compiler('exec g++ "$@"')

    sources = property(lambda self: self.root / "the sources")
    cache = property(lambda self: self.root / "the cache" / "kernels")
    temp = property(lambda self: self.root / "temporary files")
    bin = property(lambda self: self.root / "a bin")
    calls = property(lambda self: self.root / "calls")
    compiler = property(lambda self: self.bin / "counting-c++")

    def write_source(self, answer: int | str) -> None:
        (self.sources / "cpu.cpp").write_text(
            '#include "maths.h"\n#include "vectors.h"\n'
            f'extern "C" __attribute__((visibility("default"))) int answer() {{ return {answer}; }}\n'
        )

    def write_compiler(self, action: str) -> None:
        """Make $CXX a script that writes a line for each compilation, and then does ``action``."""
        count = f'[ "$1" = --version ] || echo call >> "{self.calls}"'
        self.compiler.write_text(f"#!/bin/sh\n{count}\n{action}\n")
        self.compiler.chmod(0o755)

    def compilations(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def start(self, **environment: str) -> subprocess.Popen[str]:
        given = {
            "CXX": f"'{self.compiler}'",
            "PATHSWITCH_KERNELS": str(self.cache),
            "TMPDIR": str(self.temp),
            **self.extra,
            **environment,
        }
        command = [sys.executable, "-c", BUILD, str(self.sources)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=os.environ | given, stdout=pipe, stderr=pipe, text=True)

    def build(self, **environment: str) -> subprocess.CompletedProcess[str]:
        process = self.start(**environment)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess([], process.returncode, out, err)

    def built(self, **environment: str) -> Path:
        done = self.build(**environment)
        assert done.returncode == 0, done.stderr
        return Path(done.stdout.strip())


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def answer(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_it_is_compiled_once_and_then_found(place: Place) -> None:
    first = place.build()
    library = Path(first.stdout.strip())
    assert (library.parent, answer(library)) == (place.cache, 42)
    assert first.stderr.count("compiling the CPU kernels for portable, once") == 1
    second = place.build()
    assert (second.stdout, second.stderr) == (first.stdout, "")
    assert place.compilations() == 1
    assert not list(place.cache.glob("*.tmp*"))


def test_what_is_compiled_elsewhere_is_used_without_a_compiler(place: Place) -> None:
    library = place.built()
    assert place.built(PATH="", CXX="") == library


def test_another_source_has_another_name(place: Place) -> None:
    first = place.built()
    place.write_source(43)
    second = place.built()
    assert (answer(first), answer(second)) == (42, 43)
    (place.sources / "maths.h").write_text("// changed\n")
    assert place.built() not in (first, second)
    assert place.compilations() == 3


def test_other_flags_have_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    before = build.cpu_name("portable")
    assert before != build.cpu_name("avx2")
    monkeypatch.setattr(build, "CPU_FLAGS", (*compilers.CPU_FLAGS, "-g"))
    assert build.cpu_name("portable") != before


@pytest.mark.parametrize("damage", ["truncated", "emptied", "flipped", "digest"])
def test_a_damaged_file_is_compiled_again(place: Place, damage: str) -> None:
    library = place.built()
    content = bytearray(library.read_bytes())
    if damage == "digest":
        library.with_name(f"{library.name}.sha256").write_bytes(b"\xff\xfe")
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        library.write_bytes(content)
    else:
        library.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    assert place.built() == library
    assert place.compilations() == 2
    assert answer(library) == 42


@pytest.mark.parametrize("moment", ["before", "half-way", "behind"])
def test_a_killed_build_neither_blocks_nor_spoils_the_next(place: Place, moment: str) -> None:
    """The compiler is killed with its builder before it has written, with half of its output, or with all of it."""
    output = 'for word; do out=$word; done; printf "half a library" > "$out"'  # -o FILE comes last
    actions = {"before": "", "half-way": output, "behind": 'g++ "$@"'}
    waiting = f'touch "{place.root}/reached"; exec sleep 100'
    place.write_compiler(f'[ "$1" = --version ] && exec g++ --version\n{actions[moment]}\n{waiting}')
    victim = place.start()
    wait_for(place.root / "reached")
    os.kill(victim.pid, signal.SIGKILL)  # the compiler lives on: it must not hold the lock
    victim.wait(60)
    place.write_compiler('exec g++ "$@"')
    start = time.monotonic()
    library = place.built()
    assert answer(library) == 42
    assert time.monotonic() - start < build.LOCK_SECONDS / 5
    leftovers = [file for file in place.cache.iterdir() if ".tmp" in file.name]
    assert len(leftovers) == (0 if moment == "before" else 1)
    for leftover in leftovers:  # when they are old, the next build takes them away
        os.utime(leftover, (1, 1))
    place.write_source(43)
    place.built()
    assert not [file for file in place.cache.iterdir() if ".tmp" in file.name]


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} has not appeared"
        time.sleep(0.01)


def test_processes_that_start_at_once_compile_once(place: Place) -> None:
    place.write_compiler('[ "$1" = --version ] || sleep 1\nexec g++ "$@"')
    processes = [place.start() for _ in range(4)]
    results = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, results
    assert len({out for out, _ in results}) == 1
    assert sum("compiling" in err for _, err in results) == 1
    assert place.compilations() == 1


@pytest.mark.timeout(120)
def test_who_waits_too_long_compiles_alone(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.tempfile, "tempdir", str(place.temp))
    with build._one_builder("a file"):
        with build._one_builder("another"):
            pass  # at once: LOCK_SECONDS are more than this test has
        monkeypatch.setattr(build, "LOCK_SECONDS", 0.2)
        start = time.monotonic()
        with build._one_builder("a file"):
            assert time.monotonic() - start >= 0.2


def test_a_folder_that_cannot_be_written_is_replaced_by_one_in_the_temporary_folder(place: Place) -> None:
    file = place.root / "a file"
    file.write_text("")
    first = place.build(PATHSWITCH_KERNELS=str(file / "kernels"))
    library = Path(first.stdout.strip())
    assert library.parent.parent == place.temp
    assert answer(library) == 42
    assert "cannot be written" in first.stderr
    second = place.build(PATHSWITCH_KERNELS=str(file / "kernels"))
    assert (second.stdout, second.stderr, place.compilations()) == (first.stdout, "", 1)


def test_a_temporary_folder_that_others_may_write_to_is_refused(place: Place) -> None:
    file = place.root / "a file"
    file.write_text("")
    theirs = place.temp / f"pathswitch-kernels-{os.getuid()}"
    theirs.mkdir()
    theirs.chmod(0o777)
    done = place.build(PATHSWITCH_KERNELS=str(file / "kernels"))
    assert done.returncode == 3
    assert f"{theirs}: another user may write to it" in done.stderr
    assert not list(theirs.iterdir())


def test_without_a_compiler_the_error_says_what_to_do(place: Place) -> None:
    done = place.build(PATH="", CXX="/nowhere/c++")
    assert done.returncode == 3
    for word in ("KernelError", "$CXX, c++, g++, clang++", "apt-get install g++", "pathswitch kernels build"):
        assert word in done.stderr
    assert "'reference'" in done.stderr


def test_a_compiler_that_fails_shows_its_last_lines(place: Place) -> None:
    (place.sources / "cpu.cpp").write_text("#error the sources are broken\n")
    done = place.build(PATH=str(place.bin), CXX="/usr/bin/g++")
    assert done.returncode == 3
    assert "/usr/bin/g++" in done.stderr
    assert "#error the sources are broken" in done.stderr
    assert not place.cache.exists() or not list(place.cache.iterdir())


def test_a_compiler_that_fails_is_followed_by_the_next(place: Place) -> None:
    place.write_compiler('[ "$1" = --version ] && exec echo broken\nexit 1')
    assert answer(place.built()) == 42


def test_the_compiler_in_CXX_may_have_arguments(place: Place) -> None:
    place.write_source("ANSWER")
    assert answer(place.built(CXX="/usr/bin/env g++ -DANSWER=7")) == 7


@pytest.mark.parametrize(
    ("flags", "machine", "expected"),
    [
        ("avx2 f16c avx512f avx512bw avx512dq avx512vl", "x86_64", ("avx512", "avx2", "portable")),
        ("avx2 f16c avx512f avx512bw avx512dq", "x86_64", ("avx2", "portable")),
        ("avx2", "x86_64", ("portable",)),
        ("avx2 f16c", "aarch64", ("portable",)),
        ("", "x86_64", ("portable",)),
    ],
)
def test_instruction_sets(flags: str, machine: str, expected: tuple[str, ...]) -> None:
    cpuinfo = f"processor\t: 0\nflags\t\t: fpu {flags} rdseed\nbugs\t\t: none\n"
    assert isas_of(cpuinfo, machine) == expected


def test_there_is_a_library_for_every_instruction_set_of_this_machine() -> None:
    for isa in compilers.machine_isas():
        assert ctypes.CDLL(str(build.cpu_library(isa))).ps_adamw


def test_names_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"avx3.*did you mean"):
        build.cpu_library("avx3")
    with pytest.raises(ConfigError, match=r"9\.0"):
        build.device_image("9.0")


def entries(fatbin: bytes) -> list[tuple[str, int]]:
    """Return the kind and the architecture of what a fatbin holds."""
    magic, _, place, size = struct.unpack_from("<IHHQ", fatbin)
    assert magic == 0xBA55ED50
    found = []
    end = place + size
    while place < end:
        kind, _, header, padded = struct.unpack_from("<HHIQ", fatbin, place)
        (architecture,) = struct.unpack_from("<I", fatbin, place + 28)
        found.append(({1: "ptx", 2: "cubin"}[kind], architecture))
        place += header + padded
    return sorted(found)


CUDA_SOURCE = 'extern "C" __global__ void ps_answer(int* x) { *x = ANSWER; }\n'


@pytest.fixture
def cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of small CUDA sources that the compilers are given."""
    sources = tmp_path / "the sources"
    sources.mkdir()
    (sources / "kernels.cu").write_text('#include "kernels.cuh"\n' + CUDA_SOURCE)
    (sources / "kernels.cuh").write_text('#include "maths.h"\n')
    (sources / "maths.h").write_text("#define ANSWER 42\n")
    for module in (build, compilers):
        monkeypatch.setattr(module, "SOURCES", sources)
    monkeypatch.setenv("PATHSWITCH_KERNELS", str(tmp_path / "the cache"))
    return sources


@pytest.mark.skipif(not nvccs(), reason="no nvcc")
def test_nvcc_makes_one_image_for_all_architectures(cuda: Path) -> None:
    image = build.device_image("90")
    assert image == build.cuda_image() == build.device_image("103")
    assert entries(image.read_bytes()) == [("cubin", 80), ("cubin", 90), ("cubin", 100), ("ptx", 100)]


@pytest.mark.skipif(not nvccs(), reason="no nvcc")
def test_nvcc_shows_its_last_lines(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvrtc", lambda: None)
    (cuda / "maths.h").write_text("#error the sources are broken\n")
    with pytest.raises(KernelError, match="the sources are broken"):
        build.device_image("90")


@pytest.mark.skipif(nvrtc() is None, reason="no NVRTC")
def test_nvrtc_makes_the_image_of_one_device_where_there_is_no_nvcc(
    cuda: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "nvccs", list)
    image = build.device_image("90")
    assert image.read_bytes()[:4] == b"\x7fELF"
    assert b"ps_answer" in image.read_bytes()
    assert build.device_image("80") != image
    with pytest.raises(KernelError, match="one architecture at a time"):
        build.cuda_image()


@pytest.mark.skipif(nvrtc() is None, reason="no NVRTC")
def test_nvrtc_follows_an_nvcc_that_fails_and_shows_its_last_lines(
    cuda: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "bin" / "nvcc"
    broken.parent.mkdir()
    broken.write_text("#!/bin/sh\necho no host compiler >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.device_image("90").read_bytes()[:4] == b"\x7fELF"
    (cuda / "maths.h").write_text("#error the sources are broken\n")
    with pytest.raises(KernelError) as caught:
        build.device_image("90")
    for word in ("no host compiler", "the sources are broken", "NVRTC"):
        assert word in str(caught.value)


def test_without_nvcc_and_nvrtc_the_error_says_what_to_do(cuda: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "nvccs", list)
    monkeypatch.setattr(build, "nvrtc", lambda: None)
    with pytest.raises(KernelError, match=r"nvidia-cuda-nvrtc.*\n.*pathswitch kernels build.*'reference'"):
        build.device_image("90")
