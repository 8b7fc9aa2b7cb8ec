"""Which clients are paired: by token, not within one side, the newest first."""

from __future__ import annotations

import random
from collections import Counter
from typing import ClassVar, NamedTuple

import pytest
from helpers import FakeClock, FakeTransport, handshake, partner_of
from invariants import check_rendezvous

from transit_relay import (
    Rendezvous,
    Session,
    State,
    UsageRecord,
)

STEPS = 2000


class Setup:
    """A Rendezvous, which is checked after each arrival, and its records."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.rendezvous = Rendezvous(self.records.append, FakeClock(100.0))

    def arrive(self, token: str, side: str | None) -> Session:
        """Return the session of a client that has sent its handshake."""
        session = Session(FakeTransport(), self.rendezvous, 1_000_100.0)
        session.line_received(handshake(token, side)[:-1])
        check_rendezvous(self.rendezvous)
        return session

    def moods(self) -> list[str]:
        """Return the moods of all records so far, in order."""
        return [record.mood for record in self.records]


@pytest.fixture
def setup() -> Setup:
    return Setup()


def are_a_pair(one: Session, other: Session) -> bool:
    """Return whether these two relay to each other."""
    return (
        one.state == other.state == State.RELAYING
        and partner_of(one) is other
        and partner_of(other) is one
        and one.pair is other.pair
        and one.pair is not None
        and set(one.pair.sessions) == {one, other}
    )


@pytest.mark.parametrize(
    ("one", "other", "meet"),
    [
        pytest.param("left", "right", True, id="two sides"),
        pytest.param("left", "left", False, id="same side"),
        pytest.param("left", "LEFT", True, id="sides that differ in case"),
        pytest.param("left", None, True, id="sided, then unsided"),
        pytest.param(None, "left", True, id="unsided, then sided"),
        pytest.param(None, None, True, id="both unsided"),
    ],
)
def test_two(setup: Setup, one: str | None, other: str | None, meet: bool) -> None:
    first, second = setup.arrive("token", one), setup.arrive("token", other)
    assert are_a_pair(first, second) == meet
    assert {first.state, second.state} == {State.RELAYING if meet else State.WAIT_PARTNER}


def test_clients_of_different_tokens_are_not_paired(setup: Setup) -> None:
    sessions = [setup.arrive(token, None) for token in ("one", "ONE", "other")]
    assert [session.state for session in sessions] == [State.WAIT_PARTNER] * 3
    assert len(setup.rendezvous.waiting) == 3


def test_the_newest_is_paired_and_the_others_are_redundant_at_once(setup: Setup) -> None:
    oldest, older, newest = (setup.arrive("token", "left") for _ in range(3))
    newcomer = setup.arrive("token", "right")
    assert are_a_pair(newest, newcomer)
    assert oldest.state == older.state == State.DONE
    assert setup.moods() == ["redundant", "redundant"]


def test_a_newcomer_without_a_side_is_paired_with_the_newest_too(setup: Setup) -> None:
    older, newest = setup.arrive("token", "left"), setup.arrive("token", "left")
    assert are_a_pair(newest, setup.arrive("token", None))
    assert older.state == State.DONE


def test_the_newest_has_the_latest_handshake(setup: Setup) -> None:
    """The order of the accepts does not matter."""
    slow = Session(FakeTransport(), setup.rendezvous, 1_000_100.0)
    quick = setup.arrive("token", "left")
    slow.line_received(handshake("token", "left")[:-1])
    assert are_a_pair(slow, setup.arrive("token", "right"))
    assert quick.state == State.DONE


def test_a_client_that_has_left_is_not_paired(setup: Setup) -> None:
    older, newest = setup.arrive("token", "left"), setup.arrive("token", "left")
    newest.client_ended()
    assert are_a_pair(older, setup.arrive("token", "right"))
    assert setup.moods() == ["lonely"]


def test_clients_of_other_tokens_are_not_changed(setup: Setup) -> None:
    bystander = setup.arrive("elsewhere", "left")
    setup.arrive("token", "left")
    setup.arrive("token", "right")
    assert bystander.state == State.WAIT_PARTNER and setup.records == []


def test_a_third_client_waits_and_a_fourth_is_paired_with_it(setup: Setup) -> None:
    first, second = setup.arrive("token", "left"), setup.arrive("token", "right")
    third = setup.arrive("token", "left")
    assert third.state == State.WAIT_PARTNER
    fourth = setup.arrive("token", "right")
    assert are_a_pair(first, second) and are_a_pair(third, fourth)
    assert len(setup.rendezvous.pairs) == 2


def test_a_token_is_free_again_when_its_pair_is_over(setup: Setup) -> None:
    first, second = setup.arrive("token", "left"), setup.arrive("token", "right")
    first.client_ended()
    assert setup.arrive("token", "left").state == State.WAIT_PARTNER
    second.connection_lost()
    assert len(setup.rendezvous.waiting) == 1 and not setup.rendezvous.pairs


def test_nothing_is_kept_of_clients_that_are_gone(setup: Setup) -> None:
    for side in ("left", "left", "right", None):
        setup.arrive("token", side).connection_lost()
    assert setup.rendezvous.waiting == {} and setup.rendezvous.pairs == set()


# Cost.


class CountingSession(Session):
    """Counts how often the books hash or compare a session."""

    operations: ClassVar[int] = 0

    def __hash__(self) -> int:
        CountingSession.operations += 1
        return id(self) >> 4

    def __eq__(self, other: object) -> bool:
        CountingSession.operations += 1
        return self is other


@pytest.mark.parametrize("order", ["oldest first", "newest first"])
def test_leaving_costs_the_same_however_many_wait(setup: Setup, order: str) -> None:
    """20,000 clients of one token and side leave one by one."""
    waiting = []
    for _ in range(20_000):
        session = CountingSession(FakeTransport(), setup.rendezvous, 0.0)
        session.line_received(handshake("token", "side")[:-1])
        waiting.append(session)
    assert setup.rendezvous.waiting_clients == 20_000
    if order == "newest first":
        waiting.reverse()
    for session in waiting:
        CountingSession.operations = 0
        session.client_ended()
        assert CountingSession.operations <= 10
    assert setup.rendezvous.waiting == {} and setup.rendezvous.waiting_clients == 0
    assert setup.moods() == ["lonely"] * 20_000


# Many clients at random. A second, simpler implementation computes the expected pairs.


class Waiting(NamedTuple):
    """A waiting client, in the list that the test keeps."""

    session: Session
    token: str
    side: str | None


def are_partners(one: Waiting, other: Waiting) -> bool:
    """Return whether these two must be paired."""
    one_side = one.side is not None and one.side == other.side
    return one.token == other.token and not one_side


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_at_random(seed: int) -> None:
    """In 2,000 steps a client arrives, sends or leaves. Each is recorded, and none twice."""
    chance = random.Random(seed)
    setup = Setup()
    connected: list[Session] = []
    waiting: list[Waiting] = []  # in the order of their handshakes
    alone: Counter[str] = Counter()  # the moods of clients without a partner
    accepted = pairs = 0

    for step in range(STEPS):
        if not connected or chance.random() < 0.3:
            connected.append(Session(FakeTransport(), setup.rendezvous, 1_000_100.0))
            accepted += 1
        client = chance.choice(connected)
        state = client.state
        fresh = state == State.WAIT_HANDSHAKE
        event = chance.choice(["line", "line", "junk"] if fresh else ["bytes", "end_sent"])
        event = chance.choice([event] * 4 + ["client_ended", "connection_lost"])

        if event == "line":
            side = chance.choice(["left", "left", "right", None])
            newcomer = Waiting(client, chance.choice("abc"), side)
            client.line_received(handshake(newcomer.token, newcomer.side)[:-1])
            crowd = [one for one in waiting if are_partners(one, newcomer)]
            if crowd:
                assert are_a_pair(crowd[-1].session, client), (seed, step)
                waiting = [one for one in waiting if one not in crowd]
                alone["redundant"] += len(crowd) - 1
                pairs += 1
            else:
                waiting.append(newcomer)
        elif event == "junk":
            client.line_received(b"junk")
            alone["errory"] += 1
        elif event == "bytes":
            partner, data = partner_of(client), b"%d " % step
            client.bytes_received(data)
            if state == State.RELAYING:
                assert partner is not None and isinstance(partner.transport, FakeTransport)
                assert partner.transport.sent.endswith(data), (seed, step)
            alone["impatient"] += state == State.WAIT_PARTNER
        else:
            getattr(client, event)()
            if event != "end_sent":
                alone["empty"] += state == State.WAIT_HANDSHAKE
                alone["lonely"] += state == State.WAIT_PARTNER
            if event == "connection_lost":
                connected.remove(client)

        waiting = [one for one in waiting if one.session.state == State.WAIT_PARTNER]
        check_rendezvous(setup.rendezvous)
        there = {id(one) for crowd in setup.rendezvous.waiting.values() for one in crowd}
        assert there == {id(one.session) for one in waiting}, (seed, step)
        told = Counter(setup.moods())
        assert told.pop("happy", 0) == pairs - len(setup.rendezvous.pairs), (seed, step)
        assert told == +alone, (seed, step)

    alone["empty"] += sum(one.state == State.WAIT_HANDSHAKE for one in connected)
    alone["lonely"] += len(waiting)
    for client in connected:
        client.connection_lost()
    assert Counter(setup.moods()) == +alone + Counter(happy=pairs)
    assert sum(alone.values()) + 2 * pairs == accepted
    assert len(alone) == 5 and min(*alone.values(), pairs) > 10  # every mood occurs
