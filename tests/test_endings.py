"""Nothing that was received is lost when somebody leaves (README, Differences)."""

from __future__ import annotations

import fcntl
import hashlib
import os
import socket
import struct
import termios
import threading
from collections.abc import Callable

import pytest
from helpers import TIMEOUT, Loop, RelayProcess, handshake, read_to_end, reset

TIMES = int(os.environ.get("RELAY_ENDINGS", "200"))
PAYLOAD = os.urandom(8 * 1024 * 1024)
DIGEST = hashlib.sha256(PAYLOAD).digest()


class EndlessSender(threading.Thread):
    """Sends on `sock` until it is told to stop. Nobody may stop it in any other way."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__()
        self.sock = sock
        self.stopping = False
        self.trouble: OSError | None = None
        self.start()

    def run(self) -> None:
        try:
            while not self.stopping:
                self.sock.sendall(b"x" * 4096)
        except OSError as error:
            self.trouble = error

    def stop(self) -> None:
        """End it: it must have been taken all it sent, and so must what is sent now."""
        self.stopping = True
        self.join()
        if self.trouble is not None:
            raise self.trouble
        self.sock.sendall(b"x" * 1_000_000)


def test_all_of_it_arrives_while_the_receiver_sends(relay: Callable[..., RelayProcess]) -> None:
    """A sends 8 MiB and ends; B sends without end: B gets all, then an end and no reset."""
    running = relay()
    for _ in range(TIMES):
        one, other = running.pair()
        one.settimeout(4 * TIMEOUT)
        endless = EndlessSender(other)
        drain = threading.Thread(target=read_until_closed, args=(one,))
        drain.start()
        sender = threading.Thread(target=send_then_end, args=(one, PAYLOAD))
        sender.start()
        received = hashlib.sha256()
        total = 0
        other.settimeout(4 * TIMEOUT)
        while block := other.recv(1 << 18):  # a reset would raise
            received.update(block)
            total += len(block)
        assert (total, received.digest()) == (len(PAYLOAD), DIGEST)
        endless.stop()
        other.close()
        sender.join()
        drain.join()
        one.close()


def read_until_closed(sock: socket.socket) -> None:
    """Take what comes until there is an end of any kind."""
    try:
        while sock.recv(1 << 18):
            pass
    except OSError:
        pass


def send_then_end(sock: socket.socket, data: bytes) -> None:
    """Send all of it, then this direction's end."""
    sock.sendall(data)
    sock.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize(
    ("first", "answer"),
    [(b"nonsense\n", b"bad handshake\n"), (handshake("alone"), b"impatient\n")],
    ids=["bad handshake", "impatient"],
)
def test_a_client_that_goes_on_sending_hears_why(
    relay: Callable[..., RelayProcess], first: bytes, answer: bytes
) -> None:
    """It gets the whole answer and an orderly end, not a reset that destroys both."""
    running = relay()
    for _ in range(TIMES):
        client = running.connect()
        client.sendall(first)
        endless = EndlessSender(client)
        assert read_to_end(client) == answer
        endless.stop()
        client.close()


@pytest.mark.parametrize("size", [1, 100_000, 1_000_000])
def test_a_reset_does_not_take_back_what_was_received(loop: Loop, size: int) -> None:
    """What the relay's kernel holds of A's bytes is delivered to B, then an orderly end."""
    one, other = loop.pair(tcp=True)
    (its,) = (c for c in loop.server.connections if c.sock.getpeername() == one.getsockname())
    data = os.urandom(size)
    one.setblocking(False)
    one.send(data)
    held = struct.unpack("i", fcntl.ioctl(its.fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    assert held >= min(size, 1000)
    reset(one)  # what this side had not handed over is gone with it
    received = b""
    other.setblocking(False)
    while True:
        loop.pump()
        try:
            block = other.recv(1 << 20)
        except BlockingIOError:
            continue
        if not block:
            break
        received += block
    assert received == data[:held]
    other.close()
    loop.pump()
    (record,) = loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", held)
