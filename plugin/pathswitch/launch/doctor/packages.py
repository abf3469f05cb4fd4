"""Whether the ranks' interpreter has the packages that pathswitch declares, in the versions that it declares."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from collections.abc import Iterator
from importlib.metadata import Distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from pathswitch.errors import RunError
from pathswitch.launch.doctor import facts
from pathswitch.launch.doctor.findings import Finding, Subject, note, ok, problem

SHOWN = ("torch", "deepspeed", "megatron-core")
FACTS_SECONDS = 15.0


def check(subject: Subject) -> Iterator[Finding]:
    """Compare every installed version with pathswitch's own declaration."""
    distribution = importlib.metadata.distribution("pathswitch")
    required, optional = requirements(distribution)
    found = rank_versions(subject, ["pathswitch", *required, *optional])
    yield python_finding(subject, found["python"], distribution.metadata["Requires-Python"])
    yield pathswitch_finding(subject, found["pathswitch"], distribution.version)
    named = {name: range_ for name, range_ in {**required, **optional}.items() if name in SHOWN}
    for name, allowed in named.items():
        if name in required or found[name] is not None:
            yield package_finding(subject, name, found[name], allowed)
    yield from other_packages(subject, found, {name: required[name] for name in required if name not in named})
    yield command_finding(subject)


def requirements(distribution: Distribution) -> tuple[dict[str, SpecifierSet], dict[str, SpecifierSet]]:
    """Return what a distribution always needs, and what Megatron jobs need, by the packages' names."""
    declared = [Requirement(line) for line in distribution.requires or ()]

    def of(extra: str) -> dict[str, SpecifierSet]:
        return {r.name: r.specifier for r in declared if r.marker is None or r.marker.evaluate({"extra": extra})}

    required = of("")
    return required, {name: allowed for name, allowed in of("megatron").items() if name not in required}


def rank_versions(subject: Subject, packages: list[str]) -> dict[str, str | None]:
    """Return the versions that the ranks' interpreter has.

    Raises:
        RunError: the interpreter cannot be run.
    """
    if subject.python == sys.executable:
        return facts.versions(packages)
    source = Path(facts.__file__).read_text(encoding="utf-8")
    program = f"{source.rpartition('if __name__')[0]}\nprint(MARK + json.dumps(versions({packages!r})))"
    try:
        output = subject.programs.run([subject.python, "-c", program], timeout=FACTS_SECONDS)
    except OSError as error:
        raise RunError(f"[launch] python: {subject.python!r} cannot be run ({error.strerror})") from None
    if output.code != 0:
        raise RunError(f"[launch] python: {subject.python!r} does not answer: {output.last_line}")
    versions: dict[str, str | None] = json.loads(output.stdout.rpartition(facts.MARK)[2])
    return versions


def python_finding(subject: Subject, version: str | None, allowed: str) -> Finding:
    """Report the interpreter."""
    found = f"{version} ({subject.python})"
    if version is not None and SpecifierSet(allowed).contains(version, prereleases=True):
        return ok("Python", found)
    return problem("Python", f"{found}; allowed: {allowed}", f"make the environment anew with a Python {allowed}")


def pathswitch_finding(subject: Subject, version: str | None, own: str) -> Finding:
    """Report which pathswitch the ranks import, and whether there are two of them."""
    install = f"{subject.python} -m pip install --force-reinstall --no-deps 'pathswitch=={own}'"
    if version != own:
        return problem("pathswitch", f"{version or 'missing'} in {subject.python}; this is {own}", install)
    places = sorted(
        {
            str(Path(str(distribution.locate_file(""))).resolve())
            for distribution in importlib.metadata.distributions(name="pathswitch")
        }
    )
    if len(places) > 1:
        found = f"{own}, installed {len(places)} times: {', '.join(places)}"
        return note("pathswitch", found, "uninstall all of them, and install one: pip uninstall pathswitch")
    return ok("pathswitch", f"{own} ({facts.package_folder()})")


def package_finding(subject: Subject, name: str, version: str | None, allowed: SpecifierSet) -> Finding:
    """Report one package."""
    if version is not None and allowed.contains(version, prereleases=True):
        return ok(name, version)
    todo = f"{subject.python} -m pip install '{name}{allowed}'"
    return problem(name, f"{version or 'missing'}; allowed: {allowed}", todo)


def other_packages(
    subject: Subject, found: dict[str, str | None], allowed: dict[str, SpecifierSet]
) -> Iterator[Finding]:
    """Report each of the other packages that does not fit, and all others together."""
    findings = [package_finding(subject, name, found[name], allowed[name]) for name in allowed]
    yield from (finding for finding in findings if finding.status != "ok")
    fitting = [f"{finding.name} {finding.found}" for finding in findings if finding.status == "ok"]
    yield ok("other packages", ", ".join(fitting) or "none")


def command_finding(subject: Subject) -> Finding:
    """Report whether ``deepspeed`` in a shell is the one of the ranks' interpreter."""
    command, folder = subject.which("deepspeed"), Path(subject.python).parent
    if command is None:
        todo = f'export PATH="{folder}:$PATH"   # only where your own scripts call `deepspeed`'
        return note("deepspeed command", "not on PATH", todo)
    if Path(command).parent.resolve() != folder.resolve():
        todo = f'export PATH="{folder}:$PATH"   # or call {folder}/deepspeed'
        return note("deepspeed command", f"{command}, which may be another environment's than {subject.python}", todo)
    return ok("deepspeed command", command)
