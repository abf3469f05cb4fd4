"""The section ``"pathswitch"`` of a ds_config."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pathswitch.checkpoint.manifest import read_key
from pathswitch.checkpoint.verify import VerifyMode
from pathswitch.errors import ConfigError, choices

# No handler gets these, or they tell of a fault of the process itself, or of the end of a child.
NOT_TO_STOP_WITH = {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGCHLD"}
PATH_FIELD = "{path}"


def _checked_signal(name: str) -> str:
    if name not in signal.Signals.__members__ or name in NOT_TO_STOP_WITH:
        raise ValueError("a signal that a job can be asked to stop with, as SIGTERM, SIGUSR1, SIGUSR2")
    return name


def _checked_folder(name: str) -> str:
    if not name or "{" in name.replace(PATH_FIELD, ""):
        raise ValueError(f"the name of a folder, in which {PATH_FIELD} stands for the name of the path")
    return name


def _as_tuple(value: object) -> object:
    if not isinstance(value, list | tuple):
        raise ValueError("a list of names of signals")
    return tuple(value)  # JSON and TOML have no tuples


SignalName = Annotated[str, AfterValidator(_checked_signal)]
Folder = Annotated[str, AfterValidator(_checked_folder)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CheckpointSettings(_Section):
    """How checkpoints are verified, signed, converted and compared."""

    verify: VerifyMode = "full"
    """What is compared before anything is loaded: digests, sizes alone, or nothing."""
    on_damage: Literal["refuse", "previous"] = "refuse"
    """What a resume does if the newest checkpoint is damaged: stop, or go back to the newest that is whole."""
    signing_key_file: str | None = None
    """Manifests are signed with the key in this file, and others are refused."""
    convert_folder: str | None = None
    """Where a checkpoint is converted for another number of ranks; beside the checkpoint if not given."""
    state_digest: bool = True
    """Whether saves record the digest of the optimizer state, and loads compare the loaded state with it."""

    def signing_key(self, where: str) -> bytes | None:
        """Return the key, None if there is none; ``where`` these settings stand is for the error.

        Raises:
            ConfigError: the key cannot be read, or would vouch for digests that nobody compares.
        """
        key = read_key(self.signing_key_file)
        if key is not None and self.verify != "full":
            allowed = "full: a signature vouches for digests, which the other modes do not compare"
            raise ConfigError(f"{where}verify", given=self.verify, allowed=allowed)
        return key


class JobSettings(_Section):
    """A job that saves by itself: where branches fork, at its path's end, and when it is asked to stop."""

    save_dir: Folder
    """Where it saves; ``{path}`` is replaced by the path's name."""
    signals: Annotated[tuple[SignalName, ...], BeforeValidator(_as_tuple)] = ("SIGTERM", "SIGUSR2")
    """Each of them asks the job to save and end, whichever rank gets it."""
    exit_at_end: bool = True
    """Whether the job ends when it has saved behind its path's last step."""

    def folder(self, path: str) -> str:
        """Return where a path saves."""
        return self.save_dir.replace(PATH_FIELD, path)


class PathSwitchSection(_Section):
    """Everything that a job tells pathswitch beside its scheduler."""

    run: str | None = None
    """The run folder, whose ledger records this job's checkpoints; without it none are recorded."""
    seq_len: Annotated[int, Field(ge=1, description="a whole number >= 1")] | None = None
    """Tokens of a sample, for counting the tokens seen."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    job: JobSettings | None = None
    """Without it the script alone saves and ends the job, and signals do what they do."""


_SECTIONS: dict[str, type[_Section]] = {"checkpoint": CheckpointSettings, "job": JobSettings}


def read_section(ds_config: Mapping[str, object]) -> PathSwitchSection:
    """Return the checked section of a ds_config.

    Raises:
        ConfigError: a key is unknown or a value not allowed.
    """
    try:
        return PathSwitchSection.model_validate(ds_config.get("pathswitch", {}))
    except ValidationError as error:
        first = error.errors()[0]
    keys = [str(key) for key in first["loc"]]
    where = ".".join(["ds_config pathswitch", *keys])
    if first["type"] == "extra_forbidden":
        section = _SECTIONS[keys[0]] if len(keys) > 1 else PathSwitchSection
        raise ConfigError(where, given="unknown key", allowed=choices(section.model_fields, keys[-1]))
    if first["type"] == "missing":
        raise ConfigError(where, given="nothing", allowed="this key is required")
    allowed = first["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    raise ConfigError(where, given=first["input"], allowed=allowed)
