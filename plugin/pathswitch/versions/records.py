"""What a ledger holds: one frozen record for each thing that happened to a run, and its canonical JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, ClassVar, get_args, get_origin, get_type_hints

FORMAT = 1


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """A plan that the run was started or continued with."""

    kind: ClassVar[str] = "plan"
    digest: str
    """SHA-256 of the text."""
    text: str
    """The plan file's TOML."""


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint that a training job has committed."""

    kind: ClassVar[str] = "checkpoint"
    manifest: str
    """Digest of the checkpoint's manifest."""
    folder: str
    """Relative to the run folder where it lies inside it, else absolute; with forward slashes."""
    paradigm: str
    path: str
    step: int
    samples_seen: int
    tokens_seen: int | None
    next_lr: float
    """The LR of the first update after this checkpoint."""
    parent: str | None
    """Manifest of the checkpoint that the job had loaded or saved before; None from scratch."""


@dataclass(frozen=True, slots=True)
class BranchRecord:
    """A branch that was forked into a checkpoint folder of its own."""

    kind: ClassVar[str] = "branch"
    manifest: str
    """Digest of the fork's manifest."""
    folder: str
    paradigm: str
    path: str
    """The branch's name."""
    parent_path: str
    fork_step: int
    parent: str
    """Manifest of the checkpoint that was forked."""
    policy: dict[str, Any]


@dataclass(frozen=True, slots=True)
class ReleaseRecord:
    """Weights that were exported from a checkpoint."""

    kind: ClassVar[str] = "release"
    folder: str
    paradigm: str
    path: str
    step: int
    checkpoint: str
    """Manifest of the checkpoint."""
    digest: str
    """Digest of the release's files."""


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """Perplexities of a checkpoint's weights."""

    kind: ClassVar[str] = "evaluation"
    paradigm: str
    path: str
    step: int
    checkpoint: str
    """Manifest of the checkpoint."""
    perplexity: dict[str, float]
    """By the name of the test set."""


@dataclass(frozen=True, slots=True)
class PrunedRecord:
    """A checkpoint that was removed on purpose."""

    kind: ClassVar[str] = "pruned"
    manifest: str
    folder: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """Something that happened to the job that trains a path."""

    kind: ClassVar[str] = "job"
    paradigm: str
    path: str
    event: str
    """One of JOB_EVENTS."""
    attempt: str
    """SLURM's job id, or a name of the agent's own; with ".N" behind it for its Nth start, from 0."""
    step: int | None
    """Updates behind the newest committed checkpoint then."""
    reason: str | None


JOB_EVENTS = (
    "submitted",
    "opened",  # the fork checkpoint is verified and forked: the branch may start
    "refused",  # the fork checkpoint cannot be used
    "started",
    "stopped",  # saved and ended because it was asked to; it goes on later
    "failed",  # ended otherwise; it is started again within its budget
    "gave up",
    "cancelled",
    "completed",
)

Record = PlanRecord | CheckpointRecord | BranchRecord | ReleaseRecord | EvaluationRecord | PrunedRecord | JobRecord
KINDS: dict[str, type[Record]] = {record.kind: record for record in get_args(Record)}


def canonical(record: Record) -> bytes:
    """Return the record as JSON in the one form that its digest is taken of: sorted keys, no spaces, ASCII."""
    content = {"format": FORMAT, "kind": record.kind, **asdict(record)}
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode("ascii")


def from_fields(kind: str, fields: dict[str, Any]) -> Record:
    """Return the record of a known kind.

    Raises:
        ValueError: a field is missing, unknown or of another type.
    """
    # By types and not by values: all records of a kind have one of a few combinations, and each is looked at once.
    _require_fields(kind, tuple(fields), tuple(map(type, fields.values())))
    return KINDS[kind](**fields)


@cache
def _require_fields(kind: str, names: tuple[str, ...], types: tuple[type, ...]) -> None:
    hints = get_type_hints(KINDS[kind])
    hints.pop("kind")
    if set(names) != hints.keys():
        raise ValueError(f"a {kind} record has the fields {', '.join(hints)}, this one {', '.join(names)}")
    for name, given in zip(names, types, strict=True):
        if given not in _json_types(hints[name]):
            raise ValueError(f"the field {name} of a {kind} record cannot be of type {given.__name__}")


def _json_types(hint: Any) -> tuple[type, ...]:
    """Return what a field may be after its way through JSON, where 0 may stand for 0.0."""
    if get_origin(hint) is dict:
        return (dict,)
    return (float, int) if hint is float else get_args(hint) or (hint,)
