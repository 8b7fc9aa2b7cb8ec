"""Rates and the monthly quota in a whole relay, with a clock that the test moves."""

from __future__ import annotations

import copy
import logging
import socket

import pytest
from helpers import DIRECTIONS, Client, Loop, handshake

from transit_relay import Limits, Quota

BOTH_WAYS = True  # copied and spliced, see conftest.py
STEP_SECONDS = 0.05


class Flow:
    """A pair in which one client sends without end and the other reads all."""

    def __init__(self, loop: Loop, kinds: tuple[str, str]) -> None:
        self.sender, self.receiver = loop.meet(*kinds)
        (self.wire,) = self.sender.encode(bytes(1 << 15))
        self.rest = memoryview(b"")
        self.received = 0
        for client in (self.sender, self.receiver):
            client.sock.setblocking(False)

    def send(self) -> None:
        """Send as much as the kernel accepts."""
        try:
            while True:
                self.rest = self.rest or memoryview(self.wire)
                self.rest = self.rest[self.sender.sock.send(self.rest) :]
        except (BlockingIOError, BrokenPipeError):
            pass

    def read(self) -> None:
        """Read all that has come, and count the bytes on the wire."""
        try:
            while part := self.receiver.sock.recv(1 << 20):
                self.received += len(part)
        except BlockingIOError:
            pass


def run(loop: Loop, flows: list[Flow], seconds: float) -> None:
    """Let the flows send and read for this time."""
    for _ in range(round(seconds / STEP_SECONDS)):
        for flow in flows:
            flow.send()
        loop.advance(STEP_SECONDS)  # the last turn of it refills the allowances
        loop.pump()
        for flow in flows:
            flow.read()


def rates(loop: Loop, flows: list[Flow], seconds: float) -> list[float]:
    """Return the bytes per second that each receiver gets, after a second in which they begin."""
    run(loop, flows, 1)
    before = [flow.received for flow in flows]
    run(loop, flows, seconds)
    return [(flow.received - old) / seconds for flow, old in zip(flows, before)]


def test_a_rate_for_all_is_divided_evenly(loop: Loop) -> None:
    loop.restart(limits=Limits(max_rate=2_000_000, stall_seconds=0))
    flows = [Flow(loop, kinds) for kinds in DIRECTIONS]
    found = rates(loop, flows, 4)
    assert 0.95 * 2_000_000 <= sum(found) <= 1.05 * 2_000_000, found
    assert min(found) >= 0.9 * max(found), found


def test_a_rate_for_each_pair(loop: Loop) -> None:
    loop.restart(limits=Limits(max_pair_rate=500_000, stall_seconds=0))
    flows = [Flow(loop, kinds) for kinds in DIRECTIONS]
    for rate in rates(loop, flows, 4):
        assert 0.95 * 500_000 <= rate <= 1.05 * 500_000


def test_a_pair_that_wants_little_is_not_slowed(loop: Loop) -> None:
    """What it leaves is divided among the others."""
    loop.restart(limits=Limits(max_rate=1_000_000, stall_seconds=0))
    flows = [Flow(loop, ("unix", "unix")) for _ in range(3)]
    one, other = loop.meet("unix", "ws-unix", "quiet")
    run(loop, flows, 1)
    for number in range(40):
        for flow in flows:
            flow.send()
        message = b"%063d\n" % number
        one.send(message)
        assert other.receive(64) == message  # without a refill: the clock stands still
        loop.advance(STEP_SECONDS)
        for flow in flows:
            flow.read()
    found = rates(loop, flows, 3)
    assert 0.93 * 1_000_000 <= sum(found) <= 1.05 * 1_000_000


@pytest.mark.parametrize("limits", [Limits(max_rate=1_000_000), Limits(max_pair_rate=1_000_000)])
def test_both_directions_of_a_pair_get_their_parts(loop: Loop, limits: Limits) -> None:
    """Also the one whose last read was bulk, when the share of a refill is smaller than that."""
    loop.restart(limits=limits._replace(stall_seconds=0))
    flow = Flow(loop, ("unix", "unix"))
    back = copy.copy(flow)
    back.sender, back.receiver = flow.receiver, flow.sender
    flow.sender.sock.send(bytes(100_000))
    loop.advance(STEP_SECONDS)
    flow.read()
    loop.advance(1)
    run(loop, [back], 6 * STEP_SECONDS)
    found = rates(loop, [flow, back], 3)
    assert 0.95 * 1_000_000 <= sum(found) <= 1.05 * 1_000_000, found
    assert min(found) >= 0.8 * max(found), found


@pytest.mark.parametrize("bulk_from_newcomer", [False, True])
@pytest.mark.parametrize("limits", [Limits(max_rate=500_000), Limits(max_pair_rate=500_000)])
def test_the_other_direction_of_a_pair_is_not_starved(
    loop: Loop, limits: Limits, bulk_from_newcomer: bool
) -> None:
    loop.restart(limits=limits._replace(stall_seconds=0))
    flow = Flow(loop, ("unix", "unix"))
    if bulk_from_newcomer:
        flow.sender, flow.receiver = flow.receiver, flow.sender
    run(loop, [flow], 1)
    arrived = b""
    for number in range(40):
        try:
            flow.receiver.sock.send(b"%099d\n" % number)
        except BlockingIOError:
            pass
        run(loop, [flow], STEP_SECONDS)
        try:
            arrived += flow.sender.sock.recv(1 << 16)
        except BlockingIOError:
            pass
    assert len(arrived) >= 30 * 100
    flow.receiver.sock.shutdown(socket.SHUT_WR)
    run(loop, [flow], 1)
    assert loop.server.snapshot().pairs_ended == 1 or not flow.sender.conn.session.pair


def test_all_bytes_arrive_under_a_rate(loop: Loop) -> None:
    loop.restart(limits=Limits(max_rate=300_000, stall_seconds=0))
    one, other = loop.meet("tcp", "unix")
    data = bytes(range(256)) * 1_000
    sent, got = memoryview(data), b""
    one.sock.setblocking(False)
    other.sock.setblocking(False)
    for _ in range(200):
        if sent:
            try:
                sent = sent[one.sock.send(sent) :]
            except BlockingIOError:
                pass
            if not sent:
                one.close()
        loop.advance(STEP_SECONDS)
        try:
            got += other.sock.recv(1 << 20)
        except BlockingIOError:
            pass
    assert got == data
    assert loop.recorder.records[0].total_bytes == len(data)


def test_the_loop_rests_while_pairs_wait(loop: Loop) -> None:
    loop.restart(limits=Limits(max_rate=100_000, stall_seconds=0))
    flow = Flow(loop, ("unix", "unix"))
    run(loop, [flow], 1)
    flow.send()
    loop.pump()
    assert 0 < loop.server._timeout() <= STEP_SECONDS
    assert loop.server._selector is not None and not loop.server._selector.select(0)


def test_without_a_rate_no_pair_has_an_allowance(loop: Loop) -> None:
    loop.meet("unix", "unix")
    (pair,) = loop.server.rendezvous.pairs
    assert pair.allowance is None and loop.server.rates.next_due() == float("inf")


# The quota.


def restart(loop: Loop, quota: Quota, limits: Limits) -> None:
    """Restart the relay with a quota."""
    loop.restart(limits=limits, quota=quota)


def transfer(loop: Loop, size: int, token: str) -> tuple[Client, Client]:
    """Return a pair that has relayed `size` bytes."""
    one, other = loop.meet("unix", "unix", token)
    one.send(bytes(size))
    assert other.receive(size) == bytes(size)
    return one, other


def test_when_the_quota_is_used_up_newcomers_are_refused(
    loop: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    """Waiting clients are closed, and running pairs go on."""
    quota = Quota(100_000, loop.wallclock)
    restart(loop, quota, Limits(stall_seconds=0))
    one, other = transfer(loop, 90_000, "first")
    waits = loop.client("unix")
    waits.send(handshake("waits"))
    loop.advance(5)
    assert [record.getMessage() for record in caplog.records] == [
        "80 % of the monthly quota is used"
    ]
    one.send(bytes(10_000))
    assert other.receive(10_000) == bytes(10_000)
    loop.advance(5)
    assert [record.getMessage() for record in caplog.records][1:] == [
        "95 % of the monthly quota is used",
        "100 % of the monthly quota is used",
    ]
    assert waits.read_to_end() == b""
    assert loop.recorder.moods() == ["lonely"]
    newcomer = loop.client("unix")
    newcomer.send(handshake("new"))
    assert newcomer.read_to_end() == b"quota used up\n"
    assert loop.recorder.moods() == ["lonely", "lonely"]
    one.send(b"the rest")
    assert other.receive(8) == b"the rest"
    assert loop.server.limits.reached.counts == {"--monthly-quota": 2}
    loop.wallclock.advance(31 * 86_400)  # another month
    loop.advance(5)
    again = loop.client("unix")
    again.send(handshake("again"))
    loop.pump()
    assert loop.server.rendezvous.waiting_clients == 1


def test_a_waiting_websocket_is_told_to_come_back(loop: Loop) -> None:
    restart(loop, Quota(1_000, loop.wallclock), Limits(stall_seconds=0))
    waits = loop.client("ws-unix")
    waits.send(handshake("waits"))
    transfer(loop, 2_000, "first")
    loop.advance(5)
    assert waits.read_to_end(1013) == b""


def test_a_stop_counts_the_last_bytes(loop: Loop) -> None:
    quota = Quota(1_000_000, loop.wallclock)
    restart(loop, quota, Limits(stall_seconds=0))
    loop.advance(5)
    transfer(loop, 2_000, "first")
    assert quota.row()[1] == 0
    loop.server.ending.stop()
    for _ in range(20):
        loop.advance(1)
    assert quota.row()[1] == 2_000


def test_with_a_quota_rate_pairs_are_slowed(loop: Loop, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL)
    quota = Quota(10_000_000, loop.wallclock)
    restart(loop, quota, Limits(quota_rate=200_000, stall_seconds=0))
    flow = Flow(loop, ("unix", "unix"))
    run(loop, [flow], 6)
    assert flow.received > 10_000_000
    (found,) = rates(loop, [flow], 4)
    assert 0.95 * 200_000 <= found <= 1.05 * 200_000
    loop.wallclock.advance(31 * 86_400)
    run(loop, [flow], 6)
    before = flow.received
    run(loop, [flow], 1)
    assert flow.received - before > 1_000_000
