"""The commands; each loads its plan, calls one room, and prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from pathswitch import __version__
from pathswitch.cli.plan import plan_json, step_range
from pathswitch.cli.prepare import prepare_run
from pathswitch.config import PlanFile, build_plan, load_plan_file
from pathswitch.errors import ConfigError, PathSwitchError, choices
from pathswitch.versions import MAIN, PARADIGMS, Paradigm

app = typer.Typer(
    rich_markup_mode="markdown", no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False
)
kernels = typer.Typer(no_args_is_help=True, help="Compile the fused kernels, and show what is compiled.")
app.add_typer(kernels, name="kernels")
console = Console()

PlanArgument = Annotated[Path, typer.Argument(metavar="PLAN.toml", help="The plan file.")]
ParadigmOption = Annotated[str, typer.Option(help=f"One of {', '.join(PARADIGMS)}.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead.")]
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with its plan.toml.")]
KeyOption = Annotated[
    Path | None, typer.Option("--signing-key-file", metavar="FILE", help="The key that signs manifests.")
]
Runs = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders that `pathswitch run --out` wrote.")]


def main() -> None:
    """Run the command line; an error of the family is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except PathSwitchError as error:
        print(f"pathswitch: error: {error}", file=sys.stderr)
        sys.exit(2)


def _paradigm(name: str) -> Paradigm:
    if name not in PARADIGMS:
        raise ConfigError("--paradigm", given=name, allowed=choices(PARADIGMS, name))
    return name


def _print_json(content: Any) -> None:
    print(json.dumps(content, indent=1))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Ship LLM versions by learning-rate path switching."""
    if version:
        print(f"pathswitch {__version__}")
        raise typer.Exit


@app.command()
def plan(
    plan_path: PlanArgument,
    as_json: JsonOption = False,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png|svg", help="Draw the LR paths.")] = None,
) -> None:
    """Show every path's fork, decay and end step, and what each paradigm costs."""
    plan_file = load_plan_file(plan_path)
    resolved = build_plan(plan_file)
    if plot is not None:
        from pathswitch.report.plots import lr_paths

        lr_paths(resolved, plot, tokens_per_step=plan_file.tokens_per_step)
    if as_json:
        _print_json(plan_json(resolved, plan_file.tokens_per_step))
    else:
        from pathswitch.report.tables import plan_table

        console.print(plan_table(resolved, plan_file.tokens_per_step))


@app.command()
def lr(
    plan_path: PlanArgument,
    path: Annotated[str, typer.Option(help="main, or a version's name.")] = MAIN,
    steps: Annotated[str | None, typer.Option(metavar="A:B", help="Steps A .. B-1; the whole path if absent.")] = None,
    paradigm: ParadigmOption = "path_switching",
) -> None:
    """Print step,lr for every update, with full precision."""
    training_path = build_plan(load_plan_file(plan_path)).path(path, _paradigm(paradigm))
    first, end = step_range(steps, training_path.start_step, training_path.end_step)
    print("step,lr")
    for step in range(first, end):
        print(f"{step},{training_path.lr(step)!r}")


@app.command()
def run(
    plan_path: PlanArgument,
    out: Annotated[Path, typer.Option(help="The run folder.")],
    paradigm: ParadigmOption = "path_switching",
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the plan's [train] seed.")] = None,
    optimizer: Annotated[
        str | None, typer.Option(metavar="adamw|pathswitch", help="Instead of the plan's [train] optimizer.")
    ] = None,
    on_damage: Annotated[
        str | None, typer.Option(metavar="refuse|previous", help="previous: go back past damaged checkpoints.")
    ] = None,
) -> None:
    """Train a paradigm's paths under the deepspeed launcher; run again, it goes on where it stopped."""
    plan_file = with_seed(load_plan_file(plan_path), seed)
    if optimizer is not None:
        plan_file = with_optimizer(plan_file, optimizer)
    if on_damage not in (None, "refuse", "previous"):
        raise ConfigError("--on-damage", given=on_damage, allowed="refuse, previous")
    train(plan_file, plan_path.parent, out, _paradigm(paradigm), on_damage)
    console.print(f"{paradigm}: all paths of {plan_path} are trained in {out}", highlight=False)


def with_seed(plan_file: PlanFile, seed: int | None) -> PlanFile:
    """Return the plan with another [train] seed."""
    return plan_file if seed is None else _with_train(plan_file, "seed", seed)


def with_optimizer(plan_file: PlanFile, optimizer: str) -> PlanFile:
    """Return the plan with another [train] optimizer."""
    if optimizer not in ("adamw", "pathswitch"):
        raise ConfigError("--optimizer", given=optimizer, allowed="adamw, pathswitch")
    return _with_train(plan_file, "optimizer", optimizer)


def _with_train(plan_file: PlanFile, key: str, value: object) -> PlanFile:
    if plan_file.train is None:
        return plan_file
    return plan_file.model_copy(update={"train": plan_file.train.model_copy(update={key: value})})


def train(plan_file: PlanFile, base: Path, out: Path, paradigm: Paradigm, on_damage: str | None = None) -> None:
    """Prepare a plan's data and train one paradigm in the run folder ``out``."""
    from pathswitch.launch.paradigm import run_paradigm

    try:
        run_paradigm(plan_file, prepare_run(plan_file, base, out, paradigm), paradigm, console, on_damage)
    except KeyboardInterrupt:
        print("pathswitch: interrupted; run the same command again to go on", file=sys.stderr)
        raise typer.Exit(130) from None


@app.command()
def submit(
    plan_path: PlanArgument,
    out: Annotated[Path, typer.Option(help="The run folder.")],
    paradigm: ParadigmOption = "path_switching",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the jobs and what they cost, and stop.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead, with the text of every file.")] = False,
) -> None:
    """Start every path of a plan as a job, as its [launch] says; again, only what is missing."""
    from pathswitch.cli.jobs import submit_plan

    plan_file = load_plan_file(plan_path)
    code = submit_plan(plan_path, plan_file, out, _paradigm(paradigm), dry_run=dry_run, yes=yes, as_json=as_json)
    raise typer.Exit(code)


@app.command()
def status(
    run_folder: RunArgument,
    watch: Annotated[bool, typer.Option("--watch", help="Show it again and again until all jobs have ended.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show where a run's jobs stand: step, LR, loss, last checkpoint, restarts, what each waits for and why."""
    from pathswitch.cli.jobs import show_status

    show_status(run_folder, watch=watch, as_json=as_json)


@app.command()
def cancel(
    run_folder: RunArgument,
    path: Annotated[str | None, typer.Argument(metavar="[PATH]", help="main, or a version; all if absent.")] = None,
    now: Annotated[bool, typer.Option("--now", help="Do not wait until the job has saved.")] = False,
) -> None:
    """Have a run's jobs, or one path's, save and end; `submit` goes on later."""
    from pathswitch.cli.jobs import cancel_run

    cancel_run(run_folder, path, now=now)


@app.command()
def megatron_args(
    plan_path: PlanArgument,
    path: Annotated[str, typer.Option(help="main, or a version's name.")] = MAIN,
    version: Annotated[
        str | None, typer.Option(help="The version whose data the main path trains on; the last if absent.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Print one job's arguments for Megatron, as lines for bash: a branch sees the main path's samples."""
    from pathswitch.launch.megatron import megatron_job

    job = megatron_job(plan_path.resolve(), load_plan_file(plan_path), path, version)
    if as_json:
        _print_json(job.as_json())
    else:
        print(job.as_shell())


@app.command()
def sweep(
    plan_path: PlanArgument,
    out: Annotated[Path, typer.Option(help="A folder; every max_lr gets a run folder in it.")],
    max_lr: Annotated[str, typer.Option(metavar="LR,LR,...", help="Maximum LRs to try.")],
    seed: Annotated[int | None, typer.Option(min=0, help="Instead of the plan's [train] seed.")] = None,
) -> None:
    """Choose the maximum LR: pre-train version 1 from scratch with each, and compare perplexities."""
    from pathswitch.cli.sweep import sweep_max_lr

    rows = sweep_max_lr(with_seed(load_plan_file(plan_path), seed), plan_path.parent, out, max_lr, train)
    console.print(rows)


@app.command()
def compare(runs: Runs, as_json: JsonOption = False) -> None:
    """Compare paradigms, for each [data] split of the runs: perplexity per version, the matrix, the cost."""
    from pathswitch.report.collect import collect
    from pathswitch.report.export import to_json
    from pathswitch.report.tables import comparison_tables

    comparisons = collect(runs)
    if as_json:
        _print_json(to_json(comparisons))
    else:
        console.print(comparison_tables(comparisons))


@app.command()
def log(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder with a ledger.")],
    as_json: JsonOption = False,
) -> None:
    """Show what a run has saved, newest first: checkpoints, forks, releases and perplexities."""
    from pathswitch.cli.log import log_command

    raise typer.Exit(log_command(folder, as_json, console))


@app.command()
def fork(
    run_folder: RunArgument,
    source: Annotated[str, typer.Argument(metavar="main@STEP|main@latest", help="The checkpoint at the fork step.")],
    to: Annotated[str, typer.Option(help="The branch: a version of the plan.")],
    reset_moments: Annotated[bool, typer.Option("--reset-moments", help="Adam's moments begin at zero.")] = False,
    beta2: Annotated[float | None, typer.Option(help="Adam's beta2 on the branch.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="On the branch, where there is any.")] = None,
    gradient_clipping: Annotated[float | None, typer.Option(help="On the branch; 0: none.")] = None,
    signing_key_file: KeyOption = None,
    verify: Annotated[str, typer.Option(metavar="full|sizes", help="What is compared before.")] = "full",
    into: Annotated[Path | None, typer.Option(help="A folder of checkpoints; the branch's own if absent.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be forked, and change nothing.")] = False,
) -> None:
    """Fork a branch: its first checkpoint is made of the main path's files, without copying them if possible."""
    from pathswitch.cli.fork import fork_branch, fork_policy

    policy = fork_policy(reset_moments, beta2, weight_decay, gradient_clipping)
    fork_branch(
        run_folder,
        source,
        to,
        policy,
        verify=verify,
        key_file=signing_key_file,
        into=into,
        dry_run=dry_run,
        console=console,
    )


@app.command()
def gc(
    run_folder: RunArgument,
    keep_last: Annotated[int, typer.Option(min=1, help="Resume points to keep of every path.")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and change nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune checkpoints that no path, fork or release needs, and what killed jobs have left behind."""
    from pathswitch.cli.checkpoints import collect_garbage, show_garbage

    garbage = collect_garbage(run_folder, keep_last, dry_run=dry_run)
    if as_json:
        _print_json(garbage.as_json())
    else:
        show_garbage(garbage, console, dry_run=dry_run)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="PATH", help="A checkpoint, or a folder or run that holds some.")],
    mode: Annotated[str, typer.Option(metavar="full|sizes", help="Compare digests, or sizes alone.")] = "full",
    signing_key_file: KeyOption = None,
    state: Annotated[bool, typer.Option("--state", help="Unpickle shards and compare the optimizer state.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Verify checkpoints against their manifests; exit code 1 if one is damaged or was never committed."""
    from pathswitch.cli.checkpoints import show_verified, verify_all

    results = verify_all(folder, mode, signing_key_file, state=state)
    if as_json:
        _print_json([result.as_json() for result in results])
    else:
        show_verified(results, console)
    raise typer.Exit(int(any(result.findings for result in results)))


@app.command()
def adopt(
    folder: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A folder that DeepSpeed or Megatron wrote.")],
    step: Annotated[int | None, typer.Option(min=0, help="Updates behind it, if it does not say so.")] = None,
    path: Annotated[str | None, typer.Option(help="The path that it is of, if it does not say so; else main.")] = None,
    plan: Annotated[Path | None, typer.Option(metavar="PLAN.toml", help="Its plan, if it holds no schedule.")] = None,
    signing_key_file: KeyOption = None,
) -> None:
    """Commit a checkpoint that stock DeepSpeed, Megatron-LM or pathswitch 0.1.0 wrote; its states are unpickled."""
    from pathswitch.cli.checkpoints import adopt_folder

    adopt_folder(folder, step, path, plan, signing_key_file, console)


@app.command()
def doctor(
    plan_path: Annotated[Path | None, typer.Argument(metavar="[PLAN.toml]", help="The plan file.")] = None,
    run: Annotated[Path | None, typer.Option(metavar="RUN", help="The run folder; it may not exist yet.")] = None,
    hostfile: Annotated[Path | None, typer.Option(metavar="FILE", help="In place of the plan's hostfile.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Check the environment that jobs would run in, and say what to do; exit code 1 if there is a problem."""
    from pathswitch.cli.doctor import doctor_command

    raise typer.Exit(doctor_command(plan_path, run, hostfile, as_json, console))


@app.command()
def report(
    runs: Runs,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE.html", help="Default: report.html in the first run folder.")
    ] = None,
) -> None:
    """Write one self-contained HTML page with a section per [data] split; figures beside it as PNG and SVG."""
    from pathswitch.report.html import write_report

    page = write_report(runs, out or runs[0] / "report.html")
    console.print(f"report: {page}", highlight=False, soft_wrap=True)


@kernels.command("build")
def build_kernels(
    cpu: Annotated[bool, typer.Option("--cpu", help="For the CPU alone.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="For CUDA alone.")] = False,
    isa: Annotated[str | None, typer.Option(metavar="avx512|avx2|portable", help="The best here if absent.")] = None,
    arch: Annotated[str | None, typer.Option(metavar="sm_90", help="One CUDA architecture; all if absent.")] = None,
) -> None:
    """Compile the kernels that are not there yet, before a job has to."""
    from pathswitch.cli.kernels import build

    build(cpu=cpu, cuda=cuda, isa=isa, arch=arch, console=console)


@kernels.command("status")
def kernels_status(as_json: JsonOption = False) -> None:
    """Show what is compiled, what there is to compile with, and what a run on this machine would use."""
    from pathswitch.cli.kernels import show_status

    show_status(as_json=as_json, console=console)
