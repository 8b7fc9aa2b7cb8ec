"""A full relay makes room for newcomers, and refuses those for whom a limit leaves no room."""

from __future__ import annotations

import errno
import logging
import socket
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import TIMEOUT, Loop, handshake

import transit_relay
from transit_relay import (
    LOCAL_PEER,
    Addresses,
    Connection,
    Endpoint,
    Limit,
    Limits,
    Listener,
    Peer,
    Phase,
    Role,
    State,
    parse_network,
)

LOCAL_WEB = b"GET / HTTP/1.1\r\nHost: relay\r\n"
UPGRADE = LOCAL_WEB + (
    b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Guest(NamedTuple):
    """A client, and the relay's connection to it."""

    sock: socket.socket
    conn: Connection

    def send(self, loop: Loop, data: bytes) -> None:
        """Send bytes and let the relay work."""
        self.sock.sendall(data)
        loop.pump()

    def is_open(self) -> bool:
        """Return whether the relay has this client."""
        return self.conn.phase is not Phase.CLOSED

    def read_all(self) -> bytes:
        """Return what has come. The end of the stream must have come too."""
        data = b""
        while part := self.sock.recv(1 << 16):
            data += part
        return data


def arrive(
    loop: Loop, peer: Peer = LOCAL_PEER, role: Role = Role.PORT, has_proxy_header: bool = False
) -> Guest:
    """Return a new client. `peer`: what the relay learned of its address."""
    ours, its = socket.socketpair()
    ours.settimeout(TIMEOUT)
    loop._clients.append(ours)
    before = set(loop.server.connections)
    loop.server.admit(its, role, peer, has_proxy_header)
    (conn,) = loop.server.connections - before
    loop.pump()
    return Guest(ours, conn)


def wait(loop: Loop, token: str, source: int | None = None) -> Guest:
    """Return a client that waits for a partner."""
    guest = arrive(loop, Peer(source))
    guest.send(loop, handshake(token, "one"))
    assert guest.conn.session.state is State.WAIT_PARTNER
    return guest


def pair(loop: Loop, token: str) -> tuple[Guest, Guest]:
    """Return the clients of a pair, which have read their `ok`."""
    one = wait(loop, token)
    other = arrive(loop)
    other.send(loop, handshake(token, "other"))
    assert one.sock.recv(3) == other.sock.recv(3) == b"ok\n"
    return one, other


def fill(loop: Loop, most: int) -> None:
    """Restart the relay with this maximum of connections."""
    loop.restart(limits=Limits(max_connections=most))


def reached(loop: Loop) -> dict[str, int]:
    """Return how often each limit ended or refused a client."""
    return loop.server.limits.reached.counts


# Who makes room.


def test_the_oldest_client_without_a_handshake_goes_before_one_that_waits(loop: Loop) -> None:
    fill(loop, 4)
    waits = wait(loop, "early")
    oldest, younger = arrive(loop), arrive(loop, role=Role.WEBSOCKET)
    oldest.send(loop, handshake()[:-1])  # a part of one does not count
    last = arrive(loop)
    newcomer = arrive(loop)
    assert not oldest.is_open() and oldest.read_all() == b""
    assert all(guest.is_open() for guest in (waits, younger, last, newcomer))
    assert loop.recorder.moods() == ["empty"]
    arrive(loop)  # the one on the WebSocket listener goes, and leaves no record
    assert not younger.is_open() and younger.read_all() == b""
    assert loop.recorder.moods() == ["empty"] and waits.is_open()
    assert reached(loop) == {"--max-connections": 2}


def test_a_client_that_has_everything_goes_first(loop: Loop) -> None:
    fill(loop, 3)
    silent = arrive(loop)
    refused = arrive(loop)
    refused.send(loop, b"junk\n")
    assert refused.sock.recv(100) == b"bad handshake\n"  # over a unix socket this acknowledges
    waits = wait(loop, "token")
    arrive(loop)
    assert not refused.is_open() and silent.is_open() and waits.is_open()
    assert loop.recorder.moods() == ["errory"]


def test_a_client_with_bytes_to_get_does_not_go(loop: Loop) -> None:
    fill(loop, 2)
    refused = arrive(loop)
    refused.send(loop, b"junk\n")
    assert refused.conn.phase is Phase.LINGERING
    silent = arrive(loop)
    arrive(loop)
    assert refused.is_open() and not silent.is_open()
    assert refused.read_all() == b"bad handshake\n"


def test_few_of_the_lingering_clients_are_asked(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a flood of clients that have bytes to get, a newcomer costs few system calls."""
    fill(loop, 5)
    refused = [arrive(loop) for _ in range(4)]
    for guest in refused:
        guest.send(loop, b"junk\n")
    silent = arrive(loop)
    asked = []

    def unacknowledged_bytes(sock: socket.socket) -> int:
        asked.append(sock)
        return 1

    monkeypatch.setattr(transit_relay, "LINGER_LOOKS", 2)
    monkeypatch.setattr(transit_relay, "unacknowledged_bytes", unacknowledged_bytes)
    arrive(loop)
    assert [guest.conn.sock in asked for guest in refused].count(True) == 2
    assert not silent.is_open()
    last = refused[-1]
    assert last.read_all() == b"bad handshake\n"
    monkeypatch.undo()
    loop.advance(transit_relay.LINGER_POLL_SECONDS)  # each one is asked
    monkeypatch.setattr(transit_relay, "LINGER_LOOKS", 0)
    waits = wait(loop, "token")
    assert not last.is_open() and waits.is_open()


def test_the_oldest_waiting_client_of_the_busiest_source_goes(loop: Loop) -> None:
    fill(loop, 6)
    alone = wait(loop, "a", source=1)
    exempt = wait(loop, "b")
    busy = [wait(loop, token, source=2) for token in ("c", "d", "d")]
    late = wait(loop, "e", source=1)
    newcomer = wait(loop, "f", source=3)
    assert not busy[0].is_open() and busy[0].read_all() == b""
    assert all(guest.is_open() for guest in (alone, exempt, *busy[1:], late, newcomer))
    assert loop.recorder.moods() == ["lonely"]
    assert loop.server.rendezvous.waiting_by_source == {1: 2, None: 1, 2: 2, 3: 1}


def test_a_websocket_that_makes_room_is_sent_a_close(loop: Loop) -> None:
    fill(loop, 1)
    evicted = arrive(loop)
    evicted.send(loop, UPGRADE)
    assert evicted.sock.recv(1000).startswith(b"HTTP/1.1 101 ")
    arrive(loop)
    assert not evicted.is_open()
    assert evicted.read_all() == b"\x88\x02" + (1013).to_bytes(2, "big")
    assert loop.recorder.moods() == ["empty"]


def test_a_flood_that_says_nothing_does_not_move_those_who_wait(loop: Loop) -> None:
    fill(loop, 20)
    waits = [wait(loop, f"token{number}") for number in range(10)]
    one, other = pair(loop, "pair")
    for _ in range(500):
        arrive(loop)
        assert len(loop.server.connections) <= 20
    assert all(guest.is_open() for guest in (*waits, one, other))
    one.send(loop, b"still here")
    assert other.sock.recv(100) == b"still here"
    partner = arrive(loop)
    partner.send(loop, handshake("token3", "other"))
    assert waits[3].sock.recv(3) == b"ok\n"


# No room.


def full(loop: Loop) -> tuple[Guest, Guest]:
    """Return the pair that fills the relay."""
    fill(loop, 2)
    return pair(loop, "pair")


@pytest.mark.parametrize("first", [b"p", handshake(), b"\x16\x03\x01"], ids=["p", "all", "TLS"])
def test_a_raw_newcomer_is_refused_at_its_first_bytes(loop: Loop, first: bytes) -> None:
    one, other = full(loop)
    newcomer = arrive(loop)
    assert newcomer.is_open()
    newcomer.send(loop, first)
    assert newcomer.read_all() == b"relay full\n"
    assert loop.recorder.moods() == ["empty"]
    assert one.is_open() and other.is_open()
    assert reached(loop) == {"--max-connections": 1}


def test_a_newcomer_whose_encoding_is_not_known_yet_is_not_answered(loop: Loop) -> None:
    full(loop)
    newcomer = arrive(loop)
    newcomer.send(loop, b"GE")
    assert newcomer.is_open()
    newcomer.send(loop, b"X")
    assert newcomer.read_all() == b"relay full\n"


@pytest.mark.parametrize("role", [Role.PORT, Role.WEBSOCKET])
def test_an_upgrade_gets_503(loop: Loop, role: Role) -> None:
    full(loop)
    newcomer = arrive(loop, role=role)
    newcomer.send(loop, UPGRADE)
    head, _, body = newcomer.read_all().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 Service Unavailable\r\n") and body == b"relay full\n"
    assert loop.recorder.moods() == []
    assert reached(loop) == {"--max-connections": 1}


@pytest.mark.parametrize("method", [b"GET", b"HEAD", b"OPTIONS"])
def test_a_health_check_passes_while_the_relay_is_full(loop: Loop, method: bytes) -> None:
    full(loop)
    newcomer = arrive(loop)
    newcomer.send(loop, method + b" / HTTP/1.0\r\n\r\n")
    assert newcomer.read_all().startswith(b"HTTP/1.1 200 OK\r\n")
    assert reached(loop) == {}


def test_a_refused_newcomer_makes_room_for_the_next_one(loop: Loop) -> None:
    one, other = full(loop)
    refused = [arrive(loop) for _ in range(5)]
    assert [guest.is_open() for guest in refused] == [False] * 4 + [True]
    other.sock.close()
    one.sock.close()
    loop.pump()
    newcomer = wait(loop, "token")
    assert newcomer.is_open()


def test_zero_is_no_maximum(loop: Loop) -> None:
    fill(loop, 0)
    guests = [arrive(loop) for _ in range(100)]
    assert all(guest.is_open() for guest in guests)


# Descriptors are used up.


class FullTable:
    """A listening socket whose next accept fails."""

    def __init__(self, real: socket.socket, error: int) -> None:
        self.real, self.error = real, error

    def accept(self) -> object:
        if self.error:
            number, self.error = self.error, 0
            raise OSError(number, "injected")
        return self.real.accept()


def listen(loop: Loop, folder: Path) -> Listener:
    """Let the relay listen on a unix socket."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(str(folder / "s"))
    sock.listen(100)
    listener = Listener(sock, Endpoint("unix:s", "unix"))
    loop.restart(listener)
    return listener


def knock(loop: Loop, listener: Listener) -> socket.socket:
    """Return a client in the queue of the listener."""
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(TIMEOUT)
    client.connect(listener.sock.getsockname())
    loop._clients.append(client)
    return client


def test_without_a_free_descriptor_a_client_makes_room_in_the_same_turn(
    loop: Loop, tmp_path: Path
) -> None:
    listener = listen(loop, tmp_path)
    silent, waits = arrive(loop), wait(loop, "token")
    newcomer = knock(loop, listener)
    real = listener.sock
    listener.sock = FullTable(real, errno.EMFILE)  # type: ignore[assignment]
    loop.server.run_once(0)
    listener.sock = real
    assert not silent.is_open() and silent.conn.sock.fileno() == -1 and waits.is_open()
    assert loop.server._acceptor.is_accepting
    newcomer.sendall(handshake("token", "other"))
    loop.pump()
    assert newcomer.recv(3) == waits.sock.recv(3) == b"ok\n"


def test_an_empty_queue_makes_nobody_go(loop: Loop, tmp_path: Path) -> None:
    """With a full table, accept reports EMFILE for an empty queue too."""
    listener = listen(loop, tmp_path)
    silent = arrive(loop)
    knock(loop, listener)
    real = listener.sock

    class ThenFull(FullTable):
        def accept(self) -> object:
            try:
                return self.real.accept()
            finally:
                self.real = FullTable(real, errno.EMFILE)  # type: ignore[assignment]

    listener.sock = ThenFull(real, 0)  # type: ignore[assignment]
    loop.server.run_once(0)
    listener.sock = real
    assert len(loop.server.connections) == 2 and silent.is_open()
    assert loop.server._acceptor.is_accepting


def test_the_listeners_rest_if_no_client_can_go(
    loop: Loop, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    listener = listen(loop, tmp_path)
    one, _ = pair(loop, "pair")
    newcomer = knock(loop, listener)
    real = listener.sock
    listener.sock = FullTable(real, errno.EMFILE)  # type: ignore[assignment]
    loop.server.run_once(0)
    listener.sock = real
    assert not loop.server._acceptor.is_accepting
    (message,) = (one.getMessage() for one in caplog.records if one.levelno == logging.WARNING)
    assert message == "newcomers have to wait: injected"
    one.sock.close()
    loop.pump()
    assert loop.server._acceptor.is_accepting
    newcomer.sendall(handshake("token"))
    loop.pump()
    assert loop.server.rendezvous.waiting_clients == 1


# Sources.


def limit_sources(loop: Loop, most: int) -> None:
    """Restart the relay with this maximum of waiting clients of one source."""
    loop.restart(limits=Limits(max_waiting_per_source=most))


def test_the_default_is_256() -> None:
    assert Limits().max_waiting_per_source == 256


def test_too_many_waiting_clients_of_one_source(loop: Loop) -> None:
    limit_sources(loop, 2)
    first, _ = wait(loop, "a", source=7), wait(loop, "b", source=7)
    third = arrive(loop, Peer(7))
    third.send(loop, handshake("c"))
    assert third.read_all() == b"too many waiting\n"
    assert loop.recorder.moods() == ["lonely"]
    wait(loop, "c", source=8)
    first.sock.close()
    loop.pump()
    wait(loop, "d", source=7)  # there is room again
    assert reached(loop) == {"--max-waiting-per-source": 1}


def test_a_client_that_has_a_partner_is_not_refused(loop: Loop) -> None:
    limit_sources(loop, 1)
    waits = wait(loop, "a", source=7)
    partner = arrive(loop, Peer(7))
    partner.send(loop, handshake("a", "other") + b"data")
    assert waits.sock.recv(100) == b"ok\ndata"
    assert loop.server.rendezvous.waiting_by_source == {}


def test_one_side_of_a_token_is_limited_too(loop: Loop) -> None:
    limit_sources(loop, 1)
    wait(loop, "a", source=7)
    again = arrive(loop, Peer(7))
    again.send(loop, handshake("a", "one"))
    assert again.read_all() == b"too many waiting\n"


def test_exempt_clients_and_zero_have_no_limit(loop: Loop) -> None:
    limit_sources(loop, 1)
    for number in range(5):
        wait(loop, f"token{number}")
    limit_sources(loop, 0)
    for number in range(5):
        wait(loop, f"token{number}", source=7)


def test_a_websocket_gets_the_refusal_as_a_message(loop: Loop) -> None:
    limit_sources(loop, 1)
    wait(loop, "a", source=7)
    client = loop.client("ws-unix")
    assert client.conn is not None
    client.conn.session.peer_known(Peer(7))
    client.send(handshake("b"))
    assert client.read_to_end(1013) == b"too many waiting\n"


@pytest.mark.parametrize(
    ("sent", "answer", "mood"),
    [
        (handshake(), b"not allowed\n", "lonely"),
        (handshake() + b"data", b"not allowed\n", "lonely"),
        (b"junk\n", b"bad handshake\n", "errory"),
    ],
)
def test_a_client_that_is_not_allowed(loop: Loop, sent: bytes, answer: bytes, mood: str) -> None:
    wait(loop, "token")
    guest = arrive(loop, Peer(7, is_allowed=False))
    guest.send(loop, sent)
    assert guest.read_all() == answer
    assert loop.recorder.moods() == [mood]
    assert loop.server.rendezvous.waiting_clients == 1


# Messages.


def test_a_limit_is_logged_once_a_minute_and_counted(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for _ in range(5):
        loop.server.limits.note(Limit.STALL)
    loop.server.limits.note(Limit.ALLOW)
    loop.advance(60)
    loop.server.limits.note(Limit.STALL)
    assert caplog.messages == [
        "--stall-timeout: a client was disconnected",
        "--allow: a client was disconnected",
        "--stall-timeout: a client was disconnected (4 more since the last message)",
    ]
    assert reached(loop) == {"--stall-timeout": 6, "--allow": 1}


# Addresses that a proxy tells.

V1 = b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 4001\r\n"
BANNED = b"PROXY TCP4 198.51.100.7 192.0.2.1 50000 4001\r\n"
V2_LOCAL = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"


def behind_proxy(loop: Loop, role: Role = Role.PORT, **networks: str) -> Guest:
    """Return a new client of a relay that expects PROXY headers."""
    limits = Limits(max_waiting_per_source=1)
    judge = Addresses([parse_network(networks["allow"])] if networks else (), (), key=b"key")
    loop.restart(limits=limits, addresses=judge)
    return arrive(loop, role=role, has_proxy_header=True)


@pytest.mark.parametrize("cut", [1, 5, len(V1) - 1, len(V1), len(V1) + 1, 200])
def test_the_handshake_follows_the_header(loop: Loop, cut: int) -> None:
    guest = behind_proxy(loop)
    stream = V1 + handshake("token", "one")
    guest.send(loop, stream[:cut])
    guest.send(loop, stream[cut:])
    (source,) = loop.server.rendezvous.waiting_by_source
    assert source == loop.server.rendezvous.addresses.judge_told("192.0.2.7").source
    other = arrive(loop, Peer(source))
    other.send(loop, handshake("another"))
    assert other.read_all() == b"too many waiting\n"


def test_a_header_without_an_address_means_that_of_the_proxy(loop: Loop) -> None:
    guest = behind_proxy(loop)
    guest.send(loop, V2_LOCAL + handshake("token"))
    assert loop.server.rendezvous.waiting_by_source == {None: 1}


@pytest.mark.parametrize(
    "sent", [handshake(), b"GET / HTTP/1.0\r\n\r\n", V1[:-2] + b"x", b"PROXY UNKNOW\r\n", b""]
)
@pytest.mark.parametrize("role", [Role.PORT, Role.WEBSOCKET])
def test_anything_else_is_closed_without_a_record(loop: Loop, role: Role, sent: bytes) -> None:
    guest = behind_proxy(loop, role)
    if sent:
        guest.send(loop, sent)
    else:
        loop.advance(60)
    assert guest.read_all() == b""
    assert loop.recorder.moods() == []


@pytest.mark.parametrize("role", [Role.PORT, Role.WEBSOCKET])
def test_http_follows_the_header(loop: Loop, role: Role) -> None:
    guest = behind_proxy(loop, role)
    guest.send(loop, V1 + UPGRADE)
    assert guest.sock.recv(1000).startswith(b"HTTP/1.1 101 ")


def test_the_told_address_is_the_one_that_must_be_allowed(loop: Loop) -> None:
    guest = behind_proxy(loop, allow="192.0.2.0/24")
    assert guest.conn.session.refused_by is None
    guest.send(loop, V1 + handshake("token"))
    assert guest.conn.session.state is State.WAIT_PARTNER
    banned = arrive(loop, has_proxy_header=True)
    banned.send(loop, BANNED + handshake("token"))
    assert banned.read_all() == b"not allowed\n"


def test_x_forwarded_for_counts_from_a_trusted_proxy_only(loop: Loop) -> None:
    addresses = Addresses((), [parse_network("unix")], key=b"key")
    loop.restart(addresses=addresses)
    head = UPGRADE[:-2] + b"X-Forwarded-For: 203.0.113.9, 192.0.2.7\r\n\r\n"
    trusted = arrive(loop, addresses.judge(""))
    trusted.send(loop, head)
    expected = addresses.judge_told("192.0.2.7")
    assert expected is not None and trusted.conn.session.source == expected.source
    other = arrive(loop, addresses.judge(("192.0.2.1", 50000)))
    other.send(loop, head)
    expected = addresses.judge_told("192.0.2.1")
    assert expected is not None and other.conn.session.source == expected.source


def test_accepted_clients_are_judged_by_their_addresses(loop: Loop) -> None:
    listening = socket.create_server(("127.0.0.1", 0))
    addresses = Addresses([parse_network("127.0.0.2")], (), key=b"key")
    loop.restart(Listener(listening, Endpoint("tcp", "tcp")), addresses=addresses)
    for source, is_allowed in (("127.0.0.1", False), ("127.0.0.2", True)):
        client = socket.create_connection(listening.getsockname(), TIMEOUT, (source, 0))
        loop._clients.append(client)
        client.sendall(handshake(source.replace(".", "_")))
        while not loop.server.connections:
            loop.pump()
        loop.pump()
        if is_allowed:
            assert loop.server.rendezvous.waiting_clients == 1
        else:
            assert client.recv(100) == b"not allowed\n"
            client.close()
            loop.pump()


# More than one at a time, and clients that are leaving.


def test_several_clients_make_room_if_there_are_too_many(loop: Loop) -> None:
    """Refused clients that have everything do not take places for ever."""
    one, other = full(loop)
    refused: list[Guest] = []
    for _ in range(5):
        refused.append(arrive(loop))
        refused[-1].send(loop, b"x")
        assert refused[-1].sock.recv(100) == b"relay full\n"
    newcomer = arrive(loop)
    newcomer.send(loop, handshake("token"))
    assert newcomer.read_all() == b"relay full\n"
    assert one.is_open() and other.is_open()
    assert len(loop.server.connections) <= 3


def test_a_client_that_leaves_in_this_turn_makes_room(loop: Loop) -> None:
    fill(loop, 2)
    waits, leaves = wait(loop, "a"), arrive(loop)
    leaves.conn.doom()
    ours, its = socket.socketpair()
    loop._clients.append(ours)
    loop.server.admit(its)
    loop.pump()
    assert waits.is_open() and len(loop.server.connections) == 2
    assert reached(loop) == {}


def test_a_client_that_is_over_is_not_counted_again(loop: Loop) -> None:
    fill(loop, 1)
    refused = arrive(loop)
    refused.send(loop, b"junk\n")
    assert refused.sock.recv(100) == b"bad handshake\n"
    arrive(loop)
    assert not refused.is_open() and reached(loop) == {}


def test_reserved_descriptors_are_not_used_for_refusals(loop: Loop) -> None:
    loop.restart(limits=Limits(max_connections=2), max_open=3)
    pair(loop, "pair")
    refused = arrive(loop)
    refused.send(loop, b"x")  # it does not read its refusal, so it cannot make room
    ours, its = socket.socketpair()
    loop._clients.append(ours)
    loop.server.admit(its)
    assert ours.recv(100) == b"" and its.fileno() == -1
    assert len(loop.server.connections) == 3
    assert refused.read_all() == b"relay full\n"
    arrive(loop)  # the refused one has everything now
    assert not refused.is_open()


def test_one_client_makes_room_also_if_there_are_too_many(loop: Loop) -> None:
    """A reload has lowered the maximum, or status clients take places."""
    fill(loop, 6)
    waiting = [wait(loop, f"token{n}") for n in range(5)]
    loop.server.limits.max_connections = 3
    newcomer = arrive(loop)
    newcomer.send(loop, handshake("new"))
    assert [guest.is_open() for guest in waiting] == [False, True, True, True, True]
    assert newcomer.is_open() and reached(loop) == {"--max-connections": 1}


def test_a_client_that_is_being_refused_makes_no_room(loop: Loop) -> None:
    """It is beyond the maximum itself."""
    fill(loop, 2)
    pair(loop, "token")
    first = arrive(loop)
    second = arrive(loop)
    assert not first.is_open() and first.read_all() == b""
    second.send(loop, handshake("late"))
    assert second.sock.recv(100) == b"relay full\n"
