from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from pathswitch.data import IGNORED_TARGET
from pathswitch.errors import ConfigError, RunError
from pathswitch.trainer import export
from pathswitch.trainer.export import export_release
from pathswitch.trainer.llama import Llama, LlamaConfig

# Nothing at Hugging Face's default, so that a field that is not read back shows.
TINY = LlamaConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    n_layers=2,
    n_heads=4,
    max_seq_len=16,
    rope_theta=50.0,
    norm_eps=1e-2,
    init_std=0.2,
)
CONFIGS = {
    "tied": TINY,
    "untied": dataclasses.replace(TINY, tie_embeddings=False),
    "grouped": dataclasses.replace(TINY, n_kv_heads=2),
}
METADATA = {"version": "v2", "parent": "ab12", "step": "400"}


@pytest.fixture
def tokenizer_model(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"pieces")
    return path


def release(model: Llama, tokenizer_model: Path, out: Path, *, metadata: dict[str, str] = METADATA) -> dict[str, bytes]:
    export_release(model.state_dict(), model.config, tokenizer_model, out, eos_token_id=1, metadata=metadata)
    return contents(out)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_transformers_computes_the_same(config: LlamaConfig, tokenizer_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = Llama(config, seed=3)
    with torch.no_grad():  # at their initial 1.0 the norms' weights could be lost unseen
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
    release(model, tokenizer_model, tmp_path / "out")
    theirs, info = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert theirs.dtype == torch.float32
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, 1)
    assert theirs.config.tie_word_embeddings is config.tie_embeddings

    sequence = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(0))
    targets = torch.cat((sequence[:, 1:], torch.full((3, 1), IGNORED_TARGET)), dim=1)
    with torch.no_grad():
        output = theirs(input_ids=sequence, labels=sequence)  # transformers shifts the labels itself
        ours, loss = model.logits(sequence), model(sequence, targets)
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, output.logits, rtol=0, atol=1e-5)
    assert loss.item() == pytest.approx(output.loss.item(), rel=1e-6)


def test_bf16_stays_bf16(tokenizer_model: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = Llama(TINY, seed=0).bfloat16()
    release(model, tokenizer_model, tmp_path / "out")
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert theirs.dtype == torch.bfloat16
    sequence = torch.arange(16)[None]
    with torch.no_grad():
        ours, expected = model.logits(sequence), theirs(sequence).logits.float()
    assert (ours - expected).abs().max() < 0.05 * expected.std()


def test_files(tokenizer_model: Path, tmp_path: Path) -> None:
    files = release(Llama(TINY, seed=0), tokenizer_model, tmp_path / "releases" / "v2")
    assert files.keys() == {"model.safetensors", "config.json", "tokenizer.model", "release.json"}
    assert files["tokenizer.model"] == b"pieces"
    assert json.loads(files["release.json"]) == METADATA
    with safe_open(tmp_path / "releases" / "v2" / "model.safetensors", "pt") as weights:
        assert set(weights.keys()) == TINY.shapes.keys()  # a tied head is stored once
        assert weights.metadata() == {"format": "pt"}  # transformers 4 does not load weights that do not say it
    assert [path.name for path in (tmp_path / "releases").iterdir()] == ["v2"]


def test_the_same_release_again_is_no_change(tokenizer_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    model = Llama(TINY, seed=0)
    release(model, tokenizer_model, out)
    inodes = {path.name: path.stat().st_ino for path in out.iterdir()}
    release(model, tokenizer_model, out)
    assert {path.name: path.stat().st_ino for path in out.iterdir()} == inodes
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tokenizer.model"}


def test_another_release_is_refused_and_harms_nothing(tokenizer_model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = release(Llama(TINY, seed=0), tokenizer_model, out)
    with pytest.raises(RunError, match=r"differs in model\.safetensors;"):
        release(Llama(TINY, seed=1), tokenizer_model, out)
    with pytest.raises(RunError, match=r"differs in release\.json;"):
        release(Llama(TINY, seed=0), tokenizer_model, out, metadata={"version": "v3"})
    (out / "notes").write_text("mine")
    with pytest.raises(RunError, match="differs in notes;"):
        release(Llama(TINY, seed=0), tokenizer_model, out)
    assert contents(out) == before | {"notes": b"mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"out", "tokenizer.model"}


@pytest.mark.parametrize("fails_in", ["save_file", "write_text_atomic", "write_bytes_atomic", "publish"])
def test_an_interrupted_export_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tokenizer_model: Path, tmp_path: Path, fails_in: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(export, fails_in, interrupt)
    with pytest.raises(KeyboardInterrupt):
        release(Llama(TINY, seed=0), tokenizer_model, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]


def test_state_must_fit_the_config(tokenizer_model: Path, tmp_path: Path) -> None:
    def refused(state: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            export_release(state, TINY, tokenizer_model, tmp_path / "out", eos_token_id=1, metadata={})
        assert not (tmp_path / "out").exists()

    state = Llama(TINY, seed=0).state_dict()
    norm = "model.norm.weight"
    refused({name: weight for name, weight in state.items() if name != norm}, rf"missing \['{norm}'\], unknown \[\]")
    refused(state | {"module.x": state[norm]}, r"missing \[\], unknown \['module.x'\]")
    refused(state | {norm: torch.ones(33)}, r"model\.norm\.weight: given 'torch.float32 \(33,\)'")
    refused(state | {norm: state[norm].bfloat16()}, "given 'torch.bfloat16")
    refused(state | {"lm_head.weight": torch.zeros(61, 32)}, r"lm_head\.weight: given 'weights of its own'")
