"""Forks: what they hold, what they leave alone, and what happens when they are killed, raced or run out of space."""

from __future__ import annotations

import errno
import fcntl
import json
import multiprocessing
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import SHARDS, flip_bit, save, snapshot
from fork_jobs import race

import pathswitch.checkpoint.fork as fork_module
from pathswitch.checkpoint import MANIFEST_FILE, Policy, read_manifest, verify_checkpoint
from pathswitch.checkpoint.fork import Fork, fork_checkpoint
from pathswitch.errors import CheckpointError

KEY = b"a signing key of enough bytes"
SAME, OTHER = Policy(beta2=0.98), Policy(reset_moments=True)


def fork(source: Path, branch: Path, policy: Policy = SAME, **options: Any) -> Fork:
    target = branch / source.name
    return fork_checkpoint(source, target, policy=policy, **{"paradigm": "path_switching", "path": "v1", **options})


def hidden(folder: Path) -> list[str]:
    return [name for name in os.listdir(folder) if name.startswith(".")] if folder.is_dir() else []


def test_a_fork_is_the_parents_files_under_the_branchs_name(tmp_path: Path) -> None:
    source = save(tmp_path / "main")
    (source / "note.txt").write_text("not a checkpoint's")
    before = snapshot(source)
    made = fork(source, tmp_path / "v1")
    parent, own = read_manifest(source), verify_checkpoint(tmp_path / "v1" / "global_step10")
    assert made.created and made.manifest == own and made.folder == tmp_path / "v1" / "global_step10"
    changed = {"path": "v1", "parent": parent.digest, "forked_from": parent.digest, "policy": SAME}
    assert own.model_dump() == {**parent.model_dump(), **changed, "policy": SAME.model_dump()}
    assert own.digest != parent.digest
    assert (tmp_path / "v1" / "latest").read_text() == "global_step10"
    assert sorted(snapshot(made.folder)) == sorted([*SHARDS, MANIFEST_FILE])
    assert snapshot(source) == before and hidden(tmp_path / "v1") == []


def test_no_byte_is_copied_where_files_can_be_linked(tmp_path: Path) -> None:
    source, copied = save(tmp_path / "main"), []
    made = fork(source, tmp_path / "v1", copying=copied.append)
    assert copied == [] and made.method in ("reflink", "hard link")
    if made.method == "hard link":
        assert {(made.folder / name).stat().st_ino for name in SHARDS} == {
            (source / name).stat().st_ino for name in SHARDS
        }


def test_a_later_save_of_the_branch_leaves_the_parents_files_alone(tmp_path: Path) -> None:
    source = save(tmp_path / "main", size=5_000)
    before = snapshot(source)
    made = fork(source, tmp_path / "v1")
    forked = snapshot(made.folder)
    save(tmp_path / "v1", size=7_000, path="v1", text="the branch's own save of the same tag")
    after = snapshot(made.folder)
    assert snapshot(source) == before
    verify_checkpoint(source)
    # A link is a name: what the save wrote has other inodes than both.
    assert {after[name][0] for name in SHARDS}.isdisjoint({before[name][0] for name in SHARDS})
    assert all(after[name][1] != forked[name][1] for name in SHARDS)


def test_the_parent_may_be_removed(tmp_path: Path) -> None:
    source = save(tmp_path / "main")
    made = fork(source, tmp_path / "v1")
    save(tmp_path / "main", text="another")
    verify_checkpoint(made.folder)


def test_a_fork_again_is_the_same_fork_and_completes_latest(tmp_path: Path) -> None:
    source = save(tmp_path / "main")
    made = fork(source, tmp_path / "v1")
    (tmp_path / "v1" / "latest").unlink()
    before = snapshot(made.folder)
    verified: list[int] = []
    again = fork(source, tmp_path / "v1", verifying=verified.append)
    assert verified == []  # what is there needs no second look at the parent
    assert not again.created and again.manifest == made.manifest and snapshot(made.folder) == before
    assert (tmp_path / "v1" / "latest").read_text() == "global_step10"


@pytest.mark.parametrize("change", [{"policy": OTHER}, {"path": "v2"}])
def test_another_fork_in_its_place_is_refused_by_both_names(tmp_path: Path, change: dict[str, Any]) -> None:
    source = save(tmp_path / "main")
    before = snapshot(fork(source, tmp_path / "v1").folder)
    with pytest.raises(CheckpointError, match=r"given a fork of .* there is already .*'v1' with beta2 = 0.98") as error:
        fork(source, tmp_path / "v1", **change)
    assert read_manifest(source).digest[:12] in str(error.value)
    assert snapshot(tmp_path / "v1" / "global_step10") == before


def test_a_fork_of_another_checkpoint_in_its_place_is_refused(tmp_path: Path) -> None:
    fork(save(tmp_path / "main"), tmp_path / "v1")
    with pytest.raises(CheckpointError, match="there is already checkpoint"):
        fork(save(tmp_path / "other", text="other"), tmp_path / "v1")
    with pytest.raises(CheckpointError, match="which is not a fork"):
        fork(save(tmp_path / "main"), tmp_path / "other")


def test_a_branch_that_has_gone_on_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "main")
    fork(source, tmp_path / "v1")
    save(tmp_path / "v1", 12, path="v1")
    with pytest.raises(CheckpointError, match=r"holds other checkpoints \(global_step12\)"):
        fork(source, tmp_path / "v1")
    assert (tmp_path / "v1" / "latest").read_text() == "global_step12"


def test_an_uncommitted_target_is_refused(tmp_path: Path) -> None:
    source = save(tmp_path / "main")
    target = tmp_path / "v1" / source.name
    target.mkdir(parents=True)
    (target / SHARDS[0]).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="not committed"):
        fork(source, tmp_path / "v1")
    assert (target / SHARDS[0]).read_bytes() == b"half"


def test_another_paradigm_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="of paradigm path_switching; allowed: wsd_s"):
        fork(save(tmp_path / "main"), tmp_path / "v1", paradigm="wsd_s")


@pytest.mark.parametrize(
    ("damage", "message", "seen_by_sizes"),
    [
        (lambda source: (source / MANIFEST_FILE).unlink(), "not committed", True),
        (lambda source: (source / MANIFEST_FILE).write_text("{"), "damaged: it is not a manifest", True),
        (lambda source: flip_bit(source / SHARDS[1]), "expected blake3 .* found blake3", False),
        (lambda source: (source / SHARDS[1]).write_bytes(b"short"), "expected 300 bytes, found 5 bytes", True),
        (lambda source: (source / SHARDS[1]).unlink(), "no such file", True),
        (lambda source: (source / "extra_model_states.pt").write_bytes(b""), "does not have", True),
    ],
)
def test_a_damaged_parent_is_not_forked(tmp_path: Path, damage: Any, message: str, seen_by_sizes: bool) -> None:
    source = save(tmp_path / "main")
    damage(source)
    with pytest.raises(CheckpointError, match=message):
        fork(source, tmp_path / "v1")
    assert not (tmp_path / "v1" / source.name).exists() and hidden(tmp_path / "v1") == []
    if seen_by_sizes:
        with pytest.raises(CheckpointError, match=message):
            fork(source, tmp_path / "v1", verify="sizes")
    else:
        assert fork(source, tmp_path / "v1", verify="sizes").created


def test_a_parent_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such checkpoint"):
        fork(tmp_path / "main" / "global_step10", tmp_path / "v1")
    assert not (tmp_path / "v1").exists()


def test_keys_verify_the_parent_and_sign_the_fork(tmp_path: Path) -> None:
    unsigned, signed = save(tmp_path / "plain"), save(tmp_path / "main", key=KEY)
    with pytest.raises(CheckpointError, match="is not signed"):
        fork(unsigned, tmp_path / "v1", key=KEY)
    made = fork(signed, tmp_path / "v1", key=KEY)
    assert read_manifest(made.folder, KEY) == made.manifest
    with pytest.raises(CheckpointError, match="another key"):
        read_manifest(made.folder, KEY + b"?")


def refuse_links(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code), "a file")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(fork_module, "_reflink", lambda *_: refuse_reflink())


def refuse_reflink() -> None:
    raise OSError(errno.EOPNOTSUPP, "no reflinks here")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP])
def test_files_that_cannot_be_linked_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    refuse_links(monkeypatch, code)
    monkeypatch.setattr(fork_module, "COPY_CHUNK", 128)
    source, copied, verified = save(tmp_path / "main"), [], []
    made = fork(source, tmp_path / "v1", copying=copied.append, verifying=verified.append)
    assert made.method == "copy" and sum(copied) == sum(verified) == 900 and max(copied) == 128
    assert verify_checkpoint(made.folder) == made.manifest
    assert (made.folder / SHARDS[0]).stat().st_ino != (source / SHARDS[0]).stat().st_ino


def test_a_copy_is_compared_with_its_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_links(monkeypatch, errno.EXDEV)
    source = save(tmp_path / "main")
    flip_bit(source / SHARDS[1])
    with pytest.raises(CheckpointError, match=f"{SHARDS[1]}: expected blake3 .* copied from"):
        fork(source, tmp_path / "v1", verify="sizes")
    assert os.listdir(tmp_path / "v1") == []


def test_another_device_gets_copies(tmp_path: Path) -> None:
    memory = Path("/dev/shm", f"pathswitch_fork_{os.getpid()}")
    if not memory.parent.is_dir() or memory.parent.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system here")
    source = save(tmp_path / "main")
    try:
        made = fork(source, memory)
        assert made.method == "copy" and verify_checkpoint(made.folder) == made.manifest
    finally:
        subprocess.run(["rm", "-r", memory], check=False)


def test_reflinks_are_tried_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def clone(descriptor: int, request: int, original: int) -> int:
        assert request == 0x40049409  # _IOW(0x94, 9, int)
        return os.pwrite(descriptor, os.pread(original, 1 << 20, 0), 0)

    monkeypatch.setattr(fcntl, "ioctl", clone)
    source = save(tmp_path / "main")
    made = fork(source, tmp_path / "v1")
    assert made.method == "reflink" and verify_checkpoint(made.folder) == made.manifest
    assert (made.folder / SHARDS[0]).stat().st_ino != (source / SHARDS[0]).stat().st_ino


def test_a_linked_shard_is_taken_itself(tmp_path: Path) -> None:
    source = save(tmp_path / "main")
    (source / SHARDS[0]).rename(tmp_path / "elsewhere.pt")
    (source / SHARDS[0]).symlink_to("../../elsewhere.pt")
    made = fork(source, tmp_path / "a" / "b" / "v1")
    assert not (made.folder / SHARDS[0]).is_symlink() and verify_checkpoint(made.folder)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EIO])
def test_what_the_file_system_refuses_is_one_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    source = save(tmp_path / "main")
    before = snapshot(source)
    with monkeypatch.context() as patch:
        refuse_links(patch, code)
        with pytest.raises(CheckpointError, match=f"cannot be forked from .*: {os.strerror(code)} \\(a file\\)"):
            fork(source, tmp_path / "v1")
    assert os.listdir(tmp_path / "v1") == [] and snapshot(source) == before
    assert fork(source, tmp_path / "v1").created


def test_a_folder_that_cannot_be_written_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot be forked from .*Not a directory"):
        fork(save(tmp_path / "main"), tmp_path / "file")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "v1").mkdir(mode=0o500)
    with pytest.raises(CheckpointError, match="Permission denied"):
        fork(save(tmp_path / "main"), tmp_path / "v1")


def test_a_parent_that_is_saved_again_meanwhile_is_noticed(tmp_path: Path) -> None:
    source, verified = save(tmp_path / "main"), []

    def save_again_at_the_end(size: int) -> None:
        verified.append(size)
        if len(verified) == len(SHARDS):
            save(tmp_path / "main", text="again")

    with pytest.raises(CheckpointError, match="replaced by another save"):
        fork(source, tmp_path / "v1", verifying=save_again_at_the_end)
    assert not (tmp_path / "v1" / source.name).exists() and hidden(tmp_path / "v1") == []


@pytest.mark.parametrize("policies", [(SAME, SAME), (SAME, OTHER)], ids=["same", "different"])
def test_of_two_forks_at_once_the_first_wins(tmp_path: Path, policies: tuple[Policy, Policy]) -> None:
    rounds, context = 25, multiprocessing.get_context("spawn")
    source, barrier, outcomes = save(tmp_path / "main"), context.Barrier(2), context.Queue()
    jobs = [
        context.Process(target=race, args=(str(source), str(tmp_path / "v1"), rounds, policy, barrier, outcomes))
        for policy in policies
    ]
    for job in jobs:
        job.start()
    found = [outcomes.get(timeout=60) for _ in range(2 * rounds)]
    for job in jobs:
        job.join()
    for number in range(rounds):
        said = sorted(outcome for at, outcome in found if at == number)
        target = tmp_path / "v1" / str(number) / source.name
        assert said[0] == "created", said
        if policies[0] == policies[1]:
            assert said[1] == "there already"
        else:
            assert said[1].startswith("error: ") and "reset_moments" in said[1] and "beta2" in said[1]
        assert verify_checkpoint(target).policy in policies
        assert hidden(target.parent) == [] and (target.parent / "latest").read_text() == target.name


@pytest.mark.slow
def test_killed_at_any_moment_a_fork_is_absent_or_whole_and_can_be_run_again(tmp_path: Path) -> None:
    source, kills = save(tmp_path / "main", size=20_000), 120
    before = snapshot(source)
    command = [sys.executable, str(Path(__file__).with_name("fork_jobs.py")), "kill", str(tmp_path), str(kills), "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    seen = Counter(json.loads(done.stdout))
    assert seen["broken"] == 0, (seen, done.stderr)
    assert sum(seen.values()) == kills and seen["hidden left"] > kills / 10, seen
    assert snapshot(source) == before
