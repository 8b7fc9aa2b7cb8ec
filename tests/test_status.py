"""The status listener: what it answers, how exact it is, and that its clients hurt nothing."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import (
    RELAY,
    TIMEOUT,
    Loop,
    RelayProcess,
    eventually,
    handshake,
    is_readable,
    parse_head,
    read_to_end,
    snapshot_with,
)
from streams import LINE, UPGRADE
from test_reload import WS_FRAMES, Installation, ReloadingRelay

import transit_relay
from transit_relay import (
    CURRENT_SECONDS,
    LATE_TURN_SECONDS,
    MAX_STATUS_CLIENTS,
    MOODS,
    STATUS_CLIENT_SECONDS,
    STATUS_WAIT_SECONDS,
    TRANSPORTS,
    UNHEALTHY_SECONDS,
    Connection,
    Limit,
    Limits,
    PassedSockets,
    Phase,
    Quota,
    Role,
    ServerPhase,
    Snapshot,
    UsageDatabase,
    UsageRecord,
    choose_endpoints,
    open_descriptors,
    open_endpoint,
    parse_arguments,
    parse_endpoint,
)

transit_relay.import_part("--status", "transit_relay_status", "StatusPages")
status_pages: Any = sys.modules["transit_relay_status"]
STATUS_MODULE = Path(status_pages.__file__)
PATHS = ("/", "/healthz", "/metrics", "/status.json")
TEXT, JSON = "text/plain; charset=utf-8", "application/json; charset=utf-8"
OPENMETRICS = "application/openmetrics-text"


class Answer(NamedTuple):
    """The answer to a request."""

    status: int
    headers: dict[str, str]
    body: str

    @classmethod
    def parse(cls, data: bytes) -> Answer:
        """Parse all that came until the end of the connection."""
        head, _, body = data.partition(b"\r\n\r\n")
        status, headers = parse_head(head)
        return cls(int(status), headers, body.decode())


def request(path: str, *fields: str, method: str = "GET") -> bytes:
    """Return a request."""
    return "\r\n".join((f"{method} {path} HTTP/1.1", "Host: relay", *fields, "", "")).encode()


class Room:
    """A relay in this thread that has a status listener."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.attach()

    def attach(self) -> None:
        """Let the server answer status clients. To be called after each restart."""
        server = self.loop.server
        self.pages = status_pages.StatusPages(server, "0.1", 1024, open_descriptors)
        server.answer_status = self.pages.answer
        server.history = self.pages.history

    def connect(self) -> tuple[socket.socket, Connection]:
        """Return a new status client, and the relay's connection to it."""
        return self.loop.connect_both(role=Role.STATUS)

    def ask(self, path: str, *fields: str, method: str = "GET") -> Answer:
        """Send a request, and return the answer."""
        sock, _ = self.connect()
        sock.sendall(request(path, *fields, method=method))
        self.loop.pump()
        answer = Answer.parse(read_to_end(sock))
        sock.close()
        self.loop.pump()
        return answer

    def numbers(self) -> dict[str, Any]:
        """Return the content of /status.json."""
        answer = self.ask("/status.json")
        assert answer.headers["content-type"] == JSON
        content: dict[str, Any] = json.loads(answer.body)
        return content

    def sleep(self, seconds: float, timeout: float | None = None) -> None:
        """Let the relay wait for events, for so long. `timeout`: what it asked for, if less."""
        server, waits = self.loop.server, [seconds, 0]

        def select(_: float) -> list[object]:
            self.loop.clock.advance(waits.pop(0))
            return []

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(server._selector, "select", select)
            server.run_once(seconds if timeout is None else timeout)

    def samples(self, *fields: str) -> dict[str, float]:
        """Return the samples of /metrics, by name and labels as they are written."""
        return dict(parse_metrics(self.ask("/metrics", *fields).body))

    def health(self) -> tuple[int, list[str]]:
        """Return the status and the lines of /healthz."""
        answer = self.ask("/healthz")
        return answer.status, answer.body.splitlines()


@pytest.fixture
def room(loop: Loop) -> Room:
    return Room(loop)


def parse_metrics(text: str) -> Iterator[tuple[str, float]]:
    """Yield each sample. tests/interop/test_prometheus.py has stricter parsers."""
    described: list[str] = []
    for line in text.splitlines():
        if line.startswith("# HELP "):
            described.append(line.split(" ", 3)[2])
        elif not line.startswith("#"):
            name, value = line.rsplit(" ", 1)
            assert name.startswith(described[-1]), name
            yield name, float(value)
    assert len(described) == len(set(described))


# Requests and answers.


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_each_page_has_the_headers_of_a_private_one(room: Room, path: str, method: str) -> None:
    answer = room.ask(path, method=method)
    assert answer.status == 200 and bool(answer.body) == (method == "GET")
    require_private(answer)
    require_private(room.ask(path, "Accept: text/html", method=method))
    if method == "GET":
        assert int(answer.headers["content-length"]) == len(answer.body.encode())


def require_private(answer: Answer) -> None:
    """Check the headers that each answer of the status listener has."""
    headers = answer.headers
    assert headers["cache-control"] == "no-store"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["connection"] == "close"
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert "default-src 'none'" in headers["content-security-policy"]
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize(
    ("path", "method", "status", "body"),
    [
        ("/nothing", "GET", 404, "no such page\n"),
        ("/metrics/", "GET", 404, "no such page\n"),
        ("//", "GET", 404, "no such page\n"),
        ("*", "OPTIONS", 404, "no such page\n"),
        ("/metrics", "POST", 405, "this takes GET, HEAD\n"),
        ("/", "OPTIONS", 405, "this takes GET, HEAD\n"),
        ("/status.json", "DELETE", 405, "this takes GET, HEAD\n"),
        ("/healthz?verbose", "GET", 200, "ok\n"),
        ("http://relay/healthz", "GET", 200, "ok\n"),
        ("HTTPS://relay:8001/healthz?x=/", "GET", 200, "ok\n"),
    ],
)
def test_paths_and_methods(room: Room, path: str, method: str, status: int, body: str) -> None:
    answer = room.ask(path, method=method)
    assert (answer.status, answer.body) == (status, body)
    assert answer.headers.get("allow") == ("GET, HEAD" if status == 405 else None)
    require_private(answer)


@pytest.mark.parametrize(
    ("stream", "status"),
    [
        (LINE, 400),
        (b"GET / HTTP/2\r\n\r\n", 400),
        (b"HEAD / HTTP/2\r\n\r\n", 400),
        (b"\x16\x03\x01", 400),
        (b"GET / HTTP/1.1\r\n broken\r\n\r\n", 400),
        (b"GET /" + b"x" * 40_000, 431),
    ],
)
def test_what_is_no_request_gets_its_status(room: Room, stream: bytes, status: int) -> None:
    """It leaves no record, and is in no number."""
    sock, _ = room.connect()
    for start in range(0, len(stream), 4_000):
        sock.sendall(stream[start : start + 4_000])
        room.loop.pump()
    answer = Answer.parse(read_to_end(sock))
    assert answer.status == status
    assert bool(answer.body) == (not stream.startswith(b"HEAD "))
    require_private(answer)
    assert room.loop.recorder.records == []
    assert sum(room.numbers()["since_start"]["handshake_failures"].values()) == 0


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_request_in_single_bytes(room: Room, method: str) -> None:
    sock, conn = room.connect()
    for byte in request("/healthz", method=method):
        assert conn.phase is Phase.OPEN
        sock.sendall(bytes([byte]))
        room.loop.pump()
    answer = Answer.parse(read_to_end(sock))
    assert (answer.status, answer.headers["content-length"]) == (200, "3")
    assert answer.body == ("ok\n" if method == "GET" else "")


def test_an_upgrade_to_a_websocket_is_no_upgrade_here(room: Room) -> None:
    sock, _ = room.connect()
    sock.sendall(UPGRADE)
    room.loop.pump()
    answer = Answer.parse(read_to_end(sock))
    assert answer.status == 200 and answer.headers["content-type"] == TEXT


def test_behind_a_proxy_header(room: Room) -> None:
    sock = room.loop.connect(role=Role.STATUS, has_proxy_header=True)
    sock.sendall(b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 8001\r\n" + request("/healthz"))
    room.loop.pump()
    assert Answer.parse(read_to_end(sock)).body == "ok\n"
    bad = room.loop.connect(role=Role.STATUS, has_proxy_header=True)
    bad.sendall(b"no header\r\n")
    room.loop.pump()
    assert read_to_end(bad) == b""
    assert room.numbers()["since_start"]["handshake_failures"]["proxy_header"] == 0


@pytest.mark.parametrize(
    ("accept", "is_openmetrics"),
    [
        (f"Accept: {OPENMETRICS};version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.3", True),
        (f"Accept: text/plain;q=0.9, {OPENMETRICS.upper()}", True),
        (f"Accept: text/plain;q=0.6, {OPENMETRICS};q=0.5", False),
        ("Accept: text/plain;version=0.0.4", False),
        ("Accept: */*", False),
        (f"Accept: {OPENMETRICS};q=0.000", False),
        ("X-Other: 1", False),
    ],
)
def test_the_format_of_the_metrics(room: Room, accept: str, is_openmetrics: bool) -> None:
    answer = room.ask("/metrics", accept)
    kind = f"{OPENMETRICS}; version=1.0.0" if is_openmetrics else "text/plain; version=0.0.4"
    assert answer.headers["content-type"] == f"{kind}; charset=utf-8"
    assert answer.body.endswith("\n# EOF\n") == is_openmetrics
    assert ("# TYPE transit_relay_faults_total counter" in answer.body) != is_openmetrics


def test_curl_gets_a_text_of_about_twenty_lines(room: Room) -> None:
    answer = room.ask("/", "Accept: */*", "User-Agent: curl/7.88.1")
    assert answer.headers["content-type"] == TEXT
    lines = answer.body.splitlines()
    assert 14 <= len(lines) <= 24 and all(len(line) <= 100 for line in lines)
    assert {line.partition(":")[0] for line in lines} > {"health", "pairs", "waiting", "MB/s"}


# The numbers.


def play(loop: Loop) -> dict[str, Any]:
    """Let clients of each kind come and end. Return what the status must say of them."""
    kinds = {"tcp": ("tcp", "unix"), "websocket": ("ws", "ws-unix")}
    sizes = {
        ("tcp", "tcp"): (100, 23),
        ("tcp", "websocket"): (7, 1_000),
        ("websocket", "websocket"): (5, 6),
    }
    relayed = {source: dict.fromkeys(TRANSPORTS, 0) for source in TRANSPORTS}
    for (first, second), (there, back) in sizes.items():
        one, other = loop.meet(kinds[first][0], kinds[second][1], f"{first}{second}")
        loop.advance(1)
        one.send(bytes(there))
        other.send(bytes(back))
        assert other.receive(there) == bytes(there) and one.receive(back) == bytes(back)
        relayed[first][second] += there
        relayed[second][first] += back
        one.close()
        loop.pump()
        other.close()
        loop.pump()
    for token, kind in (("raw", "unix"), ("web", "ws-unix")):
        loop.client(kind).send(b"junk\n")  # errory
        waits = loop.client(kind)
        waits.send(handshake(token, "one"))
        waits.send(b"early")  # impatient
        silent = loop.client(kind, upgrade=True)
        silent.close()  # empty
        loop.pump()
        lonely = loop.client(kind)
        lonely.send(handshake(f"lonely{token}"))
        lonely.close()
        loop.pump()
        redundant = loop.client(kind)
        for one in (redundant, loop.client(kind)):
            one.send(handshake(f"crowd{token}", "one"))
        partner = loop.client(kind)
        partner.send(handshake(f"crowd{token}", "other"))
        partner.close()
        loop.pump()
    web = loop.connect(role=Role.WEBSOCKET)
    web.sendall(b"nonsense\n")
    loop.connect(role=Role.WEBSOCKET).sendall(UPGRADE.replace(b"Version: 13", b"Version: 8"))
    loop.connect(has_proxy_header=True).sendall(b"no header\r\n")
    loop.pump()
    single = {"tcp": 1, "websocket": 1}
    return {
        "connections": 6 + 2 * 7 + 3,
        "relayed_bytes_by_transport": relayed,
        "relayed_bytes": 100 + 23 + 7 + 1_000 + 5 + 6,
        "pairs_ended_by_transport": {
            "tcp-tcp": 2,
            "tcp-websocket": 1,
            "websocket-websocket": 2,
        },
        "pairs_ended": 5,
        "outcomes": {
            "happy": {"tcp": 5, "websocket": 5},
            **{mood: single for mood in MOODS if mood != "happy"},
        },
        "limits": {limit.value: 0 for limit in Limit},
        "handshake_failures": {
            **dict.fromkeys(transit_relay.FAILURES, 0),
            "bad_handshake": 2,
            "proxy_header": 1,
            "http_400": 1,
            "http_426": 1,
        },
        "faults": 0,
    }


def test_what_happened_is_counted_exactly(room: Room) -> None:
    before = room.samples()
    expected = play(room.loop)
    assert room.numbers()["since_start"] == expected
    after = room.samples()
    assert before.keys() == after.keys(), "a counter that was not there from the start"
    prefix = "transit_relay_"
    for mood, counts in expected["outcomes"].items():
        for transport, count in counts.items():
            labels = f'{{outcome="{mood}",transport="{transport}"}}'
            assert after[f"{prefix}connections_ended_total{labels}"] == count, labels
    for source, sizes in expected["relayed_bytes_by_transport"].items():
        for target, size in sizes.items():
            labels = f'{{from="{source}",to="{target}"}}'
            assert after[f"{prefix}relayed_bytes_total{labels}"] == size
    for transports, count in expected["pairs_ended_by_transport"].items():
        assert after[f'{prefix}pairs_ended_total{{transports="{transports}"}}'] == count
    for kind, count in expected["handshake_failures"].items():
        assert after[f'{prefix}handshake_failures_total{{kind="{kind}"}}'] == count
    assert after[f"{prefix}connections_accepted_total"] == expected["connections"]
    growing = {name for name in after if after[name] > before[name]}
    assert f"{prefix}turn_seconds_count" in growing
    assert not [name for name in growing if "limit_actions" in name or "faults" in name]
    records = room.loop.recorder.moods()
    counted = {mood: sum(counts.values()) for mood, counts in expected["outcomes"].items()}
    assert {mood: records.count(mood) for mood in MOODS} == {**counted, "happy": 5}


def test_the_histograms_have_the_ended_pairs(room: Room) -> None:
    play(room.loop)
    samples = room.samples()
    for name in ("partner_wait_seconds", "pair_duration_seconds", "pair_size_bytes"):
        assert samples[f"transit_relay_{name}_count"] == 5
        assert samples[f'transit_relay_{name}_bucket{{le="+Inf"}}'] == 5
    assert samples["transit_relay_pair_size_bytes_sum"] == 1_141
    assert samples['transit_relay_pair_size_bytes_bucket{le="1000.0"}'] == 4
    assert samples['transit_relay_pair_size_bytes_bucket{le="10000.0"}'] == 5
    assert samples["transit_relay_pair_duration_seconds_sum"] == 3
    assert samples['transit_relay_pair_duration_seconds_bucket{le="0.1"}'] == 2
    assert samples['transit_relay_pair_duration_seconds_bucket{le="1.0"}'] == 5
    assert samples["transit_relay_pair_rate_bytes_per_second_sum"] == 1_141


def test_counts_of_other_buckets_are_not_resumed() -> None:
    before, after = transit_relay.Histogram(1, 10), transit_relay.Histogram(1, 10, 100)
    before.add(5)
    after.resume(before.place())
    assert (after.counts, after.total) == ([0, 0, 0, 0], 0)
    same = transit_relay.Histogram(1, 10)
    same.resume(before.place())
    assert (same.counts, same.total) == ([0, 1, 0], 5)


def test_a_bucket_includes_its_bound() -> None:
    histogram = transit_relay.Histogram(1, 10)
    for value in (0, 1, 1.5, 10, 11):
        histogram.add(value)
    assert histogram.counts == [2, 2, 1] and histogram.total == 23.5


def test_how_things_stand(room: Room) -> None:
    loop = room.loop
    loop.meet("unix", "ws-unix", "pair")
    for _ in range(2):
        loop.client("unix").send(handshake("waits", "one"))
    loop.client("unix").send(b"junk\n")
    numbers = room.numbers()
    assert (numbers["pairs"], numbers["waiting_clients"], numbers["waiting_tokens"]) == (1, 2, 1)
    assert numbers["connections"] == 6  # the status client is one of them
    phases = {"open": 5, "flushing": 0, "lingering": 1, "closed": 0}
    assert numbers["connections_by_phase"] == phases
    assert numbers["since_start"]["connections"] == 5
    samples = room.samples()
    for phase, count in phases.items():
        assert samples[f'transit_relay_connections{{phase="{phase}"}}'] == count
    assert samples["transit_relay_pairs"] == 1 and samples["transit_relay_waiting_clients"] == 2


def test_queued_bytes_and_pipes_are_shown(room: Room) -> None:
    loop = room.loop
    one, other = loop.pair()
    one.setblocking(False)
    with pytest.raises(BlockingIOError):
        while True:
            one.send(bytes(1 << 16))
            loop.pump()
    queued = room.numbers()["queued_bytes"]
    assert queued == loop.server.memory.queued_bytes > 0
    assert room.samples()["transit_relay_pipes"] == loop.server.pipes.open_pipes
    other.close()


def test_descriptors_are_counted_and_with_many_connections_computed(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = room.loop
    before = len(open_descriptors())
    for _ in range(3):
        loop.connect()
    counted = room.numbers()["open_descriptors"]
    assert counted == before - 1 + 3 * 2 + 2  # both ends are in this process
    monkeypatch.setattr(status_pages, "LISTING_MAX_CONNECTIONS", 1)
    monkeypatch.setattr(room.pages, "_open_descriptors", lambda: pytest.fail("listed again"))
    ours, its = socket.socketpair()
    loop.server.admit(its)
    assert room.numbers()["open_descriptors"] == counted + 1  # the relay's end
    ours.close()
    loop.pump()


def test_limits_are_counted_by_their_names(room: Room) -> None:
    loop = room.loop
    loop.restart(limits=Limits(handshake_seconds=5, wait_seconds=5))
    room.attach()
    loop.connect()
    loop.client("unix").send(handshake("waits"))
    loop.pump()
    loop.advance(6)
    samples = room.samples()
    names = {limit.name.lower() for limit in Limit}
    found = {
        match[1]: value
        for name, value in samples.items()
        if (match := re.fullmatch(r'transit_relay_limit_actions_total\{limit="(\w+)"\}', name))
    }
    assert found == {**dict.fromkeys(names, 0.0), "handshake": 1.0, "wait": 1.0}
    limits = room.numbers()["since_start"]["limits"]
    assert limits == {
        **{limit.value: 0 for limit in Limit},
        "--handshake-timeout": 1,
        "--max-wait": 1,
    }


def test_the_quota_is_shown_if_there_is_one(room: Room) -> None:
    assert room.numbers()["quota"] is None
    assert not [name for name in room.samples() if "quota_" in name]
    loop = room.loop
    loop.restart(quota=Quota(1_000, loop.wallclock))
    room.attach()
    one, _ = loop.pair()
    one.sendall(bytes(600))
    loop.advance(5)
    assert room.numbers()["quota"] == {"month": "2023-11", "used_bytes": 600, "max_bytes": 1_000}
    samples = room.samples()
    assert samples["transit_relay_quota_used_bytes"] == 600
    assert samples["transit_relay_quota_bytes"] == 1_000
    assert "quota:" in room.ask("/").body


def test_the_time_of_the_start_stays_unless_the_clock_is_set(room: Room) -> None:
    """It is computed from both clocks, which never agree to the microsecond."""
    loop, name = room.loop, "process_start_time_seconds"
    first = room.samples()[name]
    loop.wallclock.advance(0.9)
    assert room.samples()[name] == first
    loop.wallclock.advance(3_600)
    assert room.samples()[name] == first + 3_600.9


def test_no_text_has_an_address_a_token_or_a_side(room: Room) -> None:
    loop = room.loop
    secrets = ["192.0.2.77", "5d" * 32, "51de" * 4]
    token, side = secrets[1].encode(), secrets[2].encode()
    line = b"please relay " + token + b" for side " + side + b"\n"
    proxied = loop.connect(has_proxy_header=True)
    proxied.sendall(b"PROXY TCP4 192.0.2.77 192.0.2.1 50000 4001\r\n" + line)
    loop.pump()
    loop.connect().sendall(line.replace(side, b"a" * 16))
    loop.pump()
    assert room.numbers()["pairs"] == 1
    for path in (*PATHS, "/" + secrets[1]):
        for accept in ("text/html", OPENMETRICS, "*/*"):
            answer = room.ask(path, f"Accept: {accept}", "X-Forwarded-For: 192.0.2.77")
            text = str(answer)
            assert [secret for secret in secrets if secret in text] == []


# Health.


def test_a_relay_that_does_not_accept_is_not_healthy(room: Room) -> None:
    assert room.health() == (200, ["ok"])
    endpoint = parse_endpoint("tcp:0:interface=127.0.0.1")
    room.loop.restart(*open_endpoint(endpoint))
    room.attach()
    assert room.health() == (200, ["ok"])
    room.loop.server._acceptor.pause("for the test", may_end_early=False)
    assert room.health() == (503, ["not accepting"])
    assert room.samples()["transit_relay_healthy"] == 0
    numbers = room.numbers()
    assert (numbers["healthy"], numbers["problems"]) == (False, ["not accepting"])
    room.loop.advance(1)
    assert room.health() == (200, ["ok"])


def test_after_a_long_turn_the_relay_is_late_for_a_minute(room: Room) -> None:
    loop = room.loop
    loop.server.signals.actions[signal.SIGUSR2] = lambda: loop.clock.advance(LATE_TURN_SECONDS)
    loop.signal(signal.SIGUSR2)
    assert room.health() == (200, ["ok"])
    loop.server.signals.actions[signal.SIGUSR2] = lambda: loop.clock.advance(
        LATE_TURN_SECONDS + 0.1
    )
    loop.signal(signal.SIGUSR2)
    assert room.health() == (503, ["loop late"])
    room.sleep(UNHEALTHY_SECONDS - 1)
    assert room.health() == (503, ["loop late"])
    room.sleep(1)
    assert room.health() == (200, ["ok"])


def test_a_wait_for_events_is_no_turn(room: Room) -> None:
    """Nor is a suspension, in which the relay did not work."""
    before = room.samples()["transit_relay_turn_seconds_sum"]
    room.sleep(3_600)
    room.sleep(3_600, timeout=10)
    assert room.samples()["transit_relay_turn_seconds_sum"] == before
    assert room.health() == (200, ["ok"])


def test_while_the_relay_drains_status_clients_are_served(room: Room) -> None:
    loop = room.loop
    relay_listener, status_listener = (
        open_endpoint(parse_endpoint("tcp:0:interface=127.0.0.1", role))[0]
        for role in (Role.PORT, Role.STATUS)
    )
    loop.restart(relay_listener, status_listener, drain_seconds=60)
    room.attach()
    loop.pair()
    early, _ = room.connect()
    loop.signal()
    assert loop.server.phase is ServerPhase.DRAINING
    early.sendall(request("/healthz"))
    loop.pump()
    assert Answer.parse(read_to_end(early)).body == "stopping\n"
    assert relay_listener.sock.fileno() < 0
    with socket.create_connection(status_listener.sock.getsockname(), TIMEOUT) as late:
        late.sendall(request("/status.json"))
        loop.pump()
        numbers = json.loads(Answer.parse(read_to_end(late)).body)
    assert numbers["problems"] == ["stopping"] and 0 < numbers["drain_seconds_left"] <= 60
    silent, _ = room.connect()
    loop.signal()
    assert read_to_end(silent) == b"" and status_listener.sock.fileno() < 0


# What status clients can do.


def test_status_clients_do_not_wait_for_others_to_be_served(room: Room) -> None:
    """A silent one is closed after its time. It is no limit of clients, and leaves no record."""
    loop = room.loop
    loop.restart(limits=Limits(handshake_seconds=0, stall_seconds=1))
    loop.advance(0)  # from now on, the time is checked every CURRENT_SECONDS
    room.attach()
    silent, conn = room.connect()
    half, _ = room.connect()
    half.sendall(request("/")[:-1])
    assert room.health() == (200, ["ok"])
    for _ in range(STATUS_CLIENT_SECONDS - 1):
        loop.advance(1)
    assert conn.phase is Phase.OPEN
    for _ in range(CURRENT_SECONDS + 1):
        loop.advance(1)
    assert read_to_end(silent) == read_to_end(half) == b""
    assert loop.recorder.records == [] and loop.server.limits.reached.counts == {}


def test_a_status_client_that_reads_nothing_is_closed_too(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = room.loop
    monkeypatch.setattr(loop.server, "answer_status", lambda request: bytes(300_000))
    sock, conn = room.connect()
    conn.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
    sock.sendall(request("/"))
    loop.pump()
    assert conn.phase is Phase.FLUSHING and conn.queued_bytes() > 100_000
    loop.advance(STATUS_CLIENT_SECONDS)
    assert conn.phase is Phase.CLOSED and loop.server.memory.queued_bytes == 0
    assert loop.server.limits.reached.counts == {}


@pytest.fixture
def crowded(room: Room) -> Iterator[Callable[[], socket.socket]]:
    """Return a function that connects to a status listener of the room, which has none yet."""
    (listener,) = open_endpoint(parse_endpoint("tcp:0:interface=127.0.0.1", Role.STATUS))
    room.loop.restart(listener)
    room.attach()
    socks: list[socket.socket] = []

    def connect() -> socket.socket:
        socks.append(socket.create_connection(listener.sock.getsockname(), TIMEOUT))
        room.loop.wait_for_arrivals()
        room.loop.pump()
        return socks[-1]

    yield connect
    for sock in socks:
        sock.close()


def test_at_most_eight_status_clients_are_served_at_a_time(
    room: Room, crowded: Callable[[], socket.socket], caplog: pytest.LogCaptureFixture
) -> None:
    """The others wait. Each of them takes the place of the oldest, one after the other."""
    loop, queue = room.loop, room.loop.server.timers.status_clients
    socks = [crowded() for _ in range(MAX_STATUS_CLIENTS + 3)]
    assert len(loop.server.connections) == len(queue) == MAX_STATUS_CLIENTS
    for oldest in socks[:3]:
        loop.advance(STATUS_WAIT_SECONDS)
        loop.pump()  # the pause ends at the end of a turn
        assert len(queue) == MAX_STATUS_CLIENTS
        assert read_to_end(oldest) == b""
    socks[-1].sendall(request("/healthz"))
    loop.pump()
    assert Answer.parse(read_to_end(socks[-1])).status == 200
    for sock in socks:
        sock.close()
    loop.advance(1)
    assert not loop.server.connections


def test_a_crowd_of_status_clients_keeps_no_client_of_the_relay_out(
    room: Room, crowded: Callable[[], socket.socket]
) -> None:
    for _ in range(MAX_STATUS_CLIENTS):
        crowded()
    assert not room.loop.server._status_acceptor.is_accepting
    assert room.loop.server._acceptor.retry_at == float("inf")
    room.loop.pair()
    assert len(room.loop.server.rendezvous.pairs) == 1


def test_a_full_relay_answers_status_clients(room: Room) -> None:
    """They count as connections. Neither they nor clients of the relay make room for the other."""
    loop = room.loop
    loop.restart(limits=Limits(max_connections=3))
    room.attach()
    early, early_conn = room.connect()
    pair = loop.pair()
    refused = loop.connect()
    refused.sendall(handshake("newcomer"))
    loop.pump()
    assert refused.recv(100) == b"relay full\n"
    assert early_conn.phase is Phase.OPEN
    assert room.health() == (200, ["ok"])
    pair[0].sendall(b"still there")
    loop.pump()
    assert pair[1].recv(100) == b"still there"
    early.sendall(request("/healthz"))
    loop.pump()
    assert Answer.parse(read_to_end(early)).status == 200


def test_a_lingering_status_client_makes_no_room(room: Room) -> None:
    loop = room.loop
    loop.restart(limits=Limits(max_connections=2))
    room.attach()
    sock, conn = room.connect()
    sock.sendall(request("/"))
    loop.pump()
    read_to_end(sock)
    assert conn.phase is Phase.LINGERING
    silent, other = loop.connect_both()
    newcomer = loop.connect()
    loop.pump()
    assert conn.phase is Phase.LINGERING and other.phase is Phase.CLOSED
    assert read_to_end(silent) == b"" and newcomer.fileno() >= 0


def test_without_a_descriptor_only_status_clients_are_accepted(
    room: Room, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = room.loop
    listeners = [
        open_endpoint(parse_endpoint("tcp:0:interface=127.0.0.1", role))[0]
        for role in (Role.PORT, Role.STATUS)
    ]
    loop.restart(*listeners, max_open=2)
    room.attach()
    loop.pair()
    with socket.create_connection(listeners[0].sock.getsockname(), TIMEOUT) as refused:
        loop.pump()
        assert refused.recv(1) == b"" and not loop.server._acceptor.is_accepting
        with socket.create_connection(listeners[1].sock.getsockname(), TIMEOUT) as asks:
            asks.sendall(request("/healthz"))
            loop.pump()
            answer = Answer.parse(read_to_end(asks))
        assert (answer.status, answer.body) == (503, "not accepting\n")
        loop.pump()  # the end of a status client makes no room for others
        assert not loop.server._acceptor.is_accepting
    assert room.numbers()["since_start"]["limits"][Limit.DESCRIPTORS.value] == 1


def test_a_place_that_is_left_is_taken_at_once(
    room: Room, crowded: Callable[[], socket.socket]
) -> None:
    socks = [crowded() for _ in range(MAX_STATUS_CLIENTS + 1)]
    socks[3].close()
    room.loop.pump()
    socks[-1].sendall(request("/healthz"))
    room.loop.pump()
    assert Answer.parse(read_to_end(socks[-1])).status == 200
    assert not any(map(is_readable, socks[:3]))


def test_a_fault_of_a_page_costs_one_status_client(
    room: Room, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(request: object) -> bytes:
        raise ZeroDivisionError

    pair = room.loop.pair()
    monkeypatch.setattr(room.loop.server, "answer_status", fail)
    sock, conn = room.connect()
    sock.sendall(request("/"))
    room.loop.pump()
    assert read_to_end(sock) == b"" and conn.phase is not Phase.OPEN
    assert room.loop.server.faults.count == 1 and "ZeroDivisionError" in caplog.text
    pair[0].sendall(b"x")
    room.loop.pump()
    assert pair[1].recv(1) == b"x"


# The history.


def snapshot(relayed: int, ended: int, pairs: int = 0, waiting: int = 0) -> Snapshot:
    """Return a snapshot with these numbers."""
    counts = {"relayed_bytes": relayed, "pairs_ended": ended}
    return snapshot_with(**counts, pairs=pairs, waiting_clients=waiting)


def filled_history(samples: int) -> Any:
    """Return a history in which sample n has n + 1 bytes, and every third one a pair."""
    history = status_pages.History()
    history.note(snapshot(0, 0), 0.0)
    relayed = ended = 0
    for n in range(samples):
        relayed += n + 1
        ended += n % 3 == 0
        history.note(snapshot(relayed, ended, n, 2 * n), 10.0 * (n + 1))
    return history


def test_samples_have_what_happened_since_the_last_one() -> None:
    history = filled_history(4)
    assert [tuple(sample) for sample in history.hour] == [
        *((1, 1, 0, 0, 10), (2, 0, 1, 2, 10), (3, 0, 2, 4, 10), (4, 1, 3, 6, 10)),
    ]
    assert history.day == []


def test_a_day_of_samples_is_summed_up_and_bounded() -> None:
    history = filled_history(10_000)
    assert (len(history.hour), len(history.day)) == (360, 288)
    assert history.hour[-1].relayed_bytes == 10_000
    last_whole = 10_000 // 30 * 30
    assert history.day[-1].relayed_bytes == sum(range(last_whole - 29, last_whole + 1))
    assert (history.day[-1].pairs_ended, history.day[-1].pairs) == (10, last_whole - 1)
    size = sum(map(sys.getsizeof, (*history.hour, *history.day)))
    size += sum(sys.getsizeof(number) for row in (*history.hour, *history.day) for number in row)
    assert size < 150_000


def test_a_history_goes_on_after_a_reload() -> None:
    whole, resumed = filled_history(100), status_pages.History()
    resumed.resume(whole.place())
    for history in (whole, resumed):
        history.note(snapshot(6_000, 40), 1_003)  # too early
        history.note(snapshot(7_000, 50), 1_010)
    assert resumed.place() == whole.place() and len(resumed.hour) == 101
    assert resumed.hour[-1] == (7_000 - 5_050, 50 - 34, 0, 0, 10)


def test_an_unknown_history_is_left_out() -> None:
    history = status_pages.History()
    history.resume({"year": ((1, 2, 3, 4),)})
    assert history.hour == []


def test_what_happened_before_the_first_sample_is_left_out() -> None:
    """The relay had no status listener before a reload."""
    history = status_pages.History()
    history.note(snapshot(5 * 10**12, 1_000), 100.0)
    assert history.hour == []
    history.note(snapshot(5 * 10**12 + 7, 1_001), 110.0)
    assert history.hour == [(7, 1, 0, 0, 10)]


def test_a_gap_has_samples_of_0() -> None:
    history = filled_history(2)
    history.note(snapshot(10**12, 500), 20.0 + 35.0)
    history.note(snapshot(10**12 + 7, 501), 20.0 + 45.0)
    sizes = [sample.relayed_bytes for sample in history.hour]
    assert sizes == [1, 2, *(4 * [0]), 7]
    history.note(snapshot(10**13, 502), 10.0**7)
    assert len(history.hour) == 360 and not any(sample.relayed_bytes for sample in history.hour)


def test_rates_are_those_of_the_covered_time(room: Room) -> None:
    rates = room.numbers()["rates"]
    assert set(rates) == {"10", "60", "300", "1800", "3600"}
    assert rates["10"] == {"bytes_per_second": 0, "pairs_per_second": 0}
    room.pages.history = filled_history(30)
    rates = room.numbers()["rates"]
    assert rates["10"]["bytes_per_second"] == 3  # the last sample has 30 bytes
    assert rates["60"]["bytes_per_second"] == sum(range(25, 31)) / 60
    assert (
        rates["300"]
        == rates["3600"]
        == {
            "bytes_per_second": sum(range(1, 31)) / 300,
            "pairs_per_second": 10 / 300,
        }
    )


def test_rates_know_how_long_a_sample_is(room: Room) -> None:
    """After a reload, one can be shorter or longer."""
    history = filled_history(0)
    history.note(snapshot(6_000_000, 3), 6.0)
    room.pages.history = history
    assert room.numbers()["rates"]["10"]["bytes_per_second"] == 1_000_000


def test_the_history_in_the_json(room: Room) -> None:
    room.pages.history = filled_history(31)
    hour, day = (room.numbers()["history"][name] for name in ("hour", "day"))
    assert hour["seconds"] == 10 and day["seconds"] == 300
    assert hour["relayed_bytes"] == list(range(1, 32)) and len(hour["waiting_clients"]) == 31
    assert day["relayed_bytes"] == [sum(range(1, 31))] and day["pairs"] == [29]


def test_samples_are_taken_while_the_relay_runs(room: Room) -> None:
    loop = room.loop
    loop.server.timers.every(10, room.pages.sample)
    one, other = loop.pair()
    for _ in range(3):
        one.sendall(b"12345")
        loop.advance(10)
    assert other.recv(100) == b"12345" * 3
    assert sum(sample.relayed_bytes for sample in room.pages.history.hour) == 15
    assert room.pages.history.hour[-1].pairs == 1


# The page.


def test_the_policy_of_a_page_has_the_hashes_of_its_style_and_script() -> None:
    html = "<style>a{}</style><p><script>1;</script>"
    name, _, value = status_pages.content_policy(html).partition(": ")
    assert name == "Content-Security-Policy"
    policy = value.split("; ")
    assert "style-src 'sha256-Tig28uBq5Ut0ow8jD4kyxZR1gLP9PPcX2aH6TmdxXBQ='" not in policy
    for element, content in (("style", b"a{}"), ("script", b"1;")):
        digest = status_pages.base64.b64encode(status_pages.hashlib.sha256(content).digest())
        assert f"{element}-src 'sha256-{digest.decode()}'" in policy
    assert "connect-src 'self'" in policy and "default-src 'none'" in policy


# Totals of a database.


def totals_of(sink: UsageDatabase) -> Any:
    """Return the totals of a database, or None."""
    return sink.status().totals


def some_records() -> list[UsageRecord]:
    """Return records of four moods."""
    moods = ("happy", "happy", "lonely", "errory", "empty")
    return [UsageRecord(1.0, 2.0, None, 100 * n, mood) for n, mood in enumerate(moods)]


ZERO = dict.fromkeys(MOODS, (0, 0))
SOME = {**ZERO, "happy": (2, 100), "lonely": (1, 200), "errory": (1, 300), "empty": (1, 400)}
TWICE = {mood: (2 * count, 2 * size) for mood, (count, size) in SOME.items()}


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Callable[..., UsageDatabase]]:
    """Return a function that makes a sink for one database file."""
    sinks: list[UsageDatabase] = []

    def make(has_totals: bool = True) -> UsageDatabase:
        sinks.append(UsageDatabase(str(tmp_path / "usage.sqlite"), has_totals=has_totals))
        return sinks[-1]

    yield make
    for sink in sinks:
        sink.close()


def test_totals_are_read_after_the_first_write_and_then_added_up(
    database: Callable[..., UsageDatabase],
) -> None:
    first = database(has_totals=False)
    first.write(some_records(), None)
    assert totals_of(first) is None
    first.close()
    sink = database()
    assert totals_of(sink) is None
    sink.write([], None)
    assert totals_of(sink) == SOME
    sink.write(some_records(), None)
    assert totals_of(sink) == TWICE


def test_totals_of_another_file_are_read_anew(
    database: Callable[..., UsageDatabase], tmp_path: Path
) -> None:
    sink = database()
    sink.write(some_records(), None)
    (tmp_path / "usage.sqlite").rename(tmp_path / "old.sqlite")
    sink.write([], None)
    assert totals_of(sink) == ZERO


def test_rows_of_other_programs_do_no_harm(
    database: Callable[..., UsageDatabase], tmp_path: Path
) -> None:
    sink = database(has_totals=False)
    sink.write([], None)
    sink.close()
    with closing(sqlite3.connect(tmp_path / "usage.sqlite")) as db, db:
        for row in (
            *(
                "(1, 2, 3, NULL, 'happy')",
                "(1, 2, 3, 9e999, 'happy')",
                "(1, 2, 3, 'many', 'happy')",
            ),
            *(3 * ["(1, 2, 3, 4611686018427387904, 'happy')"]),
            *("(1, 2, 3, 4, 'crowded')", "(1, 2, 3, 4, x'6861707079')", "(1, 2, 3, 4, NULL)"),
            "(1, 2, 3, 4, CAST(x'ff' AS TEXT))",
        ):
            db.execute(f"INSERT INTO `usage` VALUES {row}")
    again = database()
    again.write([], None)
    assert totals_of(again) == {**ZERO, "happy": (6, 3 * 2**62)}


@pytest.mark.parametrize("flag", ["_stopping", "_pausing"])
def test_reading_the_totals_delays_no_stop_and_no_reload(
    database: Callable[..., UsageDatabase], flag: str
) -> None:
    """The query is interrupted, and repeated after the next write. No record is written twice."""
    sink = database()
    rows = [UsageRecord(1.0, 2.0, None, 1, "happy")] * 50_000
    setattr(sink, flag, True)
    assert sink.write(rows, None) == len(rows)
    assert totals_of(sink) is None
    setattr(sink, flag, False)
    sink.write([], None)
    assert totals_of(sink) == {**ZERO, "happy": (50_000, 50_000)}


def test_totals_are_in_the_json(room: Room, database: Callable[..., UsageDatabase]) -> None:
    assert room.numbers()["alltime"] is None
    sink = database()
    sink.write(some_records(), None)
    room.loop.server.recorder._sinks = (sink,)
    alltime = room.numbers()["alltime"]
    assert alltime["happy"] == {"count": 2, "bytes": 100} and set(alltime) == set(MOODS)
    assert room.numbers()["records"] == {
        "--usage-db": {"written": 0, "dropped": 0, "waiting": 0, "failing": False}
    }
    sink._failing = True
    assert room.health() == (503, ["records failing: --usage-db"])
    sink._gone = True  # the target left: this is known, and not a failure
    assert room.health() == (200, ["ok"])
    sink._gone = False
    assert room.samples()['transit_relay_records_failing{sink="usage-db"}'] == 1
    room.loop.server.recorder._sinks = ()


# Options.


def roles(*arguments: str, passed: PassedSockets | None = None) -> list[tuple[str, str]]:
    """Return the endpoints that a command line chooses."""
    options = parse_arguments(list(arguments))
    chosen = choose_endpoints(options, passed or PassedSockets())
    return [(one.role.value, one.text) for one in chosen]


def test_a_status_listener_replaces_no_other() -> None:
    default, status = ("port", "tcp:4001"), ("status", "tcp:8001")
    assert roles("--status=tcp:8001") == [default, status]
    web = ("websocket", "tcp:4002")
    assert roles("--status=tcp:8001", "--websocket=tcp:4002") == [default, web, status]
    assert roles("--status=tcp:8001", "--port=tcp:5") == [("port", "tcp:5"), status]


def test_a_passed_socket_that_status_names_is_no_port(tmp_path: Path) -> None:
    with ExitStack() as opened:
        socks = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        first = socks[0].fileno()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(transit_relay, "FIRST_PASSED_FD", first)
            count = socks[1].fileno() - first + 1
            passed = PassedSockets(count, ("main", *(count - 2) * ["x"], "admin"))
            chosen = roles("--status=systemd:name=admin", passed=passed)
    assert chosen[0] == ("port", "systemd:index=0")
    assert chosen[-1] == ("status", "systemd:name=admin")
    assert ("port", f"systemd:index={count - 1}") not in chosen


def test_a_passed_socket_is_for_status_clients_by_its_name() -> None:
    passed = PassedSockets(2, ("relay", "status"))
    index = [("port", "systemd:index=0"), ("status", "systemd:index=1")]
    assert roles(passed=passed) == index
    assert roles("--status=tcp:8001", passed=passed) == [*index, ("status", "tcp:8001")]
    alone = PassedSockets(1, ("status",))
    assert roles(passed=alone) == [("port", "tcp:4001"), ("status", "systemd:index=0")]


def test_without_its_module_a_status_listener_is_refused(tmp_path: Path) -> None:
    for module in (RELAY, WS_FRAMES):
        shutil.copy(module, tmp_path)
    command = [sys.executable, str(tmp_path / RELAY.name), "--port=tcp:0", "--status=tcp:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    why = "--status: Python finds no transit_relay_status.py (beside transit_relay.py)"
    assert (done.returncode, done.stderr) == (1, f"transit-relay: {why}\n")


@pytest.mark.parametrize("text", ["class Broken(\n", "import missing_module\n", "", "1 / 0\n"])
def test_a_module_that_cannot_be_imported_is_refused(tmp_path: Path, text: str) -> None:
    for module in (RELAY, WS_FRAMES):
        shutil.copy(module, tmp_path)
    (tmp_path / STATUS_MODULE.name).write_text(text)
    command = [sys.executable, str(tmp_path / RELAY.name), "--port=tcp:0", "--status=tcp:0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    why = "--status: transit_relay_status.py cannot be imported: "
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"transit-relay: {why}")


# As a process.


def fetch(port: int, path: str) -> Answer:
    """Return the answer of a relay process."""
    with socket.create_connection(("127.0.0.1", port), TIMEOUT) as sock:
        sock.sendall(request(path))
        return Answer.parse(read_to_end(sock))


def status_port(text: str) -> int:
    """Return the port of the status listener, from the messages of a relay."""
    return int(re.findall(r"tcp:(\d+)[^ ]* \(status\)", text)[-1])


def test_a_relay_with_a_database(relay: Callable[..., RelayProcess], tmp_path: Path) -> None:
    process = relay("--status=tcp:0:interface=127.0.0.1", f"--usage-db={tmp_path / 'db'}")
    port = status_port(process.stderr.decode())
    one, other = process.pair()
    one.sendall(b"12345")
    assert other.recv(5) == b"12345"
    one.close()
    assert read_to_end(other) == b""
    other.close()

    def totals() -> Any:
        return json.loads(fetch(port, "/status.json").body)["alltime"]

    eventually(lambda: (totals() or {}).get("happy") == {"count": 1, "bytes": 5}, "the totals")
    numbers = json.loads(fetch(port, "/status.json").body)
    assert numbers["healthy"] and numbers["version"] == transit_relay.__version__
    assert numbers["records"]["--usage-db"]["written"] == 1
    assert 0 < numbers["open_descriptors"] < 50 and numbers["max_descriptors"] > 50


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    installation = Installation(tmp_path)
    shutil.copy(STATUS_MODULE, installation.folder)
    return installation


LOCAL = "tcp:0:interface=127.0.0.1"


def all_messages(relay: ReloadingRelay) -> str:
    """Return all that the relay has logged."""
    return relay.stderr.decode()


def test_a_reload_keeps_counters_history_and_half_a_request(installation: Installation) -> None:
    path = installation.folder / "status.sock"
    installation.configure(f"port {LOCAL}", f"status unix:{path}", f"status {LOCAL}")
    with installation.start() as relay:
        port = status_port(all_messages(relay))
        one, other = relay.meet(token="counted")
        one.send(b"12345")
        assert other.receive(5) == b"12345"
        with socket.socket(socket.AF_UNIX) as half:
            half.settimeout(TIMEOUT)
            half.connect(str(path))
            half.sendall(request("/status.json")[:-1])
            before = json.loads(fetch(port, "/status.json").body)
            relay.reload()
            half.sendall(b"\n")
            numbers = json.loads(Answer.parse(read_to_end(half)).body)
        assert numbers["since_start"]["relayed_bytes"] == 5 and numbers["pairs"] == 1
        assert numbers["since_start"]["connections"] == before["since_start"]["connections"] == 2
        assert abs(numbers["started_at"] - before["started_at"]) < 1
        assert fetch(status_port(all_messages(relay)), "/healthz").body == "ok\n"
        relay.stop_cleanly()


def test_a_reload_adds_and_removes_a_status_listener(installation: Installation) -> None:
    with installation.start() as relay:
        installation.configure(f"port {LOCAL}", f"status {LOCAL}")
        relay.reload()
        port = status_port(all_messages(relay))
        assert fetch(port, "/healthz").body == "ok\n"
        with socket.create_connection(("127.0.0.1", port), TIMEOUT) as early:
            early.sendall(request("/healthz")[:-1])
            eventually(lambda: fetch(port, "/").body.count("2 open") == 1, "the connection")
            installation.configure(f"port {LOCAL}")
            relay.reload()
            early.sendall(b"\n")
            assert Answer.parse(read_to_end(early)).status == 404
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), TIMEOUT)
        relay.reload()
        relay.stop_cleanly()


def test_a_history_outlives_reloads(room: Room) -> None:
    """Also if the predecessor had no status listener, or the program after it has none."""
    loop, filled = room.loop, filled_history(3)
    server = loop.server
    server.resume({"history": None})
    assert server.history is room.pages.history
    server.history.resume(filled.place())
    place = server.place()["history"]
    server.history = None
    server.resume({"history": place})
    assert server.place()["history"] == place and place["hour"]


def test_a_reload_without_the_module_is_refused(installation: Installation) -> None:
    with installation.start() as relay:
        (installation.folder / STATUS_MODULE.name).unlink()
        installation.configure(f"port {LOCAL}", f"status {LOCAL}")
        assert relay.refused().startswith("--status: Python finds no transit_relay_status.py")
