"""What two jobs have in common, one with DeepSpeed's own step and one with the step in one pass."""

from __future__ import annotations

from typing import Any

import pytest


def assert_same_steps(one_pass: dict[str, Any], ours: dict[str, Any], *, is_clipped: bool) -> None:
    """Compare losses and all bits of weights and moments.

    Both sum squares in float64 in their own order and round the norm to float32 once (BF16_Optimizer, which sums in
    float32, more often). At the border between two float32 numbers they may choose differently, and gradients that
    are clipped then differ in the last bit.
    """
    assert one_pass["norms"] == pytest.approx(ours["norms"], rel=2**-22, abs=0)
    if is_clipped and one_pass["norms"] != ours["norms"]:
        assert one_pass["losses"] == pytest.approx(ours["losses"], rel=2**-8)
    else:
        assert one_pass["losses"] == ours["losses"]
        assert one_pass["weights"] == ours["weights"]
