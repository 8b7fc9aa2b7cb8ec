"""The steps of the client programs of test_websocket_clients.py.

`CLIENT URL SUBPROTOCOL...` reads a list of steps from its input, as JSON. Each step is a list of a
name and arguments. After each step the client prints a JSON list: the name and the results. A step
that fails ends the program with an error. with_ws.js implements the same steps.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol


class End(NamedTuple):
    """The end of a connection, as the library reports it."""

    code: int | None  # of the relay's Close
    reason: str
    clean: bool  # both sides have sent a Close
    tcp: str  # "fin": the relay has ended the TCP connection without a reset


class Client(Protocol):
    """A client of one library. Binary messages are bytes, text messages are str."""

    async def connect(self, url: str, subprotocols: Sequence[str]) -> Sequence[str | None]:
        """Connect; return the extensions and the subprotocol that the relay has accepted."""

    async def send(self, fragments: Iterable[bytes], ping: bytes | None = None) -> None:
        """Send one message. The Ping follows its first fragment."""

    async def send_text(self, text: str) -> None: ...

    async def ping(self, payload: bytes) -> None:
        """Send a Ping, and wait for a Pong with the same payload."""

    async def receive(self) -> bytes | str | None:
        """Wait for a message. Return None at the end of the connection."""

    async def close(self, *code_and_reason: Any) -> None: ...

    async def end(self) -> End:
        """Wait for the end of the TCP connection, too."""


async def run(client: Client, url: str, subprotocols: list[str], steps: Any) -> None:
    """Connect, then do all steps."""
    print_result("open", *await client.connect(url, subprotocols))
    for name, *arguments in steps:
        print_result(name, *await globals()[f"step_{name}"](client, *arguments))


def print_result(*values: object) -> None:
    print(json.dumps(values), flush=True)


async def step_send(client: Client, *fragments: str) -> Sequence[Any]:
    await client.send([fragment.encode() for fragment in fragments])
    return []


async def step_send_around_ping(client: Client, first: str, ping: str, last: str) -> Sequence[Any]:
    await client.send([first.encode(), last.encode()], ping.encode())
    return []


async def step_send_text(client: Client, text: str) -> Sequence[Any]:
    await client.send_text(text)
    return []


async def step_ping(client: Client, payload: str) -> Sequence[Any]:
    await client.ping(payload.encode())
    return []


async def step_receive(client: Client) -> Sequence[Any]:
    return [(await receive_binary(client)).decode()]


async def step_transfer(client: Client, plan: list[list[int]], size: int) -> Sequence[Any]:
    """Send messages of random bytes, and at the same time receive `size` bytes.

    The plan is a list of messages; a message is a list of the sizes of its fragments. The results
    are the digests of the sent and the received bytes, and the sizes of the smallest and the
    largest received message.
    """
    sent, received = hashlib.sha256(), hashlib.sha256()
    sizes: list[int] = []

    async def send() -> None:
        for message in plan:
            fragments = [os.urandom(fragment) for fragment in message]
            sent.update(b"".join(fragments))
            await client.send(fragments)

    async def receive() -> None:
        while sum(sizes) < size:
            message = await receive_binary(client)
            received.update(message)
            sizes.append(len(message))

    await asyncio.gather(send(), receive())
    return [sent.hexdigest(), received.hexdigest(), min(sizes), max(sizes)]


async def step_close(client: Client, *code_and_reason: Any) -> Sequence[Any]:
    await client.close(*code_and_reason)
    return await step_closed(client)


async def step_closed(client: Client) -> Sequence[Any]:
    message = await client.receive()
    assert message is None, f"{len(message or '')} bytes instead of the end"
    return await client.end()


async def receive_binary(client: Client) -> bytes:
    message = await client.receive()
    assert message is not None, f"the end instead of a message: {await client.end()}"
    assert isinstance(message, bytes), f"a text message: {message}"
    return message


def main(client: Client) -> None:
    """Run a client with the arguments and the input of this program."""
    asyncio.run(run(client, sys.argv[1], sys.argv[2:], json.load(sys.stdin)))
