"""The relay under systemd: passed sockets and notifications. tests/packaging has the real one."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import RELAY, TIMEOUT, Loop, handshake, read_to_end, snapshot_with
from processes import (
    QuietRelay,
    ReachedRelay,
    activated,
    locked,
    only_line,
    patched,
    transfer,
)

from transit_relay import Environment, ServiceManager, Snapshot, size_text, status_line

# Passed sockets and their names.


@pytest.fixture
def passed() -> Iterator[list[socket.socket]]:
    """Open three listening sockets, to be passed to a relay."""
    with contextlib.ExitStack() as opened:
        yield [
            opened.enter_context(socket.create_server(("127.0.0.1", 0), backlog=16))
            for _ in range(3)
        ]


def start(names: str, *passed: socket.socket, arguments: tuple[str, ...] = ()) -> ReachedRelay:
    """Start a relay, with these sockets passed under these names."""
    fds = [sock.fileno() for sock in passed]
    env = {"LISTEN_FDNAMES": names} if names else {}
    return ReachedRelay(*arguments, env=env, pass_fds=fds, program=activated(*passed))


def junk(sock: socket.socket) -> bytes:
    """Send junk to a socket. Return the first line of the answer, which shows the role."""
    with socket.create_connection(sock.getsockname(), TIMEOUT) as client:
        client.sendall(b"junk\n\r\n\r\n")
        return read_to_end(client).partition(b"\n")[0]


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        ("transit-relay.socket", "p"),
        ("websocket", "w"),
        ("websocket:transit-relay.socket", "wp"),
        ("a:websocket:b", "pwp"),
        ("a:websocket:websocket", "pww"),
        ("", "ppp"),  # unnamed, as by systemd-socket-activate
        ("a", "pp"),
        ("Websocket:web", "pp"),
    ],
)
def test_without_endpoint_options_sockets_are_used_by_name(
    passed: list[socket.socket], names: str, kinds: str
) -> None:
    used = passed[: len(kinds)]
    where = [
        f"systemd:index={n}{' (websocket)' if kind == 'w' else ''}" for n, kind in enumerate(kinds)
    ]
    with start(names, *used) as relay:
        relay.wait_for("^Transit starting on " + re.escape(", ".join(where)) + "$")
        answers = {"p": b"bad handshake", "w": b"HTTP/1.1 400 Bad Request\r"}
        assert [junk(sock) for sock in used] == [answers[kind] for kind in kinds]
        relay.address = used[0].getsockname()
        transfer(relay)
        relay.stop_cleanly()


@pytest.mark.parametrize("option", ["--port", "--websocket"])
def test_an_endpoint_option_replaces_all_passed_sockets(
    passed: list[socket.socket], option: str
) -> None:
    arguments = ("--port", "systemd:index=1")
    if option == "--websocket":  # else the default port would be opened
        arguments = ("--port", "tcp:0:interface=127.0.0.1", option, "systemd:index=1")
    with start("a:b", *passed[:2], arguments=arguments) as relay:
        relay.wait_for("^Transit starting on .*systemd:index=1")
        assert b"systemd:index=0" not in relay.stderr
        assert relay.stop() == 0


@pytest.mark.parametrize(
    ("arguments", "unused"),
    [
        (("--port", "systemd:index=1"), 1),
        (("--port", "systemd:index=1", "--websocket", "systemd:name=a"), 0),
        (("--port", "fd:3", "--port", "fd:4"), 0),
        (("--port", "tcp:0:interface=127.0.0.1"), 2),
        ((), 0),
    ],
)
def test_unused_sockets_are_reported(
    passed: list[socket.socket], arguments: tuple[str, ...], unused: int
) -> None:
    """Clients can connect to them, and would wait for ever."""
    with start("a:b", *passed[:2], arguments=arguments) as relay:
        relay.wait_for("^Transit starting on")
        message = (
            b"warning: sockets passed to us, but named by no endpoint: %d; their connections are"
            b" never accepted: name them (--port=systemd:index=N), or do not pass them\n" % unused
        )
        assert (message in relay.stderr) == (unused > 0)
        assert relay.stderr.count(b"warning: ") == (unused > 0)
        assert relay.stop() == 0


def test_a_socket_that_does_not_listen_is_refused() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as passed:
        with start("status", passed) as relay:
            assert relay.wait() == 1
    reason = "systemd:index=0: descriptor 3 is no listening stream socket"
    assert only_line(relay) == f"transit-relay: {reason}"


# Notifications.


class Manager:
    """A stand-in for systemd, which receives on NOTIFY_SOCKET."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(TIMEOUT)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def next(self) -> str:
        """Return the next message."""
        return self._socket.recv(4096).decode()

    def until(self, beginning: str) -> str:
        """Return the first message with this beginning."""
        while not (message := self.next()).startswith(beginning):
            pass
        return message

    def rest(self) -> list[str]:
        """Return the messages that have arrived."""
        self._socket.setblocking(False)
        messages = []
        with contextlib.suppress(BlockingIOError):
            while True:
                messages.append(self._socket.recv(4096).decode())
        self._socket.settimeout(TIMEOUT)
        return messages

    def close(self) -> None:
        self._socket.close()


@pytest.fixture(params=["path", "@abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Manager]:
    address = str(tmp_path / "notify")
    with contextlib.closing(Manager(address if request.param == "path" else f"@{address}")) as one:
        yield one


def environment_of(manager: Manager, **more: str) -> dict[str, str]:
    """Return the environment of a relay that this manager starts."""
    return {**os.environ, "NOTIFY_SOCKET": manager.address, **more}


def test_ready_status_stopping(manager: Manager) -> None:
    with QuietRelay(env=environment_of(manager)) as relay:
        assert manager.next() == "READY=1"
        assert b"Transit starting on" in os.read(relay.process.stderr.fileno(), 4096)
        assert manager.next().startswith("STATUS=0 pairs, 0 waiting, 0 connections; ")
        relay.process.send_signal(signal.SIGTERM)
        assert manager.next().startswith("STOPPING=1\nSTATUS=stopping; 0 pairs, 0 waiting, ")
        assert relay.wait() == 0
    assert manager.rest() == []


def test_status_has_the_numbers_of_the_moment(manager: Manager) -> None:
    """The status is sent 20 times a second here, so that the test need not wait."""
    with QuietRelay(env=environment_of(manager), program=patched(STATUS_SECONDS=0.05)) as relay:
        manager.until("READY=1")
        with relay.connect() as lonely:
            lonely.sendall(handshake("lonely"))
            one, other = relay.pair("pair")
            with one, other:
                one.sendall(b"x" * 1500)
                assert other.recv(1500, socket.MSG_WAITALL)
                manager.until(
                    "STATUS=1 pair, 1 waiting, 3 connections;"
                    " since the start 0 pairs ended, 1.5 kB relayed"
                )
            manager.until(
                "STATUS=0 pairs, 1 waiting, 1 connection;"
                " since the start 1 pair ended, 1.5 kB relayed"
            )
        relay.stop_cleanly()


def test_the_loop_notifies_the_watchdog(manager: Manager) -> None:
    """A loop that does not run does not notify: no thread does it."""
    with QuietRelay(env=environment_of(manager, WATCHDOG_USEC="100000")) as relay:
        manager.until("READY=1")
        manager.until("WATCHDOG=1")
        manager.until("WATCHDOG=1")
        relay.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, relay.pid, os.WSTOPPED | os.WNOWAIT)
        manager.rest()
        relay.process.send_signal(signal.SIGCONT)
        manager.until("WATCHDOG=1")
        relay.stop_cleanly()


def snapshot(*numbers: int, problems: tuple[str, ...] = ()) -> Snapshot:
    """Return a Snapshot with the numbers of the status, and 0 elsewhere."""
    return snapshot_with(**dict(zip(STATUS_FIELDS, numbers)), problems=problems)


STATUS_FIELDS = ("pairs", "waiting_clients", "connections", "pairs_ended", "relayed_bytes")


class StandInServer:
    """Collects the chores."""

    def __init__(self) -> None:
        self.chores: list[tuple[float, Callable[[], None]]] = []
        self.timers = self  # ServiceManager calls server.timers.every
        self.now = snapshot(1, 2, 3, 4, 5)

    def every(self, seconds: float, work: Callable[[], None]) -> None:
        self.chores.append((seconds, work))

    def snapshot(self) -> Snapshot:
        return self.now


def take_manager() -> ServiceManager:
    """Return the manager that the environment names."""
    environment = Environment.take()
    return ServiceManager(environment.notify_socket, environment.watchdog_seconds())


@pytest.mark.parametrize(
    ("usec", "pid", "seconds"),
    [
        ("30000000", None, 15.0),
        ("30000000", "", 15.0),
        ("30000000", "us", 15.0),
        ("1", None, 0.05),  # no more than 20 a second
        ("30000000", "1", None),  # another process's
        ("", None, None),
        ("soon", None, None),
        ("-1", None, None),
        ("0", None, None),
    ],
)
def test_how_often_the_watchdog_is_notified(
    manager: Manager,
    monkeypatch: pytest.MonkeyPatch,
    usec: str,
    pid: str | None,
    seconds: float | None,
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid is not None:
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "us" else pid)
    server = StandInServer()
    service_manager = take_manager()
    service_manager.add_chores(server)  # type: ignore[arg-type]
    with contextlib.closing(service_manager):
        for _, work in server.chores:
            work()
    expected = [10.0] if seconds is None else [10.0, seconds]
    assert [every for every, _ in server.chores] == expected
    messages = manager.rest()
    assert messages[0].startswith("STATUS=1 pair, 2 waiting, 3 connections;")
    assert messages[1:] == ["WATCHDOG=1"] * (seconds is not None)
    for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"):
        assert name not in os.environ


def test_the_environment_is_kept_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A program that the relay executes later needs the variables again."""
    variables = {name.upper(): f"value of {name}" for name in Environment._fields}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment = Environment.take()
    assert variables.keys().isdisjoint(os.environ)
    kept = {name.upper(): value for name, value in environment._asdict().items()}
    assert kept == variables
    assert Environment.take() == Environment()


@pytest.mark.parametrize("address", ["", "vsock:2:1234", "relative"])
def test_an_unknown_kind_of_address_is_not_used(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "1000000")
    server = StandInServer()
    service_manager = take_manager()
    service_manager.add_chores(server)  # type: ignore[arg-type]
    service_manager.notify("READY=1")
    assert server.chores == []


def test_a_service_manager_that_is_gone_is_logged_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(ServiceManager(str(tmp_path / "none"))) as gone:
        gone.notify("READY=1")
        gone.notify("WATCHDOG=1")
    assert [record.getMessage() for record in caplog.records] == [
        "the service manager cannot be notified: No such file or directory"
    ]


def test_a_service_manager_that_does_not_read_delays_nothing(manager: Manager) -> None:
    with contextlib.closing(ServiceManager(manager.address)) as busy:
        for _ in range(10_000):  # more than fits in the queue
            busy.notify("WATCHDOG=1")
    assert 0 < len(manager.rest()) < 10_000


def fill(manager: Manager) -> socket.socket:
    """Fill the queue of the manager. Return the socket that fills it."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    sock.setblocking(False)
    address = manager.address
    sock.connect("\0" + address[1:] if address.startswith("@") else address)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(b"junk")
    return sock


def test_a_notification_that_must_arrive_is_sent_again(manager: Manager) -> None:
    with fill(manager), contextlib.closing(ServiceManager(manager.address)) as busy:
        busy.ready()
        busy.notify("WATCHDOG=1")
        assert set(manager.rest()) == {"junk"}
        busy.notify("WATCHDOG=1")
        busy.notify("WATCHDOG=1")
        assert manager.rest() == ["READY=1\nWATCHDOG=1", "WATCHDOG=1"]


def test_a_relay_serves_though_its_readiness_is_sent_later(manager: Manager) -> None:
    program = patched(STATUS_SECONDS=0.05)
    with fill(manager), QuietRelay(env=environment_of(manager), program=program) as relay:
        transfer(relay)
        assert manager.until("READY=1").startswith("READY=1\nSTATUS=")
        relay.process.send_signal(signal.SIGTERM)
        manager.until("STOPPING=1")
        assert relay.wait() == 0


def test_the_status_of_a_long_stop(manager: Manager, tmp_path: Path) -> None:
    program = patched(STATUS_SECONDS=0.05, STOP_RECORD_SECONDS=0.5)
    database = tmp_path / "usage.sqlite"
    with QuietRelay(
        "--usage-db", str(database), env=environment_of(manager), program=program
    ) as relay:
        manager.until("READY=1")
        with locked(database):
            relay.process.send_signal(signal.SIGTERM)
            manager.until("STOPPING=1")
            assert manager.next().startswith("STATUS=stopping; 0 pairs")
            relay.wait()


def drain_snapshot(seconds: float) -> Snapshot:
    """Return a Snapshot of a drain with so much time left."""
    return snapshot(1, 0, 2)._replace(drain_seconds_left=seconds)


@pytest.mark.parametrize(
    ("left", "granted"), [(3_600, "60000000"), (15, "30000000"), (5, "20000000"), (0.5, "15500000")]
)
def test_a_drain_asks_for_time_and_not_for_more_than_it_needs(
    manager: Manager, left: float, granted: str
) -> None:
    """The stop after the drain takes 12 s, which `left` does not contain."""
    server = StandInServer()
    server.now = drain_snapshot(left)
    with contextlib.closing(ServiceManager(manager.address)) as service_manager:
        service_manager.add_chores(server)  # type: ignore[arg-type]
        service_manager.stopping(server.now)
        ((every, send_status),) = server.chores
        send_status()
        server.now = snapshot()
        send_status()
    variables = [
        f"EXTEND_TIMEOUT_USEC={granted}",
        f"STATUS=stopping; draining, at most {left:.0f} s left; 1 pair, 0 waiting, 2 connections; "
        "since the start 0 pairs ended, 0 bytes relayed",
    ]
    first, second, last = manager.rest()
    assert first.split("\n") == ["STOPPING=1", *variables]
    assert second.split("\n") == variables
    assert last.startswith("STATUS=stopping; 0 pairs")
    assert every < int(granted) / 1e6 - 5 if left > 10 else int(granted) / 1e6 - left > 12


def test_systemd_is_asked_for_time_while_pairs_run_on(manager: Manager) -> None:
    program = patched(STATUS_SECONDS=0.05)
    env = environment_of(manager, WATCHDOG_USEC="100000")
    with QuietRelay("--drain", "3600", env=env, program=program) as relay:
        one, other = relay.pair()
        with one, other:
            manager.until("READY=1")
            relay.process.send_signal(signal.SIGTERM)
            extension = (
                r"EXTEND_TIMEOUT_USEC=60000000\nSTATUS=stopping; draining, at most 3\d+ s left"
            )
            assert re.match(rf"STOPPING=1\n{extension}; 1 pair, 0 ", manager.until("STOPPING=1"))
            for _ in range(2):
                assert re.match(extension, manager.until("EXTEND_TIMEOUT_USEC="))
                manager.until("WATCHDOG=1")
        assert relay.wait() == 0


def test_without_a_service_manager_nothing_is_logged() -> None:
    with QuietRelay() as relay:
        transfer(relay)
        relay.stop_cleanly()
    assert b"service manager" not in relay.stderr


# The status, and the chores of the loop.


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1, "1 byte"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (99_949, "99.9 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),
        (12_345_678, "12.3 MB"),
        (5_600_000_000, "5.6 GB"),
        (1_234_567_890_123, "1.2 TB"),
        (12_345_678_901_234_567, "12345.7 TB"),
    ],
)
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text


def test_status_line() -> None:
    assert status_line(snapshot(2, 5, 9, 1234, 5_600_000_000)) == (
        "2 pairs, 5 waiting, 9 connections; since the start 1,234 pairs ended, 5.6 GB relayed"
    )


def numbers_of(taken: Snapshot) -> tuple[int, ...]:
    """Return the numbers of the status."""
    return tuple(getattr(taken, field) for field in STATUS_FIELDS)


def test_snapshot_counts_all_relayed_bytes(loop: Loop) -> None:
    one, other = loop.pair()
    for _ in range(2):
        loop.connect().sendall(handshake("lonely", "side"))
    one.sendall(b"abc")
    loop.pump()
    assert numbers_of(loop.server.snapshot()) == (1, 2, 4, 0, 3)
    one.close()
    other.close()
    loop.pump()
    assert numbers_of(loop.server.snapshot()) == (0, 2, 2, 1, 3)


def test_a_chore_runs_at_once_and_then_at_its_interval(loop: Loop) -> None:
    done: list[float] = []
    loop.server.timers.every(15, lambda: done.append(loop.clock()))
    for step in (0, 14.9, 0.1, 0, 40, 14.9, 0.1):
        loop.clock.advance(step)
        loop.server.run_once(0)
    assert [at - 1_000 for at in done] == [0, 15, 55, 70]
    assert loop.server._timeout() <= 15


# The units.


def settings(unit: str) -> list[str]:
    """Return the settings of the section Service of a unit."""
    text = (RELAY.parent / "packaging" / "systemd" / unit).read_text(encoding="utf-8")
    (section,) = re.findall(r"(?ms)^\[Service\]\n(.*?)^\[", text)
    return re.findall(r"(?m)^[A-Z]\w+=.*$", section)


def test_an_instance_has_the_sandbox_of_the_service() -> None:
    own = {"Environment", "ExecStart", "ExecReload", "User", "StateDirectory", "RuntimeDirectory"}
    own |= {"RuntimeDirectoryMode"}

    def common(unit: str) -> list[str]:
        return [line for line in settings(unit) if line.partition("=")[0] not in own]

    assert common("transit-relay@.service") == common("transit-relay.service")
    # The units have about 50. Far fewer would mean that `settings` does not find them.
    assert len(common("transit-relay@.service")) > 40
