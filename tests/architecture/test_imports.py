"""Who may import whom: this table is the architecture."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "plugin" / "pathswitch"
MEGATRON = ROOT / "megatron_patches" / "pathswitch_megatron"

ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "atomic": set(),
    "score": set(),
    "schedule": {"errors"},
    "kernels": {"errors", "schedule"},
    "versions": {"errors", "atomic", "schedule"},
    "config": {"errors", "schedule", "versions", "checkpoint"},
    "data": {"errors", "atomic"},
    "checkpoint": {"errors", "atomic"},
    "run_folder": {"errors", "atomic", "config", "versions"},
    "integrations": {"errors", "atomic", "schedule", "versions", "config", "checkpoint", "kernels"},
    "trainer": {
        *("errors", "atomic", "config", "versions", "run_folder", "data", "checkpoint", "integrations", "kernels"),
        "score",
    },
    "launch": {"errors", "atomic", "config", "versions", "checkpoint", "run_folder"},
    "report": {"errors", "atomic", "config", "schedule", "versions", "run_folder", "score"},
}
# The Megatron hooks stand outside: they may use these rooms, and no room may use them.
MEGATRON_ALLOWED = {
    *("errors", "atomic", "schedule", "versions", "config", "checkpoint", "run_folder", "integrations", "kernels"),
}
EXPORT_ALLOWED = MEGATRON_ALLOWED | {"trainer", "data"}  # the release's layout and tokenizer
STDLIB_ONLY = ("errors", "atomic", "score", "schedule", "versions")
# Optional or heavy packages are imported by these files alone.
OWNERS = {
    "blake3": {"checkpoint/files.py"},
    "deepspeed": {
        "integrations/deepspeed.py",
        "integrations/one_pass.py",
        "integrations/random_state.py",
        "integrations/upstream.py",
        "trainer/engine.py",
        "launch/deepspeed_runner.py",
    },
    "matplotlib": {"report/plots.py", "report/style.py"},
    "jinja2": {"report/html.py"},
    "sentencepiece": {"data/tokenizer.py"},
    "safetensors": {"trainer/export.py"},
    "tomli_w": {"run_folder.py"},
    "typer": {"cli/app.py"},
}


def imports(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_rooms_import_only_what_they_may(file: Path) -> None:
    room, rooms = room_of(file), {room_of(other) for other in FILES}
    used = {name.split(".")[1] for name in imports(file) if name.startswith("pathswitch.")} & rooms
    if room != "cli":  # the command line may use every room; no room may use it
        assert used - {room} <= ALLOWED[room]
    assert not any(name.startswith("pathswitch_megatron") for name in imports(file))
    if room in STDLIB_ONLY:
        assert {name.split(".")[0] for name in imports(file)} <= set(sys.stdlib_module_names) | {"pathswitch"}
    for package, owners in OWNERS.items():
        if any(name.split(".")[0] == package for name in imports(file)):
            assert str(file.relative_to(PACKAGE)) in owners


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("pathswitch", {"torch", "deepspeed", "numpy", "pydantic"}),
        ("pathswitch.schedule, pathswitch.versions", {"torch", "deepspeed", "numpy", "pydantic"}),
        ("pathswitch.cli", {"torch", "deepspeed", "matplotlib"}),
        ("pathswitch.kernels.build", {"torch", "deepspeed", "numpy", "pydantic"}),
        ("pathswitch.cli.kernels", {"torch", "deepspeed"}),
        ("pathswitch_megatron.activation", {"torch", "numpy", "pydantic", "megatron"}),
    ],
)
def test_imports_stay_light(module: str, absent: set[str]) -> None:
    code = f"import {module}, sys; print(sorted({absent!r} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("file", sorted(MEGATRON.glob("*.py")), ids=lambda file: file.name)
def test_megatron_hooks_import_only_what_they_may(file: Path) -> None:
    names = imports(file)
    used = {name.split(".")[1] for name in names if name.startswith("pathswitch.")} & {room_of(f) for f in FILES}
    assert used <= (EXPORT_ALLOWED if file.name == "export.py" else MEGATRON_ALLOWED)
    if any(name.split(".")[0] == "megatron" for name in names):
        assert file.name == "activation.py", "Megatron itself is imported by the file that waits for it"


def test_source_roots_are_not_packages() -> None:
    for folder in ("plugin", "megatron_patches", "launch", "ds_configs"):
        assert not (ROOT / folder / "__init__.py").exists()


def test_files_and_functions_stay_small() -> None:
    for file in [*FILES, *MEGATRON.glob("*.py")]:
        assert file.read_text().count("\n") <= 400, file
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 60, f"{file}: {node.name}"
