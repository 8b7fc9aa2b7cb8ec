"""`--config`: the syntax of a file, its precedence, and its error messages."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from helpers import RelayProcess
from processes import ReachedRelay, only_line, query, transfer

from transit_relay import (
    Role,
    parse_arguments,
    parse_endpoint,
    parse_network,
)

NETWORK_TEXTS = ["192.0.2.0/24", "2001:db8::/32"]
NETWORKS = [parse_network(text) for text in NETWORK_TEXTS]
PORTS = [parse_endpoint("tcp:4001"), parse_endpoint("unix:/run/x.sock")]


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """Return the path of the file."""
    return tmp_path / "relay.conf"


def read(conf: Path, text: str, *arguments: str) -> dict[str, Any]:
    """Parse the file and the arguments. Return the options that differ from the defaults."""
    conf.write_bytes(text.encode())
    options = vars(parse_arguments([*arguments, f"--config={conf}"]))
    assert options.pop("config") == [str(conf)]
    defaults = vars(parse_arguments([]))
    return {name: value for name, value in options.items() if value != defaults[name]}


@pytest.mark.parametrize(
    "line",
    [
        "blur-usage 3600",
        "blur-usage=3600",
        "blur-usage = 3600",
        "blur-usage\t3600",
        "--blur-usage 3600",
        "--blur-usage=3600",
        "  blur-usage   3600  ",
        "blur-usage 3600  # an hour",
        "blur-usage 3600\r",
        "\ufeffblur-usage 3600",  # some editors write a byte order mark
    ],
)
def test_ways_to_write_an_option(conf: Path, line: str) -> None:
    assert read(conf, f"{line}\n") == {"blur_usage": 3600}
    assert read(conf, line) == {"blur_usage": 3600}  # no newline at the end


@pytest.mark.parametrize("text", ["", "\n", "# port x\n", "   # port x", "#port x", "\n\n #"])
def test_empty_lines_and_comments(conf: Path, text: str) -> None:
    assert read(conf, text) == {}


@pytest.mark.parametrize(
    "value", ["/var/log/a b.log", "/var/log/#1.log", "a=b", "=a", "'a'", "\\a", "ä", "a\u2028b"]
)
def test_a_value_is_not_unquoted_or_unescaped(conf: Path, value: str) -> None:
    assert read(conf, f"logfile={value}\n") == {"logfile": value}


def test_a_name_that_is_not_utf8(conf: Path) -> None:
    conf.write_bytes(b"logfile \xff\n")
    assert parse_arguments([f"--config={conf}"]).logfile == "\udcff"


def test_switches(conf: Path) -> None:
    assert read(conf, "no-splice\n") == {"no_splice": True}
    assert read(conf, "daemonize\nlogfile here\n") == {
        "daemonize": True,
        "logfile": "here",
        "pidfile": "transit_relay.pid",
    }


def test_options_that_can_be_given_several_times(conf: Path) -> None:
    text = "port tcp:4001\nwebsocket tcp:4002\nport unix:/run/x.sock\n"
    websockets = [parse_endpoint("tcp:4002", Role.WEBSOCKET)]
    assert read(conf, text) == {"port": PORTS, "websocket": websockets}
    text = "allow 192.0.2.0/24\ntrust-forwarded-for unix\nallow = 2001:db8::/32  # IPv6\n"
    assert read(conf, text) == {"allow": NETWORKS, "trust_forwarded_for": [parse_network("unix")]}


def test_of_other_options_the_last_one_counts(conf: Path) -> None:
    assert read(conf, "blur-usage 60\nblur-usage 3600\n") == {"blur_usage": 3600}


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("blur-usage 3600", ["--blur-usage=60"], {"blur_usage": 60}),
        ("blur-usage 3600", ["--blur-usage=0"], {}),
        ("handshake-timeout 5", ["--handshake-timeout=60"], {}),
        ("port tcp:4001\nport unix:/run/x.sock", ["--port=unix:/run/x.sock"], {"port": PORTS[1:]}),
        ("port tcp:4001", ["--port=tcp:4001", "--port=unix:/run/x.sock"], {"port": PORTS}),
        ("logfile a\nport tcp:4001", ["--logfile=b"], {"logfile": "b", "port": PORTS[:1]}),
        ("allow unix\nallow ::1", [f"--allow={n}" for n in NETWORK_TEXTS], {"allow": NETWORKS}),
        (
            "trust-forwarded-for unix\nallow 192.0.2.0/24",
            ["--trust-forwarded-for=2001:db8::/32"],
            {"allow": NETWORKS[:1], "trust_forwarded_for": NETWORKS[1:]},
        ),
    ],
)
def test_the_command_line_takes_precedence(
    conf: Path, text: str, arguments: list[str], expected: dict[str, Any]
) -> None:
    assert read(conf, text, *arguments) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("frobnicate", "unrecognized arguments: --frobnicate"),
        ("blur 60", "unrecognized arguments: --blur=60"),
        ("port", "argument --port: expected one argument"),
        ("port =", "argument --port: ''"),
        ("usage-db =", "argument --usage-db: '' is empty"),
        ("p tcp:4001", "unrecognized arguments: --p=tcp:4001"),
        ("keepalive soon", "argument --keepalive: 'soon' is not"),
        ("port tcp:99999", "argument --port: tcp:99999: port must be"),
        ("allow 192.0.2.1/24", "argument --allow: '192.0.2.1/24' has host bits set; the network"),
        ("trust-forwarded-for =", "argument --trust-forwarded-for: '' is empty"),
        ("blur-usage an hour", "argument --blur-usage: 'an hour' is not a whole number"),
        ("no-splice yes", "argument --no-splice: ignored explicit argument 'yes'"),
        ("Port tcp:4001", "unrecognized arguments: --Port=tcp:4001"),
        ("usage_db file", "unrecognized arguments: --usage_db=file"),
        ("port: tcp:4001", "unrecognized arguments: --port:=tcp:4001"),
        ("-h", "'-h' is not of the form"),
        ("--", "'--' is not of the form"),
        ("=", "'=' is not of the form `option value`"),
        ("check", "check is for the command line only"),
        ("print-hints relay.example.org", "print-hints is for the command line only"),
        ("help", "help is for the command line only"),
        ("version", "version is for the command line only"),
        ("--config other.conf", "config is for the command line only"),
        ("port tcp:4001;", "argument --port: tcp:4001;: port must be"),
        ("pidfile a\0b", r"'pidfile a\x00b' is not of the form"),  # no command line can contain it
        ("a=\x1b[31m", r"unrecognized arguments: --a=\x1b[31m"),
        ("\0", r"unrecognized arguments: --\x00"),
        (f"port {'x' * 5000}", "argument --port: 'xxx"),
    ],
)
def test_an_error_names_the_file_and_the_line(
    conf: Path, capsys: pytest.CaptureFixture[str], line: str, message: str
) -> None:
    conf.write_text(f"# first\n\n{line}\nport nonsense\n", encoding="utf-8")
    with pytest.raises(SystemExit) as caught:
        parse_arguments([f"--config={conf}"])
    output = capsys.readouterr()
    assert caught.value.code == 2
    assert output.out == ""
    assert output.err.count("\n") == 1 and len(output.err) < 1100
    assert output.err.startswith(f"transit-relay: {conf}, line 3: {message}")


def test_several_files(conf: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.conf"
    more.write_text("port unix:/run/x.sock\nblur-usage 60\n")
    conf.write_text("port tcp:4001\nblur-usage 3600\nlog-fd 1\n")
    options = parse_arguments([f"--config={conf}", f"--config={more}"])
    assert (options.port, options.blur_usage, options.log_fd) == (PORTS, 60, 1)


@pytest.mark.parametrize(
    ("text", "arguments", "expected"),
    [
        ("daemonize", ["--no-daemonize"], {}),
        ("no-splice", ["--splice"], {}),
        ("no-splice\nsplice", [], {}),
        ("splice", ["--no-splice"], {"no_splice": True}),
        ("usage-db a", ["--usage-db="], {}),
        ("usage-db a", ["--usage-db=", "--usage-db=b"], {"usage_db": "b"}),
        ("log-fd 1", ["--log-fd="], {}),
        ("pidfile a", ["--pidfile", ""], {}),
        ("logfile a", ["--logfile="], {}),
        (
            "daemonize\nlogfile a\npidfile a",
            ["--logfile="],
            {"daemonize": True, "logfile": "transit_relay.log", "pidfile": "a"},
        ),
        ("websocket-url ws://a/", ["--websocket-url="], {}),
        ("blur-usage 60", ["--blur-usage="], {}),
        ("handshake-timeout 5", ["--handshake-timeout="], {}),
        ("keepalive 5", ["--keepalive="], {}),
        ("port tcp:4001\nport tcp:4002", ["--port="], {}),
        ("websocket tcp:4002\nport tcp:4001", ["-w", ""], {"port": PORTS[:1]}),
        ("allow ::1\nallow unix", ["--allow="], {}),
        (
            "trust-forwarded-for ::1\nallow 192.0.2.0/24",
            ["--trust-forwarded-for="],
            {"allow": NETWORKS[:1]},
        ),
    ],
)
def test_the_command_line_cancels_an_option(
    conf: Path, text: str, arguments: list[str], expected: dict[str, Any]
) -> None:
    assert read(conf, text, *arguments) == expected


@pytest.mark.parametrize(
    "arguments",
    [
        ["--logfile="],
        ["--port="],
        ["--keepalive="],
        ["--usage-db=", "--user="],
        ["-w", "", "-w", "tcp:4002"],
    ],
)
def test_an_empty_value_cancels_only_an_option_of_a_file(
    conf: Path, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    """A script with an unset variable must not start a relay without that option.

    `--user=` is always refused: `--user=root` cancels a user.
    """
    conf.write_text("usage-db a\nuser nobody\nwebsocket tcp:4003\n")
    with pytest.raises(SystemExit) as caught:
        parse_arguments([f"--config={conf}", *arguments])
    assert caught.value.code == 2
    assert " is empty" in capsys.readouterr().err


def test_ctrl_c_while_the_file_is_read(tmp_path: Path) -> None:
    """The file is a pipe, and nothing is written to it."""
    os.mkfifo(tmp_path / "relay.conf")
    with RelayProcess("--config", "relay.conf", cwd=tmp_path) as relay:
        with open(tmp_path / "relay.conf", "wb"):  # this returns when the relay opens it
            assert relay.stop(signal.SIGINT) == 1
    assert relay.stderr == b""


def test_a_file_without_end(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--config=/dev/zero"])
    assert caught.value.code == 2
    assert "/dev/zero: too long for a configuration" in capsys.readouterr().err


def test_an_error_of_the_command_line_does_not_name_the_file(
    conf: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    conf.write_text("blur-usage 3600\n")
    with pytest.raises(SystemExit):
        parse_arguments([f"--config={conf}", "--log-fd=x"])
    assert capsys.readouterr().err.startswith("transit-relay: argument --log-fd: 'x'")


def test_a_missing_file(tmp_path: Path) -> None:
    with RelayProcess("--config", "none.conf", cwd=tmp_path) as relay:
        assert relay.wait() == 2
    expected = "transit-relay: argument --config: none.conf: No such file or directory"
    assert only_line(relay) == expected


def test_a_relay_that_is_configured_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "relay.conf").write_text(
        "port unix:relay.sock\nusage-db usage.sqlite  # beside it\nblur-usage 3600\n"
    )
    with ReachedRelay("--config", "relay.conf", cwd=tmp_path) as relay:
        relay.wait_for(r"^Transit starting on unix:relay\.sock$")
        assert relay.stderr.startswith(b"blurring access times to 3600 seconds\n")
        relay.address = str(tmp_path / "relay.sock")
        transfer(relay, b"x" * 12_345)
        relay.stop_cleanly()
    rows = query(tmp_path / "usage.sqlite", "SELECT started % 3600, total_bytes, result FROM usage")
    assert rows == [(0, 12_000, "happy")]
