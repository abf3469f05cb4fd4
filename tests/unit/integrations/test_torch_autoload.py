"""PyTorch's loading of entry points: PathSwitchLR is there after `import torch`, and can do no harm to it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HAS = "import torch; print('has', hasattr(torch.optim.lr_scheduler, 'PathSwitchLR'))"


def python(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | variables
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )


def test_import_torch_is_enough() -> None:
    done = python(HAS + "; import sys; print([m for m in ('deepspeed', 'pydantic') if m in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == ["has True", "[]"]
    assert "pathswitch" not in done.stderr


def test_autoload_switched_off() -> None:
    done = python(HAS + "; import pathswitch.integrations; " + HAS, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout.split() == ["has", "False", "has", "True"], done.stderr


@pytest.mark.parametrize("error", ["raise RuntimeError('broken')", "import no_such_module", "def broken(:"])
def test_broken_pathswitch_leaves_torch_alone(tmp_path: Path, error: str) -> None:
    import pathswitch

    copy = tmp_path / "pathswitch"
    copy.mkdir()
    source = Path(pathswitch.__file__).parent
    for name in ("__init__.py", "errors.py", "integrations"):
        (copy / name).symlink_to(source / name)
    (copy / "schedule.py").write_text(error + "\n")
    done = python(HAS, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "has False\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("pathswitch: PathSwitchLR is not available: ")


def test_importing_pathswitch_imports_nothing_heavy() -> None:
    heavy = "('torch', 'deepspeed', 'numpy', 'pydantic')"
    done = python(f"import sys, pathswitch, pathswitch.versions; print([m for m in {heavy} if m in sys.modules])")
    assert done.stdout == "[]\n", done.stderr


def test_register_is_idempotent() -> None:
    from torch.optim import lr_scheduler

    from pathswitch.integrations.scheduler import PathSwitchLR
    from pathswitch.integrations.torch_autoload import register

    register()
    register()
    assert vars(lr_scheduler)["PathSwitchLR"] is PathSwitchLR


def test_the_optimizer_is_found_without_its_kernels_being_imported() -> None:
    code = """
import sys, torch
print([m for m in sys.modules if m.startswith("pathswitch.kernels")], "PathSwitchAdamW" in vars(torch.optim))
print(hasattr(torch.optim, "PathSwitchAdamWs"))
from torch.optim import PathSwitchAdamW
print(PathSwitchAdamW.__module__, torch.optim.PathSwitchAdamW is PathSwitchAdamW)
"""
    done = python(code)
    assert done.stdout.splitlines() == ["[] False", "False", "pathswitch.integrations.adamw True"], done.stderr


def test_names_of_another_tool_in_torch_optim_are_still_found() -> None:
    code = """
import torch
vars(torch.optim)["__getattr__"] = lambda name: f"another's {name}"
import pathswitch.integrations
print(torch.optim.Other, torch.optim.PathSwitchAdamW.__name__)
"""
    done = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.stdout == "another's Other PathSwitchAdamW\n", done.stderr
