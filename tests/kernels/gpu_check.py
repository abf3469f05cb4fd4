"""Everything about the kernels that only a GPU can show, in under ten minutes on one H100; the result is a JSON file.

    python tests/kernels/gpu_check.py --out gpu_result.json

* bits: norm, prepare, update and digest of every variant, and whole steps of PathSwitchAdamW, equal the CPU's
* large: the last elements of a tensor of more than 2^31
* graph: a captured step replays with the LR of another path, and of one that is switched in between
* sanitizer: compute-sanitizer's memcheck, racecheck and initcheck over the small cases, where it is installed
* speed: CUDA events around our step, torch's fused AdamW, and what DeepSpeed's ZeRO 1 and 2 do, beside a copy

``--device cpu`` runs the parts that need no GPU, to check this script itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from pathswitch.kernels.cpu import CpuKernels
from pathswitch.kernels.layouts import ShardTensors, StepScalars, struct_bytes
from pathswitch.kernels.ops import backend
from pathswitch.kernels.optimizer import PathSwitchAdamW
from pathswitch.schedule import BranchPath, MainPath, make_shape

TYPES = [torch.float32, torch.bfloat16, torch.float16]
SCALARS = StepScalars(1e-3, 0.37, 0.9, 0.1, 0.95, 0.05, 1e-8, 1e-4, 1e-3, 1.1, 0.01)
SIZES = [(1, 0), (7, 1), (1000, 3), (2047, 0), (2048, 0), (2049, 1), (70001, 0), (70001, 1)]
MAIN = MainPath(3e-3, 0.0, warmup_steps=3)
BRANCH = BranchPath(MAIN, 8, 10, make_shape("one_minus_sqrt", {}))


class Failed(Exception):
    """A check has found a difference."""


def require_equal(what: str, found: Tensor, expected: Tensor) -> None:
    """Raise Failed unless two tensors have the same bits."""
    if not torch.equal(found.cpu(), expected.cpu()):
        differing = int((found.cpu() != expected.cpu()).sum())
        raise Failed(f"{what}: {differing} of {expected.numel()} numbers differ from the CPU's")


def make_shard(numel: int, offset: int, grad: torch.dtype, low: torch.dtype | None, average: bool) -> list[Any]:
    """Return the six tensors of a shard on the CPU, gradient and low precision at an offset from an aligned address."""
    generator = torch.Generator().manual_seed(numel)
    weight = torch.randn(numel, generator=generator)
    exp_avg, exp_avg_sq = 0.01 * weight, 1e-3 * torch.rand(numel, generator=generator)
    gradient = torch.zeros(numel + offset).to(grad)[offset:].copy_(torch.randn(numel, generator=generator))
    out = None if low is None else torch.zeros(numel + offset).to(low)[offset:]
    return [gradient, weight, exp_avg, exp_avg_sq, out, weight.clone() if average else None]


def on_device(tensor: Tensor | None, device: torch.device, offset: int = 0) -> Tensor | None:
    """Return a copy on the device, with the same offset from an aligned address."""
    if tensor is None:
        return None
    return torch.zeros(tensor.numel() + offset, dtype=tensor.dtype, device=device)[offset:].copy_(tensor)


def check_bits(device: torch.device) -> dict[str, Any]:
    """Compare every kernel and variant with the CPU backend."""
    kernels, cpu = backend(device), CpuKernels()
    cases = 0
    for grad, low, average in itertools.product(TYPES, [None, *TYPES], [False, True]):
        for numel, offset in SIZES:
            expected = make_shard(numel, offset, grad, low, average)
            found = [on_device(t, device, offset if i in (0, 4) else 0) for i, t in enumerate(expected)]
            rows = struct_bytes(SCALARS).view(1, -1)
            cpu.adamw([ShardTensors(*expected, 0)], rows)
            kernels.adamw([ShardTensors(*found, 0)], rows.to(device))  # type: ignore[arg-type]
            for name, left, right in zip("gwmvla", found, expected, strict=True):
                if left is not None:
                    require_equal(
                        f"adamw {grad} {low} average {average} n {numel} offset {offset}: {name}", left, right
                    )
            cases += 1
    for dtype in TYPES:
        tensors = [torch.randn(numel).to(dtype) for numel in (1, 511, 16384, 16385, 300001)]
        sums = [torch.zeros(1, dtype=torch.float64, device=where) for where in ("cpu", device)]
        cpu.norm(tensors, sums[0])
        kernels.norm([t.to(device) for t in tensors], sums[1])
        require_equal(f"norm {dtype}", sums[1], sums[0])
        for first in (0, 1, 1023, 2**40 + 3):
            digests = [torch.zeros(2, dtype=torch.int64, device=where) for where in ("cpu", device)]
            cpu.digest(tensors[-1], first, digests[0])
            kernels.digest(tensors[-1].to(device), first, digests[1])
            require_equal(f"digest {dtype} from {first}", digests[1], digests[0])
            cases += 1
    return {"cases": cases + check_steps(device)}


def check_steps(device: torch.device) -> int:
    """Compare whole steps of the optimizer: clipping, a step left out, a path, an average."""
    for dtype in TYPES:
        torch.manual_seed(0)
        start = [torch.randn(size).to(dtype) for size in ((300, 7), (1,), (16385,))]
        both = []
        for where in (torch.device("cpu"), device):
            parameters = [Parameter(tensor.to(where)) for tensor in start]
            both.append((parameters, PathSwitchAdamW(parameters, max_norm=0.5, average=0.9)))
        for _, optimizer in both:
            optimizer.follow(BRANCH, 0)
        for step in range(20):
            gradients = [torch.randn(p.shape) for p in start]
            if step == 5:
                gradients[0][0, 0] = torch.nan
            for parameters, optimizer in both:
                for p, gradient in zip(parameters, gradients, strict=True):
                    p.grad = gradient.to(p.device, p.dtype)
                optimizer.step()
        for expected, found in zip(both[0][0], both[1][0], strict=True):
            require_equal(f"steps {dtype}", found.detach(), expected.detach())
        if [optimizer.skipped_steps() for _, optimizer in both] != [1, 1]:
            raise Failed("a step with a gradient that is not finite was not left out")
    return len(TYPES)


def check_large(device: torch.device) -> dict[str, Any]:
    """Compare the ends of a tensor with more than 2^31 elements; needs 38 GB."""
    numel, window = 2**31 + 12345, 1 << 20
    grad = torch.full((numel,), 0.5, dtype=torch.bfloat16, device=device)
    weight, exp_avg, exp_avg_sq = (torch.full((numel,), x, device=device) for x in (1.0, 0.01, 1e-3))
    low = torch.zeros(numel, dtype=torch.bfloat16, device=device)
    columns = [grad, weight, exp_avg, exp_avg_sq, low]
    expected: list[list[Tensor]] = []
    for end in (slice(0, window), slice(numel - window, numel)):
        pieces = [column[end].cpu() for column in columns]
        CpuKernels().adamw([ShardTensors(*pieces, None, 0)], struct_bytes(SCALARS).view(1, -1))
        expected.append(pieces)
    backend(device).adamw([ShardTensors(*columns, None, 0)], struct_bytes(SCALARS).view(1, -1).to(device))
    for end, pieces in zip((slice(0, window), slice(numel - window, numel)), expected, strict=True):
        for name, column, piece in zip("gwmvl", columns, pieces, strict=True):
            require_equal(f"large {name} {end}", column[end], piece)
    return {"elements": numel}


def check_graph(device: torch.device) -> dict[str, Any]:
    """Replay a captured step while the path is switched from the main path to a branch; compare with eager steps."""
    torch.manual_seed(0)
    start = torch.randn(100_003)
    gradients = [torch.randn_like(start).to(device) for _ in range(20)]

    def optimizer_of(parameter: Parameter) -> PathSwitchAdamW:
        parameter.grad = torch.zeros_like(parameter)
        optimizer = PathSwitchAdamW([parameter], max_norm=1.0)
        optimizer.follow(MAIN, 0)
        return optimizer

    eager, captured = Parameter(start.to(device)), Parameter(start.to(device))
    expected, optimizer = optimizer_of(eager), optimizer_of(captured)
    assert eager.grad is not None and captured.grad is not None
    for step in (0, 1):  # before the capture: state and tables are made
        captured.grad.copy_(gradients[step])
        optimizer.step()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.graph(graph, stream=stream):
        optimizer.step()
    for step in range(2, 20):
        if step == BRANCH.fork_step:
            optimizer.follow(BRANCH)
        captured.grad.copy_(gradients[step])
        graph.replay()
    for step in range(20):
        if step == BRANCH.fork_step:
            expected.follow(BRANCH)
        eager.grad.copy_(gradients[step])
        expected.step()
    require_equal("graph", captured.detach(), eager.detach())
    if optimizer.path_step() != 20:
        raise Failed(f"graph: the path's counter stands at {optimizer.path_step()}, not at 20")
    return {"replays": 18}


def check_sanitizer(device: torch.device) -> dict[str, Any]:
    """Run the small cases under each of compute-sanitizer's tools."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"skipped": "compute-sanitizer is not installed"}
    said = {}
    for name in ("memcheck", "racecheck", "initcheck"):
        command = [tool, "--tool", name, "--error-exitcode", "9", sys.executable, __file__, "--only", "bits"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=240)
        said[name] = (result.stdout.strip() or result.stderr.strip()).splitlines()[-1]
        if result.returncode:
            raise Failed(f"compute-sanitizer {name}: {said[name]}")
    return said


def time_ms(run: Callable[[], Any], device: torch.device, rounds: int = 20) -> float:
    """Return the median ms of a function, on the device's own clock."""
    times = []
    for turn in range(rounds + 3):
        if device.type == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            run()
            events[1].record()
            torch.cuda.synchronize(device)
            ms = events[0].elapsed_time(events[1])
        else:
            started = time.perf_counter()
            run()
            ms = 1000 * (time.perf_counter() - started)
        if turn >= 3:
            times.append(ms)
    return statistics.median(times)


def check_speed(device: torch.device, millions: int) -> dict[str, Any]:
    """Time our step and its peers on one flat shard with bfloat16 gradients."""
    numel = millions * 10**6
    kernels, rows = backend(device), struct_bytes(SCALARS).view(1, -1).to(device)
    weight, exp_avg = torch.randn(numel, device=device), torch.zeros(numel, device=device)
    exp_avg_sq = torch.full((numel,), 1e-4, device=device)
    grad, low = torch.randn(numel, device=device).bfloat16(), weight.bfloat16()
    shard = ShardTensors(grad, weight, exp_avg, exp_avg_sq, low, None, 0)
    total, digest = torch.zeros(1, dtype=torch.float64, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    parameter = Parameter(weight)
    parameter.grad = grad.float()
    fused = torch.optim.AdamW([parameter], lr=1e-4, fused=True)
    fused.step()
    fused.state[parameter].update(exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)

    def ours() -> None:
        kernels.norm([grad], total)
        kernels.adamw([shard], rows)

    def deepspeed() -> None:
        norm = torch.linalg.vector_norm(grad.double())
        gradient = grad.float()
        gradient.mul_(1.0 / torch.clamp(norm, min=1.0).float())
        parameter.grad = gradient
        fused.step()
        low.copy_(weight)

    cases: dict[str, tuple[Callable[[], Any], int]] = {
        "copy": (lambda: exp_avg.copy_(weight), 8),
        "norm": (lambda: kernels.norm([grad], total), 2),
        "update": (lambda: kernels.adamw([shard], rows), 28),
        "norm + update": (ours, 30),
        "torch AdamW(fused), float32 gradients": (fused.step, 28),
        "DeepSpeed's sequence with torch's fused AdamW": (deepspeed, 66),
        "digest": (lambda: kernels.digest(weight, 0, digest), 4),
    }
    result = {}
    for name, (run, size) in cases.items():
        ms = time_ms(run, device)
        result[name] = {"ms": round(ms, 4), "GB/s": round(size * numel / ms / 1e6, 1)}
    return result


def main() -> int:
    """Run the checks, write the result, return 0 if all have passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--only", choices=("bits", "large", "graph", "sanitizer", "speed"))
    parser.add_argument("--millions", type=int, nargs="+", default=[100, 1000])
    arguments = parser.parse_args()
    device = torch.device(arguments.device, 0) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        print("gpu_check: torch finds no GPU here; --device cpu runs the parts that need none", file=sys.stderr)
        return 3
    checks: dict[str, Callable[[], dict[str, Any]]] = {"bits": lambda: check_bits(device)}
    if device.type == "cuda":
        checks["large"] = lambda: check_large(device)
        checks["graph"] = lambda: check_graph(device)
        checks["sanitizer"] = lambda: check_sanitizer(device)
    checks["speed"] = lambda: {f"{m}M": check_speed(device, m) for m in arguments.millions}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    result: dict[str, Any] = {"device": name, "torch": torch.__version__, "cuda": torch.version.cuda}
    failed = False
    with torch.no_grad():
        for check, run in checks.items():
            if arguments.only not in (None, check):
                continue
            started = time.perf_counter()
            try:
                result[check] = {"passed": True, **run()}
            except Failed as error:
                failed, result[check] = True, {"passed": False, "found": str(error)}
            result[check]["seconds"] = round(time.perf_counter() - started, 1)
            print(check, json.dumps(result[check]), flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
