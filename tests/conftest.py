"""Fixtures. `loop` is a relay in this thread, `relay` starts one as a process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest
from helpers import Loop, RelayProcess


def open_descriptors() -> int:
    """How many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def loop() -> Iterator[Loop]:
    """A Server in this thread; at the end its books balance and nothing is left open."""
    before = open_descriptors()
    loop = Loop()
    yield loop
    loop.pump()
    loop.close()
    assert open_descriptors() == before


@pytest.fixture
def relay() -> Iterator[Callable[..., RelayProcess]]:
    """Start relays with `relay(*options)`; give them once they listen on a free port.

    Each is ended at the end of the test, which fails if a relay that is still running then
    does not stop in an orderly way, or has complained.
    """
    relays: list[RelayProcess] = []

    def start(*options: str, **kwargs: object) -> RelayProcess:
        if not any(option.startswith("--port") for option in options):
            options = ("--port", "tcp:0:interface=127.0.0.1", *options)
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
