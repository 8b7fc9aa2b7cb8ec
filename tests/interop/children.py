"""Child processes, and waiting for their output.

Nothing here sleeps. Every wait is for a line, an end of file or an exit, and fails after TIMEOUT.
"""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeVar

TIMEOUT_FACTOR = float(os.environ.get("RELAY_TEST_TIMEOUT_FACTOR", "1"))
# Seconds. Only a test that fails waits this long.
TIMEOUT = 60.0 * TIMEOUT_FACTOR


class Lines:
    """The lines of one stream. A thread reads them, so that a wait can time out."""

    def __init__(self, stream: IO[str]) -> None:
        self.seen: list[str] = []
        self._stream = stream
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        for line in self._stream:
            self._queue.put(line.rstrip("\n"))
        self._queue.put(None)

    def next(self) -> str | None:
        """Return the next line, or None at the end of the stream."""
        try:
            line = self._queue.get(timeout=TIMEOUT)
        except queue.Empty:
            raise AssertionError(f"no further line in {TIMEOUT} s, only:\n{self}") from None
        if line is None:
            self._queue.put(None)  # the next call returns None, too
        else:
            self.seen.append(line)
        return line

    def until(self, pattern: str) -> re.Match[str]:
        """Skip to the first line that matches the pattern."""
        while (line := self.next()) is not None:
            match = re.search(pattern, line)
            if match:
                return match
        raise AssertionError(f"the stream ended without a line {pattern!r}, after:\n{self}")

    def rest(self) -> list[str]:
        """Return the remaining lines, up to the end of the stream."""
        lines: list[str] = []
        while (line := self.next()) is not None:
            lines.append(line)
        return lines

    def close(self) -> None:
        """Close the stream. The writer must have ended, so that the thread has ended."""
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive(), "another process has the write end open"
        self._stream.close()

    def __str__(self) -> str:
        return "\n".join(self.seen)


SomeChild = TypeVar("SomeChild", bound="Child")


class Child:
    """A process whose stdout and stderr are one stream of lines. The `with` block ends it."""

    def __init__(
        self,
        argv: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: str = "",
    ) -> None:
        self.argv = argv
        self._process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env,
            pass_fds=pass_fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        self.pid = self._process.pid
        assert self._process.stdin and self._process.stdout
        self.lines = Lines(self._process.stdout)
        try:
            self._process.stdin.write(stdin)
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # the process has ended already: its exit code and its lines show the reason

    def is_running(self) -> bool:
        """Return whether the process that was started has not ended."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Wait until the process ends by itself, and return its exit code."""
        return self._process.wait(TIMEOUT)

    def succeed(self) -> None:
        """Wait until the process ends. Its exit code must be 0."""
        code = self.wait()
        self.lines.rest()
        assert code == 0, f"{' '.join(self.argv)}\nexit code {code}:\n{self.lines}"

    def terminate(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self._process.send_signal(signal.SIGTERM)
        return self.wait()

    def __enter__(self: SomeChild) -> SomeChild:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()  # does nothing if the process was waited for
        self.wait()
        self.lines.close()


class Record(NamedTuple):
    """The fields of a usage record that two relays must agree on: the times differ in every run."""

    mood: str
    total_bytes: int
    waited: bool

    @classmethod
    def parse(cls, line: str) -> Record:
        """Parse a JSON line. Its keys and types must be exactly those of a usage record."""
        record: dict[str, Any] = json.loads(line)
        types = {key: type(value).__name__ for key, value in record.items()}
        waited = record["waiting_time"] is not None
        assert list(types.items()) == [
            ("started", "float"),
            ("total_time", "float"),
            ("waiting_time", "float" if waited else "NoneType"),
            ("total_bytes", "int"),
            ("mood", "str"),
        ], line
        return cls(record["mood"], record["total_bytes"], waited)


class Relay(Child):
    """A running relay, ours or the reference, with its ports and its usage records."""

    def __init__(
        self, argv: Sequence[str], *announcements: str, pass_fds: Sequence[int] = ()
    ) -> None:
        """Start the relay, and wait until it listens.

        `announcements` are patterns for the lines that it then prints, in their order. The groups
        in the patterns are the ports.
        """
        read_end, write_end = os.pipe()
        try:
            super().__init__([*argv, f"--log-fd={write_end}"], pass_fds=[write_end, *pass_fds])
        finally:
            os.close(write_end)
        self._records = Lines(open(read_end, encoding="ascii"))
        try:
            found = [port for text in announcements for port in self.lines.until(text).groups()]
        except AssertionError:
            self.__exit__()
            raise
        self.ports = [int(port) for port in found]
        self.port = self.ports[0]

    def record(self) -> Record:
        """Wait for the next record."""
        line = self._records.next()
        assert line is not None, f"the relay has ended:\n{self.lines}"
        return Record.parse(line)

    def last_records(self) -> list[Record]:
        """Return the remaining records of a relay that was told to stop."""
        return [Record.parse(line) for line in self._records.rest()]

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._records.close()
