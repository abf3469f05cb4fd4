"""Save small LLaMAs of megatron-core in several parallelisms; test_megatron_export.py runs it as RANK of two.

    RANK=0 python worker_megatron_export.py FOLDER

Writes FOLDER/<model>-<parallelism>/, a checkpoint as Megatron-LM saves it, and FOLDER/<model>.pt with the tokens and
megatron-core's own logits.
"""

from __future__ import annotations

import contextlib
import enum
import os
import sys
import zlib
from argparse import Namespace
from datetime import timedelta
from pathlib import Path
from typing import Any

os.environ |= {"TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1", "OMP_NUM_THREADS": "1"}

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

assert megatron.core  # before the patches: it looks for a GPU as it is imported
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = lambda device=None: None
torch.Tensor.cuda = lambda self, *args, **kwargs: self
CudaRNGStatesTracker.fork = lambda self, name="": contextlib.nullcontext()

ROWS, VOCABULARY, LENGTH = 64, 61, 16
MODELS: dict[str, dict[str, Any]] = {
    "untied": {"untie_embeddings_and_output_weights": True},
    "tied": {},
    "separate": {"rotary_base": 50},
    "multi_query": {"num_query_groups": 1},
    "ungrouped": {"group_query_attention": False, "num_query_groups": 1},
    "bf16": {"params_dtype": torch.bfloat16},
}
PARALLELISMS = {"tp1": (1, 1), "tp2": (2, 1), "pp2": (1, 2)}


class Newer(enum.Enum):
    """What the process that reads the checkpoint has never heard of."""

    VALUE = 1


def arguments(**different: Any) -> Namespace:
    """Return the arguments that Megatron-LM would have, as far as an export looks at them."""
    args = {
        "num_layers": 2,
        "hidden_size": 32,
        "ffn_hidden_size": 48,
        "num_attention_heads": 4,
        "group_query_attention": True,
        "num_query_groups": 2,
        "kv_channels": 8,
        "max_position_embeddings": LENGTH,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-2,
        "swiglu": True,
        "add_bias_linear": False,
        "position_embedding_type": "rope",
        "rotary_base": 10000,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "untie_embeddings_and_output_weights": False,
        "init_method_std": 0.02,
        "vocab_size": VOCABULARY,
        "padded_vocab_size": ROWS,
        "tokenizer_type": "SentencePieceTokenizer",
        "params_dtype": torch.float32,
        "attention_backend": AttnBackend.unfused,
        "newer": [Newer.VALUE, {Newer.VALUE: torch.float16}],
    }
    return Namespace(**{**args, **different})


def build(args: Namespace) -> GPTModel:
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups if args.group_query_attention else None,
        normalization=args.normalization,
        layernorm_epsilon=args.norm_epsilon,
        activation_func=torch.nn.functional.silu,
        gated_linear_unit=True,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        params_dtype=args.params_dtype,
        bf16=args.params_dtype == torch.bfloat16,
        pipeline_dtype=args.params_dtype,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization="RMSNorm"),
        vocab_size=ROWS,
        max_sequence_length=LENGTH,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type="rope",
        rotary_base=args.rotary_base,
    )


def sharded(model: GPTModel, *, separate: bool) -> dict[str, Any]:
    state: dict[str, Any] = model.sharded_state_dict(metadata={"non_homogeneous_layers": True} if separate else None)
    return state


@torch.no_grad()
def fill(model: GPTModel) -> None:
    """Give every weight a value that depends on its layer and its place in the whole tensor alone."""
    state = sharded(model, separate=True)
    apply_factories(state)
    for entry in state.values():
        for part in entry if isinstance(entry, list) else [entry]:
            if isinstance(part, ShardedTensor):
                generator = torch.Generator().manual_seed(zlib.crc32(part.key.encode()))
                whole = torch.randn(part.global_shape, generator=generator)
                whole = 1 + 0.2 * whole if whole.ndim == 1 else 0.2 * whole
                part.data.copy_(whole[part.global_slice()])


def save(model: GPTModel, args: Namespace, folder: Path, *, separate: bool) -> None:
    common: dict[str, Any] = {"args": args, "checkpoint_version": 3.0, "iteration": 40}
    state = {"model": sharded(model, separate=separate)}
    moment = torch.zeros(4)
    rank = dist.get_rank()
    state["optimizer"] = {"exp_avg": ShardedTensor.from_rank_offsets("optimizer.state.exp_avg.x", moment, (0, rank, 2))}
    if separate:  # as versions do that have no common.pt
        state["common"] = ShardedObject("common_state", common, (1,), (0,), replica_id=rank)
    else:
        state |= common
    if rank == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(state, str(folder))
    dist.barrier()
    if separate and rank == 0:
        (folder / "common.pt").unlink()


def logits(model: GPTModel, path: Path) -> None:
    tokens = torch.randint(VOCABULARY, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(LENGTH)[None].expand(3, -1)
    mask = torch.triu(torch.ones(LENGTH, LENGTH, dtype=torch.bool), 1)[None, None]
    with torch.no_grad():
        torch.save((tokens, model(tokens, positions, mask)[..., :VOCABULARY]), path)


def main(folder: Path, rank: int) -> None:
    wait = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", rank=rank, world_size=2, timeout=wait)
    for parallelism, (tensor, pipeline) in PARALLELISMS.items():
        parallel_state.initialize_model_parallel(tensor, pipeline)
        for name, different in MODELS.items():
            if parallelism != "tp1" and name not in ("untied", "tied"):
                continue
            args = arguments(**different)
            model = build(args).to(args.params_dtype)
            fill(model)
            save(model, args, folder / f"{name}-{parallelism}", separate=name == "separate")
            if parallelism == "tp1" and rank == 0 and name != "bf16":
                logits(model.eval(), folder / f"{name}.pt")
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(os.environ["RANK"]))
