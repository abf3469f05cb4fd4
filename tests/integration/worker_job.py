"""Worker: jobs that save and end by themselves, on two ranks: at forks, at the end of a path, and asked to stop.

Only rank 1 gets signals, and always from itself, at a known place; rank 0 alone looks for the stop file.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.pipe import LayerSpec, PipelineModule
from harness import WIDTH, arguments, barrier, config, engine_of, finish, refused
from worker_matrix import weights

from pathswitch.checkpoint import committed_checkpoints, read_manifest
from pathswitch.integrations import job_control, stop_signals

Record = dict[str, Any]
Action = Callable[[Any], object]


def job(folder: Path, *settings: Any, path: str = "main", save_dir: str = "{path}", **section: Any) -> Record:
    """Return a ds_config whose job saves into a folder."""
    return config(*settings, path=path) | {"pathswitch": {"job": {"save_dir": f"{folder}/{save_dir}", **section}}}


def send(*signals: signal.Signals) -> None:
    if dist.get_rank() == 1:
        for signum in signals:
            os.kill(os.getpid(), signum)


def new_engine(settings: Record) -> Any:
    """Make an engine of a job that nobody has asked to stop yet."""
    stop_signals.release()
    stop_signals._received = 0
    return engine_of(settings)


def step(engine: Any, inside: Action | None = None) -> None:
    """Run one step on the samples that are its number's; ``inside`` it, before its last micro-step, do something."""
    count = engine.gradient_accumulation_steps()
    for part in range(count):
        if inside is not None and part == count - 1:
            inside(engine)
        seed = 2 * (engine.global_steps * count + part) + dist.get_rank()
        inputs = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(seed))
        loss = engine(inputs.to(next(engine.module.parameters()).dtype))
        engine.backward(loss)
        engine.step()


def train(engine: Any, most: int = 20, do: dict[int, Action] | None = None, after: Action | None = None) -> Record:
    """Train until the job ends, or for ``most`` steps; return how that went.

    ``do`` are things to do in the steps that follow that many tries, ``after`` what the script does behind each step.
    """
    code: object = "not ended"
    try:
        while engine.global_steps < most:
            step(engine, (do or {}).get(engine.global_steps))
            if after is not None:
                after(engine)
    except SystemExit as end:
        code = end.code
    barrier()
    return {"code": code, "step": engine.lr_scheduler.last_epoch, "tries": engine.global_steps}


def saved(folder: Path) -> dict[str, int]:
    """Return the committed checkpoints with their steps."""
    return {path.name: manifest.step for path, manifest in reversed(committed_checkpoints(folder))}


def interrupted(out: Path, stage: int, dtype: str, gas: int) -> Record:
    """Stop inside a step, go on from there to the end, and compare with a job that was never stopped."""
    folder = out / f"stage{stage}{dtype}{gas}"
    whole = engine_of(config(stage, dtype, gas))
    train(whole, 12)
    main = new_engine(job(folder, stage, dtype, gas))
    record: Record = {"stopped": train(main, do={5: lambda _: send(signal.SIGUSR2)}), "saved": saved(folder / "main")}
    resumed = new_engine(job(folder, stage, dtype, gas))
    resumed.load_checkpoint(folder / "main")
    record["ended"], record["saved in the end"] = train(resumed), saved(folder / "main")
    record["same"] = all(map(torch.equal, weights(resumed), weights(whole)))
    return record


def branch(out: Path) -> Record:
    """A branch ends by itself, and started again it has no step left; without exit_at_end it goes too far."""
    folder = out / "branch"
    train(new_engine(job(folder)))
    engine = new_engine(job(folder, path="v1"))
    engine.load_checkpoint(folder / "main", tag="global_step4")
    record: Record = {"ended": train(engine), "saved": saved(folder / "v1")}
    again = new_engine(job(folder, path="v1"))
    again.load_checkpoint(folder / "v1")
    record["again"], record["latest"] = train(again), (folder / "v1" / "latest").read_text()
    goes_on = new_engine(job(folder, path="v1", save_dir="goes_on", exit_at_end=False))
    goes_on.load_checkpoint(folder / "main", tag="global_step4")
    record["goes on"], record["its end"] = refused(lambda: train(goes_on)), saved(folder / "goes_on")
    record["another path's folder"] = refused(lambda: new_engine(job(folder, path="v1", save_dir="main")))
    return record


def while_saving(out: Path) -> Record:
    """Signals while rank 1 writes the checkpoint of a fork, slowly, and more of them while it writes the last one."""
    engine = new_engine(job(out / "while_saving"))
    writer, write = engine.checkpoint_engine, engine.checkpoint_engine.save

    def slow_write(state: Any, path: Any) -> None:
        send(signal.SIGUSR2, signal.SIGTERM)
        time.sleep(0.2)
        write(state, path)
        send(signal.SIGTERM, signal.SIGTERM)

    writer.save = slow_write
    return {"stopped": train(engine), "saved": saved(out / "while_saving" / "main")}


def stop_file(out: Path) -> Record:
    """The stop file appears inside a step; only rank 0 looks for it."""
    name, folder, exists, looks = out / "stop", out / "stop_file", os.path.exists, []

    def watched_exists(path: Any) -> bool:
        looks.append(str(path))
        return exists(path)

    os.environ[job_control.STOP_FILE_VARIABLE] = str(name)
    os.path.exists = watched_exists
    job_control.STOP_FILE_SECONDS = 0.0
    engine = new_engine(job(folder))
    record = {"stopped": train(engine, do={2: lambda _: dist.get_rank() or name.touch()})}
    os.path.exists = exists
    del os.environ[job_control.STOP_FILE_VARIABLE]
    return record | {"saved": saved(folder / "main"), "looks": looks.count(str(name))}


def client_state(out: Path) -> Record:
    """A script with a client state, on rank 0 alone, makes its saves itself; a trainer tells the job its state."""
    folder = out / "client_state"

    def save(engine: Any) -> None:
        if engine.global_steps % 3 == 0:
            state = {"epoch": engine.global_steps} if dist.get_rank() == 0 else {}
            engine.save_checkpoint(folder / "main", client_state=state)

    def stop(_: Any) -> None:
        send(signal.SIGTERM)

    stopped = train(new_engine(job(folder)), do={3: stop}, after=save)
    record: Record = {"stopped": stopped, "saved": saved(folder / "main")}
    resumed = new_engine(job(folder))
    _, state = resumed.load_checkpoint(folder / "main")
    record["epoch"], record["resumed"] = state["epoch"], train(resumed, do={6: stop}, after=save)
    record["ended"] = train(loaded(new_engine(job(folder)), folder / "main"), after=save)
    trainer = new_engine(job(out / "trainer"))
    trainer.pathswitch_checkpoints.client_state = lambda: {"epoch": trainer.lr_scheduler.last_epoch}
    record["trainer"] = train(trainer, do={4: stop})
    record["trainer's"] = [
        engine_of(config()).load_checkpoint(out / "trainer" / "main", tag=tag)[1]["epoch"]
        for tag in ("global_step4", "global_step5")
    ]
    return record


def loaded(engine: Any, folder: Path) -> Any:
    engine.load_checkpoint(folder)
    return engine


def saved_twice(out: Path) -> Record:
    """What the job has saved is not saved again by the script, unless it would be something else."""
    record: Record = {}

    def script(case: str) -> Action:
        def save(engine: Any) -> None:
            if engine.global_steps == 4:
                before = read_manifest(out / case / "main" / "global_step4").digest
                barrier()
                if case == "a number was drawn" and dist.get_rank() == 1:
                    torch.rand(1)
                state = {"tensor": torch.ones(2)} if case == "a client state" else {}
                engine.save_checkpoint(out / case / ("elsewhere" if case == "another folder" else "main"), None, state)
                record[case] = read_manifest(out / case / "main" / "global_step4").digest == before

        return save

    for case in ("the same", "a number was drawn", "a client state", "another folder"):
        train(new_engine(job(out / case)), 5, after=script(case))
    record["elsewhere"] = list(saved(out / "another folder" / "elsewhere"))
    return record


def skipped_updates(out: Path) -> Record:
    """Fp16: overflows before a fork, right behind it, and while the job is asked to stop."""
    get_accelerator().is_fp16_supported = lambda: True
    settings = job(out / "fp16")
    settings["fp16"] = {"enabled": True, "initial_scale_power": 8, "hysteresis": 1, "loss_scale_window": 1000}

    def scale(power: int, *signals: signal.Signals) -> Action:
        def set_scale(engine: Any) -> None:
            engine.optimizer.loss_scaler.cur_scale = 2.0**power
            send(*signals)

        return set_scale

    too_much, right = scale(40), scale(8)
    do = {1: too_much, 2: right, 5: too_much, 6: scale(40, signal.SIGUSR2)}
    engine = new_engine(settings)
    record: Record = {"stopped": train(engine, do=do), "skipped": engine.skipped_steps}
    record["saved"] = saved(out / "fp16" / "main")
    resumed = loaded(new_engine(settings), out / "fp16" / "main")
    return record | {"resumed": train(resumed, 9, {7: right}), "saved in the end": saved(out / "fp16" / "main")}


def decoupled_writer(out: Path) -> Record:
    settings = job(out / "decoupled", 0, "bf16")
    settings["checkpoint"] = {"writer": {"type": "python", "decoupled": True, "data_parallel": "replica"}}
    engine = new_engine(settings)
    process = engine.checkpoint_engine.ckpt_process

    def stop(_: Any) -> None:
        send(signal.SIGTERM)
        if process is not None:
            os.kill(process.pid, signal.SIGTERM)
            os.kill(process.pid, signal.SIGUSR2)

    record = {"stopped": train(engine, do={5: stop}), "saved": saved(out / "decoupled" / "main")}
    engine.checkpoint_engine.cleanup()
    return record


def pipeline(out: Path) -> Record:
    torch.manual_seed(3)
    layers = [LayerSpec(torch.nn.Linear, WIDTH, WIDTH) for _ in range(4)]
    model = PipelineModule(layers, num_stages=2, loss_fn=lambda outputs, labels: (outputs - labels).square().mean())
    stop_signals.release()
    stop_signals._received = 0
    settings = job(out / "pipeline", 1, "fp32", 2)
    engine = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=settings)[0]

    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            if engine.global_steps == 5:
                send(signal.SIGUSR2)
            yield torch.ones(2, WIDTH), torch.zeros(2, WIDTH)

    code: object = "not ended"
    try:
        while engine.global_steps < 12:
            engine.train_batch(batches())
    except SystemExit as end:
        code = end.code
    barrier()
    return {"code": code, "step": engine.global_steps, "saved": saved(out / "pipeline" / "main")}


def _announce(case: str) -> None:
    """Begin a case's part of the output, in one piece: both ranks write into it."""
    barrier()
    if dist.get_rank() == 0:
        sys.stdout.flush()
        os.write(1, f"\ncase {case}\n".encode())


def main() -> None:
    out = arguments()
    record: Record = {}
    for stage, dtype, gas in ((0, "fp32", 1), (1, "fp32", 3), (2, "bf16", 1), (3, "bf16", 2)):
        record[f"{stage} {dtype} {gas}"] = interrupted(out, stage, dtype, gas)
    for case in (branch, while_saving, stop_file, client_state, saved_twice, skipped_updates, decoupled_writer):
        _announce(case.__name__)
        record[case.__name__] = case(out)
    _announce("pipeline")
    record["pipeline"] = pipeline(out)  # last: DeepSpeed keeps its process grid for the engines that follow
    sys.stdout.flush()
    finish(record, out)


if __name__ == "__main__":
    main()
