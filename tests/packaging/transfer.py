"""Transfer bytes through the relay on port 4001 of this system. A program, not a module."""

from __future__ import annotations

import os
import socket
import time


def connect(side: str) -> socket.socket:
    """Connect and send a handshake. The relay may not have started yet: retry until it listens."""
    deadline = time.monotonic() + 60
    while True:
        try:
            sock = socket.create_connection(("127.0.0.1", 4001), 60)
        except ConnectionRefusedError:
            assert time.monotonic() < deadline, "no relay listens"
            time.sleep(0.05)
        else:
            sock.sendall(f"please relay {TOKEN} for side {side}\n".encode())
            return sock


def read(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes, or fewer if the end comes before."""
    data = b""
    while len(data) < size and (more := sock.recv(size - len(data))):
        data += more
    return data


DATA, TOKEN = os.urandom(3_000_000), os.urandom(32).hex()

with connect("1" * 16) as one, connect("2" * 16) as other:
    assert read(one, 3) == read(other, 3) == b"ok\n"
    one.sendall(DATA)
    one.shutdown(socket.SHUT_WR)
    assert read(other, len(DATA) + 1) == DATA
print("transferred")
