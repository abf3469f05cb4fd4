"""Verification: does a folder hold what its manifest says, no more and no less."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pathswitch.checkpoint.files import MANIFEST_FILE, FileEntry, hash_file, is_shard, regular_size, shard_names
from pathswitch.checkpoint.layout import iteration_of
from pathswitch.checkpoint.manifest import Manifest, read_manifest
from pathswitch.errors import CheckpointError

VerifyMode = Literal["full", "sizes", "off"]
CheckpointState = Literal["committed", "damaged", "missing", "replaced"]
SHOWN_FINDINGS = 5


@dataclass(frozen=True)
class Finding:
    """One file, relative to its checkpoint's folder, that is not as the manifest says."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


def check_files(folder: Path, files: dict[str, FileEntry], mode: VerifyMode) -> list[Finding]:
    """Compare files with their entries: sizes, then digests if the mode is ``full``."""
    findings = (_check_file(folder, name, entry, mode) for name, entry in files.items())
    return [finding for finding in findings if finding is not None]


def _check_file(folder: Path, name: str, entry: FileEntry, mode: VerifyMode) -> Finding | None:
    path = folder / name
    try:
        size = regular_size(path)
        if size is None:
            return Finding(name, f"{entry.size} bytes", "no such file")
        if size != entry.size:
            return Finding(name, f"{entry.size} bytes", f"{size} bytes")
        if mode == "full" and (digest := hash_file(path).blake3) != entry.blake3:
            return Finding(name, f"blake3 {entry.blake3}", f"blake3 {digest}")
    except OSError as error:
        return Finding(name, f"{entry.size} bytes", f"unreadable ({error.strerror})")
    return None


def check_names(folder: Path, manifest: Manifest) -> list[Finding]:
    """Find shards that the manifest does not have: DeepSpeed loads by pattern whatever lies in the folder."""
    extra = sorted(name for name in shard_names(folder) - manifest.files.keys() if is_shard(name))
    return [Finding(name, "no such file", "a shard that the manifest does not have") for name in extra]


def describe_findings(folder: Path, findings: list[Finding]) -> str:
    """Return one message that names what was expected and found."""
    shown = "; ".join(map(str, findings[:SHOWN_FINDINGS]))
    more = len(findings) - SHOWN_FINDINGS
    return f"{folder}: damaged: {shown}" + (f"; and {more} more" if more > 0 else "")


def verify_checkpoint(
    folder: Path, mode: VerifyMode = "full", key: bytes | None = None, tick: Callable[[int], None] = lambda _: None
) -> Manifest:
    """Verify one checkpoint in this process and return its manifest; ``tick`` gets the bytes of each file done.

    Raises:
        CheckpointError: the manifest is missing or edited, or files are not as it says.
    """
    manifest = read_manifest(folder, key)
    findings = check_names(folder, manifest)

    def check(item: tuple[str, FileEntry]) -> list[Finding]:
        found = check_files(folder, dict([item]), mode)
        tick(item[1].size)
        return found

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for found in pool.map(check, manifest.files.items()):
            findings += found
    if findings:
        raise CheckpointError(describe_findings(folder, findings))
    return manifest


def checkpoint_folders(root: Path) -> Iterator[Path]:
    """Return the folders below ``root`` (or itself) that look like checkpoints, hidden ones left out."""
    for directory, subfolders, files in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        by_deepspeed = any(name.endswith("_states.pt") for name in files)
        if MANIFEST_FILE in files or by_deepspeed or iteration_of(Path(directory).name) is not None:
            subfolders.clear()
            yield Path(directory)


def committed_checkpoints(checkpoints: Path, key: bytes | None = None) -> list[tuple[Path, Manifest]]:
    """Return the readable committed checkpoints directly in a folder, the one with most steps first."""
    found = []
    for entry in _subfolders(checkpoints):
        try:
            found.append((entry, read_manifest(entry, key)))
        except CheckpointError:
            continue
    return sorted(found, key=lambda item: item[1].step, reverse=True)


def _subfolders(folder: Path) -> Iterable[Path]:
    if not folder.is_dir():
        return []
    return [entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def checkpoint_state(folder: Path, manifest_digest: str | None = None) -> CheckpointState:
    """Return a checkpoint's state as far as sizes tell; ``replaced`` if it is not the one of the given digest."""
    if not folder.is_dir():
        return "missing"
    try:
        manifest = read_manifest(folder)
    except CheckpointError:
        return "damaged"
    if manifest_digest is not None and manifest.digest != manifest_digest:
        return "replaced"
    return "damaged" if check_files(folder, manifest.files, "sizes") else "committed"
