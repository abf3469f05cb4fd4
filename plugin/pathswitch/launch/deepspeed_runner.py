"""DeepSpeed's runner, without what it does to other jobs when it is asked to end.

On SIGTERM and SIGINT it runs ``pkill`` on all hosts, with a pattern that fits every DeepSpeed job of this interpreter:
the main path, and branches that share its hosts. The job's processes are ended by the job's id instead.
"""

from __future__ import annotations

from typing import Any

from deepspeed.launcher import runner
from deepspeed.launcher.multinode_runner import PDSHRunner


class QuietPdshRunner(PDSHRunner):  # type: ignore[misc]
    """Ends its own pdsh and nothing else."""

    def get_cmd(
        self, environment: dict[str, str], active_resources: Any
    ) -> tuple[list[str], list[str], dict[str, str]]:
        """Return pdsh's command line, and a command that does nothing instead of ``pkill``."""
        command, _, environment = super().get_cmd(environment, active_resources)
        return command, ["true"], environment


if __name__ == "__main__":
    runner.PDSHRunner = QuietPdshRunner
    runner.main()
