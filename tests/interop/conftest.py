"""The programs that the interop tests need: from the Python and npm registries, and from Debian.

A test whose program cannot be installed is skipped, with the reason. With RELAY_INTEROP_REQUIRED=1,
as in CI, the test fails instead, and any other skip fails the run.
"""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TypeVar

import netns
import pytest
import tools
from transfers import mailbox_server

Tool = TypeVar("Tool")
REQUIRED = os.environ.get("RELAY_INTEROP_REQUIRED") == "1"


def _missing(reason: str) -> NoReturn:
    if REQUIRED:
        pytest.fail(f"{reason} (RELAY_INTEROP_REQUIRED forbids a skip)", pytrace=False)
    pytest.skip(reason)


def _have(get: Callable[..., Tool], *arguments: object) -> Tool:
    """Call `get`. If the program is missing, skip or fail the test."""
    try:
        return get(*arguments)
    except tools.Missing as error:
        _missing(str(error))


@pytest.fixture(scope="session")
def missing() -> Callable[[str], NoReturn]:
    """Return a function that skips the test with a reason, or fails it if skips are forbidden."""
    return _missing


@pytest.fixture(scope="session")
def python_tools() -> Path:
    """Return the bin folder of a venv with the Twisted relay, the mailbox server and the client."""
    return _have(tools.python_tools)


@pytest.fixture(scope="session")
def go_client() -> Path:
    """Return the path of wormhole-william, the client in Go."""
    return _have(tools.go_client)


@pytest.fixture(scope="session")
def chromium() -> Path:
    return _have(tools.program, "chromium", "chromium")


@pytest.fixture(scope="session")
def nginx() -> Path:
    return _have(tools.program, "nginx", "nginx-light")


@pytest.fixture(scope="session")
def haproxy() -> Path:
    return _have(tools.program, "haproxy", "haproxy")


@pytest.fixture(scope="session")
def caddy() -> Path:
    return _have(tools.program, "caddy", "caddy")


@pytest.fixture(scope="session")
def stunnel() -> Path:
    return _have(tools.program, "stunnel4", "stunnel4")


@pytest.fixture(scope="session")
def curl() -> Path:
    return _have(tools.program, "curl", "curl")


@pytest.fixture(scope="session")
def strace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the path of strace, if it may trace processes here: some sandboxes forbid it."""
    found = _have(tools.program, "strace", "strace")
    _have(tools.run, [found, "-o", tmp_path_factory.mktemp("strace") / "log", "true"])
    return found


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a self-signed certificate for relay.example.org, and its key.

    The files are fullchain.pem, privkey.pem, both.pem (both in one file), and spki: the digest of
    the public key, for Chromium's option.
    """
    openssl = _have(tools.program, "openssl", "openssl")
    folder = tmp_path_factory.mktemp("certificate")
    name = "relay.example.org"
    _have(
        tools.run,
        [
            *[openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
            *["-nodes", "-days", "2", "-subj", f"/CN={name}"],
            *["-addext", f"subjectAltName=DNS:{name}", "-keyout", "privkey.pem"],
            *["-out", "fullchain.pem"],
        ],
        folder,
    )
    public = ["-in", "privkey.pem", "-pubout", "-outform", "DER", "-out", "p"]
    _have(tools.run, [openssl, "pkey", *public], folder)
    digest = hashlib.sha256((folder / "p").read_bytes()).digest()
    (folder / "spki").write_text(base64.b64encode(digest).decode())
    both = [(folder / file).read_text() for file in ("fullchain.pem", "privkey.pem")]
    (folder / "both.pem").write_text("".join(both))
    return folder


@pytest.fixture(scope="session")
def npm_ws() -> Path:
    """Return a node_modules folder with the package ws, for node's NODE_PATH."""
    for tool in "node", "npm":
        if not shutil.which(tool):
            _missing(f"no {tool}")
    folder = tools.BUILD / "npm-ws"
    wanted = "ws@8.23.0"  # after a change the folder is created again
    made_from = folder / "made-from"
    if not made_from.exists() or made_from.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        _have(tools.run, ["npm", "install", "--loglevel=error", "--prefix", folder, wanted])
        made_from.write_text(wanted)
    return folder / "node_modules"


@pytest.fixture(scope="session")
def our_relay() -> list[str]:
    """Return the command that runs our relay, without options."""
    return [sys.executable, str(tools.ROOT / "transit_relay.py")]


@pytest.fixture(scope="module")
def hosts() -> Iterator[None]:
    """Create the three hosts. Remove them also if SIGTERM stops this test run."""

    def stop(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with netns.three_hosts():
            yield
    except netns.Unavailable as error:
        _missing(str(error))
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def mailbox(
    hosts: None, python_tools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    """Run a mailbox server on the server, and return its URL."""
    with mailbox_server(python_tools, tmp_path_factory.mktemp("mailbox")) as url:
        yield url


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run if a test was skipped, for any reason, and RELAY_INTEROP_REQUIRED is set."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if REQUIRED and reporter and reporter.stats.get("skipped"):
        reporter.ensure_newline()
        reporter.write_line("RELAY_INTEROP_REQUIRED: a skipped test fails the run", red=True)
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
