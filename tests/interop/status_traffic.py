"""Clients of a relay with a status listener, the counters they lead to, and what it answers."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from children import TIMEOUT, Record, Relay
from stage import BAD, IMPATIENT, OK, UPGRADE, Client, WebSocketClient, handshake

TRANSPORTS = ("tcp", "websocket")
OUTCOMES = ("happy", "lonely", "redundant", "impatient", "errory", "empty")
LIMITS = (
    *("handshake", "wait", "idle", "stall", "connections", "descriptors", "source", "allow"),
    *("quota", "memory"),
)
FAILURES = (
    *("bad_handshake", "proxy_header", "http_400", "http_405", "http_426", "http_431"),
    *("http_503", "not_forwarded", "refused_behind"),
)
SINKS = ("usage-db", "log-fd")

POLL_SECONDS = 0.1
TOLD = "203.0.113.9"  # the address of a client, in a PROXY header
NOT_ALLOWED = "198.51.100.7"
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def eventually(is_so: Callable[[], bool], what: str) -> None:
    """Poll until `is_so` returns true. Neither the relay nor Prometheus reports these states."""
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < deadline, f"not in {TIMEOUT:g} s: {what}"
        time.sleep(POLL_SECONDS)


def sample_name(name: str, **labels: str) -> str:
    """Return the name of a sample as Prometheus writes it, with sorted labels."""
    pairs = ",".join(f'{label}="{value}"' for label, value in sorted(labels.items()))
    return f"{name}{{{pairs}}}" if pairs else name


def counters() -> Counter[str]:
    """Return all counters of the relay whose labels are fixed, at 0."""
    names = [
        sample_name(f"transit_relay_{name}_total") for name in ("connections_accepted", "faults")
    ]
    for outcome in OUTCOMES:
        names += [ended_name(outcome, transport) for transport in TRANSPORTS]
    for first in TRANSPORTS:
        names += [relayed_name(first, second) for second in TRANSPORTS]
    names += map(pairs_name, (("tcp", "tcp"), ("tcp", "websocket"), ("websocket", "websocket")))
    names += map(limit_name, LIMITS)
    names += map(failure_name, FAILURES)
    for sink in SINKS:
        for what in "written", "dropped":
            names.append(sample_name(f"transit_relay_records_{what}_total", sink=sink))
    return Counter(dict.fromkeys(names, 0))


def ended_name(outcome: str, transport: str) -> str:
    name = "transit_relay_connections_ended_total"
    return sample_name(name, outcome=outcome, transport=transport)


def relayed_name(sender: str, receiver: str) -> str:
    return sample_name("transit_relay_relayed_bytes_total", **{"from": sender, "to": receiver})


def pairs_name(transports: tuple[str, str]) -> str:
    return sample_name("transit_relay_pairs_ended_total", transports="-".join(sorted(transports)))


def limit_name(limit: str) -> str:
    return sample_name("transit_relay_limit_actions_total", limit=limit)


def failure_name(kind: str) -> str:
    return sample_name("transit_relay_handshake_failures_total", kind=kind)


class Answer(NamedTuple):
    """An answer of the status listener."""

    head: bytes
    body: bytes

    @property
    def text(self) -> str:
        return self.body.decode()


class StatusRelay(Relay):
    """Our relay with a port for clients, one for WebSocket clients, one for a proxy, and a status
    listener.
    """

    def __init__(self, command: list[str], *options: str) -> None:
        endpoint, place = "tcp:0:interface=127.0.0.1", r"tcp:(\d+):interface=127\.0\.0\.1"
        super().__init__(
            [
                *command,
                *(f"--port={endpoint}", f"--port=haproxy:{endpoint}", f"--websocket={endpoint}"),
                *(f"--status={endpoint}", *options),
            ],
            rf"^Transit starting on {place}, haproxy:{place}, {place} \(websocket\), "
            rf"{place} \(status\)$",
        )
        self.tcp_port, self.proxy_port, self.websocket_port, self.status_port = self.ports

    def request(self, wire: bytes) -> Answer:
        """Send bytes to the status listener, and return its answer."""
        client = Client(self.status_port)
        client.write(wire)
        client.read_to_end()
        client.abandon()
        head, _, body = client.unchecked().partition(b"\r\n\r\n")
        return Answer(head, body)

    def get(self, path: str, accept: str = "*/*", method: str = "GET") -> Answer:
        """Request a page of the status listener."""
        fields = f"Host: localhost\r\nAccept: {accept}\r\n"
        return self.request(f"{method} {path} HTTP/1.1\r\n{fields}\r\n".encode())

    def status(self) -> dict[str, Any]:
        """Return /status.json."""
        status: dict[str, Any] = json.loads(self.get("/status.json").body)
        return status

    def all_answers(self) -> list[Answer]:
        """Return one answer of each kind that the status listener has."""
        found = [
            self.get("/metrics"),
            self.get("/metrics", OPENMETRICS),
            self.get("/status.json"),
            self.get("/healthz"),
            self.get("/"),
            self.get("/", "text/html"),
            self.get("/metrics", method="HEAD"),
        ]
        # 503: /healthz, for a minute after this machine was too busy to run the relay.
        assert all(re.match(rb"HTTP/1.1 (200|503) ", answer.head) for answer in found), found
        errors = [
            self.get("/missing"),
            self.get("/metrics", method="POST"),
            self.request(b"hello\r\n\r\n"),
            self.request(b"GET / HTTP/1.1\r\nX: " + b"x" * 100_000 + b"\r\n\r\n"),
        ]
        assert all(re.match(rb"HTTP/1.1 4\d\d ", answer.head) for answer in errors), errors
        return found + errors


class Traffic:
    """Clients of a relay. It counts what the relay must count, and what must stay secret."""

    def __init__(self, relay: StatusRelay) -> None:
        self.counted = counters()
        self.pair_sizes: list[int] = []  # bytes
        self.secrets = {TOLD, NOT_ALLOWED, "127.0.0.1"}
        self.answers: list[Answer] = []  # of the status listener, while clients are connected
        self._relay = relay

    def run(self) -> None:
        """Let all clients do what they do, one after another."""
        self._pair(("tcp", "tcp"), (100_003, 700_001))
        self._pair(("tcp", "websocket"), (20_011, 30_013))
        self._pair(("websocket", "tcp"), (1, 0))
        self._pair(("websocket", "websocket"), (5_003, 4_001))
        for transport in TRANSPORTS:
            self._lonely(transport)
            self._redundant(transport)
            self._impatient(transport)
            self._errory(transport)
            self._empty(transport)
        self._limited()
        self._failed()
        self._not_counted()

    # Outcomes.

    def _pair(self, kinds: tuple[str, str], sizes: tuple[int, int]) -> None:
        """Let two clients send so many bytes."""
        first, second = self._paired(kinds)
        for sender, receiver, size, route in (
            (first, second, sizes[0], kinds),
            (second, first, sizes[1], kinds[::-1]),
        ):
            data = secrets.token_bytes(size)
            sender.send(data)
            receiver.expect(data)
            self.counted[relayed_name(*route)] += size
        self._end_pair((first, second), kinds, sum(sizes))

    def _paired(self, kinds: tuple[str, str]) -> tuple[Client, Client]:
        """Return two clients that are partners."""
        token = self._token()
        first, second = self._waiting(kinds[0], token, self._side()), self._connect(kinds[1])
        second.send(self._handshake(token, self._side()))
        for client in first, second:
            client.expect(OK)
        return first, second

    def _end_pair(
        self, pair: tuple[Client, Client], kinds: tuple[str, str], total_bytes: int
    ) -> None:
        for client in pair:
            client.finish()
        self._recorded(Record("happy", total_bytes, True), *kinds)
        self.counted[pairs_name(kinds)] += 1
        self.pair_sizes.append(total_bytes)

    def _lonely(self, transport: str) -> None:
        self._waiting(transport, self._token()).finish()
        self._recorded(Record("lonely", 0, False), transport)

    def _redundant(self, transport: str) -> None:
        """Let a client wait twice. Its partner is matched with one of the two connections."""
        token, side = self._token(), self._side()
        older, newer = (self._waiting(transport, token, side) for _ in range(2))
        partner = self._connect("tcp")
        partner.send(self._handshake(token, self._side()))
        partner.expect(OK)
        self._recorded(Record("redundant", 0, False), transport)
        older.expect_end()
        older.finish()
        self._end_pair((newer, partner), (transport, "tcp"), 0)

    def _impatient(self, transport: str) -> None:
        client = self._waiting(transport, self._token(), self._side())
        client.send(b"early")
        client.expect(IMPATIENT)
        client.finish()
        self._recorded(Record("impatient", 0, False), transport)

    def _errory(self, transport: str) -> None:
        client = self._connect(transport)
        client.send(b"hello\n")
        client.expect(BAD)
        client.finish()
        self._recorded(Record("errory", 0, False), transport)
        self.counted[failure_name("bad_handshake")] += 1

    def _empty(self, transport: str) -> None:
        self._connect(transport).finish()
        self._recorded(Record("empty", 0, False), transport)

    # Limits, failures, and what is no client.

    def _limited(self) -> None:
        """Refuse a client of a busy source, and one that is not allowed.

        Then a client waits, and a pair runs: request the pages.
        """
        busy = self._told(TOLD, self._handshake(self._token(), self._side()))
        self._wait_for_waiting(1)
        for address, limit, reply in (
            (TOLD, "source", b"too many waiting\n"),
            (NOT_ALLOWED, "allow", b"not allowed\n"),
        ):
            client = self._told(address, self._handshake(self._token(), self._side()))
            client.expect(reply)
            client.finish()
            self._recorded(Record("lonely", 0, False), "tcp")
            self.counted[limit_name(limit)] += 1
        kinds = ("tcp", "websocket")
        pair = self._paired(kinds)
        self.answers = self._relay.all_answers()
        self._end_pair(pair, kinds, 0)
        busy.finish()
        self._recorded(Record("lonely", 0, False), "tcp")

    def _failed(self) -> None:
        """Send a bad PROXY header, and requests that are refused."""
        self._http(b"PROXY TCP4 nonsense\r\n", self._relay.proxy_port, b"")
        self.counted[failure_name("proxy_header")] += 1
        upgrade = UPGRADE.format(key="dGhlIHNhbXBsZSBub25jZQ==").encode()
        for status, request in {
            400: upgrade.replace(b"Sec-WebSocket-Key", b"X-Key"),
            405: b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n",
            426: upgrade.replace(b"Version: 13", b"Version: 12"),
            431: upgrade[:-2] + b"X: " + b"x" * 40_000 + b"\r\n\r\n",
        }.items():
            self._http(request, self._relay.websocket_port, f"HTTP/1.1 {status} ".encode())
            self.counted[failure_name(f"http_{status}")] += 1

    def _not_counted(self) -> None:
        """Make health checks. They are connections, but neither clients nor failures."""
        for port in self._relay.tcp_port, self._relay.websocket_port:
            for method in "GET", "HEAD":
                request = f"{method} / HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
                self._http(request, port, b"HTTP/1.1 200 ")

    # Helpers.

    def _token(self) -> str:
        return secrets.token_hex()

    def _side(self) -> str:
        return secrets.token_hex(8)

    def _handshake(self, token: str, side: str | None = None) -> bytes:
        line = handshake(token, side)
        self.secrets |= set(line.decode().split()[2::3])  # the token, and the side if there is one
        return line

    def _connect(self, transport: str) -> Client:
        self.counted["transit_relay_connections_accepted_total"] += 1
        if transport == "tcp":
            return Client(self._relay.tcp_port)
        client = WebSocketClient(self._relay.websocket_port)
        client.upgrade()
        assert client.is_open
        return client

    def _told(self, address: str, data: bytes) -> Client:
        """Connect as a proxy that tells the address of its client, and send the client's bytes."""
        self.counted["transit_relay_connections_accepted_total"] += 1
        client = Client(self._relay.proxy_port)
        client.write(f"PROXY TCP4 {address} 127.0.0.1 5 4003\r\n".encode() + data)
        return client

    def _http(self, request: bytes, port: int, beginning: bytes) -> None:
        """Send a request on a connection of its own. The answer must begin so, or be empty."""
        self.counted["transit_relay_connections_accepted_total"] += 1
        client = Client(port)
        client.write(request)
        client.read_to_end()
        client.abandon()
        answer = client.unchecked()
        assert answer.startswith(beginning) and bool(answer) == bool(beginning), answer

    def _waiting(self, transport: str, token: str, side: str | None = None) -> Client:
        """Connect a client, and wait until the relay has handled its handshake."""
        waiting = self._relay.status()["waiting_clients"]
        client = self._connect(transport)
        client.send(self._handshake(token, side))
        self._wait_for_waiting(waiting + 1)
        return client

    def _wait_for_waiting(self, number: int) -> None:
        eventually(
            lambda: self._relay.status()["waiting_clients"] == number, f"{number} clients wait"
        )

    def _recorded(self, record: Record, *transports: str) -> None:
        """Wait for the record of a client or a pair, and count it."""
        assert self._relay.record() == record
        for transport in transports:
            self.counted[ended_name(record.mood, transport)] += 1
        for sink in SINKS:
            self.counted[sample_name("transit_relay_records_written_total", sink=sink)] += 1
