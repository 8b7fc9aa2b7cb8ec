"""WebSocket end to end: the first bytes, HTTP answers, handshakes in messages, Pings, Pongs, Close.

Frames alone are tested in test_ws_frames.py, bad frames and floods in test_hostile.py.
"""

from __future__ import annotations

import random
import socket
import struct
from collections.abc import Callable

import pytest
from helpers import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    WEB,
    Client,
    Loop,
    RelayProcess,
    WebSocketClient,
    close_payload,
    cut,
    digest,
    frame,
    handshake,
    message,
    parse_head,
)

from transit_relay import PIPE_BYTES, RELAY_ROLES, Connection, Role, ServerPhase, State
from ws_frames import COSTLY_FRAMES, DIRECT_READ_BYTES

LISTENERS = pytest.mark.parametrize("role", RELAY_ROLES, ids=["port", "websocket"])
OTHER_ROLE = {Role.PORT: Role.WEBSOCKET, Role.WEBSOCKET: Role.PORT}
PARTNERS = pytest.mark.parametrize("second", ["tcp", "ws"])
CUTS = pytest.mark.parametrize("at_once", [True, False], ids=["at once", "byte by byte"])

PLAIN = handshake("t")
LEFT = handshake("t", "left")
RIGHT = handshake("t", "right")
TLS_HELLO = bytes.fromhex("160301050001000501fc0303") + bytes(range(11, 256)) * 5  # no newline


def websocket(loop: Loop, *pieces: bytes, kind: str = "ws") -> WebSocketClient:
    """Return a WebSocket client whose upgrade is done. It has sent `pieces` as one message."""
    client = loop.client(kind)
    assert isinstance(client, WebSocketClient)
    if pieces:
        client.send(*pieces)
    loop.pump()
    return client


def meet(loop: Loop, second: str = "tcp", first: str = "ws") -> tuple[WebSocketClient, Client]:
    """Return a WebSocket client and its partner."""
    one, other = loop.meet(first, second)
    assert isinstance(one, WebSocketClient)
    return one, other


def send(loop: Loop, client: Client, wire: bytes, at_once: bool) -> None:
    """Send `wire`, whole or byte by byte, and let the relay work."""
    for part in [wire] if at_once else cut(wire, range(1, len(wire))):
        client.send_wire(part)
        loop.pump()


def send_until_blocked(loop: Loop, sender: Client, wire: bytes) -> int:
    """Send as much of `wire` as is accepted while the partner does not read. Return how much."""
    sender.sock.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        while True:
            sent += sender.sock.send(wire[sent : sent + 10_000])
            loop.pump()
    return sent


def lingers(loop: Loop, client: Client) -> bool:
    """Return whether the connection lingers, discards input, and ends with the client's end."""
    client.send_wire(PLAIN + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + frame(PING) + frame(CLOSE))
    loop.pump()
    is_open = client.conn in loop.server.connections
    assert client.sock.recv(1) == b""
    client.close()
    loop.pump()
    return is_open and client.conn not in loop.server.connections


# The first bytes decide the encoding.


@LISTENERS
@CUTS
@pytest.mark.parametrize("newline", [b"\n", b""], ids=["newline", "message"])
def test_websocket_at_any_listener(loop: Loop, role: Role, at_once: bool, newline: bytes) -> None:
    """Bytes after the head, in the same segment, are frames."""
    one = loop.client("ws", role, upgrade=False)
    assert isinstance(one, WebSocketClient)
    other = loop.client("tcp")
    other.send(LEFT)
    wire = one.request + frame(BINARY, RIGHT[:-1] + newline) + frame(BINARY, b"early")
    send(loop, one, wire, at_once)
    assert other.receive(8) == b"ok\nearly"
    assert one.next_frame() == (BINARY, b"ok\n")


@LISTENERS
@CUTS
def test_a_raw_client_at_any_listener(loop: Loop, role: Role, at_once: bool) -> None:
    one, other = loop.client("tcp", role), loop.client("ws", OTHER_ROLE[role])
    other.send(LEFT)
    send(loop, one, RIGHT[:-1], at_once)
    one.send(b"\nearly")
    assert one.receive(3) == b"ok\n"
    assert other.receive(8) == b"ok\nearly"


NOT_HTTP = [
    b"",
    b"G",
    b"GE",
    b"get / HTTP/1.1",
    b"DELETE / HTTP/1.1",
    b"POS",
    b"OPTIONs ",
    b" GET /",
]


@pytest.mark.parametrize(
    "junk", [TLS_HELLO, b"\0", *NOT_HTTP], ids=["TLS", "NUL", *map(repr, NOT_HTTP)]
)
@CUTS
def test_bytes_that_are_not_http_are_raw_at_a_port(loop: Loop, junk: bytes, at_once: bool) -> None:
    client = loop.client("tcp", role=Role.PORT)
    send(loop, client, junk + b"\n", at_once)
    assert client.read_to_end() == b"bad handshake\n"
    assert loop.recorder.moods() == ["errory"]


NOT_RAW = [b"\0\n", b"junk\r\n\r\n", b"please\n\n", b"please relay\n\n", b"please relax \n\n"]


@pytest.mark.parametrize("junk", [TLS_HELLO, *NOT_RAW], ids=["TLS", *map(repr, NOT_RAW)])
@CUTS
def test_bytes_that_are_not_raw_are_bad_http_at_a_websocket_listener(
    loop: Loop, junk: bytes, at_once: bool
) -> None:
    client = loop.client("tcp", role=Role.WEBSOCKET)
    send(loop, client, junk, at_once)
    status, _, _ = read_answer(client)
    assert status == "400"
    assert lingers(loop, client)
    assert loop.recorder.moods() == []


HALF_A_HEAD = b"GET / HTTP/1.1\r\nHost: relay.example\r\nConnection: Upg"
FIRST_BYTES = {
    "nothing at a websocket listener": (Role.WEBSOCKET, b"", []),
    "undecided at a websocket listener": (Role.WEBSOCKET, b"please rel", []),
    "half a line at a websocket listener": (Role.WEBSOCKET, b"please relay ", ["empty"]),
    "half a head at a websocket listener": (Role.WEBSOCKET, HALF_A_HEAD, []),
    "nothing at a port": (Role.PORT, b"", ["empty"]),
    "undecided at a port": (Role.PORT, b"GET", ["empty"]),
    "half a line at a port": (Role.PORT, b"please relay ", ["empty"]),
    "a decided method at a port": (Role.PORT, b"GET ", []),
    "half a head at a port": (Role.PORT, HALF_A_HEAD, []),
}
UNFINISHED = pytest.mark.parametrize(
    ("role", "sent", "moods"), FIRST_BYTES.values(), ids=FIRST_BYTES
)


@UNFINISHED
@CUTS
def test_a_client_that_leaves_before_the_upgrade_is_not_recorded(
    loop: Loop, role: Role, sent: bytes, moods: list[str], at_once: bool
) -> None:
    client = loop.client("tcp", role)
    send(loop, client, sent, at_once)
    client.half_close()
    assert client.read_to_end() == b""
    client.close()
    loop.pump()
    assert loop.recorder.moods() == moods
    assert loop.server.connections == set()


@UNFINISHED
def test_a_client_that_takes_too_long_for_the_upgrade_is_not_recorded(
    loop: Loop, role: Role, sent: bytes, moods: list[str]
) -> None:
    """The time limit of a handshake includes the upgrade. The end is without a Close."""
    client = loop.client("tcp", role)
    loop.advance(30)
    client.send(sent)
    loop.advance(29.75)
    assert client.conn is not None and client.conn.session.state is not State.DONE
    loop.advance(0.25)
    assert client.read_to_end() == b""
    assert loop.recorder.moods() == moods


@UNFINISHED
def test_a_client_without_upgrade_at_a_stop_is_not_recorded(
    loop: Loop, role: Role, sent: bytes, moods: list[str]
) -> None:
    client = loop.client("tcp", role)
    client.send(sent)
    loop.pump()
    loop.server.ending.stop()
    loop.pump()
    assert client.read_to_end() == b""
    assert loop.recorder.moods() == moods


# HTTP.


def upgrade(
    *others: str, method: str = "GET", version: str = "1.1", without: str | None = None
) -> bytes:
    """Return a request for an upgrade, correct except for the arguments."""
    lines = [
        "Host: relay.example",
        "Connection: Upgrade",
        "Upgrade: websocket",
        "Sec-WebSocket-Version: 13",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
    ]
    lines = [line for line in lines if line.split(":")[0] != without]
    return "\r\n".join([f"{method} / HTTP/{version}", *lines, *others, "", ""]).encode()


ALLOW = {"allow": "GET, HEAD, OPTIONS"}
VERSION = {"upgrade": "websocket", "sec-websocket-version": "13"}
ANSWERS: dict[str, tuple[bytes, str, dict[str, str]]] = {
    "GET": (b"GET / HTTP/1.1\r\nHost: relay.example\r\n\r\n", "200", {}),
    "GET without Host": (b"GET /health HTTP/1.1\r\n\r\n", "200", {}),
    "GET in HTTP/1.0": (b"GET / HTTP/1.0\r\n\r\n", "200", {}),
    "GET in HTTP/1.0 with Host": (b"GET / HTTP/1.0\r\nHost: relay.example\r\n\r\n", "200", {}),
    "GET in HTTP/2": (b"GET / HTTP/2.0\r\nHost: relay.example\r\n\r\n", "400", {}),
    "GET by itself": (b"GET /\r\n\r\n", "400", {}),
    "GET that wants another upgrade": (
        b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        "200",
        {},
    ),
    "HEAD": (b"HEAD / HTTP/1.1\r\nHost: relay.example\r\n\r\n", "200", {}),
    "HEAD in HTTP/1.0": (b"HEAD / HTTP/1.0\r\n\r\n", "200", {}),
    "HAProxy's health check": (b"OPTIONS / HTTP/1.0\r\n\r\n", "200", {}),
    "OPTIONS": (b"OPTIONS * HTTP/1.1\r\nHost: relay.example\r\n\r\n", "200", {}),
    "POST": (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "405", ALLOW),
    "PUT": (b"PUT /file HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello", "405", ALLOW),
    "HTTP in name only": (b"GET / HTTP/1.1\r\nthis is no header\r\n\r\n", "400", {}),
    "an upgrade of version 8": (
        upgrade("Sec-WebSocket-Version: 8", without="Sec-WebSocket-Version"),
        "426",
        VERSION,
    ),
    "an upgrade by HEAD": (upgrade(method="HEAD"), "405", ALLOW),
    "an upgrade by POST": (upgrade(method="POST"), "405", ALLOW),
    "an upgrade in HTTP/1.0": (upgrade(version="1.0"), "400", {}),
    "an upgrade without Host": (upgrade(without="Host"), "400", {}),
    "an upgrade with two Hosts": (upgrade("Host: other.example"), "400", {}),
    "an upgrade without key": (upgrade(without="Sec-WebSocket-Key"), "400", {}),
    "an upgrade with two keys": (
        upgrade("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ=="),
        "400",
        {},
    ),
    "an upgrade with a key of 15 bytes": (
        upgrade("Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25j", without="Sec-WebSocket-Key"),
        "400",
        {},
    ),
    "an upgrade without version": (upgrade(without="Sec-WebSocket-Version"), "400", {}),
    "an upgrade without Connection": (upgrade(without="Connection"), "400", {}),
    "a long head": (b"GET / HTTP/1.1\r\n" + b"X: %s\r\n" % (b"x" * 17_000), "431", {}),
    "a long line": (b"GET /" + b"x" * 17_000, "431", {}),
}


def read_answer(client: Client) -> tuple[str, dict[str, str], bytes]:
    """Return status, headers and body of an answer."""
    head, _, body = client.read_to_end().partition(b"\r\n\r\n")
    status, headers = parse_head(head)
    assert headers["connection"].lower() in ("close", "close, upgrade", "upgrade, close")
    assert headers["content-length"].isdigit()
    return status, headers, body


@LISTENERS
@pytest.mark.parametrize(("request_", "status", "fields"), ANSWERS.values(), ids=ANSWERS)
def test_an_http_request_is_answered_and_the_connection_lingers(
    loop: Loop, role: Role, request_: bytes, status: str, fields: dict[str, str]
) -> None:
    client = loop.client("tcp", role)
    client.send(request_)
    found, headers, body = read_answer(client)
    assert found == status
    assert fields.items() <= headers.items()
    assert ("allow" in headers) == (status == "405")
    if request_.startswith(b"HEAD"):
        assert body == b""
    else:
        assert int(headers["content-length"]) == len(body) > 0
    assert lingers(loop, client)
    assert loop.recorder.moods() == []
    assert loop.server.connections == set()


def test_head_has_the_content_length_of_get(loop: Loop) -> None:
    lengths = []
    for method in (b"GET", b"HEAD"):
        client = loop.client("tcp", role=Role.WEBSOCKET)
        client.send(method + b" / HTTP/1.1\r\nHost: relay.example\r\n\r\n")
        lengths.append(read_answer(client)[1]["content-length"])
    assert lengths[0] == lengths[1]


def test_an_answered_request_lingers_for_its_time_only(loop: Loop) -> None:
    client = loop.client("unix", role=Role.WEBSOCKET)
    client.send(b"GET / HTTP/1.1\r\n\r\n")
    read_answer(client)
    for _ in range(4):
        loop.advance(1)
    assert client.conn in loop.server.connections
    for _ in range(3):
        loop.advance(1)
    assert loop.server.connections == set()


@LISTENERS
@pytest.mark.parametrize(
    "lines",
    [
        ["connection: keep-alive, UPGRADE", "UPGRADE: WebSocket"],
        ["Connection: keep-alive", "Connection: upgrade", "Upgrade: h2c", "Upgrade: websocket"],
        ["Connection: Upgrade", "Upgrade: h2c,websocket"],
        ["Connection: Upgrade", "Upgrade: websocket", "Origin: https://elsewhere.example"],
        [
            "Connection: Upgrade",
            "Upgrade: websocket",
            "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits",
            "Sec-WebSocket-Protocol: chat, superchat",
        ],
        ["Connection: Upgrade", "Upgrade: websocket", f"Cookie: {'x' * 7_000}"],
    ],
)
def test_variants_of_an_upgrade(loop: Loop, role: Role, lines: list[str]) -> None:
    """Names and tokens have no case. Two of the fields are lists. Extensions are declined."""
    client = loop.client("ws", role, upgrade=False)
    assert isinstance(client, WebSocketClient)
    rest = client.request.replace(b"Connection: Upgrade\r\nUpgrade: websocket\r\n", b"")[:-2]
    client.send_wire(rest + "".join(f"{line}\r\n" for line in lines).encode() + b"\r\n")
    client.send(LEFT)
    assert client.receive_now() == b""  # which checks the answer
    assert loop.server.snapshot().current().waiting_tokens == 1


# The handshake in messages.


EMPTY = message(b"")
# What a client without a partner sends, what it receives, and its mood.
HANDSHAKES: dict[str, tuple[bytes, bytes, str]] = {
    "a message": (message(LEFT), b"", "lonely"),
    "a message without newline": (message(LEFT[:-1]), b"", "lonely"),
    "a message without newline or side": (message(PLAIN[:-1]), b"", "lonely"),
    "messages": (message(LEFT[:1]) + message(LEFT[1:40]) + message(LEFT[40:]), b"", "lonely"),
    "messages without newline": (message(LEFT[:40]) + message(LEFT[40:-1]), b"", "lonely"),
    "fragments": (message(*[LEFT[n : n + 1] for n in range(len(LEFT))]), b"", "lonely"),
    "fragments without newline": (message(LEFT[:-1], b"", b""), b"", "lonely"),
    "a fragment that is whole is no message": (message(PLAIN[:-1], LEFT[77:]), b"", "lonely"),
    "newline in a fragment of its own": (message(LEFT[:-1], b"\n"), b"", "lonely"),
    "newline and no end of the message": (message(LEFT, b"")[:-6], b"", "lonely"),
    "fragments between Pings": (
        frame(PING)
        + frame(BINARY, LEFT[:9], fin=False)
        + frame(PING)
        + frame(PONG)
        + frame(CONTINUATION, LEFT[9:])
        + frame(PING),
        b"",
        "lonely",
    ),
    "empty messages around": (EMPTY * 2 + message(LEFT) + EMPTY * 2, b"", "lonely"),
    "empty messages within": (message(LEFT[:9]) + EMPTY + message(LEFT[9:]) + EMPTY, b"", "lonely"),
    "empty messages within, no newline": (
        message(LEFT[:9]) + EMPTY + message(LEFT[9:-1]) + EMPTY,
        b"",
        "lonely",
    ),
    "an empty message": (EMPTY, b"", "empty"),
    "no end, no newline": (frame(BINARY, LEFT[:-1], fin=False), b"", "empty"),
    "half a frame": (frame(BINARY, LEFT)[:-1], b"", "empty"),
    "half a handshake": (message(LEFT[:40]), b"", "empty"),
    "1,023 bytes": (message(b"x" * 1_023), b"", "empty"),
    "1,024 bytes": (message(b"x" * 1_024), b"bad handshake\n", "errory"),
    "1,024 bytes in messages": (message(b"x" * 128) * 8, b"bad handshake\n", "errory"),
    "1,024 bytes in fragments": (message(*[b"x" * 128] * 8), b"bad handshake\n", "errory"),
    "1,024 bytes of a frame": (
        frame(BINARY, b"x" * 2_000)[: -2_000 + 1_024],
        b"bad handshake\n",
        "errory",
    ),
    "junk": (message(b"junk\n"), b"bad handshake\n", "errory"),
    "junk in messages": (message(b"j") + message(b"unk\n"), b"bad handshake\n", "errory"),
    "a carriage return": (message(LEFT[:-1] + b"\r\n"), b"bad handshake\n", "errory"),
    "HTTP again": (message(upgrade()), b"bad handshake\n", "errory"),
    "a newline after the newline": (message(LEFT + b"\n"), b"impatient\n", "impatient"),
    "a newline after the end": (message(LEFT[:-1]) + message(b"\n"), b"impatient\n", "impatient"),
    "a byte after the end": (message(LEFT) + message(b"x"), b"impatient\n", "impatient"),
    "a message ends after the token": (
        message(PLAIN[:-1]) + message(LEFT[77:]),
        b"impatient\n",
        "impatient",
    ),
}


@CUTS
@pytest.mark.parametrize(("wire", "reply", "mood"), HANDSHAKES.values(), ids=HANDSHAKES)
def test_a_handshake_in_messages(
    loop: Loop, wire: bytes, reply: bytes, mood: str, at_once: bool
) -> None:
    client = loop.client("ws")
    send(loop, client, wire, at_once)
    assert len(loop.recorder.records) == (mood in ("errory", "impatient"))
    client.sock.shutdown(socket.SHUT_WR)
    assert client.read_to_end() == reply
    assert loop.recorder.moods() == [mood]


EARLY: dict[str, tuple[bytes, bytes]] = {
    "in the message": (message(RIGHT + b"early"), b"early"),
    "in a message of its own": (message(RIGHT) + message(b"early"), b"early"),
    "after no newline": (message(RIGHT[:-1]) + message(b"early"), b"early"),
    "a newline after the newline": (message(RIGHT + b"\n"), b"\n"),
    "a newline after the end": (message(RIGHT[:-1]) + message(b"\n"), b"\n"),
    "in fragments": (message(RIGHT[:50], RIGHT[50:] + b"ea", b"", b"rly"), b"early"),
    "between empty messages": (message(RIGHT) + EMPTY + message(b"early") + EMPTY, b"early"),
    "another handshake": (message(RIGHT) + message(RIGHT[:-1]), RIGHT[:-1]),
}


@PARTNERS
@pytest.mark.parametrize(("wire", "early"), EARLY.values(), ids=EARLY)
def test_bytes_after_a_matched_handshake(
    loop: Loop, wire: bytes, early: bytes, second: str
) -> None:
    """They are sent to the partner, after its `ok`."""
    other, one = loop.client(second), loop.client("ws")
    other.send(LEFT)
    one.send_wire(wire)
    one.half_close()
    assert other.read_to_end() == b"ok\n" + early
    assert one.read_to_end() == b"ok\n"
    assert [record[3:] for record in loop.recorder.records] == [(len(early), "happy")]


def test_empty_messages_are_ignored(loop: Loop) -> None:
    """While a client waits, and in a pair."""
    one = websocket(loop, LEFT)
    one.send_wire(EMPTY * 3 + message(b"", b"", b""))
    loop.pump()
    assert loop.server.snapshot().current().waiting_tokens == 1
    other = websocket(loop, RIGHT)
    assert one.receive(3) == other.receive(3) == b"ok\n"
    one.send_wire(EMPTY * 3 + message(b"", b"", b""))
    one.send(b"x")
    assert other.next_frame() == (BINARY, b"x")
    assert loop.server.snapshot().current().incomplete_bytes == 1


# Messages to a client.


def test_ok_is_a_message_of_its_own(loop: Loop) -> None:
    one, other = websocket(loop, LEFT), loop.client("ws")
    other.send(RIGHT + b"early")
    assert one.next_frame() == other.next_frame() == (BINARY, b"ok\n")
    assert one.next_frame() == (BINARY, b"early")


@PARTNERS
@pytest.mark.parametrize("size", [32_767, 32_768, 32_769, 65_536, 1_000_000])
def test_no_message_is_longer_than_32_kib(loop: Loop, second: str, size: int) -> None:
    """The test client checks each message. It is not empty, nor much shorter than possible."""
    one, other = meet(loop, second)
    data = random.Random(size).randbytes(size)
    sizes = []
    for start in range(0, size, 1 << 16):  # a size that arrives in one piece
        other.send(data[start : start + (1 << 16)])
        got = b""
        while len(got) < len(data[start : start + (1 << 16)]):
            found = one.next_frame()
            assert found is not None and found[0] == BINARY
            got += found[1]
            sizes.append(len(found[1]))
        assert digest(got) == digest(data[start : start + (1 << 16)])
    assert len(sizes) <= 4 + size // 10_000


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "later"])
@pytest.mark.parametrize(
    ("sent", "reply"),
    [
        (message(b"junk\n"), b"bad handshake\n"),
        (message(PLAIN + b"x"), b"impatient\n"),
        (message(PLAIN) + message(b"x"), b"impatient\n"),
    ],
    ids=["bad handshake", "impatient", "impatient in a message of its own"],
)
def test_a_refusal_is_a_message_and_a_close(
    loop: Loop, sent: bytes, reply: bytes, at_once: bool
) -> None:
    """Later Pings, Closes and protocol errors are not answered."""
    client = loop.client("ws")
    more = frame(PING, b"?") + frame(TEXT) + frame(CLOSE, close_payload(4000))
    client.send_wire(sent + more * at_once)
    loop.pump()
    client.send_wire(more)
    assert client.next_frame() == (BINARY, reply)
    assert client.next_frame() == (CLOSE, close_payload(1000))
    assert client.next_frame() is None
    assert lingers(loop, client)


def test_a_redundant_client_gets_only_a_close(loop: Loop) -> None:
    older, newer = websocket(loop, LEFT), websocket(loop, LEFT)
    websocket(loop, RIGHT)
    assert older.next_frame() == (CLOSE, close_payload(1000))
    assert older.next_frame() is None
    assert newer.next_frame() == (BINARY, b"ok\n")
    assert loop.recorder.moods() == ["redundant"]


# Pings from the relay.


@PARTNERS
def test_a_silent_pair_gets_a_ping_each_25_seconds(loop: Loop, second: str) -> None:
    """The pair does not end without Pongs."""
    one, other = meet(loop, second)
    for number in range(40):
        loop.advance(24.75)
        assert (one.receive_now(), len(one.pings)) == (b"", number)
        loop.advance(0.25)
        assert (one.receive_now(), len(one.pings)) == (b"", number + 1)
        if isinstance(other, WebSocketClient):
            assert (other.receive_now(), len(other.pings)) == (b"", number + 1)
    other.send(b"still here")
    assert one.receive(10) == b"still here"


def test_a_waiting_client_gets_a_ping_each_25_seconds(loop: Loop) -> None:
    """It waits on, because it answers."""
    one = websocket(loop, LEFT)
    for number in range(20):
        loop.advance(24.75)
        assert (one.receive_now(), len(one.pings)) == (b"", number)
        loop.advance(0.25)
        assert (one.receive_now(), len(one.pings)) == (b"", number + 1)
        one.send_wire(frame(PONG, one.pings[-1]))
        loop.pump()
    assert loop.server.snapshot().current().waiting_tokens == 1


def test_no_other_client_gets_a_ping(loop: Loop) -> None:
    """Not over TCP, not before the upgrade or the handshake, and not after the end was sent."""
    plain = loop.client("tcp")
    plain.send(LEFT)
    early = loop.client("tcp", role=Role.WEBSOCKET)
    early.send(HALF_A_HEAD)
    visitor = loop.client("tcp", role=Role.WEBSOCKET)
    visitor.send(b"GET / HTTP/1.1\r\n\r\n")
    answer = visitor.receive_now()
    silent = websocket(loop)
    refused = websocket(loop, b"junk\n")
    for _ in range(20):
        loop.advance(1)  # none of the others lingers after this
    loop.advance(20)
    assert plain.receive_now() == early.receive_now() == b""
    assert silent.receive_now() == b"" and silent.pings == []
    assert answer and visitor.receive_now() == b""
    assert refused.read_to_end() == b"bad handshake\n" and refused.pings == []


@pytest.mark.parametrize(
    "act",
    [
        lambda one, other: one.send(b"x"),
        lambda one, other: one.send_wire(frame(PONG)),
        lambda one, other: one.send_wire(frame(PING)),
        lambda one, other: one.send_wire(frame(BINARY)),
        lambda one, other: one.send_wire(b"\x82"),
        lambda one, other: other.send(b"x"),
    ],
    ids=["data", "Pong", "Ping", "empty message", "half a frame", "data for it"],
)
def test_no_ping_within_25_seconds_of_activity(
    loop: Loop, act: Callable[[Client, Client], None]
) -> None:
    one, other = meet(loop)
    loop.advance(20)
    act(one, other)
    loop.pump()
    loop.advance(24.75)
    one.receive_now()
    assert one.pings == []
    loop.advance(0.25)
    one.receive_now()
    assert len(one.pings) == 1


def test_no_ping_is_sent_behind_a_backlog(loop: Loop) -> None:
    """It would arrive late. The time of silence restarts when the backlog is empty."""
    one, other = meet(loop, "unix", "ws-unix")
    assert one.conn is not None
    sent = 0
    while not one.conn.queued_bytes():
        other.send(bytes(10_000))
        loop.pump()
        sent += 10_000
    for _ in range(10):
        loop.advance(25)
    loop.advance(10)
    assert one.receive(sent) == bytes(sent)
    loop.advance(24.75)
    assert (one.receive_now(), one.pings) == (b"", [])
    loop.advance(0.25)
    assert (one.receive_now(), len(one.pings)) == (b"", 1)


@pytest.mark.parametrize("second", ["unix", "ws-unix"])
def test_a_sender_that_is_not_read_gets_pings_and_does_not_end(loop: Loop, second: str) -> None:
    """Its Pongs are not read as long as its partner does not read."""
    one, other = meet(loop, second, "ws-unix")
    data = random.Random(1).randbytes(1 << 22)
    (wire,) = one.encode(data)
    sent = send_until_blocked(loop, one, wire) - (len(wire) - len(data))
    for _ in range(10):
        loop.advance(25)
    assert (one.receive_now(), len(one.pings)) == (b"", 10)
    assert digest(other.receive(sent)) == digest(data[:sent])
    assert loop.recorder.moods() == []


# Clients that do not answer.


def test_a_waiting_client_that_answers_no_ping_is_ended_after_100_seconds(loop: Loop) -> None:
    """25 s after the last of three Pings: a Ping needs time to be answered."""
    one = websocket(loop, LEFT)
    for number in range(4):
        loop.advance(24.75)
        assert (one.receive_now(), len(one.pings), one.close_code) == (b"", number, None)
        loop.advance(0.25)
    assert one.read_to_end(1000) == b""
    assert len(one.pings) == 3
    assert [(record.mood, record.total_time) for record in loop.recorder.records] == [
        ("lonely", 100)
    ]
    assert loop.server.snapshot().current().waiting_tokens == 0


@pytest.mark.parametrize(
    "wire",
    [frame(PONG), frame(PING), EMPTY, b"\x82", frame(BINARY, b"")[:-1]],
    ids=["Pong", "Ping", "empty message", "a byte", "half a frame"],
)
@pytest.mark.parametrize("silent_seconds", [20, 40, 60, 99.75])
def test_any_byte_answers_all_pings(loop: Loop, wire: bytes, silent_seconds: float) -> None:
    one = websocket(loop, LEFT)
    for _ in range(int(silent_seconds // 25)):
        loop.advance(25)
    loop.advance(silent_seconds % 25)
    one.send_wire(wire)
    loop.pump()
    for _ in range(3):
        loop.advance(25)
    loop.advance(24.75)
    assert loop.recorder.moods() == []
    loop.advance(0.25)
    assert one.read_to_end(1000) == b""
    assert loop.recorder.moods() == ["lonely"]


def test_a_relay_that_was_suspended_ends_no_client(loop: Loop) -> None:
    """Pings are counted, not seconds. A relay that did not run has sent none."""
    one = websocket(loop, LEFT)
    loop.advance(1_000_000)
    assert (one.receive_now(), len(one.pings), one.close_code) == (b"", 1, None)
    loop.advance(25)
    loop.advance(25)
    loop.advance(24.75)
    assert (one.receive_now(), len(one.pings), one.close_code) == (b"", 3, None)
    one.send_wire(frame(PONG))
    loop.advance(0.25)
    assert loop.recorder.moods() == []


def test_a_suspension_within_the_select_does_not_count_as_silence(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time of silence continues where it was."""
    one = websocket(loop, LEFT)
    loop.advance(20)
    select = loop.server._selector.select
    suspensions = [55.0]

    def suspended_select(timeout: float) -> object:
        events = select(timeout)
        if suspensions:
            loop.clock.advance(suspensions.pop())
        return events

    with monkeypatch.context() as patch:
        patch.setattr(loop.server._selector, "select", suspended_select)
        loop.server.run_once(0)
    assert not suspensions
    assert one.receive_now() == b"" and one.pings == []
    loop.advance(4.75)
    assert one.receive_now() == b"" and one.pings == []
    loop.advance(0.25)
    assert one.receive_now() == b"" and len(one.pings) == 1


def test_a_raw_client_may_wait_in_silence(loop: Loop) -> None:
    one = loop.client("tcp", role=Role.WEBSOCKET)
    one.send(LEFT)
    loop.pump()
    loop.advance(10_000)
    assert one.receive_now() == b""
    assert loop.server.snapshot().current().waiting_tokens == 1


def test_a_client_that_was_paired_may_be_silent(loop: Loop) -> None:
    one = websocket(loop, LEFT)
    loop.advance(74)
    other = websocket(loop, RIGHT)
    for _ in range(10):
        loop.advance(25)
    one.send(b"x")
    assert other.receive(4) == b"ok\nx"
    assert loop.recorder.moods() == []


# The time limit of a handshake.


@pytest.mark.parametrize("sent", [b"", EMPTY, message(LEFT[:40]), frame(BINARY, LEFT)[:-1]])
def test_the_time_limit_of_a_handshake_begins_at_the_accept(loop: Loop, sent: bytes) -> None:
    """Not at the upgrade. The end is a Close, and there is a record."""
    client = loop.client("ws", upgrade=False)
    assert isinstance(client, WebSocketClient)
    loop.advance(50)
    client.send_wire(client.request + sent)
    loop.advance(9.75)
    assert (client.receive_now(), client.close_code) == (b"", None)
    loop.advance(0.25)
    assert client.read_to_end(1000) == b""
    assert [(life.mood, life.total_time) for life in loop.recorder.records] == [("empty", 60)]


def test_a_handshake_in_time(loop: Loop) -> None:
    client = loop.client("ws", upgrade=False)
    assert isinstance(client, WebSocketClient)
    loop.advance(59.75)
    client.send_wire(client.request + message(LEFT))
    loop.advance(0.25)
    loop.advance(10)
    assert client.receive_now() == b""
    assert loop.server.snapshot().current().waiting_tokens == 1


def test_a_slow_head_does_not_extend_the_time_limit(loop: Loop) -> None:
    client = loop.client("ws", upgrade=False)
    assert isinstance(client, WebSocketClient)
    for n in range(59):
        client.send_wire(client.request[n : n + 1])
        loop.advance(1)
    assert client.conn in loop.server.connections
    loop.advance(1)
    assert client.sock.recv(100) == b""
    assert loop.recorder.moods() == []


# Pongs.


@pytest.mark.parametrize("state", ["new", "waiting", "paired"])
def test_a_pong_has_the_payload_of_its_ping(loop: Loop, state: str) -> None:
    one = meet(loop)[0] if state == "paired" else websocket(loop, *[LEFT] * (state == "waiting"))
    payloads = [b"", b"x", bytes(range(125)), b"\xff\xfe", b""]
    one.send_wire(b"".join(frame(PING, payload) for payload in payloads))
    assert one.receive_now() == b""
    assert one.pongs == payloads


def test_a_ping_in_the_middle_of_a_message(loop: Loop) -> None:
    one, other = meet(loop)
    one.send_wire(frame(BINARY, b"1", fin=False) + frame(PING, b"?") + frame(CONTINUATION, b"2"))
    assert other.receive(2) == b"12"
    assert (one.receive_now(), one.pongs) == (b"", [b"?"])


@PARTNERS
def test_pongs_of_a_client_are_discarded(loop: Loop, second: str) -> None:
    one, other = meet(loop, second)
    one.send_wire(frame(PONG, b"unasked") + frame(PING))
    one.send(b"x")
    assert other.receive(1) == b"x"
    assert other.receive_now() == b""
    assert loop.server.snapshot().current().incomplete_bytes == 1


def flood(loop: Loop, client: WebSocketClient) -> list[bytes]:
    """Send many Pings without reading. Return their payloads, which are sorted."""
    assert client.conn is not None
    pings = [struct.pack("!I100x", n) for n in range(20_000)]
    longest = 0
    for start in range(0, len(pings), 100):
        client.send_wire(b"".join(frame(PING, ping) for ping in pings[start : start + 100]))
        loop.pump()
        longest = max(longest, client.conn.queued_bytes())
    assert 64 * 1024 < longest < 128 * 1024 + 1024
    return pings


def read_pongs(client: WebSocketClient, last: bytes) -> None:
    """Read until the Pong `last` has come."""
    while client.pongs[-1:] != [last]:
        assert client.next_frame() is not None
    assert client.receive_now() == b""
    assert client.pongs == sorted(set(client.pongs))  # each once, in their order


@pytest.mark.parametrize("paired", [False, True], ids=["waiting", "paired"])
def test_a_client_with_much_unread_gets_the_newest_pong(loop: Loop, paired: bool) -> None:
    """It is sent when there is room. The backlog is bounded."""
    if paired:
        one, other = meet(loop, "unix", "ws-unix")
    else:
        one = websocket(loop, LEFT, kind="ws-unix")
    pings = flood(loop, one)
    read_pongs(one, pings[-1])
    assert set(one.pongs) <= set(pings)
    assert len(one.pongs) < len(pings) // 2
    one.send_wire(frame(PING, b"again"))
    assert (one.receive_now(), one.pongs[-1]) == (b"", b"again")
    if paired:
        other.send(b"x")
        assert one.receive(1) == b"x"


def test_an_old_pong_is_not_sent_after_a_newer_one(loop: Loop) -> None:
    """Also if there is room for the newer one while the old one still waits."""
    client = websocket(loop, LEFT, kind="ws-unix")
    assert client.conn is not None
    client.conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # small steps
    flood(loop, client)
    while client.conn.queued_bytes() > 50_000:
        assert client.next_frame() is not None
    assert client.conn.queued_bytes()
    client.send_wire(frame(PING, b"\xff newest"))
    read_pongs(client, b"\xff newest")


def test_early_data_follows_queued_pongs(loop: Loop) -> None:
    """The data is several messages."""
    one = websocket(loop, LEFT, kind="ws-unix")
    flood(loop, one)
    other = loop.client("unix")
    early = random.Random(1).randbytes(100_000)
    other.send(RIGHT[:20])
    loop.pump()  # raw clients are read in large pieces
    other.send(RIGHT[20:] + early)
    assert digest(one.receive(3 + len(early))) == digest(b"ok\n" + early)


def test_each_ping_is_answered_while_little_is_unread(loop: Loop) -> None:
    one = websocket(loop, LEFT, kind="ws-unix")
    assert one.conn is not None
    pings: list[bytes] = []
    while one.conn.queued_bytes() <= 50_000:
        pings.append(struct.pack("!I100x", len(pings)))
        one.send_wire(frame(PING, pings[-1]))
        loop.pump()
    while len(one.pongs) < len(pings):
        assert one.next_frame() is not None
    assert one.pongs == pings


# Close.

CODES = pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 3000, 4999, None])


@CODES
@pytest.mark.parametrize(
    ("sent", "mood"), [([], "empty"), ([LEFT], "lonely")], ids=["new", "waiting"]
)
def test_a_close_is_answered_with_its_code(
    loop: Loop, code: int | None, sent: list[bytes], mood: str
) -> None:
    """The answer has no reason."""
    client = websocket(loop, *sent)
    client.send_wire(frame(CLOSE, close_payload(code, b"because" if code else b"")))
    assert client.next_frame() == (CLOSE, close_payload(code))
    assert client.next_frame() is None
    assert loop.recorder.moods() == [mood]
    assert lingers(loop, client)


@CODES
@PARTNERS
def test_a_close_in_a_pair(loop: Loop, code: int | None, second: str) -> None:
    """The partner's Close has the code 1000, not the client's code."""
    one, other = meet(loop, second)
    one.send_wire(message(b"last words") + frame(CLOSE, close_payload(code)) + message(b"no more"))
    assert other.read_to_end(1000) == b"last words"
    assert one.next_frame() == (CLOSE, close_payload(code))
    assert one.next_frame() is None
    assert lingers(loop, one) and lingers(loop, other)
    assert [record[3:] for record in loop.recorder.records] == [(10, "happy")]


def test_the_answer_to_a_close_follows_the_backlog(loop: Loop) -> None:
    one, other = meet(loop, "unix", "ws-unix")
    data = random.Random(1).randbytes(1 << 22)
    send_until_blocked(loop, other, data)
    taken = loop.server.rendezvous.incomplete_bytes()
    one.half_close(4001)
    loop.pump()
    one.send_wire(frame(PING) + frame(CLOSE) + frame(TEXT))
    assert digest(one.read_to_end(4001)) == digest(data[:taken])
    assert one.pongs == []
    assert other.read_to_end() == b""


def test_a_refusal_follows_the_backlog(loop: Loop) -> None:
    """Nothing follows the refusal, although it is not yet sent."""
    client = websocket(loop, LEFT, kind="ws-unix")
    flood(loop, client)
    client.send(b"x")
    loop.pump()
    pongs = client.conn.queued_bytes() if client.conn else 0
    assert pongs > 0
    client.send_wire(frame(PING, b"late") + frame(TEXT))
    assert client.read_to_end(1000) == b"impatient\n"
    assert client.pongs[-1] != b"late"


@PARTNERS
def test_an_end_without_a_close_is_answered_with_one(loop: Loop, second: str) -> None:
    one, other = meet(loop, second)
    one.send_wire(message(b"last") + frame(BINARY, b"words")[:-1])
    one.sock.shutdown(socket.SHUT_WR)
    assert other.read_to_end(1000) == b"lastword"
    assert one.read_to_end(1000) == b""
    assert [record[3:] for record in loop.recorder.records] == [(8, "happy")]


@PARTNERS
def test_the_end_of_a_partner_is_a_close_and_nothing_follows(loop: Loop, second: str) -> None:
    one, other = meet(loop, second)
    other.send(b"last words")
    other.half_close()
    loop.pump()
    one.send_wire(frame(PING) + message(b"hello?") + frame(CLOSE, close_payload(4000)))
    assert one.next_frame() == (BINARY, b"last words")
    assert one.next_frame() == (CLOSE, close_payload(1000))
    assert one.next_frame() is None
    assert lingers(loop, one)


# A stop.


def test_a_stop_closes_with_1001(loop: Loop) -> None:
    refused = websocket(loop, b"junk\n", kind="ws-unix")
    new = websocket(loop, kind="ws-unix")
    waiting = websocket(loop, handshake("other"), kind="ws-unix")
    half, other = meet(loop, "ws-unix", "ws-unix")
    half.send_wire(frame(BINARY, b"half")[:-1])
    one, plain = meet(loop, "unix", "ws-unix")
    loop.pump()
    loop.recorder.records.clear()
    loop.server.ending.stop()
    loop.pump()
    assert other.read_to_end(1001) == b"hal"
    for client in (new, waiting, half, one):
        assert client.read_to_end(1001) == b""
    assert plain.read_to_end() == b""
    assert refused.read_to_end(1000) == b"bad handshake\n"
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER
    assert sorted(loop.recorder.moods()) == ["empty", "happy", "happy", "lonely"]


@pytest.mark.parametrize(
    ("first", "second"), [("unix", "ws-unix"), ("ws-unix", "unix"), ("ws-unix", "ws-unix")]
)
@pytest.mark.parametrize("size", [10, 3_000, 1 << 23], ids=["short", "long", "endless"])
def test_bytes_that_arrived_before_a_stop_are_delivered(
    loop: Loop, first: str, second: str, size: int
) -> None:
    """Frames, which have more bytes than their payload, and the beginning of a frame."""
    one, other = loop.meet(first, second)
    data = random.Random(1).randbytes(size)
    (wire,) = one.encode(data)
    overhead = len(wire) - size
    sent = send_until_blocked(loop, one, wire * (1 + (1 << 23) // size))
    whole, rest = divmod(sent, len(wire))
    loop.server.ending.stop()
    loop.pump()
    assert loop.server.phase is not ServerPhase.OVER
    assert digest(other.read_to_end(1001)) == digest(data * whole + data[: max(0, rest - overhead)])
    assert one.read_to_end(1001) == b""
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER


def test_sigterm(relay: Callable[..., RelayProcess]) -> None:
    """The signal stops a relay in time, after what was sent is delivered, without a warning."""
    running = relay(*WEB)
    new, waiting = running.client("ws"), running.client("ws")
    waiting.send(handshake("other"))
    one, other = running.meet("ws", "ws")
    data = random.Random(1).randbytes(50_000)
    one.send(data)
    running.process.terminate()
    assert digest(other.read_to_end(1001)) == digest(data)
    for client in (new, waiting, one):
        assert client.read_to_end(1001) == b""
    for client in (new, waiting, one, other):
        client.close()
    assert running.wait() == 0
    assert b"warning:" not in running.stderr and b"Traceback" not in running.stderr


def test_many_small_frames_wait_behind_small_reads(loop: Loop) -> None:
    """A turn serves a quarter of such clients, and all clients with few frames."""
    flooding = [loop.meet("ws", "tcp")[0] for _ in range(4)]
    one, other = loop.meet("tcp", "tcp")
    for client in flooding:
        client.sock.sendall(frame(BINARY, b"x") * 10_000)
    conns = [client.conn for client in flooding if client.conn is not None]
    for _ in range(4):  # reads that show how many frames there are
        loop.server.run_once(0)
    assert len(set(conns) & set(loop.server.bulk.ready)) >= 3  # the last turn served one
    one.sock.sendall(b"at once")
    loop.wait_for_arrivals()
    before = [conn.read_bytes for conn in conns]
    loop.server.run_once(0)
    assert other.sock.recv(100) == b"at once"
    after = [conn.read_bytes for conn in conns]
    assert sum(old != new for old, new in zip(before, after)) == 1


def test_after_a_costly_read_the_next_one_waits_in_the_bulk_queue(loop: Loop) -> None:
    one, other = loop.meet("ws-unix", "ws-unix")
    assert one.conn is not None
    for count, is_bulk in ((1, False), (COSTLY_FRAMES + 1, True), (1, False)):
        one.send_wire(b"".join(frame for _ in range(count) for frame in one.encode(b"x")))
        assert other.receive(count) == b"x" * count
        assert one.conn.is_bulk is is_bulk


def test_a_read_that_is_not_queued_is_short(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """So a burst of empty frames from many clients does not make one turn long."""
    one, other = loop.meet("ws-unix", "ws-unix")
    for _ in range(3):  # cheap reads, after which the next ones may be larger
        one.send_wire(frame(PONG, bytes(125)) * 14)
        loop.pump()
    assert one.conn is not None and one.conn.framing.max_read_bytes > DIRECT_READ_BYTES
    direct: list[int] = []
    receive = Connection.receive

    def noted(self: Connection, largest: int = PIPE_BYTES) -> int:
        count = receive(self, largest)
        if self is one.conn and largest != PIPE_BYTES:
            direct.append(count)
        return count

    monkeypatch.setattr(Connection, "receive", noted)
    one.send_wire(frame(BINARY, b"") * 5_000)
    loop.pump()
    assert direct and max(direct) <= DIRECT_READ_BYTES
    one.send(b"data")
    assert other.receive(4) == b"data"
