"""What a client of test_websocket_clients.py is told to do, step by step.

`CLIENT URL SUBPROTOCOL...` reads a list of steps from its input, as JSON, each a list of a name and
arguments. It prints each step that it has done, as a JSON list of its name and of what was seen. A
step that cannot be done ends the program, with an error. with_ws.js knows the same steps.
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
    """How a connection has ended, in the words of the library."""

    code: int | None  # of the relay's Close
    reason: str
    clean: bool  # there was a Close each way
    tcp: str  # "fin": the relay has ended it, and nobody has reset it


class Client(Protocol):
    """What each library is wrapped in. Payloads are binary; texts come and go as str."""

    async def connect(self, url: str, subprotocols: Sequence[str]) -> Sequence[str | None]:
        """The extensions and the subprotocol that the relay has taken."""

    async def send(self, fragments: Iterable[bytes], ping: bytes | None = None) -> None:
        """One message. The ping goes behind its first fragment."""

    async def send_text(self, text: str) -> None: ...

    async def ping(self, payload: bytes) -> None:
        """Ping, and wait for a Pong with just that payload."""

    async def receive(self) -> bytes | str | None:
        """A message, or None behind the last one."""

    async def close(self, *code_and_reason: Any) -> None: ...

    async def end(self) -> End:
        """Wait until the TCP connection is gone, too."""


async def play(client: Client, url: str, subprotocols: list[str], steps: Any) -> None:
    say("open", *await client.connect(url, subprotocols))
    for name, *arguments in steps:
        say(name, *await globals()[f"step_{name}"](client, *arguments))


def say(*words: object) -> None:
    print(json.dumps(words), flush=True)


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
    """Send messages of random bytes, and receive so many bytes: both at once.

    The plan is a list of messages, each a list of its fragments' sizes. Seen are the hashes of what
    went out and of what came in, and the smallest and the largest message that came.
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
    assert message is not None, f"no message, but the end: {await client.end()}"
    assert isinstance(message, bytes), f"a text: {message}"
    return message


def main(client: Client) -> None:
    asyncio.run(play(client, sys.argv[1], sys.argv[2:], json.load(sys.stdin)))
