"""Flows of bytes under a rate, in a process of their own. The bytes that arrive are counted.

    flows.py PORT [--pairs N] [--first N] [--paced N --pace BYTES] [--both-ways]

"ready" is printed when all pairs are connected and begin to send. SIGUSR1 prints a Sample as JSON.
The flows do not end: the process must be killed. It ends with its parent.

The receivers read all that has come, so their kernel buffers are almost empty. They count the bytes
on the wire. Over WebSocket these are at most 0.1 % more than the payload.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import socket
import time
from typing import NamedTuple

from bystanders import connect, end_with_parent
from helpers import DIRECTIONS, Client, handshake

BLOCK_BYTES = 32 * 1024  # the payload of a message, if its flow is not paced
TICK_SECONDS = 0.02  # from one message of a paced flow to the next
RECEIVE_BYTES = 2 * 1024 * 1024  # the limit of one recv

_unused = bytearray(RECEIVE_BYTES)  # recv_into needs a buffer; with MSG_TRUNC nothing is written


class Sample(NamedTuple):
    """What the flows have done until now."""

    at: float  # monotonic seconds
    received_bytes: list[int]  # of each flow
    cpu_seconds: float  # of this process


class Flow:
    """One direction of a pair. It sends the same message repeatedly."""

    def __init__(self, sender: Client, receiver: Client, block_bytes: int) -> None:
        """`block_bytes`: the payload of a message."""
        self._sender, self._receiver = sender.sock, receiver.sock
        (self._message,) = sender.encode(bytes(block_bytes))
        self._rest = memoryview(b"")
        self.received_bytes = 0

    def send(self) -> None:
        """Send what is left of a message, or a new one, as far as the kernel accepts it."""
        self._rest = self._rest or memoryview(self._message)
        try:
            self._rest = self._rest[self._sender.send(self._rest) :]
        except BlockingIOError:
            pass

    def receive(self) -> None:
        """Count what has come, without a copy."""
        size = self._receiver.recv_into(_unused, RECEIVE_BYTES, socket.MSG_TRUNC)
        assert size, "the relay has ended a flow"
        self.received_bytes += size


def couple(address: tuple[str, int], number: int) -> tuple[Client, Client]:
    """Return a pair. Its encodings depend on `number`."""
    one, other = (connect(address, kind, number) for kind in DIRECTIONS[number % 4])
    for client in (one, other):
        client.send(handshake(f"flows{os.getpid()}x{number}"))
    assert one.receive(3) == other.receive(3) == b"ok\n"
    for client in (one, other):
        client.sock.setblocking(False)
    return one, other


def main() -> None:
    """Send and receive until the process is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("port", type=int)
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--first", type=int, default=0)  # which of DIRECTIONS the first pair has
    parser.add_argument("--paced", type=int, default=0)  # so many pairs, the last ones
    parser.add_argument("--pace", type=int, default=0)  # their bytes per second
    parser.add_argument("--both-ways", action="store_true")  # then a pair has two flows
    options = parser.parse_args()
    end_with_parent()
    numbers = range(options.first, options.first + options.pairs)
    pairs = [couple(("127.0.0.1", options.port), number) for number in numbers]
    flows: list[Flow] = []
    paced: list[Flow] = []
    senders: dict[int, Flow] = {}  # by descriptor, without those of paced flows
    receivers: dict[int, Flow] = {}
    events = dict.fromkeys((client.fileno() for pair in pairs for client in pair), 0)
    for number, (one, other) in enumerate(pairs):
        is_paced = number >= options.pairs - options.paced
        block_bytes = round(options.pace * TICK_SECONDS) if is_paced else BLOCK_BYTES
        ways = [(one, other), (other, one)] if options.both_ways else [(one, other)]
        for sender, receiver in ways:
            flow = Flow(sender, receiver, block_bytes)
            flows.append(flow)
            receivers[receiver.fileno()] = flow
            events[receiver.fileno()] |= select.EPOLLIN
            if is_paced:
                paced.append(flow)
            else:
                senders[sender.fileno()] = flow
                events[sender.fileno()] |= select.EPOLLOUT
    epoll = select.epoll()
    for fd, mask in events.items():
        epoll.register(fd, mask)

    def print_sample(*_: object) -> None:
        received = [flow.received_bytes for flow in flows]
        print(json.dumps(Sample(time.monotonic(), received, time.process_time())), flush=True)

    signal.signal(signal.SIGUSR1, print_sample)
    print("ready", flush=True)
    next_tick = time.monotonic()
    while True:
        for fd, mask in epoll.poll(max(0.0, next_tick - time.monotonic()) if paced else None):
            if mask & select.EPOLLIN:
                receivers[fd].receive()
            if mask & select.EPOLLOUT:
                senders[fd].send()
        while paced and next_tick <= time.monotonic():
            next_tick += TICK_SECONDS
            for flow in paced:
                flow.send()


if __name__ == "__main__":
    main()
