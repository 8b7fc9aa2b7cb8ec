"""What the packaging checks share: packages as they are built, and fresh systems to put them on.

Nothing here is ever skipped: a tool that is missing fails the checks that need it. The systems
(root folders made by mmdebstrap from the machine's own sources of packages) are begun when the
session begins and kept in build/roots for the next one; `make clean` removes them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build"
SOURCES = Path("/etc/apt/sources.list.d/debian.sources")

# Debian's own programs, Python included, whatever else the machine has in its PATH.
DEBIAN_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 60.0 * float(os.environ.get("RELAY_TEST_TIMEOUT_FACTOR", "1"))

sys.path.insert(0, str(ROOT / "tests" / "interop"))  # its hosts and real clients serve here too


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 5 * TIMEOUT,
) -> str:
    """Run a program that must succeed; give what it said on stdout."""
    done = subprocess.run(
        argv,
        cwd=cwd,
        env={**os.environ, "PATH": DEBIAN_PATH, **(env or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=timeout,
    )
    command = " ".join(map(str, argv))
    assert done.returncode == 0, (
        f"{command}\nexit code {done.returncode}\n{done.stdout}{done.stderr}"
    )
    return done.stdout


def attempt(
    argv: Sequence[str], env: Mapping[str, str], timeout: float
) -> subprocess.CompletedProcess[str]:
    """Run a program in just this environment, whatever comes of it. Its stdout holds its stderr."""
    return subprocess.run(
        argv,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=timeout,
    )


_numbers = itertools.count(1)


def remove_traces(machine: str) -> None:
    """What nspawn leaves behind where /run is no tmpfs."""
    with contextlib.suppress(OSError):
        Path("/run/systemd/nspawn/propagate", machine).rmdir()


class FreshRoot:
    """The root folder of a system as its installer leaves it: made by mmdebstrap, kept pristine."""

    def __init__(self, suite: str, name: str, packages: Sequence[str]) -> None:
        self.suite = suite
        self._folder = BUILD / "roots" / name
        self._log = self._folder.with_suffix(".log")
        self._stamp = self._folder.with_suffix(".made")
        self._command = [
            *("mmdebstrap", "--variant=apt", "--mode=root", "--quiet"),
            *("--aptopt=Acquire::Languages none", "--aptopt=APT::Install-Recommends no"),
            *("--include", ",".join(packages), suite, str(self._folder), "-"),
        ]
        self._making: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Begin to make it, if it is not there."""
        if self._stamp.exists() and self._stamp.read_text() == str(self._command):
            return
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._stamp.unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", self._folder], check=True)
        sources = SOURCES.read_text().replace("bookworm", self.suite)
        with self._log.open("wb") as log:
            self._making = subprocess.Popen(
                self._command,
                env={**os.environ, "PATH": DEBIAN_PATH},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        assert self._making.stdin
        self._making.stdin.write(sources.encode())
        self._making.stdin.close()

    def folder(self) -> Path:
        """The folder, once it is there."""
        if self._making is not None:
            code = self._making.wait(10 * TIMEOUT)
            assert code == 0, f"mmdebstrap {self.suite}: {code}\n{self._log.read_text()}"
            self._making = None
            self._stamp.write_text(str(self._command))
        return self._folder

    def run(self, *argv: str, binds: Sequence[str] = ()) -> str:
        """Run a command in a copy of it that is thrown away, with loopback but no systemd.

        `binds` are files and folders of ours, as OURS:THERE.
        """
        name = f"relay-{self._folder.name}-{os.getpid()}-{next(_numbers)}"
        try:
            return run(
                [
                    *("systemd-nspawn", "--quiet", "--register=no", "--keep-unit", "--as-pid2"),
                    *("--pipe", "--volatile=overlay", f"--directory={self.folder()}"),
                    *(f"--machine={name}", "--timezone=off", "--private-network"),
                    *(f"--bind={bind}" for bind in binds),
                    *(f"--setenv={variable}" for variable in ("LC_ALL=C.UTF-8", "HOME=/root")),
                    *("env", "--unset=NOTIFY_SOCKET"),  # nspawn's own
                    *argv,
                ],
                timeout=8 * TIMEOUT,
            )
        finally:
            remove_traces(name)

    def abandon(self) -> None:
        """Nobody wants it any more."""
        if self._making is not None:
            self._making.terminate()
            self._making.wait()


BOOTABLE = ("systemd-sysv", "dbus", "python3")
ROOTS = {
    "bookworm": FreshRoot("bookworm", "bookworm", BOOTABLE),
    "trixie": FreshRoot("trixie", "trixie", BOOTABLE),
    # Where trixie's packages are built and judged, and the README's recipes tried.
    "trixie-build": FreshRoot(
        "trixie",
        "trixie-build",
        (
            *("build-essential", "debhelper", "dh-python", "fakeroot", "lintian", "python3-pytest"),
            *("cron", "daemontools", "runit", "logrotate"),
        ),
    ),
}


@pytest.fixture(scope="session", autouse=True)
def _begin_roots() -> Iterator[None]:
    for root in ROOTS.values():
        root.begin()
    yield
    for root in ROOTS.values():
        root.abandon()


@pytest.fixture(scope="session")
def roots() -> Mapping[str, FreshRoot]:
    """Fresh systems by name: bookworm, trixie (both can be booted), trixie-build."""
    return ROOTS


@pytest.fixture(scope="session")
def deb() -> Path:
    """The package, built from what is committed (`make deb`)."""
    run(["make", "-s", "deb"])
    (package,) = (BUILD / "deb").glob("transit-relay_*_all.deb")
    return package
