"""SIGHUP: the process goes on as the program on disk, with every connection and every record."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import select
import shutil
import signal
import socket
import sqlite3
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any

import pytest
from helpers import (
    DIRECTIONS,
    RELAY,
    TIMEOUT,
    Client,
    RelayProcess,
    WebSocketClient,
    digest,
    eventually,
    handshake,
    receive,
)
from processes import activated
from test_daemon import NOBODY, Daemon
from test_systemd import Manager

from transit_relay import read_state

WS_FRAMES = RELAY.with_name("ws_frames.py")
REFUSED = "reload refused: "


class Installation:
    """A copy of the program with a configuration, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "transit_relay.py"
        self.config = folder / "relay.conf"
        # A module has its bytecode cached. A script is compiled at each start and reload.
        self.entry = folder / "entry.py"
        self.entry.write_text(
            "import sys\n\nimport transit_relay\n\nsys.exit(transit_relay.main())\n"
        )
        (folder / "__pycache__").mkdir()
        for module in (RELAY, WS_FRAMES):  # copy2 keeps the time, which the bytecode contains
            copy = shutil.copy2(module, folder)
            shutil.copy(cache_from_source(str(module)), cache_from_source(copy))
        self.configure("port tcp:0:interface=127.0.0.1")

    def configure(self, *lines: str) -> None:
        """Replace the configuration."""
        self.config.write_text("".join(f"{line}\n" for line in lines))

    def edit(self, old: str, new: str) -> None:
        """Replace a text of the program, in a new file that is renamed."""
        text = self.program.read_text()
        assert text.count(old) == 1
        replacement = self.folder / "new.py"
        replacement.write_text(text.replace(old, new))
        replacement.rename(self.program)
        self.forget_bytecode()

    def forget_bytecode(self) -> None:
        """Remove the cache: it can be taken for that of a changed file of the same second."""
        shutil.rmtree(self.folder / "__pycache__", ignore_errors=True)

    def start(self, *options: str, starts: bool = True, **others: Any) -> ReloadingRelay:
        """Start the relay. `starts`: it is expected to listen."""
        relay = ReloadingRelay(
            *("--config", str(self.config), *options),
            program=[sys.executable, str(self.entry)],
            cwd=self.folder,
            **others,
        )
        if starts:
            relay.started()
        return relay


class ReloadingRelay(RelayProcess):
    """A relay that is sent SIGHUP. It closes its clients at the end of the test."""

    def __init__(self, *arguments: str, **others: Any) -> None:
        super().__init__(*arguments, **others)
        self._clients: list[Client] = []

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for one in self._clients:
            one.close()

    def client(self, kind: str = "tcp") -> Client:
        """Return a client of a kind at the first endpoint, which takes both."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
        self._clients.append(WebSocketClient(sock) if kind == "ws" else Client(sock))
        return self._clients[-1]

    def ask(self) -> None:
        """Send SIGHUP."""
        os.kill(self.pid, signal.SIGHUP)

    def reload(self) -> None:
        """Reload, and wait until the new program serves."""
        self.ask()
        self.wait_for("Transit reloaded")

    def refused(self) -> str:
        """Ask for a reload that is refused, and return the reason."""
        self.ask()
        line = self.wait_for(REFUSED + ".*").group()
        assert self.process.poll() is None
        return line[len(REFUSED) :]

    def children(self) -> list[str]:
        """Return the process ids of its children."""
        return Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()

    def wait_for_rehearsal(self) -> None:
        """Wait until a rehearsal runs, which may be short."""
        eventually(lambda: self.children() != [], "a rehearsal", poll_seconds=0.01)


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    return Installation(tmp_path)


@pytest.fixture
def relay(installation: Installation) -> Iterator[ReloadingRelay]:
    """Return a relay with a database and JSON lines, and a configuration file."""
    with installation.start("--usage-db", "usage.sqlite") as relay:
        yield relay


def moods(folder: Path) -> list[str]:
    with contextlib.closing(sqlite3.connect(folder / "usage.sqlite")) as db:
        return [row[0] for row in db.execute("SELECT `result` FROM `usage`")]


def test_pairs_waiting_clients_and_beginnings_go_on(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """Ten reloads in a row. Each life has one record."""
    pairs = [relay.meet(*kind, f"pair{n}") for n, kind in enumerate(DIRECTIONS)]
    waiting = [relay.client(kind) for kind in ("tcp", "ws")]
    for n, one in enumerate(waiting):
        one.send(handshake(f"waits{n}"))
    line, head = relay.client("tcp"), relay.client("tcp")
    whole = handshake("half")
    request = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
    for count in range(10):
        line.send_wire(whole[4 * count : 4 * count + 4])
        head.send_wire(request[2 * count : 2 * count + 2])
        for one, _ in pairs:
            one.send(b"before %d" % count)
        relay.reload()
        for one, other in pairs:
            other.send(b"after %d" % count)
            assert other.receive(8) == b"before %d" % count
            assert one.receive(7) == b"after %d" % count
    assert relay.children() == []
    line.send_wire(whole[40:])
    head.send_wire(request[20:])
    assert head.sock.recv(12) == b"HTTP/1.1 200"
    for n, one in enumerate([*waiting, line]):
        partner = relay.client("tcp")
        partner.send(handshake(f"waits{n}" if n < 2 else "half"))
        assert one.receive(3) == partner.receive(3) == b"ok\n"
        partner.close()
        one.close()
    for pair in pairs:
        for one in pair:
            one.close()
    relay.stop_cleanly()
    assert sorted(moods(installation.folder)) == ["happy"] * 7


def test_a_new_configuration_takes_effect(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """An endpoint is added, another one is gone, records go to another database."""
    path = installation.folder / "new.sock"
    one, other = relay.meet("tcp", "ws", "pair")
    old_port = relay.port
    installation.configure(f"port unix:{path}", "max-pair-rate 1MB")
    relay.reload()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", old_port), timeout=TIMEOUT)
    with socket.socket(socket.AF_UNIX) as third, socket.socket(socket.AF_UNIX) as fourth:
        for sock, side in ((third, "a"), (fourth, "b")):
            sock.settimeout(TIMEOUT)
            sock.connect(str(path))
            sock.sendall(handshake("new", side))
        assert receive(third, 3) == receive(fourth, 3) == b"ok\n"
    one.send(b"still here")
    assert other.receive(10) == b"still here"
    relay.stop_cleanly()
    assert not path.exists()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda inst: inst.edit("class Server(Carried):", "class Server(Carried)"), "SyntaxError"),
        (lambda inst: inst.configure("prot 4001"), "line 1: unrecognized arguments"),
        (lambda inst: inst.configure("user nobody:nogroup"), "--user cannot be changed"),
        (lambda inst: inst.configure("pidfile x.pid"), "--pidfile cannot be changed"),
        (lambda inst: inst.configure("daemonize"), "--daemonize cannot be changed"),
        (lambda inst: inst.configure("port unix:no/such/folder/x"), "No such file"),
        (lambda inst: inst.program.unlink(), "No module named 'transit_relay'"),
        (lambda inst: inst.entry.unlink(), "No such file"),
        (lambda inst: inst.edit("STATE_VERSION = 1", "STATE_VERSION = 2"), "version is 1, exp"),
        (
            lambda inst: inst.edit('CARRIED = ("suspended_seconds",)', "CARRIED = ()"),
            "AwakeClock has no suspended_seconds",
        ),
        (
            lambda inst: inst.edit(
                "    print(REHEARSED, *rehearse(", "    print('fine', *rehearse("
            ),
            "fine",
        ),
        (
            lambda inst: inst.edit("def main(", "os.kill(os.getpid(), 9)\n\n\ndef main("),
            "the rehearsal ended with status 9",
        ),
        (
            lambda inst: inst.edit("def main(", "while True: print('x' * 99)\n\n\ndef main("),
            "prints too much",
        ),
    ],
)
def test_a_refused_reload_changes_nothing(
    relay: ReloadingRelay,
    installation: Installation,
    change: Callable[[Installation], object],
    reason: str,
) -> None:
    one, other = relay.meet("tcp", "ws", "pair")
    descriptors = relay.descriptors()
    change(installation)
    assert reason in relay.refused()
    one.send(b"still here")
    assert other.receive(10) == b"still here"
    third, fourth = relay.meet("tcp", "tcp", "new")
    for each in (one, other, third, fourth):
        each.close()
    assert relay.children() == []
    eventually(lambda: relay.descriptors() == descriptors - 2, "the first pair is closed")
    assert relay.stop() == 0
    assert sorted(moods(installation.folder)) == ["happy", "happy"]


def alter(installation: Installation, name: str, value: str) -> None:
    """Change the value of a constant of the program on disk."""
    text = installation.program.read_text()
    changed, times = re.subn(rf"^{name} = \S+", f"{name} = {value}", text, flags=re.M)
    assert times == 1
    installation.program.write_text(changed)
    installation.forget_bytecode()


HANGS = "import time\n\n\ndef main("


def test_a_second_signal_during_a_rehearsal_is_remembered(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """The reload that follows reads the configuration of that moment."""
    one, other = relay.meet()
    relay.ask()
    relay.wait_for_rehearsal()
    path = installation.folder / "second.sock"
    installation.configure("port tcp:0:interface=127.0.0.1", f"port unix:{path}")
    relay.ask()
    relay.wait_for("Transit reloaded.* unix:")
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    one.send(b"data")
    assert other.receive(4) == b"data"
    relay.stop_cleanly()


def test_a_stop_wins_over_a_reload(installation: Installation) -> None:
    with installation.start() as relay:
        one, other = relay.meet()
        installation.edit("def main(", f"{HANGS}*_):\n    time.sleep(100)\n\n\ndef unused(")
        relay.ask()
        relay.wait_for_rehearsal()
        child = Path(f"/proc/{relay.children()[0]}/stat")
        assert relay.stop() == 0
        assert one.read_to_end() == other.read_to_end() == b""
    eventually(
        lambda: not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z",
        "the rehearsal ends",
    )
    assert REFUSED not in relay.stderr.decode()


def test_a_rehearsal_that_hangs_is_killed(installation: Installation) -> None:
    alter(installation, "REHEARSAL_SECONDS", "1")
    with installation.start() as relay:
        one, other = relay.meet()
        installation.edit("def main(", f"{HANGS}*_):\n    time.sleep(100)\n\n\ndef unused(")
        assert relay.refused() == "the rehearsal takes longer than 1 s"
        assert relay.children() == []
        one.send(b"data")
        assert other.receive(4) == b"data"
        assert relay.stop() == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "            os.execve(sys.executable, arguments",
            '            os.execve("/no/such/program", arguments',
            "No such file or directory",
        ),
        (
            "os.memfd_create(PROGRAM) for _ in range(2)",
            'os.open("/no/such/file", 0) for _ in range(2)',
            "No such file or directory",
        ),
        (
            "        state = os.memfd_create(PROGRAM)",
            "        raise MemoryError",
            "out of memory",
        ),
        (
            "limit - len(open_descriptors()) < RESERVED_FDS",
            "limit - len(open_descriptors()) < limit",
            "too few file descriptors are free",
        ),
    ],
)
def test_a_failure_of_the_last_step_changes_nothing(
    installation: Installation, old: str, new: str, reason: str
) -> None:
    """Signals have their effect again, and the records are written."""
    installation.edit(old, new)
    with installation.start("--usage-db", "usage.sqlite") as relay:
        pairs = [relay.meet(*kinds, f"pair{n}") for n, kinds in enumerate(DIRECTIONS)]
        waiting = relay.client()
        waiting.send(handshake("waits"))
        for _ in range(3):
            assert relay.refused() == reason
            for one, other in pairs:
                one.send(b"data")
                assert other.receive(4) == b"data"
        relay.meet(token="new")
        assert relay.stop() == 0
        assert "contained fault" not in relay.stderr.decode()
    assert sorted(moods(installation.folder)) == ["happy"] * 5 + ["lonely"]


def test_a_database_that_is_locked_delays_no_reload(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """The records wait, go along, and are written once."""
    with contextlib.closing(sqlite3.connect(installation.folder / "usage.sqlite")) as db:
        db.execute("BEGIN EXCLUSIVE")
        for n in range(5):
            for one in relay.meet(token=f"pair{n}"):
                one.close()
            relay.reload()
        db.execute("ROLLBACK")
    assert relay.stop() == 0
    assert moods(installation.folder) == ["happy"] * 5


def test_a_database_that_is_gone_from_the_configuration(installation: Installation) -> None:
    """A reload is refused while its records cannot be written."""
    path = installation.folder / "usage.sqlite"
    installation.configure("port tcp:0:interface=127.0.0.1", f"usage-db {path}")
    with installation.start() as relay:
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute("BEGIN EXCLUSIVE")
            for one in relay.meet():
                one.close()
            relay.wait_for("database is locked")
            installation.configure("port tcp:0:interface=127.0.0.1")
            assert "the new configuration has no --usage-db; records wait: 1" in relay.refused()
            db.execute("ROLLBACK")
        relay.wait_for("works again")
        relay.reload()
        assert relay.stop() == 0
    assert moods(installation.folder) == ["happy"]


def test_json_lines_are_whole(installation: Installation) -> None:
    """A line that is half written when the reader stalls is continued by the new program."""
    read_end, write_end = os.pipe()
    os.set_inheritable(write_end, True)
    with open(read_end, "rb") as lines:
        try:
            relay = installation.start("--log-fd", str(write_end), pass_fds=[write_end])
        finally:
            os.close(write_end)
        with relay:
            for n in range(20):
                with relay.client() as junk:
                    junk.send(b"junk\n")
                    assert junk.read_to_end() == b"bad handshake\n"
                if n % 5 == 4:
                    relay.reload()
            relay.stop_cleanly()
        records = [json.loads(line) for line in lines.read().splitlines()]
    assert [record["mood"] for record in records] == ["errory"] * 20


def send_all_that_fits(sender: Client, block: bytes) -> int:
    """Send a block over and over, until nothing more is accepted. Return how many bytes."""
    sender.sock.setblocking(False)
    count = 0
    is_full = False
    while not is_full:
        try:
            count += sender.sock.send(memoryview(block)[count % len(block) :])
        except BlockingIOError:
            is_full = not select.select([], [sender.sock], [], 0.3)[1]
    sender.sock.settimeout(TIMEOUT)
    return count


def test_queued_bytes_go_along(installation: Installation) -> None:
    """Stalled receivers with full pipes and backlogs get all bytes, also after the sender left."""
    block = random.Random(1).randbytes(1 << 20)
    with installation.start() as relay:
        pairs = [relay.meet("tcp", kind, kind) for kind in ("tcp", "ws")]
        sent = [send_all_that_fits(one, block) for one, _ in pairs]
        for _ in range(3):
            relay.reload()
        for (one, other), count in zip(pairs, sent):
            one.close()
            relay.reload()
            got = other.read_to_end()
            assert len(got) == count
            assert digest(got) == digest((block * (count // len(block) + 1))[:count])
        assert relay.stop() == 0


def test_the_state_has_no_classes(tmp_path: Path) -> None:
    """A state that names a class is refused, whatever the class is."""
    import pickle

    fd = os.memfd_create("state")
    with open(fd, "wb", closefd=False) as file:
        pickle.dump(os.getcwd, file, 4)
    with pytest.raises(pickle.UnpicklingError, match="a state has no classes"):
        next(read_state(fd))


def test_sighup_is_ignored_under_nohup(installation: Installation) -> None:
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        relay = installation.start()
    finally:
        signal.signal(signal.SIGHUP, handler)
    with relay:
        status = Path(f"/proc/{relay.pid}/status").read_text()
        ignored = re.search(r"SigIgn:\s+(\w+)", status)
        assert ignored and int(ignored[1], 16) & 1  # SIGHUP is signal 1
        relay.ask()
        one, other = relay.meet()
        one.send(b"data")
        assert other.receive(4) == b"data"
        relay.stop_cleanly()
    assert "reloaded" not in relay.stderr.decode()


def test_a_reload_during_a_drain_is_refused(installation: Installation) -> None:
    with installation.start("--drain", "100") as relay:
        one, other = relay.meet()
        relay.process.send_signal(signal.SIGTERM)
        relay.wait_for("draining")
        assert relay.refused() == "the relay is stopping"
        one.close()
        other.close()
        assert relay.wait() == 0


def test_as_a_module_with_a_pidfile(installation: Installation) -> None:
    """`python3 -m transit_relay`. The lock of the pidfile stays."""
    with ReloadingRelay(
        *("--port", "tcp:0:interface=127.0.0.1", "--pidfile", "pid"),
        program=[sys.executable, "-X", "dev", "-m", "transit_relay"],
        cwd=installation.folder,
    ) as relay:
        relay.started()
        for _ in range(3):
            relay.reload()
        with installation.start("--pidfile", "pid", starts=False) as second:
            assert second.wait() == 1
            assert "a relay is running" in second.stderr.decode()
        relay.stop_cleanly()
    assert not (installation.folder / "pid").exists()


def test_the_name_of_the_process_stays(installation: Installation) -> None:
    """A script that is executed gives the process its name."""
    text = installation.program.read_text()
    installation.program.write_text(text.replace("/usr/bin/env python3", sys.executable, 1))
    installation.program.chmod(0o755)
    with ReloadingRelay(
        *("--port", "tcp:0:interface=127.0.0.1"),
        program=[str(installation.program)],
        cwd=installation.folder,
    ) as relay:
        relay.started()
        comm = Path(f"/proc/{relay.pid}/comm")
        name = comm.read_text()
        relay.reload()
        assert comm.read_text() == name == "transit_relay.p\n"
        relay.stop_cleanly()


def test_in_the_background_as_another_user_with_a_log_file(
    public: Path, installation: Installation
) -> None:
    """Pidfile, log file and unix socket belong to the start as root; the reloads have no root."""
    if os.geteuid() != 0:
        pytest.skip("only root can switch to another user")
    os.chmod(public, 0o777)
    shutil.copy(RELAY, public)
    shutil.copy(WS_FRAMES, public)
    config = public / "relay.conf"
    config.write_text(f"port tcp:0:interface=127.0.0.1\nport unix:{public}/x.sock\n")
    with Daemon(
        public,
        *("--config", str(config), "--port", "tcp:0:interface=127.0.0.1", "--user", NOBODY.pw_name),
        # The user may be unable to execute the Python of the tests, which can be in root's home.
        program=["/usr/bin/python3", str(public / "transit_relay.py")],
    ) as daemon:
        assert daemon.code == 0
        one, other = daemon.pair()
        for count in range(1, 4):
            os.kill(daemon.pid, signal.SIGHUP)
            wait_for_text(daemon.logfile, "Transit reloaded", count)
            one.sendall(b"data")
            assert receive(other, 4) == b"data"
        status = Path(f"/proc/{daemon.pid}/status").read_text()
        assert re.search(r"^Uid:\s+[1-9]", status, re.M)
        limits = Path(f"/proc/{daemon.pid}/limits").read_text()
        assert re.search(r"^Max core file size +0 ", limits, re.M)
        for sock in (one, other):
            sock.close()
        daemon.end()


def wait_for_text(path: Path, text: str, count: int = 1) -> None:
    """Wait until a file has a text so many times."""
    eventually(lambda: path.exists() and path.read_text().count(text) >= count, text)


def test_passed_sockets_stay(installation: Installation) -> None:
    """As under systemd: listeners, notifications and the watchdog. They cannot be given up."""
    folder = installation.folder
    with (
        socket.create_server(("127.0.0.1", 0)) as first,
        socket.create_server(("127.0.0.1", 0)) as second,
        contextlib.closing(Manager(str(folder / "notify"))) as manager,
    ):
        installation.configure("port systemd:index=0", "websocket systemd:index=1")
        command = activated(first, second, program=[sys.executable, str(installation.program)])
        with ReloadingRelay(
            *("--config", str(installation.config)),
            program=command,
            cwd=folder,
            pass_fds=[first.fileno(), second.fileno()],
            env={**os.environ, "NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "100000000"},
        ) as relay:
            relay.wait_for("Transit starting on")
            manager.until("READY=1")
            for _ in range(3):
                relay.reload()
                assert "MONOTONIC_USEC=" in manager.until("RELOADING=1")
                manager.until("READY=1")
                with socket.create_connection(first.getsockname(), timeout=TIMEOUT) as client:
                    client.sendall(b"junk\n")
                    assert receive(client, 14) == b"bad handshake\n"
            installation.configure("port systemd:index=0")
            reason = "a reload cannot close a socket that was passed"
            assert reason in relay.refused()
            assert reason in manager.until("STATUS=reload refused: ")
            _, port = second.getsockname()
            installation.configure("port systemd:index=0", f"port tcp:{port}:interface=127.0.0.1")
            assert "Address already in use" in relay.refused()
            installation.configure("port systemd:index=0", "websocket systemd:index=1")
            relay.reload()
            manager.until("WATCHDOG=1")
            assert relay.stop() == 0


def test_from_one_file(tmp_path: Path) -> None:
    """From a zip archive."""
    archive = tmp_path / "relay.pyz"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(RELAY, "transit_relay.py")
        file.write(WS_FRAMES, "ws_frames.py")
        file.writestr("__main__.py", "import sys, transit_relay\nsys.exit(transit_relay.main())\n")
    with ReloadingRelay(
        *("--port", "tcp:0:interface=127.0.0.1"), program=[sys.executable, str(archive)]
    ) as relay:
        relay.started()
        one, other = relay.meet("tcp", "ws")
        for _ in range(2):
            relay.reload()
        one.send(b"data")
        assert other.receive(4) == b"data"
        archive.rename(tmp_path / "away")
        assert "relay.pyz" in relay.refused()
        one.send(b"data")
        assert other.receive(4) == b"data"
        assert relay.stop() == 0


def test_in_a_terminal_that_closes_sighup_is_a_stop(installation: Installation) -> None:
    ours, its = os.openpty()
    with ReloadingRelay(
        *("--config", str(installation.config), "--logfile", "log"),
        program=[
            *("/bin/sh", "-c", f'exec "$@" </proc/self/fd/{its}', "sh"),
            *(sys.executable, str(installation.program)),
        ],
        cwd=installation.folder,
        pass_fds=[its],
    ) as relay:
        os.close(its)
        log = installation.folder / "log"
        wait_for_text(log, "Transit starting on")
        relay.ask()
        wait_for_text(log, "Transit reloaded")
        os.close(ours)
        relay.ask()
        assert relay.wait() == 0
        assert "SIGHUP: stopping" in log.read_text()


def test_a_reader_of_records_that_has_left(installation: Installation) -> None:
    """The number of its descriptor is not used for a client, and no record goes there."""
    read_end, write_end = os.pipe()
    try:
        relay = installation.start("--log-fd", str(write_end), pass_fds=[write_end])
    finally:
        os.close(write_end)
        os.close(read_end)
    with relay:
        with relay.client() as junk:
            junk.send(b"junk\n")
            assert junk.read_to_end() == b"bad handshake\n"
        relay.wait_for("its reader is gone")
        waiting = [relay.client() for _ in range(3)]
        for n, one in enumerate(waiting):
            one.send(handshake(f"waits{n}"))
        for _ in range(2):
            relay.reload()
            with relay.client() as junk:
                junk.send(b"junk\n")
                assert junk.read_to_end() == b"bad handshake\n"
        for n, one in enumerate(waiting):
            partner = relay.client()
            partner.send(handshake(f"waits{n}"))
            assert one.receive(3) == partner.receive(3) == b"ok\n"
        assert relay.stop() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_in_the_last_step(installation: Installation, number: signal.Signals) -> None:
    """It has its effect before the execution of the program."""
    old = "        with contextlib.ExitStack() as undo:  # if a step fails, or the relay stops"
    kill = f"        if not hasattr(self, 'x'): self.x = os.kill(os.getpid(), {int(number)})\n"
    installation.edit(old, kill + old)
    with installation.start("--logfile", "log", starts=False) as relay:
        log = installation.folder / "log"
        wait_for_text(log, "Transit starting on")
        relay.ask()
        if number is signal.SIGTERM:
            assert relay.wait() == 0
            assert "reload refused" not in log.read_text()
        else:
            wait_for_text(log, "Transit reloaded")
            text = log.read_text()
            assert text.index("log file reopened") < text.index("Transit reloaded")
            assert relay.stop() == 0


def test_the_mode_of_a_unix_socket_changes(installation: Installation) -> None:
    path = installation.folder / "x.sock"
    installation.configure(f"port unix:{path}")
    with installation.start() as relay:
        assert path.stat().st_mode & 0o777 == 0o666
        installation.configure(f"port unix:{path}:mode=600")
        relay.reload()
        assert path.stat().st_mode & 0o777 == 0o600
        path.unlink()
        relay.reload()  # a new socket is made there
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
        relay.stop_cleanly()


def test_endpoints_with_one_address_are_refused(installation: Installation) -> None:
    """The new program would have one socket for two endpoints."""
    with installation.start() as relay:
        port = f"tcp:{relay.port}:interface=127.0.0.1"
        for second in (f"port {port}", f"websocket {port}"):
            installation.configure(f"port {port}", second)
            assert "in use" in relay.refused()
        installation.configure("port tcp:0:interface=127.0.0.1", "port tcp:0:interface=127.0.0.1")
        for _ in range(2):
            relay.reload()
        assert relay.stop() == 0


@pytest.mark.parametrize("kind", ["folder", "fifo", "long"])
def test_a_log_file_that_cannot_be_opened_is_refused(installation: Installation, kind: str) -> None:
    path = installation.folder / ("x" * 300 if kind == "long" else "log")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with installation.start() as relay:
        before = sorted(installation.folder.iterdir())
        installation.configure("port tcp:0:interface=127.0.0.1", f"logfile {path}")
        assert relay.refused().startswith(f"logfile {path}: ")
        installation.configure(
            "port tcp:0:interface=127.0.0.1", "logfile new.log", "port unix:no/x"
        )
        assert "unix:no/x" in relay.refused()
        assert sorted(installation.folder.iterdir()) == before
        assert relay.stop() == 0


def test_a_configuration_that_changes_after_the_rehearsal(installation: Installation) -> None:
    """The new program uses what was rehearsed, or rehearses again."""
    with installation.start() as relay:
        one, other = relay.meet()
        for n in range(6):
            relay.ask()
            relay.wait_for_rehearsal()
            time.sleep(n * 0.05)
            installation.configure("broken")
            text = relay.wait_for("Transit reloaded|reload refused").group()
            installation.configure("port tcp:0:interface=127.0.0.1")
            one.send(text.encode())
            assert other.receive(len(text)) == text.encode()
        relay.reload()
        assert relay.stop() == 0


def test_newcomers_at_an_endpoint_that_is_gone_are_served(installation: Installation) -> None:
    """Those that the kernel has accepted."""
    path = installation.folder / "x.sock"
    with installation.start() as relay, contextlib.ExitStack() as clients:
        installation.configure(f"port unix:{path}")
        address = ("127.0.0.1", relay.port)
        relay.ask()
        answers = []
        while "Transit reloaded" not in relay.read_messages():
            try:
                client = clients.enter_context(socket.create_connection(address, TIMEOUT))
                client.sendall(b"junk\n")
            except OSError:
                break
            answers.append(client)
        eventually(lambda: "Transit reloaded" in relay.read_messages(), "it is reloaded")
        lost: list[object] = []
        for number, client in enumerate(answers):
            try:
                answer = client.recv(14)
            except OSError as error:
                lost.append((number, error))
            else:
                if answer != b"bad handshake\n":
                    lost.append((number, answer))
        # One can come between the last accept and the end of the socket.
        assert len(lost) <= 1, (len(answers), lost[:3], lost[-1:])
        assert relay.stop() == 0


def test_a_sink_that_hangs_refuses_the_reload(installation: Installation) -> None:
    """As on a dead disk. Its record is written in the end, once."""
    alter(installation, "SINK_PAUSE_SECONDS", "1")
    old = "        self._latest = current or self._latest\n"
    installation.edit(old, f"{old}        time.sleep(3 if batch else 0)\n")
    with installation.start("--usage-db", "usage.sqlite") as relay:
        for one in relay.meet():
            one.close()
        one, other = relay.meet(token="second")
        reasons = []
        while not reasons:  # until the thread is in the write
            relay.ask()
            text = relay.wait_for("reload refused: .*|Transit reloaded").group()
            reasons = [text] if text.startswith(REFUSED) else []
        assert reasons == [f"{REFUSED}a write of records takes longer than 1 s"]
        one.send(b"data")
        assert other.receive(4) == b"data"
        assert relay.stop() == 0
    assert moods(installation.folder) == ["happy"] * 2
