"""Floods, bounded in count: honest clients are served, and nothing is lost or left behind.

The attackers have other addresses than the honest clients (see Probes).
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from helpers import BOUND_BYTES
from interop.children import Child
from watched import (
    ENVIRONMENT,
    HERE,
    MEBIBYTE,
    STALL_RECEIVE_BYTES,
    Books,
    Probes,
    Scene,
    eventually,
    shorter,
    stalling_listener,
)

CONNECTION_BYTES = 4096  # of the relay's memory, for each connection that waits or sends nothing
LEAK_BYTES = MEBIBYTE


class Flood(Child):
    """A flood in a process of its own: see flood.py."""

    def __init__(self, name: str, port: int, count: int) -> None:
        script = str(HERE / "flood.py")
        super().__init__([sys.executable, script, name, str(port), str(count)], env=ENVIRONMENT)

    def wait_for_peak(self) -> None:
        """Wait until it has reached its size, or is done."""
        self.lines.until("^peak$")

    def release(self) -> None:
        """Let it go on to its end."""
        self._process.send_signal(signal.SIGTERM)

    def finish(self, books: Books) -> None:
        """Let it end, and note its records."""
        self.release()
        found = json.loads(self.lines.until(r"^\[\[.*").group())
        self.succeed()
        for mood, low, high, times in found:
            if low == high:
                books.add(mood, low, times)
            else:
                books.add_range(mood, low, high)


@contextmanager
def flooding(
    scene: Scene, name: str, count: int, port: int | None = None
) -> Iterator[tuple[Flood, Probes]]:
    """Flood, with honest pairs during all of it. At the end the relay is as before."""
    relay = scene.relay
    share = relay.cpu_share()
    with Probes(relay, scene.books) as probes:
        relay.forget_peak()
        before = relay.peak_bytes()
        with Flood(name, port or relay.port, count) as flood:
            flood.wait_for_peak()
            probes.wait_for_more()
            yield flood, probes
            flood.finish(scene.books)
            probes.wait_for_more()
        grown = relay.peak_bytes() - before
    print(f"{name}, {count}: the relay grew by {grown / MEBIBYTE:.1f} MiB")
    scene.grown_bytes = grown
    probes.check()
    eventually(lambda: relay.open_files() == scene.files_beside, "the descriptors of before")
    relay.check_idle(share)


HELD = {
    "silent": shorter(15_000, 1_500),
    "slow": shorter(5_000, 500),
    "same_token": shorter(15_000, 1_500),
    "random_tokens": shorter(15_000, 1_500),
}


@pytest.mark.parametrize("name", HELD)
def test_connections_that_are_held(name: str) -> None:
    """They send nothing, or not enough, or wait. Each has a bounded share of the memory."""
    with Scene() as scene:
        with flooding(scene, name, HELD[name]):
            pass
        assert scene.grown_bytes < BOUND_BYTES + HELD[name] * CONNECTION_BYTES


@pytest.mark.needs("--max-connections")
@pytest.mark.parametrize("name", ["silent", "slow"])
def test_more_connections_than_the_limit(name: str) -> None:
    """Those without a handshake make room. No more memory is used than for the limit.

    A honest client can be among those that a burst replaces, so there is a pair after the burst.
    """
    limit = HELD[name] // 5
    options = ["--max-connections", str(limit)]
    with Scene(*options, may_warn=["connections|room|newcomers"]) as scene:
        relay = scene.relay
        relay.forget_peak()
        before = relay.peak_bytes()
        with Flood(name, relay.port, HELD[name]) as flood:
            flood.wait_for_peak()
            one, other = relay.pair("honest")
            one.close()
            other.close()
            scene.books.add("happy", 0, 1)
            flood.finish(scene.books)
        assert relay.peak_bytes() - before < BOUND_BYTES + limit * CONNECTION_BYTES


def test_bad_handshakes() -> None:
    with Scene() as scene:
        with flooding(scene, "bad", shorter(100_000, 5_000)):
            pass
        assert scene.grown_bytes < 2 * BOUND_BYTES


def test_segments_of_one_byte() -> None:
    with Scene() as scene:
        with flooding(scene, "segments", shorter(500_000, 50_000)):
            pass
        assert scene.grown_bytes < 2 * BOUND_BYTES


def test_stalled_receivers_with_uploading_senders() -> None:
    """What each pair holds is bounded. A pair of the transfers beside it is not slowed for long.

    They come over a listener whose sockets inherit small buffers, or the kernel holds gigabytes.
    """
    count = shorter(2_000, 200)
    with stalling_listener() as listener:
        options = ["--port", f"fd:{listener.fileno()}"]
        bound = count * 2 * STALL_RECEIVE_BYTES
        with Scene(*options, pass_fds=[listener.fileno()]) as scene:
            port = listener.getsockname()[1]
            with flooding(scene, "stalled", count, port):
                pass
            assert scene.grown_bytes < 4 * MEBIBYTE + bound + 2 * count * CONNECTION_BYTES


def test_short_pairs_leak_nothing() -> None:
    """Resident memory after the first tenth and at the end is the same."""
    count = shorter(100_000, 10_000)
    with Scene() as scene:
        relay = scene.relay
        with Flood("pairs", relay.port, count) as flood:
            flood.wait_for_peak()
            before = relay.resident_bytes()
            flood.release()
            flood.wait_for_peak()
            grown = relay.resident_bytes() - before
            print(f"{count} pairs: {before / MEBIBYTE:.1f} MiB after a tenth, then {grown:+} bytes")
            flood.finish(scene.books)
        assert grown < LEAK_BYTES
