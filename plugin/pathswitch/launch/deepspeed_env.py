"""What DeepSpeed's runner hands to other hosts, written so that it arrives there unchanged.

The runner writes variables and arguments into a line that pdsh expands and a shell on the host reads, half quoted.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from pathswitch.errors import ConfigError

DEFAULT_NAME = ".deepspeed_env"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_PLAIN = re.compile(r"[A-Za-z0-9_@+=:,./-]*")  # neither the runner nor pdsh nor the shell touches it


def user_lines(home: Path, working_folder: Path, name: str = DEFAULT_NAME) -> dict[str, str]:
    """Return the variables of the user's own files, in DeepSpeed's order, as they are written there.

    Raises:
        ConfigError: a line is not ``NAME=value``.
    """
    variables: dict[str, str] = {}
    for file in dict.fromkeys(folder / name for folder in (home, working_folder)):
        if not file.is_file():
            continue
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            variable, equals, value = line.partition("=")
            if not equals or not _VARIABLE.fullmatch(variable.strip()):
                raise ConfigError(f"{file}, line {number}", given=line, allowed="NAME=value, as DeepSpeed reads it")
            variables[variable.strip()] = value
    return variables


def env_file(user: Mapping[str, str], job: Mapping[str, str]) -> str:
    """Return the text of an environment file for pdsh: the user's variables as they are, and the job's over them.

    Raises:
        ConfigError: a variable of the job cannot be handed on.
    """
    variables = dict(user) | {name: _quoted(name, value) for name, value in job.items()}
    return "".join(f"{name}={value}\n" for name, value in variables.items())


def check_variables(variables: Mapping[str, str]) -> None:
    """Raise ConfigError unless every variable has a proper name and a value of one line."""
    for name, value in variables.items():
        if not _VARIABLE.fullmatch(name):
            allowed = "a name of letters, digits and _"
            raise ConfigError("environment of the job", given=name, allowed=allowed)
        if re.search(r"[\n\r\0]", value):
            allowed = "one line: DeepSpeed's environment file cannot hold more"
            raise ConfigError(f"environment of the job, {name}", given=value, allowed=allowed)


def _quoted(name: str, value: str) -> str:
    check_variables({name: value})
    if _PLAIN.fullmatch(value):
        return value
    # The runner puts it between double quotes, and escapes nothing: they are closed at once.
    return f'"{pdsh_word(value)}"'


def pdsh_word(word: str) -> str:
    """Quote a word for the shell behind pdsh, which replaces %h, %u, %n and %%."""
    return shlex.quote(word).replace("%", "%%")


def runner_argument(argument: str) -> str:
    """Return an argument of the training script as the runner must get it for pdsh.

    It is the runner that quotes an argument with a space, with double quotes, escaping nothing but those in it.
    """
    if " " not in argument:
        return pdsh_word(argument)
    return re.sub(r"([\\$`])", r"\\\1", argument).replace("%", "%%")
