"""Floods, bounded in count: honest clients are served, and nothing is lost or left behind.

The attackers have other addresses than the honest clients: see Probes, and HONEST for the addresses
in PROXY headers.
"""

from __future__ import annotations

import json
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

import pytest
from flood import MAX_WAITING, Marker
from helpers import BOUND_BYTES, eventually, handshake
from interop.children import Child
from processes import patched
from watched import (
    ENVIRONMENT,
    HAPROXY,
    HERE,
    MEBIBYTE,
    SERVED_SECONDS,
    SHARE_SECONDS,
    STALL_RECEIVE_BYTES,
    WATCHED,
    Books,
    Probes,
    Scene,
    honest_pair,
    shorter,
    stalling_listener,
)

from transit_relay import PRESSED_READ_BYTES

CONNECTION_BYTES = 4096  # of the relay's memory, for each connection that waits or sends nothing
LEAK_BYTES = MEBIBYTE
HONEST = "192.0.2.1"  # no flood uses it
OTHER_HONEST = "192.0.2.2"
# A limit logs how many clients it disconnected, at most once a minute. Here it does so more often,
# so that a test can add the numbers up.
LOG_SECONDS = 0.3
OFTEN_LOGGED = patched(**{**WATCHED, "COMPLAINT_SECONDS": LOG_SECONDS})
MEMORY_MESSAGE = b"--max-memory: clients have to wait"


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
    scene: Scene, name: str, count: int, port: int | None = None, source: str = Probes.SOURCE
) -> Iterator[tuple[Flood, Probes]]:
    """Flood, with honest pairs of `source` during all of it.

    Check that they are served in time, and that the relay's open files and CPU time are as before.
    """
    relay = scene.relay
    share = relay.cpu_share()
    with Probes(relay, scene.books, source) as probes:
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


def count_disconnected(scene: Scene, limit: str) -> int:
    """Return the sum of the clients in the messages of a limit. The relay has stopped."""
    message = rf"{limit}: a client was disconnected(?: \((\d+) more since the last message\))?$"
    found = re.findall(message, scene.relay.stderr.decode(), re.MULTILINE)
    return sum(1 + int(more or 0) for more in found)


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

    An honest client can be among those that a burst replaces, so there is a pair after the burst.
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


def test_silent_connections_behind_a_proxy() -> None:
    """They send a PROXY header, then nothing."""
    count = HELD["silent"]
    with Scene(*HAPROXY) as scene:
        with flooding(scene, "silent_behind_proxy", count, scene.relay.haproxy_port, HONEST):
            pass
        assert scene.grown_bytes < BOUND_BYTES + count * CONNECTION_BYTES


@pytest.mark.needs("--max-waiting-per-source")
def test_one_source_that_waits() -> None:
    """Most clients of a source behind a proxy are refused. Another source is served."""
    count = HELD["random_tokens"]
    with Scene(*HAPROXY, program=OFTEN_LOGGED) as scene:
        with flooding(scene, "one_source", count, scene.relay.haproxy_port, HONEST):
            pass
        assert scene.grown_bytes < BOUND_BYTES + MAX_WAITING * CONNECTION_BYTES
    assert count_disconnected(scene, "--max-waiting-per-source") == count + 1 - MAX_WAITING


@pytest.mark.needs("--max-connections")
def test_many_sources_that_wait_in_a_full_relay() -> None:
    """Clients of the busiest source are ended. An honest client waits, and pairs are served.

    The flood checks which client is ended. Newcomers come one after the other, because a client
    that has not sent its handshake would be ended for the next one.
    """
    assert LOG_SECONDS < SHARE_SECONDS
    count = HELD["random_tokens"]
    options = ["--max-connections", str(count // 3)]
    with Scene(*HAPROXY, *options, program=OFTEN_LOGGED) as scene:
        relay, books = scene.relay, scene.books
        share = relay.cpu_share()
        token = relay.new_token()
        with ExitStack() as held, relay.client(source=HONEST) as one:
            marker = held.enter_context(closing(Marker(relay.port)))
            one.send(handshake(token, "one"))
            marker.settle()
            with Flood("many_sources", relay.haproxy_port, count) as flood:
                flood.wait_for_peak()
                served = []
                for _ in range(10):
                    served.append(honest_pair(relay, books, OTHER_HONEST, marker.settle))
                    marker.settle()  # the relay has closed the pair
                    held.enter_context(closing(Marker(relay.port)))  # the relay is full again
                    books.add("happy")
                with relay.client(source=OTHER_HONEST) as other:
                    other.send(handshake(token, "other"))
                    assert one.receive(3) == other.receive(3) == b"ok\n"
                    one.send(b"still there")
                    assert other.receive(11) == b"still there"
                    other.half_close()
                    assert one.read_to_end() == other.read_to_end() == b""
                books.add("happy", 11)
                relay.check_idle(
                    share
                )  # for SHARE_SECONDS: the next end is logged, with the number
                flood.release()
                ended = int(flood.lines.until(r"^(\d+) ended$")[1])
                flood.finish(books)
        books.add("happy", marker.passed_bytes)
        worst = max(served)
        print(f"{ended} ended; {len(served)} honest pairs, longest {1000 * worst.seconds:.1f} ms")
        assert worst.seconds < SERVED_SECONDS, f"an honest pair was served too late: {worst}"
    assert count_disconnected(scene, "--max-connections") == ended


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


@pytest.mark.needs("--max-memory")
@pytest.mark.parametrize("is_limited", [False, True], ids=["unlimited", "limited"])
def test_stalled_receivers_with_uploading_senders(is_limited: bool) -> None:
    """The memory for each pair is bounded; with --max-memory, also that for all pairs together.

    The clients come over a listener whose sockets inherit small buffers, or the kernel holds
    gigabytes. At the limit, the relay reads PRESSED_READ_BYTES if poll reports that the receiver
    has room. This may be a third of its send buffer, so that must not be smaller than three reads.
    """
    count = shorter(2_000, 200)
    bound = count * 2 * STALL_RECEIVE_BYTES  # the relay reads at most so much at once
    send_bytes = 4096
    if is_limited:
        bound //= 16
        send_bytes = 2 * PRESSED_READ_BYTES  # which the kernel doubles
    with stalling_listener(send_bytes) as listener:
        options = ["--port", f"fd:{listener.fileno()}"]
        options += ["--max-memory", str(bound) if is_limited else "0"]
        with Scene(*options, pass_fds=[listener.fileno()]) as scene:
            port = listener.getsockname()[1]
            with flooding(scene, "stalled", count, port):
                pass
            assert scene.grown_bytes < 4 * MEBIBYTE + bound + 2 * count * CONNECTION_BYTES
        assert (MEMORY_MESSAGE in scene.relay.stderr) == is_limited


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
