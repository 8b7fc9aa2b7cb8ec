"""The relay in the background, as another user, and under the programs that start daemons."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import logging
import os
import pwd
import re
import resource
import select
import shutil
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import ENTRY, RELAY, TIMEOUT, RelayProcess, fill_pipe, read_to_end
from processes import (
    QuietRelay,
    ReachedRelay,
    activated,
    only_line,
    query,
    transfer,
    with_descriptor,
)

import transit_relay
from transit_relay import (
    LogFile,
    PassedSockets,
    choose_endpoints,
    limit_message,
    nonblocking_writer,
    open_relay,
    parse_arguments,
)

LOCAL = ("--port", "tcp:0:interface=127.0.0.1")


def kill_relay(pidfile: Path) -> bool:
    """Kill the daemon of a pidfile, but no other process. Return whether it was there."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pidfile.read_text())
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if bytes(RELAY) in command or bytes(ENTRY) in command:
            os.kill(pid, signal.SIGKILL)
            return True
    return False


class Daemon(RelayProcess):
    """A relay in the background, with the default pidfile and log file in `folder`.

    `pid` is the process id in the pidfile.
    """

    def __init__(self, folder: Path, *options: str, **kwargs: object) -> None:
        self.folder = folder
        self.pidfile = folder / "transit_relay.pid"
        self.logfile = folder / "transit_relay.log"
        if "--port" not in options:
            options = (*LOCAL, *options)
        kwargs = {"cwd": folder, **kwargs}
        super().__init__("--daemonize", *options, **kwargs)  # type: ignore[arg-type]
        self._pidfd: int | None = None  # readable at its end: it is no child of ours
        try:
            self.code = self.wait()
            self.pid = int(self.pidfile.read_text()) if self.code == 0 else 0
            if self.pid:
                self._pidfd = os.pidfd_open(self.pid)
        except BaseException:
            kill_relay(self.pidfile)
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            os.close(self._pidfd)

    @property
    def port(self) -> int:
        match = re.search(r"Transit starting on tcp:(\d+)", self.logfile.read_text())
        assert match, self.logfile.read_text()
        return int(match[1])

    def end(self) -> None:
        """Run `kill $(cat transit_relay.pid)` and wait for the end."""
        os.kill(int(self.pidfile.read_text()), signal.SIGTERM)
        ended, _, _ = select.select([self._pidfd], [], [], TIMEOUT)
        assert ended, "it did not end"

    def status(self, field: str) -> list[str]:
        """Return a field of /proc/PID/status."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return re.findall(rf"^{field}:(.*)", status, re.MULTILINE)[0].split()


Start = Callable[..., Daemon]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts a daemon. All are killed at the end of the test."""
    with contextlib.ExitStack() as started:

        def start(*options: str, folder: Path = tmp_path, **kwargs: object) -> Daemon:
            one = started.enter_context(Daemon(folder, *options, **kwargs))
            assert one.code == 0, one.stderr
            return one

        yield start


def failed_start(folder: Path, *options: str) -> str:
    """Start a daemon that must fail. Return its one line on stderr."""
    with Daemon(folder, *options) as one:
        assert one.code == 1
        return only_line(one)


# The start.


def test_start_returns_when_it_listens(daemon: Start) -> None:
    """It prints nothing: cron would send a mail."""
    running = daemon()
    assert running.stderr == b""
    transfer(running)


def test_default_file_names(daemon: Start, tmp_path: Path) -> None:
    running = daemon()
    assert sorted(os.listdir(tmp_path)) == ["transit_relay.log", "transit_relay.pid"]
    assert running.pidfile.read_text() == f"{running.pid}\n"
    output = running.logfile.read_text().splitlines()
    assert re.search(r"^\S+ Transit starting on tcp:\d+:interface=127\.0\.0\.1$", output[-1])


def test_named_files(tmp_path: Path) -> None:
    """No other file is written."""
    relay = RelayProcess(
        *LOCAL, "--daemonize", "--pidfile", "a.pid", "--logfile", "a.log", cwd=tmp_path
    )
    try:
        with relay:
            assert relay.wait() == 0
        assert sorted(os.listdir(tmp_path)) == ["a.log", "a.pid"]
    finally:
        assert kill_relay(tmp_path / "a.pid")


def test_busy_port_is_reported_and_leaves_no_pidfile(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp:{other.getsockname()[1]}:interface=127.0.0.1"
        output = failed_start(tmp_path, "--port", "unix:x.sock", "--port", endpoint)
    assert output == f"transit-relay: {endpoint}: Address already in use"
    assert {"transit_relay.pid", "x.sock"}.isdisjoint(os.listdir(tmp_path))


def test_a_start_that_fails_late_is_reported(tmp_path: Path) -> None:
    output = failed_start(tmp_path, "--usage-db", "missing/usage.sqlite")
    assert output == "transit-relay: --usage-db missing/usage.sqlite: unable to open database file"
    assert not (tmp_path / "transit_relay.pid").exists()


# The pidfile.


def test_second_start_is_refused_and_the_first_unharmed(daemon: Start, tmp_path: Path) -> None:
    first = daemon()
    output = failed_start(tmp_path)
    assert output.startswith("transit-relay: pidfile transit_relay.pid: a relay is running")
    assert str(first.pid) in output
    assert first.pidfile.read_text() == f"{first.pid}\n"
    transfer(first)


def dead_pid() -> int:
    """Return the process id of a process that has ended."""
    with subprocess.Popen(["true"]) as process:
        process.wait()
    return process.pid


@pytest.mark.parametrize("kind", ["dead", "reused", "empty"])
def test_stale_pidfile_is_replaced(daemon: Start, tmp_path: Path, kind: str) -> None:
    content = {"dead": f"{dead_pid()}\n", "reused": f"{os.getpid()}\n", "empty": ""}[kind]
    (tmp_path / "transit_relay.pid").write_text(content)
    running = daemon()
    assert running.pidfile.read_text() == f"{running.pid}\n"
    assert running.pid != os.getpid()
    transfer(running)


def test_pidfile_of_a_killed_relay_is_replaced(daemon: Start) -> None:
    first = daemon()
    os.kill(first.pid, signal.SIGKILL)
    select.select([first._pidfd], [], [], TIMEOUT)
    second = daemon()
    assert first.pid != second.pid == int(second.pidfile.read_text())


@pytest.mark.parametrize(
    "content", ["not a number\n", "123 456\n", "-1\n", "123\nprecious\n", "1" * 99]
)
def test_pidfile_that_is_something_else_is_untouched(tmp_path: Path, content: str) -> None:
    (tmp_path / "transit_relay.pid").write_text(content)
    output = failed_start(tmp_path)
    assert output == "transit-relay: pidfile transit_relay.pid: holds something else"
    assert (tmp_path / "transit_relay.pid").read_text() == content


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_pidfile_that_is_not_a_regular_file_is_untouched(tmp_path: Path, kind: str) -> None:
    """Another user could make root write to the target of a link."""
    path = tmp_path / "transit_relay.pid"
    (tmp_path / "target").write_text("1\n")
    {
        "link": lambda: path.symlink_to("target"),
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
    }[kind]()
    before = path.lstat()
    assert failed_start(tmp_path).startswith("transit-relay: pidfile transit_relay.pid: ")
    assert path.lstat() == before
    assert (tmp_path / "target").read_text() == "1\n"


def test_kill_ends_the_relay_and_removes_the_pidfile(daemon: Start, tmp_path: Path) -> None:
    running = daemon("--usage-db", "usage.sqlite")
    transfer(running)
    running.end()
    assert not running.pidfile.exists()
    assert running.logfile.read_text().endswith(" stopped\n")
    assert query(tmp_path / "usage.sqlite", "SELECT result FROM usage") == [("happy",)]


def test_pidfile_in_the_foreground(tmp_path: Path) -> None:
    with RelayProcess(*LOCAL, "--pidfile", "named.pid", cwd=tmp_path) as relay:
        relay.started()
        assert (tmp_path / "named.pid").read_text() == f"{relay.pid}\n"
        relay.stop_cleanly()
    assert os.listdir(tmp_path) == []


def test_a_relay_can_be_opened_beside_a_running_one(tmp_path: Path) -> None:
    """Neither the pidfile nor the log file of the running process is touched."""
    for name in ("x.pid", "x.log"):
        (tmp_path / name).write_text("1\n")
    files = [f"--pidfile={tmp_path}/x.pid", f"--logfile={tmp_path}/x.log"]
    options = parse_arguments([f"--port=unix:{tmp_path}/x.sock", *files])
    passed = PassedSockets()
    with contextlib.ExitStack() as undo:
        endpoints = choose_endpoints(options, passed)
        opened = open_relay(options, endpoints, passed, None, None, undo)
        assert sorted(os.listdir(tmp_path)) == ["x.log", "x.pid", "x.sock"]
        opened.server.close()
    assert sorted(os.listdir(tmp_path)) == ["x.log", "x.pid"]
    assert [(tmp_path / name).read_text() for name in ("x.pid", "x.log")] == ["1\n", "1\n"]


def test_the_limits_of_the_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}

    def make_server(listeners: object, recorder: object, limits: object, **others: object) -> None:
        given.update(others, limits=limits)

    monkeypatch.setattr(transit_relay, "Server", make_server)
    monkeypatch.setattr(transit_relay, "descriptor_budget", lambda limit, now, _: (limit - now, 7))
    options = parse_arguments([*LOCAL, "--handshake-timeout=5", "--keepalive=7"])
    with contextlib.ExitStack() as undo:
        open_relay(options, options.port, PassedSockets(), None, None, undo)
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    limits: Any = given["limits"]
    expected = transit_relay.Limits(handshake_seconds=5, keepalive_seconds=7)
    assert limits == expected._replace(max_connections=limits.max_connections)
    assert given["max_pipes"] == 7
    assert limits.max_connections == min(limit * 4 // 5, given["max_open"] * 9 // 10)
    assert limit - 1000 < given["max_open"] < limit


def test_no_pidfile_in_the_foreground_if_none_is_named(tmp_path: Path) -> None:
    with RelayProcess(*LOCAL, cwd=tmp_path) as relay:
        relay.started()
        assert os.listdir(tmp_path) == []
        relay.stop_cleanly()


# The background.


def test_standard_descriptors_are_dev_null(daemon: Start) -> None:
    running = daemon()
    for fd in range(3):
        assert os.readlink(f"/proc/{running.pid}/fd/{fd}") == os.devnull


def test_has_no_terminal_and_cannot_get_one(daemon: Start) -> None:
    """The daemon has a session of its own, but does not lead it."""
    running = daemon()
    fields = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()
    session, terminal = int(fields[3]), int(fields[4])
    assert session not in (os.getsid(0), running.pid)
    assert terminal == 0


def test_from_a_crontab(tmp_path: Path) -> None:
    """The environment is empty, and the current folder is the root folder."""
    pidfile, logfile = tmp_path / "transit_relay.pid", tmp_path / "transit_relay.log"
    with Daemon(
        tmp_path,
        *LOCAL,
        *("--pidfile", str(pidfile), "--logfile", str(logfile)),
        cwd=Path("/"),
        env={},
    ) as running:
        assert running.code == 0, running.stderr
        assert running.stderr == b""
        transfer(running)
        running.end()
    assert os.listdir(tmp_path) == ["transit_relay.log"]


def test_systemd_sockets_are_served_in_the_background(daemon: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        address = passed.getsockname()
        running = daemon(
            "--port", "systemd:index=0", pass_fds=[passed.fileno()], program=activated(passed)
        )
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"bad handshake\n"
    running.end()


def test_log_fd_is_written_in_the_background(daemon: Start, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(reader) as log:
        running = daemon("--log-fd", str(writer), pass_fds=[writer])
        os.close(writer)
        transfer(running)
        assert json.loads(log.readline())["mood"] == "happy"
        running.end()
        assert log.read() == ""


def test_other_descriptors_are_closed_in_the_background(daemon: Start, tmp_path: Path) -> None:
    """The caller's pipe ends, and a lock that the caller held can be taken."""
    reader, writer = os.pipe()
    with open(tmp_path / "lock", "wb") as lock, open(tmp_path / "lock", "wb") as other:
        fcntl.flock(lock, fcntl.LOCK_EX)
        daemon(pass_fds=[writer, lock.fileno()])
        lock.close()
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(writer)
    with open(reader, "rb") as pipe:
        ended, _, _ = select.select([pipe], [], [], TIMEOUT)
        assert ended and pipe.read() == b""


def test_a_passed_descriptor_is_served_in_the_background(daemon: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        fd, address = passed.fileno(), passed.getsockname()
        daemon("--port", f"fd:{fd}", pass_fds=[fd])
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(b"\n")
        assert read_to_end(client) == b"bad handshake\n"


def test_a_socket_passed_as_stdin_is_served(daemon: Start) -> None:
    """inetd passes it so. The daemon replaces its stdin by /dev/null."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        fd, address = passed.fileno(), passed.getsockname()
        daemon("--port", "fd:0", pass_fds=[fd], program=with_descriptor(fd, 0))
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(b"\n")
        assert read_to_end(client) == b"bad handshake\n"


# Another user.

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can switch to another user")
NOBODY = pwd.getpwnam("nobody")


@as_root
def test_user(daemon: Start, public: Path) -> None:
    running = daemon("--user", "nobody", folder=public)
    assert running.status("Uid") == [str(NOBODY.pw_uid)] * 4
    assert running.status("Gid") == [str(NOBODY.pw_gid)] * 4
    groups = os.getgrouplist("nobody", NOBODY.pw_gid)
    assert sorted(map(int, running.status("Groups"))) == sorted(groups)
    assert "running as root" not in running.logfile.read_text()
    transfer(running)


@as_root
def test_user_with_group(daemon: Start, public: Path) -> None:
    running = daemon("--user", "nobody:daemon", folder=public)
    assert running.status("Uid") == [str(NOBODY.pw_uid)] * 4
    assert running.status("Gid") == [str(grp.getgrnam("daemon").gr_gid)] * 4
    assert str(os.getgid()) not in running.status("Groups")


@as_root
@pytest.mark.parametrize(
    ("user", "groups"), [(f"{NOBODY.pw_uid}:1", None), ("54321:1", [1]), ("nobody:1", None)]
)
def test_user_with_numbers(
    daemon: Start, public: Path, user: str, groups: list[int] | None
) -> None:
    """A user without a name is in no other group."""
    running = daemon("--user", user, folder=public)
    uid = "54321" if groups else str(NOBODY.pw_uid)
    assert running.status("Uid") == [uid] * 4
    assert running.status("Gid") == ["1"] * 4
    expected = groups or os.getgrouplist("nobody", 1)
    assert sorted(map(int, running.status("Groups"))) == sorted(expected)
    transfer(running)


@as_root
def test_unix_sockets_are_given_to_user(public: Path) -> None:
    options = ("--port", "unix:x.sock:mode=660", "--user", "nobody:daemon")
    with ReachedRelay(*options, cwd=public) as relay:
        relay.started()
        status = (public / "x.sock").stat()
        assert (status.st_uid, status.st_gid) == (NOBODY.pw_uid, grp.getgrnam("daemon").gr_gid)
        assert stat.S_IMODE(status.st_mode) == 0o660
        relay.address = str(public / "x.sock")
        transfer(relay)
        relay.stop_cleanly()


@as_root
def test_the_pidfile_belongs_to_root_and_the_logfile_to_user(daemon: Start, public: Path) -> None:
    """The pidfile is opened before the switch, the log file is given to the user."""
    running = daemon("--user", "nobody", folder=public)
    assert running.pidfile.stat().st_uid == 0
    assert running.logfile.stat().st_uid == NOBODY.pw_uid


@as_root
def test_pidfile_that_user_cannot_remove_is_emptied(daemon: Start, public: Path) -> None:
    first = daemon("--user", "nobody", folder=public)
    first.end()
    assert first.pidfile.read_text() == ""
    assert "warning" not in first.logfile.read_text()
    second = daemon("--user", "nobody", folder=public)
    assert second.pidfile.read_text() == f"{second.pid}\n"


@as_root
def test_files_that_user_cannot_remove_do_not_matter(public: Path) -> None:
    """The second start replaces the socket. It runs in the foreground, for the exit code."""
    for _ in range(2):
        with ReachedRelay(
            *("--port", "unix:x.sock", "--pidfile", "x.pid", "--user", "nobody"), cwd=public
        ) as relay:
            relay.started()
            relay.address = str(public / "x.sock")
            transfer(relay)
            relay.stop_cleanly()
        assert (public / "x.sock").is_socket()
        assert (public / "x.pid").read_text() == ""


@as_root
def test_database_is_made_by_user(daemon: Start, public: Path) -> None:
    data = public / "data"
    data.mkdir()
    os.chown(data, NOBODY.pw_uid, NOBODY.pw_gid)
    running = daemon("--user", "nobody", "--usage-db", "data/usage.sqlite", folder=public)
    transfer(running)
    running.end()
    assert (data / "usage.sqlite").stat().st_uid == NOBODY.pw_uid
    assert query(data / "usage.sqlite", "SELECT result FROM usage") == [("happy",)]


@as_root
def test_database_that_user_may_not_make_is_refused(public: Path) -> None:
    output = failed_start(public, "--user", "nobody", "--usage-db", "usage.sqlite")
    assert output == "transit-relay: --usage-db usage.sqlite: unable to open database file"
    assert not (public / "usage.sqlite").exists()


@as_root
def test_logfile_is_opened_again_by_user(daemon: Start, public: Path) -> None:
    """logrotate does this with `create 640 nobody`."""
    running = daemon("--user", "nobody", folder=public)
    running.logfile.rename(public / "old.log")
    running.logfile.touch(0o640)
    os.chown(running.logfile, NOBODY.pw_uid, NOBODY.pw_gid)
    running.end()
    assert (public / "old.log").read_text().endswith("interface=127.0.0.1\n")
    assert running.logfile.read_text().endswith(" stopped\n")


@as_root
def test_logfile_that_user_cannot_create_stays_the_old_one(daemon: Start, public: Path) -> None:
    running = daemon("--user", "nobody", folder=public)
    running.logfile.rename(public / "old.log")
    running.end()
    assert (public / "old.log").read_text().endswith(" stopped\n")


@as_root
def test_a_logfile_that_existed_keeps_its_owner(daemon: Start, public: Path) -> None:
    """It may be a link to a file that the user must not own."""
    secret = public / "secret"
    secret.touch(0o600)
    (public / "transit_relay.log").symlink_to(secret)
    daemon("--user", "nobody", folder=public)
    assert secret.stat().st_uid == 0


@as_root
def test_a_logfile_that_a_link_has_led_to_keeps_its_owner(daemon: Start, public: Path) -> None:
    """The user could have made the link, to a place where only root may create files."""
    (public / "transit_relay.log").symlink_to("new.log")
    daemon("--user", "nobody", folder=public)
    assert (public / "new.log").stat().st_uid == 0


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("no such user", "there is no user 'no such user'"),
        ("nobody:no such group", "there is no group 'no such group'"),
        ("54321", "there is no user '54321', so add its group: 54321:GROUP"),
        ("4294967295:1", "there is no user '4294967295'"),
        ("nobody:4294967295", "there is no group '4294967295'"),
        (":1", "there is no user ''"),
    ],
)
def test_unknown_user_is_refused(tmp_path: Path, user: str, why: str) -> None:
    assert failed_start(tmp_path, "--user", user) == f"transit-relay: --user {user}: {why}"
    assert not (tmp_path / "transit_relay.pid").exists()


# Messages.

A_RECORD = logging.LogRecord("relay", logging.INFO, __file__, 1, "a message", None, None)


def test_a_logfile_on_a_full_disk_can_be_replaced(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"))
    os.close(log.fd)
    log.fd = os.open("/dev/full", os.O_WRONLY)
    log.emit(A_RECORD)
    log.emit(A_RECORD)
    os.close(log.fd)
    assert (tmp_path / "log").read_text() == "a message\n" * 2


def test_a_logfile_replaced_by_a_pipe_without_a_reader_stays_the_old_one(tmp_path: Path) -> None:
    """To open such a pipe would block."""
    log = LogFile(str(tmp_path / "log"))
    (tmp_path / "log").rename(tmp_path / "old")
    os.mkfifo(tmp_path / "log")
    log.emit(A_RECORD)
    os.close(log.fd)
    assert (tmp_path / "old").read_text() == "a message\n"


@pytest.mark.parametrize("character", ["x", "\u00e4", "\u20ac", "\U0001f600"])
def test_a_long_message_loses_its_middle(tmp_path: Path, character: str) -> None:
    """The last line of a traceback is the exception. A pipe takes the rest as one piece."""
    log = LogFile(str(tmp_path / "log"))
    for margin in range(4):  # cuts the characters at all places
        text = f"Traceback{'.' * margin}\n{character * 9_999}\nValueError: the reason"
        log.emit(logging.makeLogRecord({"msg": text}))
        log.emit(A_RECORD)
    os.close(log.fd)
    messages = (tmp_path / "log").read_text().split("a message\n")
    assert messages.pop() == ""
    for margin, message in enumerate(messages):
        assert message.startswith(f"Traceback{'.' * margin}\n{character}")
        assert f"{character}\n[...]\n{character}" in message
        assert message.endswith(f"{character}\nValueError: the reason\n")
        assert select.PIPE_BUF - 8 < len(message.encode()) <= select.PIPE_BUF


@pytest.mark.parametrize(("size", "is_cut"), [(0, False), (-1, False), (1, True)])
def test_a_message_that_fits_is_written_whole(size: int, is_cut: bool) -> None:
    text = b"x" * (select.PIPE_BUF - 1 + size)
    assert (limit_message(text) != text) == is_cut
    assert len(limit_message(text)) < select.PIPE_BUF


def test_a_logfile_that_is_a_full_pipe_does_not_block() -> None:
    """/dev/stderr may be such a pipe, in a container."""
    reader, writer = os.pipe()
    log = LogFile(f"/dev/fd/{writer}")
    fill_pipe(writer)
    log.emit(A_RECORD)
    for fd in (reader, writer, log.fd):
        os.close(fd)


def test_a_logfile_can_be_opened_again(tmp_path: Path) -> None:
    """SIGUSR1 does this. The new file does not wait for the next message."""
    log = LogFile(str(tmp_path / "log"))
    log.emit(A_RECORD)
    (tmp_path / "log").rename(tmp_path / "old")
    log.reopen()
    assert (tmp_path / "log").read_text() == ""
    log.emit(A_RECORD)
    os.close(log.fd)
    assert (tmp_path / "log").read_text() == (tmp_path / "old").read_text() == "a message\n"


def test_a_logfile_that_cannot_be_opened_again_is_reported(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = LogFile(str(tmp_path / "log"))
    (tmp_path / "log").rename(tmp_path / "old")
    (tmp_path / "log").mkdir()
    log.reopen()
    log.emit(A_RECORD)
    os.close(log.fd)
    assert (tmp_path / "old").read_text() == "a message\n"
    assert [record.getMessage() for record in caplog.records] == [
        "the log file cannot be reopened: Is a directory"
    ]


FILL_STDERR = """
import os, sys, transit_relay as t
write = t.nonblocking_writer(2)
try:
    while True:
        write(b"x" * 1000)
except BlockingIOError:
    print(os.get_blocking(2), flush=True)
"""


@pytest.mark.parametrize("kind", ["pipe", "terminal", "socket"])
def test_a_full_stderr_does_not_block(kind: str) -> None:
    """Its open file description stays blocking: other processes may share it."""
    if kind == "socket":
        reader, writer = (end.detach() for end in socket.socketpair())
    else:
        reader, writer = os.pipe() if kind == "pipe" else os.openpty()
    with open(reader, "rb", buffering=0) as received, open(writer, "wb", buffering=0) as stderr:
        done = subprocess.run(
            [sys.executable, "-c", FILL_STDERR],
            cwd=RELAY.parent,
            stdout=subprocess.PIPE,
            stderr=stderr,
            timeout=4 * TIMEOUT,
        )
        assert done.stdout == b"True\n"
        assert received.read(10) == b"x" * 10


def test_a_full_pipe_of_another_user_does_not_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe cannot be opened again: the relay asks for room before it writes."""
    reader, writer = os.pipe()

    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    write = nonblocking_writer(writer)
    write(b"a message\n")
    assert os.read(reader, 100) == b"a message\n"
    full = fill_pipe(writer)
    write(b"a message\n")
    assert len(os.read(reader, 2 * full)) == full
    os.close(reader)
    os.close(writer)


# Programs that start daemons.

start_stop_daemon = pytest.mark.skipif(
    shutil.which("start-stop-daemon") is None, reason="start-stop-daemon is Debian's"
)
RUN_RELAY = ("--startas", sys.executable, "--", str(RELAY))


def ssd(*arguments: str) -> int:
    """Run start-stop-daemon, which starts its program in the root folder."""
    command = ["start-stop-daemon", "--quiet", *arguments]
    return subprocess.run(command, timeout=4 * TIMEOUT).returncode


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return the folder of x.pid. The process of x.pid is killed at the end of the test."""
    yield tmp_path
    kill_relay(tmp_path / "x.pid")


@start_stop_daemon
def test_start_stop_daemon_with_daemonize(folder: Path) -> None:
    named = ("--pidfile", str(folder / "x.pid"))
    options = (*LOCAL, "--daemonize", *named, "--logfile", str(folder / "x.log"))
    assert ssd("--start", *named, *RUN_RELAY, *options) == 0
    assert ssd("--status", *named) == 0
    assert ssd("--start", *named, *RUN_RELAY, *options) == 1  # a relay is running
    assert ssd("--stop", *named, "--retry", "TERM/15") == 0
    assert os.listdir(folder) == ["x.log"]
    assert (folder / "x.log").read_text().endswith(" stopped\n")


@start_stop_daemon
def test_start_stop_daemon_with_background(folder: Path) -> None:
    """It returns before the relay has started. The log is a pipe, which shows the start."""
    named = ("--pidfile", str(folder / "x.pid"))
    os.mkfifo(folder / "log")
    with open(os.open(folder / "log", os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as log:
        background = ("--background", "--make-pidfile", "--chdir", str(folder))
        relay = (*RUN_RELAY, *LOCAL, "--logfile", "log")
        assert ssd("--start", *named, *background, *relay) == 0
        output = b""
        while b"Transit starting on tcp:" not in output:
            assert select.select([log], [], [], TIMEOUT)[0], output
            part = log.read(4096)
            assert part, output
            output += part
        assert ssd("--stop", *named, "--retry", "TERM/15", "--remove-pidfile") == 0
        assert log.read(4096).endswith(b" stopped\n")


INIT_SCRIPT = RELAY.parent / "packaging" / "debian" / "init"


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ("port tcp:4001\n", "20"),
        ("drain 600\n", "620"),
        ("  --drain = 90.5  # comment\nblur-usage 3600", "110"),
        ("drain=1e3", "1020"),
        ("#drain 600\ndrain-not 5\nno # drain 5\n", "20"),
        ("drain 600\ndrain 0060", "80"),
        (None, "20"),
    ],
)
def test_the_init_script_waits_for_a_drain(tmp_path: Path, lines: str | None, seconds: str) -> None:
    """Run its function alone. Without a configuration, it waits as without the option."""
    script = INIT_SCRIPT.read_text()
    function = re.findall(r"(?ms)^stop_seconds\(\) \{$.*?^\}$", script)
    call = re.findall(r'--retry TERM/"\$\((.*)\)"/KILL', script)
    config = tmp_path / "relay.conf"
    if lines is not None:
        config.write_text(lines)
    program = "\n".join([f"CONFIG='{config}'", *function, *call])
    command = subprocess.run(["sh", "-c", program], capture_output=True, text=True)
    assert command.stdout == f"{seconds}\n"


def test_daemontools_down(tmp_path: Path) -> None:
    """`svc -d` sends SIGTERM, then SIGCONT. `svc -p` may have paused the relay before."""
    with QuietRelay("--usage-db", "usage.sqlite", cwd=tmp_path) as relay:
        transfer(relay)
        relay.process.send_signal(signal.SIGSTOP)
        relay.process.send_signal(signal.SIGTERM)
        relay.process.send_signal(signal.SIGCONT)
        assert relay.wait() == 0
    assert query(tmp_path / "usage.sqlite", "SELECT result FROM usage") == [("happy",)]
