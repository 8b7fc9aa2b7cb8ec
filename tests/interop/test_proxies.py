"""WebSocket and TLS through real proxies, configured by the recipes that the project ships.

A recipe is a file below packaging/. It runs as it is, except for the replacements that the
function of its proxy lists: ports, certificate files, and the settings of a main configuration.
A proxy inherits a listening socket, so that no other process can take its port and the test need
not wait for its start. Caddy cannot inherit one: it listens on a unix socket and announces that.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
import signal
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from children import TIMEOUT, Child, Record, Relay
from stage import OK, handshake

ROOT = Path(__file__).parent.parent.parent
PACKAGING = ROOT / "packaging"
OPERATING = ROOT / "docs" / "operating.md"
HOST = "relay.example.org"
MEBIBYTE = 1 << 20
SIZE = 8 * MEBIBYTE  # bytes that each client sends through a proxy

RECIPES = {
    "nginx": PACKAGING / "nginx" / "transit-relay.conf",
    "haproxy": PACKAGING / "haproxy" / "transit-relay.cfg",
    "caddy": PACKAGING / "caddy" / "Caddyfile",
    "stunnel": PACKAGING / "stunnel" / "transit-relay.conf",
    # test_proxy_headers.py runs these:
    "nginx-tcp": PACKAGING / "nginx" / "transit-relay-tcp.conf",
    "haproxy-tcp": PACKAGING / "haproxy" / "transit-relay-tcp.cfg",
    # test_growing.py runs it:
    "haproxy-many": PACKAGING / "haproxy" / "transit-relay-many.cfg",
}


def substitute(text: str, replaced: Mapping[str, str]) -> str:
    """Return `text` with each replacement made. Each key must occur exactly once."""
    for old, new in replaced.items():
        assert text.count(old) == 1, f"{old!r} in this text:\n{text}"
        text = text.replace(old, new)
    return text


def recipe(name: str, replaced: Mapping[str, str]) -> str:
    """Return the recipe of a proxy, with these replacements."""
    return substitute(RECIPES[name].read_text(encoding="utf-8"), replaced)


def relay_command() -> str:
    """Return the documented command that starts a relay behind a proxy."""
    text = OPERATING.read_text(encoding="utf-8")
    (command,) = re.findall(r"(?m)^ {4}(transit-relay --port .*)\n", text)
    return str(command)


def test_every_recipe_is_run() -> None:
    shipped = {file for name in FRONTS for file in (PACKAGING / name).iterdir()}
    assert shipped == set(RECIPES.values())


class WebRelay(Relay):
    """Our relay, started by the documented command, on free ports of the loopback interface."""

    REPLACED = {  # noqa: RUF012
        "--port tcp:4001": "--port tcp:0:interface=127.0.0.1",
        "--websocket tcp:4002:": "--websocket tcp:0:",
    }

    def __init__(self, our_relay: Sequence[str]) -> None:
        words = shlex.split(substitute(relay_command(), self.REPLACED))
        address = r"tcp:(\d+):interface=127\.0\.0\.1"
        announcement = rf"^Transit starting on {address}, {address} \(websocket\)$"
        super().__init__([*our_relay, *words[1:]], announcement)
        _, self.websocket_port = self.ports
        assert f"WebSocket clients connect to wss://{HOST}/" in self.lines.seen

    def stop(self) -> list[Record]:
        """Stop the relay with exit code 0. Return the records that no test has read yet."""
        assert self.terminate() == 0, str(self.lines)
        return self.last_records()


class Group(Child):
    """A child process that leads a process group. The whole group ends with it."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        # setpriv: the process gets SIGTERM if this test run is killed.
        leader = ["setsid", "setpriv", "--pdeathsig", "TERM"]
        super().__init__([*leader, *argv], cwd=cwd, env=env, pass_fds=pass_fds)

    def kill(self) -> None:
        # A process keeps its number, and its group, until it is waited for. The group does not
        # exist before setsid has run, and then the process has no children.
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def __exit__(self, *_: object) -> None:
        self.kill()
        super().__exit__()


def plain_environment(folder: Path) -> dict[str, str]:
    """Return an environment without proxy settings, whose home is `folder`."""
    return {"HOME": str(folder), "LC_ALL": "C.UTF-8", "PATH": f"{os.environ['PATH']}:/usr/sbin"}


class Front(Group):
    """A proxy that listens on `address`: 127.0.0.1:PORT, or the path of a unix socket."""

    def __init__(
        self,
        argv: Sequence[str],
        folder: Path,
        address: str,
        listeners: Sequence[socket.socket] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.address = address
        env = {**plain_environment(folder), **(environment or {})}
        fds = [listener.fileno() for listener in listeners]
        super().__init__(argv, cwd=folder, env=env, pass_fds=fds)


class Place(NamedTuple):
    """The program of a proxy, its folder, its certificate and the port of its relay."""

    program: Path
    folder: Path
    certificate: Path
    relay_port: int


def listener() -> socket.socket:
    """Return a socket that listens on a free port. A proxy inherits it; the test closes its own."""
    return socket.create_server(("127.0.0.1", 0), backlog=128)


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"{host}:{port}"


def nginx_front(place: Place) -> Front:
    """Start nginx. NGINX=FD;FD; passes one socket for each `listen`, as a binary upgrade does."""
    folder, certificate = place.folder, place.certificate
    with listener() as one, listener() as other:
        replaced = {
            "listen 443 ": f"listen {address_of(one)} ",
            "listen [::]:443 ": f"listen {address_of(other)} ",
            "/etc/ssl/relay.example.org/fullchain.pem": str(certificate / "fullchain.pem"),
            "/etc/ssl/relay.example.org/privkey.pem": str(certificate / "privkey.pem"),
            "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
        }
        (folder / "site").write_text(recipe("nginx", replaced))
        temporary = "".join(
            f"{kind}_temp_path {folder / kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; error_log stderr; pid {folder / 'pid'};\n"
            f"events {{ }}\nhttp {{\n{temporary}include {folder / 'site'};\n}}\n"
        )
        command = [str(place.program), "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"]
        inherited = {"NGINX": f"{one.fileno()};{other.fileno()};"}
        return Front(command, folder, address_of(one), [one, other], inherited)


def haproxy_front(place: Place, before: str = "", after: str = "") -> Front:
    """Start HAProxy. `bind fd@N` is its syntax for an inherited socket."""
    with listener() as one:
        replaced = {
            "bind :::443 ": f"bind fd@{one.fileno()} ",
            "/etc/haproxy/relay.example.org.pem": str(place.certificate / "both.pem"),
            "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
        }
        text = before + recipe("haproxy", replaced) + after
        (place.folder / "haproxy.cfg").write_text(text)
        command = [str(place.program), "-db", "-f", "haproxy.cfg"]
        return Front(command, place.folder, address_of(one), [one])


def caddy_front(place: Place) -> Front:
    """Start Caddy with the certificate of the tests: it would fetch its own from the internet."""
    folder, certificate = place.folder, place.certificate
    replaced = {
        "{\n": f"{{\nbind unix/{folder / 'socket'}\n"
        f"tls {certificate / 'fullchain.pem'} {certificate / 'privkey.pem'}\n",
        "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
    }
    (folder / "site").write_text(recipe("caddy", replaced))
    options = "admin off\nauto_https disable_redirects\nskip_install_trust\n"
    (folder / "Caddyfile").write_text(f"{{\n{options}}}\nimport site\n")
    command = [str(place.program), "run", "--config", "Caddyfile", "--adapter", "caddyfile"]
    front = Front(command, folder, str(folder / "socket"))
    try:
        front.lines.until("serving initial configuration")
    except AssertionError:
        front.__exit__()
        raise
    return front


def stunnel_front(place: Place) -> Front:
    """Start stunnel. It takes a socket as systemd passes it: descriptor 3, LISTEN_PID its own."""
    folder, certificate = place.folder, place.certificate
    replaced = {
        "/etc/ssl/relay.example.org/fullchain.pem": str(certificate / "fullchain.pem"),
        "/etc/ssl/relay.example.org/privkey.pem": str(certificate / "privkey.pem"),
        "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
        "/run/stunnel-transit-relay.pid": str(folder / "stunnel.pid"),
    }
    text = "foreground = yes\n" + recipe("stunnel", replaced)
    (folder / "stunnel.conf").write_text(text)
    with listener() as one:
        script = f'LISTEN_PID=$$ LISTEN_FDS=1 exec "$0" stunnel.conf 3<&{one.fileno()}'
        command = ["bash", "-c", script, str(place.program)]
        return Front(command, folder, address_of(one), [one])


FRONTS = {
    "nginx": nginx_front,
    "haproxy": haproxy_front,
    "caddy": caddy_front,
    "stunnel": stunnel_front,
}


@pytest.fixture
def relay(our_relay: list[str]) -> Iterator[WebRelay]:
    with WebRelay(our_relay) as relay:
        yield relay


@pytest.fixture(params=FRONTS)
def front(
    request: pytest.FixtureRequest, certificate: Path, relay: WebRelay, tmp_path: Path
) -> Iterator[Front]:
    """Start each proxy in front of the relay's WebSocket port."""
    program: Path = request.getfixturevalue(request.param)
    place = Place(program, tmp_path, certificate, relay.websocket_port)
    with FRONTS[request.param](place) as front:
        yield front


# A client made with the library websockets. It refuses messages larger than the relay may send.
# It sends and receives SIZE bytes, then closes with code 4001 or waits until the partner leaves.
# The client in websockets.sync is unsuitable: it drops data that arrives together with a Close
# when it can no longer answer that Close, and behind Caddy it cannot.
CLIENT = """
import asyncio, hashlib, random, socket, ssl, sys
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

url, address, authority, hello, size, last = sys.argv[1:]
host, _, port = address.rpartition(":")
if host:
    connection = socket.create_connection((host, int(port)))
else:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(address)
tls = ssl.create_default_context(cafile=authority)

async def send(client, digest):
    left = int(size)
    while left:
        data = random.randbytes(min(left, random.randrange(200_000)))
        await client.send(data)
        digest.update(data)
        left -= len(data)

async def receive(client, digest):
    left = int(size)
    while left > 0:
        data = await client.recv()
        digest.update(data)
        left -= len(data)

async def main():
    async with connect(url, sock=connection, ssl=tls, max_size=32768) as client:
        await client.send(hello.encode())
        answer = await client.recv()
        assert answer == b"ok\\n", answer
        sent, received = hashlib.sha256(), hashlib.sha256()
        await asyncio.gather(send(client, sent), receive(client, received))
        print("digests", sent.hexdigest(), received.hexdigest(), flush=True)
        if last == "leave":
            await client.close(4001)
        try:
            print("after the end:", await client.recv())
        except ConnectionClosed as end:
            print("closed with", end.rcvd.code if end.rcvd else None)

asyncio.run(main())
"""


class Digests(NamedTuple):
    """SHA-256 of the bytes that a client sent, and of the bytes that it received."""

    sent: str
    received: str


class WebClient(Child):
    """A client in its own process that reaches the relay through a proxy."""

    def __init__(
        self, tools: Path, front: Front, certificate: Path, hello: bytes, last: str = "stay"
    ) -> None:
        command = [
            *[str(tools / "python"), "-c", CLIENT, f"wss://{HOST}/any/path", front.address],
            *[str(certificate / "fullchain.pem"), hello.decode(), str(SIZE), last],
        ]
        super().__init__(command, env=plain_environment(certificate))

    def digests(self) -> Digests:
        found = self.lines.until(r"^digests (\w+) (\w+)$")
        return Digests(found[1], found[2])

    def finish(self) -> str:
        """Wait until the client exits. Return the line that says how it was closed."""
        self.succeed()
        return self.lines.seen[-1]


class TCPClient:
    """A client over plain TCP, in this process."""

    def __init__(self, port: int, hello: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._socket.sendall(hello)

    def exchange(self, size: int, interruptions: Sequence[Callable[[], None]] = ()) -> Digests:
        """Receive `ok`, then send and receive `size` bytes at the same time.

        `interruptions`: are called while parts of the bytes have not been received.
        """
        assert self._receive(len(OK)) == OK
        data = random.randbytes(size)
        sending = threading.Thread(target=self._socket.sendall, args=[data])
        sending.start()
        received = b""
        for call in interruptions:
            received += self._receive(size // (len(interruptions) + 1))
            call()
        received += self._receive(size - len(received))
        sending.join(TIMEOUT)
        assert not sending.is_alive()
        return Digests(hashlib.sha256(data).hexdigest(), hashlib.sha256(received).hexdigest())

    def expect_end(self) -> None:
        assert self._socket.recv(1) == b""

    def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            data = self._socket.recv(min(size - len(received), 1 << 20))
            assert data, f"the connection ended after {len(received)} of {size} bytes"
            received += data
        return bytes(received)

    def __enter__(self) -> TCPClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def assert_crossed(one: Digests, other: Digests) -> None:
    """Check that each client received the bytes that the other one sent."""
    assert (one.sent, one.received) == (other.received, other.sent)


def test_wss_to_wss(front: Front, relay: WebRelay, python_tools: Path, certificate: Path) -> None:
    hellos = [handshake("wss", side) for side in ("a", "b")]
    with ExitStack() as running:
        first, second = [
            running.enter_context(WebClient(python_tools, front, certificate, hello, last))
            for hello, last in zip(hellos, ("leave", "stay"))
        ]
        assert_crossed(first.digests(), second.digests())
        assert first.finish() == "closed with 4001"  # the relay echoed the code
        assert second.finish() == "closed with 1000"
    assert relay.stop() == [Record("happy", 2 * SIZE, True)]


@pytest.mark.parametrize("last", ["leave", "stay"])
def test_wss_to_tcp(
    last: str, front: Front, relay: WebRelay, python_tools: Path, certificate: Path
) -> None:
    hellos = [handshake("tcp", side) for side in ("a", "b")]
    with WebClient(python_tools, front, certificate, hellos[0], last) as web:
        with TCPClient(relay.port, hellos[1]) as tcp:
            assert_crossed(tcp.exchange(SIZE), web.digests())
            if last == "leave":
                tcp.expect_end()
        assert web.finish() == f"closed with {4001 if last == 'leave' else 1000}"
    assert relay.stop() == [Record("happy", 2 * SIZE, True)]


class Answer(NamedTuple):
    """The answer that curl received."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: str


def ask(curl: Path, url: str, *options: str) -> Answer:
    """Send a request with curl, which must accept the answer and its end."""
    command = [str(curl), "--max-time", str(TIMEOUT), "--silent", "--show-error", "--include"]
    # --noproxy: ignore proxy settings of the machine.
    with Child([*command, "--noproxy", "*", *options, url]) as asking:
        asking.succeed()
        lines = asking.lines.seen
    end = lines.index("")
    headers = [line.split(": ", 1) for line in lines[1:end]]
    return Answer(
        int(lines[0].split()[1]),
        {name.lower(): value for name, value in headers},
        "".join(f"{line}\n" for line in lines[end + 1 :]),
    )


REQUESTS = {
    "HEAD": (["-I"], 200),
    "GET": ([], 200),
    "GET of HTTP/1.0": (["--http1.0"], 200),
    "GET without Host": (["--http1.0", "-H", "Host:"], 200),
    "GET elsewhere": (["--request-target", "/health?now=1"], 200),
    "OPTIONS": (["-X", "OPTIONS"], 200),
    "POST": (["-d", "data"], 405),
    "POST of 3 MB": (["-H", "Expect:", "--data-binary", "@{file}"], 405),
    "PUT of 3 MB": (["-H", "Expect:", "-T", "{file}"], 405),
}


@pytest.mark.parametrize("name", REQUESTS)
@pytest.mark.parametrize("port", ["port", "websocket_port"])
def test_curl(name: str, port: str, relay: WebRelay, curl: Path, tmp_path: Path) -> None:
    options, status = REQUESTS[name]
    file = tmp_path / "upload"
    file.write_bytes(bytes(3_000_000))
    options = [option.format(file=file) for option in options]
    answer = ask(curl, f"http://127.0.0.1:{getattr(relay, port)}/", *options)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert int(answer.headers["content-length"]) > 0
    if name != "HEAD":
        assert len(answer.body) == int(answer.headers["content-length"])
    allowed = "GET, HEAD, OPTIONS" if status == 405 else None
    assert answer.headers.get("allow") == allowed
    assert relay.stop() == []  # a plain request leaves no record


@pytest.mark.parametrize("options", [["-I"], []], ids=["HEAD", "GET"])
def test_curl_through_proxies(
    options: list[str], front: Front, curl: Path, certificate: Path
) -> None:
    if front.address.startswith("/"):
        url, way = f"https://{HOST}/", ["--unix-socket", front.address]
    else:
        port = front.address.rpartition(":")[2]
        url, way = f"https://{HOST}:{port}/", ["--connect-to", f"::{front.address}"]
    authority = ["--cacert", str(certificate / "fullchain.pem")]
    answer = ask(curl, url, *way, *authority, "--http1.1", *options)
    assert answer.status == 200
    assert ("relay" in answer.body.lower()) == (options == [])


def test_one_port_is_enough(
    relay: WebRelay, nginx: Path, python_tools: Path, certificate: Path, tmp_path: Path
) -> None:
    """A proxy may also pass its connections to the port for TCP clients."""
    hello, other = [handshake("one port", side) for side in ("a", "b")]
    place = Place(nginx, tmp_path, certificate, relay.port)
    with nginx_front(place) as front:
        with WebClient(python_tools, front, certificate, hello) as web:
            with TCPClient(relay.port, other) as tcp:
                assert_crossed(tcp.exchange(SIZE), web.digests())
            assert web.finish() == "closed with 1000"
    assert relay.stop() == [Record("happy", 2 * SIZE, True)]


CHECKS = {
    "option httpchk": ("succeeded", "200", "UP"),
    "option httpchk GET /": ("succeeded", "200", "UP"),
    "option httpchk POST /": ("failed", "405", "DOWN"),  # not a recipe: shows that a check can fail
}


def test_haproxy_health_checks(
    our_relay: list[str], haproxy: Path, certificate: Path, tmp_path: Path
) -> None:
    """HAProxy logs the state of a server after its first check and at each change."""
    before = "global\nlog stdout format raw local0\ndefaults\noption log-health-checks\n"
    expected = {"relay": CHECKS["option httpchk"]}  # the check in the recipe itself
    after = ""
    with WebRelay(our_relay) as relay:
        for number, (check, result) in enumerate(CHECKS.items()):
            for port in relay.port, relay.websocket_port:
                name = f"check{number}_{port}"
                expected[name] = result
                after += (
                    f"backend {name}\nlog global\nmode http\n{check}\n"
                    f"timeout connect 5s\ntimeout server 1m\n"
                    f"server relay 127.0.0.1:{port} check\n"
                )
        place = Place(haproxy, tmp_path, certificate, relay.websocket_port)
        seen: dict[str, tuple[str, str, str]] = {}
        with haproxy_front(place, before, after) as front:
            while len(seen) < len(expected):
                found = front.lines.until(
                    r"Health check for server (\w+)/relay (\w+),.* code: (\d+),.* (UP|DOWN)"
                )
                seen[found[1]] = (found[2], found[3], found[4])
        assert seen == expected
        assert relay.stop() == []  # a check leaves no record
