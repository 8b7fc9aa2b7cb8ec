"""How large the package is, and what it brings along, beside what Debian has: a table for README.

    python3 tests/packaging/figures.py [--readme README.md]

It builds the package, asks apt what Debian's would bring to a system that is bookworm and Python
(made by `make check-packaging`), and installs nothing. Only Python's standard library, as it is run
by itself too.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent.parent
CLEAN = ROOT / "build" / "roots" / "bookworm"
UNIT = Path("packaging/systemd/transit-relay.service")
DROP_IN = Path("packaging/systemd/own-listeners.conf")
THEIRS = "magic-wormhole-transit-relay"
MARKS = ("<!-- packages -->", "<!-- end of packages -->")

# What a daemon's package may hold, and how its files are recognised.
PARTS = {
    "command": r"/(usr/)?s?bin/.",
    "man page": r"/usr/share/man/.",
    "configuration file": r"/etc/[^/]+$",
    "systemd unit": r"/(usr/)?lib/systemd/system/.*\.service$",
    "init script": r"/etc/init\.d/.",
}


def ask(*argv: str | Path, cwd: Path = ROOT) -> str:
    """What a program says, which must succeed."""
    env = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    env.setdefault("DEB_BUILD_OPTIONS", "nocheck")
    return subprocess.check_output(argv, cwd=cwd, env=env, text=True)


class Package(NamedTuple):
    """What is told of a package."""

    name: str
    version: str
    size: int  # bytes of the .deb
    installed: int  # bytes, as Debian counts them
    depends: str
    files: tuple[str, ...]

    def parts(self) -> dict[str, bool]:
        """Which parts of a daemon's package it has."""
        return {part: any(re.match(p, f) for f in self.files) for part, p in PARTS.items()}


class Load(NamedTuple):
    """What is installed with a package, itself included, on a system that has Python."""

    packages: int
    size: int
    installed: int


def read_package(deb: Path) -> Package:
    """Look into a .deb."""
    fields = ("Package", "Version", "Installed-Size", "Depends")
    name, version, installed, depends = (ask("dpkg-deb", "-f", deb, one).strip() for one in fields)
    lines = ask("dpkg-deb", "-c", deb).splitlines()
    files = tuple(line.split()[5][1:] for line in lines if not line.startswith("d"))
    return Package(name, version, deb.stat().st_size, int(installed) * 1024, depends, files)


def read_load(package: str | Path) -> Load:
    """What apt would install for it. This only simulates; nothing may be written there."""
    state = f"Dir::State::status={CLEAN}/var/lib/dpkg/status"
    command = ("apt-get", "-qq", "-s", "-o", state, "--no-install-recommends", "install", package)
    found = re.findall(r"^Inst (\S+) \((\S+)", ask(*command), re.MULTILINE)
    size = installed = 0
    for name, version in found:
        if isinstance(package, Path) and package.name.startswith(f"{name}_"):
            own = read_package(package)
            size, installed = size + own.size, installed + own.installed
        else:
            shown = ask("apt-cache", "show", f"{name}={version}")
            numbers = dict(re.findall(r"^(Size|Installed-Size): (\d+)", shown, re.MULTILINE))
            size += int(numbers["Size"])
            installed += int(numbers["Installed-Size"]) * 1024
    return Load(len(found), size, installed)


def exposure(unit: Path, drop_in: Path | None = None) -> float:
    """What `systemd-analyze security` says of a unit: from 0, none, to 10."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, unit.name)
        copy.write_bytes(unit.read_bytes())
        if drop_in:
            copy.with_suffix(".service.d").mkdir()
            (copy.with_suffix(".service.d") / drop_in.name).write_bytes(drop_in.read_bytes())
        said = ask("systemd-analyze", "security", "--no-pager", "--offline=true", copy)
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert match, said
    return float(match[1])


def thousands(number: int) -> str:
    """A size for people: 57 kB, 21.3 MB."""
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in Markdown, the first one being the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def yes(has: bool) -> str:
    """A part is there, or not."""
    return "yes" if has else "none"


def compare(ours: Path, theirs: Path) -> str:
    """The table."""
    packages = [read_package(ours), read_package(theirs)]
    loads = [read_load(ours), read_load(THEIRS)]
    own, other = (package.parts() for package in packages)
    with_drop_in = exposure(ROOT / UNIT, ROOT / DROP_IN)
    own_exposure = f"{exposure(ROOT / UNIT)}; {with_drop_in} with listeners of its own"
    assert not other["systemd unit"], "Debian's has a unit now: its exposure is to be told"
    return table(
        [
            ["Debian 12", *(f"{one.name} {one.version}" for one in packages)],
            ["the package", *(thousands(one.size) for one in packages)],
            ["the package, installed", *(thousands(one.installed) for one in packages)],
            ["depends on", *(one.depends.replace(":any", "") for one in packages)],
            ["packages it brings to a system with Python", *(str(one.packages) for one in loads)],
            ["all of them", *(thousands(one.size) for one in loads)],
            ["all of them, installed", *(thousands(one.installed) for one in loads)],
            *([part, yes(own[part]), yes(other[part])] for part in PARTS),
            ["exposure, 0 to 10 (`systemd-analyze security`)", own_exposure, "no unit"],
        ]
    )


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Tell how large the package is, beside Debian's.")
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help=f"put the table there too, between the lines {MARKS[0]} and {MARKS[1]}",
    )
    options = parser.parse_args()
    if not CLEAN.is_dir():
        sys.exit(f"{CLEAN} is missing: make check-packaging makes it")
    ask("make", "-s", "deb")
    (ours,) = (ROOT / "build" / "deb").glob("*.deb")
    with tempfile.TemporaryDirectory() as folder:
        # Not as apt's own user, who may not write there.
        ask("apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", THEIRS, cwd=Path(folder))
        (theirs,) = Path(folder).glob("*.deb")
        text = compare(ours, theirs)
    print(text, end="")
    if options.readme:
        sys.path.insert(0, str(ROOT / "tests" / "bench"))
        from readme import publish

        try:
            publish(options.readme, MARKS, text)
        except ValueError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
