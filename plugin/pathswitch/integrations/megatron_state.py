"""What a checkpoint of Megatron's says of itself, read on a CPU without Megatron and without running what it holds.

torch.distributed.checkpoint reads what any Megatron since 0.12 has written in the format torch_dist, under any
parallelism; the common state with Megatron's arguments is read without the classes of the Megatron that saved it.
"""

from __future__ import annotations

import io
import json
import pickle
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

from pathswitch.errors import CheckpointError

FORMAT_FILE, METADATA_FILE, COMMON_FILE = "metadata.json", ".metadata", "common.pt"
# That is where newer versions keep the common state, and older ones cannot read it there.
COMMON_KEY = "common_state/shard_0_1"
UNREADABLE = (
    OSError,
    RuntimeError,
    pickle.UnpicklingError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AttributeError,
)


class TorchDistCheckpoint:
    """A folder ``iter_…`` of Megatron's format torch_dist: what is stored where, and its common state."""

    ALLOWED = "a folder iter_… that Megatron saved with --ckpt-format torch_dist"

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: the folder is not of the format torch_dist.
        """
        self.folder = folder
        try:
            backend = json.loads((folder / FORMAT_FILE).read_bytes())["sharded_backend"]
            self._reader = FileSystemReader(folder)
            metadata = self._reader.read_metadata()
        except UNREADABLE as error:
            raise self._refused(f"no such checkpoint ({error})") from None
        if backend != "torch_dist":
            raise self._refused(f"the format {backend}")
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._stored = metadata.state_dict_metadata
        self._storage: Mapping[MetadataIndex, Any] = metadata.storage_data

    def _refused(self, given: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: given {given}; allowed: {self.ALLOWED}")

    def file_sizes(self) -> dict[str, int]:
        """Return the files that the metadata names, with the bytes that each must have at least."""
        sizes: dict[str, int] = {}
        for place in self._storage.values():
            sizes[place.relative_path] = max(sizes.get(place.relative_path, 1), place.offset + place.length)
        if COMMON_KEY not in self._stored:
            sizes[COMMON_FILE] = 1
        return sizes

    def common_state(self) -> Mapping[str, Any]:
        """Return what is not sharded, with stand-ins for what is of other classes; ``args`` is a Namespace.

        Raises:
            CheckpointError: it cannot be read, or holds no arguments of Megatron's.
        """
        file: Path | io.BytesIO = self.folder / COMMON_FILE
        try:
            if COMMON_KEY in self._stored:
                index, nothing = MetadataIndex(COMMON_KEY), torch.Size([0])
                file = self.read_items([ReadItem(LoadItemType.BYTE_IO, index, nothing, index, nothing, nothing)]).bytes
            content = load_harmless(file)
            state = content[0] if isinstance(content, list) else content
            require_arguments(state)
        except UNREADABLE as error:
            raise self._refused(f"one without Megatron's arguments ({error})") from None
        return dict(state)

    def arguments(self) -> tuple[dict[str, Any], int]:
        """Return Megatron's arguments, with stand-ins for what is of its own classes, and the iteration.

        Raises:
            CheckpointError: there are none.
        """
        state = self.common_state()
        return vars(state["args"]), state["iteration"]

    def read_items(self, items: list[ReadItem], tensor: Tensor | None = None) -> ReadTarget:
        """Read parts of one tensor, or of one object, and return where they went to."""
        target = ReadTarget(tensor)
        self._reader.read_data(LoadPlan(items), target).wait()
        return target


class ReadTarget(DefaultLoadPlanner):
    """Where one read goes to."""

    def __init__(self, tensor: Tensor | None) -> None:
        super().__init__()
        self.tensor, self.bytes = tensor, io.BytesIO()

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """Return the tensor to fill."""
        assert self.tensor is not None
        return self.tensor

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Keep an object's bytes."""
        self.bytes = value


def require_arguments(state: Any) -> None:
    """Raise LookupError or TypeError unless a state holds Megatron's arguments and the iteration."""
    if not isinstance(state["args"], Namespace) or not isinstance(state["iteration"], int):
        raise TypeError("neither a Namespace nor a number")


def load_harmless(file: Path | io.BytesIO, *, mmap: bool = False) -> Any:
    """Return what torch saved in a file, with stand-ins for objects of all classes but Namespace; nothing is run."""
    return torch.load(file, map_location="cpu", mmap=mmap, weights_only=False, pickle_module=_HARMLESS)


def is_stand_in(value: object) -> bool:
    """Return whether a value is, or a list holds, what stands for an object of a class that was not loaded."""
    if isinstance(value, list | tuple):
        return any(is_stand_in(item) for item in value)
    return isinstance(value, _StandIn) or (isinstance(value, type) and issubclass(value, _StandIn))


class _StandIn(dict[Any, Any]):
    """In the place of an object of another class."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, *_: object) -> None:
        super().__init__()

    def __setstate__(self, _: object) -> None:
        pass


class _HarmlessUnpickler(pickle.Unpickler):
    """Knows no class but Namespace: it runs nothing, and an enumeration that a newer Megatron adds stops no reader."""

    def find_class(self, module: str, name: str) -> Any:
        return Namespace if (module, name) == ("argparse", "Namespace") else _StandIn


_HARMLESS = SimpleNamespace(__name__="pickle", Unpickler=_HarmlessUnpickler)
_HARMLESS.load = lambda file, **_: _HarmlessUnpickler(file).load()
