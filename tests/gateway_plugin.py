"""A pytest plugin: a gateway is in front of each relay, so that the tests of pairs run over it.

`helpers.Loop` becomes a gateway and the relay behind it, whose clients are the gateway's.
`helpers.RelayProcess` becomes two processes. What tests read of `loop.server` and of connections is
the gateway's. The records are those of the relay behind, and of clients that are not forwarded.

With RELAY_GATEWAY_LISTED=1, the tests of NOT_FOR_GATEWAYS run instead of the others. Each of them
must fail. A failed test may leave sockets open. `-W ignore` keeps pytest from reporting these as
errors.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import gateways
import helpers
import pytest
from invariants import check_server

from transit_relay import IPV4, Limits, Peer, Server, UsageRecord

# What a test observes that differs at a gateway, although each pair has its bytes and its ends.
# An entry `name[text` means only the cases whose names contain the text.
NOT_FOR_GATEWAYS = {
    "two connections for each client, and two pairs for each pair": (
        *("test_interest", "test_the_backlog_is_at_most_one_read"),
        "test_while_bytes_are_queued_the_partner_is_not_read",
        "test_a_hang_up_of_a_client_that_is_not_read_does_not_keep_the_loop_busy",
        *("test_empty_messages_are_ignored", "test_pongs_of_a_client_are_discarded"),
        *("test_without_a_rate_no_pair_has_an_allowance", "test_a_stop_counts_the_last_bytes"),
        "test_a_relay_makes_pipes_when_there_is_bulk",
        "test_bytes_of_a_cut_pair_never_reach_another",
        "test_bytes_of_a_websocket_are_never_spliced",
        "test_a_reset_does_not_discard_what_is_in_the_pipe",
        "test_a_pipe_whose_receiver_takes_nothing_is_released",
        "test_a_pipe_whose_receiver_takes_something_is_kept",
        "test_a_released_pipe_is_lent_at_once",
        "test_without_memory_for_its_bytes_a_pipe_is_kept",
        "test_without_another_pair_that_wants_one_a_pipe_is_kept",
    ),
    "a rate, which a byte between two clients of the gateway spends twice": (
        *("test_a_rate_for_all_is_divided_evenly", "test_a_pair_that_wants_little_is_not_slowed"),
        "test_both_directions_of_a_pair_get_their_parts",
        "test_with_a_quota_rate_pairs_are_slowed",
    ),
    "a quota, which a gateway does not have": (
        "test_when_the_quota_is_used_up_newcomers_are_refused",
    ),
    "when a client was accepted: the relay behind counts from its handshake": (
        "test_scenario[the newest is that of the latest handshake",
        "test_scenario_with_swapped_listeners[the newest is that of the latest handshake",
        "test_the_times_of_a_pair",
    ),
    "a turn, after which the bytes are still on their way through the relay behind": (
        "test_healthy_pairs_go_on_beside_the_stalled_ones",
        "test_many_small_frames_wait_behind_small_reads",
        "test_a_backlog_is_flushed_while_its_connection_is_not_polled",
        *(
            "test_the_loop_sleeps_until_the_limit",
            "test_a_refusal_is_a_message_and_a_close[impatient",
        ),
    ),
    "bytes that a client had not received when it ended: more of them are on their way": (
        *("test_the_answer_to_a_close_follows_the_backlog", "test_a_refusal_follows_the_backlog"),
        "test_a_pair_ends_when_the_client_that_stayed_has_everything",
    ),
    "a failed write, which the partner's connection to the relay behind does not show": (
        "test_a_failed_write_does_not_discard_what_the_client_sent",
        "test_a_kernel_without_room_loses_nothing",
        "test_after_a_failed_write_the_sender_may_leave",
        "test_a_pair_of_two_clients_that_cannot_be_written_to_ends_at_once",
        "test_a_pair_ends_when_neither_client_can_be_written_to",
        "test_after_a_failed_write_the_sender_is_not_read_any_more",
    ),
    "bytes that the kernel holds for the other client of the pair, which the gateway cannot see": (
        "test_a_pair_with_bytes_in_the_kernel_is_not_idle",
        "test_a_receiver_that_takes_a_little_goes_on",
    ),
    "a stop of the gateway, which does not wait for bytes in the relay behind": (
        *("test_bytes_that_arrived_before_a_stop_are_delivered", "test_sigterm"),
    ),
    "the test patches a method that the relay behind calls as well, or that only it calls": (
        "test_a_fault_while_another_one_is_contained",
        "test_a_lasting_fault_of_the_repair_lets_the_loop_run_on",
    ),
    "a stage that knows one relay: tests/test_gateway_faults.py has one for gateways": (
        "test_a_fault_ends_one_connection_and_its_pair",
        "test_a_lasting_fault_ends_the_connections_that_meet_it",
        "test_all_handlers_are_reached",
    ),
}
# Left out too, but they need not fail.
MAY_PASS_OR_FAIL = {
    "test_bulk_is_copied_when_no_pipe_is_left",  # which of four connections has the only pipe
    "test_a_receiver_that_takes_nothing_ends_its_pair",  # if two connections stall in one turn
}
LISTED = {name for names in NOT_FOR_GATEWAYS.values() for name in names}
runs_listed = bool(os.environ.get("RELAY_GATEWAY_LISTED"))
# Entries of LISTED, with RELAY_GATEWAY_LISTED: at least one case has failed, or has passed.
failed_entries: set[str] = set()
passed_entries: set[str] = set()
forwarded_pairs = 0  # that the relays behind in this process have found


class FrontRecorder(helpers.ListRecorder):
    """The records of the relay behind, and those of clients that a gateway does not forward."""

    def __init__(self, behind: helpers.ListRecorder) -> None:
        super().__init__()
        self.records = behind.records

    def record(self, record: UsageRecord) -> None:
        if record.mood != "happy":  # the relay behind records its pairs
            super().record(record)


class FrontLoop(gateways.GatewayLoop):
    """A Loop as tests use it. The time limits are those of the gateway."""

    def __init__(self, limits: Limits | None = None, max_pipes: int = 0) -> None:
        super().__init__(limits, max_pipes, limits_behind=Limits(stall_seconds=0))

    def make_server(self, *arguments: Any, **options: Any) -> Server:
        self.recorder = FrontRecorder(self.behind.recorder)
        if not isinstance(options.get("addresses"), gateways.PlainAddresses):
            options["addresses"] = gateways.PlainAddresses()
        server = super().make_server(*arguments, **options)
        run_once = server.run_once

        def run_both(timeout: float) -> None:
            """Run a turn of the gateway and one of the relay behind, for tests that run turns."""
            run_once(timeout)
            self.behind.server.run_once(0)

        server.run_once = run_both  # type: ignore[method-assign]
        return server

    def run_turns(self) -> None:
        """Run a turn of both. Check both."""
        self.server.run_once(0)
        for server in self.servers:
            check_server(server)

    def close(self) -> None:
        global forwarded_pairs
        forwarded_pairs += self.behind.recorder.moods().count("happy")
        super().close()


OneProcess = helpers.RelayProcess


class FrontProcess(OneProcess):  # type: ignore[misc,valid-type]
    """A gateway as a process, and the relay behind it."""

    def __init__(self, *arguments: str, **options: Any) -> None:
        self.behind = OneProcess("--port", "tcp:0:interface=127.0.0.1").started()
        target = f"tcp:127.0.0.1:{self.behind.port}"
        super().__init__(*arguments, "--forward", target, **options)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.behind.__exit__()

    def stop_cleanly(self) -> None:
        super().stop_cleanly()
        self.behind.stop_cleanly()


# Before the tests import them.
helpers.Loop = FrontLoop  # type: ignore[misc]
helpers.RelayProcess = FrontProcess  # type: ignore[misc]

import test_walk  # noqa: E402


class FrontWalk(test_walk.Walk):
    """A walk through a gateway and the relay behind it."""

    def turn(self) -> None:
        """Run a turn of both, and check the invariants."""
        self.loop.run_turns()


def peer_of_walker(source: int | None, is_allowed: bool) -> Peer:
    """Return a Peer with an address, as a gateway needs it, in place of a number."""
    return Peer(None if source is None else IPV4 + bytes((192, 0, 2, source)), is_allowed)


test_walk.Walk = FrontWalk  # type: ignore[misc]
test_walk.Peer = peer_of_walker  # type: ignore[assignment,misc]


def entry_of(item: pytest.Function) -> str | None:
    """Return the entry of LISTED that means a test, if there is one."""
    for entry in LISTED:
        name, _, case = entry.partition("[")
        if item.originalname == name and case in item.name:
            return entry
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out the tests of NOT_FOR_GATEWAYS, or all others."""
    unsuitable = [
        one
        for one in items
        if (entry_of(one) is None) == runs_listed or one.originalname in MAY_PASS_OR_FAIL
    ]
    config.hook.pytest_deselected(items=unsuitable)
    items[:] = [one for one in items if one not in unsuitable]


def pytest_runtest_setup(item: pytest.Function) -> None:
    """Of a listed test, run the cases until the first that fails."""
    if entry_of(item) in failed_entries:
        pytest.skip("another case has failed")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Function, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Note how a case of a listed test ended. Report it as skipped if it failed."""
    outcome: Any = yield
    report = outcome.get_result()
    entry = entry_of(item)
    if entry is None or call.when != "call":
        return
    if report.passed:
        passed_entries.add(entry)
    elif report.failed:
        failed_entries.add(entry)
        report.outcome = "skipped"
        report.longrepr = (str(item.path), 0, "fails, as it must")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail if a listed test does not fail."""
    if needless_entries():
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def needless_entries() -> list[str]:
    """Return the entries whose cases have passed at a gateway, of those that were run."""
    return sorted(passed_entries - failed_entries)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the entries that are not needed, and how many pairs were forwarded."""
    for name in needless_entries():
        terminalreporter.write_line(f"it need not be listed: {name}")
    terminalreporter.write_line(f"{forwarded_pairs:,} pairs over a gateway")
