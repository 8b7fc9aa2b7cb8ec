"""A receiver that does not read slows its sender down, and costs the relay no memory."""

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
    """Blocks that one client sends to the other, as many as are accepted."""

    def __init__(self, sender: Client, receiver: Client) -> None:
        self.sender, self.receiver = sender, receiver
        self.blocks = 0  # begun; the last one may not be sent whole
        self.rest = memoryview(b"")  # of the last block
        sender.sock.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        return self.sender.fileno()

    def send(self) -> bool:
        """Send some bytes. Return whether any were accepted."""
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
        """Send the rest of the last block, and check that all blocks arrive unchanged."""
        self.sender.sock.settimeout(TIMEOUT)
        self.receiver.sock.settimeout(TIMEOUT)
        rest = threading.Thread(target=self.sender.send_wire, args=(self.rest,))
        rest.start()
        received = {digest(self.receiver.receive(len(BLOCK))) for _ in range(self.blocks)}
        rest.join()
        assert received == {digest(BLOCK)}


def send_all_that_is_accepted(*floods: Flood) -> None:
    """Send until nothing is accepted for a while: the relay has stopped reading then.

    No event reports that there will be no more room. A very slow relay may be sent less than it
    would accept.
    """
    while ready := select.select([], floods, [], TIMEOUT / 20)[1]:
        for flood in ready:
            flood.send()


@pytest.mark.parametrize("both_ways", [False, True], ids=["one way", "both ways"])
@BETWEEN
def test_memory_is_bounded_and_every_byte_arrives(
    relay: Callable[..., RelayProcess], first: str, second: str, both_ways: bool
) -> None:
    """A receiver that never reads, and a sender that sends as much as it can."""
    running = relay(*WEB)
    one, other = running.meet(first, second, "warmup")
    with one, other:  # the memory of a first pair is not measured
        for sender, receiver in ((one, other), (other, one)):
            sender.send(BLOCK)
            assert digest(receiver.receive(len(BLOCK))) == digest(BLOCK)
    one, other = running.meet(first, second)
    with one, other:
        before = running.resident_bytes()
        floods = [Flood(one, other)]
        if both_ways:
            floods.append(Flood(other, one))
        send_all_that_is_accepted(*floods)
        grown = running.resident_bytes() - before
        taken = sum(flood.blocks for flood in floods) * len(BLOCK)
        print(f"{first} to {second}: accepted {taken} bytes, the relay grew by {grown}")
        assert grown < BOUND_BYTES
        for flood in floods:
            flood.read_all()


@BETWEEN
def test_the_backlog_is_at_most_one_read(loop: Loop, first: str, second: str) -> None:
    """No backlog is larger than one read, however much is sent."""
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
def test_a_stalled_pair_does_not_block_another(
    relay: Callable[..., RelayProcess], first: str, second: str
) -> None:
    running = relay(*WEB)
    clients = [running.meet(first, second, "stalled"), running.meet(first, second, "good")]
    send_all_that_is_accepted(Flood(*clients[0]))
    for sender, receiver in (clients[1], clients[1][::-1]):
        sender.send(BLOCK)
        assert digest(receiver.receive(len(BLOCK))) == digest(BLOCK)
    for client in chain(*clients):
        client.close()
