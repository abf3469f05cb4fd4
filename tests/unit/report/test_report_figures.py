"""Figures: deterministic, complete, and clear about what is missing."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_runs import plan_text

from pathswitch.config import build_plan, load_plan_file
from pathswitch.errors import ConfigError, PathSwitchError
from pathswitch.report import plots, write_report
from pathswitch.report.collect import collect
from pathswitch.report.curves import bucketed, smoothed
from pathswitch.versions import Plan

MakeRun = Callable[..., Path]


def _plan(tmp_path: Path, **arguments: Any) -> Plan:
    (tmp_path / "plan.toml").write_text(plan_text(**arguments), encoding="utf-8")
    return build_plan(load_plan_file(tmp_path / "plan.toml"))


def _texts(file: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", file.read_text(encoding="utf-8"))


@pytest.mark.parametrize("steps", [(50,), (40, 60), (400, 90, 1200, 60, 700), (50,) * 10])
def test_lr_paths_name_every_version(tmp_path: Path, steps: tuple[int, ...]) -> None:
    file = tmp_path / "lr.svg"
    plots.lr_paths(_plan(tmp_path, steps=steps), file, file.with_suffix(".png"), tokens_per_step=2048)
    texts = _texts(file)
    for number in range(1, len(steps) + 1):
        assert f"v{number}" in texts
    assert "tokens of the main path" in texts
    assert file.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_lr_axis_has_no_offset_and_tokens_only_when_known(tmp_path: Path) -> None:
    plots.lr_paths(_plan(tmp_path, steps=(40, 60), max_lr=2e-5), tmp_path / "lr.svg")
    texts = _texts(tmp_path / "lr.svg")
    assert "2e-5" in texts and "1e-5" in texts
    assert "tokens of the main path" not in texts


@pytest.mark.slow
def test_the_same_input_gives_the_same_bytes(make_run: MakeRun, tmp_path: Path) -> None:
    (comparison,) = collect([make_run(steps=(40, 60))])
    for draw in (plots.loss_curves, plots.quality_cost, plots.perplexity_matrix):
        one, two = tmp_path / "one.svg", tmp_path / "two.svg"
        draw(comparison, one)
        draw(comparison, two)
        assert one.read_bytes() == two.read_bytes()
        assert b"<dc:date>" not in one.read_bytes()


def test_matrix_hatches_exactly_the_text_of_later_versions(make_run: MakeRun, tmp_path: Path) -> None:
    (comparison,) = collect([make_run(steps=(40, 60, 40), paradigms=["ptfs"])])
    plots.perplexity_matrix(comparison, tmp_path / "matrix.svg")
    assert len(re.findall(r"fill: url\(#", (tmp_path / "matrix.svg").read_text())) == 3


def test_one_pool_of_text_has_no_newest_text_and_no_hatching(make_run: MakeRun, tmp_path: Path) -> None:
    (comparison,) = collect([make_run(steps=(40, 60, 40), split="iid", paradigms=["ptfs", "wsd_s"])])
    plots.perplexity_matrix(comparison, tmp_path / "matrix.svg")
    assert not re.findall(r"fill: url\(#", (tmp_path / "matrix.svg").read_text())
    plots.quality_cost(comparison, tmp_path / "quality.svg")
    titles = [text for text in _texts(tmp_path / "quality.svg") if text.startswith("v3 on")]
    assert titles == ["v3 on all text"]


def test_what_cannot_be_drawn_is_refused(make_run: MakeRun, tmp_path: Path) -> None:
    (empty,) = collect([make_run(steps=(40, 60), paradigms=[])])
    for draw in (plots.loss_curves, plots.quality_cost, plots.perplexity_matrix):
        with pytest.raises(PathSwitchError, match=r"no version has been|no update of any path"):
            draw(empty, tmp_path / "x.svg")
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        plots.lr_paths(empty.plan, tmp_path / "x.pdf")
    with pytest.raises(ConfigError, match="at least one version"):
        plots.lr_paths(_without_versions(tmp_path), tmp_path / "x.svg")
    assert not list(tmp_path.glob("x.*"))


def _without_versions(tmp_path: Path) -> Plan:
    (tmp_path / "empty.toml").write_text("[schedule]\nmax_lr = 1e-3\n", encoding="utf-8")
    return build_plan(load_plan_file(tmp_path / "empty.toml"))


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_names_the_extra(
    make_run: MakeRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    root, real_import = make_run(steps=(40,), paradigms=["ptfs"]), builtins.__import__

    def without(name: str, *arguments: Any, **keywords: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real_import(name, *arguments, **keywords)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(PathSwitchError, match=rf"{package}: pip install 'pathswitch\[report\]'"):
        write_report([root], tmp_path / "report.html")


def test_importing_the_room_needs_neither_package_nor_torch() -> None:
    code = "import sys, pathswitch.report; print([m for m in ('matplotlib', 'jinja2') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_smoothing_keeps_a_straight_line_and_its_ends() -> None:
    line = {step: 5.0 - 0.01 * step for step in range(100)}
    steps, values = smoothed(line)
    assert steps == list(range(100))
    assert values == pytest.approx(list(line.values()))
    noisy = {step: float(step % 2) for step in range(200)}
    assert max(smoothed(noisy)[1][10:-10]) < 0.6
    assert smoothed({7: 3.0}) == ([7.0], [3.0])


def test_long_curves_are_thinned_by_averaging() -> None:
    steps, values = bucketed({step: float(step) for step in range(10)}, max_points=5)
    assert steps == values == [0.5, 2.5, 4.5, 6.5, 8.5]
