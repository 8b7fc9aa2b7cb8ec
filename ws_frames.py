# SPDX-License-Identifier: MIT
"""WebSocket (RFC 6455) for servers and clients: bytes in, events and bytes out.

The module has no socket, clock, randomness or log. The caller reads from its own socket, in
pieces of any size, passes the bytes to a reader, and sends the bytes that the builders return.
The framings do that for the relay, whose Session and Transport they use through Protocols. The
numbers at the checks are sections of RFC 6455, unless they name another RFC.

    Before it            ProxyReader                    server, behind a proxy
    Opening handshake    RequestReader, Request         server
                         upgrade_request, AnswerReader  client
    Received frames      FrameParser, Event             both; `must_be_masked` sets the role
    Frames to send       frame_header, build_frame      both; a client passes a masking key
    Clients of a relay   ProxyFraming, HttpFraming      server: what precedes the byte stream
                         StatusFraming                  server: one request about the relay
                         WebSocketFraming               server: the byte stream in messages

The module supports no extension, no subprotocol and no text messages. FrameParser does not
assemble messages: it returns payload in pieces, so its memory does not depend on the length of a
frame. A reader buffers a PROXY header (4 KiB), a head (32 KiB), a frame header (13 bytes) or the
payload of a control frame (125 bytes).

The state of a reader is a few named fields. `place` returns them and `resume` puts them into
another reader; both work between any two bytes. A reload of the relay uses them, for framings too.
The joined payload, the control events and the error do not depend on how the stream is cut into
pieces.

The type of an error tells its cause:

    ProtocolError      the peer broke a rule of frames, or sent text; `code` is for the Close
    UpgradeRejected    the request cannot be served; `status` and `answer` are for HTTP
    UpgradeFailed      the server did not accept our upgrade
    ProxyError         a connection does not begin with a PROXY header

Apart from a ValueError of `resume`, any other exception is a programming error.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, Union

Bytes = Union[bytes, bytearray, memoryview]
Place = Mapping[str, Union[bytes, int, "Place"]]

# A WebSocket URL: 3, without a user and without a fragment.
URL = re.compile(
    r"(?i:wss?)://(?:[0-9A-Za-z._~%-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?(?:[/?][!\"$-~]*)?"
)

# Opcodes: 5.2.
CONTINUATION, TEXT, BINARY = 0x0, 0x1, 0x2
CLOSE, PING, PONG = 0x8, 0x9, 0xA
OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))
CONTROL = 0x8  # 5.5: this bit is set in the opcodes of control frames

# The first two bytes of a frame: 5.2.
FINAL = 0x80
RESERVED = 0x70
OPCODE = 0x0F
MASKED = 0x80
LENGTH = 0x7F
LENGTH_IN_16_BITS, LENGTH_IN_64_BITS = 126, 127
# The bytes of an extended length, and the least length that may be encoded in them.
EXTENDED_LENGTHS = {LENGTH_IN_16_BITS: (2, 126), LENGTH_IN_64_BITS: (8, 1 << 16)}
KEY_BYTES = 4
MAX_CONTROL_BYTES = 125  # 5.5

# Masking: 5.3. XOR_TABLES[n] translates each byte to its XOR with n. All tables take 74 kB.
TRANSLATED_BYTES = 2048  # from this length on, `translate` is faster than integers (measured)
ALL_BYTES = int.from_bytes(bytes(range(256)), "little")
ONES = int.from_bytes(b"\1" * 256, "little")
XOR_TABLES = [(ALL_BYTES ^ n * ONES).to_bytes(256, "little") for n in range(256)]

# Close codes: 7.4.1.
NORMAL = 1000
GOING_AWAY = 1001
PROTOCOL_ERROR = 1002
UNSUPPORTED_DATA = 1003
INVALID_DATA = 1007
TRY_AGAIN_LATER = 1013  # of the registry of IANA

# Limits of a head, line ends included. nginx passes on heads of 24 kB.
MAX_HEAD_BYTES = 32 * 1024
MAX_HEAD_LINE_BYTES = 16 * 1024

# The grammar of a head: RFC 7230.
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # 3.2.6
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~\x80-\xff]+) HTTP/1\.([01])\r?\n")  # 3.1.1
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [ -~\t\x80-\xff]*)?\r?\n")  # 3.1.2
FIELD = re.compile(rb"(" + TOKEN + rb"):([ -~\t\x80-\xff]*)\r?\n")  # 3.2; no obsolete folding
EMPTY_LINES = (b"\r\n", b"\n")  # 3.5: a line feed alone ends a line too
# The start of a line that may become a request line. Most junk is refused before its line ends.
REQUEST_LINE_START = re.compile(rb"(?:" + TOKEN + rb"(?: [!-~\x80-\xff]*(?: [!-~]*\r?)?)?)?")
CHECKED_START_BYTES = 256  # of an unfinished request line; the rest is checked at its end

ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3
KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 4.1: 16 bytes in base64
VERSION = "13"  # 4.1
# Fields of each answer to a status client. The answer is soon out of date, a browser must not guess
# another type, and no other page may embed it. An HTML page has a policy of its own.
STATUS_FIELDS = ("Cache-Control: no-store", "X-Content-Type-Options: nosniff")
NO_CONTENT_POLICY = "Content-Security-Policy: default-src 'none'; frame-ancestors 'none'"
METHODS = ("GET", "HEAD", "OPTIONS")  # without an upgrade; any other method gets a 405
REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


class ProtocolError(Exception):
    """The peer broke a rule of frames, or sent a text message.

    Fail the connection (7.1.7) with the Close code `code`.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


class UpgradeRejected(Exception):
    """The request cannot be served. `status` is the HTTP status."""

    def __init__(self, status: int, message: str, *fields: str, method: str = "GET") -> None:
        super().__init__(message)
        self.status = status
        self._fields = fields
        self._method = method

    def answer(self, *fields: str) -> bytes:
        """Return the bytes to send. `fields`: more fields of the head."""
        fields = (*self._fields, *fields)
        return http_answer(self.status, f"{self}\n", *fields, method=self._method)


class UpgradeFailed(Exception):
    """The server's answer does not accept the upgrade that we requested."""


class Reader:
    """Reads a stream in pieces. CARRIED names the fields of its state. A field can be a Reader."""

    __slots__: tuple[str, ...] = ()
    CARRIED: tuple[str, ...] = ()

    def place(self) -> Place:
        """Return the carried fields by name, as bytes and numbers, or as the place of a part."""
        place = {name: getattr(self, name) for name in self.CARRIED}
        for name, value in place.items():
            if hasattr(value, "place"):  # a Reader, or a framing of transit_relay
                place[name] = value.place()
            elif isinstance(value, bytearray):
                place[name] = bytes(value)
        return place

    def resume(self, place: Place) -> None:
        """Set the fields that `place` of a reader of the same class returned.

        A field that is missing keeps its value. Raises ValueError for an unknown field.
        """
        unknown = place.keys() - set(self.CARRIED)
        if unknown:
            raise ValueError(f"{type(self).__name__} has no {', '.join(sorted(unknown))}")
        for name, value in place.items():
            field = getattr(self, name)
            if hasattr(field, "resume"):
                field.resume(value)
            elif isinstance(field, bytearray) and isinstance(value, bytes):
                field[:] = value
            else:  # without a conversion, whose error text would contain the value
                setattr(self, name, value)


# PROXY headers, HAProxy's proxy-protocol.txt -------------------------------------------------
# A proxy can send such a header before the bytes of a connection. It has the client's address.

MAX_PROXY_BYTES = 4096
V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2_FIXED_BYTES = 16  # the signature, command and family, and the length of the rest
# Headers of version 2: the end of the source address (0: none), and the least size of the header.
V2_IPV4, V2_IPV6, V2_NONE = (20, 28), (32, 52), (0, 16)
V2_TOLD = {b"\x21\x11": V2_IPV4, b"\x21\x12": V2_IPV4}  # by command and family: PROXY, TCP or UDP
V2_TOLD |= {b"\x21\x21": V2_IPV6, b"\x21\x22": V2_IPV6}


def beginnings(text: bytes, *patterns: bytes) -> bytes:
    """Return a pattern that matches each beginning of `text` + `patterns`.

    Each of `patterns` must match the beginnings of its own text too.
    """
    parts = [re.escape(bytes((byte,))) for byte in text] + list(patterns)
    return b"(?:" + b"(?:".join(parts) + b")?" * len(parts)


PORT_NUMBER = rb"(?:0|[1-9]\d{0,3}|[1-5]\d{4}|6[0-4]\d{3}|65[0-4]\d\d|655[0-2]\d|6553[0-5])"
V1_END = (b" ", PORT_NUMBER, b" ", PORT_NUMBER, b"\r", b"\n")
V1_IPV4, V1_IPV6 = rb"[0-9.]{1,15}", rb"[0-9A-Fa-f:.]{1,39}"
V2_FAMILY, V2_END = rb"[\0-\2\x10-\x12\x20-\x22\x30-\x32]", (rb"[\0-\x0f]", b".*")
PROXY_BEGINNINGS = (
    beginnings(b"PROXY TCP4 ", V1_IPV4, b" ", V1_IPV4, *V1_END),
    beginnings(b"PROXY TCP6 ", V1_IPV6, b" ", V1_IPV6, *V1_END),
    beginnings(b"PROXY UNKNOWN\r\n"),
    beginnings(b"PROXY UNKNOWN ", rb".{0,91}", b"\r", b"\n"),  # 107 bytes in all
    beginnings(V2_SIGNATURE + b"\x20", b".", *V2_END),  # LOCAL: any family
    beginnings(V2_SIGNATURE + b"\x21", V2_FAMILY, *V2_END),  # PROXY
)
PROXY_BEGINNING = b"|".join(PROXY_BEGINNINGS)  # compiled when it is needed: that takes 2 ms


class ProxyError(Exception):
    """A connection does not begin with a PROXY header."""


class ProxyReader(Reader):
    """Reads the PROXY header at the beginning of a connection."""

    __slots__ = ("_header",)
    CARRIED = __slots__

    def __init__(self) -> None:
        self._header = b""  # the received start of the header

    def receive(self, data: Bytes) -> tuple[str | None, Bytes] | None:
        """Return the told address and the bytes behind the header, or None until it is whole.

        No address is told by UNKNOWN, LOCAL and families other than IPv4 and IPv6. Raises
        ProxyError at the first byte that no header has there; for an address in version 1 at the
        end of the line (2.1).
        """
        seen = len(self._header)
        header = self._header + data[: MAX_PROXY_BYTES - seen]
        size = v2_bytes(header) if header.startswith(b"\r") else header.find(b"\r\n") + 2
        is_whole = 2 <= size <= len(header)
        pattern = re.compile(PROXY_BEGINNING, re.DOTALL)
        if not pattern.fullmatch(header, 0, size if is_whole else len(header)):
            raise ProxyError
        self._header = b"" if is_whole else header
        return (told_address(header), data[size - seen :]) if is_whole else None


def v2_bytes(header: bytes) -> int:
    """Return the size of a header of version 2, or 0 if it is not known yet. Raises ProxyError."""
    if len(header) < V2_FIXED_BYTES:
        return 0
    size = V2_FIXED_BYTES + int.from_bytes(header[14:V2_FIXED_BYTES], "big")
    if not V2_TOLD.get(header[12:14], V2_NONE)[1] <= size <= MAX_PROXY_BYTES:
        raise ProxyError
    return size


def told_address(header: bytes) -> str | None:
    """Return the source address in a whole header, if it tells one. Raises ProxyError."""
    import ipaddress

    if header.startswith(b"PROXY TCP"):
        _, kind, *addresses = header.decode("latin-1").split(" ")[:4]
        try:
            versions = {ipaddress.ip_address(address).version for address in addresses}
        except ValueError:
            raise ProxyError from None
        if versions != {6 if kind == "TCP6" else 4}:
            raise ProxyError
        return addresses[0]
    end, _ = V2_TOLD.get(header[12:14], V2_NONE)
    return str(ipaddress.ip_address(bytes(header[V2_FIXED_BYTES:end]))) if end else None


# The opening handshake, section 4 ------------------------------------------------------------
# Client and server each send one head of HTTP/1.1. A server reads a Request and checks whether
# it `wants_websocket`. `accept` answers an upgrade, `answer` any other request.


class HeadReader(Reader):
    """Collects the lines of a head. An empty line ends the head."""

    __slots__ = ("_head", "_line_start")
    CARRIED: tuple[str, ...] = ("_head", "_line_start")

    def __init__(self) -> None:
        self._head = bytearray()
        self._line_start = 0  # where the last line of the head begins

    def _collect(self, data: Bytes) -> int | None:
        """Append `data`. If the head is now whole, return how many bytes of `data` belong to it.

        If the head is not whole and cannot become whole, `_is_too_long` is true afterwards.
        """
        seen = len(self._head)
        self._head += data[: MAX_HEAD_BYTES - seen]
        line_end = self._head.find(b"\n", seen) + 1
        while 0 < line_end <= self._line_start + MAX_HEAD_LINE_BYTES:
            if self._line_start and self._head[self._line_start : line_end] in EMPTY_LINES:
                del self._head[line_end:]
                return line_end - seen
            self._line_start = line_end
            line_end = self._head.find(b"\n", line_end) + 1
        return None

    def _is_too_long(self) -> bool:
        line_bytes = len(self._head) - self._line_start
        return len(self._head) == MAX_HEAD_BYTES or line_bytes >= MAX_HEAD_LINE_BYTES


class RequestReader(HeadReader):
    """Reads the head of a request."""

    __slots__ = ()

    def receive(self, data: Bytes) -> tuple[Request, Bytes] | None:
        """Return the request and the bytes that follow its head, or None until it is whole.

        Raises UpgradeRejected: 431 for a head that is too long, 400 for one that is not HTTP or
        has a malformed field. Most junk is refused at its first bytes.
        """
        seen = len(self._head)
        in_request_line = not self._line_start
        taken = self._collect(data)
        if in_request_line:
            self._check_request_line(seen)
        if taken is not None:
            return parse_request(bytes(self._head)), data[taken:]
        if self._is_too_long():
            limits = (
                f"a head of over {MAX_HEAD_BYTES} bytes, or a line of over {MAX_HEAD_LINE_BYTES}"
            )
            raise self._rejection(431, limits)
        return None

    def _rejection(self, status: int, message: str) -> UpgradeRejected:
        """Return the error for a head that is not parsed."""
        method = "HEAD" if self._head.startswith(b"HEAD ") else "GET"
        return UpgradeRejected(status, message, method=method)

    def _check_request_line(self, seen: int) -> None:
        """Check the request line, or its start. `seen` bytes of it were there before."""
        end = self._head.find(b"\n", seen, MAX_HEAD_LINE_BYTES) + 1
        if end:
            is_http = REQUEST_LINE.fullmatch(self._head, 0, end)
        elif seen < CHECKED_START_BYTES:
            is_http = REQUEST_LINE_START.fullmatch(self._head, 0, CHECKED_START_BYTES)
        else:
            return
        if not is_http:
            raise self._rejection(400, "this is not HTTP/1.1")


class Fields(dict[str, list[str]]):
    """The fields of a head: all values of each, under its name in lower case."""

    def tokens(self, name: str) -> set[str]:
        """Return the elements of a list field in lower case. RFC 7230, 3.2.2 and 7."""
        return {token.strip(" \t").lower() for v in self.get(name, ()) for token in v.split(",")}

    def only(self, name: str) -> str | None:
        """Return the value of a field that occurs exactly once."""
        values = self.get(name, ())
        return values[0] if len(values) == 1 else None


class Request(NamedTuple):
    """The head of a request."""

    method: str
    target: str
    is_http_1_0: bool
    fields: Fields

    @property
    def wants_websocket(self) -> bool:
        """Whether the request asks for an upgrade to WebSocket, valid or not."""
        return "websocket" in self.fields.tokens("upgrade")

    def accept(self) -> bytes:
        """Return the answer that upgrades this connection to WebSocket: 4.2.2.

        Any target, host and origin is accepted. Extensions and subprotocols are declined: the
        answer does not name them. Raises UpgradeRejected if the request violates 4.2.1. Point 3
        of 4.2.1, the Upgrade field, is `wants_websocket`.
        """
        fields = self.fields
        if any(version != VERSION for version in fields.get("sec-websocket-version", ())):  # 4.4
            ours = "Upgrade: websocket", f"Sec-WebSocket-Version: {VERSION}"
            raise UpgradeRejected(426, "this takes version 13", *ours, method=self.method)
        if self.method != "GET":  # 4.2.1, 1
            raise not_allowed(self.method)
        if self.is_http_1_0:  # 4.2.1, 1
            raise UpgradeRejected(400, "an upgrade needs HTTP/1.1")
        if fields.only("host") is None:  # 4.2.1, 2
            raise UpgradeRejected(400, "an upgrade needs one Host")
        if "upgrade" not in fields.tokens("connection"):  # 4.2.1, 4
            raise UpgradeRejected(400, "an upgrade needs Connection: Upgrade")
        key = fields.only("sec-websocket-key")
        if key is None or not KEY.fullmatch(key):  # 4.2.1, 5
            raise UpgradeRejected(400, "an upgrade needs one Sec-WebSocket-Key of 16 bytes")
        if fields.only("sec-websocket-version") is None:  # 4.2.1, 6
            raise UpgradeRejected(400, "an upgrade needs one Sec-WebSocket-Version")
        return (
            "HTTP/1.1 101 Switching Protocols\r\n"
            "Upgrade: websocket\r\n"
            "Connection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept_key(key)}\r\n\r\n"
        ).encode("ascii")

    def answer(self, text: str) -> bytes:
        """Return the answer to a request without an upgrade. Raises UpgradeRejected."""
        if self.method not in METHODS:
            raise not_allowed(self.method)
        return http_answer(200, text, method=self.method)


def parse_request(head: bytes) -> Request:
    """Parse a whole head. Raises UpgradeRejected."""
    line = REQUEST_LINE.match(head)
    if line is None:
        raise UpgradeRejected(400, "this is not HTTP/1.1")
    method = line[1].decode("ascii")
    fields = parse_fields(head, line.end())
    if fields is None:
        raise UpgradeRejected(400, "a field of the head is malformed", method=method)
    return Request(method, line[2].decode("latin-1"), line[3] == b"0", fields)


def parse_fields(head: bytes, start: int) -> Fields | None:
    """Parse the fields of a whole head from byte `start` on. Return None if one is malformed."""
    fields = Fields()
    end = len(head) - (2 if head.endswith(b"\r\n") else 1)  # where the empty line begins
    while start < end:
        field = FIELD.match(head, start)
        if field is None:
            return None
        value = field[2].strip(b" \t").decode("latin-1")
        fields.setdefault(field[1].decode("ascii").lower(), []).append(value)
        start = field.end()
    return fields


def accept_key(key: str) -> str:
    """Return the Sec-WebSocket-Accept for a Sec-WebSocket-Key: 4.2.2, item 4 of point 5."""
    digest = hashlib.sha1(key.encode("ascii") + ACCEPT_GUID, usedforsecurity=False).digest()
    return base64_text(digest)


def base64_text(data: bytes) -> str:
    """Encode bytes for a field of a head."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def http_answer(
    status: int, text: str, *fields: str, method: str = "GET", media_type: str = "text/plain"
) -> bytes:
    """Return an answer that ends the connection. A HEAD gets no body."""
    body = text.encode()
    head = (
        f"HTTP/1.1 {status} {REASONS[status]}",
        *fields,
        f"Content-Type: {media_type}; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode("ascii") + (b"" if method == "HEAD" else body)


def not_found(request: Request) -> bytes:
    """Return the answer to a status client that requests a page that does not exist."""
    fields = (*STATUS_FIELDS, NO_CONTENT_POLICY)
    return http_answer(404, "no such page\n", *fields, method=request.method)


def not_allowed(method: str) -> UpgradeRejected:
    """Return the error for a method that this request may not have. RFC 7231, 6.5.5.

    Allow names the methods of the resource, of which an upgrade takes GET only.
    """
    allowed = ", ".join(METHODS)
    return UpgradeRejected(405, f"this takes {allowed}", f"Allow: {allowed}", method=method)


def upgrade_request(host: str, target: str, nonce: bytes) -> bytes:
    """Return the request of a client: 4.1. `nonce` is 16 unpredictable bytes."""
    return (
        f"GET {target} HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64_text(nonce)}\r\n"
        f"Sec-WebSocket-Version: {VERSION}\r\n\r\n"
    ).encode("ascii")


class AnswerReader(HeadReader):
    """Reads the answer of a server to `upgrade_request`."""

    __slots__ = ("_nonce",)
    CARRIED = (*HeadReader.CARRIED, "_nonce")

    def __init__(self, nonce: bytes) -> None:
        """`nonce` is the one of the request."""
        super().__init__()
        self._nonce = nonce

    def receive(self, data: Bytes) -> Bytes | None:
        """Return the bytes that follow the answer, or None until its head is whole.

        Raises UpgradeFailed.
        """
        taken = self._collect(data)
        if taken is not None:
            self._check(bytes(self._head))
            return data[taken:]
        if self._is_too_long():
            raise UpgradeFailed("the answer's head, or a line of it, is too long")
        return None

    def _check(self, head: bytes) -> None:
        """Check the answer: 4.1, points 1 to 6 of its second list."""
        line = STATUS_LINE.match(head)
        fields = parse_fields(head, line.end()) if line else None
        if line is None or fields is None:
            raise UpgradeFailed("the answer is not HTTP/1.1")
        if line[1] != b"101":
            raise UpgradeFailed(f"the answer is {line[1].decode('ascii')}")
        is_upgrade = "upgrade" in fields.tokens("connection")
        if not is_upgrade or fields.tokens("upgrade") != {"websocket"}:
            raise UpgradeFailed("the answer upgrades to something else")
        if fields.only("sec-websocket-accept") != accept_key(base64_text(self._nonce)):
            raise UpgradeFailed("the answer is not to our request")
        if "sec-websocket-extensions" in fields or "sec-websocket-protocol" in fields:
            raise UpgradeFailed("the answer names an extension or subprotocol")


# Received frames, section 5 ------------------------------------------------------------------
# A frame is a header and a payload. The parser checks a header while it arrives. It returns the
# payload of a data frame in pieces, and that of a control frame when it is whole.
# Of the message to which the frames belong it keeps one bit: whether the message goes on.


class Event(NamedTuple):
    """One part of the stream that FrameParser has read.

    BINARY   a piece of a binary message, empty only if its frame is; `is_last` is true for the
             last piece of the message
    PING     a whole Ping. Answer it with a Pong of the same payload: 5.5.2
    PONG     a whole Pong: 5.5.3
    CLOSE    a whole Close, checked. Its payload is empty, or a code of two bytes and a reason
    """

    opcode: int
    payload: Bytes  # of an unmasked BINARY: a view of the caller's data, or of a copy
    is_last: bool = True


class FrameParser(Reader):
    """Parses the frames that one side sends. Do not call it again after a Close or an error."""

    __slots__ = (
        "_control",
        "_header",
        "_in_message",
        "_is_final",
        "_key",
        "_left",
        "_must_be_masked",
        "_opcode",
    )
    CARRIED = __slots__

    def __init__(self, must_be_masked: bool) -> None:
        """A client must mask its frames, a server must not: 5.1."""
        self._must_be_masked = must_be_masked
        self._in_message = False  # the end of the current message has not come yet
        self._header = b""  # the start of a header that is not whole yet
        # The frame whose payload is being read:
        self._opcode = -1  # or -1: none
        self._is_final = False
        self._left = 0  # payload bytes still to come
        self._key = b""  # for a data frame rotated: its first byte is for the next payload byte
        self._control = b""  # the payload of a control frame so far, still masked

    def receive(self, data: memoryview) -> Iterator[Event]:
        """Yield the events in `data`, the next bytes of the stream.

        Exhaust the iterator before `data` changes and before the next call. Raises
        ProtocolError after the events that precede the error.
        """
        if self._header:
            data = memoryview(self._header + data)
            self._header = b""
        start = 0
        while True:
            if self._opcode < 0:
                payload_start = self._begin_frame(data, start)
                if not payload_start:
                    self._header = bytes(data[start:])
                    return
                start = payload_start
            piece = data[start : start + self._left]
            start += len(piece)
            self._left -= len(piece)
            is_whole = not self._left
            if self._opcode & CONTROL:
                self._control += piece
                if is_whole:
                    yield self._end_control_frame()
            else:
                is_last = is_whole and self._is_final
                if is_last:
                    self._in_message = False
                if piece or is_whole:
                    yield Event(BINARY, self._unmask(piece), is_last)
            if not is_whole:
                return
            self._opcode = -1

    def _begin_frame(self, data: memoryview, start: int) -> int:
        """Parse the header at `start`. Return the start of the payload, or 0 if it is not whole."""
        end = start + 2
        if len(data) < end:
            return 0
        first, second = data[start], data[start + 1]
        opcode, is_final = first & OPCODE, bool(first & FINAL)
        if first & RESERVED:  # 5.2: an extension would define them
            raise ProtocolError(PROTOCOL_ERROR, "a reserved bit is set")
        if opcode not in OPCODES:  # 5.2
            raise ProtocolError(PROTOCOL_ERROR, "an unknown opcode")
        if bool(second & MASKED) != self._must_be_masked:  # 5.1
            raise ProtocolError(PROTOCOL_ERROR, "the mask bit is wrong for this role")
        length = second & LENGTH
        if opcode & CONTROL:
            if not is_final or length > MAX_CONTROL_BYTES:  # 5.5
                raise ProtocolError(PROTOCOL_ERROR, "a control frame is fragmented or too long")
        elif (opcode == CONTINUATION) != self._in_message:  # 5.4
            raise ProtocolError(PROTOCOL_ERROR, "a continuation is unexpected or missing")
        elif opcode == TEXT:  # 7.4.1: an endpoint may accept binary data only
            raise ProtocolError(UNSUPPORTED_DATA, "a text message")

        if length >= LENGTH_IN_16_BITS:
            length_bytes, minimum = EXTENDED_LENGTHS[length]
            end += length_bytes
            if len(data) < end:
                return 0
            length = int.from_bytes(data[end - length_bytes : end], "big")
            if not minimum <= length < 1 << 63:  # 5.2: minimal, and the highest bit is 0
                raise ProtocolError(PROTOCOL_ERROR, "a length is not minimal, or 2^63 or more")
        if self._must_be_masked:
            end += KEY_BYTES
            if len(data) < end:
                return 0
            self._key = bytes(data[end - KEY_BYTES : end])
        self._opcode = opcode
        self._is_final = is_final
        self._left = length
        if not opcode & CONTROL:
            self._in_message = True
        return end

    def _unmask(self, piece: memoryview) -> Bytes:
        """Unmask a piece of payload and rotate the key for the next piece: 5.3."""
        if not self._key:
            return piece
        payload = unmask(piece, self._key)
        if self._left:
            rotation = len(piece) % KEY_BYTES
            self._key = self._key[rotation:] + self._key[:rotation]
        return payload

    def _end_control_frame(self) -> Event:
        payload = unmask(self._control, self._key) if self._key else self._control
        self._control = b""
        if self._opcode == CLOSE:
            check_close(payload)
        return Event(self._opcode, payload)


def unmask(data: Bytes, key: bytes) -> bytes | bytearray:
    """Mask or unmask `data` (the same operation) with a key of four bytes: 5.3.

    The standard library has no XOR of bytes. Short data is converted to an integer and back.
    For long data, one `translate` for each byte of the key is faster.
    """
    size = len(data)
    if size < TRANSLATED_BYTES:
        pad = int.from_bytes((key * (size // 4 + 1))[:size], "little")
        return (int.from_bytes(data, "little") ^ pad).to_bytes(size, "little")
    result = bytearray(data)
    result[0::4] = result[0::4].translate(XOR_TABLES[key[0]])
    result[1::4] = result[1::4].translate(XOR_TABLES[key[1]])
    result[2::4] = result[2::4].translate(XOR_TABLES[key[2]])
    result[3::4] = result[3::4].translate(XOR_TABLES[key[3]])
    return result


def check_close(payload: bytes | bytearray) -> None:
    """Check the payload of a Close: 5.5.1. Raises ProtocolError."""
    if not payload:
        return
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not may_be_sent(code):
        raise ProtocolError(PROTOCOL_ERROR, "a Close has no valid code")
    try:
        payload[2:].decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(INVALID_DATA, "the reason of a Close is not UTF-8") from None


def may_be_sent(code: int) -> bool:
    """Whether a Close may contain this code: 7.4.1, 7.4.2 and the registry of IANA."""
    is_defined = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
    return is_defined or 3000 <= code <= 4999


# Frames to send, section 5.2 -----------------------------------------------------------------
# `frame_header` is for payload that stays in the caller's buffer, `build_frame` for short frames.


def frame_header(opcode: int, length: int, is_final: bool = True, key: bytes = b"") -> bytes:
    """Return the header of a frame. The caller sends `length` bytes, masked with `key` if any."""
    first = opcode | (FINAL if is_final else 0)
    masked = MASKED if key else 0
    if length < LENGTH_IN_16_BITS:
        return bytes((first, masked | length)) + key
    if length < 1 << 16:
        return bytes((first, masked | LENGTH_IN_16_BITS)) + length.to_bytes(2, "big") + key
    return bytes((first, masked | LENGTH_IN_64_BITS)) + length.to_bytes(8, "big") + key


def build_frame(
    opcode: int, payload: Bytes = b"", is_final: bool = True, key: bytes = b""
) -> bytes:
    """Return a whole frame. A client passes a `key` of four unpredictable bytes."""
    header = frame_header(opcode, len(payload), is_final, key)
    return header + (unmask(payload, key) if key else payload)


def build_close(code: int, key: bytes = b"") -> bytes:
    """Return a Close frame with this code and no reason."""
    return build_frame(CLOSE, code.to_bytes(2, "big"), key=key)


def split_message(data: Bytes, max_bytes: int) -> list[Bytes]:
    """Return `data` as unmasked binary messages of at most `max_bytes`: header, slice, header, ...

    The slices are views of `data`.
    """
    view = memoryview(data)
    parts: list[Bytes] = []
    for start in range(0, len(data), max_bytes):
        piece = view[start : start + max_bytes]
        parts += (frame_header(BINARY, len(piece)), piece)
    return parts


# The framings of the relay -------------------------------------------------------------------
# A framing decodes and encodes one client of transit_relay. It tells the Session what has arrived,
# and the Session decides what follows. It writes HTTP answers, Pings and Pongs to the Transport;
# `closing_bytes` returns the Close. transit_relay shows how the framings follow each other.
#
# transit_relay can run as `__main__`, so this module cannot import it. Protocols name what the
# framings use of it. Its classes Session, Framing, RawFraming (a Stream) and Connection (a
# Transport) describe the members.

# A client whose first bytes are one of these speaks HTTP.
HTTP_BEGINNINGS = (b"GET ", b"HEAD ", b"POST ", b"PUT ", b"OPTIONS ")
FIRST_READ_BYTES = 4 * 1024  # a read while the size of the client's frames is unknown
DIRECT_READ_BYTES = 2 * 1024  # the largest read that does not wait for its turn: 1 ms of work
FRAMED_READ_BYTES = 64 * 1024  # the largest read; one of empty frames takes 30 ms
FRAMES_PER_READ = 1_000  # a read is sized for this many, if they are as dense as the last ones
COSTLY_FRAMES = 100  # after a read with so many (0.3 ms) the relay lets the next one wait
MAX_MESSAGE_BYTES = 32 * 1024  # to a client; a client library in Go refuses larger ones
PONG_BACKLOG_BYTES = 64 * 1024  # behind a longer backlog only the newest Pong is kept
MAX_UNANSWERED_PINGS = 3  # then a waiting client is ended
# By the relay's reason for the end of a connection.
CLOSE_CODES = {"ended": NORMAL, "refused": TRY_AGAIN_LATER, "stopping": GOING_AWAY}
# The body of the answer to an HTTP request that asks for no WebSocket, such as a health check.
HTTP_TEXT = """\
This is transit-relay, the relay server of Magic Wormhole.
Magic Wormhole clients connect to it over TCP or WebSocket. This port has no pages.
"""


class Session(Protocol):
    """What a framing uses of the Session of its client."""

    @property
    def pair(self) -> object: ...  # None: there is no partner
    @property
    def expects_http(self) -> bool: ...
    @property
    def is_waiting(self) -> bool: ...
    @property
    def is_over(self) -> bool: ...
    def proxy_told(self, address: str) -> None: ...
    def forwarded_for(self, values: Sequence[str]) -> None: ...
    def stream_postponed(self) -> None: ...
    def handshake_failed(self, failure: str) -> None: ...
    def refuse_upgrade(self) -> str | None: ...
    def stream_opened(self) -> None: ...
    def client_ended(self) -> None: ...


class Framing(Protocol):
    """The decoder and encoder of one client: a framing of this module or of transit_relay."""

    is_raw: bool
    direct_read_bytes: int
    max_read_bytes: int
    is_costly: bool

    def receive(self, data: memoryview) -> None: ...
    def encode(self, data: Bytes) -> Sequence[Bytes]: ...
    def closing_bytes(self, reason: str) -> bytes: ...
    def backlog_sent(self) -> None: ...
    def keep_alive(self) -> None: ...
    def place(self) -> Place: ...
    def resume(self, place: Place) -> None: ...


class Transport(Protocol):
    """What a framing uses of the Connection of its client."""

    framing: Framing  # a framing assigns its successor here

    def answer(self, request: Request) -> bytes: ...
    def write(self, data: Bytes) -> None: ...
    def queued_bytes(self) -> int: ...
    def is_behind(self, most: int) -> bool: ...
    def note_activity(self) -> None: ...


class Stream(Protocol):
    """What a framing uses of the byte stream in the messages of its client."""

    def receive(self, data: Bytes) -> None: ...
    def message_ended(self) -> None: ...


class Opening(Reader):
    """A framing that precedes the byte stream, or replaces it. It passes on no partner's bytes."""

    __slots__ = ("_session", "_transport")

    is_raw = True
    direct_read_bytes = max_read_bytes = FIRST_READ_BYTES  # frames may follow in the same read
    is_costly = False

    def __init__(self, session: Session, transport: Transport) -> None:
        self._session = session
        self._transport = transport

    def encode(self, data: Bytes) -> Sequence[Bytes]:
        """Return `data` as it is."""
        return (data,)

    def closing_bytes(self, reason: str) -> bytes:
        """Return nothing."""
        return b""

    def backlog_sent(self) -> None:
        """Do nothing."""

    def keep_alive(self) -> None:
        """Do nothing."""


class ProxyFraming(Opening):
    """Reads the PROXY header of a connection, behind which the client's bytes begin."""

    __slots__ = ("_expects_http", "_reader", "_successor")
    CARRIED = __slots__

    def __init__(self, session: Session, transport: Transport, successor: Framing) -> None:
        """`successor`: for the bytes behind the header."""
        super().__init__(session, transport)
        self._expects_http = session.expects_http
        if not self._expects_http:
            session.stream_postponed()  # without a header, there is no record either
        self._reader = ProxyReader()
        self._successor = successor

    def receive(self, data: memoryview) -> None:
        """Install the successor once the header is whole."""
        session = self._session
        try:
            read = self._reader.receive(data)
        except ProxyError:
            session.handshake_failed("proxy_header")
            session.client_ended()
            return
        if read is None:
            return
        address, rest = read
        if address is not None:
            session.proxy_told(address)
        if not self._expects_http:
            session.stream_opened()
        self._transport.framing = self._successor
        if rest:
            self._successor.receive(memoryview(rest))


class HttpFraming(Opening):
    """Answers one HTTP request: an upgrade to WebSocket, or another one, such as a health check."""

    __slots__ = ("_reader", "_stream")
    CARRIED = __slots__

    def __init__(self, session: Session, transport: Transport, stream: Stream) -> None:
        """`stream`: for the content of the messages after an upgrade."""
        super().__init__(session, transport)
        self._reader = RequestReader()
        self._stream = stream

    def receive(self, data: memoryview) -> None:
        """Answer the request when its head is complete, or cannot become valid."""
        session, transport = self._session, self._transport
        try:
            read = self._reader.receive(data)
            if read is None:
                return
            request, rest = read
            session.forwarded_for(request.fields.get("x-forwarded-for", ()))
            is_upgrade = request.wants_websocket
            answer = request.accept() if is_upgrade else request.answer(HTTP_TEXT)
            refusal = session.refuse_upgrade() if is_upgrade else None
            if refusal is not None:
                raise UpgradeRejected(503, refusal)
        except UpgradeRejected as rejection:
            is_upgrade, answer = False, rejection.answer()
            session.handshake_failed(f"http_{rejection.status}")
        transport.write(answer)
        if not is_upgrade:
            session.client_ended()
            return
        session.stream_opened()
        transport.framing = WebSocketFraming(session, transport, self._stream)
        transport.framing.receive(memoryview(rest))


class StatusFraming(Opening):
    """Answers one HTTP request about the relay itself."""

    __slots__ = ("_reader",)
    CARRIED = __slots__

    def __init__(self, session: Session, transport: Transport) -> None:
        super().__init__(session, transport)
        self._reader = RequestReader()

    def receive(self, data: memoryview) -> None:
        """Answer the request when its head is complete, or cannot become valid."""
        try:
            read = self._reader.receive(data)
            if read is None:
                return
            request, _ = read
            answer = self._transport.answer(request)
        except UpgradeRejected as rejection:
            answer = rejection.answer(*STATUS_FIELDS, NO_CONTENT_POLICY)
        self._transport.write(answer)
        self._session.client_ended()


class WebSocketFraming(Reader):
    """Carries the byte stream in binary messages, and answers control frames."""

    CARRIED = (
        *("_close_frame", "_parser", "_pong", "_stream", "_unanswered_pings"),
        *("is_costly", "max_read_bytes"),
    )
    __slots__ = (*CARRIED, "_session", "_transport")

    is_raw = False
    direct_read_bytes = DIRECT_READ_BYTES

    def __init__(self, session: Session, transport: Transport, stream: Stream) -> None:
        """`stream`: for the content of the messages."""
        self._session = session
        self._transport = transport
        self._stream = stream
        self._parser = FrameParser(must_be_masked=True)
        self._pong = b""  # the newest Pong, while the client leaves much unread
        self._close_frame = b""  # the answer to the client's Close, or to its error
        self._unanswered_pings = 0  # since the last byte from the client
        self.max_read_bytes = FIRST_READ_BYTES
        self.is_costly = False

    def receive(self, data: memoryview) -> None:
        """Pass on the payload of the frames in `data`, and answer control frames."""
        self._unanswered_pings = 0
        self._transport.note_activity()
        payload: list[Bytes] = []
        pongs: list[bytes] = []
        events = 1  # one too many, to avoid a division by zero
        for event in self._events(data):
            events += 1
            if event.opcode == BINARY:
                payload.append(event.payload)
                if self._session.pair is None:  # each piece can change the state
                    self._pass_on(payload, pongs)
                    if event.is_last:
                        self._stream.message_ended()
                    if self._session.is_over:
                        return
            elif event.opcode == PING:
                pongs.append(build_frame(PONG, event.payload))
            elif event.opcode == CLOSE:  # 5.5.1: echo its code
                self._close_frame = build_frame(CLOSE, event.payload[:2])
                break
        self._pass_on(payload, pongs)  # while relaying, all of the read in one piece
        # Size the next read for FRAMES_PER_READ frames at most, if they are as dense as in this
        # one: up to four times its size, but FIRST_READ_BYTES at least.
        growth = min(4, FRAMES_PER_READ // events)
        self.max_read_bytes = min(max(growth * len(data), FIRST_READ_BYTES), FRAMED_READ_BYTES)
        # The next read may be full of empty frames, however many bytes the last frames had.
        self.is_costly = events > COSTLY_FRAMES or len(data) >= DIRECT_READ_BYTES
        if self._close_frame:
            self._session.client_ended()

    def _events(self, data: memoryview) -> Iterator[Event]:
        """Yield the events of a read. An error ends them, and is answered with a Close."""
        try:
            yield from self._parser.receive(data)
        except ProtocolError as error:
            self._close_frame = build_close(error.code)

    def _pass_on(self, payload: list[Bytes], pongs: list[bytes]) -> None:
        """Send the Pongs, pass the payload to the stream, and empty both lists."""
        if pongs:
            if self._transport.is_behind(PONG_BACKLOG_BYTES):  # 5.5.3: the newest is enough
                self._pong = pongs[-1]
            else:
                self._pong = b""
                self._transport.write(b"".join(pongs))
            pongs.clear()
        data = payload[0] if len(payload) == 1 else b"".join(payload)
        if data:
            self._stream.receive(data)
        payload.clear()

    def encode(self, data: Bytes) -> Sequence[Bytes]:
        """Return binary messages of at most MAX_MESSAGE_BYTES: header, slice, header, slice."""
        self._transport.note_activity()
        if len(data) <= MAX_MESSAGE_BYTES:
            return (frame_header(BINARY, len(data)), data)
        return split_message(data, MAX_MESSAGE_BYTES)

    def closing_bytes(self, reason: str) -> bytes:
        """Return the waiting Pong and a Close, which answers the client or tells the `reason`."""
        return self._pong + (self._close_frame or build_close(CLOSE_CODES[reason]))

    def backlog_sent(self) -> None:
        """Send the waiting Pong."""
        pong, self._pong = self._pong, b""
        if pong:
            self._transport.write(pong)
        self._transport.note_activity()

    def keep_alive(self) -> None:
        """Send a Ping, so that proxies keep the connection open.

        A waiting client that has not answered MAX_UNANSWERED_PINGS is ended. Pings are counted,
        not seconds, because a relay that was suspended has sent none. A paired client is not
        ended here, because the relay may not be reading it. No Ping is sent before the handshake
        or behind a backlog.
        """
        session, transport = self._session, self._transport
        if session.is_waiting and self._unanswered_pings >= MAX_UNANSWERED_PINGS:
            session.client_ended()
            return
        is_past_handshake = session.is_waiting or session.pair is not None
        if is_past_handshake and not transport.queued_bytes():
            transport.write(build_frame(PING))
            self._unanswered_pings += 1
        transport.note_activity()
