"""A release from Megatron's checkpoint: the same folder for Hugging Face's LLaMA as the embedded trainer writes.

    python -m pathswitch_megatron.export CHECKPOINT OUT [--tokenizer FILE] [--run RUN] [--unverified]

One process on a CPU, without Megatron.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from pathswitch.checkpoint import MANIFEST_FILE, MEGATRON, Manifest, verify_checkpoint
from pathswitch.data import Tokenizer
from pathswitch.errors import CheckpointError, ConfigError, PathSwitchError
from pathswitch.integrations.megatron_state import TorchDistCheckpoint
from pathswitch.trainer.export import hf_config, release_digest, write_release
from pathswitch.trainer.llama import LlamaConfig
from pathswitch.versions.ledger import folder_name, run_ledger
from pathswitch.versions.records import ReleaseRecord

BRIDGE = "Megatron-Bridge's conversion to Hugging Face knows other architectures"
EMBEDDING = "embedding.word_embeddings.weight"
SHOWN = 5
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What LlamaForCausalLM computes, in Megatron's arguments. Extra weights (of experts, biases, norms of queries and keys)
# are found by their names as well, but the likes of a window or a clamp leave no trace in the weights.
NEEDED: dict[str, tuple[object, ...]] = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "add_bias_linear": (False,),
}
# One that a version does not have yet, or no longer, has the only value that it ever knew.
SUPPORTED: dict[str, tuple[object, ...]] = {
    **NEEDED,
    "rope_type": (None, "rope"),
    "rotary_percent": (1,),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "softmax_type": ("vanilla",),
}
OFF: tuple[object, ...] = (None, False)
SUPPORTED |= dict.fromkeys(("activation_func_clamp_value", "add_qkv_bias", "apply_layernorm_1p"), OFF)
SUPPORTED |= dict.fromkeys(("apply_residual_connection_post_layernorm", "attention_output_gate"), OFF)
SUPPORTED |= dict.fromkeys(("enable_mhc_connections", "experimental_attention_variant", "glu_linear_offset"), OFF)
SUPPORTED |= dict.fromkeys(("heterogeneous_layers_config_encoded_json", "heterogeneous_layers_config_path"), OFF)
SUPPORTED |= dict.fromkeys(("hybrid_layer_pattern", "hybrid_override_pattern", "is_hybrid_model"), OFF)
SUPPORTED |= dict.fromkeys(("layernorm_zero_centered_gamma", "linear_attention_freq", "mtp_num_layers"), OFF)
SUPPORTED |= dict.fromkeys(("multi_latent_attention", "no_rope_freq", "num_experts", "qk_l2_norm", "qk_layernorm"), OFF)
SUPPORTED |= dict.fromkeys(("rotary_interleaved", "softmax_scale", "spec", "use_legacy_models", "use_mup"), OFF)
SUPPORTED |= dict.fromkeys(("use_rope_scaling", "window_size", "yaml_cfg"), OFF)


def llama_config(arguments: Mapping[str, Any], vocab_size: int) -> LlamaConfig:
    """Return the LLaMA that Megatron's arguments describe, with ``vocab_size`` rows of embedding.

    Raises:
        ConfigError: they describe what Hugging Face's LLaMA cannot hold; all such arguments are named.
    """
    try:
        _require_llama(arguments)
        heads = arguments["num_attention_heads"]
        return LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=arguments["hidden_size"],
            intermediate_size=arguments["ffn_hidden_size"],
            n_layers=arguments["num_layers"],
            n_heads=heads,
            n_kv_heads=arguments["num_query_groups"] if arguments["group_query_attention"] else heads,
            max_seq_len=arguments["max_position_embeddings"],
            rope_theta=float(arguments["rotary_base"]),
            norm_eps=arguments["norm_epsilon" if "norm_epsilon" in arguments else "layernorm_epsilon"],
            tie_embeddings=not arguments["untie_embeddings_and_output_weights"],
            init_std=arguments["init_method_std"],
        )
    except KeyError as error:
        raise ConfigError("Megatron's arguments", given=f"no {error.args[0]}", allowed="those of a GPTModel") from None


def _require_llama(arguments: Mapping[str, Any]) -> None:
    head_dim = arguments["hidden_size"] // arguments["num_attention_heads"]
    supported = SUPPORTED | {"kv_channels": (head_dim,)}
    given = {name: arguments[name] for name in supported if name in arguments or name in NEEDED}
    refused = {name: value for name, value in given.items() if value not in supported[name]}
    if refused:
        allowed = ", ".join(f"{name} {' or '.join(map(repr, supported[name]))}" for name in refused)
        raise ConfigError("Megatron's arguments", given=refused, allowed=f"{allowed} as in a LLaMA; {BRIDGE}")


def true_vocab_size(arguments: Mapping[str, Any], tokenizer: Tokenizer | None) -> int | None:
    """Return the vocabulary's size without padding, None where neither the tokenizer nor the arguments tell it."""
    if tokenizer is not None:
        return tokenizer.vocab_size
    size: int | None = arguments.get("vocab_size")
    if size is not None and arguments.get("tokenizer_type") == "NullTokenizer":
        return size + 1  # until 0.18 it puts an end of document behind them; later one row of padding is kept
    return size


def megatron_shapes(config: LlamaConfig, rows: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of Megatron's tensors, ``rows`` of embedding with its padding; a layer's begin with a "."."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (rows, hidden),
        # Both layer specs save a layer's norms under the names that Transformer Engine's fused modules give them.
        ".self_attention.linear_qkv.layer_norm_weight": (hidden,),
        ".self_attention.linear_qkv.weight": ((config.n_heads + 2 * config.n_kv_heads) * config.head_dim, hidden),
        ".self_attention.linear_proj.weight": (hidden, hidden),
        ".mlp.linear_fc1.layer_norm_weight": (hidden,),
        ".mlp.linear_fc1.weight": (2 * inner, hidden),
        ".mlp.linear_fc2.weight": (hidden, inner),
        "decoder.final_layernorm.weight": (hidden,),
    }
    return shapes if config.tie_embeddings else shapes | {"output_layer.weight": (rows, hidden)}


def split_qkv(qkv: Tensor, config: LlamaConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Return q [hidden, hidden], k and v [kv heads * head_dim, hidden] of Megatron's query groups.

    A group's rows are those of its queries, its key and its value, one group after the other.
    """
    groups, shared = config.n_kv_heads, config.n_heads // config.n_kv_heads
    rows = qkv.view(groups, shared + 2, config.head_dim, -1)
    q, k, v = (part.flatten(0, 2) for part in (rows[:, :shared], rows[:, shared:-1], rows[:, -1:]))
    return q, k, v


class MegatronCheckpoint(TorchDistCheckpoint):
    """A folder ``iter_…`` of Megatron's format torch_dist: its arguments, and its model's tensors read in slices."""

    ALLOWED = f"{TorchDistCheckpoint.ALLOWED}, or the one that holds it"

    def __init__(self, folder: Path) -> None:
        """Read the metadata; raises CheckpointError where the folder is not of the format torch_dist."""
        super().__init__(folder)
        self.tensors: dict[str, TensorStorageMetadata] = {
            name: stored
            for name, stored in self._stored.items()
            if isinstance(stored, TensorStorageMetadata) and not name.startswith(("optimizer.", "chained_"))
        }

    def embedding_rows(self) -> int:
        """Return the vocabulary's size with its padding; raises CheckpointError where there is no embedding."""
        if EMBEDDING not in self.tensors:
            raise CheckpointError(f"{self.folder}: given no {EMBEDDING}; allowed: a checkpoint of a GPTModel; {BRIDGE}")
        return self.tensors[EMBEDDING].size[0]

    def check(self, config: LlamaConfig) -> torch.dtype:
        """Return the dtype of the model's tensors.

        Raises:
            CheckpointError: a tensor is missing, is none of a LLaMA's, or has another shape or dtype.
        """
        expected: dict[str, tuple[int, ...]] = {}
        for name, shape in megatron_shapes(config, self.embedding_rows()).items():
            stacked, layers = f"decoder.layers{name}", range(config.n_layers)
            if not name.startswith("."):
                expected[name] = shape
            elif stacked in self.tensors:
                expected[stacked] = (config.n_layers, *shape)
            else:
                expected |= {f"decoder.layers.{n}{name}": shape for n in layers}
        dtype = self.tensors[EMBEDDING].properties.dtype
        given = {name: (tuple(stored.size), stored.properties.dtype) for name, stored in self.tensors.items()}
        wrong = [f"no {name}" for name in sorted(expected.keys() - given.keys())]
        for name, (shape, stored_dtype) in sorted(given.items()):
            if (shape, stored_dtype) != (expected.get(name), dtype) or dtype not in DTYPES:
                wrong.append(f"{name} {stored_dtype} {shape}")
        if wrong:
            shown = ", ".join(wrong[:SHOWN]) + (f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else "")
            allowed = f"the weights of a LLaMA of {config.n_layers} layers in one of {', '.join(map(str, DTYPES))}"
            raise CheckpointError(f"{self.folder}: given {shown}; allowed: {allowed}; {BRIDGE}")
        return dtype

    def read_layer(self, layer: int, name: str, first: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Return a part of a layer's tensor: Megatron stacks layers that are alike, or keeps each for itself."""
        stacked = f"decoder.layers{name}"
        if stacked in self.tensors:
            return self.read(stacked, (layer, *first), (1, *size))[0]
        return self.read(f"decoder.layers.{layer}{name}", first, size)

    def read(self, name: str, first: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """Return the part of a tensor that begins at the index ``first``; only what is stored of it is read.

        Raises:
            CheckpointError: some of it is not stored.
        """
        stored = self.tensors[name]
        target = torch.empty(size, dtype=stored.properties.dtype)
        chunk = ChunkStorageMetadata(offsets=torch.Size(first), sizes=torch.Size(size))
        items = create_read_items_for_chunk_list(name, stored, [chunk])
        if sum(math.prod(item.lengths) for item in items) != target.numel():
            raise CheckpointError(f"{self.folder}: {name} has holes or is stored twice")
        self.read_items(items, target)
        return target


def release_weights(checkpoint: MegatronCheckpoint, config: LlamaConfig) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights by Hugging Face's names, one layer's at a time: a stack of layers may be larger than memory."""
    shapes, hidden, inner = megatron_shapes(config, config.vocab_size), config.hidden_size, config.intermediate_size

    def whole(name: str, layer: int) -> Tensor:
        return checkpoint.read_layer(layer, name, (0,) * len(shapes[name]), shapes[name])

    yield "model.embed_tokens.weight", checkpoint.read(EMBEDDING, (0, 0), shapes[EMBEDDING])
    for n in range(config.n_layers):
        prefix = f"model.layers.{n}"
        for letter, weight in zip("qkv", split_qkv(whole(".self_attention.linear_qkv.weight", n), config), strict=True):
            yield f"{prefix}.self_attn.{letter}_proj.weight", weight
        yield f"{prefix}.self_attn.o_proj.weight", whole(".self_attention.linear_proj.weight", n)
        for first_row, half in ((0, "gate"), (inner, "up")):
            weight = checkpoint.read_layer(n, ".mlp.linear_fc1.weight", (first_row, 0), (inner, hidden))
            yield f"{prefix}.mlp.{half}_proj.weight", weight
        yield f"{prefix}.mlp.down_proj.weight", whole(".mlp.linear_fc2.weight", n)
        yield f"{prefix}.input_layernorm.weight", whole(".self_attention.linear_qkv.layer_norm_weight", n)
        yield f"{prefix}.post_attention_layernorm.weight", whole(".mlp.linear_fc1.layer_norm_weight", n)
    yield "model.norm.weight", checkpoint.read("decoder.final_layernorm.weight", (0,), (hidden,))
    if not config.tie_embeddings:
        yield "lm_head.weight", checkpoint.read("output_layer.weight", (0, 0), shapes["output_layer.weight"])


def export_checkpoint(
    folder: Path, out: Path, *, tokenizer: Path | None = None, run: Path | None = None, unverified: bool = False
) -> list[str]:
    """Write the release ``out`` and return what there is to say about it; with ``run``, its ledger gets a record.

    Raises:
        CheckpointError: the checkpoint is not committed, damaged, or not a LLaMA's in Megatron's format torch_dist.
        ConfigError: the model, the tokenizer or the run does not fit.
        RunError: ``out`` exists with other content.
    """
    newest = MEGATRON.latest(folder)
    folder = folder / newest if newest else folder
    manifest = _verified(folder, unverified)
    if run is not None and (manifest is None or not run_ledger(run).folder.is_dir()):
        allowed = "a run folder with a ledger, for a committed checkpoint"
        raise ConfigError("--run", given=f"{run} for {folder}", allowed=allowed)
    checkpoint, pieces = MegatronCheckpoint(folder), None if tokenizer is None else Tokenizer(tokenizer)
    arguments, iteration = checkpoint.arguments()
    rows = checkpoint.embedding_rows()
    size = true_vocab_size(arguments, pieces)
    if size is not None and size > rows:
        raise ConfigError("vocabulary", given=size, allowed=f"at most the {rows} rows of {EMBEDDING}")
    config = llama_config(arguments, size or rows)
    dtype = checkpoint.check(config)
    described = hf_config(config, dtype, eos_token_id=None if pieces is None else pieces.eos_id)
    metadata = {"step": str(iteration)}
    if manifest is not None:
        metadata = {"version": manifest.path, "paradigm": manifest.paradigm, "step": str(manifest.step)}
    write_release(release_weights(checkpoint, config), described, tokenizer, out, metadata=metadata)
    if run is not None and manifest is not None:
        _record(run, out, manifest)
    kept = f"{size} of {rows} rows" if size else f"{rows} rows, any padding among them: --tokenizer tells its size"
    return [f"vocabulary: {kept}", f"{out}: {config.n_params:,} parameters in {dtype}, step {metadata['step']}"]


def _verified(folder: Path, unverified: bool) -> Manifest | None:
    if (folder / MANIFEST_FILE).exists():
        return verify_checkpoint(folder)
    if not unverified:
        raise CheckpointError(
            f"{folder}: given a folder without {MANIFEST_FILE}; allowed: a committed checkpoint (`pathswitch adopt "
            f"{folder}` commits one that you know is whole), or any with --unverified"
        )
    return None


def _record(run: Path, out: Path, manifest: Manifest) -> None:
    record = ReleaseRecord(
        folder=folder_name(out, run),
        paradigm=manifest.paradigm,
        path=manifest.path,
        step=manifest.step,
        checkpoint=manifest.digest,
        digest=release_digest(out),
    )
    run_ledger(run).append(record)


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def command(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="iter_…, or the folder of such.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The release: a new folder.")],
    tokenizer: Annotated[Path | None, typer.Option(metavar="FILE", help="The SentencePiece model.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="Record the release in this run's ledger.")] = None,
    unverified: Annotated[bool, typer.Option("--unverified", help="Unpickle what no manifest vouches for.")] = False,
) -> None:
    """Write a LLaMA in Megatron's format torch_dist as a folder for Hugging Face transformers."""
    for line in export_checkpoint(checkpoint, out, tokenizer=tokenizer, run=run, unverified=unverified):
        print(line)


def main() -> None:
    """Run the command; an error of the family is one line on stderr and exit code 2."""
    try:
        app()
    except PathSwitchError as error:
        print(f"pathswitch: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
