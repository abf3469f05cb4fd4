"""The command line as a user meets it: what it prints, and how it fails before anything is trained."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from pathswitch.config import build_plan, load_plan_file

COMMAND = str(Path(sys.executable).with_name("pathswitch"))
QUICKSTART = Path(__file__).parents[3] / "launch" / "quickstart.toml"


def pathswitch(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *map(str, arguments)], capture_output=True, text=True, timeout=120)


def test_plan_json_has_the_costs_of_four_equal_versions() -> None:
    plan = json.loads(pathswitch("plan", QUICKSTART, "--json").stdout)
    assert [v["fork_step"] for v in plan["versions"]] == [80, 280, 480, 680]
    assert [v["decay_steps"] for v in plan["versions"]] == [120] * 4
    assert [v["end_step"] for v in plan["versions"]] == [200, 400, 600, 800]
    cost = plan["cost"]
    assert cost["ratio_to_ptfs"] == 0.58
    assert (cost["ptfs_steps"], cost["cpt_steps"], cost["wsd_s_steps"], cost["path_switching_steps"]) == (
        2000,
        800,
        800,
        1160,
    )
    assert cost["path_switching_tokens"] == 1160 * 16 * 128


def test_plan_table_names_every_path_and_cost() -> None:
    shown = pathswitch("plan", QUICKSTART).stdout
    assert "58.0 %" in shown
    assert all(f" v{i} " in shown for i in (1, 2, 3, 4))


@pytest.mark.parametrize(("suffix", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml")])
def test_plan_plot(tmp_path: Path, suffix: str, magic: bytes) -> None:
    picture = tmp_path / f"lr.{suffix}"
    assert pathswitch("plan", QUICKSTART, "--plot", picture).returncode == 0
    assert picture.read_bytes().startswith(magic)


def test_lr_prints_the_floats_of_the_schedule() -> None:
    lines = pathswitch("lr", QUICKSTART, "--path", "v3", "--steps", "478:602").stdout.splitlines()
    lr = build_plan(load_plan_file(QUICKSTART)).path("v3").lr
    assert lines[0] == "step,lr"
    assert [line.split(",") for line in lines[1:]] == [[str(step), repr(lr(step))] for step in range(478, 602)]


def test_lr_of_a_whole_path() -> None:
    lines = pathswitch("lr", QUICKSTART).stdout.splitlines()
    assert (lines[1].partition(",")[0], lines[-1].partition(",")[0], len(lines)) == ("0", "679", 681)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lr", QUICKSTART, "--path", "v9"], "path: given 'v9'; allowed: main, v1, v2, v3, v4"),
        (["lr", QUICKSTART, "--steps", "5"], "--steps: given '5'; allowed: A:B"),
        (["lr", QUICKSTART, "--steps", "9:5"], "A <= B"),
        (["lr", QUICKSTART, "--paradigm", "pfts"], "did you mean 'ptfs'"),
        (["plan", "nowhere.toml"], "nowhere.toml"),
        (["plan", QUICKSTART, "--plot", "lr.bmp"], "lr.bmp"),
        (["compare", "nowhere"], "nowhere"),
        (["report", "nowhere"], "nowhere"),
        (["sweep", QUICKSTART, "--out", "x", "--max-lr", "fast"], "--max-lr: given 'fast'"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments: list[object], message: str) -> None:
    done = pathswitch(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("pathswitch: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr


RUN = """
[schedule]
max_lr = 3e-3
[[versions]]
name = "v1"
steps = 4
train = "train.txt"
test = "test.txt"
[data]
seq_len = 8
vocab_size = 300
[train]
global_batch_size = 4
ranks = 2
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("max_lr = 3e-3", "max_lr = nan", "[schedule] max_lr: given nan"),
        ("max_lr = 3e-3", "max_lr = 3e-3\nalpha = 0", "[schedule] alpha: given 0"),
        ("steps = 4", "steps = 0", "steps: given 0"),
        ("steps = 4", "steps = 4\nstep = 4", "unknown key 'step'"),
        ('train = "train.txt"', 'train = "gone.txt"', "gone.txt"),
        ('train = "train.txt"', 'train = "*.csv"', "*.csv"),
        ('train = "train.txt"', 'train = "empty.txt"', "empty.txt"),
        ('train = "train.txt"', 'train = "latin1.txt"', "latin1.txt"),
        ('train = "train.txt"', "", "version 'v1' train"),
        ("ranks = 2", "ranks = 3", "[train] ranks: given 3; allowed: a divisor of global_batch_size (4)"),
        ("ranks = 2", "ranks = 2\nmicro_batch_size = 3", "[train] micro_batch_size: given 3"),
        ("[train]", "[deepspeed]\nscheduler = {}\n[train]", "[deepspeed] scheduler"),
        # Only the ranks find it out.
        pytest.param("[train]", "[model]\nn_heads = 3\n[train]", "hidden_size", marks=pytest.mark.slow),
        ("steps = 4", "steps = 4000", "repeat = true"),
        ("vocab_size = 300", "vocab_size = 100", "vocab_size"),
    ],
)
def test_a_run_that_cannot_be_dies_before_training(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in RUN
    (tmp_path / "train.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (tmp_path / "test.txt").write_text("The lazy dog sleeps. " * 20)
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9 " * 100)
    plan = tmp_path / "plan.toml"
    plan.write_text(RUN.replace(old, new))
    done = pathswitch("run", plan, "--out", tmp_path / "run")
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("pathswitch: error: ") and done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not list((tmp_path / "run").rglob("metrics.jsonl"))


def test_an_output_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    plan = tmp_path / "plan.toml"
    plan.write_text(RUN)
    done = pathswitch("run", plan, "--out", tmp_path / "file" / "run")
    assert done.returncode == 2
    assert str(tmp_path / "file" / "run") in done.stderr and done.stderr.count("\n") == 1
