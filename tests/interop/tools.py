"""Install the programs that these tests use: from the Python registry and from Debian."""

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
    """A program cannot be installed here."""


def run(argv: Sequence[str | Path], cwd: Path = ROOT) -> None:
    """Run one step of an installation. Raises Missing."""
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, errors="replace")
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Missing(f"{' '.join(map(str, argv))}: {output[-1]}")


def program(name: str, package: str) -> Path:
    """Return the path of a Debian program. Servers may be outside of PATH. Raises Missing."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/usr/bin")
    if not found:
        raise Missing(f"no {name}: apt-get install --no-install-recommends {package}")
    return Path(found)


@contextmanager
def exclusively(name: str) -> Iterator[None]:
    """Hold a lock in the `with` block: two test runs must not install the same program at once."""
    BUILD.mkdir(exist_ok=True)
    with (BUILD / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def python_tools() -> Path:
    """Return the bin folder of a venv with the Twisted relay, the mailbox server and the client.

    The client is the one in Python. Raises Missing.
    """
    venv = BUILD / "interop-venv"
    wanted = f"{sys.version}\n{REQUIREMENTS.read_text()}"
    made_from = venv / "made-from"
    with exclusively(venv.name):
        if not made_from.exists() or made_from.read_text() != wanted:
            run([sys.executable, "-m", "venv", "--clear", venv])
            run([venv / "bin" / "pip", "install", "--quiet", "--requirement", REQUIREMENTS])
            made_from.write_text(wanted)  # last: a venv without it is incomplete
    return venv / "bin"


def go_client() -> Path:
    """Return wormhole-william: the installed one, or one from Debian's package. Raises Missing."""
    installed = shutil.which("wormhole-william")
    if installed:
        return Path(installed)
    folder = BUILD / "wormhole-william"
    client = folder / "usr" / "bin" / "wormhole-william"
    with exclusively(folder.name):
        if not client.exists():
            for tool in "apt-get", "dpkg-deb":
                if not shutil.which(tool):
                    raise Missing(f"no wormhole-william, and no {tool} to download it")
            shutil.rmtree(folder, ignore_errors=True)  # an older or an incomplete package
            folder.mkdir(parents=True)
            run(["apt-get", "download", "--quiet", "wormhole-william"], folder)
            (package,) = folder.glob("*.deb")
            run(["dpkg-deb", "-x", package, folder])
    return client
