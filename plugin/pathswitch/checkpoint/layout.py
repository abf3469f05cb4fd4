"""Where a training framework notes its newest checkpoint, and how it calls checkpoint folders."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pathswitch.atomic import write_text_atomic
from pathswitch.checkpoint.manifest import Manifest

ITERATION_FOLDER = re.compile(r"iter_(\d{7,})")
MEGATRON_PACKAGE = "megatron-core"


@dataclass(frozen=True)
class Layout:
    """A framework's folder of checkpoints: one folder for each, and a file that names the newest."""

    framework: str
    latest_file: str
    tag_of: Callable[[str], str]
    """What the file says -> the name of a checkpoint's folder."""
    text_of: Callable[[str], str]
    """The name of a checkpoint's folder -> what the file says."""

    def latest(self, checkpoints: Path) -> str | None:
        """Return the folder that the file names, empty if it names none; None where there is no file."""
        path = checkpoints / self.latest_file
        return self.tag_of(path.read_text(errors="replace").strip()) if path.is_file() else None

    def write_latest(self, checkpoints: Path, tag: str) -> None:
        """Name the newest committed checkpoint in the framework's own file."""
        write_text_atomic(checkpoints / self.latest_file, self.text_of(tag))


def iteration_folder(iteration: int) -> str:
    """Return the name of Megatron's checkpoint folder after an iteration."""
    return f"iter_{iteration:07d}"


def iteration_of(tag: str) -> int | None:
    """Return the iteration that a folder's name tells, None if it is not Megatron's."""
    match = ITERATION_FOLDER.fullmatch(tag)
    return int(match[1]) if match else None


def _folder_of_iteration(text: str) -> str:
    return iteration_folder(int(text)) if text.isdecimal() else text


DEEPSPEED = Layout("DeepSpeed", "latest", lambda text: text, lambda tag: tag)
MEGATRON = Layout(
    "Megatron", "latest_checkpointed_iteration.txt", _folder_of_iteration, lambda tag: str(iteration_of(tag))
)


def layout_of(manifest: Manifest) -> Layout:
    """Return the layout of the framework that wrote a checkpoint."""
    return MEGATRON if MEGATRON_PACKAGE in manifest.versions else DEEPSPEED
