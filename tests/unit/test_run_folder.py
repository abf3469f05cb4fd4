"""What a run folder refuses to continue, and what it takes as progress."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pathswitch.config import PlanFile, build_plan
from pathswitch.errors import RunError
from pathswitch.run_folder import RunFolder, tag


def plan_file(**changes: Any) -> PlanFile:
    content: dict[str, Any] = {
        "schedule": {"max_lr": 1e-3},
        "versions": [{"name": "v1", "steps": 10}, {"name": "v2", "steps": 10}],
        "data": {"seq_len": 8},
        "train": {"global_batch_size": 4},
    }
    for key, value in changes.items():
        content[key] = value if isinstance(value, list) else {**content.get(key, {}), **value}
    content["versions"] = tuple(content["versions"])
    return PlanFile.model_validate(content)


def trained(out: Path, step: int, **changes: Any) -> RunFolder:
    """Return a run folder whose main path has a committed checkpoint at ``step``."""
    folder = RunFolder(out)
    folder.open(plan_file(**changes))
    checkpoints = out / "path_switching" / "main" / "checkpoints"
    (checkpoints / tag(step)).mkdir(parents=True)
    return folder


def test_the_recorded_plan_reads_back(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.open(plan_file(schedule={"shape": "knee", "explore": 0.25}))
    assert folder.plan_file() == plan_file(schedule={"shape": "knee", "explore": 0.25})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule": {"max_lr": 2e-3}}, r"\[schedule\] max_lr: .*0.001.*0.002"),
        ({"model": {"n_layers": 2}}, r"\[model\] n_layers: .*4.*2"),
        ({"data": {"seq_len": 16}}, r"\[data\] seq_len: .*8.*16"),
        ({"train": {"seed": 5}}, r"\[train\] seed: .*1.*5"),
        ({"deepspeed": {"bf16": {"enabled": True}}}, r"\[deepspeed\] bf16"),
        ({"versions": [{"name": "v1", "steps": 11}, {"name": "v2", "steps": 10}]}, r"\[version v1\] steps: .*10.*11"),
        ({"versions": [{"name": "w1", "steps": 10}, {"name": "v2", "steps": 10}]}, r"\[version v1\] name"),
        ({"schedule": {"shape": "linear"}}, r"\[version v1\] shape: .*'cosine'.*'linear'"),
        ({"versions": [{"name": "v1", "steps": 10, "shape": "knee"}]}, r"\[version v1\] shape"),
        ({"versions": [{"name": "v1", "steps": 10, "alpha": 0.5}]}, r"\[version v1\] decay_steps: .*6.*5"),
    ],
)
def test_another_plan_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    folder = trained(tmp_path / "run", step=4)
    with pytest.raises(RunError, match=message):
        folder.open(plan_file(**changes))
    assert folder.plan_file() == plan_file()


def test_what_has_not_begun_may_change(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", step=10)
    folder.open(
        plan_file(versions=[{"name": "v1", "steps": 10}, {"name": "new", "steps": 3}, {"name": "v3", "steps": 9}])
    )
    folder.open(plan_file(versions=[{"name": "v1", "steps": 10}], train={"save_every_steps": 2}))


def test_a_begun_version_may_not_go(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", step=11)
    with pytest.raises(RunError, match="version v2"):
        folder.open(plan_file(versions=[{"name": "v1", "steps": 10}]))


def test_an_iid_pool_cannot_grow_after_training_has_begun(tmp_path: Path) -> None:
    three = [{"name": f"v{i}", "steps": 10} for i in (1, 2, 3)]
    fresh = RunFolder(tmp_path / "fresh")
    fresh.open(plan_file(data={"split": "iid"}))
    fresh.open(plan_file(data={"split": "iid"}, versions=three))
    begun = trained(tmp_path / "begun", step=4, data={"split": "iid"})
    with pytest.raises(RunError, match="one pool"):
        begun.open(plan_file(data={"split": "iid"}, versions=three))


def test_only_a_record_up_to_the_end_completes_a_path(tmp_path: Path) -> None:
    folder = trained(tmp_path / "run", step=14)
    main = build_plan(plan_file()).path("main")
    assert not folder.is_complete(main)
    folder.path(main).completion.write_text('{"end_step": 13}')
    assert not folder.is_complete(main)
    folder.path(main).completion.write_text('{"end_step": 14}')
    assert folder.is_complete(main)
