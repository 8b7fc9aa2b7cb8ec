"""The scenarios of test_differential.py, for TCP and for WebSocket.

The script of a scenario connects clients and sends bytes. Where both relays must answer the same,
the script also checks the answer. After the script all remaining clients disconnect, and
everything that they received is compared.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from operator import methodcaller
from typing import NamedTuple

from stage import BAD, IMPATIENT, OK, Client, Kinds, Stage, handshake

Script = Callable[[Stage], None]


class Scenario(NamedTuple):
    script: Script
    kinds: list[Kinds]  # the script runs once with each of these


ANY_TWO: list[Kinds] = [("tcp", "tcp"), ("tcp", "ws"), ("ws", "tcp"), ("ws", "ws")]
ANY_ONE: list[Kinds] = [("tcp",), ("ws",)]  # for a script with one client
SCENARIOS: dict[str, Scenario] = {}


def scenario(kinds: list[Kinds]) -> Callable[[Script], Script]:
    """Return a decorator that adds a script to SCENARIOS, under the name of the function."""

    def add(script: Script) -> Script:
        SCENARIOS[script.__name__.replace("_", " ")] = Scenario(script, kinds)
        return script

    return add


# ---- bad handshakes

TOKEN = b"0123456789abcdef" * 4
SIDE = b"0123456789abcdef"
SIDED = b"please relay %s for side %s\n"

BAD_LINES = {
    "carriage return": SIDED % (TOKEN, SIDE + b"\r"),
    "carriage return, unsided": b"please relay %s\r\n" % TOKEN,
    "leading space": b" " + SIDED % (TOKEN, SIDE),
    "trailing space": SIDED % (TOKEN, SIDE + b" "),
    "two spaces": SIDED % (b" " + TOKEN, SIDE),
    "tab": b"please\trelay %s\n" % TOKEN,
    "short token": SIDED % (TOKEN[1:], SIDE),
    "long token": SIDED % (TOKEN + b"0", SIDE),
    "no token": b"please relay \n",
    "short side": SIDED % (TOKEN, SIDE[1:]),
    "long side": SIDED % (TOKEN, SIDE + b"0"),
    "no side": SIDED % (TOKEN, b""),
    "side without its words": b"please relay %s %s\n" % (TOKEN, SIDE),
    "hyphen in the token": SIDED % (TOKEN[1:] + b"-", SIDE),
    "hyphen in the side": SIDED % (TOKEN, SIDE[1:] + b"-"),
    "NUL in the token": SIDED % (TOKEN[1:] + b"\0", SIDE),
    "Latin-1 letter in the token": SIDED % (TOKEN[1:] + b"\xe9", SIDE),
    "UTF-8 letter in the side": SIDED % (TOKEN, SIDE[2:] + b"\xc3\xa9"),
    "Arabic digit in the token": SIDED % (TOKEN[2:] + b"\xd9\xa3", SIDE),
    "capitals": (SIDED % (TOKEN, SIDE)).upper(),
    "one capital": b"P" + (SIDED % (TOKEN, SIDE))[1:],
    "empty line": b"\n",
    "only a carriage return": b"\r\n",
    "prefix of a handshake": b"please\n",
    "handshake after an empty line": b"\n" + SIDED % (TOKEN, SIDE),
    "handshake after a bad line": b"hello\n" + SIDED % (TOKEN, SIDE),
    "something before the handshake": b"and " + SIDED % (TOKEN, SIDE),
    "TLS hello": bytes.fromhex("16030100c8010000c40303") + b"\n" + bytes(100),
    "binary": bytes(range(256)),
    "1,023 bytes and a newline": b"x" * 1023 + b"\n",
    "1,024 bytes and a newline": b"x" * 1024 + b"\n",
}


def bad_line(data: bytes) -> Script:
    def script(stage: Stage) -> None:
        client = stage.connect("client")
        client.send(data)
        client.expect(BAD)
        client.expect_end()

    return script


for name, data in BAD_LINES.items():
    SCENARIOS[f"bad line: {name}"] = Scenario(bad_line(data), ANY_ONE)
SCENARIOS["bad line: HTTP"] = Scenario(bad_line(b"GET / HTTP/1.0\r\n\r\n"), [("ws",)])


# ---- good handshakes


def meeting(first_side: str | None, second_side: str | None, accepted_first: str) -> Script:
    """Connect a pair and exchange bytes. Then the client with the first handshake closes."""

    def script(stage: Stage) -> None:
        if accepted_first == "first":
            first, second = stage.connect("first"), stage.connect("second")
        else:
            second, first = stage.connect("second"), stage.connect("first")
        first.send(stage.handshake(first_side))
        stage.settle()
        second.send(stage.handshake(second_side))
        first.expect(OK)
        second.expect(OK)
        first.send(b"hello")
        second.expect(b"hello")
        second.send(b"good day\n")
        first.expect(b"good day\n")
        first.close()

    return script


for first_side in "a", None:
    for second_side in "b", None:
        for accepted_first in "first", "second":
            title = f"meeting of side {first_side} and side {second_side}"
            SCENARIOS[f"{title}, {accepted_first} accepted first"] = Scenario(
                meeting(first_side, second_side, accepted_first), ANY_TWO
            )


@scenario(ANY_TWO)
def same_moment(stage: Stage) -> None:
    first, second = stage.connect("first"), stage.connect("second")
    first.send(stage.handshake("a"))
    second.send(stage.handshake("b"))
    first.expect(OK)
    second.expect(OK)


@scenario(ANY_TWO)
def byte_by_byte(stage: Stage) -> None:
    first = stage.waiting("first", "a")
    second = stage.connect("second")
    for byte in second.encode(stage.handshake("b")):
        second.write(bytes([byte]))
        stage.settle()  # so that the relay reads each byte alone
    first.expect(OK)
    second.expect(OK)


def unusual(first: bytes, second: bytes) -> Scenario:
    """Send two handshakes that look unusual, but are valid."""

    def script(stage: Stage) -> None:
        stage.connect("first").send(first)
        stage.settle()
        stage.connect("second").send(second)
        stage.settle()

    return Scenario(script, ANY_TWO)


LETTERS = b"AbCdEfGh" * 8
SCENARIOS |= {
    "underscores": unusual(SIDED % (b"_" * 64, b"_" * 16), SIDED % (b"_" * 64, b"_" * 15 + b"a")),
    "only digits": unusual(SIDED % (b"7" * 64, b"1" * 16), SIDED % (b"7" * 64, b"2" * 16)),
    "side in capitals is another side": unusual(
        SIDED % (LETTERS, b"a" * 16), SIDED % (LETTERS, b"A" * 16)
    ),
    "token in capitals is another token": unusual(
        SIDED % (LETTERS.upper(), b"a" * 16), SIDED % (LETTERS.lower(), b"b" * 16)
    ),
}


# ---- clients that disconnect: every way, in every state

LEAVING: dict[str, Callable[[Client], None]] = {
    "close": methodcaller("close"),
    "shutdown": methodcaller("shutdown"),
    "reset": methodcaller("reset"),
}


def interrupted(sent: slice | None, leave: Callable[[Client], None]) -> Script:
    """Disconnect after a part of the handshake."""

    def script(stage: Stage) -> None:
        client = stage.connect("client")
        if sent:
            client.send_unfinished(stage.handshake("a")[sent])
        stage.settle()
        leave(client)

    return script


def lonely(leave: Callable[[Client], None]) -> Script:
    """Disconnect while waiting. The next client with this token must wait, too."""

    def script(stage: Stage) -> None:
        leave(stage.waiting("client", "a"))
        stage.waiting("too late", "b")

    return script


def pair_ends(leaver_name: str, leave: Callable[[Client], None]) -> Script:
    """Disconnect one client of a pair. The other gets an orderly end."""

    def script(stage: Stage) -> None:
        first, second = stage.pair()
        first.send(b"one")
        second.expect(b"one")
        second.send(b"two")
        first.expect(b"two")
        leaver, stayer = (first, second) if leaver_name == "first" else (second, first)
        leave(leaver)
        stayer.expect_end()

    return script


def last_bytes(leaver_name: str, leave: Callable[[Client], None]) -> Script:
    """Send bytes and disconnect at once. The partner gets all of them before the end."""

    def script(stage: Stage) -> None:
        first, second = stage.pair()
        leaver, stayer = (first, second) if leaver_name == "first" else (second, first)
        leaver.send(b"x" * 50_000)
        leave(leaver)
        stayer.expect(b"x" * 50_000)
        stayer.expect_end()

    return script


for how, leave in LEAVING.items():
    SCENARIOS |= {
        f"{how} without a byte": Scenario(interrupted(None, leave), ANY_ONE),
        f"{how} in the middle of a handshake": Scenario(interrupted(slice(50), leave), ANY_ONE),
        f"{how} before the newline": Scenario(interrupted(slice(-1), leave), ANY_ONE),
        f"{how} while waiting": Scenario(lonely(leave), ANY_TWO),
    }
    for name in "first", "second":
        SCENARIOS |= {
            f"{how} by the {name} of a pair": Scenario(pair_ends(name, leave), ANY_TWO),
            f"{how} after the last bytes of the {name}": Scenario(last_bytes(name, leave), ANY_TWO),
        }


@scenario(ANY_ONE)
def handshake_and_end_at_once(stage: Stage) -> None:
    client = stage.connect("client")
    client.send_last(stage.handshake("a"))
    client.expect_end()


@scenario(ANY_TWO)
def both_close(stage: Stage) -> None:
    first, second = stage.pair()
    first.close()
    second.close()


@scenario(ANY_TWO)
def both_close_in_the_other_order(stage: Stage) -> None:
    first, second = stage.pair()
    second.close()
    first.close()


@scenario([("tcp", "tcp")])  # the reference often loses a Close that crosses another
def both_shut_down(stage: Stage) -> None:
    first, second = stage.pair()
    first.shutdown()
    second.shutdown()


@scenario(ANY_TWO)
def both_shut_down_one_after_the_other(stage: Stage) -> None:
    first, second = stage.pair()
    first.shutdown()
    stage.settle()
    second.shutdown()


@scenario(ANY_TWO)
def sending_to_one_that_has_left(stage: Stage) -> None:
    first, second = stage.pair()
    first.shutdown()
    second.expect_end()
    second.send(b"are you still there?")
    first.expect_end()


# ---- several clients with one token


@scenario(ANY_TWO)
def same_side_twice(stage: Stage) -> None:
    stage.waiting("first", "a")
    stage.waiting("again", "a")


@scenario(ANY_TWO)
def same_side_twice_and_the_first_leaves(stage: Stage) -> None:
    first = stage.waiting("first", "a")
    again = stage.waiting("again", "a")
    first.close()
    stage.settle()
    partner = stage.waiting("partner", "b")
    partner.expect(OK)
    again.expect(OK)


@scenario(ANY_TWO)
def same_side_four_times(stage: Stage) -> None:
    for number in range(4):
        stage.waiting(f"number {number}", "a")


@scenario(ANY_TWO)
def third_on_a_token_waits(stage: Stage) -> None:
    stage.pair()
    stage.waiting("third", "c")


@scenario(ANY_TWO)
def third_and_fourth_on_a_token_meet(stage: Stage) -> None:
    first, second = stage.pair()
    third = stage.waiting("third", "a")  # the running pair has this side, too
    fourth = stage.waiting("fourth", "b")
    third.expect(OK)
    fourth.expect(OK)
    third.send(b"from the third")
    fourth.expect(b"from the third")
    first.send(b"from the first")
    second.expect(b"from the first")


@scenario(ANY_TWO)
def three_unsided(stage: Stage) -> None:
    for name in "first", "second", "third":
        stage.waiting(name)


@scenario(ANY_TWO)
def token_free_again_after_a_pair(stage: Stage) -> None:
    first, second = stage.pair()
    first.close()
    second.expect_end()
    again = stage.waiting("first again", "a")
    stage.waiting("second again", "b")
    again.expect(OK)


# ---- early data


@scenario(ANY_ONE)
def impatient_in_one_segment(stage: Stage) -> None:
    client = stage.connect("client")
    client.send(stage.handshake("a"), b"early")
    client.expect(IMPATIENT)
    client.expect_end()


@scenario(ANY_ONE)
def impatient_later(stage: Stage) -> None:
    client = stage.waiting("client", "a")
    client.send(b"early")
    client.expect(IMPATIENT)
    client.expect_end()


@scenario(ANY_ONE)
def impatient_newline(stage: Stage) -> None:
    client = stage.connect("client")
    client.send(stage.handshake("a"), b"\n")
    client.expect(IMPATIENT)
    client.expect_end()


@scenario(ANY_ONE)
def impatient_second_handshake(stage: Stage) -> None:
    client = stage.connect("client")
    client.send(stage.handshake("a"), stage.handshake("b"))
    client.expect(IMPATIENT)
    client.expect_end()


@scenario(ANY_ONE)
def impatient_and_end_at_once(stage: Stage) -> None:
    client = stage.connect("client")
    client.send_last(stage.handshake("a"), b"early")
    client.read_to_end()


@scenario(ANY_ONE)
def more_after_impatient(stage: Stage) -> None:
    client = stage.waiting("client", "a")
    client.send(b"early")
    client.expect(IMPATIENT)
    client.expect_end()
    client.send(b"more")


@scenario(ANY_TWO)
def impatient_is_no_partner(stage: Stage) -> None:
    client = stage.waiting("client", "a")
    client.send(b"early")
    client.expect(IMPATIENT)
    stage.waiting("partner", "b")


@scenario(ANY_TWO)
def one_of_the_waiting_is_impatient(stage: Stage) -> None:
    impatient = stage.waiting("impatient", "a")
    patient = stage.waiting("patient", "a")
    impatient.send(b"early")
    impatient.expect(IMPATIENT)
    partner = stage.waiting("partner", "b")
    partner.expect(OK)
    patient.expect(OK)


@scenario(ANY_TWO)
def data_after_the_handshake_that_matches(stage: Stage) -> None:
    first = stage.waiting("first", "a")
    second = stage.connect("second")
    second.send(stage.handshake("b"), b"data, not early\n")
    first.expect(OK + b"data, not early\n")
    second.expect(OK)


# ---- a transfer


@scenario(ANY_TWO)
def mebibyte_each_way(stage: Stage) -> None:
    first, second = stage.pair()
    from_first = bytes(range(256)) * 4096  # 1 MiB
    from_second = from_first[::-1]
    senders = [
        threading.Thread(target=first.send, args=[from_first]),
        threading.Thread(target=second.send, args=[from_second]),
    ]
    for sender in senders:
        sender.start()
    first.expect(from_second)
    second.expect(from_first)
    for sender in senders:
        sender.join()


# ---- scenarios in which the relays differ (see differences.py), and similar ones


def long_line(data: bytes) -> Scenario:
    def script(stage: Stage) -> None:
        stage.connect("client").send(data)
        stage.settle()

    return Scenario(script, ANY_ONE)


SCENARIOS |= {
    "1,023 bytes without a newline": long_line(b"x" * 1023),
    "1,024 bytes without a newline": long_line(b"x" * 1024),
    "1,025 bytes without a newline": long_line(b"x" * 1025),
    "20,000 bytes without a newline": long_line(b"x" * 20_000),
    "1,025 bytes and a newline": long_line(b"x" * 1025 + b"\n"),
    "20,000 bytes and a newline": long_line(b"x" * 20_000 + b"\n"),
}

ROUNDS = 8  # several, because a relay that takes any waiting client may take the newest by chance
WAITING = 4


def newest(partner_side: str | None) -> Scenario:
    """Match the waiting client with the latest handshake. It was not accepted last."""

    def script(stage: Stage) -> None:
        for number in range(ROUNDS):
            token = f"{stage.token} {number}"
            clients = [stage.connect(f"{number}: handshake {n}") for n in range(WAITING, 0, -1)]
            for client in reversed(clients):
                client.send(handshake(token, "a"))
                stage.settle()
            partner = stage.connect(f"{number}: partner")
            partner.send(handshake(token, partner_side))
            partner.expect(OK)

    return Scenario(script, ANY_TWO)


SCENARIOS |= {
    "newest of a side meets another side": newest("b"),
    "newest of a side meets a client without side": newest(None),
}


@scenario(ANY_TWO)
def handshake_that_matches_data_and_end_at_once(stage: Stage) -> None:
    first = stage.waiting("first", "a")
    second = stage.connect("second")
    second.send_last(stage.handshake("b"), b"last bytes")
    first.expect(OK + b"last bytes")
    first.expect_end()


def still_sending(beginning: Callable[[Stage], bytes]) -> Scenario:
    """Continue to send while the relay refuses the client."""

    def script(stage: Stage) -> None:
        client = stage.connect("client")
        client.send_last(beginning(stage), bytes(16 << 20))

    return Scenario(script, ANY_ONE)


SCENARIOS |= {
    "sending on after a bad handshake": still_sending(lambda stage: b"hello\n"),
    "sending on after impatient": still_sending(lambda stage: stage.handshake("a")),
}
