"""A checkpoint is there as a whole or not at all, and what lies beside its shards stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from checkpoint_files import save

from pathswitch.checkpoint import (
    MANIFEST_FILE,
    begin_save,
    committed_checkpoints,
    read_manifest,
    recover_replaced,
    staging_folder,
    verify_checkpoint,
)
from pathswitch.checkpoint import commit as commit_checkpoint
from pathswitch.errors import CheckpointError


def test_nothing_is_there_before_the_commit(tmp_path: Path) -> None:
    staging = begin_save(tmp_path / "global_step4")
    (staging / "a_states.pt").write_bytes(b"part")
    assert committed_checkpoints(tmp_path) == []
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        read_manifest(tmp_path / "global_step4")
    assert not list(begin_save(tmp_path / "global_step4").iterdir()), "a new save begins from nothing"


def test_notes_beside_the_shards_move_along(tmp_path: Path) -> None:
    folder = save(tmp_path)
    (folder / "note.txt").write_text("mine")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocabulary").write_text("words")
    (folder / "stray_model_states.pt").write_bytes(b"not of the new one")
    again = save(tmp_path)
    assert again == folder
    assert (folder / "note.txt").read_text() == "mine"
    assert (folder / "tokenizer" / "vocabulary").read_text() == "words"
    assert not (folder / "stray_model_states.pt").exists()
    assert sorted(entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")) == []
    verify_checkpoint(folder)


def test_killed_between_the_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path)
    manifest = read_manifest(folder)
    begin_save(folder)
    for name in manifest.files:
        (staging_folder(folder) / name).parent.mkdir(exist_ok=True)
        (staging_folder(folder) / name).write_bytes((folder / name).read_bytes())
    rename, done = os.rename, []

    def rename_once(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_once)
    with pytest.raises(KeyboardInterrupt):
        commit_checkpoint(folder, manifest)
    monkeypatch.undo()
    assert not folder.exists()
    recover_replaced(folder)
    assert verify_checkpoint(folder).digest == manifest.digest


def test_an_edited_manifest_is_refused_in_every_byte_that_means_something(tmp_path: Path) -> None:
    folder = save(tmp_path)
    path = folder / MANIFEST_FILE
    whole = path.read_text()
    for old, new in (('"step": 10', '"step": 11'), ('"rank": 0', '"rank": 1'), ('"format": 1', '"format": 2')):
        assert old in whole, whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(CheckpointError, match=r"pathswitch\.json: (edited: digest expected|format 2)"):
            read_manifest(folder)
    for text in ("", "{}", whole[: len(whole) // 2], "[1]", "null"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=r"pathswitch\.json: damaged"):
            read_manifest(folder)
