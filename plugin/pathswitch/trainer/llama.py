"""A LLaMA whose parameters carry Hugging Face's names and conventions, so that a release is a dump of its state."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pathswitch.data import IGNORED_TARGET
from pathswitch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a LLaMA; raises ConfigError when its numbers do not fit together."""

    vocab_size: int
    """Rows of the embedding."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the SwiGLU."""
    n_layers: int
    n_heads: int
    n_kv_heads: int = 0
    """Key and value heads, each shared by n_heads / n_kv_heads query heads; 0 means n_heads."""
    max_seq_len: int
    """Longest sequence, in tokens."""
    rope_theta: float = 10000.0
    """Base of the rotary wavelengths."""
    norm_eps: float = 1e-5
    tie_embeddings: bool = True
    """Whether lm_head shares the embedding's weight."""
    init_std: float = 0.02
    """Standard deviation of the initial weights."""

    def __post_init__(self) -> None:
        if self.n_kv_heads == 0:
            object.__setattr__(self, "n_kv_heads", self.n_heads)
        for name in ("vocab_size", "hidden_size", "intermediate_size", "n_layers", "n_heads", "n_kv_heads"):
            self._require(name, getattr(self, name) > 0, "a positive integer")
        for name in ("max_seq_len", "rope_theta", "norm_eps", "init_std"):
            self._require(name, getattr(self, name) > 0, "a positive number")
        self._require("hidden_size", self.hidden_size % self.n_heads == 0, f"a multiple of {self.n_heads} heads")
        even = self.head_dim % 2 == 0
        self._require("hidden_size", even, f"an even number per head ({self.n_heads} heads): RoPE rotates pairs")
        shared = self.n_heads % self.n_kv_heads == 0
        self._require("n_kv_heads", shared, f"a divisor of n_heads = {self.n_heads}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"model.{name}", given=getattr(self, name), allowed=allowed)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.n_heads

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every parameter by its Hugging Face name, a tied lm_head left out."""
        hidden, inner, kv_size = self.hidden_size, self.intermediate_size, self.n_kv_heads * self.head_dim
        layer: dict[str, tuple[int, ...]] = {
            "self_attn.q_proj.weight": (hidden, hidden),
            "self_attn.k_proj.weight": (kv_size, hidden),
            "self_attn.v_proj.weight": (kv_size, hidden),
            "self_attn.o_proj.weight": (hidden, hidden),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
        }
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, hidden)}
        for n in range(self.n_layers):
            shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, hidden)
        return shapes

    @property
    def n_params(self) -> int:
        """Number of trained weights; a tied embedding counts once."""
        return sum(math.prod(shape) for shape in self.shapes.values())


def rotary_tables(length: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines, fp32 [length, head_dim], of the angles position * theta^(-2i / head_dim).

    The sine's first half is negated: see ``rotate``.
    """
    pair = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device)
    position = torch.arange(length, dtype=torch.float32, device=device)
    angle = position[:, None] * theta ** (-pair / head_dim)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + head_dim / 2]) of x [..., length, head_dim] by the tables' angles, in fp32.

    Rolling by half a head and negating half of the sines once is Hugging Face's rotate_half without its copies.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., size]."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class Attention(nn.Module):
    """Causal self-attention with rotary positions and grouped key and value heads."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.grouped = config.n_kv_heads != config.n_heads
        kv_size = config.n_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [B, L, hidden] to [B, L, hidden]; position t sees positions 0..t."""
        q, k, v = (self._heads(projection(x)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)  # [B, heads, L, head_dim]


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., hidden] to [..., hidden]."""
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x [B, L, hidden] to [B, L, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Decoder(nn.Module):
    """Embedding, layers and the last norm: what Hugging Face calls ``model``."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.n_layers))
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map token ids int64 [B, L] to hidden states [B, L, hidden]; raises ConfigError when L > max_seq_len."""
        length, longest = inputs.shape[1], self.config.max_seq_len
        if length > longest:
            raise ConfigError("inputs", given=f"{length} tokens", allowed=f"at most max_seq_len = {longest}")
        # Made anew in each forward (0.1 ms): a buffer would be rounded to bf16 when DeepSpeed casts the module.
        cos, sin = rotary_tables(length, self.config.head_dim, self.config.rope_theta, inputs.device)
        x = self.embed_tokens(inputs)
        for layer in self.layers:
            x = layer(x, cos, sin)
        out: Tensor = self.norm(x)
        return out


class Llama(nn.Module):
    """A causal language model whose initial weights are a function of (config, seed) alone."""

    def __init__(self, config: LlamaConfig, *, seed: int) -> None:
        super().__init__()
        self.config = config
        with torch.device("meta"):  # torch's own initialisation would draw from the global generator
            self.model = Decoder(config)
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.to_empty(device="cpu")
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._initialise(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def _initialise(self, generator: torch.Generator) -> None:
        """Draw N(0, init_std), the 2 * n_layers projections that add to the residual stream scaled down (GPT-2)."""
        residual_std = self.config.init_std / math.sqrt(2 * self.config.n_layers)
        for name, weight in self.named_parameters():
            if weight.ndim == 1:
                weight.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.normal_(0.0, residual_std, generator=generator)
            else:
                weight.normal_(0.0, self.config.init_std, generator=generator)

    def logits(self, inputs: Tensor) -> Tensor:
        """Logits fp32 [B, L, vocab] of the token after each of int64 inputs [B, L]."""
        logits: Tensor = self.lm_head(self.model(inputs))
        return logits.float()

    def forward(self, inputs: Tensor, targets: Tensor, reduction: Literal["mean", "none"] = "mean") -> Tensor:
        """Cross-entropy in nats, fp32, of int64 targets [B, L] given int64 inputs [B, L].

        ``mean`` averages over the targets that are not IGNORED_TARGET (nan when there are none),
        ``none`` gives [B * L].
        """
        logits = self.logits(inputs).flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED_TARGET, reduction=reduction)

    def token_nll(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
        """Sum of the negative log-likelihood in nats (float64 scalar) and the number of targets not IGNORED_TARGET."""
        # Through __call__, not forward: ZeRO-3 gathers weights in the hooks of a module call.
        losses: Tensor = self(inputs, targets, "none")
        return losses.double().sum(), int((targets != IGNORED_TARGET).sum())
