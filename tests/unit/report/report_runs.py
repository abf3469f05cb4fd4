"""Synthetic but plausible run folders: exactly the files that the trainer writes."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from math import exp, log
from pathlib import Path

from pathswitch.config import build_plan, load_plan_file
from pathswitch.versions import Paradigm, Plan
from pathswitch.versions import Path as LRPath

# Quality of a paradigm: factor on old text, factor on the newest text. Shaped after a first small measurement.
SKILL: dict[str, tuple[float, float]] = {
    "path_switching": (1.00, 1.00),
    "ptfs": (0.83, 1.30),
    "cpt_rewarm": (1.20, 1.17),
    "cpt_floor": (1.80, 2.20),
    "wsd_s": (1.08, 1.05),
}
ENVIRONMENT = {
    "python": "3.12.3",
    "torch": "2.8.0+cpu",
    "deepspeed": "0.18.1",
    "pathswitch": "0.1.0",
    "cpu": "AMD EPYC 9454",
    "cores": 2,
    "platform": "Linux-6.8-x86_64",
}


def plan_text(
    steps: Sequence[int] = (200, 200, 200, 200),
    *,
    seed: int = 1,
    split: str = "temporal",
    max_lr: float = 3e-3,
    names: Sequence[str] | None = None,
    train: str = "text/v1.txt",
) -> str:
    """A plan file with one version per entry of ``steps``."""
    names = names or [f"v{number}" for number in range(1, len(steps) + 1)]
    head = f"""[schedule]
max_lr = {max_lr}
warmup_steps = 10
shape = "cosine"

[data]
seq_len = 128
split = "{split}"

[train]
global_batch_size = 16
seed = {seed}
"""
    versions = [
        f'\n[[versions]]\nname = "{name}"\nsteps = {count}\ntrain = "{train}"\n'
        for name, count in zip(names, steps, strict=True)
    ]
    return head + "".join(versions)


def scored(nll_nats: float, tokens: int = 20_000, n_bytes: int = 70_000) -> dict[str, float]:
    """One entry of an evaluation.json."""
    bits = nll_nats / log(2) / n_bytes
    perplexity = exp(nll_nats / tokens)
    return {
        "nll_nats": nll_nats,
        "tokens": tokens,
        "n_bytes": n_bytes,
        "perplexity": perplexity,
        "bits_per_byte": bits,
    }


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def _evaluation(plan: Plan, path: LRPath, noise: random.Random) -> dict[str, object]:
    index = [version.name for version in plan.versions].index(path.name)
    old, new = SKILL[path.paradigm]
    learned = 40 + 110 * (200 / path.end_step) ** 0.9
    sets = {}
    for other, version in enumerate(plan.versions):
        age = index - other
        forgotten = (1 + 0.16 * age) * old if age > 0 else new
        distance = 1 + 0.35 * -age if age < 0 else 1.0
        perplexity = learned * forgotten * distance * (1 + noise.uniform(-0.01, 0.01))
        sets[version.name] = scored(log(perplexity) * 20_000)
    return {"step": path.end_step, "test_sets": sets}


def _metrics(path: LRPath, n_updates: int, noise: random.Random) -> str:
    lines = []
    for step in range(path.start_step, path.start_step + n_updates):
        lr = path.lr(step)
        annealed = 0.25 * (1 - lr / 3e-3) if step > 20 else 0.0
        floor = 3.9 + 0.2 * log(SKILL[path.paradigm][1])
        loss = floor + 3.2 * exp(-(step + 3) / 45) + 1.3 * exp(-(step + 3) / 400) - annealed + noise.gauss(0, 0.07)
        update = {"step": step, "lr": lr, "loss": round(loss, 5), "grad_norm": 0.8, "seconds": 0.21}
        lines.append(json.dumps(update) + "\n")
    return "".join(lines)


def write_path(root: Path, plan: Plan, path: LRPath, *, done_share: float = 1.0, seed: int = 1) -> None:
    """Write one path's folder, complete or stopped on the way."""
    noise = random.Random(f"{seed} {path.paradigm} {path.name}")
    folder = root / path.paradigm / path.name
    folder.mkdir(parents=True)
    n_updates = int(path.steps * done_share)
    (folder / "metrics.jsonl").write_text(_metrics(path, n_updates, noise), encoding="utf-8")
    if n_updates < path.steps:
        return
    if path.release is not None:
        write_json(folder / "evaluation.json", _evaluation(plan, path, noise))
    done = {
        "paradigm": path.paradigm,
        "path": path.name,
        "start_step": path.start_step,
        "end_step": path.end_step,
        "seconds": 0.21 * path.steps,
        "tokens_per_s": 9750.0,
    }
    write_json(folder / "done.json", done)


def write_run(
    root: Path,
    plan: str,
    paradigms: Sequence[Paradigm] = ("path_switching", "ptfs", "cpt_rewarm", "cpt_floor", "wsd_s"),
    *,
    seed: int = 1,
) -> Path:
    """Write a whole run folder."""
    root.mkdir(parents=True)
    (root / "plan.toml").write_text(plan, encoding="utf-8")
    write_json(root / "run.json", {"format": 1, "seed": seed, "ranks": 2, "environment": ENVIRONMENT})
    resolved = build_plan(load_plan_file(root / "plan.toml"))
    for paradigm in paradigms:
        for path in resolved.paths(paradigm):
            write_path(root, resolved, path, seed=seed)
    return root
