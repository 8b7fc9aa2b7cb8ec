"""Time limits: each is enforced in time, on the right clients, and closed ones are forgotten."""

from __future__ import annotations

import socket

import pytest
from helpers import Loop, handshake, read_to_end

from transit_relay import Limits, TimeLimit


def connect(loop: Loop, seconds: float = 60) -> socket.socket:
    """A client of a relay with that handshake limit."""
    loop.restart(limits=Limits(handshake_seconds=seconds))
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
    assert loop.server._timers.linger_polls.next_due() < float("inf")  # the client that stayed
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
    for queue in loop.server._timers._queues:
        assert not queue.connections() and queue.next_due() == float("inf")


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


def test_a_postponed_limit_expires_later() -> None:
    limit = TimeLimit(10)
    limit.start("a", 0)
    limit.postpone(5)
    limit.start("b", 6)
    assert limit.take_expired(14.9) == []
    assert limit.take_expired(15) == ["a"]
    assert limit.take_expired(16) == ["b"]


def test_a_limit_of_zero_never_expires() -> None:
    limit = TimeLimit(0)
    limit.start("a", 0)
    assert limit.next_due() == float("inf")
    assert not limit.connections()
