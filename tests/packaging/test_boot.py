"""The package on systems that boot: what its users, its administrator and its packagers meet.

Each test has a freshly booted Debian of its own, which takes a fraction of a second, and judges
in the end, whatever else it is about, that no log there tells who its clients were.
"""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from children import TIMEOUT
from guests import (
    FAMILIES,
    SECRETS,
    SERVICE,
    STATE,
    Knocking,
    connect,
    introduce,
    pass_bytes,
    prepare,
    rows,
    transfer,
)
from nspawn import Machine
from packages import build_version

from transit_relay import __version__

ROOT = Path(__file__).parent.parent.parent
SOCKET, WEB_SOCKET = "transit-relay.socket", "transit-relay-ws.socket"
CONFIG = "/etc/transit-relay.conf"
OWN_LISTENERS = "/usr/share/doc/transit-relay/examples/own-listeners.conf"
KIBIBYTE = 1 << 10


@pytest.fixture(params=["bookworm", "trixie"])
def machine(
    request: pytest.FixtureRequest, roots: Mapping[str, Any], tmp_path: Path
) -> Iterator[Machine]:
    """A system that has booted; a test that fails shows its journal."""
    with Machine(roots[request.param].folder(), tmp_path) as machine:
        prepare(machine)
        try:
            yield machine
        finally:
            print(machine.journal())
        assert "Transit starting on" in machine.journal()  # so that it is the right place to look
        for where, text in logs(machine):
            for secret in SECRETS:
                assert secret.encode() not in text, f"{where} holds {secret}"


@pytest.fixture
def installed(machine: Machine, deb: Path) -> Machine:
    """A system on which the package was installed."""
    machine.install(deb)
    return machine


@pytest.fixture(scope="module")
def older_deb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as a version before."""
    return build_version("0.0.9-1", tmp_path_factory.mktemp("older"))


def logs(machine: Machine) -> Iterator[tuple[str, bytes]]:
    """Whatever the system has written about its clients, with all that a journal's entry holds."""
    yield "the journal", machine.run("journalctl", "--output=export", "--all").encode()
    yield "the status", machine.try_("systemctl", "status", "--full", SERVICE).stdout.encode()
    for folder in "/var/log", STATE:
        for file in machine.path(folder).rglob("*"):
            if file.is_file():
                yield str(file), file.read_bytes()


def main_pid(machine: Machine) -> int:
    """The relay's process, by its number in there."""
    return int(machine.show(SERVICE, "MainPID"))


def restarts(machine: Machine) -> int:
    """How often systemd had to start it again by itself."""
    return int(machine.show(SERVICE, "NRestarts"))


def documented(about: str) -> list[str]:
    """The commands of the README's example that has this in it, a line each."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"(?:^ {4}.*\n)+", readme, re.M)
    (example,) = (block for block in blocks if about in block and "systemctl" in block)
    joined = re.sub(r"\\\n *", "", example)
    return [line.strip() for line in joined.splitlines()]


def follow(machine: Machine, commands: list[str]) -> None:
    """Do as one is told."""
    for command in commands:
        machine.run("sh", "-c", command)


# What it is once it is installed.


def test_it_runs_when_it_is_installed(installed: Machine) -> None:
    assert installed.state(SERVICE) == installed.state(SOCKET) == ("active", "enabled")
    assert installed.state(WEB_SOCKET) == ("inactive", "disabled")
    assert installed.listener(4001) and not installed.listener(4002)
    assert installed.show(SERVICE, "Type") == "notify"
    assert re.search(r"\d", installed.show(SERVICE, "StatusText"))
    assert installed.run("systemctl", "is-system-running").strip() == "running"


def test_it_comes_with_a_connection(installed: Machine) -> None:
    """Whoever has stopped the service alone: the socket starts it."""
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


def test_usage_is_recorded_and_blurred(installed: Machine) -> None:
    sizes = {1_234: 1_000, 12_345_678: 15_000_000}  # sent there; what is recorded, with a quarter
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


# What may happen to it.


HANGING = """\
import signal, sys, time
sys.path.insert(0, "/usr/share/transit-relay")
import transit_relay
signal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))  # in the thread of the loop
sys.exit(transit_relay.main())
"""


def test_a_loop_that_hangs(installed: Machine) -> None:
    """systemd notices, and starts it again, though all its other threads are well."""
    installed.path("/run/hanging.py").write_text(HANGING)
    command = f"ExecStart=\nExecStart=/usr/bin/python3 /run/hanging.py --config {CONFIG}"
    installed.add_drop_in(SERVICE, "hang", f"[Service]\nWatchdogSec=5\n{command}\n")
    installed.run("systemctl", "restart", SERVICE)
    before, cursor = main_pid(installed), installed.cursor()
    transfer(installed)
    installed.run("systemctl", "kill", "--kill-whom=main", "--signal=USR1", SERVICE)
    with connect(installed) as one, connect(installed) as other:  # they queue, and
        introduce(one, other)
        for client in one, other:
            assert client.receive(3) == b"ok\n"  # are served by its successor
        pass_bytes(one, other, b"served again")
    assert "Watchdog timeout (limit 5s)!" in installed.journal(cursor)
    assert restarts(installed) == 1
    assert main_pid(installed) != before


def test_idle_is_not_hanging(installed: Machine) -> None:
    """The loop wakes up to say that it lives, though nobody comes."""
    installed.add_drop_in(SERVICE, "hang", "[Service]\nWatchdogSec=3\n")
    installed.run("systemctl", "restart", SERVICE)
    signs = [installed.show(SERVICE, "WatchdogTimestampMonotonic")]
    deadline = time.monotonic() + TIMEOUT
    while len(signs) < 4:  # longer than that, at two signs in three seconds
        assert time.monotonic() < deadline, "no signs of life"
        sign = installed.show(SERVICE, "WatchdogTimestampMonotonic")
        if sign != signs[-1]:
            signs.append(sign)
    assert restarts(installed) == 0


def test_it_is_killed(installed: Machine) -> None:
    before = main_pid(installed)
    installed.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", SERVICE)
    transfer(installed)
    assert main_pid(installed) not in (0, before)
    assert restarts(installed) == 1


def test_restarts_while_clients_come(installed: Machine) -> None:
    """Newcomers queue: the listening socket stays the same, and all are served."""
    before, times = installed.listener(4001), 5
    with Knocking(installed) as clients:
        for _ in range(times):
            installed.run("systemctl", "restart", SERVICE)
            clients.wait_for_served()
    assert installed.listener(4001) == before
    assert clients.sent_away <= times  # the pair that met the relay which stopped
    assert restarts(installed) == 0


def test_a_mistake_in_its_configuration(installed: Machine) -> None:
    """It is told with its place, and not tried again and again; mended, all is well."""
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
    """They would have it started again and again: that ends. Mended, it needs a reset-failed."""
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


# What it may do.

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
    """What a program can do that runs as the relay does, in the same sandbox.

    `relaxed` are lines for the unit that take something back.
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


def test_it_dials_nobody(installed: Machine) -> None:
    """Even with sockets, and in the network of its host, nothing gets out; what lets it is seen."""
    relaxed = ("RestrictAddressFamilies=AF_INET", "PrivateNetwork=no")
    assert probe(installed, *relaxed)["send"] == "PermissionError"
    assert probe(installed, *relaxed, "IPAddressDeny=")["send"] == "done"


def exposure(machine: Machine) -> float:
    """Its exposure, from 0 to 10, as systemd itself tells it in its last line."""
    said = machine.run("systemd-analyze", "security", "--no-pager", SERVICE)
    found = re.search(r"Overall exposure level for \S+ (\d+\.\d) ", said)
    assert found, said
    return float(found[1])


def test_its_units_as_systemd_judges_them(installed: Machine) -> None:
    folder = installed.run("systemctl", "show", "--value", "--property=FragmentPath", SERVICE)
    units = [str(Path(folder.strip()).parent / unit) for unit in (SERVICE, SOCKET, WEB_SOCKET)]
    assert installed.run("systemd-analyze", "verify", "--man=no", *units) == ""
    installed.run("systemd-analyze", "security", "--threshold=2", "--no-pager", SERVICE)
    installed.fails("systemd-analyze", "security", "--threshold=1", "--no-pager", SERVICE)
    assert exposure(installed) <= 0.2


def test_own_listeners_as_documented(installed: Machine) -> None:
    """The program opens what its configuration says, in a sandbox that lets it."""
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


# Upgrades, and the end.


def version(machine: Machine) -> str:
    """Which one is installed, as it says itself."""
    return machine.run("transit-relay", "--version").split()[1]


def test_upgrade_and_downgrade(machine: Machine, older_deb: Path, deb: Path) -> None:
    """Nobody is refused, and the database keeps what it has."""
    machine.install(older_deb)
    assert version(machine) == "0.0.9"
    transfer(machine, size=2_000_000)
    kept, before = rows(machine), machine.listener(4001)
    assert len(kept) == 1
    for package, expected in ((deb, __version__), (older_deb, "0.0.9"), (deb, __version__)):
        cursor = machine.cursor()
        with Knocking(machine) as clients:
            machine.install(package)
            clients.wait_for_served()
        assert version(machine) == expected
        assert "stopped" in machine.journal(cursor)
        assert clients.sent_away <= 1  # the pair that met the relay which stopped
        assert machine.listener(4001) == before
        found = rows(machine)
        assert found[: len(kept)] == kept
        assert [row["result"] for row in found[len(kept) :]].count("happy") >= clients.served
        kept = found
    assert restarts(machine) == 0


# What may differ, and why.
MAY_DIFFER = {
    r"var/lib/dpkg/(lock|lock-frontend|status|status-old|triggers/Lock)": "dpkg works with them",
    r"var/log/dpkg\.log": "dpkg's diary",
    r"(var|run)/log/journal/.*": "the journal",
    r"run/systemd/generator/.*|run/systemd/systemd-units-load": "made anew by a daemon-reload",
    r"run/systemd/dynamic-uid": "systemd's own folder, once there was a DynamicUser=",
}
NOT_OURS = re.compile("|".join(MAY_DIFFER))


def files(machine: Machine) -> dict[str, str]:
    """Everything in the system: its kind, its owner, and of a file its size and when it changed."""
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
    return {name: known for name, known in listed if not NOT_OURS.fullmatch(name)}


def test_remove_and_purge(machine: Machine, deb: Path) -> None:
    before = files(machine)
    machine.install(deb)
    follow(machine, documented(f"enable --now {WEB_SOCKET}"))
    transfer(machine, "tcp", "ws")
    installed = files(machine).keys() - before.keys()
    assert {CONFIG[1:], "usr/sbin/transit-relay", f"{STATE[1:]}/usage.sqlite"} <= installed

    machine.run("dpkg", "--remove", "transit-relay")
    assert machine.listener(4001) is machine.listener(4002) is None
    for unit in SERVICE, SOCKET, WEB_SOCKET:
        assert machine.state(unit)[0] == "inactive"
    assert machine.path(CONFIG).exists()
    assert machine.path(f"{STATE}/usage.sqlite").exists()
    assert not machine.path("/usr/share/transit-relay").exists()

    machine.run("dpkg", "--purge", "transit-relay")
    differing = files(machine).items() ^ before.items()
    assert sorted({name for name, _ in differing}) == []
    assert "transit-relay" not in machine.path("/var/lib/dpkg/status").read_text()
    for unit in SERVICE, SOCKET, WEB_SOCKET:
        assert machine.show(unit, "LoadState") == "not-found"


def test_installed_again_it_has_its_records(installed: Machine, deb: Path) -> None:
    """Removed, but not purged, it may come back."""
    transfer(installed, size=2_000_000)
    (row,) = rows(installed)
    installed.run("dpkg", "--remove", "transit-relay")
    installed.install(deb)
    transfer(installed)
    assert rows(installed)[0] == row
