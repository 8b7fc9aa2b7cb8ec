"""A stage for the scenarios of test_differential.py: clients of one relay, and what they saw."""

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
# Bytes that a pair of the stage's own moves: no scenario may move just as many.
MARKER = b"m" * 7919

# What a client that upgrades begins with; its key is filled in.
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
    """A handshake. Token and side are any words: they are brought to the right length here."""
    token = hashlib.sha256(token.encode()).hexdigest()
    if side is None:
        return f"please relay {token}\n".encode()
    return f"please relay {token} for side {side:0>16}\n".encode()


def frame(
    opcode: int, payload: bytes = b"", *, final: bool = True, masked: bool = True, reserved: int = 0
) -> bytes:
    """A frame as a client sends it. RFC 6455, 5.2 and 5.3."""
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
    """What one client saw of the relay."""

    data: str  # over WebSocket: the payload
    end: str  # over WebSocket: a Close, if one came, and how TCP ended if that was not orderly
    pongs: tuple[str, ...] = ()


class Outcome(NamedTuple):
    """All that a scenario shows of a relay."""

    clients: dict[str, Seen]
    records: list[Record]


class Client:
    """One TCP connection to the relay, which remembers what it saw."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = bytearray()
        self._expected = 0  # so many of these bytes have been expected
        self._broken = False
        self._end = ""

    def spell(self, *parts: bytes) -> bytes:
        """These bytes as they go over the wire."""
        return b"".join(parts)

    def send(self, *parts: bytes) -> None:
        """Send it all, or as much as can be sent before the relay breaks off.

        Over TCP the parts are one run of bytes; over WebSocket each is a message, sent at once.
        """
        self.write(self.spell(*parts))

    def begin(self, data: bytes) -> None:
        """Send the beginning of something (over WebSocket: of a message)."""
        self.write(data)

    def send_last(self, *parts: bytes) -> None:
        """Send it all, and with it the end of our direction."""
        self.send(*parts)
        self.shutdown()

    def write(self, raw: bytes) -> None:
        """Send what is spelled already."""
        try:
            self._socket.sendall(raw)
        except ConnectionError:
            self._broken = True  # what came before that may still be read

    def expect(self, data: bytes) -> None:
        """Read just these bytes."""
        until = self._expected + len(data)
        while len(self._received) < until and self._receive():
            pass
        got = bytes(self._received[self._expected : until])
        self._expected += len(got)
        assert got == data, f"expected {summary(data)}, got {summary(got)} {self._how_it_ended()}"

    def expect_end(self) -> None:
        """Read the relay's end, and nothing before it."""
        self.read_to_end()
        self._assert_all_expected("the end")

    def read_to_end(self) -> None:
        """Read whatever comes, to the relay's end."""
        while self._receive():
            pass

    def unchecked(self) -> bytes:
        """Return the payload that has come and was not checked by `expect`."""
        return bytes(self._received[self._expected :])

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
            self._take_all_there_is()
        except (BlockingIOError, ConnectionResetError):
            pass
        self._assert_all_expected("nothing, as the scenario closes the connection")
        self._leave("closed")

    def reset(self) -> None:
        """Break off: the relay's kernel sees a reset."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._leave("broken off")

    def finish(self) -> Seen:
        """Where we have not left: end our direction and read on to the relay's end."""
        if self._socket.fileno() != -1:
            self.shutdown()
            self.read_to_end()
            self._socket.close()
        return Seen(summary(self._received), self._how_it_ended())

    def abandon(self) -> None:
        """Close without a look, behind a scenario that failed."""
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
        """Without waiting: raises BlockingIOError where nothing is there any more."""
        while not self._end:
            data = self._socket.recv(1 << 16)
            if not data:
                return  # both have left: whose end was first means nothing
            self._take(data)

    def _receive(self) -> bool:
        """Take some bytes; False where there is the end instead."""
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
    """One WebSocket connection to the relay: RFC 6455, as little of it as the scenarios need.

    It shares no code with the relay. Where the relay declines the upgrade, it is a TCP connection
    which has received the answer.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.is_open = False
        self.sizes: list[int] = []  # of the messages that came
        self._wire = bytearray()  # what came of a frame that is not whole yet
        self._has_sent_close = False
        self._close = ""  # the relay's
        self._pongs: list[str] = []
        self._key = base64.b64encode(os.urandom(16)).decode()

    def upgrade(self, request: str = UPGRADE, *behind: bytes) -> None:
        """Ask for the upgrade, with frames behind it in the same segment, and read the answer."""
        self.write(self.spell_request(request) + b"".join(behind))
        self.read_answer()

    def spell_request(self, request: str = UPGRADE) -> bytes:
        return request.format(key=self._key).encode()

    def read_answer(self) -> None:
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

    def spell(self, *parts: bytes) -> bytes:
        return b"".join(frame(BINARY, part) for part in parts)

    def begin(self, data: bytes) -> None:
        self.write(frame(BINARY, data, final=False))

    def send_last(self, *parts: bytes, close: bytes = NORMAL) -> None:
        self._has_sent_close = True
        self.write(self.spell(*parts) + frame(CLOSE, close))

    def shutdown(self) -> None:
        """Send a Close, and go on listening."""
        if not self.is_open:
            super().shutdown()
        elif not self._has_sent_close:
            self.send_last()

    def end_tcp(self) -> None:
        """End our direction of the TCP connection below, without a Close."""
        self._has_sent_close = True  # there is no sending one any more
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
            self._close = close  # a Close that crosses our leaving means nothing either

    def _take(self, data: bytes) -> None:
        if not self.is_open:
            super()._take(data)
            return
        self._wire += data
        while self._take_frame():
            pass
        if self._end and self._wire:
            self._end += " within a frame"

    def _take_frame(self) -> bool:
        wire = self._wire
        if len(wire) < 2:
            return False
        opcode, length, start = wire[0], wire[1], 2
        if length == 126:
            start = 4
        elif length == 127:
            start = 10
        if len(wire) < start:
            return False
        if start > 2:
            length = int.from_bytes(wire[2:start], "big")
        # The relay has no reason to use fragments, nor anything but binary messages; no mask: 5.1.
        known = [0x80 | known for known in (BINARY, CLOSE, PING, PONG)]
        assert opcode in known, f"opcode {opcode:#x}"
        assert wire[1] < 128, "the relay masks"
        if len(wire) < start + length:
            return False
        payload = bytes(wire[start : start + length])
        del wire[: start + length]
        assert not self._close, f"{summary(payload)} behind the relay's Close"
        if opcode == 0x80 | BINARY:
            self.sizes.append(length)
            self._received += payload
        elif opcode == 0x80 | PING:  # ours, and only where 25 s pass without a byte
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
    """The bytes themselves, as long as a reader would look at them."""
    if data.startswith(b"HTTP/1.1 "):
        return bytes(data[:12]).decode()  # what else an answer says is each relay's own
    if len(data) <= 200:
        return repr(bytes(data))
    return f"{len(data)} bytes with SHA-256 {hashlib.sha256(data).hexdigest()}"


Kinds = tuple[str, ...]


class Stage:
    """Where one scenario is played against one relay.

    The kinds, "tcp" or "ws", are given to the clients by turn, in the order they connect.
    """

    def __init__(self, relay: Relay, token: str, kinds: Kinds) -> None:
        self._relay = relay
        self.token = token
        self.tcp_port, self.websocket_port = relay.ports
        self._kinds = itertools.cycle(kinds)
        self._clients: dict[str, Client] = {}
        self._records: list[Record] = []
        self.settle()
        self._records.clear()  # what a scenario that failed has left behind

    def connect(self, name: str) -> Client:
        """A client of the next kind. Over WebSocket, the upgrade is done."""
        if next(self._kinds) == "tcp":
            return self.connect_to(self.tcp_port, name)
        client = self.connect_websocket_to(self.websocket_port, name)
        client.upgrade()
        return client

    def connect_to(self, port: int, name: str) -> Client:
        """A client over TCP."""
        assert name not in self._clients
        client = self._clients[name] = Client(port)
        return client

    def connect_websocket_to(self, port: int, name: str) -> WebSocketClient:
        """A client that has not asked for the upgrade yet. (A failing one gets an HTTP answer.)"""
        assert name not in self._clients
        client = self._clients[name] = WebSocketClient(port)
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
        """End every connection that is left, in the order they were made, and tell what was seen.

        Over WebSocket each has time to get what the end of the one before means for it: the
        reference does not even send its Close when it reads the client's in the same turn.

        The records are sorted: those of one event (a match that makes others redundant) have no
        order that means anything.
        """
        seen = {}
        for name, client in self._clients.items():
            if isinstance(client, WebSocketClient):
                self.settle()
            seen[name] = client.finish()
        self.settle()
        return Outcome(seen, sorted(self._records))

    def outcome_of_stop(self) -> Outcome:
        """The same, when the relay has been stopped in the middle of the scenario."""
        seen = {name: client.finish() for name, client in self._clients.items()}
        return Outcome(seen, sorted(self._records + self._relay.last_records()))

    def abandon(self) -> None:
        for client in self._clients.values():
            client.abandon()
