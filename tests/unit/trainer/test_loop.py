"""What one rank decides without training: where it saves, what it refuses to go on from, what its metrics keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pathswitch.config import PlanFile, build_plan
from pathswitch.data import VersionText, prepare
from pathswitch.errors import RunError
from pathswitch.run_folder import RunFolder
from pathswitch.trainer.loop import Job, _check_data, _client_state, _metrics_file, _only_process


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Return the main path's job of a plan with three versions of 10 steps."""
    names = ("v1", "v2", "v3")
    for name in names:
        (tmp_path / f"{name}.txt").write_text(f"The text of version {name} is about {name}. " * 50)
    content: dict[str, Any] = {
        "schedule": {"max_lr": 1e-3},
        "versions": tuple({"name": name, "steps": 10} for name in names),
        "data": {"seq_len": 8, "vocab_size": 300},
        "train": {"global_batch_size": 2, "save_every_steps": 5},
    }
    plan_file = PlanFile.model_validate(content)
    texts = [VersionText(name, (f"{name}.txt",), (f"{name}.txt",)) for name in names]
    out = tmp_path / "run"
    data = prepare(
        texts, base=tmp_path, out=out, vocab_size=300, tokenizer_model=None, separator=None, progress=lambda _: None
    )
    plan = build_plan(plan_file)
    return Job(RunFolder(out), plan_file, plan, plan.path("main"), data, rank=0, world_size=2)


def at(job: Job, name: str, paradigm: Any = "path_switching") -> Job:
    return replace(job, path=job.plan.path(name, paradigm))


def test_the_plan_wants_a_checkpoint_every_k_steps(job: Job) -> None:
    assert [step for step in range(1, 21) if job.saves_regularly(step)] == [5, 10, 15, 20]


def test_a_checkpoint_agrees_with_the_text_that_it_has_seen(job: Job) -> None:
    state = _client_state(job, 14)
    assert sorted(state["pathswitch_data"]) == ["v1", "v2"]
    _check_data(at(job, "v2"), state, 14)
    assert sorted(_client_state(at(job, "v2", "ptfs"), 1)["pathswitch_data"]) == ["v1", "v2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state["pathswitch_data"].update(v2="0"), "pathswitch_data"),
        (lambda state: state["pathswitch_data"].pop("v1"), "pathswitch_data"),
        (lambda state: state.update(pathswitch_seed=99), "pathswitch_seed 99, this run 1"),
        (lambda state: state.clear(), "pathswitch_data None"),
    ],
)
def test_a_checkpoint_of_other_text_or_another_order_is_refused(job: Job, change: Any, message: str) -> None:
    state = _client_state(job, 14)
    change(state)
    with pytest.raises(RunError, match=message):
        _check_data(job, state, 14)


def test_metrics_drop_what_is_done_again_and_what_is_cut(job: Job) -> None:
    job.files.folder.mkdir(parents=True)
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(6)]
    job.files.metrics.write_text("".join(lines) + '{"step": 6, "lo')
    with _metrics_file(job, 4) as metrics:
        assert metrics is not None
        metrics.write(lines[4])
    assert job.files.metrics.read_text() == "".join(lines[:5])
    with _metrics_file(replace(job, rank=1), 0) as metrics:
        assert metrics is None
    assert job.files.metrics.read_text() == "".join(lines[:5])


def test_a_path_is_trained_by_one_process(job: Job) -> None:
    with _only_process(job), pytest.raises(RunError, match="is training this path"), _only_process(job):
        pass
    with _only_process(job):
        pass
