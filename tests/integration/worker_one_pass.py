"""Worker: what ZeRO's step does besides the update, in one pass as in DeepSpeed's own; and when that is kept."""

from __future__ import annotations

import itertools
import logging
from typing import Any

import torch
from adamw_jobs import ONE_PASS, OURS, WIDTH, SplitModel, batch, bits, engine, optimizer_of, settings, train
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from harness import arguments, engine_of, finish, refused
from tensor_parallel import SharedModel, TensorParallel
from tiny_plan import PLAN
from torch.utils._python_dispatch import TorchDispatchMode

from pathswitch.errors import KernelError
from pathswitch.integrations import one_pass

BOTH = {"ours": OURS, "one_pass": ONE_PASS}
FP32_SUMS = {"data_types": {"grad_accum_dtype": "fp32"}}
TENSOR_PARALLEL: tuple[tuple[int, str, dict[str, Any]], ...] = (
    (1, "bf16", {}),
    (1, "bf16", FP32_SUMS),
    (2, "bf16", {}),
    (2, "fp32", {}),
)
SCHEDULERS = {
    "PathSwitchLR": {"type": "PathSwitchLR", "params": PLAN},
    "WarmupLR": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-2, "warmup_num_steps": 3}},
}


class Warnings(logging.Handler):
    """Keeps the warnings of this package."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        logging.getLogger("pathswitch").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one."""
        self.messages.append(record.getMessage())

    def taken(self) -> list[str]:
        """Return what there was since the last call."""
        messages, self.messages = self.messages, []
        return messages


class StartedTimers:
    """Stands for DeepSpeed's timers; notes the names of those that were started and stopped."""

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.running: list[str] = []

    def __call__(self, name: str) -> StartedTimers:
        """Be the timer of this name."""
        self.name = name
        return self

    def start(self) -> None:
        self.running.append(self.name)

    def stop(self) -> None:
        assert self.running.pop() == self.name
        self.names.add(self.name)

    def log(self, names: list[str]) -> None:
        assert set(names) == self.names

    def taken(self) -> list[str]:
        """Return the names since the last call."""
        names, self.names = sorted(self.names), set()
        return names


class LargestTensors(TorchDispatchMode):
    """Notes the number of elements of the largest new tensor of each type."""

    def __init__(self) -> None:
        super().__init__()
        self.largest: dict[str, int] = {}
        self.known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if torch.is_tensor(t)}
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if torch.is_tensor(tensor) and tensor.untyped_storage().data_ptr() not in before:
                name = str(tensor.dtype)
                self.largest[name] = max(self.largest.get(name, 0), tensor.numel())
        return result


def overflows(stage: int, optimizer: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Train in fp16 from a scale that is too large, over updates after which the scale grows again."""
    scale = {"enabled": True, "initial_scale_power": 24, "loss_scale_window": 3, "hysteresis": 1}
    job = engine(stage, "fp16", optimizer, gradient_clipping=0.3, fp16=scale, **keys)
    job.optimizer.timers, started = StartedTimers(), []
    scales = []
    result: dict[str, Any] = {"losses": [], "norms": []}
    for _ in range(16):
        one = train(job, 1)
        scales.append(job.optimizer.loss_scale)
        started.append(job.optimizer.timers.taken())
        result = one | {key: result[key] + one[key] for key in ("losses", "norms")}
    return result | {"scales": scales, "micro_step": job.optimizer.micro_step_id, "timers": started}


def not_finite(optimizer: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Give the second of three updates an infinite loss on the last rank; say what changed in it."""
    job = engine(1, "bf16", optimizer, **keys)
    train(job, 1)
    before = bits(job)
    inputs = batch(0, torch.bfloat16)
    loss = job(inputs)
    job.backward(loss * (float("inf") if torch.distributed.get_rank() == 1 else 1.0))
    job.step()
    skipped = {"unchanged": bits(job) == before, "overflow": bool(job.optimizer.overflow)}
    return skipped | {"norm": float(job.get_global_grad_norm())} | train(job, 2)


def scheduled(stage: int, scheduler: str, optimizer: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Train with accumulation and a scheduler; return the LRs that stood in the groups in each call of ``step``."""
    job = engine(stage, "bf16", optimizer, scheduler=SCHEDULERS[scheduler], gradient_accumulation_steps=2, **keys)
    used: list[list[float]] = []
    calls: list[str] = []
    inner = optimizer_of(job)
    inner.register_step_pre_hook(lambda o, *_: used.append([group["lr"] for group in o.param_groups]))
    inner.register_step_post_hook(lambda *_: calls.append("post"))
    return train(job, 4) | {"lrs": used, "post_hooks": len(calls)}


def pipeline(optimizer: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Train two stages, the first and last layer of which are one and the same, so that its gradients count once."""
    torch.manual_seed(1)
    tied = TiedLayerSpec("tied", torch.nn.Linear, WIDTH, WIDTH)
    layers = [tied, torch.nn.Tanh(), torch.nn.Linear(WIDTH, 5), torch.nn.Linear(5, WIDTH), tied]
    model = PipelineModule(layers, num_stages=2, loss_fn=mean_square, partition_method="uniform")
    job = engine(1, "bf16", optimizer, model=model, gradient_accumulation_steps=2, **keys)
    losses, norms = [], []
    batches = itertools.count()
    micro_batches = ((batch(number, torch.bfloat16),) * 2 for number in batches)
    for _ in range(4):
        losses.append(float(job.train_batch(data_iter=micro_batches)))
        norms.append(float(job.get_global_grad_norm()))
    replaced = "step" in vars(job.optimizer)
    return {"losses": losses, "norms": norms, "weights": bits(job).partition(" ")[0], "replaced": replaced}


def tensor_parallel(stage: int, dtype: str, optimizer: dict[str, Any], mpu: Any, **keys: Any) -> dict[str, Any]:
    """Train a model that the ranks share; the gradients of a layer that all have count once."""
    job = engine(stage, dtype, optimizer, model=SharedModel(), mpu=mpu, **keys)
    losses, norms = [], []
    for step in range(4):
        loss = job(batch(step, next(job.module.parameters()).dtype))
        job.backward(loss)
        job.step()
        losses.append(float(loss))
        norms.append(float(job.get_global_grad_norm()))
    first = job.module.first.weight.detach().float().flatten().tolist()
    replaced = "step" in vars(job.optimizer)
    return {"losses": losses, "norms": norms, "weights": bits(job), "first": first, "replaced": replaced}


def mean_square(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return (outputs.float() - targets.float()).square().mean()


def allocations(optimizer: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return the largest new tensors of one step of a model with 8192 parameters, by their types."""
    model = torch.nn.Sequential(torch.nn.Linear(64, 63), torch.nn.Tanh(), torch.nn.Linear(63, 64))
    job = engine(1, "bf16", optimizer, model=model, gradient_clipping=0.3, **keys)
    for _ in range(2):  # the first makes the state
        inputs = torch.ones(2, 64, dtype=torch.bfloat16)
        job.backward(job(inputs).float().square().mean())
        with LargestTensors() as tensors:
            job.step()
    shard = sum(p.numel() for p in job.optimizer.optimizer.param_groups[0]["params"])
    return {"largest": tensors.largest, "shard": shard}


def averages(stage: int, optimizer: dict[str, Any], average: Any, dtype: str = "fp32") -> dict[str, Any]:
    """Train with a running average; return it beside one that is computed from the weights after each update."""
    job = engine(stage, dtype, optimizer | {"average": average})
    parameters = list(job.module.parameters())
    expected = [full_weight(job, p).double() for p in parameters]
    for step in range(5):
        train(job, 1)
        share = 1 - average if isinstance(average, float) else 1 / (step + 1)
        for own, p in zip(expected, parameters, strict=True):
            own += (full_weight(job, p).double() - own) * share
    if stage == 1 and "one_pass" not in optimizer:
        return {"bits": bits(job)}  # DeepSpeed's own step gives access to the state of the first param group alone
    kept = [full_state(job, p, "average") for p in parameters]
    error = max(float((own - mean).abs().max()) for own, mean in zip(expected, kept, strict=True))
    distance = max(float((full_weight(job, p) - mean).abs().max()) for p, mean in zip(parameters, kept, strict=True))
    return {"error": error, "distance": distance, "bits": bits(job)}


def full_weight(job: Any, parameter: torch.Tensor) -> torch.Tensor:
    if job.zero_optimization_stage() == 0:
        return parameter.detach().clone()
    full: torch.Tensor = safe_get_full_fp32_param(parameter)
    return full


def full_state(job: Any, parameter: torch.Tensor, name: str) -> torch.Tensor:
    if job.zero_optimization_stage() == 0:
        kept: torch.Tensor = optimizer_of(job).state[parameter][name]
        return kept
    full: torch.Tensor = safe_get_full_optimizer_state(parameter, name)
    return full


def fallbacks(warnings: Warnings) -> dict[str, Any]:
    """Ask for one pass where it cannot be: in other stages, with offload, and where DeepSpeed is another."""
    record: dict[str, Any] = {}
    offload = {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu", "pin_memory": False}}}
    for name, stage, keys in (("stage_0", 0, {}), ("stage_3", 3, {}), ("offload", 1, offload)):
        warnings.taken()
        job = engine(stage, "bf16", ONE_PASS, **keys)
        record[name] = {"replaced": "step" in vars(job.optimizer)} | train(job, 3) | {"warnings": warnings.taken()}
        record[f"{name}_ours"] = train(engine(stage, "bf16", OURS, **keys), 3)
    original = DeepSpeedZeroOptimizer.unscale_and_clip_grads

    def changed(self: Any, groups: Any, norm: Any) -> None:
        original(self, groups, norm)

    DeepSpeedZeroOptimizer.unscale_and_clip_grads = changed
    warnings.taken()
    job = engine(1, "bf16", ONE_PASS, gradient_clipping=0.3)
    record["changed"] = {"replaced": "step" in vars(job.optimizer)} | train(job, 3) | {"warnings": warnings.taken()}
    DeepSpeedZeroOptimizer.unscale_and_clip_grads = original
    record["changed_ours"] = train(engine(1, "bf16", OURS, gradient_clipping=0.3), 3)
    job = engine(1, "bf16", ONE_PASS, gradient_clipping=0.3)
    record["as_it_was"] = {"replaced": "step" in vars(job.optimizer), "warnings": warnings.taken()}
    return record


def refusals() -> dict[str, str]:
    """Return what engines say to parameters that are wrong."""
    wrong = {
        "unknown": {"momentum": 0.9},
        "torch_adam": {"torch_adam": True},
        "not_decoupled": {"adam_w_mode": False},
        "max_norm": {"max_norm": 1.0},
        "string": {"lr": "1e-3"},
        "average": {"average": 2.0},
        "one_pass": {"one_pass": "yes"},
    }
    said = {name: refused(lambda own=own: engine(1, "bf16", OURS | own)) for name, own in wrong.items()}
    client = lambda parameters: torch.optim.PathSwitchAdamW(parameters, max_norm=1.0)  # noqa: E731
    bare = settings(1, "bf16", OURS)
    del bare["optimizer"]
    said["client"] = refused(lambda: engine_of(bare, model=SplitModel(), optimizer=client))

    def no_compiler(device: torch.device) -> None:
        raise KernelError(f"nothing compiles for {device}")

    original, one_pass.backend = one_pass.backend, no_compiler
    said["no_compiler"] = refused(lambda: engine(1, "bf16", OURS))
    said["reference"] = refused(lambda: engine(1, "bf16", OURS | {"backend": "reference"}))
    one_pass.backend = original
    return said


def main() -> None:
    """Run everything in one process group."""
    out, warnings = arguments(), Warnings()
    get_accelerator().is_fp16_supported = lambda: True
    record: dict[str, Any] = {}
    for name, optimizer in BOTH.items():
        for stage in (1, 2):
            record[f"overflows_{stage}_{name}"] = overflows(stage, optimizer)
        record[f"overflows_2_fp32-sums_{name}"] = overflows(2, optimizer, **FP32_SUMS)
        record[f"not_finite_unchecked_{name}"] = not_finite(
            optimizer, bf16={"enabled": True, "check_grad_overflow": False}
        )
        record[f"not_finite_checked_{name}"] = not_finite(
            optimizer, bf16={"enabled": True, "check_grad_overflow": True}
        )
        record[f"not_finite_fp32-sums_{name}"] = not_finite(optimizer, **FP32_SUMS)
        for stage, scheduler, keys in (
            (1, "PathSwitchLR", {}),
            (1, "WarmupLR", FP32_SUMS),
            (2, "PathSwitchLR", FP32_SUMS),
        ):
            kind = "_fp32-sums" if keys else ""
            record[f"scheduled_{stage}_{scheduler}{kind}_{name}"] = scheduled(stage, scheduler, optimizer, **keys)
        record[f"allocations_{name}"] = allocations(optimizer)
        record[f"allocations_fp32-sums_{name}"] = allocations(optimizer, **FP32_SUMS)
    mean = {"shape": "linear", "steps": 5}  # merges to the plain mean of the weights after each update
    for stage, name in ((0, "ours"), (1, "ours"), (1, "one_pass"), (2, "one_pass"), (3, "ours")):
        for kind, average in (("decay", 0.75), ("mean", mean)):
            record[f"average_{kind}_{stage}_{name}"] = averages(stage, BOTH[name], average)
    record["fallbacks"] = fallbacks(warnings)
    record["refusals"] = refusals()
    mpu = TensorParallel()
    for name, optimizer in BOTH.items():
        for stage, dtype, keys in TENSOR_PARALLEL:
            for clip in (0.0, 0.2):
                kind = f"{stage}_{dtype}{'_fp32-sums' if keys else ''}_{clip}_{name}"
                job = tensor_parallel(stage, dtype, optimizer, mpu, gradient_clipping=clip, **keys)
                record[f"tensor-parallel_{kind}"] = job
    for name, optimizer in BOTH.items():  # last: DeepSpeed keeps a pipeline's ranks for whatever comes behind it
        for kind, keys in (("bf16", {}), ("fp32-sums", FP32_SUMS)):
            for clip in (0.0, 0.2):
                record[f"pipeline_{kind}_{clip}_{name}"] = pipeline(optimizer, gradient_clipping=clip, **keys)
    finish(record, out)


if __name__ == "__main__":
    main()
