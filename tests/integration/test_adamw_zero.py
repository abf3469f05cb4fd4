"""PathSwitchAdamW by ds_config alone under ZeRO 0 to 3, beside torch's AdamW; and in one pass, to the same bits."""

from __future__ import annotations

import json
from typing import Any

import ds_ranks
import pytest
from same_steps import assert_same_steps

pytestmark = pytest.mark.slow

# The largest relative difference of a loss to torch's AdamW in 20 updates. Measured: fp32 1.9e-7. In bf16 and fp16 none
# here, but one weight may be rounded the other way: a weight of 2^-8 or 2^-11 of its size off, in losses near 1.
BOUNDS = {"fp32": 1e-5, "bf16": 2**-8, "fp16": 2**-11}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Both ranks' records of one job that runs everything."""
    folder = tmp_path_factory.mktemp("adamw")
    job = ds_ranks.run("worker_adamw.py", str(folder), folder=folder, timeout_seconds=500)
    assert job.returncode == 0, job.output[-4000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("stage", (0, 1, 2, 3))
def test_trains_as_torchs_adamw(records: list[dict[str, Any]], stage: int, dtype: str) -> None:
    for record in records:
        stock, ours = record[f"{stage}_{dtype}_stock"], record[f"{stage}_{dtype}_ours"]
        pairs = list(zip(stock["losses"], ours["losses"], strict=True))
        assert len(pairs) == 20
        assert max(abs(ours - stock) / stock for stock, ours in pairs) <= BOUNDS[dtype]
        assert ours["losses"][-1] < 0.75 * ours["losses"][0], "a job that does not train shows nothing"
        assert ours["skipped"] == 0


CASES = [(stage, kind, 0.3) for stage in (1, 2) for kind in ("fp32", "bf16", "fp16", "bf16_fp32-sums")]
CASES += [(1, kind, clip) for kind in ("fp32", "bf16") for clip in (0.0, 1e6)]


@pytest.mark.parametrize(("stage", "kind", "clip"), CASES)
def test_one_pass_gives_the_bits_of_deepspeeds_step(
    records: list[dict[str, Any]], stage: int, kind: str, clip: float
) -> None:
    for record in records:
        ours, one_pass = (record[f"{stage}_{kind}_{clip}_{name}"] for name in ("ours", "one_pass"))
        assert (ours["replaced"], one_pass["replaced"]) == (False, True)
        in_bf16_optimizer = stage == 1 and kind == "bf16_fp32-sums"
        assert one_pass["wrapper"] == ("BF16_Optimizer" if in_bf16_optimizer else "DeepSpeedZeroOptimizer")
        assert min(one_pass["norms"]) > 0.3, "gradients must be clipped by 0.3"
        assert_same_steps(one_pass, ours, is_clipped=clip == 0.3)


@pytest.mark.parametrize("kind", ("fp32", "bf16"))
def test_clipping_that_does_nothing_is_none(records: list[dict[str, Any]], kind: str) -> None:
    for record in records:
        bits = {clip: record[f"1_{kind}_{clip}_one_pass"]["weights"] for clip in (0.0, 0.3, 1e6)}
        assert bits[0.0] == bits[1e6] != bits[0.3]


def test_one_pass_over_padded_and_reordered_gradients(records: list[dict[str, Any]]) -> None:
    for record in records:
        stock, ours, one_pass = (record[f"aligned_{name}"] for name in ("stock", "ours", "one_pass"))
        assert (ours["replaced"], one_pass["replaced"]) == (False, True)
        assert_same_steps(one_pass, ours, is_clipped=True)
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-5)
