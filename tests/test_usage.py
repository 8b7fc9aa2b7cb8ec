"""Records on their way out: blurring, the queue, JSON lines, the usage database."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import queue
import sqlite3
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import RELAY, TIMEOUT, FakeClock

import transit_relay
from transit_relay import (
    Current,
    JsonLines,
    Recorder,
    Sink,
    SinkError,
    StartupError,
    UsageDatabase,
    UsageRecord,
    blur_size,
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
    """What the program said, to be read or waited for, from whatever thread."""

    def __init__(self) -> None:
        super().__init__()
        self.said: list[str] = []
        self._unread: queue.Queue[str] = queue.Queue()

    def emit(self, record: logging.LogRecord) -> None:
        text = f"{record.levelname.lower()}: {record.getMessage()}"
        self.said.append(text)
        self._unread.put(text)

    def wait_for(self, words: str) -> None:
        """Until a message with these words has come."""
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
    """Nobody waits long here, not even for a lock."""
    monkeypatch.setattr(transit_relay, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(transit_relay, "STALL_SECONDS", 0.01)
    monkeypatch.setattr(transit_relay, "STOP_POLL_SECONDS", 0.01)
    monkeypatch.setattr(UsageDatabase, "gather_seconds", 0.0)


@pytest.fixture
def start() -> Iterator[Callable[..., Recorder]]:
    """Make a Recorder, whose sinks are ended with the test at the latest."""
    started: list[Sink] = []

    def start(*sinks: Sink, blur_seconds: int = 0) -> Recorder:
        started.extend(sinks)
        return Recorder(sinks, blur_seconds)

    yield start
    for sink in started:
        end(sink)


def end(*sinks: Sink) -> None:
    """Stop these and wait until all that they had is written."""
    for sink in sinks:
        sink.stop()
        sink.join(TIMEOUT)
        assert sink.finished, f"{sink.name} does not end, {sink.unwritten} records wait"


def numbered(count: int, first: int = 0) -> list[UsageRecord]:
    """Records that can be told apart by their sizes."""
    return [RECORD._replace(total_bytes=first + n) for n in range(count)]


# Blurring


@pytest.mark.parametrize(
    ("size", "told"),
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
def test_size_is_rounded_down(size: int, told: int) -> None:
    assert blur_size(size) == told


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
def test_all_sinks_are_told_blurred_records(
    start: Callable[..., Recorder], tmp_path: Path, seconds: int, started: float
) -> None:
    database, lines = UsageDatabase(str(tmp_path / "db")), json_file(tmp_path / "log")
    recorder = start(database, lines, blur_seconds=seconds)
    recorder.record(RECORD)
    end(database, lines)
    size = 1_000_000 if seconds else 1_234_567
    assert rows(tmp_path / "db", "usage") == [(started, 12.5, 3.25, size, "happy")]
    assert json.loads((tmp_path / "log").read_text())["started"] == started
    assert json.loads((tmp_path / "log").read_text())["total_bytes"] == size


def test_current_is_not_blurred(start: Callable[..., Recorder], tmp_path: Path) -> None:
    database = UsageDatabase(str(tmp_path / "db"))
    start(database, blur_seconds=3600).update(CURRENT)
    end(database)
    assert rows(tmp_path / "db", "current") == [tuple(CURRENT)]


# The queue before a sink


class GatedSink(Sink):
    """Writes when the gate is open, and until then says that it cannot."""

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
        """Until it has been tried so many times from now on: one less have failed by then."""
        while self.tried.acquire(blocking=False):
            pass
        for _ in range(count):
            assert self.tried.acquire(timeout=TIMEOUT)


@pytest.fixture
def gated(start: Callable[..., Recorder]) -> Iterator[GatedSink]:
    """A sink with room for 100 records."""
    sink = GatedSink()
    yield sink
    sink.gate.set()


def test_the_queue_is_bounded_and_counts_what_it_drops(
    gated: GatedSink, start: Callable[..., Recorder], messages: Messages
) -> None:
    recorder = start(gated)
    for record in numbered(103):
        recorder.record(record)
    assert gated.unwritten == 100
    recorder.report_dropped(1_000.0)
    assert "warning: 3 usage records dropped: too many wait" in messages.said
    gated.gate.set()
    end(gated)
    assert gated.written == numbered(100)


def test_records_that_are_being_tried_count_for_the_bound(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    recorder = start(gated)
    for record in numbered(60):
        recorder.record(record)
    gated.wait_for_tries(2)  # the first ones have left the queue
    for record in numbered(60, first=60):
        recorder.record(record)
    assert (gated.unwritten, recorder.lost()) == (100, 120)


def test_there_is_room_again_when_records_are_written(
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


def test_dropped_records_are_told_once_a_minute_and_all_of_them(
    gated: GatedSink, start: Callable[..., Recorder], messages: Messages
) -> None:
    recorder = start(gated)
    told = []
    for now, count in [(1000.0, 101), (1001.0, 2), (1059.9, 3), (1060.0, 4), (1200.0, 0)]:
        for record in numbered(count):
            recorder.record(record)
        recorder.report_dropped(now)
        told.append([text for text in messages.said if "dropped" in text])
    first, second = (f"warning: {count} usage records dropped: too many wait" for count in (1, 9))
    assert told == [[first], [first], [first], [first, second], [first, second]]


def test_a_sink_that_goes_on_failing_says_so_once_a_minute(
    gated: GatedSink,
    start: Callable[..., Recorder],
    messages: Messages,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = FakeClock(5_000.0)
    monkeypatch.setattr(transit_relay, "time", SimpleNamespace(monotonic=clock))
    start(gated).record(RECORD)
    said = []
    for seconds in (0.0, 59.9, 0.1, 59.9, 0.1):
        clock.advance(seconds)
        gated.wait_for_tries(3)
        said.append(len(messages.said))
    assert said == [1, 1, 2, 2, 3]
    assert set(messages.said) == {"warning: gated: shut; 1 records wait"}


def test_what_is_unwritten_at_the_end_is_counted(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    recorder = start(gated)
    for record in numbered(107):
        recorder.record(record)
    recorder.stop()
    gated.wait_for_tries(3)
    assert not recorder.finished
    assert recorder.lost() == 107  # 100 unwritten, 7 dropped


def test_a_stop_writes_everything(gated: GatedSink, start: Callable[..., Recorder]) -> None:
    gated.gate.set()
    recorder = start(gated)
    for record in numbered(99):
        recorder.record(record)
    recorder.stop()
    gated.join(TIMEOUT)
    assert recorder.finished and recorder.lost() == 0
    assert gated.written == numbered(99)


def test_what_was_dropped_is_lost_even_if_it_was_told(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    recorder = start(gated)
    for record in numbered(103):
        recorder.record(record)
    recorder.report_dropped(1_000.0)
    gated.gate.set()
    end(gated)
    assert recorder.lost() == 3


def test_join_waits_for_all_that_was_put(start: Callable[..., Recorder]) -> None:
    sinks = GatedSink(), GatedSink()
    recorder = start(*sinks)
    for sink in sinks:
        sink.gate.set()
    recorder.record(RECORD)
    recorder.stop()
    recorder.join(TIMEOUT)
    assert recorder.finished and [sink.written for sink in sinks] == [[RECORD], [RECORD]]


def test_a_failing_sink_does_not_hold_up_another(
    gated: GatedSink, start: Callable[..., Recorder]
) -> None:
    other = GatedSink()
    other.gate.set()
    recorder = start(gated, other)
    recorder.record(RECORD)
    end(other)
    assert (other.written, gated.written, recorder.lost()) == ([RECORD], [], 1)


def test_a_sink_with_a_mistake_of_ours_ends_and_its_records_count_as_lost(
    start: Callable[..., Recorder], messages: Messages
) -> None:
    class MistakenSink(GatedSink):
        def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
            raise ZeroDivisionError

    mistaken, other = MistakenSink(), GatedSink()
    other.gate.set()
    recorder = start(mistaken, other)
    recorder.record(RECORD)
    mistaken.join(TIMEOUT)
    end(other)
    assert [text[:13] for text in messages.said] == ["error: gated:"]
    assert mistaken.finished and recorder.lost() == 1
    assert other.written == [RECORD]


# JSON lines


def json_file(path: Path) -> JsonLines:
    """A sink that writes to this file."""
    return JsonLines(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))


@pytest.fixture
def pipe() -> Iterator[tuple[int, JsonLines]]:
    """The reading end of a pipe, which holds 64 KiB, and a sink that writes to it."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, F_SETPIPE_SZ, 1 << 16)
    yield reader, JsonLines(writer)
    with contextlib.suppress(OSError):
        os.close(reader)


def read_lines(reader: int) -> list[bytes]:
    """Everything to the end."""
    with open(reader, "rb") as file:
        return file.readlines()


def lines_of(records: Sequence[UsageRecord]) -> list[bytes]:
    """What these records, made by `numbered`, look like."""
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


def test_a_line_is_there_at_once(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines]
) -> None:
    """Nobody needs to stop the relay, or to fill a buffer, to see it."""
    reader, sink = pipe
    recorder = start(sink)
    for record in numbered(3):
        recorder.record(record)
        assert os.read(reader, 4096) == lines_of([record])[0]


def test_current_is_no_line(start: Callable[..., Recorder], tmp_path: Path) -> None:
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
    assert sink.unwritten > 5_000 - room - 50  # the last chunk is counted when it is whole
    recorder.stop()
    assert read_lines(reader) == lines_of(records)
    end(sink)
    assert recorder.lost() == 0


def test_a_reader_of_a_full_pipe_finds_whole_lines(pipe: tuple[int, JsonLines]) -> None:
    """Even if the relay is killed there."""
    reader, sink = pipe
    os.set_blocking(sink._fd, False)  # shows a part that would be waited for otherwise
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
    """More at once than a pipe takes, and somebody has made it non-blocking."""
    reader, sink = pipe
    monkeypatch.setattr(sink, "chunk_bytes", 200_000)
    if raced:  # what polled as writable is full by now
        monkeypatch.setattr(transit_relay, "takes_bytes", lambda *_: True)
    os.set_blocking(sink._fd, False)
    recorder = start(sink)
    records = numbered(5_000)
    for record in records:
        recorder.record(record)
    recorder.stop()
    assert read_lines(reader) == lines_of(records)
    end(sink)
    assert recorder.lost() == 0 and messages.said == []


def test_a_reader_that_is_gone_is_said_once(
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
    assert messages.said == ["warning: --log-fd: its reader is gone; no more records go there"]
    assert recorder.lost() == 0  # nobody wants them


def test_a_terminal_that_is_gone_is_a_reader_that_is_gone(
    start: Callable[..., Recorder], messages: Messages
) -> None:
    terminal, ours = os.openpty()
    sink = JsonLines(ours)
    os.close(terminal)
    recorder = start(sink)
    recorder.record(RECORD)
    sink.join(TIMEOUT)
    assert messages.said == ["warning: --log-fd: its reader is gone; no more records go there"]
    assert recorder.lost() == 0


def test_a_reader_that_goes_while_lines_wait(
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
    assert len(messages.said) == 1


def test_the_database_goes_on_without_the_reader(
    start: Callable[..., Recorder], pipe: tuple[int, JsonLines], tmp_path: Path
) -> None:
    reader, lines = pipe
    database = UsageDatabase(str(tmp_path / "db"))
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


# The usage database: what is created, taken over, refused


@contextlib.contextmanager
def connect(path: Path) -> Iterator[sqlite3.Connection]:
    """Another program's look at a database."""
    db = sqlite3.connect(path, timeout=TIMEOUT, isolation_level=None)
    try:
        yield db
    finally:
        db.close()


def rows(path: Path, table: str) -> list[tuple[object, ...]]:
    """All rows of a table, in their order."""
    with connect(path) as db:
        return list(db.execute(f"SELECT * FROM `{table}` ORDER BY rowid"))


def execute(path: Path, script: str) -> None:
    """Run SQL on the database, which is made if it is missing."""
    with connect(path) as db:
        db.executescript(script)


def reference_database(path: Path, more: str = "") -> Path:
    """A database as the reference leaves it: with a row of `usage`, and one of `current`."""
    execute(
        path,
        REFERENCE_SCHEMA
        + "INSERT INTO `version` VALUES (1);"
        + "INSERT INTO `current` VALUES (1, 2, 3, 4, 5);"
        + "INSERT INTO `usage` VALUES (1600000000, 2.5, NULL, 0, 'lonely');"
        + more,
    )
    return path


def shape(path: Path) -> dict[str, object]:
    """Each table with its columns, each index with its table and columns."""
    with connect(path) as db:
        found: dict[str, object] = {}
        for kind, name, table in db.execute("SELECT type, name, tbl_name FROM sqlite_master"):
            pragma = "table_info" if kind == "table" else "index_info"
            found[f"{kind} {name} of {table}"] = list(db.execute(f"PRAGMA {pragma}(`{name}`)"))
        return found


def write(path: Path, *records: UsageRecord, current: Current | None = None) -> None:
    """Open the database as the relay does, write, and end."""
    sink = UsageDatabase(str(path))
    recorder = Recorder([sink])
    for record in records:
        recorder.record(record)
    if current is not None:
        recorder.update(current)
    end(sink)


@pytest.mark.parametrize("empty_file", [False, True], ids=["missing", "0 bytes"])
def test_created_as_the_reference_would(tmp_path: Path, empty_file: bool) -> None:
    if empty_file:
        (tmp_path / "ours").touch()
    write(tmp_path / "ours")
    reference_database(tmp_path / "reference")
    assert shape(tmp_path / "ours") == shape(tmp_path / "reference")
    assert rows(tmp_path / "ours", "version") == [(1,)]
    assert rows(tmp_path / "ours", "usage") == []
    assert len(rows(tmp_path / "ours", "current")) == 1


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
def test_current_has_one_row_from_the_start(tmp_path: Path, change: str) -> None:
    path = reference_database(tmp_path / "db", change)
    sink = UsageDatabase(str(path))
    ((rebooted, updated, *counts),) = rows(path, "current")
    assert rebooted == updated and isinstance(updated, int) and updated > 1_600_000_000
    assert counts == [0, 0, 0]
    sink.close()


def test_current_is_the_last_that_was_given(start: Callable[..., Recorder], tmp_path: Path) -> None:
    sink = UsageDatabase(str(tmp_path / "db"))
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
    sink = UsageDatabase(":memory:")
    sink.write([RECORD], CURRENT)
    assert sink._db is not None
    sink._db.execute("PRAGMA query_only=1")
    with pytest.raises(SinkError):
        sink.write([LONELY], None)
    sink._db.execute("PRAGMA query_only=0")
    sink.write([LONELY], None)
    moods = [row[0] for row in sink._db.execute("SELECT result FROM `usage`")]
    assert moods == ["happy", "lonely"]  # what it had is not lost with the trouble
    assert list(sink._db.execute("SELECT * FROM `current`")) == [tuple(CURRENT)]
    sink.close()


def text_file(path: Path) -> None:
    path.write_text("this is a letter, and no database\n" * 100)


def truncated(path: Path, size: int) -> None:
    reference_database(path)
    os.truncate(path, size)


REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "version 2": (
        lambda path: reference_database(path, "UPDATE `version` SET `version` = 2"),
        "its schema version is 2, we know 1",
    ),
    "version 2 in WAL mode": (
        lambda path: reference_database(
            path, "UPDATE `version` SET `version` = 2; PRAGMA journal_mode=wal"
        ),
        "its schema version is 2, we know 1",
    ),
    "no version": (
        lambda path: reference_database(path, "DELETE FROM `version`"),
        "its schema version is none, we know 1",
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
    "truncated to 100 bytes": (lambda path: truncated(path, 100), "malformed"),
    "truncated to one page": (lambda path: truncated(path, 4096), "malformed"),
    "truncated to three pages": (lambda path: truncated(path, 3 * 4096), "malformed"),
}


@pytest.mark.parametrize(("make", "why"), REFUSED.values(), ids=REFUSED)
def test_refused_and_left_untouched(
    tmp_path: Path, make: Callable[[Path], object], why: str
) -> None:
    path = tmp_path / "db"
    make(path)
    before = path.read_bytes()
    with pytest.raises(StartupError) as refusal:
        UsageDatabase(str(path))
    assert str(refusal.value).startswith(f"--usage-db {path}: ")
    assert why in str(refusal.value) and "\n" not in str(refusal.value)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["db"]


@pytest.mark.parametrize(
    ("name", "why"),
    [("missing/db", "unable to open database file"), ("folder", "not a regular file")],
)
def test_refused_where_there_can_be_none(tmp_path: Path, name: str, why: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(StartupError, match=why):
        UsageDatabase(str(tmp_path / name))
    assert os.listdir(tmp_path) == ["folder"] and not os.listdir(tmp_path / "folder")


@pytest.mark.parametrize("empty_file", [False, True], ids=["missing", "0 bytes"])
def test_a_create_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, empty_file: bool
) -> None:
    path = tmp_path / "db"
    if empty_file:
        path.touch()
    broken = transit_relay.USAGE_SCHEMA + "CREATE TABLE `usage` (`started`);\n"
    monkeypatch.setattr(transit_relay, "USAGE_SCHEMA", broken)
    with pytest.raises(StartupError, match="already exists"):
        UsageDatabase(str(path))
    assert os.listdir(tmp_path) == (["db"] if empty_file else [])
    assert not empty_file or path.read_bytes() == b""


def test_a_create_on_a_full_disk_leaves_nothing_and_is_tried_again(tmp_path: Path) -> None:
    """In a process of its own: the limit that makes writes fail is the process's."""
    script = """if True:
        import os, resource, sys
        from transit_relay import UsageDatabase, UsageRecord
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (3 * 4096, hard))
        sink = UsageDatabase("db")
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


# The usage database: trouble while it is in use


@pytest.mark.parametrize("mode", ["wal", "delete"])
@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
def test_records_wait_while_it_is_locked(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, lock: str, mode: str
) -> None:
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    sink = UsageDatabase(str(path))
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
    sink = UsageDatabase(str(path))
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


def test_locked_at_the_start_is_no_refusal(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages
) -> None:
    path = reference_database(tmp_path / "db")
    with connect(path) as other:
        other.execute("BEGIN EXCLUSIVE")
        sink = UsageDatabase(str(path))
        recorder = start(sink)
        recorder.record(RECORD)
        messages.wait_for("database is locked")
        other.execute("COMMIT")
    end(sink)
    assert [row[4] for row in rows(path, "usage")] == ["lonely", "happy"]


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While it is set, SQLite gives no new page to a database that is opened."""
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
    sink = UsageDatabase(str(path))  # there is room for this in the pages that it has
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


def test_a_disk_that_is_full_at_the_start_is_no_refusal(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, full_disk: threading.Event
) -> None:
    sink = UsageDatabase(str(tmp_path / "db"))
    messages.wait_for("database or disk is full")
    assert os.listdir(tmp_path) == []
    start(sink).record(RECORD)
    full_disk.clear()
    end(sink)
    assert [row[4] for row in rows(tmp_path / "db", "usage")] == ["happy"]


def test_a_database_made_anew_has_the_latest_numbers(
    start: Callable[..., Recorder], tmp_path: Path
) -> None:
    path = tmp_path / "db"
    sink = UsageDatabase(str(path))
    sink.write((), CURRENT)
    path.unlink()
    sink.write([RECORD], None)
    sink.close()
    assert rows(path, "current") == [tuple(CURRENT)]


def test_a_database_that_is_moved_takes_its_records_along(tmp_path: Path) -> None:
    """Also in WAL mode, where they are in another file at first."""
    path, moved = tmp_path / "db", tmp_path / "moved"
    UsageDatabase(str(path)).close()
    execute(path, "PRAGMA journal_mode=wal")
    sink = UsageDatabase(str(path))
    sink.write([RECORD], None)
    path.rename(moved)
    sink.write([LONELY], None)
    sink.close()
    assert [row[4] for row in rows(moved, "usage")] == ["happy"]
    assert [row[4] for row in rows(path, "usage")] == ["lonely"]


def test_killed_while_it_was_first_made(tmp_path: Path) -> None:
    """All pages are there, and the journal that takes them back: to a file of no pages."""
    path, journal = tmp_path / "db", tmp_path / "db-journal"
    UsageDatabase(str(path)).close()
    magic = bytes.fromhex("d9d505f920a163d7")
    journal.write_bytes((magic + struct.pack(">5I", 0, 1, 0, 512, 4096)).ljust(512, b"\0"))
    UsageDatabase(str(path)).close()
    assert not journal.exists()
    assert rows(path, "version") == [(1,)] and rows(path, "usage") == []


def test_another_relay_made_it_at_the_same_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was missing when we looked, and is there when we have the lock."""
    path = tmp_path / "db"
    create = transit_relay._create_schema

    def create_late(db: sqlite3.Connection) -> None:
        monkeypatch.setattr(transit_relay, "_create_schema", create)
        UsageDatabase(str(path)).close()
        create(db)

    monkeypatch.setattr(transit_relay, "_create_schema", create_late)
    UsageDatabase(str(path)).close()
    assert rows(path, "version") == [(1,)]


def test_a_link_to_nowhere_is_followed_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the database cannot be made there at once."""

    def fail(db: sqlite3.Connection) -> None:
        db.execute("BEGIN IMMEDIATE")
        raise sqlite3.OperationalError("database or disk is full")

    link, target = tmp_path / "link", tmp_path / "target"
    link.symlink_to(target)
    with monkeypatch.context() as full:
        full.setattr(transit_relay, "_create_schema", fail)
        sink = UsageDatabase(str(link))
    assert link.is_symlink() and not target.exists()
    sink.write([RECORD], None)
    sink.close()
    assert link.is_symlink() and len(rows(target, "usage")) == 1


@pytest.mark.parametrize("mode", ["wal", "delete"])
def test_made_anew_when_it_was_deleted(
    start: Callable[..., Recorder], tmp_path: Path, messages: Messages, mode: str
) -> None:
    path = reference_database(tmp_path / "db", f"PRAGMA journal_mode={mode}")
    sink = UsageDatabase(str(path))
    recorder = start(sink)
    for name in os.listdir(tmp_path):
        (tmp_path / name).unlink()
    recorder.record(RECORD)
    recorder.update(CURRENT)
    end(sink)
    assert [row[4] for row in rows(path, "usage")] == ["happy"]
    assert rows(path, "current") == [tuple(CURRENT)]
    assert recorder.lost() == 0


class WatchedDatabase(UsageDatabase):
    """A usage database that tells when it has tried to write."""

    def __init__(self, path: Path) -> None:
        self.tried = threading.Semaphore(0)
        super().__init__(str(path))
        self.wait_for_tries(1)  # the first one is that of the constructor

    def write(self, batch: Sequence[UsageRecord], current: Current | None) -> int:
        try:
            return super().write(batch, current)
        finally:
            self.tried.release()

    def wait_for_tries(self, count: int) -> None:
        """Until it has been tried so many times more."""
        for _ in range(count):
            assert self.tried.acquire(timeout=TIMEOUT)


def test_another_file_in_its_place_is_left_alone(
    start: Callable[..., Recorder], tmp_path: Path
) -> None:
    path = reference_database(tmp_path / "db")
    sink = WatchedDatabase(path)
    recorder = start(sink)
    path.rename(tmp_path / "moved")
    text_file(path)
    before = path.read_bytes()
    recorder.record(RECORD)
    sink.wait_for_tries(3)
    assert path.read_bytes() == before and recorder.lost() == 1
    os.replace(tmp_path / "moved", path)
    end(sink)
    assert [row[4] for row in rows(path, "usage")] == ["lonely", "happy"]


def test_its_records_are_there_for_others_while_it_runs(
    start: Callable[..., Recorder], tmp_path: Path
) -> None:
    """Committed, and without a lock that would keep another program from writing."""
    path = reference_database(tmp_path / "db")
    sink = WatchedDatabase(path)
    start(sink).record(RECORD)
    sink.wait_for_tries(1)
    assert [row[4] for row in rows(path, "usage")] == ["lonely", "happy"]
    execute(path, "DELETE FROM `usage`")


def test_many_records_in_their_order(tmp_path: Path) -> None:
    """More than one transaction takes."""
    records = numbered(2 * transit_relay.BATCH_RECORDS + 1)
    write(tmp_path / "db", *records)
    assert [row[3] for row in rows(tmp_path / "db", "usage")] == list(range(len(records)))
