# SPDX-License-Identifier: MIT
"""The gateway of transit-relay (`--forward`), which finds partners at another relay.

A gateway takes raw and WebSocket clients. It reads the handshake of a client, connects to the relay
behind it over TCP or a unix socket, and is a raw client there in place of this client. The gateways
bear the CPU cost of WebSocket, and there can be any number of them. All clients meet at the relay
behind, or at the relays behind HAProxy.

    Target              the relay behind: its addresses, and whether it expects PROXY headers
    PlainAddresses      gives a Peer the address of its client, for the PROXY header
    Gateway             takes the place of the Rendezvous: it dials instead of matching
    ClientSession       the Session of a client
    BackendSession      the Session of a connection to the relay behind
    BackendConnection   such a connection

Client and backend are a Pair from the handshake on, before the relay behind has answered. So
backpressure, rates and the end of a pair, from either side, work as in a relay. The limit for idle
pairs begins with the answer.

The path of a client:

 1. The handshake line has arrived. `Gateway.refusal` makes room for a second connection.
 2. `Gateway.join` queues the PROXY header and the handshake line, and dials: it begins to connect.
    The client is in the state `forwarded`. What it sends before the answer is sent on: the relay
    behind then refuses it as impatient. During the dial the client is not read.
 3. If the dial fails, `Gateway.dial_failed` tries one other address of the target.
 4. `BackendSession.line_received` acts on the answer. After `ok` the pair relays, like any other.

transit_relay imports this module if `--forward` is given.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple, Union

from transit_relay import (
    BAD_HANDSHAKE,
    CONNECTIONS,
    IMPATIENT,
    IPV4,
    LOCAL_PEER,
    MAX_SOCKET_PATH_BYTES,
    OK,
    PROXY_PREFIX,
    UNHEALTHY_SECONDS,
    Addresses,
    Connection,
    Endpoint,
    Handshake,
    Limit,
    Listener,
    Pair,
    Peer,
    RawFraming,
    Reason,
    Rendezvous,
    Role,
    Server,
    Session,
    StartupError,
    State,
    Tally,
    TimeLimit,
    UsageError,
    error_text,
    parse_number,
    set_options,
    socket_options,
)

DIAL_SECONDS = 5  # the time limit of a dial
DIAL_CHECK_SECONDS = 1  # between checks of this limit and of full queues
DIALS = 2  # the most for one client; 1 if the target has one address
# What a relay answers instead of `ok`: it is passed on to the client. A refusal never begins with
# `o`, because clients expect `ok`.
REFUSAL = re.compile(rb"(?!o)[a-z][a-z ]{0,99}")
# The client has made an error. The other refusals are for limits of the relay behind.
CLIENT_ERRORS = (BAD_HANDSHAKE, IMPATIENT)

# A PROXY header, version 2: https://www.haproxy.org/download/2.6/doc/proxy-protocol.txt, 2.2.
V2_SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
V2_LOCAL = V2_SIGNATURE + b"\x20\0\0\0"  # without an address
V2_PROXY = V2_SIGNATURE + b"\x21"
V2_TCP4, V2_TCP6 = 0x11, 0x21

WILDCARDS = ("::", "0.0.0.0")
# The family, and what `connect` takes: the path of a unix socket, or a host, a port and more.
SocketAddress = tuple[int, Union[str, tuple[Any, ...]]]


# The relay behind ----------------------------------------------------------------------------


class Target(NamedTuple):
    """The value of `--forward`."""

    text: str
    host: str  # empty for a unix socket
    port: int
    path: str
    sends_proxy_header: bool  # at the beginning of each connection

    def resolve(self) -> list[SocketAddress]:
        """Return the addresses of the target. Raises StartupError.

        This can take as long as the system's resolver.
        """
        if self.path:
            return [(int(socket.AF_UNIX), self.path)]
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise StartupError(f"--forward {self.text}: {error_text(error)}") from None
        except UnicodeError:  # Python encodes the name before it asks the system
            reason = "the host is no address and no name"
            raise StartupError(f"--forward {self.text}: {reason}") from None
        addresses: list[SocketAddress] = []
        why: OSError | None = None
        for family, _, _, _, address in found:
            try:
                socket.socket(family, socket.SOCK_STREAM).close()
                addresses.append((int(family), address))
            except OSError as error:  # no IPv6, or a sandbox
                why = error
        if why is not None and not addresses:
            raise StartupError(f"--forward {self.text}: {error_text(why)}")
        return list(dict.fromkeys(addresses))

    def require_other(
        self,
        addresses: Sequence[SocketAddress],
        endpoints: Sequence[Endpoint],
        listeners: Sequence[Listener],
    ) -> None:
        """Raise StartupError if one of the addresses is an endpoint of this relay.

        A rehearsal opens no new unix socket, so the paths of endpoints count too.
        """
        paths = {os.path.realpath(one.path) for one in endpoints if one.path}
        for family, address in addresses:
            is_own = any(is_address_of(one.sock, family, address) for one in listeners)
            if is_own or (isinstance(address, str) and os.path.realpath(address) in paths):
                raise StartupError(f"--forward {self.text}: this relay listens there itself")

    @property
    def addresses_class(self) -> type[Addresses]:
        """The class that judges where clients come from."""
        return PlainAddresses if self.sends_proxy_header else Addresses

    def make_gateway(self, *arguments: Any, **options: Any) -> Gateway:
        """Return a Gateway to this target. The values are those of its constructor."""
        return Gateway(self, *arguments, **options)


def is_address_of(listener: socket.socket, family: int, address: Any) -> bool:
    """Return whether a connection to an address comes to a listening socket."""
    own = listener.getsockname()
    if listener.family == socket.AF_UNIX or family == socket.AF_UNIX:
        is_path = listener.family == family and isinstance(own, str)
        return is_path and os.path.realpath(own) == os.path.realpath(address)
    own_host, host = host_of(own), host_of(address)
    is_dual = listener.family == socket.AF_INET6 and not listener.getsockopt(
        socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
    )
    has_family = is_dual or (listener.family == socket.AF_INET) == ("." in host)
    if own[1] != address[1] or not has_family:
        return False
    if host in WILDCARDS:  # as a target, it is this machine
        return own_host in (*WILDCARDS, "127.0.0.1", "::1")
    return own_host == host or (own_host in WILDCARDS and is_local(family, address))


def host_of(address: Any) -> str:
    """Return the host of an IPv4 or IPv6 address. One that is IPv4-mapped is written as IPv4."""
    return str(address[0]).removeprefix("::ffff:")


def is_local(family: int, address: Any) -> bool:
    """Return whether an IPv4 or IPv6 address is one of this machine's."""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # this sends nothing
            # The system sends from a loopback address to this machine only.
            return host_of(probe.getsockname()) in (host_of(address), "127.0.0.1", "::1")
    except OSError:
        return False


def parse_target(text: str) -> Target:
    """Parse the value of `--forward`. Raises UsageError.

    An IPv6 address is in brackets, or its colons are written `\\:` as in an endpoint.
    """
    prefix = PROXY_PREFIX if text.startswith(PROXY_PREFIX) else ""
    plain = text[len(prefix) :]
    if plain.startswith("unix:"):
        path = plain[len("unix:") :].replace("\\:", ":")
        if not path or "\0" in path:
            raise UsageError(f"{text!r}: the path is missing, or has a null character")
        if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
            raise UsageError(f"{text!r}: the path is longer than {MAX_SOCKET_PATH_BYTES} bytes")
        return Target(text, "", 0, path, bool(prefix))
    match = re.fullmatch(r"tcp:(?:\[([^][]+)\]|((?:\\:|[^][:])+)):([0-9]+)", plain)
    port = parse_number(match[3], 65535) if match else None
    if match is None or not port:
        raise UsageError(
            f"{text!r} is not of the form {prefix}tcp:HOST:PORT or {prefix}unix:PATH"
            " (PORT: from 1 to 65535)"
        )
    host = match[1] or match[2].replace("\\:", ":")
    return Target(text, host, port, "", bool(prefix))


def proxy_header(address: bytes | None) -> bytes:
    """Return a PROXY header of version 2.

    `address`: bytes as in the section Addresses; None: a local client, and the header then has no
    address. The client's port, and the address that it connected to, are zeros in the header.
    """
    if address is None:
        return V2_LOCAL
    family = V2_TCP4 if address.startswith(IPV4) else V2_TCP6
    content = address[1:] + bytes(len(address) - 1) + bytes(4)
    return V2_PROXY + bytes((family,)) + len(content).to_bytes(2, "big") + content


class PlainAddresses(Addresses):
    """Judges where clients come from. A Peer has the address in place of its keyed hash."""

    def source_of(self, address: bytes) -> bytes:
        """Return the address itself."""
        return address


# The rendezvous ------------------------------------------------------------------------------


class ClientSession(Session):
    r"""The Session of a client of a gateway.

    It has one state more. tests/test_gateway.py executes this table.

    state         input      next       reply
    ------------  ---------  ---------  ---------
    wait_partner  forwarded  forwarded  -
    forwarded     bytes      forwarded  -
    forwarded     matched    relaying   ok\n
    forwarded     refused    done       a refusal
    forwarded     end        done       -
    forwarded     left       done       -

    left: the connection to the relay behind has ended.
    """

    __slots__ = ()

    def forwarded(self, pair: Pair) -> None:
        """Enter a pair with the relay behind, which has not answered yet."""
        assert self.state is State.WAIT_PARTNER, self
        self.pair = pair
        self.state = State.FORWARDED

    def refused(self, refusal: bytes) -> None:
        """End with the refusal of the relay behind."""
        assert self.state is State.FORWARDED, self
        self.handshake_failed("refused_behind")
        reason = Reason.ENDED if refusal in CLIENT_ERRORS else Reason.REFUSED
        self._end(None, refusal, reason)

    def partner_left(self, reason: Reason) -> None:
        """End because the connection to the relay behind has ended."""
        if self.state is State.FORWARDED:
            self.rendezvous.forget(self)
            self.handshake = None
        super().partner_left(reason)


class BackendSession(Session):
    """The Session of a connection to the relay behind: the partner of a client.

    It is in the state `relaying` from the start. Its first line is the answer to the handshake.
    """

    __slots__ = ()

    transport: BackendConnection
    rendezvous: Gateway

    def __init__(self, *arguments: Any) -> None:
        """The values are those of a Session."""
        super().__init__(*arguments)
        self.state = State.RELAYING  # `forwarded` sets the pair that belongs to this state

    def forwarded(self, pair: Pair) -> None:
        """Enter the pair of a client."""
        self.pair = pair

    def line_received(self, line: bytes) -> None:
        """Act on the answer of the relay behind (without its newline)."""
        pair = self.pair
        if pair is None:  # the client has left
            return
        self.transport.is_answered = True
        client = pair.partner_of(self)
        if line + b"\n" == OK:
            self.rendezvous.answered(pair, client)
        elif REFUSAL.fullmatch(line):
            assert isinstance(client, ClientSession)
            client.refused(line + b"\n")
        else:
            self.rendezvous.note("the relay behind does not answer like a relay")
            client.handshake_failed("not_forwarded")
            client.client_ended(Reason.REFUSED)

    def client_ended(self, reason: Reason = Reason.ENDED) -> None:
        """End, because the relay behind closed the connection, the dial failed, the connection
        broke, a time limit passed, the gateway stops, or there was a fault.

        If there was no answer and the end is not orderly, it counts as `not_forwarded`.
        """
        transport, pair = self.transport, self.pair
        if pair is not None and not transport.is_answered and not transport.has_orderly_end:
            pair.partner_of(self).handshake_failed("not_forwarded")
            reason = Reason.REFUSED if reason is Reason.ENDED else reason
        super().client_ended(reason)


class Gateway(Rendezvous):
    """Joins each client to a connection of its own to the relay behind.

    `waiting` has the clients that the relay behind has not answered. Several clients of one token
    may be among them, because that relay matches clients, not the gateway.
    """

    CARRIED = (*Rendezvous.CARRIED, "_next", "_problems", "target_addresses", "unreachable_until")

    is_gateway = True
    make_session: ClassVar[type[Session]] = ClientSession

    def __init__(
        self,
        target: Target,
        addresses: Sequence[Sequence[Any]],
        keepalive_seconds: float,
        *arguments: Any,
        **options: Any,
    ) -> None:
        """Make a Gateway. The last values are those of a Rendezvous.

        `addresses`: from `Target.resolve`, in this process or in the rehearsal of a reload.
        """
        super().__init__(*arguments, **options)
        self.sends_proxy_header = target.sends_proxy_header
        self.target_addresses: tuple[SocketAddress, ...] = tuple(
            # JSON has turned tuples into lists.
            (family, tuple(address) if isinstance(address, list) else address)
            for family, address in addresses
        )
        self._next = 0  # the index of the address that the next dial takes
        self._problems = Tally()
        self.dials = TimeLimit(DIAL_SECONDS)
        self._options = socket_options(keepalive_seconds)
        self._loop: Server  # set by `attach`

    def attach(self, loop: Server) -> None:
        """Work in the loop of a Server, whose Rendezvous this is."""
        super().attach(loop)
        self._loop = loop
        loop.timers.every(DIAL_CHECK_SECONDS, self._check_dials)

    def resume(self, place: Mapping[str, Any]) -> None:
        """Go on after a reload. Forget what is known of another target."""
        fields = dict(place)
        before, index = fields.pop("target_addresses"), fields.pop("_next")
        if {*before} == {*self.target_addresses}:  # a resolver may change the order
            self._next = self.target_addresses.index(before[index])
        else:
            del fields["_problems"], fields["unreachable_until"]
        super().resume(fields)

    def refusal(self, newcomer: Session) -> Limit | None:
        """Return the limit that prevents a second connection for the newcomer, or None.

        Other clients can be evicted for it. `--max-waiting-per-source` is for the relay behind.
        """
        loop = self._loop
        loop.timers.handshaking.cancel(newcomer.transport)  # so that it is not evicted itself
        if not loop.limits.has_room():
            return Limit.CONNECTIONS
        return None if loop.has_descriptor() else Limit.DESCRIPTORS

    # Dialling.

    def join(self, newcomer: Session) -> None:
        """Dial for a client, and send its handshake on."""
        handshake, source = newcomer.handshake, newcomer.source
        assert handshake is not None and isinstance(newcomer, ClientSession)
        first_bytes = handshake_line(handshake)
        if self.sends_proxy_header:
            first_bytes = proxy_header(source) + first_bytes
            # From here on the hash of the address is enough.
            newcomer.source = source and Addresses.source_of(self.addresses, source)
        self._add(handshake.token, newcomer)
        address = self.target_addresses[self._next]
        try:
            sock = make_socket(address[0], self._options)
        except OSError as error:
            self._note_failure(error_text(error))  # of this machine, so the gateway stays healthy
            newcomer.handshake_failed("not_forwarded")
            newcomer.client_ended(Reason.REFUSED)
            return
        try:
            backend = BackendConnection(sock, self._loop)
        except Exception:
            sock.close()
            raise
        backend.address = address
        backend.is_unpolled = True  # until the dial
        self._loop.add(backend)
        self.dials.start(backend, self._loop.clock())  # `_check_dials` ends it, also after a fault
        pair = Pair(newcomer, backend.session)
        pair.waiting_time = None  # it is not answered
        pair.is_direct = False  # the gateway reads the answer
        self._rates.join(pair)
        self.pairs.add(pair)
        newcomer.forwarded(pair)
        backend.session.forwarded(pair)
        backend._set_backlog(bytearray(first_bytes))
        self._connect(backend)

    def _connect(self, backend: BackendConnection) -> None:
        """Connect, or begin to. If the queue of a unix socket is full, do it again later."""
        code = backend.sock.connect_ex(backend.address[1])
        if code in (0, errno.EINPROGRESS, errno.EISCONN):
            backend.is_unpolled = False
            self._loop.update_interest(backend)
        elif code != errno.EAGAIN:  # else `_check_dials` calls this again
            self.dial_failed(backend, os.strerror(code))

    def connected(self, backend: BackendConnection) -> None:
        """Note that a connection is made."""
        self.dials.cancel(backend)
        if backend.address in self.target_addresses:  # else it is of the target before a reload
            self.unreachable_until = float("-inf")

    def dial_failed(self, backend: BackendConnection, why: str) -> None:
        """Dial another address, if the client has a dial left. Otherwise end the client."""
        session, addresses = backend.session, self.target_addresses
        self._note_failure(why)
        if backend.address == addresses[self._next]:  # else another client has seen it fail
            self._next = (self._next + 1) % len(addresses)
        has_other = any(one != backend.address for one in addresses)
        if session.pair is not None and backend.dials_left and has_other:
            backend.dials_left -= 1
            backend.close_socket()  # first: there may be no other free descriptor
            backend.address = addresses[self._next]
            try:
                sock = make_socket(backend.address[0], self._options)
            except OSError as error:
                self._note_failure(error_text(error))
            else:
                backend.sock, backend.fd = sock, sock.fileno()
                self.dials.start(backend, self._loop.clock())
                self._connect(backend)
                return
        if backend.address in addresses:  # else it is of the target before a reload
            self.unreachable_until = self._loop.clock.monotonic() + UNHEALTHY_SECONDS
        session.client_ended()
        backend.doom()

    def _note_failure(self, why: str) -> None:
        self.note(f"no connection to the relay behind: {why}")

    def note(self, what: str) -> None:
        """Log a problem. The same one is logged at most once a minute."""
        self._problems.note(what, self._loop.clock(), logging.WARNING, what)

    def _check_dials(self) -> None:
        """End the dials that take too long. Connect to full queues again."""
        now, guard = self._loop.clock(), self._loop.faults.guard
        for backend in self.dials.take_expired(now):
            assert isinstance(backend, BackendConnection)
            self.dials.start(backend, now)  # a fault must not let it go on for ever
            guard(partial(self.dial_failed, backend, os.strerror(errno.ETIMEDOUT)), backend)
        # Unpolled: the queue of a unix socket was full, or may have been before a reload.
        for backend in [one for one in self.dials.connections() if one.is_unpolled]:
            assert isinstance(backend, BackendConnection)
            is_needed = backend.session.pair is not None
            guard(partial(self._connect, backend) if is_needed else backend.doom, backend)

    # Answers and ends.

    def answered(self, pair: Pair, client: Session) -> None:
        """Let the pair of a client begin: the relay behind has found a partner."""
        self.forget(client)
        pair.waiting_time = self.clock() - pair.accepted
        pair.is_direct = client.transport.framing.is_raw
        client.matched(pair)
        client.start_relaying()

    def pair_ended(self, pair: Pair) -> None:
        """Count a pair that is over. A gateway has no records."""
        if pair.waiting_time is None:
            self._rates.leave(pair)
            self.pairs.discard(pair)
            self.counters.ended_bytes += pair.total_bytes
            # The first name is that of the backend, which is raw.
            self.counters.ended["lonely", pair.transports.split("-")[1]] += 1
        else:
            super().pair_ended(pair)
            self.counters.ended["happy", "tcp"] -= 1  # `super` counted the backend as a client


def make_socket(family: int, options: Sequence[tuple[int, int, int]]) -> socket.socket:
    """Return a non-blocking socket for a dial. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    set_options(sock, options)
    return sock


def handshake_line(handshake: Handshake) -> bytes:
    """Return the line that parse_handshake accepts, with its newline."""
    side = b"" if handshake.side is None else b" for side " + handshake.side
    return b"please relay " + handshake.token + side + b"\n"


# The connection to the relay behind ----------------------------------------------------------


class BackendConnection(Connection):
    """A connection to the relay behind, for one client. Its phase is `open` during the dial too.

    A second dial takes a second socket.
    """

    __slots__ = ("address", "dials_left", "has_failed", "is_answered", "is_connected")
    CARRIED = (*Connection.CARRIED, *__slots__)

    session: BackendSession

    def __init__(
        self,
        sock: socket.socket,
        server: Server,
        role: Role = Role.PORT,
        peer: Peer = LOCAL_PEER,
        has_proxy_header: bool = False,
    ) -> None:
        """The values are those of a Connection."""
        super().__init__(sock, server, role, peer, has_proxy_header)
        rendezvous = server.rendezvous
        assert isinstance(rendezvous, Gateway)
        # These replace the session and the framing of a client.
        self.session = BackendSession(self, rendezvous, self.session.started)
        self.framing = RawFraming(self.session, self)
        self.address: SocketAddress = (0, "")  # of the last dial
        self.dials_left = DIALS - 1  # how many, if the first one fails
        self.is_connected = False
        self.is_answered = False  # the first line of the relay behind is read
        self.has_failed = False  # the socket had an error before that line

    @property
    def has_orderly_end(self) -> bool:
        """Whether the relay behind has closed the connection, without an error.

        A reset that comes while `on_ready` runs is taken for such an end.
        """
        return self._peer_ended and not (self.has_failed or self._write_failed)

    def on_ready(self, mask: int) -> None:
        """Note that the connection is made or has failed. Then do as any Connection."""
        if self.mask and not self.is_answered:  # 0: an earlier event of this turn closed it
            # This clears the error: a later read does not report it.
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            gateway = self.session.rendezvous
            if not self.is_connected and code:
                gateway.dial_failed(self, os.strerror(code))
                return
            if not self.is_connected:
                self.is_connected = True
                gateway.connected(self)
            self.has_failed = self.has_failed or code != 0
        super().on_ready(mask)

    def finish(self, reason: Reason) -> None:
        """Let the connection end. During a dial, close it at once: nothing can be sent."""
        super().finish(reason)
        if not self.is_connected:
            self.doom()

    def resume(self, place: Mapping[str, Any]) -> None:
        """Go on after a reload. The time of a dial begins again."""
        super().resume(place)
        if not self.is_connected:
            self.is_unpolled = self.sock.family == socket.AF_UNIX  # its queue may be full
            self.session.rendezvous.dials.start(self, self._server.clock())

    def close_socket(self) -> None:
        """Close the socket now. Another one must take its place, or `doom` must follow."""
        self.is_unpolled = True
        self._server.update_interest(self)
        self.sock.close()

    def close(self) -> None:
        """Close the socket and discard the backlog."""
        self.session.rendezvous.dials.cancel(self)
        super().close()


CONNECTIONS["BackendConnection"] = BackendConnection
