"""Systems that boot with systemd, as containers of systemd-nspawn.

They use no service of this machine: no D-Bus, no machined, no bridge. Each system has its own
network. Tests reach it with sockets that are created in that network. What a system writes is kept
in memory, so its root folder does not change.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import select
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

from children import TIMEOUT
from conftest import attempt, remove_traces

_ENVIRONMENT = {
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "DEBIAN_FRONTEND": "noninteractive",
    "SYSTEMD_PAGER": "",
}
_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_libc = ctypes.CDLL(None, use_errno=True)


def _move_to_network(fd: int) -> None:
    """Move this thread to a network, for its new sockets. (os.setns needs Python 3.12.)"""
    if _libc.setns(fd, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


class Reachable:
    """A system or a container with its own network, in which tests can create sockets."""

    leader = 0  # a process in that network

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """Create this thread's new sockets in that network, in the `with` block."""
        with open("/proc/thread-self/ns/net") as here:
            with open(f"/proc/{self.leader}/ns/net") as there:
                _move_to_network(there.fileno())
                try:
                    yield
                finally:
                    _move_to_network(here.fileno())

    def connect(self, host: str, port: int, source: str) -> socket.socket:
        """Connect within that network."""
        with self.network():
            return socket.create_connection((host, port), TIMEOUT, (source, 0))

    def add_address(self, address: str) -> None:
        """Add an IPv6 address to its loopback interface, and a route to it.

        The kernel adds the same route, but later, in a work queue.
        """
        lines = f"""\
address add {address}/128 dev lo nodad
route replace local {address} dev lo table local
"""
        ip = ["nsenter", f"--net=/proc/{self.leader}/ns/net", "ip", "-6", "-batch", "-"]
        subprocess.run(ip, input=lines.encode(), check=True)


class Machine(Reachable):
    """A system that is booted in the `with` block."""

    def __init__(self, folder: Path, scratch: Path, *options: str) -> None:
        """Prepare a system with the root `folder`. Its console goes to a file in `scratch`.

        `options` are options of systemd-nspawn, in place of the one for a network of its own.
        """
        self._name = f"relay-{folder.name}-{os.getpid()}"
        self._console = scratch / f"{self._name}.console"
        self._argv = [
            *("setpriv", "--pdeathsig", "TERM"),  # so that it ends with this test run
            *("systemd-nspawn", "--quiet", "--boot", f"--directory={folder}"),
            *(f"--machine={self._name}", "--register=no", "--keep-unit", "--console=pipe"),
            *("--volatile=overlay", "--notify-ready=yes"),
            # Without these, IPAddressDeny= and the like have no effect, and no warning says so.
            *("--system-call-filter=bpf", "--capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON"),
            *(options or ["--private-network"]),
        ]

    def __enter__(self) -> Machine:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind("")  # the kernel chooses a name
            name = notices.getsockname().decode().replace("\0", "@")
            with self._console.open("wb") as console:
                self._process = subprocess.Popen(
                    self._argv,
                    env={
                        **_ENVIRONMENT,
                        "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1",
                        "NOTIFY_SOCKET": name,
                    },
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                )
            try:
                self._await_boot(notices)
            except BaseException:
                self.__exit__()
                raise
        return self

    def _await_boot(self, notices: socket.socket) -> None:
        """Wait until the systemd of the system reports that it has booted."""
        end = os.pidfd_open(self._process.pid)
        notice = ""
        try:
            while "READY=1" not in notice:
                ready, _, _ = select.select([notices, end], [], [], TIMEOUT)
                console = self._console.read_text(errors="replace")
                assert notices in ready, f"it does not boot:\n{console}"
                notice = notices.recv(1 << 16).decode()
                leader = re.search(r"^X_NSPAWN_LEADER_PID=(\d+)$", notice, re.M)
                self.leader = int(leader[1]) if leader else self.leader  # its process 1
        finally:
            os.close(end)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # powers the system off
        try:
            self._process.wait(TIMEOUT / 4)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        remove_traces(self._name)

    # Commands.

    def inside(self, *argv: str) -> list[str]:
        """Return the command that runs argv in the system."""
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        return ["nsenter", f"--target={self.leader}", *namespaces, "--", *argv]

    def try_(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the system. It may fail. Its stdout contains its stderr."""
        return attempt(self.inside(*argv), _ENVIRONMENT, 2 * TIMEOUT)

    def run(self, *argv: str) -> str:
        """Run a command in the system that must succeed, and return its output."""
        done = self.try_(*argv)
        assert done.returncode == 0, (
            f"{' '.join(argv)}\nexit code {done.returncode}\n{done.stdout}\n{self.journal()}"
        )
        return done.stdout

    def python(self, program: str, *argv: str) -> str:
        """Run a program with the Python of the system."""
        return self.run("python3", "-c", program, *argv)

    def fails(self, *argv: str) -> str:
        """Run a command in the system that must fail, and return its output."""
        done = self.try_(*argv)
        assert done.returncode != 0, f"{' '.join(argv)}\nsucceeded\n{done.stdout}"
        return done.stdout

    def path(self, name: str) -> Path:
        """Return the path of a file of the system. It must not contain absolute symbolic links."""
        return Path(f"/proc/{self.leader}/root", name.lstrip("/"))

    def install(self, package: Path) -> str:
        """Install a package as an administrator does: dpkg -i. Return the output."""
        there = f"/tmp/{package.name}"
        shutil.copy(package, self.path(there))
        output = self.run("dpkg", "-i", there)
        self.path(there).unlink()
        return output

    # Units.

    def show(self, unit: str, name: str) -> str:
        """Return a property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def state(self, unit: str) -> tuple[str, str]:
        """Return systemd's words for whether a unit is active and whether it is enabled."""
        answers = (self.try_("systemctl", verb, unit) for verb in ("is-active", "is-enabled"))
        active, enabled = (answer.stdout.strip() for answer in answers)
        return active, enabled

    def add_drop_in(self, unit: str, name: str, text: str) -> None:
        """Add lines to a unit, until the next boot."""
        folder = self.path(f"/run/systemd/system/{unit}.d")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.conf").write_text(text)
        self.run("systemctl", "daemon-reload")

    # The journal.

    def cursor(self) -> str:
        """Return the cursor of the last entry in the journal."""
        self.run("journalctl", "--sync")
        output = self.run("journalctl", "--lines=1", "--show-cursor", "--output=cat")
        found = re.search(r"^-- cursor: (\S+)$", output, re.M)
        assert found, output
        return found[1]

    def journal(self, after: str | None = None) -> str:
        """Return the journal, all of it or the entries after a cursor."""
        options = [f"--after-cursor={after}"] if after else []
        self.try_("journalctl", "--sync")
        return self.try_("journalctl", "--no-pager", "--output=short-monotonic", *options).stdout

    # The network.

    def listener(self, port: int) -> str | None:
        """Return the inode of the socket that listens on a port, or None. It is one for IPv6."""
        for line in Path(f"/proc/{self.leader}/net/tcp6").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and local.endswith(f":{port:04X}"):
                return inode
        return None
