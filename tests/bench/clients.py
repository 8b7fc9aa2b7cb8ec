"""The clients of a relay, as far as the benchmark needs them.

A client connects, requests an upgrade if it uses WebSocket, and sends a handshake. Two clients with
the same token are a pair. load.py sends and receives the bulk and the messages that follow.

Nothing here is imported from the relay, so that a mistake in the relay cannot hide itself.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import socket
import struct
from collections.abc import Iterator
from typing import NamedTuple

HOST = "127.0.0.1"
LIMIT_SECONDS = 20.0  # without progress, then the run fails

# Clients use many source addresses, in turn. One address would run out of ports, because the port
# of a closed connection is not free for a minute (TIME_WAIT). The 15,000 waiting clients of a
# workload are 235 of each address. Our relay accepts 256 by default.
SOURCES = 64
LOOPBACK_SOURCE = "127.0.{}.1"
COUNTED_SOURCE = "198.18.{}.1"  # for benchmarks, RFC 2544
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: choose the port at connect, by destination

OK = b"ok\n"
BINARY, CLOSE = 2, 8  # opcodes: RFC 6455, 5.2
CLOSE_NORMAL = struct.pack("!H", 1000)
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_tokens = itertools.count()


class Pair(NamedTuple):
    """Two connected clients."""

    first: socket.socket
    second: socket.socket

    def close(self) -> None:
        """Close both clients."""
        self.first.close()
        self.second.close()


def addresses(pattern: str) -> Iterator[str]:
    """Return the addresses of clients, in turn and without end."""
    return itertools.cycle([pattern.format(number) for number in range(1, SOURCES + 1)])


_sources = addresses(LOOPBACK_SOURCE)


def use_counted_sources() -> None:
    """Give all later clients addresses to which our relay applies its limits for each source.

    It exempts those of the loopback. The addresses exist only in the network of
    network.enter_our_own.
    """
    global _sources
    _sources = addresses(COUNTED_SOURCE)


def prepare(sock: socket.socket, buffer_bytes: int | None) -> None:
    """Set the options of a client before it connects, or of a listener for accepted clients.

    `buffer_bytes`: the size of the kernel's buffer in each direction; None: the kernel adapts it.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)


def connect(port: int, buffer_bytes: int | None = None) -> socket.socket:
    """Return a connection to a port of the loopback. Its calls block, for at most LIMIT_SECONDS."""
    sock = socket.socket()
    prepare(sock, buffer_bytes)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((next(_sources), 0))
    sock.settimeout(LIMIT_SECONDS)
    sock.connect((HOST, port))
    return sock


def new_token() -> str:
    """Return a token that no other pair has, in all processes of the load generator."""
    return f"{os.getpid()}_{next(_tokens)}_".ljust(64, "t")


def handshake(token: str, side: str) -> bytes:
    """Return a handshake line. The `side` is padded to the required length."""
    return f"please relay {token} for side {side:0>16}\n".encode()


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes. Raise ConnectionError if the stream ends before."""
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError(f"the stream ended after {bytes(data)!r}")
        data += part
    return bytes(data)


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """Return a frame of a client, with a new key. RFC 6455, 5.2 and 5.3."""
    size = len(payload)
    key = os.urandom(4)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    else:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return head + key + (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")


def upgrade(sock: socket.socket) -> None:
    """Send an upgrade request and read the response. RFC 6455, 4.1."""
    key = base64.b64encode(os.urandom(16))
    sock.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n" % key
    )
    response = bytearray()
    while not response.endswith(b"\r\n\r\n"):
        response += receive_exactly(sock, 1)
    accept = base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())
    if not response.startswith(b"HTTP/1.1 101 ") or accept not in response:
        raise ConnectionError(f"no upgrade: {bytes(response)!r}")


def send_handshake(sock: socket.socket, is_websocket: bool, token: str, side: str) -> None:
    """Send the handshake; over WebSocket as one message after the upgrade."""
    line = handshake(token, side)
    if is_websocket:
        upgrade(sock)
        line = masked_frame(BINARY, line)
    sock.sendall(line)


def ok_bytes(is_websocket: bool) -> bytes:
    """Return the relay's ok as it arrives; over WebSocket it is one message."""
    return bytes([0x80 | BINARY, len(OK)]) + OK if is_websocket else OK


def end_bytes(is_websocket: bool) -> bytes:
    """Return what arrives at the end; over WebSocket a Close."""
    return bytes([0x80 | CLOSE, len(CLOSE_NORMAL)]) + CLOSE_NORMAL if is_websocket else b""


def expect_ok(sock: socket.socket, is_websocket: bool) -> None:
    """Read the relay's ok."""
    expected = ok_bytes(is_websocket)
    received = receive_exactly(sock, len(expected))
    if received != expected:
        raise ConnectionError(f"no ok: {received!r}")


def send_end(sock: socket.socket, is_websocket: bool) -> None:
    """Send the end of the stream; over WebSocket a Close."""
    if is_websocket:
        sock.sendall(masked_frame(CLOSE, CLOSE_NORMAL))
    else:
        sock.shutdown(socket.SHUT_WR)


def expect_end(sock: socket.socket, is_websocket: bool) -> None:
    """Read the end of the stream. Raise ConnectionError if other bytes come before it."""
    received = sock.recv(1024)
    if received != end_bytes(is_websocket):
        raise ConnectionError(f"no orderly end, but {received!r}")
