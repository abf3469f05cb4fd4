"""The tree that records tell of: who left whom where, and which of several checkpoints is meant."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from lineage_records import (
    all_committed,
    branch,
    chain,
    checkpoint,
    evaluation,
    folder,
    manifest,
    none_running,
    path_switching,
    release,
)

from pathswitch.versions.lineage import FolderState, Fork, Lineage, LineagePath, StateOf, lineages
from pathswitch.versions.records import PlanRecord, PrunedRecord, Record


def only_lineage(records: list[Record], state_of: StateOf = all_committed) -> Lineage:
    (found,) = lineages(records, state_of, none_running)
    return found


def paths_of(records: list[Record], state_of: StateOf = all_committed) -> dict[str, LineagePath]:
    return {path.name: path for path in only_lineage(records, state_of).paths}


def shown(path: LineagePath) -> list[tuple[int, str, str]]:
    return [(node.step, node.manifest, node.state) for node in path.nodes]


def states(of: dict[str, FolderState]) -> StateOf:
    """Return the state of manifests by what they begin with; the others are committed."""

    def state_of(folder: str, manifest: str) -> FolderState:
        return next((state for start, state in of.items() if manifest.startswith(start)), "committed")

    return state_of


def test_path_switching_has_a_main_path_and_branches_where_they_left() -> None:
    found = only_lineage(path_switching())
    assert [path.name for path in found.paths] == ["main", "v1", "v2", "v3"]
    steps = [[node.step for node in path.nodes] for path in found.paths]
    assert steps == [[80, 280, 480], [80, 140, 200], [400], [480]]
    assert [path.fork for path in found.paths] == [
        None,
        Fork("main", 80, manifest("main", 80)),
        Fork("main", 280, manifest("main", 280)),  # in place: from the parent of its first checkpoint
        Fork("main", 480, manifest("main", 480)),
    ]
    assert [path.branch is not None for path in found.paths] == [False, True, False, True]
    released = found.paths[1].nodes[-1]
    assert [r.digest for r in released.releases] == ["f" * 64]
    assert [e.perplexity for e in released.evaluations] == [{"v1": 64.5, "v2": 1234.5}]
    assert not any(node.releases for path in found.paths for node in path.nodes if node is not released)


def test_the_order_of_the_records_makes_no_difference() -> None:
    records = [
        *path_switching(),
        checkpoint("main", 280, manifest("main", 80), take="again"),
        checkpoint("v1", 140, manifest("main", 80)),
        branch("v1", 80, take="again"),
        evaluation("v1", 200, {"v3": float("nan")}),
        evaluation("v9", 200, {"v3": 1.0}),
        release("v9", 220),
    ]
    expected = repr(only_lineage(records))
    dice = random.Random(1)
    for _ in range(50):
        dice.shuffle(records)
        assert repr(only_lineage(records)) == expected


@pytest.mark.parametrize("paradigm", ["cpt_rewarm", "cpt_floor", "wsd_s"])
def test_versions_that_continue_each_other(paradigm: str) -> None:
    records = [
        *chain("v1", [100, 200], None, paradigm),
        *chain("v2", [300, 400], manifest("v1", 200), paradigm),
        *chain("v10", [500], manifest("v2", 400), paradigm),
    ]
    paths = paths_of(records)
    assert list(paths) == ["v1", "v2", "v10"]
    assert [path.fork and (path.fork.path, path.fork.step) for path in paths.values()] == [
        None,
        ("v1", 200),
        ("v2", 400),
    ]


def test_paradigms_of_one_ledger_are_kept_apart() -> None:
    # The same manifest in two paradigms is no relation between them.
    records = [
        *chain("v2", [400], None, "ptfs"),
        *chain("v1", [200], None, "ptfs"),
        *chain("v3", [600], manifest("v2", 400), "wsd_s"),
        *chain("v1", [100], None, "of another release"),
        *path_switching(),
    ]
    running = {("ptfs", "v2")}
    found = lineages(records, all_committed, lambda paradigm, path: (paradigm, path) in running)
    assert [lineage.paradigm for lineage in found] == ["path_switching", "ptfs", "wsd_s", "of another release"]
    assert [(path.name, path.fork, path.running) for path in found[1].paths] == [
        ("v1", None, False),
        ("v2", None, True),
    ]
    assert [path.fork for path in found[2].paths] == [None]
    assert not any(path.running for lineage in found[::2] for path in lineage.paths)


def test_a_checkpoint_that_was_saved_again_after_a_resume_is_shown_as_it_is_now() -> None:
    again = checkpoint("main", 280, manifest("main", 80), take="again")
    for replaced, expected in (("main280", again.manifest), ("again", manifest("main", 280))):
        paths = paths_of([*path_switching(), again], states({replaced: "replaced"}))
        assert shown(paths["main"])[1] == (280, expected, "committed")
        assert len(paths["main"].nodes) == 3
        # What left the one before still left it there.
        assert paths["v2"].fork == Fork("main", 280, manifest("main", 280))


def test_a_step_does_not_vanish_where_the_ledger_does_not_know_what_is_there_now() -> None:
    paths = paths_of(path_switching(), states({"main280": "replaced"}))
    assert shown(paths["main"])[1] == (280, manifest("main", 280), "replaced")


def test_pruned_says_why_a_checkpoint_is_missing_and_no_more() -> None:
    pruned = [PrunedRecord(manifest("main", step), folder("main", step)) for step in (80, 280)]
    elsewhere = PrunedRecord(manifest("main", 480), "another folder")
    state_of = states({"main80": "missing", "main280": "damaged", "main480": "missing"})
    paths = paths_of([*path_switching(), *pruned, elsewhere], state_of)
    assert [node.state for node in paths["main"].nodes] == ["pruned", "damaged", "missing"]
    assert [node.state for node in paths_of([*path_switching(), *pruned])["main"].nodes] == ["committed"] * 3


def test_of_what_is_gone_the_checkpoint_that_the_path_went_on_from_is_shown() -> None:
    for take in ("a", "z"):
        other = checkpoint("main", 280, manifest("main", 80), take=take)
        paths = paths_of([*path_switching(), other], states({"main280": "missing", take: "missing"}))
        assert shown(paths["main"])[1] == (280, manifest("main", 280), "missing")


def test_the_same_step_in_two_folders_is_shown_twice() -> None:
    copy = replace(checkpoint("main", 280, None, take="copy"), folder="/backup/global_step280")
    assert len(paths_of([*path_switching(), copy])["main"].nodes) == 4


def test_one_checkpoint_that_was_recorded_with_two_parents_is_one() -> None:
    records = [*path_switching(), checkpoint("v2", 400, None), checkpoint("v1", 80, None)]
    paths = paths_of(records)
    assert len(paths["v2"].nodes) == 1
    assert paths["v2"].fork == Fork("main", 280, manifest("main", 280))
    assert [node.record.kind for node in paths["v1"].nodes if node.record] == ["checkpoint"] * 3


def test_of_two_forks_the_one_that_is_there_counts() -> None:
    later = branch("v1", 280)
    for gone, expected in (("v1280", 80), ("v180", 280), ("nothing", 280)):
        fork = paths_of([*path_switching(), later], states({gone: "missing"}))["v1"].fork
        assert fork is not None and fork.step == expected


def test_a_fork_may_have_the_manifest_of_what_it_was_forked_from() -> None:
    records = [
        *path_switching(),
        *chain("v4", [300], manifest("main", 280)),
        replace(branch("a", 280), manifest=manifest("main", 280)),
    ]
    assert paths_of(records)["v4"].fork == Fork("main", 280, manifest("main", 280))
    of_branch = replace(branch("a", 200, "v1"), manifest=manifest("v1", 200))
    records = [*path_switching(), *chain("v4", [300], manifest("v1", 200)), of_branch]
    assert paths_of(records)["v4"].fork == Fork("v1", 200, manifest("v1", 200))


def test_a_path_does_not_leave_itself() -> None:
    records = [*path_switching(), *chain("v4", [300, 310], "lost"), checkpoint("v4", 320, manifest("main", 280))]
    assert paths_of(records)["v4"].fork == Fork("main", 280, manifest("main", 280))


def test_a_branch_of_a_fork_that_has_no_checkpoints_yet() -> None:
    paths = paths_of([*path_switching(), *chain("v4", [500], manifest("v3", 480))])
    assert paths["v4"].fork == Fork("v3", 480, manifest("v3", 480))


def test_releases_and_evaluations_of_a_checkpoint_without_a_record_are_kept() -> None:
    records: list[Record] = [
        *path_switching(),
        release("v2", 420),
        evaluation("v2", 420, {"v2": 3.0}),
        release("v7", 9),
    ]
    paths = paths_of(records)
    assert shown(paths["v2"])[-1] == (420, manifest("v2", 420), "unrecorded")
    assert len(paths["v2"].nodes[-1].releases) == len(paths["v2"].nodes[-1].evaluations) == 1
    assert shown(paths["v7"]) == [(9, manifest("v7", 9), "unrecorded")]


def test_an_origin_that_is_not_in_the_ledger_is_no_fork() -> None:
    assert paths_of(chain("v2", [400], manifest("main", 280)))["v2"].fork is None


def test_paths_that_seem_to_have_left_each_other_still_make_a_tree() -> None:
    records = [
        *chain("a", [10], manifest("b", 10)),
        *chain("b", [10], manifest("c", 10)),
        *chain("c", [10], manifest("a", 10)),
        *chain("d", [20], manifest("b", 10)),
    ]
    forks = {name: path.fork and path.fork.path for name, path in paths_of(records).items()}
    assert forks == {"a": None, "b": "c", "c": "a", "d": "b"}


def test_the_main_path_leaves_nobody() -> None:
    records = [*chain("v1", [10]), *chain("main", [20], manifest("v1", 10))]
    assert paths_of(records)["main"].fork is None


def test_plans_alone_make_no_lineage() -> None:
    assert lineages([PlanRecord("d", "")], all_committed, none_running) == ()
