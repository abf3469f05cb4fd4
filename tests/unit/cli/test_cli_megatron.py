"""``pathswitch adopt``, ``fork``, ``gc``, ``verify`` and ``log`` with checkpoints in Megatron's layout."""

from __future__ import annotations

import enum
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from test_cli_checkpoints import (
    PLAN,
    PLAN_FILE,
    garbage,
    pathswitch,
    recorded,
    records,
    refused,
    scheduler_state,
    steps,
)
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from pathswitch.checkpoint import (
    MANIFEST_FILE,
    MEGATRON,
    begin_save,
    commit,
    hash_file,
    iteration_folder,
    layout_of,
    read_manifest,
    verify_checkpoint,
)
from pathswitch.run_folder import RunFolder
from pathswitch.versions.records import BranchRecord, PrunedRecord

sys.path.append(str(Path(__file__).parents[1] / "checkpoint"))
from checkpoint_files import flip_bit, manifest_of, snapshot

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
NAMES = (".metadata", "metadata.json", "common.pt", "__0_0.distcp", "__1_0.distcp")
TRACKER = "latest_checkpointed_iteration.txt"
COMMON_KEY = "common_state/shard_0_1"


def checkpoint(checkpoints: Path, path: str, step: int) -> Path:
    """Commit a checkpoint as a job of Megatron under the plan does, its bytes made up."""
    of, folder = PLAN.path(path), checkpoints / iteration_folder(step)
    staging = begin_save(folder)
    for name in NAMES:
        (staging / name).write_bytes(f"{path} {step} {name} ".encode() * 20)
    files = {name: hash_file(staging / name) for name in NAMES}
    fields = {"schedule_digest": of.digest, "plan_digest": PLAN.digest, "next_lr": of.lr(step)}
    known = {"path": path, "step": step, "versions": {"megatron-core": "0.16.1"}, "settings": {"seed": 7}}
    commit(folder, manifest_of(folder, files, **fields, **known))
    MEGATRON.write_latest(checkpoints, folder.name)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run whose ledger places checkpoints of its main path at 4, 14, 16 and 18 in a folder beside it."""
    folder = RunFolder(tmp_path / "run")
    folder.open(PLAN_FILE)
    for step in (4, 14, 16, 18):
        saved = checkpoint(tmp_path / "main", "main", step)
        recorded(folder.out, saved, str(saved))
    return folder.out


def test_verify_and_log_show_them(run: Path) -> None:
    main = run.parent / "main"
    assert pathswitch("verify", run).code == 0
    logged = pathswitch("log", run)
    assert logged.code == 0 and "main    14  0.001" in logged.out and "damaged" not in logged.out
    (main / iteration_folder(14) / ".metadata").unlink()
    flip_bit(main / iteration_folder(16) / "__1_0.distcp")
    assert pathswitch("log", run).out.count("damaged") == 1  # sizes are all that it compares
    done = pathswitch("verify", run)
    assert done.code == 1
    assert f"{main / iteration_folder(14)}: .metadata: expected" in done.out
    assert f"{main / iteration_folder(16)}: __1_0.distcp: expected blake3" in done.out
    found = json.loads(pathswitch("verify", main, "--json").out)
    assert [(result["step"], result["whole"]) for result in found] == [(4, True), (14, False), (16, False), (18, True)]


def test_fork_takes_all_files_and_names_the_fork(run: Path) -> None:
    source, into = run.parent / "main" / iteration_folder(14), run.parent / "v2"
    done = pathswitch("fork", run, "main@14", "--to", "v2", "--into", into)
    assert done.code == 0, done.err
    target = into / iteration_folder(14)
    manifest = verify_checkpoint(target)
    assert sorted(os.listdir(target)) == sorted([*NAMES, MANIFEST_FILE])
    assert all((target / name).read_bytes() == (source / name).read_bytes() for name in NAMES)
    assert (into / TRACKER).read_text() == "14" and not (into / "latest").exists()
    assert (manifest.path, manifest.forked_from) == ("v2", read_manifest(source).digest)
    assert manifest.settings == {"seed": 7} and layout_of(manifest) is MEGATRON
    assert [record.folder for record in records(run, BranchRecord)] == [str(target)]
    assert "v2: forked already" in pathswitch("fork", run, "main@14", "--to", "v2", "--into", into).out


@pytest.mark.parametrize(
    "change",
    [["--beta2", "0.98"], ["--weight-decay", "0"], ["--gradient-clipping", "0.5"], ["--reset-moments"]],
    ids=lambda change: change[0],
)
@pytest.mark.parametrize("dry_run", [[], ["--dry-run"]])
def test_fork_refuses_changes_that_nothing_would_apply(run: Path, change: list[str], dry_run: list[str]) -> None:
    before = snapshot(run.parent)
    said = refused("fork", run, "main@14", "--to", "v2", *change, *dry_run)
    assert f"iter_0000014: given '{change[0]}'; allowed: none: " in said and "Megatron's own arguments" in said
    assert snapshot(run.parent) == before


def test_gc_keeps_what_megatrons_file_names(run: Path) -> None:
    main = run.parent / "main"
    (main / TRACKER).write_text("16")
    saved = checkpoint(run.parent / "main", "main", 6)
    recorded(run, saved, str(saved))
    (main / TRACKER).write_text("16")
    before = snapshot(run.parent)
    dry = garbage(run, "--dry-run")
    assert snapshot(run.parent) == before and steps(dry, False) == [("main", 6)] and dry["freed_bytes"] > 0
    assert {item["step"]: item["reason"] for item in dry["checkpoints"] if item["keep"]} == {
        4: "v1 forks from it",
        14: "v2 forks from it",
        16: f"`{TRACKER}` names it",
        18: "nearest before step 24, where v3 forks",
    }
    assert garbage(run) == dry
    assert sorted(os.listdir(main)) == sorted([TRACKER, *map(iteration_folder, (4, 14, 16, 18))])
    assert [record.folder for record in records(run, PrunedRecord)] == [str(saved)]


# adopt


class Tokenizers(enum.Enum):
    """What the process that adopts the checkpoint need not know."""

    NULL = "NullTokenizer"


ARGUMENTS: dict[str, Any] = {
    "consumed_train_samples": 56,
    "seq_length": 32,
    "global_batch_size": 4,
    "rampup_batch_size": None,
    "world_size": 8,
    "data_parallel_size": 2,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "use_distributed_optimizer": True,
    "bf16": True,
    "fp16": False,
    "params_dtype": torch.bfloat16,
    "backend": Tokenizers.NULL,
    "tokenizer_type": "NullTokenizer",
    "tokenizer_model": None,
    "data_path": ["0.5", "/data/one_text", "0.5", "/data/two_text"],
    "mock_data": False,
}
SETTINGS = {
    "data_path": ["0.5", "one_text", "0.5", "two_text"],
    "seq_length": 32,
    "global_batch_size": 4,
    "tokenizer_type": "NullTokenizer",
}


def common_state(state: dict[str, Any] | None = None, iteration: int = 14, **different: Any) -> dict[str, Any]:
    args = Namespace(**ARGUMENTS | different)
    return {
        "args": args,
        "iteration": iteration,
        "opt_param_scheduler": {"max_lr": 1e-3, "num_steps": 56, **(state or {})},
    }


def torch_dist(folder: Path, common: dict[str, Any], *, newer: bool = False) -> Path:
    """What Megatron-LM writes with --ckpt-format torch_dist; newer versions have no common.pt."""
    stored: dict[str, Any] = {"decoder.final_layernorm.weight": torch.ones(8)}
    if newer:
        stored[COMMON_KEY] = [common]
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(stored, storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    if not newer:
        torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    return folder


def legacy(folder: Path, common: dict[str, Any]) -> Path:
    """What Megatron-LM writes with --ckpt-format torch."""
    for rank in ("00_000", "00_001", "01_000", "01_001"):
        part = folder / f"mp_rank_{rank}"
        part.mkdir(parents=True)
        torch.save({**common, "model": {"weight": torch.ones(8)}}, part / "model_optim_rng.pt")
        torch.save({"exp_avg": torch.ones(8)}, part / "distrib_optim.pt")
    return folder


def newer(folder: Path, common: dict[str, Any]) -> Path:
    return torch_dist(folder, common, newer=True)


ITERATION = iteration_folder(14)
FORMATS = pytest.mark.parametrize("write", [torch_dist, newer, legacy])
Write = Callable[[Path, dict[str, Any]], Path]


@FORMATS
def test_adopt_of_a_stock_jobs_checkpoint(tmp_path: Path, run: Path, write: Write) -> None:
    folder = write(tmp_path / "own" / ITERATION, common_state())
    plan = ("--plan", run / "plan.toml")
    assert "--step: given 'nothing'" in refused("adopt", folder, *plan)
    assert "--plan: given 'nothing'" in refused("adopt", folder, "--step", 14)
    said = refused("adopt", folder, "--step", 15, *plan)
    assert f"--step: given 15; allowed: 14: {folder} has 56 samples behind it, 4 in each step" in said
    assert not (folder / MANIFEST_FILE).exists()
    done = pathswitch("adopt", folder, "--step", 14, *plan)
    assert done.code == 0 and "committed as step 14 of path_switching/main" in done.out, done.err
    manifest = verify_checkpoint(folder)
    assert (manifest.tag, manifest.path, manifest.step, manifest.global_steps) == (ITERATION, "main", 14, 14)
    assert (manifest.samples_seen, manifest.tokens_seen, manifest.dtype) == (56, 56 * 32, "bf16")
    assert manifest.settings == SETTINGS
    sizes = manifest.parallelism
    assert (sizes.zero_stage, sizes.world_size, sizes.data_parallel_size) == (1, 8, 2)
    assert (sizes.tensor_parallel_size, sizes.pipeline_parallel_size) == (2, 2)
    assert layout_of(manifest) is MEGATRON and manifest.versions["megatron-core"] == "unknown"
    files = {str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file()}
    assert set(manifest.files) == files - {MANIFEST_FILE}
    assert "has a manifest already" in refused("adopt", folder, "--step", 14, *plan)


@FORMATS
def test_adopt_of_a_plans_checkpoint_without_a_manifest(tmp_path: Path, run: Path, write: Write) -> None:
    ours = {"pathswitch": json.dumps(scheduler_state("v2", 14))}
    folder = write(tmp_path / "own" / ITERATION, common_state(ours))
    assert "--step: given 15; allowed: 14" in refused("adopt", folder, "--step", 15)
    assert "--path: given 'main'; allowed: v2" in refused("adopt", folder, "--path", "main")
    changed = tmp_path / "changed.toml"
    changed.write_text((run / "plan.toml").read_text().replace("0.001", "0.002"))
    assert "trained by another schedule than path 'v2'" in refused("adopt", folder, "--plan", changed)
    assert pathswitch("adopt", folder).code == 0
    manifest = verify_checkpoint(folder)
    assert (manifest.path, manifest.step, manifest.next_lr) == ("v2", 14, PLAN.path("v2").lr(14))
    assert manifest.schedule_digest == PLAN.path("v2").digest


def test_an_adopted_checkpoint_is_forked(tmp_path: Path, run: Path) -> None:
    folder = torch_dist(run / "path_switching" / "main" / "checkpoints" / ITERATION, common_state())
    assert pathswitch("adopt", folder, "--step", 14, "--plan", run / "plan.toml").code == 0
    assert pathswitch("fork", run, "main@14", "--to", "v2", "--into", tmp_path / "v2").code == 0
    fork = verify_checkpoint(tmp_path / "v2" / ITERATION)
    assert fork.forked_from == read_manifest(folder).digest and fork.settings == SETTINGS


def test_adopt_with_other_sizes_of_batches_leaves_the_step_to_the_user(tmp_path: Path, run: Path) -> None:
    folder = torch_dist(tmp_path / ITERATION, common_state(rampup_batch_size=["2", "2", "16"], bf16=False, fp16=True))
    assert pathswitch("adopt", folder, "--step", 16, "--plan", run / "plan.toml").code == 0
    manifest = read_manifest(folder)
    assert (manifest.step, manifest.dtype) == (16, "fp16")
    assert manifest.settings == {**SETTINGS, "rampup_batch_size": ["2", "2", "16"]}


@pytest.mark.parametrize(
    ("write", "name"),
    [
        *((torch_dist, name) for name in ("metadata.json", ".metadata", "__0_0.distcp", "common.pt")),
        *((newer, name) for name in ("metadata.json", "__0_0.distcp")),
        *((legacy, f"mp_rank_01_001/{name}") for name in ("model_optim_rng.pt", "distrib_optim.pt")),
        (legacy, "mp_rank_00_000/model_optim_rng.pt"),
    ],
)
def test_adopt_refuses_what_is_visibly_incomplete(tmp_path: Path, write: Write, name: str) -> None:
    folder = write(tmp_path / ITERATION, common_state())
    if name.endswith(".distcp"):
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
        assert f"incomplete: {name} is cut short" in refused("adopt", folder)
    (folder / name).write_bytes(b"")
    assert f"incomplete: {name} is empty" in refused("adopt", folder)
    (folder / name).unlink()
    assert f"incomplete: {name} is missing" in refused("adopt", folder)
    assert not (folder / MANIFEST_FILE).exists()


@pytest.mark.parametrize(
    ("different", "message"),
    [
        ({"world_size": None}, "its arguments hold no world_size"),
        ({"no_save_optim": True}, "saved without the optimizer's state"),
        ({"no_save_rng": True, "no_save_optim": True}, "without the optimizer's state and the random states"),
        ({"tokenizer_type": Tokenizers.NULL}, "its arguments tokenizer_type are of a class that is not known here"),
        ({"data_path": ["0.5", Path("one")]}, "its arguments data_path are of a class"),
        ({"iteration": 13}, "of iteration 13, as its own state says"),
        ({"state": {"pathswitch": "{"}}, "the scheduler's state 'pathswitch' is none that a plan's job saves"),
    ],
)
def test_adopt_refuses_what_nothing_can_go_on_from(tmp_path: Path, different: dict[str, Any], message: str) -> None:
    folder = torch_dist(tmp_path / ITERATION, common_state(**different))
    assert message in refused("adopt", folder)


def test_adopt_refuses_other_formats(tmp_path: Path) -> None:
    folder = torch_dist(tmp_path / "iter_14", common_state())
    assert "given 'iter_14'; allowed: a name like iter_0000040" in refused("adopt", folder)
    folder = folder.rename(tmp_path / ITERATION)
    (folder / "common.pt").write_bytes(b"no archive")
    assert "given one without Megatron's arguments" in refused("adopt", folder)
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "given the format zarr; allowed: " in refused("adopt", folder)
    experts = legacy(tmp_path / iteration_folder(15), common_state(iteration=15, expert_model_parallel_size=2))
    assert "cut by experts in the format torch" in refused("adopt", experts)
    torch.save({"model": {}}, experts / "mp_rank_00_000" / "model_optim_rng.pt")
    assert "holds no arguments of Megatron's" in refused("adopt", experts)
