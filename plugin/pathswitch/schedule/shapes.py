"""Decay shapes: how the LR falls from max_lr to final_lr while the progress x runs from 0 to 1.

A shape is apart from its scale: ``lr(x) = final_lr + multiplier(x) * (max_lr - final_lr)`` with multiplier(0) = 1,
multiplier(1) = 0, non-increasing. Two shapes do not fit this form, ``harmonic`` and ``multi_step``, and say so in
``curve`` and ``resolve_final_lr``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import cos, isfinite, pi, sqrt
from typing import ClassVar

from pathswitch.errors import ConfigError, choices

Curve = Callable[[float], float]


def _scaled(multiplier: Curve, max_lr: float, final_lr: float) -> Curve:
    """Return x -> final_lr + multiplier(x) * (max_lr - final_lr), never above max_lr."""
    span = max_lr - final_lr

    def lr(x: float) -> float:
        share = multiplier(x)
        value = final_lr + share * span
        # final_lr + 1.0 * span may miss max_lr by one unit in the last place.
        return max_lr if share >= 1.0 or value > max_lr else value

    return lr


@dataclass(frozen=True)
class Shape:
    """Base of all shapes; its dataclass fields are the shape's parameters, under the same names as in a plan."""

    name: ClassVar[str]

    def multiplier(self) -> Curve:
        """Return x -> share of (max_lr - final_lr) that is left at progress x."""
        raise NotImplementedError

    def curve(self, max_lr: float, final_lr: float) -> Curve:
        """Return x -> LR for 0 <= x < 1, equal to ``max_lr`` to the bit wherever the multiplier is 1."""
        return _scaled(self.multiplier(), max_lr, final_lr)

    def resolve_final_lr(self, max_lr: float, final_lr: float | None, where: str) -> float:
        """Return the LR that the decay ends at; the default is 0, a complete decay.

        Raises:
            ConfigError: ``final_lr`` does not lie between 0 and ``max_lr``.
        """
        final_lr = 0.0 if final_lr is None else final_lr
        if not 0.0 <= final_lr <= max_lr:
            raise ConfigError(f"{where} final_lr", given=final_lr, allowed=f"0 <= final_lr <= max_lr ({max_lr})")
        return final_lr

    def check(self, where: str) -> None:
        """Raise ConfigError if a parameter of this shape is out of range."""


@dataclass(frozen=True)
class Linear(Shape):
    """1 - x."""

    name = "linear"

    def multiplier(self) -> Curve:
        """Return x -> 1 - x."""
        return lambda x: 1.0 - x


@dataclass(frozen=True)
class Cosine(Shape):
    """(1 + cos(pi x)) / 2."""

    name = "cosine"

    def multiplier(self) -> Curve:
        """Return x -> (1 + cos(pi x)) / 2."""
        return lambda x: 0.5 * (cos(pi * x) + 1.0)


@dataclass(frozen=True)
class OneMinusSqrt(Shape):
    """1 - sqrt(x) (Hägele et al., arXiv 2405.18392)."""

    name = "one_minus_sqrt"

    def multiplier(self) -> Curve:
        """Return x -> 1 - sqrt(x)."""
        return lambda x: 1.0 - sqrt(x)


@dataclass(frozen=True)
class Exponential(Shape):
    """2 * 0.5^x - 1 (Megatron's WSD decay style of this name)."""

    name = "exponential"

    def multiplier(self) -> Curve:
        """Return x -> 2 * 0.5^x - 1."""
        return lambda x: 2.0 * 0.5**x - 1.0


@dataclass(frozen=True)
class Polynomial(Shape):
    """(1 - x)^power."""

    name = "polynomial"
    power: float = 2.0

    def multiplier(self) -> Curve:
        """Return x -> (1 - x)^power."""
        power = self.power
        return lambda x: (1.0 - x) ** power

    def check(self, where: str) -> None:
        """Raise ConfigError unless power is finite and positive."""
        if not (isfinite(self.power) and self.power > 0):
            raise ConfigError(f"{where} power", given=self.power, allowed="a finite power > 0")


@dataclass(frozen=True)
class Knee(Shape):
    """Constant for the explore share, then linear to 0 (Iyer et al., arXiv 2003.03977)."""

    name = "knee"
    explore: float = 0.5

    def multiplier(self) -> Curve:
        """Return x -> 1 up to the explore share, (1 - x) / (1 - explore) behind it."""
        explore, rest = self.explore, 1.0 - self.explore
        return lambda x: 1.0 if x <= explore else (1.0 - x) / rest

    def check(self, where: str) -> None:
        """Raise ConfigError unless 0 <= explore < 1."""
        if not 0.0 <= self.explore < 1.0:
            raise ConfigError(f"{where} explore", given=self.explore, allowed="0 <= explore < 1")


@dataclass(frozen=True)
class Harmonic(Shape):
    """1/lr linear in x (WSD-S, arXiv 2410.05192); it cannot reach 0, so it needs final_lr > 0."""

    name = "harmonic"

    def curve(self, max_lr: float, final_lr: float) -> Curve:
        """Return x -> 1 / ((1 - x) / max_lr + x / final_lr), in a form that rounding cannot make rise."""
        ratio = final_lr / max_lr
        rest = 1.0 - ratio
        return _scaled(lambda x: ratio * (1.0 - x) / (ratio + x * rest), max_lr, final_lr)

    def resolve_final_lr(self, max_lr: float, final_lr: float | None, where: str) -> float:
        """Return ``final_lr``; raise ConfigError unless it is given and positive."""
        if final_lr is None or not 0.0 < final_lr <= max_lr:
            raise ConfigError(
                f"{where} final_lr",
                given=final_lr,
                allowed=f"0 < final_lr <= max_lr ({max_lr}): shape 'harmonic' is linear in 1/lr and cannot reach 0",
            )
        return final_lr


@dataclass(frozen=True)
class MultiStep(Shape):
    """max_lr times a factor from each milestone on (DeepSeek LLM, arXiv 2401.02954); ends at its last factor."""

    name = "multi_step"
    milestones: tuple[float, ...] = (0.8, 0.9)
    factors: tuple[float, ...] = (0.316, 0.1)

    def curve(self, max_lr: float, final_lr: float) -> Curve:
        """Return x -> max_lr before the first milestone, then max_lr times the factor of the last one passed."""
        stairs = tuple(zip(reversed(self.milestones), [max_lr * f for f in reversed(self.factors)], strict=True))

        def lr(x: float) -> float:
            for milestone, value in stairs:
                if x >= milestone:
                    return value
            return max_lr

        return lr

    def resolve_final_lr(self, max_lr: float, final_lr: float | None, where: str) -> float:
        """Return max_lr times the last factor; raise ConfigError if a ``final_lr`` is given beside it."""
        if final_lr is not None:
            raise ConfigError(
                f"{where} final_lr",
                given=final_lr,
                allowed=f"no final_lr: shape 'multi_step' ends at max_lr times its last factor ({self.factors[-1]})",
            )
        return max_lr * self.factors[-1]

    def check(self, where: str) -> None:
        """Raise ConfigError unless milestones rise and factors fall inside (0, 1), one factor to a milestone."""
        stones, factors = self.milestones, self.factors
        if not stones or any(b <= a for a, b in zip((0.0, *stones), (*stones, 1.0), strict=True)):
            raise ConfigError(f"{where} milestones", given=stones, allowed="rising shares of the decay between 0 and 1")
        if len(factors) != len(stones) or any(b >= a for a, b in zip((1.0, *factors), (*factors, 0.0), strict=True)):
            raise ConfigError(
                f"{where} factors",
                given=factors,
                allowed=f"{len(stones)} falling factors between 1 and 0, one a milestone",
            )


SHAPES: dict[str, type[Shape]] = {
    shape.name: shape for shape in (Linear, Cosine, OneMinusSqrt, Exponential, Polynomial, Knee, Harmonic, MultiStep)
}


def shape_parameters(shape: type[Shape]) -> tuple[str, ...]:
    """Return the names of a shape's parameters."""
    return tuple(field.name for field in fields(shape))


def make_shape(name: str, parameters: Mapping[str, object], where: str = "schedule") -> Shape:
    """Build the shape ``name`` from the parameters that are given for it.

    Raises:
        ConfigError: unknown name, a parameter of another shape, or a value out of range.
    """
    if name not in SHAPES:
        raise ConfigError(f"{where} shape", given=name, allowed=choices(SHAPES, name))
    known = shape_parameters(SHAPES[name])
    for key in parameters:
        if key not in known:
            allowed = f"{', '.join(known) or 'no parameters'} beside shape {name!r}"
            raise ConfigError(f"{where} {key}", given=parameters[key], allowed=allowed)
    shape = SHAPES[name](**parameters)
    shape.check(where)
    return shape
