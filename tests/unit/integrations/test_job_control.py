"""What the ranks agree on, the stop file and the progress file, on a process group of one rank."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from pathswitch.errors import ConfigError
from pathswitch.integrations import job_control, stop_signals
from pathswitch.integrations.job_control import JobControl

CPU = torch.device("cpu")


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(autouse=True)
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("PATHSWITCH_STOP_SIGNALS", "PATHSWITCH_STOP_FILE", "PATHSWITCH_PROGRESS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(stop_signals.RANK_PROCESS_VARIABLE, raising=False)
    monkeypatch.setattr(stop_signals, "_received", 0)
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)}
    yield
    stop_signals.release()
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(job_control.time, "monotonic", clock)
    return clock


def test_a_signal_is_noted_by_name_and_only_the_first(capsys: pytest.CaptureFixture[str]) -> None:
    control = JobControl(["SIGUSR2", "SIGTERM"], CPU)
    assert control.agree() == (None, False)
    assert control.agree(True) == (None, True)
    os.kill(os.getpid(), signal.SIGUSR2)
    os.kill(os.getpid(), signal.SIGTERM)
    assert control.agree() == ("SIGUSR2", False)
    with pytest.raises(SystemExit) as ended:
        control.end("path 'main' asked to stop")
    assert ended.value.code == 0 and capsys.readouterr().out == "pathswitch: path 'main' asked to stop\n"
    os.kill(os.getpid(), signal.SIGTERM)  # while the process takes itself apart
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_signals_of_the_environment_and_those_of_a_framework(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHSWITCH_STOP_SIGNALS", "SIGTERM, SIGUSR1")
    before = signal.getsignal(signal.SIGTERM)
    JobControl(["SIGUSR2"], CPU, foreign=["SIGTERM"])
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.getsignal(signal.SIGUSR1) is signal.getsignal(signal.SIGUSR2) is stop_signals._note
    assert stop_signals.release() and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL
    monkeypatch.setenv("PATHSWITCH_STOP_SIGNALS", "SIGTERM,SIGKILL")
    with pytest.raises(ConfigError, match="environment variable PATHSWITCH_STOP_SIGNALS: given 'SIGKILL'"):
        JobControl([], CPU)


def test_a_scripts_own_handler_is_replaced_with_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        JobControl(["SIGUSR1"], CPU)
        assert "pathswitch: SIGUSR1: the script's handler is replaced" in capsys.readouterr().out
        assert signal.getsignal(signal.SIGUSR1) is stop_signals._note
    finally:
        stop_signals.release()
        signal.signal(signal.SIGUSR1, before)


def test_the_stop_file_is_looked_for_once_a_second(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock
) -> None:
    stop_file, looks, exists = tmp_path / "stop", [], os.path.exists
    monkeypatch.setattr(job_control.os.path, "exists", lambda path: looks.append(path) or exists(path))
    monkeypatch.setenv("PATHSWITCH_STOP_FILE", str(stop_file))
    control = JobControl([], CPU)
    for _ in range(10):  # 2.25 seconds
        assert control.agree() == (None, False)
        clock.seconds += 0.25
    assert looks == [stop_file] * 3
    stop_file.touch()
    clock.seconds += 1
    assert control.agree() == (f"stop file {stop_file}", False)


def test_the_first_rank_alone_looks_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> None:
    monkeypatch.setenv("PATHSWITCH_STOP_FILE", str(tmp_path / "stop"))
    monkeypatch.setenv("PATHSWITCH_PROGRESS_FILE", str(tmp_path / "progress"))
    (tmp_path / "stop").touch()
    monkeypatch.setattr(job_control.dist, "get_rank", lambda: 1)
    control = JobControl([], CPU)
    assert control.agree() == (None, False)
    for step in (1, 2, 3):
        clock.seconds += 10
        control.report(step, 0.1, step, last=step == 3)
    assert not (tmp_path / "progress").exists()


def test_progress(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock) -> None:
    file, writes, replace = tmp_path / "progress.json", [], os.replace
    monkeypatch.setenv("PATHSWITCH_PROGRESS_FILE", str(file))

    def watched_replace(temp: Path, path: Path) -> None:
        writes.append(json.loads(temp.read_text()))  # whole before it has its name
        replace(temp, path)

    monkeypatch.setattr(job_control.os, "replace", watched_replace)
    monkeypatch.setattr(job_control.time, "time", lambda: 1_700_000_000.0)
    control = JobControl([], CPU)
    for step in range(1, 14):  # of one second each, and 8 samples
        control.report(step, 1e-3 * step, 8 * step)
        clock.seconds += 1
    assert [write["step"] for write in writes] == [2, 7, 12]
    control.report(13, 0.013, 104, last=True)
    control.report(13, 0.013, 104, last=True)
    assert [write["step"] for write in writes] == [2, 7, 12, 13], "the last one once"
    expected: dict[str, Any] = {"seconds_per_step": 1.0, "samples_per_s": 8.0, "time": 1_700_000_000.0}
    assert writes[1] == {"step": 7, "lr": 7e-3, **expected}
    assert json.loads(file.read_text())["step"] == 13
    assert list(tmp_path.iterdir()) == [file]


def test_progress_that_cannot_be_written_ends_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATHSWITCH_PROGRESS_FILE", str(tmp_path / "missing" / "progress.json"))
    control = JobControl([], CPU)
    for step in (1, 2):
        clock.seconds += 10
        control.report(step, 0.1, step)
    assert "the progress cannot be written: No such file or directory" in caplog.text
