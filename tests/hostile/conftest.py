"""What these tests need: root, namespaces, nftables, and the relay's limits.

A test that lacks one of these is skipped, with the reason. With RELAY_HOSTILE_REQUIRED=1, as in CI,
it fails instead. RELAY_HOSTILE_SHORT=1 selects smaller numbers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest
from interop import netns
from watched import has_option

REQUIRED = os.environ.get("RELAY_HOSTILE_REQUIRED") == "1"


def missing(reason: str) -> NoReturn:
    """Skip the test, or fail it if skips are forbidden."""
    if REQUIRED:
        pytest.fail(f"{reason} (RELAY_HOSTILE_REQUIRED forbids a skip)", pytrace=False)
    pytest.skip(reason)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs(*options): options of the relay that it needs")


@pytest.fixture(autouse=True)
def needed_options(request: pytest.FixtureRequest) -> None:
    """Skip a test that needs an option which this relay does not have."""
    for mark in request.node.iter_markers("needs"):
        for option in mark.args:
            if not has_option(option):
                missing(f"the relay has no {option}")


@pytest.fixture
def hosts() -> Iterator[None]:
    """Make the hosts of netns.py: a server and two clients."""
    try:
        with netns.three_hosts():
            yield
    except netns.Unavailable as error:
        missing(str(error))


@pytest.fixture
def nft() -> str:
    """Return the path of nft, which drops packets."""
    found = shutil.which("nft")
    if not found:
        missing("no nft (package nftables)")
    return found


@pytest.fixture
def root() -> None:
    """Skip the test if it is not run by root, who may mount."""
    if os.geteuid() != 0:
        missing("mounting a file system needs root")
