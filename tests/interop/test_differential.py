"""The same scenarios against our relay and against the Twisted one: clients must see the same.

Compared are every byte each client saw (over WebSocket: of payload), how each connection ended,
and every usage record (mood, bytes, whether there was a waiting time). Every scenario is played
over TCP, over WebSocket and over both. Where the two relays may differ, differences.py says what
ours does and which row of PROTOCOL.md it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import websocket_scenarios  # noqa: F401  # adds its own to SCENARIOS
from children import Relay
from differences import DIFFERENCES, STOPPING
from scenarios import ANY_TWO, SCENARIOS
from stage import Kinds, Outcome, Stage, WebSocketClient

LISTENERS = ["--port=tcp:0:interface=127.0.0.1", "--websocket=tcp:0:interface=127.0.0.1"]
CASES = {
    f"{name}, {' x '.join(kinds)}": (name, kinds)
    for name, scenario in SCENARIOS.items()
    for kinds in scenario.kinds
}

# The reference drops a client that has not answered its Close after a second, rounded down to
# whole ticks of its clock: it may be at once, and what was sent before is lost. Here it waits.
PATIENT_REFERENCE = """
from twisted.application.twist._twist import Twist
from wormhole_transit_relay.transit_server import WebSocketTransitConnection
WebSocketTransitConnection.closeHandshakeTimeout = 0
Twist.main()
"""


def start_ours(command: list[str], folder: Path) -> Relay:
    return Relay(
        [*command, *LISTENERS, f"--usage-db={folder / 'usage.sqlite'}"],
        r"^Transit starting on tcp:(\d+):interface=127\.0\.0\.1, "
        r"tcp:(\d+):interface=127\.0\.0\.1 \(websocket\)$",
    )


def start_reference(python_tools: Path) -> Relay:
    twist = [str(python_tools / "python"), "-c", PATIENT_REFERENCE, "--log-format=text"]
    return Relay(
        # It does not take port 0 without a URL, and has no other use for that.
        [*twist, "transitrelay", *LISTENERS, "--websocket-url=ws://localhost/"],
        r" ServerFactory starting on (\d+)$",
        r" WebSocketServerFactory starting on (\d+)$",
    )


@pytest.fixture(scope="module")
def ours(our_relay: list[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    with start_ours(our_relay, tmp_path_factory.mktemp("ours")) as relay:
        yield relay


@pytest.fixture(scope="module")
def reference(python_tools: Path) -> Iterator[Relay]:
    with start_reference(python_tools) as relay:
        yield relay


def play(name: str, kinds: Kinds, relay: Relay) -> Outcome:
    stage = Stage(relay, name, kinds)
    try:
        SCENARIOS[name].script(stage)
        return stage.outcome()
    finally:
        stage.abandon()


def play_until_no_reset(name: str, kinds: Kinds, reference: Relay) -> Outcome:
    """On a busy machine the reference's reset may overtake its Close: then once more.

    One of hundreds does. Where it always resets, this gives that.
    """
    for _ in range(5):
        outcome = play_reference(name, kinds, reference)
        if all(seen.end != "reset" for seen in outcome.clients.values()):
            break
    return outcome


def play_reference(name: str, kinds: Kinds, reference: Relay) -> Outcome:
    return without_resets_behind_a_close(play(name, kinds, reference))


def without_resets_behind_a_close(outcome: Outcome) -> Outcome:
    """The reference resets the connection when its Close is answered, where ours ends it.

    No client looks any more: "Close 1000" is what both mean.
    """
    clients = {
        name: seen._replace(end=seen.end.replace(", reset", ""))
        for name, seen in outcome.clients.items()
    }
    return outcome._replace(clients=clients)


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_reference(case: str, ours: Relay, reference: Relay) -> None:
    name, kinds = CASES[case]
    mine = play(name, kinds, ours)
    if (name, kinds) not in DIFFERENCES:
        assert mine == play_until_no_reset(name, kinds, reference)
        return
    row, expected = DIFFERENCES[name, kinds]
    assert mine == expected, row
    # By chance the reference may do what ours always does, but not time after time.
    assert any(play_reference(name, kinds, reference) != expected for _ in range(5)), (
        f"no difference any more: {row}"
    )


def test_every_difference_has_a_scenario() -> None:
    assert set(DIFFERENCES) <= set(CASES.values())


def largest_message(relay: Relay, kinds: Kinds) -> int:
    """... that a WebSocket client gets of a mebibyte."""
    stage = Stage(relay, "largest message", kinds)
    try:
        first, second = stage.pair()
        assert isinstance(second, WebSocketClient)
        first.send(bytes(1 << 20))
        second.expect(bytes(1 << 20))
        stage.outcome()
        return max(second.sizes)
    finally:
        stage.abandon()


@pytest.mark.parametrize("sender", ["tcp", "ws"])
def test_messages_are_small(sender: str, ours: Relay, reference: Relay) -> None:
    """PROTOCOL.md, section 2, `binary messages of at most 32 KiB`: larger ones there."""
    limit = 32 << 10
    assert largest_message(ours, (sender, "ws")) <= limit
    assert any(largest_message(reference, (sender, "ws")) > limit for _ in range(5))


def stop_in_the_middle(relay: Relay, kinds: Kinds) -> tuple[int, Outcome]:
    """Stop a relay with clients in every state: its exit code, and what was seen."""
    stage = Stage(relay, "stop", kinds)
    try:
        first, second = stage.pair()
        first.send(b"so far")
        second.expect(b"so far")
        stage.waiting("waiting", "c")
        stage.connect("in the middle of a handshake").begin(stage.handshake("a")[:50])
        stage.connect("silent")
        stage.settle()
        return relay.terminate(), stage.outcome_of_stop()
    finally:
        stage.abandon()


@pytest.mark.parametrize("kinds", ANY_TWO, ids=" x ".join)
def test_stopped_as_the_reference(
    kinds: Kinds, our_relay: list[str], python_tools: Path, tmp_path: Path
) -> None:
    with start_ours(our_relay, tmp_path) as relay:
        code, mine = stop_in_the_middle(relay, kinds)
    with start_reference(python_tools) as relay:
        _, theirs = stop_in_the_middle(relay, kinds)  # Twisted ends by the signal itself
    assert code == 0
    assert mine.records == theirs.records
    for place, (name, seen) in enumerate(mine.clients.items()):
        if kinds[place % 2] == "tcp":
            assert seen == theirs.clients[name]
        else:
            assert seen == theirs.clients[name]._replace(end="Close 1001"), STOPPING
            assert theirs.clients[name].end != seen.end, f"no difference any more: {STOPPING}"
