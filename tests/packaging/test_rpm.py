"""The RPM, built here from what is committed: what is in it, what it asks for, and what it does.

There is no Fedora here. So that what is written for its macros is read at least once, a second one
is built with macros of their names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from conftest import ROOT, FreshRoot, run

import transit_relay

SPEC = ROOT / "packaging" / "rpm" / "transit-relay.spec"
VERSION = transit_relay.__version__
UNITS, FIREWALLD = "/usr/lib/systemd/system", "/usr/lib/firewalld/services"
DOC = "/usr/share/doc/transit-relay"
ALL = "transit-relay.socket transit-relay-ws.socket transit-relay.service"

# What is installed beside what `make install` installs.
BESIDE = {
    "packaging/transit-relay.conf": "/etc/transit-relay.conf",
    "packaging/firewalld/transit-relay.xml": f"{FIREWALLD}/transit-relay.xml",
    "packaging/systemd/transit-relay.service": f"{UNITS}/transit-relay.service",
    "packaging/systemd/transit-relay.socket": f"{UNITS}/transit-relay.socket",
    "packaging/systemd/transit-relay-ws.socket": f"{UNITS}/transit-relay-ws.socket",
    "packaging/systemd/own-listeners.conf": f"{DOC}/examples/own-listeners.conf",
    "README.md": f"{DOC}/README.md",
    "NEWS.md": f"{DOC}/NEWS.md",
    "LICENSE": f"/usr/share/licenses/transit-relay-{VERSION}/LICENSE",
}

MACROS = {
    "_sbindir": "/usr/bin",
    "_unitdir": "/units",
    "systemd_requires": "Requires: the-systemd-of-fedora",
    "systemd_post()": "fedora post %*",
    "systemd_preun()": "fedora preun %*",
    "systemd_postun_with_restart()": "fedora postun %*",
    "python3": "/usr/bin/python3",
    "py_byte_compile()": "%1 -m compileall -q %2",
}


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source, made as the spec says."""
    folder = tmp_path_factory.mktemp("source")
    name = f"transit-relay-{VERSION}"
    archive = f"git archive --prefix={name}/ --output={name}.tar.gz HEAD"
    build = f"rpmbuild -tb {name}.tar.gz"
    assert [f"#   {archive}", f"#   {build}"] == re.findall("^#   .*", SPEC.read_text(), re.M)
    run([*archive.replace("--output=", f"--output={folder}/").split()])
    return folder / f"{name}.tar.gz"


def build_rpm(tarball: Path, folder: Path, macros: Mapping[str, str]) -> Path:
    """Build it, with these macros too. Debian has no RPMs that it could depend on."""
    defined = [f"--define={name} {text}" for name, text in {"_topdir": folder, **macros}.items()]
    run(["rpmbuild", "-tb", "--nodeps", *defined, tarball])
    (package,) = folder.glob("RPMS/noarch/*.rpm")
    return package


@pytest.fixture(scope="module")
def rpm(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as it comes out here."""
    return build_rpm(tarball, tmp_path_factory.mktemp("rpm"), {})


@pytest.fixture(scope="module")
def fedoras(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package as other macros have it."""
    return build_rpm(tarball, tmp_path_factory.mktemp("fedoras"), MACROS)


def ask(package: Path, template: str) -> list[str]:
    """What its header says, line by line."""
    return run(["rpm", "-qp", "--queryformat", template, package]).splitlines()


def requires(package: Path) -> set[str]:
    """What it asks for, but not what every RPM asks of rpm."""
    found = ask(package, "[%{REQUIRENEVRS}\n]")
    return {name for name in found if not name.startswith(("rpmlib(", "config("))}


def scriptlets(package: Path) -> list[str]:
    """What runs when it is installed, before it is removed, and after that."""
    return ["\n".join(ask(package, f"%{{{tag}}}")).strip() for tag in ("POSTIN", "PREUN", "POSTUN")]


def test_it_is_the_version_that_the_program_is(rpm: Path) -> None:
    (told,) = ask(rpm, "%{NAME} %{VERSION} %{ARCH} %{LICENSE}\n")
    assert told == f"transit-relay {VERSION} noarch MIT"
    (latest, *_) = ask(rpm, "[%{CHANGELOGNAME}\n]")
    assert latest.endswith(f" - {VERSION}-1")


def test_it_is_small(rpm: Path) -> None:
    assert rpm.stat().st_size < 100_000


def test_what_is_in_it(rpm: Path, tarball: Path, tmp_path: Path) -> None:
    """All that `make install` installs, what is listed above, and their folders; all of root's."""
    run(["tar", "-xf", tarball, "--strip-components=1"], cwd=tmp_path)
    stage = tmp_path / "stage"
    run(["make", "-s", "install", f"DESTDIR={stage}", "prefix=/usr"], cwd=tmp_path)
    for source, target in BESIDE.items():
        run(["install", "-D", "-m", "644", source, f"{stage}{target}"], cwd=tmp_path)
    expected = {f"/{file.relative_to(stage)}": file for file in stage.rglob("*") if file.is_file()}

    template = "[%{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]"
    found = {name: rest for *rest, name in map(str.split, ask(rpm, template))}
    files = {name: rest for name, rest in found.items() if not rest[0].startswith("d")}
    assert files == {
        name: ["-rwxr-xr-x" if file.stat().st_mode & 0o100 else "-rw-r--r--", "root:root"]
        for name, file in expected.items()
    }
    for name in found.keys() - files.keys():
        assert found[name] == ["drwxr-xr-x", "root:root"]
        assert any(file.startswith(f"{name}/") for file in files)


def test_its_configuration_is_the_administrators(rpm: Path) -> None:
    flags = dict(map(str.split, ask(rpm, "[%{FILENAMES} .%{FILEFLAGS:fflags}\n]")))
    assert [name for name, flag in flags.items() if "c" in flag] == ["/etc/transit-relay.conf"]
    assert flags["/etc/transit-relay.conf"] == ".cn"  # noreplace


def test_it_needs_python_alone(rpm: Path) -> None:
    assert requires(rpm) == {"python3 >= 3.9", "/usr/bin/python3", "/bin/sh"}


def test_what_fedoras_macros_make_of_it(fedoras: Path) -> None:
    assert "the-systemd-of-fedora" in requires(fedoras)
    assert scriptlets(fedoras) == [
        "fedora post transit-relay.service transit-relay.socket",
        f"fedora preun {ALL}",
        "fedora postun transit-relay.service",
    ]
    names = ask(fedoras, "[%{FILENAMES}\n]")
    assert "/usr/bin/transit-relay" in names
    assert "/units/transit-relay.service" in names
    compiled = [name for name in names if name.endswith(".pyc")]
    assert len(compiled) == 2
    assert all(name.startswith("/usr/share/transit-relay/__pycache__/") for name in compiled)


# A life in a copy of a system that is not running; its systemctl tells what it is told.
LIFE = """\
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
root=$2/root
say() { printf '#!/bin/sh\\necho systemctl "$@"\\n' >"$root$1"; chmod 755 "$root$1"; }
rm "$root/bin/systemctl"
say /bin/systemctl
cd /
rpm --root="$root" --install --nodeps "$3"
echo "$(PYTHONDONTWRITEBYTECODE=1 chroot "$root" transit-relay --version) is installed"
rpm --root="$root" --verify --nodeps transit-relay && echo "all is as it was packed"
echo "# changed" >>"$root/etc/transit-relay.conf"
rpm --root="$root" --upgrade --nodeps --force "$3"
tail -n 1 "$root/etc/transit-relay.conf"
rpm --root="$root" --erase transit-relay
find "$root" -xdev -path "*transit*relay*" -printf '/%P is left\\n'
"""


def test_its_life(rpm: Path, roots: Mapping[str, FreshRoot], tmp_path: Path) -> None:
    for name in "upper", "work", "root":
        (tmp_path / name).mkdir()
    bookworm = roots["bookworm"].folder()
    said = run(["unshare", "--mount", "sh", "-ec", LIFE, "sh", bookworm, tmp_path, rpm])
    assert said.splitlines() == [
        "systemctl --no-reload preset transit-relay.service transit-relay.socket",
        f"transit-relay {VERSION} is installed",
        "all is as it was packed",
        "systemctl daemon-reload",
        "systemctl try-restart transit-relay.service",
        "# changed",
        f"systemctl --no-reload disable --now {ALL}",
        "systemctl daemon-reload",
        "/etc/transit-relay.conf.rpmsave is left",
    ]
