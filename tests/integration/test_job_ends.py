"""Jobs that save and end by themselves, on real DeepSpeed with two ranks: all together, and on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ds_job
import ds_ranks
import pytest

from pathswitch.checkpoint import committed_checkpoints, read_manifest

pytestmark = pytest.mark.slow
FORK, END = 150, 160
PLAN = f"""
[schedule]
max_lr = 2e-3
warmup_steps = 3
[[versions]]
name = "v1"
steps = {END}
decay_steps = {END - FORK}
"""
DS_CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "steps_per_print": 1000,
    "optimizer": {"type": "AdamW", "params": {"lr": 2e-3, "torch_adam": True}},
    "scheduler": {"type": "PathSwitchLR", "params": {"plan": "plan.toml"}},
    "zero_optimization": {"stage": 1},
    "pathswitch": {"job": {"save_dir": "{path}"}},
}
ASKED = {"PATHSWITCH_STOP_SIGNALS": "SIGTERM,SIGUSR2"}
ENDED = f"path 'main' has reached its end: saved main/global_step{FORK} at step {FORK}"


class Job:
    """Ranks in a folder of their own, with their plan, ds_config and checkpoints."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._runs = folder, 0
        folder.mkdir()
        (folder / "plan.toml").write_text(PLAN)
        (folder / "ds_config.json").write_text(json.dumps(DS_CONFIG))

    def run(self, ask: Callable[[list[int]], None] | None = None) -> str:
        """Run two ranks without a launcher to their end; ``ask`` gets their processes; return what they said."""
        arguments = ["--deepspeed", "--deepspeed_config", "ds_config.json", "--checkpoints", "main"]
        arguments += ["--steps", "100000", "--log", "losses"]
        self._runs += 1
        with (self.folder / f"log{self._runs}.txt").open("w") as log:
            ranks = ds_job.start_ranks("user_train_loader.py", *arguments, cwd=self.folder, log=log, extra=ASKED)
            try:
                if ask is not None:
                    ask([rank.pid for rank in ranks])
                codes = [rank.wait(300) for rank in ranks]  # the first in a new environment compile
            finally:
                for rank in ranks:
                    ds_job.end(rank)
        said = Path(log.name).read_text()
        assert codes == [0, 0], said[-4000:]
        return said

    def steps(self, path: str = "main") -> list[int]:
        return [manifest.step for _, manifest in reversed(committed_checkpoints(self.folder / path))]

    def losses(self) -> list[list[str]]:
        return [(self.folder / f"losses.rank{rank}").read_text().splitlines() for rank in (0, 1)]


def wait_for(what: Callable[[], bool]) -> None:
    for _ in range(12_000):
        if what():
            return
        time.sleep(0.005)
    raise AssertionError("nothing happened for a minute")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """The main path without an interruption: it saves where the branch forks, and ends there."""
    for script in ("user_train.py", "user_train_loader.py"):
        assert "pathswitch" not in (ds_job.HERE / script).read_text().lower()
    job = Job(tmp_path_factory.mktemp("jobs") / "whole")
    assert ENDED in job.run()
    assert job.steps() == [FORK]
    return job


def test_interrupted_twice_and_then_the_same_bits(whole: Job) -> None:
    job = Job(whole.folder.with_name("cut"))

    def before_the_first_step(ranks: list[int]) -> None:
        wait_for(lambda: ds_job.catches(ranks[1], signal.SIGTERM))
        os.kill(ranks[1], signal.SIGTERM)

    def everybody_again_and_again(ranks: list[int]) -> None:
        """Signal one rank, then all of them with the workers of their loaders, until they have ended."""
        wait_for(lambda: len(job.losses()[0]) > 20)
        pids = [pid for rank in ranks for pid in ds_job.processes_of(rank)]
        assert len(pids) >= 6, "two ranks with two workers each"
        os.kill(ranks[0], signal.SIGUSR2)
        while any(Path(f"/proc/{rank}/cmdline").read_bytes() for rank in ranks):  # empty when it has ended
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
            time.sleep(0.01)

    said = job.run(before_the_first_step)
    assert said.count("pathswitch: path 'main' asked to stop (SIGTERM): saved main/global_step1 at step 1\n") == 1
    assert job.steps() == [1]
    said = job.run(everybody_again_and_again)
    stopped = job.steps()[-1]
    assert 20 < stopped < FORK and said.count("asked to stop") == 1
    assert f"saved main/global_step{stopped} at step {stopped}" in said
    assert ENDED in job.run()
    assert job.steps() == [1, stopped, FORK] and job.losses() == whole.losses()
    ours, expected = (read_manifest(one.folder / "main" / f"global_step{FORK}").files for one in (job, whole))
    assert len(ours) >= 5 and ours == expected, "digests of weights, moments and random states"


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank of worker_job.py saw, and the lines of the job by its cases."""
    folder = tmp_path_factory.mktemp("job")
    (folder / "out").mkdir()
    finished = ds_ranks.run("worker_job.py", str(folder / "out"), folder=folder)
    assert finished.returncode == 0, finished.output[-4000:]
    lines: dict[str, list[str]] = {}
    case = ""
    for line in finished.output.replace(f"{folder / 'out'}/", "").splitlines():
        case = line.removeprefix("case ") if line.startswith("case ") else case
        if line.startswith("pathswitch: path "):
            lines.setdefault(case, []).append(line.removeprefix("pathswitch: path "))
    return [json.loads((folder / "out" / f"rank{rank}.json").read_text()) | {"lines": lines} for rank in (0, 1)]


def ended(step: int, tries: int | None = None) -> dict[str, Any]:
    return {"code": 0, "step": step, "tries": step if tries is None else tries}


def at(*steps: int) -> dict[str, int]:
    return {f"global_step{step}": step for step in steps}


@pytest.mark.parametrize("case", ["0 fp32 1", "1 fp32 3", "2 bf16 1", "3 bf16 2"])
def test_one_rank_gets_a_signal_inside_a_step(records: list[dict[str, Any]], case: str) -> None:
    """Under each ZeRO stage, some with gradient accumulation: all save behind that very step, and go on the same."""
    for record in (record[case] for record in records):
        assert record["stopped"] == ended(6) and record["saved"] == at(4, 6)
        assert record["ended"] == ended(12) and record["saved in the end"] == at(4, 6, 12)
        assert record["same"], "the weights of a job that was never stopped"


def test_branch_ends_by_itself_and_stays_ended(records: list[dict[str, Any]]) -> None:
    for record in (record["branch"] for record in records):
        assert record["ended"] == record["again"] == ended(8)
        assert (record["saved"], record["latest"]) == (at(8), "global_step8")
        assert record["goes on"].startswith("ScheduleError: path 'v1' ends at step 8") and record["its end"] == at(8)
        assert (
            "holds global_step12 of path 'main'; path 'v1' needs a folder of its own" in record["another path's folder"]
        )
    assert records[0]["lines"]["branch"] == [
        "'main' has reached its end: saved branch/main/global_step12 at step 12",
        "'v1' has reached its end: saved branch/v1/global_step8 at step 8",
        "'v1' has no step left: nothing to save at step 8",
    ]


def test_signals_while_a_rank_is_saving(records: list[dict[str, Any]]) -> None:
    for record in (record["while_saving"] for record in records):
        assert record == {"stopped": ended(5), "saved": at(4, 5)}
    expected = "'main' asked to stop (SIGUSR2): saved while_saving/main/global_step5 at step 5"
    assert records[0]["lines"]["while_saving"] == [expected]


def test_stop_file(records: list[dict[str, Any]]) -> None:
    for record in (record["stop_file"] for record in records):
        assert (record["stopped"], record["saved"]) == (ended(3), at(3))
    assert [record["stop_file"]["looks"] for record in records] == [3, 0]


def test_client_states(records: list[dict[str, Any]]) -> None:
    """A script's own is left to it, known or loaded; a trainer's is in the job's saves."""
    for record in (record["client_state"] for record in records):
        assert (record["stopped"], record["saved"], record["epoch"]) == (ended(6), at(3, 6), 6)
        assert record["resumed"] == ended(9) and record["ended"] == ended(12)
        assert record["trainer"] == ended(5) and record["trainer's"] == [4, 5]
    said = records[0]["lines"]["client_state"]
    left = (
        "'main': the script saves a client state of its own, so every save is left to it: at step 4, where v1 forks; "
        "at step 12, where v2 forks; at step 12, where the path ends; asked to stop, the job ends behind the script's "
        "next save_checkpoint"
    )
    assert said[:3] == [
        left,
        "'main' asked to stop (SIGTERM): ends behind the script's next save_checkpoint",
        "'main' asked to stop (SIGTERM): saved by the script in client_state/main at step 6",
    ]
    assert said.count(left) == 3, "once in each job"


def test_what_is_saved_is_not_saved_again(records: list[dict[str, Any]]) -> None:
    for record in (record["saved_twice"] for record in records):
        untouched = {"the same": True, "a number was drawn": False, "a client state": False, "another folder": True}
        assert record == {**untouched, "elsewhere": ["global_step4"]}
    said = "'main': the script saves into another folder/elsewhere, the job itself into another folder/main: "
    assert [line for line in records[0]["lines"]["saved_twice"] if line.startswith(said)]


def test_skipped_updates_are_no_steps(records: list[dict[str, Any]]) -> None:
    """Tries 2, 6 and 7 of 7 are skipped: the fork is saved behind try 5, and the job stops behind a skipped one."""
    for record in (record["skipped_updates"] for record in records):
        assert record["stopped"] == ended(4, tries=7) and record["skipped"] == 3
        assert record["saved"] == record["saved in the end"] == {"global_step5": 4, "global_step7": 4}
        assert record["resumed"] == {"code": "not ended", "step": 6, "tries": 9}, "the fork is not saved again"


def test_writer_in_a_process_of_its_own(records: list[dict[str, Any]]) -> None:
    for record in (record["decoupled_writer"] for record in records):
        assert record == {"stopped": ended(6), "saved": at(4, 6)}, "committed before the end; the signals spared it"


def test_pipeline(records: list[dict[str, Any]]) -> None:
    for record in (record["pipeline"] for record in records):
        assert record == {"code": 0, "step": 6, "saved": at(4, 6)}


def test_branch_under_the_launcher_ends_by_itself(whole: Job) -> None:
    settings = ["--deepspeed", "--deepspeed_config", "ds_config.json", "--save_dir", "unused", "--save_every", "100000"]
    settings += ["--load_dir", "main", "--load_tag", f"global_step{FORK}", "--lr_log", "lr", "--steps", "100000"]
    branch = ds_job.deepspeed_command("user_train.py", *settings)
    finished = ds_job.run(branch, whole.folder, {**ASKED, "PATHSWITCH_PATH": "v1"}, timeout_seconds=200)
    assert finished.returncode == 0, finished.output[-3000:]
    assert f"path 'v1' has reached its end: saved v1/global_step{END} at step {END}" in finished.output
    assert whole.steps("v1") == [END] and not (whole.folder / "unused").exists()
