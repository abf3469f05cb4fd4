"""Which samples a path sees at each of its steps; no torch, so that a plan's data is checked before any rank starts."""

from __future__ import annotations

from pathswitch.config import PlanFile, build_plan
from pathswitch.data import Prepared, SampleStream, StreamConfig
from pathswitch.versions import Path


def path_stream(plan_file: PlanFile, path: Path, prepared: Prepared) -> SampleStream:
    """Return the samples of every step: the main path's order, or for PTFS the same samples mixed.

    Raises:
        ConfigError: a version has fewer samples than its steps need, and the plan does not say ``repeat``.
    """
    data, train, versions = plan_file.data, plan_file.train, build_plan(plan_file).versions
    assert data is not None and train is not None
    return SampleStream(
        [prepared.train_tokens(version.name) for version in versions],
        [version.steps for version in versions],
        [version.name for version in versions],
        StreamConfig(train.seed, data.seq_len, train.global_batch_size, data.split, data.repeat),
        mixed_until=path.end_step if path.paradigm == "ptfs" else None,
    )
