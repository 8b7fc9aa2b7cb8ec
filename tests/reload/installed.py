"""A copy of the program, a relay that runs it, and its reloads."""

from __future__ import annotations

import json
import os
import py_compile
import re
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from helpers import RELAY, TIMEOUT, Client, eventually
from interop.children import Child
from processes import activated
from traffic import Result
from watched import ENVIRONMENT, HAPROXY, HERE, PROGRAM, Books, WatchedRelay

# Of the interpreter that runs the relay, for example `-X dev`.
FLAGS = shlex.split(os.environ.get("RELAY_PYTHON_FLAGS", ""))
IS_SHORT = os.environ.get("RELAY_RELOAD_SHORT") == "1"  # for CI: smaller numbers
DEFAULT_CONFIG = ("max-waiting-per-source 3", "usage-db usage.sqlite")
START_SAMPLES = 3 if IS_SHORT else 5


class Wait(NamedTuple):
    """A time in which something was waited for: its begin and end (monotonic), in seconds."""

    begin: float
    end: float


class Installation:
    """A copy of the program with a configuration, in a folder of its own."""

    def __init__(self, folder: Path, command: Sequence[str] = PROGRAM) -> None:
        """`command`: what `patched` returned. A copy of the program replaces the program in it."""
        self.folder = folder
        self._command = command
        self._program = folder / "transit_relay.py"
        self._config = folder / "relay.conf"
        shutil.copy(RELAY.with_name("ws_frames.py"), folder)
        py_compile.compile(str(folder / "ws_frames.py"))
        self.repair()
        self.configure()

    def configure(self, *lines: str) -> None:
        """Replace the configuration. Later lines win."""
        kept = {line.split()[0]: line for line in (*DEFAULT_CONFIG, *lines)}
        self._replace(self._config, "".join(f"{line}\n" for line in kept.values()))

    def damage(self) -> None:
        """Replace the program with one that Python cannot compile."""
        self._replace(
            self._program, RELAY.read_text().replace("\nclass Server(", "\nclass Server((", 1)
        )

    def repair(self) -> None:
        """Replace the program with the right one, and compile it, as an installation does."""
        self._replace(self._program, RELAY.read_text())
        py_compile.compile(str(self._program))

    def _replace(self, path: Path, text: str) -> None:
        new = self.folder / "new"
        new.write_text(text)
        new.rename(path)

    def command(self) -> list[str]:
        """Return the command that starts the program."""
        python, option, code = self._command
        assert repr(str(RELAY.parent)) in code
        code = code.replace(repr(str(RELAY.parent)), repr(str(self.folder)))
        return [python, *FLAGS, option, code]

    def start_seconds(self) -> tuple[float, float]:
        """Return how long a start of Python takes, and a start of the program (medians)."""
        return (
            _median_seconds([sys.executable, "-c", "pass"]),
            _median_seconds([*self.command(), "--version"]),
        )


def _median_seconds(command: list[str]) -> float:
    took = []
    for _ in range(START_SAMPLES):
        began = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, timeout=4 * TIMEOUT)
        took.append(time.monotonic() - began)
    return statistics.median(took)


class ReloadedRelay(WatchedRelay):
    """A relay that is reloaded. It also listens for proxies with PROXY headers."""

    def __init__(
        self,
        installation: Installation,
        *options: str,
        passed: Sequence[socket.socket] = (),
        is_activated: bool = False,
    ) -> None:
        """The working directory must be the folder of the installation.

        `passed`: listening sockets for the relay. `is_activated`: systemd would pass them.
        """
        self.installation = installation
        program = installation.command()
        # Options on the command line take precedence over the configuration.
        super().__init__(
            *(*HAPROXY, "--config", "relay.conf", *options),
            program=activated(*passed, program=program) if is_activated else program,
            pass_fds=[one.fileno() for one in passed],
        )
        self.windows: list[Wait] = []  # of the reloads that were not refused
        self._clients: list[Client] = []

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for one in self._clients:
            one.close()

    def client(self, *arguments: Any, **others: Any) -> Client:
        """Return a new client, which is closed with the relay at the latest."""
        self._clients.append(super().client(*arguments, **others))
        return self._clients[-1]

    def proxied_client(self) -> Client:
        """Return a new client that has to send a PROXY header first."""
        sock = socket.create_connection((self.host, self.haproxy_port), TIMEOUT)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._clients.append(Client(sock))
        return self._clients[-1]

    def reload(self) -> None:
        """Send SIGHUP, and wait until the new program serves."""
        began = time.monotonic()
        self.process.send_signal(signal.SIGHUP)
        self.wait_for("Transit reloaded")
        self.windows.append(Wait(began, time.monotonic()))

    def refused(self) -> str:
        """Send SIGHUP, and return the reason why it was refused."""
        self.process.send_signal(signal.SIGHUP)
        return self.wait_for(r"reload refused: (.*)")[1]

    def check_files(self, before: Counter[str]) -> None:
        """Wait until the descriptors of before are open. Fail with those that differ."""
        try:
            eventually(lambda: self.open_files() == before, "the descriptors of before")
        except AssertionError:
            now = self.open_files()
            raise AssertionError(f"more: {now - before}, fewer: {before - now}") from None

    def check_messages(self, expected: str = "reload refused:") -> None:
        """Raise AssertionError if the relay has complained about something else."""
        for line in self.stderr.decode().splitlines():
            if re.search("warning:|error:|critical:|Warning|Traceback", line):
                assert expected in line, line

    def children(self) -> list[str]:
        """Return the process ids of its children, ended ones too."""
        found = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            found += (task / "children").read_text().split()
        return found

    def new_port(self) -> int:
        """Return the port of the endpoint for WebSocket that the last reload opened."""
        *_, found = re.finditer(rb"Transit reloaded.* tcp:(\d+)[^ ]* \(websocket\)", self.stderr)
        return int(found[1])


class Traffic(Child):
    """Checked traffic in a process of its own: see traffic.py."""

    def __init__(self, relay: WatchedRelay, role: str, *options: str) -> None:
        script = [sys.executable, str(Path(__file__).with_name("traffic.py")), role]
        environment = {**ENVIRONMENT, "PYTHONPATH": f"{HERE}:{ENVIRONMENT['PYTHONPATH']}"}
        super().__init__([*script, str(relay.port), *options], env=environment)
        self.lines.until("^ready$")

    def finish(self, books: Books) -> Result:
        """End the traffic, in which all must be right, and note it in the books."""
        self._process.terminate()
        try:
            found = self.lines.until(r"^\[\[.*").group()
        except AssertionError:
            self.wait()
            raise
        self.succeed()
        result = Result(*json.loads(found))
        for size, times in result.sizes:
            books.add("happy", size, times)
        return result


def longest(waits: list[tuple[float, float]], windows: list[Wait]) -> tuple[float, float]:
    """Return the longest wait that meets a window, and the longest one that does not."""
    inside, outside = [0.0], [0.0]
    for end, seconds in waits:
        meets = any(end >= one.begin and end - seconds <= one.end for one in windows)
        (inside if meets else outside).append(seconds)
    return max(inside), max(outside)
