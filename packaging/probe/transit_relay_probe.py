#!/usr/bin/env python3
# SPDX-License-Identifier: MIT
"""Probe a transit relay of Magic Wormhole: connect two clients to it and transfer random bytes.

The probe is a client, so it works with any relay. It is one file, to copy to the machine that
monitors. With ws_frames.py of transit-relay beside it, it also probes ws:// and wss:// endpoints.

    Failures        every way to fail, by its cause
    Endpoints       what the command line names
    Time            Deadline: the time limit, all waiting, and the progress on a terminal
    Connections     name lookup, TCP and TLS
    Clients         Client, WebSocketClient: the bytes of one connection
    Probe           pair, round trips and transfers; the Result
    Output          text, JSON, a line for Nagios, a file for Prometheus's node exporter
    Command line    options, repetition, exit code

Sockets are non-blocking, and only `Deadline.wait` waits for them. Token and sides are random for
each probe. The probe prints neither; an answer that repeats them is shortened.
"""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import re
import secrets
import select
import shutil
import socket
import ssl
import stat
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from enum import IntEnum
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TextIO

try:
    import ws_frames
except ModuleNotFoundError as error:  # only this file was copied: TCP endpoints only
    if error.name != "ws_frames":
        raise
    ws_frames = None  # type: ignore[assignment]

__version__ = "0.1"

PROGRAM = "transit-relay-probe"
OK = b"ok\n"
REFUSALS = (
    *(b"bad handshake\n", b"impatient\n", b"relay full\n"),
    *(b"too many waiting\n", b"not allowed\n", b"quota used up\n"),
)
PHASES = ("connect1", "connect2", "pair", "round_trip")  # see Result
ROUND_TRIPS = 5  # the median counts: one delayed packet has no effect
ROUND_TRIP_BYTES = 16
MESSAGE_BYTES = 32 * 1024  # a piece of a transfer; over WebSocket a message
READ_BYTES = 256 * 1024  # more than a TLS record: `recv` leaves no decrypted bytes behind
MAX_BYTES = 1 << 30  # of --bytes: the data is in memory
ANSWER_SECONDS = 1.0  # for the relay's reason, after another sign of a refusal
PROGRESS_SECONDS = 1.0  # until the progress is shown
PROGRESS_INTERVAL = 0.2  # s between two updates of the progress

# Failures ------------------------------------------------------------------------------------


class State(IntEnum):
    """The state of a result; its value is the exit code of a Nagios plugin."""

    OK = 0
    WARNING = 1
    CRITICAL = 2
    UNKNOWN = 3


FAILURES = {  # the kinds, as JSON and metrics name them
    # The network:
    "no_such_host": "the name cannot be resolved",
    "refused": "the connection was refused, or there is no route",
    "no_answer": "the time limit passed while nothing came",
    "closed": "the connection ended early",
    # The server:
    "certificate": "the certificate is for another name, not valid now, "
    "or of a CA that is not trusted",
    "not_a_relay": "the server answered what no relay answers",
    # The relay, or a proxy before it:
    "relay_refused": "the relay or a proxy refused a client; "
    "the reason has its text or the HTTP status",
    "bytes_differ": "other bytes arrived than were sent",
    "slow": "a threshold was missed, or the time limit passed during a transfer",
    # This machine:
    "local": "this machine cannot probe; the state is UNKNOWN",
}


class Failure(Exception):
    """The end of a probe. `kind` is one of FAILURES, the text is one line."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


# Endpoints -----------------------------------------------------------------------------------

TCP_ENDPOINT = re.compile(r"tcp:(?:\[([0-9A-Za-z:.%_-]+)\]|([0-9A-Za-z._-]+)):([0-9]{1,5})")


class Endpoint(NamedTuple):
    """Where a client connects to."""

    text: str  # as on the command line
    scheme: str  # tcp, ws or wss
    host: str
    port: int
    target: str = ""  # of the HTTP request
    authority: str = ""  # for the Host field of the request

    @classmethod
    def parse(cls, text: str) -> Endpoint:
        """Parse `tcp:HOST:PORT` or a WebSocket URL: RFC 6455, 3. Raises ArgumentTypeError."""
        tcp = TCP_ENDPOINT.fullmatch(text)
        if tcp and 0 < int(tcp[3]) < 1 << 16:
            return cls(text, "tcp", tcp[1] or tcp[2], int(tcp[3]))
        if ws_frames is None and text.lower().startswith(("ws://", "wss://")):
            raise argparse.ArgumentTypeError(f"{text} needs ws_frames.py beside this program")
        if ws_frames is not None and ws_frames.URL.fullmatch(text):
            with suppress(ValueError):  # a wrong port, or wrong brackets
                url = urllib.parse.urlsplit(text)
                port = url.port if url.port is not None else {"ws": 80, "wss": 443}[url.scheme]
                target = (url.path or "/") + (f"?{url.query}" if url.query else "")
                if url.hostname and port:
                    return cls(text, url.scheme, url.hostname, port, target, url.netloc)
        raise argparse.ArgumentTypeError(
            f"{text!r} is not tcp:HOST:PORT, ws://HOST/ or wss://HOST/"
        )


# Time ----------------------------------------------------------------------------------------


class Deadline:
    """The time limit of one probe. It waits for sockets, and shows the progress meanwhile."""

    def __init__(
        self, seconds: float, terminal: TextIO | None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """`seconds`: the limit. `terminal`: where the progress is shown; None: nowhere."""
        self.seconds = seconds
        self.clock = clock
        self._started = clock()
        self.end = self._started + seconds
        self._terminal = terminal
        self._next_update = self._started + PROGRESS_SECONDS
        self._is_shown = False
        self._who = self._doing = ""

    def begin(self, who: str, doing: str) -> None:
        """Set what the progress shows, and what a failure for the time limit says."""
        self._who, self._doing = who, doing

    def wait(
        self,
        readers: Sequence[socket.socket | Client],
        writers: Sequence[socket.socket | Client],
        until: float = math.inf,
    ) -> tuple[list[Any], list[Any]]:
        """Wait for sockets. Return those that are ready, or none at the time `until`.

        Raises Failure (no_answer) at the time limit, if that comes first.
        """
        while True:
            now = self.clock()
            if now >= until:
                return [], []
            if now >= self.end:
                limit = f"no answer within {self.seconds:g} s"
                raise Failure("no_answer", f"{self._who}: {limit} while {self._doing}")
            if self._terminal is not None and now >= self._next_update:
                text = f"{self._who}: {self._doing}, {now - self._started:.0f} s"
                width = shutil.get_terminal_size().columns - 1  # a longer line would wrap
                self._terminal.write(f"\r\033[K{text[:width]}")
                self._terminal.flush()
                self._next_update, self._is_shown = now + PROGRESS_INTERVAL, True
            pause = min(self.end, until, now + PROGRESS_INTERVAL) - now
            readable, writable, _ = select.select(readers, writers, [], pause)
            if readable or writable:
                return readable, writable

    def clear(self) -> None:
        """Remove the progress from the terminal."""
        if self._terminal is not None and self._is_shown:
            self._terminal.write("\r\033[K")
            self._terminal.flush()


# Connections ---------------------------------------------------------------------------------

WOULD_BLOCK = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


def look_up(endpoint: Endpoint, deadline: Deadline) -> list[Any]:
    """Return the addresses of the host, as `getaddrinfo` does. Raises Failure and OSError.

    It runs in a thread, because the resolver may take longer than the time limit. A daemon thread
    does not delay the exit.
    """
    answers: list[Any] = []
    reader, writer = socket.socketpair()

    def ask() -> None:
        try:
            host, port = endpoint.host, endpoint.port
            answers.append(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:  # UnicodeError: a label is empty or too long
            answers.append(error)
        with suppress(OSError):  # the probe has ended
            writer.send(b"\0")

    deadline.begin(endpoint.text, "looking up its name")
    with reader, writer:
        threading.Thread(target=ask, daemon=True).start()
        deadline.wait([reader], [])
    (answer,) = answers
    if isinstance(answer, list):
        return answer
    if not isinstance(answer, (socket.gaierror, UnicodeError)):
        raise answer  # such as too many open files
    is_temporary = isinstance(answer, socket.gaierror) and answer.errno == socket.EAI_AGAIN
    reason = "temporary failure in name resolution" if is_temporary else "no such host"
    raise Failure("no_such_host", f"{endpoint.text}: {reason}")


def connect_to(info: Any, deadline: Deadline, until: float, stack: ExitStack) -> socket.socket:
    """Connect to an address of `look_up`. Raises Failure. `stack` closes the socket."""
    family, type_, protocol, _, address = info
    try:
        sock = stack.enter_context(socket.socket(family, type_, protocol))
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        code = sock.connect_ex(address)
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:  # the next address may have another family
            raise
        code = error.errno
    if code == errno.EINPROGRESS:
        limit = f"{max(until - deadline.clock(), 0):.1f} s"
        if not any(deadline.wait([], [sock], until)):
            raise Failure("no_answer", f"no answer within {limit} while connecting")
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if code:
        kind = {errno.ETIMEDOUT: "no_answer", errno.ECONNRESET: "closed"}.get(code, "refused")
        raise Failure(kind, os.strerror(code).lower())
    return sock


def connect(endpoint: Endpoint, deadline: Deadline, stack: ExitStack) -> socket.socket:
    """Connect to the first address of the host that answers. Raises Failure.

    Each address gets an equal part of the time that is left.
    """
    infos = look_up(endpoint, deadline)
    deadline.begin(endpoint.text, "connecting")
    kind, reasons = "", []
    for left, info in zip(range(len(infos), 0, -1), infos):
        now = deadline.clock()
        until = min(deadline.end, now + (deadline.end - now) / left)
        try:
            return connect_to(info, deadline, until, stack)
        except Failure as failure:
            kind = failure.kind
            reasons.append(f"{info[4][0]}: {failure}" if len(infos) > 1 else str(failure))
    raise Failure(kind, f"{endpoint.text}: {'; '.join(reasons)}")


def start_tls(
    sock: socket.socket,
    endpoint: Endpoint,
    context: ssl.SSLContext,
    deadline: Deadline,
    stack: ExitStack,
) -> ssl.SSLSocket:
    """Do the TLS handshake. Raises Failure. `stack` closes the socket."""
    deadline.begin(endpoint.text, "doing the TLS handshake")
    kind, reason = "closed", "the connection ended in the TLS handshake"
    try:
        sock.getpeername()  # raises OSError after a reset, when `wrap_socket` would leak a socket
        tls = stack.enter_context(
            context.wrap_socket(sock, server_hostname=endpoint.host, do_handshake_on_connect=False)
        )
        while True:
            try:
                tls.do_handshake()
                return tls
            except ssl.SSLWantReadError:
                deadline.wait([tls], [])
            except ssl.SSLWantWriteError:
                deadline.wait([], [tls])
    except ssl.SSLCertVerificationError as error:
        kind, reason = "certificate", f"wrong certificate: {error.verify_message.rstrip('.')}"
    except OSError as error:
        if type(error) is ssl.SSLError and error.reason:  # not the end, nor a reset
            kind, reason = "not_a_relay", f"TLS failed: {error.reason.replace('_', ' ').lower()}"
    raise Failure(kind, f"{endpoint.text}: {reason}")


# Clients -------------------------------------------------------------------------------------


class Client:
    """One client over TCP. `exchange` moves its bytes."""

    def __init__(self, endpoint: Endpoint, sock: socket.socket) -> None:
        self.endpoint = endpoint
        self.inbox = bytearray()  # received payload that is not checked yet
        self._sock = sock
        self.outbox = bytearray()  # encoded bytes to send
        self.end = ""  # how the connection ended

    def fileno(self) -> int:
        """Return the descriptor, for Deadline."""
        return self._sock.fileno()

    def open(self, deadline: Deadline) -> None:
        """Do what precedes the byte stream: over TCP nothing."""

    def send(self, data: bytes | memoryview) -> None:
        """Queue payload."""
        self.outbox += self._encode(data)

    def flush(self) -> None:
        """Send as much as the socket accepts."""
        try:
            del self.outbox[: self._sock.send(self.outbox)]
        except WOULD_BLOCK:
            pass
        except OSError:  # what the server sent before can still be read
            self.outbox.clear()

    def read(self) -> None:
        """Read once, and put the payload into the inbox. Raises Failure (not_a_relay)."""
        try:
            data = self._sock.recv(READ_BYTES)
        except WOULD_BLOCK:
            return
        except OSError as error:
            self.end = self.end or f"the connection was lost: {error.strerror}".lower()
            return
        self.inbox += self._decode(data)
        if not data:
            self.end = self.end or "the server ended the connection"

    def has_ok(self, answer: bytes | bytearray) -> bool:
        """Return whether `answer` is `ok`. False: it is incomplete.

        Nothing may follow: the partner sends nothing before both `ok`. Raises Failure
        (relay_refused, not_a_relay).
        """
        for refusal in REFUSALS:
            if answer.startswith(refusal):
                text = refusal.decode("ascii").strip()
                raise self.failure("relay_refused", f"the relay refused a client: {text}")
        if not any(known.startswith(answer) for known in (OK, *REFUSALS)):
            raise self.failure("not_a_relay", describe(answer, self.endpoint.scheme))
        return answer == OK

    def leave(self) -> None:
        """Send what is queued, without waiting, before the stack closes the socket."""
        self.flush()

    def failure(self, kind: str, reason: str) -> Failure:
        """Return a failure of this client."""
        return Failure(kind, f"{self.endpoint.text}: {reason}")

    def _encode(self, data: bytes | memoryview) -> bytes | memoryview:
        return data

    def _decode(self, data: bytes) -> bytes | bytearray:
        return data


class WebSocketClient(Client):
    """One client over WebSocket. The payload is in binary messages. The numbers are of RFC 6455."""

    def __init__(self, endpoint: Endpoint, sock: socket.socket) -> None:
        super().__init__(endpoint, sock)
        self._nonce = secrets.token_bytes(16)
        self._reader = ws_frames.AnswerReader(self._nonce)
        self._answer = bytearray()  # of the server to the upgrade, all that has come
        self._parser = ws_frames.FrameParser(must_be_masked=False)
        self._is_open = False  # the server has accepted the upgrade
        self._is_refused = False  # the server has not accepted it

    def open(self, deadline: Deadline) -> None:
        """Upgrade the connection: 4.1. Raises Failure (relay_refused, not_a_relay, closed)."""
        host, target = self.endpoint.authority, self.endpoint.target
        deadline.begin(self.endpoint.text, "upgrading to WebSocket")
        self.outbox += ws_frames.upgrade_request(host, target, self._nonce)
        try:
            while not self._is_open:
                exchange([self], deadline)
        except ws_frames.UpgradeFailed as error:
            status = ws_frames.STATUS_LINE.match(self._answer)
            if status is None or status[1] == b"101":
                raise self.failure("not_a_relay", f"not a WebSocket server: {error}") from None
            reason = f"the upgrade was refused: HTTP status {status[1].decode('ascii')}"
            raise self.failure("relay_refused", reason + self._refusal(deadline)) from None

    def _refusal(self, deadline: Deadline) -> str:
        """Return what the relay says in its HTTP answer, if that comes within ANSWER_SECONDS."""
        self._is_refused = True
        until = deadline.clock() + ANSWER_SECONDS
        with suppress(Failure):  # the end of the connection
            while not self._answer.endswith(REFUSALS) and len(self._answer) < READ_BYTES:
                if not exchange([self], deadline, until):
                    break
        said = [text.decode("ascii").strip() for text in REFUSALS if self._answer.endswith(text)]
        return f", {said[0]}" if said else ""

    def leave(self) -> None:
        """End the connection with a Close, without waiting."""
        if self._is_open:
            self.outbox += ws_frames.build_close(ws_frames.NORMAL, secrets.token_bytes(4))
        super().leave()

    def _encode(self, data: bytes | memoryview) -> bytes:
        return ws_frames.build_frame(ws_frames.BINARY, data, key=secrets.token_bytes(4))

    def _decode(self, data: bytes) -> bytes | bytearray:
        """Return the payload in `data`. Queue a Pong for each Ping: 5.5.2."""
        if not self._is_open:
            self._answer += data
            if self._is_refused:
                return b""
            if not b"HTTP/1.".startswith(self._answer[:7]):  # a relay without WebSocket, or junk
                if self.has_ok(self._answer):  # to an HTTP request
                    raise self.failure("not_a_relay", describe(self._answer, self.endpoint.scheme))
                return b""
            rest = self._reader.receive(data)
            if rest is None:
                return b""
            self._is_open, data = True, bytes(rest)
        payload = bytearray()
        try:
            for event in self._parser.receive(memoryview(data)):
                if event.opcode == ws_frames.BINARY:
                    payload += event.payload
                elif event.opcode == ws_frames.PING and len(self.outbox) < READ_BYTES:
                    key = secrets.token_bytes(4)
                    self.outbox += ws_frames.build_frame(ws_frames.PONG, event.payload, key=key)
                elif event.opcode == ws_frames.CLOSE:
                    code = int.from_bytes(event.payload[:2], "big") or "without a code"
                    self.end = f"the server closed the WebSocket: {code}"
                    break
        except ws_frames.ProtocolError as error:
            raise self.failure("not_a_relay", f"wrong WebSocket frames: {error}") from None
        return payload


def exchange(clients: Sequence[Client], deadline: Deadline, until: float = math.inf) -> bool:
    """Let clients send and receive when one can. Return False at `until`. Raises Failure."""
    for client in clients:
        if client.end:
            raise client.failure("closed", client.end)
    writers = [client for client in clients if client.outbox]
    readable, writable = deadline.wait(clients, writers, until)
    for client in writable:
        client.flush()
    for client in readable:
        client.read()
    return bool(readable or writable)


def describe(answer: bytes | bytearray, scheme: str) -> str:
    """Return the reason for an answer that no relay gives. `scheme`: of the endpoint."""
    status = re.match(rb"HTTP/[0-9.]+ ([0-9]{3})", answer)
    if status:
        hint = "; try ws:// or wss://" if scheme == "tcp" else ""
        code = status[1].decode("ascii")
        return f"not a relay: an HTTP server answered with status {code}{hint}"
    if answer.startswith(b"\x15\x03"):  # an alert: RFC 8446, 5.1 and 6
        return "not a relay: a TLS server answered; try wss://"
    # The answer can repeat token and sides, whole or in part. Long words are not shown.
    text = re.sub("[0-9A-Za-z]{8,}", "...", answer.decode("latin-1").strip())
    return f"not a relay: it answered {text[:40]!a}"


# Probe ---------------------------------------------------------------------------------------


class Thresholds(NamedTuple):
    """What makes a result slow. None: no threshold."""

    round_trip: float | None = None  # the longest, in ms
    rate: float | None = None  # the least, in MB/s

    @classmethod
    def parse(cls, text: str) -> Thresholds:
        """Parse `MS,MBPS`. One of the two may be missing. Raises ArgumentTypeError."""
        number = r"([0-9]+(?:\.[0-9]+)?)?"
        match = re.fullmatch(f"{number},{number}", text)
        if not match or text == ",":
            raise argparse.ArgumentTypeError(f"{text!r} is not MS,MBPS (such as 20,5)")
        return cls(*(float(part) if part else None for part in match.groups()))


class Result:
    """What a probe has measured."""

    def __init__(self, endpoints: Sequence[Endpoint], size: int) -> None:
        """`size`: bytes to send each way."""
        self.endpoints = [endpoint.text for endpoint in endpoints]
        self.size = size
        self.started = time.time()  # s since the epoch
        self.duration = 0.0  # s
        # The phases that were reached, in s: connect1 and connect2 (lookup, TCP, TLS and upgrade),
        # pair (from the second handshake to both `ok`), round_trip (to the other client and back).
        self.phases: dict[str, float] = {}
        self.rate: float | None = None  # bytes per second, if both transfers are complete
        self.state = State.OK
        self.failure: Failure | None = None

    def judge(self, warning: Thresholds, critical: Thresholds) -> None:
        """Set state and failure of a complete result. A value on its threshold is not slow."""
        assert self.rate is not None
        round_trip, rate = self.phases["round_trip"] * 1e3, self.rate / 1e6
        for state, limits in (State.CRITICAL, critical), (State.WARNING, warning):
            found = []
            if limits.round_trip is not None and round_trip > limits.round_trip:
                found.append(f"round trip {round_trip:.2f} ms, threshold {limits.round_trip:.12g}")
            if limits.rate is not None and rate < limits.rate:
                found.append(f"{rate:.2f} MB/s, threshold {limits.rate:.12g}")
            if found:
                self.state, self.failure = state, Failure("slow", f"slow: {'; '.join(found)}")
                return


class Probe:
    """Two clients of a relay. `run` fills in the result."""

    def __init__(
        self, result: Result, tls: ssl.SSLContext | None, deadline: Deadline, stack: ExitStack
    ) -> None:
        """`tls`: for wss:// endpoints. `stack`: closes the clients."""
        self._result = result
        self._tls = tls
        self._deadline = deadline
        self._stack = stack
        self._names = " and ".join(dict.fromkeys(result.endpoints))

    def run(self, endpoints: Sequence[Endpoint], data: bytes) -> None:
        """Connect, pair, measure round trips, and transfer `data` both ways. Raises Failure."""
        clock, result = self._deadline.clock, self._result
        token = secrets.token_hex(32)
        one, other = (self._connect(endpoint, token) for endpoint in endpoints)
        started = clock()
        self._pair(one, other)
        result.phases["pair"] = clock() - started
        times = []
        for _ in range(ROUND_TRIPS):
            ping = os.urandom(ROUND_TRIP_BYTES)
            times.append(self._both_ways(one, other, ping, "measuring the round trip"))
        result.phases["round_trip"] = sorted(times)[ROUND_TRIPS // 2]
        seconds = self._both_ways(one, other, data, "transferring")
        result.rate = 2 * result.size / max(seconds, 1e-9)

    def _connect(self, endpoint: Endpoint, token: str) -> Client:
        """Connect a client and send its handshake.

        It is sent at once, because a full relay closes a client without handshake first.
        """
        deadline, result = self._deadline, self._result
        started = deadline.clock()
        sock = connect(endpoint, deadline, self._stack)
        if endpoint.scheme == "wss":
            assert self._tls
            sock = start_tls(sock, endpoint, self._tls, deadline, self._stack)
        client = (Client if endpoint.scheme == "tcp" else WebSocketClient)(endpoint, sock)
        self._stack.callback(client.leave)
        client.open(deadline)
        result.phases[f"connect{len(result.phases) + 1}"] = deadline.clock() - started
        client.send(f"please relay {token} for side {secrets.token_hex(8)}\n".encode("ascii"))
        client.flush()
        return client

    def _pair(self, one: Client, other: Client) -> None:
        """Wait for both `ok`."""
        hint = " (are both of one relay?)" if one.endpoint != other.endpoint else ""
        self._deadline.begin(self._names, f"waiting for `ok`{hint}")
        while sum(client.has_ok(client.inbox) for client in (one, other)) < 2:
            try:
                exchange([one, other], self._deadline)
            except Failure as failure:
                if failure.kind == "closed":
                    self._require_no_refusal(one, other)
                raise
        for client in one, other:
            client.inbox.clear()

    def _require_no_refusal(self, *clients: Client) -> None:
        """Raise Failure (relay_refused) if a client hears of it within ANSWER_SECONDS.

        A full relay can close one client and tell only the other.
        """
        until = self._deadline.clock() + ANSWER_SECONDS
        for client in clients:
            try:
                while exchange([client], self._deadline, until):
                    client.has_ok(client.inbox)
            except Failure as failure:
                if failure.kind == "relay_refused":
                    raise

    def _both_ways(self, one: Client, other: Client, data: bytes, doing: str) -> float:
        """Send `data` from one client to the other, then back. Return the seconds."""
        started = self._deadline.clock()
        self._transfer(one, other, data, doing)
        self._transfer(other, one, data, doing)
        return self._deadline.clock() - started

    def _transfer(self, sender: Client, receiver: Client, data: bytes, doing: str) -> None:
        """Send `data` from one client to the other, and compare what arrives. Raises Failure.

        Bytes after the last transfer of a probe are not read.
        """
        view = memoryview(data)
        sent = arrived = 0
        while arrived < len(data):
            self._deadline.begin(self._names, f"{doing}, {100 * arrived // len(data)} %")
            if sent < len(data) and not sender.outbox:
                sender.send(view[sent : sent + MESSAGE_BYTES])
                sent += MESSAGE_BYTES
            try:
                exchange([sender, receiver], self._deadline)
            except Failure as failure:
                if failure.kind != "no_answer" or not arrived:
                    raise
                came = f"{arrived} of {len(data)} bytes within {self._deadline.seconds:g} s"
                raise Failure("slow", f"{self._names}: slow: {came}") from None
            size = len(receiver.inbox)
            if sender.inbox or size > len(data) - arrived:
                more = "bytes differ: more came than were sent"
                raise Failure("bytes_differ", f"{self._names}: {more}")
            part, expected = receiver.inbox, view[arrived : arrived + size]
            if part != expected:
                place = next(n for n in range(size) if part[n] != expected[n])
                where = f"byte {arrived + place + 1} of {len(data)}"
                raise receiver.failure("bytes_differ", f"bytes differ: {where} has changed")
            receiver.inbox.clear()
            arrived += size


def run_probe(options: argparse.Namespace) -> Result:
    """Run one probe. Return its result, also if it failed."""
    result = Result(options.endpoints, options.bytes)
    started = time.monotonic()
    try:
        has_tls = any(endpoint.scheme == "wss" for endpoint in options.endpoints)
        tls = tls_context(options.ca) if has_tls else None  # before the time limit begins
        data = os.urandom(options.bytes)  # the same: 1 GiB can take 10 s
        with ExitStack() as stack:
            deadline = Deadline(options.timeout, sys.stderr if sys.stderr.isatty() else None)
            stack.callback(deadline.clear)
            Probe(result, tls, deadline, stack).run(options.endpoints, data)
        result.judge(options.warning, options.critical)
    except Failure as failure:
        result.state = State.UNKNOWN if failure.kind == "local" else State.CRITICAL
        result.failure = failure
    except (OSError, MemoryError, RuntimeError, ValueError) as error:
        result.state = State.UNKNOWN  # RuntimeError: no thread; ValueError: descriptor 1024
        result.failure = Failure("local", f"cannot probe: {str(error) or 'out of memory'}")
    result.duration = time.monotonic() - started
    return result


def tls_context(ca: str | None) -> ssl.SSLContext:
    """Return the settings for TLS. Raises Failure (local).

    `ca`: a file with the certificates to trust. None: those of the system.
    """
    try:
        return ssl.create_default_context(cafile=ca)
    except ssl.SSLError:
        raise Failure("local", f"--ca {ca}: no certificate can be read from it") from None
    except OSError as error:
        raise Failure("local", f"--ca {ca}: {error.strerror}") from None


# Output --------------------------------------------------------------------------------------


def as_text(result: Result) -> str:
    """Return a block for people. The result must be complete."""
    title = f"{PROGRAM}: {result.failure or 'ok'}"
    assert result.rate is not None
    notes = dict(zip(("connect1", "connect2"), result.endpoints))
    lines = [
        f"  {name.replace('_', ' '):10}{seconds * 1e3:10.2f} ms    {notes.get(name, '')}".rstrip()
        for name, seconds in result.phases.items()
    ]
    transfer = f"  transfer  {result.rate / 1e6:10.2f} MB/s  {result.size} bytes each way"
    return "\n".join([title, *lines, transfer])


def as_json(result: Result) -> str:
    """Return one line of JSON."""
    failure = result.failure
    fields = {
        "ok": failure is None,
        "exit_code": int(result.state),
        "failure": failure and failure.kind,
        "reason": failure and str(failure),
        "endpoints": result.endpoints,
        "started": round(result.started, 3),
        "duration_ms": round(result.duration * 1e3, 3),
        **{
            f"{name}_ms": round(result.phases[name] * 1e3, 3) if name in result.phases else None
            for name in PHASES
        },
        "bytes_each_way": result.size,
        "mb_per_s": None if result.rate is None else round(result.rate / 1e6, 3),
    }
    return json.dumps(fields)


def as_nagios(result: Result, warning: Thresholds, critical: Thresholds) -> str:
    """Return one line with performance data: label=value;warning;critical;minimum."""

    def limits(name: str, end: str = "") -> str:
        values = [getattr(thresholds, name, None) for thresholds in (warning, critical)]
        return ";".join("" if value is None else f"{value:.12g}{end}" for value in values)

    data = [f"{name}={s * 1e3:.3f}ms;{limits(name)};0" for name, s in result.phases.items()]
    text = str(result.failure).replace("|", "/")  # a bar begins the performance data
    if result.rate is not None:
        rates = limits("rate", ":")  # a range without an end: less is an alert
        data.append(f"throughput={result.rate / 1e6:.3f}MB;{rates};0")
        if result.failure is None:
            round_trip = result.phases["round_trip"] * 1e3
            text = f"round trip {round_trip:.2f} ms, {result.rate / 1e6:.2f} MB/s"
    return f"TRANSIT-RELAY {result.state.name}: {text}" + (f" | {' '.join(data)}" if data else "")


def as_metrics(result: Result, name: str | None) -> str:
    """Return a file for Prometheus, without addresses. `name`: a label that tells relays apart."""
    kind = result.failure.kind if result.failure else None
    kinds = {f'kind="{other}"': float(other == kind) for other in FAILURES}
    phases = {f'phase="{phase}"': seconds for phase, seconds in result.phases.items()}
    rates = {} if result.rate is None else {"": result.rate}
    families: list[tuple[str, str, dict[str, float]]] = [
        ("success", "1 if the bytes arrived and no threshold was missed", {"": float(not kind)}),
        ("failure", "1 for the kind of the failure, 0 for all others", kinds),
        ("start_timestamp_seconds", "When the probe began", {"": result.started}),
        ("duration_seconds", "How long the probe took", {"": result.duration}),
        ("phase_seconds", "Times of the phases that were reached; round_trip is a median", phases),
        ("transfer_bytes", "Bytes to transfer each way", {"": float(result.size)}),
        ("throughput_bytes_per_second", "Rate of the complete transfers", rates),
    ]
    lines = []
    for metric, text, values in families:
        metric = f"transit_relay_probe_{metric}"
        lines += [f"# HELP {metric} {text}.", f"# TYPE {metric} gauge"] if values else []
        for label, value in values.items():
            labels = ",".join(filter(None, (label, name and f'name="{name}"')))
            lines.append(f"{metric}{{{labels}}} {value!r}" if labels else f"{metric} {value!r}")
    return "\n".join(lines) + "\n"


def replace_file(path: str, text: str) -> None:
    """Replace a regular file. Its readers find the old text or the new one. Raises OSError."""
    if os.path.lexists(path) and not stat.S_ISREG(os.lstat(path).st_mode):  # such as /dev/stdout
        raise OSError(errno.EINVAL, "not a regular file")
    new = Path(f"{path}.new")  # the node exporter reads files whose names end in .prom
    try:
        new.write_text(text, encoding="ascii")
        new.replace(path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def report(result: Result, options: argparse.Namespace) -> None:
    """Print the result in the chosen form, and write the metrics. Raises Failure (local)."""
    if options.json:
        print(as_json(result), flush=True)
    elif options.nagios:
        print(as_nagios(result, options.warning, options.critical), flush=True)
    elif result.rate is None or (options.metrics and result.failure):
        print(f"{PROGRAM}: {result.failure}", file=sys.stderr, flush=True)
    elif not options.metrics:
        print(as_text(result), flush=True)
    if options.metrics:
        try:
            replace_file(options.metrics, as_metrics(result, options.name))
        except OSError as error:
            raise Failure("local", f"--metrics {options.metrics}: {error.strerror}") from None


# Command line --------------------------------------------------------------------------------

SIZE = re.compile(r"([0-9]{1,10}(?:\.[0-9]{1,10})?)(?:(k|Ki|[MG]i?)?B)?")
FACTORS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
OPTIONS = """\
the probe:
--bytes SIZE: send this many bytes each way, at most 1GiB: 500kB, 10MiB (default: 1 MiB)
--timeout SECONDS: end the probe after this many seconds, whatever it waits for (default: 30 s)
--ca FILE: trust the certificates in this file for wss:// (default: those of the system)
--every SECONDS: repeat the probe: begin one every so many seconds (default: one probe)
-w, --warning MS,MBPS: exit with 1 if the round trip is longer or the rate is less (default: none)
-c, --critical MS,MBPS: exit with 2 if the round trip is longer or the rate is less (default: none)

the output:
--json: print one line of JSON for each probe (default: a block of text)
--nagios: print one line with performance data, as a Nagios plugin (default: a block of text)
--metrics FILE: write this textfile for the node exporter of Prometheus; without --json and
    --nagios, print failures only (default: none)
--name NAME: add the label name=NAME to the metrics, to tell relays apart (default: none)
"""
OPTION = re.compile(r"^(-.*?)(?: ([A-Z]\S*))?: (.*(?:\n {4}.*)*)", re.MULTILINE)
DEFAULTS = {"bytes": 1 << 20, "timeout": 30.0, "warning": Thresholds(), "critical": Thresholds()}
EPILOG = """\
endpoints:
  tcp:HOST:PORT                 a client over TCP; with IPv6: tcp:[::1]:4001
  ws://HOST:PORT/  wss://HOST/  a client over WebSocket; needs ws_frames.py

  Two endpoints of one relay show that clients of both kinds can meet. With one
  endpoint, both clients connect to it. The relay counts the transfers of a
  probe like any others: in its usage records and in its monthly quota.

thresholds:
  MS,MBPS is the longest round trip in milliseconds, and the least rate in MB/s
  (1 MB = 10^6 bytes). One of the two may be missing: 20,5 or 20, or ,5

exit codes:
  0 all bytes arrived    1 slow, by -w    2 slow, by -c, or a failure
  3 wrong command line, or this machine cannot probe
"""


def parse_size(text: str) -> int:
    """Return a size in bytes: `500kB`, `1MiB`. Raises ArgumentTypeError."""
    match = SIZE.fullmatch(text)
    size = round(float(match[1]) * FACTORS[match[2] or ""]) if match else 0
    if not 0 < size <= MAX_BYTES:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size from 1 B to 1 GiB, as 1MiB")
    return size


def parse_seconds(text: str) -> float:
    """Return a time in seconds. Raises ArgumentTypeError."""
    if not re.fullmatch(r"[0-9]{1,5}(?:\.[0-9]+)?", text) or not float(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds from 0 to 99999")
    return float(text)


def parse_name(text: str) -> str:
    """Return the value of a label. Raises ArgumentTypeError."""
    if not re.fullmatch("[0-9A-Za-z._-]+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a word of letters, digits, . _ -")
    return text


VALUES: dict[str, Callable[[str], object]] = {
    "FILE": str,
    "MS,MBPS": Thresholds.parse,
    "NAME": parse_name,
    "SECONDS": parse_seconds,
    "SIZE": parse_size,
}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are one line, with the exit code for Nagios."""

    def error(self, message: str) -> NoReturn:
        """Exit with 3."""
        self.exit(State.UNKNOWN, f"{PROGRAM}: {message} (--help lists all options)\n")


def make_parser() -> Parser:
    """Return the parser of all options."""
    parser = Parser(
        prog=PROGRAM,
        usage="%(prog)s [OPTIONS] ENDPOINT [ENDPOINT]",
        description="Probe a transit relay of Magic Wormhole: two clients meet and transfer bytes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    parser.set_defaults(**DEFAULTS)
    parser.add_argument("endpoints", nargs="+", type=Endpoint.parse, help=argparse.SUPPRESS)
    for group in OPTIONS.split("\n\n"):
        title, _, entries = group.partition(":\n")
        add = parser.add_argument_group(title).add_argument
        for names, placeholder, text in OPTION.findall(entries):
            if placeholder:
                add(*names.split(", "), metavar=placeholder, type=VALUES[placeholder], help=text)
            else:
                add(names, action="store_true", help=text)
    add = parser.add_argument_group("about").add_argument
    add("--version", action="version", version=f"{PROGRAM} {__version__}", help="print the version")
    add("-h", "--help", action="help", help="print this text")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program. Return the exit code: a State, or 130 after an interrupt."""
    parser = make_parser()
    try:
        options = parser.parse_args(arguments)
        if len(options.endpoints) > 2:
            parser.error("more than two endpoints")
        if options.json and options.nagios:
            parser.error("--json and --nagios exclude each other")
        if "" in (options.ca, options.metrics):
            parser.error("--ca and --metrics need a path")
        options.endpoints = (options.endpoints * 2)[:2]  # one endpoint is for both clients
        while True:
            started = time.monotonic()
            result = run_probe(options)
            report(result, options)
            if options.every is None:
                return result.state
            time.sleep(max(0.0, started + options.every - time.monotonic()))
    except SystemExit as end:  # argparse has printed why
        return int(end.code or 0)
    except Failure as failure:  # the metrics cannot be written
        print(f"{PROGRAM}: {failure}", file=sys.stderr)
        return State.UNKNOWN
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # Python flushes stdout again at its exit
        with suppress(OSError):
            print(f"{PROGRAM}: standard output: {error.strerror}", file=sys.stderr)
        return State.UNKNOWN
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
