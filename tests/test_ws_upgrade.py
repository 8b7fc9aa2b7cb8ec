"""The opening handshake: which request gets which answer, and which answer a client takes.

A request is put together here and not by ws_frames, and read through HttpFraming, as a relay
does. Numbers are sections of RFC 6455, unless they say otherwise.
"""

from __future__ import annotations

import marshal
from collections.abc import Sequence

import pytest
from helpers import BINARY, PING, frame, handshake, parse_head, splits
from streams import FramedTransport, Room

from transit_relay import HttpFraming, Role, State
from ws_frames import (
    METHODS,
    AnswerReader,
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
# Not 1.3: a key of the same nonce, as its last bits stand for nothing; and that of 16 NULs.
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
    """An upgrade, with other values for some fields: several, or None to leave it out.

    Fields are named without their hyphens and without `Sec-WebSocket-`.
    """
    lines = [line]
    for name, value in FIELDS.items():
        value = changes.pop(name.split("-")[-1].lower(), value)
        values = [] if value is None else [value] if isinstance(value, str) else value
        lines += [f"{name}: {one}" for one in values]
    lines += [f"{name}: {value}" for name, value in changes.items()]
    return end.join([*lines, "", ""]).encode("latin-1")


def plain(line: str, *fields: str, end: str = "\r\n") -> bytes:
    """A request with these fields alone."""
    return end.join([line, *fields, "", ""]).encode("latin-1")


def respelled(old: str, new: str) -> bytes:
    """An upgrade with other bytes somewhere."""
    head = request()
    assert head.count(old.encode()) == 1, old
    return head.replace(old.encode(), new.encode("latin-1"))


def padded(size: int, head: bytes, end: bytes = b"\r\n\r\n") -> bytes:
    """A head that a last field makes so long."""
    assert head.endswith(end)
    start = head[: -(len(end) // 2)] + b"X: "
    return start + b"x" * (size - len(start) - len(end)) + end


def served(pieces: Sequence[bytes]) -> tuple[str, dict[str, str], bytes]:
    """What a relay answers to who sends them: status, fields, and what came behind the head."""
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


# What is upgraded.

ACCEPTED: dict[str, bytes] = {
    "the RFC's example": (
        b"GET /chat HTTP/1.1\r\nHost: server.example.com\r\nUpgrade: websocket\r\n"
        b"Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
        b"Origin: http://example.com\r\nSec-WebSocket-Protocol: chat, superchat\r\n"
        b"Sec-WebSocket-Version: 13\r\n\r\n"
    ),
    "as it is": request(),
    "lines end with a line feed": request(end="\n"),
    "the head alone ends with a line feed": request()[:-2] + b"\n",
    "a line feed, then the usual end": request(end="\n")[:-1] + b"\r\n",
    "names in upper case": request().replace(b"Host", b"HOST").replace(b"Upgrade:", b"UPGRADE:"),
    "names in lower case": (
        request().replace(b"Sec-WebSocket-Key", b"sec-websocket-key").replace(b"Conn", b"conn")
    ),
    "tokens in other case": request(upgrade="WebSocket", connection="uPGRADE"),
    "Connection is a list": request(connection="keep-alive, Upgrade"),
    "Connection is a list without spaces": request(connection="keep-alive,Upgrade,x"),
    "Connection is a list with gaps": request(connection=", ,\tUpgrade\t ,"),
    "Connection twice": request(connection=["keep-alive", "Upgrade"]),
    "Upgrade is a list": request(upgrade="h2c, websocket"),
    "Upgrade twice": request(upgrade=["websocket", "h2c"]),
    "spaces around a value": request(version=" \t13\t ", key=f"{KEY}  "),
    "no space before a value": request().replace(b": ", b":"),
    "no host, but its field": request(host=""),
    "another host": request(host="[::1]:4001"),
    "any origin": request(Origin="null"),
    "the target is absolute": request("GET http://h/ HTTP/1.1"),
    "the target is no path": request("GET * HTTP/1.1"),
    "the target is not ASCII": request("GET /é HTTP/1.1"),
    "a value is not ASCII": request(Cookie="é\xff"),
    "an empty field": request(X=""),
    "a field with all signs that a name may have": (
        request()[:-2] + b"!#$%&'*+-.^_`|~09AZaz: ~ !\"(),/:;<=>?@[\\]{}\r\n\r\n"
    ),
    "an extension": request(**{"Sec-WebSocket-Extensions": "permessage-deflate"}),
    "a key whose last bits are lost": request(key=OTHER_KEY),
    "8,192 bytes": padded(8192, request()),
    "8,192 bytes with line feeds": padded(8192, request(end="\n"), b"\n\n"),
}


@pytest.mark.parametrize("head", ACCEPTED.values(), ids=ACCEPTED)
def test_what_is_upgraded(head: bytes) -> None:
    """Nothing is taken up that was offered beyond the protocol."""
    for pieces in splits(head) if len(head) < 8000 else ends(head):
        status, fields, rest = served(pieces)
        assert (status, rest) == ("101", b""), pieces
        assert fields == {
            "upgrade": "websocket",
            "connection": "Upgrade",
            "sec-websocket-accept": OTHER_ACCEPT if OTHER_KEY.encode() in head else ACCEPT,
        }


def ends(head: bytes) -> list[list[bytes]]:
    """Ways of cutting a long head: whole, near its ends, and into bytes where it is decided."""
    cuts = [*range(1, 30), *range(len(head) - 6, len(head))]
    return [[head], *([head[:n], head[n:]] for n in cuts), [*map(bytes, zip(head))]]


def test_the_answer_to_the_example() -> None:
    """1.3, byte for byte but for what our answer leaves out."""
    read = RequestReader().receive(ACCEPTED["the RFC's example"])
    assert read is not None
    assert read[0].accept() == (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
    )
    assert accept_key(KEY) == ACCEPT


def test_a_request_says_what_is_in_it() -> None:
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


# What is not. A row: the request, and HTTP's status.

REJECTED: dict[str, tuple[bytes, int]] = {
    # Of PROTOCOL.md, section 2: whoever asks for no upgrade is judged no further.
    "GET": (plain("GET / HTTP/1.1", "Host: h"), 200),
    "HEAD": (plain("HEAD / HTTP/1.1", "Host: h"), 200),
    "OPTIONS": (plain("OPTIONS * HTTP/1.1", "Host: h"), 200),
    "HTTP/1.0 without Host": (plain("OPTIONS / HTTP/1.0"), 200),
    "HTTP/1.1 without Host": (plain("GET / HTTP/1.1"), 200),
    "Host twice": (plain("GET / HTTP/1.1", "Host: a", "Host: b"), 200),
    "line feeds": (plain("HEAD / HTTP/1.0", end="\n"), 200),
    "another upgrade": (request(upgrade="h2c"), 200),
    "no upgrade, whatever else": (request(upgrade=None, version="8", key="?", host=None), 200),
    "websocket13": (request(upgrade="websocket13"), 200),
    "an empty Upgrade": (request(upgrade=""), 200),
    "no Upgrade, but Connection": (request(upgrade=None), 200),
    "POST": (plain("POST / HTTP/1.1", "Host: h"), 405),
    "PUT": (plain("PUT / HTTP/1.0"), 405),
    "DELETE": (plain("DELETE / HTTP/1.1"), 405),
    "TRACE": (plain("TRACE / HTTP/1.1"), 405),
    "CONNECT": (plain("CONNECT h:443 HTTP/1.1", "Host: h:443"), 405),
    "get": (plain("get / HTTP/1.1"), 405),
    "a method that is none": (plain("G!T / HTTP/1.1"), 405),
    # Another version.
    "version 8": (request(version="8"), 426),
    "version 14": (request(version="14"), 426),
    "version 13 and more": (request(version="13, 8"), 426),
    "version 013": (request(version="013"), 426),
    "an empty version": (request(version=""), 426),
    "a good and a bad version": (request(version=["13", "8"]), 426),
    "a bad and a good version": (request(version=["8", "13"]), 426),
    "version 8 and much else": (request("GET / HTTP/1.0", version="8", host=None, key="x"), 426),
    "version 8 by POST": (request("POST / HTTP/1.1", version="8"), 426),
    "version 8 by HEAD": (request("HEAD / HTTP/1.1", version="8"), 426),
    # 4.2.1: an upgrade by another method ...
    "upgrade by HEAD": (request("HEAD / HTTP/1.1"), 405),
    "upgrade by POST": (request("POST / HTTP/1.1"), 405),
    "upgrade by OPTIONS": (request("OPTIONS / HTTP/1.1"), 405),
    "upgrade by get": (request("get / HTTP/1.1"), 405),
    "upgrade by POST, without a key": (request("POST / HTTP/1.0", key=None, host=None), 405),
    # ... and all else.
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
    "a key of 15 bytes, filled up": (request(key="dGhlIHNhbXBsZSBub24="), 400),
    "a key of 17 bytes": (request(key="dGhlIHNhbXBsZSBub25jZXM="), 400),
    "a key without its filling": (request(key=KEY[:-2]), 400),
    "a key with more filling": (request(key=KEY + "="), 400),
    "a key with a space": (request(key="dGhlIHNhbXBs ZSBub25jZ=="), 400),
    "a key for an URL": (request(key="-_hlIHNhbXBsZSBub25jZQ=="), 400),
    "a key that is not ASCII": (request(key="éGhlIHNhbXBsZSBub25jZQ=="), 400),
    "no version": (request(version=None), 400),
    "version 13 twice": (request(version=["13", "13"]), 400),
    # Not HTTP.
    "nothing but an end": (b"\r\n\r\n", 400),
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
    "a handshake that is none": (b"Please relay " + b"0" * 64 + b"\n", 400),
    "obsolete folding": (respelled("example.com\r\n", "example.com\r\n more\r\n"), 400),
    "obsolete folding with a tab": (respelled("example.com\r\n", "example.com\r\n\tmore\r\n"), 400),
    "folding at once": (respelled("HTTP/1.1\r\n", "HTTP/1.1\r\n X: x\r\n"), 400),
    "a space before the colon": (respelled("Host:", "Host :"), 400),
    "a tab before the colon": (respelled("Host:", "Host\t:"), 400),
    "no colon": (respelled("Host:", "Host"), 400),
    "no name": (respelled("Host:", ":"), 400),
    "a space in a name": (respelled("Host:", "Ho st:"), 400),
    "a name that is not ASCII": (respelled("Host:", "Hóst:"), 400),
    "NUL in a value": (respelled("example", "exa\0mple"), 400),
    "DEL in a value": (respelled("example", "exa\x7fmple"), 400),
    "a carriage return in a value": (respelled("example", "exa\rmple"), 400),
    "a carriage return more": (respelled("example.com\r", "example.com\r\r"), 400),
    "a bad field of who wants no upgrade": (plain("GET / HTTP/1.1", "Host : h"), 400),
    "a bad field of a HEAD": (plain("HEAD / HTTP/1.1", "Host : h"), 400),
    # Too long, if only by one byte.
    "8,193 bytes": (padded(8193, request()), 431),
    "8,193 bytes with line feeds": (padded(8193, request(end="\n"), b"\n\n"), 431),
    "8,193 bytes of who wants no upgrade": (padded(8193, plain(GET, "Host: h")), 431),
    "8,193 bytes of another version": (padded(8193, request(version="8")), 431),
    "no end": (request()[:-2] + b"X: " + b"x" * 9000, 431),
    "no end of a HEAD": (b"HEAD / HTTP/1.1\r\nX: " + b"x" * 9000, 431),
    "no end of the first line": (b"GET /" + b"x" * 9000, 431),
    "no end of the first word": (b"x" * 9000, 431),
}


@pytest.mark.parametrize(("head", "status"), REJECTED.values(), ids=REJECTED)
def test_what_is_rejected(head: bytes, status: int) -> None:
    """The whole answer is the same in every split; what comes behind is not heard."""
    behind = b"" if status == 431 else frame(BINARY, handshake())
    whole = None
    for pieces in splits(head + behind) if len(head) < 8000 else ends(head):
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
def test_the_error_that_says_so(head: bytes, status: int) -> None:
    """UpgradeRejected has the status and the answer; nothing else is raised."""
    try:
        read = RequestReader().receive(head)
        assert read is not None
        if read[0].wants_websocket:
            read[0].accept()
            raise AssertionError("accepted")
    except UpgradeRejected as refusal:
        assert refusal.status == status and str(refusal)
        assert refusal.answer.startswith(b"HTTP/1.1 %d " % status)
    else:
        assert status in (200, 405) and not read[0].wants_websocket


def test_a_head_has_the_length_of_its_body() -> None:
    """In the answer to HEAD, and no body."""
    answers = [served([plain(f"{method} / HTTP/1.1")]) for method in ("GET", "HEAD")]
    assert answers[0][1] == answers[1][1] and answers[0][2] and not answers[1][2]
    assert http_answer(200, "é\n").endswith(
        b"Content-Length: 3\r\nConnection: close\r\n\r\n\xc3\xa9\n"
    )
    assert METHODS == ("GET", "HEAD", "OPTIONS")


# As soon as it can be told. A row: what comes, of which nothing but the last byte is wrong.

JUNK = {
    "TLS": b"\x16",
    "a line feed": b"\n",
    "a carriage return": b"\r",
    "a space": b" ",
    "a method that is none": b"GET\0",
    "a separator in a method": b"GET/",
    "a line of one word": b"junk\n",
    "a target that is none": b"GET \x01",
    "a line without a version": b"GET /\n",
    "NUL in the version": b"GET / H\0",
    "a third space": b"GET / HTTP/1.1 ",
    "a carriage return that ends nothing": b"GET / HTTP/1.1\rx",
    "a version that is none": b"GET / HTTP/1.2\r\n",
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
    for behind in (b"x", b"\r\n\r\n", b"x" * 9000):
        with pytest.raises(UpgradeRejected) as caught:
            RequestReader().receive(junk + behind)
        assert caught.value.status == 400


@pytest.mark.parametrize("size", [8190, 8191, 8192])
def test_a_head_is_too_long_with_its_last_byte_and_not_before(size: int) -> None:
    head = padded(10_000, request())[:size]
    reader = RequestReader()
    assert reader.receive(head[:-1]) is None
    if size < 8192:
        assert reader.receive(head[-1:]) is None
    else:
        with pytest.raises(UpgradeRejected) as caught:
            reader.receive(head[-1:])
        assert caught.value.status == 431


@pytest.mark.parametrize(
    "head",
    [request(), request(end="\n"), padded(8192, request())],
    ids=["short", "with line feeds", "8,192 bytes"],
)
def test_what_is_behind_the_head_is_kept(head: bytes) -> None:
    behind = b"\r\n\x82\x80" + bytes(range(256)) * 40
    for cut in (*range(len(head) - 3, len(head) + 4), len(head) + 9000):
        reader = RequestReader()
        rests = []
        for piece in ((head + behind)[:cut], (head + behind)[cut:]):
            read = reader.receive(memoryview(piece)) if not rests else (None, piece)
            if read is not None:
                rests.append(bytes(read[1]))
        assert b"".join(rests) == behind, cut


# Its place.


HEADS = [
    *ACCEPTED.items(),
    *((name, row[0]) for name, row in REJECTED.items()),
    *((f"junk: {name}", junk) for name, junk in JUNK.items()),
]


@pytest.mark.parametrize(
    "head", [pytest.param(head, id=name) for name, head in HEADS if len(head) < 1000]
)
def test_another_reader_goes_on_at_its_place(head: bytes) -> None:
    """One that is taken out and put back after each byte reads what one alone does."""

    def outcome(is_carried: bool) -> tuple[object, ...]:
        reader = RequestReader()
        for n in range(len(head)):
            try:
                read = reader.receive(head[n : n + 1])
            except UpgradeRejected as refusal:
                return n, refusal.status, refusal.answer
            if read is not None:
                return n, *read
            if is_carried:
                place = dict(reader.place())
                assert place == {"_head": head[: n + 1]}
                reader = RequestReader()
                reader.resume(marshal.loads(marshal.dumps(place)))
        return (None,)

    assert outcome(True) == outcome(False)


def test_a_long_head_is_carried_too() -> None:
    for size, is_read in ((8192, True), (8193, False)):
        head = padded(size, request())
        for cut in (1, 500, 8190, 8191):
            reader, other = RequestReader(), RequestReader()
            assert reader.receive(head[:cut]) is None
            other.resume(reader.place())
            try:
                assert (other.receive(head[cut:]) is not None) == is_read
            except UpgradeRejected as refusal:
                assert refusal.status == 431 and not is_read


# A client's side.


def answer(
    line: str = "HTTP/1.1 101 Switching Protocols",
    upgrade: str | None = "websocket",
    connection: str | None = "Upgrade",
    accept: str | None = ACCEPT,
    *fields: str,
    end: str = "\r\n",
) -> bytes:
    """A server's answer to the request with NONCE."""
    named = {"Upgrade": upgrade, "Connection": connection, "Sec-WebSocket-Accept": accept}
    lines = [f"{name}: {value}" for name, value in named.items() if value is not None]
    return end.join([line, *lines, *fields, "", ""]).encode("latin-1")


GOOD_ANSWERS: dict[str, bytes] = {
    "as it is": answer(),
    "line feeds": answer(end="\n"),
    "another reason": answer("HTTP/1.1 101 Web Socket Protocol Handshake"),
    "no reason": answer("HTTP/1.1 101 "),
    "neither reason nor space": answer("HTTP/1.1 101"),
    "other case": answer(upgrade="WEBSOCKET", connection="upgrade"),
    "names in lower case": answer().replace(b"Sec-WebSocket-Accept", b"sec-websocket-accept"),
    "Connection is a list": answer(connection="keep-alive, Upgrade"),
    "spaces": answer(accept=f" {ACCEPT}\t"),
    "other fields": answer(
        "HTTP/1.1 101 ok", "websocket", "Upgrade", ACCEPT, "Server: x", "Date: y"
    ),
}

# 4.1, what a client must check in the answer, by its numbers.
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
    "2: more than that": answer(upgrade="websocket, h2c"),
    "3: no Connection": answer(connection=None),
    "3: another Connection": answer(connection="close"),
    "4: no Accept": answer(accept=None),
    "4: an empty Accept": answer(accept=""),
    "4: that of another key": answer(accept=ACCEPT_OF_NULS),
    "4: in other case": answer(accept=ACCEPT.lower()),
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
    "8,193 bytes": padded(8193, answer()),
    "no end": answer()[:-2] + b"X: " + b"x" * 9000,
}


def take(pieces: Sequence[bytes], is_carried: bool = False) -> bytes | None:
    """What an AnswerReader finds behind the answer. None: it is not whole."""
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
            reader = AnswerReader(b"?" * 16)  # even the nonce is in the place
            reader.resume(place)
    return found


def test_a_clients_request() -> None:
    """4.1, and that our own server takes it."""
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
    for pieces in splits(head + b"behind") if len(head) < 8000 else ends(head):
        with pytest.raises(UpgradeFailed):
            take(pieces)
    if len(head) < 8000:
        assert take([head[:-1]]) is None
        with pytest.raises(UpgradeFailed):
            take([*map(bytes, zip(head))], is_carried=True)


def test_the_longest_answer() -> None:
    head = padded(8192, answer())
    for pieces in ends(head):
        assert take(pieces) == b""
    assert take([head + b"x" * 9000]) == b"x" * 9000


@pytest.mark.parametrize(("head", "status"), REJECTED.values(), ids=REJECTED)
def test_a_client_is_told_why(head: bytes, status: int) -> None:
    """Whatever the relay answers instead is whole, and no upgrade."""
    wire: FramedTransport = Room().client(role=Role.WEBSOCKET)
    wire.feed(head)
    with pytest.raises(UpgradeFailed, match=f"the answer is {status}"):
        take([wire.sent])


def test_a_head_is_read_by_http_framing_until_it_is_whole() -> None:
    wire = Room().client(role=Role.WEBSOCKET)
    wire.feed(request()[:-1])
    assert type(wire.framing) is HttpFraming and wire.session.state == State.WAIT_UPGRADE
