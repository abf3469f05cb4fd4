"""The training loop."""

from __future__ import annotations

import argparse
import signal
from typing import Any

import torch
import torch.distributed
from megatron.core import num_microbatches_calculator
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from .async_utils import maybe_finalize_async_save
from .checkpointing import get_args, load_checkpoint, save_checkpoint

FLAGS = ("finetune", "no_load_optim", "async_save", "use_distributed_optimizer", "exit_on_missing_checkpoint")
FLAGS += ("exit_signal_handler",)
RECEIVED: list[int] = []


def parse(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    for name in ("save", "load"):
        parser.add_argument(f"--{name}")
    for name, default in (("lr", 1e-3), ("min_lr", 1e-4), ("weight_decay", 0.1)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=float, default=default)
    numbers = {"train_iters": 40, "global_batch_size": 4, "save_interval": 15, "seed": 1, "seq_length": 8}
    optional = ("ckpt_step", "exit_interval", "save_retain_interval", "train_samples", "fail_at")
    for name in (*numbers, *optional):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=numbers.get(name))
    for name in FLAGS:
        parser.add_argument(f"--{name.replace('_', '-')}", action="store_true")
    parser.add_argument("--skip", type=int, nargs="*", default=[])
    parser.add_argument("--rampup-batch-size", nargs=3)
    args = get_args()
    parser.parse_args(argv, args)
    fixed = {"ckpt_format": "torch", "bf16": False, "fp16": False, "tensor_model_parallel_size": 1}
    fixed |= {"pipeline_model_parallel_size": 1, "world_size": 1, "data_parallel_size": 1, "iteration": 0}
    vars(args).update(fixed, consumed_train_samples=0)
    if args.exit_signal_handler:
        signal.signal(signal.SIGTERM, lambda number, _: RECEIVED.append(number))


def get_optimizer_param_scheduler(optimizer: Any) -> OptimizerParamScheduler:
    args = get_args()
    samples = args.train_iters * args.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=args.lr,
        min_lr=args.min_lr,
        lr_warmup_steps=0,
        lr_decay_steps=samples,
        lr_decay_style="cosine",
        start_wd=args.weight_decay,
        end_wd=args.weight_decay,
        wd_incr_steps=samples,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
    )


def train_step(
    forward_step_func: Any, data_iterator: Any, model: Any, optimizer: Any, opt_param_scheduler: Any, config: Any
) -> tuple[float, int]:
    args = get_args()
    batch = num_microbatches_calculator.get_num_microbatches()
    generator = torch.Generator().manual_seed(args.seed + args.consumed_train_samples)
    samples = torch.randn(batch, 4, generator=generator)
    optimizer.zero_grad()
    loss = (model[0](samples) - samples.sum(1, keepdim=True)).square().mean()
    loss.backward()
    used = optimizer.param_groups[0]["lr"]
    print(
        f"iteration {args.curr_iteration + 1} used {used!r} loss {loss.item()!r} samples {args.consumed_train_samples}"
    )
    if args.curr_iteration + 1 in args.skip:
        return loss.item(), 1
    optimizer.step()
    opt_param_scheduler.step(increment=batch)
    return loss.item(), 0


def checkpoint_and_decide_exit(
    model: Any,
    optimizer: Any,
    opt_param_scheduler: Any,
    iteration: int,
    num_floating_point_operations_so_far: float,
    checkpointing_context: Any,
    train_data_iterator: Any,
) -> bool:
    args = get_args()
    if RECEIVED:
        if args.save:
            save_checkpoint(iteration, model, optimizer, opt_param_scheduler, 0.0)
        print("exiting program after receiving SIGTERM.")
        return True
    saved = bool(args.save and args.save_interval and iteration % args.save_interval == 0)
    if saved:
        save_checkpoint(iteration, model, optimizer, opt_param_scheduler, 0.0)
    if args.exit_interval and iteration % args.exit_interval == 0:
        if args.save and not saved:
            save_checkpoint(iteration, model, optimizer, opt_param_scheduler, 0.0)
        return True
    return False


def pretrain(argv: list[str]) -> None:
    parse(argv)
    args = get_args()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    num_microbatches_calculator.init_num_microbatches_calculator(
        0, args.rampup_batch_size, args.global_batch_size, 1, 1, False
    )
    torch.manual_seed(args.seed)
    model = [torch.nn.Linear(4, 1)]
    optimizer = torch.optim.AdamW(model[0].parameters(), lr=args.lr)
    opt_param_scheduler = get_optimizer_param_scheduler(optimizer)
    if args.load is not None:
        args.iteration = load_checkpoint(model, optimizer, opt_param_scheduler)
    iteration = args.iteration
    while iteration < args.train_iters:
        maybe_finalize_async_save()
        num_microbatches_calculator.update_num_microbatches(args.consumed_train_samples, consistency_check=False)
        args.curr_iteration = iteration
        train_step(None, None, model, optimizer, opt_param_scheduler, None)
        iteration += 1
        args.consumed_train_samples += num_microbatches_calculator.get_num_microbatches()
        if checkpoint_and_decide_exit(model, optimizer, opt_param_scheduler, iteration, 0.0, None, None):
            break
    else:
        if args.save and iteration % args.save_interval:
            save_checkpoint(iteration, model, optimizer, opt_param_scheduler, 0.0)
    maybe_finalize_async_save()
    torch.distributed.destroy_process_group()
