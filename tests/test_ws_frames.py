"""Frames, both ways: RFC 6455's examples, every length, every error, however they are cut.

streams.plain_reading and helpers.frame are written independently of ws_frames, so that a mistake in
a parser and its builder cannot hide. Numbers are sections of RFC 6455.
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
    """Ways of cutting a long frame: whole; in its header; near its end; and some at random."""
    yield [data]
    yield cut(data, range(1, 21))
    for n in (*range(1, 20), len(data) - 2, len(data) - 1):
        yield cut(data, [n])
    chance = random.Random(len(data))
    for _ in range(5):
        yield cut(data, chance.choices(range(len(data) + 1), k=20))


def binary(payload: bytes, is_last: bool = True) -> tuple[int, bytes, bool]:
    return BINARY, payload, is_last


# 5.7. We take no text, so its text frames come twice: as they stand, and as binary ones.

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


# What is right. A row: what makes the stream, given the key; what is in it.

Speller = Callable[[Optional[bytes]], bytes]


def at_key(*frames: tuple[int, bytes] | tuple[int, bytes, bool]) -> Speller:
    """What spells these frames: opcode, payload, and whether it is final."""
    return lambda key: b"".join(frame(*one, key=key) for one in frames)


def joined(*spellers: Speller) -> Speller:
    return lambda key: b"".join(encode(key) for encode in spellers)


GOOD: dict[str, tuple[Speller, Found]] = {
    "nothing": (at_key(), []),
    "an empty message": (at_key((BINARY, b"")), [binary(b"")]),
    "one byte": (at_key((BINARY, b"x")), [binary(b"x")]),
    "several messages": (
        at_key((BINARY, b"12345"), (BINARY, b""), (BINARY, b"6")),
        [binary(b"12345"), binary(b""), binary(b"6")],
    ),
    "a fragmented message": (
        at_key((BINARY, b"Hel", False), (CONTINUATION, b"l", False), (CONTINUATION, b"o")),
        [binary(HELLO)],
    ),
    "empty fragments": (
        at_key(
            (BINARY, b"", False),
            (CONTINUATION, b"", False),
            (CONTINUATION, b"ab", False),
            (CONTINUATION, b"", False),
            (CONTINUATION, b""),
        ),
        [binary(b"ab")],
    ),
    "nothing but empty fragments": (
        at_key((BINARY, b"", False), (CONTINUATION, b"", False), (CONTINUATION, b"")),
        [binary(b"")],
    ),
    "control frames between fragments": (
        at_key(
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
    "Ping of 125 bytes": (at_key((PING, b"p" * 125)), [(PING, b"p" * 125, True)]),
    "Pong that nobody asked for": (at_key((PONG, b"?")), [(PONG, b"?", True)]),
    "a message that is not ended": (
        at_key((BINARY, b"a", False), (CONTINUATION, b"b", False)),
        [binary(b"ab", False)],
    ),
    "an empty Close": (at_key((BINARY, b"a"), (CLOSE, b"")), [binary(b"a"), (CLOSE, b"", True)]),
    "a Close": (at_key((CLOSE, b"\x03\xe8")), [(CLOSE, b"\x03\xe8", True)]),
    "a Close within a message": (
        at_key((BINARY, b"a", False), (CLOSE, b"\x03\xe9")),
        [binary(b"a", False), (CLOSE, b"\x03\xe9", True)],
    ),
    "a Close with a reason": (
        at_key((CLOSE, close_payload(4999, "€ \U0001f600".encode()))),
        [(CLOSE, close_payload(4999, "€ \U0001f600".encode()), True)],
    ),
    "a Close with the longest reason": (
        at_key((CLOSE, close_payload(3000, b"r" * 123))),
        [(CLOSE, close_payload(3000, b"r" * 123), True)],
    ),
    "text behind a Close": (at_key((CLOSE, b""), (TEXT, b"?")), [(CLOSE, b"", True)]),
    **{
        f"{size} bytes": (
            at_key((BINARY, b"m" * size), (PING, b"")),
            [binary(b"m" * size), (PING, b"", True)],
        )
        for size in (125, 126, 127, 128)
    },
}


@ROLES
@pytest.mark.parametrize(("encode", "expected"), GOOD.values(), ids=GOOD)
def test_what_is_right(encode: Speller, expected: Found, key: bytes | None) -> None:
    stream = encode(key)
    assert plain_reading(stream, bool(key)) == (expected, None)
    for pieces in splits(stream):
        assert read(pieces, bool(key)) == (expected, None), pieces


@pytest.mark.parametrize("key", KEYS, ids=bytes.hex)
def test_any_key_will_do(key: bytes) -> None:
    encode, expected = GOOD["control frames between fragments"]
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
def test_a_frame_that_announces_more_than_it_brings(size: int, key: bytes | None) -> None:
    mask = 0x80 if key else 0
    head = b"\x82" + bytes([mask | 127]) + size.to_bytes(8, "big") + (key or b"")
    stream = head + frame(BINARY, b"0123456", key=key)[-7:]
    for pieces in splits(stream):
        assert read(pieces, bool(key)) == ([binary(b"0123456", False)], None), pieces


# What is wrong. A row: what makes the frames before it; the frame, given the key; behind how many
# of its bytes it is refused (as soon as it can be told); the code.


def with_length(opcode: int, length: bytes, key: bytes | None) -> bytes:
    """A frame whose length is spelled out in so many bytes, minimal or not."""
    short = {0: 0, 2: 126, 8: 127}[len(length)]
    return bytes([0x80 | opcode, (0x80 if key else 0) | short]) + length + (key or b"") + b"??"


def spoiled(opcode: int, bits: int, payload: bytes = b"ab") -> Speller:
    """A frame with other bits in its first byte."""

    def encode(key: bytes | None) -> bytes:
        good = frame(opcode, payload, key=key)
        return bytes([good[0] ^ bits]) + good[1:]

    return encode


def other_role(opcode: int, payload: bytes = b"") -> Speller:
    return lambda key: frame(opcode, payload, key=None if key else KEY)


def long_length(opcode: int, length: int, size: int) -> Speller:
    return lambda key: with_length(opcode, length.to_bytes(size, "big"), key)


def close(payload: bytes) -> Speller:
    return at_key((CLOSE, payload))


NOTHING = at_key()
MESSAGE = at_key((BINARY, b"x"))
BEGUN = at_key((BINARY, b"x", False))
WITH_PING = at_key((BINARY, b"x", False), (PING, b"p"))
WHOLE = 0  # the error can be told only at the frame's end

BAD: dict[str, tuple[Speller, Speller, int, int]] = {
    **{f"reserved bits {bits:#x}": (MESSAGE, spoiled(2, bits), 2, 1002) for bits in (64, 32, 16)},
    "all reserved bits": (NOTHING, spoiled(BINARY, 0x70), 2, 1002),
    "a reserved bit of a Ping": (MESSAGE, spoiled(PING, 0x10), 2, 1002),
    "a reserved bit of a continuation": (BEGUN, spoiled(CONTINUATION, 0x40), 2, 1002),
    **{
        f"opcode {opcode}": (MESSAGE, at_key((opcode, b"ab")), 2, 1002)
        for opcode in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)
    },
    "opcode 3 within a message": (BEGUN, at_key((3, b"")), 2, 1002),
    "opcode 11 within a message": (BEGUN, at_key((11, b"")), 2, 1002),
    "mask of a message": (MESSAGE, other_role(BINARY, b"ab"), 2, 1002),
    "mask of an empty message": (NOTHING, other_role(BINARY), 2, 1002),
    "mask of a continuation": (BEGUN, other_role(CONTINUATION, b"ab"), 2, 1002),
    "mask of a Ping": (MESSAGE, other_role(PING), 2, 1002),
    "mask of a Close": (MESSAGE, other_role(CLOSE, b"\x03\xe8"), 2, 1002),
    "mask of a text": (MESSAGE, other_role(TEXT, b"ab"), 2, 1002),
    "fragmented Ping": (MESSAGE, at_key((PING, b"", False)), 2, 1002),
    "fragmented Pong": (BEGUN, at_key((PONG, b"ab", False)), 2, 1002),
    "fragmented Close": (MESSAGE, at_key((CLOSE, b"\x03\xe8", False)), 2, 1002),
    "Ping of 126 bytes": (MESSAGE, at_key((PING, b"p" * 126)), 2, 1002),
    "Pong of 126 bytes": (MESSAGE, at_key((PONG, b"p" * 126)), 2, 1002),
    "Close of 126 bytes": (MESSAGE, at_key((CLOSE, close_payload(1000, b"r" * 124))), 2, 1002),
    "Ping of 64 KiB": (MESSAGE, long_length(PING, 65536, 8), 2, 1002),
    "Ping with a longer spelling": (MESSAGE, long_length(PING, 2, 2), 2, 1002),
    "a continuation of nothing": (NOTHING, at_key((CONTINUATION, b"ab")), 2, 1002),
    "a continuation of what is ended": (MESSAGE, at_key((CONTINUATION, b"")), 2, 1002),
    "a fragment of nothing": (MESSAGE, at_key((CONTINUATION, b"", False)), 2, 1002),
    "a message in a message": (BEGUN, at_key((BINARY, b"ab")), 2, 1002),
    "a message in an empty beginning": (at_key((BINARY, b"", False)), MESSAGE, 2, 1002),
    "a beginning in a message": (BEGUN, at_key((BINARY, b"", False)), 2, 1002),
    "a message behind a Ping in a message": (WITH_PING, at_key((BINARY, b"ab")), 2, 1002),
    "text in a message": (BEGUN, at_key((TEXT, b"ab")), 2, 1002),
    "text": (MESSAGE, at_key((TEXT, b"ab")), 2, 1003),
    "empty text": (NOTHING, at_key((TEXT, b"")), 2, 1003),
    "the beginning of a text": (NOTHING, at_key((TEXT, b"ab", False)), 2, 1003),
    "long text": (NOTHING, at_key((TEXT, b"a" * 200)), 2, 1003),
    **{
        f"{length} in 16 bits": (MESSAGE, long_length(BINARY, length, 2), 4, 1002)
        for length in (0, 1, 125)
    },
    **{
        f"{length} in 64 bits": (MESSAGE, long_length(BINARY, length, 8), 10, 1002)
        for length in (0, 125, 126, 65535, 2**63, 2**63 + 1, 2**64 - 1)
    },
    "a continuation with 125 in 16 bits": (BEGUN, long_length(CONTINUATION, 125, 2), 4, 1002),
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
IDS = [name.replace("\\", "") for name in BAD]


@ROLES
@pytest.mark.parametrize(("before", "wrong", "size", "code"), BAD.values(), ids=IDS)
def test_what_is_wrong(
    before: Speller, wrong: Speller, size: int, code: int, key: bytes | None
) -> None:
    """The error comes behind all that was right, however the stream is cut."""
    start, frames = before(key), wrong(key)
    expected, _ = plain_reading(start, bool(key))
    stream = start + frames + frame(BINARY, b"not read any more", key=key)
    assert plain_reading(stream, bool(key)) == (expected, code)
    for pieces in splits(stream):
        assert read(pieces, bool(key)) == (expected, code), pieces
    told = len(start) + (size or len(frames))
    assert read([stream[:told]], bool(key)) == (expected, code)
    assert read([stream[: told - 1]], bool(key)) == (expected, None)


def test_the_close_codes_that_may_be_sent() -> None:
    """7.4.1, 7.4.2 and IANA's 1012 to 1014; all others are refused, with or without a reason."""
    ranges = (range(1000, 1004), range(1007, 1012), range(1012, 1015), range(3000, 5000))
    good = {code for some in ranges for code in some}
    for code in (*range(5002), 0x7FFF, 0xFFFF):
        assert may_be_sent(code) == (code in good), code
        for key in (KEY, None):
            for payload in (close_payload(code), close_payload(code, b"reason")):
                expected = ([(CLOSE, payload, True)], None) if code in good else ([], 1002)
                assert read([frame(CLOSE, payload, key=key)], bool(key)) == expected, code


# In pieces.


def place_bytes(parser: FrameParser) -> int:
    """How much a parser keeps."""
    return sum(len(value) for value in parser.place().values() if isinstance(value, bytes))


@ROLES
def test_payload_is_handed_on_as_it_arrives(key: bytes | None) -> None:
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
def test_an_empty_frame_is_an_event_too(key: bytes | None) -> None:
    """And just one: who counts frames can count these."""
    stream = GOOD["nothing but empty fragments"][0](key) + frame(BINARY, b"", key=key)
    for pieces in splits(stream):
        parser = FrameParser(must_be_masked=bool(key))
        events = [event for piece in pieces for event in parser.receive(memoryview(piece))]
        assert events == [(BINARY, b"", is_last) for is_last in (False, False, True, True)]


def test_payload_that_is_not_masked_is_not_copied() -> None:
    parser = FrameParser(must_be_masked=False)
    buffer = bytearray(frame(PING, b"p", key=None) + frame(BINARY, b"0123456789", key=None))
    for part in (memoryview(buffer)[:9], memoryview(buffer)[9:]):
        event = next(event for event in parser.receive(part) if event.opcode == BINARY)
        assert isinstance(event.payload, memoryview) and event.payload.obj is buffer


@ROLES
def test_all_else_outlives_the_buffer(key: bytes | None) -> None:
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
    """All of it, from one buffer: the parser's place stays as small as it was."""
    piece = memoryview(bytes(1 << 16))
    parser = FrameParser(must_be_masked=False)
    header = b"\x82\x7f" + (1 << 32).to_bytes(8, "big")
    assert list(parser.receive(memoryview(header))) == []
    total = 0
    for number in range(1 << 16):
        for event in parser.receive(piece):
            total += len(event.payload)
            assert event.is_last == (number == (1 << 16) - 1)
        assert place_bytes(parser) == 0
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
            assert place_bytes(parser) <= 14
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1 << 20  # one piece, its key as long, their numbers, and the result


@ROLES
def test_little_is_kept_between_any_two_bytes(key: bytes | None) -> None:
    """At most a control frame, and its key."""
    names = "control frames between fragments", "Ping of 125 bytes", "126 bytes"
    stream = joined(*(GOOD[name][0] for name in names))(key)
    parser = FrameParser(must_be_masked=bool(key))
    kept = 0
    for n in range(len(stream)):
        for _ in parser.receive(memoryview(stream[n : n + 1])):
            pass
        kept = max(kept, place_bytes(parser))
    assert kept == (124 + 4 if key else 124)


# Its place.


def carried(place: Place) -> dict[str, bytes | int]:
    """A place that went elsewhere as text. It must be of nothing but bytes and numbers."""
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
    [row[0] for row in GOOD.values()] + [joined(*row[:2]) for row in BAD.values()],
    ids=[*GOOD, *IDS],
)
def test_another_parser_goes_on_at_its_place(encode: Speller, key: bytes | None) -> None:
    """One that is taken out and put back after each byte finds what one alone does."""
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
        other = FrameParser(must_be_masked=not key)  # even this is in the place
        other.resume(carried(parser.place()))
        assert other.place() == parser.place()
        parser = other
    assert (found, code) == whole


# Frames, to be sent.


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


def test_what_is_left_out_of_a_frame() -> None:
    assert build_frame(PING) == b"\x89\0" and frame_header(BINARY, 5) == b"\x82\5"
    assert frame_header(BINARY, 2**63 - 1) == b"\x82\x7f\x7f" + b"\xff" * 7


@pytest.mark.parametrize("key", [b"", KEY], ids=["from a server", "from a client"])
def test_built_closes(key: bytes) -> None:
    for code in (1000, 1001, 1002, 1003, 1007, 1013, 4999):
        assert build_close(code, key) == frame(CLOSE, close_payload(code), key=key or None)
        assert read([build_close(code, key)], bool(key)) == ([(8, close_payload(code), True)], None)


@pytest.mark.parametrize("key", KEYS, ids=bytes.hex)
def test_unmask(key: bytes) -> None:
    """5.3, for all sizes around the key's, and back."""
    for size in (*range(20), 125, 4095, 65537):
        data = (BYTES_65536 * 2)[7 : 7 + size]
        masked = bytes(byte ^ key[n % 4] for n, byte in enumerate(data))
        assert unmask(data, key) == masked and unmask(memoryview(masked), key) == data


@ROLES
def test_what_is_built_is_read(key: bytes | None) -> None:
    """By a parser of the other role alone."""
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
