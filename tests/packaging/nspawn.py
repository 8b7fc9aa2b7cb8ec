"""Systems that boot for real, systemd and all, as containers of systemd-nspawn.

Nothing of this machine has a part in it: no D-Bus, no machined, no bridge. A system's network is
its own, and reached from here by sockets that are made in it. What a system writes is kept in
memory and lost with it, so its root folder stays as it was.
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
    """This thread's new sockets belong to that network. (Python has os.setns from 3.12 on.)"""
    if _libc.setns(fd, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


class Reachable:
    """What has a network of its own, in which sockets of ours can be made."""

    leader = 0  # a process in there

    @contextlib.contextmanager
    def network(self) -> Iterator[None]:
        """In the `with` block this thread's new sockets are in that network."""
        with open("/proc/thread-self/ns/net") as ours:
            with open(f"/proc/{self.leader}/ns/net") as theirs:
                _move_to_network(theirs.fileno())
                try:
                    yield
                finally:
                    _move_to_network(ours.fileno())

    def connect(self, host: str, port: int, source: str) -> socket.socket:
        """A connection within that network."""
        with self.network():
            return socket.create_connection((host, port), TIMEOUT, (source, 0))

    def add_address(self, address: str) -> None:
        """One more address of its own, for IPv6."""
        ip = ["ip", "-6", "address", "add", f"{address}/128", "dev", "lo", "nodad"]
        subprocess.run(["nsenter", f"--net=/proc/{self.leader}/ns/net", *ip], check=True)


class Machine(Reachable):
    """A booted system: from the `with` on, until its end."""

    def __init__(self, folder: Path, scratch: Path, *options: str) -> None:
        """`folder` holds its root; in `scratch` is kept what it says on its console.

        `options` are further ones of systemd-nspawn; without any it has a network of its own.
        """
        self._name = f"relay-{folder.name}-{os.getpid()}"
        self._console = scratch / f"{self._name}.console"
        self._argv = [
            *("setpriv", "--pdeathsig", "TERM"),  # however this run ends
            *("systemd-nspawn", "--quiet", "--boot", f"--directory={folder}"),
            *(f"--machine={self._name}", "--register=no", "--keep-unit", "--console=pipe"),
            *("--volatile=overlay", "--notify-ready=yes"),
            # Without these IPAddressDeny= and its like are silently nothing in there.
            *("--system-call-filter=bpf", "--capability=CAP_BPF,CAP_NET_ADMIN,CAP_PERFMON"),
            *(options or ["--private-network"]),
        ]

    def __enter__(self) -> Machine:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind("")  # the kernel finds a name
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
        """Wait until systemd in there says that it has booted."""
        end = os.pidfd_open(self._process.pid)
        notice = ""
        try:
            while "READY=1" not in notice:
                ready, _, _ = select.select([notices, end], [], [], TIMEOUT)
                console = self._console.read_text(errors="replace")
                assert notices in ready, f"it does not boot:\n{console}"
                notice = notices.recv(1 << 16).decode()
                leader = re.search(r"^X_NSPAWN_LEADER_PID=(\d+)$", notice, re.M)
                self.leader = int(leader[1]) if leader else self.leader  # number 1 in there
        finally:
            os.close(end)

    def __exit__(self, *_: object) -> None:
        self._process.terminate()  # which has it powered off
        try:
            self._process.wait(TIMEOUT / 4)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        remove_traces(self._name)

    # Commands.

    def inside(self, *argv: str) -> list[str]:
        """The command that runs argv in there."""
        namespaces = ["--mount", "--uts", "--ipc", "--net", "--pid", "--cgroup", "--root", "--wd"]
        return ["nsenter", f"--target={self.leader}", *namespaces, "--", *argv]

    def try_(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in there, whatever comes of it. Its stdout holds its stderr too."""
        return attempt(self.inside(*argv), _ENVIRONMENT, 2 * TIMEOUT)

    def run(self, *argv: str) -> str:
        """Run a command in there, which must succeed; give what it said."""
        done = self.try_(*argv)
        assert done.returncode == 0, (
            f"{' '.join(argv)}\nexit code {done.returncode}\n{done.stdout}\n{self.journal()}"
        )
        return done.stdout

    def python(self, program: str, *argv: str) -> str:
        """Run a program by its Python."""
        return self.run("python3", "-c", program, *argv)

    def fails(self, *argv: str) -> str:
        """Run a command in there that must fail; give what it said."""
        done = self.try_(*argv)
        assert done.returncode != 0, f"{' '.join(argv)}\nsucceeded\n{done.stdout}"
        return done.stdout

    def path(self, name: str) -> Path:
        """A file in there, as it is called here. (No absolute symbolic link may be on the way.)"""
        return Path(f"/proc/{self.leader}/root", name.lstrip("/"))

    def install(self, package: Path) -> None:
        """Install a package as its administrator does: dpkg -i."""
        there = f"/tmp/{package.name}"
        shutil.copy(package, self.path(there))
        self.run("dpkg", "-i", there)
        self.path(there).unlink()

    # Units.

    def show(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", f"--property={name}", unit).strip()

    def state(self, unit: str) -> tuple[str, str]:
        """Whether it is active, and whether it is enabled, in systemd's words."""
        words = (self.try_("systemctl", verb, unit) for verb in ("is-active", "is-enabled"))
        active, enabled = (word.stdout.strip() for word in words)
        return active, enabled

    def add_drop_in(self, unit: str, name: str, text: str) -> None:
        """Change a unit, until the next boot."""
        folder = self.path(f"/run/systemd/system/{unit}.d")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.conf").write_text(text)
        self.run("systemctl", "daemon-reload")

    # The journal.

    def cursor(self) -> str:
        """Where the journal ends at the moment."""
        self.run("journalctl", "--sync")
        said = self.run("journalctl", "--lines=1", "--show-cursor", "--output=cat")
        found = re.search(r"^-- cursor: (\S+)$", said, re.M)
        assert found, said
        return found[1]

    def journal(self, after: str | None = None) -> str:
        """What is in the journal, all of it or behind a cursor."""
        behind = [f"--after-cursor={after}"] if after else []
        self.try_("journalctl", "--sync")
        return self.try_("journalctl", "--no-pager", "--output=short-monotonic", *behind).stdout

    # The network.

    def listener(self, port: int) -> str | None:
        """The inode of the socket that listens on a port, for IPv4 and IPv6. None: nobody does."""
        for line in Path(f"/proc/{self.leader}/net/tcp6").read_text().splitlines()[1:]:
            _, local, _, state, *_, inode = line.split()[:10]
            if state == "0A" and local.endswith(f":{port:04X}"):
                return inode
        return None
