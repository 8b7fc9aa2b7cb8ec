"""What the tests of streams share: what is in one, read in the plainest way, and a relay without
sockets that is fed with it.
"""

from __future__ import annotations

import struct

from helpers import BINARY, CLOSE, FakeTransport, frame, handshake

from transit_relay import (
    DISCARD,
    Bytes,
    Framing,
    Reason,
    Rendezvous,
    Role,
    Session,
    State,
    UsageRecord,
    WebSocketFraming,
    first_framing,
)
from ws_frames import FrameParser, ProtocolError

LINE = handshake("token", "side")
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: h\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)
SWITCHED = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)

# Frames: what stands in a stream, as the RFC has it and as a FrameParser finds it.

Found = list[tuple[int, bytes, bool]]


def note(found: Found, opcode: int, payload: bytes, is_last: bool) -> None:
    """Add to what was found; pieces that stand next to each other in a message switch_user one."""
    if opcode == BINARY and not payload and not is_last:
        return
    if opcode == BINARY and found and found[-1][0] == BINARY and not found[-1][2]:
        payload = found.pop()[1] + payload
    found.append((opcode, payload, is_last))


def plain_reading(data: bytes, masked: bool) -> tuple[Found, int | None]:
    """What a whole stream says, read in the plainest way: the events, and the error behind them.

    Not for pieces, not fast, and all in memory. Ends with a Close, as what follows is nothing.
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
        payload = bytes(byte ^ key[n % 4] for n, byte in enumerate(data[at : at + size]))
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
    """What a FrameParser finds in them, each in a buffer that others use soon."""
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


# A client as a whole. The Sessions are real, and so are their rules.


class FramedTransport(FakeTransport):
    """A Transport with a real Session and a real Framing. Keeps what is written."""

    framing: Framing

    def __init__(
        self, rendezvous: Rendezvous, role: Role = Role.PORT, journal: list[object] | None = None
    ) -> None:
        """`role`: of the listener. `journal`: a list that several of these share."""
        super().__init__()
        self.session = Session(self, rendezvous, 0.0, role)
        self.framing = first_framing(self.session, self)
        self.journal = [] if journal is None else journal
        self.queued = 0  # what the client leaves unread, as the test says
        self.activities = 0

    def feed(self, *pieces: bytes) -> None:
        """Each comes into the same buffer, which is soon used for others."""
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
        assert not self.finished, f"written behind the end: {written!r}"
        assert len(data), "nothing is written"
        self.sent += written
        self.journal.append((self, written))

    def finish(self, reason: Reason) -> None:
        goodbye, self.framing = self.framing.closing_bytes(reason), DISCARD
        if goodbye:
            self.write(goodbye)
        super().finish(reason)

    def queued_bytes(self) -> int:
        return self.queued

    def note_activity(self) -> None:
        self.activities += 1

    def said(self) -> list[tuple[int, bytes]]:
        """The frames that a WebSocket client was sent."""
        return read_frames(self.sent)


def read_frames(sent: bytes) -> list[tuple[int, bytes]]:
    """What is in a relay's frames, each of which is whole, and a message."""
    found, code = plain_reading(sent, masked=False)
    frames = [(opcode, payload) for opcode, payload, _ in found]
    assert code is None and all(is_last for _, _, is_last in found), found
    assert b"".join(frame(opcode, payload, key=None) for opcode, payload in frames) == sent
    assert all(payload for opcode, payload in frames if opcode == BINARY), "an empty message"
    return frames


class Room:
    """Where clients meet: a Rendezvous, its records, and what was written to all, in order."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.rendezvous = Rendezvous(self.records.append, lambda: 100.0)
        self.journal: list[object] = []

    def client(self, role: Role = Role.PORT) -> FramedTransport:
        """Somebody comes."""
        return FramedTransport(self.rendezvous, role, self.journal)

    def partner(self) -> FramedTransport:
        """Somebody comes over TCP, and waits under our token."""
        wire = self.client()
        wire.feed(handshake("token", "other"))
        assert wire.session.state == State.WAIT_PARTNER
        return wire

    def socket(self) -> FramedTransport:
        """Somebody comes whose upgrade is done."""
        wire = self.client(role=Role.WEBSOCKET)
        wire.session.stream_opened()
        wire.framing = WebSocketFraming(wire.session, wire)
        return wire

    def pair(self) -> tuple[FramedTransport, FramedTransport]:
        """A WebSocket client and its partner; both have been told `ok`."""
        partner, wire = self.partner(), self.socket()
        wire.feed(frame(BINARY, LINE))
        assert partner.sent == b"ok\n" and wire.said() == [(BINARY, b"ok\n")]
        for one in (partner, wire):
            one.sent = b""
            one.activities = 0
        self.journal.clear()
        return wire, partner

    def moods(self) -> list[str]:
        """The moods of all records so far, in order."""
        return [record.mood for record in self.records]
