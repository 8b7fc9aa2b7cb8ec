"""A stage for the scenarios of test_differential.py: clients of one relay, and what they saw."""

from __future__ import annotations

import errno
import hashlib
import itertools
import socket
import struct
from typing import NamedTuple

from children import TIMEOUT, Record, Relay

OK = b"ok\n"
BAD = b"bad handshake\n"
IMPATIENT = b"impatient\n"
# Bytes that a pair of the stage's own moves: no scenario may move just as many.
MARKER = b"m" * 7919

_marker_numbers = itertools.count()


def handshake(token: str, side: str | None = None) -> bytes:
    """A handshake. Token and side are any words: they are brought to the right length here."""
    token = hashlib.sha256(token.encode()).hexdigest()
    if side is None:
        return f"please relay {token}\n".encode()
    return f"please relay {token} for side {side:0>16}\n".encode()


class Seen(NamedTuple):
    """What one client saw of the relay."""

    data: str
    end: str


class Outcome(NamedTuple):
    """All that a scenario shows of a relay."""

    clients: dict[str, Seen]
    records: list[Record]


class Client:
    """One TCP connection to the relay, which remembers what it saw."""

    def __init__(self, relay: Relay) -> None:
        self._socket = socket.create_connection(("127.0.0.1", relay.port), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        self._end = ""

    def send(self, data: bytes) -> None:
        """Send it all, or as much as can be sent before the relay breaks off."""
        try:
            self._socket.sendall(data)
        except ConnectionError:
            self._end = self._end or "reset"

    def expect(self, data: bytes) -> None:
        """Read just these bytes."""
        start = len(self._received)
        while len(self._received) - start < len(data):
            if not self._receive(len(data) - (len(self._received) - start)):
                break
        got = bytes(self._received[start:])
        assert got == data, f"expected {_summary(data)}, got {_summary(got)} {self._end}"

    def expect_end(self) -> None:
        """Read the relay's end, and nothing before it."""
        assert not self._receive(1), f"got {_summary(self._received)} instead of the end"

    def shutdown(self) -> None:
        """End our direction, and go on listening."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the relay has reset the connection
                raise

    def close(self) -> None:
        """Leave, having read everything: a byte left unread would make the kernel send a reset."""
        self._socket.setblocking(False)
        try:
            unread = self._socket.recv(1)
        except BlockingIOError:
            unread = b""
        assert not unread, "the scenario closes a connection without reading what came"
        self._leave("closed")

    def reset(self) -> None:
        """Break off: the relay's kernel sees a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._leave("broken off")

    def finish(self) -> Seen:
        """Where we have not left: end our direction and read on to the relay's end."""
        if self._socket.fileno() != -1:
            self.shutdown()
            while self._receive(1 << 16):
                pass
            self._socket.close()
        return Seen(_summary(self._received), self._end)

    def abandon(self) -> None:
        """Close without a look, behind a scenario that failed."""
        self._socket.close()

    def _leave(self, how: str) -> None:
        self._socket.close()
        self._end = self._end or how

    def _receive(self, size: int) -> bool:
        """Take some bytes; False where there is the end instead."""
        if self._end:
            return False
        try:
            data = self._socket.recv(size)
        except ConnectionResetError:
            self._end = "reset"
            return False
        self._received += data
        if not data:
            self._end = "end"
        return bool(data)


def _summary(data: bytes | bytearray) -> str:
    """The bytes themselves, as long as a reader would look at them."""
    if len(data) <= 200:
        return repr(bytes(data))
    return f"{len(data)} bytes with SHA-256 {hashlib.sha256(data).hexdigest()}"


class Stage:
    """Where one scenario is played against one relay."""

    def __init__(self, relay: Relay, token: str) -> None:
        self._relay = relay
        self.token = token
        self._clients: dict[str, Client] = {}
        self._records: list[Record] = []
        self.settle()
        self._records.clear()  # what a scenario that failed has left behind

    def connect(self, name: str) -> Client:
        assert name not in self._clients
        client = self._clients[name] = Client(self._relay)
        return client

    def handshake(self, side: str | None = None) -> bytes:
        """A handshake with the scenario's own token."""
        return handshake(self.token, side)

    def waiting(self, name: str, side: str | None = None) -> Client:
        """A client that the relay has taken as waiting (with a partner there, it is paired)."""
        client = self.connect(name)
        client.send(self.handshake(side))
        self.settle()
        return client

    def pair(self) -> tuple[Client, Client]:
        """Two clients that have their ok, "first" and "second" in the order of their handshakes."""
        first = self.waiting("first", "a")
        second = self.connect("second")
        second.send(self.handshake("b"))
        first.expect(OK)
        second.expect(OK)
        return first, second

    def settle(self) -> None:
        """Wait until the relay has digested all that was sent to it, and has written its records.

        There is no answer to wait for when a client is merely waiting. But a relay serves its
        connections in one loop, and events come out of the kernel in the order they went in: when
        two connections made *later* have been accepted, matched, relayed for, ended and recorded,
        which takes a relay several turns, whatever came before them has had its turn. The record
        of that pair stands behind all records of earlier events, and its size tells it apart.
        """
        marker = f"marker {next(_marker_numbers)}"
        one, two = Client(self._relay), Client(self._relay)
        try:
            one.send(handshake(marker, "a"))
            two.send(handshake(marker, "b"))
            one.expect(OK)
            two.expect(OK)
            one.send(MARKER)
            two.expect(MARKER)
            one.shutdown()
            two.expect_end()
            one.expect_end()
        finally:
            one.abandon()
            two.abandon()
        while (record := self._relay.record()).total_bytes != len(MARKER):
            self._records.append(record)

    def outcome(self) -> Outcome:
        """End every connection that is left, in the order they were made, and tell what was seen.

        The records are sorted: those of one event (a match that makes others redundant) have no
        order that means anything.
        """
        seen = {name: client.finish() for name, client in self._clients.items()}
        self.settle()
        return Outcome(seen, sorted(self._records))

    def outcome_of_stop(self) -> Outcome:
        """The same, when the relay has been stopped in the middle of the scenario."""
        seen = {name: client.finish() for name, client in self._clients.items()}
        return Outcome(seen, sorted(self._records + self._relay.last_records()))

    def abandon(self) -> None:
        for client in self._clients.values():
            client.abandon()
