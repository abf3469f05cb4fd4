"""The preparations of a step that are worth testing: every stretch of a path, every state of the gradients."""

from __future__ import annotations

import math
from dataclasses import replace

from problems import Preparation

from pathswitch.kernels.averaging import read_average
from pathswitch.kernels.paths import constant_path, device_path
from pathswitch.schedule import BranchPath, MainPath, make_shape

MAIN = MainPath(3e-3, 1e-5, warmup_steps=7)
BRANCH = BranchPath(MAIN, 20, 33, make_shape("one_minus_sqrt", {}), final_lr=1e-6)
STEPS = (0, 1, 5, 6, 7, 8, 19, 20, 21, 32, 33, 34, 10**7)  # warm-up, constant, decay, their edges, and long behind
_TABLE = read_average({"shape": "linear", "steps": 4, "start_step": 18})
_AVERAGE = (_TABLE[0], tuple(_TABLE[1]))
_PLAIN = Preparation("constant", constant_path(1e-3), 3)

PREPARATIONS = [
    *(Preparation(f"branch at {step}", device_path(BRANCH), step, average=_AVERAGE) for step in STEPS),
    *(Preparation(f"main at {step}", device_path(MAIN), step) for step in (0, 6, 100)),
    _PLAIN,
    replace(_PLAIN, name="small norms", sums_of_squares=(1e-12, 0.0)),
    replace(_PLAIN, name="clipped to exactly 1", sums_of_squares=(4.0 * (1 - 1e-6) ** 2, 4.0)),
    replace(_PLAIN, name="no norms", sums_of_squares=None),
    replace(_PLAIN, name="no norms and no scale", sums_of_squares=None, inv_scale=None),
    replace(_PLAIN, name="a NaN", sums_of_squares=(1.0, math.nan)),
    replace(_PLAIN, name="an infinity", sums_of_squares=(math.inf, 1.0)),
    replace(_PLAIN, name="an overflow after scaling", inv_scale=math.inf),
    replace(_PLAIN, name="found_inf", found_inf=1.0),
    replace(_PLAIN, name="found_inf without norms", sums_of_squares=None, found_inf=2.0),
    replace(_PLAIN, name="found no inf", found_inf=0.0),
    replace(_PLAIN, name="more parameters than threads", count=33),
    replace(_PLAIN, name="several launches", count=300),
    replace(_PLAIN, name="several launches, skipped", count=129, sums_of_squares=(math.nan, 0.0)),
    replace(_PLAIN, name="no parameters", count=0),
]
