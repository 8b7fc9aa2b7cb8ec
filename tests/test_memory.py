"""--max-memory bounds the bytes in all backlogs. Stalled receivers do not keep the pipes."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import random
import socket
from collections.abc import Iterator
from selectors import EVENT_READ, EVENT_WRITE

import pytest
from helpers import PING, TIMEOUT, Loop, WebSocketClient, frame, handshake

import transit_relay
from transit_relay import (
    COMPLAINT_SECONDS,
    PIPE_BYTES,
    PIPE_HOLD_SECONDS,
    PRESSED_READ_BYTES,
    READ_BYTES,
    Connection,
    Limit,
    Limits,
    MemoryBudget,
    Phase,
    Pipe,
)
from ws_frames import PONG_BACKLOG_BYTES

BOTH_WAYS = True  # copied and spliced, see conftest.py
CHUNK = random.Random(1).randbytes(1 << 16)
MAX_BYTES = 2 * PIPE_BYTES

needs_splice = pytest.mark.skipif(
    transit_relay.splice is None, reason="Python has os.splice from 3.10 on"
)


# The budget.


def test_without_a_limit_a_read_can_fill_a_pipe() -> None:
    memory = MemoryBudget(0)
    memory.change(10**12)
    assert (memory.queued_bytes, memory.max_read_bytes) == (10**12, PIPE_BYTES)


def test_as_the_backlogs_grow_the_reads_shrink() -> None:
    """They shrink from PIPE_BYTES to PRESSED_READ_BYTES. No read is larger than what is left."""
    memory = MemoryBudget(MAX_BYTES)
    sizes = [memory.max_read_bytes]
    while memory.max_read_bytes:
        memory.change(memory.max_read_bytes)
        assert memory.queued_bytes <= MAX_BYTES
        sizes.append(memory.max_read_bytes)
    # MAX_BYTES is two pipes, so each read takes half of what is left, until that is less than two
    # of the smallest reads.
    halves = [PIPE_BYTES]
    while halves[-1] > PRESSED_READ_BYTES:
        halves.append(halves[-1] // 2)
    assert sizes == [*halves, PRESSED_READ_BYTES, 0]
    assert memory.queued_bytes == MAX_BYTES


def test_the_first_read_is_not_larger_than_a_small_limit() -> None:
    assert MemoryBudget(100_000).max_read_bytes == 100_000
    assert MemoryBudget(1).max_read_bytes == 0


def test_until_three_quarters_are_used_a_copied_read_has_its_full_size() -> None:
    memory = MemoryBudget(MAX_BYTES)
    memory.change(MAX_BYTES * 3 // 4)
    assert memory.max_read_bytes == READ_BYTES


def test_as_the_backlogs_shrink_the_reads_grow_again() -> None:
    memory = MemoryBudget(MAX_BYTES)
    memory.change(MAX_BYTES)
    assert memory.max_read_bytes == 0
    memory.change(-MAX_BYTES)
    assert (memory.queued_bytes, memory.max_read_bytes) == (0, PIPE_BYTES)


# Pairs.


class Stalled:
    """A pair whose sender sends what the relay takes, and whose receiver does not read."""

    def __init__(self, loop: Loop, token: str) -> None:
        self._loop = loop
        self.sender, self.sending = loop.connect_both()
        self.receiver, self.conn = loop.connect_both()
        for sock, side in ((self.sender, "one"), (self.receiver, "other")):
            sock.sendall(handshake(token, side))
            loop.pump()
        assert self.sender.recv(100) == self.receiver.recv(100) == b"ok\n"
        self.sender.setblocking(False)
        self.conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        self.sent_bytes = 0
        self._sent = hashlib.sha256()
        self._got = hashlib.sha256()
        self._got_bytes = 0

    def fill(self) -> None:
        """Send until nothing more is taken."""
        before = -1
        while before < self.sent_bytes:
            before = self.sent_bytes
            with contextlib.suppress(BlockingIOError):
                while True:
                    size = self.sender.send(CHUNK)
                    self._sent.update(CHUNK[:size])
                    self.sent_bytes += size
            self._loop.pump()

    def take(self, most: int) -> None:
        """Let the receiver read at most this many bytes. Run no turn of the relay."""
        data = self.receiver.recv(most)
        assert data, f"the end came after {self._got_bytes} of {self.sent_bytes} bytes"
        self._got.update(data)
        self._got_bytes += len(data)

    def read(self, most: int) -> None:
        """Let the receiver read at most this many bytes, then let the relay work."""
        self.take(most)
        self._loop.pump()

    def read_all(self) -> None:
        """Let the receiver read all that was sent, and compare it."""
        self.receiver.settimeout(TIMEOUT)
        while self._got_bytes < self.sent_bytes:
            self.read(1 << 16)
        assert self._got.digest() == self._sent.digest()


def limited(loop: Loop, max_bytes: int = MAX_BYTES) -> Loop:
    """Restart the relay with --max-memory, and without a time limit for stalled receivers."""
    loop.restart(limits=Limits(max_memory=max_bytes, stall_seconds=0))
    return loop


def stall(loop: Loop, count: int, name: str = "stalled") -> list[Stalled]:
    """Return so many pairs whose receivers have stalled."""
    pairs = [Stalled(loop, f"{name}{n}") for n in range(count)]
    for pair in pairs:
        pair.fill()
    return pairs


def fill_memory(loop: Loop) -> list[Stalled]:
    """Return stalled pairs. Lower the limit to the size of their backlogs."""
    pairs = stall(loop, 3)
    use_up(loop)
    return pairs


def use_up(loop: Loop) -> None:
    """Lower the limit to the size of all backlogs."""
    memory = loop.server.memory
    memory._max_bytes = memory.queued_bytes
    memory.change(0)
    assert memory.max_read_bytes == 0 < memory.queued_bytes


def test_all_backlogs_together_are_bounded(loop: Loop) -> None:
    """Many receivers stall. All of them get everything when they read again."""
    pairs = stall(limited(loop), 24)
    assert MAX_BYTES * 3 // 4 < loop.server.memory.queued_bytes <= MAX_BYTES
    for pair in pairs:
        pair.read_all()
    assert loop.server.memory.queued_bytes == 0
    assert loop.server.memory.max_read_bytes == PIPE_BYTES


def test_healthy_pairs_go_on_beside_the_stalled_ones(loop: Loop) -> None:
    """They are read in pieces of PRESSED_READ_BYTES, none of which becomes a backlog."""
    fill_memory(loop)
    queued_bytes = loop.server.memory.queued_bytes
    one, other = loop.meet("unix", "unix")
    assert one.conn is not None and other.conn is not None
    for _ in range(8):
        one.send(CHUNK)
        received, sizes = b"", []
        for _ in range(len(CHUNK) // PRESSED_READ_BYTES):
            before = one.conn.read_bytes
            loop.server.run_once(0)
            sizes.append(one.conn.read_bytes - before)
            assert not other.conn.backlog and loop.server.memory.queued_bytes == queued_bytes
            received += other.sock.recv(len(CHUNK))
        assert received == CHUNK and {*sizes} == {PRESSED_READ_BYTES}
    assert loop.server.memory.max_read_bytes == 0


@pytest.mark.parametrize("kinds", [("ws-unix", "unix"), ("unix", "ws-unix")])
def test_websocket_pairs_go_on_too(loop: Loop, kinds: tuple[str, str]) -> None:
    fill_memory(loop)
    one, other = loop.meet(*kinds)
    for client, partner in ((one, other), (other, one)):
        client.send(CHUNK)
        assert partner.receive(len(CHUNK)) == CHUNK


def test_past_the_limit_a_pair_is_read_when_its_receiver_has_room(loop: Loop) -> None:
    fill_memory(loop)
    late = Stalled(loop, "late")
    late.fill()
    assert late.conn.backlog == b"" and late.conn.mask == EVENT_READ | EVENT_WRITE
    assert late.sending.mask == 0, "it is polled while nothing can be done for it"
    sizes = []
    while not any(sizes):
        late.take(1 << 16)
        for _ in range(3):
            before = late.sending.read_bytes
            loop.server.run_once(0)
            sizes.append(late.sending.read_bytes - before)
    assert max(sizes) <= PRESSED_READ_BYTES
    late.read_all()
    assert late.conn.backlog is None and late.sending.mask == EVENT_READ


def test_a_pair_that_waits_for_room_can_end(loop: Loop) -> None:
    """Bytes that the relay has not read yet are delivered when there is room."""
    fill_memory(loop)
    late = Stalled(loop, "late")
    late.fill()
    late.sender.close()
    loop.pump()
    assert late.conn.session.pair is not None
    late.read_all()
    assert late.receiver.recv(1) == b""
    late.receiver.close()
    loop.pump()
    assert loop.recorder.moods() == ["happy"]
    assert loop.recorder.records[0].total_bytes == late.sent_bytes


def test_clients_of_a_pair_that_waits_for_room_can_leave(loop: Loop) -> None:
    fill_memory(loop)
    late = Stalled(loop, "late")
    late.fill()
    late.receiver.close()
    loop.pump()
    late.sender.close()
    loop.pump()
    assert loop.recorder.moods() == ["happy"]


def test_the_end_of_a_stalled_pair_frees_its_memory(loop: Loop) -> None:
    pairs = fill_memory(loop)
    for pair in pairs:
        pair.receiver.close()
        loop.pump()
        pair.sender.close()
        loop.pump()
    assert not loop.server.connections
    assert loop.server.memory.queued_bytes == 0


def test_handshakes_are_read_past_the_limit(loop: Loop) -> None:
    fill_memory(loop)
    client, conn = loop.connect_both()
    client.sendall(handshake("new", "one"))
    loop.pump()
    assert conn.session.handshake is not None
    client.sendall(b"x")
    loop.pump()
    assert client.recv(100) == b"impatient\n"
    client.close()
    loop.pump()


def test_past_the_limit_only_the_newest_pong_is_kept(loop: Loop) -> None:
    """So it is for a WebSocket with a backlog that is shorter than PONG_BACKLOG_BYTES."""
    limited(loop)
    one, other = loop.meet("unix", "ws-unix")
    assert isinstance(other, WebSocketClient) and other.conn is not None
    sent_bytes = 0
    while other.conn.backlog is None:
        one.send(CHUNK[: PONG_BACKLOG_BYTES // 2])
        sent_bytes += PONG_BACKLOG_BYTES // 2
        loop.pump()
    for name in (b"first", b"second"):
        other.send_wire(frame(PING, name))
        loop.pump()
    use_up(loop)
    assert other.conn.queued_bytes() < PONG_BACKLOG_BYTES
    for name in (b"third", b"fourth"):
        other.send_wire(frame(PING, name))
        loop.pump()
    assert len(other.receive(sent_bytes)) == sent_bytes
    assert other.receive_now() == b""
    assert other.pongs == [b"first", b"second", b"fourth"]


def test_the_limit_is_counted_and_logged_once_a_minute(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, transit_relay.PROGRAM)
    fill_memory(loop)
    counts = loop.server.limits.reached.counts
    stall(loop, 3, "late")
    count = counts[Limit.MEMORY.value]
    assert count >= 3
    loop.advance(COMPLAINT_SECONDS)
    stall(loop, 1, "later")
    assert counts[Limit.MEMORY.value] > count
    text = "--max-memory: clients have to wait"
    texts = [record.getMessage() for record in caplog.records]
    assert texts == [text, f"{text} ({count - 1} more since the last message)"]


def test_without_the_limit_more_is_queued(loop: Loop) -> None:
    """The test of the limit, with as many pairs, passes because of the limit."""
    stall(limited(loop, 0), 24)
    assert loop.server.memory.queued_bytes > MAX_BYTES
    assert Limit.MEMORY.value not in loop.server.limits.reached.counts


def test_a_receiver_that_leaves_while_its_partner_waits_for_room(loop: Loop) -> None:
    """Nothing is queued for it: it is closed at once."""
    fill_memory(loop)
    late = Stalled(loop, "late")
    late.fill()
    assert late.conn.backlog == b""
    late.receiver.shutdown(socket.SHUT_WR)
    loop.pump()
    assert late.conn.phase is Phase.CLOSED
    late.sender.close()
    loop.pump()
    assert loop.recorder.moods() == ["happy"]


def test_the_largest_reads_are_bulk_near_the_limit_too(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise all of them would be made in one turn."""
    fill_memory(loop)
    one, other = loop.meet("unix", "unix")
    assert one.conn is not None
    queued: list[Connection] = []
    add = loop.server.bulk.add
    monkeypatch.setattr(
        loop.server.bulk, "add", lambda conn, ready: (queued.append(conn), add(conn, ready))
    )
    one.send(CHUNK)
    assert other.receive(len(CHUNK)) == CHUNK
    assert one.conn in queued


# Pipes.


@pytest.fixture
def few_pipes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """Yield a relay with two pipes. It splices each read of a pair. Check its descriptors."""
    monkeypatch.setattr(transit_relay, "BULK_BYTES", 1)
    descriptors = os.listdir("/proc/self/fd")
    loop = Loop(max_pipes=2)
    yield loop
    loop.close()
    assert os.listdir("/proc/self/fd") == descriptors


def holders(loop: Loop) -> list[Connection]:
    """Return the connections that have a pipe."""
    return [conn for conn in loop.server.connections if isinstance(conn.backlog, Pipe)]


@needs_splice
def test_a_pipe_whose_receiver_takes_nothing_is_released(few_pipes: Loop) -> None:
    """It is released after PIPE_HOLD_SECONDS, when another pair wants one. Nothing is lost."""
    loop = few_pipes
    stalled = [Stalled(loop, f"stalled{n}") for n in range(2)]
    for pair in stalled:
        pair.fill()
    queued = {pair.conn: pair.conn.queued_bytes() for pair in stalled}
    assert {*holders(loop)} == {*queued} and loop.server.pipes._lent == 2
    other = Stalled(loop, "other")
    other.fill()  # it wants a pipe, and copies
    assert {*holders(loop)} == {*queued}
    loop.advance(PIPE_HOLD_SECONDS)
    other.read(1 << 16)
    other.read_all()
    other.fill()
    assert not {*holders(loop)} & {*queued}
    assert {pair.conn: pair.conn.queued_bytes() for pair in stalled} == queued
    for pair in (*stalled, other):
        pair.read_all()
    assert loop.server.pipes._lent == 0


@needs_splice
def test_a_pipe_whose_receiver_takes_something_is_kept(few_pipes: Loop) -> None:
    loop = few_pipes
    stalled = [Stalled(loop, f"stalled{n}") for n in range(2)]
    for pair in stalled:
        pair.fill()
    other = Stalled(loop, "other")
    other.fill()
    for _ in range(3):
        loop.advance(PIPE_HOLD_SECONDS)
        for pair in stalled:
            before = pair.conn.queued_bytes()
            while pair.conn.queued_bytes() == before:
                pair.read(4096)
        other.read_all()
        other.fill()
        assert {pair.conn for pair in stalled} <= {*holders(loop)}
    for pair in (*stalled, other):
        pair.read_all()


@needs_splice
def test_without_another_pair_that_wants_one_a_pipe_is_kept(few_pipes: Loop) -> None:
    loop = few_pipes
    stalled = Stalled(loop, "stalled")
    stalled.fill()
    for _ in range(3):
        loop.advance(PIPE_HOLD_SECONDS)
    assert holders(loop) == [stalled.conn]
    stalled.read_all()


@needs_splice
def test_without_memory_for_its_bytes_a_pipe_is_kept(
    few_pipes: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = few_pipes
    stalled = stall(loop, 2)
    other = Stalled(loop, "other")
    other.fill()
    loop.advance(PIPE_HOLD_SECONDS)

    def read_all(self: Pipe) -> bytearray:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(Pipe, "read_all", read_all)
        other.read_all()
        other.fill()
    assert loop.server.faults.count == 0
    assert {pair.conn for pair in stalled} <= {*holders(loop)}
    for pair in (*stalled, other):
        pair.read_all()


@needs_splice
def test_a_pipe_that_is_lent_again_is_not_taken_for_a_stuck_one(few_pipes: Loop) -> None:
    """Not even if it holds as many bytes as at the last check."""
    pipes = few_pipes.server.pipes
    pipe = pipes.lend()
    assert pipe is not None
    pipe.seen_bytes = 7
    pipes.give_back(pipe)
    assert pipes.lend() is pipe and pipe.seen_bytes == 0
    pipes.give_back(pipe)


@needs_splice
def test_a_released_pipe_is_lent_at_once(few_pipes: Loop) -> None:
    """To the connection that wanted one."""
    loop = few_pipes
    stalled = stall(loop, 2)
    other = Stalled(loop, "other")
    other.fill()
    other.read_all()
    loop.advance(PIPE_HOLD_SECONDS)
    other.fill()
    assert holders(loop) == [other.conn]
    for pair in (*stalled, other):
        pair.read_all()
