"""The plan file: strict TOML, one pydantic model per section, one clear error for whatever does not fit.

The same keys, flat, are the inline parameters of ``PathSwitchLR`` in a ds_config (``plan_from_params``).
"""

from pathswitch.config.fields import is_weighted
from pathswitch.config.load import build_plan, load_plan_file, plan_from_params
from pathswitch.config.sections import PlanFile

__all__ = ["PlanFile", "build_plan", "is_weighted", "load_plan_file", "plan_from_params"]
