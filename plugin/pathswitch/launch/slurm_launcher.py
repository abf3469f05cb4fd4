"""How the ranks of a SLURM job are started on its nodes: by srun itself, or by torchrun or deepspeed on each node."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pathswitch.atomic import write_text_atomic
from pathswitch.launch import slurm
from pathswitch.launch.launcher import end_processes_here, module_or_script
from pathswitch.launch.local import job_environment
from pathswitch.launch.spec import JobSpec, launcher_words

# What each task of srun runs; its arguments follow. A signal that comes before the ranks have their handlers, or to a
# launcher between them and srun, must not kill: whoever is ignoring it hands that on to what it executes.
_IGNORING = 'trap "" {signal}; {rest}'
_RANK = (
    "export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS"
    ' LOCAL_WORLD_SIZE=$((SLURM_NTASKS / SLURM_NNODES)); exec "$@"'
)
_TORCHRUN = 'exec "$@"'
_DEEPSPEED = 'exec "$1" -m deepspeed.launcher.runner --node_rank "$SLURM_NODEID" "${@:2}"'


class SlurmLauncher:
    """Steps of one SLURM job, started by its batch script's agent."""

    def __init__(self, spec: JobSpec, job_id: str) -> None:
        self._spec, self._job_id = spec, job_id

    def command(self, training: Sequence[str]) -> list[str]:
        """Return the srun line: one task a rank, or one a node with a launcher in it."""
        spec, launch = self._spec, self._spec.launch
        tasks, options, script, words = spec.gpus_per_node, launcher_words(launch), _RANK, ["-u", *training]
        if launch.launcher == "torchrun":
            tasks, options, script, words = 1, [], _TORCHRUN, self._torchrun(training)
        elif launch.launcher == "deepspeed":
            tasks, options, script, words = 1, [], _DEEPSPEED, self._deepspeed(training)
        # --export: with sbatch's --export=NONE, srun would not hand the environment on either.
        srun = ["srun", "--export=ALL", "--kill-on-bad-exit=1", f"--nodes={spec.nodes}", f"--ntasks-per-node={tasks}"]
        srun += options
        if launch.cpus_per_task is not None:
            srun.append(f"--cpus-per-task={launch.cpus_per_task}")  # srun does not take it from the job any more
        script = _IGNORING.format(signal=launch.signal.removeprefix("SIG"), rest=script)
        return [*srun, *self._container(), "bash", "-c", script, "pathswitch", spec.python, *words]

    def environment(self) -> dict[str, str]:
        """Return this environment, with a node's cores shared out among its ranks, and where the ranks meet."""
        return {**job_environment(self._spec.gpus_per_node, os.environ), **self._meeting()}

    def _meeting(self) -> dict[str, str]:
        """Return the place on the job's first node, unless the environment says where."""
        port = str(self._spec.port)
        return {"MASTER_ADDR": os.environ.get("MASTER_ADDR") or self._hosts()[0], "MASTER_PORT": port}

    def ask_to_stop(self) -> None:
        """Send the job's signal to its steps."""
        slurm.signal_steps(self._job_id, self._spec.launch.signal)

    def failure(self) -> str | None:
        """Return None: SLURM ends the job of a node that is lost."""
        return None

    def end(self) -> list[str]:
        """End the job's steps, which outlive an srun that was killed, and what a node without slurmd does not end."""
        slurm.end_steps(self._job_id)
        return end_processes_here(self._spec)

    def _container(self) -> list[str]:
        """Return the options of srun, or the command, that put the ranks into their image."""
        container, folder, run = self._spec.launch.container, self._spec.working_folder, self._spec.run
        if container is None:
            return []
        mounts = [f"{run}:{run}", f"{folder}:{folder}", *container.mounts]
        if container.runtime == "pyxis":
            options = [f"--container-image={container.image}", f"--container-mounts={','.join(mounts)}"]
            return [*options, f"--container-workdir={folder}"]
        binds = [word for mount in mounts for word in ("--bind", mount)]
        return ["apptainer", "exec", "--nv", "--pwd", folder, *binds, container.image]

    def _torchrun(self, training: Sequence[str]) -> list[str]:
        spec, meeting = self._spec, self._meeting()
        # An id of this start alone: the ranks of one that was killed may still be there.
        start = f"{self._job_id}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"
        meet = ["--rdzv-backend", "c10d", "--rdzv-id", start]
        meet += ["--rdzv-endpoint", f"{meeting['MASTER_ADDR']}:{meeting['MASTER_PORT']}"]
        size = ["--nnodes", str(spec.nodes), "--nproc-per-node", str(spec.gpus_per_node)]
        return ["-m", "torch.distributed.run", *size, *meet, *launcher_words(spec.launch), *training]

    def _deepspeed(self, training: Sequence[str]) -> list[str]:
        spec, meeting = self._spec, self._meeting()
        hostfile = spec.files.folder / "hostfile"
        lines = [f"{host} slots={spec.gpus_per_node}" for host in self._hosts()]
        write_text_atomic(hostfile, "\n".join(lines) + "\n")
        meet = ["--master_addr", meeting["MASTER_ADDR"], "--master_port", meeting["MASTER_PORT"]]
        runner = ["--hostfile", str(hostfile), "--no_ssh", *meet, *launcher_words(spec.launch)]
        return [*runner, *module_or_script(training)]

    def _hosts(self) -> list[str]:
        return slurm.host_names(os.environ["SLURM_JOB_NODELIST"])
