"""Fault injection: each handler raises once, and ends the one connection that was being served.

Twenty pairs relay beside it. Their bytes are checked, and they outlive all faults of this file.
The handlers are found by introspection, so a new one is tested or the test fails.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import random
import select
import selectors
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import pytest
from conftest import open_descriptors
from helpers import (
    BINARY,
    CLOSE,
    PING,
    TIMEOUT,
    Client,
    Loop,
    WebSocketClient,
    close_payload,
    frame,
    handshake,
    is_readable,
    message,
    reset,
)
from invariants import check_server
from streams import UPGRADE

import transit_relay
from transit_relay import (
    COMPLAINT_SECONDS,
    Connection,
    DetectFraming,
    Framing,
    Limits,
    Pair,
    Phase,
    RawFraming,
    Rendezvous,
    Role,
    Server,
    Session,
    State,
    TimeLimit,
    Timers,
)
from ws_frames import HttpFraming, Opening, ProxyFraming, WebSocketFraming

PAIRS = 20
TOKEN = "secrettoken"
EXCEPTIONS: dict[str, Callable[[], BaseException]] = {
    "AssertionError": lambda: AssertionError("injected"),
    "OSError": lambda: OSError(5, "injected"),
    "MemoryError": lambda: MemoryError("injected"),
    "KeyError of a token": lambda: KeyError(handshake(TOKEN)),
}

# The handlers.

CLASSES: list[type] = [
    Connection,
    Framing,
    RawFraming,
    DetectFraming,
    Opening,
    ProxyFraming,
    HttpFraming,
    WebSocketFraming,
    Session,
    Pair,
    Rendezvous,
    transit_relay.ListenerHandler,
    transit_relay.Acceptor,
    transit_relay.BulkQueue,
    transit_relay.MemoryBudget,
    TimeLimit,
    Timers,
]
SERVER_METHODS = (
    # `admit` contains the faults of its own calls, all of which are in this list.
    "update_interest",
)
# The loop itself, and what is called without a connection. A fault there may end the process.
NOT_A_HANDLER = {
    *("Connection.__repr__", "Session.__repr__"),
    *("TimeLimit.__init__", "TimeLimit.next_due", "TimeLimit.take_expired"),
    *("TimeLimit.connections", "Timers.__init__", "Timers.next_due"),
    *("Rendezvous.__init__", "Rendezvous.attach"),
    *("Rendezvous.incomplete_bytes", "Rendezvous.relayed_bytes"),
    *("Acceptor.__init__", "Acceptor.close", "Acceptor.start"),
    # For reloads only: these methods run between turns, and in the new program before any turn.
    *("Rendezvous.resume_pair", "Rendezvous.resume_waiting", "TimeLimit.place"),
    *("Timers.place", "Timers.resume"),
    *("BulkQueue.__init__", "BulkQueue.serve"),
    *("Timers.every", "Timers.due_chores", "Timers.end_status_clients"),  # chores of the loop
    *("MemoryBudget.__init__", "Connection.release_pipe"),  # test_memory.py has a fault there
    # A client is sent nothing before its byte stream begins.
    *("Opening.encode", "Opening.backlog_sent", "Opening.keep_alive"),
    *("Timers.forget", "TimeLimit.cancel"),  # see test_a_fault_in_the_time_limits
    # After a fault only: a second fault there is tested apart.
    *("Session.abandon", "Rendezvous.expel"),
}


class Handler(NamedTuple):
    """A method of a class, or a function of the module."""

    owner: type | types.ModuleType
    name: str

    def __str__(self) -> str:
        return f"{self.owner.__name__}.{self.name}"


def find_handlers() -> list[Handler]:
    """Return all methods and properties of the classes that serve connections."""
    kinds = (types.FunctionType, property, staticmethod)
    found = [
        Handler(owner, name)
        for owner in CLASSES
        for name, value in vars(owner).items()
        if isinstance(value, kinds) and (not issubclass(owner, tuple) or name == "on_ready")
    ]
    return [one for one in found if str(one) not in NOT_A_HANDLER] + [
        Handler(Server, name) for name in SERVER_METHODS
    ]


HANDLERS = find_handlers()


def containing_frame(
    frame: types.FrameType | None, callee: str
) -> tuple[types.FrameType, str] | None:
    """Return the innermost frame of the Server that contains faults, and the name of its callee.

    `callee`: the name of the function that `frame` called.
    """
    while frame is not None:
        name = frame.f_code.co_name
        if frame.f_code.co_filename == transit_relay.__file__ and (
            name in ("guard", "contain")
            or name == "admit"
            or (name == "run_once" and callee == "on_ready")
            or (name == "serve" and callee == "move")
            or (name == "reap" and callee == "_close")
        ):
            return frame, callee
        frame, callee = frame.f_back, callee if name == "wrapper" else name
    return None


def served_connection(frame: types.FrameType | None, callee: str) -> object:
    """Return the connection, or the ListenerHandler, on whose behalf this code runs.

    "newcomer" stands for a connection that is not yet made, "acceptor" for a task without one.
    """
    found = containing_frame(frame, callee)
    if found is None:
        return None
    local = found[0].f_locals
    name = found[0].f_code.co_name
    if name == "admit":
        return local["conn"] or "newcomer"  # also while `admit` contains a fault
    if name == "run_once":
        return local["key"].data
    if name in ("serve", "reap"):
        return local["conn"]
    served = local["served"]
    return served if name == "contain" or isinstance(served, Connection) else "acceptor"


class Injection:
    """Raises an exception once, in a call on behalf of a watched connection."""

    def __init__(self, raise_at_the_end: bool = False) -> None:
        self.exception: Callable[[], BaseException] | None = None  # None: only note the calls
        self.raise_at_the_end = raise_at_the_end
        self.watched: set[object] = set()
        self.newcomers: Callable[[], set[Connection]] = set  # while "newcomer" is watched
        self.called: set[Handler] = set()
        self.blamed: object = None
        self.partner: Connection | None = None
        self.raised = 0
        self.times = 1  # how often it raises

    def wrap(self, patch: pytest.MonkeyPatch, handler: Handler) -> None:
        """Patch a handler, so that it raises."""
        original = vars(handler.owner)[handler.name]

        def wrapped(call: Callable[..., object]) -> Callable[..., object]:
            def wrapper(*arguments: object, **options: object) -> object:
                if self.is_done(handler):
                    return call(*arguments, **options)
                served = served_connection(sys._getframe(1), handler.name)
                is_due = served in self.watched or (
                    "newcomer" in self.watched and served in self.newcomers()
                )
                if is_due and not self.raise_at_the_end:
                    self.strike(handler, served)
                result = call(*arguments, **options)
                if is_due and self.raise_at_the_end:
                    self.strike(handler, served)
                return result

            return wrapper

        if isinstance(original, property):
            assert original.fget is not None
            patch.setattr(handler.owner, handler.name, property(wrapped(original.fget)))
        elif isinstance(original, staticmethod):
            call = staticmethod(wrapped(original.__func__))
            patch.setattr(handler.owner, handler.name, call)
        else:
            patch.setattr(handler.owner, handler.name, wrapped(original))

    def is_done(self, handler: Handler) -> bool:
        """Return whether another call of `handler` has no effect."""
        if self.exception is None:
            return handler in self.called
        return self.raised >= self.times

    def strike(self, handler: Handler, served: object) -> None:
        """Raise the exception, or note the call."""
        self.called.add(handler)
        if self.exception is None:
            return
        self.raised += 1
        self.blamed = served
        if isinstance(served, Connection):
            sessions = served.session.pair.sessions if served.session.pair is not None else ()
            for session in sessions:
                if session is not served.session:
                    assert isinstance(session.transport, Connection)
                    self.partner = session.transport
        raise self.exception()


# The relay, with twenty pairs.


class ListeningLoop(Loop):
    """A Loop whose Server has a listener. It checks the server only after a turn with a fault."""

    def __init__(self) -> None:
        super().__init__(max_pipes=transit_relay.affordable_pipes())
        endpoint = transit_relay.parse_endpoint("tcp:0:interface=127.0.0.1")
        (self.listener,) = transit_relay.open_endpoint(endpoint)
        self.restart(self.listener)

    def pump(self) -> None:
        """Run turns until nothing is ready or on its way, and one for the timers."""
        deadline = time.monotonic() + TIMEOUT
        self.wait_for_arrivals()
        while self.server.bulk.ready or self.server._selector.select(0):
            self._run_turn()
            self.wait_for_arrivals()
            assert time.monotonic() < deadline, "the loop does not come to rest"
        self._run_turn()

    def _run_turn(self) -> None:
        before = self.server.faults.count
        self.server.run_once(0)
        if self.server.faults.count > before:
            check_server(self.server)


class Peer:
    """A client of a scenario. It ignores errors of its socket: a fault may end it at any time."""

    def __init__(self, loop: Loop, sock: socket.socket) -> None:
        self._loop = loop
        self.sock = sock
        sock.setblocking(False)

    def send(self, data: bytes, times: int = 1) -> None:
        """Send what the relay accepts of `data`, and let the relay work."""
        for _ in range(times):
            try:
                self.sock.send(data)
            except OSError:
                pass
            self._loop.pump()

    def read(self) -> bytes:
        """Read all that is there, and let the relay work."""
        data = b""
        while True:
            self._loop.pump()
            try:
                part = self.sock.recv(1 << 20)
            except OSError:
                return data
            if not part:
                return data
            data += part

    def has_ended(self) -> bool:
        """Return whether the relay has ended the connection, in order or with a reset."""
        try:
            while self.sock.recv(1 << 20):
                pass
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def end(self) -> None:
        """End the client's direction."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass
        self._loop.pump()

    def close(self) -> None:
        """Close the socket."""
        self.sock.close()
        self._loop.pump()

    def reset(self) -> None:
        """Close the socket with a reset."""
        reset(self.sock)
        self._loop.pump()


class Stage:
    """A relay with twenty pairs, and the clients of the scenario that is played."""

    def __init__(self) -> None:
        self.loop = ListeningLoop()
        self.is_intact = False
        self._chance = random.Random(17)
        self.pairs = [self._meet(number) for number in range(PAIRS)]
        self.connections = set(self.loop.server.connections)
        self._over_tcp, self.loop._over_tcp = self.loop._over_tcp, []  # `hear` waits for these
        self.injection = Injection()
        self.peers: dict[Connection, Peer] = {}
        self._sent: list[tuple[bytes, bytes]] = []

    def _meet(self, number: int) -> tuple[Client, Client]:
        base = "" if number < 4 else "-unix"
        kinds = [kind + base for kind in ("tcp", "ws")]
        kinds = [kind.replace("tcp-unix", "unix") for kind in kinds]
        one = self.loop.client(kinds[number % 2])
        other = self.loop.client(kinds[number // 2 % 2])
        one.send(handshake(f"bystander{number}", "one"))
        other.send(handshake(f"bystander{number}", "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"
        return one, other

    def talk(self) -> None:
        """Have all pairs send. The relay has not read it yet."""
        for one, other in self.pairs:
            data = self._chance.randbytes(200), self._chance.randbytes(300)
            for client, payload in zip((one, other), data):
                (wire,) = client.encode(payload)
                assert client.sock.send(wire) == len(wire)
            self._sent.append(data)

    def hear(self) -> None:
        """Check that all which was sent has arrived, and nothing else."""
        own = self.loop._over_tcp
        for _ in range(2):  # to the relay, and from there to the partner
            self.loop._over_tcp = own + self._over_tcp
            self.loop.wait_for_arrivals()
            self.loop._over_tcp = own  # waiting for all pairs after each turn takes long
            self.loop.pump()
        check_server(self.loop.server)
        for (one, other), data in zip(self.pairs * 2, self._sent):
            assert other.receive(len(data[0])) == data[0]
            assert one.receive(len(data[1])) == data[1]
        self._sent.clear()
        for client in (client for pair in self.pairs for client in pair):
            assert not is_readable(client.sock)
            if isinstance(client, WebSocketClient):
                assert not client._bytes and not client._payload
        self.loop._over_tcp.clear()

    # What scenarios use.

    def connect(
        self, role: Role = Role.PORT, tcp: bool = False, has_proxy_header: bool = False
    ) -> Peer:
        """Return a new client, whose connection is watched."""
        before = self._expect_newcomer()
        sock = self.loop.connect(tcp, role, has_proxy_header)
        return self._watch(before, sock)

    def knock(self) -> Peer:
        """Return a new client that is accepted by the listener."""
        before = self._expect_newcomer()
        doors = [
            key.data
            for key in self.loop.server._selector.get_map().values()
            if isinstance(key.data, transit_relay.ListenerHandler)
        ]
        self.injection.watched.update(doors)
        sock = socket.create_connection(self.loop.listener.sock.getsockname())
        self.loop._clients.append(sock)
        assert select.select([self.loop.listener.sock], [], [], TIMEOUT)[0]
        self.loop.pump()
        self.injection.watched.difference_update(doors)
        return self._watch(before, sock)

    def _expect_newcomer(self) -> set[Connection]:
        before = set(self.loop.server.connections)
        self.injection.watched.add("newcomer")
        self.injection.newcomers = lambda: self.loop.server.connections - before
        return before

    def _watch(self, before: set[Connection], sock: socket.socket) -> Peer:
        self.injection.watched.discard("newcomer")
        peer = Peer(self.loop, sock)
        for conn in self.loop.server.connections - before:
            self.injection.watched.add(conn)
            self.peers[conn] = peer
        return peer

    def pair(self, role: Role = Role.PORT, tcp: bool = False) -> tuple[Peer, Peer]:
        """Return a pair of a raw client and one for a listener of `role`."""
        one, other = self.connect(Role.PORT, tcp), self.connect(role, tcp)
        one.send(handshake(TOKEN, "one"))
        if role is Role.WEBSOCKET:
            other.send(UPGRADE)
            other.send(message(handshake(TOKEN, "other")))
        else:
            other.send(handshake(TOKEN, "other"))
        return one, other

    def play(self, scenario: Callable[[Stage], None], injection: Injection) -> None:
        """Play a scenario beside the pairs, then check that nothing of it is left."""
        server = self.loop.server
        descriptors = open_descriptors()
        self.injection = injection
        self.peers = {}
        clients = len(self.loop._clients)
        self.talk()
        scenario(self)
        self.loop.pump()
        check_server(server)
        self.check_blamed()
        self.talk()
        for client in self.loop._clients[clients:]:
            client.close()
        del self.loop._clients[clients:]
        self.loop.pump()
        self.loop._over_tcp.clear()
        self.loop.advance(1)
        self.loop.advance(1)
        assert server.connections == self.connections, "a connection is left"
        assert self.loop.listener.fd in server._selector.get_map(), "it accepts no newcomers"
        self.hear()
        server.pipes.close_idle()
        assert open_descriptors() <= descriptors
        assert server.rendezvous.waiting == {} and server.rendezvous.waiting_clients == 0
        assert len(server.rendezvous.pairs) == PAIRS
        assert all(conn.phase is Phase.OPEN for conn in self.connections)

    def check_blamed(self) -> None:
        """Check that the connection that was served has ended, and its partner."""
        for conn in (self.injection.blamed, self.injection.partner):
            if isinstance(conn, Connection):
                assert conn.phase is not Phase.OPEN, conn
                assert conn.session.state is State.DONE, conn
                if conn in self.peers:
                    self.peers[conn].read()
                    assert self.peers[conn].has_ended(), conn

    def close(self) -> None:
        """Close everything."""
        self.loop.close()


# The scenarios. Together they reach all handlers.


def raw_pair(stage: Stage) -> None:
    """Two raw clients, with a handshake in pieces."""
    one, other = stage.connect(), stage.connect(Role.WEBSOCKET)
    one.send(handshake(TOKEN, "one")[:50])
    one.send(handshake(TOKEN, "one")[50:])
    other.send(handshake(TOKEN, "other")[:5])
    other.send(handshake(TOKEN, "other")[5:] + b"early")
    one.send(b"data")
    other.send(b"more")
    one.end()
    other.end()


def raw_bulk(stage: Stage) -> None:
    """More than the receiver's kernel accepts, then all is read."""
    one, other = stage.pair()
    one.send(bytes(200_000), times=8)
    other.read()
    other.send(bytes(1000))
    one.read()
    one.send(bytes(200_000), times=4)
    one.close()
    other.read()


def websocket_pair(stage: Stage) -> None:
    """A raw client and a WebSocket client, which ends with a Close."""
    one, other = stage.pair(Role.WEBSOCKET)
    other.send(frame(PING, b"p") + message(b"da", b"ta"))
    one.send(bytes(50_000))
    other.read()
    other.send(frame(CLOSE, close_payload(1000)))


def websocket_backlog(stage: Stage) -> None:
    """A Ping is answered behind a backlog."""
    one, other = stage.pair(Role.WEBSOCKET)
    one.send(bytes(200_000), times=8)
    other.send(frame(PING, b"waits"))
    other.read()
    one.end()
    other.read()


def broken_encoding(stage: Stage) -> None:
    """A WebSocket client without a mask, in a pair."""
    _, other = stage.pair(Role.WEBSOCKET)
    other.send(frame(BINARY, b"not masked", key=None))


def refused(stage: Stage) -> None:
    """A bad handshake, and a client that sends too early. Both linger for their time."""
    one, other = stage.connect(), stage.connect()
    one.send(b"junk\n")
    one.send(b"more junk\n")
    other.send(handshake(TOKEN))
    other.send(b"impatient")
    one.read()
    other.read()
    for _ in range(7):
        stage.loop.advance(1)


def redundant(stage: Stage) -> None:
    """Three clients of one side, and a partner."""
    for _ in range(3):
        stage.connect().send(handshake(TOKEN, "one"))
    stage.connect().send(handshake(TOKEN, "other"))


def lonely(stage: Stage) -> None:
    """A WebSocket client that answers no Ping, and a raw one that leaves."""
    one, other = stage.connect(Role.WEBSOCKET), stage.connect()
    one.send(UPGRADE + message(handshake(TOKEN, "one")))
    other.send(handshake(TOKEN, "one"))
    other.close()
    for _ in range(4):
        stage.loop.advance(25)


def late(stage: Stage) -> None:
    """A client without a handshake, until its time is over."""
    stage.connect()
    stage.loop.advance(60)


def health_check(stage: Stage) -> None:
    """Plain HTTP requests."""
    one, other = stage.connect(), stage.connect(Role.WEBSOCKET)
    one.send(b"GET / HTTP/1.1\r\n")
    one.send(b"\r\n")
    other.send(b"POST / HTTP/1.1\r\n\r\n")


def status_request(stage: Stage) -> None:
    """Requests about the relay, one in pieces and one that is wrong, and a silent client."""
    one, other = stage.connect(Role.STATUS), stage.connect(Role.STATUS, has_proxy_header=True)
    stage.connect(Role.STATUS)
    one.send(b"GET / HTTP/1.1\r\n")
    one.send(b"\r\n")
    other.send(b"PROXY UNKNOWN\r\njunk\r\n")
    for _ in range(4):
        stage.loop.advance(30)


def proxied(stage: Stage) -> None:
    """A client and a health check behind a PROXY header, and one without the header."""
    header = b"PROXY TCP4 192.0.2.7 192.0.2.1 50000 4001\r\n"
    one, other, third = (stage.connect(has_proxy_header=True) for _ in range(3))
    one.send(header[:9])
    one.send(header[9:] + handshake(TOKEN))
    other.send(header + b"GET / HTTP/1.1\r\n\r\n")
    third.send(handshake(TOKEN))


def failed_write(stage: Stage) -> None:
    """A receiver is reset while neither side is read."""
    one, other = stage.pair(tcp=True)
    other.send(bytes(200_000), times=40)
    other.reset()
    one.send(b"into the void")
    one.read()
    one.end()


def accepted(stage: Stage) -> None:
    """Newcomers at the listener. The second one is first refused by accept."""
    stage.injection.watched.add("acceptor")
    stage.knock().send(handshake(TOKEN))
    (listener,) = stage.loop.server._acceptor._listeners
    real = listener.sock
    listener.sock = FullTable(real)  # type: ignore[assignment]
    stage.knock()
    listener.sock = real
    stage.loop.advance(1)
    stage.loop.advance(1)


def full(stage: Stage) -> None:
    """A relay without room: a client that waits makes room, later newcomers are refused."""
    enforcer = stage.loop.server.limits
    most, count = enforcer.max_connections, len(stage.loop.server.connections)
    try:
        enforcer.max_connections = count + 1
        stage.connect().send(handshake(TOKEN))
        stage.connect().end()
        enforcer.max_connections = count
        stage.connect().send(b"x")
        stage.connect(Role.WEBSOCKET).send(UPGRADE)
    finally:
        enforcer.max_connections = most


class FullTable:
    """A listening socket that cannot accept, because the system has no free file."""

    def __init__(self, real: socket.socket) -> None:
        self.real = real

    def __getattr__(self, name: str) -> object:
        return getattr(self.real, name)

    def accept(self) -> NoReturn:
        raise OSError(errno.ENFILE, "injected")


def unread(stage: Stage) -> None:
    """A WebSocket client that has a backlog, sends a Close, and reads nothing."""
    one, other = stage.pair(Role.WEBSOCKET)
    one.send(bytes(200_000), times=8)
    other.send(frame(CLOSE))
    stage.loop.advance(25)


SCENARIOS = (
    *(raw_pair, raw_bulk, websocket_pair, websocket_backlog, broken_encoding, refused),
    *(redundant, lonely, late, health_check, proxied, failed_write, accepted, unread, full),
    status_request,
)


@pytest.fixture(scope="module")
def stages() -> Iterator[list[Stage]]:
    """The stage that all tests share. After a failure, the next test makes another."""
    stages: list[Stage] = []
    yield stages
    for stage in stages:
        stage.close()


@pytest.fixture
def stage(stages: list[Stage]) -> Iterator[Stage]:
    """A relay with twenty pairs."""
    if stages and not stages[-1].is_intact:
        stages.pop().close()
    if not stages:
        stages.append(Stage())
    stages[-1].is_intact = False
    yield stages[-1]


def play_all(
    stage: Any, scenarios: Sequence[Callable[[Any], None]], handlers: Sequence[Handler]
) -> dict[Handler, list[Callable[[Any], None]]]:
    """Play all scenarios on a stage. Return, by handler, those that reach it."""
    reached: dict[Handler, list[Callable[[Any], None]]] = {}
    for scenario in scenarios:
        injection = Injection()
        with pytest.MonkeyPatch.context() as patch:
            for one in handlers:
                injection.wrap(patch, one)
            stage.play(scenario, injection)
        for one in injection.called:
            reached.setdefault(one, []).append(scenario)
    return reached


_reached: dict[Handler, list[Callable[[Stage], None]]] = {}


def scenarios_for(handler: Handler) -> list[Callable[[Stage], None]]:
    """Return the scenarios that reach a handler. The first call plays all of them."""
    if not _reached:
        stage = Stage()
        _reached.update(play_all(stage, SCENARIOS, HANDLERS))
        stage.close()
    return _reached.get(handler, [])


def test_all_handlers_are_reached() -> None:
    assert [str(handler) for handler in HANDLERS if not scenarios_for(handler)] == []


def test_the_list_of_exceptions_names_methods() -> None:
    """A renamed method must not stay in the list."""
    names = {f"{owner.__name__}.{name}" for owner in CLASSES for name in vars(owner)}
    assert names >= NOT_A_HANDLER


# An exception, whether it is raised before or after the handler's work, and which of the
# scenarios that reach the handler are played.
Choice = Callable[[list[Callable[[Stage], None]]], list[Callable[[Stage], None]]]
VARIANTS: dict[str, tuple[str, bool, Choice]] = {
    "AssertionError before": ("AssertionError", False, lambda scenarios: scenarios[:4]),
    "AssertionError after": ("AssertionError", True, lambda scenarios: scenarios[-2:]),
    "OSError before": ("OSError", False, lambda scenarios: scenarios[:1]),
    "MemoryError before": ("MemoryError", False, lambda scenarios: scenarios[-1:]),
    "KeyError before": ("KeyError of a token", False, lambda scenarios: scenarios[-1:]),
}
# A handler that reacts to this error of the system by itself.
CAUGHT = {("Acceptor._register", "OSError")}


def errors(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages about faults. None may have a client's token."""
    messages = [record.getMessage() for record in caplog.records]
    assert [message for message in messages if TOKEN in message] == []
    return [one.getMessage() for one in caplog.records if one.levelno >= logging.ERROR]


@pytest.mark.parametrize(("exception", "at_the_end", "choose"), VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("handler", HANDLERS, ids=str)
def test_a_fault_ends_one_connection_and_its_pair(
    stage: Stage,
    handler: Handler,
    exception: str,
    at_the_end: bool,
    choose: Choice,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The message appears once, and the other pairs relay all bytes."""
    for scenario in choose(scenarios_for(handler)):
        caplog.clear()
        stage.loop.advance(COMPLAINT_SECONDS)
        before = stage.loop.server.faults.count
        injection = Injection(at_the_end)
        injection.exception = EXCEPTIONS[exception]
        with pytest.MonkeyPatch.context() as patch:
            injection.wrap(patch, handler)
            stage.play(scenario, injection)
        assert injection.raised == 1
        messages = errors(caplog)
        if (str(handler), exception) not in CAUGHT:
            assert len(messages) == 1, "\n".join(messages)
            first, *traceback, last = messages[0].splitlines()
            assert first.startswith("contained fault in strike, line ")
            assert "transit_relay.py" in traceback[0]
            assert last.split(":")[0] == exception.split()[0]
            assert stage.loop.server.faults.count == before + 1
            assert stage.loop.server.snapshot().faults == before + 1
    stage.is_intact = True


# The containment itself uses these, or a connection cannot be closed without them.
NEEDED_TO_CONTAIN = {
    *("Connection.partner", "Connection.interest"),
    *("Connection.close", "Pair.partner_of", "Server.update_interest"),
    *("ListenerHandler.on_ready", "Acceptor._register", "Acceptor.accept", "Acceptor.end_pause"),
    *("Acceptor.pause", "Acceptor._unregister"),
}


@pytest.mark.parametrize(
    "handler", [one for one in HANDLERS if str(one) not in NEEDED_TO_CONTAIN], ids=str
)
def test_a_lasting_fault_ends_the_connections_that_meet_it(
    stage: Stage, handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    """The relay does not spin, the other pairs relay all bytes, and the fault is logged once."""
    for scenario in scenarios_for(handler)[:1]:
        caplog.clear()
        stage.loop.advance(COMPLAINT_SECONDS)
        injection = Injection()
        injection.exception = EXCEPTIONS["AssertionError"]
        injection.times = 1_000_000
        with pytest.MonkeyPatch.context() as patch:
            injection.wrap(patch, handler)
            stage.play(scenario, injection)
        assert injection.raised >= 1
        injected = [one for one in errors(caplog) if "AssertionError: injected" in one]
        assert len(injected) >= 1
    stage.is_intact = True


def test_further_faults_of_a_place_are_counted_and_logged_after_a_minute(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    faults = stage.loop.server.faults
    before = faults.count
    error = AssertionError("injected")
    with pytest.MonkeyPatch.context() as patch:

        def fail(session: Session, line: bytes) -> None:
            if line == b"junk":
                raise error

        patch.setattr(Session, "line_received", fail)
        stage.injection = Injection()
        for _ in range(10):
            stage.connect().send(b"junk\n")
        assert faults.count == before + 10 and len(errors(caplog)) == 1
        assert "more since" not in errors(caplog)[0]
        stage.loop.advance(COMPLAINT_SECONDS - 0.25)
        stage.connect().send(b"junk\n")
        assert faults.count == before + 11 and len(errors(caplog)) == 1
        stage.loop.advance(0.25)
        stage.connect().send(b"junk\n")
    assert faults.count == before + 12
    assert len(errors(caplog)) == 2
    assert errors(caplog)[1].endswith("AssertionError: injected (10 more since the last message)")
    stage.talk()
    stage.hear()


# Faults without a connection.


class FaultyWork:
    """A task that raises as often as the test says."""

    def __init__(self, exception: Callable[[], BaseException], faults: int) -> None:
        self.calls = 0
        self._exception = exception
        self._faults = faults

    def __call__(self, *_: object) -> None:
        self.calls += 1
        if self.calls <= self._faults:
            raise self._exception()


def fail_once(patch: pytest.MonkeyPatch, handler: Handler, work: FaultyWork) -> None:
    """Patch a handler, so that it calls `work` first."""
    original = vars(handler.owner)[handler.name]

    def patched(*arguments: object) -> object:
        work()
        return original(*arguments)

    patch.setattr(handler.owner, handler.name, patched)


@pytest.mark.parametrize("exception", EXCEPTIONS)
def test_a_fault_of_a_chore_costs_that_run(
    loop: Loop, exception: str, caplog: pytest.LogCaptureFixture
) -> None:
    work, later_work = FaultyWork(EXCEPTIONS[exception], 3), FaultyWork(MemoryError, 0)
    loop.server.timers.every(10, work)
    loop.server.timers.every(10, later_work)
    one, other = loop.meet()
    for run in range(1, 6):
        assert work.calls == later_work.calls == run
        assert loop.server.faults.count == min(run, 3)
        one.send(b"data")
        assert other.receive(4) == b"data"
        loop.advance(10)
    assert len(errors(caplog)) == 1


@pytest.mark.parametrize("exception", EXCEPTIONS)
@pytest.mark.parametrize(
    ("handler", "sent", "seconds"),
    [
        (Handler(Session, "client_ended"), b"", Limits().handshake_seconds),
        (
            Handler(WebSocketFraming, "keep_alive"),
            UPGRADE + message(handshake(TOKEN, "one")),
            transit_relay.PING_SECONDS,
        ),
        (Handler(Connection, "check_linger"), b"junk\n", transit_relay.LINGER_POLL_SECONDS),
    ],
    ids=["handshaking", "silent", "lingering"],
)
def test_a_fault_of_a_time_limit_ends_its_connection(
    loop: Loop,
    handler: Handler,
    sent: bytes,
    seconds: float,
    exception: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The connection of the next entry has its ordinary end, and a pair relays all bytes."""
    one, other = loop.meet()
    clients = [loop.client("unix") for _ in range(2)]
    for client in clients:
        client.send(sent)
    loop.pump()
    work = FaultyWork(EXCEPTIONS[exception], 1)
    fail_once(monkeypatch, handler, work)
    loop.advance(seconds)
    assert work.calls >= 2
    assert len(errors(caplog)) == loop.server.faults.count == 1
    faulty, sound = (client.conn for client in clients)
    assert faulty is not None and sound is not None
    assert faulty.phase is not Phase.OPEN and faulty.session.state is State.DONE
    assert (sound.phase is faulty.phase) == (sent == b"")  # the limit of a handshake ends both
    one.send(b"data")
    assert other.receive(4) == b"data"


def test_a_fault_of_bulk_that_is_not_polled(loop: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is polled again until its peer's end, and both ends are in order."""
    monkeypatch.setattr(transit_relay, "MAX_POLLED_BULK", 0)
    monkeypatch.setattr(transit_relay, "BULK_BYTES", 1)
    loop.server.memory.change(0)  # computes its bulk_bytes again
    one, other = loop.meet("unix", "unix")
    work = FaultyWork(MemoryError, 1)
    fail_once(monkeypatch, Handler(transit_relay.BulkQueue, "move"), work)
    one.send(b"data")
    loop.pump()
    assert work.calls >= 1 and loop.server.faults.count == 1
    assert one.conn is not None and one.conn.phase is Phase.LINGERING
    assert one.conn.mask == selectors.EVENT_READ
    one.read_to_end()
    other.read_to_end()
    one.close()
    loop.pump()
    assert one.conn not in loop.server.connections
    assert loop.recorder.moods() == ["happy"]


@pytest.mark.parametrize("place", ["select", "repair"])
def test_the_loop_has_no_memory(loop: Loop, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection with the largest backlog is closed in that turn. The relay goes on."""
    stalled, other = loop.meet("unix", "unix")
    assert other.conn is not None
    stalled.sock.setblocking(False)
    while other.conn.backlog is None:
        with contextlib.suppress(BlockingIOError):
            stalled.sock.send(bytes(65536))
        loop.server.run_once(0)
    first, second = loop.meet("unix", "unix")
    first.send(b"data")  # so that the turn does not wait
    with monkeypatch.context() as patch:
        if place == "select":
            patch.setattr(loop.server._selector, "select", FaultyWork(MemoryError, 1))
        else:
            patch.setattr(loop.server.faults, "repair", FaultyWork(MemoryError, 1))
            loop.server.faults.need_repair = True
        loop.server._run_turn()
    assert other.conn.sock.fileno() < 0
    assert loop.server.faults.count == 1
    loop.pump()
    assert second.receive(4) == b"data"
    stalled.close()
    loop.pump()
    assert loop.recorder.moods() == ["happy"]


@pytest.mark.parametrize("name", ["handshaking", "silent", "linger_polls"])
def test_a_fault_in_the_time_limits_of_a_closed_connection(
    loop: Loop, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is closed, and its entry is gone when the limit has passed."""
    queue = getattr(loop.server.timers, name)
    client = loop.client("unix")
    assert client.conn is not None
    queue.start(client.conn, loop.clock())
    with monkeypatch.context() as patch:
        patch.setattr(Timers, "forget", FaultyWork(MemoryError, 1))
        client.close()
        loop.server.run_once(0)
    assert loop.server.connections == set() and loop.server.faults.count == 1
    loop.wait_for_arrivals()
    loop.clock.advance(60)
    loop.server.run_once(0)
    assert not set(queue.connections())
    assert loop.server.faults.count == 1


@pytest.mark.parametrize(
    ("handler", "faults"),
    [
        (Handler(Session, "abandon"), 3),  # the third: the session that is left as it was
        (Handler(Rendezvous, "expel"), 2),
    ],
    ids=str,
)
def test_a_fault_while_another_one_is_contained(
    loop: Loop, handler: Handler, faults: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other pairs relay all bytes. The connection is closed."""
    one, other = loop.meet()
    with monkeypatch.context() as patch:
        fail_once(patch, handler, FaultyWork(MemoryError, 1))
        fail_once(patch, Handler(Session, "matched"), FaultyWork(MemoryError, 1))
        first, second = loop.client("unix"), loop.client("unix")
        first.send(handshake(TOKEN, "one"))
        second.send(handshake(TOKEN, "other"))
        loop.pump()
        assert first.sock.recv(100) == second.sock.recv(100) == b""
    assert loop.server.faults.count == faults
    one.send(b"data")
    assert other.receive(4) == b"data"
    assert len(loop.server.connections) == 2


@pytest.mark.parametrize(
    "handler",
    [
        Handler(Connection, "advance"),
        Handler(Connection, "doom"),
        Handler(Session, "abandon"),
        Handler(Rendezvous, "expel"),
        Handler(transit_relay, "is_consistent"),
    ],
    ids=str,
)
def test_a_lasting_fault_of_the_repair_lets_the_loop_run_on(
    loop: Loop, handler: Handler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn repairs at most once. The first turn without the fault leaves nothing to repair."""
    one, other = loop.meet()
    first, second = loop.client("unix"), loop.client("unix")
    first.send(handshake(TOKEN, "one"))
    loop.pump()
    repairs = []
    repair = loop.server.faults.repair
    monkeypatch.setattr(loop.server.faults, "repair", lambda: repairs.append(repair()))
    with monkeypatch.context() as patch:
        work = FaultyWork(MemoryError, 1_000_000)
        fail_once(patch, handler, work)
        fail_once(patch, Handler(Session, "matched"), FaultyWork(MemoryError, 1))
        second.send(handshake(TOKEN, "other"))
        for turn in range(1, 5):
            one.sock.send(b"data")
            loop.wait_for_arrivals()
            loop.server.run_once(0)
            assert other.sock.recv(4) == b"data"
            assert len(repairs) == turn
        assert work.calls > 0
    loop.server.run_once(0)
    loop.pump()
    assert len(repairs) == 5
    assert not loop.server.faults.need_repair
    assert loop.server.rendezvous.waiting == {} and len(loop.server.rendezvous.pairs) == 1
    assert second.sock.recv(100) == b""


def test_a_connection_that_the_selector_refuses_has_its_record_beside_a_fault(
    loop: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The repair of the faulty connection comes after the ordinary end of the refused one."""
    refused, faulty = loop.client("unix"), loop.client("unix")
    refused.send(handshake("refused"))
    loop.pump()
    conn = refused.conn
    assert conn is not None and loop.server._selector is not None
    with monkeypatch.context() as patch:
        fail_once(patch, Handler(Session, "line_received"), FaultyWork(MemoryError, 1))

        def refuse(fd: int, *_: object) -> None:
            loop.server._selector.unregister(fd)  # as the selector itself does then
            raise OSError(errno.ENOSPC, "injected")

        patch.setattr(loop.server._selector, "modify", refuse)
        faulty.sock.send(b"junk\n")
        conn.mask |= selectors.EVENT_WRITE  # so that it is registered anew
        loop.server.timers.every(1e6, partial(loop.server.update_interest, conn))
        loop.server.run_once(0)
    assert loop.server.faults.count == 2
    assert loop.recorder.moods() == ["empty", "lonely"]


def test_accept_closes_a_newcomer_that_is_not_admitted(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay does not accept at once again, but after a while."""
    loop = ListeningLoop()
    sockets: list[socket.socket] = []

    def fail(sock: socket.socket, _role: Role, *_: object) -> None:
        sockets.append(sock)
        raise AssertionError("injected")

    monkeypatch.setattr(loop.server, "admit", fail)
    with socket.create_connection(loop.listener.sock.getsockname(), TIMEOUT) as client:
        assert select.select([loop.listener.sock], [], [], TIMEOUT)[0]
        loop.pump()
        assert [sock.fileno() for sock in sockets] == [-1]
        assert client.recv(100) == b""
    assert len(errors(caplog)) == 1 and loop.server.faults.count == 1
    monkeypatch.undo()
    with socket.create_connection(loop.listener.sock.getsockname(), TIMEOUT):
        assert select.select([loop.listener.sock], [], [], TIMEOUT)[0]
        loop.pump()
        assert loop.server.connections == set()
        loop.advance(transit_relay.PAUSE_SECONDS)
        loop.pump()
        assert len(loop.server.connections) == 1
    loop.close()


def test_a_fault_at_the_end_of_a_pause_is_followed_by_another_attempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The loop does not spin between the attempts."""
    loop = ListeningLoop()
    acceptor, selector = loop.server._acceptor, loop.server._selector
    assert selector is not None
    fail_once(monkeypatch, Handler(transit_relay.Acceptor, "end_pause"), FaultyWork(MemoryError, 3))
    acceptor.pause("injected")
    for faults in range(1, 4):
        loop.advance(transit_relay.PAUSE_SECONDS)
        assert loop.server.faults.count == faults
        assert loop.listener.fd not in selector.get_map()
        assert loop.server._timeout() == transit_relay.PAUSE_SECONDS
    loop.advance(transit_relay.PAUSE_SECONDS)
    assert loop.listener.fd in selector.get_map()
    loop.close()


@pytest.mark.parametrize("exception", ["AssertionError", "OSError", "MemoryError"])
@pytest.mark.parametrize(
    "handler",
    [
        Handler(Session, "client_ended"),
        Handler(Session, "partner_left"),
        Handler(Connection, "finish"),
        Handler(transit_relay, "is_delivered"),
        Handler(transit_relay.StopProgress, "__init__"),
        Handler(transit_relay.StopProgress, "finished_leavers"),
        Handler(transit_relay.StopProgress, "leavers"),
        Handler(transit_relay.StopProgress, "is_complete"),
        Handler(Server, "close_connections"),
        Handler(Server, "snapshot"),
        Handler(transit_relay.Recorder, "stop"),
    ],
    ids=str,
)
def test_a_stop_comes_to_its_end_in_spite_of_a_fault(
    loop: Loop, handler: Handler, exception: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The relay runs on for at most the time of a stop, and one connection at most is cut."""
    pairs = [loop.meet("unix", "ws-unix") for _ in range(5)]
    waiting = loop.client("unix")
    waiting.send(handshake("waits"))
    loop.pump()
    work = FaultyWork(EXCEPTIONS[exception], 1)
    with monkeypatch.context() as patch:
        fail_once(patch, handler, work)
        loop.server.signals.noted.append(signal.SIGTERM)
        loop.server.run_once(0)
        loop.pump()
        for client in (client for pair in pairs for client in pair):
            client.close()
        waiting.close()
        loop.pump()
        loop.advance(transit_relay.STOP_FLUSH_SECONDS)
        loop.advance(transit_relay.STOP_POLL_SECONDS)
    assert work.calls >= 1
    assert loop.server.phase is transit_relay.ServerPhase.OVER
    assert loop.server.connections == set()
    assert loop.recorder.moods().count("happy") >= 4


@pytest.mark.parametrize("way", ["pairs end", "time is up", "second signal"])
@pytest.mark.parametrize("exception", ["AssertionError", "OSError", "MemoryError"])
@pytest.mark.parametrize(
    "handler",
    [
        Handler(transit_relay.Ending, "drain"),
        Handler(transit_relay.Ending, "stop"),
        Handler(transit_relay.Ending, "_end_unpaired"),
        Handler(transit_relay.Ending, "_end_drain"),
        Handler(transit_relay.Ending, "go_on"),
        Handler(Server, "snapshot"),
        Handler(Session, "client_ended"),
        Handler(Session, "end_sent"),
        Handler(transit_relay.Acceptor, "close"),
        Handler(transit_relay.StopProgress, "__init__"),
    ],
    ids=str,
)
def test_a_drain_comes_to_its_end_in_spite_of_a_fault(
    loop: Loop, handler: Handler, exception: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault at its beginning cuts no pair. A signal that met a fault can be repeated."""
    loop.restart(drain_seconds=1_000)
    pairs = [loop.meet("unix", "ws-unix") for _ in range(3)]
    waiting = loop.client("unix")
    waiting.send(handshake("waits"))
    loop.pump()
    work = FaultyWork(EXCEPTIONS[exception], 1)
    with monkeypatch.context() as patch:
        fail_once(patch, handler, work)
        loop.signal()
        if loop.server.phase is transit_relay.ServerPhase.SERVING:
            assert handler.name == "drain"
            loop.signal()
        assert loop.server.phase is transit_relay.ServerPhase.DRAINING
        for one, other in pairs:
            one.send(b"data")
            assert other.receive(4) == b"data"
        if way == "time is up":
            loop.advance(1_000)
        elif way == "second signal":
            loop.signal()
        for client in (waiting, *(client for pair in pairs for client in pair)):
            client.close()
        loop.pump()
        for _ in range(2):
            loop.advance(transit_relay.STOP_FLUSH_SECONDS)
    assert work.calls >= 1
    assert loop.server.phase is transit_relay.ServerPhase.OVER
    assert loop.server.connections == set()
    assert loop.recorder.moods().count("happy") >= 2
