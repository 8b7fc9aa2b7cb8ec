"""A relay that is watched from outside: its records, descriptors, memory and CPU time.

A Scene is one relay, checked transfers beside it, and the Books: what the clients counted. At its
end the relay's records, and the numbers of ended pairs and relayed bytes in its status, must be
those of the Books.
"""

from __future__ import annotations

import ctypes
import heapq
import json
import os
import random
import re
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import termios
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from itertools import count, cycle
from pathlib import Path
from typing import NamedTuple, TypeVar

import bystanders
from bystanders import delayed_seconds
from flood import proxy_header
from helpers import (
    DIRECTIONS,
    RELAY,
    TIMEOUT,
    Client,
    RelayProcess,
    WebSocketClient,
    eventually,
    handshake,
    snapshot_with,
)
from interop.children import Child, Lines, Record
from processes import Code, patched

from transit_relay import count_text, query_descriptor, status_line

Number = TypeVar("Number", int, float)
IS_SHORT = os.environ.get("RELAY_HOSTILE_SHORT") == "1"  # for CI: smaller numbers
HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parent}:{RELAY.parent}"}
CLONE_NEWNET = 0x40000000  # linux/sched.h; Python has os.setns from 3.12 on
STATUS_SECONDS = 0.5  # how often these relays send their status: tests wait for it
IDLE_SHARE = 0.02  # of a core, at most, without work
IDLE_RATIO = 2  # with transfers: at most so many times the share before
SERVED_SECONDS = 1.0  # the longest time until an honest pair is served
SERVED_RATIO = 100  # or so many times the median of a quiet run, if that is longer

MEBIBYTE = 1 << 20
STALL_RECEIVE_BYTES = 64 * 1024  # of the kernel, which doubles it: the relay reads so much at once

# The changes of a watched relay: it sends its status often, and with all digits of the bytes.
WATCHED = {
    "STATUS_SECONDS": STATUS_SECONDS,
    "LATE_TURN_SECONDS": 1e9,  # the machine is busy; the status is compared
    "size_text": Code("lambda size: t.count_text(size, 'byte')"),
}
PROGRAM = patched(**WATCHED)
HAPROXY = ("--port", "haproxy:tcp:0:interface=127.0.0.1")  # a port for clients with PROXY headers


def shorter(whole: Number, short: Number) -> Number:
    """Return a number for the whole form of a test, or for the short form."""
    return short if IS_SHORT else whole


SHARE_SECONDS = shorter(1.0, 0.5)  # of real time, in which a share of the CPU is measured


def has_option(name: str) -> bool:
    """Return whether this relay has an option."""
    command = [sys.executable, str(RELAY), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    return name in done.stdout


@contextmanager
def in_namespace(name: str | None) -> Iterator[None]:
    """Let this thread make its sockets in a network namespace; None: in its own."""
    if name is None:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    with open("/proc/thread-self/ns/net") as ours, open(f"/run/netns/{name}") as theirs:
        if libc.setns(theirs.fileno(), CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        try:
            yield
        finally:
            assert libc.setns(ours.fileno(), CLONE_NEWNET) == 0


# ---------------------------------------------------------------------------------------------
# Books
# ---------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """The fields of a record that the clients know."""

    mood: str
    total_bytes: int


class Range(NamedTuple):
    """A record of which the clients know only limits, both inclusive."""

    mood: str
    low_bytes: int
    high_bytes: int


class Books:
    """The records that must exist, as the clients counted. Threads may share it."""

    def __init__(self) -> None:
        self._exact: Counter[Outcome] = Counter()
        self._ranges: list[Range] = []
        self._lock = threading.Lock()

    def add(self, mood: str, total_bytes: int = 0, times: int = 1) -> None:
        """Note `times` records."""
        with self._lock:
            self._exact[Outcome(mood, total_bytes)] += times

    def add_range(self, mood: str, low_bytes: int, high_bytes: int) -> None:
        """Note a record whose bytes are known within limits."""
        with self._lock:
            self._ranges.append(Range(mood, low_bytes, high_bytes))

    def __len__(self) -> int:
        with self._lock:
            return sum(self._exact.values()) + len(self._ranges)

    def pairs(self) -> int:
        """Return how many of the records are those of pairs."""
        with self._lock:
            exact = sum(times for one, times in self._exact.items() if one.mood == "happy")
            return exact + sum(one.mood == "happy" for one in self._ranges)

    def check(self, records: Sequence[Outcome]) -> None:
        """Raise AssertionError unless the records are exactly those of the books."""
        found = Counter(records)
        missing, others = self._exact - found, found - self._exact
        assert not missing, f"not recorded: {missing}; recorded instead: {others}"
        self._check_ranges(sorted(others.elements()))

    def _check_ranges(self, records: Sequence[Outcome]) -> None:
        """Match each record with a range, in the order of the bytes: that of the least upper end.

        If there is any match of all, this is one.
        """
        assert len(records) == len(self._ranges), f"{records} do not match {self._ranges}"
        for mood in {record.mood for record in records}:
            ranges = deque(sorted(one for one in self._ranges if one.mood == mood))
            begun: list[int] = []  # the upper ends of ranges that a record can match
            for _, size in (record for record in records if record.mood == mood):
                while ranges and ranges[0].low_bytes <= size:
                    heapq.heappush(begun, ranges.popleft().high_bytes)
                assert begun, f"{mood}, {size} bytes: recorded, but not in the books"
                high = heapq.heappop(begun)
                assert size <= high, f"{mood}, {size} bytes: too many, the most is {high}"


def rows(database: Path) -> list[Outcome]:
    """Return the records in a usage database."""
    with closing(sqlite3.connect(database, timeout=TIMEOUT)) as db:
        return [Outcome(*row) for row in db.execute("SELECT result, total_bytes FROM usage")]


# ---------------------------------------------------------------------------------------------
# The relay
# ---------------------------------------------------------------------------------------------


class StatusReader(threading.Thread):
    """Receives the messages to NOTIFY_SOCKET, and keeps the last one.

    A thread receives all the time. The kernel queues ten messages (max_dgram_qlen), and the relay
    warns when the queue is full.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        # A path is the same in all network namespaces. An abstract address is not.
        self._folder = tempfile.TemporaryDirectory()
        self.path = f"{self._folder.name}/notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._progress = threading.Condition()
        self._last = ""
        self.start()

    def run(self) -> None:
        while message := self._socket.recv(4096):
            with self._progress:
                self._last = message.decode()
                self._progress.notify()

    def wait_for(self, beginning: str) -> str:
        """Wait until the last message begins with `beginning`, and return it."""
        with self._progress:
            has_come = self._progress.wait_for(
                lambda: self._last and self._last.startswith(beginning), 4 * TIMEOUT
            )
            assert has_come, f"not {beginning!r}, but {self._last!r}"
            return self._last

    def close(self) -> None:
        """End the thread, with an empty message."""
        self._socket.sendto(b"", self.path)
        self.join(TIMEOUT)
        assert not self.is_alive(), "the thread has not ended"
        self._socket.close()
        self._folder.cleanup()


def idle_status(pairs_ended: int, relayed_bytes: int) -> str:
    """Return the status of a relay without clients."""
    text, _, _ = status_line(snapshot_with(pairs_ended=pairs_ended)).rpartition(", ")
    return f"STATUS={text}, {count_text(relayed_bytes, 'byte')} relayed"


def check_status(status: str, records: Sequence[Outcome]) -> None:
    """Raise AssertionError unless an idle status has the pairs and the bytes of all records."""
    sizes = [size for mood, size in records if mood == "happy"]
    counted = idle_status(len(sizes), sum(sizes))
    assert status == counted, f"{status!r}, but the records have {counted!r}"
    print(status)


class WatchedRelay(RelayProcess):
    """A relay with `--log-fd` and NOTIFY_SOCKET. Its endpoint takes both encodings."""

    def __init__(
        self,
        *options: str,
        program: Sequence[str] = PROGRAM,
        host: str = "127.0.0.1",
        namespace: str | None = None,
        pass_fds: Sequence[int] = (),
        log_fd: int | None = None,
    ) -> None:
        """`host`: where clients connect, from `namespace`. `log_fd`: for the records.

        None: this object makes a pipe and reads them.
        """
        read_end, write_end = os.pipe() if log_fd is None else (-1, log_fd)
        endpoint = "tcp:0" if namespace else f"tcp:0:interface={host}"
        self._status = StatusReader()
        try:
            super().__init__(
                *("--port", endpoint, "--log-fd", str(write_end), *options),
                program=program,
                env={**os.environ, "NOTIFY_SOCKET": self._status.path},
                pass_fds=[write_end, *pass_fds],
            )
        except BaseException:
            self._status.close()
            if log_fd is None:
                os.close(read_end)
            raise
        finally:
            os.close(write_end)
        self.host = host
        self.namespace = namespace
        self._lines = Lines(open(read_end, encoding="ascii")) if log_fd is None else None
        self._tokens = count()

    def started(self) -> WatchedRelay:
        super().started()
        self._status.wait_for("")  # the descriptor for it is open, and stays open
        self.address = (self.host, self.port)
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._status.close()
        if self._lines is not None:
            self._lines.close()

    @property
    def port(self) -> int:
        """Return the port of the tcp endpoint."""
        match = re.search(rb"Transit starting on .*?tcp:(\d+)", self.stderr)
        assert match, self.stderr
        return int(match[1])

    @property
    def haproxy_port(self) -> int:
        """Return the port of a relay with the options HAPROXY, for connections with a header."""
        match = re.search(rb"haproxy:tcp:(\d+)", self.stderr)
        assert match, self.stderr
        return int(match[1])

    def last_status(self, pairs_ended: int) -> str:
        """Wait for a status without clients and with so many pairs, and return it."""
        before_bytes, _, _ = idle_status(pairs_ended, 0).rpartition(", ")
        return self._status.wait_for(before_bytes)

    def records(self, number: int | None = None) -> list[Outcome]:
        """Wait for the next `number` records; None: for all that are left when it has stopped."""
        assert self._lines is not None
        read = [self._lines.next() for _ in range(number or 0)]
        lines = self._lines.rest() if number is None else read
        assert all(lines), "the relay has ended"
        found = [Record.parse(line) for line in lines if line]
        return [Outcome(record.mood, record.total_bytes) for record in found]

    def client(
        self,
        kind: str = "tcp",
        *,
        source: str | None = None,
        buffer_bytes: int | None = None,
        upgrade: bool = True,
        namespace: str | None = None,
    ) -> Client:
        """Return a new client of a kind, tcp or ws.

        `source`: its address; one outside 127.0.0.0/8 is in a PROXY header. `buffer_bytes`: the
        size of its kernel buffers.
        """
        has_header = source is not None and not source.startswith("127.")
        with in_namespace(namespace or self.namespace):
            sock = socket.socket()
        sock.settimeout(TIMEOUT)
        if buffer_bytes is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        if source is not None and not has_header:
            sock.bind((source, 0))
        sock.connect((self.host, self.haproxy_port) if has_header else self.address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if source is not None and has_header:
            sock.sendall(proxy_header(source))
        if kind == "tcp":
            return Client(sock)
        return WebSocketClient(sock, upgrade=upgrade, seed=next(self._seeds))

    def new_token(self) -> str:
        """Return a token that no other pair of this relay has."""
        return f"watched{next(self._tokens)}x"

    def couple(self, one: Client, other: Client, token: str | None = None) -> None:
        """Send the handshakes of a pair, and read both `ok`."""
        token = token or self.new_token()
        one.send(handshake(token, "one"))
        other.send(handshake(token, "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"

    def settle(self, books: Books) -> None:
        """Return when the relay has served all that came before the call.

        Connections are served in the order in which they became ready. The pair here needs
        several turns.
        """
        honest_pair(self, books)

    def open_files(self) -> Counter[str]:
        """Return how many descriptors of each kind are open.

        Those of the pool of pipes, and SQLite's journal, come and go: they are left out. The pool
        keeps up to MAX_IDLE_PIPES pipes for the next reads.
        """
        pool = {target for target, _ in self._pool_pipes()}
        kinds: Counter[str] = Counter()
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                target = os.readlink(f"/proc/{self.pid}/fd/{fd}")
                if target not in pool and not target.endswith("-journal"):
                    kinds[target.split(":")[0]] += 1
        return kinds

    def pool_bytes(self) -> list[int]:
        """Return how many bytes are in each pipe of its pool."""
        found = []
        for _, fd in self._pool_pipes():
            ours = os.open(f"/proc/{self.pid}/fd/{fd}", os.O_RDONLY | os.O_NONBLOCK)
            size = query_descriptor(ours, termios.FIONREAD)
            os.close(ours)
            assert size is not None
            found.append(size)
        return found

    def _pool_pipes(self) -> Iterator[tuple[str, str]]:
        """Yield name and descriptor of each pipe that the relay reads. Only the pool has such."""
        for fd in os.listdir(f"/proc/{self.pid}/fd"):
            with suppress(FileNotFoundError):  # closed meanwhile
                target = os.readlink(f"/proc/{self.pid}/fd/{fd}")
                info = Path(f"/proc/{self.pid}/fdinfo/{fd}").read_text()
                is_reading = re.search(r"(?m)^flags:\s*\d*0$", info)  # O_RDONLY, in octal
                if target.startswith("pipe:") and is_reading:
                    yield target, fd

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads."""
        total = 0
        for thread in Path(f"/proc/{self.pid}/task").iterdir():
            total += int((thread / "schedstat").read_text().split()[0])
        return total / 1e9

    def cpu_share(self) -> float:
        """Return how much of a core it uses. That needs real time: SHARE_SECONDS."""
        before = self.cpu_seconds()
        time.sleep(SHARE_SECONDS)
        return (self.cpu_seconds() - before) / SHARE_SECONDS

    def check_idle(self, before: float = 0.0) -> None:
        """Raise AssertionError if it uses CPU time without work, or more than `before`."""
        share = self.cpu_share()
        print(f"idle: {100 * share:.1f} % of a core, before: {100 * before:.1f} %")
        assert share < IDLE_RATIO * before + IDLE_SHARE

    def virtual_bytes(self) -> int:
        """Return the size of its address space, which RLIMIT_AS limits."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[0]) * os.sysconf("SC_PAGE_SIZE")


# ---------------------------------------------------------------------------------------------
# Honest clients
# ---------------------------------------------------------------------------------------------

_kinds = cycle(DIRECTIONS)
_chance = random.Random(1)


class Served(NamedTuple):
    """How long an honest pair waited, without the time that it and the relay waited for a core.

    The load of the machine must not fail a test.
    """

    seconds: float  # until its bytes had come
    connect_seconds: float  # of that: until both were connected, which the kernel alone does


def honest_pair(
    relay: WatchedRelay,
    books: Books,
    source: str | None = None,
    settle: Callable[[], None] | None = None,
) -> Served:
    """Make a pair, pass bytes both ways, end it in order. Return how long it waited.

    `settle` is called behind the handshake of the first client, before the second one connects.
    """
    there, back = _chance.randbytes(1_000), _chance.randbytes(1_000)
    began = time.monotonic() - delayed_seconds(relay.pid)
    kinds, token = next(_kinds), relay.new_token()
    with relay.client(kinds[0], source=source) as one:
        if settle is not None:
            one.send(handshake(token, "one"))
            settle()
        with relay.client(kinds[1], source=source) as other:
            connected = time.monotonic() - delayed_seconds(relay.pid) - began
            if settle is None:
                one.send(handshake(token, "one"))
            other.send(handshake(token, "other"))
            assert one.receive(3) == other.receive(3) == b"ok\n"
            one.send(there)
            assert other.receive(len(there)) == there
            other.send(back)
            assert one.receive(len(back)) == back
            elapsed = time.monotonic() - delayed_seconds(relay.pid) - began
            one.half_close()
            assert other.read_to_end() == one.read_to_end() == b""
    books.add("happy", len(there) + len(back))
    return Served(elapsed, connected)


class Probes(threading.Thread):
    """Honest pairs, one after the other, during the `with` block. The first ones are quiet.

    Their pause is real time: without it they would be a load of their own.
    """

    PAUSE_SECONDS = 0.1
    QUIET = 20  # the number of probes before the block
    SOURCE = "127.0.99.1"  # no attacker uses it

    def __init__(self, relay: WatchedRelay, books: Books, source: str = SOURCE) -> None:
        super().__init__()
        self._relay, self._books, self._source = relay, books, source
        self._stopping = threading.Event()
        self._progress = threading.Condition()
        self._error: BaseException | None = None
        self.served: list[Served] = []

    def __enter__(self) -> Probes:
        quiet = [honest_pair(self._relay, self._books, self._source) for _ in range(self.QUIET)]
        self.quiet_seconds = statistics.median(one.seconds for one in quiet)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join()
        if self._error is not None:
            raise self._error

    def run(self) -> None:
        try:
            while not self._stopping.wait(self.PAUSE_SECONDS):
                served = honest_pair(self._relay, self._books, self._source)
                with self._progress:
                    self.served.append(served)
                    self._progress.notify()
        except BaseException as error:
            with self._progress:
                self._error = error
                self._progress.notify()

    def wait_for_more(self, number: int = 5) -> None:
        """Wait until so many probes have begun and ended from now on."""
        with self._progress:
            goal = len(self.served) + number + 1  # the current one began earlier
            self._progress.wait_for(
                lambda: len(self.served) >= goal or self._error is not None, 20 * TIMEOUT
            )
            assert len(self.served) >= goal, f"{goal} probes: {self._error!r}"

    def check(self) -> None:
        """Raise AssertionError if a probe was not served in time."""
        worst = max(self.served)
        median_seconds = statistics.median(one.seconds for one in self.served)
        limit = max(SERVED_SECONDS, SERVED_RATIO * self.quiet_seconds)
        print(
            f"{len(self.served)} honest pairs: quiet {1000 * self.quiet_seconds:.1f} ms, median"
            f" {1000 * median_seconds:.1f} ms, longest {1000 * worst.seconds:.1f} ms"
        )
        assert worst.seconds < limit, f"an honest pair was served too late: {worst}"


class Bystanders(Child):
    """Checked transfers in a process of their own: see bystanders.py."""

    def __init__(
        self,
        relay: WatchedRelay,
        *options: str,
        address: tuple[str, int] | None = None,
        namespace: str | None = None,
    ) -> None:
        """`address`, `namespace`: where they connect, and from where; default: as other clients."""
        host, port = address or relay.address
        namespace = namespace or relay.namespace
        script = [sys.executable, str(HERE / "bystanders.py"), str(port), "--host", host]
        script += ["--relay", str(relay.pid)]
        inside = ["ip", "netns", "exec", namespace] if namespace else []
        super().__init__([*inside, *script, *options], env=ENVIRONMENT)
        self.lines.until("^ready$")

    def finish(self, books: Books) -> bystanders.Result:
        """End the transfers, whose bytes and ends must be right, and note them in the books."""
        self._process.terminate()
        found = self.lines.until(r"^\[\[.*").group()
        self.succeed()
        result = bystanders.Result(*json.loads(found))
        for sent, received in zip(result.sent_bytes, result.received_bytes):
            if sent == received:
                books.add("happy", sent)
            else:
                books.add_range("happy", received, sent)
        return result


@contextmanager
def stalling_listener(
    send_bytes: int = 4096, receive_bytes: int = STALL_RECEIVE_BYTES
) -> Iterator[socket.socket]:
    """Yield a listener for clients that do not read. Its connections have small kernel buffers.

    Otherwise the kernel would hold megabytes for each of them. The arguments are the sizes of the
    buffers, which the kernel doubles.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        yield listener


# ---------------------------------------------------------------------------------------------
# A scene
# ---------------------------------------------------------------------------------------------


class Scene:
    """A relay, transfers beside it, and the books. The end of the `with` block checks all."""

    def __init__(
        self,
        *options: str,
        bystander_options: Sequence[str] = (),
        may_warn: Sequence[str] = (),
        **relay_options: object,
    ) -> None:
        """`options`: the relay's. `may_warn`: patterns of warnings and errors that may come."""
        self._options = options
        self._relay_options = relay_options
        self._bystander_options = bystander_options
        self._may_warn = may_warn
        self._resources = ExitStack()
        self.books = Books()
        self._checked: list[Outcome] = []  # the records before the last checkpoint
        self.grown_bytes = 0  # how much the relay's memory grew in a flood

    def __enter__(self) -> Scene:
        with ExitStack() as resources:
            relay = WatchedRelay(*self._options, **self._relay_options)  # type: ignore[arg-type]
            self.relay = resources.enter_context(relay)
            relay.started()
            self._files = relay.open_files()
            self.bystanders = resources.enter_context(Bystanders(relay, *self._bystander_options))
            self.files_beside = relay.open_files()
            self._resources = resources.pop_all()
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        with self._resources:
            if kind is None:
                self._check()
            else:
                print(f"the relay's messages:\n{self.relay.read_messages()}")

    def checkpoint(self) -> None:
        """Check the records and the descriptors so far, while the transfers go on."""
        relay = self.relay
        eventually(lambda: relay.open_files() == self.files_beside, "the descriptors of before")
        books, self.books = self.books, Books()
        records = relay.records(len(books))
        books.check(records)
        self._checked += records

    def _check(self) -> None:
        self.result = self.bystanders.finish(self.books)
        relay = self.relay
        eventually(lambda: relay.open_files() == self._files, "the descriptors of before")
        assert not any(relay.pool_bytes()), "bytes were left in a pipe"
        relay.check_idle()
        checked_pairs = sum(record.mood == "happy" for record in self._checked)
        status = relay.last_status(checked_pairs + self.books.pairs())
        assert relay.stop() == 0, relay.stderr.decode()
        for line in relay.stderr.decode().splitlines():
            if re.search("warning:|error:|critical:", line):
                assert any(re.search(one, line) for one in self._may_warn), line
        if relay._lines is not None:
            records = relay.records()
            self.books.check(records)
            check_status(status, [*self._checked, *records])
        pairs = len(self.result.sent_bytes)
        print(
            f"{pairs} transfers beside it with {sum(self.result.received_bytes)} bytes, the longest"
            f" round {1000 * max(took for _, took in self.result.rounds):.0f} ms;"
            f" {len(self.books)} records"
        )


class SharedScene:
    """A scene for several tests, with a checkpoint after each. A failure replaces it."""

    def __init__(self, *options: str, **others: object) -> None:
        """For the arguments see Scene."""
        self._arguments = options, others
        self._scene: Scene | None = None

    @contextmanager
    def stage(self) -> Iterator[Scene]:
        """Yield the scene for a test."""
        if self._scene is None:
            options, others = self._arguments
            self._scene = Scene(*options, **others).__enter__()  # type: ignore[arg-type]
        try:
            yield self._scene
            self._scene.checkpoint()
        except BaseException:
            self._scene.__exit__(*sys.exc_info())
            self._scene = None
            raise

    def close(self) -> None:
        """Check the rest."""
        if self._scene is not None:
            self._scene.__exit__(None, None, None)


def percentile_99(seconds: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return sorted(seconds)[int(len(seconds) * 0.99)]
