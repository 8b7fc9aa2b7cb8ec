"""Fixtures of the packaging checks: the built package, and fresh systems to install it on.

No check is skipped: a missing tool fails the checks that need it, and all need mmdebstrap. The
systems are root folders that mmdebstrap creates from the machine's package sources. Their creation
starts with the session. They are kept in build/roots for the next session; `make clean` removes
them.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build"
# Images of containers and clouds have the first one, other installations the second one.
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))

# Debian's programs, including Python. The PATH of the machine may have others.
DEBIAN_PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT = 60.0 * float(os.environ.get("RELAY_TEST_TIMEOUT_FACTOR", "1"))

sys.path.insert(0, str(ROOT / "tests" / "interop"))  # for its hosts and real clients


def run(
    argv: Sequence[str | Path],
    *,
    cwd: Path = ROOT,
    env: Mapping[str, str] | None = None,
    timeout: float = 5 * TIMEOUT,
) -> str:
    """Run a program that must succeed, and return its stdout."""
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
    """Run a program with this environment only. It may fail. Its stdout contains its stderr."""
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


def documents() -> str:
    """Return the text of README.md and of all files in docs."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return "\n".join(file.read_text(encoding="utf-8") for file in files)


def remove_traces(machine: str) -> None:
    """Remove the folder that systemd-nspawn leaves if /run is not a tmpfs."""
    with contextlib.suppress(OSError):
        Path("/run/systemd/nspawn/propagate", machine).rmdir()


class FreshRoot:
    """The root folder of a freshly installed system. mmdebstrap creates it; no test changes it."""

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
        self._mmdebstrap: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start mmdebstrap, unless an earlier session has made the folder by the same command."""
        if self._stamp.exists() and self._stamp.read_text() == str(self._command):
            return
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        self._stamp.unlink(missing_ok=True)
        subprocess.run(["rm", "-rf", self._folder], check=True)
        file = next(file for file in SOURCES if file.exists())
        sources = file.read_text().replace("bookworm", self.suite)
        with self._log.open("wb") as log:
            self._mmdebstrap = subprocess.Popen(
                self._command,
                env={**os.environ, "PATH": DEBIAN_PATH},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        assert self._mmdebstrap.stdin
        self._mmdebstrap.stdin.write(sources.encode())
        self._mmdebstrap.stdin.close()

    def folder(self) -> Path:
        """Wait until mmdebstrap has ended, and return the folder."""
        if self._mmdebstrap is not None:
            code = self._mmdebstrap.wait(10 * TIMEOUT)
            assert code == 0, f"mmdebstrap {self.suite}: {code}\n{self._log.read_text()}"
            self._mmdebstrap = None
            self._stamp.write_text(str(self._command))
        return self._folder

    def run(self, *argv: str, binds: Sequence[str] = ()) -> str:
        """Run a command in a temporary copy of the system, with loopback but without systemd.

        `binds` are files and folders to mount there, as HERE:THERE.
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
                    *("env", "--unset=NOTIFY_SOCKET"),  # set by systemd-nspawn
                    *argv,
                ],
                timeout=8 * TIMEOUT,
            )
        finally:
            remove_traces(name)

    def copy_with(self, package: Path, folder: Path) -> Path:
        """Copy the system to `folder`, install a package there without a boot, return `folder`."""
        run(["cp", "-a", "--reflink=auto", self.folder(), folder])
        shutil.copy(package, folder)
        run(["chroot", folder, "dpkg", "-i", f"/{package.name}"])
        (folder / package.name).unlink()
        return folder

    def abandon(self) -> None:
        """Stop mmdebstrap, if it runs."""
        if self._mmdebstrap is not None:
            self._mmdebstrap.terminate()
            self._mmdebstrap.wait()


BOOTABLE = ("systemd-sysv", "dbus", "python3")
ROOTS = {
    "bookworm": FreshRoot("bookworm", "bookworm", BOOTABLE),
    "trixie": FreshRoot("trixie", "trixie", BOOTABLE),
    # For building and checking trixie's package, and for the documented recipes.
    "trixie-build": FreshRoot(
        "trixie",
        "trixie-build",
        (
            *("build-essential", "debhelper", "dh-python", "fakeroot", "lintian", "python3-pytest"),
            *("cron", "daemontools", "runit", "logrotate"),
        ),
    ),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests without a root folder first, while mmdebstrap creates the folders."""
    items.sort(key=lambda item: "roots" in getattr(item, "fixturenames", ()))


@pytest.fixture(scope="session", autouse=True)
def _create_roots() -> Iterator[None]:
    for root in ROOTS.values():
        root.begin()
    yield
    for root in ROOTS.values():
        root.abandon()


@pytest.fixture(scope="session")
def roots() -> Mapping[str, FreshRoot]:
    """Return the fresh systems by name. bookworm and trixie can be booted, trixie-build cannot."""
    return ROOTS


@pytest.fixture(scope="session")
def deb() -> Path:
    """Build the package from the last commit (`make deb`), and return its path."""
    run(["make", "-s", "deb"])
    (package,) = (BUILD / "deb").glob("transit-relay_*_all.deb")
    return package
