"""The plan file: strict TOML, one pydantic model per section, one clear error for whatever does not fit.

The same keys, flat, are the inline parameters of ``PathSwitchLR`` in a ds_config (``plan_from_params``).
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path as FilePath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from pathswitch.checkpoint.settings import CheckpointSettings
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
SHAPE_KEYS = ("power", "explore", "milestones", "factors")

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


def _as_tuple(value: object) -> object:
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


Patterns = Annotated[tuple[str, ...], BeforeValidator(_as_tuple), Field(description="a file name or a list of them")]
Blend = Annotated[
    tuple[str, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_checked_blend),
    Field(description="a prefix, a list of them, or weights > 0 and prefixes in turn, all as text"),
]
Floats = Annotated[tuple[float, ...], BeforeValidator(_as_tuple), Field(description="a list of numbers")]


class Section(BaseModel):
    """Base of all sections: no unknown keys, no silent conversion, no NaN, no change afterwards."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class ShapeKeys(Section):
    """A decay shape by name, with that shape's parameters beside it."""

    shape: str | None = None
    power: float | None = None
    explore: float | None = None
    milestones: Floats | None = None
    factors: Floats | None = None

    def shape_parameters(self) -> dict[str, Any]:
        """Return the shape parameters that are given."""
        return {key: value for key in SHAPE_KEYS if (value := getattr(self, key)) is not None}


class ScheduleSection(ShapeKeys):
    """The main path's LR, and how branches decay unless their version says otherwise."""

    max_lr: Annotated[float, Field(gt=0, description="a finite LR > 0")]
    init_lr: LearningRate = 0.0
    final_lr: LearningRate | None = None
    warmup_steps: Annotated[int, Field(ge=0, description="a whole number >= 0")] = 0
    shape: str = "cosine"
    alpha: Alpha = 0.6


class VersionSection(ShapeKeys):
    """One version: its new data, and its own decay if it differs from the schedule's."""

    name: Name
    steps: Count | None = None
    tokens: Count | None = None
    alpha: Alpha | None = None
    decay_steps: Count | None = None
    train: Patterns = ()
    test: Patterns = ()
    megatron_data: Blend = ()
    """Megatron's --data-path for this version's data, relative to the plan file's folder."""


class BaselinesSection(Section):
    """What the baselines need beyond the schedule."""

    floor_lr: Annotated[float, Field(gt=0, description="a finite LR > 0")] | None = None
    wsd_s_alpha: Alpha = 0.2


class ModelSection(Section):
    """The embedded trainer's LLaMA."""

    hidden_size: Count = 128
    intermediate_size: Count = 352
    n_layers: Count = 4
    n_heads: Count = 4
    n_kv_heads: Count | None = None
    rope_theta: Annotated[float, Field(gt=0, description="a number > 0")] = 10_000.0
    tie_embeddings: bool = True


class DataSection(Section):
    """How text becomes samples."""

    seq_len: Count
    split: Literal["temporal", "iid"] = "temporal"
    vocab_size: Count = 1024
    tokenizer: str | None = None
    separator: str | None = None
    repeat: bool = False


class TrainSection(Section):
    """The embedded trainer's ranks, batch, optimizer and checkpoints; sizes in sequences."""

    global_batch_size: Count
    micro_batch_size: Count | None = None
    ranks: Count = 2
    seed: Annotated[int, Field(ge=0, description="a whole number >= 0")] = 1
    betas: Annotated[Floats, Field(min_length=2, max_length=2, description="two numbers [beta1, beta2]")] = (
        0.9,
        0.95,
    )
    eps: Annotated[float, Field(gt=0, description="a number > 0")] = 1e-8
    weight_decay: Annotated[float, Field(ge=0, description="a number >= 0")] = 0.1
    gradient_clipping: Annotated[float, Field(ge=0, description="a number >= 0 (0: none)")] = 1.0
    save_every_steps: Count | None = None

    @property
    def micro_batch(self) -> int:
        """Sequences per rank and forward pass.

        Raises:
            ConfigError: the ranks, or the ranks times micro_batch_size, do not divide the global batch.
        """
        per_rank, rest = divmod(self.global_batch_size, self.ranks)
        if rest:
            allowed = f"a divisor of global_batch_size ({self.global_batch_size})"
            raise ConfigError("[train] ranks", given=self.ranks, allowed=allowed)
        micro = self.micro_batch_size or per_rank
        if per_rank % micro:
            allowed = f"a divisor of the {per_rank} sequences of each rank"
            raise ConfigError("[train] micro_batch_size", given=micro, allowed=allowed)
        return micro

    @property
    def gradient_accumulation_steps(self) -> int:
        """Forward passes of each rank per optimizer step."""
        return self.global_batch_size // (self.micro_batch * self.ranks)


class MegatronSection(Section):
    """What Megatron jobs of this plan have in common beside their own arguments."""

    global_batch_size: Count | None = None
    """Samples of one optimizer step."""
    checkpoints: str = "checkpoints"
    """Each path saves into a folder of its own name in this one, which is relative to the plan file's folder."""
    checkpoint: CheckpointSettings = CheckpointSettings()
    data: Blend = ()
    """Megatron's --data-path where all versions draw from the same data, in place of each version's own."""
    horizon_steps: Count | None = None
    """Steps that Megatron lays ``data`` out for; they fix the order of its samples, so they must never change."""


class PlanFile(Section):
    """A whole plan file."""

    schedule: ScheduleSection
    versions: tuple[VersionSection, ...] = ()
    baselines: BaselinesSection = BaselinesSection()
    model: ModelSection = ModelSection()
    data: DataSection | None = None
    train: TrainSection | None = None
    deepspeed: dict[str, Any] = {}
    megatron: MegatronSection = MegatronSection()

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step, or None where the plan does not say."""
        if self.data is None or self.train is None:
            return None
        return self.data.seq_len * self.train.global_batch_size


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
    keys = [key for key in loc if isinstance(key, str) and not key.startswith("function-")]
    place = f"{where}: {_place(loc, content)}"
    section, field = _section_of(keys)
    if kind == "extra_forbidden":
        return ConfigError(place, given=f"unknown key {keys[-1]!r}", allowed=choices(section.model_fields, keys[-1]))
    if kind == "missing":
        return ConfigError(place, given="nothing", allowed="this key is required")
    described = _description(section, field) or message.removeprefix("Input should be ")
    return ConfigError(place, given=given, allowed=described)


def _description(section: type[BaseModel], field: str) -> str | None:
    """Return what a field's description says is allowed, also where the field may be left out (``X | None``)."""
    if field not in section.model_fields:
        return None
    info = section.model_fields[field]
    alternatives = [meta for option in get_args(info.annotation) for meta in getattr(option, "__metadata__", ())]
    return next((meta.description for meta in (info, *alternatives) if getattr(meta, "description", None)), None)


def _place(loc: tuple[int | str, ...], content: Mapping[str, object]) -> str:
    head, *rest = loc
    if head == "versions" and rest and isinstance(rest[0], int):
        entry = content["versions"][rest[0]]  # type: ignore[index]
        name = f" ({entry['name']!r})" if isinstance(entry, Mapping) and "name" in entry else ""
        return " ".join([f"[[versions]] number {rest[0] + 1}{name}", *map(str, rest[1:2])])
    return " ".join([f"[{head}]", *map(str, rest[: 2 if head == "megatron" else 1])])


def _section_of(keys: list[str]) -> tuple[type[BaseModel], str]:
    sections: dict[str, type[BaseModel]] = {
        "schedule": ScheduleSection,
        "versions": VersionSection,
        "baselines": BaselinesSection,
        "model": ModelSection,
        "data": DataSection,
        "train": TrainSection,
        "megatron": MegatronSection,
    }
    if keys[:2] == ["megatron", "checkpoint"] and len(keys) > 2:
        return CheckpointSettings, keys[2]
    if len(keys) > 1 and keys[0] in sections:
        return sections[keys[0]], keys[1]
    return PlanFile, keys[0]
