"""Time limits: each is enforced in time, on the right clients, and closed ones are forgotten."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from helpers import PING, TIMEOUT, Client, Loop, frame, handshake, read_to_end

from transit_relay import Limits, Phase, Sweep, TimeLimit


def connect(loop: Loop, seconds: float = 60) -> socket.socket:
    """A client of a relay with that handshake limit."""
    loop.restart(limits=Limits(handshake_seconds=seconds, stall_seconds=0))
    return loop.connect()


def test_the_default_is_a_minute() -> None:
    assert Limits().handshake_seconds == 60


@pytest.mark.parametrize("seconds", [1, 60, 0.5])
def test_no_handshake_in_time(loop: Loop, seconds: float) -> None:
    client = connect(loop, seconds)
    loop.advance(seconds)
    assert loop.recorder.moods() == ["empty"]
    assert loop.recorder.records[0].total_time == seconds
    assert read_to_end(client) == b""


def test_a_handshake_just_in_time(loop: Loop) -> None:
    client = connect(loop)
    loop.advance(59.9)
    assert loop.recorder.moods() == []
    client.sendall(handshake())
    loop.advance(0.1)  # ready in the same turn: it counts
    assert loop.recorder.moods() == []
    assert loop.server.snapshot().current().waiting_tokens == 1


@pytest.mark.parametrize("early", [0, 1, -1], ids=["all of it", "its tail", "its newline"])
def test_a_handshake_that_comes_too_late(loop: Loop, early: int) -> None:
    client = connect(loop)
    client.sendall(handshake()[:early])
    loop.advance(60)
    client.sendall(handshake()[early:])
    loop.pump()
    assert loop.recorder.moods() == ["empty"]
    assert loop.server.snapshot().current().waiting_tokens == 0
    assert read_to_end(client) == b""


def test_trickled_bytes_do_not_extend_it(loop: Loop) -> None:
    client = connect(loop)
    for byte in handshake()[:59]:
        loop.advance(1)
        client.sendall(bytes([byte]))
        loop.pump()
    assert loop.recorder.moods() == []
    loop.advance(1)
    assert loop.recorder.moods() == ["empty"]
    assert read_to_end(client) == b""


def test_each_client_has_its_own_minute(loop: Loop) -> None:
    early = connect(loop)
    loop.advance(30)
    late = loop.connect()
    loop.advance(30)
    assert loop.recorder.moods() == ["empty"]
    assert read_to_end(early) == b""
    loop.advance(29.9)
    late.sendall(handshake())
    loop.advance(0.1)
    assert loop.recorder.moods() == ["empty"]


def test_waiting_has_no_limit(loop: Loop) -> None:
    connect(loop).sendall(handshake())
    loop.pump()
    loop.advance(1_000_000)
    assert loop.recorder.moods() == []
    assert loop.server.snapshot().current().waiting_tokens == 1


def test_a_silent_pair_goes_on(loop: Loop) -> None:
    one, other = loop.pair()
    loop.advance(1_000_000)
    one.sendall(b"still here")
    loop.pump()
    assert other.recv(100) == b"still here"


def test_zero_switches_it_off(loop: Loop) -> None:
    client = connect(loop, 0)
    loop.advance(1_000_000)
    client.sendall(handshake())
    loop.pump()
    assert loop.recorder.moods() == []
    assert loop.server.snapshot().current().waiting_tokens == 1


def test_the_loop_sleeps_until_the_limit(loop: Loop) -> None:
    loop.pump()
    loop.advance(1)
    connect(loop, 7)
    loop.pump()
    assert loop.server._timeout() == 7


def test_lingering_connections_are_checked_once_a_second(loop: Loop) -> None:
    loop.connect().sendall(b"junk\n")
    loop.pump()
    assert loop.server._timeout() == 1


@pytest.mark.parametrize("sent", [b"", b"junk\n", handshake()], ids=["empty", "junk", "waiting"])
def test_a_client_that_is_gone_is_forgotten(loop: Loop, sent: bytes) -> None:
    client = loop.connect()
    client.sendall(sent)
    loop.pump()
    client.close()
    loop.pump()
    assert_no_limit_runs(loop)


def test_a_pair_that_is_gone_is_forgotten(loop: Loop) -> None:
    one, other = loop.pair()
    one.close()
    loop.pump()
    assert loop.server.timers.linger_polls.next_due() < float("inf")  # the client that stayed
    other.close()
    loop.pump()
    assert_no_limit_runs(loop)


def test_a_client_that_was_refused_is_forgotten(loop: Loop) -> None:
    loop.connect()
    loop.advance(60)
    for _ in range(10):  # it lingers, and is closed then
        loop.advance(1)
    assert loop.server.connections == set()
    assert_no_limit_runs(loop)


def assert_no_limit_runs(loop: Loop) -> None:
    for queue in loop.server.timers._queues:
        assert not set(queue.connections()) and queue.next_due() == float("inf")


def test_limits_expire_in_the_order_of_their_starts() -> None:
    limit = TimeLimit(10)
    limit.start("a", 0)
    limit.start("b", 1)
    limit.start("c", 2)
    limit.start("a", 3)  # again: it is the last one now
    limit.cancel("c")
    limit.cancel("never started")
    assert limit.next_due() == 11
    assert limit.take_expired(10.9) == []
    assert limit.take_expired(13) == ["b", "a"]
    assert limit.next_due() == float("inf")


def test_a_limit_of_zero_never_expires() -> None:
    limit = TimeLimit(0)
    limit.start("a", 0)
    assert limit.next_due() == float("inf")
    assert not set(limit.connections())


# Waiting, idle and stalled clients.


def test_a_client_waits_for_a_limited_time(loop: Loop) -> None:
    """The time begins with the whole handshake."""
    loop.restart(limits=Limits(wait_seconds=30))
    client = loop.connect()
    loop.advance(20)
    client.sendall(handshake())
    loop.pump()
    loop.advance(29.9)
    assert loop.recorder.moods() == []
    loop.advance(0.1)
    assert loop.recorder.moods() == ["lonely"] and read_to_end(client) == b""
    assert loop.server.limits.reached.counts == {"--max-wait": 1}


def test_a_pair_is_not_ended_for_the_time_that_it_waited(loop: Loop) -> None:
    loop.restart(limits=Limits(wait_seconds=30))
    one, other = loop.pair()
    loop.advance(100)
    one.sendall(b"still here")
    loop.pump()
    assert other.recv(100) == b"still here"


def seconds_until(loop: Loop, happened: Callable[[], bool], most: int) -> int:
    """Advance in steps of a second until something happened. Return how many steps."""
    for seconds in range(most + 1):
        if happened():
            return seconds
        loop.advance(1)
    raise AssertionError("it did not happen in time")


def test_an_idle_pair_is_ended(loop: Loop) -> None:
    loop.restart(limits=Limits(idle_seconds=80, stall_seconds=0))
    one, other = loop.pair()
    for _ in range(10):
        for _ in range(70):
            loop.advance(1)
        one.sendall(b"x")
        loop.pump()
        assert other.recv(100) == b"x"
    assert loop.recorder.moods() == []
    one.setblocking(False)
    seconds = seconds_until(loop, lambda: bool(loop.recorder.records), 100)
    assert 79 <= seconds <= 91
    assert loop.recorder.moods() == ["happy"]
    assert loop.server.limits.reached.counts == {"--idle-timeout": 1}


def test_a_pair_whose_receiver_is_slow_is_not_idle(loop: Loop) -> None:
    """The sender is not read meanwhile, so no byte is counted."""
    loop.restart(limits=Limits(idle_seconds=80, stall_seconds=0))
    one, other = loop.meet("unix", "unix")
    send_until_stalled(loop, one)
    for _ in range(200):
        loop.advance(1)
    assert loop.recorder.moods() == [] and other.conn is not None and other.conn.backlog


def test_a_pair_with_bytes_in_the_kernel_is_not_idle(loop: Loop) -> None:
    loop.restart(limits=Limits(idle_seconds=80, stall_seconds=0))
    one, other = loop.meet("unix", "unix")
    one.send(b"unread")
    for _ in range(200):
        loop.advance(1)
    assert loop.recorder.moods() == []
    assert other.receive(6) == b"unread"
    assert 79 <= seconds_until(loop, lambda: bool(loop.recorder.records), 100) <= 91


def test_pings_do_not_keep_an_idle_pair(loop: Loop) -> None:
    loop.restart(limits=Limits(idle_seconds=80, stall_seconds=0))
    one, other = loop.meet("ws", "ws")
    seconds = seconds_until(loop, lambda: bool(loop.recorder.records), 100)
    assert 79 <= seconds <= 91
    assert one.read_to_end() == other.read_to_end() == b""
    assert one.close_code == other.close_code == 1000


# The timers of TCP do not follow the test's clock: see tests/hostile/test_stalled.py.
KINDS = pytest.mark.parametrize("kind", ["unix", "ws-unix"])


def send_until_stalled(loop: Loop, client: Client) -> int:
    """Send until the relay reads no more. Return how many bytes it took."""
    (wire,) = client.encode(bytes(1 << 16))
    client.sock.setblocking(False)
    sent = 0
    while True:
        try:
            sent += client.sock.send(wire)
        except BlockingIOError:
            loop.pump()
            try:
                sent += client.sock.send(wire)
            except BlockingIOError:
                return sent


@KINDS
def test_a_receiver_that_takes_nothing_ends_its_pair(loop: Loop, kind: str) -> None:
    loop.restart(limits=Limits(stall_seconds=80))
    one, other = loop.meet("unix", kind)
    send_until_stalled(loop, one)
    assert other.conn is not None and other.conn.backlog is not None
    stalled = other.conn
    seconds = seconds_until(loop, lambda: stalled.phase is Phase.CLOSED, 100)
    assert 80 <= seconds <= 91
    loop.pump()
    assert loop.recorder.moods() == ["happy"]
    one.sock.settimeout(TIMEOUT)
    assert one.read_to_end() == b""
    assert loop.server.limits.reached.counts == {"--stall-timeout": 1}


@KINDS
def test_a_receiver_that_takes_a_little_goes_on(loop: Loop, kind: str) -> None:
    loop.restart(limits=Limits(stall_seconds=80))
    one, other = loop.meet("unix", kind)
    send_until_stalled(loop, one)
    for _ in range(5):
        for _ in range(70):
            loop.advance(1)
        assert loop.recorder.moods() == []
        other.sock.recv(40_000 if kind == "unix" else 1 << 20)
        loop.pump()
    assert loop.recorder.moods() == []


@pytest.mark.parametrize(
    ("sent", "moods"),
    [(b"junk\n", ["errory"]), (b"GET / HTTP/1.0\r\n\r\n", []), (handshake() + b"x", ["impatient"])],
    ids=["bad handshake", "HTTP", "impatient"],
)
def test_a_refused_client_that_does_not_read_is_closed(
    loop: Loop, sent: bytes, moods: list[str]
) -> None:
    """Over a unix socket, unread bytes count as unacknowledged."""
    loop.restart(limits=Limits(stall_seconds=80))
    client = loop.connect()
    client.sendall(sent)
    loop.pump()
    assert len(loop.server.connections) == 1
    seconds = seconds_until(loop, lambda: not loop.server.connections, 100)
    assert 80 <= seconds <= 91
    assert loop.recorder.moods() == moods


def test_a_client_that_waits_and_does_not_read_its_pings_is_closed(loop: Loop) -> None:
    loop.restart(limits=Limits(stall_seconds=50))
    client = loop.client("ws-unix")
    client.send(handshake())
    assert client.conn is not None
    while client.conn.backlog is None:  # answer Pings that it never reads
        client.sock.sendall(ping_flood())
        loop.pump()
    seconds_until(loop, lambda: not loop.server.connections, 70)
    assert loop.recorder.moods() == ["lonely"]


def ping_flood() -> bytes:
    """Return many Pings, as a client sends them."""
    return b"".join(frame(PING, bytes(125)) for _ in range(100))


def test_without_the_limit_a_stalled_pair_stays(loop: Loop) -> None:
    loop.restart(limits=Limits(stall_seconds=0))
    one, _ = loop.meet("unix", "unix")
    send_until_stalled(loop, one)
    for _ in range(1000):
        loop.advance(10)
    assert loop.recorder.moods() == []


def test_a_suspension_does_not_count_as_a_stall(loop: Loop) -> None:
    loop.restart(limits=Limits(stall_seconds=80))
    one, _ = loop.meet("unix", "unix")
    send_until_stalled(loop, one)
    for _ in range(50):
        loop.advance(1)

    def late(timeout: float) -> list[object]:
        if timeout:
            loop.clock.advance(1_000)
        return []

    assert loop.server._selector is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.server._selector, "select", late)
        loop.server.run_once(1)
    for _ in range(20):
        loop.advance(1)
    assert loop.recorder.moods() == []
    seconds_until(loop, lambda: bool(loop.recorder.moods()), 30)


def test_a_sweep_visits_all_in_its_shares() -> None:
    connections = set(range(10))
    sweep = Sweep(connections, 4)  # type: ignore[arg-type]
    seen = [sweep.take() for _ in range(4)]
    assert sorted(one for share in seen for one in share) == sorted(connections)
    assert max(map(len, seen)) == 3
    connections.clear()
    assert sweep.take() == [] == sweep.take()
