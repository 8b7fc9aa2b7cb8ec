"""Ten reloads of one relay under load: nothing is lost, and each life has one record.

Then the same with a rate, which is kept.

RELAY_RELOAD_SHORT=1 selects smaller numbers, for CI. RELAY_RELOAD_CONNECTIONS is the number of
connections, of which most wait for a partner. RELAY_PYTHON_FLAGS are flags of the interpreter that
runs the relay.
"""

from __future__ import annotations

import itertools
import os
import re
import socket
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import DIRECTIONS, WebSocketClient, eventually
from installed import IS_SHORT, Installation, ReloadedRelay, Traffic, longest
from stories import Cuts, Drains, Refusals, Sources, Stalls, Story, Waiting
from traffic import BulkPair
from watched import Books, Bystanders, check_status, rows

import transit_relay

CONNECTIONS = int(os.environ.get("RELAY_RELOAD_CONNECTIONS", "300" if IS_SHORT else "1000"))
SLOW_PAIRS, BULK_PAIRS, PROBES = (40, 8, 4) if IS_SHORT else (170, 24, 8)
WAITING = 20 if IS_SHORT else 100
CUTS = ("line", "first_frame", "data", "proxy_2") if IS_SHORT else None
OTHER_DATABASE = "other.sqlite"
# What precedes each request to reload. With a reason the reload is refused.
PLAN: list[tuple[str, str]] = [
    ("nothing", ""),
    ("a changed configuration", ""),
    ("nothing", ""),
    ("a broken program", "SyntaxError|was never closed"),
    ("the right program", ""),
    ("nothing", ""),
    ("a refused option", "--user cannot be changed"),
    ("the first configuration", ""),
    *[("nothing", "")] * 5,
]
RELOADS = sum(not reason for _, reason in PLAN)


def prepare(installation: Installation, change: str) -> None:
    """Make a change before a reload."""
    if change == "a changed configuration":
        lines = ("websocket tcp:0:interface=127.0.0.1:backlog=1025", f"usage-db {OTHER_DATABASE}")
        installation.configure(*lines, "stall-timeout 500", "handshake-timeout 50")
    elif change == "a broken program":
        installation.damage()
    elif change == "the right program":
        installation.repair()
    elif change == "a refused option":
        installation.configure("user nobody:nogroup")
    elif change == "the first configuration":
        installation.configure()


def check_new_endpoint(relay: ReloadedRelay, books: Books) -> None:
    """A client of the endpoint that a reload has opened gets its partner."""
    sock = socket.create_connection(("127.0.0.1", relay.new_port()))
    with WebSocketClient(sock) as one, relay.client() as other:
        relay.couple(one, other)
        one.half_close()
        assert other.read_to_end() == one.read_to_end() == b""
    books.add("happy")


def test_nothing_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    installation, books = Installation(tmp_path), Books()
    quiet_starts = installation.start_seconds()
    with ExitStack() as running:
        relay = running.enter_context(ReloadedRelay(installation))
        relay.started()
        relay.settle(books)  # the database is open
        eventually(lambda: len(rows(tmp_path / "usage.sqlite")) == 1, "the first record")
        files = relay.open_files()

        slow = Bystanders(relay, "--transfers", str(SLOW_PAIRS), "--block-bytes", "30000")
        running.enter_context(slow)
        traffic = [
            running.enter_context(Traffic(relay, role, *options))
            for role, *options in (
                ("bulk", "--pairs", str(BULK_PAIRS), "--pause-seconds", "1.0"),
                ("probe", "--pairs", str(PROBES)),
                ("newcomers",),
            )
        ]
        cuts = Cuts(relay, books, len(PLAN), CUTS)
        stalls = Stalls(relay, books, transit_relay.splice is not None)
        stories: list[Story] = [
            Waiting(relay, books, WAITING, WAITING // len(PLAN)),
            cuts,
            Drains(relay, books),
            stalls,
            Sources(relay, books),
            Refusals(relay, books),  # last, because it lingers for seconds only
        ]
        missing = CONNECTIONS - relay.descriptors()
        crowd = Waiting(relay, books, max(0, missing), 0, is_brief=True)
        busy_starts = installation.start_seconds()
        most = 0
        for number, (change, reason) in enumerate(PLAN):
            for story in (*stories, crowd):
                story.before(number)
            most = max(most, relay.descriptors())
            prepare(installation, change)
            if reason:
                told = relay.refused()
                assert re.search(reason, told), told
            else:
                relay.reload()
            assert relay.children() == []
            for story in stories:
                story.after(number)
            if change == "a changed configuration":
                check_new_endpoint(relay, books)
        assert relay.process.poll() is None  # the process that was started is still the relay
        for story in (*stories, crowd):
            story.finish()
        results = [one.finish(books) for one in (*traffic,)]
        slow_result = slow.finish(books)
        assert slow_result.sent_bytes == slow_result.received_bytes
        relay.check_files(files)
        assert not any(relay.pool_bytes()), "bytes were left in a pipe"
        relay.check_idle()
        status = relay.last_status(books.pairs())
        assert relay.stop() == 0, relay.stderr.decode()
        relay.check_messages()
        records = relay.records()
    books.check(records)
    check_status(status, records)
    databases = [tmp_path / "usage.sqlite", tmp_path / OTHER_DATABASE]
    stored = [rows(database) for database in databases]
    assert all(stored), "a database has no records"
    assert Counter(stored[0] + stored[1]) == Counter(records), "the databases differ"

    print(
        f"\n{len(relay.windows)} reloads, up to {most} descriptors, {len(records)} records,"
        f" {cuts.count} cuts, up to {stalls.pipe_bytes} bytes in pipes;"
        f" SIGHUP to the message: {seconds_text([w.end - w.begin for w in relay.windows])}"
    )
    for name, result in ("a running pair", results[1]), ("a newcomer's answer", results[2]):
        inside, outside = longest(result.waits, relay.windows)
        ratios = [inside / one for one in (*quiet_starts, *busy_starts)]
        print(
            f"longest pause of {name}: {1000 * inside:.0f} ms during reloads, else"
            f" {1000 * outside:.0f} ms ({len(result.waits)} waits); starts of Python:"
            f" {ratios[0]:.1f} (quiet) or {ratios[2]:.1f} (under this load); of the program:"
            f" {ratios[1]:.1f} or {ratios[3]:.1f}"
        )
    print(f"starts, quiet and under load: {seconds_text([*quiet_starts, *busy_starts])}")


def seconds_text(seconds: list[float]) -> str:
    """Return times in milliseconds."""
    return ", ".join(f"{1000 * one:.0f}" for one in seconds) + " ms"


RATE = 20_000_000  # bytes per second, of all pairs or of one
RATE_SECONDS = 4.0 if IS_SHORT else 12.0  # of real time: a rate needs it
RATE_RELOADS = 2 if IS_SHORT else 5


class Share(NamedTuple):
    """Which part of a rate bulk had."""

    in_all: float
    outside_pauses: float  # of the rate in the time in which bytes moved


class RateMeter(threading.Thread):
    """Measures how many bytes all pairs receive, and for how long none came."""

    SAMPLE_SECONDS = 0.01
    PAUSE_SECONDS = 0.1  # a shorter time without bytes is no pause

    def __init__(self, pairs: list[BulkPair]) -> None:
        super().__init__()
        self._pairs = pairs
        self._ended = threading.Event()
        self._paused_seconds = 0.0
        self._began, self._before = time.monotonic(), self._received()
        self.start()

    def _received(self) -> int:
        return sum(pair.received_bytes for pair in self._pairs)

    def run(self) -> None:
        last, seen = time.monotonic(), self._received()
        while not self._ended.wait(self.SAMPLE_SECONDS):
            now, received = time.monotonic(), self._received()
            if received != seen:
                if now - last >= self.PAUSE_SECONDS:
                    self._paused_seconds += now - last
                last, seen = now, received

    def finish(self, rate: float) -> Share:
        """Return the result."""
        self._ended.set()
        self.join()
        elapsed = time.monotonic() - self._began
        received = self._received() - self._before
        moving_seconds = elapsed - self._paused_seconds
        return Share(received / rate / elapsed, received / rate / moving_seconds)


def reload_at_intervals(relay: ReloadedRelay) -> None:
    """Reload RATE_RELOADS times within RATE_SECONDS."""
    clock = threading.Event()  # never set: real time has to pass
    began = time.monotonic()
    for number in range(1, RATE_RELOADS + 2):
        due = began + RATE_SECONDS * number / (RATE_RELOADS + 1)
        clock.wait(max(0.0, due - time.monotonic()))
        if number <= RATE_RELOADS:
            relay.reload()


@pytest.mark.parametrize("option", ["max-rate", "max-pair-rate"])
def test_a_rate_is_kept(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bulk is limited to the same rate across reloads, and to a new one at once.

    In a pause nothing moves. On a slow or busy machine a pause is longer than the relay makes up
    for.
    """
    monkeypatch.chdir(tmp_path)
    installation, books = Installation(tmp_path), Books()
    number = 8 if option == "max-rate" else 4
    share = RATE if option == "max-rate" else RATE // number
    installation.configure(f"{option} {share}")
    with ReloadedRelay(installation) as relay:
        relay.started()
        pairs = [
            BulkPair(relay.address, n, kinds)
            for n, kinds in zip(range(number), itertools.cycle(DIRECTIONS))
        ]
        for pair in pairs:
            pair.start()
        shares = []
        for factor in 1, 2:
            installation.configure(f"{option} {factor * share}")
            relay.reload()  # what the pairs may read at once is used up
            meter = RateMeter(pairs)
            reload_at_intervals(relay)
            shares.append(meter.finish(factor * RATE))
        for pair in pairs:
            pair.stop()
        for pair in pairs:
            pair.join()
            books.add("happy", pair.received_bytes)
        relay.last_status(books.pairs())
        assert relay.stop() == 0, relay.stderr.decode()
        relay.check_messages()
        books.check(relay.records())
    for one in shares:
        print(f"{option}: {one.in_all:.1%} of the rate, {one.outside_pauses:.1%} outside pauses")
    assert all(one.in_all <= 1.1 and one.outside_pauses >= 0.9 for one in shares), shares
