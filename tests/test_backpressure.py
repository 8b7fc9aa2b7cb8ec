"""A receiver that does not read costs the sender its speed, and the relay no memory."""

from __future__ import annotations

import hashlib
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import TIMEOUT, Loop, RelayProcess, receive

BOUND_BYTES = 2 * 1024 * 1024  # what one pair may make the relay hold
BLOCK = os.urandom(1 << 16)


def resident_bytes(pid: int) -> int:
    """What a process has in memory."""
    fields = Path(f"/proc/{pid}/statm").read_text().split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")


def send_all_it_takes(sock: socket.socket, digest: hashlib._Hash) -> int:
    """Send until nothing more is taken; the relay has stopped reading then. Give the bytes."""
    total = 0
    sock.setblocking(False)
    while select.select([], [sock], [], TIMEOUT / 5)[1]:  # nobody makes room any more
        try:
            sent = sock.send(BLOCK)
        except BlockingIOError:
            continue
        digest.update(BLOCK[:sent])
        total += sent
    sock.settimeout(TIMEOUT)
    return total


@pytest.mark.parametrize("both_ways", [False, True], ids=["one way", "both ways"])
def test_memory_is_bounded_and_every_byte_arrives(
    relay: Callable[..., RelayProcess], both_ways: bool
) -> None:
    """The issue's proof: a receiver that never reads, a sender that sends all it can."""
    running = relay()
    one, other = running.pair("warmup")  # what a first pair costs is no part of the question
    one.sendall(BLOCK)
    assert receive(other, len(BLOCK)) == BLOCK
    one.close()
    other.close()
    one, other = running.pair()
    before = resident_bytes(running.pid)
    ways = [(one, other), (other, one)] if both_ways else [(one, other)]
    taken = []
    for sender, _ in ways:
        digest = hashlib.sha256()
        taken.append((send_all_it_takes(sender, digest), digest))
    grown = resident_bytes(running.pid) - before
    print(f"accepted {sum(total for total, _ in taken)} bytes, the relay grew by {grown}")
    assert grown < BOUND_BYTES
    for (_, receiver), (total, digest) in zip(ways, taken):
        received = hashlib.sha256()
        receiver.settimeout(TIMEOUT)
        while total:
            block = receiver.recv(min(total, 1 << 16))
            assert block, "the end came too early"
            received.update(block)
            total -= len(block)
        assert received.digest() == digest.digest()
    one.close()
    other.close()


def test_the_backlog_is_at_most_one_read(loop: Loop) -> None:
    """However much is offered, however often: what is queued came from a single read."""
    one, other = loop.pair()
    one.setblocking(False)
    offered = 0
    while True:
        loop.pump()  # checks the bound of each backlog after every turn
        try:
            offered += one.send(BLOCK)
        except BlockingIOError:
            break
    loop.pump()
    queued = [len(c.backlog) for c in loop.server.connections if c.backlog is not None]
    assert len(queued) == 1
    received = 0
    while received < offered:
        received += len(other.recv(1 << 20))
        loop.pump()
    assert received == offered
    assert all(connection.backlog is None for connection in loop.server.connections)


def test_a_stalled_pair_does_not_hinder_another(relay: Callable[..., RelayProcess]) -> None:
    """Each pair waits for itself alone."""
    running = relay()
    one, other = running.pair("stalled")
    send_all_it_takes(one, hashlib.sha256())
    good, partner = running.pair("good")
    good.sendall(BLOCK)
    assert receive(partner, len(BLOCK)) == BLOCK
    for sock in (one, other, good, partner):
        sock.close()
