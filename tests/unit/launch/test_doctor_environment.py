"""What the doctor says of the Python environment, torch, GPUs and compilers."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from doctor_subject import SCHEDULE, by_name, program, subject

from pathswitch.config import PlanFile
from pathswitch.config.launch import LaunchSection
from pathswitch.launch.doctor import CHECKS, accelerator, examine, packages
from pathswitch.launch.spec import job_specs

pytestmark = pytest.mark.slow


def metadata(folder: Path, name: str, version: str) -> str:
    """A package's metadata in a folder for PYTHONPATH, before the real ones."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return str(folder)


def another_python(folder: Path, **variables: str) -> LaunchSection:
    """A [launch] python that is this one with other variables."""
    exports = " ".join(f"{key}='{value}'" for key, value in variables.items())
    return LaunchSection(python=str(program(folder, "python", f'{exports} exec {sys.executable} "$@"')))


def test_versions_of_the_ranks_interpreter_are_compared_with_pathswitchs_own_declaration(tmp_path: Path) -> None:
    old = metadata(tmp_path / "old", "deepspeed", "0.17.9")
    metadata(tmp_path / "old", "rich", "12.0")
    launch = another_python(tmp_path / "bin", PYTHONPATH=old)
    findings = by_name(list(packages.check(subject(launch=launch))))
    assert findings["deepspeed"].status == "problem"
    assert findings["deepspeed"].found == "0.17.9; allowed: >=0.18"
    assert findings["deepspeed"].todo == f"{launch.python} -m pip install 'deepspeed>=0.18'"
    assert findings["rich"].status == "problem" and "rich" not in findings["other packages"].found
    assert findings["torch"].status == findings["Python"].status == "ok"


def test_packages_that_are_missing(tmp_path: Path) -> None:
    launch = another_python(tmp_path / "bin")
    program(tmp_path / "bin", "python", f'exec {sys.executable} -I -S "$@"')  # sees no site-packages
    findings = by_name(list(packages.check(subject(launch=launch))))
    assert findings["torch"].found == "missing; allowed: >=2.6"
    assert findings["pathswitch"].status == "problem" and "missing in" in findings["pathswitch"].found
    assert "megatron-core" not in findings, "only Megatron jobs need it"


def test_an_interpreter_that_is_not_there() -> None:
    [finding] = examine(subject(launch=LaunchSection(python="/none/python")), (CHECKS[0],))
    assert finding.status == "problem" and "'/none/python' cannot be run" in finding.found


def test_two_installations_of_pathswitch_are_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(metadata(tmp_path / "other", "pathswitch", importlib.metadata.version("pathswitch")))
    finding = packages.pathswitch_finding(subject(), "0.1.0", "0.1.0")
    assert finding.status == "note" and str(tmp_path / "other") in finding.found


def test_the_deepspeed_command_of_another_environment_is_noted(tmp_path: Path) -> None:
    program(tmp_path / "bin", "deepspeed", "exit 0")
    finding = packages.command_finding(subject(path=tmp_path / "bin"))
    assert finding.status == "note" and str(tmp_path / "bin" / "deepspeed") in finding.found
    assert packages.command_finding(subject(path=Path(sys.executable).parent)).status == "ok"


def test_plugins_that_are_switched_off(tmp_path: Path) -> None:
    findings = by_name(list(accelerator.check(subject(TORCH_DEVICE_BACKEND_AUTOLOAD="0"))))
    assert findings["PathSwitchLR"].status == "problem"
    assert findings["PathSwitchLR"].todo.startswith("unset TORCH_DEVICE_BACKEND_AUTOLOAD")


def test_a_plugin_that_fails_is_named(tmp_path: Path) -> None:
    folder = Path(metadata(tmp_path / "site", "broken_backend", "1"))
    (folder / "broken_backend-1.dist-info" / "entry_points.txt").write_text(
        "[torch.backends]\nbroken = broken:register\n"
    )
    (folder / "broken.py").write_text("def register():\n    raise OSError('no such device')\n")
    findings = by_name(list(accelerator.check(subject(PYTHONPATH=str(folder)))))
    assert findings["import torch"].status == "problem" and "'broken'" in findings["import torch"].todo


def test_another_copy_of_pathswitch_shadows_this_one(tmp_path: Path) -> None:
    shutil.copytree(Path(packages.facts.package_folder() or ""), tmp_path / "pathswitch")
    findings = by_name(list(accelerator.check(subject(PYTHONPATH=str(tmp_path)))))
    assert findings["PathSwitchLR"].status == "problem" and str(tmp_path) in findings["PathSwitchLR"].found


def test_a_pathswitch_that_cannot_be_imported_says_why(tmp_path: Path) -> None:
    copy = tmp_path / "pathswitch"
    shutil.copytree(Path(packages.facts.package_folder() or ""), copy)
    (copy / "integrations" / "scheduler.py").write_text("raise ImportError('a part is missing')\n")
    findings = by_name(list(accelerator.check(subject(PYTHONPATH=str(tmp_path)))))
    assert "a part is missing" in findings["PathSwitchLR"].found


def test_a_torch_that_hangs_is_not_waited_for(tmp_path: Path) -> None:
    launch = LaunchSection(python=str(program(tmp_path / "bin", "python", "exec sleep 300")))
    start = time.monotonic()
    findings = by_name(list(accelerator.check(subject(launch=launch, seconds=1))))
    assert time.monotonic() - start < 20
    assert findings["import torch"].found == "did not end within 1 s"


NVIDIA_SMI = "echo 'NVIDIA H100 80GB HBM3, 570.86.15, 0 MiB'"


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (NVIDIA_SMI, "problem", "pip install --force-reinstall torch"),
        ("echo 'NVIDIA-SMI has failed'; exit 9", "problem", "dmesg"),
    ],
)
def test_gpus_of_the_driver_that_a_cpu_build_does_not_see(tmp_path: Path, script: str, status: str, words: str) -> None:
    """No GPU was at hand: nvidia-smi is a script."""
    program(tmp_path / "bin", "nvidia-smi", script)
    findings = by_name(list(accelerator.check(subject(path=tmp_path / "bin"))))
    assert findings["GPUs"].status == status and words in findings["GPUs"].todo


CUDA = {"torch": "2.13.0+cu130", "file": "", "scheduler": "", "cuda": "13.0", "hip": None}
NO_OUTPUT = accelerator.Output(0, "", "")


@pytest.mark.parametrize(
    ("known", "variables", "status", "words"),
    [
        ({"devices": ["H100", "H100"], "bf16": True, "nccl": "2.28.9"}, {}, "ok", "2 x H100; CUDA 13.0, NCCL 2.28.9"),
        ({"devices": ["V100"], "bf16": False, "nccl": "2.28.9"}, {}, "note", "no bf16"),
        ({"devices": []}, {"CUDA_VISIBLE_DEVICES": ""}, "problem", "unset CUDA_VISIBLE_DEVICES"),
        ({"devices": []}, {}, "problem", "a driver that is new enough for CUDA 13.0"),
        ({}, {}, "problem", "hangs or crashes"),
    ],
)
def test_what_is_said_of_gpus(known: dict[str, object], variables: dict[str, str], status: str, words: str) -> None:
    """No GPU was at hand: what torch says is made up."""
    environ = {"CUDA_VISIBLE_DEVICES": None} | variables
    driver = ["H100, 570.86.15, 0 MiB"]
    finding = accelerator.gpu_finding(subject(**environ), CUDA | known, NO_OUTPUT, driver)
    assert finding.status == status and words in f"{finding.found} {finding.todo}"
    if known.get("devices"):
        assert "driver 570.86.15" in finding.found


def test_more_ranks_than_gpus(tmp_path: Path) -> None:
    launch = {"gpus_per_node": 3, "command": ["train.py"]}
    plan = PlanFile.model_validate_json(json.dumps({**SCHEDULE, "launch": launch}))
    examined = replace(subject(), plan=plan, specs=tuple(job_specs(plan, tmp_path, tmp_path / "run")))
    for count, status in ((2, "problem"), (3, "ok")):
        known = CUDA | {"devices": ["H100"] * count}
        assert accelerator.gpu_finding(examined, known, NO_OUTPUT, "no nvidia-smi").status == status


@pytest.mark.parametrize(("release", "status"), [("13.1", "ok"), ("12.8", "problem")])
def test_nvcc_must_be_of_torchs_cuda(tmp_path: Path, release: str, status: str) -> None:
    program(tmp_path / "bin", "nvcc", f"echo 'Cuda compilation tools, release {release}, V{release}.1'")
    finding = accelerator.nvcc_finding(subject(CUDA_HOME=str(tmp_path)), CUDA)
    assert finding.status == status and f"CUDA {release}" in finding.found


def test_compilers_that_are_missing(tmp_path: Path) -> None:
    for name in ("sh", "c++"):
        (tmp_path / name).symlink_to(shutil.which(name) or "")
    finding = accelerator.compiler_finding(subject(PATH=str(tmp_path), CXX=None), has_gpus=False)
    assert (finding.status, finding.todo) == ("problem", f'export PATH="{Path(sys.executable).parent}:$PATH"')
    assert accelerator.compiler_finding(subject(PATH=str(tmp_path), CXX=None), has_gpus=True).status == "note"
