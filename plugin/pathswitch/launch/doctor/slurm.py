"""Whether SLURM answers, has what the plan asks for, and starts jobs again."""

from __future__ import annotations

import getpass
import re
from collections.abc import Iterator

from pathswitch.config.launch import LaunchSection, time_seconds
from pathswitch.errors import choices
from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem, skipped

COMMANDS = ("sbatch", "squeue", "scontrol", "sinfo", "srun", "scancel")
ANSWER_SECONDS = 10.0
SHORT_JOB_AGE_SECONDS = 60
Record = dict[str, str]

_PLURALS = {"account": "Accounts", "qos": "Qos"}
_GPUS = re.compile(r"\bgpu(?::[A-Za-z][\w.-]*)?:(\d+)")


def check(subject: Subject) -> Iterator[Finding]:
    """Ask the controller, if the plan or the machine has anything to do with SLURM."""
    missing = [command for command in COMMANDS if subject.which(command) is None]
    needed = subject.kind == "slurm"
    if not needed and (subject.plan is not None or missing):
        yield skipped(
            "SLURM", f"[launch] kind is {subject.kind!r}" if subject.plan is not None else "not installed here"
        )
    elif missing:
        todo = "submit from a login node of the cluster, or apt-get install slurm-client"
        yield problem("SLURM commands", f"not on PATH: {', '.join(missing)}", todo)
    else:
        ping = subject.programs.run(["scontrol", "ping"], timeout=ANSWER_SECONDS)
        lines = [line for line in ping.stdout.splitlines() if line.startswith("Slurmctld")]
        said = "no answer" if ping.code is None else "; ".join(lines) or ping.last_line
        if any(line.endswith(" UP") for line in lines):  # a backup's is enough
            yield from controller(subject, said)
        elif needed:
            todo = "scontrol ping   # is slurmctld running, and SLURM_CONF the right file?"
            yield problem("SLURM controller", said, todo)
        else:
            yield skipped("SLURM", f"no plan asks for it, and its controller does not answer: {said}")


def controller(subject: Subject, ping: str) -> Iterator[Finding]:
    """Ask the controller for its version, its configuration and its partitions."""
    version = ask(subject, "scontrol", "--version").strip().removeprefix("slurm ")
    yield ok("SLURM controller", f"SLURM {version}: {ping}")
    config = parse_config(ask(subject, "scontrol", "show", "config"))
    yield from config_findings(config)
    partitions = [parse_record(line) for line in ask(subject, "scontrol", "show", "partition", "-o").splitlines()]
    named = {record["PartitionName"]: record for record in partitions if "PartitionName" in record}
    yield from partition_findings(subject, named)
    yield from association_findings(subject)
    yield sacct_finding(subject, config)


def jobs_of(subject: Subject) -> list[LaunchSection]:
    """Return [launch] as it holds for each job; its common part where the jobs cannot be made out."""
    if subject.plan is None:
        return []
    return [spec.launch for spec in subject.specs] or [subject.launch]


def ask(subject: Subject, *command: str) -> str:
    """Return what a command prints; nothing where it fails."""
    output = subject.programs.run(command, timeout=ANSWER_SECONDS)
    return output.stdout if output.code == 0 else ""


def parse_config(text: str) -> Record:
    """Return the fields of ``scontrol show config``, one a line."""
    pairs = [line.partition("=") for line in text.splitlines() if "=" in line]
    return {key.strip(): value.strip() for key, _, value in pairs}


def parse_record(line: str) -> Record:
    """Return the fields of a line of ``scontrol show ... -o``."""
    return {key: value for key, _, value in (word.partition("=") for word in line.split()) if value}


def config_findings(config: Record) -> Iterator[Finding]:
    """Report what the cluster does with jobs that end early, and with those that have ended."""
    if config.get("JobRequeue") == "0":
        yield note("requeue", "JobRequeue=0: jobs are requeued only when they ask for it, as pathswitch's do")
    else:
        yield ok("requeue", f"JobRequeue={config.get('JobRequeue', 'unknown')}")
    user_signal = "preempt_send_user_signal" in config.get("SlurmctldParameters", "")
    warning = "the job's own signal" if user_signal else "SIGTERM alone"
    grace = f"KillWait={config.get('KillWait', 'unknown')}"
    yield ok("preemption", f"PreemptMode={config.get('PreemptMode', 'unknown')}, {grace}; ranks get {warning}")
    age = re.match(r"\d+", config.get("MinJobAge", ""))
    found = f"MinJobAge={config.get('MinJobAge', 'unknown')}"
    if age is not None and int(age[0]) < SHORT_JOB_AGE_SECONDS:
        yield note("finished jobs", f"{found}: they are forgotten soon; their own files tell how they ended")
    else:
        yield ok("finished jobs", found)


def partition_findings(subject: Subject, partitions: dict[str, Record]) -> Iterator[Finding]:
    """Report each partition that a job of the plan would go to."""
    default = next((name for name, record in partitions.items() if record.get("Default") == "YES"), None)
    asked: dict[str, list[LaunchSection]] = {} if jobs_of(subject) else {name: [] for name in partitions}
    for launch in jobs_of(subject):
        for part in (launch.partition or default or "").split(","):
            asked.setdefault(part, []).append(launch)
    for name, jobs in asked.items():
        allowed = f"partition = one of {choices(partitions, name)}, in [launch]"
        if not name:
            yield problem("partition", "the plan names none, and the cluster has no default", allowed)
        elif name not in partitions:
            yield problem("partition", f"{name!r} does not exist", allowed)
        else:
            yield partition_finding(subject, name, partitions[name], jobs)


def partition_finding(subject: Subject, name: str, record: Record, jobs: list[LaunchSection]) -> Finding:
    """Report what a partition is, or the first of its limits that a job would break."""
    label = f"partition {name}"
    found = f"{record.get('State')}, {record.get('TotalNodes')} nodes, MaxTime={record.get('MaxTime')}, "
    found += f"PreemptMode={record.get('PreemptMode')}, GraceTime={record.get('GraceTime')}"
    if record.get("State") != "UP":
        return problem(label, found, f"another partition, or: scontrol update PartitionName={name} State=UP")
    gpus = gpus_of_nodes(subject, name)
    for job in jobs:
        for broken, todo in broken_limits(job, record, gpus):
            return problem(label, f"{found}; {broken}", f"{todo}, in [launch]")
    return ok(label, f"{found}, {max(gpus)} GPUs a node" if gpus else found)


def broken_limits(job: LaunchSection, record: Record, gpus: list[int]) -> Iterator[tuple[str, str]]:
    """Return what a job asks for beyond a partition's limits, each with what to ask for instead."""
    limit = limit_seconds(record.get("MaxTime", "UNLIMITED"))
    if job.time is not None and limit is not None and time_seconds(job.time) > limit:
        yield f"time = {job.time!r} is more", f'time = "{as_plans_write(limit)}": a job goes on in its next one'
    bounds = [int(value) for key in ("TotalNodes", "MaxNodes") if (value := record.get(key, "")).isdecimal()]
    if bounds and (job.nodes or 1) > min(bounds):
        yield f"nodes = {job.nodes} is more than {min(bounds)}", f"nodes = {min(bounds)}, or fewer"
    for key, given in (("account", job.account), ("qos", job.qos)):
        allowed = record.get(f"Allow{_PLURALS[key]}", "ALL").split(",")
        denied = record.get(f"Deny{_PLURALS[key]}", "").split(",")
        if given is not None and (given in denied or (given not in allowed and allowed != ["ALL"])):
            yield f"{key} = {given!r} may not use it", f"another {key} (it is for {', '.join(allowed)})"
    wanted, most = job.gpus_per_node or 1, max(gpus, default=0)
    if job.gres is None and wanted > most:
        todo = f"gpus_per_node = {most}, or fewer" if most else 'gres = "none", for ranks on CPUs'
        yield f"gpus_per_node = {wanted}, and no node has more than {most}", todo


def gpus_of_nodes(subject: Subject, partition: str) -> list[int]:
    """Return how many GPUs the nodes of a partition have, each number once."""
    listed = ask(subject, "sinfo", "-h", "-p", partition, "-o", "%G")
    return sorted({sum(map(int, _GPUS.findall(line))) for line in listed.splitlines() if _GPUS.search(line)})


def limit_seconds(text: str) -> int | None:
    """Return a limit that SLURM prints as ``[D-]HH:MM:SS`` in seconds, None where there is none."""
    if not re.match(r"\d", text):
        return None
    days, _, rest = text.rpartition("-")
    hours, minutes, seconds = ([0, 0] + [int(part) for part in rest.split(":")])[-3:]
    return (int(days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds


def as_plans_write(seconds: int) -> str:
    """Return a time limit as [launch] time is written."""
    days, rest = divmod(seconds, 86400)
    text = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{text}" if days else text


def association_findings(subject: Subject) -> Iterator[Finding]:
    """Report whether this user may use the plan's accounts and QOS, where the cluster knows."""
    jobs = jobs_of(subject)
    wanted = {"account": {job.account for job in jobs} - {None}, "qos": {job.qos for job in jobs} - {None}}
    if not any(wanted.values()):
        return
    command = ["sacctmgr", "-n", "-P", "show", "assoc", f"user={getpass.getuser()}", "format=account,qos"]
    lines = ask(subject, *command).splitlines() if subject.which("sacctmgr") else []
    if not lines:
        yield note("account and QOS", "cannot be checked: no accounting database answers", "sbatch refuses wrong ones")
        return
    rows = [line.split("|") for line in lines]
    known = {"account": {row[0] for row in rows}, "qos": {qos for row in rows for qos in row[1].split(",") if qos}}
    for key, names in wanted.items():
        for name in sorted(str(name) for name in names):
            if name in known[key]:
                yield ok(key, name)
            else:
                yield problem(key, f"{name!r} is not yours", f"{key} = one of: {choices(sorted(known[key]), name)}")


def sacct_finding(subject: Subject, config: Record) -> Finding:
    """Report whether there is accounting; pathswitch needs none."""
    storage = config.get("AccountingStorageType", "unknown")
    if subject.which("sacct") is None or storage.endswith("none"):
        return note("accounting", f"{storage}: no sacct; pathswitch keeps its own records and needs none")
    return ok("accounting", storage)
