"""The short form of `make reload-test`: a reload before each turn, in a process of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys

from helpers import RELAY, TIMEOUT

ARGUMENTS = ("-m", "pytest", "-q", "-p", "reload_plugin", "-o", "addopts=", "tests/test_walk.py")


def test_with_a_reload_before_each_turn_clients_see_no_difference() -> None:
    done = subprocess.run(
        [sys.executable, *ARGUMENTS],
        cwd=RELAY.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"tests{os.pathsep}.",
            "RELAY_WALK_STEPS": "150",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        },
        capture_output=True,
        text=True,
        timeout=10 * TIMEOUT,
    )
    assert done.returncode == 0, done.stdout
    found = re.search("([0-9,]+) reloads before a turn", done.stdout)
    assert found and int(found[1].replace(",", "")) > 500
