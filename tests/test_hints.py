"""`--print-hints`, and the line for clients that a start on a terminal shows."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import ENTRY, RELAY, TIMEOUT, RelayProcess

import transit_relay
from transit_relay import announce, main, parse_arguments, parse_endpoint, parse_host

NAME = "relay.example.org"
PLACEHOLDER = "Replace PORT: these endpoints do not tell the TCP port that clients connect to:"
HINT = "Relay hint of the transit protocol:"
WEBSOCKET = "WebSocket clients:"
PYTHON = "Python client (the receiver: `receive` in place of `send FILE`):"
VARIABLE = "The same, for a whole shell:"
RUST = "Rust client:"

# The output.


@pytest.fixture
def run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Return a function: `main` with these arguments, which may open no socket.

    It returns the exit code, stdout and stderr.
    """

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    def run(*arguments: str) -> tuple[int, str, str]:
        with monkeypatch.context() as patch:
            patch.setattr(socket, "socket", fail)
            patch.setattr(transit_relay, "serve", fail)
            try:
                code = main(arguments)
            except SystemExit as end:
                assert isinstance(end.code, int)
                code = end.code
        return code, *capsys.readouterr()

    return run


def blocks(output: str) -> dict[str, str]:
    """Return the line below each heading. Each block must have two lines."""
    return dict(block.split("\n") for block in output.removesuffix("\n").split("\n\n"))


@pytest.fixture
def hints(run: Callable[..., tuple[int, str, str]]) -> Callable[..., dict[str, str]]:
    """Return a function: the blocks that `--print-hints` prints for a host and other options."""

    def hints(host: str, *options: str) -> dict[str, str]:
        code, output, errors = run(f"--print-hints={host}", *options)
        assert (code, errors) == (0, "")
        return blocks(output)

    return hints


def tcp(host: str, port: object) -> dict[str, object]:
    """Return the hint of a TCP port."""
    return {"type": "direct-tcp-v1", "priority": 0.0, "hostname": host, "port": port}


def websocket(url: str) -> list[dict[str, object]]:
    """Return the hints of a WebSocket in the two spellings that have a URL."""
    return [{"type": "websocket-v1", "url": url}, {"type": "websocket", "url": url}]


def old_websocket(kind: str, host: str, port: int) -> dict[str, object]:
    """Return the hint of a WebSocket in the spelling that has no URL."""
    return {"type": f"direct-{kind}-v1", "hostname": host, "port": port}


def relay_hint(*inner: object) -> dict[str, object]:
    return {"type": "relay-v1", "hints": list(inner)}


OUTPUT = """\
Python client (the receiver: `receive` in place of `send FILE`):
wormhole --transit-helper=tcp:relay.example.org:4001 send FILE

The same, for a whole shell:
export WORMHOLE_TRANSIT_HELPER=tcp:relay.example.org:4001

Rust client:
wormhole-rs send --relay-server=tcp://relay.example.org:4001 FILE

WebSocket clients:
ws://relay.example.org:4001/

Relay hint of the transit protocol:
{"type": "relay-v1", "hints": [{"type": "direct-tcp-v1", "priority": 0.0, \
"hostname": "relay.example.org", "port": 4001}, \
{"type": "websocket-v1", "url": "ws://relay.example.org:4001/"}, \
{"type": "websocket", "url": "ws://relay.example.org:4001/"}, \
{"type": "direct-ws-v1", "hostname": "relay.example.org", "port": 4001}]}
"""


def test_the_output_for_the_default_options(run: Callable[..., tuple[int, str, str]]) -> None:
    assert run("--print-hints", NAME) == (0, OUTPUT, "")


def test_the_example_in_the_documentation() -> None:
    operating = (RELAY.parent / "docs" / "operating.md").read_text(encoding="utf-8")
    example = "".join(f"    {line}".rstrip() + "\n" for line in OUTPUT.splitlines())
    assert f"\n\n{example}\n" in operating


@pytest.mark.parametrize("host", ["2001:db8::1", "[2001:db8::1]", "2001:DB8:0:0:0:0:0:1"])
def test_an_ipv6_address(hints: Callable[..., dict[str, str]], host: str) -> None:
    """It has brackets beside a port, but not in a field of its own. Shells expand brackets."""
    found = hints(host)
    assert json.loads(found.pop(HINT)) == relay_hint(
        tcp("2001:db8::1", 4001),
        *websocket("ws://[2001:db8::1]:4001/"),
        old_websocket("ws", "2001:db8::1", 4001),
    )
    assert found == {
        PYTHON: "wormhole --transit-helper='tcp:[2001:db8::1]:4001' send FILE",
        VARIABLE: "export WORMHOLE_TRANSIT_HELPER='tcp:[2001:db8::1]:4001'",
        RUST: "wormhole-rs send --relay-server='tcp://[2001:db8::1]:4001' FILE",
        WEBSOCKET: "ws://[2001:db8::1]:4001/",
    }


def test_an_ipv4_address(hints: Callable[..., dict[str, str]]) -> None:
    found = hints("192.0.2.1", "--port=tcp:443")
    assert found[PYTHON] == "wormhole --transit-helper=tcp:192.0.2.1:443 send FILE"
    assert json.loads(found[HINT])["hints"][0] == tcp("192.0.2.1", 443)


def test_each_port_is_a_hint_once(hints: Callable[..., dict[str, str]]) -> None:
    ports = ["--port=tcp:4001:interface=192.0.2.1", "--port=tcp:4001:interface=192.0.2.2"]
    found = hints(NAME, *ports, "--port=unix:x.sock", "--port=tcp6:443")
    assert found[PYTHON] == f"wormhole --transit-helper=tcp:{NAME}:4001 send FILE"
    assert json.loads(found[HINT])["hints"][:3] == [
        *(tcp(NAME, 4001), tcp(NAME, 443)),
        websocket(f"ws://{NAME}:4001/")[0],
    ]


WITHOUT_A_PORT = [
    ["haproxy:tcp:4001"],
    ["unix:/run/x.sock"],
    ["tcp:0"],
    ["fd:3"],
    ["systemd:index=0"],
    ["tcp:4001:interface=127.0.0.1"],
    ["tcp:4001:interface=localhost"],
    [r"tcp:4001:interface=\:\:1"],
    ["haproxy:tcp:4001", "tcp6:0"],
]


@pytest.mark.parametrize("endpoints", WITHOUT_A_PORT, ids=", ".join)
def test_a_placeholder_for_a_port_that_is_not_known(
    hints: Callable[..., dict[str, str]], endpoints: list[str]
) -> None:
    found = hints(NAME, *(f"--port={text}" for text in endpoints))
    assert found == {
        PLACEHOLDER: ", ".join(endpoints),
        PYTHON: f"wormhole --transit-helper=tcp:{NAME}:PORT send FILE",
        VARIABLE: f"export WORMHOLE_TRANSIT_HELPER=tcp:{NAME}:PORT",
        RUST: f"wormhole-rs send --relay-server=tcp://{NAME}:PORT FILE",
        HINT: json.dumps(relay_hint(tcp(NAME, 4001))).replace("4001", "PORT"),
    }


def test_a_relay_hint_is_json_once_the_placeholder_is_replaced(
    hints: Callable[..., dict[str, str]],
) -> None:
    found = hints(NAME, "--port=haproxy:tcp:4001", "--websocket-url=wss://ws.example.org/")
    assert json.loads(found[HINT].replace("PORT", "443")) == relay_hint(
        tcp(NAME, 443),
        *websocket("wss://ws.example.org/"),
        old_websocket("wss", "ws.example.org", 443),
    )


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1"])
def test_on_the_same_machine_a_loopback_interface_has_a_known_port(
    hints: Callable[..., dict[str, str]], host: str
) -> None:
    found = hints(host, "--port=tcp:4001:interface=127.0.0.1")
    assert PLACEHOLDER not in found and ":4001/" in found[WEBSOCKET]


@pytest.mark.parametrize(
    ("options", "url"),
    [
        ("-u wss://ws.example.org/relay -w tcp:4002", "wss://ws.example.org/relay"),
        ("-w tcp:4002", f"ws://{NAME}:4002/"),
        ("-p tcp:443 -w tcp:4002 -w tcp:4003", f"ws://{NAME}:4002/"),
        ("-p haproxy:tcp:443 -w tcp:4002", f"ws://{NAME}:4002/"),
        ("-p tcp:443 -w haproxy:tcp:4002", f"ws://{NAME}:443/"),
        ("-p tcp:443 -w tcp:4002:interface=127.0.0.1", f"ws://{NAME}:443/"),
        ("-p tcp:443 -w unix:x.sock", f"ws://{NAME}:443/"),
        ("-p unix:x.sock -w tcp:0", None),
    ],
)
def test_the_address_for_websocket_clients(
    hints: Callable[..., dict[str, str]], options: str, url: str | None
) -> None:
    found = hints(NAME, *options.split())
    assert found.get(WEBSOCKET) == url
    in_hint = json.loads(found[HINT].replace("PORT", "1"))["hints"]
    assert [hint["url"] for hint in in_hint if "url" in hint] == ([url, url] if url else [])


@pytest.mark.parametrize(
    ("url", "spelling"),
    [
        ("ws://ws.example.org/", old_websocket("ws", "ws.example.org", 80)),
        ("wss://ws.example.org", old_websocket("wss", "ws.example.org", 443)),
        ("wss://ws.example.org:8000", old_websocket("wss", "ws.example.org", 8000)),
        ("WSS://ws.example.org", old_websocket("wss", "ws.example.org", 443)),
        ("ws://[2001:db8::1]/", old_websocket("ws", "2001:db8::1", 80)),
        ("wss://[2001:db8::1]:8000/", old_websocket("wss", "2001:db8::1", 8000)),
        ("wss://ws.example.org/relay", None),
        ("wss://ws.example.org/?relay", None),
    ],
)
def test_the_spelling_without_a_url_has_no_path(
    hints: Callable[..., dict[str, str]], url: str, spelling: dict[str, object] | None
) -> None:
    found = json.loads(hints(NAME, f"--websocket-url={url}")[HINT])
    assert found == relay_hint(tcp(NAME, 4001), *websocket(url), *([spelling] if spelling else []))


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_an_endpoint_that_the_output_cannot_encode(encoding: str) -> None:
    """It is escaped."""
    path = os.fsencode("unix:/run/\u20ac/") + b"\xff"
    done = subprocess.run(
        [sys.executable, RELAY, "--print-hints", NAME, "--port", path],
        env={**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "LC_ALL": "C.UTF-8"},
        capture_output=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stderr) == (0, b"")
    euro = "\u20ac".encode() if encoding == "utf-8" else b"\\u20ac"
    assert b"unix:/run/" + euro + b"/\\udcff" in done.stdout


def test_an_output_that_is_closed() -> None:
    argv = [sys.executable, str(RELAY), "--print-hints", NAME]
    command = ["sh", "-c", 'exec "$@" >&-', "sh", *argv]
    done = subprocess.run(command, capture_output=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_endpoints_of_a_configuration(
    hints: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    (tmp_path / "relay.conf").write_text("port tcp:443\ndaemonize\nuser nobody-here\n")
    found = hints(NAME, f"--config={tmp_path / 'relay.conf'}")
    assert found[VARIABLE] == f"export WORMHOLE_TRANSIT_HELPER=tcp:{NAME}:443"


WRONG = [
    *("a b", " ", "relay.example.org ", "http://relay.example.org/", "relay.example.org/"),
    *("relay.example.org:4001", "tcp:relay.example.org:4001", "user@relay.example.org"),
    *("relay..example.org", ".example.org", "4001", "300.1.1.1", "192.0.2.1:4001", "x\n"),
    *("[relay.example.org]", "[192.0.2.1]", "[2001:db8::1", "2001:db8::1]", "[2001:db8::1]:4001"),
    *("2001:db8::1::", "fe80::1%eth0", "r\u00e9lais.example.org", "'", "*"),
]


@pytest.mark.parametrize("host", WRONG)
def test_a_wrong_host(run: Callable[..., tuple[int, str, str]], host: str) -> None:
    code, output, errors = run(f"--print-hints={host}")
    why = f"argument --print-hints: {host!r} is not the name or the IP address of a host"
    assert (code, output) == (2, "")
    assert errors == f"transit-relay: {' '.join(why.split())} (--help lists all options)\n"


def test_an_empty_host(run: Callable[..., tuple[int, str, str]]) -> None:
    code, output, errors = run("--print-hints=")
    assert (code, output) == (2, "")
    assert errors.startswith("transit-relay: argument --print-hints: '' is empty")


@pytest.mark.parametrize(
    "host", ["localhost", "relay", "relay_1.example.org.", "xn--rlais-bsa.org"]
)
def test_a_name_is_kept(host: str) -> None:
    assert parse_host(host) == host


def test_an_ipv6_address_has_no_dots() -> None:
    """The Python client accepts none."""
    assert parse_host("::ffff:192.0.2.1") == "192.0.2.1"
    assert parse_host("64:ff9b::192.0.2.1") == "64:ff9b::c000:201"


def test_the_command_as_a_process(tmp_path: Path) -> None:
    """A start with these options is impossible here, but the hints are printed."""
    command = [sys.executable, str(ENTRY), f"--print-hints={NAME}"]
    options = ["--port=tcp:4001", "--usage-db=missing/db", "--pidfile=missing/pid"]
    done = subprocess.run(
        [*command, *options], cwd=tmp_path, capture_output=True, text=True, timeout=4 * TIMEOUT
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, OUTPUT, "")
    assert os.listdir(tmp_path) == []


def test_without_ws_frames_there_is_no_websocket(tmp_path: Path) -> None:
    copy = shutil.copy(RELAY, tmp_path)
    command = [sys.executable, "-B", str(copy), f"--print-hints={NAME}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert (done.returncode, done.stderr) == (0, "")
    found = blocks(done.stdout)
    assert WEBSOCKET not in found
    assert json.loads(found[HINT]) == relay_hint(tcp(NAME, 4001))
    refused = subprocess.run(
        [*command, "--websocket=tcp:4002"], capture_output=True, text=True, timeout=4 * TIMEOUT
    )
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith(
        "transit-relay: WebSocket, --status and haproxy: Python finds no"
    )


# The start on a terminal.

USE = [
    "to use it: wormhole --transit-helper=tcp:HOST:4001 send FILE",
    "(the same command with --print-hints=HOST prints more)",
]


def start_messages(
    caplog: pytest.LogCaptureFixture,
    *arguments: str,
    endpoints: tuple[str, ...] = ("tcp:4001",),
    is_reload: bool = False,
) -> list[str]:
    """Return the messages of a start. The port of each endpoint is 4001; a unix socket has none."""
    caplog.set_level("INFO", "transit-relay")
    listeners = [
        SimpleNamespace(
            label=text, endpoint=parse_endpoint(text), port=None if "unix" in text else 4001
        )
        for text in endpoints
    ]
    relay = SimpleNamespace(listeners=listeners, remark="")
    announce(parse_arguments(arguments), relay, is_reload)  # type: ignore[arg-type]
    return caplog.messages


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make stderr a terminal, as far as the relay can tell."""
    monkeypatch.setattr(os, "isatty", lambda fd: fd == 2)


@pytest.mark.parametrize(
    "endpoints", [("tcp:4001",), ("unix:x.sock", "haproxy:tcp:1", "tcp:0", "tcp:2"), ("fd:3",)]
)
def test_the_start_messages_tell_how_to_use_the_relay(
    terminal: None, caplog: pytest.LogCaptureFixture, endpoints: tuple[str, ...]
) -> None:
    *_, first, second, last = start_messages(caplog, endpoints=endpoints)
    assert [first, second] == USE
    assert last.startswith("Transit starting on")  # it is documented as the last one


@pytest.mark.parametrize(
    ("arguments", "others"),
    [
        (["--logfile=log"], {}),
        (["--daemonize"], {}),
        (["--log-fd=2"], {}),  # messages go to stdout
        ([], {"is_reload": True}),
        ([], {"endpoints": ("unix:x.sock",)}),
        ([], {"endpoints": ("haproxy:tcp:4001",)}),
    ],
)
def test_starts_that_do_not_tell(
    terminal: None,
    caplog: pytest.LogCaptureFixture,
    arguments: list[str],
    others: dict[str, object],
) -> None:
    messages = start_messages(caplog, *arguments, **others)  # type: ignore[arg-type]
    assert messages and not {*messages} & {*USE}


def test_without_a_terminal_a_start_does_not_tell() -> None:
    with RelayProcess("--port=tcp:0:interface=127.0.0.1") as relay:
        relay.started()
        relay.stop_cleanly()
    assert b"HOST" not in relay.stderr


def read_line(terminal: int, beginning: str, said: list[str]) -> None:
    """Read lines from a terminal into `said`, up to one that begins so."""
    text = b""
    while not (text.endswith(b"\n") and said[-1].startswith(beginning)):
        assert select.select([terminal], [], [], 4 * TIMEOUT)[0], (said, text)
        text = (b"" if text.endswith(b"\n") else text) + os.read(terminal, 1)
        if text.endswith(b"\n"):
            said.append(text.decode().rstrip())


def test_a_start_and_a_reload_on_a_terminal() -> None:
    ours, its = os.openpty()
    command = [sys.executable, str(RELAY), "--port=tcp:0:interface=127.0.0.1"]
    said: list[str] = []
    try:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=its) as relay:
            os.close(its)
            try:
                read_line(ours, "Transit starting on", said)
                relay.send_signal(signal.SIGHUP)
                read_line(ours, "Transit reloaded", said)
                relay.send_signal(signal.SIGTERM)
                assert relay.wait(4 * TIMEOUT) == 0
            finally:
                relay.kill()
    finally:
        os.close(ours)
    port = said[-1].split(":")[1]
    start = next(n for n, line in enumerate(said) if line.startswith("Transit starting on"))
    assert said[start - 2 : start] == [line.replace("4001", port) for line in USE]
    assert not [line for line in said[start:] if "HOST" in line]
