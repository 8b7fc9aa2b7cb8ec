"""One side of a dilated wormhole. It uses the library of the Python client.

test_dilation.py runs this program on two hosts, with the Python of tools.python_tools. Both sides
send random bytes in one subchannel, the "bulk", and check the SHA-256 of the other side. Meanwhile
the opener sends short messages in another subchannel, the "chat", and the other side echoes them.
A second round can follow, with a bulk subchannel of its own, after some silence.

The program prints its events, one a line.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Callable
from typing import Any

import wormhole
from twisted.internet import protocol, task
from twisted.internet.defer import Deferred
from twisted.internet.error import ConnectionDone
from twisted.protocols.basic import Int32StringReceiver
from twisted.python import log

CHUNK = 48 << 10  # one record of the dilation protocol
LAST_BYTES = 1 << 20  # are sent when the last expected connection was made
DATA, DIGEST, RECEIVED = b"d", b"s", b"r"


def tell(*words: object) -> None:
    """Print an event."""
    print(*words, flush=True)


class Status:
    """Counts the connections to the other side, and the pings in the current connection."""

    def __init__(self) -> None:
        self.connections = 0
        self._connected_at: float | None = None
        self._expires_at: float | None = None
        self._pings = 0
        self._waiting: list[tuple[Callable[[], bool], Deferred[None]]] = []

    def update(self, status: Any) -> None:
        """Take a DilationStatus. The library changes `expires_at` at each Ping and Pong."""
        peer = status.peer_connection
        if not hasattr(peer, "connected_at"):
            return
        if peer.connected_at != self._connected_at:
            self._connected_at = peer.connected_at
            self.connections += 1
            tell("connection", self.connections, peer.hint_description)
        elif peer.expires_at != self._expires_at:
            self._pings += 1
        self._expires_at = peer.expires_at
        for waiting in self._waiting[:]:
            holds, event = waiting
            if holds():
                self._waiting.remove(waiting)
                event.callback(None)

    def more_pings(self, number: int) -> Deferred[None]:
        """Wait for this number of pings."""
        until = self._pings + number
        return self._when(lambda: self._pings >= until)

    def connected(self, number: int) -> Deferred[None]:
        """Wait until this number of connections was made."""
        return self._when(lambda: self.connections >= number)

    def _when(self, holds: Callable[[], bool]) -> Deferred[None]:
        event: Deferred[None] = Deferred()
        if holds():
            event.callback(None)
        else:
            self._waiting.append((holds, event))
        return event


class Subchannel(Int32StringReceiver):
    """A subchannel that carries strings."""

    def __init__(self) -> None:
        super().__init__()
        self.closed: Deferred[None] = Deferred()

    def connectionLost(self, reason: object = None) -> None:
        # The library passes an exception where Twisted passes a Failure.
        assert isinstance(reason, ConnectionDone), reason
        self.closed.callback(None)


class Bulk(Subchannel):
    """Sends random bytes and their SHA-256, and receives the same from the other side.

    It writes as much as the library allows: it is a push producer (Twisted's IPushProducer). The
    first byte of a string is its type.

    `connections` is the number of connections that the transfer must see. Before the last of them,
    the last bytes are not sent, but any number of others: a side without more bytes may never
    connect again. When the other side has asked for a new connection, the library closes the old
    one without unregistering its producer (Manager.abandon_connection). If that is paused, Twisted
    closes the connection only when more bytes are written (FileDescriptor.doWrite).
    """

    def __init__(self, size: int, status: Status, connections: int) -> None:
        super().__init__()
        self.done: Deferred[None] = Deferred()  # both sides have received everything
        self._connected = status.connected(connections)
        self._may_finish = False
        self._may_send = True
        self._unsent = size
        self._received_bytes = 0
        self._half = size // 2
        self._sent, self._received = hashlib.sha256(), hashlib.sha256()
        self._checked = False

    def connectionMade(self) -> None:
        self.transport.registerProducer(self, True)  # may call pauseProducing
        self._connected.addCallback(self._finish).addErrback(log.err)
        self._send()

    def pauseProducing(self) -> None:
        self._may_send = False

    def resumeProducing(self) -> None:
        self._may_send = True
        self._send()

    def stopProducing(self) -> None:
        self._may_send = False

    def _finish(self, _: None) -> None:
        self._may_finish = True

    def _send(self) -> None:
        while self._may_send and self._unsent:
            data = os.urandom(min(CHUNK, self._unsent))
            if self._may_finish or self._unsent > LAST_BYTES:
                self._unsent -= len(data)
            self._sent.update(data)
            self.sendString(DATA + data)  # may call pauseProducing
            if not self._unsent:
                self.transport.unregisterProducer()
                self.sendString(DIGEST + self._sent.digest())
                self._report()

    def _report(self) -> None:
        """Tell the other side that we have everything, as soon as we have also sent everything."""
        if self._checked and not self._unsent:
            self.sendString(RECEIVED)

    def stringReceived(self, string: bytes) -> None:
        kind, rest = string[:1], string[1:]
        if kind == DATA:
            before = self._received_bytes
            self._received_bytes += len(rest)
            self._received.update(rest)
            if before < self._half <= self._received_bytes:
                tell("half received")
        elif kind == DIGEST:
            assert rest == self._received.digest(), "the SHA-256 differs"
            self._checked = True
            tell("bulk received:", self._received_bytes)
            self._report()
        else:
            assert string == RECEIVED, string
            self.done.callback(None)


class Echo(Subchannel):
    """The chat of the side that accepts subchannels."""

    def stringReceived(self, string: bytes) -> None:
        self.sendString(string)


class Chat(Subchannel):
    """The chat of the opener: the next message follows the echo of the last one."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self._stopped: Deferred[None] | None = None

    def send(self) -> None:
        self.number += 1
        self.sendString(b"%d" % self.number)

    def stop(self) -> Deferred[None]:
        """Send no further message, and wait for the echo of the last one."""
        self._stopped = Deferred()
        return self._stopped

    def stringReceived(self, string: bytes) -> None:
        assert string == b"%d" % self.number, string
        if self._stopped:
            stopped, self._stopped = self._stopped, None
            stopped.callback(None)
        else:
            self.send()


class Accepting(protocol.Factory):
    """Accepts one subchannel."""

    def __init__(self, accepted: Subchannel) -> None:
        self.accepted = accepted
        self._is_open = False

    def buildProtocol(self, _: object) -> Subchannel:
        assert not self._is_open
        self._is_open = True
        return self.accepted


async def opener(dilated: Any, bulks: list[Bulk], status: Status, idle_pings: int) -> None:
    """Open all subchannels, and close each of them when it is no longer needed."""
    chat = Chat()
    await dilated.connector_for("chat").connect(Accepting(chat))
    for number, bulk in enumerate(bulks):
        if number:
            await status.more_pings(idle_pings)
            tell("idle until now")
        await dilated.connector_for(f"bulk {number}").connect(Accepting(bulk))
        before = chat.number
        chat.send()
        await bulk.done
        await chat.stop()
        tell("echoes", chat.number - before)
        bulk.transport.loseConnection()
        await bulk.closed
    chat.transport.loseConnection()
    await chat.closed


async def acceptor(dilated: Any, bulks: list[Bulk]) -> None:
    """Accept all subchannels, and wait until the other side has closed them."""
    echo = Echo()
    await dilated.listener_for("chat").listen(Accepting(echo))
    for number, bulk in enumerate(bulks):
        await dilated.listener_for(f"bulk {number}").listen(Accepting(bulk))
    for bulk in bulks:
        await bulk.done
        await bulk.closed
    await echo.closed


def exit_on_error(event: dict[str, Any]) -> None:
    """Print an error, of this program or of the library, and exit.

    The library would close the connection after an error of this program, and connect again.
    """
    if event["isError"]:
        tell("error:", log.textFromEventDict(event))
        os._exit(1)


def main(reactor: Any) -> Deferred[None]:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("role", choices=["open", "accept"])
    parser.add_argument("mailbox", help="the URL of the mailbox server")
    parser.add_argument("code", help="the wormhole code")
    parser.add_argument("--relay", help="tcp:HOST:PORT; none: the relay of the other side")
    parser.add_argument("--size", type=int, required=True, help="bytes in each direction, or more")
    parser.add_argument("--connections", type=int, default=1, help="wait for so many")
    parser.add_argument("--idle-pings", type=int, default=0, help="a second round, after so many")
    parser.add_argument("--ping-interval", type=float, help="seconds")
    log.startLoggingWithObserver(exit_on_error, setStdout=False)
    return Deferred.fromCoroutine(run(reactor, parser.parse_args()))


async def run(reactor: Any, options: argparse.Namespace) -> None:
    status = Status()
    ours = wormhole.create("interop.test", options.mailbox, reactor, dilation=True)
    ours.set_code(options.code)
    dilated = ours.dilate(
        transit_relay_location=options.relay,
        no_listen=True,
        on_status_update=status.update,
        ping_interval=options.ping_interval,
    )
    await dilated.when_dilated()
    rounds = 2 if options.idle_pings else 1
    bulks = [Bulk(options.size, status, options.connections) for _ in range(rounds)]
    if options.role == "open":
        await opener(dilated, bulks, status, options.idle_pings)
    else:
        await acceptor(dilated, bulks)
    tell("subchannels closed")
    result = await ours.close()
    tell("wormhole closed:", result)


task.react(main)
