"""Memory that knows what belongs to it: bounds, alignment, races between threads, values never written, traffic.

A space is a set of regions at addresses of their own choice, so that the last elements of a tensor of 2^33 lie where
they would lie, without the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
CELL = 2  # bytes: the smallest access of the kernels
SECTOR = 32  # bytes: what a GPU moves at least
NOBODY, SEVERAL = -1, -2


class Violation(Exception):
    """A kernel has done what it must not do."""


@dataclass
class Traffic:
    """What warps asked of a region: distinct bytes, bytes in sectors of 32, and the widths of a thread's accesses."""

    payload: int = 0
    sectors: int = 0
    widths: dict[int, int] = field(default_factory=dict)

    def count(self, addresses: Array, width: int, warps: Array) -> None:
        """Count one instruction: a warp's lanes that want the same bytes, or the same sector, get them once."""
        cells = addresses.astype(np.int64)[:, None] // CELL + np.arange(width // CELL)
        wanted = np.unique(((warps - warps.min())[:, None] << 50) | (cells - cells.min() + cells.min() % 16))
        self.payload += CELL * len(wanted)
        self.sectors += SECTOR * len(np.unique(wanted // (SECTOR // CELL)))
        self.widths[width] = self.widths.get(width, 0) + len(addresses)


@dataclass(frozen=True)
class Threads:
    """Who makes an access: thread, block and the number of barriers that its block has passed, per element."""

    thread: Array
    block: Array
    epoch: Array

    def of(self, chosen: Array) -> Threads:
        """Return some of them, each for all cells of its access."""
        return Threads(self.thread[chosen, None], self.block[chosen, None], self.epoch[chosen, None])


class Region:
    """Bytes at an address.

    Two accesses of different threads to one cell, one of which writes, must have a barrier of their block between them.
    """

    def __init__(self, name: str, address: int, content: Array, *, written: bool = True) -> None:
        """Take bytes (uint8), which kernels change in place; ``written``: they may be read from the start."""
        self.name, self.address, self.content = name, address, content
        self.loads, self.stores = Traffic(), Traffic()
        cells = -(-len(content) // CELL)
        self._written = np.full(cells, written)
        self._writer, self._write_block, self._write_epoch = (np.full(cells, NOBODY, np.int64) for _ in range(3))
        self._reader, self._read_block, self._read_epoch = (np.full(cells, NOBODY, np.int64) for _ in range(3))

    def forget_threads(self) -> None:
        """Begin a launch: whatever came before it is done."""
        for array in (self._writer, self._reader, self._read_block):
            array.fill(NOBODY)

    def load(self, offsets: Array, width: int, who: Threads) -> Array:
        """Return bytes [n, width].

        Raises:
            Violation: they were never written, or another thread may be writing them.
        """
        cells = offsets[:, None] // CELL + np.arange(width // CELL)
        if not self._written[cells].all():
            raise Violation(f"{self.name}: a value is read that nobody has written")
        self._check(cells, who, self._writer, self._write_block, self._write_epoch)
        _note(self._reader, cells, who.thread)
        _note(self._read_block, cells, who.block)
        self._read_epoch[cells] = who.epoch
        return self.content[offsets[:, None] + np.arange(width)]

    def store(self, offsets: Array, values: Array, who: Threads) -> None:
        """Write bytes [n, width].

        Raises:
            Violation: another thread may be reading or writing them.
        """
        width = values.shape[1]
        cells = offsets[:, None] // CELL + np.arange(width // CELL)
        self._check(cells, who, self._writer, self._write_block, self._write_epoch)
        self._check(cells, who, self._reader, self._read_block, self._read_epoch)
        self._writer[cells] = who.thread
        if (self._writer[cells] != who.thread).any():
            raise Violation(f"{self.name}: two threads write the same element")
        self._write_block[cells], self._write_epoch[cells], self._written[cells] = who.block, who.epoch, True
        self.content[offsets[:, None] + np.arange(width)] = values

    def add(self, offset: int, value: int) -> int:
        """Add to 64 bits at once, and return what was there."""
        place = self.content[offset : offset + 8].view(np.uint64)
        before = int(place[0])
        place[0] = (before + value) % 2**64
        return before

    def _check(self, cells: Array, who: Threads, thread: Array, block: Array, epoch: Array) -> None:
        other = (thread[cells] != NOBODY) & (thread[cells] != who.thread)
        ordered = (block[cells] == who.block) & (epoch[cells] < who.epoch)
        if (other & ~ordered).any():
            raise Violation(f"{self.name}: a race between threads")


def _note(array: Array, cells: Array, mine: Array) -> None:
    """Note who reads cells: one, or several."""
    before = array[cells]
    array[cells] = np.where((before == NOBODY) | (before == mine), mine, SEVERAL)
    several = array[cells] != mine
    array[cells[several]] = SEVERAL


class Space:
    """Regions, sorted by address, with a gap wherever they are not adjacent in earnest."""

    def __init__(self, regions: list[Region]) -> None:
        self.regions = sorted(regions, key=lambda region: region.address)
        self._starts = np.array([region.address for region in self.regions], np.uint64)

    def begin(self) -> None:
        """Begin a launch."""
        for region in self.regions:
            region.forget_threads()

    def load(self, addresses: Array, width: int, who: Threads) -> Array:
        """Return bytes [n, width].

        Raises:
            Violation: see Region.load; or an address is misaligned or belongs to no region.
        """
        result = np.empty((len(addresses), width), np.uint8)
        for region, chosen, offsets in self._find(addresses, width):
            result[chosen] = region.load(offsets, width, who.of(chosen))
            region.loads.count(addresses[chosen], width, who.thread[chosen] // 32)
        return result

    def store(self, addresses: Array, values: Array, who: Threads) -> None:
        """Write bytes [n, width].

        Raises:
            Violation: see Region.store; or an address is misaligned or belongs to no region.
        """
        width = values.shape[1]
        for region, chosen, offsets in self._find(addresses, width):
            region.store(offsets, values[chosen], who.of(chosen))
            region.stores.count(addresses[chosen], width, who.thread[chosen] // 32)

    def add(self, addresses: Array, values: Array) -> Array:
        """Add to 64 bits each, one thread after the other, and return what was there."""
        before = []
        for position, value in enumerate(values):
            ((region, _, offsets),) = self._find(addresses[position : position + 1], 8)
            before.append(region.add(int(offsets[0]), int(value)))
        return np.array(before, np.uint64)

    def _find(self, addresses: Array, width: int) -> list[tuple[Region, Array, Array]]:
        if (addresses % np.uint64(width)).any():
            raise Violation(
                f"misaligned: {width} bytes at {hex(int(addresses[(addresses % np.uint64(width)) > 0][0]))}"
            )
        index = np.searchsorted(self._starts, addresses, side="right").astype(np.int64) - 1
        found = []
        for number in np.unique(index):
            chosen = np.nonzero(index == number)[0]
            region = self.regions[number]
            offsets = (addresses[chosen] - np.uint64(region.address)).astype(np.int64)
            if number < 0 or (offsets + width > len(region.content)).any():
                raise Violation(
                    f"out of bounds: {width} bytes at {hex(int(addresses[chosen].max()))}, past {region.name}"
                )
            found.append((region, chosen, offsets))
        return found
