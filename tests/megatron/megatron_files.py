"""Small checkpoints in Megatron's format torch_dist, made without Megatron."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from pathswitch.checkpoint import MANIFEST_FILE, Manifest, Parallelism, hash_file
from pathswitch.trainer.llama import Llama, LlamaConfig
from pathswitch_megatron.export import llama_config

VOCABULARY, ROWS = 300, 320
ARGUMENTS: dict[str, Any] = {
    "num_layers": 3,
    "hidden_size": 16,
    "ffn_hidden_size": 24,
    "num_attention_heads": 4,
    "group_query_attention": True,
    "num_query_groups": 2,
    "kv_channels": 4,
    "max_position_embeddings": 32,
    "normalization": "RMSNorm",
    "layernorm_epsilon": 1e-2,
    "swiglu": True,
    "add_bias_linear": False,
    "position_embedding_type": "rope",
    "rotary_base": 50,
    "untie_embeddings_and_output_weights": True,
    "init_method_std": 0.2,
    "vocab_size": VOCABULARY,
    "tokenizer_type": "GPTSentencePieceTokenizer",
}
Tensors = dict[str, torch.Tensor]


def megatron_tensors(state: Tensors, config: LlamaConfig, *, separate: bool = False) -> Tensors:
    """Name and fuse a LLaMA's weights as Megatron does, padding and a moment of Adam's with them."""

    def padded(name: str) -> torch.Tensor:
        return torch.cat((state[name], torch.full((ROWS - VOCABULARY, config.hidden_size), 9.0)))

    def fused(n: int) -> Tensors:
        layer = {name: state[f"model.layers.{n}.{name}.weight"] for name in LAYER}
        q, k, v = (layer[f"self_attn.{x}_proj"].chunk(config.n_kv_heads) for x in "qkv")
        rows = [part for group in zip(q, k, v, strict=True) for part in group]
        return {
            "self_attention.linear_qkv.layer_norm_weight": layer["input_layernorm"],
            "self_attention.linear_qkv.weight": torch.cat(rows),
            "self_attention.linear_proj.weight": layer["self_attn.o_proj"],
            "mlp.linear_fc1.layer_norm_weight": layer["post_attention_layernorm"],
            "mlp.linear_fc1.weight": torch.cat((layer["mlp.gate_proj"], layer["mlp.up_proj"])),
            "mlp.linear_fc2.weight": layer["mlp.down_proj"],
        }

    layers = [fused(n) for n in range(config.n_layers)]
    tensors: Any = {
        "embedding.word_embeddings.weight": padded("model.embed_tokens.weight"),
        "decoder.final_layernorm.weight": state["model.norm.weight"],
        "optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(16),
        "chained_0.optimizer.state.exp_avg.decoder.final_layernorm.weight": torch.zeros(16),
    }
    if not config.tie_embeddings:
        tensors["output_layer.weight"] = padded("lm_head.weight")
    for name in layers[0]:
        if separate:
            tensors |= {f"decoder.layers.{n}.{name}": layer[name] for n, layer in enumerate(layers)}
        else:
            tensors[f"decoder.layers.{name}"] = torch.stack([layer[name] for layer in layers])
    return dict(tensors)


ATTENTION = [f"self_attn.{x}_proj" for x in "qkvo"]
LAYER = [*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm"]


def weights(**different: Any) -> tuple[LlamaConfig, Tensors]:
    config = llama_config(ARGUMENTS | different, VOCABULARY)
    state = Llama(config, seed=0).state_dict()
    generator = torch.Generator().manual_seed(1)  # else all norms are alike
    return config, {name: weight + torch.randn(weight.shape, generator=generator) for name, weight in state.items()}


def save(folder: Path, tensors: Tensors | None = None, **different: Any) -> Path:
    """Save a checkpoint in Megatron's format without Megatron."""
    if tensors is None:
        config, state = weights(**different)
        tensors = megatron_tensors(state, config)
    dcp.save(tensors, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    torch.save({"args": Namespace(**ARGUMENTS | different), "iteration": 7}, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def commit(folder: Path) -> Manifest:
    files = {path.name: hash_file(path) for path in folder.iterdir()}
    parallelism = dict.fromkeys(Parallelism.model_fields, 1)
    known = {
        "tag": folder.name,
        "paradigm": "path_switching",
        "path": "v2",
        "step": 7,
        "global_steps": 7,
        "dtype": "fp32",
    }
    known |= {"samples_seen": 56, "next_lr": 0.0, "schedule_digest": "5" * 64, "plan_digest": "7" * 64, "files": files}
    known |= {"parallelism": Parallelism(**parallelism), "versions": {"megatron-core": "0.16.1"}}
    unknown = dict.fromkeys(("tokens_seen", "data_digests", "git_commit", "parent"))
    manifest = Manifest(**known, **unknown)
    (folder / MANIFEST_FILE).write_bytes(manifest.encode(None))
    return manifest
