"""An ordinary DeepSpeed training script: what a user has before hearing of LR path switching, and keeps unchanged."""

import argparse
import json
import os
import signal

import deepspeed
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--load_dir")
    parser.add_argument("--load_tag")
    parser.add_argument("--save_dir", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--save_every", type=int, default=5)
    parser.add_argument("--lr_log", required=True, help="one JSON line an update, rank by rank")
    parser.add_argument("--die_at", type=int, help="rank 1 is lost at this step")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    if arguments.load_dir:
        engine.load_checkpoint(arguments.load_dir, tag=arguments.load_tag)

    log = open(f"{arguments.lr_log}.rank{engine.global_rank}", "a")  # noqa: SIM115
    register_optimizer_step_post_hook(
        lambda optimizer, *_: log.write(json.dumps([engine.global_steps, optimizer.param_groups[0]["lr"]]) + "\n")
    )
    while engine.global_steps < arguments.steps:
        generator = torch.Generator().manual_seed(2 * engine.global_steps + engine.global_rank)
        loss = engine(torch.randn(2, 8, generator=generator)).square().mean()
        engine.backward(loss)
        engine.step()
        log.flush()
        if engine.global_steps % arguments.save_every == 0:
            engine.save_checkpoint(arguments.save_dir)
        if engine.global_steps == arguments.die_at and engine.global_rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
