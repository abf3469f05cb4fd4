"""From versions to paths: fork steps, decay steps, costs, for path switching and for the baselines.

Words and letters: version v brings ``steps`` = T_v optimizer steps of new data; its data ends at the main-path step
S_v = T_1 + ... + T_v; its branch forks at F_v = S_v - D_v and decays over D_v = round(alpha_v * T_v) steps, on the
same samples as the main path's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal, get_args

from pathswitch.errors import ConfigError, choices
from pathswitch.schedule import BranchPath, ConstantRun, DecayRun, LRPath, MainPath, Schedule, Shape, digest
from pathswitch.schedule.paths import Field

Paradigm = Literal["path_switching", "ptfs", "cpt_rewarm", "cpt_floor", "wsd_s"]
PARADIGMS: tuple[Paradigm, ...] = get_args(Paradigm)
MAIN = "main"


@dataclass(frozen=True)
class Version:
    """One version: its new data in optimizer steps, and how its branch decays."""

    name: str
    steps: int
    decay_steps: int
    shape: Shape
    final_lr: float

    def __post_init__(self) -> None:
        """Refuse a version without steps, a decay longer than the version, and the reserved name."""
        if self.steps < 1:
            raise ConfigError(f"version {self.name!r} steps", given=self.steps, allowed="at least 1 step")
        if not 1 <= self.decay_steps <= self.steps:
            allowed = f"1 <= decay_steps <= steps ({self.steps})"
            raise ConfigError(f"version {self.name!r} decay_steps", given=self.decay_steps, allowed=allowed)
        if self.name == MAIN:
            raise ConfigError(
                "[[versions]] name", given=self.name, allowed=f"any name but {MAIN!r}, the main path's own"
            )


@dataclass(frozen=True)
class Path:
    """One training job: where it starts, where it ends, and the LR of every update in between."""

    paradigm: Paradigm
    name: str
    parent: str | None
    start_step: int
    end_step: int
    lr_path: LRPath
    release: str | None
    """The version that the last checkpoint of this path releases; None for the main path."""
    open_ended: bool = False
    """True for the main path, which goes on at max_lr with the next version's data."""

    @cached_property
    def lr(self) -> Schedule:
        """The pure function step -> lr."""
        return self.lr_path.schedule()

    @cached_property
    def fields(self) -> dict[str, Field]:
        """Everything that determines the LR, as JSON values."""
        return self.lr_path.fields()

    @property
    def steps(self) -> int:
        """Updates that this path trains itself."""
        return self.end_step - self.start_step

    @property
    def digest(self) -> str:
        """SHA-256 of the fields."""
        return digest(self.fields)


@dataclass(frozen=True)
class Cost:
    """Optimizer steps that each paradigm trains for all versions of a plan."""

    ptfs_steps: int
    cpt_steps: int
    wsd_s_steps: int
    path_switching_steps: int

    @property
    def ratio_to_ptfs(self) -> float:
        """Steps of path switching over steps of pre-training from scratch."""
        return self.path_switching_steps / self.ptfs_steps

    def of(self, paradigm: Paradigm) -> int:
        """Return the steps of one paradigm."""
        return {
            "path_switching": self.path_switching_steps,
            "ptfs": self.ptfs_steps,
            "cpt_rewarm": self.cpt_steps,
            "cpt_floor": self.cpt_steps,
            "wsd_s": self.wsd_s_steps,
        }[paradigm]


@dataclass(frozen=True)
class Plan:
    """A main path and the versions that branch off it; a version can be added at the end at any time."""

    main: MainPath
    versions: tuple[Version, ...]
    floor_lr: float
    """Constant LR of the baseline "CPT at the floor"."""
    wsd_s_alpha: float
    """Share of each version's steps that the baseline WSD-S decays over."""

    def __post_init__(self) -> None:
        """Refuse two versions of one name, and a first fork inside the warm-up."""
        names = [version.name for version in self.versions]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError("[[versions]] name", given=name, allowed="names that differ: this one stands twice")
        self.paths("path_switching")

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that determines the LR of path switching's paths."""
        fields = {path.name: path.fields for path in self.paths("path_switching")}
        return digest({name: json.dumps(value, sort_keys=True) for name, value in fields.items()})

    @cached_property
    def _paths(self) -> dict[Paradigm, tuple[Path, ...]]:
        return {}

    @cached_property
    def end_steps(self) -> tuple[int, ...]:
        """S_v of every version."""
        return tuple(accumulate(version.steps for version in self.versions))

    @cached_property
    def fork_steps(self) -> tuple[int, ...]:
        """F_v of every version."""
        return tuple(end - v.decay_steps for end, v in zip(self.end_steps, self.versions, strict=True))

    def begun(self, step: int) -> tuple[Version, ...]:
        """Return the versions whose data the first ``step`` steps have seen, at least in part."""
        return tuple(v for v, end in zip(self.versions, self.end_steps, strict=True) if end - v.steps < step)

    def paths(self, paradigm: Paradigm) -> tuple[Path, ...]:
        """Return the training jobs of a paradigm, parents before children.

        Raises:
            ConfigError: the warm-up does not fit into one of the runs.
        """
        if paradigm not in self._paths:
            self._paths[paradigm] = tuple(_PATHS_OF[paradigm](self))
        return self._paths[paradigm]

    def path(self, name: str, paradigm: Paradigm = "path_switching") -> Path:
        """Return one training job by name.

        Raises:
            ConfigError: unknown paradigm or path.
        """
        if paradigm not in PARADIGMS:
            raise ConfigError("paradigm", given=paradigm, allowed=choices(PARADIGMS, paradigm))
        paths = {path.name: path for path in self.paths(paradigm)}
        if name not in paths:
            raise ConfigError("path", given=name, allowed=choices(paths, name))
        return paths[name]

    @cached_property
    def cost(self) -> Cost:
        """Steps of every paradigm: PTFS = sum of S_v, CPT = WSD-S = S_N, path switching = F_N + sum of D_v."""
        if not self.versions:
            return Cost(0, 0, 0, 0)
        total = self.end_steps[-1]
        branches = sum(version.decay_steps for version in self.versions)
        return Cost(
            ptfs_steps=sum(self.end_steps),
            cpt_steps=total,
            wsd_s_steps=total,
            path_switching_steps=self.fork_steps[-1] + branches,
        )


def decay_steps(alpha: float, steps: int) -> int:
    """Return D = round(alpha * T), at least 1."""
    return max(1, round(alpha * steps))


def _path_switching(plan: Plan) -> Iterable[Path]:
    """One main path at the maximum LR; each version forks from it and decays completely."""
    # The main path needs no tail behind the last fork until the next version's data arrives.
    last_fork_step = plan.fork_steps[-1] if plan.versions else 0
    yield Path("path_switching", MAIN, None, 0, last_fork_step, plan.main, None, open_ended=True)
    for version, fork_step, end_step in zip(plan.versions, plan.fork_steps, plan.end_steps, strict=True):
        branch = BranchPath(plan.main, fork_step, version.decay_steps, version.shape, version.final_lr)
        yield Path("path_switching", version.name, MAIN, fork_step, end_step, branch, version.name)


def _ptfs(plan: Plan) -> Iterable[Path]:
    """Every version is trained anew on all data so far."""
    for version, end_step in zip(plan.versions, plan.end_steps, strict=True):
        run = DecayRun(plan.main, 0, end_step, version.shape, version.final_lr)
        yield Path("ptfs", version.name, None, 0, end_step, run, version.name)


def _chain(plan: Plan, paradigm: Paradigm, lr_path_of: dict[str, LRPath]) -> Iterable[Path]:
    """Every version continues from the one before, on its new data only."""
    parent, start_step = None, 0
    for version, end_step in zip(plan.versions, plan.end_steps, strict=True):
        lr_path = lr_path_of[version.name]
        yield Path(paradigm, version.name, parent, start_step, end_step, lr_path, version.name)
        parent, start_step = version.name, end_step


def _cpt_rewarm(plan: Plan) -> Iterable[Path]:
    runs: dict[str, LRPath] = {
        v.name: DecayRun(plan.main, end - v.steps, end, v.shape, v.final_lr)
        for v, end in zip(plan.versions, plan.end_steps, strict=True)
    }
    return _chain(plan, "cpt_rewarm", runs)


def _cpt_floor(plan: Plan) -> Iterable[Path]:
    runs: dict[str, LRPath] = {v.name: ConstantRun(plan.floor_lr) for v in plan.versions}
    if plan.versions:
        first = plan.versions[0]
        runs[first.name] = DecayRun(plan.main, 0, first.steps, first.shape, plan.floor_lr)
    return _chain(plan, "cpt_floor", runs)


def _wsd_s(plan: Plan) -> Iterable[Path]:
    """One path: each version decays at its end, and the next goes on from the decayed checkpoint at max_lr."""
    runs: dict[str, LRPath] = {}
    for version, end_step in zip(plan.versions, plan.end_steps, strict=True):
        steps = decay_steps(plan.wsd_s_alpha, version.steps)
        runs[version.name] = BranchPath(plan.main, end_step - steps, steps, version.shape, version.final_lr)
    return _chain(plan, "wsd_s", runs)


_PATHS_OF = {
    "path_switching": _path_switching,
    "ptfs": _ptfs,
    "cpt_rewarm": _cpt_rewarm,
    "cpt_floor": _cpt_floor,
    "wsd_s": _wsd_s,
}
