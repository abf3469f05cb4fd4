"""Whether torch starts, loads the scheduler and sees the GPUs, and whether DeepSpeed can compile what it needs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pathswitch.launch.doctor.facts import MARK, package_folder
from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem, skipped
from pathswitch.launch.doctor.programs import Output

TORCH_SECONDS = 22.0
TOOL_SECONDS = 10.0
AUTOLOAD = "TORCH_DEVICE_BACKEND_AUTOLOAD"
OUR_ERROR = "pathswitch: PathSwitchLR is not available: "
BACKEND_ERROR = re.compile(r"Failed to load the backend extension: (\S+?)\. ")


def check(subject: Subject) -> Iterator[Finding]:
    """Ask a process that imports torch, then the tools beside it."""
    source = Path(__file__).with_name("torch_probe.py").read_text(encoding="utf-8")
    output = subject.programs.run([subject.python, "-c", source], timeout=TORCH_SECONDS)
    known = probed(output)
    if "torch" not in known:
        yield import_failure(subject, output)
    else:
        yield scheduler_finding(subject, known, output)
        yield gpu_finding(subject, known, output, nvidia_smi(subject))
        yield nvcc_finding(subject, known)
    yield compiler_finding(subject, bool(known.get("devices")))


def probed(output: Output) -> dict[str, Any]:
    """Return what the probe has said until it ended or was ended."""
    lines = [line for line in output.stdout.splitlines() if line.startswith(MARK)]
    return {key: value for line in lines for key, value in json.loads(line.removeprefix(MARK)).items()}


def import_failure(subject: Subject, output: Output) -> Finding:
    """Report that ``import torch`` fails or hangs."""
    if output.code is None:
        found = f"did not end within {min(TORCH_SECONDS, subject.programs.seconds):.0f} s"
        todo = f"time {subject.python} -c 'import torch'   # each rank waits as long; is its disk slow?"
        return problem("import torch", found, todo)
    backend = BACKEND_ERROR.search(output.stderr)
    if backend is not None:
        todo = f"repair or uninstall the package with the torch.backends plug-in {backend[1]!r}"
        return problem("import torch", f"fails: plug-in {backend[1]!r} raises", todo)
    return problem("import torch", f"fails: {output.last_line}", f"{subject.python} -m pip install 'torch>=2.6'")


def scheduler_finding(subject: Subject, known: dict[str, Any], output: Output) -> Finding:
    """Report whether ``import torch`` alone makes PathSwitchLR known to DeepSpeed."""
    name, own, loaded = "PathSwitchLR", package_folder(), known["scheduler"]
    if loaded is not None and own is not None and Path(loaded).resolve().is_relative_to(own):
        return ok(name, "`import torch` adds it to torch.optim.lr_scheduler")
    if loaded is not None:
        todo = f"keep one of them: {subject.python} -m pip uninstall pathswitch, or take the other off PYTHONPATH"
        return problem(name, f"comes from {loaded}, and not from {own}", todo)
    if subject.environ.get(AUTOLOAD, "1") != "1":
        todo = f"unset {AUTOLOAD}   # or `import pathswitch.integrations` in the training script"
        return problem(name, f"not loaded: {AUTOLOAD}={subject.environ[AUTOLOAD]} switches plug-ins off", todo)
    reason = output.stderr.partition(OUR_ERROR)[2].split("\n")[0]
    if reason:
        return problem(name, f"cannot be imported: {reason}", "repair what it names, and run this again")
    todo = f"{subject.python} -m pip install pathswitch   # PYTHONPATH alone does not register its plug-in"
    return problem(name, f"torch {known['torch']} loads no plug-in of pathswitch", todo)


def nvidia_smi(subject: Subject) -> list[str] | str:
    """Return a line for each GPU that the driver knows, or why there is none."""
    if subject.which("nvidia-smi") is None:
        return "no nvidia-smi"
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.used", "--format=csv,noheader"]
    output = subject.programs.run(query, timeout=TOOL_SECONDS)
    if output.code is None:
        return f"nvidia-smi does not end within {TOOL_SECONDS:.0f} s"
    lines = [line.strip() for line in output.stdout.splitlines() if line.strip()]
    return lines if output.code == 0 and lines else f"nvidia-smi fails: {output.last_line}"


def gpu_finding(subject: Subject, known: dict[str, Any], output: Output, driver: list[str] | str) -> Finding:
    """Report the GPUs that torch sees, and why it does not see those of the driver."""
    build = "CPU" if known.get("cuda") is None and known.get("hip") is None else f"CUDA {known['cuda'] or known['hip']}"
    if "devices" not in known:
        found = f"torch ({build} build) hangs or crashes when it looks for GPUs: {output.last_line}"
        return problem("GPUs", found, "restart the driver or the machine: nvidia-smi, and dmesg | grep -i nvrm")
    if not known["devices"]:
        return without_gpus(subject, known["torch"], build, driver)
    names = known["devices"]
    found = f"{len(names)} x {', '.join(sorted(set(names)))}; {build}, NCCL {known.get('nccl', 'missing')}"
    found += f"; driver {driver[0].split(', ')[1]}" if isinstance(driver, list) else ""
    wanted = max((spec.gpus_per_node for spec in subject.specs), default=0)
    if subject.kind == "local" and wanted > len(names):
        todo = f"gpus_per_node = {len(names)}, or fewer, in [launch]"
        return problem("GPUs", f"{found}; the plan asks for {wanted} on a node", todo)
    if not known.get("bf16", True):
        return note("GPUs", f"{found}; no bf16 in hardware", '"fp16": {"enabled": true} in the ds_config, or fp32')
    return ok("GPUs", found)


def without_gpus(subject: Subject, torch: str, build: str, driver: list[str] | str) -> Finding:
    """Report that torch sees no GPU: a mistake where the driver has some."""
    if isinstance(driver, str):
        if driver != "no nvidia-smi":
            return problem("GPUs", f"{driver}; torch {torch} sees none", "repair the driver: dmesg | grep -i nvrm")
        elsewhere = "; jobs run on other machines" if subject.kind == "slurm" else "; ranks train on CPUs with gloo"
        return note("GPUs", f"none (torch {torch}, {build} build){elsewhere}")
    found = f"the driver has {len(driver)} ({driver[0]}), torch {torch} ({build} build) sees none"
    if build == "CPU":
        todo = f"{subject.python} -m pip install --force-reinstall torch   # PyTorch's default build has CUDA"
    elif "CUDA_VISIBLE_DEVICES" in subject.environ:
        todo = f"unset CUDA_VISIBLE_DEVICES   # it is {subject.environ['CUDA_VISIBLE_DEVICES']!r}"
    else:
        todo = f"a driver that is new enough for {build}, or a torch build for this driver (https://pytorch.org)"
    return problem("GPUs", found, todo)


def nvcc_finding(subject: Subject, known: dict[str, Any]) -> Finding:
    """Report whether DeepSpeed's CUDA operators could be compiled for this torch."""
    cuda = known.get("cuda")
    if cuda is None:
        return skipped("nvcc", "torch is built without CUDA: nothing is compiled with it")
    folders = [Path(subject.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if subject.environ.get(name)]
    places = [*(folder / "nvcc" for folder in folders), subject.which("nvcc"), Path("/usr/local/cuda/bin/nvcc")]
    nvcc = next((str(place) for place in places if place is not None and Path(place).is_file()), None)
    instead = '"torch_adam": true in the ds_config\'s optimizer parameters needs no compiler'
    if nvcc is None:
        todo = f"install the CUDA {cuda} toolkit and export CUDA_HOME, or avoid compiled operators: {instead}"
        return note("nvcc", f"missing: DeepSpeed cannot compile FusedAdam and other operators for CUDA {cuda}", todo)
    release = re.search(r"release (\d+)\.(\d+)", subject.programs.run([nvcc, "--version"], timeout=TOOL_SECONDS).stdout)
    version = f"{release[1]}.{release[2]}" if release else "unknown"
    if version.split(".")[0] != cuda.split(".")[0]:
        todo = f"export CUDA_HOME to a CUDA {cuda} toolkit, or avoid compiled operators: {instead}"
        return problem("nvcc", f"{nvcc} is CUDA {version}, torch is built for CUDA {cuda}", todo)
    return ok("nvcc", f"{nvcc}, CUDA {version} (torch: {cuda})")


def compiler_finding(subject: Subject, has_gpus: bool) -> Finding:
    """Report whether extensions can be compiled: every CPU job of DeepSpeed needs one."""
    compiler = subject.environ.get("CXX", "c++" if subject.which("c++") else "g++")
    missing = [program for program in (compiler, "ninja") if subject.which(program) is None]
    if not missing:
        return ok("compilers", f"{subject.which(compiler)}, {subject.which('ninja')}")
    beside = Path(subject.python).with_name("ninja")
    advice = [f'export PATH="{beside.parent}:$PATH"' if beside.is_file() else f"{subject.python} -m pip install ninja"]
    todo = " && ".join(
        (["apt-get install g++"] if compiler in missing else []) + (advice if "ninja" in missing else [])
    )
    found = f"not on PATH: {', '.join(missing)}"
    if has_gpus:
        return note("compilers", f"{found}; DeepSpeed's compiled operators (FusedAdam, CPUAdam) cannot be built", todo)
    return problem("compilers", f"{found}; DeepSpeed compiles its CPU communication when a job starts", todo)
