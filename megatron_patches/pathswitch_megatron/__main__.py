"""``torchrun ... -m pathswitch_megatron SCRIPT ARGS...``: run an unchanged training script under a plan."""

from __future__ import annotations

import os
import runpy
import sys

from pathswitch.errors import ConfigError, PathSwitchError
from pathswitch_megatron.activation import install
from pathswitch_megatron.job import job_from_environment


def main() -> None:
    """Run the script as if it had been launched itself; an error of the family is one line and exit code 2."""
    try:
        if len(sys.argv) < 2:
            raise ConfigError(
                "-m pathswitch_megatron", given="no script", allowed="a training script and its arguments"
            )
        job_from_environment()
        install()
        script, sys.argv = sys.argv[1], sys.argv[1:]
        sys.path.insert(0, os.path.dirname(os.path.abspath(script)))
        runpy.run_path(script, run_name="__main__")
    except PathSwitchError as error:
        print(f"pathswitch: error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
