"""How a batch is shared out among the ranks that there really are."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pathswitch.config.sections import TrainSection
from pathswitch.errors import ConfigError
from pathswitch.trainer.engine import micro_batch


@pytest.mark.parametrize(
    ("most", "ranks", "size"),
    [(None, 1, 24), (None, 2, 12), (None, 8, 3), (6, 2, 6), (6, 4, 6), (6, 8, 3), (5, 2, 4), (4, 24, 1)],
)
def test_micro_batch(most: int | None, ranks: int, size: int) -> None:
    """The largest divisor of a rank's share that is at most micro_batch_size."""
    train = TrainSection.model_construct(global_batch_size=24, micro_batch_size=most)
    assert micro_batch(train, ranks) == size


def test_ranks_that_do_not_divide_the_batch() -> None:
    message = r"the number of ranks of this job: given 5; allowed: a divisor of \[train\] global_batch_size \(24\)"
    with pytest.raises(ConfigError, match=message):
        micro_batch(TrainSection(global_batch_size=24), 5)
