"""What is compared: relays, and what stands in for one. How each is had, started, and ended.

Each is a Between: something that two clients can be connected through. Most are Programs, with a
process of their own on a core of its own, whose CPU seconds and memory the kernel tells us. A
Program is started by entering it, and ended by SIGTERM on leaving; one that complains, hangs, or
exits with a code that is not its usual one, is an error of the run.
"""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

import clients
from clients import HOST, LIMIT_SECONDS, Pair

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "bench"
STAGE = BUILD / "stage"
VENV = BUILD / "venv"
REQUIREMENTS = ROOT / "tests" / "interop" / "requirements.txt"
PYTHON = "/usr/bin/python3"  # what runs our installed entry, so it runs the Twisted relay too
TWISTED_PACKAGE = "magic-wormhole-transit-relay"
TELL_VERSIONS = f"""\
from importlib.metadata import version
print("{TWISTED_PACKAGE}", version("{TWISTED_PACKAGE}"), "with Twisted", version("Twisted"))
"""
SLEEP = "import time; time.sleep(3600)"  # what a bare interpreter does
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
GETTING_SECONDS = 300.0  # for one step of getting a comparator, such as a venv
POLL_SECONDS = 0.005  # between two looks at whether a program has got somewhere
SETTLED_SECONDS = 0.3  # without any work and any change in size: nothing is under way
BACKLOG = 1024  # newcomers that may queue: what ours has; the Twisted relay's own default is 50
HAPROXY_CONNECTIONS = 1000  # clients of the largest exchange with it, twice

# The first core that we may use is the relay's, the last one the generator's.
CORES = sorted(os.sched_getaffinity(0))
RELAY_CORE, LOAD_CORE = CORES[0], CORES[-1]


class Unavailable(Exception):
    """A comparator that cannot be had here, with the reason."""


class RelayError(Exception):
    """A relay did what it should not have done."""


# ---------------------------------------------------------------------------------------------
# What they are
# ---------------------------------------------------------------------------------------------


class Between:
    """What is between the two clients of a pair. This one is nothing: they are connected."""

    def __enter__(self) -> Self:
        self._listener = socket.create_server((HOST, 0), backlog=BACKLOG)
        self._listener.settimeout(LIMIT_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def pair(
        self, websocket: tuple[bool, bool] = (False, False), buffer_bytes: int | None = None
    ) -> Pair:
        """Two clients, ready to send and receive.

        `websocket`: which of them speaks it. `buffer_bytes`: see clients.prepare.
        """
        assert websocket == (False, False)
        clients.prepare(self._listener, buffer_bytes)
        first = clients.connect(self._entrance(), buffer_bytes)
        second, _ = self._listener.accept()
        second.settimeout(LIMIT_SECONDS)
        return Pair(first, second)

    def _entrance(self) -> int:
        """The port that the first client connects to; the second is accepted by us."""
        return port_of(self._listener)

    def cpu_seconds(self) -> float:
        """What it has used so far, in all its threads."""
        return 0.0


class Program(Between):
    """A process, and what the kernel knows of it. This one does nothing."""

    complaint = re.compile(r"warning|error|critical|Traceback", re.IGNORECASE)
    exit_codes: tuple[int, ...] = (-signal.SIGTERM,)

    def __init__(self, *command: str | Path) -> None:
        self._command = command

    def __enter__(self) -> Self:
        self.spawn()
        try:
            self.wait_until_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        has_ended = self._process.poll() is not None  # which explains whatever error there is
        try:
            if has_ended or not any(error):
                self.stop()
        finally:
            self.kill()

    def spawn(self) -> None:
        """Start it, on the relay's core."""
        self._output = tempfile.TemporaryFile()
        os.sched_setaffinity(0, {RELAY_CORE})  # a new process takes it over
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env=plain_environment(),
            )
        finally:
            os.sched_setaffinity(0, {LOAD_CORE})

    def wait_until_ready(self) -> None:
        """Until it listens."""

    def wait_for(
        self, is_there: Callable[[], bool], what: str, poll_seconds: float = POLL_SECONDS
    ) -> None:
        """Until that is so. Raises RelayError if it takes too long, or the process has ended."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not is_there():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RelayError(f"no {what}; it said: {self.said()[-500:]!r}")
            time.sleep(poll_seconds)

    def stop(self) -> None:
        """End it. Raises RelayError if it does not end well, or ever had something to say."""
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise RelayError(f"it does not end in {LIMIT_SECONDS:g} s") from None
        for line in self.said().splitlines():
            if self.complaint.search(line):
                raise RelayError(f"it said: {line}")
        if code not in self.exit_codes:
            raise RelayError(f"it ended with {code}; it said: {self.said()[-500:]!r}")

    def kill(self) -> None:
        """Whatever it does, it is gone now, and what it has said too."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def said(self) -> str:
        """All that it has written to stdout and stderr."""
        fd = self._output.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    # What the kernel knows: proc(5).

    def cpu_seconds(self) -> float:
        stat = self._proc("stat").read_text()
        user, system = stat.rpartition(")")[2].split()[11:13]
        return (int(user) + int(system)) / TICKS_PER_SECOND

    def cpu_nanoseconds(self) -> int:
        """The same, finer, but without the threads that have ended."""
        tasks = self._proc("task").glob("*/schedstat")
        return sum(int(task.read_text().split()[0]) for task in tasks)

    def resident_bytes(self) -> int:
        """What it has in memory."""
        return int(self._proc("statm").read_text().split()[1]) * PAGE_BYTES

    def settle(self) -> None:
        """Wait until it has done all that there is to do."""
        deadline = time.monotonic() + LIMIT_SECONDS
        before = None
        while (now := (self.cpu_seconds(), self.resident_bytes())) != before:
            if time.monotonic() > deadline:
                raise RelayError("it does not come to rest")
            before = now
            time.sleep(SETTLED_SECONDS)

    def _proc(self, name: str) -> Path:
        return Path("/proc", str(self._process.pid), name)


class Relay(Program):
    """One that makes pairs: ours, or the Twisted one."""

    def __init__(
        self,
        command: Sequence[str | Path],
        ready: str,
        ports: tuple[int, int],
        database: Path | None,
    ) -> None:
        """`ready`: what it says when it listens on its `ports`, for TCP and for WebSocket."""
        super().__init__(*command)
        self._ready = ready
        self._ports = ports
        self._database = database

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self._ready in self.said(), "start message")

    def wait_until_connected(self) -> None:
        """Until a client can connect, to within some tenths of a millisecond."""

        def can_connect() -> bool:
            try:
                clients.connect(self._ports[0]).close()
            except ConnectionRefusedError:
                return False
            return True

        self.wait_for(can_connect, "connection", poll_seconds=0.0002)

    def connect(
        self, token: str, side: str, is_websocket: bool = False, buffer_bytes: int | None = None
    ) -> socket.socket:
        """A client that has said its handshake."""
        sock = clients.connect(self._ports[is_websocket], buffer_bytes)
        clients.introduce(sock, is_websocket, token, side)
        return sock

    def pair(
        self, websocket: tuple[bool, bool] = (False, False), buffer_bytes: int | None = None
    ) -> Pair:
        token = clients.new_token()
        pair = Pair(
            self.connect(token, "first", websocket[0], buffer_bytes),
            self.connect(token, "second", websocket[1], buffer_bytes),
        )
        for sock, is_websocket in zip(pair, websocket, strict=True):
            clients.expect_ok(sock, is_websocket)
        return pair

    def usage_rows(self) -> int:
        """How many records it has left in its database."""
        assert self._database is not None
        with contextlib.closing(sqlite3.connect(self._database)) as db:
            (count,) = db.execute("SELECT count(*) FROM usage").fetchone()
        return int(count)


class Ours(Relay):
    """transit-relay, as it is installed."""

    exit_codes = (0,)

    def __init__(self, database: Path | None, *options: str) -> None:
        port = free_port()
        command: list[str | Path] = [find_ours(), f"--port=tcp:{port}:interface={HOST}", *options]
        if database:
            command.append(f"--usage-db={database}")
        super().__init__(command, "Transit starting on", (port, port), database)


class Twisted(Relay):
    """magic-wormhole-transit-relay."""

    complaint = re.compile(r"Traceback|Unhandled|#(warn|error|critical)")
    exit_codes = (0, -signal.SIGTERM)

    def __init__(self, database: Path | None) -> None:
        ports = free_port(), free_port()
        plain, web = (f"tcp:{port}:interface={HOST}:backlog={BACKLOG}" for port in ports)
        command: list[str | Path] = [find_twisted(), "--log-format=text", "transitrelay"]
        command += [f"--port={plain}", f"--websocket={web}"]
        if database:
            command.append(f"--usage-db={database}")
        super().__init__(command, "Starting reactor", ports, database)


HAPROXY_CONFIGURATION = """\
global
    nbthread 1
    maxconn {connections}
    maxpipes {pipes}
{more_global}
defaults
    mode tcp
    timeout connect 5s
    timeout client 1m
    timeout server 1m
{more_defaults}
listen forwarder
    bind {host}:{entrance}
    server partner {host}:{exit}
"""
SPLICES = "    option splice-request\n    option splice-response\n"


class Forwarder(Program):
    """HAProxy. It makes no pairs: for each client that connects to it, it connects to us."""

    def __init__(self, folder: Path, more_global: str = "", more_defaults: str = "") -> None:
        """`more_global` and `more_defaults`: lines of its configuration, which goes to `folder`."""
        self._configuration = folder / "haproxy.cfg"
        self._more_global = more_global
        self._more_defaults = more_defaults
        self._port = free_port()
        super().__init__(find_haproxy(), "-db", "-f", self._configuration)

    def __enter__(self) -> Self:
        Between.__enter__(self)
        text = HAPROXY_CONFIGURATION.format(
            connections=HAPROXY_CONNECTIONS,
            pipes=2 * HAPROXY_CONNECTIONS,  # one for each direction, so that none has to copy
            more_global=self._more_global,
            more_defaults=self._more_defaults,
            host=HOST,
            entrance=self._port,
            exit=port_of(self._listener),
        )
        self._configuration.write_text(text)
        return super().__enter__()

    def kill(self) -> None:
        super().kill()
        self._listener.close()

    def wait_until_ready(self) -> None:
        def is_there() -> bool:
            try:
                self.pair().close()
            except ConnectionRefusedError:
                return False
            return True

        self.wait_for(is_there, "connection")

    def _entrance(self) -> int:
        return self._port


def port_of(listener: socket.socket) -> int:
    """Where it listens."""
    return int(listener.getsockname()[1])


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server((HOST, 0)) as listener:
        return port_of(listener)


def plain_environment() -> dict[str, str]:
    """Ours, without what changes how a Python runs: as an operator has it."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


# ---------------------------------------------------------------------------------------------
# How they are had
#
# Whatever is missing raises Unavailable, with the reason.
# ---------------------------------------------------------------------------------------------


def run(*command: str | Path) -> str:
    """One step of getting a comparator: give what it says on stdout."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=plain_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=GETTING_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{' '.join(map(str, command))}: {said[-1]}")
    return done.stdout.strip()


@functools.cache
def find_ours() -> Path:
    """Our entry, installed now: later changes of the source text do not matter to this run."""
    shutil.rmtree(STAGE, ignore_errors=True)
    run("make", "install", f"DESTDIR={STAGE}", "prefix=/usr")
    entry = STAGE / "usr" / "sbin" / "transit-relay"
    run(entry, "--version")  # so that it is compiled
    return entry


@functools.cache
def find_twisted() -> Path:
    """The Twisted relay's starter, in a venv of the Python that runs ours."""
    wanted = f"{run(PYTHON, '-VV')}\n{REQUIREMENTS.read_text()}"
    made_from = VENV / "made-from"
    pip = VENV / "bin" / "pip"
    if not made_from.exists() or made_from.read_text() != wanted:
        run(PYTHON, "-m", "venv", "--clear", VENV)
        run(pip, "install", "--quiet", "--constraint", REQUIREMENTS, TWISTED_PACKAGE)
        made_from.write_text(wanted)  # last, so that a venv left half made is made anew
    return VENV / "bin" / "twist"


@functools.cache
def find_haproxy() -> Path:
    """Debian's; it is where not every PATH leads."""
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        raise Unavailable("no haproxy: apt-get install --no-install-recommends haproxy")
    return Path(found)


def ours_without_splicing(folder: Path, database: Path | None) -> Between:
    """Ours, made to copy."""
    option = "--no-splice"
    if option not in run(find_ours(), "--help"):
        raise Unavailable(f"this transit-relay has no {option}")
    return Ours(database, option)


def haproxy(more_global: str = "", more_defaults: str = "") -> Maker:
    """With these lines in its configuration."""
    return lambda folder, database: Forwarder(folder, more_global, more_defaults)


# What makes a comparator. It is given an empty folder of its own, and where to keep a database if
# it is to keep one.
Maker = Callable[[Path, "Path | None"], Between]
COMPARATORS: dict[str, Maker] = {
    "ours": lambda folder, database: Ours(database),
    "ours-no-splice": ours_without_splicing,
    "twisted": lambda folder, database: Twisted(database),
    "twisted-db": lambda folder, database: Twisted(folder / "usage.sqlite"),
    "haproxy-splice": haproxy(more_defaults=SPLICES),
    "haproxy-splice-1m": haproxy("    tune.pipesize 1048576\n", SPLICES),
    "haproxy-copy": haproxy("    nosplice\n"),
    "direct": lambda folder, database: Between(),
    "interpreter": lambda folder, database: Program(PYTHON, "-c", SLEEP),
}


def versions() -> list[str]:
    """What is compared, as far as it can be had."""
    questions: list[Callable[[], str]] = [
        lambda: run(find_ours(), "--version"),
        lambda: run(PYTHON, "--version"),
        lambda: run(find_twisted().with_name("python"), "-c", TELL_VERSIONS),
        lambda: run(find_haproxy(), "-v").partition(" - ")[0],
    ]
    answers = []
    for ask in questions:
        with contextlib.suppress(Unavailable):
            answers.append(ask())
    return answers
