"""How one socket's bytes move: the phases, the backlog, the interest, failed writes, lingering."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from selectors import EVENT_READ, EVENT_WRITE
from typing import NamedTuple

import pytest
from helpers import (
    CLOSE,
    TIMEOUT,
    Loop,
    close_payload,
    digest,
    docstring_table,
    frame,
    handshake,
    read_to_end,
    reset,
    wait_for_hang_up,
)

import transit_relay
from transit_relay import (
    BAD_HANDSHAKE,
    Connection,
    DetectFraming,
    Endpoint,
    Framing,
    Listener,
    Phase,
    RawFraming,
    Reason,
    Session,
    State,
    unacknowledged_bytes,
    unread_bytes,
)
from ws_frames import HttpFraming, ProxyFraming, StatusFraming, WebSocketFraming

BOTH_WAYS = True  # copied and spliced, see conftest.py
BOTH = EVENT_READ | EVENT_WRITE
SOCKETS = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
NO_ROOM = pytest.mark.parametrize("number", [errno.EAGAIN, errno.ENOBUFS, errno.ENOMEM])


def shrink_buffers(*socks: socket.socket) -> None:
    """Set small send buffers, so that a backlog needs few bytes.

    With small receive buffers, TCP would wait for its timers.
    """
    for sock in socks:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)


class Pair:
    """Two clients that have met, and the relay's connections to them. Buffers are small."""

    def __init__(self, loop: Loop, tcp: bool = False) -> None:
        (self.a, self.conn_a), (self.b, self.conn_b) = (loop.connect_both(tcp) for _ in range(2))
        for client, side in ((self.a, "one"), (self.b, "other")):
            client.sendall(handshake("pair", side))
            loop.pump()
        assert self.a.recv(100) == self.b.recv(100) == b"ok\n"
        shrink_buffers(self.a, self.b, self.conn_a.sock, self.conn_b.sock)


def stuff(loop: Loop, sender: socket.socket, receiver: Connection) -> bytes:
    """Send to a client that does not read, until it has a backlog. Return what was sent."""
    sender.setblocking(False)
    sent = b""
    chunk = random.Random(1).randbytes(10_000)
    deadline = time.monotonic() + TIMEOUT
    while receiver.backlog is None:
        with contextlib.suppress(BlockingIOError):
            sent += chunk[: sender.send(chunk)]
        loop.pump()
        assert time.monotonic() < deadline
    sender.settimeout(TIMEOUT)
    return sent


def exchange(
    loop: Loop, sending: dict[socket.socket, bytes], reading: dict[socket.socket, int | None]
) -> dict[socket.socket, bytes]:
    """Let clients send and read at the same time. Return what each has read.

    `reading`: how many bytes each client reads; None: all until the relay's end.
    """
    left = {client: memoryview(data) for client, data in sending.items()}
    wanted = dict(reading)
    got = dict.fromkeys(reading, b"")
    for client in (*left, *wanted):
        client.setblocking(False)
    while left or wanted:
        ready, writable, _ = select.select([*wanted, loop.server._selector], left, [], TIMEOUT)
        assert ready or writable, "nothing moves"
        for client in writable:
            left[client] = left[client][client.send(left[client]) :]
            if not left[client]:
                del left[client]
        for client in set(wanted).intersection(ready):
            part = client.recv(1 << 16)
            got[client] += part
            if not part or len(got[client]) == wanted[client]:
                del wanted[client]
        loop.pump()
    return got


def receive(loop: Loop, client: socket.socket) -> bytes:
    """Return everything until the relay's end. The relay works meanwhile."""
    return exchange(loop, {}, {client: None})[client]


def until(condition: Callable[[], object]) -> None:
    """Wait for a change in the kernel that select does not report."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def registered(loop: Loop, conn: Connection) -> int:
    """Return the events for which the kernel's epoll set has this connection."""
    mask = 0
    with open(f"/proc/self/fdinfo/{loop.server._selector.fileno()}") as lines:
        for line in lines:
            words = line.split()
            if words[:2] == ["tfd:", str(conn.fd)]:
                events = int(words[3], 16)
                mask |= EVENT_READ if events & select.EPOLLIN else 0
                mask |= EVENT_WRITE if events & select.EPOLLOUT else 0
    return mask


class Failing:
    """A socket of which some methods raise an error."""

    def __init__(self, sock: socket.socket, methods: tuple[str, ...], error: OSError) -> None:
        self._sock, self._methods, self._error = sock, methods, error

    def __getattr__(self, name: str) -> object:
        return self._fail if name in self._methods else getattr(self._sock, name)

    def _fail(self, *_: object) -> int:
        raise self._error


@contextlib.contextmanager
def refusing(conn: Connection, number: int) -> Iterator[None]:
    """Let every write to this client fail with an errno, copied or spliced."""
    error = OSError(number, "injected")
    splice = transit_relay.splice

    def refuse(source: int, target: int, *others: object) -> int:
        if target == conn.fd:
            raise error
        assert splice is not None
        return splice(source, target, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conn, "sock", Failing(conn.sock, ("send", "sendmsg"), error))
        if splice is not None:
            patch.setattr(transit_relay, "splice", refuse)
        yield


# The table in Connection's docstring.


class TracedConnection(Connection):
    """A Connection that notes each phase that it enters."""

    __slots__ = ("phases",)

    def __setattr__(self, name: str, value: object) -> None:
        if name == "phase":
            super().__setattr__("phases", [*getattr(self, "phases", ()), value])
        super().__setattr__(name, value)


class Scene:
    """A client with or without a backlog, its traced connection, and its raw partner.

    `kind` is the encoding of the client. A WebSocket client has closing bytes. The sockets are
    unix sockets: what their buffers refuse once, they refuse until the client reads.
    """

    def __init__(self, loop: Loop, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
        monkeypatch.setattr(transit_relay, "Connection", TracedConnection)
        self.loop = loop
        self.monkeypatch = monkeypatch
        self.kind = kind
        partner, self.client = loop.meet("unix", kind)
        assert isinstance(self.client.conn, TracedConnection) and partner.conn is not None
        self.conn = self.client.conn
        self.partner = partner.sock
        shrink_buffers(self.client.sock, self.conn.sock, self.partner, partner.conn.sock)
        self.has_client_ended = False

    def queue(self) -> None:
        """Have a backlog for the client."""
        stuff(self.loop, self.partner, self.conn)

    def end_client(self) -> None:
        """Let the client send its end. (A Close frame is no end of the socket.)"""
        self.client.sock.shutdown(socket.SHUT_WR)
        self.has_client_ended = True
        self.loop.pump()

    def read(self) -> bytes:
        """Let the client read until the backlog is flushed, and then what is there."""
        got = bytearray()
        self.client.sock.setblocking(False)
        deadline = time.monotonic() + TIMEOUT
        while self.conn.queued_bytes() or self._is_readable():
            self.loop.pump()
            assert time.monotonic() < deadline
            with contextlib.suppress(BlockingIOError):
                part = self.client.sock.recv(1 << 16)
                got += part
                if not part:
                    break
        self.client.sock.settimeout(TIMEOUT)
        return bytes(got)

    def _is_readable(self) -> bool:
        self.loop.pump()
        return bool(select.select([self.client.sock], [], [], 0)[0])

    def pass_time(self, seconds: int, unacknowledged: int | None) -> None:
        """Let time pass. The kernel reports so many unacknowledged bytes meanwhile."""
        with self.monkeypatch.context() as patch:
            patch.setattr(transit_relay, "unacknowledged_bytes", lambda sock: unacknowledged)
            for _ in range(seconds + 2):  # it is asked once a second
                self.loop.advance(1)

    def closing_bytes(self) -> bytes:
        is_raw = self.kind == "unix"
        return b"" if is_raw else frame(CLOSE, close_payload(1000), key=None)


# The events, by their names in the table.
EVENTS: dict[str, Callable[[Scene], object]] = {
    "finish": lambda scene: (
        scene.conn.session.client_ended(),  # the Session orders `finish`, if it has not yet
        scene.conn.finish(Reason.ENDED),
    ),
    "flushed": lambda scene: scene.read(),
    "flushed, peer had ended": lambda scene: (scene.end_client(), scene.read()),
    "peer ended": lambda scene: scene.end_client(),
    "5 s since acknowledged": lambda scene: scene.pass_time(5, unacknowledged=0),
    "60 s, nothing reported": lambda scene: scene.pass_time(60, unacknowledged=None),
    "doom": lambda scene: (scene.conn.doom(), scene.loop.pump()),
}

# Ways into each phase: whether there is a backlog, and the events.
WAYS: dict[str, tuple[Phase, bool, list[str]]] = {
    "open": (Phase.OPEN, False, []),
    "open, with a backlog": (Phase.OPEN, True, []),
    "flushing": (Phase.FLUSHING, True, ["finish"]),
    "flushing, peer ended": (Phase.FLUSHING, True, ["finish", "peer ended"]),
    "lingering, at once": (Phase.LINGERING, False, ["finish"]),
    "lingering, flushed": (Phase.LINGERING, True, ["finish", "flushed"]),
    "closed by the peer": (Phase.CLOSED, False, ["finish", "peer ended"]),
    "closed by doom": (Phase.CLOSED, True, ["doom"]),
}


@pytest.fixture(params=["unix", "ws-unix"])
def scene(request: pytest.FixtureRequest, loop: Loop, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(loop, monkeypatch, request.param)


def enter(scene: Scene, way: str) -> None:
    """Bring the connection into its phase, in this way."""
    phase, has_backlog, events = WAYS[way]
    if has_backlog:
        scene.queue()
    for event in events:
        EVENTS[event](scene)
    assert scene.conn.phase is phase


class Row(NamedTuple):
    """A row of the table in Connection's docstring."""

    phase: str
    event: str
    next: str
    done: str


TABLE = [Row(*cells) for cells in docstring_table(Connection)]
LISTED = {(row.phase, row.event) for row in TABLE}


def rows_for(way: str) -> list[Row]:
    """Return the rows that apply to a connection which came in this way."""
    phase, has_backlog, events = WAYS[way]
    return [
        row
        for row in TABLE
        if row.phase in (phase.value, "any")
        and phase is not Phase.CLOSED
        # The two rows of `flushed` differ in what the peer did before.
        and not (row.event == "flushed" and "peer ended" in events)
        # Without a backlog, `finish` is followed by `flushed` at once: see below.
        and not (row.event == "finish" and not has_backlog)
    ]


def test_the_table_is_read_whole() -> None:
    assert len(TABLE) == len(LISTED) == 8
    assert {row.event for row in TABLE} == set(EVENTS)
    assert {row.phase for row in TABLE} == {"any", *(phase.value for phase in Phase)} - {"closed"}
    assert {row.next for row in TABLE} == {phase.value for phase in Phase} - {"open"}
    executed = {row for way in WAYS for row in rows_for(way)}
    assert executed == set(TABLE)


@pytest.mark.parametrize(
    ("way", "row"),
    [pytest.param(way, row, id=f"{way}-{row.event}") for way in WAYS for row in rows_for(way)],
)
def test_listed(scene: Scene, way: str, row: Row) -> None:
    conn = scene.conn
    enter(scene, way)
    backlog = scene.conn.queued_bytes()
    before = list(conn.phases)
    EVENTS[row.event](scene)
    entered = [Phase(row.next)] if row.next != row.phase else []
    assert conn.phase is Phase(row.next)
    assert conn.phases == before + entered
    if row.done == "the closing bytes are queued":
        assert conn.queued_bytes() == backlog + len(scene.closing_bytes())
    elif row.done == "our end is sent":
        assert scene.client.sock.recv(1) == b""
    elif row.done == "the backlog is discarded":
        assert conn.backlog is None
    else:
        assert row.done == "-"
    is_closed = row.next == "closed"
    assert (conn not in scene.loop.server.connections) == (conn.sock.fileno() < 0) == is_closed


@pytest.mark.parametrize(
    ("way", "event"),
    [
        pytest.param(way, event, id=f"{way}-{event}")
        for way, (phase, has_backlog, _) in WAYS.items()
        for event in EVENTS
        if not {(phase.value, event), ("any", event)} & LISTED
        # An open connection's Session answers the end of its peer with `finish`: see below.
        and not (phase is Phase.OPEN and event in ("peer ended", "flushed, peer had ended"))
        # These two need a backlog, and the peer's end alone is an event while lingering.
        and (has_backlog or not event.startswith("flushed"))
        and not (phase is Phase.LINGERING and event == "flushed, peer had ended")
    ],
)
def test_not_listed(scene: Scene, way: str, event: str) -> None:
    enter(scene, way)
    before = list(scene.conn.phases)
    if scene.conn.phase is not Phase.CLOSED:
        EVENTS[event](scene)
    elif event not in ("flushed", "flushed, peer had ended", "peer ended"):  # no socket any more
        EVENTS[event](scene)
        scene.conn.on_ready(BOTH)
        scene.conn._server.bulk.move(scene.conn, BOTH)
    assert scene.conn.phases == before


def test_without_a_backlog_finish_and_flushed_happen_at_once(scene: Scene) -> None:
    EVENTS["finish"](scene)
    assert scene.conn.phases == [Phase.OPEN, Phase.FLUSHING, Phase.LINGERING]
    assert scene.read() == scene.closing_bytes()
    assert scene.client.sock.recv(1) == b""


@pytest.mark.parametrize("has_backlog", [False, True])
def test_the_end_of_an_open_connections_peer_is_answered_with_finish(
    scene: Scene, has_backlog: bool
) -> None:
    if has_backlog:
        scene.queue()
    EVENTS["peer ended"](scene)
    assert scene.conn.phases[:2] == [Phase.OPEN, Phase.FLUSHING]
    assert (scene.conn.phase is Phase.CLOSED) == (not has_backlog)
    scene.read()
    assert scene.conn.phases == [Phase.OPEN, Phase.FLUSHING, Phase.CLOSED]


def test_a_second_finish_changes_nothing(scene: Scene) -> None:
    EVENTS["finish"](scene)
    scene.conn.finish(Reason.STOPPING)
    assert scene.conn.phases == [Phase.OPEN, Phase.FLUSHING, Phase.LINGERING]


# The fields that a reload carries.

NOT_CARRIED: dict[type, set[str]] = {
    Session: {"ended_pair", "pair", "rendezvous", "transport"},
    transit_relay.Pair: {"_flows", "_relayed", "sessions"},
    Connection: {
        *("_server", "counted_bytes", "is_unpolled", "mask", "sock"),
        *("backlog", "framing"),  # place_connection carries these
    },
    **{
        framing: {"_session", "_transport"}
        for framing in (
            *(Framing, RawFraming, DetectFraming, ProxyFraming, HttpFraming, WebSocketFraming),
            StatusFraming,
        )
    },
}


@pytest.mark.parametrize("noun", NOT_CARRIED, ids=lambda noun: noun.__name__)
def test_each_field_is_carried_over_a_reload_or_follows_from_others(noun: type) -> None:
    """A new field must be added to CARRIED, or to the list above."""
    slots = [slot for base in noun.__mro__ for slot in getattr(base, "__slots__", ())]
    assert len(slots) == len(set(slots)), "a field is defined twice"
    assert sorted(slots) == sorted([*noun.CARRIED, *NOT_CARRIED[noun]])  # type: ignore[attr-defined]


# Backlog and backpressure.


@SOCKETS
def test_while_bytes_are_queued_the_partner_is_not_read(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    read_bytes = pair.conn_a.read_bytes
    with contextlib.suppress(BlockingIOError):
        pair.a.setblocking(False)
        pair.a.send(b"more")
    loop.pump()
    assert pair.conn_a.read_bytes == read_bytes


@SOCKETS
def test_when_the_backlog_is_sent_the_partner_is_read_again(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    sent = stuff(loop, pair.a, pair.conn_b)
    got = exchange(loop, {pair.a: b"the rest"}, {pair.b: len(sent) + 8})
    assert digest(got[pair.b]) == digest(sent + b"the rest")


@SOCKETS
def test_a_backlog_does_not_stop_the_other_direction(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    pair.b.sendall(b"still here")
    loop.pump()
    assert pair.a.recv(100) == b"still here"


@SOCKETS
def test_both_directions_at_once_through_the_smallest_buffers(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    for sock in (pair.a, pair.b, pair.conn_a.sock, pair.conn_b.sock):
        # The kernel's minimum. (A smaller SO_RCVBUF makes TCP wait for its timers.)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    from_a, from_b = (random.Random(seed).randbytes(1 << 20) for seed in (1, 2))
    sending = {pair.a: from_a, pair.b: from_b}
    got = exchange(loop, sending, {pair.a: len(from_b), pair.b: len(from_a)})
    assert digest(got[pair.a]) == digest(from_b)
    assert digest(got[pair.b]) == digest(from_a)


@NO_ROOM
def test_a_kernel_without_room_loses_nothing(loop: Loop, number: int) -> None:
    pair = Pair(loop)
    with refusing(pair.conn_b, number):
        pair.a.sendall(b"all of it")
        loop.server.run_once(0)  # the first write fails
        assert pair.conn_b.queued_bytes() == 9
        loop.server.run_once(0)  # so does the write from the backlog
        assert pair.conn_b.queued_bytes() == 9
    assert pair.conn_b.phase is pair.conn_a.phase is Phase.OPEN
    loop.pump()
    pair.a.sendall(b", and more")
    loop.pump()
    assert pair.b.recv(100) == b"all of it, and more"


@NO_ROOM
def test_a_kernel_without_room_for_messages_loses_nothing(loop: Loop, number: int) -> None:
    """The same over WebSocket, where a header and its payload are one sendmsg."""
    one, other = loop.meet("ws", "ws")
    assert other.conn is not None
    with refusing(other.conn, number):
        one.send(b"all of it")
        for _ in range(3):
            loop.server.run_once(0)
        assert other.conn.queued_bytes() == 2 + 9
    assert other.receive(9) == b"all of it"


@NO_ROOM
def test_a_pipe_that_cannot_be_emptied_now_keeps_its_bytes(loop: Loop, number: int) -> None:
    """The write fails when a part of the bulk is sent already."""
    pair = Pair(loop, tcp=True)
    sent = stuff(loop, pair.a, pair.conn_b)
    with refusing(pair.conn_b, number):
        queued = pair.conn_b.queued_bytes()
        for _ in range(3):
            pair.conn_b.on_ready(EVENT_WRITE)
            pair.conn_b._server.bulk.move(pair.conn_b, EVENT_WRITE)
        assert pair.conn_b.queued_bytes() == queued
    got = exchange(loop, {}, {pair.b: len(sent)})
    assert digest(got[pair.b]) == digest(sent)


def test_readiness_without_bytes_changes_nothing(loop: Loop) -> None:
    pair = Pair(loop)
    pair.conn_a.on_ready(EVENT_READ)
    pair.conn_a._server.bulk.move(pair.conn_a, EVENT_READ)
    assert pair.conn_a.session.state is State.RELAYING


# A write that fails.


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ECONNRESET, errno.EIO, errno.ETIMEDOUT])
@pytest.mark.parametrize("queued", [False, True], ids=["at once", "from the backlog"])
def test_after_a_failed_write_nothing_more_is_sent(loop: Loop, queued: bool, number: int) -> None:
    """There must be no gap in what a client receives, even if its kernel recovers."""
    pair = Pair(loop)
    if queued:
        with refusing(pair.conn_b, errno.EAGAIN):
            pair.a.sendall(b"lost")
            loop.server.run_once(0)
            loop.server.run_once(0)
    with refusing(pair.conn_b, number):
        if not queued:
            pair.a.sendall(b"lost")
        for _ in range(3):
            loop.server.run_once(0)
    with contextlib.suppress(BrokenPipeError):  # the pair may have ended
        for _ in range(3):
            pair.a.sendall(b"behind the gap")
            loop.pump()
    loop.pump()
    assert read_to_end(pair.b) == read_to_end(pair.a) == b""
    assert loop.recorder.moods() == ["happy"]


@SOCKETS
@pytest.mark.parametrize("queued", [False, True], ids=["at once", "from the backlog"])
def test_a_failed_write_does_not_discard_what_the_client_sent(
    loop: Loop, tcp: bool, queued: bool
) -> None:
    pair = Pair(loop, tcp)
    if queued:
        stuff(loop, pair.a, pair.conn_b)
    else:
        pair.a.sendall(b"in vain")
    pair.b.sendall(b"last words")
    reset(pair.b)
    wait_for_hang_up(pair.conn_b)
    if queued:
        pair.conn_b.on_ready(EVENT_WRITE)
        pair.conn_b._server.bulk.move(pair.conn_b, EVENT_WRITE)
    else:
        pair.conn_a.on_ready(EVENT_READ)
        pair.conn_a._server.bulk.move(pair.conn_a, EVENT_READ)
    assert "write_failed" in repr(pair.conn_b)
    assert pair.conn_b.session.state is State.RELAYING
    assert receive(loop, pair.a) == b"last words"
    (record,) = loop.recorder.records
    assert record.mood == "happy"


@SOCKETS
def test_what_was_sent_before_a_reset_is_delivered(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    data = random.Random(1).randbytes(10_000)
    pair.a.sendall(data)
    until(lambda: unread_bytes(pair.conn_a.sock) == len(data))
    reset(pair.a)
    wait_for_hang_up(pair.conn_a)
    assert digest(receive(loop, pair.b)) == digest(data)


# Interest.


def newcomer(loop: Loop) -> Connection:
    return loop.connect_both()[1]


def waiting(loop: Loop) -> Connection:
    client, conn = loop.connect_both()
    client.sendall(handshake())
    return conn


def paired(loop: Loop) -> Connection:
    return Pair(loop).conn_a


def with_a_backlog(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    return pair.conn_b


def partner_has_a_backlog(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    return pair.conn_a


def both_have_backlogs(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    stuff(loop, pair.b, pair.conn_a)
    return pair.conn_a


def refused(loop: Loop) -> Connection:
    client, conn = loop.connect_both()
    client.sendall(b"junk\n")
    return conn


def flushing_at_a_stop(loop: Loop) -> Connection:
    conn = with_a_backlog(loop)
    loop.server.ending.stop()
    return conn


def partner_left_with_a_backlog(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    pair.b.shutdown(socket.SHUT_WR)
    return pair.conn_a


def left_with_a_backlog(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    pair.b.shutdown(socket.SHUT_WR)
    return pair.conn_b


def partner_cannot_be_written_to(loop: Loop) -> Connection:
    """Its partner is gone, but the partner's last bytes are not yet read."""
    pair = Pair(loop)
    stuff(loop, pair.b, pair.conn_a)
    with refusing(pair.conn_b, errno.EPIPE):
        pair.a.sendall(b"in vain")
        for _ in range(3):
            loop.server.run_once(0)
    assert pair.conn_a.session.state is State.RELAYING
    return pair.conn_a


@pytest.mark.parametrize(
    ("situation", "mask"),
    [
        (newcomer, EVENT_READ),
        (waiting, EVENT_READ),
        (paired, EVENT_READ),
        (with_a_backlog, BOTH),
        (partner_has_a_backlog, 0),
        (both_have_backlogs, EVENT_WRITE),
        (refused, EVENT_READ),
        (flushing_at_a_stop, BOTH),
        (partner_left_with_a_backlog, EVENT_READ),
        (left_with_a_backlog, EVENT_WRITE),
        (partner_cannot_be_written_to, EVENT_WRITE),
    ],
)
def test_interest(loop: Loop, situation: Callable[[Loop], Connection], mask: int) -> None:
    conn = situation(loop)
    loop.pump()
    assert conn.interest() == conn.mask == registered(loop, conn) == mask


@SOCKETS
def test_a_hang_up_of_a_client_that_is_not_read_does_not_keep_the_loop_busy(
    loop: Loop, tcp: bool
) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    reset(pair.a)
    wait_for_hang_up(pair.conn_a)
    assert loop.server._selector.select(0) == []


# The end.


@SOCKETS
def test_the_end_is_sent_after_the_backlog(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    sent = stuff(loop, pair.a, pair.conn_b)
    pair.a.shutdown(socket.SHUT_WR)
    loop.pump()
    assert digest(receive(loop, pair.b)) == digest(sent)


@SOCKETS
def test_a_client_that_ends_still_receives_its_backlog(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    sent = stuff(loop, pair.a, pair.conn_b)
    relayed = pair.conn_a.read_bytes - len(handshake("pair", "one"))
    pair.b.shutdown(socket.SHUT_WR)
    loop.pump()
    assert digest(receive(loop, pair.b)) == digest(sent[:relayed])


@SOCKETS
def test_a_pair_ends_when_the_client_that_stayed_has_everything(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    pair.a.shutdown(socket.SHUT_WR)
    loop.advance(1)
    assert loop.recorder.records == []
    receive(loop, pair.b)
    assert [record.total_time for record in loop.recorder.records] == [1.0]


def test_a_doomed_connection_is_neither_read_nor_written_to(loop: Loop) -> None:
    pair = Pair(loop)
    pair.a.sendall(b"too late")
    pair.conn_a.doom()
    pair.conn_a.on_ready(BOTH)
    pair.conn_a._server.bulk.move(pair.conn_a, BOTH)
    assert pair.conn_a.interest() == 0
    loop.pump()
    assert receive(loop, pair.b) == b""
    assert loop.server.connections == {pair.conn_b}


def test_doomed_twice_is_closed_once(loop: Loop) -> None:
    client, conn = loop.connect_both()
    conn.doom()
    conn.doom()
    loop.pump()
    assert conn.sock.fileno() == -1
    assert loop.recorder.moods() == ["empty"]
    assert read_to_end(client) == b""


# Lingering.


def lingering(loop: Loop, tcp: bool = False) -> tuple[socket.socket, Connection]:
    """Return a client that was refused, has read the answer, and has not closed."""
    client, conn = loop.connect_both(tcp)
    client.sendall(b"junk\n")
    loop.pump()
    assert read_to_end(client) == BAD_HANDSHAKE
    until(lambda: not unacknowledged_bytes(conn.sock))
    return client, conn


def assert_lingers_for(loop: Loop, conn: Connection, seconds: int) -> None:
    """Check that it is open for so long from now, and for at most two seconds more.

    Acknowledgements are read once a second.
    """
    for _ in range(seconds - 1):
        loop.advance(1)
        assert conn in loop.server.connections
    for _ in range(3):
        loop.advance(1)
    assert conn not in loop.server.connections
    assert conn.sock.fileno() == -1


@SOCKETS
def test_lingers_until_the_peers_end_and_discards_what_it_sends(loop: Loop, tcp: bool) -> None:
    client, conn = loop.connect_both(tcp)
    flood = b"junk\n" + b"x" * (1 << 20)
    assert exchange(loop, {client: flood}, {client: None})[client] == BAD_HANDSHAKE
    assert conn in loop.server.connections
    client.shutdown(socket.SHUT_WR)
    loop.pump()
    assert conn not in loop.server.connections
    assert loop.recorder.moods() == ["errory"]


@SOCKETS
def test_no_answer_while_lingering(loop: Loop, tcp: bool) -> None:
    client, _ = lingering(loop, tcp)
    client.sendall(b"junk\n" + handshake())
    loop.pump()
    partner = loop.connect(tcp)
    partner.sendall(handshake())
    loop.pump()
    assert loop.server.snapshot().current().waiting_tokens == 1
    assert client.recv(1) == b""


@SOCKETS
def test_lingers_for_five_seconds_from_the_last_acknowledgement(loop: Loop, tcp: bool) -> None:
    _, conn = lingering(loop, tcp)
    assert_lingers_for(loop, conn, 5)


@SOCKETS
def test_lingers_as_long_as_bytes_are_not_acknowledged(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    pair.conn_b.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    pair.b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
    data = random.Random(1).randbytes(100_000)  # the relay's kernel accepts it, b's does not
    exchange(loop, {pair.a: data}, {})
    pair.a.shutdown(socket.SHUT_WR)
    loop.pump()
    assert pair.conn_b.backlog is None
    for _ in range(100):
        loop.advance(1)
        assert loop.server.connections == {pair.conn_b}
    assert digest(receive(loop, pair.b)) == digest(data)
    until(lambda: not unacknowledged_bytes(pair.conn_b.sock))
    assert_lingers_for(loop, pair.conn_b, 5)


def test_lingers_for_a_minute_where_acknowledgements_are_not_reported(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transit_relay, "unacknowledged_bytes", lambda sock: None)
    client, conn = loop.connect_both()
    client.sendall(b"junk\n")
    loop.pump()
    assert_lingers_for(loop, conn, 60)


# Urgent bytes, and texts without anything about a client.


def test_an_urgent_byte_stays_in_its_place(loop: Loop) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    loop.restart(Listener(listening, Endpoint("tcp", "tcp")))
    client = socket.create_connection(listening.getsockname())
    loop.pump()
    partner = loop.connect()
    with client:
        client.sendall(handshake())
        loop.pump()
        partner.sendall(handshake())
        loop.pump()
        client.sendall(b"before ")
        client.send(b"!", socket.MSG_OOB)
        client.sendall(b" after")
        client.shutdown(socket.SHUT_WR)
        assert receive(loop, partner) == b"ok\nbefore ! after"


@SOCKETS
def test_repr_has_the_state_and_nothing_about_the_client(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    text = repr(pair.conn_b)
    assert text == (
        f"<Connection fd={pair.conn_b.fd} open relaying read write"
        f" queued={pair.conn_b.queued_bytes()}>"
    )
    assert repr(pair.conn_b.session) == "<Session relaying>"


def test_repr_has_the_flags_that_are_set(scene: Scene) -> None:
    scene.queue()
    EVENTS["peer ended"](scene)
    assert repr(scene.conn).endswith(f" queued={scene.conn.queued_bytes()} peer_ended>")


def test_a_pair_of_two_clients_that_cannot_be_written_to_ends_at_once(loop: Loop) -> None:
    """The first `ok` ends the pair, before the other session could begin."""
    waiting, newcomer = loop.connect_both(tcp=True), loop.connect_both(tcp=True)
    waiting[0].sendall(handshake("t", "one"))
    loop.pump()
    newcomer[1]._write_failed = True
    newcomer[0].sendall(handshake("t", "other"))
    loop.wait_for_arrivals()
    with pytest.MonkeyPatch.context() as patch:
        broken = Failing(waiting[1].sock, "send", OSError(errno.EPIPE, "broken"))
        patch.setattr(waiting[1], "sock", broken)
        loop.server.run_once(0)
    loop.pump()
    assert loop.server.faults.count == 0
    assert loop.recorder.moods() == ["happy"]
