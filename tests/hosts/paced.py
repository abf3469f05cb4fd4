"""Run a training script unchanged, but for the time that a step takes: what the file of its path says, from a step on.

python paced.py SCRIPT ARGUMENTS...     PACE_FOLDER/<path> holds "STEP SECONDS"
"""

import functools
import os
import runpy
import sys
import time
from typing import Any

import deepspeed

# Nothing is compiled, and no rank spins while it waits for another.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
script = next(word for word in sys.argv[1:] if not word.startswith("--local_rank"))  # of the launcher
at_once = deepspeed.DeepSpeedEngine.step


@functools.wraps(at_once)
def step(engine: Any, *args: Any, **kwargs: Any) -> Any:
    try:
        with open(os.path.join(os.environ["PACE_FOLDER"], os.environ["PATHSWITCH_PATH"])) as file:
            first, seconds = file.read().split()
        time.sleep(float(seconds) * (engine.global_steps >= int(first)))
    except FileNotFoundError:
        pass
    return at_once(engine, *args, **kwargs)


deepspeed.DeepSpeedEngine.step = step
sys.argv = [script, *(word for word in sys.argv[1:] if word != script)]
runpy.run_path(script, run_name="__main__")
