"""Clients of one relay for the scenarios of test_differential.py, and everything they receive."""

from __future__ import annotations

import base64
import errno
import hashlib
import itertools
import os
import socket
import struct
from typing import NamedTuple

from children import TIMEOUT, Record, Relay

OK = b"ok\n"
BAD = b"bad handshake\n"
IMPATIENT = b"impatient\n"
# A pair of Stage.settle sends these bytes. No pair of a scenario may send the same number.
MARKER = b"m" * 7919

# The request of a WebSocket client. The key is filled in.
UPGRADE = """\
GET / HTTP/1.1
Host: localhost
Upgrade: websocket
Connection: Upgrade
Sec-WebSocket-Key: {key}
Sec-WebSocket-Version: 13

""".replace("\n", "\r\n")

# Opcodes: RFC 6455, 5.2.
CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
NORMAL = struct.pack(">H", 1000)  # a Close code, 7.4.1

_marker_numbers = itertools.count()


def handshake(token: str, side: str | None = None) -> bytes:
    """Return a handshake. Token and side are any strings, and are brought to the right length."""
    token = hashlib.sha256(token.encode()).hexdigest()
    if side is None:
        return f"please relay {token}\n".encode()
    return f"please relay {token} for side {side:0>16}\n".encode()


def frame(
    opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True, reserved: int = 0
) -> bytes:
    """Encode a frame as a client does: RFC 6455, 5.2 and 5.3."""
    if len(payload) < 126:
        length, extended = len(payload), b""
    elif len(payload) < 1 << 16:
        length, extended = 126, struct.pack(">H", len(payload))
    else:
        length, extended = 127, struct.pack(">Q", len(payload))
    start = bytes([final << 7 | reserved << 4 | opcode, masked << 7 | length]) + extended
    if not masked:
        return start + payload
    key = os.urandom(4)
    size = len(payload)
    pad = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return start + key + (int.from_bytes(payload, "big") ^ pad).to_bytes(size, "big")


class Seen(NamedTuple):
    """What one client received from the relay."""

    data: str  # over WebSocket: the payload
    end: str  # over WebSocket: the Close, if any, and the end of TCP if that was not orderly
    pongs: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """Everything that a scenario shows of a relay."""

    clients: dict[str, Seen]
    records: list[Record]


class Client:
    """One TCP connection to the relay, and everything it has received."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        self._expected = 0  # number of received bytes that `expect` has checked
        self._broken = False
        self._end = ""

    def encode(self, *parts: bytes) -> bytes:
        """Return the bytes that go over the connection for these parts."""
        return b"".join(parts)

    def send(self, *parts: bytes) -> None:
        """Send all parts, or as much as possible if the relay ends the connection.

        Over TCP the parts are joined. Over WebSocket each part is a message. One write has all.
        """
        self.write(self.encode(*parts))

    def send_unfinished(self, data: bytes) -> None:
        """Send bytes after which more must follow (over WebSocket: a message without its end)."""
        self.write(data)

    def send_last(self, *parts: bytes) -> None:
        """Send all parts, then the end of our direction."""
        self.send(*parts)
        self.shutdown()

    def write(self, encoded: bytes) -> None:
        """Send bytes that are encoded already."""
        try:
            self._socket.sendall(encoded)
        except ConnectionError:
            self._broken = True  # bytes that came before may still be read

    def expect(self, data: bytes) -> None:
        """Read exactly these bytes."""
        until = self._expected + len(data)
        while len(self._received) < until and self._receive():
            pass
        got = bytes(self._received[self._expected : until])
        self._expected += len(got)
        assert got == data, f"expected {summary(data)}, got {summary(got)} {self._how_it_ended()}"

    def expect_end(self) -> None:
        """Read the end. No byte may come before it."""
        self.read_to_end()
        self._assert_all_expected("the end")

    def read_to_end(self) -> None:
        """Read everything, up to the end."""
        while self._receive():
            pass

    def unchecked(self) -> bytes:
        """Return the payload that has come and was not checked by `expect`."""
        return bytes(self._received[self._expected :])

    def shutdown(self) -> None:
        """End our direction. The other direction stays open."""
        try:
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # the relay has reset the connection
                raise

    def close(self) -> None:
        """Read everything that has come, and close: an unread byte would cause a reset."""
        self._socket.setblocking(False)
        try:
            self._take_all_there_is()
        except (BlockingIOError, ConnectionResetError):
            pass
        self._assert_all_expected("nothing, because the scenario closes the connection")
        self._leave("closed")

    def reset(self) -> None:
        """Close with a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._leave("reset by us")

    def finish(self) -> Seen:
        """If the connection is open, end our direction and read up to the end."""
        if self._socket.fileno() != -1:
            self.shutdown()
            self.read_to_end()
            self._socket.close()
        return Seen(summary(self._received), self._how_it_ended())

    def abandon(self) -> None:
        """Close without a check, after a scenario that failed."""
        self._socket.close()

    def _leave(self, how: str) -> None:
        self._socket.close()
        self._end = self._end or how

    def _assert_all_expected(self, instead: str) -> None:
        got = self._received[self._expected :]
        assert not got, f"expected {instead}, got {summary(got)}"

    def _how_it_ended(self) -> str:
        return self._end

    def _take_all_there_is(self) -> None:
        """Read without waiting. Raises BlockingIOError when no more bytes are there."""
        while not self._end:
            data = self._socket.recv(1 << 16)
            if not data:
                return  # both have closed: the order has no meaning
            self._take(data)

    def _receive(self) -> bool:
        """Read some bytes. Return False at the end."""
        if self._end:
            return False
        try:
            data = self._socket.recv(1 << 16)
        except ConnectionResetError:
            self._end = "reset"
            return False
        if not data:
            self._end = "reset" if self._broken else "end"
        self._take(data)
        return bool(data)

    def _take(self, data: bytes) -> None:
        self._received += data


class WebSocketClient(Client):
    """One WebSocket connection to the relay, with the parts of RFC 6455 that the scenarios need.

    It shares no code with the relay. If the relay refuses the upgrade, it is a TCP connection that
    has received the answer.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.is_open = False
        self.sizes: list[int] = []  # of the received messages
        self._partial = bytearray()  # received, but not yet a whole frame
        self._has_sent_close = False
        self._close = ""  # the Close that was received
        self._pongs: list[str] = []
        self._key = base64.b64encode(os.urandom(16)).decode()

    def upgrade(self, request: str = UPGRADE, *frames: bytes) -> None:
        """Request the upgrade, with frames in the same segment, and read the answer."""
        self.write(self.encode_request(request) + b"".join(frames))
        self.read_answer()

    def encode_request(self, request: str = UPGRADE) -> bytes:
        """Return the request with our key."""
        return request.format(key=self._key).encode()

    def read_answer(self) -> None:
        """Read the answer. If it is an upgrade, check its fields."""
        while b"\r\n\r\n" not in self._received and self._receive():
            pass
        head, end, frames = bytes(self._received).partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101 "):
            return
        fields = dict(line.lower().split(": ", 1) for line in head.decode().split("\r\n")[1:])
        guid = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1((self._key + guid).encode()).digest()).decode()
        fields.pop("server", "")
        assert end and fields == {
            "upgrade": "websocket",
            "connection": "upgrade",
            "sec-websocket-accept": accept.lower(),
        }, head
        assert accept.encode() in head, head
        self.is_open = True
        self._received.clear()
        self._take(frames)

    def encode(self, *parts: bytes) -> bytes:
        return b"".join(frame(BINARY, part) for part in parts)

    def send_unfinished(self, data: bytes) -> None:
        self.write(frame(BINARY, data, final=False))

    def send_last(self, *parts: bytes, close: bytes = NORMAL) -> None:
        self._has_sent_close = True
        self.write(self.encode(*parts) + frame(CLOSE, close))

    def shutdown(self) -> None:
        """Send a Close. The other direction stays open."""
        if not self.is_open:
            super().shutdown()
        elif not self._has_sent_close:
            self.send_last()

    def end_tcp(self) -> None:
        """End our direction of the TCP connection, without a Close."""
        self._has_sent_close = True  # after this none can be sent
        super().shutdown()

    def finish(self) -> Seen:
        return super().finish()._replace(pongs=tuple(self._pongs))

    def _how_it_ended(self) -> str:
        if self._close and self._end == "end":
            return self._close
        return f"{self._close}, {self._end}" if self._close else self._end

    def _take_all_there_is(self) -> None:
        close = self._close
        try:
            super()._take_all_there_is()
        finally:
            self._close = close  # a Close that crosses our own end has no meaning

    def _take(self, data: bytes) -> None:
        if not self.is_open:
            super()._take(data)
            return
        self._partial += data
        while self._take_frame():
            pass
        if self._end and self._partial:
            self._end += " within a frame"

    def _take_frame(self) -> bool:
        """Take a whole frame from the received bytes. Return False if there is none."""
        data = self._partial
        if len(data) < 2:
            return False
        opcode, length, start = data[0], data[1], 2
        if length == 126:
            start = 4
        elif length == 127:
            start = 10
        if len(data) < start:
            return False
        if start > 2:
            length = int.from_bytes(data[2:start], "big")
        # Neither relay sends fragments or text. A server does not mask: RFC 6455, 5.1.
        known = [0x80 | known for known in (BINARY, CLOSE, PING, PONG)]
        assert opcode in known, f"opcode {opcode:#x}"
        assert data[1] < 128, "the relay masks"
        if len(data) < start + length:
            return False
        payload = bytes(data[start : start + length])
        del data[: start + length]
        assert not self._close, f"{summary(payload)} after the relay's Close"
        if opcode == 0x80 | BINARY:
            self.sizes.append(length)
            self._received += payload
        elif opcode == 0x80 | PING:  # only from our relay, after 25 s without a byte
            self.write(frame(PONG, payload))
        elif opcode == 0x80 | PONG:
            self._pongs.append(repr(payload))
        else:
            self._close = f"Close {int.from_bytes(payload[:2], 'big')}" if payload else "Close"
            assert not payload[2:], f"{self._close} because {summary(payload[2:])}"
            if not self._has_sent_close:
                self.send_last(close=payload)
        return True


def summary(data: bytes | bytearray) -> str:
    """Return the bytes as text, or their length and digest if they are many."""
    if data.startswith(b"HTTP/1.1 "):
        return bytes(data[:12]).decode()  # the rest of an HTTP answer may differ
    if len(data) <= 200:
        return repr(bytes(data))
    return f"{len(data)} bytes with SHA-256 {hashlib.sha256(data).hexdigest()}"


Kinds = tuple[str, ...]


class Stage:
    """One scenario with one relay: its clients and its usage records.

    The kinds, "tcp" or "ws", are assigned to the clients in turn, in the order they connect.
    """

    def __init__(self, relay: Relay, token: str, kinds: Kinds) -> None:
        self._relay = relay
        self.token = token
        self.tcp_port, self.websocket_port = relay.ports
        self._kinds = itertools.cycle(kinds)
        self._clients: dict[str, Client] = {}
        self._records: list[Record] = []
        self.settle()
        self._records.clear()  # records of an earlier scenario that failed

    def connect(self, name: str) -> Client:
        """Connect a client of the next kind. Over WebSocket, the upgrade is done."""
        if next(self._kinds) == "tcp":
            return self.connect_to(self.tcp_port, name)
        client = self.connect_websocket_to(self.websocket_port, name)
        client.upgrade()
        return client

    def connect_to(self, port: int, name: str) -> Client:
        """Connect a client over TCP."""
        assert name not in self._clients
        client = self._clients[name] = Client(port)
        return client

    def connect_websocket_to(self, port: int, name: str) -> WebSocketClient:
        """Connect a WebSocket client that has not requested the upgrade yet."""
        assert name not in self._clients
        client = self._clients[name] = WebSocketClient(port)
        return client

    def handshake(self, side: str | None = None) -> bytes:
        """Return a handshake with the token of this scenario."""
        return handshake(self.token, side)

    def waiting(self, name: str, side: str | None = None) -> Client:
        """Connect a client, and wait until the relay has handled its handshake."""
        client = self.connect(name)
        client.send(self.handshake(side))
        self.settle()
        return client

    def pair(self) -> tuple[Client, Client]:
        """Connect a pair: "first" and "second", in the order of their handshakes."""
        first = self.waiting("first", "a")
        second = self.connect("second")
        second.send(self.handshake("b"))
        first.expect(OK)
        second.expect(OK)
        return first, second

    def settle(self) -> None:
        """Wait until the relay has handled everything sent to it, and has written the records.

        A client that waits for its partner gets no answer that could tell. But a relay serves its
        connections in one loop, and the kernel reports events in the order in which they happened.
        So connect another pair, let it send bytes, end it, and wait for its record. The relay needs
        several turns for that, and has then handled all earlier events. The record of that pair
        follows all records of earlier events, and is recognised by its size.
        """
        marker = f"marker {next(_marker_numbers)}"
        one, two = Client(self.tcp_port), Client(self.tcp_port)
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
        """End the remaining connections, in the order in which they were made; return the outcome.

        Before a WebSocket connection ends, the relay handles the end of the connection before it:
        the reference sends no Close if it reads the client's Close in the same turn.

        The records are sorted, because the records of one event (a match that makes other clients
        redundant) have no defined order.
        """
        seen = {}
        for name, client in self._clients.items():
            if isinstance(client, WebSocketClient):
                self.settle()
            seen[name] = client.finish()
        self.settle()
        return Outcome(seen, sorted(self._records))

    def outcome_of_stop(self) -> Outcome:
        """Return the outcome after the relay was stopped in the middle of the scenario."""
        seen = {name: client.finish() for name, client in self._clients.items()}
        return Outcome(seen, sorted(self._records + self._relay.last_records()))

    def abandon(self) -> None:
        """Close all clients without a check."""
        for client in self._clients.values():
            client.abandon()
