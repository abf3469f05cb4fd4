"""The files of a job, as text: what a reader can check is what runs. Nothing is executed here."""

from __future__ import annotations

import json
import re
import shlex
import sys
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathswitch.errors import ConfigError
from pathswitch.launch.spec import JobSpec, comment_prefix
from pathswitch.run_folder import PLAN_FILE

_PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")
SCHEDULER = "PathSwitchLR"


def job_comment(spec: JobSpec) -> str:
    """Return what tells the job from all others in SLURM."""
    return comment_prefix(spec.run, spec.paradigm) + spec.path


def job_name(spec: JobSpec) -> str:
    """Return the job's name in SLURM: the run folder's and the path's."""
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '-', Path(spec.run).name).lstrip('-')}-{spec.path}"


def sbatch_script(spec: JobSpec) -> str:
    """Return the batch script of a job: options of sbatch, the environment, and the agent in the script's place.

    Raises:
        ConfigError: a name cannot stand in an option of sbatch.
    """
    launch = spec.launch
    tasks = spec.gpus_per_node if launch.launcher in (None, "srun") else 1
    options = {
        "job-name": job_name(spec),
        "comment": job_comment(spec),
        "nodes": str(spec.nodes),
        "ntasks-per-node": str(tasks),
        **_gpus(spec),
        "cpus-per-task": None if launch.cpus_per_task is None else str(launch.cpus_per_task),
        "time": launch.time,
        "partition": launch.partition,
        "account": launch.account,
        "qos": launch.qos,
        "signal": f"B:{launch.signal.removeprefix('SIG')}@{launch.signal_seconds}",
        "open-mode": "append",
        "output": _output_pattern(str(spec.files.log)),
        "chdir": spec.working_folder,
    }
    lines = [_sbatch_line(f"--{name}", value) for name, value in options.items() if value is not None]
    lines += ["#SBATCH --requeue"]
    for option in launch.sbatch:
        name, equals, value = option.partition("=")
        lines.append(_sbatch_line(name, value) if equals else f"#SBATCH {name}")
    # -P: nothing in the plan's folder takes the place of a module of ours, or of Python's.
    agent = [sys.executable, "-P", "-u", "-m", "pathswitch.launch.agent", str(spec.files.job)]
    body = [
        *(f"export {name}={shlex.quote(value)}" for name, value in launch.env.items()),
        *(f"module load {shlex.quote(module)}" for module in launch.modules),
        *launch.setup,
        f"exec {shlex.join(agent)}",
    ]
    steps = f"steps {spec.start_step} to {spec.end_step}"
    head = ["#!/bin/bash", f"# Path {spec.path} ({spec.paradigm}), {steps}; `pathswitch submit` writes this file anew."]
    return "\n".join([*head, *lines, "set -e", *body]) + "\n"


def _gpus(spec: JobSpec) -> dict[str, str | None]:
    if spec.launch.gres is None:
        return {"gpus-per-node": str(spec.gpus_per_node)}
    return {"gres": None if spec.launch.gres == "none" else spec.launch.gres}


def _output_pattern(log: str) -> str:
    """Return what SLURM makes this file's name of: with a backslash in it, it replaces nothing and drops each first."""
    return log.replace("\\", "\\\\") if "\\" in log else log.replace("%", "%%")


def _sbatch_line(option: str, value: str) -> str:
    """Quote a value for sbatch's own reading of ``#SBATCH`` lines: double quotes, in which a backslash escapes.

    Raises:
        ConfigError: it holds a control character, which would end the line.
    """
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in value):
        allowed = "text in one line of UTF-8, without control characters"
        raise ConfigError(f"{option} of sbatch", given=value, allowed=allowed)
    if not _PLAIN.fullmatch(value):
        value = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"#SBATCH {option}={value}"


def job_ds_config(spec: JobSpec, base: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a user's ds_config as one path's: with its scheduler, its run, and where it saves when it has to end.

    Args:
        spec: the job.
        base: the user's ds_config.
        where: the file that it is from, for errors.

    Raises:
        ConfigError: it has another scheduler, or says itself what follows from the job.
    """
    scheduler = _object(base, "scheduler", where)
    params = _object(scheduler, "params", f"{where}: scheduler")
    if scheduler and scheduler.get("type") != SCHEDULER:
        raise ConfigError(f"{where}: scheduler", given=dict(scheduler), allowed=f"none, or one of type {SCHEDULER!r}")
    if other := sorted(params.keys() - {"plan", "path", "paradigm", "initial_step"}):
        allowed = "plan, path, paradigm and initial_step: the plan file holds the rest"
        raise ConfigError(f"{where}: scheduler params", given=", ".join(other), allowed=allowed)
    plan = {"plan": str(Path(spec.run, PLAN_FILE)), "path": spec.path, "paradigm": spec.paradigm}
    section = dict(_object(base, "pathswitch", where))
    job = {"save_dir": str(spec.files.checkpoints), **_object(section, "job", f"{where}: pathswitch")}
    for key, given, own in (
        ("run", section.get("run"), spec.run),
        ("job.save_dir", job["save_dir"], str(spec.files.checkpoints)),
    ):
        if given not in (None, own):
            allowed = f"nothing, or {own}: the job's own folder, which branches are forked from"
            raise ConfigError(f"{where}: pathswitch.{key}", given=given, allowed=allowed)
    job.setdefault("signals", list(dict.fromkeys(["SIGTERM", spec.launch.signal])))
    section |= {"run": spec.run, "job": job}
    return {**base, "scheduler": {"type": SCHEDULER, "params": {**params, **plan}}, "pathswitch": section}


def _object(content: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = content.get(key, {})
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key}", given=value, allowed="an object in JSON")
    return value


def job_files(spec: JobSpec, ds_config: Mapping[str, Any] | None = None) -> dict[Path, str]:
    """Return the text of every file of a job by its place; ``ds_config`` is the user's, where there is one.

    Raises:
        ConfigError: something in the plan cannot be written down so that it arrives as it is.
    """
    files, texts = spec.files, {}
    texts[files.job] = spec.model_dump_json(indent=1, exclude_defaults=True) + "\n"
    if spec.launch.kind == "slurm":
        texts[files.batch_script] = sbatch_script(spec)
    if ds_config is not None:
        texts[files.ds_config] = json.dumps(job_ds_config(spec, ds_config, str(spec.launch.ds_config)), indent=2) + "\n"
    return texts
