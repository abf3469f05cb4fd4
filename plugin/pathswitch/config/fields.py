"""Types of a plan file's values; a description is what an error message says is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

# A description of a constrained field is what its error message says is allowed.
Alpha = Annotated[float, Field(gt=0, le=1, description="0 < alpha <= 1")]
LearningRate = Annotated[float, Field(ge=0, description="a finite LR >= 0")]
Count = Annotated[int, Field(ge=1, description="a whole number >= 1")]
# A path component: it names a folder and a DeepSpeed path at the same time.
Name = Annotated[
    str,
    Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="1-64 letters, digits, '.', '_', '-', beginning with a letter or digit",
    ),
]


def as_tuple(value: object) -> object:
    """Accept one string or a list of strings; TOML and JSON have no tuples."""
    if isinstance(value, str):
        return (value,)
    return tuple(value) if isinstance(value, list) else value


def is_weighted(blend: Sequence[str]) -> bool:
    """Return whether a --data-path of Megatron is weights and prefixes in turn.

    Raises:
        ValueError: a weight is missing, too many or not above 0; Megatron would take it for a prefix.
    """
    weights = [_number(entry) for entry in (blend if len(blend) % 2 else blend[::2])]
    if all(weight is None for weight in weights):
        return False
    if len(blend) % 2 or not all(weight is not None and 0 < weight < inf for weight in weights):
        raise ValueError(blend)
    return True


def _number(entry: str) -> float | None:
    try:
        return float(entry)
    except ValueError:
        return None


def _checked_blend(blend: tuple[str, ...]) -> tuple[str, ...]:
    is_weighted(blend)
    return blend


Patterns = Annotated[tuple[str, ...], BeforeValidator(as_tuple), Field(description="a file name or a list of them")]
Blend = Annotated[
    tuple[str, ...],
    BeforeValidator(as_tuple),
    AfterValidator(_checked_blend),
    Field(description="a prefix, a list of them, or weights > 0 and prefixes in turn, all as text"),
]
Floats = Annotated[tuple[float, ...], BeforeValidator(as_tuple), Field(description="a list of numbers")]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no silent conversion, no NaN, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
