"""The recipes of the README for WebSocket and TLS, as they stand there, in real proxies.

Each recipe is cut out of README.md and run with nothing replaced but what WebRelay or its proxy's
function below names: ports, certificate files, and what a machine's main configuration would say.
A proxy gets a socket that listens already, so nobody else can have its port, and nobody waits for
it to start; Caddy, which takes none, listens on a unix socket and says when.
"""

from __future__ import annotations

import hashlib
import os
import random
import re
import shlex
import signal
import socket
import textwrap
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import pytest
from children import TIMEOUT, Child, Record, Relay
from stage import OK, handshake

README = Path(__file__).parent.parent.parent / "README.md"
HEADING = "\n## WebSocket, and TLS in front\n"
HOST = "relay.example.org"
MEBIBYTE = 1 << 20
SIZE = 8 * MEBIBYTE  # what a client sends through a proxy

# A recipe is known by its beginning.
COMMAND = "transit-relay --port"
RECIPES = {
    "nginx": "server {",
    "haproxy": "listen relay",
    "caddy": "relay.example.org {",
    "stunnel": "debug = warning",
}


def code_blocks() -> list[str]:
    """What stands indented in the README's section about TLS."""
    _, _, behind = README.read_text(encoding="utf-8").partition(HEADING)
    section, _, _ = behind.partition("\n## ")
    blocks = re.findall(r"(?:^    .*\n|^\n(?=    ))+", section, re.MULTILINE)
    return [textwrap.dedent(block).strip() + "\n" for block in blocks]


def recipe(beginning: str, replaced: Mapping[str, str]) -> str:
    """The one block that begins so. What is to be replaced must stand in it, just once."""
    (text,) = [block for block in code_blocks() if block.startswith(beginning)]
    for old, new in replaced.items():
        assert text.count(old) == 1, f"{old!r} in this recipe of the README:\n{text}"
        text = text.replace(old, new)
    return text


def test_every_recipe_is_run() -> None:
    beginnings = [COMMAND, *RECIPES.values()]
    blocks = code_blocks()
    assert len(blocks) == len(beginnings)
    assert all(block.startswith(beginning) for block, beginning in zip(blocks, beginnings))


class WebRelay(Relay):
    """Our relay, run as the README says, but on free ports of the loopback interface."""

    REPLACED = {  # noqa: RUF012
        "--port tcp:4001": "--port tcp:0:interface=127.0.0.1",
        "--websocket tcp:4002:": "--websocket tcp:0:",
    }

    def __init__(self, our_relay: Sequence[str]) -> None:
        words = shlex.split(recipe(COMMAND, self.REPLACED))
        address = r"tcp:(\d+):interface=127\.0\.0\.1"
        announcement = rf"^Transit starting on {address}, {address} \(websocket\)$"
        super().__init__([*our_relay, *words[1:]], announcement)
        _, self.websocket_port = self.ports
        assert f"WebSocket clients connect to wss://{HOST}/" in self.lines.seen

    def stop(self) -> list[Record]:
        """Stop it, which it must do well; the records that nobody has read."""
        assert self.terminate() == 0, str(self.lines)
        return self.last_records()


class Group(Child):
    """A child process with children of its own, which end with it: they are its process group."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        pass_fds: Sequence[int] = (),
    ) -> None:
        # If this run is killed, the process is told to stop.
        leader = ["setsid", "setpriv", "--pdeathsig", "TERM"]
        super().__init__([*leader, *argv], cwd=cwd, env=env, pass_fds=pass_fds)

    def kill(self) -> None:
        # A process that nobody has waited for keeps its number, and so does its group. Before
        # setsid has run there is none; then there are no children either.
        if self._process.returncode is None:
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass

    def __exit__(self, *_: object) -> None:
        self.kill()
        super().__exit__()


def plain_environment(folder: Path) -> dict[str, str]:
    """For programs that look for their configuration at home, or for a proxy on the way out."""
    return {"HOME": str(folder), "LC_ALL": "C.UTF-8", "PATH": f"{os.environ['PATH']}:/usr/sbin"}


class Front(Group):
    """A proxy that listens at `address`: 127.0.0.1:PORT, or the path of a unix socket."""

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
    """Where a proxy runs, and what for."""

    program: Path
    folder: Path
    certificate: Path
    relay_port: int


def listener() -> socket.socket:
    """A socket that listens on a free port. A proxy is given it, and we close ours."""
    return socket.create_server(("127.0.0.1", 0), backlog=128)


def address_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()
    return f"{host}:{port}"


def nginx_front(place: Place) -> Front:
    """nginx takes sockets from NGINX, as from an nginx before it: FD;FD; for its listen lines."""
    folder, certificate = place.folder, place.certificate
    with listener() as one, listener() as other:
        replaced = {
            "listen 443 ": f"listen {address_of(one)} ",
            "listen [::]:443 ": f"listen {address_of(other)} ",
            "/etc/ssl/relay.example.org/fullchain.pem": str(certificate / "fullchain.pem"),
            "/etc/ssl/relay.example.org/privkey.pem": str(certificate / "privkey.pem"),
            "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
        }
        (folder / "site").write_text(recipe(RECIPES["nginx"], replaced))
        temporary = "".join(
            f"{what}_temp_path {folder / what};\n"
            for what in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        (folder / "nginx.conf").write_text(
            f"daemon off; worker_processes 1; error_log stderr; pid {folder / 'pid'};\n"
            f"events {{ }}\nhttp {{\n{temporary}include {folder / 'site'};\n}}\n"
        )
        command = [str(place.program), "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"]
        inherited = {"NGINX": f"{one.fileno()};{other.fileno()};"}
        return Front(command, folder, address_of(one), [one, other], inherited)


def haproxy_front(place: Place, before: str = "", behind: str = "") -> Front:
    """HAProxy writes a socket of its parent's as fd@N."""
    with listener() as one:
        replaced = {
            "bind :::443 ": f"bind fd@{one.fileno()} ",
            "/etc/haproxy/relay.example.org.pem": str(place.certificate / "both.pem"),
            "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
        }
        text = before + recipe(RECIPES["haproxy"], replaced) + behind
        (place.folder / "haproxy.cfg").write_text(text)
        command = [str(place.program), "-db", "-f", "haproxy.cfg"]
        return Front(command, place.folder, address_of(one), [one])


def caddy_front(place: Place) -> Front:
    """Caddy's own certificate would come from outside, so it is told to take ours."""
    folder, certificate = place.folder, place.certificate
    replaced = {
        "{\n": f"{{\nbind unix/{folder / 'socket'}\n"
        f"tls {certificate / 'fullchain.pem'} {certificate / 'privkey.pem'}\n",
        "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
    }
    (folder / "site").write_text(recipe(RECIPES["caddy"], replaced))
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
    """stunnel takes a socket as systemd passes it: it is number 3, and LISTEN_PID is stunnel."""
    folder, certificate = place.folder, place.certificate
    replaced = {
        "/etc/ssl/relay.example.org/fullchain.pem": str(certificate / "fullchain.pem"),
        "/etc/ssl/relay.example.org/privkey.pem": str(certificate / "privkey.pem"),
        "127.0.0.1:4002": f"127.0.0.1:{place.relay_port}",
    }
    text = "foreground = yes\npid =\n" + recipe(RECIPES["stunnel"], replaced)
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
    """Each proxy in its turn, in front of the relay's WebSocket port."""
    program: Path = request.getfixturevalue(request.param)
    place = Place(program, tmp_path, certificate, relay.websocket_port)
    with FRONTS[request.param](place) as front:
        yield front


# A client made of Python's websockets, which refuses larger messages than the relay may send.
# It sends and takes as many bytes, then leaves with code 4001 or stays until the partner leaves.
# (The library's other client, in websockets.sync, drops what came in one piece with a Close that it
# cannot answer any more: Caddy has gone by then.)
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
    """SHA-256 of what a client sent, and of what it received."""

    sent: str
    received: str


class WebClient(Child):
    """A client in a process of its own, whose way to the relay goes through a proxy."""

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
        """Its end: how its connection was closed."""
        self.succeed()
        return self.lines.seen[-1]


class TCPClient:
    """A client that speaks plain TCP, in this process."""

    def __init__(self, port: int, hello: bytes) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), TIMEOUT)
        self._socket.sendall(hello)

    def exchange(self, size: int) -> Digests:
        """Take the ok, then send and receive as many bytes at the same time."""
        assert self._receive(len(OK)) == OK
        data = random.randbytes(size)
        sending = threading.Thread(target=self._socket.sendall, args=[data])
        sending.start()
        received = self._receive(size)
        sending.join(TIMEOUT)
        assert not sending.is_alive()
        return Digests(hashlib.sha256(data).hexdigest(), hashlib.sha256(received).hexdigest())

    def expect_end(self) -> None:
        assert self._socket.recv(1) == b""

    def _receive(self, size: int) -> bytes:
        received = bytearray()
        while len(received) < size:
            data = self._socket.recv(min(size - len(received), 1 << 20))
            assert data, f"an end after {len(received)} of {size} bytes"
            received += data
        return bytes(received)

    def __enter__(self) -> TCPClient:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()


def assert_crossed(one: Digests, other: Digests) -> None:
    """Each has what the other sent."""
    assert (one.sent, one.received) == (other.received, other.sent)


def test_wss_to_wss(front: Front, relay: WebRelay, python_tools: Path, certificate: Path) -> None:
    hellos = [handshake("wss", side) for side in ("a", "b")]
    with ExitStack() as running:
        first, second = [
            running.enter_context(WebClient(python_tools, front, certificate, hello, last))
            for hello, last in zip(hellos, ("leave", "stay"))
        ]
        assert_crossed(first.digests(), second.digests())
        assert first.finish() == "closed with 4001"  # the relay's answer, not only ours
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
    """What curl got."""

    status: int
    headers: dict[str, str]  # names in lower case
    body: str


def ask(curl: Path, url: str, *options: str) -> Answer:
    """Have curl ask; it must be content with how the answer ends."""
    command = [str(curl), "--max-time", str(TIMEOUT), "--silent", "--show-error", "--include"]
    # No proxy of the machine's, and no pipe that breaks where an upload ends early.
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


QUESTIONS = {
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


@pytest.mark.parametrize("question", QUESTIONS)
@pytest.mark.parametrize("port", ["port", "websocket_port"])
def test_curl(question: str, port: str, relay: WebRelay, curl: Path, tmp_path: Path) -> None:
    options, status = QUESTIONS[question]
    file = tmp_path / "upload"
    file.write_bytes(bytes(3_000_000))
    options = [option.format(file=file) for option in options]
    answer = ask(curl, f"http://127.0.0.1:{getattr(relay, port)}/", *options)
    assert answer.status == status
    assert answer.headers["connection"] == "close"
    assert int(answer.headers["content-length"]) > 0
    if question != "HEAD":
        assert len(answer.body) == int(answer.headers["content-length"])
    allowed = "GET, HEAD, OPTIONS" if status == 405 else None
    assert answer.headers.get("allow") == allowed
    assert relay.stop() == []  # a question leaves no record


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
    """A proxy may as well pass its connections to the port that takes TCP clients."""
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
    "option httpchk POST /": ("failed", "405", "DOWN"),  # nobody's: shows that a check can fail
}


def test_haproxy_health_checks(
    our_relay: list[str], haproxy: Path, certificate: Path, tmp_path: Path
) -> None:
    """HAProxy tells how a server is after its first check, and when that changes."""
    before = "global\nlog stdout format raw local0\ndefaults\noption log-health-checks\n"
    expected = {"relay": CHECKS["option httpchk"]}  # the recipe's own, as it stands there
    behind = ""
    with WebRelay(our_relay) as relay:
        for number, (check, result) in enumerate(CHECKS.items()):
            for port in relay.port, relay.websocket_port:
                name = f"check{number}_{port}"
                expected[name] = result
                behind += (
                    f"backend {name}\nlog global\nmode http\n{check}\n"
                    f"timeout connect 5s\ntimeout server 1m\n"
                    f"server relay 127.0.0.1:{port} check\n"
                )
        place = Place(haproxy, tmp_path, certificate, relay.websocket_port)
        seen: dict[str, tuple[str, str, str]] = {}
        with haproxy_front(place, before, behind) as front:
            while len(seen) < len(expected):
                found = front.lines.until(
                    r"Health check for server (\w+)/relay (\w+),.* code: (\d+),.* (UP|DOWN)"
                )
                seen[found[1]] = (found[2], found[3], found[4])
        assert seen == expected
        assert relay.stop() == []  # a check leaves no record
