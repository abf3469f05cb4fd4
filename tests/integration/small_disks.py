"""Small file systems of their own for tests of full and read-only disks; mounting them takes root."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_DISKS = "needs root, to mount small file systems of its own: run it as root"


@contextmanager
def small_disks(folder: Path) -> Iterator[dict[str, str]]:
    """Mount FULL_DISK, of 1 MiB, and READ_ONLY_DISK below a folder; yield the places of those that could be mounted."""
    mounted = {}
    for name, options in (("FULL_DISK", "size=1m"), ("READ_ONLY_DISK", "size=64k,ro")):
        place = folder / name
        place.mkdir(parents=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)]
        if os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0:
            mounted[name] = str(place)
    try:
        yield mounted
    finally:
        for place_name in mounted.values():
            subprocess.run(["umount", place_name], check=True)
