"""The script that sums the usage databases of several relays."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import RELAY, TIMEOUT

from transit_relay import open_usage_database

FILE = RELAY.parent / "packaging" / "growing" / "transit_relay_sum.py"
spec = importlib.util.spec_from_file_location("transit_relay_sum", FILE)
assert spec and spec.loader
script = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = script  # its NamedTuples need it
spec.loader.exec_module(script)

MOODS = ["happy", "errory", "lonely", "redundant", "impatient", "empty"]


class Ran(NamedTuple):
    """What one run of the script returned and printed."""

    code: int
    out: str
    err: str


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the script in this process."""

    def run(*arguments: object) -> Ran:
        code = script.main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


def make_database(
    path: Path, *usage: tuple[str, int | None], age_seconds: float | None = 0
) -> Path:
    """Create a database. `usage`: moods and bytes. The relay has 4 clients, 3 tokens, 50 bytes."""
    with contextlib.closing(open_usage_database(str(path))) as db:
        db.execute("BEGIN")
        for mood, size in usage:
            db.execute("INSERT INTO `usage` VALUES (1, 2, NULL, ?, ?)", (size, mood))
        if age_seconds is not None:
            row = (1, int(time.time() - age_seconds), 4, 3, 50)
            db.execute("INSERT INTO `current` VALUES (?, ?, ?, ?, ?)", row)
        db.execute("COMMIT")
    return path


def test_the_sum(tmp_path: Path, run: Run) -> None:
    one = make_database(tmp_path / "1", ("happy", 1000), ("happy", 500), ("lonely", 0))
    two = make_database(tmp_path / "2", ("happy", 7), ("empty", 0), ("impatient", 3))
    code, out, err = run("--json", one, two)
    assert (code, err) == (0, "")
    counts = {"happy": (3, 1507), "lonely": (1, 0), "impatient": (1, 3), "empty": (1, 0)}
    ended = {mood: counts.get(mood, (0, 0)) for mood in MOODS}
    assert json.loads(out) == {
        "databases": 2,
        "ended": {mood: {"count": count, "bytes": size} for mood, (count, size) in ended.items()},
        "total": {"count": 6, "bytes": 1510},
        "current": {"relays": 2, "connected": 8, "waiting": 6, "incomplete_bytes": 100},
    }


def test_the_text(tmp_path: Path, run: Run) -> None:
    one = make_database(tmp_path / "1", *[("happy", 1_000_000)] * 3)
    two = make_database(tmp_path / "2", ("errory", 5), age_seconds=None)
    assert run(one, two) == (
        0,
        "mood              count                bytes\n"
        "happy                 3            3,000,000\n"
        "errory                1                    5\n"
        "lonely                0                    0\n"
        "redundant             0                    0\n"
        "impatient             0                    0\n"
        "empty                 0                    0\n"
        "total                 4            3,000,005\n"
        "at present, 1 of 2 relays: 4 clients in pairs, 3 tokens waiting, 50 bytes in open pairs\n",
        "",
    )


def test_many_databases(tmp_path: Path, run: Run) -> None:
    """More than SQLite can attach to one connection."""
    paths = [make_database(tmp_path / f"{number}", ("happy", number)) for number in range(30)]
    found = json.loads(run("--json", *paths).out)
    assert found["total"] == {"count": 30, "bytes": sum(range(30))}
    assert found["current"]["relays"] == 30


@pytest.mark.parametrize(("age_seconds", "is_old"), [(301, False), (361, True), (None, True)])
def test_a_relay_that_does_not_run(
    age_seconds: float | None, is_old: bool, tmp_path: Path, run: Run
) -> None:
    """Its records count, and its current numbers do not."""
    one = make_database(tmp_path / "1", ("happy", 10))
    two = make_database(tmp_path / "2", ("happy", 20), age_seconds=age_seconds)
    found = json.loads(run("--json", one, two).out)
    relays = 1 if is_old else 2
    assert found["total"] == {"count": 2, "bytes": 30}
    assert found["current"] == {
        "relays": relays,
        "connected": 4 * relays,
        "waiting": 3 * relays,
        "incomplete_bytes": 50 * relays,
    }


def test_a_mood_of_another_program_and_no_bytes(tmp_path: Path, run: Run) -> None:
    found = json.loads(run("--json", make_database(tmp_path / "1", ("odd", None))).out)
    assert found["ended"]["odd"] == {"count": 1, "bytes": 0}
    assert found["total"] == {"count": 1, "bytes": 0}


@pytest.mark.parametrize("value", [None, "text", b"blob"])
def test_current_numbers_of_another_program(value: object, tmp_path: Path, run: Run) -> None:
    """They do not count, and its records do."""
    path = make_database(tmp_path / "1", ("happy", 7))
    for column in "updated", "waiting":
        with contextlib.closing(sqlite3.connect(path)) as db:
            db.execute(f"UPDATE `current` SET `{column}` = ?", (value,))
            db.commit()
        found = json.loads(run("--json", path).out)
        assert found["current"]["relays"] == 0
        assert found["total"] == {"count": 1, "bytes": 7}


def make_other_schema(path: Path) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE `current` (`updated`)")


UNREADABLE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file or directory"),
    "a folder": (Path.mkdir, "Is a directory"),
    "no database": (lambda path: path.write_bytes(b"x" * 5000), "file is not a database"),
    "empty": (Path.touch, "no such table: current"),
    "another schema": (make_other_schema, "no such column: connected"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_one_that_cannot_be_read(name: str, tmp_path: Path, run: Run) -> None:
    """Nothing is printed for the others."""
    make, reason = UNREADABLE[name]
    good, bad = make_database(tmp_path / "good", ("happy", 1)), tmp_path / "bad"
    make(bad)
    assert run(good, bad) == (1, "", f"transit_relay_sum: {bad}: {reason}\n")


def test_one_that_is_given_twice(tmp_path: Path, run: Run) -> None:
    path, link = make_database(tmp_path / "1"), tmp_path / "link"
    link.symlink_to(path)
    expected = f"transit_relay_sum: {link}: this database was given twice\n"
    assert run(path, link) == (1, "", expected)


def test_a_locked_one(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_database(tmp_path / "1")
    monkeypatch.setattr(script, "WAIT_SECONDS", 0.01)
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
        db.execute("BEGIN EXCLUSIVE")
        assert run(path) == (1, "", f"transit_relay_sum: {path}: database is locked\n")


def test_nothing_is_written(tmp_path: Path, run: Run) -> None:
    """Also not beside a path with characters that have a meaning in a URI."""
    path = make_database(tmp_path / "a?mode=rw#b %20", ("happy", 1))
    before = path.read_bytes(), os.stat(path).st_mtime_ns
    assert run(path).code == 0
    assert (path.read_bytes(), os.stat(path).st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_program(tmp_path: Path) -> None:
    path = make_database(tmp_path / "1", ("happy", 1))
    for arguments, code in ([str(path)], 0), ([], 2):
        done = subprocess.run(
            [sys.executable, "-W", "error", FILE, *arguments],
            capture_output=True,
            text=True,
            timeout=4 * TIMEOUT,
        )
        assert done.returncode == code, done.stderr
        assert ("total" in done.stdout) == (code == 0)
