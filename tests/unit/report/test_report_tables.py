"""What the terminal shows."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from report_runs import plan_text, scored, write_json, write_run
from rich.console import Console, RenderableType

from pathswitch.config import build_plan, load_plan_file
from pathswitch.report import wording
from pathswitch.report.collect import collect
from pathswitch.report.tables import comparison_tables, plan_table

MakeRun = Callable[..., Path]


def _printed(renderable: RenderableType, width: int = 80) -> list[str]:
    file = io.StringIO()
    Console(file=file, width=width).print(renderable)
    return file.getvalue().splitlines()


def _row(lines: list[str], *begin: str) -> list[str]:
    """Return the cells of the first line that begins with these words."""
    return next(line.split() for line in lines if line.split()[: len(begin)] == list(begin))


def test_plan_table_shows_every_path_and_every_cost(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(plan_text((200, 200, 200, 200)), encoding="utf-8")
    lines = _printed(plan_table(build_plan(load_plan_file(tmp_path / "plan.toml")), 2048))
    assert _row(lines, "main") == ["main", "–", "–", "680", "680", "1.39", "M"]
    assert _row(lines, "v2") == ["v2", "280", "120", "400", "120", "246", "k"]
    assert _row(lines, "path", "switching")[2:] == ["1,160", "2.38", "M", "58.0", "%"]
    assert _row(lines, "from", "scratch")[3:] == ["2,000", "4.1", "M", "100.0", "%"]
    assert _row(lines, "WSD-S")[1:] == ["800", "1.64", "M", "40.0", "%"]


def test_plan_table_without_tokens_and_without_versions(tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(plan_text((200,)), encoding="utf-8")
    assert _row(_printed(plan_table(build_plan(load_plan_file(tmp_path / "plan.toml")), None)), "v1")[-1] == "–"
    (tmp_path / "plan.toml").write_text("[schedule]\nmax_lr = 1e-3\n", encoding="utf-8")
    assert "no versions yet" in _printed(plan_table(build_plan(load_plan_file(tmp_path / "plan.toml")), None))[0]


@pytest.mark.parametrize("steps", [(200, 200, 200, 200), (100,) * 10])
def test_nothing_is_wider_than_80_columns_or_cut_off(make_run: MakeRun, steps: tuple[int, ...]) -> None:
    lines = _printed(comparison_tables(collect([make_run(steps=steps)])))
    assert max(map(len, lines)) <= 80
    assert "…" not in "\n".join(lines).replace("(…)", "")


def test_the_best_of_each_version_has_the_star(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["path_switching", "cpt_rewarm"])
    lines = _printed(comparison_tables(collect([root])))
    assert _row(lines, "v2", "path", "switching")[4] == "*"
    write_json(
        root / "cpt_rewarm/v2/evaluation.json",
        {"step": 100, "test_sets": {"v1": scored(3.0 * 20_000), "v2": scored(3.0 * 20_000)}},
    )
    lines = _printed(comparison_tables(collect([root])))
    assert "*" not in _row(lines, "v2", "path", "switching")
    assert _row(lines[lines.index(next(x for x in lines if x.startswith(" v2"))) :], "CPT")[2:6] == [
        "20.1",
        "*",
        "20.1",
        "*",
    ]


def test_matrix_brackets_text_that_a_version_has_not_seen(make_run: MakeRun) -> None:
    lines = _printed(comparison_tables(collect([make_run(steps=(40, 60), paradigms=["ptfs"])])))
    rows = [line.split() for line in lines[next(i for i, x in enumerate(lines) if "each version’s test" in x) :]]
    first, second = (next(row for row in rows if row[:1] == [name]) for name in ("v1", "v2"))
    assert first[2].startswith("(") and not first[1].startswith("(")
    assert not any(cell.startswith("(") for cell in second)


def test_incomplete_paths_and_paradigms_not_run_are_named(make_run: MakeRun) -> None:
    root = make_run(steps=(40, 60), paradigms=["ptfs"])
    (root / "ptfs/v2/done.json").unlink()
    text = "\n".join(_printed(comparison_tables(collect([root]))))
    assert "from scratch (PTFS), v2, seed 1: not complete (100 of 100 steps)" in text
    assert "Not run: path switching, CPT re-warmed, CPT at the floor LR, WSD-S." in text


def test_each_split_has_its_heading_and_its_columns(make_run: MakeRun) -> None:
    roots = [make_run(split, (40, 60), split=split) for split in ("iid", "temporal")]
    lines = _printed(comparison_tables(collect(roots)))
    by_time, iid = (
        next(i for i, x in enumerate(lines) if x.startswith(f"Text split {y}")) for y in ("by time", "i.i.d.")
    )
    assert by_time == 0 < iid
    assert any("all text so far   newest text" in line for line in lines[:iid])
    assert not any("newest" in line or "(…)" in line or "so far" in line for line in lines[iid:])
    # What is in brackets is text of a kind that the version has not seen.
    assert any(re.match(r" v\d.*\(\d", line) for line in lines[:iid])
    assert not any(re.match(r" v\d.*\(\d", line) for line in lines[iid:])


def test_every_paradigm_has_a_row_at_every_version(make_run: MakeRun) -> None:
    lines = _printed(comparison_tables(collect([make_run(steps=(40, 60))])))
    begin, end = (
        next(i for i, x in enumerate(lines) if word in x) for word in ("Perplexity, and", "each version’s test")
    )
    rows = [line[10:].split("  ")[0].strip() for line in lines[begin + 4 : end] if line.strip()]
    assert rows == list(wording.SHORT_LABELS.values()) * 2


def test_notes_are_paragraphs(tmp_path: Path) -> None:
    lines = _printed(comparison_tables(collect(_two_seeds(tmp_path, (4.0, 4.2), (4.1, 4.3)))))
    first = next(i for i, x in enumerate(lines) if x.startswith("Lower is better."))
    assert lines[first : first + 2] == [
        "Lower is better. * the best of its version; where several have a star, the seeds",
        "do not tell them apart.",
    ]
    wide = _printed(comparison_tables(collect(_two_seeds(tmp_path / "b", (4.0, 4.2), (4.1, 4.3)))), width=200)
    assert any(x.startswith("Lower") and x.endswith("do not tell them apart.") for x in wide)


def _two_seeds(tmp_path: Path, ours: tuple[float, float], theirs: tuple[float, float]) -> list[Path]:
    roots = []
    for seed, our_nats, their_nats in zip((1, 2), ours, theirs, strict=True):
        plan = plan_text((40,), seed=seed)
        root = write_run(
            tmp_path / f"{our_nats} {their_nats} {seed}", plan, ["path_switching", "cpt_rewarm"], seed=seed
        )
        for paradigm, nats in (("path_switching", our_nats), ("cpt_rewarm", their_nats)):
            write_json(root / paradigm / "v1/evaluation.json", {"step": 40, "test_sets": {"v1": scored(nats * 20_000)}})
        roots.append(root)
    return roots


def test_the_verdict_follows_the_numbers_whoever_wins(tmp_path: Path) -> None:
    better = wording.findings(*collect(_two_seeds(tmp_path, (4.0, 4.1), (4.3, 4.4))))
    assert better[0].startswith("v1 on all text so far: path switching is best with perplexity 57.5")
    assert "lower, for 0.0 % more steps" in better[2]
    worse = wording.findings(*collect(_two_seeds(tmp_path, (4.3, 4.4), (4.0, 4.1))))
    assert worse[0].startswith("v1 on all text so far: CPT re-warmed is best with perplexity 57.5")
    assert "higher" in worse[2]
    equal = wording.findings(*collect(_two_seeds(tmp_path, (4.0, 4.2), (4.1, 4.3))))
    assert "cannot be told apart within the range over seeds" in equal[0]
    assert "within the range over seeds" in equal[2]


def test_overlapping_seeds_share_the_star(tmp_path: Path) -> None:
    lines = _printed(comparison_tables(collect(_two_seeds(tmp_path, (4.0, 4.2), (4.1, 4.3)))))
    assert _row(lines, "v1", "path")[4] == _row(lines, "CPT", "re-warmed")[3] == "*"
    assert any("54.6–66.7" in line for line in lines)
    lines = _printed(comparison_tables(collect(_two_seeds(tmp_path, (4.0, 4.2), (4.3, 4.4)))))
    assert "*" not in _row(lines, "CPT", "re-warmed")


def test_headline_is_a_fact_of_the_plan(make_run: MakeRun) -> None:
    (comparison,) = collect([make_run(paradigms=["cpt_rewarm"])])
    assert wording.headline(comparison).startswith("Four versions by path switching: 58.0 % of pre-training")
    assert wording.headline(*collect([make_run("one", (40,))])).startswith("One version by path switching: 100.0 %")


@pytest.mark.parametrize(
    ("value", "text"), [(8.431, "8.43"), (100.61, "100.6"), (1234.5, "1,234"), (float("nan"), "diverged")]
)
def test_perplexity_format(value: float, text: str) -> None:
    assert wording.perplexity(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.0, "0"), (3e-3, "0.003"), (2.5e-5, "2.5e-5"), (3e-10, "3e-10")])
def test_learning_rates_have_no_padding(value: float, text: str) -> None:
    assert wording.learning_rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(8.431, "8.43"), (99.96, "100"), (1234.5, "1.2k"), (99_999.0, "100k"), (1e300, "huge")]
)
def test_compact_numbers_have_at_most_four_characters(value: float, text: str) -> None:
    assert wording.compact(value) == text
