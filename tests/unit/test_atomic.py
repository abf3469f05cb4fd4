from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from pathswitch.atomic import write_bytes_atomic, write_text_atomic


def test_content_is_written_and_replaced_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    for text in ("ä\r\n", "", "second"):
        write_text_atomic(path, text)
        assert path.read_bytes() == text.encode()
    assert os.listdir(tmp_path) == ["record.json"]


def test_the_file_has_the_permissions_of_an_ordinary_new_file(tmp_path: Path) -> None:
    write_bytes_atomic(tmp_path / "ours", b"x")
    (tmp_path / "ordinary").write_bytes(b"x")
    modes = {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("ours", "ordinary")}
    assert len(modes) == 1


def test_a_failed_write_leaves_the_old_content_and_no_leftover(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_text_atomic(path, "old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                write_text_atomic(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["record.json"]


def test_the_file_is_synced_before_it_gets_its_name_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def logged_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        size = os.fstat(descriptor).st_size
        events.append("folder" if is_folder else f"file of {size}")
        fsync(descriptor)

    def logged_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "replace", logged_replace)
    write_text_atomic(tmp_path / "record.json", "12345")
    assert events == ["file of 5", "rename", "folder"]
