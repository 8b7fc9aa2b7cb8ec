"""A database that another process locks: no record is lost, and no transfer is slowed.

Run it alone: it compares times.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from helpers import eventually
from processes import locked
from test_resources import refuse_many
from watched import Scene, honest_pair, percentile_99, rows, shorter

LOCKED_SECONDS = shorter(30, 4)
UNLOCKED_SECONDS = shorter(10, 4)  # before, and afterwards
PAUSE_SECONDS = 0.05  # between records, which shall be no load
SLOWED_RATIO = 2
SLOWED_SECONDS = 0.02  # less may be the machine


def test_a_database_locked_by_another_process(tmp_path: Path) -> None:
    """No record is lost, and the transfers are as fast as before and afterwards.

    The time is real: a ratio needs enough rounds with the lock and without it.
    """
    database = tmp_path / "usage.sqlite"
    with Scene(*("--usage-db", str(database)), may_warn=["usage-db: database is locked"]) as scene:
        borders = [time.monotonic()]
        for is_locked in (False, True, False):
            with locked(database) if is_locked else contextlib.nullcontext():
                deadline = time.monotonic() + (LOCKED_SECONDS if is_locked else UNLOCKED_SECONDS)
                while time.monotonic() < deadline:
                    honest_pair(scene.relay, scene.books)
                    refuse_many(scene, 5)
                    time.sleep(PAUSE_SECONDS)
                borders.append(time.monotonic())
                if is_locked:
                    scene.relay.wait_for("database is locked")
        eventually(lambda: len(rows(database)) == len(scene.books), "all records")
    scene.books.check(rows(database))
    p99 = [
        percentile_99([took for at, took in scene.result.rounds if start <= at - took and at < end])
        for start, end in zip(borders, borders[1:])
    ]
    before, during, after = p99
    print(f"p99 of a round: {before:.4f}, locked {during:.4f}, {after:.4f} s")
    assert during < SLOWED_RATIO * max(before, after) + SLOWED_SECONDS
