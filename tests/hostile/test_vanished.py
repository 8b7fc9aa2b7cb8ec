"""Networks that vanish, lose packets, or delay them: between hosts that are network namespaces.

A host vanishes when its link is set down: neither FIN nor RST comes. The clients of the transfers
beside it are on the server itself.
"""

from __future__ import annotations

import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import TIMEOUT, Client, eventually, handshake, stopped
from interop import netns
from interop.children import Child
from processes import patched
from test_resets import send_all_that_is_accepted
from watched import ENVIRONMENT, HERE, WATCHED, Bystanders, Scene, shorter

from transit_relay import unacknowledged_bytes

pytestmark = pytest.mark.usefixtures("hosts")

STALL_SECONDS = 3
KEEPALIVE_SECONDS = 1
PROBES = {"KEEPALIVE_INTERVAL_SECONDS": 1, "KEEPALIVE_PROBES": 3}
FOUND_SECONDS = KEEPALIVE_SECONDS + PROBES["KEEPALIVE_INTERVAL_SECONDS"] * 3
LOST_PERCENT = 2
DELAY_SECONDS = 0.1

KINDS = pytest.mark.parametrize("kind", ["tcp", "ws"])
BETWEEN = pytest.mark.parametrize(("kind", "partner"), [("tcp", "ws"), ("ws", "tcp")])


def on_server(*command: str) -> list[str]:
    """Return a command that runs on the server."""
    return netns.inside("server", command)


class FarRelay:
    """A relay on the server, and its clients on the hosts a and b."""

    def __init__(self, scene: Scene) -> None:
        self.relay = scene.relay

    def client(self, kind: str, host: str, **options: int) -> Client:
        """Return a client on a host."""
        near = self.relay.address
        self.relay.address = (netns.SERVER, self.relay.port)
        try:
            return self.relay.client(kind, namespace=netns.namespace(host), **options)
        finally:
            self.relay.address = near


@contextmanager
def far_scene(*options: str, **others: object) -> Iterator[tuple[Scene, FarRelay]]:
    """Yield a scene on the server. Its end checks all."""
    program = on_server(*patched(**PROBES, **WATCHED))
    server = netns.namespace("server")
    with Scene(*options, program=program, namespace=server, **others) as scene:
        yield scene, FarRelay(scene)


def vanish(host: str) -> float:
    """Set the link of a host down. Return the time (monotonic seconds)."""
    command = ["ip", "-n", netns.namespace(host), "link", "set", "eth0", "down"]
    subprocess.run(command, check=True)
    return time.monotonic()


def check_found(since: float, limit_seconds: float) -> None:
    """Check how long it took: at least most of the limit, which is real time, and little more."""
    elapsed = time.monotonic() - since
    print(f"found after {elapsed:.2f} s, the limit is {limit_seconds} s")
    assert 0.5 * limit_seconds < elapsed < limit_seconds + TIMEOUT


@pytest.mark.needs("--stall-timeout")
@BETWEEN
def test_a_receiver_vanishes(kind: str, partner: str) -> None:
    """Bytes are queued for it. The stall limit ends the pair; the sender gets an orderly end."""
    with far_scene("--stall-timeout", str(STALL_SECONDS)) as (scene, far):
        sender, receiver = far.client(kind, "a"), far.client(partner, "b")
        scene.relay.couple(sender, receiver)
        sender.send(b"before")
        assert receiver.receive(6) == b"before"
        began = vanish("b")
        sent = send_all_that_is_accepted(sender)
        sender.sock.settimeout(STALL_SECONDS + 2 * TIMEOUT)
        assert sender.read_to_end() == b""
        check_found(began, STALL_SECONDS)
        sender.close()
        receiver.close()
        scene.books.add_range("happy", 6, 6 + sent)


@pytest.mark.needs("--stall-timeout")
@KINDS
def test_a_refused_client_vanishes(kind: str) -> None:
    """The answer is never acknowledged. The stall limit ends the connection."""
    with far_scene("--stall-timeout", str(STALL_SECONDS), "--keepalive=0") as (scene, far):
        client = far.client(kind, "b")
        if kind == "ws":
            client.receive_now()
        scene.relay.settle(scene.books)
        # The client's kernel must not see the answer, but the relay must see the handshake: the
        # link goes down while the relay is stopped.
        with stopped(scene.relay):
            client.send(b"nonsense\n")
            wait_until_acknowledged(client)
            began = vanish("b")
        eventually(lambda: scene.relay.open_files() == scene.files_beside, "it is closed")
        check_found(began, STALL_SECONDS)
        client.close()
        scene.books.add("errory")


@BETWEEN
def test_a_client_of_a_quiet_pair_vanishes(kind: str, partner: str) -> None:
    """Keepalive ends the pair. The partner gets what came before, and an orderly end."""
    with far_scene("--keepalive", str(KEEPALIVE_SECONDS)) as (scene, far):
        one, other = far.client(kind, "a"), far.client(partner, "b")
        scene.relay.couple(one, other)
        other.send(b"before")
        assert one.receive(6) == b"before"
        began = vanish("b")
        one.sock.settimeout(FOUND_SECONDS + 2 * TIMEOUT)
        assert one.read_to_end() == b""
        check_found(began, FOUND_SECONDS)
        one.close()
        other.close()
        scene.books.add("happy", 6)


@KINDS
def test_a_waiting_client_vanishes(kind: str) -> None:
    """Keepalive closes the connection, which is recorded as lonely."""
    with far_scene("--keepalive", str(KEEPALIVE_SECONDS)) as (scene, far):
        clients = [far.client(kind, "b") for _ in range(shorter(20, 5))]
        for client in clients:
            client.send(handshake(scene.relay.new_token(), "one"))
            scene.books.add("lonely")
        scene.relay.settle(scene.books)
        began = vanish("b")
        eventually(lambda: scene.relay.open_files() == scene.files_beside, "they are closed")
        check_found(began, FOUND_SECONDS)
        for client in clients:
            client.close()


def wait_until_acknowledged(client: Client) -> None:
    """Wait until the relay's kernel has acknowledged all that the client sent."""
    eventually(lambda: unacknowledged_bytes(client.sock) == 0, "acknowledged")


def lose_packets(nft: str, host: str) -> None:
    """Let the server lose LOST_PERCENT of the packets from and to a host, at random."""
    drop = f"numgen random mod 100 < {LOST_PERCENT} counter drop"
    rules = f"""
        table ip lossy {{
            chain from {{ type filter hook input priority 0; iifname "to-{host}" {drop}; }}
            chain to {{ type filter hook output priority 0; oifname "to-{host}" {drop}; }}
        }}
    """
    subprocess.run(on_server(nft, "-f", "-"), input=rules, text=True, check=True)


def lost_packets(nft: str) -> int:
    """Return how many packets were dropped."""
    listing = subprocess.run(
        on_server(nft, "list", "table", "ip", "lossy"), check=True, capture_output=True, text=True
    )
    return sum(map(int, re.findall(r"counter packets (\d+)", listing.stdout)))


def test_transfers_over_a_long_way_that_loses_packets(nft: str) -> None:
    """Packets are lost, and all bytes take 100 ms each way: every byte arrives.

    The transfers are on host a, behind a forwarder that delays.
    """
    lose_packets(nft, "a")
    transfers = shorter(20, 8)
    rounds = shorter(40, 8)
    with far_scene() as (scene, _):
        forward = [sys.executable, str(HERE / "delay.py")]
        where = [netns.SERVER, str(scene.relay.port), str(DELAY_SECONDS)]
        with Child(netns.inside("a", [*forward, *where]), env=ENVIRONMENT) as forwarder:
            port = int(forwarder.lines.until(r"^port (\d+)").group(1))
            with Bystanders(
                scene.relay,
                *("--transfers", str(transfers), "--rounds", str(rounds)),
                *("--block-bytes", "20000"),
                address=("127.0.0.1", port),
                namespace=netns.namespace("a"),
            ) as distant:
                result = distant.finish(scene.books)
            forwarder.terminate()
        lost = lost_packets(nft)
        print(f"{len(result.rounds)} rounds, {sum(result.sent_bytes)} bytes, {lost} packets lost")
        assert lost > 0
        # Each round crosses the way twice. A round in which a process waited for a core can seem
        # shorter, because that time is subtracted.
        median = statistics.median(seconds for _, seconds in result.rounds[1:])
        assert median > 1.5 * DELAY_SECONDS
