"""Checkpoints as files: manifests, commits, verification, forks and retention; no torch and no deepspeed needed."""

from pathswitch.checkpoint.commit import (
    begin_save,
    commit,
    discard,
    recover_replaced,
    staging_folder,
)
from pathswitch.checkpoint.files import MANIFEST_FILE, FileEntry, digest_bytes, hash_file, shard_names
from pathswitch.checkpoint.layout import (
    DEEPSPEED,
    MEGATRON,
    MEGATRON_PACKAGE,
    Layout,
    iteration_folder,
    iteration_of,
    layout_of,
)
from pathswitch.checkpoint.manifest import Manifest, Parallelism, Policy, StreamDigest, read_key, read_manifest
from pathswitch.checkpoint.settings import CheckpointSettings, JobSettings, PathSwitchSection, read_section
from pathswitch.checkpoint.verify import (
    Finding,
    VerifyMode,
    check_files,
    check_names,
    checkpoint_folders,
    checkpoint_state,
    committed_checkpoints,
    describe_findings,
    verify_checkpoint,
)

__all__ = [
    "DEEPSPEED",
    "MANIFEST_FILE",
    "MEGATRON",
    "MEGATRON_PACKAGE",
    "CheckpointSettings",
    "FileEntry",
    "Finding",
    "JobSettings",
    "Layout",
    "Manifest",
    "Parallelism",
    "PathSwitchSection",
    "Policy",
    "StreamDigest",
    "VerifyMode",
    "begin_save",
    "check_files",
    "check_names",
    "checkpoint_folders",
    "checkpoint_state",
    "commit",
    "committed_checkpoints",
    "describe_findings",
    "digest_bytes",
    "discard",
    "hash_file",
    "iteration_folder",
    "iteration_of",
    "layout_of",
    "read_key",
    "read_manifest",
    "read_section",
    "recover_replaced",
    "shard_names",
    "staging_folder",
    "verify_checkpoint",
]
