"""The plan of most worker scripts, for what must not import DeepSpeed as well."""

from __future__ import annotations

from typing import Any

PLAN: dict[str, Any] = {
    "max_lr": 1e-3,
    "init_lr": 1e-5,
    "warmup_steps": 2,
    "versions": [{"name": "v1", "steps": 8, "alpha": 0.5}, {"name": "v2", "steps": 8, "alpha": 0.5, "shape": "linear"}],
}
