"""The works: what a relay is given to do, and what is measured of it.

Each is a function of a Stage and a Scale: it starts what is to be measured, once or several times,
and gives numbers by name. The name says the unit. Bytes are payload. A CPU-second is one of the
relay's process, all threads, user and system, from before the first byte was sent until the last
one had arrived. What the kernel does for the relay in its own threads (ksoftirqd) is in no
number.

What is not measured is done in the plainest way: pairs are made one after the other.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import NamedTuple

import load
import relays
from clients import Pair, new_token
from load import Bulk, Exchanged, Flow, LoadError, Source, Worker
from relays import Between, Program, Relay

Measured = dict[str, float]

MESSAGE_BYTES = 1_400
MESSAGE_PAIRS = 500
PING_BYTES = 64
WARM_UP_SECONDS = 0.2  # not measured
FAIRNESS_PAIRS = 8  # that carry bulk beside the pings,
PAUSE_SECONDS = 0.001  # which come with such pauses
PAIRINGS_UNDER_WAY = 32  # in each of:
PAIRING_WORKERS = 2
RECORDS_SECONDS = 0.6  # our relay gathers records for 0.5 s before it writes them
WAITING = (4_000, 15_000)  # clients, between which memory is compared
PAIRS = (500, 4_000)  # the same
NEWCOMERS = 256  # so many at a time: a relay's queue holds 1,024
STARTS = 5
GROWTH_BULK = (1, 8, 64, 512, 4_000)  # pairs
GROWTH_MESSAGES = (8, 64, 512, 4_000)
GROWTH_BUFFER_BYTES = 64 << 10  # of each client, so that 4,000 pairs stay well within tcp_mem


class Scale(NamedTuple):
    """How long each measurement takes, in seconds of load."""

    bulk_seconds: float
    messages_seconds: float
    pairings_seconds: float
    pings_seconds: float
    watch_seconds: float


# At 10 ms a tick, a relay that works for 1 s is measured to 2 %, and for 0.3 s to 6 %.
FULL = Scale(2.0, 1.5, 2.5, 2.0, 60.0)
QUICK = Scale(0.6, 0.5, 0.8, 0.5, 5.0)


class Stage(NamedTuple):
    """Where a work is done: one comparator, which can be started, in a folder of its own."""

    make: relays.Maker
    folder: Path

    def between(self) -> Between:
        """It, fresh; to be entered."""
        return self.make(self.folder, None)

    def relay(self, with_database: bool = False) -> Relay:
        """The same, of a comparator that makes pairs."""
        made = self.make(self.folder, self.folder / "usage.sqlite" if with_database else None)
        assert isinstance(made, Relay)
        return made

    @contextlib.contextmanager
    def pairs(
        self,
        count: int,
        websocket: tuple[bool, bool] = (False, False),
        buffer_bytes: int | None = None,
    ) -> Iterator[tuple[Between, list[Pair]]]:
        """It, started, with so many pairs. What the rest means: see Between.pair."""
        with self.between() as between:
            with pairs_of(between, count, websocket, buffer_bytes) as pairs:
                yield between, pairs


Measure = Callable[[Stage, Scale], Measured]


class Work(NamedTuple):
    """A kind of work."""

    name: str
    about: str
    comparators: tuple[str, ...]
    measure: Measure
    most_rounds: int = 1_000
    open_files: int = 2_000  # that we, and the relay, must be allowed


@contextlib.contextmanager
def pairs_of(
    between: Between,
    count: int,
    websocket: tuple[bool, bool] = (False, False),
    buffer_bytes: int | None = None,
) -> Iterator[list[Pair]]:
    """So many pairs, which are gone afterwards."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(count):
            pairs.append(between.pair(websocket, buffer_bytes))
            stack.callback(pairs[-1].close)
        yield pairs


def rates(what: str, amount: float, seconds: float, cpu_seconds: float) -> Measured:
    """What was done per second, and, where a relay's CPU did it, per second of that."""
    measured = {f"{what}_per_second": amount / seconds}
    if cpu_seconds:
        measured[f"{what}_per_cpu_second"] = amount / cpu_seconds
    return measured


# ---------------------------------------------------------------------------------------------
# Bulk
# ---------------------------------------------------------------------------------------------


def carry(between: Between, flows: Sequence[Flow], source: Source, seconds: float) -> Measured:
    """One transfer, over all flows at once, of as much as goes through in that time."""
    with Bulk(flows, source) as transfer:
        before = between.cpu_seconds()
        transfer.start(seconds)
        carried = transfer.wait()
        used = between.cpu_seconds() - before
        transfer.end()
    return rates("gb", carried.payload_bytes / 1e9, carried.seconds, used)


def bulk(count: int, both_ways: bool = False) -> Measure:
    """Between TCP clients, in so many pairs."""

    def measure(stage: Stage, scale: Scale) -> Measured:
        with stage.pairs(count) as (between, pairs):
            flows = [Flow(pair.first, pair.second) for pair in pairs]
            if both_ways:
                flows += [Flow(pair.second, pair.first) for pair in pairs]
            return carry(between, flows, load.plain_source(), scale.bulk_seconds)

    return measure


def web_bulk(first: bool, second: bool) -> Measure:
    """In one pair: whether its first, which sends, and its second speak WebSocket."""

    def measure(stage: Stage, scale: Scale) -> Measured:
        with stage.pairs(1, (first, second)) as (between, [pair]):
            source = load.websocket_source() if first else load.plain_source()
            flow = Flow(pair.first, pair.second, first, second)
            return carry(between, [flow], source, scale.bulk_seconds)

    return measure


# ---------------------------------------------------------------------------------------------
# Messages, and round trips
# ---------------------------------------------------------------------------------------------


def exchange(between: Between, pairs: Sequence[Pair], seconds: float) -> Measured:
    """Messages in all pairs, one under way in each."""
    with Worker(load.exchange_messages, pairs, os.urandom(MESSAGE_BYTES)) as worker:
        before = between.cpu_seconds()
        worker.tell(seconds)
        exchanged: Exchanged = worker.hear()
        used = between.cpu_seconds() - before
    return rates("messages", exchanged.done, exchanged.seconds, used)


def messages(stage: Stage, scale: Scale) -> Measured:
    """In many pairs."""
    with stage.pairs(MESSAGE_PAIRS) as (between, pairs):
        return exchange(between, pairs, scale.messages_seconds)


def ping(worker: Worker, seconds: float, when: str = "") -> Measured:
    """Round trips for so long: the median, and what one in a hundred exceeds."""
    worker.tell(seconds)
    nanoseconds: list[int] = worker.hear()
    percentiles = statistics.quantiles(nanoseconds, n=100)
    return {
        f"{when}p50_microseconds": percentiles[49] / 1_000,
        f"{when}p99_microseconds": percentiles[98] / 1_000,
    }


def round_trip(stage: Stage, scale: Scale) -> Measured:
    """Of a small message, in a pair that is alone."""
    with stage.pairs(1) as (_, [pair]):
        with Worker(load.ping_pong, pair, os.urandom(PING_BYTES)) as worker:
            ping(worker, WARM_UP_SECONDS)
            return ping(worker, scale.pings_seconds)


def fairness(stage: Stage, scale: Scale) -> Measured:
    """The same while others are silent, and then while they carry bulk.

    The bulk's processes are in the background, so that it is the relay that lets the pings wait,
    not the generator. There is a pause between the pings, so that they are spread over the time:
    else thousands would be made whenever the bulk falters, and decide the result.
    """
    with stage.pairs(1 + FAIRNESS_PAIRS) as (_, [pair, *others]):
        flows = [Flow(other.first, other.second) for other in others]
        with (
            Worker(load.ping_pong, pair, os.urandom(PING_BYTES), PAUSE_SECONDS) as worker,
            Bulk(flows, load.plain_source(), in_background=True) as beside,
        ):
            ping(worker, WARM_UP_SECONDS)
            measured = ping(worker, scale.pings_seconds, "alone_")
            beside.start(WARM_UP_SECONDS + scale.pings_seconds + WARM_UP_SECONDS)
            time.sleep(WARM_UP_SECONDS)
            measured |= ping(worker, scale.pings_seconds, "beside_")
            carried = beside.wait()
            beside.end()
    measured["beside_gb_per_second"] = carried.payload_bytes / 1e9 / carried.seconds
    return measured


# ---------------------------------------------------------------------------------------------
# Pairings
# ---------------------------------------------------------------------------------------------


def pairings(with_database: bool) -> Measure:
    """Two connect, say their handshakes and read their ok; one leaves, and then the other."""

    def measure(stage: Stage, scale: Scale) -> Measured:
        with stage.relay(with_database) as relay, contextlib.ExitStack() as stack:
            workers = [
                stack.enter_context(Worker(load.make_pairings, relay.connect, PAIRINGS_UNDER_WAY))
                for _ in range(PAIRING_WORKERS)
            ]
            before = relay.cpu_seconds()
            for worker in workers:
                worker.tell(scale.pairings_seconds)
            parts: list[Exchanged] = [worker.hear() for worker in workers]
            time.sleep(RECORDS_SECONDS)
            relay.settle()  # the records belong to the work
            used = relay.cpu_seconds() - before
        done = sum(part.done for part in parts)
        if with_database and relay.usage_rows() != done:
            raise LoadError(f"{relay.usage_rows()} records of {done} pairings")
        return rates("pairings", done, max(part.seconds for part in parts), used)

    return measure


# ---------------------------------------------------------------------------------------------
# Memory, waiting, and the start
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_at(relay: Relay, count: int) -> Iterator[None]:
    """So many clients that wait for a partner, all known to the relay; they leave in the end."""
    with contextlib.ExitStack() as stack:
        for number in range(1, count + 1):
            stack.enter_context(relay.connect(new_token(), "waiting"))
            if number % NEWCOMERS == 0 or number == count:
                relay.pair().close()  # newcomers are taken in their order, so all are in
        yield


def bytes_for_each(
    relay: Relay, add: Callable[[Relay, int], AbstractContextManager[object]], few: int, many: int
) -> float:
    """Memory for one of what `add` gives it so many of, when there are few and more come."""
    with add(relay, few):
        relay.settle()
        before = relay.resident_bytes()
        with add(relay, many - few):
            relay.settle()
            return (relay.resident_bytes() - before) / (many - few)


def memory(stage: Stage, scale: Scale) -> Measured:
    """At the start, and what is added by each client that waits, or is paired and idle."""
    with stage.between() as program:
        assert isinstance(program, Program)
        program.settle()
        measured = {"start_bytes": float(program.resident_bytes())}
        if not isinstance(program, Relay):
            return measured
        measured["waiting_bytes"] = bytes_for_each(program, waiting_at, *WAITING)
    with stage.relay() as relay:
        measured["paired_bytes"] = bytes_for_each(relay, pairs_of, *PAIRS) / 2
    return measured


def idle(stage: Stage, scale: Scale) -> Measured:
    """The CPU of a relay that has nothing to do but to let many wait."""
    with stage.relay() as relay, waiting_at(relay, WAITING[1]):
        relay.settle()
        before = relay.cpu_nanoseconds()
        time.sleep(scale.watch_seconds)
        used = relay.cpu_nanoseconds() - before
    return {"cpu_percent": used / 1e9 / scale.watch_seconds * 100}


def start_up(stage: Stage, scale: Scale) -> Measured:
    """From its exec until a client can connect."""
    seconds = []
    for _ in range(STARTS):
        relay = stage.relay()
        began_at = time.monotonic()
        relay.spawn()
        try:
            relay.wait_until_connected()
            seconds.append(time.monotonic() - began_at)
            relay.wait_until_ready()
            relay.stop()
        finally:
            relay.kill()
    return {"seconds": statistics.median(seconds)}


# ---------------------------------------------------------------------------------------------
# More and more pairs
# ---------------------------------------------------------------------------------------------


def growth(stage: Stage, scale: Scale) -> Measured:
    """Bulk and messages, with few pairs and with many."""
    measured = {}
    source = load.plain_source()
    for count in GROWTH_BULK:
        with stage.pairs(count, buffer_bytes=GROWTH_BUFFER_BYTES) as (between, pairs):
            flows = [Flow(pair.first, pair.second) for pair in pairs]
            carried = carry(between, flows, source, scale.bulk_seconds)
        measured[f"bulk_{count}_gb_per_cpu_second"] = carried["gb_per_cpu_second"]
    for count in GROWTH_MESSAGES:
        with stage.pairs(count, buffer_bytes=GROWTH_BUFFER_BYTES) as (between, pairs):
            exchanged = exchange(between, pairs, scale.messages_seconds)
        name = f"messages_{count}_messages_per_cpu_second"
        measured[name] = exchanged["messages_per_cpu_second"]
    return measured


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------

RELAYS = ("ours", "twisted")
TCP = (
    *("ours", "ours-no-splice", "twisted", "twisted-db"),
    *("haproxy-splice", "haproxy-splice-1m", "haproxy-copy", "direct"),
)
HAPROXY = ("haproxy-splice", "haproxy-copy")
WORKS = [
    Work("bulk-1", "bulk between TCP clients, one pair", TCP, bulk(1)),
    Work("bulk-8", "the same, 8 pairs", TCP, bulk(8)),
    Work("both-4", "the same, 4 pairs, in both directions", TCP, bulk(4, both_ways=True)),
    Work("tcp-ws", "bulk from TCP to WebSocket, one pair", RELAYS, web_bulk(False, True)),
    Work("ws-tcp", "bulk from WebSocket to TCP, one pair", RELAYS, web_bulk(True, False)),
    Work("ws-ws", "bulk between WebSocket clients, one pair", RELAYS, web_bulk(True, True)),
    Work("messages-500", "messages of 1,400 bytes in 500 pairs", (*RELAYS, *HAPROXY), messages),
    Work("pairings", "pairs that meet and leave", RELAYS, pairings(with_database=False)),
    Work("pairings-db", "the same, with a database", RELAYS, pairings(with_database=True)),
    Work("round-trip", "64 bytes, alone", (*RELAYS, "haproxy-copy", "direct"), round_trip),
    Work(
        "memory", "at the start, and for each client", (*RELAYS, "interpreter"), memory, 1, 16_000
    ),
    Work("idle", "CPU while 15,000 clients wait", ("ours",), idle, 1, 16_000),
    Work("start-up", "seconds until a client can connect", RELAYS, start_up, 1),
    Work("growth", "bulk and messages with up to 4,000 pairs", ("ours",), growth, 3, 9_000),
    Work("fairness", "64 bytes beside 8 pairs with bulk", (*RELAYS, "haproxy-splice"), fairness),
]
