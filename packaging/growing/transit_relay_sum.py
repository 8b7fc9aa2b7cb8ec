#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Sum the usage databases of several transit relays of Magic Wormhole.

    python3 transit_relay_sum.py /var/lib/transit-relay-*/usage.sqlite

The databases have schema 1 of magic-wormhole-transit-relay. They are opened read-only, one after
the other, while the relays run. If one of them cannot be read, nothing is printed: a sum without it
would be wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

PROGRAM = "transit_relay_sum"
WAIT_SECONDS = 5.0  # for a lock of a database
# The Twisted relay updates the table `current` every five minutes, ours twice a minute.
CURRENT_SECONDS = 360.0
MOODS = ("happy", "errory", "lonely", "redundant", "impatient", "empty")


class Unavailable(Exception):
    """A database cannot be read. The text is one line, and names the file."""


class Tally(NamedTuple):
    """What ended with one mood: pairs if that is happy, else clients without a partner."""

    events: int = 0
    relayed_bytes: int = 0

    def plus(self, other: Tally) -> Tally:
        return Tally(self.events + other.events, self.relayed_bytes + other.relayed_bytes)


class Current(NamedTuple):
    """What relays do at present."""

    relays: int = 0  # those whose row is not old
    connected: int = 0  # clients: two for each pair
    waiting: int = 0  # tokens
    incomplete_bytes: int = 0  # of the pairs that have no record yet

    def plus(self, other: Current) -> Current:
        return Current(*(one + two for one, two in zip(self, other)))


class Usage(NamedTuple):
    """The numbers of one database, or the sum of several."""

    databases: int
    ended: dict[str, Tally]  # by mood
    current: Current

    def total(self) -> Tally:
        return add(self.ended.values())

    def as_json(self) -> dict[str, Any]:
        """Return the object that --json prints."""

        def tally(one: Tally) -> dict[str, int]:
            return {"count": one.events, "bytes": one.relayed_bytes}

        return {
            "databases": self.databases,
            "ended": {mood: tally(one) for mood, one in self.ended.items()},
            "total": tally(self.total()),
            "current": self.current._asdict(),
        }

    def as_text(self) -> str:
        """Return a table, and a line about the present."""
        rows = [*self.ended.items(), ("total", self.total())]
        lines = [f"{'mood':<10} {'count':>12} {'bytes':>20}"]
        lines += [f"{mood:<10} {one.events:>12,} {one.relayed_bytes:>20,}" for mood, one in rows]
        now = self.current
        lines.append(
            f"at present, {now.relays} of {self.databases} relays: {now.connected:,} clients in"
            f" pairs, {now.waiting:,} tokens waiting, {now.incomplete_bytes:,} bytes in open pairs"
        )
        return "\n".join(lines)


def add(tallies: Iterable[Tally]) -> Tally:
    total = Tally()
    for one in tallies:
        total = total.plus(one)
    return total


def read_database(path: str, now: float) -> Usage:
    """Read a usage database. `now`: seconds since the epoch. Raises Unavailable."""
    try:
        open(path, "rb").close()  # its errors are clearer than those of SQLite
        uri = f"{Path(path).absolute().as_uri()}?mode=ro"
        with closing(sqlite3.connect(uri, uri=True, timeout=WAIT_SECONDS)) as db:
            db.execute("BEGIN")  # both queries see the same state: a pair may end between them
            row = db.execute(
                "SELECT `updated`, `connected`, `waiting`, `incomplete_bytes`"
                " FROM `current` ORDER BY `updated` DESC"
            ).fetchone()
            rows = db.execute(
                "SELECT `result`, COUNT(*), COALESCE(SUM(`total_bytes`), 0)"
                " FROM `usage` GROUP BY `result`"
            ).fetchall()
    except OSError as error:
        raise Unavailable(f"{path}: {error.strerror}") from None
    except sqlite3.Error as error:
        raise Unavailable(f"{path}: {error}") from None
    are_numbers = row is not None and all(isinstance(value, (int, float)) for value in row)
    is_known = are_numbers and row[0] + CURRENT_SECONDS >= now
    current = Current(1, *row[1:]) if is_known else Current()
    return Usage(1, {str(mood): Tally(*tally) for mood, *tally in rows}, current)


def sum_databases(paths: Sequence[str], now: float) -> Usage:
    """Return the sum of databases. `now`: seconds since the epoch. Raises Unavailable."""
    ended = dict.fromkeys(MOODS, Tally())  # an unknown mood of another program follows these
    current = Current()
    seen: set[tuple[int, int]] = set()
    for path in paths:
        one = read_database(path, now)
        file = os.stat(path)
        if (file.st_dev, file.st_ino) in seen:
            raise Unavailable(f"{path}: this database was given twice")
        seen.add((file.st_dev, file.st_ino))
        for mood, tally in one.ended.items():
            ended[mood] = ended.get(mood, Tally()).plus(tally)
        current = current.plus(one.current)
    return Usage(len(paths), ended, current)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the sum. Returns the exit code. After an error it is 1, and one line is on stderr."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description="Sum the usage databases of several transit relays."
    )
    parser.add_argument("databases", nargs="+", metavar="DATABASE", help="a file of --usage-db")
    parser.add_argument("--json", action="store_true", help="print a JSON object")
    options = parser.parse_args(arguments)
    try:
        usage = sum_databases(options.databases, time.time())
    except Unavailable as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(usage.as_json()) if options.json else usage.as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
