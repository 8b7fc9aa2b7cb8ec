"""The loop: newcomers, deferred closing, faults, the state of the relay, signals, and the stop."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import random
import resource
import signal
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any

import pytest
from helpers import (
    PONG,
    TIMEOUT,
    Client,
    Loop,
    digest,
    frame,
    handshake,
    read_to_end,
)
from invariants import MAX_BACKLOG_BYTES, check_server

import transit_relay
from transit_relay import (
    IGNORED_SIGNALS,
    MEMORY_RESERVE_BYTES,
    PAUSE_SECONDS,
    PING_SECONDS,
    RESERVED_FDS,
    STOP_SIGNALS,
    Connection,
    Current,
    Endpoint,
    Limits,
    Listener,
    Pair,
    Phase,
    Rendezvous,
    ServerPhase,
    Session,
    State,
    StopProgress,
    descriptor_budget,
    set_options,
    socket_options,
)

BOTH_WAYS = True  # copied and spliced, see conftest.py


class ListeningSocket(socket.socket):
    """A unix socket whose accept raises each number in `refusals` once, then accepts."""

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_UNIX)
        self.path = str(path)
        self.refusals: list[int] = []
        self.clients: list[socket.socket] = []
        self.accepts = 0  # calls
        self.bind(self.path)
        self.listen()

    def accept(self) -> tuple[socket.socket, object]:
        self.accepts += 1
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()

    def new_client(self) -> socket.socket:
        """Connect a client, which is not accepted yet."""
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.settimeout(TIMEOUT)
        client.connect(self.path)
        return client


@pytest.fixture
def listening(loop: Loop, tmp_path: Path) -> Iterator[ListeningSocket]:
    """Return a socket on which the loop listens."""
    listening = ListeningSocket(tmp_path / "s")
    loop.restart(Listener(listening, Endpoint("unix:listening", "unix")))
    yield listening
    for client in listening.clients:
        client.close()


@pytest.fixture
def currents(loop: Loop) -> list[Current]:
    """Return the list to which all values of `current` go."""
    told: list[Current] = []
    loop.recorder.update = told.append  # type: ignore[method-assign]
    return told


def stuff(loop: Loop, sender: socket.socket) -> int:
    """Send to a client that does not read, as much as is accepted. Return how many bytes."""
    sender.setblocking(False)
    sent = 0
    with pytest.raises(BlockingIOError):
        for _ in range(1_000):
            sent += sender.send(bytes(10_000))
            loop.pump()
    sender.settimeout(TIMEOUT)
    return sent


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]


# Newcomers.

RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
# accept(2) of Linux: errors that are already pending on the new socket, and a firewall's refusal.
LOST = (
    *(errno.ENETDOWN, errno.EPROTO, errno.ENOPROTOOPT, errno.EHOSTDOWN, errno.ENONET),
    *(errno.EHOSTUNREACH, errno.EOPNOTSUPP, errno.ENETUNREACH, errno.ECONNABORTED, errno.EPERM),
    *(errno.ENOSR, errno.ESOCKTNOSUPPORT, errno.EPROTONOSUPPORT, errno.ETIMEDOUT),
    *(errno.ECONNRESET, errno.EINTR),
)
UNKNOWN = (errno.EBADF, errno.EINVAL, errno.ENOTSOCK, errno.EIO, errno.ENOSPC, errno.EACCES)


def test_a_flood_of_newcomers_is_accepted_in_portions(
    loop: Loop, listening: ListeningSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transit_relay, "ACCEPTS_PER_WAKEUP", 2)
    for _ in range(5):
        listening.new_client()
    inside = []
    for _ in range(4):
        loop.server.run_once(0)
        inside.append(len(loop.server.connections))
    assert inside == [2, 4, 5, 5]


@pytest.mark.parametrize("number", RESOURCES)
def test_without_resources_newcomers_wait_a_second(
    loop: Loop, listening: ListeningSocket, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    loop.pump()
    listening.refusals = [number]
    listening.new_client()
    loop.pump()
    assert warnings(caplog) == [f"newcomers have to wait: {os.strerror(number)}"]
    assert loop.server._selector.select(0) == []  # not busy, although a newcomer waits,
    assert loop.server._timeout() == 1  # and it wakes up in time
    loop.advance(0.5)
    loop.pump()
    assert len(loop.server.connections) == 0
    loop.advance(0.5)
    loop.pump()
    assert len(loop.server.connections) == 1


@pytest.mark.parametrize("number", RESOURCES)
def test_a_closed_connection_frees_resources_for_a_newcomer(
    loop: Loop, listening: ListeningSocket, number: int
) -> None:
    leaver = listening.new_client()
    loop.pump()
    listening.refusals = [number]
    newcomer = listening.new_client()
    loop.pump()
    leaver.close()
    loop.pump()
    newcomer.sendall(b"junk\n")
    loop.pump()
    assert read_to_end(newcomer) == b"bad handshake\n"


def test_a_lack_of_descriptors_is_logged_once_a_minute(
    loop: Loop, listening: ListeningSocket, caplog: pytest.LogCaptureFixture
) -> None:
    listening.refusals = [errno.EMFILE] * 100
    listening.new_client()
    loop.pump()
    for _ in range(59):
        loop.advance(1)
    assert len(warnings(caplog)) == 1
    loop.advance(1)
    assert len(warnings(caplog)) == 2


def test_the_real_limit_of_descriptors(loop: Loop, listening: ListeningSocket) -> None:
    listening.new_client()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)  # the lowest number that is free: now none is
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        loop.server.run_once(0)
        assert loop.server._selector.select(0) == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(loop.server.connections) == 0
    loop.advance(1)
    loop.pump()
    assert len(loop.server.connections) == 1


@pytest.mark.parametrize("number", LOST, ids=errno.errorcode.get)
def test_a_newcomer_that_is_lost_does_not_pause_the_listener(
    loop: Loop, listening: ListeningSocket, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    listening.refusals = [number] * 3
    listening.new_client()
    loop.server.run_once(0)
    assert len(loop.server.connections) == 1
    assert warnings(caplog) == []


def test_all_other_errors_of_accept_are_unknown() -> None:
    assert set(LOST) == transit_relay.NEWCOMER_LOST
    assert set(RESOURCES) == transit_relay.OUT_OF_RESOURCES


@pytest.mark.parametrize("number", UNKNOWN, ids=errno.errorcode.get)
def test_an_unknown_error_of_accept_pauses_for_a_second_and_is_named(
    loop: Loop, listening: ListeningSocket, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    """A listener that is broken for ever must not keep the loop busy."""
    leavers = [listening.new_client() for _ in range(3)]
    loop.pump()
    listening.refusals = [number] * 2
    listening.new_client()
    loop.pump()
    text = f"accept: {errno.errorcode[number]}, {os.strerror(number)}"
    assert warnings(caplog) == [f"newcomers have to wait: {text}"]
    accepts = listening.accepts
    for leaver in leavers:  # closed connections do not end this pause
        leaver.close()
        loop.pump()
    assert listening.accepts == accepts
    loop.advance(PAUSE_SECONDS)
    loop.pump()
    assert listening.accepts == accepts + 1  # refused again
    loop.advance(PAUSE_SECONDS / 2)
    loop.pump()
    assert listening.accepts == accepts + 1
    loop.advance(PAUSE_SECONDS / 2)
    loop.pump()
    assert len(loop.server.connections) == 1
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("pipes", [0, 32])
@pytest.mark.parametrize("limit", [20, 80, 1024, 1 << 20])
def test_descriptors_are_kept_for_records_and_pipes(
    monkeypatch: pytest.MonkeyPatch, limit: int, pipes: int
) -> None:
    monkeypatch.setattr(transit_relay, "affordable_pipes", lambda: pipes)
    connections, pipes_lent = descriptor_budget(limit, open_now=10)
    assert 0 <= pipes_lent <= pipes and 2 * pipes_lent <= limit / 8
    assert connections >= 1
    if limit > 40:
        assert connections + 2 * pipes_lent + 10 + RESERVED_FDS == limit
    assert pipes_lent == pipes or limit < 1024
    assert descriptor_budget(limit, 10, uses_pipes=False) == (max(1, limit - 10 - RESERVED_FDS), 0)


def test_options_of_accepted_sockets(loop: Loop) -> None:
    """They are set for a client that came before the relay listened (systemd), and for later ones.

    The first client is accepted before the queue was seen empty, the third one afterwards.
    """
    listening = socket.create_server(("127.0.0.1", 0))
    with contextlib.ExitStack() as clients:
        clients.enter_context(socket.create_connection(listening.getsockname()))
        loop.restart(Listener(listening, Endpoint("tcp", "tcp")))
        for number in (1, 2, 3):
            loop.pump()
            assert len(loop.server.connections) == number
            for conn in loop.server.connections:
                assert not conn.sock.getblocking()
                assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
                assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
                assert conn.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                assert keepalive_times(conn.sock) == [200, 15, 4]
            clients.enter_context(socket.create_connection(listening.getsockname()))


def keepalive_times(sock: socket.socket) -> list[int]:
    """Return the silence before the first probe, the time between probes, and their number."""
    options = (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
    return [sock.getsockopt(socket.IPPROTO_TCP, option) for option in options]


@pytest.mark.parametrize(
    ("seconds", "times"),
    [
        (None, [200, 15, 4]),  # the default
        (10, [10, 15, 4]),
        (0.1, [1, 15, 4]),
        (1_000_000, [32767, 15, 4]),  # the kernel's maximum
        (0, None),  # the system's
    ],
)
def test_keepalive(loop: Loop, seconds: float | None, times: list[int] | None) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    limits = Limits() if seconds is None else Limits(keepalive_seconds=seconds)
    loop.restart(Listener(listening, Endpoint("tcp", "tcp")), limits=limits)
    with socket.create_connection(listening.getsockname()) as client:
        loop.pump()
        (conn,) = loop.server.connections
        assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert keepalive_times(conn.sock) == (times or keepalive_times(client))


class RefusingOptions:
    """A socket that refuses each option, and notes it."""

    def __init__(self, family: int) -> None:
        self.family = family
        self.asked: list[tuple[int, int, int]] = []

    def setsockopt(self, *option: int) -> None:
        self.asked.append(option)  # type: ignore[arg-type]
        raise OSError(errno.EOPNOTSUPP, "injected")


def test_one_refused_option_does_not_skip_the_others() -> None:
    options = socket_options(200)
    assert len(options) == 6
    sock: Any = RefusingOptions(socket.AF_INET6)
    set_options(sock, options)
    assert sock.asked == options


def test_a_unix_socket_is_asked_for_no_tcp_option() -> None:
    sock: Any = RefusingOptions(socket.AF_UNIX)
    set_options(sock, socket_options(200))
    assert sock.asked == []


# A selector that refuses. Another process of the same user can use up all epoll watches.


@contextlib.contextmanager
def full_selector(loop: Loop, method: str, fd: int | None = None) -> Iterator[list[int]]:
    """Let registrations fail with ENOSPC: of `fd`, or of all descriptors. Yield which failed."""
    selector = loop.server._selector
    real = getattr(selector, method)
    refused: list[int] = []

    def refuse(target: int, *others: object) -> object:
        number = target if isinstance(target, int) else target.fileno()
        if fd not in (None, number):
            return real(target, *others)
        refused.append(number)
        if method == "modify":  # as selectors.EpollSelector does
            selector.unregister(target)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selector, method, refuse)
        yield refused


REFUSED = "the selector refused a connection: No space left on device"


def check_that_one_pair_ended(loop: Loop, beside: tuple[socket.socket, socket.socket]) -> None:
    """Check that the pair `beside` runs on, and that the other one has its record."""
    assert loop.recorder.moods() == ["happy"]
    assert loop.server.faults.count == 1
    for sender, receiver in (beside, beside[::-1]):
        sender.sendall(b"still here")
        loop.pump()
        assert receiver.recv(100) == b"still here"


def test_a_change_of_interest_that_is_refused_costs_one_pair(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    beside = loop.pair()
    (sender, _), (receiver, conn) = paired = [loop.connect_both() for _ in range(2)]
    for client, _ in paired:
        client.sendall(handshake())
    loop.pump()
    with full_selector(loop, "modify", conn.fd) as refused:
        sender.setblocking(False)
        while not refused:  # until the receiver has a backlog
            with contextlib.suppress(BlockingIOError):
                sender.send(bytes(10_000))
            loop.pump()
    loop.pump()
    assert refused == [conn.fd] and conn not in loop.server.connections
    sender.settimeout(TIMEOUT)
    assert read_to_end(sender) == b"ok\n"
    assert read_to_end(receiver)[:3] == b"ok\n"
    assert warnings(caplog) == [REFUSED]
    check_that_one_pair_ended(loop, beside)


def test_a_registration_that_is_refused_costs_one_pair(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """A connection that was not read, because its partner had a backlog."""
    beside = loop.pair()
    (sender, conn), (receiver, _) = paired = [loop.connect_both() for _ in range(2)]
    for client, _ in paired:
        client.sendall(handshake())
    loop.pump()
    stuff(loop, sender)
    assert conn.mask == 0
    relayed = conn.read_bytes - len(handshake())
    size = 0
    with full_selector(loop, "register", conn.fd) as refused:
        while part := receiver.recv(1 << 16):
            size += len(part)
            loop.pump()
    assert refused == [conn.fd] and conn not in loop.server.connections
    assert size == 3 + relayed
    assert warnings(caplog) == [REFUSED]
    check_that_one_pair_ended(loop, beside)


def test_a_newcomer_that_the_selector_refuses_pauses_accepting(
    loop: Loop, listening: ListeningSocket, caplog: pytest.LogCaptureFixture
) -> None:
    running = loop.pair()
    refused_client = listening.new_client()
    listening.new_client()  # stays in the kernel's queue
    with full_selector(loop, "register") as refused:
        loop.pump()
        assert len(refused) == listening.accepts == 1
        assert read_to_end(refused_client) == b""
        assert len(loop.server.connections) == 2
        assert warnings(caplog) == [REFUSED, "newcomers have to wait: the selector refused one"]
        loop.advance(PAUSE_SECONDS)
        assert refused[1:] == [listening.fileno()]  # the listener is refused as well
        assert loop.server._timeout() == PAUSE_SECONDS
    running[0].sendall(b"still here")
    loop.advance(PAUSE_SECONDS)
    assert running[1].recv(100) == b"still here"
    assert len(loop.server.connections) == 3
    assert loop.recorder.moods() == ["empty"]


# Faults.


def raise_once(
    patch: pytest.MonkeyPatch, owner: object, name: str, error: BaseException
) -> list[object]:
    """Let a method raise at its first call. Return a list that has an entry then."""
    real = getattr(owner, name)
    calls: list[object] = []

    def method(*arguments: object, **named: object) -> object:
        calls.append(arguments)
        if len(calls) == 1:
            raise error
        return real(*arguments, **named)

    patch.setattr(owner, name, method)
    return calls


@pytest.mark.parametrize("method", ["drain", "receive"])
def test_a_fault_in_a_bulk_turn_leaves_the_backlog_to_its_client(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The connection was not polled while it was queued, and must be polled again."""
    (sender, sending), (receiver, conn) = clients = [loop.connect_both() for _ in range(2)]
    for client, _ in clients:
        client.sendall(handshake())
    loop.pump()
    stuff(loop, sender)
    relayed = sending.read_bytes - len(handshake())
    receiver.sendall(b"x")  # both methods have something to do
    with monkeypatch.context() as patch:
        patch.setattr(transit_relay, "MAX_POLLED_BULK", 0)
        calls = raise_once(patch, Connection, method, AssertionError("injected"))
        loop.server.bulk.add(conn, EVENT_READ | EVENT_WRITE)
        assert conn.is_unpolled
        loop.server.run_once(0)
        assert calls and loop.server.faults.count == 1
        assert conn.phase is Phase.FLUSHING
    loop.pump()
    size = 0
    while part := receiver.recv(1 << 16):
        size += len(part)
        loop.pump()
    assert size == 3 + relayed
    receiver.close()
    loop.pump()
    assert conn not in loop.server.connections
    assert loop.recorder.moods() == ["happy"]


@pytest.mark.parametrize(
    ("owner", "method"),
    [
        *((Connection, name) for name in ("finish", "advance", "check_linger", "_set_backlog")),
        (transit_relay.RawFraming, "closing_bytes"),
        *((Session, name) for name in ("client_ended", "partner_left", "end_sent", "_end")),
        *((Rendezvous, "pair_ended"), (Pair, "remove"), (Pair, "record")),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
@pytest.mark.parametrize("has_backlog", [False, True])
def test_a_fault_at_the_end_of_a_pair_ends_both_clients(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, owner: type, method: str, has_backlog: bool
) -> None:
    """It does so not only for the client that left, whose event was served."""
    leaver, stayed = loop.pair()
    if has_backlog or method == "_set_backlog":  # without one it is not called
        stuff(loop, stayed)
    with monkeypatch.context() as patch:
        calls = raise_once(patch, owner, method, AssertionError("injected"))
        leaver.close()
        loop.pump()
        with contextlib.suppress(ConnectionResetError):  # its own end is not in order either
            while stayed.recv(1 << 16):
                loop.pump()
    assert calls and loop.server.faults.count == 1
    loop.advance(1)  # the stayed client does not close its socket
    assert not loop.server.rendezvous.pairs
    stayed.close()
    loop.pump()
    assert loop.server.connections == set()
    assert len(loop.recorder.records) <= 1


def test_a_memory_error_costs_one_connection(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The reserve is free while the connection is ended, and is allocated again after that."""
    faults = loop.server.faults
    one, other = loop.pair()
    client, conn = loop.connect_both()
    loop.pump()
    reserves = []
    real_finish = Connection.finish

    def finish(self: Connection, *arguments: Any) -> None:
        reserves.append(faults._memory_reserve)
        real_finish(self, *arguments)

    with monkeypatch.context() as patch:
        raise_once(patch, type(conn.framing), "receive", MemoryError())
        patch.setattr(Connection, "finish", finish)
        client.sendall(handshake())
        loop.pump()
    assert reserves == [None]
    assert faults._memory_reserve is not None
    assert len(faults._memory_reserve) == MEMORY_RESERVE_BYTES
    assert read_to_end(client) == b""
    assert loop.recorder.moods() == ["empty"]
    assert loop.server.snapshot().faults == 1
    (message,) = warnings(caplog)
    assert message.startswith("contained fault in ") and message.endswith("\nMemoryError")
    one.sendall(b"still here")
    loop.pump()
    assert other.recv(100) == b"still here"


def test_the_memory_reserve_waits_until_there_is_room(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_memory(size: int) -> bytes:
        raise MemoryError

    faults = loop.server.faults
    assert len(faults._memory_reserve or b"") == MEMORY_RESERVE_BYTES
    with monkeypatch.context() as patch:
        patch.setattr(transit_relay, "bytes", no_memory, raising=False)
        try:
            raise MemoryError
        except MemoryError:
            faults.contain(None)
        faults.restore_memory_reserve()
        assert faults._memory_reserve is None
    faults.restore_memory_reserve()
    assert len(faults._memory_reserve or b"") == MEMORY_RESERVE_BYTES


def test_a_fault_of_one_place_is_logged_once_a_minute(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault() -> None:
        raise AssertionError("injected")

    loop.server.timers.every(1, fault)
    for _ in range(61):
        loop.advance(1)
    first, second = warnings(caplog)
    assert first.splitlines()[0].startswith("contained fault in fault, line ")
    assert first.endswith("\nAssertionError: injected")
    assert second.endswith("\nAssertionError: injected (59 more since the last message)")
    assert loop.server.snapshot().faults == 61


# Deferred closing.


def test_a_descriptor_is_not_reused_within_a_batch(
    loop: Loop, listening: ListeningSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client leaves and another comes in one batch, which then has the first one again."""
    leaver, old = loop.connect_both()
    loop.pump()
    leaver.close()
    newcomer = listening.new_client()
    batch = loop.server._selector.select(0)
    batch.sort(key=lambda event: event[0].fd != old.fd)
    with monkeypatch.context() as patch:
        patch.setattr(loop.server._selector, "select", lambda _: [*batch, batch[0]])
        loop.server.run_once(0)
    (new,) = loop.server.connections
    assert new.fd != old.fd
    newcomer.sendall(handshake())
    loop.pump()
    assert loop.server.snapshot().current().waiting_tokens == 1
    assert loop.recorder.moods() == ["empty"]


def test_a_reused_descriptor_gets_no_event_of_a_closed_connection(loop: Loop) -> None:
    leaver, old = loop.connect_both()
    client, its = socket.socketpair()
    leaver.close()
    loop.pump()
    with client, its:
        loop.server.admit(socket.socket(fileno=os.dup2(its.fileno(), old.fd)))
        its.close()
        (new,) = loop.server.connections
        assert new.fd == old.fd
        client.sendall(handshake())
        old.on_ready(EVENT_READ | EVENT_WRITE)
        loop.server.bulk.move(old, EVENT_READ | EVENT_WRITE)
        assert new.session.state is State.WAIT_HANDSHAKE
        loop.pump()
        assert loop.server.snapshot().current().waiting_tokens == 1


def test_both_of_a_pair_leave_in_one_batch(loop: Loop) -> None:
    one, other = loop.pair()
    one.sendall(b"1")
    other.sendall(b"22")
    loop.pump()
    one.close()
    other.close()
    loop.server.run_once(0)
    loop.server.run_once(0)  # if it was queued for bulk
    assert loop.server.connections == set()
    (record,) = loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", 3)


def test_doomed_connections_are_closed_at_the_end_of_the_turn_in_order(loop: Loop) -> None:
    _, newcomer = loop.connect_both()
    client, waiter = loop.connect_both()
    client.sendall(handshake())
    loop.pump()
    for conn in (waiter, newcomer):
        conn.doom()
    assert waiter.sock.fileno() == waiter.fd
    assert loop.recorder.moods() == []
    loop.server.run_once(0)
    assert waiter.sock.fileno() == newcomer.sock.fileno() == -1
    assert loop.recorder.moods() == ["lonely", "empty"]


def test_the_partner_of_a_doomed_connection_is_ended_in_the_same_turn(loop: Loop) -> None:
    one, other = loop.pair()
    conn = next(iter(loop.server.connections))
    conn.doom()
    loop.server.run_once(0)
    assert read_to_end(one) == read_to_end(other) == b""
    assert loop.recorder.moods() == ["happy"]


# The state of the relay.


def test_current_through_a_day(loop: Loop) -> None:
    def counts() -> tuple[int, int, int]:
        loop.pump()
        now = loop.server.snapshot().current()
        return now.connected, now.waiting_tokens, now.incomplete_bytes

    loop.connect()
    assert counts() == (0, 0, 0)
    same_side = [loop.connect() for _ in range(2)]
    for client in same_side:
        client.sendall(handshake("one", "a"))
    assert counts() == (0, 1, 0)  # tokens, not connections
    loop.connect().sendall(handshake("two", "a"))
    assert counts() == (0, 2, 0)
    partner = loop.connect()
    partner.sendall(handshake("one", "b"))
    assert counts() == (2, 1, 0)
    partner.sendall(b"123")
    same_side[1].sendall(b"4567")
    assert counts() == (2, 1, 7)
    one, other = loop.pair()
    assert counts() == (4, 1, 7)
    one.sendall(b"89")
    assert counts() == (4, 1, 9)
    partner.close()
    assert counts() == (2, 1, 2)
    other.close()
    assert counts() == (0, 1, 0)


def test_a_pair_counts_until_its_record_is_written(loop: Loop) -> None:
    one, other = loop.pair()
    stuff(loop, one)
    stuff(loop, other)
    size = loop.server.snapshot().current().incomplete_bytes
    assert size > 0
    loop.server.ending.stop()
    loop.pump()
    assert loop.recorder.records == []
    assert loop.server.snapshot().current()[2:] == (2, 0, size)
    loop.advance(2)
    assert [record.total_bytes for record in loop.recorder.records] == [size]
    assert loop.server.snapshot().current()[2:] == (0, 0, 0)


def test_rebooted_stays_and_updated_goes_on(loop: Loop) -> None:
    loop.advance(100.5)
    assert loop.server.snapshot().current()[:2] == (1_700_000_000, 1_700_000_100)


@pytest.mark.parametrize("seconds", [1_000_000, -1_000_000])
def test_rebooted_follows_a_clock_that_was_set_after_the_start(loop: Loop, seconds: float) -> None:
    loop.advance(100)
    loop.wallclock.advance(seconds)  # the monotonic clock does not see that
    loop.advance(50)
    current = loop.server.snapshot().current()
    assert (current.rebooted, current.updated) == (
        1_700_000_000 + seconds,
        1_700_000_150 + seconds,
    )


def test_current_is_told_every_half_minute_when_idle(
    loop: Loop, currents: list[Current], monkeypatch: pytest.MonkeyPatch
) -> None:
    loop.restart(limits=Limits(stall_seconds=0))  # its sweeps would take turns too

    def sleep(seconds: float) -> list[object]:
        loop.clock.advance(seconds)
        loop.wallclock.advance(seconds)
        return []

    monkeypatch.setattr(loop.server._selector, "select", sleep)
    for _ in range(4):
        loop.server.run_once(loop.server._timeout())
    assert [now.updated - now.rebooted for now in currents] == [0, 30, 60, 90]


def test_current_is_told_every_half_minute_when_busy(loop: Loop, currents: list[Current]) -> None:
    one, _ = loop.pair()
    for _ in range(90):
        one.sendall(b"x")
        loop.advance(1)
    assert [now.updated - now.rebooted for now in currents] == [0, 30, 60, 90]
    assert [now.incomplete_bytes for now in currents] == [0, 30, 60, 90]


# A suspended process (SIGSTOP, a paused container): select returns late, and empty.


def run_suspended(loop: Loop, seconds: float, timeout: float = 1) -> None:
    """Run one turn in which select returns nothing, `seconds` after its `timeout`."""
    real = loop.server._selector.select
    calls: list[float] = []

    def select(timeout: float) -> list[Any]:
        calls.append(timeout)
        if len(calls) > 1:
            return real(timeout)
        loop.clock.advance(timeout + seconds)
        return []

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.server._selector, "select", select)
        loop.server.run_once(timeout)


def test_after_a_suspension_a_handshake_that_has_come_counts(loop: Loop) -> None:
    client = loop.connect()
    loop.advance(30)
    client.sendall(handshake())
    run_suspended(loop, 55)
    assert loop.server.snapshot().waiting_clients == 1
    assert loop.recorder.moods() == []


def test_a_suspension_does_not_count_as_time_for_the_handshake(loop: Loop) -> None:
    client = loop.connect()
    loop.advance(30)
    run_suspended(loop, 55)
    loop.advance(28.9)
    assert loop.recorder.moods() == []
    loop.advance(0.1)
    assert loop.recorder.moods() == ["empty"]
    assert read_to_end(client) == b""


def test_a_late_select_is_no_suspension(loop: Loop) -> None:
    """A busy machine must not make the limits longer."""
    loop.connect()
    for _ in range(10):
        run_suspended(loop, 0.75)
    loop.advance(60 - 10 * 1.75)
    assert loop.recorder.moods() == ["empty"]


@pytest.mark.parametrize("seconds", [55, 3_600])
def test_after_a_suspension_a_waiting_websocket_is_asked_for_a_pong(
    loop: Loop, seconds: float
) -> None:
    """It is not closed before it could answer."""
    client = loop.client("ws")
    client.send(handshake("waits", "one"))
    loop.pump()
    for _ in range(4):
        for _ in range(10):  # during which no Ping was sent
            run_suspended(loop, seconds)
        loop.advance(PING_SECONDS)
        client.send_wire(frame(PONG))
        loop.pump()
        assert loop.server.snapshot().waiting_clients == 1
    partner = loop.client("ws")
    partner.send(handshake("waits", "other"))
    assert client.receive(3) == partner.receive(3) == b"ok\n"
    assert client.pings


def test_a_suspension_does_not_count_as_time_for_a_stop(loop: Loop) -> None:
    one, _ = loop.pair()
    stuff(loop, one)
    loop.server.ending.stop()
    run_suspended(loop, 55)
    assert loop.server.phase is ServerPhase.STOPPING_BYTES
    loop.advance(0.9)
    assert loop.server.phase is ServerPhase.STOPPING_BYTES
    loop.advance(0.1)
    assert loop.server.phase is ServerPhase.OVER


# The stop.


def test_a_stop_ends_all_clients_with_the_right_mood(loop: Loop) -> None:
    clients = [*loop.pair(), loop.connect(), loop.connect()]
    clients[-1].sendall(handshake())
    loop.pump()
    loop.server.ending.stop()
    loop.pump()
    assert sorted(loop.recorder.moods()) == ["empty", "happy", "lonely"]
    assert [read_to_end(client) for client in clients] == [b""] * 4
    assert loop.server.phase is ServerPhase.OVER
    assert loop.server.connections == set()


def test_a_stop_closes_the_listeners(loop: Loop, listening: ListeningSocket) -> None:
    listening.new_client()
    loop.pump()
    loop.server.ending.stop()
    loop.pump()
    with pytest.raises(ConnectionRefusedError):
        listening.new_client()


def test_a_stop_closes_a_listener_that_is_paused(loop: Loop, listening: ListeningSocket) -> None:
    leaver = listening.new_client()
    loop.pump()
    listening.refusals = [errno.EMFILE]
    listening.new_client()
    loop.pump()
    loop.server.ending.stop()
    leaver.close()
    loop.advance(1)
    assert loop.server.phase is ServerPhase.OVER


def test_queued_bytes_get_two_seconds(loop: Loop) -> None:
    one, _ = loop.pair()
    stuff(loop, one)
    loop.server.ending.stop()
    loop.advance(1.75)
    assert loop.server.phase is not ServerPhase.OVER
    loop.advance(0.25)
    assert loop.server.phase is ServerPhase.OVER
    assert loop.server.connections == set()
    assert loop.recorder.moods() == ["happy"]


def test_queued_bytes_get_no_longer_than_they_need(loop: Loop) -> None:
    """Bytes that had reached the relay's kernel are delivered too, although not read yet."""
    one, other = loop.pair()
    sent = stuff(loop, one)
    assert sent > loop.server.snapshot().current().incomplete_bytes
    loop.server.ending.stop()
    loop.pump()
    assert loop.server.phase is not ServerPhase.OVER
    size = 0
    while part := other.recv(1 << 16):
        size += len(part)
        loop.pump()
    assert size == sent
    assert loop.server.phase is ServerPhase.OVER


def test_a_stop_does_not_wait_for_a_pair_that_goes_on(loop: Loop) -> None:
    """Bytes that come after the signal may be lost."""
    one, other = loop.pair()
    one.sendall(b"before")
    loop.server.ending.stop()
    one.sendall(b"after")
    loop.pump()
    assert read_to_end(other).startswith(b"before")
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER


@pytest.mark.parametrize("has_all", [True, False], ids=["acknowledged", "not acknowledged"])
def test_a_stop_waits_for_a_lingering_connection_until_it_has_everything(
    loop: Loop, has_all: bool
) -> None:
    client = loop.connect()
    client.sendall(b"junk\n")
    loop.pump()
    if has_all:
        assert read_to_end(client) == b"bad handshake\n"
    loop.server.ending.stop()
    loop.pump()
    assert (loop.server.phase is ServerPhase.OVER) == has_all
    loop.advance(2)
    assert loop.server.phase is ServerPhase.OVER


def test_a_stop_waits_for_the_records(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(loop.recorder), "finished", False)
    loop.server.ending.stop()
    loop.advance(5)
    assert loop.server.phase is not ServerPhase.OVER
    monkeypatch.setattr(type(loop.recorder), "finished", True)
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER


def test_a_stop_waits_ten_seconds_for_the_records(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(loop.recorder), "finished", False)
    loop.server.ending.stop()
    loop.pump()
    loop.advance(9.75)
    assert loop.server.phase is not ServerPhase.OVER
    loop.advance(0.25)
    assert loop.server.phase is ServerPhase.OVER


def test_the_last_calls_of_the_recorder(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.pair()
    told: list[object] = []
    monkeypatch.setattr(loop.server.rendezvous, "record", lambda record: told.append(record.mood))
    monkeypatch.setattr(loop.recorder, "update", lambda current: told.append(current[2:]))
    monkeypatch.setattr(loop.recorder, "stop", lambda: told.append("stop"))
    loop.server.ending.stop()
    loop.pump()
    assert told == ["happy", (0, 0, 0), "stop"]


# A drain: a stop in which pairs run on.

DRAIN_SECONDS = 3_000


@pytest.fixture
def draining(loop: Loop, caplog: pytest.LogCaptureFixture) -> Loop:
    """Return a relay that drains at a signal."""
    caplog.set_level(logging.INFO)
    loop.restart(drain_seconds=DRAIN_SECONDS)
    return loop


def meet(loop: Loop, kind: str = "unix") -> tuple[Client, Client]:
    """Return a pair of two clients of this kind."""
    return loop.meet(kind, kind)


def end(loop: Loop, *clients: Client) -> None:
    for client in clients:
        client.close()
    loop.pump()


def exchange(pair: tuple[Client, Client], data: bytes) -> None:
    """Send data both ways through a pair."""
    one, other = pair
    one.send(data)
    assert digest(other.receive(len(data))) == digest(data)
    other.send(data[::-1])
    assert digest(one.receive(len(data))) == digest(data[::-1])


@pytest.mark.parametrize(
    "kinds", [("unix", "unix"), ("unix", "ws-unix"), ("ws-unix", "ws-unix")], ids="-".join
)
def test_a_pair_runs_on_and_its_end_ends_the_drain(
    draining: Loop, caplog: pytest.LogCaptureFixture, kinds: tuple[str, str]
) -> None:
    pair = draining.meet(*kinds)
    data = random.Random(1).randbytes(300_000)
    exchange(pair, data)
    draining.signal()
    assert draining.server.phase is ServerPhase.DRAINING
    for _ in range(9):
        draining.advance(300)
        exchange(pair, data)
    pair[0].send(b"the last bytes")
    pair[0].half_close()
    assert draining.server.phase is ServerPhase.DRAINING
    draining.pump()
    assert draining.server.phase is ServerPhase.STOPPING_BYTES
    assert pair[1].read_to_end() == b"the last bytes" and pair[0].read_to_end() == b""
    draining.pump()
    assert draining.server.phase is ServerPhase.OVER
    (record,) = draining.recorder.records
    assert record[1:] == (2_700, 0, 20 * len(data) + 14, "happy")
    assert caplog.messages == [
        "SIGTERM: draining for at most 3000 s; pairs: 1",
        "all pairs have ended: the drain ends; pairs left: 0",
    ]


def test_the_last_pair_ends_the_drain(draining: Loop) -> None:
    first, second = meet(draining), meet(draining)
    draining.signal()
    end(draining, *first)
    exchange(second, b"data")
    assert draining.server.phase is ServerPhase.DRAINING
    end(draining, *second)
    assert draining.server.phase is ServerPhase.OVER


def test_a_pair_counts_until_its_queued_bytes_are_sent(draining: Loop) -> None:
    """The receiver of bytes that wait in the relay gets all of them, in spite of the time."""
    one, other = draining.pair()
    sent = stuff(draining, one)
    one.close()
    draining.signal()
    size = 0
    for _ in range(50):
        assert draining.server.phase is ServerPhase.DRAINING
        draining.advance(10)
        size += len(other.recv(1_000))
    while part := other.recv(1 << 16):
        size += len(part)
        draining.pump()
    assert size == sent
    assert draining.server.phase is ServerPhase.OVER


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_without_a_pair_a_drain_ends_at_once(
    draining: Loop, caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    waiting = draining.client("unix")
    waiting.send(handshake())
    draining.pump()
    draining.signal(number)
    assert draining.server.phase is ServerPhase.OVER
    assert waiting.read_to_end() == b""
    assert caplog.messages == [
        f"{number.name}: draining for at most 3000 s; pairs: 0",
        "all pairs have ended: the drain ends; pairs left: 0",
    ]


def test_the_time_of_a_drain_is_followed_by_an_ordinary_stop(
    draining: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(draining.recorder), "finished", False)
    one, other = draining.pair()
    draining.signal()
    story = [(draining.server.phase, draining.server.snapshot().drain_seconds_left)]
    draining.advance(DRAIN_SECONDS - 0.25)
    stuff(draining, one)
    for step in (0, 0.25, 1.75, 0.25, 9.75, 0.25):
        draining.advance(step)
        story.append((draining.server.phase, draining.server.snapshot().drain_seconds_left))
    assert story == [
        (ServerPhase.DRAINING, DRAIN_SECONDS),
        (ServerPhase.DRAINING, 0.25),
        (ServerPhase.STOPPING_BYTES, 0),
        (ServerPhase.STOPPING_BYTES, 0),
        (ServerPhase.STOPPING_RECORDS, 0),
        (ServerPhase.STOPPING_RECORDS, 0),
        (ServerPhase.OVER, 0),
    ]
    assert draining.recorder.moods() == ["happy"]
    assert caplog.messages[1:] == ["time is up: the drain ends; pairs left: 1"]
    other.close()


def test_the_second_signal_ends_the_drain_and_the_third_ends_all(
    draining: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    one, _ = draining.pair()
    stuff(draining, one)  # the stop would wait two seconds for these bytes
    phases = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT):
        draining.signal(number)
        draining.advance(1)
        phases.append(draining.server.phase)
    assert phases == [ServerPhase.DRAINING, ServerPhase.STOPPING_BYTES, ServerPhase.OVER]
    assert caplog.messages[1:] == [
        "SIGINT: the drain ends; pairs left: 1",
        "SIGQUIT: ending at once",
    ]


def test_a_second_signal_after_the_drain_loses_no_records(
    draining: Loop, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is for the drain, and may come just after this has ended by itself."""
    monkeypatch.setattr(type(draining.recorder), "finished", False)
    pair = meet(draining)
    draining.signal()
    end(draining, *pair)
    draining.signal()
    assert draining.server.phase is ServerPhase.STOPPING_RECORDS
    draining.signal()
    assert draining.server.phase is ServerPhase.OVER
    assert caplog.messages[2:] == ["SIGTERM: stopping already", "SIGTERM: ending at once"]


def test_a_drain_ends_only_clients_without_a_partner(draining: Loop) -> None:
    pairs = [meet(draining, kind) for kind in ("unix", "ws-unix")]
    new = draining.client("ws-unix")
    http = draining.client("ws-unix", upgrade=False)
    http.send_wire(b"GET / HTTP/1.1\r\n")
    waiting = [draining.client(kind) for kind in ("unix", "ws-unix")]
    for number, client in enumerate(waiting):
        client.send(handshake(f"waits{number}"))
    raw = draining.client("unix")
    raw.send(handshake("new")[:-1])
    draining.pump()
    draining.signal()
    for client in (new, *waiting):
        assert client.read_to_end(1001) == b""
    for client in (http, raw):
        assert read_to_end(client.sock) == b""
    assert sorted(draining.recorder.moods()) == ["empty", "empty", "lonely", "lonely"]
    for pair in pairs:
        exchange(pair, b"data")
    draining.signal()
    for client in pairs[1]:
        assert client.read_to_end(1001) == b""


def test_a_drain_closes_the_listeners(loop: Loop, tmp_path: Path) -> None:
    listening = ListeningSocket(tmp_path / "s")
    listener = Listener(listening, Endpoint("unix:listening", "unix"))
    loop.restart(listener, drain_seconds=DRAIN_SECONDS)
    pair = meet(loop)
    with listening.new_client() as client:
        loop.pump()
        loop.signal()
        with pytest.raises(ConnectionRefusedError):
            listening.new_client()
        listening.clients[-1].close()
        assert read_to_end(client) == b""
    exchange(pair, b"data")


@pytest.mark.parametrize("limit", ["idle_seconds", "stall_seconds"])
def test_a_limit_that_ends_a_pair_ends_the_drain(loop: Loop, limit: str) -> None:
    loop.restart(limits=Limits(**{limit: 80.0}), drain_seconds=DRAIN_SECONDS)
    one, _ = loop.pair()
    if limit == "stall_seconds":
        stuff(loop, one)
    loop.signal()
    for _ in range(60):
        loop.advance(1)
        assert loop.server.phase is ServerPhase.DRAINING
    for _ in range(40):
        loop.advance(1)
    assert loop.server.phase is ServerPhase.OVER


def test_a_client_that_lingers_goes_as_usual_during_a_drain(draining: Loop) -> None:
    """After its answer is acknowledged, a refused client gets five seconds to end."""
    refused, pair = draining.client("unix"), meet(draining)
    refused.send(b"junk\n")
    assert refused.read_to_end() == b"bad handshake\n"
    draining.signal()
    counts = []
    for _ in range(9):
        draining.advance(1)
        counts.append(len(draining.server.connections))
    assert counts[3] == 3 and counts[-1] == 2
    exchange(pair, b"data")


def test_a_client_that_lingers_does_not_prolong_a_drain(draining: Loop) -> None:
    """The stop after it waits for this client, as always."""
    pair, refused = meet(draining), draining.connect()
    refused.sendall(b"junk\n")  # its answer stays unread
    draining.pump()
    draining.signal()
    end(draining, *pair)
    assert draining.server.phase is ServerPhase.STOPPING_BYTES
    draining.advance(2)
    assert draining.server.phase is ServerPhase.OVER


def test_a_suspension_does_not_count_as_time_for_a_drain(draining: Loop) -> None:
    pair = meet(draining)
    draining.signal()
    draining.advance(1_000)
    run_suspended(draining, 10_000, timeout=0)
    assert draining.server.snapshot().drain_seconds_left == 2_000
    draining.advance(1_999)
    exchange(pair, b"data")
    draining.advance(1)
    assert draining.server.phase is ServerPhase.OVER


# A stop is linear in the number of connections.


class FakeConnection:
    """A connection without a partner, which counts how often it is asked."""

    session = type("FakeSession", (), {"pair": None})
    partner = None

    def __init__(self) -> None:
        self.has_everything = False
        self.asked = 0

    def is_delivered(self) -> bool:
        self.asked += 1
        return self.has_everything


def test_a_stop_asks_a_connection_until_it_has_everything(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All looks together ask each of them once, and each look asks one more."""
    monkeypatch.setattr(transit_relay, "is_delivered", FakeConnection.is_delivered)
    conns = [FakeConnection() for _ in range(2_000)]
    drain = StopProgress(conns)  # type: ignore[arg-type]
    looks = 0
    order = random.Random(1).sample(conns, len(conns))
    for conn in order:
        assert not drain.is_complete()
        looks += 1
        conn.has_everything = True
    assert drain.is_complete() and drain.is_complete()
    assert sum(conn.asked for conn in conns) <= looks + len(conns)


def test_a_turn_of_a_stop_looks_only_at_connections_that_were_served(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = [loop.pair() for _ in range(20)]
    for one, _ in pairs:
        stuff(loop, one)
    loop.server.ending.stop()
    for _ in range(3):
        loop.server.run_once(0)
    looked_at: list[int] = []
    asked: list[Connection] = []
    real_finished, real_delivered = StopProgress.finished_leavers, transit_relay.is_delivered

    def finished_leavers(self: StopProgress, conns: Any) -> Any:
        looked_at.append(len(conns))
        return real_finished(self, conns)

    def is_delivered(conn: Connection) -> bool:
        asked.append(conn)
        return real_delivered(conn)

    monkeypatch.setattr(StopProgress, "finished_leavers", finished_leavers)
    monkeypatch.setattr(transit_relay, "is_delivered", is_delivered)
    for _ in range(10):
        loop.server.run_once(0)
    assert looked_at == [0] * 10 and len(asked) == 10
    pairs[0][1].recv(1 << 20)
    loop.server.run_once(0)
    assert 0 < looked_at[-1] <= 2


# Signals.


@pytest.fixture
def run(loop: Loop) -> Iterator[Callable[..., None]]:
    """Return a function that runs the loop to its end, with signals sent to it."""
    numbers = {*STOP_SIGNALS, *IGNORED_SIGNALS}
    before = {number: signal.getsignal(number) for number in numbers}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    fired: list[bool] = []

    def give_up() -> None:
        fired.append(True)
        for number in (signal.SIGQUIT, signal.SIGTERM):
            os.kill(os.getpid(), number)

    watchdog = threading.Timer(TIMEOUT, give_up)

    def run(*numbers: int, blocked: int | None = None, fails: bool = False) -> None:
        told: list[str] = []

        def stopping() -> None:
            told.append("stopping")
            assert not fails, "injected"

        def ready() -> None:
            for number in numbers:
                signal.raise_signal(number)

        if blocked is not None:
            signal.pthread_sigmask(signal.SIG_BLOCK, {blocked})
        watchdog.start()
        loop.server.run(ready, stopping)
        assert not fired, "the loop did not end"
        assert told == ["stopping"]

    yield run
    watchdog.cancel()
    signal.set_wakeup_fd(-1)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_signal_stops_it(
    loop: Loop,
    run: Callable[..., None],
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    caplog.set_level(logging.INFO)
    loop.pair()
    run(number)
    assert loop.recorder.moods() == ["happy"]
    assert caplog.messages == [f"{number.name}: stopping"]


def test_two_signals_in_one_turn_end_a_drain(
    draining: Loop, run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    """The clock stands still, so its time is not up."""
    draining.pair()
    run(signal.SIGTERM, signal.SIGTERM)
    assert draining.recorder.moods() == ["happy"]
    assert caplog.messages == [
        "SIGTERM: draining for at most 3000 s; pairs: 1",
        "SIGTERM: the drain ends; pairs left: 1",
    ]


def test_a_fault_in_the_report_of_a_stop_is_contained(
    loop: Loop, run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    run(signal.SIGTERM, fails=True)
    (message,) = warnings(caplog)
    assert "\nAssertionError: injected" in message


def test_a_second_signal_ends_it_at_once(
    loop: Loop, run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one, _ = loop.pair()
    stuff(loop, one)  # the stop would wait two seconds for these bytes, and this clock stands still
    run(signal.SIGTERM, signal.SIGINT)
    assert caplog.messages == ["SIGTERM: stopping", "SIGINT: ending at once"]


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_that_was_blocked_at_the_start_stops_it(
    loop: Loop, run: Callable[..., None], caplog: pytest.LogCaptureFixture, number: signal.Signals
) -> None:
    caplog.set_level(logging.INFO)
    run(number, blocked=number)
    assert caplog.messages == [f"{number.name}: stopping"]


@pytest.mark.parametrize(
    "name",
    ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGIO", "SIGPWR"],
)
def test_a_signal_without_a_meaning_is_ignored(
    loop: Loop, run: Callable[..., None], caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    number = getattr(signal, name)
    handled: list[int] = []
    signal.signal(number, lambda number, _: handled.append(number))
    run(number, signal.SIGTERM)
    assert handled == []
    assert signal.getsignal(number) is signal.SIG_IGN
    assert caplog.messages == ["SIGTERM: stopping"]


def test_an_action_of_a_signal_runs_in_the_loop_and_its_faults_are_contained(
    loop: Loop, run: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    story: list[str] = []
    real_wait = loop.server._wait

    def wait(timeout: float) -> Any:
        story.append("wait")
        return real_wait(timeout)

    def fail() -> None:
        story.append("fails")
        raise AssertionError("injected")

    loop.server._wait = wait  # type: ignore[method-assign]
    loop.server.signals.actions[signal.SIGUSR1] = lambda: story.append("acts")
    loop.server.signals.actions[signal.SIGUSR2] = fail
    run(signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM)
    assert story[:3] == ["wait", "fails", "acts"]
    assert [message.splitlines()[-1] for message in warnings(caplog)] == [
        "AssertionError: injected"
    ]


# The self-check must be able to fail.


class World:
    """A pair with a backlog, a waiting client, a newcomer, and a lingering connection."""

    def __init__(self, loop: Loop) -> None:
        one, _ = loop.pair()
        stuff(loop, one)
        self.server = loop.server
        self.rendezvous = loop.server.rendezvous
        (self.queueing,) = (conn for conn in self.server.connections if conn.backlog)
        self.paired = self.queueing.session
        (self.pair,) = self.rendezvous.pairs
        client, self.waiter = loop.connect_both()
        client.sendall(handshake())
        self.newcomer = loop.connect_both()[1]
        loop.connect().sendall(b"junk\n")
        loop.pump()
        self.lingering = self.server.timers.linger_polls
        ((self.token, self.crowd),) = self.rendezvous.waiting.items()


CORRUPTIONS: dict[str, Callable[[World], tuple[object, str, object]]] = {
    "mask not registered": lambda w: (w.newcomer, "mask", EVENT_READ | EVENT_WRITE),
    "interest not registered": lambda w: (w.newcomer, "backlog", bytearray(b"x")),
    "registered but not ours": lambda w: (
        w.server,
        "connections",
        w.server.connections - {w.newcomer},
    ),
    "empty backlog": lambda w: (w.queueing, "backlog", bytearray()),
    "backlog too long": lambda w: (w.queueing, "backlog", bytearray(MAX_BACKLOG_BYTES + 1)),
    "partner not mutual": lambda w: (w.pair, "sessions", (w.paired, w.waiter.session)),
    "no pair": lambda w: (w.paired, "pair", None),
    "pair forgotten": lambda w: (w.rendezvous, "pairs", set()),
    "pair of a session that has not ended": lambda w: (w.pair, "sessions", (w.paired,)),
    "relaying without a pair": lambda w: (w.newcomer.session, "state", State.RELAYING),
    "waiter forgotten": lambda w: (w.rendezvous, "waiting", {}),
    "waiters counted wrong": lambda w: (w.rendezvous, "waiting_clients", 2),
    "waiter under another token": lambda w: (w.rendezvous, "waiting", {b"0" * 64: w.crowd}),
    "token without clients": lambda w: (w.rendezvous, "waiting", {w.token: w.crowd, b"": {}}),
    "waits in another state": lambda w: (w.waiter.session, "state", State.WAIT_HANDSHAKE),
    "waits without handshake": lambda w: (w.waiter.session, "handshake", None),
    "time limit of no connection": lambda w: (
        w.server.timers.silent,
        "_since",
        OrderedDict({"no connection": 0.0}),
    ),
    "flushing without a backlog": lambda w: (w.newcomer, "phase", Phase.FLUSHING),
    "ended but open": lambda w: (w.newcomer.session, "state", State.DONE),
    "lingering but never checked": lambda w: (w.lingering, "_since", OrderedDict()),
    "closed but not forgotten": lambda w: (w.newcomer, "phase", Phase.CLOSED),
    "unpolled but not queued": lambda w: (w.newcomer, "is_unpolled", True),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_self_check_notices(loop: Loop, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    world = World(loop)
    with monkeypatch.context() as patch:
        patch.setattr(*CORRUPTIONS[name](world))
        with pytest.raises(AssertionError):
            check_server(loop.server)
    check_server(loop.server)
