# SPDX-License-Identifier: MIT
"""WebSocket (RFC 6455) as bytes in, events and bytes out: for servers and for clients.

There is no socket here, no clock, no randomness and no log; nothing waits and nothing is kept
but the place in the stream. Whoever has a socket feeds what came to a reader, in pieces of any
size, and sends what the builders give. The numbers at the checks are sections of RFC 6455,
unless they say otherwise.

    The opening handshake    RequestReader, Request       a server's side
                             upgrade_request, AnswerReader  a client's side
    Frames, received         FrameParser, Event           both: it is told who must mask
    Frames, to be sent       frame_header, build_frame    both: a client gives a masking key

The framer is minimal on purpose. It knows no extension and no subprotocol, and takes binary
messages only. It does not assemble messages: payload is handed on as it arrives, so that a
frame of 4 GiB costs no more memory than one of 4 KiB. Only what must be judged whole is kept,
and each is small: a head (8 KiB), a frame's header (14 bytes), a control frame's payload (125).

Every reader keeps its place in named fields: `place` takes them out, `resume` puts them into
another reader, between any two bytes. (The relay needs neither this nor a client's side to
serve; they are for handing connections over, and for probes and benchmarks.) However a stream
is cut, it gives the same events, and the same error behind them.

Errors are typed by blame:

    ProtocolError      the peer broke the rules of frames; `code` is the Close code to send
    UpgradeRejected    the request cannot be served; `status` and `answer` are HTTP's
    UpgradeFailed      the server's answer to our request is no upgrade

Any other exception is a mistake of ours, or of the caller's.
"""

from __future__ import annotations

import binascii
import hashlib
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple, Union

Bytes = Union[bytes, memoryview]
Place = Mapping[str, Union[bytes, int]]

# Opcodes, 5.2.
CONTINUATION, TEXT, BINARY = 0x0, 0x1, 0x2
CLOSE, PING, PONG = 0x8, 0x9, 0xA
OPCODES = frozenset((CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG))
CONTROL = 0x8  # 5.5: the bit that control frames have

# The bits of a frame's first two bytes, and what the length in the second may stand for. 5.2.
FINAL = 0x80
RESERVED = 0x70
OPCODE = 0x0F
MASKED = 0x80
LENGTH = 0x7F
LENGTH_IN_16_BITS, LENGTH_IN_64_BITS = 126, 127
MAX_HEADER_BYTES = 14  # these two, a length in 8, a key in 4
MAX_CONTROL_BYTES = 125  # 5.5

# Close codes, 7.4.1.
NORMAL = 1000
GOING_AWAY = 1001
PROTOCOL_ERROR = 1002
UNSUPPORTED_DATA = 1003
INVALID_DATA = 1007

# What RFC 7230 says of heads, and our limit.
MAX_HEAD_BYTES = 8 * 1024  # as nginx and the websockets library
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"  # 3.2.6
REQUEST_LINE = re.compile(rb"(" + TOKEN + rb") ([!-~\x80-\xff]+) HTTP/1\.([01])\r?\n")  # 3.1.1
# What may still become one, or at least shows no sign of being something else.
REQUEST_LINE_BEGUN = re.compile(rb"(?:" + TOKEN + rb"(?: [!-~\x80-\xff]*(?: [!-~]*\r?)?)?)?")
STATUS_LINE = re.compile(rb"HTTP/1\.[01] ([0-9]{3})(?: [ -~\t\x80-\xff]*)?\r?\n")  # 3.1.2
FIELD = re.compile(rb"(" + TOKEN + rb"):([ -~\t\x80-\xff]*)\r?\n")  # 3.2; no obsolete folding
END_OF_HEAD = re.compile(rb"\n\r?\n")  # 3.5: a lone line feed will do

ACCEPT_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # 1.3
KEY = re.compile(r"[A-Za-z0-9+/]{22}==")  # 4.1: 16 bytes in base64
VERSION = "13"  # 4.1
METHODS = ("GET", "HEAD", "OPTIONS")  # of requests that want no upgrade; all else gets a 405
REASONS = {
    200: "OK",
    400: "Bad Request",
    405: "Method Not Allowed",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
}


class ProtocolError(Exception):
    """The peer broke a rule of frames: the connection fails (7.1.7) with the Close code `code`."""

    def __init__(self, code: int, what: str) -> None:
        super().__init__(what)
        self.code = code


class UpgradeRejected(Exception):
    """A request that cannot be served. `status`: HTTP's number; `answer`: what is to be sent."""

    def __init__(self, status: int, what: str, *fields: str, method: str = "GET") -> None:
        super().__init__(what)
        self.status = status
        self.answer = http_answer(status, what + "\n", *fields, method=method)


class UpgradeFailed(Exception):
    """What the server answered is no upgrade, or not one of the request that we sent."""


class Reader:
    """Something that is fed a stream in pieces, and keeps its place in named fields."""

    __slots__ = ()

    def place(self) -> Place:
        """Take the fields out, by name: numbers and bytes."""
        names = (name for cls in type(self).__mro__ for name in getattr(cls, "__slots__", ()))
        return {name: getattr(self, name) for name in names}

    def resume(self, place: Place) -> None:
        """Go on at the place that was taken out of a reader of the same kind."""
        for name, value in place.items():
            setattr(self, name, value)


# ---------------------------------------------------------------------------------------------
# The opening handshake, section 4
#
# A head of HTTP/1.1 each way. A server reads a Request, sees whether it `wants_websocket`, and
# if so lets it `accept`; what else came by HTTP it may answer with `http_answer`.
# ---------------------------------------------------------------------------------------------


class HeadReader(Reader):
    """Collects a head, which ends with an empty line."""

    __slots__ = ("_head",)

    def __init__(self) -> None:
        self._head = b""

    def _collect(self, data: Bytes) -> int | None:
        """Add `data` to the head. If that makes it whole, give how much of `data` is its."""
        seen = len(self._head)
        self._head += data[: MAX_HEAD_BYTES - seen]
        end = END_OF_HEAD.search(self._head, max(0, seen - 2))
        if end is None:
            return None
        self._head = self._head[: end.end()]
        return end.end() - seen

    def _is_full(self) -> bool:
        return len(self._head) == MAX_HEAD_BYTES


class RequestReader(HeadReader):
    """Reads a request's head."""

    __slots__ = ()

    def receive(self, data: Bytes) -> tuple[Request, Bytes] | None:
        """Give the request and what came behind its head; None as long as it is not whole.

        Raises UpgradeRejected: 400 if this is not HTTP (which the first bytes may show, and the
        end of the request line does), 431 if the head does not end.
        """
        taken = self._collect(data)
        if taken is not None:
            return parse_request(self._head), data[taken:]
        line, newline, _ = self._head.partition(b"\n")
        if not (REQUEST_LINE if newline else REQUEST_LINE_BEGUN).fullmatch(line + newline):
            raise UpgradeRejected(400, "this is not HTTP/1.1")
        if self._is_full():
            method = line.partition(b" ")[0].decode("ascii")
            raise UpgradeRejected(431, f"a head of over {MAX_HEAD_BYTES} bytes", method=method)
        return None


class Fields(dict[str, list[str]]):
    """The fields of a head: all values of each, by its name in lower case."""

    def tokens(self, name: str) -> set[str]:
        """A field that is a list, in lower case. RFC 7230, 3.2.2 and 7."""
        return {token.strip(" \t").lower() for v in self.get(name, ()) for token in v.split(",")}

    def only(self, name: str) -> str | None:
        """The value of a field that is there just once."""
        values = self.get(name, ())
        return values[0] if len(values) == 1 else None


class Request(NamedTuple):
    """A request's head."""

    method: str
    target: str
    is_http_1_0: bool
    fields: Fields

    @property
    def wants_websocket(self) -> bool:
        """Whether this asks for an upgrade to WebSocket, however badly."""
        return "websocket" in self.fields.tokens("upgrade")

    def accept(self) -> bytes:
        """Give the answer that makes this connection a WebSocket: 4.2.2.

        Any target, host and origin will do; what the client offers beyond the protocol is
        declined by leaving it out. Raises UpgradeRejected if 4.2.1 is not kept. (That Upgrade
        names websocket, its point 3, is `wants_websocket`.)
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


def parse_request(head: bytes) -> Request:
    """Read a whole head. Raises UpgradeRejected."""
    line = REQUEST_LINE.match(head)
    if line is None:
        raise UpgradeRejected(400, "this is not HTTP/1.1")
    method = line[1].decode("ascii")
    fields = parse_fields(head, line.end())
    if fields is None:
        raise UpgradeRejected(400, "a field of the head is malformed", method=method)
    return Request(method, line[2].decode("latin-1"), line[3] == b"0", fields)


def parse_fields(head: bytes, at: int) -> Fields | None:
    """Read the fields of a head, from the byte `at` on. None: they are not well-formed."""
    fields = Fields()
    end = END_OF_HEAD.search(head, at - 1)
    assert end is not None, "the head is not whole"
    while at <= end.start():
        field = FIELD.match(head, at)
        if field is None:
            return None
        value = field[2].strip(b" \t").decode("latin-1")
        fields.setdefault(field[1].decode("ascii").lower(), []).append(value)
        at = field.end()
    return fields


def accept_key(key: str) -> str:
    """What answers a Sec-WebSocket-Key: 4.2.2, item 4 of point 5."""
    digest = hashlib.sha1(key.encode("ascii") + ACCEPT_GUID, usedforsecurity=False).digest()
    return base64_text(digest)


def base64_text(data: bytes) -> str:
    """Spell bytes for a head."""
    return binascii.b2a_base64(data, newline=False).decode("ascii")


def http_answer(status: int, text: str, *fields: str, method: str = "GET") -> bytes:
    """Build an answer that ends the connection: plain text, but only its length for a HEAD."""
    body = text.encode()
    head = (
        f"HTTP/1.1 {status} {REASONS[status]}",
        *fields,
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
    )
    return "\r\n".join((*head, "", "")).encode("ascii") + (b"" if method == "HEAD" else body)


def not_allowed(method: str) -> UpgradeRejected:
    """The refusal of a method. RFC 7231, 6.5.5."""
    allowed = ", ".join(METHODS)
    return UpgradeRejected(405, f"this takes {allowed}", f"Allow: {allowed}", method=method)


def upgrade_request(host: str, target: str, nonce: bytes) -> bytes:
    """Build a client's request: 4.1. `nonce`: 16 bytes that nobody could guess."""
    return (
        f"GET {target} HTTP/1.1\r\n"
        f"Host: {host}\r\n"
        "Upgrade: websocket\r\n"
        "Connection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {base64_text(nonce)}\r\n"
        f"Sec-WebSocket-Version: {VERSION}\r\n\r\n"
    ).encode("ascii")


class AnswerReader(HeadReader):
    """Reads a server's answer to `upgrade_request`."""

    __slots__ = ("_nonce",)

    def __init__(self, nonce: bytes) -> None:
        """`nonce`: what the request was built with."""
        super().__init__()
        self._nonce = nonce

    def receive(self, data: Bytes) -> Bytes | None:
        """Give what came behind the answer, once it is whole and good. Raises UpgradeFailed."""
        taken = self._collect(data)
        if taken is not None:
            self._check()
            return data[taken:]
        if self._is_full():
            raise UpgradeFailed(f"the answer's head is longer than {MAX_HEAD_BYTES} bytes")
        return None

    def _check(self) -> None:
        """What 4.1 says of the server's answer, 1 to 6."""
        line = STATUS_LINE.match(self._head)
        fields = parse_fields(self._head, line.end()) if line else None
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
            raise UpgradeFailed("the answer takes up what we did not offer")


# ---------------------------------------------------------------------------------------------
# Frames, received: section 5
#
# A frame is a header and a payload. The header is judged as soon as it is whole, from front to
# back; the payload of a data frame is given as it comes, that of a control frame when all of it
# is there. Fragments of a message and the frames in between need no more than one bit.
# ---------------------------------------------------------------------------------------------


class Event(NamedTuple):
    """What a FrameParser has found.

    BINARY   a piece of a binary message, empty only if its frame is; `is_last`: the message
             ends behind it
    PING     a whole Ping, to be answered with a Pong of the same payload: 5.5.2
    PONG     a whole Pong: 5.5.3
    CLOSE    a whole Close, checked: its payload is empty, or two bytes of code and a reason
    """

    opcode: int
    payload: Bytes  # of BINARY, if it was not masked: good until the caller's buffer changes
    is_last: bool = True


class FrameParser(Reader):
    """Reads frames, of one role: it is told whether they must be masked (5.1).

    What comes behind a Close, or behind an error, is not for it: there is nothing to read.
    """

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

    def __init__(self, must_be_masked: bool) -> None:
        """What a server reads must be masked, what a client reads must not."""
        self._must_be_masked = must_be_masked
        self._header = b""  # of a frame whose header is not whole yet
        self._opcode = -1  # of the frame whose payload is being read; -1: none is
        self._is_final = False  # ... whether it is the last of its message
        self._left = 0  # ... how many bytes of it are to come
        self._key = b""  # ... the key, turned so that it begins with the next byte's
        self._control = b""  # ... what came of it, still masked, if it is a control frame
        self._in_message = False  # a data frame that was not final came, and its rest has not

    def receive(self, data: memoryview) -> Iterator[Event]:
        """Give what is in `data`, the next bytes of the stream.

        To be used up before `data` is changed, or the next is received. Raises ProtocolError,
        behind all that came before the error.
        """
        if self._header:
            data = memoryview(self._header + data)
            self._header = b""
        at = 0
        while True:
            if self._opcode < 0:
                size = self._begin_frame(data[at : at + MAX_HEADER_BYTES])
                if not size:
                    self._header = bytes(data[at:])
                    return
                at += size
            piece = data[at : at + self._left]
            at += len(piece)
            self._left -= len(piece)
            is_whole = not self._left
            if self._opcode & CONTROL:
                self._control += piece
                if is_whole:
                    yield self._end_control()
            else:
                is_last = is_whole and self._is_final
                if is_last:
                    self._in_message = False
                if piece or is_whole:
                    yield Event(BINARY, self._unmask(piece), is_last)
            if not is_whole:
                return
            self._opcode = -1

    def _begin_frame(self, data: memoryview) -> int:
        """Read the header at the front of `data`: give its size, or 0 if it is not whole."""
        if len(data) < 2:
            return 0
        first, second = data[0], data[1]
        opcode, is_final = first & OPCODE, bool(first & FINAL)
        if first & RESERVED:  # 5.2: no extension has given them a meaning
            raise ProtocolError(PROTOCOL_ERROR, "a reserved bit is set")
        if opcode not in OPCODES:  # 5.2
            raise ProtocolError(PROTOCOL_ERROR, "an unknown opcode")
        if bool(second & MASKED) != self._must_be_masked:  # 5.1
            raise ProtocolError(PROTOCOL_ERROR, "masked, or not, against the rule")
        length = second & LENGTH
        if opcode & CONTROL:
            if not is_final or length > MAX_CONTROL_BYTES:  # 5.5
                raise ProtocolError(PROTOCOL_ERROR, "a control frame in parts, or too long")
        elif (opcode == CONTINUATION) != self._in_message:  # 5.4
            raise ProtocolError(PROTOCOL_ERROR, "a continuation of nothing, or none where due")
        elif opcode == TEXT:  # 7.4.1: we understand binary data only
            raise ProtocolError(UNSUPPORTED_DATA, "a text message")

        size = 2
        if length == LENGTH_IN_16_BITS:
            size, least = 4, LENGTH_IN_16_BITS
        elif length == LENGTH_IN_64_BITS:
            size, least = 10, 1 << 16
        if len(data) < size:
            return 0
        if size > 2:
            length = int.from_bytes(data[2:size], "big")
            if not least <= length < 1 << 63:  # 5.2: the shortest way; the highest bit is 0
                raise ProtocolError(PROTOCOL_ERROR, "a length that is none, or not minimal")
        if self._must_be_masked:
            size += 4
            if len(data) < size:
                return 0
            self._key = bytes(data[size - 4 : size])
        self._opcode = opcode
        self._is_final = is_final
        self._left = length
        if not opcode & CONTROL:
            self._in_message = True
        return size

    def _unmask(self, piece: memoryview) -> Bytes:
        """5.3. Turns the key to where the next piece of the frame needs it."""
        if not self._key:
            return piece
        plain = unmask(piece, self._key)
        turn = len(piece) & 3
        self._key = self._key[turn:] + self._key[:turn]
        return plain

    def _end_control(self) -> Event:
        """A control frame is whole."""
        payload = unmask(self._control, self._key) if self._key else self._control
        self._control = b""
        if self._opcode == CLOSE:
            check_close(payload)
        return Event(self._opcode, payload)


def unmask(data: Bytes, key: bytes) -> bytes:
    """Mask or unmask `data` with a key of four bytes: 5.3.

    As one number: there is no faster way in the standard library.
    """
    size = len(data)
    pad = (key * ((size + 3) // 4))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")


def check_close(payload: bytes) -> None:
    """Check that a Close's payload is what 5.5.1 says. Raises ProtocolError."""
    if not payload:
        return
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not may_be_sent(code):
        raise ProtocolError(PROTOCOL_ERROR, "a Close without a code that may be sent")
    try:
        payload[2:].decode("utf-8")
    except UnicodeDecodeError:
        raise ProtocolError(INVALID_DATA, "a Close whose reason is not UTF-8") from None


def may_be_sent(code: int) -> bool:
    """Whether a Close may carry this code: 7.4.1 and 7.4.2, and what IANA has added."""
    is_defined = 1000 <= code <= 1014 and code not in (1004, 1005, 1006)
    return is_defined or 3000 <= code <= 4999


# ---------------------------------------------------------------------------------------------
# Frames, to be sent: section 5.2
#
# A header alone for what is to be sent from where it lies, or a whole frame for what is short.
# ---------------------------------------------------------------------------------------------


def frame_header(opcode: int, length: int, is_final: bool = True, key: bytes = b"") -> bytes:
    """Build a frame's header; its payload of `length` bytes, masked with `key` if any, follows."""
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
    """Build a whole frame. `key`: four bytes that nobody could guess, if a client sends it."""
    header = frame_header(opcode, len(payload), is_final, key)
    return header + (unmask(payload, key) if key else payload)


def build_close(code: int, key: bytes = b"") -> bytes:
    """Build a Close frame with this code and no reason."""
    return build_frame(CLOSE, code.to_bytes(2, "big"), key=key)
