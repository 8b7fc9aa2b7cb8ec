"""Reloads of a relay that holds much, that has other kinds of endpoints, or that counts a quota.

RELAY_RELOAD_SHORT=1 selects smaller numbers, for CI.
"""

from __future__ import annotations

import itertools
import socket
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import pytest
from bystanders import CONTENT, connect
from helpers import DIRECTIONS, Client, digest, eventually, handshake, stopped
from installed import IS_SHORT, Installation, ReloadedRelay, Traffic, longest
from processes import patched, query
from stories import SMALL_BUFFER
from traffic import CYCLE, BulkPair, echo, end
from watched import MEBIBYTE, WATCHED, Books, check_status, rows, stalling_listener

import transit_relay
from transit_relay import BULK_BYTES, READ_BYTES, unacknowledged_bytes

RELOADS = 3
# A relay that counts the bytes of the month often, and soon writes them: so tests need not wait.
COUNTS_OFTEN = patched(**WATCHED, **{"QUOTA_SECONDS": 0.1, "UsageDatabase.gather_seconds": 0.1})
QUEUED_BYTES = 32_000_000 if IS_SHORT else 256_000_000  # by the relay, at least
# Of each direction. More than one read: the rest stays in the relay's kernel.
LOAD_BYTES = READ_BYTES + BULK_BYTES
PAUSE_SECONDS = 0.1 if IS_SHORT else 0.0  # of real time, after each mebibyte of a transfer
HELD_BYTES = 40_000  # of each direction: in the kernels behind the relay, at most


class Direction:
    """A direction of a pair. The bytes of each one begin at another place of CONTENT."""

    def __init__(self, sender: Client, receiver: Client, number: int) -> None:
        self.sender, self.receiver = sender, receiver
        self._start = 701 * number
        self.sent_bytes = self.received_bytes = 0

    def _content(self, offset: int, size: int) -> bytes:
        start = (self._start + offset) % len(CONTENT)
        return CYCLE[start : start + size]

    def send(self, size: int) -> None:
        """Send the next `size` bytes."""
        self.sender.send(self._content(self.sent_bytes, size))
        self.sent_bytes += size

    def receive(self) -> None:
        """Receive all that was sent, and compare it."""
        size = self.sent_bytes - self.received_bytes
        is_right = self.receiver.receive(size) == self._content(self.received_bytes, size)
        assert is_right, f"wrong between {self.received_bytes} and {self.sent_bytes}"
        self.received_bytes += size


class StalledPairs:
    """Raw pairs whose receivers do not read, in both directions."""

    def __init__(self, relay: ReloadedRelay, port: int, number: int) -> None:
        """`port`: of the relay, where they connect."""
        self._relay, self._port = relay, port
        self._seen_bytes = -1
        relay.address = (relay.host, port)
        pairs = []
        for _ in range(number):
            one, other = (relay.client(buffer_bytes=SMALL_BUFFER) for _ in range(2))
            relay.couple(one, other)
            for client in (one, other):
                client.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MEBIBYTE)
            pairs.append((one, other))
        self._pairs = [
            (Direction(one, other, 2 * n), Direction(other, one, 2 * n + 1))
            for n, (one, other) in enumerate(pairs)
        ]
        self._directions = [*itertools.chain(*self._pairs)]

    def send(self, size: int) -> None:
        """Send so much in each direction. The relay is suspended until all of it has come."""
        with stopped(self._relay):
            for one in self._directions:
                one.send(size)
            eventually(self._has_arrived, "all is in the relay's kernel")

    def _has_arrived(self) -> bool:
        return not any(unacknowledged_bytes(one.sender.sock) for one in self._directions)

    def queued_bytes(self) -> int:
        """Return how many bytes the relay has: accepted from the senders, and in no kernel.

        The kernel counts the bytes that are not acknowledged, and those that are not read:
        /proc/net/tcp in proc(5).
        """
        found = sum(one.sent_bytes - one.received_bytes for one in self._directions)
        for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
            _, local, remote, _, queues, *_ = line.split()
            if self._port in (int(one.split(":")[1], 16) for one in (local, remote)):
                found -= sum(int(size, 16) for size in queues.split(":"))
        return found

    def are_stalled(self) -> bool:
        """Return whether the relay has as many bytes as at the last call, and enough."""
        before, self._seen_bytes = self._seen_bytes, self.queued_bytes()
        return before == self._seen_bytes >= QUEUED_BYTES

    def receive(self) -> None:
        """Receive and compare all that was sent."""
        for one in self._directions:
            one.receive()

    def end(self, books: Books) -> None:
        """End all pairs, and note their records."""
        for there, back in self._pairs:
            end(there.sender, back.sender)
            books.add("happy", there.received_bytes + back.received_bytes)


def files_beside_clients(relay: ReloadedRelay, books: Books) -> Counter[str]:
    """Serve a pair. Return the descriptors when it is closed, and its record is written."""
    relay.settle(books)
    relay.last_status(books.pairs())
    eventually(lambda: len(rows(Path("usage.sqlite"))) == len(books), "the first record")
    return relay.open_files()


def test_large_backlogs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of hundreds of megabytes is lost that the relay holds during a reload.

    The clients come over a listener whose sockets inherit small send buffers, so that the relay
    holds most of the bytes.
    """
    monkeypatch.chdir(tmp_path)
    installation, books = Installation(tmp_path), Books()
    start_seconds, _ = installation.start_seconds()
    with ExitStack() as running:
        listener = running.enter_context(stalling_listener(receive_bytes=2 * LOAD_BYTES))
        options = ("--port", f"fd:{listener.fileno()}", "--max-memory", "0")
        relay = running.enter_context(ReloadedRelay(installation, *options, passed=[listener]))
        relay.started()
        files = files_beside_clients(relay, books)

        # The kernel's limit of the size can be lower. Then a read is smaller.
        granted = listener.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        load = min(LOAD_BYTES, granted // 2)
        number = QUEUED_BYTES // (2 * (min(load, READ_BYTES) - HELD_BYTES)) + 1
        pairs = StalledPairs(relay, listener.getsockname()[1], number)
        before = relay.resident_bytes()
        pairs.send(BULK_BYTES)  # in one read: so the next read is spliced, if there is a pipe
        pairs.receive()
        pairs.send(load)
        eventually(pairs.are_stalled, "the relay holds enough, and reads no more")
        queued, pipe_bytes = pairs.queued_bytes(), sum(relay.pool_bytes())
        grown = relay.resident_bytes() - before
        assert grown + pipe_bytes >= QUEUED_BYTES, (grown, pipe_bytes)
        assert pipe_bytes or not transit_relay.splice, "no pipe was full"

        with Traffic(relay, "probe", "--pairs", "1") as probe:
            relay.reload()
            result = probe.finish(books)
        assert relay.children() == []
        assert pairs.queued_bytes() >= QUEUED_BYTES
        relay.check_idle()
        pairs.receive()
        pairs.end(books)
        relay.check_files(files)
        assert not any(relay.pool_bytes()), "bytes were left in a pipe"
        check_end(relay, books)
    pause, _ = longest(result.waits, relay.windows)
    (window,) = relay.windows
    print(
        f"\n{number} pairs, {queued} bytes queued, {pipe_bytes} of them in pipes; the resident"
        f" memory grew by {grown} bytes\nlongest pause of a running pair: {1000 * pause:.0f} ms,"
        f" {pause / start_seconds:.1f} starts of Python ({1000 * start_seconds:.0f} ms);"
        f" SIGHUP to the message: {1000 * (window.end - window.begin):.0f} ms"
    )


def check_end(relay: ReloadedRelay, books: Books, *warnings: str) -> None:
    """Stop the relay, which has no clients. Check its records, its status and its messages."""
    status = relay.last_status(books.pairs())
    assert relay.stop() == 0, relay.stderr.decode()
    relay.check_messages(*warnings)
    records = relay.records()
    books.check(records)
    check_status(status, records)
    assert sorted(rows(Path("usage.sqlite"))) == sorted(records)


def test_other_endpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transfers between clients of unix sockets, and of sockets that systemd has passed."""
    monkeypatch.chdir(tmp_path)
    installation, books = Installation(tmp_path), Books()
    with ExitStack() as running:
        passed = [socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX)]
        for sock in passed:
            running.enter_context(sock)
        passed[1].bind("passed.sock")
        passed[1].listen()
        names = ("systemd:index=0", "systemd:index=1", "unix:own.sock")
        options = itertools.chain(*(("--port", name) for name in names))
        relay = running.enter_context(
            ReloadedRelay(installation, *options, passed=passed, is_activated=True)
        )
        relay.started()
        files = files_beside_clients(relay, books)
        addresses = passed[0].getsockname(), "passed.sock", "own.sock"
        pairs = [
            BulkPair(one, number, kinds, PAUSE_SECONDS, MEBIBYTE, receiver_address=other)
            for number, (kinds, (one, other)) in enumerate(
                zip(itertools.cycle(DIRECTIONS), itertools.product(addresses, addresses))
            )
        ]
        for pair in pairs:
            pair.start()
        for number in range(RELOADS):
            waiting = [connect(address, "tcp", number) for address in addresses]
            for n, one in enumerate(waiting):
                one.send(handshake(f"waits{number}x{n}", "one"))
            wait_for_progress(pairs)
            relay.reload()
            assert relay.children() == []
            for n, one in enumerate(waiting):
                with connect(addresses[n - 1], "ws", number) as other:
                    other.send(handshake(f"waits{number}x{n}", "other"))
                    assert one.receive(3) == other.receive(3) == b"ok\n"
                    books.add("happy", echo(one, other))
                    end(one, other)
        wait_for_progress(pairs)
        finish(pairs, books)
        relay.check_files(files)
        check_end(relay, books)
        assert Path("passed.sock").exists() and not Path("own.sock").exists()
    print(f"\n{len(pairs)} transfers with {sum(pair.received_bytes for pair in pairs)} bytes")


def wait_for_progress(pairs: list[BulkPair]) -> None:
    """Wait until each pair has transferred more."""
    before = [pair.received_bytes for pair in pairs]
    eventually(
        lambda: (
            all(pair.received_bytes > size for pair, size in zip(pairs, before))
            or any(pair.failure for pair in pairs)
        ),
        "all pairs go on",
    )


def finish(pairs: list[BulkPair], books: Books) -> None:
    """End all pairs, and note their records."""
    for pair in pairs:
        pair.stop()
    for pair in pairs:
        pair.join()
        books.add("happy", pair.received_bytes)


def quota_bytes() -> int:
    """Return the bytes of all months in the relay's database."""
    ((size,),) = query(Path("usage.sqlite"), "SELECT sum(bytes) FROM quota")
    assert isinstance(size, int)
    return size


def wait_for_more(before: int) -> None:
    """Wait until there are more bytes in the row of the month."""
    eventually(lambda: quota_bytes() > before, "more bytes in the quota")


def test_a_quota_counts_each_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each once, with reloads under load."""
    monkeypatch.chdir(tmp_path)
    installation, books = Installation(tmp_path, COUNTS_OFTEN), Books()
    installation.configure("monthly-quota 1TB")
    with ReloadedRelay(installation) as relay:
        relay.started()
        relay.settle(books)
        eventually(lambda: len(rows(Path("usage.sqlite"))) == 1, "the first record")
        pairs = [
            BulkPair(relay.address, number, kinds, PAUSE_SECONDS, MEBIBYTE)
            for number, kinds in enumerate(DIRECTIONS)
        ]
        for pair in pairs:
            pair.start()
        for _ in range(RELOADS):
            wait_for_progress(pairs)
            before = quota_bytes()
            relay.settle(books)  # the row of the month is written with a record
            wait_for_more(before)
            relay.reload()
        wait_for_progress(pairs)
        finish(pairs, books)
        check_end(relay, books)
    # The books are those of the clients, and the records are equal to them.
    counted = sum(size for _, size in rows(Path("usage.sqlite")))
    print(f"\n{quota_bytes()} bytes in the quota, {counted} counted")
    assert quota_bytes() == counted


def check_refusals(relay: ReloadedRelay, books: Books) -> None:
    """Newcomers of both kinds are told that the quota is used up."""
    for kind, code in ("tcp", None), ("ws", 1013):
        with relay.client(kind) as client:
            client.send(handshake(relay.new_token()))
            assert client.read_to_end(code) == b"quota used up\n"
        books.add("lonely")


def test_a_quota_that_is_used_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It refuses newcomers after a reload too. A running pair goes on, and is counted."""
    monkeypatch.chdir(tmp_path)
    installation = Installation(tmp_path, COUNTS_OFTEN)
    installation.configure("monthly-quota 1MB")
    books = Books()
    with ReloadedRelay(installation) as relay:
        relay.started()
        one, other = relay.client("ws"), relay.client()
        relay.couple(one, other)
        waiting = relay.client()
        waiting.send(handshake(relay.new_token()))
        one.send(CONTENT)
        assert digest(other.receive(len(CONTENT))) == digest(CONTENT)
        relay.wait_for("100 % of the monthly quota is used")
        assert waiting.read_to_end() == b""
        waiting.close()
        books.add("lonely")
        check_refusals(relay, books)
        relay.reload()
        check_refusals(relay, books)
        size = len(CONTENT) + echo(one, other)
        installation.configure("monthly-quota 1GB")
        relay.reload()
        relay.settle(books)  # newcomers are served
        end(one, other)
        books.add("happy", size)
        check_end(relay, books, "% of the monthly quota is used")
        assert relay.stderr.count(b"100 % of the monthly quota is used") == 1
    assert quota_bytes() == sum(size for _, size in rows(Path("usage.sqlite")))
