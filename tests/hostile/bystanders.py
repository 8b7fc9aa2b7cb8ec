"""Transfers beside a fault, in a process of their own: every byte is checked.

    bystanders.py PORT [--host ADDRESS] [--transfers N] [--rounds N] [--relay PID] ...

Pairs over all four directions send a block each, receive it, and pause: that is a round. "ready"
is printed after the first rounds. SIGTERM ends the transfers in order. Then a Result is printed as
JSON.

A pause is real time: without it the transfers would use all of the relay's time.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import itertools
import json
import os
import random
import signal
import socket
import time
from pathlib import Path
from typing import NamedTuple

from helpers import DIRECTIONS, Client, WebSocketClient, handshake

PATIENCE_SECONDS = 600  # the test that stops us gives up earlier
LAST_ROUNDS = 3  # after SIGTERM: bytes must pass after the fault too
CONTENT = random.Random(18).randbytes(1 << 20)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel kill this process when the test's process ends, in whatever way."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Result(NamedTuple):
    """What the transfers did."""

    sent_bytes: list[int]  # of each transfer
    received_bytes: list[int]  # of each transfer; less than sent only if the relay ended it
    # Of each round: its end (monotonic), and its duration without the time that we and the relay
    # waited for a core. Seconds.
    rounds: list[tuple[float, float]]


class Transfer:
    """A pair, of which one client sends and the other one receives."""

    def __init__(self, address: tuple[str, int], number: int, kinds: tuple[str, str]) -> None:
        """Connect both, and read their `ok`. `kinds`: the encodings, tcp or ws."""
        self.sender, self.receiver = (connect(address, kind, number) for kind in kinds)
        self.sender.send(handshake(f"bystander{os.getpid()}x{number}", "one"))
        self.receiver.send(handshake(f"bystander{os.getpid()}x{number}", "other"))
        assert self.sender.receive(3) == self.receiver.receive(3) == b"ok\n"
        self.sent, self.received = hashlib.sha256(), hashlib.sha256()
        self.sent_bytes = self.received_bytes = 0
        self.is_ended = False  # by the relay

    def send(self, block: bytes) -> None:
        """Send a block."""
        if not self.is_ended:
            self.sent.update(block)
            self.sent_bytes += len(block)
            self.sender.send(block)

    def receive(self) -> None:
        """Receive what was sent. An end before that is an error."""
        while self.received_bytes < self.sent_bytes:
            part = self.receiver.read(self.sent_bytes - self.received_bytes)
            assert part, f"the end came after {self.received_bytes} of {self.sent_bytes} bytes"
            self.received.update(part)
            self.received_bytes += len(part)

    def end(self) -> None:
        """End the transfer, and compare the digests."""
        self.sender.half_close()
        assert self.receiver.read_to_end() == b"", "more was received than sent"
        assert self.sender.read_to_end() == b""
        assert self.received.digest() == self.sent.digest(), "the SHA-256 is wrong"
        self.sender.close()
        self.receiver.close()


class EndableTransfer(Transfer):
    """A transfer that the relay may end: what arrived before must be a prefix of what was sent."""

    def send(self, block: bytes) -> None:
        try:
            super().send(block)
        except ConnectionError:
            pass  # `receive` finds the end

    def receive(self) -> None:
        while not self.is_ended and self.received_bytes < self.sent_bytes:
            part = self.receiver.read(self.sent_bytes - self.received_bytes)
            self.received.update(part)
            self.received_bytes += len(part)
            self.is_ended = not part
        if self.is_ended:
            self.sender.close()
            self.receiver.close()

    def end(self) -> None:
        if not self.is_ended:
            super().end()


def connect(address: tuple[str, int] | str, kind: str, seed: int) -> Client:
    """Return a new client of a kind, tcp or ws. Its masking keys depend on `seed`.

    `address` may be the path of a unix socket.
    """
    if isinstance(address, str):
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(address)
    else:
        sock = socket.create_connection(address, PATIENCE_SECONDS)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client = WebSocketClient(sock, seed=seed) if kind == "ws" else Client(sock)
    sock.settimeout(PATIENCE_SECONDS)
    return client


def delayed_seconds(*processes: int | None) -> float:
    """Return how long this thread, and the main threads of processes, were ready to run, but others
    had the cores: see sched-stats.rst of Linux. The load of the machine must not fail a test.
    """
    paths = [f"/proc/{pid}/task/{pid}/schedstat" for pid in processes if pid is not None]
    stats = [Path(path).read_text().split() for path in ("/proc/thread-self/schedstat", *paths)]
    return sum(int(delay) for _, delay, _ in stats) / 1e9


def main() -> None:
    """Run the transfers until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--transfers", type=int, default=20)
    parser.add_argument("--pause-seconds", type=float, default=0.1)
    parser.add_argument("--block-bytes", type=int, default=100_000)  # the largest one
    parser.add_argument("--rounds", type=int, default=1)  # before "ready"
    parser.add_argument("--relay", type=int)  # its process
    parser.add_argument("--may-be-ended", action="store_true")
    options = parser.parse_args()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    chance = random.Random(options.transfers)
    kind = EndableTransfer if options.may_be_ended else Transfer
    transfers = [
        kind((options.host, options.port), number, kinds)
        for number, kinds in zip(range(options.transfers), itertools.cycle(DIRECTIONS))
    ]
    rounds: list[tuple[float, float]] = []
    enough = None  # the number of rounds at the end, from SIGTERM on
    while enough is None or len(rounds) < enough:
        began, delayed = time.monotonic(), delayed_seconds(options.relay)
        for transfer in transfers:
            size = chance.randint(1, options.block_bytes)
            start = chance.randrange(len(CONTENT) - size)
            transfer.send(CONTENT[start : start + size])
        for transfer in transfers:
            transfer.receive()
        now = time.monotonic()
        rounds.append((now, now - began - (delayed_seconds(options.relay) - delayed)))
        if len(rounds) == options.rounds:
            print("ready", flush=True)
        if signal.sigtimedwait({signal.SIGTERM}, options.pause_seconds):
            enough = len(rounds) + LAST_ROUNDS
    for transfer in transfers:
        transfer.end()
    sent = [transfer.sent_bytes for transfer in transfers]
    received = [transfer.received_bytes for transfer in transfers]
    print(json.dumps(Result(sent, received, rounds)), flush=True)


if __name__ == "__main__":
    main()
