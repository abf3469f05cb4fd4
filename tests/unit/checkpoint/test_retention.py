"""Retention: what every kind of plan keeps, and that a checkpoint goes as a whole and on the record."""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path

import pytest
from checkpoint_files import save
from hypothesis import given
from hypothesis import strategies as st

from pathswitch.checkpoint import MANIFEST_FILE, Manifest, Policy, begin_save, read_manifest
from pathswitch.checkpoint.fork import fork_checkpoint
from pathswitch.checkpoint.retention import (
    Decision,
    PlannedPath,
    Stored,
    decide,
    finish_pruning,
    freed_bytes,
    hidden_leftovers,
    prune,
    pruned_folder,
    unfinished_prunings,
)
from pathswitch.schedule import MainPath, make_shape
from pathswitch.versions import PARADIGMS, Paradigm, Plan, Version
from pathswitch.versions.plan import decay_steps


def plan_of(steps: list[int], alpha: float = 0.6) -> Plan:
    shape = make_shape("cosine", {})
    versions = [Version(f"v{i}", n, decay_steps(alpha, n), shape, 0.0) for i, n in enumerate(steps, 1)]
    return Plan(MainPath(1e-3), tuple(versions), 1e-4, 0.2)


def planned(plan: Plan, paradigm: Paradigm, complete: set[str]) -> list[PlannedPath]:
    return [
        PlannedPath(paradigm, path.name, path.parent, path.start_step, path.end_step, path.name in complete)
        for path in plan.paths(paradigm)
    ]


def stored(
    path: str, step: int, *, paradigm: str = "path_switching", latest: bool = False, root: str = "run"
) -> Stored:
    folder = Path(root, paradigm, path, "checkpoints", f"global_step{step}")
    return Stored(folder, paradigm, path, step, f"{path}{step}{root}", "latest" if latest else None)


def kept(decisions: list[Decision]) -> dict[tuple[str, int], str]:
    return {(d.checkpoint.path, d.checkpoint.step): d.reason for d in decisions if d.keep}


# Forks at 80, 280 and 480; ends at 200, 400 and 600.
PLAN = plan_of([200, 200, 200])


def test_main_keeps_its_forks_and_its_newest() -> None:
    main = [stored("main", step) for step in range(20, 500, 20)]
    assert kept(decide(planned(PLAN, "path_switching", {"v1"}), main, 1, {})) == {
        ("main", 80): "v1 forked from it",
        ("main", 280): "v2 forks from it",
        ("main", 480): "v3 forks from it",
    }
    shorter = kept(decide(planned(PLAN, "path_switching", set()), main[:10], 2, {}))
    assert shorter == {("main", 80): "v1 forks from it"} | {
        ("main", step): "nearest before step 480, where v3 forks" if step == 200 else "resume point"
        for step in (180, 200)
    }


def test_a_branch_that_ended_keeps_what_was_released_and_a_running_one_its_newest() -> None:
    branches = [stored("v1", step) for step in range(80, 201, 20)] + [stored("v2", step) for step in (280, 300, 320)]
    decisions = decide(planned(PLAN, "path_switching", {"v1"}), branches, 1, {})
    assert kept(decisions) == {("v1", 200): "v1 ended there", ("v2", 320): "resume point"}
    assert {d.reason for d in decisions if not d.keep} == {"no path needs it"}


def test_what_latest_names_stays_though_it_is_not_the_newest() -> None:
    rolled_back = [stored("v2", 300, latest=True), stored("v2", 320), stored("v2", 340)]
    assert kept(decide(planned(PLAN, "path_switching", set()), rolled_back, 1, {})) == {
        ("v2", 300): "`latest` names it",
        ("v2", 340): "resume point",
    }


def test_pinned_checkpoints_and_unknown_paths_stay() -> None:
    checkpoints = [stored("main", step) for step in (20, 40, 60)] + [stored("v9", 5), stored("v9", 6)]
    pinned = {checkpoints[0].digest: "v0 was forked from it"}
    assert kept(decide(planned(PLAN, "path_switching", {"v1", "v2", "v3"}), checkpoints, 1, pinned)) == {
        ("main", 20): "v0 was forked from it",
        ("main", 60): "resume point",
        ("v9", 5): "its path is not in the plan",
        ("v9", 6): "its path is not in the plan",
    }


def test_a_chain_keeps_the_end_of_each_version() -> None:
    chain = [stored(f"v{step // 200 + 1}", step + 100, paradigm="wsd_s") for step in (0, 200)]
    chain += [stored("v1", 200, paradigm="wsd_s"), stored("v2", 400, paradigm="wsd_s")]
    assert set(kept(decide(planned(PLAN, "wsd_s", {"v1"}), chain, 1, {}))) == {("v1", 200), ("v2", 400)}
    missing = [c for c in chain if c.step != 200]
    assert set(kept(decide(planned(PLAN, "wsd_s", set()), missing, 1, {}))) == {("v1", 100), ("v2", 400)}


def test_each_folder_counts_for_itself() -> None:
    copies = [stored("v2", step, root=root) for root in ("run", "scratch") for step in (300, 310)]
    decisions = decide(planned(PLAN, "path_switching", set()), copies, 1, {})
    assert [str(d.checkpoint.folder.parts[0]) for d in decisions if d.keep] == ["run", "scratch"]


@st.composite
def runs(draw: st.DrawFn) -> tuple[list[PlannedPath], list[Stored], int]:
    plan = plan_of(draw(st.lists(st.integers(2, 30), min_size=1, max_size=4)), draw(st.floats(0.1, 1.0)))
    paths = [
        path
        for paradigm in PARADIGMS
        for path in planned(plan, paradigm, draw(st.sets(st.sampled_from(["main", "v1", "v2", "v3", "v4"]))))
    ]
    checkpoints = []
    for path in paths:
        for root in draw(st.sets(st.sampled_from(["run", "scratch"]))):
            steps = sorted(draw(st.sets(st.integers(path.start_step, path.end_step + 10), max_size=8)))
            if draw(st.booleans()):
                steps = sorted({*steps, path.end_step})
            latest = draw(st.sampled_from([None, *steps]))
            checkpoints += [
                stored(path.name, step, paradigm=path.paradigm, latest=step == latest, root=root) for step in steps
            ]
    return paths, checkpoints, draw(st.integers(1, 3))


@given(runs())
def test_every_path_can_still_start_or_resume(run: tuple[list[PlannedPath], list[Stored], int]) -> None:
    paths, checkpoints, keep_last = run
    decisions = decide(paths, checkpoints, keep_last, {})
    assert sorted(str(d.checkpoint.folder) for d in decisions) == sorted(str(c.folder) for c in checkpoints)
    before, after = (
        {
            key: [c for c in group if (c.paradigm, c.path, c.folder.parent) == key]
            for key in {(c.paradigm, c.path, c.folder.parent) for c in checkpoints}
        }
        for group in (checkpoints, [d.checkpoint for d in decisions if d.keep])
    )
    for (paradigm, name, folder), all_of_it in before.items():
        left = after[paradigm, name, folder]
        by_step = sorted(all_of_it, key=lambda c: c.step)
        assert set(by_step[-keep_last:]) <= set(left)  # resumes from its newest
        assert {c for c in all_of_it if c.latest_file} <= set(left)  # and from what `latest` names
        for path in paths:
            if path.paradigm == paradigm and path.name == name and path.complete:
                assert {c for c in all_of_it if c.step == path.end_step} <= set(left)
            if (path.paradigm, path.parent) != (paradigm, name):
                continue
            assert {c for c in all_of_it if c.step == path.start_step} <= set(left)  # starts, or what it started from
            reached = [c.step for c in by_step if c.step <= path.start_step]
            if reached and not path.complete:
                assert max(c.step for c in left if c.step <= path.start_step) == reached[-1]


@given(runs())
def test_no_more_stays_than_has_a_use(run: tuple[list[PlannedPath], list[Stored], int]) -> None:
    paths, checkpoints, keep_last = run
    uses: defaultdict[tuple[str, str, Path], int] = defaultdict(lambda: keep_last + 1)  # and `latest`
    for path in paths:
        for root in ("run", "scratch"):
            uses[path.paradigm, path.name, Path(root, path.paradigm, path.name, "checkpoints")] += path.complete
            if path.parent:
                uses[path.paradigm, path.parent, Path(root, path.paradigm, path.parent, "checkpoints")] += 1
    found: defaultdict[tuple[str, str, Path], int] = defaultdict(int)
    for d in decide(paths, checkpoints, keep_last, {}):
        found[d.checkpoint.paradigm, d.checkpoint.path, d.checkpoint.folder.parent] += d.keep
    assert all(count <= uses[key] for key, count in found.items())


class Killed(Exception):
    pass


def test_a_checkpoint_goes_as_a_whole_and_is_recorded_when_its_shards_are_gone(tmp_path: Path) -> None:
    folder, digests = save(tmp_path), []
    digest = read_manifest(folder).digest

    def record(place: Path, manifest: Manifest) -> None:
        assert place == folder and not folder.exists()
        assert [f.name for f in pruned_folder(folder).rglob("*") if f.is_file()] == [MANIFEST_FILE]
        digests.append(manifest.digest)

    prune(folder, "0" * 64, record)  # saved again since it was looked at
    assert digests == [] and folder.is_dir()
    prune(folder, digest, record)
    assert digests == [digest] and os.listdir(tmp_path) == ["latest"]
    prune(folder, digest, record)  # another process was faster
    assert digests == [digest]


@pytest.mark.parametrize("at", ["rename", "unlink", "record", "rmtree"])
def test_a_killed_pruning_is_finished_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    folder, digests = save(tmp_path), []
    digest = read_manifest(folder).digest

    def record(place: Path, manifest: Manifest) -> None:
        if at == "record" and not digests:
            digests.append("killed")
            raise Killed
        digests.append(manifest.digest)

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        if at == "rename":
            patch.setattr("pathswitch.checkpoint.retention.sync_folder", kill)
        elif at == "unlink":
            patch.setattr(Path, "unlink", kill)
        elif at == "rmtree":
            patch.setattr("shutil.rmtree", kill)
        prune(folder, digest, record)
    assert not folder.exists() and unfinished_prunings(tmp_path) == [pruned_folder(folder)]
    finish_pruning(pruned_folder(folder), record)
    assert digests[-1] == digest and os.listdir(tmp_path) == ["latest"]


def test_an_unfinished_pruning_of_the_same_name_is_finished_first(tmp_path: Path) -> None:
    folder, digests = save(tmp_path, text="first"), []
    first = read_manifest(folder).digest
    folder.rename(pruned_folder(folder))
    second = read_manifest(save(tmp_path, text="second")).digest
    prune(folder, second, lambda _, manifest: digests.append(manifest.digest))
    assert digests == [first, second] and os.listdir(tmp_path) == ["latest"]


def test_a_hard_link_frees_nothing_until_it_is_the_last(tmp_path: Path) -> None:
    source = save(tmp_path / "main", size=10_000)
    target = tmp_path / "v1" / source.name
    made = fork_checkpoint(source, target, policy=Policy(), paradigm="path_switching", path="v1")
    if made.method != "hard link":
        pytest.skip("this file system shares blocks, not files")
    assert freed_bytes([source]) == (source / MANIFEST_FILE).stat().st_size
    assert freed_bytes([source, target]) == 30_000 + sum((f / MANIFEST_FILE).stat().st_size for f in (source, target))


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    save(tmp_path)
    begin_save(tmp_path / "global_step20")
    names = [".global_step10.replaced", ".global_step10.universal-path_switching-v1.0a1b", ".global_step10.forking-ab"]
    for name in (*names, ".global_step30.replaced", ".global_step10.pruning", ".snapshot", "global_step40.saving"):
        (tmp_path / name).mkdir()
    (tmp_path / "v9.forking-notes").mkdir()
    assert {f.name for f in hidden_leftovers(tmp_path)} == {*names, ".global_step20.saving"}
    assert hidden_leftovers(tmp_path / "nowhere") == []
