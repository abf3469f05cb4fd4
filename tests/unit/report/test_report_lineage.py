"""The lineage as a graph, and as JSON."""

from __future__ import annotations

import io
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from pathswitch.report.lineage import draw, to_json
from pathswitch.versions.lineage import Lineage, lineages
from pathswitch.versions.records import PrunedRecord, Record

sys.path.append(str(Path(__file__).parents[1] / "versions"))
from lineage_records import (
    all_committed,
    branch,
    chain,
    evaluation,
    folder,
    manifest,
    none_running,
    path_switching,
    release,
)


def drawn(found: tuple[Lineage, ...], width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(draw(found), soft_wrap=True, end="")
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def graph(records: list[Record]) -> list[str]:
    """Return the graph's part of each line with the path and step, without titles."""
    lines = drawn(lineages(records, all_committed, none_running)).splitlines()[2:]
    starts = [line.find("●") for line in lines]
    parts = []
    for line, start in zip(lines, starts, strict=True):
        words = line[start + 1 :].split()
        parts.append(f"{line[: start + 1]} {words[1]} {words[2]}" if start >= 0 else line)
    return parts


def test_the_main_path_is_the_trunk_and_branches_leave_it_where_they_forked() -> None:
    assert graph(path_switching()) == [
        "  ● v3 480",
        "╭─╯",
        "● main 480",
        "│ ● v2 400",
        "├─╯",
        "● main 280",
        "│ ● v1 200",
        "│ ● v1 140",
        "│ ● v1 80",
        "├─╯",
        "● main 80",
        "",
    ]


def test_forks_of_one_checkpoint_and_forks_of_forks() -> None:
    records = [
        *chain("main", [10]),
        *chain("a", [20, 30], manifest("main", 10)),
        *chain("b", [40], manifest("main", 10)),
        *chain("c", [35], manifest("a", 20)),
    ]
    assert graph(records) == [
        "  ● a 30",
        "  │ ● c 35",
        "  ├─╯",
        "  ● a 20",
        "╭─╯",
        "│ ● b 40",
        "├─╯",
        "● main 10",
        "",
    ]


def test_versions_that_continue_each_other_are_one_line() -> None:
    records = [
        *chain("v1", [10, 20], None, "wsd_s"),
        *chain("v2", [30, 40], manifest("v1", 20), "wsd_s"),
        *chain("v3", [50], manifest("v2", 40), "wsd_s"),
        *chain("x", [35], manifest("v2", 30), "wsd_s"),
    ]
    assert graph(records) == ["● v3 50", "● v2 40", "│ ● x 35", "├─╯", "● v2 30", "● v1 20", "● v1 10", ""]


def test_paths_from_scratch_stand_by_themselves() -> None:
    records = [*chain("v1", [10, 20], None, "ptfs"), *chain("v2", [30, 40], None, "ptfs")]
    assert graph(records) == ["● v2 40", "● v2 30", "", "● v1 20", "● v1 10", ""]


def test_a_fork_of_a_checkpoint_without_a_record_hangs_on_the_one_before() -> None:
    assert graph([*chain("main", [10, 30]), branch("v1", 20)]) == ["● main 30", "│ ● v1 20", "├─╯", "● main 10", ""]
    assert graph([*chain("main", [10, 30]), branch("v1", 5)]) == ["● main 30", "│ ● v1 5", "├─╯", "● main 10", ""]
    assert graph([branch("v1", 20)]) == ["● v1 20", ""]


def test_a_line_says_what_is_known_of_a_checkpoint() -> None:
    pruned = PrunedRecord(manifest("main", 80), folder("main", 80))
    found = lineages(
        [*path_switching(), pruned],
        lambda folder, manifest: "missing" if manifest.startswith("main80") else "committed",
        is_running=lambda paradigm, path: path == "v2",
    )
    text = drawn(found)
    assert text.splitlines()[:2] == ["path switching", "    manifest      path  step  next LR  tokens  state"]
    assert "│ ● v12000000000  v1     200  2.5e-5    410 k  committed  release path_switching/v1/release, " in text
    assert "perplexity v1 64.5 v2 1,234\n" in text
    assert "│ ● v24000000000  v2     400  2.5e-5    819 k  committed  running, from main 280\n" in text
    assert "│ ● v18000000000  v1      80  –             –  committed  from main 80\n" in text
    assert "●   main80000000  main    80  0.001     164 k  pruned\n" in text
    assert not any(line.endswith(" ") for line in text.splitlines())


def test_lines_are_not_wrapped_and_colours_are_for_terminals() -> None:
    found = lineages(path_switching(), all_committed, none_running)
    assert drawn(found, width=20) == drawn(found, width=200)
    assert "\x1b" not in drawn(found)
    console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
    console.print(draw(found), soft_wrap=True, end="")
    assert isinstance(console.file, io.StringIO)
    assert "\x1b[33mmain48000000" in console.file.getvalue()


def test_json_has_the_documented_keys() -> None:
    records: list[Record] = [*path_switching(), evaluation("v2", 400, {"v1": float("inf")}), release("v3", 500)]
    content = to_json(lineages(records, all_committed, lambda paradigm, path: path == "main"))
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert (content["format"], [entry["paradigm"] for entry in content["paradigms"]]) == (1, ["path_switching"])
    main, v1, v2, v3 = content["paradigms"][0]["paths"]
    assert {key: main[key] for key in main if key != "checkpoints"} == {
        "path": "main",
        "fork": None,
        "policy": None,
        "running": True,
    }
    assert v1["fork"] == {"path": "main", "step": 80, "manifest": manifest("main", 80)}
    assert (v1["policy"], v1["running"]) == ({"decay_steps": 120}, False)
    assert v1["checkpoints"][-1] == {
        "manifest": manifest("v1", 200),
        "step": 200,
        "state": "committed",
        "folder": folder("v1", 200),
        "parent": manifest("v1", 140),
        "next_lr": 2.5e-5,
        "samples_seen": 3200,
        "tokens_seen": 409600,
        "releases": [{"folder": "path_switching/v1/release", "digest": "f" * 64}],
        "evaluations": [{"v1": 64.5, "v2": 1234.5}],
    }
    assert v1["checkpoints"][0]["next_lr"] is None
    assert v2["checkpoints"][0]["evaluations"] == [{"v1": None}]
    assert (v3["checkpoints"][-1]["state"], v3["checkpoints"][-1]["folder"]) == ("unrecorded", None)


def test_a_long_path_is_drawn_in_full_and_in_time() -> None:
    found = lineages(chain("main", list(range(20_000))), all_committed, none_running)
    start = time.perf_counter()
    assert drawn(found).count("●") == 20_000
    assert time.perf_counter() - start < 5
