"""The plan: versions -> paths, fork steps and cost."""

from pathswitch.versions.plan import MAIN, PARADIGMS, Cost, Paradigm, Path, Plan, Version

__all__ = ["MAIN", "PARADIGMS", "Cost", "Paradigm", "Path", "Plan", "Version"]
