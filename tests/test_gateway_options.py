"""`--forward` as an option: its values, its module, starts, checks, and reloads of a process."""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest.mock import MagicMock

import pytest
from gateways import Target, gateway, transit_relay_gateway
from helpers import (
    DIRECTIONS,
    RELAY,
    TIMEOUT,
    Client,
    RelayProcess,
    handshake,
)
from test_reload import WS_FRAMES, Installation, moods, pass_on
from transit_relay_gateway import is_local, parse_target, proxy_header

from transit_relay import (
    MAX_SOCKET_PATH_BYTES,
    Listener,
    StartupError,
    main,
    open_endpoint,
    parse_address,
    parse_arguments,
    parse_endpoint,
)
from ws_frames import ProxyReader

MODULE = Path(inspect.getfile(gateway))
LOCAL = "tcp:0:interface=127.0.0.1"
EVERYWHERE = "tcp:0:interface=0.0.0.0"
ELSEWHERE = "203.0.113.1"  # a documentation address, which no machine has
NOT_BY_RELOAD = "--forward and its haproxy: cannot be added or removed by a reload"
# Refused by the resolver, and by Python before that. Neither asks a name server.
NO_HOSTS = {
    "tcp:[::1%nosuchif]:4001": "Name or service not known",
    "tcp:relay..example:4001": "the host is no address and no name",
}
NO_HOST = pytest.mark.parametrize(("target", "why"), NO_HOSTS.items(), ids=["address", "name"])


# The value.


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("tcp:relay.example:4001", ("relay.example", 4001, "", False)),
        ("tcp:192.0.2.1:1", ("192.0.2.1", 1, "", False)),
        ("tcp:[2001:db8::1]:65535", ("2001:db8::1", 65535, "", False)),
        ("tcp:[fe80::1%eth0]:4001", ("fe80::1%eth0", 4001, "", False)),
        (r"tcp:2001\:db8\:\:1:4001", ("2001:db8::1", 4001, "", False)),
        ("haproxy:tcp:relay.example:4001", ("relay.example", 4001, "", True)),
        ("haproxy:tcp:[::1]:4001", ("::1", 4001, "", True)),
        ("unix:/run/relay.sock", ("", 0, "/run/relay.sock", False)),
        ("unix:relay.sock", ("", 0, "relay.sock", False)),
        (r"unix:a\:b", ("", 0, "a:b", False)),
        ("haproxy:unix:/run/relay.sock", ("", 0, "/run/relay.sock", True)),
        ("unix:" + "x" * MAX_SOCKET_PATH_BYTES, ("", 0, "x" * MAX_SOCKET_PATH_BYTES, False)),
    ],
)
def test_a_target(text: str, values: tuple[object, ...]) -> None:
    assert parse_target(text) == Target(text, *values)
    assert parse_arguments(["--forward", text]).forward == parse_target(text)


@pytest.mark.parametrize(
    "text",
    [
        *("4001", "relay.example", "relay.example:4001", "tcp", "tcp:", "unix", "haproxy:"),
        *("tcp:relay.example", "tcp:relay.example:", "tcp:4001", "tcp::4001", "tcp:[]:4001"),
        *("tcp:a:0", "tcp:a:65536", "tcp:a:-1", "tcp:a:+1", "tcp:a:x", "tcp:a:\u0661"),
        *("tcp:a:4001\n", "tcp:a:4001:b", "tcp:::1:4001", "tcp:[::1:4001", "tcp:::1]:4001"),
        *("udp:a:4001", "TCP:a:4001", "tcp6:a:4001", "systemd:name=relay", "fd:3"),
        *("haproxy:haproxy:tcp:a:4001", "haproxy:unix:", "haproxy:tcp:a", "unix:", "unix:a\0b"),
        *("unix:" + "x" * (MAX_SOCKET_PATH_BYTES + 1), "unix:" + "\xe9" * 54, ""),
    ],
)
def test_what_is_no_target(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main([f"--forward={text}"])
    said = capsys.readouterr().err
    assert exit.value.code == 2 and said.count("\n") == 1 and said.endswith("\n")
    assert said.startswith("transit-relay: argument --forward: ")
    reasons = ("is not of the form ", "the path is missing", "longer than 107 bytes", "is empty")
    assert any(reason in said for reason in reasons)


def test_the_form_for_a_proxy_is_shown_to_those_who_want_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for prefix in ("", "haproxy:"):
        with pytest.raises(SystemExit):
            main([f"--forward={prefix}relay"])
        form = f"is not of the form {prefix}tcp:HOST:PORT or {prefix}unix:PATH"
        assert form in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--usage-db=db", "--usage-db=:memory:", "--log-fd=1"])
@pytest.mark.parametrize("is_in_a_file", [False, True])
def test_a_gateway_writes_no_records(
    option: str,
    is_in_a_file: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("relay.conf").write_text(f"{option}\n")
    arguments = ["--config=relay.conf"] if is_in_a_file else [option]
    with pytest.raises(SystemExit) as exit:
        main([*arguments, "--forward=unix:relay.sock"])
    name = option.partition("=")[0]
    assert exit.value.code == 2
    assert capsys.readouterr().err == (
        "transit-relay: argument --forward: a gateway writes no records,"
        f" so {name} has no use (--help lists all options)\n"
    )
    assert os.listdir(tmp_path) == ["relay.conf"]


# The PROXY header.


@pytest.mark.parametrize(
    "address", ["192.0.2.77", "0.0.0.0", "2001:db8:1:2:3:4:5:6", "::", "ffff:" * 7 + "ffff"]
)
@pytest.mark.parametrize("is_split", [False, True])
def test_a_header_tells_the_address(address: str, is_split: bool) -> None:
    header = proxy_header(parse_address(address))
    assert read_header(header, is_split) == (address, b"rest")


def test_a_header_without_an_address() -> None:
    assert read_header(proxy_header(None), is_split=True) == (None, b"rest")


def read_header(header: bytes, is_split: bool) -> tuple[str | None, bytes]:
    """Return the address in a header, and what follows it. `is_split`: into single bytes."""
    reader = ProxyReader()
    for byte in header[:-1] if is_split else b"":
        assert reader.receive(bytes((byte,))) is None
    result = reader.receive((header[-1:] if is_split else header) + b"rest")
    assert result is not None
    return result[0], bytes(result[1])


def test_a_mapped_address_is_sent_as_ipv4() -> None:
    assert proxy_header(parse_address("::ffff:192.0.2.77")) == (
        b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c" + bytes((192, 0, 2, 77)) + bytes(8)
    )


# Names.


def test_a_name_has_several_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the order of the system. The same one twice is one."""
    found = [
        (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 4001, 0, 0)),
        *[(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 4001))] * 2,
    ]
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *ask, **_: asked.append(ask) or found)
    assert parse_target("tcp:relay.example:4001").resolve() == [
        (socket.AF_INET6, ("2001:db8::1", 4001, 0, 0)),
        (socket.AF_INET, ("192.0.2.1", 4001)),
    ]
    assert asked == [("relay.example", 4001)]


@NO_HOST
def test_a_name_without_an_address(target: str, why: str) -> None:
    with pytest.raises(StartupError) as error:
        parse_target(target).resolve()
    assert str(error.value) == f"--forward {target}: {why}"


@NO_HOST
@pytest.mark.parametrize("options", [(), ("--check",)], ids=["start", "check"])
def test_a_start_and_a_check_need_an_address(
    tmp_path: Path, options: tuple[str, ...], target: str, why: str
) -> None:
    """No file stays, not even that of a unix socket that was opened before."""
    ports = ("--port", LOCAL, "--port", "unix:relay.sock")
    with RelayProcess(*options, *ports, "--forward", target, cwd=tmp_path) as relay:
        assert relay.wait() == 1
    assert relay.stderr.decode() == f"transit-relay: --forward {target}: {why}\n"
    assert os.listdir(tmp_path) == []


def test_a_check_does_not_need_the_relay_behind(capsys: pytest.CaptureFixture[str]) -> None:
    """It may start later."""
    assert main(["--check", "--forward=unix:no/such/relay.sock"]) == 0
    assert capsys.readouterr().out == "check ok\n"


NO_FAMILY = os.strerror(errno.EAFNOSUPPORT)


@pytest.mark.parametrize("missing", ["", "ipv6", "ipv4", "both"])
def test_a_family_without_sockets_is_left_out(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    ipv4 = (socket.AF_INET, ("192.0.2.1", 4001))
    ipv6 = [(socket.AF_INET6, (f"2001:db8::{n}", 4001, 0, 0)) for n in (1, 2)]
    addresses = [ipv6[0], ipv4, ipv6[1]]
    found = [(family, socket.SOCK_STREAM, 6, "", address) for family, address in addresses]
    families = {"ipv4": {socket.AF_INET}, "ipv6": {socket.AF_INET6}, "": set()}
    left_out = families.get(missing, {socket.AF_INET, socket.AF_INET6})
    real = socket.socket

    def make(family: int, kind: int) -> socket.socket:
        if family in left_out:
            raise OSError(errno.EAFNOSUPPORT, NO_FAMILY)
        return real(socket.AF_UNIX, kind)  # the system may have no IPv6

    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    monkeypatch.setattr(socket, "socket", make)
    target = parse_target("tcp:relay.example:4001")
    if missing == "both":
        with pytest.raises(StartupError) as error:
            target.resolve()
        assert str(error.value) == f"--forward tcp:relay.example:4001: {NO_FAMILY}"
    else:
        assert target.resolve() == [one for one in addresses if one[0] not in left_out]


# A relay that would forward to itself.


@pytest.mark.parametrize(
    ("address", "expected"),
    [("127.0.0.1", True), ("127.0.0.2", True), ("0.0.0.0", True), (ELSEWHERE, False)],
)
def test_whether_an_address_is_local(address: str, expected: bool) -> None:
    """Without a route it is not."""
    assert is_local(socket.AF_INET, (address, 4001)) == expected


@pytest.mark.parametrize(
    ("own", "expected"), [("::ffff:127.0.0.1", True), ("::ffff:203.0.113.9", False)]
)
def test_whether_a_mapped_address_is_local(
    monkeypatch: pytest.MonkeyPatch, own: str, expected: bool
) -> None:
    """`own`: from which the system would send to that address."""
    probe = MagicMock()
    probe.__enter__().getsockname.return_value = (own, 50000, 0, 0)
    monkeypatch.setattr(socket, "socket", lambda *_: probe)
    assert is_local(socket.AF_INET6, ("::ffff:127.0.0.2", 4001, 0, 0)) == expected


@contextlib.contextmanager
def listening(text: str) -> Iterator[list[Listener]]:
    """Yield the listeners of an endpoint. Close them at the end."""
    listeners = open_endpoint(parse_endpoint(text))
    try:
        yield listeners
    finally:
        for one in listeners:
            one.sock.close()


@pytest.mark.parametrize(
    ("endpoint", "host", "is_own"),
    [
        (LOCAL, "127.0.0.1", True),
        (EVERYWHERE, "127.0.0.1", True),
        (EVERYWHERE, "127.0.0.2", True),
        ("tcp:0", "127.0.0.1", True),  # "::", or without IPv6 "0.0.0.0"
        (LOCAL, "127.0.0.2", False),
        (LOCAL, ELSEWHERE, False),
        (EVERYWHERE, ELSEWHERE, False),
        ("tcp:0", ELSEWHERE, False),
    ],
)
@pytest.mark.parametrize("prefix", ["", "haproxy:"])
def test_a_target_is_not_a_listener_of_the_same_relay(
    endpoint: str, host: str, is_own: bool, prefix: str
) -> None:
    with listening(endpoint) as listeners:
        port = listeners[0].sock.getsockname()[1]
        target = parse_target(f"{prefix}tcp:{host}:{port}")
        why = f"--forward {target.text}: this relay listens there itself"
        if is_own:
            with pytest.raises(StartupError) as error:
                target.require_other(target.resolve(), [], listeners)
            assert str(error.value) == why
            other = target._replace(port=port % 65535 + 1)
            other.require_other(other.resolve(), [], listeners)
        else:
            target.require_other(target.resolve(), [], listeners)


def test_each_address_is_compared_with_each_listener() -> None:
    with listening(LOCAL) as first, listening(LOCAL) as second:
        port = second[0].sock.getsockname()[1]
        target = parse_target(f"tcp:127.0.0.1:{port}")
        elsewhere = (int(socket.AF_INET), (ELSEWHERE, port))
        with pytest.raises(StartupError):
            target.require_other([elsewhere, *target.resolve()], [], [*first, *second])
        target.require_other([elsewhere], [], [*first, *second])
        target.require_other(target.resolve(), [], first)


@pytest.mark.parametrize(
    ("family", "host"),
    [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::ffff:127.0.0.1")],
    ids=["wildcard", "mapped"],
)
def test_another_way_to_write_the_address_of_a_listener(family: int, host: str) -> None:
    with listening(LOCAL) as listeners:
        port = listeners[0].sock.getsockname()[1]
        target = parse_target(f"tcp:127.0.0.1:{port}")
        with pytest.raises(StartupError):
            target.require_other([(int(family), (host, port))], [], listeners)


def test_a_listener_for_ipv4_is_not_met_over_ipv6(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system may have no IPv6."""
    monkeypatch.setattr(transit_relay_gateway, "is_local", lambda *_: True)
    with listening(EVERYWHERE) as listeners:
        port = listeners[0].sock.getsockname()[1]
        target = parse_target(f"tcp:[::1]:{port}")
        target.require_other([(int(socket.AF_INET6), ("::1", port, 0, 0))], [], listeners)


@pytest.mark.parametrize(
    ("endpoint", "path", "is_own"),
    [
        ("unix:relay.sock", "relay.sock", True),
        ("haproxy:unix:relay.sock", "{}/relay.sock", True),
        ("unix:{}/relay.sock", "relay.sock", True),
        ("unix:relay.sock", "link/relay.sock", True),
        ("unix:relay.sock", "other.sock", False),
        ("unix:relay.sock", "link/other.sock", False),
        (LOCAL, "relay.sock", False),
    ],
)
def test_a_target_is_not_a_unix_socket_of_the_same_relay(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, endpoint: str, path: str, is_own: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("link").symlink_to(tmp_path)
    with listening(endpoint.format(tmp_path)) as listeners:
        target = parse_target(f"unix:{path.format(tmp_path)}")
        with pytest.raises(StartupError) if is_own else contextlib.nullcontext():
            target.require_other(target.resolve(), [], listeners)


@pytest.mark.parametrize("options", [(), ("--check",)], ids=["start", "check"])
@pytest.mark.parametrize("prefix", ["", "haproxy:"])
def test_a_relay_that_would_forward_to_itself_does_not_start(
    tmp_path: Path, options: tuple[str, ...], prefix: str
) -> None:
    target = f"{prefix}unix:relay.sock"
    ports = ("--port", LOCAL, "--port", "unix:relay.sock")
    with RelayProcess(*options, *ports, "--forward", target, cwd=tmp_path) as relay:
        assert relay.wait() == 1
    why = "this relay listens there itself"
    assert relay.stderr.decode() == f"transit-relay: --forward {target}: {why}\n"
    assert os.listdir(tmp_path) == []
    others = ("--port", "unix:other.sock", "--forward", target)
    with RelayProcess(*others, cwd=tmp_path) as relay:
        relay.started().stop_cleanly()


# The module.


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    """Return an installation with the module of gateways."""
    installation = Installation(tmp_path)
    shutil.copy(MODULE, installation.folder)
    return installation


def check(program: Path) -> tuple[int, str, str]:
    """Check the options of a gateway. Return the exit code, stdout and stderr."""
    command = [sys.executable, str(program), "--check", "--forward=unix:relay.sock"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    return done.returncode, done.stdout, done.stderr


def test_the_module_is_found_beside_the_program(tmp_path: Path) -> None:
    """The program is a script here, so it is not the module transit_relay."""
    for module in (RELAY, WS_FRAMES, MODULE):
        shutil.copy(module, tmp_path)
    assert check(tmp_path / RELAY.name) == (0, "check ok\n", "")
    (tmp_path / MODULE.name).unlink()
    why = "Python finds no transit_relay_gateway.py (beside transit_relay.py)"
    assert check(tmp_path / RELAY.name) == (1, "", f"transit-relay: --forward: {why}\n")


@pytest.mark.parametrize(
    "text",
    [
        *("class Broken(\n", "import missing_module\n", "", "1 / 0\n"),
        "from transit_relay import Gone\n",  # of another version
    ],
)
def test_a_module_that_cannot_be_imported(installation: Installation, text: str) -> None:
    (installation.folder / MODULE.name).write_text(text)
    code, output, said = check(installation.entry)
    assert (code, output, said.count("\n")) == (1, "", 1)
    why = "--forward: transit_relay_gateway.py cannot be imported: "
    assert said.startswith(f"transit-relay: {why}")


# As a process.


@pytest.fixture
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """Return the relay behind, with a database."""
    folder = tmp_path_factory.mktemp("behind")
    options = ("--port", LOCAL, "--port", "haproxy:unix:relay.sock", "--usage-db=usage.sqlite")
    with RelayProcess(*options, cwd=folder) as relay:
        yield relay.started()


def target_of(relay: RelayProcess) -> str:
    """Return the value of `forward` for a relay."""
    return f"tcp:127.0.0.1:{relay.port}"


def folder_of(relay: RelayProcess) -> Path:
    """Return the folder in which a relay runs."""
    return Path(os.readlink(f"/proc/{relay.pid}/cwd"))


def meet(one: Client, other: Client, token: str) -> None:
    """Let two clients meet, which have sent nothing yet."""
    one.send(handshake(token, "one"))
    other.send(handshake(token, "other"))
    assert one.receive(3) == other.receive(3) == b"ok\n"


@pytest.mark.parametrize("is_unix", [False, True], ids=["tcp", "haproxy-unix"])
def test_a_gateway_records_nothing(
    installation: Installation, behind: RelayProcess, is_unix: bool
) -> None:
    """The relay behind records these pairs.

    A client of the gateway also meets a client that is connected to the relay behind.
    """
    folder = folder_of(behind)
    target = f"haproxy:unix:{folder}/relay.sock" if is_unix else target_of(behind)
    installation.configure(f"port {LOCAL}", f"forward {target}")
    files = {*installation.folder.rglob("*")}
    with installation.start() as relay:
        assert f"a gateway: clients find their partners at {target}\n" in relay.stderr.decode()
        assert b"blurring" not in relay.stderr
        for number, kinds in enumerate(DIRECTIONS):
            one, other = map(relay.client, kinds)
            meet(one, other, f"pair{number}")
            pass_on(one, other)
            one.close()
            assert other.read(1) == b""
        mine, theirs = relay.client("ws"), behind.client()
        with theirs:
            meet(mine, theirs, "mixed")
            pass_on(theirs, mine)
        relay.stop_cleanly()
    new = {*installation.folder.rglob("*")} - files
    assert {path for path in new if path.parent.name != "__pycache__"} == set()
    behind.stop_cleanly()
    assert moods(folder) == ["happy"] * 5


def test_a_reload_of_a_gateway(installation: Installation, behind: RelayProcess) -> None:
    """Twice: pairs, a client that waits, and half a handshake."""
    installation.configure(f"port {LOCAL}", f"forward {target_of(behind)}")
    folder = folder_of(behind)
    with installation.start() as relay:
        pairs = [tuple(map(relay.client, kinds)) for kinds in DIRECTIONS]
        for number, (one, other) in enumerate(pairs):
            meet(one, other, f"pair{number}")
        waiting, half = relay.client("ws"), relay.client("tcp")
        waiting.send(handshake("waits", "one"))
        line = handshake("half", "one")
        for start in (0, 20):
            half.send(line[start : start + 20])
            for one, _ in pairs:
                one.send(b"before")
            relay.reload()
            for one, other in pairs:
                assert other.receive(6) == b"before"
                pass_on(other, one)
        half.send(line[40:])
        for one, token in ((waiting, "waits"), (half, "half")):
            partner = behind.client()
            with partner:
                partner.send(handshake(token, "other"))
                assert one.receive(3) == partner.receive(3) == b"ok\n"
                pass_on(one, partner)
        for one, other in pairs:
            one.close()
            assert other.read(1) == b""
        relay.stop_cleanly()
    behind.stop_cleanly()
    assert moods(folder) == ["happy"] * 6


def test_a_reload_changes_the_target(installation: Installation, behind: RelayProcess) -> None:
    """Clients that were sent on before stay where they are."""
    installation.configure(f"port {LOCAL}", f"forward {target_of(behind)}")
    with installation.start() as relay, RelayProcess("--port", LOCAL) as another:
        one, other = relay.client("ws"), relay.client()
        meet(one, other, "pair")
        waiting = relay.client("ws")
        waiting.send(handshake("waits", "one"))
        installation.configure(f"port {LOCAL}", f"forward {target_of(another.started())}")
        relay.reload()
        pass_on(one, other)
        new = relay.client("ws")
        with behind.client() as partner, another.client() as new_partner:
            partner.send(handshake("waits", "other"))
            assert waiting.receive(3) == partner.receive(3) == b"ok\n"
            meet(new, new_partner, "new")
        relay.stop_cleanly()


@pytest.mark.parametrize("is_unix", [False, True])
def test_a_reload_to_the_relay_itself_is_refused(
    installation: Installation, behind: RelayProcess, is_unix: bool
) -> None:
    own = f"unix:{installation.folder}/relay.sock"
    ports = (f"port {LOCAL}", f"port {own}")
    installation.configure(*ports, f"forward {target_of(behind)}")
    with installation.start() as relay:
        one, other = relay.client("ws"), relay.client()
        meet(one, other, "pair")
        target = own if is_unix else target_of(relay)
        installation.configure(*ports, f"forward {target}")
        assert relay.refused() == f"--forward {target}: this relay listens there itself"
        pass_on(one, other)
        installation.configure(*ports, f"forward {target_of(behind)}")
        relay.reload()
        meet(relay.client("ws"), relay.client(), "new")
        assert relay.stop() == 0


RESOLVER = """
import socket
import sys

ask = socket.getaddrinfo


def getaddrinfo(host, *arguments, **options):
    if host != "relay.example":
        return ask(host, *arguments, **options)
    if sys.argv[-1] != "--check":
        raise socket.gaierror(socket.EAI_AGAIN, "not in a rehearsal")
    return [
        found
        for address in ("127.0.0.9", "127.0.0.1")
        for found in ask(address, *arguments, **options)
    ]


socket.getaddrinfo = getaddrinfo
"""


def test_a_reload_asks_the_resolver_in_the_rehearsal_only(
    installation: Installation, behind: RelayProcess
) -> None:
    """So no client waits for it. Twice: the second reload finds the same target."""
    entry = installation.entry.read_text()
    installation.entry.write_text(RESOLVER + entry)
    installation.configure(f"port {LOCAL}", f"forward {target_of(behind)}")
    with installation.start() as relay, RelayProcess("--port", LOCAL) as another:
        one, other = relay.client("ws"), relay.client()
        meet(one, other, "pair")
        target = f"tcp:relay.example:{another.started().port}"
        installation.configure(f"port {LOCAL}", f"forward {target}")
        for number in range(2):
            relay.reload()
            pass_on(one, other)
            new = relay.client("ws")  # the first address refuses
            with another.client() as partner:
                meet(new, partner, f"new{number}")
        assert "not in a rehearsal" not in relay.read_messages()
        assert relay.stop() == 0


Change = Callable[[Installation, str], None]


def add_or_remove(forward: str) -> Change:
    """Return a change of the configuration to a line, or to none."""
    return lambda installation, target: installation.configure(f"port {LOCAL}", forward)


def without_module(installation: Installation, target: str) -> None:
    """Remove the module of gateways."""
    (installation.folder / MODULE.name).unlink()


def carry_less(installation: Installation, target: str) -> None:
    """Let a gateway that goes on not know whether its connections are answered."""
    path = installation.folder / MODULE.name
    old, new = "CARRIED = (*Connection.CARRIED, *__slots__)", "CARRIED = Connection.CARRIED"
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (add_or_remove("forward haproxy:unix:/x.sock"), NOT_BY_RELOAD),
        (add_or_remove(""), NOT_BY_RELOAD),
        *(
            (add_or_remove(f"forward {target}"), f"--forward {target}: {why}")
            for target, why in NO_HOSTS.items()
        ),
        (without_module, "--forward: Python finds no transit_relay_gateway.py (beside"),
        (carry_less, "the new program cannot take over all clients: it misses a field of Back"),
        (add_or_remove("forward tcp:4001"), "argument --forward: 'tcp:4001' is not of the form"),
    ],
)
def test_a_refused_reload_changes_nothing(
    installation: Installation, behind: RelayProcess, change: Change, reason: str
) -> None:
    installation.configure(f"port {LOCAL}", f"forward {target_of(behind)}")
    with installation.start() as relay:
        one, other = relay.client("ws"), relay.client()
        meet(one, other, "pair")
        change(installation, target_of(behind))
        assert reason in relay.refused()
        pass_on(one, other)
        meet(relay.client("ws"), relay.client(), "new")
        assert relay.stop() == 0


def test_a_relay_does_not_become_a_gateway(
    installation: Installation, behind: RelayProcess
) -> None:
    with installation.start() as relay:
        one, other = relay.meet("tcp", "ws")
        installation.configure(f"port {LOCAL}", f"forward {target_of(behind)}")
        assert relay.refused() == NOT_BY_RELOAD
        pass_on(one, other)
        assert relay.stop() == 0
