"""Whether every host of a hostfile can be reached, is set up like this one, and shares the run folder."""

from __future__ import annotations

import json
import subprocess
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pathswitch.errors import ConfigError
from pathswitch.launch.deepspeed_env import DEFAULT_NAME, user_lines
from pathswitch.launch.doctor import facts
from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem, skipped
from pathswitch.launch.doctor.folders import nearest, scratch
from pathswitch.launch.doctor.network import interface_errors, master_ports
from pathswitch.launch.doctor.programs import end, in_parallel
from pathswitch.launch.hosts import SSH_FAILED

CONNECT_SECONDS = 8
HOST_SECONDS = 18.0
CLOCK_SECONDS = 2.0
PINGS = 5
MORE_PORTS = 20
PACKAGES = ("pathswitch", "torch", "deepspeed")
# What ssh says, and what to do about it.
SSH_ADVICE = {
    "Permission denied": "ssh-copy-id {host}   # `ssh -o BatchMode=yes {host} true` must succeed",
    "Host key verification failed": "ssh {host} true, and accept its key; a new machine: ssh-keygen -R {host} before",
    "Could not resolve hostname": "correct the name in the hostfile, or give it an address: ~/.ssh/config, /etc/hosts",
    "Connection refused": "start sshd on {host}, or set its Port in ~/.ssh/config",
}
UNREACHABLE = "take {host} out of the hostfile until `ssh {host} true` answers"


class Silence(Exception):
    """A host's side of the conversation has ended; the message says why."""


class Conversation:
    """Questions to ``facts.serve`` on another host, through ssh."""

    def __init__(self, subject: Subject, host: str) -> None:
        source = Path(facts.__file__).read_bytes()
        remote = [subject.python, "-c", f"import sys; exec(sys.stdin.buffer.read({len(source)}))"]
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subject.programs.start(
            subject.ssh.line(host, remote, CONNECT_SECONDS),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        self._python, self._expired = subject.python, False
        self._timer = threading.Timer(min(HOST_SECONDS, subject.programs.remaining()), self._expire)
        self._timer.daemon = True
        self._timer.start()
        self._send(source)

    def ask(self, what: str, **arguments: Any) -> dict[str, Any]:
        """Return the answer to a question.

        Raises:
            Silence: there is none.
        """
        self._send(json.dumps({"what": what, **arguments}).encode() + b"\n")
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode(errors="replace")
            if facts.MARK in text:
                answer: dict[str, Any] = json.loads(text.partition(facts.MARK)[2])
                return answer
        raise Silence(self._reason())

    def close(self) -> None:
        """End the conversation; the other side ends by itself when its stdin does."""
        self._timer.cancel()
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            end(self._process)
        self._errors.close()

    def _send(self, content: bytes) -> None:
        assert self._process.stdin is not None
        with suppress(OSError):  # what it said before it went is on its stderr
            self._process.stdin.write(content)
            self._process.stdin.flush()

    def _expire(self) -> None:
        self._expired = True
        end(self._process)

    def _reason(self) -> str:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        if self._expired:
            return f"no answer within {HOST_SECONDS:.0f} s"
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        code = self._process.returncode
        reason = lines[-1] if lines else f"exit code {code}"
        return reason if code == SSH_FAILED else f"cannot run {self._python}: {reason}"


@dataclass
class Answers:
    """What is known of one host."""

    name: str
    conversation: Conversation | None = None
    silence: str = ""
    """Why it does not answer."""
    machine: dict[str, Any] = field(default_factory=dict)
    ahead_seconds: float = 0.0
    """Its clock minus this machine's."""
    error_seconds: float = 0.0
    unshared: str | None = None
    unconnected: str | None = None


def check(subject: Subject) -> Iterator[Finding]:
    """Ask all hosts at once, then let them connect to the first one."""
    if not subject.hosts:
        yield skipped("hosts", "no hostfile")
        return
    yield from here(subject)
    if subject.which("ssh") is None:
        return
    hosts = [Answers(host.name) for host in subject.hosts]
    expected = reference()
    try:
        with scratch(nearest(subject.folder)) as shared:
            outcomes = in_parallel(subject.programs, lambda host: interview(subject, host, shared), hosts)
    except OSError as error:
        yield problem("hosts", f"not asked: {subject.folder} cannot be written ({error.strerror})", "see `write`")
        return
    for host, outcome in zip(hosts, outcomes, strict=True):
        if isinstance(outcome, Exception):
            host.silence = str(outcome) or type(outcome).__name__
        elif outcome is None:
            host.silence = "no answer in time"
    try:
        meet(subject, hosts)
    finally:
        in_parallel(subject.programs, close, hosts)
    yield from judged(subject, hosts, expected)


def reference() -> dict[str, Any]:
    """Return what every host should have: what this machine has."""
    return facts.versions(list(PACKAGES)) | {"code": facts.code_digest()}


def here(subject: Subject) -> Iterator[Finding]:
    """Look at what launching on hosts takes on this machine."""
    openmpi = subject.launch.launcher == "openmpi"
    packages = {"ssh": "openssh-client", **({"mpirun": "openmpi-bin"} if openmpi else {"pdsh": "pdsh"})}
    missing = [program for program in packages if subject.which(program) is None]
    if missing:
        todo = f"apt-get install {' '.join(packages[program] for program in missing)}"
        yield problem("launcher", f"not on PATH: {', '.join(missing)}", todo)
    else:
        yield ok("launcher", ", ".join(str(subject.which(program)) for program in packages))
    name = subject.environ.get("DS_ENV_FILE", DEFAULT_NAME)
    try:
        variables = user_lines(Path.home(), subject.working_folder, name)
    except ConfigError as error:
        yield problem(name, f"{error.where}: {error.given!r}", f"write {error.allowed}, or remove the line")
    else:
        yield ok(name, f"hands {', '.join(variables)} to all ranks" if variables else "none: ranks get what jobs set")


def interview(subject: Subject, host: Answers, shared: Path) -> bool:
    """Ask one host everything that needs no other host.

    Raises:
        Silence: it cannot be asked.
    """
    host.conversation = talk = Conversation(subject, host.name)
    host.ahead_seconds, host.error_seconds = clock(talk)
    programs = ["orted"] if subject.launch.launcher == "openmpi" else []
    folder = str(subject.working_folder)
    host.machine = talk.ask("machine", packages=list(PACKAGES), programs=programs, folder=folder)
    host.unshared = share(talk, shared)
    return True


def close(host: Answers) -> bool:
    """End a host's conversation if there is one."""
    if host.conversation is not None:
        host.conversation.close()
    return True


def clock(talk: Conversation) -> tuple[float, float]:
    """Return how far a host's clock is ahead, and by how much that may be wrong: half the shortest round trip."""
    rounds = []
    for _ in range(PINGS):
        sent = time.time()
        there = float(talk.ask("clock")["time"])
        received = time.time()
        rounds.append(((received - sent) / 2, there - (sent + received) / 2))
    error, ahead = min(rounds)
    return ahead, error


def share(talk: Conversation, shared: Path) -> str | None:
    """Return why a folder here is not the same one there, None where each side reads what the other has written."""
    token, reply = uuid.uuid4().hex, uuid.uuid4().hex
    (shared / token).write_text(token)
    error: str | None = talk.ask("exchange", folder=str(shared), token=token, reply=reply)["error"]
    if error is not None:
        return error
    try:
        # Looked for only now: a name that was missing once may stay missing in an NFS client's cache.
        return None if (shared / reply).read_text() == reply else "a file that it wrote has another content here"
    except OSError as late:
        return f"a file that it wrote is not here ({late.strerror})"


def meet(subject: Subject, hosts: list[Answers]) -> None:
    """Let the first host listen where DeepSpeed's ranks would meet, and all others connect to it."""
    first, others = hosts[0], [host for host in hosts[1:] if not host.silence]
    if first.silence or first.conversation is None or not others:
        return
    port = master_ports(subject)[0]
    try:
        meeting = first.conversation.ask("listen", ports=list(range(port, port + MORE_PORTS)))
    except Silence:
        return  # it has told everything else by now
    if "failed" in meeting:
        return
    address = subject.environ.get("MASTER_ADDR", meeting["address"])

    def connect(host: Answers) -> bool:
        assert host.conversation is not None
        error = host.conversation.ask("connect", address=address, port=meeting["port"])["error"]
        host.unconnected = (
            None if error is None else f"cannot connect to {first.name} ({address}:{meeting['port']}): {error}"
        )
        return True

    in_parallel(subject.programs, connect, others)


def judged(subject: Subject, hosts: list[Answers], expected: dict[str, Any]) -> Iterator[Finding]:
    """Report the hosts that are as they should be in one finding, and each trouble of the others in one of its own."""
    findings = {host.name: list(troubles(subject, host, expected)) for host in hosts}
    most_gpus = max((host.machine["gpus"] for host in hosts if not host.silence), default=0)
    for host, slots in zip(hosts, (line.slots for line in subject.hosts), strict=True):
        if not host.silence and most_gpus and host.machine["gpus"] < slots:
            found = f"has {host.machine['gpus']} GPUs, the hostfile gives it slots={slots}"
            todo = f"{host.name} slots={host.machine['gpus']} in the hostfile; ssh {host.name} nvidia-smi"
            findings[host.name].append(problem(f"host {host.name}", found, todo))
    well = [host for host in hosts if all(finding.status == "note" for finding in findings[host.name])]
    if well:
        ahead = max((host.ahead_seconds for host in well), key=abs)
        error = max(host.error_seconds for host in well)
        found = f"{len(well)} of {len(hosts)} answer, have the same versions and share {subject.folder}"
        yield ok("hosts", f"{found}; clocks differ by {abs(ahead):.3f} ± {error:.3f} s")
    for host in hosts:
        yield from findings[host.name]


def troubles(subject: Subject, host: Answers, expected: dict[str, Any]) -> Iterator[Finding]:
    """Report what is wrong with one host."""
    name, folder = f"host {host.name}", subject.working_folder
    if host.silence:
        yield problem(name, host.silence, _advice(subject, host))
        return
    yield from software_troubles(subject, host, expected)
    if abs(host.ahead_seconds) - host.error_seconds > CLOCK_SECONDS:
        found = f"its clock is {host.ahead_seconds:+.1f} ± {host.error_seconds:.1f} s from this machine's"
        yield problem(name, found, f"ssh {host.name} chronyc makestep   # or ntpd, systemd-timesyncd")
    if host.unshared is not None:
        todo = f"mount the file system of {subject.folder} there at the same place, or choose a shared run folder"
        yield problem(name, f"does not share the run folder: {host.unshared}", todo)
    if not host.machine["has_folder"]:
        todo = f"share {folder} with it, or put the plan into a folder that is shared"
        yield problem(name, f"has no {folder}, where jobs are started", todo)
    yield from network_troubles(subject, host)


def _advice(subject: Subject, host: Answers) -> str:
    """Return what to do about a host that does not answer."""
    if host.silence.startswith(f"cannot run {subject.python}"):
        return f"install the environment of {subject.python} at the same place on {host.name}, or share its disk"
    advice = next((todo for words, todo in SSH_ADVICE.items() if words in host.silence), UNREACHABLE)
    return advice.format(host=host.name)


def software_troubles(subject: Subject, host: Answers, expected: dict[str, Any]) -> Iterator[Finding]:
    """Report versions that differ from this machine's, and programs that are missing."""
    name, there = f"host {host.name}", host.machine["versions"] | {"code": host.machine["code"]}
    differing = [key for key in expected if there.get(key) != expected[key] and key != "code"]
    if differing:
        versions = [f"{key} {there.get(key) or 'missing'} (here {expected[key] or 'missing'})" for key in differing]
        todo = f"bring {Path(subject.python).parents[1]} there to the same versions, or share its disk"
        yield problem(name, ", ".join(versions), todo)
    elif there["code"] != expected["code"]:
        found = f"pathswitch {expected['pathswitch']} has other files there than here"
        todo = f"ssh {host.name} {subject.python} -m pip install --force-reinstall --no-deps pathswitch"
        yield problem(name, found, f"{todo}   # of the same source")
    if host.machine["missing"]:
        found = f"a command through ssh does not find {', '.join(host.machine['missing'])}"
        yield problem(name, found, "apt-get install openmpi-bin there; or set PATH in ~/.bashrc before it returns")


def network_troubles(subject: Subject, host: Answers) -> Iterator[Finding]:
    """Report what keeps a host's ranks from finding the others."""
    name, own = f"host {host.name}", host.machine["hostname"]
    lonely = all(facts.is_loopback(address) for address in host.machine["addresses"])
    if len(subject.hosts) > 1 and lonely and not subject.environ.get("GLOO_SOCKET_IFNAME"):
        found = f"its own name, {own}, has no address that others can reach: its ranks' gloo would offer that one"
        todo = f"in /etc/hosts there, `<address> {own}` in place of 127.*; or export GLOO_SOCKET_IFNAME=<interface>"
        # NCCL looks at interfaces, and not at the name.
        yield note(name, found, todo) if host.machine["gpus"] else problem(name, found, todo)
    if host.unconnected is not None:
        todo = "open TCP ports between the hosts: iptables -L -n, ufw status; or MASTER_ADDR=<an address they reach>"
        yield problem(name, host.unconnected, todo)
    for variable, found in interface_errors(subject.environ, host.machine["interfaces"]).items():
        yield problem(name, found, f"unset {variable}, or name an interface that every host has")
