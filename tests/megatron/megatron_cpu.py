"""Run an unchanged Megatron-LM script on a CPU: ``torchrun ... -m megatron_cpu SCRIPT ARGS...`` (gloo).

Megatron asks for CUDA devices, streams, events and generators by name; each of these names is answered by the CPU's own
here, and nothing of the training itself is replaced. Megatron's compiled dataset helpers must be there.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import sys
import time
from typing import Any

for name in ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS"):
    os.environ.setdefault(name, "1")

import torch  # noqa: E402  reads them when it is imported
from torch.overrides import TorchFunctionMode  # noqa: E402

CPU = torch.device("cpu")
PAUSE_SECONDS = float(os.environ.get("PAUSE_SECONDS", "0"))


def is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.split(":")[0] == "cuda"


class CudaToCpu(TorchFunctionMode):
    """Every device argument that names CUDA becomes the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if is_cuda(kwargs.get("device")) or type(kwargs.get("device")) is int:
            kwargs["device"] = CPU
        return func(*(CPU if is_cuda(argument) else argument for argument in args), **kwargs)


class Event:
    def __init__(self, *_: Any, **__: Any) -> None: ...

    def record(self, *_: Any) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, _: Any) -> float:
        return 0.0


class Stream(Event):
    cuda_stream = 0
    wait_stream = wait_event = Event.wait

    def record_event(self, *_: Any) -> Event:
        return Event()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: Any) -> bool:
        return False


class Properties:
    major, minor, multi_processor_count, name, total_memory = 9, 0, 100, "cpu", 1 << 34


def nothing(*_: Any, **__: Any) -> None:
    pass


def zero(*_: Any, **__: Any) -> int:
    return 0


MEMORY_STATS = ("allocated_bytes.all", "reserved_bytes.all", "active_bytes.all", "allocation.all")


def replace_cuda() -> None:
    """Answer for CUDA; Megatron core must have been imported, which looks at some of it."""
    import megatron.core.tensor_parallel.random as megatron_random
    import torch._dynamo

    cuda: Any = torch.cuda
    cuda.device_count = lambda: int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cuda.current_device = lambda: CPU
    for name in ("set_device", "empty_cache", "set_stream", "reset_peak_memory_stats"):
        setattr(cuda, name, nothing)
    # Megatron synchronizes a few times in each iteration; pausing there gives a test the time to kill it.
    cuda.synchronize = lambda *_: time.sleep(PAUSE_SECONDS)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, zero)
    cuda.device_memory_used = zero
    cuda.memory_stats = lambda *_, **__: {"num_alloc_retries": 0, **{f"{stat}.current": 0 for stat in MEMORY_STATS}}
    cuda.Stream, cuda.Event = Stream, Event
    cuda.current_stream = cuda.default_stream = lambda *_, **__: Stream()
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda: False
    cuda.get_device_capability = lambda *_, **__: (9, 0)
    cuda.get_device_properties = lambda *_, **__: Properties()
    cuda.nvtx.range_push = cuda.nvtx.range_pop = nothing
    cuda.manual_seed = lambda seed: torch.default_generator.manual_seed(int(seed))
    cuda.manual_seed_all = nothing  # torch.manual_seed calls it
    cuda.get_rng_state = cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    megatron_random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    torch.Tensor.cuda = torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[assignment,method-assign]
    own_type = torch.Tensor.type

    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = own_type(self, *args, **kwargs)
        if args or kwargs or result.startswith("torch.cuda."):
            return result
        return result.replace("torch.", "torch.cuda.", 1)  # Megatron asserts that gradients are on a GPU

    torch.Tensor.type = cuda_type  # type: ignore[method-assign,assignment]
    CudaToCpu().__enter__()


def fork_writers() -> None:
    """Let the processes that write checkpoints be forks, which know all this; spawned ones would import everything."""
    own = multiprocessing.get_context

    def get_context(method: str | None = None) -> Any:
        return own("fork" if method in ("spawn", "forkserver") else method)

    multiprocessing.get_context = torch.multiprocessing.get_context = get_context  # type: ignore[assignment]


def replace_initialization() -> None:
    """Let Megatron start without CUDA, and without its own compiled kernels."""
    import megatron.training.initialize as initialize
    import megatron.training.training as training

    own = training.initialize_megatron
    training.initialize_megatron = initialize.initialize_megatron = lambda *args, **kwargs: own(
        *args, **{**kwargs, "allow_no_cuda": True}
    )
    initialize._compile_dependencies = initialize._warmup_jit_function = nothing
    training.set_jit_fusion_options = initialize.set_jit_fusion_options = nothing


def main() -> None:
    script, sys.argv = sys.argv[1], sys.argv[1:]
    sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
    import megatron.core
    import megatron.training.training  # noqa: F401

    replace_cuda()
    fork_writers()
    replace_initialization()
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
