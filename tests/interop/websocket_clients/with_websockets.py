"""A client that uses the library `websockets`. See steps.py."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any

import steps
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed


class Connection(ClientConnection):
    """Records how the TCP connection has ended, which the library does not report."""

    tcp = ""

    def eof_received(self) -> None:
        self.tcp = "fin"
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        if exc:
            self.tcp = repr(exc)
        super().connection_lost(exc)


class WebsocketsClient:
    async def connect(self, url: str, subprotocols: Sequence[str]) -> Sequence[str | None]:
        # No time limits here: the test has its own.
        self._connection = await connect(
            url,
            subprotocols=subprotocols or None,
            create_connection=Connection,
            proxy=None,
            open_timeout=None,
            close_timeout=None,
        )
        headers = self._connection.response.headers
        return [headers.get("Sec-WebSocket-Extensions"), self._connection.subprotocol]

    async def send(self, fragments: Iterable[bytes], ping: bytes | None = None) -> None:
        fragments = list(fragments)
        if len(fragments) == 1:
            await self._connection.send(fragments[0])
        else:
            await self._connection.send(self._one_by_one(fragments, ping))

    async def _one_by_one(self, fragments: list[bytes], ping: bytes | None) -> AsyncIterator[bytes]:
        pong = None
        for fragment in fragments:
            yield fragment
            if ping is not None and pong is None:  # the library has sent the first fragment
                pong = await self._connection.ping(ping)
        if pong is not None:
            await pong

    async def send_text(self, text: str) -> None:
        await self._connection.send(text)

    async def ping(self, payload: bytes) -> None:
        await (await self._connection.ping(payload))

    async def receive(self) -> bytes | str | None:
        try:
            return await self._connection.recv()
        except ConnectionClosed as closed:
            self._closed = closed
            return None

    async def close(self, *code_and_reason: Any) -> None:
        await self._connection.close(*code_and_reason)

    async def end(self) -> steps.End:
        await self._connection.wait_closed()
        close = self._closed.rcvd
        clean = bool(close and self._closed.sent)
        code, reason = (close.code, close.reason) if close else (None, "")
        return steps.End(code, reason, clean, self._connection.tcp)


if __name__ == "__main__":
    steps.main(WebsocketsClient())
