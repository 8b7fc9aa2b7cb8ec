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
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from children import TIMEOUT, Child, Record, Relay
from stage import OK, Client, WebSocketClient, handshake, summary

MEBIBYTE = 1 << 20
SIZE = 32 * MEBIBYTE  # more than the kernel and the relay queue for one direction
LISTENERS = ["--port=tcp:0:interface=127.0.0.1", "--websocket=tcp:0:interface=127.0.0.1"]
NO_ROOM = ["ENOBUFS", "ENOMEM"]  # docs/protocol.md, "The end of a pair": "no room now"
DESCRIPTORS, WAITING = 80, 120


class OurRelay(Relay):
    """Our relay with a TCP and a WebSocket listener, and its clients."""

    def __init__(self, command: list[str], *options: str) -> None:
        self._resources = ExitStack()
        super().__init__([*command, *LISTENERS, *options], r"starting on tcp:(\d+):\S+ tcp:(\d+):")

    def connect(self, kind: str = "tcp") -> Client:
        """Connect a client, "tcp" or "ws". It is closed together with the relay."""
        client = WebSocketClient(self.ports[1]) if kind == "ws" else Client(self.ports[0])
        self._resources.callback(client.abandon)
        if isinstance(client, WebSocketClient):
            client.upgrade()
        return client

    def waiting(self, token: str) -> Client:
        """Connect a client, and send a handshake."""
        client = self.connect()
        client.send(handshake(token, "a"))
        return client

    def pair(self, token: str, second: str = "tcp") -> tuple[Client, Client]:
        """Connect a pair: the first client over TCP, the second over `second`."""
        one, other = self.waiting(token), self.connect(second)
        other.send(handshake(token, "b"))
        one.expect(OK)
        other.expect(OK)
        return one, other

    def inject(self, strace: Path, call: str, error: str, number: int = 1) -> Child:
        """Let one call of a system call fail: the next one, or the one with this number.

        The strace that is returned prints all calls of this system call, one a line.
        """
        what = f"{call}:error={error}:when={number}"
        options = ["-f", "-y", f"--trace={call}", f"--inject={what}", "-p", str(self.pid)]
        tracer = self._resources.enter_context(Child([str(strace), *options]))
        tracer.lines.until(r"strace: Process \d+ attached")
        return tracer

    def stop(self) -> None:
        """Stop the relay. Its exit code must be 0."""
        assert self.terminate() == 0, str(self.lines)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._resources.close()


@contextlib.contextmanager
def sending(client: Client, data: bytes) -> Iterator[None]:
    """Send `data` and the end in a thread, during the `with` block."""
    thread = threading.Thread(target=client.send_last, args=[data], daemon=True)
    thread.start()
    yield
    thread.join(TIMEOUT)
    assert not thread.is_alive(), "the relay does not read the rest"


def exchange(one: Client, other: Client) -> None:
    """Check that bytes pass in both directions of a pair."""
    one.send(b"there")
    other.expect(b"there")
    other.send(b"and back")
    one.expect(b"and back")


def injected(tracer: Child) -> str:
    """Wait for the end of strace, and return the call that failed. There must be one such call."""
    tracer.wait()
    tracer.lines.rest()
    found = [line for line in tracer.lines.seen if "(INJECTED)" in line]
    assert len(found) == 1, f"{len(found)} calls have failed:\n{tracer.lines}"
    return found[0]


def check_transfer(relay: OurRelay, one: Client, other: Client, data: bytes) -> None:
    """Send `data` through a pair. All bytes must arrive, and be recorded."""
    with sending(one, data):
        other.expect(data)
    other.expect_end()
    one.expect_end()
    assert relay.record() == Record("happy", len(data), True)


@pytest.mark.parametrize("error", NO_ROOM)
@pytest.mark.parametrize("receiver", ["tcp", "ws"])
def test_send_without_room(receiver: str, error: str, our_relay: list[str], strace: Path) -> None:
    """One send to the receiver fails. The bytes are queued, and all arrive."""
    call = "sendto" if receiver == "tcp" else "sendmsg"
    with OurRelay(our_relay, "--no-splice") as relay:
        one, other = relay.pair("pair", receiver)
        tracer = relay.inject(strace, call, error)
        check_transfer(relay, one, other, os.urandom(SIZE))
        relay.stop()
    assert f"{call}(" in injected(tracer)


@pytest.mark.parametrize("error", NO_ROOM)
def test_splice_without_room(error: str, our_relay: list[str], strace: Path) -> None:
    """One splice to the receiver fails. The bytes stay in the pipe, and all arrive."""
    if not hasattr(os, "splice"):
        pytest.skip("this Python has no os.splice")
    with OurRelay(our_relay) as relay:
        one, other = relay.pair("pair")
        # The first splice fills the pipe, because the sender's socket is readable.
        tracer = relay.inject(strace, "splice", error, number=2)
        check_transfer(relay, one, other, os.urandom(SIZE))
        relay.stop()
    assert re.search(r"splice\(\d+<pipe:\S+ NULL, \d+<(socket|TCP)", injected(tracer))


@pytest.mark.parametrize("operation", ["EPOLL_CTL_MOD", "EPOLL_CTL_ADD"])
def test_registration_of_a_pair_fails(operation: str, our_relay: list[str], strace: Path) -> None:
    """One pair ends. The other pair, a waiting client and newcomers are served."""
    data = os.urandom(SIZE)
    with OurRelay(our_relay) as relay:
        bystanders = relay.pair("bystanders")
        waiting = relay.waiting("waiting")
        # A receiver that does not read makes the relay change both registrations of its pair.
        # Their order is an implementation detail: fail the first change, then the second, ...
        for number in range(1, 9):
            one, other = relay.pair(f"pair {number}")
            tracer = relay.inject(strace, "epoll_ctl", "ENOSPC", number)
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
        partner = relay.connect()
        partner.send(handshake("waiting", "b"))
        waiting.expect(OK)
        partner.expect(OK)
        exchange(waiting, partner)
        exchange(*relay.pair("newcomers"))
        relay.stop()


def test_registration_of_a_newcomer_fails(our_relay: list[str], strace: Path) -> None:
    """The newcomer's connection is closed. The pair and later newcomers are served."""
    with OurRelay(our_relay) as relay:
        bystanders = relay.pair("bystanders")
        tracer = relay.inject(strace, "epoll_ctl", "ENOSPC")
        relay.connect().read_to_end()
        exchange(*bystanders)
        exchange(*relay.pair("newcomers"))
        relay.stop()
    assert "EPOLL_CTL_ADD" in injected(tracer)


def test_records_while_descriptors_are_used_up(our_relay: list[str], tmp_path: Path) -> None:
    """SQLite needs a descriptor for its journal. The relay keeps one for it.

    The waiting clients do not leave, and are more than the relay has descriptors. It stays full, so
    newcomers take the places of older clients.
    """
    database = tmp_path / "usage.sqlite"
    limited = ["sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh", *our_relay]
    with OurRelay(limited, f"--usage-db={database}") as relay:
        one, other = relay.pair("pair")
        for number in range(WAITING):
            relay.waiting(f"waiting {number}")
        relay.lines.until("^--max-connections: a client was disconnected")
        exchange(one, other)
        one.shutdown()
        other.expect_end()
        with contextlib.closing(sqlite3.connect(database)) as db:
            wait_for_row(db, "SELECT 1 FROM usage WHERE result = 'happy' AND total_bytes = 13")
            # Only a row from after the pair's end has a waiting client and no pair.
            wait_for_row(db, "SELECT 1 FROM current WHERE connected = 0 AND waiting > 0")
        relay.stop()


def wait_for_row(db: sqlite3.Connection, query: str) -> None:
    """Poll until the query returns a row: SQLite reports no writes of other processes."""
    deadline = time.monotonic() + TIMEOUT
    while db.execute(query).fetchone() is None:
        assert time.monotonic() < deadline, f"no row in {TIMEOUT} s: {query}"
        time.sleep(0.1)
