"""What is left on this machine of jobs that died, what limits the next ones, and which variables steer them."""

from __future__ import annotations

import os
import resource
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem, skipped

# A build takes some minutes. Its lock names neither host nor process: where the folder is shared, only age tells.
STALE_SECONDS = 600
FEW_FILES = 4096
MIB, GIB = 1 << 20, 1 << 30
SHARED_MEMORY = Path("/dev/shm")
INFINIBAND = Path("/dev/infiniband")
BUFFERS = "deepspeed_allreduce_buffer_*"
PATH_SUFFIXES = ("_PATH", "_PLAN", "_FILE", "_FOLDER", "_DIR")
SHOWN = 5


def check_builds(subject: Subject) -> Iterator[Finding]:
    """Look for locks of extension builds that nobody will ever release."""
    roots = extension_folders(subject.environ)
    locks = sorted(
        {lock.resolve() for root in roots for pattern in ("*/lock", "*/*/lock") for lock in root.glob(pattern)}
    )
    if not locks:
        yield ok("JIT locks", f"none in {', '.join(map(str, roots))}")
    holders = open_files({str(lock) for lock in locks})
    for lock in locks:
        yield lock_finding(lock, holders.get(str(lock)), time.time())


def extension_folders(environ: Mapping[str, str]) -> list[Path]:
    """Return where torch keeps compiled extensions: where it is told to, and where it does otherwise."""
    home = Path(environ.get("HOME") or "~").expanduser()
    default = Path(environ.get("XDG_CACHE_HOME") or home / ".cache") / "torch_extensions"
    told = environ.get("TORCH_EXTENSIONS_DIR")
    return [Path(told).resolve(), default.resolve()] if told else [default.resolve()]


def lock_finding(lock: Path, pid: int | None, now: float) -> Finding:
    """Report one lock: held by a live build, abandoned, or too young to tell."""
    if pid is not None:
        return ok("JIT locks", f"{lock}: held by the build in process {pid}")
    try:
        age = now - lock.stat().st_mtime
    except FileNotFoundError:
        return ok("JIT locks", f"{lock}: has just been released")
    found = f"{lock}: {age / 60:.0f} min old, and no process here holds it"
    todo = f"rm {shlex.quote(str(lock))}"
    if age < STALE_SECONDS:
        return note("JIT locks", found, f"{todo}   # unless another host is building it now")
    return problem("JIT locks", f"{found}; every job that needs this extension waits for it without a word", todo)


def open_files(names: set[str]) -> dict[str, int]:
    """Return a process for each of the files that a process of this machine has open or mapped."""
    found: dict[str, int] = {}
    for process in (entry for entry in Path("/proc").iterdir() if names and entry.name.isdecimal()):
        used = _opened(process) | _mapped(process)
        found |= {name: int(process.name) for name in names & used}
    return found


def _opened(process: Path) -> set[str]:
    targets = set()
    with suppress(OSError):  # it has ended, or is another user's
        for link in os.scandir(process / "fd"):
            with suppress(OSError):
                targets.add(os.readlink(link.path))
    return targets


def _mapped(process: Path) -> set[str]:
    with suppress(OSError):
        lines = (process / "maps").read_text(errors="replace").splitlines()
        return {fields[5] for line in lines if len(fields := line.split(maxsplit=5)) == 6}
    return set()


def check_limits(subject: Subject) -> Iterator[Finding]:
    """Look at what this shell's jobs would inherit, and at shared memory."""
    yield open_file_finding(*resource.getrlimit(resource.RLIMIT_NOFILE))
    yield locked_memory_finding(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], INFINIBAND.is_dir())
    yield shared_memory_finding(SHARED_MEMORY)
    yield leftover_finding(SHARED_MEMORY)


def open_file_finding(soft: int, hard: int) -> Finding:
    """Report the limit of open files."""
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        return ok("open files", "unlimited" if soft == resource.RLIM_INFINITY else f"at most {soft}")
    todo = "ulimit -n 65536"
    if hard != resource.RLIM_INFINITY and hard < FEW_FILES:
        todo = "LimitNOFILE= of the service, or nofile in /etc/security/limits.conf: 65536"
    return note("open files", f"at most {soft}: sockets and data loader workers of many ranks can use them up", todo)


def locked_memory_finding(limit: int, infiniband: bool) -> Finding:
    """Report the limit of locked memory, which RDMA needs."""
    if not infiniband:
        return skipped("locked memory", "no InfiniBand here")
    if limit == resource.RLIM_INFINITY:
        return ok("locked memory", "unlimited")
    todo = "memlock unlimited in /etc/security/limits.conf; docker run --ulimit memlock=-1; LimitMEMLOCK=infinity"
    return problem("locked memory", f"at most {limit // 1024} KiB: NCCL cannot register buffers for InfiniBand", todo)


def shared_memory_finding(folder: Path) -> Finding:
    """Report the size of /dev/shm, which NCCL and data loader workers use."""
    todo = "mount -o remount,size=16G /dev/shm   # in a container: docker run --shm-size=16g, or --ipc=host"
    if not folder.is_dir():
        return problem("shared memory", f"{folder} is missing", "mount -t tmpfs tmpfs /dev/shm")
    status = os.statvfs(folder)
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    found = f"{folder}: {free / GIB:.2f} of {size / GIB:.2f} GiB free"
    if free < 64 * MIB:
        return problem("shared memory", found, todo)
    return note("shared memory", found, todo) if size < GIB else ok("shared memory", found)


def leftover_finding(folder: Path) -> Finding:
    """Report buffers of DeepSpeed's CPU communication whose processes are gone."""
    own = [path for path in folder.glob(BUFFERS) if os.geteuid() in (0, path.stat().st_uid)]
    used = open_files({str(path) for path in own})
    dead = sorted(path for path in own if str(path) not in used)
    if not dead:
        return ok("shared memory leftovers", f"no {BUFFERS} of dead processes in {folder}")
    size = sum(path.stat().st_blocks * 512 for path in dead)
    names = " ".join(shlex.quote(str(path)) for path in dead[:SHOWN])
    more = f"   # and {len(dead) - SHOWN} more" if len(dead) > SHOWN else ""
    found = f"{len(dead)} x {BUFFERS} of dead processes, {size / MIB:.0f} MiB"
    return note("shared memory leftovers", found, f"rm {names}{more}")


def check_variables(subject: Subject) -> Iterator[Finding]:
    """Look at the variables that change what pathswitch does."""
    names = sorted(name for name in subject.environ if name.startswith("PATHSWITCH_"))
    if not names:
        yield ok("variables", "no PATHSWITCH_* is set")
        return
    shown = [f"{name}={subject.environ[name]}" if name.endswith(PATH_SUFFIXES) else name for name in names]
    todo = f"unset {' '.join(names)}   # unless they are meant: each job would inherit them"
    yield note("variables", f"set: {', '.join(shown)}", todo)
    yield from contradictions(subject)


def contradictions(subject: Subject) -> Iterator[Finding]:
    """Report variables that would end a job or send it along a path that the plan does not have."""
    environ = subject.environ
    plan = environ.get("PATHSWITCH_PLAN")
    if plan and not Path(plan).is_file():
        yield problem("PATHSWITCH_PLAN", f"{plan} is not a file", "export PATHSWITCH_PLAN=<the plan file>, or unset it")
    stop = environ.get("PATHSWITCH_STOP_FILE")
    if stop and Path(stop).exists():
        todo = f"unset PATHSWITCH_STOP_FILE   # or: rm {shlex.quote(stop)}"
        yield problem("PATHSWITCH_STOP_FILE", f"{stop} is there: every job saves and ends at once", todo)
    path = environ.get("PATHSWITCH_PATH")
    if path and subject.plan is not None:
        paths = ["main", *(version.name for version in subject.plan.versions)]
        if path not in paths:
            todo = f"unset PATHSWITCH_PATH, or one of: {', '.join(paths)}"
            yield problem("PATHSWITCH_PATH", f"{path!r} is not a path of the plan", todo)
