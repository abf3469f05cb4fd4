"""Records of imagined runs, short to write: a manifest is named by its path and step."""

from __future__ import annotations

from pathswitch.versions.lineage import FolderState
from pathswitch.versions.records import BranchRecord, CheckpointRecord, EvaluationRecord, Record, ReleaseRecord


def manifest(path: str, step: int, take: str = "") -> str:
    return f"{take}{path}{step}".ljust(64, "0")


def folder(path: str, step: int, paradigm: str = "path_switching") -> str:
    return f"{paradigm}/{path}/checkpoints/global_step{step}"


def checkpoint(
    path: str, step: int, parent: str | None, *, paradigm: str = "path_switching", take: str = ""
) -> CheckpointRecord:
    return CheckpointRecord(
        manifest=manifest(path, step, take),
        folder=folder(path, step, paradigm),
        paradigm=paradigm,
        path=path,
        step=step,
        samples_seen=step * 16,
        tokens_seen=step * 2048,
        next_lr=0.001 if path == "main" else 2.5e-5,
        parent=parent,
    )


def chain(path: str, steps: list[int], parent: str | None = None, paradigm: str = "path_switching") -> list[Record]:
    """The checkpoints of one job, each the parent of the next."""
    records: list[Record] = []
    for step in steps:
        records.append(checkpoint(path, step, parent, paradigm=paradigm))
        parent = manifest(path, step)
    return records


def branch(path: str, step: int, parent_path: str = "main", take: str = "") -> BranchRecord:
    return BranchRecord(
        manifest=manifest(path, step, take),
        folder=folder(path, step),
        paradigm="path_switching",
        path=path,
        parent_path=parent_path,
        fork_step=step,
        parent=manifest(parent_path, step),
        policy={"decay_steps": 120},
    )


def release(path: str, step: int, paradigm: str = "path_switching") -> ReleaseRecord:
    return ReleaseRecord(f"{paradigm}/{path}/release", paradigm, path, step, manifest(path, step), "f" * 64)


def evaluation(
    path: str, step: int, perplexity: dict[str, float], paradigm: str = "path_switching"
) -> EvaluationRecord:
    return EvaluationRecord(paradigm, path, step, manifest(path, step), perplexity)


def path_switching() -> list[Record]:
    """A main path, v1 forked into a folder of its own, v2 in place, v3 from the main path's newest checkpoint."""
    return [
        *chain("main", [80, 280, 480]),
        branch("v1", 80),
        *chain("v1", [140, 200], manifest("v1", 80)),
        release("v1", 200),
        evaluation("v1", 200, {"v1": 64.5, "v2": 1234.5}),
        *chain("v2", [400], manifest("main", 280)),
        branch("v3", 480),
    ]


def all_committed(folder: str, manifest: str) -> FolderState:
    return "committed"


def none_running(paradigm: str, path: str) -> bool:
    return False
