"""SIGHUP: the process goes on as the program on disk, with every connection and every record."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import py_compile
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
import zipfile
from collections.abc import Callable, Iterator
from importlib.util import cache_from_source
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import (
    DIRECTIONS,
    RELAY,
    TIMEOUT,
    Client,
    Loop,
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

import transit_relay
from transit_relay import open_endpoint, parse_endpoint, read_state, unacknowledged_bytes

WS_FRAMES = RELAY.with_name("ws_frames.py")
REFUSED = "reload refused: "


class Installation:
    """A copy of the program with a configuration, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.program = folder / "transit_relay.py"
        self.cache = Path(cache_from_source(str(self.program)))
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
        # The cache could be taken for that of a changed file of the same second.
        self.cache.unlink(missing_ok=True)

    def hang(self) -> None:
        """Let the program on disk hang at its start."""
        self.edit("def main(", "def main(*_):\n    signal.pause()\n\n\ndef unused(")

    def start(self, *options: str, starts: bool = True, **others: Any) -> ReloadingRelay:
        """Start the relay. `starts`: it is expected to listen."""
        if not self.cache.exists():  # after `edit`; else each process would compile the program
            py_compile.compile(str(self.program))
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

    def __enter__(self) -> ReloadingRelay:
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        for one in self._clients:
            one.close()

    def client(self, kind: str = "tcp") -> Client:
        """Return a client of a kind at the first endpoint, which takes both."""
        sock = socket.create_connection(("127.0.0.1", self.port), timeout=TIMEOUT)
        self._clients.append(WebSocketClient(sock) if kind == "ws" else Client(sock))
        return self._clients[-1]

    def refuse_junk(self) -> None:
        """Let a client come, be refused and have a record. The loop runs a turn meanwhile."""
        with self.client() as junk:
            junk.send(b"junk\n")
            assert junk.read_to_end() == b"bad handshake\n"

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


def moods(folder: Path, name: str = "usage.sqlite") -> list[str]:
    """Return the results of the records in a database."""
    with contextlib.closing(sqlite3.connect(folder / name)) as db:
        return [row[0] for row in db.execute("SELECT `result` FROM `usage`")]


def pass_on(one: Client, other: Client) -> None:
    """Send something from one client of a pair to the other."""
    one.send(b"data")
    assert other.receive(4) == b"data"


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


def test_a_new_configuration_takes_effect(installation: Installation) -> None:
    """Another endpoint, another database, and a limit that counts the clients from before."""
    local = "port tcp:0:interface=127.0.0.1"
    old, new = (installation.folder / name for name in ("old.sock", "new.sock"))
    installation.configure(local, f"port unix:{old}", "usage-db old.sqlite")
    with installation.start() as relay:
        pair = relay.meet("tcp", "ws", "pair")
        waiting = relay.client()
        waiting.send(handshake("waits"))
        relay.refuse_junk()  # after the handshake was read
        installation.configure(
            *(local, f"port unix:{new}", "usage-db new.sqlite", "max-connections 4")
        )
        relay.reload()
        assert not old.exists()
        pass_on(*pair)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(TIMEOUT)
            sock.connect(str(new))
            partner = Client(sock)
            partner.send(handshake("waits"))
            assert partner.receive(3) == waiting.receive(3) == b"ok\n"
            pass_on(partner, waiting)
            refused = relay.client()
            refused.send(handshake("another"))
            assert refused.read_to_end() == b"relay full\n"
        for one in (*pair, waiting):
            one.close()
        relay.stop_cleanly()
    assert not new.exists()
    assert sorted(moods(installation.folder, "new.sqlite")) == ["empty", "happy", "happy"]
    assert moods(installation.folder, "old.sqlite") == ["errory"]


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
            lambda inst: inst.edit("    print(REHEARSED, rehearse(", "    print('fine', rehearse("),
            "fine",
        ),
        (
            lambda inst: inst.edit("def main(", "os.kill(os.getpid(), 9)\n\n\ndef main("),
            "the rehearsal ended with signal 9",
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
    pass_on(one, other)
    third, fourth = relay.meet("tcp", "tcp", "new")
    for each in (one, other, third, fourth):
        each.close()
    assert relay.children() == []
    eventually(lambda: relay.descriptors() == descriptors - 2, "the first pair is closed")
    assert relay.stop() == 0
    assert sorted(moods(installation.folder)) == ["happy", "happy"]


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
    pass_on(one, other)
    relay.stop_cleanly()


def has_ended(pid: str) -> bool:
    """Return whether a process is gone, or waits for its parent to take its status."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


def test_a_stop_wins_over_a_reload(installation: Installation) -> None:
    with installation.start() as relay:
        one, other = relay.meet()
        installation.hang()
        relay.ask()
        relay.wait_for_rehearsal()
        (child,) = relay.children()
        assert relay.stop() == 0
        assert one.read_to_end() == other.read_to_end() == b""
    eventually(lambda: has_ended(child), "the rehearsal ends")
    assert REFUSED not in relay.stderr.decode()


def test_a_rehearsal_that_hangs_is_killed(installation: Installation) -> None:
    installation.edit("REHEARSAL_SECONDS = 10", "REHEARSAL_SECONDS = 1")
    with installation.start() as relay:
        one, other = relay.meet()
        installation.hang()
        assert relay.refused() == "the rehearsal takes longer than 1 s"
        assert relay.children() == []
        pass_on(one, other)
        assert relay.stop() == 0


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (
            "            os.execve(arguments[0], arguments",
            '            os.execve(b"/no/such/program", arguments',
            "/no/such/program: No such file or directory",
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
            "limit - len(open_descriptors()) < reserved + more",
            "limit - len(open_descriptors()) < limit",
            "too few file descriptors are free",
        ),
    ],
)
def test_a_step_that_fails_changes_nothing(
    installation: Installation, old: str, new: str, reason: str
) -> None:
    """Signals have their effect again, and the records are written."""
    installation.edit(old, new)
    with installation.start("--usage-db", "usage.sqlite") as relay:
        pairs = [relay.meet(*kinds, f"pair{n}") for n, kinds in enumerate(DIRECTIONS)]
        waiting = relay.client()
        waiting.send(handshake("waits"))
        for _ in range(2):
            assert relay.refused().endswith(reason)
            for one, other in pairs:
                pass_on(one, other)
        relay.meet(token="new")
        assert relay.stop() == 0
        assert "contained fault" not in relay.stderr.decode()
    assert sorted(moods(installation.folder)) == ["happy"] * 5 + ["lonely"]


def test_a_web_client_of_the_rehearsal_needs_ws_frames(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """The rehearsal refuses a program without it, although no client uses it yet."""
    one, other = relay.meet()
    (installation.folder / "ws_frames.py").unlink()
    assert relay.refused().startswith("the new program cannot take over all clients: it has no ")
    pass_on(one, other)
    assert relay.stop() == 0


def test_a_class_that_carries_less_is_refused(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """Also if no client of this class is there."""
    installation.edit('    CARRIED = ("_line", "_past_line")', '    CARRIED = ("_line",)')
    assert relay.refused().endswith("it misses a field of RawFraming")
    assert relay.stop() == 0


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["port unix:" + "x" * 108], "longer than 107 bytes"),
        (["port unix:x.sock", "websocket unix:./x.sock"], "this socket is given twice"),
    ],
    ids=["too long", "twice"],
)
def test_a_unix_socket_that_a_start_would_refuse(
    relay: ReloadingRelay, installation: Installation, lines: list[str], reason: str
) -> None:
    installation.configure(*lines)
    assert relay.refused().endswith(reason)
    pass_on(*relay.meet())
    assert relay.stop() == 0


def test_if_no_endpoint_can_be_opened_the_old_ones_stay(installation: Installation) -> None:
    """The rehearsal makes no unix socket, so it does not find all errors."""
    old = "def _listen_unix(endpoint: Endpoint) -> Listener:\n"
    installation.edit(old, old + "    raise OSError(errno.ENOSPC, 'no space')\n")
    with installation.start() as relay:
        one, other = relay.meet()
        installation.configure("port unix:x.sock")
        for _ in range(2):
            relay.reload()
            pass_on(one, other)
        relay.meet(token="new")
        assert relay.stderr.count(b"the reload goes on without this endpoint") == 2
        assert relay.stop() == 0


def test_a_configuration_that_is_no_file_is_refused(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """Reading a pipe could take for ever."""
    installation.config.unlink()
    os.mkfifo(installation.config)
    assert relay.refused() == f"argument --config: {installation.config}: not a regular file"
    pass_on(*relay.meet())
    assert relay.stop() == 0


def test_a_configuration_that_changes_again_and_again(installation: Installation) -> None:
    """The reload is refused after some rehearsals."""
    text = "                yield from self._pause_sinks()\n"
    installation.edit(text, f"                os.utime(self._options.config[0])\n{text}")
    with installation.start() as relay:
        assert relay.refused() == "the program or the configuration changes again and again"
        assert relay.stop() == 0


def test_a_rehearsal_ends_when_the_relay_is_killed(installation: Installation) -> None:
    """It has the sockets of the relay, so the next start would find its address in use."""
    installation.edit("REHEARSAL_SECONDS = 10", "REHEARSAL_SECONDS = 1")
    installation.edit(
        "    predecessor.require_compatible(",
        "    time.sleep(100)\n    predecessor.require_compatible(",
    )
    with installation.start() as relay:
        relay.ask()
        relay.wait_for_rehearsal()
        (child,) = relay.children()
        relay.process.kill()
        relay.process.wait()
        eventually(lambda: has_ended(child), "the rehearsal ends")


def test_a_state_that_cannot_be_used_is_in_the_log(installation: Installation) -> None:
    """A daemon has no stderr after the execution."""
    fails = (
        "def resume_connection(*_):\n    if os.environ.get('x'):\n        raise ValueError('no')\n"
    )
    installation.edit("def resume_connection(", f"{fails}\n\ndef unused(")
    old = "        environment = {**os.environ, **self._variables, STATE_VARIABLE: str(state_fd)}\n"
    last = "        environment |= {'x': 'y'} if hasattr(self, 'y') else {}\n        self.y = 1\n"
    installation.edit(old, old + last)
    installation.configure("port unix:x.sock")
    with installation.start("--logfile", "log", starts=False) as relay:
        log = installation.folder / "log"
        wait_for_text(log, "Transit starting on")
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(installation.folder / "x.sock"))
            relay.ask()
            assert relay.wait() == 1
    assert "error: the reload failed: the state" in log.read_text()


def test_a_database_that_is_locked_delays_no_reload(
    relay: ReloadingRelay, installation: Installation
) -> None:
    """The records wait, go along, and are written once. The log tells when it works again."""
    with contextlib.closing(sqlite3.connect(installation.folder / "usage.sqlite")) as db:
        db.execute("BEGIN EXCLUSIVE")
        for n in range(5):
            for one in relay.meet(token=f"pair{n}"):
                one.close()
            relay.reload()
        db.execute("ROLLBACK")
    assert relay.stop() == 0
    assert moods(installation.folder) == ["happy"] * 5
    messages = relay.stderr.decode()
    failed, reloaded = map(messages.index, ("database is locked", "Transit reloaded"))
    assert failed < reloaded < messages.index("--usage-db: works again")


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


def test_a_json_line_that_is_half_written_goes_on(installation: Installation) -> None:
    """The reader stalls within a line. The new program writes the rest of the line."""
    count = 60
    installation.edit("chunk_bytes = select.PIPE_BUF", "chunk_bytes = 1 << 20")
    reader, writer = socket.socketpair()
    with reader:
        with writer:
            writer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel takes its least
            writer.setblocking(False)  # so a write can be partial
            filler = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    filler += writer.send(b"\n" * 1000)
            fd = writer.fileno()
            relay = installation.start("--log-fd", str(fd), pass_fds=[fd])
        with relay:
            for _ in range(count):
                relay.refuse_junk()
            assert not receive(reader, filler).strip()
            reader.setblocking(False)
            read = bytearray()
            eventually(lambda: ends_within_a_line(reader, read), "a part of a line")
            relay.reload()
            assert not peek(reader).endswith(b"\n")
            reader.settimeout(TIMEOUT)
            while read.count(b"\n") < count:
                read += reader.recv(1 << 16)
            relay.stop_cleanly()
        assert reader.recv(1) == b""
    records = [json.loads(line) for line in read.splitlines()]
    assert [record["mood"] for record in records] == ["errory"] * count


def peek(reader: socket.socket) -> bytes:
    """Return what can be read, and leave it there."""
    return reader.recv(1 << 16, socket.MSG_PEEK)


def ends_within_a_line(reader: socket.socket, read: bytearray) -> bool:
    """Return whether what can be read ends so. If not, move it to `read`: more may come."""
    with contextlib.suppress(BlockingIOError):
        if not peek(reader).endswith(b"\n"):
            return True
        read += reader.recv(1 << 16)
    return False


def test_a_database_in_memory_refuses_every_reload(installation: Installation) -> None:
    """Its content would be lost, also if the new configuration has another database or none."""
    local = "port tcp:0:interface=127.0.0.1"
    installation.configure(local, "usage-db :memory:")
    with installation.start() as relay:
        for line in ("usage-db :memory:", "usage-db usage.sqlite", ""):
            installation.configure(local, line)
            assert "--usage-db :memory: would lose its content" in relay.refused()
        pass_on(*relay.meet())
        assert relay.stop() == 0


def test_a_quota_that_is_lowered_ends_waiting_clients(installation: Installation) -> None:
    """The new program ends them. The rehearsal, which has no sockets of clients, has no fault."""
    old = "            resume_server(relay.server, state, connect)\n"
    installation.edit(old, f"{old}            assert not relay.server.faults.count\n")
    port, database = "port tcp:0:interface=127.0.0.1", "usage-db usage.sqlite"
    installation.configure(port, database, "monthly-quota 1TB")
    with installation.start() as relay:
        pair = relay.meet()
        pass_on(*pair)
        waiting = [relay.client() for _ in range(200)]
        for n, one in enumerate(waiting):
            one.send(handshake(f"waits{n}x"))
        relay.refuse_junk()  # after these handshakes
        installation.configure(port, database, "monthly-quota 1B")
        relay.reload()
        for one in waiting:
            assert one.read_to_end() == b""
        newcomer = relay.client()
        newcomer.send(handshake("new"))
        assert newcomer.read_to_end() == b"quota used up\n"
        pass_on(*pair)
        assert relay.stop() == 0
        assert "fault" not in relay.stderr.decode()


def test_the_bytes_of_a_quota_that_is_removed_are_recorded(installation: Installation) -> None:
    port, database = "port tcp:0:interface=127.0.0.1", "usage-db usage.sqlite"
    installation.configure(port, database, "monthly-quota 1TB")
    with installation.start() as relay:
        pass_on(*relay.meet())
        installation.configure(port, database)
        relay.reload()
        assert relay.stop() == 0
    with contextlib.closing(sqlite3.connect(installation.folder / "usage.sqlite")) as db:
        counted = db.execute("SELECT sum(`bytes`) FROM `quota`").fetchone()
        assert counted == db.execute("SELECT sum(`total_bytes`) FROM `usage`").fetchone() != (0,)


@pytest.mark.parametrize("has_one", [False, True], ids=["added", "changed"])
def test_a_log_fd_that_is_new_is_refused(installation: Installation, has_one: bool) -> None:
    """After the reload its number could be that of a client."""
    local = "port tcp:0:interface=127.0.0.1"
    with open(os.devnull, "wb") as null:
        if has_one:
            installation.configure(local, f"log-fd {null.fileno()}")
        with installation.start(pass_fds=[null.fileno()]) as relay:
            used = {int(name) for name in os.listdir(f"/proc/{relay.pid}/fd")}
            number = min({*range(max(used) + 2)} - used)  # in the rehearsal: that of the state
            installation.configure(local, f"log-fd {number}")
            assert relay.refused() == f"--log-fd={number} cannot be added by a reload"
            pass_on(*relay.meet())
            assert relay.stop() == 0


def test_the_rehearsal_counts_endpoints_that_replace_others(installation: Installation) -> None:
    """The old sockets are closed when the new ones are open."""
    old = "        more, sinks, _ = self._rehearsal_result"
    installation.edit(old, f"{old}\n        log.info('descriptors: %d', more)")
    installation.configure(*(f"port unix:{name}.sock" for name in "abc"))
    with installation.start() as relay:
        installation.configure(*(f"port unix:{name}.sock" for name in "def"))
        relay.ask()
        assert int(relay.wait_for("descriptors: (.*)")[1]) >= 6
        relay.wait_for("Transit reloaded")
        assert relay.stop() == 0


def send_all_that_fits(relay: ReloadingRelay, sender: Client, block: bytes) -> int:
    """Send a block over and over, until the relay takes no more. Return how many bytes."""
    sender.sock.setblocking(False)
    count = 0
    is_full = False
    while not is_full:
        try:
            count += sender.sock.send(memoryview(block)[count % len(block) :])
        except BlockingIOError:
            before = unacknowledged_bytes(sender.sock)
            relay.refuse_junk()  # in this turn the relay would also read from the sender
            is_full = unacknowledged_bytes(sender.sock) == before
    sender.sock.settimeout(TIMEOUT)
    return count


def test_queued_bytes_go_along(installation: Installation) -> None:
    """Stalled receivers with full pipes and backlogs get all bytes, also after the sender left."""
    block = random.Random(1).randbytes(1 << 20)
    with installation.start() as relay:
        pairs = [relay.meet("tcp", kind, kind) for kind in ("tcp", "ws")]
        sent = [send_all_that_fits(relay, one, block) for one, _ in pairs]
        for _ in range(3):
            relay.reload()
        for (one, other), count in zip(pairs, sent):
            one.close()
            relay.reload()
            got = other.read_to_end()
            assert len(got) == count
            assert digest(got) == digest((block * (count // len(block) + 1))[:count])
        assert relay.stop() == 0


def test_the_state_has_no_classes() -> None:
    """A state that names an object of a module is refused."""
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
        pass_on(one, other)
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
    """Pidfile, log file and unix socket belong to the start as root; the reloads have no root.

    Core dumps stay off: they would contain the data of clients.
    """
    if os.geteuid() != 0:
        pytest.skip("only root can switch to another user")
    os.chmod(public, 0o777)
    shutil.copy(RELAY, public)
    shutil.copy(WS_FRAMES, public)
    path, config = public / "x.sock", public / "relay.conf"
    config.write_text("max-connections 100\n")
    # The user may be unable to execute the Python of the tests, which can be in root's home.
    python = ("/usr/bin/python3", str(public / "transit_relay.py"))
    with Daemon(
        public,
        *("--config", str(config), "--port", "tcp:0:interface=127.0.0.1"),
        *("--port", f"unix:{path}", "--user", NOBODY.pw_name),
        program=["/bin/sh", "-c", 'ulimit -c 1000 && exec "$@"', "sh", *python],
    ) as daemon:
        assert daemon.code == 0
        one, other = map(Client, daemon.pair())
        for count in range(4):
            if count:
                os.kill(daemon.pid, signal.SIGHUP)
                wait_for_text(daemon.logfile, "Transit reloaded", count)
            pass_on(one, other)
            limits = Path(f"/proc/{daemon.pid}/limits").read_text()
            assert re.search(r"^Max core file size +0 ", limits, re.M)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))
        assert daemon.status("Uid") == [str(NOBODY.pw_uid)] * 4
        one.close()
        other.close()
        daemon.end()
        assert not path.exists()


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
        pass_on(one, other)
        archive.rename(tmp_path / "away")
        assert "relay.pyz" in relay.refused()
        pass_on(one, other)
        assert relay.stop() == 0


def test_a_second_signal_during_a_reload_is_followed_by_another_reload(
    installation: Installation,
) -> None:
    """Also if it comes after the rehearsal."""
    step = "        with contextlib.ExitStack() as undo:  # if a step fails, or the relay stops"
    once = "os.path.exists('once') or (open('once', 'w').close(), self.request())\n"
    installation.edit(step, f"        {once}{step}")
    with installation.start("--logfile", "log", starts=False) as relay:
        log = installation.folder / "log"
        wait_for_text(log, "Transit starting on")
        relay.ask()
        wait_for_text(log, "Transit reloaded", 2)
        assert relay.stop() == 0
        assert log.read_text().count("Transit reloaded") == 2


def test_a_python_that_does_not_know_its_name(installation: Installation) -> None:
    """It was found by PATH, which is not in its environment."""
    with ReloadingRelay(
        *("--config", str(installation.config)),
        program=[
            *("/bin/bash", "-c", 'unset PATH; exec -a python3 "$@"', "bash"),
            *(sys.executable, str(installation.program)),
        ],
        cwd=installation.folder,
    ) as relay:
        relay.wait_for("Transit starting on")
        relay.reload()
        assert relay.stop() == 0


def test_signals_after_the_end_of_the_loop_are_ignored(installation: Installation) -> None:
    """Python would reset their handlers at its end, and the exit code would be lost."""
    old = '        log.info("stopped")\n'
    handlers = "{signal.getsignal(number) for number in server.signals.actions}"
    installation.edit(old, f'{old}        log.info("%s", {handlers} == {{signal.SIG_IGN}})\n')
    with installation.start() as relay:
        assert relay.stop() == 0
        assert relay.stderr.decode().endswith("stopped\nTrue\n")


class AtTerminal(NamedTuple):
    """A relay that was started at a terminal."""

    relay: ReloadingRelay
    terminal: int  # its other end: when that is closed, the terminal is gone
    log: Path


@pytest.fixture
def at_terminal(
    installation: Installation,
) -> Callable[[], contextlib.AbstractContextManager[AtTerminal]]:
    """Return a function that starts the relay at a terminal, in a `with` block."""

    @contextlib.contextmanager
    def start() -> Iterator[AtTerminal]:
        ours, its = os.openpty()
        with ReloadingRelay(
            *("--config", str(installation.config), "--logfile", "log"),
            program=[
                *("/bin/sh", "-c", f'exec "$@" </proc/self/fd/{its}', "sh"),
                *(sys.executable, "-W", "ignore", str(installation.program)),
            ],
            cwd=installation.folder,
            pass_fds=[its],
        ) as relay:
            os.close(its)
            log = installation.folder / "log"
            wait_for_text(log, "Transit starting on")
            relay.ask()
            yield AtTerminal(relay, ours, log)
            wait_for_text(log, "Transit reloaded")
            relay.ask()
            assert relay.wait() == 0
            assert "SIGHUP: stopping" in log.read_text()

    return start


def test_a_terminal_that_closes_during_a_reload(
    installation: Installation,
    at_terminal: Callable[[], contextlib.AbstractContextManager[AtTerminal]],
) -> None:
    step = "            os.execve(arguments[0], arguments"
    hold = "while open('held', 'w') and not os.path.exists('closed'): time.sleep(0.01)\n"
    installation.edit(step, f"            {hold}{step}")
    with at_terminal() as started:
        eventually((installation.folder / "held").exists, "the execution")
        os.close(started.terminal)
        (installation.folder / "closed").touch()


def test_in_a_terminal_that_closes_sighup_is_a_stop(
    at_terminal: Callable[[], contextlib.AbstractContextManager[AtTerminal]],
) -> None:
    with at_terminal() as started:
        wait_for_text(started.log, "Transit reloaded")
        os.close(started.terminal)


def test_a_reader_of_records_that_has_left(installation: Installation) -> None:
    """The number of its descriptor is not used for a client, and no record goes there."""
    read_end, write_end = os.pipe()
    try:
        relay = installation.start("--log-fd", str(write_end), pass_fds=[write_end])
    finally:
        os.close(write_end)
        os.close(read_end)
    with relay:
        relay.refuse_junk()
        relay.wait_for("its reader is gone")
        waiting = [relay.client() for _ in range(3)]
        for n, one in enumerate(waiting):
            one.send(handshake(f"waits{n}"))
        for _ in range(2):
            relay.reload()
            relay.refuse_junk()
        for n, one in enumerate(waiting):
            partner = relay.client()
            partner.send(handshake(f"waits{n}"))
            assert one.receive(3) == partner.receive(3) == b"ok\n"
        assert relay.stop() == 0
        assert relay.stderr.count(b"its reader is gone") == 1


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
        assert relay.stop() == 0


def test_two_endpoints_with_any_port_have_two(installation: Installation) -> None:
    """They have the same text. After each reload they have the same ports."""
    with installation.start() as relay:
        installation.configure(*["port tcp:0:interface=127.0.0.1"] * 2)
        labels = []
        for _ in range(2):
            relay.ask()
            labels.append(relay.wait_for("Transit reloaded, listening on (.*), (.*)").groups())
        assert len({*labels[0]}) == 2
        assert sorted(labels[0]) == sorted(labels[1])
        assert relay.stop() == 0


@pytest.mark.parametrize("is_paused", [False, True], ids=["a long queue", "a pause"])
def test_all_newcomers_in_a_queue_are_accepted(
    loop: Loop, monkeypatch: pytest.MonkeyPatch, is_paused: bool
) -> None:
    """Those of an endpoint that is gone. No event tells that they are there."""
    monkeypatch.setattr(transit_relay, "ACCEPTS_PER_WAKEUP", 2)
    monkeypatch.setattr(transit_relay, "LISTEN_BACKLOG", 4)
    endpoints = (parse_endpoint(f"tcp:0:interface=127.0.0.1{more}") for more in ("", ":backlog=30"))
    (kept,), (gone,) = map(open_endpoint, endpoints)
    loop.restart(kept)
    if is_paused:
        loop.server._acceptor.pause("for the test")
    count = 4 if is_paused else 30
    with contextlib.ExitStack() as clients:
        socks = [
            clients.enter_context(socket.create_connection(gone.sock.getsockname(), TIMEOUT))
            for _ in range(count)
        ]
        loop.server.accept_rest([gone])
        assert len(loop.server.connections) == count
        for sock in socks:
            sock.sendall(b"junk\n")
        loop.pump()
        assert [receive(sock, 14) for sock in socks] == [b"bad handshake\n"] * count
    assert gone.sock.fileno() < 0


@pytest.mark.parametrize("kind", ["folder", "fifo", "long"])
def test_a_log_file_that_cannot_be_opened_is_refused(installation: Installation, kind: str) -> None:
    path = installation.folder / ("x" * 300 if kind == "long" else "log")
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    with installation.start() as relay:
        installation.configure("port tcp:0:interface=127.0.0.1", f"logfile {path}")
        assert relay.refused().startswith(f"logfile {path}: ")
        assert relay.stop() == 0


def test_a_refused_reload_leaves_no_new_log_file(installation: Installation) -> None:
    with installation.start() as relay:
        before = sorted(installation.folder.iterdir())
        installation.configure(
            "port tcp:0:interface=127.0.0.1", "logfile new.log", "port unix:no/x"
        )
        assert "unix:no/x" in relay.refused()
        assert sorted(installation.folder.iterdir()) == before
        assert relay.stop() == 0


def test_a_configuration_that_changes_after_the_rehearsal(installation: Installation) -> None:
    """It is rehearsed again, or the reload is refused, or the text that was rehearsed is used."""
    steps = {
        "                yield from self._pause_sinks()\n": "line 1: unrecognized arguments",
        "                is_busy = server.doomed": "the configuration has just changed",
        "            os.execve(arguments[0], arguments": "Transit reloaded",
    }
    for number, step in enumerate(steps):
        indent = step[: -len(step.lstrip())]
        change = f"os.path.exists('{number}') and os.replace('{number}', 'relay.conf')\n"
        installation.edit(step, f"{indent}{change}{step}")
    with installation.start() as relay:
        one, other = relay.meet()
        for number, result in enumerate(steps.values()):
            (installation.folder / str(number)).write_text("broken\n")
            relay.ask()
            assert result in relay.wait_for("Transit reloaded|reload refused: .*").group()
            assert installation.config.read_text() == "broken\n"
            pass_on(one, other)
            installation.configure("port tcp:0:interface=127.0.0.1")
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
    installation.edit("SINK_PAUSE_SECONDS = 10", "SINK_PAUSE_SECONDS = 1")
    read_end, write_end = os.pipe()
    old = "        self._latest = current or self._latest\n"
    hang = f"        if batch: log.info('the disk hangs'); os.read({read_end}, 1)\n"
    installation.edit(old, old + hang)
    with open(read_end, "rb"), open(write_end, "wb") as gate:
        with installation.start("--usage-db", "usage.sqlite", pass_fds=[read_end]) as relay:
            relay.refuse_junk()
            one, other = relay.meet()
            relay.wait_for("the disk hangs")
            assert relay.refused() == "a write of records takes longer than 1 s"
            pass_on(one, other)
            gate.close()
            assert relay.stop() == 0
    assert sorted(moods(installation.folder)) == ["errory", "happy"]
