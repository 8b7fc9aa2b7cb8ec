"""What test_cli.py and test_daemon.py share: relays started in unusual ways, and their clients."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers import RELAY, TIMEOUT, RelayProcess, read_to_end

# systemd, in short: passes the descriptors "N,M,..." as 3 and on, and becomes the command.
ACTIVATE = """\
import fcntl, os, sys
fds, *command = sys.argv[1:]
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 1000) for fd in fds.split(",")]
for number, fd in enumerate(high, 3):
    os.dup2(fd, number)
os.closerange(3 + len(high), 1000 + len(high))
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)))
os.execv(command[0], command)
"""


def activated(*sockets: socket.socket) -> list[str]:
    """A program: the relay, to which systemd has passed these."""
    fds = ",".join(str(sock.fileno()) for sock in sockets)
    return [sys.executable, "-ISc", ACTIVATE, fds, sys.executable, str(RELAY)]


def patched(**constants: object) -> list[str]:
    """A program: the relay with other constants, for tests that must not pass by waiting."""
    changes = "".join(f"t.{name} = {value!r}; " for name, value in constants.items())
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(RELAY.parent)!r}); import transit_relay as t; "
        f"{changes}sys.exit(t.main())",
    ]


def with_descriptor(fd: int, as_number: int) -> list[str]:
    """A program: the relay, with one of our descriptors (to be passed) as this number."""
    onto_it = (
        "import os, sys; program = sys.argv[3:]; "
        "os.dup2(int(sys.argv[1]), int(sys.argv[2])); os.execv(program[0], program)"
    )
    return [sys.executable, "-c", onto_it, str(fd), str(as_number), sys.executable, str(RELAY)]


def redirected(redirections: str) -> list[str]:
    """A program: the relay, as a shell starts it with these redirections."""
    return ["sh", "-c", f'exec "$0" "$@" {redirections}', sys.executable, str(RELAY)]


class ReachedRelay(RelayProcess):
    """A relay that is met where it was told to listen, not where it says so.

    It says so elsewhere, or the test wants it elsewhere; `address` is a path for a unix socket.
    Its clients come from 127.0.0.2, which is not part of any endpoint.
    """

    address: tuple[str, int] | str

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        if not isinstance(self.address, str):
            return socket.create_connection(self.address, TIMEOUT, ("127.0.0.2", 0))
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT)
        client.connect(self.address)
        return client


class QuietRelay(ReachedRelay):
    """A relay behind `fd:N`, a socket that listens before it starts.

    So clients need not wait for its word: once they are served, it has started.
    """

    def __init__(self, *arguments: str, pass_fds: Sequence[int] = (), **others: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = listener.getsockname()
            fd = listener.fileno()
            arguments = ("--port", f"fd:{fd}", *arguments)
            super().__init__(*arguments, pass_fds=[fd, *pass_fds], **others)


def transfer(relay: RelayProcess, data: bytes = b"some data", token: str = "pair") -> None:
    """The whole life of a pair that carries `data` one way."""
    one, other = relay.pair(token)
    with one, other:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        assert read_to_end(other) == data


def refused(relay: RelayProcess, line: bytes, answer: bytes) -> None:
    """A client that says `line`, is told `answer`, and goes.

    When this returns, the relay has read what others sent before the call, or does so before
    it accepts whoever comes after it.
    """
    with relay.connect() as client:
        client.sendall(line)
        assert read_to_end(client) == answer


def only_line(relay: RelayProcess) -> str:
    """What a relay that did not start has said: one line."""
    assert relay.stderr.endswith(b"\n") and relay.stderr.count(b"\n") == 1, relay.stderr.decode()
    return relay.stderr.decode().strip()


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Another program holds the database's lock."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


def query(database: Path, sql: str) -> list[tuple[object, ...]]:
    """Ask the database."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(sql).fetchall()
