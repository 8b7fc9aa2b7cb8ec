"""Three hosts as network namespaces: two clients reach a server, but not each other.

To the relay this looks like two hosts behind NAT. The names of the namespaces contain the number of
this process, and their addresses are reserved for documentation. The machine's own network is not
changed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

# The names built into the clients resolve to SERVER. OTHER is a second address of the server: no
# name resolves to it, and nothing listens there until a test starts a listener.
SERVER = "198.51.100.254"
OTHER = "198.51.100.253"
CLIENTS = {"a": "198.51.100.2", "b": "198.51.100.6"}
ETC_NETNS = Path("/etc/netns")
HOSTS = f"""\
127.0.0.1 localhost
{SERVER} relay.magic-wormhole.io transit.magic-wormhole.io
"""


class Unavailable(Exception):
    """Network namespaces cannot be created on this machine."""


def inside(host: str, argv: Sequence[str]) -> list[str]:
    """Return the command that runs argv on one of the hosts: "server", "a" or "b"."""
    return ["ip", "netns", "exec", namespace(host), *argv]


def namespace(host: str) -> str:
    """Return the name of a host's network namespace."""
    return f"relay-interop-{os.getpid()}-{host}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _delete_if_there(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # another test run has its hosts there


@contextmanager
def three_hosts() -> Iterator[None]:
    """Create the hosts, and remove them after the `with` block."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if not shutil.which("ip"):
        raise Unavailable("no ip command (package iproute2)")
    with ExitStack() as teardown:
        if not ETC_NETNS.exists():
            teardown.callback(_remove_if_empty, ETC_NETNS)
            ETC_NETNS.mkdir(exist_ok=True)
        for host in "server", *CLIENTS:
            # Before the command, because a signal may interrupt it.
            teardown.callback(_delete_if_there, namespace(host))
            try:
                _ip("netns", "add", namespace(host))
            except subprocess.CalledProcessError as error:
                raise Unavailable(f"ip netns add: {error.stderr.strip()}") from error
            _ip("-n", namespace(host), "link", "set", "lo", "up")
        server = namespace("server")
        no_router = "echo 0 > /proc/sys/net/ipv4/ip_forward"
        subprocess.run(inside("server", ["sh", "-c", no_router]), check=True)
        for address in SERVER, OTHER:
            _ip("-n", server, "addr", "add", f"{address}/32", "dev", "lo")
        for number, (host, address) in enumerate(CLIENTS.items()):
            client = namespace(host)
            gateway = f"198.51.100.{4 * number + 1}"
            port = f"to-{host}"
            _ip("link", "add", "eth0", "netns", client, "type", "veth",
                "peer", "name", port, "netns", server)  # fmt: skip
            _ip("-n", server, "addr", "add", f"{gateway}/30", "dev", port)
            _ip("-n", server, "link", "set", port, "up")
            _ip("-n", client, "addr", "add", f"{address}/30", "dev", "eth0")
            _ip("-n", client, "link", "set", "eth0", "up")
            for server_address in SERVER, OTHER:
                _ip("-n", client, "route", "add", f"{server_address}/32", "via", gateway)
            # `ip netns exec` mounts this file over /etc/hosts for its command.
            folder = ETC_NETNS / client
            teardown.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir()
            (folder / "hosts").write_text(HOSTS)
        yield
