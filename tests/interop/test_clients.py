"""Real clients send files through our relay. A direct connection between them is impossible.

The sender is on host a, the receiver on host b, and the mailbox server and the relay are on the
server: see netns.py. The clients reach the relay under the public names that are built into them:
the Go client has no option for another relay.
"""

from __future__ import annotations

import itertools
import sqlite3
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from pathlib import Path

import netns
import pytest
from children import Child, Record, Relay
from reloads import reload_during, slow_options
from transfers import MEBIBYTE, PROGRAMS, Program, Transfer, client_programs


@pytest.fixture(scope="module")
def programs(python_tools: Path, go_client: Path) -> Mapping[str, Program]:
    return client_programs(python_tools, go_client)


class OurRelay(Relay):
    """Our relay, running on the server."""

    def __init__(
        self, command: list[str], folder: Path, *options: str, address: str = netns.SERVER
    ) -> None:
        self._database = folder / "usage.sqlite"
        required = [f"--port=tcp:4001:interface={address}", f"--usage-db={self._database}"]
        super().__init__(
            netns.inside("server", [*command, *required, *options]),
            rf"^Transit starting on tcp:(\d+):interface={address}$",
        )

    def stop(self, transfers: list[Transfer]) -> None:
        """Stop the relay, and check its records: each transfer has one, with all its bytes."""
        assert self.terminate() == 0, str(self.lines)
        records = self.last_records()
        happy = sorted(record.total_bytes for record in records if record.mood == "happy")
        sizes = sorted(transfer.size for transfer in transfers)
        assert len(happy) == len(sizes), records
        assert all(carried >= size for carried, size in zip(happy, sizes)), records
        assert {record.mood for record in records} <= {"happy", "lonely", "redundant", "empty"}
        with closing(sqlite3.connect(self._database)) as database:
            rows = database.execute("SELECT result, total_bytes, waiting_time FROM usage")
            in_database = [Record(mood, size, waited is not None) for mood, size, waited in rows]
        assert sorted(in_database) == sorted(records)


@pytest.mark.parametrize("receiver", PROGRAMS)
@pytest.mark.parametrize("sender", PROGRAMS)
@pytest.mark.parametrize("is_reloaded", [False, True], ids=["undisturbed", "reloaded"])
def test_transfer(
    is_reloaded: bool,
    sender: str,
    receiver: str,
    programs: Mapping[str, Program],
    mailbox: str,
    our_relay: list[str],
    tmp_path: Path,
) -> None:
    """`is_reloaded`: the relay is, several times during the transfer."""
    transfer = Transfer(mailbox, tmp_path, 64 * MEBIBYTE)
    config = tmp_path / "relay.conf"
    options = slow_options(config) if is_reloaded else []
    with ExitStack() as running, OurRelay(our_relay, tmp_path, *options) as relay:
        transfer.start(running, programs[sender], programs[receiver])
        if is_reloaded:
            reload_during(relay, relay.port, config, transfer.size)
        transfer.finish()
        relay.stop([transfer])


def test_five_at_once(
    programs: Mapping[str, Program], mailbox: str, our_relay: list[str], tmp_path: Path
) -> None:
    pairs = [*itertools.product(PROGRAMS, PROGRAMS), ("python", "go")]
    transfers = [
        Transfer(mailbox, tmp_path / f"{number}", (16 + number) * MEBIBYTE)
        for number in range(len(pairs))
    ]
    with ExitStack() as running, OurRelay(our_relay, tmp_path) as relay:
        for transfer, (sender, receiver) in zip(transfers, pairs):
            transfer.start(running, programs[sender], programs[receiver])
        for transfer in transfers:
            transfer.finish()
        relay.stop(transfers)


def test_transit_helper(
    python_tools: Path, mailbox: str, our_relay: list[str], tmp_path: Path
) -> None:
    """Only the sender has an option with the address of the relay. No name resolves to it."""
    wormhole = str(python_tools / "wormhole")
    helper = f"--transit-helper=tcp:{netns.OTHER}:4001"
    program = Program([wormhole, helper, "send", "--code"], [wormhole, "receive", "--accept-file"])
    transfer = Transfer(mailbox, tmp_path, MEBIBYTE)
    with ExitStack() as running, OurRelay(our_relay, tmp_path, address=netns.OTHER) as relay:
        transfer.start(running, program, program)
        transfer.finish()
        relay.stop([transfer])


LISTEN = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
print("port", listener.getsockname()[1], flush=True)
while True:
    listener.accept()
"""
CONNECT = """
import socket, sys
socket.create_connection((sys.argv[1], int(sys.argv[2])), 5).close()
"""


@pytest.mark.parametrize(("here", "there"), [("a", "b"), ("b", "a")])
def test_no_direct_connection(here: str, there: str, hosts: None) -> None:
    """A client cannot connect to the other. Otherwise the other tests here would prove nothing."""
    address = netns.CLIENTS[there]
    listen = [sys.executable, "-c", LISTEN, address]
    with Child(netns.inside(there, listen)) as listener:
        port = listener.lines.until(r"^port (\d+)$")[1]
        connect = [sys.executable, "-c", CONNECT, address, port]
        with Child(netns.inside("server", connect)) as reachable:
            reachable.succeed()
        with Child(netns.inside(here, connect)) as unreachable:
            unreachable.lines.until("Network is unreachable")
            assert unreachable.wait() == 1
