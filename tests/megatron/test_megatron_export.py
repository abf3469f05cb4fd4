"""A release made of Megatron's checkpoint computes what Megatron does, or is refused."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import core_ranks
import pytest
import torch
from megatron_files import ARGUMENTS, ROWS, VOCABULARY, Tensors, commit, megatron_tensors, save, weights
from safetensors.torch import load_file
from torch.distributed.checkpoint.filesystem import FileSystemReader

from pathswitch.checkpoint import MANIFEST_FILE
from pathswitch.data import train_tokenizer
from pathswitch.errors import CheckpointError, ConfigError
from pathswitch.trainer import export as trainer_export
from pathswitch.trainer.export import export_release, release_digest
from pathswitch.versions.ledger import run_ledger
from pathswitch_megatron import export
from pathswitch_megatron.export import MegatronCheckpoint, export_checkpoint, llama_config, true_vocab_size

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "pieces.model"
    text = "The paths leave the main path, one after another, and each decays to its own release. "
    train_tokenizer([text * 20], vocab_size=VOCABULARY, model_path=path)
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("separate", [False, True], ids=["stacked", "separate"])
@pytest.mark.parametrize(
    "different",
    [{}, {"untie_embeddings_and_output_weights": False}, {"num_query_groups": 1}],
    ids=["untied", "tied", "multi_query"],
)
def test_the_files_are_those_of_the_trainer(
    tokenizer: Path, tmp_path: Path, different: dict[str, Any], separate: bool
) -> None:
    config, state = weights(**different)
    if config.tie_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    tensors = megatron_tensors(state, config, separate=separate)
    folder = save(tmp_path / "iter_0000007", tensors, **different)
    said = export_checkpoint(folder, tmp_path / "out", tokenizer=tokenizer, unverified=True)
    export_release(state, config, tokenizer, tmp_path / "trainers", eos_token_id=1, metadata={"step": "7"})
    assert contents(tmp_path / "out") == contents(tmp_path / "trainers")
    assert said[0] == f"vocabulary: {VOCABULARY} of {ROWS} rows"
    assert "step 7" in said[1]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("normalization", "LayerNorm"),
        ("swiglu", False),
        ("position_embedding_type", "learned_absolute"),
        ("add_bias_linear", True),
        ("add_qkv_bias", True),
        ("apply_layernorm_1p", True),
        ("layernorm_zero_centered_gamma", True),
        ("apply_residual_connection_post_layernorm", True),
        ("num_experts", 8),
        ("multi_latent_attention", True),
        ("mtp_num_layers", 1),
        ("qk_layernorm", True),
        ("qk_l2_norm", True),
        ("rotary_interleaved", True),
        ("rotary_percent", 0.5),
        ("rotary_seq_len_interpolation_factor", 4),
        ("use_rope_scaling", True),
        ("rope_type", "yarn"),
        ("no_rope_freq", 4),
        ("kv_channels", 8),
        ("window_size", (128, 0)),
        ("softmax_type", "off-by-one"),
        ("softmax_scale", 0.1),
        ("glu_linear_offset", 1.0),
        ("activation_func_clamp_value", 7.0),
        ("attention_output_gate", True),
        ("experimental_attention_variant", "gated_delta_net"),
        ("linear_attention_freq", 4),
        ("hybrid_layer_pattern", "M*"),
        ("hybrid_override_pattern", "M*"),
        ("is_hybrid_model", True),
        ("heterogeneous_layers_config_path", "layers.json"),
        ("heterogeneous_layers_config_encoded_json", "{}"),
        ("enable_mhc_connections", True),
        ("use_mup", True),
        ("use_legacy_models", True),
        ("spec", ["my.module", "spec"]),
        ("yaml_cfg", "model.yaml"),
    ],
)
def test_what_a_llama_cannot_hold_is_refused(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^Megatron's arguments: given .*'{name}': .*Megatron-Bridge") as error:
        llama_config(ARGUMENTS | {name: value}, VOCABULARY)
    assert error.value.given == {name: value}


def test_each_switch_that_is_looked_at_has_a_refusal() -> None:
    marks: list[Any] = test_what_a_llama_cannot_hold_is_refused.pytestmark  # type: ignore[attr-defined]
    assert {name for name, _ in marks[0].args[1]} == export.SUPPORTED.keys() | {"kv_channels"}


def test_one_error_names_all_that_is_refused() -> None:
    given = {"normalization": "LayerNorm", "swiglu": False, "num_experts": 8}
    with pytest.raises(ConfigError) as error:
        llama_config(ARGUMENTS | given, VOCABULARY)
    assert error.value.given == given
    assert "normalization 'RMSNorm', swiglu True, num_experts None or False" in error.value.allowed


def test_arguments_of_other_versions() -> None:
    older = {name: value for name, value in ARGUMENTS.items() if name != "layernorm_epsilon"} | {"norm_epsilon": 0.5}
    assert llama_config(older, VOCABULARY).norm_eps == 0.5
    newer = {"mtp_num_layers": None, "rope_type": "rope", "glu_linear_offset": 0.0, "rotary_percent": 1.0}
    assert llama_config(ARGUMENTS | newer, VOCABULARY) == llama_config(ARGUMENTS, VOCABULARY)
    ungrouped = {"group_query_attention": False, "num_query_groups": 1}
    assert llama_config(ARGUMENTS | ungrouped, VOCABULARY).n_kv_heads == 4
    for missing in ("hidden_size", "swiglu", "rotary_base", "layernorm_epsilon"):
        with pytest.raises(ConfigError, match=f"given 'no {missing}'"):
            llama_config({name: value for name, value in ARGUMENTS.items() if name != missing}, VOCABULARY)


def test_the_vocabulary_is_cut_where_its_size_is_known(tokenizer: Path, tmp_path: Path) -> None:
    assert true_vocab_size({"vocab_size": None}, None) is None
    assert true_vocab_size({"vocab_size": 90, "tokenizer_type": "TikTokenizer"}, None) == 90
    assert true_vocab_size({"vocab_size": 90, "tokenizer_type": "NullTokenizer"}, None) == 91
    config, state = weights()
    tensors = megatron_tensors(state, config)
    folder = save(tmp_path / "kept", tensors, vocab_size=None)
    said = export_checkpoint(folder, tmp_path / "out", unverified=True)
    assert said[0] == f"vocabulary: {ROWS} rows, any padding among them: --tokenizer tells its size"
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["lm_head.weight"], tensors["output_layer.weight"])
    described = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (described["vocab_size"], described["eos_token_id"]) == (ROWS, None)
    assert not (tmp_path / "out" / "tokenizer.model").exists()
    with pytest.raises(ConfigError, match=f"vocabulary: given 321; allowed: at most the {ROWS} rows"):
        export_checkpoint(save(tmp_path / "large", tensors, vocab_size=321), tmp_path / "no", unverified=True)
    assert not (tmp_path / "no").exists()


def test_other_weights_are_refused(tmp_path: Path) -> None:
    config, state = weights()
    tensors = megatron_tensors(state, config)
    norm = "decoder.final_layernorm.weight"

    def refused(changed: Tensors, message: str) -> None:
        folder = save(tmp_path / f"{len(list(tmp_path.iterdir()))}", changed)
        with pytest.raises(CheckpointError, match=message):
            export_checkpoint(folder, tmp_path / "out", unverified=True)

    bias = "decoder.layers.self_attention.linear_qkv.bias"
    refused(tensors | {bias: torch.ones(3, 32)}, rf"given {bias} torch.float32 \(3, 32\); allowed: .*Megatron-Bridge")
    refused({name: tensor for name, tensor in tensors.items() if name != norm}, f"given no {norm};")
    refused(tensors | {norm: torch.ones(17)}, rf"given {norm} torch.float32 \(17,\);")
    refused(tensors | {norm: torch.ones(16).bfloat16()}, rf"given {norm} torch.bfloat16 \(16,\);")
    refused({name: tensor.double() for name, tensor in tensors.items()}, "float64 .* and 4 more; allowed: .* in one of")
    refused({"mamba.weight": torch.ones(1)}, "given no embedding.word_embeddings.weight; allowed: .* GPTModel")
    assert not (tmp_path / "out").exists()


def test_holes_are_refused(tmp_path: Path) -> None:
    checkpoint = MegatronCheckpoint(save(tmp_path / "iter_0000007"))
    name = "decoder.final_layernorm.weight"
    assert checkpoint.read(name, (4,), (8,)).shape == (8,)
    checkpoint.tensors[name].chunks.clear()
    with pytest.raises(CheckpointError, match=f"{name} has holes"):
        checkpoint.read(name, (4,), (8,))


def test_reads_are_bounded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of a large model neither a stack of layers nor the optimizer's state fits into memory."""
    folder, sizes = save(tmp_path / "iter_0000007"), {}
    read_data = FileSystemReader.read_data

    def spy(self: Any, plan: Any, planner: Any) -> Any:
        sizes.update({item.storage_index.fqn: math.prod(item.lengths) for item in plan.items})
        return read_data(self, plan, planner)

    monkeypatch.setattr(FileSystemReader, "read_data", spy)
    export_checkpoint(folder, tmp_path / "out", unverified=True)
    assert not any("optimizer" in name for name in sizes)
    assert sizes["decoder.layers.mlp.linear_fc1.weight"] == 24 * 16
    assert max(sizes.values()) == VOCABULARY * 16


def test_a_large_model_is_cut_into_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save(tmp_path / "iter_0000007")
    export_checkpoint(folder, tmp_path / "whole", unverified=True)
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    monkeypatch.setattr(trainer_export, "FILE_BYTES", 22_000)  # an embedding has 19,200
    export_checkpoint(folder, tmp_path / "out", unverified=True)
    names = [f"model-{n}-of-00003.safetensors" for n in ("00001", "00002", "00003")]
    index_name = "model.safetensors.index.json"
    assert contents(tmp_path / "out").keys() == {*names, index_name, "config.json", "release.json"}
    index = json.loads((tmp_path / "out" / index_name).read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in whole.values())}
    for name in names:
        tensors = load_file(tmp_path / "out" / name)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 22_000
        assert {tensor for tensor, file in index["weight_map"].items() if file == name} == tensors.keys()
        assert all(torch.equal(tensor, whole.pop(tensor_name)) for tensor_name, tensor in tensors.items())
    assert not whole


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_arguments_are_read_without_running_them(tmp_path: Path) -> None:
    folder = save(tmp_path / "iter_0000007", external=Exploit(tmp_path / "ran"), dtype=torch.bfloat16)
    export_checkpoint(folder, tmp_path / "out", unverified=True)
    assert not (tmp_path / "ran").exists()


def test_other_formats_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path, message: str) -> None:
        with pytest.raises(
            CheckpointError, match=rf"{folder}: given {message}.*; allowed: .* --ckpt-format torch_dist"
        ):
            export_checkpoint(folder, tmp_path / "out", unverified=True)

    refused(tmp_path / "none", "no such checkpoint")
    folder = save(tmp_path / "iter_0000007")
    (folder / "common.pt").unlink()
    refused(folder, "one without Megatron's arguments")
    (folder / "common.pt").write_bytes(b"no archive")
    refused(folder, "one without Megatron's arguments")
    (folder / "metadata.json").write_text('{"sharded_backend": "fsdp_dtensor"}')
    refused(folder, "the format fsdp_dtensor")
    (folder / ".metadata").write_bytes(b"")
    refused(folder, "no such checkpoint")


def call(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        export.main()
    return int(stopped.value.code or 0)


def test_a_committed_checkpoint_is_verified_and_its_release_recorded(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    folder, out = save(run / "checkpoints" / "iter_0000007"), run / "release"
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    assert call(monkeypatch, folder.parent, out) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"pathswitch: error: {folder}: given a folder without {MANIFEST_FILE}; allowed: ")
    assert f"pathswitch adopt {folder}" in error and error.count("\n") == 1

    manifest = commit(folder)
    assert call(monkeypatch, folder.parent, out, "--run", run) == 2  # no ledger
    run_ledger(run).folder.mkdir()
    assert call(monkeypatch, folder.parent, out, "--run", run) == 0
    assert json.loads((out / "release.json").read_text()) == {
        "version": "v2",
        "paradigm": "path_switching",
        "step": "7",
    }
    (stored,) = run_ledger(run).read().records
    assert stored.record == export.ReleaseRecord(
        "release", "path_switching", "v2", 7, manifest.digest, release_digest(out)
    )

    (folder / "common.pt").write_bytes(b"damaged")
    assert call(monkeypatch, folder, tmp_path / "other", "--unverified") == 2
    assert f"{folder}: damaged: common.pt" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_only_a_committed_checkpoint_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save(tmp_path / "iter_0000007")
    run_ledger(tmp_path).folder.mkdir()
    assert call(monkeypatch, folder, tmp_path / "out", "--unverified", "--run", tmp_path) == 2
    assert not (tmp_path / "out").exists()
    assert call(monkeypatch, folder, tmp_path / "out", "--unverified") == 0


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints that megatron-core has written in two processes, and what it computes."""
    if importlib.util.find_spec("megatron") is None:
        pytest.skip("megatron-core is not installed")
    folder = tmp_path_factory.mktemp("megatron")
    done = core_ranks.run("worker_megatron_export.py", str(folder), folder=folder, ranks=2)
    assert done.returncode == 0, done.output[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("model", ["untied", "tied", "separate", "multi_query", "ungrouped"])
def test_transformers_computes_what_megatron_does(checkpoints: Path, tmp_path: Path, model: str) -> None:
    transformers = pytest.importorskip("transformers")
    export_checkpoint(checkpoints / f"{model}-tp1", tmp_path / "out", unverified=True)
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, logits = torch.load(checkpoints / f"{model}.pt")
    with torch.no_grad():
        found = theirs(input_ids=tokens).logits
    assert logits.std() > 0.5
    assert (found - logits).abs().max() < 1e-5
    assert torch.equal(found.argmax(-1), logits.argmax(-1))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["untied", "tied"])
def test_the_parallelism_leaves_no_trace(checkpoints: Path, tmp_path: Path, model: str) -> None:
    for parallelism in ("tp1", "tp2", "pp2"):
        export_checkpoint(checkpoints / f"{model}-{parallelism}", tmp_path / parallelism, unverified=True)
    assert contents(tmp_path / "tp1") == contents(tmp_path / "tp2") == contents(tmp_path / "pp2")


@pytest.mark.slow
def test_bf16_stays_bf16(checkpoints: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pathswitch_megatron.export", str(checkpoints / "bf16-tp1")]
    subprocess.run([*command, str(tmp_path / "bf16"), "--unverified"], check=True, timeout=120)
    export_checkpoint(checkpoints / "tied-tp1", tmp_path / "fp32", unverified=True)
    bf16, fp32 = (load_file(tmp_path / name / "model.safetensors") for name in ("bf16", "fp32"))
    assert all(torch.equal(bf16[name], fp32[name].bfloat16()) for name in bf16.keys() | fp32.keys())
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["torch_dtype"] == "bfloat16"
