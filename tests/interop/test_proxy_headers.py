"""The addresses that real proxies tell, in PROXY headers and in X-Forwarded-For, by the recipes.

In most tests a plain socket stands in for the relay. It reads what the proxy sends with the readers
of the relay. Clients connect from an address of their own, which the proxy must tell, and try to
forge another. The last tests run the relay, which allows the address of one client only.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from children import TIMEOUT, Relay
from test_proxies import (
    HOST,
    RECIPES,
    Front,
    Place,
    address_of,
    haproxy_front,
    nginx_front,
    recipe,
    stunnel_front,
)

from transit_relay import Addresses, Peer, parse_network
from ws_frames import BINARY, ProxyReader, Request, RequestReader, build_frame

STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")
CLIENTS = {socket.AF_INET: "127.0.0.5", socket.AF_INET6: "::1"}  # by the family of the listener
FORGED = "203.0.113.9"
TRUSTED = [parse_network("127.0.0.1")]


@pytest.fixture
def backend() -> Iterator[socket.socket]:
    """Return the socket to which the proxy connects."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(TIMEOUT)
        yield listening


def accept(backend: socket.socket) -> socket.socket:
    connection, _ = backend.accept()
    connection.settimeout(TIMEOUT)
    return connection


def told_by_header(connection: socket.socket, data: bytes) -> str | None:
    """Return the address that the PROXY header tells. `data` follows the header."""
    reader = ProxyReader()
    found = None
    while found is None:
        received = connection.recv(65536)
        assert received, "the connection ended in the header"
        found = reader.receive(received)
    told, rest = found
    behind = bytes(rest)
    while len(behind) < len(data):
        behind += connection.recv(65536)
    assert behind == data
    return told


def has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


@contextmanager
def listen(family: int) -> Iterator[tuple[socket.socket, str]]:
    """Return a socket that a proxy inherits, and its address as nginx writes it."""
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_server((host, 0), family=family) as listening:
        port = listening.getsockname()[1]
        yield listening, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


@contextmanager
def haproxy_tcp(
    program: Path, folder: Path, family: int, backend: str, way: str
) -> Iterator[Front]:
    """Start HAProxy by the recipe for TCP clients, with `send-proxy` or `send-proxy-v2`."""
    with listen(family) as (listening, address):
        replaced = {"bind :::4001 v4v6": f"bind fd@{listening.fileno()}"}
        replaced |= {"127.0.0.1:4003 send-proxy-v2": f"{backend} {way}"}
        (folder / "haproxy.cfg").write_text(recipe("haproxy-tcp", replaced))
        command = [str(program), "-db", "-f", "haproxy.cfg"]
        with Front(command, folder, address, [listening]) as front:
            yield front


@contextmanager
def nginx_tcp(program: Path, folder: Path, family: int, backend: str) -> Iterator[Front]:
    """Start nginx by the recipe for TCP clients."""
    with listen(socket.AF_INET) as (four, address):
        with listen(family) as (other, other_address):
            replaced = {
                "listen 4001 so_keepalive=on": f"listen {address}",
                "listen [::]:4001 so_keepalive=on": f"listen {other_address}",
                "127.0.0.1:4003;": f"{backend};",
            }
            (folder / "nginx.conf").write_text(
                f"load_module {STREAM_MODULE};\ndaemon off; worker_processes 1;\n"
                f"error_log stderr; pid {folder / 'pid'};\nevents {{ }}\n"
                + recipe("nginx-tcp", replaced)
            )
            command = [str(program), "-p", str(folder), "-e", "stderr", "-c", "nginx.conf"]
            inherited = {"NGINX": f"{four.fileno()};{other.fileno()};"}
            with Front(command, folder, other_address, [four, other], inherited) as front:
                yield front


def connect(front: Front, family: int, source: str | None = None) -> socket.socket:
    """Connect to a proxy from the client's address, or from another one."""
    host, _, port = front.address.rpartition(":")
    client = socket.create_connection(
        (host.strip("[]"), int(port)), TIMEOUT, source_address=(source or CLIENTS[family], 0)
    )
    client.settimeout(TIMEOUT)
    return client


@pytest.mark.parametrize("family", CLIENTS, ids=["IPv4", "IPv6"])
@pytest.mark.parametrize("way", ["send-proxy", "send-proxy-v2", "proxy_protocol"])
def test_proxy_headers(
    request: pytest.FixtureRequest,
    way: str,
    family: int,
    backend: socket.socket,
    missing: Callable[[str], NoReturn],
    tmp_path: Path,
) -> None:
    """The client sends a header too. It is data behind the proxy's header."""
    if family == socket.AF_INET6 and not has_ipv6():
        missing("no IPv6")
    if way == "proxy_protocol":
        if not STREAM_MODULE.exists():
            missing("no stream module: apt-get install libnginx-mod-stream")
        program: Path = request.getfixturevalue("nginx")
        proxy = nginx_tcp(program, tmp_path, family, address_of(backend))
    else:
        program = request.getfixturevalue("haproxy")
        proxy = haproxy_tcp(program, tmp_path, family, address_of(backend), way)
    data = f"PROXY TCP4 {FORGED} {FORGED} 1 2\r\nplease relay".encode()
    with proxy as front, connect(front, family) as client:
        client.sendall(data)
        with accept(backend) as connection:
            assert told_by_header(connection, data) == CLIENTS[family]


def test_the_header_of_stunnel(
    backend: socket.socket,
    stunnel: Path,
    certificate: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Switch on the line of the recipe that is a comment."""
    text = RECIPES["stunnel"].read_text()
    assert text.count("\n;protocol = proxy\n") == 1
    changed = tmp_path / "recipe"
    changed.write_text(text.replace("\n;protocol", "\nprotocol"))
    monkeypatch.setitem(RECIPES, "stunnel", changed)
    place = Place(stunnel, tmp_path, certificate, backend.getsockname()[1])
    with stunnel_front(place) as front, tls(front, certificate) as client:
        client.sendall(b"please relay")
        with accept(backend) as connection:
            assert told_by_header(connection, b"please relay") == CLIENTS[socket.AF_INET]


def tls(front: Front, certificate: Path) -> ssl.SSLSocket:
    context = ssl.create_default_context(cafile=certificate / "fullchain.pem")
    return context.wrap_socket(connect(front, socket.AF_INET), server_hostname=HOST)


def read_request(backend: socket.socket) -> Request:
    """Return the request of the client. HAProxy's health checks may precede it."""
    while True:
        with accept(backend) as connection:
            reader = RequestReader()
            found = None
            while found is None:
                found = reader.receive(connection.recv(65536))
            request, _ = found
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            if request.method != "OPTIONS":
                return request


@pytest.mark.parametrize("forged", ["", FORGED, "127.0.0.1", "unknown", ",", "127.0.0.1, ::"])
@pytest.mark.parametrize("proxy", ["nginx", "haproxy"])
def test_forwarded_for(
    request: pytest.FixtureRequest,
    proxy: str,
    forged: str,
    backend: socket.socket,
    certificate: Path,
    tmp_path: Path,
) -> None:
    """What a client has put into X-Forwarded-For has no effect."""
    start = {"nginx": nginx_front, "haproxy": haproxy_front}[proxy]
    program: Path = request.getfixturevalue(proxy)
    place = Place(program, tmp_path, certificate, backend.getsockname()[1])
    field = f"X-Forwarded-For: {forged}\r\n" * 2 if forged else ""
    with start(place) as front, tls(front, certificate) as client:
        client.sendall(f"GET / HTTP/1.1\r\nHost: {HOST}\r\n{field}\r\n".encode())
        values = read_request(backend).fields["x-forwarded-for"]
    addresses = Addresses(trusted=TRUSTED)
    expected = addresses.judge_told(CLIENTS[socket.AF_INET])
    assert isinstance(expected, Peer) and expected.source is not None
    assert addresses.judge_forwarded(values) == expected, values


OTHER = "127.0.0.6"  # a client's address that the relay does not allow
HANDSHAKE = b"please relay " + b"a" * 64 + b" for side " + b"1" * 16 + b"\n"
PARTNER = HANDSHAKE.replace(b"1", b"2")


@contextmanager
def relay_behind(our_relay: list[str], *options: str) -> Iterator[Relay]:
    """Return a relay on a free port that allows the client's address and no other."""
    allowed = ["--allow", CLIENTS[socket.AF_INET], *options]
    with Relay([*our_relay, *allowed], r"^Transit starting on .*?tcp:(\d+)") as relay:
        yield relay
        assert relay.terminate() == 0


def read_to_end(client: socket.socket) -> bytes:
    data = b""
    while part := client.recv(65536):
        data += part
    return data


@pytest.mark.parametrize("way", ["send-proxy", "send-proxy-v2", "proxy_protocol"])
def test_the_relay_judges_the_client_and_not_the_proxy(
    request: pytest.FixtureRequest,
    way: str,
    our_relay: list[str],
    missing: Callable[[str], NoReturn],
    tmp_path: Path,
) -> None:
    endpoint = ("--port", "haproxy:tcp:0:interface=127.0.0.1")
    with relay_behind(our_relay, *endpoint) as relay:
        backend = f"127.0.0.1:{relay.port}"
        if way == "proxy_protocol":
            if not STREAM_MODULE.exists():
                missing("no stream module: apt-get install libnginx-mod-stream")
            program: Path = request.getfixturevalue("nginx")
            proxy = nginx_tcp(program, tmp_path, socket.AF_INET, backend)
        else:
            program = request.getfixturevalue("haproxy")
            proxy = haproxy_tcp(program, tmp_path, socket.AF_INET, backend, way)
        with proxy as front:
            with connect(front, socket.AF_INET) as one, connect(front, socket.AF_INET) as other:
                one.sendall(HANDSHAKE)
                other.sendall(PARTNER)
                assert one.recv(3) == other.recv(3) == b"ok\n"
                other.sendall(b"data")
                assert one.recv(4) == b"data"
            assert relay.record().mood == "happy"
            with connect(front, socket.AF_INET, OTHER) as banned:
                banned.sendall(HANDSHAKE)
                assert read_to_end(banned) == b"not allowed\n"
            assert relay.record().mood == "lonely"


@pytest.mark.parametrize("proxy", ["nginx", "haproxy"])
def test_the_relay_judges_the_address_that_is_forwarded(
    request: pytest.FixtureRequest,
    proxy: str,
    our_relay: list[str],
    certificate: Path,
    tmp_path: Path,
) -> None:
    """A client that is not allowed forges the address of one that is."""
    start = {"nginx": nginx_front, "haproxy": haproxy_front}[proxy]
    program: Path = request.getfixturevalue(proxy)
    options = ("--websocket", "tcp:0:interface=127.0.0.1", "--port", "tcp:0:interface=127.0.0.1")
    with relay_behind(our_relay, *options, "--trust-forwarded-for", "127.0.0.1") as relay:
        with start(Place(program, tmp_path, certificate, relay.port)) as front:
            for source, answer in ((CLIENTS[socket.AF_INET], b""), (OTHER, b"not allowed\n")):
                forged = f"X-Forwarded-For: {CLIENTS[socket.AF_INET]}\r\n"
                upgrade = (
                    f"GET / HTTP/1.1\r\nHost: {HOST}\r\nUpgrade: websocket\r\n{forged}"
                    "Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
                    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                )
                context = ssl.create_default_context(cafile=certificate / "fullchain.pem")
                plain = connect(front, socket.AF_INET, source)
                with context.wrap_socket(plain, server_hostname=HOST) as client:
                    client.sendall(upgrade.encode() + build_frame(BINARY, HANDSHAKE, key=b"key!"))
                    if answer:
                        assert answer in read_to_end(client)
                    else:
                        assert client.recv(1000).startswith(b"HTTP/1.1 101 ")
                assert relay.record().mood == "lonely"
