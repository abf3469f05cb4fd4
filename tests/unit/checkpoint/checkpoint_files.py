"""Small committed checkpoints, made as a save makes them: staging folder, digests, manifest, rename."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pathswitch.checkpoint import DEEPSPEED, Manifest, Parallelism, begin_save, commit, hash_file
from pathswitch.run_folder import tag

SHARDS = ("mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt", "offloaded/rank_0.swp")


def manifest_of(folder: Path, files: dict[str, Any], **changes: Any) -> Manifest:
    fields: dict[str, Any] = {
        "tag": folder.name,
        "paradigm": "path_switching",
        "path": "main",
        "step": 10,
        "global_steps": changes.get("step", 10),
        "samples_seen": 16 * changes.get("step", 10),
        "tokens_seen": None,
        "next_lr": 1e-3,
        "schedule_digest": "5" * 64,
        "plan_digest": "7" * 64,
        "data_digests": None,
        "parallelism": Parallelism(
            zero_stage=1, world_size=1, data_parallel_size=1, tensor_parallel_size=1, pipeline_parallel_size=1
        ),
        "dtype": "fp32",
        "versions": {"pathswitch": "0"},
        "git_commit": None,
        "parent": None,
        "files": files,
    }
    return Manifest(**{**fields, **changes})


def save(
    checkpoints: Path, step: int = 10, *, key: bytes | None = None, size: int = 300, text: str = "", **changes: Any
) -> Path:
    """Commit a checkpoint ``global_step<step>`` whose bytes follow from its path, its step and ``text``."""
    folder = checkpoints / tag(step)
    staging = begin_save(folder)
    for name in SHARDS:
        (staging / name).parent.mkdir(exist_ok=True)
        seed = f"{changes.get('path', 'main')} {step} {name} {text} ".encode()
        (staging / name).write_bytes((seed * (1 + size // len(seed)))[:size])
    files = {name: hash_file(staging / name, sync=True) for name in SHARDS}
    commit(folder, manifest_of(folder, files, step=step, **changes), key)
    DEEPSPEED.write_latest(checkpoints, folder.name)
    return folder


def flip_bit(file: Path) -> None:
    """Damage a file without changing its size, in a new inode: other links to it stay as they are."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.unlink()
    file.write_bytes(content)


def snapshot(folder: Path) -> dict[str, tuple[int, str]]:
    """Return every file's inode and digest."""
    files = [Path(directory, name) for directory, _, names in os.walk(folder) for name in names]
    return {str(file.relative_to(folder)): (file.stat().st_ino, hash_file(file).blake3) for file in files}
