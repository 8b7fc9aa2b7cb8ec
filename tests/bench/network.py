"""The network of a run: a loopback of our own, with the TCP settings of Debian's kernel.

Machines have different TCP settings, and the congestion control matters most. BBR paces with
timers, and on such a loopback a relay may use more CPU for these timers than for anything else.
Debian's kernel uses CUBIC. So, where that is permitted, all comparators run in a network namespace
whose routes select CUBIC and whose buffers are Debian's. Otherwise, or with --as-it-is, they run in
the machine's network. The notes below the tables name the network.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from pathlib import Path

from clients import HOST

CONGESTION_CONTROL = "cubic"
CLONE_NEWNET = 0x40000000  # linux/sched.h; Python has os.unshare from 3.12 on
NAME_BYTES = 16  # TCP_CA_NAME_MAX, linux/tcp.h
BUFFERS = {"tcp_rmem": "4096 131072 6291456", "tcp_wmem": "4096 16384 4194304"}  # tcp(7)
COUNTED_SOURCES = "198.18.0.0/16"  # has the addresses of clients.use_counted_sources
ROUTES = ("127.0.0.0/8", "127.0.0.1", COUNTED_SOURCES)  # the first two: as the kernel for `lo`


class NotPermitted(Exception):
    """A network of our own, or the congestion control, is not permitted; the text is the reason."""


def enter_our_own() -> None:
    """Enter a network of our own, with all processes that we start later. Raise NotPermitted.

    The other network cannot be reached any more, so everything must be installed before.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise NotPermitted(f"unshare: {os.strerror(ctypes.get_errno())}")
    try:
        for name, value in BUFFERS.items():
            Path("/proc/sys/net/ipv4", name).write_text(value)
    except OSError as error:
        raise NotPermitted(f"{name}: {error.strerror}") from None
    _ip("link", "set", "lo", "up")
    for route in ROUTES:
        _ip(
            *("route", "replace", "local", route, "dev", "lo", "table", "local"),
            *("proto", "kernel", "scope", "host", "src", HOST, "congctl", CONGESTION_CONTROL),
        )


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NotPermitted("the command ip is missing: apt-get install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise NotPermitted(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None


def congestion_control() -> str:
    """Return the congestion control of a connection over the loopback."""
    with socket.create_server((HOST, 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock:
            name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES)
    return name.rstrip(b"\0").decode()
