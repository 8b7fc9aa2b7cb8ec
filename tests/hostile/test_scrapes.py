"""The status listener costs little: its answers, and what clients of the relay notice of them.

Thousands of connections are open: pairs, clients that wait, and silent ones. Times are compared
with those of the same relay in the same minute, because the speed of machines differs. Run it
alone.
"""

from __future__ import annotations

import json
import re
import statistics
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import pytest
from bench import clients
from bystanders import delayed_seconds
from helpers import TIMEOUT, Client, eventually
from processes import Code, patched
from test_floods import Flood
from test_status import request, status_port
from watched import WATCHED, Scene, percentile_99, shorter

COUNT = shorter(15_000, 10_000)  # connections
REQUESTS = {
    "/metrics": request("/metrics"),
    "/status.json": request("/status.json"),
    "/healthz": request("/healthz"),
    "/ as text": request("/"),
    "/ as page": request("/", "Accept: text/html"),
}
BATCHES, BATCH = shorter(50, 18), 10  # of requests, for each path
COST_RATIO = 2  # the most that an answer may cost, compared with the same relay with few clients

SCRAPES_PER_SECOND = 10
PING = b"p" * 64
PING_PAUSE_SECONDS = 0.002  # real time: without it, the pings would use all of the relay's time
PHASES = 4  # of pings with scrapes beside them, and as many without
PHASE_SECONDS = shorter(3.0, 0.5)
MEDIAN_RATIO, P99_RATIO = 1.5, 3
P99_SECONDS = 0.002  # or by so much: some pings wait for an answer, on a fast machine too

BAD_CLIENTS = 20  # of each kind
HEALTH_SECONDS = 10.0  # the default timeout of a scrape by Prometheus

# The history of this relay is full from the start, so that /status.json has its full length.
HISTORY_ROW = (123_456_789_012, 12_345, 1_234, 12_345, 10.0)
FULL_HISTORY = Code(
    "lambda history: history.resume("
    f"dict(hour=[{HISTORY_ROW}] * history.HOUR_SAMPLES, day=[{HISTORY_ROW}] * history.DAY_SAMPLES,"
    " hour_until=1.8e9, day_until=1.8e9, started_at=1.8e9, _gathered=0, _pairs_ended=0,"
    " _relayed_bytes=0, _last_sample_at=None))"
)
MODULE = "import_part('--status', 'transit_relay_status', 'StatusPages').__init__.__globals__"
PROGRAM = patched(**WATCHED, **{f"{MODULE}['History'].__init__": FULL_HISTORY})
OPTIONS = ("--status", "tcp:0:interface=127.0.0.1", "--handshake-timeout", "600")
FEW_TRANSFERS = ("--transfers", "4", "--block-bytes", "1000", "--pause-seconds", "1")


def lower_quartile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=4)[0]


def ask(port: int, wanted: bytes) -> bytes:
    """Return the whole answer to a request."""
    with Client(clients.connect(port)) as client:
        client.sock.settimeout(4 * TIMEOUT)
        client.send(wanted)
        answer = client.read_to_end()
    assert answer.startswith(b"HTTP/1.1 200 "), answer
    return answer


class Stage(NamedTuple):
    """A relay with many connections, and what its answers cost before that."""

    scene: Scene
    port: int  # of the status listener
    few_costs: dict[str, float]  # by path, in CPU-seconds of the relay

    def costs(self) -> dict[str, float]:
        """Return the CPU-seconds of an answer, by path: the lower quartile of some batches.

        Other processes disturb the caches of the processor, so that some batches cost more. They
        also delay some batches, and more than was used is then subtracted for the other work.
        """
        relay = self.scene.relay
        share = relay.cpu_share()

        def batch(wanted: bytes) -> float:
            began, before = time.monotonic(), relay.cpu_seconds()
            for _ in range(BATCH):
                ask(self.port, wanted)
            used = relay.cpu_seconds() - before
            return (used - share * (time.monotonic() - began)) / BATCH

        rounds = [[batch(wanted) for wanted in REQUESTS.values()] for _ in range(BATCHES)]
        return dict(zip(REQUESTS, map(lower_quartile, zip(*rounds))))

    def connections(self) -> int:
        """Return how many connections are open."""
        body = ask(self.port, REQUESTS["/status.json"]).partition(b"\r\n\r\n")[2]
        return int(json.loads(body)["connections"])

    def health_seconds(self) -> float:
        """Return how long the answer of /healthz took."""
        began = time.monotonic()
        ask(self.port, REQUESTS["/healthz"])
        return time.monotonic() - began

    def turns(self) -> dict[str, int]:
        """Return how many turns of the loop took at most so many seconds, since the start."""
        text = ask(self.port, REQUESTS["/metrics"]).decode()
        found = re.findall(r'transit_relay_turn_seconds_bucket{le="(.*)"} (\d+)', text)
        assert found, text
        return {bound: int(count) for bound, count in found}


@pytest.fixture(scope="module")
def stage() -> Iterator[Stage]:
    """A relay with COUNT connections, for all tests. Nothing of them is left at the end."""
    with Scene(
        *OPTIONS,
        program=PROGRAM,
        bystander_options=FEW_TRANSFERS,
        may_warn=["status clients have to wait"],
    ) as scene:
        relay = scene.relay
        port = status_port(relay.stderr.decode())
        few = Stage(scene, port, {})
        stage, few_connections = few._replace(few_costs=few.costs()), few.connections()
        with Flood("mixed", relay.port, COUNT) as flood:
            flood.wait_for_peak()
            eventually(lambda: stage.connections() >= few_connections + COUNT, "all connections")
            yield stage
            flood.finish(scene.books)
        eventually(lambda: relay.open_files() == scene.files_beside, "the descriptors of before")


def test_an_answer_costs_the_same_with_many_connections(stage: Stage) -> None:
    """Nothing is counted for an answer, except the bytes of the pairs that run."""
    costs = stage.costs()
    for path, seconds in costs.items():
        few = stage.few_costs[path]
        print(f"{path}: {1e3 * seconds:.2f} ms of CPU, {seconds / few:.2f} times that with few")
    for path, seconds in costs.items():
        assert seconds < COST_RATIO * stage.few_costs[path], path


class Scrapes(threading.Thread):
    """Asks for /metrics all the time, during the `with` block."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self._port = port
        self._stopping = threading.Event()
        self.count = 0

    def __enter__(self) -> Scrapes:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.join()
        assert self.count, "no scrape was answered"

    def run(self) -> None:
        while not self._stopping.wait(1 / SCRAPES_PER_SECOND):
            ask(self._port, REQUESTS["/metrics"])
            self.count += 1


class Pings:
    """Round trips of a small message in a pair, and how long the turns of the loop were."""

    def __init__(self, stage: Stage, pair: tuple[Client, Client]) -> None:
        self._stage = stage
        self._pair = pair
        self.seconds: list[float] = []  # of each, without the time that it waited for a core
        self._turns: Counter[str] = Counter()  # that took at most so long

    @contextmanager
    def counting_turns(self) -> Iterator[None]:
        """Count the turns of the `with` block."""
        before = self._stage.turns()
        yield
        self._turns.update(self._stage.turns())
        self._turns.subtract(before)

    def send(self, seconds: float) -> None:
        """Send pings for so long."""
        one, other = self._pair
        relay = self._stage.scene.relay
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(PING_PAUSE_SECONDS)
            began = time.monotonic() - delayed_seconds(relay.pid)
            one.send(PING)
            assert other.receive(len(PING)) == PING
            other.send(PING)
            assert one.receive(len(PING)) == PING
            self.seconds.append(time.monotonic() - delayed_seconds(relay.pid) - began)

    @property
    def median(self) -> float:
        """Return the median (seconds)."""
        return statistics.median(self.seconds)

    @property
    def p99(self) -> float:
        """Return the 99th percentile (seconds)."""
        return percentile_99(self.seconds)

    def print(self, name: str) -> None:
        """Print a line of numbers."""
        turns = self._turns["+Inf"]
        late = ", ".join(
            f"> {1e3 * float(bound):g} ms: {turns - self._turns[bound]}"
            for bound in ("0.001", "0.003", "0.01", "0.03")
        )
        print(
            f"{name}: {len(self.seconds)} pings, median {1e6 * self.median:.0f} us, p99"
            f" {1e6 * self.p99:.0f} us, longest {1e6 * max(self.seconds):.0f} us; {turns} turns,"
            f" {late}"
        )


@contextmanager
def pinging(stage: Stage, *names: str) -> Iterator[list[Pings]]:
    """Yield Pings of one pair, one for each name, and print their numbers at the end."""
    relay = stage.scene.relay
    with relay.client() as one, relay.client() as other:
        relay.couple(one, other)
        all_pings = [Pings(stage, (one, other)) for _ in names]
        try:
            yield all_pings
            one.half_close()
            assert other.read_to_end() == one.read_to_end() == b""
        finally:  # a failed test must not fail the checks of the scene too
            count = sum(len(pings.seconds) for pings in all_pings)
            stage.scene.books.add("happy", 2 * len(PING) * count)
    for name, pings in zip(names, all_pings):
        pings.print(name)


def check_pings(quiet: Pings, busy: Pings) -> None:
    """Raise AssertionError if the busy ones are much slower."""
    medians, p99s = busy.median / quiet.median, busy.p99 / quiet.p99
    print(f"ratios: median {medians:.2f}, p99 {p99s:.2f}")
    assert medians < MEDIAN_RATIO
    assert busy.p99 < max(P99_RATIO * quiet.p99, quiet.p99 + P99_SECONDS)


def test_scrapes_beside_a_pair(stage: Stage) -> None:
    """Many more scrapes than Prometheus makes do not slow small messages."""
    scrapes = 0
    with pinging(stage, "quiet", "beside scrapes") as (quiet, busy):
        for _ in range(PHASES):
            with quiet.counting_turns():
                quiet.send(PHASE_SECONDS)
            with busy.counting_turns(), Scrapes(stage.port) as scraper:
                busy.send(PHASE_SECONDS)
            scrapes += scraper.count
    print(f"{scrapes} scrapes")
    check_pings(quiet, busy)


def test_slow_and_broken_status_clients(stage: Stage) -> None:
    """They do not slow small messages. Another status client is answered in time."""
    files = stage.scene.relay.open_files()
    quiet_seconds = PHASES * PHASE_SECONDS / 2  # before, and again afterwards
    with pinging(stage, "quiet", "beside bad status clients") as (quiet, busy):
        with quiet.counting_turns():
            quiet.send(quiet_seconds)
        with busy.counting_turns(), Flood("bad_status_clients", stage.port, BAD_CLIENTS) as flood:
            flood.wait_for_peak()
            with ThreadPoolExecutor() as pool:
                health = pool.submit(stage.health_seconds)
                busy.send(2 * quiet_seconds)
                while not health.done():
                    busy.send(PHASE_SECONDS)
            flood.release()
            flood.succeed()
        with quiet.counting_turns():
            quiet.send(quiet_seconds)
    eventually(lambda: stage.scene.relay.open_files() == files, "the descriptors of before")
    print(f"/healthz was answered after {health.result():.1f} s")
    check_pings(quiet, busy)
    assert health.result() < HEALTH_SECONDS
