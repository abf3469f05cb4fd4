"""From what the command line is given to what is examined; what is wrong with it is a finding like others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pathswitch.config import PlanFile, load_plan_file
from pathswitch.errors import ConfigError, RunError
from pathswitch.launch.doctor.findings import Finding, Subject, problem
from pathswitch.launch.doctor.programs import Programs
from pathswitch.launch.hosts import Host, first_hosts, read_hostfile
from pathswitch.launch.spec import JobSpec, job_specs, load_spec
from pathswitch.launch.submit import read_ds_config, rendered
from pathswitch.run_folder import PLAN_FILE

# Stands for the run folder where none is given.
UNNAMED_RUN = "run"


@dataclass(frozen=True)
class Request:
    """The arguments of ``pathswitch doctor``."""

    plan_path: Path | None = None
    """Without it, the plan is the run folder's."""
    run: Path | None = None
    hostfile: Path | None = None
    """In place of the plan's."""

    def subject(self, environ: Mapping[str, str], seconds: float) -> tuple[Subject, list[Finding]]:
        """Return what is examined, and what is wrong with the plan's [launch] or the hostfile.

        Args:
            environ: the variables that jobs would inherit.
            seconds: how long the examination may take.

        Raises:
            ConfigError: the plan cannot be read.
        """
        plan = self._plan()
        findings: list[Finding] = []
        specs: tuple[JobSpec, ...] = ()
        hosts: tuple[Host, ...] = ()
        try:
            specs = self._specs(plan)
            hosts = self._hosts(plan, specs)
        except ConfigError as error:
            findings.append(problem("plan", f"{error.where}: {error.given!r}", f"allowed: {error.allowed}"))
        except RunError as error:
            findings.append(problem("plan", str(error), "pathswitch submit PLAN.toml --out RUN"))
        # A run is known by the one name that its jobs have, from wherever it is looked at.
        run = self.run and self.run.resolve()
        return Subject(Programs(environ, seconds), plan, specs, run, hosts), findings

    def _plan(self) -> PlanFile | None:
        path = self.plan_path
        if path is None and self.run is not None and (self.run / PLAN_FILE).is_file():
            path = self.run / PLAN_FILE
        if path is None:
            return None
        plan = load_plan_file(path)
        if self.hostfile is None:
            return plan
        changes = {"kind": "hostfile", "hostfile": str(self.hostfile.absolute())}
        return plan.model_copy(update={"launch": plan.launch.model_copy(update=changes)})

    def _specs(self, plan: PlanFile | None) -> tuple[JobSpec, ...]:
        """Return the jobs that the plan describes, or those that the run has been submitted with."""
        if plan is None:
            return ()
        if self.plan_path is not None:
            base = self.plan_path.parent
            ds_config = read_ds_config(plan, base)
            specs = tuple(job_specs(plan, base, self.run or base / UNNAMED_RUN, ds_config=ds_config))
            rendered(specs, ds_config)  # raises what submission would raise
            return specs
        assert self.run is not None
        return tuple(load_spec(file) for file in sorted(self.run.glob("*/*/job.json")))

    def _hosts(self, plan: PlanFile | None, specs: tuple[JobSpec, ...]) -> tuple[Host, ...]:
        file = self.hostfile
        if file is None and plan is not None and plan.launch.hostfile is not None:
            base = specs[0].working_folder if specs else self.plan_path.parent if self.plan_path else self.run or ""
            file = Path(base, plan.launch.hostfile)
        if file is None:
            return ()
        hosts = read_hostfile(file)
        for spec in specs:
            first_hosts(file, spec.nodes, spec.gpus_per_node)
        return hosts
