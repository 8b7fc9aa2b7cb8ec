"""Checked traffic during reloads, in a process of its own.

    traffic.py ROLE PORT [--pairs N] [--pause-seconds N] ...

bulk        each pair sends bursts of megabytes one way. No wait is measured.
probe       each pair sends a message and its echo, one pair after the other. A round trip is a
            measured wait.
newcomers   each pair is new: it meets, sends a message and its echo, and ends. The time from the
            first connect to the last `ok` is a measured wait.

"ready" is printed when the first pair has been served. SIGTERM ends the traffic in order. Then a
Result is printed as JSON. Any wrong byte, lost connection or refusal ends the process with an
error.

A pause is real time: without it the traffic would use all of the relay's time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple

from bystanders import CONTENT, connect
from helpers import DIRECTIONS, Client, handshake

CYCLE = CONTENT * 2
PART_BYTES = 256 * 1024  # that is sent at once
BURST_BYTES = 4 * 1024 * 1024
MESSAGE = CONTENT[:1000]


class Result(NamedTuple):
    """What the traffic did."""

    sizes: list[tuple[int, int]]  # the bytes of an ended pair, and how many pairs had so many
    # Of each measured wait: its end (monotonic), and its duration. Seconds.
    waits: list[tuple[float, float]]


class BulkPair:
    """A pair that sends bursts one way. Two threads serve it."""

    def __init__(
        self,
        address: tuple[str, int] | str,
        number: int,
        kinds: tuple[str, str],
        pause_seconds: float = 0.0,
        burst_bytes: int = BURST_BYTES,
        receiver_address: tuple[str, int] | str | None = None,
    ) -> None:
        """For addresses see `connect`. None: the receiver has that of the sender."""
        self.sender = connect(address, kinds[0], number)
        self.receiver = connect(receiver_address or address, kinds[1], number)
        self._pause_seconds = pause_seconds
        self._burst_bytes = burst_bytes
        self._number = number
        self._stopping = threading.Event()
        self.sent_bytes = self.received_bytes = 0
        self.failure = ""
        works = self._send, self._receive
        self._threads = [threading.Thread(target=self._guard, args=[work]) for work in works]

    def start(self) -> None:
        """Let the clients meet, and start the bursts."""
        meet(self.sender, self.receiver, f"bulk{os.getpid()}x{self._number}")
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Send no further part. The pair ends in order."""
        self._stopping.set()

    def join(self) -> None:
        """Wait for the end. Raises AssertionError if anything was wrong."""
        for thread in self._threads:
            thread.join()
        assert not self.failure, self.failure
        assert self.sent_bytes == self.received_bytes, (self.sent_bytes, self.received_bytes)
        self.sender.close()
        self.receiver.close()

    def _guard(self, work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException:
            self.failure += traceback.format_exc()
            self.stop()

    def _send(self) -> None:
        in_burst = 0
        while not self._stopping.is_set():
            start = self.sent_bytes % len(CONTENT)
            self.sender.send(CYCLE[start : start + PART_BYTES])
            self.sent_bytes += PART_BYTES
            in_burst += PART_BYTES
            if in_burst >= self._burst_bytes and self._pause_seconds:
                in_burst = 0
                self._stopping.wait(self._pause_seconds)
        self.sender.half_close()
        assert self.sender.read_to_end() == b""

    def _receive(self) -> None:
        while part := self.receiver.read(PART_BYTES):
            start = self.received_bytes % len(CONTENT)
            assert part == CYCLE[start : start + len(part)], f"wrong at {self.received_bytes}"
            self.received_bytes += len(part)


def meet(one: Client, other: Client, token: str) -> None:
    """Send the handshakes of a pair, and read both `ok`."""
    one.send(handshake(token, "one"))
    other.send(handshake(token, "other"))
    assert one.receive(3) == other.receive(3) == b"ok\n"


def echo(one: Client, other: Client) -> int:
    """Pass a message there and back. Return how many bytes."""
    for sender, receiver in (one, other), (other, one):
        sender.send(MESSAGE)
        assert receiver.receive(len(MESSAGE)) == MESSAGE
    return 2 * len(MESSAGE)


def end(one: Client, other: Client) -> None:
    """End a pair in order."""
    one.half_close()
    assert other.read_to_end() == one.read_to_end() == b""
    one.close()
    other.close()


def bulk(address: tuple[str, int], options: argparse.Namespace) -> Result:
    """Keep pairs with bursts."""
    pairs = [
        BulkPair(address, number, kinds, options.pause_seconds)
        for number, kinds in zip(range(options.pairs), itertools.cycle(DIRECTIONS))
    ]
    for pair in pairs:
        pair.start()
    print("ready", flush=True)
    while not signal.sigtimedwait({signal.SIGTERM}, 0.1):
        assert not any(pair.failure for pair in pairs), [pair.failure for pair in pairs]
    for pair in pairs:
        pair.stop()
    for pair in pairs:
        pair.join()
    return Result([(pair.received_bytes, 1) for pair in pairs], [])


def probe(address: tuple[str, int], options: argparse.Namespace) -> Result:
    """Keep pairs with messages."""
    pairs, totals, waits = [], [0] * options.pairs, []
    for number, kinds in zip(range(options.pairs), itertools.cycle(DIRECTIONS)):
        one, other = (connect(address, kind, number) for kind in kinds)
        meet(one, other, f"probe{os.getpid()}x{number}")
        pairs.append((one, other))
    for number in itertools.count():
        began = time.monotonic()
        totals[number % len(pairs)] += echo(*pairs[number % len(pairs)])
        now = time.monotonic()
        waits.append((now, now - began))
        if number == 0:
            print("ready", flush=True)
        if signal.sigtimedwait({signal.SIGTERM}, options.pause_seconds):
            break
    for one, other in pairs:
        end(one, other)
    return Result([(total, 1) for total in totals], waits)


def newcomers(address: tuple[str, int], options: argparse.Namespace) -> Result:
    """Make pairs, one after the other."""
    waits = []
    for number, kinds in zip(itertools.count(), itertools.cycle(DIRECTIONS)):
        began = time.monotonic()
        one, other = (connect(address, kind, number) for kind in kinds)
        meet(one, other, f"newcomer{os.getpid()}x{number}")
        now = time.monotonic()
        waits.append((now, now - began))
        echo(one, other)
        end(one, other)
        if number == 0:
            print("ready", flush=True)
        if signal.sigtimedwait({signal.SIGTERM}, options.pause_seconds):
            break
    return Result([(2 * len(MESSAGE), len(waits))], waits)


def main() -> None:
    """Run the traffic until SIGTERM."""
    roles = {work.__name__: work for work in (bulk, probe, newcomers)}
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=roles)
    parser.add_argument("port", type=int)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--pause-seconds", type=float, default=0.01)
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    address = ("127.0.0.1", options.port)
    print(json.dumps(roles[options.role](address, options)), flush=True)


if __name__ == "__main__":
    main()
