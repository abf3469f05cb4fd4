"""What can be asked of a machine; its source is also sent through ssh, so it needs the standard library alone.

On another host it reads questions from stdin, one JSON object a line, and answers each on stdout behind ``MARK``: a
login shell may print lines of its own.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import Any

MARK = "pathswitch-doctor "
SERVE_SECONDS = 60
CONNECT_SECONDS = 3.0


def versions(packages: list[str]) -> dict[str, str | None]:
    """Return the version of each installed package, None where it is missing, and Python's own."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


def package_folder(package: str = "pathswitch") -> str | None:
    """Return where a package would be imported from."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    return os.path.realpath(places[0]) if places else None


def code_digest() -> str | None:
    """Return a digest of the package's Python files: two copies of one version may differ."""
    folder = package_folder()
    if folder is None:
        return None
    digest = hashlib.sha256()
    for directory, folders, files in os.walk(folder):
        folders.sort()
        for name in sorted(name for name in files if name.endswith(".py")):
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                digest.update(os.path.relpath(path, folder).encode() + b"\0" + file.read() + b"\0")
    return digest.hexdigest()


def addresses(name: str) -> list[str]:
    """Return a host name's addresses; none where it does not resolve."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None)})
    except OSError:
        return []


def is_loopback(address: str) -> bool:
    """Return whether other machines cannot reach an address."""
    return address.startswith("127.") or address == "::1"


def interfaces() -> list[str]:
    """Return the names of the network interfaces."""
    return [name for _, name in socket.if_nameindex()]


def port_error(port: int) -> str | None:
    """Return why a TCP port cannot be listened on, None where it can."""
    try:
        listener(port).close()
    except OSError as error:
        return error.strerror or str(error)
    return None


def listener(port: int) -> socket.socket:
    """Return a socket that listens on all addresses, as the store of a process group does."""
    listening = socket.socket()
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("", port))
        listening.listen(128)
    except OSError:
        listening.close()
        raise
    return listening


def exchange(folder: str, token: str, reply: str) -> str | None:
    """Read a token file and write another one; return what is wrong, None where the folder is shared.

    Args:
        folder: where the asking machine has written ``token``.
        token: the name and the content of its file.
        reply: the name and the content of the file to write.
    """
    if not os.path.isdir(folder):
        return f"{os.path.dirname(folder)} is another folder there, or none"
    try:
        with open(os.path.join(folder, token)) as file:
            if file.read() != token:
                return f"a file of {folder} has another content there"
        with open(os.path.join(folder, reply), "w") as file:
            file.write(reply)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return f"{error.strerror} ({error.filename})"
    return None


class Server:
    """Answers questions; ``what`` of a question names the method, the rest are its arguments."""

    def clock(self) -> dict[str, Any]:
        """Tell the time."""
        return {"time": time.time()}

    def machine(self, packages: list[str], programs: list[str], folder: str) -> dict[str, Any]:
        """Tell everything that needs no partner."""
        return {
            "versions": versions(packages),
            "code": code_digest(),
            "missing": [program for program in programs if shutil.which(program) is None],
            "hostname": socket.gethostname(),
            "addresses": addresses(socket.gethostname()),
            "interfaces": interfaces(),
            "gpus": sum(name[6:].isdecimal() for name in os.listdir("/dev") if name.startswith("nvidia")),
            "has_folder": os.path.isdir(folder),
        }

    def exchange(self, folder: str, token: str, reply: str) -> dict[str, Any]:
        """Read a file here that was written there, and the other way round."""
        return {"error": exchange(folder, token, reply)}

    def listen(self, ports: list[int]) -> dict[str, Any]:
        """Accept connections on the first port that is free, until the conversation ends, and tell the address."""
        listening = listener(next(port for port in ports if port_error(port) is None))

        def accept() -> None:
            while True:
                listening.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        told = subprocess.run(["hostname", "-I"], capture_output=True, text=True).stdout.split()
        own = [address for address in addresses(socket.gethostname()) if not is_loopback(address)]
        return {"address": (told or own or ["127.0.0.1"])[0], "port": listening.getsockname()[1]}

    def connect(self, address: str, port: int) -> dict[str, Any]:
        """Try to connect as a rank does."""
        try:
            socket.create_connection((address, port), timeout=CONNECT_SECONDS).close()
        except OSError as error:
            return {"error": error.strerror or str(error)}
        return {"error": None}


def serve() -> None:
    """Answer one question a line until stdin ends, but never longer than a minute."""
    signal.alarm(SERVE_SECONDS)
    server = Server()
    for line in sys.stdin.buffer:
        question = json.loads(line)
        try:
            answer = getattr(server, question.pop("what"))(**question)
        except (OSError, StopIteration) as error:
            answer = {"failed": str(error)}
        print(MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    serve()
