"""Endpoints and listeners: how the texts are parsed, and which sockets are opened. In process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import TIMEOUT

import transit_relay
from transit_relay import (
    LISTEN_BACKLOG,
    Endpoint,
    Listener,
    PassedSockets,
    Role,
    StartupError,
    UsageError,
    open_listeners,
    parse_endpoint,
)


def can_bind(family: int, address: str) -> bool:
    """Return whether this machine has `address`."""
    try:
        with socket.socket(family) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(
    not can_bind(socket.AF_INET6, "::1"), reason="this machine has no IPv6"
)

ListenAll = Callable[..., "list[Listener]"]
Listen = Callable[..., Listener]


@pytest.fixture
def listen_all() -> Iterator[ListenAll]:
    """Open endpoints; close their listeners at the end of the test."""
    with contextlib.ExitStack() as opened:

        def start(*texts: str, passed: PassedSockets | None = None) -> list[Listener]:
            endpoints = [parse_endpoint(text) for text in texts]
            listeners = open_listeners(endpoints, passed or PassedSockets())
            for listener in listeners:
                opened.callback(listener.close)
            return listeners

        yield start


@pytest.fixture
def listen(listen_all: ListenAll) -> Listen:
    """Open an endpoint that has one listener."""

    def start(text: str, passed: PassedSockets | None = None) -> Listener:
        (listener,) = listen_all(text, passed=passed)
        return listener

    return start


def port_of(listener: Listener) -> int:
    """Return the real port of a TCP listener."""
    return int(listener.sock.getsockname()[1])


@pytest.fixture
def port() -> Iterator[int]:
    """Reserve a port. A socket that is bound and does not listen keeps other programs from it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("", 0))
        yield sock.getsockname()[1]


def meet(listener: Listener, family: int, address: object) -> socket.socket:
    """Connect to `address` and return the socket that the listener accepts."""
    listener.sock.settimeout(TIMEOUT)
    with socket.socket(family) as client:
        client.settimeout(TIMEOUT)
        client.connect(address)
        accepted, _ = listener.sock.accept()
        client.sendall(b"hello")
        accepted.settimeout(TIMEOUT)
        assert accepted.recv(5) == b"hello"
        return accepted


# Parsing.

GOOD = {
    "tcp:4001": {"kind": "tcp", "port": 4001},
    "tcp:port=4001": {"port": 4001},
    "tcp:0": {"port": 0},
    "tcp:65535": {"port": 65535},
    "tcp:4001:interface=127.0.0.1": {"port": 4001, "interface": "127.0.0.1"},
    "tcp:4001:127.0.0.1": {"interface": "127.0.0.1"},
    "tcp:interface=127.0.0.1:port=4001": {"port": 4001, "interface": "127.0.0.1"},
    r"tcp:4001:interface=\:\:": {"interface": "::"},
    r"tcp:4001:interface=fe80\:\:1%eth0": {"interface": "fe80::1%eth0"},
    r"tcp:4001:\:\:1": {"interface": "::1"},
    "tcp:4001:interface=": {"interface": ""},
    "tcp:4001:backlog=5000": {"backlog": 5000},
    "tcp:4001:127.0.0.1:5000": {"interface": "127.0.0.1", "backlog": 5000},
    "tcp:4001:backlog=50": {"backlog": LISTEN_BACKLOG},
    "tcp:4001:backlog=0": {"backlog": LISTEN_BACKLOG},
    "unix:/run/x.sock": {"kind": "unix", "path": "/run/x.sock", "mode": 0o666},
    "unix:address=/run/x.sock": {"path": "/run/x.sock"},
    "unix:/run/x.sock:mode=660": {"path": "/run/x.sock", "mode": 0o660},
    "unix:/run/x.sock:0600": {"mode": 0o600},
    "unix:/run/x.sock:660:5000:0": {"mode": 0o660, "backlog": 5000},
    "unix:/run/x.sock:lockfile=0": {"path": "/run/x.sock"},
    "unix:/run/x.sock:lockfile=1": {"path": "/run/x.sock"},
    r"unix:a\:b\=c\\d": {"path": r"a:b=c\d"},
    "unix:address=a=b": {"path": "a=b"},
    # Only fields without a name count for the order.
    "tcp:interface=127.0.0.1:4001": {"port": 4001, "interface": "127.0.0.1"},
    "4001": {"kind": "tcp", "port": 4001, "interface": ""},
    "0": {"kind": "tcp", "port": 0},
    "tcp6:4001": {"kind": "tcp6", "port": 4001, "interface": "::"},
    "tcp6:4001:interface=": {"interface": "::"},
    r"tcp6:4001:interface=\:\:1:backlog=5000": {"interface": "::1", "backlog": 5000},
    "tcp6:port=4001:interface=localhost": {"port": 4001, "interface": "localhost"},
    "systemd:index=0": {"kind": "systemd", "position": 0, "name": None},
    "systemd:index=12": {"position": 12},
    "systemd:name=relay.socket": {"position": None, "name": "relay.socket"},
    "systemd:domain=INET6:index=0": {"position": 0},
    "systemd:domain=INET:index=0": {"position": 0},
    "systemd:domain=UNIX:name=relay": {"name": "relay"},
    "systemd:INET6:index=1": {"position": 1},
    "fd:3": {"kind": "fd", "fileno": 3},
    "fd:fileno=7": {"fileno": 7},
    "haproxy:tcp:4001": {"kind": "tcp", "port": 4001, "has_proxy_header": True},
    "haproxy:4001": {"kind": "tcp", "port": 4001, "has_proxy_header": True},
    r"haproxy:tcp6:0:interface=\:\:1": {
        "kind": "tcp6",
        "interface": "::1",
        "has_proxy_header": True,
    },
    "haproxy:unix:/run/x.sock:mode=660": {"path": "/run/x.sock", "mode": 0o660},
    "haproxy:systemd:name=relay": {"kind": "systemd", "name": "relay", "has_proxy_header": True},
    "haproxy:fd:3": {"kind": "fd", "fileno": 3, "has_proxy_header": True},
    "unix:haproxy": {"path": "haproxy", "has_proxy_header": False},
    "systemd:name=haproxy": {"name": "haproxy", "has_proxy_header": False},
}


@pytest.mark.parametrize(("text", "fields"), GOOD.items(), ids=GOOD)
def test_parse(text: str, fields: dict[str, object]) -> None:
    endpoint = parse_endpoint(text)
    assert endpoint.text == text
    assert {name: getattr(endpoint, name) for name in fields} == fields


def test_defaults() -> None:
    assert parse_endpoint("tcp:4001") == Endpoint(
        text="tcp:4001", kind="tcp", port=4001, interface="", backlog=1024
    )


BAD = {
    "": "not an endpoint",
    "65536": "port must be a number from 0 to 65535",
    "٤٠٠١": "not an endpoint",
    "tcp": "not an endpoint",
    ":4001": "not an endpoint",
    "onion:x": "not an endpoint, write KIND:... (KIND: one of tcp, tcp6, unix, systemd, fd)",
    "udp:4001": "not an endpoint",
    "TCP:4001": "not an endpoint",
    "ssl:443": "not an endpoint",
    "tcp:": "port must be a number from 0 to 65535",
    "tcp:http": "port must be a number from 0 to 65535",
    "tcp:65536": "port must be a number from 0 to 65535",
    "tcp:-1": "port must be a number from 0 to 65535",
    "tcp:+1": "port must be a number from 0 to 65535",
    "tcp: 1": "port must be a number from 0 to 65535",
    "tcp:4_001": "port must be a number from 0 to 65535",
    "tcp:\u0661": "port must be a number from 0 to 65535",
    "tcp:interface=127.0.0.1": "the port is missing",
    "tcp:4001:backlog=many": "backlog must be a number",
    "tcp:4001:backlog=-1": "backlog must be a number",
    "tcp:4001:backlog=2147483648": "backlog must be a number",
    "tcp:4001:ipv6=1": "tcp has no option 'ipv6'",
    "tcp:4001:port=4002": "port is given twice",
    "tcp:4001:interface=a:interface=b": "interface is given twice",
    "tcp:4001:a:50:b": "too many fields",
    "tcp:4001:interface=::": "given twice (a colon in a value is \\:)",
    "foo=tcp:4001": "not an endpoint",
    "=tcp:4001": "not an endpoint",
    "tcp:=4001": "tcp has no option ''",
    "unix:": "the path is missing",
    "unix:mode=660": "the path is missing",
    "unix:/run/x.sock:mode=rw": "mode must be a number from 0 to 777",
    "unix:/run/x.sock:mode=668": "mode must be a number from 0 to 777",
    "unix:/run/x.sock:mode=1777": "mode must be a number from 0 to 777",
    "unix:/run/x.sock:lockfile=yes": "lockfile must be a number from 0 to 1",
    "unix:/run/x.sock:port=1": "unix has no option 'port'",
    "systemd:": "domain must be one of INET, INET6, UNIX",
    "systemd:0": "domain must be one of INET, INET6, UNIX",
    "systemd:domain=INET6": "needs either name= or index=",
    "systemd:index=0:name=relay": "needs either name= or index=",
    "systemd:index=first": "index must be a number",
    "systemd:domain=INET5:index=0": "domain must be one of INET, INET6, UNIX",
    "fd:": "fileno must be a number",
    "fd:stdin": "fileno must be a number",
    "fd:-1": "fileno must be a number",
    "fd:2147483648": "fileno must be a number",
    "fd:3:4": "too many fields",
    "tcp6:http": "port must be a number from 0 to 65535",
    "tcp6:interface=localhost": "the port is missing",
    "haproxy": "not an endpoint, write KIND:... (KIND: one of tcp, tcp6, unix, systemd, fd)",
    "haproxy:": "not an endpoint, write haproxy:KIND:... (KIND: one of tcp, ",
    "haproxy:tcp": "not an endpoint",
    "haproxy:tcp:": "port must be a number from 0 to 65535",
    "haproxy:65536": "port must be a number from 0 to 65535",
    "haproxy:unix:": "the path is missing",
    "haproxy:haproxy:tcp:4001": "not an endpoint",
    "haprxy:haprxy:haprxy:x": "not an endpoint",
    "tcp:haproxy:4001": "port must be a number",
    "haproxy=tcp:4001": "not an endpoint",
}


@pytest.mark.parametrize(("text", "why"), BAD.items(), ids=BAD)
def test_parse_error_names_endpoint_and_reason(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    said = str(caught.value)
    assert text in said
    assert why in said
    assert "\n" not in said


SUGGESTIONS = {
    "TCP:4001": "tcp:4001",
    "tpc:4001": "tcp:4001",
    "tcp4:4001:interface=127.0.0.1": "tcp:4001:interface=127.0.0.1",
    "tcpv6:4001": "tcp6:4001",
    "udp:4001": "tcp:4001",
    "ws:4001": "tcp:4001",
    "http:4001": "tcp:4001",
    ":4001": "tcp:4001",
    "*:4001": "tcp:4001",
    "4001:interface=127.0.0.1": "tcp:4001:interface=127.0.0.1",
    "127.0.0.1:4001": "tcp:4001:interface=127.0.0.1",
    "localhost:4001": "tcp:4001:interface=localhost",
    "relay.example:4001": "tcp:4001:interface=relay.example",
    "[::1]:4001": r"tcp:4001:interface=\:\:1",
    r"\:\:1:4001": r"tcp:4001:interface=\:\:1",
    "Unix:/run/x.sock": "unix:/run/x.sock",
    "unx:/run/x.sock:mode=660": "unix:/run/x.sock:mode=660",
    "/run/x.sock": "unix:/run/x.sock",
    "./x.sock:mode=660": "unix:./x.sock:mode=660",
    "system:index=0": "systemd:index=0",
    "FD:3": "fd:3",
    "haprxy:tcp:4001": "haproxy:tcp:4001",
    "HAProxy:4001": "haproxy:4001",
    "ha-proxy:unix:/run/x.sock": "haproxy:unix:/run/x.sock",
    "proxy:systemd:name=x": "haproxy:systemd:name=x",
    "haproxy:TCP:4001": "haproxy:tcp:4001",
    "haproxy:127.0.0.1:4001": "haproxy:tcp:4001:interface=127.0.0.1",
    "haproxy:/run/x.sock": "haproxy:unix:/run/x.sock",
    "haproxy:haproxy:4001": "haproxy:tcp:4001",
}


@pytest.mark.parametrize(("text", "right"), SUGGESTIONS.items(), ids=SUGGESTIONS)
def test_a_wrong_kind_is_answered_with_the_nearest_right_spelling(text: str, right: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    assert str(caught.value) == f"{text!r}: not an endpoint; did you mean {right!r}?"
    parse_endpoint(right)


@pytest.mark.parametrize("text", ["ssl:443:privateKey=key.pem", "SSL:443", "tls:443", "wss:443"])
def test_tls_is_left_to_a_proxy(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    advice = "a proxy in front of the relay does TLS: write tcp:PORT here"
    assert str(caught.value) == f"{text!r}: not an endpoint; {advice}"


def test_tls_behind_a_proxy_header_is_left_to_a_proxy_too() -> None:
    with pytest.raises(UsageError, match=r"write haproxy:tcp:PORT here$"):
        parse_endpoint("haproxy:ssl:443")


@pytest.mark.parametrize(
    "text", ["tcp", "TCP", "tcpp", "foo=tcp:4001", "TCP:http", "tcp6", "UNIX:", "haproxy:onion:x"]
)
def test_no_wrong_spelling_is_suggested(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    prefix = "haproxy:" if text.startswith("haproxy:") else ""
    assert f"write {prefix}KIND:" in str(caught.value)


# Opening: TCP.


@pytest.mark.parametrize(
    "text", ["tcp:0", "0", "tcp6:0", r"tcp:0:interface=\:\:", "tcp:0:interface="]
)
@needs_ipv6
def test_one_socket_serves_ipv4_and_ipv6(listen: Listen, text: str) -> None:
    listener = listen(text)
    meet(listener, socket.AF_INET, ("127.0.0.1", port_of(listener))).close()
    meet(listener, socket.AF_INET6, ("::1", port_of(listener))).close()


@needs_ipv6
def test_ipv4_interface_serves_no_ipv6(listen: Listen) -> None:
    listener = listen("tcp:0:interface=127.0.0.1")
    meet(listener, socket.AF_INET, ("127.0.0.1", port_of(listener))).close()
    with pytest.raises(ConnectionRefusedError):
        meet(listener, socket.AF_INET6, ("::1", port_of(listener)))


@needs_ipv6
def test_ipv6_interface_serves_no_ipv4(listen: Listen) -> None:
    listener = listen(r"tcp:0:interface=\:\:1")
    meet(listener, socket.AF_INET6, ("::1", port_of(listener))).close()
    with pytest.raises(ConnectionRefusedError):
        meet(listener, socket.AF_INET, ("127.0.0.1", port_of(listener)))


def test_any_ipv4_interface_serves_no_ipv6(listen: Listen) -> None:
    listener = listen("tcp:0:interface=0.0.0.0")
    assert listener.sock.family == socket.AF_INET
    meet(listener, socket.AF_INET, ("127.0.0.1", port_of(listener))).close()


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("tcp:0", "tcp:{}"),
        ("tcp:0:interface=127.0.0.1:backlog=2000", "tcp:{}:interface=127.0.0.1"),
        ("0", "tcp:{}"),
        pytest.param(r"tcp:0:interface=\:\:1", r"tcp:{}:interface=\:\:1", marks=needs_ipv6),
        pytest.param("tcp6:0", r"tcp:{}:interface=\:\:", marks=needs_ipv6),
        ("haproxy:tcp:0", "haproxy:tcp:{}"),
        ("haproxy:0", "haproxy:tcp:{}"),
        ("haproxy:tcp:0:interface=127.0.0.1", "haproxy:tcp:{}:interface=127.0.0.1"),
    ],
)
def test_label_is_an_endpoint_with_the_real_port(listen: Listen, text: str, label: str) -> None:
    listener = listen(text)
    assert port_of(listener) > 0
    assert listener.label == label.format(port_of(listener))
    endpoint = parse_endpoint(listener.label)
    assert (
        endpoint.has_proxy_header
        == listener.endpoint.has_proxy_header
        == text.startswith("haproxy:")
    )


def somaxconn() -> int:
    """Return the kernel's limit for a backlog."""
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


@pytest.mark.parametrize(
    ("text", "backlog"), [("tcp:0", 1024), ("tcp:0:backlog=50", 1024), ("tcp:0:backlog=2000", 2000)]
)
def test_backlog_of_the_kernel(listen: Listen, text: str, backlog: int) -> None:
    info = listen(text).sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    # linux/tcp.h: tcpi_sacked of a listening socket is its backlog.
    assert struct.unpack_from("I", info, 28) == (min(backlog, somaxconn()),)


@pytest.mark.parametrize("interface", ["", "127.0.0.1"])
def test_busy_port(listen: Listen, interface: str) -> None:
    port = port_of(listen("tcp:0:interface=127.0.0.1"))
    text = f"tcp:{port}:interface={interface}"
    with pytest.raises(StartupError) as caught:
        listen(text)
    assert str(caught.value) == f"{text}: Address already in use"


def test_port_is_free_again_while_old_connections_linger(listen: Listen) -> None:
    """A restart must not wait for the end of TIME_WAIT."""
    listener = listen("tcp:0:interface=127.0.0.1")
    port = port_of(listener)
    listener.sock.settimeout(TIMEOUT)
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
        listener.sock.accept()[0].close()  # the first to close has the TIME_WAIT
        assert client.recv(1) == b""
    listener.close()
    assert port_of(listen(f"tcp:{port}:interface=127.0.0.1")) == port


def refusing(refused: Callable[[socket.socket], bool], call: str, code: int) -> type:
    """Return a socket class whose `call` fails with `code` if `refused` returns true."""

    class Refusing(socket.socket):
        def __init__(self, *args: int, **kwargs: int) -> None:
            super().__init__(*args, **kwargs)
            if call == "socket" and refused(self):
                self.close()
                raise OSError(code, os.strerror(code))

        def bind(self, address: object) -> None:
            if call == "bind" and refused(self):
                raise OSError(code, os.strerror(code))
            super().bind(address)  # type: ignore[arg-type]

    return Refusing


@pytest.mark.parametrize("text", ["tcp:80", "tcp:80:interface=127.0.0.1", "unix:x.sock"])
def test_missing_permission(
    listen: Listen, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faked: root, and on some systems every user, may bind port 80."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "socket", refusing(lambda _: True, "bind", errno.EACCES))
    with pytest.raises(StartupError) as caught:
        listen(text)
    assert str(caught.value) == f"{text}: Permission denied"


def test_interface_of_another_machine(listen: Listen) -> None:
    text = "tcp:0:interface=203.0.113.77"  # RFC 5737: for documentation
    with pytest.raises(StartupError) as caught:
        listen(text)
    assert str(caught.value) == f"{text}: Cannot assign requested address"


def test_unknown_interface(listen: Listen, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faked: a look-up can be slow on a machine without a network."""

    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(StartupError) as caught:
        listen("tcp:0:interface=nowhere")
    assert str(caught.value) == "tcp:0:interface=nowhere: Name or service not known"


@pytest.mark.parametrize("interface", ["a..b", ".", "x" * 64 + ".org", "\udcff"])
def test_interface_that_no_host_can_have(listen: Listen, interface: str) -> None:
    """Python refuses these with a UnicodeError."""
    with pytest.raises(StartupError) as caught:
        listen(f"tcp:0:interface={interface}")
    assert str(caught.value).startswith(f"tcp:0:interface={interface}: ")


@pytest.mark.parametrize("text", ["tcp:0", "tcp6:0", r"tcp:0:interface=\:\:"])
@pytest.mark.parametrize(
    ("call", "code"), [("socket", errno.EAFNOSUPPORT), ("bind", errno.EADDRNOTAVAIL)]
)
def test_without_ipv6_falls_back_to_ipv4_and_says_so(
    listen: Listen,
    text: str,
    call: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(
        socket, "socket", refusing(lambda sock: sock.family == socket.AF_INET6, call, code)
    )
    monkeypatch.setattr(transit_relay.log, "propagate", True)
    caplog.set_level(logging.INFO, transit_relay.log.name)
    listener = listen(text)
    assert listener.sock.family == socket.AF_INET
    meet(listener, socket.AF_INET, ("127.0.0.1", port_of(listener))).close()
    [said] = caplog.records
    assert said.levelno == logging.INFO
    assert said.getMessage() == f"{text}: IPv6 address :: left out: {os.strerror(code)}"
    any_address = ":interface=0.0.0.0" if parse_endpoint(text).interface else ""
    assert listener.label == f"tcp:{port_of(listener)}{any_address}"


@pytest.mark.parametrize("text", [r"tcp:0:interface=\:\:1", r"tcp6:0:interface=\:\:1"])
def test_an_ipv6_address_needs_ipv6(
    listen_all: ListenAll, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    without_ipv6 = refusing(
        lambda sock: sock.family == socket.AF_INET6, "bind", errno.EADDRNOTAVAIL
    )
    monkeypatch.setattr(socket, "socket", without_ipv6)
    with pytest.raises(StartupError) as caught:
        listen_all(text)
    assert str(caught.value) == f"{text}: Cannot assign requested address"


def test_other_errors_of_ipv6_are_not_hidden(
    listen: Listen, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        socket,
        "socket",
        refusing(lambda sock: sock.family == socket.AF_INET6, "bind", errno.EADDRINUSE),
    )
    with pytest.raises(StartupError, match="tcp:0: Address already in use"):
        listen("tcp:0")


# Opening: a name with several addresses.

Resolve = Callable[..., None]


@pytest.fixture
def resolve(monkeypatch: pytest.MonkeyPatch) -> Resolve:
    """Resolve the name "relay" to addresses, each twice: /etc/hosts may repeat an address."""

    def start(*addresses: str) -> None:
        real = socket.getaddrinfo

        def getaddrinfo(
            host: str, port: int, family: int, kind: int, flags: int
        ) -> list[tuple[object, ...]]:
            assert host == "relay"
            found = [real(address, port, 0, kind, flags=flags)[0] for address in addresses * 2]
            return [one for one in found if family in (socket.AF_UNSPEC, one[0])]

        monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    return start


def labels(listeners: list[Listener]) -> list[str]:
    """Return the labels, with PORT for their port. All have the same port."""
    (port,) = {port_of(listener) for listener in listeners}
    assert port > 0
    return [listener.label.replace(str(port), "PORT") for listener in listeners]


@needs_ipv6
@pytest.mark.parametrize("reverse", [False, True])
def test_a_name_is_served_on_each_of_its_addresses(
    listen_all: ListenAll, resolve: Resolve, reverse: bool
) -> None:
    addresses = ["127.0.0.1", "::1"][:: -1 if reverse else 1]
    resolve(*addresses)
    listeners = listen_all("tcp:0:interface=relay:backlog=2000")
    expected = ["tcp:PORT:interface=127.0.0.1", r"tcp:PORT:interface=\:\:1"]
    assert labels(listeners) == expected[:: -1 if reverse else 1]
    assert {listener.endpoint.text for listener in listeners} == {
        "tcp:0:interface=relay:backlog=2000"
    }
    for listener, address in zip(listeners, addresses):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        meet(listener, family, (address, port_of(listener))).close()


@needs_ipv6
def test_tcp6_uses_the_ipv6_addresses_of_a_name(listen_all: ListenAll, resolve: Resolve) -> None:
    resolve("127.0.0.1", "::1")
    assert labels(listen_all("tcp6:0:interface=relay")) == [r"tcp:PORT:interface=\:\:1"]


def test_tcp6_refuses_an_ipv4_address(listen_all: ListenAll) -> None:
    text = "tcp6:0:interface=127.0.0.1"
    with pytest.raises(StartupError) as caught:
        listen_all(text)
    assert str(caught.value) == f"{text}: the interface has no IPv6 address"


@pytest.mark.parametrize(
    ("call", "code"), [("socket", errno.EAFNOSUPPORT), ("bind", errno.EADDRNOTAVAIL)]
)
def test_a_missing_ipv6_address_of_a_name_is_left_out(
    listen_all: ListenAll,
    resolve: Resolve,
    call: str,
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Many systems without IPv6 have ::1 for localhost in /etc/hosts."""
    resolve("::1", "127.0.0.1")
    monkeypatch.setattr(
        socket, "socket", refusing(lambda sock: sock.family == socket.AF_INET6, call, code)
    )
    monkeypatch.setattr(transit_relay.log, "propagate", True)
    caplog.set_level(logging.INFO, transit_relay.log.name)
    assert labels(listen_all("tcp:0:interface=relay")) == ["tcp:PORT:interface=127.0.0.1"]
    [record] = caplog.records
    message = f"tcp:0:interface=relay: IPv6 address ::1 left out: {os.strerror(code)}"
    assert record.getMessage() == message


def test_a_missing_ipv4_address_of_a_name_is_an_error(
    listen_all: ListenAll, resolve: Resolve
) -> None:
    resolve("127.0.0.1", "203.0.113.77")
    with pytest.raises(StartupError) as caught:
        listen_all("tcp:0:interface=relay")
    assert str(caught.value) == "tcp:0:interface=relay: Cannot assign requested address"


class Taken:
    """Makes the port of an address appear to be taken: the first `times` attempts to bind fail."""

    def __init__(self, address: str, times: int) -> None:
        self.ports: list[int] = []  # of the attempts that failed
        self.sockets: list[socket.socket] = []  # all that were made
        taken = self

        class Socket(socket.socket):
            def bind(self, where: tuple[str, int]) -> None:  # type: ignore[override]
                taken.sockets.append(self)
                if where[0] == address and len(taken.ports) < times:
                    taken.ports.append(where[1])
                    raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
                super().bind(where)

        self.socket_class = Socket


def test_a_free_port_that_is_taken_at_another_address_is_replaced(
    listen_all: ListenAll, resolve: Resolve, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve("127.0.0.1", "127.0.0.2")
    taken = Taken("127.0.0.2", times=3)
    monkeypatch.setattr(socket, "socket", taken.socket_class)
    listeners = listen_all("tcp:0:interface=relay")
    assert labels(listeners) == [f"tcp:PORT:interface=127.0.0.{n}" for n in (1, 2)]
    assert len(taken.ports) == 3 and 0 not in taken.ports


@pytest.mark.parametrize("attempts", [1, transit_relay.FREE_PORT_ATTEMPTS])
def test_a_port_that_stays_taken_at_another_address_is_an_error(
    listen_all: ListenAll,
    resolve: Resolve,
    monkeypatch: pytest.MonkeyPatch,
    port: int,
    attempts: int,
) -> None:
    """A port that the operator chose is tried once, and a free port is sought several times."""
    port = port if attempts == 1 else 0
    resolve("127.0.0.1", "127.0.0.2")
    taken = Taken("127.0.0.2", times=1000)
    monkeypatch.setattr(socket, "socket", taken.socket_class)
    with pytest.raises(StartupError) as caught:
        listen_all(f"tcp:{port}:interface=relay")
    assert str(caught.value) == f"tcp:{port}:interface=relay: Address already in use"
    assert len(taken.ports) == attempts
    assert {sock.fileno() for sock in taken.sockets} == {-1}  # all are closed


# Opening: several endpoints.


@needs_ipv6
@pytest.mark.parametrize("ipv6", ["tcp6:{}", r"tcp:{}:interface=\:\:"])
@pytest.mark.parametrize("reverse", [False, True])
def test_both_any_addresses_share_a_port(
    listen_all: ListenAll, port: int, ipv6: str, reverse: bool
) -> None:
    texts = [f"tcp:{port}:interface=0.0.0.0", ipv6.format(port)]
    listeners = listen_all(*texts[:: -1 if reverse else 1])
    four, six = listeners[:: -1 if reverse else 1]
    meet(four, socket.AF_INET, ("127.0.0.1", port)).close()
    meet(six, socket.AF_INET6, ("::1", port)).close()
    assert four.bound == (socket.AF_INET, ("0.0.0.0", port), False)
    assert six.bound == (socket.AF_INET6, ("::", port, 0, 0), True)


@needs_ipv6
def test_both_any_addresses_with_a_port_each_are_independent(listen_all: ListenAll) -> None:
    _, six = listen_all("tcp:0:interface=0.0.0.0", "tcp6:0")
    meet(six, socket.AF_INET, ("127.0.0.1", port_of(six))).close()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("tcp:{}:interface=127.0.0.1", "tcp:{}:interface=127.0.0.1"),
        ("tcp:{}:interface=127.0.0.1", "tcp:{}"),
        ("tcp:{}:interface=0.0.0.0", "tcp:{}"),
        ("tcp:{}", "{}"),
        ("haproxy:tcp:{}", "tcp:{}"),
    ],
)
def test_a_tcp_port_of_this_relay_is_named(
    listen_all: ListenAll, port: int, first: str, second: str
) -> None:
    first, second = first.format(port), second.format(port)
    with pytest.raises(StartupError) as caught:
        listen_all(first, second)
    reason = f"Address already in use; this relay itself listens on {first}"
    assert str(caught.value) == f"{second}: {reason}"
    listen_all(first)  # the failed start left no listener


@pytest.mark.parametrize(
    "second",
    ["unix:x.sock", "unix:./x.sock", "unix:link/x.sock:mode=600", "haproxy:unix:x.sock"],
)
def test_a_unix_socket_given_twice(listen_all: ListenAll, folder: Path, second: str) -> None:
    (folder / "link").symlink_to(".")
    with pytest.raises(StartupError) as caught:
        listen_all("unix:x.sock", "unix:other.sock", second)
    assert str(caught.value) == f"{second}: this socket is given twice"
    assert os.listdir(folder) == ["link"]


def test_a_passed_unix_socket_given_by_its_path_too(listen_all: ListenAll, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as original:
        original.bind(str(folder / "x.sock"))
        original.listen()
        number = os.dup(original.fileno())
        with pytest.raises(StartupError) as caught:
            listen_all("unix:x.sock", f"fd:{number}")
    assert str(caught.value) == "unix:x.sock: this socket is given twice"


# Opening: unix sockets.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make an empty folder the current one: the path of a unix socket must be short."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("unix:x.sock", 0o666),
        ("unix:x.sock:mode=660", 0o660),
        ("unix:x.sock:mode=600", 0o600),
        ("unix:x.sock:mode=0", 0),
    ],
)
def test_unix_mode(listen: Listen, folder: Path, text: str, mode: int) -> None:
    before = os.umask(0o027)  # has no effect
    try:
        listen(text)
    finally:
        after = os.umask(before)
    assert stat.S_IMODE((folder / "x.sock").stat().st_mode) == mode
    assert after == 0o027


@pytest.mark.parametrize("option", ["", ":lockfile=0", ":lockfile=1"])
def test_unix_socket_is_served_and_removed(listen: Listen, folder: Path, option: str) -> None:
    listener = listen(f"unix:x.sock{option}")
    assert os.listdir(folder) == ["x.sock"]  # no lock file
    meet(listener, socket.AF_UNIX, "x.sock").close()
    listener.close()
    assert os.listdir(folder) == []


def test_stale_unix_socket_is_replaced(listen: Listen, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("x.sock")
        dead.listen()
    listener = listen("unix:x.sock")
    meet(listener, socket.AF_UNIX, "x.sock").close()


@pytest.mark.parametrize("queue", ["empty", "full"])
def test_live_unix_socket_is_refused(listen: Listen, folder: Path, queue: str) -> None:
    with contextlib.ExitStack() as opened:
        live = opened.enter_context(socket.socket(socket.AF_UNIX))
        live.bind("x.sock")
        live.listen(0)
        before = os.lstat("x.sock")
        while queue == "full":
            waiting = opened.enter_context(socket.socket(socket.AF_UNIX))
            waiting.setblocking(False)
            try:
                waiting.connect("x.sock")
            except BlockingIOError:
                break
        with pytest.raises(StartupError) as caught:
            listen("unix:x.sock")
        assert str(caught.value) == "unix:x.sock: another program listens there"
        assert os.path.samestat(os.lstat("x.sock"), before)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_a_file_that_is_not_a_socket_is_refused_and_untouched(
    listen: Listen, folder: Path, kind: str
) -> None:
    path = folder / "x.sock"
    if kind == "file":
        path.write_text("precious")
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("dead.sock")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind("dead.sock")
    else:
        os.mkfifo(path)
    before = path.lstat()
    with pytest.raises(StartupError) as caught:
        listen("unix:x.sock")
    assert str(caught.value) == "unix:x.sock: the file exists and is not a socket"
    assert path.lstat() == before


@pytest.mark.parametrize("path", ["missing/x.sock", "x" * 150], ids=["no-folder", "too-long"])
def test_impossible_unix_path(listen: Listen, folder: Path, path: str) -> None:
    with pytest.raises(StartupError) as caught:
        listen(f"unix:{path}")
    why = "longer than 107 bytes" if len(path) > 107 else "No such file or directory"
    assert str(caught.value) == f"unix:{path}: {why}"


@pytest.mark.parametrize("other", ["socket", "file", "nothing"])
def test_unix_path_that_is_no_longer_ours_is_left(listen: Listen, folder: Path, other: str) -> None:
    listener = listen("unix:x.sock")
    (folder / "x.sock").unlink()
    if other == "socket":
        with socket.socket(socket.AF_UNIX) as successor:
            successor.bind("x.sock")
    elif other == "file":
        (folder / "x.sock").write_text("precious")
    before = os.listdir(folder)
    listener.close()
    assert os.listdir(folder) == before


@pytest.fixture
def owners(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """Return the changes of owner: only root may make them."""
    changes: list[tuple[object, ...]] = []

    def chown(path: str, uid: int, gid: int, *, follow_symlinks: bool) -> None:
        changes.append((path, uid, gid, follow_symlinks))

    monkeypatch.setattr(os, "chown", chown)
    return changes


def test_a_unix_socket_is_given_to_another_user(
    listen: Listen, folder: Path, owners: list[tuple[object, ...]]
) -> None:
    listen("unix:x.sock:mode=660").give_to(1, 33)
    assert owners == [("x.sock", 1, 33, False)]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change an owner")
def test_a_unix_socket_really_changes_its_owner(listen: Listen, folder: Path) -> None:
    listener = listen("unix:x.sock:mode=660")
    listener.give_to(1, 33)
    found = (folder / "x.sock").stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode)) == (1, 33, 0o660)
    listener.close()
    assert os.listdir(folder) == []


@pytest.mark.parametrize("made_by", ["successor", "caller", "nothing", "tcp"])
def test_an_owner_that_is_not_ours_to_change(
    listen: Listen, folder: Path, owners: list[tuple[object, ...]], made_by: str
) -> None:
    """Another program's file at the path, a passed socket, a removed file, and no file."""
    if made_by == "tcp":
        listener = listen("tcp:0:interface=127.0.0.1")
    elif made_by == "caller":
        with socket.socket(socket.AF_UNIX) as original:
            original.bind("x.sock")
            original.listen()
            listener = listen(f"fd:{os.dup(original.fileno())}")
    else:
        listener = listen("unix:x.sock")
        (folder / "x.sock").unlink()
        if made_by == "successor":
            (folder / "x.sock").touch()
    missing = made_by == "nothing"
    with pytest.raises(StartupError) if missing else contextlib.nullcontext() as caught:
        listener.give_to(1, 33)
    assert owners == []
    assert not missing or str(caught.value) == "unix:x.sock: No such file or directory"


def test_a_refused_change_of_owner_names_the_endpoint(
    listen: Listen, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chown(*_: object, **__: object) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), "x.sock")

    monkeypatch.setattr(os, "chown", chown)
    with pytest.raises(StartupError) as caught:
        listen("unix:x.sock").give_to(1, 33)
    assert str(caught.value) == "unix:x.sock: Operation not permitted"


def test_a_unix_socket_is_bound_to_its_absolute_path(listen: Listen, folder: Path) -> None:
    listener = listen("unix:./x.sock")
    assert listener.bound == (socket.AF_UNIX, str(folder.resolve() / "x.sock"), False)


# Opening: sockets that are open already.

PASSED_FROM = 200  # instead of 3, a descriptor that pytest uses


class Activation:
    """Listening sockets that are passed to this process as systemd passes them."""

    def __init__(self, count: int, **values: str) -> None:
        """`values`: variables of the environment that differ from those that systemd sets."""
        self.addresses = []
        for position in range(count):
            with socket.create_server(("127.0.0.1", 0)) as original:
                os.dup2(original.fileno(), PASSED_FROM + position)
                self.addresses.append(original.getsockname())
        self.values = {
            "LISTEN_PID": str(os.getpid()),
            "LISTEN_FDS": str(count),
            "LISTEN_FDNAMES": "",
            **values,
        }

    def parse(self) -> PassedSockets:
        """Return what the relay reads in the environment."""
        return PassedSockets.parse(*self.values.values())


Activate = Callable[..., Activation]


@pytest.fixture
def activate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Activate]:
    """Pass listening sockets. Request this before `listen`, which closes the adopted sockets."""
    monkeypatch.setattr(transit_relay, "FIRST_PASSED_FD", PASSED_FROM)
    yield Activation
    os.closerange(PASSED_FROM, PASSED_FROM + 10)


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("systemd:index=0", 0),
        ("systemd:index=1", 1),
        ("systemd:domain=INET6:index=1", 1),
        ("systemd:name=web", 1),
        ("systemd:name=relay", 0),
        ("systemd:name=", 2),
        ("haproxy:systemd:index=1", 1),
        ("haproxy:systemd:name=relay", 0),
    ],
)
def test_systemd(activate: Activate, listen: Listen, text: str, position: int) -> None:
    activation = activate(3, LISTEN_FDNAMES="relay:web:")
    listener = listen(text, activation.parse())
    assert listener.label == text
    assert listener.endpoint.has_proxy_header == text.startswith("haproxy:")
    meet(listener, socket.AF_INET, activation.addresses[position]).close()


def test_the_names_of_passed_sockets_tell_how_they_are_used(activate: Activate) -> None:
    names = "haproxy:haproxy-websocket:websocket:haproxy-web::xhaproxy:Haproxy:xwebsocket"
    endpoints = activate(9, LISTEN_FDNAMES=names).parse().endpoints()
    assert [
        (one.text, one.kind, one.position, one.role is Role.WEBSOCKET, one.has_proxy_header)
        for one in endpoints
    ] == [
        ("haproxy:systemd:index=0", "systemd", 0, False, True),
        ("haproxy:systemd:index=1", "systemd", 1, True, True),
        ("systemd:index=2", "systemd", 2, True, False),
        *((f"systemd:index={n}", "systemd", n, False, False) for n in range(3, 9)),
    ]


def test_systemd_without_names(activate: Activate) -> None:
    assert activate(2).parse() == PassedSockets(2, ())


def test_a_count_of_sockets_that_cannot_be_open_is_refused_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One call finds it. A loop over 999,999 descriptors would take seconds."""
    calls = []

    def fstat(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))

    with pytest.raises(StartupError) as caught, monkeypatch.context() as patched:
        patched.setattr(os, "fstat", fstat)
        PassedSockets.parse(str(os.getpid()), "999999", "")
    assert str(caught.value) == "LISTEN_FDS=999999: descriptor 1000001: Bad file descriptor"
    assert calls == [1_000_001]


@pytest.mark.parametrize("count", ["3", "999999"])
def test_a_missing_descriptor_is_found(activate: Activate, count: str) -> None:
    activation = activate(2, LISTEN_FDS=count)
    with pytest.raises(StartupError, match=f"^LISTEN_FDS={count}: descriptor [0-9]+: Bad file"):
        activation.parse()


@pytest.mark.parametrize("pid", ["1", "", "me"])
def test_sockets_for_another_process_are_remarked(
    activate: Activate, listen: Listen, pid: str
) -> None:
    """A wrapper script that starts the relay without exec has the process id of LISTEN_PID."""
    passed = activate(2, LISTEN_PID=pid).parse()
    assert (passed.total, passed.names, passed.endpoints()) == (0, (), [])
    assert passed.remark == (
        "LISTEN_FDS is for another process, and is ignored:"
        " a wrapper script must start the relay with exec"
    )
    with pytest.raises(StartupError) as caught:
        listen("systemd:index=0", passed)
    assert str(caught.value) == f"systemd:index=0: 0 sockets were passed; {passed.remark}"


@pytest.mark.parametrize(
    "values",
    [("", "", ""), ("1", "", ""), ("1", "0", ""), ("1", "x", ""), (str(os.getpid()), "1", "")],
)
def test_nothing_is_remarked_without_a_reason(
    activate: Activate, values: tuple[str, str, str]
) -> None:
    activate(1)
    assert PassedSockets.parse(*values).remark == ""


@pytest.mark.parametrize(
    ("values", "text", "why"),
    [
        ({"LISTEN_PID": "1"}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_PID": "me"}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_FDS": ""}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_FDS": "-1"}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_FDS": "9" * 5000}, "systemd:index=0", "0 sockets were passed"),
        ({}, "systemd:index=2", "2 sockets were passed"),
        ({"LISTEN_FDS": "1"}, "systemd:index=1", "1 socket was passed"),
        ({}, "systemd:name=relay", "0 sockets of this name"),
        ({"LISTEN_FDNAMES": "a:b"}, "systemd:name=relay", "0 sockets of this name"),
        ({"LISTEN_FDNAMES": "relay:relay"}, "systemd:name=relay", "2 sockets of this name"),
        ({"LISTEN_FDNAMES": "a:b:relay"}, "systemd:name=relay", "0 sockets of this name"),
    ],
)
def test_systemd_refused(
    activate: Activate, listen: Listen, values: dict[str, str], text: str, why: str
) -> None:
    with pytest.raises(StartupError) as caught:
        listen(text, activate(2, **values).parse())
    assert str(caught.value).startswith(f"{text}: {why}")


def test_descriptor(listen: Listen) -> None:
    original = socket.create_server(("127.0.0.1", 0))
    address = original.getsockname()
    number = original.detach()
    os.set_inheritable(number, True)
    listener = listen(f"fd:{number}")
    assert listener.fd == number
    assert listener.label == f"fd:{number}"
    assert not os.get_inheritable(number)
    meet(listener, socket.AF_INET, address).close()


def test_descriptor_of_a_unix_socket_is_served_and_its_file_left(
    listen: Listen, folder: Path
) -> None:
    """The program that made the file removes it."""
    original = socket.socket(socket.AF_UNIX)
    original.bind("x.sock")
    original.listen()
    listener = listen(f"fd:{original.detach()}")
    meet(listener, socket.AF_UNIX, "x.sock").close()
    listener.close()
    assert os.listdir(folder) == ["x.sock"]


@pytest.mark.parametrize("kind", ["not listening", "connected", "datagram", "file", "closed"])
def test_descriptor_that_is_not_a_listening_socket(listen: Listen, kind: str) -> None:
    with contextlib.ExitStack() as opened:
        if kind == "not listening":
            number = opened.enter_context(socket.socket()).fileno()
        elif kind == "connected":
            one, _ = map(opened.enter_context, socket.socketpair())
            number = one.fileno()
        elif kind == "datagram":
            number = opened.enter_context(socket.socket(type=socket.SOCK_DGRAM)).fileno()
        elif kind == "file":
            number = opened.enter_context(open(os.devnull)).fileno()
        else:
            number = 2**31 - 1
        with pytest.raises(StartupError) as caught:
            listen(f"fd:{number}")
        why = {
            "file": "Socket operation on non-socket",
            "closed": "Bad file descriptor",
        }.get(kind, f"descriptor {number} is no listening stream socket")
        said = str(caught.value)
        assert said == f"fd:{number}: {why}"


@pytest.mark.parametrize("text", ["tcp:4001", "tcp:4001:interface=relay"])
def test_an_open_descriptor_is_adopted_for_an_endpoint(text: str) -> None:
    """As a reload does: the label names the real address."""
    endpoint = parse_endpoint(text, Role.WEBSOCKET)
    original = socket.create_server(("127.0.0.1", 0))
    port = original.getsockname()[1]
    (listener,) = transit_relay.open_endpoint(endpoint, original.detach())
    with contextlib.closing(listener):
        meet(listener, socket.AF_INET, ("127.0.0.1", port)).close()
        interface = ":interface=127.0.0.1" if endpoint.interface else ""
        assert listener.label == f"tcp:{port}{interface}"
        assert (listener.endpoint, listener.endpoint.role) == (endpoint, Role.WEBSOCKET)
        assert listener.bound == (socket.AF_INET, ("127.0.0.1", port), False)


def test_an_adopted_unix_socket_that_we_made_is_removed(listen: Listen, folder: Path) -> None:
    """A reload carries `made`, so that the new program removes the file at its end."""
    first = listen("unix:x.sock")
    second = Listener(socket.socket(fileno=os.dup(first.fd)), first.endpoint, first.made_file)
    first.made_file = None
    first.close()
    assert second.bound == (socket.AF_UNIX, str(folder.resolve() / "x.sock"), False)
    second.close()
    assert os.listdir(folder) == []


def test_two_starts_do_not_remove_each_others_socket(
    listen: Listen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder stays locked while a stale socket is replaced."""

    def remove(endpoint: Endpoint) -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(endpoint.path)

    monkeypatch.setattr(transit_relay, "_remove_stale_socket", remove)
    (tmp_path / "s").touch()
    folder = os.open(tmp_path, os.O_RDONLY)
    listen(f"unix:{tmp_path}/s")
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_a_folder_that_stays_locked_delays_the_start_only(
    listen: Listen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transit_relay, "FOLDER_LOCK_SECONDS", 0.01)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    listen(f"unix:{tmp_path}/s")
    os.close(folder)
