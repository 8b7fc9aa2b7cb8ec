"""The model of HAProxy's consistent hashing, and the table that docs/growing.md has of it."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable

import hashing
import pytest
from hashing import COUNTS, PAIRS, ROWS, WEIGHT, Balancer, Event, Report, Ring, Row, Service
from helpers import RELAY

GROWING = RELAY.parent / "docs" / "growing.md"
TOKENS = [hashing.make_token(number) for number in range(2_000)]

# The servers that HAProxy 2.6.12 chose for the first of TOKENS, with `balance hash` and `hash-type
# consistent`, by the weight of each server. At the third, server 5 was in the state drain.
IDS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89)
CHOSEN_BY_HAPROXY = {
    (1, None): "13 1 8 5 21 21 2 1 34 3 55 89 5 13 5 2 8 5 5 1 5 89 13 2 1 8 3 1 5 1 3 34 89 21 13",
    (10, None): "55 89 2 5 1 21 21 21 34 1 55 2 13 34 89 34 13 13 21 1 1 89 21 55 34 1 34 55 3 21",
    (10, 5): "55 89 2 8 1 21 21 21 34 1 55 2 13 34 89 34 13 13 21 1 1 89 21 55 34 1 34 55 3 21",
}


@pytest.mark.parametrize(("weight", "drained"), CHOSEN_BY_HAPROXY)
def test_the_model_chooses_as_haproxy_does(weight: int, drained: int | None) -> None:
    balancer = Balancer(IDS, sticks=False, weight=weight)
    if drained:
        balancer.drain(drained)
    expected = [int(text) for text in CHOSEN_BY_HAPROXY[weight, drained].split()]
    assert [balancer.relay_for(token) for token in TOKENS[: len(expected)]] == expected


def test_no_two_nodes_are_at_one_place() -> None:
    places = {place for relay in range(1, 1_001) for place in hashing.node_places(relay, 1)}
    assert len(places) == 16_000


@pytest.mark.parametrize("relays", [1, 2, 10, 1_000])
def test_a_relay_takes_tokens_from_all_and_gives_them_back(relays: int) -> None:
    """Only the tokens of the relay that is added or removed change their relay."""
    ring = Ring(range(1, relays + 1), 1)
    before = [ring.relay_at(token.place) for token in TOKENS]
    ring.add(relays + 1)
    after = [ring.relay_at(token.place) for token in TOKENS]
    assert {new for old, new in zip(before, after) if new != old} <= {relays + 1}
    ring.remove(relays + 1)
    assert [ring.relay_at(token.place) for token in TOKENS] == before
    with pytest.raises(ValueError, match=f"relay {relays + 1} is not in the ring"):
        ring.remove(relays + 1)


def is_expected(missed: int, clients: int, share: float) -> bool:
    """Return whether `missed` is within four standard deviations of a binomial distribution."""
    deviation = math.sqrt(clients * share * (1 - share))
    return abs(missed - clients * share) <= 4 * deviation


@pytest.mark.parametrize("relays", COUNTS)
def test_the_shares_are_those_of_the_tokens(relays: int) -> None:
    ring = Ring(range(1, relays + 1), WEIGHT)
    shares = ring.shares()
    assert len(shares) == relays and math.isclose(sum(shares.values()), 1)
    chosen = [ring.relay_at(token.place) for token in TOKENS]
    busiest = max(shares, key=shares.__getitem__)
    assert is_expected(chosen.count(busiest), len(TOKENS), shares[busiest])


@pytest.mark.parametrize("weight", [1, WEIGHT])
def test_more_nodes_even_the_shares(weight: int) -> None:
    """Each node has a gap of its own: the deviation falls with the root of the number of nodes."""
    shares = Ring(range(1, 101), weight).shares().values()
    deviation = statistics.pstdev(shares) / statistics.mean(shares)
    assert 0.55 < deviation * math.sqrt(weight * 16) < 0.75


@functools.cache
def shares_of(relays: int) -> dict[int, float]:
    """Return the shares of so many relays."""
    return Ring(range(1, relays + 1), WEIGHT).shares()


def expected_share(row: Row, relays: int, relay: int) -> float:
    """Return the share of the clients of a row that miss their partner, from the ring alone."""
    if row.redispatches or (row.sticks and row.balancers == 1):
        return 0.0
    share = shares_of(max(relays, relay))[relay]
    return share / row.balancers  # with two, half of the pairs have a client at each


@pytest.mark.parametrize("relays", COUNTS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.label)
def test_so_many_clients_miss_their_partner(row: Row, relays: int) -> None:
    relay = relays + 1 if row.adds else relays
    report = hashing.run(row, relays, relay)
    missed, clients = (
        (report.new_missed, report.new) if row.is_new else (report.waiting_missed, report.waiting)
    )
    assert clients == pytest.approx(PAIRS, rel=0.05)
    assert is_expected(missed, clients, expected_share(row, relays, relay))


def test_without_an_event_every_pair_meets() -> None:
    service = Service(100, balancers=2)
    assert hashing.simulate(service, hashing.make_arrivals(PAIRS, 1, 2), []) == []
    assert service.waiting == {}


def ten(event: Callable[[int], hashing.Happen], relays: range) -> hashing.Happen:
    """Return the same event for each of ten relays."""

    def happen(service: Service) -> None:
        for relay in relays:
            event(relay)(service)

    return happen


def scenario(sticks: bool) -> list[Report]:
    """Return the reports of ten relays that are lost, drained, added and back, one after the other.

    A client waits for half of the time between two events.
    """
    lost, drained, added = range(11, 21), range(401, 411), range(1_001, 1_011)
    events = [
        ten(hashing.lose, lost),
        ten(hashing.notice_loss, lost),
        ten(hashing.drain, drained),
        ten(hashing.add, added),
        ten(hashing.add, drained),
        ten(hashing.drain, added),
    ]
    steps = [Event(2 * number, event) for number, event in enumerate(events, 1)]
    arrivals = hashing.make_arrivals(PAIRS * 4, 13)
    return hashing.simulate(Service(1_000, sticks=sticks, weight=1), arrivals, steps)


def test_events_one_after_the_other_among_1000_relays() -> None:
    plain, stuck = scenario(sticks=False), scenario(sticks=True)
    share = 10 / 1_000
    for report in plain:
        assert report.waiting == pytest.approx(PAIRS * 4 / 13, rel=0.1)
        assert report.new == pytest.approx(PAIRS * 4 / 13, rel=0.1)
        assert is_expected(report.waiting_missed, report.waiting, share)
    # With `stick on` only a lost relay costs clients: those that waited there, and those that came
    # until the loss was noticed.
    missed = [report.waiting_missed for report in stuck]
    assert missed[:2] == [report.waiting_missed for report in plain[:2]]
    assert missed[2:] == [0] * 4
    for lost, *others in plain, stuck:
        assert lost.new_missed and is_expected(lost.new_missed, lost.new, share)
        assert [report.new_missed for report in others] == [0] * 5


def test_a_lost_relay_is_replaced_when_the_loss_is_noticed() -> None:
    """A stick table does not hold tokens at a relay that is down."""
    service = Service(4, sticks=True)
    for token in TOKENS:
        service.arrive(token, 0)
    lost = [token for token in TOKENS if service.waiting[token.text] == 2]
    hashing.lose(2)(service)
    assert not any(service.arrive(token, 0) for token in lost)
    hashing.notice_loss(2)(service)
    assert not any(service.arrive(token, 0) for token in lost)  # the first client of each pair
    assert all(service.arrive(token, 0) for token in lost)


def test_clients_stay_where_a_redispatch_took_them() -> None:
    """This needs `stick on`.

    A redispatch takes the node after the lost one. Without `stick on`, half of these tokens belong
    to the node before it when the loss is noticed. One in three of these has the same relay.
    """
    missed = []
    for sticks in (False, True):
        service = Service(4, sticks=sticks, redispatches=True)
        hashing.lose(2)(service)
        for token in TOKENS:
            service.arrive(token, 0)
        assert 2 not in service.waiting.values() and len(service.waiting) == len(TOKENS)
        hashing.notice_loss(2)(service)
        missed.append(sum(not service.arrive(token, 0) for token in TOKENS))
    assert is_expected(missed[0], len(TOKENS), 1 / 4 * 1 / 2 * 2 / 3)
    assert missed[1] == 0


def test_a_lone_relay_is_tried_again() -> None:
    assert Ring((7,), WEIGHT).relay_at(0, avoid=7) == 7


def test_the_table_in_the_documents() -> None:
    lines = "\n".join(hashing.markdown())
    assert f"\n\n{lines}\n\n" in GROWING.read_text(encoding="utf-8")
