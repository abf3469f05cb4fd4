"""The section ``"pathswitch"`` of a ds_config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pathswitch.checkpoint.manifest import read_key
from pathswitch.checkpoint.verify import VerifyMode
from pathswitch.errors import ConfigError, choices


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class CheckpointSettings(_Section):
    """How checkpoints are verified, signed and converted."""

    verify: VerifyMode = "full"
    """What is compared before anything is loaded: digests, sizes alone, or nothing."""
    on_damage: Literal["refuse", "previous"] = "refuse"
    """What a resume does if the newest checkpoint is damaged: stop, or go back to the newest that is whole."""
    signing_key_file: str | None = None
    """Manifests are signed with the key in this file, and others are refused."""
    convert_folder: str | None = None
    """Where a checkpoint is converted for another number of ranks; beside the checkpoint if not given."""

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


class PathSwitchSection(_Section):
    """Everything that a job tells pathswitch beside its scheduler."""

    run: str | None = None
    """The run folder, whose ledger records this job's checkpoints; without it none are recorded."""
    seq_len: Annotated[int, Field(ge=1, description="a whole number >= 1")] | None = None
    """Tokens of a sample, for counting the tokens seen."""
    checkpoint: CheckpointSettings = CheckpointSettings()


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
        section = CheckpointSettings if keys[0] == "checkpoint" else PathSwitchSection
        raise ConfigError(where, given="unknown key", allowed=choices(section.model_fields, keys[-1]))
    raise ConfigError(where, given=first["input"], allowed=first["msg"].removeprefix("Input should be "))
