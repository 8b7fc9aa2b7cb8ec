"""A model of HAProxy before many relays: which clients meet when relays come and go.

    python3 tests/hashing.py

prints the table of docs/growing.md. Nothing here opens a socket, and the clients come from a seed.

The model has of HAProxy 2.6 (src/lb_chash.c, src/backend.c, src/stream.c):

* `hash-type consistent` without a function: sdbm of the token, then the full avalanche hash.
* The ring: 16 nodes for each unit of weight, at the full hash of 4096 * server id + node. No two
  nodes are at one place, because the full hash is a permutation. The nearest node has the token,
  before or after it.
* `drain` and a failed check: the nodes leave the ring. Back, or added: they enter it.
* `stick on`: a known token goes to its relay, which may be draining, but not to one that is down.
  The relay is stored at each connection.
* `option redispatch 1`: if the relay does not answer, the next node of another relay is tried once.
* Several HAProxies: each has a view of its own of the relays, and a stick table of its own.

It leaves out the expiry and the maximum size of a stick table, `peers`, queues, `slowstart`,
`hash-balance-factor` and backup servers. The token is hashed as text; a configuration may hash a
number that it makes of the token, which chooses other relays by the same rules. The network takes
no time, so no event happens between the choice of a relay and the connection to it.
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import random
from collections.abc import Callable, Sequence
from typing import NamedTuple, Union

NODES_FOR_EACH_WEIGHT = 16  # BE_WEIGHT_SCALE
NODES_FOR_EACH_ID = 4096  # SRV_EWGHT_RANGE
HASHES = 1 << 32
WEIGHT = 10  # of each relay in the table

PAIRS = 4_000  # of each row and number of relays in the table
COUNTS = (2, 4, 10, 100, 1_000)  # relays

Ids = Union[range, tuple[int, ...]]  # of servers


def sdbm(data: bytes) -> int:
    """Return the hash that HAProxy makes of a sample."""
    found = 0
    for byte in data:
        found = (found * 65599 + byte) % HASHES
    return found


def full_hash(number: int) -> int:
    """Return the hash of an integer of 32 bits that HAProxy calls full_hash or avalanche."""
    a = (number + 0x7ED55D16 + (number << 12)) % HASHES
    a = a ^ 0xC761C23C ^ (a >> 19)
    a = (a + 0x165667B1 + (a << 5)) % HASHES
    a = ((a + 0xD3A2646C) ^ (a << 9)) % HASHES
    a = (a + 0xFD7046C5 + (a << 3)) % HASHES
    a = a ^ 0xB55A4F09 ^ (a >> 16)
    return a * 3221225473 % HASHES


class Token(NamedTuple):
    """A token of a pair, and its place in the ring."""

    text: str
    place: int


@functools.cache
def make_token(number: int) -> Token:
    """Return a token, always the same one for a number."""
    text = hashlib.sha256(b"%d" % number).hexdigest()
    return Token(text, full_hash(sdbm(text.encode())))


@functools.cache
def node_places(relay: int, weight: int) -> list[int]:
    """Return the places of the nodes of a relay."""
    first = relay * NODES_FOR_EACH_ID
    return [full_hash(first + node) for node in range(weight * NODES_FOR_EACH_WEIGHT)]


@functools.cache
def sorted_nodes(relays: Ids, weight: int) -> tuple[list[int], list[int]]:
    """Return the places of all nodes in their order, and the relay of each."""
    relay_at = {place: relay for relay in relays for place in node_places(relay, weight)}
    places = sorted(relay_at)
    return places, [relay_at[place] for place in places]


class Ring:
    """The nodes of the relays that take new tokens. A relay is known by its server id."""

    def __init__(self, relays: Ids, weight: int) -> None:
        """Each relay has the same weight."""
        self._weight = weight
        places, of_relays = sorted_nodes(relays, weight)
        self._at, self._relays = places.copy(), of_relays.copy()

    def add(self, relay: int) -> None:
        """Insert the nodes of a relay."""
        for place in node_places(relay, self._weight):
            index = bisect.bisect(self._at, place)
            self._at.insert(index, place)
            self._relays.insert(index, relay)

    def remove(self, relay: int) -> None:
        """Remove the nodes of a relay. Raise ValueError if it is not in the ring."""
        if relay not in self._relays:
            raise ValueError(f"relay {relay} is not in the ring")
        kept = [index for index, other in enumerate(self._relays) if other != relay]
        self._at = [self._at[index] for index in kept]
        self._relays = [self._relays[index] for index in kept]

    def relay_at(self, place: int, avoid: int | None = None) -> int:
        """Return the relay of the nearest node. The ring must not be empty.

        If that is the relay to avoid, return the next other one, if there is one.
        """
        after = bisect.bisect_left(self._at, place) % len(self._at)
        before = after - 1  # -1: the last node
        is_before = (place - self._at[before]) % HASHES <= (self._at[after] - place) % HASHES
        nearest = before if is_before else after
        if self._relays[nearest] != avoid:
            return self._relays[nearest]
        in_order = self._relays[nearest:] + self._relays[:nearest]
        return next((relay for relay in in_order if relay != avoid), avoid)

    def shares(self) -> dict[int, float]:
        """Return the part of all places that each relay has: half of the gaps beside its nodes."""
        found = dict.fromkeys(self._relays, 0.0)
        for index, relay in enumerate(self._relays):
            gaps = self._at[(index + 1) % len(self._at)] - self._at[index - 1]
            found[relay] += gaps % HASHES / 2 / HASHES
        return found


class Balancer:
    """One HAProxy: its view of the relays, and its stick table."""

    def __init__(self, relays: Ids, sticks: bool, weight: int) -> None:
        """All relays are up. `sticks`: with `stick on`."""
        self.ring = Ring(relays, weight)
        self._sticks = sticks
        self._stuck: dict[str, int] = {}
        self._down: set[int] = set()

    def add(self, relay: int) -> None:
        """Have a new relay, or one that was drained or down."""
        self._down.discard(relay)
        self.ring.add(relay)

    def drain(self, relay: int) -> None:
        """Send no new token to a relay."""
        self.ring.remove(relay)

    def notice_loss(self, relay: int) -> None:
        """Have a relay down, because its checks failed."""
        self.ring.remove(relay)
        self._down.add(relay)

    def relay_for(self, token: Token, avoid: int | None = None) -> int:
        """Return the relay for a client. `avoid`: the one that did not answer."""
        relay = None if avoid else self._stuck.get(token.text)
        if relay is None or relay in self._down:
            relay = self.ring.relay_at(token.place, avoid)
        if self._sticks:
            self._stuck[token.text] = relay
        return relay


class Service:
    """Relays behind one or more HAProxies. The relays have the ids from 1 on."""

    def __init__(
        self,
        relays: int,
        balancers: int = 1,
        sticks: bool = False,
        redispatches: bool = False,
        weight: int = WEIGHT,
    ) -> None:
        ids = range(1, relays + 1)
        self.balancers = [Balancer(ids, sticks, weight) for _ in range(balancers)]
        self._redispatches = redispatches
        self.waiting: dict[str, int] = {}  # the relay where a client waits, by its token
        self._dead: set[int] = set()

    def lose(self, relay: int) -> None:
        """Kill a relay: its clients are gone. No HAProxy notices it yet."""
        self._dead.add(relay)
        self.waiting = {token: at for token, at in self.waiting.items() if at != relay}

    def arrive(self, token: Token, balancer: int) -> bool:
        """Have a client connect through one of the HAProxies. Return whether it meets its partner.

        A client without a partner waits, or is refused because its relay is lost.
        """
        relay = self.balancers[balancer].relay_for(token)
        if relay in self._dead and self._redispatches:
            relay = self.balancers[balancer].relay_for(token, avoid=relay)
        if relay in self._dead:
            return False
        if self.waiting.get(token.text) == relay:
            del self.waiting[token.text]
            return True
        self.waiting[token.text] = relay
        return False


class Arrival(NamedTuple):
    """A client: when it comes, through which HAProxy, and whether its partner came before."""

    time: float
    token: Token
    balancer: int
    is_second: bool


class Event(NamedTuple):
    """What happens to the service at a time."""

    time: float
    happen: Callable[[Service], None]


class Report:
    """How many clients miss their partner because of an event."""

    def __init__(self) -> None:
        self.waiting = 0  # clients whose partner came after the event
        self.waiting_missed = 0  # of these
        self.new = 0  # pairs whose clients both came after it, and before the next event
        self.new_missed = 0  # of these


@functools.cache
def make_arrivals(pairs: int, until: int, balancers: int = 1) -> list[Arrival]:
    """Return the clients of so many pairs, in the order of their times, always the same ones.

    The first client of a pair comes between the times 0 and `until`, and waits for a time of 1.
    Each client comes through any of the HAProxies.
    """
    numbers = random.Random(f"{pairs} {until} {balancers}")
    arrivals = []
    for number in range(pairs):
        first = numbers.random() * until
        for time, is_second in ((first, False), (first + 1, True)):
            balancer = int(numbers.random() * balancers)
            arrivals.append(Arrival(time, make_token(number), balancer, is_second))
    return sorted(arrivals, key=lambda arrival: arrival.time)


def simulate(
    service: Service, arrivals: Sequence[Arrival], events: Sequence[Event]
) -> list[Report]:
    """Return a report for each event. The service is changed.

    Arrivals and events are in the order of their times. No pair may have two events between its
    clients, so that each miss has one cause. Before the first event every pair meets.
    """
    reports = [Report() for _ in range(1 + len(events))]  # the first one: before all events
    came: dict[str, int] = {}  # the number of events before the first client of a pair
    happened = 0
    for time, token, balancer, is_second in arrivals:
        while happened < len(events) and events[happened].time <= time:
            events[happened].happen(service)
            happened += 1
        meets = service.arrive(token, balancer)
        if not is_second:
            came[token.text] = happened
        elif came[token.text] == happened:
            reports[happened].new += 1
            reports[happened].new_missed += not meets
        else:
            assert came[token.text] == happened - 1, "two events"
            reports[happened].waiting += 1
            reports[happened].waiting_missed += not meets
    assert not reports[0].new_missed
    return reports[1:]


# The events.

Happen = Callable[[Service], None]


def lose(relay: int) -> Happen:
    """Return the loss of a relay, before the checks notice it."""
    return lambda service: service.lose(relay)


def notice_loss(relay: int, balancers: slice = slice(None)) -> Happen:
    """Return failed checks of a relay, at these HAProxies."""

    def happen(service: Service) -> None:
        for balancer in service.balancers[balancers]:
            balancer.notice_loss(relay)

    return happen


def drain(relay: int) -> Happen:
    """Return the drain of a relay, at each HAProxy."""

    def happen(service: Service) -> None:
        for balancer in service.balancers:
            balancer.drain(relay)

    return happen


def add(relay: int) -> Happen:
    """Return the addition of a relay, at each HAProxy."""

    def happen(service: Service) -> None:
        for balancer in service.balancers:
            balancer.add(relay)

    return happen


# The table of the documentation.


class Row(NamedTuple):
    """A row of the table: an event, and which of its clients are counted."""

    label: str
    event: Callable[[int], Happen]
    sticks: bool = False
    balancers: int = 1
    redispatches: bool = False
    is_new: bool = False  # pairs that come after the event; otherwise clients that wait
    adds: bool = False  # the relay is a new one


FIRST_ONE = slice(1)
ROWS = (
    Row("a relay is lost", lose),
    Row("the same, new pairs until the checks notice it", lose, is_new=True),
    Row("the same, with `option redispatch 1`", lose, redispatches=True, is_new=True),
    Row(
        "one of two HAProxies takes a relay for down, new pairs",
        functools.partial(notice_loss, balancers=FIRST_ONE),
        balancers=2,
        is_new=True,
    ),
    Row("a relay is drained", drain),
    Row("the same, with `stick on`", drain, sticks=True),
    Row("the same, two HAProxies without `peers`", drain, sticks=True, balancers=2),
    Row("a relay is added", add, adds=True),
    Row("the same, with `stick on`", add, sticks=True, adds=True),
    Row("the same, two HAProxies without `peers`", add, sticks=True, balancers=2, adds=True),
)


@functools.cache
def run(row: Row, relays: int, relay: int) -> Report:
    """Return the report of the event of a row, which happens to a relay, among so many."""
    service = Service(relays, row.balancers, row.sticks, row.redispatches)
    until = 2 if row.is_new else 1
    arrivals = make_arrivals(PAIRS * until, until, row.balancers)
    (report,) = simulate(service, arrivals, [Event(1, row.event(relay))])
    return report


def missed_percent(row: Row, relays: int) -> float:
    """Return the part of the clients of a row that miss their partner, in percent."""
    report = run(row, relays, relays + 1 if row.adds else relays)
    if row.is_new:
        return report.new_missed / report.new * 100
    return report.waiting_missed / report.waiting * 100


def busiest(relays: int, weight: int) -> float:
    """Return the share of the busiest relay, as a multiple of the mean."""
    return max(Ring(range(1, relays + 1), weight).shares().values()) * relays


def markdown() -> list[str]:
    """Return the lines of the table."""
    rows = [
        [row.label, *(f"{missed_percent(row, count):.2f} %" for count in COUNTS)] for row in ROWS
    ]
    for weight in (1, WEIGHT):
        label = f"the busiest relay / the mean, weight {weight}"
        rows.append([label, *(f"{busiest(count, weight):.2f}" for count in COUNTS)])
    head = ["of the clients, so many miss their partner", *map("{:,} relays".format, COUNTS)]
    rule = ["---", *["---:"] * len(COUNTS)]
    return [f"| {' | '.join(cells)} |" for cells in (head, rule, *rows)]


if __name__ == "__main__":
    print("\n".join(markdown()))
