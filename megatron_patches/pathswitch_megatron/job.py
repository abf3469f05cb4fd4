"""What the environment asks this job to train: one path of one plan."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pathswitch.checkpoint import CheckpointSettings
from pathswitch.config import build_plan, load_plan_file
from pathswitch.errors import ConfigError
from pathswitch.integrations.path_state import forks_from
from pathswitch.run_folder import PLAN_FILE
from pathswitch.versions import MAIN, Plan
from pathswitch.versions import Path as TrainingPath
from pathswitch_megatron import PLAN_VARIABLE

PATH_VARIABLE = "PATHSWITCH_PATH"


@dataclass(frozen=True)
class Job:
    """One path of a plan, and how its checkpoints are treated."""

    plan: Plan
    path: TrainingPath
    run: Path
    """The folder of the plan file, whose ledger records this job's checkpoints."""
    settings: CheckpointSettings
    key: bytes | None
    global_batch_size: int | None
    """Samples of a step, where the plan says so."""
    optimizer: str = "megatron"
    """Whose Adam trains: ``megatron`` or ``pathswitch``."""

    @property
    def forks(self) -> dict[str, int]:
        """The steps where branches leave this path, by the branches' names."""
        return forks_from(self.plan, self.path)


def job_from_environment() -> Job:
    """Return the job that PATHSWITCH_PLAN and PATHSWITCH_PATH describe.

    Raises:
        ConfigError: a variable, the plan file or a value in it is not allowed.
    """
    given = os.environ.get(PLAN_VARIABLE)
    if not given:
        allowed = "a plan file, or the run folder that holds one as plan.toml"
        raise ConfigError(f"environment variable {PLAN_VARIABLE}", given=given, allowed=allowed)
    plan_path = Path(given).absolute()
    if plan_path.is_dir():
        plan_path /= PLAN_FILE
    plan_file = load_plan_file(plan_path)
    plan = build_plan(plan_file, given)
    try:
        path = plan.path(os.environ.get(PATH_VARIABLE) or MAIN)
    except ConfigError as error:
        where = f"environment variable {PATH_VARIABLE}"
        raise ConfigError(where, given=error.given, allowed=error.allowed) from None
    section = plan_file.megatron
    key = section.checkpoint.signing_key(f"{given}: [megatron] checkpoint ")
    return Job(plan, path, plan_path.parent, section.checkpoint, key, section.global_batch_size, section.optimizer)
