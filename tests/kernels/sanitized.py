"""The kernels' source under AddressSanitizer and UndefinedBehaviorSanitizer, on arrays of exactly the right size.

`python sanitized.py libcuda.so KERNEL...` runs in a process of its own: the sanitizer must be there before Python is.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def sanitizer_gate(source: object, *kernels: str) -> int:
    """Run kernels' problems under the sanitizers; return how many kernels.

    Raises:
        Violation: a sanitizer has found something.
    """
    import pytest
    from ptx.memory import Violation
    from toolchain import Source, standin_driver

    assert isinstance(source, Source)
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_file():
        pytest.skip("no libasan: apt-get install g++")
    options = "detect_leaks=0:detect_stack_use_after_return=0:abort_on_error=0:exitcode=66"
    environment = os.environ | {"LD_PRELOAD": str(Path(runtime).resolve()), "ASAN_OPTIONS": options}
    command = [sys.executable, __file__, str(standin_driver(source, sanitized=True)), *kernels]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if "runtime error" in result.stderr or "AddressSanitizer:" in result.stderr:
        raise Violation(result.stderr[-2000:])
    assert result.returncode == 0, result.stderr[-4000:]
    return len(kernels)


def main() -> None:
    """Run each kernel's problems, without guards."""
    from engines import Standin
    from gates import problems_of

    engine = Standin(Path(sys.argv[1]))
    for kernel in sys.argv[2:]:
        for make in problems_of(kernel, guard_bytes=0):
            problem = make()
            engine.run(problem.launches())


if __name__ == "__main__":
    main()
