"""The patches of DeepSpeedEngine: named, idempotent, and refused by an engine that is not known."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from deepspeed.runtime.engine import DeepSpeedEngine

from pathswitch.errors import PathSwitchError
from pathswitch.integrations.deepspeed import patch_engine
from pathswitch.integrations.path_state import FollowsPlan

PATCHED = ("get_lr", "load_checkpoint")


@pytest.fixture(autouse=True)
def patched() -> None:
    patch_engine()


def test_idempotent() -> None:
    before = [getattr(DeepSpeedEngine, name) for name in PATCHED]
    patch_engine()
    assert [getattr(DeepSpeedEngine, name) for name in PATCHED] == before
    assert not any(hasattr(method.__wrapped__, "__wrapped__") for method in before)


@pytest.mark.parametrize("name", PATCHED)
def test_unknown_engine_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for method in PATCHED:  # the engine as DeepSpeed made it, less one method
        monkeypatch.setattr(DeepSpeedEngine, method, getattr(DeepSpeedEngine, method).__wrapped__)
    originals = {method: getattr(DeepSpeedEngine, method) for method in PATCHED}
    monkeypatch.delattr(DeepSpeedEngine, name)
    with pytest.raises(PathSwitchError, match=rf"runtime\.engine\.DeepSpeedEngine\.{name} is not there"):
        patch_engine()
    assert all(getattr(DeepSpeedEngine, other) is originals[other] for other in PATCHED if other != name)


@pytest.mark.parametrize("scheduler", [None, object()])
def test_other_schedulers_get_the_original(monkeypatch: pytest.MonkeyPatch, scheduler: Any) -> None:
    engine = SimpleNamespace(lr_scheduler=scheduler, _get_optimizer_param=lambda name: [f"the group's {name}"])
    assert DeepSpeedEngine.get_lr(engine) == ["the group's lr"]
    del engine.lr_scheduler
    assert DeepSpeedEngine.get_lr(engine) == ["the group's lr"], "an engine that is still being made"


def test_a_step_that_another_tool_has_wrapped_gets_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DeepSpeedEngine, "step", lambda *args, **kwargs: (args[1:], kwargs))
    patch_engine()
    engine = SimpleNamespace(lr_scheduler=FollowsPlan(), pathswitch_job=None)
    assert DeepSpeedEngine.step(engine, 1, lr_kwargs=None) == ((1,), {"lr_kwargs": None})
