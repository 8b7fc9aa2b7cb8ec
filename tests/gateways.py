"""A gateway in this thread, and the relay behind it."""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from typing import Any

from helpers import Loop

import transit_relay
from transit_relay import PROXY_PREFIX, Limits, Listener, Server, open_endpoint, parse_endpoint

gateway: Any = transit_relay.import_part("--forward", "transit_relay_gateway", "Gateway")

import transit_relay_gateway  # noqa: E402  # its folder is in the path now
from transit_relay_gateway import BackendConnection, PlainAddresses, Target  # noqa: E402


class GatewayLoop(Loop):
    """A gateway: clients connect to `server`, and meet in `behind`.

    They are joined by a unix socket, over which all bytes arrive at once.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        max_pipes: int = 0,
        has_proxy_header: bool = False,
        limits_behind: Limits | None = None,
    ) -> None:
        """`has_proxy_header`: the relay behind expects PROXY headers."""
        self.behind = Loop(max_pipes=max_pipes)
        self.folder = tempfile.mkdtemp()
        self.target = transit_relay_gateway.parse_target(
            f"{PROXY_PREFIX * has_proxy_header}unix:{self.folder}/relay.sock"
        )
        self.behind.restart(*self.listeners_behind(), limits=limits_behind)
        super().__init__(limits, max_pipes)

    def listeners_behind(self) -> list[Listener]:
        """Return new listeners of the relay behind."""
        return open_endpoint(parse_endpoint(self.target.text))

    def make_server(self, *arguments: Any, **options: Any) -> Server:
        """Return a gateway with the clocks of the relay behind."""
        self.clock, self.wallclock = self.behind.clock, self.behind.wallclock
        options = {"addresses": PlainAddresses(), **options}
        make_gateway = partial(gateway, self.target, self.target.resolve(), 200)
        return super().make_server(*arguments, make_rendezvous=make_gateway, **options)

    @property
    def servers(self) -> list[Server]:
        """Return the gateway and the relay behind."""
        return [self.server, self.behind.server]

    def close(self) -> None:
        """Close all clients and both servers."""
        super().close()
        shutil.rmtree(self.folder)

    def backends(self) -> list[BackendConnection]:
        """Return the connections of the gateway to the relay behind."""
        return [one for one in self.server.connections if isinstance(one, BackendConnection)]


__all__ = ["BackendConnection", "GatewayLoop", "PlainAddresses", "Target", "gateway"]
