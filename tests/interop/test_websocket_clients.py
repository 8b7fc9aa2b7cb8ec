"""WebSocket clients that nobody here wrote, through our relay: `websockets`, `autobahn` and `ws`.

Each is a program in websocket_clients/ that does the steps it is given and tells what it has seen.
What a client sees is what its library makes of it; all of them offer permessage-deflate.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from children import TIMEOUT, Child, Record, Relay
from stage import handshake

MEBIBYTE = 1 << 20
LONGEST_MESSAGE = 1 << 15  # PROTOCOL.md, section 2

LIBRARIES = ["websockets", "autobahn", "ws"]
CLIENTS = [*LIBRARIES, "tcp"]
PAIRS = [pair for pair in itertools.product(CLIENTS, CLIENTS) if set(pair) != {"tcp"}]
PARTNERS = dict(zip(LIBRARIES, LIBRARIES[1:] + LIBRARIES[:1]))

FIRST, SECOND = (handshake("interop", side).decode() for side in ("first", "second"))
NOTHING_TAKEN = ["open", None, None]  # neither an extension nor a subprotocol
SENT = ["send"]
OK = ["receive", "ok\n"]
LONELY, EMPTY = Record("lonely", 0, False), Record("empty", 0, False)

Step = list[Any]


def happy(total_bytes: int) -> Record:
    return Record("happy", total_bytes, True)


def end(code: int | None, name: str = "closed") -> Step:
    """What a client sees of an orderly end. The code is None where there is no Close: over TCP."""
    return [name, code, "", True, "fin"]


class Program(NamedTuple):
    argv: list[str]
    env: Mapping[str, str] | None = None


class Client(Child):
    """A client doing its steps."""

    def __init__(
        self, program: Program, url: str, steps: Sequence[Any], *subprotocols: str
    ) -> None:
        argv = [*program.argv, url, *subprotocols]
        super().__init__(argv, env=program.env, stdin=json.dumps(steps))

    def has_done(self, step: str) -> None:
        """Wait until it has done the next step of that name."""
        self.lines.until(rf'^\["{step}"')

    def all_seen(self) -> list[Step]:
        """Wait until it has done all its steps: what it has seen in each."""
        self.succeed()
        return [json.loads(line) for line in self.lines.seen]


class OurRelay(Relay):
    """Our relay with a listener for TCP and one for WebSocket, each of which takes both."""

    def __init__(self, command: list[str]) -> None:
        endpoint = "tcp:0:interface=127.0.0.1"
        super().__init__(
            [*command, "--port", endpoint, "--websocket", endpoint],
            r"^Transit starting on tcp:(\d+):\S+, tcp:(\d+):\S+ \(websocket\)$",
        )
        self.plain, self.web = (f"ws://127.0.0.1:{port}/" for port in self.ports)

    def stop(self, *records: Record) -> None:
        """Stop it: it has written just these records, and had nothing to complain about."""
        assert self.terminate() == 0
        assert sorted(self.last_records()) == sorted(records)
        self.lines.rest()
        for word in "warning:", "error:", "critical:", "Traceback":
            assert word not in str(self.lines), str(self.lines)


@pytest.fixture
def relay(our_relay: list[str]) -> Iterator[OurRelay]:
    with OurRelay(our_relay) as relay:
        yield relay


@pytest.fixture(scope="module")
def programs(python_tools: Path, npm_ws: Path) -> Mapping[str, Program]:
    scripts = Path(__file__).parent / "websocket_clients"
    node = shutil.which("node")
    assert node  # or there were no npm_ws
    return {
        "websockets": Program([str(python_tools / "python"), str(scripts / "with_websockets.py")]),
        "autobahn": Program([str(python_tools / "python"), str(scripts / "with_autobahn.py")]),
        "ws": Program(
            [node, str(scripts / "with_ws.js")], {**os.environ, "NODE_PATH": str(npm_ws)}
        ),
        "tcp": Program([sys.executable, str(scripts / "with_tcp.py")]),
    }


def plan(chance: random.Random) -> list[list[int]]:
    """Messages, in all at least 16 MiB, as lists of their fragments' sizes.

    Half of the sizes are below 1 KiB, the largest is 1 MiB; some messages are empty.
    """

    def size() -> int:
        return int(2 ** chance.uniform(0, 20))

    messages = [[0], [1], [MEBIBYTE], [0, 0], [0, 1, 0, MEBIBYTE // 2]]
    while total(messages) < 16 * MEBIBYTE:
        fragments = chance.choice([0, 1, 1, 1, 1, 3])
        messages.append([size() // fragments for _ in range(fragments)] or [0])
    chance.shuffle(messages)
    return messages


def total(messages: list[list[int]]) -> int:
    return sum(map(sum, messages))


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_transfer(
    first: str, second: str, programs: Mapping[str, Program], relay: OurRelay
) -> None:
    """16 MiB each way at once. The first comes to the listener for WebSocket, and ends it all."""
    chance = random.Random(f"{first} {second}")
    up, down = plan(chance), plan(chance)
    close = ["close"] if first == "tcp" else ["close", 1000]
    steps = [["send", FIRST], ["receive"], ["transfer", up, total(down)], close]
    with Client(programs[first], relay.web, steps) as one:
        one.has_done("send")
        steps = [["send", SECOND], ["receive"], ["transfer", down, total(up)], ["closed"]]
        with Client(programs[second], relay.plain, steps) as other:
            *ones_start, ones_transfer, ones_end = one.all_seen()
            *others_start, others_transfer, others_end = other.all_seen()
    assert ones_start == others_start == [NOTHING_TAKEN, SENT, OK]
    _, ones_sent, ones_received, *ones_sizes = ones_transfer
    _, others_sent, others_received, *others_sizes = others_transfer
    assert ones_sent == others_received
    assert others_sent == ones_received
    for name, (smallest, largest) in (first, ones_sizes), (second, others_sizes):
        assert name == "tcp" or 0 < smallest <= largest <= LONGEST_MESSAGE
    assert ones_end == end(None if first == "tcp" else 1000, "close")
    assert others_end == end(None if second == "tcp" else 1000)
    relay.stop(happy(total(up) + total(down)))


@pytest.mark.parametrize(
    ("library", "code_and_reason", "echo"),
    [
        *((library, [4001, "have seen enough"], 4001) for library in LIBRARIES),
        # `websockets` always names a code.
        ("autobahn", [], 1005),
        ("ws", [], 1005),
    ],
)
def test_close(
    library: str,
    code_and_reason: list[Any],
    echo: int,
    programs: Mapping[str, Program],
    relay: OurRelay,
) -> None:
    """Whoever closes hears its own code again, without its reason; the partner hears 1000."""
    partner = programs[PARTNERS[library]]
    with Client(partner, relay.web, [["send", FIRST], ["receive"], ["closed"]]) as other:
        steps = [["send", SECOND], ["receive"], ["close", *code_and_reason]]
        with Client(programs[library], relay.web, steps) as one:
            assert one.all_seen() == [NOTHING_TAKEN, SENT, OK, end(echo, "close")]
            assert other.all_seen() == [NOTHING_TAKEN, SENT, OK, end(1000)]
    relay.stop(happy(0))


HANDSHAKES = {
    "without newline": [["send", FIRST.rstrip()]],
    "in fragments": [["send", FIRST[:1], "", FIRST[1:50], FIRST[50:]]],
    # Not up to the side: what comes before it is a handshake, too, and the message would end it.
    "in many messages": [["send", part] for part in (*FIRST[:76], FIRST[76:])],
    "behind an empty message": [["send", ""], ["send", FIRST]],
}


@pytest.mark.parametrize("spelling", HANDSHAKES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_handshake(
    library: str, spelling: str, programs: Mapping[str, Program], relay: OurRelay
) -> None:
    """However it is spelled, what follows it is data: even a newline."""
    start = HANDSHAKES[spelling]
    steps = [*start, ["receive"], ["send", "\n"], ["close", 1000]]
    with Client(programs[library], relay.web, steps) as one:
        steps = [["send", SECOND], ["receive"], ["receive"], ["closed"]]
        with Client(programs["tcp"], relay.web, steps) as other:
            start_seen = [NOTHING_TAKEN, *[SENT] * len(start), OK]
            assert one.all_seen() == [*start_seen, SENT, end(1000, "close")]
            assert other.all_seen() == [NOTHING_TAKEN, SENT, OK, ["receive", "\n"], end(None)]
    relay.stop(happy(1))


@pytest.mark.parametrize("library", LIBRARIES)
def test_empty_messages(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """They are nothing: neither impatient, nor passed on."""
    empty = [["send", ""], ["send", "", ""], ["ping", ""]]  # the relay has read them by its Pong
    partner = programs[PARTNERS[library]]
    steps = [["send", FIRST], *empty, ["receive"], *empty, ["send", "data"], ["close", 1000]]
    with Client(programs[library], relay.web, steps) as one:
        one.has_done("ping")
        steps = [["send", SECOND], ["receive"], ["receive"], ["closed"]]
        with Client(partner, relay.web, steps) as other:
            empty_seen = [SENT, SENT, ["ping"]]
            seen = [SENT, *empty_seen, OK, *empty_seen, SENT, end(1000, "close")]
            assert one.all_seen() == [NOTHING_TAKEN, *seen]
            seen = [SENT, OK, ["receive", "data"], end(1000)]
            assert other.all_seen() == [NOTHING_TAKEN, *seen]
    relay.stop(happy(len("data")))


REFUSALS = {
    "bad handshake\n": ([["send", "please relay me\n"]], Record("errory", 0, False)),
    "impatient\n": ([["send", FIRST], ["send", "hello"]], Record("impatient", 0, False)),
}


@pytest.mark.parametrize("answer", REFUSALS, ids=str.strip)
@pytest.mark.parametrize("library", LIBRARIES)
def test_refused(
    library: str, answer: str, programs: Mapping[str, Program], relay: OurRelay
) -> None:
    start, record = REFUSALS[answer]
    with Client(programs[library], relay.web, [*start, ["receive"], ["closed"]]) as client:
        sent = [SENT] * len(start)
        assert client.all_seen() == [NOTHING_TAKEN, *sent, ["receive", answer], end(1000)]
    relay.stop(record)


@pytest.mark.parametrize("library", LIBRARIES)
def test_text_instead_of_handshake(
    library: str, programs: Mapping[str, Program], relay: OurRelay
) -> None:
    with Client(programs[library], relay.web, [["send_text", FIRST], ["closed"]]) as client:
        assert client.all_seen() == [NOTHING_TAKEN, ["send_text"], end(1003)]
    relay.stop(EMPTY)


@pytest.mark.parametrize("library", LIBRARIES)
def test_text_to_a_partner(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """It ends the pair, and does not reach the partner."""
    partner = programs[PARTNERS[library]]
    with Client(partner, relay.web, [["send", FIRST], ["receive"], ["closed"]]) as other:
        steps = [["send", SECOND], ["receive"], ["send_text", "hello"], ["closed"]]
        with Client(programs[library], relay.web, steps) as one:
            assert one.all_seen() == [NOTHING_TAKEN, SENT, OK, ["send_text"], end(1003)]
            assert other.all_seen() == [NOTHING_TAKEN, SENT, OK, end(1000)]
    relay.stop(happy(0))


@pytest.mark.parametrize("library", LIBRARIES)
def test_ping(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """At any time, between the fragments of a message too, and with any payload."""
    message = ["one ", "message"]
    pings = [["ping", payload] for payload in ("", "hello", "x" * 125)]
    around = ["send_around_ping", message[0], "between", message[1]]
    steps = [*pings, ["send", FIRST], *pings, ["receive"], *pings, around, *pings, ["close", 1000]]
    size = len("".join(message))
    with Client(programs[library], relay.web, steps) as one:
        one.has_done("send")
        steps = [["send", SECOND], ["receive"], ["transfer", [], size], ["closed"]]
        with Client(programs["tcp"], relay.web, steps) as other:
            seen = one.all_seen()
            *_, (_, _, received, *_), others_end = other.all_seen()
    pongs = [["ping"]] * len(pings)
    met = [*pongs, SENT, *pongs, OK, *pongs]
    assert seen == [NOTHING_TAKEN, *met, ["send_around_ping"], *pongs, end(1000, "close")]
    assert received == hashlib.sha256("".join(message).encode()).hexdigest()
    assert others_end == end(None)
    relay.stop(happy(size))


@pytest.mark.parametrize("library", LIBRARIES)
def test_subprotocol(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """None is taken. `ws` then gives up by itself, as its users must know."""
    steps = [["send", FIRST], ["close", 1000]]
    with Client(programs[library], relay.web, steps, "transit", "binary") as client:
        if library == "ws":
            client.lines.until("Server sent no subprotocol")
            assert client.wait() == 1
        else:
            assert client.all_seen() == [NOTHING_TAKEN, SENT, end(1000, "close")]
    relay.stop(EMPTY if library == "ws" else LONELY)


@pytest.mark.parametrize("library", LIBRARIES)
def test_what_is_offered(library: str, programs: Mapping[str, Program]) -> None:
    """What makes NOTHING_TAKEN a proof: each offers permessage-deflate, and any subprotocol."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(TIMEOUT)
        url = f"ws://127.0.0.1:{listener.getsockname()[1]}/"
        with Client(programs[library], url, [], "transit", "binary"):
            connection, _ = listener.accept()
            with connection, connection.makefile(encoding="ascii") as request:
                connection.settimeout(TIMEOUT)
                head = "".join(iter(request.readline, "\n")).lower()
    assert "\nsec-websocket-extensions: permessage-deflate" in head
    assert "\nsec-websocket-protocol: transit" in head


@pytest.mark.parametrize("library", LIBRARIES)
def test_stop(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """A relay that is told to stop says so to those who relay and to those who wait."""
    program = programs[library]
    waiting = handshake("another", "waiting").decode()
    steps = [["receive"], ["closed"]]
    with ExitStack() as running:
        start = running.enter_context
        lonely = start(Client(program, relay.web, [["send", waiting], ["ping", ""], ["closed"]]))
        one = start(Client(program, relay.web, [["send", FIRST], *steps]))
        other = start(Client(program, relay.plain, [["send", SECOND], *steps]))
        lonely.has_done("ping")  # then its handshake has arrived
        one.has_done("receive")
        other.has_done("receive")
        relay.stop(happy(0), LONELY)
        assert lonely.all_seen() == [NOTHING_TAKEN, SENT, ["ping"], end(1001)]
        assert one.all_seen() == other.all_seen() == [NOTHING_TAKEN, SENT, OK, end(1001)]
