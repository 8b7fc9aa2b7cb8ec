"""Nothing that was received is lost when somebody leaves (README, Differences)."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable

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
TIMES = int(os.environ.get("RELAY_ENDINGS", "200"))
TIMES_WEB = max(1, TIMES // 10)  # the same, but for what these clients cost
PAYLOAD = os.urandom(8 * 1024 * 1024)
DIGEST = hashlib.sha256(PAYLOAD).digest()
BETWEEN = pytest.mark.parametrize(("first", "second"), DIRECTIONS)


class Helper(threading.Thread):
    """A thread that begins at once, and whose trouble is ours when we join it."""

    def __init__(self, work: Callable[..., object], *arguments: object) -> None:
        super().__init__()
        self.work, self.arguments = work, arguments
        self.trouble: Exception | None = None
        self.start()

    def run(self) -> None:
        try:
            self.work(*self.arguments)
        except Exception as error:
            self.trouble = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.trouble is not None:
            raise self.trouble


class EndlessSender(Helper):
    """Sends until it is told to stop. Nobody may stop it in any other way."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.stopping = False
        super().__init__(self.send)

    def send(self) -> None:
        while not self.stopping:
            self.client.send(b"x" * 4096)

    def stop(self) -> None:
        """End it: it must have been taken all it sent, and so must what is sent now."""
        self.stopping = True
        self.join()
        self.client.send(b"x" * 1_000_000)


@BETWEEN
def test_all_of_it_arrives_while_the_receiver_sends(
    relay: Callable[..., RelayProcess], first: str, second: str
) -> None:
    """A sends 8 MiB and ends; B sends without end: B gets all, then an end and no reset."""
    running = relay(*WEB)
    with running.client(first) as speller:  # once: it takes longer than to send it
        (wire,) = speller.encode(PAYLOAD)
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
    """Send all of it, then this direction's end."""
    client.send_wire(wire)
    client.half_close()


@pytest.mark.parametrize("kind", ["tcp", "ws"])
@pytest.mark.parametrize(
    ("first", "answer"),
    [(b"nonsense\n", b"bad handshake\n"), (handshake("alone"), b"impatient\n")],
    ids=["bad handshake", "impatient"],
)
def test_a_client_that_goes_on_sending_hears_why(
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
def test_a_reset_does_not_take_back_what_was_received(
    loop: Loop, size: int, first: str, second: str
) -> None:
    """What the relay's kernel holds of A's bytes is delivered to B, then an orderly end.

    Over WebSocket that is a frame which never comes to its end.
    """
    one, other = loop.meet(first, second)
    assert one.conn is not None
    data = os.urandom(size)
    (wire,) = one.encode(data)
    one.sock.setblocking(False)
    one.sock.send(wire)
    one.reset()  # what this side had not handed over is gone with it
    wait_for_hang_up(one.conn)
    held = unread_bytes(one.conn.sock) - (len(wire) - len(data))  # the head of the frame
    assert held >= min(size, 1000)
    received = other.read_to_end()
    assert digest(received) == digest(data[:held])
    other.close()
    loop.pump()
    (record,) = loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", held)
