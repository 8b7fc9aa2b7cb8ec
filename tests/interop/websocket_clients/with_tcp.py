"""A client of plain TCP, with which those of WebSocket are to meet. See steps.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

import steps

OK = 3  # bytes: the answer to a handshake, behind which data may follow in the same segment


class TcpClient:
    _has_met = False

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
        """Not a message but a part: the answer to the handshake, and then what there is."""
        if self._has_met:
            return await self._reader.read(1 << 16) or None
        self._has_met = True
        return await self._reader.readexactly(OK)

    async def close(self) -> None:
        self._writer.write_eof()

    async def end(self) -> steps.End:
        self._writer.close()
        await self._writer.wait_closed()
        return steps.End(None, "", True, "fin")  # or else the read had failed


if __name__ == "__main__":
    steps.main(TcpClient())
