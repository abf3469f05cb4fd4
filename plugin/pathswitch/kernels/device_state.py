"""What a step reads and counts, in tensors on the parameters' device that stay where they are.

A captured CUDA graph replays with their present content: writing the 64 bytes of a path switches it.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, addressof, memmove, sizeof

import torch
from torch import Tensor

from pathswitch.errors import ConfigError
from pathswitch.kernels.layouts import (
    SCALARS_BYTES,
    AverageSettings,
    Counters,
    GroupSettings,
    PathDescriptor,
    StepState,
    struct_bytes,
)
from pathswitch.kernels.paths import DevicePath, constant_path


class DeviceState:
    """The state of one optimizer on one device.

    Attributes:
        step_state: what the kernels get.
        scalars: uint8[n, 64], a row for each parameter; grown by ``rows``.
    """

    def __init__(self, device: torch.device, averaging: AverageSettings, weights: Sequence[float]) -> None:
        self.device = device
        self._kept: list[Tensor] = []  # earlier ones too: a captured graph, or a replay under way, may still read them
        self._groups = b""
        self.scalars = torch.zeros(0, SCALARS_BYTES, dtype=torch.uint8, device=device)
        table = self._table(weights)
        self.step_state = StepState(
            path=torch.zeros(sizeof(PathDescriptor), dtype=torch.uint8, device=device),
            counters=torch.zeros(sizeof(Counters) // 8, dtype=torch.int64, device=device),
            groups=torch.zeros(0, sizeof(GroupSettings), dtype=torch.uint8, device=device),
            averaging=torch.zeros(sizeof(AverageSettings), dtype=torch.uint8, device=device),
            average_weights=table,
        )
        averaging.weights = None if table is None else table.data_ptr()
        self._write(self.step_state.averaging, averaging)
        self.write_path(constant_path(1.0))

    def write_path(self, path: DevicePath) -> None:
        """Make the next update use this path's LR; a copy of 64 bytes, in the order of the current stream."""
        descriptor = PathDescriptor()
        memmove(addressof(descriptor), addressof(path.descriptor), sizeof(descriptor))
        table = self._table(path.decay_lrs)
        descriptor.decay_lrs = None if table is None else table.data_ptr()
        self._write(self.step_state.path, descriptor)
        self.step_state.decay_lrs = table

    def write_step(self, step: int) -> None:
        """Set the number of updates done on the path."""
        self.step_state.counters[:1].fill_(step)

    def write_groups(self, settings: Sequence[GroupSettings]) -> None:
        """Write the groups' settings where they have changed.

        Raises:
            ConfigError: they have changed while a CUDA graph is captured, which would replay old ones.
        """
        content = b"".join(bytes(one) for one in settings)
        if content == self._groups:
            return
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            allowed = "the settings of the update before: a captured graph follows a path by PathSwitchAdamW.follow"
            raise ConfigError(
                "PathSwitchAdamW in a captured graph", given="new settings or another LR", allowed=allowed
            )
        if len(content) != self.step_state.groups.numel():
            self._kept.append(self.step_state.groups)
            self.step_state.groups = torch.zeros(
                len(settings), sizeof(GroupSettings), dtype=torch.uint8, device=self.device
            )
        self._copy(self.step_state.groups.view(-1), torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self._groups = content

    def rows(self, count: int) -> Tensor:
        """Return ``count`` rows of scalars."""
        if len(self.scalars) < count:
            self._kept.append(self.scalars)
            self.scalars = torch.zeros(count, SCALARS_BYTES, dtype=torch.uint8, device=self.device)
        return self.scalars[:count]

    def _table(self, values: Sequence[float]) -> Tensor | None:
        if not values:
            return None
        table = torch.tensor(values, dtype=torch.float64).to(self.device)
        self._kept.append(table)
        return table

    def _write(self, target: Tensor, struct: Structure) -> None:
        self._copy(target, struct_bytes(struct))

    def _copy(self, target: Tensor, content: Tensor) -> None:
        if self.device.type == "cuda":  # torch keeps pinned memory until its copy is done
            target.copy_(content.pin_memory(), non_blocking=True)
        else:
            target.copy_(content)
