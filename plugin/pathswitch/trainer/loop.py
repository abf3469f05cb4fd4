"""Train one path from its parent's checkpoint to its end, evaluate and export its release, record its completion."""

from __future__ import annotations

import fcntl
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
import torch.distributed as dist

from pathswitch.atomic import write_text_atomic
from pathswitch.config import PlanFile, build_plan
from pathswitch.data import Prepared, SampleStream, load_prepared, test_windows
from pathswitch.errors import RunError
from pathswitch.run_folder import PathFolder, RunFolder, tag
from pathswitch.trainer.engine import build_engine, device, llama_config, load, release_weights
from pathswitch.trainer.evaluate import evaluate
from pathswitch.trainer.export import export_release, release_digest
from pathswitch.trainer.samples import path_stream
from pathswitch.versions import Path as TrainingPath
from pathswitch.versions import Plan
from pathswitch.versions.ledger import run_ledger
from pathswitch.versions.records import EvaluationRecord, ReleaseRecord

LOCK_ATTEMPTS = 5


@dataclass(frozen=True)
class Job:
    """One path on one rank."""

    folder: RunFolder
    plan_file: PlanFile
    plan: Plan
    path: TrainingPath
    data: Prepared
    rank: int
    world_size: int
    on_damage: str | None = None

    @property
    def files(self) -> PathFolder:
        """The files of this path."""
        return self.folder.path(self.path)

    @property
    def is_first_rank(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def saves_regularly(self, step: int) -> bool:
        """Return whether the plan wants a checkpoint at this step; at forks and at its end a job saves by itself."""
        every = self.plan_file.train.save_every_steps if self.plan_file.train else None
        return every is not None and step % every == 0


def open_job(out: Path, paradigm: str, name: str, on_damage: str | None = None) -> Job:
    """Return the job of this rank."""
    folder = RunFolder(out)
    plan_file = folder.plan_file()
    plan = build_plan(plan_file)
    path = plan.path(name, paradigm)  # type: ignore[arg-type]
    data = load_prepared(folder.data)
    return Job(folder, plan_file, plan, path, data, dist.get_rank(), dist.get_world_size(), on_damage)


def train_path(job: Job) -> None:
    """Train, save, evaluate and release one path; done already, it only completes what is missing.

    Raises:
        PathSwitchError: the plan, the data and the checkpoints disagree, or another process trains this path.
    """
    with _only_process(job):
        _seed_generators(_seed(job))
        stream = path_stream(job.plan_file, job.path, job.data)
        engine = build_engine(job.plan_file, job.folder, job.path, job.data.tokenizer.vocab_size, job.on_damage)
        engine.pathswitch_checkpoints.client_state = lambda: _client_state(job, engine.lr_scheduler.last_epoch)
        step = load(engine, job.folder, job.path, lambda state, step: _check_data(job, state, step))
        with _metrics_file(job, step) as metrics:
            _train(job, engine, stream, step, metrics)
        if job.path.release is not None:
            _evaluate(job, engine)
            _release(job, engine)
        if job.is_first_rank:
            _write_completion(job)


def _train(job: Job, engine: Any, stream: SampleStream, start_step: int, metrics: IO[str] | None) -> None:
    where, micro = device(), engine.train_micro_batch_size_per_gpu()
    loss_sum = torch.zeros((), device=where)
    started = 0.0

    def record() -> None:
        """Note a step before anything is saved: whoever goes on from a checkpoint needs the lines of all its steps."""
        dist.all_reduce(loss_sum)
        if metrics is None:
            return
        line = {
            "step": engine.lr_scheduler.last_epoch - 1,
            "lr": engine.lr_scheduler.get_last_update_lr()[0],
            "loss": loss_sum.item() / (job.world_size * engine.gradient_accumulation_steps()),
            "grad_norm": float(engine.get_global_grad_norm() or 0.0),
            "seconds": time.perf_counter() - started,
        }
        metrics.write(json.dumps(line) + "\n")

    engine.pathswitch_job.before_save = record
    engine.train()
    for step in range(start_step, job.path.end_step):
        started = time.perf_counter()
        batch = torch.from_numpy(stream.batch(step, job.rank, job.world_size)).to(where)
        loss_sum.zero_()
        for part in torch.split(batch, micro):
            loss = engine(part[:, :-1], part[:, 1:])
            engine.backward(loss)
            loss_sum += loss.detach()
            engine.step()
        if job.saves_regularly(step + 1):
            state = _client_state(job, step + 1)
            engine.save_checkpoint(str(job.files.checkpoints), tag=tag(step + 1), client_state=state)


def _client_state(job: Job, step: int) -> dict[str, Any]:
    """Return what a checkpoint must agree on with whoever goes on from it: the text it has seen, and the seed."""
    pooled = job.plan_file.data is not None and job.plan_file.data.split == "iid"
    # Mixed order: pre-training from scratch draws from all of its text from the first step on.
    furthest_step = job.path.end_step if job.path.paradigm == "ptfs" else step
    seen = job.plan.versions if pooled else job.plan.begun(furthest_step)
    digests = {version.name: job.data.version_digest(version.name) for version in seen}
    return {"pathswitch_data": digests, "pathswitch_seed": _seed(job)}


def _check_data(job: Job, state: dict[str, Any], step: int) -> None:
    """Refuse a checkpoint that saw other text or another order: resuming needs no data state but the step."""
    expected = _client_state(job, step)
    for key, value in expected.items():
        if state.get(key) != value:
            raise RunError(f"the checkpoint of step {step} holds {key} {state.get(key)!r}, this run {value!r}")


def _seed(job: Job) -> int:
    assert job.plan_file.train is not None
    return job.plan_file.train.seed


def _seed_generators(seed: int) -> None:
    """Seed the generators whose states are in every checkpoint; nothing is drawn from them here."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _evaluate(job: Job, engine: Any) -> None:
    """Measure the weights on every version's test text."""
    assert job.plan_file.data is not None
    results = {}
    for name in (version.name for version in job.plan.versions):
        engine.pathswitch_job.end_if_asked("it evaluates")
        inputs, targets = test_windows(job.data.test_tokens(name), job.plan_file.data.seq_len)
        result = evaluate(
            engine.module,
            (inputs, targets),
            n_bytes=job.data.test_bytes(name),
            batch_size=max(8, engine.train_micro_batch_size_per_gpu()),
            rank=job.rank,
            world_size=job.world_size,
            all_reduce=dist.all_reduce,
        )
        results[name] = {
            "nll_nats": result.nll_nats,
            "tokens": result.tokens,
            "n_bytes": result.n_bytes,
            "perplexity": result.perplexity,
            "bits_per_byte": result.bits_per_byte,
        }
    if job.is_first_rank:
        content = {"step": job.path.end_step, "test_sets": results}
        write_text_atomic(job.files.evaluation, json.dumps(content, indent=1) + "\n")
        perplexity = {name: result["perplexity"] for name, result in results.items()}
        run_ledger(job.folder.out).append(EvaluationRecord(**_origin(job, engine), perplexity=perplexity))
    if engine.monitor.enabled:
        samples = engine.global_samples
        engine.monitor.write_events(
            [(f"Test/perplexity/{name}", result["perplexity"], samples) for name, result in results.items()]
        )


def _release(job: Job, engine: Any) -> None:
    weights = release_weights(engine)
    if job.is_first_rank:
        config = llama_config(job.plan_file, job.data.tokenizer.vocab_size)
        metadata = {"version": job.path.name, "paradigm": job.path.paradigm, "step": str(job.path.end_step)}
        export_release(
            weights,
            config,
            job.folder.data / "tokenizer.model",
            job.files.release,
            metadata=metadata,
            eos_token_id=job.data.tokenizer.eos_id,
        )
        release = job.files.release
        record = ReleaseRecord(
            folder=release.relative_to(job.folder.out).as_posix(),
            **_origin(job, engine),
            digest=release_digest(release),
        )
        run_ledger(job.folder.out).append(record)


def _origin(job: Job, engine: Any) -> dict[str, Any]:
    """Return what a record says about where a release or an evaluation comes from: this job's last checkpoint."""
    path, checkpoint = job.path, engine.pathswitch_checkpoints.parent
    return {"paradigm": path.paradigm, "path": path.name, "step": path.end_step, "checkpoint": checkpoint}


def _write_completion(job: Job) -> None:
    assert job.plan_file.tokens_per_step is not None
    seconds = sum(json.loads(line)["seconds"] for line in job.files.metrics.read_text().splitlines())
    record = {
        "paradigm": job.path.paradigm,
        "path": job.path.name,
        "start_step": job.path.start_step,
        "end_step": job.path.end_step,
        "seconds": seconds,
        "tokens_per_s": job.path.steps * job.plan_file.tokens_per_step / seconds if seconds else 0.0,
    }
    write_text_atomic(job.files.completion, json.dumps(record, indent=1) + "\n")


@contextmanager
def _metrics_file(job: Job, start_step: int) -> Iterator[IO[str] | None]:
    """Open the first rank's metrics for appending, without the lines of updates that are done again."""
    if not job.is_first_rank:
        yield None
        return
    metrics = job.files.metrics
    lines = metrics.read_text().splitlines(keepends=True) if metrics.is_file() else []
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < start_step]
    write_text_atomic(metrics, "".join(kept))
    with metrics.open("a", buffering=1) as file:
        yield file


@contextmanager
def _only_process(job: Job) -> Iterator[None]:
    """Hold the path's lock: ranks that outlived a killed launcher must not train beside their successors."""
    if not job.is_first_rank:
        yield
        return
    job.files.folder.mkdir(parents=True, exist_ok=True)
    with (job.files.folder / "lock").open("a+") as lock:
        for attempt in range(LOCK_ATTEMPTS):  # `pathswitch log` holds it for an instant to see whether it is free
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if attempt + 1 == LOCK_ATTEMPTS:
                    lock.seek(0)
                    message = f"{job.files.folder}: process {lock.read().strip()} is training this path"
                    raise RunError(message) from None
                time.sleep(0.1)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield
