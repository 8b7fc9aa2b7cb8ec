"""Run the recipes of docs/operating.md for a daemon without systemd, as they are.

Each recipe runs in a throwaway system in which `make install` was run. The tests do the rest of the
administrator's work: they create a user, install a crontab and transfer data.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import HERE, ROOT, FreshRoot, run

SOURCES = ("transit_relay.py", "ws_frames.py")
DATABASE = "/var/lib/transit-relay/usage.sqlite"
# `wait_until COMMAND`: cron and svc return before their work is done.
TOOLS = """\
transfer() { python3 /transfer.py; }
wait_until() { for _ in $(seq 600); do if "$@"; then return; fi; sleep 0.1; done; "$@"; }
happy() { python3 -c "import sqlite3, sys
db = sqlite3.connect(sys.argv[1])
print(*db.execute('SELECT result, total_bytes FROM usage'))" "$1"; }
"""
ROW = "('happy', 3000000)"


OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")


def recipes() -> list[str]:
    """Return the indented blocks of the section "As a daemon"."""
    _, _, after = OPERATING.partition("\n## As a daemon\n")
    section, _, _ = after.partition("\n## ")
    blocks = re.findall(r"(?:^ {4}.*\n)+", section, re.M)
    return [re.sub(r"(?m)^ {4}", "", block) for block in blocks]


CRON, START_STOP_DAEMON, RUN, LOGROTATE = recipes()
START, STOP = re.split("(?=^start-stop-daemon --stop)", START_STOP_DAEMON, flags=re.M)


class Host:
    """A system with the relay installed below /usr/local. Changes to it are discarded."""

    def __init__(self, root: FreshRoot, folder: Path) -> None:
        run(["make", "-s", "install", f"DESTDIR={folder}"])
        self._root = root
        self._binds = [
            f"{folder}/usr/local:/usr/local",
            f"{HERE}/transfer.py:/transfer.py",
            *(f"{ROOT}/{name}:/mnt/{name}" for name in SOURCES),
        ]

    def run(self, script: str, **files: str) -> list[str]:
        """Run a shell script there. $NAME is the path of each file. Return the lines of output."""
        created = "".join(
            f"{name}=$(mktemp)\ncat >${name} <<'end of file'\n{text}end of file\n"
            for name, text in files.items()
        )
        output = self._root.run("sh", "-ec", f"{TOOLS}{created}{script}", binds=self._binds)
        return output.splitlines()


@pytest.fixture(scope="module")
def host(roots: Mapping[str, FreshRoot], tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(roots["trixie-build"], tmp_path_factory.mktemp("staged"))


def test_cron(host: Host) -> None:
    output = host.run(
        f"""\
        useradd --create-home alice
        cp /mnt/*.py /home/alice
        crontab -u alice $crontab
        cron
        transfer
        cd /home/alice
        find transit_relay.* usage.sqlite -user alice | sort
        su alice -c 'cd; {STOP_CRON}'
        wait_until test ! -e transit_relay.pid
        happy usage.sqlite
        tail -n 1 transit_relay.log
        kill $(cat /run/crond.pid)
        """,
        crontab=CRON,
    )
    created = ["transit_relay.log", "transit_relay.pid", "usage.sqlite"]
    assert output[:-1] == ["transferred", *created, ROW]
    assert output[-1].endswith(" stopped")


# The text after the recipe for cron documents this command.
STOP_CRON = "kill $(cat transit_relay.pid)"


def test_the_stop_command_for_cron_is_documented() -> None:
    assert f"`{STOP_CRON}`" in OPERATING


def test_start_stop_daemon(host: Host) -> None:
    output = host.run(
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
    assert output[:3] == ["transferred", "runs as daemon", ROW]
    assert output[-1].endswith(" stopped")


SERVICE = """\
install -d -o daemon /var/lib/transit-relay
mkdir /service /service/transit-relay
cd /service/transit-relay
cp $run run
chmod 755 run
"""


# For each supervisor five commands: supervise the current folder; reload the relay; stop it, and
# wait for its end; start it again; end the supervisor.
SUPERVISORS = {
    "daemontools": (
        "supervise .",
        "svc -h .",
        "svc -d .; wait_until sh -c 'svstat . | grep \": down\"'",
        "svc -u .",
        "svc -dx .",
    ),
    "runit": ("runsv .", "sv hup .", "sv -w 20 stop .", "sv -w 20 start .", "sv -w 20 exit ."),
}


@pytest.mark.parametrize("name", SUPERVISORS)
def test_supervisors(host: Host, name: str) -> None:
    supervise, reload, stop, start, end = SUPERVISORS[name]
    output = host.run(
        f"""\
        {SERVICE}
        {supervise} >log 2>&1 &
        transfer
        {reload} >&2
        wait_until grep -q "Transit reloaded" log
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
    assert output == [*["transferred"] * 3, f"{ROW} {ROW} {ROW}", "2"]


def test_logrotate(host: Host) -> None:
    """Messages after a rotation are in the new file."""
    output = host.run(
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
    assert output == [
        "transit-relay.log daemon 640",
        "SIGTERM: stopping",
        "stopped",
        "Transit starting on tcp:4001",
    ]
