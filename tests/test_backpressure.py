"""A receiver that does not read costs the sender its speed, and the relay no memory."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable
from itertools import chain

import pytest
from helpers import BOUND_BYTES, DIRECTIONS, TIMEOUT, WEB, Client, Loop, RelayProcess, digest

from transit_relay import READ_BYTES

BOTH_WAYS = True  # copied and spliced, see conftest.py
BLOCK = os.urandom(1 << 16)
BETWEEN = pytest.mark.parametrize(("first", "second"), DIRECTIONS)


class Flood:
    """Blocks on their way from one client to the other, as many as are taken."""

    def __init__(self, sender: Client, receiver: Client) -> None:
        self.sender, self.receiver = sender, receiver
        self.blocks = 0  # begun, perhaps not yet sent to their last byte
        self.rest = memoryview(b"")  # of the last one
        sender.sock.setblocking(False)

    def fileno(self) -> int:
        """For select."""
        return self.sender.fileno()

    def send(self) -> bool:
        """Send some. Says whether anything was taken."""
        if not self.rest:
            (wire,) = self.sender.encode(BLOCK)
            self.rest = memoryview(wire)
            self.blocks += 1
        try:
            self.rest = self.rest[self.sender.sock.send(self.rest) :]
        except BlockingIOError:
            return False
        return True

    def read_all(self) -> None:
        """Send what is left of the last block, and see that all arrives as it was sent."""
        self.sender.sock.settimeout(TIMEOUT)
        self.receiver.sock.settimeout(TIMEOUT)
        rest = threading.Thread(target=self.sender.send_wire, args=(self.rest,))
        rest.start()
        received = {digest(self.receiver.receive(len(BLOCK))) for _ in range(self.blocks)}
        rest.join()
        assert received == {digest(BLOCK)}


def send_all_they_take(*floods: Flood) -> None:
    """Send until nothing more is taken; the relay has stopped reading then.

    No event tells that nobody makes room any more: it passes as none was made for a while. A
    relay that is slower than that has been sent less than it would take.
    """
    while ready := select.select([], floods, [], TIMEOUT / 10)[1]:
        for flood in ready:
            flood.send()


@pytest.mark.parametrize("both_ways", [False, True], ids=["one way", "both ways"])
@BETWEEN
def test_memory_is_bounded_and_every_byte_arrives(
    relay: Callable[..., RelayProcess], first: str, second: str, both_ways: bool
) -> None:
    """The issue's proof: a receiver that never reads, a sender that sends all it can."""
    running = relay(*WEB)
    one, other = running.meet(first, second, "warmup")
    with one, other:  # what a first pair costs is no part of the question
        for sender, receiver in ((one, other), (other, one)):
            sender.send(BLOCK)
            assert digest(receiver.receive(len(BLOCK))) == digest(BLOCK)
    one, other = running.meet(first, second)
    with one, other:
        before = running.resident_bytes()
        floods = [Flood(one, other)]
        if both_ways:
            floods.append(Flood(other, one))
        send_all_they_take(*floods)
        grown = running.resident_bytes() - before
        taken = sum(flood.blocks for flood in floods) * len(BLOCK)
        print(f"{first} to {second}: accepted {taken} bytes, the relay grew by {grown}")
        assert grown < BOUND_BYTES
        for flood in floods:
            flood.read_all()


@BETWEEN
def test_the_backlog_is_at_most_one_read(loop: Loop, first: str, second: str) -> None:
    """However much is offered, however often: what is queued came from a single read."""
    one, other = loop.meet(first, second)
    flood = Flood(one, other)
    longest = 0
    while flood.send():
        loop.pump()
        backlogs = [len(conn.backlog) for conn in loop.server.connections if conn.backlog]
        longest = max(longest, *backlogs, 0)
        assert len(backlogs) <= 1
    assert 0 < longest <= READ_BYTES + READ_BYTES // 100  # with the heads of frames
    for last in (*[False] * (flood.blocks - 1), True):
        if last:
            one.send_wire(flood.rest)
        assert digest(other.receive(len(BLOCK))) == digest(BLOCK)
    assert not any(conn.backlog for conn in loop.server.connections)


@BETWEEN
def test_a_stalled_pair_does_not_hinder_another(
    relay: Callable[..., RelayProcess], first: str, second: str
) -> None:
    """Each pair waits for itself alone."""
    running = relay(*WEB)
    clients = [running.meet(first, second, "stalled"), running.meet(first, second, "good")]
    send_all_they_take(Flood(*clients[0]))
    for sender, receiver in (clients[1], clients[1][::-1]):
        sender.send(BLOCK)
        assert digest(receiver.receive(len(BLOCK))) == digest(BLOCK)
    for client in chain(*clients):
        client.close()
