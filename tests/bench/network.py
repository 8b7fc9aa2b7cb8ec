"""The network in which all is measured: a loopback of our own, with TCP as Debian's kernel has it.

A machine may be set up in its own way, and its congestion control matters most: BBR paces what it
sends by timers, and on such a loopback a relay may spend more on these than on anything else.
Debian's kernel comes with CUBIC. So, where we may, all comparators alike run in a network namespace
whose routes ask for that, and whose buffers are Debian's; where not, or if that is not wanted, in
the machine's network as it is. Which it was is said below the tables.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from pathlib import Path

from clients import HOST

CONGESTION_CONTROL = "cubic"
CLONE_NEWNET = 0x40000000  # linux/sched.h; os.unshare is there from Python 3.12 on
NAME_BYTES = 16  # TCP_CA_NAME_MAX, linux/tcp.h
BUFFERS = {"tcp_rmem": "4096 131072 6291456", "tcp_wmem": "4096 16384 4194304"}  # tcp(7)
LOOPBACK = ("127.0.0.0/8", "127.0.0.1")  # the routes that the kernel makes by itself


class NotPermitted(Exception):
    """We may not have a network of our own, or not the congestion control; with the reason."""


def enter_our_own() -> None:
    """Go to a network of our own, for good, and so does whatever we start. Raises NotPermitted.

    From there nothing else can be reached, so all that is fetched has to be there by now.
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
    for route in LOOPBACK:
        _ip(
            *("route", "replace", "local", route, "dev", "lo", "table", "local"),
            *("proto", "kernel", "scope", "host", "src", HOST, "congctl", CONGESTION_CONTROL),
        )


def _ip(*arguments: str) -> None:
    try:
        subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise NotPermitted("there is no ip: apt-get install iproute2") from None
    except subprocess.CalledProcessError as error:
        raise NotPermitted(f"ip {' '.join(arguments)}: {error.stderr.strip()}") from None


def congestion_control() -> str:
    """What a connection over the loopback has."""
    with socket.create_server((HOST, 0)) as listener:
        with socket.create_connection(listener.getsockname()) as sock:
            name = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, NAME_BYTES)
    return name.rstrip(b"\0").decode()
