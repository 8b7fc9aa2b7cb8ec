"""RawFraming: where the first line ends, however the stream is cut."""

from __future__ import annotations

from typing import cast

import pytest
from helpers import handshake, splits

from transit_relay import MAX_LINE_BYTES, RawFraming, Session

LINE = handshake("token", "side")


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
