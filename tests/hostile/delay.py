"""A forwarder that delays each byte: `delay.py HOST PORT SECONDS` prints its own port.

The delay is real time. It is that of a long way, which these tests have no other means for: the
kernels of the test machines lack netem.
"""

from __future__ import annotations

import asyncio
import sys

READ_BYTES = 1 << 16
UNDER_WAY_READS = 64  # then the sender has to wait, as on a way with a limited rate


async def delay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Copy until the end. Each read is written `seconds` later, the end too."""
    loop = asyncio.get_running_loop()
    under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(UNDER_WAY_READS)

    async def write_when_due() -> None:
        while True:
            due, data = await under_way.get()
            await asyncio.sleep(due - loop.time())
            if not data:
                writer.write_eof()
                return
            writer.write(data)
            await writer.drain()

    async def read() -> None:
        while True:
            data = await reader.read(READ_BYTES)
            await under_way.put((loop.time() + seconds, data))
            if not data:
                return

    await asyncio.gather(read(), write_when_due())


async def main(host: str, port: int, seconds: float) -> None:
    """Forward all connections to the loopback until the process is stopped."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection(host, port)
        try:
            await asyncio.gather(
                delay(reader, far_writer, seconds), delay(far_reader, writer, seconds)
            )
        except ConnectionError:
            pass  # the ends of the connection find out
        finally:
            far_writer.close()
            writer.close()

    server = await asyncio.start_server(forward, "127.0.0.1", 0)
    print("port", server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
