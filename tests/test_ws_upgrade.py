"""The opening handshake: the answer to each request, and the answers that a client accepts.

The tests build requests without ws_frames. HttpFraming reads them, as in a relay. Numbers are
sections of RFC 6455, unless they name another RFC.
"""

from __future__ import annotations

import marshal
import tracemalloc
from collections.abc import Sequence

import pytest
from helpers import BINARY, PING, frame, handshake, parse_head, splits
from streams import FramedTransport, Room

from transit_relay import Role, State
from ws_frames import (
    CHECKED_START_BYTES,
    MAX_HEAD_BYTES,
    MAX_HEAD_LINE_BYTES,
    METHODS,
    AnswerReader,
    HttpFraming,
    Request,
    RequestReader,
    UpgradeFailed,
    UpgradeRejected,
    accept_key,
    http_answer,
    upgrade_request,
)

# 1.3.
NONCE = b"the sample nonce"
KEY = "dGhlIHNhbXBsZSBub25jZQ=="
ACCEPT = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
# Another key for the same nonce: base64 ignores its last bits. And the accept of 16 NULs.
OTHER_KEY, OTHER_ACCEPT = "dGhlIHNhbXBsZSBub25jZR==", "Zgw8jYXtqX5qJr7MJ1Q/MqzeSRI="
ACCEPT_OF_NULS = "ICX+Yqv66kxgM0FcWaLWlFLwTAI="

GET = "GET /chat?x=1 HTTP/1.1"
FIELDS = {
    "Host": "server.example.com",
    "Upgrade": "websocket",
    "Connection": "Upgrade",
    "Sec-WebSocket-Key": KEY,
    "Sec-WebSocket-Version": "13",
}


def request(line: str = GET, end: str = "\r\n", **changes: str | Sequence[str] | None) -> bytes:
    """Return an upgrade request with changed fields.

    `changes` maps the last word of a field's name to its value, to several values, or to None,
    which removes the field.
    """
    lines = [line]
    for name, value in FIELDS.items():
        value = changes.pop(name.split("-")[-1].lower(), value)
        values = [] if value is None else [value] if isinstance(value, str) else value
        lines += [f"{name}: {one}" for one in values]
    lines += [f"{name}: {value}" for name, value in changes.items()]
    return end.join([*lines, "", ""]).encode("latin-1")


def plain(line: str, *fields: str, end: str = "\r\n") -> bytes:
    """Return a request with these fields only."""
    return end.join([line, *fields, "", ""]).encode("latin-1")


def replaced(old: str, new: str) -> bytes:
    """Return an upgrade request in which `new` replaces `old`."""
    head = request()
    assert head.count(old.encode()) == 1, old
    return head.replace(old.encode(), new.encode("latin-1"))


def padded(size: int, head: bytes, end: bytes = b"\r\n\r\n") -> bytes:
    """Return `head` extended to `size` bytes with fields that are no longer than needed."""
    assert head.endswith(end)
    line_end = end[: len(end) // 2]
    fields = b""
    while missing := size - len(head) - len(fields):
        line_bytes = missing if missing <= 10_000 else 9_000
        fields += b"X: " + b"x" * (line_bytes - 3 - len(line_end)) + line_end
    return head[: -len(line_end)] + fields + line_end


def with_line(size: int, head: bytes, line_end: bytes = b"\r\n") -> bytes:
    """Return `head` with one more field, whose line has `size` bytes."""
    return head[: -len(line_end)] + b"X: " + b"x" * (size - 3 - len(line_end)) + line_end * 2


def served(pieces: Sequence[bytes]) -> tuple[str, dict[str, str], bytes]:
    """Send the pieces to a relay. Return the status, fields and body of its answer."""
    wire = Room().client(role=Role.WEBSOCKET)
    wire.feed(*pieces)
    head, blank, rest = wire.sent.partition(b"\r\n\r\n")
    assert blank, wire.sent
    status, fields = parse_head(head)
    if status == "101":
        assert wire.session.state == State.WAIT_HANDSHAKE and not wire.finished
    else:
        assert wire.session.state == State.DONE and wire.finished
    return status, fields, rest


# Requests that are upgraded.

ACCEPTED: dict[str, bytes] = {
    "the RFC's example": (
        b"GET /chat HTTP/1.1\r\nHost: server.example.com\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Origin: http://example.com\r\nSec-WebSocket-Protocol: chat, superchat\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    ),
    "plain": request(),
    "lines end with a line feed": request(end="\n"),
    "only the last line ends with a line feed": request()[:-2] + b"\n",
    "line feeds, but the last line ends with CRLF": request(end="\n")[:-1] + b"\r\n",
    "names in upper case": request().replace(b"Host", b"HOST").replace(b"Upgrade:", b"UPGRADE:"),
    "names in lower case": (
        request().replace(b"Sec-WebSocket-Key", b"sec-websocket-key").replace(b"Conn", b"conn")
    ),
    "tokens in other letter case": request(upgrade="WebSocket", connection="uPGRADE"),
    "Connection is a list": request(connection="keep-alive, Upgrade"),
    "Connection is a list without spaces": request(connection="keep-alive,Upgrade,x"),
    "Connection is a list with gaps": request(connection=", ,\tUpgrade\t ,"),
    "Connection twice": request(connection=["keep-alive", "Upgrade"]),
    "Upgrade is a list": request(upgrade="h2c, websocket"),
    "Upgrade twice": request(upgrade=["websocket", "h2c"]),
    "spaces around a value": request(version=" \t13\t ", key=f"{KEY}  "),
    "no space before a value": request().replace(b": ", b":"),
    "an empty Host": request(host=""),
    "another host": request(host="[::1]:4001"),
    "any origin": request(Origin="null"),
    "the target is absolute": request("GET http://h/ HTTP/1.1"),
    "the target is not a path": request("GET * HTTP/1.1"),
    "the target is not ASCII": request("GET /é HTTP/1.1"),
    "a value is not ASCII": request(Cookie="é\xff"),
    "an empty field": request(X=""),
    "a field name with all allowed characters": (
        request()[:-2] + b"!#$%&'*+-.^_`|~09AZaz: ~ !\"(),/:;<=>?@[\\]{}\r\n\r\n"
    ),
    "an extension": request(**{"Sec-WebSocket-Extensions": "permessage-deflate"}),
    "a key with other unused bits": request(key=OTHER_KEY),
    "32 KiB": padded(MAX_HEAD_BYTES, request()),
    "32 KiB with line feeds": padded(MAX_HEAD_BYTES, request(end="\n"), b"\n\n"),
    "a field of 16 KiB": with_line(MAX_HEAD_LINE_BYTES, request()),
    "a field of 16 KiB with line feeds": with_line(MAX_HEAD_LINE_BYTES, request(end="\n"), b"\n"),
    "a request line of 16 KiB": request("GET /" + "x" * (MAX_HEAD_LINE_BYTES - 16) + " HTTP/1.1"),
}


@pytest.mark.parametrize("head", ACCEPTED.values(), ids=ACCEPTED)
def test_upgraded_requests(head: bytes) -> None:
    """The answer has no other fields: extensions and subprotocols are declined."""
    for pieces in splits(head) if len(head) < 1000 else ends(head):
        status, fields, rest = served(pieces)
        assert (status, rest) == ("101", b""), pieces
        assert fields == {
            "upgrade": "websocket",
            "connection": "Upgrade",
            "sec-websocket-accept": OTHER_ACCEPT if OTHER_KEY.encode() in head else ACCEPT,
        }


def ends(head: bytes) -> list[list[bytes]]:
    """Cut a long head near its ends and near the limits. Also return it whole and bytewise."""
    limits = (CHECKED_START_BYTES, MAX_HEAD_LINE_BYTES, MAX_HEAD_BYTES, len(head))
    near_limits = {n for limit in limits for n in range(limit - 6, limit + 3) if n < len(head)}
    cuts = [*range(1, 30), *sorted(near_limits)]
    return [[head], *([head[:n], head[n:]] for n in cuts), [*map(bytes, zip(head))]]


def test_the_answer_to_the_example() -> None:
    """Compare with 1.3, byte for byte, without the subprotocol."""
    read = RequestReader().receive(ACCEPTED["the RFC's example"])
    assert read is not None
    assert read[0].accept() == (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    assert accept_key(KEY) == ACCEPT


def test_a_parsed_request() -> None:
    head = b"POST /a?b HTTP/1.0\r\nA: 1\r\nb:2 \r\nA:\t3, x\r\nHost: h\r\n\r\n"
    read = RequestReader().receive(memoryview(head + b"behind"))
    assert read is not None
    asked, rest = read
    assert asked == Request("POST", "/a?b", True, asked.fields) and bytes(rest) == b"behind"
    assert asked.fields == {"a": ["1", "3, x"], "b": ["2"], "host": ["h"]}
    assert asked.fields.only("host") == "h" and asked.fields.only("a") is None
    assert asked.fields.only("c") is None
    assert asked.fields.tokens("a") == {"1", "3", "x"} and asked.fields.tokens("c") == set()
    assert not asked.wants_websocket


# Requests that are not upgraded, each with the status of the answer.

REJECTED: dict[str, tuple[bytes, int]] = {
    # docs/protocol.md, "HTTP": without `Upgrade: websocket` the other fields are not checked.
    "GET": (plain("GET / HTTP/1.1", "Host: h"), 200),
    "HEAD": (plain("HEAD / HTTP/1.1", "Host: h"), 200),
    "OPTIONS": (plain("OPTIONS * HTTP/1.1", "Host: h"), 200),
    "HTTP/1.0 without Host": (plain("OPTIONS / HTTP/1.0"), 200),
    "HTTP/1.1 without Host": (plain("GET / HTTP/1.1"), 200),
    "Host twice": (plain("GET / HTTP/1.1", "Host: a", "Host: b"), 200),
    "line feeds": (plain("HEAD / HTTP/1.0", end="\n"), 200),
    "another upgrade": (request(upgrade="h2c"), 200),
    "no upgrade, and other fields are bad": (
        request(upgrade=None, version="8", key="?", host=None),
        200,
    ),
    "websocket13": (request(upgrade="websocket13"), 200),
    "an empty Upgrade": (request(upgrade=""), 200),
    "no Upgrade, but Connection": (request(upgrade=None), 200),
    "POST": (plain("POST / HTTP/1.1", "Host: h"), 405),
    "PUT": (plain("PUT / HTTP/1.0"), 405),
    "DELETE": (plain("DELETE / HTTP/1.1"), 405),
    "TRACE": (plain("TRACE / HTTP/1.1"), 405),
    "CONNECT": (plain("CONNECT h:443 HTTP/1.1", "Host: h:443"), 405),
    "get": (plain("get / HTTP/1.1"), 405),
    "an unknown method": (plain("G!T / HTTP/1.1"), 405),
    # Another version.
    "version 8": (request(version="8"), 426),
    "version 14": (request(version="14"), 426),
    "version 13 in a list": (request(version="13, 8"), 426),
    "version 013": (request(version="013"), 426),
    "an empty version": (request(version=""), 426),
    "a good and a bad version": (request(version=["13", "8"]), 426),
    "a bad and a good version": (request(version=["8", "13"]), 426),
    "version 8 among other mistakes": (
        request("GET / HTTP/1.0", version="8", host=None, key="x"),
        426,
    ),
    "version 8 by POST": (request("POST / HTTP/1.1", version="8"), 426),
    "version 8 by HEAD": (request("HEAD / HTTP/1.1", version="8"), 426),
    # 4.2.1: an upgrade needs GET.
    "upgrade by HEAD": (request("HEAD / HTTP/1.1"), 405),
    "upgrade by POST": (request("POST / HTTP/1.1"), 405),
    "upgrade by OPTIONS": (request("OPTIONS / HTTP/1.1"), 405),
    "upgrade by get": (request("get / HTTP/1.1"), 405),
    "upgrade by POST, without a key": (request("POST / HTTP/1.0", key=None, host=None), 405),
    # 4.2.1: the other points.
    "upgrade in HTTP/1.0": (request("GET / HTTP/1.0"), 400),
    "no Host": (request(host=None), 400),
    "two Hosts": (request(host=["a", "a"]), 400),
    "no Connection": (request(connection=None), 400),
    "Connection: close": (request(connection="close"), 400),
    "Connection: upgraded": (request(connection="upgraded"), 400),
    "Connection: Upgrade;": (request(connection="Upgrade;"), 400),
    "no key": (request(key=None), 400),
    "an empty key": (request(key=""), 400),
    "two keys": (request(key=[KEY, KEY]), 400),
    "a key of 15 bytes": (request(key="dGhlIHNhbXBsZSBub25j"), 400),
    "a key of 15 bytes, padded": (request(key="dGhlIHNhbXBsZSBub24="), 400),
    "a key of 17 bytes": (request(key="dGhlIHNhbXBsZSBub25jZXM="), 400),
    "a key without padding": (request(key=KEY[:-2]), 400),
    "a key with too much padding": (request(key=KEY + "="), 400),
    "a key with a space": (request(key="dGhlIHNhbXBs ZSBub25jZ=="), 400),
    "a key in the URL alphabet": (request(key="-_hlIHNhbXBsZSBub25jZQ=="), 400),
    "a key that is not ASCII": (request(key="éGhlIHNhbXBsZSBub25jZQ=="), 400),
    "no version": (request(version=None), 400),
    "version 13 twice": (request(version=["13", "13"]), 400),
    # Not HTTP.
    "only an empty line": (b"\r\n\r\n", 400),
    "an empty line first": (b"\r\n" + request(), 400),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "HTTP/1.2": (plain("GET / HTTP/1.2"), 400),
    "HTTP/2.0": (plain("PRI * HTTP/2.0"), 400),
    "http/1.1": (plain("GET / http/1.1"), 400),
    "HTTP/1.1x": (plain("GET / HTTP/1.1x"), 400),
    "HTTP/11": (plain("GET / HTTP/11"), 400),
    "a space behind the line": (plain("GET / HTTP/1.1 "), 400),
    "a space before the line": (plain(" GET / HTTP/1.1"), 400),
    "two spaces": (plain("GET  / HTTP/1.1"), 400),
    "two spaces behind the target": (plain("GET /  HTTP/1.1"), 400),
    "a tab": (plain("GET\t/ HTTP/1.1"), 400),
    "no target": (plain("GET HTTP/1.1"), 400),
    "an empty target": (plain("GET  HTTP/1.1"), 400),
    "a space in the target": (plain("GET /a b HTTP/1.1"), 400),
    "NUL in the target": (plain("GET /\0 HTTP/1.1"), 400),
    "DEL in the target": (plain("GET /\x7f HTTP/1.1"), 400),
    "a carriage return in the target": (plain("GET /\r HTTP/1.1"), 400),
    "two carriage returns": (plain("GET / HTTP/1.1\r"), 400),
    "a method that is not ASCII": (plain("GÉT / HTTP/1.1"), 400),
    "a separator in the method": (plain("GET: / HTTP/1.1"), 400),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "a malformed handshake": (b"Please relay " + b"0" * 64 + b"\n", 400),
    "obsolete folding": (replaced("example.com\r\n", "example.com\r\n more\r\n"), 400),
    "obsolete folding with a tab": (replaced("example.com\r\n", "example.com\r\n\tmore\r\n"), 400),
    "folding in the first field": (replaced("HTTP/1.1\r\n", "HTTP/1.1\r\n X: x\r\n"), 400),
    "a space before the colon": (replaced("Host:", "Host :"), 400),
    "a tab before the colon": (replaced("Host:", "Host\t:"), 400),
    "no colon": (replaced("Host:", "Host"), 400),
    "no name": (replaced("Host:", ":"), 400),
    "a space in a name": (replaced("Host:", "Ho st:"), 400),
    "a name that is not ASCII": (replaced("Host:", "Hóst:"), 400),
    "NUL in a value": (replaced("example", "exa\0mple"), 400),
    "DEL in a value": (replaced("example", "exa\x7fmple"), 400),
    "a carriage return in a value": (replaced("example", "exa\rmple"), 400),
    "two carriage returns in a field": (replaced("example.com\r", "example.com\r\r"), 400),
    "a malformed field without an upgrade": (plain("GET / HTTP/1.1", "Host : h"), 400),
    "a malformed field of a HEAD": (plain("HEAD / HTTP/1.1", "Host : h"), 400),
    # Too long, some by one byte.
    "32,769 bytes": (padded(MAX_HEAD_BYTES + 1, request()), 431),
    "32,769 bytes with line feeds": (padded(MAX_HEAD_BYTES + 1, request(end="\n"), b"\n\n"), 431),
    "32,769 bytes without an upgrade": (padded(MAX_HEAD_BYTES + 1, plain(GET, "Host: h")), 431),
    "32,769 bytes of another version": (padded(MAX_HEAD_BYTES + 1, request(version="8")), 431),
    "no end": (padded(MAX_HEAD_BYTES + 10, request())[:-4], 431),
    "no end of a HEAD": (padded(MAX_HEAD_BYTES + 10, plain("HEAD / HTTP/1.1"))[:-4], 431),
    "a field of 16 KiB and a byte": (with_line(MAX_HEAD_LINE_BYTES + 1, request()), 431),
    "a long field with a line feed": (
        with_line(MAX_HEAD_LINE_BYTES + 1, request(end="\n"), b"\n"),
        431,
    ),
    "a long field of a HEAD": (with_line(MAX_HEAD_LINE_BYTES + 1, plain("HEAD / HTTP/1.1")), 431),
    "a long field before a malformed one": (
        with_line(MAX_HEAD_LINE_BYTES + 1, request())[:-2] + b"X\r\n\r\n",
        431,
    ),
    "a request line of 16 KiB and a byte": (plain("GET /" + "x" * 16_369 + " HTTP/1.1"), 431),
    "a long line that is no request line": (plain("GET /" + "x" * 20_000 + " HTTP/3"), 431),
    "a malformed request line before a long field": (
        with_line(MAX_HEAD_LINE_BYTES + 1, plain("GET / HTTP/1.2")),
        400,
    ),
    "a request line that is malformed far behind": (
        plain("GET /" + "x" * 9000 + "\1 HTTP/1.1"),
        400,
    ),
    "no end of the first line": (b"GET /" + b"x" * 17_000, 431),
    "no end of the first word": (b"x" * 17_000, 431),
    "no end of a line that is malformed far behind": (b"GET /" + b"x" * 9000 + b"\1" * 9000, 431),
}


@pytest.mark.parametrize(("head", "status"), REJECTED.values(), ids=REJECTED)
def test_rejected_requests(head: bytes, status: int) -> None:
    """Every split gets the same answer. Bytes behind the head are ignored."""
    behind = b"" if status == 431 else frame(BINARY, handshake())
    whole = None
    for pieces in splits(head + behind) if len(head) < 1000 else ends(head):
        answer = served(pieces)
        assert answer[0] == str(status), pieces
        whole = whole or answer
        assert answer == whole, pieces
    assert whole is not None
    _, fields, body = whole
    assert fields.pop("connection") == "close"
    assert fields.pop("content-type") == "text/plain; charset=utf-8"
    length = int(fields.pop("content-length"))
    if head.startswith(b"HEAD "):
        assert body == b"" and length > 0
    else:
        assert len(body) == length and body.endswith(b"\n")
    assert fields == {
        405: {"allow": "GET, HEAD, OPTIONS"},
        426: {"upgrade": "websocket", "sec-websocket-version": "13"},
    }.get(status, {})


@pytest.mark.parametrize(("head", "status"), REJECTED.values(), ids=REJECTED)
def test_the_error_of_a_rejected_request(head: bytes, status: int) -> None:
    """UpgradeRejected has the status and the answer. No other error is raised."""
    try:
        read = RequestReader().receive(head)
        assert read is not None
        if read[0].wants_websocket:
            read[0].accept()
            raise AssertionError("accepted")
    except UpgradeRejected as refusal:
        assert refusal.status == status and str(refusal)
        assert refusal.answer().startswith(b"HTTP/1.1 %d " % status)
    else:
        assert status in (200, 405) and not read[0].wants_websocket


def test_the_answer_to_head() -> None:
    """It has the fields of the answer to GET, and no body."""
    answers = [served([plain(f"{method} / HTTP/1.1")]) for method in ("GET", "HEAD")]
    assert answers[0][1] == answers[1][1] and answers[0][2] and not answers[1][2]
    assert http_answer(200, "é\n").endswith(
        b"Content-Length: 3\r\nConnection: close\r\n\r\n\xc3\xa9\n"
    )
    assert METHODS == ("GET", "HEAD", "OPTIONS")


# Junk that is refused at once. In each row only the last byte is wrong.

JUNK = {
    "TLS": b"\x16",
    "a line feed": b"\n",
    "a carriage return": b"\r",
    "a space": b" ",
    "NUL in a method": b"GET\0",
    "a separator in a method": b"GET/",
    "a line of one word": b"junk\n",
    "a control character in a target": b"GET \x01",
    "a line without a version": b"GET /\n",
    "NUL in the version": b"GET / H\0",
    "a third space": b"GET / HTTP/1.1 ",
    "a carriage return without a line feed": b"GET / HTTP/1.1\rx",
    "an unknown version": b"GET / HTTP/1.2\r\n",
}


@pytest.mark.parametrize("junk", JUNK.values(), ids=JUNK)
def test_junk_is_refused_at_once(junk: bytes) -> None:
    for pieces in splits(junk):
        reader = RequestReader()
        for piece in pieces[:-1]:
            assert reader.receive(piece) is None, pieces
        with pytest.raises(UpgradeRejected) as caught:
            reader.receive(pieces[-1])
        assert caught.value.status == 400
    for behind in (b"x", b"\r\n\r\n", b"x" * MAX_HEAD_BYTES):
        with pytest.raises(UpgradeRejected) as caught:
            RequestReader().receive(junk + behind)
        assert caught.value.status == 400


def receive_bytewise(reader: RequestReader | AnswerReader, data: bytes) -> None:
    """Pass all of `data` to the reader, which must not find the end of a head."""
    for n in range(len(data)):
        assert reader.receive(data[n : n + 1]) is None, n


@pytest.mark.parametrize(
    ("head", "limit"),
    [
        (padded(MAX_HEAD_BYTES + 10, request()), MAX_HEAD_BYTES),
        (with_line(MAX_HEAD_LINE_BYTES + 10, request()), len(request()) - 2 + MAX_HEAD_LINE_BYTES),
        (b"GET /" + b"x" * MAX_HEAD_LINE_BYTES, MAX_HEAD_LINE_BYTES),
        (b"x" * MAX_HEAD_LINE_BYTES, MAX_HEAD_LINE_BYTES),
    ],
    ids=["head", "field", "request line", "first word"],
)
def test_a_head_is_refused_at_its_limit_and_not_before(head: bytes, limit: int) -> None:
    reader = RequestReader()
    receive_bytewise(reader, head[: limit - 1])
    for refused in (reader, RequestReader()):
        data = head[limit - 1 : limit] if refused is reader else head[:limit]
        with pytest.raises(UpgradeRejected) as caught:
            refused.receive(data)
        assert caught.value.status == 431
    assert RequestReader().receive(head[: limit - 1]) is None


def test_the_start_of_a_request_line_is_checked_and_the_rest_at_its_end() -> None:
    line = b"GET /" + b"x" * (CHECKED_START_BYTES - 6)
    with pytest.raises(UpgradeRejected):
        RequestReader().receive(line + b"\0")
    reader = RequestReader()
    receive_bytewise(reader, line + b"x\0" + b"x" * 1000)
    with pytest.raises(UpgradeRejected) as caught:
        reader.receive(b"\n")
    assert caught.value.status == 400


def test_a_head_takes_bounded_memory_however_it_is_cut() -> None:
    head = padded(MAX_HEAD_BYTES + 10, request())
    for size in (1, 1000, len(head)):
        pieces = [head[n : n + size] for n in range(0, len(head), size)] + [b"x" * (1 << 20)]
        reader = RequestReader()
        tracemalloc.start()
        try:
            with pytest.raises(UpgradeRejected):
                for piece in pieces:
                    reader.receive(piece)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert len(reader.place()["_head"]) == MAX_HEAD_BYTES  # type: ignore[arg-type]
        assert peak < 4 * MAX_HEAD_BYTES


class Spans(bytearray):
    """A head that counts the bytes in which a line feed is searched."""

    searched_bytes = 0

    def find(self, sub: object, start: object = 0, end: object = None) -> int:
        assert isinstance(sub, bytes) and isinstance(start, int)
        stop = len(self) if end is None else end
        assert isinstance(stop, int)
        found = bytearray.find(self, sub, start, stop)
        self.searched_bytes += (min(len(self), stop) if found < 0 else found + 1) - start
        return found


def test_the_work_for_a_head_is_linear() -> None:
    """Each byte is searched twice at most when a head comes byte by byte."""
    reader = RequestReader()
    reader._head = head = Spans()
    receive_bytewise(
        reader, padded(MAX_HEAD_BYTES, request("GET /" + "x" * 16_000 + " HTTP/1.1"))[:-1]
    )
    assert reader._head is head and len(head) == MAX_HEAD_BYTES - 1
    assert 0 < head.searched_bytes <= 2 * MAX_HEAD_BYTES


@pytest.mark.parametrize(
    "head",
    [request(), request(end="\n"), padded(MAX_HEAD_BYTES, request())],
    ids=["short", "with line feeds", "32 KiB"],
)
def test_bytes_behind_the_head_are_returned(head: bytes) -> None:
    behind = b"\r\n\x82\x80" + bytes(range(256)) * 40
    for cut in (*range(len(head) - 3, len(head) + 4), len(head) + 9000):
        reader = RequestReader()
        rests = []
        for piece in ((head + behind)[:cut], (head + behind)[cut:]):
            read = reader.receive(memoryview(piece)) if not rests else (None, piece)
            if read is not None:
                rests.append(bytes(read[1]))
        assert b"".join(rests) == behind, cut


# The carried state of a reader.


HEADS = [
    *ACCEPTED.items(),
    *((name, row[0]) for name, row in REJECTED.items()),
    *((f"junk: {name}", junk) for name, junk in JUNK.items()),
]


@pytest.mark.parametrize(
    "head", [pytest.param(head, id=name) for name, head in HEADS if len(head) < 1000]
)
def test_another_reader_resumes_anywhere(head: bytes) -> None:
    """The result is the same if the state is carried to a new reader after each byte."""

    def outcome(is_carried: bool) -> tuple[object, ...]:
        reader = RequestReader()
        for n in range(len(head)):
            try:
                read = reader.receive(head[n : n + 1])
            except UpgradeRejected as refusal:
                return n, refusal.status, refusal.answer()
            if read is not None:
                return n, *read
            if is_carried:
                place = dict(reader.place())
                line_start = head.rfind(b"\n", 0, n + 1) + 1
                assert place == {"_head": head[: n + 1], "_line_start": line_start}
                reader = RequestReader()
                reader.resume(marshal.loads(marshal.dumps(place)))
        return (None,)

    assert outcome(True) == outcome(False)


def test_a_long_head_is_carried_too() -> None:
    for size, is_read in ((MAX_HEAD_BYTES, True), (MAX_HEAD_BYTES + 1, False)):
        head = padded(size, request())
        for cut in (1, 500, 20_000, MAX_HEAD_BYTES - 2, MAX_HEAD_BYTES - 1):
            reader, other = RequestReader(), RequestReader()
            assert reader.receive(head[:cut]) is None
            other.resume(reader.place())
            try:
                assert (other.receive(head[cut:]) is not None) == is_read
            except UpgradeRejected as refusal:
                assert refusal.status == 431 and not is_read


@pytest.mark.parametrize(
    "reader", [RequestReader(), AnswerReader(NONCE)], ids=["request", "answer"]
)
def test_carried_fields(reader: RequestReader | AnswerReader) -> None:
    """They are all slots. A missing field keeps its value; an unknown one is refused."""
    slots = [name for cls in type(reader).__mro__ for name in getattr(cls, "__slots__", ())]
    assert sorted(set(slots)) == sorted(reader.CARRIED) == sorted(reader.place())
    assert all(isinstance(value, (bytes, int)) for value in reader.place().values())
    before = dict(reader.place())
    reader.resume({"_line_start": 7})
    assert reader.place() == {**before, "_line_start": 7}
    with pytest.raises(ValueError, match="_unknown"):
        reader.resume({"_line_start": 8, "_unknown": 1})
    assert reader.place() == {**before, "_line_start": 7}


# The client's side.


def answer(
    line: str = "HTTP/1.1 101 Switching Protocols",
    upgrade: str | None = "websocket",
    connection: str | None = "Upgrade",
    accept: str | None = ACCEPT,
    *fields: str,
    end: str = "\r\n",
) -> bytes:
    """Return a server's answer to the request with NONCE."""
    named = {"Upgrade": upgrade, "Connection": connection, "Sec-WebSocket-Accept": accept}
    lines = [f"{name}: {value}" for name, value in named.items() if value is not None]
    return end.join([line, *lines, *fields, "", ""]).encode("latin-1")


GOOD_ANSWERS: dict[str, bytes] = {
    "plain": answer(),
    "line feeds": answer(end="\n"),
    "another reason": answer("HTTP/1.1 101 Web Socket Protocol Handshake"),
    "no reason": answer("HTTP/1.1 101 "),
    "no reason and no space": answer("HTTP/1.1 101"),
    "other letter case": answer(upgrade="WEBSOCKET", connection="upgrade"),
    "names in lower case": answer().replace(b"Sec-WebSocket-Accept", b"sec-websocket-accept"),
    "Connection is a list": answer(connection="keep-alive, Upgrade"),
    "spaces": answer(accept=f" {ACCEPT}\t"),
    "other fields": answer(
        "HTTP/1.1 101 ok", "websocket", "Upgrade", ACCEPT, "Server: x", "Date: y"
    ),
}

# The points of 4.1 that a client must check in the answer.
BAD_ANSWERS: dict[str, bytes] = {
    "1: 200": answer("HTTP/1.1 200 OK"),
    "1: 100": answer("HTTP/1.1 100 Continue"),
    "1: 102": answer("HTTP/1.1 102 Processing"),
    "1: 426": answer("HTTP/1.1 426 Upgrade Required"),
    "1: 1010": answer("HTTP/1.1 1010 ?"),
    "1: 101 in HTTP/2": answer("HTTP/2 101 ?"),
    "1: no HTTP": b"bad handshake\n\n",
    "1: nothing": b"\r\n\r\n",
    "1: a bad field": answer("HTTP/1.1 101 ?", "websocket", "Upgrade", ACCEPT, "X : y"),
    "1: a folded field": answer("HTTP/1.1 101 ?", "websocket", "Upgrade", ACCEPT, "X: y", " z"),
    "2: no Upgrade": answer(upgrade=None),
    "2: an empty Upgrade": answer(upgrade=""),
    "2: another Upgrade": answer(upgrade="h2c"),
    "2: a list": answer(upgrade="websocket, h2c"),
    "3: no Connection": answer(connection=None),
    "3: another Connection": answer(connection="close"),
    "4: no Accept": answer(accept=None),
    "4: an empty Accept": answer(accept=""),
    "4: the one for another key": answer(accept=ACCEPT_OF_NULS),
    "4: in other letter case": answer(accept=ACCEPT.lower()),
    "4: our key": answer(accept=KEY),
    "4: twice": answer(
        "HTTP/1.1 101 ?", "websocket", "Upgrade", ACCEPT, f"Sec-WebSocket-Accept: {ACCEPT}"
    ),
    "5: an extension": answer(
        "HTTP/1.1 101 ?", "websocket", "Upgrade", ACCEPT, "Sec-WebSocket-Extensions: x"
    ),
    "6: a subprotocol": answer(
        "HTTP/1.1 101 ?", "websocket", "Upgrade", ACCEPT, "Sec-WebSocket-Protocol: x"
    ),
    "32,769 bytes": padded(MAX_HEAD_BYTES + 1, answer()),
    "no end": padded(MAX_HEAD_BYTES + 10, answer())[:-4],
    "a field of 16 KiB and a byte": with_line(MAX_HEAD_LINE_BYTES + 1, answer()),
    "no end of the first line": b"HTTP/1.1 101 " + b"x" * MAX_HEAD_LINE_BYTES,
}


def take(pieces: Sequence[bytes], is_carried: bool = False) -> bytes | None:
    """Return the bytes behind the answer, or None if the answer is not whole."""
    reader = AnswerReader(NONCE)
    found: bytes | None = None
    for piece in pieces:
        if found is not None:
            found += piece
            continue
        rest = reader.receive(memoryview(piece))
        found = None if rest is None else bytes(rest)
        if is_carried:
            place = marshal.loads(marshal.dumps(dict(reader.place())))
            reader = AnswerReader(b"?" * 16)  # `resume` sets the nonce too
            reader.resume(place)
    return found


def test_a_clients_request() -> None:
    """Check 4.1, and that our own server accepts the request."""
    head = upgrade_request("relay.example:4001", "/v1?x", NONCE)
    line, *fields = head.decode("ascii").split("\r\n")
    assert line == "GET /v1?x HTTP/1.1"
    assert sorted(fields) == sorted(
        [f"{name}: {value}" for name, value in FIELDS.items() if name != "Host"]
        + ["Host: relay.example:4001", "", ""]
    )
    for pieces in splits(head):
        assert served(pieces)[0] == "101"


@pytest.mark.parametrize("nonce", [NONCE, bytes(16), b"\xff" * 16, bytes(range(240, 256))])
def test_both_sides_agree(nonce: bytes) -> None:
    read = RequestReader().receive(upgrade_request("h", "/", nonce))
    assert read is not None
    head = read[0].accept()
    rest = AnswerReader(nonce).receive(head + b"behind")
    assert rest is not None and bytes(rest) == b"behind"
    with pytest.raises(UpgradeFailed):
        AnswerReader(nonce[::-1] + b"?").receive(head)


@pytest.mark.parametrize("head", GOOD_ANSWERS.values(), ids=GOOD_ANSWERS)
@pytest.mark.parametrize(
    "behind",
    [b"", frame(PING, b"p", key=None), b"\r\n\r\n"],
    ids=["nothing", "a frame", "empty lines"],
)
def test_good_answers(head: bytes, behind: bytes) -> None:
    for pieces in splits(head + behind):
        assert take(pieces) == behind, pieces
    assert take([head[:-1]]) is None
    assert take([*map(bytes, zip(head + behind))], is_carried=True) == behind


@pytest.mark.parametrize("head", BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_bad_answers(head: bytes) -> None:
    for pieces in splits(head + b"behind") if len(head) < 1000 else ends(head):
        with pytest.raises(UpgradeFailed):
            take(pieces)
    if len(head) < 1000:
        assert take([head[:-1]]) is None
        with pytest.raises(UpgradeFailed):
            take([*map(bytes, zip(head))], is_carried=True)


@pytest.mark.parametrize(
    "head",
    [padded(MAX_HEAD_BYTES, answer()), with_line(MAX_HEAD_LINE_BYTES, answer())],
    ids=["head", "line"],
)
def test_the_longest_answers(head: bytes) -> None:
    for pieces in ends(head):
        assert take(pieces) == b""
    assert take([head + b"x" * 9000]) == b"x" * 9000


@pytest.mark.parametrize(("head", "status"), REJECTED.values(), ids=REJECTED)
def test_a_client_reports_the_status(head: bytes, status: int) -> None:
    """The relay's answer to a rejected request is a whole head that is no upgrade."""
    wire: FramedTransport = Room().client(role=Role.WEBSOCKET)
    wire.feed(head)
    with pytest.raises(UpgradeFailed, match=f"the answer is {status}"):
        take([wire.sent])


def test_a_head_is_read_by_http_framing_until_it_is_whole() -> None:
    wire = Room().client(role=Role.WEBSOCKET)
    wire.feed(request()[:-1])
    assert type(wire.framing) is HttpFraming and wire.session.state == State.WAIT_UPGRADE
