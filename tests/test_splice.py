"""Bulk: when it is spliced, and when copied; the pool of pipes; the bulk queue and its turns."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO
from selectors import EVENT_READ, EVENT_WRITE

import pytest
from helpers import (
    RELAY,
    TIMEOUT,
    FakeClock,
    Loop,
    RelayProcess,
    digest,
    handshake,
    is_readable,
    receive,
    reset,
)
from invariants import check_pipe, check_pool, check_server
from processes import patched

import transit_relay
from transit_relay import (
    BULK_BYTES,
    MAX_IDLE_PIPES,
    MAX_PIPES,
    MAX_POLLED_BULK,
    PIPE_BYTES,
    PIPES_PAUSE_SECONDS,
    TURN_BULK_SECONDS,
    BulkQueue,
    Connection,
    Pipe,
    PipePool,
    affordable_pipes,
)

F_GETPIPE_SZ = 1032  # fcntl.h of Linux; Python 3.9 has no name for it
BULK = random.Random(1).randbytes(8 * BULK_BYTES)

needs_splice = pytest.mark.skipif(
    transit_relay.splice is None, reason="Python has os.splice from 3.10 on"
)


# The pool. Its pipes need no splice.


def fill(pipe: Pipe, data: bytes = b"left behind") -> None:
    """Write bytes into a pipe, as if they had been spliced."""
    os.write(pipe._write_fd, data)
    pipe._filled = len(data)


@pytest.fixture
def pool() -> Iterator[PipePool]:
    """Return a pool that may have twelve pipes. At the end no pipe is left open."""
    before = set(os.listdir("/proc/self/fd"))
    pool = PipePool(12, FakeClock(0))
    yield pool
    pool.close_idle()
    assert set(os.listdir("/proc/self/fd")) == before


def lend_all(pool: PipePool) -> list[Pipe]:
    """Return all pipes that the pool lends."""
    pipes = []
    while (pipe := pool.lend()) is not None:
        pipes.append(pipe)
    return pipes


def test_the_pool_lends_no_more_than_its_maximum(pool: PipePool) -> None:
    pipes = lend_all(pool)
    assert len(pipes) == 12
    pool.give_back(pipes[0])
    assert pool.lend() is pipes[0] and pool.lend() is None
    for pipe in pipes:
        pool.give_back(pipe)
    check_pool(pool, [])


def test_a_pool_of_no_pipes_lends_none() -> None:
    assert PipePool(0).lend() is None


def test_some_idle_pipes_are_kept(pool: PipePool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for pipe in lend_all(pool):
        pool.give_back(pipe)
    assert len(os.listdir("/proc/self/fd")) - before == 2 * MAX_IDLE_PIPES


def test_a_pipe_with_bytes_in_it_is_never_lent_again(pool: PipePool) -> None:
    used = pool.lend()
    assert used is not None
    fill(used)
    pool.give_back(used)
    others = lend_all(pool)
    assert len(others) == 12 and used not in others
    for pipe in others:
        check_pipe(pipe)  # empty, for the kernel too
        pool.give_back(pipe)


def test_a_pipe_is_filled_only_when_it_is_empty(pool: PipePool) -> None:
    pipe = pool.lend()
    assert pipe is not None
    fill(pipe)
    with socket.socket() as sock, pytest.raises(AssertionError):
        pipe.fill(sock)
    pool.give_back(pipe)


@pytest.mark.parametrize("trouble", ["small", "refused"])
def test_after_a_refused_or_small_pipe_none_is_made_for_a_minute(
    pool: PipePool, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    asked = []
    real = os.pipe

    def pipe() -> tuple[int, int]:
        asked.append(1)
        if trouble == "refused":
            raise OSError(errno.EMFILE, "no more")
        return real()

    with monkeypatch.context() as patch:
        patch.setattr(os, "pipe", pipe)
        patch.setattr(transit_relay, "F_SETPIPE_SZ", F_GETPIPE_SZ)  # it stays small
        assert pool.lend() is None and pool.lend() is None
        assert len(asked) == 1
        pool._clock.now += PIPES_PAUSE_SECONDS - 1
        assert pool.lend() is None and len(asked) == 1
        pool._clock.now += 1
        assert pool.lend() is None and len(asked) == 2
    pool._clock.now += PIPES_PAUSE_SECONDS
    pipe = pool.lend()
    assert pipe is not None
    pool.give_back(pipe)


@needs_splice
@pytest.mark.parametrize(
    ("pages", "most"),
    [
        (b"16384\n", MAX_PIPES),  # the default
        (b"1000000\n", MAX_PIPES),
        (b"0\n", MAX_PIPES),  # no limit
        (None, MAX_PIPES),  # not readable: the default is assumed
        (b"1024\n", 2),
        (b"511\n", 0),
    ],
)
def test_the_relay_uses_half_of_a_users_pipes(
    monkeypatch: pytest.MonkeyPatch, pages: bytes | None, most: int
) -> None:
    def read(path: str, mode: str) -> BytesIO:
        assert (path, mode) == ("/proc/sys/fs/pipe-user-pages-soft", "rb")
        if pages is None:
            raise FileNotFoundError(errno.ENOENT, "hidden")
        return BytesIO(pages)

    monkeypatch.setattr(transit_relay, "open", read, raising=False)
    monkeypatch.setattr(transit_relay.resource, "getpagesize", lambda: 4096)
    assert affordable_pipes() == most


def test_no_pipes_where_there_is_no_splice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transit_relay, "splice", None)
    assert affordable_pipes() == 0


ORDINARY_USER = """\
import fcntl, os, sys
sys.path.insert(0, sys.argv[1])
import transit_relay as t
clock = type("Clock", (), {"now": 0.0, "__call__": lambda self: self.now})()
if os.geteuid() == 0:
    os.setuid(54321)  # a user without other processes
pool = t.PipePool(t.MAX_PIPES, clock)
pipes = [pool.lend() for _ in range(t.MAX_PIPES)]
print("all lent:", None not in pipes)
for pipe in pipes:
    pool.give_back(pipe)
pool.close_idle()
print("all are large:", all(pipe.is_large for pipe in pipes))

others, granted = [], t.PIPE_BYTES
while granted == t.PIPE_BYTES:  # another process of this user
    others.append(os.pipe())
    try:
        granted = fcntl.fcntl(others[-1][1], t.F_SETPIPE_SZ, t.PIPE_BYTES)
    except PermissionError:
        granted = 0
print("small ones are refused:", pool.lend() is None)
for fds in others:
    os.close(fds[0]); os.close(fds[1])
print("none is made for a while:", pool.lend() is None)
clock.now += t.PIPES_PAUSE_SECONDS
print("one is made later:", pool.lend() is not None)
"""


def test_an_ordinary_user_may_have_all_pipes_of_the_pool() -> None:
    """The kernel's own limit. Root is exempt from it."""
    done = subprocess.run(
        [sys.executable, "-c", ORDINARY_USER, str(RELAY.parent)],
        capture_output=True,
        text=True,
        timeout=4 * TIMEOUT,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 5 and all(line.endswith(": True") for line in lines), done


@pytest.mark.parametrize("trouble", ["idle with bytes", "lent twice", "lost", "counted wrong"])
def test_the_self_check_notices(pool: PipePool, trouble: str) -> None:
    lent, idle = pool.lend(), pool.lend()
    assert lent is not None and idle is not None
    pool.give_back(idle)
    fill(lent)
    check_pool(pool, [lent])
    with pytest.MonkeyPatch.context() as patch, pytest.raises(AssertionError):
        if trouble == "idle with bytes":
            fill(idle)
        elif trouble == "lent twice":
            patch.setattr(pool, "_idle", [idle, lent])
        elif trouble == "lost":
            patch.setattr(pool, "_lent", 2)
        else:
            patch.setattr(lent, "_filled", 1)
        check_pool(pool, [lent])
    pool.give_back(lent)


# What is spliced, and what is copied.


class CountingPool(PipePool):
    """A pool that counts how often it is asked for a pipe."""

    asked = 0

    def lend(self) -> Pipe | None:
        self.asked += 1
        return super().lend()


def count_lent(loop: Loop) -> CountingPool:
    """Replace the loop's pool with a counting one."""
    loop.server.pipes = CountingPool(affordable_pipes(), loop.clock)
    return loop.server.pipes


def carry(loop: Loop, sender: socket.socket, receiver: socket.socket, data: bytes) -> None:
    """Relay `data`, which may be more than the kernel's buffers hold, and compare it."""
    rest, got = memoryview(data), bytearray()
    sender.setblocking(False)
    while len(got) < len(data):
        if rest and select.select([], [sender], [], 0)[1]:
            rest = rest[sender.send(rest) :]
        loop.pump()
        if select.select([receiver], [], [], 0)[0]:
            got += receiver.recv(1 << 20)
    sender.settimeout(TIMEOUT)
    assert digest(got) == digest(data)


@needs_splice
def test_short_messages_are_copied_and_bulk_is_spliced(loop: Loop) -> None:
    one, other = loop.pair(tcp=True)
    pool = count_lent(loop)
    for _ in range(100):
        carry(loop, one, other, b"x" * 1400)
    assert pool.asked == 0
    carry(loop, one, other, BULK)
    assert pool.asked > 0
    asked = pool.asked
    for _ in range(100):
        carry(loop, one, other, b"x" * 1400)
    assert pool.asked <= asked + 1  # only the first read is still taken for bulk


@needs_splice
@pytest.mark.parametrize(("first", "second"), [("tcp", "ws"), ("ws", "tcp"), ("ws", "ws")])
def test_bytes_of_a_websocket_are_never_spliced(loop: Loop, first: str, second: str) -> None:
    pool = count_lent(loop)
    for one, other in (loop.meet(first, second), loop.meet(second, first)):
        one.send(BULK)
        assert digest(other.receive(len(BULK))) == digest(BULK)
    assert pool.asked == 0


@needs_splice
def test_without_a_partner_nothing_is_spliced(loop: Loop) -> None:
    pool = count_lent(loop)
    for line in (handshake("waits"), b"junk\n"):
        client = loop.connect(tcp=True)
        client.sendall(line + BULK)
        loop.pump()
    assert pool.asked == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_where_splice_is_refused_all_bytes_are_copied(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refused = []

    def splice(*arguments: object) -> int:
        refused.append(arguments)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(transit_relay, "splice", splice)
    loop.server.pipes = PipePool(1)
    one, other = loop.pair(tcp=True)
    carry(loop, one, other, BULK)
    carry(loop, other, one, BULK)
    assert refused
    check_pool(loop.server.pipes, [])


@needs_splice
def test_bulk_is_copied_when_no_pipe_is_left(loop: Loop) -> None:
    loop.server.pipes = PipePool(1, loop.clock)
    first, second = loop.pair(tcp=True), loop.pair(tcp=True)
    backlogs = [stuff(loop, *pair) for pair in (first, second)]
    assert sorted(map(type, backlogs), key=str) == [bytearray, Pipe]


def stuff(loop: Loop, sender: socket.socket, receiver: socket.socket) -> bytearray | Pipe | None:
    """Send until the relay has a new backlog, and return that."""
    before = {conn for conn in loop.server.connections if conn.backlog is not None}
    sender.setblocking(False)
    while True:
        while select.select([], [sender], [], 0)[1]:
            sender.send(BULK)
        loop.pump()
        for conn in loop.server.connections - before:
            if conn.backlog is not None:
                return conn.backlog


# The bulk queue.


class Senders:
    """Pairs, each with a sender whose last read was bulk and from which bytes can be read."""

    def __init__(self, loop: Loop, count: int) -> None:
        self.loop = loop
        self.clients: list[socket.socket] = []
        self.conns: list[Connection] = []
        for number in range(count):
            (one, conn), (other, _) = loop.connect_both(tcp=True), loop.connect_both(tcp=True)
            for client, side in ((one, "one"), (other, "other")):
                client.sendall(handshake(str(number), side))
                loop.pump()
            self.clients.append(one)
            self.conns.append(conn)
        self.send()

    def send(self) -> None:
        """Let each of them send, as if it had sent bulk before."""
        self.begun = [conn.read_bytes for conn in self.conns]
        for client, conn in zip(self.clients, self.conns):
            client.sendall(b"something")
            conn.is_bulk = True
        self.loop.wait_for_arrivals()

    def moved(self) -> list[Connection]:
        """Return the senders that were read since the last `send`."""
        pairs = zip(self.conns, self.begun)
        return [conn for conn, begun in pairs if conn.read_bytes > begun]


def test_small_reads_do_not_wait_for_all_bulk(loop: Loop) -> None:
    senders = Senders(loop, 9)
    small = senders.conns[-1]
    small.is_bulk = False
    loop.server.run_once(0)
    moved = senders.moved()
    assert small in moved and len(moved) == 1 + 2


def test_bulk_moves_in_the_order_of_the_queue(loop: Loop) -> None:
    senders = Senders(loop, 8)
    queue = senders.conns[::-1]
    for conn in queue:
        loop.server.bulk.add(conn, EVENT_READ)
        loop.server.bulk.add(conn, EVENT_READ)  # twice makes no difference
    moved: list[Connection] = []
    while len(moved) < 8:
        loop.server.run_once(0)
        new = [conn for conn in queue if conn in senders.moved() and conn not in moved]
        assert new, "a turn in which no bulk moves"
        moved += new
    assert moved == queue


@pytest.mark.parametrize("turn_bytes", [1, 27])
def test_a_turn_of_bulk_is_bounded_by_bytes(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, turn_bytes: int
) -> None:
    senders = Senders(loop, 40)
    monkeypatch.setattr(transit_relay, "TURN_BULK_BYTES", turn_bytes)
    for turn in range(1, 5):
        loop.server.run_once(0)
        assert len(senders.moved()) == turn * ((turn_bytes + 8) // 9)


def test_a_turn_of_bulk_is_bounded_by_time(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    senders = Senders(loop, 40)
    real = BulkQueue.move

    def move(self: BulkQueue, conn: Connection, ready: int) -> int:
        loop.clock.advance(TURN_BULK_SECONDS / 3)
        return real(self, conn, ready)

    monkeypatch.setattr(BulkQueue, "move", move)
    for turn in range(1, 5):
        loop.server.run_once(0)
        # Rounding may make it one more.
        assert 3 * turn <= len(senders.moved()) <= 4 * turn


def test_a_move_of_bulk_can_empty_the_queue(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """A gateway closes other connections if it needs a descriptor for the client that it reads."""
    senders = Senders(loop, 8)  # two of them in a turn
    real = BulkQueue.move

    def move(self: BulkQueue, conn: Connection, ready: int) -> int:
        self.ready.clear()
        return real(self, conn, ready)

    monkeypatch.setattr(BulkQueue, "move", move)
    loop.server.run_once(0)
    assert len(senders.moved()) == 1
    assert loop.server.faults.count == 0


def test_a_long_bulk_queue_is_not_polled(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rest is polled, and each connection again when its bulk is moved."""
    senders = Senders(loop, MAX_POLLED_BULK + 4)
    monkeypatch.setattr(transit_relay, "TURN_BULK_BYTES", 1)  # one in a turn
    loop.server.run_once(0)
    check_server(loop.server)
    unpolled = [conn for conn in senders.conns if conn.is_unpolled]
    assert len(unpolled) == 4
    registered = loop.server._selector.get_map()
    for conn in senders.conns:
        is_polled = conn not in unpolled
        assert (conn.fd in registered) == is_polled == (conn.mask == EVENT_READ)
        assert conn in loop.server.bulk.ready or conn in senders.moved()
    events = {key.fd for key, _ in loop.server._selector.select(0)}
    assert not events & {conn.fd for conn in unpolled}
    for _ in range(len(senders.conns)):
        loop.server.run_once(0)
        check_server(loop.server)
    assert senders.moved() == senders.conns
    assert not any(conn.is_unpolled for conn in senders.conns)
    assert all(conn.mask == EVENT_READ for conn in senders.conns)
    senders.send()
    loop.pump()
    assert senders.moved() == senders.conns


def test_as_long_as_reads_are_large_a_connection_stays_unpolled(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the others have their turns meanwhile."""
    senders = Senders(loop, MAX_POLLED_BULK + 4)
    monkeypatch.setattr(transit_relay, "TURN_BULK_BYTES", 1)
    monkeypatch.setattr(transit_relay, "BULK_BYTES", 1)  # all reads are large
    receivers = len(senders.conns)
    for _ in range(receivers):
        loop.server.run_once(0)
        check_server(loop.server)
    assert senders.moved() == senders.conns
    assert any(conn.is_unpolled for conn in senders.conns)
    for _ in range(2 * receivers):  # their next reads find nothing
        loop.server.run_once(0)
        check_server(loop.server)
    assert not any(conn.is_unpolled for conn in senders.conns)
    assert not loop.server.bulk.ready


def test_a_backlog_is_flushed_while_its_connection_is_not_polled(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of many receivers begins to read at the same time."""
    monkeypatch.setattr(transit_relay, "MAX_POLLED_BULK", 1)
    monkeypatch.setattr(transit_relay, "TURN_BULK_BYTES", 1)
    pairs = [loop.pair() for _ in range(8)]
    for one, _ in pairs:
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                one.send(BULK)
                loop.pump()
    receivers = [conn for conn in loop.server.connections if conn.backlog is not None]
    assert len(receivers) == 8
    senders = [conn.partner for conn in receivers]
    for conn in receivers:
        assert conn.queued_bytes() >= BULK_BYTES
    unpolled: set[Connection] = set()
    for _ in range(100):
        for _, other in pairs:
            with contextlib.suppress(BlockingIOError):
                other.setblocking(False)
                other.recv(1 << 20)
        loop.server.run_once(0)
        check_server(loop.server)
        unpolled.update(conn for conn in receivers if conn.is_unpolled)
    assert len(unpolled) > 1
    assert not any(conn.backlog for conn in receivers)
    assert all(conn is not None and conn.mask == EVENT_READ for conn in senders)


def test_a_queued_connection_that_is_closed_leaves_the_queue(loop: Loop) -> None:
    senders = Senders(loop, 8)
    loop.server.run_once(0)
    assert len(loop.server.bulk.ready) == 6
    for conn in senders.conns:
        conn.doom()
    loop.server.reap()
    assert not set(senders.conns) & {*loop.server.connections, *loop.server.bulk.ready}
    loop.pump()
    assert len(senders.moved()) == 2


def test_a_connection_is_queued_once_for_both_events(loop: Loop) -> None:
    (conn,) = Senders(loop, 1).conns
    for ready in (EVENT_READ, EVENT_WRITE, EVENT_READ):
        loop.server.bulk.add(conn, ready)
    assert loop.server.bulk.ready == {conn: EVENT_READ | EVENT_WRITE}


def test_a_queued_connection_is_not_read_while_its_partner_has_a_backlog(loop: Loop) -> None:
    senders = Senders(loop, 1)
    (conn,) = senders.conns
    loop.server.bulk.add(conn, EVENT_READ)
    assert conn.partner is not None
    conn.partner._set_backlog(bytearray(b"x"))
    loop.server.bulk.move(conn, EVENT_READ)
    assert not senders.moved()


def test_the_loop_does_not_wait_while_bulk_is_queued(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conn,) = Senders(loop, 1).conns
    waited: list[object] = []
    monkeypatch.setattr(
        loop.server._selector, "select", lambda timeout: waited.append(timeout) or []
    )
    loop.server.bulk.add(conn, EVENT_READ)
    for _ in range(2):
        loop.server.run_once(60)
    assert waited == [0, 60]


# Bytes of one pair never reach another.

PERIOD = 65_521  # a prime: a lost or added block shifts everything after it


class Stream:
    """A pair, and the bytes that it sends: each pair and each position has different ones."""

    def __init__(self, one: socket.socket, other: socket.socket, seed: int) -> None:
        self.one, self.other = one, other
        self.sent = self.received = 0
        self._bytes = random.Random(seed).randbytes(PERIOD) * 5
        for sock in (one, other):
            sock.setblocking(False)

    def at(self, position: int, size: int) -> bytes:
        """Return the bytes at `position`."""
        start = position % PERIOD
        return self._bytes[start : start + size]

    def send(self, size: int) -> None:
        """Send some bytes, if they are accepted."""
        try:
            self.sent += self.one.send(self.at(self.sent, size))
        except BlockingIOError:
            pass

    def receive(self) -> int:
        """Read and compare some bytes. Return how many; -1 if none have come."""
        try:
            part = self.other.recv(4 * PERIOD)
        except BlockingIOError:
            return -1
        assert part == self.at(self.received, len(part)), f"wrong behind {self.received}"
        self.received += len(part)
        return len(part)

    def cut(self, chance: random.Random) -> None:
        """Close or reset both clients, in any order."""
        for sock in chance.sample([self.one, self.other], 2):
            if chance.random() < 0.7:
                reset(sock)
            else:
                sock.close()


Meet = Callable[[int], "tuple[socket.socket, socket.socket]"]


def cut_some_while_others_run(meet: Meet, turn: Callable[[], None]) -> None:
    """Run 64 pairs and compare each byte, while other pairs come and are cut.

    Some receivers are slow. The receivers of the pairs that are cut do not read at all, so that
    these pairs have bytes in the relay. Without care, their pipes would be lent to the others.
    """
    chance = random.Random(1)
    streams = [Stream(*meet(seed), seed) for seed in range(64)]
    victims: list[Stream] = []
    for number in range(150):
        if len(victims) < 8:
            victims.append(Stream(*meet(1000 + number), 1000 + number))
        if chance.random() < 0.5:
            victims.pop(chance.randrange(len(victims))).cut(chance)
        for stream in victims:
            for _ in range(8):
                stream.send(4 * PERIOD)
        for stream in chance.sample(streams, 12):
            stream.send(PERIOD)
        for stream in chance.sample(streams, 12):
            stream.receive()
        turn()
    for stream in victims:
        stream.cut(chance)
    for stream in streams:
        stream.one.shutdown(socket.SHUT_WR)
    left = set(streams)
    while left:
        turn()
        ready = select.select([stream.other for stream in left], [], [], 0)[0]
        left -= {one for one in left if one.other in ready and one.receive() == 0}
    assert [stream.received for stream in streams] == [stream.sent for stream in streams]
    assert sum(stream.received for stream in streams) > 64 * PIPE_BYTES
    for stream in streams:
        stream.one.close()
        stream.other.close()


@needs_splice
@pytest.mark.parametrize("most", [2, MAX_PIPES])
def test_bytes_of_a_cut_pair_never_reach_another(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The invariants are checked in each turn."""
    monkeypatch.setattr(transit_relay, "BULK_BYTES", 1)
    loop.server.pipes = PipePool(most, loop.clock)
    closed = []
    monkeypatch.setattr(Pipe, "close", closing(closed))

    def meet(seed: int) -> tuple[socket.socket, socket.socket]:
        one, other = loop.connect(tcp=True), loop.connect(tcp=True)
        for sock, side in ((one, "one"), (other, "other")):
            sock.sendall(handshake(str(seed), side))
        deadline = time.monotonic() + TIMEOUT
        while not (is_readable(one) and is_readable(other)):  # the other pairs go on meanwhile
            loop.server.run_once(0)
            assert time.monotonic() < deadline
        assert receive(one, 3) == receive(other, 3) == b"ok\n"
        return one, other

    def turn() -> None:
        for _ in range(4):
            loop.server.run_once(0)
        check_server(loop.server)

    cut_some_while_others_run(meet, turn)
    assert sum(left > 0 for left in closed) > 20, "few pairs were cut with bytes in a pipe"


def closing(closed: list[int]) -> Callable[[Pipe], None]:
    """Return a Pipe.close that notes how many bytes were in the pipe."""
    real = Pipe.close

    def close(pipe: Pipe) -> None:
        closed.append(len(pipe))
        real(pipe)

    return close


def test_bytes_of_a_cut_pair_never_reach_another_of_a_real_relay(
    relay: Callable[..., RelayProcess],
) -> None:
    running = relay(program=patched(BULK_BYTES=1))
    cut_some_while_others_run(lambda seed: running.pair(str(seed)), lambda: None)


# A relay as it is started.


def pipes_of(running: RelayProcess) -> int:
    """Return how many ends of pipes are open, those of the standard streams aside."""
    folder = f"/proc/{running.pid}/fd"
    links = {int(fd): os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder)}
    standard = {links[fd] for fd in range(3)}  # messages go to a second descriptor of one
    return sum(link.startswith("pipe:") and link not in standard for link in links.values())


@pytest.mark.parametrize("options", [(), ("--no-splice",)], ids=["default", "--no-splice"])
def test_a_relay_makes_pipes_when_there_is_bulk(
    relay: Callable[..., RelayProcess], options: tuple[str, ...]
) -> None:
    running = relay(*options)
    one, other = running.pair()
    with one, other, ExitStack() as undo:
        assert pipes_of(running) == 0
        os.set_blocking(one.fileno(), False)
        undo.callback(reset, one)
        while select.select([], [one], [], TIMEOUT / 10)[1]:
            one.send(BULK)
        is_spliced = not options and transit_relay.splice is not None
        assert pipes_of(running) == (2 if is_spliced else 0)


@needs_splice
@pytest.mark.parametrize(
    ("owner", "method"),
    [(transit_relay.Pair, "count"), (Connection, "_flush"), (Connection, "_set_backlog")],
    ids=["count", "_flush", "_set_backlog"],
)
def test_a_fault_while_bulk_is_spliced_costs_no_pipe(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, owner: type, method: str
) -> None:
    monkeypatch.setattr(transit_relay, "BULK_BYTES", 1)
    one, _ = loop.pair()
    real = getattr(owner, method)
    calls: list[object] = []

    def fault(self: object, *arguments: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise AssertionError("injected")
        return real(self, *arguments)

    monkeypatch.setattr(owner, method, fault)
    one.setblocking(False)
    for _ in range(20):
        with contextlib.suppress(OSError):  # the pair may have ended
            one.send(BULK)
        loop.pump()  # checks the pool
    assert calls and loop.server.faults.count == 1


@needs_splice
def test_a_reset_does_not_discard_what_is_in_the_pipe(loop: Loop) -> None:
    one, other = loop.pair(tcp=True)
    backlog = stuff(loop, one, other)
    assert isinstance(backlog, Pipe)
    (pair,) = loop.server.rendezvous.pairs
    relayed = pair.total_bytes
    reset(one)
    got = bytearray()
    while True:
        loop.pump()
        if select.select([other], [], [], 0)[0]:
            part = other.recv(1 << 20)
            if not part:
                break
            got += part
    assert len(got) >= relayed
    assert got == (BULK * (len(got) // len(BULK) + 1))[: len(got)]
