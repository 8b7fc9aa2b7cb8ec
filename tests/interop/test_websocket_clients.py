"""Clients with the WebSocket libraries `websockets`, `autobahn` and `ws` use our relay.

Each client is a program in websocket_clients/ that executes a list of steps and prints the results.
The results are what the library reports. All libraries offer permessage-deflate.
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
LONGEST_MESSAGE = 1 << 15  # docs/protocol.md, "WebSocket"

LIBRARIES = ["websockets", "autobahn", "ws"]
CLIENTS = [*LIBRARIES, "tcp"]
PAIRS = [pair for pair in itertools.product(CLIENTS, CLIENTS) if set(pair) != {"tcp"}]
PARTNERS = dict(zip(LIBRARIES, LIBRARIES[1:] + LIBRARIES[:1]))

FIRST, SECOND = (handshake("interop", side).decode() for side in ("first", "second"))
NOTHING_ACCEPTED = ["open", None, None]  # neither an extension nor a subprotocol
SENT = ["send"]
OK = ["receive", "ok\n"]
LONELY, EMPTY = Record("lonely", 0, False), Record("empty", 0, False)

Step = list[Any]


def happy(total_bytes: int) -> Record:
    return Record("happy", total_bytes, True)


def end(code: int | None, name: str = "closed") -> Step:
    """Return the result of an orderly end. The code is None over TCP, which has no Close."""
    return [name, code, "", True, "fin"]


class Program(NamedTuple):
    argv: list[str]
    env: Mapping[str, str] | None = None


class Client(Child):
    """A client program with its steps."""

    def __init__(
        self, program: Program, url: str, steps: Sequence[Any], *subprotocols: str
    ) -> None:
        argv = [*program.argv, url, *subprotocols]
        super().__init__(argv, env=program.env, stdin=json.dumps(steps))

    def has_done(self, step: str) -> None:
        """Wait until the client has done the next step of that name."""
        self.lines.until(rf'^\["{step}"')

    def results(self) -> list[Step]:
        """Wait until the client has done all steps, and return their results."""
        self.succeed()
        return [json.loads(line) for line in self.lines.seen]


class OurRelay(Relay):
    """Our relay with a TCP and a WebSocket listener. Each of them accepts both encodings."""

    def __init__(self, command: list[str]) -> None:
        endpoint = "tcp:0:interface=127.0.0.1"
        super().__init__(
            [*command, "--port", endpoint, "--websocket", endpoint],
            r"^Transit starting on tcp:(\d+):\S+, tcp:(\d+):\S+ \(websocket\)$",
        )
        self.plain, self.web = (f"ws://127.0.0.1:{port}/" for port in self.ports)

    def stop(self, *records: Record) -> None:
        """Stop the relay. It must have written exactly these records, and no warning."""
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
    assert node  # npm_ws needs it
    return {
        "websockets": Program([str(python_tools / "python"), str(scripts / "with_websockets.py")]),
        "autobahn": Program([str(python_tools / "python"), str(scripts / "with_autobahn.py")]),
        "ws": Program(
            [node, str(scripts / "with_ws.js")], {**os.environ, "NODE_PATH": str(npm_ws)}
        ),
        "tcp": Program([sys.executable, str(scripts / "with_tcp.py")]),
    }


def plan(chance: random.Random) -> list[list[int]]:
    """Return messages of at least 16 MiB in all, as lists of the sizes of their fragments.

    Half of the sizes are below 1 KiB, and the largest is 1 MiB. Some messages are empty.
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
    """Send 16 MiB in both directions. The first uses the WebSocket listener, and ends the pair."""
    chance = random.Random(f"{first} {second}")
    up, down = plan(chance), plan(chance)
    close = ["close"] if first == "tcp" else ["close", 1000]
    steps = [["send", FIRST], ["receive"], ["transfer", up, total(down)], close]
    with Client(programs[first], relay.web, steps) as one:
        one.has_done("send")
        steps = [["send", SECOND], ["receive"], ["transfer", down, total(up)], ["closed"]]
        with Client(programs[second], relay.plain, steps) as other:
            *start_1, transfer_1, end_1 = one.results()
            *start_2, transfer_2, end_2 = other.results()
    assert start_1 == start_2 == [NOTHING_ACCEPTED, SENT, OK]
    _, sent_1, received_1, *sizes_1 = transfer_1
    _, sent_2, received_2, *sizes_2 = transfer_2
    assert sent_1 == received_2
    assert sent_2 == received_1
    for name, (smallest, largest) in (first, sizes_1), (second, sizes_2):
        assert name == "tcp" or 0 < smallest <= largest <= LONGEST_MESSAGE
    assert end_1 == end(None if first == "tcp" else 1000, "close")
    assert end_2 == end(None if second == "tcp" else 1000)
    relay.stop(happy(total(up) + total(down)))


@pytest.mark.parametrize(
    ("library", "code_and_reason", "echo"),
    [
        *((library, [4001, "have seen enough"], 4001) for library in LIBRARIES),
        # `websockets` always sends a code.
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
    """The client that closes gets its own code without the reason. The partner gets 1000."""
    partner = programs[PARTNERS[library]]
    with Client(partner, relay.web, [["send", FIRST], ["receive"], ["closed"]]) as other:
        steps = [["send", SECOND], ["receive"], ["close", *code_and_reason]]
        with Client(programs[library], relay.web, steps) as one:
            assert one.results() == [NOTHING_ACCEPTED, SENT, OK, end(echo, "close")]
            assert other.results() == [NOTHING_ACCEPTED, SENT, OK, end(1000)]
    relay.stop(happy(0))


HANDSHAKES = {
    "without newline": [["send", FIRST.rstrip()]],
    "in fragments": [["send", FIRST[:1], "", FIRST[1:50], FIRST[50:]]],
    # The side is in the last message. Otherwise the bytes before it would be a whole handshake.
    "in many messages": [["send", part] for part in (*FIRST[:76], FIRST[76:])],
    "after an empty message": [["send", ""], ["send", FIRST]],
}


@pytest.mark.parametrize("form", HANDSHAKES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_handshake(
    library: str, form: str, programs: Mapping[str, Program], relay: OurRelay
) -> None:
    """Bytes after a handshake in any form are data, even a newline."""
    start = HANDSHAKES[form]
    steps = [*start, ["receive"], ["send", "\n"], ["close", 1000]]
    with Client(programs[library], relay.web, steps) as one:
        steps = [["send", SECOND], ["receive"], ["receive"], ["closed"]]
        with Client(programs["tcp"], relay.web, steps) as other:
            results = [NOTHING_ACCEPTED, *[SENT] * len(start), OK]
            assert one.results() == [*results, SENT, end(1000, "close")]
            assert other.results() == [NOTHING_ACCEPTED, SENT, OK, ["receive", "\n"], end(None)]
    relay.stop(happy(1))


@pytest.mark.parametrize("library", LIBRARIES)
def test_empty_messages(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """Empty messages have no effect: the client is not impatient, and the partner gets nothing."""
    empty = [["send", ""], ["send", "", ""], ["ping", ""]]  # the relay reads them before the Ping
    partner = programs[PARTNERS[library]]
    steps = [["send", FIRST], *empty, ["receive"], *empty, ["send", "data"], ["close", 1000]]
    with Client(programs[library], relay.web, steps) as one:
        one.has_done("ping")
        steps = [["send", SECOND], ["receive"], ["receive"], ["closed"]]
        with Client(partner, relay.web, steps) as other:
            of_empty = [SENT, SENT, ["ping"]]
            expected = [SENT, *of_empty, OK, *of_empty, SENT, end(1000, "close")]
            assert one.results() == [NOTHING_ACCEPTED, *expected]
            expected = [SENT, OK, ["receive", "data"], end(1000)]
            assert other.results() == [NOTHING_ACCEPTED, *expected]
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
        assert client.results() == [NOTHING_ACCEPTED, *sent, ["receive", answer], end(1000)]
    relay.stop(record)


@pytest.mark.parametrize("library", LIBRARIES)
def test_text_instead_of_handshake(
    library: str, programs: Mapping[str, Program], relay: OurRelay
) -> None:
    with Client(programs[library], relay.web, [["send_text", FIRST], ["closed"]]) as client:
        assert client.results() == [NOTHING_ACCEPTED, ["send_text"], end(1003)]
    relay.stop(EMPTY)


@pytest.mark.parametrize("library", LIBRARIES)
def test_text_to_a_partner(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """A text message ends the pair, and does not reach the partner."""
    partner = programs[PARTNERS[library]]
    with Client(partner, relay.web, [["send", FIRST], ["receive"], ["closed"]]) as other:
        steps = [["send", SECOND], ["receive"], ["send_text", "hello"], ["closed"]]
        with Client(programs[library], relay.web, steps) as one:
            assert one.results() == [NOTHING_ACCEPTED, SENT, OK, ["send_text"], end(1003)]
            assert other.results() == [NOTHING_ACCEPTED, SENT, OK, end(1000)]
    relay.stop(happy(0))


@pytest.mark.parametrize("library", LIBRARIES)
def test_ping(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """Each Ping gets its Pong: in all states, between fragments, and with any payload."""
    message = ["one ", "message"]
    pings = [["ping", payload] for payload in ("", "hello", "x" * 125)]
    around = ["send_around_ping", message[0], "between", message[1]]
    steps = [*pings, ["send", FIRST], *pings, ["receive"], *pings, around, *pings, ["close", 1000]]
    size = len("".join(message))
    with Client(programs[library], relay.web, steps) as one:
        one.has_done("send")
        steps = [["send", SECOND], ["receive"], ["transfer", [], size], ["closed"]]
        with Client(programs["tcp"], relay.web, steps) as other:
            results = one.results()
            *_, (_, _, received, *_), partner_end = other.results()
    pongs = [["ping"]] * len(pings)
    paired = [*pongs, SENT, *pongs, OK, *pongs]
    rest = [["send_around_ping"], *pongs, end(1000, "close")]
    assert results == [NOTHING_ACCEPTED, *paired, *rest]
    assert received == hashlib.sha256("".join(message).encode()).hexdigest()
    assert partner_end == end(None)
    relay.stop(happy(size))


@pytest.mark.parametrize("library", LIBRARIES)
def test_subprotocol(library: str, programs: Mapping[str, Program], relay: OurRelay) -> None:
    """The relay accepts no subprotocol. `ws` then closes the connection."""
    steps = [["send", FIRST], ["close", 1000]]
    with Client(programs[library], relay.web, steps, "transit", "binary") as client:
        if library == "ws":
            client.lines.until("Server sent no subprotocol")
            assert client.wait() == 1
        else:
            assert client.results() == [NOTHING_ACCEPTED, SENT, end(1000, "close")]
    relay.stop(EMPTY if library == "ws" else LONELY)


@pytest.mark.parametrize("library", LIBRARIES)
def test_offers(library: str, programs: Mapping[str, Program]) -> None:
    """Each library offers permessage-deflate and subprotocols: NOTHING_ACCEPTED relies on it."""
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
    """A relay that stops sends Close 1001 to waiting clients and to both clients of a pair."""
    program = programs[library]
    waiting = handshake("another", "waiting").decode()
    steps = [["receive"], ["closed"]]
    with ExitStack() as running:
        start = running.enter_context
        lonely = start(Client(program, relay.web, [["send", waiting], ["ping", ""], ["closed"]]))
        one = start(Client(program, relay.web, [["send", FIRST], *steps]))
        other = start(Client(program, relay.plain, [["send", SECOND], *steps]))
        lonely.has_done("ping")  # the relay has its handshake then
        one.has_done("receive")
        other.has_done("receive")
        relay.stop(happy(0), LONELY)
        assert lonely.results() == [NOTHING_ACCEPTED, SENT, ["ping"], end(1001)]
        assert one.results() == other.results() == [NOTHING_ACCEPTED, SENT, OK, end(1001)]
