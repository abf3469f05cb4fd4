"""The sections of a plan file, one pydantic model each."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pathswitch.checkpoint.settings import CheckpointSettings
from pathswitch.config.fields import Alpha, Blend, Count, Floats, LearningRate, Name, Patterns, Section
from pathswitch.config.launch import LaunchSection
from pathswitch.errors import ConfigError

SHAPE_KEYS = ("power", "explore", "milestones", "factors")


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
    optimizer: Literal["adamw", "pathswitch"] = "adamw"
    """torch's AdamW, or PathSwitchAdamW in one pass over memory, which is compiled at its first use."""
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
    optimizer: Literal["megatron", "pathswitch"] = "megatron"
    """Megatron's own Adam, or PathSwitchAdamW in its place, with the clipping fused; compiled when it is made."""
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
    deepspeed: dict[str, Any] = Field(default={})
    megatron: MegatronSection = MegatronSection()
    launch: LaunchSection = LaunchSection()

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens of one optimizer step, or None where the plan does not say."""
        if self.data is None or self.train is None:
            return None
        return self.data.seq_len * self.train.global_batch_size
