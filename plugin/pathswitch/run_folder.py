"""The run folder: where a plan's paradigms and paths keep their files, and what must not change between two runs.

OUT/plan.toml  OUT/run.json  OUT/data/  OUT/ledger/
OUT/<paradigm>/<path>/{checkpoints/, release/, metrics.jsonl, log.txt, evaluation.json, done.json}
                      {job.json, job.sbatch, ds_config.json, stop, progress.json} of a job that `submit` has started
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import tomli_w

from pathswitch.atomic import file_stamp, write_text_atomic
from pathswitch.config import PlanFile, build_plan, load_plan_file
from pathswitch.errors import RunError
from pathswitch.versions import PARADIGMS, Plan, Version
from pathswitch.versions import Path as TrainingPath
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.records import PlanRecord

FORMAT = 1
PLAN_FILE, RUN_FILE = "plan.toml", "run.json"
TAG_PREFIX = "global_step"
# What may differ from one run of the same folder to the next: the same updates are trained, up to the order in which
# another number of ranks adds gradients up.
FREE_SETTINGS = {("train", "save_every_steps"), ("train", "ranks"), ("train", "micro_batch_size")}
FREE_SETTINGS |= {("deepspeed", "pathswitch")}


@dataclass(frozen=True)
class PathFolder:
    """The files of one path."""

    folder: Path

    @property
    def checkpoints(self) -> Path:
        """DeepSpeed's checkpoint folder: ``latest`` and ``global_step<N>/``."""
        return self.folder / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One JSON line per update."""
        return self.folder / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """Perplexity of the released weights on every version's test text."""
        return self.folder / "evaluation.json"

    @property
    def release(self) -> Path:
        """The released weights in the Hugging Face layout."""
        return self.folder / "release"

    @property
    def log(self) -> Path:
        """Output of the launcher and of all ranks."""
        return self.folder / "log.txt"

    @property
    def job(self) -> Path:
        """What the job's agent has to know."""
        return self.folder / "job.json"

    @property
    def batch_script(self) -> Path:
        """What SLURM runs."""
        return self.folder / "job.sbatch"

    @property
    def ds_config(self) -> Path:
        """The user's ds_config, made this path's."""
        return self.folder / "ds_config.json"

    @property
    def stop(self) -> Path:
        """While this file is there, the job is asked to save and end; it says why."""
        return self.folder / "stop"

    @property
    def progress(self) -> Path:
        """How far a training script has come, in JSON, by pathswitch in its first rank."""
        return self.folder / "progress.json"

    @property
    def completion(self) -> Path:
        """The completion record: the only proof that the path has been trained to its end."""
        return self.folder / "done.json"

    def step(self) -> int | None:
        """Return the step of the newest checkpoint, None where there is none: a folder of its name is a whole one."""
        folders = self.checkpoints.glob(f"{TAG_PREFIX}*") if self.checkpoints.is_dir() else ()
        steps = [folder.name.removeprefix(TAG_PREFIX) for folder in folders]
        return max((int(step) for step in steps if step.isdecimal()), default=None)

    def has_checkpoints(self) -> bool:
        """Return whether this path has saved anything to go on from."""
        return self.step() is not None or (self.checkpoints / "latest").exists()

    def completed_step(self) -> int:
        """Return the step up to which the completion record vouches, 0 where there is none."""
        return int(json.loads(self.completion.read_text())["end_step"]) if self.completion.is_file() else 0


def tag(step: int) -> str:
    """Return the DeepSpeed tag of the checkpoint with ``step`` updates behind it."""
    return f"{TAG_PREFIX}{step}"


@dataclass(frozen=True)
class RunFolder:
    """One folder of runs of one plan with one seed."""

    out: Path

    @property
    def data(self) -> Path:
        """Tokenizer and token files."""
        return self.out / "data"

    def path(self, path: TrainingPath) -> PathFolder:
        """Return the files of one path."""
        return PathFolder(self.out / path.paradigm / path.name)

    def parent(self, path: TrainingPath) -> PathFolder:
        """Return the files of the path that ``path`` starts from."""
        if path.parent is None:
            raise RunError(f"path {path.name!r} starts from scratch and has no parent")
        return PathFolder(self.out / path.paradigm / path.parent)

    def plan_file(self) -> PlanFile:
        """Return the plan that this folder was last run with."""
        return load_plan_file(self.out / PLAN_FILE)

    def plan(self) -> Plan:
        """Return the paths of that plan; a file that has not changed is not read again."""
        path = self.out / PLAN_FILE
        try:
            stamp = file_stamp(path)
        except OSError:
            return build_plan(self.plan_file())  # raises, and says what is wrong
        return _plan(path, stamp)

    def is_complete(self, path: TrainingPath) -> bool:
        """Return whether the path's completion record reaches its end."""
        return self.path(path).completed_step() >= path.end_step

    def open(self, plan_file: PlanFile) -> None:
        """Create the folder for a plan, or check that the plan continues what the folder holds, and record the plan.

        Raises:
            RunError: the folder cannot be written, or a setting or a version that was trained differs.
        """
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            old = self.plan_file() if (self.out / PLAN_FILE).is_file() else None
            if old is not None:
                self._require_continuation(old, plan_file)
            text = tomli_w.dumps(plan_file.model_dump(mode="json", exclude_unset=True))
            if old != plan_file:  # the folder's own plan file, and whatever is noted in it, stays as it is
                write_text_atomic(self.out / PLAN_FILE, text)
            run_ledger(self.out).append(PlanRecord(hashlib.sha256(text.encode()).hexdigest(), text))
            train = plan_file.train
            run: dict[str, Any] = {"seed": train.seed, "ranks": train.ranks} if train else {}
            record = {"format": FORMAT, **run, "environment": environment()}
            write_text_atomic(self.out / RUN_FILE, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            raise RunError(f"--out {self.out}: cannot be written ({error.strerror})") from None

    def _require_continuation(self, old: PlanFile, new: PlanFile) -> None:
        for section in ("model", "data", "train", "deepspeed"):
            _require_same_settings(self.out, section, _settings(old, section), _settings(new, section))
        old_plan, new_plan = build_plan(old), build_plan(new)
        _require_same_settings(self.out, "schedule", old_plan.main.fields(), new_plan.main.fields())
        self._require_same_versions(old_plan, new_plan)
        pooled = new.data is not None and new.data.split == "iid"
        if pooled and len(old.versions) != len(new.versions) and self._furthest_step() > 0:
            raise RunError(
                f"{self.out}: with split = 'iid' all versions draw from one pool of text, so none can be added or "
                f"removed after training has begun ({len(old.versions)} versions here, {len(new.versions)} in the plan)"
            )

    def _require_same_versions(self, old: Plan, new: Plan) -> None:
        """Refuse a change of a version whose steps have begun; later ones are still free."""
        for index, version in enumerate(old.begun(self._furthest_step())):
            now = _version_settings(new.versions[index]) if index < len(new.versions) else {}
            _require_same_settings(self.out, f"version {version.name}", _version_settings(version), now)

    def _furthest_step(self) -> int:
        steps = [
            PathFolder(checkpoints.parent).step() or 0
            for paradigm in PARADIGMS
            for checkpoints in (self.out / paradigm).glob("*/checkpoints")
        ]
        return max(steps, default=0)


@lru_cache(maxsize=16)
def _plan(path: Path, stamp: tuple[int, ...]) -> Plan:
    return build_plan(load_plan_file(path))


def _settings(plan_file: PlanFile, section: str) -> dict[str, Any]:
    value = getattr(plan_file, section)
    return {} if value is None else value if isinstance(value, dict) else value.model_dump()


def _version_settings(version: Version) -> dict[str, Any]:
    return {**asdict(version), "shape": version.shape.name, **asdict(version.shape)}


def _require_same_settings(out: Path, section: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    for key in [*old, *(key for key in new if key not in old)]:
        if (section, key) not in FREE_SETTINGS and old.get(key) != new.get(key):
            raise RunError(
                f"{out}: [{section}] {key}: this folder was trained with {old.get(key)!r}, the plan says "
                f"{new.get(key)!r}; give the new setting a folder of its own (--out)"
            )


def environment() -> dict[str, str | int | None]:
    """Return what a reader needs to repeat a measurement: versions, processor, cores, platform."""
    packages = {name: package_version(name) for name in ("pathswitch", "torch", "deepspeed", "sentencepiece", "numpy")}
    return {
        **packages,
        "python": platform.python_version(),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
    }


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
