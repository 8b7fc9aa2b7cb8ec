"""The probe: against our relay, and against doubles that refuse, are silent or change bytes."""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import functools
import importlib.util
import io
import itertools
import json
import os
import re
import resource
import select
import shutil
import socket
import ssl
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers import RELAY, TIMEOUT, WEB, FakeClock, RelayProcess, read_to_end

import transit_relay
import ws_frames

FOLDER = RELAY.parent / "packaging" / "probe"
FILE = FOLDER / "transit_relay_probe.py"
MAN = (FOLDER / "transit-relay-probe.1").read_text(encoding="utf-8")
spec = importlib.util.spec_from_file_location("transit_relay_probe", FILE)
assert spec and spec.loader
probe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(probe)

SIZE = 100_000  # bytes each way: some messages, and more than one read
ROUND_TRIP_BYTES = probe.ROUND_TRIPS * probe.ROUND_TRIP_BYTES  # each way
SHORT = TIMEOUT / 25  # s: the limit of a probe that must reach it


class Ran(NamedTuple):
    """What one run of the program returned and printed."""

    code: int
    out: str
    err: str

    def reason(self) -> str:
        """Return the reason, which must be the only line."""
        assert not self.out and self.err.endswith("\n") and self.err.count("\n") == 1, self
        return self.err.strip().replace("transit-relay-probe: ", "", 1)


Run = Callable[..., Ran]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs the program in this process."""

    def run(*arguments: object, timeout: float = 4 * TIMEOUT) -> Ran:
        words = ["--bytes", str(SIZE), "--timeout", f"{timeout:g}", *map(str, arguments)]
        code = probe.main(words)
        out, err = capsys.readouterr()
        assert not re.search("[0-9a-f]{16}", out + err), "a token or a side"
        return Ran(code, out, err)

    return run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    """Return the clock of all time limits."""
    clock = FakeClock(0.0)
    monkeypatch.setattr(probe, "Deadline", functools.partial(probe.Deadline, clock=clock))
    return clock


@pytest.fixture(scope="module")
def relay() -> Iterator[RelayProcess]:
    with RelayProcess("--port", "tcp:0:interface=127.0.0.1", *WEB) as relay:
        yield relay.started()
        relay.stop_cleanly()


@pytest.fixture
def tcp(relay: RelayProcess) -> str:
    return f"tcp:127.0.0.1:{relay.port}"


@pytest.fixture
def ws(relay: RelayProcess) -> str:
    return f"ws://127.0.0.1:{relay.web_port}/any?path"


# Doubles of a relay.

Serve = Callable[[socket.socket], None]


class Double:
    """A server on the loopback. `serve` runs in a thread for each connection."""

    def __init__(self, serve: Serve, host: str = "127.0.0.1") -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._listener = socket.create_server((host, 0), family=family)
        self._serve = serve
        self._threads = [threading.Thread(target=self._accept)]
        self.port = self._listener.getsockname()[1]
        self.tcp = f"tcp:{f'[{host}]' if ':' in host else host}:{self.port}"
        self.ws = f"ws://localhost:{self.port}/"
        self.wss = f"wss://localhost:{self.port}/"

    def __enter__(self) -> Double:
        self._threads[0].start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # accept() returns
        for thread in self._threads:
            thread.join(TIMEOUT)
            assert not thread.is_alive()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                thread = threading.Thread(target=self._run, args=[sock])
                self._threads.append(thread)
                thread.start()

    def _run(self, sock: socket.socket) -> None:
        sock.settimeout(TIMEOUT)
        with sock, contextlib.suppress(OSError):  # the probe leaves when it has its reason
            self._serve(sock)


def read_until(sock: socket.socket, end: bytes) -> bytes:
    data = b""
    while not data.endswith(end) and (part := sock.recv(1 << 16)):
        data += part
    return data


def answering(answer: bytes, after: bytes = b"") -> Serve:
    """Read up to `after`, send `answer`, and wait until the client leaves."""

    def serve(sock: socket.socket) -> None:
        read_until(sock, after)
        sock.sendall(answer)
        read_to_end(sock)

    return serve


def signalling(monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> threading.Event:
    """Return an event that is set when this method is called."""
    called = threading.Event()
    method = getattr(owner, name)

    def replacement(*arguments: object) -> object:
        called.set()
        return method(*arguments)

    monkeypatch.setattr(owner, name, replacement)
    return called


class Pairing:
    """A relay for one pair, over TCP. `change` gets each piece of a client's data.

    It returns what is passed on. Its second argument is the number of bytes before.
    """

    def __init__(self, change: Callable[[bytes, int], bytes]) -> None:
        self._change = change
        self._clients: list[socket.socket] = []
        self._both = threading.Barrier(2)

    def __call__(self, sock: socket.socket) -> None:
        read_until(sock, b"\n")
        self._clients.append(sock)
        self._both.wait(TIMEOUT)
        sock.sendall(b"ok\n")
        self._both.wait(TIMEOUT)  # no data before the partner's `ok`
        (partner,) = (client for client in self._clients if client is not sock)
        passed = 0
        while data := sock.recv(1 << 16):
            partner.sendall(self._change(data, passed))
            passed += len(data)


# Our relay.


@pytest.mark.parametrize("kinds", ["tcp", "ws", "tcp ws", "ws tcp"])
def test_our_relay(kinds: str, run: Run, tcp: str, ws: str) -> None:
    endpoints = [{"tcp": tcp, "ws": ws}[kind] for kind in kinds.split()]
    code, out, err = run(*endpoints)
    assert (code, err) == (0, "")
    first, second = [endpoints[0], endpoints[-1]]
    number = r" +[0-9]+\.[0-9][0-9]"
    lines = [
        "transit-relay-probe: ok",
        rf"  connect1  {number} ms    {re.escape(first)}",
        rf"  connect2  {number} ms    {re.escape(second)}",
        rf"  pair      {number} ms",
        rf"  round trip{number} ms",
        rf"  transfer  {number} MB/s  {SIZE} bytes each way",
    ]
    for line, pattern in zip(out.splitlines(), lines):
        assert re.fullmatch(pattern, line)
    assert out.count("\n") == len(lines)


def test_the_transfers_are_in_the_records(run: Run) -> None:
    read_end, write_end = os.pipe()
    with open(read_end) as records:
        arguments = ("--port", "tcp:0:interface=127.0.0.1", "--log-fd", str(write_end))
        with RelayProcess(*arguments, pass_fds=[write_end]) as relay:
            os.close(write_end)
            assert run(f"tcp:127.0.0.1:{relay.started().port}").code == 0
            relay.stop_cleanly()
        (record,) = map(json.loads, records)
    assert (record["mood"], record["total_bytes"]) == ("happy", 2 * (SIZE + ROUND_TRIP_BYTES))


def test_json(run: Run, tcp: str) -> None:
    code, out, err = run("--json", tcp)
    found = json.loads(out)
    assert (code, err, out.count("\n")) == (0, "", 1)
    assert (found.pop("ok"), found.pop("exit_code")) == (True, 0)
    assert found.pop("failure") is found.pop("reason") is None
    assert found.pop("endpoints") == [tcp, tcp]
    assert found.pop("bytes_each_way") == SIZE
    assert sorted(found) == [
        *("connect1_ms", "connect2_ms", "duration_ms", "mb_per_s", "pair_ms", "round_trip_ms"),
        "started",
    ]
    assert all(value > 0 for value in found.values())


def test_json_of_a_failure(run: Run) -> None:
    with Double(answering(b"SSH-2.0-OpenSSH_9.2\r\n")) as double:
        code, out, _ = run("--json", double.tcp)
        found = json.loads(out)
        assert code == found["exit_code"] == 2 and not found["ok"]
        reason = f"{double.tcp}: not a relay: it answered 'SSH-2.0-OpenSSH_9.2'"
        assert (found["failure"], found["reason"]) == ("not_a_relay", reason)
        assert found["connect2_ms"] > 0 and found["pair_ms"] is found["mb_per_s"] is None


NAGIOS = re.compile(
    r"TRANSIT-RELAY (\w+): ([^|]*) \| connect1=[\d.]+ms;;;0 connect2=[\d.]+ms;;;0 "
    r"pair=[\d.]+ms;;;0 round_trip=[\d.]+ms;(\S*);0 throughput=[\d.]+MB;(\S*);0\n"
)


@pytest.mark.parametrize(
    ("options", "state", "text", "round_trip", "rate"),
    [
        ("", "OK", r"round trip [\d.]+ ms, [\d.]+ MB/s", ";", ";"),
        ("-w 90000,0.001 -c ,0.0001", "OK", "round trip .*", "90000;", "0.001:;0.0001:"),
        ("-w 0.000001,", "WARNING", r"slow: round trip [\d.]+ ms, threshold 1e-06", "1e-06;", ";"),
        ("-w 90000.125,", "OK", "round trip .*", "90000.125;", ";"),
        ("-w ,90000", "WARNING", r"slow: [\d.]+ MB/s, threshold 90000", ";", "90000:;"),
        (
            "-w 0.001,90000 -c 90000,",
            "WARNING",
            "slow: .* ms, .*; .* MB/s, .*",
            *("0.001;90000", "90000:;"),
        ),
        ("-c ,90000", "CRITICAL", r"slow: .* MB/s, threshold 90000", ";", ";90000:"),
        ("-w ,90000 -c ,80000", "CRITICAL", ".*, threshold 80000", ";", "90000:;80000:"),
    ],
)
def test_nagios(
    options: str, state: str, text: str, round_trip: str, rate: str, run: Run, tcp: str
) -> None:
    code, out, err = run("--nagios", *options.split(), tcp)
    match = NAGIOS.fullmatch(out)
    assert match and not err, out
    assert (match[1], match[3], match[4]) == (state, round_trip, rate)
    assert re.fullmatch(text, match[2])
    assert code == ["OK", "WARNING", "CRITICAL"].index(state)


def test_a_slow_relay_has_its_reason_above_the_block(run: Run, tcp: str) -> None:
    code, out, _ = run("-w", ",90000", tcp)
    assert code == 1 and out.count("\n") == 6
    assert re.match(r"transit-relay-probe: slow: [\d.]+ MB/s, threshold 90000\n", out)


def test_nagios_of_a_failure(run: Run) -> None:
    with Double(answering(b"220 mail | ESMTP\r\n")) as double:
        code, out, err = run("--nagios", double.tcp)
    assert (code, err) == (2, "")
    assert out.startswith(f"TRANSIT-RELAY CRITICAL: {double.tcp}: not a relay: it answered '220 ")
    assert out.count("|") == 1 and " | connect1=" in out


# The file for Prometheus.


def parse_metrics(text: str) -> dict[str, float]:
    """Parse the text format strictly, as far as the probe uses it. Return the samples."""
    samples: dict[str, float] = {}
    families: list[str] = []
    lines = iter(text.splitlines())
    assert text.endswith("\n")
    for line in lines:
        if line.startswith("#"):
            family = re.fullmatch(r"# HELP ([a-z_]+) [^\\]+\.", line)
            assert family and family[1] not in families, line
            families.append(family[1])
            assert next(lines) == f"# TYPE {family[1]} gauge"
            continue
        label = r'[a-z]+="[0-9A-Za-z._-]+"'
        sample = re.fullmatch(rf"(([a-z_]+)(?:\{{{label}(?:,{label})*\}})?) (\S+)", line)
        assert sample and sample[2] == families[-1], line
        assert sample[1] not in samples
        samples[sample[1]] = float(sample[3])
    return {key.replace("transit_relay_probe_", "", 1): value for key, value in samples.items()}


def test_metrics(run: Run, tcp: str, tmp_path: Path) -> None:
    file = tmp_path / "relay.prom"
    assert run("--metrics", file, tcp) == (0, "", "")
    found = parse_metrics(file.read_text())
    assert found.pop("success") == 1
    assert [found.pop(f'failure{{kind="{kind}"}}') for kind in probe.FAILURES] == [0] * 10
    assert found.pop("transfer_bytes") == SIZE
    assert sorted(found) == [
        *("duration_seconds",),
        *(f'phase_seconds{{phase="{phase}"}}' for phase in sorted(probe.PHASES)),
        *("start_timestamp_seconds", "throughput_bytes_per_second"),
    ]
    assert all(value > 0 for value in found.values())
    assert "127.0.0.1" not in file.read_text()
    assert os.listdir(tmp_path) == ["relay.prom"]
    mask = os.umask(0o777)
    os.umask(mask)
    assert file.stat().st_mode & 0o777 == 0o666 & ~mask  # the exporter is another user


def test_metrics_of_a_failure(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "relay.prom"
    with Double(answering(b"relay full\n")) as double:
        ran = run("--metrics", file, "--name", "my-relay.1", double.tcp)
    assert ran.code == 2 and "relay full" in ran.reason()
    found = parse_metrics(file.read_text())
    assert found['success{name="my-relay.1"}'] == 0
    assert [key for key, value in found.items() if key.startswith("failure") and value] == [
        'failure{kind="relay_refused",name="my-relay.1"}'
    ]
    assert 'phase_seconds{phase="connect2",name="my-relay.1"}' in found
    assert not any("pair" in key or "throughput" in key for key in found)


def test_repeated_probes_replace_the_file_in_one_step(
    run: Run, tcp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader that has opened the file reads the old text, whole."""
    file = tmp_path / "relay.prom"
    readers: list[io.TextIOWrapper] = []
    pauses: list[float] = []

    def sleep(seconds: float) -> None:
        pauses.append(seconds)
        readers.append(file.open())
        if len(pauses) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(probe.time, "sleep", sleep)
    assert run("--every", "9000", "--metrics", file, tcp) == (130, "", "")
    assert all(9000 - 4 * TIMEOUT < pause < 9000 for pause in pauses)
    texts = []
    for reader in readers:
        with reader:
            texts.append(reader.read())
    starts = [parse_metrics(text)["start_timestamp_seconds"] for text in texts]
    assert starts == sorted(set(starts)) and len(starts) == 3
    assert os.listdir(tmp_path) == ["relay.prom"]


def test_repeated_output(run: Run, tcp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses = iter([None, KeyboardInterrupt])

    def sleep(_: float) -> None:
        if end := next(pauses):
            raise end

    monkeypatch.setattr(probe.time, "sleep", sleep)
    code, out, _ = run("--every", "60", "--json", tcp)
    assert code == 130 and [json.loads(line)["ok"] for line in out.splitlines()] == [True] * 2


def test_metrics_that_cannot_be_written(run: Run, tcp: str, tmp_path: Path) -> None:
    ran = run("--every", "60", "--metrics", tmp_path / "missing" / "relay.prom", tcp)
    assert ran.code == 3
    assert ran.reason() == f"--metrics {tmp_path}/missing/relay.prom: No such file or directory"


@pytest.mark.parametrize("kind", ["fifo", "folder", "symbolic link"])
def test_metrics_replace_regular_files_only(kind: str, run: Run, tcp: str, tmp_path: Path) -> None:
    file = tmp_path / "relay.prom"
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    else:
        file.symlink_to("target")
        (tmp_path / "target").touch()
    before = file.lstat()
    ran = run("--metrics", file, tcp)
    assert (ran.code, ran.reason()) == (3, f"--metrics {file}: not a regular file")
    assert file.lstat() == before and not file.with_suffix(".prom.new").exists()


def test_metrics_that_fill_the_disk(
    run: Run, tcp: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_text(self: Path, text: str, **_: object) -> None:
        self.write_bytes(text.encode("ascii")[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    file = tmp_path / "relay.prom"
    file.write_text("old")
    monkeypatch.setattr(probe.Path, "write_text", write_text)
    ran = run("--metrics", file, tcp)
    assert (ran.code, ran.reason()) == (3, f"--metrics {file}: No space left on device")
    assert file.read_bytes() == b"old" and os.listdir(tmp_path) == [file.name]


# Ways to fail: the network.


def test_refused(run: Run) -> None:
    with socket.socket() as bound:  # a port that is not free, and where nobody listens
        bound.bind(("127.0.0.1", 0))
        endpoint = f"tcp:127.0.0.1:{bound.getsockname()[1]}"
        ran = run(endpoint)
    assert (ran.code, ran.reason()) == (2, f"{endpoint}: connection refused")


@pytest.mark.parametrize(
    ("code", "kind"), [(errno.ETIMEDOUT, "no_answer"), (errno.ECONNRESET, "closed")]
)
def test_a_connection_that_the_kernel_ends(
    code: int, kind: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe.socket.socket, "connect_ex", lambda *_: code)
    ran = run("--json", "tcp:127.0.0.1:1")
    assert ran.code == 2 and json.loads(ran.out)["failure"] == kind


def replace_lookup(monkeypatch: pytest.MonkeyPatch, found: Any) -> None:
    """Replace the resolver: it raises, calls or returns `found`."""

    def getaddrinfo(*_: object, **__: object) -> Any:
        if isinstance(found, Exception):
            raise found
        return found() if callable(found) else found

    monkeypatch.setattr(probe.socket, "getaddrinfo", getaddrinfo)


def test_no_such_host(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("tcp:a..b:4001").reason() == "tcp:a..b:4001: no such host"  # asks no server
    for code, reason in [
        (socket.EAI_NONAME, "no such host"),
        (socket.EAI_AGAIN, "temporary failure in name resolution"),
    ]:
        replace_lookup(monkeypatch, socket.gaierror(code, "text"))
        ran = run("ws://relay.example/")
        assert (ran.code, ran.reason()) == (2, f"ws://relay.example/: {reason}")


def test_a_lookup_without_end(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()
    replace_lookup(monkeypatch, lambda: released.wait(TIMEOUT) and [])
    before = set(threading.enumerate())
    ran = run("tcp:relay.example:4001", timeout=SHORT)
    released.set()
    for thread in set(threading.enumerate()) - before:
        thread.join(TIMEOUT)
    limit = f"no answer within {SHORT:g} s"
    expected = f"tcp:relay.example:4001: {limit} while looking up its name"
    assert (ran.code, ran.reason()) == (2, expected)


def info(host: str, port: int) -> tuple[object, ...]:
    return socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port)


def test_each_address_is_tried(
    run: Run, relay: RelayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.2", 0))
        refused = info(*bound.getsockname())
        replace_lookup(monkeypatch, [refused, info("127.0.0.1", relay.port)])
        assert run("tcp:relay.example:4001").code == 0
        replace_lookup(monkeypatch, [refused, refused])
        reason = run("tcp:relay.example:4001").reason()
    one = "127.0.0.2: connection refused"
    assert reason == f"tcp:relay.example:4001: {one}; {one}"


def test_an_address_family_that_the_system_lacks(
    run: Run, relay: RelayProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacking = (9999, *info("192.0.2.1", 1)[1:])
    replace_lookup(monkeypatch, [lacking, info("127.0.0.1", relay.port)])
    assert run("tcp:relay.example:4001").code == 0
    replace_lookup(monkeypatch, [lacking])
    ran = run("tcp:relay.example:4001")
    reason = "tcp:relay.example:4001: address family not supported by protocol"
    assert (ran.code, ran.reason()) == (2, reason)


def test_the_time_ends_before_the_connecting(
    clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def connect_ex(*_: object) -> int:
        clock.now = 31.0
        return errno.EINPROGRESS

    monkeypatch.setattr(probe.socket.socket, "connect_ex", connect_ex)
    replace_lookup(monkeypatch, [info("192.0.2.1", 1)])
    endpoint = probe.Endpoint.parse("tcp:relay.example:1")
    with contextlib.ExitStack() as stack, pytest.raises(probe.Failure) as failed:
        probe.connect(endpoint, probe.Deadline(30, None), stack)
    assert str(failed.value) == "tcp:relay.example:1: no answer within 0.0 s while connecting"


def test_addresses_share_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock(100.0)
    ends: list[float] = []

    def connect_to(_: object, __: object, until: float, ___: object) -> None:
        ends.append(until)
        clock.now = until
        raise probe.Failure("no_answer", "no answer")

    monkeypatch.setattr(probe, "connect_to", connect_to)
    replace_lookup(monkeypatch, [info("192.0.2.1", 1)] * 3)
    endpoint = probe.Endpoint.parse("tcp:relay.example:1")
    with contextlib.ExitStack() as stack, pytest.raises(probe.Failure):
        probe.connect(endpoint, probe.Deadline(30, None, clock), stack)
    assert ends == [110, 120, 130]


@pytest.fixture
def silent(clock: FakeClock) -> Callable[[int], Serve]:
    """Return a function: `silent(clients)` reads and says nothing.

    When the last of so many clients has sent something, the time limit passes.
    """

    def silent(clients: int) -> Serve:
        heard = []

        def serve(sock: socket.socket) -> None:
            heard.append(sock.recv(1 << 16))
            if len(heard) == clients:
                clock.now = 1000.0
            read_to_end(sock)

        return serve

    return silent


@pytest.mark.parametrize(
    ("kind", "clients", "doing"),
    [
        ("tcp", 2, "waiting for `ok`"),
        ("ws", 1, "upgrading to WebSocket"),
        ("wss", 1, "doing the TLS handshake"),
    ],
)
def test_a_server_that_is_silent(
    kind: str, clients: int, doing: str, silent: Callable[[int], Serve], run: Run
) -> None:
    with Double(silent(clients)) as double:
        endpoint = getattr(double, kind)
        ran = run(endpoint, timeout=20)
    assert (ran.code, ran.reason()) == (2, f"{endpoint}: no answer within 20 s while {doing}")


def test_two_relays(run: Run, silent: Callable[[int], Serve], tcp: str) -> None:
    with Double(silent(1)) as double:
        reason = run(tcp, double.tcp, timeout=20).reason()
    doing = "waiting for `ok` (are both of one relay?)"
    assert reason == f"{tcp} and {double.tcp}: no answer within 20 s while {doing}"


def test_a_connection_that_is_not_accepted(run: Run) -> None:
    """The queue of the listener is full: the kernel answers no more connections."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            client = stack.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(listener.getsockname())
        endpoint = f"tcp:127.0.0.1:{listener.getsockname()[1]}"
        ran = run(endpoint, timeout=3 * SHORT)
    assert ran.code == 2
    assert re.fullmatch(rf"{endpoint}: no answer within [\d.]+ s while connecting", ran.reason())


@pytest.mark.parametrize("kind", ["tcp", "ws", "wss"])
def test_a_server_that_closes(kind: str, run: Run) -> None:
    with Double(lambda sock: None) as double:
        code, out, _ = run("--json", getattr(double, kind))
    found = json.loads(out)
    assert (code, found["failure"]) == (2, "closed")
    reasons = "the server ended the connection|the connection (was lost|ended in the TLS handshake)"
    assert re.search(reasons, found["reason"])


def test_a_reset_before_the_tls_handshake(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reset has arrived when the probe begins with TLS."""
    connected = threading.Event()
    connect = probe.connect

    def connect_and_wait(*arguments: object) -> socket.socket:
        sock: socket.socket = connect(*arguments)
        connected.set()
        assert select.select([sock], [], [], TIMEOUT)[0]
        return sock

    def reset(sock: socket.socket) -> None:
        connected.wait(TIMEOUT)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    monkeypatch.setattr(probe, "connect", connect_and_wait)
    with Double(reset) as double:
        code, out, _ = run("--json", double.wss)
    found = json.loads(out)
    assert (code, found["failure"]) == (2, "closed")
    assert found["reason"] == f"{double.wss}: the connection ended in the TLS handshake"


def test_random_bytes_do_not_count_in_the_time_limit(
    run: Run, tcp: str, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    urandom = os.urandom

    def slow_urandom(size: int) -> bytes:
        clock.now += 1000 if size == SIZE else 0
        return urandom(size)

    monkeypatch.setattr(probe.os, "urandom", slow_urandom)
    assert run(tcp, timeout=20).code == 0
    assert clock.now == 1000


# Ways to fail: the server is not a relay.

HTTP_400 = b"HTTP/1.1 400 Bad Request\r\nServer: nginx\r\n\r\n<html>"


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "it answered 'SSH-2.0-OpenSSH_9.2'"),
        (b"\0\xff\n", "it answered '\\x00\\xff'"),
        (HTTP_400, "an HTTP server answered with status 400; try ws:// or wss://"),
        (b"\x15\x03\x01\0\2\2\x46", "a TLS server answered; try wss://"),
    ],
)
def test_not_a_relay(answer: bytes, reason: str, run: Run) -> None:
    with Double(answering(answer)) as double:
        ran = run(double.tcp)
    assert (ran.code, ran.reason()) == (2, f"{double.tcp}: not a relay: {reason}")


def test_a_token_that_a_server_repeats_is_not_printed(run: Run) -> None:
    """`run` checks that."""

    def echo(sock: socket.socket) -> None:
        sock.sendall(read_until(sock, b"\n"))
        read_to_end(sock)

    with Double(echo) as double:
        reason = run(double.tcp).reason()
    assert reason.endswith("it answered 'please relay ... for side ...'")


@pytest.mark.parametrize("size", [15, 7, 1])
def test_a_token_that_a_server_sends_in_pieces_is_not_printed(size: int, run: Run) -> None:
    tokens: list[bytes] = []

    def serve(sock: socket.socket) -> None:
        token = read_until(sock, b"\n").split()[2]
        tokens.append(token)
        pieces = [token[start : start + size] for start in range(0, len(token), size)]
        sock.sendall(b" ".join(pieces[: 1 if size > 7 else None]))
        read_to_end(sock)

    with Double(serve) as double:
        reason = run(double.tcp).reason()
    shown = re.sub("[^0-9a-f]", "", reason.partition("it answered ")[2])
    assert len(shown) <= 40 - 40 // 8
    assert not any(token[:8].decode() in reason or token.decode() in shown for token in tokens)


def test_more_after_ok(run: Run) -> None:
    """Nothing can follow `ok` before the other client has its own: memory has a bound."""
    numbers = itertools.count()

    def serve(sock: socket.socket) -> None:
        is_first = next(numbers) == 0
        read_until(sock, b"\n")
        while is_first:
            sock.sendall(b"ok\n" + bytes(1 << 16))
        read_to_end(sock)

    with Double(serve) as double:
        code, out, _ = run("--json", double.tcp)
    found = json.loads(out)
    assert (code, found["failure"]) == (2, "not_a_relay")
    assert ": not a relay: it answered 'ok\\n\\x00" in found["reason"]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not a relay: it answered 'SSH-2.0-OpenSSH_9.2'"),
        (b"bad handshake\n", "the relay refused a client: bad handshake"),  # it has no WebSocket
        (b"ok\n", "not a relay: it answered 'ok'"),
        (b"HTTP/2.0 404 no\r\n\r\n", "not a relay: an HTTP server answered with status 404"),
        (HTTP_400, "the upgrade was refused: HTTP status 400"),
        (b"HTTP/1.1 200 OK\r\n\r\n", "the upgrade was refused: HTTP status 200"),
        (
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 11\r\n\r\nrelay full\n",
            "the upgrade was refused: HTTP status 503, relay full",
        ),
        (
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n",
            "not a WebSocket server: the answer upgrades to something else",
        ),
        (b"HTTP/1.x\r\n\r\n", "not a WebSocket server: the answer is not HTTP/1.1"),
    ],
)
def test_upgrades_that_fail(
    answer: bytes, reason: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe, "ANSWER_SECONDS", SHORT)
    with Double(answering(answer, after=b"\r\n\r\n")) as double:
        ran = run(double.ws)
    assert (ran.code, ran.reason()) == (2, f"{double.ws}: {reason}")


def test_a_refusal_that_comes_in_two_pieces(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "ANSWER_SECONDS", TIMEOUT)
    has_status = signalling(monkeypatch, probe.WebSocketClient, "_refusal")

    def serve(sock: socket.socket) -> None:
        read_until(sock, b"\r\n\r\n")
        sock.sendall(b"HTTP/1.1 503 Full\r\n\r\nrelay")
        has_status.wait(TIMEOUT)
        sock.sendall(b" full\n")
        read_to_end(sock)

    with Double(serve) as double:
        assert run(double.ws).reason().endswith("HTTP status 503, relay full")


# Ways to fail: the relay refuses a client.


@pytest.mark.parametrize("refusal", [line.decode().strip() for line in probe.REFUSALS])
@pytest.mark.parametrize("kind", ["tcp", "ws"])
def test_refusals(kind: str, refusal: str, run: Run) -> None:
    line = refusal.encode() + b"\n"

    def serve(sock: socket.socket) -> None:
        if kind == "tcp":
            read_until(sock, b"\n")
            sock.sendall(line)
            return
        request = ws_frames.parse_request(read_until(sock, b"\r\n\r\n"))
        refused = ws_frames.build_frame(ws_frames.BINARY, line) + ws_frames.build_close(1013)
        sock.sendall(request.accept() + refused)
        read_to_end(sock)

    with Double(serve) as double:
        endpoint = getattr(double, kind)
        ran = run(endpoint)
    assert (ran.code, ran.reason()) == (2, f"{endpoint}: the relay refused a client: {refusal}")


@pytest.mark.parametrize("kind", ["tcp", "ws"])
def test_our_relay_refuses(kind: str, run: Run) -> None:
    options = ("--port", "tcp:0:interface=127.0.0.1", "--allow", "192.0.2.0/24")
    with RelayProcess(*options) as relay:
        port = relay.started().port
        ran = run(f"tcp:127.0.0.1:{port}" if kind == "tcp" else f"ws://127.0.0.1:{port}/")
        assert ran.reason().endswith(": the relay refused a client: not allowed")
        relay.stop_cleanly()


@pytest.mark.parametrize("kind", ["tcp", "ws"])
def test_our_relay_is_full(kind: str, run: Run) -> None:
    """A pair has both connections. The relay does not end it for others."""
    options = ("--port", "tcp:0:interface=127.0.0.1", "--max-connections", "2")
    with RelayProcess(*options) as relay:
        port = relay.started().port
        one, other = relay.pair()
        with one, other:
            ran = run(f"tcp:127.0.0.1:{port}" if kind == "tcp" else f"ws://127.0.0.1:{port}/")
    reasons = {"tcp": "the relay refused a client: relay full"}
    reasons["ws"] = "the upgrade was refused: HTTP status 503, relay full"
    assert ran.reason().endswith(f": {reasons[kind]}")


def test_a_relay_that_tells_only_one_client(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one is closed before. The relay does so if both connect in one turn."""
    monkeypatch.setattr(probe, "ANSWER_SECONDS", TIMEOUT)
    saw_the_end = signalling(monkeypatch, probe.Probe, "_require_no_refusal")
    connections = iter([1, 2])

    def serve(sock: socket.socket) -> None:
        is_first = next(connections) == 1
        read_until(sock, b"\n")
        if not is_first:
            saw_the_end.wait(TIMEOUT)
            sock.sendall(b"relay full\n")
            read_to_end(sock)

    with Double(serve) as double:
        assert run(double.tcp).reason().endswith(": the relay refused a client: relay full")


# Ways to fail: the bytes.


def flip(place: int) -> Callable[[bytes, int], bytes]:
    """Change the byte at this place of each direction."""

    def change(data: bytes, before: int) -> bytes:
        changed = bytearray(data)
        if before <= place < before + len(data):
            changed[place - before] ^= 1
        return bytes(changed)

    return change


def test_a_byte_that_changes(run: Run) -> None:
    with Double(Pairing(flip(ROUND_TRIP_BYTES + 70_000))) as double:
        ran = run(double.tcp)
    assert (ran.code, ran.reason()) == (
        2,
        f"{double.tcp}: bytes differ: byte 70001 of {SIZE} has changed",
    )


def test_a_byte_too_many(run: Run) -> None:
    with Double(Pairing(lambda data, before: data if before else data + b"x")) as double:
        ran = run(double.tcp)
    assert (ran.code, ran.reason()) == (
        2,
        f"{double.tcp}: bytes differ: more came than were sent",
    )


def test_bytes_that_return_to_their_sender(run: Run) -> None:
    def serve(sock: socket.socket) -> None:
        read_until(sock, b"\n")
        sock.sendall(b"ok\n")
        while data := sock.recv(1 << 16):
            sock.sendall(data)

    with Double(serve) as double:
        assert run(double.tcp).reason().endswith("bytes differ: more came than were sent")


def test_an_http_answer_without_end(run: Run) -> None:
    def serve(sock: socket.socket) -> None:
        read_until(sock, b"\r\n\r\n")
        sock.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sock.sendall(bytes(1 << 16))

    with Double(serve) as double:
        assert run(double.ws).reason().endswith("HTTP status 200")


def test_a_relay_that_ends_a_transfer(run: Run) -> None:
    def change(data: bytes, before: int) -> bytes:
        if before > SIZE // 2:
            raise ConnectionError
        return data

    with Double(Pairing(change)) as double:
        reason = run(double.tcp).reason()
    assert re.search("the server ended the connection|the connection was lost", reason)


def test_a_transfer_that_reaches_the_time_limit(
    run: Run, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = probe.Deadline.func.begin

    def begin_and_wait(self: Any, who: str, doing: str) -> None:
        begin(self, who, doing)
        if doing == "transferring, 1 %":
            clock.now = 1000.0

    def change(data: bytes, before: int) -> bytes:
        return data[: max(0, ROUND_TRIP_BYTES + 1000 - before)]

    monkeypatch.setattr(probe.Deadline.func, "begin", begin_and_wait)
    with Double(Pairing(change)) as double:
        ran = run(double.tcp, timeout=20)
    reason = f"{double.tcp}: slow: 1000 of {SIZE} bytes within 20 s"
    assert (ran.code, ran.reason()) == (2, reason)


def test_a_ping_is_answered(run: Run) -> None:
    """The relay of this test relays nothing. It ends the connection after the Pong."""
    pongs = []

    def serve(sock: socket.socket) -> None:
        request = ws_frames.parse_request(read_until(sock, b"\r\n\r\n"))
        sock.sendall(request.accept() + ws_frames.build_frame(ws_frames.PING, b"are you there"))
        parser = ws_frames.FrameParser(must_be_masked=True)
        while data := sock.recv(1 << 16):
            for event in parser.receive(memoryview(data)):
                if event.opcode == ws_frames.PONG:
                    pongs.append(bytes(event.payload))
                    sock.sendall(ws_frames.build_close(1001))
                    return

    with Double(serve) as double:
        reason = run(double.ws).reason()
    assert pongs and set(pongs) == {b"are you there"}
    assert re.search("closed the WebSocket: 1001|the connection was lost", reason)


def test_pings_without_end() -> None:
    """Pongs do not fill the memory while the server reads nothing."""
    one, other = socket.socketpair()
    with one, other:
        client = probe.WebSocketClient(probe.Endpoint.parse("ws://relay.example/"), one)
        client._is_open = True
        pings = ws_frames.build_frame(ws_frames.PING, bytes(125)) * 1000
        for _ in range(10):
            assert client._decode(pings) == b""
    assert probe.READ_BYTES <= len(client.outbox) < probe.READ_BYTES + 200


# TLS.

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with self-signed certificates, NAME.pem, each with its key in it."""
    folder = tmp_path_factory.mktemp("certificates")
    key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout key"
    for name, host, days in (
        ("localhost", "localhost", "2"),
        ("other", "other.example", "2"),
        ("expired", "localhost", "-1"),
    ):
        (folder / "names").write_text(f"subjectAltName=DNS:{host}\n")
        for command in (
            f"openssl req -new {key} -subj /CN=test -out request",
            f"openssl x509 -req -in request -signkey key -days {days} -extfile names "
            f"-out {name}.crt",
        ):
            words = command.split()
            subprocess.run(words, cwd=folder, check=True, capture_output=True, timeout=TIMEOUT)
        pem = (folder / "key").read_text() + (folder / f"{name}.crt").read_text()
        (folder / f"{name}.pem").write_text(pem)
    return folder


def tls_front(certificate: Path, port: int) -> Serve:
    """Return a proxy that does TLS with this certificate before a port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    def serve(sock: socket.socket) -> None:
        with context.wrap_socket(sock, server_side=True) as tls:
            with socket.create_connection(("127.0.0.1", port), TIMEOUT) as plain:
                partner = {tls: plain, plain: tls}
                while True:
                    for ready in select.select([tls, plain], [], [], TIMEOUT)[0]:
                        data = ready.recv(1 << 16)
                        if not data:
                            return
                        partner[ready].sendall(data)

    return serve


@needs_openssl
def test_tls(run: Run, relay: RelayProcess, tcp: str, certificates: Path) -> None:
    own = certificates / "localhost.crt"
    with Double(tls_front(certificates / "localhost.pem", relay.web_port)) as double:
        assert run("--ca", own, double.wss, tcp).code == 0
        untrusted = run(double.wss)
        wrong_name = run("--ca", own, double.wss.replace("localhost", "127.0.0.1"))
    assert untrusted.code == wrong_name.code == 2
    assert re.search(": wrong certificate: self[- ]signed certificate$", untrusted.reason())
    assert re.search(": wrong certificate: IP address mismatch", wrong_name.reason())
    for name, why in ("other", "Hostname mismatch"), ("expired", "certificate has expired"):
        with Double(tls_front(certificates / f"{name}.pem", relay.web_port)) as double:
            reason = run("--ca", certificates / f"{name}.crt", double.wss).reason()
        assert f": wrong certificate: {why}" in reason


def test_no_tls_there(run: Run, relay: RelayProcess) -> None:
    ran = run(f"wss://127.0.0.1:{relay.port}/")
    assert ran.code == 2
    assert re.search(": TLS failed: (wrong version number|record layer failure)", ran.reason())


@pytest.mark.parametrize("name", ["missing", "empty"])
def test_an_unusable_ca(name: str, run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    code, out, err = run("--nagios", "--ca", tmp_path / name, "wss://localhost:1/")
    why = {"missing": "No such file or directory", "empty": "no certificate can be read from it"}
    assert (code, err) == (3, "")
    assert out == f"TRANSIT-RELAY UNKNOWN: --ca {tmp_path / name}: {why[name]}\n"


OPEN_FILES = OSError(errno.EMFILE, "Too many open files")


@pytest.mark.parametrize(
    ("owner", "name", "error", "reason"),
    [
        ("socket", "socketpair", OPEN_FILES, "[Errno 24] Too many open files"),
        ("socket", "getaddrinfo", OPEN_FILES, "[Errno 24] Too many open files"),
        ("socket", "socket", OPEN_FILES, "[Errno 24] Too many open files"),
        ("os", "urandom", MemoryError(), "out of memory"),
        ("threading", "Thread", RuntimeError("can't start new thread"), "can't start new thread"),
    ],
    ids=["socketpair", "getaddrinfo", "socket", "memory", "thread"],
)
@pytest.mark.filterwarnings("error")
def test_a_machine_without_resources(
    owner: str, name: str, error: Exception, reason: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    module = getattr(probe, owner)
    replaced = functools.partial(getattr, module)
    fake = type(
        "Module", (), {"__getattr__": lambda _, key: fail if key == name else replaced(key)}
    )
    monkeypatch.setattr(probe, owner, fake())
    code, out, _ = run("--json", "tcp:127.0.0.1:1")
    found = json.loads(out)
    assert (code, found["exit_code"], found["failure"]) == (3, 3, "local")
    assert found["reason"] == f"cannot probe: {reason}"


def test_descriptors_above_those_of_select(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit[0] <= 1100:
        pytest.skip("needs more open files")
    socketpair = socket.socketpair

    def high_socketpair() -> list[socket.socket]:
        with contextlib.ExitStack() as stack:
            pair = [stack.enter_context(sock) for sock in socketpair()]
            numbers = [fcntl.fcntl(sock, fcntl.F_DUPFD_CLOEXEC, 1024) for sock in pair]
        return [socket.socket(fileno=number) for number in numbers]

    monkeypatch.setattr(probe.socket, "socketpair", high_socketpair)
    ran = run("tcp:127.0.0.1:1")
    assert ran.code == 3
    assert re.fullmatch(r"cannot probe: filedescriptor out of range in select\(\)", ran.reason())


# The progress.


def test_progress_is_shown_after_a_second() -> None:
    clock, terminal = FakeClock(50.0), io.StringIO()
    deadline = probe.Deadline(30, terminal, clock)
    deadline.begin("tcp:relay.example:4001", "connecting")
    one, other = socket.socketpair()
    with one, other:
        for seconds in 0.99, 0.02, 0.1, 0.2:
            clock.advance(seconds)
            assert deadline.wait([], [one]) == ([], [one])
    deadline.clear()
    line = "\r\033[Ktcp:relay.example:4001: connecting, 1 s"
    assert terminal.getvalue() == f"{line}{line}\r\033[K"


def test_progress_on_a_terminal(
    tcp: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr(probe, "PROGRESS_SECONDS", 1000.0)
    assert probe.main(["--timeout", "2000", tcp]) == 0
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(probe, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(probe, "PROGRESS_INTERVAL", 0.0)
    assert probe.main(["--timeout", "2000", tcp]) == 0
    shown = capsys.readouterr().err
    assert f"\r\033[K{tcp}: waiting for `ok`, 0 s"[:79] in shown and shown.endswith("\r\033[K")


# The command line.

ENDPOINTS = {
    "tcp:relay.example:4001": ("tcp", "relay.example", 4001, "", ""),
    "tcp:[::1]:4001": ("tcp", "::1", 4001, "", ""),
    "tcp:[fe80::1%eth0]:1": ("tcp", "fe80::1%eth0", 1, "", ""),
    "ws://relay.example": ("ws", "relay.example", 80, "/", "relay.example"),
    "wss://Relay.example/a?b": ("wss", "relay.example", 443, "/a?b", "Relay.example"),
    "WS://[::1]:8080?x": ("ws", "::1", 8080, "/?x", "[::1]:8080"),
}


@pytest.mark.parametrize("text", ENDPOINTS)
def test_endpoints(text: str) -> None:
    assert probe.Endpoint.parse(text) == (text, *ENDPOINTS[text])


@pytest.mark.parametrize(
    "text",
    [
        *("", "tcp", "tcp:host", "tcp:host:", "tcp:host:0", "tcp:host:65536", "tcp:host:x"),
        *("tcp::1:4001", "tcp:[::1:4001", "tcp:a b:1", "host:4001", "http://host/", "ws://"),
        *("tcp:h\u00f6st:1", "tcp:\u0661:1", "tcp:a|b:1", "tcp:[::1|]:1", "tcp:a\x1b:1"),
        *("ws://host:0/", "ws://host:65536/", "ws://user@host/", "ws://host/#part", "wss://[::g]/"),
    ],
)
def test_endpoints_that_are_wrong(text: str, run: Run) -> None:
    ran = run(text)
    assert ran.code == 3 and "is not tcp:HOST:PORT, ws://HOST/ or wss://HOST/" in ran.reason()


@pytest.mark.parametrize(
    "words",
    [
        *("", "tcp:a:1 tcp:b:1 tcp:c:1", "--json --nagios tcp:a:1", "--unknown tcp:a:1"),
        *("--bytes 0 tcp:a:1", "--bytes 2GiB tcp:a:1", "--bytes 1XB tcp:a:1", "--bytes -1 tcp:a:1"),
        *("--timeout 0 tcp:a:1", "--timeout nan tcp:a:1", "--every x tcp:a:1", "-w , tcp:a:1"),
        *("-c 1 tcp:a:1", "-w 1,2,3 tcp:a:1", "--name a/b tcp:a:1"),
        *("--metrics= tcp:a:1", "--ca= tcp:a:1"),
    ],
)
def test_a_wrong_command_line(words: str, run: Run) -> None:
    ran = run(*words.split())
    assert ran.code == 3 and ran.reason().endswith("(--help lists all options)")


def test_sizes() -> None:
    sizes = {"1": 1, "1MiB": 1 << 20, "500kB": 500_000, "1.5kB": 1500, "1GiB": 1 << 30, "7B": 7}
    sizes |= {"2KiB": 2048, "1MB": 10**6, "0.5GB": 5 * 10**8, "1.001kB": 1001}
    assert {text: probe.parse_size(text) for text in sizes} == sizes


def test_the_version_is_that_of_the_relay(run: Run) -> None:
    assert run("--version") == (0, f"transit-relay-probe {transit_relay.__version__}\n", "")


def program(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the program as a process, in a folder with a copy of it."""
    shutil.copy(FILE, cwd)
    command = [sys.executable, "-S", "-W", "error", FILE.name, *arguments]  # -S: no packages
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=4 * TIMEOUT)


def test_the_file_alone(tcp: str, tmp_path: Path) -> None:
    done = program(tcp, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = program("ws://localhost/", cwd=tmp_path)
    assert done.returncode == 3
    assert "ws://localhost/ needs ws_frames.py beside this program" in done.stderr


def test_the_file_with_ws_frames_beside_it(tcp: str, ws: str, tmp_path: Path) -> None:
    shutil.copy(RELAY.with_name("ws_frames.py"), tmp_path)
    done = program("--json", tcp, ws, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_standard_output_without_reader(tcp: str, tmp_path: Path) -> None:
    shutil.copy(FILE, tmp_path)
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end) as output:
        done = subprocess.run(
            [sys.executable, "-W", "error", FILE.name, "--json", tcp],
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.PIPE,
            text=True,
            timeout=4 * TIMEOUT,
        )
    message = "transit-relay-probe: standard output: Broken pipe\n"
    assert (done.returncode, done.stderr) == (3, message)


def test_ipv6(run: Run) -> None:
    try:
        double = Double(Pairing(lambda data, before: data), "::1")
    except OSError:
        pytest.skip("needs ::1")
    with double:
        assert double.tcp.startswith("tcp:[::1]:")
        assert run(double.tcp).code == 0


# The man page, and the help.


def test_help(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    code, out, err = run("--help")
    assert (code, err) == (0, "") and max(map(len, out.splitlines())) <= 80
    assert out.startswith("usage: transit-relay-probe [OPTIONS] ENDPOINT [ENDPOINT]\n")
    assert all(option in out for option in probe.make_parser()._option_string_actions)


def test_the_man_page_has_the_options_of_help() -> None:
    section = MAN.partition(".Sh OPTIONS\n")[2].partition("\n.Sh ")[0]
    described = {}
    for item in section.split(".It ")[1:]:
        macros, _, text = item.partition("\n")
        name = macros.replace("Fl ", "-").replace(" ,", ",").replace(" Ar ", " ")
        described[name] = " ".join(text.partition("\n.El")[0].split())
    expected = {}
    for action in probe.make_parser()._actions:
        if action.help != argparse.SUPPRESS:
            argument = f" {action.metavar}" if action.metavar else ""
            expected[", ".join(action.option_strings) + argument] = " ".join(
                (action.help or "").split()
            )
    assert described == expected


def test_the_man_page_has_every_kind_of_failure() -> None:
    section = MAN.partition(".Sh FAILURES\n")[2].partition("\n.Sh ")[0]
    items = {item.split()[0]: item.partition("\n")[2] for item in section.split(".It Li ")[1:]}
    texts = {kind: " ".join(text.replace(".El", "").split()) for kind, text in items.items()}
    assert texts == probe.FAILURES
