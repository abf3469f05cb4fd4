"""Run an unchanged Megatron-DeepSpeed script on a CPU: ``deepspeed --module megatron_deepspeed_cpu SCRIPT ...`` (gloo).

DeepSpeed has a CPU accelerator of its own. What is answered for here is a module that newer DeepSpeeds have dropped, a
kernel that would be compiled, and a view that CPU tensors do not have. The dataset helpers must have been built.
"""

from __future__ import annotations

import importlib
import os
import runpy
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

os.environ["DS_ACCELERATOR"] = "cpu"


def replace() -> None:
    """Stand in for what Megatron-DeepSpeed asks of a GPU or of an older DeepSpeed."""
    compress: Any = ModuleType("deepspeed.compression.compress")
    compress.init_compression = compress.redundancy_clean = lambda model, *_: model
    sys.modules["deepspeed.compression"] = ModuleType("deepspeed.compression")
    sys.modules["deepspeed.compression.compress"] = compress
    vision: Any = ModuleType("torchvision")  # of its image models, which a CPU build of torch need not have beside it
    vision.datasets, vision.transforms = ModuleType("torchvision.datasets"), ModuleType("torchvision.transforms")
    vision.datasets.VisionDataset = object
    for module in (vision, vision.datasets, vision.transforms):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
    importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    attention = importlib.import_module("megatron.model.transformer").CoreAttention
    forward = attention.forward

    def contiguous(self: Any, query: Any, key: Any, value: Any, *others: Any) -> Any:
        return forward(self, query.contiguous(), key.contiguous(), value.contiguous(), *others)

    attention.forward = contiguous
    importlib.import_module("megatron.initialize")._compile_dependencies = lambda: None  # type: ignore[attr-defined]


def main() -> None:
    # The deepspeed launcher puts --local_rank before everything else.
    local_rank = [argument for argument in sys.argv[1:2] if argument.startswith("--local_rank")]
    script, *arguments = sys.argv[1 + len(local_rank) :]
    sys.argv = [script, *local_rank, *arguments]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    replace()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
