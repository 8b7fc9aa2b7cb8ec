"""Clients of a relay in a booted system or a container, and the records of that relay."""

from __future__ import annotations

import http.client
import itertools
import json
import random
import socket
import threading
import time
from typing import Any, TypeVar

from children import TIMEOUT
from helpers import Client, WebSocketClient, digest, handshake
from nspawn import Machine, Reachable

SERVICE, STATE = "transit-relay.service", "/var/lib/private/transit-relay"
PORTS = {"tcp": 4001, "ws": 4002}
MEBIBYTE = 1 << 20

# No log may contain an address of a client, a token or a side.
FAMILIES = {  # source and destination of the clients
    "IPv4": ("127.83.61.7", "127.0.0.1"),
    "IPv6": ("2001:db8:83:61::7", "2001:db8:83:61::1"),
}
TOKEN, SIDE = "never_logged_token_", "unseen_side_"  # prefixes
SECRETS = [TOKEN, SIDE, *(source for source, _ in FAMILIES.values())]

_numbers = itertools.count(1)


class Instance(Reachable):
    """An instance of transit-relay@.service. Its clients send PROXY headers, as HAProxy does."""

    def __init__(self, machine: Machine, name: str) -> None:
        self.service = f"transit-relay@{name}.service"
        self.socket = f"transit-relay@{name}.socket"
        self.state = f"{STATE}-{name}"
        self._path = machine.path(f"/run/transit-relay-{name}.sock")

    def connect(self, host: str, port: int, source: str) -> socket.socket:
        """Connect to its unix socket, and send a PROXY header with these addresses."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(TIMEOUT)
        client.connect(str(self._path))
        client.sendall(
            f"PROXY TCP{6 if ':' in host else 4} {source} {host} 40000 {port}\r\n".encode()
        )
        return client


def prepare(there: Reachable) -> None:
    """Add the addresses that a new network does not have."""
    for address in FAMILIES["IPv6"]:
        there.add_address(address)


def connect(there: Reachable, kind: str = "tcp", family: str = "IPv4") -> Client:
    """Connect a client. A WebSocket client has requested its upgrade."""
    source, host = FAMILIES[family]
    sock = there.connect(host, PORTS[kind], source)
    client = WebSocketClient(sock) if kind == "ws" else Client(sock)
    sock.settimeout(TIMEOUT)
    return client


def handshakes(count: int) -> list[bytes]:
    """Return handshakes with the same new token."""
    token = f"{TOKEN}{next(_numbers)}_"
    return [handshake(token, f"{SIDE}{number}") for number in range(count)]


def send_handshakes(*clients: Client) -> None:
    """Send handshakes that make the two clients a pair."""
    for client, line in zip(clients, handshakes(len(clients))):
        client.send(line)


def pass_bytes(sender: Client, receiver: Client, data: bytes) -> None:
    """Send bytes. All of them must arrive."""
    errors: list[BaseException] = []

    def send() -> None:
        try:
            sender.send(data)
        except BaseException as error:
            errors.append(error)

    sending = threading.Thread(target=send, daemon=True)
    sending.start()
    try:
        received = receiver.receive(len(data))
    finally:
        sending.join(TIMEOUT)
        if errors:
            raise errors[0]
    assert not sending.is_alive()
    assert digest(received) == digest(data)


def transfer(
    there: Reachable,
    first: str = "tcp",
    second: str = "tcp",
    family: str = "IPv4",
    size: int = 4 * MEBIBYTE,
) -> None:
    """Connect a pair, send `size` bytes, then a quarter as many back, and end the pair."""
    chance = random.Random(size)
    with connect(there, first, family) as one, connect(there, second, family) as other:
        send_handshakes(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"
        pass_bytes(one, other, chance.randbytes(size))
        pass_bytes(other, one, chance.randbytes(size // 4))
        one.half_close()
        assert other.read_to_end() == b""


def get(sock: socket.socket, path: str) -> tuple[int, str]:
    """Send an HTTP request and close the socket. Return status and text of the answer."""
    with sock:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = sock
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()


class Working:
    """A thread that works in the `with` block, and counts its rounds. Its error fails the test."""

    def __init__(self) -> None:
        self.rounds = 0  # the complete ones
        self.stop = False  # the thread is to end
        self._error: BaseException | None = None
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def work(self) -> None:
        """Work until `stop` is set, and call `count` for each round."""
        raise NotImplementedError

    def count(self) -> None:
        """Count a round."""
        with self._progress:
            self.rounds += 1
            self._progress.notify()

    def _run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            with self._progress:
                self._error = error
                self._progress.notify()

    def wait_for_rounds(self, more: int = 2) -> None:
        """Wait until `more` further rounds are complete. With two, one has begun after the call."""
        with self._progress:
            goal = self.rounds + more
            done = self._progress.wait_for(lambda: self.rounds >= goal or self._error, TIMEOUT)
            if self._error:
                raise self._error
            assert done, f"{self.rounds} rounds, then none in {TIMEOUT} s"

    def __enter__(self: Worker) -> Worker:
        self._thread.start()
        self.wait_for_rounds(2)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.stop = True
        self._thread.join(TIMEOUT)
        if not kind:
            assert not self._thread.is_alive()
            if self._error:
                raise self._error


Worker = TypeVar("Worker", bound=Working)


class LongTransfer(Working):
    """A pair that sends random bytes in both directions. All must arrive.

    It pauses briefly again and again, so that the system has time for other work.
    """

    def __init__(self, there: Reachable, first: str = "tcp", second: str = "tcp") -> None:
        super().__init__()
        self._clients = connect(there, first), connect(there, second)

    def work(self) -> None:
        one, other = self._clients
        chance = random.Random(1)
        with one, other:
            send_handshakes(one, other)
            for client in one, other:
                assert client.receive(3) == b"ok\n"
            while not self.stop:
                pass_bytes(one, other, chance.randbytes(MEBIBYTE // 4))
                pass_bytes(other, one, chance.randbytes(MEBIBYTE // 16))
                time.sleep(0.05)
                self.count()
            one.half_close()
            assert other.read_to_end() == b""


ROWS = """\
import json, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.row_factory = sqlite3.Row
print(json.dumps([dict(row) for row in database.execute("SELECT * FROM usage ORDER BY rowid")]))
"""


def rows(machine: Machine, service: str = SERVICE, state: str = STATE) -> list[dict[str, Any]]:
    """Return the rows of the usage database. The restart makes the relay write all records."""
    machine.run("systemctl", "restart", service)
    found: list[dict[str, Any]] = json.loads(machine.python(ROWS, f"{state}/usage.sqlite"))
    return found


class PairAfterPair(Working):
    """Connects one pair after the other, with hardly a pause between two.

    A refused connection is an error. A relay that stops may end the pair that it serves. The test
    checks how many pairs `ended_early`.
    """

    def __init__(self, machine: Machine) -> None:
        super().__init__()
        self.ended_early = 0
        self._machine = machine

    def work(self) -> None:
        while not self.stop:
            if self._one_pair():
                self.count()
            else:
                self.ended_early += 1
            time.sleep(0.01)  # so that the system has time for other work

    def _one_pair(self) -> bool:
        """Return True if the pair was served, False if its connections ended early."""
        with connect(self._machine) as one, connect(self._machine) as other:
            try:
                send_handshakes(one, other)
                for client in one, other:
                    if not self._receives(client, b"ok\n"):
                        return False
                one.send(b"hello")
                return self._receives(other, b"hello")
            except ConnectionError:
                return False

    @staticmethod
    def _receives(client: Client, expected: bytes) -> bool:
        """Return True if the client receives these bytes, False if the end comes before."""
        while expected and (part := client.read(len(expected))):
            assert expected.startswith(part), part
            expected = expected[len(part) :]
        return not expected
