"""Real DeepSpeed ranks killed with signal 9, round after round: ``kill_rounds.py [--rounds 12] [--seed 1]``.

Each round goes on from what the one before has left. In every second round a rank, or all, are killed within 15 ms of
the beginning of a save, else at any moment of starting, loading, training and saving. Behind every kill all that is
visible must be whole and nothing older changed; in the end every update, trained once or again after a kill, must have
given the bits of a run that nobody disturbed. Conversions for another number of ranks, and forks, are killed as well.

This process imports everything once and forks the ranks, which saves each of them 8 seconds; it keeps to one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import ds_job

# A git that is killed while it refreshes the index would leave its lock behind.
os.environ.update(ds_job.environment({"GIT_OPTIONAL_LOCKS": "0"}))

import deepspeed
import deepspeed.runtime.zero.muon.muon_optimizer
import torch
import torch._dynamo
from harness import config, engine_of
from worker_bits import DropoutModel, seed_all, state, train

import pathswitch.integrations.checkpoints as saving
from pathswitch.checkpoint import (
    Policy,
    committed_checkpoints,
    read_manifest,
    recover_replaced,
    verify_checkpoint,
)
from pathswitch.checkpoint.fork import fork_checkpoint
from pathswitch.integrations.committing import git_commit

KEPT = 8
SAVED_SHARE = 0.6
SAVE_WINDOW_S, MOMENT_WINDOW_S = 0.015, 3.0
# A conversion spends two seconds on imports, and a fraction of one on writing.
CONVERSION_WINDOW_S, CONVERSION_WRITES_S, CONVERSION_TRIES = 1.5, 0.1, 4
GRACE_S, START_TIMEOUT_S = 0.3, 120.0
FORK_KILLS, FORK_WINDOW_S = 4, 0.005
MAIN = {"warmup_steps": 4, "versions": [{"name": "v1", "steps": 1_000_000}]}


@dataclass(frozen=True)
class Job:
    """What the ranks of one round do."""

    folder: Path
    """Of the checkpoints; the ranks' notes lie beside it."""
    stage: int
    seed: int
    ranks: int = 2
    updates: int | None = None
    """Trains for ever if None."""
    until: int | None = None
    """The step to train to, whatever was loaded."""
    saves: Literal["some", "last", "none"] = "some"
    plan: dict[str, Any] | None = None
    notes_name: str = "notes"

    def notes(self, rank: int) -> Path:
        """Every rank's loads and updates, with digests of its state."""
        return self.folder.with_name(f"{self.folder.name}_{self.notes_name}_{rank}.txt")

    @property
    def output(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}_output.txt")

    @property
    def marker(self) -> Path:
        """Appears when the save begins in which a rank is to be killed."""
        return self.folder.with_name(f"{self.folder.name}_saving")


@dataclass(frozen=True)
class Kill:
    """When which ranks are killed; the others follow as a launcher would end them."""

    when: Literal["save", "moment", "conversion", "conversion writes"]
    delay_s: float
    victims: tuple[int, ...]
    save: int = 1
    """The how manieth save of the round."""


def work(job: Job, rank: int, port: int, save: int) -> None:
    """Be one rank."""
    output = os.open(job.output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    _mark_save(job.marker, save)
    deepspeed.init_distributed()
    engine = engine_of(config(job.stage, **(job.plan or MAIN)), model=DropoutModel())
    seed_all(100 + rank)
    if (job.folder / "latest").is_file():
        seed_all(job.seed)  # the checkpoint's random states must win
    engine.load_checkpoint(job.folder)
    notes = os.open(job.notes(rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(notes, f"loaded {engine.global_steps}\n".encode())
    until = job.until if job.updates is None else engine.global_steps + job.updates
    while until is None or engine.global_steps < until:
        train(engine, 1)
        step = engine.global_steps
        os.write(notes, f"{step} {state(engine)}\n".encode())
        wanted = step == until if job.saves == "last" else random.Random(f"{job.seed} {step}").random() < SAVED_SHARE
        if wanted and job.saves != "none":
            engine.save_checkpoint(job.folder)
    torch.distributed.barrier()


def _mark_save(marker: Path, number: int) -> None:
    """Let rank 0 say when its n-th save begins."""
    begun, begin_save = 0, saving.begin_save

    def begin(folder: Path) -> Path:
        nonlocal begun
        begun += 1
        if begun == number:
            marker.touch()
        return begin_save(folder)

    saving.begin_save = begin  # type: ignore[attr-defined]


def in_child(action: Callable[[], object]) -> int:
    """Run an action in a process of its own and return the process id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            action()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return child


def in_child_with_result(action: Callable[[], object]) -> Any:
    """Run an action in a process of its own, whose threads this one must not have, and return its result."""
    result, write_end = os.pipe()
    child = in_child(lambda: os.write(write_end, json.dumps(action()).encode()))
    os.close(write_end)
    with os.fdopen(result, "rb") as file:
        content = file.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise SystemExit(f"a check failed: status {status}")
    return json.loads(content)


def play(job: Job, kill: Kill | None = None) -> None:
    """Start a job's ranks and kill them, or wait for their end.

    Raises:
        SystemExit: a rank ended by itself before it was killed, or failed.
    """
    job.marker.unlink(missing_ok=True)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    port = ds_job.free_port()
    save = kill.save if kill else 0
    ranks = {rank: in_child(partial(work, job, rank, port, save)) for rank in range(job.ranks)}
    try:
        if kill is None:
            _wait(lambda: not ranks, ranks, job, may_end=True)
            return
        reached = {
            "save": job.marker.exists,
            "moment": lambda: True,
            "conversion": lambda: any(job.folder.glob(".*.universal-*")),
            "conversion writes": lambda: any(job.folder.glob(".*.universal-*/universal")),
        }
        _wait(reached[kill.when], ranks, job)
        moment = time.monotonic() + kill.delay_s
        _wait(lambda: time.monotonic() >= moment, ranks, job)
        for rank in kill.victims:
            os.kill(ranks[rank], signal.SIGKILL)
        if len(kill.victims) < len(ranks):
            time.sleep(GRACE_S)
    finally:
        for pid in ranks.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        # DeepSpeed leaves 66 MiB of shared memory behind for every rank that is killed.
        for segment in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
            segment.unlink()


def _wait(reached: Callable[[], bool], ranks: dict[int, int], job: Job, may_end: bool = False) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while not reached():
        for rank, pid in list(ranks.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del ranks[rank]
                if status != 0 or not may_end:
                    raise SystemExit(f"rank {rank} ended with status {status}:\n{job.output.read_text()[-4000:]}")
        if time.monotonic() > deadline:
            raise SystemExit(f"nothing for {START_TIMEOUT_S} s:\n{job.output.read_text()[-4000:]}")
        time.sleep(0.0005)


def hidden(folder: Path) -> dict[tuple[str, int, int], str]:
    """Return what kills have left in a folder of checkpoints, so that it can be told from what was there before."""
    found = {}
    for entry in folder.iterdir() if folder.is_dir() else ():
        for kind in (".saving", ".replaced", ".universal-", ".forking-", ".tmp"):
            if kind in entry.name:
                status = entry.stat()
                found[entry.name, status.st_ino, status.st_ctime_ns] = kind
    return found


def check(folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Assert what must hold behind a kill, and return what the next check starts from."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir() and not entry.name.startswith("."):
            verify_checkpoint(entry)
    committed, latest = committed_checkpoints(folder), folder / "latest"
    first_unnamed = bool(committed) and not latest.is_file()
    step = 0
    if first_unnamed:  # the folder's first save was killed between its commit and `latest`: the next load finds it
        assert len(committed) == 1
        step = committed[0][1].step
    elif latest.is_file():
        newest = folder / latest.read_text()
        recover_replaced(newest)
        step = verify_checkpoint(newest).step
    assert step >= before["step"], f"back from step {before['step']} to {step}"
    kept = {str(manifest.step): manifest.digest for _, manifest in committed_checkpoints(folder)}
    for old, digest in before["kept"].items():
        # Behind the one that was loaded, everything may have been trained and saved again.
        assert int(old) > before["step"] or kept.get(old) == digest, f"step {old} has changed"
    return {"step": step, "kept": kept, "unnamed": first_unnamed or any(int(other) > step for other in kept)}


def tidy(folder: Path, state: dict[str, Any]) -> None:
    """Remove old checkpoints, so that each check has only a few to read."""
    for step in sorted(state["kept"], key=int)[:-KEPT]:
        shutil.rmtree(folder / f"global_step{step}")
        del state["kept"][step]


@dataclass
class Noted:
    """What a rank's notes tell."""

    loaded: list[int]
    digests: dict[int, str]
    again: int
    """Updates that were trained more than once."""


def read_notes(job: Job, rank: int) -> Noted:
    """Return a rank's notes; an update that was trained again must have given the same bits."""
    noted = Noted([], {}, 0)
    for line in job.notes(rank).read_text().split("\n")[:-1] if job.notes(rank).is_file() else ():
        name, value = line.split()
        if name == "loaded":
            noted.loaded.append(int(value))
        else:
            noted.again += int(name) in noted.digests
            assert noted.digests.setdefault(int(name), value) == value, f"rank {rank}, step {name}: other bits"
    return noted


def rounds_of(folder: Path, stage: int, number: int, chance: random.Random, seen: Counter[str]) -> dict[str, Any]:
    """Kill a stage's jobs in so many rounds, and compare what they trained with a run that nobody killed."""
    state: dict[str, Any] = {"step": 0, "kept": {}}
    for index in range(number):
        job = Job(folder, stage, seed=chance.getrandbits(32))
        victims = chance.choice([(0,), (1,), (0, 1)])
        at_save = Kill("save", chance.uniform(0, SAVE_WINDOW_S), victims, chance.randint(1, 6))
        at_any_moment = Kill("moment", chance.uniform(0, MOMENT_WINDOW_S), victims)
        left, loads = hidden(folder), len(read_notes(job, 0).loaded)
        play(job, at_any_moment if index % 2 else at_save)
        kinds = {kind for found, kind in hidden(folder).items() if found not in left}
        for loaded in read_notes(job, 0).loaded[loads:]:
            assert loaded == state["step"], f"loaded step {loaded}, latest was of step {state['step']}"
        state = in_child_with_result(partial(check, folder, state))
        seen.update(kinds or {"nothing left"})
        seen["unnamed"] += state["unnamed"]
        tidy(folder, state)
    return finish(folder, stage, chance)


def finish(folder: Path, stage: int, chance: random.Random) -> dict[str, Any]:
    """Train on undisturbed, and the same once more from the beginning: all updates must have the same digests."""
    job = Job(folder, stage, seed=chance.getrandbits(32))
    until = max(max(read_notes(job, rank).digests, default=0) for rank in (0, 1)) + 3
    play(Job(folder, stage, seed=job.seed, until=until, saves="last"))
    undisturbed = Job(folder.with_name(f"{folder.name}_undisturbed"), stage, seed=0, until=until, saves="none")
    play(undisturbed)
    again = 0
    for rank in (0, 1):
        expected, found = read_notes(undisturbed, rank), read_notes(job, rank)
        assert sorted(expected.digests) == list(range(1, until + 1))
        assert found.digests.items() <= expected.digests.items(), f"stage {stage}, rank {rank}: other bits"
        assert found.digests[until] == expected.digests[until]
        again += found.again
    return {"steps": until, "trained again": again}


def conversions(folder: Path, seed: int, seen: Counter[str] | None) -> list[dict[int, str]]:
    """Train with 2, 1 and again 2 ranks, and return the digests that each rank noted.

    With a counter, each conversion is killed first; the job after it converts the untouched source.
    """
    chance = random.Random(seed)
    play(Job(folder, 1, seed, updates=2, saves="last"))
    state = in_child_with_result(partial(check, folder, {"step": 0, "kept": {}}))
    for ranks in (1, 2):
        job = Job(folder, 1, seed, ranks, updates=2, saves="last")
        if seen is not None:
            seen["killed in a conversion"] += _kill_conversion(job, chance)
            after = in_child_with_result(partial(check, folder, state))
            assert after["kept"] == state["kept"], "a source has changed"
        play(job)
        assert read_notes(job, 0).loaded[-1] == state["step"]
        assert not hidden(folder), "a conversion has left something behind"
        state = in_child_with_result(partial(check, folder, state))
        assert state["step"] == read_notes(job, 0).loaded[-1] + 2
    return [read_notes(job, rank).digests for rank in (0, 1)]


def _kill_conversion(job: Job, chance: random.Random) -> bool:
    """Kill a job while it converts; a conversion that was faster has left nothing, and the next one is killed."""
    victims = chance.choice([(0,), tuple(range(job.ranks))])
    for _ in range(CONVERSION_TRIES):
        kill = Kill("conversion", chance.uniform(0, CONVERSION_WINDOW_S), victims)
        if job.ranks == 2:
            kill = Kill("conversion writes", chance.uniform(0, CONVERSION_WRITES_S), victims)
        play(replace(job, updates=None, saves="none", notes_name="killed"), kill)
        if set(hidden(job.folder).values()) == {".universal-"}:
            return True
    return False


def forks(source: Path, root: Path, stage: int, chance: random.Random, seen: Counter[str]) -> None:
    """Kill forks of a checkpoint; run again they are there, and a branch trains from the last."""
    before = in_child_with_result(lambda: verify_checkpoint(source).digest)

    def fork(target: Path) -> None:
        fork_checkpoint(source, target, policy=Policy(), paradigm="path_switching", path="v1")

    def check_fork(target: Path) -> None:
        assert verify_checkpoint(source).digest == before, "the parent has changed"
        if target.exists():
            assert verify_checkpoint(target).forked_from == before
        fork(target)
        assert verify_checkpoint(target).forked_from == before
        assert (target.parent / "latest").read_text() == target.name

    number = hit = 0
    while hit < FORK_KILLS:
        target, number = root / f"v1_{number}" / source.name, number + 1
        assert number < 20 * FORK_KILLS, f"only {hit} of {number} kills have hit a fork"
        child = in_child(partial(fork, target))
        while not target.parent.exists():  # until the source is verified
            time.sleep(0.0001)
        time.sleep(chance.uniform(0, FORK_WINDOW_S))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        hit += ".forking-" in hidden(target.parent).values()
        in_child_with_result(partial(check_fork, target))
    seen["killed in a fork"] = hit
    step = read_manifest(source).step
    plan = {**MAIN, "versions": [{"name": "v1", "steps": 2 * step, "alpha": 0.5}], "path": "v1"}
    branch = Job(target.parent, stage, seed=chance.getrandbits(32), updates=2, saves="last", plan=plan)
    play(branch)
    assert read_notes(branch, 0).loaded == [step]
    in_child_with_result(lambda: verify_checkpoint(branch.folder / f"global_step{step + 2}").digest)


def main() -> None:
    """Run all rounds and print what was met as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=12, help="of all stages together")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--stages", default="1,3", help="ZeRO stages, with commas")
    arguments = parser.parse_args()
    stages, chance, seen = (
        [int(stage) for stage in arguments.stages.split(",")],
        random.Random(arguments.seed),
        Counter(),
    )
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])  # imports torch's compiler, once for all ranks
    git_commit()
    assert len(os.listdir("/proc/self/task")) == 1, "threads would not live on in the ranks"
    started, result = time.monotonic(), {}
    # The converter of a rank that was killed may still be writing.
    with TemporaryDirectory(prefix="kill_rounds_", ignore_cleanup_errors=True) as temporary:
        root = Path(temporary)
        for index, stage in enumerate(stages):
            number = len(range(index, arguments.rounds, len(stages)))
            result[f"stage {stage}"] = rounds_of(root / f"stage{stage}", stage, number, chance, seen)
        result["rounds_s"] = round(time.monotonic() - started, 1)
        source = max((root / f"stage{stages[0]}").glob("global_step*"), key=lambda folder: read_manifest(folder).step)
        forks(source, root / "forks", stages[0], chance, seen)
        undisturbed = conversions(root / "undisturbed" / "main", arguments.seed, None)
        assert conversions(root / "converted" / "main", arguments.seed, seen) == undisturbed, "other bits"
    result |= {"seconds": round(time.monotonic() - started, 1), "seen": seen}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
