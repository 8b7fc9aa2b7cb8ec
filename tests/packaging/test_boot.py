"""The package on booted systems, as its users, administrators and packagers use it.

Each test boots a fresh Debian, which takes a fraction of a second. Most tests boot one in which the
package is installed already, because an installation takes longer. After each test the fixture
checks that no log of the system identifies a client.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import stat
import subprocess
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from children import TIMEOUT
from conftest import FreshRoot, documents
from guests import (
    FAMILIES,
    PORTS,
    SECRETS,
    SERVICE,
    STATE,
    Instance,
    LongTransfer,
    PairAfterPair,
    connect,
    get,
    handshakes,
    pass_bytes,
    prepare,
    rows,
    send_handshakes,
    transfer,
)
from nspawn import Machine
from packages import repack

from transit_relay import __version__

SOCKET, WEB_SOCKET = "transit-relay.socket", "transit-relay-ws.socket"
STATUS_SOCKET = "transit-relay-status.socket"
OPTIONAL_SOCKETS = (WEB_SOCKET, STATUS_SOCKET)  # not enabled
UNITS = (SERVICE, SOCKET, *OPTIONAL_SOCKETS)
CONFIG = "/etc/transit-relay.conf"
OWN_LISTENERS = "/usr/share/doc/transit-relay/examples/own-listeners.conf"
KIBIBYTE, MEBIBYTE = 1 << 10, 1 << 20


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def fresh(request: pytest.FixtureRequest, roots: Mapping[str, FreshRoot]) -> FreshRoot:
    """Return a fresh system."""
    return roots[request.param]


@pytest.fixture(scope="module")
def folder_with_package(
    fresh: FreshRoot, deb: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """Return the root folder of a system with the package."""
    folder = tmp_path_factory.mktemp("with-package") / fresh.suite
    try:
        yield fresh.copy_with(deb, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def booted(folder: Path, scratch: Path) -> Iterator[Machine]:
    """Boot a system. If the test fails, pytest shows the journal."""
    with Machine(folder, scratch) as machine:
        prepare(machine)
        try:
            yield machine
        finally:
            print(machine.journal())
        assert "Transit starting on" in machine.journal()  # the journal has the relay's messages
        for place, text in logs(machine):
            for secret in SECRETS:
                assert secret.encode() not in text, f"{place} contains {secret}"


@pytest.fixture
def machine(fresh: FreshRoot, tmp_path: Path) -> Iterator[Machine]:
    """Boot a fresh system."""
    with booted(fresh.folder(), tmp_path) as machine:
        yield machine


@pytest.fixture
def installed(folder_with_package: Path, tmp_path: Path) -> Iterator[Machine]:
    """Boot a system with the package."""
    with booted(folder_with_package, tmp_path) as machine:
        yield machine


@pytest.fixture(scope="module")
def older_deb(deb: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the package with an older version number."""
    return repack(deb, "0.0.9-1", tmp_path_factory.mktemp("older"))


def logs(machine: Machine) -> Iterator[tuple[str, bytes]]:
    """Return all logs of the system. The journal has all fields of its entries."""
    yield "the journal", machine.run("journalctl", "--output=export", "--all").encode()
    yield "the status", machine.try_("systemctl", "status", "--full", SERVICE).stdout.encode()
    for folder in "/var/log", str(Path(STATE).parent):
        for file in machine.path(folder).rglob("*"):
            if file.is_file():
                yield str(file), file.read_bytes()


def main_pid(machine: Machine, service: str = SERVICE) -> int:
    """Return the process id of the relay, as the system sees it."""
    return int(machine.show(service, "MainPID"))


def restarts(machine: Machine, service: str = SERVICE) -> int:
    """Return how often systemd has restarted the relay by itself."""
    return int(machine.show(service, "NRestarts"))


def documented(part: str) -> list[str]:
    """Return the commands of the documented example that contains `part`."""
    blocks = re.findall(r"(?:^ {4}.*\n)+", documents(), re.M)
    (example,) = (block for block in blocks if part in block and "systemctl" in block)
    joined = re.sub(r"\\\n *", "", example)
    return [line.strip() for line in joined.splitlines()]


def follow(machine: Machine, commands: list[str]) -> None:
    """Run the commands."""
    for command in commands:
        machine.run("sh", "-c", command)


def await_journal(machine: Machine, after: str, text: str) -> None:
    """Wait until the journal has a text in the entries after a cursor."""
    deadline = time.monotonic() + TIMEOUT
    while text not in (entries := machine.journal(after)):
        assert time.monotonic() < deadline, entries
        time.sleep(0.1)


# After the installation.


def require_running(machine: Machine) -> None:
    """Check that the service runs with its socket, and that all units of the system are well."""
    assert machine.state(SERVICE) == machine.state(SOCKET) == ("active", "enabled")
    for unit in OPTIONAL_SOCKETS:
        assert machine.state(unit) == ("inactive", "disabled")
    assert machine.listener(4001) and not machine.listener(4002)
    assert machine.show(SERVICE, "Type") == "notify"
    assert re.search(r"\d", machine.show(SERVICE, "StatusText"))
    assert machine.run("systemctl", "is-system-running").strip() == "running"


def test_it_runs_when_it_is_installed(machine: Machine, deb: Path) -> None:
    machine.install(deb)
    require_running(machine)


def test_it_runs_after_a_boot(installed: Machine) -> None:
    require_running(installed)


def test_a_connection_starts_it(installed: Machine) -> None:
    """The service is stopped, its socket is not. A connection starts the service."""
    installed.run("systemctl", "stop", SERVICE)
    assert installed.state(SERVICE) == ("inactive", "enabled")
    transfer(installed)
    assert installed.state(SERVICE) == ("active", "enabled")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_pair(installed: Machine, family: str) -> None:
    transfer(installed, family=family)


def test_websocket_as_documented(installed: Machine) -> None:
    with pytest.raises(ConnectionRefusedError):
        connect(installed, "ws")
    commands = documented(f"enable --now {WEB_SOCKET}")
    assert len(commands) == 3
    follow(installed, commands)
    for unit in SERVICE, SOCKET, WEB_SOCKET:
        assert installed.state(unit) == ("active", "enabled")
    for first, second in ("tcp", "ws"), ("ws", "tcp"), ("ws", "ws"), ("tcp", "tcp"):
        for family in FAMILIES:
            transfer(installed, first, second, family, size=256 * KIBIBYTE)


def enable(machine: Machine, socket: str) -> None:
    """Enable a socket with the commands that are documented for the one for WebSocket."""
    commands = documented(f"enable --now {WEB_SOCKET}")
    follow(machine, [command.replace(WEB_SOCKET, socket) for command in commands])


def reload(machine: Machine) -> None:
    """Reload the relay, and wait until it has done so."""
    cursor = machine.cursor()
    machine.run("systemctl", "reload", SERVICE)
    await_journal(machine, cursor, "Transit reloaded")


GET = """\
import http.client, socket, sys
relay = http.client.HTTPConnection("localhost")
relay.sock = socket.socket(socket.AF_UNIX)
relay.sock.connect("/run/transit-relay/status.sock")
relay.request("GET", sys.argv[1])
answer = relay.getresponse()
print(answer.status, answer.read().decode(), end="")
"""


def test_status_on_a_unix_socket(installed: Machine) -> None:
    """After a reload with the line of the packaged example, every user and Munin can use it."""
    line, config = "status unix:/run/transit-relay/status.sock", installed.path(CONFIG)
    config.write_text(config.read_text().replace(f"\n#{line}", f"\n{line}"))
    plugin = "/run/wormhole_transit_active"
    installed.run("ln", "-s", "/usr/share/munin/plugins/wormhole_transit_", plugin)
    as_nobody = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    with LongTransfer(installed) as running:
        reload(installed)
        running.wait_for_rounds()
        health, metrics = (
            installed.run(*as_nobody, "python3", "-c", GET, path)
            for path in ("/healthz", "/metrics")
        )
        assert health == "200 ok\n"
        assert "\ntransit_relay_pairs 1\n" in metrics
        assert installed.run(*as_nobody, plugin) == "waiting.value 0\nconnected.value 2\n"


def health(machine: Machine) -> tuple[int, str]:
    """Request /healthz on the port of the status socket."""
    return get(machine.connect("127.0.0.1", 8001, "127.0.0.1"), "/healthz")


def test_status_on_a_port(installed: Machine) -> None:
    """systemd opens the port with the service, also after a crash, and closes it with the service.

    So a request never starts a relay that was stopped.
    """
    enable(installed, STATUS_SOCKET)
    assert installed.state(STATUS_SOCKET) == ("active", "enabled")
    assert health(installed) == (200, "ok\n")
    reload(installed)
    assert health(installed) == (200, "ok\n")
    installed.run("systemctl", "restart", SERVICE)
    assert health(installed) == (200, "ok\n")
    installed.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", SERVICE)
    transfer(installed)
    assert restarts(installed) == 1
    assert health(installed) == (200, "ok\n")

    installed.run("systemctl", "stop", SERVICE)
    assert installed.state(STATUS_SOCKET) == ("inactive", "enabled")
    with pytest.raises(ConnectionRefusedError):
        health(installed)
    assert installed.state(SERVICE) == ("inactive", "enabled")
    transfer(installed)  # starts the service
    assert installed.state(STATUS_SOCKET) == ("active", "enabled")
    assert health(installed) == (200, "ok\n")


def test_usage_is_recorded_and_blurred(installed: Machine) -> None:
    sizes = {1_234: 1_000, 12_345_678: 15_000_000}  # bytes one way; bytes recorded, both ways
    for size in sizes:
        transfer(installed, size=size)
    recorded = rows(installed)
    assert [row["result"] for row in recorded] == ["happy", "happy"]
    assert [row["total_bytes"] for row in recorded] == [*sizes.values()]
    for row in recorded:
        assert row["started"] > 0 and row["started"] % 3600 == 0
    folder = installed.path(STATE).stat()
    assert stat.S_IMODE(folder.st_mode) == 0o700 and folder.st_uid != 0
    assert os.readlink(installed.path("/var/lib/transit-relay")) == "private/transit-relay"


# Faults and restarts.


HANGING = """\
import signal, sys, time
sys.path.insert(0, "/usr/share/transit-relay")
import transit_relay
signal.signal(signal.SIGWINCH, lambda *_: time.sleep(3600))  # in the thread of the loop
sys.exit(transit_relay.main())
"""


def test_a_loop_that_hangs(installed: Machine) -> None:
    """systemd's watchdog restarts the relay, although its other threads run."""
    installed.path("/run/hanging.py").write_text(HANGING)
    command = f"ExecStart=\nExecStart=/usr/bin/python3 /run/hanging.py --config {CONFIG}"
    installed.add_drop_in(SERVICE, "hang", f"[Service]\nWatchdogSec=5\n{command}\n")
    installed.run("systemctl", "restart", SERVICE)
    before, cursor = main_pid(installed), installed.cursor()
    transfer(installed)
    installed.run("systemctl", "kill", "--kill-whom=main", "--signal=WINCH", SERVICE)
    with connect(installed) as one, connect(installed) as other:  # the kernel queues them
        send_handshakes(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"  # from the new process
        pass_bytes(one, other, b"served again")
    assert "Watchdog timeout (limit 5s)!" in installed.journal(cursor)
    assert restarts(installed) == 1
    assert main_pid(installed) != before


def test_idle_is_not_hanging(installed: Machine) -> None:
    """The loop notifies the watchdog although no client comes."""
    installed.add_drop_in(SERVICE, "hang", "[Service]\nWatchdogSec=3\n")
    installed.run("systemctl", "restart", SERVICE)
    signs = [installed.show(SERVICE, "WatchdogTimestampMonotonic")]
    deadline = time.monotonic() + TIMEOUT
    while len(signs) < 4:  # takes longer than WatchdogSec, with two notifications in 3 s
        assert time.monotonic() < deadline, "no notification"
        sign = installed.show(SERVICE, "WatchdogTimestampMonotonic")
        if sign != signs[-1]:
            signs.append(sign)
        time.sleep(0.2)
    assert restarts(installed) == 0


def test_it_is_killed(installed: Machine) -> None:
    before = main_pid(installed)
    installed.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", SERVICE)
    transfer(installed)
    assert main_pid(installed) not in (0, before)
    assert restarts(installed) == 1


def test_a_drain_as_documented(installed: Machine) -> None:
    """It takes longer than TimeoutStopSec=. Without sockets, new clients are refused.

    The option is added for this one stop, when there is a pair already.
    """
    config = installed.path(CONFIG)
    config.write_text(f"{config.read_text()}drain 3600\n")
    installed.add_drop_in(SERVICE, "drain", "[Service]\nTimeoutStopSec=2\n")
    commands = documented("stop transit-relay.socket transit-relay-ws.socket\n")
    with connect(installed) as one, connect(installed) as other:
        send_handshakes(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"
        reload(installed)
        commands[-1] = commands[-1].replace("stop", "stop --no-block")
        follow(installed, commands)
        installed.run("systemctl", "stop", "--no-block", SERVICE)  # sends no second signal
        deadline = time.monotonic() + TIMEOUT
        while installed.listener(4001):
            assert time.monotonic() < deadline, "the relay still listens"
        with pytest.raises(ConnectionRefusedError):
            connect(installed)
        end = time.monotonic() + 5  # time must pass: systemd would have killed the relay by then
        while time.monotonic() < end:
            pass_bytes(one, other, bytes(MEBIBYTE))
            time.sleep(0.1)
        status = installed.show(SERVICE, "StatusText")
        assert re.match(r"stopping; draining, at most 3\d+ s left; 1 pair, 0 waiting, ", status)
        assert installed.show(SERVICE, "SubState") == "stop-sigterm"
        cursor = installed.cursor()
        follow(installed, documented("systemctl kill"))
        assert one.read_to_end() == other.read_to_end() == b""
    installed.run("systemctl", "stop", SERVICE)  # waits for the end
    assert "SIGTERM: the drain ends; pairs left: 1" in installed.journal(cursor)
    assert installed.show(SERVICE, "Result") == "success"


def test_restarts_while_clients_come(installed: Machine) -> None:
    """The listening socket stays open, and new connections wait in its queue. None is refused."""
    before, times = installed.listener(4001), 5
    with PairAfterPair(installed) as clients:
        for _ in range(times):
            installed.run("systemctl", "restart", SERVICE)
            clients.wait_for_rounds(20)
    assert installed.listener(4001) == before
    assert clients.ended_early <= times  # the pair of the relay that stopped
    assert restarts(installed) == 0


def test_a_mistake_in_its_configuration(installed: Machine) -> None:
    """The message names the line, and systemd does not retry. After the correction it starts."""
    config, cursor = installed.path(CONFIG), installed.cursor()
    good = config.read_text()
    config.write_text(f"{good}no-such-option 1\n")
    place = rf"{re.escape(CONFIG)}\D+{len(good.splitlines()) + 1}\b"
    installed.fails("systemctl", "restart", SERVICE)
    assert re.search(rf"transit-relay\[\d+\]: .*{place}", installed.journal(cursor))
    assert installed.state(SERVICE) == ("failed", "enabled")
    assert installed.show(SERVICE, "ExecMainStatus") == "2"
    assert restarts(installed) == 0

    config.write_text(good)
    installed.run("systemctl", "restart", SERVICE)
    transfer(installed)


def test_a_mistake_while_clients_come(installed: Machine) -> None:
    """Connections start it until the start limit. After the correction, reset-failed is needed."""
    follow(installed, documented(f"enable --now {WEB_SOCKET}"))
    config, cursor = installed.path(CONFIG), installed.cursor()
    good = config.read_text()
    config.write_text(f"{good}no-such-option 1\n")
    installed.fails("systemctl", "restart", SERVICE)
    with connect(installed) as client, pytest.raises(ConnectionResetError):
        client.read(1)  # until systemd closes the socket
    tries = installed.journal(cursor).count(f"{SERVICE}: Main process exited")
    burst = int(installed.show(SERVICE, "StartLimitBurst"))
    assert burst / 2 < tries <= burst

    config.write_text(good)
    installed.run("systemctl", "reset-failed", SERVICE)
    installed.run("systemctl", "start", WEB_SOCKET)
    installed.run("systemctl", "restart", SERVICE)
    for unit in SERVICE, SOCKET, WEB_SOCKET:
        assert installed.state(unit) == ("active", "enabled")
    transfer(installed, "tcp", "ws")


# The sandbox.

PROBE = """\
import json, os, socket

def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__ if error.errno != 97 else "no such family"
    return "done"

def send():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"hello", ("127.0.0.1", 4001))

print("probe:", json.dumps({
    "IPv4": attempt(lambda: socket.socket(socket.AF_INET).close()),
    "IPv6": attempt(lambda: socket.socket(socket.AF_INET6).close()),
    "send": attempt(send),
    "home": attempt(lambda: os.listdir("/home")),
    "write": attempt(lambda: open("/etc/written", "w").close()),
    "user": os.getuid(),
}), flush=True)
"""


def probe(machine: Machine, *relaxed: str) -> dict[str, Any]:
    """Run a program in the sandbox of the relay, and return what it can do.

    `relaxed` are lines for the unit that remove restrictions.
    """
    machine.path("/run/probe.py").write_text(PROBE)
    lines = ["[Service]", "ExecStartPost=/usr/bin/python3 /run/probe.py", *relaxed, ""]
    machine.add_drop_in(SERVICE, "probe", "\n".join(lines))
    cursor = machine.cursor()
    machine.run("systemctl", "restart", SERVICE)
    found = re.search(r" probe: (.*)$", machine.journal(cursor), re.M)
    assert found
    seen: dict[str, Any] = json.loads(found[1])
    return seen


def test_its_sandbox(installed: Machine) -> None:
    transfer(installed)
    seen = probe(installed)
    assert seen.pop("user") not in (0, 65534)
    assert seen == {
        "IPv4": "no such family",
        "IPv6": "no such family",
        "send": "no such family",
        "home": "PermissionError",
        "write": "OSError",
    }
    transfer(installed)
    networks = [
        os.readlink(installed.path(f"/proc/{pid}/ns/net")) for pid in (1, main_pid(installed))
    ]
    assert networks[0] != networks[1]


def test_no_outgoing_traffic(installed: Machine) -> None:
    """IPAddressDeny= alone blocks it. Without that line the probe can send, so the probe works."""
    relaxed = ("RestrictAddressFamilies=AF_INET", "PrivateNetwork=no")
    assert probe(installed, *relaxed)["send"] == "PermissionError"
    assert probe(installed, *relaxed, "IPAddressDeny=")["send"] == "done"


def exposure(machine: Machine, service: str = SERVICE) -> float:
    """Return the exposure level, from 0 to 10, in the last line of systemd's report."""
    report = machine.run("systemd-analyze", "security", "--no-pager", service)
    found = re.search(r"Overall exposure level for \S+ (\d+\.\d) ", report)
    assert found, report
    return float(found[1])


def test_systemd_analyze(installed: Machine) -> None:
    folder = installed.run("systemctl", "show", "--value", "--property=FragmentPath", SERVICE)
    units = [str(Path(folder.strip()).parent / unit) for unit in UNITS]
    assert installed.run("systemd-analyze", "verify", "--man=no", *units) == ""
    installed.run("systemd-analyze", "security", "--threshold=2", "--no-pager", SERVICE)
    installed.fails("systemd-analyze", "security", "--threshold=1", "--no-pager", SERVICE)
    assert exposure(installed) <= 0.2


def test_own_listeners_as_documented(installed: Machine) -> None:
    """The program opens its own listeners, as configured, in a sandbox that permits it."""
    follow(installed, documented(f"enable --now {WEB_SOCKET}"))
    with installed.path(CONFIG).open("a") as config:
        config.write("port tcp:4001\nwebsocket tcp:4002\n")
    passed = installed.listener(4001)
    commands = documented(OWN_LISTENERS)
    assert commands[0].startswith("install ") and "mask --now" in "".join(commands)
    follow(installed, commands)
    assert installed.state(SOCKET) == installed.state(WEB_SOCKET) == ("inactive", "masked")
    assert installed.listener(4001) not in (None, passed)
    for family in FAMILIES:
        transfer(installed, "tcp", "ws", family)
    assert exposure(installed) <= 1.1
    installed.run("systemd-analyze", "security", "--threshold=11", "--no-pager", SERVICE)


# Upgrades and removal.


def version(machine: Machine) -> str:
    """Return the version that the installed program prints."""
    return machine.run("transit-relay", "--version").split()[1]


def test_upgrade_and_downgrade(machine: Machine, older_deb: Path, deb: Path) -> None:
    """No client is refused, no pair ends early, and the database keeps its rows."""
    machine.install(older_deb)
    assert version(machine) == "0.0.9"
    transfer(machine, size=2_000_000)
    kept, before = rows(machine), machine.listener(4001)
    assert len(kept) == 1
    for package, expected in (deb, __version__), (older_deb, "0.0.9"):
        cursor = machine.cursor()
        with PairAfterPair(machine) as clients:
            machine.install(package)
            clients.wait_for_rounds(20)
        assert version(machine) == expected
        assert "stopped" not in machine.journal(cursor)
        assert "Transit reloaded" in machine.journal(cursor)
        assert clients.ended_early == 0
        assert machine.listener(4001) == before
        found = rows(machine)
        assert found[: len(kept)] == kept
        assert [row["result"] for row in found[len(kept) :]].count("happy") >= clients.rounds
        kept = found
    assert restarts(machine) == 0


def test_reloads_while_clients_transfer(machine: Machine, deb: Path, tmp_path: Path) -> None:
    """By a command and by an upgrade. A new version that does not work changes nothing."""
    old, main = "reloaded by the old version", "\n\n\ndef main("
    machine.install(repack(deb, "0.1~1-1", tmp_path, "reloaded, listening", f"{old}, listening"))
    follow(machine, documented(f"enable --now {WEB_SOCKET}"))
    before = [main_pid(machine), *(machine.listener(port) for port in PORTS.values())]
    with contextlib.ExitStack() as clients:
        pairs = [("tcp", "tcp"), ("ws", "tcp"), ("ws", "ws")]
        transfers = [clients.enter_context(LongTransfer(machine, *kinds)) for kinds in pairs]
        waiting, partner = (clients.enter_context(connect(machine, kind)) for kind in PORTS)
        early, late = handshakes(2)
        waiting.send(early)
        newcomers = clients.enter_context(PairAfterPair(machine))

        def all_go_on() -> None:
            newcomers.wait_for_rounds(20)
            for one in transfers:
                one.wait_for_rounds()
            assert before == [main_pid(machine), *map(machine.listener, PORTS.values())]

        cursor = machine.cursor()
        machine.run("systemctl", "reload", SERVICE)
        await_journal(machine, cursor, f"Transit {old}")
        all_go_on()

        # The first one fails in the check of ExecReload=, the second one in the rehearsal.
        cursor = machine.cursor()
        for number, pattern, text, reason in (
            ("0.1~2-1", r"^def main\(", f"raise SystemExit('broken'){main}", "broken"),
            ("0.1~3-1", "^STATE_VERSION = .*", "STATE_VERSION = 9", "its version is 1, expected 9"),
        ):
            output = machine.install(repack(deb, number, tmp_path, pattern, text))
            assert "the old version goes on serving" in output and reason in output, output
            all_go_on()
        assert "Transit reloaded" not in machine.journal(cursor)
        assert machine.show(SERVICE, "StatusText").startswith("reload refused: ")

        assert "transit-relay: reloaded" in machine.install(deb)
        assert "Transit reloaded, listening on" in machine.journal(cursor)
        assert version(machine) == __version__
        all_go_on()
        partner.send(late)
        for client in waiting, partner:
            assert client.receive(3) == b"ok\n"
    assert newcomers.ended_early == restarts(machine) == 0
    assert "refused" not in machine.show(SERVICE, "StatusText")
    served = newcomers.rounds + len(pairs) + 1
    assert [row["result"] for row in rows(machine)] == ["happy"] * served


def test_a_mistake_before_a_reload(installed: Machine) -> None:
    """The command fails, the message names the line, and the relay serves on."""
    config, cursor, pid = installed.path(CONFIG), installed.cursor(), main_pid(installed)
    config.write_text(f"{config.read_text()}no-such-option 1\n")
    installed.fails("systemctl", "reload", SERVICE)
    assert "unrecognized arguments: --no-such-option" in installed.journal(cursor)
    transfer(installed)
    assert main_pid(installed) == pid


# Several relays.


def happy_bytes(machine: Machine, relay: Instance) -> list[int]:
    """Return the recorded bytes of each happy pair of an instance. It restarts the instance."""
    recorded = rows(machine, relay.service, relay.state)
    return [row["total_bytes"] for row in recorded if row["result"] == "happy"]


def test_instances_as_documented(machine: Machine, deb: Path, tmp_path: Path) -> None:
    """Each has its own user, socket and records. An upgrade reloads those that run, and no other.

    A removal stops them, and a purge leaves nothing of them.
    """
    machine.run("systemd-sysusers", "--inline", "g haproxy -")  # the group of HAProxy's package
    machine.install(repack(deb, "0.1~1-1", tmp_path))
    follow(machine, documented("enable --now transit-relay@1 transit-relay@2"))
    relays = one, two = Instance(machine, "1"), Instance(machine, "2")
    units = [unit for relay in relays for unit in (relay.service, relay.socket)]
    assert [machine.state(unit) for unit in units] == [("active", "enabled")] * 4
    pids = [main_pid(machine, relay.service) for relay in relays]
    users = {machine.path(f"/proc/{pid}").stat().st_uid for pid in pids}
    assert len(users) == 2 and 0 not in users
    for relay in relays:
        assert exposure(machine, relay.service) <= 0.2
    for family in FAMILIES:
        transfer(one, family=family)

    with LongTransfer(one) as first, LongTransfer(two, "tcp", "ws") as second:
        broken = repack(deb, "0.1~2-1", tmp_path, "^STATE_VERSION = .*", "STATE_VERSION = 9")
        refused, reloaded = machine.install(broken), machine.install(deb)
        for number in 1, 2:
            assert f"transit-relay@{number}: not reloaded, the old version goes on" in refused
            assert f"transit-relay@{number}: reloaded" in reloaded
        for running in first, second:
            running.wait_for_rounds()
    assert [main_pid(machine, relay.service) for relay in relays] == pids
    assert machine.state(SERVICE) == machine.state(SOCKET) == ("inactive", "disabled")
    assert [len(happy_bytes(machine, relay)) for relay in relays] == [3, 1]
    machine.run("systemctl", "stop", two.service)
    assert "transit-relay@1: reloaded" in (output := machine.install(deb))
    assert "transit-relay@2" not in output
    assert machine.state(two.service) == machine.state(two.socket) == ("inactive", "enabled")

    machine.run("dpkg", "--purge", "transit-relay")
    assert [machine.state(unit)[0] for unit in units] == ["inactive"] * 4
    for folder in "/etc", "/run", "/var/lib/private", "/var/lib":
        assert [*machine.path(folder).rglob("*transit-relay*")] == []


HAPROXY_SOCKET = "/run/haproxy/gateways.sock"
GATEWAY_CONF = "/usr/share/doc/transit-relay/examples/gateway.conf"


def test_a_gateway_as_documented(installed: Machine) -> None:
    """A gateway takes WebSocket clients, who meet TCP clients at the relay behind it."""
    units = installed.path("/etc/systemd/system")
    options = "--usage-db /var/lib/transit-relay-behind/usage.sqlite"
    for unit, lines in {
        "transit-relay@behind.socket": "[Socket]\nListenStream=127.0.0.1:4004\nSocketGroup=",
        "transit-relay@behind.service": f'[Service]\nEnvironment="OPTIONS={options}"',
    }.items():
        (units / f"{unit}.d").mkdir()
        (units / f"{unit}.d" / "behind.conf").write_text(lines + "\n")
    installed.run("systemctl", "daemon-reload")
    installed.run("systemctl", "start", "transit-relay@behind.socket")
    config = installed.path(CONFIG)
    config.write_text("forward haproxy:tcp:127.0.0.1:4004\n")
    follow(installed, documented(GATEWAY_CONF))
    assert installed.state(SOCKET) == ("inactive", "masked")
    assert exposure(installed) <= 1.1
    behind = Instance(installed, "behind")
    for family in FAMILIES:
        transfer(installed, "ws", "ws", family)
    with connect(installed, "ws") as one, connect(behind) as other:
        send_handshakes(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"
        pass_bytes(one, other, bytes(MEBIBYTE))
        reload(installed)
        pass_bytes(other, one, bytes(MEBIBYTE))
    assert len(happy_bytes(installed, behind)) == 3


def documented_text(before: str) -> str:
    """Return the indented lines after the step of a documented list that begins with `before`."""
    (found,) = re.findall(
        rf"^\d\. {re.escape(before)}.*\n(?: {{3}}\S.*\n)*\n((?: {{8}}.*\n|\n)+)", documents(), re.M
    )
    return textwrap.dedent(found).strip() + "\n"


def test_a_gateway_on_the_machine_of_haproxy_as_documented(installed: Machine) -> None:
    """A relay has the place of HAProxy: a unix socket that only root and a group may use."""
    installed.run("systemd-sysusers", "--inline", "g haproxy -")  # the group of HAProxy's package
    options = "--usage-db /var/lib/transit-relay-behind/usage.sqlite"
    gateway = "transit-relay@gateway1"
    for unit, text in {
        "transit-relay@behind.socket": f"[Socket]\nListenStream=\nListenStream={HAPROXY_SOCKET}",
        "transit-relay@behind.service": f'[Service]\nEnvironment="OPTIONS={options}"',
        f"{gateway}.socket": documented_text(f"`systemctl edit {gateway}.socket`"),
        f"{gateway}.service": documented_text(f"`systemctl edit {gateway}.service`"),
    }.items():
        installed.add_drop_in(unit, "override", text)
    config = documented_text("Write `/etc/transit-relay-gateway.conf`")
    assert HAPROXY_SOCKET in config
    installed.path("/etc/transit-relay-gateway.conf").write_text(config)
    installed.run("systemctl", "stop", SOCKET, SERVICE)
    installed.run("systemctl", "start", "transit-relay@behind.socket")
    follow(installed, documented(f"enable --now {gateway}"))
    assert exposure(installed, f"{gateway}.service") <= 0.2
    assert stat.S_IMODE(installed.path(HAPROXY_SOCKET).stat().st_mode) == 0o660
    assert installed.path("/run/transit-relay-gateway1/status.sock").is_socket()
    transfer(installed, "ws", "ws")
    assert len(happy_bytes(installed, Instance(installed, "behind"))) == 1


# Files that may change, and the reason.
MAY_DIFFER = {
    r"var/lib/dpkg/(lock|lock-frontend|status|status-old|triggers/Lock)": "state of dpkg",
    r"var/log/dpkg\.log": "log of dpkg",
    r"(var|run)/log/journal/.*": "the journal",
    r"run/systemd/generator/.*|run/systemd/systemd-units-load": "written by a daemon-reload",
    r"run/systemd/dynamic-uid": "created by systemd for the first DynamicUser=",
}
NOT_OURS = re.compile("|".join(MAY_DIFFER))


def files(machine: Machine) -> dict[str, str]:
    """Return the files of the root folder and of /run by name, with their properties.

    These are type, mode and owner, and except for folders also size and time.
    """
    disk = machine.path("/")
    folder = ["-type", "d", "-printf", "%p\\t%y %m %U %G\\n"]
    other = ["-printf", "%p\\t%y %m %U %G %s %l %T@\\n"]
    found = subprocess.run(
        ["find", f"{disk}/", f"{disk}/run/", "-xdev", *folder, "-o", *other],
        capture_output=True,
        text=True,
        check=True,
    )
    listed = (line.split("\t") for line in found.stdout.replace(f"{disk}/", "").splitlines())
    return {name: properties for name, properties in listed if not NOT_OURS.fullmatch(name)}


def test_remove_and_purge(machine: Machine, deb: Path) -> None:
    before = files(machine)
    machine.install(deb)
    for socket in OPTIONAL_SOCKETS:
        enable(machine, socket)
    transfer(machine, "tcp", "ws")
    assert health(machine) == (200, "ok\n")
    installed = files(machine).keys() - before.keys()
    assert {CONFIG[1:], "usr/sbin/transit-relay", f"{STATE[1:]}/usage.sqlite"} <= installed

    machine.run("dpkg", "--remove", "transit-relay")
    assert machine.listener(4001) is machine.listener(4002) is None
    for unit in UNITS:
        assert machine.state(unit)[0] == "inactive"
    assert machine.path(CONFIG).exists()
    assert machine.path(f"{STATE}/usage.sqlite").exists()
    assert not machine.path("/usr/share/transit-relay").exists()

    machine.run("dpkg", "--purge", "transit-relay")
    differing = files(machine).items() ^ before.items()
    assert sorted({name for name, _ in differing}) == []
    assert "transit-relay" not in machine.path("/var/lib/dpkg/status").read_text()
    for unit in UNITS:
        assert machine.show(unit, "LoadState") == "not-found"


def test_records_survive_a_removal(installed: Machine, deb: Path) -> None:
    """A package that was removed but not purged finds its records after a new installation."""
    transfer(installed, size=2_000_000)
    (row,) = rows(installed)
    installed.run("dpkg", "--remove", "transit-relay")
    installed.install(deb)
    transfer(installed)
    assert rows(installed)[0] == row
