"""The running average of the weights: exponential, or with the weights that imitate a decay.

Either gives a preview of the next release while the main path goes on, in the same pass as the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from pathswitch.errors import ConfigError
from pathswitch.kernels.layouts import AverageSettings
from pathswitch.schedule import Shape, make_shape

AverageChoice = float | Mapping[str, Any] | None
_WHERE = "PathSwitchAdamW average"
_ALLOWED = (
    "a decay 0 < d < 1 of an exponential moving average, or a decay to imitate: {shape, steps, start_step, and the "
    "shape's parameters}"
)


def read_average(choice: AverageChoice) -> tuple[AverageSettings, list[float]]:
    """Return the settings of an average and the table of its weights, empty for a constant weight.

    Raises:
        ConfigError: it is neither a decay nor the description of one.
    """
    if choice is None:
        return AverageSettings(), []
    if isinstance(choice, Mapping):
        return _imitated(dict(choice))
    if isinstance(choice, bool) or not isinstance(choice, int | float) or not 0 < choice < 1:
        raise ConfigError(_WHERE, given=choice, allowed=_ALLOWED)
    return AverageSettings(weight=1.0 - choice), []


def _imitated(choice: dict[str, Any]) -> tuple[AverageSettings, list[float]]:
    given = dict(choice)
    name, steps, start_step = choice.pop("shape", None), choice.pop("steps", None), choice.pop("start_step", 0)
    counts = all(type(count) is int for count in (steps, start_step))
    if not isinstance(name, str) or not counts or steps < 1 or start_step < 0:
        raise ConfigError(_WHERE, given=given, allowed=_ALLOWED)
    shape = make_shape(name, {key: _plain(value) for key, value in choice.items()}, _WHERE)
    final = shape.curve(1.0, 0.0)(1.0) if name != "harmonic" else None
    if final != 0.0:
        raise ConfigError(f"{_WHERE} shape", given=name, allowed="a shape that decays completely, to 0")
    return AverageSettings(start_step=start_step, n_weights=steps), merge_weights(shape, steps)


def _plain(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


def merge_weights(shape: Shape, steps: int) -> list[float]:
    """Return the share by which each of ``steps`` updates moves the running average.

    In a branch with multiplier f, update j of n counts with f((j - 1) / n). The weights after each update, merged with
    c_j = f((j - 1) / n) - f(j / n), give the same sum (WSM, arXiv 2507.17634); as a running average, update j moves
    it by c_j / (c_1 + ... + c_j).
    """
    curve = shape.curve(1.0, 0.0)
    shares = [curve(j / steps) for j in range(steps)] + [0.0]
    return [1.0 if after == 1.0 else (before - after) / (1.0 - after) for before, after in pairwise(shares)]
