"""The RPM, built from the last commit: its files, its dependencies and its scriptlets.

Debian does not have the macros of Fedora. A second package is built with macros of the same names,
so that the lines of the spec for Fedora are used, too.
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
ALL = (
    "transit-relay.socket transit-relay-ws.socket transit-relay-status.socket transit-relay.service"
)
REMOVE_INSTANCES = """\
if [ $1 -eq 0 ]; then
    # Disabling a template disables all its instances.
    systemctl --no-reload disable transit-relay@.service transit-relay@.socket || :
    systemctl stop 'transit-relay@*' || :
fi"""
RELOAD_INSTANCES = """\
if [ $1 -ge 1 ]; then systemctl try-reload-or-restart 'transit-relay@*.service' || :; fi"""

# Files that are installed in addition to those of `make install`.
ADDITIONAL = {
    "packaging/transit-relay.conf": "/etc/transit-relay.conf",
    "packaging/firewalld/transit-relay.xml": f"{FIREWALLD}/transit-relay.xml",
    "packaging/systemd/transit-relay.service": f"{UNITS}/transit-relay.service",
    "packaging/systemd/transit-relay.socket": f"{UNITS}/transit-relay.socket",
    "packaging/systemd/transit-relay-ws.socket": f"{UNITS}/transit-relay-ws.socket",
    "packaging/systemd/transit-relay-status.socket": f"{UNITS}/transit-relay-status.socket",
    "packaging/systemd/transit-relay@.service": f"{UNITS}/transit-relay@.service",
    "packaging/systemd/transit-relay@.socket": f"{UNITS}/transit-relay@.socket",
    "packaging/systemd/gateway.conf": f"{DOC}/examples/gateway.conf",
    "packaging/systemd/own-listeners.conf": f"{DOC}/examples/own-listeners.conf",
    "packaging/caddy/Caddyfile": f"{DOC}/examples/caddy/Caddyfile",
    "packaging/grafana/transit-relay.json": f"{DOC}/examples/grafana/transit-relay.json",
    "packaging/haproxy/transit-relay-tcp.cfg": f"{DOC}/examples/haproxy/transit-relay-tcp.cfg",
    "packaging/haproxy/transit-relay-many.cfg": f"{DOC}/examples/haproxy/transit-relay-many.cfg",
    "packaging/haproxy/transit-relay.cfg": f"{DOC}/examples/haproxy/transit-relay.cfg",
    "packaging/munin/transit-relay.conf": f"{DOC}/examples/munin/transit-relay.conf",
    "packaging/nginx/transit-relay-tcp.conf": f"{DOC}/examples/nginx/transit-relay-tcp.conf",
    "packaging/nginx/transit-relay.conf": f"{DOC}/examples/nginx/transit-relay.conf",
    **{
        f"packaging/prometheus/{name}": f"{DOC}/examples/prometheus/{name}"
        for name in ("prometheus.yml", "transit-relay.rules.test.yml", "transit-relay.rules.yml")
    },
    "packaging/stunnel/transit-relay.conf": f"{DOC}/examples/stunnel/transit-relay.conf",
    "docs/differences.md": f"{DOC}/docs/differences.md",
    "docs/growing.md": f"{DOC}/docs/growing.md",
    "docs/operating.md": f"{DOC}/docs/operating.md",
    "docs/performance.md": f"{DOC}/docs/performance.md",
    "docs/protocol.md": f"{DOC}/docs/protocol.md",
    "docs/status.png": f"{DOC}/docs/status.png",
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
    "systemd_postun_with_reload()": "fedora postun %*",
    "python3": "/usr/bin/python3",
    "py_byte_compile()": "%1 -m compileall -q %2",
}


@pytest.fixture(scope="module")
def tarball(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Create the source archive with the command in the spec."""
    folder = tmp_path_factory.mktemp("source")
    name = f"transit-relay-{VERSION}"
    archive = f"git archive --prefix={name}/ --output={name}.tar.gz HEAD"
    build = f"rpmbuild -tb {name}.tar.gz"
    assert [f"#   {archive}", f"#   {build}"] == re.findall("^#   .*", SPEC.read_text(), re.M)
    run([*archive.replace("--output=", f"--output={folder}/").split()])
    return folder / f"{name}.tar.gz"


def build_rpm(tarball: Path, folder: Path, macros: Mapping[str, str]) -> Path:
    """Build the package with these macros. Debian has no RPMs, so ignore dependencies."""
    defined = [f"--define={name} {text}" for name, text in {"_topdir": folder, **macros}.items()]
    run(["rpmbuild", "-tb", "--nodeps", *defined, tarball])
    (package,) = folder.glob("RPMS/noarch/*.rpm")
    return package


@pytest.fixture(scope="module")
def rpm(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package with the macros of Debian."""
    return build_rpm(tarball, tmp_path_factory.mktemp("rpm"), {})


@pytest.fixture(scope="module")
def fedora_rpm(tarball: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the package with macros that have the names of Fedora's."""
    return build_rpm(tarball, tmp_path_factory.mktemp("fedora"), MACROS)


def query(package: Path, template: str) -> list[str]:
    """Return lines from the header of a package."""
    return run(["rpm", "-qp", "--queryformat", template, package]).splitlines()


def requires(package: Path) -> set[str]:
    """Return the dependencies, without those on features of rpm."""
    found = query(package, "[%{REQUIRENEVRS}\n]")
    return {name for name in found if not name.startswith(("rpmlib(", "config("))}


def scriptlets(package: Path) -> list[str]:
    """Return the scripts that run after installation, before removal and after removal."""
    return [
        "\n".join(query(package, f"%{{{tag}}}")).strip() for tag in ("POSTIN", "PREUN", "POSTUN")
    ]


def test_version(rpm: Path) -> None:
    (found,) = query(rpm, "%{NAME} %{VERSION} %{ARCH} %{LICENSE}\n")
    assert found == f"transit-relay {VERSION} noarch MIT"
    (latest, *_) = query(rpm, "[%{CHANGELOGNAME}\n]")
    assert latest.endswith(f" - {VERSION}-1")


def test_it_is_small(rpm: Path) -> None:
    assert rpm.stat().st_size < 320_000


def test_files(rpm: Path, tarball: Path, tmp_path: Path) -> None:
    """The files of `make install`, the ADDITIONAL ones, and their folders, all owned by root."""
    run(["tar", "-xf", tarball, "--strip-components=1"], cwd=tmp_path)
    stage = tmp_path / "stage"
    run(["make", "-s", "install", f"DESTDIR={stage}", "prefix=/usr"], cwd=tmp_path)
    for source, target in ADDITIONAL.items():
        run(["install", "-D", "-m", "644", source, f"{stage}{target}"], cwd=tmp_path)
    expected = {f"/{file.relative_to(stage)}": file for file in stage.rglob("*") if file.is_file()}

    template = "[%{FILEMODES:perms} %{FILEUSERNAME}:%{FILEGROUPNAME} %{FILENAMES}\n]"
    found = {name: rest for *rest, name in map(str.split, query(rpm, template))}
    files = {name: rest for name, rest in found.items() if not rest[0].startswith("d")}
    assert files == {
        name: ["-rwxr-xr-x" if file.stat().st_mode & 0o100 else "-rw-r--r--", "root:root"]
        for name, file in expected.items()
    }
    for name in found.keys() - files.keys():
        assert found[name] == ["drwxr-xr-x", "root:root"]
        assert any(file.startswith(f"{name}/") for file in files)


def test_configuration_file(rpm: Path) -> None:
    flags = dict(map(str.split, query(rpm, "[%{FILENAMES} .%{FILEFLAGS:fflags}\n]")))
    assert [name for name, flag in flags.items() if "c" in flag] == ["/etc/transit-relay.conf"]
    assert flags["/etc/transit-relay.conf"] == ".cn"  # noreplace


def test_dependencies(rpm: Path) -> None:
    assert requires(rpm) == {"python3 >= 3.9", "/usr/bin/python3", "/bin/sh"}
    assert query(rpm, "[%{SUGGESTNAME}\n]") == ["munin-node"]


def test_fedora_macros(fedora_rpm: Path) -> None:
    assert "the-systemd-of-fedora" in requires(fedora_rpm)
    assert scriptlets(fedora_rpm) == [
        "fedora post transit-relay.service transit-relay.socket",
        f"fedora preun {ALL}\n{REMOVE_INSTANCES}",
        f"fedora postun transit-relay.service\n{RELOAD_INSTANCES}",
    ]
    names = query(fedora_rpm, "[%{FILENAMES}\n]")
    assert "/usr/bin/transit-relay" in names
    assert "/units/transit-relay.service" in names
    compiled = [name for name in names if name.endswith(".pyc")]
    assert len(compiled) == 6
    assert all(name.startswith("/usr/share/transit-relay/__pycache__/") for name in compiled)


# Install, upgrade and remove the package in a copy of a system that is not booted. Its systemctl
# prints its arguments.
LIFE_CYCLE = """\
mount -t overlay -o "lowerdir=$1,upperdir=$2/upper,workdir=$2/work" overlay "$2/root"
root=$2/root
echoing() { printf '#!/bin/sh\\necho systemctl "$@"\\n' >"$root$1"; chmod 755 "$root$1"; }
rm "$root/bin/systemctl"
echoing /bin/systemctl
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


def test_life_cycle(rpm: Path, roots: Mapping[str, FreshRoot], tmp_path: Path) -> None:
    for name in "upper", "work", "root":
        (tmp_path / name).mkdir()
    bookworm = roots["bookworm"].folder()
    output = run(["unshare", "--mount", "sh", "-ec", LIFE_CYCLE, "sh", bookworm, tmp_path, rpm])
    assert output.splitlines() == [
        "systemctl --no-reload preset transit-relay.service transit-relay.socket",
        f"transit-relay {VERSION} is installed",
        "all is as it was packed",
        "systemctl daemon-reload",
        "systemctl try-reload-or-restart transit-relay.service",
        "systemctl try-reload-or-restart transit-relay@*.service",
        "# changed",
        f"systemctl --no-reload disable --now {ALL}",
        "systemctl --no-reload disable transit-relay@.service transit-relay@.socket",
        "systemctl stop transit-relay@*",
        "systemctl daemon-reload",
        "/etc/transit-relay.conf.rpmsave is left",
    ]
