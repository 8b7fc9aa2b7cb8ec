"""A pytest plugin: before each turn, each Server is taken apart and put together again.

The state is encoded as for a reload. The objects that tests hold (Server, Connection, Session) are
made anew in place, by their constructors, so that nothing of the former state is left in them.
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import test_walk

import transit_relay
from transit_relay import (
    LOCAL_PEER,
    Connection,
    Role,
    Server,
    ServerPhase,
    place_server,
    read_state,
    resume_server,
)

# What a test observes, although no client does.
NOT_FOR_RELOADS = {
    "the phases of a connection, one after the other": (
        *("test_a_second_finish_changes_nothing", "test_listed", "test_not_listed"),
        "test_the_end_of_an_open_connections_peer_is_answered_with_finish",
        "test_without_a_backlog_finish_and_flushed_happen_at_once",
    ),
    "how often a message is logged": (
        "test_a_lack_of_descriptors_is_logged_once_a_minute",
        "test_a_limit_is_logged_once_a_minute_and_counted",
        "test_the_limit_is_counted_and_logged_once_a_minute",
        "test_an_unknown_error_of_accept_pauses_for_a_second_and_is_named",
    ),
    "a patched selector": (
        "test_a_change_of_interest_that_is_refused_costs_one_pair",
        "test_a_suspension_within_the_select_does_not_count_as_silence",
        "test_the_loop_does_not_wait_while_bulk_is_queued",
    ),
    "a process without a free descriptor, which a reload refuses": (
        *("test_an_empty_queue_makes_nobody_go", "test_the_listeners_rest_if_no_client_can_go"),
        "test_without_a_free_descriptor_a_client_makes_room_in_the_same_turn",
        *("test_the_real_limit_of_descriptors", "test_bulk_is_copied_when_no_pipe_is_left"),
    ),
    "bytes in a pipe, which a reload moves to memory": (
        "test_a_pipe_whose_receiver_takes_nothing_is_released",
        "test_a_pipe_whose_receiver_takes_something_is_kept",
        *("test_a_released_pipe_is_lent_at_once", "test_the_backlog_is_at_most_one_read"),
        "test_without_another_pair_that_wants_one_a_pipe_is_kept",
        "test_without_memory_for_its_bytes_a_pipe_is_kept",
        "test_short_messages_are_copied_and_bulk_is_spliced",
        "test_bytes_of_a_cut_pair_never_reach_another",
        "test_a_reset_does_not_discard_what_is_in_the_pipe",
    ),
    "a fault that would come in the reload": ("test_a_fault_while_bulk_is_spliced_costs_no_pipe",),
    "a memory budget that the test has used up without backlogs": (
        "test_a_receiver_that_leaves_while_its_partner_waits_for_room",
        "test_healthy_pairs_go_on_beside_the_stalled_ones",
        "test_past_the_limit_a_pair_is_read_when_its_receiver_has_room",
        "test_past_the_limit_only_the_newest_pong_is_kept",
        "test_the_largest_reads_are_bulk_near_the_limit_too",
    ),
    "when the quota is counted: at once after a reload": (
        *("test_a_stop_counts_the_last_bytes", "test_with_a_quota_rate_pairs_are_slowed"),
    ),
}
reloads = 0  # since the start of pytest
is_off = False  # while a test injects a fault
arguments_of: dict[Server, tuple[Any, Any]] = {}


def encode_and_decode(server: Server) -> Iterator[dict[str, Any]]:
    """Return the state of a server, as a new program reads it."""
    fd = os.memfd_create("state")
    with open(fd, "wb", closefd=False) as file:
        for part in place_server(server):
            pickle.dump(part, file, 4)
    return iter(list(read_state(fd)))


def reload(server: Server) -> None:
    """Take a server apart between two turns, and put it together again."""
    global reloads
    is_ready = server.phase is ServerPhase.SERVING and server._selector is not None
    if is_off or not is_ready or server.doomed or server.faults.need_repair or server.signals.noted:
        return
    state = encode_and_decode(server)
    conns = {conn.fd: conn for conn in server.connections}
    kept = server.signals.actions, server.between_turns
    server.pipes.close_idle()
    server.signals.close()
    server._selector.close()
    arguments, options = arguments_of[server]
    original_init(server, *arguments, **options)

    def connect(kind: type[Connection], fd: int) -> Connection:
        conn = conns[fd]
        assert type(conn) is kind
        session = conn.session
        conn.__init__(conn.sock, server, Role.PORT, LOCAL_PEER, False)  # type: ignore[misc]
        session.__init__(conn, server.rendezvous, 0.0)  # type: ignore[misc]
        conn.session = session
        return conn

    resume_server(server, state, connect)
    server.signals.actions, server.between_turns = kept
    server.start()
    reloads += 1


original_init = Server.__init__
original_run_once = Server.run_once
original_turn_with_a_fault = test_walk.Walk.turn_with_a_fault


def init(server: Server, *arguments: Any, **options: Any) -> None:
    original_init(server, *arguments, **options)
    arguments_of[server] = arguments, options


def run_once(server: Server, timeout: float) -> None:
    reload(server)
    original_run_once(server, timeout)


def turn_with_a_fault(walk: test_walk.Walk) -> None:
    """Reload in other turns: here the fault would come in the reload."""
    global is_off
    is_off = True
    try:
        original_turn_with_a_fault(walk)
    finally:
        is_off = False


def pytest_configure() -> None:
    """Install the reloads."""
    transit_relay.Server.__init__ = init  # type: ignore[method-assign,assignment]
    transit_relay.Server.run_once = run_once  # type: ignore[method-assign]
    test_walk.Walk.turn_with_a_fault = turn_with_a_fault  # type: ignore[method-assign]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Function]) -> None:
    """Leave out the tests of NOT_FOR_RELOADS."""
    left_out = {name for names in NOT_FOR_RELOADS.values() for name in names}
    unsuitable = [item for item in items if item.originalname in left_out]
    config.hook.pytest_deselected(items=unsuitable)
    items[:] = [item for item in items if item not in unsuitable]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print how often a server was reloaded."""
    terminalreporter.write_line(f"{reloads:,} reloads before a turn")


@pytest.fixture(autouse=True)
def no_server_is_kept() -> Iterator[None]:
    """Forget the servers of a test."""
    yield
    arguments_of.clear()
