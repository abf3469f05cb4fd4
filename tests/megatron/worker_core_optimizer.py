"""Megatron core's optimizers over data-parallel ranks, with Megatron's Adam and with ours, one after the other.

``torchrun --nproc_per_node=2 worker_core_optimizer.py JOB.json`` trains the jobs in the file, and writes what happened
beside it. A job says its ``kind`` (fp32, bf16, distributed or precision_aware), whose ``optimizer``, and how it clips.
"""

from __future__ import annotations

import hashlib
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import megatron.core.optimizer as optimizers
import megatron_cpu
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, clip_grads, distrib_optimizer, get_megatron_optimizer
from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

from pathswitch.errors import PathSwitchError
from pathswitch_megatron import optimizer_hooks
from pathswitch_megatron.batches import constant_batches
from pathswitch_megatron.job import job_from_environment
from pathswitch_megatron.optimizer import FusedAdam
from pathswitch_megatron.scheduler import follow_plan

BATCH, SEQ_LENGTH, VOCABULARY = 4, 32, 256
MODULES = (optimizers, clip_grads, distrib_optimizer, optimizer_module)
NAMES = ("Adam", "USING_PYTORCH_OPTIMIZER", "HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "clip_grad_by_total_norm_fp32")
NAMES += ("_get_megatron_optimizer_based_on_param_groups",)
STOCK = [(module, name, vars(module)[name]) for module in MODULES for name in NAMES if name in vars(module)]


def choose(job: dict[str, Any]) -> None:
    """Put Megatron's own optimizer or ours in place."""
    known = dict(optimizer_hooks.KNOWN)
    for module, name, value in STOCK:
        setattr(module, name, value)
    if job.get("optimizer") == "stock":
        return
    if job.get("clipping") == "unknown":
        optimizer_hooks.KNOWN.clear()
    optimizer_hooks.replace_optimizer()
    optimizer_hooks.replace_optimizer()
    optimizer_hooks.KNOWN.update(known)


class Training:
    """One job, from building the model to its last step, on the plan's main path."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.kind = job["kind"]
        low, distributed = self.kind != "fp32", self.kind in ("distributed", "precision_aware")
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
            bf16=low,
            params_dtype=torch.bfloat16 if low else torch.float32,
        )
        module = GPTModel(config, get_gpt_layer_local_spec(), VOCABULARY, SEQ_LENGTH)
        if low:
            module = module.bfloat16()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=distributed)
        self.model = DistributedDataParallel(config, ddp, module)
        settings = OptimizerConfig(
            optimizer=job.get("kind_of_optimizer", "adam"),
            lr=1e-3,
            min_lr=1e-4,
            weight_decay=0.1,
            clip_grad=job.get("clip_grad", 0.25),
            bf16=low,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=distributed,
            decoupled_weight_decay=job.get("decoupled_weight_decay", True),
        )
        if self.kind == "precision_aware":  # without Transformer Engine no config may be made with it
            optimizers.is_te_min_version = lambda *_: True
            settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        settings.store_param_remainders = True
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        self.scheduler: Any = OptimizerParamScheduler(
            self.optimizer,
            init_lr=0.0,
            max_lr=1e-3,
            min_lr=1e-4,
            lr_warmup_steps=0,
            lr_decay_steps=100 * BATCH,
            lr_decay_style="cosine",
            start_wd=0.1,
            end_wd=0.1,
            wd_incr_steps=100 * BATCH,
            wd_incr_style="constant",
            use_checkpoint_opt_param_scheduler=False,
        )
        plan = job_from_environment()
        follow_plan(self.scheduler, plan.plan, plan.path, constant_batches(BATCH))
        if job.get("remainders"):
            get = self.inner.get_unscaled_state
            self.inner.get_unscaled_state = lambda p, name: (
                get(p, name).view(torch.int32).to(torch.int16) if name == "master_param" else get(p, name)
            )
        self.metadata = {"distrib_optim_sharding_type": job.get("sharding", "dp_reshardable")}

    @property
    def inner(self) -> Any:
        (one,) = self.optimizer.chained_optimizers
        return one.optimizer

    def state(self, *, loading: bool = False) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=self.metadata)
        return {"model": model, "optimizer": optimizer, "opt_param_scheduler": self.scheduler.state_dict()}

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(), str(folder))

    def load(self, folder: Path) -> None:
        if self.kind == "distributed" and not isinstance(self.inner, FusedAdam):
            self.step()  # with torch's AdamW it cannot load before it has a state
        state = dist_checkpointing.load(self.state(loading=True), str(folder))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])

    def step(self) -> tuple[float, float, float]:
        """Return the LR, the loss of all ranks, and the gradients' norm of an update."""
        rows = BATCH // dist.get_world_size()
        generator = torch.Generator().manual_seed(self.scheduler.last_epoch)
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQ_LENGTH + 1), generator=generator)
        tokens = tokens[dist.get_rank() * rows :][:rows]
        positions = torch.arange(SEQ_LENGTH)[None].expand(rows, -1)
        mask = torch.triu(torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool), 1)[None, None]
        self.scheduler.before_update()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self.model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]).float().mean()
        loss.backward()
        self.model.finish_grad_sync()
        lr = float(self.optimizer.param_groups[0]["lr"])
        success, norm, _ = self.optimizer.step()
        assert success
        self.scheduler.step(BATCH)
        total = loss.detach()
        dist.all_reduce(total)
        return lr, total.item() / dist.get_world_size(), float(norm)

    def digest(self) -> str:
        """Return a digest of this rank's weights and of the optimizer's: master weights and moments."""
        hasher = hashlib.sha256()
        tensors = list(self.model.parameters())
        for group in self.inner.param_groups:
            for parameter in group["params"]:
                state = self.inner.state[parameter]
                tensors += [state.get("master_param", parameter), state["exp_avg"], state["exp_avg_sq"]]
        for tensor in tensors:
            hasher.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return hasher.hexdigest()


def run(job: dict[str, Any]) -> dict[str, Any]:
    choose(job)
    try:
        training = Training(job)
    except PathSwitchError as error:
        return {"error": f"{type(error).__name__}: {error}"}
    digests = {}
    if "load" in job:
        training.load(Path(job["load"]))
        digests["loaded"] = training.digest()
    steps = []
    while training.scheduler.last_epoch < job["until"]:
        try:
            steps.append(training.step())
        except PathSwitchError as error:
            return {"error": f"{type(error).__name__}: {error}"}
        if training.scheduler.last_epoch == job.get("save_at"):
            training.save(Path(job["save"]))
            digests["saved"] = training.digest()
    groups = training.inner.param_groups
    return {
        "steps": steps,
        "digests": {**digests, "end": training.digest()},
        "optimizer": type(training.inner).__module__,
        "counted": sorted({int(group["step"]) for group in groups if "step" in group}),
        "clip_coefficients_fused": isinstance(training.inner, FusedAdam)
        and hasattr(optimizer_module.clip_grad_by_total_norm_fp32, "pathswitch_patch"),
        "state": sorted({name for state in training.inner.state.values() for name in state}),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    jobs = Path(sys.argv[1])
    dist.init_process_group("gloo")
    parallel_state.initialize_model_parallel()
    megatron_cpu.replace_cuda()
    megatron_cpu.fork_writers()
    outcomes = [run(job) for job in json.loads(jobs.read_text())]
    jobs.with_name(f"{jobs.stem}-rank{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
