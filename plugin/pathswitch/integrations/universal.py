"""Another number of ranks: a checkpoint is converted by DeepSpeed's universal format, loaded, and the copy removed."""

from __future__ import annotations

import glob
import logging
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pathswitch.atomic import write_text_atomic
from pathswitch.checkpoint import Manifest, Parallelism
from pathswitch.errors import CheckpointError
from pathswitch.integrations.collective import on_first_rank

logger = logging.getLogger("pathswitch")

TAG = "universal"
POLL_SECONDS = 0.2
CONVERTED = "converted"


def needs_conversion(manifest: Manifest, now: Parallelism) -> bool:
    """Return whether shards are cut for another number of ranks.

    Raises:
        CheckpointError: DeepSpeed cannot load this checkpoint with these sizes at all.
    """
    then = manifest.parallelism
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(then, name) != getattr(now, name):
            raise CheckpointError(
                f"checkpoint {manifest.tag}: {name}: saved with {getattr(then, name)}, this job has "
                f"{getattr(now, name)}; DeepSpeed converts data-parallel ranks only"
            )
    if _layout(then) != _layout(now):
        raise CheckpointError(
            f"checkpoint {manifest.tag}: saved under ZeRO stage {then.zero_stage}, this job has stage "
            f"{now.zero_stage}; allowed: {_layout(then)}, since DeepSpeed does not convert between these layouts"
        )
    return then.zero_stage > 0 and then.data_parallel_size != now.data_parallel_size


def _layout(sizes: Parallelism) -> str:
    return {0: "stage 0", 1: "stages 1 and 2", 2: "stages 1 and 2", 3: "stage 3"}[sizes.zero_stage]


@contextmanager
def converted(source: Path, target: Path) -> Iterator[tuple[Path, str]]:
    """Convert ``source`` on rank 0 and yield the folder and tag to load on every rank; remove the copy afterwards.

    The copy's folder is called like ``target``, with a name of this attempt behind it.

    Raises:
        CheckpointError: on every rank, if the conversion failed.
    """
    folder = on_first_rank(lambda: _fresh_folder(target))
    outcome = folder / "outcome"
    if dist.get_rank() == 0:
        write_text_atomic(outcome, _convert(source, folder / TAG))
    # Not a collective: a large conversion takes longer than collectives may wait.
    while not outcome.is_file():
        time.sleep(POLL_SECONDS)
    said = outcome.read_text()
    if said == CONVERTED:
        # If a rank fails while it loads, it must not wait for the others here; the next attempt removes the copy.
        yield folder, TAG
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder, ignore_errors=True)
    if said != CONVERTED:
        raise CheckpointError(f"{source}: its conversion for another number of ranks failed: {said}")


def _fresh_folder(target: Path) -> Path:
    """Return an empty folder of this attempt alone: the converter of a killed job may still be writing into its own."""
    for leftover in target.parent.glob(f"{glob.escape(target.name)}.*"):
        shutil.rmtree(leftover, ignore_errors=True)
    folder = target.with_name(f"{target.name}.{uuid.uuid4().hex}")
    folder.mkdir(parents=True)
    return folder


def _convert(source: Path, output: Path) -> str:
    """Run DeepSpeed's converter; return CONVERTED or the last line that it said."""
    workers = str(max(1, min(8, len(os.sched_getaffinity(0)))))
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(output)]
    command += ["--num_extract_workers", workers, "--num_merge_workers", workers]
    # A job of its own: it must not join the training job's process group.
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == 0 and output.is_dir():
        return CONVERTED
    said = (result.stderr.strip() or result.stdout.strip() or f"exit code {result.returncode}").splitlines()[-1]
    # torch's writer does not say that the disk is full.
    free = shutil.disk_usage(output.parent).free
    shutil.rmtree(output, ignore_errors=True)  # for the outcome, which has to be written
    return f"{said} ({free} bytes are free in {output.parent})"


def repair_optimizer(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]], stage: int) -> None:
    """Undo two side effects of loading a universal checkpoint.

    DeepSpeed gives all parameters of a group one and the same ``step`` tensor, which Adam would then count up once
    for each of them; and under ZeRO 3 it gives every param group the settings of the first. What it leaves out cannot
    be undone, only said.
    """
    if getattr(optimizer, "keeps_average", False) and dist.get_rank() == 0:
        logger.warning("pathswitch: DeepSpeed's converter leaves out the running average: it begins with these weights")
    for state in optimizer.state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()
    if stage == 3:
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
