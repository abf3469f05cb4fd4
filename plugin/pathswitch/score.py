"""What a model makes of a test set."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import exp, fsum, inf, log

# exp() of a larger mean loss overflows: such a model knows nothing, and its perplexity reads "inf".
LARGEST_EXPONENT = 700.0


@dataclass(frozen=True)
class Score:
    """Total negative log-likelihood in nats, scored tokens, and the UTF-8 bytes of the text that they spell."""

    nll_nats: float
    tokens: int
    n_bytes: int

    @classmethod
    def pooled(cls, scores: Iterable[Score]) -> Score:
        """Add up: the score of all the texts together."""
        scores = tuple(scores)
        return cls(fsum(s.nll_nats for s in scores), sum(s.tokens for s in scores), sum(s.n_bytes for s in scores))

    @property
    def perplexity(self) -> float:
        """exp(nll / tokens)."""
        mean = self.nll_nats / self.tokens
        return inf if mean > LARGEST_EXPONENT else exp(mean)

    @property
    def bits_per_byte(self) -> float:
        """nll / (ln 2 * bytes): unlike perplexity, comparable between tokenizers."""
        return self.nll_nats / (log(2) * self.n_bytes)
