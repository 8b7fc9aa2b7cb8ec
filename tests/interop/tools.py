"""What these tests need from outside, and how it is had: Python's programs, and Debian's."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build"
REQUIREMENTS = HERE / "requirements.txt"


class Missing(Exception):
    """It cannot be had here."""


def run(argv: Sequence[str | Path], cwd: Path = ROOT) -> None:
    """Run one step of getting a tool. Raises Missing."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Missing(f"{' '.join(map(str, argv))}: {said[-1]}")


def program(name: str, package: str) -> Path:
    """A program of Debian's; its servers are where not every PATH leads. Raises Missing."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")
    if not found:
        raise Missing(f"no {name}: apt-get install --no-install-recommends {package}")
    return Path(found)


@contextmanager
def alone(name: str) -> Iterator[None]:
    """Nobody else makes the same thing in the `with` block: two runs may go side by side."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def python_tools() -> Path:
    """The bin folder of a venv with the Twisted relay, the mailbox server and Python's client.

    Raises Missing.
    """
    venv = BUILD / "interop-venv"
    wanted = f"{sys.version}\n{REQUIREMENTS.read_text()}"
    made_from = venv / "made-from"
    with alone(venv.name):
        if not made_from.exists() or made_from.read_text() != wanted:
            run([sys.executable, "-m", "venv", "--clear", venv])
            run([venv / "bin" / "pip", "install", "--quiet", "--requirement", REQUIREMENTS])
            made_from.write_text(wanted)  # last, so that a venv left half made is made anew
    return venv / "bin"


def go_client() -> Path:
    """wormhole-william: the machine's, or the one in Debian's package, unpacked. Raises Missing."""
    installed = shutil.which("wormhole-william")
    if installed:
        return Path(installed)
    folder = BUILD / "wormhole-william"
    client = folder / "usr" / "bin" / "wormhole-william"
    with alone(folder.name):
        if not client.exists():
            for tool in "apt-get", "dpkg-deb":
                if not shutil.which(tool):
                    raise Missing(f"no wormhole-william, and no {tool} to get it")
            shutil.rmtree(folder, ignore_errors=True)  # an older package, or a half unpacked one
            folder.mkdir(parents=True)
            run(["apt-get", "download", "--quiet", "wormhole-william"], folder)
            (package,) = folder.glob("*.deb")
            run(["dpkg-deb", "-x", package, folder])
    return client
