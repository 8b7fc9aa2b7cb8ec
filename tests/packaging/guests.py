"""Clients of a relay that runs in a booted system, and the records of that relay."""

from __future__ import annotations

import itertools
import json
import random
import threading
import time
from typing import Any

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
    sending = threading.Thread(target=sender.send, args=[data])
    sending.start()
    received = receiver.receive(len(data))
    sending.join()
    assert digest(received) == digest(data)


def transfer(
    there: Reachable,
    first: str = "tcp",
    second: str = "tcp",
    family: str = "IPv4",
    size: int = 4 * MEBIBYTE,
) -> None:
    """Connect a pair, send `size` bytes and a quarter of them back, and end the pair."""
    chance = random.Random(size)
    with connect(there, first, family) as one, connect(there, second, family) as other:
        send_handshakes(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"
        pass_bytes(one, other, chance.randbytes(size))
        pass_bytes(other, one, chance.randbytes(size // 4))
        one.half_close()
        assert other.read_to_end() == b""


class LongTransfer:
    """A pair that sends random bytes in both directions, in the `with` block. All must arrive.

    It pauses briefly again and again, so that the system has time for other work.
    """

    def __init__(self, there: Reachable, first: str = "tcp", second: str = "tcp") -> None:
        self._clients = connect(there, first), connect(there, second)
        self._passed = 0
        self._error: BaseException | None = None
        self._stop = False
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        one, other = self._clients
        chance = random.Random(1)
        try:
            with one, other:
                send_handshakes(one, other)
                for client in one, other:
                    assert client.receive(3) == b"ok\n"
                while not self._stop:
                    pass_bytes(one, other, chance.randbytes(MEBIBYTE // 4))
                    pass_bytes(other, one, chance.randbytes(MEBIBYTE // 16))
                    time.sleep(0.05)
                    with self._progress:
                        self._passed += 1
                        self._progress.notify()
                one.half_close()
                assert other.read_to_end() == b""
        except BaseException as error:
            with self._progress:
                self._error = error
                self._progress.notify()

    def wait_for_progress(self) -> None:
        """Wait until two more rounds are complete: one has begun after the call."""
        with self._progress:
            goal = self._passed + 2
            done = self._progress.wait_for(lambda: self._passed >= goal or self._error, TIMEOUT)
            if self._error:
                raise self._error
            assert done, f"{self._passed} rounds, then none in {TIMEOUT} s"

    def __enter__(self) -> LongTransfer:
        self._thread.start()
        self.wait_for_progress()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop = True
        self._thread.join(TIMEOUT)
        if not kind:
            assert not self._thread.is_alive()
            if self._error:
                raise self._error


ROWS = """\
import json, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.row_factory = sqlite3.Row
print(json.dumps([dict(row) for row in database.execute("SELECT * FROM usage ORDER BY rowid")]))
"""


def rows(machine: Machine) -> list[dict[str, Any]]:
    """Return the rows of the usage database. The restart makes the relay write all records."""
    machine.run("systemctl", "restart", SERVICE)
    found: list[dict[str, Any]] = json.loads(machine.python(ROWS, f"{STATE}/usage.sqlite"))
    return found


class PairAfterPair:
    """A thread that connects one pair after the other, without pause, in the `with` block.

    A refused connection is an error. A relay that stops may end the pair that it serves: the test
    checks their number, `ended_early`.
    """

    def __init__(self, machine: Machine) -> None:
        self.served = 0
        self.ended_early = 0
        self._machine = machine
        self._error: BaseException | None = None
        self._stop = False
        self._progress = threading.Condition()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            while not self._stop:
                served = self._one_pair()
                with self._progress:
                    self.served += served
                    self.ended_early += not served
                    self._progress.notify()
        except BaseException as error:
            with self._progress:
                self._error = error
                self._progress.notify()

    def _one_pair(self) -> bool:
        """Return True if the pair was served, False if its relay stopped. All else is an error."""
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

    def wait_for_served(self, more: int = 20) -> None:
        """Wait until `more` further pairs have been served."""
        with self._progress:
            goal = self.served + more
            done = self._progress.wait_for(lambda: self.served >= goal or self._error, TIMEOUT)
            if self._error:
                raise self._error
            assert done, f"{self.served} pairs served, then none in {TIMEOUT} s"

    def __enter__(self) -> PairAfterPair:
        self._thread.start()
        self.wait_for_served()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop = True
        self._thread.join(TIMEOUT)
        if self._error and not kind:
            raise self._error
