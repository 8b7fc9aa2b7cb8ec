"""What the tests of streams share: a simple decoder of frames, and a relay without sockets."""

from __future__ import annotations

import struct

from helpers import BINARY, CLOSE, FakeTransport, frame, handshake

from transit_relay import (
    DISCARD,
    Bytes,
    DetectFraming,
    RawFraming,
    Reason,
    Rendezvous,
    Role,
    Session,
    State,
    UsageRecord,
)
from ws_frames import (
    FrameParser,
    Framing,
    HttpFraming,
    ProtocolError,
    ProxyFraming,
    WebSocketFraming,
)

LINE = handshake("token", "side")
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)

# Frames: the content of a stream, decoded by this file and by a FrameParser.

Found = list[tuple[int, bytes, bool]]


def note(found: Found, opcode: int, payload: bytes, is_last: bool) -> None:
    """Append to `found`. Join adjacent pieces of a message."""
    if opcode == BINARY and not payload and not is_last:
        return
    if opcode == BINARY and found and found[-1][0] == BINARY and not found[-1][2]:
        payload = found.pop()[1] + payload
    found.append((opcode, payload, is_last))


def plain_reading(data: bytes, masked: bool) -> tuple[Found, int | None]:
    """Return the events in a whole stream, and the close code of the error that ends it, if any.

    This second implementation is simple and slow. It stops after a Close.
    """
    found: Found = []
    at, in_message = 0, False
    while len(data) >= at + 2:
        first, second = data[at], data[at + 1]
        opcode, final, size = first & 15, first >= 128, second & 127
        if first & 0b0111_0000 or opcode not in (0, 1, 2, 8, 9, 10) or (second >= 128) != masked:
            return found, 1002
        if opcode >= 8 and (not final or size >= 126):
            return found, 1002
        if opcode < 8 and (opcode == 0) != in_message:
            return found, 1002
        if opcode == 1:
            return found, 1003
        at += 2
        if size >= 126:
            code, least = ("!H", 126) if size == 126 else ("!Q", 65536)
            if len(data) < at + struct.calcsize(code):
                break
            (size,) = struct.unpack_from(code, data, at)
            at += struct.calcsize(code)
            if size < least or size >= 2**63:
                return found, 1002
        key = b"\0\0\0\0"
        if masked:
            key = data[at : at + 4]
            if len(key) < 4:
                break
            at += 4
        payload = data[at : at + size]
        if masked:
            payload = bytes(byte ^ key[n % 4] for n, byte in enumerate(payload))
        at += size
        is_whole = at <= len(data)
        if opcode < 8:
            in_message = not (final and is_whole)
            note(found, BINARY, payload, not in_message)
        elif is_whole:
            if opcode == CLOSE and payload:
                codes = {*range(1000, 1004), *range(1007, 1015), *range(3000, 5000)}
                if len(payload) < 2 or struct.unpack_from("!H", payload)[0] not in codes:
                    return found, 1002
                if payload[2:].decode("utf-8", "replace").encode() != payload[2:]:
                    return found, 1007
            note(found, opcode, payload, True)
            if opcode == CLOSE:
                break
    return found, None


def read(pieces: list[bytes], masked: bool) -> tuple[Found, int | None]:
    """Return the same, found by a FrameParser. Each piece is in a buffer that is overwritten."""
    parser = FrameParser(must_be_masked=masked)
    found: Found = []
    for piece in pieces:
        buffer = bytearray(piece)
        try:
            for event in parser.receive(memoryview(buffer)):
                note(found, event.opcode, bytes(event.payload), event.is_last)
                if event.opcode == CLOSE:
                    return found, None
        except ProtocolError as error:
            return found, error.code
        buffer[:] = b"\xaa" * len(buffer)
    return found, None


# A client without a socket. Its Session and Framing are real.


class FramedTransport(FakeTransport):
    """Stands for a Connection. Its Session and Framing are real. It keeps what is written."""

    framing: Framing

    def __init__(
        self, rendezvous: Rendezvous, role: Role = Role.PORT, journal: list[object] | None = None
    ) -> None:
        """`role`: of the listener. `journal`: a list that several transports share."""
        super().__init__()
        self.session = Session(self, rendezvous, 0.0, role)
        self.framing: Framing = DetectFraming(self.session, self)
        self.journal = [] if journal is None else journal
        self.queued = 0  # bytes that the client leaves unread; set by the test
        self.activities = 0

    def feed(self, *pieces: bytes) -> None:
        """Receive the pieces, each in a buffer that is overwritten afterwards."""
        for piece in pieces:
            buffer = bytearray(piece)
            self.framing.receive(memoryview(buffer))
            buffer[:] = b"\n" * len(buffer)

    def send(self, data: Bytes) -> None:
        if self.framing.is_raw:
            assert list(self.framing.encode(data)) == [data]
        self.write(*self.framing.encode(data))

    def write(self, data: Bytes, *more: Bytes) -> None:
        written = b"".join((data, *more))
        assert not self.finished, f"written after the end: {written!r}"
        assert len(data), "nothing is written"
        self.sent += written
        self.journal.append((self, written))

    def finish(self, reason: Reason) -> None:
        closing_bytes, self.framing = self.framing.closing_bytes(reason.value), DISCARD
        if closing_bytes:
            self.write(closing_bytes)
        super().finish(reason)

    def queued_bytes(self) -> int:
        return self.queued

    def is_behind(self, most: int) -> bool:
        return self.queued > most

    def note_activity(self) -> None:
        self.activities += 1

    def frames(self) -> list[tuple[int, bytes]]:
        """Return the frames that a WebSocket client was sent."""
        return read_frames(self.sent)


# The Framing that the relay gives to another one.
PARTS_OF: dict[type, tuple[type, ...]] = {
    ProxyFraming: (DetectFraming,),
    HttpFraming: (RawFraming,),
    WebSocketFraming: (RawFraming,),
}


def new_framing(kind: type[Framing], client: FramedTransport) -> Framing:
    """Return a Framing of this kind, as the relay makes it."""
    parts = [part(client.session, client) for part in PARTS_OF.get(kind, ())]
    return kind(client.session, client, *parts)


def read_frames(sent: bytes) -> list[tuple[int, bytes]]:
    """Return opcodes and payloads. Each frame must be whole, and a message of its own."""
    found, code = plain_reading(sent, masked=False)
    frames = [(opcode, payload) for opcode, payload, _ in found]
    assert code is None and all(is_last for _, _, is_last in found), found
    assert b"".join(frame(opcode, payload, key=None) for opcode, payload in frames) == sent
    assert all(payload for opcode, payload in frames if opcode == BINARY), "an empty message"
    return frames


class Room:
    """A Rendezvous, its records, and a journal of what was written to all clients, in order."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.rendezvous = Rendezvous(self.records.append, lambda: 100.0)
        self.journal: list[object] = []

    def client(self, role: Role = Role.PORT) -> FramedTransport:
        """Return a new client."""
        return FramedTransport(self.rendezvous, role, self.journal)

    def partner(self) -> FramedTransport:
        """Return a raw client that waits under our token."""
        client = self.client()
        client.feed(handshake("token", "other"))
        assert client.session.state == State.WAIT_PARTNER
        return client

    def socket(self) -> FramedTransport:
        """Return a WebSocket client whose upgrade is done."""
        client = self.client(role=Role.WEBSOCKET)
        client.session.stream_opened()
        client.framing = new_framing(WebSocketFraming, client)
        return client

    def pair(self) -> tuple[FramedTransport, FramedTransport]:
        """Return a WebSocket client and its raw partner. Both have received `ok`."""
        partner, client = self.partner(), self.socket()
        client.feed(frame(BINARY, LINE))
        assert partner.sent == b"ok\n" and client.frames() == [(BINARY, b"ok\n")]
        for one in (partner, client):
            one.sent = b""
            one.activities = 0
        self.journal.clear()
        return client, partner

    def moods(self) -> list[str]:
        """Return the moods of all records so far, in order."""
        return [record.mood for record in self.records]
