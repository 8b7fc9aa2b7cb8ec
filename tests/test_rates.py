"""Rates and the monthly quota: shares with a fake clock, values of options, the table `quota`."""

from __future__ import annotations

import calendar
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from helpers import FakeClock
from test_usage import CURRENT, RECORD, connect, execute, reference_database, rows, shape

from transit_relay import (
    BUCKET_SECONDS,
    LEAST_RATE,
    LEAST_READ_BYTES,
    REFILL_SECONDS,
    RELEASES_PER_TURN,
    RESERVE_SECONDS,
    Pair,
    Quota,
    Rates,
    SinkError,
    StartupError,
    UsageDatabase,
    UsageError,
    parse_arguments,
    parse_rate,
    parse_size,
)

MB = 1_000_000
TICK_SECONDS = 0.004  # a refill is due between two ticks, and is late by a part of one
MAX_READ_BYTES = 256 * 1024
HUNGRY = float("inf")


class Client(Pair):
    """A pair that wants `wanted_rate` bytes per second, in reads of at most `message_bytes`."""

    __slots__ = ("available_bytes", "message_bytes", "read_bytes", "reads", "waits", "wanted_rate")

    def __init__(self, wanted_rate: float, message_bytes: int = MAX_READ_BYTES) -> None:
        self.wanted_rate = wanted_rate  # bytes per second
        self.message_bytes = message_bytes
        self.available_bytes = 0.0
        self.read_bytes = 0
        self.reads = 0
        self.waits = 0
        self.allowance = None
        self.level_used = 0.0


class Line:
    """Clients under a rate, and a loop that reads from those that may be read."""

    def __init__(self, max_rate: float, max_pair_rate: float = 0) -> None:
        self.clock = FakeClock(1_000.0)
        self.rates = Rates(int(max_rate), int(max_pair_rate), self.clock)
        self.clients: list[Client] = []
        self.refills = 0

    def add(
        self, count: int, wanted_rate: float = HUNGRY, message_bytes: int = MAX_READ_BYTES
    ) -> list[Client]:
        """Join new clients."""
        added = [Client(wanted_rate, message_bytes) for _ in range(count)]
        for client in added:
            self.rates.join(client)
        self.clients += added
        return added

    def remove(self, clients: Sequence[Client]) -> None:
        """Let clients leave."""
        for client in clients:
            self.rates.leave(client)
            self.clients.remove(client)

    def turn(self) -> int:
        """Read once from each client that may be read. Return the number of bytes."""
        total = 0
        for client in self.clients:
            wanted = int(min(client.available_bytes, client.message_bytes))
            if not wanted or client.allowance == 0:
                continue
            size = min(wanted, self.rates.limit(client))
            if size:
                self.rates.spend(client, size)
                client.available_bytes -= size
                client.read_bytes += size
                client.reads += 1
            client.waits += client.allowance == 0
            total += size
        return total

    def refill(self) -> None:
        """Refill if it is due. What is returned may be read again."""
        if self.clock() < self.rates.next_due():
            return
        self.refills += 1
        waiting = [client for client in self.clients if client.allowance == 0]
        going_on = self.rates.refill(self.clock())
        assert set(going_on) == {client for client in waiting if client.allowance}
        assert len(going_on) == len(set(going_on))

    def run(self, seconds: float) -> None:
        """Let the time pass."""
        for _ in range(round(seconds / TICK_SECONDS)):
            for client in self.clients:
                client.available_bytes += client.wanted_rate * TICK_SECONDS
            while self.turn():
                pass
            self.clock.advance(TICK_SECONDS)
            while self.clock() >= self.rates.next_due():
                self.refill()
                self.turn()

    def measure(self, seconds: float) -> list[float]:
        """Let the time pass. Return the rate of each client meanwhile (bytes per second)."""
        before = [client.read_bytes for client in self.clients]
        self.run(seconds)
        return [(client.read_bytes - b) / seconds for client, b in zip(self.clients, before)]


# Shares of a rate.


def test_few_pairs_go_on_in_one_turn() -> None:
    """Reads of all pairs in one turn would delay a message. The other pairs are due at once."""
    line = Line(20 * MB)
    pairs = line.add(100)
    line.run(1)
    line.clock.advance(REFILL_SECONDS)
    steps = []
    while line.clock() >= line.rates.next_due():
        steps.append(line.rates.refill(line.clock()))
        assert all(pair.allowance for pair in steps[-1])
    turns, rest = divmod(len(pairs), RELEASES_PER_TURN)
    assert [len(step) for step in steps] == [RELEASES_PER_TURN] * turns + [rest]
    assert {pair for step in steps for pair in step} == {*pairs}


def test_a_pair_that_leaves_before_its_turn_is_forgotten() -> None:
    line = Line(20 * MB)
    line.add(100)
    line.run(1)
    line.clock.advance(REFILL_SECONDS)
    first = line.rates.refill(line.clock())
    line.remove([client for client in line.clients if client not in first])
    assert line.rates.refill(line.clock()) == []
    assert line.rates.next_due() == line.clock() + REFILL_SECONDS


@pytest.mark.parametrize("max_rate", [10_000, 1 * MB, 20 * MB, 1000 * MB])
@pytest.mark.parametrize("count", [1, 8, 200])
def test_hungry_pairs_have_equal_shares(count: int, max_rate: int) -> None:
    line = Line(max_rate)
    line.add(count)
    measured = line.measure(10)
    assert sum(measured) == pytest.approx(max_rate, rel=0.01)
    # Two reads of the least size, where that is more than 2 %: pairs take turns.
    one_turn = 2 * min(LEAST_READ_BYTES, max_rate * REFILL_SECONDS / 2) / 10
    even = max_rate / count
    assert measured == pytest.approx([even] * count, rel=0.02, abs=one_turn)


def test_hungry_pairs_that_begin_together_after_a_pause() -> None:
    line = Line(20 * MB)
    line.clock.advance(3600)
    line.add(200)
    measured = line.measure(10)
    assert measured == pytest.approx([0.1 * MB] * 200, rel=0.03)
    assert sum(measured) <= 20 * MB * (10 + BUCKET_SECONDS) / 10


def test_pairs_that_want_less_get_all_and_the_others_divide_the_rest() -> None:
    line = Line(10 * MB)
    bulk = line.add(4)
    small = line.add(20, 0.1 * MB, message_bytes=1_400)
    measured = line.measure(10)
    assert measured[:4] == pytest.approx([2 * MB] * 4, rel=0.02)
    assert measured[4:] == pytest.approx([0.1 * MB] * 20, rel=0.01)
    assert all(client.waits for client in bulk)
    assert not any(client.waits for client in small)


def test_a_demand_just_below_the_share_of_the_others() -> None:
    line = Line(10 * MB)
    line.add(1)
    line.add(1, 4.5 * MB)
    line.add(1, 0.5 * MB)
    line.run(1)
    assert line.measure(10) == pytest.approx([5 * MB, 4.5 * MB, 0.5 * MB], rel=0.02)


@pytest.mark.parametrize(("bulk", "max_rate"), [(1, 20 * MB), (8, 20 * MB), (200, 5 * MB)])
def test_an_interactive_pair_never_waits(bulk: int, max_rate: int) -> None:
    line = Line(max_rate)
    line.add(bulk)
    line.run(1)
    often, seldom = line.add(1, 16_000, 64) + line.add(1, 640, 640)
    line.run(10)
    assert (often.waits, seldom.waits) == (0, 0)
    assert often.read_bytes == pytest.approx(160_000, rel=0.01)
    assert seldom.read_bytes == pytest.approx(6_400, rel=0.2)


def test_a_burst_within_the_share_does_not_wait() -> None:
    """Alone, a pair may read what the rate allows between two refills."""
    line = Line(10 * MB)
    (client,) = line.add(1, 0)
    for _ in range(10):
        client.available_bytes += 400_000
        line.run(1)
    assert (client.read_bytes, client.waits) == (4 * MB, 0)


def test_what_one_pair_leaves_others_get_in_the_next_refill() -> None:
    line = Line(10 * MB)
    one, _ = line.add(2)
    line.run(1)
    one.available_bytes = one.wanted_rate = 0
    line.run(2 * REFILL_SECONDS)  # what it may read was divided before
    assert line.measure(5)[1] == pytest.approx(10 * MB, rel=0.02)


def test_small_and_large_reads_get_the_same_share() -> None:
    line = Line(1 * MB)
    for message_bytes in (1_400, 5_000, 16_400, MAX_READ_BYTES):
        line.add(2, message_bytes=message_bytes)
    line.run(1)
    assert line.measure(10) == pytest.approx([1 * MB / 8] * 8, rel=0.02)


def test_pairs_come_and_go() -> None:
    line = Line(20 * MB)
    line.add(8)
    assert line.measure(5) == pytest.approx([2.5 * MB] * 8, rel=0.02)
    line.remove(line.clients[::2])
    assert line.measure(5) == pytest.approx([5 * MB] * 4, rel=0.02)
    line.add(12)
    assert line.measure(5) == pytest.approx([1.25 * MB] * 16, rel=0.03)
    for _ in range(200):  # a new pair in each interval, for one interval
        line.remove(line.clients[:1])
        line.add(1)
        line.run(REFILL_SECONDS)
    assert sum(client.read_bytes for client in line.clients) <= 30 * MB
    line.remove(tuple(line.clients))
    assert line.rates.next_due() == float("inf")


# Both rates.


@pytest.mark.parametrize("pair_rate", [2_000, 100_000, 1 * MB, 100 * MB])
@pytest.mark.parametrize("count", [1, 20])
def test_the_rate_of_each_pair(count: int, pair_rate: int) -> None:
    line = Line(0, pair_rate)
    line.add(count)
    measured = line.measure(20)
    assert measured == pytest.approx([pair_rate] * count, rel=0.02)


@pytest.mark.parametrize(("count", "each"), [(5, 1 * MB), (10, 1 * MB), (20, 0.5 * MB)])
def test_the_lower_of_both_rates_holds(count: int, each: float) -> None:
    line = Line(10 * MB, 1 * MB)
    line.add(count)
    line.run(1)
    assert line.measure(10) == pytest.approx([each] * count, rel=0.02)


def test_pairs_at_their_own_rate_leave_the_rest_to_nobody() -> None:
    line = Line(10 * MB, 2 * MB)
    line.add(3)
    line.add(10, 0.3 * MB)
    line.run(1)
    assert line.measure(10) == pytest.approx([2 * MB] * 3 + [0.3 * MB] * 10, rel=0.02)


def test_a_pair_rate_allows_the_bytes_of_the_bucket_at_once() -> None:
    line = Line(0, 1 * MB)
    (client,) = line.add(1, 0)
    for expected_waits in (0, 0, 1):
        client.waits = 0
        client.available_bytes += 240_000 * (1 + expected_waits)
        line.run(1)
        assert bool(client.waits) == bool(expected_waits)
    assert client.read_bytes == 960_000


# Bursts.


@pytest.mark.parametrize("seconds", [0.2, 1, 3600])
def test_a_suspension_makes_no_burst(seconds: float) -> None:
    line = Line(10 * MB)
    line.add(8)
    line.run(1)
    line.clock.advance(seconds)
    line.refill()
    burst = sum(iter(line.turn, 0))
    assert burst <= 10 * MB * (BUCKET_SECONDS - RESERVE_SECONDS)
    assert burst >= 10 * MB * min(seconds, BUCKET_SECONDS) / 2


def test_late_refills_cost_nothing() -> None:
    line = Line(10 * MB)
    line.add(8)
    line.run(1)
    read = 0
    for _ in range(100):
        line.clock.advance(0.1)
        line.refill()
        read += sum(iter(line.turn, 0))
    assert read == pytest.approx(10 * MB * 10, rel=0.01)


def test_many_idle_pairs_that_begin_at_once_make_no_burst() -> None:
    line = Line(10 * MB)
    line.add(10_000)
    line.clock.advance(60)
    for client in line.clients:
        client.available_bytes = 100_000
    total = sum(iter(line.turn, 0))
    assert 0 < total <= 10 * MB * BUCKET_SECONDS


def test_small_readers_that_all_want_more_at_once_make_no_burst() -> None:
    """Each of them may read a whole share, but all together no more than the bucket has."""
    line = Line(10 * MB)
    line.add(20, 10_000)
    line.run(1)
    for client in line.clients:
        client.available_bytes = 450_000
    total = sum(iter(line.turn, 0))
    assert 10 * MB * RESERVE_SECONDS < total <= 10 * MB * BUCKET_SECONDS


def test_a_pair_rate_saves_nothing_beyond_the_bucket() -> None:
    line = Line(0, 1 * MB)
    (client,) = line.add(1, 1_000)
    line.run(2)
    line.clock.advance(60)
    line.refill()
    client.available_bytes = 50 * MB
    line.run(0.2)
    assert 1 * MB * 0.2 < client.read_bytes - 2_000 <= 1 * MB * (BUCKET_SECONDS + 0.2)


# The cost.


class CountedClient(Client):
    """Counts how often it is used: as the key of a dict, and each attribute."""

    __slots__ = ()
    uses = 0

    def __hash__(self) -> int:
        CountedClient.uses += 1
        return id(self)

    def __getattribute__(self, name: str) -> object:
        CountedClient.uses += 1
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: object) -> None:
        CountedClient.uses += 1
        super().__setattr__(name, value)


def test_idle_pairs_cost_nothing() -> None:
    line = Line(10 * MB)
    idle = [CountedClient(0) for _ in range(10_000)]
    for client in idle:
        line.rates.join(client)
        line.rates.spend(client, min(100, line.rates.limit(client)))
    line.add(8)
    line.run(3 * REFILL_SECONDS)  # now they have been quiet for a whole interval
    CountedClient.uses = 0
    refills = line.refills
    line.run(1)
    assert line.refills >= refills + 18
    assert CountedClient.uses == 0
    assert {client.allowance for client in idle} == {LEAST_READ_BYTES}


def test_a_pair_that_leaves_costs_the_others_nothing() -> None:
    line = Line(10 * MB)
    waiting = [CountedClient(HUNGRY) for _ in range(1_000)]
    line.clients += waiting
    for client in waiting:
        line.rates.join(client)
    line.run(0.2)
    line.remove(line.add(1))
    leaver = waiting[500]
    CountedClient.uses = 0
    line.rates.leave(leaver)
    assert CountedClient.uses < 20


def test_without_a_rate_nothing_is_limited_and_no_refill_is_due() -> None:
    line = Line(0)
    (client,) = line.add(1)
    assert client.allowance is None
    assert line.rates.next_due() == float("inf")


def test_no_refill_is_due_while_nobody_reads() -> None:
    line = Line(10 * MB)
    (client,) = line.add(1, 0)
    assert line.rates.next_due() == float("inf")
    client.available_bytes = 100
    line.run(2 * REFILL_SECONDS)
    assert line.refills == 1
    line.run(1)
    assert (line.refills, line.rates.next_due()) == (2, float("inf"))


def test_reads_have_the_least_size_even_if_shares_are_smaller() -> None:
    line = Line(0.2 * MB)
    line.add(400)
    line.run(10)
    reads = [client.reads for client in line.clients]
    assert sum(reads) <= 1.05 * 2 * MB / LEAST_READ_BYTES
    assert max(reads) - min(reads) == 1  # in turns


def test_a_waiting_pair_has_no_allowance_and_keeps_its_place() -> None:
    line = Line(1 * MB)
    waiting = []
    for client in 3 * line.add(100):
        if client.allowance:
            line.rates.spend(client, line.rates.limit(client))
            waiting += [client] * (client.allowance == 0)
    assert set(waiting) == set(line.clients)
    assert [line.rates.limit(client) for client in waiting] == [0] * len(waiting)
    line.clock.advance(REFILL_SECONDS)
    going_on = line.rates.refill(line.clock())
    assert going_on and going_on == waiting[: len(going_on)]


# A change while pairs run.


def test_rates_can_change() -> None:
    line = Line(0)
    line.add(4)
    for rates, each in [((4 * MB, 0), 1 * MB), ((8 * MB, 0), 2 * MB), ((8 * MB, MB), 1 * MB)]:
        line.rates.change(*rates)
        for client in line.clients:
            line.rates.join(client)
        assert line.measure(10) == pytest.approx([each] * 4, rel=0.03)
    line.rates.change(0, 0)
    for client in line.clients:
        line.rates.join(client)
    assert [client.allowance for client in line.clients] == [None] * 4
    assert line.rates.next_due() == float("inf")


# The values of options.


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("0B", 0),
        ("0.0MB", 0),
        ("1000", 1_000),
        ("1000B", 1_000),
        ("1000 bytes", 1_000),
        ("1byte", 1),
        ("500kB", 500_000),
        ("500KB", 500_000),
        ("500 kB", 500_000),
        ("500kbyte", 500_000),
        ("12.5MB", 12_500_000),
        ("12.5mB", 12_500_000),
        ("2GB", 2 * 10**9),
        ("2gB", 2 * 10**9),
        ("20TB", 20 * 10**12),
        ("1KiB", 1_024),
        ("1kiB", 1_024),
        ("1.5MiB", 3 << 19),
        ("2GiB", 2 << 30),
        ("1TiB", 1 << 40),
        ("100Mbit", 12_500_000),
        ("100mbit", 12_500_000),
        ("1Gbit", 125_000_000),
        ("80000bit", 10_000),
        ("0.3kB", 300),
        ("1000.000000001", 1_001),  # rounded up
        ("0.1B", 1),  # not 0, which switches the limit off
        ("1bit", 1),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert isinstance(parse_size(text), int)


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("0", 0),
        ("0/s", 0),
        ("1000", 1_000),
        ("1kB/s", 1_000),
        ("12.5MB/s", 12_500_000),
        ("100Mbit/s", 12_500_000),
        ("8kbit", 1_000),
        ("1 GiB/s", 1 << 30),
    ],
)
def test_rates(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


NO_SIZES = [
    *("", " ", "B", "kB", "MB/s", ".5MB", "5.MB", "1.2.3MB", "1,5MB", "1e6", "1_000", "+1MB"),
    *("-1MB", " 1MB", "1MB ", "1 ", "1  MB", "1MB\n", "\u0661MB", "\u00b2MB", "0x10", "inf", "nan"),
    *("10Mb", "10mb", "10M", "10k", "10Mbps", "10MBps", "10Mb/s", "10kib", "10iB", "10PB"),
    *("1MB/S", "1MB/h", "1MB/s/s", "1MBit", "9" * 16, "1.0123456789MB"),
]


@pytest.mark.parametrize("text", [*NO_SIZES, "1MB/s"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_size(text)
    assert str(error.value).startswith(repr(text)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", [*NO_SIZES, "1", "999", "999B/s", "1bit", "7kbit", "0.1kB"])
def test_what_is_no_rate(text: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_rate(text)
    assert "\n" not in str(error.value)
    assert LEAST_RATE == 1_000


OPTIONS = ["--max-rate=1MB/s", "--max-pair-rate=100kB", "--monthly-quota=2TB", "--quota-rate=1kB"]


def test_options() -> None:
    options = parse_arguments([*OPTIONS, "--usage-db=db"])
    assert (options.max_rate, options.max_pair_rate) == (10**6, 10**5)
    assert (options.monthly_quota, options.quota_rate) == (2 * 10**12, 1_000)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (OPTIONS, "--monthly-quota: it needs --usage-db"),
        (["--monthly-quota=1B"], "--monthly-quota: it needs --usage-db"),
        (["--quota-rate=1MB"], "--quota-rate: it needs --monthly-quota"),
        (["--quota-rate=1MB", "--usage-db=db"], "--quota-rate: it needs --monthly-quota"),
        (["--max-rate=1"], "--max-rate: '1' is too small: it must be 0 or at least 1 kB"),
        (["--max-pair-rate=1MB/"], "--max-pair-rate: '1MB/' is not a number of B, kB, MB, "),
    ],
)
def test_wrong_options(
    arguments: list[str], error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_arguments(arguments)
    message = capsys.readouterr().err
    assert exit_.value.code == 2
    assert f"argument {error}" in message and message.count("\n") == 1


def test_zero_switches_an_option_off() -> None:
    zeros = [option.partition("=")[0] + "=0" for option in OPTIONS]
    assert vars(parse_arguments(zeros)) == vars(parse_arguments([]))


# The quota: counting.


def at(text: str) -> FakeClock:
    """Return a wall clock that stands at a time in UTC: `2026-11-30 23:59`."""
    date, _, hour = text.partition(" ")
    numbers = [int(number) for number in [*date.split("-"), *hour.split(":")]]
    return FakeClock(calendar.timegm((*numbers, 0, 0, 0, 0)))


def test_the_bytes_of_a_month_are_counted() -> None:
    quota = Quota(1_000_000, at("2026-11-28 10:00"))
    assert quota.row() == ("2026-11", 0)
    for relayed in (0, 5, 5, 1_234):
        quota.count(relayed)
    assert quota.row() == ("2026-11", 1_234)


def test_a_month_begins_at_midnight_of_utc() -> None:
    clock = at("2026-11-30 23:59")
    quota = Quota(1_000, clock)
    quota.count(900)
    clock.advance(59.9)
    quota.count(1_000)
    assert (quota.row(), quota.is_used_up) == (("2026-11", 1_000), True)
    clock.advance(0.1)
    assert quota.count(1_000) == []
    assert (quota.row(), quota.is_used_up) == (("2026-12", 0), False)
    clock.advance(31 * 86_400)
    quota.count(1_007)
    assert quota.row() == ("2027-01", 7)


def test_thresholds_are_reported_once_in_a_month() -> None:
    clock = at("2026-11-28 10:00")
    quota = Quota(1_000, clock)
    reported = [quota.count(n) for n in (799, 800, 801, 949, 950, 999, 1_000, 1_001, 5_000)]
    assert reported == [[], [80], [], [], [95], [], [100], [], []]
    clock.advance(5 * 86_400)
    assert quota.count(5_799) == []
    assert quota.count(6_000) == [80, 95, 100]


def test_thresholds_are_reported_again_after_a_reload_that_raised_the_quota() -> None:
    clock = at("2026-11-28 10:00")
    quota = Quota(1_000, clock)
    assert quota.count(1_000) == [80, 95, 100]
    raised = Quota(2_000, clock)
    raised.resume(quota.place())
    assert [raised.count(n) for n in (1_000, 1_600, 1_899, 2_000)] == [[], [80], [], [95, 100]]


def test_it_is_used_up_at_its_last_byte() -> None:
    quota = Quota(1_000, at("2026-11-28 10:00"))
    quota.count(999)
    assert not quota.is_used_up
    quota.count(1_000)
    assert quota.is_used_up


def test_a_clock_that_goes_back_reopens_no_month() -> None:
    clock = at("2026-12-01 00:10")
    quota = Quota(1_000, clock)
    quota.count(100)
    clock.advance(-86_400)
    quota.count(150)
    assert quota.row() == ("2026-12", 150)
    clock.advance(86_400)
    quota.count(151)
    assert quota.row() == ("2026-12", 151)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (None, ("2026-11", 15)),
        (("2026-10", 1_000), ("2026-11", 15)),
        (("2026-11", 1_000), ("2026-11", 1_015)),
        (("2026-12", 1_000), ("2026-12", 1_015)),  # the clock went back before this start
    ],
)
def test_a_row_that_is_loaded_late_is_added(
    stored: tuple[str, int] | None, expected: tuple[str, int]
) -> None:
    quota = Quota(10_000, at("2026-11-28 10:00"))
    quota.count(10)
    quota.load(stored)
    quota.count(15)
    quota.load(("2026-11", 14))  # the relay's own row, which it wrote before
    assert quota.row() == expected


def test_each_field_is_carried_or_made_anew() -> None:
    fields = set(vars(Quota(1)))
    assert fields == {*Quota.CARRIED, "_max_bytes", "_wallclock"}


# The quota: its table.

NOVEMBER = "2026-11-28 10:00"


_opened: list[UsageDatabase] = []


@pytest.fixture(autouse=True)
def _close_databases() -> Iterator[None]:
    """Close what `relay_of` opens, also for a relay that was killed."""
    yield
    while _opened:
        _opened.pop().close()


def relay_of(
    path: Path, time: str = NOVEMBER, max_bytes: int = 10**6
) -> tuple[Quota, UsageDatabase]:
    """Start a relay's sink, as `open_relay` does."""
    quota = Quota(max_bytes, at(time))
    sink = UsageDatabase(str(path), quota)
    _opened.append(sink)
    sink.prepare()
    return quota, sink


def test_the_table_is_the_only_addition(tmp_path: Path) -> None:
    path = reference_database(tmp_path / "db")
    before = shape(path)
    quota, sink = relay_of(path)
    assert shape(path) == before  # `prepare` rolls its write back
    quota.count(1_234)
    sink.write([RECORD], CURRENT)
    sink.close()
    after = shape(path)
    (added,) = set(after) - set(before)
    assert added == "table quota of quota"
    assert {name: after[name] for name in before} == before
    assert rows(path, "quota") == [("2026-11", 1_234)]
    assert rows(path, "version") == [(1,)]
    assert len(rows(path, "usage")) == 2 and rows(path, "current") == [tuple(CURRENT)]


def test_without_the_option_there_is_no_table(tmp_path: Path) -> None:
    path = reference_database(tmp_path / "db")
    before = shape(path)
    sink = UsageDatabase(str(path))
    sink.prepare()
    sink.write([RECORD], CURRENT)
    sink.close()
    assert shape(path) == before


def test_without_the_option_an_existing_table_stays(tmp_path: Path) -> None:
    path = reference_database(tmp_path / "db")
    quota, sink = relay_of(path)
    quota.count(7)
    sink.write((), CURRENT)
    sink.close()
    sink = UsageDatabase(str(path))
    sink.prepare()
    sink.write([RECORD], CURRENT)
    sink.close()
    assert rows(path, "quota") == [("2026-11", 7)]


def test_a_restart_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for total in (800, 1_600, 2_400):
        quota, sink = relay_of(path, max_bytes=1_000)
        assert quota.row() == ("2026-11", total - 800)
        assert quota.is_used_up == (total > 1_800)
        reached = quota.count(800)
        assert reached == ([80] if total == 800 else [80, 95, 100])  # again, for the new log
        sink.write((), CURRENT)
        sink.close()
        assert rows(path, "quota") == [("2026-11", total)]


def test_each_month_has_a_row(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for time in ("2026-11-30 10:00", "2026-12-01 10:00", "2027-01-01 00:00", "2026-12-31 23:59"):
        quota, sink = relay_of(path, time)
        quota.count(5)
        sink.write((), CURRENT)
        sink.close()
    # The last start was by a clock that had gone back.
    assert rows(path, "quota") == [("2026-11", 5), ("2026-12", 5), ("2027-01", 10)]


def test_a_kill_forgets_what_was_counted_since_the_last_write(tmp_path: Path) -> None:
    path = tmp_path / "db"
    quota, sink = relay_of(path)
    quota.count(1_000)
    sink.write((), CURRENT)
    quota.count(1_500)
    del sink  # no write at the end
    assert relay_of(path)[0].row() == ("2026-11", 1_000)


def test_it_is_written_with_records_too(tmp_path: Path) -> None:
    quota, sink = relay_of(tmp_path / "db")
    quota.count(1_000)
    sink.write([RECORD], None)
    assert rows(tmp_path / "db", "quota") == [("2026-11", 1_000)]
    sink.close()


@pytest.mark.parametrize("when", ["at the start", "later"])
def test_a_locked_database(tmp_path: Path, when: str) -> None:
    path = tmp_path / "db"
    quota, sink = relay_of(path)
    quota.count(1_000)
    sink.write((), CURRENT)
    sink.close()
    with connect(path) as other:
        if when == "at the start":
            other.execute("BEGIN EXCLUSIVE")
        quota, sink = relay_of(path)
        if when == "later":
            other.execute("BEGIN EXCLUSIVE")
        quota.count(10)
        with pytest.raises(SinkError, match="locked"):
            sink.write((), CURRENT)
        quota.count(20)
        other.execute("COMMIT")
    sink.write((), CURRENT)
    assert rows(path, "quota") == [("2026-11", 1_020)] and quota.row() == ("2026-11", 1_020)
    quota.count(30)
    sink.write((), CURRENT)
    sink.close()
    assert rows(path, "quota") == [("2026-11", 1_030)]


def test_a_failed_transaction_counts_nothing_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"
    execute(path, "")
    quota, sink = relay_of(path)
    sink.write((), CURRENT)
    quota.count(10)
    with connect(path) as other:
        fail = "SELECT raise(ABORT, 'no')"
        other.execute(f"CREATE TRIGGER no BEFORE INSERT ON quota BEGIN {fail}; END")
        for _ in range(2):
            with pytest.raises(SinkError):
                sink.write([RECORD], CURRENT)
        other.execute("DROP TRIGGER no")
    sink.write([RECORD], CURRENT)
    sink.close()
    assert rows(path, "quota") == [("2026-11", 10)] and len(rows(path, "usage")) == 1


def test_a_deleted_database_is_recreated_with_the_quota(tmp_path: Path) -> None:
    path = tmp_path / "db"
    for _ in range(2):
        quota, sink = relay_of(path)
        quota.count(500)
        sink.write((), CURRENT)
    os.unlink(path)
    quota.count(600)
    sink.write((), CURRENT)
    sink.close()
    assert rows(path, "quota") == [("2026-11", 1_100)]


def test_another_database_that_has_more_is_continued(tmp_path: Path) -> None:
    """As after a reload that has changed --usage-db: what is counted is not lowered."""
    for count, (month, size) in {
        1_500: ("2026-11", 1_000),
        900: ("2026-11", 800),
        1: ("2026-10", 9_000),
    }.items():
        path = tmp_path / f"db{count}"
        quota, sink = relay_of(path)
        sink.write((), CURRENT)
        quota.count(700)
        execute(path, "DELETE FROM quota")
        execute(path, f"INSERT INTO quota VALUES ('{month}', {size})")
        sink.write((), CURRENT)
        expected = max(700, size) if month == "2026-11" else 700
        assert rows(path, "quota")[-1] == quota.row() == ("2026-11", expected)
        quota.count(750)
        sink.write((), CURRENT)
        sink.close()
        assert rows(path, "quota")[-1] == ("2026-11", expected + 50)


def test_rows_that_are_not_ours_are_ignored(tmp_path: Path) -> None:
    path = reference_database(tmp_path / "db", "CREATE TABLE quota (month, bytes);")
    ignored = ("'9999', 1", "'zz', 2", "NULL, 3", "'2026-12', 'x'")
    damaged = (f"'2026-11', {2**63 - 1}", "'2026-12', -1")
    for values in (*ignored, *damaged, "'2026-11', 4"):
        execute(path, f"INSERT INTO quota VALUES ({values})")
    quota, sink = relay_of(path)
    quota.count(1)
    sink.write((), CURRENT)
    sink.close()
    assert rows(path, "quota")[-1] == ("2026-11", 5)


def test_another_table_of_that_name_refuses_the_start(tmp_path: Path) -> None:
    path = reference_database(tmp_path / "db", "CREATE TABLE quota (user, space);")
    before = path.read_bytes()
    with pytest.raises(StartupError) as error:
        relay_of(path)
    assert str(error.value) == f"--usage-db {path}: no such column: month"
    assert path.read_bytes() == before


# What the Munin plugins of the Twisted relay ask.
QUERIES = [
    "SELECT rebooted, updated, connected, waiting, incomplete_bytes FROM current LIMIT 1",
    "SELECT COUNT() FROM usage WHERE started > 0 AND result = 'happy'",
    "SELECT SUM(total_bytes) FROM usage",
    "SELECT version FROM version",
]


@pytest.mark.parametrize("query", QUERIES)
def test_programs_for_the_database_go_on_working(tmp_path: Path, query: str) -> None:
    found = []
    for has_quota in (False, True):
        path = reference_database(tmp_path / f"db{has_quota}")
        sink = relay_of(path)[1] if has_quota else UsageDatabase(str(path))
        sink.write([RECORD], CURRENT)
        sink.close()
        with connect(path) as db:
            found.append(list(db.execute(query)))
    assert found[0] == found[1] != []
