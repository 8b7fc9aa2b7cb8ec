"""The rpm: built where there is no Fedora, looked into, and its program run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT, run

from transit_relay import __version__

SPEC = "packaging/rpm/transit-relay.spec"
# Mode and place of all that is in it; compiled modules are named for the Python that made them.
FILES = r"""
-rw-r--r-- /etc/transit-relay.conf
-rw-r--r-- /usr/lib/firewalld/services/transit-relay.xml
-rw-r--r-- /usr/lib/systemd/system/transit-relay-ws.socket
-rw-r--r-- /usr/lib/systemd/system/transit-relay.service
-rw-r--r-- /usr/lib/systemd/system/transit-relay.socket
-rwxr-xr-x /usr/sbin/transit-relay
drwxr-xr-x /usr/share/doc/transit-relay
-rw-r--r-- /usr/share/doc/transit-relay/NEWS.md
-rw-r--r-- /usr/share/doc/transit-relay/README.md
-rw-r--r-- /usr/share/doc/transit-relay/own-listeners.conf
drwxr-xr-x /usr/share/licenses/transit-relay
-rw-r--r-- /usr/share/licenses/transit-relay/LICENSE
-rw-r--r-- /usr/share/man/man8/transit-relay.8
drwxr-xr-x /usr/share/transit-relay
drwxr-xr-x /usr/share/transit-relay/__pycache__
-rw-r--r-- /usr/share/transit-relay/__pycache__/transit_relay.pyc
-rw-r--r-- /usr/share/transit-relay/__pycache__/ws_frames.pyc
-rw-r--r-- /usr/share/transit-relay/transit_relay.py
-rw-r--r-- /usr/share/transit-relay/ws_frames.py
"""


@pytest.fixture(scope="module")
def rpm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package, built of what is committed."""
    folder = tmp_path_factory.mktemp("rpm")
    (folder / "SOURCES").mkdir()
    name = f"transit-relay-{__version__}"
    run(["git", "archive", f"--prefix={name}/", f"--output={folder}/SOURCES/{name}.tar.gz", "HEAD"])
    # With --nodeps, as no rpm has brought make here.
    run(["rpmbuild", "--quiet", "--nodeps", f"--define=_topdir {folder}", "-ba", SPEC])
    assert list((folder / "SRPMS").glob("*.src.rpm"))
    (package,) = (folder / "RPMS").glob(f"noarch/{name}-1*.noarch.rpm")
    return package


def query(rpm: Path, *question: str) -> str:
    return run(["rpm", "--query", "--package", *question, rpm])


def test_its_version_is_the_program_s() -> None:
    assert re.findall(r"^Version: +(\S+)$", (ROOT / SPEC).read_text(), re.M) == [__version__]


def test_what_is_in_it(rpm: Path) -> None:
    listed = query(rpm, "--list", "--verbose")
    found = re.findall(r"^(\S+) +\d+ root +root +\d+ .* (/.*)$", listed, re.M)
    assert len(found) == len(listed.splitlines())
    # As Fedora has them: Debian's rpm names folders of documents for the version.
    other = re.compile(rf"(?<=/transit-relay)-{re.escape(__version__)}|\.cpython-\d+(?=\.pyc$)")
    told = [f"{mode} {other.sub('', place)}" for mode, place in found]
    assert sorted(told, key=lambda line: line.split()[1]) == FILES.split("\n")[1:-1]
    assert query(rpm, "--configfiles").split() == ["/etc/transit-relay.conf"]


def test_what_it_needs(rpm: Path) -> None:
    needed = {line for line in query(rpm, "--requires").splitlines() if "rpmlib(" not in line}
    assert "python3 >= 3.9" in needed
    # What rpm adds by itself: interpreters, and itself for the configuration file.
    itself = f"config(transit-relay) = {__version__}-1"
    assert needed <= {"python3 >= 3.9", "/usr/bin/python3", "/bin/sh", itself}


def test_it_runs(rpm: Path, tmp_path: Path) -> None:
    options = ["--force-debian", "--nodeps", "--noscripts", f"--root={tmp_path}"]
    run(["rpm", "--install", *options, rpm])
    entry = tmp_path / "usr/sbin/transit-relay"
    assert entry.read_text().startswith("#!/usr/bin/python3\n")
    assert run([entry, "--version"]) == f"transit-relay {__version__}\n"


def test_its_units_are_told_of_where_systemd_s_macros_are(rpm: Path, tmp_path: Path) -> None:
    """As on Fedora, which this machine is not: the macros are stand-ins that tell their names."""
    names = ("systemd_post", "systemd_preun", "systemd_postun_with_restart")
    defined = [f"--define={name}() {name}: %{{?*}}" for name in names]
    said = run(["rpmspec", "--parse", *defined, SPEC])
    sockets = "transit-relay.socket transit-relay-ws.socket"
    for name in names[:2]:
        assert f"\n{name}: {sockets} transit-relay.service\n" in said
    assert f"\n{names[2]}: transit-relay.service\n" in said
