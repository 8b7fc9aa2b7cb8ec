"""A killed relay loses at most the records of its last two seconds."""

from __future__ import annotations

import itertools
import socket
import sqlite3
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from helpers import RelayProcess, read_to_end

MIN_TRANSFERS = 1_000
PAIRS_AT_ONCE = 20
PROMISE_SECONDS = 2  # older records are in the database
MIN_RUN_SECONDS = 3  # longer than PROMISE_SECONDS


def test_killed_in_the_middle_of_a_thousand_transfers(
    relay: Callable[..., RelayProcess], tmp_path: Path
) -> None:
    """The database is sound and contains every record older than two seconds."""
    path = tmp_path / "usage.sqlite"
    running = relay("--usage-db", str(path))
    ended: dict[int, float] = {}  # when each transfer ended, by its size, which is unique
    running_pairs: deque[tuple[int, socket.socket, socket.socket]] = deque()
    start = time.monotonic()
    for size in itertools.count(1):
        running_pairs.append((size, *running.pair(f"t{size}")))
        if len(running_pairs) < PAIRS_AT_ONCE:
            continue
        if size >= MIN_TRANSFERS and time.monotonic() - start > MIN_RUN_SECONDS:
            break
        sent_bytes, one, other = running_pairs.popleft()
        other.sendall(b"x" * sent_bytes)
        other.close()
        assert len(read_to_end(one)) == sent_bytes
        ended[sent_bytes] = time.monotonic()
        one.close()
    killed = time.monotonic()
    running.process.kill()
    running.process.wait()
    for _, one, other in running_pairs:
        one.close()
        other.close()
    with sqlite3.connect(path) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = database.execute("SELECT total_bytes, result FROM usage").fetchall()
    database.close()
    promised = {size for size, at in ended.items() if killed - at > PROMISE_SECONDS}
    print(f"{len(ended)} transfers ended, {len(promised)} records promised, {len(rows)} found")
    assert promised
    assert promised <= {size for size, _ in rows} <= set(ended)
    assert len(rows) == len({size for size, _ in rows})
    assert {mood for _, mood in rows} == {"happy"}
