"""An unchanged pretrain_gpt.py of a Megatron-LM checkout on CPU ranks, and what its log says."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil

HERE = Path(__file__).parent
SECONDS = 240
# With final_lr = 1e-3 a branch is the main path: the control of every comparison.
PLAN = """
[schedule]
max_lr = 1e-3
warmup_steps = 3
{final_lr}

[[versions]]
name = "v1"
steps = 20
decay_steps = 8

[[versions]]
name = "v2"
steps = 20
decay_steps = 10
shape = "linear"
"""
COMMON = """
--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --max-position-embeddings 32
--micro-batch-size 2 --global-batch-size 4 --lr 1e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2
--weight-decay 0.1 --train-iters 40 --distributed-backend gloo --use-cpu-initialization
--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-gradient-accumulation-fusion
--tokenizer-type NullTokenizer --vocab-size 256 --log-interval 1 --eval-interval 1000 --eval-iters 0 --num-workers 0
--attention-dropout 0 --hidden-dropout 0 --split 100,0,0
"""
MEGATRON_LM = """
--save-interval 15 --transformer-impl local --attention-backend unfused --no-bias-swiglu-fusion --no-rope-fusion
--no-persist-layer-norm
"""
MEGATRON_DEEPSPEED = "--save-interval 6 --data-impl mmap --deepspeed --no-pipeline-parallel"
LINE = re.compile(r"iteration +(\d+)/ .*learning rate: (\S+) .*lm loss: (\S+)")


@dataclass
class Outcome:
    """One job: its exit code, its log, and the LR and loss that it printed for each iteration."""

    code: int
    log: str
    lrs: dict[int, str] = field(default_factory=dict)
    losses: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for iteration, lr, loss in LINE.findall(self.log):
            self.lrs[int(iteration)], self.losses[int(iteration)] = lr, loss


@dataclass
class Checkout:
    """A checkout of Megatron-LM, and a folder to train in."""

    megatron: Path
    folder: Path
    plan: str

    def command(self, ranks: int, module: str, *arguments: str) -> list[str]:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        return [*launch, "-m", module, *self.script(MEGATRON_LM), *arguments]

    def script(self, own_arguments: str) -> list[str]:
        model = shlex.split(COMMON + own_arguments)
        return [str(self.megatron / "pretrain_gpt.py"), *model, "--data-path", str(self.folder / "data")]

    def environment(self, path: str | None, plan: str | None = None) -> dict[str, str]:
        roots = [str(HERE), str(self.megatron), os.environ.get("PYTHONPATH", "")]
        variables = {"PYTHONPATH": ":".join(roots), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if path is not None:
            variables |= {"PATHSWITCH_PLAN": plan or self.plan, "PATHSWITCH_PATH": path}
        return {**os.environ, **variables}

    def train(
        self,
        path: str | None,
        *arguments: str,
        ranks: int = 1,
        plan: str | None = None,
        kill_at: tuple[int, signal.Signals | Callable[[int], object]] | None = None,
        module: str = "megatron_cpu",
        extra: Mapping[str, str] | None = None,
    ) -> Outcome:
        """Train one job to its end, or until a signal reaches its launcher when an iteration has been logged.

        In place of the signal, something else may happen to the launcher's process.
        """
        log = self.folder / f"log-{time.monotonic_ns()}.txt"
        environment = {**self.environment(path, plan), **dict(extra or {})}
        if kill_at is not None:
            environment["PAUSE_SECONDS"] = "0.05"
        with log.open("w") as out:
            job = subprocess.Popen(
                self.command(ranks, module, *arguments),
                env=environment,
                cwd=self.folder,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
            try:
                if kill_at is not None:
                    self._wait_for(job, log, kill_at[0])
                    if callable(kill_at[1]):
                        kill_at[1](job.pid)
                    elif kill_at[1] is signal.SIGKILL:
                        kill(job)
                    else:
                        job.send_signal(kill_at[1])
                code = job.wait(SECONDS)
            finally:
                kill(job)
        return Outcome(code, log.read_text())

    def _wait_for(self, job: subprocess.Popen[bytes], log: Path, iteration: int) -> None:
        deadline = time.monotonic() + SECONDS
        while not re.search(rf"iteration +{iteration}/", log.read_text()):
            if job.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(f"iteration {iteration} was not reached:\n{log.read_text()[-3000:]}")
            time.sleep(0.02)


class DeepSpeedCheckout(Checkout):
    """A checkout of Megatron-DeepSpeed, under the deepspeed launcher."""

    def command(self, ranks: int, module: str, *arguments: str) -> list[str]:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = str(listener.getsockname()[1])
        launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(ranks), "--master_port", port]
        return [*launcher, "--module", module, *self.script(MEGATRON_DEEPSPEED), *arguments]

    def environment(self, path: str | None, plan: str | None = None) -> dict[str, str]:
        return {**super().environment(path, plan), "DS_ACCELERATOR": "cpu"}


def last_rank(launcher: int) -> int:
    """Return the process of the last rank."""
    ranks = [p for p in psutil.Process(launcher).children(recursive=True) if p.environ().get("RANK") is not None]
    return max(ranks, key=lambda process: (int(process.environ()["RANK"]), -process.create_time())).pid


def kill(job: subprocess.Popen[bytes]) -> None:
    """Kill a launcher and its ranks, which are sessions of their own."""
    if job.poll() is None:
        launcher = psutil.Process(job.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            process.kill()
        job.wait()


def write_data(prefix: Path, documents: int, seed: int) -> None:
    """Write a dataset of random tokens with Megatron's own builder."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    rng = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for _ in range(documents):
        builder.add_item(torch.from_numpy(rng.integers(0, 250, int(rng.integers(20, 60)))))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")
