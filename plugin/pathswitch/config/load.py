"""Reading a plan file: strict TOML, and one clear error for whatever does not fit."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from pathswitch.config.sections import PlanFile, ScheduleSection, VersionSection
from pathswitch.errors import ConfigError, choices
from pathswitch.schedule import MainPath, Shape, make_shape
from pathswitch.versions import Plan, Version
from pathswitch.versions.plan import decay_steps

# Keys of a ds_config that the plan decides; a second value in [deepspeed] would contradict it.
PLAN_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
)


def load_plan_file(path: str | FilePath) -> PlanFile:
    """Read and check a plan file.

    Raises:
        ConfigError: the file is missing or not TOML, or a key is unknown, missing or out of range.
    """
    path = FilePath(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError("plan file", given=str(path), allowed=f"a readable TOML file ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(str(path), given=str(error), allowed="a TOML file in UTF-8") from None
    plan_file = _validate(content, str(path))
    build_plan(plan_file, str(path))
    return plan_file


def plan_from_params(params: Mapping[str, object]) -> Plan:
    """Build a plan from PathSwitchLR's inline parameters: the keys of [schedule], and ``versions`` for branches.

    Raises:
        ConfigError: a key is unknown, missing or out of range.
    """
    schedule = {key: value for key, value in params.items() if key != "versions"}
    content = {"schedule": schedule, "versions": params.get("versions", [])}
    return build_plan(_validate(content, "PathSwitchLR parameters"), "PathSwitchLR parameters")


def build_plan(plan_file: PlanFile, where: str = "plan") -> Plan:
    """Resolve a plan file into paths.

    Raises:
        ConfigError: the sections contradict each other.
    """
    section = plan_file.schedule
    try:
        _check_training_sections(plan_file)
        make_shape(section.shape, section.shape_parameters(), "[schedule]")
        main = MainPath(section.max_lr, section.init_lr, section.warmup_steps)
        versions = tuple(_version(plan_file, main, version) for version in plan_file.versions)
        final_lr = section.final_lr or 0.0
        # Continual pre-training "at the floor" needs a floor; 10 % of the maximum is the customary one.
        floor_lr = plan_file.baselines.floor_lr or final_lr or 0.1 * section.max_lr
        return Plan(main, versions, floor_lr, plan_file.baselines.wsd_s_alpha)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.where}", given=error.given, allowed=error.allowed) from None


def _check_training_sections(plan_file: PlanFile) -> None:
    if plan_file.train is not None:
        _ = plan_file.train.micro_batch  # raises unless the batch can be shared out
    for key in PLAN_KEYS:
        if key in plan_file.deepspeed:
            allowed = f"not here: {', '.join(PLAN_KEYS)} follow from [train] and [schedule]"
            raise ConfigError(f"[deepspeed] {key}", given=plan_file.deepspeed[key], allowed=allowed)
    if "fp16" in plan_file.deepspeed:
        # A step of the embedded trainer is one batch and one update; PathSwitchLR in other scripts has no such limit.
        allowed = "bf16, or neither: with fp16, updates that overflow are skipped and their samples lost"
        raise ConfigError("[deepspeed] fp16", given=plan_file.deepspeed["fp16"], allowed=allowed)


def _version(plan_file: PlanFile, main: MainPath, version: VersionSection) -> Version:
    where = f"version {version.name!r}"
    steps = _steps(plan_file, version, where)
    shape, final_lr = _decay(plan_file.schedule, version, main, where)
    if version.alpha is not None and version.decay_steps is not None:
        raise ConfigError(f"{where} decay_steps", given=version.decay_steps, allowed="either alpha or decay_steps")
    alpha = plan_file.schedule.alpha if version.alpha is None else version.alpha
    return Version(version.name, steps, version.decay_steps or decay_steps(alpha, steps), shape, final_lr)


def _steps(plan_file: PlanFile, version: VersionSection, where: str) -> int:
    if (version.steps is None) == (version.tokens is None):
        given = "both" if version.steps is not None else "neither"
        raise ConfigError(f"{where} steps, tokens", given=given, allowed="exactly one of steps and tokens")
    if version.steps is not None:
        return version.steps
    tokens_per_step = plan_file.tokens_per_step
    if tokens_per_step is None or version.tokens is None:
        needed = "steps, or tokens together with [data] seq_len and [train] global_batch_size"
        raise ConfigError(f"{where} tokens", given=version.tokens, allowed=needed)
    if version.tokens < tokens_per_step:
        allowed = f"at least the {tokens_per_step} tokens of one step"
        raise ConfigError(f"{where} tokens", given=version.tokens, allowed=allowed)
    return version.tokens // tokens_per_step


def _decay(schedule: ScheduleSection, version: VersionSection, main: MainPath, where: str) -> tuple[Shape, float]:
    own = version.shape_parameters()
    if version.shape is not None:
        shape = make_shape(version.shape, own, where)
    else:
        # Parameters alone change the schedule's own shape for this version.
        shape = make_shape(schedule.shape, schedule.shape_parameters() | own, where if own else "[schedule]")
    return shape, shape.resolve_final_lr(main.max_lr, schedule.final_lr, "[schedule]")


def _validate(content: Mapping[str, object], where: str) -> PlanFile:
    content = dict(content)
    if isinstance(content.get("versions"), list):
        content["versions"] = tuple(content["versions"])  # type: ignore[arg-type]
    try:
        return PlanFile.model_validate(content)
    except ValidationError as error:
        # A misspelt key is also a missing one: name the misspelling.
        first = min(error.errors(), key=lambda finding: finding["type"] != "extra_forbidden")
        raise _config_error(first["type"], first["loc"], first["input"], first["msg"], where, content) from None


def _config_error(
    kind: str,
    loc: tuple[int | str, ...],
    given: object,
    message: str,
    where: str,
    content: Mapping[str, object],
) -> ConfigError:
    """Turn pydantic's first finding into the house's wording: place in the file, value given, values allowed."""
    keys = [str(key) for key in loc if not str(key).startswith("function-")]
    of_key = keys[-1] == "[key]"
    section, shown = _section_of(keys[:-2] if of_key else keys)
    place = f"{where}: {_place(loc, shown, content)}"
    if kind == "extra_forbidden":
        return ConfigError(place, given=f"unknown key {keys[-1]!r}", allowed=choices(section.model_fields, keys[-1]))
    if kind == "missing":
        return ConfigError(place, given="nothing", allowed="this key is required")
    described = _description(section, shown[-1], of_key=of_key)
    return ConfigError(
        place, given=given, allowed=described or message.removeprefix("Input should be ").removeprefix("Value error, ")
    )


def _section_of(keys: list[str]) -> tuple[type[BaseModel], list[str]]:
    """Return the section that a finding is in, and the keys that lead to its field."""
    section: type[BaseModel] = PlanFile
    for count, key in enumerate(keys, 1):
        if key in section.model_fields:
            inner = _section_in(section.model_fields[key].annotation)
            if inner is None or count == len(keys):
                return section, keys[:count]
            section = inner
    return section, keys


def _section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field holds: itself, or one for each version or path."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for inner in get_args(annotation) if (found := _section_in(inner))), None)


def _description(section: type[BaseModel], field: str, *, of_key: bool) -> str | None:
    """Return what a field's description says is allowed, also where the field may be left out (``X | None``)."""
    if field not in section.model_fields:
        return None
    info = section.model_fields[field]
    options = get_args(info.annotation)
    if get_origin(info.annotation) is dict:
        options = options[:1] if of_key else options[1:]
    alternatives = [meta for option in options for meta in getattr(option, "__metadata__", ())]
    return next((meta.description for meta in (info, *alternatives) if getattr(meta, "description", None)), None)


def _place(loc: tuple[int | str, ...], shown: list[str], content: Mapping[str, object]) -> str:
    head, *rest = shown
    if head == "versions" and len(loc) > 1 and isinstance(loc[1], int):
        entry = content["versions"][loc[1]]  # type: ignore[index]
        name = f" ({entry['name']!r})" if isinstance(entry, Mapping) and "name" in entry else ""
        head, rest = f"[[versions]] number {loc[1] + 1}{name}", rest[1:]
        return " ".join([head, *rest])
    return " ".join([f"[{head}]", *rest])
