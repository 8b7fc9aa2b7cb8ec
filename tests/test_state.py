"""The format of the state that a reload carries: each released version can be resumed."""

from __future__ import annotations

import copy
import logging
import os
import pickle
import socket
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from helpers import Client, ListRecorder, Loop, WebSocketClient, handshake

import transit_relay
from transit_relay import (
    COMPLAINT_SECONDS,
    Connection,
    Limits,
    Phase,
    Predecessor,
    Quota,
    Server,
    Tally,
    carried_fields,
    connect_again,
    is_consistent,
    place_server,
    plain,
    read_state,
    resume_server,
)

# One file for each version of the format. Never change a file: make the one of a new version with
# RELAY_WRITE_STATE=1.
FILES = Path(__file__).with_name("states")
VERSION = transit_relay.STATE_VERSION
LATEST = FILES / f"{VERSION}.state"
LIMITS = Limits(max_rate=1_000_000, wait_seconds=1_000, idle_seconds=1_000)


@pytest.fixture(autouse=True)
def no_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the relay be no gateway: other tests may have imported its module."""
    monkeypatch.setattr(transit_relay, "CONNECTIONS", {"Connection": Connection})


def fill_backlog(loop: Loop, sender: Client, receiver: Client) -> None:
    """Send until bytes are queued for the receiver, which does not read."""
    sender.sock.setblocking(False)
    assert receiver.conn is not None
    while receiver.conn.backlog is None:
        loop.advance(0.05)
        try:
            sender.sock.send(bytes(4096))
        except BlockingIOError:
            continue


def make_state(loop: Loop) -> list[dict[str, Any]]:
    """Return a state with connections in each phase that a turn leaves, and half handshakes."""
    quota = Quota(1_000_000_000, loop.wallclock)
    loop.restart(limits=LIMITS, quota=quota)
    for start in (b"please relay 0123", b"GET / HTTP/1.1\r\nHo", b"G"):
        loop.client("unix").send_wire(start)
    loop.connect(has_proxy_header=True).sendall(b"PROXY TCP4 192.0.2")
    for kind in ("unix", "ws-unix"):
        loop.client(kind).send(handshake(f"waits{len(kind)}", "side"))
        loop.client(kind).send(handshake(f"waits{len(kind)}", "side"))
        loop.client(kind).send_wire(b"junk\n")
    fill_backlog(loop, *loop.meet("unix", "ws-unix", "backlog"))
    first, second = loop.meet("ws-unix", "unix", "half")
    assert isinstance(first, WebSocketClient)
    first.send_wire(first.encode(b"payload")[0][:3])
    leaver, stayed = loop.meet("unix", "ws-unix", "left")
    fill_backlog(loop, leaver, stayed)
    assert leaver.conn is not None and second.conn is not None
    leaver.conn.session.client_ended()  # as at a time limit: its partner flushes
    loop.advance(1)
    phases = {conn.phase for conn in loop.server.connections}
    assert phases == {Phase.OPEN, Phase.FLUSHING, Phase.LINGERING}
    before = Predecessor(
        version=VERSION,
        pid=1,
        is_rehearsal=True,
        fixed={"daemonize": False, "pidfile": None, "user": None},
        listeners=(),
        files={},
        configs={},
        keepalive_seconds=200.0,
        connections=len(loop.server.connections),
        name=b"transit-relay",
        has_terminal=False,
        carried=carried_fields(),
        sends_proxy_header=None,
        target_addresses=(),
    )
    return [plain(before), *place_server(loop.server)]


def load(path: Path) -> list[dict[str, Any]]:
    """Return the parts of a state in a file."""
    return list(read_state(os.open(path, os.O_RDONLY)))


def resumed(state: list[dict[str, Any]]) -> Server:
    """Return a Server that has resumed a state, with stand-ins for the sockets."""
    server = Server([], ListRecorder(), LIMITS, lambda: 2_000.0, lambda: 1.7e9, quota=Quota(10**9))
    parts = iter(copy.deepcopy(state[1:]))
    with socket.socket(socket.AF_UNIX) as stand_in:
        resume_server(server, parts, partial(connect_again, server, lambda fd: stand_in))
    return server


def comparable(state: list[dict[str, Any]]) -> object:
    """Return a state without the order of its connections and pairs.

    The sweep and the rates are left out, because their numbers of pairs follow that order, and the
    quota, which has been counted meanwhile.
    """
    shared = dict(state[1])
    links = shared.pop("links")
    names = ("fds", "pairs", "sweep", "rates", "quota")
    fixed = {name: value for name, value in links.items() if name not in names}
    conns = sorted(state[2:], key=lambda conn: conn["fd"])
    pairs = sorted(links["pairs"], key=lambda pair: pair["fds"])
    return shared, fixed, sorted(links["fds"]), pairs, conns


def test_the_state_of_this_version_is_kept(loop: Loop) -> None:
    """The file exists, and has what a state has today: the same fields."""
    state = make_state(loop)
    if os.environ.get("RELAY_WRITE_STATE"):
        LATEST.write_bytes(b"".join(pickle.dumps(part, 4) for part in state))
    assert fields_of(load(LATEST)) == fields_of(state)


def fields_of(state: list[dict[str, Any]]) -> set[str]:
    """Return the names of all fields, with the path to each."""
    found: set[str] = set()

    def visit(value: object, path: str) -> None:
        if isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(name, str):
                    found.add(f"{path}.{name}")
                    visit(inner, f"{path}.{name}")

    for part in state[:2]:
        visit(part, "")
    for conn in state[2:]:
        visit(conn, "conn")
    for pair in state[1]["links"]["pairs"]:
        visit(pair, "pair")
    return found


@pytest.mark.parametrize("path", sorted(FILES.glob("*.state")), ids=lambda path: path.stem)
def test_each_released_state_is_resumed(path: Path) -> None:
    """Encoded again, it is the same. A new field of Predecessor needs a default."""
    state = load(path)
    before = Predecessor(**state[0])
    server = resumed(state)
    assert len(server.connections) == before.connections == len(state) - 2
    assert all(is_consistent(conn) for conn in server.connections)
    assert server.rendezvous.waiting_clients == 4
    assert len(server.rendezvous.pairs) == 3
    again = [state[0], *place_server(server)]
    assert comparable(again) == comparable(state)


@pytest.mark.parametrize("place", ["shared", "links", "connection", "session", "framing"])
def test_an_unknown_field_is_refused(place: str) -> None:
    state = load(LATEST)
    framings = [conn["framing"] for conn in state[2:]]
    framing = next(one["RawFraming"] for one in framings if "RawFraming" in one)
    parts = {
        "shared": state[1],
        "links": state[1]["links"],
        "connection": state[2],
        "session": state[2]["session"],
        "framing": framing,
    }
    parts[place]["from_the_future"] = 1
    with pytest.raises((ValueError, TypeError), match="from_the_future"):
        resumed(state)


def test_a_missing_field_keeps_its_default() -> None:
    """An older program did not write it."""
    state = load(LATEST)
    for conn in state[2:]:
        conn["is_bulk"] = True
    assert all(conn.is_bulk for conn in resumed(state).connections)
    for conn in state[2:]:
        del conn["is_bulk"]
    assert not any(conn.is_bulk for conn in resumed(state).connections)


def test_a_state_that_is_cut_off_is_refused() -> None:
    state = load(LATEST)
    with pytest.raises(StopIteration):
        resumed(state[:-1])
    with pytest.raises(ValueError, match="more parts"):
        resumed([*state, {}])


def test_a_message_that_is_repeated_is_not_logged_sooner(caplog: pytest.LogCaptureFixture) -> None:
    before, after = Tally(), Tally()
    for now in (0.0, 1.0):
        before.note("kind", now, logging.WARNING, "problem")
    after.resume(pickle.loads(pickle.dumps(before.place())))
    for now in (COMPLAINT_SECONDS - 1, COMPLAINT_SECONDS):
        after.note("kind", now, logging.WARNING, "problem")
    assert caplog.messages == ["problem", "problem (2 more since the last message)"]
    assert after.counts == {"kind": 4}
