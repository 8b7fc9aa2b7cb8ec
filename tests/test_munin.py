"""The Munin plugin: with usage databases, and with a double of the status listener."""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import importlib.util
import json
import os
import re
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import RELAY, TIMEOUT

from transit_relay import Current, UsageDatabase, UsageRecord, open_usage_database

FOLDER = RELAY.parent / "packaging" / "munin"
FILE = FOLDER / "wormhole_transit_"
loader = SourceFileLoader("wormhole_transit_", str(FILE))
spec = importlib.util.spec_from_loader(loader.name, loader)
assert spec
plugin = importlib.util.module_from_spec(spec)
loader.exec_module(plugin)

GRAPHS = ["active", "bytes", "bytes_alltime", "events", "events_alltime"]
MOODS = ["happy", "errory", "lonely", "redundant", "impatient", "empty"]
STARTED = 1_790_000_000  # when the relay of these tests was started, seconds since the epoch


class Ran(NamedTuple):
    """What one run of the plugin returned and printed."""

    code: int
    out: str
    err: str

    def values(self) -> str:
        """Return the values in their order, without `.value`."""
        assert (self.code, self.err) == (0, ""), self
        return ", ".join(self.out.replace(".value", "").splitlines())

    def reason(self) -> str:
        """Return the reason, which must be the only line."""
        assert (self.code, self.out, self.err.count("\n")) == (1, "", 1), self
        assert self.err.endswith("\n")
        return re.sub(r"^wormhole_transit_\w*: ", "", self.err.strip())


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the plugin in this process: `run(graph, command, status=...)`."""

    def run(graph: str, *arguments: str, **environ: str) -> Ran:
        code = plugin.main(f"wormhole_transit_{graph}", arguments, environ)
        out, err = capsys.readouterr()
        assert not re.search(r"127\.0\.0\.1|::1", out + err), "an address"
        return Ran(code, out, err)

    return run


def all_values(run: Run, **environ: str) -> dict[str, str]:
    """Return the values of each graph."""
    return {graph: run(graph, **environ).values() for graph in GRAPHS}


# What Munin asks for.

BYTES = {"bytes": "Transit Bytes (complete)", "incomplete": "Transit Bytes (incomplete)"}
EVENTS = {mood: mood.capitalize() for mood in MOODS}
CONFIG = {  # title, unit, labels by field
    "active": (
        "Active Channels",
        "Channels",
        {"waiting": "Transit Waiting", "connected": "Transit Connected"},
    ),
    "bytes": ("Usage (since reboot)", "Bytes Since Reboot", BYTES),
    "bytes_alltime": ("Usage (all time)", "Bytes Since DB Creation", BYTES),
    "events": ("Server Events (since reboot)", "Events Since Reboot", EVENTS),
    "events_alltime": ("Server Events (all time)", "Events", EVENTS),
}


@pytest.mark.parametrize("graph", CONFIG)
def test_config(graph: str, run: Run) -> None:
    title, unit, labels = CONFIG[graph]
    expected = [f"graph_title Magic-Wormhole Transit {title}", f"graph_vlabel {unit}"]
    expected.append("graph_category wormhole")
    for field, label in labels.items():
        expected += [f"{field}.label {label}", f"{field}.draw LINE1", f"{field}.type GAUGE"]
    ran = run(graph, "config")  # it needs no source
    assert (ran.code, ran.out.splitlines(), ran.err) == (0, expected, "")


def test_suggest(run: Run) -> None:
    assert run("", "suggest") == (0, "\n".join(GRAPHS) + "\n", "")


def test_magic_markers() -> None:
    text = FILE.read_text(encoding="utf-8")
    markers = re.findall(r"^ +#%# (\w+)=(.*)$", text, re.MULTILINE)
    assert markers == [("family", "auto"), ("capabilities", "autoconf suggest")]


@pytest.mark.parametrize("name", ["", "more", "config"])
def test_a_wrong_name(name: str, run: Run) -> None:
    reason = run(name).reason()
    assert reason == run(name, "config").reason()
    assert reason.endswith(", ".join(f"wormhole_transit_{graph}" for graph in GRAPHS))


def test_the_documentation_has_every_graph() -> None:
    assert plugin.__doc__
    for graph in GRAPHS:
        assert re.search(rf"^  {graph} ", plugin.__doc__, re.MULTILINE)
        assert f"wormhole_transit_{graph}" in plugin.__doc__


def test_the_example_configuration() -> None:
    lines = (FOLDER / "transit-relay.conf").read_text(encoding="utf-8").splitlines()
    in_use = [line for line in lines if line and not line.startswith("#")]
    expected = ["[wormhole_transit_*]", "user nobody", f"env.status {plugin.DEFAULT_STATUS}"]
    assert in_use == expected
    assert "#env.usagedb /var/lib/transit-relay/usage.sqlite" in lines


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_program_under_its_five_names(graph: str, tmp_path: Path) -> None:
    link = tmp_path / f"wormhole_transit_{graph}"
    link.symlink_to(FILE)
    usagedb = str(make_database(tmp_path, usage=[row("happy", size=5)]))
    environ = {**os.environ, "usagedb": usagedb, "PYTHONWARNINGS": "error"}
    for command in [], ["config"]:
        argv = [sys.executable, str(link), *command]
        done = subprocess.run(
            argv, env=environ, capture_output=True, text=True, timeout=4 * TIMEOUT
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert ("graph_title" if command else ".value") in done.stdout
    assert os.access(FILE, os.X_OK)


# The usage database.

Row = tuple[object, ...]


def row(mood: str, size: object = 0, started: float = STARTED + 10.5) -> Row:
    """Return a row of `usage`."""
    return (started, 2.5, 0.5 if mood == "happy" else None, size, mood)


def current_row(
    waiting: object = 0, connected: object = 0, size: object = 0, age_seconds: float = 0
) -> Row:
    """Return a row of `current`."""
    return (STARTED, int(time.time() - age_seconds), connected, waiting, size)


def make_database(
    folder: Path,
    current: Sequence[Row] | None = None,
    usage: Sequence[Row] = (),
    name: str = "usage.sqlite",
) -> Path:
    """Create a database. By default `current` has the row of an idle relay."""
    path = folder / name
    current = [current_row()] if current is None else current
    with contextlib.closing(open_usage_database(str(path))) as db:
        db.execute("BEGIN")
        for table, rows in ("current", current), ("usage", usage):
            db.executemany(f"INSERT INTO `{table}` VALUES (?, ?, ?, ?, ?)", rows)
        db.execute("COMMIT")
    return path


def events(*counts: object) -> str:
    """Return values of the moods, in their order."""
    return ", ".join(f"{mood} {count}" for mood, count in zip(MOODS, counts))


def expect(
    active: tuple[object, object],
    bytes: tuple[object, object],
    bytes_alltime: tuple[object, object],
    events: str,
    events_alltime: str,
) -> dict[str, str]:
    """Return what `all_values` returns."""
    return {
        "active": "waiting {}, connected {}".format(*active),
        "bytes": "bytes {}, incomplete {}".format(*bytes),
        "bytes_alltime": "bytes {}, incomplete {}".format(*bytes_alltime),
        "events": events,
        "events_alltime": events_alltime,
    }


NO_EVENTS = events(0, 0, 0, 0, 0, 0)
UNKNOWN_EVENTS = events(*"UUUUUU")
ALL_MOODS = [
    # Before the relay was started:
    *[row("happy", 1000, STARTED - 5.5), row("happy", 500, STARTED - 0.5)],
    *[row(mood, 0, STARTED - 3.5) for mood in MOODS[1:]],
    # Since then; a blurred time can be that of the start:
    *[row("happy", 10_000, STARTED), row("happy", 20_000), row("happy", 70_000)],
    *[row("errory")] * 4,
    *[row("lonely")] * 5,
    *[row("redundant")] * 6,
    *[row("impatient")] * 7,
    *[row("empty")] * 8,
]
SINCE_START = events(3, 4, 5, 6, 7, 8)
ALL_TIME = events(5, 5, 6, 7, 8, 9)


def test_a_new_database(tmp_path: Path, run: Run) -> None:
    usagedb = str(make_database(tmp_path, current=[]))
    expected = expect(("U", "U"), ("U", "U"), (0, "U"), UNKNOWN_EVENTS, NO_EVENTS)
    assert all_values(run, usagedb=usagedb) == expected


def test_an_idle_relay(tmp_path: Path, run: Run) -> None:
    usagedb = str(make_database(tmp_path))
    expected = expect((0, 0), (0, 0), (0, 0), NO_EVENTS, NO_EVENTS)
    assert all_values(run, usagedb=usagedb) == expected


def test_all_moods(tmp_path: Path, run: Run) -> None:
    usagedb = str(make_database(tmp_path, [current_row(3, 4, 50)], ALL_MOODS))
    expected = expect((3, 4), (100_000, 100_050), (101_500, 101_550), SINCE_START, ALL_TIME)
    assert all_values(run, usagedb=usagedb) == expected


@pytest.mark.parametrize(("age_seconds", "is_old"), [(-3600, False), (301, False), (361, True)])
def test_the_age_of_the_table_current(
    age_seconds: float, is_old: bool, tmp_path: Path, run: Run
) -> None:
    current = current_row(3, 4, 50, age_seconds=age_seconds)
    usagedb = str(make_database(tmp_path, [current], ALL_MOODS))
    if is_old:
        unknown = "U", "U"
        expected = expect(unknown, (100_000, "U"), (101_500, "U"), SINCE_START, ALL_TIME)
    else:
        expected = expect((3, 4), (100_000, 100_050), (101_500, 101_550), SINCE_START, ALL_TIME)
    assert all_values(run, usagedb=usagedb) == expected


def test_big_numbers(tmp_path: Path, run: Run) -> None:
    big = 1 << 61
    usagedb = str(make_database(tmp_path, [current_row(1, 2, big)], [row("happy", big)] * 3))
    count = events(3, 0, 0, 0, 0, 0)
    expected = expect((1, 2), (3 * big, 4 * big), (3 * big, 4 * big), count, count)
    assert all_values(run, usagedb=usagedb) == expected


def test_more_bytes_than_sqlite_can_add(tmp_path: Path, run: Run) -> None:
    usagedb = str(make_database(tmp_path, usage=[row("happy", 1 << 62)] * 2))
    assert run("bytes", usagedb=usagedb).reason() == f"{usagedb}: integer overflow"


def test_null(tmp_path: Path, run: Run) -> None:
    usage = [row("happy", None), row("errory", None), row("happy", 7)]
    usagedb = str(make_database(tmp_path, [current_row(None, None, None)], usage))
    count = events(2, 1, 0, 0, 0, 0)
    expected = expect(("U", "U"), (7, "U"), (7, "U"), count, count)
    assert all_values(run, usagedb=usagedb) == expected


@pytest.mark.parametrize("value", ["text", b"blob"])
@pytest.mark.parametrize("column", ["updated", "waiting", "connected", "incomplete_bytes"])
def test_a_value_of_current_that_is_no_number(
    column: str, value: object, tmp_path: Path, run: Run
) -> None:
    usagedb = str(make_database(tmp_path, usage=[row("happy", 7)]))
    with contextlib.closing(sqlite3.connect(usagedb)) as db:
        db.execute(f"UPDATE `current` SET `{column}` = ?", (value,))
        db.commit()
    assert run("active", usagedb=usagedb).out == "waiting.value U\nconnected.value U\n"
    assert "incomplete.value U\n" in run("bytes", usagedb=usagedb).out


def test_an_unknown_mood(tmp_path: Path, run: Run) -> None:
    """The Twisted relay can write `jilted`. Its bytes count."""
    usage = [row("happy", 7), row("jilted", 3), row("jilted", 3)]
    usagedb = str(make_database(tmp_path, usage=usage))
    count = events(1, 0, 0, 0, 0, 0)
    expected = expect((0, 0), (13, 13), (13, 13), count, count)
    assert all_values(run, usagedb=usagedb) == expected


def test_several_rows_in_the_table_current(tmp_path: Path, run: Run) -> None:
    """The latest counts."""
    old, new = current_row(1, 2, 3, age_seconds=1000), current_row(5, 6, 7)
    for number, rows in enumerate(([old, new], [new, old])):
        usagedb = str(make_database(tmp_path, rows, name=f"{number}.sqlite"))
        assert run("active", usagedb=usagedb).values() == "waiting 5, connected 6"


def test_the_database_of_a_relay(tmp_path: Path, run: Run) -> None:
    usagedb = str(tmp_path / "usage.sqlite")
    database = UsageDatabase(usagedb)
    started = STARTED + 0.5
    records = [UsageRecord(started, 1.0, None, 0, mood) for mood in MOODS[1:]]
    records += [UsageRecord(started, 1.0, 0.5, 300, "happy")] * 2
    database.write(records, Current(STARTED, int(time.time()), 2, 1, 44))
    count = events(2, 1, 1, 1, 1, 1)
    expected = expect((1, 2), (600, 644), (600, 644), count, count)
    assert all_values(run, usagedb=usagedb) == expected
    database.close()
    assert all_values(run, usagedb=usagedb) == expected


def test_a_write_ahead_log(tmp_path: Path, run: Run) -> None:
    """An operator may have set it. The rows are in another file until a checkpoint."""
    path = make_database(tmp_path, [])
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("INSERT INTO `current` VALUES (?, ?, ?, ?, ?)", current_row(8, 6, 4))
        assert run("active", usagedb=str(path)).values() == "waiting 8, connected 6"


@pytest.mark.parametrize("name", ["a b?mode=rwc#%41.sqlite", "ü.sqlite"])
def test_a_path_with_special_characters(
    name: str, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_database(tmp_path, name=name)
    monkeypatch.chdir(tmp_path)
    for usagedb in name, str(tmp_path / name):
        assert run("active", usagedb=usagedb).values() == "waiting 0, connected 0"
    assert os.listdir(tmp_path) == [name]


def test_the_database_is_not_changed(tmp_path: Path, run: Run) -> None:
    path = make_database(tmp_path, usage=ALL_MOODS)
    before = path.read_bytes(), path.stat().st_mtime_ns
    all_values(run, usagedb=str(path))
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_pair_that_ends_between_the_queries(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It counts once: the relay cannot commit before both queries are done."""
    path = make_database(tmp_path, [current_row(0, 2, 50)])
    connect = sqlite3.connect
    refusals = []

    class Interrupted(sqlite3.Connection):
        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            if "FROM `usage`" in sql:
                with contextlib.closing(connect(path, timeout=0)) as relay:
                    relay.execute("INSERT INTO `usage` VALUES (?, ?, ?, ?, ?)", row("happy", 50))
                    with pytest.raises(sqlite3.OperationalError) as refused:
                        relay.commit()
                    refusals.append(str(refused.value))
            return super().execute(sql, *parameters)

    monkeypatch.setattr(sqlite3, "connect", functools.partial(connect, factory=Interrupted))
    assert run("bytes", usagedb=str(path)).values() == "bytes 0, incomplete 50"
    assert refusals == ["database is locked"]


def fails(run: Run, **environ: str) -> str:
    """Run each graph, which must fail. Return the reason, which must be the same for all."""
    (reason,) = {run(graph, **environ).reason() for graph in GRAPHS}
    assert run("", "autoconf", **environ) == (0, f"no ({reason})\n", "")
    return reason


def test_autoconf(tmp_path: Path, run: Run) -> None:
    assert run("", "autoconf", usagedb=str(make_database(tmp_path))) == (0, "yes\n", "")


def test_a_missing_database(tmp_path: Path, run: Run) -> None:
    usagedb = str(tmp_path / "usage.sqlite")
    assert fails(run, usagedb=usagedb) == f"{usagedb}: No such file or directory"
    assert not os.listdir(tmp_path)


def test_a_folder(tmp_path: Path, run: Run) -> None:
    assert fails(run, usagedb=str(tmp_path)) == f"{tmp_path}: Is a directory"


def test_a_database_of_another_user(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usagedb = str(make_database(tmp_path))

    def refuse(path: str, mode: str) -> None:  # root may open every file
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(builtins, "open", refuse)
    assert fails(run, usagedb=usagedb) == f"{usagedb}: Permission denied"


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ("", "no such table: current"),
        ("CREATE TABLE `current` (`rebooted`, `updated`)", "no such column: waiting"),
        ("CREATE TABLE `usage` (`started`)", "no such table: current"),
    ],
)
def test_another_schema(schema: str, reason: str, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "usage.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.executescript(schema)
    path.touch()  # without a table SQLite writes no file
    assert fails(run, usagedb=str(path)) == f"{path}: {reason}"


def test_another_file(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "usage.sqlite"
    path.write_bytes(b"no database" * 1000)
    assert fails(run, usagedb=str(path)) == f"{path}: file is not a database"


def test_a_locked_database(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_database(tmp_path)
    monkeypatch.setattr(plugin, "WAIT_SECONDS", 0.01)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        assert fails(run, usagedb=str(path)) == f"{path}: database is locked"


def test_an_open_transaction(tmp_path: Path, run: Run) -> None:
    """An idle Twisted relay leaves one open. It does not prevent reading."""
    path = make_database(tmp_path)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN IMMEDIATE")
        db.execute("DELETE FROM `current`")
        assert run("active", usagedb=str(path)).values() == "waiting 0, connected 0"


def test_a_python_without_sqlite3(
    tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usagedb = str(make_database(tmp_path))
    monkeypatch.setitem(sys.modules, "sqlite3", None)
    assert fails(run, usagedb=usagedb) == f"{usagedb}: this Python has no module sqlite3"


# The status listener.

STATUS: dict[str, Any] = {  # the parts that matter here, and one that does not
    "version": "0.1",
    "pairs": 2,
    "waiting_clients": 9,
    "waiting_tokens": 3,
    "incomplete_bytes": 50,
    "since_start": {
        "relayed_bytes": 100_050,
        "pairs_ended": 3,
        "outcomes": {
            "happy": {"tcp": 5, "websocket": 1},
            "errory": {"tcp": 4, "websocket": 0},
            "lonely": {"tcp": 2, "websocket": 3},
            "redundant": {"tcp": 6, "websocket": 0},
            "impatient": {"tcp": 0, "websocket": 7},
            "empty": {"tcp": 8, "websocket": 0},
        },
    },
    "alltime": {
        "happy": {"count": 5, "bytes": 101_500},
        "errory": {"count": 5, "bytes": 0},
        "lonely": {"count": 6, "bytes": 0},
        "redundant": {"count": 7, "bytes": 0},
        "impatient": {"count": 8, "bytes": 0},
        "empty": {"count": 9, "bytes": 0},
    },
}


def http(body: str, status: str = "200 OK") -> bytes:
    """Return an answer of the status listener."""
    head = f"HTTP/1.1 {status}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    return (head + body).encode()


def status_answer(**changes: object) -> bytes:
    return http(json.dumps({**STATUS, **changes}))


class StatusListener:
    """A double: it gives every client the same answer. None: it never answers."""

    def __init__(self, answer: bytes | None, path: Path | None = None) -> None:
        """`path`: of a unix socket; else a port of the loopback."""
        self._answer = answer
        self._thread = threading.Thread(target=self._serve)
        self.requests: list[bytes] = []
        if path:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(path))
            self._listener.listen()
            self.source = f"unix:{path}"
        else:
            self._listener = socket.create_server(("127.0.0.1", 0))
            self.source = f"http://127.0.0.1:{self._listener.getsockname()[1]}/"

    def __enter__(self) -> StatusListener:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() returns
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()
        self._listener.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                with client:
                    self._answer_one(client)

    def _answer_one(self, client: socket.socket) -> None:
        client.settimeout(TIMEOUT)
        request = b""
        while not request.endswith(b"\r\n\r\n"):
            request += client.recv(1 << 16)
        self.requests.append(request)
        if self._answer is None:
            client.recv(1)  # until the plugin leaves
        else:
            client.sendall(self._answer)


Listen = Callable[..., StatusListener]


@pytest.fixture(params=["tcp", "unix"])
def listen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Listen]:
    """Return a function that starts a double of the status listener: `listen(answer)`."""
    with contextlib.ExitStack() as stack:

        def listen(answer: bytes | None) -> StatusListener:
            path = tmp_path / "status.sock" if request.param == "unix" else None
            return stack.enter_context(StatusListener(answer, path))

        yield listen


def test_status(listen: Listen, run: Run) -> None:
    """The double has the numbers of the database with all moods."""
    listener = listen(status_answer())
    expected = expect((3, 4), (100_000, 100_050), (101_500, 101_550), SINCE_START, ALL_TIME)
    assert all_values(run, status=listener.source) == expected
    assert run("", "autoconf", status=listener.source) == (0, "yes\n", "")
    for request in listener.requests:
        assert request.startswith(b"GET /status.json HTTP/1.1\r\nHost: ")


def test_status_of_an_idle_relay(listen: Listen, run: Run) -> None:
    outcomes = {mood: {"tcp": 0, "websocket": 0} for mood in MOODS}
    listener = listen(
        status_answer(
            pairs=0,
            waiting_tokens=0,
            incomplete_bytes=0,
            since_start={"relayed_bytes": 0, "pairs_ended": 0, "outcomes": outcomes},
            alltime={mood: {"count": 0, "bytes": 0} for mood in MOODS},
        )
    )
    expected = expect((0, 0), (0, 0), (0, 0), NO_EVENTS, NO_EVENTS)
    assert all_values(run, status=listener.source) == expected


def test_status_without_a_database(listen: Listen, run: Run) -> None:
    """The relay has none, or has not read it yet."""
    listener = listen(status_answer(alltime=None))
    expected = expect((3, 4), (100_000, 100_050), ("U", "U"), SINCE_START, UNKNOWN_EVENTS)
    assert all_values(run, status=listener.source) == expected


OTHER = "not the status listener of a transit relay"


def named(source: str, reason: str) -> str:
    """Return the message for a source. It has the path of a unix socket, but no address."""
    return f"{source if source.startswith('unix:') else 'env.status'}: {reason}"


@pytest.mark.parametrize(
    "answer",
    [
        http("no such page\n", "404 Not Found"),
        http(""),
        http("{}"),
        http("[]"),
        http("null"),
        status_answer(incomplete_bytes=None, alltime=[]),
        status_answer(since_start=None, alltime={"happy": 5}),
        http("\xff"),
        b"bad handshake\n",
        b"\xff" * 1000,
        b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{}",
    ],
)
def test_another_server(answer: bytes, listen: Listen, run: Run) -> None:
    source = listen(answer).source
    for graph in "bytes", "bytes_alltime", "events_alltime":
        assert run(graph, status=source).reason() == named(source, OTHER)


def test_a_server_that_closes_the_connection(listen: Listen, run: Run) -> None:
    source = listen(b"").source
    reason = "Remote end closed connection without response"
    assert fails(run, status=source) == named(source, reason)


def test_a_server_that_does_not_answer(
    listen: Listen, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = listen(None).source
    monkeypatch.setattr(plugin, "WAIT_SECONDS", 0.05)
    assert fails(run, status=source) == named(source, "timed out")


def test_no_server(tmp_path: Path, run: Run) -> None:
    with StatusListener(b"") as tcp, StatusListener(b"", tmp_path / "status.sock") as unix:
        pass
    for source in tcp.source, unix.source:
        assert fails(run, status=source) == named(source, "Connection refused")
    missing = f"unix:{tmp_path}/missing.sock"
    assert fails(run, status=missing) == f"{missing}: No such file or directory"


@pytest.mark.parametrize(
    "source",
    [
        "127.0.0.1:8001",
        "127.0.0.1",
        "tcp:8001:interface=127.0.0.1",
        "https://127.0.0.1/",
        "http://127.0.0.1:port/",
        "http://127.0.0.1:80000/",
        "http://[::1/",
        "http://",
    ],
)
def test_a_wrong_source(source: str, run: Run) -> None:
    assert fails(run, status=source) == f"env.status: {OTHER}"


def test_a_path_that_is_too_long(run: Run) -> None:
    source = f"unix:/{'x' * 200}"
    assert fails(run, status=source) == f"{source}: AF_UNIX path too long"


def test_which_source_is_read(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    usagedb = str(make_database(tmp_path))
    asked = StatusListener(status_answer(waiting_tokens=11), tmp_path / "asked.sock")
    default = StatusListener(status_answer(waiting_tokens=22), tmp_path / "default.sock")
    monkeypatch.setattr(plugin, "DEFAULT_STATUS", default.source)
    with asked, default:
        for environ, waiting in [
            ({}, 22),
            ({"status": "", "usagedb": ""}, 22),
            ({"status": asked.source}, 11),
            ({"status": asked.source, "usagedb": usagedb}, 11),
            ({"usagedb": usagedb}, 0),
            ({"status": "", "usagedb": usagedb}, 0),
        ]:
            assert run("active", **environ).values().startswith(f"waiting {waiting},")


def test_the_default_source_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plugin.DEFAULT_STATUS == "unix:/run/transit-relay/status.sock"
    monkeypatch.setattr(plugin, "DEFAULT_STATUS", "unix:/nonexistent/status.sock")
    assert fails(run) == "unix:/nonexistent/status.sock: No such file or directory"
