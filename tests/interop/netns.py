"""Three hosts as network namespaces: two clients that reach a server, and never each other.

That is what two hosts behind NAT look like to the relay. The namespaces are this process's own
(its number is in their names) with documentation addresses; nothing of the machine's is touched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

# The names that the clients have built in lead to SERVER. Nothing listens at OTHER, which is
# the server as well, until a test says so: it is found only by being told.
SERVER = "198.51.100.254"
OTHER = "198.51.100.253"
CLIENTS = {"a": "198.51.100.2", "b": "198.51.100.6"}
ETC_NETNS = Path("/etc/netns")
HOSTS = f"""\
127.0.0.1 localhost
{SERVER} relay.magic-wormhole.io transit.magic-wormhole.io
"""


class Unavailable(Exception):
    """This machine makes no network namespaces for us."""


def inside(host: str, argv: Sequence[str]) -> list[str]:
    """The command that runs argv on one of the hosts: "server", "a" or "b"."""
    return ["ip", "netns", "exec", namespace(host), *argv]


def namespace(host: str) -> str:
    """The name of a host's network namespace."""
    return f"relay-interop-{os.getpid()}-{host}"


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def _delete_if_there(namespace: str) -> None:
    subprocess.run(["ip", "netns", "del", namespace], capture_output=True)


def _remove_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # another run has its hosts there


@contextmanager
def three_hosts() -> Iterator[None]:
    """The hosts exist in the `with` block."""
    if os.geteuid() != 0:
        raise Unavailable("network namespaces need root")
    if not shutil.which("ip"):
        raise Unavailable("no ip command (package iproute2)")
    with ExitStack() as teardown:
        if not ETC_NETNS.exists():
            teardown.callback(_remove_if_empty, ETC_NETNS)
            ETC_NETNS.mkdir(exist_ok=True)
        for host in "server", *CLIENTS:
            # First, as this run may be told to stop in the middle of the command.
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
            # `ip netns exec` shows this file to its command in place of /etc/hosts.
            folder = ETC_NETNS / client
            teardown.callback(shutil.rmtree, folder, ignore_errors=True)
            folder.mkdir()
            (folder / "hosts").write_text(HOSTS)
        yield
