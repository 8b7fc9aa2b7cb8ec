"""The lines of `--print-hints`, as a shell and the real Python client read them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from children import TIMEOUT

HOSTS = {
    "relay.example.org": "relay.example.org",
    "192.0.2.1": "192.0.2.1",
    "2001:db8::1": "2001:db8::1",
    "[2001:db8::1]": "2001:db8::1",
    "64:ff9b::192.0.2.1": "64:ff9b::c000:201",
}

# The client, but instead of sending it prints the relay that it would use, as its parser reads it.
CLIENT = """\
#!{python}
import json
from wormhole.cli import cli
from wormhole._hints import parse_hint_argv

def show(command, config):
    hint = parse_hint_argv(config.transit_helper)
    print(json.dumps([*hint, config.what]))

cli.go = show
cli.wormhole(prog_name="wormhole")
"""

# Prints the relays and endpoints that the client takes from a relay hint of its peer.
PARSE_HINT = """\
import json, sys
from wormhole._hints import encode_hint, parse_hint
print(json.dumps(encode_hint(parse_hint(json.load(sys.stdin)))))
"""


def printed_blocks(our_relay: list[str], host: str) -> dict[str, str]:
    """Return the line below each heading that our relay prints for a host."""
    command = [*our_relay, f"--print-hints={host}", "--port=tcp:443"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=True)
    return dict(block.splitlines() for block in done.stdout.split("\n\n"))


@pytest.fixture
def in_shell(python_tools: Path, tmp_path: Path) -> Callable[[str], list[object]]:
    """Return a function: what the client shows when a shell executes these lines."""
    client = tmp_path / "wormhole"
    client.write_text(CLIENT.format(python=python_tools / "python"))
    client.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("WORMHOLE_TRANSIT_HELPER", None)

    def in_shell(lines: str) -> list[object]:
        command = ["sh", "-euc", lines]
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        assert (done.returncode, done.stderr) == (0, "")
        found: list[object] = json.loads(done.stdout)
        return found

    return in_shell


@pytest.mark.parametrize("host", HOSTS)
def test_the_option(
    our_relay: list[str], in_shell: Callable[[str], list[object]], host: str
) -> None:
    line = printed_blocks(our_relay, host)[
        "Python client (the receiver: `receive` in place of `send FILE`):"
    ]
    assert in_shell(line) == [HOSTS[host], 443, 0.0, "FILE"]


@pytest.mark.parametrize("host", HOSTS)
def test_the_variable(
    our_relay: list[str], in_shell: Callable[[str], list[object]], host: str
) -> None:
    line = printed_blocks(our_relay, host)["The same, for a whole shell:"]
    assert in_shell(f"{line}\nwormhole send FILE") == [HOSTS[host], 443, 0.0, "FILE"]


@pytest.mark.parametrize("host", HOSTS)
def test_the_relay_hint(our_relay: list[str], python_tools: Path, host: str) -> None:
    """The client takes the TCP port, and ignores the WebSockets."""
    line = printed_blocks(our_relay, host)["Relay hint of the transit protocol:"]
    done = subprocess.run(
        [python_tools / "python", "-c", PARSE_HINT],
        input=line,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    (expected, *others) = json.loads(line)["hints"]
    assert expected["hostname"] == HOSTS[host] and len(others) == 3
    assert json.loads(done.stdout) == {"type": "relay-v1", "hints": [expected]}
