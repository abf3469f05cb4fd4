"""What the file system of the run folder can do: checkpoints are committed by renames and forked by links."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pathswitch.checkpoint.files import regular_size
from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem
from pathswitch.run_folder import PathFolder
from pathswitch.versions import PARADIGMS

MOUNTS = Path("/proc/self/mounts")
HIDDEN = ".pathswitch-doctor-"
FICLONE = 0x40049409  # linux/fs.h
LOCAL = {"ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "tmpfs", "ramfs"}
PASSING = {"tmpfs": "in memory: gone after a restart", "ramfs": "in memory", "overlay": "gone with its container"}
CLOCK_SECONDS = 2.0
REPLACEMENTS = 20
CHILD_SECONDS = 10.0
GIB = 1 << 30
SUPPORTED = "choose a run folder on ext4, xfs, btrfs, NFS 4, Lustre (mounted with -o flock), GPFS or BeeGFS"


def check(subject: Subject) -> Iterator[Finding]:
    """Try everything that a run will do, in a hidden folder that is removed again."""
    folder = nearest(subject.folder)
    if not folder.is_dir():
        yield problem("run folder", f"{folder} is not a folder", "choose another run folder")
        return
    yield system_finding(subject, folder)
    yield room_finding(subject, folder)
    try:
        with scratch(folder) as temp:
            for trial in TRIALS:
                yield trial.finding(temp)
            yield link_finding(temp)
            yield clock_finding(temp)
    except OSError as error:
        todo = f"make room or get the right to write in {folder}, or choose another run folder"
        yield problem("write", f"{folder}: {error.strerror}", todo)


def nearest(folder: Path) -> Path:
    """Return a folder, or what is there of the path to it."""
    return next(place for place in (folder, *folder.parents) if place.exists())


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Make a hidden folder, and remove it whatever happens."""
    temp = Path(tempfile.mkdtemp(prefix=HIDDEN, dir=folder))
    try:
        yield temp
    finally:
        shutil.rmtree(temp, ignore_errors=True)


@dataclass(frozen=True)
class Mount:
    """Where a file system is mounted, its type and its options."""

    place: str
    kind: str
    options: tuple[str, ...]

    @property
    def is_local(self) -> bool:
        """Whether its disk is this machine's own."""
        return self.kind in LOCAL


def mount_of(folder: Path) -> Mount:
    """Return the mount that a folder is in."""
    resolved, found = folder.resolve(), Mount("/", "unknown", ())
    for line in MOUNTS.read_text().splitlines():
        _, place, kind, options, *_ = line.split(" ")
        place = place.replace(r"\040", " ").replace(r"\011", "\t").replace(r"\134", "\\")
        # A later mount covers an earlier one at the same place.
        if resolved.is_relative_to(place) and len(place) >= len(found.place):
            found = Mount(place, kind, tuple(options.split(",")))
    return found


def system_finding(subject: Subject, folder: Path) -> Finding:
    """Report the type of the file system, and whether every node of a job can see it."""
    mount = mount_of(folder)
    found = f"{folder} is on {mount.kind}, mounted at {mount.place}"
    if mount.is_local and (subject.several_nodes or subject.kind == "slurm"):
        todo = "unless it does: choose one on NFS 4, Lustre (mounted with -o flock), GPFS or BeeGFS"
        return note("file system", f"{found}: other nodes see it only if this machine exports it", todo)
    unshared = {"nolock", "local_lock=all", "local_lock=flock", "localflock"} & set(mount.options)
    if unshared:
        todo = f"mount it without {', '.join(sorted(unshared))}, or submit a run from one host alone"
        return note("file system", f"{found} with {', '.join(sorted(unshared))}: locks hold on one host alone", todo)
    if mount.kind in PASSING:
        return note("file system", f"{found}: {PASSING[mount.kind]}", "keep releases elsewhere")
    return ok("file system", found)


def room_finding(subject: Subject, folder: Path) -> Finding:
    """Report the free space, in checkpoints where the run has one."""
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    found, todo = f"{free / GIB:.1f} GiB free", f"make room: pathswitch gc {subject.folder}; what uses it: du -sh"
    if status.f_files and status.f_favail < 1000:
        return problem("free space", f"{found}, but only {status.f_favail} more files: df -i {folder}", todo)
    largest, size = largest_checkpoint(subject.folder)
    if largest is not None:
        found += f", room for {free // size} more checkpoints like {largest.relative_to(subject.folder)}"
    if free < max(2 * size, GIB // 8):
        return problem("free space", found, todo)
    return note("free space", found, todo) if free < max(5 * size, 4 * GIB) else ok("free space", found)


def largest_checkpoint(run: Path) -> tuple[Path | None, int]:
    """Return the largest of the newest checkpoints of all paths, and its size in bytes."""
    sizes: list[tuple[int, Path]] = []
    for checkpoints in (place for paradigm in PARADIGMS for place in (run / paradigm).glob("*/checkpoints")):
        step = PathFolder(checkpoints.parent).step()
        newest = checkpoints / f"global_step{step}"
        if step is not None:
            sizes.append((sum(regular_size(file) or 0 for file in newest.rglob("*")), newest))
    size, folder = max(sizes, default=(0, None))
    return (folder, size) if size else (None, 0)


@dataclass(frozen=True)
class Trial:
    """Something that a run does all the time; where it does not work, nothing else helps."""

    name: str
    attempt: Callable[[Path], str]
    """Returns what went wrong, or an empty text."""
    todo: str = SUPPORTED

    def finding(self, temp: Path) -> Finding:
        """Try it in a folder of its own."""
        place = temp / self.name.replace(" ", "-")
        place.mkdir()
        try:
            wrong = self.attempt(place)
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            wrong = error.strerror or str(error)
        return problem(self.name, wrong, self.todo) if wrong else ok(self.name, "works")


def replace_files(place: Path) -> str:
    """Replace a file again and again while another thread reads it."""
    target, missing, wrong, stop = place / "file", [0], [0], threading.Event()
    target.write_text("0")

    def read() -> None:
        while not stop.is_set():
            try:
                wrong[0] += not target.read_text().isdecimal()
            except OSError:
                missing[0] += 1

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for number in range(1, REPLACEMENTS + 1):
            (place / "new").write_text(str(number))
            os.replace(place / "new", target)
    finally:
        stop.set()
        reader.join(1)
    if target.read_text() != str(REPLACEMENTS):
        return "an older file has survived its replacement"
    return f"a reader found no file {missing[0]} times, a part {wrong[0]} times" if missing[0] or wrong[0] else ""


def rename_folder(place: Path) -> str:
    """Give a folder with a file in it another name, which must not replace one that is not empty."""
    for name in ("hidden", "other"):
        (place / name).mkdir()
        (place / name / "file").write_text(name)
    os.rename(place / "hidden", place / "committed")
    if (place / "hidden").exists() or (place / "committed" / "file").read_text() != "hidden":
        return "the folder is not where it was renamed to"
    try:
        os.rename(place / "other", place / "committed")
    except OSError:
        return ""
    return "a folder replaces another one that is not empty"


def sync_names(place: Path) -> str:
    """Make the names in a folder durable."""
    (place / "file").touch()
    descriptor = os.open(place, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return ""


def lock_file(place: Path) -> str:
    """Lock a file, and see another process be refused."""
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    with (place / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if "BlockingIOError" not in _child(code, place / "lock"):
            return "another process gets a lock that is held"
        fcntl.flock(file, fcntl.LOCK_UN)
    refused = _child(code, place / "lock")
    return f"a lock that was released is refused: {refused}" if refused else ""


def read_elsewhere(place: Path) -> str:
    """Write a file and read it in another process."""
    content = os.urandom(64).hex()
    with (place / "file").open("w") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    code = f"import sys; sys.exit(open(sys.argv[1]).read() != {content!r} and 'another content')"
    return _child(code, place / "file")


def _child(code: str, file: Path) -> str:
    """Run some code with a file in another process; return the last line of its message, empty if it succeeds."""
    command = [sys.executable, "-I", "-S", "-c", code, str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=CHILD_SECONDS)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["it failed"])[-1]


TRIALS = (
    Trial("atomic rename", replace_files),
    Trial("rename of folders", rename_folder),
    Trial("fsync of folders", sync_names),
    Trial("flock", lock_file, f"Lustre: mount with -o flock; NFS: without nolock; else {SUPPORTED}"),
    Trial("read by another process", read_elsewhere),
)


def link_finding(temp: Path) -> Finding:
    """Report how a fork would get its files: by reflinks, hard links, or copies."""
    original = temp / "original"
    original.write_text("content")
    reflink = _works(lambda: _reflink(original, temp / "reflink"))
    hard_link = _works(lambda: os.link(original, temp / "link")) and original.stat().st_nlink == 2
    ways = [name for name, works in (("reflinks", reflink), ("hard links", hard_link)) if works]
    if ways:
        return ok("links", f"{' and '.join(ways)}: forks copy nothing")
    return note("links", "neither reflinks nor hard links: each fork copies its checkpoint", SUPPORTED)


def _works(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except OSError:
        return False
    return True


def _reflink(original: Path, clone: Path) -> None:
    with original.open("rb") as source, clone.open("xb") as target:
        fcntl.ioctl(target.fileno(), FICLONE, source.fileno())


def clock_finding(temp: Path) -> Finding:
    """Report how the clock of the file system's server, which dates files, differs from this machine's."""
    before = time.time()
    (temp / "dated").write_text("now")
    modified, after = (temp / "dated").stat().st_mtime, time.time()
    ahead = max(modified - after, min(modified - before, 0.0))
    if abs(ahead) > CLOCK_SECONDS:
        found = f"files are dated {ahead:+.1f} s from this machine's time"
        return problem("file server's clock", found, "synchronize both clocks: chronyc tracking; chronyc makestep")
    return ok("file server's clock", f"{ahead:+.3f} s from this machine's")
