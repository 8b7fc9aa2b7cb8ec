"""Faults of a gateway's own side: of the relay behind, of the way to it, and injected ones.

A fault ends one client and its connection to the relay behind. `make gateway-test` runs the faults
of pairs over a gateway.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import gateways
import pytest
import test_faults
import transit_relay_gateway
from conftest import open_descriptors
from gateways import BackendConnection, GatewayLoop, PlainAddresses
from helpers import (
    CLOSE,
    PING,
    TIMEOUT,
    Client,
    Loop,
    close_payload,
    cut,
    digest,
    frame,
    handshake,
    message,
    read_to_end,
    receive,
    reset,
    splits,
)
from invariants import check_server
from streams import UPGRADE
from test_faults import EXCEPTIONS, HANDLERS, VARIANTS, Choice, Handler, Injection, errors
from test_memory import fill_memory

from transit_relay import COMPLAINT_SECONDS, Connection, Limits, Phase, Role, Server, State

HELLO = handshake("t", "one")
KINDS = pytest.mark.parametrize("kind", ["tcp", "ws"])
TRANSPORT = {"tcp": "tcp", "ws": "websocket"}  # in the counters
WAYS_TO_END = pytest.mark.parametrize("way", ["end", "close", "reset"])


class PlayedLoop(Loop):
    """A gateway. The test plays the relay behind, which is reached over TCP."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(TIMEOUT)
        self.listeners: list[socket.socket] = [self.listener]
        super().__init__(limits)

    def make_server(self, *arguments: Any, **options: Any) -> Server:
        """Return a gateway whose target has the addresses of the listeners of the test."""
        target = transit_relay_gateway.parse_target("tcp:127.0.0.1:1")
        addresses = [(socket.AF_INET, one.getsockname()) for one in self.listeners]
        make_gateway = partial(gateways.gateway, target, addresses, 200)
        options = {**options, "addresses": PlainAddresses()}
        return super().make_server(*arguments, make_rendezvous=make_gateway, **options)

    def use(self, *listeners: socket.socket, limits: Limits | None = None) -> None:
        """Restart the gateway with the addresses of these listeners as its target."""
        self.listeners = list(listeners)
        self.restart(limits=limits)

    def accept(self, line: bytes = HELLO) -> socket.socket:
        """Accept a connection of the gateway, and read the handshake."""
        sock, _ = self.listener.accept()
        sock.settimeout(TIMEOUT)
        self._clients.append(sock)
        address = sock.getpeername()
        (its,) = (
            conn.sock
            for conn in self.server.connections
            if isinstance(conn, BackendConnection) and conn.sock.getsockname() == address
        )
        self._over_tcp.append((sock, its))
        self.pump()
        assert receive(sock, len(line)) == line
        return sock

    def forwarded(self, kind: str = "tcp") -> tuple[Client, socket.socket]:
        """Return a client that has sent its handshake, and the relay's end of its connection."""
        client = self.client(kind)
        client.send(HELLO)
        self.pump()
        return client, self.accept()

    def paired(self, kind: str = "tcp") -> tuple[Client, socket.socket]:
        """Return the same, after `ok`."""
        client, backend = self.forwarded(kind)
        backend.sendall(b"ok\n")
        assert client.receive(3) == b"ok\n"
        return client, backend

    def failures(self) -> dict[str, int]:
        """Return how often each failure was counted."""
        return {key: count for key, count in self.counters.failures.items() if count}

    @property
    def counters(self) -> Any:
        """Return the counters of the gateway."""
        return self.server.rendezvous.counters

    def check_nothing_is_left(self) -> None:
        """Close all ends, and check that the gateway has forgotten them."""
        for sock in self._clients:
            sock.close()
        self.pump()
        for _ in range(7):
            self.advance(1)
        rendezvous = self.server.rendezvous
        assert self.server.connections == set() and rendezvous.pairs == set()
        assert rendezvous.waiting == {} and rendezvous.waiting_by_source == {}
        assert not set(rendezvous.dials.connections())
        assert rendezvous.incomplete_bytes() == 0 == self.server.memory.queued_bytes
        assert self.server.faults.count == 0


@pytest.fixture
def played() -> Iterator[PlayedLoop]:
    """Return a gateway. The test plays the relay behind. At the end nothing of it may be left."""
    before = open_descriptors()
    loop = PlayedLoop()
    try:
        yield loop
        loop.check_nothing_is_left()
    finally:
        loop.close()
        for sock in {loop.listener, *loop.listeners}:
            sock.close()
    assert open_descriptors() == before


def end(sock: socket.socket, way: str) -> None:
    """End a connection: end one direction, close both, or reset it."""
    if way == "end":
        sock.shutdown(socket.SHUT_WR)
    elif way == "close":
        sock.close()
    else:
        reset(sock)


def closed_port() -> socket.socket:
    """Return a bound socket that does not listen: a connection to it is refused."""
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    return sock


class SilentPort(socket.socket):
    """A listening socket whose queue is full: a connection to it is not answered."""

    def __init__(self) -> None:
        super().__init__()
        self.bind(("127.0.0.1", 0))
        self.listen(0)  # one connection fills the queue; the kernel drops what comes then
        self._queued = socket.create_connection(self.getsockname(), TIMEOUT)
        assert select.select([self], [], [], TIMEOUT)[0], "the connection is not in the queue"

    def close(self) -> None:
        self._queued.close()
        super().close()


# The relay behind before its answer.


def ended_with(client: Client, kind: str, code: int) -> bytes:
    """Return all that the client gets before its end."""
    return client.read_to_end(code) if kind == "ws" else client.read_to_end()


@KINDS
def test_a_refused_dial_ends_the_client(played: PlayedLoop, kind: str) -> None:
    played.use(closed_port())
    client = played.client(kind)
    client.send(HELLO)
    assert ended_with(client, kind, 1013) == b""
    assert played.failures() == {"not_forwarded": 1}
    assert played.server.rendezvous.unreachable_until > played.clock()


# What the relay behind sends instead of an answer and how it ends: what the client gets, the code
# of its Close, and the failure.
ANSWERS: dict[str, tuple[bytes, str, bytes, int, str | None]] = {
    "end": (b"", "end", b"", 1000, None),
    "close": (b"", "close", b"", 1000, None),
    "reset": (b"", "reset", b"", 1013, "not_forwarded"),
    "half a line, end": (b"o", "end", b"", 1000, None),
    "half a line, reset": (b"ok", "reset", b"", 1013, "not_forwarded"),
    "no line": (b"o" * 1023, "end", b"", 1000, None),
    "a long line": (b"o" * 1024, "", b"", 1013, "not_forwarded"),
    "a longer line": (b"o" * 5000 + b"\n", "", b"", 1013, "not_forwarded"),
    "another program": (b"SSH-2.0-x\r\n", "", b"", 1013, "not_forwarded"),
    "an empty line": (b"\nok\n", "", b"", 1013, "not_forwarded"),
    "almost ok": (b"ok\r\n", "", b"", 1013, "not_forwarded"),
    "almost a refusal": (b"o k\n", "", b"", 1013, "not_forwarded"),
    "a refusal that may pass": (b"relay full\n", "end", b"relay full\n", 1013, "refused_behind"),
    "a refusal, reset": (b"relay full\n", "reset", b"relay full\n", 1013, "refused_behind"),
    "a final refusal": (b"impatient\n", "close", b"impatient\n", 1000, "refused_behind"),
    "several lines": (b"impatient\nok\nx\n", "", b"impatient\n", 1000, "refused_behind"),
    "junk, reset": (b"junk\0\n", "reset", b"", 1013, "not_forwarded"),
}


@KINDS
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
@pytest.mark.parametrize("name", ANSWERS)
def test_without_ok_the_client_ends(played: PlayedLoop, kind: str, name: str, whole: bool) -> None:
    sent, way, received, code, failure = ANSWERS[name]
    client, backend = played.forwarded(kind)
    pieces = [sent] if whole else cut(sent, range(1, min(len(sent), 20)))
    for piece in pieces:
        backend.sendall(piece)
        played.pump()
    if way:
        end(backend, way)
    assert ended_with(client, kind, code) == received
    assert played.failures() == ({failure: 1} if failure else {})
    assert played.counters.ended["lonely", TRANSPORT[kind]] == 1


@KINDS
def test_ok_and_bytes_behind_it_may_come_in_any_pieces(played: PlayedLoop, kind: str) -> None:
    for pieces in splits(b"ok\nok\n\0data"):
        client, backend = played.forwarded(kind)
        for piece in pieces:
            backend.sendall(piece)
            played.pump()
        assert client.receive(11) == b"ok\nok\n\0data"
        client.send(b"answer")
        played.pump()
        assert receive(backend, 6) == b"answer"
        backend.close()
        client.read_to_end()
        client.close()
        played.pump()


# Ends, in both directions.


@KINDS
@pytest.mark.parametrize("is_answered", [False, True], ids=["forwarded", "paired"])
@WAYS_TO_END
def test_nothing_that_a_client_sent_before_its_end_is_lost(
    played: PlayedLoop, kind: str, is_answered: bool, way: str
) -> None:
    """Also what it sent before `ok`, which is for the relay behind to judge."""
    client, backend = (played.paired if is_answered else played.forwarded)(kind)
    data = bytes(range(256)) * 200
    client.send(data)
    if way == "end":
        client.half_close()
    else:
        played.wait_for_arrivals()
        end(client.sock, way)
    played.pump()
    assert digest(read_to_end(backend)) == digest(data)
    if way == "end":
        backend.close()
        assert ended_with(client, kind, 1000) == b""


@KINDS
@WAYS_TO_END
@pytest.mark.parametrize("is_one_segment", [True, False], ids=["one segment", "after ok"])
def test_nothing_that_the_relay_behind_sent_before_its_end_is_lost(
    played: PlayedLoop, kind: str, way: str, is_one_segment: bool
) -> None:
    client, backend = played.forwarded(kind)
    data = bytes(range(256)) * 200
    for part in [b"ok\n" + data] if is_one_segment else [b"ok\n", data]:
        backend.sendall(part)
        played.wait_for_arrivals()
    end(backend, way)
    assert digest(ended_with(client, kind, 1000)) == digest(b"ok\n" + data)
    assert played.failures() == {}
    assert played.counters.ended["happy", TRANSPORT[kind]] == 1


@KINDS
@pytest.mark.parametrize("client_is_first", [True, False], ids=["client first", "behind first"])
@pytest.mark.parametrize("same_turn", [True, False], ids=["one turn", "two turns"])
def test_both_end(played: PlayedLoop, kind: str, client_is_first: bool, same_turn: bool) -> None:
    """What both have sent arrives, and the pair is counted once."""
    client, backend = played.paired(kind)
    client.send(b"from the client")
    backend.sendall(b"from behind")
    ends = [client.half_close, partial(backend.shutdown, socket.SHUT_WR)]
    for end_one in ends if client_is_first else ends[::-1]:
        end_one()
        played.wait_for_arrivals()
        if not same_turn:
            played.pump()
    played.pump()
    assert read_to_end(backend) == b"from the client"
    assert ended_with(client, kind, 1000) == b"from behind"
    assert played.counters.ended["happy", TRANSPORT[kind]] == 1


@pytest.mark.parametrize("code", [None, 1000, 1001, 4000])
@pytest.mark.parametrize("state", ["forwarded", "paired", "reset before", "reset after"])
def test_the_answer_to_a_close(played: PlayedLoop, code: int | None, state: str) -> None:
    """The code of the client comes back, unless a reset of the relay behind comes before."""
    client, backend = (played.forwarded if state == "forwarded" else played.paired)("ws")
    if state == "reset before":
        reset(backend)
        played.pump()
    client.send_wire(frame(CLOSE, close_payload(code)))
    played.pump()
    if state == "reset after":
        reset(backend)
    own = 1005 if code is None else code
    assert client.read_to_end(1000 if state == "reset before" else own) == b""


# Dials.


@KINDS
@pytest.mark.parametrize("is_silent", [True, False], ids=["times out", "refuses"])
def test_the_second_address_answers(played: PlayedLoop, kind: str, is_silent: bool) -> None:
    """The client notices nothing, and what it sent meanwhile arrives."""
    first = SilentPort() if is_silent else closed_port()
    played.use(first, played.listener)
    client = played.client(kind)
    client.send(HELLO)
    played.pump()
    client.send(b"impatient")
    played.pump()
    if is_silent:
        for _ in range(transit_relay_gateway.DIAL_SECONDS + 1):
            played.advance(1)
    backend = played.accept()
    assert receive(backend, 9) == b"impatient"
    backend.sendall(b"ok\n")
    assert client.receive(3) == b"ok\n"
    assert played.failures() == {} and played.server.rendezvous.unreachable_until < 0
    client.close()
    backend.close()


def test_a_third_address_is_not_tried(played: PlayedLoop) -> None:
    played.use(closed_port(), closed_port(), played.listener)
    client = played.client("ws")
    client.send(HELLO)
    assert client.read_to_end(1013) == b""
    assert played.failures() == {"not_forwarded": 1}
    client, backend = played.forwarded("ws")  # the next client finds the third at once
    client.close()
    backend.close()


@KINDS
def test_a_dial_that_is_never_answered_ends_the_client(played: PlayedLoop, kind: str) -> None:
    played.use(SilentPort())
    client = played.client(kind)
    client.send(HELLO)
    for _ in range(transit_relay_gateway.DIAL_SECONDS + 1):
        played.advance(1)
    assert ended_with(client, kind, 1013) == b""
    assert played.failures() == {"not_forwarded": 1}


@KINDS
@WAYS_TO_END
@pytest.mark.parametrize("is_silent", [True, False], ids=["times out", "refuses"])
def test_a_client_leaves_during_the_dial(
    played: PlayedLoop, kind: str, way: str, is_silent: bool
) -> None:
    """It is not read meanwhile. The second address gets all that it sent, and its end."""
    played.use(SilentPort() if is_silent else closed_port(), played.listener)
    client = played.client(kind)
    client.send(HELLO)
    played.wait_for_arrivals()
    played.server.run_once(0)
    client.send_wire(b"".join(client.encode(b"data")))
    played.wait_for_arrivals()
    end(client.sock, way)
    for _ in range(transit_relay_gateway.DIAL_SECONDS + 1):
        played.advance(1)
    backend = played.accept()
    assert read_to_end(backend) == b"data"


@WAYS_TO_END
def test_a_client_leaves_before_a_dial_fails(played: PlayedLoop, way: str) -> None:
    played.use(SilentPort())
    client = played.client("ws")
    client.send(HELLO)
    played.pump()
    end(client.sock, way)
    for _ in range(transit_relay_gateway.DIAL_SECONDS + 1):
        played.advance(1)
    assert played.failures() == {"not_forwarded": 1}
    assert played.server.rendezvous.pairs == set()


@KINDS
@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM])
def test_no_descriptor_for_a_dial(
    played: PlayedLoop, kind: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client is refused, although there is a second address. Another pair goes on."""
    played.use(played.listener, played.listener)
    one, other = played.paired("tcp")

    def make(*arguments: Any) -> socket.socket:
        raise OSError(number, "injected")

    client = played.client(kind)
    with monkeypatch.context() as patch:
        fake = types.SimpleNamespace(**{**vars(socket), "socket": make})
        patch.setattr(transit_relay_gateway, "socket", fake)
        client.send(HELLO)
        played.pump()
    assert ended_with(client, kind, 1013) == b""
    assert played.failures() == {"not_forwarded": 1}
    one.send(b"data")
    played.pump()
    assert receive(other, 4) == b"data"


# Stalls and memory.


def send_until_full(loop: Loop, sock: socket.socket) -> int:
    """Send until neither the gateway nor its kernel takes more. Return how many bytes."""
    sock.setblocking(False)
    total, before = 0, -1
    while before < total:
        before = total
        try:
            while True:
                total += sock.send(bytes(65536))
        except BlockingIOError:
            loop.pump()
    sock.settimeout(TIMEOUT)
    return total


@pytest.mark.parametrize("state", ["forwarded", "paired", "client stalls"])
def test_a_stall_at_either_side(played: PlayedLoop, state: str) -> None:
    """The client or the relay behind takes nothing. Both ends see the end, and a pair goes on."""
    played.use(played.listener, limits=Limits(stall_seconds=80))
    client, backend = (played.forwarded if state == "forwarded" else played.paired)()
    other, other_backend = played.paired()
    sender = backend if state == "client stalls" else client.sock
    assert send_until_full(played, sender) > 100_000
    for _ in range(79):
        played.advance(1)
        assert len(played.server.rendezvous.pairs) == 2
    seconds = 0
    while len(played.server.rendezvous.pairs) == 2:
        played.advance(1)
        seconds += 1
        assert seconds < 200  # the kernel may acknowledge a little more at first
    assert played.server.limits.reached.counts == {"--stall-timeout": 1}
    assert read_to_end(sender) == b""
    other.send(b"data")
    played.pump()
    assert receive(other_backend, 4) == b"data"


@pytest.mark.parametrize("kinds", [("unix", "unix"), ("unix", "ws-unix"), ("ws-unix", "ws-unix")])
def test_a_full_memory_budget(kinds: tuple[str, str]) -> None:
    """Handshakes and bytes pass beside stalled pairs, and the stalled ones lose nothing."""
    with contextlib.closing(GatewayLoop()) as loop:
        loop.restart(limits=Limits(max_memory=1 << 21, stall_seconds=0))
        stalled = fill_memory(loop)
        assert loop.server.memory.max_read_bytes == 0
        one, other = loop.meet(*kinds)
        data = bytes(range(256)) * 100
        for sender, receiver in ((one, other), (other, one)):
            sender.send(data)
            assert digest(receiver.receive(len(data))) == digest(data)
        one.half_close()
        assert other.read_to_end(1000 if kinds[1] == "ws-unix" else None) == b""
        for pair in stalled:
            pair.read_all()
        assert loop.server.memory.queued_bytes == 0


# Injected faults.

GATEWAY_CLASSES = (
    transit_relay_gateway.ClientSession,
    transit_relay_gateway.BackendSession,
    transit_relay_gateway.Gateway,
    BackendConnection,
    PlainAddresses,
)
NOT_A_HANDLER = {
    *("Gateway.__init__", "Gateway.attach"),
    "Gateway._check_dials",  # a chore of the loop
    *("Gateway.resume", "BackendConnection.resume"),  # for reloads, between turns
}


def find_gateway_handlers() -> list[Handler]:
    """Return all methods and properties of the gateway's classes."""
    found = [
        Handler(owner, name)
        for owner in GATEWAY_CLASSES
        for name, value in vars(owner).items()
        if isinstance(value, (types.FunctionType, property))
    ]
    return [one for one in found if str(one) not in NOT_A_HANDLER]


GATEWAY_HANDLERS = find_gateway_handlers()
PAIRS = 3


class Watched:
    """The connections of a gateway that belong to the scenario: those of clients and backends."""

    def __init__(self, server: Server, others: set[Connection]) -> None:
        self._server, self._others = server, others

    def __contains__(self, one: object) -> bool:
        if isinstance(one, Connection):
            return one._server is self._server and one not in self._others
        return one == "newcomer"

    def __call__(self) -> set[Connection]:
        """Return those that are there now."""
        return self._server.connections - self._others


class Stage:
    """A gateway with some pairs, and a scenario beside them."""

    def __init__(self) -> None:
        self.loop = GatewayLoop()
        kinds = [("tcp", "tcp"), ("tcp", "ws"), ("ws", "ws")]
        self.pairs = [self.loop.meet(*kinds[n], token=f"bystander{n}") for n in range(PAIRS)]
        self.connections = set(self.loop.server.connections)
        self.addresses = self.loop.server.rendezvous.target_addresses
        self.over_tcp, self.loop._over_tcp = self.loop._over_tcp, []

    def talk(self) -> None:
        """Check that the pairs relay."""
        self.loop._over_tcp += self.over_tcp
        for number, pair in enumerate(self.pairs * 2):
            one, other = pair if number < PAIRS else pair[::-1]
            one.send(b"%d" % number)
            assert other.receive(1) == b"%d" % number
        del self.loop._over_tcp[-len(self.over_tcp) :]

    def connect(self, role: Role = Role.PORT, has_proxy_header: bool = False) -> test_faults.Peer:
        """Return a client of the scenario."""
        sock = self.loop.connect(role=role, has_proxy_header=has_proxy_header)
        return test_faults.Peer(self.loop, sock)  # type: ignore[arg-type]

    def dial(self, *listeners: socket.socket) -> None:
        """Put the addresses of these listeners before that of the relay behind."""
        gateway = self.loop.server.rendezvous
        own = tuple((socket.AF_INET, one.getsockname()) for one in listeners)
        gateway.target_addresses, gateway._next = own + self.addresses, 0

    def play(self, scenario: Callable[[Stage], None], injection: Injection) -> None:
        """Play a scenario. Check that it leaves nothing, and that the pairs go on."""
        server = self.loop.server
        before = open_descriptors()
        watched = Watched(server, self.connections)
        injection.watched, injection.newcomers = watched, watched  # type: ignore[assignment]
        clients = len(self.loop._clients)
        try:
            scenario(self)
            self.loop.pump()
            self.talk()
            for conn in (injection.blamed, injection.partner):
                if isinstance(conn, Connection):
                    assert conn.phase is not Phase.OPEN, conn
                    assert conn.session.state is State.DONE, conn
        finally:
            for client in self.loop._clients[clients:]:
                client.close()
            del self.loop._clients[clients:]
            server.rendezvous.target_addresses, server.rendezvous._next = self.addresses, 0
        for _ in range(8):
            self.loop.advance(1)
        self.talk()
        gateway = server.rendezvous
        assert server.connections == self.connections, "a connection is left"
        assert len(gateway.pairs) == 2 * PAIRS and gateway.waiting == {}
        assert gateway.waiting_clients == 0 == server.memory.queued_bytes
        assert not set(gateway.dials.connections())
        assert len(self.loop.behind.server.connections) == 2 * PAIRS
        assert self.loop.behind.server.faults.count == 0
        assert open_descriptors() <= before
        check_server(server)


def pair_of_both_encodings(stage: Stage) -> None:
    """Two clients with addresses meet, and end."""
    one, other = stage.connect(has_proxy_header=True), stage.connect(Role.WEBSOCKET)
    one.send(b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 4001\r\n" + handshake("secrettoken", "one"))
    other.send(UPGRADE + message(handshake("secrettoken", "other"), b"early"))
    one.send(b"data")
    other.send(message(b"more"))
    other.send(frame(PING))
    one.end()
    other.end()


def impatient(stage: Stage) -> None:
    """The relay behind refuses a client."""
    one = stage.connect()
    one.send(handshake("secrettoken"))
    one.send(b"impatient")
    one.read()
    one.end()


def lonely(stage: Stage) -> None:
    """Clients leave before there is an answer."""
    for role, line in (
        (Role.PORT, handshake("secrettoken")),
        (Role.WEBSOCKET, UPGRADE + message(handshake("secrettoken"))),
    ):
        one = stage.connect(role)
        one.send(line)
        one.close()


def redialled(stage: Stage) -> None:
    """The first address refuses, the second answers."""
    with closed_port() as first:
        stage.dial(first)
        one = stage.connect()
        one.send(handshake("secrettoken"))
        stage.loop.advance(1)
        one.read()


def timed_out(stage: Stage) -> None:
    """The first address does not answer."""
    first = SilentPort()
    stage.dial(first)
    one = stage.connect()
    one.send(handshake("secrettoken"))
    for _ in range(6):
        stage.loop.advance(1)
    one.read()
    first.close()


def not_forwarded(stage: Stage) -> None:
    """No address answers."""
    with closed_port() as first, closed_port() as second:
        stage.dial(first, second)
        one = stage.connect(Role.WEBSOCKET)
        one.send(UPGRADE + message(handshake("secrettoken")))
        stage.loop.advance(1)
        one.read()


def bulk(stage: Stage) -> None:
    """More than the receiver's kernel accepts, then all is read."""
    one, other = stage.connect(), stage.connect()
    one.send(handshake("secrettoken", "one"))
    other.send(handshake("secrettoken", "other"))
    one.send(bytes(200_000), times=20)
    other.read()
    one.close()
    other.read()


def full(stage: Stage) -> None:
    """A gateway without room: clients without a pair make room, and later ones are refused."""
    limits = stage.loop.server.limits
    most, count = limits.max_connections, len(stage.loop.server.connections)
    try:
        limits.max_connections = count + 2  # a client and its connection to the relay behind
        stage.connect().send(b"p")
        stage.connect().send(handshake("secrettoken"))
        stage.connect().end()
        limits.max_connections = count
        stage.connect().send(b"x")
        stage.connect(Role.WEBSOCKET).send(UPGRADE)
    finally:
        limits.max_connections = most


def answered_badly(name: str, ending: Callable[[socket.socket], object]) -> Callable[[Stage], None]:
    """Return a scenario in which the test plays the relay behind."""

    def scenario(stage: Stage) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(TIMEOUT)
            stage.dial(listener)
            one = stage.connect(Role.WEBSOCKET)
            one.send(UPGRADE + message(handshake("secrettoken")))
            if select.select([listener], [], [], 0)[0]:
                backend, _ = listener.accept()
                with backend:
                    ending(backend)
                    stage.loop.pump()
                    stage.loop.advance(1)
            one.read()

    scenario.__name__ = name
    return scenario


SCENARIOS: Sequence[Callable[[Stage], None]] = (
    *(pair_of_both_encodings, impatient, lonely, redialled, timed_out, not_forwarded, bulk, full),
    answered_badly("answered by a reset", reset),
    answered_badly("answered by an end", socket.socket.close),
    answered_badly("answered by junk", lambda sock: sock.sendall(b"junk\n")),
)
_reached: dict[Handler, list[Callable[[Stage], None]]] = {}


def scenarios_for(handler: Handler) -> list[Callable[[Stage], None]]:
    """Return the scenarios that reach a handler. The first call plays all of them."""
    if not _reached:
        stage = Stage()
        _reached.update(test_faults.play_all(stage, SCENARIOS, (*GATEWAY_HANDLERS, *HANDLERS)))
        stage.loop.close()
    return _reached.get(handler, [])


def test_all_handlers_are_reached() -> None:
    assert [str(one) for one in GATEWAY_HANDLERS if not scenarios_for(one)] == []


@pytest.fixture(scope="module")
def stages() -> Iterator[list[Stage]]:
    """The stage that all tests share. After a failure, the next test makes another."""
    stages: list[Stage] = []
    yield stages
    for stage in stages:
        stage.loop.close()


def strike(
    stages: list[Stage],
    handler: Handler,
    scenario: Callable[[Stage], None],
    injection: Injection,
    caplog: pytest.LogCaptureFixture,
    most_faults: int = 1,
) -> None:
    """Play a scenario in which a handler raises. `most_faults`: for one exception."""
    stage = stages.pop() if stages else Stage()
    caplog.clear()
    stage.loop.advance(COMPLAINT_SECONDS)
    faults = stage.loop.server.faults
    before = faults.count
    try:
        with pytest.MonkeyPatch.context() as patch:
            injection.wrap(patch, handler)
            stage.play(scenario, injection)
        assert injection.raised >= 1, scenario.__name__
        messages = errors(caplog)
        assert messages and faults.count >= before + 1
        if injection.times == 1:
            assert faults.count <= before + most_faults, "\n".join(messages)
    except BaseException:
        stage.loop.close()
        raise
    stages.append(stage)


@pytest.mark.parametrize(("exception", "at_the_end", "choose"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("handler", GATEWAY_HANDLERS, ids=str)
def test_a_fault_costs_one_client(
    stages: list[Stage],
    handler: Handler,
    exception: str,
    at_the_end: bool,
    choose: Choice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both its connections end, and the pairs relay."""
    for scenario in choose(scenarios_for(handler)):
        injection = Injection(at_the_end)
        injection.exception = EXCEPTIONS[exception]
        strike(stages, handler, scenario, injection, caplog)


# Without these a connection cannot be closed, and the containment itself uses them.
NEEDED_TO_CONTAIN = {"BackendConnection.close"}


@pytest.mark.parametrize(
    "handler", [one for one in GATEWAY_HANDLERS if str(one) not in NEEDED_TO_CONTAIN], ids=str
)
def test_a_lasting_fault_costs_the_clients_that_meet_it(
    stages: list[Stage], handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    for scenario in scenarios_for(handler)[:2]:
        injection = Injection()
        injection.exception, injection.times = EXCEPTIONS["MemoryError"], 1_000_000
        strike(stages, handler, scenario, injection, caplog)


# What every relay has, in a gateway: its connections to the relay behind use the same classes.
COMMON = [
    one
    for one in HANDLERS
    if one.owner in (Connection, test_faults.Session, test_faults.Pair, test_faults.Rendezvous)
    or one.owner in (test_faults.RawFraming, test_faults.TimeLimit, Server)
]
UNREACHABLE = {
    "Connection.answer",  # of a status listener, which this gateway does not have
    *("Rendezvous.join", "Rendezvous.refusal"),  # Gateway overrides them
    *("Rendezvous._partner_for", "Session.displaced"),  # only Rendezvous.join calls them
}


def test_all_other_handlers_of_every_relay_are_reached() -> None:
    assert {str(one) for one in COMMON if not scenarios_for(one)} == UNREACHABLE


@pytest.mark.parametrize("handler", [one for one in COMMON if str(one) not in UNREACHABLE], ids=str)
def test_a_fault_of_a_handler_of_every_relay(
    stages: list[Stage], handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """An event of the relay behind can end the client, so a fault there can lead to another one."""
    for scenario in scenarios_for(handler)[:3]:
        injection = Injection()
        injection.exception = EXCEPTIONS["AssertionError"]
        strike(stages, handler, scenario, injection, caplog, most_faults=2)
