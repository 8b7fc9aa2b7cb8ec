"""The addresses that real proxies tell, in PROXY headers and in X-Forwarded-For, by the recipes.

A plain socket stands in for the relay. It reads what the proxy sends with the relay's own readers.
Clients connect from an address of their own, which the proxy must tell, and try to forge another.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import pytest
from children import TIMEOUT
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

from transit_relay import Addresses, Peer, ProxyReader, parse_network
from ws_frames import Request, RequestReader

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


def connect(front: Front, family: int) -> socket.socket:
    """Connect to a proxy from the client's address."""
    host, _, port = front.address.rpartition(":")
    client = socket.create_connection(
        (host.strip("[]"), int(port)), TIMEOUT, source_address=(CLIENTS[family], 0)
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
