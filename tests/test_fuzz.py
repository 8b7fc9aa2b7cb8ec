"""Garbage: a Session survives it, however it is cut; an endpoint is refused in one way only.

RELAY_FUZZ_CASES says how many cases each test tries. Each case has a seed of its own, which is
in the message of a failure.
"""

from __future__ import annotations

import os
import random
import string
from collections.abc import Iterator

from helpers import FakePipe, handshake

from transit_relay import (
    ENDPOINT_FIELDS,
    Endpoint,
    RawFraming,
    Rendezvous,
    Session,
    UsageError,
    UsageRecord,
    parse_endpoint,
)

CASES = int(os.environ.get("RELAY_FUZZ_CASES", "300"))


def cuts(data: bytes, chance: random.Random) -> Iterator[list[bytes]]:
    """Whole, into bytes, and a few times at random."""
    yield [data]
    yield [data[n : n + 1] for n in range(len(data))]
    for _ in range(4):
        places = sorted(chance.choices(range(len(data) + 1), k=chance.randint(1, 8)))
        borders = [0, *places, len(data)]
        yield [data[a:b] for a, b in zip(borders, borders[1:]) if a != b]


def mutated(data: bytes, chance: random.Random) -> bytes:
    """`data` with a few small accidents."""
    for _ in range(chance.randint(1, 3)):
        place = chance.randrange(len(data) + 1)
        end = min(len(data), place + chance.randint(1, 4))
        inserted = chance.choice([b"", b"\n", b"\r\n", b"\0", b" ", b"_", b"\xff", b"ok\n"])
        accident = chance.choice(["replace", "insert", "remove", "repeat"])
        if accident == "replace":
            data = data[:place] + (inserted * 4)[: end - place] + data[end:]
        elif accident == "insert":
            data = data[:place] + inserted + data[place:]
        elif accident == "remove":
            data = data[:place] + data[end:]
        else:
            data = data[:end] + data[place:]
    return data


def garbage(chance: random.Random) -> bytes:
    """What somebody may send: a bad handshake, a good one with something behind it, anything."""
    noise = bytes(chance.choices(range(256), k=chance.choice([0, 1, 20, 1023, 1024, 1025, 3000])))
    if chance.random() < 0.3:
        noise = noise.replace(b"\n", b"")
    good = handshake("token", chance.choice(["left", "right", None]))
    kind = chance.choice(["mutated", "mutated", "followed", "noise"])
    if kind == "mutated":
        return mutated(good, chance) + noise[: chance.choice([0, 10])]
    return good + noise if kind == "followed" else noise


def outcome(pieces: list[bytes], partner_side: str | None, partner: bool) -> tuple[object, ...]:
    """All that comes of a stream that is cut like this, seen from both sides and the records."""
    records: list[UsageRecord] = []
    rendezvous = Rendezvous(records.append, lambda: 100.0)
    waiting = Session(FakePipe(), rendezvous, 0.0)
    if partner:
        waiting.line_received(handshake("token", partner_side)[:-1])
    session = Session(FakePipe(), rendezvous, 0.0)
    framing = RawFraming(session)
    for piece in pieces:
        buffer = bytearray(piece)
        framing.receive(memoryview(buffer))
        buffer[:] = bytes(len(buffer))  # the next client's bytes come into the same buffer
        rendezvous.check_invariants()
    state = session.state
    session.connection_lost()
    waiting.connection_lost()
    assert isinstance(session.pipe, FakePipe) and isinstance(waiting.pipe, FakePipe)
    return state, session.pipe.sent, waiting.pipe.sent, records


def test_handshakes() -> None:
    """No exception, and every cut of the same stream comes to the same."""
    seen = set()
    for seed in range(CASES):
        chance = random.Random(f"handshake {seed}")
        stream = garbage(chance)
        side, partner = chance.choice(["left", "right", None]), chance.random() < 0.7
        whole = None
        for pieces in cuts(stream, chance):
            try:
                result = outcome(pieces, side, partner)
            except Exception as error:
                raise AssertionError(f"seed {seed}, {pieces!r}") from error
            whole = whole or result
            assert result == whole, f"seed {seed}, {pieces!r}"
        assert whole
        seen.add(whole[0])
    assert CASES < 100 or len(seen) == 4  # the cases come into every state


def endpoint_text(chance: random.Random) -> str:
    """What somebody may write behind `--port`."""
    if chance.random() < 0.2:
        return "".join(chance.choices(string.printable, k=chance.randint(0, 30)))
    values = [
        *("0", "4001", "65535", "65536", "660", "888", "-1", "+1", "0x10", "1_0", " 1"),
        *("9" * 20, "9" * 5000, "٣", "²", "\0", "\n", "\udcff", "é", "", "=", ":", "\\"),
        *("\\:\\:1", "127.0.0.1", "/run/x.sock", "INET", "INET6", "x", "x\\=y"),
    ]
    kind = chance.choice([*ENDPOINT_FIELDS] * 5 + values)
    fields = []
    for _ in range(chance.randint(0, 3)):
        name = chance.choice([*ENDPOINT_FIELDS.get(kind, ()), "index"])
        value = chance.choice([*values[:5], *values])
        fields.append(value if chance.random() < 0.4 else f"{name}={value}")
    return ":".join([kind, *fields])


def test_endpoints() -> None:
    """An Endpoint or a UsageError, which says what was written."""
    good = 0
    for seed in range(4 * CASES):
        text = endpoint_text(random.Random(f"endpoint {seed}"))
        try:
            endpoint = parse_endpoint(text)
        except UsageError as error:
            assert text in str(error) or repr(text) in str(error), f"seed {seed}, {text!r}"
        except Exception as error:
            raise AssertionError(f"seed {seed}, {text!r}") from error
        else:
            good += 1
            assert isinstance(endpoint, Endpoint) and endpoint.text == text
            assert endpoint.kind in ENDPOINT_FIELDS and endpoint.backlog >= 1024
            assert 0 <= endpoint.port <= 65535 and 0 <= endpoint.mode <= 0o777
    assert CASES < 100 or good > CASES // 20  # the cases are not mere noise
