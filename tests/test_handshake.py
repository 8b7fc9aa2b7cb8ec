"""Which first lines are handshakes, and their token and side."""

from __future__ import annotations

import pytest
from helpers import handshake

from transit_relay import Handshake, parse_handshake

TOKEN = b"0123456789abcdef" * 4
SIDE = b"fedcba9876543210"
ALPHABET = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz_0123456789"  # 64 of them

GOOD = {
    "token and side": (b"please relay %s for side %s" % (TOKEN, SIDE), TOKEN, SIDE),
    "token alone": (b"please relay %s" % TOKEN, TOKEN, None),
    "all bytes of a token": (b"please relay %s" % ALPHABET, ALPHABET, None),
    "capitals stay capitals": (
        b"please relay %s for side %s" % (TOKEN.upper(), SIDE.upper()),
        TOKEN.upper(),
        SIDE.upper(),
    ),
    "nothing but underscores": (
        b"please relay %s for side %s" % (b"_" * 64, b"_" * 16),
        b"_" * 64,
        b"_" * 16,
    ),
}

BAD = {
    "nothing": b"",
    "a newline alone": b"\n",
    "the words alone": b"please relay",
    "the words and a space": b"please relay ",
    "no token": b"please relay  for side %s" % SIDE,
    "token of 63": b"please relay %s for side %s" % (TOKEN[:63], SIDE),
    "token of 65": b"please relay %s0 for side %s" % (TOKEN, SIDE),
    "token alone of 63": b"please relay %s" % TOKEN[:63],
    "token alone of 65": b"please relay %s0" % TOKEN,
    "side of 15": b"please relay %s for side %s" % (TOKEN, SIDE[:15]),
    "side of 17": b"please relay %s for side %s0" % (TOKEN, SIDE),
    "no side": b"please relay %s for side " % TOKEN,
    "no side and no space": b"please relay %s for side" % TOKEN,
    "side without its words": b"please relay %s %s" % (TOKEN, SIDE),
    "two sides": b"please relay %s for side %s for side %s" % (TOKEN, SIDE, SIDE),
    "carriage return": b"please relay %s for side %s\r" % (TOKEN, SIDE),
    "carriage return, no side": b"please relay %s\r" % TOKEN,
    "newline kept": b"please relay %s for side %s\n" % (TOKEN, SIDE),
    "newline kept, no side": b"please relay %s\n" % TOKEN,
    "newline before": b"\nplease relay %s" % TOKEN,
    "space before": b" please relay %s" % TOKEN,
    "space behind": b"please relay %s for side %s " % (TOKEN, SIDE),
    "space behind the token": b"please relay %s " % TOKEN,
    "two spaces before the token": b"please relay  %s" % TOKEN,
    "two spaces before the side": b"please relay %s for side  %s" % (TOKEN, SIDE),
    "tab for a space": b"please relay\t%s" % TOKEN,
    "capital P": b"Please relay %s" % TOKEN,
    "capitals": b"PLEASE RELAY %s" % TOKEN,
    "capital S": b"please relay %s for Side %s" % (TOKEN, SIDE),
    "hyphen in the token": b"please relay %s-" % TOKEN[:63],
    "space in the token": b"please relay %s 0" % TOKEN[:62],
    "dot in the side": b"please relay %s for side %s." % (TOKEN, SIDE[:15]),
    "NUL in the token": b"please relay %s\0" % TOKEN[:63],
    "NUL in the side": b"please relay %s for side %s\0" % (TOKEN, SIDE[:15]),
    "NUL behind": b"please relay %s\0" % TOKEN,
    "newline in the token": b"please relay %s\n" % TOKEN[:63],
    "Arabic digit, 64 bytes": b"please relay %s%s" % (TOKEN[:62], "٣".encode()),
    "Arabic digit, 64 characters": b"please relay %s%s" % (TOKEN[:63], "٣".encode()),
    "Arabic digit in the side": b"please relay %s for side %s%s" % (TOKEN, SIDE[:14], "٣".encode()),
    "Latin-1 letter": b"please relay %s\xe9" % TOKEN[:63],
    "Latin-1 letter in the side": b"please relay %s for side %s\xe9" % (TOKEN, SIDE[:15]),
    "all ones": b"please relay %s\xff" % TOKEN[:63],
    "HTTP": b"GET / HTTP/1.1\r",
    "the answer": b"ok",
}


@pytest.mark.parametrize(("line", "token", "side"), GOOD.values(), ids=GOOD)
def test_good(line: bytes, token: bytes, side: bytes | None) -> None:
    assert parse_handshake(line) == Handshake(token, side)


@pytest.mark.parametrize("line", BAD.values(), ids=BAD)
def test_bad(line: bytes) -> None:
    assert parse_handshake(line) is None


@pytest.mark.parametrize("side", [None, "side"])
def test_a_prefix_and_any_byte_more_is_bad(side: str | None) -> None:
    line = handshake("token", side)[:-1]
    assert parse_handshake(line)
    unsided = len(handshake("token")[:-1])  # the one prefix that is a whole handshake
    assert not [n for n in range(len(line)) if n != unsided and parse_handshake(line[:n])]
    assert not [byte for byte in range(256) if parse_handshake(line + bytes([byte]))]


@pytest.mark.parametrize("place", [13, 76, 87, 102], ids=lambda place: f"byte {place}")
def test_token_and_side_have_only_these_63_bytes(place: int) -> None:
    line = bytearray(handshake("token", "side")[:-1])
    taken = set()
    for byte in range(256):
        line[place] = byte
        if parse_handshake(bytes(line)):
            taken.add(byte)
    assert taken == set(ALPHABET) and len(taken) == 63
