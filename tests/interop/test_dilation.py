"""Dilated wormholes use our relay: one connection for a long time, with several subchannels in it.

Both sides are dilated_client.py, on the hosts of netns.py: a direct connection is impossible, and
neither side listens. They find each other with the mailbox server.

If both sides have the option for the relay, each connects twice: for its own hint, and for the same
hint from the other side (use_hints and start in wormhole/_dilation/connector.py). The leader uses
one pair and closes everything else. So the relay may record a second pair, which exchanged no more
than the start of the protocol, or clients without a partner. If one side has the option, there is
one pair and nothing else.
"""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import netns
import pytest
from children import TIMEOUT_FACTOR, Child, Record, Relay
from reloads import reload_during, slow_options
from transfers import MEBIBYTE

CLIENT = Path(__file__).parent / "dilated_client.py"
START_OF_PROTOCOL = 1000  # bytes, at most: the prologues, the Noise handshake, and a message
PING_SECONDS = max(2.0, TIMEOUT_FACTOR)  # a Pong that takes longer ends the connection

# Pass a listening socket over the unix socket with this number.
PASS_LISTENER = """
import socket, sys
listener = socket.create_server((sys.argv[1], 0))
with socket.socket(fileno=int(sys.argv[2])) as passed:
    socket.send_fds(passed, [b"1"], [listener.fileno()])
"""


@pytest.fixture
def listener(hosts: None) -> Iterator[socket.socket]:
    """Return a socket that listens on the server. It outlives a relay, as a socket of systemd."""
    ours, passed = socket.socketpair()
    with ours, passed:
        argv = [sys.executable, "-c", PASS_LISTENER, netns.SERVER, str(passed.fileno())]
        with Child(netns.inside("server", argv), pass_fds=[passed.fileno()]) as child:
            child.succeed()
        _, (fd,), _, _ = socket.recv_fds(ours, 1, 1)
    with socket.socket(fileno=fd) as listener:
        yield listener


class OurRelay(Relay):
    """Our relay on the server, with a listening socket that was passed to it."""

    def __init__(self, command: list[str], listener: socket.socket, *options: str) -> None:
        endpoint = f"fd:{listener.fileno()}"
        super().__init__(
            netns.inside("server", [*command, f"--port={endpoint}", *options]),
            rf"^Transit starting on fd:({listener.fileno()})$",
            pass_fds=[listener.fileno()],
        )

    def stop(self) -> list[Record]:
        """Stop the relay, and return its records. It must have written no warning."""
        assert self.terminate() == 0, str(self.lines)
        self.lines.rest()
        for word in "warning:", "error:", "critical:", "Traceback":
            assert word not in str(self.lines), str(self.lines)
        return self.last_records()


class Wormhole:
    """A dilated wormhole between the hosts a and b. Host a opens the subchannels."""

    _nameplates = itertools.count(1)

    def __init__(
        self,
        running: ExitStack,
        python_tools: Path,
        mailbox: str,
        listener: socket.socket,
        relay_known_to: str,
        options: Sequence[str],
    ) -> None:
        """Start both sides. They end with `running`, if not earlier.

        `relay_known_to` names the hosts whose side has the option for the relay.
        """
        python = str(python_tools / "python")
        code = f"{next(self._nameplates)}-dilated-test"
        self._hint = "tcp:{}:{}".format(*listener.getsockname())
        self.sides = []
        for host, role in ("a", "open"), ("b", "accept"):
            argv = [python, str(CLIENT), role, mailbox, code, *options]
            if host in relay_known_to:
                argv.append(f"--relay={self._hint}")
            self.sides.append(running.enter_context(Child(netns.inside(host, argv))))

    def finish(self, *, rounds: int = 1, connections: int = 1) -> None:
        """Wait until both sides have succeeded. All connections must be through the relay."""
        for side in self.sides:
            side.succeed()
            events = side.lines.seen
            assert [event for event in events if event.startswith("connection")] == [
                f"connection {1 + number} ->relay:{self._hint}" for number in range(connections)
            ], events
            assert len([e for e in events if e.startswith("bulk received")]) == rounds, events
            assert events[-2:] == ["subchannels closed", "wormhole closed: happy"], events
        echoes = [line for line in self.sides[0].lines.seen if line.startswith("echoes ")]
        assert len(echoes) == rounds
        assert "echoes 0" not in echoes


@pytest.mark.parametrize("relay_known_to", ["a", "ab"])
def test_transfer(
    relay_known_to: str,
    python_tools: Path,
    mailbox: str,
    our_relay: list[str],
    listener: socket.socket,
) -> None:
    """Both directions of a subchannel are full, while messages go through another."""
    size = 64 * MEBIBYTE
    options = [f"--size={size}"]
    with ExitStack() as running, OurRelay(our_relay, listener) as relay:
        wormhole = Wormhole(running, python_tools, mailbox, listener, relay_known_to, options)
        wormhole.finish()
        *others, record = sorted(relay.stop(), key=lambda record: record.total_bytes)
    assert record.mood == "happy"
    assert record.total_bytes > 2 * size
    if relay_known_to != "ab":
        assert others == []
    assert {other.mood for other in others} <= {"happy", "lonely", "redundant", "empty"}, others
    assert all(other.total_bytes <= START_OF_PROTOCOL for other in others), others


def test_idle(
    python_tools: Path, mailbox: str, our_relay: list[str], listener: socket.socket
) -> None:
    """A pair continues after a time in which only TCP keepalive probes and pings were sent.

    The leader sends a ping every PING_SECONDS. Before that, the relay's kernel sends a probe.
    """
    size = 4 * MEBIBYTE
    options = [f"--size={size}", "--idle-pings=2", f"--ping-interval={PING_SECONDS}"]
    before = keepalive_probes()
    with ExitStack() as running, OurRelay(our_relay, listener, "--keepalive=1") as relay:
        wormhole = Wormhole(running, python_tools, mailbox, listener, "a", options)
        wormhole.sides[0].lines.until("^idle until now$")
        probes = keepalive_probes() - before
        wormhole.finish(rounds=2)
        (record,) = relay.stop()
    assert probes >= 2  # at least one to each client
    assert record.mood == "happy"
    assert record.total_bytes > 4 * size


def keepalive_probes() -> int:
    """Return how many TCP keepalive probes the server has sent."""
    with Child(netns.inside("server", ["cat", "/proc/net/netstat"])) as child:
        child.succeed()
    names, values = (line.split() for line in child.lines.seen if line.startswith("TcpExt:"))
    return int(dict(zip(names, values))["TCPKeepAlive"])


def test_restart(
    python_tools: Path, mailbox: str, our_relay: list[str], listener: socket.socket
) -> None:
    """The wormholes connect to a restarted relay, and complete the transfer there.

    They try each hint once (_schedule_connection in wormhole/_dilation/connector.py), so they need
    a listening socket at any time, as with socket activation.
    """
    size = 16 * MEBIBYTE
    options = [f"--size={size}", "--connections=2"]
    with ExitStack() as running:
        with OurRelay(our_relay, listener) as relay:
            wormhole = Wormhole(running, python_tools, mailbox, listener, "a", options)
            wormhole.sides[0].lines.until("^half received$")
            (before,) = relay.stop()
        with OurRelay(our_relay, listener) as relay:
            wormhole.finish(connections=2)
            (after,) = relay.stop()
    assert {before.mood, after.mood} == {"happy"}
    assert before.total_bytes > size // 2
    assert after.total_bytes > 2 * MEBIBYTE  # the last bytes of both sides
    assert before.total_bytes + after.total_bytes > 2 * size


def test_reloads(
    python_tools: Path,
    mailbox: str,
    our_relay: list[str],
    listener: socket.socket,
    tmp_path: Path,
) -> None:
    """The relay is reloaded during a transfer. The connection stays the same."""
    size = 64 * MEBIBYTE
    options = [f"--size={size}"]
    config = tmp_path / "relay.conf"
    with ExitStack() as running, OurRelay(our_relay, listener, *slow_options(config)) as relay:
        wormhole = Wormhole(running, python_tools, mailbox, listener, "a", options)
        reload_during(relay, listener.getsockname()[1], config, 2 * size)
        wormhole.finish()
        (record,) = relay.stop()
    assert record.mood == "happy"
    assert record.total_bytes > 2 * size
