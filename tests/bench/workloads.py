"""The workloads: the work that a relay is given, and the metrics that are measured.

Each workload is a function of a Subject and a Scale. It starts the comparator once or several times
and returns numbers by name; the name contains the unit. Bytes are payload. A CPU-second is one of
all processes of the comparator; with the prefix `front_`, one of HAProxy or the gateway alone. It
includes all threads, user and system, from before the first byte is sent until the last byte has
arrived. Work of the kernel's own threads (ksoftirqd) is not counted.

Preparations are not measured, so they are simple: pairs are made one after the other.
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
from relays import Intermediary, Program, Relay, Rendezvous

Measured = dict[str, float]

MESSAGE_BYTES = 1_400
MESSAGE_PAIRS = 500
PING_BYTES = 64
WARM_UP_SECONDS = 0.2  # not measured
PING_INTERVAL_SECONDS = 0.002  # beside bulk
FAIRNESS_PAIRS = 8  # with TCP bulk beside the pings
FAIRNESS_COUNTS = (8, 400)  # pairs with bulk beside the pings, first 8, then 400
WEBSOCKET_DIVISOR = 4  # one pair in 4 sends from a WebSocket
FILL_SECONDS = 0.5  # from the start of bulk until the buffers have grown and filled; not measured
PAIRINGS_IN_PROGRESS = 32  # in each worker
PAIRING_WORKERS = 2
RECORDS_SECONDS = 0.6  # our relay collects records for 0.5 s before it writes them
WAITING = (4_000, 15_000)  # clients; the memory of the additional ones is measured
PAIRS = (500, 4_000)  # paired and idle; the memory of the additional ones is measured
NEWCOMERS = 256  # clients that connect in a batch: a listener's backlog is 1,024
STARTS = 5
GROWTH_BULK = (1, 8, 64, 512, 4_000)  # pairs
GROWTH_MESSAGES = (8, 64, 512, 4_000)
GROWTH_BUFFER_BYTES = 64 << 10  # of each client, so that 4,000 pairs stay well within tcp_mem


class Scale(NamedTuple):
    """The duration of each measurement, in seconds of load."""

    bulk_seconds: float
    messages_seconds: float
    pairings_seconds: float
    pings_seconds: float
    watch_seconds: float


FULL = Scale(2.0, 1.5, 2.5, 2.0, 60.0)
QUICK = Scale(0.6, 0.5, 0.8, 0.5, 5.0)
# More rounds than FULL has, and shorter ones: speed is compared between neighbours in time.
COMPARISON = Scale(1.0, 0.8, 1.2, 1.0, 20.0)
COMPARISON_QUICK = QUICK


class Subject(NamedTuple):
    """The comparator that is measured, and a folder for its files."""

    make: relays.Maker
    folder: Path

    def intermediary(self) -> Intermediary:
        """Return the comparator, not started yet. Enter it to start it."""
        return self.make(self.folder, None)

    def relay(self, with_database: bool = False) -> Relay:
        """Return a comparator that is a relay, not started yet."""
        made = self.rendezvous(with_database)
        assert isinstance(made, Relay)
        return made

    def rendezvous(self, with_database: bool = False) -> Rendezvous:
        """Return a comparator that makes pairs, of one process or several, not started yet."""
        made = self.make(self.folder, self.folder / "usage.sqlite" if with_database else None)
        assert isinstance(made, Rendezvous)
        return made

    @contextlib.contextmanager
    def pairs(
        self,
        count: int,
        websocket: tuple[bool, bool] = (False, False),
        buffer_bytes: int | None = None,
    ) -> Iterator[tuple[Intermediary, list[Pair]]]:
        """Start the comparator and connect so many pairs. The options: Intermediary.pair."""
        with self.intermediary() as intermediary:
            with pairs_of(intermediary, count, websocket, buffer_bytes) as pairs:
                yield intermediary, pairs


Measure = Callable[[Subject, Scale], Measured]


class Workload(NamedTuple):
    """The work of one row."""

    name: str
    about: str
    comparators: tuple[str, ...]
    measure: Measure
    max_rounds: int | None = None  # of a run that does not compare two checkouts
    open_files: int = 2_000  # that the generator and each process of the comparator need
    is_compared: bool = True  # has a metric that two checkouts are compared by
    is_quick: bool = True  # is part of a quick run

    def rounds(self, wanted: int) -> int:
        """Return the number of rounds, which may have a maximum."""
        return min(wanted, self.max_rounds or wanted)


@contextlib.contextmanager
def pairs_of(
    intermediary: Intermediary,
    count: int,
    websocket: tuple[bool, bool] = (False, False),
    buffer_bytes: int | None = None,
) -> Iterator[list[Pair]]:
    """Connect so many pairs, and close them in the end."""
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(count):
            pairs.append(intermediary.pair(websocket, buffer_bytes))
            stack.callback(pairs[-1].close)
        yield pairs


class Meter:
    """Reads the CPU clocks of a comparator when it is made, and again at `stop`."""

    def __init__(self, intermediary: Intermediary) -> None:
        self._intermediary = intermediary
        self._before = intermediary.cpu_clocks()

    def stop(self) -> None:
        self._used = {
            name: seconds - self._before[name]
            for name, seconds in self._intermediary.cpu_clocks().items()
        }

    def rates(self, unit: str, amount: float, seconds: float) -> Measured:
        """Return the amount per second, and per CPU-second for each clock that has moved."""
        per_cpu_second = {
            f"{name}{unit}_per_cpu_second": amount / used
            for name, used in self._used.items()
            if used
        }
        return {f"{unit}_per_second": amount / seconds, **per_cpu_second}


# ---------------------------------------------------------------------------------------------
# Bulk
# ---------------------------------------------------------------------------------------------


def transfer(
    intermediary: Intermediary, flows: Sequence[Flow], source: Source, seconds: float
) -> Measured:
    """Send bulk on all flows at once for so long."""
    with Bulk(flows, source) as bulk:
        meter = Meter(intermediary)
        bulk.start(seconds)
        transferred = bulk.wait()
        meter.stop()
        bulk.end()
    return meter.rates("gb", transferred.payload_bytes / 1e9, transferred.seconds)


def tcp_bulk(count: int, both_ways: bool = False, buffer_bytes: int | None = None) -> Measure:
    """Return the workload of bulk in so many pairs of TCP clients.

    `buffer_bytes`: see Intermediary.pair.
    """

    def measure(subject: Subject, scale: Scale) -> Measured:
        with subject.pairs(count, buffer_bytes=buffer_bytes) as (intermediary, pairs):
            flows = [Flow(pair.first, pair.second) for pair in pairs]
            if both_ways:
                flows += [Flow(pair.second, pair.first) for pair in pairs]
            return transfer(intermediary, flows, load.plain_source(), scale.bulk_seconds)

    return measure


def websocket_bulk(first: bool, second: bool) -> Measure:
    """Return the workload of bulk in one pair.

    `first` and `second`: whether the sender and the receiver use WebSocket.
    """

    def measure(subject: Subject, scale: Scale) -> Measured:
        with subject.pairs(1, (first, second)) as (intermediary, [pair]):
            source = load.websocket_source() if first else load.plain_source()
            flow = Flow(pair.first, pair.second, first, second)
            return transfer(intermediary, [flow], source, scale.bulk_seconds)

    return measure


# ---------------------------------------------------------------------------------------------
# Messages and round trips
# ---------------------------------------------------------------------------------------------


def exchange(intermediary: Intermediary, pairs: Sequence[Pair], seconds: float) -> Measured:
    """Send messages in all pairs, one at a time in each pair."""
    with Worker(load.exchange_messages, pairs, os.urandom(MESSAGE_BYTES)) as worker:
        meter = Meter(intermediary)
        worker.send(seconds)
        exchanged: Exchanged = worker.receive()
        meter.stop()
    return meter.rates("messages", exchanged.done, exchanged.seconds)


def messages(subject: Subject, scale: Scale) -> Measured:
    """Measure messages in many pairs."""
    with subject.pairs(MESSAGE_PAIRS) as (intermediary, pairs):
        return exchange(intermediary, pairs, scale.messages_seconds)


def ping(worker: Worker, seconds: float, prefix: str = "") -> Measured:
    """Measure round trips for so long: the median and the 99th percentile."""
    worker.send(seconds)
    nanoseconds: list[int] = worker.receive()
    percentiles = statistics.quantiles(nanoseconds, n=100)
    return {
        f"{prefix}p50_microseconds": percentiles[49] / 1_000,
        f"{prefix}p99_microseconds": percentiles[98] / 1_000,
    }


def ping_worker(pair: Pair) -> Worker:
    """Return a worker for round trips beside bulk, at regular intervals."""
    return Worker(load.ping_at_intervals, pair, os.urandom(PING_BYTES), PING_INTERVAL_SECONDS)


def ping_beside(
    intermediary: Intermediary, worker: Worker, bulks: Sequence[Bulk], seconds: float, prefix: str
) -> Measured:
    """Measure round trips beside bulk, the bulk, and how busy the relay is meanwhile.

    The bulk's processes run in the background, so that the relay delays the pings, not the
    generator.
    """
    for bulk in bulks:
        bulk.start(FILL_SECONDS + seconds + WARM_UP_SECONDS)
    time.sleep(FILL_SECONDS)
    began_at, cpu_before = time.monotonic(), intermediary.cpu_seconds()
    measured = ping(worker, seconds, prefix)
    used, took = intermediary.cpu_seconds() - cpu_before, time.monotonic() - began_at
    transferred = [bulk.wait() for bulk in bulks]
    for bulk in bulks:
        bulk.end()
    gigabytes_per_second = sum(one.payload_bytes / 1e9 / one.seconds for one in transferred)
    measured[f"{prefix}gb_per_second"] = gigabytes_per_second
    measured[f"{prefix}cpu_percent"] = used / took * 100
    return measured


def background_bulk(pairs: Sequence[Pair], from_websocket: bool = False) -> Bulk:
    """Return bulk from the first to the second client of each pair, in the background."""
    flows = [Flow(pair.first, pair.second, from_websocket) for pair in pairs]
    source = load.websocket_source() if from_websocket else load.plain_source()
    return Bulk(flows, source, in_background=True)


def round_trip(subject: Subject, scale: Scale) -> Measured:
    """Measure round trips of a small message in a pair without other load."""
    with subject.pairs(1) as (_, [pair]):
        with Worker(load.ping_pong, pair, os.urandom(PING_BYTES)) as worker:
            ping(worker, WARM_UP_SECONDS)
            return ping(worker, scale.pings_seconds)


def fairness(subject: Subject, scale: Scale) -> Measured:
    """Measure round trips while other pairs are idle, and then while they carry bulk."""
    with subject.pairs(1 + FAIRNESS_PAIRS) as (intermediary, [pair, *others]):
        with ping_worker(pair) as worker, background_bulk(others) as bulk:
            ping(worker, WARM_UP_SECONDS)
            alone = ping(worker, scale.pings_seconds, "alone_")
            return alone | ping_beside(intermediary, worker, [bulk], scale.pings_seconds, "beside_")


def fairness_many(subject: Subject, scale: Scale) -> Measured:
    """Measure round trips beside 8 pairs with bulk, and then beside 400, in one relay.

    Bulk between TCP clients costs the relay about as much CPU as the generator, so either may be
    the slower one. Then the number of sources that are ready varies, and with it the result. Bulk
    from WebSocket clients costs the relay much more. So some of it keeps the relay the slower one,
    and all sources ready.
    """
    measured: Measured = {}
    with subject.pairs(1) as (intermediary, [pair]), ping_worker(pair) as worker:
        for count in FAIRNESS_COUNTS:
            websockets = count // WEBSOCKET_DIVISOR
            with (
                pairs_of(intermediary, count - websockets) as tcp_pairs,
                pairs_of(intermediary, websockets, (True, False)) as websocket_pairs,
                background_bulk(tcp_pairs) as tcp,
                background_bulk(websocket_pairs, from_websocket=True) as websocket,
            ):
                measured |= ping_beside(
                    intermediary,
                    worker,
                    [tcp, websocket],
                    scale.pings_seconds,
                    f"beside_{count}_",
                )
    return measured


# ---------------------------------------------------------------------------------------------
# Pairings
# ---------------------------------------------------------------------------------------------


def pairings(with_database: bool = False, is_websocket: bool = False) -> Measure:
    """Return the workload of pairings: two clients connect, read their ok, and leave in turn.

    `is_websocket`: whether both use WebSocket.
    """

    def measure(subject: Subject, scale: Scale) -> Measured:
        with subject.rendezvous(with_database) as service, contextlib.ExitStack() as stack:
            work = (load.make_pairings, service.connect, is_websocket, PAIRINGS_IN_PROGRESS)
            workers = [stack.enter_context(Worker(*work)) for _ in range(PAIRING_WORKERS)]
            meter = Meter(service)
            for worker in workers:
                worker.send(scale.pairings_seconds)
            parts: list[Exchanged] = [worker.receive() for worker in workers]
            time.sleep(RECORDS_SECONDS)
            service.settle()  # writing the records is part of the work
            meter.stop()
        done = sum(part.done for part in parts)
        if with_database:
            assert isinstance(service, Relay)
            if service.usage_rows() != done:
                raise LoadError(f"{service.usage_rows()} records of {done} pairings")
        return meter.rates("pairings", done, max(part.seconds for part in parts))

    return measure


# ---------------------------------------------------------------------------------------------
# Memory, idle CPU and start-up
# ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def waiting_at(relay: Relay, count: int) -> Iterator[None]:
    """Connect so many clients that wait for a partner, and close them in the end."""
    with contextlib.ExitStack() as stack:
        for number in range(1, count + 1):
            stack.enter_context(relay.connect(new_token(), "waiting"))
            if number % NEWCOMERS == 0 or number == count:
                relay.pair().close()  # clients are accepted in order, so all earlier ones are
        yield


def bytes_for_each(
    relay: Relay, add: Callable[[Relay, int], AbstractContextManager[object]], few: int, many: int
) -> float:
    """Return the memory of one client or pair that `add` connects, when `few` grow to `many`."""
    with add(relay, few):
        relay.settle()
        before = relay.resident_bytes()
        with add(relay, many - few):
            relay.settle()
            return (relay.resident_bytes() - before) / (many - few)


def memory(subject: Subject, scale: Scale) -> Measured:
    """Measure the memory at the start, and of each waiting client and each paired, idle client."""
    with subject.intermediary() as program:
        assert isinstance(program, Program)
        program.settle()
        measured = {"start_bytes": float(program.resident_bytes())}
        if not isinstance(program, Relay):
            return measured
        measured["waiting_bytes"] = bytes_for_each(program, waiting_at, *WAITING)
    with subject.relay() as relay:
        measured["paired_bytes"] = bytes_for_each(relay, pairs_of, *PAIRS) / 2
    return measured


def idle(subject: Subject, scale: Scale) -> Measured:
    """Measure the CPU of a relay with many waiting clients and nothing to do."""
    with subject.relay() as relay, waiting_at(relay, WAITING[1]):
        relay.settle()
        before = relay.cpu_seconds()
        time.sleep(scale.watch_seconds)
        used = relay.cpu_seconds() - before
    return {"cpu_percent": used / scale.watch_seconds * 100}


def start_up(subject: Subject, scale: Scale) -> Measured:
    """Measure the time from a relay's start until a client can connect."""
    seconds = []
    for _ in range(STARTS):
        relay = subject.relay()
        began_at = time.monotonic()
        relay.spawn()
        try:
            relay.wait_until_reachable()
            seconds.append(time.monotonic() - began_at)
            relay.wait_until_ready()
            relay.stop()
        finally:
            relay.kill()
    return {"seconds": statistics.median(seconds)}


# ---------------------------------------------------------------------------------------------
# Growth
# ---------------------------------------------------------------------------------------------


def growth(subject: Subject, scale: Scale) -> Measured:
    """Measure bulk and messages with few pairs and with many."""
    measured = {}
    source = load.plain_source()
    for count in GROWTH_BULK:
        with subject.pairs(count, buffer_bytes=GROWTH_BUFFER_BYTES) as (intermediary, pairs):
            flows = [Flow(pair.first, pair.second) for pair in pairs]
            transferred = transfer(intermediary, flows, source, scale.bulk_seconds)
        measured[f"bulk_{count}_gb_per_cpu_second"] = transferred["gb_per_cpu_second"]
    for count in GROWTH_MESSAGES:
        with subject.pairs(count, buffer_bytes=GROWTH_BUFFER_BYTES) as (intermediary, pairs):
            exchanged = exchange(intermediary, pairs, scale.messages_seconds)
        name = f"messages_{count}_messages_per_cpu_second"
        measured[name] = exchanged["messages_per_cpu_second"]
    return measured


# ---------------------------------------------------------------------------------------------
# All workloads
# ---------------------------------------------------------------------------------------------

RELAYS = ("ours", "twisted")
TCP = (
    *("ours", "ours-no-splice", "twisted", "twisted-db"),
    *("haproxy-splice", "haproxy-splice-1m", "haproxy-copy", "direct"),
)
HAPROXY = ("haproxy-splice", "haproxy-copy")
# plan() compares two checkouts only by workloads whose first comparator is "ours". These two tuples
# have it last, so their workloads are left out.
BEHIND_HAPROXY = ("haproxy-1-relay", "haproxy-2-relays", "ours")
GATEWAY = ("gateway-1-relay", "ours")
MANY_FILES = 16_000
WORKLOADS = [
    Workload("bulk-1", "bulk between TCP clients, 1 pair", TCP, tcp_bulk(1)),
    Workload("bulk-8", "bulk between TCP clients, 8 pairs", TCP, tcp_bulk(8)),
    Workload("both-4", "bulk in both directions, 4 pairs", TCP, tcp_bulk(4, both_ways=True)),
    Workload("tcp-ws", "bulk from TCP to WebSocket, 1 pair", RELAYS, websocket_bulk(False, True)),
    Workload("ws-tcp", "bulk from WebSocket to TCP, 1 pair", RELAYS, websocket_bulk(True, False)),
    Workload("ws-ws", "bulk between WebSocket clients, 1 pair", RELAYS, websocket_bulk(True, True)),
    Workload("messages-500", "1,400-byte messages, 500 pairs", (*RELAYS, *HAPROXY), messages),
    Workload("pairings", "pairs that meet and leave", RELAYS, pairings()),
    Workload("pairings-db", "the same, with a database", RELAYS, pairings(with_database=True)),
    Workload("round-trip", "64 bytes, 1 pair", (*RELAYS, "haproxy-copy", "direct"), round_trip),
    Workload(
        "memory",
        "at the start, and for each client",
        (*RELAYS, "interpreter"),
        memory,
        max_rounds=1,
        open_files=MANY_FILES,
    ),
    Workload(
        "idle",
        "CPU while 15,000 clients wait",
        ("ours",),
        idle,
        max_rounds=1,
        open_files=MANY_FILES,
        is_compared=False,
    ),
    Workload("start-up", "seconds until a client can connect", RELAYS, start_up, max_rounds=1),
    Workload(
        "growth",
        "bulk and messages with up to 4,000 pairs",
        ("ours",),
        growth,
        max_rounds=3,
        open_files=9_000,
    ),
    Workload(
        "fairness", "64 bytes beside 8 pairs with bulk", (*RELAYS, "haproxy-splice"), fairness
    ),
    Workload(
        "fairness-400",
        "64 bytes beside 8 pairs with bulk, then beside 400",
        RELAYS,
        fairness_many,
    ),
    Workload("haproxy-bulk-8", "bulk-8 through HAProxy to relays", BEHIND_HAPROXY, tcp_bulk(8)),
    Workload(
        "haproxy-bulk-512",
        "the same, 512 pairs",
        BEHIND_HAPROXY,
        tcp_bulk(512, buffer_bytes=GROWTH_BUFFER_BYTES),
        max_rounds=3,
        open_files=5_000,  # HAProxy has 4 sockets, and 2 pipes with 2 descriptors each, for a pair
        is_quick=False,
    ),
    Workload(
        "haproxy-pairings",
        "pairings through HAProxy to relays",
        BEHIND_HAPROXY,
        pairings(),
        max_rounds=3,
        is_quick=False,
    ),
    Workload(
        "gateway-tcp-ws",
        "tcp-ws through a gateway to a relay",
        GATEWAY,
        websocket_bulk(False, True),
    ),
    Workload(
        "gateway-ws-tcp",
        "ws-tcp through a gateway to a relay",
        GATEWAY,
        websocket_bulk(True, False),
    ),
    Workload(
        "gateway-pairings",
        "pairings over WebSocket through a gateway to a relay",
        GATEWAY,
        pairings(is_websocket=True),
        max_rounds=3,
        is_quick=False,
    ),
]
