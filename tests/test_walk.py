"""A random walk over a whole relay: clients, clocks and faults. The invariants hold at each step.

RELAY_WALK_STEPS is the number of steps (`make fuzz`: 1,000,000). A walk has its own seed, which a
failure names: RELAY_WALK_FIRST=SEED repeats it.
"""

from __future__ import annotations

import os
import random
import socket
from collections import Counter

import pytest
from helpers import FakeClock, Loop, handshake, reset, tcp_pair
from invariants import check_server

import transit_relay
from transit_relay import (
    Addresses,
    Connection,
    Limits,
    Pair,
    Peer,
    Quota,
    Rendezvous,
    Role,
    Session,
    set_options,
    socket_options,
)
from ws_frames import BINARY, CLOSE, PING, build_frame, upgrade_request

STEPS = int(os.environ.get("RELAY_WALK_STEPS", "2000"))
FIRST = int(os.environ.get("RELAY_WALK_FIRST", "0"))
STEPS_OF_A_WALK = 500
MOST_CLIENTS = 30
HEADER = b"PROXY TCP4 192.0.2.%d 192.0.2.100 4000 4001\r\n"
LIMITS = Limits(
    handshake_seconds=60,
    wait_seconds=300,
    idle_seconds=400,
    stall_seconds=120,
    max_connections=24,
    max_waiting_per_source=2,
)
# Methods in which a fault is injected now and then.
FAULTY: list[tuple[type, str]] = [
    *((Connection, name) for name in ("receive", "drain", "write", "finish", "advance")),
    *((Session, name) for name in ("line_received", "bytes_received", "client_ended", "end_sent")),
    *((Rendezvous, name) for name in ("join", "forget", "pair_ended", "record_single")),
    *((Pair, name) for name in ("count", "partner_of", "remove")),
]
EXCEPTIONS = (AssertionError("injected"), OSError(5, "injected"), MemoryError(), KeyError("x"))


class Walker:
    """A client of the walk, which sends and reads at random."""

    def __init__(self, walk: Walk) -> None:
        self.walk, self.chance = walk, walk.chance
        self.tcp = self.chance.random() < 0.3
        self.is_web = self.chance.random() < 0.3
        is_proxied = self.chance.random() < 0.2
        source = self.chance.choice((None, 1, 2, 3))
        ours, its = tcp_pair() if self.tcp else socket.socketpair()
        if self.tcp:
            set_options(its, socket_options(200))
        self.sock = ours
        ours.setblocking(False)
        if self.chance.random() < 0.5:
            for sock in (ours, its):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)
        role = self.chance.choice((Role.PORT, Role.PORT, Role.WEBSOCKET, Role.STATUS))
        peer = Peer(source, is_allowed=self.chance.random() < 0.9)
        walk.loop.server.admit(its, role, peer, is_proxied)
        if is_proxied:
            self.send(HEADER % self.chance.randrange(1, 4))
        if self.is_web:
            self.send(upgrade_request("relay", "/", self.chance.randbytes(16)))
        if self.chance.random() < 0.8:
            self.send_handshake()

    def send_handshake(self) -> None:
        """Send a handshake with one of a few tokens and sides."""
        token, side = self.chance.choice("abc"), self.chance.choice(("one", "one", "other", None))
        self.send_payload(handshake(token, side))

    def send(self, data: bytes) -> None:
        """Send what the kernel accepts. The rest is lost, as if the client were broken."""
        try:
            self.sock.send(data)
        except OSError:
            pass

    def send_payload(self, data: bytes, opcode: int = BINARY) -> None:
        """Send payload in the client's encoding."""
        key = self.chance.randbytes(4)
        self.send(build_frame(opcode, data, key=key) if self.is_web else data)

    def act(self) -> None:
        """Do one thing that a client can do."""
        what = self.chance.random()
        if what < 0.05:
            self.send_handshake()
        elif what < 0.45:
            self.send_payload(self.chance.randbytes(self.chance.choice((1, 100, 5_000, 150_000))))
        elif what < 0.52 or (what < 0.6 and not self.is_web):
            self.send(
                self.chance.choice((b"GET / HTTP/1.0\r\n\r\n", b"please relay ", b"\0", b"\n"))
            )
        elif what < 0.6:
            self.send_payload(b"ping" if what < 0.58 else b"", PING if what < 0.58 else CLOSE)
        elif what < 0.92:
            try:
                self.sock.recv(self.chance.choice((1, 1_000, 1 << 20)))
            except OSError:
                pass
        else:
            self.leave()

    def leave(self) -> None:
        """End the connection in one of three ways."""
        way = self.chance.random()
        if way < 0.3:
            try:
                self.sock.shutdown(socket.SHUT_WR)
            except OSError:
                pass
            return
        self.walk.clients.remove(self)
        if self.tcp and way < 0.6:
            reset(self.sock)
        else:
            self.sock.close()


class Walk:
    """One walk: a relay, its clients, and a source of chance."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.clients: list[Walker] = []
        pipes = transit_relay.affordable_pipes() if self.chance.random() < 0.7 else 0
        self.loop = Loop(max_pipes=pipes)
        rate = self.chance.choice((0, 0, 300_000))
        quota = Quota(self.chance.choice((10**6, 10**12)), self.loop.wallclock)
        limits = LIMITS._replace(max_rate=rate, quota_rate=self.chance.choice((0, 100_000)))
        self.loop.restart(limits=limits, quota=quota, addresses=Addresses())

    def step(self) -> None:
        """Do one thing at random, then run a turn."""
        what = self.chance.random()
        if what < 0.25 and len(self.clients) < MOST_CLIENTS:
            self.clients.append(Walker(self))
        elif what < 0.9 and self.clients:
            self.chance.choice(self.clients).act()
        elif what < 0.97:
            seconds = self.chance.choice((0.01, 0.05, 0.05, 0.5, 1, 1, 5, 30, 100))
            for clock in (self.loop.clock, self.loop.wallclock):
                assert isinstance(clock, FakeClock)
                clock.advance(seconds)
        else:
            self.turn_with_a_fault()
        self.turn()

    def turn(self) -> None:
        """Run a turn and check the invariants."""
        self.loop.server.run_once(0)
        check_server(self.loop.server)

    def turn_with_a_fault(self) -> None:
        """Run a turn in which a method raises an exception, if it is called."""
        owner, name = self.chance.choice(FAULTY)
        error = self.chance.choice(EXCEPTIONS)
        real = getattr(owner, name)
        left = [self.chance.randrange(3)]

        def faulty(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if left[0] == -1:
                raise error
            return real(*arguments, **options)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, faulty)
            self.loop.server.run_once(0)

    def finish(self) -> None:
        """Let all clients leave. Nothing of them may be left, and each pair has its record."""
        for client in self.clients:
            client.sock.close()
        for _ in range(200):
            self.loop.clock.advance(1)
            self.turn()
        for server in self.loop.servers:
            rendezvous = server.rendezvous
            assert server.connections == set() and rendezvous.pairs == set()
            assert rendezvous.waiting == {} and rendezvous.waiting_by_source == {}
            assert not any(set(queue.connections()) for queue in server.timers._queues)
            assert rendezvous.incomplete_bytes() == 0
        # The last one has the records: the others, if there are any, are gateways.
        happy = self.loop.recorder.moods().count("happy")
        assert happy == self.loop.servers[-1].snapshot().pairs_ended
        self.loop.close()


def test_a_random_walk(caplog: pytest.LogCaptureFixture) -> None:
    seen: Counter[str] = Counter()
    for seed in range(FIRST, FIRST + max(1, STEPS // STEPS_OF_A_WALK)):
        caplog.clear()
        walk = Walk(seed)
        try:
            for _ in range(STEPS_OF_A_WALK):
                walk.step()
            walk.finish()
        except BaseException:
            print(f"RELAY_WALK_FIRST={seed}")
            raise
        seen.update(walk.loop.recorder.moods())
    if STEPS >= 2_000:  # enough to see each mood
        moods = {"happy", "lonely", "errory", "empty", "impatient", "redundant"}
        assert set(seen) == moods, seen
