"""What ``pathswitch kernels build`` and ``status`` do; without torch, on machines without a GPU too."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from pathswitch.cli.run_checkpoints import say
from pathswitch.kernels.build import (
    best_isa,
    cache_folder,
    cpu_library,
    cpu_name,
    cuda_image,
    cuda_name,
    device_names,
    find_cached,
    is_whole,
    spare_folder,
)
from pathswitch.kernels.compilers import (
    ARCHITECTURES,
    CUDA_PACKAGES,
    ISAS,
    Compiler,
    cpp_compilers,
    machine_isas,
    nvccs,
    nvrtc,
)
from pathswitch.kernels.gpus import find_gpus

TITLES = {"cpp": "C++", "nvcc": "nvcc", "nvrtc": "NVRTC"}


def build(*, cpu: bool, cuda: bool, isa: str | None, arch: str | None, console: Console) -> None:
    """Compile what is not there yet: for the CPU, for CUDA, or, if neither is asked for, all that can be.

    Args:
        cpu: for the CPU, and fail if that cannot be done.
        cuda: for CUDA, and fail if that cannot be done.
        isa: an instruction set; this machine's best if not given.
        arch: a CUDA architecture, as 90 or sm_90; all that we know if not given.
        console: where to print.

    Raises:
        ConfigError: there is no such instruction set or architecture.
        KernelError: what was asked for cannot be compiled.
    """
    cpu, cuda = cpu or isa is not None, cuda or arch is not None
    both = not cpu and not cuda
    if cpu or both:
        _built(console, f"CPU, {isa or best_isa()}", cpu_library(isa or best_isa()))
    if both and not nvccs() and nvrtc() is None:
        say(console, f"CUDA: skipped, there is neither nvcc nor NVRTC: install {CUDA_PACKAGES}")
    elif cuda or both:
        for architectures in _wanted(arch):
            _built(console, "CUDA, " + ", ".join(f"sm_{a}" for a in architectures), cuda_image(architectures))


def _wanted(arch: str | None) -> list[tuple[str, ...]]:
    """Return the architectures of each image: nvcc makes one for all, NVRTC one for each."""
    if arch is not None:
        return [(arch.removeprefix("sm_"),)]
    if nvccs():
        return [ARCHITECTURES]
    here = {gpu.architecture for gpu in find_gpus()[1]}
    return [(architecture,) for architecture in sorted(here or ARCHITECTURES)]


def _built(console: Console, what: str, path: Path) -> None:
    say(console, f"{what}: {path}")


def show_status(*, as_json: bool, console: Console) -> None:
    """Print what there is to compile with, what is compiled, and what a run would use; nothing is compiled."""
    status = status_json()
    if as_json:
        print(json.dumps(status, indent=1))
        return
    say(console, f"folder        {status['folder']}")
    for file in status["files"]:
        say(console, f"              {file['name']}, {file['bytes']} bytes, {file['state']}")
    say(console, f"instructions  {', '.join(status['isas'])}")
    for title in ("cpp", "nvcc", "nvrtc"):
        say(console, f"{TITLES[title]:<14}{'; '.join(status[title]) or 'none'}")
    gpus = [f"{gpu['name']} (sm_{gpu['architecture']})" for gpu in status["gpus"]]
    say(console, f"CUDA driver   {'; '.join([status['driver'], *gpus])}")
    for device, use in status["uses"].items():
        say(console, f"a run on {device} uses {use}")


def status_json() -> dict[str, Any]:
    """Return what show_status prints as JSON values."""
    cpp, nvcc, library = cpp_compilers(), nvccs(), nvrtc()
    rtc = [library] if library is not None else []
    driver, gpus = find_gpus()
    uses = {"CPU": _use([cpu_name(best_isa())], cpp)}
    for arch in dict.fromkeys(gpu.architecture for gpu in gpus):
        uses[f"sm_{arch}"] = _use(device_names(arch), [*nvcc, *rtc])
    return {
        "folder": str(cache_folder()),
        "files": [_file(file) for folder in dict.fromkeys((cache_folder(), spare_folder())) for file in _files(folder)],
        "isas": list(machine_isas()),
        "cpp": [str(compiler) for compiler in cpp],
        "nvcc": [str(compiler) for compiler in nvcc],
        "nvrtc": [str(compiler) for compiler in rtc],
        "driver": driver,
        "gpus": [asdict(gpu) for gpu in gpus],
        "uses": uses,
    }


def _files(folder: Path) -> list[Path]:
    return sorted(file for pattern in ("cpu-*.so", "cuda-*.bin") for file in folder.glob(pattern))


def _file(path: Path) -> dict[str, Any]:
    state = "of other sources or flags" if path.stem.rpartition("-")[2] not in _current() else "whole"
    return {"name": str(path), "bytes": path.stat().st_size, "state": state if is_whole(path) else "damaged"}


def _current() -> set[str]:
    """Return the digests in the names of what would be compiled now."""
    names = [*(cpu_name(isa) for isa in ISAS), cuda_name()]
    return {Path(name).stem.rpartition("-")[2] for name in names}


def _use(names: list[str], compilers: list[Compiler]) -> str:
    for name in names:
        if (path := find_cached(name)) is not None:
            return str(path)
    if compilers:
        return f"what it compiles first, once, with {compilers[0]}"
    return "backend 'reference' alone, if the job names it: nothing is compiled, and there is no compiler"
