"""The loop: newcomers, deferred closing, the numbers of the moment, signals, and the stop."""

from __future__ import annotations

import errno
import logging
import os
import resource
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from selectors import EVENT_READ, EVENT_WRITE

import pytest
from helpers import TIMEOUT, Loop, handshake, read_to_end
from invariants import check_server

import transit_relay
from transit_relay import (
    MAX_BACKLOG_BYTES,
    Current,
    Limits,
    Listener,
    Server,
    ServerPhase,
    State,
)

BOTH_WAYS = True  # copied and spliced, see conftest.py


class Door(socket.socket):
    """A listening socket that gives an error for each number in `refusals`, then accepts."""

    def __init__(self, path: Path) -> None:
        super().__init__(socket.AF_UNIX)
        self.path = str(path)
        self.refusals: list[int] = []
        self.clients: list[socket.socket] = []
        self.bind(self.path)
        self.listen()

    def accept(self) -> tuple[socket.socket, object]:
        if self.refusals:
            number = self.refusals.pop(0)
            raise OSError(number, os.strerror(number))
        return super().accept()

    def knock(self) -> socket.socket:
        """A newcomer, whom nobody has accepted yet."""
        client = socket.socket(socket.AF_UNIX)
        self.clients.append(client)
        client.settimeout(TIMEOUT)
        client.connect(self.path)
        return client


@pytest.fixture
def door(loop: Loop, tmp_path: Path) -> Iterator[Door]:
    """Gives the loop a listener."""
    door = Door(tmp_path / "s")
    loop.server.close()
    listener = Listener(door, "door")
    loop.server = Server([listener], loop.recorder, Limits(), loop.clock, loop.wallclock)
    yield door
    for client in door.clients:
        client.close()


@pytest.fixture
def currents(loop: Loop) -> list[Current]:
    """All that is told of `current`."""
    told: list[Current] = []
    loop.recorder.update = told.append  # type: ignore[method-assign]
    return told


def stuff(loop: Loop, sender: socket.socket) -> int:
    """Send to one who does not read until the relay queues, and takes no more: so many bytes."""
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


def test_a_flood_of_newcomers_comes_in_by_and_by(
    loop: Loop, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transit_relay, "ACCEPTS_PER_WAKEUP", 2)
    for _ in range(5):
        door.knock()
    inside = []
    for _ in range(4):
        loop.server.run_once(0)
        inside.append(len(loop.server.connections))
    assert inside == [2, 4, 5, 5]


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_without_descriptors_newcomers_wait_a_second(
    loop: Loop, door: Door, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    loop.pump()
    door.refusals = [number]
    door.knock()
    loop.pump()
    assert warnings(caplog) == [f"newcomers have to wait: {os.strerror(number)}"]
    assert loop.server._selector.select(0) == []  # not busy, though somebody knocks ...
    assert loop.server._timeout() == 1  # ... and yet not asleep
    loop.advance(0.5)
    loop.pump()
    assert len(loop.server.connections) == 0
    loop.advance(0.5)
    loop.pump()
    assert len(loop.server.connections) == 1


def test_without_descriptors_until_somebody_leaves(loop: Loop, door: Door) -> None:
    leaver = door.knock()
    loop.pump()
    door.refusals = [errno.EMFILE]
    newcomer = door.knock()
    loop.pump()
    leaver.close()
    loop.pump()
    newcomer.sendall(b"junk\n")
    loop.pump()
    assert read_to_end(newcomer) == b"bad handshake\n"


def test_without_descriptors_for_long_is_said_once_a_minute(
    loop: Loop, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    door.refusals = [errno.EMFILE] * 100
    door.knock()
    loop.pump()
    for _ in range(59):
        loop.advance(1)
    assert len(warnings(caplog)) == 1
    loop.advance(1)
    assert len(warnings(caplog)) == 2


def test_the_real_limit_of_descriptors(loop: Loop, door: Door) -> None:
    door.knock()
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


def test_who_hung_up_before_we_came_is_skipped(
    loop: Loop, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    door.refusals = [errno.ECONNABORTED]
    door.knock()
    loop.server.run_once(0)
    assert len(loop.server.connections) == 1
    assert warnings(caplog) == []


def test_options_of_accepted_sockets(loop: Loop) -> None:
    """Of all: this one is there before the relay, as whoever makes systemd start it."""
    listening = socket.create_server(("127.0.0.1", 0))
    with socket.create_connection(listening.getsockname()):
        loop.server.close()
        listener = Listener(listening, "tcp")
        loop.server = Server([listener], loop.recorder, Limits(), loop.clock, loop.wallclock)
        loop.pump()
        (conn,) = loop.server.connections
        assert not conn.sock.getblocking()
        assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        assert conn.sock.getsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE)
        assert conn.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# Deferred closing.


def test_a_number_is_not_used_again_within_a_batch(
    loop: Loop, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One leaves and another comes in the same batch, which then names the first again."""
    leaver, old = loop.connect_both()
    loop.pump()
    leaver.close()
    newcomer = door.knock()
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


def test_who_has_the_number_of_a_dead_one_gets_none_of_its_events(loop: Loop) -> None:
    leaver, old = loop.connect_both()
    client, its = socket.socketpair()
    leaver.close()
    loop.pump()
    with client, its:
        new = loop.server.admit(socket.socket(fileno=os.dup2(its.fileno(), old.fd)))
        its.close()
        client.sendall(handshake())
        old.on_ready(EVENT_READ | EVENT_WRITE)
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
    loop.server.run_once(0)  # for who has lined up with bulk
    assert loop.server.connections == set()
    (record,) = loop.recorder.records
    assert (record.mood, record.total_bytes) == ("happy", 3)


def test_the_doomed_are_closed_at_the_end_of_the_turn_in_order(loop: Loop) -> None:
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


def test_the_partner_of_a_doomed_one_hears_of_it_in_the_same_turn(loop: Loop) -> None:
    one, other = loop.pair()
    conn = next(iter(loop.server.connections))
    conn.doom()
    loop.server.run_once(0)
    assert read_to_end(one) == read_to_end(other) == b""
    assert loop.recorder.moods() == ["happy"]


# The numbers of the moment.


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
    loop.server.stop()
    loop.pump()
    assert loop.recorder.records == []
    assert loop.server.snapshot().current()[2:] == (2, 0, size)
    loop.advance(2)
    assert [record.total_bytes for record in loop.recorder.records] == [size]
    assert loop.server.snapshot().current()[2:] == (0, 0, 0)


def test_rebooted_stays_and_updated_goes_on(loop: Loop) -> None:
    loop.advance(100.5)
    assert loop.server.snapshot().current()[:2] == (1_700_000_000, 1_700_000_100)


def test_current_is_told_every_half_minute_when_idle(
    loop: Loop, currents: list[Current], monkeypatch: pytest.MonkeyPatch
) -> None:
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


# The stop.


def test_a_stop_ends_everybody_with_the_right_mood(loop: Loop) -> None:
    clients = [*loop.pair(), loop.connect(), loop.connect()]
    clients[-1].sendall(handshake())
    loop.pump()
    loop.server.stop()
    loop.pump()
    assert sorted(loop.recorder.moods()) == ["empty", "happy", "lonely"]
    assert [read_to_end(client) for client in clients] == [b""] * 4
    assert loop.server.phase is ServerPhase.OVER
    assert loop.server.connections == set()


def test_a_stop_shuts_the_door(loop: Loop, door: Door) -> None:
    door.knock()
    loop.pump()
    loop.server.stop()
    loop.pump()
    with pytest.raises(ConnectionRefusedError):
        door.knock()


def test_a_stop_shuts_the_door_that_is_not_watched(loop: Loop, door: Door) -> None:
    leaver = door.knock()
    loop.pump()
    door.refusals = [errno.EMFILE]
    door.knock()
    loop.pump()
    loop.server.stop()
    leaver.close()
    loop.advance(1)
    assert loop.server.phase is ServerPhase.OVER


def test_queued_bytes_get_two_seconds(loop: Loop) -> None:
    one, _ = loop.pair()
    stuff(loop, one)
    loop.server.stop()
    loop.advance(1.75)
    assert loop.server.phase is not ServerPhase.OVER
    loop.advance(0.25)
    assert loop.server.phase is ServerPhase.OVER
    assert loop.server.connections == set()
    assert loop.recorder.moods() == ["happy"]


def test_queued_bytes_get_no_longer_than_they_need(loop: Loop) -> None:
    """Nor is anything lost that had reached the relay's kernel, though it was not read yet."""
    one, other = loop.pair()
    sent = stuff(loop, one)
    assert sent > loop.server.snapshot().current().incomplete_bytes
    loop.server.stop()
    loop.pump()
    assert loop.server.phase is not ServerPhase.OVER
    size = 0
    while part := other.recv(1 << 16):
        size += len(part)
        loop.pump()
    assert size == sent
    assert loop.server.phase is ServerPhase.OVER


def test_a_stop_does_not_wait_for_a_pair_that_goes_on(loop: Loop) -> None:
    """What comes after the signal is no longer owed to anybody."""
    one, other = loop.pair()
    one.sendall(b"before")
    loop.server.stop()
    one.sendall(b"after")
    loop.pump()
    assert read_to_end(other).startswith(b"before")
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER


@pytest.mark.parametrize("has_all", [True, False], ids=["acknowledged", "not acknowledged"])
def test_a_stop_waits_for_no_held_one_that_has_all(loop: Loop, has_all: bool) -> None:
    client = loop.connect()
    client.sendall(b"junk\n")
    loop.pump()
    if has_all:
        assert read_to_end(client) == b"bad handshake\n"
    loop.server.stop()
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER == has_all
    loop.advance(2)
    assert loop.server.phase is ServerPhase.OVER


def test_a_stop_waits_for_the_records(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(loop.recorder), "finished", False)
    loop.server.stop()
    loop.advance(5)
    assert loop.server.phase is not ServerPhase.OVER
    monkeypatch.setattr(type(loop.recorder), "finished", True)
    loop.pump()
    assert loop.server.phase is ServerPhase.OVER


def test_a_stop_waits_ten_seconds_for_the_records(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(loop.recorder), "finished", False)
    loop.server.stop()
    loop.pump()
    loop.advance(9.75)
    assert loop.server.phase is not ServerPhase.OVER
    loop.advance(0.25)
    assert loop.server.phase is ServerPhase.OVER


def test_the_last_that_the_recorder_hears(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    loop.pair()
    told: list[object] = []
    monkeypatch.setattr(loop.server.rendezvous, "record", lambda record: told.append(record.mood))
    monkeypatch.setattr(loop.recorder, "update", lambda current: told.append(current[2:]))
    monkeypatch.setattr(loop.recorder, "stop", lambda: told.append("stop"))
    loop.server.stop()
    loop.pump()
    assert told == ["happy", (0, 0, 0), "stop"]


# Signals.


@pytest.fixture
def run(loop: Loop) -> Iterator[Callable[..., list[int]]]:
    """Send signals to the loop and run it to its end. Gives those that it had no handler for."""
    unhandled: list[int] = []

    def note(number: int, _: object) -> None:
        unhandled.append(number)

    def give_up(*_: object) -> None:
        raise AssertionError("it does not end")

    def run(*numbers: int) -> list[int]:
        told: list[str] = []

        def ready() -> None:
            for number in numbers:
                os.kill(os.getpid(), number)

        loop.server.run(ready, stopping=lambda: told.append("stopping"))
        assert told == ["stopping"]
        return unhandled

    handlers = {signal.SIGTERM: note, signal.SIGINT: note, signal.SIGHUP: note}
    handlers[signal.SIGALRM] = give_up
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT)
    yield run
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it(
    loop: Loop,
    run: Callable[..., list[int]],
    caplog: pytest.LogCaptureFixture,
    number: signal.Signals,
) -> None:
    caplog.set_level(logging.INFO)
    loop.pair()
    run(number)
    assert loop.recorder.moods() == ["happy"]
    assert caplog.messages == [f"{number.name}: stopping"]


def test_a_second_signal_ends_it_at_once(
    loop: Loop, run: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    one, _ = loop.pair()
    stuff(loop, one)  # it would wait for these two seconds, and this clock stands still
    run(signal.SIGTERM, signal.SIGINT)
    assert caplog.messages == ["SIGTERM: stopping", "SIGINT again: ending at once"]


def test_a_hang_up_signal_is_ignored(loop: Loop, run: Callable[..., list[int]]) -> None:
    assert run(signal.SIGHUP, signal.SIGTERM) == []


# The self-check must be able to fail.


class World:
    """A pair with a backlog, one waiting, one without handshake: and all their books."""

    def __init__(self, loop: Loop) -> None:
        one, _ = loop.pair()
        stuff(loop, one)
        self.server = loop.server
        self.rendezvous = loop.server.rendezvous
        (self.queueing,) = (conn for conn in self.server.connections if conn.backlog)
        self.paired = self.queueing.session
        client, self.waiter = loop.connect_both()
        client.sendall(handshake())
        self.newcomer = loop.connect_both()[1]
        loop.pump()
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
    "partner not mutual": lambda w: (w.paired, "partner", w.waiter.session),
    "no partner": lambda w: (w.paired, "partner", None),
    "pair forgotten": lambda w: (w.rendezvous, "paired", {w.paired}),
    "paired and waiting": lambda w: (
        w.rendezvous,
        "paired",
        w.rendezvous.paired | {w.waiter.session},
    ),
    "waiter forgotten": lambda w: (w.rendezvous, "waiting", {}),
    "waiter twice": lambda w: (w.rendezvous, "waiting", {w.token: w.crowd * 2}),
    "waiter under another token": lambda w: (w.rendezvous, "waiting", {b"0" * 64: w.crowd}),
    "token nobody waits under": lambda w: (w.rendezvous, "waiting", {w.token: w.crowd, b"": []}),
    "waits in another state": lambda w: (w.waiter.session, "state", State.WAIT_HANDSHAKE),
    "time limit for nobody": lambda w: (w.server._timers.quiet, "_due", {"nobody": 0.0}),
    "waits without handshake": lambda w: (w.waiter.session, "handshake", None),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_self_check_notices(loop: Loop, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    world = World(loop)
    with monkeypatch.context() as patch:
        patch.setattr(*CORRUPTIONS[name](world))
        with pytest.raises(AssertionError):
            check_server(loop.server)
    check_server(loop.server)
