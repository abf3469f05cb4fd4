"""Checkpoints of the format ``torch``."""

from __future__ import annotations

import os
from argparse import Namespace
from typing import Any

import torch

from .async_utils import AsyncRequest, schedule_async_save

ARGS = Namespace()


def get_args() -> Namespace:
    return ARGS


def get_checkpoint_name(
    checkpoints_path: str,
    iteration: int,
    release: bool = False,
    pipeline_parallel: Any = None,
    tensor_rank: Any = None,
    pipeline_rank: Any = None,
    expert_parallel: Any = None,
    expert_rank: Any = None,
    return_base_dir: bool = False,
    basename: str = "model_optim_rng.pt",
) -> str:
    folder = os.path.join(checkpoints_path, f"iter_{iteration:07d}")
    return folder if return_base_dir else os.path.join(folder, "mp_rank_00", basename)


def get_checkpoint_tracker_filename(checkpoints_path: str) -> str:
    return os.path.join(checkpoints_path, "latest_checkpointed_iteration.txt")


def save_checkpoint(
    iteration: int,
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    num_floating_point_operations_so_far: float,
    checkpointing_context: Any = None,
    non_persistent_ckpt: bool = False,
    train_data_iterator: Any = None,
    release: bool = False,
) -> None:
    args = get_args()
    name, tracker = get_checkpoint_name(args.save, iteration), get_checkpoint_tracker_filename(args.save)
    state = {
        "args": args,
        "iteration": iteration,
        "model": {name: tensor.clone() for name, tensor in model[0].state_dict().items()},
        "optimizer": optimizer.state_dict(),
        "opt_param_scheduler": opt_param_scheduler.state_dict(),
    }

    def write() -> None:
        if args.fail_at == iteration:
            raise OSError(28, "No space left on device", name)
        os.makedirs(os.path.dirname(name), exist_ok=True)
        torch.save(state, name)

    def note() -> None:
        with open(tracker, "w") as file:
            file.write(str(iteration))

    if args.async_save:
        request = AsyncRequest(write)
        request.add_finalize_fn(note)
        schedule_async_save(request)
    else:
        write()
        note()


def load_checkpoint(
    ddp_model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    load_arg: str = "load",
    strict: bool = True,
    checkpointing_context: Any = None,
) -> int:
    args = get_args()
    tracker, iteration = get_checkpoint_tracker_filename(args.load), args.ckpt_step
    if not iteration:
        if not os.path.isfile(tracker):
            return 0
        with open(tracker) as file:
            iteration = int(file.read())
    state = torch.load(get_checkpoint_name(args.load, iteration), weights_only=False)
    args.consumed_train_samples = state["args"].consumed_train_samples
    ddp_model[0].load_state_dict(state["model"], strict=strict)
    optimizer.load_state_dict(state["optimizer"])
    opt_param_scheduler.load_state_dict(state["opt_param_scheduler"])
    return int(state["iteration"])
