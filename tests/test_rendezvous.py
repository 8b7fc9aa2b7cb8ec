"""Who meets whom: by token, never within one side, the newest first."""

from __future__ import annotations

import random
from collections import Counter
from typing import NamedTuple

import pytest
from helpers import FakeClock, FakeTransport, handshake
from invariants import check_rendezvous

from transit_relay import (
    Rendezvous,
    Session,
    State,
    UsageRecord,
)

STEPS = 2000


class Place:
    """A Rendezvous whose books are checked after each arrival."""

    def __init__(self) -> None:
        self.records: list[UsageRecord] = []
        self.rendezvous = Rendezvous(self.records.append, FakeClock(100.0))

    def arrive(self, token: str, side: str | None) -> Session:
        """A client with its handshake."""
        session = Session(FakeTransport(), self.rendezvous, 1_000_100.0)
        session.line_received(handshake(token, side)[:-1])
        check_rendezvous(self.rendezvous)
        return session

    def moods(self) -> list[str]:
        """The moods of all records so far, in order."""
        return [record.mood for record in self.records]


@pytest.fixture
def place() -> Place:
    return Place()


def are_a_pair(one: Session, other: Session) -> bool:
    """Whether these two relay to each other."""
    return (
        one.state == other.state == State.RELAYING
        and one.partner is other
        and other.partner is one
        and isinstance(one.transport, FakeTransport)
        and one.transport.partner is other.transport
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
def test_two(place: Place, one: str | None, other: str | None, meet: bool) -> None:
    first, second = place.arrive("token", one), place.arrive("token", other)
    assert are_a_pair(first, second) == meet
    assert {first.state, second.state} == {State.RELAYING if meet else State.WAIT_PARTNER}


def test_another_token_is_another_place(place: Place) -> None:
    sessions = [place.arrive(token, None) for token in ("one", "ONE", "other")]
    assert [session.state for session in sessions] == [State.WAIT_PARTNER] * 3
    assert len(place.rendezvous.waiting) == 3


def test_the_newest_is_met_and_the_others_are_redundant_at_once(place: Place) -> None:
    oldest, older, newest = (place.arrive("token", "left") for _ in range(3))
    comer = place.arrive("token", "right")
    assert are_a_pair(newest, comer)
    assert oldest.state == older.state == State.DONE
    assert place.moods() == ["redundant", "redundant"]


def test_an_unsided_newcomer_meets_the_newest_too(place: Place) -> None:
    older, newest = place.arrive("token", "left"), place.arrive("token", "left")
    assert are_a_pair(newest, place.arrive("token", None))
    assert older.state == State.DONE


def test_newest_is_whose_handshake_came_last(place: Place) -> None:
    """Not who was accepted last."""
    slow = Session(FakeTransport(), place.rendezvous, 1_000_100.0)
    quick = place.arrive("token", "left")
    slow.line_received(handshake("token", "left")[:-1])
    assert are_a_pair(slow, place.arrive("token", "right"))
    assert quick.state == State.DONE


def test_one_that_has_left_is_not_met(place: Place) -> None:
    older, newest = place.arrive("token", "left"), place.arrive("token", "left")
    newest.client_ended()
    assert are_a_pair(older, place.arrive("token", "right"))
    assert place.moods() == ["lonely"]


def test_others_of_other_tokens_are_left_alone(place: Place) -> None:
    bystander = place.arrive("elsewhere", "left")
    place.arrive("token", "left")
    place.arrive("token", "right")
    assert bystander.state == State.WAIT_PARTNER and place.records == []


def test_a_third_waits_and_a_fourth_meets_it(place: Place) -> None:
    first, second = place.arrive("token", "left"), place.arrive("token", "right")
    third = place.arrive("token", "left")
    assert third.state == State.WAIT_PARTNER
    fourth = place.arrive("token", "right")
    assert are_a_pair(first, second) and are_a_pair(third, fourth)
    assert len(place.rendezvous.paired) == 4


def test_a_token_is_free_again_when_its_pair_is_over(place: Place) -> None:
    first, second = place.arrive("token", "left"), place.arrive("token", "right")
    first.client_ended()
    assert place.arrive("token", "left").state == State.WAIT_PARTNER
    second.connection_lost()
    assert len(place.rendezvous.waiting) == 1 and not place.rendezvous.paired


def test_nothing_is_kept_of_those_who_are_gone(place: Place) -> None:
    for side in ("left", "left", "right", None):
        place.arrive("token", side).connection_lost()
    assert place.rendezvous.waiting == {} and place.rendezvous.paired == set()


# Many at random. Who must meet whom is worked out a second time here, in the plainest way.


class Waiting(NamedTuple):
    """Somebody who waits, as the test has it in its own books."""

    session: Session
    token: str
    side: str | None


def wait_for_each_other(one: Waiting, other: Waiting) -> bool:
    """Whether these two have to meet."""
    one_side = one.side is not None and one.side == other.side
    return one.token == other.token and not one_side


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_many_at_random(seed: int) -> None:
    """2,000 times somebody comes, goes or talks: each life is recorded, and none twice."""
    chance = random.Random(seed)
    place = Place()
    connected: list[Session] = []
    waiting: list[Waiting] = []  # in the order of their handshakes
    alone: Counter[str] = Counter()  # the moods of lives without a partner
    accepted = pairs = 0

    for step in range(STEPS):
        if not connected or chance.random() < 0.3:
            connected.append(Session(FakeTransport(), place.rendezvous, 1_000_100.0))
            accepted += 1
        client = chance.choice(connected)
        state = client.state
        fresh = state == State.WAIT_HANDSHAKE
        event = chance.choice(["line", "line", "junk"] if fresh else ["bytes", "end_sent"])
        event = chance.choice([event] * 4 + ["client_ended", "connection_lost"])

        if event == "line":
            side = chance.choice(["left", "left", "right", None])
            comer = Waiting(client, chance.choice("abc"), side)
            client.line_received(handshake(comer.token, comer.side)[:-1])
            crowd = [one for one in waiting if wait_for_each_other(one, comer)]
            if crowd:
                assert are_a_pair(crowd[-1].session, client), (seed, step)
                waiting = [one for one in waiting if one not in crowd]
                alone["redundant"] += len(crowd) - 1
                pairs += 1
            else:
                waiting.append(comer)
        elif event == "junk":
            client.line_received(b"junk")
            alone["errory"] += 1
        elif event == "bytes":
            partner, data = client.partner, b"%d " % step
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
        check_rendezvous(place.rendezvous)
        there = {id(one) for crowd in place.rendezvous.waiting.values() for one in crowd}
        assert there == {id(one.session) for one in waiting}, (seed, step)
        told = Counter(place.moods())
        assert told.pop("happy", 0) == pairs - len(place.rendezvous.paired) / 2, (seed, step)
        assert told == +alone, (seed, step)

    alone["empty"] += sum(one.state == State.WAIT_HANDSHAKE for one in connected)
    alone["lonely"] += len(waiting)
    for client in connected:
        client.connection_lost()
    assert Counter(place.moods()) == +alone + Counter(happy=pairs)
    assert sum(alone.values()) + 2 * pairs == accepted
    assert len(alone) == 5 and min(*alone.values(), pairs) > 10  # all of it does happen
