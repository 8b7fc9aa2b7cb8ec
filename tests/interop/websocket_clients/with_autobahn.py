"""A client that uses the library `autobahn`. See steps.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

import steps
from autobahn.asyncio.websocket import WebSocketClientFactory, WebSocketClientProtocol
from autobahn.websocket.compress import PerMessageDeflateOffer
from autobahn.websocket.types import ConnectionResponse


class Connection(WebSocketClientProtocol):
    """Turns the callbacks of the library into futures and queues."""

    def __init__(self) -> None:
        super().__init__()
        self.opened: asyncio.Future[Sequence[str | None]] = asyncio.Future()
        self.closed: asyncio.Future[tuple[int | None, str, bool]] = asyncio.Future()
        self.gone: asyncio.Future[None] = asyncio.Future()
        self.messages: asyncio.Queue[bytes | str | None] = asyncio.Queue()
        self.pongs: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.may_write = asyncio.Event()
        self.may_write.set()
        self.tcp = ""

    def onConnect(self, response: ConnectionResponse) -> None:
        self._accepted = [response.headers.get("sec-websocket-extensions"), response.protocol]

    def onOpen(self) -> None:
        self.opened.set_result(self._accepted)

    def onMessage(self, payload: bytes, isBinary: bool) -> None:
        self.messages.put_nowait(payload if isBinary else payload.decode())

    def onPong(self, payload: bytes) -> None:
        self.pongs.put_nowait(payload)

    def onClose(self, wasClean: bool, code: int | None, reason: str | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(reason))
        if wasClean and code is None:
            code = 1005  # as the other libraries report it: RFC 6455, 7.4.1
        self.closed.set_result((code, reason or "", wasClean))
        self.messages.put_nowait(None)
        self.pongs.put_nowait(None)

    # Callbacks of asyncio that the library does not pass on.

    def pause_writing(self) -> None:
        self.may_write.clear()

    def resume_writing(self) -> None:
        self.may_write.set()

    def eof_received(self) -> None:
        self.tcp = "fin"

    def connection_lost(self, exc: Exception | None) -> None:
        if exc:
            self.tcp = repr(exc)
        super().connection_lost(exc)
        self.gone.set_result(None)


class AutobahnClient:
    async def connect(self, url: str, subprotocols: Sequence[str]) -> Sequence[str | None]:
        loop = asyncio.get_running_loop()
        factory = WebSocketClientFactory(url, protocols=subprotocols, loop=loop)
        factory.protocol = Connection
        factory.setProtocolOptions(
            perMessageCompressionOffers=[PerMessageDeflateOffer()],
            # No time limits here: the test has its own.
            openHandshakeTimeout=0,
            closeHandshakeTimeout=0,
            serverConnectionDropTimeout=0,
        )
        address = urlsplit(url)
        _, self._connection = await loop.create_connection(factory, address.hostname, address.port)
        return await self._connection.opened

    async def send(self, fragments: Iterable[bytes], ping: bytes | None = None) -> None:
        fragments = list(fragments)
        if len(fragments) == 1:
            self._connection.sendMessage(fragments[0], isBinary=True)
        else:
            self._connection.beginMessage(isBinary=True)
            for number, fragment in enumerate(fragments):
                self._connection.sendMessageFrame(fragment)
                if ping is not None and number == 0:
                    self._connection.sendPing(ping)
            self._connection.endMessage()  # sends an empty last fragment
        if ping is not None:
            await self._pong(ping)
        await asyncio.sleep(0)  # sending never awaits: without this nothing would be received
        await self._connection.may_write.wait()

    async def send_text(self, text: str) -> None:
        self._connection.sendMessage(text.encode())

    async def ping(self, payload: bytes) -> None:
        self._connection.sendPing(payload)
        await self._pong(payload)

    async def _pong(self, payload: bytes) -> None:
        pong = await self._connection.pongs.get()
        assert pong == payload, f"{pong!r} instead of the Pong"

    async def receive(self) -> bytes | str | None:
        return await self._connection.messages.get()

    async def close(self, *code_and_reason: Any) -> None:
        self._connection.sendClose(*code_and_reason)

    async def end(self) -> steps.End:
        code, reason, clean = await self._connection.closed
        await self._connection.gone
        return steps.End(code, reason, clean, self._connection.tcp)


if __name__ == "__main__":
    steps.main(AutobahnClient())
