"""Framings: the encoding of a client, the end of its first line, and its data, in every split."""

from __future__ import annotations

import marshal
from typing import Any, cast

import pytest
from helpers import (
    BINARY,
    CLOSE,
    CONTINUATION,
    LONGEST_MESSAGE,
    PING,
    PONG,
    TEXT,
    FakeTransport,
    close_payload,
    frame,
    handshake,
    message,
    parse_head,
    splits,
)
from streams import LINE, SWITCHED, UPGRADE, FramedTransport, Room, new_framing, read_frames

import transit_relay
from transit_relay import (
    DISCARD,
    FIRST_READ_BYTES,
    MAX_LINE_BYTES,
    RELAY_ROLES,
    DetectFraming,
    RawFraming,
    Reason,
    Role,
    Session,
    State,
)
from ws_frames import (
    CLOSE_CODES,
    FRAMED_READ_BYTES,
    FRAMES_PER_READ,
    Framing,
    HttpFraming,
    ProxyFraming,
    Reader,
    WebSocketFraming,
)

# RawFraming.


class SessionStub:
    """Takes a Session's place and notes its events.

    Like a Session, it discards what follows a line that is too long for a handshake.
    """

    def __init__(self) -> None:
        self.line: bytes | None = None
        self.data = b""

    def line_received(self, line: bytes) -> None:
        assert self.line is None, "a second line"
        assert isinstance(line, bytes)  # not a view of a buffer that will be overwritten
        self.line = line

    def bytes_received(self, data: bytes | memoryview) -> None:
        assert self.line is not None, "data before the line"
        assert len(data), "no data at all"
        if len(self.line) < MAX_LINE_BYTES:
            self.data += data


class Stream:
    """Feeds a RawFraming as a Connection does: from a buffer that is overwritten afterwards."""

    def __init__(self) -> None:
        self.session = SessionStub()
        self.framing = RawFraming(cast(Session, self.session), FakeTransport())

    def feed(self, *pieces: bytes) -> None:
        for piece in pieces:
            buffer = bytearray(piece)
            self.framing.receive(memoryview(buffer))
            buffer[:] = b"\n" * len(buffer)

    def events(self) -> tuple[bytes | None, bytes]:
        """Return the line, if it has come, and the data after it."""
        return self.session.line, self.session.data


# A stream; the line that is found in it; the data after the line.
VECTORS: dict[str, tuple[bytes, bytes | None, bytes]] = {
    "handshake": (LINE, LINE[:-1], b""),
    "handshake without its newline": (LINE[:-1], None, b""),
    "handshake and data": (LINE + b"data", LINE[:-1], b"data"),
    "data with newlines": (LINE + b"\n\na\nb\n", LINE[:-1], b"\n\na\nb\n"),
    "data that looks like a handshake": (LINE * 3, LINE[:-1], LINE * 2),
    "carriage return is kept": (b"line\r\ndata", b"line\r", b"data"),
    "carriage return ends no line": (b"line\rdata", None, b""),
    "empty line": (b"\n", b"", b""),
    "empty line and data": (b"\ndata", b"", b"data"),
    "NUL and high bytes": (b"\0\xff\n\0\xff", b"\0\xff", b"\0\xff"),
    "1,023 bytes": (b"x" * 1023, None, b""),
    "1,023 bytes and a newline, the 1,024th": (b"x" * 1023 + b"\n", b"x" * 1023, b""),
    "the same and data": (b"x" * 1023 + b"\ndata", b"x" * 1023, b"data"),
    "1,024 bytes": (b"x" * 1024, b"x" * 1024, b""),
    "1,024 bytes and a newline": (b"x" * 1024 + b"\n", b"x" * 1024, b""),
    "1,025 bytes": (b"x" * 1025, b"x" * 1024, b""),
    "1,025 bytes and a newline": (b"x" * 1025 + b"\n", b"x" * 1024, b""),
    "much more without a newline": (b"x" * 1500, b"x" * 1024, b""),
    "a newline too late, and data": (b"x" * 1100 + b"\n" + LINE, b"x" * 1024, b""),
}


@pytest.mark.parametrize(("stream", "line", "data"), VECTORS.values(), ids=VECTORS)
def test_every_split_has_the_same_line_and_data(
    stream: bytes, line: bytes | None, data: bytes
) -> None:
    for pieces in splits(stream):
        one = Stream()
        one.feed(*pieces)
        assert one.events() == (line, data), [len(piece) for piece in pieces]


@pytest.mark.parametrize(("stream", "line"), [row[:2] for row in VECTORS.values()], ids=VECTORS)
def test_the_line_is_reported_at_its_last_byte(stream: bytes, line: bytes | None) -> None:
    one = Stream()
    for count in range(1, len(stream) + 1):
        one.feed(stream[count - 1 : count])
        newline = stream[:count].find(b"\n", 0, 1024)
        assert (one.session.line is not None) == (newline >= 0 or count >= 1024), count
    assert one.session.line == line


@pytest.mark.parametrize("stream", [row[0] for row in VECTORS.values()], ids=VECTORS)
def test_the_carried_fields_are_the_position_in_the_stream(stream: bytes) -> None:
    """A second RawFraming with the same fields continues where the first one was."""
    whole = Stream()
    whole.feed(stream)
    for cut in range(1, len(stream)):
        first, second = Stream(), Stream()
        first.feed(stream[:cut])
        second.session = first.session
        second.framing = RawFraming(cast(Session, first.session), FakeTransport())
        for name in RawFraming.CARRIED:
            setattr(second.framing, name, getattr(first.framing, name))
        second.feed(stream[cut:])
        assert second.events() == whole.events(), cut


def test_data_is_passed_on_without_a_copy() -> None:
    buffers: list[object] = []

    class Receiver(SessionStub):
        def bytes_received(self, data: bytes | memoryview) -> None:
            assert isinstance(data, memoryview)
            buffers.append(data.obj)

    framing = RawFraming(cast(Session, Receiver()), FakeTransport())
    buffer = bytearray(LINE + b"early")
    framing.receive(memoryview(buffer))
    framing.receive(memoryview(buffer)[:7])
    assert buffers[0] is buffer and buffers[1] is buffer


# Clients without a socket.


@pytest.fixture
def room() -> Room:
    return Room()


# DetectFraming.

# A row: the listener; the first bytes; the Framing that they decide; how many bytes decide it.
BEGINNINGS: list[tuple[str, bytes, type[Framing], int]] = [
    *(
        ("--port", method + b" / HTTP/1.1", HttpFraming, len(method) + 1)
        for method in (b"GET", b"HEAD", b"POST", b"PUT", b"OPTIONS")
    ),
    ("--port", b"please relay ", RawFraming, 1),
    ("--port", b"GETS /", RawFraming, 4),
    ("--port", b"GET\tx", RawFraming, 4),
    ("--port", b"HEAR", RawFraming, 4),
    ("--port", b"POT", RawFraming, 3),
    ("--port", b"PUB", RawFraming, 3),
    ("--port", b"OPTIONAL", RawFraming, 7),
    ("--port", b"PATCH / HTTP/1.1", RawFraming, 2),
    ("--port", b"DELETE / HTTP/1.1", RawFraming, 1),
    ("--port", b"get / HTTP/1.1", RawFraming, 1),
    ("--port", b" GET /", RawFraming, 1),
    ("--port", b"\x16\x03\x01", RawFraming, 1),
    ("--port", b"PRI * HTTP/2.0", RawFraming, 2),
    ("--port", b"x", RawFraming, 1),
    *(("--port", text, DetectFraming, 0) for text in (b"G", b"GET", b"P", b"POST", b"OPTIONS")),
    ("--websocket", b"please relay ", RawFraming, 13),
    ("--websocket", b"please relay x", RawFraming, 13),
    ("--websocket", b"please relays", HttpFraming, 13),
    ("--websocket", b"please relax", HttpFraming, 12),
    ("--websocket", b"Please relay ", HttpFraming, 1),
    ("--websocket", b"GET / HTTP/1.1", HttpFraming, 1),
    ("--websocket", b"PATCH / HTTP/1.1", HttpFraming, 1),
    ("--websocket", b"pATCH / HTTP/1.1", HttpFraming, 2),
    ("--websocket", b"p", DetectFraming, 0),
    ("--websocket", b"please relay", DetectFraming, 0),
]


@pytest.mark.parametrize(
    ("listener", "stream", "kind", "size"),
    BEGINNINGS,
    ids=[f"{listener[2:]} {stream!r}".replace("\\", "") for listener, stream, _, _ in BEGINNINGS],
)
def test_the_first_bytes_decide_the_framing(
    room: Room, listener: str, stream: bytes, kind: type[Framing], size: int
) -> None:
    role = Role.WEBSOCKET if listener == "--websocket" else Role.PORT
    clear = State.WAIT_HANDSHAKE if kind is RawFraming else State.WAIT_UPGRADE
    unclear = State.WAIT_UPGRADE if role is Role.WEBSOCKET else State.WAIT_HANDSHAKE
    for pieces in splits(stream):
        client = room.client(role)
        came = 0
        for piece in pieces:
            client.feed(piece)
            came += len(piece)
            is_clear = kind is not DetectFraming and came >= size
            assert type(client.framing) is (kind if is_clear else DetectFraming), pieces
            assert client.session.state == (clear if is_clear else unclear), pieces
        framing = client.framing
        kept = {
            RawFraming: lambda framing=framing: framing._line,
            HttpFraming: lambda framing=framing: framing._reader.place()["_head"],
            DetectFraming: lambda framing=framing: framing._start,
        }[kind]()
        assert kept == stream, pieces
        assert not client.sent and not room.records


@pytest.mark.parametrize("role", RELAY_ROLES, ids=["--port", "--websocket"])
def test_the_bytes_that_decide_are_passed_on(room: Room, role: Role) -> None:
    """In every split, a stream with bytes after those that decide has the same answer."""
    streams: dict[bytes, tuple[bytes, list[str]]] = {
        LINE + b"?": (b"impatient\n", ["impatient"]),
        UPGRADE + frame(BINARY, LINE) + frame(CLOSE): (SWITCHED + b"\x88\0", ["lonely"]),
        b"OPTIONS / HTTP/1.0\r\n\r\n": (b"HTTP/1.1 200 OK\r\n", []),
        b"POST / HTTP/1.1\r\n\r\n???": (b"HTTP/1.1 405 Method Not Allowed\r\n", []),
    }
    if role is Role.WEBSOCKET:
        streams[b"\x16\x03\x01\n"] = (b"HTTP/1.1 400 Bad Request\r\n", [])
        streams[b"please relax\n"] = (b"HTTP/1.1 400 Bad Request\r\n", [])
        streams[b"DELETE / HTTP/1.1\n\n"] = (b"HTTP/1.1 405 Method Not Allowed\r\n", [])
    else:
        streams[b"\x16\x03\x01\n"] = (b"bad handshake\n", ["errory"])
        streams[b"DELETE / HTTP/1.1\n\n"] = (b"bad handshake\n", ["errory"])
        streams[b"GET\n"] = (b"bad handshake\n", ["errory"])
    for stream, (answer, moods) in streams.items():
        for pieces in splits(stream):
            client = room.client(role)
            client.feed(*pieces)
            assert client.sent.startswith(answer) and client.finished, pieces
            assert room.moods() == moods, pieces
            room.records.clear()


@pytest.mark.parametrize("role", RELAY_ROLES, ids=["--port", "--websocket"])
@pytest.mark.parametrize("stream", [b"", b"GET", b"please rela", b"GET / HTTP/1.1\r\n"])
def test_leaving_before_the_stream_begins(room: Room, role: Role, stream: bytes) -> None:
    """A client of --port is recorded, unless its first bytes are HTTP."""
    client = room.client(role)
    client.feed(stream)
    client.session.client_ended()
    assert client.finished and client.sent == b""
    assert room.moods() == ([] if role is Role.WEBSOCKET or b" /" in stream else ["empty"])


def test_without_ws_frames_all_is_raw(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(room.client().framing) is DetectFraming
    monkeypatch.setattr(transit_relay, "ws_frames", None)
    client = room.client()
    client.feed(b"GET / HTTP/1.1\r\n")
    assert client.sent == b"bad handshake\n" and client.finished and room.moods() == ["errory"]


# HttpFraming. What is answered to which head is test_ws_upgrade's.


@pytest.mark.parametrize(
    "rest", [b"", LINE, frame(BINARY, LINE)], ids=["nothing", "a handshake", "a frame"]
)
def test_a_request_without_upgrade_is_answered_and_the_client_ends(room: Room, rest: bytes) -> None:
    stream = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
    for pieces in splits(stream + rest):
        client = room.client()
        client.feed(*pieces)
        head, _, body = client.sent.partition(b"\r\n\r\n")
        status, headers = parse_head(head)
        assert status == "200" and headers["connection"] == "close"
        assert headers["content-length"] == str(len(body)) and b"transit-relay" in body
        assert client.finished and client.session.state == State.DONE and not room.records


def test_an_upgrade_is_answered_before_the_frames_after_it(room: Room) -> None:
    for pieces in splits(UPGRADE + frame(PING, b"p") + frame(BINARY, LINE) + frame(BINARY, b"?")):
        client = room.client(role=Role.WEBSOCKET)
        client.feed(*pieces)
        assert client.sent.startswith(SWITCHED), pieces
        assert read_frames(client.sent[len(SWITCHED) :]) == [
            (PONG, b"p"),
            (BINARY, b"impatient\n"),
            (CLOSE, close_payload(1000)),
        ]
        assert room.moods() == ["impatient"]
        room.records.clear()


def test_an_upgrade_opens_the_stream_and_is_activity(room: Room) -> None:
    client = room.client()
    client.feed(UPGRADE[:-1])
    assert (client.session.state, client.sent, client.activities) == (State.WAIT_UPGRADE, b"", 0)
    client.feed(UPGRADE[-1:])
    assert (client.session.state, client.sent, client.activities) == (
        State.WAIT_HANDSHAKE,
        SWITCHED,
        1,
    )
    assert type(client.framing) is WebSocketFraming
    client.session.client_ended()
    assert client.sent == SWITCHED + frame(CLOSE, close_payload(1000), key=None)
    assert room.moods() == ["empty"]


# WebSocketFraming: the handshake rule. A partner waits under the token. A row: the frames; whether
# the handshake is good (None: it is not whole); the data after it.

BARE = LINE[:-1]
OLDER = handshake("token")[:-1]  # a handshake without a side, which could go on


def messages(*payloads: bytes) -> bytes:
    """Return each payload as a message of one frame."""
    return b"".join(frame(BINARY, payload) for payload in payloads)


LINES: dict[str, tuple[bytes, bool | None, bytes]] = {
    "with its newline": (messages(LINE), True, b""),
    "without its newline": (messages(BARE), True, b""),
    "without its newline, and a newline": (messages(BARE, b"\n"), True, b"\n"),
    "with its newline, and another": (messages(LINE + b"\n", b"\n"), True, b"\n\n"),
    "its newline is a message": (messages(BARE[:50], BARE[50:], b"\n"), True, b"\n"),
    "its newline is a fragment": (message(BARE, b"\n"), True, b""),
    "data in the same message": (messages(LINE + b"data"), True, b"data"),
    "data in the same fragments": (message(LINE[:7], LINE[7:] + b"da", b"ta"), True, b"data"),
    "data in messages": (messages(LINE, b"d", b"", b"ata"), True, b"data"),
    "data behind no newline": (messages(BARE, b"data\n"), True, b"data\n"),
    "no newline, but more in its message": (messages(BARE + b"data"), None, b""),
    "no newline, and its message goes on": (message(BARE, ended=False), None, b""),
    "no newline, and its message ends empty": (message(BARE, b"", b""), True, b""),
    "no newline, and a Ping in the message": (
        frame(BINARY, BARE, False) + frame(PING) + frame(CONTINUATION, b""),
        True,
        b"",
    ),
    "byte by byte": (messages(*(bytes([byte]) for byte in OLDER)), True, b""),
    "byte by byte, and a newline": (messages(*(bytes([b]) for b in OLDER + b"\n")), True, b"\n"),
    "fragment by fragment": (message(*(bytes([byte]) for byte in LINE)), True, b""),
    "fragment by fragment, no newline": (message(*(bytes([byte]) for byte in BARE)), True, b""),
    "a whole one ends at its message": (messages(OLDER, BARE[77:]), True, BARE[77:]),
    "a whole one goes on in its message": (message(OLDER, BARE[77:] + b"\n?"), True, b"?"),
    "cut before its side": (messages(OLDER[:70], OLDER[70:]), True, b""),
    "empty messages are nothing": (messages(b"", BARE[:9], b"", BARE[9:], b"", b""), True, b""),
    "empty fragments are nothing": (message(b"", b"", LINE, b"", b"x", b""), True, b"x"),
    "nothing": (b"", None, b""),
    "nothing but empty messages": (messages(b"", b""), None, b""),
    "not yet whole": (messages(BARE[:-1]), None, b""),
    "junk that may go on": (messages(b"junk"), None, b""),
    "junk with a newline": (messages(b"junk\n"), False, b""),
    "junk with a newline in another message": (messages(b"junk", b"", b"\n"), False, b""),
    "a newline alone": (messages(b"\n"), False, b""),
    "carriage return": (messages(BARE + b"\r\n"), False, b""),
    "one byte more": (messages(LINE[:-1] + b"x\n"), False, b""),
    "a second line does not help": (messages(b"\n" + LINE), False, b""),
    "1,023 bytes": (messages(b"x" * 1000, b"x" * 23), None, b""),
    "1,024 bytes": (messages(b"x" * 1000, b"x" * 24), False, b""),
    "1,024 bytes in a message that goes on": (message(b"x" * 1024, ended=False), False, b""),
    "much more": (messages(b"x" * 1500), False, b""),
    "a newline as the 1,024th": (messages(b"x" * 1023 + b"\n"), False, b""),
}


@pytest.mark.parametrize(("stream", "good", "data"), LINES.values(), ids=LINES)
def test_the_handshake_rule(stream: bytes, good: bool | None, data: bytes) -> None:
    for pieces in splits(stream):
        room = Room()
        partner, client = room.partner(), room.socket()
        client.feed(*pieces)
        said = [one for one in client.frames() if one != (PONG, b"")]
        if good is None:
            assert (client.session.state, said) == (State.WAIT_HANDSHAKE, []), pieces
        elif good:
            assert (client.session.state, said) == (State.RELAYING, [(BINARY, b"ok\n")]), pieces
            assert partner.sent == b"ok\n" + data, pieces
            assert room.rendezvous.incomplete_bytes() == len(data), pieces
        else:
            assert said == [(BINARY, b"bad handshake\n"), (CLOSE, close_payload(1000))], pieces
            assert client.session.state == State.DONE and room.moods() == ["errory"], pieces


# Without a partner: frames after the handshake, and whether they are impatient.
AFTER: dict[str, tuple[bytes, bool]] = {
    "nothing": (b"", False),
    "empty messages": (messages(b"", b""), False),
    "empty fragments": (message(b"", b"", b""), False),
    "Ping and Pong": (frame(PING, b"p") + frame(PONG, b"x"), False),
    "a byte": (messages(b"x"), True),
    "a newline": (messages(b"\n"), True),
    "a byte in a message that goes on": (message(b"", b"x", ended=False), True),
    "the handshake again": (messages(LINE), True),
}


@pytest.mark.parametrize(
    "line",
    [messages(LINE), messages(BARE), message(b"", LINE, b"")],
    ids=["with its newline", "without", "in fragments"],
)
@pytest.mark.parametrize(("rest", "impatient"), AFTER.values(), ids=AFTER)
def test_only_payload_is_impatient(line: bytes, rest: bytes, impatient: bool) -> None:
    for pieces in splits(line + rest):
        room = Room()
        client = room.socket()
        client.feed(*pieces)
        said = [one for one in client.frames() if one[0] != PONG]
        if impatient:
            assert said == [(BINARY, b"impatient\n"), (CLOSE, close_payload(1000))], pieces
        assert room.moods() == ["impatient"] * impatient, pieces
        assert client.session.state == (State.DONE if impatient else State.WAIT_PARTNER), pieces


REFUSED = {
    "bad handshake": (message(b"junk\n", ended=False), b"bad handshake\n"),
    "too long": (message(b"x" * 1024, ended=False), b"bad handshake\n"),
    "impatient": (messages(LINE) + message(b"x", ended=False), b"impatient\n"),
}


@pytest.mark.parametrize(("refused", "reply"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(
    "rest",
    [
        frame(CLOSE, close_payload(1001)),
        frame(TEXT, b""),
        frame(BINARY, b"", key=None),
        frame(PING, b"p"),
        b"\xff\xff",
    ],
    ids=["Close", "text", "not masked", "Ping", "junk"],
)
def test_a_refusal_ends_with_1000_and_later_frames_are_ignored(
    refused: bytes, reply: bytes, rest: bytes
) -> None:
    for pieces in splits(refused + rest):
        client = Room().socket()
        client.feed(*pieces)
        assert client.frames() == [(BINARY, reply), (CLOSE, close_payload(1000))], pieces


# Frames from a client, in a pair.


def test_the_payload_of_one_read_is_sent_at_once_after_its_pongs(room: Room) -> None:
    client, partner = room.pair()
    client.feed(
        frame(BINARY, b"a")
        + frame(PING, b"1")
        + message(b"b", b"", b"c")
        + frame(PONG, b"?")
        + frame(PING, b"2")
        + frame(BINARY, b"")
        + frame(BINARY, b"defg")[:-2]
    )
    pongs = frame(PONG, b"1", key=None) + frame(PONG, b"2", key=None)
    assert room.journal == [(client, pongs), (partner, b"abcde")]
    client.feed(frame(BINARY, b"defg")[-2:])
    assert room.journal[2:] == [(partner, b"fg")]
    assert room.rendezvous.incomplete_bytes() == 7


def test_frames_without_payload_write_nothing(room: Room) -> None:
    client, _ = room.pair()
    client.feed(frame(BINARY), message(b"", b"", b""), frame(PONG, b"?"), frame(BINARY, b"x")[:-1])
    assert room.journal == []


def test_a_part_of_a_frame_is_sent_before_the_rest_has_come(room: Room) -> None:
    client, partner = room.pair()
    client.feed(frame(BINARY, b"x" * (1 << 16))[:-1])
    assert partner.sent == b"x" * 65535
    client.feed(frame(BINARY, b"x" * (1 << 16))[-1:])
    assert partner.sent == b"x" * 65536


def test_every_ping_is_answered(room: Room) -> None:
    client, _ = room.pair()
    pings = [b"", b"p", b"p", b"q" * 125]
    client.feed(
        *[frame(PING, ping) for ping in pings], b"".join(frame(PING, ping) for ping in pings)
    )
    assert client.frames() == [(PONG, ping) for ping in pings * 2]


def test_a_client_with_much_unread_gets_the_newest_pong_only(room: Room) -> None:
    client, partner = room.pair()
    client.queued = 64 * 1024
    client.feed(frame(PING, b"1") + frame(PING, b"2"))
    assert client.frames() == [(PONG, b"1"), (PONG, b"2")]
    client.queued += 1
    client.feed(frame(PING, b"3") + frame(BINARY, b"data") + frame(PING, b"4"))
    client.feed(frame(PING, b"5") + frame(PING, b"6"))
    assert client.frames() == [(PONG, b"1"), (PONG, b"2")] and partner.sent == b"data"
    client.queued = 0
    client.framing.backlog_sent()
    client.framing.backlog_sent()
    assert client.frames() == [(PONG, b"1"), (PONG, b"2"), (PONG, b"6")]


def test_a_newer_pong_replaces_one_that_waits(room: Room) -> None:
    client, _ = room.pair()
    client.queued = 64 * 1024 + 1
    client.feed(frame(PING, b"old"))
    client.queued = 1
    client.feed(frame(PING, b"new"))
    client.framing.backlog_sent()
    assert client.frames() == [(PONG, b"new")]


def test_a_pong_that_waits_is_sent_before_the_close(room: Room) -> None:
    client, _ = room.pair()
    client.queued = 64 * 1024 + 1
    client.feed(frame(PING, b"p"))
    client.feed(frame(CLOSE))
    client.framing.backlog_sent()
    assert client.frames() == [(PONG, b"p"), (CLOSE, b"")]


def test_reads_grow_while_frames_are_few(room: Room) -> None:
    """They begin small, and grow step by step."""
    assert room.client().framing.max_read_bytes == FIRST_READ_BYTES
    client = room.client(role=Role.WEBSOCKET)
    client.feed(UPGRADE[:-1])
    assert client.framing.max_read_bytes == room.socket().framing.max_read_bytes == FIRST_READ_BYTES
    stream = frame(BINARY, b"x" * (1 << 20))
    sizes = [FIRST_READ_BYTES]
    client, _ = room.pair()
    while sizes[-1] < FRAMED_READ_BYTES:
        assert client.framing.max_read_bytes == sizes[-1]
        client.feed(stream[: sizes[-1]])
        stream = stream[sizes[-1] :]
        sizes.append(client.framing.max_read_bytes)
        assert sizes[-2] < sizes[-1] <= min(4 * sizes[-2], FRAMED_READ_BYTES)


@pytest.mark.parametrize(
    "small",
    [frame(PING), frame(BINARY), frame(CONTINUATION, b"x", False), frame(BINARY, b"x" * 30)],
    ids=["Pings", "messages", "fragments", "records"],
)
def test_reads_shrink_when_frames_are_many(room: Room, small: bytes) -> None:
    """The size of a read is at most that of FRAMES_PER_READ such frames."""
    client, _ = room.pair()
    client.feed(frame(BINARY, b"x" * 60_000, False))
    assert client.framing.max_read_bytes == FRAMED_READ_BYTES
    if small[0] & 0x0F == BINARY:
        client.feed(frame(CONTINUATION))
        client.feed(frame(BINARY, b"x" * 60_000))
    for _ in range(6):
        frames = client.framing.max_read_bytes // len(small)
        client.feed(small * frames)
        size = client.framing.max_read_bytes
        assert FIRST_READ_BYTES <= size <= max(FIRST_READ_BYTES, FRAMES_PER_READ * len(small))


# Ends.

ENDS: dict[str, tuple[bytes, bytes]] = {
    "an empty Close": (frame(CLOSE), b""),
    "Close 1000": (frame(CLOSE, close_payload(1000)), close_payload(1000)),
    "Close 1001": (frame(CLOSE, close_payload(1001)), close_payload(1001)),
    "Close with a reason": (frame(CLOSE, close_payload(4000, b"why")), close_payload(4000)),
    "text": (frame(TEXT, b"t"), close_payload(1003)),
    "not masked": (frame(BINARY, b"x", key=None), close_payload(1002)),
    "a reserved bit": (b"\xc2\x80\0\0\0\0", close_payload(1002)),
    "a stray continuation": (frame(CONTINUATION, b"x"), close_payload(1002)),
    "a bad Close": (frame(CLOSE, close_payload(1005)), close_payload(1002)),
    "a Close that is not UTF-8": (frame(CLOSE, close_payload(1000, b"\xff")), close_payload(1007)),
}


@pytest.mark.parametrize(("end", "answer"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(
    "rest",
    [b"", frame(BINARY, b"late"), frame(CLOSE), b"\0\0"],
    ids=["nothing more", "a message", "Close", "junk"],
)
def test_the_end_of_a_pair(end: bytes, answer: bytes, rest: bytes) -> None:
    """Payload before the end is delivered. What follows the end is discarded."""
    stream = frame(BINARY, b"before") + frame(PING, b"p") + end + rest
    for pieces in splits(stream):
        room = Room()
        client, partner = room.pair()
        client.feed(*pieces)
        assert client.frames() == [(PONG, b"p"), (CLOSE, answer)], pieces
        assert partner.sent == b"before", pieces
        assert (
            client.finished
            and client.reason is Reason.ENDED
            and partner.finished
            and partner.reason is Reason.ENDED
        )
        partner.session.end_sent()
        assert [(one.mood, one.total_bytes) for one in room.records] == [("happy", 6)], pieces


@pytest.mark.parametrize(("end", "answer"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(
    ("before", "mood"),
    [(b"", "empty"), (messages(BARE[:-1]), "empty"), (messages(LINE), "lonely")],
    ids=["before the line", "within the line", "after the line"],
)
def test_the_end_of_a_client_without_a_partner(
    end: bytes, answer: bytes, before: bytes, mood: str
) -> None:
    for pieces in splits(before + end):
        room = Room()
        client = room.socket()
        client.feed(*pieces)
        assert client.frames() == [(CLOSE, answer)] and client.finished, pieces
        assert room.moods() == [mood], pieces


def test_each_reason_has_a_close_code() -> None:
    assert {Reason(name): code for name, code in CLOSE_CODES.items()} == {
        Reason.ENDED: 1000,
        Reason.STOPPING: 1001,
        Reason.REFUSED: 1013,
    }


@pytest.mark.parametrize("line", [b"", LINE], ids=["empty", "lonely"])
@pytest.mark.parametrize(("reason", "code"), [(Reason.ENDED, 1000), (Reason.STOPPING, 1001)])
def test_the_relay_ends_a_client(room: Room, line: bytes, reason: Reason, code: int) -> None:
    client = room.socket()
    client.feed(frame(BINARY, line))
    client.session.client_ended(reason)
    assert client.frames() == [(CLOSE, close_payload(code))]


@pytest.mark.parametrize(("reason", "code"), [(Reason.ENDED, 1000), (Reason.STOPPING, 1001)])
@pytest.mark.parametrize("leaver", [0, 1])
def test_the_end_of_a_pair_closes_a_websocket(
    room: Room, reason: Reason, code: int, leaver: int
) -> None:
    """Its side of the pair does not matter."""
    pair = room.pair()
    pair[leaver].session.client_ended(reason)
    assert pair[0].frames() == [(CLOSE, close_payload(code))] and pair[1].sent == b""


def test_a_redundant_client_gets_only_a_close(room: Room) -> None:
    older, newer = room.socket(), room.socket()
    for client in (older, newer):
        client.feed(frame(BINARY, LINE))
    room.client().feed(handshake("token", "other"))
    assert older.frames() == [(CLOSE, close_payload(1000))] and room.moods() == ["redundant"]
    assert newer.frames() == [(BINARY, b"ok\n")]


# Payload to a client.


@pytest.mark.parametrize(
    ("size", "sizes"),
    [
        (1, [1]),
        (125, [125]),
        (126, [126]),
        (32768, [32768]),
        (32769, [32768, 1]),
        (65536, [32768, 32768]),
        (262144, [32768] * 8),
        (262145, [32768] * 8 + [1]),
    ],
)
def test_long_messages_are_cut_without_a_copy(room: Room, size: int, sizes: list[int]) -> None:
    client, partner = room.pair()
    data = bytearray(range(256)) * 1025
    del data[size:]
    parts = client.framing.encode(memoryview(data))
    assert [len(part) for part in parts[1::2]] == sizes and max(sizes) <= LONGEST_MESSAGE
    assert all(memoryview(part).obj is data for part in parts[1::2])
    assert all(len(header) <= 4 for header in parts[::2])
    partner.feed(data)
    said = client.frames()
    assert [len(payload) for _, payload in said] == sizes
    assert b"".join(payload for _, payload in said) == data


def test_ok_is_a_message_of_its_own(room: Room) -> None:
    client = room.socket()
    client.feed(frame(BINARY, LINE))
    room.client().feed(handshake("token", "other") + b"data")
    assert client.frames() == [(BINARY, b"ok\n"), (BINARY, b"data")]


def test_a_silent_client_is_sent_a_ping_unless_it_has_a_backlog(room: Room) -> None:
    client, _ = room.pair()
    client.framing.keep_alive()
    assert (client.frames(), client.activities) == ([(PING, b"")], 1)
    client.queued = 1
    client.framing.keep_alive()
    assert (client.frames(), client.activities) == ([(PING, b"")], 2)


def test_activity_is_noted(room: Room) -> None:
    """Once for each read, each message to the client, and each backlog that is sent."""
    client, partner = room.pair()
    client.feed(frame(BINARY, b"x")[:1])
    client.feed(frame(BINARY, b"x")[1:] + frame(PONG))
    assert client.activities == 2 and partner.activities == 0
    partner.feed(b"data")
    client.framing.backlog_sent()
    assert client.activities == 4


def waiting(room: Room) -> FramedTransport:
    """Return a WebSocket client that waits for a partner."""
    client = room.socket()
    client.feed(messages(LINE))
    assert client.session.state is State.WAIT_PARTNER and client.sent == b""
    return client


def test_a_waiting_client_ends_after_three_unanswered_pings(room: Room) -> None:
    """The fourth time of silence ends it, so that the last Ping had its time as well."""
    client = waiting(room)
    for count in range(1, 4):
        client.framing.keep_alive()
        assert client.frames() == [(PING, b"")] * count and not client.finished
    client.framing.keep_alive()
    assert client.finished and client.reason is Reason.ENDED
    assert client.frames() == [(PING, b"")] * 3 + [(CLOSE, close_payload(1000))]
    assert room.moods() == ["lonely"]


@pytest.mark.parametrize(
    "sent_bytes",
    [frame(PONG), frame(PING), messages(b""), b"\x82", messages(b"")[:-1]],
    ids=["Pong", "Ping", "empty message", "a byte", "half a frame"],
)
@pytest.mark.parametrize("pings", [1, 2, 3])
def test_any_byte_of_a_waiting_client_counts_as_an_answer(
    room: Room, sent_bytes: bytes, pings: int
) -> None:
    client = waiting(room)
    for _ in range(pings):
        client.framing.keep_alive()
    client.feed(sent_bytes)
    for _ in range(3):
        assert not client.finished
        client.framing.keep_alive()
    assert not client.finished
    client.framing.keep_alive()
    assert client.finished and room.moods() == ["lonely"]


def test_a_ping_that_could_not_be_sent_is_not_counted(room: Room) -> None:
    client = waiting(room)
    client.queued = 1
    for _ in range(10):
        client.framing.keep_alive()
    assert not client.finished and client.sent == b""
    client.queued = 0
    for _ in range(3):
        client.framing.keep_alive()
    assert not client.finished
    client.framing.keep_alive()
    assert client.finished


def test_a_paired_client_does_not_end_for_unanswered_pings(room: Room) -> None:
    """Even if it answered none while it waited."""
    client = waiting(room)
    for _ in range(3):
        client.framing.keep_alive()
    partner = room.client()
    partner.feed(handshake("token", "other"))
    for _ in range(10):
        client.framing.keep_alive()
    assert not client.finished and not partner.finished
    assert client.frames().count((PING, b"")) == 13 and room.moods() == []


def test_a_raw_client_is_sent_nothing_but_its_data(room: Room) -> None:
    for client in (room.client(), room.partner()):
        framing = client.framing
        framing.keep_alive()
        framing.backlog_sent()
        assert {framing.closing_bytes(reason.value) for reason in Reason} == {b""}
        assert list(framing.encode(b"data")) == [b"data"]
        assert client.sent == b"" and client.activities == 0


@pytest.mark.parametrize("kind", ["partner", "socket"])
def test_discard_writes_and_reports_nothing(room: Room, kind: str) -> None:
    """It takes the place of a Framing when the Session ends. Then nothing changes any more."""
    client: FramedTransport = {"partner": room.partner, "socket": room.socket}[kind]()
    client.queued = 64 * 1024 + 1
    if kind == "socket":
        client.feed(frame(PING, b"p"))  # its Pong waits for the backlog
    client.session.client_ended(Reason.STOPPING)
    assert client.framing is DISCARD

    def observed() -> tuple[object, ...]:
        """Return all that can be observed of the client."""
        state = client.session.state
        return client.sent, client.activities, state, room.moods(), len(room.journal)

    before = observed()
    client.queued = 0
    for data in (b"anything\n", LINE, UPGRADE, frame(BINARY, LINE), frame(PING), frame(CLOSE)):
        client.feed(data)
        client.framing.backlog_sent()
        client.framing.keep_alive()
        assert observed() == before and client.framing is DISCARD
    assert {DISCARD.closing_bytes(reason.value) for reason in Reason} == {b""}
    assert list(DISCARD.encode(b"data")) == [b"data"]


# The position in the stream.


KINDS = [RawFraming, ProxyFraming, DetectFraming, HttpFraming, WebSocketFraming]
PARTS = (transit_relay.Framing, *KINDS)  # a part of a Framing can be another one


@pytest.mark.parametrize("kind", KINDS)
def test_every_field_of_a_framing_is_carried_or_a_link(kind: type[Framing]) -> None:
    slots = {name for base in kind.__mro__ for name in getattr(base, "__slots__", ())}
    assert slots == {*kind.CARRIED, "_session", "_transport"}


def take_out(framing: Framing) -> dict[str, Any]:
    """Return the carried fields of a Framing, and of its parts, as plain values."""
    fields: dict[str, Any] = {}
    for name in type(framing).CARRIED:
        value = getattr(framing, name)
        if isinstance(value, PARTS):
            fields[name] = take_out(value)
        elif isinstance(value, Reader):
            fields[name] = dict(value.place())
        else:
            assert isinstance(value, (bytes, int)), name
            fields[name] = value
    return fields


def put_back(framing: Framing, fields: dict[str, Any]) -> None:
    """Set the carried fields of a new Framing."""
    for name, value in fields.items():
        part = getattr(framing, name)
        if isinstance(part, PARTS):
            put_back(part, value)
        elif isinstance(part, Reader):
            part.resume(value)
        else:
            setattr(framing, name, value)


def carry(client: FramedTransport) -> None:
    """Replace the client's Framing by a new one that has nothing but the carried fields."""
    old = client.framing
    if old is DISCARD:
        return
    new = new_framing(type(old), client)
    put_back(new, marshal.loads(marshal.dumps(take_out(old))))
    assert take_out(new) == take_out(old)
    client.framing = new


STREAMS: dict[str, bytes] = {
    "raw": LINE + b"data\n",
    "raw, too long": b"please relay " * 100,
    "a health check": b"HEAD / HTTP/1.1\r\n\r\n",
    "an upgrade that is none": UPGRADE.replace(b"13", b"8"),
    "junk in a head": UPGRADE.replace(b"Host:", b"Host"),
    "a WebSocket": UPGRADE
    + message(b"", LINE[:30], LINE[30:])
    + frame(PING, b"ping")
    + frame(BINARY, b"frag", False)
    + frame(PING, b"in it")
    + frame(CONTINUATION, b"", False)
    + frame(CONTINUATION, b"ment" * 40)
    + frame(BINARY, b"more")
    + frame(CLOSE, close_payload(3000, b"why"))
    + b"?",
    "a handshake that its message ends": UPGRADE + message(BARE[:9], BARE[9:]) + messages(b"x"),
    "a bad handshake": UPGRADE + messages(b"ju", b"nk", b"\n"),
    "an error": UPGRADE + messages(LINE, b"data") + frame(BINARY, b"", False) + messages(b"x"),
}


@pytest.mark.parametrize("role", RELAY_ROLES, ids=["--port", "--websocket"])
@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_a_carried_framing_continues_where_the_old_one_was(stream: bytes, role: Role) -> None:
    """A stream that is carried after every byte has the same outcome."""
    outcomes = []
    for is_carried in (False, True):
        room = Room()
        partner, client = room.partner(), room.client(role)
        for n in range(len(stream)):
            client.feed(stream[n : n + 1])
            if is_carried:
                carry(client)
        state = client.session.state
        partner.session.connection_lost()
        client.session.connection_lost()
        outcomes.append((state, client.sent, partner.sent, room.records))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]


@pytest.mark.parametrize("role", RELAY_ROLES, ids=["--port", "--websocket"])
@pytest.mark.parametrize("stream", [STREAMS["raw"], STREAMS["a WebSocket"]], ids=["raw", "ws"])
def test_a_carried_framing_continues_behind_a_proxy_header(stream: bytes, role: Role) -> None:
    """The outcome is that of the stream without the header."""
    outcomes = []
    for header in (b"", b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 4001\r\n"):
        room = Room()
        partner, client = room.partner(), room.client(role)
        if header:
            client.framing = new_framing(ProxyFraming, client)
        for byte in header + stream:
            client.feed(bytes([byte]))
            carry(client)
        outcomes.append((client.session.state, client.sent, partner.sent))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]


def test_a_pong_that_waits_is_carried(room: Room) -> None:
    client, _ = room.pair()
    client.queued = 64 * 1024 + 1
    client.feed(frame(PING, b"waits"))
    carry(client)
    client.framing.backlog_sent()
    assert client.frames() == [(PONG, b"waits")]
