"""Loading for a resume, a fork or a release: all ranks verify together, before anything is unpickled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from pathswitch.checkpoint import DEEPSPEED, Manifest
from pathswitch.errors import CheckpointError
from pathswitch.integrations.checkpoints import EngineCheckpoints, parallelism
from pathswitch.integrations.hyperparameters import apply_policy, clipping, differing_settings, group_settings
from pathswitch.integrations.random_state import load_random_state, random_state_name
from pathswitch.integrations.source import Source
from pathswitch.integrations.state_digest import AVERAGE, WEIGHTS, differences, state_digest
from pathswitch.integrations.universal import converted, needs_conversion, repair_optimizer

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
        CheckpointError: on every rank: it is damaged, was never committed, or is missing beside others, or what has
            been loaded is not what was saved.
        ScheduleError: it is not this path's, nor its parent's at the fork step.
    """
    engine = checkpoints.engine
    if engine.load_universal_checkpoint():  # a conversion of the user's own
        return original(engine, load_dir, tag, **options)
    path = engine.lr_scheduler.path
    chosen = Source(Path(load_dir), DEEPSPEED, path, checkpoints.settings, checkpoints.key).choose(tag)
    if chosen is None:
        return original(engine, load_dir, tag, **options)
    source, manifest = chosen
    if manifest is None:
        return original(engine, load_dir, source.relative_to(load_dir).as_posix(), **options)
    engine.lr_scheduler.check_manifest(manifest)
    configured = group_settings(engine.lr_scheduler.optimizer)
    convert = needs_conversion(manifest, parallelism(engine))
    if convert:
        result = _load_converted(checkpoints, original, source, configured, options)
        result = (str(source), result[1]) if result[0] is not None else result
    else:
        result = original(engine, load_dir, source.relative_to(load_dir).as_posix(), **options)
        if not options.get("load_module_only", False):
            _restore_random_state(source, manifest)
    if result[0] is not None and checkpoints.settings.state_digest and manifest.state_digest is not None:
        _require_saved_state(engine, source, manifest, options, converted=convert)
    checkpoints.parent = manifest.digest
    if options.get("load_optimizer_states", True) and not options.get("load_module_only", False):
        _continue(checkpoints, manifest, configured)
    return result


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


def _require_saved_state(
    engine: Any, source: Path, manifest: Manifest, options: dict[str, Any], *, converted: bool
) -> None:
    """Compare the loaded optimizer state with the one that was saved, as far as it should be the same.

    Raises:
        CheckpointError: on every rank: bits of it are others.
    """
    if not options.get("load_optimizer_states", True) or options.get("load_module_only", False):
        return
    now, then = parallelism(engine), manifest.parallelism
    why = _why_it_differs(engine, options, converted=converted)
    found = state_digest(engine) if why is None else None
    if found is None:
        if dist.get_rank() == 0:
            logger.warning("pathswitch: %s: the loaded state is not compared: %s", source, why or "see above")
        return
    expected = dict(manifest.state_digest or {})
    if not engine.zero_load_from_fp32_weights():
        expected.pop(WEIGHTS, None)  # they are rounded, as the ds_config wants them
    if converted:
        expected.pop(AVERAGE, None)  # the converter leaves it out, as has been said
    ranks = f"saved by {then.world_size} ranks, loaded by {now.world_size}"
    if findings := differences(expected, found):
        said = "; ".join(map(str, findings))
        raise CheckpointError(
            f"{source}: {ranks}: the loaded optimizer state is not the one that was saved: {said}. "
            'Take another checkpoint; pathswitch.checkpoint "state_digest": false goes on from this one all the same'
        )
    if dist.get_rank() == 0:
        logger.info("pathswitch: %s: %s: the same %s to the bit", source, ranks, ", ".join(expected))


def _why_it_differs(engine: Any, options: dict[str, Any], *, converted: bool) -> str | None:
    """Return what may well make the loaded state another one than the saved, None if nothing does."""
    sizes = parallelism(engine)
    if options.get("custom_load_fn") is not None:
        return "the script loads the weights by a function of its own"
    if converted and sizes.tensor_parallel_size * sizes.pipeline_parallel_size > 1:
        return "DeepSpeed's conversion may average parameters that model-parallel ranks have in common"
    if converted and hasattr(engine.module, "universal_checkpoint_info"):
        return "the model lets DeepSpeed's conversion change parameters, as a vocabulary's padding"
    return None


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
