"""Scenarios in which our relay intentionally differs from the reference, and its exact outcomes.

test_differential.py asserts that our relay has this outcome, and that the reference has another.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from children import Record
from scenarios import ANY_TWO, ROUNDS, WAITING
from stage import BAD, IMPATIENT, OK, Kinds, Outcome, Seen, summary
from websocket_scenarios import (
    ALONE,
    BAD_FRAMES,
    BAD_FRAMES_ELSEWHERE,
    CLOSES,
    REQUESTS,
    SIDE_BEGINS,
    WITH_ANY,
)


class Difference(NamedTuple):
    row: str  # the rule of this relay, and what the reference does
    ours: Outcome  # exactly


DIFFERENCES: dict[tuple[str, Kinds], Difference] = {}

TOO_LONG = (
    "`1,024 bytes and no newline yet`: bad handshake, errory; the reference says "
    "nothing and records empty, from 1,025 bytes without newline and for each longer line"
)
NEWEST = "`A newcomer takes the newest`: arbitrary in the reference"
AFTER_THE_LINE = (
    "`Bytes behind the handshake line`: to the reference, a first message that contains "
    "more than the handshake is a bad handshake"
)
LINGERING = (
    "`Lingering`: the reference closes at once, and a client that is sending or is slow "
    "loses the bytes that it has not yet read"
)
BOTH_ENCODINGS = "`Every listener takes both encodings`: one kind per port there"
FIRST_MESSAGE = (
    "`Rule`: to the reference the first message is the whole handshake; several "
    "messages or an empty one are a bad handshake, and a later empty one is impatient"
)
BORDERS = "`Message borders mean nothing`: the reference assembles whole messages"
BAD_FRAME = "`Close 1003 ... 1002 ... 1007`: the reference drops without Close"
SAME_CODE = "`Close with the same code and no reason`: always 1000 there"
REQUEST = (
    "`A request without Upgrade` and `An upgrade`: the reference differs in the "
    "numbers, has no head limit and also takes version 8"
)
STOPPING = "`Relay shutting down`: the reference just ends the TCP connection"
HTTP_SYNTAX = "`Not HTTP`: the reference accepts more, or continues to wait"
ANY_ORIGIN = (
    "`Accept any path, any Host, any or no Origin. Decline extensions and "
    "subprotocols`: the reference refuses some"
)
TCP_ENDED = (
    "`Lingering` (over WebSocket the end follows a Close): the reference sends no Close "
    "to a client that ends its TCP connection without one"
)

EMPTY, LONELY = Record("empty", 0, False), Record("lonely", 0, False)
HAPPY = Record("happy", 0, True)
ENDS = {"tcp": "end", "ws": "Close 1000"}


def seen(kind: str, data: bytes = b"", end: str = "") -> Seen:
    """Return what a client receives whose connection ends in order."""
    return Seen(summary(data), end or ENDS[kind])


def differ(row: str, names: Iterable[str], kinds: Kinds, *records: Record, **clients: Seen) -> None:
    """Add the outcome of our relay for these scenarios, with clients of these kinds."""
    for name in names:
        assert (name, kinds) not in DIFFERENCES
        DIFFERENCES[name, kinds] = Difference(row, Outcome(clients, sorted(records)))


def refused(row: str, kind: str, answer: bytes, mood: str, *names: str) -> None:
    """Add scenarios with one client, which gets an answer (it may be empty) and an orderly end."""
    differ(row, names, (kind,), Record(mood, 0, False), client=seen(kind, answer))


# ---- differences over TCP, too

refused(
    TOO_LONG,
    *("tcp", BAD, "errory"),
    "1,024 bytes without a newline",
    "1,025 bytes without a newline",
    "20,000 bytes without a newline",
    "1,025 bytes and a newline",
    "20,000 bytes and a newline",
)
refused(LINGERING, "tcp", BAD, "errory", "sending on after a bad handshake")
refused(LINGERING, "tcp", IMPATIENT, "impatient", "sending on after impatient")
refused(
    LINGERING,
    *("ws", IMPATIENT, "impatient"),
    "sending on after impatient",
    "impatient and end at once",
)
for kinds in ANY_TWO:
    first, second = kinds
    if second == "tcp":
        differ(
            LINGERING,
            ["handshake that matches data and end at once"],
            kinds,
            Record("happy", len(b"last bytes"), True),
            first=seen(first, OK + b"last bytes"),
            second=seen(second, OK),
        )

for kinds in ANY_TWO:
    taken = ["partner", f"handshake {WAITING}"]
    in_a_round = [*(f"handshake {number}" for number in range(WAITING, 0, -1)), "partner"]
    everyone = [(number, name) for number in range(ROUNDS) for name in in_a_round]
    differ(
        NEWEST,
        ["newest of a side meets another side", "newest of a side meets a client without side"],
        kinds,
        *[HAPPY] * ROUNDS,
        *[Record("redundant", 0, False)] * (ROUNDS * (WAITING - 1)),
        **{
            f"{number}: {name}": seen(kinds[place % 2], OK if name in taken else b"")
            for place, (number, name) in enumerate(everyone)
        },
    )

# ---- the handshake in messages

refused(
    FIRST_MESSAGE,
    *("ws", b"", "empty"),
    "1,023 bytes without a newline",
    "partial handshake in a message",
    "bad line without a newline",
    "empty message alone",
)
refused(
    BORDERS,
    *("ws", BAD, "errory"),
    "long line in an unfinished message",
    "bad line in an unfinished message",
)
refused(BORDERS, "ws", IMPATIENT, "impatient", "impatient fragment")

# How the handshake is split into messages, and which of its bytes are data.
HANDSHAKES = [
    (FIRST_MESSAGE, "in two messages", b""),
    (FIRST_MESSAGE, "in two messages, without its newline", b""),
    (FIRST_MESSAGE, "after an empty message", b""),
    (FIRST_MESSAGE, "and an empty message", b""),
    (FIRST_MESSAGE, "in two messages, the newline in a third", b"\n"),
    (FIRST_MESSAGE, "in messages of one byte", SIDE_BEGINS),
    (BORDERS, "in an unfinished message", b""),
    (AFTER_THE_LINE, "with data after it in its message", b"early"),
    (AFTER_THE_LINE, "with a newline after it in its message", b"\n"),
    (AFTER_THE_LINE, "with data after it in its last fragment", b"early"),
]
for row, how, data in HANDSHAKES:
    for kinds in WITH_ANY:
        client, partner = kinds
        name = f"handshake {how}"
        if data:
            impatient = [LONELY, Record("impatient", 0, False)]
            sees = {"client": seen(client, IMPATIENT), "partner": seen(partner)}
            differ(row, [name], kinds, *impatient, **sees)
        else:
            sees = {"client": seen(client, OK), "partner": seen(partner, OK)}
            differ(row, [name], kinds, HAPPY, **sees)
        if name == "handshake and an empty message":
            continue  # if a partner waits, both relays match it before the empty message
        sees = {"partner": seen(partner, OK + data), "client": seen(client, OK)}
        happy = Record("happy", len(data), True)
        differ(row, [f"matching {name}"], (partner, client), happy, **sees)

# ---- requests


def upgrades(row: str, answer: str, *names: str) -> None:
    """Add scenarios with a partner, and a client that meets it unless its upgrade was refused.

    `answer` is the HTTP status of a refusal.
    """
    names = tuple(f"upgrade: {name}" for name in names)
    if answer:
        sees = {"client": Seen(f"HTTP/1.1 {answer}", "end"), "partner": seen("tcp")}
        differ(row, names, ("tcp",), LONELY, **sees)
    else:
        sees = {"client": seen("ws", OK), "partner": seen("tcp", OK)}
        differ(row, names, ("tcp",), HAPPY, **sees)


upgrades(
    ANY_ORIGIN,
    "",
    "Host with an invalid port",
    "fragment in the path",
    "invalid Origin",
    "Origin twice",
    "subprotocol twice",
    "extensions on two lines",
    "extension with an invalid parameter",
)
upgrades(REQUEST, "200", "Upgrade to something else")
upgrades(REQUEST, "400", "HTTP/1.0", "HTTP/2.0")
upgrades(REQUEST, "426", "version 8", "version 7", "invalid version", "versions as a list")
upgrades(REQUEST, "426", "version 013")
upgrades(
    HTTP_SYNTAX,
    "400",
    "request line with two spaces",
    "space before a colon",
    "line without a colon",
    "line that is folded",
)
upgrades(REQUEST, "431", "17,000 bytes of a cookie", "36,000 bytes of cookies")

BEGUN: list[tuple[str, str, str, list[Record]]] = [
    (HTTP_SYNTAX, "101", "request with lone line feeds", [EMPTY]),
    (REQUEST, "431", "17,000 bytes of an unfinished request", []),
    (REQUEST, "400", "bytes that cannot begin a request", []),
]
for row, status, name, records in BEGUN:
    differ(row, [name], ("ws",), *records, client=Seen(f"HTTP/1.1 {status}", "end"))

for what in REQUESTS:
    method = what.partition(" ")[0]
    status = "200" if method in ("GET", "HEAD", "OPTIONS") else "405"
    sees = {"client": Seen(f"HTTP/1.1 {status}", "end")}
    if status == "200" and what not in ("GET", "GET of somewhere"):
        differ(REQUEST, [f"{what} at the WebSocket listener"], ("ws",), **sees)
    if method != "DELETE":
        differ(BOTH_ENCODINGS, [f"{what} at the TCP listener"], ("ws",), **sees)

OTHER_LISTENER = {
    "WebSocket at the TCP listener": "ws",
    "TCP at the WebSocket listener": "tcp",
}
for partner in "tcp", "ws":
    for name, client in OTHER_LISTENER.items():
        sees = {"client": seen(client, OK), "partner": seen(partner, OK)}
        differ(BOTH_ENCODINGS, [name], (partner,), HAPPY, **sees)

# ---- messages of a pair, and its end

for kinds in WITH_ANY:
    differ(
        BORDERS,
        ["an interrupted message"],
        kinds,
        Record("happy", 50_000, True),
        first=Seen(repr(OK), "closed"),
        second=seen(kinds[1], OK + b"x" * 50_000),
    )
    differ(
        BORDERS,
        ["an unfinished message"],
        kinds,
        Record("happy", 3, True),
        first=seen("ws", OK),
        second=seen(kinds[1], OK + b"one"),
    )
    differ(
        TCP_ENDED,
        ["tcp ends while waiting"],
        kinds,
        *[LONELY] * 2,
        **{"client": seen("ws"), "too late": seen(kinds[1])},
    )
    differ(
        TCP_ENDED,
        ["tcp ends after last bytes"],
        kinds,
        Record("happy", 50_000, True),
        first=seen("ws", OK),
        second=seen(kinds[1], OK + b"x" * 50_000),
    )
    differ(
        BAD_FRAME,
        ["last bytes and a bad frame"],
        kinds,
        Record("happy", 50_000, True),
        first=seen("ws", OK, "Close 1002"),
        second=seen(kinds[1], OK + b"x" * 50_000),
    )
refused(TCP_ENDED, "ws", b"", "empty", "tcp ends without a byte", "tcp ends within a handshake")

SAME_ANSWER = ("1000", "1000 and a reason")
NOT_UTF8 = ("1000 and a reason that is not UTF-8", "1000 and half a UTF-8 character")
GOOD_CODES = ("1001", "1003", "1011", "1012", "1013", "1014", "3000", "4999")
for what in CLOSES:
    code = what.partition(" ")[0]
    if what in SAME_ANSWER:
        continue
    if what == "nothing":
        row, end = SAME_CODE, "Close"
    elif code in GOOD_CODES:
        row, end = SAME_CODE, f"Close {code}"
    else:
        row, end = BAD_FRAME, "Close 1007" if what in NOT_UTF8 else "Close 1002"
    for kinds in WITH_ANY:
        differ(
            row,
            [f"Close with {what}"],
            kinds,
            Record("happy", len(b"last bytes"), True),
            first=seen("ws", OK, end),
            second=seen(kinds[1], OK + b"last bytes"),
        )

for name in BAD_FRAMES:
    end = "Close 1003" if name in ("text", "text that is not UTF-8") else "Close 1002"
    for kinds in WITH_ANY:
        differ(
            BAD_FRAME,
            [f"bad frame of a pair: {name}"],
            kinds,
            Record("happy", len(b"good so far"), True),
            first=seen("ws", OK, end),
            second=seen(kinds[1], OK + b"good so far"),
        )
    if name in BAD_FRAMES_ELSEWHERE:
        sees = {"client": seen("ws", b"", end)}
        (alone,) = ALONE
        differ(BAD_FRAME, [f"bad frame at once: {name}"], alone, EMPTY, **sees)
        differ(BAD_FRAME, [f"bad frame of a waiting client: {name}"], alone, LONELY, **sees)
