"""System calls of a running relay that fail once, and a relay without free descriptors.

strace attaches to the relay when its clients have connected, and makes one system call fail. The
kernel refuses these calls only when it is short of memory or of epoll watches, and a test cannot
bring that about.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NoReturn

import pytest
from children import TIMEOUT, Child, Record, Relay
from stage import OK, Client, WebSocketClient, handshake, summary

MEBIBYTE = 1 << 20
SIZE = 32 * MEBIBYTE  # more than the kernel and the relay queue for one direction
LISTENERS = ["--port=tcp:0:interface=127.0.0.1", "--websocket=tcp:0:interface=127.0.0.1"]
NO_ROOM = ["ENOBUFS", "ENOMEM"]  # PROTOCOL.md, "The end of a pair": "no room now"
DESCRIPTORS, WAITING = 80, 120

Connect = Callable[[str], Client]
Inject = Callable[..., Child]


@contextlib.contextmanager
def running_relay(command: list[str], *options: str) -> Iterator[Relay]:
    """Run a relay on a TCP and a WebSocket port; it must stop with exit code 0."""
    with Relay([*command, *LISTENERS, *options], r"starting on tcp:(\d+):\S+ tcp:(\d+):") as relay:
        yield relay
        assert relay.terminate() == 0, str(relay.lines)


@pytest.fixture
def connect(request: pytest.FixtureRequest) -> Iterator[Callable[[Relay], Connect]]:
    """Return a function that connects clients to a relay; all are closed after the test."""
    with ExitStack() as clients:

        def connect_to(relay: Relay) -> Connect:
            def connect_client(kind: str = "tcp") -> Client:
                client = WebSocketClient(relay.ports[1]) if kind == "ws" else Client(relay.ports[0])
                clients.callback(client.abandon)
                if isinstance(client, WebSocketClient):
                    client.upgrade()
                return client

            return connect_client

        yield connect_to


@pytest.fixture
def inject(missing: Callable[[str], NoReturn], strace: Path) -> Iterator[Inject]:
    """Return a function that makes one system call of a relay fail.

    The strace that it returns prints these system calls of the relay, one a line.
    """
    with ExitStack() as tracers:

        def attach(relay: Relay, call: str, error: str, when: str) -> Child:
            options = ["-f", "-y", f"--trace={call}", f"--inject={call}:error={error}:when={when}"]
            tracer = Child([str(strace), *options, "-p", str(relay.pid)])
            tracers.enter_context(tracer)
            tracer.lines.until(r"strace: Process \d+ attached")
            return tracer

        yield attach


def meet(connect: Connect, token: str, second: str = "tcp") -> tuple[Client, Client]:
    """Connect a pair: the first over TCP, the second over `second`."""
    one, other = connect("tcp"), connect(second)
    one.send(handshake(token, "a"))
    other.send(handshake(token, "b"))
    one.expect(OK)
    other.expect(OK)
    return one, other


@contextlib.contextmanager
def sending(client: Client, data: bytes) -> Iterator[None]:
    """Send `data` and the end in a thread, beside the `with` block."""
    thread = threading.Thread(target=client.send_last, args=[data], daemon=True)
    thread.start()
    yield
    thread.join(TIMEOUT)
    assert not thread.is_alive(), "the relay does not read on"


def transfer(connect: Connect, token: str) -> None:
    """Connect a new pair, and check that bytes pass in both directions."""
    one, other = meet(connect, token)
    exchange(one, other)


def exchange(one: Client, other: Client) -> None:
    """Check that bytes pass in both directions of a pair."""
    one.send(b"there")
    other.expect(b"there")
    other.send(b"and back")
    one.expect(b"and back")


def injected(tracer: Child) -> str:
    """Return the call that failed, once the relay has ended. There must be one such call."""
    tracer.wait()
    tracer.lines.rest()
    found = [line for line in tracer.lines.seen if "(INJECTED)" in line]
    assert len(found) == 1, f"{len(found)} calls have failed:\n{tracer.lines}"
    return found[0]


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("receiver", ["tcp", "ws"])
def test_send_without_room(
    receiver: str,
    error: str,
    our_relay: list[str],
    connect: Callable[[Relay], Connect],
    inject: Inject,
) -> None:
    """One send to the receiver fails. The bytes are queued, and all arrive."""
    data = os.urandom(SIZE)
    with running_relay(our_relay, "--no-splice") as relay:
        one, other = meet(connect(relay), "pair", receiver)
        call = "sendto" if receiver == "tcp" else "sendmsg"
        tracer = inject(relay, call, error, "1")
        with sending(one, data):
            other.expect(data)
        other.expect_end()
        one.expect_end()
        assert relay.record() == Record("happy", SIZE, True)
    assert f"{call}(" in injected(tracer)


@pytest.mark.parametrize("error", NO_ROOM)
def test_splice_without_room(
    error: str, our_relay: list[str], connect: Callable[[Relay], Connect], inject: Inject
) -> None:
    """One splice to the receiver fails. The bytes stay in the pipe, and all arrive."""
    if not hasattr(os, "splice"):
        pytest.skip("this Python has no os.splice")
    data = os.urandom(SIZE)
    with running_relay(our_relay) as relay:
        one, other = meet(connect(relay), "pair")
        # The first splice fills the pipe, because the sender's socket is readable.
        tracer = inject(relay, "splice", error, "2")
        with sending(one, data):
            other.expect(data)
        other.expect_end()
        one.expect_end()
        assert relay.record() == Record("happy", SIZE, True)
    assert re.search(r"splice\(\d+<pipe:\S+ NULL, \d+<(socket|TCP)", injected(tracer))


@pytest.mark.parametrize("operation", ["EPOLL_CTL_MOD", "EPOLL_CTL_ADD"])
def test_registration_of_a_pair_fails(
    operation: str, our_relay: list[str], connect: Callable[[Relay], Connect], inject: Inject
) -> None:
    """One pair ends. The other pair, a waiting client and newcomers are served."""
    data = os.urandom(SIZE)
    with running_relay(our_relay) as relay:
        client = connect(relay)
        bystanders = meet(client, "bystanders")
        waiting = client("tcp")
        waiting.send(handshake("waiting", "a"))
        # A receiver that does not read makes the relay change both registrations of its pair.
        # Their order is an implementation detail: fail the first change, then the second, ...
        for number in range(1, 9):
            one, other = meet(client, f"pair {number}")
            tracer = inject(relay, "epoll_ctl", "ENOSPC", str(number))
            with sending(one, data):
                tracer.lines.until(r"EPOLL_CTL_DEL|\(INJECTED\)")
                other.read_to_end()
            one.read_to_end()
            assert relay.record().mood == "happy"
            tracer.terminate()
            if operation in injected(tracer):
                break
        else:
            raise AssertionError(f"a pair makes no {operation}")
        received = other.unchecked()
        assert len(received) < SIZE and data.startswith(received), summary(received)

        exchange(*bystanders)
        partner = client("tcp")
        partner.send(handshake("waiting", "b"))
        waiting.expect(OK)
        partner.expect(OK)
        exchange(waiting, partner)
        transfer(client, "newcomers")


def test_registration_of_a_newcomer_fails(
    our_relay: list[str], connect: Callable[[Relay], Connect], inject: Inject
) -> None:
    """The newcomer's connection is closed. The pair and later newcomers are served."""
    with running_relay(our_relay) as relay:
        client = connect(relay)
        bystanders = meet(client, "bystanders")
        tracer = inject(relay, "epoll_ctl", "ENOSPC", "1")
        client("tcp").read_to_end()
        exchange(*bystanders)
        transfer(client, "newcomers")
    assert "EPOLL_CTL_ADD" in injected(tracer)


def test_records_while_descriptors_are_used_up(
    our_relay: list[str], connect: Callable[[Relay], Connect], tmp_path: Path
) -> None:
    """SQLite needs a descriptor for its journal. The relay keeps one for it.

    The waiting clients never leave, and are more than the relay has descriptors: it stays full.
    """
    database = tmp_path / "usage.sqlite"
    limited = ["sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh", *our_relay]
    with running_relay(limited, f"--usage-db={database}") as relay:
        client = connect(relay)
        one, other = meet(client, "pair")
        for number in range(WAITING):
            client("tcp").send(handshake(f"waiting {number}", "a"))
        relay.lines.until("warning: .*(newcomers|open files|descriptors)")
        exchange(one, other)
        one.shutdown()
        other.expect_end()
        with contextlib.closing(sqlite3.connect(database)) as db:
            wait_for_row(db, "SELECT 1 FROM usage WHERE result = 'happy' AND total_bytes = 13")
            # Only a row from after the pair's end has a waiting client and no pair.
            wait_for_row(db, "SELECT 1 FROM current WHERE connected = 0 AND waiting > 0")


def wait_for_row(db: sqlite3.Connection, query: str) -> None:
    """Poll until the query returns a row: SQLite reports no writes of other processes."""
    deadline = time.monotonic() + TIMEOUT
    while db.execute(query).fetchone() is None:
        assert time.monotonic() < deadline, f"no row in {TIMEOUT} s: {query}"
        time.sleep(0.1)
