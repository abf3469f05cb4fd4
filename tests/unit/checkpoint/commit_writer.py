"""Writers of small checkpoints, killed with signal 9, and what must hold behind every kill.

commit_writer.py moments ROOT ROUNDS SEED [--clock-back]   killed at random moments, one writer after the other
commit_writer.py operations ROOT                           killed before each of the operations on files, one by one

The killer hashes nothing itself: the threads of the hasher would not live on in the processes that it forks.
"""

from __future__ import annotations

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
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from checkpoint_files import manifest_of

import pathswitch.versions.ledger as ledger_module
from pathswitch.checkpoint import (
    DEEPSPEED,
    Manifest,
    Policy,
    begin_save,
    commit,
    committed_checkpoints,
    hash_file,
    read_manifest,
    recover_replaced,
    verify_checkpoint,
)
from pathswitch.checkpoint.fork import fork_checkpoint
from pathswitch.run_folder import PathFolder, tag
from pathswitch.versions.ledger import Ledger
from pathswitch.versions.records import CheckpointRecord

SHARDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "random_state_rank_00000.pt")
NESTED = "offloaded_tensors/rank00/0.tensor.swp"
LARGEST_SHARD = 50_000
POLICY = Policy(beta2=0.98)
KEPT_CHECKPOINTS, KEPT_FORKS = 4, 3
TIMED_SAVES = 4
CHANGES = {"os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.link"}
MET = ("recovered", "unnamed")
DAY = timedelta(days=1)


class Writer:
    """One job: it goes on from what ``latest`` names, as a load does, and saves, saves again and forks."""

    def __init__(self, root: Path) -> None:
        self.path, self.forks, self.ledger = PathFolder(root), root / "forks", Ledger(root / "ledger")
        self.checkpoints = self.path.checkpoints
        self.noted = os.open(root / "noted", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        self.parent: Manifest | None = None
        if (named := latest(self.checkpoints)) is not None:
            recover_replaced(self.checkpoints / named)
            self.parent = verify_checkpoint(self.checkpoints / named)

    def save(self, step: int) -> None:
        """Commit, point ``latest`` at it, record it, and note the record."""
        folder = self.checkpoints / tag(step)
        staging = begin_save(folder)
        before = self.parent.digest if self.parent else "nothing"
        files = {}
        for name, content in contents(step, before).items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(content)
            files[name] = hash_file(staging / name, sync=True)
        manifest = manifest_of(folder, files, step=step, parent=self.parent and self.parent.digest)
        commit(folder, manifest)
        DEEPSPEED.write_latest(self.checkpoints, folder.name)
        os.write(self.noted, f"{self.ledger.append(record_of(folder, manifest))}\n".encode())
        self.parent = manifest

    def save_next(self) -> None:
        self.save(self.parent.step + 1 if self.parent else 1)

    def save_again(self) -> None:
        self.save(self.parent.step if self.parent else 1)

    def fork(self) -> None:
        if self.parent is not None:
            source, target = self.checkpoints / self.parent.tag, self.forks / self.parent.digest / self.parent.tag
            fork_checkpoint(source, target, policy=POLICY, paradigm=self.parent.paradigm, path="v1")

    def write_for_ever(self, chance: random.Random) -> None:
        while True:
            chance.choice([self.save_next, self.save_next, self.save_again, self.fork])()


def latest(checkpoints: Path) -> str | None:
    file = checkpoints / "latest"
    return file.read_text() if file.is_file() else None


def contents(step: int, parent: str) -> dict[str, bytes]:
    """Return the shards of a save: their sizes and bytes follow from its step and from what was saved before."""
    chance = random.Random(f"{step} {parent}")
    return {name: chance.randbytes(chance.randrange(LARGEST_SHARD)) for name in (*SHARDS, NESTED)}


def record_of(folder: Path, manifest: Manifest) -> CheckpointRecord:
    return CheckpointRecord(
        manifest=manifest.digest,
        folder=str(folder),
        paradigm=manifest.paradigm,
        path=manifest.path,
        step=manifest.step,
        samples_seen=manifest.samples_seen,
        tokens_seen=manifest.tokens_seen,
        next_lr=manifest.next_lr,
        parent=manifest.parent,
    )


def hidden(root: Path) -> dict[tuple[str, int], str]:
    """Return what kills have left, by name and inode: which step of the protocol each belongs to."""
    found = {}
    for directory, folders, files in os.walk(root):
        for name in (*folders, *files):
            kinds = [kind for kind in (".saving", ".replaced", ".forking-", ".tmp") if kind in name]
            if kinds:
                found[name, os.lstat(Path(directory, name)).st_ino] = kinds[0]
        folders[:] = [name for name in folders if not name.startswith(".")]
    return found


def visible(folder: Path) -> list[Path]:
    entries = folder.iterdir() if folder.is_dir() else ()
    return [entry for entry in entries if entry.is_dir() and not entry.name.startswith(".")]


def check(root: Path, before: dict[str, Any]) -> dict[str, Any]:
    """Assert what must hold behind a kill, put back what a load would, and return what the next check starts from."""
    checkpoints, state = root / "checkpoints", {"latest": None, "kept": {}, "recovered": False, "unnamed": False}
    whole = {folder: whole_save(folder) for folder in visible(checkpoints)}
    named = latest(checkpoints)
    if named is not None:
        newest = checkpoints / named
        state["recovered"] = newest not in whole
        recover_replaced(newest)
        state["latest"] = (whole.get(newest) or whole_save(newest)).step
    committed = [manifest for _, manifest in committed_checkpoints(checkpoints)]
    steps = [manifest.step for manifest in committed]
    if named is not None:
        # A save that was killed before it moved `latest` may have committed one more.
        assert steps == sorted(steps, reverse=True) and steps[0] - state["latest"] in (0, 1), (steps, state["latest"])
        assert PathFolder(root).step() == steps[0]
        state["unnamed"] = steps[0] > state["latest"]
    assert (state["latest"] or 0) >= (before["latest"] or 0), "back to an older step"
    state["kept"] = {str(manifest.step): manifest.digest for manifest in committed}
    for step, digest in before["kept"].items():
        # From the one that `latest` named on, a writer may have saved again; it was killed before it could again name
        # the one behind it.
        if int(step) < (before["latest"] or 0):
            assert state["kept"].get(step) == digest, f"step {step} has changed"
        elif int(step) <= (state["latest"] or 0):
            assert step in state["kept"], f"step {step} is gone"
    check_ledger(root, state["latest"] or 0)
    for folder in visible(root / "forks"):
        check_fork(folder)
    return state


def whole_save(folder: Path) -> Manifest:
    """Return the manifest of a folder that holds exactly what one save has written."""
    manifest = verify_checkpoint(folder)
    expected = contents(manifest.step, manifest.parent or "nothing")
    assert {name: (folder / name).read_bytes() for name in manifest.files} == expected
    assert folder.name == manifest.tag == tag(manifest.step)
    return manifest


def check_fork(folder: Path) -> None:
    for target in visible(folder):
        assert verify_checkpoint(target).forked_from == folder.name
        assert latest(folder) in (None, target.name)


def check_ledger(root: Path, newest: int) -> None:
    """Assert that all records are whole, those that were noted are there, and none is ahead of ``latest``."""
    content = Ledger(root / "ledger").read()
    assert content.damaged == ()
    noted = set((root / "noted").read_text().split("\n")[:-1]) if (root / "noted").is_file() else set()
    assert noted <= {stored.digest for stored in content.records}
    steps = [stored.record.step for stored in content.records if isinstance(stored.record, CheckpointRecord)]
    assert max(steps, default=0) <= newest


def tidy(root: Path, state: dict[str, Any]) -> None:
    """Remove old checkpoints and forks, so that each check has only a few to read."""
    for step in sorted(state["kept"], key=int)[:-KEPT_CHECKPOINTS]:
        shutil.rmtree(root / "checkpoints" / tag(int(step)))
        del state["kept"][step]
    if len(visible(root / "forks")) > KEPT_FORKS:
        shutil.rmtree(root / "forks")


def in_child(action: Callable[[], object]) -> tuple[int, int]:
    """Run an action in a process of its own; return its id and where its result can be read as JSON."""
    result, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(write_end, json.dumps(action()).encode())
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(write_end)
    return child, result


def outcome(child: tuple[int, int]) -> Any:
    """Return a child's result, and None if it was killed."""
    with os.fdopen(child[1], "rb") as file:
        content = file.read()
    _, status = os.waitpid(child[0], 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise SystemExit(f"a child failed: {status}")
    return json.loads(content) if content else None


def run(action: Callable[[], object]) -> Any:
    return outcome(in_child(action))


def set_clocks_back(days: int) -> None:
    """Let what this process takes for the time go wrong."""
    now = datetime.now(UTC) - days * DAY

    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Clock:
            return cls.fromtimestamp(now.timestamp(), tz)

    ledger_module.datetime = Clock  # type: ignore[misc]
    time.time = now.timestamp


def set_file_times(root: Path, days: int) -> None:
    """Make the files of the newest steps the oldest by their times."""
    for folder in visible(root / "checkpoints"):
        seconds = time.time() - days * DAY.total_seconds() - 60 * read_manifest(folder).step
        for entry in (folder, *folder.rglob("*")):
            os.utime(entry, (seconds, seconds))


def wait_for_cpu_time(process: int, seconds: float) -> None:
    """Wait until a process has worked for so long, whatever else the machine does."""
    clock = ~process << 3 | 2  # Linux's clock of a process's CPU time
    deadline = time.monotonic() + 60
    while time.clock_gettime(clock) < seconds:
        assert time.monotonic() < deadline, f"process {process} does not work"
        time.sleep(0.0002)


def moments(root: Path, rounds: int, seed: int, clock_back: bool) -> Counter[str]:
    """Kill one writer after the other at a random moment; return how often what was met."""
    chance, seen, state = random.Random(seed), Counter[str](), {"latest": None, "kept": {}}

    def write(number: int) -> None:
        writer = Writer(root)
        if clock_back:
            set_clocks_back(number)
        writer.write_for_ever(random.Random(f"{seed} {number}"))

    def timed() -> float:
        started = time.process_time()
        writer = Writer(root)
        for _ in range(TIMED_SAVES):
            writer.save_next()
        return time.process_time() - started

    duration_s = run(timed)
    for number in range(rounds):
        left = hidden(root)
        child = in_child(lambda number=number: write(number))
        wait_for_cpu_time(child[0], chance.uniform(0, 1.5 * duration_s))
        os.kill(child[0], signal.SIGKILL)
        outcome(child)
        if clock_back:
            run(lambda number=number: set_file_times(root, number))
        kinds = set(Counter(kind for found, kind in hidden(root).items() if found not in left))
        state = run(lambda state=state: check(root, state))
        seen.update(kinds or {"nothing left"})
        seen.update(name for name in MET if state[name])
        tidy(root, state)
    seen["last step"] = state["latest"]
    return seen


def kill_before(number: int) -> None:
    """Kill this process before its n-th operation that changes a file or a folder."""
    done = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal done
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
        if event in CHANGES or writes:
            done += 1
            if done == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def operations(root: Path) -> Counter[str]:
    """Kill a save, the save of the same tag again, and a fork before each of their operations on files."""
    seen, template, nothing = Counter[str](), root / "template", {"latest": None, "kept": {}}

    def start() -> None:
        template.mkdir()
        writer = Writer(template)
        writer.save_next()
        writer.save_next()

    def act(folder: Path, number: int) -> str:
        writer = Writer(folder)
        kill_before(number)
        writer.save_next()
        writer.fork()
        writer.save_again()
        writer.save_next()
        return "done"

    def go_on(folder: Path) -> list[str]:
        """Check, do as the next job does, saving the tags that the killed one was at, and check again."""
        before = check(folder, check(template, nothing))
        writer = Writer(folder)
        assert writer.parent is not None and writer.parent.step == before["latest"]
        writer.fork()
        writer.save_again()
        writer.save_next()
        writer.save_next()
        assert check(folder, before)["latest"] == before["latest"] + 2
        return [name for name in MET if before[name]]

    run(start)
    done, number = None, 0
    while done is None:
        number += 1
        folder = root / str(number)
        shutil.copytree(template, folder)
        done = run(lambda folder=folder, number=number: act(folder, number))
        seen.update(set(hidden(folder).values()))
        seen.update(run(lambda folder=folder: go_on(folder)))
        shutil.rmtree(folder)
    seen["operations"] = number - 1
    return seen


if __name__ == "__main__":
    if sys.argv[1] == "operations":
        print(json.dumps(operations(Path(sys.argv[2]))))
    else:
        print(json.dumps(moments(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), "--clock-back" in sys.argv)))
