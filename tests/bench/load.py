"""The load generator: processes that send, receive and count, with as little CPU as possible.

The relay is measured, so the generator should be cheaper than the relay. sendfile(2) sends bulk
from a file in memory, and recv(2) with MSG_TRUNC discards most of it: few bytes are copied. The
file consists of pages of 4 KiB, as data from a network often does. Data from send(2) would have
larger pieces on the loopback, and the number of pieces determines the cost of splice(2).

The content is known. In one flow of each transfer the first and the last bytes are received for
real, and their SHA-256 is compared. In all flows the number of bytes must be exact. When the time
is up, the sender writes this number to shared memory *before* it sends the last bytes, so a
receiver that has all bytes finds the number. The end of the stream is sent after the measurement:
ending thousands of pairs is another kind of work.

A Worker is one process. It runs one function and exchanges messages with us over a pipe.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import mmap
import multiprocessing
import os
import select
import signal
import socket
import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import clients
from clients import LIMIT_SECONDS, Pair

CONTENT_BYTES = 8 << 20  # random, and sent repeatedly
HEAD_BYTES = 8 << 20  # hashed at the beginning of a checked flow
# Sent on a checked flow after the number is written, and hashed. One recv may discard some of it: a
# recv that began before the number was written.
TAIL_BYTES = 4 << 20
SEND_BYTES = 1 << 20  # the limit of one sendfile, so that other flows need not wait long
RECEIVE_BYTES = 2 << 20  # the limit of one recv that discards
READ_BYTES = 256 << 10  # the limit of one recv for real
MESSAGE_BYTES = 16_412  # one record of wormhole-william, the client in Go
MESSAGES = 512  # together about CONTENT_BYTES


class LoadError(Exception):
    """The received bytes are wrong, or nothing arrives any more."""


# ---------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """The message of a worker whose function has failed."""

    reason: str


class Worker:
    """A process that runs `function(channel, *arguments)`. It is forked, so it has our sockets."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._channel, workers_end = context.Pipe()
        self._process = context.Process(
            target=_run_function, args=(workers_end, function, arguments), daemon=True
        )
        self._process.start()
        workers_end.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the process if it is still running."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._channel.close()

    def run_in_background(self) -> None:
        """Let the process run only while no other process needs its core."""
        assert self._process.pid
        os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))

    def send(self, message: Any) -> None:
        """Send a message to the process."""
        self._channel.send(message)

    def receive(self, limit_seconds: float = LIMIT_SECONDS) -> Any:
        """Return the next message of the process.

        Raise LoadError at the time limit, or if the function of the process has failed.
        """
        message = receive(self._channel, limit_seconds)
        if isinstance(message, Failure):
            raise LoadError(message.reason)
        return message


def _run_function(
    channel: Connection, function: Callable[..., None], arguments: Sequence[Any]
) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # our parent process ends us
    gc.disable()  # a collection during a round trip would be measured
    try:
        function(channel, *arguments)
    except (LoadError, OSError) as error:
        channel.send(Failure(f"{function.__name__}: {error}"))


def receive(channel: Connection, limit_seconds: float = LIMIT_SECONDS) -> Any:
    """Return the next message. Raise LoadError at the time limit."""
    if not channel.poll(limit_seconds):
        raise LoadError(f"no message in {limit_seconds:g} s")
    try:
        return channel.recv()
    except EOFError:
        raise LoadError("a process of the load generator ended too early") from None


# ---------------------------------------------------------------------------------------------
# Sources
# ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Bytes that are sent repeatedly, and their encoding."""

    content: bytes  # the payload
    wire_fd: int  # a file in memory with the encoded content
    wire_bytes: int  # the size of the file
    wire_unit_bytes: int  # a sender ends at a multiple of this size
    content_unit_bytes: int  # the payload in one unit


@functools.cache
def plain_source() -> Source:
    """Return the source of a TCP client."""
    content = os.urandom(CONTENT_BYTES)
    return Source(content, _file_in_memory(content), len(content), 1, 1)


@functools.cache
def websocket_source() -> Source:
    """Return the source of a WebSocket client: one binary message for each record."""
    content = os.urandom(MESSAGES * MESSAGE_BYTES)
    frames = [
        clients.masked_frame(clients.BINARY, content[start : start + MESSAGE_BYTES])
        for start in range(0, len(content), MESSAGE_BYTES)
    ]
    wire = b"".join(frames)
    return Source(content, _file_in_memory(wire), len(wire), len(frames[0]), MESSAGE_BYTES)


def _file_in_memory(data: bytes) -> int:
    fd = os.memfd_create("bench")
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
    return fd


# ---------------------------------------------------------------------------------------------
# Bulk
# ---------------------------------------------------------------------------------------------


class Flow(NamedTuple):
    """One direction of a pair."""

    source: socket.socket
    sink: socket.socket
    source_is_websocket: bool = False
    sink_is_websocket: bool = False


class Transferred(NamedTuple):
    """The result of a transfer."""

    payload_bytes: int
    seconds: float  # from before the first byte was sent until the last byte had arrived


class Bulk:
    """A transfer on several flows at once: one process sends, another process receives."""

    def __init__(self, flows: Sequence[Flow], source: Source, in_background: bool = False) -> None:
        """`in_background`: see Worker.run_in_background."""
        self._flows = flows
        self._totals = memoryview(mmap.mmap(-1, 8 * len(flows))).cast("Q")  # 0: not known yet
        for flow in flows:
            flow.source.setblocking(False)
            flow.sink.setblocking(False)
        self._sender = Worker(_send, flows, source, self._totals)
        self._receiver = Worker(_receive, flows, source.content, self._totals)
        if in_background:
            self._sender.run_in_background()
            self._receiver.run_in_background()

    def __enter__(self) -> Bulk:
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.close()
        self._receiver.close()

    def start(self, seconds: float) -> None:
        """Start to send. The sender ends after so many seconds and its last bytes."""
        self._began_at = time.monotonic()
        self._sender.send(seconds)
        self._seconds = seconds

    def wait(self) -> Transferred:
        """Wait until all bytes have arrived. Raise LoadError if they do not, or are wrong."""
        ended_at = self._receiver.receive(self._seconds + 2 * LIMIT_SECONDS)
        self._sender.receive()
        return Transferred(sum(self._totals), ended_at - self._began_at)

    def end(self) -> None:
        """End all pairs in order. Raise ConnectionError if bytes came after the last one."""
        for flow in self._flows:
            flow.source.settimeout(LIMIT_SECONDS)
            flow.sink.settimeout(LIMIT_SECONDS)
        for flow in self._flows:
            clients.send_end(flow.source, flow.source_is_websocket)
        for flow in self._flows:
            clients.expect_end(flow.sink, flow.sink_is_websocket)


def _send(channel: Connection, flows: Sequence[Flow], source: Source, totals: memoryview) -> None:
    """Send on all flows until the time is up; then write the totals, and send the last bytes."""
    numbers = {flow.source.fileno(): number for number, flow in enumerate(flows)}
    sent = dict.fromkeys(numbers, 0)  # encoded bytes, by descriptor
    ends: dict[int, int] = {}  # the final value of `sent`; empty until the time is up
    epoll = select.epoll()
    for fd in numbers:
        epoll.register(fd, select.EPOLLOUT)
    seconds = receive(channel)
    deadline = time.monotonic() + seconds
    while sent:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"no flow accepted a byte for {LIMIT_SECONDS:g} s")
        if not ends and time.monotonic() >= deadline:
            for fd, number in numbers.items():
                units = (sent[fd] + (0 if number else TAIL_BYTES)) // source.wire_unit_bytes + 1
                totals[number] = units * source.content_unit_bytes
                ends[fd] = units * source.wire_unit_bytes
        for fd, _ in ready:
            offset = sent[fd] % source.wire_bytes
            size = min(SEND_BYTES, source.wire_bytes - offset)
            if ends:
                size = min(size, ends[fd] - sent[fd])
            try:
                sent[fd] += os.sendfile(fd, source.wire_fd, offset, size)
            except BlockingIOError:
                continue
            if sent[fd] == ends.get(fd):
                epoll.unregister(fd)
                del sent[fd]
    channel.send("sent")


def _receive(
    channel: Connection, flows: Sequence[Flow], content: bytes, totals: memoryview
) -> None:
    """Receive on all flows until each is complete. Check the content of the first flow."""
    sinks: dict[int, Sink] = {}
    epoll = select.epoll()
    for number, flow in enumerate(flows):
        kind = WebSocketSink if flow.sink_is_websocket else Sink
        checked = Checksum(content) if number == 0 else None
        sinks[flow.sink.fileno()] = kind(flow.sink, totals[number : number + 1], checked)
        epoll.register(flow.sink, select.EPOLLIN)
    while sinks:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"nothing arrived for {LIMIT_SECONDS:g} s; {len(sinks)} flows left")
        for fd, _ in ready:
            if sinks[fd].receive():
                epoll.unregister(fd)
                sinks.pop(fd)
    channel.send(time.monotonic())


class Checksum:
    """The hash of some parts of a stream whose content is known."""

    def __init__(self, content: bytes) -> None:
        """`content`: the bytes that the stream repeats."""
        self._content = memoryview(content)
        self._hash = hashlib.sha256()
        self._parts: list[range] = []  # positions in the stream, already hashed

    def add(self, position: int, data: memoryview) -> None:
        """Hash the bytes that were received at this position."""
        self._hash.update(data)
        is_adjacent = self._parts and self._parts[-1].stop == position
        start = self._parts.pop().start if is_adjacent else position
        self._parts.append(range(start, position + len(data)))

    def verify(self) -> None:
        """Raise LoadError unless the hash is that of the content at the same positions."""
        expected = hashlib.sha256()
        for part in self._parts:
            position = part.start
            while position < part.stop:
                offset = position % len(self._content)
                piece = self._content[offset : offset + part.stop - position]
                expected.update(piece)
                position += len(piece)
        if len(self._parts[-1]) < TAIL_BYTES - RECEIVE_BYTES:
            raise LoadError("the end of the transfer was not hashed")
        if self._hash.digest() != expected.digest():
            raise LoadError("the SHA-256 of the received bytes is wrong")


class Sink:
    """The receiver of a flow over TCP. It counts bytes and hashes the checked parts."""

    _unused = bytearray(RECEIVE_BYTES)  # MSG_TRUNC does not write to it
    _buffer = bytearray(READ_BYTES)

    def __init__(
        self, sock: socket.socket, total: memoryview, checksum: Checksum | None = None
    ) -> None:
        """`total`: one cell, the bytes of the flow; 0 until the sender has written the number."""
        self._receive_into = sock.recv_into
        self._total = total
        self._checksum = checksum
        self._received = 0  # bytes of payload

    def receive(self) -> bool:
        """Receive once. Return whether the flow is complete."""
        if self._is_checked():
            size = self._receive_into(self._buffer)
            self._add(memoryview(self._buffer)[:size])
        else:
            size = self._receive_into(self._unused, RECEIVE_BYTES, socket.MSG_TRUNC)
            self._received += size
        return self._is_complete(size)

    def _is_checked(self) -> bool:
        is_near_an_end = self._received < HEAD_BYTES or self._total[0] > 0
        return self._checksum is not None and is_near_an_end

    def _add(self, payload: memoryview) -> None:
        if self._checksum is not None and self._is_checked():
            self._checksum.add(self._received, payload)
        self._received += len(payload)

    def _is_complete(self, size: int) -> bool:
        """`size`: of the last read. Raise LoadError if the stream ended, or is too long."""
        if not size:
            raise LoadError(f"the stream ended after {self._received} bytes")
        total = self._total[0]
        if not total or self._received < total:
            return False
        if self._received > total:
            raise LoadError(f"{self._received} bytes arrived, {total} were sent")
        if self._checksum is not None:
            self._checksum.verify()
        return True


class WebSocketSink(Sink):
    """The receiver of a flow over WebSocket: unmasked binary messages of one frame each."""

    _head = b""  # of the current frame, as far as received
    _left_bytes = 0  # of the payload of the current frame

    def receive(self) -> bool:
        size = self._receive_into(self._buffer)
        rest = memoryview(self._buffer)[:size]
        while rest:
            if self._left_bytes:
                payload = rest[: self._left_bytes]
                self._left_bytes -= len(payload)
                self._add(payload)
                rest = rest[len(payload) :]
            else:
                rest = self._read_head(rest)
        return self._is_complete(size)

    def _read_head(self, data: memoryview) -> memoryview:
        """Read some bytes of the head; return the remaining data. RFC 6455, 5.2."""
        size = 2
        if len(self._head) >= 2:
            size = {126: 4, 127: 10}[self._head[1]]
        missing = size - len(self._head)
        self._head += data[:missing]
        if len(self._head) == size and (size > 2 or self._head[1] < 126):
            if self._head[0] != 0x80 | clients.BINARY:
                raise LoadError(f"not a whole binary message: a frame begins {self._head!r}")
            code = {2: "!xB", 4: "!xxH", 10: "!xxQ"}[size]
            (self._left_bytes,) = struct.unpack(code, self._head)
            self._head = b""
        return data[missing:]


# ---------------------------------------------------------------------------------------------
# Messages and round trips
# ---------------------------------------------------------------------------------------------


class Exchanged(NamedTuple):
    """The number of messages or pairings, and their duration."""

    done: int
    seconds: float


def exchange_messages(channel: Connection, pairs: Sequence[Pair], message: bytes) -> None:
    """Send one message after the other in each pair; the next when the last has arrived.

    A worker's function: it receives a number of seconds and sends an Exchanged. The bytes are
    counted in all pairs and compared in the first one.
    """
    size = len(message)
    buffer = bytearray(size)
    receive_into = {pair.second.fileno(): pair.second.recv_into for pair in pairs}
    send = {pair.second.fileno(): pair.first.send for pair in pairs}
    missing = dict.fromkeys(send, size)  # bytes of the current message
    checked = pairs[0].second.fileno()
    epoll = select.epoll()
    for pair in pairs:
        pair.first.setblocking(False)
        pair.second.setblocking(False)
        epoll.register(pair.second, select.EPOLLIN)
    seconds = receive(channel)
    began_at = time.monotonic()
    deadline = began_at + seconds
    done = 0
    for send_one in send.values():
        send_one(message)
    active = len(pairs)
    while active:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"nothing arrived for {LIMIT_SECONDS:g} s")
        sends_again = time.monotonic() < deadline
        for fd, _ in ready:
            left = missing[fd]
            got = receive_into[fd](buffer, left)
            if fd == checked and buffer[:got] != message[size - left : size - left + got]:
                raise LoadError("a received message is not the one that was sent")
            if not got:
                raise LoadError("the stream ended early")
            if got < left:
                missing[fd] = left - got
                continue
            missing[fd] = size
            done += 1
            if sends_again:
                send[fd](message)
            else:
                active -= 1
    channel.send(Exchanged(done, time.monotonic() - began_at))


def ping_pong(channel: Connection, pair: Pair, message: bytes) -> None:
    """Send a message there and back, the next one as soon as the last one is back.

    A worker's function: it receives a number of seconds, sends the list of the round trips'
    nanoseconds, and waits for the next number.
    """
    for sock in pair:
        sock.setblocking(True)
        sock.settimeout(LIMIT_SECONDS)
    first, second = pair
    while True:
        seconds = receive(channel, 10 * LIMIT_SECONDS)
        durations = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            began_at = time.perf_counter_ns()
            first.send(message)
            there = clients.receive_exactly(second, len(message))
            second.send(there)
            back = clients.receive_exactly(first, len(message))
            durations.append(time.perf_counter_ns() - began_at)
            if back != message:
                raise LoadError("a returned message is not the one that was sent")
        channel.send(durations)


def ping_at_intervals(
    channel: Connection, pair: Pair, message: bytes, interval_seconds: float
) -> None:
    """Send a message there and back at regular intervals, even if earlier ones are not back.

    So a long delay of one message does not reduce the number of delayed messages, and the median is
    that of a message sent at a random time. A worker's function, as ping_pong.
    """
    first, second = pair
    epoll = select.epoll()
    for sock in pair:
        sock.setblocking(False)
        epoll.register(sock, select.EPOLLIN)
    while True:
        seconds = receive(channel, 10 * LIMIT_SECONDS)
        durations = []
        returned = bytearray()
        sent_at: deque[int] = deque()  # of the messages that are not back, in nanoseconds
        next_at = time.monotonic()
        deadline = next_at + seconds
        while sent_at or next_at < deadline:
            now = time.monotonic()
            if next_at <= now and next_at < deadline:
                next_at = max(next_at + interval_seconds, now)
                sent_at.append(time.perf_counter_ns())
                first.send(message)
            if sent_at and time.perf_counter_ns() - sent_at[0] > LIMIT_SECONDS * 1e9:
                raise LoadError(f"a message is not back after {LIMIT_SECONDS:g} s")
            wait_seconds = next_at - now if next_at < deadline else LIMIT_SECONDS
            for fd, _ in epoll.poll(max(wait_seconds, 0)):
                if fd == second.fileno():
                    second.send(second.recv(READ_BYTES))
                    continue
                returned += first.recv(READ_BYTES)
                while len(returned) >= len(message):
                    durations.append(time.perf_counter_ns() - sent_at.popleft())
                    if returned[: len(message)] != message:
                        raise LoadError("a returned message is not the one that was sent")
                    del returned[: len(message)]
        channel.send(durations)


# ---------------------------------------------------------------------------------------------
# Pairings
# ---------------------------------------------------------------------------------------------


class Pairing(NamedTuple):
    """Two clients with the same token."""

    first: socket.socket
    second: socket.socket
    oks: list[socket.socket]  # the clients that have read their ok


def make_pairings(
    channel: Connection,
    connect: Callable[[str, str, bool], socket.socket],
    is_websocket: bool,
    in_progress: int,
) -> None:
    """Make pairs that leave at once, with a fixed number of pairings in progress.

    A worker's function: it receives a number of seconds and sends an Exchanged. `connect` returns
    a client that has sent its handshake with a token and a side. `is_websocket`: whether all
    clients use WebSocket. When both clients have read their ok the first one leaves. The second one
    leaves when it has read the end.
    """
    ok, end = clients.ok_bytes(is_websocket), clients.end_bytes(is_websocket)
    pairings: dict[int, Pairing] = {}  # by the descriptor of each client that has not left
    epoll = select.epoll()
    seconds = receive(channel)

    def begin() -> None:
        token = clients.new_token()
        first, second = (connect(token, side, is_websocket) for side in ("first", "second"))
        pairing = Pairing(first, second, [])
        for sock in (first, second):
            pairings[sock.fileno()] = pairing
            epoll.register(sock, select.EPOLLIN)

    def leave(sock: socket.socket) -> None:
        del pairings[sock.fileno()]
        sock.close()

    began_at = time.monotonic()
    deadline = began_at + seconds
    done = 0
    for _ in range(in_progress):
        begin()
    while pairings:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"no progress of a pairing for {LIMIT_SECONDS:g} s")
        for fd, _ in ready:
            pairing = pairings[fd]
            sock = pairing.first if fd == pairing.first.fileno() else pairing.second
            received = sock.recv(64)
            if received == ok and sock not in pairing.oks:
                pairing.oks.append(sock)
                if len(pairing.oks) == 2:
                    if is_websocket:
                        clients.send_end(pairing.first, is_websocket)
                    leave(pairing.first)
            elif received == end and len(pairing.oks) == 2:
                leave(pairing.second)
                done += 1
                if time.monotonic() < deadline:
                    begin()
            else:
                raise LoadError(f"a client received {received!r} instead of its ok")
    channel.send(Exchanged(done, time.monotonic() - began_at))
