"""`--check`: what it accepts and refuses, and that it changes nothing."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers import ENTRY, RELAY, TIMEOUT, RelayProcess, stopped
from processes import only_line, redirected, transfer
from test_daemon import NOBODY, Daemon, as_root

from transit_relay import main, open_usage_database

OK = b"check ok\n"


def states(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return what a reader finds in a folder: each file, its owner, mode, time and content."""
    found = {}
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else b""
        owner = (status.st_uid, status.st_gid)
        found[str(path)] = (status.st_ino, status.st_mode, owner, status.st_mtime_ns, content)
    return found


def run_check(
    folder: Path,
    *options: str,
    program: Sequence[str] = (sys.executable, str(ENTRY)),
    **others: Any,
) -> subprocess.CompletedProcess[bytes]:
    """Run `--check` in a folder. Fail if a file in it was changed."""
    before = states(folder)
    command = [*program, "--check", *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, timeout=4 * TIMEOUT, **others)
    assert states(folder) == before
    return done


def result_of(done: subprocess.CompletedProcess[bytes]) -> tuple[int, bytes, bytes]:
    """Return exit code, stdout and stderr."""
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder with one file of each kind the current one."""
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").write_text("precious\n")
    Path("relay.conf").write_text("port unix:conf.sock\nusage-db used\n")
    Path("wrong.conf").write_text("port unix:conf.sock\nprot tcp:4001\n")
    Path("stale.pid").write_text("123\n")
    Path("empty").touch()
    open_usage_database("used").close()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("dead.sock")
    return tmp_path


def check_here(*options: str) -> int:
    """Run `--check` in this process. Fail if it opens a socket for others or changes the process.

    Its messages go to sys.stdout and sys.stderr.
    """

    def fail(*_: object, **__: object) -> None:
        raise AssertionError

    class Untouched(socket.socket):
        bind = connect = connect_ex = listen = fail  # type: ignore[assignment]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", Untouched)
        for name in ("fork", "setuid", "setgid", "setgroups", "initgroups", "umask", "dup2"):
            patch.setattr(os, name, fail)
        patch.setattr(resource, "setrlimit", fail)
        patch.setattr(signal, "signal", fail)
        return main(["--check", *options])


# In this process.

ACCEPTED = [
    "",
    "--port=4001",
    "--port=tcp6:4001",
    "--port=tcp:1:interface=192.0.2.1",  # an address of another machine, a port of root's
    "--port=tcp:4001:interface=localhost",
    r"--port=tcp:4001:interface=\:\:1",
    "--port=tcp:4001 --websocket=tcp:4001",
    "--port=unix:new.sock",
    "--port=unix:dead.sock --websocket=unix:folder/new.sock",
    "--port=systemd:index=7",
    "--port=systemd:name=nothing",
    "--port=fd:999",
    "--port=haproxy:tcp:4001 --websocket=haproxy:unix:new.sock",
    "--log-fd=999",
    "--log-fd=2",
    "--usage-db=:memory:",
    "--usage-db=new",
    "--usage-db=folder/new",
    "--usage-db=used",
    "--usage-db=empty",
    "--pidfile=new --logfile=new",
    "--pidfile=stale.pid --logfile=file",
    "--pidfile=folder/new --logfile=./new",
    "--logfile=/dev/null",
    "--daemonize",
    "--user=root",
    "--user=nobody:0",
    "--user=54321:54321",
    "--config=relay.conf",
    "--config=relay.conf --usage-db=",
    "--trust-forwarded-for=127.0.0.1 --websocket-url=wss://relay.example.org/",
    "--usage-db=used --monthly-quota=1TB --max-connections=1000000",
]


@pytest.mark.parametrize("options", ACCEPTED)
def test_accepted(folder: Path, capfd: pytest.CaptureFixture[str], options: str) -> None:
    before = states(folder)
    assert check_here(*options.split()) == 0
    output = capfd.readouterr()
    assert (output.out, output.err) == ("check ok\n", "")
    assert states(folder) == before


REFUSED = {
    "--port=tcp6:4001:interface=127.0.0.1": "the interface has no IPv6 address",
    "--port=tcp:4001:interface=a..b": "the interface is no address and no name",
    "--port=unix:missing/x.sock": "No such file or directory",
    "--port=unix:file/x.sock": "Not a directory",
    "--port=unix:file": "the file exists and is not a socket",
    "--port=unix:folder": "the file exists and is not a socket",
    "--websocket=haproxy:unix:file": "the file exists and is not a socket",
    "--pidfile=missing/x.pid": "No such file or directory",
    "--pidfile=file/x.pid": "Not a directory",
    "--logfile=missing/x.log": "No such file or directory",
    "--logfile=file/x.log": "Not a directory",
    "--user=nobody-here": "there is no user 'nobody-here'",
    "--user=nobody:no-group": "there is no group 'no-group'",
    "--user=54321": "there is no user '54321', so add its group: 54321:GROUP",
    "--usage-db=missing/db": "unable to open database file",
    "--usage-db=folder": "not a regular file",
    "--usage-db=file": "file is not a database",
}


@pytest.mark.parametrize(("option", "reason"), REFUSED.items(), ids=list(REFUSED))
def test_refused(folder: Path, capfd: pytest.CaptureFixture[str], option: str, reason: str) -> None:
    before = states(folder)
    assert check_here(option) == 1
    output = capfd.readouterr()
    subject = option.partition("=")[2]
    names = {"--pidfile": "pidfile ", "--logfile": "logfile "}
    names.update({"--user": "--user ", "--usage-db": "--usage-db "})
    prefix = names.get(option.partition("=")[0], "")
    assert output.out == ""
    assert output.err == f"transit-relay: {prefix}{subject}: {reason}\n"
    assert states(folder) == before


@pytest.mark.parametrize("option", [*REFUSED, "--config=relay.conf --usage-db=file"])
def test_a_start_says_the_same(folder: Path, option: str) -> None:
    options = option.split()
    code, out, err = result_of(run_check(folder, *options))
    with RelayProcess("--port=unix:other.sock", *options, cwd=folder) as relay:
        assert relay.wait() == code == 1
    messages = [line for line in relay.stderr.splitlines() if b"RLIMIT_NOFILE" not in line]
    assert (out, err.splitlines()) == (b"", messages)


def test_a_name_that_cannot_be_resolved(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Faked: a look-up can be slow on a machine without a network."""

    def getaddrinfo(*_: object, **__: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    assert check_here("--port=tcp:4001:interface=nowhere") == 1
    expected = "transit-relay: tcp:4001:interface=nowhere: Name or service not known\n"
    assert capsys.readouterr() == ("", expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prot=4001"], "unrecognized arguments: --prot=4001"),
        (["--port=tcp:99999"], "argument --port: tcp:99999: port must be"),
        (["--config=wrong.conf"], "wrong.conf, line 2: unrecognized arguments: --prot=tcp:4001"),
        (["--config=missing.conf"], "argument --config: missing.conf: No such file"),
        (["--monthly-quota=1TB"], "argument --monthly-quota: it needs --usage-db"),
        (["--check=yes"], "argument --check: ignored explicit argument 'yes'"),
    ],
)
def test_wrong_options_are_code_2(folder: Path, options: list[str], message: str) -> None:
    code, out, err = result_of(run_check(folder, *options))
    assert (code, out, err.count(b"\n")) == (2, b"", 1)
    assert err.decode().startswith(f"transit-relay: {message}")


# As a process.


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--config=relay.conf", "--daemonize", "--pidfile=new.pid", "--logfile=new.log"],
        ["--daemonize", "--user=nobody", "--usage-db=new"],
    ],
)
def test_the_output_of_a_process(folder: Path, options: list[str]) -> None:
    assert result_of(run_check(folder, *options)) == (0, OK, b"")


def test_a_reason_goes_to_stderr_even_if_messages_would_not(folder: Path) -> None:
    code, out, err = result_of(run_check(folder, "--log-fd=2", "--port=unix:file"))
    assert (code, out) == (1, b"")
    assert err == b"transit-relay: unix:file: the file exists and is not a socket\n"
    code, out, err = result_of(run_check(folder, "--log-fd=2", "--quota-rate=5kB"))
    assert (code, out) == (2, b"") and b"--quota-rate" in err


@pytest.mark.parametrize("redirections", ["0<&-", "2>&-", "0<&- 2>&-"])
def test_closed_standard_descriptors(folder: Path, redirections: str) -> None:
    options = ("--usage-db=used", "--port=tcp:4001:interface=localhost")
    done = run_check(folder, *options, program=redirected(redirections))
    assert result_of(done) == (0, OK, b"")


def test_the_variables_of_the_service_manager_have_no_effect(folder: Path) -> None:
    """The check could be started with those of the service, but without its descriptors."""
    variables = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "NOTIFY_SOCKET": "/nonexistent"}
    done = run_check(folder, "--port=systemd:index=0", env={**os.environ, **variables})
    assert result_of(done) == (0, OK, b"")


def test_a_damaged_database_passes(folder: Path) -> None:
    """A relay starts with it, and warns."""
    os.truncate("used", 4096)
    assert result_of(run_check(folder, "--usage-db=used")) == (0, OK, b"")


@pytest.mark.parametrize(
    ("option", "code"),
    [
        ("--websocket=tcp:4002", 1),
        ("--port=haproxy:tcp:4001", 1),
        ("--websocket-url=ws://localhost/", 1),
        ("--trust-forwarded-for=127.0.0.1", 1),
        ("--port=tcp:4001", 0),
    ],
)
def test_without_ws_frames(folder: Path, option: str, code: int) -> None:
    copy = shutil.copy(RELAY, folder / "folder")
    done = run_check(folder, option, program=(sys.executable, "-B", str(copy)))
    why = b"WebSocket, --status and haproxy: Python finds no ws_frames.py (beside transit_relay.py)"
    expected = (1, b"", b"transit-relay: " + why + b"\n") if code else (0, OK, b"")
    assert result_of(done) == expected


# Beside a running relay.

# Holds the lock of a database until its stdin ends. This process would lose it: see `states`.
LOCK = """
import sqlite3, sys
db = sqlite3.connect("usage.sqlite", isolation_level=None)
db.execute(sys.argv[1])
db.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def locked(folder: Path, statement: str) -> Iterator[None]:
    """Execute a statement in the database of a relay, then hold its lock."""
    command = [sys.executable, "-c", LOCK, statement]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=folder, **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == b"locked\n"
        yield
        holder.stdin.close()


@pytest.fixture
def port() -> Iterator[int]:
    """Reserve a port. A socket that is bound and does not listen keeps other programs from it."""
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.mark.parametrize("mode", ["delete", "wal"])
def test_beside_a_running_relay(tmp_path: Path, port: int, mode: str) -> None:
    """Its port and its unix socket are in use, its pidfile and its database are locked.

    The relay is suspended meanwhile, because it writes to its files.
    """
    (tmp_path / "relay.conf").write_text("usage-db usage.sqlite\n")
    ports = ("--port", f"tcp:{port}:interface=127.0.0.1", "--port", "unix:x.sock")
    options = ("--config=relay.conf", "--daemonize", *ports)
    with Daemon(tmp_path, *options) as relay:
        assert relay.code == 0, relay.stderr
        with locked(tmp_path, f"PRAGMA journal_mode={mode}"), stopped(relay):
            assert result_of(run_check(tmp_path, *options)) == (0, OK, b"")
            with RelayProcess(*options, cwd=tmp_path) as second:
                assert second.wait() == 1
            assert "a relay is running" in only_line(second)
        transfer(relay)
        relay.end()
    assert not relay.pidfile.exists()


# As another user.


# Does what `setpriv --reuid=nobody` does, but imports before: Python may be closed to other users.
AS_NOBODY = f"""
import os, sqlite3, sys
sys.path.insert(0, {str(RELAY.parent)!r})
import transit_relay
transit_relay.parse_arguments(None)  # argparse imports modules late
os.setgroups([])
os.setgid({NOBODY.pw_gid})
os.setuid({NOBODY.pw_uid})
sys.exit(transit_relay.main())
"""


@as_root
def test_as_another_user(public: Path) -> None:
    """The check has the rights of its caller."""
    for name in ("private", "open"):
        (public / name).mkdir()
        open_usage_database(str(public / name / "db")).close()
    (public / "private").chmod(0o700)

    def as_nobody(option: str) -> tuple[int, bytes, bytes]:
        return result_of(run_check(public, option, program=[sys.executable, "-c", AS_NOBODY]))

    (public / "open" / "db").chmod(0o600)
    for option, reason in (
        ("--usage-db=open/db", b"unable to open database file"),
        ("--usage-db=private/db", b"unable to open database file"),
        ("--usage-db=private/new", b"unable to open database file"),
        ("--pidfile=private/x.pid", b"Permission denied"),
        ("--logfile=private/x.log", b"Permission denied"),
        ("--port=unix:private/x.sock", b"Permission denied"),
    ):
        code, out, err = as_nobody(option)
        assert (code, out, err.count(b"\n")) == (1, b"", 1)
        assert err.endswith(b": " + reason + b"\n")
    (public / "open" / "db").chmod(0o644)
    for option in ("--usage-db=open/db", "--usage-db=:memory:", "--pidfile=open/x.pid"):
        assert as_nobody(option) == (0, OK, b"")


@as_root
def test_memory_in_a_folder_that_the_caller_may_not_enter(public: Path) -> None:
    public.chmod(0o700)
    done = run_check(public, "--usage-db=:memory:", program=[sys.executable, "-c", AS_NOBODY])
    assert result_of(done) == (0, OK, b"")
