"""The plans beside the documents: each becomes jobs as it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from pathswitch.config import load_plan_file
from pathswitch.launch.render import job_files
from pathswitch.launch.spec import job_specs
from pathswitch.launch.submit import read_ds_config

LAUNCH = Path(__file__).parents[3] / "launch"
RECIPES = [path for path in sorted(LAUNCH.rglob("*.toml")) if "[launch]" in path.read_text()]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: str(path.relative_to(LAUNCH)))
def test_a_recipe_becomes_jobs(recipe: Path, tmp_path: Path) -> None:
    plan_file = load_plan_file(recipe)
    ds_config = read_ds_config(plan_file, recipe.parent)
    specs = job_specs(plan_file, recipe.parent, tmp_path / "run", ds_config=ds_config)
    assert [spec.path for spec in specs] == ["main", *(version.name for version in plan_file.versions)]
    names = {path.name for spec in specs for path in job_files(spec, ds_config)}
    assert "job.json" in names
    assert ("job.sbatch" in names) == (plan_file.launch.kind == "slurm")
    assert ("ds_config.json" in names) == (plan_file.launch.ds_config is not None)


def test_a_branch_of_megatron_gets_the_arguments_of_its_own_data() -> None:
    recipe = LAUNCH / "megatron" / "slurm.toml"
    main, v1, v2 = job_specs(load_plan_file(recipe), recipe.parent, Path("/runs/mine"))
    assert [part.end_step for part in main.parts] == [50_000, 66_000] and len(v1.parts) == 1
    data = str(recipe.parent / "data/v1_text_document")
    assert data in v1.parts[0].command and data in main.command_from(0)
    assert "0.8" in v2.parts[0].command and "0.8" in main.command_from(50_000)
    for spec in (main, v1, v2):
        command = spec.parts[-1].command
        assert command[command.index("--save") + 1] == str(spec.files.checkpoints)
