"""Tokens/s of the embedded trainer (DeepSpeed ZeRO-1, 2 ranks) against plain PyTorch on the same model and cores.

Run: python tests/bench/trainer_tokens_per_s.py [--rounds 3] [--steps 60]
The three ways take turns, round by round, so that a change of the machine's load meets all of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from llama_step import report, single_process, two_processes

ROOT = Path(__file__).parents[2]
# The first steps pay for allocations and lazy initialisation, as they do in the plain loops' warm-up.
WARM_UP_STEPS = 5


def deepspeed_trainer(steps: int) -> list[float]:
    """ms/step of every update behind the warm-up, as the trainer itself records them."""
    plan = (ROOT / "launch" / "quickstart.toml").read_text()
    first = plan.index('[[versions]]\nname = "v2"')
    rest = plan.index("[model]")
    text = plan[:first] + plan[rest:]
    text = text.replace("steps = 200", f"steps = {steps + WARM_UP_STEPS}").replace('"sotu/', f'"{ROOT}/launch/sotu/')
    with tempfile.TemporaryDirectory() as folder:
        file, out = Path(folder) / "plan.toml", Path(folder) / "run"
        file.write_text(text)
        command = [Path(sys.executable).with_name("pathswitch"), "run", file, "--out", out, "--paradigm", "ptfs"]
        subprocess.run(command, check=True, timeout=600, stdout=subprocess.DEVNULL)
        lines = (out / "ptfs" / "v1" / "metrics.jsonl").read_text().splitlines()
    return [1e3 * json.loads(line)["seconds"] for line in lines[WARM_UP_STEPS:]]


def main() -> None:
    """Print the medians and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60, help="steps per round")
    arguments = parser.parse_args()
    ways: dict[str, Callable[[], list[float]]] = {
        "pathswitch, DeepSpeed ZeRO-1, 2 ranks": lambda: deepspeed_trainer(arguments.steps),
        "plain PyTorch, DDP gloo, 2 x 1 thread": lambda: two_processes(rounds=6, steps=arguments.steps // 6),
        "plain PyTorch, 1 process x 2 threads": lambda: single_process(threads=2, rounds=6, steps=arguments.steps // 6),
    }
    measured: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            measured[name].append(statistics.median(way()))
    ours, *peers = measured
    for name, values in measured.items():
        print(report(name, values))
    for peer in peers:
        ratio = statistics.median(measured[peer]) / statistics.median(measured[ours])
        print(f"tokens/s of ours over {peer}: {ratio:.2f}")


if __name__ == "__main__":
    main()
