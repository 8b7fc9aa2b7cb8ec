"""The reference's scenarios, end to end over sockets: what clients see, and what is recorded."""

from __future__ import annotations

import enum
from collections.abc import Iterator
from itertools import cycle
from typing import NamedTuple

import pytest
from helpers import Client, Loop, handshake

from transit_relay import Role, State, UsageRecord

BOTH_WAYS = True  # copied and spliced, see conftest.py
STEP_SECONDS = 0.25

PLAIN = handshake("t")
LEFT = handshake("t", "left")
RIGHT = handshake("t", "right")


class Leave(enum.Enum):
    """How a client leaves.

    It ends its direction (over WebSocket with a Close), closes its socket, or resets the
    connection (a unix socket cannot). Over WebSocket the latter two are ends without a Close.
    """

    HALF = "half-close"
    CLOSE = "close"
    RESET = "reset"


HALF, CLOSE, RESET = Leave


class Scenario(NamedTuple):
    """Steps of clients, one after the other, and their outcome.

    A client connects when it is first named. Each step takes STEP_SECONDS, and waits until the
    relay has read all. Clients that remain at the end leave (HALF) in the order of arrival.
    """

    # Bytes are a message, where there are messages. A list: its pieces, one by one.
    steps: list[tuple[str, bytes | list[bytes] | Leave]]
    sees: dict[str, bytes]  # all bytes that each client receives before an orderly end
    records: list[tuple[str, int, int | None]]  # mood, total_bytes, waiting_time in steps


# Clients without a partner.

ALONE = {
    "nothing": (b"", b"", "empty"),
    "half a line": (PLAIN[:-2], b"", "empty"),
    "half a line, in two": ([PLAIN[:-2], b""], b"", "empty"),
    "1,023 bytes without newline": (b"x" * 1023, b"", "empty"),
    "1,024 bytes without newline": (b"x" * 1024, b"bad handshake\n", "errory"),
    "1,024 bytes without newline, in two": (
        [b"x" * 1000, b"x" * 24],
        b"bad handshake\n",
        "errory",
    ),
    "1,023 bytes and newline": (b"x" * 1023 + b"\n", b"bad handshake\n", "errory"),
    "9,999 bytes without newline": (b"x" * 9999, b"bad handshake\n", "errory"),
    "a line of junk": (b"junk\n", b"bad handshake\n", "errory"),
    "an empty line": (b"\n", b"bad handshake\n", "errory"),
    "junk in pieces": ([b"j", b"u", b"nk", b"\n"], b"bad handshake\n", "errory"),
    "junk twice is answered once": ([b"junk\n", b"junk\n"], b"bad handshake\n", "errory"),
    "junk, then a handshake": ([b"junk\n", PLAIN], b"bad handshake\n", "errory"),
    "carriage return": (PLAIN[:-1] + b"\r\n", b"bad handshake\n", "errory"),
    "a short token": (b"please relay 0123\n", b"bad handshake\n", "errory"),
    "a handshake": (PLAIN, b"", "lonely"),
    "a handshake with side": (LEFT, b"", "lonely"),
    "a handshake, byte by byte": ([bytes([byte]) for byte in LEFT], b"", "lonely"),
    "a byte too early": (PLAIN + b"x", b"impatient\n", "impatient"),
    "a newline too early": (PLAIN + b"\n", b"impatient\n", "impatient"),
    "a byte too early, later": ([PLAIN, b"x"], b"impatient\n", "impatient"),
    "impatient twice is answered once": ([PLAIN, b"x", b"x"], b"impatient\n", "impatient"),
    "two handshakes": (PLAIN + PLAIN, b"impatient\n", "impatient"),
}

# Streams whose meaning depends on messages.

ALONE_RAW = {
    "all but the newline": (PLAIN[:-1], b"", "empty"),
    "all but the newline, then junk": ([PLAIN[:-1], b"\0\n"], b"bad handshake\n", "errory"),
}
ALONE_WEB = {
    "all but the newline": (PLAIN[:-1], b"", "lonely"),
    "all but the newline, in two": ([LEFT[:-1], b""], b"", "lonely"),
    "all but the newline, then junk": ([PLAIN[:-1], b"\0\n"], b"bad handshake\n", "errory"),
    "HTTP": (b"GET / HTTP/1.1\r\nHost: relay\r\n\r\n", b"bad handshake\n", "errory"),
}


def alone(
    rows: dict[str, tuple[bytes | list[bytes], bytes, str]],
) -> Iterator[tuple[str, Scenario]]:
    for name, (sent, reply, mood) in rows.items():
        for leave in Leave:
            steps = [("a", sent), ("a", leave)]
            yield f"{name}, {leave.value}", Scenario(steps, {"a": reply}, [(mood, 0, None)])


# Pairs.

MEETINGS = {
    "no sides": (PLAIN, PLAIN),
    "two sides": (LEFT, RIGHT),
    "two sides, other order": (RIGHT, LEFT),
    "a side and none": (LEFT, PLAIN),
    "none and a side": (PLAIN, LEFT),
    "sides in another case": (handshake("t", "left"), handshake("t", "LEFT")),
    "one byte at a time": ([bytes([byte]) for byte in LEFT], [bytes([byte]) for byte in RIGHT]),
}


def meetings() -> Iterator[tuple[str, Scenario]]:
    for name, (first, second) in MEETINGS.items():
        yield (
            name,
            Scenario(
                [("a", first), ("b", second), ("a", b"123"), ("b", b"4567"), ("a", b"89")],
                {"a": b"ok\n4567", "b": b"ok\n12389"},
                [("happy", 9, 1)],
            ),
        )


def ends() -> Iterator[tuple[str, Scenario]]:
    for who, stays in ("ab", "ba"):
        for leave in Leave:
            yield (
                f"{'first' if who == 'a' else 'second'} leaves, {leave.value}",
                Scenario(
                    [("a", LEFT), ("b", RIGHT), (stays, b"123"), (who, b"last"), (who, leave)],
                    {who: b"ok\n123", stays: b"ok\nlast"},
                    [("happy", 7, 1)],
                ),
            )
            yield (
                f"{'first' if who == 'a' else 'second'} leaves, {leave.value}, and is sent bytes",
                Scenario(
                    [("a", LEFT), ("b", RIGHT), (who, leave), (stays, b"hello?")],
                    {who: b"ok\n", stays: b"ok\n"},
                    [("happy", 0, 1)],
                ),
            )


# Other scenarios.

MORE = {
    "early data": Scenario(
        [("a", LEFT), ("b", RIGHT + b"early")],
        {"a": b"ok\nearly", "b": b"ok\n"},
        [("happy", 5, 1)],
    ),
    "early data, more than one line can have": Scenario(
        [("a", LEFT), ("b", RIGHT + b"x" * 5000)],
        {"a": b"ok\n" + b"x" * 5000, "b": b"ok\n"},
        [("happy", 5000, 1)],
    ),
    "early data that is another handshake": Scenario(
        [("a", LEFT), ("b", RIGHT + RIGHT)],
        {"a": b"ok\n" + RIGHT, "b": b"ok\n"},
        [("happy", len(RIGHT), 1)],
    ),
    "every byte there is": Scenario(
        [("a", LEFT), ("b", RIGHT), ("a", bytes(range(256)))],
        {"a": b"ok\n", "b": b"ok\n" + bytes(range(256))},
        [("happy", 256, 1)],
    ),
    "accepted first, handshake last": Scenario(
        [("a", b""), ("b", RIGHT), ("a", LEFT), ("b", b"1")],
        {"a": b"ok\n1", "b": b"ok\n"},
        [("happy", 1, 1)],
    ),
    "tokens in another case": Scenario(
        [("a", handshake("t")), ("b", handshake("T"))],
        {"a": b"", "b": b""},
        [("lonely", 0, None), ("lonely", 0, None)],
    ),
    "two pairs at once": Scenario(
        [
            ("a", handshake("1")),
            ("c", handshake("2")),
            ("b", handshake("1")),
            ("d", handshake("2")),
            ("a", b"1"),
            ("c", b"22"),
            ("b", b"333"),
            ("d", b"4444"),
        ],
        {"a": b"ok\n333", "b": b"ok\n1", "c": b"ok\n4444", "d": b"ok\n22"},
        [("happy", 4, 2), ("happy", 6, 2)],
    ),
    "the same side waits too": Scenario(
        [("a", LEFT), ("b", LEFT)],
        {"a": b"", "b": b""},
        [("lonely", 0, None), ("lonely", 0, None)],
    ),
    "the newest of a side is taken": Scenario(
        [("a", LEFT), ("b", LEFT), ("c", LEFT), ("d", RIGHT), ("d", b"hi")],
        {"a": b"", "b": b"", "c": b"ok\nhi", "d": b"ok\n"},
        [("redundant", 0, None), ("redundant", 0, None), ("happy", 2, 1)],
    ),
    "the newest is that of the latest handshake": Scenario(
        [("a", b""), ("b", LEFT), ("a", LEFT), ("c", RIGHT), ("c", b"hi")],
        {"a": b"ok\nhi", "b": b"", "c": b"ok\n"},
        [("redundant", 0, None), ("happy", 2, 3)],
    ),
    "the newest of a side is taken by one without": Scenario(
        [("a", LEFT), ("b", LEFT), ("c", PLAIN), ("c", b"hi")],
        {"a": b"", "b": b"ok\nhi", "c": b"ok\n"},
        [("redundant", 0, None), ("happy", 2, 1)],
    ),
    "bytes of a redundant client are discarded": Scenario(
        [("a", LEFT), ("b", LEFT), ("c", RIGHT), ("a", b"me too"), ("b", b"1")],
        {"a": b"", "b": b"ok\n", "c": b"ok\n1"},
        [("redundant", 0, None), ("happy", 1, 1)],
    ),
    "a third waits": Scenario(
        [("a", LEFT), ("b", RIGHT), ("c", PLAIN), ("a", b"1")],
        {"a": b"ok\n", "b": b"ok\n1", "c": b""},
        [("happy", 1, 1), ("lonely", 0, None)],
    ),
    "a third is impatient": Scenario(
        [("a", LEFT), ("b", RIGHT), ("c", PLAIN), ("c", b"1"), ("a", b"22")],
        {"a": b"ok\n", "b": b"ok\n22", "c": b"impatient\n"},
        [("impatient", 0, None), ("happy", 2, 1)],
    ),
    "a fourth meets the third": Scenario(
        [
            ("a", LEFT),
            ("b", RIGHT),
            ("c", LEFT),
            ("d", RIGHT),
            ("a", b"1"),
            ("b", b"22"),
            ("c", b"333"),
            ("d", b"4444"),
        ],
        {"a": b"ok\n22", "b": b"ok\n1", "c": b"ok\n4444", "d": b"ok\n333"},
        [("happy", 3, 1), ("happy", 7, 1)],
    ),
    "the token of a pair that is gone is free": Scenario(
        [("a", LEFT), ("b", RIGHT), ("a", CLOSE), ("b", CLOSE), ("c", LEFT), ("d", RIGHT)],
        {"a": b"ok\n", "b": b"ok\n", "c": b"ok\n", "d": b"ok\n"},
        [("happy", 0, 1), ("happy", 0, 1)],
    ),
    "a client that has left is not paired": Scenario(
        [("a", LEFT), ("a", CLOSE), ("b", RIGHT)],
        {"a": b"", "b": b""},
        [("lonely", 0, None), ("lonely", 0, None)],
    ),
    "an impatient client is not paired": Scenario(
        [("a", LEFT + b"x"), ("b", RIGHT)],
        {"a": b"impatient\n", "b": b""},
        [("impatient", 0, None), ("lonely", 0, None)],
    ),
    "the older of a side is met when the newer has left": Scenario(
        [("a", LEFT), ("b", LEFT), ("b", CLOSE), ("c", RIGHT)],
        {"a": b"ok\n", "b": b"", "c": b"ok\n"},
        [("lonely", 0, None), ("happy", 0, 3)],
    ),
}

SCENARIOS = {**dict(alone(ALONE)), **dict(meetings()), **dict(ends()), **MORE}
RAW_SCENARIOS = dict(alone(ALONE_RAW))
WEB_SCENARIOS = dict(alone(ALONE_WEB))

# The kinds of the clients, in turn.
KINDS = {
    "unix": ["unix"],
    "tcp×tcp": ["tcp"],
    "tcp×unix": ["tcp", "unix"],
    "tcp×ws": ["tcp", "ws"],
    "ws×tcp": ["ws", "tcp"],
    "ws×ws": ["ws"],
    "unix×ws": ["unix", "ws-unix", "ws"],
}
OF_ONE_KIND = ["unix", "tcp×tcp", "ws×ws"]


def cases() -> Iterator[object]:
    for kind in KINDS:
        for name, scenario in SCENARIOS.items():
            if kind in OF_ONE_KIND or len(scenario.sees) > 1:
                yield pytest.param(scenario, kind, id=f"{name}-{kind}")
    for name, scenario in RAW_SCENARIOS.items():
        yield pytest.param(scenario, "tcp×tcp", id=f"{name}-tcp")
    for name, scenario in WEB_SCENARIOS.items():
        yield pytest.param(scenario, "ws×ws", id=f"{name}-ws")


def leave(loop: Loop, client: Client, how: Leave, expected: bytes) -> bytes:
    """Leave as `how` says, and wait until the relay has noticed. Return all that was received."""
    conn = client.conn
    assert conn is not None
    if how is HALF:
        # A client that received our Close gets no answer. Otherwise its code is returned.
        code = 1000 if conn.session.state is State.DONE else 4321
        client.half_close(code)
        loop.pump()
        assert conn.session.state is State.DONE  # without the close of the socket
        seen = client.read_to_end(code)
        client.close()
    else:  # nothing can be read afterwards, and closing must not reset
        seen = client.receive(len(expected)) + client.receive_now()
        {CLOSE: client.close, RESET: client.reset}[how]()
    loop.pump()
    assert conn not in loop.server.connections
    return seen


def play(loop: Loop, scenario: Scenario, kinds: list[str], swapped: bool = False) -> None:
    """Play a scenario with clients of these kinds, in turn, and check its outcome."""
    turns = cycle(kinds)
    clients: dict[str, Client] = {}
    seen: dict[str, bytes] = {}
    for who, what in scenario.steps:
        loop.advance(STEP_SECONDS)
        if who not in clients:
            kind = next(turns)
            clients[who] = loop.client(
                kind, role=(Role.WEBSOCKET if kind.startswith("ws") != swapped else Role.PORT)
            )
        if isinstance(what, Leave):
            seen[who] = leave(loop, clients[who], what, scenario.sees[who])
        else:
            for wire in clients[who].encode(*([what] if isinstance(what, bytes) else what)):
                clients[who].send_wire(wire)
                loop.pump()
    for who, client in clients.items():
        if who not in seen:
            seen[who] = leave(loop, client, HALF, scenario.sees[who])
    assert seen == scenario.sees
    assert [
        (one.mood, one.total_bytes, one.waiting_time and one.waiting_time / STEP_SECONDS)
        for one in loop.recorder.records
    ] == scenario.records
    assert loop.server.connections == set()


@pytest.mark.parametrize(("scenario", "kind"), list(cases()))
def test_scenario(loop: Loop, scenario: Scenario, kind: str) -> None:
    play(loop, scenario, KINDS[kind])


@pytest.mark.parametrize("name", MORE)
def test_scenario_with_swapped_listeners(loop: Loop, name: str) -> None:
    play(loop, MORE[name], ["tcp", "ws"], swapped=True)


def test_the_times_of_a_pair(loop: Loop) -> None:
    first = loop.connect()
    loop.advance(3)
    loop.connect().sendall(LEFT)
    loop.advance(2)
    first.sendall(RIGHT)
    loop.advance(5)
    first.close()
    loop.pump()
    loop.advance(4)  # the other lingers, which does not count
    assert loop.recorder.records == [UsageRecord(1_700_000_000.0, 10.0, 3.0, 0, "happy")]


def test_the_times_of_a_client_without_a_partner(loop: Loop) -> None:
    loop.advance(1)
    client = loop.connect()
    loop.advance(2)
    client.sendall(b"junk\n")
    loop.pump()
    loop.advance(3)  # it lingers, which does not count
    client.close()
    loop.pump()
    assert loop.recorder.records == [UsageRecord(1_700_000_001.0, 2.0, None, 0, "errory")]
