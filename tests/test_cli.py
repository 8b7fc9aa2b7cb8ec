"""Run the program as a process: options, messages, exit codes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import (
    RELAY,
    TIMEOUT,
    WEB,
    Client,
    RelayProcess,
    WebSocketClient,
    fill_pipe,
    handshake,
    read_to_end,
    receive,
    reset,
)
from processes import (
    QuietRelay,
    ReachedRelay,
    activated,
    locked,
    only_line,
    patched,
    query,
    redirected,
    refused,
    transfer,
    with_descriptor,
)

from transit_relay import (
    Role,
    __version__,
    announce,
    parse_arguments,
    parse_endpoint,
    parse_network,
)

Start = Callable[..., RelayProcess]

LOCAL = ("--port", "tcp:0:interface=127.0.0.1")


def failed_start(*arguments: str, **kwargs: Any) -> str:
    """Start a relay that must fail. Return its one line on stderr."""
    with RelayProcess(*arguments, **kwargs) as relay:
        assert relay.wait() == 1
    return only_line(relay)


# The command line.


def test_defaults() -> None:
    options = parse_arguments([])
    assert vars(options) == {
        "port": [],
        "websocket": [],
        "websocket_url": None,
        "status": [],
        "forward": None,
        "usage_db": None,
        "log_fd": None,
        "blur_usage": 0,
        "handshake_timeout": 60,
        "max_wait": 0,
        "idle_timeout": 0,
        "stall_timeout": 600,
        "max_connections": None,
        "max_waiting_per_source": 256,
        "max_memory": 256_000_000,
        "keepalive": 200,
        "max_rate": 0,
        "max_pair_rate": 0,
        "monthly_quota": 0,
        "quota_rate": 0,
        "allow": [],
        "trust_forwarded_for": [],
        "config": [],
        "daemonize": False,
        "pidfile": None,
        "logfile": None,
        "user": None,
        "drain": 0,
        "no_splice": False,
        "check": False,
        "print_hints": None,
    }


def test_defaults_of_a_daemon() -> None:
    options = parse_arguments(["--daemonize"])
    assert (options.pidfile, options.logfile) == ("transit_relay.pid", "transit_relay.log")


def test_short_options_are_those_of_the_twisted_relay() -> None:
    short = parse_arguments(["-p", "tcp:4001", "-w", "tcp:4002", "-u", "ws://localhost/"])
    long = ["--port=tcp:4001", "--websocket=tcp:4002", "--websocket-url=ws://localhost/"]
    assert short == parse_arguments(long)


WITH_OWN_PORTS = ["unshare", "--map-root-user", "--net"]


@pytest.mark.skipif(
    subprocess.run([*WITH_OWN_PORTS, "true"], stderr=subprocess.DEVNULL).returncode != 0,
    reason="needs a network namespace of its own: port 4001 may be in use here",
)
def test_no_argument_at_all() -> None:
    program = [*WITH_OWN_PORTS, sys.executable, str(RELAY)]
    with RelayProcess(program=program) as relay:
        relay.wait_for(r"^Transit starting on tcp:4001$")
        relay.stop_cleanly()


WRONG = [
    ["--frobnicate"],
    ["tcp:4001"],
    ["--port"],
    ["--port="],
    ["--port=nonsense"],
    ["--port=tcp:99999"],
    ["--port=tcp:\nx"],  # the message repeats the value
    ["--port=tcp:4001:interface=::"],
    ["--websocket="],
    ["--websocket=tcp:99999"],
    ["--websocket-url="],
    ["--websocket-url=relay.example.org"],
    ["--websocket-url=http://relay.example.org/"],
    ["--websocket-url=ws:///"],
    ["--websocket-url=ws://user@relay.example.org/"],
    ["--websocket-url=ws://relay.example.org/#there"],
    ["--websocket-url=ws://relay.example.org/a b"],
    ["--websocket-url=ws://relay.example.org:port/"],
    ["--websocket-url=ws://relay.example.org/\n"],
    ["--blur=60"],  # no abbreviations: a new option could make them ambiguous
    ["--blur-usage=-1"],
    ["--blur-usage=1.5"],
    ["--blur-usage=hour"],
    ["--blur-usage="],
    ["--blur-usage=2147483648"],
    ["--blur-usage=\u0661"],
    ["--handshake-timeout=-1"],
    ["--handshake-timeout=soon"],
    ["--handshake-timeout=nan"],
    ["--handshake-timeout=inf"],
    ["--handshake-timeout=1_0"],
    ["--handshake-timeout=\u0661"],
    ["--keepalive=-1"],
    ["--keepalive=1.5"],
    ["--keepalive=32768"],
    ["--keepalive="],
    ["--max-rate=10Mb"],
    ["--max-rate=10"],
    ["--max-rate="],
    ["--max-pair-rate=-1MB"],
    ["--monthly-quota=1TB"],  # no --usage-db
    ["--monthly-quota=1TB/s", "--usage-db=:memory:"],
    ["--monthly-quota=", "--usage-db=:memory:"],
    ["--quota-rate=1MB"],  # no --monthly-quota
    ["--quota-rate=1MB", "--monthly-quota=0", "--usage-db=:memory:"],
    ["--port=tcp:4001", "--port="],
    ["--allow="],
    ["--allow=everywhere"],
    ["--allow=192.0.2.1/24"],
    ["--allow=192.0.2.0/24", "--allow="],
    ["--trust-forwarded-for="],
    ["--trust-forwarded-for=localhost"],
    ["--trust-forwarded-for=::1/129"],
    ["--log-fd=-1"],
    ["--log-fd=stdout"],
    ["--log-fd=2147483648"],
    ["--usage-db="],
    ["--pidfile="],
    ["--logfile="],
    ["--config="],
    ["--config=/nonexistent/relay.conf"],
    ["--config=/"],
    ["--user="],  # a script with an unset variable: this must not mean root
    ["--daemonize=yes"],
    ["--print-hints="],
    ["--print-hints=http://relay.example.org/"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_command_line_is_code_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("transit-relay: ")
    assert arguments[0].partition("=")[0] in output.err


@pytest.mark.parametrize("arguments", [["--frobnicate"], ["--port", "tcp:99999"]], ids=" ".join)
def test_wrong_command_line_of_a_process(arguments: list[str]) -> None:
    with RelayProcess(*arguments) as relay:
        assert relay.wait() == 2
    assert arguments[-1] in only_line(relay)


def test_networks() -> None:
    options = parse_arguments(
        ["--allow=192.0.2.0/24", "--allow=unix", "--trust-forwarded-for=2001:db8::/32"]
    )
    assert options.allow == [parse_network("192.0.2.0/24"), parse_network("unix")]
    assert options.trust_forwarded_for == [parse_network("2001:db8::/32")]


def test_a_network_with_host_bits_is_answered_with_the_right_one(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--allow=192.0.2.1/24"])
    why = "'192.0.2.1/24' has host bits set; the network is 192.0.2.0/24"
    assert capsys.readouterr().err.startswith(f"transit-relay: argument --allow: {why} (")


def test_version() -> None:
    with RelayProcess("--version") as relay:
        relay.wait_for(f"^transit-relay {re.escape(__version__)}$", "stdout")
        assert relay.wait() == 0
        assert relay.stderr == b""


@pytest.fixture(scope="module")
def help_text() -> str:
    """Return the output of `--help`."""
    done = subprocess.run(
        [sys.executable, str(RELAY), "--help"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert done.stderr == ""
    return done.stdout


def test_help_has_a_default_and_a_unit_in_every_line(help_text: str) -> None:
    options = re.findall(r"^  -.*(?:\n {3,}.*)*", help_text, re.MULTILINE)
    texts = {" ".join(option.split()) for option in options}
    assert len(texts) == 33
    for option in texts:
        if not option.startswith(("--version", "-h, --help")):
            assert re.search(r"\(default: [^)]+\)$", option), option
        if "SECONDS" in option:
            assert re.search(r"\(default: \d+ s\b", option), option


def test_help_is_grouped(help_text: str) -> None:
    groups = re.findall(r"^(\w.*):$", help_text, re.MULTILINE)
    assert groups == [
        "where it listens",
        "what it records",
        "what it limits",
        "how it runs",
        "about",
        "endpoints",
        "configuration file",
        "signals",
        "exit codes",
    ]


# Where it listens.


def test_more_endpoints_than_the_soft_limit_allows(relay: Start, tmp_path: Path) -> None:
    program = redirected("")
    program[2] = "ulimit -S -n 64; " + program[2]
    endpoints = [f"unix:{n}.sock" for n in range(100)]
    options = [option for endpoint in endpoints for option in ("--port", endpoint)]
    running = relay(*LOCAL, *options, cwd=tmp_path, program=program)
    assert ", ".join(endpoints).encode() in running.stderr


def test_sockets_for_another_process_are_reported(relay: Start) -> None:
    """A wrapper has started the relay, and not replaced itself by exec."""
    running = relay(env={"LISTEN_PID": "1", "LISTEN_FDS": "1"})
    assert running.stop() == 0
    assert re.search("(?m)^warning: LISTEN_", running.stderr.decode())


def test_several_ports_are_one_relay(tmp_path: Path) -> None:
    """Clients of different listeners can be paired."""
    with ReachedRelay(*LOCAL, "--port", "unix:x.sock", cwd=tmp_path) as relay:
        relay.wait_for(r"^Transit starting on tcp:\d+:interface=127\.0\.0\.1, unix:x\.sock$")
        relay.address = ("127.0.0.1", relay.port)
        one = relay.connect()
        relay.address = str(tmp_path / "x.sock")
        other = relay.connect()
        with one, other:
            one.sendall(handshake("meet", "one"))
            other.sendall(handshake("meet", "other"))
            assert receive(one, 3) == receive(other, 3) == b"ok\n"
        relay.stop_cleanly()


def test_unix_endpoint_relays_and_is_removed_at_exit(tmp_path: Path) -> None:
    with ReachedRelay("--port", "unix:x.sock:mode=600", cwd=tmp_path) as relay:
        relay.started()
        relay.address = str(tmp_path / "x.sock")
        transfer(relay)
        relay.stop_cleanly()
    assert os.listdir(tmp_path) == []


def test_descriptor_endpoint_relays() -> None:
    with QuietRelay() as relay:
        transfer(relay)
        relay.wait_for(r"^Transit starting on fd:\d+$")
        relay.stop_cleanly()


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("by", ["index", "name"])
def test_systemd_endpoint_relays(by: str, position: int) -> None:
    endpoint = f"systemd:name=socket{position}" if by == "name" else f"systemd:index={position}"
    with contextlib.ExitStack() as opened:
        passed = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        relay = opened.enter_context(
            ReachedRelay(
                "--port",
                endpoint,
                env={"LISTEN_FDNAMES": "socket0:socket1"},
                pass_fds=[sock.fileno() for sock in passed],
                program=activated(*passed),
            )
        )
        relay.started()
        relay.address = passed[position].getsockname()
        transfer(relay)
        assert relay.stop() == 0  # it has logged a warning: one socket is unused


def test_systemd_endpoint_without_systemd() -> None:
    output = failed_start("--port", "systemd:index=0")
    assert output.startswith("transit-relay: systemd:index=0: 0 sockets ")


@pytest.mark.parametrize("second", ["fd:3", "systemd:index=0"])
def test_one_socket_given_twice_is_refused(second: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        with RelayProcess(
            "--port",
            "fd:3",
            "--port",
            second,
            program=activated(passed),
            pass_fds=[passed.fileno()],
        ) as relay:
            assert relay.wait() == 1
    assert only_line(relay) == f"transit-relay: {second}: this socket is given twice"


def test_a_standard_descriptor_given_twice_is_refused() -> None:
    """The relay listens on a duplicate, but both endpoints are the same socket."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        fd = passed.fileno()
        output = failed_start(
            *("--port", "fd:0", "--websocket", "fd:0"),
            pass_fds=[fd],
            program=with_descriptor(fd, 0),
        )
    assert output == "transit-relay: fd:0: this socket is given twice"


def test_a_standard_descriptor_that_does_not_listen_is_refused() -> None:
    """The message has its own number, not that of the duplicate."""
    with socket.socket() as passed:
        fd = passed.fileno()
        output = failed_start("--port", "fd:0", pass_fds=[fd], program=with_descriptor(fd, 0))
    assert output == "transit-relay: fd:0: descriptor 0 is no listening stream socket"


def test_a_descriptor_that_is_not_open_is_refused() -> None:
    """The relay must not open a descriptor of its own with this number first."""
    output = failed_start(*LOCAL, "--port", "fd:3")
    assert output == "transit-relay: fd:3: Bad file descriptor"


# WebSocket. (The protocol: test_websocket.py.)


@pytest.mark.parametrize("url", ["ws://relay.example.org:4002/", "wss://relay.example.org"])
def test_websocket_url_is_in_the_start_message(relay: Start, url: str) -> None:
    """No --websocket is needed: a --port accepts WebSocket clients too."""
    running = relay("--websocket-url", url)
    assert f"\nWebSocket clients connect to {url}\nTransit starting".encode() in running.stderr


def test_the_start_message_has_all_websocket_endpoints(relay: Start) -> None:
    running = relay(*WEB, *WEB)
    ports = re.findall(rb"tcp:(\d+)[^ ]* \(websocket\)", running.stderr)
    urls = b", ".join(b"ws://localhost:%s/" % port for port in ports)
    assert len(ports) == 2
    assert b"\nWebSocket clients connect to " + urls + b"\nTransit starting" in running.stderr


def test_the_addresses_of_a_websocket_endpoint_have_one_url(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """An endpoint with a name can have a listener for IPv4 and another one for IPv6."""
    caplog.set_level("INFO", "transit-relay")
    labels = ("tcp:4002:interface=127.0.0.1", "tcp:4002:interface=\\:\\:1")
    endpoint = parse_endpoint("tcp:4002", Role.WEBSOCKET)
    listeners = [SimpleNamespace(label=text, endpoint=endpoint, port=4002) for text in labels]
    announce(parse_arguments([]), SimpleNamespace(listeners=listeners, remark=""))
    assert caplog.messages[-2:] == [
        "WebSocket clients connect to ws://localhost:4002/",
        f"Transit starting on {labels[0]} (websocket), {labels[1]} (websocket)",
    ]


def test_a_websocket_endpoint_for_a_proxy_has_no_url(relay: Start) -> None:
    """Clients cannot connect to it: they send no PROXY header."""
    running = relay("--websocket", "haproxy:tcp:0:interface=127.0.0.1")
    assert b"WebSocket clients connect to" not in running.stderr
    starting = (
        rb"Transit starting on tcp:\d+\S+, haproxy:tcp:\d+:interface=127\.0\.0\.1 \(websocket\)"
    )
    assert re.search(starting, running.stderr)


def test_without_websocket_the_start_message_has_no_url(relay: Start) -> None:
    assert b"WebSocket" not in relay().stderr


@pytest.mark.parametrize("first", ["tcp", "ws"])
@pytest.mark.parametrize("second", ["tcp", "ws"])
def test_one_port_serves_both(relay: Start, first: str, second: str) -> None:
    running = relay()
    clients = []
    for kind in (first, second):
        sock = running.connect()
        clients.append(WebSocketClient(sock) if kind == "ws" else Client(sock))
    one, other = clients
    with one, other:
        one.send(handshake("t", "one"))
        other.send(handshake("t", "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"
        one.send(b"some data")
        one.half_close()
        assert other.read_to_end() == b"some data"


@pytest.mark.parametrize("url", [None, "wss://relay.example.org/"])
def test_websocket_unix_endpoint(tmp_path: Path, url: str | None) -> None:
    """The start message has a URL only if the option names one."""
    options = [] if url is None else ["--websocket-url", url]
    with ReachedRelay(*LOCAL, "--websocket", "unix:x.sock", *options, cwd=tmp_path) as relay:
        relay.wait_for(r", unix:x\.sock \(websocket\)$")
        assert (b"WebSocket clients connect to" in relay.stderr) == (url is not None)
        relay.address = str(tmp_path / "x.sock")
        assert_upgrades(relay)
        relay.stop_cleanly()


@pytest.mark.parametrize("endpoint", ["systemd:name=websocket", "systemd:index=1", "fd:4"])
def test_websocket_endpoint_that_is_open_already(endpoint: str) -> None:
    with contextlib.ExitStack() as opened:
        passed = [opened.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(2)]
        options = ("--port", "systemd:index=0", "--websocket", endpoint)
        names = {"LISTEN_FDNAMES": "transit:websocket"}
        fds = [sock.fileno() for sock in passed]
        relay = opened.enter_context(
            ReachedRelay(*options, env=names, pass_fds=fds, program=activated(*passed))
        )
        relay.address = passed[1].getsockname()
        urls, started = relay.started().stderr.decode().splitlines()[-2:]
        assert urls == f"WebSocket clients connect to ws://localhost:{relay.address[1]}/"
        assert started == f"Transit starting on systemd:index=0, {endpoint} (websocket)"
        assert_upgrades(relay)
        relay.stop_cleanly()


def assert_upgrades(relay: RelayProcess) -> None:
    """Pair two WebSocket clients."""
    one, other = (WebSocketClient(relay.connect(), seed=seed) for seed in range(2))
    with one, other:
        one.send(handshake("web", "one"))
        other.send(handshake("web", "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"


@pytest.fixture
def copy_without_ws_frames(tmp_path: Path) -> list[str]:
    """Return a command that runs a copy of the relay without ws_frames.py."""
    (tmp_path / "copied").mkdir()
    return [sys.executable, str(shutil.copy(RELAY, tmp_path / "copied"))]


@pytest.mark.parametrize(
    "option",
    [WEB, ("--websocket-url", "ws://localhost/"), ("--trust-forwarded-for", "127.0.0.1")],
)
def test_websocket_without_ws_frames_is_refused(
    copy_without_ws_frames: list[str], option: tuple[str, str]
) -> None:
    output = failed_start(*LOCAL, *option, program=copy_without_ws_frames)
    expected = (
        "WebSocket, --status and haproxy: Python finds no ws_frames.py (beside transit_relay.py)"
    )
    assert output == f"transit-relay: {expected}"


def test_a_socket_called_websocket_without_ws_frames_is_refused(
    copy_without_ws_frames: list[str],
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        why = failed_start(
            env={"LISTEN_FDNAMES": "websocket"},
            pass_fds=[passed.fileno()],
            program=activated(passed, program=copy_without_ws_frames),
        )
    assert "no ws_frames.py" in why


def test_a_ws_frames_that_cannot_import_a_module_is_an_error(
    copy_without_ws_frames: list[str],
) -> None:
    Path(copy_without_ws_frames[1]).with_name("ws_frames.py").write_text("import no_such_module\n")
    with RelayProcess(*LOCAL, program=copy_without_ws_frames) as running:
        assert running.wait() == 1
    assert b"No module named 'no_such_module'" in running.stderr


@pytest.mark.parametrize("kind", ["unreadable", "cut off", "overwritten"])
def test_a_ws_frames_that_cannot_be_imported_is_one_line(
    copy_without_ws_frames: list[str], kind: str
) -> None:
    """Without it the relay would run, and refuse each WebSocket client."""
    file = Path(copy_without_ws_frames[1]).with_name("ws_frames.py")
    if kind == "unreadable":
        file.symlink_to("/proc/self/mem")  # a regular file; to read it is an error, for root too
    else:
        file.write_bytes(b"def frame(" if kind == "cut off" else bytes(4096))
    why = failed_start(*LOCAL, program=copy_without_ws_frames)
    assert why.startswith("transit-relay: ws_frames.py cannot be imported: ")


def test_without_ws_frames_all_clients_are_tcp_clients(
    relay: Start, copy_without_ws_frames: list[str]
) -> None:
    running = relay(program=copy_without_ws_frames)
    assert b"no WebSocket clients" in running.stderr
    refused(running, b"GET / HTTP/1.1\r\n", b"bad handshake\n")
    transfer(running)


def test_busy_port_is_code_1_and_one_line(tmp_path: Path) -> None:
    """The endpoint that was opened first is closed, and its file removed."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp:{other.getsockname()[1]}:interface=127.0.0.1"
        opened = f"unix:{tmp_path}/x.sock"
        output = failed_start("--port", opened, "--port", endpoint)
    assert output == f"transit-relay: {endpoint}: Address already in use"
    assert os.listdir(tmp_path) == []


# What it records.


def test_usage_db(relay: Start, tmp_path: Path) -> None:
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database))
    transfer(running, b"x" * 12_345)
    refused(running, b"hello\n", b"bad handshake\n")
    refused(running, handshake("early") + b"!", b"impatient\n")
    running.stop_cleanly()
    assert sorted(query(database, "SELECT result, total_bytes FROM usage")) == [
        ("errory", 0),
        ("happy", 12_345),
        ("impatient", 0),
    ]
    counts = query(database, "SELECT connected, waiting, incomplete_bytes FROM current")
    assert counts == [(0, 0, 0)]


def test_usage_db_that_exists_is_continued(relay: Start, tmp_path: Path) -> None:
    database = tmp_path / "usage.sqlite"
    for _ in range(2):
        running = relay("--usage-db", str(database))
        transfer(running)
        running.stop_cleanly()
    assert query(database, "SELECT count(*) FROM usage") == [(2,)]


def test_usage_db_that_is_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "precious.txt"
    file.write_text("not a database, but long enough to be taken for one\n" * 10)
    before = file.read_bytes()
    output = failed_start(*LOCAL, "--usage-db", str(file))
    assert output == f"transit-relay: --usage-db {file}: file is not a database"
    assert file.read_bytes() == before


def test_usage_db_in_a_missing_folder_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "usage.sqlite"
    output = failed_start(*LOCAL, "--usage-db", str(file))
    assert output == f"transit-relay: --usage-db {file}: unable to open database file"


KEYS = ["started", "total_time", "waiting_time", "total_bytes", "mood"]


def test_log_fd(relay: Start, tmp_path: Path) -> None:
    with open(tmp_path / "log", "wb") as file:
        running = relay("--log-fd", str(file.fileno()), pass_fds=[file.fileno()])
    transfer(running, b"x" * 12_345)
    refused(running, b"hello\n", b"bad handshake\n")
    running.stop_cleanly()
    records = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [list(record) for record in records] == [KEYS, KEYS]
    assert sorted((record["mood"], record["total_bytes"]) for record in records) == [
        ("errory", 0),
        ("happy", 12_345),
    ]


def test_log_fd_1_is_written_line_by_line(relay: Start) -> None:
    running = relay("--log-fd", "1")
    for size in (1, 2):
        transfer(running, b"x" * size)
        line = running.wait_for(f'"total_bytes": {size},', "stdout").string
        assert list(json.loads(line)) == KEYS


def test_log_fd_2_has_the_messages_on_stdout() -> None:
    with QuietRelay("--log-fd", "2") as relay:
        transfer(relay)
        relay.wait_for("^Transit starting on", "stdout")
        assert relay.stop() == 0
    assert list(json.loads(only_line(relay))) == KEYS


def test_log_fd_2_with_logfile_has_them_there_alone(tmp_path: Path) -> None:
    with QuietRelay("--log-fd", "2", "--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        assert relay.stop() == 0
    assert list(json.loads(only_line(relay))) == KEYS
    assert "Transit starting on" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("option", "code"), [("--quota-rate=5kB", 2), ("--usage-db=/nowhere/usage.sqlite", 1)]
)
def test_log_fd_2_has_errors_on_stdout(option: str, code: int) -> None:
    with QuietRelay("--log-fd", "2", option) as relay:
        line = relay.wait_for("^transit-relay: ", "stdout").string
        assert relay.wait() == code
    assert option.partition("=")[0] in line


@pytest.mark.parametrize("fd", [999, 2**31 - 1])
def test_log_fd_that_is_not_open_is_refused(fd: int) -> None:
    output = failed_start(*LOCAL, "--log-fd", str(fd))
    assert output == f"transit-relay: --log-fd={fd}: Bad file descriptor"


def test_log_fd_that_is_closed_standard_output_is_refused() -> None:
    """The relay must not open a file with that number first."""
    with RelayProcess(*LOCAL, "--log-fd", "1", program=redirected("1>&-")) as relay:
        assert relay.wait() == 1
    assert only_line(relay) == "transit-relay: --log-fd=1: Bad file descriptor"


def test_log_fd_that_is_read_only_is_refused() -> None:
    with open(os.devnull) as file:
        output = failed_start(*LOCAL, "--log-fd", str(file.fileno()), pass_fds=[file.fileno()])
        assert output == f"transit-relay: --log-fd={file.fileno()}: not open for writing"


def test_a_log_reader_that_leaves_is_logged_once(relay: Start, tmp_path: Path) -> None:
    """The relay continues, and so does the database."""
    database = tmp_path / "usage.sqlite"
    reader, writer = os.pipe()
    running = relay("--log-fd", str(writer), "--usage-db", str(database), pass_fds=[writer])
    os.close(writer)
    os.close(reader)
    transfer(running)
    running.wait_for("^warning: --log-fd: .*no more records go there")
    transfer(running)
    assert running.stop() == 0
    assert running.stderr.count(b"warning: ") == 1
    assert query(database, "SELECT count(*) FROM usage") == [(2,)]


def test_not_blurred(relay: Start) -> None:
    running = relay()
    assert b"not blurring access times\n" in running.stderr


@pytest.mark.parametrize("width", [1, 3600, 2**31 - 1])
def test_blur_usage(relay: Start, tmp_path: Path, width: int) -> None:
    database = tmp_path / "usage.sqlite"
    running = relay("--blur-usage", str(width), "--usage-db", str(database), "--log-fd", "1")
    assert f"\nblurring access times to {width} seconds\n" in "\n" + running.stderr.decode()
    transfer(running, b"x" * 12_345)
    line = running.wait_for('"total_bytes": 12000,', "stdout").string
    running.stop_cleanly()
    [(started, size)] = query(database, "SELECT started, total_bytes FROM usage")
    assert isinstance(started, int) and started % width == 0
    assert size == 12_000
    assert json.loads(line)["started"] == started


# Records that cannot be written.


def test_locked_database_does_not_delay_transfers(relay: Start, tmp_path: Path) -> None:
    """The sink would wait an hour for the lock. The transfers end before that."""
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database), program=patched(SINK_WAIT_SECONDS=3600))
    with locked(database):
        for _ in range(20):
            transfer(running)
    running.stop_cleanly()
    assert query(database, "SELECT count(*) FROM usage") == [(20,)]


def test_locked_database_is_logged_and_written_later(relay: Start, tmp_path: Path) -> None:
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database))
    with locked(database):
        transfer(running)
        running.wait_for("^warning: --usage-db: database is locked; 1 records wait$")
    running.wait_for("^--usage-db: works again$")
    assert query(database, "SELECT count(*) FROM usage") == [(1,)]
    assert running.stop() == 0
    assert running.stderr.count(b"warning: ") == 1


def test_stalled_log_reader_does_not_delay_transfers(relay: Start) -> None:
    """The sink would wait an hour for the reader."""
    reader, writer = os.pipe()
    with open(reader, "rb") as log:
        with open(writer, "wb", buffering=0):
            full = fill_pipe(writer)
            running = relay(
                "--log-fd",
                str(writer),
                pass_fds=[writer],
                program=patched(SINK_WAIT_SECONDS=3600),
            )
        for _ in range(20):
            transfer(running)
        log.read(full)
        lines = [json.loads(log.readline()) for _ in range(20)]
    assert [line["mood"] for line in lines] == ["happy"] * 20


def test_a_full_stderr_pipe_delays_nothing(tmp_path: Path) -> None:
    """The messages are dropped, at the stop too."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb", buffering=0):
        fill_pipe(writer)
        with QuietRelay(pass_fds=[writer], program=with_descriptor(writer, 2)) as relay:
            transfer(relay)
            assert relay.stop() == 0


def test_on_log_fd_2_there_are_only_records() -> None:
    """The reason of a failed start goes to stdout."""
    done = subprocess.run(
        [sys.executable, str(RELAY), "--log-fd", "2", "--port", "fd:99"], capture_output=True
    )
    assert done.stdout == b"transit-relay: fd:99: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (1, b"")


def test_records_lost_at_a_stop_are_counted(relay: Start, tmp_path: Path) -> None:
    """The database stays locked for all of the time that a stop grants, here 1 s."""
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database), program=patched(STOP_RECORD_SECONDS=1))
    with locked(database):
        for _ in range(3):
            transfer(running)
        assert running.stop() == 1
    output = running.stderr.decode().splitlines()
    assert output[-1] == "error: stopped; usage records lost: 3"
    assert query(database, "SELECT count(*) FROM usage") == [(0,)]


def faulty(fault: str) -> list[str]:
    """Return a command: a relay whose loop fails once there are two connections."""
    faults = (
        "import transit_relay as t; turn = t.Server.run_once; t.Server.run_once = lambda self, *a: "
        f"turn(self, *a) or (self.snapshot().connections < 2 or 1 / 0); {fault}"
    )
    python, option, text = patched()
    return [python, option, text.replace("import transit_relay as t; ", faults)]


@pytest.mark.parametrize("fault", ["", "t.Server.close = lambda self: 1 / 0; "])
def test_after_a_fault_of_the_loop_the_records_are_written(tmp_path: Path, fault: str) -> None:
    """This holds even if closing the Server fails too."""
    database = tmp_path / "usage.sqlite"
    options = (*LOCAL, "--usage-db", str(database))
    with RelayProcess(*options, program=faulty(fault)) as running:
        running.started()
        refused(running, b"hello\n", b"bad handshake\n")
        with running.connect(), running.connect():
            assert running.wait() == 1
    assert b"error: unexpected fault; please report it\nTraceback" in running.stderr
    assert running.stderr.count(b"ZeroDivisionError") == (2 if fault else 1)
    assert running.stderr.endswith(b"\nstopped\n")
    moods = [mood for (mood,) in query(database, "SELECT result FROM usage")]
    assert "errory" in moods and ("empty" in moods) == (not fault)


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_second_signal_ends_at_once(relay: Start, tmp_path: Path, second: signal.Signals) -> None:
    """The first stop would take an hour, because the database is locked."""
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database), program=patched(STOP_RECORD_SECONDS=3600))
    with locked(database):
        transfer(running)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("^SIGTERM: stopping$")
        assert running.stop(second) == 1
    assert b"error: stopped; usage records lost: 1\n" in running.stderr


# A drain.


def test_a_drain_lets_pairs_run_on_and_refuses_newcomers(relay: Start, tmp_path: Path) -> None:
    """Its port is free: another relay can listen there at once. Its record is exact."""
    database = tmp_path / "usage.sqlite"
    running = relay("--drain", "3600", "--usage-db", str(database))
    one, other = running.pair()
    with one, other, running.connect() as waiting:
        waiting.sendall(handshake("waits"))
        refused(running, b"hello\n", b"bad handshake\n")
        running.process.send_signal(signal.SIGTERM)
        running.wait_for(r"^SIGTERM: draining for at most 3600 s; pairs: 1$")
        assert read_to_end(waiting) == b""
        with pytest.raises(ConnectionRefusedError):
            running.connect()
        with RelayProcess("--port", f"tcp:{running.port}:interface=127.0.0.1") as second:
            transfer(second.started())
            second.stop_cleanly()
        data = os.urandom(200_000)
        one.sendall(data)
        assert receive(other, len(data)) == data
        other.sendall(b"got it")
        assert receive(one, 6) == b"got it"
        assert running.process.poll() is None
    running.wait_for(r"^all pairs have ended: the drain ends; pairs left: 0$")
    assert running.wait() == 0
    assert running.stderr.endswith(b"\nstopped\n")
    found = query(database, "SELECT result, total_bytes FROM usage ORDER BY 1")
    assert found == [("errory", 0), ("happy", len(data) + 6), ("lonely", 0)]


def test_the_time_of_a_drain_is_up(relay: Start) -> None:
    running = relay("--drain", "0.01")
    one, other = running.pair()
    with one, other:
        assert running.stop() == 0
        assert read_to_end(one) == read_to_end(other) == b""
    assert b"\ntime is up: the drain ends; pairs left: 1\n" in running.stderr


@pytest.mark.parametrize("numbers", [(signal.SIGTERM,) * 2, (signal.SIGINT, signal.SIGQUIT)])
def test_the_second_signal_ends_a_drain(
    relay: Start, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    running = relay("--drain", "3600")
    one, other = running.pair()
    with one, other:
        running.process.send_signal(numbers[0])
        running.wait_for(f"^{numbers[0].name}: draining")
        assert running.stop(numbers[1]) == 0
        assert read_to_end(one) == read_to_end(other) == b""
    assert f"\n{numbers[1].name}: the drain ends; pairs left: 1\n".encode() in running.stderr


def test_the_third_signal_ends_at_once(relay: Start, tmp_path: Path) -> None:
    """The stop would take an hour, because the database is locked."""
    database = tmp_path / "usage.sqlite"
    program = patched(STOP_RECORD_SECONDS=3600)
    running = relay("--drain", "3600", "--usage-db", str(database), program=program)
    one, other = running.pair()
    with one, other, locked(database):
        for message in ("draining", "the drain ends"):
            running.process.send_signal(signal.SIGTERM)
            running.wait_for(f"^SIGTERM: {message}")
        assert running.stop() == 1
    assert b"\nSIGTERM: ending at once\n" in running.stderr


# Limits.


def test_handshake_timeout(relay: Start, tmp_path: Path) -> None:
    database = tmp_path / "usage.sqlite"
    running = relay("--handshake-timeout", "0.01", "--usage-db", str(database))
    with running.connect() as client:
        client.sendall(handshake()[:-1])
        assert read_to_end(client) == b""
    running.stop_cleanly()
    assert query(database, "SELECT result FROM usage") == [("empty",)]


def test_open_files_limit_is_raised(relay: Start) -> None:
    program = redirected("")
    program[2] = "ulimit -S -n 64; " + program[2]
    running = relay(program=program)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1 << 20 if hard == resource.RLIM_INFINITY else min(hard, 1 << 20)
    assert f"RLIMIT_NOFILE raised from 64 to {most} open files\n" in running.stderr.decode()
    limits = Path(f"/proc/{running.pid}/limits").read_text()
    assert re.search(rf"^Max open files +{most} ", limits, re.MULTILINE)


# Messages and where they go.


def test_last_line_of_a_start_names_the_endpoints(relay: Start) -> None:
    running = relay()
    transfer(running)
    running.stop_cleanly()
    output = running.stderr.decode().splitlines()
    assert output[-3] == f"Transit starting on tcp:{running.port}:interface=127.0.0.1"
    assert output[-2:] == ["SIGTERM: stopping", "stopped"]


def test_root_is_advised_to_use_user(relay: Start) -> None:
    assert (b"\nrunning as root" in relay().stderr) == (os.geteuid() == 0)


def test_with_a_logfile_stderr_is_empty(tmp_path: Path) -> None:
    with QuietRelay("--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        relay.stop_cleanly()
        assert relay.stderr == b""
    output = (tmp_path / "log").read_text()
    assert re.search(r"^\S+ Transit starting on fd:\d+$", output, re.MULTILINE)
    assert output.endswith(" stopped\n")


def test_logfile_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("an older line\n")
    with QuietRelay("--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        relay.stop_cleanly()
    output = (tmp_path / "log").read_text()
    assert output.startswith("an older line\n") and output.endswith(" stopped\n")


@pytest.mark.parametrize("recreated", [True, False])
def test_a_moved_logfile_is_opened_again(tmp_path: Path, recreated: bool) -> None:
    with QuietRelay("--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        (tmp_path / "log").rename(tmp_path / "log.1")
        if recreated:
            (tmp_path / "log").touch()
        relay.stop_cleanly()
    old, new = (tmp_path / "log.1").read_text(), (tmp_path / "log").read_text()
    assert "Transit starting on" in old and "stopp" not in old
    assert "Transit starting on" not in new and new.endswith(" stopped\n")


def test_logfile_that_cannot_be_opened_is_refused(tmp_path: Path) -> None:
    output = failed_start(*LOCAL, "--logfile", str(tmp_path))
    assert output == f"transit-relay: logfile {tmp_path}: Is a directory"


@pytest.mark.parametrize("logfile", [True, False])
def test_no_token_side_address_or_data_is_logged(tmp_path: Path, logfile: bool) -> None:
    """All that clients send begins with Secret. Their address is 127.0.0.2."""
    with contextlib.ExitStack() as opened:
        log = opened.enter_context(open(tmp_path / "json", "wb"))
        options = ["--usage-db", "usage.sqlite", "--log-fd", str(log.fileno())]
        if logfile:
            options += ["--logfile", "log"]
        relay = opened.enter_context(QuietRelay(*options, cwd=tmp_path, pass_fds=[log.fileno()]))

        def client(first: bytes) -> socket.socket:
            connected = opened.enter_context(relay.connect())
            connected.sendall(first)
            return connected

        client(b"please relay Secret").close()  # empty
        reset(client(b"please relay Secret"))
        client(handshake("SecretLonely", "SecretSide"))
        displaced = client(handshake("SecretToken", "SecretOne"))
        refused(relay, b"SecretJunk\n", b"bad handshake\n")
        newer = client(handshake("SecretToken", "SecretOne"))
        refused(relay, handshake("SecretEarly") + b"Secret", b"impatient\n")
        partner = client(handshake("SecretToken", "SecretOther") + b"SecretData")
        assert receive(newer, 13) == b"ok\nSecretData"
        assert receive(partner, 3) == b"ok\n"
        assert read_to_end(displaced) == b""
        relay.stop_cleanly()
    moods = query(tmp_path / "usage.sqlite", "SELECT DISTINCT result FROM usage ORDER BY result")
    assert [mood for (mood,) in moods] == [
        "empty",
        "errory",
        "happy",
        "impatient",
        "lonely",
        "redundant",
    ]
    outputs = {"stderr": relay.stderr}
    outputs.update((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    assert len(outputs) == 4 if logfile else 3
    for where, text in outputs.items():
        assert b"Secret" not in text, where
        assert b"127.0.0" not in text, where


# The process.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_signal_stops_with_code_0(relay: Start, number: signal.Signals) -> None:
    """All clients see an orderly end."""
    running = relay()
    one, other = running.pair()
    with one, other, running.connect() as waiting, running.connect():
        waiting.sendall(handshake("waits"))
        refused(running, b"hello\n", b"bad handshake\n")  # so the relay has accepted the others
        assert running.stop(number) == 0
        assert [read_to_end(client) for client in (one, other, waiting)] == [b""] * 3
    assert running.stderr.endswith(b"\nstopped\n")


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGUSR2", "SIGALRM"])
def test_signals_without_a_meaning_are_ignored(relay: Start, name: str) -> None:
    """SIGUSR1 has a meaning with --logfile only."""
    running = relay()
    running.process.send_signal(signal.Signals[name])
    transfer(running)


def test_a_relay_started_with_blocked_signals_can_be_stopped(relay: Start) -> None:
    block = (
        "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals());"
        " os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    )
    running = relay(program=[sys.executable, "-c", block, str(RELAY)])
    assert running.stop() == 0


def test_sigusr1_opens_the_logfile_again(tmp_path: Path) -> None:
    """Without another message: the new file begins with the answer to the signal."""
    with QuietRelay("--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        (tmp_path / "log").rename(tmp_path / "log.1")
        relay.process.send_signal(signal.SIGUSR1)
        transfer(relay)
        relay.stop_cleanly()
    lines = (tmp_path / "log").read_text().splitlines()
    assert lines[0].endswith(" log file reopened")
    assert "reopened" not in (tmp_path / "log.1").read_text()


def test_descriptors_are_closed(relay: Start) -> None:
    running = relay()
    one, other = running.pair("stays")
    before = running.descriptors()
    pairs = [running.pair(f"pair{n}") for n in range(50)]
    assert running.descriptors() == before + 100
    for pair in pairs:
        for client in pair:
            client.close()
    with one, other:
        for _ in range(3):  # turns of the loop; the ends arrived before the first
            one.sendall(b"x")
            assert other.recv(1) == b"x"
        assert running.descriptors() == before


def test_one_copied_file_relays(relay: Start, tmp_path: Path) -> None:
    """No other file is needed: -I ignores the environment, -S the installed packages."""
    copied = str(shutil.copy(RELAY, tmp_path))
    running = relay(cwd=tmp_path, program=[sys.executable, "-IS", copied])
    transfer(running)
    running.stop_cleanly()
    assert [path for path in os.listdir(tmp_path) if path != "__pycache__"] == ["transit_relay.py"]


@pytest.mark.parametrize("redirections", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_closed_standard_descriptors_are_not_used_for_others(redirections: str) -> None:
    with QuietRelay(program=redirected(redirections)) as relay:
        transfer(relay)
        for fd in re.findall(r"\d(?=[<>])", redirections):
            assert os.readlink(f"/proc/{relay.pid}/fd/{fd}") == os.devnull
        assert relay.stop() == 0


def test_full_stderr_does_not_stop_the_relay() -> None:
    with QuietRelay(program=redirected("2>/dev/full")) as relay:
        transfer(relay)
        assert relay.stop() == 0


def test_full_logfile_does_not_stop_the_relay() -> None:
    """The messages go nowhere else."""
    with QuietRelay("--logfile", "/dev/full") as relay:
        transfer(relay)
        relay.stop_cleanly()
        assert relay.stderr == b""


def test_a_stderr_without_a_reader_does_not_stop_the_relay(relay: Start) -> None:
    running = relay()
    assert running.process.stderr is not None
    running.process.stderr.close()
    transfer(running)
    running.process.terminate()
    assert running.process.wait(TIMEOUT) == 0
