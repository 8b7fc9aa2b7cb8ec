"""The real clients use the relay of the installed package. They cannot connect directly.

The hosts and the transfers are those of tests/interop. The package is installed on a system that
was booted in the network of the server.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path

import netns
import pytest
import tools
from conftest import FreshRoot
from guests import rows
from nspawn import Machine
from transfers import MEBIBYTE, PROGRAMS, Program, Transfer, client_programs, mailbox_server


@pytest.fixture(scope="module")
def programs() -> Mapping[str, Program]:
    return client_programs(tools.python_tools(), tools.go_client())


@pytest.fixture(scope="module")
def server(
    deb: Path, roots: Mapping[str, FreshRoot], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """Boot the server, which both clients can reach, and install the package."""
    scratch = tmp_path_factory.mktemp("server")
    with netns.three_hosts():
        network = f"--network-namespace-path=/run/netns/{netns.namespace('server')}"
        with Machine(roots["bookworm"].folder(), scratch, network) as machine:
            machine.install(deb)
            yield machine


def test_four_directions(server: Machine, programs: Mapping[str, Program], tmp_path: Path) -> None:
    size = 16 * MEBIBYTE
    with mailbox_server(tools.python_tools(), tmp_path) as mailbox, ExitStack() as running:
        for sender, receiver in itertools.product(PROGRAMS, PROGRAMS):
            transfer = Transfer(mailbox, tmp_path / f"{sender}-{receiver}", size)
            transfer.start(running, programs[sender], programs[receiver])
            transfer.finish()
    happy = [row["total_bytes"] for row in rows(server) if row["result"] == "happy"]
    assert happy == [16_000_000] * 4  # blurred, as in the package's configuration
