"""A gateway in this thread: its sessions, and the answers of the relay behind."""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import select
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import pytest
from gateways import BackendConnection, GatewayLoop, PlainAddresses, gateway
from helpers import (
    TIMEOUT,
    Client,
    FakeClock,
    FakeTransport,
    Flow,
    Loop,
    WebSocketClient,
    docstring_table,
    handshake,
    is_readable,
    partner_of,
)
from test_connection import NOT_CARRIED
from transit_relay_gateway import BackendSession, ClientSession, parse_target

from transit_relay import (
    OK,
    PROXY_PREFIX,
    REFUSALS,
    Connection,
    Limits,
    Listener,
    Pair,
    Reason,
    Server,
    Session,
    State,
    connect_again,
    open_descriptors,
    parse_network,
    place_server,
    read_state,
    resume_server,
)
from ws_frames import ProxyReader

KINDS = pytest.mark.parametrize("kind", ["tcp", "ws"])
ADDRESS = "192.0.2.77"
LINE = handshake("token", "side")
SYN_SENT = 2  # a state of TCP: the connection is not accepted yet


class Behind:
    """Stands for the relay behind: a listener whose connections the test answers."""

    def __init__(self, kind: str = "unix") -> None:
        """`kind`: unix; tcp; refusing: TCP, nothing listens; hanging, full: TCP, unix, it accepts
        nobody, and its queue is full.
        """
        self.is_tcp = kind not in ("unix", "full")
        self.sock = socket.socket(socket.AF_INET if self.is_tcp else socket.AF_UNIX)
        self.sock.bind(("127.0.0.1", 0) if self.is_tcp else "")
        self.way = int(self.sock.family), self.sock.getsockname()
        self._fillers: list[socket.socket] = []
        if kind != "refusing":
            self.sock.listen(0 if kind in ("hanging", "full") else 8)
        while kind in ("hanging", "full") and not self._fill():
            pass

    def _fill(self) -> bool:
        """Connect once. Return whether the queue was full already.

        Over TCP the system drops what comes then, and a unix socket reports it.
        """
        self._fillers.append(socket.socket(self.sock.family))
        self._fillers[-1].setblocking(False)
        code = self._fillers[-1].connect_ex(self.way[1])
        return Flow.of(self._fillers[-1]).state == SYN_SENT if self.is_tcp else code == errno.EAGAIN

    def make_room(self) -> None:
        """Remove one connection from a full queue."""
        self.sock.accept()[0].close()

    def close(self) -> None:
        """Close the listener. From now on, connections are refused."""
        for sock in (self.sock, *self._fillers):
            sock.close()


class ForwardingLoop(Loop):
    """A gateway in front of listeners of the test."""

    def __init__(
        self, *behind: Behind, limits: Limits | None = None, has_proxy_header: bool = False
    ) -> None:
        """`has_proxy_header`: the relay behind expects PROXY headers."""
        self.behind = behind
        self._opened = [*behind]
        self.limits = limits
        self.addresses = PlainAddresses((), (parse_network("unix"),))
        self.set_target(has_proxy_header)
        super().__init__(limits)

    def set_target(self, has_proxy_header: bool) -> None:
        """Set what the next server is told of the relay behind."""
        self.target = parse_target(f"{PROXY_PREFIX * has_proxy_header}tcp:relay.example:4001")

    def make_server(
        self, listeners: Sequence[Listener], limits: Limits | None = None, **options: Any
    ) -> Server:
        """Return a gateway whose target has the addresses of the listeners."""
        ways = [one.way for one in self.behind]
        options = {"addresses": self.addresses, **options}
        return super().make_server(
            *(listeners, limits or self.limits),
            **options,
            make_rendezvous=partial(gateway, self.target, ways, 200),
        )

    def close(self) -> None:
        """Close all clients, the gateway, and what is behind it."""
        super().close()
        for one in self._opened:
            one.close()

    def accept(self, place: int = 0) -> Client:
        """Return the next connection of the gateway to a listener, as the relay behind has it."""
        listener = self.behind[place]
        self.pump()
        while not is_readable(listener.sock):
            assert select.select([listener.sock, self.server._selector], [], [], TIMEOUT)[0]
            self.pump()
        sock, _ = listener.sock.accept()
        relay = Client(sock, self.wait)
        self._clients.append(sock)
        for conn in self.server.connections if listener.is_tcp else ():
            if conn.sock.getsockname() == sock.getpeername():
                self._over_tcp.append((sock, conn.sock))
        self.pump()
        return relay

    def forward(self, kind: str = "tcp", line: bytes = LINE, place: int = 0) -> tuple[Client, ...]:
        """Return a client, and its connection to the relay behind, which has read the line."""
        client = self.client(kind)
        client.send(line)
        relay = self.accept(place)
        assert relay.receive(len(line)) == line
        return client, relay

    def reload(self) -> None:
        """Replace the server by one that goes on with its state, as a new program would."""
        old, fd = self.server, os.memfd_create("state")
        with open(fd, "wb", closefd=False) as file:
            for part in place_server(old):
                pickle.dump(part, file, 4)
        state = iter(list(read_state(fd)))
        socks = {conn.fd: conn.sock for conn in old.connections}
        old.signals.close()
        assert old._selector is not None
        old._selector.close()
        self.server = self.make_server([])
        resume_server(self.server, state, partial(connect_again, self.server, socks.__getitem__))
        self.server.start()
        self.pump()

    def reload_to(self, *kinds: str, has_proxy_header: bool = False) -> None:
        """Reload with new listeners of these kinds behind; without kinds, with the same ones."""
        if kinds:
            self.behind = tuple(map(Behind, kinds))
            self._opened += self.behind
        self.set_target(has_proxy_header)
        self.reload()


Make = Callable[..., ForwardingLoop]
MakeBoth = Callable[..., GatewayLoop]


@contextlib.contextmanager
def checked() -> Iterator[contextlib.ExitStack]:
    """Yield a stack of loops to close. Check then that no descriptor is left open."""
    before = len(open_descriptors())
    with contextlib.ExitStack() as stack:
        yield stack
    assert len(open_descriptors()) == before


def forwarding(stack: contextlib.ExitStack, *kinds: str, **options: Any) -> ForwardingLoop:
    """Return a gateway in front of listeners of these kinds."""
    behind = map(Behind, kinds or ("unix",))
    return stack.enter_context(contextlib.closing(ForwardingLoop(*behind, **options)))


def both(stack: contextlib.ExitStack, **options: Any) -> GatewayLoop:
    """Return a gateway and a real relay behind it."""
    return stack.enter_context(contextlib.closing(GatewayLoop(**options)))


@pytest.fixture
def make() -> Iterator[Make]:
    with checked() as stack:
        yield partial(forwarding, stack)


@pytest.fixture
def make_both() -> Iterator[MakeBoth]:
    with checked() as stack:
        yield partial(both, stack)


def end_of(client: Client, code: int = 1000) -> bytes:
    """Return all that a client gets until its end: over WebSocket a Close with `code`."""
    return client.read_to_end(code) if isinstance(client, WebSocketClient) else client.read_to_end()


def failures(loop: Loop) -> dict[str, int]:
    """Return the failures that were counted."""
    counts = loop.server.rendezvous.counters.failures
    return {str(kind): count for kind, count in counts.items() if count}


# The sessions.


class Setup:
    """A Gateway that does not dial, with a client."""

    def __init__(self) -> None:
        class Undialled(gateway):  # type: ignore[misc]
            """Only notes the clients."""

            def refusal(self, newcomer: Session) -> None:
                """Refuse nobody."""

            def join(self, newcomer: Session) -> None:
                self._add(newcomer.handshake.token, newcomer)

        records: list[object] = []
        target = parse_target("unix:relay.sock")
        self.rendezvous = Undialled(target, target.resolve(), 0, records.append, FakeClock(100.0))
        self.client = ClientSession(FakeTransport(), self.rendezvous, 0.0)
        self.relay = BackendSession(FakeTransport(), self.rendezvous, 0.0)
        self.relay.transport.is_answered = False
        self.relay.transport.has_orderly_end = True
        self.rendezvous.note = lambda what: None

    def pair(self) -> None:
        """Make a pair of the client and the relay behind, as `join` does."""
        pair = Pair(self.client, self.relay)
        pair.waiting_time = None
        self.client.forwarded(pair)  # raises AssertionError unless the client waits
        self.rendezvous.pairs.add(pair)
        self.relay.forwarded(pair)

    def observed(self) -> list[object]:
        """Return all that can be observed of the sessions."""
        seen: list[object] = [dict(self.rendezvous.waiting), set(self.rendezvous.pairs)]
        for session in (self.client, self.relay):
            transport: Any = session.transport
            seen += [session.state, partner_of(session), transport.sent, transport.finished]
        return seen


INPUTS: dict[str, Callable[[Setup], object]] = {
    "handshake": lambda setup: setup.client.line_received(LINE[:-1]),
    "forwarded": lambda setup: setup.pair(),
    "bytes": lambda setup: setup.client.bytes_received(b"some bytes"),
    "matched": lambda setup: setup.rendezvous.answered(setup.client.pair, setup.client),
    "refused": lambda setup: setup.client.refused(b"relay full\n"),
    "end": lambda setup: setup.client.client_ended(),
    "left": lambda setup: setup.client.partner_left(Reason.ENDED),
    "displaced": lambda setup: setup.client.displaced(),
    "postponed": lambda setup: setup.client.stream_postponed(),
    "opened": lambda setup: setup.client.stream_opened(),
    "full": lambda setup: setup.client.relay_full(),
}
STEPS = INPUTS | {"the relay ends": lambda setup: setup.relay.client_ended()}
FORWARDED = ["handshake", "forwarded"]
# Paths to `forwarded` and `done`. Each way to leave `forwarded` for `done` is used once.
WAYS_THERE = {
    "forwarded": FORWARDED,
    "has sent bytes": [*FORWARDED, "bytes"],
    "refused": [*FORWARDED, "refused"],
    "ended": [*FORWARDED, "end"],
    "left": [*FORWARDED, "the relay ends"],
}
LATE = ("handshake", "bytes", "end")  # without an effect in `done`


class Row(NamedTuple):
    """A row of the table in ClientSession's docstring."""

    state: State
    input: str
    next: State
    reply: str


TABLE = [
    Row(State(row[0]), row[1], State(row[2]), row[3]) for row in docstring_table(ClientSession)
]
LISTED = {(row.state, row.input) for row in TABLE}


def reach(path: Sequence[str]) -> Setup:
    """Return a setup after these inputs."""
    setup = Setup()
    for name in path:
        STEPS[name](setup)
    return setup


def test_all_rows_of_the_table_are_read() -> None:
    assert len(TABLE) == len(LISTED) == 6
    assert {row.state for row in TABLE} == {State.WAIT_PARTNER, State.FORWARDED}
    assert {row.next for row in TABLE} == {State.FORWARDED, State.RELAYING, State.DONE}
    assert {row.input for row in TABLE} == {
        *("forwarded", "bytes", "matched", "refused", "end", "left")
    }


@pytest.mark.parametrize(
    ("path", "row"),
    [
        pytest.param(path, row, id=f"{row.state.value}-{row.input}-{len(path)}")
        for row in TABLE
        for path in (["handshake"], FORWARDED, [*FORWARDED, "bytes"])
        if (row.state is State.WAIT_PARTNER) == (path == ["handshake"])
    ],
)
def test_a_listed_input_does_what_its_row_says(path: Sequence[str], row: Row) -> None:
    setup = reach(path)
    transport: Any = setup.client.transport
    assert setup.client.state is row.state and transport.sent == b""
    INPUTS[row.input](setup)
    assert setup.client.state is row.next
    replies = {"-": b"", "ok\\n": OK, "a refusal": b"relay full\n"}
    assert transport.sent == replies[row.reply]
    assert transport.finished == (row.next is State.DONE)
    is_waiting = row.next is State.FORWARDED
    assert setup.rendezvous.waiting_clients == len(setup.rendezvous.waiting) == is_waiting


@pytest.mark.parametrize(
    ("path", "name"),
    [
        (path, name)
        for path in WAYS_THERE
        for name in INPUTS
        if path not in ("forwarded", "has sent bytes") or (State.FORWARDED, name) not in LISTED
    ],
)
def test_an_unlisted_input_changes_nothing(path: str, name: str) -> None:
    """A late event of a client is ignored. Every other unlisted input is a bug and raises."""
    setup = reach(WAYS_THERE[path])
    before = setup.observed()
    if setup.client.state is State.DONE and name in LATE:
        INPUTS[name](setup)
    else:
        with pytest.raises(AssertionError):
            INPUTS[name](setup)
    assert setup.observed() == before


@pytest.mark.parametrize("path", ["refused", "ended", "left"])
def test_an_answer_to_a_client_that_has_left_changes_nothing(path: str) -> None:
    setup = reach(WAYS_THERE[path])
    setup.relay.client_ended()
    before = setup.observed()
    for line in (b"ok", b"impatient", b"junk!"):
        setup.relay.line_received(line)
    assert setup.observed() == before


@pytest.mark.parametrize("path", ["refused", "ended", "left"])
def test_a_pair_with_the_relay_behind_is_over_when_both_have_ended(path: str) -> None:
    setup = reach(WAYS_THERE[path])
    assert len(setup.rendezvous.pairs) == 1
    stayed = setup.client if path == "left" else setup.relay
    stayed.end_sent()
    assert setup.rendezvous.pairs == set()


@pytest.mark.parametrize(
    ("noun", "base"),
    [(ClientSession, Session), (BackendSession, Session), (BackendConnection, Connection)],
)
def test_each_field_is_carried_over_a_reload_or_follows_from_others(noun: Any, base: type) -> None:
    slots = [slot for one in noun.__mro__ for slot in getattr(one, "__slots__", ())]
    assert len(slots) == len(set(slots)), "a field is defined twice"
    assert sorted(slots) == sorted([*noun.CARRIED, *NOT_CARRIED[base]])


# What the relay behind answers, and how the client ends.


@KINDS
@pytest.mark.parametrize("newline", [b"\n", b""], ids=["a line", "a message"])
def test_a_pair_over_two_relays(make_both: MakeBoth, kind: str, newline: bytes) -> None:
    """The handshake is sent on with its newline, also if a WebSocket client left it out."""
    loop = make_both()
    one, other = loop.client(kind), loop.client("tcp")
    one.send(handshake("token", "one")[:-1] + (newline if kind == "ws" else b"\n"))
    other.send(handshake("token", "other"))
    assert one.receive(3) == other.receive(3) == OK
    one.send(b"to the other")
    other.send(b"to the one")
    assert (one.receive(10), other.receive(12)) == (b"to the one", b"to the other")
    one.close()
    assert end_of(other) == b""
    assert loop.behind.recorder.moods() == ["happy"]
    assert loop.behind.recorder.records[0].total_bytes == 22
    assert loop.server.rendezvous.relayed_bytes() == 44  # the gateway has passed them on twice


@KINDS
@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"impatient\n", 1000),
        (b"bad handshake\n", 1000),
        *((refusal, 1013) for refusal in REFUSALS.values()),
        (b"a refusal of a later version\n", 1013),
    ],
)
def test_a_refusal_is_passed_on(make: Make, kind: str, answer: bytes, code: int) -> None:
    loop = make()
    client, relay = loop.forward(kind)
    for byte in answer:
        relay.send(bytes((byte,)))
        loop.pump()
    assert end_of(client, code) == answer
    assert relay.read_to_end() == b""
    assert failures(loop) == {"refused_behind": 1}


@KINDS
@pytest.mark.parametrize(
    "answer",
    [
        b"\n",
        b"OK\n",
        b"okay\n",
        b"oh no\n",
        b"ok\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"a" * 1024,
    ],
    ids=range(7),
)
def test_what_is_no_answer_of_a_relay_is_not_passed_on(
    make: Make, caplog: pytest.LogCaptureFixture, kind: str, answer: bytes
) -> None:
    loop = make()
    client, relay = loop.forward(kind)
    relay.send(answer)
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1}
    assert "the relay behind does not answer like a relay" in caplog.messages


@KINDS
@pytest.mark.parametrize("answer", [b"", b"relay fu"], ids=["no line", "half a line"])
def test_an_end_without_an_answer_is_the_end_of_the_client(
    make: Make, kind: str, answer: bytes
) -> None:
    """As from a relay whose client is redundant, or has waited too long."""
    loop = make("tcp")
    client, relay = loop.forward(kind)
    relay.send(answer)
    relay.close()
    assert end_of(client, 1000) == b""
    assert failures(loop) == {}


@KINDS
@pytest.mark.parametrize("answer", [b"", b"relay fu"], ids=["no line", "half a line"])
def test_after_a_reset_without_an_answer_a_client_may_try_again(
    make: Make, kind: str, answer: bytes
) -> None:
    loop = make("tcp")
    client, relay = loop.forward(kind)
    relay.send(answer)
    loop.pump()
    relay.reset()
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1}


@KINDS
def test_after_ok_an_end_of_the_relay_behind_is_that_of_the_partner(make: Make, kind: str) -> None:
    loop = make("tcp")
    client, relay = loop.forward(kind)
    relay.send(b"ok\nlast words")
    relay.reset()
    assert end_of(client, 1000) == b"ok\nlast words"
    assert failures(loop) == {}


@KINDS
def test_early_bytes_of_the_partner_follow_the_ok(make: Make, kind: str) -> None:
    loop = make()
    client, relay = loop.forward(kind)
    relay.send(b"ok\nok\nearly")
    assert client.receive(11) == b"ok\nok\nearly"
    client.send(b"answer")
    assert relay.receive(6) == b"answer"


@KINDS
@pytest.mark.parametrize("is_with_the_line", [True, False])
def test_the_relay_behind_finds_a_client_impatient(
    make_both: MakeBoth, kind: str, is_with_the_line: bool
) -> None:
    loop = make_both()
    client = loop.client(kind)
    client.send(LINE + b"early" * is_with_the_line)
    loop.pump()
    if not is_with_the_line:
        client.send(b"early")
    assert end_of(client, 1000) == b"impatient\n"
    assert loop.behind.recorder.moods() == ["impatient"]
    assert failures(loop) == {"refused_behind": 1}


def test_a_bad_handshake_is_refused_without_a_dial(make: Make) -> None:
    loop = make()
    client = loop.client("ws")
    client.send(b"junk\n")
    assert end_of(client, 1000) == b"bad handshake\n"
    assert not is_readable(loop.behind[0].sock)
    assert failures(loop) == {"bad_handshake": 1}


def test_clients_of_one_side_are_redundant_behind(make_both: MakeBoth) -> None:
    loop = make_both()
    old, new = loop.client("ws"), loop.client("ws")
    old.send(LINE)
    loop.pump()
    new.send(LINE)
    loop.pump()
    other = loop.client()
    other.send(handshake("token", "other"))
    assert new.receive(3) == other.receive(3) == OK
    assert end_of(old, 1000) == b""


@pytest.mark.parametrize("reason", Reason)
@pytest.mark.parametrize("is_orderly", [False, True])
@pytest.mark.parametrize("is_answered", [False, True])
def test_a_failure_before_the_answer_is_a_refusal_unless_the_gateway_has_a_reason(
    reason: Reason, is_orderly: bool, is_answered: bool
) -> None:
    setup = reach(FORWARDED)
    relay: Any = setup.relay.transport
    relay.has_orderly_end, relay.is_answered = is_orderly, is_answered
    setup.relay.client_ended(reason)
    is_failure = not (is_orderly or is_answered)
    is_refusal = is_failure and reason is Reason.ENDED
    transport: Any = setup.client.transport
    assert transport.reason is (Reason.REFUSED if is_refusal else reason)
    assert setup.rendezvous.counters.failures["not_forwarded"] == is_failure


@KINDS
def test_if_early_bytes_find_the_relay_behind_gone_a_client_may_try_again(
    make: Make, kind: str
) -> None:
    """The write fails. The read that follows finds an end without an error."""
    loop = make("unix")
    client, relay = loop.forward(kind)
    client.send_wire(client.encode(b"early")[0])
    loop.wait_for_arrivals()
    relay.close()
    assert client.conn is not None
    client.conn.on_ready(select.POLLIN)  # before the event of the relay behind
    assert end_of(client, 1013) == b""
    assert failures(loop) == {"not_forwarded": 1}


# The client's address.


@pytest.mark.parametrize("address", [ADDRESS, "2001:db8:1:2:3:4:5:6", "127.0.0.1", "::1", None])
@KINDS
def test_the_relay_behind_is_told_the_address_of_a_client(
    make: Make, kind: str, address: str | None
) -> None:
    """The address comes from a proxy. Without one, the client is local, and no address is sent."""
    loop = make(has_proxy_header=True)
    if kind == "ws":
        sock, its = socket.socketpair()
        loop.server.admit(its, peer=loop.addresses.judge(""))  # as from a listener
        client = WebSocketClient(sock, loop.wait, upgrade=False)
        field = f"X-Forwarded-For: 198.51.100.1, {address}\r\n\r\n" if address else "\r\n"
        client.send_wire(client.request[:-2] + field.encode())
    else:
        sock = loop.connect(has_proxy_header=True)
        client = Client(sock, loop.wait)
        version = 6 if address and ":" in address else 4
        told = f"TCP{version} {address} {address} 50000 4001" if address else "UNKNOWN"
        client.send_wire(f"PROXY {told}\r\n".encode())
    client.send(LINE)
    relay = loop.accept()
    result = ProxyReader().receive(relay.receive_now())
    assert result is not None and (result[0], bytes(result[1])) == (address, LINE)
    sock.close()


def test_without_a_header_no_address_is_sent(make: Make) -> None:
    loop = make()
    loop.connect(has_proxy_header=True).sendall(
        f"PROXY TCP4 {ADDRESS} 192.0.2.1 50000 4001\r\n".encode() + LINE
    )
    assert loop.accept().receive_now() == LINE
