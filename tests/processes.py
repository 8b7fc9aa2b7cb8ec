"""Ways to start a relay as a process, and its clients: for the tests of the program."""

from __future__ import annotations

import contextlib
import socket
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers import ENTRY, RELAY, TIMEOUT, RelayProcess, read_to_end

# Does what systemd does: passes the descriptors "N,M,..." as 3, 4, ... and executes the command.
ACTIVATE = """\
import fcntl, os, sys
fds, *command = sys.argv[1:]
old = [int(fd) for fd in fds.split(",")]
high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 1000) for fd in old]
new = range(3, 3 + len(old))
for fds in zip(high, new):
    os.dup2(*fds)
for fd in {*old, *high} - {*new}:
    os.close(fd)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(high)))
os.execv(command[0], command)
"""


def activated(
    *sockets: socket.socket, program: Sequence[str] = (sys.executable, str(ENTRY))
) -> list[str]:
    """Return a command: the relay, with these sockets passed as by systemd."""
    fds = ",".join(str(sock.fileno()) for sock in sockets)
    return [sys.executable, "-ISc", ACTIVATE, fds, *program]


class Code(str):
    """A Python expression, for a value of `patched`. The relay's module is `t`."""

    def __repr__(self) -> str:
        return str(self)


def patched(**constants: object) -> list[str]:
    """Return a command: the relay with other constants, so that a test need not wait."""
    changes = "".join(f"t.{name} = {value!r}; " for name, value in constants.items())
    return [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {str(RELAY.parent)!r}); import transit_relay as t; "
        f"{changes}sys.exit(t.main())",
    ]


def with_descriptor(fd: int, as_number: int) -> list[str]:
    """Return a command: the relay, with a passed descriptor under another number."""
    onto_it = (
        "import os, sys; program = sys.argv[3:]; "
        "os.dup2(int(sys.argv[1]), int(sys.argv[2])); os.execv(program[0], program)"
    )
    return [sys.executable, "-c", onto_it, str(fd), str(as_number), sys.executable, str(ENTRY)]


def redirected(redirections: str) -> list[str]:
    """Return a command: the relay, started by a shell with these redirections."""
    return ["sh", "-c", f'exec "$0" "$@" {redirections}', sys.executable, str(ENTRY)]


class ReachedRelay(RelayProcess):
    """A relay whose clients connect to `address`, not to the port in its start message.

    `address` may be the path of a unix socket. TCP clients connect from 127.0.0.2, which is in
    no endpoint.
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
    """A relay behind `fd:N`, a socket that listens before the relay starts.

    Clients need not wait for the start message: the socket queues them.
    """

    def __init__(self, *arguments: str, pass_fds: Sequence[int] = (), **others: Any) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            self.address = listener.getsockname()
            fd = listener.fileno()
            arguments = ("--port", f"fd:{fd}", *arguments)
            super().__init__(*arguments, pass_fds=[fd, *pass_fds], **others)


def transfer(relay: RelayProcess, data: bytes = b"some data", token: str = "pair") -> None:
    """Connect a pair, send `data` one way, and end the pair."""
    one, other = relay.pair(token)
    with one, other:
        one.sendall(data)
        one.shutdown(socket.SHUT_WR)
        assert read_to_end(other) == data


def refused(relay: RelayProcess, line: bytes, answer: bytes) -> None:
    """Connect a client that sends `line`, reads `answer` and leaves.

    Afterwards the relay has read what others sent before the call, or will have read it before
    it accepts another client.
    """
    with relay.connect() as client:
        client.sendall(line)
        assert read_to_end(client) == answer


def only_line(relay: RelayProcess) -> str:
    """Return the one line on stderr of a relay that did not start."""
    assert relay.stderr.endswith(b"\n") and relay.stderr.count(b"\n") == 1, relay.stderr.decode()
    return relay.stderr.decode().strip()


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    """Hold the lock of the database, as another program would."""
    with contextlib.closing(sqlite3.connect(database, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        yield


def query(database: Path, sql: str) -> list[tuple[object, ...]]:
    """Return the rows of a query."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        return db.execute(sql).fetchall()
