"""Framings: who comes, where the first line ends, what is data, however the stream is cut."""

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
    close_payload,
    frame,
    handshake,
    message,
    parse_head,
    splits,
)
from streams import LINE, SWITCHED, UPGRADE, FramedTransport, Room, read_frames

import transit_relay
from transit_relay import (
    DISCARD,
    FIRST_READ_BYTES,
    FRAMED_READ_BYTES,
    FRAMES_PER_READ,
    MAX_LINE_BYTES,
    DetectFraming,
    Framing,
    HttpFraming,
    RawFraming,
    Reason,
    Role,
    Session,
    State,
    WebSocketFraming,
)
from ws_frames import Reader

# RawFraming.


class Listener:
    """Takes a Session's place and notes what it is told.

    Behind a line that is no handshake a Session throws all away; so does this.
    """

    def __init__(self) -> None:
        self.line: bytes | None = None
        self.data = b""

    def line_received(self, line: bytes) -> None:
        assert self.line is None, "a second line"
        assert isinstance(line, bytes)  # not a view of a buffer that others will overwrite
        self.line = line

    def bytes_received(self, data: bytes | memoryview) -> None:
        assert self.line is not None, "data before the line"
        assert len(data), "no data at all"
        if len(self.line) < MAX_LINE_BYTES:
            self.data += data


class Stream:
    """Feeds a RawFraming as a Connection does: from one buffer, soon used for others."""

    def __init__(self) -> None:
        self.told = Listener()
        self.framing = RawFraming(cast(Session, self.told))

    def feed(self, *pieces: bytes) -> None:
        for piece in pieces:
            buffer = bytearray(piece)
            self.framing.receive(memoryview(buffer))
            buffer[:] = b"\n" * len(buffer)

    def events(self) -> tuple[bytes | None, bytes]:
        """The line, if it has come, and what has come behind it."""
        return self.told.line, self.told.data


# A stream; the line that is found in it; the data behind the line.
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
def test_every_split_gives_the_same(stream: bytes, line: bytes | None, data: bytes) -> None:
    for pieces in splits(stream):
        one = Stream()
        one.feed(*pieces)
        assert one.events() == (line, data), [len(piece) for piece in pieces]


@pytest.mark.parametrize(("stream", "line"), [row[:2] for row in VECTORS.values()], ids=VECTORS)
def test_the_line_is_told_with_its_last_byte_and_not_before(
    stream: bytes, line: bytes | None
) -> None:
    one = Stream()
    for count in range(1, len(stream) + 1):
        one.feed(stream[count - 1 : count])
        newline = stream[:count].find(b"\n", 0, 1024)
        assert (one.told.line is not None) == (newline >= 0 or count >= 1024), count
    assert one.told.line == line


@pytest.mark.parametrize("stream", [row[0] for row in VECTORS.values()], ids=VECTORS)
def test_the_place_in_the_stream_is_in_the_fields(stream: bytes) -> None:
    """Another RawFraming that is given them goes on where the first one was."""
    fields = [name for name in RawFraming.__slots__ if name != "_session"]
    whole = Stream()
    whole.feed(stream)
    for cut in range(1, len(stream)):
        first, second = Stream(), Stream()
        first.feed(stream[:cut])
        second.told = first.told
        second.framing = RawFraming(cast(Session, first.told))
        for name in fields:
            setattr(second.framing, name, getattr(first.framing, name))
        second.feed(stream[cut:])
        assert second.events() == whole.events(), cut


def test_data_is_handed_on_and_not_copied() -> None:
    told: list[object] = []

    class Receiver(Listener):
        def bytes_received(self, data: bytes | memoryview) -> None:
            assert isinstance(data, memoryview)
            told.append(data.obj)

    framing = RawFraming(cast(Session, Receiver()))
    buffer = bytearray(LINE + b"early")
    framing.receive(memoryview(buffer))
    framing.receive(memoryview(buffer)[:7])
    assert told[0] is buffer and told[1] is buffer


# A client as a whole: who comes, by what bytes.


@pytest.fixture
def room() -> Room:
    return Room()


# DetectFraming.

# A row: the listener; what comes there; who that is; behind how many bytes it is clear.
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
def test_who_comes_is_told_by_the_first_bytes(
    room: Room, listener: str, stream: bytes, kind: type[Framing], size: int
) -> None:
    role = Role.WEBSOCKET if listener == "--websocket" else Role.PORT
    clear = State.WAIT_HANDSHAKE if kind is RawFraming else State.WAIT_UPGRADE
    unclear = State.WAIT_UPGRADE if role is Role.WEBSOCKET else State.WAIT_HANDSHAKE
    for pieces in splits(stream):
        wire = room.client(role)
        came = 0
        for piece in pieces:
            wire.feed(piece)
            came += len(piece)
            is_clear = kind is not DetectFraming and came >= size
            assert type(wire.framing) is (kind if is_clear else DetectFraming), pieces
            assert wire.session.state == (clear if is_clear else unclear), pieces
        framing = wire.framing
        kept = {
            RawFraming: lambda framing=framing: framing._line,
            HttpFraming: lambda framing=framing: framing._reader.place()["_head"],
            DetectFraming: lambda framing=framing: framing._start,
        }[kind]()
        assert kept == stream, pieces
        assert not wire.sent and not room.records


@pytest.mark.parametrize("role", list(Role), ids=["--port", "--websocket"])
def test_what_came_to_be_told_by_is_heard(room: Room, role: Role) -> None:
    """Whole streams, each with bytes behind what decides, come to the same in every split."""
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
            wire = room.client(role)
            wire.feed(*pieces)
            assert wire.sent.startswith(answer) and wire.finished, pieces
            assert room.moods() == moods, pieces
            room.records.clear()


@pytest.mark.parametrize("role", list(Role), ids=["--port", "--websocket"])
@pytest.mark.parametrize("stream", [b"", b"GET", b"please rela", b"GET / HTTP/1.1\r\n"])
def test_who_leaves_before_the_stream_begins(room: Room, role: Role, stream: bytes) -> None:
    """Is recorded where it began at once: who came over TCP, as far as one could tell."""
    wire = room.client(role)
    wire.feed(stream)
    wire.session.client_ended()
    assert wire.finished and wire.sent == b""
    assert room.moods() == ([] if role is Role.WEBSOCKET or b" /" in stream else ["empty"])


def test_without_ws_frames_all_is_raw(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(room.client().framing) is DetectFraming
    monkeypatch.setattr(transit_relay, "ws_frames", None)
    wire = room.client()
    assert type(wire.framing) is RawFraming
    wire.feed(b"GET / HTTP/1.1\r\n")
    assert wire.sent == b"bad handshake\n" and wire.finished and room.moods() == ["errory"]


# HttpFraming. What is answered to which head is test_ws_upgrade's.


@pytest.mark.parametrize(
    "behind", [b"", LINE, frame(BINARY, LINE)], ids=["nothing", "a handshake", "a frame"]
)
def test_who_wants_no_upgrade_is_answered_and_let_go(room: Room, behind: bytes) -> None:
    stream = b"GET /health HTTP/1.1\r\nHost: h\r\n\r\n"
    for pieces in splits(stream + behind):
        wire = room.client()
        wire.feed(*pieces)
        head, _, body = wire.sent.partition(b"\r\n\r\n")
        status, headers = parse_head(head)
        assert status == "200" and headers["connection"] == "close"
        assert headers["content-length"] == str(len(body)) and b"transit-relay" in body
        assert wire.finished and wire.session.state == State.DONE and not room.records


def test_an_upgrade_is_answered_before_the_frames_behind_it(room: Room) -> None:
    for pieces in splits(UPGRADE + frame(PING, b"p") + frame(BINARY, LINE) + frame(BINARY, b"?")):
        wire = room.client(role=Role.WEBSOCKET)
        wire.feed(*pieces)
        assert wire.sent.startswith(SWITCHED), pieces
        assert read_frames(wire.sent[len(SWITCHED) :]) == [
            (PONG, b"p"),
            (BINARY, b"impatient\n"),
            (CLOSE, close_payload(1000)),
        ]
        assert room.moods() == ["impatient"]
        room.records.clear()


def test_an_upgrade_opens_the_session_and_is_heard(room: Room) -> None:
    wire = room.client()
    wire.feed(UPGRADE[:-1])
    assert (wire.session.state, wire.sent, wire.stirs) == (State.WAIT_UPGRADE, b"", [])
    wire.feed(UPGRADE[-1:])
    assert (wire.session.state, wire.sent, wire.stirs) == (State.WAIT_HANDSHAKE, SWITCHED, [True])
    assert type(wire.framing) is WebSocketFraming
    wire.session.client_ended()
    assert wire.sent == SWITCHED + frame(CLOSE, close_payload(1000), key=None)
    assert room.moods() == ["empty"]


# WebSocketFraming: the handshake rule. A partner waits under the token. A row: the frames; whether
# the handshake is good (None: it is not whole); the data behind it.

BARE = LINE[:-1]
OLDER = handshake("token")[:-1]  # a handshake without a side, which could go on


def messages(*payloads: bytes) -> bytes:
    """Each as a message of one frame."""
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
        partner, wire = room.partner(), room.socket()
        wire.feed(*pieces)
        said = [one for one in wire.said() if one != (PONG, b"")]
        if good is None:
            assert (wire.session.state, said) == (State.WAIT_HANDSHAKE, []), pieces
        elif good:
            assert (wire.session.state, said) == (State.RELAYING, [(BINARY, b"ok\n")]), pieces
            assert partner.sent == b"ok\n" + data, pieces
            assert wire.session.received_bytes == len(data), pieces
        else:
            assert said == [(BINARY, b"bad handshake\n"), (CLOSE, close_payload(1000))], pieces
            assert wire.session.state == State.DONE and room.moods() == ["errory"], pieces


# Alone: what comes behind the handshake.
BEHIND: dict[str, tuple[bytes, bool]] = {
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
@pytest.mark.parametrize(("behind", "impatient"), BEHIND.values(), ids=BEHIND)
def test_only_payload_is_impatient(line: bytes, behind: bytes, impatient: bool) -> None:
    for pieces in splits(line + behind):
        room = Room()
        wire = room.socket()
        wire.feed(*pieces)
        said = [one for one in wire.said() if one[0] != PONG]
        if impatient:
            assert said == [(BINARY, b"impatient\n"), (CLOSE, close_payload(1000))], pieces
        assert room.moods() == ["impatient"] * impatient, pieces
        assert wire.session.state == (State.DONE if impatient else State.WAIT_PARTNER), pieces


REFUSED = {
    "bad handshake": (message(b"junk\n", ended=False), b"bad handshake\n"),
    "too long": (message(b"x" * 1024, ended=False), b"bad handshake\n"),
    "impatient": (messages(LINE) + message(b"x", ended=False), b"impatient\n"),
}


@pytest.mark.parametrize(("refused", "reply"), REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize(
    "behind",
    [
        frame(CLOSE, close_payload(1001)),
        frame(TEXT, b""),
        frame(BINARY, b"", key=None),
        frame(PING, b"p"),
        b"\xff\xff",
    ],
    ids=["Close", "text", "not masked", "Ping", "junk"],
)
def test_a_refusal_ends_with_1000_whatever_is_behind_it(
    refused: bytes, reply: bytes, behind: bytes
) -> None:
    for pieces in splits(refused + behind):
        wire = Room().socket()
        wire.feed(*pieces)
        assert wire.said() == [(BINARY, reply), (CLOSE, close_payload(1000))], pieces


# What comes, in a pair.


def test_payload_of_one_read_is_handed_on_at_once_and_pongs_go_before_it(room: Room) -> None:
    wire, partner = room.pair()
    wire.feed(
        frame(BINARY, b"a")
        + frame(PING, b"1")
        + message(b"b", b"", b"c")
        + frame(PONG, b"?")
        + frame(PING, b"2")
        + frame(BINARY, b"")
        + frame(BINARY, b"defg")[:-2]
    )
    pongs = frame(PONG, b"1", key=None) + frame(PONG, b"2", key=None)
    assert room.journal == [(wire, pongs), (partner, b"abcde")]
    wire.feed(frame(BINARY, b"defg")[-2:])
    assert room.journal[2:] == [(partner, b"fg")]
    assert wire.session.received_bytes == 7


def test_nothing_is_written_where_nothing_came(room: Room) -> None:
    wire, _ = room.pair()
    wire.feed(frame(BINARY), message(b"", b"", b""), frame(PONG, b"?"), frame(BINARY, b"x")[:-1])
    assert room.journal == []


def test_a_piece_of_a_frame_is_handed_on_before_the_rest_is_there(room: Room) -> None:
    wire, partner = room.pair()
    wire.feed(frame(BINARY, b"x" * (1 << 16))[:-1])
    assert partner.sent == b"x" * 65535
    wire.feed(frame(BINARY, b"x" * (1 << 16))[-1:])
    assert partner.sent == b"x" * 65536


def test_every_ping_is_answered(room: Room) -> None:
    wire, _ = room.pair()
    pings = [b"", b"p", b"p", b"q" * 125]
    wire.feed(*[frame(PING, ping) for ping in pings], b"".join(frame(PING, ping) for ping in pings))
    assert wire.said() == [(PONG, ping) for ping in pings * 2]


def test_who_leaves_much_unread_gets_the_newest_pong_only(room: Room) -> None:
    wire, partner = room.pair()
    wire.queued = 64 * 1024
    wire.feed(frame(PING, b"1") + frame(PING, b"2"))
    assert wire.said() == [(PONG, b"1"), (PONG, b"2")]
    wire.queued += 1
    wire.feed(frame(PING, b"3") + frame(BINARY, b"data") + frame(PING, b"4"))
    wire.feed(frame(PING, b"5") + frame(PING, b"6"))
    assert wire.said() == [(PONG, b"1"), (PONG, b"2")] and partner.sent == b"data"
    wire.queued = 0
    wire.framing.drained()
    wire.framing.drained()
    assert wire.said() == [(PONG, b"1"), (PONG, b"2"), (PONG, b"6")]


def test_a_pong_that_waits_gives_way_to_a_newer_one(room: Room) -> None:
    wire, _ = room.pair()
    wire.queued = 64 * 1024 + 1
    wire.feed(frame(PING, b"old"))
    wire.queued = 1
    wire.feed(frame(PING, b"new"))
    wire.framing.drained()
    assert wire.said() == [(PONG, b"new")]


def test_a_pong_that_waits_goes_before_the_close(room: Room) -> None:
    wire, _ = room.pair()
    wire.queued = 64 * 1024 + 1
    wire.feed(frame(PING, b"p"))
    wire.feed(frame(CLOSE))
    wire.framing.drained()
    assert wire.said() == [(PONG, b"p"), (CLOSE, b"")]


def test_reads_grow_while_frames_are_few(room: Room) -> None:
    """From a size that cannot hold many, step by step."""
    assert room.client().framing.max_read_bytes == FIRST_READ_BYTES
    wire = room.client(role=Role.WEBSOCKET)
    wire.feed(UPGRADE[:-1])
    assert wire.framing.max_read_bytes == room.socket().framing.max_read_bytes == FIRST_READ_BYTES
    stream = frame(BINARY, b"x" * (1 << 20))
    sizes = [FIRST_READ_BYTES]
    wire, _ = room.pair()
    while sizes[-1] < FRAMED_READ_BYTES:
        assert wire.framing.max_read_bytes == sizes[-1]
        wire.feed(stream[: sizes[-1]])
        stream = stream[sizes[-1] :]
        sizes.append(wire.framing.max_read_bytes)
        assert sizes[-2] < sizes[-1] <= min(4 * sizes[-2], FRAMED_READ_BYTES)


@pytest.mark.parametrize(
    "small",
    [frame(PING), frame(BINARY), frame(CONTINUATION, b"x", False), frame(BINARY, b"x" * 30)],
    ids=["Pings", "messages", "fragments", "records"],
)
def test_a_read_never_holds_much_more_frames_than_a_move_should(room: Room, small: bytes) -> None:
    """Nor does it, when it could be large before."""
    wire, _ = room.pair()
    wire.feed(frame(BINARY, b"x" * 60_000, False))
    assert wire.framing.max_read_bytes == FRAMED_READ_BYTES
    if small[0] & 0x0F == BINARY:
        wire.feed(frame(CONTINUATION))
        wire.feed(frame(BINARY, b"x" * 60_000))
    for _ in range(6):
        frames = wire.framing.max_read_bytes // len(small)
        wire.feed(small * frames)
        size = wire.framing.max_read_bytes
        assert FIRST_READ_BYTES <= size <= max(FIRST_READ_BYTES, FRAMES_PER_READ * len(small))


# How it ends.

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
    "behind",
    [b"", frame(BINARY, b"late"), frame(CLOSE), b"\0\0"],
    ids=["nothing more", "a message", "Close", "junk"],
)
def test_the_end_of_a_pair(end: bytes, answer: bytes, behind: bytes) -> None:
    """What came before it is delivered, what comes behind it is not heard."""
    stream = frame(BINARY, b"before") + frame(PING, b"p") + end + behind
    for pieces in splits(stream):
        room = Room()
        wire, partner = room.pair()
        wire.feed(*pieces)
        assert wire.said() == [(PONG, b"p"), (CLOSE, answer)], pieces
        assert partner.sent == b"before", pieces
        assert (
            wire.finished
            and wire.why == Reason.ENDED
            and partner.finished
            and partner.why == Reason.ENDED
        )
        partner.session.end_sent()
        assert [(one.mood, one.total_bytes) for one in room.records] == [("happy", 6)], pieces


@pytest.mark.parametrize(("end", "answer"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize(
    ("before", "mood"),
    [(b"", "empty"), (messages(BARE[:-1]), "empty"), (messages(LINE), "lonely")],
    ids=["before the line", "within the line", "behind the line"],
)
def test_the_end_of_who_is_alone(end: bytes, answer: bytes, before: bytes, mood: str) -> None:
    for pieces in splits(before + end):
        room = Room()
        wire = room.socket()
        wire.feed(*pieces)
        assert wire.said() == [(CLOSE, answer)] and wire.finished, pieces
        assert room.moods() == [mood], pieces


@pytest.mark.parametrize("line", [b"", LINE], ids=["empty", "lonely"])
@pytest.mark.parametrize(("why", "code"), [(Reason.ENDED, 1000), (Reason.STOPPING, 1001)])
def test_the_relay_ends_it(room: Room, line: bytes, why: str, code: int) -> None:
    wire = room.socket()
    wire.feed(frame(BINARY, line))
    wire.session.client_ended(why)
    assert wire.said() == [(CLOSE, close_payload(code))]


@pytest.mark.parametrize(("why", "code"), [(Reason.ENDED, 1000), (Reason.STOPPING, 1001)])
@pytest.mark.parametrize("leaver", [0, 1])
def test_the_partner_is_over(room: Room, why: str, code: int, leaver: int) -> None:
    """Or our own connection is, without a Close of ours; or both are, as we stop."""
    pair = room.pair()
    pair[leaver].session.client_ended(why)
    assert pair[0].said() == [(CLOSE, close_payload(code))] and pair[1].sent == b""


def test_a_displaced_one_is_told_nothing_but_the_end(room: Room) -> None:
    older, newer = room.socket(), room.socket()
    for wire in (older, newer):
        wire.feed(frame(BINARY, LINE))
    room.client().feed(handshake("token", "other"))
    assert older.said() == [(CLOSE, close_payload(1000))] and room.moods() == ["redundant"]
    assert newer.said() == [(BINARY, b"ok\n")]


# What is sent.


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
def test_long_messages_are_cut_and_not_copied(room: Room, size: int, sizes: list[int]) -> None:
    wire, partner = room.pair()
    data = bytearray(range(256)) * 1025
    del data[size:]
    parts = wire.framing.encode(memoryview(data))
    assert [len(part) for part in parts[1::2]] == sizes and max(sizes) <= LONGEST_MESSAGE
    assert all(memoryview(part).obj is data for part in parts[1::2])
    assert all(len(header) <= 4 for header in parts[::2])
    partner.feed(data)
    said = wire.said()
    assert [len(payload) for _, payload in said] == sizes
    assert b"".join(payload for _, payload in said) == data


def test_ok_is_a_message_of_its_own(room: Room) -> None:
    wire = room.socket()
    wire.feed(frame(BINARY, LINE))
    room.client().feed(handshake("token", "other") + b"data")
    assert wire.said() == [(BINARY, b"ok\n"), (BINARY, b"data")]


def test_the_silent_are_pinged_but_not_on_top_of_a_backlog(room: Room) -> None:
    wire, _ = room.pair()
    wire.framing.keep_alive()
    assert (wire.said(), wire.stirs) == ([(PING, b"")], [False])
    wire.queued = 1
    wire.framing.keep_alive()
    assert (wire.said(), wire.stirs) == ([(PING, b"")], [False, False])


def test_it_tells_when_it_is_not_silent(room: Room) -> None:
    """Heard: whatever came, once for each read. Not heard: what was sent, or could be."""
    wire, partner = room.pair()
    wire.feed(frame(BINARY, b"x")[:1])
    wire.feed(frame(BINARY, b"x")[1:] + frame(PONG))
    assert wire.stirs == [True, True] and partner.stirs == []
    wire.stirs.clear()
    partner.feed(b"data")
    wire.framing.drained()
    assert wire.stirs == [False, False]


def test_plain_bytes_need_none_of_it(room: Room) -> None:
    for wire in (room.client(), room.partner()):
        framing = wire.framing
        framing.keep_alive()
        framing.drained()
        assert framing.closing_bytes(Reason.ENDED) == framing.closing_bytes(Reason.STOPPING) == b""
        assert list(framing.encode(b"data")) == [b"data"]
        assert wire.sent == b"" and wire.stirs == []


@pytest.mark.parametrize("kind", ["partner", "socket"])
def test_silent_hears_and_says_nothing(room: Room, kind: str) -> None:
    """Whoever it stands in for: all is as it was when the end was said."""
    wire: FramedTransport = {"partner": room.partner, "socket": room.socket}[kind]()
    wire.queued = 64 * 1024 + 1
    if kind == "socket":
        wire.feed(frame(PING, b"p"))  # and its Pong waits
    wire.session.client_ended(Reason.STOPPING)
    assert wire.framing is DISCARD

    def all_of_it() -> tuple[object, ...]:
        """What can be told of it."""
        moods, stirs = room.moods(), list(wire.stirs)
        return wire.sent, stirs, wire.session.state, moods, len(room.journal)

    before = all_of_it()
    wire.queued = 0
    for data in (b"anything\n", LINE, UPGRADE, frame(BINARY, LINE), frame(PING), frame(CLOSE)):
        wire.feed(data)
        wire.framing.drained()
        wire.framing.keep_alive()
        assert all_of_it() == before and wire.framing is DISCARD
    assert DISCARD.closing_bytes(Reason.ENDED) == DISCARD.closing_bytes(Reason.STOPPING) == b""
    assert list(DISCARD.encode(b"data")) == [b"data"]


# Its place.


def take_out(framing: Framing) -> dict[str, Any]:
    """What is in the named fields of a Framing, and of what it is made of."""
    fields: dict[str, Any] = {}
    for name in type(framing).__slots__:
        value = getattr(framing, name)
        if isinstance(value, Framing):
            fields[name] = take_out(value)
        elif isinstance(value, Reader):
            fields[name] = dict(value.place())
        elif name not in ("_session", "_wire"):
            assert isinstance(value, (bytes, int)), name
            fields[name] = value
    return fields


def put_back(framing: Framing, fields: dict[str, Any]) -> None:
    """The other way round."""
    for name, value in fields.items():
        part = getattr(framing, name)
        if isinstance(part, Framing):
            put_back(part, value)
        elif isinstance(part, Reader):
            part.resume(value)
        else:
            setattr(framing, name, value)


def carry(wire: FramedTransport) -> None:
    """Its Framing gives way to another of its kind, which knows nothing but the fields."""
    old, session = wire.framing, wire.session
    if old is DISCARD:
        return
    new: Framing
    if isinstance(old, RawFraming):
        new = RawFraming(session, session.transport)
    elif isinstance(old, DetectFraming):
        new = DetectFraming(session, wire)
    elif isinstance(old, HttpFraming):
        new = HttpFraming(session, wire)
    else:
        new = WebSocketFraming(session, wire)
    put_back(new, marshal.loads(marshal.dumps(take_out(old))))
    assert take_out(new) == take_out(old)
    wire.framing = new


CARRIED: dict[str, bytes] = {
    "raw": LINE + b"data\n",
    "raw, too long": b"please relay " * 100,
    "a visitor": b"HEAD / HTTP/1.1\r\n\r\n",
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


@pytest.mark.parametrize("role", list(Role), ids=["--port", "--websocket"])
@pytest.mark.parametrize("stream", CARRIED.values(), ids=CARRIED)
def test_a_framing_goes_on_where_another_was(stream: bytes, role: Role) -> None:
    """Carried elsewhere after every byte, it comes to the same."""
    outcomes = []
    for is_carried in (False, True):
        room = Room()
        partner, wire = room.partner(), room.client(role)
        for n in range(len(stream)):
            wire.feed(stream[n : n + 1])
            if is_carried:
                carry(wire)
        state = wire.session.state
        partner.session.connection_lost()
        wire.session.connection_lost()
        outcomes.append((state, wire.sent, partner.sent, room.records))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][1]


def test_a_pong_that_waits_is_carried_along(room: Room) -> None:
    wire, _ = room.pair()
    wire.queued = 64 * 1024 + 1
    wire.feed(frame(PING, b"waits"))
    carry(wire)
    wire.framing.drained()
    assert wire.said() == [(PONG, b"waits")]
