"""The load generator: processes that send, receive and count, as cheaply as Python can.

What is to be measured is the relay, so whatever the generator does with a byte should cost next to
nothing. Bulk is sent by sendfile(2) from a file in memory and thrown away by recv(2) with
MSG_TRUNC, so it is never touched here. It lies in pages of 4 KiB then, much as what comes from a
network; what send(2) gives to the loopback lies in larger pieces, by which splicing is counted.

The content is known. In one flow of each transfer the beginning and the end are received for real,
and their SHA-256 is compared; in all flows the number of bytes must be exact. It is the sender's to
say when its time is up: then it writes the number to memory that both share, *before* it sends the
last bytes. So whoever has received those finds the number written. The orderly end follows behind
what is measured: ending thousands of pairs is work of another kind.

A Worker is one process. It runs one function, which talks to us over a pipe.
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
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import clients
from clients import LIMIT_SECONDS, Pair

CONTENT_BYTES = 8 << 20  # at random; they are sent again and again
HEAD_BYTES = 8 << 20  # what is hashed of a checked flow at its beginning
TAIL_BYTES = 4 << 20  # what is sent of it when the number is known, and hashed, but for:
SEND_BYTES = 1 << 20  # at once, at most: the next flow, or process, need not wait long for its turn
RECEIVE_BYTES = 2 << 20  # thrown away at once, at most: maybe by a recv that began before that
READ_BYTES = 256 << 10  # received for real at once
MESSAGE_BYTES = 16_412  # of wormhole-william, the client in Go: one message for each record
MESSAGES = 512  # that many have as much content as above


class LoadError(Exception):
    """What came out is not what went in, or nothing comes any more."""


# ---------------------------------------------------------------------------------------------
# Workers
# ---------------------------------------------------------------------------------------------


class Failure(NamedTuple):
    """What a worker says when its function has failed."""

    reason: str


class Worker:
    """A process that runs `function(channel, *arguments)`, forked, so it has our sockets."""

    def __init__(self, function: Callable[..., None], *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        self._channel, its_end = context.Pipe()
        self._process = context.Process(
            target=_work, args=(its_end, function, arguments), daemon=True
        )
        self._process.start()
        its_end.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Whatever it does, it is gone now."""
        if self._process.is_alive():
            self._process.kill()
        self._process.join()
        self._channel.close()

    def stand_back(self) -> None:
        """Let it run only while no other process of its core can."""
        assert self._process.pid
        os.sched_setscheduler(self._process.pid, os.SCHED_IDLE, os.sched_param(0))

    def tell(self, word: Any) -> None:
        """Give it what it waits for."""
        self._channel.send(word)

    def hear(self, seconds: float = LIMIT_SECONDS) -> Any:
        """What it says next, within so many seconds. Raises LoadError, also in its place."""
        word = hear(self._channel, seconds)
        if isinstance(word, Failure):
            raise LoadError(word.reason)
        return word


def _work(channel: Connection, function: Callable[..., None], arguments: Sequence[Any]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # whoever started us ends us
    gc.disable()  # a collection in the middle of a round trip would be measured with it
    try:
        function(channel, *arguments)
    except (LoadError, OSError) as error:
        channel.send(Failure(f"{function.__name__}: {error}"))


def hear(channel: Connection, seconds: float = LIMIT_SECONDS) -> Any:
    """What the other end of a channel says next, within so many seconds. Raises LoadError."""
    if not channel.poll(seconds):
        raise LoadError(f"not a word in {seconds:g} s")
    try:
        return channel.recv()
    except EOFError:
        raise LoadError("a process of the generator has ended too early") from None


# ---------------------------------------------------------------------------------------------
# What is sent
# ---------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Bytes that are sent again and again, and how they look on the wire."""

    content: bytes  # the payload, to be compared with what arrives
    wire_fd: int  # a file in memory with the same as it is sent
    wire_bytes: int  # its size
    wire_unit: int  # a sender ends at a multiple of this,
    content_unit: int  # which has so much payload


@functools.cache
def plain_source() -> Source:
    """For whoever sends over TCP."""
    content = os.urandom(CONTENT_BYTES)
    return Source(content, _file_in_memory(content), len(content), 1, 1)


@functools.cache
def websocket_source() -> Source:
    """For whoever sends over WebSocket: one binary message for each record, as from Go."""
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


class Carried(NamedTuple):
    """What a transfer has moved."""

    payload_bytes: int
    seconds: float  # from before the first byte was sent until the last one had arrived


class Bulk:
    """A transfer over some flows at once: a process that sends, and one that receives."""

    def __init__(self, flows: Sequence[Flow], source: Source, in_background: bool = False) -> None:
        """`in_background`: see Worker.stand_back."""
        self._flows = flows
        self._totals = memoryview(mmap.mmap(-1, 8 * len(flows))).cast("Q")  # 0: not yet known
        for flow in flows:
            flow.source.setblocking(False)
            flow.sink.setblocking(False)
        self._sender = Worker(_send, flows, source, self._totals)
        self._receiver = Worker(_receive, flows, source.content, self._totals)
        if in_background:
            self._sender.stand_back()
            self._receiver.stand_back()

    def __enter__(self) -> Bulk:
        return self

    def __exit__(self, *_: object) -> None:
        self._sender.close()
        self._receiver.close()

    def start(self, seconds: float) -> None:
        """Send for so long, and then what is still to come."""
        self._began_at = time.monotonic()
        self._sender.tell(seconds)
        self._seconds = seconds

    def wait(self) -> Carried:
        """Until all has arrived. Raises LoadError if it does not, or is not what was sent."""
        ended_at = self._receiver.hear(self._seconds + 2 * LIMIT_SECONDS)
        self._sender.hear()
        return Carried(sum(self._totals), ended_at - self._began_at)

    def end(self) -> None:
        """End all pairs in good order: nothing may have come behind the last byte."""
        for flow in self._flows:
            flow.source.settimeout(LIMIT_SECONDS)
            flow.sink.settimeout(LIMIT_SECONDS)
        for flow in self._flows:
            clients.say_end(flow.source, flow.source_is_websocket)
        for flow in self._flows:
            clients.expect_end(flow.sink, flow.sink_is_websocket)


def _send(channel: Connection, flows: Sequence[Flow], source: Source, totals: memoryview) -> None:
    """Send on all flows until the time is up; then write down the totals, and send the rest."""
    numbers = {flow.source.fileno(): number for number, flow in enumerate(flows)}
    sent = dict.fromkeys(numbers, 0)  # bytes on the wire, by descriptor
    ends: dict[int, int] = {}  # how many it will have been; empty until the time is up
    epoll = select.epoll()
    for fd in numbers:
        epoll.register(fd, select.EPOLLOUT)
    seconds = hear(channel)
    deadline = time.monotonic() + seconds
    while sent:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"nothing was taken for {LIMIT_SECONDS:g} s")
        if not ends and time.monotonic() >= deadline:
            for fd, number in numbers.items():
                units = (sent[fd] + (0 if number else TAIL_BYTES)) // source.wire_unit + 1
                totals[number] = units * source.content_unit
                ends[fd] = units * source.wire_unit
        for fd, _ in ready:
            offset = sent[fd] % source.wire_bytes
            most = min(SEND_BYTES, source.wire_bytes - offset)
            if ends:
                most = min(most, ends[fd] - sent[fd])
            try:
                sent[fd] += os.sendfile(fd, source.wire_fd, offset, most)
            except BlockingIOError:
                continue
            if sent[fd] == ends.get(fd):
                epoll.unregister(fd)
                del sent[fd]
    channel.send("sent")


def _receive(
    channel: Connection, flows: Sequence[Flow], content: bytes, totals: memoryview
) -> None:
    """Receive from all flows until each has all; the first is checked for what it carried."""
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
            raise LoadError(f"nothing arrived for {LIMIT_SECONDS:g} s; {len(sinks)} incomplete")
        for fd, _ in ready:
            if sinks[fd].receive():
                epoll.unregister(fd)
                sinks.pop(fd)
    channel.send(time.monotonic())


class Checksum:
    """Hashes parts of a stream whose content is known, and compares."""

    def __init__(self, content: bytes) -> None:
        """`content`: what the stream repeats again and again."""
        self._content = memoryview(content)
        self._hash = hashlib.sha256()
        self._parts: list[range] = []  # of the stream: what was hashed

    def add(self, position: int, data: memoryview) -> None:
        """What the stream has there."""
        self._hash.update(data)
        goes_on = self._parts and self._parts[-1].stop == position
        start = self._parts.pop().start if goes_on else position
        self._parts.append(range(start, position + len(data)))

    def verify(self) -> None:
        """Raise LoadError unless that is what the content has there."""
        wanted = hashlib.sha256()
        for part in self._parts:
            position = part.start
            while position < part.stop:
                offset = position % len(self._content)
                piece = self._content[offset : offset + part.stop - position]
                wanted.update(piece)
                position += len(piece)
        if len(self._parts[-1]) < TAIL_BYTES - RECEIVE_BYTES:
            raise LoadError("the end of the transfer was not hashed")
        if self._hash.digest() != wanted.digest():
            raise LoadError("the SHA-256 of what arrived is not that of what was sent")


class Sink:
    """Where a flow arrives over TCP: counts, and hashes what is to be checked."""

    _trash = bytearray(RECEIVE_BYTES)  # never written to, so it is not even in memory
    _buffer = bytearray(READ_BYTES)

    def __init__(
        self, sock: socket.socket, total: memoryview, checksum: Checksum | None = None
    ) -> None:
        """`total`: one cell, how many bytes it will be, or 0 as long as nobody knows."""
        self._receive_into = sock.recv_into
        self._total = total
        self._checksum = checksum
        self._received = 0  # bytes of payload

    def receive(self) -> bool:
        """Take what is there. True: that was the last of it."""
        if self._is_checked():
            size = self._receive_into(self._buffer)
            self._take(memoryview(self._buffer)[:size])
        else:
            size = self._receive_into(self._trash, RECEIVE_BYTES, socket.MSG_TRUNC)
            self._received += size
        return self._is_complete(size)

    def _is_checked(self) -> bool:
        is_near_an_end = self._received < HEAD_BYTES or self._total[0] > 0
        return self._checksum is not None and is_near_an_end

    def _take(self, payload: memoryview) -> None:
        if self._checksum is not None and self._is_checked():
            self._checksum.add(self._received, payload)
        self._received += len(payload)

    def _is_complete(self, size: int) -> bool:
        """`size`: of the last read. Raises LoadError at an end, or at more than was sent."""
        if not size:
            raise LoadError(f"the end came after {self._received} bytes")
        total = self._total[0]
        if not total or self._received < total:
            return False
        if self._received > total:
            raise LoadError(f"{self._received} bytes came where {total} were sent")
        if self._checksum is not None:
            self._checksum.verify()
        return True


class WebSocketSink(Sink):
    """The same over WebSocket: the payload of unmasked binary messages, each of one frame."""

    _head = b""  # of the frame under way, as far as it has come
    _left_bytes = 0  # of its payload

    def receive(self) -> bool:
        size = self._receive_into(self._buffer)
        rest = memoryview(self._buffer)[:size]
        while rest:
            if self._left_bytes:
                payload = rest[: self._left_bytes]
                self._left_bytes -= len(payload)
                self._take(payload)
                rest = rest[len(payload) :]
            else:
                rest = self._read_head(rest)
        return self._is_complete(size)

    def _read_head(self, data: memoryview) -> memoryview:
        """Take some of the head; give the rest. RFC 6455, 5.2."""
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
# Messages, and round trips
# ---------------------------------------------------------------------------------------------


class Exchanged(NamedTuple):
    """How many messages arrived, or pairs met and left, in how long."""

    done: int
    seconds: float


def exchange_messages(channel: Connection, pairs: Sequence[Pair], message: bytes) -> None:
    """In each pair, one message after the other: the next is sent when the last has arrived.

    A worker's. It is told for how many seconds, and says an Exchanged. What arrives is compared
    in the first pair and counted in all.
    """
    size = len(message)
    buffer = bytearray(size)
    receive_into = {pair.second.fileno(): pair.second.recv_into for pair in pairs}
    send = {pair.second.fileno(): pair.first.send for pair in pairs}
    missing = dict.fromkeys(send, size)  # bytes of the message under way
    checked = pairs[0].second.fileno()
    epoll = select.epoll()
    for pair in pairs:
        pair.first.setblocking(False)
        pair.second.setblocking(False)
        epoll.register(pair.second, select.EPOLLIN)
    seconds = hear(channel)
    began_at = time.monotonic()
    deadline = began_at + seconds
    done = 0
    for send_one in send.values():
        send_one(message)
    under_way = len(pairs)
    while under_way:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"nothing arrived for {LIMIT_SECONDS:g} s")
        goes_on = time.monotonic() < deadline
        for fd, _ in ready:
            left = missing[fd]
            got = receive_into[fd](buffer, left)
            if fd == checked and buffer[:got] != message[size - left : size - left + got]:
                raise LoadError("what arrived is not what was sent")
            if not got:
                raise LoadError("the end came between messages")
            if got < left:
                missing[fd] = left - got
                continue
            missing[fd] = size
            done += 1
            if goes_on:
                send[fd](message)
            else:
                under_way -= 1
    channel.send(Exchanged(done, time.monotonic() - began_at))


def ping_pong(channel: Connection, pair: Pair, message: bytes, pause_seconds: float = 0.0) -> None:
    """There and back, again and again, with a pause before each. A worker's.

    It is told for how many seconds, says how many nanoseconds each took, and waits for more.
    """
    for sock in pair:
        sock.setblocking(True)
        sock.settimeout(LIMIT_SECONDS)
    first, second = pair
    while True:
        seconds = hear(channel, 10 * LIMIT_SECONDS)
        took = []
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if pause_seconds:
                time.sleep(pause_seconds)
            began_at = time.perf_counter_ns()
            first.send(message)
            there = clients.receive_exactly(second, len(message))
            second.send(there)
            back = clients.receive_exactly(first, len(message))
            took.append(time.perf_counter_ns() - began_at)
            if back != message:
                raise LoadError("what came back is not what was sent")
        channel.send(took)


# ---------------------------------------------------------------------------------------------
# Pairings
# ---------------------------------------------------------------------------------------------


class Meeting(NamedTuple):
    """Two clients that are to meet."""

    first: socket.socket
    second: socket.socket
    oks: list[socket.socket]  # those that have read theirs


def make_pairings(
    channel: Connection, connect: Callable[[str, str], socket.socket], under_way: int
) -> None:
    """Pairs that meet and leave, so many at a time. A worker's.

    It is told for how many seconds, and says an Exchanged. `connect` gives a client that has
    said its handshake with this token and side. When both have read their ok the first one
    leaves, and then the second, when it has read the end.
    """
    meetings: dict[int, Meeting] = {}  # by descriptor: each is there twice, until one has left
    epoll = select.epoll()
    seconds = hear(channel)

    def begin() -> None:
        token = clients.new_token()
        meeting = Meeting(connect(token, "first"), connect(token, "second"), [])
        for sock in (meeting.first, meeting.second):
            meetings[sock.fileno()] = meeting
            epoll.register(sock, select.EPOLLIN)

    def leave(sock: socket.socket) -> None:
        del meetings[sock.fileno()]
        sock.close()

    began_at = time.monotonic()
    deadline = began_at + seconds
    done = 0
    for _ in range(under_way):
        begin()
    while meetings:
        ready = epoll.poll(LIMIT_SECONDS)
        if not ready:
            raise LoadError(f"nobody met for {LIMIT_SECONDS:g} s")
        for fd, _ in ready:
            meeting = meetings[fd]
            sock = meeting.first if fd == meeting.first.fileno() else meeting.second
            said = sock.recv(64)
            if said == clients.OK and sock not in meeting.oks:
                meeting.oks.append(sock)
                if len(meeting.oks) == 2:
                    leave(meeting.first)
            elif not said and len(meeting.oks) == 2:
                leave(meeting.second)
                done += 1
                if time.monotonic() < deadline:
                    begin()
            else:
                raise LoadError(f"a client that was to meet another was told {said!r}")
    channel.send(Exchanged(done, time.monotonic() - began_at))
