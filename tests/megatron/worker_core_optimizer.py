"""Megatron core's optimizers over ranks, with Megatron's Adam and with ours, one after the other.

``torchrun --nproc_per_node=2 worker_core_optimizer.py JOB.json`` trains the jobs in the file, and writes what happened
beside it. A job says its ``kind``, whose ``optimizer``, how it clips, and the sizes of ``parallel`` ranks that share a
model: tensor, pipeline or expert.
"""

from __future__ import annotations

import json
import sys
import warnings
from itertools import groupby
from pathlib import Path
from typing import Any

import megatron.core.optimizer as optimizers
import megatron_cpu
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.optimizer import OptimizerConfig, clip_grads, distrib_optimizer
from megatron.core.optimizer import optimizer as optimizer_module
from megatron.core.transformer.moe import moe_utils
from small_gpt import BATCH, MAX_LR, MIN_LR, WEIGHT_DECAY, SmallGPT, Update, digest_of

from pathswitch.errors import PathSwitchError
from pathswitch_megatron import optimizer_hooks
from pathswitch_megatron.batches import constant_batches
from pathswitch_megatron.job import job_from_environment
from pathswitch_megatron.optimizer import FusedAdam
from pathswitch_megatron.scheduler import follow_plan

# Kind -> the model's type, and whether the optimizer is the distributed one.
LOSS_SCALE = 2.0**19  # of float16, for which it is too large now and then
KINDS = {
    "fp32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "distributed": (torch.bfloat16, True),
    "precision_aware": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "fp16 distributed": (torch.float16, True),
}
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


class Training(SmallGPT):
    """One job, from building the model to its last step, on the plan's main path."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.kind = job["kind"]
        dtype, distributed = KINDS[self.kind]
        settings = OptimizerConfig(
            optimizer=job.get("kind_of_optimizer", "adam"),
            lr=MAX_LR,
            min_lr=MIN_LR,
            weight_decay=WEIGHT_DECAY,
            clip_grad=job.get("clip_grad", 0.25),
            bf16=dtype is torch.bfloat16,
            fp16=dtype is torch.float16,
            initial_loss_scale=LOSS_SCALE,
            loss_scale_window=2,
            hysteresis=1,
            params_dtype=dtype,
            use_distributed_optimizer=distributed,
            decoupled_weight_decay=job.get("decoupled_weight_decay", True),
        )
        if self.kind == "precision_aware":  # without Transformer Engine no config may be made with it
            optimizers.is_te_min_version = lambda *_: True
            settings.use_precision_aware_optimizer = settings.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
        settings.store_param_remainders = True
        super().__init__(settings, tied=job.get("tied", False), experts=job.get("experts"))
        plan = job_from_environment()
        follow_plan(self.scheduler, plan.plan, plan.path, constant_batches(BATCH))
        self.coefficients: list[list[float]] = [[] for _ in self.inners]
        for inner, coefficients in zip(self.inners, self.coefficients, strict=True):
            if isinstance(inner, FusedAdam):
                record_coefficients(inner, coefficients)
        if job.get("remainders"):
            (inner,) = self.inners
            get = inner.get_unscaled_state
            inner.get_unscaled_state = lambda p, name: (
                get(p, name).view(torch.int32).to(torch.int16) if name == "master_param" else get(p, name)
            )
        self.metadata = {"distrib_optim_sharding_type": job.get("sharding", "dp_reshardable")}

    @property
    def inners(self) -> list[Any]:
        return [chained.optimizer for chained in self.optimizer.chained_optimizers]

    @property
    def groups(self) -> list[dict[str, Any]]:
        return [group for inner in self.inners for group in inner.param_groups]

    def save(self, folder: Path) -> None:
        if dist.get_rank() == 0:
            folder.mkdir()
        dist.barrier()
        dist_checkpointing.save(self.state(), str(folder))

    def load(self, folder: Path) -> None:
        if self.kind == "distributed" and not isinstance(self.inners[0], FusedAdam):
            self.step()  # with torch's AdamW it cannot load before it has a state
        self.restore(folder)

    def step(self) -> Update:
        self.scheduler.before_update()
        return self.update(self.scheduler.last_epoch)

    def digest(self) -> str:
        """Return a digest of this rank's weights and of the optimizer's: master weights and moments."""
        tensors = list(self.model.parameters())
        for inner in self.inners:
            for parameter in [p for group in inner.param_groups for p in group["params"]]:
                state = inner.state[parameter]
                tensors += [state.get("master_param", parameter), state["exp_avg"], state["exp_avg_sq"]]
        return digest_of(tensors)

    def replicated(self) -> str:
        """Return a digest of the weights that all ranks have."""
        return digest_of(weight for weight in self.model.parameters() if is_on_all_ranks(weight))


def is_on_all_ranks(weight: torch.Tensor) -> bool:
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return getattr(weight, "shared_embedding", False)
    shares_tensors = parallel_state.get_tensor_model_parallel_world_size() > 1
    is_part = shares_tensors and getattr(weight, "tensor_model_parallel", False)
    return not is_part and getattr(weight, "allreduce", True)  # False for experts that one rank has


def record_coefficients(inner: Any, coefficients: list[float]) -> None:
    own = inner.clip_next
    inner.clip_next = lambda value: (coefficients.append(value), own(value))


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
    states = [state for inner in training.inners for state in inner.state.values()]
    return {
        "steps": steps,
        "digests": {**digests, "end": training.digest()},
        "optimizer": type(training.inners[0]).__module__,
        "counted": sorted({int(group["step"]) for group in training.groups if "step" in group}),
        "coefficients": training.coefficients,
        "replicated": training.replicated(),
        "state": sorted({name for state in states for name in state}),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    jobs = Path(sys.argv[1])
    dist.init_process_group("gloo")
    megatron_cpu.replace_cuda()
    megatron_cpu.fork_writers()
    moe_utils.te_general_gemm = None  # asked for where there is no Transformer Engine too
    outcomes = []
    for parallel, alike in groupby(json.loads(jobs.read_text()), lambda job: job.get("parallel", {})):
        parallel_state.initialize_model_parallel(**{f"{name}_model_parallel_size": n for name, n in parallel.items()})
        outcomes += [run(job) for job in alike]
        parallel_state.destroy_model_parallel()
    jobs.with_name(f"{jobs.stem}-rank{dist.get_rank()}.json").write_text(json.dumps(outcomes))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
