"""Rates in real time: what the receivers get, and how long messages beside the flows take.

The rates are far below what the machine can relay. The flows are in a process of their own:
flows.py. This process sends the messages: a ping-pong.

Run it alone: it measures times. A measurement with a wrong result is repeated if other processes
used the cores meanwhile. After ATTEMPTS wrong results the test fails in any case.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
from bystanders import delayed_seconds
from flows import Sample
from helpers import Client
from interop.children import Child
from watched import ENVIRONMENT, HERE, WatchedRelay, percentile_99, shorter

from transit_relay import affordable_pipes

RATE = 20_000_000  # bytes per second
RATE_TOLERANCE = 0.05
SHARE_TOLERANCE = 0.1
MANY = 200  # pairs
PACED = 2  # how many of 8 pairs use less than their shares
PACE = 500_000  # bytes per second of each of them
PING = bytes(64)
PAUSE_SECONDS = 0.005  # between two round trips
# The p99 of the round trips beside flows must be below both: so many times the p99 without flows,
# and half of the time between two refills.
PING_RATIO = 10
LATE_SECONDS = 0.025
QUIET_SECONDS = 2.0  # how long the round trips without flows are measured
START_SECONDS = 1.5  # not measured, because buffers fill, and the flows use the reserve
WINDOW_SECONDS = shorter(10.0, 5.0)
ATTEMPTS = 3
DISTURBED_CORES = 0.1  # if other processes use more, a measurement is repeated


class State(NamedTuple):
    """What was counted until now."""

    sample: Sample
    relay_seconds: float  # of CPU time
    other_seconds: float  # of the CPU time of all other processes


class Window(NamedTuple):
    """A measurement."""

    rates: list[float]  # bytes per second that the receiver of each flow gets
    pings: list[float]  # the seconds of each round trip
    relay_cores: float  # used by the relay
    other_cores: float  # used by all processes but the relay, the flows and this one


class Stage:
    """A relay with flows, and a ping-pong beside them."""

    def __init__(self, relay: WatchedRelay, pair: tuple[Client, Client]) -> None:
        """Measure the round trips of `pair` without flows."""
        self.relay, self._pair = relay, pair
        self._quiet = self._ping_pong(QUIET_SECONDS)

    def start(self, flows: Child) -> None:
        """Wait until the flows are steady."""
        self._flows = flows
        flows.lines.until("^ready$")
        self._ping_pong(START_SECONDS)

    def verify(self, judge: Callable[[Window], list[str]]) -> Window:
        """Measure until `judge` finds no faults. Raise AssertionError with its faults.

        If other processes used the cores, there are ATTEMPTS.
        """
        for _ in range(ATTEMPTS):
            window = self._measure()
            text = self._text(window)
            print(text)
            faults = judge(window)
            if not faults or window.other_cores < DISTURBED_CORES:
                break
        assert not faults, f"{'; '.join(faults)}: {text}"
        return window

    def late_pings(self, window: Window) -> list[str]:
        """Return a message if the round trips were late: see PING_RATIO."""
        quiet, beside = percentile_99(self._quiet), percentile_99(window.pings)
        is_late = beside >= min(PING_RATIO * quiet, LATE_SECONDS)
        if not is_late:
            return []
        return [f"the p99 of a round trip is {1000 * beside:.1f} ms, quiet {1000 * quiet:.1f} ms"]

    def check_splicing(self) -> None:
        """Raise AssertionError if the relay has never used a pipe."""
        if affordable_pipes():
            assert self.relay.pool_bytes(), "no pipe is open"
        else:
            print("not checked: splicing, for which this system has no pipes")

    def _measure(self) -> Window:
        before = self._state()
        pings = self._ping_pong(WINDOW_SECONDS)
        after = self._state()
        seconds = after.sample.at - before.sample.at
        received = zip(before.sample.received_bytes, after.sample.received_bytes)
        return Window(
            [(new - old) / seconds for old, new in received],
            pings,
            (after.relay_seconds - before.relay_seconds) / seconds,
            (after.other_seconds - before.other_seconds) / seconds,
        )

    def _state(self) -> State:
        os.kill(self._flows.pid, signal.SIGUSR1)
        sample = Sample(*json.loads(self._flows.lines.until(r"^\[").string))
        relay_seconds = self.relay.cpu_seconds()
        ours = relay_seconds + sample.cpu_seconds + time.process_time()
        return State(sample, relay_seconds, busy_seconds() - ours)

    def _ping_pong(self, seconds: float) -> list[float]:
        """Send a message there and back repeatedly. Return how long each took.

        The time in which the relay or this thread waited for a core is left out. If both did, the
        longer time counts, because they may have waited at once.
        """
        one, other = self._pair
        found = []
        deadline = time.monotonic() + seconds
        while (began := time.monotonic()) < deadline:
            ours, both = delayed_seconds(), delayed_seconds(self.relay.pid)
            one.send(PING)
            other.send(other.receive(len(PING)))
            assert one.receive(len(PING)) == PING
            took = time.monotonic() - began
            ours_now, both_now = delayed_seconds(), delayed_seconds(self.relay.pid)
            relays = (both_now - ours_now) - (both - ours)
            found.append(took - max(ours_now - ours, relays))
            time.sleep(PAUSE_SECONDS)
        return found

    def _text(self, window: Window) -> str:
        """Return the numbers of a measurement."""
        mean = statistics.mean(window.rates)
        return (
            f"{len(window.rates)} flows, {sum(window.rates) / 1e6:.3f} MB/s in all, each"
            f" {min(window.rates) / mean:.4f} to {max(window.rates) / mean:.4f} of the mean;"
            f" round trip p50, p99: quiet {percentiles(self._quiet)}, beside them"
            f" {percentiles(window.pings)} ms; cores: relay {window.relay_cores:.2f}, others"
            f" {window.other_cores:.2f}"
        )


def percentiles(seconds: Sequence[float]) -> str:
    """Return the median and the 99th percentile, in milliseconds."""
    return f"{1000 * statistics.median(seconds):.2f}, {1000 * percentile_99(seconds):.2f}"


def busy_seconds() -> float:
    """Return the CPU time of all processes, with what a hypervisor took: proc(5), /proc/stat."""
    user, nice, system, _, _, *interrupts_and_steal = Path("/proc/stat").read_text().split()[1:9]
    ticks = sum(map(int, (user, nice, system, *interrupts_and_steal)))
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def staged(*options: str, flows: Sequence[str]) -> Iterator[Stage]:
    """Start a relay with `options`, and flows: the arguments of flows.py."""
    with WatchedRelay(*options) as relay:
        relay.started()
        with relay.client() as one, relay.client() as other:
            relay.couple(one, other)
            stage = Stage(relay, (one, other))
            program = [sys.executable, str(HERE / "flows.py"), str(relay.port), *flows]
            with Child(program, env=ENVIRONMENT) as child:
                stage.start(child)
                yield stage
        relay.stop_cleanly()


def wrong_sum(rates: Sequence[float], expected: float = RATE) -> list[str]:
    """Return a message if the sum of the rates is not as expected."""
    found = sum(rates)
    if abs(found - expected) <= RATE_TOLERANCE * expected:
        return []
    return [f"{found:.0f} bytes per second instead of {expected}"]


def uneven(rates: Sequence[float]) -> list[str]:
    """Return a message if some shares are far from the mean."""
    mean = statistics.mean(rates)
    far = [rate / mean for rate in rates if abs(rate - mean) > SHARE_TOLERANCE * mean]
    return [f"{len(far)} shares of {min(far):.3f} to {max(far):.3f} of the mean"] if far else []


# The numbers of pairs, and the direction of the first one. The directions take turns.
MIXES = [(1, 0), (8, 0), (MANY, 0), (1, 1), (1, 2), (1, 3)]


@pytest.mark.parametrize(("pairs", "first"), MIXES[: shorter(6, 3)])
def test_a_rate_for_all(pairs: int, first: int) -> None:
    """The sum is right, the shares are even, and the round trips are less than 10 times slower."""
    flows = ("--pairs", str(pairs), "--first", str(first))
    with staged("--max-rate", str(RATE), flows=flows) as stage:

        def judge(window: Window) -> list[str]:
            return wrong_sum(window.rates) + uneven(window.rates) + stage.late_pings(window)

        stage.verify(judge)
        # The reads of many pairs are too small to be spliced. Those of a pair with a WebSocket
        # never are.
        if first == 0 and pairs < MANY:
            stage.check_splicing()


def test_pairs_that_use_less_than_their_shares() -> None:
    """They get all that they send. The others divide the rest evenly."""
    flows = ("--pairs", "8", "--paced", str(PACED), "--pace", str(PACE))
    with staged("--max-rate", str(RATE), flows=flows) as stage:

        def judge(window: Window) -> list[str]:
            greedy, paced = window.rates[:-PACED], window.rates[-PACED:]
            held_back = [fault for rate in paced for fault in wrong_sum([rate], PACE)]
            return wrong_sum(window.rates) + uneven(greedy) + held_back + stage.late_pings(window)

        stage.verify(judge)
        stage.check_splicing()


@pytest.mark.parametrize("pairs", [1, 4][: shorter(2, 1)])
def test_a_rate_for_each_pair(pairs: int) -> None:
    """One pair sends one way. Four pairs send both ways, which counts together."""
    flows = ("--pairs", str(pairs), *["--both-ways"] * (pairs > 1))
    rate = RATE // pairs
    with staged("--max-pair-rate", str(rate), flows=flows) as stage:

        def judge(window: Window) -> list[str]:
            ways = len(window.rates) // pairs
            each = [window.rates[n : n + ways] for n in range(0, len(window.rates), ways)]
            return [fault for rates in each for fault in wrong_sum(rates, rate)]

        stage.verify(judge)
        stage.check_splicing()
