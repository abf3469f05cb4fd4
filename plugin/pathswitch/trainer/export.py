"""A release: one folder that transformers' LlamaForCausalLM.from_pretrained reads unchanged."""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from pathswitch.atomic import publish, temp_path, write_bytes_atomic, write_text_atomic
from pathswitch.checkpoint import digest_bytes, hash_file
from pathswitch.errors import ConfigError, RunError
from pathswitch.trainer.llama import LlamaConfig

# Of one file of weights, as Hugging Face cuts them: larger models get several files and an index.
FILE_BYTES = 5_000_000_000


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
    described = hf_config(config, dtype, eos_token_id=eos_token_id)
    write_release(tensors.items(), described, tokenizer_model, out, metadata=metadata)


def write_release(
    tensors: Iterable[tuple[str, Tensor]],
    config: Mapping[str, object],
    tokenizer_model: Path | None,
    out: Path,
    *,
    metadata: Mapping[str, str],
) -> None:
    """Write a release's files as the folder ``out``: weights by Hugging Face's names, config.json, release.json.

    The contiguous tensors are taken one by one: in memory are at most FILE_BYTES of them and the next one. ``out``
    appears complete or not at all; writing the same content again changes nothing.

    Raises:
        RunError: ``out`` exists with other content.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    temp = temp_path(out)
    temp.mkdir()
    try:
        _write_weights(tensors, temp)
        write_text_atomic(temp / "config.json", _json(config))
        if tokenizer_model is not None:
            write_bytes_atomic(temp / "tokenizer.model", tokenizer_model.read_bytes())
        write_text_atomic(temp / "release.json", _json(metadata))
        _publish_once(temp, out)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def release_digest(release: Path) -> str:
    """Return what a ledger calls a release: the digest of its files' names and digests."""
    files = {file.name: hash_file(file).blake3 for file in sorted(release.iterdir())}
    return digest_bytes(json.dumps(files).encode())


def hf_config(config: LlamaConfig, dtype: torch.dtype, *, eos_token_id: int | None) -> dict[str, object]:
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


def _write_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write model.safetensors, or model-00001-of-000NN.safetensors … and the index that says what is where."""
    files: list[list[str]] = []
    waiting: dict[str, Tensor] = {}
    waiting_bytes = total_bytes = 0
    for name, tensor in tensors:
        if waiting and waiting_bytes + tensor.nbytes > FILE_BYTES:
            files.append(_write_part(waiting, folder / f"part-{len(files)}"))
            waiting, waiting_bytes = {}, 0
        waiting[name] = tensor
        waiting_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    files.append(_write_part(waiting, folder / f"part-{len(files)}"))
    weight_map: dict[str, str] = {}
    for index, names in enumerate(files):  # how many there are is in every name, and known only now
        part = f"-{index + 1:05d}-of-{len(files):05d}" if len(files) > 1 else ""
        (folder / f"part-{index}").rename(folder / f"model{part}.safetensors")
        weight_map |= dict.fromkeys(names, f"model{part}.safetensors")
    if len(files) > 1:
        content = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
        write_text_atomic(folder / "model.safetensors.index.json", _json(content))


def _write_part(tensors: dict[str, Tensor], path: Path) -> list[str]:
    save_file(tensors, path, metadata={"format": "pt"})  # transformers asks for the format
    _sync(path)
    return list(tensors)


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
