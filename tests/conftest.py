"""Fixtures. `loop` is a relay in this thread, `relay` starts one as a process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from helpers import Loop, RelayProcess

import transit_relay


def open_descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A module that says BOTH_WAYS has its relays copy in one run, and splice in another."""
    if getattr(metafunc.module, "BOTH_WAYS", False) and "splices" in metafunc.fixturenames:
        ways = {"copied": False, "spliced": True} if transit_relay.splice else {"copied": False}
        metafunc.parametrize("splices", ways.values(), ids=ways)


@pytest.fixture
def splices() -> bool | None:
    """Whether plain bytes are spliced; None: as it comes."""
    return None


@pytest.fixture
def loop(splices: bool | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """A Server in this thread; at the end its books balance and nothing is left open.

    If it `splices`, then however little it is, and from a pair's first byte on.
    """
    if splices:
        monkeypatch.setattr(transit_relay, "BULK_BYTES", 0)
    before = open_descriptors()
    loop = Loop(max_pipes=0 if splices is False else transit_relay.affordable_pipes())
    yield loop
    loop.pump()
    loop.close()
    assert open_descriptors() == before


@pytest.fixture
def relay(splices: bool | None) -> Iterator[Callable[..., RelayProcess]]:
    """Start relays with `relay(*options)`; give them once they listen on a free port.

    Each is ended at the end of the test, which fails if a relay that is still running then
    does not stop in an orderly way, or has complained.
    """
    relays: list[RelayProcess] = []

    def start(*options: str, **kwargs: object) -> RelayProcess:
        if not any(option.startswith("--port") for option in options):
            options = ("--port", "tcp:0:interface=127.0.0.1", *options)
        if splices is False:
            options = (*options, "--no-splice")
        relays.append(RelayProcess(*options, **kwargs))  # type: ignore[arg-type]
        return relays[-1].started()

    try:
        yield start
        for running in relays:
            if running.process.poll() is None:
                running.stop_cleanly()
    finally:
        for running in relays:
            running.__exit__()
