"""One client's rules: execute the table in Session's docstring, then test what it cannot list."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
from helpers import FakeClock, FakeTransport, docstring_table, handshake, partner_of

from transit_relay import (
    Limit,
    Pair,
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


class Setup:
    """A Rendezvous with its sessions, its records and its clock."""

    def __init__(self) -> None:
        self.clock = FakeClock(100.0)
        self.records: list[UsageRecord] = []
        self.rendezvous = Rendezvous(self.records.append, self.clock)
        self.sessions: list[Session] = []

    def accept(self, role: Role = Role.PORT) -> Session:
        """Return a new client's session. The time of day is the clock plus 1,000,000 s."""
        session = Session(FakeTransport(), self.rendezvous, 1_000_000 + self.clock.now, role)
        self.sessions.append(session)
        return session

    def arrive(self, line: bytes = LINE) -> Session:
        """Return the session of a client that has sent its first line."""
        session = self.accept()
        session.line_received(line)
        return session

    def pair(self) -> tuple[Session, Session]:
        """Return the sessions of two clients that are paired."""
        return self.arrive(LINE), self.arrive(PARTNERS_LINE)

    def moods(self) -> list[str]:
        """Return the moods of all records so far, in order."""
        return [record.mood for record in self.records]

    def observed(self) -> list[tuple[object, ...]]:
        """Return all that can be observed of the sessions, and the records."""
        seen: list[tuple[object, ...]] = [
            (*self.records, self.rendezvous.relayed_bytes(), len(self.rendezvous.pairs))
        ]
        for session in self.sessions:
            transport = session.transport
            assert isinstance(transport, FakeTransport)
            seen.append((session.state, transport.sent, transport.finished, partner_of(session)))
        return seen


@pytest.fixture
def setup() -> Setup:
    return Setup()


def sent(session: Session) -> bytes:
    """Return all bytes that this client was sent."""
    assert isinstance(session.transport, FakeTransport)
    return session.transport.sent


def limited(session: Session, limit: Limit) -> Session:
    """Return the session, which a limit refuses from now on."""
    session.refused_by = limit
    return session


def match(session: Session, other: Session) -> None:
    """Put a session into a pair with `other`, and let it begin."""
    session.matched(Pair(session, other))
    session.start_relaying()


# The inputs, by their names in the table ...
INPUTS: dict[str, Callable[[Setup, Session], object]] = {
    "postponed": lambda setup, session: session.stream_postponed(),
    "opened": lambda setup, session: session.stream_opened(),
    "handshake": lambda setup, session: session.line_received(LINE),
    "junk": lambda setup, session: session.line_received(b"GET / HTTP/1.1\r"),
    "limited": lambda setup, session: limited(session, Limit.SOURCE).line_received(LINE),
    "full": lambda setup, session: session.relay_full(),
    "bytes": lambda setup, session: session.bytes_received(b"some bytes"),
    "matched": lambda setup, session: match(session, setup.sessions[0]),
    "displaced": lambda setup, session: session.displaced(),
    "end": lambda setup, session: session.client_ended(),
    "left": lambda setup, session: session.partner_left(Reason.ENDED),
}
# ... and what a partner does.
STEPS = INPUTS | {
    "partner": lambda setup, session: setup.arrive(PARTNERS_LINE),
    "partner ends": lambda setup, session: setup.sessions[-1].client_ended(),
}

# Every path to every state, as steps after the accept.
PATHS: dict[str, tuple[State, list[str]]] = {
    "accepted": (State.WAIT_HANDSHAKE, []),
    "accepted, HTTP expected": (State.WAIT_UPGRADE, []),
    "HTTP": (State.WAIT_UPGRADE, ["postponed"]),
    "HTTP, upgraded": (State.WAIT_HANDSHAKE, ["postponed", "opened"]),
    "opened": (State.WAIT_HANDSHAKE, ["opened"]),
    "waiting": (State.WAIT_PARTNER, ["handshake"]),
    "waited": (State.RELAYING, ["handshake", "partner"]),
    "met a waiting client": (State.RELAYING, ["partner", "handshake"]),
    "errory": (State.DONE, ["junk"]),
    "empty": (State.DONE, ["end"]),
    "HTTP answer": (State.DONE, ["postponed", "end"]),
    "impatient": (State.DONE, ["handshake", "bytes"]),
    "redundant": (State.DONE, ["handshake", "displaced"]),
    "lonely": (State.DONE, ["handshake", "end"]),
    "left": (State.DONE, ["handshake", "partner", "end"]),
    "stayed": (State.DONE, ["handshake", "partner", "partner ends"]),
}

EXPECT_HTTP = ("accepted, HTTP expected", "opened")


def reach(setup: Setup, path: str) -> Session:
    """Return a session that has reached its state on this path."""
    setup.accept()  # the other session of the input `matched`
    session = setup.accept(Role.WEBSOCKET if path in EXPECT_HTTP else Role.PORT)
    for step in PATHS[path][1]:
        STEPS[step](setup, session)
    assert session.state == PATHS[path][0]
    return session


class Row(NamedTuple):
    """A row of the table in Session's docstring."""

    state: State
    input: str
    next: State
    mood: str
    reply: str


TABLE = [
    Row(State(state), name, State(after), *more)
    for state, name, after, *more in docstring_table(Session)
]
LISTED = {(row[0], row[1]) for row in TABLE}


def test_all_rows_of_the_table_are_read() -> None:
    assert len(TABLE) == len(LISTED) == 15
    assert {row[0] for row in TABLE} == set(STATES) - {State.DONE}
    assert {row[1] for row in TABLE} == set(INPUTS)
    assert {row[2] for row in TABLE} == set(STATES)


@pytest.mark.parametrize(
    ("path", "row"),
    [
        pytest.param(path, row, id=f"{path}-{row[1]}")
        for row in TABLE
        for path, (state, _) in PATHS.items()
        if state == row[0]
    ],
)
def test_a_listed_input_does_what_its_row_says(setup: Setup, path: str, row: Row) -> None:
    _, name, next_state, mood, reply = row
    session = reach(setup, path)
    before = sent(session)
    INPUTS[name](setup, session)
    assert session.state == next_state
    said = "" if reply == "-" else reply.replace("\\n", "\n")
    assert sent(session)[len(before) :] == said.encode()
    assert isinstance(session.transport, FakeTransport) and session.transport.finished == (
        next_state == State.DONE
    )
    for other in setup.sessions:
        if other is not session:
            other.end_sent()  # completes the pair whose other client left
    assert setup.moods() == ([] if mood == "-" else [mood])


@pytest.mark.parametrize(
    ("path", "name"),
    [
        pytest.param(path, name, id=f"{path}-{name}")
        for path, (state, _) in PATHS.items()
        for name in INPUTS
        if (state, name) not in LISTED
    ],
)
def test_an_unlisted_input_changes_nothing(setup: Setup, path: str, name: str) -> None:
    """A late event of a client is ignored. Every other unlisted input is a bug and raises."""
    session = reach(setup, path)
    before = setup.observed()
    if session.state == State.DONE and name in ("handshake", "limited", "junk", "bytes", "end"):
        INPUTS[name](setup, session)
    else:
        with pytest.raises(AssertionError):
            INPUTS[name](setup, session)
    assert setup.observed() == before


# Records: how many, and when.


# Paths whose record is that of a pair.
PAIRED = ("waited", "met a waiting client", "left", "stayed")
UNRECORDED = ("accepted, HTTP expected", "HTTP", "HTTP answer")


@pytest.mark.parametrize("path", [path for path in PATHS if path not in PAIRED])
@pytest.mark.parametrize(
    "order",
    list(itertools.permutations(["client_ended", "end_sent", "connection_lost"])),
    ids="-".join,
)
def test_a_client_without_a_partner_is_recorded_once(
    setup: Setup, path: str, order: tuple[str, ...]
) -> None:
    session = reach(setup, path)
    for event in order * 2:
        getattr(session, event)()
    assert len(setup.records) == (path not in UNRECORDED)
    for record in setup.records:
        assert record.waiting_time is None and record.total_bytes == 0


def test_a_pair_is_recorded_once_when_the_side_that_stayed_was_sent_all() -> None:
    """Try every order of the events of both. Check after each event, not only at the end."""
    events = [
        (side, event)
        for side in (0, 1)
        for event in ("client_ended", "end_sent", "connection_lost")
    ]
    for order in itertools.permutations(events):
        setup = Setup()
        pair = setup.pair()
        stayed = None
        expected = 0
        for side, event in order:
            getattr(pair[side], event)()
            if stayed is None and event != "end_sent":
                stayed = 1 - side
            elif side == stayed and event != "client_ended":
                expected = 1
            assert setup.moods() == ["happy"] * expected, order
            assert len(setup.rendezvous.pairs) == 1 - expected, order
        assert expected == 1


def test_a_lost_connection_ends_a_pair_for_both(setup: Setup) -> None:
    one, other = setup.pair()
    one.connection_lost()
    assert other.state == State.DONE
    assert isinstance(other.transport, FakeTransport) and other.transport.finished
    assert setup.moods() == []
    other.connection_lost()
    assert setup.moods() == ["happy"]


# Records: their numbers.


def test_times_of_a_client_without_a_partner(setup: Setup) -> None:
    session = setup.accept()
    setup.clock.advance(2)
    session.line_received(LINE)
    setup.clock.advance(5.5)
    session.client_ended()
    setup.clock.advance(60)  # lingering does not count
    session.connection_lost()
    assert setup.records == [UsageRecord(1_000_100.0, 7.5, None, 0, "lonely")]


def test_the_time_of_a_refused_client_ends_with_the_refusal(setup: Setup) -> None:
    session = setup.accept()
    setup.clock.advance(2)
    session.line_received(b"junk")
    setup.clock.advance(60)
    session.client_ended()
    session.connection_lost()
    assert setup.records == [UsageRecord(1_000_100.0, 2.0, None, 0, "errory")]


@pytest.mark.parametrize("first_line_from", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("leaver", [0, 1], ids=["first leaves", "second leaves"])
def test_times_of_a_pair_begin_with_the_earlier_accept(
    setup: Setup, first_line_from: int, leaver: int
) -> None:
    """The order of the handshakes does not matter, nor which client leaves."""
    first = setup.accept()
    setup.clock.advance(7)
    second = setup.accept()
    setup.clock.advance(1)
    lines = [(first, LINE), (second, PARTNERS_LINE)]
    for session, line in lines if first_line_from == 0 else reversed(lines):
        session.line_received(line)
        setup.clock.advance(2)
    (first, second)[leaver].client_ended()
    setup.clock.advance(30)  # the side that stayed receives what is queued for it
    (first, second)[1 - leaver].end_sent()
    setup.clock.advance(5)  # lingering does not count
    first.connection_lost()
    second.connection_lost()
    assert setup.records == [UsageRecord(1_000_100.0, 42.0, 7.0, 0, "happy")]


def test_the_bytes_of_a_pair_are_counted_from_both_sides_after_the_handshakes(setup: Setup) -> None:
    one, other = setup.pair()
    one.bytes_received(b"12345")
    other.bytes_received(memoryview(b"123"))
    other.bytes_received(b"1")
    assert setup.rendezvous.incomplete_bytes() == 9
    one.client_ended()
    one.bytes_received(b"late")
    other.bytes_received(b"late too")
    assert setup.rendezvous.incomplete_bytes() == 9
    other.end_sent()
    assert [record.total_bytes for record in setup.records] == [9]
    assert setup.rendezvous.incomplete_bytes() == 0


# What a client is sent.


@pytest.mark.parametrize("reason", list(Reason))
@pytest.mark.parametrize("path", [path for path in PATHS if PATHS[path][0] != State.DONE])
def test_both_transports_get_the_reason(setup: Setup, path: str, reason: Reason) -> None:
    session = reach(setup, path)
    partner = partner_of(session)
    session.client_ended(reason)
    for one in (session, partner):
        assert one is None or (
            isinstance(one.transport, FakeTransport) and one.transport.reason is reason
        )


def test_bytes_are_sent_to_the_partner_only_and_in_order(setup: Setup) -> None:
    one, other = setup.pair()
    one.bytes_received(b"to the other, ")
    other.bytes_received(b"to the one")
    one.bytes_received(memoryview(b"and more"))
    assert sent(one) == b"ok\nto the one"
    assert sent(other) == b"ok\nto the other, and more"


def test_each_is_the_others_partner_when_its_transport_is_notified(setup: Setup) -> None:
    class ObservingTransport(FakeTransport):
        """Notes its session's partner at each `session_changed`, and what was sent before."""

        def __init__(self) -> None:
            super().__init__()
            self.session: Session | None = None
            self.partners: list[tuple[Session | None, bytes]] = []

        def session_changed(self) -> None:
            assert self.session is not None
            self.partners.append((partner_of(self.session), self.sent))

    transports = [ObservingTransport(), ObservingTransport()]
    one, other = (Session(transport, setup.rendezvous, 0.0) for transport in transports)
    for transport, session in zip(transports, (one, other)):
        transport.session = session
    one.line_received(LINE)
    assert partner_of(one) is None and transports[0].partners == [(None, b"")]
    transports[0].partners.clear()
    other.line_received(PARTNERS_LINE)
    assert transports[0].partners == [(other, b"")]
    assert transports[1].partners == [(one, b"")]
    assert one.pair is other.pair is not None
    assert one.pair.sessions == (one, other)


def test_bytes_after_the_matching_line_follow_the_partners_ok(setup: Setup) -> None:
    one = setup.arrive(LINE)
    other = setup.arrive(PARTNERS_LINE)
    other.bytes_received(b"early")
    assert (sent(one), sent(other)) == (b"ok\nearly", b"ok\n")
    one.client_ended()
    other.end_sent()
    assert setup.records[0].total_bytes == 5


def test_an_impatient_client_is_not_matched(setup: Setup) -> None:
    impatient = setup.arrive(LINE)
    impatient.bytes_received(b"x")
    assert sent(impatient) == b"impatient\n"
    late = setup.arrive(PARTNERS_LINE)
    assert late.state == State.WAIT_PARTNER and sent(impatient) == b"impatient\n"
    assert setup.moods() == ["impatient"]


def test_a_redundant_client_is_sent_nothing(setup: Setup) -> None:
    older = setup.arrive(LINE)
    newer = setup.arrive(LINE)
    setup.arrive(PARTNERS_LINE)
    assert (older.state, newer.state) == (State.DONE, State.RELAYING)
    assert (
        sent(older) == b""
        and isinstance(older.transport, FakeTransport)
        and older.transport.finished
    )
    assert setup.moods() == ["redundant"]


# A fault.


@pytest.mark.parametrize("path", list(PATHS))
def test_an_abandoned_session_is_in_no_book_and_its_pair_is_recorded_once(
    setup: Setup, path: str
) -> None:
    """The partner is not changed. `Faults.repair` ends it."""
    session = reach(setup, path)
    partner, records = partner_of(session), list(setup.records)
    session.abandon()
    assert (session.state, session.pair, session.ended_pair) == (State.DONE, None, None)
    session.abandon()  # a second call changes nothing
    if partner is not None:
        assert partner.state is State.RELAYING and setup.records == records
        partner.partner_left(Reason.ENDED)
        partner.end_sent()
    assert [session not in crowd for crowd in setup.rendezvous.waiting.values()] in ([], [True])
    if path == "stayed":  # the pair was over but for this client, which has gone
        assert setup.moods() == ["happy"]
    elif path == "left":
        setup.sessions[-1].end_sent()
    assert setup.moods().count("happy") == (path in PAIRED)
    assert setup.rendezvous.pairs == set()
    session.connection_lost()
    assert setup.moods().count("happy") == (path in PAIRED)


def test_the_repr_has_no_token_and_no_side(setup: Setup) -> None:
    session = setup.arrive()
    assert LINE[13:77].decode() not in repr(session) and "side" not in repr(session)
