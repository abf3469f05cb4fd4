"""A training loop over Megatron core alone, as users write them: GPTModel, its optimizer, dist_checkpointing.

``torchrun --nproc_per_node=TP worker_core.py JOB.json``: trains the jobs in the file, one after the other, with tensor
parallelism over all ranks, and writes what happened beside it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import megatron_cpu
import psutil
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from small_gpt import BATCH, MAX_LR, MIN_LR, SEQ_LENGTH, WEIGHT_DECAY, SmallGPT, digest_of

from pathswitch.checkpoint import MEGATRON, Parallelism, iteration_folder, iteration_of
from pathswitch.errors import PathSwitchError
from pathswitch_megatron.batches import constant_batches
from pathswitch_megatron.checkpoints import IterationCheckpoints, Position
from pathswitch_megatron.job import PATH_VARIABLE, job_from_environment
from pathswitch_megatron.scheduler import follow_plan

WARMUP_STEPS = 5


class Training(SmallGPT):
    """One job, from building the model to its last step; a stock one follows no plan, and its saves are Megatron's."""

    def __init__(self, path: str, *, stock: bool) -> None:
        os.environ[PATH_VARIABLE] = path
        self.stock = stock
        self.job = job_from_environment()
        settings = OptimizerConfig(optimizer="adam", lr=MAX_LR, min_lr=MIN_LR, weight_decay=WEIGHT_DECAY, clip_grad=1.0)
        own = {"lr_warmup_steps": WARMUP_STEPS * BATCH, "lr_decay_style": "constant"}
        super().__init__(settings, schedule=own if stock else None)
        if not stock:
            follow_plan(self.scheduler, self.job.plan, self.job.path, constant_batches(BATCH))
        self.checkpoints = IterationCheckpoints(self.job, "core")

    @property
    def step(self) -> int:
        return int(self.scheduler.num_steps) // BATCH if self.stock else int(self.scheduler.last_epoch)

    def save(self, save_dir: Path) -> None:
        step, ranks = self.step, dist.get_world_size()
        if self.stock:
            self._save_stock(save_dir, step)
            return
        parallelism = Parallelism(
            zero_stage=0,
            world_size=ranks,
            data_parallel_size=1,
            tensor_parallel_size=ranks,
            pipeline_parallel_size=1,
        )
        position = Position(step, step * BATCH, SEQ_LENGTH, parallelism, "fp32")
        save = self.checkpoints.begin(save_dir, self.scheduler, position)
        dist_checkpointing.save(self.state(), self.checkpoints.place_of(str(save.folder)))
        self.checkpoints.commit(save)

    def _save_stock(self, save_dir: Path, step: int) -> None:
        """Save as Megatron-LM does, with its arguments."""
        args = Namespace(
            consumed_train_samples=step * BATCH,
            global_batch_size=BATCH,
            seq_length=SEQ_LENGTH,
            seed=1,
            world_size=dist.get_world_size(),
            data_parallel_size=1,
            tensor_model_parallel_size=dist.get_world_size(),
            pipeline_model_parallel_size=1,
            use_distributed_optimizer=False,
            attention_backend=AttnBackend.unfused,
            params_dtype=torch.float32,
            bf16=False,
            fp16=False,
        )
        folder = save_dir / iteration_folder(step)
        if dist.get_rank() == 0:
            folder.mkdir(parents=True)
        dist.barrier()
        common = {"args": args, "checkpoint_version": 3.0, "iteration": step}
        dist_checkpointing.save({**self.state(), **common}, str(folder))
        if dist.get_rank() == 0:
            MEGATRON.write_latest(save_dir, folder.name)
        dist.barrier()

    def load(self, load_dir: Path, iteration: int | None) -> None:
        chosen = self.checkpoints.choose(load_dir, iteration)
        if chosen is None:
            return
        folder, manifest = chosen
        if manifest is not None:
            self.scheduler.check_manifest(manifest)
            self.scheduler.vouched_step = manifest.step
        self.restore(folder)
        self.scheduler.check_position()
        self.scheduler.check_samples()
        self.checkpoints.parent = None if manifest is None else manifest.digest
        assert self.scheduler.last_epoch == iteration_of(folder.name)

    def train(self, until: int) -> Iterator[tuple[int, float, float]]:
        """Yield (step, LR used, loss) of each update."""
        while (step := self.step) < until:
            if not self.stock:
                self.scheduler.before_update()
            update = self.update(step)
            assert update.success
            yield step, update.lr, update.loss

    def digest(self) -> str:
        """Return a digest of this rank's weights and of everything in the optimizer's state."""
        (one,) = self.optimizer.chained_optimizers
        states = [one.optimizer.state[p] for group in one.optimizer.param_groups for p in group["params"]]
        tensors = [torch.as_tensor(state[name]) for state in states for name in sorted(state)]
        return digest_of([*self.model.parameters(), *tensors])


def run(job: dict[str, Any]) -> dict[str, Any]:
    training = Training(job["path"], stock=job.get("stock", False))
    try:
        if "load" in job:
            training.load(Path(job["load"]), job.get("iteration"))
        steps = []
        for step in training.train(job["until"]):
            steps.append(step)
            if training.step in job.get("save_at", ()):
                training.save(Path(job["save"]))
            if training.step == job.get("kill_at"):
                for process in psutil.Process().children(recursive=True):
                    process.kill()  # Megatron's writers would outlive this rank
                os.kill(os.getpid(), signal.SIGKILL)
    except PathSwitchError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"steps": steps, "digest": training.digest()}


def main() -> None:
    jobs = Path(sys.argv[1])
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    megatron_cpu.replace_cuda()
    megatron_cpu.fork_writers()
    outcomes = [run(job) for job in json.loads(jobs.read_text())]
    jobs.with_name(f"{jobs.stem}-rank{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
