"""Floods of a relay, each in a process of its own: `flood.py NAME PORT COUNT`.

A flood is bounded by COUNT. It prints "peak" when it has reached its size, or is done, and ends
at SIGTERM. Then it prints as JSON which records the relay must have: a list of
[mood, bytes, bytes, times], where the bytes are the least and the most.

`pairs` prints "peak" after the first tenth, too, and goes on at the first SIGTERM. A long flood
prints its progress, because the test waits for each line for a minute at most.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import select
import signal
import socket
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from bench import clients
from bystanders import end_with_parent
from helpers import handshake

from transit_relay import Limits

Found = list[tuple[str, int, int, int]]

AT_ONCE = 50  # short connections at a time
PROGRESS_CLIENTS = 500  # from one line with the progress to the next
MAX_WAITING = Limits().max_waiting_per_source
SOURCE = "198.51.100.1"  # in PROXY headers
SOURCE_CLIENTS = 15  # of each source, if there are many sources
SEGMENT_PAIRS = 10
MIXED_PAIRS = 300
STALL_BYTES = 4096  # the size of kernel buffers; with larger ones the kernel would hold gigabytes
STATUS_BURST = 200  # connections to a status listener, at once
STATUS_REQUEST = b"GET /status.json HTTP/1.1\r\nHost: relay\r\n\r\n"
STATUS_STEP_SECONDS = 1.0  # real time: the pace of slow status clients
LIMIT_SECONDS = 300  # of one wait
STEP_SECONDS = 0.01  # real time: the pace of a slow flood


def wait_at_peak() -> None:
    """Print that the flood is at its peak, and wait for SIGTERM."""
    print("peak", flush=True)
    signal.sigwait({signal.SIGTERM})


def is_ended(seconds: float) -> bool:
    """Wait for SIGTERM, at most so long. Return whether it came."""
    return signal.sigtimedwait({signal.SIGTERM}, seconds) is not None


def silent(port: int, count: int, source: str | None = None) -> Found:
    """Connections that send nothing, or a PROXY header with `source` and then nothing."""
    flood = [connect(port, source=source) for _ in range(count)]
    wait_at_peak()
    close_newest_first(flood)
    return [("empty", 0, 0, count)]


def slow(port: int, count: int) -> Found:
    """Handshakes byte by byte, all at the same time. None becomes whole."""
    line = handshake()[:-1]
    flood = [clients.connect(port) for _ in range(count)]
    for number, byte in enumerate(line):
        for sock in flood:
            with contextlib.suppress(ConnectionError):  # the relay has made room
                sock.send(bytes([byte]))
        if number == 10:
            print("peak", flush=True)
        if is_ended(STEP_SECONDS):
            break
    else:
        signal.sigwait({signal.SIGTERM})
    close_newest_first(flood)
    return [("empty", 0, 0, count)]


def bad(port: int, count: int) -> Found:
    """Bad handshakes, each over a new connection. The answer and the end are read."""
    for number in range(count // AT_ONCE):
        print_progress(number * AT_ONCE, "refused")
        flood = [clients.connect(port) for _ in range(AT_ONCE)]
        for sock in flood:
            sock.send(b"nonsense\n")
        for sock in flood:
            assert clients.receive_exactly(sock, 14) == b"bad handshake\n"
            assert sock.recv(1) == b""
            sock.close()
    wait_at_peak()
    return [("errory", 0, 0, count // AT_ONCE * AT_ONCE)]


def waiting(port: int, lines: Iterator[bytes], count: int) -> Found:
    """Clients that wait for a partner, closed newest first."""
    flood = []
    for _ in range(count):
        flood.append(clients.connect(port))
        flood[-1].send(next(lines))
    wait_at_peak()
    close_newest_first(flood)
    return [("lonely", 0, 0, count)]


def same_token(port: int, count: int) -> Found:
    """All wait under one token, and have one side."""
    return waiting(port, iter(lambda: handshake("same", "side"), b""), count)


def random_tokens(port: int, count: int) -> Found:
    """Each waits under a token of its own."""
    return waiting(port, (handshake(clients.new_token(), "side") for _ in range(count)), count)


def mixed(port: int, count: int) -> Found:
    """MIXED_PAIRS pairs at rest. Half of the other connections wait, and half send nothing."""
    made = [make_pair(port) for _ in range(MIXED_PAIRS)]
    others = [connect(port) for _ in range(count - 2 * MIXED_PAIRS)]
    waiting_ones = others[::2]
    for sock in waiting_ones:
        sock.send(handshake(clients.new_token(), "side"))
    wait_at_peak()
    close_newest_first([*(sock for pair in made for sock in pair), *others])
    silent_count = len(others) - len(waiting_ones)
    found = [("lonely", len(waiting_ones)), ("empty", silent_count), ("happy", MIXED_PAIRS)]
    return [(mood, 0, 0, times) for mood, times in found]


def bad_status_clients(port: int, count: int) -> Found:
    """Clients of a status listener: `count` slow ones, as many that never read, and a burst.

    Each of the first two kinds sends a byte per step. That fails for one that the listener has
    ended, which then comes back. Those of the burst send nothing.
    """

    def begin(request: bytes) -> socket.socket:
        sock = connect(port, STALL_BYTES)
        sock.send(request)
        return sock

    requests = [b"", STATUS_REQUEST] * count
    socks = [begin(request) for request in requests]
    burst = [connect(port) for _ in range(STATUS_BURST)]
    print("peak", flush=True)
    while not is_ended(STATUS_STEP_SECONDS):
        for number, request in enumerate(requests):
            try:
                socks[number].send(b"G")
            except ConnectionError:
                socks[number].close()
                socks[number] = begin(request)
    close_newest_first([*socks, *burst])
    return []


class Crowd:
    """Clients whose sources are in PROXY headers. Each waits under a token of its own."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._by_fd: dict[int, tuple[str, socket.socket]] = {}
        self._epoll = select.epoll()

    def __len__(self) -> int:
        return len(self._by_fd)

    def join(self, source: str) -> socket.socket:
        """Connect a client, send its header and its handshake, and return it."""
        sock = clients.connect(self._port)
        sock.send(proxy_header(source) + handshake(clients.new_token(), "side"))
        self._by_fd[sock.fileno()] = source, sock
        self._epoll.register(sock, select.EPOLLIN)
        return sock

    def take_ended(self, seconds: float = 0) -> list[tuple[str, socket.socket]]:
        """Remove the clients that the relay has ended. Return them with their sources.

        They are in the order of their ends. `seconds`: how long to wait for the first one.
        """
        ended = [self._by_fd.pop(fd) for fd, _ in self._epoll.poll(seconds)]
        for _, sock in ended:
            self._epoll.unregister(sock)
        return ended

    def read_refusals(self, left: int) -> None:
        """Read the refusals until so many clients are left."""
        while len(self) > left:
            ended = self.take_ended(LIMIT_SECONDS)
            assert ended, f"{len(self)} clients wait, not {left}"
            for _, sock in ended:
                assert clients.receive_exactly(sock, 17) == b"too many waiting\n"
                assert sock.recv(1) == b""
                sock.close()
        assert len(self) == left, f"{len(self)} clients wait, not {left}"

    def close(self) -> None:
        """Close all."""
        self._epoll.close()
        close_newest_first([sock for _, sock in self._by_fd.values()])


def one_source(port: int, count: int) -> Found:
    """Clients of one source. MAX_WAITING of them wait, and the others are refused."""
    crowd = Crowd(port)
    for number in range(count):
        print_progress(number, "clients")
        crowd.join(SOURCE)
        if number > MAX_WAITING and number % AT_ONCE == 0:
            crowd.read_refusals(MAX_WAITING)
    crowd.read_refusals(MAX_WAITING)
    wait_at_peak()
    crowd.join(SOURCE)  # the log line of its refusal has the number of those before it
    crowd.read_refusals(MAX_WAITING)
    assert not crowd.take_ended()
    crowd.close()
    return [("lonely", 0, 0, count + 1)]


class Marker:
    """A pair. A byte that passes through it shows that earlier events were handled."""

    def __init__(self, port: int, source: str | None = None) -> None:
        self._one, self._other = make_pair(port, source=source)
        self.passed_bytes = 0

    def settle(self) -> None:
        """Return when the relay has accepted all newcomers and has read what they have sent.

        It has accepted them when the first byte has passed. It reads what they have sent before
        the second byte, or in the same turn.
        """
        for _ in range(2):
            self._one.send(b"x")
            assert clients.receive_exactly(self._other, 1) == b"x"
            self.passed_bytes += 1

    def close(self) -> None:
        """Close both clients."""
        self._one.close()
        self._other.close()


class FullRelay:
    """The clients that wait in a full relay, by source, as the flood must expect them."""

    def __init__(self, port: int, sources: Sequence[str]) -> None:
        self.crowd = Crowd(port)
        self.ended = 0
        self._waiting: dict[str, deque[socket.socket]] = {source: deque() for source in sources}

    def check_ended(self) -> None:
        """Check that each ended client was the oldest one of a source with the most clients."""
        for source, sock in self.crowd.take_ended():
            assert sock.recv(1) == b""
            most = max(map(len, self._waiting.values()))
            assert len(self._waiting[source]) == most, f"{source} has fewer than {most} clients"
            assert self._waiting[source].popleft() is sock, f"{source} has an older client"
            sock.close()
            self.ended += 1

    def join(self, source: str, marker: Marker) -> None:
        """Connect a client, and check which client was ended for it."""
        sock = self.crowd.join(source)
        marker.settle()
        self.check_ended()
        self._waiting[source].append(sock)


def many_sources(port: int, count: int) -> Found:
    """Clients of many sources, one after the other. All of them wait, and the relay is soon full.

    Then it ends a client for each newcomer. The number of ended clients is printed at the end.
    """
    sources = [f"10.{n >> 8}.{n & 255}.1" for n in range(count // SOURCE_CLIENTS)]
    newcomers = [*sources * SOURCE_CLIENTS]
    random.Random(1).shuffle(newcomers)
    relay, marker = FullRelay(port, sources), Marker(port, SOURCE)
    for number, source in enumerate(newcomers):
        print_progress(number, "clients")
        relay.join(source, marker)
    assert relay.ended, "the relay has room for all"
    wait_at_peak()
    relay.check_ended()
    ended, more = relay.ended, 0
    while relay.ended == ended:  # the log line of this end has the number of those before it
        relay.join(sources[0], marker)
        more += 1
    print(relay.ended, "ended", flush=True)
    relay.crowd.close()
    marker.close()
    passed = marker.passed_bytes
    return [("lonely", 0, 0, len(newcomers) + more), ("happy", passed, passed, 1)]


def segments(port: int, count: int) -> Found:
    """One-byte segments through SEGMENT_PAIRS pairs, which are read all the time."""
    pairs = [make_pair(port) for _ in range(SEGMENT_PAIRS)]
    each = count // SEGMENT_PAIRS
    for one, other in pairs:
        one.setblocking(False)
        other.setblocking(False)
    senders = {one.fileno(): one for one, _ in pairs}
    receivers = {other.fileno(): other for _, other in pairs}
    left = dict.fromkeys(senders, each)
    missing = dict.fromkeys(receivers, each)
    epoll = select.epoll()
    for fd in senders:
        epoll.register(fd, select.EPOLLOUT)
    for fd in receivers:
        epoll.register(fd, select.EPOLLIN)
    while missing:
        ready = epoll.poll(LIMIT_SECONDS)
        assert ready, "nothing moves"
        for fd, _ in ready:
            with contextlib.suppress(BlockingIOError):
                if fd in left:
                    for _ in range(min(20, left[fd])):
                        senders[fd].send(b"x")
                        left[fd] -= 1
                    if not left[fd]:
                        del left[fd]
                        epoll.unregister(fd)
                elif fd in missing:
                    missing[fd] -= len(receivers[fd].recv(1 << 16))
                    if not missing[fd]:
                        del missing[fd]
                        epoll.unregister(fd)
    wait_at_peak()
    for one, other in pairs:
        one.close()
        other.close()
    return [("happy", each, each, SEGMENT_PAIRS)]


def stalled(port: int, count: int) -> Found:
    """Pairs whose receivers read nothing, while the senders send all that is accepted."""
    pairs = [make_pair(port, STALL_BYTES) for _ in range(count)]
    sent = upload([one for one, _ in pairs])
    wait_at_peak()
    for _, other in pairs:
        other.close()
    for one, _ in pairs:
        one.close()
    return [("happy", 0, size, 1) for size in sent]


def upload(senders: Sequence[socket.socket]) -> list[int]:
    """Send all that is accepted. Return how many bytes of each sender.

    A second without progress is real time: no event reports that nothing more is accepted.
    """
    by_fd = {sock.fileno(): sock for sock in senders}
    sent = dict.fromkeys(by_fd, 0)
    block = bytes(1 << 16)
    with contextlib.closing(select.epoll()) as epoll:
        for fd, sock in by_fd.items():
            sock.setblocking(False)
            epoll.register(fd, select.EPOLLOUT)
        while ready := epoll.poll(1):
            for fd, _ in ready:
                try:
                    sent[fd] += by_fd[fd].send(block)
                except BlockingIOError:
                    pass
                except ConnectionError:  # the relay has ended it
                    epoll.unregister(fd)
    return list(sent.values())


def proxy_header(source: str) -> bytes:
    """Return a PROXY header, version 1, with an IPv4 address."""
    return f"PROXY TCP4 {source} 127.0.0.1 1 1\r\n".encode()


def connect(port: int, buffer_bytes: int | None = None, source: str | None = None) -> socket.socket:
    """Return a connection. `source`: the address in its PROXY header; None: it sends none."""
    sock = clients.connect(port, buffer_bytes)
    if source is not None:
        sock.send(proxy_header(source))
    return sock


def make_pair(
    port: int, buffer_bytes: int | None = None, source: str | None = None
) -> tuple[socket.socket, socket.socket]:
    """Return two raw clients that have met."""
    token = clients.new_token()
    one, other = (connect(port, buffer_bytes, source) for _ in range(2))
    clients.send_handshake(one, False, token, "one")
    clients.send_handshake(other, False, token, "other")
    clients.expect_ok(one, False)
    clients.expect_ok(other, False)
    return one, other


def pairs(port: int, count: int) -> Found:
    """Short pairs, one after the other: each passes a byte. "peak" after the first tenth."""
    for number in range(count // AT_ONCE):
        if number == count // AT_ONCE // 10:
            wait_at_peak()
        print_progress(number * AT_ONCE, "pairs")
        made = []
        for _ in range(AT_ONCE):
            token = clients.new_token()
            made.append((clients.connect(port), clients.connect(port)))
            for sock, side in zip(made[-1], ("one", "other")):
                clients.send_handshake(sock, False, token, side)
        for one, _ in made:
            clients.expect_ok(one, False)
            one.send(b"x")
            one.close()
        for _, other in made:
            assert clients.receive_exactly(other, 4) == b"ok\nx"
            assert other.recv(1) == b""
            other.close()
    wait_at_peak()
    return [("happy", 1, 1, count // AT_ONCE * AT_ONCE)]


def close_newest_first(flood: Sequence[socket.socket]) -> None:
    """Close all, the newest one first."""
    for sock in reversed(flood):
        sock.close()


def print_progress(number: int, what: str) -> None:
    """Print a number from time to time."""
    if number % PROGRESS_CLIENTS == 0:
        print(number, what, flush=True)


FLOODS: dict[str, Callable[[int, int], Found]] = {
    "silent_behind_proxy": partial(silent, source=SOURCE),
    **{
        flood.__name__: flood
        for flood in (
            *(silent, slow, bad, same_token, random_tokens, mixed, one_source, many_sources),
            *(segments, stalled, pairs, bad_status_clients),
        )
    },
}


def main(name: str, port: str, count: str) -> None:
    """Run a flood."""
    end_with_parent()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(FLOODS[name](int(port), int(count))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
