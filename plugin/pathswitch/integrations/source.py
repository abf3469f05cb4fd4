"""Where a job loads from: which checkpoint it wants, whether that is whole, and what it may go back to."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist

from pathswitch.checkpoint import (
    MANIFEST_FILE,
    CheckpointSettings,
    Finding,
    Layout,
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
from pathswitch.integrations.collective import gather, on_first_rank
from pathswitch.versions import Path as TrainingPath

logger = logging.getLogger("pathswitch")


@dataclass(frozen=True)
class Source:
    """A folder of checkpoints, and the path that a job wants to train from there; all ranks ask together."""

    load_dir: Path
    layout: Layout
    path: TrainingPath
    settings: CheckpointSettings
    key: bytes | None

    def choose(self, tag: str | None) -> tuple[Path, Manifest | None] | None:
        """Return the checkpoint that ``tag``, or the framework's own file, names; None to train from the beginning.

        The manifest is None where nothing is to be verified and nothing is known.

        Raises:
            CheckpointError: on every rank: it is damaged, was never committed, or is missing beside others.
        """
        tags = on_first_rank(lambda: self._candidates(tag))
        return self._newest_whole(tags) if tags else None

    def belongs(self, manifest: Manifest) -> bool:
        """Return whether the path may go on from a checkpoint: its own, or its parent's at the fork."""
        path = self.path
        at_fork = manifest.path == path.parent and manifest.step == path.start_step
        return manifest.paradigm == path.paradigm and (manifest.path == path.name or at_fork)

    def _candidates(self, tag: str | None) -> list[str]:
        """Return the tags to try, the wanted one first; none to train from the beginning."""
        if tag is not None:
            recover_replaced(self.load_dir / tag)
            return [str(tag)]
        latest, named = self.load_dir / self.layout.latest_file, self.layout.latest(self.load_dir)
        if named and "\0" not in named:
            recover_replaced(self.load_dir / named)
        committed = committed_checkpoints(self.load_dir, self.key)
        others = [folder.name for folder, manifest in committed if self.belongs(manifest)]
        go_back = self.settings.on_damage == "previous"
        if named and "\0" not in named and (self.load_dir / named).is_dir():
            return [named, *(other for other in others if go_back and other != named)]
        if named is None and len(others) == 1:  # the first save here was killed just before it named itself
            logger.warning("pathswitch: %s is missing; going on from the only checkpoint there, %s", latest, others[0])
            return others
        state = "is missing" if named is None else f"names {named[:80]!r}" if named else "is empty"
        found = f"{latest} {state}"
        if others and go_back:
            logger.warning("pathswitch: %s; going back to the newest committed checkpoint, %s", found, others[0])
            return others
        self._require_nothing_to_load(found, named)
        return []

    def _require_nothing_to_load(self, found: str, named: str | None) -> None:
        """Refuse what the framework would turn into a silent start from scratch.

        Raises:
            CheckpointError: there are checkpoints, or there should be one, or there is a ``latest`` without any.
        """
        folders = checkpoint_folders(self.load_dir)
        tags = sorted(folder.relative_to(self.load_dir).as_posix() for folder in folders)
        if tags:
            raise CheckpointError(
                f"{found}, but the folder holds checkpoints ({', '.join(tags)}): {self.layout.framework} would "
                "silently train from scratch, or not start. Load one by its tag, write its name into this file, or set "
                'on_damage = "previous"'
            )
        if self.path.start_step > 0:
            raise CheckpointError(
                f"{found} and the folder holds no checkpoint: path {self.path.name!r} starts from a checkpoint of "
                f"{self.path.parent!r} at step {self.path.start_step}"
            )
        if named is not None:
            raise CheckpointError(
                f"{found} and the folder holds no checkpoint: remove the file to train from the beginning"
            )

    def _newest_whole(self, tags: list[str]) -> tuple[Path, Manifest | None]:
        """Return the first of the candidates that is whole; say which were not."""
        for tag in tags:
            try:
                manifest = self._verified(self.load_dir / tag)
            except CheckpointError as error:
                if tag == tags[-1]:
                    raise CheckpointError(f"{error}{on_first_rank(lambda: self._hint(tags))}") from None
                if dist.get_rank() == 0:
                    logger.warning("pathswitch: skipped %s", error)
            else:
                return self.load_dir / tag, manifest
        raise AssertionError("no candidate")

    def _hint(self, tried: list[str]) -> str:
        committed = committed_checkpoints(self.load_dir, self.key)
        others = [folder.name for folder, manifest in committed if folder.name not in tried and self.belongs(manifest)]
        return f'. The newest other one is {others[0]}; on_damage = "previous" goes back to it' if others else ""

    def _verified(self, folder: Path) -> Manifest | None:
        """Verify a checkpoint, each rank its own shards.

        Raises:
            CheckpointError: on every rank, naming what any of them found.
        """
        mode = self.settings.verify
        if mode == "off" and not (folder / MANIFEST_FILE).is_file():
            return None
        manifest = on_first_rank(lambda: read_manifest(folder, self.key))
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
