"""Run the same scenarios against our relay and the Twisted relay, and compare the results.

The comparison covers every byte that a client received (over WebSocket: its payload), how each
connection ended, and every usage record (mood, bytes, whether it has a waiting time). Each scenario
runs over TCP, over WebSocket and over both. Where the two relays may differ, differences.py has the
result of ours and the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import websocket_scenarios  # noqa: F401  # adds scenarios to SCENARIOS
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

# The reference drops a client that has not answered its Close for one second, rounded down to its
# clock ticks. That can be at once, and bytes sent before are lost. With this program it waits.
REFERENCE_WITHOUT_TIMEOUT = """
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
    program = REFERENCE_WITHOUT_TIMEOUT
    twist = [str(python_tools / "python"), "-c", program, "--log-format=text"]
    return Relay(
        # The reference refuses port 0 without a URL.
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


def run(name: str, kinds: Kinds, relay: Relay) -> Outcome:
    """Run a scenario against a relay."""
    stage = Stage(relay, name, kinds)
    try:
        SCENARIOS[name].script(stage)
        return stage.outcome()
    finally:
        stage.abandon()


def run_reference_until_no_reset(name: str, kinds: Kinds, reference: Relay) -> Outcome:
    """Run a scenario against the reference; repeat it if a client got a reset.

    On a busy machine the reset of the reference may overtake its Close, about once in hundreds of
    runs. If every run has a reset, return the last outcome.
    """
    for _ in range(5):
        outcome = run_reference(name, kinds, reference)
        if all(seen.end != "reset" for seen in outcome.clients.values()):
            break
    return outcome


def run_reference(name: str, kinds: Kinds, reference: Relay) -> Outcome:
    """Run a scenario against the reference."""
    return without_resets_after_a_close(run(name, kinds, reference))


def without_resets_after_a_close(outcome: Outcome) -> Outcome:
    """Remove the resets that follow a Close.

    When its Close is answered, the reference resets the connection, and ours ends it. Clients have
    closed by then, so to them both are "Close 1000".
    """
    clients = {
        name: seen._replace(end=seen.end.replace(", reset", ""))
        for name, seen in outcome.clients.items()
    }
    return outcome._replace(clients=clients)


@pytest.mark.parametrize("case", CASES)
def test_same_as_the_reference(case: str, ours: Relay, reference: Relay) -> None:
    name, kinds = CASES[case]
    mine = run(name, kinds, ours)
    if (name, kinds) not in DIFFERENCES:
        assert mine == run_reference_until_no_reset(name, kinds, reference)
        return
    row, expected = DIFFERENCES[name, kinds]
    assert mine == expected, row
    # The reference may do the same by chance, but not five times.
    assert any(run_reference(name, kinds, reference) != expected for _ in range(5)), (
        f"no difference any more: {row}"
    )


def test_every_difference_has_a_scenario() -> None:
    assert set(DIFFERENCES) <= set(CASES.values())


def largest_message(relay: Relay, kinds: Kinds) -> int:
    """Send 1 MiB to a WebSocket client, and return the size of the largest message."""
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
    """docs/protocol.md, "WebSocket": at most 32 KiB. The reference sends longer ones."""
    limit = 32 << 10
    assert largest_message(ours, (sender, "ws")) <= limit
    assert any(largest_message(reference, (sender, "ws")) > limit for _ in range(5))


def stop_in_the_middle(relay: Relay, kinds: Kinds) -> tuple[int, Outcome]:
    """Stop a relay with clients in every state; return its exit code and the outcome."""
    stage = Stage(relay, "stop", kinds)
    try:
        first, second = stage.pair()
        first.send(b"so far")
        second.expect(b"so far")
        stage.waiting("waiting", "c")
        stage.connect("unfinished handshake").send_unfinished(stage.handshake("a")[:50])
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
        _, theirs = stop_in_the_middle(relay, kinds)  # Twisted dies by the signal
    assert code == 0
    assert mine.records == theirs.records
    for place, (name, seen) in enumerate(mine.clients.items()):
        if kinds[place % 2] == "tcp":
            assert seen == theirs.clients[name]
        else:
            assert seen == theirs.clients[name]._replace(end="Close 1001"), STOPPING
            assert theirs.clients[name].end != seen.end, f"no difference any more: {STOPPING}"
