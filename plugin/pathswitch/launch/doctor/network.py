"""Whether ranks would find each other: host names, interfaces and ports."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping

from pathswitch.launch.doctor import facts
from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem, skipped

DEFAULT_PORT = 29500
INTERFACE_VARIABLES = ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME")


def check(subject: Subject) -> Iterator[Finding]:
    """Look at this machine alone; the hosts of a hostfile are asked themselves."""
    name = socket.gethostname()
    yield name_finding(name, facts.addresses(name))
    yield port_finding(subject)
    yield interface_finding(subject, facts.interfaces())


def name_finding(name: str, addresses: list[str]) -> Finding:
    """Report whether others would reach the machine by its own name."""
    reachable = [address for address in addresses if not facts.is_loopback(address)]
    if reachable:
        return ok("host name", f"{name} is {', '.join(reachable)}")
    found = f"{name} is {', '.join(addresses) or 'without an address'}: fine for jobs on this machine alone"
    todo = f"for others, in /etc/hosts the line `<address in the network> {name}` in place of any 127.* one"
    return note("host name", found, todo)


def master_ports(subject: Subject) -> list[int]:
    """Return the ports at which the ranks of jobs would meet."""
    own = subject.environ.get("MASTER_PORT", "")
    return [spec.port for spec in subject.specs if subject.run] or [int(own) if own.isdecimal() else DEFAULT_PORT]


def port_finding(subject: Subject) -> Finding:
    """Report whether the ports of local jobs are free; those of other kinds are elsewhere."""
    ports = master_ports(subject)
    if subject.kind != "local":
        return skipped("master ports", "jobs meet on other machines")
    taken = {port: error for port in ports if (error := facts.port_error(port)) is not None}
    if not taken:
        return ok("master ports", f"{', '.join(map(str, ports))}: free")
    found = ", ".join(f"{port}: {error}" for port, error in taken.items())
    who = f"ss -ltnp 'sport = :{next(iter(taken))}'   # who has it"
    if subject.specs and subject.run:
        return problem("master ports", found, f"{who}; end it, unless it is this run's own job")
    return note("master ports", found, f"{who}; for your own launches, another --master_port")


def interface_finding(subject: Subject, there: list[str]) -> Finding:
    """Report whether the variables that choose a network interface name one."""
    found = interface_errors(subject.environ, there)
    if not found:
        return ok("interfaces", ", ".join(there))
    todo = f"unset {' '.join(found)}, or name an interface that every host has: ip -br addr"
    if subject.kind == "local":
        return problem("interfaces", "; ".join(found.values()), todo)
    return note("interfaces", f"on this machine, {'; '.join(found.values())}", todo)


def interface_errors(environ: Mapping[str, str], there: list[str]) -> dict[str, str]:
    """Return what is wrong with each variable that names no network interface of a machine."""
    given = {name: environ[name] for name in INTERFACE_VARIABLES if environ.get(name)}
    wrong = {name: value for name, value in given.items() if not interface_exists(name, value, there)}
    return {name: f"{name}={value} names none of {', '.join(there)}" for name, value in wrong.items()}


def interface_exists(variable: str, value: str, there: list[str]) -> bool:
    """Return whether a value names an interface: for NCCL prefixes, ``=name`` exactly, ``^name`` all others."""
    if variable != "NCCL_SOCKET_IFNAME":
        return all(name in there for name in value.split(","))
    names = [name.split(":")[0] for name in value.lstrip("^=").split(",")]
    if value.startswith("^="):
        return any(name not in names for name in there)
    if value.startswith("^"):
        return any(not name.startswith(tuple(names)) for name in there)
    return any(name in names if value.startswith("=") else name.startswith(tuple(names)) for name in there)
