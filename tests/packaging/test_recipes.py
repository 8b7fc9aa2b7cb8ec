"""The README's ways to run it as a daemon without systemd, done as they stand there.

Each has a throwaway system of its own in which `make install` was run. What is not in the README is
what these tests do as the administrator: make a user, install a crontab, transfer something.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import HERE, ROOT, FreshRoot, run

SOURCES = ("transit_relay.py", "ws_frames.py")
DATABASE = "/var/lib/transit-relay/usage.sqlite"
# `wait_until COMMAND`: cron and svc go away before what they were told is done.
TOOLS = """\
transfer() { python3 /transfer.py; }
wait_until() { for _ in $(seq 600); do if "$@"; then return; fi; sleep 0.1; done; "$@"; }
happy() { python3 -c "import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(*db.execute('SELECT result, total_bytes FROM usage'))" "$1"; }
"""
ROW = "('happy', 3000000)"


def recipes() -> list[str]:
    """The indented blocks of that section."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    _, _, behind = readme.partition("\n## As a daemon\n")
    section, _, _ = behind.partition("\n## ")
    blocks = re.findall(r"(?:^ {4}.*\n)+", section, re.M)
    return [re.sub(r"(?m)^ {4}", "", block) for block in blocks]


CRON, START_STOP_DAEMON, RUN, LOGROTATE = recipes()
START, STOP = re.split("(?=^start-stop-daemon --stop)", START_STOP_DAEMON, flags=re.M)


class Host:
    """A system that has it installed below /usr/local; each use of it is thrown away."""

    def __init__(self, root: FreshRoot, folder: Path) -> None:
        run(["make", "-s", "install", f"DESTDIR={folder}"])
        self._root = root
        self._binds = [
            f"{folder}/usr/local:/usr/local",
            f"{HERE}/transfer.py:/transfer.py",
            *(f"{ROOT}/{name}:/mnt/{name}" for name in SOURCES),
        ]

    def run(self, script: str, **files: str) -> list[str]:
        """Run a shell script there, with $file for each of the files; give its lines."""
        made = "".join(
            f"{name}=$(mktemp)\ncat >${name} <<'end of file'\n{text}end of file\n"
            for name, text in files.items()
        )
        said = self._root.run("sh", "-ec", f"{TOOLS}{made}{script}", binds=self._binds)
        return said.splitlines()


@pytest.fixture(scope="module")
def host(roots: Mapping[str, FreshRoot], tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(roots["trixie-build"], tmp_path_factory.mktemp("staged"))


def test_cron(host: Host) -> None:
    said = host.run(
        f"""\
        useradd --create-home somebody
        cp /mnt/*.py /home/somebody
        crontab -u somebody $crontab
        cron
        transfer
        cd /home/somebody
        find transit_relay.* usage.sqlite -user somebody | sort
        su somebody -c 'cd; {STOP_CRON}'
        wait_until test ! -e transit_relay.pid
        happy usage.sqlite
        tail -n 1 transit_relay.log
        kill $(cat /run/crond.pid)
        """,
        crontab=CRON,
    )
    made = ["transit_relay.log", "transit_relay.pid", "usage.sqlite"]
    assert said[:-1] == ["transferred", *made, ROW]
    assert said[-1].endswith(" stopped")


# How it is stopped, in the text behind the recipe.
STOP_CRON = "kill $(cat transit_relay.pid)"


def test_that_is_how_cron_s_is_stopped() -> None:
    assert f"`{STOP_CRON}`" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_start_stop_daemon(host: Host) -> None:
    said = host.run(
        f"""\
        . $start
        transfer
        stat -c 'runs as %U' /proc/$(cat /run/transit-relay.pid)
        . $stop
        happy {DATABASE}
        tail -n 1 /var/log/transit-relay.log
        """,
        start=START,
        stop=STOP,
    )
    assert said[:3] == ["transferred", "runs as daemon", ROW]
    assert said[-1].endswith(" stopped")


SERVICE = """\
install -d -o daemon /var/lib/transit-relay
mkdir /service /service/transit-relay
cd /service/transit-relay
cp $run run
chmod 755 run
"""


# What supervises the folder one is in; what stops the relay and waits for its end; what starts it
# again; what ends all.
SUPERVISORS = {
    "daemontools": (
        "supervise .",
        "svc -d .; wait_until sh -c 'svstat . | grep \": down\"'",
        "svc -u .",
        "svc -dx .",
    ),
    "runit": ("runsv .", "sv -w 20 stop .", "sv -w 20 start .", "sv -w 20 exit ."),
}


@pytest.mark.parametrize("name", SUPERVISORS)
def test_supervisors(host: Host, name: str) -> None:
    supervise, stop, start, end = SUPERVISORS[name]
    said = host.run(
        f"""\
        {SERVICE}
        {supervise} >log 2>&1 &
        transfer
        {{ {stop}; {start}; }} >&2
        transfer
        {end} >&2
        wait
        happy {DATABASE}
        grep -cx stopped log
        """,
        run=RUN,
    )
    assert said == ["transferred", "transferred", f"{ROW} {ROW}", "2"]


def test_logrotate(host: Host) -> None:
    """What is said after a rotation is in the new file."""
    said = host.run(
        """\
        . $start
        install -m 644 $rules /etc/logrotate.d/transit-relay
        logrotate --force /etc/logrotate.conf
        . $stop
        cd /var/log
        stat -c '%n %U %a' transit-relay.log
        cut -d ' ' -f 2- transit-relay.log
        tail -n 1 transit-relay.log.1 | cut -d ' ' -f 2-
        """,
        start=START,
        stop=STOP,
        rules=LOGROTATE,
    )
    assert said == [
        "transit-relay.log daemon 640",
        "SIGTERM: stopping",
        "stopped",
        "Transit starting on tcp:4001",
    ]
