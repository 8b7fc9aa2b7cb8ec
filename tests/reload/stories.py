"""Clients whose lives span reloads. A Story has a step before each reload, and one after it.

Each story counts the records that the relay must write, in the Books.
"""

from __future__ import annotations

import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from typing import NamedTuple

from bystanders import CONTENT, PATIENCE_SECONDS
from flood import proxy_header
from helpers import (
    CLOSE,
    DIRECTIONS,
    PING,
    PONG,
    Client,
    WebSocketClient,
    close_payload,
    digest,
    eventually,
    frame,
    handshake,
    parse_head,
)
from installed import ReloadedRelay
from traffic import MESSAGE, echo, end
from watched import MEBIBYTE, Books

LONG_BYTES = 300_000  # accepted by kernels and relay, while the receiver reads nothing
SMALL_BUFFER = 16 * 1024
LINGER_SECONDS = 3.0  # less than the relay lingers
KINDS = ("tcp", "ws")


class Story:
    """Some clients of a relay."""

    def __init__(self, relay: ReloadedRelay, books: Books) -> None:
        self.relay, self.books = relay, books

    def before(self, number: int) -> None:
        """Take the step before the reload with this number."""

    def after(self, number: int) -> None:
        """Take the step after it."""

    def finish(self) -> None:
        """End all clients that are left."""

    def serve(self, one: Client, other: Client) -> None:
        """Pass a message both ways in a pair, end it, and note its record."""
        size = echo(one, other)
        end(one, other)
        self.books.add("happy", size)

    def pair(
        self, kinds: tuple[str, str], buffer_bytes: int | None = None
    ) -> tuple[Client, Client]:
        """Return two clients that have met. `buffer_bytes`: of the second one's kernel."""
        one = self.relay.client(kinds[0])
        other = self.relay.client(kinds[1], buffer_bytes=buffer_bytes)
        self.relay.couple(one, other)
        return one, other


class Waiting(Story):
    """Clients that wait. After each reload some of them get their partners, at the end all."""

    def __init__(
        self, relay: ReloadedRelay, books: Books, number: int, served: int, is_brief: bool = False
    ) -> None:
        """`served`: after each reload. `is_brief`: they are no more than coupled."""
        super().__init__(relay, books)
        self._served, self._is_brief = served, is_brief
        self._waiting = []
        for n, kind in zip(range(number), cycle(KINDS)):
            client = relay.client(kind, source=f"127.0.{100 + n // 10_000}.1")
            token = relay.new_token()
            client.send(handshake(token, "one"))
            self._waiting.append((token, client))

    def before(self, number: int) -> None:
        for _, client in self._waiting:
            if isinstance(client, WebSocketClient):  # else unanswered Pings end it after 100 s
                client.send_wire(frame(PONG))

    def after(self, number: int) -> None:
        for token, client in self._waiting[: self._served]:
            other = self.relay.client("ws" if number % 2 else "tcp")
            other.send(handshake(token, "other"))
            assert other.receive(3) == client.receive(3) == b"ok\n"
            if self._is_brief:
                other.close()
                client.close()
                self.books.add("happy")
            else:
                self.serve(other, client)
        del self._waiting[: self._served]

    def finish(self) -> None:
        self._served = len(self._waiting)
        self.after(0)


# A client, all that it sends, and what follows when that is sent.
Begun = tuple[Client, bytes, Callable[[], None]]


class Beginning(NamedTuple):
    """A client that has sent a part of its bytes."""

    client: Client
    rest: bytes
    finish: Callable[[], None]  # when all is sent


class Cuts(Story):
    """Handshakes, HTTP heads, PROXY headers and frames that are cut after each byte.

    A reload is between the two parts. Each reload has some of the places.
    """

    def __init__(
        self, relay: ReloadedRelay, books: Books, reloads: int, kinds: Sequence[str] | None = None
    ) -> None:
        super().__init__(relay, books)
        self._reloads = reloads
        self._begun: list[Beginning] = []
        makers = {name[5:]: getattr(self, name) for name in dir(self) if name.startswith("_cut_")}
        self._makers = [makers[name] for name in kinds or sorted(makers)]
        self.count = 0

    def before(self, number: int) -> None:
        place = 0
        for make in self._makers:
            size, is_first = 1, True
            at = 0
            while at < size:
                if place % self._reloads == number or is_first:
                    client, wire, finish = make()
                    size = len(wire)
                    if place % self._reloads == number:
                        client.send_wire(wire[:at])
                        self._begun.append(Beginning(client, wire[at:], finish))
                        self.count += 1
                    else:  # made for its size only
                        client.send_wire(wire)
                        finish()
                is_first = False
                at += 1
                place += 1

    def after(self, number: int) -> None:
        for client, rest, finish in self._begun:
            client.send_wire(rest)
            finish()
        self._begun.clear()

    def _meet(self, client: Client, token: str) -> None:
        """Give a client whose handshake is sent a partner, and end both."""
        with self.relay.client() as other:
            other.send(handshake(token, "other"))
            assert client.receive(3) == other.receive(3) == b"ok\n"
            self.serve(client, other)

    def _cut_line(self) -> Begun:
        client, token = self.relay.client(), self.relay.new_token()
        return client, handshake(token, "one"), lambda: self._meet(client, token)

    def _cut_request(self) -> Begun:
        client, token = self.relay.client("ws", upgrade=False), self.relay.new_token()
        assert isinstance(client, WebSocketClient)

        def finish() -> None:
            client.send(handshake(token, "one"))
            self._meet(client, token)

        return client, client.request, finish

    def _cut_health(self) -> Begun:
        client = self.relay.client()

        def finish() -> None:
            head, _, _ = client.read_to_end().partition(b"\r\n\r\n")
            assert parse_head(head)[0] == "200"
            client.close()

        return client, b"HEAD / HTTP/1.0\r\n\r\n", finish

    def _cut_first_frame(self) -> Begun:
        client, token = self.relay.client("ws"), self.relay.new_token()
        (wire,) = client.encode(handshake(token, "one"))
        return client, wire, lambda: self._meet(client, token)

    def _cut_data(self, size: int = 20, cut: int = 1000) -> Begun:
        """`cut`: where the bytes that are cut end; the others follow at once."""
        one, other = self.pair(("ws", "tcp"))
        (wire,) = one.encode(CONTENT[:size])

        def finish() -> None:
            one.send_wire(wire[cut:])
            assert digest(other.receive(size)) == digest(CONTENT[:size])
            served = echo(one, other)
            end(one, other)
            self.books.add("happy", size + served)

        return one, wire[:cut], finish

    def _cut_long_data(self) -> Begun:
        return self._cut_data(1000, 12)

    def _cut_longest_data(self) -> Begun:
        return self._cut_data(100_000, 20)

    def _cut_ping(self) -> Begun:
        one, other = self.pair(("ws", "tcp"))
        assert isinstance(one, WebSocketClient)

        def finish() -> None:
            assert one.next_frame() == (PONG, b"123")
            self.serve(one, other)

        return one, frame(PING, b"123"), finish

    def _cut_close(self) -> Begun:
        one, other = self.pair(("ws", "tcp"))

        def finish() -> None:
            assert one.read_to_end(4001) == other.read_to_end() == b""
            one.close()
            other.close()
            self.books.add("happy")

        return one, frame(CLOSE, close_payload(4001, b"why")), finish

    def _proxied(self, header: bytes) -> Begun:
        client, token = self.relay.proxied_client(), self.relay.new_token()

        def finish() -> None:
            client.send(handshake(token, "one"))
            self._meet(client, token)

        return client, header, finish

    def _cut_proxy_1(self) -> Begun:
        return self._proxied(proxy_header("192.0.2.77"))

    def _cut_proxy_2(self) -> Begun:
        addresses = socket.inet_aton("192.0.2.78") * 2 + struct.pack("!HH", 1, 1)
        extra = b"\x04\0\x05abcde"  # a TLV
        body = addresses + extra
        signature = b"\r\n\r\n\0\r\nQUIT\n"
        return self._proxied(signature + struct.pack("!BBH", 0x21, 0x11, len(body)) + body)


class Drains(Story):
    """Receivers that read when their sender has left. Reloads are between both."""

    def __init__(self, relay: ReloadedRelay, books: Books) -> None:
        super().__init__(relay, books)
        self._late: list[tuple[Client, Client]] = []  # these wait for one more reload
        self._next: list[tuple[Client, Client]] = []

    def before(self, number: int) -> None:
        self._late, self._next = self._next, []
        for n, kinds in enumerate(DIRECTIONS * 2):
            one, other = self.pair(kinds, SMALL_BUFFER)
            one.send(CONTENT[:LONG_BYTES])
            if n % 2:
                one.half_close()
            else:
                one.close()
            self._next.append((one, other))

    def after(self, number: int) -> None:
        self._read(self._late)
        self._read(self._next[::2])
        del self._next[::2]

    def finish(self) -> None:
        self._read(self._next)

    def _read(self, pairs: Sequence[tuple[Client, Client]]) -> None:
        for one, other in pairs:
            assert digest(other.read_to_end()) == digest(CONTENT[:LONG_BYTES])
            one.close()
            other.close()
            self.books.add("happy", LONG_BYTES)


class Stall:
    """A pair whose receiver does not read yet. A thread sends until that is changed."""

    def __init__(self, one: Client, other: Client) -> None:
        self._one, self._other = one, other
        self._is_read = threading.Event()
        for client in one, other:
            client.sock.settimeout(PATIENCE_SECONDS)
        self._sent_bytes = self._seen_bytes = 0
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._send)
        self._thread.start()

    def _send(self) -> None:
        try:
            while not self._is_read.is_set():
                self._one.send(CONTENT)
                self._sent_bytes += len(CONTENT)
            self._one.half_close()
        except BaseException as error:
            self._failure = error

    def is_stalled(self) -> bool:
        """Return whether the sender cannot send, and could not at the last call."""
        poll = select.poll()
        poll.register(self._one.fileno(), select.POLLOUT)
        before, self._seen_bytes = self._seen_bytes, self._sent_bytes
        return self._thread.is_alive() and not poll.poll(0) and before == self._seen_bytes

    def finish(self) -> int:
        """Receive all, compare it, and return how many bytes."""
        self._is_read.set()
        received = 0
        while part := self._other.read(MEBIBYTE):
            start = received % MEBIBYTE
            first = CONTENT[start : start + len(part)]
            assert part == first + CONTENT[: len(part) - len(first)], f"wrong at {received}"
            received += len(part)
        self._thread.join()
        assert self._failure is None, self._failure
        assert received == self._sent_bytes
        assert self._one.read_to_end() == b""
        self._one.close()
        self._other.close()
        return received


class Stalls(Story):
    """Receivers that do not read, so that the relay holds bytes of all four directions."""

    def __init__(self, relay: ReloadedRelay, books: Books, splices: bool) -> None:
        """`splices`: whether the relay can."""
        super().__init__(relay, books)
        self._stalls: list[Stall] = []
        self._splices = splices
        self.pipe_bytes = 0  # the most bytes in the relay's pipes before a reload

    def before(self, number: int) -> None:
        for kinds in DIRECTIONS:
            one, other = self.pair(kinds, SMALL_BUFFER)
            self._stalls.append(Stall(one, other))
        eventually(self._are_stalled, "all senders stall")
        self.pipe_bytes = max(self.pipe_bytes, sum(self.relay.pool_bytes()))

    def _are_stalled(self) -> bool:
        states = [one.is_stalled() for one in self._stalls]
        return all(states)

    def after(self, number: int) -> None:
        self._serve(self._stalls[: -len(DIRECTIONS)])  # those of the last reload see one more
        del self._stalls[: -len(DIRECTIONS)]

    def finish(self) -> None:
        self._serve(self._stalls)
        assert self.pipe_bytes or not self._splices, "no pipe was full"

    def _serve(self, stalls: Sequence[Stall]) -> None:
        for one in stalls:
            self.books.add("happy", one.finish())


class Refusals(Story):
    """Refused clients that still send, so that the relay lingers."""

    def __init__(self, relay: ReloadedRelay, books: Books) -> None:
        super().__init__(relay, books)
        self._refused: list[tuple[Client, bytes]] = []
        self._began = 0.0

    def before(self, number: int) -> None:
        self._began = time.monotonic()
        for kind in KINDS:
            client = self.relay.client(kind)
            client.send(b"nonsense\n")
            self._refused.append((client, b"bad handshake\n"))
            self.books.add("errory")
            client = self.relay.client(kind)
            client.send(handshake(self.relay.new_token()) + b"x")
            self._refused.append((client, b"impatient\n"))
            self.books.add("impatient")
        # The newest client of a side gets the partner. The other one is redundant.
        token = self.relay.new_token()
        older, newer, other = (self.relay.client(kind) for kind in ("ws", "tcp", "ws"))
        older.send(handshake(token, "one"))
        self.relay.settle(self.books)
        newer.send(handshake(token, "one"))
        self.relay.settle(self.books)
        other.send(handshake(token, "other"))
        assert newer.receive(3) == other.receive(3) == b"ok\n"
        self._refused.append((older, b""))
        self.books.add("redundant")
        self.serve(newer, other)
        for client, _ in self._refused:
            client.send(MESSAGE)

    def after(self, number: int) -> None:
        for client, answer in self._refused:
            if time.monotonic() - self._began < LINGER_SECONDS:
                client.send(MESSAGE)
            assert client.read_to_end() == answer
            client.close()
        self._refused.clear()


class Sources(Story):
    """A source behind a proxy has as many waiting clients as it may, before and after a reload."""

    LIMIT = 3  # of --max-waiting-per-source

    def before(self, number: int) -> None:
        self._source = f"192.0.2.{number + 1}"
        self._waiting = []
        for kind in (*KINDS, "tcp")[: self.LIMIT]:
            client, token = self.relay.client(kind, source=self._source), self.relay.new_token()
            client.send(handshake(token, "one"))
            self._waiting.append((client, token))
        self.relay.settle(self.books)

    def after(self, number: int) -> None:
        with self.relay.client(source=self._source) as client:
            client.send(handshake(self.relay.new_token()))
            assert client.read_to_end() == b"too many waiting\n"
        self.books.add("lonely")
        for client, token in self._waiting:
            other = self.relay.client(source=self._source)
            other.send(handshake(token, "other"))
            assert client.receive(3) == other.receive(3) == b"ok\n"
            self.serve(client, other)
