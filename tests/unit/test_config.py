"""The plan file: what it accepts, and one clear error for whatever it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from pathswitch.config import build_plan, load_plan_file, plan_from_params
from pathswitch.errors import ConfigError

GOOD = """
[schedule]
max_lr = 3e-3
warmup_steps = 20
alpha = 0.6

[[versions]]
name = "v1"
steps = 200

[[versions]]
name = "v2"
steps = 100

[data]
seq_len = 128

[train]
global_batch_size = 16
"""


def load(tmp_path: Path, text: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(text)
    load_plan_file(file)


def test_a_plan_resolves(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(GOOD)
    plan_file = load_plan_file(file)
    plan = build_plan(plan_file)
    assert plan.fork_steps == (80, 240)
    assert plan_file.tokens_per_step == 2048
    assert plan.floor_lr == pytest.approx(3e-4)


@pytest.mark.parametrize(
    ("old", "new", "place", "message"),
    [
        ("max_lr = 3e-3", "maxlr = 3e-3", "[schedule] maxlr", "did you mean 'max_lr'"),
        ("max_lr = 3e-3", "", "[schedule] max_lr", "this key is required"),
        ("max_lr = 3e-3", "max_lr = nan", "[schedule] max_lr", "finite LR > 0"),
        ("max_lr = 3e-3", "max_lr = inf", "[schedule] max_lr", "finite LR > 0"),
        ("max_lr = 3e-3", "max_lr = '3e-3'", "[schedule] max_lr", "finite LR > 0"),
        ("max_lr = 3e-3", "max_lr = 0.0", "[schedule] max_lr", "finite LR > 0"),
        ("alpha = 0.6", "alpha = 0", "[schedule] alpha", "0 < alpha <= 1"),
        ("alpha = 0.6", "alpha = 1.5", "[schedule] alpha", "0 < alpha <= 1"),
        ("warmup_steps = 20", "warmup_steps = 81", "[schedule] warmup_steps", "at most the first fork step (80)"),
        ("warmup_steps = 20", "warmup_steps = 2.5", "[schedule] warmup_steps", "whole number"),
        ("alpha = 0.6", "shape = 'cos'", "[schedule] shape", "did you mean 'cosine'"),
        ("alpha = 0.6", "power = 2.0", "[schedule] power", "no parameters beside shape 'cosine'"),
        ("alpha = 0.6", "final_lr = 1.0", "[schedule] final_lr", "final_lr <= max_lr"),
        ("alpha = 0.6", "shape = 'harmonic'", "[schedule] final_lr", "cannot reach 0"),
        ("alpha = 0.6", "shape = 'multi_step'\nfinal_lr = 1e-4", "[schedule] final_lr", "no final_lr"),
        ('name = "v2"', 'name = "v1"', "[[versions]] name", "stands twice"),
        ('name = "v2"', 'name = "main"', "[[versions]] name", "any name but 'main'"),
        ('name = "v2"', 'name = "../v2"', "[[versions]] number 2", "letters, digits"),
        ("steps = 100", "steps = 0", "[[versions]] number 2 ('v2') steps", "a whole number >= 1"),
        ("steps = 100", "", "version 'v2' steps, tokens", "exactly one of"),
        ("steps = 100", "steps = 100\ntokens = 4096", "version 'v2' steps, tokens", "exactly one of"),
        ("steps = 100", "tokens = 2047", "version 'v2' tokens", "at least the 2048 tokens"),
        ("steps = 100", "steps = 100\nalpha = 0.5\ndecay_steps = 3", "version 'v2' decay_steps", "either alpha or"),
        ("steps = 100", "steps = 100\nalpha = 1.5", "[[versions]] number 2 ('v2') alpha", "0 < alpha <= 1"),
        ("steps = 100", "steps = 100\ndecay_steps = 101", "version 'v2' decay_steps", "1 <= decay_steps <= steps"),
        ("steps = 100", "steps = 100\ntrian = 'x'", "[[versions]] number 2 ('v2') trian", "did you mean 'train'"),
        ("steps = 100", "steps = 100\ntrain = 3", "[[versions]] number 2 ('v2') train", "a file name or a list"),
        ("seq_len = 128", "seq_len = 0", "[data] seq_len", "whole number"),
        ("seq_len = 128", "seq_len = 128\nsplit = 'iit'", "[data] split", "'temporal' or 'iid'"),
        ("[train]", "[train]\nbetas = [0.9]", "[train] betas", "beta1, beta2"),
        ("[train]", "[deepspeed]\nfp16 = { enabled = true }\n[train]", "[deepspeed] fp16", "bf16, or neither"),
        ("[train]", "[deepspeed]\nscheduler = {}\n[train]", "[deepspeed] scheduler", "follow from [train]"),
        ("[train]", "[trian]", "[trian]", "did you mean 'train'"),
        ("[schedule]", "[schedule", "plan.toml", "TOML"),
    ],
)
def test_what_does_not_fit_is_named_with_its_place(
    tmp_path: Path, old: str, new: str, place: str, message: str
) -> None:
    assert old in GOOD
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD.replace(old, new))
    text = str(error.value)
    assert place in text and str(tmp_path / "plan.toml") in text
    assert message in text
    assert "\n" not in text


@pytest.mark.parametrize(
    ("train", "message"),
    [("ranks = 3", "[train] ranks: given 3"), ("micro_batch_size = 3", "micro_batch_size: given 3")],
)
def test_the_batch_must_be_shared_out_evenly(tmp_path: Path, train: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, GOOD + train)
    assert message in str(error.value)


def test_a_missing_plan_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml.*No such file"):
        load_plan_file(tmp_path / "nowhere.toml")


def test_tokens_are_whole_steps(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(GOOD.replace("steps = 100", "tokens = 206_847"))
    assert build_plan(load_plan_file(file)).versions[1].steps == 100


def test_versions_may_decay_in_their_own_way(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(GOOD.replace("steps = 100", "steps = 100\nalpha = 0.25\nshape = 'polynomial'\npower = 3.0"))
    first, second = build_plan(load_plan_file(file)).versions
    assert (first.decay_steps, first.shape.name) == (120, "cosine")
    assert (second.decay_steps, second.shape) == (25, second.shape)
    assert second.shape.multiplier()(0.5) == 0.125


def test_inline_parameters_are_the_same_keys(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(GOOD)
    versions = [{"name": "v1", "steps": 200}, {"name": "v2", "steps": 100}]
    inline = plan_from_params({"max_lr": 3e-3, "warmup_steps": 20, "alpha": 0.6, "versions": versions})
    assert inline == build_plan(load_plan_file(file))
    with pytest.raises(
        ConfigError, match=r"PathSwitchLR parameters: \[schedule\] warmup: .*did you mean 'warmup_steps'"
    ):
        plan_from_params({"max_lr": 3e-3, "warmup": 20})


def test_a_main_path_needs_no_versions() -> None:
    assert plan_from_params({"max_lr": 3e-3}).path("main").lr(10**9) == 3e-3
