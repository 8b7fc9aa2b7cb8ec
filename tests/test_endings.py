"""Nothing that was received is lost when a client leaves, or cannot be written to any more."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable
from selectors import EVENT_READ

import pytest
from helpers import (
    DIRECTIONS,
    TIMEOUT,
    WEB,
    Client,
    Loop,
    RelayProcess,
    digest,
    handshake,
    wait_for_hang_up,
)

from transit_relay import unread_bytes

BOTH_WAYS = True  # copied and spliced, see conftest.py
# How many times each ending is tried. CI tries 200.
TIMES = int(os.environ.get("RELAY_ENDINGS", "15"))
TIMES_WEB = max(1, TIMES // 10)  # the same, but for what these clients cost
PAYLOAD = os.urandom(8 * 1024 * 1024)
DIGEST = hashlib.sha256(PAYLOAD).digest()
BETWEEN = pytest.mark.parametrize(("first", "second"), DIRECTIONS)


class Helper(threading.Thread):
    """A thread that begins at once. Its exception is raised again by `join`."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        super().__init__()
        self.work, self.arguments = work, arguments
        self.error: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work(*self.arguments)
        except Exception as error:
            self.error = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error


class EndlessSender(Helper):
    """Sends until `stop` is called. A failed write before that is an error."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stopping = False
        super().__init__(self.send)

    def send(self) -> None:
        while not self.stopping:
            self.client.send(b"x" * 4096)

    def stop(self) -> None:
        """Stop sending. The relay must have accepted everything, and must accept what follows."""
        self.stopping = True
        self.join()
        self.client.send(b"x" * 1_000_000)


@BETWEEN
def test_all_bytes_arrive_while_the_receiver_sends(
    relay: Callable[..., RelayProcess], first: str, second: str
) -> None:
    """A sends 8 MiB and ends; B sends without end: B gets all, then an end and no reset."""
    running = relay(*WEB)
    with running.client(first) as encoder:  # once: encoding takes longer than sending
        (wire,) = encoder.encode(PAYLOAD)
    for _ in range(TIMES if first == second == "tcp" else TIMES_WEB):
        one, other = running.meet(first, second)
        for client in (one, other):
            client.sock.settimeout(4 * TIMEOUT)
        endless = EndlessSender(other)
        drain = Helper(one.read_to_end)
        sender = Helper(send_then_end, one, wire)
        received = hashlib.sha256()
        total = 0
        while block := other.read(1 << 18):  # a reset would raise
            received.update(block)
            total += len(block)
        assert (total, received.digest()) == (len(PAYLOAD), DIGEST)
        assert other.close_code == (1000 if second == "ws" else None)
        endless.stop()
        other.close()
        sender.join()
        drain.join()
        one.close()


def send_then_end(client: Client, wire: bytes) -> None:
    """Send all bytes, then this direction's end."""
    client.send_wire(wire)
    client.half_close()


@pytest.mark.parametrize("kind", ["tcp", "ws"])
@pytest.mark.parametrize(
    ("first", "answer"),
    [(b"nonsense\n", b"bad handshake\n"), (handshake("alone"), b"impatient\n")],
    ids=["bad handshake", "impatient"],
)
def test_a_refused_client_that_goes_on_sending_receives_the_answer(
    relay: Callable[..., RelayProcess], first: bytes, answer: bytes, kind: str
) -> None:
    """It gets the whole answer and an orderly end, not a reset that destroys both."""
    running = relay(*WEB)
    for _ in range(TIMES if kind == "tcp" else TIMES_WEB):
        client = running.client(kind)
        client.send(first)
        endless = EndlessSender(client)
        assert client.read_to_end() == answer
        endless.stop()
        client.close()


@BETWEEN
@pytest.mark.parametrize("size", [1, 100_000, 1_000_000])
def test_a_reset_does_not_discard_what_was_received(
    loop: Loop, size: int, first: str, second: str
) -> None:
    """A's bytes in the relay's kernel are delivered to B, then an orderly end.

    Over WebSocket they are the beginning of a frame that has no end.
    """
    one, other = loop.meet(first, second)
    assert one.conn is not None
    data = os.urandom(size)
    (wire,) = one.encode(data)
    one.sock.setblocking(False)
    one.sock.send(wire)
    one.reset()  # discards what is still in the sender's kernel
    wait_for_hang_up(one.conn)
    arrived = unread_bytes(one.conn.sock) - (len(wire) - len(data))  # without the frame's head
    assert arrived >= min(size, 1000)
    received = other.read_to_end()
    assert digest(received) == digest(data[:arrived])
    other.close()
    loop.pump()
    (record,) = loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", arrived)


# A half-dead pair: B cannot be written to any more, but not all bytes of B are read.

CHUNK = os.urandom(10_000)
FRAME_HEAD_BYTES = 8  # of a client's frame with CHUNK


class HalfDead:
    """A pair in which A does not read, so that bytes of B are in the relay and in its kernel.

    A is `one`, B is `other`. What B had sent when it was cut is counted as `arrived`.
    """

    def __init__(self, loop: Loop, first: str, second: str) -> None:
        self.loop = loop
        self.one, self.other = loop.meet(first, second)
        assert self.one.conn is not None and self.other.conn is not None
        self.conn_a, self.conn_b = self.one.conn, self.other.conn
        self.is_websocket = second == "ws"
        self.begun = self.conn_b.read_bytes
        self.other.sock.setblocking(False)
        self._queue_bytes_of_b()
        assert self.conn_a.backlog is not None
        assert unread_bytes(self.conn_b.sock) > 0

    def _queue_bytes_of_b(self) -> None:
        """Send from B until neither the relay nor its kernel accepts more."""
        rest = b""
        with contextlib.suppress(BlockingIOError):
            while True:
                rest = rest or b"".join(b"".join(self.other.encode(CHUNK)) for _ in range(10))
                rest = rest[self.other.sock.send(rest) :]
                self.loop.pump()

    def cut(self) -> None:
        """Let B reset its connection."""
        self.other.reset()
        wait_for_hang_up(self.conn_b)
        self.arrived = self.payload(
            self.conn_b.read_bytes - self.begun + unread_bytes(self.conn_b.sock)
        )

    def payload(self, wire_bytes: int) -> int:
        """Return how many bytes of payload the first bytes of B's stream have."""
        if not self.is_websocket:
            return wire_bytes
        frames, rest = divmod(wire_bytes, FRAME_HEAD_BYTES + len(CHUNK))
        return frames * len(CHUNK) + max(0, rest - FRAME_HEAD_BYTES)

    def upload(self, size: int = 10_000) -> int:
        """Send from A, without waiting. Return how many bytes the kernels accepted."""
        self.one.sock.setblocking(False)
        sent = 0
        with contextlib.suppress(BlockingIOError):
            (wire,) = self.one.encode(CHUNK[:size])
            sent = self.one.sock.send(wire)
        self.loop.pump()
        self.one.sock.settimeout(TIMEOUT)
        return sent

    def expected(self) -> bytes:
        """Return what A must receive."""
        return (CHUNK * (self.arrived // len(CHUNK) + 1))[: self.arrived]


def check_record(half: HalfDead, uploaded: int) -> None:
    """Check the pair's record: B's bytes, and those of A that were read."""
    (record,) = half.loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", half.arrived + uploaded)


@BETWEEN
def test_after_a_failed_write_the_sender_is_not_read_any_more(
    loop: Loop, first: str, second: str
) -> None:
    """Its bytes would vanish, and would be counted as relayed."""
    half = HalfDead(loop, first, second)
    half.cut()
    assert half.upload(1_000) > 0  # the relay learns from this write that B is gone
    read_bytes = half.conn_a.read_bytes
    for _ in range(20):
        half.upload()
    assert half.conn_a.read_bytes == read_bytes
    assert not half.conn_a.mask & EVENT_READ
    assert loop.recorder.records == []
    assert digest(half.one.read_to_end()) == digest(half.expected())
    loop.pump()
    check_record(half, uploaded=1_000)
    half.one.close()
    loop.pump()
    assert loop.server.connections == set()


@BETWEEN
def test_a_half_dead_pair_ends_without_an_upload_too(loop: Loop, first: str, second: str) -> None:
    half = HalfDead(loop, first, second)
    half.cut()
    assert digest(half.one.read_to_end()) == digest(half.expected())
    loop.pump()
    check_record(half, uploaded=0)


@BETWEEN
def test_a_pair_ends_when_neither_client_can_be_written_to(
    loop: Loop, first: str, second: str
) -> None:
    half = HalfDead(loop, first, second)
    half.cut()
    assert half.upload(1_000) > 0
    assert loop.recorder.records == []
    half.arrived = half.payload(half.conn_b.read_bytes - half.begun)  # the rest is discarded
    half.one.reset()
    wait_for_hang_up(half.conn_a)
    loop.pump()
    check_record(half, uploaded=1_000)
    assert loop.server.connections == set()


@BETWEEN
def test_both_clients_of_a_stuffed_pair_reset_at_once(loop: Loop, first: str, second: str) -> None:
    half = HalfDead(loop, first, second)
    half.cut()
    half.one.reset()
    wait_for_hang_up(half.conn_a)
    loop.pump()
    assert loop.recorder.moods() == ["happy"]
    assert loop.server.connections == set()


@BETWEEN
def test_after_a_failed_write_the_sender_may_leave(loop: Loop, first: str, second: str) -> None:
    """A's end is not read either. A receives what B had sent, and the pair ends."""
    half = HalfDead(loop, first, second)
    half.cut()
    assert half.upload(1_000) > 0
    half.one.half_close()
    loop.pump()
    assert loop.recorder.records == []
    # Over WebSocket the Close of A is not read, and so it is not answered: 1000 all the same.
    assert digest(half.one.read_to_end()) == digest(half.expected())
    loop.pump()
    check_record(half, uploaded=1_000)
    half.one.close()
    loop.pump()
    assert loop.server.connections == set()
