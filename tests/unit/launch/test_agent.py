"""The agent of one job, with real processes as its ranks: what it starts again, what it gives up, and what it asks."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agent_job import WAIT_FOR_STOP, Job, Ranks
from launch_jobs import HERE, SCHEDULE, commit, complete, open_run, wait_for, write_plan

from pathswitch.errors import RunError
from pathswitch.launch import agent as agent_module
from pathswitch.launch.agent import ASKED, COMPLETED, GAVE_UP, Agent
from pathswitch.launch.agent_lock import holder, only_agent
from pathswitch.launch.gate import OPEN

# What is started again, and what is not.


@pytest.mark.parametrize("code", [0, 1])
def test_a_script_proves_its_end_by_its_last_checkpoint(job: Job, code: int) -> None:
    job.ready(240)
    assert job.run(f"save 240; exit {code}") == COMPLETED
    assert job.events() == [("started", 0), ("completed", 240)]
    assert json.loads(job.files.completion.read_text())["end_step"] == 240
    assert job.status()[0] == "done"
    assert job.run("exit 1") == COMPLETED and job.ranks.notes().count("ended") == 1  # nothing is started any more


def test_an_exit_code_proves_nothing(job: Job) -> None:
    job.ready(239, 240)
    assert job.run("exit 0", "save 239; exit 1", "save 240") == COMPLETED
    assert job.events() == [
        ("started", 0),
        ("failed", 0),
        ("started", 0),
        ("failed", 239),
        ("started", 239),
        ("completed", 240),
    ]
    assert job.reasons()[0].startswith("exit code 0: the last lines of ")


def test_a_record_of_the_embedded_trainers_is_proof_too(job: Job) -> None:
    record = f"echo '{{\"end_step\": 240}}' > {job.files.completion}"
    assert job.run(record) == COMPLETED
    assert job.events() == [("started", 0), ("completed", 240)]


def test_the_budget_is_of_starts_without_a_new_checkpoint(job: Job) -> None:
    job.ready(40)
    assert job.run("exit 1", "exit 1", "save 40; exit 1", "echo 'ValueError: no luck'; exit 9") == GAVE_UP
    starts = [step for event, step in job.events() if event == "started"]
    assert starts == [0, 0, 0, 40, 40, 40]
    assert job.events()[-1] == ("gave up", 40)
    assert job.status() == ("gave up", "3 starts in a row have saved nothing beyond step 40")
    assert any(reason.startswith("exit code 9: ValueError: no luck") for reason in job.reasons())


def test_a_job_that_gave_up_has_a_new_budget_when_it_is_submitted_again(job: Job) -> None:
    job.ready(240)
    assert job.run("exit 1") == GAVE_UP
    assert job.run("exit 1", "exit 1", "save 240") == COMPLETED


@pytest.mark.parametrize(
    "line", ["pathswitch: error: alpha: given 2; allowed: 1", "[rank1]: pathswitch.errors.ConfigError: alpha: given 2"]
)
def test_what_pathswitch_itself_refuses_is_given_up_at_once(job: Job, line: str) -> None:
    assert job.run(f"echo '{line}'; exit 1") == GAVE_UP
    assert job.events() == [("started", 0), ("gave up", 0)]
    assert "alpha: given 2" in str(job.status()[1])


def test_a_refusal_behind_a_new_checkpoint_is_tried_again(job: Job) -> None:
    job.ready(40, 240)
    assert job.run("save 40; echo 'pathswitch: error: disk'; exit 1", "save 240") == COMPLETED


def test_an_old_refusal_in_the_log_is_no_refusal(job: Job) -> None:
    job.ready(240)
    job.files.log.write_text("pathswitch: error: of another start\n")
    assert job.run("exit 1", "save 240") == COMPLETED


def test_a_launcher_that_reports_a_lost_host_is_ended_and_started_again(job: Job) -> None:
    job.ready(240)
    job.start("echo $$ > $NOTES.pid; sleep 1000", "rm -f $NOTES/../failure; save 240")
    wait_for(lambda: (job.folder / "notes.pid").exists(), "the ranks run")
    (job.folder / "failure").write_text("host hB has not answered for 60 s")
    wait_for(lambda: ("failed", 0) in job.events(), "the failure is recorded")
    (job.folder / "failure").unlink()
    assert job.end() == COMPLETED
    assert "host hB has not answered for 60 s" in job.reasons()
    assert not Path(f"/proc/{(job.folder / 'notes.pid').read_text().strip()}").exists()
    assert job.ranks.notes().count("ended") == 2 and "host hB: pid 7 outlived the launcher" in job.log()


def test_what_the_ranks_leave_running_is_ended(job: Job) -> None:
    job.ready(240)
    assert job.run("sleep 1000 & echo $! > $NOTES.pid; save 240") == COMPLETED
    stat = Path(f"/proc/{(job.folder / 'notes.pid').read_text().strip()}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_launcher_that_cannot_be_started_is_a_failure_that_says_why(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Ranks, "command", lambda ranks, training: ["/none/such", *training])
    assert job.run("") == GAVE_UP
    assert job.events().count(("failed", 0)) == 3
    assert f"/none/such cannot be started in {job.folder}: No such file or directory" in job.reasons()


def test_a_branch_whose_gate_is_closed_is_given_up(make_job: Callable[..., Job]) -> None:
    job = make_job(HERE, "v1")
    assert job.run("exit 0") == GAVE_UP
    assert job.events() == [("gave up", 40)] and job.reasons() == ["may not start: until main@40"]
    assert job.ranks.notes() == []


def test_a_branch_starts_from_its_fork(make_job: Callable[..., Job], tmp_path: Path) -> None:
    job = make_job(HERE, "v1")
    commit(open_run(tmp_path / "plan.toml", tmp_path / "run")["main"], 40)
    job.ready(100)
    assert job.run("[ -e $CKPT/global_step40/pathswitch.json ] && save 100") == COMPLETED
    assert job.events() == [("opened", 40), ("started", 40), ("completed", 100)]


def test_the_ranks_have_the_jobs_environment_and_no_input(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATHSWITCH_PATH", "v9")
    job.ready(240)
    assert job.run("env -0 > $NOTES.env; pwd > $NOTES.cwd; cat > $NOTES.input; save 240") == COMPLETED
    environment = dict(entry.split("=", 1) for entry in (job.folder / "notes.env").read_text().split("\0")[:-1])
    assert {name: environment[name] for name in job.spec.environment()} == job.spec.environment()
    assert environment["PATHSWITCH_PATH"] == "main" and environment["CKPT"] == str(job.files.checkpoints)
    assert (job.folder / "notes.cwd").read_text().strip() == job.spec.working_folder
    assert (job.folder / "notes.input").read_text() == ""
    assert job.ranks.notes()[0] == "start train.py --path main"


def test_a_path_of_several_parts_goes_on_at_once(make_job: Callable[..., Job], tmp_path: Path) -> None:
    data = "".join(f'[[versions]]\nname = "v{n}"\nsteps = 100\nmegatron_data = "v{n}"\n' for n in (1, 2))
    launch = '[launch]\ncommand = ["pretrain.py", "{megatron_args}"]\n'
    (tmp_path / "plan.toml").write_text(f"{SCHEDULE}{data}[megatron]\nglobal_batch_size = 4\n{launch}")
    job = make_job(plan=tmp_path / "plan.toml")
    job.ready(60, 100, 140)
    assert job.run("save 60; exit 1", "save 100", "save 140") == COMPLETED
    data_of = [line.split("--data-path ")[1].split()[0] for line in job.ranks.notes() if line.startswith("start")]
    assert data_of == [str(tmp_path / version) for version in ("v1", "v1", "v2")]
    assert job.events()[-1] == ("completed", 140)


# A version that is added while the job runs.


def test_a_version_added_while_it_trains_sends_it_on(job: Job) -> None:
    job.ready(240)
    job.start("until [ -e $NOTES.go ]; do sleep 0.02; done; save 240", "save 340")
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    open_run(write_plan(job.folder / "plan.toml", HERE, versions=4), job.folder / "run")
    job.ready(340)
    (job.folder / "notes.go").touch()
    assert job.end() == COMPLETED
    assert job.events() == [("started", 0), ("started", 240), ("completed", 340)]


def test_a_version_added_while_the_last_gates_open_sends_it_on(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    finish = agent_module.GateKeeper.finish

    def slowly(gates: Any, *arguments: Any) -> bool:
        is_done = finish(gates, *arguments)
        open_run(write_plan(job.folder / "plan.toml", HERE, versions=4), job.folder / "run")
        return is_done

    monkeypatch.setattr(agent_module.GateKeeper, "finish", slowly)
    open_run(write_plan(job.folder / "plan.toml", HERE, versions=4), job.folder / "run")
    job.ready(240, 340)
    open_run(write_plan(job.folder / "plan.toml", HERE), job.folder / "run")
    assert job.run("save 240", "save 340") == COMPLETED
    assert job.events()[-1] == ("completed", 340)


def test_the_forks_of_a_path_are_made_before_its_agent_ends(job: Job) -> None:
    job.ready(40, 140, 240)
    assert job.run("save 40; save 140; save 240") == COMPLETED
    for branch, step in (("v1", 40), ("v2", 140), ("v3", 240)):
        assert (job.folder / f"run/path_switching/{branch}/checkpoints/global_step{step}/pathswitch.json").is_file()


# Being asked to end.


def test_asked_once_it_has_the_ranks_save_and_end(job: Job) -> None:
    job.ready(50)
    job.start(f"{WAIT_FOR_STOP}; cat $PATHSWITCH_STOP_FILE > $NOTES.why; save 50")
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    job.signal(signal.SIGTERM)
    assert job.end() == ASKED
    assert job.events() == [("started", 0), ("stopped", 50)]
    notes = list(dict.fromkeys(job.ranks.notes()))  # asked again where it takes long
    assert notes == ["start train.py --path main", "asked", "ended"]
    assert (job.folder / "notes.why").read_text() == "SIGTERM received\n"
    assert not job.files.stop.exists() and job.status() == ("stopped", "SIGTERM received")


def test_asked_twice_it_ends_the_ranks_at_once(job: Job) -> None:
    job.start("trap '' TERM; echo $$ > $NOTES.pid; while :; do sleep 0.1; done")
    wait_for(lambda: (job.folder / "notes.pid").exists(), "the ranks run")
    started = time.monotonic()
    job.signal(signal.SIGINT)
    wait_for(lambda: "asked" in job.ranks.notes(), "the ranks are asked")
    job.signal(signal.SIGINT)
    assert job.end() == ASKED and time.monotonic() - started < 20
    assert not Path(f"/proc/{(job.folder / 'notes.pid').read_text().strip()}").exists()
    assert job.status() == ("stopped", "SIGINT received; the ranks did not save and end in time")


def test_ranks_that_do_not_listen_are_asked_again_until_their_time_is_up(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_module, "SAVE_SHARE", 1 / 300)
    monkeypatch.setattr(agent_module, "ASK_AGAIN_SECONDS", 0.2)
    job.ready(40)
    job.start("save 40; touch $NOTES.saved; sleep 1000")
    wait_for((job.folder / "notes.saved").exists, "the ranks run")
    job.signal(signal.SIGTERM)
    assert job.end() == ASKED
    assert job.ranks.notes().count("asked") >= 3
    assert job.reasons() == ["SIGTERM received; the ranks did not save and end in time"]


def test_ranks_that_end_by_a_signal_of_their_own_have_stopped(job: Job) -> None:
    job.ready(50)
    assert job.run("save 50") == ASKED
    assert job.events()[-1] == ("stopped", 50)


def test_a_stop_file_of_an_earlier_agent_is_none_of_this_one(job: Job) -> None:
    job.ready(240)
    job.files.stop.write_text("SIGTERM received\n")
    assert job.run('[ ! -e "$PATHSWITCH_STOP_FILE" ] && save 240') == COMPLETED
    assert job.events() == [("started", 0), ("completed", 240)]


def test_a_cancelled_job_saves_and_is_not_started_again(job: Job) -> None:
    job.ready(50)
    job.start(f"{WAIT_FOR_STOP}; save 50; exit 1")
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    job.files.stop.write_text("cancelled by me on this\n")
    assert job.end() == ASKED
    assert job.events() == [("started", 0), ("cancelled", 50)]
    notes = job.ranks.notes()
    assert job.run("exit 1") == ASKED and job.ranks.notes() == notes and notes[-1] == "ended"
    assert job.status() == ("cancelled", "cancelled by me on this")


def test_a_cancelled_job_stays_so_when_it_gets_a_signal_too(job: Job) -> None:
    job.start(WAIT_FOR_STOP)
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    job.files.stop.write_text("cancelled by me on this\n")
    job.signal(signal.SIGTERM)
    assert job.end() == ASKED and job.events()[-1][0] == "cancelled"


@pytest.mark.parametrize("by", ["a cancellation", "a signal"])
def test_ranks_that_hear_of_it_before_the_agent_does_have_not_failed(
    job: Job, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    monkeypatch.setattr(agent_module, "POLL_SECONDS", 1.0)
    asks = 'echo "cancelled by me on this" > "$PATHSWITCH_STOP_FILE"' if by == "a cancellation" else "kill -TERM $PPID"
    assert job.run(f"sleep 0.1; {asks}; exit 0") == ASKED
    assert job.events() == [("started", 0), ("cancelled" if by == "a cancellation" else "stopped", 0)]


def test_a_cancellation_while_a_gate_is_verified_is_not_lost(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def cancelled_meanwhile(*arguments: Any) -> Any:
        job.files.stop.write_text("cancelled by me on this\n")
        return OPEN

    monkeypatch.setattr(agent_module, "open_gate", cancelled_meanwhile)
    assert job.run(f"{WAIT_FOR_STOP}; exit 0") == ASKED
    assert job.events()[-1][0] == "cancelled" and job.files.stop.exists()


def test_a_signal_that_comes_before_the_ranks_start_none(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def signalled_meanwhile(*arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return OPEN

    monkeypatch.setattr(agent_module, "open_gate", signalled_meanwhile)
    assert job.run("sleep 1000") == ASKED
    assert job.ranks.notes() == [] and job.status() == ("stopped", "SIGTERM received")


def test_a_full_disk_does_not_keep_the_ranks_from_being_asked(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent_module, "write_text_atomic", full)
    job.start("until grep -q asked $NOTES; do sleep 0.02; done")
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    job.signal(signal.SIGTERM)
    assert job.end() == ASKED and "cannot be written: No space left on device" in job.log()


def test_two_agents_never_train_one_path(job: Job) -> None:
    job.start(WAIT_FOR_STOP)
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    assert job.process is not None and str(holder(job.files)).startswith(f"process {job.process.pid} on ")
    assert job.status()[0] == "running"
    with (
        pytest.raises(RunError, match=rf"process {job.process.pid} on .* looks after this path"),
        only_agent(job.files),
    ):
        pass
    job.signal(signal.SIGTERM)
    job.end()
    assert holder(job.files) is None
    with only_agent(job.files):
        assert str(os.getpid()) in str(holder(job.files))


def test_a_killed_agent_holds_nothing(job: Job) -> None:
    job.start("exec sleep 3")
    wait_for(lambda: job.ranks.notes(), "the ranks run")
    job.signal(signal.SIGKILL)
    job.end()
    wait_for(lambda: holder(job.files) is None, "the lock is free, although a rank is left")
    assert job.status() == ("lost", "its job is gone, and has not said why; submit again")


def test_a_job_file_that_is_not_there_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="cannot be read"):
        Agent(tmp_path / "job.json")


def test_a_job_that_is_done_starts_nothing(job: Job) -> None:
    complete(job.spec)
    assert job.run("exit 1") == COMPLETED and job.ranks.notes() == []
