"""Resets at every stage of a connection, while checked transfers run beside them."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterator

import pytest
from helpers import Client, digest, frame, handshake, parse_head, reset
from watched import Books, SharedScene, WatchedRelay, shorter

TIMES = shorter(50, 5)  # clients in each stage
BLOCK = bytes(range(256)) * 256
LEAST_BUFFER_BYTES = 4096  # of the kernel, for clients that do not read

KINDS = pytest.mark.parametrize("kind", ["tcp", "ws"])
PARTNERS = pytest.mark.parametrize("partner", ["tcp", "ws"])


@pytest.fixture(scope="module")
def shared() -> Iterator[SharedScene]:
    """Return the relay of all these tests, and the transfers beside it."""
    shared = SharedScene()
    yield shared
    shared.close()


def reset_all(
    shared: SharedScene,
    prepare: Callable[[WatchedRelay, Books], Client],
) -> None:
    """Prepare clients, let the relay serve them, then reset all."""
    with shared.stage() as scene:
        clients = [prepare(scene.relay, scene.books) for _ in range(TIMES)]
        scene.relay.settle(scene.books)
        for client in clients:
            client.reset()


def send_all_that_is_accepted(sender: Client) -> int:
    """Send until the kernels and the relay accept no more. Return how many bytes of payload.

    The last message may be cut off, and counts.
    """
    sender.sock.settimeout(0.2)  # real time: no event reports that there will be no more room
    sent = 0
    (wire,) = sender.encode(BLOCK)
    with contextlib.suppress(socket.timeout):  # TimeoutError from Python 3.10 on
        while True:
            sender.send_wire(wire)
            sent += len(BLOCK)
    return sent + len(BLOCK)


def test_before_the_first_byte(shared: SharedScene) -> None:
    def prepare(relay: WatchedRelay, books: Books) -> Client:
        books.add("empty")
        return relay.client()

    reset_all(shared, prepare)


def test_in_the_handshake_line(shared: SharedScene) -> None:
    def prepare(relay: WatchedRelay, books: Books) -> Client:
        client = relay.client()
        client.send(handshake()[:40])
        books.add("empty")
        return client

    reset_all(shared, prepare)


def test_in_the_upgrade_request(shared: SharedScene) -> None:
    """An upgrade that is not complete has no record."""

    def prepare(relay: WatchedRelay, _: Books) -> Client:
        client = relay.client("ws", upgrade=False)
        client.send_wire(client.request[:40])  # type: ignore[attr-defined]
        return client

    reset_all(shared, prepare)


def test_after_the_upgrade(shared: SharedScene) -> None:
    def prepare(relay: WatchedRelay, books: Books) -> Client:
        books.add("empty")
        return relay.client("ws")

    reset_all(shared, prepare)


def test_in_the_frame_of_the_handshake(shared: SharedScene) -> None:
    def prepare(relay: WatchedRelay, books: Books) -> Client:
        client = relay.client("ws")
        client.send_wire(frame(2, handshake())[:40])
        books.add("empty")
        return client

    reset_all(shared, prepare)


@KINDS
def test_while_it_waits(shared: SharedScene, kind: str) -> None:
    def prepare(relay: WatchedRelay, books: Books) -> Client:
        client = relay.client(kind)
        client.send(handshake(relay.new_token(), "one"))
        books.add("lonely")
        return client

    reset_all(shared, prepare)


@KINDS
def test_while_a_refused_client_lingers(shared: SharedScene, kind: str) -> None:
    def prepare(relay: WatchedRelay, books: Books) -> Client:
        client = relay.client(kind)
        client.send(b"nonsense\n")
        assert client.read_to_end() == b"bad handshake\n"
        books.add("errory")
        return client

    reset_all(shared, prepare)


def test_while_the_answer_to_a_plain_request_lingers(shared: SharedScene) -> None:
    def prepare(relay: WatchedRelay, _: Books) -> Client:
        client = relay.client()
        client.send(b"GET / HTTP/1.0\r\n\r\n")
        head, _, _ = client.read_to_end().partition(b"\r\n\r\n")
        assert parse_head(head)[0] == "200"
        return client

    reset_all(shared, prepare)


@KINDS
@PARTNERS
def test_in_a_quiet_pair(shared: SharedScene, kind: str, partner: str) -> None:
    """The partner gets an orderly end."""
    with shared.stage() as scene:
        for _ in range(TIMES):
            one, other = scene.relay.client(kind), scene.relay.client(partner)
            scene.relay.couple(one, other)
            one.send(b"there")
            assert other.receive(5) == b"there"
            one.reset()
            assert other.read_to_end() == b""
            other.close()
            scene.books.add("happy", 5)


@KINDS
@PARTNERS
def test_of_a_sender_with_bytes_under_way(shared: SharedScene, kind: str, partner: str) -> None:
    """The partner gets all that the relay had received, and the record has just these bytes."""
    with shared.stage() as scene:
        for _ in range(shorter(10, 3)):
            one, other = scene.relay.client(kind), scene.relay.client(partner)
            scene.relay.couple(one, other)
            sent = send_all_that_is_accepted(one)
            one.reset()
            received = other.read_to_end()
            expected = BLOCK * (sent // len(BLOCK))
            assert digest(received) == digest(expected[: len(received)])
            other.close()
            scene.books.add("happy", len(received))


@KINDS
@PARTNERS
def test_of_a_receiver_with_bytes_under_way(shared: SharedScene, kind: str, partner: str) -> None:
    """The sender gets an orderly end."""
    with shared.stage() as scene:
        for _ in range(shorter(10, 3)):
            one = scene.relay.client(kind, buffer_bytes=LEAST_BUFFER_BYTES)
            other = scene.relay.client(partner)
            scene.relay.couple(one, other)
            sent = send_all_that_is_accepted(other)
            one.reset()
            assert other.read_to_end() == b""
            other.close()
            scene.books.add_range("happy", 1, sent)


@KINDS
@PARTNERS
def test_while_the_rest_is_flushed(shared: SharedScene, kind: str, partner: str) -> None:
    """The client ends its direction, and has not read what is queued for it."""
    with shared.stage() as scene:
        for _ in range(shorter(10, 3)):
            one = scene.relay.client(kind, buffer_bytes=LEAST_BUFFER_BYTES)
            other = scene.relay.client(partner)
            scene.relay.couple(one, other)
            sent = send_all_that_is_accepted(other)
            one.half_close()
            assert other.read_to_end() == b""
            other.close()
            one.reset()
            scene.books.add_range("happy", 1, sent)


@KINDS
@PARTNERS
def test_while_the_end_of_a_pair_lingers(shared: SharedScene, kind: str, partner: str) -> None:
    with shared.stage() as scene:
        staying = []
        for _ in range(TIMES):
            one, other = scene.relay.client(kind), scene.relay.client(partner)
            scene.relay.couple(one, other)
            other.send(b"the last bytes")
            other.half_close()
            assert one.read_to_end() == b"the last bytes"
            assert other.read_to_end() == b""
            other.close()
            staying.append(one)
            scene.books.add("happy", 14)
        for client in staying:
            reset(client.sock)
