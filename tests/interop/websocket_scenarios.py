"""The scenarios of test_differential.py that exist only over WebSocket."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable

from scenarios import ANY_ONE, SCENARIOS, Scenario, Script, scenario
from stage import (
    BAD,
    BINARY,
    CLOSE,
    CONTINUATION,
    IMPATIENT,
    NORMAL,
    OK,
    PING,
    PONG,
    TEXT,
    UPGRADE,
    Client,
    Kinds,
    Stage,
    WebSocketClient,
    frame,
    handshake,
)

ALONE: list[Kinds] = [("ws",)]
WITH_ANY: list[Kinds] = [("ws", "tcp"), ("ws", "ws")]


def websocket(client: Client) -> WebSocketClient:
    """Return the client, which must be one over WebSocket."""
    assert isinstance(client, WebSocketClient)
    return client


# ---- the upgrade


def with_fields(*fields: str, without: str = "", line: str = "GET / HTTP/1.1") -> str:
    """Return an upgrade request with more fields, and without those that begin with `without`."""
    kept = [old for old in UPGRADE.split("\r\n")[1:-2] if not (without and old.startswith(without))]
    return "\r\n".join([line, *kept, *fields, "", ""])


UPGRADES = {
    "names in lower case": UPGRADE.replace("Sec-WebSocket", "sec-websocket")
    .replace("Host", "host")
    .replace("Upgrade:", "upgrade:")
    .replace("Connection", "connection"),
    "names and words in capitals": UPGRADE.replace("Sec-WebSocket-", "SEC-WEBSOCKET-")
    .replace("Host", "HOST")
    .replace("Upgrade", "UPGRADE")
    .replace("Connection", "CONNECTION")
    .replace("websocket", "WEBSOCKET"),
    "no space after the colons": UPGRADE.replace(": ", ":"),
    "much space after the colons": UPGRADE.replace(": ", ": \t "),
    "space at the ends of lines": UPGRADE.replace("localhost", "localhost \t").replace(
        "{key}", "{key} "
    ),
    "Connection is a list": with_fields("Connection: keep-alive, Upgrade", without="Connection"),
    "Connection twice": with_fields("Connection: keep-alive"),
    "Upgrade is a list": with_fields("Upgrade: h2c, WebSocket", without="Upgrade"),
    "path and query": with_fields(line="GET /some/where?a=b&c HTTP/1.1"),
    "whole URL": with_fields(line="GET http://relay.example:4002/ HTTP/1.1"),
    "Host with a port": with_fields("Host: relay.example:8443", without="Host"),
    "Host in IPv6": with_fields("Host: [::1]:4002", without="Host"),
    "empty Host": with_fields("Host:", without="Host"),
    "Origin": with_fields("Origin: https://elsewhere.example:8443"),
    "Origin null": with_fields("Origin: null"),
    "extension": with_fields(
        "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
    ),
    "extension with an invalid parameter": with_fields(
        "Sec-WebSocket-Extensions: permessage-deflate; server_max_window_bits"
    ),
    "subprotocols": with_fields("Sec-WebSocket-Protocol: binary, transit_relay"),
    "what browsers and proxies add": with_fields(
        "User-Agent: Mozilla/5.0 (X11; Linux x86_64)",
        "Accept-Encoding: gzip, deflate, br",
        "Cache-Control: no-cache",
        "Cookie: a=b; c=d",
        "X-Forwarded-For: 192.0.2.1",
        "X-Forwarded-For: 192.0.2.2",
        "Via: 1.1 proxy.example",
    ),
    "non-ASCII characters": with_fields("Cookie: \u00e9\u00e8=\u20ac"),
    "7,000 bytes of a cookie": with_fields("Cookie: " + "c" * 7000),
    "16,000 bytes of a cookie": with_fields("Cookie: " + "c" * 16_000),
    "24,000 bytes of cookies": with_fields(*["Cookie: " + "c" * 12_000] * 2),
    # The relays differ in the following.
    "17,000 bytes of a cookie": with_fields("Cookie: " + "c" * 17_000),
    "36,000 bytes of cookies": with_fields(*["Cookie: " + "c" * 12_000] * 3),
    "no Host": with_fields(without="Host"),
    "Host twice": with_fields("Host: elsewhere"),
    "Host with an invalid port": with_fields("Host: relay.example:http", without="Host"),
    "fragment in the path": with_fields(line="GET /#here HTTP/1.1"),
    "invalid Origin": with_fields("Origin: elsewhere"),
    "Origin twice": with_fields("Origin: http://a.example", "Origin: http://b.example"),
    "subprotocol twice": with_fields("Sec-WebSocket-Protocol: binary, binary"),
    "extensions on two lines": with_fields(
        "Sec-WebSocket-Extensions: a", "Sec-WebSocket-Extensions: b"
    ),
    "no key": with_fields(without="Sec-WebSocket-Key"),
    "key twice": with_fields("Sec-WebSocket-Key: {key}"),
    "short key": with_fields("Sec-WebSocket-Key: c2hvcnQ=", without="Sec-WebSocket-Key"),
    "key that is no base64": with_fields(
        "Sec-WebSocket-Key: ?BEiM0RVZneImaq7zN3u/w==", without="Sec-WebSocket-Key"
    ),
    "no version": with_fields(without="Sec-WebSocket-Version"),
    "version 8": with_fields("Sec-WebSocket-Version: 8", without="Sec-WebSocket-Version"),
    "version 7": with_fields("Sec-WebSocket-Version: 7", without="Sec-WebSocket-Version"),
    "invalid version": with_fields("Sec-WebSocket-Version: new", without="Sec-WebSocket-Version"),
    "versions as a list": with_fields(
        "Sec-WebSocket-Version: 13, 8", without="Sec-WebSocket-Version"
    ),
    "version twice": with_fields("Sec-WebSocket-Version: 13"),
    "no Connection": with_fields(without="Connection"),
    "Connection without upgrade": with_fields("Connection: close", without="Connection"),
    "Upgrade to something else": with_fields("Upgrade: h2c", without="Upgrade"),
    "no Upgrade": with_fields(without="Upgrade"),
    "version 013": with_fields("Sec-WebSocket-Version: 013", without="Sec-WebSocket-Version"),
    "POST": with_fields(line="POST / HTTP/1.1"),
    "method in lower case": with_fields(line="get / HTTP/1.1"),
    "HTTP/1.0": with_fields(line="GET / HTTP/1.0"),
    "HTTP/2.0": with_fields(line="GET / HTTP/2.0"),
    "request line of two words": with_fields(line="GET /"),
    "request line with two spaces": with_fields(line="GET  / HTTP/1.1"),
    "space before a colon": with_fields("Cookie : a=b"),
    "line without a colon": with_fields("hello"),
    "line that is folded": with_fields("Cookie: a=b;", " c=d"),
}


def upgrading(request: str) -> Script:
    """Send this request. If it is accepted, send a handshake; then connect a partner."""

    def script(stage: Stage) -> None:
        client = stage.connect_websocket_to(stage.websocket_port, "client")
        client.upgrade(request)
        if client.is_open:
            client.send(stage.handshake("a"))
        stage.settle()
        stage.waiting("partner", "b")

    return script


for name, request in UPGRADES.items():
    SCENARIOS[f"upgrade: {name}"] = Scenario(upgrading(request), [("tcp",)])


@scenario(ALONE)
def upgrade_byte_by_byte(stage: Stage) -> None:
    client = stage.connect_websocket_to(stage.websocket_port, "client")
    for byte in client.encode_request():
        client.write(bytes([byte]))
        stage.settle()
    client.read_answer()
    client.send(stage.handshake("a"))
    stage.settle()
    stage.waiting("partner", "b").expect(OK)
    client.expect(OK)


@scenario(ALONE)
def handshake_after_the_upgrade(stage: Stage) -> None:
    client = stage.connect_websocket_to(stage.websocket_port, "client")
    client.upgrade(UPGRADE, frame(BINARY, stage.handshake("a")))
    stage.settle()
    stage.waiting("partner", "b").expect(OK)
    client.expect(OK)


@scenario(ALONE)
def all_after_the_upgrade(stage: Stage) -> None:
    partner = stage.waiting("partner", "b")
    client = stage.connect_websocket_to(stage.websocket_port, "client")
    sent = messages(stage.handshake("a"), b"hello", b"good bye")
    client.upgrade(UPGRADE, *sent, frame(CLOSE, NORMAL))
    partner.expect(OK + b"hellogood bye")
    partner.expect_end()
    client.expect(OK)


@scenario(ALONE)
def leaving_without_an_upgrade(stage: Stage) -> None:
    stage.connect_websocket_to(stage.websocket_port, "silent")
    client = stage.connect_websocket_to(stage.websocket_port, "unfinished request")
    client.write(client.encode_request()[:50])
    client = stage.connect_websocket_to(stage.websocket_port, "unfinished request and reset")
    client.write(client.encode_request()[:50])
    client.reset()


def begun(request: str) -> Scenario:
    """Send bytes at which our relay may answer. The reference waits for an empty line with CRLF."""

    def script(stage: Stage) -> None:
        client = stage.connect_websocket_to(stage.websocket_port, "client")
        client.write(client.encode_request(request))
        stage.settle()

    return Scenario(script, ALONE)


SCENARIOS |= {
    "request with lone line feeds": begun(UPGRADE.replace("\r\n", "\n")),
    "17,000 bytes of an unfinished request": begun(with_fields("Cookie: " + "c" * 17_000)[:-4]),
    "bytes that cannot begin a request": begun("\x16\x03\x01"),
    "beginning of a request": begun("GET / HTTP/1.1\r\nHost: localhost\r\n"),
}


# ---- HTTP, and the other listener

REQUESTS = {
    "GET": "GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET of somewhere": "GET /robots.txt HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "HEAD": "HEAD / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "OPTIONS": "OPTIONS / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "POST": "POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "PUT": "PUT / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
    "DELETE": "DELETE / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "GET without Host": "GET / HTTP/1.1\r\n\r\n",
    "GET in HTTP/1.0": "GET / HTTP/1.0\r\n\r\n",
    "OPTIONS in HTTP/1.0": "OPTIONS / HTTP/1.0\r\n\r\n",
}


def asking(request: str, over_websocket: bool) -> Scenario:
    """Send an HTTP request that is no upgrade, to either listener."""

    def script(stage: Stage) -> None:
        port = stage.websocket_port if over_websocket else stage.tcp_port
        client = stage.connect_to(port, "client")
        client.write(request.encode())
        client.read_to_end()

    return Scenario(script, ALONE)


for name, request in REQUESTS.items():
    SCENARIOS[f"{name} at the WebSocket listener"] = asking(request, over_websocket=True)
    SCENARIOS[f"{name} at the TCP listener"] = asking(request, over_websocket=False)
SCENARIOS["no HTTP at the WebSocket listener"] = asking("hello\r\n\r\n", over_websocket=True)


def websocket_at_the_tcp_listener(stage: Stage) -> None:
    client = stage.connect_websocket_to(stage.tcp_port, "client")
    client.upgrade()
    if client.is_open:
        client.send(stage.handshake("a"))
    stage.settle()
    stage.waiting("partner", "b")


def tcp_at_the_websocket_listener(stage: Stage) -> None:
    stage.connect_to(stage.websocket_port, "client").send(stage.handshake("a"))
    stage.settle()
    stage.waiting("partner", "b")


SCENARIOS |= {  # ANY_ONE: the kinds of the partner
    "WebSocket at the TCP listener": Scenario(websocket_at_the_tcp_listener, ANY_ONE),
    "TCP at the WebSocket listener": Scenario(tcp_at_the_websocket_listener, ANY_ONE),
}


# ---- the handshake in messages


def waiting_handshake(encode: Callable[[bytes], list[bytes]]) -> Scenario:
    """Send the handshake in these frames, one write each. Then connect a partner."""

    def script(stage: Stage) -> None:
        client = stage.connect("client")
        for piece in encode(stage.handshake("a")):
            client.write(piece)
            stage.settle()
        stage.waiting("partner", "b")

    return Scenario(script, WITH_ANY)


def messages(*payloads: bytes) -> list[bytes]:
    return [frame(BINARY, payload) for payload in payloads]


def fragments(*payloads: bytes, final: bool = True) -> list[bytes]:
    """Return the frames of one message. Unless it is `final`, the message is unfinished."""
    last = len(payloads) - 1
    return [
        frame(CONTINUATION if number else BINARY, payload, final=final and number == last)
        for number, payload in enumerate(payloads)
    ]


def singly(data: bytes) -> list[bytes]:
    return [bytes([byte]) for byte in data]


UNSIDED = len(b"please relay ") + 64
# In messages of one byte the handshake counts as whole before its side. This is the rest.
SIDE_BEGINS = handshake("", "a")[UNSIDED:]
HANDSHAKES: dict[str, Callable[[bytes], list[bytes]]] = {
    "without its newline": lambda line: messages(line[:-1]),
    "without its newline, which comes later": lambda line: messages(line[:-1], b"\n"),
    "without its side, which comes later": lambda line: messages(line[:UNSIDED], line[UNSIDED:]),
    "in two fragments": lambda line: fragments(line[:50], line[50:]),
    "in fragments of one byte": lambda line: fragments(*singly(line)),
    "with empty fragments": lambda line: fragments(b"", line, b""),
    "without its newline, in fragments": lambda line: fragments(line[:50], line[50:-1], b""),
    "with Pings between its fragments": lambda line: [
        frame(PING, b"first"),
        *fragments(line[:50], final=False),
        frame(PING, b"second"),
        frame(PONG, b"without a Ping"),
        frame(CONTINUATION, line[50:]),
        frame(PING),
    ],
    # The relays differ in the following.
    "in two messages": lambda line: messages(line[:50], line[50:]),
    "in two messages, the newline in a third": lambda line: messages(line[:20], line[20:-1], b"\n"),
    "in messages of one byte": lambda line: messages(*singly(line)),
    "in two messages, without its newline": lambda line: messages(line[:50], line[50:-1]),
    "after an empty message": lambda line: messages(b"", line),
    "in an unfinished message": lambda line: fragments(line, final=False),
    "and an empty message": lambda line: messages(line, b""),
    "with data after it in its message": lambda line: messages(line + b"early"),
    "with a newline after it in its message": lambda line: messages(line + b"\n"),
    "with data after it in its last fragment": lambda line: fragments(
        line[:50], line[50:] + b"early"
    ),
}
SCENARIOS |= {f"handshake {how}": waiting_handshake(encode) for how, encode in HANDSHAKES.items()}


def matching(encode: Callable[[bytes], list[bytes]]) -> Scenario:
    """Send the handshake in these frames, in one write. A partner waits already."""

    def script(stage: Stage) -> None:
        stage.waiting("partner", "b")
        client = stage.connect("client")
        client.write(b"".join(encode(stage.handshake("a"))))
        stage.settle()

    return Scenario(script, [("tcp", "ws"), ("ws", "ws")])


SCENARIOS |= {f"matching handshake {how}": matching(encode) for how, encode in HANDSHAKES.items()}


@scenario(ALONE)
def partial_handshake_in_a_message(stage: Stage) -> None:
    stage.connect("client").send(stage.handshake("a")[:50])
    stage.settle()


@scenario(ALONE)
def long_line_in_two_messages(stage: Stage) -> None:
    client = stage.connect("client")
    for _ in range(2):
        client.send(b"x" * 600)
        stage.settle()


@scenario(ALONE)
def long_line_in_two_fragments(stage: Stage) -> None:
    client = stage.connect("client")
    client.write(b"".join(fragments(b"x" * 600, b"x" * 600)))
    stage.settle()


@scenario(ALONE)
def long_line_in_an_unfinished_message(stage: Stage) -> None:
    client = stage.connect("client")
    client.write(b"".join(fragments(b"x" * 600, b"x" * 600, final=False)))
    stage.settle()


@scenario(ALONE)
def bad_line_in_an_unfinished_message(stage: Stage) -> None:
    client = stage.connect("client")
    client.write(frame(BINARY, b"hello\n", final=False))
    stage.settle()


@scenario(ALONE)
def bad_line_without_a_newline(stage: Stage) -> None:
    stage.connect("client").send(b"hello")
    stage.settle()


@scenario(ALONE)
def empty_message_alone(stage: Stage) -> None:
    stage.connect("client").send(b"")
    stage.settle()


# ---- frames of a waiting client


@scenario(WITH_ANY)
def pings_while_waiting(stage: Stage) -> None:
    client = websocket(stage.waiting("client", "a"))
    for payload in b"", b"one", b"x" * 125:
        client.write(frame(PING, payload))
    client.write(frame(PONG, b"without a Ping"))
    stage.settle()
    stage.waiting("partner", "b").expect(OK)
    client.expect(OK)


@scenario(ALONE)
def impatient_fragment(stage: Stage) -> None:
    client = stage.waiting("client", "a")
    client.write(frame(BINARY, b"early", final=False))
    stage.settle()


@scenario(ALONE)
def impatient_after_a_ping(stage: Stage) -> None:
    client = stage.waiting("client", "a")
    client.write(frame(PING, b"ping") + frame(BINARY, b"early"))
    client.expect(IMPATIENT)
    client.expect_end()


@scenario(ALONE)
def ping_after_a_bad_line(stage: Stage) -> None:
    client = stage.connect("client")
    client.write(frame(BINARY, b"hello\n") + frame(PING, b"ping"))
    client.expect(BAD)
    client.expect_end()


# ---- messages of a pair


@scenario(WITH_ANY)
def messages_of_all_sizes(stage: Stage) -> None:
    first, second = stage.pair()
    for size in 1, 125, 126, 127, 65_535, 65_536, 65_537:
        data = size.to_bytes(3, "big") * size
        first.send(data[:size])
        second.expect(data[:size])
        second.send(data[-size:])
        first.expect(data[-size:])


@scenario(WITH_ANY)
def lengths_of_three_kinds_in_one_segment(stage: Stage) -> None:
    first, second = stage.pair()
    parts = [bytes([size % 251]) * size for size in (0, 1, 125, 126, 300, 65_536)]
    first.send(*parts)
    second.expect(b"".join(parts))


@scenario(WITH_ANY)
def empty_messages(stage: Stage) -> None:
    first, second = stage.pair()
    first.send(b"")
    first.send(b"", b"one", b"", b"")
    second.expect(b"one")
    first.write(b"".join(fragments(b"", b"", b"")))
    first.send(b"two")
    second.expect(b"two")


@scenario(WITH_ANY)
def a_message_in_fragments(stage: Stage) -> None:
    first, second = stage.pair()
    first.write(b"".join(fragments(b"one", b"", b"x" * 70_000, b"two")))
    second.expect(b"one" + b"x" * 70_000 + b"two")


@scenario(WITH_ANY)
def pings_between_fragments(stage: Stage) -> None:
    first, second = stage.pair()
    for number, piece in enumerate(fragments(b"one", b"two", b"three")):
        first.write(frame(PING, bytes([number])) + piece + frame(PONG))
    second.expect(b"onetwothree")


@scenario(WITH_ANY)
def a_hundred_pings(stage: Stage) -> None:
    first, second = stage.pair()
    first.write(b"".join(frame(PING, bytes([number])) for number in range(100)))
    first.send(b"after them")
    second.expect(b"after them")


@scenario(WITH_ANY)
def frames_byte_by_byte(stage: Stage) -> None:
    first, second = stage.pair()
    wire = frame(PING, b"ping") + frame(BINARY, b"y" * 130) + frame(BINARY, b"z")
    for byte in wire:
        first.write(bytes([byte]))
        stage.settle()
    second.expect(b"y" * 130 + b"z")


@scenario([("ws", "tcp"), ("ws", "ws"), ("tcp", "ws")])
def ok_is_a_message_of_its_own(stage: Stage) -> None:
    first = stage.waiting("first", "a")
    second = stage.connect("second")
    second.send(stage.handshake("b"), b"hello")
    first.expect(OK + b"hello")
    second.expect(OK)
    for client in first, second:
        if isinstance(client, WebSocketClient):
            assert client.sizes[0] == len(OK), client.sizes


@scenario(WITH_ANY)
def four_mebibytes_in_messages_of_the_rust_client(stage: Stage) -> None:
    """The Rust client sends three messages for each record."""
    first, second = stage.pair()
    records = [[bytes([n]) * 4, bytes([n]) * 24, bytes([n]) * 16_400] for n in range(250)]
    sender = threading.Thread(target=first.send, args=[part for parts in records for part in parts])
    sender.start()
    second.expect(b"".join(part for parts in records for part in parts))
    sender.join()


# ---- messages of a pair in which the relays differ


@scenario(WITH_ANY)
def an_interrupted_message(stage: Stage) -> None:
    first, _ = stage.pair()
    first.write(frame(BINARY, b"x" * 100_000)[:-50_000])
    stage.settle()
    first.close()


@scenario(WITH_ANY)
def an_unfinished_message(stage: Stage) -> None:
    first, _ = stage.pair()
    first.write(frame(BINARY, b"one", final=False))
    stage.settle()


# ---- Close

CLOSES = {
    "1000": NORMAL,
    "1000 and a reason": NORMAL + "vollständig".encode(),
    "1001": struct.pack(">H", 1001),
    "1003": struct.pack(">H", 1003),
    "1011": struct.pack(">H", 1011),
    "1012": struct.pack(">H", 1012),
    "1013": struct.pack(">H", 1013),
    "1014": struct.pack(">H", 1014),
    "3000": struct.pack(">H", 3000),
    "4999 and a reason of 123 bytes": struct.pack(">H", 4999) + b"x" * 123,
    "nothing": b"",
    "one byte": b"\3",
    "0": struct.pack(">H", 0),
    "999": struct.pack(">H", 999),
    "1004": struct.pack(">H", 1004),
    "1005": struct.pack(">H", 1005),
    "1006": struct.pack(">H", 1006),
    "1015": struct.pack(">H", 1015),
    "1016": struct.pack(">H", 1016),
    "2999": struct.pack(">H", 2999),
    "5000": struct.pack(">H", 5000),
    "65535": struct.pack(">H", 65_535),
    "1000 and a reason that is not UTF-8": NORMAL + b"\xff",
    "1000 and half a UTF-8 character": NORMAL + b"\xc3",
}


def closing(payload: bytes) -> Scenario:
    def script(stage: Stage) -> None:
        first, second = stage.pair()
        websocket(first).send_last(b"last bytes", close=payload)
        second.expect(b"last bytes")
        second.expect_end()

    return Scenario(script, WITH_ANY)


SCENARIOS |= {f"Close with {what}": closing(payload) for what, payload in CLOSES.items()}


@scenario(WITH_ANY)
def data_after_a_close(stage: Stage) -> None:
    first, second = stage.pair()
    first.write(frame(BINARY, b"before") + frame(CLOSE, NORMAL))
    first.send(b"after")
    second.expect(b"before")
    second.expect_end()


@scenario(WITH_ANY)
def close_in_the_middle_of_a_message(stage: Stage) -> None:
    first, second = stage.pair()
    first.write(frame(BINARY, b"", final=False))
    first.shutdown()
    second.expect_end()


@scenario(WITH_ANY)
def pong_before_the_close(stage: Stage) -> None:
    first, second = stage.pair()
    first.write(frame(PING, b"last"))
    first.shutdown()
    second.expect_end()


@scenario(WITH_ANY)
def sending_when_its_partner_has_left(stage: Stage) -> None:
    first, second = stage.pair()
    second.close()
    stage.settle()
    for late in frame(BINARY, b"late"), frame(PING, b"late"):
        first.write(late)
        stage.settle()
    first.expect_end()


@scenario(ALONE)
def sending_after_a_bad_line(stage: Stage) -> None:
    client = stage.connect("client")
    for line in b"hello\n", stage.handshake("a"):
        client.send(line)
        stage.settle()
    client.expect(BAD)
    client.expect_end()


@scenario(ALONE)
def tcp_ends_without_a_byte(stage: Stage) -> None:
    websocket(stage.connect("client")).end_tcp()


@scenario(ALONE)
def tcp_ends_within_a_handshake(stage: Stage) -> None:
    client = websocket(stage.connect("client"))
    client.write(frame(BINARY, stage.handshake("a"))[:50])
    client.end_tcp()


@scenario(WITH_ANY)
def tcp_ends_while_waiting(stage: Stage) -> None:
    client = websocket(stage.waiting("client", "a"))
    client.end_tcp()
    stage.settle()
    stage.waiting("too late", "b")


@scenario(WITH_ANY)
def tcp_ends_after_last_bytes(stage: Stage) -> None:
    first, second = stage.pair()
    first.send(b"x" * 50_000)
    websocket(first).end_tcp()
    second.expect(b"x" * 50_000)
    second.expect_end()


# ---- invalid frames

BAD_FRAMES = {
    "text": frame(TEXT, b"hello"),
    "text that is not UTF-8": frame(TEXT, b"\xff"),
    "unmasked": frame(BINARY, b"hello", masked=False),
    "unmasked Ping": frame(PING, masked=False),
    "unmasked Close": frame(CLOSE, NORMAL, masked=False),
    "first reserved bit": frame(BINARY, b"hello", reserved=4),
    "last reserved bit": frame(BINARY, b"hello", reserved=1),
    "reserved bit of a Ping": frame(PING, reserved=4),
    "opcode 3": frame(3, b"hello"),
    "opcode 7": frame(7),
    "opcode 11": frame(11),
    "opcode 15": frame(15),
    "continuation of nothing": frame(CONTINUATION, b"hello"),
    "message within a message": frame(BINARY, final=False) + frame(BINARY, b"hello"),
    "text within a message": frame(BINARY, final=False) + frame(TEXT, b"hello"),
    "Ping in fragments": frame(PING, b"hello", final=False),
    "Close in fragments": frame(CLOSE, final=False),
    "Ping of 126 bytes": frame(PING, b"x" * 126),
    "Close of 126 bytes": frame(CLOSE, NORMAL + b"x" * 124),
    "125 bytes in 16 bits": bytes([0x82, 0xFE, 0, 125, *bytes(4), *bytes(125)]),
    "65,535 bytes in 64 bits": bytes([0x82, 0xFF, *bytes(6), 255, 255, *bytes(4)]) + bytes(65_535),
    "2^63 bytes": bytes([0x82, 0xFF, 0x80, *bytes(7), *bytes(4)]),
}


def invalid_frame(wire: bytes) -> Scenario:
    def script(stage: Stage) -> None:
        first, second = stage.pair()
        first.send(b"good so far")
        second.expect(b"good so far")
        first.write(wire)
        second.expect_end()
        first.read_to_end()

    return Scenario(script, WITH_ANY)


def invalid_frame_first(wire: bytes) -> Scenario:
    def script(stage: Stage) -> None:
        client = stage.connect("client")
        client.write(wire)
        client.read_to_end()

    return Scenario(script, ALONE)


def invalid_frame_while_waiting(wire: bytes) -> Scenario:
    def script(stage: Stage) -> None:
        client = stage.waiting("client", "a")
        client.write(wire)
        client.read_to_end()

    return Scenario(script, ALONE)


for name, wire in BAD_FRAMES.items():
    SCENARIOS[f"bad frame of a pair: {name}"] = invalid_frame(wire)
BAD_FRAMES_ELSEWHERE = ("text", "unmasked", "opcode 11")
for name in BAD_FRAMES_ELSEWHERE:
    SCENARIOS[f"bad frame at once: {name}"] = invalid_frame_first(BAD_FRAMES[name])
    SCENARIOS[f"bad frame of a waiting client: {name}"] = invalid_frame_while_waiting(
        BAD_FRAMES[name]
    )


@scenario(WITH_ANY)
def last_bytes_and_a_bad_frame(stage: Stage) -> None:
    first, second = stage.pair()
    first.write(frame(BINARY, b"x" * 50_000) + frame(3))
    second.expect(b"x" * 50_000)
    second.expect_end()
    first.read_to_end()
