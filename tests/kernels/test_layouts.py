"""The structs of layouts.py lie in memory as a C++ compiler lays out those of csrc."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
from toolchain import STANDIN

from pathswitch.kernels import cuda, layouts
from pathswitch.kernels.compilers import SOURCES, cpp_compilers

STRUCTS = [
    *(layouts.PathDescriptor, layouts.Counters, layouts.GroupSettings, layouts.AverageSettings, layouts.StepScalars),
    *(layouts.NormInput, layouts.Span, layouts.Shard, layouts.Parameter),
    *(layouts.Spans, layouts.Shards, layouts.Parameters),
]
CONSTANTS = {
    "MAX_SPANS": layouts.MAX_SPANS,
    "MAX_SHARDS": layouts.MAX_SHARDS,
    "MAX_PARAMETERS": layouts.MAX_PARAMETERS,
    "ADAMW_TILE": layouts.ADAMW_TILE,
    "NORM_TILE": layouts.NORM_TILE,
    "THREADS": cuda.THREADS,
    "DIGEST_COLUMNS": cuda.DIGEST_COLUMNS,
}


def test_structs_and_constants_agree_with_the_compiler(tmp_path: Path) -> None:
    compilers = cpp_compilers()
    if not compilers:
        pytest.skip("needs a C++ compiler: apt-get install g++")
    lines, expected = [], []
    for struct in STRUCTS:
        name = struct.__name__
        lines.append(f'printf("{name} %zu\\n", sizeof({name}));')
        expected.append(f"{name} {ctypes.sizeof(struct)}")
        for field, *_ in struct._fields_:
            place = getattr(struct, field)
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof({name}::{field}));')
            expected.append(f"{name}.{field} {place.offset} {place.size}")
    for name, value in CONSTANTS.items():
        lines.append(f'printf("{name} %d\\n", (int){name});')
        expected.append(f"{name} {value}")
    program = tmp_path / "layouts.cpp"
    head = '#include "fibers.h"\n#include "kernels.cuh"\n#include <stddef.h>\n#include <stdio.h>\n'
    program.write_text(head + "using namespace pathswitch;\nint main() {\n" + "\n".join(lines) + "\n}\n")
    command = [compilers[0].path, *compilers[0].arguments, "-std=c++17", "-w", f"-I{STANDIN}", f"-I{SOURCES}"]
    subprocess.run([*command, str(program), "-o", str(tmp_path / "layouts")], check=True)
    printed = subprocess.run([str(tmp_path / "layouts")], capture_output=True, text=True, check=True).stdout
    assert printed.splitlines() == expected
