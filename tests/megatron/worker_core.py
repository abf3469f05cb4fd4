"""A training loop over Megatron core alone, as users write them: GPTModel, its optimizer, dist_checkpointing.

``torchrun --nproc_per_node=TP worker_core.py JOB.json``: trains the jobs in the file, one after the other, with tensor
parallelism over all ranks, and writes what happened beside it.
"""

from __future__ import annotations

import hashlib
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
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from pathswitch.checkpoint import MEGATRON, Parallelism, iteration_folder, iteration_of
from pathswitch.errors import PathSwitchError
from pathswitch_megatron.batches import constant_batches
from pathswitch_megatron.checkpoints import IterationCheckpoints, Position
from pathswitch_megatron.job import PATH_VARIABLE, job_from_environment
from pathswitch_megatron.scheduler import follow_plan

BATCH, SEQ_LENGTH, VOCABULARY = 4, 32, 256
MAX_LR, WARMUP_STEPS = 1e-3, 5


class Training:
    """One job, from building the model to its last step; a stock one follows no plan, and its saves are Megatron's."""

    def __init__(self, path: str, *, stock: bool) -> None:
        os.environ[PATH_VARIABLE] = path
        self.stock = stock
        self.job = job_from_environment()
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config = TransformerConfig(
            num_layers=2,
            hidden_size=64,
            num_attention_heads=4,
            use_cpu_initialization=True,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            masked_softmax_fusion=False,
            tensor_model_parallel_size=dist.get_world_size(),
        )
        module = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQ_LENGTH)
        self.model = DistributedDataParallel(config, DistributedDataParallelConfig(), module)
        optimizer_config = OptimizerConfig(optimizer="adam", lr=MAX_LR, min_lr=1e-4, weight_decay=0.1, clip_grad=1.0)
        self.optimizer = get_megatron_optimizer(optimizer_config, [self.model])
        self.scheduler: Any = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=MAX_LR,
            min_lr=1e-4,
            lr_warmup_steps=WARMUP_STEPS * BATCH if stock else 0,
            lr_decay_steps=100 * BATCH,
            lr_decay_style="constant" if stock else "cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=100 * BATCH,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )
        if not stock:
            follow_plan(self.scheduler, self.job.plan, self.job.path, constant_batches(BATCH))
        self.checkpoints = IterationCheckpoints(self.job, "core")

    @property
    def step(self) -> int:
        return int(self.scheduler.num_steps) // BATCH if self.stock else int(self.scheduler.last_epoch)

    def state(self, *, loading: bool = False) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading)
        return {"model": model, "optimizer": optimizer, "opt_param_scheduler": self.scheduler.state_dict()}

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
        state = dist_checkpointing.load(self.state(loading=True), str(folder))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])
        self.scheduler.check_position()
        self.scheduler.check_samples()
        self.checkpoints.parent = None if manifest is None else manifest.digest
        assert self.scheduler.last_epoch == iteration_of(folder.name)

    def train(self, until: int) -> Iterator[tuple[int, float, float]]:
        """Yield (step, LR used, loss) of each update."""
        positions = torch.arange(SEQ_LENGTH)[None].expand(BATCH, -1)
        mask = torch.triu(torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool), 1)[None, None]
        while (step := self.step) < until:
            tokens = torch.randint(
                0, VOCABULARY, (BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(step)
            )
            if not self.stock:
                self.scheduler.before_update()
            self.model.zero_grad_buffer()
            self.optimizer.zero_grad()
            loss = self.model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).mean()
            loss.backward()
            self.model.finish_grad_sync()
            used = float(self.optimizer.param_groups[0]["lr"])
            assert self.optimizer.step()[0]
            self.scheduler.step(BATCH)
            yield step, used, loss.item()

    def digest(self) -> str:
        """Return a digest of this rank's weights and of everything in the optimizer's state."""
        hasher = hashlib.sha256()
        inner = (
            self.optimizer.chained_optimizers[0].optimizer if hasattr(self.optimizer, "chained_optimizers") else None
        )
        inner = inner or self.optimizer.optimizer
        for parameter in self.model.parameters():
            hasher.update(parameter.detach().numpy().tobytes())
        for group in inner.param_groups:
            for parameter in group["params"]:
                state = inner.state[parameter]
                for name in sorted(state):
                    hasher.update(torch.as_tensor(state[name]).numpy().tobytes())
        return hasher.hexdigest()


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
