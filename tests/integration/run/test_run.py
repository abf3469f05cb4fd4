"""What a plan's paths train: exact LRs, the same samples and the same bits on both sides of a fork, releases."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from run_harness import STEPS, Write, assert_same_bits, checkpoint, metrics, pathswitch

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("paradigm", "path"),
    [
        ("path_switching", "main"),
        ("path_switching", "v1"),
        ("path_switching", "v2"),
        ("cpt_rewarm", "v1"),
        ("cpt_rewarm", "v2"),
    ],
)
def test_the_lr_of_every_update_is_the_plans(two_versions: Path, paradigm: str, path: str) -> None:
    expected = pathswitch("lr", two_versions / "plan.toml", "--path", path, "--paradigm", paradigm).stdout
    used = "".join(f"{row['step']},{row['lr']!r}\n" for row in metrics(two_versions / paradigm, path))
    assert "step,lr\n" + used == expected


def test_a_branch_begins_with_the_main_paths_next_update(two_versions: Path) -> None:
    """Same weights, same moments, same samples, same LR: the first update behind the fork is the main path's own."""
    main = {row["step"]: row for row in metrics(two_versions / "path_switching", "main")}
    fork = metrics(two_versions / "path_switching", "v1")[0]
    assert fork["step"] == 4
    assert main[4] == fork
    second = metrics(two_versions / "path_switching", "v1")[1]
    assert second["loss"] == main[5]["loss"] and second["lr"] < main[5]["lr"]


def test_a_release_is_what_was_evaluated(two_versions: Path) -> None:
    """The exported folder, read by transformers, has the perplexity of evaluation.json."""
    from transformers import LlamaForCausalLM

    from pathswitch.data import load_prepared, test_windows

    folder = two_versions / "path_switching" / "v2"
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["step"] == 2 * STEPS
    assert sorted(evaluation["test_sets"]) == ["v1", "v2"]
    inputs, targets = test_windows(load_prepared(two_versions / "data").test_tokens("v1"), 32)
    model = LlamaForCausalLM.from_pretrained(folder / "release").eval()
    with torch.no_grad():
        logits = model(torch.from_numpy(inputs)).logits.double()
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten(), reduction="sum")
    scored = int(np.sum(targets != -100))
    entry = evaluation["test_sets"]["v1"]
    assert entry["tokens"] == scored
    assert np.exp(nll.item() / scored) == pytest.approx(entry["perplexity"], rel=1e-5)


def test_run_again_does_nothing(two_versions: Path, corpus: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in two_versions.rglob("*") if "path_switching" in file.parts}
    again = pathswitch("run", corpus / "two.toml", "--out", two_versions)
    assert again.returncode == 0
    assert again.stdout.count("done already") == 3
    assert {file: file.stat().st_mtime_ns for file in before} == before


def test_compare_and_report_of_a_real_run(two_versions: Path) -> None:
    compared = pathswitch("compare", two_versions, "--json")
    assert compared.returncode == 0, compared.stderr
    text = compared.stdout
    assert json.loads(text)
    assert "path_switching" in text and "cpt_rewarm" in text
    page = two_versions / "report.html"
    done = pathswitch("report", two_versions)
    assert done.returncode == 0, done.stderr
    assert "<svg" in page.read_text()


def test_a_version_more_continues_what_was_trained(write_plan: Write, two_versions: Path, tmp_path: Path) -> None:
    """Two versions, then a third in the same folder: nothing trained changes, and the bits are those of one plan."""
    grown, whole = tmp_path / "grown", tmp_path / "whole"
    subprocess.run(["cp", "-r", str(two_versions), str(grown)], check=True)
    before = {
        file: file.read_bytes()
        for v in ("v1", "v2")
        for file in (grown / "path_switching" / v).rglob("*")
        if file.is_file()
    }
    three = write_plan("three", versions=3)
    for out in (grown, whole):
        done = pathswitch("run", three, "--out", out)
        assert done.returncode == 0, done.stdout + done.stderr
    assert {file: file.read_bytes() for file in before} == before
    for path, end in (("main", 24), ("v3", 30)):
        assert metrics(grown / "path_switching", path) == metrics(whole / "path_switching", path)
        assert_same_bits(
            checkpoint(grown / "path_switching", path, end), checkpoint(whole / "path_switching", path, end)
        )


def test_zero_3_in_bf16_trains_evaluates_and_exports(write_plan: Write, tmp_path: Path) -> None:
    plan = write_plan(
        "zero3",
        versions=1,
        deepspeed="zero_optimization = { stage = 3 }\nbf16 = { enabled = true }\n"
        f'csv_monitor = {{ enabled = true, output_path = "{tmp_path}/csv", job_name = "job" }}',
    )
    out = tmp_path / "run"
    done = pathswitch("run", plan, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    release = out / "path_switching" / "v1" / "release"
    assert (release / "model.safetensors").stat().st_size > 10_000
    assert json.loads((out / "path_switching/v1/evaluation.json").read_text())["test_sets"]["v1"]["perplexity"] < 500
    logged = (tmp_path / "csv" / "job" / "Train_Samples_lr.csv").read_text()
    assert repr(metrics(out / "path_switching", "main")[-1]["lr"]) in logged
    assert any("perplexity" in file.name for file in (tmp_path / "csv" / "job").rglob("*"))
