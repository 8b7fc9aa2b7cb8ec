"""Clients of a relay that runs in a booted system, and what it has recorded of them."""

from __future__ import annotations

import itertools
import json
import random
import threading
from typing import Any

from children import TIMEOUT
from helpers import Client, WebSocketClient, digest, handshake
from nspawn import Machine, Reachable

SERVICE, STATE = "transit-relay.service", "/var/lib/private/transit-relay"
PORTS = {"tcp": 4001, "ws": 4002}
MEBIBYTE = 1 << 20

# Where clients come from, and where they go to, in either family; and how all tokens and sides
# begin. None of it may be found in a log.
FAMILIES = {
    "IPv4": ("127.83.61.7", "127.0.0.1"),
    "IPv6": ("2001:db8:83:61::7", "2001:db8:83:61::1"),
}
TOKEN, SIDE = "never_logged_token_", "unseen_side_"
SECRETS = [TOKEN, SIDE, *(source for source, _ in FAMILIES.values())]

_numbers = itertools.count(1)


def prepare(there: Reachable) -> None:
    """Give it the addresses that it has not anyway."""
    for address in FAMILIES["IPv6"]:
        there.add_address(address)


def connect(there: Reachable, kind: str = "tcp", family: str = "IPv4") -> Client:
    """A client that has connected (a WebSocket has asked for its upgrade)."""
    source, host = FAMILIES[family]
    sock = there.connect(host, PORTS[kind], source)
    client = WebSocketClient(sock) if kind == "ws" else Client(sock)
    sock.settimeout(TIMEOUT)
    return client


def introduce(*clients: Client) -> None:
    """Two clients say what makes them a pair."""
    token = f"{TOKEN}{next(_numbers)}_"
    for number, client in enumerate(clients):
        client.send(handshake(token, f"{SIDE}{number}"))


def pass_bytes(sender: Client, receiver: Client, data: bytes) -> None:
    """All of it must arrive."""
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
    """The whole life of a pair: so much there, a quarter of it back, and the end."""
    chance = random.Random(size)
    with connect(there, first, family) as one, connect(there, second, family) as other:
        introduce(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"
        pass_bytes(one, other, chance.randbytes(size))
        pass_bytes(other, one, chance.randbytes(size // 4))
        one.half_close()
        assert other.read_to_end() == b""


ROWS = """\
import json, sqlite3, sys
database = sqlite3.connect(sys.argv[1])
database.row_factory = sqlite3.Row
print(json.dumps([dict(row) for row in database.execute("SELECT * FROM usage ORDER BY rowid")]))
"""


def rows(machine: Machine) -> list[dict[str, Any]]:
    """What the usage database has, once the relay has written all it knows."""
    machine.run("systemctl", "restart", SERVICE)
    found: list[dict[str, Any]] = json.loads(machine.python(ROWS, f"{STATE}/usage.sqlite"))
    return found


class Knocking:
    """Pairs that come one after the other, as fast as they can, in the `with` block.

    Nobody may find the door closed. Who is in the hands of a relay that stops is sent away by
    it: that is for the test to judge, by `sent_away`.
    """

    def __init__(self, machine: Machine) -> None:
        self.served = 0
        self.sent_away = 0
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
                    self.sent_away += not served
                    self._progress.notify()
        except BaseException as error:
            with self._progress:
                self._error = error
                self._progress.notify()

    def _one_pair(self) -> bool:
        """Whether it was served; False: its relay stopped. Anything else is an error."""
        with connect(self._machine) as one, connect(self._machine) as other:
            try:
                introduce(one, other)
                for client in one, other:
                    if not self._hears(client, b"ok\n"):
                        return False
                one.send(b"hello")
                return self._hears(other, b"hello")
            except ConnectionError:
                return False

    @staticmethod
    def _hears(client: Client, expected: bytes) -> bool:
        """Whether it gets that, or (False) the end before."""
        while expected and (part := client.read(len(expected))):
            assert expected.startswith(part), part
            expected = expected[len(part) :]
        return not expected

    def wait_for_served(self, more: int = 20) -> None:
        """Wait until so many more pairs have been served."""
        with self._progress:
            goal = self.served + more
            done = self._progress.wait_for(lambda: self.served >= goal or self._error, TIMEOUT)
            if self._error:
                raise self._error
            assert done, f"{self.served} pairs served, then none in {TIMEOUT} s"

    def __enter__(self) -> Knocking:
        self._thread.start()
        self.wait_for_served()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._stop = True
        self._thread.join(TIMEOUT)
        if self._error and not kind:
            raise self._error
