"""Worker: damage that file digests do not show, as whoever did it has written the manifest anew; each rank for itself.

--phase=save: save and load on all ZeRO stages; --phase=load: load with another number of ranks
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from harness import WIDTH, TinyModel, arguments, barrier, config, engine_of, finish, refused, updates
from worker_matrix import digest_of, saved_digest

import pathswitch.integrations.universal as universal
from pathswitch.checkpoint import MANIFEST_FILE, Policy, hash_file, read_manifest, verify_checkpoint
from pathswitch.checkpoint.fork import fork_checkpoint

Record = dict[str, Any]
DTYPES = {0: "fp32", 1: "bf16", 2: "fp32", 3: "bf16"}
STEP, FORK = 4, "global_step4"


def engine(stage: int, path: str = "main", **checkpoint: Any) -> Any:
    return engine_of(config(stage, DTYPES[stage], path=path) | {"pathswitch": {"checkpoint": checkpoint}})


def on_rank0(action: Callable[[], object]) -> None:
    if torch.distributed.get_rank() == 0:
        action()
    barrier()


def shard_of(tag: Path) -> Path:
    """Return the last rank's optimizer states, or what stage 0 has in their place."""
    return max(tag.glob("*optim_states.pt"), default=tag / "mp_rank_00_model_states.pt")


def parts_of(shard: Record) -> tuple[Record, torch.Tensor]:
    """Return the moments and the weights of the first flat group, or of the first parameter, in a shard."""
    if "optimizer_state_dict" not in shard:
        return shard["optimizer"]["state"][0], shard["module"]["first.weight"].view(-1)
    own = shard["optimizer_state_dict"]
    if "fp32_flat_groups" in own:
        return own["optimizer_state_dict"]["state"][0], own["fp32_flat_groups"][0]
    return own["base_optimizer_state"]["state"][0], own["single_partition_of_fp32_groups"][0]


def flip_bit(shard: Record) -> None:
    moments, _ = parts_of(shard)
    moments["exp_avg_sq"].view(-1).view(torch.int32)[5] ^= 1


def swap(shard: Record) -> None:
    _, weights = parts_of(shard)
    swap_elements(weights)


def drop(shard: Record) -> None:
    moments, _ = parts_of(shard)
    del moments["exp_avg"]


def swap_elements(values: torch.Tensor) -> None:
    values = values.detach()
    pair = values[2:4].clone()
    assert pair[0] != pair[1]
    values[2], values[3] = pair[1], pair[0]


def damage(tag: Path, fault: Callable[[Record], None]) -> None:
    """Write a fault into a shard and the manifest anew, as if the shard had been saved so."""
    path, manifest = shard_of(tag), read_manifest(tag)
    shard = torch.load(path, weights_only=False)
    fault(shard)
    torch.save(shard, path)
    entry = hash_file(path, rank=manifest.files[path.name].rank)
    (tag / MANIFEST_FILE).write_bytes(manifest.changed(files={**manifest.files, path.name: entry}).encode(None))
    verify_checkpoint(tag)


def faults(out: Path, stage: int) -> Record:
    """Load a copy with each fault, and one of them without the comparison."""
    record: Record = {}
    for fault in (flip_bit, swap, drop):
        folder = out / f"{fault.__name__}{stage}"
        on_rank0(partial(shutil.copytree, out / f"stage{stage}", folder))
        on_rank0(partial(damage, folder / FORK, fault))
        record[fault.__name__] = refused(partial(engine(stage).load_checkpoint, folder))
    unasked = engine(stage, state_digest=False)
    record["not compared"] = refused(partial(unasked.load_checkpoint, out / f"flip_bit{stage}"))
    unasked.save_checkpoint(out / f"without{stage}")
    record["not recorded"] = saved_digest(next((out / f"without{stage}").glob("global_step*")))
    return record


def reset_moments(out: Path, stage: int) -> Record:
    """Fork with a policy that changes the moments once they are loaded and compared."""
    fork = out / f"fork{stage}" / FORK
    on_rank0(lambda: fork_checkpoint(out / f"stage{stage}" / FORK, fork, policy=Policy(reset_moments=True), **BRANCH))
    record: Record = {"forked": saved_digest(fork)}
    branch = engine(stage, path="v1")
    record["error"] = refused(partial(branch.load_checkpoint, fork.parent))
    return record | {"after": digest_of(branch)}


BRANCH: Any = {"paradigm": "path_switching", "path": "v1"}


def layouts(out: Path) -> Record:
    """Train with each way that DeepSpeed has to keep the same state, save, and load."""
    record: Record = {}
    for name in LAYOUTS:
        run = layout_of(name)
        updates(run, STEP)
        run.save_checkpoint(out / name)
        error = refused(partial(layout_of(name).load_checkpoint, out / name))
        record[name] = {"class": type(run.optimizer).__name__, "error": error, "saved": saved_digest(out / name / FORK)}
    return record


OFFLOAD: Record = {"offload_optimizer": {"device": "cpu"}}
LAYOUTS: dict[str, tuple[int, Record, Record]] = {
    "float32 gradients": (1, {}, {"data_types": {"grad_accum_dtype": "fp32"}}),
    "another order": (2, {"round_robin_gradients": True}, {}),
    "aligned": (2, {"parameter_alignment": True}, {}),
    "offloaded 2": (2, OFFLOAD, {"zero_force_ds_cpu_optimizer": False}),
    "offloaded 3": (3, OFFLOAD, {"zero_force_ds_cpu_optimizer": False}),
    "many groups": (3, {"sub_group_size": 70}, {}),
}


def layout_of(name: str) -> Any:
    """Return an engine of a model with a frozen parameter."""
    stage, zero, settings = LAYOUTS[name]
    model = TinyModel()
    model.first.bias.requires_grad_(False)
    return engine_of(config(stage, "bf16") | {"zero_optimization": {"stage": stage, **zero}} | settings, model=model)


def pipeline(out: Path) -> Record:
    """Two pipeline stages, one rank each: what the other has is not this one's replica."""

    def engine() -> Any:
        torch.manual_seed(3)
        layers = [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(4)]
        model = PipelineModule(layers, num_stages=2, loss_fn=lambda outputs, labels: (outputs - labels).square().mean())
        parameters = list(model.parameters())
        return deepspeed.initialize(model=model, model_parameters=parameters, config=config(0))[0]

    run = engine()
    for _ in range(STEP):
        run.train_batch(iter([(torch.ones(2, WIDTH), torch.zeros(2, WIDTH))]))
    run.save_checkpoint(out / "pipeline")
    error = refused(partial(engine().load_checkpoint, out / "pipeline"))
    return {"error": error, "saved": saved_digest(out / "pipeline" / FORK)}


def save(out: Path) -> Record:
    """Save on all stages, and load what has been damaged since."""
    record: Record = {"layouts": layouts(out)}
    for stage in DTYPES:
        run = engine(stage)
        updates(run, STEP)
        run.save_checkpoint(out / f"stage{stage}")
        record[f"saved{stage}"] = saved_digest(out / f"stage{stage}" / FORK)
        record[f"faults{stage}"] = faults(out, stage)
        record[f"reset{stage}"] = reset_moments(out, stage)
    rounded = config(1, "bf16") | {"zero_optimization": {"stage": 1, "load_from_fp32_weights": False}}
    record["rounded"] = refused(partial(engine_of(rounded).load_checkpoint, out / "stage1"))
    return record | {"pipeline": pipeline(out)}  # the last: DeepSpeed keeps its topology for whatever comes then


def load(out: Path) -> Record:
    """Load with this number of ranks, and through a conversion that changes the order of two elements."""
    record: Record = {}
    convert = universal._convert

    def wrong(source: Path, output: Path) -> str:
        said = convert(source, output)
        file = output / "zero" / "second.weight" / "exp_avg.pt"
        content = torch.load(file, weights_only=False)
        swap_elements((content if torch.is_tensor(content) else content["param"]).view(-1))  # as ZeRO 3 has it, or not
        torch.save(content, file)
        return said

    for stage in (0, 1, 3):
        run = engine(stage)
        record[f"error{stage}"] = refused(partial(run.load_checkpoint, out / f"stage{stage}"))
        record[f"loaded{stage}"] = digest_of(run)
    record["wrong order"] = refused(partial(layout_of("another order").load_checkpoint, out / "another order"))
    universal._convert = wrong
    record["wrong"] = refused(partial(engine(3).load_checkpoint, out / "stage3"))
    return record


def main() -> None:
    """Run one phase."""
    out = arguments()
    phase = next(argument for argument in sys.argv if argument.startswith("--phase=")).removeprefix("--phase=")
    record = save(out) if phase == "save" else load(out)
    (out / phase).mkdir(exist_ok=True)
    finish(record, out / phase)


if __name__ == "__main__":
    main()
