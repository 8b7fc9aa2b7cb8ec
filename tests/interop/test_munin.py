"""The Munin plugin under the real munin-run, beside the reference's five plugins."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sqlite3
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import tools
from children import TIMEOUT, Child, Relay
from stage import BAD, IMPATIENT, OK, Client, handshake
from test_differential import start_ours

PLUGIN = tools.ROOT / "packaging" / "munin" / "wormhole_transit_"
CONFIGURATION = PLUGIN.with_name("transit-relay.conf")
GRAPHS = ["active", "bytes", "bytes_alltime", "events", "events_alltime"]


class Ran(NamedTuple):
    """The exit code of a program, and both of its streams."""

    code: int
    lines: list[str]


def run(*command: object, usagedb: Path | None = None) -> Ran:
    """Run a program. `usagedb` is a variable of its environment."""
    environ = {**os.environ, **({"usagedb": str(usagedb)} if usagedb else {})}
    with Child([str(word) for word in command], env=environ) as child:
        return Ran(child.wait(), child.lines.rest())


# The programs.


def _have(program: str, missing: Callable[[str], NoReturn]) -> Path:
    try:
        return tools.program(program, "munin-node")
    except tools.Missing as error:
        missing(str(error))


class Node:
    """Munin's node with configuration files of its own."""

    def __init__(self, folder: Path, munin_run: Path, munin_node_configure: Path) -> None:
        """`folder`: other users may enter it, because Munin does not run plugins as root."""
        self._munin_run = munin_run
        self._munin_node_configure = munin_node_configure
        self._library = folder / "library"
        self._services = folder / "services"
        self._settings = folder / "plugin-conf.d"
        for each in self._library, self._services, self._settings:
            each.mkdir()
        (folder / "munin-node.conf").touch()
        shutil.copy(PLUGIN, self._library)
        self._options = [
            *["--config", folder / "munin-node.conf"],
            *["--servicedir", self._services, "--sconfdir", self._settings],
        ]

    def configure(self, text: str) -> None:
        """Replace the settings of the plugin."""
        (self._settings / CONFIGURATION.name).write_text(text)

    def suggest(self, option: str) -> Ran:
        """Run munin-node-configure with an option: --suggest or --shell."""
        command = [self._munin_node_configure, *self._options]
        return run(*command, "--libdir", self._library, option)

    def link(self) -> None:
        """Link the plugin under its five names, as munin-node-configure says."""
        commands = self.suggest("--shell")
        assert commands.code == 0
        for line in commands.lines:
            assert run("/bin/sh", "-c", line) == (0, [])
        names = [f"wormhole_transit_{graph}" for graph in GRAPHS]
        assert sorted(os.listdir(self._services)) == names, commands

    def run(self, graph: str, *arguments: str) -> Ran:
        """Let munin-run run the plugin."""
        return run(self._munin_run, *self._options, f"wormhole_transit_{graph}", *arguments)

    def values(self) -> dict[str, list[str]]:
        """Return the output lines of each graph."""
        found = {graph: self.run(graph) for graph in GRAPHS}
        assert all(ran.code == 0 for ran in found.values()), found
        return {graph: ran.lines for graph, ran in found.items()}


@pytest.fixture
def node(public: Path, missing: Callable[[str], NoReturn]) -> Node:
    return Node(public, _have("munin-run", missing), _have("munin-node-configure", missing))


def reference_archive(python_tools: Path) -> Path:
    """Return a folder with the source archive of the reference: its wheel has no plugins."""
    (wanted,) = re.findall(
        "^magic-wormhole-transit-relay==.*$", tools.REQUIREMENTS.read_text(), re.MULTILINE
    )
    folder = tools.BUILD / "munin-reference"
    made_from = folder / "made-from"
    with tools.exclusively(folder.name):
        if not made_from.exists() or made_from.read_text() != wanted:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            options = ["--quiet", "--no-deps", "--no-binary=magic-wormhole-transit-relay"]
            pip = [python_tools / "pip", "download", *options, f"--dest={folder}", wanted]
            tools.run(pip)
            (archive,) = folder.glob("*.tar.gz")
            tools.run(["tar", "-xzf", archive, "--strip-components=1", "-C", folder])
            made_from.write_text(wanted)
    return folder


@pytest.fixture(scope="module")
def reference(python_tools: Path, missing: Callable[[str], NoReturn]) -> Callable[..., Ran]:
    """Return a function that runs a plugin of the reference, with Python 3."""
    try:
        folder = reference_archive(python_tools) / "misc" / "munin"
    except tools.Missing as error:
        missing(str(error))
    assert sorted(os.listdir(folder)) == [f"wormhole_transit_{graph}" for graph in GRAPHS]

    def run_reference(graph: str, *arguments: str, usagedb: Path | None = None) -> Ran:
        return run(
            sys.executable, folder / f"wormhole_transit_{graph}", *arguments, usagedb=usagedb
        )

    return run_reference


# A database with every mood.


def happy(port: int) -> None:
    one, two = Client(port), Client(port)
    one.send(handshake("happy", "one"))
    two.send(handshake("happy", "two"))
    one.expect(OK)
    two.expect(OK)
    one.send(bytes(1000))
    two.expect(bytes(1000))
    one.shutdown()
    two.expect_end()
    one.expect_end()
    one.abandon()
    two.abandon()


def errory(port: int) -> None:
    client = Client(port)
    client.send(b"hello\n")
    client.expect(BAD)
    client.finish()


def lonely(port: int) -> None:
    client = Client(port)
    client.send(handshake("lonely", "one"))
    client.finish()


def impatient(port: int) -> None:
    client = Client(port)
    client.send(handshake("impatient", "one"), b"data")
    client.expect(IMPATIENT)
    client.finish()


def empty(port: int) -> None:
    Client(port).finish()


def redundant(port: int) -> None:
    """Two clients of one side meet a partner: a happy pair, and a redundant client."""
    clients = [Client(port), Client(port), Client(port)]
    for client, side in zip(clients, ("one", "one", "two")):
        client.send(handshake("redundant", side))
    clients[2].expect(OK)
    clients[2].shutdown()
    for client in clients:
        client.read_to_end()
        client.abandon()


SCRIPTS = {
    happy: 5,  # how often
    errory: 2,
    lonely: 3,
    redundant: 1,
    impatient: 4,
    empty: 7,
}
EVENTS = ["happy 6", "errory 2", "lonely 3", "redundant 1", "impatient 4", "empty 7"]
BYTES = 5000  # of the five pairs


def run_scripts(relay: Relay) -> None:
    """Let clients and pairs of every mood come and go, and wait for their records."""
    for script, times in SCRIPTS.items():
        for _ in range(times):
            script(relay.port)
            moods = {relay.record().mood for _ in range(2 if script is redundant else 1)}
            assert moods == {script.__name__, *(["happy"] if script is redundant else [])}


@pytest.fixture(scope="module")
def recorded(our_relay: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the database of a relay that was stopped just now."""
    folder = tmp_path_factory.mktemp("recorded")
    with start_ours(our_relay, folder) as relay:
        run_scripts(relay)
        assert relay.terminate() == 0
    return folder / "usage.sqlite"


@pytest.fixture
def database(recorded: Path, public: Path) -> Path:
    """Return a copy of that database, which a test may change, as a running relay would have it."""
    database = Path(shutil.copy(recorded, public))
    change(database, f"UPDATE `current` SET `updated` = {NOW}")
    return database


NOW = "CAST(strftime('%s', 'now') AS INTEGER)"  # seconds since the epoch


def change(database: Path, statements: str) -> None:
    """Change a database, as a relay could have left it."""
    with contextlib.closing(sqlite3.connect(database)) as db:
        db.executescript(statements)


def lines(*values: str) -> list[str]:
    """Return the output of a plugin: `lines("happy 6")`."""
    return [value.replace(" ", ".value ") for value in values]


def use_database(node: Node, database: Path) -> None:
    node.configure(f"[wormhole_transit_*]\nenv.usagedb {database}\n")
    node.link()


# Where the reference is right, ours is the same.


@pytest.mark.parametrize("graph", GRAPHS)
def test_the_configuration_of_the_reference(
    graph: str, node: Node, reference: Callable[..., Ran], database: Path
) -> None:
    use_database(node, database)
    code, ours = node.run(graph, "config")
    theirs = reference(graph, "config")
    assert (code, ours[: len(theirs.lines)]) == (theirs.code, theirs.lines)
    additional = [line.split()[0] for line in ours[len(theirs.lines) :] if ".label" in line]
    moods = ["impatient.label", "empty.label"]
    assert additional == (moods if graph.startswith("events") else [])


def test_the_database_of_a_relay(node: Node, reference: Callable[..., Ran], database: Path) -> None:
    """With pairs that run and clients that wait, as in a database that is updated meanwhile."""
    change(database, "UPDATE `current` SET `waiting` = 3, `connected` = 4, incomplete_bytes = 50")
    use_database(node, database)
    transferred = lines(f"bytes {BYTES}", f"incomplete {BYTES + 50}")
    ours = node.values()
    assert ours == {
        "active": lines("waiting 3", "connected 4"),
        "bytes": transferred,
        "bytes_alltime": transferred,
        "events": lines(*EVENTS),
        "events_alltime": lines(*EVENTS),
    }
    for graph, found in ours.items():
        additional = 2 if graph.startswith("events") else 0  # impatient, empty
        theirs = reference(graph, usagedb=database)
        assert theirs == (0, found[: len(found) - additional])


# Where the reference is wrong, ours is right.


class Wrong(NamedTuple):
    """A database with which plugins of the reference print something wrong, or fail."""

    statements: str  # they make the database
    theirs: dict[str, Ran | str]  # by graph: the output, or the error that ends it
    ours: dict[str, list[str]]  # by graph


FAILED = Ran(1, [])  # silently
NO_EVENTS = lines(*(f"{event.split()[0]} 0" for event in EVENTS))
UNKNOWN_EVENTS = lines(*(f"{event.split()[0]} U" for event in EVENTS))
UNKNOWN_RUNNING = lines(f"bytes {BYTES}", "incomplete U")
WRONG = {
    "a database in which no relay has written": Wrong(
        "DELETE FROM `current`; DELETE FROM `usage`",
        dict.fromkeys(GRAPHS, "TypeError"),
        {
            "active": lines("waiting U", "connected U"),
            "bytes": lines("bytes U", "incomplete U"),
            "bytes_alltime": lines("bytes 0", "incomplete U"),
            "events": UNKNOWN_EVENTS,
            "events_alltime": NO_EVENTS,
        },
    ),
    "a relay that stopped an hour ago": Wrong(
        "UPDATE `current` SET `updated` = `updated` - 3600",
        dict.fromkeys(GRAPHS, FAILED),
        {
            "active": lines("waiting U", "connected U"),
            "bytes": UNKNOWN_RUNNING,
            "bytes_alltime": UNKNOWN_RUNNING,
            "events": lines(*EVENTS),
            "events_alltime": lines(*EVENTS),
        },
    ),
    # The Twisted relay updates the row every five minutes.
    "a relay that updates its row in time": Wrong(
        f"UPDATE `current` SET `updated` = {NOW} - 301",
        dict.fromkeys(GRAPHS, FAILED),
        {"active": lines("waiting 0", "connected 0"), "events": lines(*EVENTS)},
    ),
    "unknown numbers": Wrong(
        "UPDATE `current` SET `waiting` = NULL, `connected` = NULL, `incomplete_bytes` = NULL",
        {
            "active": Ran(0, lines("waiting None", "connected None")),
            **dict.fromkeys(["bytes", "bytes_alltime"], "TypeError"),
        },
        {
            "active": lines("waiting U", "connected U"),
            "bytes": UNKNOWN_RUNNING,
            "bytes_alltime": UNKNOWN_RUNNING,
        },
    ),
    "start times that are blurred to the start of the relay": Wrong(
        "UPDATE `usage` SET `started` = (SELECT `rebooted` FROM `current`)",
        {
            "bytes": Ran(0, lines("bytes 0", "incomplete 0")),
            "events": Ran(0, NO_EVENTS[:4]),
        },
        {"bytes": lines(f"bytes {BYTES}", f"incomplete {BYTES}"), "events": lines(*EVENTS)},
    ),
    "two moods that are left out": Wrong(
        "DELETE FROM `usage` WHERE `result` NOT IN ('impatient', 'empty')",
        dict.fromkeys(["events", "events_alltime"], Ran(0, NO_EVENTS[:4])),
        {graph: NO_EVENTS[:4] + lines(*EVENTS[4:]) for graph in ("events", "events_alltime")},
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_where_the_reference_is_wrong(
    case: str, node: Node, reference: Callable[..., Ran], database: Path
) -> None:
    use_database(node, database)
    statements, theirs, ours = WRONG[case]
    change(database, statements)
    values = node.values()
    assert {graph: values[graph] for graph in ours} == ours
    for graph, expected in theirs.items():
        found = reference(graph, usagedb=database)
        if isinstance(expected, Ran):
            assert found == expected
        else:  # a traceback
            assert found.code == 1
            assert found.lines[-1].startswith(expected)


def test_a_database_that_is_missing(
    node: Node, reference: Callable[..., Ran], database: Path
) -> None:
    use_database(node, database)
    database.unlink()
    for graph in GRAPHS:
        reason = f"wormhole_transit_{graph}: {database}: No such file or directory"
        assert node.run(graph) == (1, [reason])
        theirs = reference(graph, usagedb=database)
        assert theirs.code == 1
        assert theirs.lines[-1].startswith("AssertionError")
    assert not database.exists()


def test_a_database_that_may_not_be_read(node: Node, database: Path) -> None:
    use_database(node, database)
    database.chmod(0)
    reason = f"wormhole_transit_bytes: {database}: Permission denied"
    assert node.run("bytes") == (1, [reason])


# munin-node-configure.


def test_no_source_no_suggestion(node: Node, public: Path) -> None:
    node.configure(f"[wormhole_transit_*]\nenv.status unix:{public}/status.sock\n")
    code, found = node.suggest("--suggest")
    reason = f"[unix:{public}/status.sock: No such file or directory]"
    assert code == 0
    assert [line.split("|")[2].strip() for line in found[2:]] == [f"no {reason}"]
    assert node.suggest("--shell") == (0, [])


def test_the_suggestions(node: Node, database: Path) -> None:
    node.configure(f"[wormhole_transit_*]\nenv.usagedb {database}\n")
    code, found = node.suggest("--suggest")
    assert code == 0
    (suggestion,) = [line.split("|")[2].strip() for line in found[2:]]
    assert suggestion == f"yes ({' '.join(f'+{graph}' for graph in GRAPHS)})"
    node.link()
    assert node.suggest("--shell") == (0, [])  # nothing is left to link


# The status listener.


class StatusRelay(Relay):
    """Our relay with a status listener, and perhaps with other options."""

    def __init__(self, command: list[str], endpoint: str, *options: str) -> None:
        address = r"tcp:(\d+):interface=127\.0\.0\.1"
        status = address if endpoint.startswith("tcp") else re.escape(endpoint)
        super().__init__(
            [*command, "--port=tcp:0:interface=127.0.0.1", f"--status={endpoint}", *options],
            rf"^Transit starting on {address}, {status} \(status\)$",
        )


def wait_for_values(node: Node, expected: dict[str, list[str]]) -> None:
    """Wait until the relay has written its records, about half a second after they arise."""
    deadline = time.monotonic() + TIMEOUT
    while (found := node.values()) != expected:
        assert time.monotonic() < deadline, found


def test_a_relay_with_a_unix_socket(our_relay: list[str], node: Node, public: Path) -> None:
    """With the configuration of the package, and as the user that it names."""
    node.configure(CONFIGURATION.read_text().replace("/run/transit-relay", str(public)))
    options = f"unix:{public}/status.sock:mode=666", f"--usage-db={public}/usage.sqlite"
    with contextlib.ExitStack() as stack, StatusRelay(our_relay, *options) as relay:
        node.link()
        run_scripts(relay)

        def connect(token: str, side: str) -> Client:
            client = Client(relay.port)
            stack.callback(client.abandon)
            client.send(handshake(token, side))
            return client

        # Two clients of one side wait for the same partner.
        for token, side in ("1", "one"), ("2", "one"), ("3", "one"), ("3", "one"):
            connect(token, side)
        one, two = connect("running", "one"), connect("running", "two")
        one.expect(OK)
        two.expect(OK)
        two.send(bytes(50))
        one.expect(bytes(50))
        transferred = lines(f"bytes {BYTES}", f"incomplete {BYTES + 50}")
        wait_for_values(
            node,
            {
                "active": lines("waiting 3", "connected 2"),
                "bytes": transferred,
                "bytes_alltime": transferred,
                "events": lines(*EVENTS),
                "events_alltime": lines(*EVENTS),
            },
        )
        assert relay.terminate() == 0
    reason = f"unix:{public}/status.sock: No such file or directory"
    for graph in GRAPHS:
        assert node.run(graph) == (1, [f"wormhole_transit_{graph}: {reason}"])


def test_a_relay_that_continues_a_database(
    our_relay: list[str], node: Node, database: Path, public: Path
) -> None:
    """Both sources have the same numbers. Those since the start are of the new relay."""
    # The start of a relay is recorded in whole seconds, so a record of the same second counts.
    change(database, "UPDATE `usage` SET `started` = `started` - 1")
    with StatusRelay(our_relay, "tcp:0:interface=127.0.0.1", f"--usage-db={database}") as relay:
        happy(relay.port)
        node.configure(f"[wormhole_transit_*]\nenv.status http://127.0.0.1:{relay.ports[1]}/\n")
        node.link()
        more = BYTES + 1000
        expected = {
            "active": lines("waiting 0", "connected 0"),
            "bytes": lines("bytes 1000", "incomplete 1000"),
            "bytes_alltime": lines(f"bytes {more}", f"incomplete {more}"),
            "events": [*lines("happy 1"), *NO_EVENTS[1:]],
            "events_alltime": lines("happy 7", *EVENTS[1:]),
        }
        wait_for_values(node, expected)
        node.configure(f"[wormhole_transit_*]\nenv.usagedb {database}\n")
        wait_for_values(node, expected)
        assert relay.terminate() == 0
    assert node.values() == expected


def test_a_relay_without_a_database(our_relay: list[str], node: Node) -> None:
    with StatusRelay(our_relay, "tcp:0:interface=127.0.0.1") as relay:
        node.configure(f"[wormhole_transit_*]\nenv.status http://127.0.0.1:{relay.ports[1]}/\n")
        node.link()
        assert node.values() == {
            "active": lines("waiting 0", "connected 0"),
            "bytes": lines("bytes 0", "incomplete 0"),
            "bytes_alltime": lines("bytes U", "incomplete U"),
            "events": NO_EVENTS,
            "events_alltime": UNKNOWN_EVENTS,
        }


def test_a_port_for_clients(our_relay: list[str], node: Node) -> None:
    """The relay answers a request there with a bad handshake, or with HTTP."""
    with StatusRelay(our_relay, "tcp:0:interface=127.0.0.1") as relay:
        node.configure(f"[wormhole_transit_*]\nenv.status http://127.0.0.1:{relay.ports[1]}/\n")
        node.link()
        node.configure(f"[wormhole_transit_*]\nenv.status http://127.0.0.1:{relay.port}/\n")
        reason = "env.status: not the status listener of a transit relay"
        assert node.run("active") == (1, [f"wormhole_transit_active: {reason}"])
