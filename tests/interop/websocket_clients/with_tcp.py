"""A client over plain TCP, the partner of clients over WebSocket. See steps.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

import steps

OK_BYTES = 3  # of the answer to a handshake; data may follow in the same segment


class TcpClient:
    _has_partner = False

    async def connect(self, url: str, _: Sequence[str]) -> Sequence[str | None]:
        address = urlsplit(url)
        self._reader, self._writer = await asyncio.open_connection(address.hostname, address.port)
        return [None, None]

    async def send(self, fragments: Iterable[bytes], _: bytes | None = None) -> None:
        self._writer.write(b"".join(fragments))
        await self._writer.drain()

    async def send_text(self, _: str) -> None:
        raise NotImplementedError

    async def ping(self, _: bytes) -> None:
        raise NotImplementedError

    async def receive(self) -> bytes | None:
        """Return the answer to the handshake, and then any bytes: TCP has no messages."""
        if self._has_partner:
            return await self._reader.read(1 << 16) or None
        self._has_partner = True
        return await self._reader.readexactly(OK_BYTES)

    async def close(self) -> None:
        self._writer.write_eof()

    async def end(self) -> steps.End:
        self._writer.close()
        await self._writer.wait_closed()
        return steps.End(None, "", True, "fin")  # after a reset the read would have failed


if __name__ == "__main__":
    steps.main(TcpClient())
