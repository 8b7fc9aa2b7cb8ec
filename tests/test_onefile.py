"""`make onefile`: the file is reproducible and contains the whole relay."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from helpers import RELAY, TIMEOUT, WEB, RelayProcess
from processes import transfer

ROOT = RELAY.parent
SOURCES = ["transit_relay.py", "ws_frames.py"]
LOCAL = ("--port", "tcp:0:interface=127.0.0.1")


def make(folder: Path, program: Sequence[str] = (), **env: str) -> Path:
    """Copy the sources to `folder` and build the file there. Return its path."""
    folder.mkdir()
    for name in ["Makefile", *SOURCES]:
        shutil.copy(ROOT / name, folder)
        os.utime(folder / name, (len(env), len(env)))
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
        assert archive.namelist() == ["__main__.py", *SOURCES]
        for name in SOURCES:
            assert archive.read(name) == (ROOT / name).read_bytes()
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
