# SPDX-License-Identifier: MIT
"""What a status listener of transit-relay (`--status`) answers to HTTP requests.

    /metrics       for Prometheus: the text format 0.0.4, or OpenMetrics 1.0 on request
    /healthz       200, or 503 with the reasons
    /status.json   counters, gauges, and samples of the last hour and day
    /              status.html for a browser; a text for other clients, or if that file is missing

StatusPages takes a Status of the Server for each page that it sends. The functions below it format
the Status. No text has an address, a token or a side.

transit_relay imports this module if there is a status listener. This module needs names of
transit_relay for type checking only.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import pkgutil
import re
import resource
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import ws_frames

if TYPE_CHECKING:
    from transit_relay import Counters, Histogram, Limit, Phase, Server, SinkStatus, Snapshot

PAGE_FILE = "status.html"  # beside this file
METHODS = ("GET", "HEAD")
RATE_SECONDS = (10, 60, 300, 1800, 3600)  # the periods of the rates
OPENMETRICS = "application/openmetrics-text"
WEIGHT = re.compile(r"q=([01](?:\.[0-9]{0,3})?)")
STATM = "/proc/self/statm"  # proc(5)
PYTHON_VERSION = "{}.{}.{}".format(*sys.version_info)

LISTING_MAX_CONNECTIONS = 100  # with more of them, listing all descriptors takes too long
CLOCK_STEP_SECONDS = 1  # a larger change of the wall clock changes the time of the start

Number = Union[int, float]
Labels = Mapping[str, str]


# The status of a Server ----------------------------------------------------------------------


class Sample(NamedTuple):
    """What happened in an interval, and how things stood at its end."""

    relayed_bytes: int
    pairs_ended: int
    pairs: int
    waiting_clients: int
    seconds: float  # its length, which differs from the ordinary one after a reload


class History:
    """Samples of the last hour and of the last day, the oldest first.

    A reload carries it, as it does the classes of transit_relay that derive from Carried.
    """

    HOUR_SAMPLE_SECONDS = 10
    HOUR_SAMPLES = 3600 // HOUR_SAMPLE_SECONDS
    DAY_SAMPLE_SECONDS = 300
    DAY_SAMPLES = 86400 // DAY_SAMPLE_SECONDS

    CARRIED = (
        *("day", "day_until", "hour", "hour_until", "started_at"),
        *("_gathered", "_last_sample_at", "_pairs_ended", "_relayed_bytes"),
    )

    def __init__(self) -> None:
        self.started_at = 0.0  # of the relay, as it is shown: seconds since the epoch
        self.hour: list[Sample] = []  # one for each HOUR_SAMPLE_SECONDS
        self.day: list[Sample] = []  # one for each DAY_SAMPLE_SECONDS
        self.hour_until = self.day_until = 0.0  # the time of the last one, seconds since the epoch
        self._gathered = 0  # samples since the last one of the day
        self._relayed_bytes = self._pairs_ended = 0  # since the start, at the last sample
        self._last_sample_at: float | None = None  # monotonic seconds

    def note(self, now: Snapshot, monotonic_now: float) -> None:
        """Add a sample of what happened since the last call. The first call adds none.

        A call soon after the last one has no effect: after a reload it comes at once. A gap (a
        suspension, or a time without a status listener) gets samples of 0, and what happened in it
        is left out.
        """
        period = self.HOUR_SAMPLE_SECONDS
        last = self._last_sample_at
        if last is not None and monotonic_now - last < period / 2:
            return
        self._last_sample_at = monotonic_now
        size, ended = now.relayed_bytes - self._relayed_bytes, now.pairs_ended - self._pairs_ended
        self._relayed_bytes, self._pairs_ended = now.relayed_bytes, now.pairs_ended
        if last is None:
            return
        count = round((monotonic_now - last) / period)
        if count > 1:
            for _ in range(min(count, self.DAY_SAMPLES * self.DAY_SAMPLE_SECONDS // period)):
                self._add(Sample(0, 0, 0, 0, period), now.taken_at)
        else:
            seconds = monotonic_now - last
            sample = Sample(size, ended, now.pairs, now.waiting_clients, seconds)
            self._add(sample, now.taken_at)

    def _add(self, sample: Sample, until: float) -> None:
        self.hour.append(sample)
        self.hour_until = until
        del self.hour[: -self.HOUR_SAMPLES]
        self._gathered += 1
        if self._gathered * self.HOUR_SAMPLE_SECONDS >= self.DAY_SAMPLE_SECONDS:
            gathered = self.hour[-self._gathered :]
            summed = ("relayed_bytes", "pairs_ended", "seconds")
            sums = {name: sum(getattr(one, name) for one in gathered) for name in summed}
            self.day.append(sample._replace(**sums))
            self.day_until = until
            del self.day[: -self.DAY_SAMPLES]
            self._gathered = 0

    def place(self) -> dict[str, object]:
        """Return the state as plain values, for a reload."""
        place = {name: getattr(self, name) for name in self.CARRIED}
        for name in ("day", "hour"):
            place[name] = tuple(tuple(sample) for sample in place[name])
        return place

    def resume(self, place: Mapping[str, Any]) -> None:
        """Go on with the state that `place` returned. Leave out what is unknown."""
        for name in self.CARRIED:
            if name in place:
                setattr(self, name, place[name])
        self.hour, self.day = ([Sample(*row) for row in rows] for rows in (self.hour, self.day))


class Status(NamedTuple):
    """The relay at one moment."""

    version: str
    now: Snapshot
    counters: Counters
    history: History
    max_connections: int  # 0: no maximum
    limits: Mapping[Limit, int]  # how often each has ended, refused or slowed a client
    sinks: Mapping[str, SinkStatus]
    connections_by_phase: Mapping[Phase, int]
    queued_bytes: int
    descriptors: int  # open ones
    max_descriptors: int
    pipes: int  # for splice, lent or idle
    quota: tuple[str, int, int] | None  # the month, the bytes relayed in it, the quota


# Requests and answers ------------------------------------------------------------------------


class Page(NamedTuple):
    """The content of an answer."""

    text: str
    media_type: str = "text/plain"
    http_status: int = 200
    policy: str = ws_frames.NO_CONTENT_POLICY  # the field Content-Security-Policy


class StatusPages:
    """Answers the requests of status clients."""

    def __init__(
        self,
        server: Server,
        version: str,
        max_descriptors: int,
        open_descriptors: Callable[[], Sequence[int]],
    ) -> None:
        """`max_descriptors`: the limit. `open_descriptors` returns the numbers of open ones."""
        self._server = server
        self._version = version
        self._max_descriptors = max_descriptors
        self._open_descriptors = open_descriptors
        self._other_descriptors = 0  # open ones that are neither of a connection nor of a pipe
        self.history = History()
        self._pages: dict[str, Callable[[Status, ws_frames.Request], Page]] = {
            "/": self._front_page,
            "/healthz": lambda status, request: health_page(status),
            "/metrics": metrics_page,
            "/status.json": lambda status, request: json_page(status),
        }

    def sample(self) -> None:
        """Take a sample for the history. To be called every History.HOUR_SAMPLE_SECONDS."""
        self.history.note(self._server.snapshot(), self._server.clock.monotonic())

    def take_status(self) -> Status:
        """Return the status at this moment."""
        server, now = self._server, self._server.snapshot()
        own = len(server.connections) + 2 * server.pipes.open_pipes
        if len(server.connections) < LISTING_MAX_CONNECTIONS or not self._other_descriptors:
            # One is that of the listing itself.
            self._other_descriptors = len(self._open_descriptors()) - own - 1
        # The computed time of the start varies by microseconds. Prometheus would report a restart.
        if abs(now.started_at - self.history.started_at) > CLOCK_STEP_SECONDS:
            self.history.started_at = now.started_at
        return Status(
            version=self._version,
            now=now._replace(started_at=self.history.started_at),
            counters=server.rendezvous.counters,
            history=self.history,
            max_connections=server.limits.max_connections,
            limits=server.limits.counts(),
            sinks=server.recorder.status(),
            connections_by_phase=server.connections_by_phase,
            queued_bytes=server.memory.queued_bytes,
            descriptors=own + self._other_descriptors,
            max_descriptors=self._max_descriptors,
            pipes=server.pipes.open_pipes,
            quota=None if server.quota is None else server.quota.status(),
        )

    def answer(self, request: ws_frames.Request) -> bytes:
        """Return the answer to a request."""
        make = self._pages.get(path_of(request.target))
        if make is None:
            return ws_frames.not_found(request)
        fields: Sequence[str] = ws_frames.STATUS_FIELDS
        if request.method not in METHODS:
            allowed = ", ".join(METHODS)
            page = Page(f"this takes {allowed}\n", http_status=405)
            fields = (*fields, f"Allow: {allowed}")
        else:
            page = make(self.take_status(), request)
        return ws_frames.http_answer(
            page.http_status,
            page.text,
            *fields,
            page.policy,
            method=request.method,
            media_type=page.media_type,
        )

    def _front_page(self, status: Status, request: ws_frames.Request) -> Page:
        if HTML is None or not quality(request, "text/html"):
            return Page(summary(status))
        return Page(HTML, "text/html", policy=HTML_POLICY)


def read_page_file() -> str | None:
    """Return status.html, from a folder or from a zip archive; None if it cannot be read."""
    try:
        data = pkgutil.get_data(__name__, PAGE_FILE)
        return None if data is None else data.decode()
    except (OSError, UnicodeDecodeError):
        return None


def content_policy(html: str) -> str:
    """Return the Content-Security-Policy of a page, as a field.

    It permits the page's own style and script, and requests to the server of the page.
    """
    sources = []
    for element in ("style", "script"):
        hashes = [
            base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            for content in re.findall(f"<{element}>(.*?)</{element}>", html, re.DOTALL)
        ]
        sources.append(f"{element}-src " + " ".join(f"'sha256-{one}'" for one in hashes))
    return "Content-Security-Policy: " + "; ".join(
        (
            *("default-src 'none'", *sources, "connect-src 'self'"),
            *("base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"),
        )
    )


HTML = read_page_file()  # now: after the change of the user it may be unreadable
HTML_POLICY = content_policy(HTML or "")


def path_of(target: str) -> str:
    """Return the path of a request target, also of a whole URL: RFC 7230, 5.3."""
    target = re.sub("^(?i:https?)://[^/?]*", "", target).partition("?")[0]
    return target or "/"


def quality(request: ws_frames.Request, media_type: str) -> float:
    """Return how much the client wants a media type that it names, from 0 to 1: RFC 7231, 5.3."""
    found = 0.0
    for element in request.fields.tokens("accept"):
        name, *parameters = (part.strip(" \t") for part in element.split(";"))
        if name == media_type:
            weights = [match[1] for one in parameters if (match := WEIGHT.fullmatch(one))]
            found = max(found, float(weights[0]) if weights else 1.0)
    return found


# Health, summary, JSON -----------------------------------------------------------------------


def health_page(status: Status) -> Page:
    """Return whether the relay is healthy, for a load balancer or a monitor."""
    if status.now.problems:
        return Page("".join(f"{problem}\n" for problem in status.now.problems), http_status=503)
    return Page("ok\n")


def json_page(status: Status) -> Page:
    """Return the numbers as JSON. docs/operating.md describes the names."""
    return Page(json.dumps(as_json(status)) + "\n", "application/json")


def as_json(status: Status) -> dict[str, object]:
    """Return the numbers as values of JSON."""
    now, counters, history = status.now, status.counters, status.history
    ended: dict[str, dict[str, int]] = {}
    for (mood, transport), count in counters.ended.items():
        ended.setdefault(mood, {})[transport] = count
    relayed: dict[str, dict[str, int]] = {}
    for flow, size in counters.relayed.items():
        source, target = flow.split("-")
        relayed.setdefault(source, {})[target] = size
    totals = all_totals(status)
    return {
        "version": status.version,
        "python": PYTHON_VERSION,
        "healthy": not status.now.problems,
        "problems": list(status.now.problems),
        "started_at": now.started_at,
        "taken_at": now.taken_at,
        "uptime_seconds": now.taken_at - now.started_at,
        "drain_seconds_left": now.drain_seconds_left,
        "pairs": now.pairs,
        "waiting_clients": now.waiting_clients,
        "waiting_tokens": now.waiting_tokens,
        "connections": now.connections,
        "max_connections": status.max_connections,
        "connections_by_phase": {
            phase.value: n for phase, n in status.connections_by_phase.items()
        },
        "queued_bytes": status.queued_bytes,
        "open_descriptors": status.descriptors,
        "max_descriptors": status.max_descriptors,
        "pipes": status.pipes,
        "incomplete_bytes": now.incomplete_bytes,
        "since_start": {
            "connections": counters.connections,
            "relayed_bytes": now.relayed_bytes,
            "relayed_bytes_by_transport": relayed,
            "pairs_ended": now.pairs_ended,
            "pairs_ended_by_transport": dict(counters.pairs),
            "outcomes": ended,
            "limits": {limit.value: count for limit, count in status.limits.items()},
            "handshake_failures": dict(counters.failures),
            "faults": now.faults,
        },
        "rates": {str(seconds): rates(history, seconds) for seconds in RATE_SECONDS},
        "records": {
            name: {
                "written": sink.written,
                "dropped": sink.dropped,
                "waiting": sink.waiting,
                "failing": sink.is_failing,
            }
            for name, sink in status.sinks.items()
        },
        "quota": status.quota and dict(zip(("month", "used_bytes", "max_bytes"), status.quota)),
        "alltime": totals
        and {mood: {"count": count, "bytes": size} for mood, (count, size) in totals.items()},
        "history": {
            "hour": columns(history.hour, history.HOUR_SAMPLE_SECONDS, history.hour_until),
            "day": columns(history.day, history.DAY_SAMPLE_SECONDS, history.day_until),
        },
    }


def all_totals(status: Status) -> Mapping[str, tuple[int, int]] | None:
    """Return how many records the database has, and their bytes, by mood; None if unknown."""
    return next((sink.totals for sink in status.sinks.values() if sink.totals is not None), None)


def rates(history: History, seconds: int) -> dict[str, float]:
    """Return bytes and pairs per second in the last `seconds`, or since the first sample."""
    samples = history.hour[-(seconds // history.HOUR_SAMPLE_SECONDS) :]
    covered_seconds = sum(sample.seconds for sample in samples) or 1
    return {
        "bytes_per_second": sum(sample.relayed_bytes for sample in samples) / covered_seconds,
        "pairs_per_second": sum(sample.pairs_ended for sample in samples) / covered_seconds,
    }


def columns(samples: Sequence[Sample], seconds: int, until: float) -> dict[str, object]:
    """Return samples by field. `seconds`: of one sample. `until`: the end of the last one."""
    names = ("relayed_bytes", "pairs_ended", "pairs", "waiting_clients")
    fields = {name: [getattr(sample, name) for sample in samples] for name in names}
    return {"seconds": seconds, "until": until, **fields}


def summary(status: Status) -> str:
    """Return a text of about twenty lines, for a person with curl."""
    now, counters = status.now, status.counters
    outcomes: dict[str, int] = {}
    for (mood, _), count in counters.ended.items():
        outcomes[mood] = outcomes.get(mood, 0) + count
    limits = [f"{limit.value} {count:,}" for limit, count in status.limits.items() if count]
    failures = [f"{name} {count:,}" for name, count in counters.failures.items() if count]
    recent = ", ".join(
        f"{rates(status.history, seconds)['bytes_per_second'] / 1e6:,.3f} ({name})"
        for seconds, name in zip(RATE_SECONDS, ("10 s", "1 min", "5 min", "30 min", "1 h"))
    )
    rows = {
        "relay": f"transit-relay {status.version}, Python {PYTHON_VERSION}",
        "health": ", ".join(status.now.problems) or "ok",
        "uptime": f"{now.taken_at - now.started_at:,.0f} s",
        "pairs": f"{now.pairs:,}",
        "waiting": f"{now.waiting_clients:,} clients, {now.waiting_tokens:,} tokens",
        "connections": ", ".join(
            f"{n:,} {phase.value}" for phase, n in status.connections_by_phase.items()
        ),
        "MB/s": recent,
        "relayed": f"{now.relayed_bytes:,} bytes since the start",
        "ended pairs": f"{now.pairs_ended:,} since the start",
        "ended clients": ", ".join(f"{count:,} {mood}" for mood, count in outcomes.items()),
        "limits": ", ".join(limits) or "none reached",
        "failures": ", ".join(failures) or "none",
        "faults": f"{now.faults:,}",
        "queued": f"{status.queued_bytes:,} bytes",
        "descriptors": f"{status.descriptors:,} of {status.max_descriptors:,}",
    }
    if now.drain_seconds_left:
        rows["draining"] = f"at most {now.drain_seconds_left:.0f} s more"
    for name, sink in status.sinks.items():
        numbers = f"{sink.written:,} written, {sink.waiting:,} waiting, {sink.dropped:,} dropped"
        rows[name] = f"{numbers}{', failing' if sink.is_failing else ''}"
    if status.quota is not None:
        month, used, most = status.quota
        rows["quota"] = f"{used:,} of {most:,} bytes in {month}"
    return "".join(f"{name + ':':<15} {value}\n" for name, value in rows.items())


# Metrics -------------------------------------------------------------------------------------
# https://prometheus.io/docs/instrumenting/exposition_formats/ and the OpenMetrics specification.


class Exposition:
    """Collects the lines of the metrics."""

    def __init__(self, is_openmetrics: bool) -> None:
        self._is_openmetrics = is_openmetrics
        self._lines: list[str] = []

    def gauge(self, name: str, text: str, *samples: tuple[Labels, Number]) -> None:
        """Add a value that can go up and down. `text`: its description."""
        self._describe(name, "gauge", text)
        for labels, value in samples:
            self._sample(name, labels, value)

    def counter(self, name: str, text: str, *samples: tuple[Labels, Number]) -> None:
        """Add a value that grows. `name` is without `_total`."""
        self._describe(name if self._is_openmetrics else f"{name}_total", "counter", text)
        for labels, value in samples:
            self._sample(f"{name}_total", labels, value)

    def histogram(self, name: str, text: str, histogram: Histogram) -> None:
        """Add the distribution of values."""
        self._describe(name, "histogram", text)
        below = 0
        for bound, count in zip((*histogram.bounds, float("inf")), histogram.counts):
            below += count
            limit = "+Inf" if bound == float("inf") else str(float(bound))
            self._sample(f"{name}_bucket", {"le": limit}, below)
        self._sample(f"{name}_sum", {}, histogram.total)
        self._sample(f"{name}_count", {}, below)

    def text(self) -> str:
        """Return all lines."""
        end = ["# EOF"] if self._is_openmetrics else []
        return "\n".join((*self._lines, *end, ""))

    def _describe(self, name: str, kind: str, text: str) -> None:
        self._lines += (f"# HELP {name} {text}", f"# TYPE {name} {kind}")

    def _sample(self, name: str, labels: Labels, value: Number) -> None:
        # No label has a character that must be escaped.
        inner = ",".join(f'{label}="{content}"' for label, content in labels.items())
        self._lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")


def metrics_page(status: Status, request: ws_frames.Request) -> Page:
    """Return the metrics in the format that the client asks for."""
    is_openmetrics = quality(request, OPENMETRICS) > quality(request, "text/plain")
    exposition = Exposition(is_openmetrics)
    add_process(exposition, status)
    add_counters(exposition, status)
    add_gauges(exposition, status)
    add_histograms(exposition, status)
    media_type = f"{OPENMETRICS}; version=1.0.0" if is_openmetrics else "text/plain; version=0.0.4"
    return Page(exposition.text(), media_type)


def add_process(to: Exposition, status: Status) -> None:
    """Add what Prometheus expects of any process, and the version."""
    build = {"version": status.version, "python": PYTHON_VERSION}
    to.gauge("transit_relay_build_info", "The version of the relay and of Python.", (build, 1))
    text = "Start, in seconds since the epoch."
    to.gauge("process_start_time_seconds", text, ({}, status.now.started_at))
    to.gauge("process_open_fds", "Open file descriptors.", ({}, status.descriptors))
    to.gauge("process_max_fds", "The limit of file descriptors.", ({}, status.max_descriptors))
    memory = resident_bytes()
    if memory is not None:
        to.gauge("process_resident_memory_bytes", "Resident memory.", ({}, memory))
    times = os.times()
    to.counter("process_cpu_seconds", "User and system time.", ({}, times.user + times.system))


def resident_bytes() -> int | None:
    """Return the resident memory of this process; None if the system does not report it."""
    try:
        with open(STATM, "rb") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return None


def add_counters(to: Exposition, status: Status) -> None:
    """Add what was counted since the start."""
    counters = status.counters
    to.counter(
        "transit_relay_connections_accepted",
        "Accepted connections of clients, without those of status clients.",
        ({}, counters.connections),
    )
    to.counter(
        "transit_relay_connections_ended",
        "Ended clients that have a record; an ended pair counts as two happy ones.",
        *(
            ({"outcome": mood, "transport": transport}, count)
            for (mood, transport), count in counters.ended.items()
        ),
    )
    to.counter(
        "transit_relay_pairs_ended",
        "Ended pairs.",
        *(({"transports": transports}, count) for transports, count in counters.pairs.items()),
    )
    to.counter(
        "transit_relay_relayed_bytes",
        "Bytes relayed between clients, without encodings.",
        *(
            (dict(zip(("from", "to"), flow.split("-"))), size)
            for flow, size in counters.relayed.items()
        ),
    )
    to.counter(
        "transit_relay_limit_actions",
        "How often a limit ended, refused or slowed a client.",
        *(({"limit": limit.name.lower()}, count) for limit, count in status.limits.items()),
    )
    to.counter(
        "transit_relay_handshake_failures",
        "Clients that did not come to wait for a partner, by what was wrong.",
        *(({"kind": kind}, count) for kind, count in counters.failures.items()),
    )
    to.counter(
        "transit_relay_faults",
        "Contained exceptions, and connections that the selector refused.",
        ({}, status.now.faults),
    )
    written = by_sink(status, lambda sink: sink.written)
    to.counter("transit_relay_records_written", "Usage records written.", *written)
    dropped = by_sink(status, lambda sink: sink.dropped)
    text = "Usage records dropped: too many waited, or an error has ended the writing."
    to.counter("transit_relay_records_dropped", text, *dropped)


def by_sink(status: Status, value: Callable[[SinkStatus], int]) -> Iterator[tuple[Labels, Number]]:
    """Yield a value of each sink, with its label."""
    for name, sink in status.sinks.items():
        yield {"sink": name.lstrip("-")}, value(sink)


def add_gauges(to: Exposition, status: Status) -> None:
    """Add how things stand."""
    now = status.now
    for name, text, value in (
        ("healthy", "Whether /healthz answers 200.", int(not status.now.problems)),
        ("waiting_clients", "Clients that wait for a partner.", now.waiting_clients),
        ("waiting_tokens", "Tokens under which clients wait.", now.waiting_tokens),
        ("pairs", "Pairs without a record yet: running, or with last bytes to send.", now.pairs),
        ("queued_bytes", "Bytes queued for slow receivers.", status.queued_bytes),
        ("pipes", "Kernel pipes for splice, lent or idle.", status.pipes),
    ):
        to.gauge(f"transit_relay_{name}", text, ({}, value))
    to.gauge(
        "transit_relay_connections",
        "Open connections, those of status clients included.",
        *(({"phase": phase.value}, count) for phase, count in status.connections_by_phase.items()),
    )
    if status.max_connections:
        text = "The maximum of open connections."
        to.gauge("transit_relay_max_connections", text, ({}, status.max_connections))
    waiting = by_sink(status, lambda sink: sink.waiting)
    to.gauge("transit_relay_records_waiting", "Usage records not yet written.", *waiting)
    failing = by_sink(status, lambda sink: int(sink.is_failing))
    text = "Whether the last write failed, or an error has ended the writing."
    to.gauge("transit_relay_records_failing", text, *failing)
    if status.quota is not None:
        _, used, most = status.quota
        to.gauge("transit_relay_quota_used_bytes", "Relayed in this month.", ({}, used))
        to.gauge("transit_relay_quota_bytes", "The monthly quota.", ({}, most))


def add_histograms(to: Exposition, status: Status) -> None:
    """Add the distributions. Those of pairs count ended ones."""
    counters = status.counters
    for name, text, histogram in (
        (
            "partner_wait_seconds",
            "Time between the accepts of the two clients of a pair.",
            counters.waits,
        ),
        (
            "pair_duration_seconds",
            "Time from the later accept to the end of a pair.",
            counters.durations,
        ),
        ("pair_size_bytes", "Bytes of a pair.", counters.sizes),
        ("pair_rate_bytes_per_second", "Mean rate of a pair.", counters.rates),
        ("turn_seconds", "Duration of a turn of the event loop, without its wait.", counters.turns),
    ):
        to.histogram(f"transit_relay_{name}", text, histogram)
