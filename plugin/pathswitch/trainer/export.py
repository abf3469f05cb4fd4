"""A release: one folder that transformers' LlamaForCausalLM.from_pretrained reads unchanged."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pathswitch.atomic import publish, temp_path, write_bytes_atomic, write_text_atomic
from pathswitch.errors import ConfigError, RunError
from pathswitch.trainer.llama import LlamaConfig


def export_release(
    state: Mapping[str, Tensor],
    config: LlamaConfig,
    tokenizer_model: Path,
    out: Path,
    *,
    eos_token_id: int,
    metadata: Mapping[str, str],
) -> None:
    """Write model.safetensors, config.json, tokenizer.model and release.json (the metadata) as the folder ``out``.

    ``state`` is ``Llama.state_dict()`` in one dtype, which the release keeps. ``out`` appears complete or not at all;
    exporting the same content onto it again changes nothing.

    Raises:
        ConfigError: ``state`` does not fit ``config``: a name, a shape or a dtype.
        RunError: ``out`` exists with other content.
    """
    tensors = _checked(state, config)
    dtype = next(iter(tensors.values())).dtype
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(out)
    temp.mkdir()
    try:
        save_file(tensors, temp / "model.safetensors", metadata={"format": "pt"})  # transformers asks for the format
        _sync(temp / "model.safetensors")
        write_text_atomic(temp / "config.json", _json(hf_config(config, dtype, eos_token_id=eos_token_id)))
        write_bytes_atomic(temp / "tokenizer.model", tokenizer_model.read_bytes())
        write_text_atomic(temp / "release.json", _json(metadata))
        _publish_once(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def hf_config(config: LlamaConfig, dtype: torch.dtype, *, eos_token_id: int) -> dict[str, object]:
    """Return what transformers' LlamaConfig calls the same model; it has no bos: its documents end with eos only."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": config.tie_embeddings,
        "initializer_range": config.init_std,
        "bos_token_id": None,
        "eos_token_id": eos_token_id,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def _checked(state: Mapping[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Return the tensors to save, on the CPU; a tied lm_head is the embedding again and is left out."""
    shapes = config.shapes
    given = {name: tensor.detach() for name, tensor in state.items()}
    if config.tie_embeddings and "lm_head.weight" in given:
        head, embedding = given.pop("lm_head.weight"), given.get("model.embed_tokens.weight")
        if embedding is None or not torch.equal(head, embedding):
            raise ConfigError(
                "state lm_head.weight", given="weights of its own", allowed="the embedding's (tied embeddings)"
            )
    if given.keys() != shapes.keys():
        missing, unknown = sorted(shapes.keys() - given.keys()), sorted(given.keys() - shapes.keys())
        raise ConfigError(
            "state", given=f"missing {missing}, unknown {unknown}", allowed="the names of Llama.state_dict()"
        )
    dtype = given["model.embed_tokens.weight"].dtype
    for name, shape in shapes.items():
        if tuple(given[name].shape) != shape or given[name].dtype != dtype:
            found = f"{given[name].dtype} {tuple(given[name].shape)}"
            raise ConfigError(f"state {name}", given=found, allowed=f"{dtype} {shape}")
    return {name: given[name].cpu().contiguous() for name in shapes}


def _publish_once(temp: Path, out: Path) -> None:
    """Rename ``temp`` to ``out``; a folder already there must hold the same files with the same bytes."""
    try:
        publish(temp, out)
    except OSError:
        if not out.is_dir():
            raise
        names = sorted({path.name for folder in (temp, out) for path in folder.iterdir()})
        _, different, unreadable = filecmp.cmpfiles(temp, out, names, shallow=False)
        if different or unreadable:
            raise RunError(
                f"release {out}: given an existing folder that differs in {', '.join(different + unreadable)}; "
                "allowed: a new folder, or one that already holds this release"
            ) from None


def _json(content: Mapping[str, object]) -> str:
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
