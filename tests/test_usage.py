"""Usage records: blurring, the queue of a sink, JSON lines, the usage database."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
from helpers import RELAY, TIMEOUT, FakeClock, RelayProcess

import transit_relay
from transit_relay import (
    TRANSIENT_ERRORS,
    Current,
    JsonLines,
    Recorder,
    Sink,
    SinkError,
    StartupError,
    UsageDatabase,
    UsageRecord,
    blur_size,
    result_code,
)

STARTED = 1_795_348_683.25
RECORD = UsageRecord(STARTED, 12.5, 3.25, 1_234_567, "happy")
LONELY = UsageRecord(STARTED, 12.5, None, 0, "lonely")
CURRENT = Current(1_795_000_000, 1_795_348_680, 4, 3, 123_456)

F_SETPIPE_SZ = 1031  # Linux; the module fcntl has it from Python 3.10 on

# The reference's schema, version 1, as its 0.5.0 has it in db-schemas/v1.sql.
REFERENCE_SCHEMA = """
CREATE TABLE `version` (`version` INTEGER);
CREATE TABLE `current` (
    `rebooted` INTEGER,
    `updated` INTEGER,
    `connected` INTEGER,
    `waiting` INTEGER,
    `incomplete_bytes` INTEGER
);
CREATE TABLE `usage` (
    `started` INTEGER,
    `total_time` INTEGER,
    `waiting_time` INTEGER,
    `total_bytes` INTEGER,
    `result` VARCHAR
);
CREATE INDEX `usage_started_index` ON `usage` (`started`);
CREATE INDEX `usage_result_index` ON `usage` (`result`);
"""


class Messages(logging.Handler):
    """Collects the log messages of all threads."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[str] = []
        self._unread: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        self.all.append(text)
        self._unread.put(text)

    def wait_for(self, words: str) -> None:
        """Wait for a message that contains these words."""
        while words not in self._unread.get(timeout=TIMEOUT):
            pass


@pytest.fixture
def messages() -> Iterator[Messages]:
    handler = Messages()
    before = transit_relay.log.level
    transit_relay.log.addHandler(handler)
    transit_relay.log.setLevel(logging.INFO)
    yield handler
    transit_relay.log.setLevel(before)
    transit_relay.log.removeHandler(handler)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten all pauses, and the wait for a lock."""
    monkeypatch.setattr(transit_relay, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(transit_relay, "SINK_WAIT_SECONDS", 0.01)
    monkeypatch.setattr(transit_relay, "STOP_POLL_SECONDS", 0.01)
    monkeypatch.setattr(UsageDatabase, "gather_seconds", 0.0)


@pytest.fixture
def start() -> Iterator[Callable[..., Recorder]]:
    """Return a function that starts a Recorder. The sinks end with the test."""
    started: list[Sink] = []

    def start(*sinks: Sink, blur_seconds: int = 0) -> Recorder:
        recorder = Recorder(sinks, blur_seconds)
        recorder.start()
        started.extend(sinks)
        return recorder

    yield start
    for sink in started:
        end(sink)


def end(*sinks: Sink) -> None:
    """Stop these sinks and wait until their records are written."""
    for sink in sinks:
        sink.stop()
        sink.join(TIMEOUT)
        assert sink.finished, f"{sink.name} does not end, {sink.status().waiting} records wait"


def numbered(count: int, first: int = 0) -> list[UsageRecord]:
    """Return records with the sizes `first`, `first` + 1, and so on."""
    return [RECORD._replace(total_bytes=first + n) for n in range(count)]


# Blurring


@pytest.mark.parametrize(
    ("size", "blurred"),
    [
        (0, 0),
        (1, 0),
        (999, 0),
        (1_000, 1_000),
        (1_999, 1_000),
        (999_999, 999_000),
        (10**6, 10**6),
        (1_999_999, 10**6),
        (10**9 - 1, 999 * 10**6),
        (10**9, 10**9),
        (10**9 + 99_999_999, 10**9),
        (10**9 + 10**8, 11 * 10**8),
        (123_456_789_012_345, 123_456_700_000_000),
        (2**63 - 1, 92_233_720_368 * 10**8),
    ],
)
def test_size_is_rounded_down(size: int, blurred: int) -> None:
    assert blur_size(size) == blurred


@pytest.mark.parametrize(
    ("seconds", "started"),
    [(1, 1_795_348_683), (60, 1_795_348_680), (3600, 1_795_345_200), (86400, 1_795_305_600)],
)
def test_start_is_rounded_down_to_a_multiple(seconds: int, started: int) -> None:
    blurred = RECORD.blurred(seconds)
    assert blurred == RECORD._replace(started=started, total_bytes=1_000_000)
    assert started % seconds == 0
    assert repr(blurred.started) == f"{started}.0"


@pytest.mark.parametrize(("seconds", "started"), [(0, STARTED), (60, 1_795_348_680)])
def test_all_sinks_receive_blurred_records(
    start: Callable[..., Recorder], tmp_path: Path, seconds: int, started: float
) -> None:
    database, lines = opened(tmp_path / "db"), json_file(tmp_path / "log")
    recorder = start(database, lines, blur_seconds=seconds)
    recorder.record(RECORD)
    end(database, lines)
    size = 1_000_000 if seconds else 1_234_567
    assert rows(tmp_path / "db", "usage") == [(started, 12.5, 3.25, size, "happy")]
    assert json.loads((tmp_path / "log").read_text())["started"] == started
    assert json.loads((tmp_path / "log").read_text())["total_bytes"] == size


def test_current_is_not_blurred(start: Callable[..., Recorder], tmp_path: Path) -> None:
    database = opened(tmp_path / "db")
    start(database, blur_seconds=3600).update(CURRENT)
    end(database)
    assert rows(tmp_path / "db", "current") == [tuple(CURRENT)]


# The queue before a sink


class GatedSink(Sink):
    """A sink whose writes fail until its gate is open."""

    def __init__(self, records_limit: int = 100) -> None:
        super().__init__("gated", records_limit)
        self.gate = threading.Event()
        self.tried = threading.Semaphore(0)
        self.written: list[UsageRecord] = []

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        self.tried.release()
        if not self.gate.is_set():
            raise SinkError("shut")
        self.written += batch
        return len(batch)

    def wait_for_tries(self, count: int) -> None:
        """Wait for `count` writes that begin from now on. All but the last have ended then."""
        while self.tried.acquire(blocking=False):
            pass
        for _ in range(count):
            assert self.tried.acquire(timeout=TIMEOUT)


@pytest.fixture
def gated(start: Callable[..., Recorder]) -> Iterator[GatedSink]:
    """Return a sink with room for 100 records."""
    sink = GatedSink()
    yield sink
    sink.gate.set()


def test_the_queue_is_bounded_and_counts_dropped_records(
    gated: GatedSink, start: Callable[..., Recorder], messages: Messages
) -> None:
    recorder = start(gated)
    for record in numbered(103):
        recorder.record(record)
    assert gated.status().waiting == 100
    recorder.report_dropped(1_000.0)
    assert "warning: 3 usage records dropped" in messages.all
    gated.gate.set()
    end(gated)
    assert gated.written == numbered(100)


def test_records_of_a_failed_write_count_for_the_bound(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    recorder = start(gated)
    for record in numbered(60):
        recorder.record(record)
    gated.wait_for_tries(2)  # the first ones have left the queue
    for record in numbered(60, first=60):
        recorder.record(record)
    assert (gated.status().waiting, recorder.lost()) == (100, 120)


def test_written_records_make_room(
    gated: GatedSink, start: Callable[..., Recorder], messages: Messages
) -> None:
    recorder = start(gated)
    for record in numbered(101):
        recorder.record(record)
    gated.wait_for_tries(2)
    gated.gate.set()
    messages.wait_for("gated: works again")
    recorder.record(LONELY)
    end(gated)
    assert gated.written == [*numbered(100), LONELY]


def test_dropped_records_are_logged_once_a_minute_with_their_sum(
    gated: GatedSink, start: Callable[..., Recorder], messages: Messages
) -> None:
    recorder = start(gated)
    logged = []
    for now, count in [(1000.0, 101), (1001.0, 2), (1059.9, 3), (1060.0, 4), (1200.0, 0)]:
        for record in numbered(count):
            recorder.record(record)
        recorder.report_dropped(now)
        logged.append([text for text in messages.all if "dropped" in text])
    first, second = (f"warning: {count} usage records dropped" for count in (1, 9))
    assert logged == [[first], [first], [first], [first, second], [first, second]]


def test_a_failing_sink_is_logged_once_a_minute(
    gated: GatedSink,
    start: Callable[..., Recorder],
    messages: Messages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(5_000.0)
    monkeypatch.setattr(transit_relay, "time", SimpleNamespace(monotonic=clock))
    start(gated).record(RECORD)
    counts = []
    for seconds in (0.0, 59.9, 0.1, 59.9, 0.1):
        clock.advance(seconds)
        gated.wait_for_tries(3)
        counts.append(len(messages.all))
    assert counts == [1, 1, 2, 2, 3]
    assert set(messages.all) == {"warning: gated: shut; 1 records wait"}


def test_unwritten_and_dropped_records_are_lost(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    recorder = start(gated)
    for record in numbered(107):
        recorder.record(record)
    recorder.stop()
    gated.wait_for_tries(3)
    assert not recorder.finished
    assert recorder.lost() == 107  # 100 unwritten, 7 dropped


def test_a_recorder_starts_its_threads_only_when_asked(gated: GatedSink) -> None:
    recorder = Recorder([gated])
    recorder.record(RECORD)
    assert not gated.is_alive() and not recorder.finished
    recorder.start()
    gated.gate.set()
    end(gated)
    assert gated.written == [RECORD]


def test_a_thread_that_cannot_start_refuses_the_start(
    gated: GatedSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    recorder = Recorder([gated])
    with pytest.raises(StartupError, match="can't start new thread"):
        recorder.start()
    # After a reload the relay goes on without it.
    recorder.record(RECORD)
    assert recorder.status()[gated.name].is_failing and recorder.lost() == 1
    recorder.set_pausing(True)
    assert recorder.is_paused
    recorder.stop()
    recorder.join(TIMEOUT)
    assert recorder.finished


def test_a_stop_writes_everything(gated: GatedSink, start: Callable[..., Recorder]) -> None:
    gated.gate.set()
    recorder = start(gated)
    for record in numbered(99):
        recorder.record(record)
    recorder.stop()
    gated.join(TIMEOUT)
    assert recorder.finished and recorder.lost() == 0
    assert gated.written == numbered(99)


def test_dropped_records_are_lost_even_if_they_were_logged(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    recorder = start(gated)
    for record in numbered(103):
        recorder.record(record)
    recorder.report_dropped(1_000.0)
    gated.gate.set()
    end(gated)
    assert recorder.lost() == 3


def test_join_waits_for_all_queued_records(start: Callable[..., Recorder]) -> None:
    sinks = GatedSink(), GatedSink()
    recorder = start(*sinks)
    for sink in sinks:
        sink.gate.set()
    recorder.record(RECORD)
    recorder.stop()
    recorder.join(TIMEOUT)
    assert recorder.finished and [sink.written for sink in sinks] == [[RECORD], [RECORD]]


def test_a_failing_sink_does_not_delay_another(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    other = GatedSink()
    other.gate.set()
    recorder = start(gated, other)
    recorder.record(RECORD)
    end(other)
    assert (other.written, gated.written, recorder.lost()) == ([RECORD], [], 1)


def test_records_wait_while_memory_is_short(
    start: Callable[..., Recorder], messages: Messages
) -> None:
    class ShortOfMemory(GatedSink):
        def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
            try:
                return super().write(batch, current)
            except SinkError:
                raise MemoryError from None

    sink = ShortOfMemory()
    start(sink).record(RECORD)
    messages.wait_for("warning: gated: out of memory; 1 records wait")
    sink.gate.set()
    end(sink)
    assert sink.written == [RECORD]


# The fields of each class that a reload does not carry: the new program makes them.
NOT_CARRIED = {
    *("_records_limit", "_changed", "_stopping", "finished"),
    *("_pausing", "_may_write_again", "_writing"),
    "_has_reader",
    *("_fd", "_path", "_db", "_file", "_sqlite_error", "_quota", "_has_totals", "totals"),
    *("_sinks", "_blur_seconds"),
}


@pytest.mark.parametrize(
    "make",
    [lambda: JsonLines(-1), lambda: UsageDatabase("db"), Recorder],
    ids=["JSON lines", "database", "recorder"],
)
def test_each_field_is_carried_or_made_anew(make: Callable[[], JsonLines]) -> None:
    made = make()
    carried = set(made.CARRIED)
    assert not carried & NOT_CARRIED and len(carried) == len(made.CARRIED)
    fields = set(vars(made)) - set(vars(threading.Thread()))
    assert carried <= fields <= carried | NOT_CARRIED


def test_an_unexpected_error_ends_a_sink_and_its_records_are_lost(
    start: Callable[..., Recorder], messages: Messages
) -> None:
    class FaultySink(GatedSink):
        def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
            raise ZeroDivisionError

    faulty, other = FaultySink(), GatedSink()
    other.gate.set()
    recorder = start(faulty, other)
    recorder.record(RECORD)
    faulty.join(TIMEOUT)
    end(other)
    assert [text[:13] for text in messages.all] == ["error: gated:"]
    assert faulty.finished and recorder.lost() == 1
    assert other.written == [RECORD]


# JSON lines


def json_file(path: Path) -> JsonLines:
    """Return a sink that writes to this file."""
    return JsonLines(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


@pytest.fixture
def pipe() -> Iterator[tuple[int, JsonLines]]:
    """Return the reading end of a pipe of 64 KiB, and a sink that writes to the pipe."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 1 << 16)
    yield reader, JsonLines(writer)
    with contextlib.suppress(OSError):
        os.close(reader)


def read_lines(reader: int) -> list[bytes]:
    """Return all lines up to the end."""
    with open(reader, "rb") as file:
        return file.readlines()


def lines_of(records: Sequence[UsageRecord]) -> list[bytes]:
    """Return the JSON lines of records from `numbered`."""
    return [
        b'{"started": 1795348683.25, "total_time": 12.5, "waiting_time": 3.25,'
        b' "total_bytes": %d, "mood": "happy"}\n' % record.total_bytes
        for record in records
    ]


@pytest.mark.parametrize(
    ("record", "line"),
    [
        pytest.param(
            RECORD,
            b'{"started": 1795348683.25, "total_time": 12.5, "waiting_time": 3.25,'
            b' "total_bytes": 1234567, "mood": "happy"}\n',
            id="pair",
        ),
        pytest.param(
            LONELY,
            b'{"started": 1795348683.25, "total_time": 12.5, "waiting_time": null,'
            b' "total_bytes": 0, "mood": "lonely"}\n',
            id="single",
        ),
        pytest.param(
            RECORD.blurred(60),
            b'{"started": 1795348680.0, "total_time": 12.5, "waiting_time": 3.25,'
            b' "total_bytes": 1000000, "mood": "happy"}\n',
            id="blurred",
        ),
    ],
)
def test_a_line_byte_for_byte(
    start: Callable[..., Recorder], tmp_path: Path, record: UsageRecord, line: bytes
) -> None:
    sink = json_file(tmp_path / "log")
    start(sink).record(record)
    end(sink)
    assert (tmp_path / "log").read_bytes() == line


def test_a_line_is_written_at_once(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines]
) -> None:
    """A line does not wait for a full buffer or for the end of the relay."""
    reader, sink = pipe
    recorder = start(sink)
    for record in numbered(3):
        recorder.record(record)
        assert os.read(reader, 4096) == lines_of([record])[0]


def test_current_is_not_written_as_a_line(start: Callable[..., Recorder], tmp_path: Path) -> None:
    sink = json_file(tmp_path / "log")
    start(sink).update(CURRENT)
    end(sink)
    assert (tmp_path / "log").read_bytes() == b""


def test_lines_wait_for_a_stalled_reader(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines]
) -> None:
    reader, sink = pipe
    recorder = start(sink)
    records = numbered(5_000)
    for record in records:
        recorder.record(record)
    room = 65_536 // len(lines_of(records[:1])[0])
    assert sink.status().waiting > 5_000 - room - 50  # a chunk counts once it is complete
    recorder.stop()
    assert read_lines(reader) == lines_of(records)
    end(sink)
    assert recorder.lost() == 0


def test_a_reader_of_a_full_pipe_finds_whole_lines(pipe: tuple[int, JsonLines]) -> None:
    """This holds even if the relay is killed at this point."""
    reader, sink = pipe
    os.set_blocking(sink._fd, False)  # a partial write would block otherwise
    records = numbered(2_000)
    while count := sink.write(records, None):
        del records[:count]
    assert os.read(reader, 1 << 17).endswith(b"}\n")
    sink.close()


@pytest.mark.parametrize("raced", [False, True], ids=["alone", "with another writer"])
def test_partial_writes_lose_and_repeat_nothing(
    start: Callable[..., Recorder],
    pipe: tuple[int, JsonLines],
    messages: Messages,
    monkeypatch: pytest.MonkeyPatch,
    raced: bool,
) -> None:
    """The chunk is larger than the pipe, and the descriptor is non-blocking."""
    reader, sink = pipe
    monkeypatch.setattr(sink, "chunk_bytes", 200_000)
    if raced:  # the other writer fills the pipe between poll and write
        monkeypatch.setattr(transit_relay, "takes_bytes", lambda *_: True)
    os.set_blocking(sink._fd, False)
    recorder = start(sink)
    records = numbered(5_000)
    for record in records:
        recorder.record(record)
    recorder.stop()
    assert read_lines(reader) == lines_of(records)
    end(sink)
    assert recorder.lost() == 0 and messages.all == []


def test_a_reader_that_is_gone_is_logged_once(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines], messages: Messages
) -> None:
    reader, sink = pipe
    recorder = start(sink)
    os.close(reader)
    recorder.record(RECORD)
    sink.join(TIMEOUT)
    assert sink.finished
    for record in numbered(10):
        recorder.record(record)
    recorder.report_dropped(1_000.0)
    assert messages.all == ["warning: --log-fd: its reader is gone; no more records go there"]
    assert recorder.lost() == 0  # no reader is left for them


def test_a_closed_terminal_counts_as_a_reader_that_is_gone(
    start: Callable[..., Recorder], messages: Messages
) -> None:
    terminal, fd = os.openpty()
    sink = JsonLines(fd)
    os.close(terminal)
    recorder = start(sink)
    recorder.record(RECORD)
    sink.join(TIMEOUT)
    assert messages.all == ["warning: --log-fd: its reader is gone; no more records go there"]
    assert recorder.lost() == 0


def test_a_reader_that_leaves_while_lines_wait(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines], messages: Messages
) -> None:
    reader, sink = pipe
    recorder = start(sink)
    for record in numbered(5_000):
        recorder.record(record)
    assert os.read(reader, 4096)
    os.close(reader)
    sink.join(TIMEOUT)
    assert sink.finished and recorder.lost() == 0
    assert len(messages.all) == 1


def test_the_database_continues_without_the_reader(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines], tmp_path: Path
) -> None:
    reader, lines = pipe
    database = opened(tmp_path / "db")
    recorder = start(lines, database)
    os.close(reader)
    recorder.record(RECORD)
    lines.join(TIMEOUT)
    recorder.record(LONELY)
    end(database)
    assert [row[4] for row in rows(tmp_path / "db", "usage")] == ["happy", "lonely"]


def test_lines_wait_while_the_disk_is_full(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages
) -> None:
    sink = json_file(Path("/dev/full"))
    recorder = start(sink)
    records = numbered(100)
    for record in records:
        recorder.record(record)
    messages.wait_for("No space left on device")
    assert recorder.lost() == 100
    with (tmp_path / "log").open("wb") as file:
        os.dup2(file.fileno(), sink._fd)
    end(sink)
    assert (tmp_path / "log").read_bytes() == b"".join(lines_of(records))


# The usage database: creation, take-over, refusals


@contextlib.contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """Open a database as another program does."""
    db = sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def rows(path: Path, table: str) -> list[tuple[object, ...]]:
    """Return all rows of a table, in their order."""
    with connect(path) as db:
        return list(db.execute(f"SELECT * FROM `{table}` ORDER BY rowid"))


def execute(path: Path, script: str) -> None:
    """Run SQL on the database, which is created if it is missing."""
    with connect(path) as db:
        db.executescript(script)


def reference_database(path: Path, more: str = "") -> Path:
    """Create a database of the reference relay with one row in `usage` and in `current`."""
    execute(
        path,
        REFERENCE_SCHEMA
        + "INSERT INTO `version` VALUES (1);"
        + "INSERT INTO `current` VALUES (1, 2, 3, 4, 5);"
        + "INSERT INTO `usage` VALUES (1600000000, 2.5, NULL, 0, 'lonely');"
        + more,
    )
    return path


def opened(path: Path) -> UsageDatabase:
    """Return a sink that has opened, or created, its database."""
    sink = UsageDatabase(str(path))
    sink.prepare()
    return sink


class WatchedDatabase(UsageDatabase):
    """A usage database that counts its writes."""

    def __init__(self, path: Path) -> None:
        self.tried = threading.Semaphore(0)
        super().__init__(str(path))
        self.prepare()

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        try:
            return super().write(batch, current)
        finally:
            self.tried.release()

    def wait_for_tries(self, count: int) -> None:
        """Wait for the end of so many more writes."""
        for _ in range(count):
            assert self.tried.acquire(timeout=TIMEOUT)


def shape(path: Path) -> dict[str, object]:
    """Return each table with its columns, and each index with its table and columns."""
    with connect(path) as db:
        found: dict[str, object] = {}
        for kind, name, table in db.execute("SELECT type, name, tbl_name FROM sqlite_master"):
            pragma = "table_info" if kind == "table" else "index_info"
            found[f"{kind} {name} of {table}"] = list(db.execute(f"PRAGMA {pragma}(`{name}`)"))
        return found


def write(path: Path, *records: UsageRecord, current: Current | None = None) -> None:
    """Start the sink as the relay does, write, and end."""
    sink = opened(path)
    recorder = Recorder([sink])
    recorder.start()
    for record in records:
        recorder.record(record)
    if current is not None:
        recorder.update(current)
    end(sink)


@pytest.mark.parametrize("empty_file", [False, True], ids=["missing", "0 bytes"])
def test_created_as_the_reference_would(tmp_path: Path, empty_file: bool) -> None:
    if empty_file:
        (tmp_path / "relay").touch()
    write(tmp_path / "relay")
    reference_database(tmp_path / "reference")
    assert shape(tmp_path / "relay") == shape(tmp_path / "reference")
    assert rows(tmp_path / "relay", "version") == [(1,)]
    assert rows(tmp_path / "relay", "usage") == []
    assert len(rows(tmp_path / "relay", "current")) == 1


def test_taken_over_with_its_rows(tmp_path: Path) -> None:
    path = reference_database(tmp_path / "db")
    before = shape(path)
    write(path, RECORD)
    assert shape(path) == before
    assert rows(path, "version") == [(1,)]
    assert rows(path, "usage") == [
        (1_600_000_000, 2.5, None, 0, "lonely"),
        (STARTED, 12.5, 3.25, 1_234_567, "happy"),
    ]


def test_whole_floats_become_integers(tmp_path: Path) -> None:
    write(tmp_path / "db", UsageRecord(1_795_348_680.0, 12.0, 3.5, 0, "happy"))
    with connect(tmp_path / "db") as db:
        columns = "typeof(started), typeof(total_time), typeof(waiting_time), started"
        assert list(db.execute(f"SELECT {columns} FROM `usage`")) == [
            ("integer", "integer", "real", 1_795_348_680)
        ]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param("", id="one"),
        pytest.param("DELETE FROM `current`", id="none"),
        pytest.param("INSERT INTO `current` VALUES (6, 7, 8, 9, 10)", id="several"),
    ],
)
def test_current_has_one_row_from_the_start(
    start: Callable[..., Recorder], tmp_path: Path, change: str
) -> None:
    path = reference_database(tmp_path / "db", change)
    sink = WatchedDatabase(path)
    start(sink)
    sink.wait_for_tries(1)
    ((rebooted, updated, *counts),) = rows(path, "current")
    assert rebooted == updated and isinstance(updated, int) and updated > 1_600_000_000
    assert counts == [0, 0, 0]


def test_current_holds_the_latest_numbers(start: Callable[..., Recorder], tmp_path: Path) -> None:
    sink = opened(tmp_path / "db")
    recorder = start(sink)
    for updated in range(10):
        recorder.update(CURRENT._replace(updated=updated))
    end(sink)
    assert rows(tmp_path / "db", "current") == [(1_795_000_000, 9, 4, 3, 123_456)]


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_the_journal_mode_stays(tmp_path: Path, mode: str) -> None:
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    write(path, RECORD, current=CURRENT)
    with connect(path) as db:
        assert db.execute("PRAGMA journal_mode").fetchone() == (mode,)


def test_in_memory() -> None:
    sink = opened(Path(":memory:"))
    sink.write([RECORD], CURRENT)
    assert sink._db is not None
    sink._db.execute("PRAGMA query_only=1")
    with pytest.raises(SinkError):
        sink.write([LONELY], None)
    sink._db.execute("PRAGMA query_only=0")
    sink.write([LONELY], None)
    moods = [row[0] for row in sink._db.execute("SELECT result FROM `usage`")]
    assert moods == ["happy", "lonely"]  # the failed write lost nothing
    assert list(sink._db.execute("SELECT * FROM `current`")) == [tuple(CURRENT)]
    sink.close()


def text_file(path: Path) -> None:
    path.write_text("this is a text file, and no database\n" * 100)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "version 2": (
        lambda path: reference_database(path, "UPDATE `version` SET `version` = 2"),
        "its schema version is 2, expected 1",
    ),
    "version 2 in WAL mode": (
        lambda path: reference_database(
            path, "UPDATE `version` SET `version` = 2; PRAGMA journal_mode=wal"
        ),
        "its schema version is 2, expected 1",
    ),
    "no version": (
        lambda path: reference_database(path, "DELETE FROM `version`"),
        "its schema version is none, expected 1",
    ),
    "no table version": (
        lambda path: reference_database(path, "DROP TABLE `version`"),
        "table version lacks version",
    ),
    "no table usage": (
        lambda path: reference_database(path, "DROP TABLE `usage`"),
        "table usage lacks result, started, total_bytes, total_time, waiting_time",
    ),
    "no table current": (
        lambda path: reference_database(path, "DROP TABLE `current`"),
        "table current lacks connected, incomplete_bytes, rebooted, updated, waiting",
    ),
    "no column waiting": (
        lambda path: reference_database(path, "ALTER TABLE `current` RENAME `waiting` TO `w`"),
        "table current lacks waiting",
    ),
    "no column result": (
        lambda path: reference_database(path, "ALTER TABLE `usage` RENAME `result` TO `mood`"),
        "table usage lacks result",
    ),
    "another program's database": (
        lambda path: execute(path, "CREATE TABLE `mailboxes` (`id`)"),
        "table version lacks version",
    ),
    "text": (text_file, "file is not a database"),
    "one byte": (lambda path: path.write_text("\n"), "table version lacks version"),
    "zeros": (lambda path: path.write_bytes(bytes(8192)), "file is not a database"),
}


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_refused_and_left_untouched(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    path = tmp_path / "db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(StartupError) as refusal:
        opened(path)
    assert str(refusal.value).startswith(f"--usage-db {path}: ")
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["db"]


# A dry run (--check): the same refusals, without a write.


class State(NamedTuple):
    """A file, as `stat` and a reader find it."""

    mode: int
    inode: int
    mtime_ns: int
    content: bytes

    @classmethod
    def of(cls, path: Path) -> State:
        found = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        return cls(found.st_mode, found.st_ino, found.st_mtime_ns, content)


def states(folder: Path) -> dict[str, State]:
    """Return the state of a folder and of each file in it."""
    return {str(path): State.of(path) for path in (folder, *folder.iterdir())}


def dry_run(path: Path | str) -> None:
    """Check a database. Fail if a file was changed."""
    folder = Path(path).parent
    before = states(folder) if folder.is_dir() else None
    try:
        UsageDatabase(str(path)).prepare(dry_run=True)
    finally:
        assert before == (states(folder) if folder.is_dir() else None)


# A program that executes SQL in a database, says so, and leaves it as it is until its stdin ends.
HOLDER = """
import os, sqlite3, sys
db = sqlite3.connect(sys.argv[1], isolation_level=None)
for statement in sys.argv[2].split(";"):
    db.execute(statement)
print("ready", flush=True)
sys.stdin.read()
"""
SPILL = (  # writes to the file before the end of the transaction
    "PRAGMA cache_size = 1; BEGIN EXCLUSIVE; CREATE TABLE `more` (`blob`);"
    + "INSERT INTO `more` VALUES (zeroblob(9999));" * 50
    + "INSERT INTO `usage` SELECT * FROM `usage`"
)


@contextlib.contextmanager
def held(path: Path, sql: str) -> Iterator[subprocess.Popen[bytes]]:
    """Let another process execute SQL and keep the database open. The process is killed at the end.

    A connection of this process would lose its locks: `states` opens and closes the file.
    """
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path), sql],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == b"ready\n"
            yield holder
        finally:
            holder.kill()


@pytest.mark.parametrize(("make", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_dry_run_refuses_the_same(
    tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    make(tmp_path / "db")
    with pytest.raises(StartupError) as dry:
        dry_run(tmp_path / "db")
    with pytest.raises(StartupError) as real:
        opened(tmp_path / "db")
    assert str(dry.value) == str(real.value)
    assert reason in str(dry.value)


@pytest.mark.parametrize(
    "name",
    ["db", "a b", "?mode=rwc", "x?immutable=0&vfs=x#y", "%41", "file:db", ";", "\udcff", "ä"],
)
def test_a_dry_run_reads_a_file_of_any_name(tmp_path: Path, name: str) -> None:
    sound, wrong = tmp_path / "sound" / name, tmp_path / "wrong" / name
    for path, more in (sound, ""), (wrong, "UPDATE `version` SET `version` = 2"):
        path.parent.mkdir()
        reference_database(path.with_name("made"), more)
        path.with_name("made").rename(path)
    dry_run(sound)
    with pytest.raises(StartupError, match="schema version is 2"):
        dry_run(wrong)


@pytest.mark.parametrize("mode", ["delete", "truncate", "persist", "wal"])
def test_a_dry_run_of_each_journal_mode(tmp_path: Path, mode: str) -> None:
    dry_run(reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}; DELETE FROM usage"))


def test_a_dry_run_of_a_database_that_a_start_would_create(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to("missing")
    for name in ("missing", "empty", "link"):
        dry_run(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    for name in ("missing", ":memory:", "./missing"):
        dry_run(name)


@pytest.mark.parametrize("name", ["missing/db", "file/db", "folder", "folder/"])
def test_a_dry_run_where_no_file_can_be_created(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    path = os.path.join(tmp_path, name)
    with pytest.raises(StartupError) as dry:
        dry_run(path)
    with pytest.raises(StartupError) as real:
        UsageDatabase(path).prepare()
    assert str(dry.value) == str(real.value)


@pytest.mark.parametrize("killed", [False, True], ids=["running", "killed"])
@pytest.mark.parametrize("sql", ["BEGIN EXCLUSIVE", SPILL], ids=["locked", "spilled"])
@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_dry_run_beside_a_transaction(
    tmp_path: Path, messages: Messages, mode: str, sql: str, killed: bool
) -> None:
    """The transaction of a killed process leaves a journal, which a start rolls back."""
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    with held(path, sql) as holder:
        if killed:
            holder.kill()
            holder.wait()
        assert sql != SPILL or len(os.listdir(tmp_path)) > 1
        dry_run(path)
    assert messages.all == []
    opened(path).close()


@pytest.mark.parametrize("killed", [False, True], ids=["running", "killed"])
@pytest.mark.parametrize("version", [1, 2])
def test_a_dry_run_beside_a_write_ahead_log(tmp_path: Path, version: int, killed: bool) -> None:
    """The file is read without the log. It has the tables, because a start uses no log for them."""
    sql = f"UPDATE `version` SET `version` = {version}; PRAGMA journal_mode=wal"
    path = reference_database(tmp_path / "db", sql)
    refusal = pytest.raises(StartupError, match="schema version is 2")
    with held(path, "DELETE FROM `usage`") as holder:
        if killed:
            holder.kill()
            holder.wait()
        assert (tmp_path / "db-wal").stat().st_size > 0
        with refusal if version == 2 else contextlib.nullcontext():
            dry_run(path)


@pytest.mark.parametrize("names", [("db", "db-wal"), ("db", "db-wal", "db-shm")], ids=" ".join)
def test_a_dry_run_does_not_judge_a_file_whose_tables_are_in_the_log(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    sql = "PRAGMA journal_mode=wal;" + re.sub("--.*", "", transit_relay.USAGE_SCHEMA)
    with held(tmp_path / "db", sql + "INSERT INTO version VALUES (1)"):
        for name in names:
            shutil.copy(tmp_path / name, copy)
    dry_run(copy / "db")
    opened(copy / "db").close()


def test_a_dry_run_reads_nothing_beside_a_journal(tmp_path: Path) -> None:
    """A start would roll it back first."""
    path = reference_database(tmp_path / "db", "DELETE FROM `version`")
    (tmp_path / "db-journal").touch()
    dry_run(path)


@pytest.mark.parametrize("damage", ["100 bytes left", "one page left"])
def test_a_dry_run_of_a_damaged_database_passes(
    tmp_path: Path, messages: Messages, damage: str
) -> None:
    """A start passes too, with a warning."""
    path = reference_database(tmp_path / "db")
    DAMAGE[damage](path)
    dry_run(path)
    assert messages.all == []


def test_a_dry_run_does_not_remove_a_database_that_another_relay_creates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "db"

    def fail(db: sqlite3.Connection) -> None:
        path.touch()
        raise MemoryError

    monkeypatch.setattr(transit_relay, "_check_schema", fail)
    with pytest.raises(MemoryError):
        UsageDatabase(str(path)).prepare(dry_run=True)
    assert path.exists()


def test_nothing_is_touched_before_a_database_is_opened(tmp_path: Path) -> None:
    UsageDatabase(str(tmp_path / "db")).stop()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_opening_changes_no_row(tmp_path: Path, mode: str) -> None:
    """A second relay may try the database while the first one uses it."""
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    before = path.read_bytes()
    opened(path).close()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["db"]


def test_a_database_that_cannot_be_written_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite grants even BEGIN IMMEDIATE on a file that may only be read."""
    path = reference_database(tmp_path / "db")
    connect = sqlite3.connect

    def connect_read_only(path: str, **others: Any) -> Any:
        return connect(f"file:{path}?mode=ro", **{**others, "uri": True})

    monkeypatch.setattr(sqlite3, "connect", connect_read_only)
    with pytest.raises(StartupError, match="attempt to write a readonly database"):
        opened(path)


@pytest.mark.parametrize("text", TRANSIENT_ERRORS)
def test_a_file_name_does_not_decide_about_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """The system's error contains the path, which contains an error text of SQLite."""
    path = tmp_path / text.replace("/", " ")
    connect = sqlite3.connect

    def connect_elsewhere(_: str, **others: Any) -> Any:
        return connect(":memory:", **others)  # so the file is missing afterwards

    monkeypatch.setattr(sqlite3, "connect", connect_elsewhere)
    with pytest.raises(StartupError) as refusal:
        opened(path)
    assert str(refusal.value) == f"--usage-db {path}: No such file or directory"


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        *((text, None, code) for text, code in TRANSIENT_ERRORS.items()),
        ("unable to open database file", None, None),
        ("file is not a database", None, None),
        ("no such table: database is locked", None, None),
        ("any text", 5 | 1 << 8, 5),  # SQLITE_BUSY_RECOVERY
        ("any text", 10 | 12 << 8, 10),  # SQLITE_IOERR_NOMEM
        ("database is locked", 26, 26),  # SQLITE_NOTADB
    ],
)
def test_result_code(text: str, code: int | None, expected: int | None) -> None:
    """Python tells the code from 3.11 on. Before, whole messages are compared."""
    error: Any = sqlite3.OperationalError(text)
    if code is not None:
        error.sqlite_errorcode = code
    assert result_code(error) == expected


@pytest.mark.skipif(sys.version_info < (3, 11), reason="sqlite3 has no error codes")
def test_the_result_codes_are_those_of_sqlite() -> None:
    names = "BUSY", "LOCKED", "IOERR", "CORRUPT", "FULL"
    codes = [getattr(sqlite3, f"SQLITE_{name}") for name in names]
    assert list(TRANSIENT_ERRORS.values()) == codes
    assert codes[0] == transit_relay.SQLITE_BUSY


@pytest.mark.parametrize(
    ("name", "reason"),
    [("missing/db", "unable to open database file"), ("folder", "not a regular file")],
)
def test_refused_where_no_file_can_be_created(tmp_path: Path, name: str, reason: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StartupError, match=reason):
        opened(tmp_path / name)
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize("empty_file", [False, True], ids=["missing", "0 bytes"])
def test_a_failed_creation_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_file: bool
) -> None:
    path = tmp_path / "db"
    if empty_file:
        path.touch()
    broken = transit_relay.USAGE_SCHEMA + "CREATE TABLE `usage` (`started`);\n"
    monkeypatch.setattr(transit_relay, "USAGE_SCHEMA", broken)
    with pytest.raises(StartupError, match="already exists"):
        opened(path)
    assert os.listdir(tmp_path) == (["db"] if empty_file else [])
    assert not empty_file or path.read_bytes() == b""


def test_a_creation_on_a_full_disk_leaves_nothing_and_is_retried(tmp_path: Path) -> None:
    """The test needs a process of its own: RLIMIT_FSIZE makes its writes fail."""
    script = """if True:
        import os, resource, sys
        from transit_relay import UsageDatabase, UsageRecord
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 4096, hard))
        sink = UsageDatabase("db")
        sink.prepare()
        print(os.listdir("."))
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        sink.write([UsageRecord(1.5, 2.5, None, 0, "lonely")], None)
        sink.close()
    """
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(RELAY.parent)},
        stdout=subprocess.PIPE,
        timeout=4 * TIMEOUT,
        check=True,
    )
    assert result.stdout == b"[]\n"
    assert rows(tmp_path / "db", "usage") == [(1.5, 2.5, None, 0, "lonely")]


# The usage database: errors that may pass


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_records_wait_while_it_is_locked(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, lock: str, mode: str
) -> None:
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    sink = opened(path)
    recorder = start(sink)
    with connect(path) as other:
        other.execute(f"BEGIN {lock}")
        for record in numbered(100):
            recorder.record(record)
        recorder.update(CURRENT)
        messages.wait_for("database is locked")
        assert recorder.lost() == 100
        other.execute("COMMIT")
    messages.wait_for("--usage-db: works again")
    end(sink)
    assert [row[3] for row in rows(path, "usage")] == [0, *range(100)]
    assert rows(path, "current") == [tuple(CURRENT)]


def test_a_stop_waits_for_the_lock(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages
) -> None:
    path = tmp_path / "db"
    sink = opened(path)
    recorder = start(sink)
    with connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        recorder.record(RECORD)
        recorder.stop()
        messages.wait_for("database is locked")
        assert not recorder.finished and recorder.lost() == 1
        other.execute("COMMIT")
    end(sink)
    assert recorder.lost() == 0 and len(rows(path, "usage")) == 1


def test_a_locked_database_does_not_refuse_a_start(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages
) -> None:
    path = reference_database(tmp_path / "db")
    with connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        sink = opened(path)
        recorder = start(sink)
        recorder.record(RECORD)
        messages.wait_for("database is locked")
        other.execute("COMMIT")
    end(sink)
    assert [row[4] for row in rows(path, "usage")] == ["lonely", "happy"]


def replace_by_sound_one(path: Path) -> None:
    """Put a sound database in the place of another one."""
    os.replace(reference_database(path.with_name("good")), path)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    """Replace bytes in the middle of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "100 bytes left": lambda path: os.truncate(path, 100),
    "one page left": lambda path: os.truncate(path, 4096),
    "three pages left": lambda path: os.truncate(path, 3 * 4096),
    "bad table": lambda path: overwrite(path, 4096, b"\xff" * 100),
}


@pytest.mark.parametrize("repair", [replace_by_sound_one, Path.unlink], ids=["replaced", "removed"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_records_wait_while_it_is_damaged(
    start: Callable[..., Recorder],
    tmp_path: Path,
    messages: Messages,
    damage: Callable[[Path], object],
    repair: Callable[[Path], object],
) -> None:
    """The damaged file is left untouched. It does not refuse a start."""
    path = reference_database(tmp_path / "db")
    damage(path)
    before = path.read_bytes()
    sink = WatchedDatabase(path)
    assert messages.all == ["warning: --usage-db: database disk image is malformed; 0 records wait"]
    recorder = start(sink)
    recorder.record(RECORD)
    recorder.update(CURRENT)
    sink.wait_for_tries(3)
    assert recorder.lost() == 1
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["db"]
    repair(path)
    messages.wait_for("--usage-db: works again")
    end(sink)
    assert rows(path, "usage")[-1] == tuple(RECORD)
    assert rows(path, "current") == [tuple(CURRENT)]


def test_a_relay_serves_while_its_database_is_damaged(
    relay: Callable[..., RelayProcess], tmp_path: Path
) -> None:
    path = reference_database(tmp_path / "db")
    os.truncate(path, 4096)
    running = relay("--usage-db", str(path))
    for client in running.pair():
        client.close()
    replace_by_sound_one(path)
    running.wait_for("--usage-db: works again")
    assert running.stop() == 0
    moods = [row[4] for row in rows(path, "usage")]
    assert moods[0] == "lonely" and len(moods) == 2
    assert b"warning: --usage-db: database disk image is malformed; 0 records" in running.stderr


def test_a_transaction_that_runs_out_of_memory_is_repeated_whole(
    start: Callable[..., Recorder],
    tmp_path: Path,
    messages: Messages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    insert = transit_relay._insert
    fail = [True]

    def insert_then_fail(db: sqlite3.Connection, table: str, rows: Sequence[Any]) -> None:
        insert(db, table, rows)
        if table == "usage" and rows and fail:
            fail.clear()
            raise MemoryError

    monkeypatch.setattr(transit_relay, "_insert", insert_then_fail)
    path = tmp_path / "db"
    sink = opened(path)
    start(sink).record(RECORD)
    messages.wait_for("out of memory")
    end(sink)
    assert rows(path, "usage") == [tuple(RECORD)]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Return an event. While it is set, a database that is opened cannot grow."""
    full = threading.Event()
    connect = sqlite3.connect

    def connect_to_full_disk(*args: object, **kwargs: object) -> sqlite3.Connection:
        db = connect(*args, **kwargs)  # type: ignore[call-overload]
        if full.is_set():
            db.execute("PRAGMA max_page_count=1")
        assert isinstance(db, sqlite3.Connection)
        return db

    monkeypatch.setattr(sqlite3, "connect", connect_to_full_disk)
    full.set()
    return full


def test_records_wait_while_the_disk_is_full(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, full_disk: threading.Event
) -> None:
    full_disk.clear()
    path = reference_database(tmp_path / "db")
    full_disk.set()
    sink = opened(path)  # its pages have room for this
    recorder = start(sink)
    for record in numbered(1_000):
        recorder.record(record)
    messages.wait_for("database or disk is full")
    recorder.record(LONELY)
    full_disk.clear()
    messages.wait_for("--usage-db: works again")
    end(sink)
    assert [row[3] for row in rows(path, "usage")] == [0, *range(1_000), 0]
    assert recorder.lost() == 0


def test_a_full_disk_does_not_refuse_a_start(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, full_disk: threading.Event
) -> None:
    sink = opened(tmp_path / "db")
    messages.wait_for("database or disk is full")
    assert os.listdir(tmp_path) == []
    start(sink).record(RECORD)
    full_disk.clear()
    end(sink)
    assert [row[4] for row in rows(tmp_path / "db", "usage")] == ["happy"]


def test_a_recreated_database_has_the_latest_numbers(
    start: Callable[..., Recorder], tmp_path: Path
) -> None:
    path = tmp_path / "db"
    sink = opened(path)
    sink.write((), CURRENT)
    path.unlink()
    sink.write([RECORD], None)
    sink.close()
    assert rows(path, "current") == [tuple(CURRENT)]


def test_a_moved_database_contains_all_its_records(tmp_path: Path) -> None:
    """In WAL mode the records are in another file at first."""
    path, moved = tmp_path / "db", tmp_path / "moved"
    opened(path).close()
    execute(path, "PRAGMA journal_mode=wal")
    sink = opened(path)
    sink.write([RECORD], None)
    path.rename(moved)
    sink.write([LONELY], None)
    sink.close()
    assert [row[4] for row in rows(moved, "usage")] == ["happy"]
    assert [row[4] for row in rows(path, "usage")] == ["lonely"]


def test_a_creation_that_was_killed_is_repeated(tmp_path: Path) -> None:
    """The kill left all pages, and a journal that rolls them back to an empty file."""
    path, journal = tmp_path / "db", tmp_path / "db-journal"
    opened(path).close()
    magic = bytes.fromhex("d9d505f920a163d7")
    journal.write_bytes((magic + struct.pack(">5I", 0, 1, 0, 512, 4096)).ljust(512, b"\0"))
    opened(path).close()
    assert not journal.exists()
    assert rows(path, "version") == [(1,)] and rows(path, "usage") == []


def test_another_relay_creates_it_at_the_same_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file was missing at first, and is complete once the lock is taken."""
    path = tmp_path / "db"
    create = transit_relay._create_schema

    def create_late(db: sqlite3.Connection) -> None:
        monkeypatch.setattr(transit_relay, "_create_schema", create)
        opened(path).close()
        create(db)

    monkeypatch.setattr(transit_relay, "_create_schema", create_late)
    opened(path).close()
    assert rows(path, "version") == [(1,)]


def test_a_file_that_another_relay_creates_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, messages: Messages
) -> None:
    """The file is still empty, and locked."""
    path = tmp_path / "db"
    create = transit_relay._create_schema

    def create_while_locked(db: sqlite3.Connection) -> None:
        with connect(path) as other:
            other.execute("BEGIN IMMEDIATE")
            create(db)

    monkeypatch.setattr(transit_relay, "_create_schema", create_while_locked)
    opened(path).close()
    messages.wait_for("database is locked")
    assert path.exists()


def test_a_dangling_link_is_followed_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """This holds even if the first attempt to create the database fails."""

    def fail(db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        raise sqlite3.OperationalError("database or disk is full")

    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    with monkeypatch.context() as full:
        full.setattr(transit_relay, "_create_schema", fail)
        sink = opened(link)
    assert link.is_symlink() and not target.exists()
    sink.write([RECORD], None)
    sink.close()
    assert link.is_symlink() and len(rows(target, "usage")) == 1


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_a_deleted_database_is_recreated(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, mode: str
) -> None:
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    sink = WatchedDatabase(path)
    recorder = start(sink)
    sink.wait_for_tries(1)
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    recorder.record(RECORD)
    recorder.update(CURRENT)
    end(sink)
    assert [row[4] for row in rows(path, "usage")] == ["happy"]
    assert rows(path, "current") == [tuple(CURRENT)]
    assert recorder.lost() == 0


def test_another_file_in_its_place_is_left_alone(
    start: Callable[..., Recorder], tmp_path: Path
) -> None:
    path = reference_database(tmp_path / "db")
    sink = WatchedDatabase(path)
    recorder = start(sink)
    sink.wait_for_tries(1)
    path.rename(tmp_path / "moved")
    text_file(path)
    before = path.read_bytes()
    recorder.record(RECORD)
    sink.wait_for_tries(3)
    assert path.read_bytes() == before and recorder.lost() == 1
    os.replace(tmp_path / "moved", path)
    end(sink)
    assert [row[4] for row in rows(path, "usage")] == ["lonely", "happy"]


def test_other_programs_see_and_change_the_records(
    start: Callable[..., Recorder], tmp_path: Path
) -> None:
    """The records are committed, and no lock remains."""
    path = reference_database(tmp_path / "db")
    sink = WatchedDatabase(path)
    recorder = start(sink)
    sink.wait_for_tries(1)  # of `current`, at the start
    recorder.record(RECORD)
    sink.wait_for_tries(1)
    assert [row[4] for row in rows(path, "usage")] == ["lonely", "happy"]
    execute(path, "DELETE FROM `usage`")


def test_many_records_in_their_order(tmp_path: Path) -> None:
    """There are more records than fit into one transaction."""
    records = numbered(2 * transit_relay.BATCH_RECORDS + 1)
    write(tmp_path / "db", *records)
    assert [row[3] for row in rows(tmp_path / "db", "usage")] == list(range(len(records)))


# A Python without sqlite3

WITHOUT_SQLITE = (
    sys.executable,
    "-c",
    "import sys; sys.modules['_sqlite3'] = None\n"  # makes its import fail
    f"sys.path.insert(0, {str(RELAY.parent)!r})\n"
    "import transit_relay; sys.exit(transit_relay.main())",
)


def test_sqlite3_is_imported_on_demand() -> None:
    program = "import sys, transit_relay; print('sqlite3' in sys.modules)"
    result = run_program((sys.executable, "-c", program))
    assert (result.returncode, result.stdout, result.stderr) == (0, "False\n", "")


def test_the_version_needs_no_sqlite3() -> None:
    result = run_program((*WITHOUT_SQLITE, "--version"))
    assert (result.returncode, result.stderr) == (0, "")
    assert transit_relay.__version__ in result.stdout


def test_a_relay_without_a_database_needs_no_sqlite3(relay: Callable[..., RelayProcess]) -> None:
    running = relay(program=WITHOUT_SQLITE)
    for client in running.pair():
        client.close()


def test_a_database_without_sqlite3_is_refused(tmp_path: Path) -> None:
    database = f"--usage-db={tmp_path / 'db'}"
    result = run_program((*WITHOUT_SQLITE, "--port", "tcp:0:interface=127.0.0.1", database))
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == "transit-relay: --usage-db: this Python has no module sqlite3\n"
    assert os.listdir(tmp_path) == []


def run_program(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a program that can import the relay, and return its result."""
    environment = {**os.environ, "PYTHONPATH": str(RELAY.parent)}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=4 * TIMEOUT
    )
