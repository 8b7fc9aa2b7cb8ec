"""The clients of a relay, as far as a benchmark needs them: how they connect, and how they spell.

A client connects, over WebSocket asks for the upgrade, and says a handshake; two with the same
token are a pair. What comes behind that is bulk or messages, and is sent and received by load.py.

Nothing here is imported from the relay: a benchmark of its must not be helped by its own code.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import socket
import struct
from typing import NamedTuple

HOST = "127.0.0.1"
LIMIT_SECONDS = 20.0  # whoever is silent for so long hangs

# Clients come from many addresses of the loopback, in turn. One alone would run out of ports, as
# that of a closed connection is not free for a minute (TIME_WAIT).
SOURCE_ADDRESSES = [f"127.0.{low}.1" for low in range(1, 65)]
IP_BIND_ADDRESS_NO_PORT = 24  # linux/in.h: choose the port at connect, when the other end is known

OK = b"ok\n"
BINARY, CLOSE = 2, 8  # opcodes: RFC 6455, 5.2
CLOSE_NORMAL = struct.pack("!H", 1000)
WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"

_sources = itertools.cycle(SOURCE_ADDRESSES)
_tokens = itertools.count()


class Pair(NamedTuple):
    """Two clients that have met, or the two ends of whatever takes the place of a relay."""

    first: socket.socket
    second: socket.socket

    def close(self) -> None:
        """Be gone, both."""
        self.first.close()
        self.second.close()


def prepare(sock: socket.socket, buffer_bytes: int | None) -> None:
    """What is set before connecting, or before listening for those that are accepted.

    `buffer_bytes`: as much as the kernel may hold in each direction; None lets it find out.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if buffer_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)


def connect(port: int, buffer_bytes: int | None = None) -> socket.socket:
    """A connection to that port of this machine. It blocks, for at most LIMIT_SECONDS."""
    sock = socket.socket()
    prepare(sock, buffer_bytes)
    sock.setsockopt(socket.IPPROTO_IP, IP_BIND_ADDRESS_NO_PORT, 1)
    sock.bind((next(_sources), 0))
    sock.settimeout(LIMIT_SECONDS)
    sock.connect((HOST, port))
    return sock


def new_token() -> str:
    """A token that no other pair has, be it of another process of the generator."""
    return f"{os.getpid()}_{next(_tokens)}_".ljust(64, "t")


def handshake(token: str, side: str) -> bytes:
    """A handshake line; the `side` is filled up to its length."""
    return f"please relay {token} for side {side:0>16}\n".encode()


def receive_exactly(sock: socket.socket, size: int) -> bytes:
    """The next `size` bytes. An end before that is an error."""
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        if not part:
            raise ConnectionError(f"the end came after {bytes(data)!r}")
        data += part
    return bytes(data)


def masked_frame(opcode: int, payload: bytes) -> bytes:
    """A frame as a client spells it, with a fresh key. RFC 6455, 5.2 and 5.3."""
    size = len(payload)
    key = os.urandom(4)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    else:
        head = struct.pack("!BBH", 0x80 | opcode, 0x80 | 126, size)
    mask = int.from_bytes((key * (size // 4 + 1))[:size], "big")
    return head + key + (int.from_bytes(payload, "big") ^ mask).to_bytes(size, "big")


def upgrade(sock: socket.socket) -> None:
    """Ask for WebSocket, and read the answer. RFC 6455, 4.1."""
    key = base64.b64encode(os.urandom(16))
    sock.sendall(
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n" % key
    )
    answer = bytearray()
    while not answer.endswith(b"\r\n\r\n"):  # nothing follows before the handshake
        answer += receive_exactly(sock, 1)
    accept = base64.b64encode(hashlib.sha1(key + WEBSOCKET_GUID).digest())
    if not answer.startswith(b"HTTP/1.1 101 ") or accept not in answer:
        raise ConnectionError(f"no upgrade: {bytes(answer)!r}")


def introduce(sock: socket.socket, is_websocket: bool, token: str, side: str) -> None:
    """Say the handshake, over WebSocket as one message behind the upgrade."""
    line = handshake(token, side)
    if is_websocket:
        upgrade(sock)
        line = masked_frame(BINARY, line)
    sock.sendall(line)


def expect_ok(sock: socket.socket, is_websocket: bool) -> None:
    """Read the relay's word that there is a partner; over WebSocket it is a message of its own."""
    wanted = bytes([0x80 | BINARY, len(OK)]) + OK if is_websocket else OK
    said = receive_exactly(sock, len(wanted))
    if said != wanted:
        raise ConnectionError(f"no ok: {said!r}")


def say_end(sock: socket.socket, is_websocket: bool) -> None:
    """Say that nothing more will come."""
    if is_websocket:
        sock.sendall(masked_frame(CLOSE, CLOSE_NORMAL))
    else:
        sock.shutdown(socket.SHUT_WR)


def expect_end(sock: socket.socket, is_websocket: bool) -> None:
    """Read the other side's end, and nothing before it."""
    wanted = bytes([0x80 | CLOSE, len(CLOSE_NORMAL)]) + CLOSE_NORMAL if is_websocket else b""
    said = sock.recv(1024)
    if said != wanted:
        raise ConnectionError(f"no orderly end, but {said!r}")
