"""Floods of a relay, each in a process of its own: `flood.py NAME PORT COUNT`.

A flood is bounded by COUNT. It prints "peak" when it has reached its size, or is done, and ends
at SIGTERM. Then it prints as JSON which records the relay must have: a list of
[mood, bytes, bytes, times], where the bytes are the least and the most.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence

from bench import clients
from helpers import handshake

Found = list[tuple[str, int, int, int]]

AT_ONCE = 50  # short connections at a time
SEGMENT_PAIRS = 10
STALL_BYTES = 4096  # of kernel buffers, or the kernel holds gigabytes
LIMIT_SECONDS = 300  # of one wait
STEP_SECONDS = 0.01  # real time: the pace of a slow flood


def wait_for_end() -> None:
    """Print that the flood is at its peak, and wait for SIGTERM."""
    print("peak", flush=True)
    signal.sigwait({signal.SIGTERM})


def is_ended(seconds: float) -> bool:
    """Wait for SIGTERM, at most so long. Return whether it came."""
    return signal.sigtimedwait({signal.SIGTERM}, seconds) is not None


def silent(port: int, count: int) -> Found:
    """Connections that send nothing."""
    flood = [clients.connect(port) for _ in range(count)]
    wait_for_end()
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
        if number % 100 == 0:
            print(number * AT_ONCE, "refused", flush=True)
        flood = [clients.connect(port) for _ in range(AT_ONCE)]
        for sock in flood:
            sock.send(b"nonsense\n")
        for sock in flood:
            assert clients.receive_exactly(sock, 14) == b"bad handshake\n"
            assert sock.recv(1) == b""
            sock.close()
    wait_for_end()
    return [("errory", 0, 0, count // AT_ONCE * AT_ONCE)]


def waiting(port: int, lines: Iterator[bytes], count: int) -> Found:
    """Clients that wait for a partner, closed newest first."""
    flood = []
    for _ in range(count):
        flood.append(clients.connect(port))
        flood[-1].send(next(lines))
    wait_for_end()
    close_newest_first(flood)
    return [("lonely", 0, 0, count)]


def same_token(port: int, count: int) -> Found:
    """All wait under one token, and have one side."""
    return waiting(port, iter(lambda: handshake("same", "side"), b""), count)


def random_tokens(port: int, count: int) -> Found:
    """Each waits under a token of its own."""
    return waiting(port, (handshake(clients.new_token(), "side") for _ in range(count)), count)


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
    wait_for_end()
    for one, other in pairs:
        one.close()
        other.close()
    return [("happy", each, each, SEGMENT_PAIRS)]


def stalled(port: int, count: int) -> Found:
    """Pairs whose receivers read nothing, while the senders send all that is accepted."""
    pairs = [make_pair(port, STALL_BYTES) for _ in range(count)]
    sent = upload([one for one, _ in pairs])
    wait_for_end()
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
    """Return a PROXY header, version 1, that tells an IPv4 address."""
    return f"PROXY TCP4 {source} 127.0.0.1 1 1\r\n".encode()


def make_pair(port: int, buffer_bytes: int | None = None) -> tuple[socket.socket, socket.socket]:
    """Return two raw clients that have met."""
    token = clients.new_token()
    one, other = (clients.connect(port, buffer_bytes) for _ in range(2))
    clients.send_handshake(one, False, token, "one")
    clients.send_handshake(other, False, token, "other")
    clients.expect_ok(one, False)
    clients.expect_ok(other, False)
    return one, other


def pairs(port: int, count: int) -> Found:
    """Short pairs, one after the other: each passes a byte. "peak" after the first tenth."""
    for number in range(count // AT_ONCE):
        if number == count // AT_ONCE // 10:
            wait_for_end()
        if number % 100 == 0:
            print(number * AT_ONCE, "pairs", flush=True)
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
    wait_for_end()
    return [("happy", 1, 1, count // AT_ONCE * AT_ONCE)]


def close_newest_first(flood: list[socket.socket]) -> None:
    """Close all."""
    while flood:
        flood.pop().close()


FLOODS: dict[str, Callable[[int, int], Found]] = {
    flood.__name__: flood
    for flood in (silent, slow, bad, same_token, random_tokens, segments, stalled, pairs)
}


def main(name: str, port: str, count: str) -> None:
    """Run a flood."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    print(json.dumps(FLOODS[name](int(port), int(count))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
