"""Loading for a resume, a fork or a release: all ranks verify together, before anything is unpickled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pathswitch.checkpoint import (
    MANIFEST_FILE,
    Finding,
    Manifest,
    check_files,
    check_names,
    checkpoint_folders,
    committed_checkpoints,
    describe_findings,
    read_manifest,
    recover_replaced,
)
from pathswitch.errors import CheckpointError
from pathswitch.integrations.checkpoints import EngineCheckpoints, parallelism
from pathswitch.integrations.collective import gather, on_first_rank
from pathswitch.integrations.hyperparameters import apply_policy, clipping, differing_settings, group_settings
from pathswitch.integrations.random_state import load_random_state, random_state_name
from pathswitch.integrations.universal import converted, needs_conversion, repair_optimizer
from pathswitch.versions import Path as TrainingPath

logger = logging.getLogger("pathswitch")


def load(
    checkpoints: EngineCheckpoints,
    original: Callable[..., Any],
    load_dir: str,
    tag: str | None = None,
    **options: Any,
) -> Any:
    """Load the checkpoint that ``tag`` or ``latest`` names, once every rank has found it whole.

    Raises:
        CheckpointError: on every rank: it is damaged, was never committed, or is missing beside others.
        ScheduleError: it is not this path's, nor its parent's at the fork step.
    """
    engine = checkpoints.engine
    if engine.load_universal_checkpoint():  # a conversion of the user's own
        return original(engine, load_dir, tag, **options)
    tags = on_first_rank(lambda: _candidates(checkpoints, Path(load_dir), tag))
    if not tags:
        return original(engine, load_dir, tag, **options)
    source, manifest = _newest_whole(checkpoints, Path(load_dir), tags)
    if manifest is None:
        return original(engine, load_dir, source.relative_to(load_dir).as_posix(), **options)
    configured = group_settings(engine.lr_scheduler.optimizer)
    if needs_conversion(manifest, parallelism(engine)):
        result = _load_converted(checkpoints, original, source, configured, options)
        result = (str(source), result[1]) if result[0] is not None else result
    else:
        result = original(engine, load_dir, source.relative_to(load_dir).as_posix(), **options)
        if not options.get("load_module_only", False):
            _restore_random_state(source, manifest)
    checkpoints.parent = manifest.digest
    if options.get("load_optimizer_states", True) and not options.get("load_module_only", False):
        _continue(checkpoints, manifest, configured)
    return result


def _candidates(checkpoints: EngineCheckpoints, load_dir: Path, tag: str | None) -> list[str]:
    """Return the tags to try, the wanted one first; none to train from the beginning."""
    if tag is not None:
        recover_replaced(load_dir / tag)
        return [str(tag)]
    latest = load_dir / "latest"
    named = latest.read_text(errors="replace").strip() if latest.is_file() else None
    if named and "\0" not in named:
        recover_replaced(load_dir / named)
    path = checkpoints.engine.lr_scheduler.path
    committed = committed_checkpoints(load_dir, checkpoints.key)
    others = [folder.name for folder, manifest in committed if _belongs(manifest, path)]
    go_back = checkpoints.settings.on_damage == "previous"
    if named and "\0" not in named and (load_dir / named).is_dir():
        return [named, *(other for other in others if go_back and other != named)]
    if named is None and len(others) == 1:  # the first save here was killed just before it named itself
        logger.warning("pathswitch: %s is missing; going on from the only checkpoint there, %s", latest, others[0])
        return others
    state = "is missing" if named is None else f"names {named[:80]!r}" if named else "is empty"
    found = f"{latest} {state}"
    if others and go_back:
        logger.warning("pathswitch: %s; going back to the newest committed checkpoint, %s", found, others[0])
        return others
    _require_nothing_to_load(load_dir, found, named, path)
    return []


def _belongs(manifest: Manifest, path: TrainingPath) -> bool:
    """Return whether a path may go on from a checkpoint: its own, or its parent's at the fork."""
    at_fork = manifest.path == path.parent and manifest.step == path.start_step
    return manifest.paradigm == path.paradigm and (manifest.path == path.name or at_fork)


def _require_nothing_to_load(load_dir: Path, found: str, named: str | None, path: TrainingPath) -> None:
    """Refuse what DeepSpeed would turn into a silent start from scratch.

    Raises:
        CheckpointError: there are checkpoints, or there should be one, or there is a ``latest`` without any.
    """
    tags = sorted(folder.relative_to(load_dir).as_posix() for folder in checkpoint_folders(load_dir))
    if tags:
        raise CheckpointError(
            f"{found}, but the folder holds checkpoints ({', '.join(tags)}): DeepSpeed would silently train from "
            'scratch, or not start. Load one by its tag, write its name into this file, or set on_damage = "previous"'
        )
    if path.start_step > 0:
        raise CheckpointError(
            f"{found} and the folder holds no checkpoint: path {path.name!r} starts from a checkpoint of "
            f"{path.parent!r} at step {path.start_step}"
        )
    if named is not None:
        raise CheckpointError(
            f"{found} and the folder holds no checkpoint: remove the file to train from the beginning"
        )


def _newest_whole(checkpoints: EngineCheckpoints, load_dir: Path, tags: list[str]) -> tuple[Path, Manifest | None]:
    """Return the first of the candidates that is whole; say which were not."""
    for tag in tags:
        try:
            manifest = _verified(checkpoints, load_dir / tag)
        except CheckpointError as error:
            if tag == tags[-1]:
                raise CheckpointError(f"{error}{on_first_rank(lambda: _hint(checkpoints, load_dir, tags))}") from None
            if dist.get_rank() == 0:
                logger.warning("pathswitch: skipped %s", error)
        else:
            return load_dir / tag, manifest
    raise AssertionError("no candidate")


def _hint(checkpoints: EngineCheckpoints, load_dir: Path, tried: list[str]) -> str:
    path = checkpoints.engine.lr_scheduler.path
    committed = committed_checkpoints(load_dir, checkpoints.key)
    others = [folder.name for folder, manifest in committed if folder.name not in tried and _belongs(manifest, path)]
    return f'. The newest other one is {others[0]}; on_damage = "previous" goes back to it' if others else ""


def _verified(checkpoints: EngineCheckpoints, folder: Path) -> Manifest | None:
    """Verify a checkpoint, each rank its own shards; None where nothing is to be verified and nothing is known.

    Raises:
        CheckpointError: on every rank, naming what any of them found.
    """
    mode = checkpoints.settings.verify
    if mode == "off" and not (folder / MANIFEST_FILE).is_file():
        return None
    manifest = on_first_rank(lambda: read_manifest(folder, checkpoints.key))
    if mode == "off":
        return manifest
    rank, ranks = dist.get_rank(), dist.get_world_size()
    same_ranks = manifest.parallelism.world_size == ranks
    own = {
        name: entry
        for index, (name, entry) in enumerate(manifest.files.items())
        if (entry.rank if same_ranks else index % ranks) == rank
    }
    findings: list[Finding] = check_files(folder, own, mode)
    if rank == 0:
        findings += check_names(folder, manifest)
    together = [finding for part in gather(findings) for finding in part]
    if together:
        raise CheckpointError(describe_findings(folder, together))
    return manifest


def _load_converted(
    checkpoints: EngineCheckpoints,
    original: Callable[..., Any],
    source: Path,
    configured: list[dict[str, Any]],
    options: dict[str, Any],
) -> Any:
    engine, settings = checkpoints.engine, checkpoints.settings
    path = engine.lr_scheduler.path
    root = Path(settings.convert_folder) if settings.convert_folder else source.parent
    with converted(source, root / f".{source.name}.universal-{path.paradigm}-{path.name}") as (folder, tag):
        engine._config.load_universal_checkpoint = True
        try:
            result = original(engine, str(folder), tag, **options)
        finally:
            engine._config.load_universal_checkpoint = False
    repair_optimizer(engine.lr_scheduler.optimizer, configured, engine.zero_optimization_stage())
    return result


def _restore_random_state(source: Path, manifest: Manifest) -> None:
    name = random_state_name(dist.get_rank())
    if name in manifest.files:
        load_random_state(source / name)


def _continue(checkpoints: EngineCheckpoints, manifest: Manifest, configured: list[dict[str, Any]]) -> None:
    """Apply the fork's policy, and say where the checkpoint's settings stand against the configuration's."""
    optimizer = checkpoints.engine.lr_scheduler.optimizer
    if dist.get_rank() == 0 and not manifest.policy.changes():
        differing = differing_settings(configured, group_settings(optimizer))
        if (clip := checkpoints.engine.gradient_clipping()) != clipping(checkpoints.engine):
            differing.append(f"gradient_clipping: ds_config {clip}, checkpoint {clipping(checkpoints.engine)}")
        for line in differing:
            logger.warning("pathswitch: %s: the checkpoint's holds; `pathswitch fork` can change it for a branch", line)
    checkpoints.policy = manifest.policy
    apply_policy(checkpoints.engine, optimizer, manifest.policy, at_fork=manifest.forked_from is not None)
