"""What more than one test file needs: fakes, vectors, and a relay as a process.

TIMEOUT is the only wall-clock number of the tests, and no test passes by waiting for it: it
only says when to give up. Slow machines multiply it with RELAY_TEST_TIMEOUT_FACTOR.
"""

from __future__ import annotations

import fcntl
import os
import random
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import transit_relay
from transit_relay import Connection, Limits, Pipe, Recorder, Server, UsageRecord

TIMEOUT = 5 * float(os.environ.get("RELAY_TEST_TIMEOUT_FACTOR", "1"))  # seconds
RELAY = Path(transit_relay.__file__).resolve()


def handshake(token: str = "t", side: str | None = None) -> bytes:
    """A whole handshake line; `token` and `side` are filled up to their lengths."""
    line = b"please relay " + token.encode().ljust(64, b"0")
    if side is not None:
        line += b" for side " + side.encode().ljust(16, b"0")
    return line + b"\n"


def splits(data: bytes, seed: int = 0) -> Iterator[list[bytes]]:
    """Ways of cutting `data`: whole, into bytes, each in two, and some at random."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for i in range(1, len(data)):
        yield [data[:i], data[i:]]
    chance = random.Random(seed)
    for _ in range(10):
        cuts = sorted(chance.choices(range(len(data) + 1), k=chance.randint(2, 6)))
        borders = [0, *cuts, len(data)]
        yield [data[a:b] for a, b in zip(borders, borders[1:]) if a != b]


class FakeClock:
    """Time passes when the test says so."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let `seconds` pass."""
        self.now += seconds


class FakePipe:
    """A Session's Pipe that only notes what it is told."""

    def __init__(self) -> None:
        self.sent = b""
        self.partner: Pipe | None = None
        self.finished = False

    def send(self, data: bytes | memoryview) -> None:
        assert not self.finished, "sent after the end"
        self.sent += data

    def link(self, partner: Pipe) -> None:
        assert self.partner is None, "linked twice"
        self.partner = partner

    def finish(self) -> None:
        assert not self.finished, "finished twice"
        self.finished = True


class ListRecorder(Recorder):
    """Keeps the records where a test can look at them."""

    def __init__(self) -> None:
        super().__init__()
        self.records: list[UsageRecord] = []

    def record(self, record: UsageRecord) -> None:
        self.records.append(record)

    def moods(self) -> list[str]:
        """The moods of all records so far, in order."""
        return [record.mood for record in self.records]


class Loop:
    """A Server without listeners, in this thread, with clocks that stand still."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.clock = FakeClock(1_000.0)  # monotonic
        self.wallclock = FakeClock(1_700_000_000.0)  # since the epoch
        self.recorder = ListRecorder()
        self.server = Server([], self.recorder, limits or Limits(), self.clock, self.wallclock)

    def connect(self, tcp: bool = False) -> socket.socket:
        """A new client; its other end is the server's. Over TCP there are resets."""
        ours, its = tcp_pair() if tcp else socket.socketpair()
        ours.settimeout(TIMEOUT)
        self.server.admit(its)
        return ours

    def connect_both(self, tcp: bool = False) -> tuple[socket.socket, Connection]:
        """A new client, and the relay's end of it."""
        before = set(self.server.connections)
        client = self.connect(tcp)
        (conn,) = self.server.connections - before
        return client, conn

    def pump(self) -> None:
        """Take turns until nothing is ready any more. Checks the books after each."""
        for _ in range(100_000):
            if not self.server._selector.select(0):
                break
            self.server.run_once(0)
            self.server.check_invariants()
        else:
            raise AssertionError("the loop is busy for ever")
        self.server.run_once(0)  # the timers, and whoever they doomed
        self.server.check_invariants()

    def advance(self, seconds: float) -> None:
        """Let time pass, then take turns."""
        self.clock.advance(seconds)
        self.wallclock.advance(seconds)
        self.pump()

    def pair(self, tcp: bool = False) -> tuple[socket.socket, socket.socket]:
        """Two clients that have met and have read their `ok`."""
        one, other = self.connect(tcp), self.connect(tcp)
        one.sendall(handshake("pair", "one"))
        self.pump()
        other.sendall(handshake("pair", "other"))
        self.pump()
        assert one.recv(100) == other.recv(100) == b"ok\n"
        return one, other


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a TCP connection over the loopback."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        one = socket.create_connection(listener.getsockname())
        other, _ = listener.accept()
        return one, other


def reset(sock: socket.socket) -> None:
    """Close a TCP connection with a reset: all that is queued here is thrown away."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    sock.close()


def fill_pipe(fd: int) -> int:
    """Fill an empty pipe: give how many bytes it took. A blocking write blocks now."""
    size = fcntl.fcntl(fd, 1032)  # F_GETPIPE_SZ, which Python 3.9 has no name for
    return os.write(fd, b"\n" * size)


def receive(sock: socket.socket, size: int) -> bytes:
    """The next `size` bytes. An end before that is an error."""
    data = bytearray()
    while len(data) < size:
        part = sock.recv(size - len(data))
        assert part, f"the end came after {len(data)} of {size} bytes"
        data += part
    return bytes(data)


def read_to_end(sock: socket.socket) -> bytes:
    """Everything until the other end's end. A reset is an error."""
    sock.settimeout(TIMEOUT)
    parts = []
    while part := sock.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


class RelayProcess:
    """A real relay, as an operator would start it. Ends it, whatever happens, on leaving."""

    def __init__(
        self,
        *arguments: str,
        cwd: Path | None = None,
        env: dict[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        program: Sequence[str] = (sys.executable, str(RELAY)),
    ) -> None:
        self.process = subprocess.Popen(
            [*program, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=cwd,
            env=env,
            pass_fds=pass_fds,
        )
        self.pid = self.process.pid
        self.stderr = b""

    def __enter__(self) -> RelayProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            if stream:
                stream.close()

    def wait_for(self, pattern: str, stream: str = "stderr") -> re.Match[str]:
        """Read messages until a line matches; fail with all that was said if none does."""
        source = getattr(self.process, stream)
        deadline = time.monotonic() + TIMEOUT
        said = b""
        while True:
            for line in said.splitlines(keepends=True):
                match = re.search(pattern, line.decode())
                if match and line.endswith(b"\n"):
                    return match
            left = max(0.0, deadline - time.monotonic())
            ready, _, _ = select.select([source], [], [], left)
            more = os.read(source.fileno(), 1 << 16) if ready else b""
            if not more:
                raise AssertionError(f"no line with {pattern!r} in:\n{said.decode()}")
            said += more
            if stream == "stderr":
                self.stderr += more

    def started(self) -> RelayProcess:
        """Wait until it listens."""
        self.wait_for("Transit starting on")
        return self

    @property
    def port(self) -> int:
        """The port of its (first) tcp endpoint."""
        match = re.search(rb"Transit starting on tcp:(\d+)", self.stderr)
        assert match, self.stderr
        return int(match[1])

    def connect(self, host: str = "127.0.0.1") -> socket.socket:
        """A client of its."""
        return socket.create_connection((host, self.port), timeout=TIMEOUT)

    def pair(self, token: str = "pair") -> tuple[socket.socket, socket.socket]:
        """Two clients that have met and have read their `ok`."""
        one, other = self.connect(), self.connect()
        one.sendall(handshake(token, "one"))
        other.sendall(handshake(token, "other"))
        assert receive(one, 3) == receive(other, 3) == b"ok\n"
        return one, other

    def stop(self, signal_number: int = signal.SIGTERM) -> int:
        """Ask it to stop, and give its exit code. What it said is in `stderr` then."""
        self.process.send_signal(signal_number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and give its exit code."""
        _, rest = self.process.communicate(timeout=4 * TIMEOUT)
        self.stderr += rest
        return self.process.returncode

    def stop_cleanly(self) -> None:
        """Stop it, and see that it had nothing to complain about in all its life."""
        assert self.stop() == 0, self.stderr
        for word in (b"warning:", b"error:", b"critical:", b"Traceback"):
            assert word not in self.stderr, self.stderr.decode()

    def descriptors(self) -> int:
        """How many files it has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))
