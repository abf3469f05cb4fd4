"""One rank of one path; started by the deepspeed launcher: ``deepspeed --module pathswitch.trainer ...``."""

from __future__ import annotations

import argparse
import gc
import logging
import sys
from pathlib import Path

from pathswitch.errors import PathSwitchError


def main() -> int:
    """Train the path that the arguments name; 0 when its completion record is written or it was asked to stop."""
    parser = argparse.ArgumentParser(prog="pathswitch.trainer")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--paradigm", required=True)
    parser.add_argument("--path", required=True)
    parser.add_argument("--on-damage", choices=("refuse", "previous"))
    parser.add_argument("--local_rank", type=int, default=0)
    arguments = parser.parse_args()
    gc.disable()  # until the engine is built: what imports make stays, and looking through it takes a second
    import torch.distributed as dist

    from pathswitch.trainer.engine import init_distributed
    from pathswitch.trainer.loop import open_job, train_path

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    init_distributed()
    try:
        train_path(open_job(arguments.out, arguments.paradigm, arguments.path, arguments.on_damage))
    except PathSwitchError as error:
        print(f"pathswitch: error: {error}", file=sys.stderr, flush=True)
        return 2
    except SystemExit:  # asked to stop; all ranks have met already
        dist.destroy_process_group()
        raise
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
