"""The manifest of a checkpoint: what it is, which files it has, and the proof that both are whole.

``<tag>/pathswitch.json`` holds {"format", "manifest", "digest", "hmac_sha256"}: the digest is BLAKE3 over the canonical
JSON of "manifest", the HMAC, where a key is configured, is SHA-256 over the same bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from pathswitch.checkpoint.files import MANIFEST_FILE, FileEntry, digest_bytes
from pathswitch.errors import CheckpointError, ConfigError

FORMAT = 1
SHORT_DIGEST = 12
MINIMUM_KEY_BYTES = 16
# Fields of format 1 that its first manifests have not: without them, these keep their digests and signatures.
ADDED = ("settings", "state_digest")


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Parallelism(_Model):
    """How a checkpoint's shards are cut."""

    zero_stage: int
    world_size: int
    data_parallel_size: int
    tensor_parallel_size: int
    pipeline_parallel_size: int


class Policy(_Model):
    """What a fork changes for its branch; everything else is kept.

    Kept are the weights, Adam's moments and step, the random states and the place in the data.
    """

    reset_moments: bool = False
    beta2: float | None = None
    weight_decay: float | None = None
    gradient_clipping: float | None = None

    def changes(self) -> dict[str, Any]:
        """Return what differs from keeping everything."""
        return self.model_dump(exclude_defaults=True)


class StreamDigest(_Model):
    """What one part of the optimizer state is, whole, however many ranks share it."""

    digest: str
    """32 hex digits; see pathswitch.kernels.digest."""
    elements: int

    def __str__(self) -> str:
        """Return it for people."""
        return f"{self.digest} of {self.elements:,} elements"


class Manifest(_Model):
    """One committed checkpoint."""

    tag: str
    paradigm: str
    path: str
    step: int
    """Optimizer updates done: the scheduler's counter."""
    global_steps: int
    """The framework's own counter, which counts skipped updates too."""
    samples_seen: int
    tokens_seen: int | None
    next_lr: float
    """LR of the next update on this checkpoint's path."""
    schedule_digest: str
    plan_digest: str
    data_digests: dict[str, str] | None
    """Digest of each version's text, where the trainer knows it."""
    parallelism: Parallelism
    dtype: str
    versions: dict[str, str]
    """Of pathswitch, torch, the framework and python."""
    git_commit: str | None
    """Of the training script's tree; ends with "+" where files of it were changed."""
    parent: str | None
    """Digest of the manifest that this job loaded, or saved, before."""
    forked_from: str | None = None
    """Digest of the manifest that a fork took its files from."""
    policy: Policy = Policy()
    """The fork's policy; the checkpoints of its branch hold it as well."""
    settings: dict[str, Any] | None = None
    """The arguments that the order of the samples and the vocabulary depend on, where the framework tells them."""
    state_digest: dict[str, StreamDigest] | None = None
    """Of the weights and each of the moments, as they were in memory at the save; a fork keeps its parent's."""
    files: dict[str, FileEntry]

    @cached_property
    def content(self) -> bytes:
        """The canonical JSON: keys sorted, no spaces; without what was added to format 1 later, if there is none."""
        content = self.model_dump(mode="json")
        for name in ADDED:
            if content[name] is None:
                del content[name]
        return _canonical(content)

    @cached_property
    def digest(self) -> str:
        """BLAKE3 of the content, the checkpoint's identity."""
        return digest_bytes(self.content)

    def changed(self, **changes: Any) -> Manifest:
        """Return this manifest with other fields."""
        # Not model_copy, which would take the cached content and digest along.
        return Manifest.model_validate({**self.model_dump(), **changes})

    def encode(self, key: bytes | None) -> bytes:
        """Return the manifest file, signed if there is a key."""
        signature = None if key is None else _sign(self.content, key)
        envelope = {"format": FORMAT, "digest": self.digest, "hmac_sha256": signature}
        return json.dumps({**envelope, "manifest": json.loads(self.content)}, indent=1).encode() + b"\n"


def read_manifest(folder: Path, key: bytes | None = None) -> Manifest:
    """Return a folder's manifest.

    Raises:
        CheckpointError: there is none, it is not what was written, or not signed with the key.
    """
    path = folder / MANIFEST_FILE
    try:
        envelope = json.loads(path.read_bytes())
        content, digest, signature = envelope["manifest"], envelope["digest"], envelope["hmac_sha256"]
    except FileNotFoundError:
        raise CheckpointError(_no_manifest(folder)) from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: damaged: it is not a manifest in JSON") from None
    if envelope.get("format") != FORMAT:
        raise CheckpointError(f"{path}: format {envelope.get('format')!r}; this version reads {FORMAT}")
    canonical = _canonical(content)
    if digest_bytes(canonical) != digest:
        raise CheckpointError(f"{path}: edited: digest expected {digest}, found {digest_bytes(canonical)}")
    if key is not None and not _is_signed(canonical, key, signature):
        state = "is not signed" if signature is None else "is signed with another key"
        raise CheckpointError(f"{path}: {state}, and the configured signing key asks for its own signature")
    try:
        return Manifest.model_validate_json(canonical)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def read_key(path: str | Path | None) -> bytes | None:
    """Return the signing key: the whole content of its file, without surrounding blanks.

    Raises:
        ConfigError: the file cannot be read, or the key is too short to protect anything.
    """
    if path is None:
        return None
    allowed = f"a readable file with a key of at least {MINIMUM_KEY_BYTES} bytes"
    try:
        key = Path(path).read_bytes().strip()
    except OSError as error:
        raise ConfigError("signing_key_file", given=str(path), allowed=f"{allowed} ({error.strerror})") from None
    if len(key) < MINIMUM_KEY_BYTES:
        raise ConfigError("signing_key_file", given=f"{path} with {len(key)} bytes", allowed=allowed)
    return key


def _canonical(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def _sign(content: bytes, key: bytes) -> str:
    return hmac.new(key, content, hashlib.sha256).hexdigest()


def _is_signed(content: bytes, key: bytes, signature: object) -> bool:
    return isinstance(signature, str) and hmac.compare_digest(signature, _sign(content, key))


def _no_manifest(folder: Path) -> str:
    if not folder.is_dir():
        return f"{folder}: there is no such checkpoint"
    return (
        f"{folder}: not committed: it has no {MANIFEST_FILE}. Its save was never finished, or another program wrote "
        f"it; if you know that it is whole, `pathswitch adopt {folder}` commits it as it is"
    )
