"""Invariants between two turns of a Server: its fields agree with each other and the kernel."""

from __future__ import annotations

import termios
from collections.abc import Sequence

from transit_relay import (
    MAX_IDLE_PIPES,
    MAX_STATUS_CLIENTS,
    PIPE_BYTES,
    READ_BYTES,
    Limit,
    Phase,
    Pipe,
    PipePool,
    Rendezvous,
    Server,
    State,
    query_descriptor,
)
from ws_frames import FRAMED_READ_BYTES, PONG_BACKLOG_BYTES

FRAME_HEADERS_BYTES = 1024  # headers of the messages made from one read, and a Close
# The largest backlog that is not in a pipe and was not taken out of one. It follows from
# backpressure.
MAX_BACKLOG_BYTES = READ_BYTES + FRAME_HEADERS_BYTES + PONG_BACKLOG_BYTES + FRAMED_READ_BYTES

# The attributes of an Enum are slow before Python 3.12, and these checks run after each turn.
PHASES = OPEN, FLUSHING, LINGERING, CLOSED = tuple(Phase)
WAIT_PARTNER, DONE = State.WAIT_PARTNER, State.DONE
PAIRED = FORWARDED, RELAYING = State.FORWARDED, State.RELAYING
MEMORY = Limit.MEMORY.value


def check_pipe(pipe: Pipe) -> None:
    """Raise AssertionError if the kernel's count of the bytes in a pipe differs."""
    assert query_descriptor(pipe._read_fd, termios.FIONREAD) == pipe._filled <= PIPE_BYTES


def check_pool(pool: PipePool, lent: Sequence[Pipe]) -> None:
    """Raise AssertionError unless exactly `lent` are lent, and only they have bytes."""
    assert len({*lent, *pool._idle}) == pool._lent + len(pool._idle), "lent twice, or lost"
    assert pool._lent <= pool._max_pipes and len(pool._idle) <= MAX_IDLE_PIPES
    assert all(map(len, lent)) and not any(map(len, pool._idle))
    for pipe in (*lent, *pool._idle):
        check_pipe(pipe)


def check_rendezvous(rendezvous: Rendezvous) -> None:
    """Raise AssertionError if a waiting client or a pair is not as it must be."""
    is_gateway = rendezvous.is_gateway
    for token, crowd in rendezvous.waiting.items():
        assert crowd, "a token without clients"
        for session in crowd:
            assert session.state is (FORWARDED if is_gateway else WAIT_PARTNER), session
            assert session.handshake is not None and session.handshake.token == token
        sides = {session.handshake.side for session in crowd if session.handshake}
        is_unmatched = len(sides) == 1 and (None not in sides or len(crowd) == 1)
        assert is_gateway or is_unmatched, "unmatched"
    by_source: dict[bytes | None, int] = {}  # a Counter would take longer, thousands of times
    for crowd in rendezvous.waiting.values():
        for session in crowd:
            by_source[session.source] = by_source.get(session.source, 0) + 1
    assert rendezvous.waiting_by_source == by_source
    assert rendezvous.waiting_clients == sum(by_source.values())
    for pair in rendezvous.pairs:
        if len(pair.sessions) > 1:
            assert all(session.pair is pair for session in pair.sessions), pair
            states = [session.state for session in pair.sessions]
            if pair.waiting_time is not None:
                assert states.count(RELAYING) == len(states), pair
            else:  # of a client, and of the relay behind
                assert set(states) == set(PAIRED), pair
        else:
            (stayed,) = pair.sessions
            assert stayed.ended_pair is pair and stayed.state is DONE, stayed


def check_server(server: Server) -> None:
    """Raise AssertionError if the fields of a Server contradict each other or the kernel."""
    check_rendezvous(server.rendezvous)
    if not server.faults.count:  # a fault can cost the record of a pair
        counters = server.rendezvous.counters
        # A gateway counts bytes of clients that the relay behind has not answered.
        assert counters.ended_bytes == counters.sizes.total or server.rendezvous.is_gateway
        assert server.rendezvous.relayed_bytes() == sum(counters.relayed.values())
    assert server._selector is not None
    others = {server.signals._sockets[0].fileno()}
    others.update(one.fd for acceptor in server._acceptors for one in acceptor._listeners)
    entries = server._selector.get_map().items()
    registered = {fd: key.events for fd, key in entries if fd not in others}
    assert registered == {conn.fd: conn.mask for conn in server.connections if conn.mask}
    phases = [conn.phase for conn in server.connections]
    assert {phase: phases.count(phase) for phase in PHASES} == server.connections_by_phase
    status_clients = {conn for conn in server.connections if conn.is_status}
    assert set(server.timers.status_clients.connections()) == status_clients
    assert len(status_clients) <= MAX_STATUS_CLIENTS
    lingering = set(server.timers.linger_polls.connections())
    has_waited = MEMORY in server.limits.reached.counts
    is_released = server.pipes._scarcities.next_at > float("-inf")  # bytes may come out of a pipe
    queued_bytes = sum(conn.queued_bytes() for conn in server.connections)
    assert server.memory.queued_bytes == queued_bytes
    for conn in server.connections:
        assert conn.mask == (0 if conn.is_unpolled else conn.interest()), conn
        if conn.backlog is not None and not len(conn.backlog):  # its partner has to wait for room
            assert has_waited and not isinstance(conn.backlog, Pipe), conn
            assert conn.partner is not None or conn.phase is FLUSHING, conn
        is_pipe = isinstance(conn.backlog, Pipe) or (is_released and conn.framing.is_raw)
        assert conn.queued_bytes() <= (PIPE_BYTES if is_pipe else MAX_BACKLOG_BYTES), conn
        phase, state, pair = conn.phase, conn.session.state, conn.session.pair
        assert (pair is not None) == (state in PAIRED), conn
        assert pair is None or pair in server.rendezvous.pairs, conn
        assert not conn.is_unpolled or conn in server.bulk.ready or not conn.is_connected, conn
        assert phase is not CLOSED, conn
        assert (phase is OPEN) == (state is not DONE), conn
        assert phase is not FLUSHING or conn.backlog is not None, conn
        assert (phase is LINGERING) == (conn in lingering), conn
    backlogs = [conn.backlog for conn in server.connections]
    check_pool(server.pipes, [one for one in backlogs if isinstance(one, Pipe)])
    for queue in server.timers._queues:
        assert set(queue.connections()) <= server.connections, "a time limit of a closed connection"
    states = [conn.session.state for conn in server.connections]
    waiting = states.count(WAIT_PARTNER) + states.count(FORWARDED)
    assert server.rendezvous.waiting_clients == waiting
    assert 2 * len(server.rendezvous.pairs) >= states.count(RELAYING)
