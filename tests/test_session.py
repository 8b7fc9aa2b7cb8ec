"""One client's rules: the table in Session's docstring is run here, then what it cannot say."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
from helpers import FakeClock, FakeTransport, handshake

from transit_relay import (
    Reason,
    Rendezvous,
    Role,
    Session,
    State,
    UsageRecord,
)

STATES = (State.WAIT_UPGRADE, State.WAIT_HANDSHAKE, State.WAIT_PARTNER, State.RELAYING, State.DONE)
LINE = handshake("token", "side")[:-1]
PARTNERS_LINE = handshake("token", "other")[:-1]


class World:
    """A Rendezvous with its sessions, its records and its clock."""

    def __init__(self) -> None:
        self.clock = FakeClock(100.0)
        self.records: list[UsageRecord] = []
        self.rendezvous = Rendezvous(self.records.append, self.clock)
        self.sessions: list[Session] = []

    def accept(self, role: Role = Role.PORT) -> Session:
        """A client is accepted. The time of day began 1,000,000 s before the clock."""
        session = Session(FakeTransport(), self.rendezvous, 1_000_000 + self.clock.now, role)
        self.sessions.append(session)
        return session

    def arrive(self, line: bytes = LINE) -> Session:
        """A client is accepted and sends its first line."""
        session = self.accept()
        session.line_received(line)
        return session

    def pair(self) -> tuple[Session, Session]:
        """Two clients that have met."""
        return self.arrive(LINE), self.arrive(PARTNERS_LINE)

    def moods(self) -> list[str]:
        """The moods of all records so far, in order."""
        return [record.mood for record in self.records]

    def story(self) -> list[tuple[object, ...]]:
        """All that one can see of the sessions from outside, and the records."""
        seen: list[tuple[object, ...]] = [tuple(self.records)]
        for session in self.sessions:
            pipe = session.transport
            assert isinstance(pipe, FakeTransport)
            seen.append((session.state, pipe.sent, pipe.finished, session.received_bytes))
        return seen


@pytest.fixture
def world() -> World:
    return World()


def sent(session: Session) -> bytes:
    """All that this client was sent."""
    assert isinstance(session.transport, FakeTransport)
    return session.transport.sent


# The inputs, by the names that the table gives them ...
INPUTS: dict[str, Callable[[World, Session], object]] = {
    "http": lambda world, session: session.http_detected(),
    "opened": lambda world, session: session.stream_opened(),
    "handshake": lambda world, session: session.line_received(LINE),
    "junk": lambda world, session: session.line_received(b"GET / HTTP/1.1\r"),
    "bytes": lambda world, session: session.bytes_received(b"some bytes"),
    "matched": lambda world, session: session.matched(world.sessions[0]),
    "displaced": lambda world, session: session.displaced(),
    "end": lambda world, session: session.client_ended(),
    "left": lambda world, session: session.partner_left(Reason.ENDED),
}
# ... and what a partner does.
STEPS = INPUTS | {
    "partner": lambda world, session: world.arrive(PARTNERS_LINE),
    "partner ends": lambda world, session: world.sessions[-1].client_ended(),
}

# Every way into every state, as steps from the accept on.
WAYS: dict[str, tuple[str, list[str]]] = {
    "accepted": (State.WAIT_HANDSHAKE, []),
    "accepted, web": (State.WAIT_UPGRADE, []),
    "came by HTTP": (State.WAIT_UPGRADE, ["http"]),
    "came by HTTP, upgraded": (State.WAIT_HANDSHAKE, ["http", "opened"]),
    "opened": (State.WAIT_HANDSHAKE, ["opened"]),
    "waiting": (State.WAIT_PARTNER, ["handshake"]),
    "came first": (State.RELAYING, ["handshake", "partner"]),
    "came second": (State.RELAYING, ["partner", "handshake"]),
    "errory": (State.DONE, ["junk"]),
    "empty": (State.DONE, ["end"]),
    "visited": (State.DONE, ["http", "end"]),
    "impatient": (State.DONE, ["handshake", "bytes"]),
    "redundant": (State.DONE, ["handshake", "displaced"]),
    "lonely": (State.DONE, ["handshake", "end"]),
    "left": (State.DONE, ["handshake", "partner", "end"]),
    "stayed": (State.DONE, ["handshake", "partner", "partner ends"]),
}


def bring(world: World, way: str) -> Session:
    """A session that has come into its state in this way."""
    world.accept()  # somebody whom `matched` can name
    session = world.accept(Role.WEBSOCKET if way in ("accepted, web", "opened") else Role.PORT)
    for step in WAYS[way][1]:
        STEPS[step](world, session)
    assert session.state == WAYS[way][0]
    return session


class Row(NamedTuple):
    """A row of the table in Session's docstring."""

    state: State
    input: str
    next: State
    mood: str
    reply: str


def read_table() -> list[Row]:
    """Return the rows of the table in Session's docstring."""
    lines = (inspect.getdoc(Session) or "").splitlines()
    ruler = next(n for n, line in enumerate(lines) if line.startswith("-----"))
    columns = [slice(*dashes) for dashes in dashed(lines[ruler])]
    rows = itertools.takewhile(str.strip, lines[ruler + 1 :])
    cells = ([row[column].strip() for column in columns] for row in rows)
    return [Row(State(state), name, State(after), *more) for state, name, after, *more in cells]


def dashed(ruler: str) -> list[tuple[int, int | None]]:
    """Where the columns under a ruler of dashes begin and end; the last one never does."""
    starts = [n for n, sign in enumerate(ruler) if sign == "-" and ruler[n - 1 : n] != "-"]
    return list(zip(starts, [*starts[1:], None]))


TABLE = read_table()
LISTED = {(row[0], row[1]) for row in TABLE}


def test_the_table_is_read_whole() -> None:
    assert len(TABLE) == len(LISTED) == 13
    assert {row[0] for row in TABLE} == set(STATES) - {State.DONE}
    assert {row[1] for row in TABLE} == set(INPUTS)
    assert {row[2] for row in TABLE} == set(STATES)


@pytest.mark.parametrize(
    ("way", "row"),
    [
        pytest.param(way, row, id=f"{way}-{row[1]}")
        for row in TABLE
        for way, (state, _) in WAYS.items()
        if state == row[0]
    ],
)
def test_listed(world: World, way: str, row: Row) -> None:
    _, name, next_state, mood, reply = row
    session = bring(world, way)
    before = sent(session)
    INPUTS[name](world, session)
    assert session.state == next_state
    said = "" if reply == "-" else reply.replace("\\n", "\n")
    assert sent(session)[len(before) :] == said.encode()
    assert isinstance(session.transport, FakeTransport) and session.transport.finished == (
        next_state == State.DONE
    )
    for other in world.sessions:
        if other is not session:
            other.end_sent()  # of a pair, the side that stayed has all
    assert world.moods() == ([] if mood == "-" else [mood])


@pytest.mark.parametrize(
    ("way", "name"),
    [
        pytest.param(way, name, id=f"{way}-{name}")
        for way, (state, _) in WAYS.items()
        for name in INPUTS
        if (state, name) not in LISTED
    ],
)
def test_not_listed(world: World, way: str, name: str) -> None:
    """What a client does too late is normal. All else is our mistake. Neither changes a thing."""
    session = bring(world, way)
    before = world.story()
    if session.state == State.DONE and name in ("handshake", "junk", "bytes", "end"):
        INPUTS[name](world, session)
    else:
        with pytest.raises(AssertionError):
            INPUTS[name](world, session)
    assert world.story() == before


# Records: how many, and when.


# Of these the record is a pair's, or there is none.
OTHERWISE = ("came first", "came second", "left", "stayed")
UNRECORDED = ("accepted, web", "came by HTTP", "visited")


@pytest.mark.parametrize("way", [way for way in WAYS if way not in OTHERWISE])
@pytest.mark.parametrize(
    "order",
    list(itertools.permutations(["client_ended", "end_sent", "connection_lost"])),
    ids="-".join,
)
def test_a_life_without_a_partner_is_recorded_once(
    world: World, way: str, order: tuple[str, ...]
) -> None:
    session = bring(world, way)
    for event in order * 2:
        getattr(session, event)()
    assert len(world.records) == (way not in UNRECORDED)
    for record in world.records:
        assert record.waiting_time is None and record.total_bytes == 0


def test_a_pair_is_recorded_once_when_the_side_that_stayed_has_all() -> None:
    """In every order of what can happen to the two; after each event, not only at the end."""
    events = [
        (side, event)
        for side in (0, 1)
        for event in ("client_ended", "end_sent", "connection_lost")
    ]
    for order in itertools.permutations(events):
        world = World()
        pair = world.pair()
        stayed = None
        expected = 0
        for side, event in order:
            getattr(pair[side], event)()
            if stayed is None and event != "end_sent":
                stayed = 1 - side
            elif side == stayed and event != "client_ended":
                expected = 1
            assert world.moods() == ["happy"] * expected, order
            assert len(world.rendezvous.paired) == 2 - 2 * expected, order
        assert expected == 1


def test_a_lost_connection_ends_a_pair_for_both(world: World) -> None:
    one, other = world.pair()
    one.connection_lost()
    assert other.state == State.DONE
    assert isinstance(other.transport, FakeTransport) and other.transport.finished
    assert world.moods() == []
    other.connection_lost()
    assert world.moods() == ["happy"]


# Records: their numbers.


def test_times_of_a_life_without_a_partner(world: World) -> None:
    session = world.accept()
    world.clock.advance(2)
    session.line_received(LINE)
    world.clock.advance(5.5)
    session.client_ended()
    world.clock.advance(60)  # being held does not count
    session.connection_lost()
    assert world.records == [UsageRecord(1_000_100.0, 7.5, None, 0, "lonely")]


def test_a_refused_life_ends_with_the_refusal(world: World) -> None:
    session = world.accept()
    world.clock.advance(2)
    session.line_received(b"junk")
    world.clock.advance(60)
    session.client_ended()
    session.connection_lost()
    assert world.records == [UsageRecord(1_000_100.0, 2.0, None, 0, "errory")]


@pytest.mark.parametrize("first_line_from", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("leaver", [0, 1], ids=["first leaves", "second leaves"])
def test_times_of_a_pair_begin_with_the_earlier_accept(
    world: World, first_line_from: int, leaver: int
) -> None:
    """Whichever handshake came first, and whoever leaves."""
    first = world.accept()
    world.clock.advance(7)
    second = world.accept()
    world.clock.advance(1)
    lines = [(first, LINE), (second, PARTNERS_LINE)]
    for session, line in lines if first_line_from == 0 else reversed(lines):
        session.line_received(line)
        world.clock.advance(2)
    (first, second)[leaver].client_ended()
    world.clock.advance(30)  # the side that stayed takes in what is queued for it
    (first, second)[1 - leaver].end_sent()
    world.clock.advance(5)  # being held does not count
    first.connection_lost()
    second.connection_lost()
    assert world.records == [UsageRecord(1_000_100.0, 42.0, 7.0, 0, "happy")]


def test_bytes_of_a_pair_are_those_of_both_behind_the_handshakes(world: World) -> None:
    one, other = world.pair()
    one.bytes_received(b"12345")
    other.bytes_received(memoryview(b"123"))
    other.bytes_received(b"1")
    assert world.rendezvous.incomplete_bytes() == 9
    one.client_ended()
    one.bytes_received(b"late")
    other.bytes_received(b"late too")
    assert world.rendezvous.incomplete_bytes() == 9
    other.end_sent()
    assert [record.total_bytes for record in world.records] == [9]
    assert world.rendezvous.incomplete_bytes() == 0


# What a client is sent.


@pytest.mark.parametrize("why", [Reason.ENDED, Reason.STOPPING])
@pytest.mark.parametrize("way", [way for way in WAYS if WAYS[way][0] != State.DONE])
def test_whoever_goes_is_told_why(world: World, way: str, why: str) -> None:
    session = bring(world, way)
    partner = session.partner
    session.client_ended(why)
    for one in (session, partner):
        assert one is None or (
            isinstance(one.transport, FakeTransport) and one.transport.why == why
        )


def test_bytes_go_to_the_partner_alone_and_in_order(world: World) -> None:
    one, other = world.pair()
    one.bytes_received(b"to the other, ")
    other.bytes_received(b"to the one")
    one.bytes_received(memoryview(b"and more"))
    assert sent(one) == b"ok\nto the one"
    assert sent(other) == b"ok\nto the other, and more"


def test_both_are_linked_to_each_other(world: World) -> None:
    one, other = world.pair()
    assert isinstance(one.transport, FakeTransport) and one.transport.partner is other.transport
    assert isinstance(other.transport, FakeTransport) and other.transport.partner is one.transport


def test_bytes_behind_the_line_that_matches_come_behind_the_partners_ok(world: World) -> None:
    one = world.arrive(LINE)
    other = world.arrive(PARTNERS_LINE)
    other.bytes_received(b"early")
    assert (sent(one), sent(other)) == (b"ok\nearly", b"ok\n")
    one.client_ended()
    other.end_sent()
    assert world.records[0].total_bytes == 5


def test_the_impatient_are_no_longer_there_to_be_met(world: World) -> None:
    hasty = world.arrive(LINE)
    hasty.bytes_received(b"x")
    assert sent(hasty) == b"impatient\n"
    late = world.arrive(PARTNERS_LINE)
    assert late.state == State.WAIT_PARTNER and sent(hasty) == b"impatient\n"
    assert world.moods() == ["impatient"]


def test_the_redundant_are_sent_nothing(world: World) -> None:
    older = world.arrive(LINE)
    newer = world.arrive(LINE)
    world.arrive(PARTNERS_LINE)
    assert (older.state, newer.state) == (State.DONE, State.RELAYING)
    assert (
        sent(older) == b""
        and isinstance(older.transport, FakeTransport)
        and older.transport.finished
    )
    assert world.moods() == ["redundant"]


def test_nothing_about_a_client_is_in_its_repr(world: World) -> None:
    assert LINE[13:77].decode() not in repr(world.arrive()) and "side" not in repr(world.arrive())
