"""A small GPT of Megatron core on CPU ranks, built, updated and saved as training loops do it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

BATCH, SEQ_LENGTH, VOCABULARY = 4, 32, 256
MAX_LR, MIN_LR, WEIGHT_DECAY = 1e-3, 1e-4, 0.1


class Update(NamedTuple):
    """The LR of an update, the whole batch's loss, the gradients' norm, and whether it was made."""

    lr: float
    loss: float
    norm: float | None
    success: bool


class SmallGPT:
    """A model, its optimizer and its scheduler; parallel_state says how the ranks share them.

    Args:
        settings: of the optimizer; the model has their type.
        tied: whether the embedding is the output layer too.
        experts: of each layer; None for a dense one.
        schedule: arguments of OptimizerParamScheduler that differ.
    """

    def __init__(
        self,
        settings: OptimizerConfig,
        *,
        tied: bool = False,
        experts: int | None = None,
        schedule: dict[str, Any] | None = None,
    ) -> None:
        torch.manual_seed(1)
        model_parallel_cuda_manual_seed(1)
        config = _config(settings, experts)
        module = GPTModel(
            config,
            get_gpt_layer_local_spec(num_experts=experts),
            VOCABULARY,
            SEQ_LENGTH,
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            share_embeddings_and_output_weights=tied,
        )
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True, use_distributed_optimizer=settings.use_distributed_optimizer
        )
        self.model = DistributedDataParallel(config, ddp, module.to(settings.params_dtype))
        self.optimizer = get_megatron_optimizer(settings, [self.model])
        config.grad_scale_func = self.optimizer.scale_loss
        self.scheduler: Any = _scheduler(self.optimizer, **(schedule or {}))
        self.metadata: dict[str, Any] | None = None

    def update(self, seed: int) -> Update:
        """Update with the batch of a seed, and count it."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = self._forward_backward(seed)
        lr = float(self.optimizer.param_groups[0]["lr"])
        success, norm, _ = self.optimizer.step()
        self.scheduler.step(BATCH)
        return Update(lr, loss, norm, success)

    def _forward_backward(self, seed: int) -> float:
        stages = parallel_state.get_pipeline_model_parallel_world_size()
        rows = BATCH // parallel_state.get_data_parallel_world_size() // stages
        losses = get_forward_backward_func()(
            forward_step_func=_forward,
            data_iterator=_micro_batches(seed, rows, stages),
            model=self.model,
            num_microbatches=stages,
            seq_length=SEQ_LENGTH,
            micro_batch_size=rows,
        )
        total = torch.stack(losses).sum() if losses else torch.zeros(())  # the last stage alone has them
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()  # as many losses, for a last stage has one for each stage

    def state(self, *, loading: bool = False) -> dict[str, Any]:
        model = self.model.module.sharded_state_dict()
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=self.metadata)
        return {"model": model, "optimizer": optimizer, "opt_param_scheduler": self.scheduler.state_dict()}

    def restore(self, folder: Path) -> None:
        """Load a checkpoint that dist_checkpointing has saved of ``state``."""
        state = dist_checkpointing.load(self.state(loading=True), str(folder))
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["opt_param_scheduler"])


def _config(settings: OptimizerConfig, experts: int | None) -> TransformerConfig:
    return TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        bf16=settings.bf16,
        fp16=settings.fp16,
        params_dtype=settings.params_dtype,
        pipeline_dtype=settings.params_dtype,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        num_moe_experts=experts,
        add_bias_linear=experts is None,
        finalize_model_grads_func=finalize_model_grads,
    )


def _scheduler(optimizer: Any, **different: Any) -> OptimizerParamScheduler:
    usual = {
        "init_lr": 0.0,
        "max_lr": MAX_LR,
        "min_lr": MIN_LR,
        "lr_warmup_steps": 0,
        "lr_decay_steps": 100 * BATCH,
        "lr_decay_style": "cosine",
        "start_wd": WEIGHT_DECAY,
        "end_wd": WEIGHT_DECAY,
        "wd_incr_steps": 100 * BATCH,
        "wd_incr_style": "constant",
        "use_checkpoint_opt_param_scheduler": False,
    }
    return OptimizerParamScheduler(optimizer, **{**usual, **different})


def digest_of(tensors: Iterable[torch.Tensor]) -> str:
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _micro_batches(seed: int, rows: int, number: int) -> Iterator[torch.Tensor]:
    """Yield what this rank sees of the batch of a seed."""
    tokens = torch.randint(0, VOCABULARY, (BATCH, SEQ_LENGTH + 1), generator=torch.Generator().manual_seed(seed))
    first = parallel_state.get_data_parallel_rank() * rows * number
    yield from tokens[first : first + rows * number].split(rows)


def _forward(micro_batches: Iterator[torch.Tensor], model: DistributedDataParallel) -> tuple[torch.Tensor, Any]:
    tokens = next(micro_batches)
    positions = torch.arange(SEQ_LENGTH)[None].expand(len(tokens), -1)
    mask = torch.triu(torch.ones(SEQ_LENGTH, SEQ_LENGTH, dtype=torch.bool), 1)[None, None]
    return model(tokens[:, :-1], positions, mask, labels=tokens[:, 1:]), _loss


def _loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    loss = output.float().mean()
    return loss, loss.detach().clone()  # Megatron divides the first one in place
