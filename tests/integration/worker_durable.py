"""Worker: writers, forks with a policy, signatures, full and read-only disks; every rank for itself.

The environment variables FULL_DISK and READ_ONLY_DISK name small file systems of their own, if there are any.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from harness import WIDTH, arguments, config, engine_of, finish, refused, updates
from worker_faults import on_rank0
from worker_matrix import weights

from pathswitch.checkpoint import MANIFEST_FILE, Policy, checkpoint_folders, read_manifest, verify_checkpoint
from pathswitch.checkpoint.files import digest_bytes
from pathswitch.checkpoint.fork import fork_checkpoint

Record = dict[str, Any]
ADAM = sys.modules["torch.optim.adam"]
POLICY = Policy(reset_moments=True, beta2=0.99, weight_decay=0.3, gradient_clipping=0.001)


def durable(settings: Record, **checkpoint: Any) -> Record:
    return settings | {"pathswitch": {"checkpoint": checkpoint}}


def whole(folder: Path) -> dict[str, list[str]]:
    """Verify everything in a folder and return the files of each checkpoint."""
    return {path.name: sorted(verify_checkpoint(path).files) for path in checkpoint_folders(folder)}


def writers(out: Path) -> Record:
    """DeepSpeed's own writers, in the process and decoupled from it, and a subclass of its default one."""
    record: Record = {}
    for stage in (0, 1, 3):
        for decoupled in (False, True) if stage != 1 else (False,):
            name, folder = f"{stage} {decoupled}", out / f"writer{stage}{decoupled}"
            settings = config(stage, "bf16") | {
                "checkpoint": {"writer": {"type": "python", "decoupled": decoupled, "data_parallel": "replica"}}
            }
            engine = engine_of(settings)
            updates(engine, 2)
            engine.save_checkpoint(folder)
            before = sorted(path.name for path in folder.iterdir() if path.name.startswith("global_step"))
            updates(engine, 2)
            random_state, expected = torch.get_rng_state(), weights(engine)
            engine.save_checkpoint(folder)
            torch.rand(3)  # as the next update would, before a decoupled writer commits
            engine.destroy()
            record[name] = {"behind the first save": before, "files": whole(folder)}
            record[name]["latest"] = (folder / "latest").read_text()
            torch.distributed.barrier()
            resumed = engine_of(config(stage, "bf16"))
            record[name]["load"] = refused(lambda engine=resumed, folder=folder: engine.load_checkpoint(folder))
            record[name]["same"] = all(map(torch.equal, weights(resumed), expected))
            record[name]["random state"] = torch.equal(torch.get_rng_state(), random_state)
    record["subclass"] = subclass(out / "subclass")
    return record


class Counting(TorchCheckpointEngine):  # type: ignore[misc]
    """A writer of the user's own."""

    saved = 0

    def save(self, state_dict: Any, path: str) -> None:
        Counting.saved += 1
        super().save(state_dict, path)


def subclass(folder: Path) -> Record:
    engine = engine_of(config(1))
    engine.checkpoint_engine = Counting()
    updates(engine, 2)
    engine.save_checkpoint(folder, tag="mine/step2", client_state={"note": 7}, save_latest=False)
    resumed = engine_of(config(1))
    _, client_state = resumed.load_checkpoint(folder, tag="mine/step2")
    record = {"saved": Counting.saved, "files": whole(folder), "latest": (folder / "latest").exists()}
    return record | {"note": client_state["note"], "step": resumed.lr_scheduler.last_epoch}


def pipeline(out: Path) -> Record:
    """Two pipeline stages: one ``layer_*`` file per layer."""

    def engine(path: str = "main") -> Any:
        torch.manual_seed(3)
        layers = [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(4)]
        model = PipelineModule(layers, num_stages=2, loss_fn=lambda outputs, labels: (outputs - labels).square().mean())
        return deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=config(1, path=path)
        )[0]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(5)
        while True:
            yield torch.randn(2, WIDTH, generator=generator), torch.randn(2, WIDTH, generator=generator)

    main = engine()
    for _ in range(4):
        main.train_batch(batches())
    main.save_checkpoint(out / "pipe")
    following = [float(main.train_batch(batches())) for _ in range(2)]
    branch = engine("v1")
    branch.load_checkpoint(out / "pipe")
    first = [float(branch.train_batch(batches())) for _ in range(2)]
    manifest = read_manifest(out / "pipe" / "global_step4")
    layer = next((out / "pipe" / "global_step4").glob("layer_*"))
    on_rank0(partial(layer.write_bytes, layer.read_bytes()[:-1]))
    return {
        "files": sorted(manifest.files),
        "stages": manifest.parallelism.pipeline_parallel_size,
        "main": following,
        "branch": first,
        "damaged": refused(lambda: engine("v1").load_checkpoint(out / "pipe")),
    }


def used_by_adam(engine: Any) -> Record:
    """Run an update and return the settings that torch's Adam really worked with, and the norm of its gradients."""
    adam, seen = ADAM.adam, []

    def watching(params: list[torch.Tensor], grads: list[torch.Tensor], *args: Any, **kwargs: Any) -> None:
        seen.append(
            (kwargs["beta2"], kwargs["weight_decay"], sum(float(grad.float().square().sum()) for grad in grads))
        )
        adam(params, grads, *args, **kwargs)

    ADAM.adam = watching
    lrs = updates(engine, 1)[0]
    ADAM.adam = adam
    squares = torch.tensor([sum(square for _, _, square in seen)])
    if engine.zero_optimization_stage() > 0:  # each rank has its own part of the gradients
        torch.distributed.all_reduce(squares)
    return {"beta2": seen[-1][0], "weight_decay": seen[-1][1], "norm": float(squares.sqrt()), "lrs": lrs}


def moments(engine: Any) -> list[float]:
    """Return the counts and the largest moments."""
    states = engine.lr_scheduler.optimizer.state.values()
    return [
        max(float(state[key].max()) if state[key].numel() else 0.0 for state in states)
        for key in ("step", "exp_avg_sq")
    ]


def policy(out: Path, stage: int, dtype: str) -> Record:
    """A fork that changes everything it can, one that changes nothing, and a ds_config that tries by itself."""
    name = f"policy{stage}{dtype}"

    def engine(path: str = "main", **settings: Any) -> Any:
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.1, "torch_adam": True}}
        return engine_of(
            config(stage, dtype, path=path) | {"optimizer": optimizer, "gradient_clipping": 1.0} | settings
        )

    main = engine()
    updates(main, 4)
    main.save_checkpoint(out / name / "main")
    kept = moments(main)
    source = out / name / "main" / "global_step4"
    for folder, changes in (("changed", POLICY), ("kept", Policy())):
        target = out / name / folder / "global_step4"
        arguments = {"policy": changes, "paradigm": "path_switching", "path": "v1"}
        on_rank0(partial(fork_checkpoint, source, target, **arguments))  # type: ignore[arg-type]
    record: Record = {"kept moments": kept}
    for folder in ("changed", "kept"):
        branch = engine("v1")
        branch.load_checkpoint(out / name / folder)
        record[folder] = {"moments": moments(branch), "used": used_by_adam(branch)}
        updates(branch, 1)
        branch.save_checkpoint(out / name / folder)
        again = engine("v1")
        again.load_checkpoint(out / name / folder)
        record[folder] |= {"moments again": moments(again), "used again": used_by_adam(again)}
        record[folder]["policy"] = read_manifest(out / name / folder / "global_step6").policy.changes()
    by_config = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.7, "torch_adam": True}}}
    branch = engine("v1", gradient_clipping=0.002, **by_config)
    branch.load_checkpoint(source.parent)
    record["by config"] = used_by_adam(branch)
    record["parent whole"] = whole(out / name / "main") is not None
    return record


class Smuggled:
    """What unpickles into a file being written."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (Path.write_text, (self.mark, "ran"))


def smuggle(folder: Path, mark: Path) -> None:
    """Put code into a shard and make the manifest agree, as far as that goes without a key."""
    shard = folder / "mp_rank_00_model_states.pt"
    content = torch.load(shard, weights_only=False)
    torch.save(content | {"smuggled": Smuggled(mark)}, shard)
    envelope = json.loads((folder / MANIFEST_FILE).read_text())
    envelope["manifest"]["files"][shard.name] |= {
        "size": shard.stat().st_size,
        "blake3": digest_bytes(shard.read_bytes()),
    }
    canonical = json.dumps(envelope["manifest"], sort_keys=True, separators=(",", ":")).encode()
    (folder / MANIFEST_FILE).write_text(json.dumps(envelope | {"digest": digest_bytes(canonical)}))


def signatures(out: Path) -> Record:
    """A key that signs, another one, none; and code in a pickle."""
    keys = {name: out / f"{name}.key" for name in ("right", "wrong", "short")}
    on_rank0(lambda: [path.write_text(path.stem * (1 if path.stem == "short" else 8)) for path in keys.values()])
    signed = durable(config(1), signing_key_file=str(keys["right"]))
    for folder, settings in (("signed", signed), ("unsigned", config(1))):
        engine = engine_of(settings)
        updates(engine, 2)
        engine.save_checkpoint(out / folder)
    mark = out / "mark"
    hurt = out / "smuggled"
    on_rank0(partial(shutil.copytree, out / "signed", hurt))
    on_rank0(partial(smuggle, hurt / "global_step2", mark))

    def load(folder: Path, settings: Record) -> str:
        return refused(lambda: engine_of(settings).load_checkpoint(folder))

    record = {
        "right key": load(out / "signed", signed),
        "no key": load(out / "signed", config(1)),
        "wrong key": load(out / "signed", durable(config(1), signing_key_file=str(keys["wrong"]))),
        "unsigned": load(out / "unsigned", signed),
        "smuggled": load(hurt, signed),
        "ran with the key": mark.exists(),
        "short key": load(out / "signed", durable(config(1), signing_key_file=str(keys["short"]))),
        "missing key": load(out / "signed", durable(config(1), signing_key_file=str(out / "nowhere.key"))),
        "sizes with key": load(out / "signed", durable(config(1), signing_key_file=str(keys["right"]), verify="sizes")),
    }
    torch.distributed.barrier()
    # The control: without a key the manifest is believed, and the code runs.
    record["smuggled, no key"] = load(hurt, config(1))
    torch.distributed.barrier()
    return record | {"ran without": mark.exists()}


def modes(out: Path) -> Record:
    """What ``verify`` compares, and what the section refuses."""
    engine = engine_of(config(1))
    updates(engine, 2)
    engine.save_checkpoint(out / "modes")
    shard = out / "modes" / "global_step2" / "mp_rank_00_model_states.pt"
    content = bytearray(shard.read_bytes())
    weight = next(engine.module.parameters()).detach().numpy().tobytes()
    content[content.index(weight)] ^= 1  # in the mantissa of a weight: torch loads it
    on_rank0(partial(shard.write_bytes, bytes(content)))
    record = {
        mode: refused(lambda m=mode: engine_of(durable(config(1), verify=m)).load_checkpoint(out / "modes"))
        for mode in ("full", "sizes")
    }
    bad = {"verify": {"verify": "quick"}, "key": {"verfy": "full"}, "on_damage": {"on_damage": "ignore"}}
    record |= {
        f"bad {name}": refused(lambda c=checkpoint: engine_of(durable(config(1), **c)))
        for name, checkpoint in bad.items()
    }
    record["bad section"] = refused(lambda: engine_of(config(1) | {"pathswitch": {"runs": "x"}}))
    local = config(1) | {"checkpoint": {"use_node_local_storage": True}}
    record["node local"] = refused(lambda: engine_of(local))
    return record


def same_tag(out: Path) -> Record:
    """A tag that is saved again replaces the checkpoint; files beside its shards stay; links to it keep their bytes."""
    folder = out / "same" / "last"
    engine = engine_of(config(1))
    updates(engine, 2)
    engine.save_checkpoint(folder.parent, tag="last")
    first = read_manifest(folder).digest
    on_rank0(lambda: (folder / "note.txt").write_text("kept"))
    linked = out / "linked"
    on_rank0(partial(shutil.copytree, folder, linked, copy_function=os.link))
    updates(engine, 2)
    engine.save_checkpoint(folder.parent, tag="last")
    return {
        "replaced": read_manifest(folder).digest != first and verify_checkpoint(folder).step == 4,
        "parent": read_manifest(folder).parent == first,
        "note": (folder / "note.txt").read_text(),
        "linked": verify_checkpoint(linked).digest == first,
        "left": sorted(path.name for path in folder.parent.iterdir()),
    }


def full_disk(folder: Path) -> Record:
    """A save that does not fit, and the next one when there is room again."""
    filler = folder / "filler"
    engine = engine_of(config(1))
    updates(engine, 2)
    engine.save_checkpoint(folder / "run")
    updates(engine, 2)
    free = shutil.disk_usage(folder).free
    on_rank0(partial(filler.write_bytes, b"\0" * (free - 8192)))
    record: Record = {"error": refused(lambda: engine.save_checkpoint(folder / "run"))}
    record["left"] = sorted(path.name for path in (folder / "run").iterdir())
    record["latest"], record["whole"] = (folder / "run" / "latest").read_text(), sorted(whole(folder / "run"))
    on_rank0(filler.unlink)
    record["room again"] = refused(lambda: engine.save_checkpoint(folder / "run"))
    return record | {"whole again": sorted(whole(folder / "run"))}


def read_only(folder: Path) -> Record:
    """Nothing can be written."""
    engine = engine_of(config(1))
    return {"error": refused(lambda: engine.save_checkpoint(folder / "run"))}


def main() -> None:
    """Run everything in one process group."""
    out = arguments()
    record: Record = {"writers": writers(out), "signatures": signatures(out)}
    record |= {"modes": modes(out), "same tag": same_tag(out)}
    for stage in (0, 1, 2, 3):
        for dtype in ("fp32", "bf16"):
            record[f"policy {stage} {dtype}"] = policy(out, stage, dtype)
    for name, action in (("FULL_DISK", full_disk), ("READ_ONLY_DISK", read_only)):
        if name in os.environ:
            record[name] = action(Path(os.environ[name]))
    record["pipeline"] = pipeline(out)  # last: DeepSpeed keeps its process grid for the engines that follow
    finish(record, out)


if __name__ == "__main__":
    main()
