"""Two engines for the launches of the CUDA backend where there is no GPU: the stand-in driver, and compiled PTX."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

import torch
from problems import Problem, differences
from ptx.machine import Machine
from ptx.memory import Region, Space, Violation
from ptx.text import Kernel, parse

from pathswitch.errors import KernelError
from pathswitch.kernels.cuda import Driver, Launch

FORWARD, REVERSE, RANDOM = 0, -1, 7
IMAGE = b"stand-in"


class Standin:
    """The launcher as it is, over a driver that runs the kernels' source on a CPU."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.standin_message.restype = ctypes.c_char_p
        self._driver = Driver(IMAGE, str(library))

    def run(self, launches: Iterable[Launch], order: int = FORWARD) -> None:
        """Run launches, the threads between barriers in this order.

        Raises:
            Violation: threads wait for each other for ever.
        """
        self._library.standin_order(order)
        for launch in launches:
            try:
                self._driver.launch(launch, stream=0)
            except KernelError as error:
                raise Violation(f"{error}: {self._library.standin_message().decode()}") from None


@cache
def parsed(text: str, name: str) -> Kernel:
    """Return one kernel of a PTX module."""
    return parse(text, name)


class Ptx:
    """The interpreter, over the PTX of a compiler."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.executed: dict[str, int] = {}

    def run(self, launches: Iterable[Launch], memory: Space, blocks: Sequence[int] | None = None) -> None:
        """Run launches on regions of memory; of a launch's blocks all, or these alone.

        Raises:
            Violation: a kernel has done what it must not do.
        """
        for launch in launches:
            arguments = [bytes(argument) for argument in launch.arguments]
            kernel = parsed(self._text, launch.kernel)
            machine = Machine(kernel, launch.grid, launch.block, arguments, memory, blocks)
            machine.run()
            for opcode, count in machine.executed.items():
                self.executed[opcode] = self.executed.get(opcode, 0) + count


def regions(problem: Problem) -> Space:
    """Return a problem's tensors as regions of memory: nothing but their own bytes."""
    return Space(
        [
            Region(name, t.data_ptr(), t.reshape(-1).view(torch.uint8).numpy(), written=name not in problem.blank)
            for name, t in problem.tensors.items()
            if t.numel()
        ]
    )


def require_equal(found: Problem, expected: Problem, where: str) -> None:
    """Raise Violation unless two problems hold the same bits, and so do their guards."""
    if names := differences(found, expected):
        raise Violation(f"{where}: not the reference's bits: {', '.join(names)}")
