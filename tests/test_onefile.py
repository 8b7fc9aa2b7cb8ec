"""`make onefile`: the file is reproducible and contains the whole relay."""

from __future__ import annotations

import http.client
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest
from helpers import RELAY, TIMEOUT, WEB, RelayProcess
from processes import transfer

ROOT = RELAY.parent
STATUS_PAGE = ROOT / "packaging" / "status-page"
GATEWAY = ROOT / "packaging" / "gateway" / "transit_relay_gateway.py"
PACKED = [
    STATUS_PAGE / "status.html",
    RELAY,
    GATEWAY,
    STATUS_PAGE / "transit_relay_status.py",
    ROOT / "ws_frames.py",
]
LOCAL = ("--port", "tcp:0:interface=127.0.0.1")


def make(folder: Path, program: Sequence[str] = (), **env: str) -> Path:
    """Copy the sources to `folder` and build the file there. Return its path."""
    folder.mkdir()
    for source in [ROOT / "Makefile", *PACKED]:
        copy = folder / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, copy)
        os.utime(copy, (len(env), len(env)))
    command = [*program, "make", "-s", "onefile", f"PYTHON={sys.executable}"]
    subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **env},
        check=True,
        timeout=4 * TIMEOUT,
        stdout=subprocess.DEVNULL,
    )
    return folder / "build" / "transit-relay.pyz"


pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")


@pytest.fixture(scope="module")
def onefile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the built file, in a folder of its own."""
    made = make(tmp_path_factory.mktemp("made") / "here")
    return Path(shutil.copy(made, tmp_path_factory.mktemp("alone")))


def test_the_build_is_reproducible(onefile: Path, tmp_path: Path) -> None:
    strict = ["sh", "-c", 'umask 077; exec "$0" "$@"']
    other = make(tmp_path / "elsewhere", strict, TZ="Asia/Tokyo", LC_ALL="C", HOME="/nonexistent")
    assert other.read_bytes() == onefile.read_bytes()
    assert other.stat().st_mode & 0o777 == 0o755


def test_contents(onefile: Path) -> None:
    with zipfile.ZipFile(onefile) as archive:
        assert archive.namelist() == ["__main__.py", *(source.name for source in PACKED)]
        for source in PACKED:
            assert archive.read(source.name) == source.read_bytes()
    assert onefile.read_bytes().startswith(b"#!/usr/bin/env python3\n")


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_the_output_is_that_of_the_plain_file(onefile: Path, tmp_path: Path, option: str) -> None:
    """The text of --help depends on the version of Python: all programs run with the same one."""
    (tmp_path / "python3").symlink_to(sys.executable)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    outputs = [
        subprocess.check_output([*program, option], env=env, timeout=4 * TIMEOUT)
        for program in ([sys.executable, onefile], [onefile], [sys.executable, RELAY])
    ]
    assert len(set(outputs)) == 1


def test_it_serves_the_status_page(onefile: Path) -> None:
    status = ("--status", "tcp:0:interface=127.0.0.1")
    with RelayProcess(*LOCAL, *status, program=[sys.executable, str(onefile)]) as relay:
        port = relay.wait_for(r"^Transit starting on .* tcp:(\d+)\S* \(status\)")[1]
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=TIMEOUT)
        with closing(connection):
            connection.request("GET", "/", headers={"Accept": "text/html"})
            answer = connection.getresponse()
            assert answer.read() == (STATUS_PAGE / "status.html").read_bytes()
            assert answer.headers["Content-Type"].startswith("text/html")
        relay.stop_cleanly()


def test_it_is_a_gateway(onefile: Path, tmp_path: Path) -> None:
    program = [sys.executable, str(onefile)]
    path = tmp_path / "behind"
    with (
        RelayProcess("--port", f"unix:{path}", program=program) as behind,
        RelayProcess(*LOCAL, *WEB, "--forward", f"unix:{path}", program=program) as gateway,
    ):
        behind.started()
        gateway.started()
        one, other = gateway.meet("tcp", "ws")
        with one, other:
            one.send(b"to a browser")
            assert other.receive(12) == b"to a browser"
        gateway.stop_cleanly()
        behind.stop_cleanly()


def test_it_relays_when_the_file_is_deleted(onefile: Path, tmp_path: Path) -> None:
    """Python has read all modules at the start."""
    copy = Path(shutil.copy(onefile, tmp_path))
    with RelayProcess(*LOCAL, *WEB, program=[sys.executable, str(copy)]) as relay:
        relay.started()
        copy.unlink()
        transfer(relay)
        one, other = relay.meet("tcp", "ws")
        with one, other:
            one.send(b"to a browser")
            assert other.receive(12) == b"to a browser"
        relay.stop_cleanly()
