"""A soak: random clients of one relay for minutes. Every byte and every record is checked.

    PYTHONPATH=.:tests python3 tests/hostile/soak.py [MINUTES] [--seed N] [--threads N]

Pairs over all four directions transfer, are cut, are reset, or end one direction; clients are
refused, leave, or send nothing. At the end the relay's records are exactly what the clients
counted, in the JSON lines and in the database, and so are the numbers of ended pairs and relayed
bytes in its status. Its open files are as before, and its pipes are empty. After the first 20 % of
the run its memory grows by less than 4 MiB.
Progress is printed every 10 s. The relay has those of LIMITS that it knows.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from helpers import (
    DIRECTIONS,
    TEXT,
    Client,
    WebSocketClient,
    digest,
    eventually,
    frame,
    handshake,
    parse_head,
)
from watched import MEBIBYTE, Books, WatchedRelay, check_status, has_option, rows

# No scenario lasts so long that one of these ends it, apart from the time for a handshake. With so
# little memory the relay reads less at once. The kernel's buffers take most of what it queues, so
# clients seldom have to wait for memory: test_floods.py has that.
LIMITS = {
    "--handshake-timeout": "5",
    "--keepalive": "20",
    "--stall-timeout": "60",
    "--idle-timeout": "60",
    "--max-wait": "60",
    "--max-connections": "1000",
    "--max-waiting-per-source": "100",
    "--max-memory": "1MB",
    "--max-rate": "2GB",
    "--max-pair-rate": "1GB",
}
PROGRESS_SECONDS = 10
WARM_SHARE = 0.2  # of the run; the memory must not grow after it
GROWTH_BYTES = 4 * MEBIBYTE  # allocators keep what threads and pairs used at the same time
CONTENT = random.Random(7).randbytes(4 * MEBIBYTE)
LONG_BYTES = 300_000  # accepted by kernels and relay, while the receiver reads nothing
SOURCES = [f"127.0.{low}.1" for low in range(1, 65)]  # one has 28,000 ports, used for a minute


class Actor:
    """One thread's clients."""

    def __init__(self, relay: WatchedRelay, books: Books, seed: int) -> None:
        self.relay, self.books = relay, books
        self.chance = random.Random(seed)

    def client(self, kind: str | None = None) -> Client:
        """Return a new client, of a random kind by default."""
        kind = kind or self.chance.choice(("tcp", "ws"))
        return self.relay.client(kind, source=self.chance.choice(SOURCES))

    def pair(self) -> tuple[Client, Client]:
        """Return two clients of random kinds that have met."""
        one, other = map(self.client, self.chance.choice(DIRECTIONS))
        self.relay.couple(one, other, self.token())
        return one, other

    def token(self) -> str:
        """Return a new token."""
        return f"{self.chance.getrandbits(200):x}"

    def block(self, longest: int) -> bytes:
        """Return random content: often few bytes, seldom many."""
        size = int(longest ** self.chance.random())
        start = self.chance.randrange(len(CONTENT) - size)
        return CONTENT[start : start + size]

    def exchange(self, one: Client, other: Client) -> int:
        """Pass blocks both ways. Return how many bytes."""
        total = 0
        for _ in range(self.chance.randint(0, 10)):
            sender, receiver = self.chance.choice(((one, other), (other, one)))
            block = self.block(LONG_BYTES)
            sender.send(block)
            assert digest(receiver.receive(len(block))) == digest(block)
            total += len(block)
        return total

    # Scenarios. Each closes its clients, and notes its records.

    def transfer(self) -> None:
        """Both ways, ended in order by one of them."""
        one, other = self.pair()
        total = self.exchange(one, other)
        one.half_close()
        assert other.read_to_end() == one.read_to_end() == b""
        one.close()
        other.close()
        self.books.add("happy", total)

    def bulk(self) -> None:
        """Some megabytes one way, while the receiver reads."""
        one, other = self.pair()
        block = self.block(len(CONTENT) - 1)
        wire = one.encode(block)[0]
        thread = threading.Thread(target=one.send_wire, args=[wire])
        thread.start()
        received = other.receive(len(block))
        thread.join()
        assert digest(received) == digest(block)
        other.half_close()
        assert one.read_to_end() == other.read_to_end() == b""
        one.close()
        other.close()
        self.books.add("happy", len(block))

    def cut(self) -> None:
        """The sender closes its socket behind the last byte."""
        one, other = self.pair()
        total = self.exchange(one, other)
        block = self.block(LONG_BYTES)
        one.send(block)
        one.close()
        assert digest(other.read_to_end()) == digest(block)
        other.close()
        self.books.add("happy", total + len(block))

    def reset(self) -> None:
        """The sender resets. What the receiver gets is what the relay had received."""
        one, other = self.pair()
        total = self.exchange(one, other)
        block = self.block(LONG_BYTES)
        one.send(block)
        one.reset()
        received = other.read_to_end()
        assert block.startswith(received)
        other.close()
        self.books.add("happy", total + len(received))

    def end_by_receiver(self) -> None:
        """The receiver ends its direction. It gets all that the relay had read."""
        one, other = self.pair()
        total = self.exchange(one, other)
        block = self.block(LONG_BYTES)
        one.send(block)
        other.half_close()
        received = other.read_to_end()
        assert block.startswith(received)
        assert one.read_to_end() == b""
        one.close()
        other.close()
        self.books.add("happy", total + len(received))

    def bad_frame(self) -> None:
        """A text message ends a pair, behind the bytes before it."""
        one, other = self.client("ws"), self.client()
        self.relay.couple(one, other, self.token())
        total = self.exchange(one, other)
        one.send_wire(frame(TEXT, b"text"))
        assert one.read_to_end(1003) == other.read_to_end() == b""
        one.close()
        other.close()
        self.books.add("happy", total)

    def bad_handshake(self) -> None:
        """A line that is none, or a line that is too long."""
        client = self.client()
        client.send(self.chance.choice((b"nonsense\n", b"x" * 2_000, handshake()[:-1] + b"x\n")))
        assert client.read_to_end() == b"bad handshake\n"
        client.close()
        self.books.add("errory")

    def impatient(self) -> None:
        """A byte before the partner is there."""
        client = self.client()
        client.send(handshake(self.token(), "one"))
        client.send(b"x")
        assert client.read_to_end() == b"impatient\n"
        client.close()
        self.books.add("impatient")

    def redundant(self) -> None:
        """Two of one side wait: the newest one gets the partner."""
        token = self.token()
        older, newer, other = self.client(), self.client(), self.client()
        older.send(handshake(token, "one"))
        self.relay.settle(self.books)
        newer.send(handshake(token, "one"))
        self.relay.settle(self.books)
        other.send(handshake(token, "other"))
        assert newer.receive(3) == other.receive(3) == b"ok\n"
        assert older.read_to_end() == b""
        total = self.exchange(newer, other)
        newer.half_close()
        assert other.read_to_end() == newer.read_to_end() == b""
        for client in older, newer, other:
            client.close()
        self.books.add("redundant")
        self.books.add("happy", total)

    def lonely(self) -> None:
        """A client that leaves, is reset, or breaks the rules, before its partner is there."""
        client = self.client("ws")
        client.send(handshake(self.token(), "one"))
        leave = self.chance.choice(("close", "reset", "text"))
        if leave == "text":
            client.send_wire(frame(TEXT, b"text"))
            assert client.read_to_end(1003) == b""
        elif leave == "reset":
            self.relay.settle(self.books)
            client.reset()
        client.close()
        self.books.add("lonely")

    def empty(self) -> None:
        """A client that leaves, or is reset, in its handshake."""
        client = self.client()
        client.send(handshake()[: self.chance.randint(1, 70)])
        if isinstance(client, WebSocketClient):
            # A reset must not overtake the answer: an upgrade that is not done has no record.
            client._read_answer()
        if self.chance.random() < 0.5:
            client.reset()
        client.close()
        self.books.add("empty")

    def silent(self) -> None:
        """A client that sends nothing, until the time for its handshake is over."""
        client = self.client("tcp")
        client.sock.settimeout(60)
        assert client.read_to_end() == b""
        client.close()
        self.books.add("empty")

    def health_check(self) -> None:
        """A plain request has an answer and no record."""
        client = self.client("tcp")
        client.send(b"GET /healthz HTTP/1.1\r\nHost: relay\r\n\r\n")
        head, _, _ = client.read_to_end().partition(b"\r\n\r\n")
        assert parse_head(head)[0] == "200"
        client.close()


# How often each is chosen.
SCENARIOS: dict[Callable[[Actor], None], int] = {
    Actor.transfer: 20,
    Actor.bulk: 5,
    Actor.cut: 10,
    Actor.reset: 10,
    Actor.end_by_receiver: 10,
    Actor.bad_frame: 5,
    Actor.bad_handshake: 5,
    Actor.impatient: 5,
    Actor.redundant: 5,
    Actor.lonely: 5,
    Actor.empty: 5,
    Actor.health_check: 5,
}


class Soak:
    """The threads, and what is counted over all of them."""

    def __init__(self, relay: WatchedRelay, seconds: float, seed: int, threads: int) -> None:
        self.relay = relay
        self.books = Books()
        self.counts: Counter[str] = Counter()
        self.failure = ""
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._began = time.monotonic()
        self._seconds = seconds
        self._seed = seed
        actors = [Actor(relay, self.books, seed * 1_000 + n) for n in range(threads)]
        works = [(self._act, actor) for actor in actors]
        silent = Actor(relay, self.books, -1)
        self._threads = [threading.Thread(target=work, args=[one]) for work, one in works]
        self._threads.append(threading.Thread(target=self._repeat, args=[silent, Actor.silent]))

    def run(self) -> None:
        """Run to the end, or to the first failure."""
        for thread in self._threads:
            thread.start()
        warm_bytes = 0
        while not self._ended.wait(PROGRESS_SECONDS):
            elapsed = time.monotonic() - self._began
            resident = self.relay.resident_bytes()
            if elapsed >= WARM_SHARE * self._seconds and not warm_bytes:
                warm_bytes = resident
            print(
                f"{elapsed:5.0f} s: {sum(self.counts.values()):,} scenarios,"
                f" {len(self.books):,} records, relay {resident / MEBIBYTE:.1f} MiB,"
                f" {self.relay.descriptors()} descriptors",
                flush=True,
            )
            if elapsed >= self._seconds:
                self._ended.set()
        for thread in self._threads:
            thread.join()
        assert not self.failure, self.failure
        print(", ".join(f"{name} {number:,}" for name, number in sorted(self.counts.items())))
        grown = self.relay.resident_bytes() - warm_bytes
        print(f"memory: {grown:+,} bytes since {WARM_SHARE:.0%} of the run")
        assert grown < GROWTH_BYTES, "the memory grows"

    def _act(self, actor: Actor) -> None:
        scenarios, weights = zip(*SCENARIOS.items())
        while not self._ended.is_set():
            self._play(actor, actor.chance.choices(scenarios, weights)[0])

    def _repeat(self, actor: Actor, scenario: Callable[[Actor], None]) -> None:
        while not self._ended.is_set():
            self._play(actor, scenario)

    def _play(self, actor: Actor, scenario: Callable[[Actor], None]) -> None:
        try:
            scenario(actor)
        except BaseException:
            with self._lock:
                self.failure += f"seed {self._seed}, {scenario.__name__}:\n{traceback.format_exc()}"
            self._ended.set()
        with self._lock:
            self.counts[scenario.__name__] += 1


def main() -> None:
    """Run the soak, and check the relay."""
    parser = argparse.ArgumentParser()
    parser.add_argument("minutes", type=float, nargs="?", default=10)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=16)
    options = parser.parse_args()
    limits = [text for name, value in LIMITS.items() if has_option(name) for text in (name, value)]
    print(f"seed {options.seed}; the relay has {' '.join(limits)}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        database = Path(folder, "usage.sqlite")
        with WatchedRelay("--usage-db", str(database), *limits) as relay:
            relay.started()
            books = Books()
            relay.settle(books)  # the database is open
            eventually(lambda: len(rows(database)) == 1, "the first record")
            files = relay.open_files()
            soak = Soak(relay, 60 * options.minutes, options.seed, options.threads)
            soak.run()
            eventually(lambda: relay.open_files() == files, "the descriptors of before")
            assert not any(relay.pool_bytes()), "bytes were left in a pipe"
            relay.check_idle()
            status = relay.last_status(books.pairs() + soak.books.pairs())
            relay.stop_cleanly()
            records = relay.records()
            soak.books.check(records[1:])
            check_status(status, records)
            found, lines = Counter(rows(database)), Counter(records)
            assert found == lines, "the database differs from the JSON lines"
    print(f"soak ok: {len(records):,} records, exact")


if __name__ == "__main__":
    main()
