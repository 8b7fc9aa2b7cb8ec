"""Descriptors, disk, database, log reader, and memory that the relay does not get."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench import clients
from flood import make_pair, upload
from helpers import TIMEOUT, eventually
from interop.children import Record
from processes import refused
from test_resets import LEAST_BUFFER_BYTES
from watched import (
    MEBIBYTE,
    PROGRAM,
    Outcome,
    Probes,
    Scene,
    honest_pair,
    rows,
    shorter,
    stalling_listener,
)

# Descriptors.

DESCRIPTORS = 256
LIMITED = ["sh", "-c", f'ulimit -n {DESCRIPTORS} && exec "$@"', "sh", *PROGRAM]
FLOOD = 1_000  # connections, more than the relay's descriptors, less than the kernel's queue
NO_DESCRIPTORS = "newcomers|open files|descriptors|connections|room"  # what it may warn of


@contextlib.contextmanager
def silent_flood(scene: Scene) -> Iterator[None]:
    """Hold connections that send nothing during the `with` block."""
    flood = [clients.connect(scene.relay.port) for _ in range(FLOOD)]
    scene.books.add("empty", times=FLOOD)
    try:
        yield
    finally:
        for sock in flood:
            sock.close()


def test_descriptors_are_used_up_and_released(tmp_path: Path) -> None:
    """The transfers go on, records are written, and newcomers are served after the flood."""
    database = tmp_path / "usage.sqlite"
    with Scene(*("--usage-db", str(database)), program=LIMITED, may_warn=[NO_DESCRIPTORS]) as scene:
        honest_pair(scene.relay, scene.books)
        pair = scene.relay.client(), scene.relay.client("ws")
        scene.relay.couple(*pair)
        with silent_flood(scene):
            pair[0].send(b"during")
            assert pair[1].receive(6) == b"during"
            pair[0].half_close()
            assert pair[1].read_to_end() == pair[0].read_to_end() == b""
            scene.books.add("happy", 6)
            eventually(lambda: Outcome("happy", 6) in rows(database), "the record of a pair")
        for client in pair:
            client.close()
        honest_pair(scene.relay, scene.books)
    scene.books.check(rows(database))


@pytest.mark.needs("--max-connections")
def test_honest_pairs_are_served_while_descriptors_are_used_up() -> None:
    """Connections that send nothing make room."""
    with Scene(program=LIMITED, may_warn=[NO_DESCRIPTORS]) as scene:
        with Probes(scene.relay, scene.books) as probes:
            with silent_flood(scene):
                probes.wait_for_more()
        probes.check()


# The database.


@pytest.fixture
def small_disk(root: None, tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 256 KiB. Return its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()
    subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "transit-relay-test", folder], check=True
    )
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """Write a file until the file system is full. Return its path."""
    path = folder / "filling"
    with path.open("wb", buffering=0) as file:
        for size in (4096, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(b"\n" * size)
    return path


def refuse_many(scene: Scene, times: int) -> None:
    """Let the relay refuse clients: one record each."""
    for _ in range(times):
        refused(scene.relay, b"nonsense\n", b"bad handshake\n")
    scene.books.add("errory", times=times)


def test_a_full_disk_under_the_database(small_disk: Path) -> None:
    """The records wait until there is space again. None is lost, none is written twice."""
    database = small_disk / "usage.sqlite"
    warning = "usage-db: (database or disk is full|disk I/O error)"
    with Scene("--usage-db", str(database), may_warn=[warning]) as scene:
        relay = scene.relay
        refuse_many(scene, 20)
        eventually(lambda: len(rows(database)) == 20, "the first records")
        filling = fill(small_disk)
        refuse_many(scene, shorter(500, 50))
        for _ in range(10):
            honest_pair(relay, scene.books)
        # More than the pages that the database still has.
        relay.wait_for(warning)
        refuse_many(scene, 20)
        filling.unlink()
        relay.wait_for("usage-db: works again")
        eventually(lambda: len(rows(database)) == len(scene.books), "all records")
        honest_pair(relay, scene.books)
    scene.books.check(rows(database))


# The reader of the log.

STOPPED_SECONDS = 2  # real time: longer than a write waits for the reader
READER = """\
import sys
with open(sys.argv[1], "wb", 0) as log:
    while block := sys.stdin.buffer.raw.read(4096):
        log.write(block)
"""


def test_the_log_reader_is_stopped_and_continued(tmp_path: Path) -> None:
    """More records than the pipe holds. They wait, and all arrive."""
    log = tmp_path / "log"
    read_end, write_end = os.pipe()
    reader = subprocess.Popen([sys.executable, "-c", READER, str(log)], stdin=read_end)
    os.close(read_end)
    try:
        with Scene(log_fd=write_end) as scene:
            refuse_many(scene, 10)
            eventually(lambda: log.exists() and log.read_bytes().count(b"\n") == 10, "first lines")
            os.kill(reader.pid, signal.SIGSTOP)
            refuse_many(scene, 2_000)  # about 200 kB
            for _ in range(10):
                honest_pair(scene.relay, scene.books)
            time.sleep(STOPPED_SECONDS)
            os.kill(reader.pid, signal.SIGCONT)
            eventually(lambda: log.read_bytes().count(b"\n") == len(scene.books), "all lines")
        assert reader.wait(TIMEOUT) == 0  # at the end of the relay
    finally:
        reader.kill()
        reader.wait()
    records = [Record.parse(line) for line in log.read_text().splitlines()]
    scene.books.check([Outcome(one.mood, one.total_bytes) for one in records])


# Memory.

ROOM_BYTES = 4 * MEBIBYTE  # of address space, beyond what the relay has with its clients
STALLED = 600  # pairs whose backlogs need much more: the heap can have free room


def test_a_memory_limit_is_hit() -> None:
    """Backlogs fill the room. The relay goes on, and each connection has its record.

    A MemoryError ends the connection in whose turn it comes, so transfers may be ended.
    """
    with (
        stalling_listener() as listener,
        Scene(
            *("--no-splice", "--port", f"fd:{listener.fileno()}"),
            pass_fds=[listener.fileno()],
            bystander_options=["--may-be-ended"],
            may_warn=["contained fault", "out of memory", "MemoryError", "newcomers"],
        ) as scene,
    ):
        relay, books = scene.relay, scene.books
        pairs = [make_pair(listener.getsockname()[1], LEAST_BUFFER_BYTES) for _ in range(STALLED)]
        limit = relay.virtual_bytes() + ROOM_BYTES
        resource.prlimit(relay.pid, resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        sent = upload([one for one, _ in pairs])
        relay.wait_for("MemoryError")
        for one, other in pairs:
            one.close()
            other.close()
        for size in sent:
            books.add_range("happy", 0, size)
        for _ in range(20):
            honest_pair(relay, books)
