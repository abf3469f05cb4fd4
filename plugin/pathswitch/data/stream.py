"""Which tokens a step sees: a pure function of seed and step, the same on every path, machine and number of ranks.

Sample i of a version is ``tokens[i * seq_len : (i + 1) * seq_len + 1]``. Positions count the samples of the main path,
``batch_size`` per step. Every pass over the text is a fresh order in which each sample comes exactly once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from pathswitch.data.permutation import permutation
from pathswitch.errors import ConfigError, DataError, choices

Split = Literal["temporal", "iid"]
Ints = npt.NDArray[np.int64]
Tokens = npt.NDArray[Any]

# PyTorch's cross_entropy leaves this target out.
IGNORED_TARGET = -100


@dataclass(frozen=True)
class StreamConfig:
    """What fixes the order of samples, apart from the text and the plan."""

    seed: int
    seq_len: int
    """Tokens that the model sees of a sample; a sample holds one more, the last target."""
    batch_size: int
    """Samples of one optimizer step, over all ranks and micro-batches."""
    split: Split = "temporal"
    """temporal: version v's steps see version v's text. iid: every step draws from the text of all versions."""
    repeat: bool = False
    """Allow more steps than the text has samples for: pass after pass, each in a new order."""

    def __post_init__(self) -> None:
        """Raise ConfigError for a size below 1 or an unknown split."""
        for field in ("seq_len", "batch_size"):
            if getattr(self, field) < 1:
                raise ConfigError(field, given=getattr(self, field), allowed="1 or more")
        if self.split not in get_args(Split):
            raise ConfigError("split", given=self.split, allowed=choices(get_args(Split), str(self.split)))


class SampleStream:
    """The samples of every step of the main path, or of a pre-training run over the same samples in mixed order."""

    def __init__(
        self,
        tokens: Sequence[Tokens],
        steps: Sequence[int],
        names: Sequence[str],
        config: StreamConfig,
        mixed_until: int | None = None,
    ) -> None:
        """Take each version's tokens (1-D), number of optimizer steps and name, in the order of the versions.

        With ``mixed_until`` = S, steps 0 .. S-1 see exactly the samples that the main path sees in these steps, in
        one shuffled order: pre-training from scratch on all text so far.

        Raises:
            ConfigError: lists of different lengths, a number of steps below 1, ``mixed_until`` outside the plan, or
                more samples needed than a version has, without ``repeat``.
            DataError: a version with fewer than ``seq_len + 1`` tokens.
        """
        if not len(tokens) == len(steps) == len(names) or not names:
            given = f"{len(tokens)} token arrays, {len(steps)} step counts, {len(names)} names"
            raise ConfigError("versions", given=given, allowed="one of each per version, at least one version")
        for name, count in zip(names, steps, strict=True):
            if count < 1:
                raise ConfigError(f"steps of version {name}", given=count, allowed="1 or more")
        self.config = config
        self.total_steps = sum(steps) if mixed_until is None else mixed_until
        if not 1 <= self.total_steps <= sum(steps):
            raise ConfigError("mixed_until", given=mixed_until, allowed=f"1 to {sum(steps)}, the steps of the plan")
        self._mixed = mixed_until is not None
        self._names = tuple(names)
        self._tokens = tuple(np.asarray(array) for array in tokens)
        self.samples_available = tuple(self._count_samples(i) for i in range(len(names)))
        self.samples_needed = tuple(count * config.batch_size for count in steps)
        self._first_position = _starts(self.samples_needed)
        self._first_in_pool = _starts(self.samples_available)
        self._window = np.arange(config.seq_len + 1)
        if not config.repeat:
            self._check_enough()

    def sample_ids(self, step: int) -> tuple[Ints, Ints]:
        """Return version (0-based) and sample number, both of shape (batch_size,), of the global batch of ``step``.

        Raises:
            ConfigError: a step outside ``0 .. total_steps - 1``.
        """
        if not 0 <= step < self.total_steps:
            raise ConfigError("step", given=step, allowed=f"0 to {self.total_steps - 1}, the steps of this stream")
        size = self.config.batch_size
        positions = np.arange(step * size, (step + 1) * size)
        if self._mixed:
            key = f"{self.config.seed}/mixed/{self.total_steps}"
            positions = permutation(key, self.total_steps * size, positions)
        return self._pooled(positions) if self.config.split == "iid" else self._temporal(positions)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Ints:
        """Return the tokens of one rank, int64 of shape (batch_size / world_size, seq_len + 1).

        Rank r gets the r-th contiguous part, so all ranks' parts in order are the same global batch for any world size.

        Raises:
            ConfigError: ``world_size`` does not divide the batch, ``rank`` is not below it, or an unknown step.
        """
        size = self.config.batch_size
        if world_size < 1 or size % world_size:
            raise ConfigError("world_size", given=world_size, allowed=f"a divisor of the batch size {size}")
        if not 0 <= rank < world_size:
            raise ConfigError("rank", given=rank, allowed=f"0 to {world_size - 1}")
        part = slice(rank * size // world_size, (rank + 1) * size // world_size)
        versions, samples = (ids[part] for ids in self.sample_ids(step))
        batch = np.empty((len(samples), len(self._window)), dtype=np.int64)
        for version, where in _groups(versions):
            first = samples[where] * self.config.seq_len
            batch[where] = self._tokens[version][first[:, None] + self._window]
        return batch

    def _temporal(self, positions: Ints) -> tuple[Ints, Ints]:
        versions = np.searchsorted(self._first_position, positions, side="right") - 1
        samples = np.empty_like(positions)
        for version, where in _groups(versions):
            samples[where] = self._ordered(
                f"temporal/{version}",
                self.samples_available[version],
                positions[where] - self._first_position[version],
            )
        return versions, samples

    def _pooled(self, positions: Ints) -> tuple[Ints, Ints]:
        pooled = self._ordered("iid", sum(self.samples_available), positions)
        versions = np.searchsorted(self._first_in_pool, pooled, side="right") - 1
        return versions, pooled - self._first_in_pool[versions]

    def _ordered(self, key: str, size: int, positions: Ints) -> Ints:
        """Map positions to samples of a text of ``size`` samples, each pass in its own order."""
        passes, offsets = np.divmod(positions, size)
        samples = np.empty_like(positions)
        for number, where in _groups(passes):
            samples[where] = permutation(f"{self.config.seed}/{key}/{number}", size, offsets[where])
        return samples

    def _count_samples(self, version: int) -> int:
        tokens, seq_len = self._tokens[version].size, self.config.seq_len
        if tokens <= seq_len:
            raise DataError(
                f"version {self._names[version]}: {tokens} tokens; one sample of seq_len {seq_len} needs {seq_len + 1}"
            )
        return int((tokens - 1) // seq_len)

    def _check_enough(self) -> None:
        rows = list(zip(self._names, self.samples_needed, self.samples_available, strict=True))
        if self.config.split == "iid":
            rows = [(" + ".join(self._names), sum(self.samples_needed), sum(self.samples_available))]
        for name, needed, available in rows:
            if needed > available:
                raise ConfigError(
                    f"steps of version {name}",
                    given=f"{needed} samples ({needed // self.config.batch_size} steps of {self.config.batch_size})",
                    allowed=f"up to {available}, all that the text has at seq_len {self.config.seq_len}, "
                    "or more passes over it with `repeat = true`",
                )


def test_windows(tokens: Tokens, seq_len: int) -> tuple[Ints, Ints]:
    """Cut tokens into windows whose targets are every token but the first, each exactly once.

    Returns inputs and targets, int64 of shape (ceil((n_tokens - 1) / seq_len), seq_len); the last window is filled up
    with input 0 and target ``IGNORED_TARGET``.

    Raises:
        DataError: fewer than two tokens, so nothing to predict.
    """
    if tokens.size < 2:
        raise DataError(f"test text: {tokens.size} tokens; allowed: at least 2, or there is nothing to predict")
    targets_count = tokens.size - 1
    shape = (-(-targets_count // seq_len), seq_len)
    inputs, targets = np.zeros(shape, dtype=np.int64), np.full(shape, IGNORED_TARGET, dtype=np.int64)
    inputs.reshape(-1)[:targets_count] = tokens[:-1]
    targets.reshape(-1)[:targets_count] = tokens[1:]
    return inputs, targets


def _starts(counts: Sequence[int]) -> Ints:
    sizes = np.array(counts, dtype=np.int64)
    return np.cumsum(sizes) - sizes


def _groups(values: Ints) -> Iterator[tuple[int, Any]]:
    """Yield each distinct value and an index of its places; a batch of one value, the usual case, costs no search."""
    if values.size and (values == values[0]).all():
        yield int(values[0]), slice(None)
        return
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)
