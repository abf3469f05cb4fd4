"""Activation and patches, on modules with the names and signatures of every supported Megatron."""

from __future__ import annotations

import inspect
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from pathswitch.errors import UpstreamError
from pathswitch_megatron import upstream
from pathswitch_megatron.upstream import MEGATRON_BRIDGE, MEGATRON_DEEPSPEED, MEGATRON_LM, UPSTREAMS, Upstream, patch

pytestmark = pytest.mark.slow

STEP = "forward_step_func, data_iterator, model, optimizer, opt_param_scheduler, config"
DECIDE = (
    "model, optimizer, opt_param_scheduler, iteration, num_floating_point_operations_so_far, checkpointing_context, "
    "train_data_iterator"
)
NAME = (
    "checkpoints_path, iteration, release=False, pipeline_parallel=None, tensor_rank=None, pipeline_rank=None, "
    "expert_parallel=None, expert_rank=None, return_base_dir=False, basename='model_optim_rng.pt'"
)
SAVE = (
    "iteration, model, optimizer, opt_param_scheduler, num_floating_point_operations_so_far, "
    "checkpointing_context=None, pipeline_rank=None, expert_rank=None, tensor_rank=None, pipeline_parallel=None, "
    "expert_parallel=None, non_persistent_ckpt=False, train_data_iterator=None, preprocess_common_state_dict_fn=None"
)
LOAD = (
    "ddp_model, optimizer, opt_param_scheduler, load_arg='load', strict=True, checkpointing_context=None, "
    "skip_load_to_model_and_opt=False"
)
GROUPS = ", tp_group=None, pp_group=None, dp_cp_group=None"
MORE_GROUPS = f"{GROUPS}, dp_group=None, expt_dp_group=None, rng_state_key_prefix=''"
# Version of Megatron core -> parameters of train_step, save_checkpoint and load_checkpoint, where they changed.
MEGATRON_LM_VERSIONS = {
    "0.12": (STEP, SAVE, LOAD),
    "0.13": (STEP, SAVE, LOAD),
    "0.14": (f"{STEP}, forward_backward_func", SAVE, LOAD),
    "0.15": (f"{STEP}, forward_backward_func", f"{SAVE}, release=False", LOAD),
    "0.16": (f"{STEP}, forward_backward_func, iteration=None", f"{SAVE}, release=False{GROUPS}", f"{LOAD}{GROUPS}"),
    "0.17": (f"{STEP}, forward_backward_func, iteration=None", f"{SAVE}, release=False{GROUPS}", f"{LOAD}{GROUPS}"),
    "0.18": (f"{STEP}, forward_backward_func, iteration=None", f"{SAVE}, release=False{GROUPS}", f"{LOAD}{GROUPS}"),
    "0.19": (
        f"{STEP}, forward_backward_func, iteration=None, pg_collection=None, p2p_communicator=None",
        f"{SAVE}, release=False{MORE_GROUPS}",
        f"{LOAD}{MORE_GROUPS}",
    ),
    "0.20": (
        f"{STEP}, forward_backward_func, iteration=None, pg_collection=None, p2p_communicator=None",
        f"{SAVE}, release=False{MORE_GROUPS}",
        f"{LOAD}{MORE_GROUPS}",
    ),
}
SCRIPT = """
import importlib, os, sys
import torch
import megatron.training{dot} as training
for name in {names}:
    function = getattr(training, name)
    print(name, getattr(function, "pathswitch_patch", False))
print("finders", sum(type(finder).__module__.startswith("pathswitch") for finder in sys.meta_path))
print("hooks", "pathswitch_megatron.hooks" in sys.modules)
"""


def functions(**parameters: str) -> str:
    return "\n".join(f"def {name}({listed}):\n    return '{name}', locals()\n" for name, listed in parameters.items())


def megatron_lm(root: Path, version: str = "0.16") -> Path:
    """Write a Megatron-LM of nothing but the functions that are replaced."""
    step, save, load = MEGATRON_LM_VERSIONS[version]
    package = root / "megatron" / "training"
    package.mkdir(parents=True)
    core = root / "megatron" / "core"
    core.mkdir()
    (core / "__init__.py").write_text(f"__version__ = '{version}.0'\n")
    (package / "__init__.py").write_text("from .training import train_step\n")
    (package / "async_utils.py").write_text(functions(schedule_async_save="async_request"))
    imports = "from .async_utils import schedule_async_save\n"
    names = functions(get_checkpoint_name=NAME, get_checkpoint_tracker_filename="checkpoints_path")
    (package / "checkpointing.py").write_text(imports + names + functions(save_checkpoint=save, load_checkpoint=load))
    (package / "training.py").write_text(
        "import torch\nfrom .checkpointing import load_checkpoint, save_checkpoint\n"
        + functions(get_optimizer_param_scheduler="optimizer", train_step=step, checkpoint_and_decide_exit=DECIDE)
        + functions(get_args="")
    )
    return root


def run(root: Path, code: str, plan: Path | None = None, *launch: str) -> subprocess.CompletedProcess[str]:
    import os

    environment = {k: v for k, v in os.environ.items() if not k.startswith("PATHSWITCH")}
    environment["PYTHONPATH"] = f"{root}:{os.environ.get('PYTHONPATH', '')}"
    if plan is not None:
        environment["PATHSWITCH_PLAN"] = str(plan)
    script = root / "train.py"
    script.write_text(code)
    command = [sys.executable, *launch, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text("[schedule]\nmax_lr = 1e-3\n[[versions]]\nname = 'v1'\nsteps = 40\n")
    return path


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import modules of a fake Megatron into this process for one test."""
    kept = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "megatron"}
    for name in kept:
        del sys.modules[name]

    def use(root: Path, *names: str) -> list[Any]:
        import importlib

        monkeypatch.syspath_prepend(str(root))
        return [importlib.import_module(name) for name in names]

    yield use
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        del sys.modules[name]
    sys.modules.update(kept)


def replacements(target: Upstream) -> dict[str, Any]:
    return {f.name: lambda original, arguments: ("replaced", original(), dict(arguments)) for f in target.functions}


@pytest.mark.parametrize("version", MEGATRON_LM_VERSIONS)
def test_every_megatron_lm(tmp_path: Path, in_process: Any, version: str) -> None:
    training, checkpointing = in_process(
        megatron_lm(tmp_path, version), "megatron.training.training", "megatron.training.checkpointing"
    )
    before = {f.name: inspect.signature(getattr(sys.modules[f.module], f.name)) for f in MEGATRON_LM.functions}
    patch(MEGATRON_LM, replacements(MEGATRON_LM))
    patched = {f.name: getattr(sys.modules[f.module], f.name) for f in MEGATRON_LM.functions}
    assert {name: inspect.signature(function) for name, function in patched.items()} == before
    assert training.save_checkpoint is checkpointing.save_checkpoint, "wherever it has been imported"
    assert sys.modules["megatron.training"].train_step is training.train_step
    replaced, (name, own), seen = training.save_checkpoint(
        7, "m", "o", opt_param_scheduler="s", num_floating_point_operations_so_far=0
    )
    assert (replaced, name, own["iteration"], own["non_persistent_ckpt"]) == ("replaced", "save_checkpoint", 7, False)
    assert seen["opt_param_scheduler"] == "s" and seen["iteration"] == 7
    patch(MEGATRON_LM, replacements(MEGATRON_LM))
    assert {f.name: getattr(sys.modules[f.module], f.name) for f in MEGATRON_LM.functions} == patched, "once"


@pytest.mark.parametrize("function", MEGATRON_LM.functions, ids=str)
@pytest.mark.parametrize("damage", ["missing", "other parameters"])
def test_an_unknown_upstream_is_refused_as_a_whole(
    tmp_path: Path, in_process: Any, function: upstream.Function, damage: str
) -> None:
    in_process(megatron_lm(tmp_path), "megatron.training.training")
    if damage == "missing":
        delattr(sys.modules[function.module], function.name)
    else:
        setattr(sys.modules[function.module], function.name, lambda other: other)
    with pytest.raises(UpstreamError) as caught:
        patch(MEGATRON_LM, replacements(MEGATRON_LM))
    assert str(function) in str(caught.value) and "Megatron core 0.12 to 0.20" in str(caught.value)
    others = [f for f in MEGATRON_LM.functions if f is not function]
    assert not any(hasattr(getattr(sys.modules[f.module], f.name), "pathswitch_patch") for f in others)


def test_megatron_deepspeed_and_bridge(tmp_path: Path, in_process: Any) -> None:
    (tmp_path / "megatron" / "bridge" / "training").mkdir(parents=True)
    for folder in ("megatron", "megatron/bridge", "megatron/bridge/training"):
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "megatron" / "training.py").write_text(
        functions(get_optimizer_param_scheduler="optimizer", train_step=STEP)
        + functions(load_checkpoint="model, optimizer, opt_param_scheduler, load_arg='load', strict=True")
        + functions(save_checkpoint="iteration, model, optimizer, opt_param_scheduler")
    )
    (tmp_path / "megatron" / "bridge" / "training" / "optim.py").write_text(
        functions(_get_scheduler="optimizer_config, scheduler_config, optimizer")
    )
    modules = in_process(tmp_path, "megatron.training", "megatron.bridge.training.optim")
    assert [upstream.upstream_of(module) for module in modules] == [MEGATRON_DEEPSPEED, MEGATRON_BRIDGE]
    for target in (MEGATRON_DEEPSPEED, MEGATRON_BRIDGE):
        patch(target, replacements(target))
    assert modules[1]._get_scheduler(1, 2, optimizer=3)[0] == "replaced"


def test_a_megatron_lm_is_no_megatron_deepspeed(tmp_path: Path, in_process: Any) -> None:
    package, training = in_process(megatron_lm(tmp_path), "megatron.training", "megatron.training.training")
    assert upstream.upstream_of(package) is None and upstream.upstream_of(training) is MEGATRON_LM
    assert len({target.module for target in UPSTREAMS}) == 3


NAMES = [f.name for f in MEGATRON_LM.functions if f.module == "megatron.training.training"]


def test_environment_alone_activates(tmp_path: Path, plan: Path) -> None:
    code = SCRIPT.format(dot=".training", names=NAMES)
    result = run(megatron_lm(tmp_path / "lm"), code, plan)
    lines = result.stdout.splitlines()
    assert [f"{name} True" for name in NAMES] == [line for line in lines if line.split()[0] in NAMES], result.stderr
    (said,) = [line for line in lines if line.startswith("pathswitch: patched")]
    assert all(f"{f.module}.{f.name}" in said for f in MEGATRON_LM.functions), "logged by name"


def test_without_the_variable_nothing_is_patched(tmp_path: Path) -> None:
    code = SCRIPT.format(dot=".training", names=NAMES)
    result = run(megatron_lm(tmp_path / "lm"), code)
    assert result.stdout.splitlines() == [*(f"{name} False" for name in NAMES), "finders 0", "hooks False"]


def test_explicit_launch_without_entry_points(tmp_path: Path, plan: Path) -> None:
    code = "import os; os.environ['x'] = 'y'\n" + SCRIPT.format(dot=".training", names=NAMES)
    import os

    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    try:
        result = run(megatron_lm(tmp_path / "lm"), code, plan, "-m", "pathswitch_megatron")
        control = run(tmp_path / "lm", code, plan)
    finally:
        del os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"]
    assert f"{NAMES[0]} True" in result.stdout and f"{NAMES[0]} False" in control.stdout


@pytest.mark.parametrize("launch", [(), ("-m", "pathswitch_megatron")], ids=["environment", "explicit"])
@pytest.mark.parametrize("fault", ["no such plan", "wrong plan", "unknown upstream"])
def test_refused_before_training(tmp_path: Path, plan: Path, launch: tuple[str, ...], fault: str) -> None:
    root = megatron_lm(tmp_path / "lm")
    if fault == "no such plan":
        plan = tmp_path / "none.toml"
    elif fault == "wrong plan":
        plan.write_text(plan.read_text().replace("max_lr", "maxlr"))
    else:
        training = root / "megatron" / "training" / "training.py"
        training.write_text(training.read_text().replace("def train_step", "def training_step"))
        (root / "megatron" / "training" / "__init__.py").write_text("from .training import training_step\n")
    result = run(root, "import torch\nimport megatron.training\nprint('trained')\n", plan, *launch)
    message = {
        "no such plan": "none.toml",
        "wrong plan": "max_lr",
        "unknown upstream": "train_step(opt_param_scheduler)",
    }
    assert result.returncode != 0 and "trained" not in result.stdout
    assert message[fault] in result.stderr.splitlines()[-1], result.stderr
    if launch:
        assert len(result.stderr.splitlines()) == 1 and result.returncode == 2


def test_explicit_launch_needs_a_script() -> None:
    command = [sys.executable, "-m", "pathswitch_megatron"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2 and "a training script and its arguments" in result.stderr


def test_megatron_imported_before_torch(tmp_path: Path, plan: Path) -> None:
    """Its modules import torch themselves: the finder is there before the module that matters is looked for."""
    code = textwrap.dedent("""
        import megatron.training
        print(getattr(megatron.training.training.train_step, "pathswitch_patch", False))
    """)
    result = run(megatron_lm(tmp_path / "lm"), code, plan)
    # megatron.training.training is being imported when it imports torch: too late to hook in, and said so.
    assert result.returncode != 0 and "is being imported already" in result.stderr
