"""Parsing and building frames: the examples of RFC 6455, lengths, errors, and all splits.

streams.plain_reading and helpers.frame do not use ws_frames, so that a mistake which a parser and
its builder share is found. Numbers are sections of RFC 6455.
"""

from __future__ import annotations

import json
import random
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Optional

import pytest
from helpers import BINARY, CLOSE, CONTINUATION, PING, PONG, TEXT, close_payload, cut, frame, splits
from streams import Found, note, plain_reading, read

import ws_frames
from ws_frames import (
    TRANSLATED_BYTES,
    FrameParser,
    Place,
    ProtocolError,
    build_close,
    build_frame,
    frame_header,
    may_be_sent,
    unmask,
)

KEY = b"\x37\xfa\x21\x3d"  # 5.7
KEYS = [KEY, b"\0\0\0\1", b"\1\0\0\0", b"\xff\0\xff\0"]
ROLES = pytest.mark.parametrize("key", [KEY, None], ids=["from a client", "from a server"])


def few_splits(data: bytes) -> Iterator[list[bytes]]:
    """Cut a long frame in its header, near its end and at random. Also yield it whole."""
    yield [data]
    yield cut(data, range(1, 21))
    for n in (*range(1, 20), len(data) - 2, len(data) - 1):
        yield cut(data, [n])
    chance = random.Random(len(data))
    for _ in range(5):
        yield cut(data, chance.choices(range(len(data) + 1), k=20))


def binary(payload: bytes, is_last: bool = True) -> tuple[int, bytes, bool]:
    return BINARY, payload, is_last


# 5.7. A text frame is refused as it stands, then parsed as a binary frame.

HELLO = b"Hello"
BYTES_256, BYTES_65536 = bytes(range(256)), bytes(range(256)) * 256
EXAMPLES: dict[str, tuple[bytes, int, bytes, bool, bytes]] = {
    "unmasked text": (b"\x81\x05Hello", TEXT, HELLO, True, b""),
    "masked text": (b"\x81\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58", TEXT, HELLO, True, KEY),
    "first fragment": (b"\x01\x03Hel", TEXT, b"Hel", False, b""),
    "last fragment": (b"\x80\x02lo", CONTINUATION, b"lo", True, b""),
    "unmasked Ping": (b"\x89\x05Hello", PING, HELLO, True, b""),
    "masked Pong": (b"\x8a\x85\x37\xfa\x21\x3d\x7f\x9f\x4d\x51\x58", PONG, HELLO, True, KEY),
    "256 bytes": (b"\x82\x7e\x01\x00" + BYTES_256, BINARY, BYTES_256, True, b""),
    "64 KiB": (b"\x82\x7f\0\0\0\0\0\1\0\0" + BYTES_65536, BINARY, BYTES_65536, True, b""),
}


@pytest.mark.parametrize(
    ("wire", "opcode", "payload", "is_final", "key"), EXAMPLES.values(), ids=EXAMPLES
)
def test_examples(wire: bytes, opcode: int, payload: bytes, is_final: bool, key: bytes) -> None:
    assert build_frame(opcode, payload, is_final, key) == wire
    assert build_frame(opcode, memoryview(payload), is_final, key) == wire
    header = frame_header(opcode, len(payload), is_final, key)
    assert wire.startswith(header) and len(wire) == len(header) + len(payload)
    before, expected = b"", [(opcode, payload, is_final)]
    if opcode == TEXT:
        assert read([wire], bool(key)) == ([], 1003)
        wire = bytes([wire[0] ^ TEXT ^ BINARY]) + wire[1:]
        expected = [binary(payload, is_final)]
    elif opcode == CONTINUATION:
        before, expected = frame(BINARY, b"Hel", False, None), [binary(HELLO)]
    for pieces in few_splits(wire) if len(wire) > 1000 else splits(before + wire):
        assert read(pieces, bool(key)) == (expected, None), [len(piece) for piece in pieces]


# Valid streams. Each row has an Encoder of the stream and the content of the stream.

Encoder = Callable[[Optional[bytes]], bytes]  # takes the masking key


def frames(*rows: tuple[int, bytes] | tuple[int, bytes, bool]) -> Encoder:
    """Return an Encoder of frames. A row is an opcode, a payload, and whether it is final."""
    return lambda key: b"".join(frame(*row, key=key) for row in rows)


def joined(*encoders: Encoder) -> Encoder:
    return lambda key: b"".join(encode(key) for encode in encoders)


VALID: dict[str, tuple[Encoder, Found]] = {
    "nothing": (frames(), []),
    "an empty message": (frames((BINARY, b"")), [binary(b"")]),
    "one byte": (frames((BINARY, b"x")), [binary(b"x")]),
    "several messages": (
        frames((BINARY, b"12345"), (BINARY, b""), (BINARY, b"6")),
        [binary(b"12345"), binary(b""), binary(b"6")],
    ),
    "a fragmented message": (
        frames((BINARY, b"Hel", False), (CONTINUATION, b"l", False), (CONTINUATION, b"o")),
        [binary(HELLO)],
    ),
    "empty fragments": (
        frames(
            (BINARY, b"", False),
            (CONTINUATION, b"", False),
            (CONTINUATION, b"ab", False),
            (CONTINUATION, b"", False),
            (CONTINUATION, b""),
        ),
        [binary(b"ab")],
    ),
    "only empty fragments": (
        frames((BINARY, b"", False), (CONTINUATION, b"", False), (CONTINUATION, b"")),
        [binary(b"")],
    ),
    "control frames between fragments": (
        frames(
            (BINARY, b"a", False),
            (PING, b"one"),
            (CONTINUATION, b"", False),
            (PONG, b""),
            (CONTINUATION, b"b", False),
            (PING, b""),
            (CONTINUATION, b"c"),
            (BINARY, b"d"),
        ),
        [
            *(binary(b"a", False), (PING, b"one", True), (PONG, b"", True)),
            *(binary(b"b", False), (PING, b"", True), binary(b"c"), binary(b"d")),
        ],
    ),
    "Ping of 125 bytes": (frames((PING, b"p" * 125)), [(PING, b"p" * 125, True)]),
    "an unsolicited Pong": (frames((PONG, b"?")), [(PONG, b"?", True)]),
    "an unfinished message": (
        frames((BINARY, b"a", False), (CONTINUATION, b"b", False)),
        [binary(b"ab", False)],
    ),
    "an empty Close": (frames((BINARY, b"a"), (CLOSE, b"")), [binary(b"a"), (CLOSE, b"", True)]),
    "a Close": (frames((CLOSE, b"\x03\xe8")), [(CLOSE, b"\x03\xe8", True)]),
    "a Close within a message": (
        frames((BINARY, b"a", False), (CLOSE, b"\x03\xe9")),
        [binary(b"a", False), (CLOSE, b"\x03\xe9", True)],
    ),
    "a Close with a reason": (
        frames((CLOSE, close_payload(4999, "€ \U0001f600".encode()))),
        [(CLOSE, close_payload(4999, "€ \U0001f600".encode()), True)],
    ),
    "a Close with the longest reason": (
        frames((CLOSE, close_payload(3000, b"r" * 123))),
        [(CLOSE, close_payload(3000, b"r" * 123), True)],
    ),
    "text behind a Close": (frames((CLOSE, b""), (TEXT, b"?")), [(CLOSE, b"", True)]),
    **{
        f"{size} bytes": (
            frames((BINARY, b"m" * size), (PING, b"")),
            [binary(b"m" * size), (PING, b"", True)],
        )
        for size in (125, 126, 127, 128)
    },
}


@ROLES
@pytest.mark.parametrize(("encode", "expected"), VALID.values(), ids=VALID)
def test_valid_streams(encode: Encoder, expected: Found, key: bytes | None) -> None:
    stream = encode(key)
    assert plain_reading(stream, bool(key)) == (expected, None)
    for pieces in splits(stream):
        assert read(pieces, bool(key)) == (expected, None), pieces


@pytest.mark.parametrize("key", KEYS, ids=bytes.hex)
def test_any_key(key: bytes) -> None:
    encode, expected = VALID["control frames between fragments"]
    for pieces in splits(encode(key) + frame(BINARY, BYTES_256, key=key)):
        assert read(pieces, True) == ([*expected, binary(BYTES_256)], None), pieces


@ROLES
@pytest.mark.parametrize("size", [65535, 65536, 70_001])
def test_long_frames(size: int, key: bytes | None) -> None:
    payload = (BYTES_256 * 300)[:size]
    stream = frame(BINARY, payload, key=key) + frame(PING, b"behind", key=key)
    for pieces in few_splits(stream):
        assert read(pieces, bool(key)) == ([binary(payload), (PING, b"behind", True)], None)


@ROLES
@pytest.mark.parametrize("size", [2**63 - 1, 2**32, 65536])
def test_a_frame_that_is_shorter_than_its_length(size: int, key: bytes | None) -> None:
    mask = 0x80 if key else 0
    head = b"\x82" + bytes([mask | 127]) + size.to_bytes(8, "big") + (key or b"")
    stream = head + frame(BINARY, b"0123456", key=key)[-7:]
    for pieces in splits(stream):
        assert read(pieces, bool(key)) == ([binary(b"0123456", False)], None), pieces


# Invalid frames. Each row has an Encoder of the frames before, an Encoder of the invalid frame,
# the number of its bytes after which it is refused, and the Close code.


def with_length(opcode: int, length: bytes, key: bytes | None) -> bytes:
    """Return the start of a frame with an extended length of 0, 2 or 8 bytes."""
    short = {0: 0, 2: 126, 8: 127}[len(length)]
    return bytes([0x80 | opcode, (0x80 if key else 0) | short]) + length + (key or b"") + b"??"


def with_bits(opcode: int, bits: int, payload: bytes = b"ab") -> Encoder:
    """Return an Encoder of a frame whose first byte has these bits inverted."""

    def encode(key: bytes | None) -> bytes:
        valid = frame(opcode, payload, key=key)
        return bytes([valid[0] ^ bits]) + valid[1:]

    return encode


def other_role(opcode: int, payload: bytes = b"") -> Encoder:
    return lambda key: frame(opcode, payload, key=None if key else KEY)


def long_length(opcode: int, length: int, size: int) -> Encoder:
    return lambda key: with_length(opcode, length.to_bytes(size, "big"), key)


def close(payload: bytes) -> Encoder:
    return frames((CLOSE, payload))


NOTHING = frames()
MESSAGE = frames((BINARY, b"x"))
FRAGMENT = frames((BINARY, b"x", False))
WITH_PING = frames((BINARY, b"x", False), (PING, b"p"))
WHOLE = 0  # the frame is refused at its end

INVALID: dict[str, tuple[Encoder, Encoder, int, int]] = {
    **{f"reserved bits {bits:#x}": (MESSAGE, with_bits(2, bits), 2, 1002) for bits in (64, 32, 16)},
    "all reserved bits": (NOTHING, with_bits(BINARY, 0x70), 2, 1002),
    "a reserved bit of a Ping": (MESSAGE, with_bits(PING, 0x10), 2, 1002),
    "a reserved bit of a continuation": (FRAGMENT, with_bits(CONTINUATION, 0x40), 2, 1002),
    **{
        f"opcode {opcode}": (MESSAGE, frames((opcode, b"ab")), 2, 1002)
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    },
    "opcode 3 within a message": (FRAGMENT, frames((3, b"")), 2, 1002),
    "opcode 11 within a message": (FRAGMENT, frames((11, b"")), 2, 1002),
    "mask of a message": (MESSAGE, other_role(BINARY, b"ab"), 2, 1002),
    "mask of an empty message": (NOTHING, other_role(BINARY), 2, 1002),
    "mask of a continuation": (FRAGMENT, other_role(CONTINUATION, b"ab"), 2, 1002),
    "mask of a Ping": (MESSAGE, other_role(PING), 2, 1002),
    "mask of a Close": (MESSAGE, other_role(CLOSE, b"\x03\xe8"), 2, 1002),
    "mask of a text": (MESSAGE, other_role(TEXT, b"ab"), 2, 1002),
    "fragmented Ping": (MESSAGE, frames((PING, b"", False)), 2, 1002),
    "fragmented Pong": (FRAGMENT, frames((PONG, b"ab", False)), 2, 1002),
    "fragmented Close": (MESSAGE, frames((CLOSE, b"\x03\xe8", False)), 2, 1002),
    "Ping of 126 bytes": (MESSAGE, frames((PING, b"p" * 126)), 2, 1002),
    "Pong of 126 bytes": (MESSAGE, frames((PONG, b"p" * 126)), 2, 1002),
    "Close of 126 bytes": (MESSAGE, frames((CLOSE, close_payload(1000, b"r" * 124))), 2, 1002),
    "Ping of 64 KiB": (MESSAGE, long_length(PING, 65536, 8), 2, 1002),
    "Ping with a length that is not minimal": (MESSAGE, long_length(PING, 2, 2), 2, 1002),
    "a continuation without a message": (NOTHING, frames((CONTINUATION, b"ab")), 2, 1002),
    "a continuation after the end of a message": (MESSAGE, frames((CONTINUATION, b"")), 2, 1002),
    "a fragment without a message": (MESSAGE, frames((CONTINUATION, b"", False)), 2, 1002),
    "a message in a message": (FRAGMENT, frames((BINARY, b"ab")), 2, 1002),
    "a message after an empty first fragment": (frames((BINARY, b"", False)), MESSAGE, 2, 1002),
    "a first fragment in a message": (FRAGMENT, frames((BINARY, b"", False)), 2, 1002),
    "a message after a Ping in a message": (WITH_PING, frames((BINARY, b"ab")), 2, 1002),
    "text in a message": (FRAGMENT, frames((TEXT, b"ab")), 2, 1002),
    "text": (MESSAGE, frames((TEXT, b"ab")), 2, 1003),
    "empty text": (NOTHING, frames((TEXT, b"")), 2, 1003),
    "the first fragment of a text": (NOTHING, frames((TEXT, b"ab", False)), 2, 1003),
    "long text": (NOTHING, frames((TEXT, b"a" * 200)), 2, 1003),
    **{
        f"{length} in 16 bits": (MESSAGE, long_length(BINARY, length, 2), 4, 1002)
        for length in (0, 1, 125)
    },
    **{
        f"{length} in 64 bits": (MESSAGE, long_length(BINARY, length, 8), 10, 1002)
        for length in (0, 125, 126, 65535, 2**63, 2**63 + 1, 2**64 - 1)
    },
    "a continuation with 125 in 16 bits": (FRAGMENT, long_length(CONTINUATION, 125, 2), 4, 1002),
    "a Close of one byte": (MESSAGE, close(b"\x03"), WHOLE, 1002),
    "a Close of one NUL": (MESSAGE, close(b"\0"), WHOLE, 1002),
    "a Close with 1005": (MESSAGE, close(close_payload(1005)), WHOLE, 1002),
    "a Close with 1005 and no UTF-8": (NOTHING, close(close_payload(1005, b"\xff")), WHOLE, 1002),
    "a Close with 1006 within a message": (WITH_PING, close(close_payload(1006)), WHOLE, 1002),
    **{
        f"the reason {reason!r}": (MESSAGE, close(close_payload(1000, reason)), WHOLE, 1007)
        for reason in (
            *(b"\xff", b"good\x80", b"\xe2\x82", b"\xc0\xaf", b"\xed\xa0\x80"),
            *(b"\xf4\x90\x80\x80", b"\xf8\x88\x80\x80\x80", b"r" * 122 + b"\xc3"),
        )
    },
}
IDS = [name.replace("\\", "") for name in INVALID]


@ROLES
@pytest.mark.parametrize(("before", "invalid", "size", "code"), INVALID.values(), ids=IDS)
def test_invalid_frames(
    before: Encoder, invalid: Encoder, size: int, code: int, key: bytes | None
) -> None:
    """In every split, the error follows the events of the valid frames."""
    start, refused = before(key), invalid(key)
    expected, _ = plain_reading(start, bool(key))
    stream = start + refused + frame(BINARY, b"not read any more", key=key)
    assert plain_reading(stream, bool(key)) == (expected, code)
    for pieces in splits(stream):
        assert read(pieces, bool(key)) == (expected, code), pieces
    refused_at = len(start) + (size or len(refused))
    assert read([stream[:refused_at]], bool(key)) == (expected, code)
    assert read([stream[: refused_at - 1]], bool(key)) == (expected, None)


def test_close_codes() -> None:
    """Accept those of 7.4.1 and 7.4.2 and IANA's 1012 to 1014. Refuse all others."""
    ranges = (range(1000, 1004), range(1007, 1012), range(1012, 1015), range(3000, 5000))
    valid = {code for codes in ranges for code in codes}
    for code in (*range(5002), 0x7FFF, 0xFFFF):
        assert may_be_sent(code) == (code in valid), code
        for key in (KEY, None):
            for payload in (close_payload(code), close_payload(code, b"reason")):
                expected = ([(CLOSE, payload, True)], None) if code in valid else ([], 1002)
                assert read([frame(CLOSE, payload, key=key)], bool(key)) == expected, code


# Pieces.


def kept_bytes(parser: FrameParser) -> int:
    """Return the number of stream bytes that the parser keeps."""
    return sum(len(value) for value in parser.place().values() if isinstance(value, bytes))


@ROLES
def test_payload_is_returned_as_it_arrives(key: bytes | None) -> None:
    stream = frame(BINARY, b"0123456789" * 20, key=key)
    header = len(stream) - 200
    parser = FrameParser(must_be_masked=bool(key))
    assert list(parser.receive(memoryview(stream)[:header])) == []
    assert list(parser.receive(memoryview(stream)[header : header + 3])) == [(2, b"012", False)]
    assert list(parser.receive(memoryview(b""))) == []
    assert list(parser.receive(memoryview(stream)[header + 3 : header + 5])) == [(2, b"34", False)]
    rest = list(parser.receive(memoryview(stream)[header + 5 :]))
    assert rest == [(BINARY, (b"0123456789" * 20)[5:], True)]


@ROLES
def test_an_empty_frame_is_one_event(key: bytes | None) -> None:
    """A caller that limits the number of frames must see the empty ones."""
    stream = VALID["only empty fragments"][0](key) + frame(BINARY, b"", key=key)
    for pieces in splits(stream):
        parser = FrameParser(must_be_masked=bool(key))
        events = [event for piece in pieces for event in parser.receive(memoryview(piece))]
        assert events == [(BINARY, b"", is_last) for is_last in (False, False, True, True)]


def test_unmasked_payload_is_not_copied() -> None:
    parser = FrameParser(must_be_masked=False)
    buffer = bytearray(frame(PING, b"p", key=None) + frame(BINARY, b"0123456789", key=None))
    for part in (memoryview(buffer)[:9], memoryview(buffer)[9:]):
        event = next(event for event in parser.receive(part) if event.opcode == BINARY)
        assert isinstance(event.payload, memoryview) and event.payload.obj is buffer


@ROLES
def test_other_payload_does_not_refer_to_the_buffer(key: bytes | None) -> None:
    buffer = bytearray(frame(PING, b"ping", key=key) + frame(BINARY, b"data", key=KEY))
    parser, events = FrameParser(must_be_masked=bool(key)), []
    try:
        for event in parser.receive(memoryview(buffer)):
            events.append(event)
    except ProtocolError:
        assert not key
    buffer[:] = b"\xff" * len(buffer)
    assert [event.payload for event in events] == [b"ping", b"data"][: 2 if key else 1]


def test_a_frame_of_4_gib_is_not_assembled() -> None:
    """The parser keeps none of its bytes."""
    piece = memoryview(bytes(1 << 16))
    parser = FrameParser(must_be_masked=False)
    header = b"\x82\x7f" + (1 << 32).to_bytes(8, "big")
    assert list(parser.receive(memoryview(header))) == []
    total = 0
    for number in range(1 << 16):
        for event in parser.receive(piece):
            total += len(event.payload)
            assert event.is_last == (number == (1 << 16) - 1)
        assert kept_bytes(parser) == 0
    assert total == 1 << 32
    assert list(parser.receive(memoryview(b"\x89\0"))) == [(PING, b"", True)]


def test_a_masked_frame_is_not_assembled() -> None:
    parser = FrameParser(must_be_masked=True)
    piece = memoryview(bytes(1 << 16))
    tracemalloc.start()
    try:
        header = b"\x82\xff" + (1 << 32).to_bytes(8, "big") + KEY
        for data in (memoryview(header), *[piece] * 100):
            for event in parser.receive(data):
                assert len(event.payload) == len(data) and not event.is_last
            assert kept_bytes(parser) <= 14
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * len(piece)  # two payloads, and the copy of one


@ROLES
def test_the_kept_bytes_are_bounded(key: bytes | None) -> None:
    """The parser keeps at most a control frame and its key."""
    names = "control frames between fragments", "Ping of 125 bytes", "126 bytes"
    stream = joined(*(VALID[name][0] for name in names))(key)
    parser = FrameParser(must_be_masked=bool(key))
    kept = 0
    for n in range(len(stream)):
        for _ in parser.receive(memoryview(stream[n : n + 1])):
            pass
        kept = max(kept, kept_bytes(parser))
    assert kept == (124 + 4 if key else 124)


# The carried state.


def test_carried_fields() -> None:
    """They are all slots. A missing field keeps its value; an unknown one is refused."""
    parser = FrameParser(must_be_masked=True)
    assert sorted(FrameParser.CARRIED) == sorted(FrameParser.__slots__) == sorted(parser.place())
    before = dict(parser.place())
    parser.resume({"_left": 7})
    assert parser.place() == {**before, "_left": 7}
    with pytest.raises(ValueError, match="FrameParser has no _unknown"):
        parser.resume({"_left": 8, "_unknown": b""})
    assert parser.place() == {**before, "_left": 7}


def carried(place: Place) -> dict[str, bytes | int]:
    """Encode a place as text and decode it. It must consist of bytes and numbers."""
    assert {type(value) for value in place.values()} <= {bytes, int, bool}
    text = json.dumps({k: [v.hex()] if isinstance(v, bytes) else v for k, v in place.items()})
    assert len(text) < 1000, "a place is small"
    return {
        name: bytes.fromhex(value[0]) if isinstance(value, list) else value
        for name, value in json.loads(text).items()
    }


@ROLES
@pytest.mark.parametrize(
    "encode",
    [row[0] for row in VALID.values()] + [joined(*row[:2]) for row in INVALID.values()],
    ids=[*VALID, *IDS],
)
def test_another_parser_resumes_anywhere(encode: Encoder, key: bytes | None) -> None:
    """The events are the same if the state is carried to a new parser after each byte."""
    stream = encode(key)
    whole = plain_reading(stream, bool(key))
    found: Found = []
    code = None
    parser = FrameParser(must_be_masked=bool(key))
    for n in range(len(stream)):
        try:
            for event in parser.receive(memoryview(stream[n : n + 1])):
                note(found, event.opcode, bytes(event.payload), event.is_last)
        except ProtocolError as error:
            code = error.code
        if code or (found and found[-1][0] == CLOSE):
            break
        other = FrameParser(must_be_masked=not key)  # `resume` sets the role too
        other.resume(carried(parser.place()))
        assert other.place() == parser.place()
        parser = other
    assert (found, code) == whole


# Frames to send.


@pytest.mark.parametrize("opcode", sorted(ws_frames.OPCODES))
@pytest.mark.parametrize("is_final", [True, False])
@pytest.mark.parametrize("key", [b"", KEY, KEYS[1]], ids=bytes.hex)
def test_built_frames(opcode: int, is_final: bool, key: bytes) -> None:
    for size in (0, 1, 2, 3, 4, 5, 124, 125, 126, 127, 128, 65534, 65535, 65536, 65537):
        payload = BYTES_65536[1:size] + b"?" * (size - max(0, len(BYTES_65536[1:size])))
        expected = frame(opcode, payload, is_final, key or None)
        assert build_frame(opcode, payload, is_final, key) == expected, size
        header = frame_header(opcode, size, is_final, key)
        assert header == expected[: len(expected) - size], size


def test_default_arguments() -> None:
    assert build_frame(PING) == b"\x89\0" and frame_header(BINARY, 5) == b"\x82\5"
    assert frame_header(BINARY, 2**63 - 1) == b"\x82\x7f\x7f" + b"\xff" * 7


@pytest.mark.parametrize("key", [b"", KEY], ids=["from a server", "from a client"])
def test_built_closes(key: bytes) -> None:
    for code in (1000, 1001, 1002, 1003, 1007, 1013, 4999):
        assert build_close(code, key) == frame(CLOSE, close_payload(code), key=key or None)
        assert read([build_close(code, key)], bool(key)) == ([(8, close_payload(code), True)], None)


# Masking.

# Around the length from which unmask uses translations, and around 16 and 64 KiB.
NEAR = [n + d for n in (TRANSLATED_BYTES, 16_384, 16_412, 65_536) for d in range(-5, 6)]


def xor(data: bytes, key: bytes, phase: int = 0) -> bytes:
    """Mask `data` as 5.3 says. Byte 0 meets the byte `phase` of the key."""
    return bytes(byte ^ key[(n + phase) % 4] for n, byte in enumerate(data))


@pytest.mark.parametrize("key", [*KEYS, bytes(4), b"\xff" * 4], ids=bytes.hex)
def test_unmask(key: bytes) -> None:
    for size in (*range(20), 125, 1400, *NEAR):
        data = (BYTES_65536 * 2)[7 : 7 + size]
        masked = xor(data, key)
        for given in (data, memoryview(data), memoryview(bytearray(data))):
            result = unmask(given, key)
            assert isinstance(result, (bytes, bytearray)) and result == masked, size
        assert unmask(masked, key) == data, size


def test_unmask_with_every_byte_of_a_key() -> None:
    data = (BYTES_256 * 9)[:TRANSLATED_BYTES]
    for byte in range(256):
        key = bytes((byte, 255 - byte, byte ^ 0x55, 7))
        assert unmask(data, key) == xor(data, key), byte


@pytest.mark.parametrize("phase", range(4))
def test_a_piece_may_begin_at_every_phase_of_the_key(phase: int) -> None:
    """Pieces of all lengths near the limits are unmasked at each phase, and the one behind them."""
    for size in (*range(1, 9), 1400, *NEAR):
        payload = (BYTES_65536 * 2)[3 : 3 + phase + size + 5]
        stream = frame(BINARY, payload, key=KEY)
        header = len(stream) - len(payload)
        parser = FrameParser(must_be_masked=True)
        received = b""
        for piece in cut(stream, [header + phase, header + phase + size]):
            for event in parser.receive(memoryview(piece)):
                received += event.payload
        assert received == payload, size


def test_unmask_takes_bounded_memory() -> None:
    """Neither the result of a call nor a cache grows with the number of lengths."""
    data = memoryview(bytes(70_000))
    tracemalloc.start()
    try:
        for size in range(60_000, 60_100):
            unmask(data[:size], KEY)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 10_000 and peak < 3 * 60_100


@ROLES
def test_built_frames_are_parsed(key: bytes | None) -> None:
    """Only a parser of the right role accepts them."""
    stream = b"".join(
        build_frame(opcode, payload, is_final, key or b"")
        for opcode, payload, is_final in [
            (BINARY, b"", True),
            (BINARY, b"1" * 126, False),
            (PING, b"2", True),
            (CONTINUATION, b"3", True),
            (CLOSE, close_payload(1001, b"bye"), True),
        ]
    )
    assert read([stream], bool(key)) == (
        [
            *(binary(b""), binary(b"1" * 126, False), (PING, b"2", True), binary(b"3")),
            (CLOSE, close_payload(1001, b"bye"), True),
        ],
        None,
    )
    assert read([stream], not key) == ([], 1002)
