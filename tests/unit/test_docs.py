"""The README and its fellows say what is so: links lead somewhere, snippets run, commands exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from pathswitch.config import PlanFile
from pathswitch.launch.spec import job_specs

ROOT = Path(__file__).parents[2]
PATTERNS = (
    "*.md",
    "ds_configs/*.md",
    "launch/*.md",
    "launch/sotu/*.md",
    "launch/megatron/*.md",
    "megatron_patches/*.md",
)
DOCUMENTS = sorted(file for pattern in PATTERNS for file in ROOT.glob(pattern))


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_relative_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)|src=\"([^\"]+)\"", document.read_text()):
        link = target[0] or target[1]
        if not link.startswith(("http://", "https://")):
            assert (document.parent / link).exists(), f"{document}: {link}"


def test_readme_python_runs() -> None:
    snippets = blocks(ROOT / "README.md", "python")
    assert snippets
    for snippet in snippets:
        subprocess.run([sys.executable, "-c", snippet], check=True, timeout=120, cwd=ROOT)


def test_readme_plans_are_valid() -> None:
    plan, *sections = map(tomllib.loads, blocks(ROOT / "README.md", "toml"))
    for content in (plan, *(plan | section for section in sections)):
        plan_file = PlanFile.model_validate({**content, "versions": tuple(content.get("versions", ()))})
        assert job_specs(plan_file, ROOT, ROOT / "runs")


@cache
def help_of(command: str) -> str:
    line = [Path(sys.executable).with_name("pathswitch"), command, "--help"]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_exist(document: Path) -> None:
    """Every `pathswitch` line names a command, and options that this command has."""
    lines = [line for block in blocks(document, "console") for line in block.splitlines()]
    commands = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.startswith("$ ")]
    assert (
        document.name != "README.md" or document.parent != ROOT or any(words[0] == "pathswitch" for words in commands)
    )
    for words in commands:
        if words[0] == "pathswitch":
            for option in (word for word in words[2:] if word.startswith("--")):
                assert option in help_of(words[1]), f"{words[1]} has no {option}"
        elif words[0].startswith("./"):
            assert (document.parent / words[0]).is_file(), words


def test_the_two_quickstart_plans_differ_in_their_split_alone() -> None:
    temporal, iid = (
        tomllib.loads((ROOT / "launch" / f"{name}.toml").read_text()) for name in ("quickstart", "quickstart_iid")
    )
    assert iid["data"].pop("split") == "iid"
    assert temporal == iid
