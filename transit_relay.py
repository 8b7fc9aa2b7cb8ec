#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""transit-relay: the relay server of Magic Wormhole, standard library only.

Two clients that cannot reach each other connect to this relay and present the same token.
From then on it passes bytes between them until one leaves. It notes how much it is used and
knows nothing else about anybody.

This one file is a whole relay for TCP. With ws_frames.py beside it, which knows how WebSocket
spells things and nothing else, it takes WebSocket clients too, on every port.

The file reads from top to bottom; a section uses only sections above it. (The Server is given
its listeners and its recorder, which are made further down; it only calls them.)

    Constants, errors    the numbers, each with its reason; who is to blame
    Records              what is noted of a connection or a pair when it is over
    Kernel               what only it can tell or do: acknowledgements, pipes for bulk
    Session              decides: one client's rules, and who meets whom (no sockets)
    Framing              spells: what a client says, as plain bytes or as WebSocket messages
    Connection           moves bytes: one socket, what it still has to send, how it ends
    Time                 who has waited for how long, and what for; what is done now and then
    Server               waits: one select, one dispatch, deferred closing
    Recorder             takes records out of the loop: one queue and thread per sink
    Sinks                JSON lines, and the usage database
    Looking in           what people are told of a relay that runs
    Endpoints            `tcp:4001`, `unix:/run/x.sock`, ... and how each is opened
    Daemon               pidfile, log file, user, background, systemd
    Command line         options, and the file in which they may stand
    Start and stop       in which order

The walk of one byte: `Server.run_once` learns that client A is readable and calls
`Connection.on_ready`, which receives into the one buffer that all connections share, and hands
what came to its Framing. The Framing takes WebSocket's spelling off, if that is A's, and past
the handshake line hands it on to the Session; the Session is State.RELAYING, counts it and gives it
to its partner's Connection, which has its own Framing encode it for B and sends it at once.
What B's kernel does not take is copied to B's backlog; as long as B has one, A is not read.
So a pair holds little more than one buffer's worth of bytes in each direction. In a pair that
spells plainly the way is shorter: A's Connection gives the byte straight to B's and only tells the
Session how many there were. What comes in bulk does not even enter Python: it goes through a pipe.

The end of a client: its read gives nothing (or a WebSocket Close), its Session ends the pair,
both Connections finish (send what is queued, then the end, then wait for the other side's), are
doomed, and are closed by `Server._reap` at the end of the turn: nothing is ever closed while
somebody is using it.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import errno
import fcntl
import grp
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
import sqlite3
import stat
import struct
import sys
import termios
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE
from typing import NamedTuple, NoReturn, Protocol, TextIO, Union

try:
    import ws_frames
except ModuleNotFoundError as error:  # copied without it: all is TCP
    if error.name != "ws_frames":
        raise
    ws_frames = None  # type: ignore[assignment]

__version__ = "0.1"

PROGRAM = "transit-relay"
log = logging.getLogger(PROGRAM)


# ---------------------------------------------------------------------------------------------
# Constants and errors
#
# Two blocks: what the protocol or the operating system fixes, and what we chose, with the
# reason. What an operator can set is in `Limits`; its defaults are what `--help` prints.
# ---------------------------------------------------------------------------------------------

# The protocol: magic-wormhole-protocols, transit.md, and the reference relay where it is silent.
HANDSHAKE = re.compile(rb"please relay ([A-Za-z0-9_]{64})(?: for side ([A-Za-z0-9_]{16}))?")
OK = b"ok\n"
BAD_HANDSHAKE = b"bad handshake\n"
IMPATIENT = b"impatient\n"
MAX_LINE_BYTES = 1024  # the longest handshake has 104; the reference relay's MAX_LENGTH

# What the first bytes of a client tell of its spelling, and what we answer to whoever comes by
# HTTP and does not want a WebSocket: most likely a health check.
RAW_BEGINNING = b"please relay "
HTTP_BEGINNINGS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ")
HTTP_TEXT = """\
This is transit-relay, where Magic Wormhole clients meet that cannot reach each other.
There is nothing to see here: they connect to it over TCP or WebSocket.
"""

# The operating system: 0, 1 and 2; Linux's pipes; and what accept(2) says of a newcomer that was
# lost on the way, while the listener is well.
STANDARD_FDS = 3
F_SETPIPE_SZ, F_GETPIPE_SZ = 1031, 1032  # fcntl.h; Python has names for them from 3.10 on,
SPLICE_F_NONBLOCK = 2  # fcntl.h; and so for this
PIPE_USER_PAGES = 16384  # what pipe-user-pages-soft is by default, pipe(7)
NEWCOMER_LOST = {
    errno.ECONNABORTED,
    errno.ECONNRESET,
    errno.EHOSTDOWN,
    errno.EHOSTUNREACH,
    errno.ENETDOWN,
    errno.ENETUNREACH,
    errno.ENOPROTOOPT,
    errno.EOPNOTSUPP,
    errno.EPROTO,
}

# What we chose.
READ_BYTES = 256 * 1024  # one move; so a direction never has much more than this queued
FRAMED_READ_BYTES = 64 * 1024  # the same from a WebSocket; 30 ms if it is all empty frames, so:
FRAMES_PER_MOVE = 1_000  # the size of the next read aims at no more than this: 3 ms
FIRST_READ_BYTES = 4 * 1024  # until a read has shown how long a client's frames are
MAX_MESSAGE_BYTES = 32 * 1024  # to a WebSocket: a client library in Go refuses larger ones
PONG_BACKLOG_BYTES = 64 * 1024  # who leaves more than this unread gets the newest Pong only
# What one read gave, as plain bytes or in messages; what is said before and behind it; Pongs.
MAX_BACKLOG_BYTES = READ_BYTES + 1024 + PONG_BACKLOG_BYTES + FRAMED_READ_BYTES
BULK_BYTES = 64 * 1024  # who gave as much in one read is spliced the next time; less is copied
PIPE_BYTES = 1024 * 1024  # the most that anybody may have; at a quarter of it we might as well copy
MOST_PIPES = 32  # half of what a user has by default
IDLE_PIPES = 8  # kept for the next moves
PIPES_PAUSE_SECONDS = 60  # no pipe is asked for so long after the system gave none, or a poor one
PING_SECONDS = 25  # a WebSocket as silent as that is pinged: proxies give up after 30 or 60
SILENCE_SECONDS = 75  # three Pings without a sign of life: nobody waits there any more
ACCEPTS_PER_WAKEUP = 64  # a flood of newcomers must not starve the pairs
ACCEPT_RETRY_SECONDS = 1  # after EMFILE and its kin; asyncio's ACCEPT_RETRY_DELAY
LISTEN_BACKLOG = 1024  # newcomers that the kernel queues for us; it cuts this to somaxconn
MAX_OPEN_FILES = 1024 * 1024  # a hard limit may be a thousand times that; a relay needs no more
LINGER_SECONDS = 5  # from the last acknowledgement to our close: time for the other side's end
LINGER_BLIND_SECONDS = 60  # the same where the system cannot tell what is acknowledged
LINGER_POLL_SECONDS = 1  # how often a held connection is asked for its acknowledgements
FOLDER_LOCK_SECONDS = 5  # a start waits this long for another one in a unix socket's folder
CURRENT_SECONDS = 30  # `current` must be committed and at most 60 s old
STATUS_SECONDS = 10  # how often systemd is told how things stand
MAX_CONFIG_CHARACTERS = 1024 * 1024  # more is no configuration
MAX_COMPLAINT_CHARACTERS = 1000  # it may repeat what is wrong
COMPLAINT_SECONDS = 60  # what goes on being wrong is said this often
QUEUED_RECORDS = 100_000  # per sink: about 30 MB
BATCH_RECORDS = 5_000  # written in one transaction
GATHER_SECONDS = 0.5  # one fsync for all records of this time; a kill loses no more
RETRY_SECONDS = 1  # a sink that failed is tried again this often
STALL_SECONDS = 0.5  # no sink waits longer than this for a lock or a reader at one go
STOP_FLUSH_SECONDS = 2  # a stop gives queued bytes this long
STOP_RECORD_SECONDS = 10  # ... and then the sinks this long
STOP_POLL_SECONDS = 0.05  # how often a stop looks whether all is done


class Limits(NamedTuple):
    """What an operator can set. 0 switches a limit off."""

    handshake_seconds: float = 60  # from accept to a whole handshake


class UsageError(argparse.ArgumentTypeError):
    """The command line is wrong: one line on stderr, exit code 2."""


class StartupError(Exception):
    """The command line is right, but the system refuses: one line on stderr, exit code 1."""


class SinkError(Exception):
    """Records cannot be written at the moment: they wait, and it is tried again."""


class SinkGone(Exception):
    """Nobody will ever read what this sink writes: it is given up."""


def error_text(error: OSError) -> str:
    """What the system said, without the file names that an OSError may carry."""
    return error.strerror or str(error)


class Throttle:
    """Lets a complaint through, and then for a minute no other."""

    def __init__(self) -> None:
        self._next_at = float("-inf")

    def is_due(self, now: float) -> bool:
        """Whether it is time (monotonic seconds) to say it; if so, it is taken as said."""
        if now < self._next_at:
            return False
        self._next_at = now + COMPLAINT_SECONDS
        return True


# ---------------------------------------------------------------------------------------------
# Records
#
# What is noted when a connection without a partner, or a pair, is over, and the numbers of the
# moment. A record never holds an address, a token or a side (README, Records and privacy).
# ---------------------------------------------------------------------------------------------


class UsageRecord(NamedTuple):
    """One life: of a connection that never got a partner, or of a pair.

    The field names and their order are those of the JSON lines; `mood` is `result` in SQL.
    """

    started: float  # seconds since the epoch, at the (first) accept
    total_time: float  # seconds
    waiting_time: float | None  # seconds between the two accepts; None without a partner
    total_bytes: int  # received from both sides behind their handshakes
    mood: str

    def blurred(self, seconds: int) -> UsageRecord:
        """The same, as `--blur-usage=SECONDS` lets it be told."""
        return self._replace(
            started=float(self.started // seconds * seconds),
            total_bytes=blur_size(self.total_bytes),
        )


class Current(NamedTuple):
    """The one row of `current`: how things stand now (never blurred)."""

    rebooted: int  # seconds since the epoch
    updated: int  # seconds since the epoch
    connected: int  # connections that have a partner, two per pair
    waiting: int  # tokens that wait for a partner
    incomplete_bytes: int  # of pairs that still run


class Snapshot(NamedTuple):
    """How things stand now, for people: all that is told of a relay that runs."""

    pairs: int  # running, or not yet recorded
    waiting: int  # clients without a partner yet
    connections: int  # open ones, whatever for
    pairs_ended: int  # since the start
    relayed_bytes: int  # since the start, by pairs that run too


def blur_size(size: int) -> int:
    """Round `size` (bytes) down to the coarseness of its magnitude."""
    if size < 1_000_000:
        return size // 1_000 * 1_000
    if size < 1_000_000_000:
        return size // 1_000_000 * 1_000_000
    return size // 100_000_000 * 100_000_000


# ---------------------------------------------------------------------------------------------
# Kernel
#
# What we ask of it beyond the calls that every program makes: how far a connection has come, and
# pipes for bulk, which need not enter Python then: splice(2) moves it from a socket into a pipe,
# and from there into another socket.
#
# Pipes are lent, not owned: taken for one move, given back when they are empty. What a receiver
# does not take stays in the pipe, which is that receiver's backlog then; and what nobody will
# ever take is closed with its pipe, lest bytes of one pair reach another. And they are scarce:
# all processes of an unprivileged user share pipe-user-pages-soft (pipe(7)), past which the
# kernel makes pipes of two pages. Through anything much smaller than a large pipe bulk is no
# cheaper than copied; so then, and where the pool has no more to lend, it is copied.
# ---------------------------------------------------------------------------------------------


def prepare(sock: socket.socket) -> None:
    """Make an accepted socket what we want of it.

    It could inherit most of this from the listening one; but who was queued there before we
    got it, as in a start by systemd, would not.
    """
    sock.setblocking(False)
    # Keepalive: as the reference. Oobinline: urgent bytes are bytes too, and stay in their place.
    # Nodelay: whoever waits for a few bytes must not wait for more; a unix socket refuses it.
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    except OSError:
        pass


def takes_bytes(fd: int, seconds: float) -> bool:
    """Whether a write to `fd` of at most PIPE_BUF bytes will not block; may wait for that."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


def ask_kernel(fd: int, question: int) -> int | None:
    """Give the number by which the kernel answers an ioctl(2); None where it knows no answer."""
    try:
        answer = fcntl.ioctl(fd, question, b"\0\0\0\0")
    except OSError:
        return None
    return int(struct.unpack("i", answer)[0])


def unacknowledged_bytes(sock: socket.socket) -> int | None:
    """How much of what we sent (our end counts as one) the other kernel has not acknowledged.

    None where the system cannot tell. On Linux: tcp(7) and unix(7), SIOCOUTQ, which is the
    number of TIOCOUTQ; on a unix socket it is what the other end has not read.
    """
    return ask_kernel(sock.fileno(), termios.TIOCOUTQ)


def unread_bytes(sock: socket.socket) -> int:
    """How much has reached our kernel and was not yet read: tcp(7), SIOCINQ."""
    return ask_kernel(sock.fileno(), termios.FIONREAD) or 0


# Linux, from Python 3.10 on.
splice: Callable[..., int] | None = getattr(os, "splice", None)


class Pipe:
    """A pipe, and how many bytes are in it: all of one direction of one pair."""

    __slots__ = ("_filled", "_read_fd", "_write_fd", "is_large")

    def __init__(self) -> None:
        """Raises OSError."""
        self._read_fd, self._write_fd = os.pipe()
        self._filled = 0
        try:
            self.is_large = fcntl.fcntl(self._write_fd, F_SETPIPE_SZ, PIPE_BYTES) >= PIPE_BYTES
        except OSError:  # our user has too much in pipes already
            self.is_large = False

    def __len__(self) -> int:
        return self._filled

    def fill(self, sock: socket.socket) -> None:
        """Take in what `sock` has, or as much of it as there is room for. Raises OSError.

        Only while the pipe is empty: "no room" and "nothing there" are one answer, EAGAIN.
        """
        assert splice is not None and not self._filled
        self._filled = splice(
            sock.fileno(), self._write_fd, PIPE_BYTES, None, None, SPLICE_F_NONBLOCK
        )

    def pour(self, sock: socket.socket) -> None:
        """Let `sock` have as much as it takes. Raises OSError."""
        assert splice is not None
        self._filled -= splice(
            self._read_fd, sock.fileno(), self._filled, None, None, SPLICE_F_NONBLOCK
        )

    def close(self) -> None:
        """Throw it away, and all that is in it."""
        os.close(self._read_fd)
        os.close(self._write_fd)

    def check_invariants(self) -> None:
        """Raise AssertionError if the kernel counts differently. For the tests."""
        assert ask_kernel(self._read_fd, termios.FIONREAD) == self._filled <= PIPE_BYTES


class PipePool:
    """All pipes there are: those that are lent, and some idle ones."""

    def __init__(self, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`most`: how many pipes there may be. `clock` gives monotonic seconds."""
        self._most = most
        self._clock = clock
        self._lent = 0
        self._idle: list[Pipe] = []
        self._pause_until = float("-inf")

    def lend(self) -> Pipe | None:
        """Give an empty pipe, or None if none is to be had."""
        pipe = self._idle.pop() if self._idle else self._make()
        self._lent += pipe is not None
        return pipe

    def _make(self) -> Pipe | None:
        """Ask the system for one. If it gives none, or a poor one, it is not asked for a while."""
        if self._lent >= self._most or self._clock() < self._pause_until:
            return None
        try:
            pipe = Pipe()
            if pipe.is_large:
                return pipe
            pipe.close()
        except OSError:  # no descriptors
            pass
        self._pause_until = self._clock() + PIPES_PAUSE_SECONDS
        return None

    def give_back(self, pipe: Pipe) -> None:
        """Keep a pipe that was lent, if it is empty and there are not yet enough of them."""
        self._lent -= 1
        if len(pipe) or len(self._idle) >= IDLE_PIPES:
            pipe.close()
        else:
            self._idle.append(pipe)

    def close(self) -> None:
        """Close those that are idle."""
        while self._idle:
            self._idle.pop().close()

    def check_invariants(self, lent: Sequence[Pipe]) -> None:
        """Raise AssertionError if others are out, or bytes of a pair are in. For the tests."""
        assert len({*lent, *self._idle}) == self._lent + len(self._idle), "lent twice, or lost"
        assert self._lent <= self._most and len(self._idle) <= IDLE_PIPES
        assert all(map(len, lent)) and not any(map(len, self._idle))
        for pipe in (*lent, *self._idle):
            pipe.check_invariants()


def affordable_pipes() -> int:
    """How many pipes we may have: half of what a user may; none where there is no splice."""
    if splice is None:
        return 0
    pages = PIPE_USER_PAGES
    with contextlib.suppress(OSError):  # a sandbox may hide it
        with open("/proc/sys/fs/pipe-user-pages-soft", "rb") as file:
            pages = int(file.read())
    half = pages * resource.getpagesize() // 2 // PIPE_BYTES
    return min(half, MOST_PIPES) if pages else MOST_PIPES  # 0: no limit


# ---------------------------------------------------------------------------------------------
# Session and Rendezvous
#
# The rules, and nothing else: no sockets, no bytes kept, no clock of its own. A Session is one
# client's life; the Rendezvous is where all of them meet. A Session tells its Transport (in the
# relay: its Connection) what to do and is told by it what happened.
#
# Only `_enter` sets a state, and only `_end` ends a life: whoever wants to know why a client
# was sent away reads that one method's callers.
# ---------------------------------------------------------------------------------------------


class State(enum.Enum):
    """Where a client is in its life. See the table in Session."""

    WAIT_UPGRADE = "wait_upgrade"
    WAIT_HANDSHAKE = "wait_handshake"
    WAIT_PARTNER = "wait_partner"
    RELAYING = "relaying"
    DONE = "done"


HANDSHAKING = (State.WAIT_UPGRADE, State.WAIT_HANDSHAKE)


class Role(enum.Enum):
    """What a listener is for."""

    PORT = "port"  # --port: a client sends a handshake, unless its first bytes are HTTP
    WEBSOCKET = "websocket"  # --websocket: a client sends HTTP, unless it begins with a handshake


class Reason(enum.Enum):
    """Why a client's connection ends, for an encoding that can tell the client."""

    ENDED = "ended"
    STOPPING = "stopping"


Bytes = Union[bytes, memoryview]


class Transport(Protocol):
    """What a Session may ask of the connection it decides for."""

    def send(self, data: Bytes) -> None:
        """Send `data`, now or when there is room. `data` is the caller's again on return."""

    def link(self, partner: Transport) -> None:
        """What comes from here goes there from now on: read no faster than it takes it."""

    def finish(self, why: Reason) -> None:
        """Send what is queued, then the end; throw away what still comes. The last order."""

    framing: Framing  # the Framing puts the next one here

    def write(self, data: Bytes, *more: Bytes) -> None:
        """Send what is spelled already, now or when there is room."""

    def queued_bytes(self) -> int:
        """How much the client has left with us."""

    def note_activity(self, heard: bool) -> None:
        """Something of a WebSocket moved, so its silence begins anew. `heard`: it came to us."""


class Handshake(NamedTuple):
    """What a client's first line says: which token, and on which side of it."""

    token: bytes
    side: bytes | None

    def matches(self, other: Handshake) -> bool:
        """Whether two clients of one token are each other's partner: not if on the same side."""
        return self.side != other.side or self.side is None


def parse_handshake(line: bytes) -> Handshake | None:
    """Read a first line (without its newline). None: it is no handshake."""
    match = HANDSHAKE.fullmatch(line)
    return Handshake(match[1], match[2]) if match else None


class Session:
    r"""One client's rules, from accept to the record of its life.

    This table is executed by tests/test_session.py, row by row; what it does not list is
    either nothing (in `done`, where late events are normal) or a mistake of ours.

    state           input      next            mood       reply
    --------------  ---------  --------------  ---------  ----------------
    wait_upgrade    opened     wait_handshake  -          -
    wait_upgrade    end        done            -          -
    wait_handshake  http       wait_upgrade    -          -
    wait_handshake  handshake  wait_partner    -          -
    wait_handshake  junk       done            errory     bad handshake\n
    wait_handshake  end        done            empty      -
    wait_partner    matched    relaying        -          ok\n
    wait_partner    bytes      done            impatient  impatient\n
    wait_partner    displaced  done            redundant  -
    wait_partner    end        done            lonely     -
    relaying        bytes      relaying        -          -
    relaying        end        done            happy      -
    relaying        left       done            -          -

    Who comes by HTTP has no stream of bytes, and no record, before the upgrade to WebSocket.
    The mood of a pair is recorded once, when the side that stayed (its input is `left`) has
    all of the other's bytes and the end: see `end_sent`.
    """

    __slots__ = (
        "accepted",
        "handshake",
        "partner",
        "transport",
        "received_bytes",
        "rendezvous",
        "started",
        "state",
    )

    def __init__(
        self, transport: Transport, rendezvous: Rendezvous, started: float, role: Role = Role.PORT
    ) -> None:
        """A client was accepted just now; `started` is the time of day (s since the epoch).

        `role`: at a listener where clients are expected to come by HTTP (see Endpoint).
        """
        self.transport = transport
        self.rendezvous = rendezvous
        self.state = State.WAIT_UPGRADE if role is Role.WEBSOCKET else State.WAIT_HANDSHAKE
        self.accepted = rendezvous.clock()
        self.started = started
        self.handshake: Handshake | None = None  # State.WAIT_PARTNER: by which it is found
        # State.RELAYING: the other side. State.DONE: still set only on the side that stayed, and only
        # until the pair's record is written. Whoever waits has none.
        self.partner: Session | None = None
        self.received_bytes = 0  # behind the handshake, before the pair ended

    def __repr__(self) -> str:
        return f"<Session {self.state.value} received_bytes={self.received_bytes}>"

    def matches(self, other: Session) -> bool:
        """Whether the two, who have named the same token, can be a pair."""
        assert self.handshake is not None and other.handshake is not None
        return self.handshake.matches(other.handshake)

    # What happened, as the Framing, the Connection and the Rendezvous tell it.

    def http_begun(self) -> None:
        """The client speaks HTTP: its stream of bytes begins behind the upgrade, if at all."""
        assert self.state is State.WAIT_HANDSHAKE, self
        self._enter(State.WAIT_UPGRADE)

    def opened(self) -> None:
        """The stream of bytes begins: the upgrade is done, or there is no need of one."""
        assert self.state is State.WAIT_UPGRADE, self
        self._enter(State.WAIT_HANDSHAKE)

    def line_received(self, line: bytes) -> None:
        """The first line is whole (given without its newline), or too long to be one."""
        if self.state is State.DONE:  # too late: its time was over
            return
        assert self.state is State.WAIT_HANDSHAKE, self
        self.handshake = parse_handshake(line)
        if self.handshake is None:
            self._end("errory", BAD_HANDSHAKE)
        else:
            self._enter(State.WAIT_PARTNER)
            self.rendezvous.join(self)

    def bytes_received(self, data: Bytes) -> None:
        """Something came behind the handshake. It is for the partner, if there is one."""
        if self.state is State.RELAYING:
            assert self.partner is not None
            self.received_bytes += len(data)
            self.partner.transport.send(data)
        elif self.state is State.WAIT_PARTNER:
            self._end("impatient", IMPATIENT)
        else:  # whoever was told to go may still be talking: not answered, not counted
            assert self.state is State.DONE, self

    def bytes_passed(self, count: int) -> None:
        """So many bytes go straight to the partner: both sides encode plainly."""
        assert self.state is State.RELAYING, self
        self.received_bytes += count

    def matched(self, partner: Session) -> None:
        """The Rendezvous has found a partner."""
        assert self.state is State.WAIT_PARTNER, self
        self.handshake = None  # token and side have done their work: nobody need know them
        self.partner = partner
        self._enter(State.RELAYING)
        self.transport.link(partner.transport)
        self.transport.send(OK)

    def displaced(self) -> None:
        """A partner took a newer connection of our side."""
        assert self.state is State.WAIT_PARTNER, self
        self._end("redundant")

    def client_ended(self, why: Reason = Reason.ENDED) -> None:
        """This client is over: it left, broke a rule of its spelling, or was answered by HTTP;
        its time is up, or we stop.

        Half-close is not supported, as in the reference: the end of one direction is the end
        of the client.
        """
        if self.state is State.WAIT_UPGRADE:
            self._end(None, why=why)
        elif self.state is State.WAIT_HANDSHAKE:
            self._end("empty", why=why)
        elif self.state is State.WAIT_PARTNER:
            self._end("lonely", why=why)
        elif self.state is State.RELAYING:
            self._end("happy", why=why)

    def partner_left(self, why: Reason) -> None:
        """The pair is over, and we are the side that stayed."""
        assert self.state is State.RELAYING, self
        self._enter(State.DONE)
        self.transport.finish(why)

    def end_sent(self) -> None:
        """The last byte and the end are with this client's kernel, or it is gone for good.

        For the side that stayed this is the moment at which the pair is over.
        """
        if self.state is State.DONE and self.partner is not None:
            partner, self.partner = self.partner, None
            self.rendezvous.pair_ended(self, partner)

    def connection_lost(self) -> None:
        """The socket is closed: both directions are over, whatever was still to come."""
        self.client_ended()
        self.end_sent()

    # How it ends.

    def _end(self, mood: str | None, reply: bytes = b"", why: Reason = Reason.ENDED) -> None:
        """The one way out: take leave of all others, answer, finish."""
        partner, self.partner = self.partner, None
        if self.state is State.WAIT_PARTNER:
            self.rendezvous.forget(self)
        self._enter(State.DONE)
        if partner is not None:
            assert mood == "happy"  # said by the pair's record, when it is written
            partner.partner_left(why)
        elif mood is not None:
            self.rendezvous.record_single(self, mood)
        if reply:
            self.transport.send(reply)
        self.transport.finish(why)

    def _enter(self, state: State) -> None:
        """The only place where a state changes."""
        self.state = state


class Rendezvous:
    """Who waits under which token, and which pairs are running.

    All that wait under one token are on the same side, or it is a single client without a
    side: any other two would have been matched. So a newcomer matches all of them or none.
    """

    def __init__(
        self, record: Callable[[UsageRecord], None], clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`record` takes each life when it is over; `clock` gives monotonic seconds."""
        self.record = record
        self.clock = clock
        self.waiting: dict[bytes, list[Session]] = {}  # by token; the newest is last
        self.paired: set[Session] = set()  # both sides of each pair, until it is recorded
        self.pairs_ended = 0
        self._ended_bytes = 0

    def join(self, newcomer: Session) -> None:
        """Match the newcomer with the newest of those that it matches, or let it wait.

        The newest, because an older one may be half dead without our knowing; the others of
        its side switch_user redundant now. (In the reference it is an arbitrary one.)
        """
        assert newcomer.handshake is not None
        crowd = self.waiting.get(newcomer.handshake.token)
        if crowd is None:
            self.waiting[newcomer.handshake.token] = [newcomer]
            return
        if not newcomer.matches(crowd[-1]):
            crowd.append(newcomer)
            return
        newest = crowd[-1]
        self.forget(newest)
        self.paired.update((newest, newcomer))
        newest.matched(newcomer)
        newcomer.matched(newest)
        for other in tuple(crowd):
            other.displaced()

    def forget(self, session: Session) -> None:
        """It no longer waits. O(n) in those of the same token and side: few, in real life."""
        assert session.handshake is not None
        crowd = self.waiting.get(session.handshake.token, [])  # a KeyError would name the token
        crowd.remove(session)
        if not crowd:
            del self.waiting[session.handshake.token]

    def record_single(self, session: Session, mood: str) -> None:
        """A life without a partner is over."""
        total_time = self.clock() - session.accepted
        self.record(UsageRecord(session.started, total_time, None, 0, mood))

    def pair_ended(self, one: Session, other: Session) -> None:
        """A pair is over, and all that was to be delivered is."""
        self.paired.discard(one)
        self.paired.discard(other)
        first, second = (one, other) if one.accepted <= other.accepted else (other, one)
        total_bytes = first.received_bytes + second.received_bytes
        self.pairs_ended += 1
        self._ended_bytes += total_bytes
        self.record(
            UsageRecord(
                started=first.started,
                total_time=self.clock() - first.accepted,
                waiting_time=second.accepted - first.accepted,
                total_bytes=total_bytes,
                mood="happy",
            )
        )

    def incomplete_bytes(self) -> int:
        """What the pairs that are not yet recorded have sent so far."""
        return sum(session.received_bytes for session in self.paired)

    def relayed_bytes(self) -> int:
        """What all pairs have sent since the start."""
        return self._ended_bytes + self.incomplete_bytes()

    def check_invariants(self) -> None:
        """Raise AssertionError if what is written above does not hold. For the tests."""
        for token, crowd in self.waiting.items():
            assert crowd, "a token that nobody waits under"
            for session in crowd:
                assert session.state is State.WAIT_PARTNER and session.partner is None, session
                assert session.handshake is not None and session.handshake.token == token
            sides = {session.handshake.side for session in crowd if session.handshake}
            assert len(sides) == 1 and (None not in sides or len(crowd) == 1), "unmatched"
        for session in self.paired:
            if session.state is State.RELAYING:
                assert session.partner is not None and session.partner.partner is session
            else:
                assert session.state is State.DONE, session


# ---------------------------------------------------------------------------------------------
# Framing
#
# How a client spells what a Session understands: one line, then bytes. Over TCP they stand
# there as they are, over WebSocket they are the payload of messages whose borders mean nothing.
# A connection begins as DetectFraming, and a Framing gives way to the next one as soon as it is clear
# who comes; without ws_frames.py, that is at once:
#
#     DetectFraming --+--> RawFraming                          a line, then bytes
#                 +--> HttpFraming --> WebSocketFraming    the same, in messages
#
# Whichever it is gives way to DISCARD when the Session lets the client go.
# A Framing keeps where it is in the stream in named fields, so that a half-read handshake or
# frame can be carried elsewhere. What it has to say by itself (an answer, a Pong, a Close) it
# writes to its Transport, already spelled.
# ---------------------------------------------------------------------------------------------


class Framing:
    """One spelling, and where one client is in it. This one hears nothing and says nothing."""

    __slots__ = ()

    is_raw = True  # the wire has the bytes as they are: past the line they may pass by us
    max_read_bytes = READ_BYTES  # to be received in one move

    def receive(self, data: memoryview) -> None:
        """Tell the Session what `data`, the next bytes of the stream, means."""

    def encode(self, data: Bytes) -> Sequence[Bytes]:
        """Give what `data`, which is sent now, looks like on the wire."""
        return (data,)

    def closing_bytes(self, why: Reason) -> bytes:
        """Give what is sent before the end."""
        return b""

    def drained(self) -> None:
        """All that was queued is with the kernel."""

    def keep_alive(self) -> None:
        """Nothing has moved for PING_SECONDS: do something about it."""


DISCARD = Framing()


class RawFraming(Framing):
    """Plain bytes: finds the handshake line, then is transparent."""

    __slots__ = ("_line", "_past_line", "_session")

    def __init__(self, session: Session) -> None:
        self._session = session
        self._line = b""  # what came of the first line so far
        self._past_line = False

    def receive(self, data: Bytes) -> None:
        """Find the line in `data`, or hand it on.

        The line counts as whole at its newline, and as hopeless at MAX_LINE_BYTES without
        one, however the bytes were split. Bytes behind it, in the same segment, are data.
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
        """A message ends here: that will do in place of a newline behind a whole handshake."""
        if not self._past_line and parse_handshake(self._line):
            self._end_line(self._line)

    def _end_line(self, line: bytes) -> None:
        self._line = b""
        self._past_line = True
        self._session.line_received(line)


class DetectFraming(Framing):
    """The first bytes: they tell whether a client spells plainly or comes by HTTP."""

    __slots__ = ("_session", "_start", "_wire")

    max_read_bytes = FIRST_READ_BYTES

    def __init__(self, session: Session, wire: Transport) -> None:
        self._session = session
        self._wire = wire
        self._start = b""  # what came, as long as it tells nothing

    def receive(self, data: memoryview) -> None:
        """Make way for the right Framing, if `data` decides which one that is."""
        session, wire = self._session, self._wire
        expects_http = session.state is State.WAIT_UPGRADE
        unexpected = (RAW_BEGINNING,) if expects_http else HTTP_BEGINNINGS
        start = self._start + data[: len(RAW_BEGINNING)]
        if start.startswith(unexpected):
            (session.opened if expects_http else session.http_begun)()
        elif any(beginning.startswith(start) for beginning in unexpected):
            self._start = start
            return
        is_http = session.state is State.WAIT_UPGRADE
        wire.framing = HttpFraming(session, wire) if is_http else RawFraming(session)
        if self._start:
            wire.framing.receive(memoryview(self._start))
        wire.framing.receive(data)


class HttpFraming(Framing):
    """A request: for an upgrade to WebSocket, or by somebody who looks whether we live."""

    __slots__ = ("_reader", "_session", "_wire")

    max_read_bytes = FIRST_READ_BYTES  # there may be frames behind the head

    def __init__(self, session: Session, wire: Transport) -> None:
        self._session = session
        self._wire = wire
        self._reader = ws_frames.RequestReader()

    def receive(self, data: memoryview) -> None:
        """When the head is whole, answer it. What came behind it is frames."""
        try:
            read = self._reader.receive(data)
            if read is None:
                return
            request, rest = read
            is_upgrade = request.wants_websocket
            answer = request.accept() if is_upgrade else answer_visitor(request)
        except ws_frames.UpgradeRejected as refusal:
            is_upgrade, answer = False, refusal.answer
        self._wire.write(answer)
        if is_upgrade:
            self._session.opened()
            self._wire.framing = WebSocketFraming(self._session, self._wire)
            self._wire.framing.receive(memoryview(rest))  # or nothing: its silence begins
        else:
            self._session.client_ended()


def answer_visitor(request: ws_frames.Request) -> bytes:
    """Give the answer to a request that wants no WebSocket. Raises UpgradeRejected."""
    if request.method not in ws_frames.METHODS:
        raise ws_frames.not_allowed(request.method)
    return ws_frames.http_answer(200, HTTP_TEXT, method=request.method)


class WebSocketFraming(Framing):
    """A stream of bytes in binary messages, and what a WebSocket says besides."""

    __slots__ = ("_goodbye", "_parser", "_pong", "_session", "_stream", "_wire", "max_read_bytes")

    is_raw = False

    def __init__(self, session: Session, wire: Transport) -> None:
        self._session = session
        self._wire = wire
        self._stream = RawFraming(session)  # what the messages carry
        self._parser = ws_frames.FrameParser(must_be_masked=True)
        self._pong = b""  # the newest, if it has to wait until there is room
        self._goodbye = b""  # the Close that answers what this client did, if it ended things
        self.max_read_bytes = FIRST_READ_BYTES

    def receive(self, data: memoryview) -> None:
        """Take the payload out of the frames in `data`, and answer what is not payload.

        For a pair all payload of one call is handed on at once, however small the frames are,
        and the Pongs that are due go out together. Before that each piece may change what is to
        be made of the next.
        """
        self._wire.note_activity(heard=True)
        payload: list[Bytes] = []
        pongs: list[bytes] = []
        frames = 1  # or one more than there are
        try:
            for event in self._parser.receive(data):
                frames += 1
                if event.opcode == ws_frames.BINARY:
                    payload.append(event.payload)
                    if self._session.state is not State.RELAYING:
                        self._hand_on(payload, pongs)
                        if event.is_last:
                            self._stream.message_ended()
                        if self._session.state is State.DONE:
                            return
                elif event.opcode == ws_frames.PING:
                    pongs.append(ws_frames.build_frame(ws_frames.PONG, event.payload))
                elif event.opcode == ws_frames.CLOSE:  # echo its code: 5.5.1
                    self._goodbye = ws_frames.build_frame(ws_frames.CLOSE, event.payload[:2])
                    break
        except ws_frames.ProtocolError as error:
            self._goodbye = ws_frames.build_close(error.code)
        self._hand_on(payload, pongs)
        # Up to four times as much the next time, if that is no more than FRAMES_PER_MOVE.
        growth = min(4, FRAMES_PER_MOVE // frames)
        self.max_read_bytes = min(max(growth * len(data), FIRST_READ_BYTES), FRAMED_READ_BYTES)
        if self._goodbye:
            self._session.client_ended()

    def _hand_on(self, payload: list[Bytes], pongs: list[bytes]) -> None:
        """Send the Pongs, tell the Session of the payload, and empty both."""
        if pongs and self._wire.queued_bytes() > PONG_BACKLOG_BYTES:
            self._pong = pongs[-1]
        elif pongs:
            self._pong = b""
            self._wire.write(b"".join(pongs))
        data = payload[0] if len(payload) == 1 else b"".join(payload)
        if data:
            self._stream.receive(data)
        payload.clear()
        pongs.clear()

    def encode(self, data: Bytes) -> Sequence[Bytes]:
        """Binary messages, none longer than MAX_MESSAGE_BYTES: a header and a slice for each."""
        self._wire.note_activity(heard=False)
        if len(data) <= MAX_MESSAGE_BYTES:
            return (ws_frames.frame_header(ws_frames.BINARY, len(data)), data)
        parts: list[Bytes] = []
        view = memoryview(data)
        for start in range(0, len(data), MAX_MESSAGE_BYTES):
            piece = view[start : start + MAX_MESSAGE_BYTES]
            parts += (ws_frames.frame_header(ws_frames.BINARY, len(piece)), piece)
        return parts

    def closing_bytes(self, why: Reason) -> bytes:
        """A Close: the one that is due to what the client did, or one that says why we end it."""
        code = ws_frames.GOING_AWAY if why is Reason.STOPPING else ws_frames.NORMAL
        return self._pong + (self._goodbye or ws_frames.build_close(code))

    def drained(self) -> None:
        """There is room for the Pong that had to wait."""
        pong, self._pong = self._pong, b""
        if pong:
            self._wire.write(pong)
        self._wire.note_activity(heard=False)

    def keep_alive(self) -> None:
        """Ping, so that proxies do not take silence for death.

        Not before the handshake, which has its own limit, and not on top of a backlog.
        """
        if self._session.state not in HANDSHAKING and not self._wire.queued_bytes():
            self._wire.write(ws_frames.build_frame(ws_frames.PING))
        self._wire.note_activity(heard=False)


def first_framing(session: Session, wire: Transport) -> Framing:
    """Who comes is DetectFraming, if there is more than one way to come."""
    return RawFraming(session) if ws_frames is None else DetectFraming(session, wire)


# ---------------------------------------------------------------------------------------------
# Connection
#
# One non-blocking socket, what it still has to send (its backlog), and which events it waits
# for. The interest is computed from the backlogs whenever one appears or empties; nobody
# toggles it. So backpressure is one line: a connection is not read while its partner has a
# backlog, and a backlog is never more than what one read gave (and, of a WebSocket, some Pongs).
# What was spliced is queued where it is: in its pipe.
#
# Of the Server it uses the shared buffer, the pipes, the time of day and the Rendezvous, and asks
# it for five things: `watch` (the interest may have changed), `queue_bulk` (there is bulk: others
# first), `hold` (the end is sent, now wait for the other side's), `doom` (close this at the end of
# the turn) and `note_activity` (it is not silent).
#
# Nothing that was received is lost. A failed write is not the end of a client: what it sent
# before it went is still in its socket, and is read to the end. After our end is sent we go on
# reading, because closing a socket that has unread input resets it, and a reset destroys what
# is still under way to the other side.
# ---------------------------------------------------------------------------------------------


class Connection:
    """One client's socket. Follows its Session's orders and tells it what happens."""

    __slots__ = (
        "_broken",
        "_bulk",
        "_end_sent",
        "_finishing",
        "_hold_until",
        "_read_ended",
        "_server",
        "_straight_to",
        "backlog",
        "dead",
        "fd",
        "framing",
        "mask",
        "partner",
        "read_bytes",
        "session",
        "sock",
    )

    def __init__(self, sock: socket.socket, server: Server, role: Role) -> None:
        self.sock = sock
        self.fd = sock.fileno()
        self._server = server
        self.session = Session(self, server.rendezvous, server.wallclock(), role)
        self.framing = first_framing(self.session, self)
        self.read_bytes = 0  # all that was ever read, as it was spelled
        self.partner: Connection | None = None  # while relaying: where our bytes go
        self._straight_to: Connection | None = None  # the same, if both encode plainly
        self.backlog: bytearray | Pipe | None = None  # None: all is with the kernel
        self.mask = 0  # the events registered for us; the Server's
        self.dead = False  # doomed: interested in nothing, whatever this turn's events still say
        self._bulk = False  # the last read gave much: the next one lines up, and may be spliced
        self._broken = False  # a write failed: what is sent there is thrown away
        self._read_ended = False  # the other end's end, or its reset, was read
        self._finishing = False
        self._end_sent = False
        self._hold_until: float | None = None  # None: not yet all acknowledged

    def __repr__(self) -> str:
        """What is going on, without a word about who it is."""
        flags = "".join(
            f" {name}"
            for name in ("broken", "read_ended", "finishing", "end_sent")
            if getattr(self, f"_{name}")
        )
        return (
            f"<Connection fd={self.fd} {'dead' if self.dead else self.session.state.value}"
            f" read={'on' if self.mask & EVENT_READ else 'off'}"
            f" write={'on' if self.mask & EVENT_WRITE else 'off'}"
            f" queued={self.queued_bytes()}{flags}>"
        )

    # The Server's questions.

    def interest(self) -> int:
        """Which events we wait for: room, if something is queued; input, if it can go on."""
        if self.dead:
            return 0
        mask = 0 if self.backlog is None else EVENT_WRITE
        if not self._read_ended and (self.partner is None or self.partner.backlog is None):
            mask |= EVENT_READ
        return mask

    def on_ready(self, mask: int) -> None:
        """One bounded move. `mask` may be out of date: an earlier event may have changed ours."""
        if mask & self.mask & EVENT_WRITE:
            self._drain()
        if mask & self.mask & EVENT_READ:
            if self._bulk:
                self._server.queue_bulk(self)
            else:
                self._receive()

    def on_bulk_turn(self) -> None:
        """The same, for one who has lined up with bulk, and may have changed meanwhile."""
        if self.mask & EVENT_READ:
            self._receive()

    def delivered(self) -> bool:
        """Whether the end, and all before it, is sent and acknowledged, as far as one can know."""
        return self._end_sent and not unacknowledged_bytes(self.sock)

    def hold_is_over(self, now: float) -> bool:
        """Whether a held connection had its time to end by itself; the Server asks each second.

        A slow receiver may need long for what is under way to it: the time begins when we
        first find that its kernel has acknowledged all of it.
        """
        if self._hold_until is None:
            pending = unacknowledged_bytes(self.sock)
            if pending is None:
                self._hold_until = now + LINGER_BLIND_SECONDS
            elif pending == 0:
                self._hold_until = now + LINGER_SECONDS
        return self._hold_until is not None and now >= self._hold_until

    def close(self) -> None:
        """Let go of the socket, and of what it was still to be sent."""
        self._set_backlog(None)
        self.sock.close()

    # The Session's orders (see Transport).

    def send(self, data: Bytes) -> None:
        """Have it spelled, and sent."""
        self.write(*self.framing.encode(data))

    def link(self, partner: Transport) -> None:
        """What comes from here goes to `partner` from now on."""
        assert isinstance(partner, Connection)
        self.partner = partner
        if self.framing.is_raw and partner.framing.is_raw:
            self._straight_to = partner
        self._server.watch(self)

    def finish(self, why: Reason) -> None:
        """Send what is queued, then the end; throw away what still comes; then be closed."""
        self._finishing = True
        self.partner = self._straight_to = None
        goodbye, self.framing = self.framing.closing_bytes(why), DISCARD
        if goodbye and not self.dead:
            self.write(goodbye)
        self._go_on_finishing()
        self._server.watch(self)

    # The Framing's (see Transport).

    def write(self, data: Bytes, *more: Bytes) -> None:
        """Send at once what the kernel takes; only the rest is copied to the backlog."""
        if self._broken:
            return
        if self.backlog is not None:
            assert isinstance(self.backlog, bytearray)  # to whom bulk goes, nothing else does
            for part in (data, *more):
                self.backlog += part
            return
        try:
            sent = self.sock.sendmsg((data, *more)) if more else self.sock.send(data)
        except BlockingIOError:
            sent = 0
        except OSError:
            self._broken = True
            return
        if more or sent < len(data):  # of several it is not worth asking for the sum
            left = unsent((data, *more), sent)
            if left:
                self._set_backlog(left)

    def queued_bytes(self) -> int:
        """How much the client has left with us."""
        return 0 if self.backlog is None else len(self.backlog)

    def note_activity(self, heard: bool) -> None:
        """Something of a WebSocket moved, so its silence begins anew."""
        self._server.note_activity(self, heard)

    # How bytes move.

    def _receive(self) -> None:
        """Read once, into the buffer that everybody shares, or what is bulk into a pipe.

        In a pair that spells plainly there is nothing more to decide or to encode: what comes
        goes straight to the partner. All else is for the Framing.
        """
        partner = self._straight_to
        if self._bulk and partner is not None and self._splice(partner):
            return
        buffer = self._server.buffer
        try:
            count = self.sock.recv_into(buffer, self.framing.max_read_bytes)
        except BlockingIOError:
            return
        except OSError:  # a reset: all that came before it was read by now
            count = 0
        if not count:
            self._read_ended = True
            self.session.client_ended()
            self._go_on_finishing()
            self._server.watch(self)
            return
        self.read_bytes += count
        self._bulk = count >= BULK_BYTES
        if partner is not None:
            self.session.bytes_passed(count)
            partner.write(buffer[:count])
        else:
            self.framing.receive(buffer[:count])

    def _splice(self, partner: Connection) -> bool:
        """Read once into a pipe, and pour that out to the partner. False: it has to be copied.

        That goes for all that splice does not give as bytes: the end, a reset, an urgent byte,
        nothing at all, a refusal. To read tells which it is.
        """
        pipes = self._server.pipes
        pipe = pipes.lend()
        if pipe is None:
            return False
        try:
            pipe.fill(self.sock)
        except OSError:
            pass
        count = len(pipe)
        if not count:
            pipes.give_back(pipe)
            return False
        self.read_bytes += count
        self._bulk = count >= BULK_BYTES
        self.session.bytes_passed(count)
        if partner._empty(pipe):
            pipes.give_back(pipe)
        else:
            partner._set_backlog(pipe)
        return True

    def _drain(self) -> None:
        """Send from the backlog. When it is empty, the partner is read again."""
        assert self.backlog is not None
        if self._empty(self.backlog):
            self._set_backlog(None)
            self.framing.drained()
            if self._finishing:
                self._go_on_finishing()

    def _empty(self, backlog: bytearray | Pipe) -> bool:
        """Send from `backlog` what the kernel takes. Whether the rest is nothing, or in vain."""
        if self._broken:
            return True
        try:
            if isinstance(backlog, Pipe):
                backlog.pour(self.sock)
            else:
                del backlog[: self.sock.send(backlog)]
        except BlockingIOError:
            return False
        except OSError:
            self._broken = True
        return self._broken or not len(backlog)

    def _set_backlog(self, backlog: bytearray | Pipe | None) -> None:
        """A backlog appears or is gone: this changes what we, and our partner, wait for."""
        if isinstance(self.backlog, Pipe):
            self._server.pipes.give_back(self.backlog)
        self.backlog = backlog
        self._server.watch(self)
        if self.partner is not None:
            self._server.watch(self.partner)

    def _go_on_finishing(self) -> None:
        """The one answer to "who closes this socket, and when?".

        Not while something is queued. Then, if the other end's end was read, now; else our
        end is sent, and the connection is held until the other's comes or its time is up.
        (Who is dead already was doomed by a stop, which waits for nobody.)
        """
        assert self._finishing
        if self.dead or self.backlog is not None:
            return
        if self._read_ended:
            self._server.doom(self)
        elif not self._end_sent:
            self._end_sent = True
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:  # a reset: its end is read in a moment
                pass
            self.session.end_sent()
            self._server.hold(self)


def unsent(parts: Sequence[Bytes], sent: int) -> bytearray:
    """Give what is left of `parts` when so many bytes of it are sent."""
    rest = bytearray()
    for part in parts:
        if sent < len(part):
            rest += memoryview(part)[sent:]
        sent = max(0, sent - len(part))
    return rest


# ---------------------------------------------------------------------------------------------
# Time
#
# One queue for each kind. All entries of a kind wait equally long, so the queue is sorted by
# construction, and whoever starts anew goes to its end. A queue says who is due; what that
# means is the Server's to say, who may find that it means nothing any more. Beside the queues
# there are the chores: what is done again and again, for nobody in particular.
# ---------------------------------------------------------------------------------------------


class Timeouts:
    """Connections that all wait equally long for something: sorted by construction."""

    def __init__(self, seconds: float) -> None:
        """`seconds`: 0 switches it off."""
        self._seconds = seconds
        self._due: OrderedDict[Connection, float] = OrderedDict()

    def start(self, conn: Connection, now: float) -> None:
        """`conn` is due `seconds` from now."""
        if self._seconds:
            self._due[conn] = now + self._seconds
            self._due.move_to_end(conn)

    def cancel(self, conn: Connection) -> None:
        """Forget `conn`, if it is in the queue."""
        self._due.pop(conn, None)

    def next_due(self) -> float:
        """When the first one is due; infinity if none is."""
        return next(iter(self._due.values()), float("inf"))

    def take_expired(self, now: float) -> list[Connection]:
        """Take out all that are due."""
        expired = []
        while self.next_due() <= now:
            expired.append(self._due.popitem(last=False)[0])
        return expired

    def waiting(self) -> set[Connection]:
        """All that are in the queue."""
        return set(self._due)


class Chore:
    """What is done every so many seconds, for the first time at once."""

    def __init__(self, seconds: float, work: Callable[[], None]) -> None:
        self.due = float("-inf")  # monotonic seconds
        self._seconds = seconds
        self._work = work

    def do_if_due(self, now: float) -> None:
        """Do it, if it is time."""
        if now >= self.due:
            self.due = now + self._seconds
            self._work()


class Timers:
    """The queues, one for each thing that somebody may wait for too long, and the chores."""

    def __init__(self, limits: Limits) -> None:
        # Nobody is taken out when his handshake is there: to look once, later, is cheaper.
        self.handshaking = Timeouts(limits.handshake_seconds)
        self.holding = Timeouts(LINGER_POLL_SECONDS)
        # WebSockets only: since anything moved, and since a client without partner was heard.
        self.quiet = Timeouts(PING_SECONDS)
        self.unheard = Timeouts(SILENCE_SECONDS)
        self._queues = (self.handshaking, self.holding, self.quiet, self.unheard)
        self.chores: list[Chore] = []

    def next_due(self) -> float:
        """When the first of all is due; infinity if none is."""
        chores_due = min((chore.due for chore in self.chores), default=float("inf"))
        return min(chores_due, *(queue.next_due() for queue in self._queues))

    def forget(self, conn: Connection) -> None:
        """It is gone."""
        for queue in self._queues:
            queue.cancel(conn)

    def check_invariants(self, connections: set[Connection]) -> None:
        """Raise AssertionError if somebody waits who is gone. For the tests."""
        for queue in self._queues:
            assert queue.waiting() <= connections, "a time limit for nobody"


# ---------------------------------------------------------------------------------------------
# Server
#
# One select, one dispatch; each ready object gets one bounded move. Whoever has bulk lines up for
# it, so that a few bytes of one pair need not wait for the megabytes of all others.
#
# Closing is deferred: `doom` marks a connection now, `_reap` closes it at the end of the turn, so
# that no event of the turn meets a closed socket or its reused number. Signal handlers only note
# the signal; Python writes a byte to the wake-up socket, which ends the select.
# ---------------------------------------------------------------------------------------------


class Watcher(NamedTuple):
    """Who is told that a socket is ready, if that is no Connection's."""

    on_ready: Callable[[int], None]


class Server:
    """Waits for all sockets at once, and owns everything that there is only one of."""

    def __init__(
        self,
        listeners: Sequence[Listener],
        recorder: Recorder,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        wallclock: Callable[[], float] = time.time,
        most_pipes: int = 0,
    ) -> None:
        """`clock` and `wallclock` give seconds: monotonic, and since the epoch.

        `most_pipes`: lent to bulk at one time; with 0 all is copied.
        """
        self.clock = clock
        self.wallclock = wallclock
        self.recorder = recorder
        self.rendezvous = Rendezvous(self.recorder.record, clock)
        self.buffer = memoryview(bytearray(READ_BYTES))
        self.pipes = PipePool(most_pipes, clock)
        self.connections: set[Connection] = set()
        self.over = False  # nothing is left to be done
        self._rebooted = int(wallclock())
        self._selector = selectors.DefaultSelector()
        self._doomed: deque[Connection] = deque()
        self._line: OrderedDict[Connection, None] = OrderedDict()  # those who have bulk
        self._timers = Timers(limits)
        self.every(CURRENT_SECONDS, lambda: recorder.update(self.current()))
        self.every(CURRENT_SECONDS, lambda: recorder.report_dropped(clock()))
        self._signals: deque[int] = deque()
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._wakeup, EVENT_READ, Watcher(self._on_wakeup))
        self._listeners = list(listeners)
        self._accepting = False
        self._accept_at = float("inf")
        self._accept_complaints = Throttle()
        self._start_accepting()
        # A stop has two phases, each with its last moment: bytes, then records. How much we have
        # read from a connection, once we have all that had reached us when the stop began.
        self._flush_until: float | None = None
        self._record_until: float | None = None
        self._owing: dict[Connection, int] = {}

    # The loop.

    def run(self, ready: Callable[[], None], stopping: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT, and to the end of the stop that follows.

        `ready` is called when everything is in place, `stopping` when a stop has begun.
        """
        signal.set_wakeup_fd(self._waker.fileno(), warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, _: self._signals.append(number))
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until there is a reload
        try:
            ready()
            while self._flush_until is None:
                self.run_once(self._patience())
            stopping()
            while not self.over:
                self.run_once(self._patience())
        finally:
            signal.set_wakeup_fd(-1)

    def run_once(self, timeout: float | None) -> None:
        """One turn: wait at most `timeout` seconds (None: as long as it takes), then work.

        Whoever has little is served at once. Of those lined up with bulk a quarter is: all would
        keep the others waiting, and much less would cost too many selects.
        """
        for key, mask in self._selector.select(0 if self._line else timeout):
            key.data.on_ready(mask)
        for _ in range((len(self._line) + 3) // 4):
            conn, _ = self._line.popitem(last=False)
            conn.on_bulk_turn()
        while self._signals:
            self._on_signal(self._signals.popleft())
        self._run_timers(self.clock())
        self._reap()

    def close(self) -> None:
        """Let go of everything, at once."""
        self._stop_listening()
        self._close_connections()
        self.pipes.close()
        self._selector.close()
        self._wakeup.close()
        self._waker.close()

    def every(self, seconds: float, work: Callable[[], None]) -> None:
        """Do `work` in the next turn, and then every `seconds`: it must not block."""
        self._timers.chores.append(Chore(seconds, work))

    def snapshot(self) -> Snapshot:
        """How things stand, for people."""
        return Snapshot(
            pairs=len(self.rendezvous.paired) // 2,
            waiting=sum(map(len, self.rendezvous.waiting.values())),
            connections=len(self.connections),
            pairs_ended=self.rendezvous.pairs_ended,
            relayed_bytes=self.rendezvous.relayed_bytes(),
        )

    def current(self) -> Current:
        """How things stand, for the `current` row."""
        return Current(
            rebooted=self._rebooted,
            updated=int(self.wallclock()),
            connected=len(self.rendezvous.paired),
            waiting=len(self.rendezvous.waiting),
            incomplete_bytes=self.rendezvous.incomplete_bytes(),
        )

    def _on_wakeup(self, _mask: int) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wakeup.recv(4096)

    def _run_timers(self, now: float) -> None:
        for conn in self._timers.handshaking.take_expired(now):
            if conn.session.state in HANDSHAKING:
                conn.session.client_ended()
        for conn in self._timers.unheard.take_expired(now):
            if conn.session.state is State.WAIT_PARTNER:
                conn.session.client_ended()
        for conn in self._timers.quiet.take_expired(now):
            conn.framing.keep_alive()
        for conn in self._timers.holding.take_expired(now):
            self.hold(conn)
        if now >= self._accept_at:
            self._start_accepting()
        for chore in self._timers.chores:
            chore.do_if_due(now)
        if self._flush_until is not None:
            self._go_on_stopping(now)

    def _patience(self) -> float:
        """How long the select may wait, in seconds."""
        patience = max(0.0, min(self._timers.next_due(), self._accept_at) - self.clock())
        return patience if self._flush_until is None else min(patience, STOP_POLL_SECONDS)

    # What a Connection asks for.

    def watch(self, conn: Connection) -> None:
        """Wait for what `conn` is interested in. The only place that changes a registration."""
        mask = conn.interest()
        if mask == conn.mask:
            return
        if not mask:  # epoll would go on reporting a hang-up with an empty mask: unregister
            self._selector.unregister(conn.fd)
        elif not conn.mask:
            self._selector.register(conn.fd, mask, conn)
        else:
            self._selector.modify(conn.fd, mask, conn)
        conn.mask = mask

    def queue_bulk(self, conn: Connection) -> None:
        """`conn` has bulk to be read: those who have little, and who came before it, go first."""
        self._line.setdefault(conn)

    def hold(self, conn: Connection) -> None:
        """The end is sent: close `conn` if its peer has had time to take it in, else ask again."""
        now = self.clock()
        if conn.hold_is_over(now):
            self.doom(conn)
        else:
            self._timers.holding.start(conn, now)

    def note_activity(self, conn: Connection, heard: bool) -> None:
        """Something of a WebSocket moved: its times of silence begin anew."""
        now = self.clock()
        self._timers.quiet.start(conn, now)
        if heard and conn.partner is None:
            self._timers.unheard.start(conn, now)

    def doom(self, conn: Connection) -> None:
        """Close `conn` at the end of this turn. Whoever is doomed hears nothing more."""
        if not conn.dead:
            conn.dead = True
            self._doomed.append(conn)
            self.watch(conn)

    def _reap(self) -> None:
        """Close the doomed. To take leave may doom others, so until there are none."""
        if not self._doomed:
            return
        while self._doomed:
            conn = self._doomed.popleft()
            conn.close()
            self.connections.discard(conn)
            self._timers.forget(conn)
            conn.session.connection_lost()
        if self._listeners and not self._accepting:
            self._start_accepting()  # there is room again

    def _close_connections(self) -> None:
        for conn in self.connections:
            self.doom(conn)
        self._reap()

    # Newcomers.

    def admit(self, sock: socket.socket, role: Role = Role.PORT) -> Connection:
        """Take in a newcomer's socket; `role`: from a `--websocket` listener."""
        prepare(sock)
        conn = Connection(sock, self, role)
        self.connections.add(conn)
        self._timers.handshaking.start(conn, self.clock())
        self.watch(conn)
        return conn

    def _accept(self, listener: Listener, _mask: int) -> None:
        """Take in some of the newcomers that wait. The rest is there in the next turn too."""
        for _ in range(ACCEPTS_PER_WAKEUP):
            if not self._accepting:
                return
            try:
                sock, _address = listener.sock.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno not in NEWCOMER_LOST:  # no descriptors, no memory: it will pass
                    self._pause_accepting(error_text(error))
            else:
                self.admit(sock, listener.role)

    def _start_accepting(self) -> None:
        self._accept_at = float("inf")
        self._accepting = True
        for listener in self._listeners:
            watcher = Watcher(partial(self._accept, listener))
            self._selector.register(listener.fd, EVENT_READ, watcher)

    def _pause_accepting(self, why: Reason) -> None:
        """Leave newcomers in the kernel's queue for a second, or until somebody leaves."""
        now = self.clock()
        self._accepting = False
        self._accept_at = now + ACCEPT_RETRY_SECONDS
        for listener in self._listeners:
            self._selector.unregister(listener.fd)
        self.pipes.close()  # newcomers need descriptors more than bulk does
        if self._accept_complaints.is_due(now):
            log.warning("newcomers have to wait: %s", why)

    def _stop_listening(self) -> None:
        for listener in self._listeners:
            if self._accepting:
                self._selector.unregister(listener.fd)
            listener.close()
        self._listeners = []
        self._accepting = False
        self._accept_at = float("inf")

    # The end.

    def stop(self) -> None:
        """Begin to stop: no newcomers; whoever has no partner goes. `over` tells when it is done.

        A pair goes on until what has reached us by now is read, its end perhaps included.
        """
        self._stop_listening()
        self._flush_until = self.clock() + STOP_FLUSH_SECONDS
        for conn in tuple(self.connections):
            session = conn.session
            if session.state is State.RELAYING:
                self._owing[conn] = conn.read_bytes + unread_bytes(conn.sock)
            else:
                session.client_ended(Reason.STOPPING)

    def _end_pairs(self, late: bool) -> None:
        """End the pairs that owe each other nothing more, or all if it is too late for that."""
        # The side that still has to take something is the one that stayed.
        for conn in sorted(self.connections, key=lambda conn: conn.backlog is not None):
            if conn.partner is not None:
                both = (conn, conn.partner)
                if late or all(one.read_bytes >= self._owing[one] for one in both):
                    conn.session.client_ended(Reason.STOPPING)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if self._flush_until is None:
            log.info("%s: stopping", name)
            self.stop()
        else:
            log.info("%s again: ending at once", name)
            self.over = True

    def _go_on_stopping(self, now: float) -> None:
        """First the bytes, then the records; each has its time."""
        assert self._flush_until is not None
        if self._record_until is None:
            late = now >= self._flush_until
            self._end_pairs(late)
            if not late and not all(conn.delivered() for conn in self.connections):
                return
            self._close_connections()
            self.recorder.update(self.current())
            self.recorder.stop()
            self._record_until = now + STOP_RECORD_SECONDS
        if self.recorder.finished or now >= self._record_until:
            self.over = True

    # For the tests.

    def check_invariants(self) -> None:
        """Raise AssertionError if the books do not balance."""
        self.rendezvous.check_invariants()
        others = {self._wakeup.fileno(), *(one.fd for one in self._listeners)}
        entries = self._selector.get_map().items()
        registered = {fd: key.events for fd, key in entries if fd not in others}
        assert registered == {conn.fd: conn.mask for conn in self.connections if conn.mask}
        for conn in self.connections:
            assert conn.mask == conn.interest(), conn
            assert conn.backlog is None or len(conn.backlog) > 0, conn
            assert isinstance(conn.backlog, Pipe) or conn.queued_bytes() <= MAX_BACKLOG_BYTES
            assert (conn.partner is not None) == (conn.session.state is State.RELAYING), conn
            assert conn.partner is None or conn.partner.session is conn.session.partner, conn
        backlogs = [conn.backlog for conn in self.connections]
        self.pipes.check_invariants([one for one in backlogs if isinstance(one, Pipe)])
        self._timers.check_invariants(self.connections)
        waiting = sum(len(crowd) for crowd in self.rendezvous.waiting.values())
        states = [conn.session.state for conn in self.connections]
        assert waiting == states.count(State.WAIT_PARTNER)
        assert self.rendezvous.paired >= {
            conn.session for conn in self.connections if conn.session.state is State.RELAYING
        }


# ---------------------------------------------------------------------------------------------
# Recorder
#
# Records leave the loop through a queue, one for each sink (database, JSON lines), and a thread
# behind it writes them in batches. So neither an fsync nor a locked database nor a reader that
# has stopped reading ever delays a byte. A record stays in its sink until it is written; when
# too many wait, the newcomers are dropped and counted.
#
# Shared between the loop and a sink's thread is only what `_changed` guards.
# ---------------------------------------------------------------------------------------------


class Sink(threading.Thread):
    """One place where records go, the queue before it, and the thread between the two."""

    gather_seconds = 0.0  # how long to collect more before writing

    def __init__(self, label: str, records_limit: int = QUEUED_RECORDS) -> None:
        # A daemon thread: one that hangs in a dead disk must not keep the process alive.
        super().__init__(name=label, daemon=True)
        self._limit = records_limit
        self._changed = threading.Condition()
        self._queue: deque[UsageRecord] = deque()
        self._batch: list[UsageRecord] = []  # taken from the queue, not yet written
        self._current: Current | None = None  # to be written with the next batch
        self._stopping = False
        self._dropped = 0
        self._finished = False
        self._gone = False  # nobody wants more records
        # The thread's own: whether the last write failed, and what was said about it.
        self._failing = False
        self._complained = False
        self._complaints = Throttle()

    # The loop's side.

    def put(self, record: UsageRecord) -> None:
        """Take a record, or count it as dropped. Never blocks."""
        with self._changed:
            if self._gone:
                return
            if self._finished or len(self._queue) + len(self._batch) >= self._limit:
                self._dropped += 1
                return
            self._queue.append(record)
            if len(self._queue) == 1:  # while more are queued, the thread knows
                self._changed.notify()

    def put_current(self, current: Current) -> None:
        """Take the numbers of the moment. Only the last ones count."""
        with self._changed:
            self._current = current
            self._changed.notify()

    def stop(self) -> None:
        """Write what there is, then end."""
        with self._changed:
            self._stopping = True
            self._changed.notify()

    @property
    def finished(self) -> bool:
        """Whether the thread has nothing left to do."""
        with self._changed:
            return self._finished

    @property
    def unwritten(self) -> int:
        """How many records wait."""
        with self._changed:
            return len(self._queue) + len(self._batch)

    @property
    def dropped(self) -> int:
        """How many records there was no room for, since the start."""
        with self._changed:
            return self._dropped

    # The thread's side.

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        """Write records from the front of `batch`, and `current` where there is a place for it.

        Gives how many are written; the next batch begins with the first that is not. Raises
        SinkError (try again later, with the same) or SinkGone (never again).
        """
        raise NotImplementedError

    def close(self) -> None:
        """The last call, after the last write."""

    def run(self) -> None:
        """Gather, write, and again; until told to stop and nothing is left."""
        try:
            try:
                while self._gather():
                    self._write_some()
            finally:
                self.close()
        except SinkGone as error:
            log.warning("%s: %s; no more records go there", self.name, error)
            with self._changed:
                self._gone = True
                self._queue.clear()
                self._batch.clear()
        except Exception:
            log.exception("%s: a mistake of ours; no more records go there", self.name)
        with self._changed:
            self._finished = True

    def _gather(self) -> bool:
        """Wait until there is something to write, and take it. False: nothing ever will be."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if not self._stopping:
                pause = RETRY_SECONDS if self._failing else self.gather_seconds
                self._changed.wait_for(lambda: self._stopping, pause)
            elif self._failing:
                self._changed.wait(STOP_POLL_SECONDS)  # time is short
            while self._queue and len(self._batch) < BATCH_RECORDS:
                self._batch.append(self._queue.popleft())
            return bool(self._batch or self._current)

    def _has_work(self) -> bool:
        return bool(self._queue or self._batch or self._current or self._stopping)

    def _write_some(self) -> None:
        """Write what was gathered, or as much of it as can be written now."""
        with self._changed:
            current = self._current
        try:
            written = self.write(self._batch, current)
        except SinkError as error:
            self._report_failure(str(error))
            return
        with self._changed:
            del self._batch[:written]
            if self._current is current:
                self._current = None
        self._failing = False
        if self._complained:
            self._complained = False
            log.info("%s: works again", self.name)

    def _report_failure(self, what: str) -> None:
        """Say that records wait; at most once a minute, while it is tried each second."""
        self._failing = True
        if self._complaints.is_due(time.monotonic()):
            self._complained = True
            log.warning("%s: %s; %d records wait", self.name, what, self.unwritten)


class Recorder:
    """The loop's side of all sinks."""

    def __init__(self, sinks: Sequence[Sink] = (), blur_seconds: int = 0) -> None:
        """Starts the sinks' threads. `blur_seconds`: 0 tells all as it was.

        Raises StartupError.
        """
        self._sinks = sinks
        self._blur_seconds = blur_seconds
        self._complaints = Throttle()
        self._reported = 0  # how many of the dropped have been spoken of
        try:
            for sink in sinks:
                sink.start()
        except RuntimeError as error:
            raise StartupError(str(error)) from None

    def record(self, record: UsageRecord) -> None:
        """Take a record to all sinks, blurred if that is wanted."""
        if self._blur_seconds:
            record = record.blurred(self._blur_seconds)
        for sink in self._sinks:
            sink.put(record)

    def update(self, current: Current) -> None:
        """Take the numbers of the moment to all sinks."""
        for sink in self._sinks:
            sink.put_current(current)

    def report_dropped(self, now: float) -> None:
        """Say, once a minute, how many records there was no room for."""
        dropped = sum(sink.dropped for sink in self._sinks)
        if dropped > self._reported and self._complaints.is_due(now):
            log.warning("%d usage records dropped: too many wait", dropped - self._reported)
            self._reported = dropped

    def stop(self) -> None:
        """Let the sinks write what they have, then end."""
        for sink in self._sinks:
            sink.stop()

    @property
    def finished(self) -> bool:
        """Whether all sinks have ended."""
        return all(sink.finished for sink in self._sinks)

    def join(self, seconds: float) -> None:
        """Wait for the sinks to end, but no longer than this. For when no loop is left to wait."""
        deadline = time.monotonic() + seconds
        for sink in self._sinks:
            sink.join(max(0.0, deadline - time.monotonic()))

    def lost(self) -> int:
        """How many records are unwritten or were dropped, since the start (each sink counts)."""
        return sum(sink.unwritten + sink.dropped for sink in self._sinks)


# ---------------------------------------------------------------------------------------------
# Sinks
#
# The two places where records go: JSON lines, whose reader may stop reading, and a database
# that somebody may lock, move away, or fill the disk under.
# ---------------------------------------------------------------------------------------------


class JsonLines(Sink):
    """`--log-fd`: one JSON object a line, each written whole or kept."""

    chunk_bytes = select.PIPE_BUF

    def __init__(self, fd: int) -> None:
        """`fd` is open for writing, and ours: it is closed at the end."""
        super().__init__("--log-fd")
        self._fd = fd
        self._chunk = b""  # lines that are not yet written to their last byte ...
        self._chunk_records = 0  # ... and how many

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        """Write one chunk of lines, if the reader takes it within half a second."""
        if not self._chunk:
            self._take_chunk(batch)
        try:
            if self._chunk and takes_bytes(self._fd, STALL_SECONDS):
                self._chunk = self._chunk[os.write(self._fd, self._chunk) :]
        except BlockingIOError:
            pass  # somebody else has made it non-blocking
        except OSError as error:
            hung_up = error.errno == errno.EIO and stat.S_ISCHR(os.fstat(self._fd).st_mode)
            if hung_up or error.errno in (errno.EPIPE, errno.ECONNRESET, errno.ECONNREFUSED):
                raise SinkGone("its reader is gone") from None
            raise SinkError(error_text(error)) from None
        return 0 if self._chunk else self._chunk_records

    def close(self) -> None:
        """Let go of the descriptor."""
        os.close(self._fd)

    def _take_chunk(self, batch: Sequence[UsageRecord]) -> None:
        self._chunk_records = 0
        for record in batch:
            line = (json.dumps(record._asdict()) + "\n").encode()
            if self._chunk and len(self._chunk) + len(line) > self.chunk_bytes:
                break
            self._chunk += line
            self._chunk_records += 1


USAGE_SCHEMA = """
CREATE TABLE `version` (`version` INTEGER);  -- one row: 1
CREATE TABLE `current`                       -- one row: how things stand
(
 `rebooted` INTEGER,                         -- start of the relay, seconds since the epoch
 `updated` INTEGER,                          -- when this row was written, likewise
 `connected` INTEGER,                        -- connections that have a partner
 `waiting` INTEGER,                          -- tokens that wait for a partner
 `incomplete_bytes` INTEGER                  -- bytes of pairs that still run
);
CREATE TABLE `usage`                         -- a row for each life
(
 `started` INTEGER,                          -- seconds since the epoch, perhaps blurred
 `total_time` INTEGER,                       -- seconds from first accept to last end
 `waiting_time` INTEGER,                     -- seconds between the two accepts, or NULL
 `total_bytes` INTEGER,                      -- both directions, perhaps blurred
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
# What may be better in a moment, in SQLite's words: Python 3.9 does not give its error codes.
PASSING_TROUBLE = re.compile("locked|full|disk I/O error")


def open_usage_database(path: str) -> sqlite3.Connection:
    """Open a usage database (schema 1 of the reference relay), or make it if there is none.

    Raises sqlite3.Error. What is not ours is left untouched, and nothing half made is left
    behind.
    """
    target = os.path.realpath(path)  # a link to nowhere yet is somebody's plan: it stays
    is_new = not os.path.exists(target)
    if not is_new and not os.path.isfile(target):
        raise sqlite3.DatabaseError("not a regular file")
    db = sqlite3.connect(path, timeout=STALL_SECONDS, isolation_level=None, check_same_thread=False)
    try:
        db.execute("SELECT * FROM sqlite_master")  # takes back what a kill left half done
        if path == ":memory:" or os.path.getsize(target) == 0:
            _create_schema(db)
        _check_schema(db)
    except sqlite3.Error as error:
        db.close()
        if is_new and "locked" not in str(error):  # else another relay is making it just now
            with contextlib.suppress(OSError):
                if os.path.getsize(target) == 0:
                    os.unlink(target)
        raise
    return db


def _create_schema(db: sqlite3.Connection) -> None:
    """All in one transaction. Not `executescript`, which commits before it begins."""
    db.execute("BEGIN IMMEDIATE")
    if db.execute("SELECT * FROM sqlite_master").fetchone():  # another relay was faster
        db.execute("ROLLBACK")
        return
    statement = ""
    for line in USAGE_SCHEMA.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            db.execute(statement)
            statement = ""
    _insert(db, "version", [(USAGE_VERSION,)])
    db.execute("COMMIT")


def _check_schema(db: sqlite3.Connection) -> None:
    for table, columns in USAGE_COLUMNS.items():
        missing = set(columns) - {row[1] for row in db.execute(f"PRAGMA table_info(`{table}`)")}
        if missing:
            raise sqlite3.DatabaseError(
                f"not a usage database: table {table} lacks {', '.join(sorted(missing))}"
            )
    versions = [row[0] for row in db.execute("SELECT `version` FROM `version`")]
    if versions != [USAGE_VERSION]:
        found = ", ".join(map(str, versions)) or "none"
        raise sqlite3.DatabaseError(f"its schema version is {found}, we know {USAGE_VERSION}")


def _insert(db: sqlite3.Connection, table: str, rows: Iterable[tuple[object, ...]]) -> None:
    columns = USAGE_COLUMNS[table]
    names, places = ", ".join(columns), ", ".join("?" * len(columns))
    db.executemany(f"INSERT INTO `{table}` ({names}) VALUES ({places})", rows)


class UsageDatabase(Sink):
    """`--usage-db`: rows in SQLite, many to a transaction."""

    gather_seconds = GATHER_SECONDS

    def __init__(self, path: str) -> None:
        """Open it, and write to it, which shows that we may. Raises StartupError."""
        super().__init__("--usage-db")
        self._path = path
        self._db: sqlite3.Connection | None = None
        self._file: os.stat_result | None = None  # what was opened
        now = int(time.time())
        self._latest = Current(now, now, 0, 0, 0)
        try:
            self.write((), None)
        except SinkError as error:
            if not PASSING_TROUBLE.search(str(error)):
                raise StartupError(f"--usage-db {path}: {error}") from None
            self._report_failure(str(error))

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        """Write all or nothing; `current` always, as the file may be a new one."""
        self._latest = current or self._latest
        try:
            db = self._open()
            db.execute("BEGIN IMMEDIATE")
            _insert(db, "usage", batch)
            db.execute("DELETE FROM `current`")  # none or several rows switch_user one
            _insert(db, "current", [self._latest])
            db.execute("COMMIT")
        except (sqlite3.Error, OSError) as error:
            self._roll_back()
            raise SinkError(str(error)) from None
        with contextlib.suppress(sqlite3.Error):  # so that who moves the file has all of it
            db.execute("PRAGMA wal_checkpoint")
        return len(batch)

    def close(self) -> None:
        """Close the file."""
        if self._db is not None:
            self._db.close()
            self._db = None

    def _open(self) -> sqlite3.Connection:
        """Give the database: anew, if the file of that name is no longer the one we have.

        Somebody may have moved or removed it, which SQLite by itself does not always notice.
        """
        if self._file is not None:
            try:
                moved = not os.path.samestat(self._file, os.stat(self._path))
            except FileNotFoundError:
                moved = True
            if moved:
                self.close()
        if self._db is None:
            self._db = open_usage_database(self._path)
            self._file = None if self._path == ":memory:" else os.stat(self._path)
        return self._db

    def _roll_back(self) -> None:
        """Undo what is half done. A file is opened anew next time: it may have been mended."""
        if self._path == ":memory:":
            assert self._db is not None
            self._db.rollback()
        else:
            self.close()


# ---------------------------------------------------------------------------------------------
# Looking in
#
# What people are told of a relay that runs: each a function from one Snapshot to text.
# ---------------------------------------------------------------------------------------------


def status_line(now: Snapshot) -> str:
    """One line for `systemctl status`."""
    return (
        f"{count_text(now.pairs, 'pair')}, {now.waiting:,} waiting,"
        f" {count_text(now.connections, 'connection')}; since the start"
        f" {count_text(now.pairs_ended, 'pair')} ended, {size_text(now.relayed_bytes)} relayed"
    )


def count_text(count: int, noun: str) -> str:
    """Tell how many there are of something."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def size_text(size: int) -> str:
    """Tell a number of bytes with three digits, and a unit as on a disk: k = 1000."""
    if size < 1000:
        return f"{size} bytes"
    value = float(size)
    for unit in ("kB", "MB", "GB"):
        value /= 1000
        if value < 999.5:
            return f"{value:.3g} {unit}"
    return f"{value / 1000:.1f} TB"


# ---------------------------------------------------------------------------------------------
# Endpoints
#
# The strings that operators of the Twisted relay have in their scripts: a kind, then fields
# between colons, by position or as name=value; a backslash takes the meaning off the next
# character. What is wrong with the string is a UsageError, what the system refuses a
# StartupError; both name the endpoint. A Listener is the open socket behind one of them.
# ---------------------------------------------------------------------------------------------

# The fields of each kind, in the order in which they may be given without a name.
ENDPOINT_FIELDS = {
    "tcp": ("port", "interface", "backlog"),
    "unix": ("address", "mode", "backlog", "lockfile"),
    "systemd": ("domain", "name", "index"),
    "fd": ("fileno",),
}
SOCKET_DOMAINS = ("INET", "INET6", "UNIX")  # accepted for old scripts: the socket knows better
FIRST_PASSED_FD = 3  # sd_listen_fds(3): SD_LISTEN_FDS_START


class Endpoint(NamedTuple):
    """One `--port` or `--websocket`, understood but not yet opened."""

    text: str
    kind: str
    role: Role = Role.PORT
    port: int = 0
    interface: str = ""
    backlog: int = LISTEN_BACKLOG
    path: str = ""
    mode: int = 0o666
    name: str | None = None
    position: int | None = None  # index=
    fileno: int = -1


class PassedSockets(NamedTuple):
    """What the service manager opened for us: descriptors from 3 on, and their names."""

    total: int = 0
    names: tuple[str, ...] = ()

    @classmethod
    def take(cls) -> PassedSockets:
        """Read LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES, and take them out of the environment.

        They are ours only if LISTEN_PID is us: so this is asked before any fork.
        """
        pid, count, names = (
            os.environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
        )
        if pid != str(os.getpid()) or not re.fullmatch("[0-9]{1,6}", count):
            return cls()
        return cls(int(count), tuple(names.split(":")) if names else ())

    def endpoints(self) -> list[Endpoint]:
        """All of them as endpoints: what is not called `websocket` is a port."""
        return [
            Endpoint(
                f"systemd:index={n}",
                "systemd",
                role=Role.WEBSOCKET if self.names[n : n + 1] == ("websocket",) else Role.PORT,
                position=n,
            )
            for n in range(self.total)
        ]

    def unused(self, endpoints: Sequence[Endpoint]) -> int:
        """How many of them no endpoint means. Raises StartupError."""
        used = {self.find(endpoint) for endpoint in endpoints}
        return len({FIRST_PASSED_FD + n for n in range(self.total)} - used)

    def find(self, endpoint: Endpoint) -> int | None:
        """Which descriptor an endpoint means; None if it is to be opened. Raises StartupError."""
        if endpoint.kind == "fd":
            return endpoint.fileno
        if endpoint.kind != "systemd":
            return None
        if endpoint.position is not None:
            if endpoint.position >= self.total:
                raise StartupError(f"{endpoint.text}: {self.total} sockets were passed to us")
            return FIRST_PASSED_FD + endpoint.position
        found = [n for n, name in enumerate(self.names[: self.total]) if name == endpoint.name]
        if len(found) != 1:
            raise StartupError(f"{endpoint.text}: {len(found)} sockets of this name were passed")
        return FIRST_PASSED_FD + found[0]


def parse_endpoint(text: str) -> Endpoint:
    """Understand an endpoint as an operator writes it. Raises UsageError."""
    (label, kind), *fields = _split_fields(text)
    if label or kind not in ENDPOINT_FIELDS or not fields:
        kinds = ", ".join(ENDPOINT_FIELDS)
        raise UsageError(f"{text!r}: not an endpoint, write KIND:... (KIND: one of {kinds})")
    names = ENDPOINT_FIELDS[kind]
    unnamed = iter(names)
    given: dict[str, str] = {}
    for name, value in fields:
        name = name or next(unnamed, "")
        if not name:
            raise UsageError(f"{text}: too many fields")
        if name not in names:
            raise UsageError(f"{text}: {kind} has no option {name!r}, only {', '.join(names)}")
        if name in given:
            raise UsageError(f"{text}: {name} is given twice (a colon in a value is \\:)")
        given[name] = value

    def number(name: str, highest: int, base: int = 10) -> int:
        digits = "01234567" if base == 8 else "0123456789"
        value = given[name]
        if not value or value.strip(digits) or len(value) > 10 or int(value, base) > highest:
            limit = f"{highest:o}" if base == 8 else f"{highest}"
            raise UsageError(f"{text}: {name} must be a number from 0 to {limit}")
        return int(value, base)

    endpoint = Endpoint(text, kind)
    if "backlog" in given:  # old scripts say 50, which is too few for a busy hour
        endpoint = endpoint._replace(backlog=max(LISTEN_BACKLOG, number("backlog", 2**31 - 1)))
    if kind == "tcp":
        if "port" not in given:
            raise UsageError(f"{text}: the port is missing")
        return endpoint._replace(port=number("port", 65535), interface=given.get("interface", ""))
    if kind == "unix":
        if not given.get("address"):
            raise UsageError(f"{text}: the path is missing")
        if "lockfile" in given:  # Twisted's way of finding a dead socket; ours needs no file
            number("lockfile", 1)
        mode = number("mode", 0o777, base=8) if "mode" in given else endpoint.mode
        return endpoint._replace(path=given["address"], mode=mode)
    if kind == "systemd":
        if given.get("domain", "INET") not in SOCKET_DOMAINS:
            raise UsageError(f"{text}: domain must be one of {', '.join(SOCKET_DOMAINS)}")
        if ("name" in given) == ("index" in given):
            raise UsageError(f"{text}: needs either name= or index=")
        index = number("index", 65535) if "index" in given else None
        return endpoint._replace(name=given.get("name"), position=index)
    return endpoint._replace(fileno=number("fileno", 2**31 - 1))


def parse_websocket_endpoint(text: str) -> Endpoint:
    """Understand an endpoint behind `--websocket`. Raises UsageError."""
    return parse_endpoint(text)._replace(role=Role.WEBSOCKET)


def _split_fields(text: str) -> list[tuple[str, str]]:
    """Cut `text` at its colons: (name, value) of each field, the name empty if it has none."""
    fields = [["", ""]]
    named = False
    characters = iter(text)
    for character in characters:
        if character == "\\":
            fields[-1][1] += next(characters, "\\")
        elif character == ":":
            fields.append(["", ""])
            named = False
        elif character == "=" and not named:
            fields[-1] = [fields[-1][1], ""]
            named = True
        else:
            fields[-1][1] += character
    return [(name, value) for name, value in fields]


class Listener:
    """An open listening socket, the name by which we speak of it, and the way to leave it."""

    def __init__(
        self, sock: socket.socket, label: str, path: str = "", role: Role = Role.PORT
    ) -> None:
        """`path`: the unix socket that we made, and remove when we close. `role`: see Endpoint."""
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.label = label
        self.role = role
        self._path = path
        self._made = _identity(path) if path else None

    @property
    def port(self) -> int | None:
        """The TCP port, if it has one."""
        is_tcp = self.sock.family in (socket.AF_INET, socket.AF_INET6)
        return int(self.sock.getsockname()[1]) if is_tcp else None

    def close(self) -> None:
        """Listen no more; remove the unix socket, if it is still the one that we made."""
        self.sock.close()
        made, self._made = self._made, None
        if made is not None:
            # Root may have made it in a folder that is not ours to write: then it stays
            # behind, and the next start takes it for what it is, a dead socket.
            with contextlib.suppress(OSError):
                if _identity(self._path) == made:
                    os.unlink(self._path)


def _identity(path: str) -> tuple[int, int, int]:
    """Which file this is. Inode numbers are soon used again, so its time is looked at too."""
    found = os.lstat(path)
    return found.st_dev, found.st_ino, found.st_mtime_ns


def open_listeners(endpoints: Sequence[Endpoint], passed: PassedSockets) -> list[Listener]:
    """Open all endpoints, or none. Raises StartupError.

    Those that are open already come first: of the others one could get the number of a
    descriptor that is missing.
    """
    listeners: list[Listener] = []
    taken: set[int | None] = set()  # the numbers asked for, and those of our copies
    found = [(passed.find(endpoint), endpoint) for endpoint in endpoints]
    try:
        for fd, endpoint in sorted(found, key=lambda one: one[0] is None):
            if fd is not None and fd in taken:
                raise StartupError(f"{endpoint.text}: this socket is given twice")
            listener = open_listener(endpoint, fd)
            listeners.append(listener)
            taken |= {fd, listener.fd}
    except StartupError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def open_listener(endpoint: Endpoint, fd: int | None) -> Listener:
    """Open an endpoint, or take over `fd` if it is open already. Raises StartupError."""
    try:
        if fd is not None:
            return Listener(_adopt(fd, endpoint), endpoint.text, role=endpoint.role)
        return _listen_unix(endpoint) if endpoint.kind == "unix" else _listen_tcp(endpoint)
    except OSError as error:  # socket.gaierror, an unknown interface, is one too
        raise StartupError(f"{endpoint.text}: {error_text(error)}") from None
    except UnicodeError:  # from its way of encoding names
        raise StartupError(f"{endpoint.text}: the interface is no address and no name") from None


def _listen_tcp(endpoint: Endpoint) -> Listener:
    if endpoint.interface in ("", "::"):
        sock = _bind_everywhere(endpoint)
    else:
        family, kind, _, _, address = socket.getaddrinfo(
            endpoint.interface, endpoint.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        sock = _bind(socket.socket(family, kind), address)
    sock.listen(endpoint.backlog)
    label = f"tcp:{sock.getsockname()[1]}"
    if endpoint.interface:
        label += ":interface=" + endpoint.interface.replace(":", "\\:")
    return Listener(sock, label, role=endpoint.role)


def _bind_everywhere(endpoint: Endpoint) -> socket.socket:
    """One socket for IPv4 and IPv6, or for IPv4 alone where IPv6 is switched off."""
    try:
        sock = socket.socket(socket.AF_INET6, socket.SOCK_STREAM)
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        return _bind(sock, ("::", endpoint.port))
    except OSError as error:
        if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
            raise
        log.info("no IPv6 here: %s serves IPv4 only", endpoint.text)
        return _bind(socket.socket(socket.AF_INET, socket.SOCK_STREAM), ("", endpoint.port))


def _bind(sock: socket.socket, address: tuple[object, ...]) -> socket.socket:
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError:
        sock.close()
        raise
    return sock


def _listen_unix(endpoint: Endpoint) -> Listener:
    path = endpoint.path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o777 & ~endpoint.mode)
    # Two that start at once must not take each other's new socket for the dead one.
    lock = _lock_folder(os.path.dirname(path) or ".")
    try:
        if os.path.lexists(path):
            _remove_dead_socket(endpoint)
        sock.bind(path)
        sock.listen(endpoint.backlog)
        return Listener(sock, endpoint.text, path, endpoint.role)
    except (OSError, StartupError):
        sock.close()
        raise
    finally:
        os.umask(before)
        if lock is not None:
            os.close(lock)


def _lock_folder(folder: str) -> int | None:
    """Lock a folder until the descriptor is closed; None where one may not.

    Whoever keeps it locked for longer than a start takes is no relay: then it goes without.
    """
    try:
        fd = os.open(folder, os.O_RDONLY)
    except OSError:
        return None
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


def _remove_dead_socket(endpoint: Endpoint) -> None:
    """Make way if a relay that died left its socket behind. Raises StartupError if not so."""
    if not stat.S_ISSOCK(os.lstat(endpoint.path).st_mode):
        raise StartupError(f"{endpoint.text}: the file exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(endpoint.path)
        except ConnectionRefusedError:
            os.unlink(endpoint.path)
            return
        except BlockingIOError:  # its queue is full: very much alive
            pass
    raise StartupError(f"{endpoint.text}: another program listens there")


def _adopt(fd: int, endpoint: Endpoint) -> socket.socket:
    """Make our socket of a descriptor that was passed to us. Raises OSError, StartupError."""
    if fd < STANDARD_FDS:  # where a daemon will have /dev/null
        fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STANDARD_FDS)
    os.set_inheritable(fd, False)
    sock = socket.socket(fileno=fd)
    listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if sock.type != socket.SOCK_STREAM or not listens:
        sock.detach()
        raise StartupError(f"{endpoint.text}: descriptor {fd} is not a listening stream socket")
    return sock


# ---------------------------------------------------------------------------------------------
# Daemon
#
# What makes a program one that init scripts, cron, logrotate and systemd can live with. All but
# what systemd is told happens once, at the start or the end, and says why if the system refuses.
# ---------------------------------------------------------------------------------------------


class PidFile:
    """A file with our process id, locked for as long as we live.

    The lock, not the number, tells whether a relay is running: after a crash or a reboot the
    number may long be somebody else's.
    """

    def __init__(self, path: str) -> None:
        """Make it ours. Raises StartupError if another relay has it, or it is something else."""
        self._path = path
        try:
            self._fd = self._lock()
            os.ftruncate(self._fd, 0)
            os.pwrite(self._fd, b"%d\n" % os.getpid(), 0)
        except OSError as error:
            raise StartupError(f"pidfile {path}: {error_text(error)}") from None

    def _lock(self) -> int:
        """Open and lock the file; again, if its owner removed it in between."""
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            fd = os.open(self._path, flags, 0o644)
            try:
                if self._is_locked_by_us(fd):
                    return fd
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)

    def _is_locked_by_us(self, fd: int) -> bool:
        """Lock what was opened. False: it is no longer the file of that name."""
        content = os.read(fd, 64).strip()
        if not stat.S_ISREG(os.fstat(fd).st_mode) or not re.fullmatch(rb"[0-9]{0,20}", content):
            raise StartupError(f"pidfile {self._path}: holds something else")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except BlockingIOError:
            raise StartupError(
                f"pidfile {self._path}: a relay is running, process id {content.decode()}"
            ) from None
        except FileNotFoundError:
            return False

    def close(self) -> None:
        """Remove it, or empty it where the folder is not ours to write. Either reads as stale."""
        try:
            if os.path.samestat(os.fstat(self._fd), os.stat(self._path)):
                os.unlink(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
        os.close(self._fd)


class MessageHandler(logging.Handler):
    """Messages to a descriptor. What it does not take at once is dropped: no message blocks."""

    def __init__(self, fd: int) -> None:
        super().__init__()
        self.fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line, if there is room for it."""
        text = self.format(record).encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            if takes_bytes(self.fd, 0):
                os.write(self.fd, text[: select.PIPE_BUF - 1] + b"\n")


class LogFile(MessageHandler):
    """Messages to the end of a file, which is opened anew when somebody (logrotate) moved it."""

    def __init__(self, path: str) -> None:
        """Open or make the file. Raises OSError."""
        self._path = path
        self.is_ours = False  # whether we made it: else it is not ours to give to `--user`
        super().__init__(self._open())

    def emit(self, record: logging.LogRecord) -> None:
        """Write a line; to the old file, if there is no way to a new one."""
        with contextlib.suppress(OSError):
            if self._was_moved():
                old, self.fd = self.fd, self._open()
                os.close(old)
        super().emit(record)

    def _was_moved(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self.fd))
        except FileNotFoundError:
            return True

    def _open(self) -> int:
        """Open the file, and note whether there was none: a link may lead anywhere."""
        # Non-blocking, as it may be a pipe, or switch_user one.
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            fd = os.open(self._path, flags | os.O_EXCL, 0o666)
            self.is_ours = True
        except FileExistsError:
            fd = os.open(self._path, flags, 0o666)
            self.is_ours = False
        return fd


class LineFormatter(logging.Formatter):
    """One line a message; warnings and errors begin with their level."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the text of `record`, with its level in front if that is above INFO."""
        calm = record.levelno <= logging.INFO
        record.severity = "" if calm else record.levelname.lower() + ": "
        return super().format(record)


def start_logging(path: str | None, to_stdout: bool) -> LogFile | None:
    """Send messages to the file at `path`, or without one to stderr (or stdout).

    Gives the file, for whoever has to know whose it is. Raises StartupError.
    """
    log.setLevel(logging.INFO)
    log.propagate = False
    try:
        file = None if path is None else LogFile(path)
    except OSError as error:
        raise StartupError(f"logfile {path}: {error_text(error)}") from None
    handler = file or MessageHandler(1 if to_stdout else 2)
    layout = ("%(asctime)s " if file else "") + "%(severity)s%(message)s"
    handler.setFormatter(LineFormatter(layout, "%Y-%m-%dT%H:%M:%S%z"))
    log.addHandler(handler)
    return file


class ServiceManager:
    """systemd, if it is there and wants to be told: sd_notify(3), sd_watchdog_enabled(3)."""

    def __init__(self, address: str = "", watchdog_seconds: float = 0) -> None:
        """`address`: where it listens; empty: there is none.

        `watchdog_seconds`: of silence, after which it takes us for dead; 0: never.
        """
        # With an @ in front it has no place in the file system: unix(7).
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog_seconds = watchdog_seconds
        self._socket: socket.socket | None = None  # kept, lest descriptors lack for it one day
        self._owed = ""  # what must be said and was not taken yet
        self._phase = ""  # in front of the status
        self._complaints = Throttle()

    @classmethod
    def take(cls) -> ServiceManager:
        """Read what it says in the environment, and take that out."""
        address, usec, pid = (
            os.environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
        )
        if not address.startswith(("/", "@")):  # the others are for virtual machines
            return cls()
        is_watched = pid in ("", str(os.getpid())) and re.fullmatch("[0-9]{1,15}", usec)
        return cls(address, int(usec) / 1e6 if is_watched else 0)

    def attend(self, server: Server) -> None:
        """Have the loop itself tell that it is alive, and how things stand."""

        def tell_status() -> None:
            self.tell(f"STATUS={self._phase}{status_line(server.snapshot())}")

        if self._address:
            server.every(STATUS_SECONDS, tell_status)
        if self._watchdog_seconds:
            server.every(self._watchdog_seconds / 2, lambda: self.tell("WATCHDOG=1"))

    def ready(self) -> None:
        """Tell that clients are served."""
        self.tell("READY=1", must_arrive=True)

    def stopping(self) -> None:
        """Tell that a stop has begun."""
        self._phase = "stopping; "
        self.tell("STOPPING=1\nSTATUS=stopping", must_arrive=True)

    def tell(self, message: str, must_arrive: bool = False) -> None:
        """Send variables, a line each, if it takes them at once.

        `must_arrive`: if it does not, they are sent again before what is told next.
        """
        if not self._address:
            return
        message = self._owed + message
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            self._socket.sendto(message.encode(), self._address)
            self._owed = ""
        except OSError as error:
            if must_arrive:
                self._owed = message + "\n"
            if self._complaints.is_due(time.monotonic()):
                log.warning("the service manager cannot be told: %s", error_text(error))

    def close(self) -> None:
        """Tell it nothing more."""
        if self._socket is not None:
            self._socket.close()


def daemonize() -> Callable[[], None]:
    """Go to the background. Returns only there, with what to call when all is in place.

    The process that was started waits for that call and exits with 0, or with 1 if there will
    be none: then the daemon has said why on stderr, which it leaves only at that call.
    Raises StartupError.
    """
    try:
        null = os.open(os.devnull, os.O_RDWR)
        ready_read, ready_write = os.pipe()
        if os.fork():
            os.close(ready_write)
            os._exit(0 if os.read(ready_read, 1) else 1)
        os.setsid()
        if os.fork():  # not the session's leader: no terminal can ever switch_user ours
            os._exit(0)
        os.close(ready_read)
    except OSError as error:
        raise StartupError(f"--daemonize: {error_text(error)}") from None

    def detach() -> None:
        for fd in range(STANDARD_FDS):
            os.dup2(null, fd)
        os.close(null)
        with contextlib.suppress(BrokenPipeError):
            os.write(ready_write, b"\0")
        os.close(ready_write)

    return detach


def occupy_standard_descriptors() -> None:
    """Where 0, 1 or 2 is closed, put /dev/null: else a socket would get the messages for it."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd >= STANDARD_FDS:
            os.close(fd)
            return


def duplicate_log_descriptor(fd: int) -> int:
    """Give a descriptor of our own for `--log-fd`. Raises StartupError.

    Asked before anything is opened: else `fd` might be a file of ours by then.
    """
    try:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
        ours = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, STANDARD_FDS)
    except OSError as error:
        raise StartupError(f"--log-fd={fd}: {error_text(error)}") from None
    if not writable:
        raise StartupError(f"--log-fd={fd}: not open for writing")
    return ours


def raise_open_files_limit() -> str:
    """Allow ourselves as many descriptors as the system does, one for each client.

    Gives what there is to say about it: nothing if nothing changes.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return ""
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:
        return f"RLIMIT_NOFILE stays at {soft} open files: {error}"
    return f"RLIMIT_NOFILE raised from {soft} to {most} open files"


def find_user(text: str) -> tuple[str, int, int]:
    """Look up NAME[:GROUP]: name, uid, gid. Raises StartupError."""
    name, _, group = text.partition(":")
    try:
        user = pwd.getpwnam(name)
    except KeyError:
        raise StartupError(f"--user {text}: there is no user {name!r}") from None
    try:
        gid = grp.getgrnam(group).gr_gid if group else user.pw_gid
    except KeyError:
        raise StartupError(f"--user {text}: there is no group {group!r}") from None
    return name, user.pw_uid, gid


def switch_user(text: str, log_file: LogFile | None) -> None:
    """Run as NAME[:GROUP] from now on, for good. Raises StartupError.

    A log file that we made goes along: it has to be opened again when it was rotated.
    """
    name, uid, gid = find_user(text)
    if (os.geteuid(), os.getegid()) == (uid, gid):
        return
    try:
        if log_file is not None and log_file.is_ours:
            os.fchown(log_file.fd, uid, gid)
        os.initgroups(name, gid)
        os.setgid(gid)
        os.setuid(uid)
    except OSError as error:
        raise StartupError(f"--user {text}: {error_text(error)}") from None


# ---------------------------------------------------------------------------------------------
# Command line
#
# The options as an operator looks for them, and the file in which they may stand as well. What is
# wrong with either is said in one line, which names the option, and the line of the file.
# ---------------------------------------------------------------------------------------------

EPILOG = """\
endpoints:
  tcp:4001                          IPv4 and IPv6, all interfaces
  tcp:4001:interface=127.0.0.1      one address; IPv6: interface=\\:\\:1
  tcp:0                             a free port, which the start message names
  tcp:4001:backlog=N                newcomers that may queue (default, and least: 1024)
  unix:/run/x.sock[:mode=660]       a unix socket (default mode: 666)
  systemd:index=0  systemd:name=X   a socket passed by systemd
  fd:N                              a listening socket that is open already

configuration file:
  an option a line, without its dashes: `blur-usage 3600` or `blur-usage = 3600`;
  a # at the start of a line or behind white space begins a comment

signals:
  SIGTERM, SIGINT                   stop: queued bytes get 2 s, unwritten records 10 s;
                                    a second one ends at once
  SIGHUP                            ignored

exit codes:
  0 stopped, all records written    1 the system refused, or records were lost
  2 wrong command line or configuration
"""


# RFC 6455, 3: no user, no fragment.
WEBSOCKET_URL = re.compile(
    r"(?i:wss?)://(?:[0-9A-Za-z._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:[/?][!\"$-~]*)?"
)


class Parser(argparse.ArgumentParser):
    """argparse, but an error is one line."""

    place = ""  # where what is wrong stands, if that is not the command line

    def error(self, message: str) -> NoReturn:
        """Exit with code 2."""
        complain(f"{self.place}{message} (--help tells more)", sys.stderr)
        raise SystemExit(2)


def complain(message: str, stream: TextIO | None) -> None:
    """Say in one line why we do not start, if anybody is there to hear it."""
    if stream is None:
        return
    text = " ".join(message[:MAX_COMPLAINT_CHARACTERS].split())
    plain = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    line = f"{PROGRAM}: {plain}"
    with contextlib.suppress(OSError):
        encoded = line.encode(stream.encoding, "backslashreplace")
        print(encoded.decode(stream.encoding), file=stream, flush=True)


def whole_number(text: str) -> int:
    """An option's value that counts something. Raises UsageError."""
    if not (text.isascii() and text.isdecimal() and len(text) <= 10 and int(text) < 2**31):
        raise UsageError(f"{text!r} is not a whole number from 0 to 2147483647")
    return int(text)


def seconds(text: str) -> float:
    """An option's value that is a time. Raises UsageError."""
    try:
        value = float(text) if text.isascii() and "_" not in text else -1.0
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise UsageError(f"{text!r} is not a number of seconds from 0 on")
    return value


def websocket_url(text: str) -> str:
    """An option's value that is a WebSocket address: RFC 6455, 3. Raises UsageError."""
    if not WEBSOCKET_URL.fullmatch(text):
        raise UsageError(f"{text!r} is not of the form ws://HOST[:PORT]/PATH or wss://...")
    return text


def nonempty(text: str) -> str:
    """An option's value that names something. Raises UsageError."""
    if not text:
        raise UsageError("the name is empty")
    return text


def make_parser() -> Parser:
    """All options, in the groups in which one looks for them; each with default and unit."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [--port ENDPOINT] [--websocket ENDPOINT] [OPTIONS]",
        description="The relay server of Magic Wormhole, where clients behind NAT meet.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    listening = parser.add_argument_group("where it listens")
    listening.add_argument(
        "--port",
        metavar="ENDPOINT",
        type=parse_endpoint,
        action="append",
        default=[],
        help="take clients here, over TCP and WebSocket; may be given several times"
        " (default: what systemd passes if no endpoint is named at all, else tcp:4001)",
    )
    listening.add_argument(
        "--websocket",
        metavar="ENDPOINT",
        type=parse_websocket_endpoint,
        action="append",
        default=[],
        help="take clients here too, and answer junk by HTTP instead of `bad handshake`: for the"
        " side of a proxy; may be given several times (default: none: --port takes both)",
    )
    listening.add_argument(
        "--websocket-url",
        metavar="URL",
        type=websocket_url,
        help="the address of WebSocket clients that the start message names, if a proxy or a"
        " router stands before us (default: ws://localhost:PORT/ for each --websocket)",
    )
    records = parser.add_argument_group("what it records")
    records.add_argument(
        "--usage-db",
        metavar="FILE",
        type=nonempty,
        help="write a row for each transfer to this SQLite database, made if it is missing;"
        " :memory: keeps it in memory (default: none)",
    )
    records.add_argument(
        "--log-fd",
        metavar="N",
        type=whole_number,
        help="write a JSON line for each transfer to this open file descriptor (default: none)",
    )
    records.add_argument(
        "--blur-usage",
        metavar="SECONDS",
        type=whole_number,
        default=0,
        help="record start times rounded down to a multiple of this many seconds, and sizes"
        " rounded down too (default: 0 s: not blurred)",
    )
    limits = parser.add_argument_group("what it limits")
    limits.add_argument(
        "--handshake-timeout",
        metavar="SECONDS",
        type=seconds,
        default=Limits().handshake_seconds,
        help="close a connection that has not sent its handshake after this many seconds;"
        " 0 switches it off (default: %(default)g s)",
    )
    running = parser.add_argument_group("how it runs")
    running.add_argument(
        "--config",
        metavar="FILE",
        type=nonempty,
        action="append",
        default=[],
        help="read more options from this file, where those given here win; may be given several"
        " times (default: none)",
    )
    running.add_argument(
        "--daemonize",
        action="store_true",
        help="go to the background as soon as all is in place (default: stay in the foreground)",
    )
    running.add_argument(
        "--pidfile",
        metavar="FILE",
        type=nonempty,
        help="keep the process id here; no second relay starts with the same one (default:"
        " transit_relay.pid with --daemonize, else none)",
    )
    running.add_argument(
        "--logfile",
        metavar="FILE",
        type=nonempty,
        help="write messages here; opened anew when it was moved (default: transit_relay.log"
        " with --daemonize, else stderr, or stdout if --log-fd is 2)",
    )
    running.add_argument(
        "--user",
        metavar="NAME[:GROUP]",
        type=nonempty,
        help="open everything as root, then run as this user (default: do not change)",
    )
    running.add_argument(
        "--no-splice",
        action="store_true",
        help="copy all bytes (default: bulk between TCP clients is spliced, moved by the kernel"
        " alone, where the system and Python can: Linux, 3.10)",
    )
    about = parser.add_argument_group("about")
    version = f"{PROGRAM} {__version__}"
    about.add_argument(
        "--version", action="version", version=version, help="say which version this is"
    )
    about.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and the file it names. Exits with code 2, and one line, if wrong."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.config:
        configured = argparse.Namespace()
        for path in options.config:
            read_config(path, parser, configured)
        for name in ("port", "websocket"):  # lists, to which argparse would add
            if getattr(options, name):
                vars(configured).pop(name, None)
        options = parser.parse_args(arguments, configured)
    if options.daemonize:
        options.pidfile = options.pidfile or "transit_relay.pid"
        options.logfile = options.logfile or "transit_relay.log"
    return options


CONFIG_LINE = re.compile(r"(?:--)?([^\s=-][^\s=]*)(?:(?:\s*=\s*|\s+)([^\0]*))?")
COMMENT = re.compile(r"(?:^|\s)#.*")


def read_config(path: str, parser: Parser, configured: argparse.Namespace) -> None:
    """Put the options of a file, and nothing else, into `configured`. Exits if it is wrong.

    Each line is parsed as if it stood alone on the command line.
    """
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            text = file.read(MAX_CONFIG_CHARACTERS)
    except OSError as error:
        parser.error(f"argument --config: {path}: {error_text(error)}")
    if len(text) == MAX_CONFIG_CHARACTERS:
        parser.error(f"argument --config: {path}: too long for a configuration")
    for number, line in enumerate(text.split("\n"), 1):
        line = COMMENT.sub("", line).strip()
        if line:
            parser.place = f"{path}, line {number}: "
            name, value = _read_option(line, parser)
            if isinstance(value, list):
                value = [*getattr(configured, name, []), *value]
            setattr(configured, name, value)
    parser.place = ""


def _read_option(line: str, parser: Parser) -> tuple[str, object]:
    """Read one line of a configuration: its name in a Namespace, and its value."""
    match = CONFIG_LINE.fullmatch(line)
    if not match:
        parser.error(f"{line!r} is not of the form `option value`")
    option, value = match.groups()
    if option in ("config", "help", "version"):
        parser.error(f"{option} is for the command line only")
    argument = f"--{option}" if value is None else f"--{option}={value}"
    name = option.replace("-", "_")
    return name, vars(parser.parse_args([argument]))[name]


def choose_endpoints(options: argparse.Namespace, passed: PassedSockets) -> list[Endpoint]:
    """Where to listen: as we are told, else where systemd does it for us, else at port 4001."""
    ports = options.port
    if not ports and not options.websocket:
        ports = passed.endpoints()
    return [*(ports or [parse_endpoint("tcp:4001")]), *options.websocket]


# ---------------------------------------------------------------------------------------------
# Start and stop
#
# What needs root or may be refused comes first, what belongs to the user we switch_user after it,
# threads last, because nothing forks behind them. A start that fails undoes what it did, in
# reverse.
# ---------------------------------------------------------------------------------------------


def announce(options: argparse.Namespace, listeners: Sequence[Listener], limit: str) -> None:
    """Say how we run: all of it now, so that a start that fails says nothing but why."""
    if options.blur_usage:
        log.info("blurring access times to %d seconds", options.blur_usage)
    else:
        log.info("not blurring access times")
    if limit:
        log.info(limit)
    if os.geteuid() == 0 and not options.user:
        log.info("running as root; consider --user NAME")
    if ws_frames is None:
        log.info("TCP clients only: Python finds no ws_frames.py (beside transit_relay.py)")
    urls = [
        f"ws://localhost:{one.port}/"
        for one in listeners
        if one.role is Role.WEBSOCKET and one.port
    ]
    if options.websocket_url:
        urls = [options.websocket_url]
    if urls:
        log.info("WebSocket clients connect to %s", ", ".join(urls))
    names = (
        one.label + (" (websocket)" if one.role is Role.WEBSOCKET else "") for one in listeners
    )
    log.info("Transit starting on %s", ", ".join(names))


def serve(options: argparse.Namespace) -> int:
    """Start, serve, stop: everything between the command line and the exit code.

    Raises StartupError.
    """
    with contextlib.ExitStack() as undo:
        log_fd = None if options.log_fd is None else duplicate_log_descriptor(options.log_fd)
        passed = PassedSockets.take()
        manager = ServiceManager.take()
        undo.callback(manager.close)
        occupy_standard_descriptors()
        detach = daemonize() if options.daemonize else lambda: None
        if options.pidfile:
            undo.callback(PidFile(options.pidfile).close)
        log_file = start_logging(options.logfile, to_stdout=options.log_fd == 2)
        endpoints = choose_endpoints(options, passed)
        if ws_frames is None and (
            options.websocket_url or any(one.role is Role.WEBSOCKET for one in endpoints)
        ):
            raise StartupError("WebSocket: Python finds no ws_frames.py (beside transit_relay.py)")
        listeners = open_listeners(endpoints, passed)
        unused = passed.unused(endpoints)
        for listener in listeners:
            undo.callback(listener.close)
        if options.user:
            switch_user(options.user, log_file)
        sinks: list[Sink] = []
        if options.usage_db:
            sinks.append(UsageDatabase(options.usage_db))
        if log_fd is not None:
            sinks.append(JsonLines(log_fd))
        limit = raise_open_files_limit()
        recorder = Recorder(sinks, options.blur_usage)
        limits = Limits(options.handshake_timeout)
        most_pipes = 0 if options.no_splice else affordable_pipes()
        server = Server(listeners, recorder, limits, most_pipes=most_pipes)
        manager.attend(server)

        def ready() -> None:
            if unused:
                log.warning("sockets passed to us, but named by no endpoint: %d", unused)
            announce(options, listeners, limit)
            manager.ready()
            detach()

        crashed = False
        for step in (partial(server.run, ready, manager.stopping), server.close):
            try:
                step()
            except Exception:
                log.exception("a mistake of ours; please report it")
                crashed = True
        if crashed:  # what is known by now is written all the same
            recorder.stop()
            recorder.join(STOP_RECORD_SECONDS)
        lost = recorder.lost()
        if lost:
            log.error("stopped; usage records lost: %d", lost)
        else:
            log.info("stopped")
        return 1 if lost or crashed else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program: give its exit code."""
    options = parse_arguments(arguments)
    try:
        return serve(options)
    except (StartupError, OSError) as error:  # OSError: not even the loop could be set up
        complain(str(error), sys.stdout if options.log_fd == 2 else sys.stderr)
        return 1
    except KeyboardInterrupt:  # before the server had its own way with signals
        return 1


if __name__ == "__main__":
    sys.exit(main())
