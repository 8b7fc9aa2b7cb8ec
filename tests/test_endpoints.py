"""Endpoints: how the strings are read, and what opens behind them. In this process."""

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
    StartupError,
    UsageError,
    open_listeners,
    parse_endpoint,
)


def can_bind(family: int, address: str) -> bool:
    """Whether this machine has `address`."""
    try:
        with socket.socket(family) as sock:
            sock.bind((address, 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(
    not can_bind(socket.AF_INET6, "::1"), reason="this machine has no IPv6"
)

Listen = Callable[..., Listener]


@pytest.fixture
def listen() -> Iterator[Listen]:
    """Open an endpoint; what was opened is closed at the end."""
    with contextlib.ExitStack() as opened:

        def start(text: str, passed: PassedSockets | None = None) -> Listener:
            (listener,) = open_listeners([parse_endpoint(text)], passed or PassedSockets())
            opened.callback(listener.close)
            return listener

        yield start


def port_of(listener: Listener) -> int:
    """The real port of a tcp listener."""
    return int(listener.sock.getsockname()[1])


def meet(listener: Listener, family: int, address: object) -> socket.socket:
    """Connect to `address`, and give what the listener accepts: the relay's end."""
    listener.sock.settimeout(TIMEOUT)
    with socket.socket(family) as client:
        client.settimeout(TIMEOUT)
        client.connect(address)
        accepted, _ = listener.sock.accept()
        client.sendall(b"hello")
        accepted.settimeout(TIMEOUT)
        assert accepted.recv(5) == b"hello"
        return accepted


# Reading.

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
    "systemd:index=0": {"kind": "systemd", "position": 0, "name": None},
    "systemd:index=12": {"position": 12},
    "systemd:name=relay.socket": {"position": None, "name": "relay.socket"},
    "systemd:domain=INET6:index=0": {"position": 0},
    "systemd:domain=INET:index=0": {"position": 0},
    "systemd:domain=UNIX:name=relay": {"name": "relay"},
    "systemd:INET6:index=1": {"position": 1},
    "fd:3": {"kind": "fd", "fileno": 3},
    "fd:fileno=7": {"fileno": 7},
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
    "4001": "not an endpoint",
    "tcp": "not an endpoint",
    ":4001": "not an endpoint",
    "udp:4001": "not an endpoint, write KIND:... (KIND: one of tcp, unix, systemd, fd)",
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
}


@pytest.mark.parametrize(("text", "why"), BAD.items(), ids=BAD)
def test_parse_error_names_endpoint_and_reason(text: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_endpoint(text)
    said = str(caught.value)
    assert text in said
    assert why in said
    assert "\n" not in said


# Opening: TCP.


@pytest.mark.parametrize("text", ["tcp:0", r"tcp:0:interface=\:\:", "tcp:0:interface="])
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
        pytest.param(r"tcp:0:interface=\:\:1", r"tcp:{}:interface=\:\:1", marks=needs_ipv6),
    ],
)
def test_label_is_an_endpoint_with_the_real_port(listen: Listen, text: str, label: str) -> None:
    listener = listen(text)
    assert port_of(listener) > 0
    assert listener.label == label.format(port_of(listener))
    parse_endpoint(listener.label)


def somaxconn() -> int:
    """What the kernel cuts a backlog to."""
    return int(Path("/proc/sys/net/core/somaxconn").read_text())


@pytest.mark.parametrize(
    ("text", "backlog"), [("tcp:0", 1024), ("tcp:0:backlog=50", 1024), ("tcp:0:backlog=2000", 2000)]
)
def test_backlog_of_the_kernel(listen: Listen, text: str, backlog: int) -> None:
    info = listen(text).sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    # linux/tcp.h: the backlog of a listening socket stands in tcpi_sacked.
    assert struct.unpack_from("I", info, 28) == (min(backlog, somaxconn()),)


@pytest.mark.parametrize("interface", ["", "127.0.0.1"])
def test_busy_port(listen: Listen, interface: str) -> None:
    port = port_of(listen("tcp:0:interface=127.0.0.1"))
    text = f"tcp:{port}:interface={interface}"
    with pytest.raises(StartupError) as caught:
        listen(text)
    assert str(caught.value) == f"{text}: Address already in use"


def test_port_is_free_again_while_old_connections_linger(listen: Listen) -> None:
    """A restart must not wait for TIME_WAIT to pass."""
    listener = listen("tcp:0:interface=127.0.0.1")
    port = port_of(listener)
    listener.sock.settimeout(TIMEOUT)
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as client:
        listener.sock.accept()[0].close()  # closed from here first: TIME_WAIT is on this side
        assert client.recv(1) == b""
    listener.close()
    assert port_of(listen(f"tcp:{port}:interface=127.0.0.1")) == port


def refusing(refused: Callable[[socket.socket], bool], call: str, code: int) -> type:
    """A socket class whose `call` fails with `code` where `refused` says so."""

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
    """Faked: root may do everything, and some systems let everybody bind port 80."""
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
    """Faked: a look-up may take long where there is no network."""

    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with pytest.raises(StartupError) as caught:
        listen("tcp:0:interface=nowhere")
    assert str(caught.value) == "tcp:0:interface=nowhere: Name or service not known"


@pytest.mark.parametrize("interface", ["a..b", ".", "x" * 64 + ".org", "\udcff"])
def test_interface_that_no_host_can_have(listen: Listen, interface: str) -> None:
    """The resolver refuses these with a UnicodeError of its own."""
    with pytest.raises(StartupError) as caught:
        listen(f"tcp:0:interface={interface}")
    assert str(caught.value).startswith(f"tcp:0:interface={interface}: ")


@pytest.mark.parametrize("text", ["tcp:0", r"tcp:0:interface=\:\:"])
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
    assert "IPv6" in said.getMessage() and text in said.getMessage()


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


# Opening: unix sockets.


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current one: the path of a unix socket has to be short."""
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
    before = os.umask(0o027)  # has no say
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
            knocking = opened.enter_context(socket.socket(socket.AF_UNIX))
            knocking.setblocking(False)
            try:
                knocking.connect("x.sock")
            except BlockingIOError:
                break
        with pytest.raises(StartupError) as caught:
            listen("unix:x.sock")
        assert str(caught.value) == "unix:x.sock: another program listens there"
        assert os.path.samestat(os.lstat("x.sock"), before)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "fifo"])
def test_what_is_no_socket_is_refused_and_untouched(
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
def test_unix_path_that_cannot_be(listen: Listen, folder: Path, path: str) -> None:
    with pytest.raises(StartupError) as caught:
        listen(f"unix:{path}")
    why = "AF_UNIX path too long" if len(path) > 100 else "No such file or directory"
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


# Opening: sockets that are open already.

PASSED_FROM = 200  # instead of 3, which is pytest's


Activate = Callable[..., "list[object]"]


@pytest.fixture
def activate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Activate]:
    """Pass `count` listening sockets to us, as systemd does: give their addresses.

    `values` go to the environment. Ask for this before `listen`, which closes what it took.
    """
    monkeypatch.setattr(transit_relay, "FIRST_PASSED_FD", PASSED_FROM)

    def start(count: int, **values: str) -> list[object]:
        addresses = []
        for position in range(count):
            with socket.create_server(("127.0.0.1", 0)) as original:
                os.dup2(original.fileno(), PASSED_FROM + position)
                addresses.append(original.getsockname())
        values = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(count), **values}
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return addresses

    yield start
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
    ],
)
def test_systemd(activate: Activate, listen: Listen, text: str, position: int) -> None:
    addresses = activate(3, LISTEN_FDNAMES="relay:web:")
    listener = listen(text, PassedSockets.take())
    assert listener.label == text
    meet(listener, socket.AF_INET, addresses[position]).close()


def test_taken_sockets_leave_the_environment(activate: Activate) -> None:
    activate(1, LISTEN_FDNAMES="relay")
    assert PassedSockets.take() == PassedSockets(1, ("relay",))
    assert not [name for name in os.environ if name.startswith("LISTEN_")]
    assert PassedSockets.take() == PassedSockets()


def test_systemd_without_names(activate: Activate) -> None:
    activate(2)
    assert PassedSockets.take() == PassedSockets(2, ())


@pytest.mark.parametrize(
    ("values", "text", "why"),
    [
        ({"LISTEN_PID": "1"}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_PID": "me"}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_FDS": ""}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_FDS": "-1"}, "systemd:index=0", "0 sockets were passed"),
        ({"LISTEN_FDS": "9" * 5000}, "systemd:index=0", "0 sockets were passed"),
        ({}, "systemd:index=2", "2 sockets were passed"),
        ({}, "systemd:name=relay", "0 sockets of this name"),
        ({"LISTEN_FDNAMES": "a:b"}, "systemd:name=relay", "0 sockets of this name"),
        ({"LISTEN_FDNAMES": "relay:relay"}, "systemd:name=relay", "2 sockets of this name"),
        ({"LISTEN_FDNAMES": "a:b:relay"}, "systemd:name=relay", "0 sockets of this name"),
    ],
)
def test_systemd_refused(
    activate: Activate, listen: Listen, values: dict[str, str], text: str, why: str
) -> None:
    activate(2, **values)
    with pytest.raises(StartupError) as caught:
        listen(text, PassedSockets.take())
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
    """Whoever made the file removes it."""
    original = socket.socket(socket.AF_UNIX)
    original.bind("x.sock")
    original.listen()
    listener = listen(f"fd:{original.detach()}")
    meet(listener, socket.AF_UNIX, "x.sock").close()
    listener.close()
    assert os.listdir(folder) == ["x.sock"]


@pytest.mark.parametrize("kind", ["not listening", "connected", "datagram", "file", "closed"])
def test_descriptor_that_is_no_listening_socket(listen: Listen, kind: str) -> None:
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
        }.get(kind, f"descriptor {number} is not a listening stream socket")
        said = str(caught.value)
        assert said == f"fd:{number}: {why}"


def test_two_starts_do_not_take_each_others_socket(
    listen: Listen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks at a dead socket is alone in the folder until its own is there."""

    def look(endpoint: Endpoint) -> None:
        with pytest.raises(BlockingIOError):
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(endpoint.path)

    monkeypatch.setattr(transit_relay, "_remove_dead_socket", look)
    (tmp_path / "s").touch()
    folder = os.open(tmp_path, os.O_RDONLY)
    listen(f"unix:{tmp_path}/s")
    fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(folder)


def test_a_folder_that_somebody_keeps_locked_does_not_hinder(
    listen: Listen, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transit_relay, "FOLDER_LOCK_SECONDS", 0.01)
    folder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    listen(f"unix:{tmp_path}/s")
    os.close(folder)
