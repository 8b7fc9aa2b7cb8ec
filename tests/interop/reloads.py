"""Reloads of our relay while clients transfer."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import netns
from children import TIMEOUT, Relay

RELOADS = 3
SLOW_RATE = "1MB"  # per second
STEP_BYTES = 500_000  # before each reload
POLL_SECONDS = 0.05  # how often the kernel is asked how far a transfer is


def reload(relay: Relay) -> None:
    """Reload the relay, and wait until the new program serves, in the same process."""
    os.kill(relay.pid, signal.SIGHUP)
    relay.lines.until("^Transit reloaded, listening on ")
    assert relay.is_running()


def delivered_bytes(port: int) -> int:
    """Return how many bytes the clients at a port of the server have acknowledged."""
    command = ["ss", "-tinH", "state", "established", f"( sport = :{port} )"]
    done = subprocess.run(
        netns.inside("server", command), capture_output=True, text=True, check=True
    )
    return sum(map(int, re.findall(r"bytes_acked:(\d+)", done.stdout)))


def slow_options(file: Path) -> list[str]:
    """Return the options of a relay that takes a minute for a transfer of 64 MB.

    `file`: the configuration, which is written here.
    """
    file.write_text(f"max-rate {SLOW_RATE}\n")
    return [f"--config={file}"]


def reload_during(relay: Relay, port: int, file: Path, total_bytes: int) -> None:
    """Reload RELOADS times during a transfer of so many bytes. It must be the only one.

    `file`: of `slow_options`. A reload can take seconds on a loaded machine. So only a further one,
    when the RELOADS are over, removes the rate.
    """
    for number in range(1, RELOADS + 1):
        deadline = time.monotonic() + TIMEOUT
        while delivered_bytes(port) < number * STEP_BYTES:
            assert time.monotonic() < deadline, f"reload {number}: the transfer does not progress"
            time.sleep(POLL_SECONDS)
        reload(relay)
    assert 0 < delivered_bytes(port) < total_bytes, "the transfer ended before the last reload"
    file.write_text("")
    reload(relay)
