"""A relay that is killed loses the records of the last two seconds, at most."""

from __future__ import annotations

import itertools
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from helpers import RelayProcess, read_to_end

TRANSFERS = 1_000  # at least
AT_ONCE = 20
PROMISE_SECONDS = 2  # older records are in the database
LASTS_SECONDS = 3  # so that there are older ones


def test_killed_in_the_middle_of_a_thousand_transfers(
    relay: Callable[..., RelayProcess], tmp_path: Path
) -> None:
    """The database opens, is sound, and holds every record that is older than two seconds."""
    path = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(path))
    ended: dict[int, float] = {}  # when a transfer's end was seen, by its size, which is its name
    under_way = deque()
    start = time.monotonic()
    for size in itertools.count(1):
        under_way.append((size, *running.pair(f"t{size}")))
        if len(under_way) < AT_ONCE:
            continue
        if size >= TRANSFERS and time.monotonic() - start > LASTS_SECONDS:
            break
        done, one, other = under_way.popleft()
        other.sendall(b"x" * done)
        other.close()
        assert len(read_to_end(one)) == done
        ended[done] = time.monotonic()
        one.close()
    killed = time.monotonic()
    running.process.kill()
    running.process.wait()
    for _, one, other in under_way:
        one.close()
        other.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = database.execute("SELECT total_bytes, result FROM usage").fetchall()
    database.close()
    promised = {size for size, at in ended.items() if killed - at > PROMISE_SECONDS}
    print(f"{len(ended)} transfers ended, {len(promised)} records promised, {len(rows)} there")
    assert promised
    assert promised <= {size for size, _ in rows} <= set(ended)
    assert len(rows) == len({size for size, _ in rows})
    assert {mood for _, mood in rows} == {"happy"}
