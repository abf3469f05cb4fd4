"""The section "job" of a ds_config's "pathswitch": what it may say."""

from __future__ import annotations

from typing import Any

import pytest

from pathswitch.checkpoint import read_section
from pathswitch.errors import ConfigError


def read(job: Any) -> Any:
    return read_section({"pathswitch": {"job": job}}).job


def test_defaults() -> None:
    job = read({"save_dir": "ckpt/{path}/of/{path}"})
    assert (job.signals, job.exit_at_end) == (("SIGTERM", "SIGUSR2"), True)
    assert job.folder("v2") == "ckpt/v2/of/v2"
    assert read({"save_dir": "ckpt", "signals": ["SIGXCPU"], "exit_at_end": False}).signals == ("SIGXCPU",)
    assert read(None) is None and read_section({}).job is None


SIGNAL = "a signal that a job can be asked to stop with, as SIGTERM, SIGUSR1, SIGUSR2"
FOLDER = "the name of a folder, in which {path} stands for the name of the path"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({}, "job.save_dir: given 'nothing'; allowed: this key is required"),
        ({"save_dir": ""}, f"job.save_dir: given ''; allowed: {FOLDER}"),
        ({"save_dir": "ckpt/{step}"}, f"job.save_dir: given 'ckpt/{{step}}'; allowed: {FOLDER}"),
        ({"save_dir": 1}, "job.save_dir: given 1; allowed: a valid string"),
        ({"save_dir": "a", "signals": "SIGTERM"}, "job.signals: given 'SIGTERM'; allowed: a list of names of signals"),
        ({"save_dir": "a", "signals": ["SIGKILL"]}, f"job.signals.0: given 'SIGKILL'; allowed: {SIGNAL}"),
        ({"save_dir": "a", "signals": ["SIGTERM", "USR1"]}, f"job.signals.1: given 'USR1'; allowed: {SIGNAL}"),
        ({"save_dir": "a", "signals": ["SIGCHLD"]}, f"job.signals.0: given 'SIGCHLD'; allowed: {SIGNAL}"),
        ({"save_dir": "a", "exit_at_end": "yes"}, "job.exit_at_end: given 'yes'; allowed: a valid boolean"),
        (
            {"save_dir": "a", "signal": []},
            "job.signal: given 'unknown key'; allowed: save_dir, signals, exit_at_end (did you mean 'signals'?)",
        ),
        ("ckpt", "job: given 'ckpt'; allowed: a valid dictionary or instance of JobSettings"),
    ],
)
def test_refused(job: Any, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read(job)
    assert str(error.value) == f"ds_config pathswitch.{message}"
