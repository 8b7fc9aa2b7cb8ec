"""Four relays behind two HAProxies and two gateways, by the recipe for many relays.

All run on the host "server", see netns.py. Each HAProxy has an address there. A gateway for
WebSocket clients has the same address, and connects to this HAProxy. The two clients of a pair come
from two hosts, in most tests over different HAProxies. Two relays listen on unix sockets, as the
instances of transit-relay@.service do, and two on ports. HAProxy sends the clients' addresses to
the relays. A gateway sends the addresses of WebSocket clients to HAProxy. The relays allow only the
two hosts.

RELAY_GROWING_PAIRS is the number of pairs in the first test.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import netns
import pytest
from children import TIMEOUT, Child, Record, Relay
from reloads import reload
from stage import BAD, BINARY, CLOSE, OK, PING, UPGRADE, frame, handshake
from test_browser import SIZE as PAGE_SIZE
from test_browser import Browser, PageServer, client_digests, hellos
from test_proxies import (
    HOST,
    PACKAGING,
    SIZE,
    Front,
    Group,
    TCPClient,
    WebClient,
    address_of,
    assert_crossed,
    listener,
    plain_environment,
    recipe,
    substitute,
)
from transfers import MEBIBYTE, PROGRAMS, Transfer, client_programs

RECIPE = PACKAGING / "haproxy" / "transit-relay-many.cfg"
PAIRS = int(os.environ.get("RELAY_GROWING_PAIRS", "300"))
RUNNING = 32  # pairs that transfer during an event
WAITING = 60  # clients that wait for their partner during an event
RELAYS = (1, 2, 3, 4)
PROXIES = {"one": netns.SERVER, "two": netns.OTHER}
# The transports of the first and of the second client of a pair. Each transport is used by the
# first and by the second client.
DIRECTIONS = [*itertools.product(["tcp", "websocket"], repeat=2)]
PORTS = {"tcp": 4001, "websocket": 4002}  # of a HAProxy, and of a gateway
POLL_SECONDS = 0.05  # HAProxy reports no changes, so it is asked at this interval
HOSTS = ("a", "b")

_NEW_NETWORK = 0x40000000  # CLONE_NEWNET
_libc = ctypes.CDLL(None, use_errno=True)


# Clients.


def _move_to_network(fd: int) -> None:
    """Move this thread to a network, for its new sockets. (os.setns needs Python 3.12.)"""
    if _libc.setns(fd, _NEW_NETWORK):
        raise OSError(ctypes.get_errno(), "setns")


def connect(host: str, proxy: str, port: int = PORTS["tcp"]) -> socket.socket:
    """Connect from a host to the address of one of the HAProxies."""
    with open("/proc/thread-self/ns/net") as here:
        with open(f"/run/netns/{netns.namespace(host)}") as there:
            _move_to_network(there.fileno())
        try:
            client = socket.create_connection((PROXIES[proxy], port), TIMEOUT)
        finally:
            _move_to_network(here.fileno())
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return client


def receive(client: socket.socket, size: int) -> bytes:
    """Return the next bytes, less than `size` of them if the connection ends."""
    data = b""
    while len(data) < size and (part := client.recv(size - len(data))):
        data += part
    return data


class Client:
    """A TCP client, connected to one of the HAProxies."""

    transport = "tcp"
    code: int | None = None  # of the Close that was received

    def __init__(self, host: str, proxy: str) -> None:
        self.socket = connect(host, proxy, PORTS[self.transport])

    def encode(self, data: bytes) -> bytes:
        """Return what goes over the connection for these bytes."""
        return data

    def decode(self, received: bytes) -> bytes:
        """Return the payload that is complete with these bytes."""
        return received

    def send(self, data: bytes) -> None:
        self.socket.sendall(self.encode(data))

    def receive(self, size: int) -> bytes:
        """Return the next bytes of the payload, less than `size` of them if the client is ended.

        The partner sends no more than these bytes.
        """
        data = b""
        while len(data) < size and self.code is None and (part := self.socket.recv(1 << 16)):
            data += self.decode(part)
        return data

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


class WebSocketClient(Client):
    """A WebSocket client, connected to one of the gateways."""

    transport = "websocket"

    def __init__(self, host: str, proxy: str) -> None:
        super().__init__(host, proxy)
        self._partial = bytearray()  # received, but not yet a whole frame
        self.socket.sendall(UPGRADE.format(key="dGhlIHNhbXBsZSBub25jZQ==").encode())
        answer = b""
        while not answer.endswith(b"\r\n\r\n"):
            part = self.socket.recv(1)
            assert part, answer
            answer += part
        assert answer.startswith(b"HTTP/1.1 101 "), answer

    def encode(self, data: bytes) -> bytes:
        return frame(BINARY, data)

    def decode(self, received: bytes) -> bytes:
        self._partial += received
        payload = b""
        while (found := self._take_frame()) is not None:
            opcode, content = found
            if opcode == 0x80 | CLOSE:
                self.code = int.from_bytes(content, "big")
            # Pings need no answer here: the gateway waits for several before it ends a client.
            elif opcode != 0x80 | PING:
                assert opcode == 0x80 | BINARY, f"opcode {opcode:#x}"
                payload += content
        return payload

    def _take_frame(self) -> tuple[int, bytes] | None:
        """Take the first byte and the payload of a frame. Return None if none is whole."""
        data = self._partial
        if len(data) < 2:
            return None
        start = {126: 4, 127: 10}.get(data[1], 2)
        size = data[1] if start == 2 else int.from_bytes(data[2:start], "big")
        if len(data) < start + size:
            return None
        found = data[0], bytes(data[start : start + size])
        del data[: start + size]
        return found


CLIENTS = {kind.transport: kind for kind in (Client, WebSocketClient)}


class Pair:
    """Two clients of one token. The first is connected at the creation, over HAProxy one."""

    def __init__(
        self,
        name: str,
        stack: ExitStack,
        second: str = "two",
        transports: tuple[str, str] = ("tcp", "tcp"),
    ) -> None:
        """`second`: the HAProxy of the second half. `stack` closes both."""
        self.name = name
        self.transports = transports
        self._stack = stack
        self._second = second
        self.clients = [self._connect("a", "one")]

    def complete(self) -> None:
        """Connect the second half."""
        self.clients.append(self._connect("b", self._second))

    def meets(self) -> bool:
        """Return whether both clients get `ok`, and each the bytes of the other."""
        if [client.receive(len(OK)) for client in self.clients] != [OK, OK]:
            return False
        one, other = self.clients
        one.send(b"from one")
        other.send(b"from the other")
        return other.receive(8) == b"from one" and one.receive(14) == b"from the other"

    def _connect(self, host: str, proxy: str) -> Client:
        number = HOSTS.index(host)
        client = self._stack.enter_context(CLIENTS[self.transports[number]](host, proxy))
        client.send(handshake(self.name, str(number)))
        return client


def missed(pairs: Sequence[Pair]) -> list[str]:
    """Complete the pairs, and return the names of those that do not meet."""
    for pair in pairs:
        pair.complete()
    return [pair.name for pair in pairs if not pair.meets()]


class Transfers:
    """Pairs that send bulk in both directions, in a thread, until the end of the `with` block."""

    CHUNK = 128 << 10  # bytes

    def __init__(self, pairs: Sequence[Pair]) -> None:
        """`pairs` have met."""
        self._pairs = pairs
        self.rounds = dict.fromkeys(range(len(pairs)), 0)  # a chunk each way
        self.ended: set[int] = set()  # pairs that the server ended
        self._is_stopping = False
        self._faults: list[BaseException] = []
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._main)

    def progress(self) -> None:
        """Wait until each pair that has not ended has transferred two more chunks each way.

        The first of them may have been on its way before the call.
        """
        before = dict(self.rounds)

        def is_reached() -> bool:
            return bool(self._faults) or all(
                number in self.ended or self.rounds[number] >= before[number] + 2
                for number in before
            )

        with self._changed:
            assert self._changed.wait_for(is_reached, TIMEOUT), "the transfers do not progress"
        assert not self._faults

    def await_ended(self, count: int) -> None:
        """Wait until so many pairs have ended. No other pair may end."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.ended) >= count, TIMEOUT)
        self.progress()
        assert len(self.ended) == count

    def _main(self) -> None:
        asyncio.run(self._all())

    async def _all(self) -> None:
        await asyncio.gather(*(self._transfer(*numbered) for numbered in enumerate(self._pairs)))

    async def _transfer(self, number: int, pair: Pair) -> None:
        chance = random.Random(number)
        loop = asyncio.get_running_loop()
        for client in pair.clients:
            client.socket.setblocking(False)
        try:
            while not self._is_stopping:
                data = chance.randbytes(self.CHUNK)
                for sender, receiver in (pair.clients, reversed(pair.clients)):
                    encoded = sender.encode(data)
                    sending = loop.create_task(loop.sock_sendall(sender.socket, encoded))
                    received = bytearray()
                    while len(received) < len(data):
                        part = await loop.sock_recv(receiver.socket, len(data))
                        received += receiver.decode(part)
                        if not part or receiver.code is not None:
                            sending.cancel()
                            raise ConnectionResetError
                    await sending
                    assert received == data
                with self._changed:
                    self.rounds[number] += 1
                    self._changed.notify_all()
        except ConnectionError:
            with self._changed:
                self.ended.add(number)
                self._changed.notify_all()
        except BaseException as fault:
            with self._changed:
                self._faults.append(fault)
                self._changed.notify_all()

    def __enter__(self) -> Transfers:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._is_stopping = True
        self._thread.join(TIMEOUT)
        if not kind:
            assert not self._thread.is_alive()
            assert not self._faults


# The service.


class BackRelay(Relay):
    """One of the relays."""

    def __init__(
        self, our_relay: Sequence[str], endpoint: str, status: Path, *options: str
    ) -> None:
        """`status`: the unix socket of its status listener."""
        self._status = status
        options = (f"--status=unix:{status}", *options)
        allowed = [f"--allow={address}" for address in netns.CLIENTS.values()]
        command = [*our_relay, f"--port=haproxy:{endpoint}", *allowed, *options]
        # The number in the name of the socket, or the port.
        announced = r"^Transit starting on haproxy:(?:unix:\S+-|tcp:)(\d+)"
        super().__init__(netns.inside("server", command), announced)

    def waiting_now(self) -> int:
        """Return how many clients wait for a partner."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(self._status))
            sock.sendall(b"GET /status.json HTTP/1.0\r\n\r\n")
            _, _, body = receive(sock, 1 << 24).partition(b"\r\n\r\n")
        return int(json.loads(body)["waiting_clients"])


class Gateway(Child):
    """A gateway at the address of a HAProxy, which connects to this HAProxy."""

    def __init__(self, our_relay: Sequence[str], target: str, *options: str) -> None:
        command = [*our_relay, f"--forward=haproxy:{target}", *options]
        super().__init__(netns.inside("server", command))
        try:
            self.lines.until("^Transit starting on ")
        except AssertionError:
            self.__exit__()
            raise


def wait_until(what: str, is_so: Callable[[], bool]) -> None:
    """Wait until something is so. `what`: for the failure."""
    deadline = time.monotonic() + TIMEOUT
    while not is_so():
        assert time.monotonic() < deadline, what
        time.sleep(POLL_SECONDS)


def listening_sockets(proxy: str, port: int) -> list[str]:
    """Return the inodes of the sockets that listen at the address of a HAProxy."""
    condition = f"src {PROXIES[proxy]} and sport = :{port}"
    command = netns.inside("server", ["ss", "-tlnHe", condition])
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r" ino:(\d+)", done.stdout)


class ProxyProcess(Group):
    """A HAProxy without a master process. Its configuration is haproxy.cfg in its folder."""

    def __init__(
        self, program: Path, folder: Path, *options: str, env: Mapping[str, str] | None = None
    ) -> None:
        """`options`: further ones of the command line."""
        self.folder = folder
        command = [str(program), *(options or ["-db"]), "-f", "haproxy.cfg"]
        env = {**plain_environment(folder), **(env or {})}
        super().__init__(netns.inside("server", command), cwd=folder, env=env)
        try:
            self.await_ready()
        except BaseException:
            self.__exit__()
            raise

    def await_ready(self) -> None:
        """Wait until it listens. It sends no notice of that."""
        pid = f"\nPid: {self.pid}\n"

        def answers() -> bool:
            assert self.is_running(), "\n".join(self.lines.rest())
            try:
                return pid in self.ask("show info")
            except (FileNotFoundError, ConnectionError):
                return False

        wait_until("HAProxy listens", answers)

    def ask(self, command: str) -> str:
        """Send a command to its socket, and return the answer."""
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(self.folder / "admin.sock"))
            sock.sendall(f"{command}\n".encode())
            return receive(sock, 1 << 24).decode()

    def statistics(self, field: str) -> dict[int, str]:
        """Return a field of the statistics of each relay."""
        head, *rows = [line.split(",") for line in self.ask("show stat").splitlines() if line]
        of_servers = [row for row in rows if row[0] == "relays" and row[1] != "BACKEND"]
        return {int(row[1].removeprefix("relay")): row[head.index(field)] for row in of_servers}

    def clients(self) -> int:
        """Return how many clients are connected."""
        (row,) = re.findall(r"(?m)^clients,FRONTEND,,,(\d+),", self.ask("show stat"))
        return int(row)

    def table(self) -> dict[str, str]:
        """Return the name of the relay of each token, whose key is a hash."""
        entries = re.findall(r" key=(\d+) .* server_key=(\w+)", self.ask("show table relays"))
        return dict(entries)

    def tokens(self) -> int:
        """Return how many tokens its table has."""
        found = re.search(r"used:(\d+)", self.ask("show table relays"))
        assert found
        return int(found[1])

    def has_synchronised(self) -> bool:
        """Return whether its table is complete. A reload hands the table over only then."""
        found = re.search(r"flags=0x([0-9a-f]+)", self.ask("show peers"))
        assert found
        return int(found[1], 16) & 3 == 3  # with the local peer, and with the remote one


class HAProxy(ProxyProcess):
    """One of the HAProxies, started and reloaded as the unit of Debian's package does it."""

    def __init__(self, program: Path, folder: Path) -> None:
        """It listens when this returns."""
        self._notices = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        # A path, because names without one belong to a network.
        self._notices.bind(str(folder / "notices"))
        self._notices.settimeout(TIMEOUT)
        env = {"NOTIFY_SOCKET": self._notices.getsockname()}
        super().__init__(program, folder, "-Ws", env=env)

    def await_ready(self) -> None:
        """Wait until HAProxy tells its service manager that it listens."""
        while b"READY=1" not in self._notices.recv(1 << 16):
            pass

    def is_ready(self) -> bool:
        """Return whether HAProxy has told its service manager that it listens.

        This takes the notices.
        """
        self._notices.setblocking(False)
        try:
            self.await_ready()
        except BlockingIOError:
            return False
        finally:
            self._notices.settimeout(TIMEOUT)
        return True

    def begin_reload(self) -> None:
        """Save the states of the relays, and send the signal."""
        (self.folder / "servers").write_text(self.ask("show servers state"))
        os.kill(self.pid, signal.SIGUSR2)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._notices.close()


class Service:
    """The relays, by number, and the HAProxies and the gateways before them, by name."""

    def __init__(
        self,
        relays: dict[int, BackRelay],
        proxies: dict[str, HAProxy],
        gateways: dict[str, Gateway],
    ) -> None:
        self.relays = relays
        self.proxies = proxies
        self.gateways = gateways

    def wait_until(self, what: str, is_so: Callable[[HAProxy], bool]) -> None:
        """Wait until something is so for both HAProxies. `what`: for the failure."""
        wait_until(what, lambda: all(is_so(proxy) for proxy in self.proxies.values()))

    def share_tokens(self, count: int) -> None:
        """Wait until both HAProxies know so many tokens."""
        self.wait_until(f"{count} tokens in both tables", lambda proxy: proxy.tokens() == count)

    def set_state(self, relay: int, state: str) -> None:
        for proxy in self.proxies.values():
            assert proxy.ask(f"set server relays/relay{relay} state {state}") == "\n"

    def clients_now(self, relay: int) -> int:
        """Return how many clients of a relay are connected."""
        return sum(int(proxy.statistics("scur")[relay]) for proxy in self.proxies.values())

    def clients_so_far(self, relay: int) -> int:
        """Return how many clients a relay has had from both HAProxies."""
        return sum(int(proxy.statistics("stot")[relay]) for proxy in self.proxies.values())

    def waiting(self, name: str, count: int, stack: ExitStack, second: str = "two") -> list[Pair]:
        """Connect first halves over HAProxy one, and wait until both know their tokens.

        `second`: the HAProxy of the second halves. The pairs have all DIRECTIONS.
        """
        before = self.proxies["two"].tokens()
        directions = itertools.islice(itertools.cycle(DIRECTIONS), count)
        pairs = [
            Pair(f"{name} {number}", stack, second, transports)
            for number, transports in enumerate(directions)
        ]
        self.share_tokens(before + count)
        return pairs

    def meeting(self, name: str, count: int, stack: ExitStack) -> list[Pair]:
        """Return pairs that have met."""
        pairs = self.waiting(name, count, stack)
        assert missed(pairs) == []
        return pairs

    def stop(self) -> dict[int, list[Record]]:
        """Stop the gateways, which must have lost no client, and the relays.

        Return the records of each relay.
        """
        for gateway in self.gateways.values():
            assert gateway.terminate() == 0, str(gateway.lines)
            messages = [
                line for line in gateway.lines.rest() if re.match("(warning|error): ", line)
            ]
            assert messages == []
        for relay in self.relays.values():
            assert relay.terminate() == 0, str(relay.lines)
        return {number: relay.last_records() for number, relay in self.relays.items()}


def configuration(name: str, folder: Path, **changes: str) -> str:
    """Return the recipe for one of the HAProxies. Its part for two HAProxies is switched on.

    The second one has the servers in the opposite order: their ids count, not their places.
    """
    ours = {
        "    user haproxy\n    group haproxy\n": "",  # who may not enter this folder
        "socket /run/haproxy/": f"socket {folder}/",
        "server-state-file /run/haproxy/": f"server-state-file {folder}/",
        "localpeer one": f"localpeer {name}",
        "    peer one 127.0.0.1:10000\n": "",
        "#peer one 192.0.2.1:": f"peer one {PROXIES['one']}:",
        "#peer two 192.0.2.2:": f"peer two {PROXIES['two']}:",
        "bind :::4001 v4v6": f"bind {PROXIES[name]}:4001",
        "#bind unix@/run/haproxy/gateways.sock": f"bind unix@{folder}/gateways.sock",
        "#bind :::4004 v4v6": f"bind {PROXIES[name]}:4004",
        "/run/transit-relay-1.sock": f"{folder.parent}/relay-1",
        "/run/transit-relay-2.sock": f"{folder.parent}/relay-2",
        "#server relay3 192.0.2.13:4003": "server relay3 127.0.0.1:4003",
        "#server relay4 192.0.2.14:4003": "server relay4 127.0.0.1:4004",
    }
    text = substitute(RECIPE.read_text(encoding="utf-8"), {**ours, **changes})
    if name == "two":
        servers = re.compile(r"(?m)^    server relay\d .*$")
        last_first = reversed(servers.findall(text))
        text = servers.sub(lambda _: next(last_first), text)
    return text


def configure(name: str, folder: Path, **changes: str) -> Path:
    """Return a folder for one of the HAProxies, with its configuration."""
    own = folder / name
    own.mkdir()
    (own / "haproxy.cfg").write_text(configuration(name, own, **changes))
    return own


@contextlib.contextmanager
def running_relays(
    our_relay: Sequence[str], folder: Path, *options: str
) -> Iterator[dict[int, BackRelay]]:
    """Run the relays, with further options."""
    with ExitStack() as stack:
        relays = {}
        for number in RELAYS:
            unix = f"unix:{folder}/relay-{number}"
            endpoint = unix if number < 3 else f"tcp:{4000 + number}:interface=127.0.0.1"
            status = folder / f"status-{number}"
            relays[number] = stack.enter_context(BackRelay(our_relay, endpoint, status, *options))
        yield relays


@contextlib.contextmanager
def running_service(
    our_relay: Sequence[str],
    haproxy: Path,
    folder: Path,
    *options: str,
    port: int = PORTS["websocket"],
    **changes: str,
) -> Iterator[Service]:
    """Run the relays, with further options, and the HAProxies, with changes of the recipe.

    Run the gateways, which accept TCP and WebSocket clients at `port`.
    """
    with ExitStack() as stack:
        relays = stack.enter_context(running_relays(our_relay, folder, *options))
        proxies = {
            name: stack.enter_context(HAProxy(haproxy, configure(name, folder, **changes)))
            for name in PROXIES
        }
        targets = {"one": f"unix:{folder}/one/gateways.sock", "two": f"tcp:{PROXIES['two']}:4004"}
        gateways = {
            name: stack.enter_context(
                Gateway(our_relay, target, f"--port=tcp:{port}:interface={PROXIES[name]}")
            )
            for name, target in targets.items()
        }
        yield Service(relays, proxies, gateways)


@pytest.fixture
def service(hosts: None, our_relay: list[str], haproxy: Path, tmp_path: Path) -> Iterator[Service]:
    with running_service(our_relay, haproxy, tmp_path) as service:
        yield service


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Close the clients of a test."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def many_files() -> Iterator[None]:
    """Allow this process as many open files as the system allows."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


# What both clients of a token must get.

TOKEN_END = 13 + 64  # bytes of a handshake
JUNK = {
    b"hello\n": BAD,
    b"please relay\n": BAD,
    b"p\n": BAD,
    b"\n": BAD,
    b"\x16\x03\x01" + bytes(200) + b"\n": BAD,
    b"please relay " + b"z" * 63 + b"-\n": BAD,
    b"please relay " + b"z" * 400 + b"\n": BAD,
    b"GET / HTTP/1.1\r\nHost: relay.example.org\r\n\r\n": b"HTTP/1.1 200 OK\r\n",
}


def odd_pieces(line: bytes, chance: random.Random, start: int = 0) -> list[bytes]:
    """Cut a handshake in three, often beside a place where HAProxy or the relay decides.

    `start`: bytes before the handshake, the head of its frame.
    """
    borders = [1, *(start + end for end in (TOKEN_END - 1, TOKEN_END, TOKEN_END + 1))]
    borders += [start, len(line) - 1] if start else [len(line) - 1]
    anywhere = range(1, len(line))
    first, second = sorted([chance.choice(borders), chance.choice(anywhere)])
    return [line[:first], line[first:second], line[second:]]


@pytest.mark.usefixtures("many_files")
def test_every_pair_meets(service: Service, stack: ExitStack) -> None:
    """All first pieces are sent before the second ones, so handshakes are completed late."""
    chance = random.Random(1)
    clients = []
    for number in range(2 * PAIRS):
        host, proxy = HOSTS[number % 2], list(PROXIES)[number % 2]
        transport = DIRECTIONS[number // 2 % len(DIRECTIONS)][number % 2]
        client = stack.enter_context(CLIENTS[transport](host, proxy))
        line = handshake(f"pair {number // 2}", str(number % 2))
        encoded = client.encode(line)
        clients.append((client, odd_pieces(encoded, chance, len(encoded) - len(line))))
    junk = [*JUNK.items()] * (PAIRS // 50)
    chance.shuffle(junk)
    for piece in range(3):
        for client, pieces in clients:
            client.socket.sendall(pieces[piece])
        if piece < 2:  # among clients whose handshake is incomplete
            for line, answer in junk:
                with connect(chance.choice(HOSTS), chance.choice(list(PROXIES))) as other:
                    other.sendall(line)
                    assert receive(other, len(answer)) == answer, line
        chance.shuffle(clients)
    for client, _ in clients:
        assert client.receive(len(OK)) == OK
    stack.close()
    records = service.stop()
    moods = [record.mood for found in records.values() for record in found]
    bad = sum(answer == BAD for _, answer in 2 * junk)
    assert sorted(moods) == ["errory"] * bad + ["happy"] * PAIRS
    for number in RELAYS:
        share = sum(record.mood == "happy" for record in records[number])
        assert share > PAIRS / 16, f"relay {number} of {len(RELAYS)}"


def test_a_first_line_that_never_ends(
    hosts: None, our_relay: list[str], haproxy: Path, tmp_path: Path
) -> None:
    changes = {"inspect-delay 60s": "inspect-delay 1s"}
    with running_service(our_relay, haproxy, tmp_path, **changes) as service:
        with connect("a", "one") as client:
            client.sendall(b"please relay 0123")
            assert client.recv(1) == b""
        assert service.stop() == {number: [] for number in RELAYS}


@pytest.mark.parametrize("has_ids", [True, False])
def test_an_id_is_the_place_of_a_relay(
    has_ids: bool,
    hosts: None,
    our_relay: list[str],
    haproxy: Path,
    tmp_path: Path,
    stack: ExitStack,
) -> None:
    """The HAProxies have the relays in another order, and do not share the table of tokens."""
    changes = {"expire 1d peers haproxies": "expire 1d"}
    if not has_ids:
        changes |= {f" id {number}\n": "\n" for number in RELAYS}
    with running_service(our_relay, haproxy, tmp_path, **changes) as service:
        pairs = [Pair(f"token {number}", stack) for number in range(WAITING)]
        for pair in pairs:
            pair.complete()
        service.share_tokens(WAITING)
        one, two = (proxy.table() for proxy in service.proxies.values())
        assert one.keys() == two.keys()
        assert len(set(one.values())) == len(RELAYS)
        assert (one == two) == has_ids
        if has_ids:
            assert all(pair.meets() for pair in pairs)


@pytest.mark.parametrize("way", ["HAProxy", "gateway"])
def test_real_clients(
    way: str,
    our_relay: list[str],
    haproxy: Path,
    python_tools: Path,
    go_client: Path,
    mailbox: str,
    tmp_path: Path,
) -> None:
    """Each of the client programs sends to each, with tokens of several relays.

    Their relay is at port 4001, where either the HAProxies or the gateways listen.
    """
    programs = client_programs(python_tools, go_client)
    kinds = [*itertools.product(PROGRAMS, PROGRAMS)] * 2 + [("go", "go")] * 4
    transfers = [
        Transfer(mailbox, tmp_path / f"transfer-{number}", (1 + number) * MEBIBYTE)
        for number in range(len(kinds))
    ]
    options: dict[str, Any] = {"port": PORTS["tcp"], "bind :::4001 v4v6": ""}
    with running_service(
        our_relay, haproxy, tmp_path, **(options if way == "gateway" else {})
    ) as service:
        with ExitStack() as running:
            for transfer, (sender, receiver) in zip(transfers, kinds):
                transfer.start(running, programs[sender], programs[receiver])
            for transfer in transfers:
                transfer.finish()
        happy = {
            number: [record.total_bytes for record in records if record.mood == "happy"]
            for number, records in service.stop().items()
        }
    carried = sorted(size for sizes in happy.values() for size in sizes)
    assert len(carried) == len(transfers)
    assert all(size >= transfer.size for size, transfer in zip(carried, transfers))
    assert sum(bool(sizes) for sizes in happy.values()) >= 2


def test_one_haproxy_can_have_both_recipes(
    haproxy: Path, certificate: Path, tmp_path: Path
) -> None:
    """That for many relays, with all that is commented out for gateways, and that for TLS."""
    many = RECIPE.read_text(encoding="utf-8").replace("    #bind ", "    bind ")
    assert many.count(" accept-proxy\n") == 2
    own = {"/etc/haproxy/relay.example.org.pem": str(certificate / "both.pem")}
    (tmp_path / "haproxy.cfg").write_text(many + recipe("haproxy", own))
    command = [str(haproxy), "-c", "-f", "haproxy.cfg"]
    with Child(command, cwd=tmp_path) as check:
        check.succeed()


# WebSocket clients with TLS: HAProxy has the certificate, by the recipe for one relay, before a
# gateway.


class FarClient(TCPClient):
    """A client on host a, over HAProxy two."""

    def __init__(self, hello: bytes) -> None:
        self._socket = connect("a", "two")
        self._socket.sendall(hello)


@pytest.fixture
def wss(
    hosts: None, our_relay: list[str], haproxy: Path, certificate: Path, tmp_path: Path
) -> Iterator[Front]:
    """Run the service, a third gateway before HAProxy one, and a HAProxy with the certificate.

    The clients of that HAProxy are on this host. Their address is 127.0.0.1, and the relays allow
    it.
    """
    folder = tmp_path / "wss"
    folder.mkdir()
    options = [
        f"--port=tcp:4003:interface={netns.SERVER}",
        f"--trust-forwarded-for={netns.SERVER}",
    ]
    with (
        running_service(our_relay, haproxy, tmp_path, "--allow=127.0.0.1") as service,
        Gateway(our_relay, f"unix:{tmp_path}/one/gateways.sock", *options) as gateway,
        listener() as one,  # of this host, although HAProxy runs on the server
    ):
        replaced = {
            "bind :::443 ": f"bind fd@{one.fileno()} ",
            "/etc/haproxy/relay.example.org.pem": str(certificate / "both.pem"),
            "127.0.0.1:4002": f"{netns.SERVER}:4003",
        }
        (folder / "haproxy.cfg").write_text(recipe("haproxy", replaced))
        command = netns.inside("server", [str(haproxy), "-db", "-f", "haproxy.cfg"])
        with Front(command, folder, address_of(one), [one]) as front:
            one.close()
            yield front
        service.gateways["wss"] = gateway
        happy = [record for records in service.stop().values() for record in records]
        assert [record.mood for record in happy] == ["happy"]


def test_a_page_and_a_tcp_client(
    wss: Front, chromium: Path, certificate: Path, tmp_path: Path
) -> None:
    trusted = (certificate / "spki").read_text()
    for_page, for_partner = hellos("page")
    url = f"wss://{HOST}:{wss.address.rpartition(':')[2]}/"
    with PageServer() as server:
        page = server.url(scenario="stay", url=url, size=PAGE_SIZE, hello=for_page)
        with Browser(chromium, tmp_path, trusted, server, page) as browser:
            with FarClient(for_partner.encode()) as partner:
                digests = partner.exchange(PAGE_SIZE)
            assert_crossed(client_digests(browser.result(), 1000), digests)


def test_two_in_a_page(wss: Front, chromium: Path, certificate: Path, tmp_path: Path) -> None:
    trusted = (certificate / "spki").read_text()
    url = f"wss://{HOST}:{wss.address.rpartition(':')[2]}/"
    with PageServer() as server:
        page = server.url(scenario="pair", url=url, size=PAGE_SIZE, hello=hellos("two"))
        with Browser(chromium, tmp_path, trusted, server, page) as browser:
            first, second = browser.result()
    assert_crossed(client_digests(first, 4001), client_digests(second, 1000))


@pytest.mark.parametrize(("last", "code"), [("stay", 1000), ("leave", 4001)])
def test_a_program_and_a_tcp_client(
    last: str, code: int, wss: Front, python_tools: Path, certificate: Path
) -> None:
    """The program uses the library websockets."""
    hello, other = (handshake("program", side) for side in ("a", "b"))
    with WebClient(python_tools, wss, certificate, hello, last) as program:
        with FarClient(other) as partner:
            assert_crossed(partner.exchange(SIZE), program.digests())
            if last == "leave":
                partner.expect_end()
        assert program.finish() == f"closed with {code}"


# What the relays know of the clients of gateways.


def test_limits_by_address_act_behind_a_gateway(
    hosts: None, our_relay: list[str], haproxy: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """Clients of one token and one side wait at one relay. Each gateway has one of host a."""
    limit = "--max-waiting-per-source=2"
    with running_service(our_relay, haproxy, tmp_path, limit) as service:

        def wait(host: str, proxy: str) -> WebSocketClient:
            client = WebSocketClient(host, proxy)
            stack.enter_context(client)
            client.send(handshake("many", "0"))
            return client

        def await_waiting(count: int) -> None:
            """Wait until so many clients wait: their handshakes have arrived."""
            relays = service.relays.values()
            wait_until(
                "the clients wait", lambda: sum(relay.waiting_now() for relay in relays) == count
            )

        clients = [wait("a", "one"), wait("a", "two"), wait("b", "one")]
        await_waiting(3)
        third = wait("a", "two")
        assert (third.receive(1 << 16), third.code) == (b"too many waiting\n", 1013)
        await_waiting(3)
        clients.append(wait("b", "two"))
        await_waiting(4)
        # The relay that has all of them ends those that are redundant.
        with connect("b", "one") as partner:
            partner.sendall(handshake("many", "1"))
            assert receive(partner, len(OK)) == OK
            assert sorted(client.receive(len(OK)) for client in clients) == [b"", b"", b"", OK]
            assert [client.code for client in clients].count(1000) == 3


def test_allow_acts_behind_a_gateway(service: Service) -> None:
    """The relays allow the two hosts alone, the gateways everybody."""
    with WebSocketClient("server", "one") as client:
        client.send(handshake("server", "0"))
        assert (client.receive(1 << 16), client.code) == (b"not allowed\n", 1013)


# Events while transfers run.


def test_gateways_are_reloaded(service: Service, stack: ExitStack) -> None:
    running = service.meeting("running", RUNNING, stack)
    waiting = service.waiting("waiting", WAITING, stack)
    with Transfers(running) as transfers:
        for gateway in service.gateways.values():
            transfers.progress()
            reload(gateway)
            transfers.progress()
        assert missed(waiting) == []
        service.meeting("after the reloads", WAITING, stack)
        transfers.progress()
        assert transfers.ended == set()
    stack.close()
    records = [record for found in service.stop().values() for record in found]
    assert [record.mood for record in records] == ["happy"] * (RUNNING + 2 * WAITING)


def test_a_gateway_is_killed(service: Service, stack: ExitStack) -> None:
    """The first client of each second pair uses it."""
    running = service.meeting("running", RUNNING, stack)
    with Transfers(running) as transfers:
        transfers.progress()
        os.kill(service.gateways["one"].pid, signal.SIGKILL)
        transfers.await_ended(RUNNING // 2)
        assert {running[number].transports[0] for number in transfers.ended} == {"websocket"}


@pytest.fixture
def name_of_both(hosts: None) -> Iterator[str]:
    """Return a name with the addresses of both HAProxies, on the server."""
    folder = netns.ETC_NETNS / netns.namespace("server")
    folder.mkdir()
    try:
        lines = [f"{address} haproxies\n" for address in PROXIES.values()]
        (folder / "hosts").write_text("".join(lines))
        yield "haproxies"
    finally:
        shutil.rmtree(folder)


def test_a_gateway_takes_the_other_haproxy(
    name_of_both: str, service: Service, our_relay: list[str], stack: ExitStack
) -> None:
    assert service.gateways["one"].terminate() == 0
    listening = f"--websocket=tcp:{PORTS['websocket']}:interface={PROXIES['one']}"
    options = [listening, "--port=tcp:4005:interface=127.0.0.1"]
    with Gateway(our_relay, f"tcp:{name_of_both}:4004", *options) as gateway:
        service.meeting("both", 4, stack)
        service.proxies["one"].kill()
        wait_until("HAProxy one has ended", lambda: not listening_sockets("one", 4004))
        pairs = [
            Pair(f"one is gone {number}", stack, transports=("websocket", "websocket"))
            for number in range(WAITING)
        ]
        assert missed(pairs) == []
        gateway.lines.until("no connection to the relay behind: Connection refused")


def test_a_relay_is_drained_and_reloaded(service: Service, stack: ExitStack) -> None:
    running = service.meeting("running", RUNNING, stack)
    waiting = service.waiting("waiting", WAITING, stack)
    with Transfers(running) as transfers:
        transfers.progress()
        service.set_state(1, "drain")
        clients = service.clients_so_far(1)
        # New tokens go to other relays.
        service.meeting("during the drain", WAITING, stack)
        assert service.clients_so_far(1) == clients
        reload(service.relays[1])
        transfers.progress()
        # The partners of clients that wait still reach the drained relay.
        assert missed(waiting) == []
        assert service.clients_so_far(1) > clients
        service.set_state(1, "ready")
        clients = service.clients_so_far(1)
        service.meeting("after the drain", WAITING, stack)
        assert service.clients_so_far(1) > clients
        transfers.progress()
        assert transfers.ended == set()


def test_a_relay_is_killed(service: Service, stack: ExitStack) -> None:
    running = service.meeting("running", RUNNING, stack)
    with Transfers(running) as transfers:
        transfers.progress()
        clients = service.clients_now(2)
        assert 0 < clients < 2 * RUNNING
        os.kill(service.relays[2].pid, signal.SIGKILL)
        service.relays[2].wait()
        transfers.await_ended(clients // 2)
        service.wait_until("down", lambda proxy: proxy.statistics("status")[2] == "DOWN")
        service.meeting("while it is down", WAITING, stack)
        again = [
            Pair(running[number].name, stack, transports=running[number].transports)
            for number in sorted(transfers.ended)
        ]
        assert missed(again) == []
        transfers.progress()
        assert len(transfers.ended) == clients // 2


def test_a_relay_is_killed_and_no_check_notices(
    hosts: None, our_relay: list[str], haproxy: Path, tmp_path: Path, stack: ExitStack
) -> None:
    """HAProxy takes another relay because the connection is refused."""
    changes = {"check inter 2s": "check inter 1h"}
    with running_service(our_relay, haproxy, tmp_path, **changes) as service:
        os.kill(service.relays[2].pid, signal.SIGKILL)
        service.relays[2].wait()
        service.meeting("just after", WAITING, stack)
        for proxy in service.proxies.values():
            assert proxy.statistics("status")[2].startswith("UP")
        # The other HAProxy learns from this one where the tokens are.
        assert int(service.proxies["one"].statistics("wredis")[2]) > 0


def test_a_haproxy_is_reloaded(service: Service, stack: ExitStack) -> None:
    """It is reloaded as by Debian's unit. One relay is drained, and stays so."""
    one = service.proxies["one"]
    running = service.meeting("running", RUNNING, stack)
    waiting = service.waiting("waiting", WAITING, stack, second="one")
    late = [stack.enter_context(connect("a", "one")) for _ in range(WAITING)]
    line = [handshake(f"late {number}", "0") for number in range(WAITING)]
    for number, client in enumerate(late):
        client.sendall(line[number][:50])
    service.set_state(3, "drain")
    service.wait_until("synchronised", HAProxy.has_synchronised)
    with Transfers(running) as transfers:
        transfers.progress()
        listening = listening_sockets("one", PORTS["tcp"])
        assert len(listening) == 1
        one.begin_reload()
        deadline = time.monotonic() + TIMEOUT
        while not one.is_ready():  # this takes the notices
            assert time.monotonic() < deadline
            with connect("b", "one") as newcomer:
                newcomer.sendall(b"hello\n")
                assert receive(newcomer, len(BAD)) == BAD
        # The socket is handed over: else the connections in its queue would be lost.
        assert listening_sockets("one", PORTS["tcp"]) == listening
        transfers.progress()
        service.share_tokens(RUNNING + WAITING)
        # The old process has the clients whose handshakes began before.
        for number, client in enumerate(late):
            client.sendall(line[number][50:])
            partner = stack.enter_context(connect("b", "two"))
            partner.sendall(handshake(f"late {number}", "1"))
        assert [receive(client, len(OK)) for client in late] == [OK] * WAITING
        # The new process has the table and the state.
        assert missed(waiting) == []
        assert one.statistics("status")[3] == "DRAIN"
        clients = service.clients_so_far(3)
        service.meeting("after the reload", WAITING, stack)
        assert service.clients_so_far(3) == clients
        transfers.progress()
        assert transfers.ended == set()


# Clients in the queue of the socket while a HAProxy is reloaded. It does not accept them, because
# another client is connected.

ONE_CLIENT = {"timeout client 2m": "timeout client 2m\n    maxconn 1\n    backlog 128"}
CLOSED_SOCKET = {" expose-fd listeners\n": "\n"}


def in_queue(proxy: ProxyProcess, stack: ExitStack) -> list[socket.socket]:
    """Return clients that are in the queue of HAProxy one, each with a line."""
    stack.enter_context(connect("a", "one"))
    wait_until("the first client is accepted", lambda: proxy.clients() == 1)
    clients = [stack.enter_context(connect("b", "one")) for _ in range(WAITING)]
    for client in clients:
        client.sendall(b"hello\n")
    assert proxy.clients() == 1
    return clients


def answer(client: socket.socket) -> bytes:
    """Return the answer to the line of a client, b"" after a reset. The client makes room."""
    with client:
        try:
            return receive(client, len(BAD))
        except ConnectionResetError:
            return b""


@pytest.mark.parametrize(
    "changes", [ONE_CLIENT, {**ONE_CLIENT, **CLOSED_SOCKET}], ids=["as it is", "without expose-fd"]
)
def test_the_unit_hands_the_queue_over(
    changes: dict[str, str],
    hosts: None,
    our_relay: list[str],
    haproxy: Path,
    tmp_path: Path,
    stack: ExitStack,
) -> None:
    """The reload of Debian's unit does so without `expose-fd listeners` too."""
    with running_service(our_relay, haproxy, tmp_path, **changes) as service:
        proxy = service.proxies["one"]
        clients = in_queue(proxy, stack)
        proxy.begin_reload()
        proxy.await_ready()
        assert [answer(client) for client in clients] == [BAD] * WAITING


@pytest.mark.parametrize(
    ("options", "expected"), [(["-x", "admin.sock"], BAD), ([], b"")], ids=["-x", "without -x"]
)
def test_a_successor_takes_the_queue_over(
    options: list[str],
    expected: bytes,
    hosts: None,
    our_relay: list[str],
    haproxy: Path,
    tmp_path: Path,
    stack: ExitStack,
) -> None:
    """A process without a master is replaced by `haproxy -x SOCKET -sf PID`."""
    with running_relays(our_relay, tmp_path):
        folder = configure("one", tmp_path, **ONE_CLIENT)
        with ProxyProcess(haproxy, folder) as old:
            clients = in_queue(old, stack)
            with ProxyProcess(haproxy, folder, "-db", *options, "-sf", str(old.pid)):
                assert [answer(client) for client in clients] == [expected] * WAITING


def test_a_successor_needs_the_sockets(hosts: None, haproxy: Path, tmp_path: Path) -> None:
    """Without `expose-fd listeners`, HAProxy does not start with -x."""
    folder = configure("one", tmp_path, **CLOSED_SOCKET)
    with ProxyProcess(haproxy, folder) as old:
        with pytest.raises(AssertionError, match="Failed to get the sockets"):
            ProxyProcess(haproxy, folder, "-db", "-x", "admin.sock", "-sf", str(old.pid))
        assert old.is_running()


# Health checks.


def test_a_relay_that_drains_is_down(
    hosts: None, our_relay: list[str], haproxy: Path, tmp_path: Path, stack: ExitStack
) -> None:
    with running_service(our_relay, haproxy, tmp_path, "--drain=3600") as service:
        running = service.meeting("running", RUNNING, stack)
        with Transfers(running) as transfers:
            os.kill(service.relays[4].pid, signal.SIGTERM)
            service.relays[4].lines.until("draining for at most")
            service.wait_until("down", lambda proxy: proxy.statistics("status")[4] == "DOWN")
            service.meeting("during the drain", WAITING, stack)
            transfers.progress()
            assert transfers.ended == set()


CHECK = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET / HTTP/1.0\r\n\r\n"  # LOCAL, of version 2


def test_a_full_relay_passes_the_check(our_relay: list[str], tmp_path: Path) -> None:
    """A relay is full of pairs. It refuses clients, and answers the check."""
    path = tmp_path / "relay-1"
    command = [*our_relay, f"--port=haproxy:unix:{path}", "--max-connections=2"]
    with Relay(command, r"^Transit starting on haproxy:unix:\S+-(\d+)"), ExitStack() as stack:

        def ask(data: bytes, size: int) -> bytes:
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.settimeout(TIMEOUT)
            client.connect(str(path))
            client.sendall(data)
            return receive(client, size) if size else b""

        local = CHECK[:16]
        ask(local + handshake("full", "1"), 0)
        assert ask(local + handshake("full", "2"), len(OK)) == OK
        assert ask(local + handshake("more", "1"), 100) == b"relay full\n"
        assert ask(CHECK, 12) == b"HTTP/1.1 200"
