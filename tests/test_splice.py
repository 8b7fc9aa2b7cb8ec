"""Bulk: when it is spliced, what a pipe may hold and for whom, and where all is copied instead."""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import BytesIO

import pytest
from helpers import RELAY, TIMEOUT, Loop, RelayProcess, digest, handshake, receive, reset
from invariants import check_pipe, check_pool, check_server
from processes import patched

import transit_relay
from transit_relay import (
    BULK_BYTES,
    IDLE_PIPES,
    MAX_PIPES,
    PIPE_BYTES,
    PIPES_PAUSE_SECONDS,
    Connection,
    Pipe,
    PipePool,
    affordable_pipes,
)

BULK = random.Random(1).randbytes(8 * BULK_BYTES)

needs_splice = pytest.mark.skipif(
    transit_relay.splice is None, reason="Python has os.splice from 3.10 on"
)


# The pool. It makes pipes that can be made anywhere, splice or not.


class Clock:
    """Monotonic seconds, as a test says."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def fill(pipe: Pipe, data: bytes = b"left behind") -> None:
    """Have bytes in a pipe, as if they had been spliced."""
    os.write(pipe._write_fd, data)
    pipe._filled = len(data)


@pytest.fixture
def pool() -> Iterator[PipePool]:
    """A pool that may have twelve pipes; at the end nothing is left open."""
    before = set(os.listdir("/proc/self/fd"))
    pool = PipePool(12, Clock())
    yield pool
    pool.close()
    assert set(os.listdir("/proc/self/fd")) == before


def lend_all(pool: PipePool) -> list[Pipe]:
    """All pipes that it has to lend."""
    pipes = []
    while (pipe := pool.lend()) is not None:
        pipes.append(pipe)
    return pipes


def test_the_pool_lends_so_many_and_no_more(pool: PipePool) -> None:
    pipes = lend_all(pool)
    assert len(pipes) == 12
    pool.give_back(pipes[0])
    assert pool.lend() is pipes[0] and pool.lend() is None
    for pipe in pipes:
        pool.give_back(pipe)
    check_pool(pool, [])


def test_a_pool_of_none_lends_none() -> None:
    assert PipePool(0).lend() is None


def test_some_idle_pipes_are_kept(pool: PipePool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for pipe in lend_all(pool):
        pool.give_back(pipe)
    assert len(os.listdir("/proc/self/fd")) - before == 2 * IDLE_PIPES


def test_a_pipe_with_bytes_in_it_is_never_lent_again(pool: PipePool) -> None:
    used = pool.lend()
    assert used is not None
    fill(used)
    pool.give_back(used)
    others = lend_all(pool)
    assert len(others) == 12 and used not in others
    for pipe in others:
        check_pipe(pipe)  # empty, the kernel says so too
        pool.give_back(pipe)


def test_a_pipe_is_filled_only_when_it_is_empty(pool: PipePool) -> None:
    pipe = pool.lend()
    assert pipe is not None
    fill(pipe)
    with socket.socket() as sock, pytest.raises(AssertionError):
        pipe.fill(sock)
    pool.give_back(pipe)


@pytest.mark.parametrize("trouble", ["poor", "refused"])
def test_a_system_that_has_none_for_us_is_not_asked_for_a_minute(
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
        patch.setattr(transit_relay, "F_SETPIPE_SZ", transit_relay.F_GETPIPE_SZ)  # stays small
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
        (None, MAX_PIPES),  # hidden: the default is assumed
        (b"1024\n", 2),
        (b"511\n", 0),
    ],
)
def test_no_more_than_half_of_what_a_user_may_have(
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
    os.setuid(54321)  # nobody else's
pool = t.PipePool(t.MAX_PIPES, clock)
pipes = [pool.lend() for _ in range(t.MAX_PIPES)]
print("all lent:", None not in pipes)
for pipe in pipes:
    pool.give_back(pipe)
pool.close()
print("one is as good as the last:", all(pipe.is_large for pipe in pipes))

others, granted = [], t.PIPE_BYTES
while granted == t.PIPE_BYTES:  # another process of this user
    others.append(os.pipe())
    try:
        granted = fcntl.fcntl(others[-1][1], t.F_SETPIPE_SZ, t.PIPE_BYTES)
    except PermissionError:
        granted = 0
print("poor ones are refused:", pool.lend() is None)
for fds in others:
    os.close(fds[0]); os.close(fds[1])
print("and not asked for again so soon:", pool.lend() is None)
clock.now += t.PIPES_PAUSE_SECONDS
print("but later:", pool.lend() is not None)
"""


def test_an_ordinary_user_has_what_the_pool_lends_and_not_endlessly_more() -> None:
    """The kernel's own limit, which root is exempt from."""
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


def test_without_descriptors_idle_pipes_make_room(loop: Loop) -> None:
    pool = loop.server.pipes = PipePool(1, loop.clock)
    (pipe,) = lend_all(pool)
    pool.give_back(pipe)
    before = len(os.listdir("/proc/self/fd"))
    loop.server._pause_accepting("no descriptors")
    assert len(os.listdir("/proc/self/fd")) == before - 2


# What is spliced, and what is copied.


class CountingPool(PipePool):
    """Counts how often it was asked."""

    asked = 0

    def lend(self) -> Pipe | None:
        self.asked += 1
        return super().lend()


def count_lent(loop: Loop) -> CountingPool:
    """From now on it is counted."""
    loop.server.pipes = CountingPool(affordable_pipes(), loop.clock)
    return loop.server.pipes


def carry(loop: Loop, sender: socket.socket, receiver: socket.socket, data: bytes) -> None:
    """Have `data` relayed, whatever the kernel's buffers hold, and see that it is the same."""
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
    assert pool.asked <= asked + 1  # the first one found out


@needs_splice
@pytest.mark.parametrize(("first", "second"), [("tcp", "ws"), ("ws", "tcp"), ("ws", "ws")])
def test_what_is_spelled_is_never_spliced(loop: Loop, first: str, second: str) -> None:
    pool = count_lent(loop)
    for one, other in (loop.meet(first, second), loop.meet(second, first)):
        one.send(BULK)
        assert digest(other.receive(len(BULK))) == digest(BULK)
    assert pool.asked == 0


@needs_splice
def test_one_alone_and_one_told_to_go_are_never_spliced(loop: Loop) -> None:
    pool = count_lent(loop)
    for line in (handshake("waits"), b"junk\n"):
        client = loop.connect(tcp=True)
        client.sendall(line + BULK)
        loop.pump()
    assert pool.asked == 0


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOMEM])
def test_where_splice_is_refused_all_is_copied(
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
def test_what_one_side_has_in_a_pipe_is_what_it_may_have(loop: Loop) -> None:
    """When the last pipe is out, bulk is copied."""
    loop.server.pipes = PipePool(1, loop.clock)
    first, second = loop.pair(tcp=True), loop.pair(tcp=True)
    backlogs = [stuff(loop, *pair) for pair in (first, second)]
    assert sorted(map(type, backlogs), key=str) == [bytearray, Pipe]


def stuff(loop: Loop, sender: socket.socket, receiver: socket.socket) -> bytearray | Pipe | None:
    """Send until something stays with the relay, and give what holds it."""
    before = {conn for conn in loop.server.connections if conn.backlog is not None}
    sender.setblocking(False)
    while True:
        while select.select([], [sender], [], 0)[1]:
            sender.send(BULK)
        loop.pump()
        for conn in loop.server.connections - before:
            if conn.backlog is not None:
                return conn.backlog


# Whoever has bulk lines up.


def senders(loop: Loop, count: int) -> list[Connection]:
    """Those of so many pairs who have something to be read, and had bulk the last time."""
    clients, senders = [], []
    for number in range(count):
        (one, conn), (other, _) = loop.connect_both(tcp=True), loop.connect_both(tcp=True)
        for client, side in ((one, "one"), (other, "other")):
            client.sendall(handshake(str(number), side))
            loop.pump()
        clients.append(one)
        senders.append(conn)
    for client, conn in zip(clients, senders):
        client.sendall(b"something")
        conn._bulk = True
    loop.wait_for_arrivals()
    return senders


def has_moved(conn: Connection) -> bool:
    return conn.session.received_bytes > 0


def test_small_ones_do_not_wait_for_all_bulk(loop: Loop) -> None:
    *others, small = senders(loop, 9)
    small._bulk = False
    loop.server.run_once(0)
    assert has_moved(small) and sum(map(has_moved, others)) == 2


def test_bulk_moves_in_the_order_in_which_it_lined_up(loop: Loop) -> None:
    line = senders(loop, 8)[::-1]
    for conn in line:
        loop.server.queue_bulk(conn)
        loop.server.queue_bulk(conn)  # twice makes no difference
    moved = []
    while len(moved) < 8:
        loop.server.run_once(0)
        news = [conn for conn in line if has_moved(conn) and conn not in moved]
        assert news, "a turn in which nobody moves"
        moved += news
    assert moved == line


def test_who_leaves_the_line_by_dying_is_not_missed(loop: Loop) -> None:
    line = senders(loop, 8)
    loop.server.run_once(0)
    for conn in line:
        conn.doom()
    loop.pump()
    assert not any(conn in loop.server.connections for conn in line)
    assert sum(map(has_moved, line)) == 2


def test_who_may_not_be_read_any_more_is_not_read_on_its_turn(loop: Loop) -> None:
    (conn,) = senders(loop, 1)
    loop.server.queue_bulk(conn)
    assert conn.partner is not None
    conn.partner._set_backlog(bytearray(b"x"))
    conn.on_bulk_turn()
    assert not has_moved(conn)


def test_nobody_waits_for_events_while_there_is_a_line(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    (conn,) = senders(loop, 1)
    waited: list[object] = []
    monkeypatch.setattr(
        loop.server._selector, "select", lambda timeout: waited.append(timeout) or []
    )
    loop.server.queue_bulk(conn)
    for _ in range(2):
        loop.server.run_once(60)
    assert waited == [0, 60]


# What one pair has in a pipe never reaches another.

PERIOD = 65_521  # a prime: what is lost or added moves all that follows


class Stream:
    """A pair, and bytes on their way through it: no two pairs', and no two places', are alike."""

    def __init__(self, one: socket.socket, other: socket.socket, seed: int) -> None:
        self.one, self.other = one, other
        self.sent = self.received = 0
        self._bytes = random.Random(seed).randbytes(PERIOD) * 5
        for sock in (one, other):
            sock.setblocking(False)

    def at(self, position: int, size: int) -> bytes:
        """What is to be there."""
        start = position % PERIOD
        return self._bytes[start : start + size]

    def send(self, size: int) -> None:
        """Send some, if it is taken."""
        try:
            self.sent += self.one.send(self.at(self.sent, size))
        except BlockingIOError:
            pass

    def receive(self) -> int:
        """Look at some of what has come. Gives how much that was."""
        try:
            part = self.other.recv(4 * PERIOD)
        except BlockingIOError:
            return -1
        assert part == self.at(self.received, len(part)), f"wrong behind {self.received}"
        self.received += len(part)
        return len(part)

    def cut(self, chance: random.Random) -> None:
        """One of the two leaves, in one way or the other, and then the other one."""
        for sock in chance.sample([self.one, self.other], 2):
            if chance.random() < 0.7:
                reset(sock)
            else:
                sock.close()


Meet = Callable[[int], "tuple[socket.socket, socket.socket]"]


def cut_some_while_others_run(meet: Meet, turn: Callable[[], None]) -> None:
    """64 pairs run, each of whose bytes is looked at, while others come and are cut.

    Some receivers read, some are slow, and those to be cut do not read at all: they are cut with
    bytes in the relay, and the pipes that these are in are the ones that the others are lent.
    """
    chance = random.Random(1)
    streams = [Stream(*meet(seed), seed) for seed in range(64)]
    victims: list[Stream] = []
    for number in range(250):
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
def test_cut_pairs_leave_nothing_to_others(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """The books are looked at all the time."""
    monkeypatch.setattr(transit_relay, "BULK_BYTES", 0)
    loop.server.pipes = PipePool(most, loop.clock)
    closed = []
    monkeypatch.setattr(Pipe, "close", closing(closed))

    def meet(seed: int) -> tuple[socket.socket, socket.socket]:
        one, other = loop.connect(tcp=True), loop.connect(tcp=True)
        for sock, side in ((one, "one"), (other, "other")):
            sock.sendall(handshake(str(seed), side))
            loop.pump()
        assert receive(one, 3) == receive(other, 3) == b"ok\n"
        return one, other

    def turn() -> None:
        for _ in range(4):
            loop.server.run_once(0)
        check_server(loop.server)

    cut_some_while_others_run(meet, turn)
    assert sum(left > 0 for left in closed) > 20, "hardly a pair was cut with bytes in a pipe"


def closing(closed: list[int]) -> Callable[[Pipe], None]:
    """Pipe.close, but how much was in it is noted."""
    real = Pipe.close

    def close(pipe: Pipe) -> None:
        closed.append(len(pipe))
        real(pipe)

    return close


def test_cut_pairs_leave_nothing_to_others_of_a_real_relay(
    relay: Callable[..., RelayProcess],
) -> None:
    running = relay(program=patched(BULK_BYTES=0))
    cut_some_while_others_run(lambda seed: running.pair(str(seed)), lambda: None)


# A relay as it is started.


def pipes_of(running: RelayProcess) -> int:
    """How many ends of pipes it has open, besides what it writes its messages to."""
    folder = f"/proc/{running.pid}/fd"
    links = [os.readlink(f"{folder}/{fd}") for fd in os.listdir(folder) if int(fd) > 2]
    return sum(link.startswith("pipe:") for link in links)


@pytest.mark.parametrize("options", [(), ("--no-splice",)], ids=["default", "--no-splice"])
def test_a_relay_has_pipes_unless_told_otherwise(
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
def test_a_reset_leaves_what_is_in_the_pipe_to_the_partner(loop: Loop) -> None:
    one, other = loop.pair(tcp=True)
    backlog = stuff(loop, one, other)
    assert isinstance(backlog, Pipe)
    taken = max(conn.session.received_bytes for conn in loop.server.connections)
    reset(one)
    got = bytearray()
    while True:
        loop.pump()
        if select.select([other], [], [], 0)[0]:
            part = other.recv(1 << 20)
            if not part:
                break
            got += part
    assert len(got) >= taken
    assert got == (BULK * (len(got) // len(BULK) + 1))[: len(got)]
