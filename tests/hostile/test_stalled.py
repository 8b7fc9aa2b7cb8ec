"""Clients that stop reading, or that stay without a use, until a time limit ends them.

The limits are real time here. The exact times are tested with a fake clock elsewhere.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from helpers import TIMEOUT, Client, handshake
from test_resets import KINDS, LEAST_BUFFER_BYTES, send_all_that_is_accepted
from watched import SharedScene

LIMIT_SECONDS = 3
BETWEEN = pytest.mark.parametrize(("kind", "partner"), [("tcp", "ws"), ("ws", "tcp")])


@pytest.fixture(scope="module")
def stall() -> Iterator[SharedScene]:
    """Return a relay with a stall limit alone."""
    shared = SharedScene("--stall-timeout", str(LIMIT_SECONDS))
    yield shared
    shared.close()


@pytest.fixture(scope="module")
def idle() -> Iterator[SharedScene]:
    """Return a relay with limits for clients that wait, and for pairs in which nothing moves."""
    limit = str(LIMIT_SECONDS)
    shared = SharedScene("--max-wait", limit, "--idle-timeout", limit)
    yield shared
    shared.close()


def check_limit(since: float) -> None:
    """Check that the limit has passed, and not much more.

    The last byte may have been taken a little before `since`.
    """
    elapsed = time.monotonic() - since
    print(f"ended after {elapsed:.2f} s, the limit is {LIMIT_SECONDS} s")
    assert 0.8 * LIMIT_SECONDS < elapsed < LIMIT_SECONDS + TIMEOUT


def patient(client: Client) -> Client:
    """Let a client wait longer than the limit."""
    client.sock.settimeout(LIMIT_SECONDS + 2 * TIMEOUT)
    return client


@pytest.mark.needs("--stall-timeout")
@BETWEEN
def test_a_partner_that_stops_reading(stall: SharedScene, kind: str, partner: str) -> None:
    """The pair ends. The sender gets an orderly end, and the partner what its kernel has."""
    with stall.stage() as scene:
        one = scene.relay.client(kind)
        other = scene.relay.client(partner, buffer_bytes=LEAST_BUFFER_BYTES)
        scene.relay.couple(one, other)
        began = time.monotonic()
        sent = send_all_that_is_accepted(one)
        assert patient(one).read_to_end() == b""
        check_limit(began)
        one.close()
        other.close()
        scene.books.add_range("happy", 1, sent)


@pytest.mark.needs("--stall-timeout")
@BETWEEN
def test_a_partner_that_reads_slowly(stall: SharedScene, kind: str, partner: str) -> None:
    """It takes something within each limit: the pair goes on for longer than the limit."""
    with stall.stage() as scene:
        one = scene.relay.client(kind)
        other = scene.relay.client(partner, buffer_bytes=LEAST_BUFFER_BYTES)
        scene.relay.couple(one, other)
        sent = send_all_that_is_accepted(one)
        received = 0
        for _ in range(6):
            time.sleep(LIMIT_SECONDS / 3)  # real time: the receiver is slow
            # More than its kernel's buffer, so that the relay's kernel is told of room.
            received += len(other.receive(16 * LEAST_BUFFER_BYTES))
        one.close()
        received += len(patient(other).read_to_end())
        other.close()
        assert sent >= received
        scene.books.add("happy", received)


@pytest.mark.needs("--stall-timeout")
@BETWEEN
def test_a_client_that_does_not_read_the_rest(stall: SharedScene, kind: str, partner: str) -> None:
    """It has ended its direction. The rest for it is flushed until the limit."""
    with stall.stage() as scene:
        one = scene.relay.client(kind)
        other = scene.relay.client(partner, buffer_bytes=LEAST_BUFFER_BYTES)
        scene.relay.couple(one, other)
        sent = send_all_that_is_accepted(one)
        began = time.monotonic()
        other.half_close()
        assert patient(one).read_to_end() == b""
        one.close()
        scene.books.add_range("happy", 1, sent)
        scene.checkpoint()  # it is closed
        check_limit(began)
        other.close()


@pytest.mark.needs("--max-wait", "--idle-timeout")
@KINDS
def test_a_client_that_waits_too_long(idle: SharedScene, kind: str) -> None:
    with idle.stage() as scene:
        client = scene.relay.client(kind)
        began = time.monotonic()
        client.send(handshake(scene.relay.new_token(), "one"))
        assert patient(client).read_to_end() == b""
        check_limit(began)
        client.close()
        scene.books.add("lonely")


@pytest.mark.needs("--max-wait", "--idle-timeout")
@BETWEEN
def test_a_pair_in_which_nothing_moves(idle: SharedScene, kind: str, partner: str) -> None:
    """Both get an orderly end. The transfers beside it go on: their bytes move."""
    with idle.stage() as scene:
        one, other = scene.relay.client(kind), scene.relay.client(partner)
        scene.relay.couple(one, other)
        one.send(b"something")
        assert other.receive(9) == b"something"
        began = time.monotonic()
        assert patient(one).read_to_end() == patient(other).read_to_end() == b""
        check_limit(began)
        one.close()
        other.close()
        scene.books.add("happy", 9)
