"""An ordinary DeepSpeed training script whose samples come from the workers of a DataLoader."""

import argparse
import os
import random

import deepspeed
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset


class Samples(Dataset):
    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(2, 8, generator=torch.Generator().manual_seed(index))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--local_rank", type=int, default=-1)
    parser.add_argument("--checkpoints", required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--log", required=True, help="one line a step, rank by rank")
    return deepspeed.add_config_arguments(parser).parse_args()


def main() -> None:
    arguments = parse_arguments()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    engine, *_ = deepspeed.initialize(args=arguments, model=model, model_parameters=model.parameters())
    if os.path.isdir(arguments.checkpoints):
        engine.load_checkpoint(arguments.checkpoints)

    indices = range(2 * engine.global_steps + engine.global_rank, 2 * arguments.steps, 2)
    # With a generator of its own, a new iterator draws nothing from the one that dropout draws from.
    loader = DataLoader(Samples(), sampler=indices, batch_size=None, num_workers=2, generator=torch.Generator())
    with open(f"{arguments.log}.rank{engine.global_rank}", "a", buffering=1) as log:
        for batch in loader:
            loss = engine(torch.nn.functional.dropout(batch, 0.1)).square().mean()
            engine.backward(loss)
            log.write(f"{engine.global_steps} {loss.item()!r}\n")
            engine.step()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
