"""The program as a process: every option, what it says, how it exits."""

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

from transit_relay import __version__, parse_arguments

Start = Callable[..., RelayProcess]

LOCAL = ("--port", "tcp:0:interface=127.0.0.1")


def failed_start(*arguments: str, **kwargs: Any) -> str:
    """The one line in which a relay says why it does not start."""
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
        "usage_db": None,
        "log_fd": None,
        "blur_usage": 0,
        "handshake_timeout": 60,
        "config": [],
        "daemonize": False,
        "pidfile": None,
        "logfile": None,
        "user": None,
        "no_splice": False,
    }


def test_defaults_of_a_daemon() -> None:
    options = parse_arguments(["--daemonize"])
    assert (options.pidfile, options.logfile) == ("transit_relay.pid", "transit_relay.log")


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
    ["--port=tcp:\nx"],  # it is repeated in the message
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
    ["--blur=60"],  # no abbreviations: they change their meaning with the next option
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
    ["--log-fd=-1"],
    ["--log-fd=stdout"],
    ["--log-fd=2147483648"],
    ["--usage-db="],
    ["--pidfile="],
    ["--logfile="],
    ["--config="],
    ["--config=/nonexistent/relay.conf"],
    ["--config=/"],
    ["--user="],  # as a start script with an unset variable says: not to be taken for "as root"
    ["--daemonize=yes"],
]


@pytest.mark.parametrize("arguments", WRONG, ids=" ".join)
def test_wrong_command_line_is_code_2_and_one_line(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(arguments)
    said = capsys.readouterr()
    assert caught.value.code == 2
    assert said.out == ""
    assert said.err.count("\n") == 1
    assert said.err.startswith("transit-relay: ")
    assert arguments[0].partition("=")[0] in said.err


@pytest.mark.parametrize("arguments", [["--frobnicate"], ["--port", "tcp:99999"]], ids=" ".join)
def test_wrong_command_line_of_a_process(arguments: list[str]) -> None:
    with RelayProcess(*arguments) as relay:
        assert relay.wait() == 2
    assert arguments[-1] in only_line(relay)


def test_version() -> None:
    with RelayProcess("--version") as relay:
        relay.wait_for(f"^transit-relay {re.escape(__version__)}$", "stdout")
        assert relay.wait() == 0
        assert relay.stderr == b""


@pytest.fixture(scope="module")
def help_text() -> str:
    """What `--help` says."""
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
    told = {" ".join(option.split()) for option in options}
    assert len(told) == 15
    for option in told:
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


def test_several_ports_are_one_relay(tmp_path: Path) -> None:
    """Whoever comes in by one door meets those who came in by another."""
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
        assert relay.stop() == 0  # with a warning, for the other one


def test_systemd_endpoint_without_systemd() -> None:
    said = failed_start("--port", "systemd:index=0")
    assert said.startswith("transit-relay: systemd:index=0: 0 sockets ")


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
    """We listen on a copy of it, but it is the same socket. Which spelling would it expect?"""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        fd = passed.fileno()
        said = failed_start(
            *("--port", "fd:0", "--websocket", "fd:0"),
            pass_fds=[fd],
            program=with_descriptor(fd, 0),
        )
    assert said == "transit-relay: fd:0: this socket is given twice"


def test_a_missing_descriptor_is_not_mistaken_for_a_socket_of_ours() -> None:
    """Our own listener would get the lowest free number, if it were opened first."""
    said = failed_start(*LOCAL, "--port", "fd:3")
    assert said == "transit-relay: fd:3: Bad file descriptor"


# WebSocket. (What is said on the wire: test_websocket.py.)


@pytest.mark.parametrize("url", ["ws://relay.example.org:4002/", "wss://relay.example.org"])
def test_websocket_url_is_what_clients_are_told(relay: Start, url: str) -> None:
    """Also without a listener of its own: the ports take WebSocket clients too."""
    running = relay("--websocket-url", url)
    assert f"\nWebSocket clients connect to {url}\nTransit starting".encode() in running.stderr


def test_several_websocket_endpoints_are_all_told(relay: Start) -> None:
    running = relay(*WEB, *WEB)
    ports = re.findall(rb"tcp:(\d+)[^ ]* \(websocket\)", running.stderr)
    urls = b", ".join(b"ws://localhost:%s/" % port for port in ports)
    assert len(ports) == 2
    assert b"\nWebSocket clients connect to " + urls + b"\nTransit starting" in running.stderr


def test_without_websocket_nobody_is_told_of_it(relay: Start) -> None:
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
    """Nothing tells its address but the option."""
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
        told, started = relay.started().stderr.decode().splitlines()[-2:]
        assert told == f"WebSocket clients connect to ws://localhost:{relay.address[1]}/"
        assert started == f"Transit starting on systemd:index=0, {endpoint} (websocket)"
        assert_upgrades(relay)
        relay.stop_cleanly()


def assert_upgrades(relay: RelayProcess) -> None:
    """A WebSocket client meets another one."""
    one, other = (WebSocketClient(relay.connect(), seed=seed) for seed in range(2))
    with one, other:
        one.send(handshake("web", "one"))
        other.send(handshake("web", "other"))
        assert one.receive(3) == other.receive(3) == b"ok\n"


@pytest.fixture
def lonely_copy(tmp_path: Path) -> list[str]:
    """A program: the relay, copied without ws_frames.py."""
    (tmp_path / "copied").mkdir()
    return [sys.executable, str(shutil.copy(RELAY, tmp_path / "copied"))]


@pytest.mark.parametrize("option", [WEB, ("--websocket-url", "ws://localhost/")])
def test_websocket_without_ws_frames_is_refused(
    lonely_copy: list[str], option: tuple[str, str]
) -> None:
    said = failed_start(*LOCAL, *option, program=lonely_copy)
    expected = "WebSocket: Python finds no ws_frames.py (beside transit_relay.py)"
    assert said == f"transit-relay: {expected}"


def test_a_socket_called_websocket_without_ws_frames_is_refused(lonely_copy: list[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        why = failed_start(
            env={"LISTEN_FDNAMES": "websocket"},
            pass_fds=[passed.fileno()],
            program=[*activated(passed)[:-1], lonely_copy[-1]],
        )
    assert "no ws_frames.py" in why


def test_a_broken_ws_frames_is_not_taken_for_none(lonely_copy: list[str]) -> None:
    Path(lonely_copy[1]).with_name("ws_frames.py").write_text("import no_such_module\n")
    with RelayProcess(*LOCAL, program=lonely_copy) as running:
        assert running.wait() == 1
    assert b"No module named 'no_such_module'" in running.stderr


def test_without_ws_frames_all_is_plain(relay: Start, lonely_copy: list[str]) -> None:
    running = relay(program=lonely_copy)
    assert b"TCP clients only" in running.stderr
    refused(running, b"GET / HTTP/1.1\r\n", b"bad handshake\n")
    transfer(running)


def test_busy_port_is_code_1_and_one_line(tmp_path: Path) -> None:
    """What was opened before it is undone."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp:{other.getsockname()[1]}:interface=127.0.0.1"
        opened = f"unix:{tmp_path}/x.sock"
        said = failed_start("--port", opened, "--port", endpoint)
    assert said == f"transit-relay: {endpoint}: Address already in use"
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


def test_usage_db_goes_on_in_an_existing_one(relay: Start, tmp_path: Path) -> None:
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
    said = failed_start(*LOCAL, "--usage-db", str(file))
    assert said == f"transit-relay: --usage-db {file}: file is not a database"
    assert file.read_bytes() == before


def test_usage_db_that_nobody_may_make_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "missing" / "usage.sqlite"
    said = failed_start(*LOCAL, "--usage-db", str(file))
    assert said == f"transit-relay: --usage-db {file}: unable to open database file"


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


@pytest.mark.parametrize("fd", [999, 2**31 - 1])
def test_log_fd_that_is_not_open_is_refused(fd: int) -> None:
    said = failed_start(*LOCAL, "--log-fd", str(fd))
    assert said == f"transit-relay: --log-fd={fd}: Bad file descriptor"


def test_log_fd_that_is_closed_standard_output_is_refused() -> None:
    """It must not switch_user the first file that the relay opens."""
    with RelayProcess(*LOCAL, "--log-fd", "1", program=redirected("1>&-")) as relay:
        assert relay.wait() == 1
    assert only_line(relay) == "transit-relay: --log-fd=1: Bad file descriptor"


def test_log_fd_that_is_read_only_is_refused() -> None:
    with open(os.devnull) as file:
        said = failed_start(*LOCAL, "--log-fd", str(file.fileno()), pass_fds=[file.fileno()])
        assert said == f"transit-relay: --log-fd={file.fileno()}: not open for writing"


def test_log_reader_that_goes_is_said_once(relay: Start, tmp_path: Path) -> None:
    """The relay and the database go on."""
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
    """The sink waits for the lock for an hour; the transfers are over before it is given up."""
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database), program=patched(STALL_SECONDS=3600))
    with locked(database):
        for _ in range(20):
            transfer(running)
    running.stop_cleanly()
    assert query(database, "SELECT count(*) FROM usage") == [(20,)]


def test_locked_database_is_said_and_caught_up(relay: Start, tmp_path: Path) -> None:
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
    """As above: an hour."""
    reader, writer = os.pipe()
    with open(reader, "rb") as log:
        with open(writer, "wb", buffering=0):
            full = fill_pipe(writer)
            running = relay(
                "--log-fd",
                str(writer),
                pass_fds=[writer],
                program=patched(STALL_SECONDS=3600),
            )
        for _ in range(20):
            transfer(running)
        log.read(full)
        lines = [json.loads(log.readline()) for _ in range(20)]
    assert [line["mood"] for line in lines] == ["happy"] * 20


def test_a_stalled_reader_of_messages_delays_nothing(tmp_path: Path) -> None:
    """Not even the end: what it does not take is not said."""
    reader, writer = os.pipe()
    with open(reader, "rb"), open(writer, "wb", buffering=0):
        fill_pipe(writer)
        with QuietRelay(pass_fds=[writer], program=with_descriptor(writer, 2)) as relay:
            transfer(relay)
            assert relay.stop() == 0


def test_on_log_fd_2_there_is_nothing_but_records() -> None:
    """Not even why it does not start."""
    done = subprocess.run(
        [sys.executable, str(RELAY), "--log-fd", "2", "--port", "fd:99"], capture_output=True
    )
    assert done.stdout == b"transit-relay: fd:99: Bad file descriptor\n"
    assert (done.returncode, done.stderr) == (1, b"")


def test_records_lost_at_a_stop_are_counted(relay: Start, tmp_path: Path) -> None:
    """The one slow test: the database stays locked for the whole 10 s that a stop gives it."""
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database))
    with locked(database):
        for _ in range(3):
            transfer(running)
        assert running.stop() == 1
    said = running.stderr.decode().splitlines()
    assert said[-1] == "error: stopped; usage records lost: 3"
    assert query(database, "SELECT count(*) FROM usage") == [(0,)]


def test_after_a_mistake_of_ours_records_are_written_all_the_same(tmp_path: Path) -> None:
    """The program falls over the first handshake: it knows no pattern for one."""
    database = tmp_path / "usage.sqlite"
    options = (*LOCAL, "--usage-db", str(database))
    with RelayProcess(*options, program=patched(HANDSHAKE=None)) as running:
        running.started()
        with running.connect(), running.connect() as fatal:
            fatal.sendall(b"\n")
            assert running.wait() == 1
    assert b"error: a mistake of ours; please report it\nTraceback" in running.stderr
    assert running.stderr.endswith(b"\nstopped\n")
    assert query(database, "SELECT result FROM usage") == [("empty",)] * 2


def test_after_a_mistake_that_strikes_again_too(tmp_path: Path) -> None:
    """The program falls over the end of a connection, in the loop and when it closes all."""
    database = tmp_path / "usage.sqlite"
    falls = "import transit_relay as t; t.Session.end_sent = lambda self: 1 / 0; "
    program = [*patched()[:2], patched()[2].replace("import transit_relay as t; ", falls)]
    with RelayProcess(*LOCAL, "--usage-db", str(database), program=program) as running:
        running.started()
        with running.connect():
            pass
        assert running.wait() == 1
    assert running.stderr.endswith(b"\nstopped\n")
    assert query(database, "SELECT result FROM usage") == [("empty",)]


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_second_signal_ends_at_once(relay: Start, tmp_path: Path, second: signal.Signals) -> None:
    """A stop that would take an hour: the database is locked."""
    database = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(database), program=patched(STOP_RECORD_SECONDS=3600))
    with locked(database):
        transfer(running)
        running.process.send_signal(signal.SIGTERM)
        running.wait_for("^SIGTERM: stopping$")
        assert running.stop(second) == 1
    assert b"error: stopped; usage records lost: 1\n" in running.stderr


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


# What it says, and where.


def test_last_line_of_a_start_is_where_it_listens(relay: Start) -> None:
    running = relay()
    transfer(running)
    running.stop_cleanly()
    said = running.stderr.decode().splitlines()
    assert said[-3] == f"Transit starting on tcp:{running.port}:interface=127.0.0.1"
    assert said[-2:] == ["SIGTERM: stopping", "stopped"]


def test_root_is_told_about_user(relay: Start) -> None:
    assert (b"\nrunning as root" in relay().stderr) == (os.geteuid() == 0)


def test_logfile_has_the_messages_alone(tmp_path: Path) -> None:
    with QuietRelay("--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        relay.stop_cleanly()
        assert relay.stderr == b""
    said = (tmp_path / "log").read_text()
    assert re.search(r"^\S+ Transit starting on fd:\d+$", said, re.MULTILINE)
    assert said.endswith(" stopped\n")


def test_logfile_is_appended_to(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("what was there\n")
    with QuietRelay("--logfile", "log", cwd=tmp_path) as relay:
        transfer(relay)
        relay.stop_cleanly()
    said = (tmp_path / "log").read_text()
    assert said.startswith("what was there\n") and said.endswith(" stopped\n")


@pytest.mark.parametrize("recreated", [True, False])
def test_logfile_is_reopened_when_it_was_moved(tmp_path: Path, recreated: bool) -> None:
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
    said = failed_start(*LOCAL, "--logfile", str(tmp_path))
    assert said == f"transit-relay: logfile {tmp_path}: Is a directory"


@pytest.mark.parametrize("logfile", [True, False])
def test_no_token_side_address_or_byte_is_told(tmp_path: Path, logfile: bool) -> None:
    """All the clients' bytes begin with Secret; they come from 127.0.0.2."""
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
    told = {"stderr": relay.stderr}
    told.update((path.name, path.read_bytes()) for path in tmp_path.iterdir())
    assert len(told) == 4 if logfile else 3
    for where, text in told.items():
        assert b"Secret" not in text, where
        assert b"127.0.0" not in text, where


# How it lives and ends.


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_with_code_0(relay: Start, number: signal.Signals) -> None:
    """Whoever is there sees an orderly end."""
    running = relay()
    one, other = running.pair()
    with one, other, running.connect() as waiting, running.connect():
        waiting.sendall(handshake("waits"))
        refused(running, b"hello\n", b"bad handshake\n")  # so the others were accepted
        assert running.stop(number) == 0
        assert [read_to_end(client) for client in (one, other, waiting)] == [b""] * 3
    assert running.stderr.endswith(b"\nstopped\n")


def test_sighup_is_ignored(relay: Start) -> None:
    running = relay()
    running.process.send_signal(signal.SIGHUP)
    transfer(running)


def test_descriptors_are_given_back(relay: Start) -> None:
    running = relay()
    one, other = running.pair("stays")
    before = running.descriptors()
    pairs = [running.pair(f"pair{n}") for n in range(50)]
    assert running.descriptors() == before + 100
    for pair in pairs:
        for client in pair:
            client.close()
    with one, other:
        for _ in range(3):  # turns of the loop: their ends were there before the first
            one.sendall(b"x")
            assert other.recv(1) == b"x"
        assert running.descriptors() == before


def test_one_copied_file_relays(relay: Start, tmp_path: Path) -> None:
    """Without a single other file: -I forgets the environment, -S the installed packages."""
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


def test_full_stderr_is_no_reason_to_stop() -> None:
    with QuietRelay(program=redirected("2>/dev/full")) as relay:
        transfer(relay)
        assert relay.stop() == 0


def test_full_logfile_is_no_reason_to_stop() -> None:
    """Nor to speak elsewhere."""
    with QuietRelay("--logfile", "/dev/full") as relay:
        transfer(relay)
        relay.stop_cleanly()
        assert relay.stderr == b""


def test_stderr_whose_reader_has_gone_is_no_reason_to_stop(relay: Start) -> None:
    running = relay()
    assert running.process.stderr is not None
    running.process.stderr.close()
    transfer(running)
    running.process.terminate()
    assert running.process.wait(TIMEOUT) == 0
