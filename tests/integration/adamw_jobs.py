"""For worker scripts: a model whose partitions cut through its weights, and engines with AdamW or PathSwitchAdamW."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from harness import engine_of

WIDTH, BATCH, N_BATCHES = 8, 4, 4
STOCK: dict[str, Any] = {"type": "AdamW", "torch_adam": True}
OURS: dict[str, Any] = {"type": "PathSwitchAdamW"}
ONE_PASS: dict[str, Any] = {"type": "PathSwitchAdamW", "one_pass": True}
OPTIMIZERS = {"stock": STOCK, "ours": OURS, "one_pass": ONE_PASS}


class SplitModel(torch.nn.Module):
    """Two layers of 45 and 48 parameters: two ranks' partitions cut through a weight, and need padding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = torch.nn.Linear(WIDTH, 5), torch.nn.Linear(5, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the loss on inputs of shape (batch, WIDTH): how far the outputs are from the inputs."""
        outputs: torch.Tensor = self.second(torch.tanh(self.first(inputs)))
        return (outputs.float() - inputs.float()).square().mean()


def settings(stage: int, dtype: str, optimizer: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """Return a ds_config; ``optimizer`` is the type and its own parameters, ``keys`` are added to the rest."""
    own = {name: value for name, value in optimizer.items() if name != "type"}
    parameters = {"lr": 1e-2, "betas": [0.9, 0.95], "weight_decay": 0.1} | own
    chosen: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_accumulation_steps": 1,
        "steps_per_print": 1000,
        "optimizer": {"type": optimizer["type"], "params": parameters},
        "zero_optimization": {"stage": stage},
    }
    if dtype != "fp32":
        chosen[dtype] = {"enabled": True}
    return chosen | keys


def engine(
    stage: int,
    dtype: str,
    optimizer: dict[str, Any],
    model: torch.nn.Module | None = None,
    mpu: Any = None,
    **keys: Any,
) -> Any:
    """Make an engine with a param group of weights and one of biases."""
    model = SplitModel() if model is None else model
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() > 1]},
        {"params": [p for p in parameters if p.dim() == 1], "weight_decay": 0.0},
    ]
    return engine_of(settings(stage, dtype, optimizer, **keys), model=model, model_parameters=groups, mpu=mpu)


def batch(number: int, dtype: torch.dtype) -> torch.Tensor:
    """Return one of the few micro-batches that a job goes through again and again."""
    generator = torch.Generator().manual_seed(number % N_BATCHES)
    return torch.randn(BATCH, WIDTH, generator=generator).to(dtype)


def train(job: Any, n_steps: int) -> dict[str, Any]:
    """Do updates and return the mean losses of all ranks, the gradients' norms, and the weights in the end."""
    dtype = next(job.module.parameters()).dtype
    losses, norms = [], []
    for _ in range(n_steps):
        total = torch.zeros((), dtype=torch.float64)
        accumulated = job.gradient_accumulation_steps()
        for part in range(accumulated):
            number = (job.global_steps * accumulated + part) * dist.get_world_size() + dist.get_rank()
            loss = job(batch(number, dtype))
            job.backward(loss)
            job.step()
            total += loss.detach().double() / accumulated / dist.get_world_size()
        dist.all_reduce(total)
        losses.append(float(total))
        norm = job.get_global_grad_norm()
        norms.append(None if norm is None else float(norm))
    return {"losses": losses, "norms": norms, "weights": bits(job), "skipped": job.skipped_steps}


def bits(job: Any) -> str:
    """Return the bits of all weights, in the model's precision and in the optimizer's, and of the moments."""
    parameters = list(job.module.parameters())
    with deepspeed.zero.GatheredParameters(parameters, enabled=job.zero_optimization_stage() == 3):
        low = torch.cat([p.detach().float().flatten() for p in parameters])
    pieces = [low.numpy().tobytes().hex()]
    for state in optimizer_of(job).state.values():
        for name in ("step", "exp_avg", "exp_avg_sq", "average"):
            if name in state:
                pieces.append(f"{name} {torch.as_tensor(state[name]).float().numpy().tobytes().hex()}")
    return " ".join(pieces)


def optimizer_of(job: Any) -> Any:
    """Return the torch optimizer inside an engine's wrappers."""
    inner = job.optimizer
    while hasattr(inner, "optimizer"):
        inner = inner.optimizer
    return inner
