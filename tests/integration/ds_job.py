"""Start a script on several ranks with the real ``deepspeed`` launcher, and leave no process behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

HERE = Path(__file__).parent
BIN = Path(sys.executable).parent
EXTENSIONS = Path(tempfile.gettempdir()) / f"pathswitch-tests-{os.getuid()}" / "torch_extensions"


@dataclass(frozen=True)
class Finished:
    """What is left of a job."""

    returncode: int
    output: str


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return an environment for CPU ranks: one thread each, the virtual environment's tools (ninja) on PATH.

    Without torch's compiler, which DeepSpeed loads for an optimizer that no test uses.
    """
    own = {name: value for name, value in os.environ.items() if not name.startswith("PATHSWITCH")}
    # Of our own: a job killed while DeepSpeed builds an extension leaves a lock on which every later job would wait.
    own.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
    own["PATH"] = f"{BIN}{os.pathsep}{own['PATH']}"
    own |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return own | {"TORCHDYNAMO_DISABLE": "1"} | dict(extra or {})


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def start(command: Sequence[str], log: IO[str], cwd: Path, extra: Mapping[str, str] | None) -> subprocess.Popen[str]:
    """Start a command in a session of its own, so that its whole process group can be ended."""
    return subprocess.Popen(
        command, cwd=cwd, env=environment(extra), stdout=log, stderr=log, text=True, start_new_session=True
    )


def end(process: subprocess.Popen[str]) -> None:
    """Kill whatever is left of the job; the launcher leaves orphans when it dies first."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def run(
    command: Sequence[str], cwd: Path, extra: Mapping[str, str] | None = None, timeout_seconds: float = 300
) -> Finished:
    """Run a command to its end and return its exit code and output."""
    log_file = cwd / f"log_{free_port()}.txt"
    with log_file.open("w") as log:
        process = start(command, log, cwd, extra)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            for lock in EXTENSIONS.rglob("lock"):
                lock.unlink()
            raise AssertionError(f"still running after {timeout_seconds} s:\n{log_file.read_text()[-4000:]}") from None
        finally:
            end(process)
            _remove_shared_memory(command)
    return Finished(code, log_file.read_text(errors="replace"))


def _remove_shared_memory(command: Sequence[str]) -> None:
    """Remove the buffers of 66 MiB a rank that DeepSpeed's CPU communication leaves when its ranks are killed."""
    port = command[command.index("--master_port") + 1] if "--master_port" in command else "none"
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def start_ranks(
    script: str, *arguments: str, cwd: Path, log: IO[str], ranks: int = 2, extra: Mapping[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """Start a script on ``ranks`` ranks without a launcher, as `srun` does, each in a session of its own."""
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-u", str(HERE / script), *arguments]
    variables = [{"RANK": str(rank), "LOCAL_RANK": str(rank), **group, **dict(extra or {})} for rank in range(ranks)]
    return [start(command, log, cwd, own) for own in variables]


def processes_of(session: int) -> dict[int, str]:
    """Return the processes of a session with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                status, command = (entry / "stat").read_text(), (entry / "cmdline").read_bytes()
            except OSError:
                continue  # it has just ended
            if int(status.rpartition(")")[2].split()[3]) == session:
                found[int(entry.name)] = command.replace(b"\0", b" ").decode()
    return found


def catches(pid: int, signum: signal.Signals) -> bool:
    """Return whether a process has a handler for a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    caught = next((line.split()[1] for line in status.splitlines() if line.startswith("SigCgt")), "0")
    return bool(int(caught, 16) >> (signum - 1) & 1)


def deepspeed_command(script: str, *arguments: str, ranks: int = 2) -> list[str]:
    """Return the command line that starts a script of this folder on ``ranks`` ranks."""
    launcher = [str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port())]
    return [*launcher, str(HERE / script), *arguments]
