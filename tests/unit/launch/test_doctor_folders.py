"""What the doctor says of file systems: ext4, tmpfs, full, frozen and read-only ones, all of them real."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from doctor_subject import by_name, mounted, subject

from pathswitch.config.launch import LaunchSection
from pathswitch.launch.doctor import SPARE_SECONDS, Finding, Request, diagnose, folders

SBIN = {"PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"}
TRIALS = [trial.name for trial in folders.TRIALS]


@contextmanager
def mounted_image(folder: Path, kind: str, size: str) -> Iterator[Path]:
    """A file system in a file."""
    if shutil.which(f"mkfs.{kind}", path=SBIN["PATH"]) is None:
        pytest.skip(f"needs mkfs.{kind}")
    image = folder / f"{kind}.img"
    subprocess.run(["truncate", "-s", size, image], check=True)
    make = ["mkfs." + kind, "-q", str(image)]
    subprocess.run(make, check=True, timeout=60, env=SBIN)
    with mounted(folder / kind, kind, "loop", str(image)) as place:
        yield place


def examined(run: Path, launch: LaunchSection | None = None) -> dict[str, Finding]:
    findings = by_name(list(folders.check(subject(run, launch=launch))))
    left = [str(file) for file in folders.nearest(run).glob(f"{folders.HIDDEN}*")]
    assert left == [], "the hidden folder is removed again"
    return findings


def test_an_ext4_can_do_everything_but_reflinks(tmp_path: Path) -> None:
    with mounted_image(tmp_path, "ext4", "64M") as place:
        findings = examined(place)
    assert [findings[name].status for name in TRIALS] == ["ok"] * len(TRIALS)
    assert findings["file system"].found == f"{place} is on ext4, mounted at {place}"
    assert findings["links"].found == "hard links: forks copy nothing"
    assert findings["free space"].status == "problem" and findings["free space"].found == "0.0 GiB free"
    assert findings["file server's clock"].status == "ok"


def test_a_btrfs_can_reflink(tmp_path: Path) -> None:
    with mounted_image(tmp_path, "btrfs", "128M") as place:
        assert examined(place)["links"].found == "reflinks and hard links: forks copy nothing"


def test_a_tmpfs_is_gone_after_a_restart(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=8g") as place:
        findings = examined(place / "not" / "there" / "yet")
        assert list(place.iterdir()) == []
    assert findings["file system"].status == "note" and "in memory" in findings["file system"].found
    assert findings["free space"].status == "ok"
    assert [findings[name].status for name in TRIALS] == ["ok"] * len(TRIALS)


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=1m") as place:
        with pytest.raises(OSError), (place / "file").open("wb") as file:
            file.write(b"x" * (2 << 20))
        findings = examined(place)
    assert findings["write"].status == "problem" and "No space left on device" in findings["write"].found
    assert not set(TRIALS) & set(findings), "it is not the fault of what was tried"
    assert findings["free space"].status == "problem"


def test_a_disk_without_inodes(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=8g,nr_inodes=50") as place:
        findings = examined(place)
    assert findings["free space"].status == "problem" and f"df -i {place}" in findings["free space"].found


def test_a_read_only_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=1m,ro") as place:
        findings = examined(place)
    assert "Read-only file system" in findings["write"].found and not set(TRIALS) & set(findings)


def test_a_frozen_disk_does_not_hold_the_command_up(tmp_path: Path) -> None:
    """Writes to it never return, and not even SIGKILL ends the process that waits: the worst of dead file systems."""
    with mounted_image(tmp_path, "ext4", "64M") as place:
        subprocess.run(["fsfreeze", "-f", place], check=True, timeout=30, env=SBIN)
        try:
            start = time.monotonic()
            findings = by_name(diagnose(Request(run=place), os.environ, seconds=2))
            assert time.monotonic() - start < 2 + SPARE_SECONDS + 15
        finally:
            subprocess.run(["fsfreeze", "-u", place], check=True, timeout=30, env=SBIN)
        assert findings["run folder"].found == "not checked within 2 s" and "hangs" in findings["run folder"].todo
        assert findings["Python"].status == "ok"
        wait_until_unused(place)


def wait_until_unused(place: Path) -> None:
    deadline = time.monotonic() + 30
    while subprocess.run(["umount", place], capture_output=True).returncode != 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], check=True)  # for the unmounting at the end


def test_a_run_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "run").touch()
    assert examined(tmp_path / "run")["run folder"].status == "problem"


def test_room_is_counted_in_the_runs_own_checkpoints(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", "tmpfs", "size=100m") as run:
        for path, step, size in (("main", 10, 1), ("main", 20, 20), ("v1", 30, 5)):
            checkpoint = run / "path_switching" / path / "checkpoints" / f"global_step{step}"
            checkpoint.mkdir(parents=True)
            (checkpoint / "shard.pt").write_bytes(b"x" * (size << 20))
        finding = examined(run)["free space"]
    assert finding.found.endswith("room for 3 more checkpoints like path_switching/main/checkpoints/global_step20")
    assert finding.todo.startswith(f"make room: pathswitch gc {run}")


@pytest.mark.parametrize(
    ("line", "status", "words"),
    [
        ("server:/x {place} nfs4 rw,vers=4.2,local_lock=none 0 0", "ok", "is on nfs4"),
        ("server:/x {place} nfs rw,vers=3,local_lock=all 0 0", "note", "with local_lock=all"),
        ("10.0.0.1@o2ib:/x {place} lustre rw,localflock 0 0", "note", "with localflock"),
        ("overlay {place} overlay rw 0 0", "note", "gone with its container"),
    ],
)
def test_what_mounts_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, status: str, words: str) -> None:
    """No file server was at hand: the kernel's list of mounts is made up."""
    place = tmp_path / "a place"
    (place / "run").mkdir(parents=True)
    mounts = tmp_path / "mounts"
    lines = ["/dev/a / ext4 rw 0 0", f"/dev/b {escaped(place)} xfs rw 0 0", line.format(place=escaped(place))]
    mounts.write_text("\n".join([*lines, "/dev/c / ext4 rw 0 0"]) + "\n")
    monkeypatch.setattr(folders, "MOUNTS", mounts)
    finding = folders.system_finding(subject(place / "run"), place / "run")
    assert finding.status == status and words in finding.found


def escaped(place: Path) -> str:
    """A folder as the kernel writes it."""
    return str(place).replace(" ", r"\040")


def test_a_local_disk_is_noted_where_jobs_run_elsewhere(tmp_path: Path) -> None:
    with mounted_image(tmp_path, "ext4", "64M") as place:
        finding = examined(place, LaunchSection(kind="slurm"))["file system"]
    assert finding.status == "note" and "only if this machine exports it" in finding.found


def refuse(code: int) -> None:
    raise OSError(code, os.strerror(code))


@pytest.mark.parametrize(
    ("owner", "name", "trial", "code"),
    [
        (os, "replace", "atomic rename", errno.EEXIST),
        (os, "rename", "rename of folders", errno.EXDEV),
        (os, "fsync", "fsync of folders", errno.EINVAL),
        (folders.fcntl, "flock", "flock", errno.ENOSYS),
    ],
)
def test_what_a_file_system_refuses_is_a_problem_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: object, name: str, trial: str, code: int
) -> None:
    """Every Linux file system at hand can do all of it: the refusals are made up."""
    monkeypatch.setattr(owner, name, lambda *_: refuse(code))
    findings = examined(tmp_path)
    assert (findings[trial].status, findings[trial].found) == ("problem", os.strerror(code))
    assert findings["links"].status == "ok", "the others are tried all the same"


def test_a_lock_that_does_not_exclude_others_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders.fcntl, "flock", lambda *_: None)
    assert examined(tmp_path)["flock"].found == "another process gets a lock that is held"


def test_a_replacement_that_is_not_atomic_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(source: Path, target: Path) -> None:
        target.unlink()
        time.sleep(0.01)
        source.rename(target)

    monkeypatch.setattr(os, "replace", replace)
    assert "a reader found no file" in examined(tmp_path)["atomic rename"].found


def test_without_links_a_fork_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", lambda *_: refuse(errno.EPERM))
    monkeypatch.setattr(folders, "_reflink", lambda *_: refuse(errno.EOPNOTSUPP))
    assert examined(tmp_path)["links"].status == "note"


@pytest.mark.parametrize(("ahead_seconds", "status"), [(-60, "problem"), (60, "problem"), (1.5, "ok"), (-1.5, "ok")])
def test_a_file_servers_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead_seconds: float, status: str
) -> None:
    """Files are dated by this machine's clock here: it is this process that is told another time."""
    real = time.time
    monkeypatch.setattr(folders.time, "time", lambda: real() - ahead_seconds)
    finding = folders.clock_finding(tmp_path)
    assert finding.status == status and f"{ahead_seconds:+.1f}"[:-1] in finding.found


def test_a_slow_disk_is_not_taken_for_a_wrong_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    times = iter([now - 30, now + 30])  # before the write and after it
    monkeypatch.setattr(folders.time, "time", lambda: next(times))
    assert folders.clock_finding(tmp_path).status == "ok"
