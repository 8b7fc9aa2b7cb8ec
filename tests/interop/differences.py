"""Where our relay answers otherwise than the reference, on purpose, and what ours does there.

All of it is exact: test_differential.py asserts it, and that the reference does something else.
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
    row: str  # of PROTOCOL.md
    ours: Outcome  # exactly


DIFFERENCES: dict[tuple[str, Kinds], Difference] = {}

TOO_LONG = (
    "section 1, `1,024 bytes and no newline yet`: bad handshake, errory; the reference says "
    "nothing and records empty, from 1,025 bytes without newline and for every longer line"
)
NEWEST = "section 1, `A newcomer takes the newest`: arbitrary in the reference"
BEHIND_THE_LINE = (
    "section 1, `Bytes behind the handshake line`: to the reference, a first message that holds "
    "more than the handshake is a bad handshake"
)
HOLDING = (
    "section 1, `Holding`: the reference closes at once, and a side that happens to be sending, "
    "or is slow, loses what it had not yet taken"
)
BOTH_SPELLINGS = "section 1, `Every listener takes both spellings`: one kind per port there"
FIRST_MESSAGE = (
    "section 2, `Rule`: the reference judges the first message alone and whole; several messages "
    "or an empty one are a bad handshake, an empty one later is impatient"
)
BORDERS = "section 2, `Message borders mean nothing`: the reference assembles whole messages"
BAD_FRAME = "section 2, `Close 1003 ... 1002 ... 1007`: the reference drops without Close"
SAME_CODE = "section 2, `Close with the same code and no reason`: always 1000 there"
REQUEST = (
    "section 2, `A request without Upgrade` and `An upgrade`: the reference differs in the "
    "numbers, has no head limit and also takes version 8"
)
STOPPING = "section 2, `Relay shutting down`: the reference just ends the TCP connection"
# These have no mark in PROTOCOL.md.
HTTP_SYNTAX = "section 2, `Not HTTP`: the reference reads requests more leniently, or waits on"
ANY_ORIGIN = (
    "section 2, `Accept any path, any Host, any or no Origin. Decline extensions and "
    "subprotocols`: the reference refuses some"
)
TCP_ENDED = (
    "section 1, `Holding` (over WebSocket the end stands behind a Close): the reference answers "
    "no Close to a client that ends its TCP connection without one"
)

EMPTY, LONELY = Record("empty", 0, False), Record("lonely", 0, False)
HAPPY = Record("happy", 0, True)
ENDS = {"tcp": "end", "ws": "Close 1000"}


def seen(kind: str, data: bytes = b"", end: str = "") -> Seen:
    """What a client sees that is not broken off."""
    return Seen(summary(data), end or ENDS[kind])


def differ(row: str, names: Iterable[str], kinds: Kinds, *records: Record, **clients: Seen) -> None:
    """In all these scenarios, played with these kinds, ours shows just this."""
    for name in names:
        assert (name, kinds) not in DIFFERENCES
        DIFFERENCES[name, kinds] = Difference(row, Outcome(clients, sorted(records)))


def refused(row: str, kind: str, answer: bytes, mood: str, *names: str) -> None:
    """There is one client, which gets an answer, or none, and then an orderly end."""
    differ(row, names, (kind,), Record(mood, 0, False), client=seen(kind, answer))


# ---- over TCP as well

refused(
    TOO_LONG,
    *("tcp", BAD, "errory"),
    "1,024 bytes without a newline",
    "1,025 bytes without a newline",
    "20,000 bytes without a newline",
    "1,025 bytes and a newline",
    "20,000 bytes and a newline",
)
refused(HOLDING, "tcp", BAD, "errory", "sending on behind a bad handshake")
refused(HOLDING, "tcp", IMPATIENT, "impatient", "sending on behind impatience")
refused(
    HOLDING,
    *("ws", IMPATIENT, "impatient"),
    "sending on behind impatience",
    "impatient and end at once",
)
for kinds in ANY_TWO:
    first, second = kinds
    if second == "tcp":
        differ(
            HOLDING,
            ["handshake that matches data and end at once"],
            kinds,
            Record("happy", len(b"farewell"), True),
            first=seen(first, OK + b"farewell"),
            second=seen(second, OK),
        )

for kinds in ANY_TWO:
    taken = ["partner", f"handshake {WAITING}"]
    in_a_round = [*(f"handshake {number}" for number in range(WAITING, 0, -1)), "partner"]
    everyone = [(number, who) for number in range(ROUNDS) for who in in_a_round]
    differ(
        NEWEST,
        ["newest of a side meets another side", "newest of a side meets one without"],
        kinds,
        *[HAPPY] * ROUNDS,
        *[Record("redundant", 0, False)] * (ROUNDS * (WAITING - 1)),
        **{
            f"{number}: {who}": seen(kinds[place % 2], OK if who in taken else b"")
            for place, (number, who) in enumerate(everyone)
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
    "long line in a message without an end",
    "bad line in a message without an end",
)
refused(BORDERS, "ws", IMPATIENT, "impatient", "impatient fragment")

# The spelling of the handshake; what of it is data.
SPELLINGS = [
    (FIRST_MESSAGE, "in two messages", b""),
    (FIRST_MESSAGE, "in two messages, without its newline", b""),
    (FIRST_MESSAGE, "behind an empty message", b""),
    (FIRST_MESSAGE, "and an empty message", b""),
    (FIRST_MESSAGE, "in two messages, the newline in a third", b"\n"),
    (FIRST_MESSAGE, "in messages of one byte", SIDE_BEGINS),
    (BORDERS, "in a message without an end", b""),
    (BEHIND_THE_LINE, "with data behind it in its message", b"early"),
    (BEHIND_THE_LINE, "with a newline behind it in its message", b"\n"),
    (BEHIND_THE_LINE, "with data behind it in its last fragment", b"early"),
]
for row, how, data in SPELLINGS:
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
            continue  # where a partner waits, both relays have met it by then
        sees = {"partner": seen(partner, OK + data), "client": seen(client, OK)}
        happy = Record("happy", len(data), True)
        differ(row, [f"matching {name}"], (partner, client), happy, **sees)

# ---- requests


def upgrades(row: str, answer: str, *names: str) -> None:
    """There is a partner, and a client which meets it if it has got an upgrade and no answer."""
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
    "Host with a port that is none",
    "fragment in the path",
    "Origin that is none",
    "Origin twice",
    "subprotocol twice",
    "extensions on two lines",
    "extension with a parameter that is none",
)
upgrades(REQUEST, "200", "Upgrade to something else")
upgrades(REQUEST, "400", "HTTP/1.0", "HTTP/2.0")
upgrades(REQUEST, "426", "version 8", "version 7", "version that is none", "versions as a list")
upgrades(REQUEST, "426", "version 013")
upgrades(
    HTTP_SYNTAX,
    "400",
    "request line with two spaces",
    "space before a colon",
    "line without a colon",
    "line that is folded",
)
upgrades(REQUEST, "431", "9,000 bytes of a cookie")

BEGUN: list[tuple[str, str, str, list[Record]]] = [
    (HTTP_SYNTAX, "101", "request with lone line feeds", [EMPTY]),
    (REQUEST, "431", "9,000 bytes of a request without an end", []),
    (REQUEST, "400", "request that cannot become one", []),
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
        differ(BOTH_SPELLINGS, [f"{what} at the TCP listener"], ("ws",), **sees)

OTHER_LISTENER = {
    "WebSocket at the TCP listener": "ws",
    "TCP at the WebSocket listener": "tcp",
}
for partner in "tcp", "ws":
    for name, client in OTHER_LISTENER.items():
        sees = {"client": seen(client, OK), "partner": seen(partner, OK)}
        differ(BOTH_SPELLINGS, [name], (partner,), HAPPY, **sees)

# ---- what a pair moves, and its end

for kinds in WITH_ANY:
    differ(
        BORDERS,
        ["a message broken off"],
        kinds,
        Record("happy", 50_000, True),
        first=Seen(repr(OK), "closed"),
        second=seen(kinds[1], OK + b"x" * 50_000),
    )
    differ(
        BORDERS,
        ["a message without an end"],
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
        ["tcp ends behind last words"],
        kinds,
        Record("happy", 50_000, True),
        first=seen("ws", OK),
        second=seen(kinds[1], OK + b"x" * 50_000),
    )
    differ(
        BAD_FRAME,
        ["last words and a bad frame"],
        kinds,
        Record("happy", 50_000, True),
        first=seen("ws", OK, "Close 1002"),
        second=seen(kinds[1], OK + b"x" * 50_000),
    )
refused(TCP_ENDED, "ws", b"", "empty", "tcp ends without a byte", "tcp ends within a handshake")

SAME_ANSWER = ("1000", "1000 and a reason")
NOT_UTF8 = ("1000 and a reason that is not UTF-8", "1000 and half a letter")
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
            Record("happy", len(b"farewell"), True),
            first=seen("ws", OK, end),
            second=seen(kinds[1], OK + b"farewell"),
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
        differ(BAD_FRAME, [f"bad frame of one that waits: {name}"], alone, LONELY, **sees)
