"""The maximum LR, chosen on version 1 by pre-training from scratch: one LR for all paradigms, none favoured."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from rich.table import Table

from pathswitch.config import PlanFile
from pathswitch.errors import ConfigError
from pathswitch.run_folder import RunFolder
from pathswitch.versions import Paradigm

Train = Callable[[PlanFile, Path, Path, Paradigm], None]


def sweep_max_lr(plan_file: PlanFile, base: Path, out: Path, max_lrs: str, train: Train) -> Table:
    """Train version 1 from scratch once per maximum LR and return perplexities on its test text, best marked.

    Raises:
        ConfigError: ``max_lrs`` is not a list of numbers, or a plan with one of them is not valid.
    """
    perplexity: dict[str, float] = {}
    for text in max_lrs.split(","):
        variant = _variant(plan_file, text)
        first, folder = variant.versions[0].name, RunFolder(out / f"max_lr_{text.strip()}")
        train(variant, base, folder.out, "ptfs")
        evaluation = json.loads((folder.out / "ptfs" / first / "evaluation.json").read_text())
        perplexity[text.strip()] = evaluation["test_sets"][first]["perplexity"]
    best = min(perplexity, key=perplexity.__getitem__)
    table = Table("max_lr", "perplexity", "", title=f"PTFS of {plan_file.versions[0].name}, on its own test text")
    for text, value in perplexity.items():
        table.add_row(text, f"{value:.2f}", "best" if text == best else "")
    return table


def _variant(plan_file: PlanFile, text: str) -> PlanFile:
    """Return the plan of version 1 alone with another maximum LR; an LR that scales with it stays a share of it."""
    try:
        max_lr = float(text)
    except ValueError:
        raise ConfigError(
            "--max-lr", given=text, allowed="numbers with commas between them, such as 1e-3,2e-3"
        ) from None
    if not plan_file.versions:
        raise ConfigError("[[versions]]", given="nothing", allowed="at least one version for training")
    schedule = plan_file.schedule
    share = max_lr / schedule.max_lr
    scaled = {"init_lr": schedule.init_lr * share}
    if schedule.final_lr is not None:
        scaled["final_lr"] = schedule.final_lr * share
    content = plan_file.model_dump(exclude_unset=True)
    content["schedule"] = {**content["schedule"], **scaled, "max_lr": max_lr}
    content["versions"] = content["versions"][:1]
    content.pop("baselines", None)
    return PlanFile.model_validate(content)
