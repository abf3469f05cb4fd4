"""ms/step of the quickstart's LLaMA in a plain PyTorch loop: the peer that the DeepSpeed trainer is compared with.

Run: python tests/bench/llama_step.py [--rounds 7] [--steps 10]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn
from torch.nn.parallel import DistributedDataParallel

from pathswitch.config import load_plan_file
from pathswitch.trainer.llama import Llama, LlamaConfig

PLAN = load_plan_file(Path(__file__).parents[2] / "launch" / "quickstart.toml")
assert PLAN.data is not None and PLAN.train is not None
QUICKSTART = LlamaConfig(
    vocab_size=PLAN.data.vocab_size, max_seq_len=PLAN.data.seq_len, **PLAN.model.model_dump(exclude_none=True)
)
SEQ_LEN = QUICKSTART.max_seq_len
GLOBAL_BATCH = PLAN.train.global_batch_size
WARM_UP_STEPS = 5


def random_batch(n_sequences: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Draw inputs and targets, int64 [n_sequences, SEQ_LEN] each."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(QUICKSTART.vocab_size, (n_sequences, SEQ_LEN + 1), generator=generator)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def plain_step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """Return a function that does one step: zero_grad, forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)

    def step() -> None:
        optimizer.zero_grad()
        model(*batch).backward()
        optimizer.step()

    return step


def time_rounds(step: Callable[[], None], *, rounds: int, steps: int) -> list[float]:
    """Wall-clock ms per step of each round of ``steps`` steps, after WARM_UP_STEPS untimed ones."""
    for _ in range(WARM_UP_STEPS):
        step()
    ms_per_step = []
    for _ in range(rounds):
        started = time.perf_counter()
        for _ in range(steps):
            step()
        ms_per_step.append((time.perf_counter() - started) * 1e3 / steps)
    return ms_per_step


def single_process(*, threads: int, rounds: int, steps: int) -> list[float]:
    """ms/step of each round: one process with the whole global batch."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        step = plain_step(Llama(QUICKSTART, seed=0), random_batch(GLOBAL_BATCH, seed=0))
        return time_rounds(step, rounds=rounds, steps=steps)
    finally:
        torch.set_num_threads(before)


def two_processes(*, rounds: int, steps: int) -> list[float]:
    """ms/step of each round, seen by rank 0: DDP over gloo, one thread and half the global batch per process."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(_ddp_rank, args=(Path(folder), rounds, steps), nprocs=2)  # type: ignore[no-untyped-call]
        return [float(line) for line in (Path(folder) / "ms").read_text().split()]


def _ddp_rank(rank: int, folder: Path, rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = DistributedDataParallel(Llama(QUICKSTART, seed=0))
    step = plain_step(model, random_batch(GLOBAL_BATCH // 2, seed=rank))
    ms_per_step = time_rounds(step, rounds=rounds, steps=steps)
    if rank == 0:
        (folder / "ms").write_text("\n".join(map(str, ms_per_step)))
    dist.destroy_process_group()


def report(name: str, ms_per_step: list[float]) -> str:
    """One line: median, fastest and slowest round, and tokens/s at the median."""
    median = statistics.median(ms_per_step)
    tokens_per_s = GLOBAL_BATCH * SEQ_LEN / median * 1e3
    spread = f"{min(ms_per_step):.1f}..{max(ms_per_step):.1f}"
    return f"{name:<42} {median:7.1f} ms/step  ({spread})  {tokens_per_s:8,.0f} tokens/s"


def main() -> None:
    """Measure both ways to use two cores on one global batch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    parser.add_argument("--steps", type=int, default=10, help="steps per round")
    args = parser.parse_args()
    print(f"{QUICKSTART.n_params:,} parameters, {GLOBAL_BATCH} x {SEQ_LEN} tokens, load {os.getloadavg()[0]:.1f}")
    one = single_process(threads=2, rounds=args.rounds, steps=args.steps)
    print(report(f"1 process x 2 threads, batch {GLOBAL_BATCH}", one), flush=True)
    two = two_processes(rounds=args.rounds, steps=args.steps)
    print(report(f"2 processes x 1 thread, DDP gloo, batch 2 x {GLOBAL_BATCH // 2}", two))


if __name__ == "__main__":
    main()
