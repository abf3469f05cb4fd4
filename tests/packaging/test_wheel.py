"""The built wheel, in a virtual environment of its own: what users get, not the editable checkout."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "plugin" / "pathswitch" / "kernels" / "csrc"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an interpreter with the wheel installed and this environment's other packages in reach."""
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False, symlinks=True)
    (site_packages,) = folder.glob("lib/python3.*/site-packages")
    here = Path(distribution("torch").locate_file("")).resolve()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site_packages)
    # A .pth line is searched last, and the .pth files in that folder, the editable install among them, are not read.
    (site_packages / "others.pth").write_text(f"{here}\n")
    return folder / "bin" / "python"


def run(python: Path, code: str) -> str:
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_wheel_holds_both_packages_and_their_data(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for expected in (
        "pathswitch/py.typed",
        "pathswitch/report/templates/report.html.j2",
        "pathswitch_megatron/__init__.py",
        *(f"pathswitch/kernels/csrc/{file.name}" for file in CSRC.iterdir()),
    ):
        assert expected in names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"pathswitch", "pathswitch_megatron"}
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_holds_the_kernels_sources(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True, timeout=120)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as content:
        names = {name.partition("/")[2] for name in content.getnames()}
    sources = {str(file.relative_to(ROOT)) for file in CSRC.iterdir()}
    assert len(sources) >= 4
    assert sources <= names


def test_the_installed_wheel_compiles_its_kernels(python: Path, tmp_path: Path) -> None:
    code = f"""
import ctypes, os
os.environ["PATHSWITCH_KERNELS"] = {str(tmp_path)!r}
from pathswitch.kernels.build import cpu_library
library = cpu_library("portable")
print(library, ctypes.CDLL(str(library)).ps_adamw.__name__)
"""
    library, function = run(python, code).split()
    assert Path(library).parent == tmp_path
    assert function == "ps_adamw"


def test_the_installed_wheel_registers_the_scheduler_with_torch(python: Path) -> None:
    code = "import torch.optim.lr_scheduler as s; print(s.PathSwitchLR.__module__, __import__('pathswitch').__file__)"
    module, file = run(python, code).split()
    assert module == "pathswitch.integrations.scheduler"
    assert str(python.parents[1]) in file


def test_the_installed_command_prints_a_plan(python: Path) -> None:
    plan = ROOT / "launch" / "quickstart.toml"
    code = f"import sys; sys.argv = ['pathswitch', 'plan', {str(plan)!r}]; from pathswitch.cli import main; main()"
    assert "58.0 %" in run(python, code)
