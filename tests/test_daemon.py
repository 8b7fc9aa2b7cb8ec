"""The relay in the background, under a user of its own, and under those who start programs."""

from __future__ import annotations

import contextlib
import grp
import json
import logging
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import RELAY, TIMEOUT, RelayProcess, fill_pipe, read_to_end
from processes import (
    QuietRelay,
    ReachedRelay,
    activated,
    only_line,
    query,
    transfer,
    with_descriptor,
)

from transit_relay import LogFile

LOCAL = ("--port", "tcp:0:interface=127.0.0.1")


def kill_relay(pidfile: Path) -> None:
    """Leave no daemon behind, also where a test failed; and end nobody else."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pidfile.read_text())
        if bytes(RELAY) in Path(f"/proc/{pid}/cmdline").read_bytes():
            os.kill(pid, signal.SIGKILL)


class Daemon(RelayProcess):
    """A relay that went to the background; `pid` is that of its pidfile.

    Give it a folder, and options that name no other pidfile or logfile.
    """

    def __init__(self, folder: Path, *options: str, **kwargs: object) -> None:
        self.folder = folder
        self.pidfile = folder / "transit_relay.pid"
        self.logfile = folder / "transit_relay.log"
        if "--port" not in options:
            options = (*LOCAL, *options)
        kwargs = {"cwd": folder, **kwargs}
        super().__init__("--daemonize", *options, **kwargs)  # type: ignore[arg-type]
        self._pidfd: int | None = None  # it is no child of ours: this tells of its end
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
        """`kill $(cat transit_relay.pid)`, and wait for it."""
        os.kill(int(self.pidfile.read_text()), signal.SIGTERM)
        ended, _, _ = select.select([self._pidfd], [], [], TIMEOUT)
        assert ended, "it did not end"

    def status(self, field: str) -> list[str]:
        """A field of /proc/PID/status."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        return re.findall(rf"^{field}:(.*)", status, re.MULTILINE)[0].split()


Start = Callable[..., Daemon]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Start]:
    """Start daemons with `daemon(*options)`, in a folder of their own. None is left behind."""
    with contextlib.ExitStack() as started:

        def start(*options: str, folder: Path = tmp_path, **kwargs: object) -> Daemon:
            one = started.enter_context(Daemon(folder, *options, **kwargs))
            assert one.code == 0, one.stderr
            return one

        yield start


def failed_start(folder: Path, *options: str) -> str:
    """The one line in which a daemon says why it does not start."""
    with Daemon(folder, *options) as one:
        assert one.code == 1
        return only_line(one)


# The start.


def test_start_returns_when_it_listens(daemon: Start) -> None:
    """And says nothing: cron would send a mail."""
    running = daemon()
    assert running.stderr == b""
    transfer(running)


def test_default_file_names(daemon: Start, tmp_path: Path) -> None:
    running = daemon()
    assert sorted(os.listdir(tmp_path)) == ["transit_relay.log", "transit_relay.pid"]
    assert running.pidfile.read_text() == f"{running.pid}\n"
    said = running.logfile.read_text().splitlines()
    assert re.search(r"^\S+ Transit starting on tcp:\d+:interface=127\.0\.0\.1$", said[-1])


def test_named_files(tmp_path: Path) -> None:
    """Nothing but the named ones is written."""
    relay = RelayProcess(
        *LOCAL, "--daemonize", "--pidfile", "a.pid", "--logfile", "a.log", cwd=tmp_path
    )
    try:
        with relay:
            assert relay.wait() == 0
        assert sorted(os.listdir(tmp_path)) == ["a.log", "a.pid"]
    finally:
        kill_relay(tmp_path / "a.pid")


def test_busy_port_is_said_and_leaves_no_pidfile(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        endpoint = f"tcp:{other.getsockname()[1]}:interface=127.0.0.1"
        said = failed_start(tmp_path, "--port", "unix:x.sock", "--port", endpoint)
    assert said == f"transit-relay: {endpoint}: Address already in use"
    assert {"transit_relay.pid", "x.sock"}.isdisjoint(os.listdir(tmp_path))


def test_start_that_fails_late_is_said_too(tmp_path: Path) -> None:
    said = failed_start(tmp_path, "--usage-db", "missing/usage.sqlite")
    assert said == "transit-relay: --usage-db missing/usage.sqlite: unable to open database file"
    assert not (tmp_path / "transit_relay.pid").exists()


# The pidfile.


def test_second_start_is_refused_and_the_first_unharmed(daemon: Start, tmp_path: Path) -> None:
    first = daemon()
    said = failed_start(tmp_path)
    assert said.startswith("transit-relay: pidfile transit_relay.pid: a relay is running")
    assert str(first.pid) in said
    assert first.pidfile.read_text() == f"{first.pid}\n"
    transfer(first)


def dead_pid() -> int:
    """The process id of nobody."""
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
    said = failed_start(tmp_path)
    assert said == "transit-relay: pidfile transit_relay.pid: holds something else"
    assert (tmp_path / "transit_relay.pid").read_text() == content


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_pidfile_that_is_no_file_is_untouched(tmp_path: Path, kind: str) -> None:
    """Through a link, root would write to where another user wants it to."""
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


def test_kill_ends_it_and_removes_the_pidfile(daemon: Start, tmp_path: Path) -> None:
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


def test_no_pidfile_in_the_foreground_if_none_is_named(tmp_path: Path) -> None:
    with RelayProcess(*LOCAL, cwd=tmp_path) as relay:
        relay.started()
        assert os.listdir(tmp_path) == []
        relay.stop_cleanly()


# The background.


def test_standard_descriptors_lead_nowhere(daemon: Start) -> None:
    running = daemon()
    for fd in range(3):
        assert os.readlink(f"/proc/{running.pid}/fd/{fd}") == os.devnull


def test_has_no_terminal_and_cannot_get_one(daemon: Start) -> None:
    """A session of its own, which it does not lead."""
    running = daemon()
    stat = Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()
    session, terminal = int(stat[3]), int(stat[4])
    assert session not in (os.getsid(0), running.pid)
    assert terminal == 0


def test_from_a_crontab(tmp_path: Path) -> None:
    """No environment, and the root folder as the current one."""
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


def test_systemd_sockets_are_still_ours_in_the_background(daemon: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as passed:
        address = passed.getsockname()
        running = daemon(
            "--port", "systemd:index=0", pass_fds=[passed.fileno()], program=activated(passed)
        )
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(b"hello\n")
        assert client.recv(100) == b"bad handshake\n"
    running.end()


def test_log_fd_goes_on_in_the_background(daemon: Start, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    with open(reader) as log:
        running = daemon("--log-fd", str(writer), pass_fds=[writer])
        os.close(writer)
        transfer(running)
        assert json.loads(log.readline())["mood"] == "happy"
        running.end()
        assert log.read() == ""


GOOD_NEWS = logging.LogRecord("relay", logging.INFO, __file__, 1, "good news", None, None)


def test_a_socket_passed_as_stdin_is_served(daemon: Start) -> None:
    """As inetd passes it; a daemon's own stdin is /dev/null."""
    with socket.create_server(("127.0.0.1", 0)) as passed:
        fd, address = passed.fileno(), passed.getsockname()
        daemon("--port", "fd:0", pass_fds=[fd], program=with_descriptor(fd, 0))
    with socket.create_connection(address, TIMEOUT) as client:
        client.sendall(b"\n")
        assert read_to_end(client) == b"bad handshake\n"


# Another user.

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
NOBODY = pwd.getpwnam("nobody")


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder of root's that others may enter, but not write; pytest's are closed to them."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


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
def test_user_has_the_root_only_files_open(daemon: Start, public: Path) -> None:
    """A port that only root may have is opened before; what is named is somebody's afterwards."""
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
def test_files_that_user_cannot_remove_are_no_matter(public: Path) -> None:
    """In the foreground, where the exit code is seen: the next start replaces the dead socket."""
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
    said = failed_start(public, "--user", "nobody", "--usage-db", "usage.sqlite")
    assert said == "transit-relay: --usage-db usage.sqlite: unable to open database file"
    assert not (public / "usage.sqlite").exists()


@as_root
def test_logfile_is_reopened_by_user(daemon: Start, public: Path) -> None:
    """As logrotate does with `create 640 nobody`."""
    running = daemon("--user", "nobody", folder=public)
    running.logfile.rename(public / "old.log")
    running.logfile.touch(0o640)
    os.chown(running.logfile, NOBODY.pw_uid, NOBODY.pw_gid)
    running.end()
    assert (public / "old.log").read_text().endswith("interface=127.0.0.1\n")
    assert running.logfile.read_text().endswith(" stopped\n")


@as_root
def test_logfile_that_user_cannot_make_again_goes_on_in_the_old_one(
    daemon: Start, public: Path
) -> None:
    running = daemon("--user", "nobody", folder=public)
    running.logfile.rename(public / "old.log")
    running.end()
    assert (public / "old.log").read_text().endswith(" stopped\n")


@as_root
def test_a_logfile_that_was_there_is_not_given_away(daemon: Start, public: Path) -> None:
    """It may be a link, by which the user would get what it must not have."""
    secret = public / "secret"
    secret.touch(0o600)
    (public / "transit_relay.log").symlink_to(secret)
    daemon("--user", "nobody", folder=public)
    assert secret.stat().st_uid == 0


def test_logfile_is_reopened_though_the_old_one_is_on_a_full_disk(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"))
    os.close(log.fd)
    log.fd = os.open("/dev/full", os.O_WRONLY)
    log.emit(GOOD_NEWS)
    log.emit(GOOD_NEWS)
    os.close(log.fd)
    assert (tmp_path / "log").read_text() == "good news\n" * 2


def test_logfile_that_becomes_a_pipe_without_a_reader_blocks_nobody(tmp_path: Path) -> None:
    """It goes on in the old one."""
    log = LogFile(str(tmp_path / "log"))
    (tmp_path / "log").rename(tmp_path / "old")
    os.mkfifo(tmp_path / "log")
    log.emit(GOOD_NEWS)
    os.close(log.fd)
    assert (tmp_path / "old").read_text() == "good news\n"


def test_a_message_that_is_too_long_is_cut_but_stays_a_line(tmp_path: Path) -> None:
    log = LogFile(str(tmp_path / "log"))
    log.emit(logging.makeLogRecord({"msg": "x" * 9_999}))
    log.emit(GOOD_NEWS)
    os.close(log.fd)
    assert (tmp_path / "log").read_text() == "x" * (select.PIPE_BUF - 1) + "\ngood news\n"


def test_logfile_that_is_a_full_pipe_blocks_nobody() -> None:
    """As /dev/stderr may be, in a container."""
    reader, writer = os.pipe()
    log = LogFile(f"/dev/fd/{writer}")
    fill_pipe(writer)
    log.emit(GOOD_NEWS)
    for fd in (reader, writer, log.fd):
        os.close(fd)


@pytest.mark.parametrize(
    ("user", "why"),
    [
        ("no such user", "there is no user 'no such user'"),
        ("nobody:no such group", "there is no group 'no such group'"),
    ],
)
def test_unknown_user_is_refused(tmp_path: Path, user: str, why: str) -> None:
    assert failed_start(tmp_path, "--user", user) == f"transit-relay: --user {user}: {why}"
    assert not (tmp_path / "transit_relay.pid").exists()


# Those who start programs.

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
    """Where start-stop-daemon keeps x.pid; what runs by it at the end is ended."""
    yield tmp_path
    kill_relay(tmp_path / "x.pid")


@start_stop_daemon
def test_start_stop_daemon_with_daemonize(folder: Path) -> None:
    named = ("--pidfile", str(folder / "x.pid"))
    options = (*LOCAL, "--daemonize", *named, "--logfile", str(folder / "x.log"))
    assert ssd("--start", *named, *RUN_RELAY, *options) == 0
    assert ssd("--status", *named) == 0
    assert ssd("--start", *named, *RUN_RELAY, *options) == 1  # it runs already
    assert ssd("--stop", *named, "--retry", "TERM/15") == 0
    assert os.listdir(folder) == ["x.log"]
    assert (folder / "x.log").read_text().endswith(" stopped\n")


@start_stop_daemon
def test_start_stop_daemon_with_background(folder: Path) -> None:
    """It returns before the relay has started, which is seen here in a log that is a pipe."""
    named = ("--pidfile", str(folder / "x.pid"))
    os.mkfifo(folder / "log")
    with open(os.open(folder / "log", os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as log:
        background = ("--background", "--make-pidfile", "--chdir", str(folder))
        relay = (*RUN_RELAY, *LOCAL, "--logfile", "log")
        assert ssd("--start", *named, *background, *relay) == 0
        said = b""
        while b"Transit starting on tcp:" not in said:
            assert select.select([log], [], [], TIMEOUT)[0], said
            part = log.read(4096)
            assert part, said
            said += part
        assert ssd("--stop", *named, "--retry", "TERM/15", "--remove-pidfile") == 0
        assert log.read(4096).endswith(b" stopped\n")


def test_daemontools_down(tmp_path: Path) -> None:
    """`svc -d` sends SIGTERM and then SIGCONT, also to a service that `svc -p` has paused."""
    with QuietRelay("--usage-db", "usage.sqlite", cwd=tmp_path) as relay:
        transfer(relay)
        relay.process.send_signal(signal.SIGSTOP)
        relay.process.send_signal(signal.SIGTERM)
        relay.process.send_signal(signal.SIGCONT)
        assert relay.wait() == 0
    assert query(tmp_path / "usage.sqlite", "SELECT result FROM usage") == [("happy",)]
