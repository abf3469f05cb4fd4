"""Learning-rate schedules as pure functions ``step -> lr``: shapes, main path, branch path, baselines."""

from pathswitch.schedule.paths import BranchPath, ConstantRun, DecayRun, LRPath, MainPath, Schedule, digest
from pathswitch.schedule.shapes import SHAPES, Shape, make_shape

__all__ = [
    "SHAPES",
    "BranchPath",
    "ConstantRun",
    "DecayRun",
    "LRPath",
    "MainPath",
    "Schedule",
    "Shape",
    "digest",
    "make_shape",
]
