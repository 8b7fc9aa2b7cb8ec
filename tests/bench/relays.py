"""The comparators: how each is installed, started and ended, and how clients connect through it.

Each comparator is an Intermediary: two clients can be connected through it. Most are Programs. A
Program has one process, and a Chain has several Programs. All processes of a comparator share one
core; the load generator has another. The kernel reports the CPU time and memory of each process.
Entering a Program starts it; leaving it sends SIGTERM. An error message, a hang or an unusual exit
code is an error of the run.
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
from typing import Any, Self

import clients
from clients import HOST, LIMIT_SECONDS, Pair
from limits import find_limits

ROOT = Path(__file__).resolve().parent.parent.parent
BUILD = ROOT / "build" / "bench"
VENV = BUILD / "venv"
SOURCES = ("transit_relay.py", "ws_frames.py")
REQUIREMENTS = ROOT / "tests" / "interop" / "requirements.txt"
PYTHON = "/usr/bin/python3"  # runs our installed entry, so the Twisted relay uses it too
TWISTED_PACKAGE = "magic-wormhole-transit-relay"
PRINT_VERSIONS = f"""\
from importlib.metadata import version
print("{TWISTED_PACKAGE}", version("{TWISTED_PACKAGE}"), "with Twisted", version("Twisted"))
"""
SLEEP = "import time; time.sleep(3600)"  # the program of the comparator "interpreter"
CPUCLOCK_SCHED = 2  # linux/posix-timers.h
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
INSTALL_SECONDS = 300.0  # the time limit for one command that installs, such as pip
POLL_SECONDS = 0.005  # between two checks of a condition
SETTLED_SECONDS = 0.3  # without CPU and without a change in size: the process has no work left
BACKLOG = 1024  # of listeners: ours has this value; the Twisted relay's default is 50
FORWARDER_CONNECTIONS = 1000  # messages-500, the largest workload with a Forwarder, needs 500

# The relay uses the first core that we may use, the load generator the last one.
CORES = sorted(os.sched_getaffinity(0))
RELAY_CORE, LOAD_CORE = CORES[0], CORES[-1]


class Unavailable(Exception):
    """A comparator is not available here; the text is the reason."""


class RelayError(Exception):
    """A comparator failed."""


# ---------------------------------------------------------------------------------------------
# Kinds of comparators
# ---------------------------------------------------------------------------------------------


class Intermediary:
    """The base class connects the two clients directly, without a relay."""

    def __enter__(self) -> Self:
        self._listener = socket.create_server((HOST, 0), backlog=BACKLOG)
        self._listener.settimeout(LIMIT_SECONDS)
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def pair(
        self, websocket: tuple[bool, bool] = (False, False), buffer_bytes: int | None = None
    ) -> Pair:
        """Return two connected clients, ready to send and receive.

        `websocket`: which of the two clients use WebSocket. `buffer_bytes`: see clients.prepare.
        """
        assert websocket == (False, False)
        clients.prepare(self._listener, buffer_bytes)
        first = clients.connect(self._first_port(), buffer_bytes)
        second, _ = self._listener.accept()
        second.settimeout(LIMIT_SECONDS)
        return Pair(first, second)

    def _first_port(self) -> int:
        """Return the port that the first client connects to; we accept the second client."""
        return port_of(self._listener)

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, by all threads, user and system."""
        return 0.0

    def cpu_clocks(self) -> dict[str, float]:
        """Return CPU times used so far. The keys are prefixes of metrics, "" for all processes."""
        return {"": self.cpu_seconds()}

    def settle(self) -> None:
        """Wait until no process has work left."""


class Program(Intermediary):
    """A process. The base class runs a command and sends nothing through it."""

    error_pattern = re.compile(r"warning|error|critical|Traceback", re.IGNORECASE)
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
        has_ended = self._process.poll() is not None  # then its output explains the error
        try:
            if has_ended or not any(error):
                self.stop()
        finally:
            self.kill()

    def spawn(self) -> None:
        """Start the process on the relay's core."""
        self._output = tempfile.TemporaryFile()
        os.sched_setaffinity(0, {RELAY_CORE})  # a new process inherits it
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
        """Wait until the program accepts clients."""

    def wait_for(
        self, condition: Callable[[], bool], label: str, poll_seconds: float = POLL_SECONDS
    ) -> None:
        """Wait until the condition is true.

        Raise RelayError if that takes too long, or if the process ends.
        """
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RelayError(f"no {label}; its output ends: {self.output()[-500:]!r}")
            time.sleep(poll_seconds)

    def stop(self) -> None:
        """End the process.

        Raise RelayError if it hangs, printed an error message, or has an unusual exit code.
        """
        self._process.send_signal(signal.SIGTERM)
        try:
            code = self._process.wait(LIMIT_SECONDS)
        except subprocess.TimeoutExpired:
            raise RelayError(f"still running {LIMIT_SECONDS:g} s after SIGTERM") from None
        for line in self.output().splitlines():
            if self.error_pattern.search(line):
                raise RelayError(f"it printed: {line}")
        if code not in self.exit_codes:
            raise RelayError(f"exit code {code}; its output ends: {self.output()[-500:]!r}")

    def kill(self) -> None:
        """Kill the process if it is still running, and delete its output."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def output(self) -> str:
        """Return all that the process has written to stdout and stderr."""
        fd = self._output.fileno()
        return os.pread(fd, os.fstat(fd).st_size, 0).decode(errors="replace")

    def cpu_seconds(self) -> float:
        # The clock of clock_getcpuclockid(3) has nanoseconds; /proc/PID/stat has ticks of 10 ms.
        return time.clock_gettime(~self._process.pid << 3 | CPUCLOCK_SCHED)

    def resident_bytes(self) -> int:
        """Return the size of the process in memory: proc(5)."""
        statm = Path("/proc", str(self._process.pid), "statm").read_text()
        return int(statm.split()[1]) * PAGE_BYTES

    def settle(self) -> None:
        """Wait until the process has no work left."""
        deadline = time.monotonic() + LIMIT_SECONDS
        before = None
        while (now := (round(self.cpu_seconds(), 2), self.resident_bytes())) != before:
            if time.monotonic() > deadline:
                raise RelayError(f"still busy after {LIMIT_SECONDS:g} s without load")
            before = now
            time.sleep(SETTLED_SECONDS)


class Rendezvous(Intermediary):
    """The base class of all that makes pairs by token."""

    _ports: tuple[int, int]  # for TCP and for WebSocket clients

    def connect(
        self, token: str, side: str, is_websocket: bool = False, buffer_bytes: int | None = None
    ) -> socket.socket:
        """Return a client that has sent its handshake."""
        sock = clients.connect(self._ports[is_websocket], buffer_bytes)
        clients.send_handshake(sock, is_websocket, token, side)
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


class Relay(Program, Rendezvous):
    """A relay: ours or the Twisted one."""

    def __init__(
        self,
        command: Sequence[str | Path],
        ready: str,
        ports: tuple[int, int],
        database: Path | None,
    ) -> None:
        """`ready`: printed when the relay listens. `ports`: for TCP and for WebSocket clients."""
        super().__init__(*command)
        self._ready = ready
        self._ports = ports
        self._database = database

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: self._ready in self.output(), "start message")

    def wait_until_reachable(self) -> None:
        """Wait until a client can connect, and return a fraction of a millisecond later."""
        self.wait_for(lambda: can_connect(self._ports[0]), "connection", poll_seconds=0.0002)

    def usage_rows(self) -> int:
        """Return the number of records in the relay's database."""
        assert self._database is not None
        with contextlib.closing(sqlite3.connect(self._database)) as db:
            (count,) = db.execute("SELECT count(*) FROM usage").fetchone()
        return int(count)


class TransitRelay(Relay):
    """This project's relay, as `make install` installs it, from this or another checkout."""

    exit_codes = (0,)

    def __init__(self, entry: Path, database: Path | None, *options: str) -> None:
        self.port = free_port()
        command: list[str | Path] = [entry, f"--port=tcp:{self.port}:interface={HOST}", *options]
        if database:
            command.append(f"--usage-db={database}")
        super().__init__(command, "Transit starting on", (self.port, self.port), database)


class Twisted(Relay):
    """magic-wormhole-transit-relay, which uses Twisted."""

    error_pattern = re.compile(r"Traceback|Unhandled|#(warn|error|critical)")
    exit_codes = (0, -signal.SIGTERM)

    def __init__(self, database: Path | None) -> None:
        ports = free_port(), free_port()
        tcp, websocket = (f"tcp:{port}:interface={HOST}:backlog={BACKLOG}" for port in ports)
        command: list[str | Path] = [find_twisted(), "--log-format=text", "transitrelay"]
        command += [f"--port={tcp}", f"--websocket={websocket}"]
        if database:
            command.append(f"--usage-db={database}")
        super().__init__(command, "Starting reactor", ports, database)


class Chain(Rendezvous):
    """Relays, and a program in front of them that connects to one of them for each client."""

    def __init__(self, relays: Sequence[Relay], front: Program, ports: tuple[int, int]) -> None:
        """`ports`: for TCP and for WebSocket clients."""
        self._relays = relays
        self._front = front
        self._ports = ports

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for program in (*self._relays, self._front):
                stack.enter_context(program)
            self._programs = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._programs.__exit__(*error)

    def cpu_seconds(self) -> float:
        return sum(program.cpu_seconds() for program in (*self._relays, self._front))

    def cpu_clocks(self) -> dict[str, float]:
        return {**super().cpu_clocks(), "front_": self._front.cpu_seconds()}

    def settle(self) -> None:
        for program in (*self._relays, self._front):
            program.settle()


class Balancer(Program):
    """HAProxy in front of relays, by the recipe for many relays."""

    RECIPE = ROOT / "packaging" / "haproxy" / "transit-relay-many.cfg"
    SERVERS = re.compile(r"    server relay.*\n")

    def __init__(self, folder: Path, port: int, endpoints: Sequence[Path]) -> None:
        """`folder`: for its files. `endpoints`: the unix sockets of the relays."""
        self._folder = folder
        self._port = port
        self._endpoints = endpoints
        super().__init__(find_haproxy(), "-db", "-f", folder / "haproxy.cfg")

    def spawn(self) -> None:
        text = self.RECIPE.read_text(encoding="utf-8")
        for old, new in {
            "    user haproxy\n    group haproxy\n": "    nbthread 1\n",
            "socket /run/haproxy/": f"socket {self._folder}/",
            "    server-state-file /run/haproxy/servers\n": "",
            "    load-server-state-from-file global\n": "",
            "peer one 127.0.0.1:10000": f"peer one {HOST}:{free_port()}",
            "bind :::4001 v4v6": f"bind {HOST}:{self._port}",
        }.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        servers = (
            f"    server relay{number} unix@{path} id {number}\n"
            for number, path in enumerate(self._endpoints, 1)
        )
        head, *_, tail = self.SERVERS.split(text)
        (self._folder / "haproxy.cfg").write_text(f"{head}{''.join(servers)}{tail}")
        super().spawn()

    def wait_until_ready(self) -> None:
        self.wait_for(lambda: can_connect(self._port), "connection")


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
    """HAProxy. It makes no pairs: for each client it opens a connection to our listener."""

    def __init__(self, folder: Path, more_global: str = "", more_defaults: str = "") -> None:
        """`folder`: for the configuration file. `more_*`: lines for its two sections."""
        self._configuration = folder / "haproxy.cfg"
        self._more_global = more_global
        self._more_defaults = more_defaults
        self._port = free_port()
        super().__init__(find_haproxy(), "-db", "-f", self._configuration)

    def __enter__(self) -> Self:
        Intermediary.__enter__(self)
        text = HAPROXY_CONFIGURATION.format(
            connections=FORWARDER_CONNECTIONS,
            pipes=2 * FORWARDER_CONNECTIONS,  # one for each direction, so that none has to copy
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
        def can_connect() -> bool:
            try:
                self.pair().close()
            except ConnectionRefusedError:
                return False
            return True

        self.wait_for(can_connect, "connection")

    def _first_port(self) -> int:
        return self._port


def can_connect(port: int) -> bool:
    """Return whether a program listens on a port."""
    try:
        clients.connect(port).close()
    except ConnectionRefusedError:
        return False
    return True


def port_of(listener: socket.socket) -> int:
    """Return the port of a listener."""
    return int(listener.getsockname()[1])


def free_port() -> int:
    """Return a port that no program listens on. Another program may take it before it is used."""
    with socket.create_server((HOST, 0)) as listener:
        return port_of(listener)


def plain_environment() -> dict[str, str]:
    """Return our environment without the variables that change how Python runs."""
    return {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}


# ---------------------------------------------------------------------------------------------
# Installation
#
# A function raises Unavailable, with the reason, if something is missing.
# ---------------------------------------------------------------------------------------------


def run(*command: str | Path) -> str:
    """Run a command and return its output."""
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=plain_environment(),
            capture_output=True,
            text=True,
            errors="replace",
            timeout=INSTALL_SECONDS,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(str(error)) from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no message"]
        raise Unavailable(f"{' '.join(map(str, command))}: {lines[-1]}")
    return done.stdout.strip()


@functools.cache
def install(checkout: Path) -> Path:
    """Install the relay of a checkout, and return its entry.

    Later changes of the source text do not affect this run. The relay of another checkout is
    installed by our Makefile too, so that only the SOURCES differ.
    """
    stage = BUILD / ("stage" if checkout == ROOT else "stage-before")
    shutil.rmtree(stage, ignore_errors=True)
    run("make", "install", f"DESTDIR={stage}", "prefix=/usr")
    if checkout != ROOT:
        for name in SOURCES:
            try:
                shutil.copy(checkout / name, stage / "usr" / "share" / "transit-relay")
            except OSError as error:
                raise Unavailable(str(error)) from None
    entry = stage / "usr" / "sbin" / "transit-relay"
    run(entry, "--version")  # the first start compiles the modules
    return entry


@functools.cache
def find_twisted() -> Path:
    """Install the Twisted relay in a venv, and return the command that starts it."""
    wanted = f"{run(PYTHON, '-VV')}\n{REQUIREMENTS.read_text()}"
    made_from = VENV / "made-from"
    pip = VENV / "bin" / "pip"
    if not made_from.exists() or made_from.read_text() != wanted:
        run(PYTHON, "-m", "venv", "--clear", VENV)
        run(pip, "install", "--quiet", "--constraint", REQUIREMENTS, TWISTED_PACKAGE)
        made_from.write_text(wanted)  # last: an incomplete venv is made again
    return VENV / "bin" / "twist"


@functools.cache
def find_haproxy() -> Path:
    """Return Debian's HAProxy. /usr/sbin is not in every PATH."""
    found = shutil.which("haproxy", path=f"{os.environ['PATH']}:/usr/sbin")
    if not found:
        raise Unavailable("no haproxy: apt-get install --no-install-recommends haproxy")
    return Path(found)


def ours_without_splicing(folder: Path, database: Path | None) -> Intermediary:
    """Return our relay with splicing switched off."""
    option = "--no-splice"
    if option not in run(install(ROOT), "--help"):
        raise Unavailable(f"this transit-relay has no {option}")
    return TransitRelay(install(ROOT), database, option)


@functools.cache
def options_without_limits() -> tuple[str, ...]:
    """Return the options that switch all limits of our relay off."""
    names = find_limits(run(install(ROOT), "--help"))
    if not names:
        raise Unavailable("the --help of this transit-relay lists no limits")
    return tuple(f"{name}=0" for name in names)


def ours_without_limits(folder: Path, database: Path | None) -> Intermediary:
    """Return our relay with all limits switched off."""
    return TransitRelay(install(ROOT), database, *options_without_limits())


def haproxy(more_global: str = "", more_defaults: str = "") -> Maker:
    """Return a maker of HAProxy with these lines in its configuration."""
    return lambda folder, database: Forwarder(folder, more_global, more_defaults)


def ours_behind_haproxy(count: int) -> Maker:
    """Return a maker of so many relays of ours behind HAProxy."""

    def make(folder: Path, database: Path | None) -> Intermediary:
        paths = [folder / f"relay-{number}" for number in range(1, count + 1)]
        relays = [
            TransitRelay(install(ROOT), None, f"--port=haproxy:unix:{path}") for path in paths
        ]
        port = free_port()
        return Chain(relays, Balancer(folder, port, paths), (port, port))

    return make


def ours_behind_gateway(folder: Path, database: Path | None) -> Intermediary:
    """Return a relay of ours behind a gateway for WebSocket clients. TCP clients need none."""
    path = folder / "relay-1"
    relay = TransitRelay(install(ROOT), None, f"--port=haproxy:unix:{path}")
    gateway = TransitRelay(install(ROOT), None, f"--forward=haproxy:unix:{path}")
    return Chain([relay], gateway, (relay.port, gateway.port))


# A Maker returns a comparator that is not started yet. Its arguments are an empty folder, and the
# path of the usage database or None.
Maker = Callable[[Path, "Path | None"], Intermediary]
MAKERS: dict[str, Maker] = {
    "ours": lambda folder, database: TransitRelay(install(ROOT), database),
    "ours-no-limits": ours_without_limits,
    "ours-no-splice": ours_without_splicing,
    "twisted": lambda folder, database: Twisted(database),
    "twisted-db": lambda folder, database: Twisted(folder / "usage.sqlite"),
    "haproxy-splice": haproxy(more_defaults=SPLICES),
    "haproxy-splice-1m": haproxy("    tune.pipesize 1048576\n", SPLICES),
    "haproxy-copy": haproxy("    nosplice\n"),
    "haproxy-1-relay": ours_behind_haproxy(1),
    "haproxy-2-relays": ours_behind_haproxy(2),
    "gateway-1-relay": ours_behind_gateway,
    "direct": lambda folder, database: Intermediary(),
    "interpreter": lambda folder, database: Program(PYTHON, "-c", SLEEP),
}


def makers(against: Path | None) -> dict[str, Maker]:
    """Return all makers by name. "before" is the relay of the checkout `against`, if given.

    "before" gets no option of a limit, because it may not know it.
    """
    if against is None:
        return MAKERS
    return {**MAKERS, "before": lambda folder, database: TransitRelay(install(against), database)}


def describe(checkout: Path) -> str:
    """Return the version of a checkout's relay, with the commit if Git has one."""
    version = run(install(checkout), "--version")
    try:
        return f"{version} ({run('git', '-C', checkout, 'describe', '--always', '--dirty')})"
    except Unavailable:
        return version


def versions(against: Path | None) -> list[str]:
    """Return the versions of the available comparators."""
    questions: list[Callable[[], str]] = [
        lambda: describe(ROOT),
        lambda: run(PYTHON, "--version"),
    ]
    if against:
        questions.append(lambda: f"before: {describe(against)}")
    else:
        questions += [
            lambda: run(find_twisted().with_name("python"), "-c", PRINT_VERSIONS),
            lambda: run(find_haproxy(), "-v").partition(" - ")[0],
        ]
    answers = []
    for ask in questions:
        with contextlib.suppress(Unavailable):
            answers.append(ask())
    return answers
