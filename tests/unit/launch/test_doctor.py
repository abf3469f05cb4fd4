"""`pathswitch doctor`: what it is asked about, how it runs beside whatever hangs, and what it prints."""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from doctor_subject import by_name, subject
from rich.console import Console

from pathswitch.cli import doctor as command
from pathswitch.config import load_plan_file
from pathswitch.errors import PathSwitchError
from pathswitch.launch.doctor import (
    CHECKS,
    SECONDS,
    SPARE_SECONDS,
    Check,
    Finding,
    Request,
    Subject,
    diagnose,
    examine,
    examine_apart,
)
from pathswitch.launch.spec import job_specs
from pathswitch.launch.submit import rendered, write_files

pytestmark = pytest.mark.slow

PATHSWITCH = str(Path(sys.executable).with_name("pathswitch"))
FINDINGS = [
    Finding("torch", "ok", "2.13.0"),
    Finding("GPUs", "note", "none"),
    Finding("links", "problem", "none [sic]", "rm [that]"),
    Finding("hosts", "skipped", "no hostfile"),
]


def run_doctor(*arguments: object, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = {key: value for key, value in os.environ.items() if not key.startswith("PATHSWITCH_")}
    line = [PATHSWITCH, "doctor", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, timeout=60, cwd=cwd, env=environ | variables)


def test_a_sound_environment_is_sound(tmp_path: Path) -> None:
    done = run_doctor("--json", cwd=tmp_path, TORCH_EXTENSIONS_DIR=str(tmp_path / "x"), XDG_CACHE_HOME=str(tmp_path))
    findings = by_name([Finding(**entry) for entry in json.loads(done.stdout)["findings"]])
    # Whatever this machine has: a driver without torch's CUDA, a container's small shared memory.
    problems = {name for name, finding in findings.items() if finding.status == "problem"}
    assert problems <= {"GPUs", "nvcc", "shared memory"} and done.returncode == bool(problems), done.stdout
    assert findings["torch"].found == importlib.metadata.version("torch")
    for name in ("Python", "deepspeed", "PathSwitchLR", "JIT locks", "atomic rename", "flock", "links", "variables"):
        assert findings[name].status == "ok", findings[name]
    assert not list(tmp_path.iterdir()), "the working folder is left as it was"


def test_a_problem_is_a_line_with_what_to_do_and_exit_code_1(tmp_path: Path) -> None:
    done = run_doctor(cwd=tmp_path, PATHSWITCH_PLAN="none.toml", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 1, done.stderr
    [line] = [line for line in done.stdout.splitlines() if "PATHSWITCH_PLAN: " in line]
    assert line.startswith("problem  PATHSWITCH_PLAN: none.toml is not a file -> export PATHSWITCH_PLAN=")
    assert " problem" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("terminal", [True, False])
def test_what_is_printed(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    monkeypatch.setattr(command, "diagnose", lambda request, environ: FINDINGS)
    shown = io.StringIO()
    code = command.doctor_command(None, None, None, False, Console(file=shown, width=60, force_terminal=terminal))
    text = shown.getvalue()
    assert code == 1
    assert "none [sic]" in text and "rm [that]" in text
    assert "1 ok, 1 note, 1 problem, 1 skipped" in text
    if terminal:
        assert "\x1b[" in text and "found, and what to do" in text
    else:
        assert text.splitlines()[2] == "problem  links: none [sic] -> rm [that]"


def test_json_of_all_findings(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "diagnose", lambda request, environ: FINDINGS[:2])
    assert command.doctor_command(None, None, None, True, Console()) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["findings"][0] == {"name": "torch", "status": "ok", "found": "2.13.0", "todo": ""}
    assert (content["ok"], content["note"]) == (1, 1)


def test_a_plan_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PathSwitchError, match="readable TOML file"):
        diagnose(Request(tmp_path / "none.toml"), os.environ)


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ('kind = "hostfile"', "[launch] hostfile"),
        ('kind = "hostfile"\nhostfile = "none.txt"', "hostfile: "),
        ('kind = "hostfile"\nhostfile = "hosts.txt"\nnodes = 2', "[launch] nodes: 2"),
        ('kind = "local"\nnodes = 2', "[launch] nodes: 2"),
        ('command = ["x", "{ds_config}"]\nds_config = "none.json"', "[launch] ds_config: "),
        ('command = ["x", "{ds_config}"]\nds_config = "ds.json"', "ds.json: scheduler"),
    ],
)
def test_a_plan_that_cannot_be_launched_is_a_finding_beside_the_others(
    tmp_path: Path, launch: str, expected: str
) -> None:
    (tmp_path / "hosts.txt").write_text("127.0.0.1 slots=1\n")
    (tmp_path / "ds.json").write_text('{"scheduler": {"type": "WarmupLR", "params": {}}}')
    plan = tmp_path / "plan.toml"
    plan.write_text(f'[schedule]\nmax_lr = 1e-3\n[[versions]]\nname = "v1"\nsteps = 9\n[launch]\n{launch}\n')
    [finding] = Request(plan).subject(os.environ, 9)[1]
    assert (finding.name, finding.status) == ("plan", "problem")
    assert expected in finding.found and finding.todo.startswith("allowed: ")


def test_the_hostfile_of_a_plan_is_beside_it_and_another_one_takes_its_place(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("hA slots=2\n")
    (tmp_path / "others.txt").write_text("hB slots=2\nhC slots=2\n")
    plan = tmp_path / "plan.toml"
    launch = '[launch]\nkind = "hostfile"\nhostfile = "hosts.txt"\n'
    plan.write_text(f'[schedule]\nmax_lr = 1e-3\n[[versions]]\nname = "v1"\nsteps = 9\n{launch}')
    subject, findings = Request(plan).subject(os.environ, 9)
    assert ([host.name for host in subject.hosts], findings) == (["hA"], [])
    subject, findings = Request(plan, hostfile=tmp_path / "others.txt").subject(os.environ, 9)
    assert ([host.name for host in subject.hosts], findings, subject.several_nodes) == (["hB", "hC"], [], True)


def test_a_hostfile_takes_the_place_of_this_machine(tmp_path: Path) -> None:
    (tmp_path / "hosts.txt").write_text("hA slots=2\n")
    plan = tmp_path / "plan.toml"
    plan.write_text('[schedule]\nmax_lr = 1e-3\n[[versions]]\nname = "v1"\nsteps = 9\n')
    subject, findings = Request(plan, hostfile=tmp_path / "hosts.txt").subject(os.environ, 9)
    assert (subject.kind, subject.launch.kind, findings) == ("hostfile", "hostfile", [])


def test_a_run_is_examined_as_it_was_submitted(tmp_path: Path) -> None:
    plan = tmp_path / "plan.toml"
    (tmp_path / "hosts.txt").write_text("hA slots=2\n")
    launch = '[launch]\nkind = "hostfile"\nhostfile = "hosts.txt"\ncommand = ["train.py"]\n'
    plan.write_text(f'[schedule]\nmax_lr = 1e-3\n[[versions]]\nname = "v1"\nsteps = 9\n{launch}')
    run = tmp_path / "elsewhere" / "run"
    specs = job_specs(load_plan_file(plan), tmp_path, run)
    write_files(rendered(specs, None))
    (run / "plan.toml").write_text(plan.read_text())
    (tmp_path / "link").symlink_to(run)
    subject, findings = Request(run=tmp_path / "link").subject(os.environ, 9)
    assert findings == [] and subject.specs == tuple(specs)
    assert subject.run == run, "its jobs know it by this name"
    assert [host.name for host in subject.hosts] == ["hA"] and subject.working_folder == tmp_path


def test_an_examination_that_breaks_says_so() -> None:
    def breaks() -> list[Finding]:
        raise ZeroDivisionError("at the worst moment")

    with pytest.raises(RuntimeError, match=r"in breaks\n(.*\n)*ZeroDivisionError: at the worst moment"):
        examine_apart(breaks, 9)


def test_an_examination_that_is_killed_is_a_finding() -> None:
    def dies() -> list[Finding]:
        os.kill(os.getpid(), signal.SIGKILL)
        return []

    [finding] = examine_apart(dies, 9)
    assert (finding.status, finding.found) == ("problem", "ended by itself, without a result")


def test_nobody_waits_for_an_examination_that_hangs(tmp_path: Path) -> None:
    """Not even whoever reads what is printed: the child that hangs has left the pipe."""
    code = "import os, time; from pathswitch.launch.doctor.apart import examine_apart, os as apart_os\n"
    code += "apart_os.kill = lambda *_: None\n"  # as if it could not be killed
    code += "print(examine_apart(lambda: time.sleep(20), 0.1)[0].name)"
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == "examination\n"
    assert time.monotonic() - start < 15


def test_the_time_is_limited_whatever_hangs(tmp_path: Path) -> None:
    """A plan that cannot even be opened: the examination is left to itself."""
    fifo = tmp_path / "plan.toml"
    os.mkfifo(fifo)
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    before = children.read_text().split()  # of other tests of this process
    start = time.monotonic()
    [finding] = diagnose(Request(fifo), os.environ, seconds=0.5)
    assert time.monotonic() - start < 0.5 + SPARE_SECONDS + 15
    assert (finding.status, finding.found) == ("problem", "held up for more than 4 s")
    assert all(is_gone(int(pid)) for pid in set(children.read_text().split()) - set(before))
    assert SECONDS + SPARE_SECONDS < 30


def test_checks_that_hang_or_fail_do_not_hold_the_others_up(tmp_path: Path) -> None:
    def hangs(_: object) -> Iterator[Finding]:
        yield Finding("first", "ok", "fine")
        time.sleep(60)

    def fails(_: object) -> Iterator[Finding]:
        raise PermissionError(13, "not allowed")
        yield

    start = time.monotonic()
    checks = (Check("slow", hangs, "do this"), Check("wrong", fails, "do that"), CHECKS[-1])
    findings = examine(subject(seconds=1), checks)
    assert time.monotonic() - start < 20
    assert [(finding.name, finding.status, finding.todo) for finding in findings] == [
        ("first", "ok", ""),
        ("slow", "problem", "do this"),
        ("wrong", "problem", "do that"),
        ("variables", "ok", ""),
    ]
    assert "not checked within 1 s" in findings[1].found and "not allowed" in findings[2].found


def test_programs_are_ended_with_their_children(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    examined = subject(seconds=30)
    start = time.monotonic()
    output = examined.programs.run(["sh", "-c", f"echo out; sleep 300 & echo $! > {pid}; wait"], timeout=1)
    assert time.monotonic() - start < 20
    assert (output.code, output.stdout) == (None, "out\n")
    assert is_gone(int(pid.read_text()))


def test_programs_of_checks_that_hang_are_ended(tmp_path: Path) -> None:
    examined, pids = subject(seconds=0.5), []

    def hangs(given: Subject) -> Iterator[Finding]:
        pids.append(given.programs.start(["sleep", "300"]).pid)
        time.sleep(60)
        yield Finding("never", "ok", "")

    assert [finding.status for finding in examine(examined, (Check("slow", hangs, "do this"),))] == ["problem"]
    assert is_gone(pids[0])
    with pytest.raises(TimeoutError):
        examined.programs.start(["sleep", "300"])


def is_gone(pid: int) -> bool:
    for _ in range(500):
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False
