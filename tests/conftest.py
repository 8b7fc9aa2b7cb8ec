"""Fixtures. `loop` is a relay in this thread, `relay` starts one as a process."""

from __future__ import annotations

import os
import py_compile
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import RELAY, Loop, RelayProcess

import transit_relay


def pytest_sessionstart() -> None:
    """Cache the bytecode of the relay, also where PYTHONDONTWRITEBYTECODE is set."""
    for module in (RELAY, RELAY.with_name("ws_frames.py")):
        py_compile.compile(str(module))


def open_descriptors() -> int:
    """Return how many files this process has open."""
    return len(os.listdir("/proc/self/fd"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of a module with BOTH_WAYS twice: its relays copy, and its relays splice."""
    if getattr(metafunc.module, "BOTH_WAYS", False) and "splices" in metafunc.fixturenames:
        ways = {"copied": False, "spliced": True} if transit_relay.splice else {"copied": False}
        metafunc.parametrize("splices", ways.values(), ids=ways)


@pytest.fixture
def splices() -> bool | None:
    """Return whether raw bytes are spliced. None: only bulk is, as in service."""
    return None


@pytest.fixture
def loop(splices: bool | None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """Return a Server in this thread. Check at the end that no descriptor is left open.

    With `splices`, each read of a pair is taken for bulk and is spliced.
    """
    if splices:
        monkeypatch.setattr(transit_relay, "BULK_BYTES", 1)
    before = open_descriptors()
    loop = Loop(max_pipes=0 if splices is False else transit_relay.affordable_pipes())
    try:
        yield loop
        loop.pump()
    finally:
        loop.close()
    assert open_descriptors() == before


@pytest.fixture
def public() -> Iterator[Path]:
    """Return a folder of root's that other users may enter: they may not enter pytest's."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def relay(splices: bool | None) -> Iterator[Callable[..., RelayProcess]]:
    """Return a function that starts a relay on a free port: `relay(*options)`.

    Relays that still run at the end of the test are stopped. The test fails if one of them does
    not stop in order, or has logged a warning.
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
