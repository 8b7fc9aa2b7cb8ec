"""Fakes, vectors, clients, and a relay as a process, for more than one test file.

A test gives up after TIMEOUT. Slow machines multiply it with RELAY_TEST_TIMEOUT_FACTOR. Few tests
must let time pass; they say so (test_backpressure.py, test_kill.py).
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import hashlib
import inspect
import itertools
import os
import random
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from invariants import check_server

import transit_relay
from transit_relay import (
    DISCARD,
    MAX_OPEN_FILES,
    Addresses,
    Connection,
    Limits,
    Listener,
    Quota,
    Reason,
    Recorder,
    Role,
    Server,
    Session,
    Snapshot,
    UsageRecord,
    set_options,
    socket_options,
)

TIMEOUT = 5 * float(os.environ.get("RELAY_TEST_TIMEOUT_FACTOR", "1"))  # seconds
RELAY = Path(transit_relay.__file__).resolve()
ENTRY = Path(__file__).with_name("entry.py")
WEB = ("--websocket", "tcp:0:interface=127.0.0.1")  # an option of a RelayProcess
DIRECTIONS = [("tcp", "tcp"), ("tcp", "ws"), ("ws", "tcp"), ("ws", "ws")]  # of a pair
BOUND_BYTES = 2 * 1024 * 1024  # of the relay's memory, for one client or pair


def handshake(token: str = "t", side: str | None = None) -> bytes:
    """Return a handshake line. `token` and `side` are padded to their lengths."""
    line = b"please relay " + token.encode().ljust(64, b"0")
    if side is not None:
        line += b" for side " + side.encode().ljust(16, b"0")
    return line + b"\n"


def docstring_table(owner: type) -> list[list[str]]:
    """Return the cells of each row of the table in a class's docstring.

    The columns begin where the dashes of its ruler begin.
    """
    lines = (inspect.getdoc(owner) or "").splitlines()
    ruler = next(n for n, line in enumerate(lines) if line.startswith("-----"))
    starts = [match.start() for match in re.finditer("-+", lines[ruler])]
    columns = [slice(*ends) for ends in zip(starts, [*starts[1:], None])]
    rows = itertools.takewhile(str.strip, lines[ruler + 1 :])
    return [[row[column].strip() for column in columns] for row in rows]


def digest(data: bytes) -> str:
    """Return a digest to compare: pytest takes minutes to show how two megabytes differ."""
    return f"{len(data)} bytes, {hashlib.sha256(data).hexdigest()}"


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """Return `data` cut at `places`. A place at an end, or named twice, makes an empty piece."""
    borders = [0, *sorted(places), len(data)]
    return [data[a:b] for a, b in zip(borders, borders[1:])]


def cut_at_random(data: bytes, chance: random.Random, times: int) -> list[bytes]:
    """Return `data` cut at about `times` random places. No piece is empty."""
    pieces = cut(data, chance.choices(range(len(data) + 1), k=times))
    return [piece for piece in pieces if piece]


def splits(data: bytes, seed: int = 0) -> Iterator[list[bytes]]:
    """Yield `data` whole, as single bytes, cut in two at each place, and cut at random."""
    yield [data]
    yield cut(data, range(1, len(data)))
    for i in range(1, len(data)):
        yield cut(data, [i])
    chance = random.Random(seed)
    for _ in range(10):
        yield cut_at_random(data, chance, chance.randint(2, 6))


def eventually(
    is_so: Callable[[], bool],
    what: str,
    limit_seconds: float = 4 * TIMEOUT,
    poll_seconds: float = 0.05,
) -> None:
    """Poll until `is_so` returns true. Fail with `what` after the limit.

    The states that are read this way (files in /proc, a database) have no events.
    """
    deadline = time.monotonic() + limit_seconds
    while not is_so():
        assert time.monotonic() < deadline, f"not in {limit_seconds:g} s: {what}"
        time.sleep(poll_seconds)


class FakeClock:
    """A clock that the test moves."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Move the clock on."""
        self.now += seconds


class FakeTransport:
    """Stands for the Connection of a Session. It only records the orders of the Session."""

    framing = DISCARD
    is_status = False

    def __init__(self) -> None:
        self.sent = b""
        self.session_changes = 0
        self.finished = False

    def send(self, data: bytes | memoryview) -> None:
        assert not self.finished, "sent after the end"
        self.sent += data

    def session_changed(self) -> None:
        self.session_changes += 1

    def finish(self, reason: Reason) -> None:
        assert not self.finished, "finished twice"
        self.finished = True
        self.reason = reason


def snapshot_with(**fields: Any) -> Snapshot:
    """Return a Snapshot with these fields, and with 0 or nothing in the others."""
    values: dict[str, Any] = dict.fromkeys(Snapshot._fields, 0)
    return Snapshot(**{**values, "problems": (), **fields})


class ListRecorder(Recorder):
    """A Recorder that keeps all records in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[UsageRecord] = []

    def record(self, record: UsageRecord) -> None:
        self.records.append(record)

    def moods(self) -> list[str]:
        """Return the moods of all records so far, in order."""
        return [record.mood for record in self.records]


# Clients. They have one interface, so that a test can run over TCP and over WebSocket.


class Client:
    """A raw client over TCP or a unix socket.

    `wait(client, event)` is called before each operation that may have to wait for the relay. A
    relay in the same thread has to work first. The event is POLLIN, POLLOUT, or 0: do not wait.
    """

    def __init__(
        self, sock: socket.socket, wait: Callable[[Client, int], None] | None = None
    ) -> None:
        sock.settimeout(TIMEOUT)
        self.sock = sock
        self.conn: Connection | None = None  # of a relay in this thread
        self.close_code: int | None = None  # of the Close frame, if one has come
        self._wait = wait or (lambda client, events: None)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor, for select."""
        return self.sock.fileno()

    def encode(self, *pieces: bytes) -> list[bytes]:
        """Return each piece of a message as it is on the wire."""
        return list(pieces)

    def send(self, *pieces: bytes) -> None:
        """Send a message, in pieces (fragments, over WebSocket)."""
        self.send_wire(b"".join(self.encode(*pieces)))

    def send_wire(self, data: bytes) -> None:
        """Send bytes that are encoded already."""
        rest = memoryview(data)
        while rest:
            self._wait(self, select.POLLOUT)
            rest = rest[self.sock.send(rest) :]

    def read(self, size: int) -> bytes:
        """Return some payload, at most `size` bytes; b"" at the end."""
        self._wait(self, select.POLLIN)
        return self.sock.recv(size)

    def receive(self, size: int) -> bytes:
        """Return the next `size` bytes of payload. An earlier end is an error."""
        data = bytearray()
        while len(data) < size:
            part = self.read(size - len(data))
            assert part, f"the end came after {len(data)} of {size} bytes"
            data += part
        return bytes(data)

    def receive_now(self) -> bytes:
        """Return the payload that has come, without waiting for more."""
        data = bytearray()
        while self._is_readable() and (part := self.read(1 << 16)):
            data += part
        return bytes(data)

    def _is_readable(self) -> bool:
        """Let the relay work. Return whether payload, or the end, can be read."""
        self._wait(self, 0)
        return is_readable(self.sock)

    def read_to_end(self, code: int | None = 1000) -> bytes:
        """Return all payload until the orderly end: over WebSocket a Close with `code`.

        1005: a Close without a code. None: an end without a Close (1006 in RFC 6455 7.1.5). A
        reset is an error.
        """
        parts = []
        while part := self.read(1 << 16):
            parts.append(part)
        return b"".join(parts)

    def half_close(self, code: int = 1000) -> None:
        """Send the end of this direction; over WebSocket a Close frame."""
        self.sock.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the socket, without a Close frame."""
        self.sock.close()

    def reset(self) -> None:
        """Close the socket with a reset. (A unix socket is only closed.)"""
        reset(self.sock)


CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
LONGEST_MESSAGE = 32 * 1024  # from the relay: a Go client takes no longer ones


def frame(
    opcode: int, payload: bytes = b"", fin: bool = True, key: bytes | None = b"\x1b\xad\xf0\x0d"
) -> bytes:
    """Return a frame, masked with `key` as a client must. Without a key it is not masked."""
    size = len(payload)
    first, masked = opcode | (0x80 if fin else 0), 0x80 if key else 0
    if size < 126:
        head = struct.pack("!BB", first, masked | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", first, masked | 126, size)
    else:
        head = struct.pack("!BBQ", first, masked | 127, size)
    if not key:
        return head + payload
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return head + key + (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")


def message(*pieces: bytes, ended: bool = True) -> bytes:
    """Return a message of which each piece is a fragment. Without `ended`, the last is missing."""
    last = len(pieces) - 1
    return b"".join(
        frame(CONTINUATION if n else BINARY, piece, ended and n == last)
        for n, piece in enumerate(pieces)
    )


def close_payload(code: int | None, reason: bytes = b"") -> bytes:
    """Return the payload of a Close frame."""
    return b"" if code is None else struct.pack("!H", code) + reason


class WebSocketClient(Client):
    """A client over WebSocket. It does not use ws_frames, whose mistakes it would hide.

    Pings are kept in `pings` and not answered. Pongs are kept in `pongs`.
    """

    def __init__(
        self,
        sock: socket.socket,
        wait: Callable[[Client, int], None] | None = None,
        upgrade: bool = True,
        seed: int = 0,
    ) -> None:
        """Ask for the upgrade. Without `upgrade`, the caller sends `request`.

        The masking keys depend on `seed`.
        """
        super().__init__(sock, wait)
        self._chance = random.Random(seed)
        key = base64.b64encode(self._chance.randbytes(16))
        self.request = (
            b"GET /some/path?query HTTP/1.1\r\nHost: relay.example\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n"
            % key
        )
        digest = hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest()
        self._accept = base64.b64encode(digest)
        self._upgraded = False  # the answer to the request was read
        self._bytes = bytearray()  # read, but not a whole frame yet
        self._payload = bytearray()  # of binary messages, not returned yet
        self.pings: list[bytes] = []
        self.pongs: list[bytes] = []
        if upgrade:
            self.send_wire(self.request)

    def encode(self, *pieces: bytes) -> list[bytes]:
        opcodes = [BINARY] + [CONTINUATION] * (len(pieces) - 1)
        return [
            frame(opcode, piece, number == len(pieces), self._chance.randbytes(4))
            for number, (opcode, piece) in enumerate(zip(opcodes, pieces), 1)
        ]

    def next_frame(self) -> tuple[int, bytes] | None:
        """Return the relay's next frame, opcode and payload; None at its orderly end."""
        if not self._upgraded:
            self._read_answer()
        if not self._fill(2):
            assert not self._bytes, f"the end came in a frame: {bytes(self._bytes)!r}"
            return None
        first, size = self._bytes[:2]
        opcode, offset = first & 0x0F, 2
        assert first & 0xF0 == 0x80, f"reserved bits or a fragment: {first:#x}"
        if size >= 126:
            offset, code, shortest = {126: (4, "!H", 126), 127: (10, "!Q", 1 << 16)}[size]
            assert self._fill(offset)
            (size,) = struct.unpack(code, self._bytes[2:offset])
            assert size >= shortest, "its length is not minimal"
        assert size <= (LONGEST_MESSAGE if opcode == BINARY else 125), f"too long: {size}"
        assert self._fill(offset + size), f"{opcode} with {size} bytes ends in the middle"
        payload = bytes(self._bytes[offset : offset + size])
        del self._bytes[: offset + size]
        assert self.close_code is None, f"behind the Close: {opcode} {payload!r}"
        if opcode == CLOSE:
            self.close_code = struct.unpack("!H", payload)[0] if payload else 1005
        else:
            notes = {BINARY: None, PING: self.pings, PONG: self.pongs}[opcode]
            assert payload or notes is not None, "an empty message"
            if notes is not None:
                notes.append(payload)
        return opcode, payload

    def receive_now(self) -> bytes:
        if not self._upgraded:
            self._read_answer()
        while self._bytes or self._is_readable():
            if not self._read_frame():
                break
        return self._take(len(self._payload))

    def read_to_end(self, code: int | None = 1000) -> bytes:
        while self._read_frame():
            pass
        assert self.close_code == code
        return self._take(len(self._payload))

    def half_close(self, code: int = 1000) -> None:
        self.send_wire(frame(CLOSE, close_payload(code)))

    def read(self, size: int) -> bytes:
        while not self._payload and self._read_frame():
            pass
        return self._take(size)

    def _take(self, size: int) -> bytes:
        part = bytes(self._payload[:size])
        del self._payload[:size]
        return part

    def _read_frame(self) -> bool:
        """Read a frame and keep its payload. Return False at the end."""
        found = self.next_frame()
        if found is not None and found[0] == BINARY:
            self._payload += found[1]
        return found is not None

    def _read_answer(self) -> None:
        """Read the answer to the request, which must be the upgrade."""
        while b"\r\n\r\n" not in self._bytes:
            assert self._fill(len(self._bytes) + 1), bytes(self._bytes)
        head, _, rest = bytes(self._bytes).partition(b"\r\n\r\n")
        status, headers = parse_head(head)
        assert status == "101"
        assert headers["upgrade"].lower() == "websocket"
        assert headers["connection"].lower() == "upgrade"
        assert headers["sec-websocket-accept"] == self._accept.decode()
        assert not {"sec-websocket-extensions", "sec-websocket-protocol"} & set(headers)
        self._bytes[:] = rest
        self._upgraded = True

    def _fill(self, size: int) -> bool:
        """Read until there are `size` bytes. Return False if the end came first."""
        while len(self._bytes) < size:
            self._wait(self, select.POLLIN)
            part = self.sock.recv(1 << 18)
            if not part:
                return False
            self._bytes += part
        return True


def parse_head(head: bytes) -> tuple[str, dict[str, str]]:
    """Return the status of an HTTP answer and its headers. No header may be repeated."""
    line, *lines = head.decode("ascii").split("\r\n")
    version, status, _ = line.split(" ", 2)
    assert version == "HTTP/1.1"
    pairs = [one.split(": ", 1) for one in lines]
    headers = {name.lower(): value for name, value in pairs}
    assert len(headers) == len(lines), lines
    return status, headers


class Loop:
    """A Server in this thread. Its clocks stand still unless the test moves them."""

    def __init__(self, limits: Limits | None = None, max_pipes: int = 0) -> None:
        self.clock = FakeClock(1_000.0)  # monotonic
        self.wallclock = FakeClock(1_700_000_000.0)  # since the epoch
        self.recorder = ListRecorder()
        self._max_pipes = max_pipes
        self.server = self.make_server([], limits)
        self.server.start()
        self._clients: list[socket.socket] = []
        self._over_tcp: list[tuple[socket.socket, socket.socket]] = []  # both ends of each

    def make_server(
        self, listeners: Sequence[Listener], limits: Limits | None = None, **options: Any
    ) -> Server:
        """Return a new Server with the clocks and the recorder of this loop."""
        limits = limits or Limits()
        clocks = self.clock, self.wallclock
        options = {"max_pipes": self._max_pipes, **options}
        return Server(listeners, self.recorder, limits, *clocks, **options)

    @property
    def servers(self) -> list[Server]:
        """Return the servers that run in this thread."""
        return [self.server]

    def close(self) -> None:
        """Close all clients, and the servers."""
        for client in self._clients:
            client.close()
        for server in self.servers:
            server.close()

    def restart(
        self,
        *listeners: Listener,
        limits: Limits | None = None,
        quota: Quota | None = None,
        addresses: Addresses | None = None,
        max_open: int = MAX_OPEN_FILES,
        drain_seconds: float = 0,
    ) -> None:
        """Replace the server with one that has these listeners and limits."""
        self.server.close()
        self.server = self.make_server(
            listeners,
            limits,
            quota=quota,
            addresses=addresses,
            max_open=max_open,
            drain_seconds=drain_seconds,
        )
        self.server.start()

    def connect(
        self, tcp: bool = False, role: Role = Role.PORT, has_proxy_header: bool = False
    ) -> socket.socket:
        """Return the socket of a new client. Over TCP there are resets.

        `role` and `has_proxy_header`: of the listener that accepts it.
        """
        ours, its = tcp_pair() if tcp else socket.socketpair()
        ours.settimeout(TIMEOUT)
        self._clients.append(ours)
        if tcp:
            self._over_tcp.append((ours, its))
            set_options(its, socket_options(Limits().keepalive_seconds))
        self.server.admit(its, role, has_proxy_header=has_proxy_header)
        return ours

    def connect_both(
        self, tcp: bool = False, role: Role = Role.PORT
    ) -> tuple[socket.socket, Connection]:
        """Return the socket of a new client, and the relay's connection to it."""
        before = set(self.server.connections)
        client = self.connect(tcp, role)
        (conn,) = self.server.connections - before
        return client, conn

    def client(self, kind: str = "tcp", role: Role | None = None, upgrade: bool = True) -> Client:
        """Return a new client of a kind: tcp, unix, ws (over TCP) or ws-unix.

        `role`: of the listener that accepts it; by default that of its kind.
        `upgrade`: a WebSocket client asks for the upgrade at once.
        """
        spells = kind.startswith("ws")
        role = role or (Role.WEBSOCKET if spells else Role.PORT)
        sock, conn = self.connect_both(not kind.endswith("unix"), role)
        client = (
            WebSocketClient(sock, self.wait, upgrade, seed=len(self._clients))
            if spells
            else Client(sock, self.wait)
        )
        client.conn = conn
        return client

    def wait(self, client: Client, event: int) -> None:
        """Let the relay work. With an event: until the client can read or write."""
        self.pump()
        reading = [client] if event == select.POLLIN else []
        writing = [client] if event == select.POLLOUT else []
        while event:
            selectors = [server._selector for server in self.servers]
            ready = select.select([*reading, *selectors], writing, [], TIMEOUT)
            assert any(ready), "nothing moves"
            if client in ready[0] or client in ready[1]:
                return
            self.pump()

    def pump(self) -> None:
        """Run turns until nothing is ready or on its way. Check the server after each."""
        deadline = time.monotonic() + TIMEOUT
        self.wait_for_arrivals()
        while any(one.bulk.ready or one._selector.select(0) for one in self.servers):
            self.run_turns()
            self.wait_for_arrivals()
            assert time.monotonic() < deadline, "the loop does not come to rest"
        self.run_turns()  # the timers, and the connections that they doom

    def run_turns(self) -> None:
        """Run one turn of each server. Check the server after it."""
        for server in self.servers:
            server.run_once(0)
            check_server(server)

    def wait_for_arrivals(self) -> None:
        """Wait until nothing is on its way between clients and relay. Run no turn."""
        deadline = time.monotonic() + TIMEOUT
        for one, other in self._over_tcp:
            while is_under_way(one, other) or is_under_way(other, one):
                assert time.monotonic() < deadline, "it does not arrive"

    def advance(self, seconds: float) -> None:
        """Let sent bytes arrive, move the clocks, then run turns."""
        self.wait_for_arrivals()
        self.clock.advance(seconds)
        self.wallclock.advance(seconds)
        self.pump()

    def signal(self, number: int = signal.SIGTERM) -> None:
        """Let a signal come, as if its handler had noted it. Then run turns."""
        self.server.signals.noted.append(number)
        self.pump()

    def pair(self, tcp: bool = False) -> tuple[socket.socket, socket.socket]:
        """Return two clients that have met and have read their `ok`."""
        one, other = self.connect(tcp), self.connect(tcp)
        one.sendall(handshake("pair", "one"))
        self.pump()
        other.sendall(handshake("pair", "other"))
        self.pump()
        assert one.recv(100) == other.recv(100) == b"ok\n"
        return one, other

    def meet(
        self, first: str = "tcp", second: str = "tcp", token: str = "pair"
    ) -> tuple[Client, Client]:
        """Return two clients of these kinds that have met and have read their `ok`."""
        one, other = self.client(first), self.client(second)
        one.send(handshake(token, "one"))
        other.send(handshake(token, "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"
        return one, other


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection over the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
    for sock in (one, other):  # as the relay does; no test must wait for a delayed acknowledgement
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return one, other


def is_readable(sock: socket.socket) -> bool:
    """Return whether unread bytes, or the end, have come."""
    return bool(select.select([sock], [], [], 0)[0])


class Flow(NamedTuple):
    """The kernel's state of one end of a TCP connection: struct tcp_info, linux/tcp.h."""

    state: int
    received: int  # bytes
    sent: int
    sent_again: int

    @classmethod
    def of(cls, sock: socket.socket) -> Flow:
        """Return the state of `sock`. Fields that an old kernel does not have are 0."""
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 216).ljust(216, b"\0")
        return cls(*struct.unpack("=B127xQ64xQQ", info))


FIN_UNDER_WAY = {4, 9, 11}  # FIN_WAIT1, LAST_ACK, CLOSING: the end is not yet acknowledged
GONE = 7  # CLOSE: reset, or ended both ways


def is_under_way(sender: socket.socket, receiver: socket.socket) -> bool:
    """Return whether sent bytes, or the sender's end, have not arrived yet.

    The loopback has a delay too. If the receiver has unread bytes, the others do not count: they
    may have to wait for room.
    """
    is_open = receiver.fileno() >= 0
    if is_open and is_readable(receiver):
        return False
    if sender.fileno() < 0:
        return is_open
    flow = Flow.of(sender)
    if flow.state == GONE:
        return False
    if flow.state in FIN_UNDER_WAY:
        return True
    return is_open and Flow.of(receiver).received < flow.sent - flow.sent_again


def wait_for_hang_up(conn: Connection) -> None:
    """Wait until the relay's kernel reports that this client is gone."""
    poll = select.poll()
    poll.register(conn.fd, 0)
    assert poll.poll(TIMEOUT * 1000)


def reset(sock: socket.socket) -> None:
    """Close a TCP connection with a reset. The bytes in its send queue are discarded."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def fill_pipe(fd: int) -> int:
    """Fill an empty pipe. Return how many bytes it accepted. A blocking write blocks now."""
    size = fcntl.fcntl(fd, 1032)  # F_GETPIPE_SZ, which Python 3.9 has no name for
    return os.write(fd, b"\n" * size)


def receive(sock: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes. An earlier end is an error."""
    return Client(sock).receive(size)


def read_to_end(sock: socket.socket) -> bytes:
    """Return all bytes until the end. A reset is an error."""
    return Client(sock).read_to_end()


def partner_of(session: Session) -> Session | None:
    """Return the other session of the pair, if there is a pair."""
    return None if session.pair is None else session.pair.partner_of(session)


@contextlib.contextmanager
def stopped(relay: RelayProcess) -> Iterator[None]:
    """Suspend the relay for the `with` block."""
    os.kill(relay.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(relay.pid, signal.SIGCONT)


class RelayProcess:
    """A real relay, as an operator starts it. The end of the `with` block kills it."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        program: Sequence[str] = (sys.executable, str(ENTRY)),
    ) -> None:
        """`program`: what is started; the default is faster than the script RELAY."""
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=env,
            pass_fds=pass_fds,
        )
        self.pid = self.process.pid
        self.stderr = b""
        self._seeds = count()  # of its clients' masking keys

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()

    def wait_for(self, pattern: str, stream: str = "stderr") -> re.Match[str]:
        """Read messages until a line matches, and return the match. Else fail with all messages."""
        source = getattr(self.process, stream)
        deadline = time.monotonic() + TIMEOUT
        said = b""
        while True:
            for line in said.splitlines(keepends=True):
                match = re.search(pattern, line.decode())
                if match and line.endswith(b"\n"):
                    return match
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([source], [], [], left)
            more = os.read(source.fileno(), 1 << 16) if ready else b""
            if not more:
                raise AssertionError(f"no line with {pattern!r} in:\n{said.decode()}")
            said += more
            if stream == "stderr":
                self.stderr += more

    def read_messages(self) -> str:
        """Return all messages on stderr up to now."""
        assert self.process.stderr is not None
        fd = self.process.stderr.fileno()
        while select.select([fd], [], [], 0)[0] and (more := os.read(fd, 1 << 16)):
            self.stderr += more
        return self.stderr.decode()

    def started(self) -> RelayProcess:
        """Wait until the relay listens."""
        self.wait_for("Transit starting on")
        return self

    @property
    def port(self) -> int:
        """Return the port of the first tcp endpoint."""
        match = re.search(rb"Transit starting on tcp:(\d+)", self.stderr)
        assert match, self.stderr
        return int(match[1])

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        """Return a socket connected to the relay."""
        return socket.create_connection((host, self.port), timeout=TIMEOUT)

    def pair(self, token: str = "pair") -> tuple[socket.socket, socket.socket]:
        """Return two clients that have met and have read their `ok`."""
        one, other = self.connect(), self.connect()
        one.sendall(handshake(token, "one"))
        other.sendall(handshake(token, "other"))
        assert receive(one, 3) == receive(other, 3) == b"ok\n"
        return one, other

    @property
    def web_port(self) -> int:
        """Return the port of the first tcp endpoint for WebSocket."""
        match = re.search(rb"tcp:(\d+)[^ ]* \(websocket\)", self.stderr)
        assert match, self.stderr
        return int(match[1])

    def client(self, kind: str = "tcp") -> Client:
        """Return a new client of a kind, tcp or ws, at the endpoint for that kind."""
        port = self.web_port if kind == "ws" else self.port
        sock = socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT)
        if kind == "ws":
            return WebSocketClient(sock, seed=next(self._seeds))
        return Client(sock)

    def meet(
        self, first: str = "tcp", second: str = "tcp", token: str = "pair"
    ) -> tuple[Client, Client]:
        """Return two clients of these kinds that have met and have read their `ok`."""
        one, other = self.client(first), self.client(second)
        one.send(handshake(token, "one"))
        other.send(handshake(token, "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"
        return one, other

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit code. All messages are in `stderr` then."""
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        """Wait for the end of the process, and return the exit code."""
        _, rest = self.process.communicate(timeout=4 * TIMEOUT)
        self.stderr += rest
        return self.process.returncode

    def stop_cleanly(self) -> None:
        """Stop the relay. Fail if it has ever logged a warning or an error."""
        assert self.stop() == 0, self.stderr
        for word in (b"warning:", b"error:", b"critical:", b"Traceback"):
            assert word not in self.stderr, self.stderr.decode()

    def descriptors(self) -> int:
        """Return how many files the relay has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def resident_bytes(self) -> int:
        """Return the size of its memory."""
        fields = Path(f"/proc/{self.pid}/statm").read_text().split()
        return int(fields[1]) * os.sysconf("SC_PAGE_SIZE")

    def peak_bytes(self) -> int:
        """Return the largest size of its memory, since the start or since `forget_peak`."""
        (line,) = re.findall(r"VmHWM:\s*(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
        return int(line) * 1024

    def forget_peak(self) -> None:
        """Reset the peak, if the kernel allows it: proc(5), clear_refs."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")
