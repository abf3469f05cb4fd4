"""The page: self-contained, well-formed, escaped, the same every time."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from pathswitch.report import write_report
from pathswitch.report.collect import collect
from pathswitch.report.html import inline_svg, reproduce_commands

MakeRun = Callable[..., Path]
VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Checks that tags balance, and gathers ids, attributes and text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            self.attributes.append((name, value or ""))
            if name == "id":
                self.ids[value or ""] += 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data


def _page(roots: list[Path], out: Path) -> tuple[str, Page]:
    text = write_report(roots, out).read_text(encoding="utf-8")
    return text, Page(text)


@pytest.mark.slow
def test_the_page_is_whole_and_needs_nothing_else(make_run: MakeRun, tmp_path: Path) -> None:
    text, page = _page([make_run(steps=(40, 60))], tmp_path / "out/report.html")
    assert page.tags["svg"] == 4
    _check_self_contained(text, page)
    figures = sorted(file.name for file in (tmp_path / "out/figures").iterdir())
    names = ["loss-curves", "lr-paths", "perplexity-matrix", "quality-cost"]
    assert figures == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]


def _check_self_contained(text: str, page: Page) -> None:
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == 0
    assert not re.search(r"https?:|@import|//[a-z]", text)
    for name, value in page.attributes:
        if name in ("src", "href", "xlink:href"):
            assert value.startswith("#") and page.ids[value[1:]] == 1
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert page.ids[reference] == 1
    assert [name for name, count in page.ids.items() if count > 1] == []


def test_two_splits_share_the_page(make_run: MakeRun, tmp_path: Path) -> None:
    roots = [
        make_run("iid run", (40, 60), split="iid", paradigms=["path_switching", "ptfs"]),
        make_run("temporal run", (40, 60), seed=2, paradigms=["path_switching", "cpt_rewarm"]),
    ]
    text, page = _page(roots, tmp_path / "report.html")
    _check_self_contained(text, page)
    names = ["loss-curves", "perplexity-matrix", "quality-cost"]
    figures = {"lr-paths", *(f"{name}-{split}" for name in names for split in ("temporal", "iid"))}
    assert {file.name for file in (tmp_path / "figures").iterdir()} == {
        f"{n}.{k}" for n in figures for k in ("svg", "png")
    }
    assert {name for name in page.ids if name.startswith("caption-")} == {f"caption-{name}" for name in figures}
    top, by_time, iid, rest = _parts(text)
    assert "at v2, path switching is best on all text so far, path switching is best on the newest text." in top
    assert "v2 on the newest text: path switching is best" in by_time and "One seed (2)" in by_time
    assert "there is forgetting" in by_time and "so there is forgetting" not in iid
    assert "v2 on all text: path switching is best" in iid and "One seed (1)" in iid
    assert "newest text" not in iid and "Hatched" not in iid
    assert "CPT re-warmed" in by_time and "Not run: CPT re-warmed" in iid
    assert "RUN_TEMPORAL" not in text
    for once in ("<h2>Plan</h2>", "<h2>The paths</h2>", "what it does</th>"):
        assert text.count(once) == 1
    assert "run (temporal)" in rest and "run (iid)" in rest and "run (temporal, iid)" in rest


def _parts(text: str) -> list[str]:
    """Split a page of two views before each view and behind the second."""
    return re.split(r'<section class="view" id="(?:temporal|iid)">|<h2>How to read this</h2>', text)


@pytest.mark.parametrize(("split", "other"), [("temporal", "iid"), ("iid", "temporal")])
def test_a_page_of_one_split_says_how_to_make_the_other_view(
    make_run: MakeRun, tmp_path: Path, split: str, other: str
) -> None:
    text, page = _page([make_run(steps=(40,), split=split, paradigms=["ptfs"])], tmp_path / "report.html")
    assert f'set split = "{other}" in [data], run with another --out, and give both folders' in page.text
    assert 'class="view"' not in text
    assert ("so there is forgetting" in page.text) == (split == "temporal")
    assert ("newest text" in page.text) == (split == "temporal")


def test_commands_name_the_plan_of_each_split(make_run: MakeRun) -> None:
    temporal, iid = (make_run(split, (40,), split=split, paradigms=["ptfs"]) for split in ("temporal", "iid"))
    assert reproduce_commands(collect([iid, temporal]))[1:] == [
        f"pathswitch run plan-temporal.toml --out {temporal} --paradigm ptfs --seed 1",
        f"pathswitch run plan-iid.toml --out {iid} --paradigm ptfs --seed 1",
        f"pathswitch report {temporal} {iid}",
    ]


def test_the_page_says_what_was_found(make_run: MakeRun, tmp_path: Path) -> None:
    _, page = _page([make_run(paradigms=["path_switching", "cpt_rewarm"])], tmp_path / "report.html")
    assert "58.0\N{NO-BREAK SPACE}% of pre-training from scratch’s steps" in page.text
    assert "v4 on all text so far: path switching is best with perplexity" in page.text
    assert "Not run: from scratch (PTFS), CPT at the floor LR, WSD-S." in page.text
    assert "One seed (1)" in page.text
    assert "AMD EPYC 9454" in page.text
    assert "★" in page.text


@pytest.mark.slow
def test_colours_become_the_pages_own(make_run: MakeRun, tmp_path: Path) -> None:
    text, _ = _page([make_run(steps=(40, 60))], tmp_path / "report.html")
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert "var(--path_switching)" in drawings and "var(--ink)" in drawings
    assert "#0072b2" not in drawings and "#1f2430" not in drawings
    assert "prefers-color-scheme: dark" in text
    standalone = (tmp_path / "figures/lr-paths.svg").read_text(encoding="utf-8")
    assert "#0072b2" in standalone and "var(" not in standalone


def test_what_comes_from_outside_is_escaped(make_run: MakeRun, tmp_path: Path) -> None:
    root = make_run("<b>folder & co", (40,), train="<script>alert(1)</script>&.txt", paradigms=["ptfs"])
    _text, page = _page([root], tmp_path / "report.html")
    assert page.tags["script"] == page.tags["b"] == 0
    assert "<script>alert(1)</script>&.txt" in page.text
    assert "<b>folder & co" in page.text


@pytest.mark.slow
def test_the_page_is_the_same_every_time(make_run: MakeRun, tmp_path: Path) -> None:
    root = make_run(steps=(40, 60))
    one, _ = _page([root], tmp_path / "one/report.html")
    two, _ = _page([root], tmp_path / "two/report.html")
    assert one == two


def test_a_run_in_progress_is_reported_as_such(make_run: MakeRun, tmp_path: Path) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching"])
    shutil.rmtree(root / "path_switching/v2")
    _, page = _page([root], tmp_path / "report.html")
    assert "seed 1: not complete (0 of 36 steps)" in page.text
    assert page.tags["svg"] == 4


@pytest.mark.parametrize("begun", [False, True])
def test_a_run_without_any_release_still_has_its_page(make_run: MakeRun, tmp_path: Path, begun: bool) -> None:
    root = make_run(steps=(40, 60), paradigms=["ptfs"] if begun else [])
    for done in root.glob("ptfs/*/done.json"):
        done.unlink()
    _, page = _page([root], tmp_path / "report.html")
    assert "No version has been released and evaluated yet." in page.text
    assert page.tags["svg"] == (2 if begun else 1)


def test_a_diverged_run_has_its_page(make_run: MakeRun, tmp_path: Path) -> None:
    root = make_run(steps=(40,), paradigms=["ptfs"])
    evaluation = root / "ptfs/v1/evaluation.json"
    evaluation.write_text(re.sub(r'("(?:nll_nats|perplexity)": )[\d.]+', r"\1NaN", evaluation.read_text()))
    metrics = root / "ptfs/v1/metrics.jsonl"
    metrics.write_text(re.sub(r'("loss": )[\d.]+', r"\1NaN", metrics.read_text()))
    _, page = _page([root], tmp_path / "report.html")
    assert "diverged" in page.text


def test_commands_can_be_pasted(make_run: MakeRun) -> None:
    root = make_run("my runs", (40,), seed=3, paradigms=["ptfs", "wsd_s"])
    commands = reproduce_commands(collect([root]))
    assert f"pathswitch run plan.toml --out '{root}' --paradigm wsd_s --seed 3" in commands
    assert commands[-1] == f"pathswitch report '{root}'"


def test_inlining_prefixes_ids_and_references() -> None:
    svg = '<?xml?><svg width="9pt" viewBox="0 0 1 1" xmlns="x"><defs><style type="text/css">*{a}</style></defs>'
    svg += '<path id="m1"/><use xlink:href="#m1"/><g clip-path="url(#m1)" style="fill: #0072b2"/></svg>'
    page = inline_svg(svg, "fig")
    assert page.startswith('<svg viewBox="0 0 1 1" role="img"')
    assert 'id="fig-m1"' in page and 'href="#fig-m1"' in page and "url(#fig-m1)" in page
    assert "style type" not in page and "width=" not in page and "fill: var(--path_switching)" in page
