"""Let a checkout of Megatron-LM read and check the arguments of jobs, and say which samples it would ask for.

worker_megatron_arguments.py CHECKOUT REQUEST.json ANSWER.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MODEL = "--num-layers 1 --hidden-size 32 --num-attention-heads 2 --seq-length 32 --max-position-embeddings 32"
OTHERS = "--micro-batch-size 2 --save-interval 100 --eval-interval 100 --eval-iters 0"
OTHERS += " --tokenizer-type NullTokenizer --vocab-size 256"


def main() -> None:
    """Answer the requests: by name, a job's arguments and the iteration that it stands at."""
    checkout, request_file, answer_file = sys.argv[1:]
    sys.path.insert(0, checkout)
    from megatron.training import arguments, training

    answers: dict[str, dict[str, Any]] = {}
    for name, request in json.loads(Path(request_file).read_text()).items():
        sys.argv[1:] = [*MODEL.split(), *OTHERS.split(), *request["arguments"]]
        args = arguments.validate_args(arguments.parse_args())
        args.iteration = request["iteration"]
        training.get_args = lambda args=args: args
        training.update_train_iters(args)
        answers[name] = {
            "samples": training.get_train_valid_test_num_samples()[0],
            "iterations": args.train_iters,
            **{key: getattr(args, key) for key in ("data_path", "lr", "min_lr", "save", "load", "exit_interval")},
        }
    Path(answer_file).write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
