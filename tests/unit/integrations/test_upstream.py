"""The digests of DeepSpeed's sources: the installed version is known, and any change of it is seen."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.runtime import utils

from pathswitch.integrations.upstream import ASSUMED, KNOWN, known, source_digest

CLASSES = list(ASSUMED)


def another(self: Any, *args: Any) -> None:
    """Do nothing."""


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_the_installed_deepspeed_is_known(optimizer_class: type[Any]) -> None:
    assert known(optimizer_class), "python -m pathswitch.integrations.upstream prints what is to be looked through"


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_every_method_counts(monkeypatch: pytest.MonkeyPatch, optimizer_class: type[Any]) -> None:
    methods, functions = ASSUMED[optimizer_class]
    before = source_digest(optimizer_class)
    places: list[tuple[Any, str]] = [(optimizer_class, name) for name in methods] + [(utils, n) for n in functions]
    for place, name in places:
        original = getattr(place, name)
        for replacement in (another, functools.wraps(original)(lambda *args: original(*args))):  # noqa: B023
            with monkeypatch.context() as patch:
                patch.setattr(place, name, replacement)
                assert not known(optimizer_class), f"{name} is another"
    assert source_digest(optimizer_class) == before


@pytest.mark.parametrize("optimizer_class", CLASSES)
def test_a_missing_method_is_a_change(monkeypatch: pytest.MonkeyPatch, optimizer_class: type[Any]) -> None:
    monkeypatch.delattr(optimizer_class, ASSUMED[optimizer_class][0][-1])
    assert not known(optimizer_class)


def test_a_method_without_source_is_a_change(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Any] = {}
    exec("def step(self, closure=None): pass", made)
    monkeypatch.setattr(CLASSES[0], "step", made["step"])
    assert not known(CLASSES[0])


@pytest.mark.slow
def test_the_command_prints_the_digests() -> None:
    command = [sys.executable, "-m", "pathswitch.integrations.upstream"]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if "Optimizer" in line]
    assert [line.split('"')[1] for line in lines] == list(KNOWN)
