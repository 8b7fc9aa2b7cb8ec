#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""transit-relay: the relay server of Magic Wormhole, standard library only.

Two clients that cannot reach each other connect to this relay and present the same token. The
relay then passes bytes between them until a client leaves or the relay stops. It records how much
it is used, without addresses, tokens or sides.

This file alone is a complete relay for raw clients, over TCP and unix sockets. With ws_frames.py
beside it, every listener accepts WebSocket clients as well, and can expect PROXY headers. With
transit_relay_status.py beside both, `--status` answers HTTP requests about the relay itself. With
transit_relay_gateway.py, `--forward` makes a gateway, which connects to another relay for each
client.

The file is divided into sections. At run time a section uses names of the sections above it.
tests/test_layout.py lists the classes of later sections whose objects a section is given.

    Constants, errors    numbers with their reasons; roles, limits and phases; exceptions
    Records              the records of connections and pairs; a snapshot of the relay, its text
    Carried state        what a reload carries of each object
    Counters             what happened since the start
    Kernel               socket options, acknowledgements, pipes for splice
    Rates                how much a pair may read now; the bytes of a month
    Timers               time limits of connections, and periodic tasks
    Signals              how signals reach the loop
    Addresses            where a client comes from: its peer, or what a proxy tells
    Session              one client's rules (no sockets)
    Rendezvous           waiting clients and pairs
    Framing              the encoding of a client: its detection, and raw bytes
    Connection           one socket: its backlog, its interest, its phases
    Accepting            listeners in the loop, and the pauses when resources run out
    Stops                the phases of the end
    Faults               contained exceptions: counted, logged, without data of a client
    Bulk                 the queue of large reads and writes: small messages do not wait for them
    Limits               what ends, refuses or slows clients, and how the relay makes room
    Server               the event loop, which also closes sockets
    Recorder             takes records out of the loop: one queue and one thread per sink
    Sinks                JSON lines, and the usage database
    Endpoints            `tcp:4001`, `unix:/run/x.sock`, ...: parse their text; hints for clients
    Listeners            open the sockets of endpoints, or adopt those that are open
    Messages             stderr, stdout or the log file
    Daemon               pidfile, log file, user, background, systemd
    Command line         options, and the configuration file
    State                the format of what a reload carries: how it is written and read
    Reload               replaces the running program by the one on disk; clients stay
    Start and stop       the order of a start

The path of a byte from client A to its partner B:

 1. `Server.run_once` learns from the selector that A is readable and calls
    `Connection.on_ready`, which receives into a buffer that all connections share. If the
    last read was large, it puts the connection into the bulk queue instead.
 2. A's Framing removes the WebSocket encoding, if there is one. It passes the bytes that follow
    the handshake line to A's Session.
 3. The Session counts them in the Pair and passes them to B's Connection. B's Framing encodes
    them, and the Connection sends them at once.
 4. B's Connection copies the bytes that the kernel does not accept into its backlog. While B has
    a backlog, A is not read. So the backlog is about one read.

If both clients are raw, later reads bypass Framing and Session: A's Connection counts the bytes in
the Pair and writes them to B's Connection. After a large read, `splice` moves the next one through
a kernel pipe, if a pipe is free.

The end of a client: a read returns no bytes, or a WebSocket Close arrives. Its Session ends the
pair. Each Connection flushes its backlog, shuts down writing, and lingers until the peer's end, or
until LINGER_SECONDS after the peer's kernel has acknowledged everything. A Connection whose peer
has ended already is closed after the flush. `Server.reap` closes sockets at the end of a turn, or
earlier if accept needs a descriptor.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import fcntl
import gc
import grp
import importlib
import itertools
import json
import logging
import os
import pwd
import re
import resource
import select
import selectors
import signal
import socket
import stat
import struct
import sys
import termios
import threading
import time
import traceback
from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, TextIO, Union

if TYPE_CHECKING:
    import sqlite3

try:
    import ws_frames
except ModuleNotFoundError as error:  # only this file was copied: raw clients only
    if error.name != "ws_frames":
        raise
    ws_frames = None  # type: ignore[assignment]
except (OSError, SyntaxError, ValueError) as error:  # unreadable, or cut off by a failed copy
    reason = getattr(error, "strerror", None) or getattr(error, "msg", None) or error
    sys.exit(f"transit-relay: ws_frames.py cannot be imported: {reason}")

__version__ = "0.1"

PROGRAM = "transit-relay"
log = logging.getLogger(PROGRAM)


# Constants and errors ------------------------------------------------------------------------
# The first block has values of the protocol and of the operating system. The second block has
# values that we chose. `Limits` has the limits that an operator can set.

# The protocol: magic-wormhole-protocols, transit.md.
HANDSHAKE = re.compile(rb"please relay ([A-Za-z0-9_]{64})(?: for side ([A-Za-z0-9_]{16}))?")
OK = b"ok\n"
BAD_HANDSHAKE = b"bad handshake\n"
IMPATIENT = b"impatient\n"
MAX_LINE_BYTES = 1024  # MAX_LENGTH of the reference relay; the longest handshake line has 104
RAW_BEGINNING = b"please relay "

STANDARD_FDS = 3  # descriptors 0, 1 and 2
F_SETPIPE_SZ = 1031  # fcntl.h of Linux; Python has a name for it from 3.10 on
SPLICE_F_NONBLOCK = 2  # fcntl.h of Linux
PIPE_USER_PAGES = 16384  # the default of pipe-user-pages-soft, pipe(7)
MAX_SOCKET_PATH_BYTES = 107  # of Linux, unix(7): without the final zero


def error_numbers(*names: str) -> frozenset[int]:
    """Return the numbers of the errors that this system has among `names`."""
    return frozenset(getattr(errno, name) for name in names if hasattr(errno, name))


# accept(2): these errors concern one newcomer. The listener still works.
NEWCOMER_LOST = error_numbers(
    *("ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH"),
    *("ENONET", "ENOPROTOOPT", "ENOSR", "EOPNOTSUPP", "EPERM", "EPROTO", "EPROTONOSUPPORT"),
    *("ESOCKTNOSUPPORT", "ETIMEDOUT", "EINTR"),
)
# accept(2): a resource is used up. A connection that closes may free it.
OUT_OF_RESOURCES = error_numbers("EMFILE", "ENFILE", "ENOBUFS", "ENOMEM")
# After one of these errors a write can be repeated later.
NO_ROOM_NOW = error_numbers("EAGAIN", "EWOULDBLOCK", "ENOBUFS", "ENOMEM")

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT)
# Signals that end a process by default. They are ignored unless they have an action.
IGNORED_SIGNALS = {
    *(getattr(signal, name) for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM")),
    *(getattr(signal, name) for name in ("SIGVTALRM", "SIGPROF")),
    *(getattr(signal, name) for name in ("SIGIO", "SIGPWR", "SIGSTKFLT") if hasattr(signal, name)),
}

READ_BYTES = 256 * 1024  # the largest read that is copied
FIRST_READ_BYTES = 4 * 1024  # a read while the encoding of the client is unknown
BULK_BYTES = 64 * 1024  # after a read of so many bytes, the next one is queued as bulk
TURN_BULK_BYTES = 2 * 1024 * 1024  # bulk moved in one turn: about 0.5 ms
TURN_BULK_SECONDS = 0.001  # after this time a turn serves no more bulk
MAX_POLLED_BULK = 16  # a connection that joins a longer bulk queue is not polled meanwhile
PIPE_BYTES = 1024 * 1024  # the default of pipe-max-size; splice needs large pipes to pay off
MAX_PIPES = 32  # half of the pipes that a user may have by default
MAX_IDLE_PIPES = 8  # empty pipes kept for the next reads
PIPES_PAUSE_SECONDS = 60  # no pipe is made for so long after the system refused a large one
PIPE_HOLD_SECONDS = 5  # when pipes are short, one is taken back if nothing leaves it for so long
PRESSED_READ_BYTES = 16 * 1024  # a read when --max-memory is used up; before, it may be larger
LEAST_MEMORY_BYTES = 1_000_000  # a smaller --max-memory is probably a mistake in the unit
PING_SECONDS = 25  # of silence before a Ping: proxies close silent connections after 30 or 60 s
FEW_BYTES = 64  # so few unacknowledged bytes may be Pings, and do not make a pair busy
KEEPALIVE_INTERVAL_SECONDS = 15  # between two TCP keepalive probes
KEEPALIVE_PROBES = 4  # without an answer, before the kernel ends the connection
ACCEPTS_PER_WAKEUP = 64  # per listener and turn, so that a flood does not starve the pairs
PAUSE_SECONDS = 1  # after EMFILE and similar; asyncio's ACCEPT_RETRY_DELAY
LISTEN_BACKLOG = 1024  # newcomers that the kernel queues; its own limit is somaxconn
MAX_OPEN_FILES = 1024 * 1024  # the soft limit is raised no further than this
# Kept free of clients and pipes: for status clients, the selector, SQLite's journal, log files.
RESERVED_FDS = 16
MEMORY_RESERVE_BYTES = 4 * 1024 * 1024  # released at a MemoryError, so that handlers can go on
SUSPENDED_SECONDS = 1  # if select returns this much late, the process was suspended
LINGER_SECONDS = 5  # for the peer to end, from when all bytes are acknowledged
LINGER_BLIND_SECONDS = 60  # from our end, where the system does not report acknowledgements
LINGER_POLL_SECONDS = 1  # how often a lingering connection's acknowledgements are read
LINGER_SCANS = 1024  # at most so many are considered to make room for a newcomer
LINGER_LOOKS = 64  # at most so many acknowledgements are read for that: each is a system call
SWEEPS_PER_LIMIT = 8  # sweeps over all connections in the time of a stall or idle limit
SHARES_PER_SWEEP = 16  # at most: a sweep visits the connections in shares
MIN_SHARE_SECONDS = 0.1  # from one share to the next
FOLDER_LOCK_SECONDS = 1  # how long a start waits for another start in the same folder
CURRENT_SECONDS = 30  # how often `current` is written; readers expect it to be 60 s old at most
STATUS_SECONDS = 10  # how often systemd is sent a status line
MAX_STATUS_CLIENTS = 8  # at one time; they use reserved descriptors
STATUS_CLIENT_SECONDS = 60  # after this time, the next check closes a status client
STATUS_WAIT_SECONDS = 0.02  # when all places are taken, one is made after this time
LATE_TURN_SECONDS = 1  # a turn of the loop that takes longer makes the relay unhealthy ...
UNHEALTHY_SECONDS = 60  # ... for so long
EXTEND_SECONDS = 60  # the most that a drain asks systemd for with each status line
MAX_CONFIG_CHARACTERS = 1024 * 1024
MAX_COMPLAINT_CHARACTERS = 1000  # an error message is cut here, as it can contain user input
COMPLAINT_SECONDS = 60  # a throttled warning is logged at most this often
QUEUED_RECORDS = 100_000  # per sink: about 30 MB
BATCH_RECORDS = 5_000  # written in one transaction
GATHER_SECONDS = 0.5  # one fsync for the records of this time; a kill loses what is queued
QUOTA_SECONDS = 5  # how often the bytes of the month are compared with the quota
RETRY_SECONDS = 1  # how often a failed sink tries again
SINK_WAIT_SECONDS = 0.5  # the longest single wait of a sink for a lock or a reader
RELOAD_POLL_SECONDS = 0.005  # how often a reload asks its child and the sinks
STOP_FLUSH_SECONDS = 2  # a stop waits this long for queued bytes
STOP_RECORD_SECONDS = 10  # a stop then waits this long for the sinks
STOP_GRANT_SECONDS = 15  # for the stop after a drain: 12 s and a margin
STOP_POLL_SECONDS = 0.05  # how often a stop checks whether it is complete


class Role(enum.Enum):
    """What a listener expects of its clients."""

    PORT = "port"  # --port: raw, unless the first bytes are one of ws_frames.HTTP_BEGINNINGS
    WEBSOCKET = "websocket"  # --websocket: HTTP, unless the first bytes begin a handshake
    STATUS = "status"  # --status: one HTTP request about the relay


RELAY_ROLES = (Role.PORT, Role.WEBSOCKET)  # of listeners whose clients get a partner


class Reason(enum.Enum):
    """Why the relay ends a connection. ws_frames has a Close code for each value."""

    ENDED = "ended"  # any other end: a client left or broke a rule, a time limit, a fault
    REFUSED = "refused"  # for another limit, or without a relay behind; a later try may succeed
    STOPPING = "stopping"  # the relay stops


class Limit(enum.Enum):
    """A limit that ends, refuses or slows clients, by its option or its resource."""

    HANDSHAKE = "--handshake-timeout"
    WAIT = "--max-wait"
    IDLE = "--idle-timeout"
    STALL = "--stall-timeout"
    CONNECTIONS = "--max-connections"
    DESCRIPTORS = "no free file descriptor"
    SOURCE = "--max-waiting-per-source"
    ALLOW = "--allow"
    QUOTA = "--monthly-quota"
    MEMORY = "--max-memory"  # slows clients, and ends none


# The answer to a client that is refused for a limit. None begins with `o`: clients expect `ok`.
REFUSALS = {
    Limit.CONNECTIONS: b"relay full\n",
    Limit.DESCRIPTORS: b"relay full\n",  # of a gateway, which needs a second one
    Limit.SOURCE: b"too many waiting\n",
    Limit.ALLOW: b"not allowed\n",
    Limit.QUOTA: b"quota used up\n",
}


class Phase(enum.Enum):
    """The phases of a Connection. The table is in its docstring."""

    OPEN = "open"
    FLUSHING = "flushing"
    LINGERING = "lingering"
    CLOSED = "closed"

    __hash__ = object.__hash__  # that of Enum is a Python function, and phases are counted


class ServerPhase(enum.Enum):
    """The phases of a Server, in their order. All but the first and the last have a deadline."""

    SERVING = "serving"
    # Pairs run on, status clients are served, and all other clients are ended; only with --drain.
    DRAINING = "draining"
    STOPPING_BYTES = "stopping: bytes"  # a pair ends when the bytes that had arrived are read
    STOPPING_RECORDS = "stopping: records"  # all connections are closed
    OVER = "over"


class Limits(NamedTuple):
    """The limits that an operator can set. 0 switches a limit off."""

    handshake_seconds: float = 60  # from accept to a whole handshake
    wait_seconds: float = 0  # from a whole handshake to a partner
    idle_seconds: float = 0  # of a pair in which nothing moves
    stall_seconds: float = 600  # in which a peer acknowledges nothing of what is queued for it
    keepalive_seconds: float = 200  # of silence before a TCP keepalive probe; 0: as the system
    max_connections: int = 0
    max_waiting_per_source: int = 256
    max_memory: int = 256_000_000  # bytes in all backlogs
    max_rate: int = 0  # bytes per second, of all pairs together
    max_pair_rate: int = 0  # bytes per second, of each pair
    quota_rate: int = 0  # bytes per second, of all pairs when the monthly quota is used up


class UsageError(argparse.ArgumentTypeError):
    """An option or the configuration is wrong: one line on stderr, exit code 2."""


class StartupError(Exception):
    """The system refuses what the options ask for: a message of one line, exit code 1."""


class SinkError(Exception):
    """A write failed. The sink keeps the records and tries again."""


class SinkGone(Exception):
    """The target of a sink is lost. The sink ends."""


Bytes = Union[bytes, bytearray, memoryview]


def error_text(error: OSError) -> str:
    """Return the system's description of `error`, without the file names that it may carry."""
    return error.strerror or str(error)


@contextlib.contextmanager
def startup_errors(subject: str) -> Iterator[None]:
    """Turn an OSError of the block into a StartupError that begins with `subject`."""
    try:
        yield
    except OSError as error:
        raise StartupError(f"{subject}: {error_text(error)}") from None


# Modules that an option needs, and their folders below packaging/ in a source tree.
PARTS = {"transit_relay_status": "status-page", "transit_relay_gateway": "gateway"}


def import_part(option: str, module: str, attribute: str) -> Any:
    """Return an attribute of one of PARTS, which `option` needs. Raises StartupError."""
    source_tree = os.path.join(os.path.dirname(__file__), "packaging", PARTS[module])
    if os.path.isdir(source_tree) and source_tree not in sys.path:
        sys.path.append(source_tree)
    # The module imports transit_relay, which may run as `__main__`.
    sys.modules.setdefault("transit_relay", sys.modules[__name__])
    try:
        return getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a broken copy can raise any
        why = f"{module}.py cannot be imported: {error}"
        if isinstance(error, ImportError) and error.name == module:
            why = f"Python finds no {module}.py (beside transit_relay.py)"
    raise StartupError(f"{option}: {why}")


def parse_number(text: str, highest: int, base: int = 10) -> int | None:
    """Return `text` as a number, or None if it is not one from 0 to `highest` (15 digits)."""
    digits = "[0-7]" if base == 8 else "[0-9]"
    number = int(text, base) if re.fullmatch(digits + "{1,15}", text) else None
    return None if number is None or number > highest else number


def whole_number(text: str, highest: int = 2**31 - 1) -> int:
    """Parse the value of an option that is a whole number. Raises UsageError."""
    value = parse_number(text, highest)
    if value is None:
        raise UsageError(f"{text!r} is not a whole number from 0 to {highest}")
    return value


def duration(text: str) -> float:
    """Parse the value of an option that is a time. Raises UsageError."""
    with contextlib.suppress(ValueError):
        if text.isascii() and "_" not in text and 0 <= float(text) < float("inf"):
            return float(text)
    raise UsageError(f"{text!r} is not a number of seconds from 0 on")


# Records -------------------------------------------------------------------------------------
# The record of a connection without a partner, the record of a pair, and the state of the relay at
# one moment. A record contains no address, token or side (docs/operating.md, Records and privacy).


class UsageRecord(NamedTuple):
    """The record of a connection that never had a partner, or of a pair.

    The JSON lines have these field names in this order. `mood` is called `result` in SQL.
    """

    started: float  # seconds since the epoch, at the accept; of a pair the earlier one
    total_time: float  # seconds
    waiting_time: float | None  # seconds between the two accepts; None without a partner
    total_bytes: int  # received from both clients of a pair; 0 without a partner
    mood: str

    def blurred(self, seconds: int) -> UsageRecord:
        """Return the record as `--blur-usage=SECONDS` publishes it."""
        return self._replace(
            started=float(self.started // seconds * seconds),
            total_bytes=blur_size(self.total_bytes),
        )


STOPPING = "stopping"  # in Snapshot.problems: the relay drains or stops


class Current(NamedTuple):
    """The row of the table `current`, in the order of its columns. It is never blurred."""

    rebooted: int  # seconds since the epoch
    updated: int  # seconds since the epoch
    connected: int  # two per pair that is not yet recorded
    waiting_tokens: int
    incomplete_bytes: int  # of pairs that are not yet recorded


class Snapshot(NamedTuple):
    """The state of the relay at one moment, for `current`, systemd and the status listener."""

    started_at: float  # seconds since the epoch
    taken_at: float  # seconds since the epoch
    pairs: int  # running, or not yet recorded
    waiting_clients: int
    waiting_tokens: int
    connections: int  # open ones, in every phase
    pairs_ended: int  # since the start
    relayed_bytes: int  # since the start, running pairs included
    incomplete_bytes: int  # of pairs that are not yet recorded
    faults: int  # since the start: contained exceptions, and refusals of the selector
    drain_seconds_left: float  # for which pairs may run on, if the relay drains; else 0
    problems: tuple[str, ...]  # why the relay is not healthy

    def current(self) -> Current:
        """Return the row of `current` for this moment."""
        return Current(
            rebooted=int(self.started_at),
            updated=int(self.taken_at),
            connected=2 * self.pairs,
            waiting_tokens=self.waiting_tokens,
            incomplete_bytes=self.incomplete_bytes,
        )


class SinkStatus(NamedTuple):
    """How a sink is doing."""

    written: int  # records since the start
    dropped: int  # likewise
    waiting: int  # records
    is_failing: bool  # the last write failed, or an error ended the sink
    totals: Mapping[str, tuple[int, int]] | None  # see Sink


def blur_size(size: int) -> int:
    """Round `size` (bytes) down, to 1 kB, 1 MB or 100 MB depending on its magnitude."""
    if size < 1_000_000:
        return size // 1_000 * 1_000
    if size < 1_000_000_000:
        return size // 1_000_000 * 1_000_000
    return size // 100_000_000 * 100_000_000


def find_problems(loop: Server) -> Iterator[str]:
    """Yield why the relay is not healthy."""
    if loop.phase is not ServerPhase.SERVING:
        yield STOPPING
    elif loop._acceptor.retry_at < float("inf"):
        yield "not accepting"
    for name, sink in loop.recorder.status().items():
        if sink.is_failing:
            yield f"records failing: {name}"
    if loop.clock.monotonic() < loop.rendezvous.unreachable_until:
        yield "no connection to the relay behind"
    if loop.clock.monotonic() < loop.late_until:
        yield "loop late"


def count_pairs(loop: Server) -> int:
    """Return the number of pairs, without those of a gateway that are not answered."""
    pairs = loop.rendezvous.pairs
    if not loop.rendezvous.is_gateway:
        return len(pairs)
    return sum(pair.waiting_time is not None for pair in pairs)


def take_snapshot(loop: Server) -> Snapshot:
    """Return the state of the relay."""
    now, rendezvous = loop.wallclock(), loop.rendezvous
    return Snapshot(
        # Computed each time, because the wall clock may have been set since the start.
        started_at=now - (loop.clock.monotonic() - loop._started),
        taken_at=now,
        pairs=count_pairs(loop),
        waiting_clients=rendezvous.waiting_clients,
        waiting_tokens=len(rendezvous.waiting),
        connections=len(loop.connections),
        pairs_ended=sum(rendezvous.counters.pairs.values()),
        relayed_bytes=rendezvous.relayed_bytes(),
        incomplete_bytes=rendezvous.incomplete_bytes(),
        faults=loop.faults.count,
        drain_seconds_left=loop.ending.drain_seconds_left,
        problems=tuple(find_problems(loop)),
    )


def status_line(now: Snapshot) -> str:
    """Return one line for `systemctl status`."""
    drain = (
        f"draining, at most {now.drain_seconds_left:.0f} s left; " if now.drain_seconds_left else ""
    )
    problems = "".join(f"{problem}; " for problem in now.problems if problem != STOPPING)
    return (
        f"{drain}{problems}{count_text(now.pairs, 'pair')}, {now.waiting_clients:,} waiting,"
        f" {count_text(now.connections, 'connection')}; since the start"
        f" {count_text(now.pairs_ended, 'pair')} ended, {size_text(now.relayed_bytes)} relayed"
    )


def count_text(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural unless the count is 1."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_text(size: int) -> str:
    """Return a number of bytes in a decimal unit, with three digits at most, except for TB."""
    if size < 1000:
        return count_text(size, "byte")
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.1f} TB"


# Carried state -------------------------------------------------------------------------------
# A reload (see there) carries the state of all objects into the new program. Each class names the
# fields that it carries. The others are links to other objects, follow from carried fields, or are
# made anew.


Parsers = Mapping[str, Callable[[Any], object]]
PLAIN_TYPES = {bool, int, float, str, bytes, type(None)}


class Carried:
    """An object whose state a reload carries."""

    __slots__: tuple[str, ...] = ()
    CARRIED: tuple[str, ...] = ()  # the fields; each can itself be a Carried
    PARSERS: ClassVar[Parsers] = {}  # of fields that are not plain values

    def place(self) -> dict[str, Any]:
        """Return the carried fields by name, as plain values (see `plain`)."""
        return {name: plain(getattr(self, name)) for name in self.CARRIED}

    def resume(self, place: Mapping[str, Any]) -> None:
        """Set the fields that `place` of an object of this class returned.

        A field that is missing keeps its value. Raises ValueError for an unknown field.
        """
        for name, value in place.items():
            if name not in self.CARRIED:
                raise ValueError(f"{type(self).__name__} has no {name}")
            if hasattr(getattr(self, name), "resume"):
                if value is not None:  # the predecessor had such an object
                    getattr(self, name).resume(value)
            elif value is not None and name in self.PARSERS:
                setattr(self, name, self.PARSERS[name](value))
            else:
                setattr(self, name, value)


def plain(value: Any) -> Any:
    """Return `value` as None, a number, str or bytes, or as a tuple or dict of such values."""
    if type(value) in PLAIN_TYPES:  # first: clients wait
        return value
    if hasattr(value, "place"):  # also a Reader of ws_frames
        return value.place()
    if hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, bytearray):
        return bytes(value)
    return tuple(map(plain, value)) if isinstance(value, (list, tuple, deque)) else value


class Throttle(Carried):
    """Allows something once per period, for example a log message. The first one is allowed."""

    CARRIED = ("next_at",)

    def __init__(self, seconds: float = COMPLAINT_SECONDS) -> None:
        self._seconds = seconds
        self.next_at = float("-inf")  # monotonic seconds

    def take(self, now: float) -> bool:
        """Return whether it is allowed at `now`. If so, begin the next period."""
        if now < self.next_at:
            return False
        self.next_at = now + self._seconds
        return True


class Tally(Carried):
    """Counts events by kind, and logs each kind at most once per COMPLAINT_SECONDS."""

    CARRIED = ("_next_at", "_unlogged", "counts")

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self._next_at: dict[str, float] = {}  # when a message may be logged (monotonic seconds)
        self._unlogged: dict[str, int] = {}

    def note(self, kind: str, now: float, level: int, message: str) -> None:
        """Count an event, and log `message` unless that was done within the last minute."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        if now >= self._next_at.get(kind, float("-inf")):
            self._next_at[kind] = now + COMPLAINT_SECONDS
            more = self._unlogged.pop(kind, 0)
            text = f" ({more} more since the last message)" if more else ""
            log.log(level, "%s%s", message, text)
        else:
            self._unlogged[kind] = self._unlogged.get(kind, 0) + 1


# Counters ------------------------------------------------------------------------------------
# What happened since the start, for the status listener. All numbers are kept up to date, so that
# nothing needs to be counted when they are shown.

TRANSPORTS = ("tcp", "websocket")  # of clients; `tcp` stands for all raw ones
# The index of both is the number of WebSocket clients in the pair.
PAIR_TRANSPORTS = ("tcp-tcp", "tcp-websocket", "websocket-websocket")
# The keys in Counters.relayed: for bytes from a raw client, and for bytes from a WebSocket client.
FLOWS = ("tcp-tcp", ""), ("tcp-websocket", "websocket-tcp"), ("", "websocket-websocket")
MOODS = ("happy", "lonely", "redundant", "impatient", "errory", "empty")
# Why a client does not come to wait for a partner: its first line, its PROXY header, or the status
# of the answer to its request (503: the relay is full).
HTTP_FAILURES = ("http_400", "http_405", "http_426", "http_431", "http_503")
# Of a gateway: no connection, or an invalid answer; a refusal by the relay behind.
GATEWAY_FAILURES = ("not_forwarded", "refused_behind")
FAILURES = ("bad_handshake", "proxy_header", *HTTP_FAILURES, *GATEWAY_FAILURES)


class Counts(dict[Any, int]):
    """Counts by key. All keys are known from the start."""

    def __init__(self, keys: Iterable[Any]) -> None:
        super().__init__(dict.fromkeys(keys, 0))

    def place(self) -> dict[Any, int]:
        """Return the counts."""
        return dict(self)

    def resume(self, place: Mapping[Any, int]) -> None:
        """Go on with the counts that `place` returned. Leave out unknown keys."""
        self.update((key, count) for key, count in place.items() if key in self)


class Histogram(Carried):
    """Counts values in buckets."""

    CARRIED = ("bounds", "counts", "total")
    PARSERS: ClassVar[Parsers] = {"counts": list}

    def __init__(self, *bounds: float) -> None:
        self.bounds = bounds  # the upper bounds of the buckets, inclusive, ascending
        self.counts = [0] * (len(bounds) + 1)  # values in each bucket; the last one has no bound
        self.total: float = 0  # the sum of the values

    def resume(self, place: Mapping[str, Any]) -> None:
        """Go on with the counts that `place` returned, if the buckets are still the same."""
        if place.get("bounds") == self.bounds:
            super().resume(place)

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value


class Counters(Carried):
    """Counts and histograms since the start."""

    CARRIED = (
        *("connections", "ended", "ended_bytes", "failures", "pairs", "relayed"),
        *("durations", "rates", "sizes", "turns", "waits"),
    )

    def __init__(self) -> None:
        self.connections = 0  # accepted, without those of status clients
        # Clients; a pair counts as two happy ones.
        self.ended = Counts(itertools.product(MOODS, TRANSPORTS))
        self.failures = Counts(FAILURES)
        self.pairs = Counts(PAIR_TRANSPORTS)  # ended ones
        self.ended_bytes = 0  # of ended pairs
        self.relayed = Counts(flow for flows in FLOWS for flow in flows if flow)  # bytes
        # Of ended pairs: seconds between the accepts, seconds from the later accept to the end,
        # bytes, and bytes per second.
        self.waits = Histogram(0.1, 1, 5, 15, 60, 300, 900, 3600, 14400)
        self.durations = Histogram(0.1, 1, 5, 15, 60, 300, 900, 3600, 14400, 86400)
        self.sizes = Histogram(*(10.0**exponent for exponent in range(3, 13)))
        self.rates = Histogram(*(10.0**exponent for exponent in range(3, 11)))
        self.turns = Histogram(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3)  # of the loop (seconds)

    def pair_ended(self, transports: str, record: UsageRecord) -> None:
        """Count an ended pair. `transports`: one of PAIR_TRANSPORTS."""
        self.ended_bytes += record.total_bytes
        for transport in transports.split("-"):
            self.ended["happy", transport] += 1
        self.pairs[transports] += 1
        waiting_time = record.waiting_time or 0
        duration = record.total_time - waiting_time
        self.waits.add(waiting_time)
        self.durations.add(duration)
        self.sizes.add(record.total_bytes)
        self.rates.add(record.total_bytes / duration if duration else 0)


# Kernel --------------------------------------------------------------------------------------
# Kernel calls other than plain reads and writes: socket options, how much the peer has
# acknowledged, and pipes for bulk. With splice(2) bulk moves from a socket into a pipe and from
# there into another socket, without entering Python.
#
# A connection borrows a pipe from the pool for one read and gives it back afterwards. Bytes that
# the receiver does not accept stay in the pipe, which is then the receiver's backlog. The pool
# closes a pipe that still holds bytes, because they must not reach another pair. If all pipes are
# lent, the bytes in those whose receivers take nothing are moved to memory.
#
# The number of pipes is limited: all processes of an unprivileged user share pipe-user-pages-soft
# (pipe(7)). Past that limit the kernel makes pipes of two pages, through which splicing is no
# cheaper than copying. The pool refuses small pipes. Without a pipe the relay copies.


def socket_options(keepalive_seconds: float) -> list[tuple[int, int, int]]:
    """Return the options of a client's TCP socket: level, option, value."""
    options = [
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),  # the reference relay sets this too
        (socket.SOL_SOCKET, socket.SO_OOBINLINE, 1),  # urgent bytes stay in the stream
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),  # small messages are sent at once
    ]
    if keepalive_seconds:  # silence before the first probe; 0: the system's default
        values = {
            "TCP_KEEPIDLE": min(max(1, round(keepalive_seconds)), 32767),  # tcp(7): its range
            "TCP_KEEPINTVL": KEEPALIVE_INTERVAL_SECONDS,
            "TCP_KEEPCNT": KEEPALIVE_PROBES,
        }
        for name, value in values.items():
            if hasattr(socket, name):
                options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


def set_options(sock: socket.socket, options: Sequence[tuple[int, int, int]]) -> None:
    """Set the options of a TCP socket, as far as the system accepts them. Skip a unix socket."""
    if sock.family == socket.AF_UNIX:
        return
    for level, option, value in options:
        with contextlib.suppress(OSError):  # the relay works without it
            sock.setsockopt(level, option, value)


def unsent(parts: Sequence[Bytes], sent: int) -> bytearray:
    """Return a copy of `parts` without the first `sent` bytes."""
    rest = bytearray()
    for part in parts:
        if sent < len(part):
            rest += memoryview(part)[sent:]
        sent = max(0, sent - len(part))
    return rest


def receive_into(buffer: memoryview, sock: socket.socket, most: int) -> int:
    """Read at most `most` bytes. Return how many came; 0: the end or a reset; -1: none yet.

    This is a short function of its own for CPython 3.11: past the 256th instruction of a function,
    the cleanup after an exception allocates an integer. If there is no memory for it, the
    interpreter repeats the cleanup for ever.
    """
    try:
        return sock.recv_into(buffer, most)
    except BlockingIOError:
        return -1
    except OSError:  # a reset or a timeout; all earlier bytes have been read
        return 0


def takes_bytes(fd: int, seconds: float) -> bool:
    """Wait for `fd` to be writable (a pipe: PIPE_BUF bytes) or in error. Return whether it is."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def query_descriptor(fd: int, request: int) -> int | None:
    """Return the number that an ioctl(2) `request` reports, or None if it fails."""
    try:
        answer = fcntl.ioctl(fd, request, b"\0\0\0\0")
    except OSError:
        return None
    return int(struct.unpack("i", answer)[0])


def unacknowledged_bytes(sock: socket.socket) -> int | None:
    """Return how many sent bytes the peer's kernel has not acknowledged. A FIN counts as one.

    Return None if the system does not report it. On Linux this is SIOCOUTQ of tcp(7) and unix(7),
    an alias of TIOCOUTQ. For a unix socket it counts buffer memory that the peer has not read.
    """
    return query_descriptor(sock.fileno(), termios.TIOCOUTQ)


def unread_bytes(sock: socket.socket) -> int:
    """Return how many received bytes wait in our kernel: tcp(7), SIOCINQ."""
    return query_descriptor(sock.fileno(), termios.FIONREAD) or 0


# Linux, Python 3.10 or later.
splice: Callable[..., int] | None = getattr(os, "splice", None)


class Pipe:
    """A kernel pipe, and the number of bytes in it."""

    __slots__ = ("_filled", "_read_fd", "_write_fd", "is_large", "seen_bytes")

    def __init__(self) -> None:
        """Make a pipe. Raises OSError."""
        self._read_fd, self._write_fd = os.pipe()
        self._filled = 0
        self.seen_bytes = 0  # its content at the last call of LimitEnforcer.release_pipes
        try:
            self.is_large = fcntl.fcntl(self._write_fd, F_SETPIPE_SZ, PIPE_BYTES) >= PIPE_BYTES
        except OSError:  # our user has too many pages in pipes
            self.is_large = False

    def __len__(self) -> int:
        return self._filled

    def fill(self, sock: socket.socket, most: int = PIPE_BYTES) -> int:
        """Move at most `most` received bytes of `sock` into the pipe. Return how many.

        If it is 0, a recv distinguishes the peer's end, an error, an urgent byte and an empty
        socket. The pipe must be empty: a full pipe and an empty socket have the same errno, EAGAIN.
        """
        assert splice is not None and not self._filled
        try:
            self._filled = splice(
                sock.fileno(), self._write_fd, min(most, PIPE_BYTES), None, None, SPLICE_F_NONBLOCK
            )
        except OSError:
            pass
        return self._filled

    def pour(self, sock: socket.socket) -> int:
        """Move bytes to `sock`, as many as it accepts. Return how many. Raises OSError."""
        assert splice is not None
        before = self._filled
        self._filled -= splice(self._read_fd, sock.fileno(), before, None, None, SPLICE_F_NONBLOCK)
        return before - self._filled

    def read_all(self) -> bytearray:
        """Read all bytes out of the pipe and return them. Raises OSError and MemoryError."""
        content = bytearray(self._filled)  # before the read: if there is no memory, nothing is lost
        self._filled -= os.readv(self._read_fd, [content])
        assert not self._filled, "the pipe has more than it returned"
        return content

    def close(self) -> None:
        """Close both ends and discard the bytes in it."""
        os.close(self._read_fd)
        os.close(self._write_fd)


def send_from(backlog: bytearray | Pipe, sock: socket.socket) -> int:
    """Send bytes of a backlog and remove them from it. Return how many. Raises OSError."""
    if isinstance(backlog, Pipe):
        return backlog.pour(sock)
    sent = sock.send(backlog)
    del backlog[:sent]
    return sent


class PipePool:
    """Counts the lent pipes and keeps a few idle ones."""

    def __init__(self, max_pipes: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`max_pipes`: the most that are lent at one time. `clock` returns monotonic seconds."""
        self._max_pipes = max_pipes
        self._clock = clock
        self._lent = 0
        self._idle: list[Pipe] = []
        self._pause_until = float("-inf")
        # Called when all are lent and one more is wanted, at most once in PIPE_HOLD_SECONDS.
        self.when_scarce: Callable[[], None] = lambda: None
        self._scarcities = Throttle(PIPE_HOLD_SECONDS)

    def lend(self) -> Pipe | None:
        """Return an empty pipe, or None if there is no idle one and none can be made."""
        pipe = self._idle.pop() if self._idle else self._make()
        if pipe is not None:
            self._lent += 1
            pipe.seen_bytes = 0
        return pipe

    def _make(self) -> Pipe | None:
        """Return a large pipe, or None: a new one, or one that `when_scarce` released."""
        now = self._clock()
        if self._lent >= self._max_pipes:
            if self._max_pipes and self._scarcities.take(now):
                self.when_scarce()
            return self._idle.pop() if self._idle else None
        if now < self._pause_until:
            return None
        try:
            pipe = Pipe()
            if pipe.is_large:
                return pipe
            pipe.close()
        except OSError:  # no descriptors
            pass
        self._pause_until = now + PIPES_PAUSE_SECONDS
        return None

    def give_back(self, pipe: Pipe) -> None:
        """Return a lent pipe to the pool. Keep it if it is empty and few are idle."""
        self._lent -= 1
        if len(pipe) or len(self._idle) >= MAX_IDLE_PIPES:
            pipe.close()
        else:
            self._idle.append(pipe)

    @property
    def open_pipes(self) -> int:
        """Return how many pipes are lent or idle."""
        return self._lent + len(self._idle)

    def close_idle(self) -> None:
        """Close the idle pipes."""
        while self._idle:
            self._idle.pop().close()


def affordable_pipes() -> int:
    """Return how many pipes to use: half of a user's quota, at most MAX_PIPES; 0 without splice."""
    if splice is None:
        return 0
    pages = PIPE_USER_PAGES
    with contextlib.suppress(OSError):  # a sandbox may hide it
        with open("/proc/sys/fs/pipe-user-pages-soft", "rb") as file:
            pages = int(file.read())
    half = pages * resource.getpagesize() // 2 // PIPE_BYTES
    return min(half, MAX_PIPES) if pages else MAX_PIPES  # 0: no limit


def descriptor_budget(limit: int, open_now: int, uses_pipes: bool = True) -> tuple[int, int]:
    """Return how many connections, and how many pipes, `limit` allows beside `open_now`."""
    # A pipe has two descriptors, so pipes take an eighth of the limit at most.
    pipes = min(affordable_pipes(), limit // 16) if uses_pipes else 0
    return max(1, limit - open_now - RESERVED_FDS - 2 * pipes), pipes


# Rates ---------------------------------------------------------------------------------------
# How many bytes a pair may read now, both directions together, under a rate for all pairs and a
# rate for each one; and how many bytes were relayed in this month.
#
# A refill, every REFILL_SECONDS, divides what the rate allows, max-min fair: a pair that reads less
# than an equal share gets what it wants, and the others divide the rest evenly. A refill assumes
# that a pair wants as much as it has read since the last one. A pair that waits wants more. Pairs
# that begin to read need not wait for a refill: they read from a reserve. A refill visits the pairs
# that wait or have read, and no others.
#
# Small reads are not worth a system call. So a pair waits when its share has less left than it has
# just read, and less than `_least`. The remainder after a read is added to its next share. A share
# is `_least` or more: if there is not enough for all pairs that wait, these take turns.

REFILL_SECONDS = 0.05
BUCKET_SECONDS = 0.25  # what a rate allows in this time is the most that is read at once
RESERVE_SECONDS = 0.1  # the part of the bucket that is the reserve
RELEASES_PER_TURN = 8  # pairs that go on in one turn of the loop, so that a turn stays short
LEAST_READ_BYTES = 4 * 1024  # less with a small rate
LEAST_RATE = 1_000  # bytes per second; a smaller value is probably a mistake in the unit
NO_RATE = 1e12  # bytes per second: stands for no rate
SIZE = re.compile(r"([0-9]{1,15})(?:\.([0-9]{1,9}))?(?: ?([kmgtKMGT]i?)?(B|bytes?|bit))?")
QUOTA_PERCENTS = (80, 95, 100)  # of a monthly quota: each is reported


def parse_size(text: str, least: int = 0) -> int:
    """Return a size in bytes, rounded up: `500kB`, `2GiB`, `100Mbit`. Raises UsageError."""
    match = SIZE.fullmatch(text)
    if not match:
        units = "B, kB, MB, GB, TB, KiB, MiB, GiB, TiB, kbit, Mbit, Gbit or Tbit"
        raise UsageError(f"{text!r} is not a number of {units}")
    whole, fraction, prefix, unit = match.groups("")
    factor: int = (1024 if prefix[1:] else 1000) ** " kmgt".index(prefix[:1].lower() or " ")
    divisor: int = 10 ** len(fraction) * (8 if unit == "bit" else 1)
    size = -(-int(whole + fraction) * factor // divisor)
    if 0 < size < least:
        raise UsageError(f"{text!r} is too small: it must be 0 or at least {least // 1000} kB")
    return size


def parse_rate(text: str) -> int:
    """Return a rate in bytes per second: a size, or a size with `/s`. Raises UsageError."""
    return parse_size(text[:-2] if text.endswith("/s") else text, LEAST_RATE)


class Rates(Carried):
    """Divides a rate among the pairs, and limits the rate of each pair.

    `Pair.allowance` is None without a rate, 0 while the pair waits, and positive otherwise.
    """

    CARRIED = (
        *("_rate", "_pair_rate", "_refilled_at", "_level", "_pool"),
        *("_spare", "_sharers", "_is_late"),
    )

    def __init__(
        self, max_rate: int, max_pair_rate: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """The rates are in bytes per second; 0: none. `clock` returns monotonic seconds."""
        self._clock = clock
        self.must_wait: Callable[[Pair], None] = lambda pair: None  # called with a pair
        self._refilled_at = clock()
        self._level = 0.0  # what the rate of one pair has allowed since the start (bytes)
        self.change(max_rate, max_pair_rate)

    def change(self, max_rate: int, max_pair_rate: int) -> None:
        """Change the rates and forget all pairs. The caller must call `join` with each of them."""
        # In the order of their turns, with the remainders of their shares. `_divide` moves a pair
        # that may go on to the end. It stays in this dict until the next division.
        self._waiting: dict[Pair, int] = {}
        self._releases: deque[tuple[Pair, int]] = deque()  # those that may go on, with allowances
        self._is_late = False  # the last of them went on when the next division was due
        # Pairs that do not wait, with the bytes that they have read since the last refill.
        self._sharing: dict[Pair, int] = {}  # it gave them a share
        self._beginning: dict[Pair, int] = {}  # it did not
        self._is_on = max_rate > 0 or max_pair_rate > 0
        self._rate, self._pair_rate = max_rate or NO_RATE, max_pair_rate or NO_RATE
        half_refill = min(self._rate, self._pair_rate) * REFILL_SECONDS / 2
        self._least = int(min(LEAST_READ_BYTES, half_refill))
        # What all pairs together may read now.
        self._pool = self._rate * (RESERVE_SECONDS + REFILL_SECONDS)
        self._spare, self._sharers = 0.0, 0  # a pair that begins may read _spare / _sharers bytes

    def join(self, pair: Pair) -> None:
        """Give a pair its first allowance."""
        pair.allowance = self._least if self._is_on else None
        pair.level_used = self._level - self._pair_rate * BUCKET_SECONDS

    def place_pairs(self, pairs: Sequence[Pair]) -> tuple[object, ...]:
        """Return which pairs wait or read, by their numbers in `pairs`."""
        number = {pair: n for n, pair in enumerate(pairs)}
        groups = (group.items() for group in (self._waiting, self._sharing, self._beginning))
        return tuple(
            tuple((number[pair], size) for pair, size in group if pair in number)
            for group in (*groups, self._releases)
        )

    def resume_pairs(
        self, place: Mapping[str, Any], numbered: Sequence[Any], pairs: Sequence[Pair]
    ) -> None:
        """Go on with the state of Rates that had the same rates. Else let all `pairs` join.

        `numbered`: as from `place_pairs`.
        """
        if (place["_rate"], place["_pair_rate"]) != (self._rate, self._pair_rate):
            for pair in pairs:
                self.join(pair)
            return
        self.resume(place)
        groups = [[(pairs[n], size) for n, size in group] for group in numbered]
        self._waiting, self._sharing, self._beginning = map(dict, groups[:3])
        self._releases = deque(groups[3])

    def leave(self, pair: Pair) -> None:
        """Forget a pair, if it is known."""
        if self._is_on:
            for pairs in (self._waiting, self._sharing, self._beginning):
                pairs.pop(pair, None)

    def next_due(self) -> float:
        """Return when `refill` is due; infinity if no pair waits or has read.

        If it is due, call it before the next read: so there is no burst after a suspension.
        """
        if self._releases:
            return self._refilled_at
        is_used = self._waiting or self._sharing or self._beginning
        return self._refilled_at + REFILL_SECONDS if is_used else float("inf")

    def limit(self, pair: Pair) -> int:
        """Return how many bytes a pair may read now. 0: it waits until `refill` returns it."""
        if self.next_due() == float("inf"):
            self.refill(self._clock())
        allowance, size = pair.allowance or 0, self._beginning.get(pair, 0)
        if size:
            share = max(self._spare / self._sharers, self._least)
            allowance = max(0, int(min(share - size, self._credit(pair))))
        if min(allowance, self._pool) < min(size or allowance, self._least):
            return self._wait(pair)
        return min(allowance, int(self._pool))

    def spend(self, pair: Pair, size: int) -> None:
        """Count bytes that a pair has read. It waits if its share is used up."""
        self._pool -= size
        pair.level_used = self._level - self._credit(pair) + size
        if pair in self._sharing:
            self._sharing[pair] += size
            pair.allowance = (pair.allowance or 0) - size
            if pair.allowance < min(size, self._least):
                self._wait(pair, pair.allowance)
        else:  # `limit` computes its share at its next read: others may begin meanwhile
            self._sharers += pair not in self._beginning
            self._beginning[pair] = self._beginning.get(pair, 0) + size

    def _wait(self, pair: Pair, remainder: int = 0) -> int:
        self._sharing.pop(pair, None)
        self._beginning.pop(pair, None)
        self._waiting[pair] = max(remainder, 0)
        pair.allowance = 0
        self.must_wait(pair)
        return 0

    def _credit(self, pair: Pair) -> float:
        """Return what the rate of one pair allows it to read now (bytes)."""
        return min(self._level - pair.level_used, self._pair_rate * BUCKET_SECONDS)

    def refill(self, now: float) -> list[Pair]:
        """Return pairs that may go on, at most RELEASES_PER_TURN.

        If none is left of the last division, first divide what the rates allow since then. A turn
        passes between the two, because a pair that has not read yet would be taken for idle.
        """
        going_on: list[Pair] = []
        if not self._releases and not self._is_late:
            self._divide(now)
        while self._releases and len(going_on) < RELEASES_PER_TURN:
            pair, allowance = self._releases.popleft()
            if pair in self._waiting:
                pair.allowance = allowance
                self._sharing[pair] = 0
                going_on.append(pair)
        is_due = now >= self._refilled_at + REFILL_SECONDS
        self._is_late = is_due and bool(going_on) and not self._releases
        return going_on

    def _divide(self, now: float) -> None:
        """Divide what the rates allow since the last division among the pairs."""
        elapsed = min(now - self._refilled_at, BUCKET_SECONDS)
        self._refilled_at = now
        self._level += self._pair_rate * elapsed
        income, least = self._rate * elapsed, self._least
        self._pool = min(self._pool + income, self._rate * BUCKET_SECONDS)
        # At most half of the income restores the reserve.
        left = min(self._pool, max(self._pool - self._rate * RESERVE_SECONDS, income / 2))
        waiting = {pair: rest for pair, rest in self._waiting.items() if not pair.allowance}
        readers = {**self._sharing, **self._beginning}
        demands = sorted(size for size in readers.values() if size)
        sharers = len(demands) + len(waiting)
        for size in demands:
            if size * sharers >= left:
                break
            left -= size
            sharers -= 1
        self._spare, self._sharers = left, sharers
        share = max(left / max(sharers, 1), least)
        self._sharing, self._beginning = {}, {}
        for pair, size in readers.items():
            pair.allowance = max(int(min(share, self._credit(pair))), least) if size else least
            if size:  # else it is idle now
                self._sharing[pair] = 0
        for pair, rest in tuple(waiting.items()):
            allowance = int(min(share + rest, self._credit(pair)))
            if least <= min(left, allowance):
                left -= share
                waiting[pair] = waiting.pop(pair)
                self._releases.append((pair, allowance))
        self._waiting = waiting


class Quota(Carried):
    """Counts the bytes that are relayed in a calendar month (UTC).

    The month does not go back when the clock does. The loop calls `count`, the thread of the
    database `load`, and each assigns attributes of its own.
    """

    CARRIED = ("_counted", "_loaded", "_relayed_bytes", "_reported")

    def __init__(self, max_bytes: int, wallclock: Callable[[], float] = time.time) -> None:
        """`max_bytes`: the quota of a month. `wallclock` returns seconds since the epoch."""
        self._max_bytes = max_bytes
        self._wallclock = wallclock
        self._counted = ("", 0)  # the month, and its bytes that this process has counted
        self._loaded: tuple[str, int] | None = None  # the latest row that the database had
        self._relayed_bytes = 0  # at the last count
        self._reported = 0  # percent
        self.count(0)

    def load(self, row: tuple[str, int] | None) -> None:
        """Go on with the latest row of the database, if it has more. The first one is added."""
        counted = self._counted[1]  # before the comparison: the loop can count meanwhile
        if self._loaded is None:
            self._loaded = row or ("", 0)
        elif row is not None and row > self.row():  # a reload has led to another database
            self._loaded = row[0], row[1] - counted

    def row(self) -> tuple[str, int]:
        """Return the month, for example `2026-11`, and its bytes."""
        (month, size), (loaded, loaded_size) = self._counted, self._loaded or ("", 0)
        return (loaded, size + loaded_size) if loaded >= month else (month, size)

    def count(self, relayed_bytes: int) -> list[int]:
        """Count up to `relayed_bytes` since the start. Return newly reached QUOTA_PERCENTS."""
        size, self._relayed_bytes = relayed_bytes - self._relayed_bytes, relayed_bytes
        month, latest = time.strftime("%Y-%m", time.gmtime(self._wallclock())), self.row()[0]
        if month > latest:
            self._counted, self._reported = (month, size), 0
        else:
            self._counted = (latest, self._counted[1] + size)
        percent = 100 * self.row()[1] // self._max_bytes
        reached = [one for one in QUOTA_PERCENTS if self._reported < one <= percent]
        self._reported = percent
        return reached

    def skip(self, relayed_bytes: int) -> None:
        """Leave out the bytes that were relayed without a quota, before a reload."""
        self._relayed_bytes = relayed_bytes

    def status(self) -> tuple[str, int, int]:
        """Return the month, the bytes relayed in it, and the quota."""
        return (*self.row(), self._max_bytes)

    @property
    def is_used_up(self) -> bool:
        """Return whether the bytes of the month have reached the quota."""
        return self.row()[1] >= self._max_bytes


class MemoryBudget:
    """Counts the bytes in all backlogs, pipes included, and bounds the size of a read."""

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: of all backlogs together; 0: no limit."""
        self._max_bytes = max_bytes
        self.queued_bytes = 0
        self.change(0)

    def count(self, conn: Connection) -> None:
        """Count the backlog of a connection, which has changed."""
        size = conn.queued_bytes()
        if size != conn.counted_bytes:
            self.change(size - conn.counted_bytes)
            conn.counted_bytes = size

    def change(self, size: int) -> None:
        """Add `size` (negative: the backlogs shrank) to the sum, and compute the largest read."""
        self.queued_bytes += size
        self.max_read_bytes = PIPE_BYTES  # 0: the budget is used up
        if self._max_bytes:
            free = self._max_bytes - self.queued_bytes
            share = max(PRESSED_READ_BYTES, PIPE_BYTES * free // self._max_bytes)
            self.max_read_bytes = min(share, free) if free >= PRESSED_READ_BYTES else 0
        self.bulk_bytes = min(BULK_BYTES, self.max_read_bytes or PRESSED_READ_BYTES)


# Timers --------------------------------------------------------------------------------------
# There is one queue for each time limit that many connections have. All entries of a queue have the
# same limit, and a new entry goes to the end, so the queue is sorted. It stores when each entry
# began, not its deadline. An expired entry may be obsolete: then its handler does nothing. Chores
# are periodic tasks. A Sweep finds out for how long a value has not changed.


class TimeLimit:
    """Connections for which the same time limit runs, the earliest first."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: the limit; 0 switches it off."""
        self._seconds = seconds
        self._since: OrderedDict[Connection, float] = OrderedDict()
        self._earliest = float("inf")  # a lower bound of `next_due`

    def start(self, conn: Connection, now: float) -> None:
        """Start the limit for `conn` at `now`, or start it again."""
        if self._seconds:
            self._since[conn] = now
            self._since.move_to_end(conn)
            if self._earliest > now + self._seconds:
                self._earliest = now + self._seconds

    def cancel(self, conn: Connection) -> None:
        """Remove `conn`, if it is in the queue."""
        self._since.pop(conn, None)

    def next_due(self) -> float:
        """Return when the first entry expires; infinity if there is none."""
        return next(iter(self._since.values()), float("inf")) + self._seconds

    def take_expired(self, now: float) -> list[Connection]:
        """Remove and return the connections whose limit has expired."""
        expired: list[Connection] = []
        if now < self._earliest:
            return expired
        while (due := self.next_due()) <= now:
            expired.append(self._since.popitem(last=False)[0])
        self._earliest = due
        return expired

    def oldest(self, matters: Callable[[Connection], bool]) -> Connection | None:
        """Return the earliest connection for which the limit matters. Remove those before it."""
        while self._since:
            conn = next(iter(self._since))
            if matters(conn):
                return conn
            del self._since[conn]
        return None

    def connections(self) -> Iterator[Connection]:
        """Yield the connections for which the limit runs, the earliest first."""
        return iter(self._since)

    def __len__(self) -> int:
        return len(self._since)

    def place(self) -> tuple[tuple[int, float], ...]:
        """Return the descriptor of each connection, and when its limit began."""
        return tuple((conn.fd, since) for conn, since in self._since.items())


class AwakeClock(Carried):
    """A monotonic clock that leaves out the time in which the process was seen to be suspended."""

    CARRIED = ("suspended_seconds",)

    def __init__(self, clock: Callable[[], float]) -> None:
        self.monotonic = clock  # seconds
        self.suspended_seconds = 0.0

    def __call__(self) -> float:
        return self.monotonic() - self.suspended_seconds


class Sweep:
    """Visits all connections again and again, and notes which values stay the same."""

    def __init__(self, connections: set[Connection], shares: int) -> None:
        """`shares`: this many calls of `take` visit all connections."""
        self._connections = connections
        self._shares = shares
        self._left: list[Connection] = []  # to be visited in this sweep
        self._share = 0  # the number of connections in one
        # A value and since when it is the same, as seen in the last sweep and in this one.
        self._seen: dict[object, tuple[int, float]] = {}
        self._seen_again: dict[object, tuple[int, float]] = {}

    def take(self) -> list[Connection]:
        """Return the next connections to visit. Some may be closed by now."""
        if not self._left:
            self._left = list(self._connections)
            self._share = -(-len(self._left) // self._shares)
            self._seen, self._seen_again = self._seen_again, {}
        taken = self._left[-self._share :]
        del self._left[-self._share :]
        return taken

    def place(self, numbers: Mapping[object, int]) -> tuple[Any, ...]:
        """Return the state. `numbers`: of connections and pairs, see Links."""
        seen = (
            {numbers[key]: value for key, value in values.items() if key in numbers}
            for values in (self._seen, self._seen_again)
        )
        return (*seen, tuple(numbers[conn] for conn in self._left if conn in numbers), self._share)

    def resume(self, place: Sequence[Any], keys: Mapping[int, Any]) -> None:
        """Go on with the state that `place` returned. `keys`: by number."""
        *seen, left, self._share = place
        self._seen, self._seen_again = ({keys[n]: value for n, value in v.items()} for v in seen)
        self._left = [keys[n] for n in left]

    def unchanged_seconds(self, key: object, value: int, now: float) -> float:
        """Return for how long `value` of `key` is known to be the same (seconds)."""
        seen = self._seen_again.get(key) or self._seen.get(key)
        if seen is None or seen[0] != value:
            seen = (value, now)
        self._seen_again[key] = seen
        return now - seen[1]


class Timers:
    """The queues of the time limits, and the chores."""

    QUEUES = ("handshaking", "waiting", "linger_polls", "silent")

    def __init__(self, limits: Limits) -> None:
        # An ended connection may stay in `handshaking` and `waiting`: LimitEnforcer.run skips it.
        self.handshaking = TimeLimit(limits.handshake_seconds or float("inf"))
        self.waiting = TimeLimit(limits.wait_seconds)
        self.linger_polls = TimeLimit(LINGER_POLL_SECONDS)
        self.silent = TimeLimit(PING_SECONDS)  # WebSockets without traffic
        self._queues: tuple[TimeLimit, ...] = tuple(getattr(self, name) for name in self.QUEUES)
        self.status_clients = TimeLimit(STATUS_CLIENT_SECONDS)  # all that are connected
        self._chores: list[tuple[Throttle, Callable[[], None]]] = []
        self._chores_due = float("inf")

    def every(self, seconds: float, work: Callable[[], None]) -> None:
        """Add a chore: from the next turn on, call `work`, which must not block, periodically."""
        self._chores.append((Throttle(seconds), work))
        self._chores_due = float("-inf")

    def due_chores(self, now: float) -> list[Callable[[], None]]:
        """Return the work that is due, and begin its next period."""
        if now < self._chores_due:
            return []
        due = [work for period, work in self._chores if period.take(now)]
        self._chores_due = min(period.next_at for period, _ in self._chores)
        return due

    def next_due(self) -> float:
        """Return when the first limit or chore is due; infinity if there is none."""
        return min(self._chores_due, *(queue.next_due() for queue in self._queues))

    def end_status_clients(self, now: float) -> None:
        """Close the status clients that have been connected for too long."""
        for conn in self.status_clients.take_expired(now):
            conn.doom()

    def forget(self, conn: Connection) -> None:
        """Remove a closed connection from all queues."""
        for queue in (*self._queues, self.status_clients):
            queue.cancel(conn)

    def place(self) -> dict[str, object]:
        """Return the entries of the queues."""
        return {name: getattr(self, name).place() for name in (*self.QUEUES, "status_clients")}

    def resume(self, place: Mapping[str, Any], connections: Mapping[int, Connection]) -> None:
        """Go on with the entries that `place` returned, for connections by descriptor."""
        for name, entries in place.items():
            for fd, since in entries:
                getattr(self, name).start(connections[fd], since)


# Signals -------------------------------------------------------------------------------------
# A signal handler notes the signal and wakes the loop, which acts on it.


class Signals:
    """The handled signals, and the socket pair by which they wake the loop."""

    def __init__(self) -> None:
        self.noted: deque[int] = deque()  # signals that wait for their actions
        # By number: what the loop calls after that signal. To be filled before `install`.
        self.actions: dict[int, Callable[[], None]] = {}
        self._sockets: tuple[socket.socket, ...] = ()

    def open(self) -> int:
        """Make the sockets. Return the descriptor to wait for. Raises OSError."""
        self._sockets = socket.socketpair()
        for sock in self._sockets:
            sock.setblocking(False)
        return self._sockets[0].fileno()

    def install(self) -> None:
        """Install the handlers. Ignore those of IGNORED_SIGNALS that have no action."""
        signal.set_wakeup_fd(self._sockets[1].fileno(), warn_on_full_buffer=False)
        for number in IGNORED_SIGNALS - set(self.actions):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it is ignored, waitpid finds no child
        for number in self.actions:
            signal.signal(number, lambda number, _: self.noted.append(number))
        # The parent process may have blocked them.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.actions)

    def on_ready(self, _mask: int) -> None:
        """Read the bytes that woke the loop."""
        with contextlib.suppress(BlockingIOError):
            self._sockets[0].recv(4096)

    def take_actions(self) -> Iterator[Callable[[], None]]:
        """Yield the action of each noted signal."""
        while self.noted:
            yield self.actions[self.noted.popleft()]

    def close(self) -> None:
        """Close the sockets. Signals do not wake the loop any more."""
        signal.set_wakeup_fd(-1)
        for sock in self._sockets:
            sock.close()


# Addresses -----------------------------------------------------------------------------------
# Where a client comes from: the peer of its socket, unless a proxy tells another address, in a
# PROXY header or in X-Forwarded-For. Only limits need it. Of a client's address the relay keeps a
# keyed hash of the IPv4 address or of the IPv6 network /64, in memory. The result is a Peer. (A
# gateway keeps the address itself until its PROXY header is sent or the client is closed.)
#
# In this section an address is bytes: its family, then its 4 or 16 bytes. An IPv4-mapped IPv6
# address is an IPv4 address.

IPV4, IPV6, UNIX = b"4", b"6", b"u"  # families; UNIX has no bytes behind it
MAPPED_START = bytes(10) + b"\xff\xff"  # of an IPv4-mapped IPv6 address: RFC 4291, 2.5.5.2
EXEMPT = (UNIX, IPV4 + b"\x7f", IPV6 + bytes(15) + b"\1")  # beginnings of exempt addresses
Network = tuple[bytes, bytes]  # its first and its last address
# Matches an element of X-Forwarded-For that has brackets or a port around the address.
DRESSED_ADDRESS = re.compile(r"\A(?:\[([^][]*)\](?::[0-9]{1,5})?|([0-9.]+):[0-9]{1,5})\Z")


class Peer(NamedTuple):
    """What the limits need to know of the origin of a client."""

    source: bytes | None  # a hash, or the address, see above; None: exempt from limits per source
    is_allowed: bool = True  # by --allow
    is_trusted: bool = False  # its X-Forwarded-For counts


LOCAL_PEER = Peer(None)  # shared by all with these values


def parse_address(text: str) -> bytes | None:
    """Return an IPv4 or IPv6 address as bytes, without its scope id. None: `text` is no address."""
    try:
        if ":" not in text:
            return IPV4 + socket.inet_pton(socket.AF_INET, text)
        packed = socket.inet_pton(socket.AF_INET6, text.partition("%")[0])
    except (OSError, ValueError):  # ValueError: a character that no address has
        return None
    return IPV4 + packed[12:] if packed.startswith(MAPPED_START) else IPV6 + packed


def parse_network(text: str) -> Network:
    """Parse a value of `--allow` or `--trust-forwarded-for`. Raises UsageError."""
    if text == "unix":
        return UNIX, UNIX
    host, slash, length = text.partition("/")
    address = None if "%" in host else parse_address(host)
    if address is None:
        raise UsageError(f"{text!r} is not an IPv4 or IPv6 network, and not unix")
    family, size = address[:1], len(address) - 1
    # The length of an IPv4-mapped network counts the 96 bits before the IPv4 address too.
    least = 96 if ":" in host and family == IPV4 else 0
    most = least + 8 * size
    bits = parse_number(length, most) if slash else most
    if bits is None or bits < least:
        raise UsageError(f"{text!r}: the prefix length must be a number from {least} to {most}")
    host_mask = (1 << most - bits) - 1
    number = int.from_bytes(address[1:], "big")
    first, last = (n.to_bytes(size, "big") for n in (number & ~host_mask, number | host_mask))
    if number & host_mask:
        right = socket.inet_ntop(socket.AF_INET if family == IPV4 else socket.AF_INET6, first)
        raise UsageError(f"{text!r} has host bits set; the network is {right}/{bits - least}")
    return family + first, family + last


def is_in(networks: Sequence[Network], address: bytes) -> bool:
    """Return whether `address` is in one of `networks`."""
    return any(first <= address <= last for first, last in networks)


class Addresses(Carried):
    """Judges where clients come from. It keeps networks and a key, and no client's address."""

    CARRIED = ("_key",)  # so the sources of open connections stay the same

    def __init__(
        self,
        allow: Sequence[Network] = (),
        trusted: Sequence[Network] = (),
        needs_sources: bool = True,
        key: bytes = b"",
    ) -> None:
        """`trusted`: networks of proxies. `needs_sources`: if limits do. `key`: of the hashes."""
        self._allow = allow
        self._trusted = trusted
        self._needs_sources = needs_sources
        self._are_all_equal = not allow and not trusted
        self._key = key or os.urandom(16)
        import hashlib  # here, before the change of the user: see switch_user

        self._hash = hashlib.blake2b  # without OpenSSL, which costs more for each new object

    def judge(self, address: object) -> Peer:
        """Judge a peer by the address from `socket.accept`: of IPv4, IPv6, or a unix socket."""
        host = str(address[0]) if isinstance(address, tuple) else ""
        is_exempt = not self._needs_sources or not host or host.startswith("127.")
        if is_exempt and self._are_all_equal:  # a short way for the common case
            return LOCAL_PEER
        return self._judge(parse_address(host) or UNIX, is_told=False)

    def judge_told(self, text: str) -> Peer | None:
        """Judge an address that a proxy told. Return None if `text` is no address."""
        address = parse_address(text)
        return None if address is None else self._judge(address, is_told=True)

    def judge_forwarded(self, values: Sequence[str]) -> Peer | None:
        """Judge the client of a trusted proxy. `values` are those of all X-Forwarded-For fields.

        The last element that is not in a trusted network counts. Return None if it is no address,
        or if there is none: then the address of the connection counts.
        """
        for element in reversed(",".join(values).split(",")):
            address = parse_address(DRESSED_ADDRESS.sub(r"\1\2", element.strip(" \t")))
            if address is None:
                return None
            if not is_in(self._trusted, address):
                return self._judge(address, is_told=True)
        return None

    def _judge(self, address: bytes, is_told: bool) -> Peer:
        is_allowed = not self._allow or is_in(self._allow, address)
        is_trusted = bool(self._trusted) and is_in(self._trusted, address)
        if not is_told and address.startswith(EXEMPT):
            is_ordinary = is_allowed and not is_trusted
            return LOCAL_PEER if is_ordinary else Peer(None, is_allowed, is_trusted)
        return Peer(self.source_of(address), is_allowed, is_trusted)

    def source_of(self, address: bytes) -> bytes:
        """Return the keyed hash of an address."""
        return self._hash(self._key + address[:9], digest_size=8).digest()  # of IPv6 the /64


# Session -------------------------------------------------------------------------------------
# The state machine of one client. It has no socket, and of the stream it stores the handshake only.
# Framing, Connection, Rendezvous, Server, Ending, Faults, LimitEnforcer and the partner's Session
# report events to it. It calls its Connection, as `transport`.
#
# A session ends in `_end`, in `partner_left` if its partner ended first, or in `abandon` after a
# fault. Every refusal is a call of `_end`.


class State(enum.Enum):
    """The states of a Session. The table is in its docstring."""

    WAIT_UPGRADE = "wait_upgrade"
    WAIT_HANDSHAKE = "wait_handshake"
    WAIT_PARTNER = "wait_partner"
    FORWARDED = "forwarded"  # in a gateway only: see ClientSession there
    RELAYING = "relaying"
    DONE = "done"


# The mood that `client_ended` records, by state. In other states it records no single client.
MOODS_OF_ENDED = {State.WAIT_HANDSHAKE: "empty", State.WAIT_PARTNER: "lonely"}


class Handshake(NamedTuple):
    """The content of a handshake line."""

    token: bytes
    side: bytes | None

    def matches(self, other: Handshake) -> bool:
        """Return whether two clients of one token match: they do unless they name the same side."""
        return self.side != other.side or self.side is None


def parse_handshake(line: bytes) -> Handshake | None:
    """Parse a first line (without its newline). Return None if it is invalid."""
    match = HANDSHAKE.fullmatch(line)
    return Handshake(match[1], match[2]) if match else None


class Session(Carried):
    r"""The state machine of one client, from accept to the end.

    tests/test_session.py executes this table. In the state `done`, a line, bytes and `end` have no
    effect. In any state, every other input that is not listed for it raises AssertionError.

    state           input      next            mood       reply
    --------------  ---------  --------------  ---------  ----------------
    wait_upgrade    opened     wait_handshake  -          -
    wait_upgrade    end        done            -          -
    wait_handshake  postponed  wait_upgrade    -          -
    wait_handshake  handshake  wait_partner    -          -
    wait_handshake  junk       done            errory     bad handshake\n
    wait_handshake  limited    done            lonely     too many waiting\n
    wait_handshake  full       done            empty      relay full\n
    wait_handshake  end        done            empty      -
    wait_partner    matched    relaying        -          ok\n
    wait_partner    bytes      done            impatient  impatient\n
    wait_partner    displaced  done            redundant  -
    wait_partner    end        done            lonely     -
    relaying        bytes      relaying        -          -
    relaying        end        done            happy      -
    relaying        left       done            -          -

    limited: a handshake from a client that a limit refuses, here `--max-waiting-per-source`.
    full: the relay is full, and the first bytes have come.
    postponed: the byte stream, and so the record, begins after an upgrade or a PROXY header.
    A status client stays in wait_upgrade until its answer, so it has no record.
    The record of a pair (mood happy) is written in `end_sent` of the client that stayed. After a
    fault, `Rendezvous.expel` may write it.
    """

    CARRIED = ("accepted", "handshake", "is_trusted", "refused_by", "source", "started", "state")
    PARSERS: ClassVar[Parsers] = {
        "handshake": lambda fields: Handshake(**fields),
        "refused_by": Limit,
        "state": State,
    }
    __slots__ = (*CARRIED, "ended_pair", "pair", "rendezvous", "transport")

    def __init__(
        self,
        transport: Connection,
        rendezvous: Rendezvous,
        started: float,
        role: Role = Role.PORT,
        peer: Peer = LOCAL_PEER,
    ) -> None:
        """Begin at the accept. `started`: the time of day (s since the epoch)."""
        self.transport = transport
        self.rendezvous = rendezvous
        self.state = State.WAIT_HANDSHAKE if role is Role.PORT else State.WAIT_UPGRADE
        self.accepted = rendezvous.clock()  # monotonic seconds
        self.started = started  # the same moment, seconds since the epoch
        self.refused_by: Limit | None = None  # set before the handshake
        self.source: bytes | None  # see Peer
        self.is_trusted: bool
        self.peer_known(peer)
        self.handshake: Handshake | None = None  # while the client waits for a partner
        self.pair: Pair | None = None  # while relaying or forwarded
        self.ended_pair: Pair | None = None  # this client stayed; the record is not yet written

    def __repr__(self) -> str:
        return f"<Session {self.state.value}>"

    @property
    def expects_http(self) -> bool:
        """Whether an upgrade must precede the byte stream. Meaningless within a PROXY header."""
        return self.state is State.WAIT_UPGRADE

    @property
    def is_waiting(self) -> bool:
        """Whether the client waits for a partner."""
        return self.state in (State.WAIT_PARTNER, State.FORWARDED)

    @property
    def is_over(self) -> bool:
        """Whether later bytes of the client have no effect."""
        return self.state is State.DONE

    def peer_known(self, peer: Peer | None) -> None:
        """Note where the client comes from, if it is known: at its accept, or from a proxy."""
        if peer is None:
            return
        self.source, self.is_trusted = peer.source, peer.is_trusted
        if self.refused_by is not Limit.CONNECTIONS:
            self.refused_by = None if peer.is_allowed else Limit.ALLOW

    def proxy_told(self, address: str) -> None:
        """Note the address of the client that a PROXY header tells."""
        self.peer_known(self.rendezvous.addresses.judge_told(address))

    def forwarded_for(self, values: Sequence[str]) -> None:
        """Note the values of X-Forwarded-For. Only those of a trusted proxy count."""
        if self.is_trusted:
            self.peer_known(self.rendezvous.addresses.judge_forwarded(values))

    def handshake_failed(self, failure: str) -> None:
        """Count why the client got no partner: one of FAILURES."""
        self.rendezvous.counters.failures[failure] += not self.transport.is_status

    def stream_postponed(self) -> None:
        """Note that the byte stream begins later: after an upgrade, or after a PROXY header."""
        assert self.state is State.WAIT_HANDSHAKE, self
        self.state = State.WAIT_UPGRADE

    def stream_opened(self) -> None:
        """Note that the byte stream begins: the client is upgraded, or sent a raw handshake."""
        assert self.state is State.WAIT_UPGRADE, self
        self.state = State.WAIT_HANDSHAKE

    def line_received(self, line: bytes) -> None:
        """Check the first line (without its newline). A line that is too long is truncated."""
        if self.state is State.DONE:
            return
        assert self.state is State.WAIT_HANDSHAKE, self
        self.handshake = parse_handshake(line)
        if self.handshake is None:
            self.handshake_failed("bad_handshake")
            self._end("errory", BAD_HANDSHAKE)
            return
        limit = self.refused_by or self.rendezvous.refusal(self)
        if limit is not None:
            self._refuse(limit, "lonely")
            return
        self.state = State.WAIT_PARTNER
        self.rendezvous.join(self)
        if self.is_waiting:
            self.transport.session_changed()

    def relay_full(self) -> None:
        """Refuse a client before its handshake, because the relay is full."""
        assert self.state is State.WAIT_HANDSHAKE, self
        self._refuse(Limit.CONNECTIONS, "empty")

    def refuse_upgrade(self) -> str | None:
        """Return why this client must not be upgraded, if so, and count it as refused."""
        if self.refused_by is not Limit.CONNECTIONS:
            return None
        self.rendezvous.limit_reached(Limit.CONNECTIONS)
        return REFUSALS[Limit.CONNECTIONS].decode().strip()

    def _refuse(self, limit: Limit, mood: str) -> None:
        self.rendezvous.limit_reached(limit)
        self._end(mood, REFUSALS[limit], Reason.REFUSED)

    def bytes_received(self, data: Bytes) -> None:
        """Send bytes to the partner. A client without a partner is refused."""
        pair = self.pair
        if pair is not None:
            pair.count(len(data), not self.transport.framing.is_raw)
            pair.partner_of(self).transport.send(data)
        elif self.state is State.WAIT_PARTNER:
            self._end("impatient", IMPATIENT)
        else:  # the rest of the read that ended this session
            assert self.state is State.DONE, self

    def matched(self, pair: Pair) -> None:
        """Enter the pair: the Rendezvous found a partner."""
        assert self.is_waiting, self
        self.handshake = None  # the token and the side are not needed any more
        self.pair = pair
        self.state = State.RELAYING

    def start_relaying(self) -> None:
        """Send ok, when both sessions are in the pair and it has not ended since."""
        if self.state is State.RELAYING:
            self.transport.session_changed()
            self.transport.send(OK)

    def displaced(self) -> None:
        """End as redundant: a partner was matched with a newer connection of this side."""
        assert self.state is State.WAIT_PARTNER, self
        self._end("redundant")

    def client_ended(self, reason: Reason = Reason.ENDED) -> None:
        """End this client: it left, broke a rule of its encoding, got its HTTP answer or reached
        a time limit, or the relay stops or met a fault.

        Half-close is not supported, as in the reference relay: the end of one direction is the
        end of the client.
        """
        if self.state is not State.DONE:
            self._end(MOODS_OF_ENDED.get(self.state), reason=reason)

    def abandon(self) -> None:
        """End after a fault, without the ordinary steps. `Faults.repair` ends the partner."""
        self.pair = self.ended_pair = None
        self.state = State.DONE
        self.rendezvous.expel(self)

    def partner_left(self, reason: Reason) -> None:
        """End because the partner left."""
        assert self.state in (State.FORWARDED, State.RELAYING), self
        self.ended_pair, self.pair = self.pair, None
        self.state = State.DONE
        self.transport.finish(reason)

    def end_sent(self) -> None:
        """Note that all bytes and the FIN were handed to the kernel, or that the client is gone."""
        pair, self.ended_pair = self.ended_pair, None
        if pair is not None:  # this client stayed: its pair is over
            self.rendezvous.pair_ended(pair)

    def connection_lost(self) -> None:
        """Note that the socket is closed."""
        self.client_ended()
        self.end_sent()

    def _end(self, mood: str | None, reply: bytes = b"", reason: Reason = Reason.ENDED) -> None:
        """Leave the Rendezvous or the pair; without a pair, record the `mood`; reply; finish."""
        pair, self.pair = self.pair, None
        if self.is_waiting:
            self.rendezvous.forget(self)
        self.handshake = None
        self.state = State.DONE
        if pair is not None:  # its record is written in the partner's `end_sent`
            pair.remove(self).partner_left(reason)
        elif mood is not None:
            self.rendezvous.record_single(self, mood)
        if reply:
            self.transport.send(reply)
        self.transport.finish(reason)


# Rendezvous ----------------------------------------------------------------------------------
# The Rendezvous matches clients. A Pair is two matched sessions: it counts their bytes and has what
# their record needs.


class Pair(Carried):
    """Two matched sessions, until their record is written.

    The record does not use the sessions. When a client has left, the pair drops its session.
    """

    CARRIED = (
        *("accepted", "allowance", "is_direct", "level_used", "started"),
        *("total_bytes", "transports", "waiting_time"),
    )
    __slots__ = (*CARRIED, "_flows", "_relayed", "sessions")

    def __init__(self, one: Session, other: Session) -> None:
        first, second = (one, other) if one.accepted <= other.accepted else (other, one)
        self.sessions: tuple[Session, ...] = (one, other)
        self.started = first.started  # seconds since the epoch
        self.accepted = first.accepted  # monotonic seconds
        self.waiting_time: float | None = second.accepted - first.accepted  # None: not answered
        self.total_bytes = 0  # from both clients while the pair ran
        self.allowance: int | None = None  # set by Rates; None: no rate; 0: it must not be read
        self.level_used = 0.0  # what it has used of the level that Rates has for each pair
        raw_clients = one.transport.framing.is_raw + other.transport.framing.is_raw
        self.transports = PAIR_TRANSPORTS[2 - raw_clients]
        self._flows = FLOWS[2 - raw_clients]
        self._relayed = one.rendezvous.counters.relayed
        # Between two raw clients, later reads bypass Framing and Session.
        self.is_direct = raw_clients == 2

    def partner_of(self, session: Session) -> Session:
        """Return the other session of a running pair."""
        one, other = self.sessions
        return other if session is one else one

    def count(self, size: int, is_from_websocket: bool = False) -> None:
        """Count `size` bytes that one client sent to the other."""
        self.total_bytes += size
        self._relayed[self._flows[is_from_websocket]] += size

    def remove(self, leaver: Session) -> Session:
        """Remove the session whose client left. Return the session that stayed."""
        stayed = self.partner_of(leaver)
        self.sessions = (stayed,)
        return stayed

    def record(self, now: float) -> UsageRecord:
        """Return the record of the pair, which is over at `now` (monotonic seconds)."""
        total_time = now - self.accepted
        return UsageRecord(self.started, total_time, self.waiting_time, self.total_bytes, "happy")


class Rendezvous(Carried):
    """The clients that wait, by token, and the pairs that are not yet recorded.

    The clients that wait under one token have the same side, or there is one client without a
    side: other clients would have been matched. So a newcomer matches all of them or none.
    """

    CARRIED: tuple[str, ...] = ("addresses", "counters")
    make_session: ClassVar[type[Session]] = Session
    is_gateway: ClassVar[bool] = False  # if True, the clients that wait are in pairs
    unreachable_until = float("-inf")  # monotonic seconds; a gateway is unhealthy until then

    def __init__(
        self,
        record: Callable[[UsageRecord], None],
        clock: Callable[[], float] = time.monotonic,
        rates: Rates | None = None,
        max_waiting_per_source: int = 0,
        addresses: Addresses | None = None,
    ) -> None:
        """`clock` returns monotonic seconds. `max_waiting_per_source`: 0: no maximum."""
        self.record = record  # called with each record
        self.clock = clock
        self.addresses = addresses or Addresses()
        self.counters = Counters()
        self.is_quota_used_up = False  # newcomers are refused
        self._rates = rates or Rates(0, 0, clock)
        self.limit_reached: Callable[[Limit], None] = lambda limit: None  # called at a refusal
        self._max_waiting_per_source = max_waiting_per_source
        # Key: token. Value: its clients, the newest last. The first client is in a tuple, which
        # needs little memory. A second one turns it into a dict, which serves as an ordered set.
        self.waiting: dict[bytes, tuple[Session] | dict[Session, None]] = {}
        self.waiting_clients = 0
        self.waiting_by_source: dict[bytes | None, int] = {}  # None: of all exempt clients
        self.pairs: set[Pair] = set()

    def attach(self, loop: Server) -> None:
        """Report reached limits to a Server, whose Rendezvous this is."""
        self.limit_reached = loop.limits.note

    def join(self, newcomer: Session) -> None:
        """Match the newcomer with the newest client that waits under its token, or let it wait.

        The newest is taken, because an older connection may be half dead. (The reference relay
        takes an arbitrary one.) The others of its side become redundant.
        """
        assert newcomer.handshake is not None
        token = newcomer.handshake.token
        newest = self._partner_for(newcomer)
        if newest is None:
            self._add(token, newcomer)
            return
        self.forget(newest)
        pair = Pair(newest, newcomer)
        self._rates.join(pair)
        self.pairs.add(pair)
        for session in (newest, newcomer):
            session.matched(pair)
        for session in (newest, newcomer):  # a failed write here can end the pair
            session.start_relaying()
        for other in tuple(self.waiting.get(token, ())):
            other.displaced()

    def _partner_for(self, newcomer: Session) -> Session | None:
        assert newcomer.handshake is not None
        crowd = self.waiting.get(newcomer.handshake.token)
        if crowd is None:
            return None
        newest = next(reversed(crowd))
        assert newest.handshake is not None
        return newest if newcomer.handshake.matches(newest.handshake) else None

    def refusal(self, newcomer: Session) -> Limit | None:
        """Return the limit because of which the newcomer can neither be matched nor wait."""
        if self.is_quota_used_up:
            return Limit.QUOTA
        source, most = newcomer.source, self._max_waiting_per_source
        is_crowded = source is not None and 0 < most <= self.waiting_by_source.get(source, 0)
        return Limit.SOURCE if is_crowded and self._partner_for(newcomer) is None else None

    def oldest_of_busiest_source(self) -> Session | None:
        """Return a waiting client of the source with most of them: the one of its oldest token."""
        if not self.waiting_by_source:
            return None
        counts, most = self.waiting_by_source, max(self.waiting_by_source.values())
        sessions = (session for crowd in self.waiting.values() for session in crowd)
        return next(one for one in sessions if counts.get(one.source) == most)

    def forget(self, session: Session) -> None:
        """Remove a client that waits."""
        assert session.handshake is not None
        assert session in self.waiting.get(session.handshake.token, ()), session
        self._remove(session.handshake.token, session)

    def _remove(self, token: bytes, session: Session) -> None:
        crowd = self.waiting[token]
        if len(crowd) == 1:
            del self.waiting[token]
        elif isinstance(crowd, dict):
            del crowd[session]
        self._count(session, -1)

    def _add(self, token: bytes, session: Session) -> None:
        self._count(session, 1)
        crowd = self.waiting.get(token)
        if crowd is None:
            self.waiting[token] = (session,)
        elif isinstance(crowd, dict):
            crowd[session] = None
        else:
            self.waiting[token] = {crowd[0]: None, session: None}

    def _count(self, session: Session, change: int) -> None:
        self.waiting_clients += change
        source = session.source
        self.waiting_by_source[source] = self.waiting_by_source.get(source, 0) + change
        if not self.waiting_by_source[source]:
            del self.waiting_by_source[source]

    def record_single(self, session: Session, mood: str) -> None:
        """Record a client that never had a partner."""
        self.counters.ended[mood, TRANSPORTS[not session.transport.framing.is_raw]] += 1
        total_time = self.clock() - session.accepted
        self.record(UsageRecord(session.started, total_time, None, 0, mood))

    def pair_ended(self, pair: Pair) -> None:
        """Record a pair that is over."""
        self._rates.leave(pair)
        self.pairs.discard(pair)
        record = pair.record(self.clock())
        self.counters.pair_ended(pair.transports, record)
        self.record(record)

    def expel(self, session: Session) -> None:
        """Remove `session` from all collections after a fault, and count the waiting clients again.

        This searches all of them, because the fault may have left the session inconsistent.
        """
        for token in [token for token, crowd in self.waiting.items() if session in crowd]:
            self._remove(token, session)
        self.waiting_clients, self.waiting_by_source = 0, {}
        for crowd in self.waiting.values():
            for other in crowd:
                self._count(other, 1)
        for pair in [pair for pair in self.pairs if session in pair.sessions]:
            if len(pair.sessions) > 1:
                pair.remove(session)
            else:
                self.pair_ended(pair)

    def resume_waiting(self, session: Session) -> None:
        """Let a client wait again, after a reload. The order of the calls is the order of age."""
        assert session.handshake is not None
        self._add(session.handshake.token, session)

    def resume_pair(self, place: Mapping[str, Any], sessions: Sequence[Session]) -> Pair:
        """Return a pair again, after a reload. With one session, the partner's client has left."""
        pair = Pair(sessions[0], sessions[-1])
        pair.resume(place)
        pair.sessions = tuple(sessions)
        for session in sessions:
            if len(sessions) == 1:
                session.ended_pair = pair
            else:
                session.pair = pair
        self.pairs.add(pair)
        return pair

    def incomplete_bytes(self) -> int:
        """Return the bytes of all pairs that are not yet recorded."""
        return sum(pair.total_bytes for pair in self.pairs)

    def relayed_bytes(self) -> int:
        """Return the bytes of all pairs since the start."""
        return self.counters.ended_bytes + self.incomplete_bytes()


# Framing -------------------------------------------------------------------------------------
# A Framing decodes and encodes one client's byte stream, which is one line and then data. Raw
# clients send the stream as it is. WebSocket clients send it as the payload of messages. A Framing
# replaces itself with the next one. Those in brackets are in ws_frames. The first one is only for
# listeners behind a proxy that sends PROXY headers:
#
#     [ProxyFraming] --> DetectFraming --+--> RawFraming
#                                        +--> [HttpFraming] --> [WebSocketFraming]
#
# A status client has a [StatusFraming] instead, for one HTTP request.
#
# When the Connection finishes, DISCARD replaces the last Framing.


class Framing(Carried):
    """The decoder and encoder of one client. This base class discards all input.

    The carried fields hold the position in the stream.
    """

    __slots__ = ("_session", "_transport")

    is_raw = True  # data is sent as it is
    direct_read_bytes = READ_BYTES  # the largest read that is not queued as bulk
    max_read_bytes = READ_BYTES  # for one read
    is_costly = False  # the next read may take long, for its size

    def __init__(self, session: Session, transport: Connection) -> None:
        self._session = session
        self._transport = transport

    def receive(self, data: memoryview) -> None:
        """Decode `data`, the next bytes from the client, and report the result to the Session."""

    def encode(self, data: Bytes) -> Sequence[Bytes]:
        """Return the encoding of `data` in parts, which are valid until `data` changes."""
        return (data,)

    def closing_bytes(self, reason: str) -> bytes:
        """Return the bytes to send before the end of the connection. `reason`: of a Reason."""
        return b""

    def backlog_sent(self) -> None:
        """Note that the backlog is empty."""

    def keep_alive(self) -> None:
        """Note that PING_SECONDS passed without traffic."""


DISCARD = Framing.__new__(Framing)  # of clients whose Session has ended; it uses no fields


class RawFraming(Framing):
    """Finds the handshake line of a raw stream, and passes later bytes on."""

    __slots__ = ("_line", "_past_line")
    CARRIED = ("_line", "_past_line")

    def __init__(self, session: Session, transport: Connection) -> None:
        super().__init__(session, transport)
        self._line = b""  # the received start of the first line
        self._past_line = False

    def receive(self, data: Bytes) -> None:
        """Find the line in `data`, or pass `data` on.

        A line of MAX_LINE_BYTES without a newline is invalid. Bytes after the newline are data,
        in the same read too.
        """
        if self._past_line:
            self._session.bytes_received(data)
            return
        start = len(self._line)
        line = self._line + data[: MAX_LINE_BYTES - start]
        newline = line.find(b"\n", start)
        if newline < 0 and len(line) < MAX_LINE_BYTES:
            self._line = line
            return
        self._end_line(line[:newline] if newline >= 0 else line)
        rest = data[newline + 1 - start :] if newline >= 0 else data[:0]
        if rest:
            self._session.bytes_received(rest)

    def message_ended(self) -> None:
        """Accept the end of a message instead of a newline, if the handshake is complete.

        The reference relay's own test client sends no newline.
        """
        if not self._past_line and parse_handshake(self._line):
            self._end_line(self._line)

    def _end_line(self, line: bytes) -> None:
        self._line = b""
        self._past_line = True
        self._session.line_received(line)


class DetectFraming(Framing):
    """Reads the first bytes of a client and selects its Framing: raw or HTTP."""

    __slots__ = ("_start",)
    CARRIED = ("_start",)

    max_read_bytes = FIRST_READ_BYTES

    def __init__(self, session: Session, transport: Connection) -> None:
        super().__init__(session, transport)
        self._start = b""  # the first bytes, while they are ambiguous

    def receive(self, data: memoryview) -> None:
        """Install the next Framing once the first bytes are unambiguous."""
        session, transport = self._session, self._transport
        http = ws_frames.HTTP_BEGINNINGS if ws_frames else ()
        unexpected = (RAW_BEGINNING,) if session.expects_http else http
        start = self._start + data[: len(RAW_BEGINNING)]
        if start.startswith(unexpected):
            (session.stream_opened if session.expects_http else session.stream_postponed)()
        elif any(beginning.startswith(start) for beginning in unexpected):
            self._start = start
            return
        stream = RawFraming(session, transport)
        if session.expects_http:  # the stream begins later, in messages
            transport.framing = ws_frames.HttpFraming(session, transport, stream)
        else:
            transport.framing = stream
            if session.refused_by is Limit.CONNECTIONS:
                session.relay_full()
        if self._start:
            transport.framing.receive(memoryview(self._start))
        transport.framing.receive(data)


def first_framing(
    session: Session, transport: Connection, role: Role, has_proxy_header: bool
) -> ws_frames.Framing:
    """Return the Framing of a newcomer. The other values are those of its listener."""
    framing: ws_frames.Framing = DetectFraming(session, transport)
    if role is Role.STATUS:
        framing = ws_frames.StatusFraming(session, transport)
    return ws_frames.ProxyFraming(session, transport, framing) if has_proxy_header else framing


# Connection ----------------------------------------------------------------------------------
# A Connection has one non-blocking socket, a backlog, an interest and a phase. The interest is the
# set of events that the selector waits for. It is computed from the fields of the connection and
# of its partner whenever one of these fields changes.
#
# A connection is not read while its partner has a backlog. So a backlog is at most the encoding of
# one read and the Pongs of a WebSocket, or the content of one pipe (PIPE_BYTES), which may have
# been moved to memory. When all backlogs together have used up --max-memory, a paired client is
# read only while its partner's socket is writable (see `backlog`).
#
# After a failed write the relay still reads and delivers what has arrived from this client. After
# our FIN it goes on reading: to close a socket with unread input sends a reset, which can destroy
# bytes in flight to the peer.


class Connection(Carried):
    """One client's socket. It carries out the calls of its Session and reports events to it.

    tests/test_connection.py executes this table. Other events do not change the phase. (In
    `open`, the end of the peer is reported to the Session, which calls `finish`.)

    phase      event                      next       what is done
    ---------  -------------------------  ---------  -----------------------------------------
    open       finish                     flushing   the closing bytes are queued
    flushing   flushed                    lingering  our end is sent
    flushing   flushed, peer had ended    closed     -
    flushing   peer ended                 flushing   -
    lingering  peer ended                 closed     -
    lingering  5 s since acknowledged     closed     -
    lingering  60 s, nothing reported     closed     -
    any        doom                       closed     the backlog is discarded

    flushed: the backlog is sent, or a write failed and it was discarded.
    doom: a stall, an eviction, the time limit of a status client, the end of a stop, a fault, a
    refusal of the selector, or a failed dial of a gateway.
    The Server closes the socket of a closed connection at the end of the turn.
    """

    CARRIED: tuple[str, ...] = (
        *("is_bulk", "_linger_deadline", "_peer_ended", "_write_failed"),
        *("fd", "is_status", "phase", "read_bytes", "sent_bytes", "session"),
    )
    PARSERS: ClassVar[Parsers] = {"phase": Phase}
    is_connected = True  # False: a gateway still dials
    __slots__ = (
        *(*CARRIED, "backlog", "framing"),  # see place_connection
        *("_server", "counted_bytes", "is_unpolled", "mask", "sock"),
    )

    def __init__(
        self, sock: socket.socket, server: Server, role: Role, peer: Peer, has_proxy_header: bool
    ) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self._server = server
        rendezvous, started = server.rendezvous, server.wallclock()
        self.session = rendezvous.make_session(self, rendezvous, started, role, peer)
        self.is_status = role is Role.STATUS  # of a status listener
        self.framing = first_framing(self.session, self, role, has_proxy_header)
        self.phase = Phase.OPEN
        self.read_bytes = 0  # all that was read, as it was on the wire
        self.sent_bytes = 0  # all that the kernel accepted, likewise
        # None: nothing is queued. Empty: the partner is not read until this socket is writable.
        self.backlog: bytearray | Pipe | None = None
        self.counted_bytes = 0  # of the backlog, in the server's MemoryBudget
        self.mask = 0  # the registered events; only Server.update_interest sets this
        self.is_unpolled = False  # not in the selector: in the bulk queue, or a gateway's dial
        self.is_bulk = False  # the last read was large or costly: the next one is queued
        self._write_failed = False  # later bytes for this client are discarded
        self._peer_ended = False  # the peer's end, or its reset, was read
        # Set when all is seen to be acknowledged, or at once if the system does not report that.
        self._linger_deadline: float | None = None

    def __repr__(self) -> str:
        """Return the state of the connection, without data of its client."""
        flags = " write_failed" * self._write_failed + " peer_ended" * self._peer_ended
        polled = " read" * bool(self.mask & EVENT_READ) + " write" * bool(self.mask & EVENT_WRITE)
        states = f"{self.phase.value} {self.session.state.value}"
        return f"<Connection fd={self.fd} {states}{polled} queued={self.queued_bytes()}{flags}>"

    @property
    def partner(self) -> Connection | None:
        """Return the connection of the partner, if the client is in a pair."""
        pair = self.session.pair
        return None if pair is None else pair.partner_of(self.session).transport

    def interest(self) -> int:
        """Return the events that this connection can handle now."""
        if self.phase is Phase.CLOSED:
            return 0
        mask = 0 if self.backlog is None else EVENT_WRITE
        pair, partner = self.session.pair, self.partner
        has_room = partner is None or (partner.backlog is None and not partner._write_failed)
        has_allowance = pair is None or pair.allowance != 0
        return mask | EVENT_READ if has_room and has_allowance and not self._peer_ended else mask

    def on_ready(self, mask: int) -> None:
        """Do a small write now, and a read if the last one was cheap. Queue the others as bulk."""
        bulk = 0
        # An earlier event of the turn, or the write, can have changed `self.mask`.
        if mask & self.mask & EVENT_WRITE:
            if self.queued_bytes() >= BULK_BYTES:
                bulk |= EVENT_WRITE
            else:
                self.drain()
        if mask & self.mask & EVENT_READ:
            if self.is_bulk:
                bulk |= EVENT_READ
            else:
                self.receive(self.framing.direct_read_bytes)
        if bulk:
            self._server.bulk.add(self, bulk)

    # Orders of the Session and the Framing.

    def send(self, data: Bytes) -> None:
        """Encode and send `data`, now or later. The caller may then reuse its buffer."""
        self.write(*self.framing.encode(data))

    def write(self, data: Bytes, *more: Bytes) -> None:
        """Send encoded bytes, as many as the kernel accepts now. Copy the rest to the backlog."""
        if self._write_failed:
            return
        if self.backlog is not None:
            assert isinstance(self.backlog, bytearray), "the backlog is a pipe"
            for part in (data, *more):
                self.backlog += part
            self._server.memory.count(self)
            return
        try:
            sent = self.sock.sendmsg((data, *more)) if more else self.sock.send(data)
        except OSError as error:
            if error.errno not in NO_ROOM_NOW:
                self._stop_writing()
                return
            sent = 0
        self.sent_bytes += sent
        if more or sent < len(data):  # with several parts, `unsent` finds the rest
            left = unsent((data, *more), sent)
            if left:
                self._set_backlog(left)

    def answer(self, request: ws_frames.Request) -> bytes:
        """Return the answer to a status client."""
        return bytes(self._server.answer_status(request))

    def queued_bytes(self) -> int:
        """Return the size of the backlog."""
        return len(self.backlog or ())

    def is_behind(self, most: int) -> bool:
        """Return whether more than `most` bytes are queued, or more than memory allows."""
        return self.queued_bytes() > min(most, self._server.memory.max_read_bytes)

    def session_changed(self) -> None:
        """After the handshake: start the time limit of a client that waits, or register a pair."""
        timers = self._server.timers
        timers.handshaking.cancel(self)  # each entry of 15,000 clients would take 0.1 KB
        if self.session.is_waiting:
            timers.waiting.start(self, self._server.clock())
        else:
            timers.waiting.cancel(self)
            self._server.update_interest(self)

    def note_activity(self) -> None:
        """Restart the time of silence, after which `framing.keep_alive` is called."""
        self._server.timers.silent.start(self, self._server.clock())

    def finish(self, reason: Reason) -> None:
        """Queue the closing bytes and enter the phase `flushing`. Nothing can be sent later."""
        if self.phase is not Phase.OPEN:
            return
        closing_bytes, self.framing = self.framing.closing_bytes(reason.value), DISCARD
        self._enter(Phase.FLUSHING)
        if self.backlog is not None and not len(self.backlog):
            self._set_backlog(None)
        if closing_bytes:
            self.write(closing_bytes)
        self.advance()
        self._server.update_interest(self)

    def receive(self, largest: int = PIPE_BYTES) -> int:
        """Read once, at most `largest` bytes, and pass them on. Return how many came."""
        memory, pair = self._server.memory, self.session.pair
        most, bulk_bytes = memory.max_read_bytes, memory.bulk_bytes
        if not most:
            partner = self.partner
            if partner is not None and not takes_bytes(partner.fd, seconds=0):
                self.session.rendezvous.limit_reached(Limit.MEMORY)
                partner._set_backlog(bytearray())
                return 0
            most = FIRST_READ_BYTES if partner is None else PRESSED_READ_BYTES
        limited = pair if pair is not None and pair.allowance is not None else None
        if limited is not None:
            limited.sessions = limited.partner_of(self.session), self.session  # they take turns
            if not (most := min(most, self._server.rates.limit(limited))):
                return 0
        if pair is not None and not pair.is_direct:
            pair = None
        if pair is not None and self.is_bulk and (count := self._splice(pair, most)):
            return count
        buffer = self._server.buffer
        count = receive_into(buffer, self.sock, min(self.framing.max_read_bytes, most, largest))
        if count < 0:
            return 0
        if not count:
            self._peer_ended = True
            self.session.client_ended()
            self.advance()
            self._server.update_interest(self)
            return 0
        self.read_bytes += count
        if limited is not None:
            self._server.rates.spend(limited, count)
        if pair is not None:
            pair.count(count)
            pair.partner_of(self.session).transport.write(buffer[:count])
        else:
            self.framing.receive(buffer[:count])
        self.is_bulk = count >= bulk_bytes or self.framing.is_costly
        return count

    def _splice(self, pair: Pair, most: int) -> int:
        """Fill a pipe and pour it to the partner. Return how much was read; 0: use a recv."""
        partner = self.partner
        assert partner is not None
        pipe = self._server.pipes.lend()
        if pipe is None:
            return 0
        try:
            count = pipe.fill(self.sock, most)
            if count:
                self.read_bytes += count
                self.is_bulk = count >= self._server.memory.bulk_bytes
                pair.count(count)
                if pair.allowance is not None:
                    self._server.rates.spend(pair, count)
                if not partner._flush(pipe):
                    partner._set_backlog(pipe)
            return count
        finally:
            if partner.backlog is not pipe:
                self._server.pipes.give_back(pipe)

    def drain(self) -> int:
        """Send from the backlog. Return how many bytes were removed from it."""
        assert self.backlog is not None
        before = len(self.backlog)
        if not self._flush(self.backlog):
            self._server.memory.count(self)
            return before - len(self.backlog)
        self._set_backlog(None)
        self.framing.backlog_sent()
        self.advance()
        return before

    def _flush(self, backlog: bytearray | Pipe) -> bool:
        """Send from `backlog`. Return whether it is finished: sent, or to be discarded."""
        if self._write_failed:
            return True
        try:
            self.sent_bytes += send_from(backlog, self.sock)
        except OSError as error:
            if error.errno in NO_ROOM_NOW:
                return False
            self._stop_writing()
        return self._write_failed or not len(backlog)

    def _stop_writing(self) -> None:
        """Note a failed write. The partner is no longer read: its bytes would be lost."""
        self._write_failed = True
        # On Linux, later reads return the received bytes, and then the end, which ends the pair.
        with contextlib.suppress(OSError):  # after a reset, a read returns the error
            self.sock.shutdown(socket.SHUT_RD)
        partner = self.partner
        if partner is not None and partner._write_failed:  # nothing can be sent either way
            self.session.client_ended()
        elif partner is not None:
            self._server.update_interest(partner)

    def _set_backlog(self, backlog: bytearray | Pipe | None) -> None:
        """Set or clear the backlog. The interest of both connections depends on it."""
        old, self.backlog = self.backlog, backlog
        if isinstance(old, Pipe):
            self._server.pipes.give_back(old)
        self._server.memory.count(self)
        self._server.update_interest(self)
        partner = self.partner
        if partner is not None:
            self._server.update_interest(partner)

    def release_pipe(self, pipe: Pipe) -> None:
        """Move the bytes of `pipe`, the backlog, to memory, if there is room. Give it back."""
        with contextlib.suppress(MemoryError):
            self._set_backlog(pipe.read_all())

    # What closes this socket, and when: see the table in the docstring.

    def _enter(self, phase: Phase) -> None:
        old, self.phase = self.phase, phase
        self._server.connections_by_phase[old] -= 1
        self._server.connections_by_phase[phase] += 1

    def advance(self) -> None:
        """Enter the next phase, if its condition holds."""
        is_flushed = self.phase is Phase.FLUSHING and self.backlog is None
        if self._peer_ended and (is_flushed or self.phase is Phase.LINGERING):
            self.doom()
        elif is_flushed:
            self._enter(Phase.LINGERING)
            with contextlib.suppress(OSError):  # after a reset, the next read returns the error
                self.sock.shutdown(socket.SHUT_WR)
            self.session.end_sent()
            self.check_linger(self._server.clock())

    def check_linger(self, now: float) -> None:
        """Close a lingering connection after its time. Otherwise check again later."""
        if self.phase is not Phase.LINGERING:
            return
        if self._linger_deadline is None:
            pending = unacknowledged_bytes(self.sock)
            seconds = LINGER_BLIND_SECONDS if pending is None else LINGER_SECONDS
            self._linger_deadline = None if pending else now + seconds
        if self._linger_deadline is not None and now >= self._linger_deadline:
            self.doom()
        else:
            self._server.timers.linger_polls.start(self, now)

    def doom(self) -> None:
        """Have the socket closed at the end of this turn."""
        if self.phase is not Phase.CLOSED:
            self._enter(Phase.CLOSED)
            self._server.doomed[self] = None
            self._server.update_interest(self)

    def close(self) -> None:
        """Close the socket and discard the backlog. Only the Server calls this."""
        try:
            if self.backlog is not None or self.mask:
                self._set_backlog(None)
        finally:
            self.sock.close()


# Accepting -----------------------------------------------------------------------------------
# An Acceptor accepts newcomers. It pauses when a resource is used up (places of status clients;
# descriptors: if no client makes room, and for status clients none does), and after an error of
# accept or of the selector that may concern the next one too. During a pause the listeners are not
# in the selector, and newcomers wait in the kernel's queue.


class ListenerHandler(NamedTuple):
    """One listener in the selector."""

    acceptor: Acceptor
    listener: Listener

    def on_ready(self, _mask: int) -> None:
        """Accept newcomers."""
        self.acceptor.accept(self.listener)


class Acceptor(Carried):
    """Accepts the newcomers of a group of listeners, or pauses.

    The Server has one for clients of the relay, and one for status clients.
    """

    CARRIED = ("_complaints", "_may_end_early", "retry_at")

    def __init__(
        self, loop: Server, listeners: Sequence[Listener], keepalive_seconds: float
    ) -> None:
        self._loop = loop
        self._listeners = list(listeners)
        self._options = socket_options(keepalive_seconds)
        self._optioned: set[Listener] = set()  # their newcomers inherit the socket options
        self._selector: selectors.BaseSelector | None = None
        self.is_accepting = False
        self.retry_at = float("inf")  # the end of the pause, monotonic seconds; infinity: no pause
        # Whether a closed connection ends the pause: not after an error that could repeat at once.
        self._may_end_early = False
        self._complaints = Throttle()

    def start(self, selector: selectors.BaseSelector) -> None:
        """Begin to accept, or go on with a pause. Raises OSError if the selector refuses one."""
        self._selector = selector
        for listener in self._listeners:
            set_options(listener.sock, self._options)
        if self.retry_at == float("inf"):  # else a reload carried a pause
            self._register()

    def _register(self) -> None:
        assert self._selector is not None
        for listener in self._listeners:
            handler = ListenerHandler(self, listener)
            self._selector.register(listener.fd, EVENT_READ, handler)
        self.is_accepting = bool(self._listeners)

    def accept(self, listener: Listener) -> None:
        """Accept at most ACCEPTS_PER_WAKEUP newcomers of a listener."""
        has_made_room = False
        for count in range(ACCEPTS_PER_WAKEUP):
            if not self.is_accepting or (has_made_room and count > 1):
                return
            try:
                sock, address = listener.sock.accept()
            except BlockingIOError:
                # The queue is empty. On Linux, connections that are queued from now on inherit the
                # options that `start` has set.
                if sys.platform == "linux":
                    self._optioned.add(listener)
                return
            except OSError as error:
                # Without a free descriptor, accept fails with EMFILE even if the queue is empty. As
                # the listener was ready, the first call has a newcomer: make room for that one.
                if error.errno == errno.EMFILE and count:
                    return
                may_evict = error.errno == errno.EMFILE and not listener.endpoint.is_status
                if may_evict and self._loop.free_descriptor():
                    has_made_room = True
                elif error.errno in OUT_OF_RESOURCES:
                    self.pause(error_text(error))
                elif error.errno not in NEWCOMER_LOST:
                    name = errno.errorcode.get(error.errno or 0, "unknown error")
                    self.pause(f"accept: {name}, {error_text(error)}", may_end_early=False)
            else:
                try:
                    if listener not in self._optioned:
                        set_options(sock, self._options)
                    peer = self._loop.rendezvous.addresses.judge(address)
                    endpoint = listener.endpoint
                    self._loop.admit(sock, endpoint.role, peer, endpoint.has_proxy_header)
                except Exception:
                    sock.close()
                    raise

    def pause(self, why: str, may_end_early: bool = True, seconds: float = PAUSE_SECONDS) -> None:
        """Stop accepting for so many seconds. Log the reason, at most once a minute."""
        if not self.is_accepting:
            return
        now = self._loop.clock()
        self._may_end_early = may_end_early
        self.retry_at = now + seconds
        self._unregister()
        if self._complaints.take(now):
            who = "newcomers" if self is self._loop._acceptor else "status clients"
            log.warning("%s have to wait: %s", who, why)

    def end_pause(self, now: float) -> None:
        """End a pause, if its time is over or if it may end earlier."""
        if self.is_accepting or (now < self.retry_at and not self._may_end_early):
            return
        self.retry_at = now + PAUSE_SECONDS  # if `_register` fails
        self._unregister()
        try:
            self._register()
        except OSError as error:
            self.is_accepting = True
            self.pause(error_text(error), may_end_early=False)
        else:
            self.retry_at = float("inf")

    def close(self) -> None:
        """Close the listeners."""
        self._unregister()
        self.retry_at = float("inf")
        for listener in self._listeners:
            listener.close()
        self._listeners = []

    def _unregister(self) -> None:
        self.is_accepting = False
        if self._selector is not None:
            registered = self._selector.get_map()
            for listener in self._listeners:
                if listener.fd in registered:
                    self._selector.unregister(listener.fd)


# Stops ---------------------------------------------------------------------------------------
# A stop signal begins the Ending. `StopProgress` checks whether a stop has delivered everything. A
# drain, which may precede a stop, waits for pairs only.


class StopProgress:
    """Checks the delivery of the bytes that had arrived when a stop began."""

    def __init__(self, connections: Iterable[Connection]) -> None:
        """Note how much has arrived from each client that has a partner."""
        self._arrived_bytes = {
            conn: conn.read_bytes + unread_bytes(conn.sock)
            for conn in connections
            if conn.session.pair is not None
        }
        self._undelivered = list(connections)

    def finished_leavers(self, connections: Iterable[Connection]) -> Iterator[Connection]:
        """Yield the client that is to leave first, for each pair whose arrived bytes are read."""
        for leaver in self.leavers(connections):
            partner = leaver.partner
            assert partner is not None
            if all(one.read_bytes >= self._arrived_bytes[one] for one in (leaver, partner)):
                yield leaver

    def leavers(self, connections: Iterable[Connection]) -> Iterator[Connection]:
        """Yield, for each of `connections` in a running pair, the client that is to leave first.

        A client without a backlog leaves first. The other one then flushes its backlog, and the
        record is written. A pair that the caller ends is not yielded again.
        """
        for conn in tuple(connections):
            partner = conn.partner
            if partner is not None:
                yield partner if conn.backlog is not None else conn

    def is_complete(self) -> bool:
        """Return whether the end of each connection is acknowledged."""
        while self._undelivered and is_delivered(self._undelivered[-1]):
            self._undelivered.pop()
        return not self._undelivered


def is_delivered(conn: Connection) -> bool:
    """Return whether all bytes and our FIN are acknowledged (sent, if that is not reported)."""
    if conn.phase is Phase.LINGERING:
        return not unacknowledged_bytes(conn.sock)
    return conn.phase is Phase.CLOSED


class Ending:
    """The end of the relay, which stop signals begin: a drain, if one is wanted, and then a stop.

    It owns the phase of the Server.
    """

    def __init__(self, loop: Server, drain_seconds: float) -> None:
        """`drain_seconds`: how long pairs may run on after the first signal; 0: no drain."""
        self._loop = loop
        self._drain_seconds = drain_seconds
        self.phase = ServerPhase.SERVING
        self._signals = 0  # how many have come
        self._unpaired_are_ended = False  # without a fault, in a drain or a stop
        self._deadline = float("inf")  # of the current phase
        self._progress: StopProgress | None = None  # set when a stop begins

    @property
    def drain_seconds_left(self) -> float:
        """Return for how long pairs may run on, if the relay drains; else 0."""
        is_draining = self.phase is ServerPhase.DRAINING
        return max(0.0, self._deadline - self._loop.clock()) if is_draining else 0.0

    def next_due(self) -> float:
        """Return when `go_on` is due; infinity while the relay serves."""
        if self.phase is ServerPhase.SERVING:
            return float("inf")
        is_waiting = self.phase is ServerPhase.DRAINING and self._unpaired_are_ended
        return self._deadline if is_waiting else self._loop.clock() + STOP_POLL_SECONDS

    def signalled(self, number: int) -> None:
        """Begin a drain or a stop, or end what is under way."""
        name = signal.Signals(number).name
        self._signals += 1
        if self.phase is ServerPhase.DRAINING:
            self._end_drain(name)
        elif self.phase is ServerPhase.SERVING and self._drain_seconds:
            pairs = count_pairs(self._loop)
            log.info("%s: draining for at most %g s; pairs: %d", name, self._drain_seconds, pairs)
            self.drain()
        elif self.phase is ServerPhase.SERVING:
            log.info("%s: stopping", name)
            self.stop()
        elif self._drain_seconds and self._signals == 2:  # meant for the drain
            log.info("%s: stopping already", name)
        else:
            log.info("%s: ending at once", name)
            self.phase = ServerPhase.OVER

    def drain(self) -> None:
        """Begin to drain: accept no more clients, and end those that have no partner."""
        self._deadline = self._loop.clock() + self._drain_seconds
        self.phase = ServerPhase.DRAINING
        self._end_unpaired()

    def _end_drain(self, why: str) -> None:
        log.info("%s: the drain ends; pairs left: %d", why, count_pairs(self._loop))
        self.stop()

    def stop(self) -> None:
        """Begin to stop: end clients without a partner, and pairs whose arrived bytes are read."""
        self.phase = ServerPhase.STOPPING_BYTES
        self._deadline = self._loop.clock() + STOP_FLUSH_SECONDS
        self._end_unpaired()
        self._progress = StopProgress(self._loop.connections)
        self._end_pairs(self._progress.finished_leavers(self._loop.connections))

    def _end_unpaired(self) -> None:
        """Close listeners, and end all clients without a partner; in a drain, no status clients."""
        faults, is_drain = self._loop.faults, self.phase is ServerPhase.DRAINING
        faults_before = faults.count
        faults.guard(partial(self._loop.close_listeners, keep_status=is_drain))
        for conn in tuple(self._loop.connections):
            is_unpaired = conn.session.pair is None or conn.session.is_waiting
            if is_unpaired and not (is_drain and conn.is_status):
                faults.guard(partial(conn.session.client_ended, Reason.STOPPING), conn)
        self._unpaired_are_ended = faults.count == faults_before

    def _end_pairs(self, leavers: Iterable[Connection]) -> None:
        for leaver in leavers:
            end = partial(leaver.session.client_ended, Reason.STOPPING)
            self._loop.faults.guard(end, leaver)

    def end_finished_pairs(self, served: Iterable[Connection]) -> None:
        """In a stop, end each pair of a served connection, if all its arrived bytes are read."""
        if self._progress is not None:
            self._end_pairs(self._progress.finished_leavers(served))

    def go_on(self, now: float) -> None:
        """Enter the next phase of the stop, if this one is complete or its deadline passed."""
        pairs = self._loop.rendezvous.pairs
        if self.phase is ServerPhase.DRAINING:
            if not self._unpaired_are_ended:
                self._end_unpaired()
            if pairs and now < self._deadline:
                return
            self._end_drain("time is up" if pairs else "all pairs have ended")
        if self.phase is ServerPhase.STOPPING_BYTES:
            if self._progress is not None:  # None: `stop` met a fault
                if now < self._deadline and not self._progress.is_complete():
                    return
                leavers = self._progress.leavers(self._loop.connections)
                self._loop.faults.guard(partial(self._end_pairs, leavers))
            self._loop.close_connections()
            self._loop.update_current()
            self._loop.recorder.stop()
            self.phase = ServerPhase.STOPPING_RECORDS
            self._deadline = now + STOP_RECORD_SECONDS
        if self._loop.recorder.finished or now >= self._deadline:
            self.phase = ServerPhase.OVER


# Faults --------------------------------------------------------------------------------------
# Unexpected exceptions are contained: they end the connection that was being served, and its pair.
# A log message has the traceback and the type of the exception. It has the message only of an
# AssertionError, OSError or MemoryError, which contains no data of a client.


class Faults(Carried):
    """Contains exceptions: counts them, logs each place once a minute, and repairs the state."""

    CARRIED = ("_tally",)

    def __init__(self, loop: Server) -> None:
        self._loop = loop
        self._tally = Tally()
        self.need_repair = False  # there was a fault since the last repair
        # `bytes` maps memory and does not touch it, so that it is not resident.
        self._memory_reserve: bytes | None = bytes(MEMORY_RESERVE_BYTES)

    @property
    def count(self) -> int:
        """Return the number of faults since the start."""
        return sum(self._tally.counts.values())

    def guard(self, work: Callable[[], object], served: object = None) -> None:
        """Call `work`, on behalf of `served` if given, and contain an exception."""
        try:
            work()
        except Exception:
            try:
                self.contain(served)
            except MemoryError:
                self.need_repair = True

    def contain(self, served: object) -> None:
        """Note the exception that is being handled, and end the connection that was served."""
        self.need_repair = True
        self._note_exception()
        if isinstance(served, Connection):
            self._end(served)
        elif isinstance(served, ListenerHandler):  # it would be ready again at once
            self.guard(partial(served.acceptor.pause, "accepting failed", may_end_early=False))
        elif isinstance(served, Acceptor):  # it could not resume
            served.retry_at = self._loop.clock() + PAUSE_SECONDS

    def shed_backlog(self) -> None:
        """Note a MemoryError of the loop itself. Close the connection with the largest backlog."""
        self.contain(None)
        conn = max(self._loop.connections, key=Connection.queued_bytes, default=None)
        if conn is not None:
            self.guard(conn.session.client_ended, conn)
            self.guard(conn.doom, conn)

    def _end(self, conn: Connection) -> None:
        """End a connection in the ordinary way if it is open and consistent. Else close it."""
        try:
            # The ordinary end of an inconsistent connection would be a second fault.
            if conn.phase is Phase.OPEN and is_consistent(conn):
                conn.session.client_ended()
                return
        except Exception:
            self._note_exception()
        self._close(conn)

    def _close_inconsistent(self, conn: Connection) -> None:
        if not is_consistent(conn):
            self._close(conn)

    def _close(self, conn: Connection) -> None:
        self.guard(conn.session.abandon)
        self.guard(conn.doom)

    def repair(self) -> None:
        """Close inconsistent connections, and end their partners in the ordinary way.

        A fault can leave more connections inconsistent than the served one: its partner, or
        clients that it displaced. So this checks all connections. The Server calls it at the end
        of a turn, when all ordinary ends are complete.
        """
        loop = self._loop
        for conn in loop.connections:
            conn.counted_bytes = conn.queued_bytes()
        queued_bytes = sum(conn.counted_bytes for conn in loop.connections)
        loop.memory.change(queued_bytes - loop.memory.queued_bytes)
        connections = tuple(loop.connections)
        for phase in Phase:
            loop.connections_by_phase[phase] = sum(conn.phase is phase for conn in connections)
        self.need_repair = False  # from here on all is guarded
        for conn in connections:
            if conn.backlog is not None and not len(conn.backlog):
                self.guard(partial(conn._set_backlog, None))
            self.guard(conn.advance)
            self.guard(partial(self._close_inconsistent, conn))
        for pair in tuple(loop.rendezvous.pairs):
            for session in pair.sessions:
                if pair is not session.pair and pair is not session.ended_pair:
                    self.guard(session.abandon)
            if len(pair.sessions) == 1 and pair.sessions[0].pair is pair:
                self.guard(partial(pair.sessions[0].partner_left, Reason.ENDED))
        for conn in connections:
            if conn.phase is Phase.LINGERING:
                self.guard(conn.session.end_sent)
                self.guard(partial(conn.check_linger, loop.clock()))
            if conn.phase is Phase.CLOSED and conn.sock.fileno() >= 0:
                loop.doomed[conn] = None
            self.guard(partial(loop.update_interest, conn))

    def note(self, what: str, error: OSError) -> None:
        """Note an error of the system that ends a connection."""
        message = f"{what}: {error_text(error)}"
        self._tally.note(what, self._loop.clock(), logging.ERROR, message)

    def restore_memory_reserve(self) -> None:
        """Allocate the reserve again, if it was released and there is room."""
        if self._memory_reserve is None:
            with contextlib.suppress(MemoryError):
                self._memory_reserve = bytes(MEMORY_RESERVE_BYTES)

    def _note_exception(self) -> None:
        """Count the exception that is being handled by its place. Log it with its traceback."""
        error = sys.exc_info()[1]
        assert error is not None
        if isinstance(error, MemoryError):
            self._memory_reserve = None
        try:
            self._log_exception(error)
        except MemoryError:  # then the log lacks it
            pass

    def _log_exception(self, error: BaseException) -> None:
        frames = traceback.extract_tb(error.__traceback__)
        place = f"{frames[-1].name}, line {frames[-1].lineno}"
        lines = "".join(traceback.format_list(frames))
        has_own_text = isinstance(error, (AssertionError, OSError, MemoryError))
        text = f": {error}" if has_own_text and str(error) else ""
        message = f"contained fault in {place}:\n{lines}{type(error).__name__}{text}"
        self._tally.note(place, self._loop.clock(), logging.ERROR, message)


def is_consistent(conn: Connection) -> bool:
    """Return whether phase, state and Rendezvous agree, as after a turn without a fault."""
    session = conn.session
    rendezvous, pair = session.rendezvous, session.pair
    if (session.state is State.DONE) != (conn.phase is not Phase.OPEN):
        return False
    if (session.state in (State.FORWARDED, State.RELAYING)) != (pair is not None):
        return False
    if conn.phase is Phase.FLUSHING and conn.backlog is None:
        return False
    if pair is not None and not (pair in rendezvous.pairs and session in pair.sessions):
        return False
    if session.ended_pair is not None:
        return session.ended_pair in rendezvous.pairs
    if session.is_waiting:
        handshake = session.handshake
        return handshake is not None and session in rendezvous.waiting.get(handshake.token, ())
    return True


# Bulk ----------------------------------------------------------------------------------------
# Large moves, and costly ones (of many small frames), wait in a queue. A turn serves only so many
# of them that small messages do not wait long.


class BulkQueue:
    """The connections whose next move is expected to be large or costly."""

    def __init__(self, loop: Server, faults: Faults) -> None:
        self._loop = loop
        self._faults = faults
        self.ready: OrderedDict[Connection, int] = OrderedDict()  # with the events to try

    def add(self, conn: Connection, ready: int) -> None:
        """Add events to try. If `conn` is not queued, it goes to the end."""
        self.ready[conn] = self.ready.get(conn, 0) | ready
        # In a long queue each select would report `conn` until it is served. So it is not polled.
        if len(self.ready) > MAX_POLLED_BULK and not conn.is_unpolled:
            conn.is_unpolled = True
            self._loop.update_interest(conn)

    def serve(self) -> list[Connection]:
        """Serve a quarter of the queue, rounded up, or less. Return the served connections."""
        served: list[Connection] = []
        moved = 0
        deadline = self._loop.clock() + TURN_BULK_SECONDS
        quarter = (len(self.ready) + 3) // 4
        while self.ready and len(served) < quarter:  # a gateway can close some of them meanwhile
            conn, ready = self.ready.popitem(last=False)
            served.append(conn)
            try:
                moved += self.move(conn, ready)
            except Exception:
                conn.is_unpolled = False  # it is not in the queue any more
                self._faults.contain(conn)
            if moved >= TURN_BULK_BYTES or self._loop.clock() >= deadline:
                break
        return served

    def move(self, conn: Connection, ready: int) -> int:
        """Handle readiness that was queued. Return how many bytes moved."""
        moved = 0
        usable = ready & conn.interest()
        if usable & EVENT_WRITE:
            moved += conn.drain()
            usable = ready & conn.interest()
        if usable & EVENT_READ:
            moved += conn.receive()
        if conn.is_unpolled:
            # A connection that moves bulk stays in the queue and out of the selector.
            if moved >= BULK_BYTES and conn.interest():
                self.add(conn, EVENT_READ | EVENT_WRITE)
            else:
                conn.is_unpolled = False
                self._loop.update_interest(conn)
        return moved


# Limits --------------------------------------------------------------------------------------
# What happens when a client reaches a limit: that is counted and logged, and the client is ended.
# (--max-memory and the rates slow clients. The limits of status clients are not counted.) Session
# and Connection report a reached limit through `Rendezvous.limit_reached`, which is
# `LimitEnforcer.note`.


class LimitEnforcer(Carried):
    """Ends the clients that have reached a limit, and makes room when the relay is full."""

    CARRIED = ("reached",)

    def __init__(self, loop: Server, faults: Faults, limits: Limits) -> None:
        self._loop = loop
        self._faults = faults
        self._limits = limits
        self.max_connections = limits.max_connections
        self.reached = Tally()  # by the option of the limit
        self._is_quota_used_up = False
        loop.rates.must_wait = self.allowance_changed
        loop.pipes.when_scarce = self.release_pipes
        shortest = min(filter(None, (limits.idle_seconds, limits.stall_seconds)), default=0.0)
        seconds = shortest / SWEEPS_PER_LIMIT
        shares = max(1, min(SHARES_PER_SWEEP, int(seconds / MIN_SHARE_SECONDS)))
        self.sweep = Sweep(loop.connections, shares)
        if shortest:
            loop.timers.every(max(seconds / shares, MIN_SHARE_SECONDS), self.check_progress)
        loop.timers.every(CURRENT_SECONDS, lambda: loop.timers.end_status_clients(loop.clock()))

    def note(self, limit: Limit) -> None:
        """Count that a limit ended, refused or slowed a client. Log it, at most once a minute."""
        what = "clients have to wait" if limit is Limit.MEMORY else "a client was disconnected"
        message = f"{limit.value}: {what}"
        self.reached.note(limit.value, self._loop.clock(), logging.INFO, message)

    def has_room(self) -> bool:
        """Return whether a newcomer has room. If necessary, evict clients for it."""
        most = self.max_connections
        had_place = False  # the last evicted client was served: neither ended nor refused
        while not had_place and 0 < most <= len(self._loop.connections) - len(self._loop.doomed):
            conn = self._first_to_go()
            if conn is None:
                return False
            # One served client makes room, even if there are more than a lowered maximum.
            had_place = not (conn.session.is_over or conn.session.refused_by is Limit.CONNECTIONS)
            self._evict(conn, Limit.CONNECTIONS)
        return True

    def make_room(self, limit: Limit) -> bool:
        """Evict a client for a newcomer. Return whether there was one to evict."""
        conn = self._first_to_go()
        if conn is not None:
            self._evict(conn, limit)
        return conn is not None

    def _evict(self, conn: Connection, limit: Limit) -> None:
        if not conn.session.is_over:
            self.note(limit)
        self._faults.guard(partial(conn.session.client_ended, Reason.REFUSED), conn)
        self._faults.guard(conn.doom, conn)

    def take_status_place(self) -> bool:
        """Make room for a status client. Return whether it takes the last place."""
        clients = self._loop.timers.status_clients
        if len(clients) >= MAX_STATUS_CLIENTS:
            next(clients.connections()).doom()
            self._loop.reap()
        return len(clients) == MAX_STATUS_CLIENTS - 1

    def counts(self) -> dict[Limit, int]:
        """Return how often each limit ended, refused or slowed a client."""
        return {limit: self.reached.counts.get(limit.value, 0) for limit in Limit}

    def _first_to_go(self) -> Connection | None:
        """Return the client that is evicted first, if there is one.

        A client that has all its bytes goes first, then the oldest one without a handshake, then
        one that waits. A pair does not go, nor a client that has bytes to get.
        """
        looks = LINGER_LOOKS
        for conn in itertools.islice(self._loop.timers.linger_polls.connections(), LINGER_SCANS):
            if conn.phase is not Phase.LINGERING or conn.is_status:  # those have their own places
                continue
            if conn._linger_deadline is not None:  # it had all when it was polled
                return conn
            looks -= 1
            if looks >= 0 and not unacknowledged_bytes(conn.sock):
                return conn
        silent = self._loop.timers.handshaking.oldest(is_before_handshake)
        if silent is not None:
            return silent
        session = self._loop.rendezvous.oldest_of_busiest_source()
        return None if session is None else session.transport

    def check_quota(self, quota: Quota | None) -> None:
        """Compare the bytes of the month with the quota, and act if that changes something."""
        if quota is None:
            return
        rendezvous, limits, rates = self._loop.rendezvous, self._limits, self._loop.rates
        for percent in quota.count(rendezvous.relayed_bytes()):
            log.warning("%d %% of the monthly quota is used", percent)
        if quota.is_used_up == self._is_quota_used_up:
            return
        self._is_quota_used_up = quota.is_used_up
        if limits.quota_rate:
            slow = min(limits.quota_rate, limits.max_rate or limits.quota_rate)
            rates.change(slow if quota.is_used_up else limits.max_rate, limits.max_pair_rate)
            for pair in tuple(rendezvous.pairs):
                rates.join(pair)
                self.allowance_changed(pair)
        else:
            rendezvous.is_quota_used_up = quota.is_used_up
            for crowd in tuple(rendezvous.waiting.values()) if quota.is_used_up else ():
                for session in tuple(crowd):
                    self._end(Limit.QUOTA, session.transport, Reason.REFUSED)

    def refill_rates(self, now: float) -> None:
        """Let pairs that wait for an allowance go on."""
        for pair in self._loop.rates.refill(now):
            if pair.allowance is not None and pair.allowance < BULK_BYTES:
                # A direct read of one client could spend it before a queued read of the other.
                for session in pair.sessions:
                    session.transport.is_bulk = False
            self.allowance_changed(pair)

    def allowance_changed(self, pair: Pair) -> None:
        """Register the interest of both clients of a pair again, which depends on its allowance."""
        for session in pair.sessions:
            conn = session.transport
            self._faults.guard(partial(self._loop.update_interest, conn), conn)

    def run(self, now: float) -> None:
        """End the clients whose handshake or wait has taken too long."""
        for conn in self._loop.timers.handshaking.take_expired(now):
            if is_before_handshake(conn):
                self._end(Limit.HANDSHAKE, conn)
        for conn in self._loop.timers.waiting.take_expired(now):
            if conn.session.is_waiting:
                self._end(Limit.WAIT, conn)

    def check_progress(self) -> None:
        """Check a share of the connections, without status clients, for stalls and idle pairs."""
        now, limits = self._loop.clock(), self._limits
        for conn in self.sweep.take():
            pair = conn.session.pair
            if conn.phase is Phase.CLOSED or conn.is_status or not conn.is_connected:
                continue
            if 0 < limits.stall_seconds <= self._stalled_seconds(conn, now):
                self._end(Limit.STALL, conn)
                self._faults.guard(conn.doom, conn)  # nothing more can be sent
            elif pair is not None and pair.waiting_time is not None and limits.idle_seconds:
                # A pair that has queued bytes, also in the kernel, or no allowance is not idle.
                ends = filter(None, (conn, conn.partner))
                queues = ((one.backlog, unacknowledged_bytes(one.sock) or 0) for one in ends)
                is_held = any(queue is not None or size > FEW_BYTES for queue, size in queues)
                value = -1 if is_held or pair.allowance == 0 else pair.total_bytes
                idle_seconds = self.sweep.unchanged_seconds(pair, value, now)
                if idle_seconds >= limits.idle_seconds and value >= 0:
                    self._end(Limit.IDLE, conn)

    def release_pipes(self) -> None:
        """Release the pipes whose receivers took nothing since the last call."""
        for conn in tuple(self._loop.connections):
            pipe = conn.backlog
            if isinstance(pipe, Pipe):
                if pipe.seen_bytes == len(pipe):
                    self._faults.guard(partial(conn.release_pipe, pipe), conn)
                pipe.seen_bytes = len(pipe)

    def _stalled_seconds(self, conn: Connection, now: float) -> float:
        """Return for how long a peer has acknowledged none of the bytes queued for it (seconds)."""
        unacknowledged = unacknowledged_bytes(conn.sock) or 0  # our end counts as a byte
        if not unacknowledged and conn.backlog is None:
            return 0
        return self.sweep.unchanged_seconds(conn, conn.sent_bytes - unacknowledged, now)

    def _end(self, limit: Limit, conn: Connection, reason: Reason = Reason.ENDED) -> None:
        self.note(limit)
        self._faults.guard(partial(conn.session.client_ended, reason), conn)


def is_before_handshake(conn: Connection) -> bool:
    """Return whether a client has not sent a whole handshake."""
    return conn.session.state in (State.WAIT_UPGRADE, State.WAIT_HANDSHAKE)


# Server --------------------------------------------------------------------------------------
# Each turn waits for events with a select and calls the handlers of the ready sockets. Small moves
# are made at once. Large or costly ones are queued (see Bulk).
#
# Closing is deferred: `doom` notes a connection, and `reap` closes it at the end of the turn, or
# earlier if accept needs its descriptor. A closed connection ignores later events of the turn.
#
# An exception of a handler is contained (see Faults), and so is a MemoryError of the loop itself.
# Any other exception of the loop ends the process.


class Server(Carried):
    """The event loop. It owns the objects that all connections share."""

    CARRIED = (
        *("_acceptor", "_started", "_status_acceptor"),
        *("clock", "faults", "history", "late_until", "limits", "recorder", "rendezvous"),
    )

    def __init__(
        self,
        listeners: Sequence[Listener],
        recorder: Recorder,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        wallclock: Callable[[], float] = time.time,
        *,
        max_pipes: int = 0,
        max_open: int = MAX_OPEN_FILES,
        quota: Quota | None = None,
        addresses: Addresses | None = None,
        drain_seconds: float = 0,
        make_rendezvous: Callable[..., Rendezvous] = Rendezvous,
    ) -> None:
        """Make a Server. It opens and registers nothing before `start`.

        `clock` and `wallclock` return seconds: monotonic, and since the epoch. `max_pipes`: 0: bulk
        is copied. `max_open`: so many connections, refused ones included, have descriptors.
        `drain_seconds`: how long pairs may run on after the first stop signal; 0: no drain.
        """
        self._max_open = max_open
        self.clock = AwakeClock(clock)
        self.wallclock = wallclock
        self.recorder = recorder
        self.rates = Rates(limits.max_rate, limits.max_pair_rate, self.clock)
        self.rendezvous = make_rendezvous(
            recorder.record, clock, self.rates, limits.max_waiting_per_source, addresses
        )
        self.buffer = memoryview(bytearray(READ_BYTES))  # shared by all connections
        self.memory = MemoryBudget(limits.max_memory)
        self.pipes = PipePool(max_pipes, clock)
        self.connections: set[Connection] = set()
        self.faults = Faults(self)
        self._started = clock()
        self._selector: selectors.BaseSelector | None = None
        groups = ([x for x in listeners if x.endpoint.is_status is flag] for flag in (False, True))
        self._acceptors = tuple(Acceptor(self, one, limits.keepalive_seconds) for one in groups)
        self._acceptor, self._status_acceptor = self._acceptors
        self.connections_by_phase = dict.fromkeys(Phase, 0)  # how many connections are in each
        self.answer_status: Any = ws_frames and ws_frames.not_found  # until open_relay sets it
        self.history: Any = None  # of transit_relay_status; without it, what a reload carried
        self._woke_at = 0.0  # when the last select returned (monotonic seconds)
        self.late_until = float("-inf")  # so long the loop counts as late (monotonic seconds)
        self.doomed: OrderedDict[Connection, None] = OrderedDict()  # for `reap`
        self.bulk = BulkQueue(self, self.faults)
        self.timers = Timers(limits)
        self.timers.every(CURRENT_SECONDS, self.update_current)
        self.timers.every(CURRENT_SECONDS, lambda: recorder.report_dropped(clock()))
        self.limits = LimitEnforcer(self, self.faults, limits)
        self.rendezvous.attach(self)
        self.quota = quota
        self._check_quota = partial(self.limits.check_quota, quota)
        if quota is not None:
            self.timers.every(QUOTA_SECONDS, self._check_quota)
        self.ending = Ending(self, drain_seconds)
        self.signals = Signals()
        for number in STOP_SIGNALS:
            self.signals.actions[number] = partial(self.ending.signalled, number)
        self.between_turns: Callable[[], None] | None = None  # set while a reload is under way

    def start(self) -> None:
        """Open the selector and begin to accept. Raises OSError."""
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.signals.open(), EVENT_READ, self.signals)
        for acceptor in self._acceptors:
            acceptor.start(self._selector)
        # After a reload there are connections. Of a pair, the client comes first whose turn it is.
        for pair in self.rendezvous.pairs:
            self.limits.allowance_changed(pair)
        for conn in self.connections:
            self.update_interest(conn)
        self._woke_at = self.clock.monotonic()

    @property
    def phase(self) -> ServerPhase:
        """Return whether the relay serves, or how far its end is."""
        return self.ending.phase

    # The loop.

    def run(self, ready: Callable[[], None], stopping: Callable[[], None]) -> None:
        """Call `ready`, serve until a drain or a stop begins, call `stopping`, and end."""
        self.signals.install()
        ready()
        while self.phase is ServerPhase.SERVING:
            self._run_turn()
            if self.between_turns is not None and self.phase is ServerPhase.SERVING:
                self.faults.guard(self.between_turns)
        self.faults.guard(stopping)
        while self.phase is not ServerPhase.OVER:
            self._run_turn()

    def _run_turn(self) -> None:
        try:
            self.run_once(self._timeout())
        except MemoryError:  # in the loop itself; the next turn goes on with what this one left
            self.faults.guard(self.faults.shed_backlog)
            self.faults.guard(self._end_turn)

    def run_once(self, timeout: float) -> None:
        """Run one turn: wait at most `timeout` seconds, then work."""
        events = self._wait(0 if self.bulk.ready else timeout)
        now = self.clock()
        if self.rates.next_due() <= now:  # before the reads: these spend allowances
            self.faults.guard(partial(self.limits.refill_rates, now))
        for key, mask in events:
            try:
                key.data.on_ready(mask)
            except Exception:
                self.faults.contain(key.data)
        served = self.bulk.serve() if self.bulk.ready else []
        for action in self.signals.take_actions():
            self.faults.guard(action)
        if self.phase is not ServerPhase.SERVING:
            served += [key.data for key, _ in events if isinstance(key.data, Connection)]
            self.faults.guard(partial(self.ending.end_finished_pairs, served))
        self._run_timers(self.clock())
        self._end_turn()

    def _end_turn(self) -> None:
        self.reap()
        if self.faults.need_repair:
            self.faults.repair()
            self.reap()
        self.faults.restore_memory_reserve()

    def _wait(self, timeout: float) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events, and return them. Count for how long the last turn has worked.

        If the process is suspended meanwhile (SIGSTOP, a paused container), the monotonic clock
        goes on, and select can return an empty list although sockets are ready. Then ask again
        before any timer runs, and let the time limits leave out the time beyond `timeout`.
        """
        assert self._selector is not None, "not started"
        monotonic = self.clock.monotonic
        before = monotonic()
        worked_seconds = before - self._woke_at  # a suspension meanwhile counts too
        self.rendezvous.counters.turns.add(worked_seconds)
        if worked_seconds > LATE_TURN_SECONDS:
            self.late_until = before + UNHEALTHY_SECONDS
        events = self._selector.select(timeout)
        self._woke_at = monotonic()
        suspended_seconds = self._woke_at - before - timeout
        if suspended_seconds > SUSPENDED_SECONDS:
            self.clock.suspended_seconds += suspended_seconds
            events = events or self._selector.select(0)
        return events

    def _timeout(self) -> float:
        """Return how long the select may wait (seconds)."""
        retry_at = min(self._acceptor.retry_at, self._status_acceptor.retry_at)
        due = min(self.timers.next_due(), self.rates.next_due(), self.ending.next_due(), retry_at)
        longest = float("inf") if self.between_turns is None else RELOAD_POLL_SECONDS
        return min(max(0.0, due - self.clock()), longest)

    def _run_timers(self, now: float) -> None:
        self.limits.run(now)
        for conn in self.timers.silent.take_expired(now):
            self.faults.guard(conn.framing.keep_alive, conn)
        for conn in self.timers.linger_polls.take_expired(now):
            self.faults.guard(partial(conn.check_linger, now), conn)
        for acceptor in self._acceptors:
            if now >= acceptor.retry_at:
                self.faults.guard(partial(acceptor.end_pause, now), acceptor)
        for work in self.timers.due_chores(now):
            self.faults.guard(work)
        if self.phase is not ServerPhase.SERVING:
            self.faults.guard(partial(self.ending.go_on, now))

    def close(self) -> None:
        """Close everything at once."""
        self.close_listeners()
        self.close_connections()
        self.pipes.close_idle()
        self.signals.close()
        if self._selector is not None:
            self._selector.close()

    snapshot = take_snapshot

    # What a Connection asks for.

    def update_interest(self, conn: Connection) -> None:
        """Register what `conn` is interested in. Doom it if the selector refuses."""
        mask = 0 if conn.is_unpolled else conn.interest()
        if mask == conn.mask or self._selector is None:  # `start` will register all
            return
        try:
            if not mask:  # with an empty mask, epoll would still report a hang-up
                self._selector.unregister(conn.fd)
            elif not conn.mask:
                self._selector.register(conn.fd, mask, conn)
            else:
                self._selector.modify(conn.fd, mask, conn)
            conn.mask = mask
        except OSError as error:  # ENOSPC, ENOMEM: the descriptor is not in the selector now
            conn.mask = 0
            self.faults.note("the selector refused a connection", error)
            conn.doom()

    def reap(self) -> None:
        """Close the doomed connections, and those that are doomed meanwhile."""
        if not self.doomed:
            return
        closed_kinds = set()
        while self.doomed:
            conn, _ = self.doomed.popitem(last=False)
            closed_kinds.add(conn.is_status)
            self.bulk.ready.pop(conn, None)
            try:
                self._close(conn)
            except Exception:
                self.faults.contain(conn)
            if conn.sock.fileno() < 0:  # else a fault left it open: `repair` tries again
                self.connections.discard(conn)
                self.connections_by_phase[conn.phase] -= 1
        for acceptor in map(self._acceptors.__getitem__, closed_kinds):
            if not acceptor.is_accepting:
                self.faults.guard(partial(acceptor.end_pause, self.clock()), acceptor)

    def _close(self, conn: Connection) -> None:
        """Close a connection. A step that fails does not prevent the next ones."""
        try:
            conn.close()
        finally:
            try:
                conn.session.connection_lost()
            finally:
                self.timers.forget(conn)

    def close_listeners(self, keep_status: bool = False) -> None:
        """Accept no more newcomers; with `keep_status`, only status clients."""
        self._acceptor.close()
        if not keep_status:
            self._status_acceptor.close()

    def close_connections(self) -> None:
        """Close all connections at once."""
        for conn in self.connections:
            conn.doom()
        self.reap()

    def update_current(self) -> None:
        """Let the sinks store the current numbers and the bytes of the month."""
        self.faults.guard(self._check_quota)
        self.recorder.update(self.snapshot().current())

    # Newcomers.

    def accept_rest(self, gone: Sequence[Listener]) -> None:
        """Accept the newcomers in the queues of listeners that are not used, and close these."""
        if gone:  # in a pause, these newcomers would be lost
            self.faults.guard(partial(self._acceptor.end_pause, float("inf")), self._acceptor)
        for listener in gone:
            listener.sock.listen(0)  # no more newcomers, while there are some in the queue
            for _ in range(listener.endpoint.backlog // ACCEPTS_PER_WAKEUP + 1):
                self.faults.guard(partial(self._acceptor.accept, listener))
            listener.close()

    def admit(
        self,
        sock: socket.socket,
        role: Role = Role.PORT,
        peer: Peer = LOCAL_PEER,
        has_proxy_header: bool = False,
    ) -> None:
        """Add the newcomer of `sock`. `role` and `has_proxy_header`: those of its listener."""
        conn = None
        acceptor = self._acceptors[role is Role.STATUS]
        try:
            sock.setblocking(False)
            if role is Role.STATUS:
                if self.limits.take_status_place():
                    # The next newcomer evicts the oldest one. The pause lets that one finish.
                    acceptor.pause("all places are taken", seconds=STATUS_WAIT_SECONDS)
            elif not self.has_descriptor():
                sock.close()  # without an answer: the rest is reserved
                self.limits.note(Limit.DESCRIPTORS)
                acceptor.pause("no file descriptor is left for newcomers")
                return
            has_room = role is Role.STATUS or self.limits.has_room()
            conn = Connection(sock, self, role, peer, has_proxy_header)
            if not has_room:
                conn.session.refused_by = Limit.CONNECTIONS
            self.add(conn)
            self.rendezvous.counters.connections += not conn.is_status
            queue = self.timers.status_clients if conn.is_status else self.timers.handshaking
            queue.start(conn, self.clock())
            self.update_interest(conn)
            if not conn.mask:  # the end of this one makes no room, so it must not end the pause
                acceptor.pause("the selector refused one", may_end_early=False)
        except Exception:
            if conn is None:
                sock.close()
            self.faults.contain(conn)

    def add(self, conn: Connection) -> None:
        """Add a connection, which is not in the selector."""
        self.connections.add(conn)
        self.connections_by_phase[conn.phase] += 1

    def has_descriptor(self) -> bool:
        """Return whether a descriptor is left for a connection. If necessary, evict a client."""
        clients = len(self.connections) - len(self.timers.status_clients)
        return clients < self._max_open or self.free_descriptor()

    def free_descriptor(self) -> bool:
        """Evict a client and close its socket now. Return whether there was one to evict."""
        is_evicted = self.limits.make_room(Limit.DESCRIPTORS)
        self.reap()
        return is_evicted


# Recorder ------------------------------------------------------------------------------------
# Usage records leave the event loop through queues. Each sink (database, JSON lines) has a queue
# and a thread that writes batches from it. So the event loop never waits for an fsync, a locked
# database or a stalled reader. A record stays in its sink until it is written, or until the sink is
# given up. When too many records wait, new ones are dropped and counted.
#
# The queue, the batch, `_current`, the counts and the flags of a pause, a stop and the end are
# changed under the lock of `_changed` only. The loop never changes the batch. The thread sets the
# other fields without it. `status` reads some at any time, a reload all when the thread has paused.


class Sink(Carried, threading.Thread):
    """A destination for records, with its queue and the thread that writes."""

    # Unwritten data, the number of dropped records, and what the log has about a failure.
    CARRIED: tuple[str, ...] = (
        *("_queue", "_batch", "_current", "_failing", "_complained", "_complaints", "_gone"),
        *("dropped", "written_records"),
    )
    PARSERS: ClassVar[Parsers] = {
        "_queue": lambda records: deque(UsageRecord(**record) for record in records),
        "_batch": lambda records: [UsageRecord(**record) for record in records],
        "_current": lambda fields: Current(**fields),
    }
    gather_seconds = 0.0  # how long to collect more records before a write

    def __init__(self, label: str, records_limit: int = QUEUED_RECORDS) -> None:
        # A daemon thread: a write that hangs on a dead disk must not keep the process alive.
        super().__init__(name=label, daemon=True)
        self._records_limit = records_limit
        self._changed = threading.Condition()
        self._queue: deque[UsageRecord] = deque()
        self._batch: list[UsageRecord] = []  # taken from the queue, not yet written
        self._current: Current | None = None  # to be written with the next batch
        self.dropped = 0  # records, counted since the start
        self.written_records = 0  # likewise
        self._stopping = False
        self._pausing = False
        self._may_write_again = True  # in a pause: the one write that it allows has not begun
        self._writing = False
        self.finished = False  # the thread has ended its work
        self._gone = False  # SinkGone was raised
        # Set by the thread only, once it runs.
        self._failing = False  # the last write failed
        self._complained = False  # a warning about the failure was logged
        self._complaints = Throttle()
        # None until UsageDatabase has read them: how many records it has, and their bytes, by mood.
        self.totals: Mapping[str, tuple[int, int]] | None = None

    def prepare(self) -> None:
        """Open the destination and test that it can be written. Raises StartupError."""

    def rehearse(self) -> None:
        """Test that the destination could be written, without a change. Raises StartupError."""

    # Called by the loop.

    def put(self, record: UsageRecord) -> None:
        """Queue a record, without waiting, or count it as dropped. After SinkGone, do neither."""
        with self._changed:
            if self._gone:
                return
            if self.finished or len(self._queue) + len(self._batch) >= self._records_limit:
                self.dropped += 1
                return
            self._queue.append(record)
            if len(self._queue) == 1:  # the first one wakes the thread
                self._changed.notify()

    def put_current(self, current: Current) -> None:
        """Replace the numbers that the next write stores. After SinkGone, do nothing."""
        with self._changed:
            self._current = None if self._gone else current
            self._changed.notify()

    def stop(self) -> None:
        """Ask the thread to write all that is queued and to end."""
        with self._changed:
            self._stopping = True
            self._pausing = False
            self._changed.notify()

    def status(self) -> SinkStatus:
        """Return how the sink is doing."""
        with self._changed:
            waiting = len(self._queue) + len(self._batch)
            has_failed = self._failing or (self.finished and not self._stopping)
            is_failing = has_failed and not self._gone
            return SinkStatus(self.written_records, self.dropped, waiting, is_failing, self.totals)

    def set_pausing(self, is_pausing: bool) -> None:
        """Begin a pause, before which the thread may write once, or end it."""
        with self._changed:
            self._pausing = self._may_write_again = is_pausing
            self._changed.notify()

    def place(self) -> dict[str, Any]:
        """Return the state, with the records that wait."""
        with self._changed:
            return super().place()

    @property
    def is_paused(self) -> bool:
        """Return whether the thread writes nothing, until the next `put` or `put_current`."""
        with self._changed:
            return self.finished or (not self._writing and not self._may_write())

    def _may_write(self) -> bool:
        """Return whether there is something to write, or a stop, and no pause."""
        has_work = bool(self._queue or self._batch or self._current or self._stopping)
        return has_work and (not self._pausing or (self._may_write_again and not self._failing))

    # Called by the thread.

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        """Write records from the front of `batch`, and `current` where the format has it.

        Return the number of records written; the next batch begins with the first unwritten one.
        Raises SinkError (the records are tried again) or SinkGone (the sink is given up).
        """
        raise NotImplementedError

    def close(self) -> None:
        """Close the destination, after the last write."""

    def run(self) -> None:
        """Gather and write until `stop` was called and nothing is left to write."""
        # A reload blocks the signals of the loop's thread. Another thread must not take them then.
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            with contextlib.closing(self):
                while self._gather():
                    self._write_batch()
        except SinkGone as error:
            log.warning("%s: %s; no more records go there", self.name, error)
            with self._changed:
                self._gone, self._current = True, None
                self._queue.clear()
                self._batch.clear()
        except Exception:
            log.exception("%s: unexpected error; no more records go there", self.name)
        with self._changed:
            self.finished = True

    def _gather(self) -> bool:
        """Wait for something to write and fill the batch. Return False at the end of a stop."""
        with self._changed:
            self._writing = False
            self._changed.wait_for(self._may_write)
            if not self._stopping:
                pause_seconds = RETRY_SECONDS if self._failing else self.gather_seconds
                self._changed.wait_for(lambda: self._stopping or self._pausing, pause_seconds)
                self._changed.wait_for(self._may_write)
            elif self._failing:
                self._changed.wait(STOP_POLL_SECONDS)  # a stop has little time: retry sooner
            while self._queue and len(self._batch) < BATCH_RECORDS:
                self._batch.append(self._queue.popleft())
            self._writing = bool(self._batch or self._current)
            self._may_write_again = False
            return self._writing

    def _write_batch(self) -> None:
        """Write the batch, or the part of it that can be written now."""
        with self._changed:
            current = self._current
        try:
            written = self.write(self._batch, current)
        except (SinkError, MemoryError) as error:
            self._report_failure(str(error) or "out of memory")
            return
        with self._changed:
            del self._batch[:written]
            self.written_records += written
            if self._current is current:
                self._current = None
        self._failing = False
        if self._complained:
            self._complained = False
            log.info("%s: works again", self.name)

    def _report_failure(self, reason: str) -> None:
        """Note the failure, and log it unless that was done within the last minute."""
        self._failing = True
        if self._complaints.take(time.monotonic()):
            self._complained = True
            waiting = self.status().waiting
            log.warning("%s: %s; %d records wait", self.name, reason, waiting)


class Recorder(Carried):
    """The loop's access to all sinks."""

    CARRIED = ("_complaints", "_reported")

    def __init__(self, sinks: Sequence[Sink] = (), blur_seconds: int = 0) -> None:
        """`blur_seconds`: 0 passes records on unchanged."""
        self._sinks = sinks
        self._blur_seconds = blur_seconds
        self._complaints = Throttle()
        self._reported = 0  # dropped records that the log has mentioned

    def start(self) -> None:
        """Start the sinks' threads. Raises StartupError."""
        try:
            for sink in self._sinks:
                sink.start()
        except RuntimeError as error:
            for sink in self._sinks:  # after a reload, the relay goes on without these
                if not sink.is_alive():  # else its thread sets this
                    sink.finished = True
            raise StartupError(f"records cannot be written: {error}") from None

    def record(self, record: UsageRecord) -> None:
        """Queue a record in all sinks, blurred if `blur_seconds` asks for it."""
        if self._blur_seconds:
            record = record.blurred(self._blur_seconds)
        for sink in self._sinks:
            sink.put(record)

    def update(self, current: Current) -> None:
        """Replace the current numbers in all sinks."""
        for sink in self._sinks:
            sink.put_current(current)

    def report_dropped(self, now: float) -> None:
        """Log how many records were dropped since the last report, at most once a minute."""
        dropped = sum(sink.dropped for sink in self._sinks)
        if dropped > self._reported and self._complaints.take(now):
            log.warning("%d usage records dropped", dropped - self._reported)
            self._reported = dropped

    def stop(self) -> None:
        """Ask all sinks to write their queues and to end."""
        for sink in self._sinks:
            sink.stop()

    @property
    def finished(self) -> bool:
        """Return whether all sinks have ended."""
        return all(sink.finished for sink in self._sinks)

    def set_pausing(self, is_pausing: bool) -> None:
        """Begin or end a pause of all sinks."""
        for sink in self._sinks:
            sink.set_pausing(is_pausing)

    @property
    def is_paused(self) -> bool:
        """Return whether no sink is writing, and none will."""
        return all(sink.is_paused for sink in self._sinks)

    def place(self) -> dict[str, Any]:
        """Return the state, with the records that wait."""
        return {**super().place(), "sinks": {sink.name: sink.place() for sink in self._sinks}}

    def resume(self, place: Mapping[str, Any]) -> None:
        """Go on with the state that `place` returned. Raises ValueError."""
        fields = dict(place)
        sinks = {sink.name: sink for sink in self._sinks}
        for name, state in fields.pop("sinks").items():
            waiting = len(state["_queue"]) + len(state["_batch"])
            if name in sinks:
                sinks[name].resume(state)
            elif waiting:  # a rehearsal: the running relay decides, in `Reload._execute`
                log.error("the new configuration has no %s; records lost: %d", name, waiting)
        super().resume(fields)

    def join(self, seconds: float) -> None:
        """Wait for the sinks to end, at most `seconds` in all. Blocks the caller."""
        deadline = time.monotonic() + seconds
        for sink in filter(Sink.is_alive, self._sinks):
            sink.join(max(0.0, deadline - time.monotonic()))

    def status(self) -> dict[str, SinkStatus]:
        """Return how each sink is doing, by its name."""
        return {sink.name: sink.status() for sink in self._sinks}

    def lost(self) -> int:
        """Return how many records are unwritten or counted as dropped, summed over all sinks."""
        return sum(one.waiting + one.dropped for one in (sink.status() for sink in self._sinks))


# Sinks ---------------------------------------------------------------------------------------
# The two destinations of records. The reader of the JSON lines may stall. If it leaves, the sink
# ends. The database may be locked, damaged or on a full disk: its records wait
# meanwhile. If it was moved away, a new one is created.


def is_same_file(path: str, file: os.stat_result) -> bool:
    """Return whether the file at `path` is `file`; False if it does not exist. Raises OSError."""
    try:
        return os.path.samestat(os.stat(path), file)
    except FileNotFoundError:
        return False


def require_writable(subject: str, path: str) -> None:
    """Raise a StartupError that begins with `subject` unless `path` exists and can be written."""
    with startup_errors(subject):
        os.stat(path)
        if not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


class JsonLines(Sink):
    """`--log-fd`: one JSON object a line. After a partial write, the rest of it comes first."""

    CARRIED = (*Sink.CARRIED, "_chunk", "_chunk_records")
    chunk_bytes = select.PIPE_BUF

    def __init__(self, fd: int) -> None:
        """Take over `fd`, which is open for writing; the sink closes it."""
        super().__init__("--log-fd")
        self._fd = fd
        self._has_reader = True
        self._chunk = b""  # encoded lines, without the bytes that are written
        self._chunk_records = 0  # how many records of the batch the chunk encodes

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        """Write one chunk of lines, if the reader makes room within SINK_WAIT_SECONDS."""
        if not self._chunk:
            self._encode_chunk(batch)
        try:
            if self._chunk and takes_bytes(self._fd, SINK_WAIT_SECONDS):
                self._chunk = self._chunk[os.write(self._fd, self._chunk) :]
        except BlockingIOError:
            pass  # another process may have made the descriptor non-blocking
        except OSError as error:
            hung_up = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self._fd).st_mode)
            if hung_up or error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED):
                self._has_reader = False
                raise SinkGone("its reader is gone") from None
            raise SinkError(error_text(error)) from None
        return 0 if self._chunk else self._chunk_records

    def close(self) -> None:
        if self._has_reader:  # else keep it open: a reload carries its number
            os.close(self._fd)

    def _encode_chunk(self, batch: Sequence[UsageRecord]) -> None:
        self._chunk_records = 0
        for record in batch:
            line = (json.dumps(record._asdict()) + "\n").encode()
            if self._chunk and len(self._chunk) + len(line) > self.chunk_bytes:
                break
            self._chunk += line
            self._chunk_records += 1


USAGE_SCHEMA = """
CREATE TABLE `version` (`version` INTEGER);  -- one row: 1
CREATE TABLE `current`                       -- one row: the state at the time `updated`
(
 `rebooted` INTEGER,                         -- start of the relay, seconds since the epoch
 `updated` INTEGER,                          -- the time of these numbers, likewise
 `connected` INTEGER,                        -- two for each pair that has no record yet
 `waiting` INTEGER,                          -- tokens that wait for a partner
 `incomplete_bytes` INTEGER                  -- bytes of the pairs that have no record yet
);
CREATE TABLE `usage`                         -- one row per pair or connection without one
(
 `started` INTEGER,                          -- seconds since the epoch, may be blurred
 `total_time` INTEGER,                       -- seconds from the first accept to the end
 `waiting_time` INTEGER,                     -- seconds between the two accepts, or NULL
 `total_bytes` INTEGER,                      -- both directions, may be blurred
 `result` VARCHAR                            -- happy, lonely, redundant, impatient, errory, empty
);
CREATE INDEX `usage_started_index` ON `usage` (`started`);
CREATE INDEX `usage_result_index` ON `usage` (`result`);
"""
USAGE_VERSION = 1
USAGE_COLUMNS = {
    "version": ("version",),
    "current": ("rebooted", "updated", "connected", "waiting", "incomplete_bytes"),
    "usage": ("started", "total_time", "waiting_time", "total_bytes", "result"),
}
# Errors that may go away while the relay runs: SQLite's message and primary result code for each.
SQLITE_BUSY = 5
TRANSIENT_ERRORS = {
    "database is locked": SQLITE_BUSY,
    "database table is locked": 6,  # SQLITE_LOCKED
    "disk I/O error": 10,  # SQLITE_IOERR
    "database disk image is malformed": 11,  # SQLITE_CORRUPT: a good copy may replace the file
    "database or disk is full": 13,  # SQLITE_FULL
}


class UnusableDatabase(SinkError):
    """The file is no usage database, or cannot be written: a start is refused."""


def result_code(error: Exception) -> int | None:
    """Return SQLite's primary result code for an error, or None if it is unknown."""
    code: int | None = getattr(error, "sqlite_errorcode", None)  # from Python 3.11 on
    return TRANSIENT_ERRORS.get(str(error)) if code is None else code & 0xFF


def open_usage_database(path: str, dry_run: bool = False) -> sqlite3.Connection:
    """Open a usage database (schema 1 of the reference relay), or create it.

    Raises sqlite3.Error, OSError or UnusableDatabase. On an error, an existing database keeps its
    content, and a file that this call created is removed if it is still empty, unless the error is
    SQLITE_BUSY. A dry run creates and changes no file.
    """
    import sqlite3

    target = os.path.realpath(path)  # a dangling link is followed, not replaced
    is_new = not os.path.exists(target)
    if not is_new and not os.path.isfile(target):
        raise UnusableDatabase("not a regular file")
    if dry_run:
        # immutable=1: SQLite takes no lock, makes no file, and ignores a log and a journal.
        folder = os.path.join(os.path.dirname(path), ".")
        folders = (folder, os.path.dirname(target))
        is_empty = all(map(os.path.isdir, folders)) if is_new else os.path.getsize(target) == 0
        uri = "file:" + "".join(f"%{byte:02x}" for byte in os.fsencode(target))
        skip = is_empty or path == ":memory:" or os.path.exists(target + "-journal")
        path = ":memory:" if skip else f"{uri}?mode=ro&immutable=1"
    db = sqlite3.connect(
        path, timeout=SINK_WAIT_SECONDS, isolation_level=None, check_same_thread=False, uri=dry_run
    )
    try:
        # This query rolls back what a killed process left.
        has_tables = db.execute("SELECT * FROM sqlite_master").fetchone() is not None
        if path == ":memory:" or os.path.getsize(target) == 0:
            _create_schema(db)
        if has_tables or not (dry_run and os.path.exists(target + "-wal")):  # else all in the log
            _check_schema(db)
    except Exception as error:
        db.close()
        if is_new and not dry_run and result_code(error) != SQLITE_BUSY:  # busy: another creates it
            with contextlib.suppress(OSError):
                if os.path.getsize(target) == 0:
                    os.unlink(target)
        raise
    return db


def _create_schema(db: sqlite3.Connection) -> None:
    """Create all tables in one transaction, unless another relay has just done so."""
    db.execute("BEGIN IMMEDIATE")  # `executescript` will not do: it commits before it begins
    if not db.execute("SELECT * FROM sqlite_master").fetchone():
        for statement in USAGE_SCHEMA.split(";"):  # its comments contain no semicolon
            db.execute(statement)
        _insert(db, "version", [(USAGE_VERSION,)])
    db.execute("COMMIT")


def _check_schema(db: sqlite3.Connection) -> None:
    """Raise UnusableDatabase if a table or column is missing, or if the version is not ours."""
    for table, columns in USAGE_COLUMNS.items():
        missing = set(columns) - {row[1] for row in db.execute(f"PRAGMA table_info(`{table}`)")}
        if missing:
            lacks = f"table {table} lacks {', '.join(sorted(missing))}"
            raise UnusableDatabase(f"not a usage database: {lacks}")
    versions = [row[0] for row in db.execute("SELECT `version` FROM `version`")]
    if versions != [USAGE_VERSION]:
        found = ", ".join(map(str, versions)) or "none"
        raise UnusableDatabase(f"its schema version is {found}, expected {USAGE_VERSION}")


def _insert(db: sqlite3.Connection, table: str, rows: Iterable[tuple[object, ...]]) -> None:
    columns = USAGE_COLUMNS[table]
    names, places = ", ".join(columns), ", ".join("?" * len(columns))
    db.executemany(f"INSERT INTO `{table}` ({names}) VALUES ({places})", rows)


def _update_quota(db: sqlite3.Connection, quota: Quota) -> None:
    """Load `quota` from its table, which may be missing, and write its row."""
    db.execute("CREATE TABLE IF NOT EXISTS `quota` (`month` VARCHAR, `bytes` INTEGER)")
    rows = db.execute(
        "SELECT `month`, `bytes` FROM `quota` WHERE typeof(`bytes`) = 'integer'"
        f" AND `bytes` BETWEEN 0 AND {2**62} AND `month` GLOB '[0-9][0-9][0-9][0-9]-[0-9][0-9]'"
        " ORDER BY `month` DESC, `bytes` DESC"
    )
    quota.load(rows.fetchone())
    row = quota.row()
    db.execute("DELETE FROM `quota` WHERE `month` = ?", row[:1])
    db.execute("INSERT INTO `quota` (`month`, `bytes`) VALUES (?, ?)", row)


Totals = Mapping[str, tuple[int, int]]  # the number of records and their bytes, by mood


def add_up(totals: Totals, rows: Iterable[tuple[str, int, int]]) -> Totals:
    """Return `totals` with more records: mood, number, bytes."""
    result = dict(totals)
    for mood, count, size in rows:
        old_count, old_size = result.get(mood, (0, 0))
        result[mood] = old_count + count, old_size + size
    return result


class UsageDatabase(Sink):
    """`--usage-db`: rows in SQLite, many to a transaction."""

    CARRIED = (*Sink.CARRIED, "_latest")
    PARSERS: ClassVar[Parsers] = {**Sink.PARSERS, "_latest": Sink.PARSERS["_current"]}
    gather_seconds = GATHER_SECONDS

    def __init__(self, path: str, quota: Quota | None = None, has_totals: bool = False) -> None:
        """Import sqlite3, but touch no file. Raises StartupError.

        `has_totals`: keep `totals`. They are read after the first write, and again when the file
        was opened anew.
        """
        super().__init__("--usage-db")
        self._has_totals = has_totals
        self._quota = quota  # loaded at the first write; its row is written with each `current`
        try:
            import sqlite3
        except ImportError:
            raise StartupError("--usage-db: this Python has no module sqlite3") from None
        self._sqlite_error: type[Exception] = sqlite3.Error
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None  # identifies the file that is open
        now = int(time.time())
        self._latest = self._current = Current(now, now, 0, 0, 0)

    def prepare(self, dry_run: bool = False) -> None:
        """Try a write (a dry run: a read). Raises StartupError, but logs a transient error."""
        try:
            self._transact((), None if dry_run else "ROLLBACK")
        except UnusableDatabase as error:
            raise StartupError(f"--usage-db {self._path}: {error}") from None
        except SinkError as error:
            if not dry_run:  # without a lock, a file that is being written can look damaged
                self._report_failure(str(error))

    def rehearse(self) -> None:
        if self._path == ":memory:":
            raise StartupError("--usage-db :memory: cannot be set by a reload")
        folder = os.path.join(os.path.dirname(self._path), ".")
        for path in (folder, self._path) if os.path.exists(self._path) else (folder,):
            require_writable(f"--usage-db {self._path}", path)
        self.prepare(dry_run=True)

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        """Write all or nothing. Write `current` each time, because a new file has no such row."""
        self._latest = current or self._latest
        self._transact(batch, "COMMIT")
        if self.totals is not None:
            rows = ((record.mood, 1, record.total_bytes) for record in batch)
            self.totals = add_up(self.totals, rows)
        elif self._has_totals:
            with contextlib.suppress(self._sqlite_error, MemoryError):
                self._read_totals()  # if this fails, the next write tries again
        return len(batch)

    def _read_totals(self) -> None:
        """Read the totals, unless the relay stops or reloads meanwhile."""
        assert self._db is not None
        # A large table takes seconds. SQLite interrupts the query if this function returns 1.
        self._db.set_progress_handler(lambda: int(self._stopping or self._pausing), 10_000)
        # Another program may have written anything. TOTAL does not overflow.
        query = (
            "SELECT `result`, COUNT(*),"
            " TOTAL(CASE WHEN typeof(`total_bytes`) = 'integer' THEN `total_bytes` END)"
            f" FROM `usage` NOT INDEXED WHERE `result` IN {MOODS} GROUP BY `result`"
        )
        try:
            rows = self._db.execute(query).fetchall()
        finally:
            self._db.set_progress_handler(None, 0)
        self.totals = add_up(
            dict.fromkeys(MOODS, (0, 0)), ((mood, count, int(size)) for mood, count, size in rows)
        )

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _transact(self, batch: Sequence[UsageRecord], end_statement: str | None) -> None:
        """Write in a transaction that ends so. None: a dry run, which reads. Raises SinkError."""
        try:
            if end_statement is None:
                return open_usage_database(self._path, dry_run=True).close()
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            _insert(db, "usage", batch)
            db.execute("DELETE FROM `current`")  # none or several rows become one
            _insert(db, "current", [self._latest])
            if self._quota is not None:
                _update_quota(db, self._quota)
            db.execute(end_statement)
        except Exception as error:
            if self._db is not None and self._path == ":memory:":
                self._db.rollback()
            else:
                self.close()  # the file may be repaired or replaced before the retry
            if not isinstance(error, (self._sqlite_error, OSError)):
                raise
            is_transient = result_code(error) in TRANSIENT_ERRORS.values()
            text = error_text(error) if isinstance(error, OSError) else str(error)
            raise (SinkError if is_transient else UnusableDatabase)(text) from None
        # Move the rows from a write-ahead log to the file, if no reader prevents that, because an
        # operator may move the file alone.
        with contextlib.suppress(self._sqlite_error, MemoryError):
            db.execute("PRAGMA wal_checkpoint")

    def _open(self) -> sqlite3.Connection:
        """Return the database. Open it again if another file, or none, is at its path."""
        # SQLite may not notice that a file was moved or removed.
        if self._file is not None and not is_same_file(self._path, self._file):
            self.close()
        if self._db is None:
            self._db = open_usage_database(self._path)
            self.totals = None
            self._file = None if self._path == ":memory:" else os.stat(self._path)
        return self._db


# Endpoints -----------------------------------------------------------------------------------
# The values of --port, --websocket and --status, in the syntax of Twisted: a kind, then fields
# between colons, by position or as name=value. A backslash escapes the next character. `haproxy:`
# may stand before the kind: then each connection begins with a PROXY header.
# The service manager passes sockets that are open already; an endpoint can name one of them.

# The fields of each kind, in the order in which they may be written without a name.
ENDPOINT_FIELDS = {
    "tcp": ("port", "interface", "backlog"),
    "tcp6": ("port", "interface", "backlog"),
    "unix": ("address", "mode", "backlog", "lockfile"),
    "systemd": ("domain", "name", "index"),
    "fd": ("fileno",),
}
PROXY_PREFIX = "haproxy:"
# The highest value of a field that is a number, and its base.
NUMERIC_FIELDS = {
    "port": (65535, 10),
    "backlog": (2**31 - 1, 10),
    "mode": (0o777, 8),
    "lockfile": (1, 10),  # ignored: only Twisted needs a file to detect a stale socket
    "index": (65535, 10),
    "fileno": (2**31 - 1, 10),
}
SOCKET_DOMAINS = ("INET", "INET6", "UNIX")  # ignored: the socket has one already
LOOPBACK = ("localhost", "127.", "::1")  # beginnings of interfaces for this machine only
# The HOST of HOST:PORT, as many programs expect it: empty, an address (in brackets), or a name.
HOST = re.compile(r"|\*|localhost|[\w-]+(?:\.[\w-]+)+|\[?[0-9A-Fa-f\\]*:[0-9A-Fa-f:.\\]*\]?")
ANY_IPV4, ANY_IPV6 = "0.0.0.0", "::"
FIRST_PASSED_FD = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START


class Endpoint(NamedTuple):
    """One `--port`, `--websocket` or `--status`, parsed but not yet opened."""

    text: str
    kind: str
    role: Role = Role.PORT
    port: int = 0
    interface: str = ""  # empty: all of them
    backlog: int = LISTEN_BACKLOG
    path: str = ""
    mode: int = 0o666
    name: str | None = None
    position: int | None = None  # index=
    fileno: int = -1
    has_proxy_header: bool = False  # each connection begins with one

    @property
    def is_status(self) -> bool:
        """Return whether it is for status clients."""
        return self.role is Role.STATUS

    @property
    def is_passed(self) -> bool:
        """Return whether another process opened the socket, and has it open too."""
        return self.kind in ("fd", "systemd")


# By the name of a passed socket. Any other one is used like `--port`.
PASSED_ROLES = {
    "haproxy-websocket": Role.WEBSOCKET,
    "status": Role.STATUS,
    "websocket": Role.WEBSOCKET,
}


class PassedSockets(NamedTuple):
    """The sockets that the service manager opened: descriptors from 3 on, and their names."""

    total: int = 0
    names: tuple[str, ...] = ()
    remark: str = ""  # for the log: why sockets that were passed are not used

    @classmethod
    def parse(cls, pid: str, count: str, names: str, own_pid: int = 0) -> PassedSockets:
        """Read the values of LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES. Raises StartupError.

        `own_pid`: of the process that has the sockets; 0: of this one.
        """
        total = parse_number(count, 2**31 - 1 - FIRST_PASSED_FD)
        if not total:
            return cls()
        if pid != str(own_pid or os.getpid()):
            advice = "a wrapper script must start the relay with exec"
            return cls(remark=f"LISTEN_FDS is for another process, and is ignored: {advice}")
        last = FIRST_PASSED_FD + total - 1
        with startup_errors(f"LISTEN_FDS={count}: descriptor {last}"):
            os.fstat(last)  # this bounds `total`, over which the methods below iterate
        return cls(total, tuple(names.split(":")) if names else ())

    def endpoints(self) -> list[Endpoint]:
        """Return all sockets as endpoints. Some names set the role and the PROXY header."""
        found = []
        for n in range(self.total):
            name = self.names[n] if n < len(self.names) else ""
            prefix = PROXY_PREFIX if name in ("haproxy", "haproxy-websocket") else ""
            role = PASSED_ROLES.get(name, Role.PORT)
            found.append(parse_endpoint(f"{prefix}systemd:index={n}", role))
        return found

    def find(self, endpoint: Endpoint) -> int | None:
        """Return the open descriptor that an endpoint names, if any. Raises StartupError."""
        if not endpoint.is_passed:
            return None
        passed = range(FIRST_PASSED_FD, FIRST_PASSED_FD + self.total)
        found: Sequence[int]
        if endpoint.kind == "fd":
            found, reason = [endpoint.fileno], ""
        elif endpoint.position is not None:
            found = passed[endpoint.position : endpoint.position + 1]
            verb = "was" if self.total == 1 else "were"
            reason = f"{count_text(self.total, 'socket')} {verb} passed"
        else:
            found = [fd for fd, name in zip(passed, self.names) if name == endpoint.name]
            reason = f"{len(found)} sockets of this name were passed"
        if len(found) != 1:
            raise StartupError("; ".join(filter(None, (f"{endpoint.text}: {reason}", self.remark))))
        with startup_errors(endpoint.text):
            os.fstat(found[0])
        return found[0]


def parse_endpoint(text: str, role: Role = Role.PORT) -> Endpoint:
    """Parse the text of an endpoint. `role`: of its listeners. Raises UsageError."""
    prefix = PROXY_PREFIX if text.startswith(PROXY_PREFIX) else ""
    plain = text[len(prefix) :]
    if plain.isascii() and plain.isdecimal():
        plain = f"tcp:{plain}"
    (label, kind), *fields = _split_fields(plain)
    if label is not None or kind not in ENDPOINT_FIELDS or not fields:
        raise UsageError(f"{text!r}: not an endpoint{_suggestion(plain, kind, prefix)}")
    names = ENDPOINT_FIELDS[kind]
    unnamed = iter(names)
    given: dict[str, str] = {}
    numbers: dict[str, int] = {}
    for name, value in fields:
        if name is None:
            name = next(unnamed, None)
        if name is None:
            raise UsageError(f"{text}: too many fields")
        if name not in names:
            raise UsageError(f"{text}: {kind} has no option {name!r}, only {', '.join(names)}")
        if name in given:
            raise UsageError(f"{text}: {name} is given twice (a colon in a value is \\:)")
        given[name] = value
        if name in NUMERIC_FIELDS:
            highest, base = NUMERIC_FIELDS[name]
            number = parse_number(value, highest, base)
            if number is None:
                limit = f"{highest:o}" if base == 8 else f"{highest}"
                raise UsageError(f"{text}: {name} must be a number from 0 to {limit}")
            numbers[name] = number
    if kind in ("tcp", "tcp6") and "port" not in given:
        raise UsageError(f"{text}: the port is missing")
    if kind == "unix" and not given.get("address"):
        raise UsageError(f"{text}: the path is missing")
    if given.get("domain", "INET") not in SOCKET_DOMAINS:
        raise UsageError(f"{text}: domain must be one of {', '.join(SOCKET_DOMAINS)}")
    if kind == "systemd" and ("name" in given) == ("index" in given):
        raise UsageError(f"{text}: needs either name= or index=")
    return Endpoint(
        text,
        kind,
        role,
        port=numbers.get("port", 0),
        interface=given.get("interface") or (ANY_IPV6 if kind == "tcp6" else ""),
        # Scripts may have the default of Twisted, 50: too low for a busy hour.
        backlog=max(LISTEN_BACKLOG, numbers.get("backlog", 0)),
        path=given.get("address", ""),
        mode=numbers.get("mode", 0o666),
        name=given.get("name"),
        position=numbers.get("index"),
        fileno=numbers.get("fileno", -1),
        has_proxy_header=bool(prefix),
    )


def _split_fields(text: str) -> list[tuple[str | None, str]]:
    """Split `text` at its colons into (name, value) pairs; the name is None without a `=`."""
    fields: list[tuple[str | None, str]] = [(None, "")]
    characters = iter(text)
    for character in characters:
        name, value = fields[-1]
        if character == "\\":
            fields[-1] = name, value + next(characters, "\\")
        elif character == ":":
            fields.append((None, ""))
        elif character == "=" and name is None:
            fields[-1] = value, ""
        else:
            fields[-1] = name, value + character
    return fields


def _suggestion(text: str, kind: str, prefix: str) -> str:
    """Return the end of an error message: what to write behind `prefix` instead of `text`."""
    from difflib import get_close_matches

    if kind.lower() in ("ssl", "tls", "https", "wss"):
        return f"; a proxy in front of the relay does TLS: write {prefix}tcp:PORT here"
    host, _, port = text.rpartition(":")
    rest = text[len(kind) :]
    guesses = [f"tcp:{text}"]
    if HOST.fullmatch(host):
        host = re.sub(r"[\[\]*\\]", "", host).replace(":", "\\:")
        guesses.append(f"tcp:{port}:interface={host}" if host else f"tcp:{port}")
    if text.startswith(("/", "./")):
        guesses.append(f"unix:{text}")
    if rest.startswith(":"):
        words = [*ENDPOINT_FIELDS] if prefix else [*ENDPOINT_FIELDS, PROXY_PREFIX[:-1]]
        nearest = get_close_matches(kind.lower(), words, n=1, cutoff=0.5)
        guesses += [right + rest for right in (*nearest, "tcp")]
    for guess in guesses:
        with contextlib.suppress(UsageError):
            return f"; did you mean {parse_endpoint(prefix + guess).text!r}?"
    return f", write {prefix}KIND:... (KIND: one of {', '.join(ENDPOINT_FIELDS)})"


def parse_host(text: str) -> str:
    """Return the value of --print-hints, an address without brackets. Raises UsageError."""
    address = parse_address(re.sub(r"^\[(.*:.*)]$", r"\1", text))
    if address is not None and "%" not in text:
        family = socket.AF_INET if address[:1] == IPV4 else socket.AF_INET6
        return socket.inet_ntop(family, address[1:])
    if re.fullmatch(r"([\w-]+\.)*(?!\d+\.?$)[\w-]+\.?", text, re.ASCII):
        return text
    raise UsageError(f"{text!r} is not the name or the IP address of a host")


def format_hints(host: str, endpoints: Sequence[Endpoint], websocket_url: str | None) -> str:
    """Return the text of --print-hints: how clients reach `endpoints` at `host`."""
    direct = [one for one in endpoints if one.port and not one.has_proxy_header]
    is_local = host.startswith(LOOPBACK)
    known = [one for one in direct if is_local or not one.interface.startswith(LOOPBACK)]
    tcp, web = ([*dict.fromkeys(x.port for x in known if x.role is role)] for role in RELAY_ROLES)
    ports: list[object] = [*tcp] or ["PORT"]
    unknown = "" if tcp else ", ".join(one.text for one in endpoints if one.role is Role.PORT)
    at, quote = (f"[{host}]", "'") if ":" in host else (host, "")  # for a shell, [...] is a pattern
    helper = f"{quote}tcp:{at}:{ports[0]}{quote}"
    url = websocket_url or (f"ws://{at}:{(web or tcp)[0]}/" if ws_frames and (web or tcp) else "")
    base: dict[str, object] = {"type": "direct-tcp-v1", "priority": 0.0, "hostname": host}
    hints = [{**base, "port": port} for port in ports]
    if url:  # in the spelling of the specification, of the client in Rust, and of a fork in Go
        hints += [{"type": kind, "url": url} for kind in ("websocket-v1", "websocket")]
        parts = re.fullmatch(r"((?i:wss?))://\[?([^]/?]+?)]?(?::([0-9]+))?/?", url)
        if parts:  # the spelling of the fork has no path
            scheme = parts[1].lower()
            number = int(parts[3] or {"ws": 80, "wss": 443}[scheme])
            hints.append({"type": f"direct-{scheme}-v1", "hostname": parts[2], "port": number})
    relay_hint = json.dumps({"type": "relay-v1", "hints": hints})
    blocks = {
        "Replace PORT: these endpoints do not tell the TCP port that clients connect to:": unknown,
        "Python client (the receiver: `receive` in place of `send FILE`):": (
            f"wormhole --transit-helper={helper} send FILE"
        ),
        "The same, for a whole shell:": f"export WORMHOLE_TRANSIT_HELPER={helper}",
        "Rust client:": f"wormhole-rs send --relay-server={helper.replace(':', '://', 1)} FILE",
        "WebSocket clients:": url,
        "Relay hint of the transit protocol:": relay_hint.replace(': "PORT"}', ": PORT}"),
    }
    return "\n\n".join(f"{heading}\n{line}" for heading, line in blocks.items() if line)


# Listeners -----------------------------------------------------------------------------------
# A Listener is one open listening socket. An endpoint has one for each address of its interface;
# a socket for all of IPv6 serves IPv4 too. A refusal by the system is a StartupError, whose text
# names the endpoint.

NO_IPV6 = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)  # not in the kernel; or switched off
# getaddrinfo(3), where the system has them: the name has no address, or none of this family.
NO_IPV6_ADDRESS = [getattr(socket, name, None) for name in ("EAI_ADDRFAMILY", "EAI_NODATA")]
FREE_PORT_ATTEMPTS = 20  # to find a port that is free on each address of an interface
NUMERIC = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV  # no names for addresses and ports
FileIdentity = tuple[int, int, int]  # device, inode, and time: inode numbers are soon used again


class Listener:
    """An open listening socket."""

    def __init__(
        self, sock: socket.socket, endpoint: Endpoint, made_file: FileIdentity | None = None
    ) -> None:
        """Take over `sock`, which listens. `made_file`: its file, if this relay made one."""
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.endpoint = endpoint
        self.made_file = made_file
        is_tcp = sock.family in (socket.AF_INET, socket.AF_INET6)
        self.port: int | None = sock.getsockname()[1] if is_tcp else None
        self.label = endpoint.text  # for messages; for TCP with the real port and address
        if endpoint.kind in ("tcp", "tcp6"):
            host, _ = socket.getnameinfo(sock.getsockname(), NUMERIC)
            interface = ":interface=" + host.replace(":", "\\:") if endpoint.interface else ""
            prefix = PROXY_PREFIX if endpoint.has_proxy_header else ""
            self.label = f"{prefix}tcp:{self.port}{interface}"

    @property
    def bound(self) -> tuple[int, Any, bool]:
        """Return family, address and IPv6-only flag, equal for all spellings of one address."""
        address = self.sock.getsockname()
        if isinstance(address, str):  # of a unix socket
            address = os.path.realpath(address)
        is_ipv6 = self.sock.family == socket.AF_INET6
        ipv6_only = is_ipv6 and self.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) != 0
        return self.sock.family, address, ipv6_only

    def is_bound(self, family: int, host: object, port: int, ipv6_only: bool) -> bool:
        """Return whether this is the TCP socket of an address, and was not passed."""
        own_family, own_address, own_ipv6_only = self.bound
        if self.endpoint.is_passed or (own_family, self.port) != (family, port):
            return False
        return own_address[0] == host and (host != ANY_IPV6 or own_ipv6_only == ipv6_only)

    def is_at(self, path: str) -> bool:
        """Return whether this is a unix socket at `path`, in a file that we made."""
        made = self.made_file
        if made is None or self.bound[1] != os.path.realpath(path):
            return False
        with contextlib.suppress(FileNotFoundError):
            return _identify(path)[:2] == made[:2]  # its time changes if it is touched
        return False

    def adjust(self) -> None:
        """Change the backlog, and the mode of a file that we made, to those of the endpoint."""
        if not self.endpoint.is_passed:
            self.sock.listen(self.endpoint.backlog)
        try:
            if self._has_file():
                os.chmod(self.endpoint.path, self.endpoint.mode)
        except OSError as error:
            log.error("%s: its mode cannot be changed: %s", self.label, error_text(error))

    def give_to(self, uid: int, gid: int) -> None:
        """Change the owner of a unix socket that this relay made. Raises StartupError."""
        with startup_errors(self.label):
            if self._has_file():
                os.chown(self.endpoint.path, uid, gid, follow_symlinks=False)

    def _has_file(self) -> bool:
        """Return whether this relay made the file at the path. Raises OSError."""
        return self.made_file is not None and _identify(self.endpoint.path) == self.made_file

    def place(self) -> dict[str, object]:
        """Return what a reload carries."""
        text, role = self.endpoint.text, self.endpoint.role.value
        return {"fd": self.fd, "text": text, "role": role, "made_file": self.made_file}

    @classmethod
    def resumed(cls, place: Mapping[str, Any]) -> Listener:
        """Return the listener that `place` describes, whose descriptor is open. Raises OSError."""
        os.set_inheritable(place["fd"], False)
        endpoint = parse_endpoint(place["text"], Role(place["role"]))
        return cls(socket.socket(fileno=place["fd"]), endpoint, place["made_file"])

    def close(self) -> None:
        """Close the socket, and remove its file if that is still the one that we made."""
        self.sock.close()
        # After --user the folder may not be writable. Then the next start removes the file.
        with contextlib.suppress(OSError):
            if self._has_file():
                os.unlink(self.endpoint.path)
        self.made_file = None


def _identify(path: str) -> FileIdentity:
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def open_listeners(
    endpoints: Sequence[Endpoint],
    passed: PassedSockets,
    inherited: Sequence[Listener] | None = None,
    is_rehearsal: bool = False,
) -> list[Listener]:
    """Open all endpoints, or none. Raises StartupError.

    `inherited`: the listeners of the predecessor. An endpoint gets the one at its address. After
    the execution, an endpoint that the system refuses is logged, and the others are opened. A
    rehearsal makes no new unix socket, whose file would stay if the rehearsal were killed.
    """
    may_fail = inherited is not None and not is_rehearsal
    inherited = inherited or ()
    # Look up the passed descriptors before opening a socket, which could get the number of a
    # descriptor that is not open.
    found = [(passed.find(endpoint), endpoint) for endpoint in endpoints]
    given: set[object] = set()  # passed descriptors, and paths
    ipv4_ports = {one.port for one in endpoints if one.interface == ANY_IPV4} - {0}
    listeners: list[Listener] = []
    with contextlib.ExitStack() as undo:
        # Adopt passed sockets first, so that `_open_error_text` finds a path that is given twice.
        for fd, endpoint in sorted(found, key=lambda one: one[0] is None):
            name = fd if fd is not None or not endpoint.path else os.path.realpath(endpoint.path)
            try:
                if name is not None and name in given:
                    raise StartupError(f"{endpoint.text}: this socket is given twice")
                given.add(name)
                # True if another endpoint listens on all of IPv4, on the same port.
                ipv6_only = endpoint.interface == ANY_IPV6 and endpoint.port in ipv4_ports
                if is_rehearsal and endpoint.kind == "unix":
                    opened = [old for old in inherited if old.is_at(endpoint.path)]
                    if not opened:
                        _require_room(endpoint)
                else:
                    opened = open_endpoint(endpoint, fd, ipv6_only, inherited)
            except (OSError, StartupError) as error:
                text = str(error)
                if isinstance(error, OSError):
                    text = f"{endpoint.text}: {_open_error_text(endpoint, error, listeners)}"
                if not may_fail:
                    raise StartupError(text) from None
                log.error("%s; the reload goes on without this endpoint", text)
                continue
            for listener in opened:
                if all(listener.fd != old.fd for old in inherited):
                    undo.callback(listener.close)
            inherited = [old for old in inherited if all(old.fd != one.fd for one in opened)]
            listeners += opened
        undo.pop_all()
    return listeners


def _open_error_text(endpoint: Endpoint, error: OSError, listeners: Sequence[Listener]) -> str:
    """Return why an endpoint cannot be opened; `listeners` are those opened before it."""
    text = error_text(error)
    if error.errno == errno.EADDRINUSE:
        for other in listeners:
            if endpoint.path and other.bound[1] == os.path.realpath(endpoint.path):
                return "this socket is given twice"
            if endpoint.port and other.port == endpoint.port:
                return f"{text}; this relay itself listens on {other.label}"
    return text


def open_endpoint(
    endpoint: Endpoint,
    fd: int | None = None,
    ipv6_only: bool = False,
    inherited: Sequence[Listener] = (),
) -> list[Listener]:
    """Open an endpoint, or adopt `fd` for it. Raises OSError and StartupError."""
    for old in inherited:
        # A standard descriptor was duplicated, so it is known by its text alone.
        is_same = old.fd == fd or old.endpoint.text == endpoint.text
        if (fd is not None and is_same) or (endpoint.kind == "unix" and old.is_at(endpoint.path)):
            return [Listener(old.sock, endpoint, old.made_file)]
    if fd is not None:
        return [Listener(_adopt(fd, endpoint), endpoint)]
    if endpoint.kind == "unix":
        return [_listen_unix(endpoint)]
    attempts = FREE_PORT_ATTEMPTS if endpoint.port == 0 else 1
    while True:
        try:
            socks = _listen_tcp(endpoint, ipv6_only, inherited)
            return [Listener(sock, endpoint) for sock in socks]
        except OSError as error:
            attempts -= 1
            if error.errno != errno.EADDRINUSE or not attempts:
                raise


def resolve(endpoint: Endpoint, ipv6_only: bool) -> Sequence[tuple[int, tuple[object, ...]]]:
    """Return the families and addresses of an endpoint's interface. Raises OSError."""
    if endpoint.interface in ("", ANY_IPV6):
        everywhere = [(socket.AF_INET6, (ANY_IPV6, 0)), (socket.AF_INET, (ANY_IPV4, 0))]
        return everywhere[:1] if ipv6_only else everywhere
    family = socket.AF_INET6 if endpoint.kind == "tcp6" else socket.AF_UNSPEC
    try:
        found = socket.getaddrinfo(
            endpoint.interface, 0, family, socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except socket.gaierror as error:
        if family == socket.AF_INET6 and error.errno in NO_IPV6_ADDRESS:
            raise OSError("the interface has no IPv6 address") from None
        raise
    except UnicodeError:  # Python encodes the name before it asks the system
        raise OSError("the interface is no address and no name") from None
    return list(dict.fromkeys((one[0], one[4]) for one in found))


def _listen_tcp(
    endpoint: Endpoint, ipv6_only: bool, inherited: Sequence[Listener]
) -> list[socket.socket]:
    """Listen on each address of the interface, all with one port. Raises OSError."""
    addresses = resolve(endpoint, ipv6_only)
    has_ipv4 = socket.AF_INET in dict(addresses)  # then a missing IPv6 address is left out
    same = (old.port for old in inherited if old.endpoint.text == endpoint.text)
    port = endpoint.port or next(same, None) or 0  # a free port stays the same
    socks: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for family, (host, _, *scope) in addresses:
            old = next((x for x in inherited if x.is_bound(family, host, port, ipv6_only)), None)
            if old is not None:
                socks.append(old.sock)
                port = old.port or 0
                if host == ANY_IPV6:
                    break
                continue
            try:
                sock = _listen(family, (host, port, *scope), endpoint.backlog, ipv6_only)
            except OSError as error:
                if family == socket.AF_INET or not has_ipv4 or error.errno not in NO_IPV6:
                    raise
                log.info("%s: IPv6 address %s left out: %s", endpoint.text, host, error_text(error))
                continue
            socks.append(undo.enter_context(sock))
            port = sock.getsockname()[1]
            if host == ANY_IPV6:  # serves IPv4 too, unless `ipv6_only`
                break
        undo.pop_all()
    return socks


def _listen(
    family: int, address: tuple[object, ...] | str, backlog: int, ipv6_only: bool = False
) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        if family != socket.AF_UNIX:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and address[0] == ANY_IPV6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, ipv6_only)
        sock.bind(address)
        sock.listen(backlog)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_unix(endpoint: Endpoint) -> Listener:
    path = endpoint.path
    before = os.umask(0o777 & ~endpoint.mode)
    # Two relays that start at once must not remove each other's new socket as a stale one.
    lock = _lock_folder(os.path.dirname(path) or ".")
    try:
        _remove_stale_socket(endpoint)
        sock = _listen(socket.AF_UNIX, path, endpoint.backlog)
        return Listener(sock, endpoint, _identify(path))
    finally:
        os.umask(before)
        if lock is not None:
            os.close(lock)


def _lock_folder(folder: str) -> int | None:
    """Lock a folder until the returned descriptor is closed. None: it cannot be opened."""
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
    # After the deadline go on without the lock: a relay would have released it by then.
    deadline = time.monotonic() + FOLDER_LOCK_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            time.sleep(FOLDER_LOCK_SECONDS / 100)
        except OSError:
            break
    return fd


def require_socket(endpoint: Endpoint) -> None:
    """Raise StartupError if the path of a unix endpoint is too long or has another file."""
    if len(os.fsencode(endpoint.path)) > MAX_SOCKET_PATH_BYTES:
        raise StartupError(f"{endpoint.text}: longer than {MAX_SOCKET_PATH_BYTES} bytes")
    if os.path.lexists(endpoint.path) and not stat.S_ISSOCK(os.lstat(endpoint.path).st_mode):
        raise StartupError(f"{endpoint.text}: the file exists and is not a socket")


def _require_room(endpoint: Endpoint) -> None:
    """Raise OSError or StartupError if a unix socket cannot be made at the path of `endpoint`."""
    require_writable(endpoint.text, os.path.join(os.path.dirname(endpoint.path), "."))
    _remove_stale_socket(endpoint, may_remove=False)


def _remove_stale_socket(endpoint: Endpoint, may_remove: bool = True) -> None:
    """Remove the socket file of a dead relay. Raises OSError and StartupError for other files."""
    require_socket(endpoint)
    if not os.path.lexists(endpoint.path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(endpoint.path)
        except ConnectionRefusedError:
            if may_remove:
                os.unlink(endpoint.path)
            return
        except BlockingIOError:  # the backlog of a live listener is full
            pass
    raise OSError(errno.EADDRINUSE, "another program listens there")


def _adopt(number: int, endpoint: Endpoint) -> socket.socket:
    """Return a socket for a descriptor that is open already. Raises OSError and StartupError."""
    fd = number
    if fd < STANDARD_FDS:  # --daemonize replaces these by /dev/null
        fd = fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, STANDARD_FDS)
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listens:
        sock.detach()
        raise StartupError(f"{endpoint.text}: descriptor {number} is no listening stream socket")
    return sock


# Messages ------------------------------------------------------------------------------------
# Where our own messages go: stderr, stdout or the log file. Messages should not delay clients, so
# a message is dropped if a pipe, a terminal or a socket has no room for it. A write to a file can
# still block, for example while its disk hangs.

SEVERITIES = {logging.WARNING: "warning: ", logging.ERROR: "error: "}
OMISSION = b"\n[...]\n"  # stands for the middle of a long message


class MessageHandler(logging.Handler):
    """Pass each message to a function that writes it. A message that fails is dropped."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        """`write` should not block for long. It may raise OSError."""
        super().__init__()
        self._write = write

    def emit(self, record: logging.LogRecord) -> None:
        """Write `record` in the format of this handler, which can contain `severity`."""
        record.severity = SEVERITIES.get(record.levelno, "")
        text = self.format(record).encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            self._write(limit_message(text) + b"\n")


def limit_message(text: bytes) -> bytes:
    """Return `text`, without its middle if a pipe would not take it as one piece."""
    if len(text) < select.PIPE_BUF:
        return text
    # The end stays, because the last line of a traceback is the exception.
    half = (select.PIPE_BUF - len(OMISSION) - 1) // 2
    return (text[:half] + OMISSION + text[-half:]).decode("utf-8", "ignore").encode()


def nonblocking_writer(fd: int) -> Callable[[bytes], object]:
    """Return a function that writes to `fd`, if possible without blocking. It may raise OSError.

    `fd` itself stays blocking: other processes may share its open file description, and with
    it O_NONBLOCK. A pipe or terminal is opened again instead, as an open file of our own.
    """
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        sock = socket.socket(fileno=os.dup(fd))
        return lambda text: sock.send(text, socket.MSG_DONTWAIT)
    if stat.S_ISFIFO(mode) or os.isatty(fd):
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
        with contextlib.suppress(OSError):
            return partial(os.write, os.open(f"/proc/self/fd/{fd}", flags))
    # A file, a device, or a pipe that belongs to another user. Between the poll in `takes_bytes`
    # and the write, another process may fill that pipe: then the write blocks.
    return lambda text: takes_bytes(fd, 0) and os.write(fd, text)


class LogFile(MessageHandler):
    """Append messages to a file. The path is reopened when another file, or none, is there."""

    def __init__(self, path: str, fd: int | None = None) -> None:
        """Open or create the file, or go on with `fd` after a reload. Raises OSError."""
        super().__init__(self._append)
        self._path = path
        self.is_new = False  # whether we created the file that is open
        self.fd = self._open() if fd is None else fd

    def reopen(self) -> None:
        """Open the path again. If that fails, go on with the old file."""
        try:
            self._replace()
        except OSError as error:
            log.warning("the log file cannot be reopened: %s", error_text(error))
        else:
            log.info("log file reopened")

    def _append(self, text: bytes) -> None:
        with contextlib.suppress(OSError):
            if not is_same_file(self._path, os.fstat(self.fd)):
                self._replace()
        os.write(self.fd, text)

    def _replace(self) -> None:
        assert self.lock is not None
        with self.lock:  # a sink's thread may be writing
            old, self.fd = self.fd, self._open()
            os.close(old)

    def _open(self) -> int:
        """Open the path. Note whether that created the file: `switch_user` gives away no other."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._path, flags | os.O_EXCL, 0o666)
            self.is_new = True
        except FileExistsError:
            fd = os.open(self._path, flags, 0o666)
            self.is_new = False  # also behind a link to no file: its user may have made the link
        return fd


def print_text(text: str, stream: TextIO | None) -> None:
    """Print a text, with what cannot be encoded escaped. None: closed. Raises OSError."""
    if stream is not None:
        encoded = text.encode(stream.encoding, "backslashreplace")
        print(encoded.decode(stream.encoding), file=stream, flush=True)


def start_logging(path: str | None, to_stdout: bool, fd: int | None = None) -> LogFile | None:
    """Send messages to a file and return it, else to stderr or stdout. Raises StartupError.

    `fd`: of the file, after a reload. If it cannot be opened, messages go to stderr or stdout.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    file = None
    try:
        with startup_errors(f"logfile {path}"):
            file = None if path is None else LogFile(path, fd)
    finally:
        handler = file or MessageHandler(nonblocking_writer(1 if to_stdout else 2))
        layout = ("%(asctime)s " if file else "") + "%(severity)s%(message)s"
        handler.setFormatter(logging.Formatter(layout, "%Y-%m-%dT%H:%M:%S%z"))
        log.addHandler(handler)
    return file


# Daemon --------------------------------------------------------------------------------------
# What init scripts, cron and systemd expect of a program: a pidfile, notifications, the
# background, another user. Notifications go on for as long as the program runs. All else
# happens once, at the start or at the end. A start that the system refuses is a StartupError.

MIN_WATCHDOG_SECONDS = 0.05  # between two notifications, even if the watchdog is stricter
MAX_ID = 2**32 - 2  # of a user or group; the next number stands for "no change", chown(2)


class Environment(NamedTuple):
    """The service manager's variables: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3)."""

    listen_pid: str = ""
    listen_fds: str = ""
    listen_fdnames: str = ""
    notify_socket: str = ""
    watchdog_usec: str = ""
    watchdog_pid: str = ""

    @classmethod
    def take(cls) -> Environment:
        """Read the variables, and remove them: child processes must not inherit them."""
        return cls(*(os.environ.pop(field.upper(), "") for field in cls._fields))

    def variables(self, has_sockets: bool, has_watchdog: bool) -> dict[str, str]:
        """Return the variables that were set, for the program after a reload.

        A fork has changed the process id since they were set. `has_sockets` and `has_watchdog`:
        they were for this process.
        """
        found = {name.upper(): value for name, value in self._asdict().items() if value}
        for name, is_ours in (("LISTEN_PID", has_sockets), ("WATCHDOG_PID", has_watchdog)):
            if name in found and is_ours:
                found[name] = str(os.getpid())
        return found

    def passed_sockets(self, own_pid: int = 0) -> PassedSockets:
        """Return the sockets passed to this process. To be called before a fork."""
        return PassedSockets.parse(self.listen_pid, self.listen_fds, self.listen_fdnames, own_pid)

    def watchdog_seconds(self) -> float:
        """Return the time limit of this process's watchdog, or 0. To be called before a fork."""
        is_for_us = self.watchdog_pid in ("", str(os.getpid()))
        microseconds = parse_number(self.watchdog_usec, 10**15 - 1) if is_for_us else None
        return (microseconds or 0) / 1e6


class PidFile:
    """A file with our process id, locked as long as the process runs.

    The lock tells whether a relay is running. The number does not: after a crash or a reboot
    another process may have it.
    """

    def __init__(self, path: str, fd: int | None = None) -> None:
        """Lock the file and write the process id to it. Raises StartupError.

        `fd`: of the file, after a reload. The lock is on it.
        """
        self._path = path
        with startup_errors(f"pidfile {path}"):
            self.fd = self._lock() if fd is None else fd
            if fd is None:  # else it has our process id
                os.ftruncate(self.fd, 0)
                os.pwrite(self.fd, b"%d\n" % os.getpid(), 0)

    def _lock(self) -> int:
        """Open and lock the file; again, if its owner removed it in between."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            with contextlib.ExitStack() as undo:
                fd = os.open(self._path, flags, 0o644)
                undo.callback(os.close, fd)
                content = os.read(fd, 64).strip()
                is_regular = stat.S_ISREG(os.fstat(fd).st_mode)
                if not is_regular or not re.fullmatch(rb"[0-9]{0,20}", content):
                    raise StartupError(f"pidfile {self._path}: holds something else")
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    reason = f"a relay is running, process id {content.decode()}"
                    raise StartupError(f"pidfile {self._path}: {reason}") from None
                if is_same_file(self._path, os.fstat(fd)):
                    undo.pop_all()
                    return fd

    def close(self) -> None:
        """Remove the file. If the folder does not allow that, empty the file."""
        try:
            if is_same_file(self._path, os.fstat(self.fd)):
                os.unlink(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self.fd, 0)
        os.close(self.fd)


class ServiceManager:
    """Notify systemd, if it started this process: sd_notify(3)."""

    def __init__(self, address: str, watchdog_seconds: float = 0) -> None:
        """`address`: NOTIFY_SOCKET. `watchdog_seconds`: the watchdog's time limit, or 0."""
        if not address.startswith(("/", "@")):  # vsock:... is for virtual machines
            address = ""  # nothing is sent
        self._address = re.sub("^@", "\0", address)  # an abstract socket, unix(7)
        self._watchdog_seconds = watchdog_seconds
        self._socket: socket.socket | None = None  # kept open: descriptors may run out
        self._unsent = ""  # variables that must arrive and were refused
        self._status_prefix = ""
        self._warnings = Throttle()

    def add_chores(self, server: Server) -> None:
        """Let the loop send the status, and the watchdog's keep-alive."""
        if self._address:
            server.timers.every(STATUS_SECONDS, lambda: self.notify(self._state(server.snapshot())))
        if self._address and self._watchdog_seconds:
            pause = max(self._watchdog_seconds / 2, MIN_WATCHDOG_SECONDS)
            server.timers.every(pause, lambda: self.notify("WATCHDOG=1"))

    def ready(self) -> None:
        """Report that clients are served."""
        self.notify("READY=1", must_arrive=True)

    def reloading(self) -> None:
        """Report that a reload executes the program. The next report is `ready`."""
        microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        self.notify(f"RELOADING=1\nMONOTONIC_USEC={microseconds}")

    def reload_refused(self, reason: str, now: Snapshot) -> None:
        """Say in the status why the last reload was refused."""
        self._status_prefix = f"reload refused: {reason}; "
        self.notify(self._state(now))

    def stopping(self, now: Snapshot) -> None:
        """Report that a stop or a drain has begun."""
        self._status_prefix = "stopping; "
        self.notify(f"STOPPING=1\n{self._state(now)}", must_arrive=True)

    def _state(self, now: Snapshot) -> str:
        """Return the status. During a drain, ask for time too: TimeoutStopSec= may be shorter."""
        status = f"STATUS={self._status_prefix}{status_line(now)}"
        seconds = min(EXTEND_SECONDS, now.drain_seconds_left + STOP_GRANT_SECONDS)
        extension = f"EXTEND_TIMEOUT_USEC={seconds * 1e6:.0f}\n" if now.drain_seconds_left else ""
        return extension + status

    def notify(self, message: str, must_arrive: bool = False) -> None:
        """Send variables, one a line. After an error, repeat those that `must_arrive` later."""
        if not self._address:
            return
        message = self._unsent + message
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            self._socket.sendto(message.encode(), self._address)
            self._unsent = ""
        except OSError as error:
            if must_arrive:
                self._unsent = message + "\n"
            if self._warnings.take(time.monotonic()):
                log.warning("the service manager cannot be notified: %s", error_text(error))

    def close(self) -> None:
        """Close the socket."""
        if self._socket is not None:
            self._socket.close()


def open_descriptors() -> list[int]:
    """Return the numbers of the open descriptors. One of them may be closed by now."""
    with contextlib.suppress(OSError):
        return [int(name) for name in os.listdir("/dev/fd")]
    found = []
    # Without /proc (Linux) there is no /dev/fd. Higher numbers than these are not found then.
    for fd in range(1024):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            found.append(fd)
    return found


def daemonize(kept: Iterable[int | None]) -> Callable[[], None]:
    """Go to the background. Return in the daemon, with a function to call when all is set up.

    The original process waits and exits with 0 after that call, or with 1 if the daemon ends
    first. stderr stays open until the call, so that the daemon can print why it failed. The daemon
    keeps the working directory and the umask. Inherited descriptors are closed, except the standard
    ones and `kept`, in which None stands for no descriptor. Raises StartupError.
    """
    with startup_errors("--daemonize"):
        null = os.open(os.devnull, os.O_RDWR)
        ready_read, ready_write = os.pipe()
        if os.fork():
            os.close(ready_write)
            os._exit(0 if os.read(ready_read, 1) else 1)
        os.setsid()
        if os.fork():  # a process that does not lead its session cannot get a terminal
            os._exit(0)
    for fd in {*open_descriptors()}.difference(kept, range(STANDARD_FDS), (null, ready_write)):
        with contextlib.suppress(OSError):
            os.close(fd)

    def detach() -> None:
        for fd in range(STANDARD_FDS):
            os.dup2(null, fd)
        os.close(null)
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_write, b"\0")
        os.close(ready_write)

    return detach


def fill_standard_descriptors() -> None:
    """Open /dev/null where 0, 1 or 2 is closed: a socket there would receive messages."""
    fd = -1
    while fd < STANDARD_FDS:
        fd = os.open(os.devnull, os.O_RDWR)
    os.close(fd)


def duplicate_log_descriptor(fd: int) -> int:
    """Return a duplicate of the descriptor of `--log-fd`. Raises StartupError."""
    with startup_errors(f"--log-fd={fd}"):
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise StartupError(f"--log-fd={fd}: not open for writing")
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STANDARD_FDS)


def raise_open_files_limit() -> tuple[int, str]:
    """Raise the limit of open descriptors. Return the limit, and a remark (or nothing)."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (MAX_OPEN_FILES if n == resource.RLIM_INFINITY else n for n in limits)
    wanted = min(hard, MAX_OPEN_FILES)
    if soft >= wanted:
        return soft, ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
    except (OSError, ValueError) as error:
        return soft, f"RLIMIT_NOFILE stays at {soft} open files: {error}"
    return wanted, f"RLIMIT_NOFILE raised from {soft} to {wanted} open files"


def find_user(text: str) -> tuple[str | None, int, int]:
    """Look up NAME[:GROUP], names or numbers. Return name, uid and gid. Raises StartupError."""
    name, _, group = text.partition(":")
    uid, gid = parse_number(name, MAX_ID), parse_number(group, MAX_ID)
    user: pwd.struct_passwd | None = None
    with contextlib.suppress(KeyError):
        user = pwd.getpwnam(name) if uid is None else pwd.getpwuid(uid)
        uid, gid = user.pw_uid, gid if group else user.pw_gid
    if uid is None or (user is None and not group):
        remedy = "" if uid is None else f", so add its group: {uid}:GROUP"
        raise StartupError(f"--user {text}: there is no user {name!r}{remedy}")
    if gid is None:
        try:
            gid = grp.getgrnam(group).gr_gid
        except KeyError:
            raise StartupError(f"--user {text}: there is no group {group!r}") from None
    return user and user.pw_name, uid, gid


def switch_user(text: str, listeners: Sequence[Listener], log_file: LogFile | None) -> None:
    """Run as NAME[:GROUP] from now on, for good. Raises StartupError.

    The user gets the unix sockets and the log file, if this process has created them: the log file
    must be reopened after a rotation. The pidfile stays root's. The user may be unable to read
    Python's library: what is needed later is imported by now.
    """
    name, uid, gid = find_user(text)
    if (os.geteuid(), os.getegid()) == (uid, gid):
        return
    with startup_errors(f"--user {text}"):
        for listener in listeners:
            listener.give_to(uid, gid)
        if log_file is not None and log_file.is_new:
            os.fchown(log_file.fd, uid, gid)
        if name is None:
            os.setgroups([gid])
        else:
            os.initgroups(name, gid)
        os.setgid(gid)
        os.setuid(uid)  # this also disables core dumps, until an execve
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# Command line --------------------------------------------------------------------------------
# The options, and the file that may contain them. An error is one line: it names the option,
# and the line of the file.

EPILOG = """\
endpoints:
  tcp:4001  tcp6:4001  4001         all interfaces, IPv4 and IPv6
  tcp:4001:interface=127.0.0.1      one address, or those of a name that this machine
                                    has; an IPv6 address: interface=\\:\\:1
  tcp:0                             a free port, which the start message names
  tcp:4001:backlog=N                the queue of new connections (default and least: 1024)
  unix:/run/x.sock[:mode=660]       a unix socket (default mode: 666)
  systemd:index=0  systemd:name=X   a socket passed by systemd, the only one of its name
  fd:N                              a listening socket that is open already
  haproxy:tcp:4001  haproxy:unix:/run/x.sock  ...
                                    the same, for a proxy that begins each connection
                                    with a PROXY header, which has the client's address

configuration file:
  one option per line, without dashes: `blur-usage 3600` or `blur-usage = 3600`;
  a # at the start of a line or after white space begins a comment;
  a value has no quotes and no escapes, except the backslash of an endpoint;
  the command line can cancel an option of the file with --no-daemonize, --splice,
  or an empty value: --usage-db=   (a user: --user=root)

signals:
  SIGTERM, SIGINT, SIGQUIT          stop: queued bytes get 2 s, unwritten records 10 s;
                                    a second signal ends the relay without waiting
                                    for them. With --drain, the first signal lets pairs
                                    run on, the second stops, the third ends the relay
  SIGHUP                            reload: the same process executes the program that is on
                                    disk, reads --config again, and keeps all connections.
                                    It stops a relay whose terminal was closed
  SIGUSR1                           reopen the log file, if there is one
  SIGUSR2, SIGALRM                  ignored, and some others

exit codes:
  0 stopped, all records written    1 the system refused, or records were lost
  2 wrong command line or configuration
"""

REPEATABLE = ("port", "websocket", "status", "allow", "trust_forwarded_for", "config")
MAX_KEEPALIVE_SECONDS = 32767  # Linux: MAX_TCP_KEEPIDLE


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line."""

    place = ""  # the file and line that are parsed; empty: the command line
    log_fd: int | None = None  # as far as it is known; 2: stderr is for records only

    def error(self, message: str) -> NoReturn:
        """Exit with code 2, for an option that is unknown or has a wrong value."""
        message = re.sub("^argument -[a-z]/", "argument ", message)  # files have no short options
        self.fail(f"{message} (--help lists all options)")

    def fail(self, message: str) -> NoReturn:
        """Exit with code 2."""
        print_error(f"{self.place}{message}", sys.stdout if self.log_fd == 2 else sys.stderr)
        raise SystemExit(2)


def print_error(message: str, stream: TextIO | None) -> None:
    """Print in one line why the relay does not start. `stream` is None if it is closed."""
    text = " ".join(message[:MAX_COMPLAINT_CHARACTERS].split())
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    with contextlib.suppress(OSError):
        print_text(f"{PROGRAM}: {printable}", stream)


def websocket_url(text: str) -> str:
    """Check the address of a WebSocket. Raises UsageError."""
    if ws_frames and not ws_frames.URL.fullmatch(text):  # else `choose_endpoints` refuses any
        raise UsageError(f"{text!r} is not of the form ws://HOST[:PORT]/PATH or wss://...")
    return text


def nonempty(text: str) -> str:
    """Check the value of an option that names something. Raises UsageError."""
    if not text:
        raise UsageError("the name is empty")
    return text


def allow_empty(parse: Callable[[str], object]) -> Callable[[str], object]:
    """Return a parser that passes an empty value on to `reset_empty_options`."""
    return lambda text: parse(text) if text or parse is nonempty else text


def parse_forward(text: str) -> object:
    """Parse the value of --forward. Raises UsageError and StartupError."""
    return import_part("--forward", "transit_relay_gateway", "parse_target")(text)


LIMIT_OPTIONS = (  # in the order of the fields of Limits
    *("handshake_timeout", "max_wait", "idle_timeout", "stall_timeout", "keepalive"),
    *("max_connections", "max_waiting_per_source", "max_memory"),
    *("max_rate", "max_pair_rate", "quota_rate"),
)
# The options, in the groups of --help: names, the placeholder of the value, and the text. The man
# page has the same texts.
OPTIONS = """\
where it listens:
-p, --port ENDPOINT: accept clients here, over TCP and WebSocket; can be given several times
    (default: the sockets passed by systemd, if there is neither --port nor --websocket; otherwise
    tcp:4001, also when only --websocket is given)
-w, --websocket ENDPOINT: the same, for connections from a proxy: a first line that is not HTTP and
    does not begin with `please relay ` gets HTTP status 400 instead of `bad handshake`; can be
    given several times (default: none; a --port endpoint accepts WebSocket clients too)
-u, --websocket-url URL: the address for WebSocket clients that is printed at the start, if a proxy
    or a router stands before the relay (default: ws://localhost:PORT/ for each --websocket on TCP
    without haproxy:)
--status ENDPOINT: answer HTTP requests about the relay itself here, for its operator: /metrics for
    Prometheus, /healthz, /status.json, and / as a page or a text; can be given several times
    (default: none)
--forward TARGET: be a gateway: find no partners here, but connect to another relay for each client,
    with raw TCP: tcp:HOST:PORT or unix:PATH, with haproxy: before it if that relay expects PROXY
    headers; write no records (default: find partners here)

what it records:
--usage-db FILE: write usage records to this SQLite database, which is created if it is missing;
    :memory: keeps it in memory (default: none)
--log-fd N: write usage records as JSON lines to this open file descriptor (default: none)
--blur-usage SECONDS: round recorded start times down to a multiple of this many seconds; round
    sizes down to 1 kB, 1 MB or 100 MB (default: 0 s: not blurred)

what it limits:
--handshake-timeout SECONDS: close a connection that has not sent its handshake after this many
    seconds; 0 switches it off (default: %(default)g s)
--max-wait SECONDS: close a client that has waited for a partner for this many seconds; 0 switches
    it off (default: %(default)g s)
--idle-timeout SECONDS: end a pair in which no byte has moved for this many seconds and none is
    queued; 0 switches it off (default: %(default)g s)
--stall-timeout SECONDS: end a connection whose client has acknowledged none of the bytes queued for
    it for this many seconds; 0 switches it off (default: %(default)g s)
--max-connections N: have at most this many connections at a time; a newcomer then takes the place
    of a client without a partner, or is refused; 0: no maximum (default: at most 80 %% of the file
    descriptors)
--max-waiting-per-source N: let at most this many clients of one IPv4 address or IPv6 /64 network
    wait; 0: no maximum (default: %(default)s)
--max-memory SIZE: queue about this many bytes at most (64MB, 1GiB) for all slow receivers together;
    beyond that, read a client only while its partner's socket has room; 0: no maximum (default: 256
    MB)
--keepalive SECONDS: probe a TCP connection that has been silent for this many seconds; 0 leaves it
    to the system (default: %(default)g s)
--max-rate RATE: relay at most this many bytes per second in all, divided evenly among the pairs
    that want more: 500kB, 12.5MB, 100Mbit; 0 switches it off (default: none)
--max-pair-rate RATE: relay at most this many bytes per second for each pair, both directions
    together; 0 switches it off (default: none)
--monthly-quota SIZE: refuse new pairs when this many bytes were relayed in a calendar month (UTC):
    500GB, 20TB; running pairs finish; needs --usage-db; 0 switches it off (default: none)
--quota-rate RATE: when the monthly quota is used up, refuse no client, but relay at most this many
    bytes per second in all; needs --monthly-quota; 0 switches it off (default: none)
--allow NETWORK: accept clients from this network only: an IPv4 or IPv6 address, alone or with a
    prefix length, or `unix` for unix sockets; can be given several times (default: everywhere)
--trust-forwarded-for NETWORK: take the address of a client from X-Forwarded-For if the connection
    comes from this network (as for --allow), where an HTTP proxy is; can be given several times
    (default: none)

how it runs:
--config FILE: read more options from this file; the command line takes precedence; can be given
    several times (default: none)
--daemonize: go to the background as soon as all is set up, in the current directory, which the
    daemon keeps; --no-daemonize cancels this option (default: stay in the foreground)
--pidfile FILE: write the process id to this file; a second relay with the same file does not start
    (default: transit_relay.pid with --daemonize, else none)
--logfile FILE: write messages to this file; it is reopened when it was moved, and on SIGUSR1
    (default: transit_relay.log with --daemonize, else stderr, or stdout if --log-fd is 2)
--user NAME[:GROUP]: open sockets, pidfile and log file as root, then run as this user, who must be
    able to write the usage database and its directory; names or numbers (default: do not change)
--drain SECONDS: at the first stop signal, accept no more clients, end those without a partner, and
    let pairs run on for at most this many seconds; a second signal ends the drain; 0: stop at the
    first signal (default: %(default)g s)
--no-splice: copy all data in the relay; --splice cancels this option (default: the kernel moves
    bulk data between TCP clients with splice; needs Linux and Python 3.10)
--check: check the options and most of what a start needs, but not that ports are free, files can be
    written and privileges suffice; print `check ok`; open no port and change no file (default:
    start the relay)
--print-hints HOST: print what clients need to use this relay at a name or an address: options, a
    relay hint and the address for WebSocket clients; open nothing (default: start the relay)
"""
OPTION = re.compile(r"^(-.*?)(?: ([A-Z]\S*))?: (.*(?:\n {4}.*)*)", re.MULTILINE)
# By the placeholder of the value. An option can have a parser of its own.
VALUE_PARSERS: dict[str, Callable[[str], object]] = {
    "ENDPOINT": parse_endpoint,
    "--websocket": partial(parse_endpoint, role=Role.WEBSOCKET),
    "--status": partial(parse_endpoint, role=Role.STATUS),
    "URL": websocket_url,
    "FILE": str,
    "--config": nonempty,
    "NAME[:GROUP]": nonempty,
    "N": whole_number,
    "SECONDS": duration,
    "--blur-usage": whole_number,
    "--keepalive": partial(whole_number, highest=MAX_KEEPALIVE_SECONDS),
    "SIZE": parse_size,
    "--max-memory": partial(parse_size, least=LEAST_MEMORY_BYTES),
    "RATE": parse_rate,
    "NETWORK": parse_network,
    "HOST": parse_host,
    "TARGET": parse_forward,
}


def make_parser() -> Parser:
    """Return the parser of all options."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [--port ENDPOINT] [--websocket ENDPOINT] [OPTIONS]",
        description="The relay server of Magic Wormhole, where clients behind NAT meet.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.set_defaults(**{name: [] for name in REPEATABLE}, blur_usage=0)
    parser.set_defaults(**dict(zip(LIMIT_OPTIONS, Limits())), monthly_quota=0, drain=0)
    parser.set_defaults(max_connections=None)  # it depends on the system
    for group in OPTIONS.split("\n\n"):
        title, _, entries = group.partition(":\n")
        add = parser.add_argument_group(title).add_argument
        for names, placeholder, text in OPTION.findall(entries):
            *short, name = names.split(", ")
            if not placeholder:
                add(name, action="store_true", help=text)
                continue
            action = "append" if name[2:].replace("-", "_") in REPEATABLE else "store"
            parse = allow_empty(VALUE_PARSERS.get(name) or VALUE_PARSERS[placeholder])
            add(*short, name, metavar=placeholder, type=parse, action=action, help=text)
    add = parser.add_argument
    add("--no-daemonize", dest="daemonize", action="store_false", help=argparse.SUPPRESS)
    add("--splice", dest="no_splice", action="store_false", help=argparse.SUPPRESS)
    add = parser.add_argument_group("about").add_argument
    add("--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version")
    add("-h", "--help", action="help", help="print this text")
    return parser


def parse_arguments(
    arguments: Sequence[str] | None, configs: Mapping[str, str] = MappingProxyType({})
) -> argparse.Namespace:
    """Parse the command line, and the files that it names. Exits with code 2 if one is wrong.

    `configs`: the texts of files that are read already, by path.
    """
    parser = make_parser()
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parser.parse_args(arguments)
    parser.log_fd = None if options.check else options.log_fd
    in_files: list[tuple[str, str]] = []
    for path in options.config:
        in_files += read_config(path, parser, configs.get(path))
    # argparse would append the values of the command line to those of the files.
    replaced = {name for name in REPEATABLE if getattr(options, name)}
    kept = [argument for name, argument in in_files if name not in replaced]
    options = parser.parse_args([*kept, *arguments])
    parser.log_fd = None if options.check else options.log_fd
    reset_empty_options(options, {name for name, _ in in_files}, parser)
    for name in ("usage_db", "log_fd", "monthly_quota"):
        value = getattr(options, name)
        if options.forward is not None and value is not None and (value or name == "log_fd"):
            text = f"a gateway writes no records, so --{name.replace('_', '-')} has no use"
            parser.error(f"argument --forward: {text}")
    if options.monthly_quota and not options.usage_db:
        parser.error("argument --monthly-quota: it needs --usage-db")
    if options.quota_rate and not options.monthly_quota:
        parser.error("argument --quota-rate: it needs --monthly-quota")
    if options.daemonize:
        options.pidfile = options.pidfile or "transit_relay.pid"
        options.logfile = options.logfile or "transit_relay.log"
    return options


def reset_empty_options(options: argparse.Namespace, in_files: set[str], parser: Parser) -> None:
    """Replace each empty value by the default. Exits if one is for an option that no file sets."""
    for name, value in vars(options).items():
        if value in ("", [""]) and name in in_files:
            setattr(options, name, parser.get_default(name))
        elif value == "" or (isinstance(value, list) and "" in value):
            # It may come from an unset variable in a script.
            parser.error(f"argument --{name.replace('_', '-')}: '' is empty")


CONFIG_LINE = re.compile(r"(?:--)?([^\s=-][^\s=]*)(?:(?:\s*=\s*|\s+)([^\0]*))?")
COMMENT = re.compile(r"(?:^|\s)#.*")


def read_text(path: str) -> str:
    """Return the beginning of a configuration file. Raises OSError."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return file.read(MAX_CONFIG_CHARACTERS)


def read_config(path: str, parser: Parser, text: str | None = None) -> list[tuple[str, str]]:
    """Return the options of a file: names, and command-line arguments. Exits if it is wrong.

    `text`: None: read the file.
    """
    try:
        text = read_text(path) if text is None else text
    except OSError as error:
        parser.fail(f"argument --config: {path}: {error_text(error)}")
    if len(text) == MAX_CONFIG_CHARACTERS:
        parser.fail(f"argument --config: {path}: too long for a configuration")
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        line = COMMENT.sub("", line).strip()
        if not line:
            continue
        parser.place = f"{path}, line {number}: "
        match = CONFIG_LINE.fullmatch(line)
        if not match:
            parser.error(f"{line!r} is not of the form `option value`")
        option, value = match.groups()
        if option in ("check", "config", "help", "print-hints", "version"):
            parser.error(f"{option} is for the command line only")
        argument = f"--{option}" if value is None else f"--{option}={value}"
        reset_empty_options(parser.parse_args([argument]), set(), parser)  # exits at this line
        found.append((option.replace("-", "_"), argument))
    parser.place = ""
    return found


def choose_endpoints(options: argparse.Namespace, passed: PassedSockets) -> list[Endpoint]:
    """Return the endpoints of the options. Raises StartupError.

    Without `--port` and `--websocket`, the passed sockets are added. If no endpoint but those for
    status clients is found, or only `--websocket`, tcp:4001 is added.
    """
    named = {passed.find(one) for one in options.status} if passed.total else set()
    others = [one for one in passed.endpoints() if passed.find(one) not in named]
    ports = options.port or ([] if options.websocket else others)
    if all(one.is_status for one in ports):
        ports = [parse_endpoint("tcp:4001"), *ports]
    endpoints = [*ports, *options.websocket, *options.status]
    if ws_frames is None and (
        options.websocket_url
        or options.trust_forwarded_for
        or any(one.role is not Role.PORT or one.has_proxy_header for one in endpoints)
    ):
        missing = "Python finds no ws_frames.py (beside transit_relay.py)"
        raise StartupError(f"WebSocket, --status and haproxy: {missing}")
    if any(one.is_status for one in endpoints):
        import_part("--status", "transit_relay_status", "StatusPages")  # it may be missing
    return endpoints


# State ---------------------------------------------------------------------------------------
# A state is a series of pickles without classes: first a Predecessor, then the Server with its
# Links, then each connection. Links refer to a connection by its descriptor. The sweep refers to
# pair n as `~n`, which is negative.

STATE_VERSION = 1
STATE_VARIABLE = "TRANSIT_RELAY_STATE"  # the descriptor of the state
FIXED_OPTIONS = ("daemonize", "pidfile", "user")  # a reload cannot change them
COMM = "/proc/self/comm"  # the name of the process


class Predecessor(NamedTuple):
    """What the program before a reload was: its process, and the descriptors that stay open."""

    version: int
    pid: int
    is_rehearsal: bool
    fixed: Mapping[str, Any]  # the values of FIXED_OPTIONS
    listeners: Sequence[Mapping[str, Any]]  # see Listener.place
    files: Mapping[str, tuple[Any, int]]  # by option: its value, and the descriptor
    configs: Mapping[str, str]  # the texts of the configuration files, by path
    keepalive_seconds: float
    connections: int  # client sockets that are open in this process; 0 in a rehearsal
    name: bytes  # of the process
    carried: Mapping[str, Sequence[str]]  # see carried_fields
    sends_proxy_header: bool | None  # by --forward; None: it is no gateway
    target_addresses: Sequence[Any]  # of --forward, found by the rehearsal: see Target.resolve
    has_terminal: bool = False  # as it was at the first start; older programs do not tell

    def take_file(self, option: str, value: object) -> int | None:
        """Return the descriptor of the file of an option, if the option has the same value.

        Otherwise close that descriptor and return None. In a rehearsal it is not open.
        """
        old_value, fd = self.files.get(option, (None, -1))
        is_same = fd >= 0 and old_value == value
        if fd >= 0 and not self.is_rehearsal:
            os.set_inheritable(fd, False)
            if not is_same:
                os.close(fd)
        return fd if is_same else None

    def restore_process(self, server: Server, options: argparse.Namespace) -> None:
        """Restore what the execution of a program changes."""
        with contextlib.suppress(OSError), open(COMM, "wb") as file:
            file.write(self.name)
        if options.keepalive != self.keepalive_seconds:
            for conn in server.connections:
                set_options(conn.sock, socket_options(options.keepalive))

    def require_compatible(self, options: argparse.Namespace) -> None:
        """Raise StartupError if this program cannot take over a client, or an option is fixed.

        All classes are checked, because more clients can connect before the execution.
        """
        # A client without a handshake has its address as the old program keeps it: hashed or plain.
        if getattr(options.forward, "sends_proxy_header", None) is not self.sends_proxy_header:
            raise StartupError("--forward and its haproxy: cannot be added or removed by a reload")
        known = carried_fields()
        for name, fields in self.carried.items():
            if not {*fields} <= {*known.get(name, ())}:
                reason = "it misses a field of" if name in known else "it has no"
                raise StartupError(f"the new program cannot take over all clients: {reason} {name}")
        for name, value in self.fixed.items():
            if getattr(options, name) != value:
                raise StartupError(f"--{name} cannot be changed by a reload")


class Links(NamedTuple):
    """How the objects of a Server are linked."""

    fds: Sequence[int]  # of the connections, in the order in which they follow
    waiting: Sequence[int]  # clients that wait, the oldest token first
    pairs: Sequence[Mapping[str, Any]]  # each with the descriptors of its sessions
    timers: Mapping[str, Any]
    rates: tuple[Mapping[str, Any], Sequence[Any]]  # from `place` and `place_pairs`
    bulk: Sequence[tuple[int, int]]  # what is queued: descriptor, events
    sweep: Sequence[Any]
    quota: Mapping[str, Any] | None


# The classes of connections, by name. transit_relay_gateway adds another one.
CONNECTIONS: dict[str, type[Connection]] = {"Connection": Connection}
# The classes of framings whose place in a stream is carried, by name.
FRAMINGS: dict[str, Any] = {"RawFraming": RawFraming, "DetectFraming": DetectFraming}
if ws_frames:
    web_framings = ("ProxyFraming", "HttpFraming", "WebSocketFraming", "StatusFraming")
    FRAMINGS.update((name, getattr(ws_frames, name)) for name in web_framings)


def carried_fields() -> dict[str, tuple[str, ...]]:
    """Return the names of the carried fields of each class that belongs to a client."""
    classes = (*CONNECTIONS.values(), Session, Pair, *FRAMINGS.values())
    return {one.__name__: one.CARRIED for one in classes}


# The framings that contain another one, and the class of that one. For a status client, the one in
# a ProxyFraming is a StatusFraming.
INNER_FRAMINGS = {
    "HttpFraming": "RawFraming",
    "ProxyFraming": "DetectFraming",
    "WebSocketFraming": "RawFraming",
}


def resume_framing(
    place: Mapping[str, Any], session: Session, transport: Connection
) -> ws_frames.Framing:
    """Return the framing that a state describes: the name of its class, and the fields.

    Raises KeyError for an unknown class.
    """
    ((name, fields),) = place.items()
    if name == "Framing":
        return DISCARD
    framing: ws_frames.Framing
    inner = INNER_FRAMINGS.get(name)
    if inner is None:
        framing = FRAMINGS[name](session, transport)
    else:
        inner = "StatusFraming" if transport.is_status else inner
        framing = FRAMINGS[name](session, transport, FRAMINGS[inner](session, transport))
    framing.resume(fields)
    return framing


def place_connection(conn: Connection, has_backlog: bool) -> dict[str, Any]:
    """Return the state of a connection. A pipe is read out, which can raise MemoryError.

    `has_backlog` false, in a rehearsal: one byte stands for the backlog.
    """
    backlog = conn.backlog
    if not has_backlog and backlog is not None:
        backlog = bytearray(b"."[: len(backlog)])
    elif isinstance(backlog, Pipe):
        backlog = backlog.read_all()
        conn._set_backlog(backlog)
    framing = {type(conn.framing).__name__: conn.framing.place()}
    name = type(conn).__name__
    return {**conn.place(), "class": name, "backlog": plain(backlog), "framing": framing}


def resume_connection(conn: Connection, place: Mapping[str, Any]) -> None:
    """Let a new connection go on with the state that `place_connection` returned."""
    fields = dict(place)
    del fields["class"]
    backlog = fields.pop("backlog")
    framing = fields.pop("framing")
    conn.resume(fields)
    conn.framing = resume_framing(framing, conn.session, conn)
    conn._set_backlog(None if backlog is None else bytearray(backlog))


def place_server(server: Server, has_backlogs: bool = True) -> Iterator[dict[str, Any]]:
    """Yield the state of a Server between two turns, in parts. Raises MemoryError."""
    rendezvous, pairs = server.rendezvous, tuple(server.rendezvous.pairs)
    numbers: dict[object, int] = {conn: conn.fd for conn in server.connections}
    numbers.update((pair, ~n) for n, pair in enumerate(pairs))
    links = Links(
        fds=tuple(conn.fd for conn in server.connections),
        waiting=tuple(one.transport.fd for crowd in rendezvous.waiting.values() for one in crowd),
        pairs=tuple(
            {**pair.place(), "fds": tuple(one.transport.fd for one in pair.sessions)}
            for pair in pairs
        ),
        timers=server.timers.place(),
        rates=(server.rates.place(), server.rates.place_pairs(pairs)),
        bulk=tuple((conn.fd, ready) for conn, ready in server.bulk.ready.items()),
        sweep=server.limits.sweep.place(numbers),
        quota=None if server.quota is None else server.quota.place(),
    )
    yield {**server.place(), "links": links._asdict()}
    for conn in tuple(server.connections):
        yield place_connection(conn, has_backlogs)


def resume_server(
    server: Server,
    state: Iterator[dict[str, Any]],
    connect: Callable[[type[Connection], int], Connection],
) -> None:
    """Let a new Server go on with a state from `place_server`. Raises ValueError and others.

    `connect` returns a new connection of a class for a descriptor.
    """
    shared = next(state)
    links = Links(**shared.pop("links"))
    server.resume(shared)
    conns: dict[int, Connection] = {}
    for fd in links.fds:
        fields = next(state)
        conns[fd] = connect(CONNECTIONS[fields["class"]], fd)
        resume_connection(conns[fd], fields)
        server.add(conns[fd])
    for fd in links.waiting:
        server.rendezvous.resume_waiting(conns[fd].session)
    pairs = []
    for place in links.pairs:
        fields = dict(place)
        sessions = [conns[fd].session for fd in fields.pop("fds")]
        pairs.append(server.rendezvous.resume_pair(fields, sessions))
    server.timers.resume(links.timers, conns)
    for fd in {*links.waiting}.difference(fd for fd, _ in links.timers["waiting"]):
        server.timers.waiting.start(conns[fd], server.clock())  # the limit was off
    keys: dict[int, object] = {**conns, **{~n: pair for n, pair in enumerate(pairs)}}
    server.limits.sweep.resume(links.sweep, keys)
    for fd, ready in links.bulk:
        server.bulk.add(conns[fd], ready)
    if server.quota is not None and links.quota is not None:
        server.quota.resume(links.quota)
    elif server.quota is not None:
        server.quota.skip(server.rendezvous.relayed_bytes())
    server.limits.check_quota(server.quota)  # can change the rates
    server.rates.resume_pairs(*links.rates, pairs)
    for conn in server.connections:
        if not is_consistent(conn):
            raise ValueError(f"inconsistent: {conn}")
    if next(state, None) is not None:  # this also closes the file
        raise ValueError("it has more parts than connections")


def read_state(fd: int) -> Iterator[dict[str, Any]]:
    """Yield the parts of a state. Raises pickle.UnpicklingError, OSError and others."""
    import pickle

    class PlainUnpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> NoReturn:
            raise pickle.UnpicklingError(f"a state has no classes: {module}.{name}")

    with open(fd, "rb") as file:
        file.seek(0)
        while True:
            try:
                yield PlainUnpickler(file).load()
            except EOFError:
                return


def take_predecessor() -> tuple[Predecessor | None, Iterator[dict[str, Any]]]:
    """Return the program before a reload, if there is one, and the rest of its state.

    Raises StartupError.
    """
    fd = parse_number(os.environ.pop(STATE_VARIABLE, ""), 2**31 - 1)
    if fd is None:
        return None, iter(())
    with understood_state():
        os.set_inheritable(fd, False)
        state = read_state(fd)
        fields = next(state)
        if fields["version"] != STATE_VERSION:
            raise ValueError(f"its version is {fields['version']}, expected {STATE_VERSION}")
        predecessor = Predecessor(**fields)
    is_ours = predecessor.is_rehearsal or predecessor.pid == os.getpid()
    return (predecessor, state) if is_ours else (None, iter(()))


@contextlib.contextmanager
def understood_state() -> Iterator[None]:
    """Turn an error of the block into a StartupError: this program cannot use the state."""
    try:
        yield
    except Exception as error:
        has_text = isinstance(error, (AttributeError, TypeError, ValueError))  # no client's data
        text = f"{type(error).__name__}: {error}" if has_text else type(error).__name__
        raise StartupError(f"the state of the running relay cannot be used: {text}") from error


def connect_again(
    server: Server, adopt: Callable[[int], socket.socket], kind: type[Connection], fd: int
) -> Connection:
    """Return a new Connection for a descriptor that is open since before a reload."""
    return kind(adopt(fd), server, Role.PORT, LOCAL_PEER, has_proxy_header=False)


def adopt_socket(fd: int) -> socket.socket:
    """Return the socket of a client that connected before the reload. Raises OSError."""
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    sock.setblocking(False)
    return sock


# Reload --------------------------------------------------------------------------------------
# At SIGHUP this process reads the files of --config again, and executes the program that is on disk
# now, with the same arguments. The process id, the descriptors and all clients stay.
#
#     rehearsal    a child process of the new program gets the state and the option --check. It
#                  tries the steps of a start that can be undone. The relay goes on serving.
#     pause        the sinks finish their writes
#     execution    a memory file gets the state, and execve replaces the program
#
# If a step before execve fails, the relay goes on, and logs `reload refused` with the reason. After
# execve there is no way back, so the new program goes on wherever it can.

REHEARSALS = 5  # of one reload: another one follows if a file has changed meanwhile
REHEARSAL_SECONDS = 10
REHEARSAL_OUTPUT_BYTES = 1024 * 1024
SINK_PAUSE_SECONDS = 10
# The last line of a successful rehearsal: this text, then as JSON how many more descriptors the new
# program may need, the names of its sinks, and the addresses for --forward.
REHEARSED = "rehearsal ok:"


class ReloadRefused(Exception):
    """A reload is not possible now. The relay goes on."""


class Reload:
    """Carries out the reloads of this process."""

    def __init__(
        self,
        options: argparse.Namespace,
        relay: Relay,
        manager: ServiceManager,
        variables: Mapping[str, str],
        files: Callable[[], Mapping[str, tuple[Any, int]]],
    ) -> None:
        """`variables`: of the service manager. `files` returns Predecessor.files."""
        self._options = options
        self._server = relay.server
        self._listeners = relay.listeners
        self._manager = manager
        self._variables = variables
        self._files = files
        self._is_wanted = False
        self._steps: Iterator[None] | None = None
        self._configs: dict[str, str] = {}  # what is rehearsed, and then executed
        self._rehearsal_result: Sequence[Any] = (0, (), ())  # see REHEARSED
        self._killed: set[int] = set()  # child processes that have not ended yet
        # A daemon has a terminal until it is ready.
        self.has_terminal = not options.daemonize and any(map(os.isatty, range(STANDARD_FDS)))

    def request(self) -> None:
        """Begin a reload: SIGHUP came. If one is under way, another one follows."""
        server = self._server
        if self.has_terminal and not any(map(os.isatty, range(STANDARD_FDS))):
            server.ending.signalled(signal.SIGHUP)  # the terminal was closed
        elif server.phase is not ServerPhase.SERVING:
            log.warning("reload refused: the relay is stopping")
        else:
            self._is_wanted = True
            server.between_turns = self._continue

    def _continue(self) -> None:
        """Take the next step, between two turns."""
        if self._steps is None:
            self._is_wanted = False
            self._steps = self._reload()
        if next(self._steps, self) is self:
            self._steps = None
            if not self._is_wanted:
                self._server.between_turns = None

    def stop(self) -> None:
        """Give up the reload that is under way, because the relay stops."""
        self._steps = self._server.between_turns = None

    def _reload(self) -> Iterator[None]:
        """Reload in steps. Return if that is refused."""
        try:
            if self._options.usage_db == ":memory:":
                raise ReloadRefused("--usage-db :memory: would lose its content")
            for _ in range(REHEARSALS):
                rehearsed = self._file_versions()
                self._read_configs()
                yield from self._rehearse()
                yield from self._pause_sinks()
                if rehearsed == self._file_versions():
                    yield from self._execute(rehearsed)
            raise ReloadRefused("the program or the configuration changes again and again")
        except (ReloadRefused, MemoryError) as error:
            reason = str(error) or "out of memory"
        except OSError as error:
            reason = f"{os.fsdecode(error.filename or 'the system')}: {error_text(error)}"
        except Exception as error:
            reason = f"unexpected {type(error).__name__}"
            self._server.faults.contain(None)
        finally:
            self._server.recorder.set_pausing(False)
        log.error("reload refused: %s", reason)
        self._manager.reload_refused(reason, self._server.snapshot())

    def _read_configs(self) -> None:
        """Read the files of --config. Raises ReloadRefused: reading a pipe could take for ever."""
        self._configs = {}
        for path in self._options.config:
            with contextlib.suppress(OSError):  # the rehearsal has the same error
                if not stat.S_ISREG(os.stat(path).st_mode):
                    raise ReloadRefused(f"argument --config: {path}: not a regular file")
                self._configs[path] = read_text(path)

    def _file_versions(self) -> list[tuple[int, ...]]:
        """Return device, inode, size and time of each file of the program and configuration."""
        found: list[tuple[int, ...]] = []
        used = (ws_frames, *map(sys.modules.get, PARTS))
        modules = [__file__, *(one and one.__file__ for one in used)]
        for path in (sys.argv[0], *filter(None, modules), *self._options.config):
            with contextlib.suppress(OSError):  # a module in an archive is no file
                file = os.stat(path)
                found.append((file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns))
        return found

    def _command(self, state_fd: int) -> tuple[list[bytes], dict[str, str]]:
        """Return the arguments and the environment of this process, with a state."""
        with open("/proc/self/cmdline", "rb") as file:
            arguments = file.read().split(b"\0")[1:-1]
        environment = {**os.environ, **self._variables, STATE_VARIABLE: str(state_fd)}
        # Without PATH in the environment, Python may not know its own name.
        program = sys.executable or os.readlink("/proc/self/exe")
        return [os.fsencode(program), *arguments], environment

    def _write_state(self, fd: int, is_rehearsal: bool) -> None:
        import pickle

        with open(COMM, "rb") as file:
            name = file.read().rstrip(b"\n")
        predecessor = Predecessor(
            version=STATE_VERSION,
            pid=os.getpid(),
            is_rehearsal=is_rehearsal,
            fixed={name: getattr(self._options, name) for name in FIXED_OPTIONS},
            listeners=tuple(listener.place() for listener in self._listeners),
            files=dict(self._files()),
            configs=self._configs,
            keepalive_seconds=self._options.keepalive,
            connections=0 if is_rehearsal else len(self._server.connections),
            name=name,
            has_terminal=self.has_terminal,
            carried=carried_fields(),
            sends_proxy_header=getattr(self._server.rendezvous, "sends_proxy_header", None),
            target_addresses=self._rehearsal_result[2],
        )
        with open(fd, "wb", closefd=False) as file:
            pickle.dump(predecessor._asdict(), file, 4)
            for part in place_server(self._server, has_backlogs=not is_rehearsal):
                pickle.dump(part, file, 4)

    def _rehearse(self) -> Iterator[None]:
        """Let a child process try the reload. Raises ReloadRefused and OSError."""
        if not hasattr(os, "memfd_create"):
            raise ReloadRefused("this system has no memory files")
        with contextlib.ExitStack() as undo:
            state, output = (os.memfd_create(PROGRAM) for _ in range(2))
            for fd in (state, output):
                undo.callback(os.close, fd)
            self._write_state(state, is_rehearsal=True)
            arguments, environment = self._command(state)
            kept = [(fd, fd) for fd in (state, *(one.fd for one in self._listeners))]
            actions = [(os.POSIX_SPAWN_DUP2, *fds) for fds in ((output, 1), (output, 2), *kept)]
            pid = os.posix_spawn(
                *(arguments[0], [*arguments, b"--check"], environment),
                file_actions=actions,
                setsigmask=[signal.SIGHUP, signal.SIGUSR1],  # for the whole process group
            )
            deadline = time.monotonic() + REHEARSAL_SECONDS
            ended, status, killed_for = 0, 0, ""
            try:
                while not ended:
                    yield
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if not ended and not killed_for:
                        if time.monotonic() > deadline:
                            killed_for = f"the rehearsal takes longer than {REHEARSAL_SECONDS} s"
                        elif os.fstat(output).st_size > REHEARSAL_OUTPUT_BYTES:
                            killed_for = "the rehearsal prints too much"
                        if killed_for:
                            os.kill(pid, signal.SIGKILL)
            finally:
                if not ended:  # the relay stops, or a fault came
                    os.kill(pid, signal.SIGKILL)
                    self._killed.add(pid)
            printed = os.pread(output, REHEARSAL_OUTPUT_BYTES, 0)
        lines = [line for line in printed.decode(errors="replace").split("\n") if line.strip()]
        if lines and lines[-1].startswith(REHEARSED) and not (killed_for or status):
            self._rehearsal_result = json.loads(lines[-1][len(REHEARSED) :])
        else:
            ours = [line for line in lines if line.startswith(f"{PROGRAM}: ")]
            told = (ours or lines or [""])[-1].replace(f"{PROGRAM}: ", "", 1)
            told = told[-MAX_COMPLAINT_CHARACTERS:]
            code = os.waitstatus_to_exitcode(status)
            end = f"exit code {code}" if code >= 0 else f"signal {-code}"
            raise ReloadRefused(killed_for or told or f"the rehearsal ended with {end}")

    def reap(self) -> None:
        """Take the end of killed child processes, without waiting."""
        for pid in tuple(self._killed):
            if os.waitpid(pid, os.WNOHANG)[0]:
                self._killed.discard(pid)

    def _pause_sinks(self) -> Iterator[None]:
        """Let the sinks finish their writes. Raises ReloadRefused."""
        recorder = self._server.recorder
        self._server.update_current()  # the new configuration can have no quota
        recorder.set_pausing(True)
        deadline = time.monotonic() + SINK_PAUSE_SECONDS
        while not recorder.is_paused:
            if time.monotonic() > deadline:
                raise ReloadRefused(f"a write of records takes longer than {SINK_PAUSE_SECONDS} s")
            yield

    def _execute(self, rehearsed: object) -> Iterator[None]:
        """Execute the program. Raises OSError, MemoryError and ReloadRefused.

        `rehearsed`: what `_file_versions` returned before the rehearsal.
        """
        server, handled = self._server, {*self._server.signals.actions}
        more, sinks, _ = self._rehearsal_result
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        reserved = RESERVED_FDS - len(server.timers.status_clients)  # these use some of them
        if limit - len(open_descriptors()) < reserved + more:
            raise ReloadRefused("too few file descriptors are free")
        with contextlib.ExitStack() as undo:  # if a step fails, or the relay stops
            undo.callback(signal.pthread_sigmask, signal.SIG_UNBLOCK, handled)
            while True:
                signal.pthread_sigmask(signal.SIG_BLOCK, handled)
                is_busy = server.doomed or server.faults.need_repair or server.signals.noted
                if not is_busy and server.recorder.is_paused:
                    break
                signal.pthread_sigmask(signal.SIG_UNBLOCK, handled)
                yield
            for name, sink in server.recorder.status().items():
                if sink.waiting and name not in sinks:
                    text = f"the new configuration has no {name}; records wait: {sink.waiting}"
                    raise ReloadRefused(text)
            state = os.memfd_create(PROGRAM)
            undo.callback(os.close, state)
            self._manager.reloading()  # it can log, and a message can open the log file again
            undo.callback(self._manager.ready)
            gc.disable()  # it would search the new objects for cycles, and clients wait
            undo.callback(gc.enable)
            self._write_state(state, is_rehearsal=False)
            arguments, environment = self._command(state)
            files = (fd for _, fd in self._files().values())
            listeners = (listener.fd for listener in self._listeners)
            clients = (conn.fd for conn in server.connections)
            for fd in (state, *files, *listeners, *clients):
                os.set_inheritable(fd, True)
                undo.callback(os.set_inheritable, fd, False)
            if rehearsed != self._file_versions():
                raise ReloadRefused("the program or the configuration has just changed")
            if self._is_wanted:  # a SIGHUP has come meanwhile: the new program takes this one
                os.kill(os.getpid(), signal.SIGHUP)
            os.execve(arguments[0], arguments, environment)


# Start and stop ------------------------------------------------------------------------------
# The order matters. Steps that need root come first, then the switch of the user, then the files
# that belong to that user. Threads start last: a fork would lose them. A start that fails removes
# its pidfile and its unix sockets, if it still may. The end of the process closes the rest.
#
# `serve` has the steps that belong to the process (background, pidfile, log file). `open_relay` has
# the others (listeners, sinks, user), which the rehearsal of a reload tries too.


class Relay(NamedTuple):
    """What is open before anything is served."""

    listeners: list[Listener]
    gone: list[Listener]  # of the program before a reload
    server: Server
    remark: str  # for the start message, or empty


def open_relay(
    options: argparse.Namespace,
    endpoints: Sequence[Endpoint],
    passed: PassedSockets,
    log_file: LogFile | None,
    log_fd: int | None,
    undo: contextlib.ExitStack,
    predecessor: Predecessor | None = None,
) -> Relay:
    """Open listeners and sinks, become the user of `--user`, and build the Server.

    `undo` gets the steps that close the listeners; in a rehearsal those of new listeners only. The
    raised limit of open files, the change of the user and a new database remain. `predecessor`:
    the program before a reload, whose listeners are used again or closed. Raises StartupError.
    """
    is_rehearsal = predecessor is not None and predecessor.is_rehearsal
    limit, remark = raise_open_files_limit()  # first: there may be a thousand endpoints
    if any(one.has_proxy_header for one in endpoints):
        import ipaddress  # noqa: F401  # before the change of the user, see switch_user
    has_status = any(one.is_status for one in endpoints)
    needs_sources = options.max_connections != 0 or options.max_waiting_per_source != 0
    old_places = predecessor.listeners if predecessor is not None else ()
    inherited = [Listener.resumed(place) for place in old_places]
    listeners = open_listeners(endpoints, passed, inherited if predecessor else None, is_rehearsal)
    if not (listeners or is_rehearsal):  # the old endpoints are better than none
        listeners = inherited
    inherited_fds, used_fds = ({one.fd for one in group} for group in (inherited, listeners))
    for listener in listeners:
        is_inherited = listener.fd in inherited_fds
        if not (is_inherited and is_rehearsal):
            undo.callback(listener.close)
        if is_inherited and not is_rehearsal:
            listener.adjust()
    make_addresses: Callable[..., Addresses] = Addresses
    make_rendezvous: Callable[..., Rendezvous] = Rendezvous
    if options.forward is not None:
        if predecessor is None or is_rehearsal:
            targets = options.forward.resolve()
            options.forward.require_other(targets, endpoints, listeners)
        else:  # clients wait: do not ask the resolver again
            targets = predecessor.target_addresses
        make_addresses, needs_sources = options.forward.addresses_class, True
        make_rendezvous = partial(options.forward.make_gateway, targets, options.keepalive)
    addresses = make_addresses(options.allow, options.trust_forwarded_for, needs_sources)
    gone = [old for old in inherited if old.fd not in used_fds]
    for old in gone:
        if old.endpoint.is_passed and is_rehearsal:  # its newcomers would never be accepted
            raise StartupError(f"{old.label}: a reload cannot close a socket that was passed")
    sinks: list[Sink] = []
    quota = Quota(options.monthly_quota) if options.monthly_quota else None
    if options.usage_db:
        # It imports sqlite3: see switch_user.
        sinks.append(UsageDatabase(options.usage_db, quota, has_totals=has_status))
    if log_fd is not None:
        sinks.append(JsonLines(log_fd))
    if options.user:
        switch_user(options.user, listeners, log_file)
    for sink in sinks:  # the files belong to the user
        if is_rehearsal:
            sink.rehearse()
        elif predecessor is None:  # else a failure must not end the relay; the sink tries again
            sink.prepare()
    others = len(open_descriptors()) - (0 if predecessor is None else predecessor.connections)
    max_open, max_pipes = descriptor_budget(limit, others, not options.no_splice)
    limits = Limits(*(getattr(options, name) for name in LIMIT_OPTIONS))
    if options.max_connections is None:
        limits = limits._replace(max_connections=min(limit * 4 // 5, max(1, max_open * 9 // 10)))
    server = Server(
        listeners,
        Recorder(sinks, options.blur_usage),
        limits,
        max_pipes=max_pipes,
        max_open=max_open,
        quota=quota,
        addresses=addresses,
        drain_seconds=options.drain,
        make_rendezvous=make_rendezvous,
    )
    if has_status:
        make_pages = import_part("--status", "transit_relay_status", "StatusPages")
        pages = make_pages(server, __version__, limit, open_descriptors)
        server.answer_status, server.history = pages.answer, pages.history
        server.timers.every(pages.history.HOUR_SAMPLE_SECONDS, pages.sample)
    return Relay(listeners, gone, server, remark)


def announce(options: argparse.Namespace, relay: Relay, is_reload: bool = False) -> None:
    """Log how the relay runs. The texts about blurring are those of the Twisted relay."""
    if options.forward is not None:  # it has no records
        log.info("a gateway: clients find their partners at %s", options.forward.text)
    elif options.blur_usage:
        log.info("blurring access times to %d seconds", options.blur_usage)
    else:
        log.info("not blurring access times")
    if relay.remark:
        log.info(relay.remark)
    if os.geteuid() == 0 and not options.user:
        log.info("running as root; consider --user NAME")
    if ws_frames is None:
        log.info("no WebSocket clients: Python finds no ws_frames.py (beside transit_relay.py)")
    suffixes = {Role.WEBSOCKET: " (websocket)", Role.STATUS: " (status)"}
    labels = [one.label + suffixes.get(one.endpoint.role, "") for one in relay.listeners]
    direct = [one for one in relay.listeners if one.port and not one.endpoint.has_proxy_header]
    tcp, web = ([one.port for one in direct if one.endpoint.role is role] for role in RELAY_ROLES)
    urls = [f"ws://localhost:{port}/" for port in dict.fromkeys(web)]  # addresses share a port
    if urls or options.websocket_url:
        log.info("WebSocket clients connect to %s", options.websocket_url or ", ".join(urls))
    if tcp and os.isatty(2) and not (is_reload or options.logfile or options.log_fd == 2):
        log.info("to use it: wormhole --transit-helper=tcp:HOST:%d send FILE", tcp[0])
        log.info("(the same command with --print-hints=HOST prints more)")
    verb = "reloaded, listening" if is_reload else "starting"
    log.info("Transit %s on %s", verb, ", ".join(labels))


def check(options: argparse.Namespace) -> None:
    """Check what a start needs, but listen nowhere and change no file. Raises StartupError."""
    paths = {"pidfile": options.pidfile, "logfile": options.logfile}
    files = {f"{name} {path}": path for name, path in paths.items() if path}
    # The sockets of `systemd:` and `fd:`, and `--log-fd`, are open in a running relay only.
    endpoints = choose_endpoints(options, PassedSockets())
    for endpoint in endpoints:
        with startup_errors(endpoint.text):
            resolve(endpoint, ipv6_only=False)
        if endpoint.path:
            require_socket(endpoint)
            files[endpoint.text] = endpoint.path
    for subject, path in files.items():
        with startup_errors(subject):
            os.stat(os.path.join(os.path.dirname(path), "."))
    if options.forward is not None:
        options.forward.require_other(options.forward.resolve(), endpoints, ())
    if options.user:
        find_user(options.user)
    if options.usage_db:
        UsageDatabase(options.usage_db).prepare(dry_run=True)


def rehearse(
    options: argparse.Namespace, predecessor: Predecessor, state: Iterator[dict[str, Any]]
) -> str:
    """Try what a reload to these options needs. Return what follows REHEARSED.

    New TCP endpoints are open, and a new log file exists, for a moment. Raises StartupError.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(REHEARSAL_SECONDS)  # the relay may be killed meanwhile
    predecessor.require_compatible(options)
    with contextlib.ExitStack() as undo:
        passed = Environment.take().passed_sockets(predecessor.pid)
        log_fd = predecessor.take_file("log_fd", options.log_fd)
        if log_fd is None and options.log_fd is not None:  # the number could be that of a client
            raise StartupError(f"--log-fd={options.log_fd} cannot be added by a reload")
        if options.logfile and predecessor.take_file("logfile", options.logfile) is None:
            with startup_errors(f"logfile {options.logfile}"):
                log_file = LogFile(options.logfile)
                undo.callback(os.close, log_file.fd)
                if log_file.is_new:
                    undo.callback(os.unlink, options.logfile)
        endpoints = choose_endpoints(options, passed)
        relay = open_relay(options, endpoints, passed, None, log_fd, undo, predecessor)
        # One socket stands for those of all clients.
        with understood_state(), socket.socket(socket.AF_UNIX) as stand_in:
            connect = partial(connect_again, relay.server, lambda fd: stand_in)
            resume_server(relay.server, state, connect)
        open_already = {listener["text"] for listener in predecessor.listeners}
        new = sum(one.text not in open_already for one in endpoints) + 1  # a sink opens two files
        targets = getattr(relay.server.rendezvous, "target_addresses", ())
        # An endpoint can have two sockets.
        return json.dumps([2 * new, [*relay.server.recorder.status()], targets])


@contextlib.contextmanager
def tolerated_after(predecessor: Predecessor | None) -> Iterator[None]:
    """After a reload, log a StartupError of the block and go on: there is no way back."""
    try:
        yield
    except StartupError as error:
        if predecessor is None or predecessor.is_rehearsal:
            raise
        log.error("%s; the reload goes on without it", error)


def serve(
    options: argparse.Namespace,
    predecessor: Predecessor | None,
    state: Iterator[dict[str, Any]],
) -> int:
    """Start, serve and stop. Return the exit code. Raises StartupError.

    `predecessor` and `state`: after a reload, see `take_predecessor`.
    """
    with contextlib.ExitStack() as undo:
        environment = Environment.take()
        passed = environment.passed_sockets()
        endpoints = choose_endpoints(options, passed)
        # Before any file is opened, which could get the number of a descriptor that is not open.
        named = {passed.find(endpoint) for endpoint in endpoints}
        unused = {passed.find(endpoint) for endpoint in passed.endpoints()} - named
        files: dict[str, int | None] = dict.fromkeys(("log_fd", "logfile", "pidfile"))
        if predecessor is not None:
            files = {name: predecessor.take_file(name, getattr(options, name)) for name in files}
        log_fd = files["log_fd"]
        if predecessor is None and options.log_fd is not None:
            log_fd = duplicate_log_descriptor(options.log_fd)
        watchdog_seconds = environment.watchdog_seconds()
        manager = ServiceManager(environment.notify_socket, watchdog_seconds)
        undo.callback(manager.close)
        fill_standard_descriptors()
        is_first = predecessor is None
        detach = daemonize({*named, *unused, log_fd}) if options.daemonize and is_first else None
        pidfile = PidFile(options.pidfile, files["pidfile"]) if options.pidfile else None
        if pidfile is not None:
            undo.callback(pidfile.close)
        to_stdout = options.log_fd == 2
        log_file: LogFile | None = None
        with tolerated_after(predecessor):
            log_file = start_logging(options.logfile, to_stdout, files["logfile"])
        if passed.remark:
            log.warning(passed.remark)
        if options.user or environment.notify_socket:
            # For a reload. An upgrade of Python can remove it, and the user may not read it.
            import pickle  # noqa: F401
        relay = open_relay(options, endpoints, passed, log_file, log_fd, undo, predecessor)
        server = relay.server
        manager.add_chores(server)
        if log_file is not None:
            server.signals.actions[signal.SIGUSR1] = log_file.reopen

        def carried_files() -> dict[str, tuple[Any, int]]:
            fds = {"log_fd": log_fd}
            fds["logfile"] = None if log_file is None else log_file.fd
            fds["pidfile"] = None if pidfile is None else pidfile.fd
            return {n: (getattr(options, n), fd) for n, fd in fds.items() if fd is not None}

        variables = environment.variables(passed.total > 0, watchdog_seconds > 0)
        reload = Reload(options, relay, manager, variables, carried_files)
        if predecessor is not None:
            reload.has_terminal = predecessor.has_terminal
        server.timers.every(STATUS_SECONDS, reload.reap)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup
            server.signals.actions[signal.SIGHUP] = reload.request

        def ready() -> None:
            if unused and is_first:
                log.warning(
                    "sockets passed to us, but named by no endpoint: %d; their connections are"
                    " never accepted: name them (--port=systemd:index=N), or do not pass them",
                    len(unused),
                )
            announce(options, relay, is_reload=not is_first)
            manager.ready()
            if detach is not None:
                detach()

        def stopping() -> None:
            reload.stop()
            manager.stopping(server.snapshot())

        if predecessor is not None:
            gc.disable()
            with understood_state():
                resume_server(server, state, partial(connect_again, server, adopt_socket))
            gc.enable()
            predecessor.restore_process(server, options)
        server.start()
        server.accept_rest(relay.gone)
        with tolerated_after(predecessor):
            server.recorder.start()
        return run(server, ready, stopping)


def run(server: Server, ready: Callable[[], None], stopping: Callable[[], None]) -> int:
    """Serve until the end of a stop. Return the exit code."""
    failed = False
    for step in (partial(server.run, ready, stopping), server.close):
        try:
            step()
        except Exception:
            log.exception("unexpected fault; please report it")
            failed = True
    if failed:  # write the queued records nevertheless
        server.recorder.stop()
        server.recorder.join(STOP_RECORD_SECONDS)
    for number in server.signals.actions:  # the exit code is certain now
        signal.signal(number, signal.SIG_IGN)
    lost = server.recorder.lost()
    if lost:
        log.error("stopped; usage records lost: %d", lost)
    else:
        log.info("stopped")
    return 1 if lost or failed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Return the exit code."""
    stream, predecessor = sys.stderr, None
    try:
        predecessor, state = take_predecessor()
        options = parse_arguments(arguments, predecessor.configs if predecessor is not None else {})
        if options.check and predecessor is not None:
            print(REHEARSED, rehearse(options, predecessor, state), flush=True)
            os._exit(0)  # with -X dev, Python would report the relay's sockets as not closed
        if options.check:
            check(options)
            print("check ok", flush=True)
            return 0
        if options.print_hints:
            chosen = choose_endpoints(options, PassedSockets())
            print_text(format_hints(options.print_hints, chosen, options.websocket_url), sys.stdout)
            return 0
        stream = sys.stdout if options.log_fd == 2 else sys.stderr
        return serve(options, predecessor, state)
    except (StartupError, OSError) as error:  # OSError: the loop cannot be set up
        if log.handlers and predecessor is not None:  # after a reload, stderr can be /dev/null
            log.error("the reload failed: %s", error)
        print_error(str(error), stream)
    except KeyboardInterrupt:  # before the server handles signals
        pass
    return 1


if __name__ == "__main__":
    sys.exit(main())
