"""How one socket's bytes move: backlog, interest, broken writes, the end, and holding."""

from __future__ import annotations

import contextlib
import errno
import random
import select
import socket
import time
from collections.abc import Callable, Iterator
from selectors import EVENT_READ, EVENT_WRITE

import pytest
from helpers import TIMEOUT, Loop, digest, handshake, read_to_end, reset, wait_for_hang_up

import transit_relay
from transit_relay import (
    BAD_HANDSHAKE,
    Connection,
    Listener,
    State,
    unacknowledged_bytes,
    unread_bytes,
)

BOTH_WAYS = True  # copied and spliced, see conftest.py
BOTH = EVENT_READ | EVENT_WRITE
SOCKETS = pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])


class Pair:
    """Two clients that have met, and the relay's ends of them. Buffers are small."""

    def __init__(self, loop: Loop, tcp: bool = False) -> None:
        (self.a, self.conn_a), (self.b, self.conn_b) = (loop.connect_both(tcp) for _ in range(2))
        for client, side in ((self.a, "one"), (self.b, "other")):
            client.sendall(handshake("pair", side))
            loop.pump()
        assert self.a.recv(100) == self.b.recv(100) == b"ok\n"
        for sock in (self.a, self.b, self.conn_a.sock, self.conn_b.sock):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)


def stuff(loop: Loop, sender: socket.socket, receiver: Connection) -> bytes:
    """Send to one who does not read, until the relay must queue. Gives all that was sent."""
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
    """Clients send and read at once: so many bytes each, or (None) until the relay's end."""
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
    """Everything until the relay's end, while the relay goes on working."""
    return exchange(loop, {}, {client: None})[client]


def until(condition: Callable[[], object]) -> None:
    """Wait for something of the kernel's that no select tells."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline


def registered(loop: Loop, conn: Connection) -> int:
    """What the kernel's own epoll set says that we wait for."""
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
    """A socket whose next calls of one method raise."""

    def __init__(self, sock: socket.socket, method: str, error: OSError) -> None:
        self._sock, self._method, self._error = sock, method, error

    def __getattr__(self, name: str) -> object:
        if name == self._method:
            return self._fail
        return getattr(self._sock, name)

    def _fail(self, *_: object) -> int:
        raise self._error


# Backlog and backpressure.


@SOCKETS
def test_while_bytes_are_queued_the_partner_is_not_read(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    taken = pair.conn_a.session.received_bytes
    with contextlib.suppress(BlockingIOError):
        pair.a.setblocking(False)
        pair.a.send(b"more")
    loop.pump()
    assert pair.conn_a.session.received_bytes == taken


@SOCKETS
def test_when_the_backlog_is_sent_the_partner_is_read_again(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    sent = stuff(loop, pair.a, pair.conn_b)
    got = exchange(loop, {pair.a: b"the rest"}, {pair.b: len(sent) + 8})
    assert digest(got[pair.b]) == digest(sent + b"the rest")


@SOCKETS
def test_the_other_direction_goes_on_while_one_is_stuffed(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    pair.b.sendall(b"still here")
    loop.pump()
    assert pair.a.recv(100) == b"still here"


@SOCKETS
def test_both_directions_at_once_through_the_smallest_buffers(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    for sock in (pair.a, pair.b, pair.conn_a.sock, pair.conn_b.sock):
        # The kernel's least. (A smaller SO_RCVBUF makes TCP wait for its timers.)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    from_a, from_b = (random.Random(seed).randbytes(1 << 20) for seed in (1, 2))
    sending = {pair.a: from_a, pair.b: from_b}
    got = exchange(loop, sending, {pair.a: len(from_b), pair.b: len(from_a)})
    assert digest(got[pair.a]) == digest(from_b)
    assert digest(got[pair.b]) == digest(from_a)


@contextlib.contextmanager
def refusing(conn: Connection, error: OSError) -> Iterator[None]:
    """What is sent to this one fails for a while, copied or spliced."""
    splice = transit_relay.splice

    def refuse(source: int, target: int, *others: object) -> int:
        if target == conn.fd:
            raise error
        assert splice is not None
        return splice(source, target, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conn, "sock", Failing(conn.sock, "send", error))
        patch.setattr(transit_relay, "splice", refuse)
        yield


def test_a_kernel_that_takes_nothing(loop: Loop) -> None:
    pair = Pair(loop)
    with refusing(pair.conn_b, BlockingIOError()):
        pair.a.sendall(b"all of it")
        loop.server.run_once(0)  # to send fails
        assert pair.conn_b.queued_bytes() == 9
        loop.server.run_once(0)  # to drain fails
        assert pair.conn_b.queued_bytes() == 9
    loop.pump()
    assert pair.b.recv(100) == b"all of it"


@pytest.mark.parametrize("queued", [False, True], ids=["at once", "from the backlog"])
def test_where_something_is_lost_nothing_more_is_sent(loop: Loop, queued: bool) -> None:
    """There must be no gap in what a client gets, whatever its kernel says later."""
    pair = Pair(loop)
    if queued:
        with refusing(pair.conn_b, BlockingIOError()):
            pair.a.sendall(b"lost")
            loop.server.run_once(0)
    with refusing(pair.conn_b, OSError(errno.ENOBUFS, "no memory")):
        if not queued:
            pair.a.sendall(b"lost")
        loop.server.run_once(0)
    for _ in range(3):
        pair.a.sendall(b"behind the gap")
        loop.pump()
    pair.a.shutdown(socket.SHUT_WR)
    loop.pump()
    assert read_to_end(pair.b) == b""


def test_readable_but_nothing_there(loop: Loop) -> None:
    pair = Pair(loop)
    pair.conn_a.on_ready(EVENT_READ)
    assert pair.conn_a.session.state is State.RELAYING


# A write that fails.


@SOCKETS
@pytest.mark.parametrize("queued", [False, True], ids=["at once", "from the backlog"])
def test_a_failed_write_is_not_the_end_of_what_was_sent(
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
    else:
        pair.conn_a.on_ready(EVENT_READ)
        pair.conn_a.on_bulk_turn()
    assert "broken" in repr(pair.conn_b)
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


def told_to_go(loop: Loop) -> Connection:
    client, conn = loop.connect_both()
    client.sendall(b"junk\n")
    return conn


def told_to_go_with_a_backlog(loop: Loop) -> Connection:
    conn = with_a_backlog(loop)
    loop.server.stop()
    return conn


def partner_left_it_had_a_backlog(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    pair.b.shutdown(socket.SHUT_WR)
    return pair.conn_a


def left_with_a_backlog(loop: Loop) -> Connection:
    pair = Pair(loop)
    stuff(loop, pair.a, pair.conn_b)
    pair.b.shutdown(socket.SHUT_WR)
    return pair.conn_b


@pytest.mark.parametrize(
    ("situation", "mask"),
    [
        (newcomer, EVENT_READ),
        (waiting, EVENT_READ),
        (paired, EVENT_READ),
        (with_a_backlog, BOTH),
        (partner_has_a_backlog, 0),
        (both_have_backlogs, EVENT_WRITE),
        (told_to_go, EVENT_READ),
        (told_to_go_with_a_backlog, BOTH),
        (partner_left_it_had_a_backlog, EVENT_READ),
        (left_with_a_backlog, EVENT_WRITE),
    ],
)
def test_interest(loop: Loop, situation: Callable[[Loop], Connection], mask: int) -> None:
    conn = situation(loop)
    loop.pump()
    assert conn.interest() == conn.mask == registered(loop, conn) == mask


@SOCKETS
def test_who_hangs_up_while_not_read_does_not_keep_the_loop_busy(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    reset(pair.a)
    wait_for_hang_up(pair.conn_a)
    assert loop.server._selector.select(0) == []


# The end.


@SOCKETS
def test_the_end_comes_behind_what_is_queued(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    sent = stuff(loop, pair.a, pair.conn_b)
    pair.a.shutdown(socket.SHUT_WR)
    loop.pump()
    assert digest(receive(loop, pair.b)) == digest(sent)


@SOCKETS
def test_who_ends_is_still_given_what_was_read_for_it(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    sent = stuff(loop, pair.a, pair.conn_b)
    taken = pair.conn_a.session.received_bytes
    pair.b.shutdown(socket.SHUT_WR)
    loop.pump()
    assert digest(receive(loop, pair.b)) == digest(sent[:taken])


@SOCKETS
def test_the_pair_is_over_when_the_one_that_stayed_has_all(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    pair.a.shutdown(socket.SHUT_WR)
    loop.advance(1)
    assert loop.recorder.records == []
    receive(loop, pair.b)
    assert [record.total_time for record in loop.recorder.records] == [1.0]


def test_dead_means_deaf_and_dumb(loop: Loop) -> None:
    pair = Pair(loop)
    pair.a.sendall(b"too late")
    loop.server.doom(pair.conn_a)
    pair.conn_a.on_ready(BOTH)
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


# Holding.


def held(loop: Loop, tcp: bool = False) -> tuple[socket.socket, Connection]:
    """One who was told to go, has read it, and has not gone."""
    client, conn = loop.connect_both(tcp)
    client.sendall(b"junk\n")
    loop.pump()
    assert read_to_end(client) == BAD_HANDSHAKE
    until(lambda: not unacknowledged_bytes(conn.sock))
    return client, conn


def assert_held_for(loop: Loop, conn: Connection, seconds: int) -> None:
    """From now on, and for at most two more: it is looked at once a second."""
    for _ in range(seconds - 1):
        loop.advance(1)
        assert conn in loop.server.connections
    for _ in range(3):
        loop.advance(1)
    assert conn not in loop.server.connections
    assert conn.sock.fileno() == -1


@SOCKETS
def test_held_until_its_end_whatever_it_still_sends(loop: Loop, tcp: bool) -> None:
    client, conn = loop.connect_both(tcp)
    flood = b"junk\n" + b"x" * (1 << 20)
    assert exchange(loop, {client: flood}, {client: None})[client] == BAD_HANDSHAKE
    assert conn in loop.server.connections
    client.shutdown(socket.SHUT_WR)
    loop.pump()
    assert conn not in loop.server.connections
    assert loop.recorder.moods() == ["errory"]


@SOCKETS
def test_never_answered_while_held(loop: Loop, tcp: bool) -> None:
    client, _ = held(loop, tcp)
    client.sendall(b"junk\n" + handshake())
    loop.pump()
    partner = loop.connect(tcp)
    partner.sendall(handshake())
    loop.pump()
    assert loop.server.snapshot().current().waiting_tokens == 1
    assert client.recv(1) == b""


@SOCKETS
def test_held_for_five_seconds_from_the_last_acknowledgement(loop: Loop, tcp: bool) -> None:
    _, conn = held(loop, tcp)
    assert_held_for(loop, conn, 5)


@SOCKETS
def test_held_however_long_while_its_kernel_has_not_all(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    pair.conn_b.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    data = random.Random(1).randbytes(100_000)  # the relay's kernel takes it, b's does not
    exchange(loop, {pair.a: data}, {})
    pair.a.shutdown(socket.SHUT_WR)
    loop.pump()
    assert pair.conn_b.backlog is None
    for _ in range(100):
        loop.advance(1)
        assert loop.server.connections == {pair.conn_b}
    assert digest(receive(loop, pair.b)) == digest(data)
    until(lambda: not unacknowledged_bytes(pair.conn_b.sock))
    assert_held_for(loop, pair.conn_b, 5)


def test_held_for_a_minute_where_nobody_can_tell(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transit_relay, "unacknowledged_bytes", lambda sock: None)
    client, conn = loop.connect_both()
    client.sendall(b"junk\n")
    loop.pump()
    assert_held_for(loop, conn, 60)


# In its place, and in private.


def test_an_urgent_byte_stays_in_its_place(loop: Loop) -> None:
    with contextlib.closing(Listener(socket.create_server(("127.0.0.1", 0)), "")) as listener:
        client = socket.create_connection(listener.sock.getsockname())
        assert select.select([listener.sock], [], [], TIMEOUT)[0]
        loop.server.admit(listener.sock.accept()[0])
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
def test_repr_tells_how_it_goes_but_not_who_it_is(loop: Loop, tcp: bool) -> None:
    pair = Pair(loop, tcp)
    stuff(loop, pair.a, pair.conn_b)
    text = repr(pair.conn_b)
    assert text == (
        f"<Connection fd={pair.conn_b.fd} relaying read=on write=on"
        f" queued={len(pair.conn_b.backlog)}>"
    )
    assert repr(pair.conn_b.session) == "<Session relaying received_bytes=0>"
