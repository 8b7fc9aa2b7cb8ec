"""A gateway in this thread: its dials, reloads, limits and end, and what its operator sees."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import signal
import socket
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
from gateways import GatewayLoop, transit_relay_gateway
from helpers import Client, Loop, digest, handshake, is_readable
from test_gateway import (
    KINDS,
    LINE,
    Make,
    MakeBoth,
    both,
    checked,
    end_of,
    failures,
    forwarding,
)
from test_status import PATHS, Room
from transit_relay_gateway import DIAL_CHECK_SECONDS, DIAL_SECONDS, DIALS

from transit_relay import (
    OK,
    PING_SECONDS,
    UNHEALTHY_SECONDS,
    Limits,
    ServerPhase,
    open_descriptors,
    place_server,
)

SECRET_TOKEN, SECRET_SIDE, SECRET_ADDRESS = "5d" * 32, "51de" * 4, "192.0.2.77"
SECRET_LINE = handshake(SECRET_TOKEN, SECRET_SIDE)
UNREACHABLE = "no connection to the relay behind"


@pytest.fixture
def make() -> Iterator[Make]:
    with checked() as stack:
        yield partial(forwarding, stack)


@pytest.fixture
def make_both() -> Iterator[MakeBoth]:
    with checked() as stack:
        yield partial(both, stack)


def is_unreachable(room: Room) -> bool:
    """Return whether /healthz reports that dials fail. (When the clock moves, the loop is late.)"""
    return UNREACHABLE in room.health()[1]


# Dials.


@KINDS
@pytest.mark.parametrize("behind", ["refusing", "gone"])
def test_if_a_connection_is_refused_a_client_may_try_again(
    make: Make, caplog: pytest.LogCaptureFixture, kind: str, behind: str
) -> None:
    """With TCP, `connect` fails later. With a unix socket it fails at once."""
    loop = make("refusing" if behind == "refusing" else "unix")
    if behind == "gone":
        loop.behind[0].close()
    for _ in range(2):
        client = loop.client(kind)
        client.send(LINE)
        assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 2}
    assert caplog.messages.count(f"{UNREACHABLE}: Connection refused") == 1


@KINDS
@pytest.mark.parametrize("first", ["refusing", "hanging"])
def test_a_second_address_is_dialled(make: Make, kind: str, first: str) -> None:
    loop = make(first, "tcp")
    client = loop.client(kind)
    client.send(LINE + b"early")
    loop.pump()
    if first == "hanging":
        loop.advance(DIAL_SECONDS - DIAL_CHECK_SECONDS)
        assert not is_readable(loop.behind[1].sock)
        loop.advance(DIAL_CHECK_SECONDS)
    relay = loop.accept(1)
    assert relay.receive(len(LINE) + 5) == LINE + b"early"
    relay.send(OK)
    assert client.receive(3) == OK
    assert failures(loop) == {}


def test_the_address_that_works_is_dialled_until_it_fails(make: Make) -> None:
    loop = make("refusing", "tcp")
    loop.forward(place=1)
    loop.behind[0].sock.listen()
    loop.forward(place=1)
    loop.behind[1].close()
    loop.forward(place=0)
    loop.forward(place=0)


def test_the_address_that_works_is_kept_over_a_reload(make: Make) -> None:
    loop = make("refusing", "tcp")
    loop.forward(place=1)
    loop.behind[0].sock.listen()
    loop.reload()
    loop.forward(place=1)


def test_one_other_address_after_a_reload_is_dialled(make: Make) -> None:
    """There is one address before the reload, and another one after it."""
    loop = make("hanging")
    client = loop.client()
    client.send(LINE)
    loop.reload_to("tcp")
    loop.advance(DIAL_SECONDS)
    relay = loop.accept(0)
    relay.send(OK)
    assert client.receive(3) == OK


@KINDS
def test_a_client_that_is_evicted_during_its_dial_frees_both_places(make: Make, kind: str) -> None:
    loop = make("hanging", limits=Limits(max_connections=4))
    clients = [loop.client(kind) for _ in range(2)]
    for number, client in enumerate(clients):
        client.send(handshake(f"token{number}"))
    loop.pump()
    assert len(loop.server.connections) == 4
    newcomer = loop.client(kind)
    newcomer.send(LINE)
    loop.pump()
    assert end_of(clients[0], 1013) == b""
    newcomers = [one for one in loop.server.connections if one.session.is_waiting]
    assert len(newcomers) == 2  # the second client and the newcomer
    assert loop.server.rendezvous.waiting_clients == 2


@pytest.mark.parametrize("first", ["refusing", "hanging"])
def test_an_address_that_fails_several_clients_is_left_once(make: Make, first: str) -> None:
    """Their dials are under way at the same time."""
    loop = make(first, "tcp")
    clients = [loop.client() for _ in range(4)]
    for number, client in enumerate(clients):
        client.send(handshake(f"token{number}"))
    loop.pump()
    loop.advance(DIAL_SECONDS)
    for relay in [loop.accept(1) for _ in clients]:
        relay.send(OK)
    assert [client.receive(3) for client in clients] == [OK] * 4
    assert failures(loop) == {}


def test_two_addresses_are_dialled_for_one_client(make: Make) -> None:
    """The next client has the third one."""
    loop = make("refusing", "refusing", "tcp")
    assert DIALS == 2
    client = loop.client("ws")
    client.send(LINE)
    assert end_of(client, 1013) == b""
    loop.forward(place=2)


def test_if_no_address_accepts_in_time_a_client_may_try_again(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    loop = make("hanging", "hanging")
    client = loop.client("ws")
    client.send(LINE)
    loop.pump()
    loop.advance(DIAL_SECONDS)
    loop.advance(DIAL_SECONDS - DIAL_CHECK_SECONDS)
    assert client.receive_now() == b"" and client.close_code is None
    loop.advance(DIAL_CHECK_SECONDS)
    assert end_of(client, 1013) == b""
    assert f"{UNREACHABLE}: Connection timed out" in caplog.messages


@KINDS
@pytest.mark.parametrize("is_reloaded", [False, True])
def test_a_full_queue_is_tried_again_every_second(
    make: Make, caplog: pytest.LogCaptureFixture, kind: str, is_reloaded: bool
) -> None:
    """Each time for all dials: the queue has room for one more."""
    loop = make("full")
    clients = [loop.client(kind) for _ in range(2)]
    for number, client in enumerate(clients):
        client.send(handshake(f"token{number}") + b"early")
    loop.advance(DIAL_CHECK_SECONDS)
    if is_reloaded:
        loop.reload()
    loop.behind[0].make_room()
    loop.pump()
    assert not is_readable(loop.behind[0].sock)
    found = []
    for _ in clients:
        loop.advance(DIAL_CHECK_SECONDS)
        relay = loop.accept()
        found.append(relay.receive(len(handshake("token0")) + 5))
        assert not is_readable(loop.behind[0].sock)
        relay.send(OK)
    assert sorted(found) == [handshake(f"token{number}") + b"early" for number in range(2)]
    assert [client.receive(3) for client in clients] == [OK] * 2
    assert failures(loop) == {} and caplog.messages == []


@KINDS
@pytest.mark.parametrize("is_reloaded", [False, True])
def test_a_queue_that_stays_full(
    make: Make, caplog: pytest.LogCaptureFixture, kind: str, is_reloaded: bool
) -> None:
    """A reload begins the time again."""
    loop = make("full")
    client = loop.client(kind)
    client.send(LINE)
    loop.pump()
    if is_reloaded:
        loop.advance(DIAL_SECONDS - DIAL_CHECK_SECONDS)
        loop.reload()
    for _ in range(DIAL_SECONDS - DIAL_CHECK_SECONDS):
        loop.advance(DIAL_CHECK_SECONDS)
    assert loop.server.rendezvous.waiting_clients == 1 and caplog.messages == []
    loop.advance(DIAL_CHECK_SECONDS)
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1}
    assert caplog.messages == [f"{UNREACHABLE}: Connection timed out"]


@KINDS
def test_a_full_queue_whose_relay_ends(make: Make, kind: str) -> None:
    loop = make("full")
    client = loop.client(kind)
    client.send(LINE)
    loop.pump()
    loop.behind[0].close()
    loop.advance(DIAL_CHECK_SECONDS)
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1}


@pytest.mark.parametrize("behind", ["hanging", "full"])
def test_a_dial_is_no_stall(make: Make, behind: str) -> None:
    """Its handshake line is queued all the time."""
    loop = make(behind, "tcp", limits=Limits(stall_seconds=2))
    client = loop.client("ws")
    client.send(LINE)
    loop.pump()
    for _ in range(2 * DIAL_SECONDS):
        assert not is_readable(loop.behind[1].sock)
        loop.advance(0.5)
    relay = loop.accept(1)
    assert relay.receive(len(LINE)) == LINE
    relay.send(OK)
    assert client.receive(3) == OK


# The sockets of dials.


class Sockets:
    """Makes the sockets of a gateway's dials. It notes how many descriptors are open before."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, failing: int = 0) -> None:
        """`failing`: the number of the socket, from 1, for which there is no descriptor."""
        self._make, self._failing = transit_relay_gateway.make_socket, failing
        self.open_before: list[int] = []
        monkeypatch.setattr(transit_relay_gateway, "make_socket", self.make)

    def make(self, *arguments: Any) -> socket.socket:
        """Return a socket as `make_socket` does. Raises OSError."""
        self.open_before.append(len(open_descriptors()))
        if len(self.open_before) == self._failing:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return self._make(*arguments)


@KINDS
@pytest.mark.parametrize("first", ["refusing", "hanging", "full"])
def test_a_second_dial_needs_no_more_descriptors(
    make: Make, monkeypatch: pytest.MonkeyPatch, kind: str, first: str
) -> None:
    loop = make(first, "tcp")
    sockets = Sockets(monkeypatch)
    client = loop.client(kind)
    client.send(LINE)
    loop.pump()
    loop.advance(DIAL_SECONDS)
    relay = loop.accept(1)
    first_count, second_count = sockets.open_before
    assert second_count == first_count
    assert relay.receive(len(LINE)) == LINE


@KINDS
def test_without_a_socket_for_the_first_dial_a_client_may_try_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """That says nothing about the relay behind."""
    loop = make("tcp", "tcp")
    room = Room(loop)
    Sockets(monkeypatch, failing=1)
    client = loop.client(kind)
    client.send(LINE)
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1}
    assert caplog.messages == [f"{UNREACHABLE}: Too many open files"]
    assert room.health() == (200, ["ok"])
    loop.forward(place=0)


@KINDS
def test_without_a_socket_for_the_second_dial_a_client_may_try_again(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    """Only the first address has failed."""
    loop = make("refusing", "tcp", "tcp")
    room = Room(loop)
    sockets = Sockets(monkeypatch, failing=2)
    client = loop.client(kind)
    client.send(LINE)
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1} and len(sockets.open_before) == 2
    reasons = ["Connection refused", "Too many open files"]
    assert caplog.messages == [f"{UNREACHABLE}: {why}" for why in reasons]
    assert room.health() == (503, [UNREACHABLE])  # because of the first dial
    assert loop.server.rendezvous.pairs == set()
    loop.forward(place=1)


def test_a_connection_that_is_accepted_has_no_time_limit(make: Make) -> None:
    loop = make("tcp")
    client, relay = loop.forward()
    loop.advance(10 * DIAL_SECONDS)
    relay.send(OK)
    assert client.receive(3) == OK


def test_the_relay_behind_is_probed_when_it_is_silent(make: Make) -> None:
    """As a client is, by TCP keepalive."""
    loop = make("tcp")
    _, relay = loop.forward()
    (sock,) = (
        conn.sock
        for conn in loop.server.connections
        if conn.sock.getsockname() == relay.sock.getpeername()
    )
    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 200
    assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_client_that_leaves_during_a_dial_leaves_nothing(make: Make) -> None:
    """Its end is read when the dial is over."""
    loop = make("hanging", "hanging")
    client = loop.client()
    client.send(LINE)
    loop.pump()
    client.close()
    for _ in range(DIALS):
        loop.advance(DIAL_SECONDS)
    loop.pump()
    assert loop.server.connections == set() and loop.server.rendezvous.pairs == set()


def test_a_full_queue_is_not_tried_for_a_client_that_has_ended(make: Make) -> None:
    loop = make("full", limits=Limits(wait_seconds=2))
    client = loop.client()
    client.send(LINE)
    loop.pump()
    loop.advance(2)
    assert end_of(client) == b""
    client.close()
    loop.behind[0].make_room()
    loop.advance(DIAL_CHECK_SECONDS)
    assert loop.server.connections == set() and loop.server.rendezvous.pairs == set()
    assert not is_readable(loop.behind[0].sock)


@KINDS
def test_a_client_that_answers_no_ping_does_not_wait(make: Make, kind: str) -> None:
    """A raw client is not sent any."""
    loop = make()
    client, relay = loop.forward(kind)
    for _ in range(4):
        loop.advance(PING_SECONDS)
    assert is_readable(relay.sock) == (kind == "ws")
    if kind == "ws":
        assert end_of(client, 1000) == relay.read_to_end() == b""


# A reload.


@KINDS
def test_a_reload_during_a_dial(make: Make, kind: str) -> None:
    """The time to connect begins again. The next address is that of the new program."""
    loop = make("hanging", "tcp")
    client = loop.client(kind)
    client.send(LINE)
    loop.advance(DIAL_SECONDS - 1)
    loop.reload()
    loop.advance(DIAL_SECONDS - DIAL_CHECK_SECONDS)
    assert not is_readable(loop.behind[1].sock)
    loop.advance(DIAL_CHECK_SECONDS)
    relay = loop.accept(1)
    assert relay.receive(len(LINE)) == LINE
    relay.send(OK)
    assert client.receive(3) == OK


@KINDS
@pytest.mark.parametrize("behind", ["hanging", "full"])
def test_a_dial_that_fails_after_a_reload_to_another_target(
    make: Make, kind: str, behind: str
) -> None:
    """The new target is dialled then. The failure says nothing about it."""
    loop = make(behind)
    client = loop.client(kind)
    client.send(LINE)
    loop.pump()
    loop.reload_to("tcp", "tcp")
    room = Room(loop)
    loop.advance(DIAL_SECONDS)
    relay = loop.accept(0)
    assert relay.receive(len(LINE)) == LINE
    relay.send(OK)
    assert client.receive(3) == OK
    assert failures(loop) == {}
    assert not is_unreachable(room)


def test_a_dial_that_succeeds_after_a_reload_to_another_target(make: Make) -> None:
    """Its client goes on. It says nothing about the new target."""
    loop = make("full")
    client = loop.client()
    client.send(LINE)
    loop.pump()
    old = loop.behind[0]
    loop.reload_to("refusing")
    room = Room(loop)
    other = loop.client()
    other.send(LINE)
    assert end_of(other) == b""
    assert is_unreachable(room)
    old.make_room()
    loop.advance(DIAL_CHECK_SECONDS)
    sock, _ = old.sock.accept()
    with Client(sock, loop.wait) as relay:
        assert relay.receive(len(LINE)) == LINE
        relay.send(OK)
        assert client.receive(3) == OK
    assert is_unreachable(room)


@KINDS
def test_a_reload_before_the_answer_and_within_it(make: Make, kind: str) -> None:
    loop = make()
    client, relay = loop.forward(kind)
    loop.reload()
    loop.advance(2 * DIAL_SECONDS)  # the time to connect does not begin again
    now = loop.server.snapshot()
    assert (now.pairs, now.waiting_clients) == (0, 1)
    relay.send(b"o")
    loop.pump()
    loop.reload()
    relay.send(b"k\nda")
    assert client.receive(5) == b"ok\nda"
    loop.reload()
    relay.send(b"ta")
    client.send(b"answer")
    assert client.receive(2) == b"ta" and relay.receive(6) == b"answer"
    relay.close()
    assert end_of(client) == b""


@pytest.mark.parametrize("is_answered", [False, True])
def test_a_reset_after_a_reload(make: Make, is_answered: bool) -> None:
    """Whether the relay behind has answered is carried."""
    loop = make("tcp")
    client, relay = loop.forward("ws")
    if is_answered:
        relay.send(OK)
        assert client.receive(3) == OK
    loop.reload()
    relay.reset()
    assert end_of(client, 1000 if is_answered else 1013) == b""


# Limits.


@KINDS
def test_both_connections_of_a_client_count(make: Make, kind: str) -> None:
    """A client without room for its second connection is refused, and does not evict itself."""
    loop = make(limits=Limits(max_connections=1))
    client = loop.client(kind)
    client.send(LINE)
    assert end_of(client, 1013) == b"relay full\n"
    assert not is_readable(loop.behind[0].sock)


@KINDS
def test_another_waiting_client_makes_room(make: Make, kind: str) -> None:
    loop = make(limits=Limits(max_connections=3))
    old, old_relay = loop.forward(kind)
    new, relay = loop.forward("tcp")
    assert end_of(old, 1013) == b""
    assert old_relay.read_to_end() == b""
    relay.send(OK)
    assert new.receive(3) == OK


@KINDS
def test_without_a_descriptor_another_waiting_client_makes_room(make: Make, kind: str) -> None:
    loop = make()
    loop.restart(max_open=3)
    old, old_relay = loop.forward(kind)
    new, relay = loop.forward("tcp")
    assert end_of(old, 1013) == old_relay.read_to_end() == b""
    relay.send(OK)
    assert new.receive(3) == OK
    third = loop.client(kind)
    third.send(LINE)
    assert end_of(third, 1013) == b"relay full\n"


def test_a_pair_makes_no_room(make: Make) -> None:
    loop = make(limits=Limits(max_connections=3))
    one, relay = loop.forward("ws")
    relay.send(OK)
    assert one.receive(3) == OK
    other = loop.client("ws")
    other.send(LINE)
    assert end_of(other, 1013) == b"relay full\n"
    relay.send(b"data")
    assert one.receive(4) == b"data"


def restart_behind(loop: GatewayLoop, limits: Limits) -> None:
    """Replace the relay behind by one with these limits."""
    loop.behind.server.close_listeners()
    loop.behind.restart(*loop.listeners_behind(), limits=limits)


def proxied(loop: Loop, token: str) -> Client:
    """Return a client of SECRET_ADDRESS that has sent its handshake."""
    client = Client(loop.connect(has_proxy_header=True), loop.wait)
    client.send(f"PROXY TCP4 {SECRET_ADDRESS} 192.0.2.1 50000 4001\r\n".encode())
    client.send(handshake(token))
    loop.pump()
    return client


def test_the_limit_by_address_acts_behind(make_both: MakeBoth) -> None:
    limits = Limits(max_waiting_per_source=1)
    loop = make_both(limits=limits, has_proxy_header=True)
    first, second = proxied(loop, "first"), proxied(loop, "second")
    assert first.receive_now() == second.receive_now() == b""  # not at the gateway
    for one in (first, second):
        one.close()
    loop.pump()
    restart_behind(loop, limits)
    first, second = proxied(loop, "first"), proxied(loop, "second")
    assert end_of(second) == b"too many waiting\n"
    assert first.receive_now() == b""
    local = loop.client()
    local.send(handshake("third"))
    assert local.receive_now() == b""  # another source


@KINDS
def test_a_handshake_that_takes_too_long(make: Make, kind: str) -> None:
    loop = make(limits=Limits(handshake_seconds=10))
    client = loop.client(kind)
    client.send(LINE[:20])
    loop.advance(10)
    assert end_of(client, 1000) == b""
    assert not is_readable(loop.behind[0].sock)


@KINDS
def test_a_wait_that_takes_too_long(make: Make, kind: str) -> None:
    loop = make(limits=Limits(wait_seconds=10))
    client, relay = loop.forward(kind)
    paired, answering = loop.forward(kind)
    answering.send(OK)
    assert paired.receive(3) == OK
    loop.advance(10)
    assert end_of(client, 1000) == relay.read_to_end() == b""
    answering.send(b"data")
    assert paired.receive(4) == b"data"


@KINDS
def test_a_wait_is_not_idle(make: Make, kind: str) -> None:
    loop = make(limits=Limits(idle_seconds=10))
    waiting, relay = loop.forward(kind)
    paired, answering = loop.forward(kind)
    answering.send(OK)
    assert paired.receive(3) == OK
    for _ in range(40):
        loop.advance(0.5)
    assert end_of(paired, 1000) == answering.read_to_end() == b""
    relay.send(OK)
    assert waiting.receive(3) == OK


@KINDS
def test_a_wait_that_takes_too_long_for_the_relay_behind(make_both: MakeBoth, kind: str) -> None:
    loop = make_both()
    restart_behind(loop, Limits(wait_seconds=10))
    client = loop.client(kind)
    client.send(LINE)
    loop.pump()
    loop.advance(10)
    assert end_of(client, 1000) == b""


@pytest.mark.parametrize("is_reloaded", [False, True])
def test_a_rate_is_that_of_a_client(make: Make, is_reloaded: bool) -> None:
    """Each client has a pair of its own at the gateway."""
    loop = make(limits=Limits(max_pair_rate=1000))
    client, relay = loop.forward("ws")
    if is_reloaded:
        loop.reload()
    data = random.Random(1).randbytes(5_000)
    relay.send(OK + data)
    received = client.receive_now()
    start = loop.clock()
    while len(received) < len(OK + data) and loop.clock() < start + 40:
        loop.advance(0.1)
        received += client.receive_now()
    assert digest(received) == digest(OK + data)
    assert 2 < loop.clock() - start < 10


def test_a_pair_that_is_over_has_no_rate(make: Make) -> None:
    """Also without an answer of the relay behind."""
    loop = make(limits=Limits(max_pair_rate=1000))
    client, relay = loop.forward()
    client.send(b"early")
    assert relay.receive(5) == b"early"
    assert loop.server.rates.next_due() < float("inf")  # they are counted
    client.close()
    assert relay.read_to_end() == b""
    relay.close()
    loop.pump()
    assert loop.server.rendezvous.pairs == set()
    assert loop.server.rates.next_due() == float("inf")


# The end of the gateway.


def test_a_stop_ends_all(make: Make) -> None:
    loop = make()
    waiting, first = loop.forward("ws")
    paired, second = loop.forward("ws")
    second.send(OK)
    assert paired.receive(3) == OK
    second.send(b"last words")
    loop.signal(signal.SIGTERM)
    assert end_of(waiting, 1001) == b""
    assert end_of(paired, 1001) == b"last words"
    assert first.read_to_end() == second.read_to_end() == b""


@KINDS
@pytest.mark.parametrize("behind", ["hanging", "full"])
def test_a_stop_during_a_dial(make: Make, kind: str, behind: str) -> None:
    loop = make(behind, "tcp")
    client = loop.client(kind)
    client.send(LINE)
    loop.pump()
    loop.signal(signal.SIGTERM)
    assert end_of(client, 1001) == b""
    loop.advance(DIAL_SECONDS)
    assert not is_readable(loop.behind[1].sock)


def test_a_drain_lets_pairs_run_on(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    loop = make()
    loop.restart(drain_seconds=100)
    waiting, first = loop.forward("ws")
    paired, second = loop.forward("ws")
    second.send(OK)
    assert paired.receive(3) == OK
    loop.signal(signal.SIGTERM)
    assert "SIGTERM: draining for at most 100 s; pairs: 1" in caplog.messages
    assert end_of(waiting, 1001) == first.read_to_end() == b""
    second.send(b"data")
    assert paired.receive(4) == b"data"
    assert loop.server.phase is ServerPhase.DRAINING
    second.close()
    assert end_of(paired, 1000) == b""
    paired.close()
    loop.pump()
    assert loop.server.phase is not ServerPhase.DRAINING


# What an operator sees.


def test_health_depends_on_the_relay_behind(make: Make) -> None:
    loop = make("refusing")
    room = Room(loop)
    assert room.health() == (200, ["ok"])
    for _ in range(2):
        client = loop.client()
        client.send(LINE)
        assert end_of(client) == b""
    assert room.health() == (503, [UNREACHABLE])
    assert room.samples()["transit_relay_healthy"] == 0
    loop.behind[0].sock.listen()
    loop.forward()
    assert room.health() == (200, ["ok"])


@pytest.mark.parametrize(("kinds", "times"), [((), 1), (("refusing",), 2)], ids=["same", "another"])
def test_a_failure_is_logged_again_for_another_target(
    make: Make, caplog: pytest.LogCaptureFixture, kinds: tuple[str, ...], times: int
) -> None:
    loop = make("refusing")
    for is_reloaded in False, True:
        if is_reloaded:
            loop.reload_to(*kinds)
        client = loop.client()
        client.send(LINE)
        assert end_of(client) == b""
    assert caplog.messages.count(f"{UNREACHABLE}: Connection refused") == times


def test_without_clients_a_failure_is_forgotten(make: Make) -> None:
    loop = make("refusing")
    room = Room(loop)
    client = loop.client()
    client.send(LINE)
    assert end_of(client) == b""
    room.sleep(UNHEALTHY_SECONDS - 1)
    assert room.health() == (503, [UNREACHABLE])
    room.sleep(1)
    assert room.health() == (200, ["ok"])


@pytest.mark.parametrize("behind", ["hanging", "full"])
def test_a_dial_that_took_too_long_fails_once(make: Make, behind: str) -> None:
    loop = make(behind)
    room = Room(loop)
    client = loop.client()
    client.send(LINE)
    loop.pump()
    loop.advance(DIAL_SECONDS)
    assert end_of(client) == b""
    for _ in range(UNHEALTHY_SECONDS - 1):
        loop.advance(1)
    assert is_unreachable(room)
    loop.advance(1)
    assert not is_unreachable(room)


@pytest.mark.parametrize(
    ("kinds", "is_healthy"), [((), False), (("refusing",), True)], ids=["same", "another"]
)
def test_health_after_a_reload(make: Make, kinds: tuple[str, ...], is_healthy: bool) -> None:
    """What is known of the same target is carried."""
    loop = make("refusing")
    client = loop.client()
    client.send(LINE)
    assert end_of(client) == b""
    loop.reload_to(*kinds)
    room = Room(loop)
    assert room.health() == ((200, ["ok"]) if is_healthy else (503, [UNREACHABLE]))
    if not is_healthy:
        room.sleep(UNHEALTHY_SECONDS)
        assert room.health() == (200, ["ok"])


def test_a_gateway_counts_its_clients_and_why_they_fail(make: Make) -> None:
    loop = make()
    room = Room(loop)
    for kind, answer in (("ws", b"relay full\n"), ("tcp", b"impatient\n"), ("ws", b"junk!\n")):
        client, relay = loop.forward(kind)
        relay.send(answer)
        client.read_to_end(1013) if kind == "ws" else client.read_to_end()
        relay.close()
        client.close()
    for kind in ("tcp", "ws"):
        client, relay = loop.forward(kind)
        loop.advance(7)
        relay.send(b"ok\n12345")
        assert client.receive(8) == b"ok\n12345"
        relay.close()
        assert end_of(client) == b""
        client.close()
    loop.forward()
    samples = room.samples()
    for kind, count in {"not_forwarded": 1, "refused_behind": 2, "bad_handshake": 0}.items():
        assert samples[f'transit_relay_handshake_failures_total{{kind="{kind}"}}'] == count
    assert samples["transit_relay_partner_wait_seconds_sum"] == 14
    numbers = room.numbers()
    assert (numbers["pairs"], numbers["waiting_clients"]) == (0, 1)
    since_start = numbers["since_start"]
    assert since_start["connections"] == 6 and since_start["relayed_bytes"] == 10
    assert {mood: count for mood, count in counts_by_mood(loop).items() if count} == {
        ("lonely", "tcp"): 1,
        ("lonely", "websocket"): 2,
        ("happy", "tcp"): 1,
        ("happy", "websocket"): 1,
    }


def counts_by_mood(loop: Loop) -> dict[Any, int]:
    """Return how many clients have ended, by mood and transport."""
    return dict(loop.server.rendezvous.counters.ended)


@pytest.mark.parametrize("kind", ["unix", "tcp", "refusing"])
def test_no_log_and_no_page_has_an_address_a_token_or_a_side(
    make: Make, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    caplog.set_level(logging.DEBUG)
    loop = make(kind, has_proxy_header=True)
    room = Room(loop)
    answers = (SECRET_LINE, b"too many waiting\n", OK + SECRET_LINE, b"")
    for answer in answers:
        client = Client(loop.connect(has_proxy_header=True), loop.wait)
        client.send(f"PROXY TCP4 {SECRET_ADDRESS} 192.0.2.1 5 4\r\n".encode() + SECRET_LINE)
        if kind != "refusing":
            relay = loop.accept()
            relay.send(answer)
            loop.pump()
            relay.close()
        client.read_to_end()
    assert sum(counts_by_mood(loop).values()) > 0
    texts = [*caplog.messages, *(str(room.ask(path)) for path in PATHS)]
    texts += [repr(conn) + repr(conn.session) for conn in loop.server.connections]
    secrets = (SECRET_TOKEN, SECRET_SIDE, SECRET_ADDRESS, "127.0.0.1")
    assert [text for text in texts if any(secret in text for secret in secrets)] == []


def test_the_address_of_a_client_is_forgotten_when_it_is_told(make: Make) -> None:
    """Until then the gateway needs it. A reload carries what the gateway has."""
    loop = make(has_proxy_header=True)
    client = Client(loop.connect(has_proxy_header=True), loop.wait)
    client.send(f"PROXY TCP4 {SECRET_ADDRESS} 192.0.2.1 5 4\r\n".encode())
    for part, is_known in ((SECRET_LINE[:-1], True), (SECRET_LINE[-1:], False)):
        client.send(part)
        loop.pump()
        state = pickle.dumps(list(place_server(loop.server)))
        assert (socket.inet_aton(SECRET_ADDRESS) in state) == is_known
