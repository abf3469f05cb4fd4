"""The DeepSpeed engine of one path: configuration, durable saves, and loading for resume or fork."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from pathswitch.config import PlanFile
from pathswitch.config.sections import TrainSection
from pathswitch.errors import ConfigError
from pathswitch.run_folder import PLAN_FILE, RunFolder, tag
from pathswitch.trainer.llama import Llama, LlamaConfig
from pathswitch.versions import Path as TrainingPath


def init_distributed() -> None:
    """Join the process group that the launcher describes, without compiling anything.

    DeepSpeed would build a shared-memory all-reduce with g++ first; the embedded trainer has to run where there is no
    compiler. And it would load torch's compiler, which takes two seconds, for an optimizer that is not used here.
    """
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def ds_config(
    plan_file: PlanFile, folder: RunFolder, path: TrainingPath, on_damage: str | None = None, *, ranks: int
) -> dict[str, Any]:
    """Return the ds_config of one path: the plan's batch, optimizer and scheduler, and whatever [deepspeed] adds.

    Raises:
        ConfigError: the ranks do not divide the plan's batch.
    """
    train, data = plan_file.train, plan_file.data
    assert train is not None and data is not None
    section = {"seq_len": data.seq_len, **plan_file.deepspeed.get("pathswitch", {}), "run": str(folder.out)}
    # At its end the path is evaluated and released.
    own = {"save_dir": str(folder.path(path).checkpoints), "exit_at_end": False}
    section["job"] = {**section.get("job", {}), **own}
    if on_damage is not None:
        section["checkpoint"] = {**section.get("checkpoint", {}), "on_damage": on_damage}
    adam = {
        "lr": plan_file.schedule.max_lr,
        "betas": list(train.betas),
        "eps": train.eps,
        "weight_decay": train.weight_decay,
    }
    torchs = {"type": "AdamW", "params": {**adam, "torch_adam": True, "fused": True}}
    own_kernels = {"type": "PathSwitchAdamW", "params": {**adam, "one_pass": True}}
    plan = {"plan": str(folder.out / PLAN_FILE), "path": path.name, "paradigm": path.paradigm}
    return {
        "train_batch_size": train.global_batch_size,
        "train_micro_batch_size_per_gpu": micro_batch(train, ranks),
        "gradient_accumulation_steps": train.global_batch_size // (micro_batch(train, ranks) * ranks),
        "gradient_clipping": train.gradient_clipping,
        "optimizer": own_kernels if train.optimizer == "pathswitch" else torchs,
        "scheduler": {"type": "PathSwitchLR", "params": plan},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 1_000_000_000,
        **plan_file.deepspeed,
        "pathswitch": section,
    }


def micro_batch(train: TrainSection, ranks: int) -> int:
    """Return the sequences per rank and forward pass: at most the plan's micro_batch_size.

    Raises:
        ConfigError: the ranks do not divide the plan's batch.
    """
    per_rank, rest = divmod(train.global_batch_size, ranks)
    if rest:
        allowed = f"a divisor of [train] global_batch_size ({train.global_batch_size})"
        raise ConfigError("the number of ranks of this job", given=ranks, allowed=allowed)
    most = min(train.micro_batch_size or per_rank, per_rank)
    return next(size for size in range(most, 0, -1) if per_rank % size == 0)


def llama_config(plan_file: PlanFile, vocab_size: int) -> LlamaConfig:
    """Return the model of a plan for the vocabulary that its tokenizer really has."""
    assert plan_file.data is not None
    model = plan_file.model.model_dump(exclude_none=True)
    return LlamaConfig(vocab_size=vocab_size, max_seq_len=plan_file.data.seq_len, **model)


def build_engine(
    plan_file: PlanFile, folder: RunFolder, path: TrainingPath, vocab_size: int, on_damage: str | None = None
) -> Any:
    """Return the DeepSpeed engine of one path, with the weights that its seed gives.

    ``on_damage`` overrides the plan's ``[deepspeed.pathswitch.checkpoint] on_damage``.
    """
    assert plan_file.train is not None
    model = Llama(llama_config(plan_file, vocab_size), seed=plan_file.train.seed)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    gains = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices}, {"params": gains, "weight_decay": 0.0}]
    config = ds_config(plan_file, folder, path, on_damage, ranks=dist.get_world_size())
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=config)
    gc.collect()
    gc.freeze()  # all that is there now stays to the end
    gc.enable()
    return engine


def load(engine: Any, folder: RunFolder, path: TrainingPath, check: Callable[[dict[str, Any], int], None]) -> int:
    """Load the path's newest checkpoint, or its parent's at the fork step, or nothing; return the step.

    ``check`` sees the client state before anything is trained from it.

    Raises:
        CheckpointError: the checkpoint is damaged, or the parent has none at the fork step.
    """
    own = folder.path(path)
    if own.has_checkpoints():
        source, step_tag = own.checkpoints, None
    elif path.parent is not None and path.start_step > 0:
        source, step_tag = folder.parent(path).checkpoints, tag(path.start_step)
    else:
        return 0  # from scratch, as is a branch that leaves at step 0: the weights are the seed's
    _, client_state = engine.load_checkpoint(str(source), tag=step_tag)
    step = int(engine.lr_scheduler.last_epoch)
    check(client_state, step)
    return step


def release_weights(engine: Any) -> dict[str, torch.Tensor]:
    """Return the full weights on the CPU, gathered from all ranks where ZeRO-3 has partitioned them."""
    parameters = list(engine.module.parameters())
    partitioned = [p for p in parameters if hasattr(p, "ds_id")]
    with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
        return {name: tensor.detach().cpu().clone() for name, tensor in engine.module.state_dict().items()}


def device() -> torch.device:
    """Return this rank's device."""
    return torch.device(get_accelerator().current_device_name())
