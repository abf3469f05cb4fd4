"""The optimizer state's digest in manifests: bound by their own digest, kept by forks, absent from older ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import manifest_of, save

from pathswitch.checkpoint import MANIFEST_FILE, Policy, StreamDigest, read_manifest, read_section
from pathswitch.checkpoint.fork import fork_checkpoint
from pathswitch.errors import CheckpointError, ConfigError

DIGESTS = {
    "weights": StreamDigest(digest="0123" * 8, elements=144),
    "exp_avg": StreamDigest(digest="0" * 32, elements=144),
}


@pytest.mark.parametrize(
    ("changes", "digest"),
    [
        ({}, "4ef6218e52738fe82f459f61033fcb7cc34f7ce4567733dc9bf81b1a13e4beec"),
        ({"settings": {"seed": 7}}, "9fc241b6c2bd4fa83c2b4f1d58e5fdc5fd7fc673d7767a32c4135cb75315c75b"),
    ],
)
def test_manifests_without_it_keep_the_digests_that_they_had_before(changes: dict[str, Any], digest: str) -> None:
    manifest = manifest_of(Path("global_step10"), {}, **changes)
    assert manifest.digest == digest
    assert manifest.changed(state_digest=DIGESTS).digest != digest


def test_it_is_read_back_and_cannot_be_edited(tmp_path: Path) -> None:
    folder = save(tmp_path, state_digest=DIGESTS)
    assert read_manifest(folder).state_digest == DIGESTS
    edited = (folder / MANIFEST_FILE).read_text().replace("0123", "0124")
    (folder / MANIFEST_FILE).write_text(edited)
    with pytest.raises(CheckpointError, match="edited: digest expected"):
        read_manifest(folder)


def test_a_fork_keeps_it_even_if_its_policy_changes_the_moments(tmp_path: Path) -> None:
    folder = save(tmp_path / "main", state_digest=DIGESTS)
    policy = Policy(reset_moments=True)
    fork = tmp_path / "v1" / folder.name
    fork_checkpoint(folder, fork, policy=policy, paradigm="path_switching", path="v1")
    assert read_manifest(fork).state_digest == DIGESTS


def test_it_is_part_of_the_signed_content(tmp_path: Path) -> None:
    key = b"a key of enough bytes"
    folder = save(tmp_path, key=key, state_digest=DIGESTS)
    envelope = json.loads((folder / MANIFEST_FILE).read_text())
    del envelope["manifest"]["state_digest"]
    (folder / MANIFEST_FILE).write_text(json.dumps(envelope))
    with pytest.raises(CheckpointError, match="edited"):
        read_manifest(folder, key)


def test_the_setting() -> None:
    def read(checkpoint: Any) -> bool:
        return read_section({"pathswitch": {"checkpoint": checkpoint}}).checkpoint.state_digest

    assert read({}) is True and read({"state_digest": False}) is False
    for value in ("false", 0, None):
        with pytest.raises(ConfigError) as error:
            read({"state_digest": value})
        where = "ds_config pathswitch.checkpoint.state_digest"
        assert str(error.value) == f"{where}: given {value!r}; allowed: a valid boolean"
