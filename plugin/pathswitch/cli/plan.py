"""The values that ``pathswitch plan`` and ``pathswitch lr`` print."""

from __future__ import annotations

from typing import Any

from pathswitch.errors import ConfigError
from pathswitch.versions import Plan


def plan_json(resolved: Plan, tokens_per_step: int | None) -> dict[str, Any]:
    """Return the plan as JSON values: ``versions``, ``paths`` and ``cost``."""

    def tokens(steps: int) -> int | None:
        return None if tokens_per_step is None else steps * tokens_per_step

    versions = [
        {
            "name": version.name,
            "steps": version.steps,
            "fork_step": fork_step,
            "decay_steps": version.decay_steps,
            "end_step": end_step,
            "tokens": tokens(version.steps),
            "branch_tokens": tokens(version.decay_steps),
            "shape": version.shape.name,
            "final_lr": version.final_lr,
        }
        for version, fork_step, end_step in zip(resolved.versions, resolved.fork_steps, resolved.end_steps, strict=True)
    ]
    paths = [
        {"name": path.name, "start_step": path.start_step, "end_step": path.end_step, "steps": path.steps}
        for path in resolved.paths("path_switching")
    ]
    cost = resolved.cost
    steps = {
        "ptfs_steps": cost.ptfs_steps,
        "cpt_steps": cost.cpt_steps,
        "wsd_s_steps": cost.wsd_s_steps,
        "path_switching_steps": cost.path_switching_steps,
    }
    in_tokens = {key.replace("_steps", "_tokens"): tokens(value) for key, value in steps.items()}
    return {"versions": versions, "paths": paths, "cost": {**steps, **in_tokens, "ratio_to_ptfs": cost.ratio_to_ptfs}}


def step_range(text: str | None, first: int, end: int) -> tuple[int, int]:
    """Return the bounds in ``A:B``, of which either may be left out: then it is the path's own.

    Raises:
        ConfigError: this is not of the form A:B with A <= B.
    """
    if text is None:
        return first, end
    a, colon, b = text.partition(":")
    if not colon or not (a or "0").isdecimal() or not (b or "0").isdecimal():
        raise ConfigError(
            "--steps", given=text, allowed="A:B with whole numbers A <= B; the path's own bounds if left out"
        )
    bounds = int(a) if a else first, int(b) if b else end
    if bounds[0] > bounds[1]:
        raise ConfigError("--steps", given=text, allowed="A:B with A <= B")
    return bounds
