"""Compare the size of the Debian package with the Twisted relay's package in Debian, as a table.

    python3 tests/packaging/figures.py [--publish docs/performance.md]

The program builds the package. For both packages, it simulates with apt what their installation
adds to a bookworm system with Python, which `make check-packaging` has made. It installs nothing.
It needs the standard library alone, because it also runs by itself.
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

# The parts that the package of a daemon may have. A pattern matches the file names of each.
PARTS = {
    "command": r"/(usr/)?s?bin/.",
    "man page": r"/usr/share/man/.",
    "configuration file": r"/etc/[^/]+$",
    "systemd unit": r"/(usr/)?lib/systemd/system/.*\.service$",
    "init script": r"/etc/init\.d/.",
}


def output_of(*argv: str | Path, cwd: Path = ROOT) -> str:
    """Return the output of a program, which must succeed."""
    env = {**os.environ, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"}
    env.setdefault("DEB_BUILD_OPTIONS", "nocheck")
    return subprocess.check_output(argv, cwd=cwd, env=env, text=True)


class Package(NamedTuple):
    """The facts about one package."""

    name: str
    version: str
    size: int  # bytes of the .deb
    installed: int  # bytes, as Debian counts them
    depends: str
    files: tuple[str, ...]

    def parts(self) -> dict[str, bool]:
        """Return which of PARTS the package has."""
        return {part: any(re.match(p, f) for f in self.files) for part, p in PARTS.items()}


class Load(NamedTuple):
    """The packages that apt installs for a package, itself included, on a system with Python."""

    packages: int
    size: int
    installed: int


def read_package(deb: Path) -> Package:
    """Return the facts about a .deb file."""
    fields = ("Package", "Version", "Installed-Size", "Depends")
    name, version, installed, depends = (
        output_of("dpkg-deb", "-f", deb, one).strip() for one in fields
    )
    lines = output_of("dpkg-deb", "-c", deb).splitlines()
    files = tuple(line.split()[5][1:] for line in lines if not line.startswith("d"))
    return Package(name, version, deb.stat().st_size, int(installed) * 1024, depends, files)


def read_load(package: str | Path) -> Load:
    """Simulate the installation of a package. Nothing is written to the system."""
    state = f"Dir::State::status={CLEAN}/var/lib/dpkg/status"
    command = ("apt-get", "-qq", "-s", "-o", state, "--no-install-recommends", "install", package)
    found = re.findall(r"^Inst (\S+) \((\S+)", output_of(*command), re.MULTILINE)
    size = installed = 0
    for name, version in found:
        if isinstance(package, Path) and package.name.startswith(f"{name}_"):
            own = read_package(package)
            size, installed = size + own.size, installed + own.installed
        else:
            shown = output_of("apt-cache", "show", f"{name}={version}")
            numbers = dict(re.findall(r"^(Size|Installed-Size): (\d+)", shown, re.MULTILINE))
            size += int(numbers["Size"])
            installed += int(numbers["Installed-Size"]) * 1024
    return Load(len(found), size, installed)


def exposure(unit: Path, drop_in: Path | None = None) -> float:
    """Return the exposure of a unit by `systemd-analyze security`, from 0 (best) to 10."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, unit.name)
        copy.write_bytes(unit.read_bytes())
        if drop_in:
            copy.with_suffix(".service.d").mkdir()
            (copy.with_suffix(".service.d") / drop_in.name).write_bytes(drop_in.read_bytes())
        said = output_of("systemd-analyze", "security", "--no-pager", "--offline=true", copy)
    match = re.search(r"Overall exposure level for \S+: ([0-9.]+)", said)
    assert match, said
    return float(match[1])


def format_size(number: int) -> str:
    """Format a number of bytes: 57 kB, 21.3 MB."""
    return f"{number / 1e6:.1f} MB" if number >= 1e6 else f"{number / 1e3:.0f} kB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Format rows as a Markdown table. The first row is the head."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [" | ".join(cell.ljust(width) for cell, width in zip(row, widths)) for row in rows]
    lines.insert(1, " | ".join("-" * width for width in widths))
    return "".join(f"| {line} |\n" for line in lines)


def format_presence(has: bool) -> str:
    """Format whether a package has a part."""
    return "yes" if has else "none"


def compare(ours: Path, theirs: Path) -> str:
    """Return the table that compares two .deb files."""
    packages = [read_package(ours), read_package(theirs)]
    loads = [read_load(ours), read_load(THEIRS)]
    own, other = (package.parts() for package in packages)
    with_drop_in = exposure(ROOT / UNIT, ROOT / DROP_IN)
    own_exposure = f"{exposure(ROOT / UNIT)}; {with_drop_in} with listeners of its own"
    assert not other["systemd unit"], "Debian's package has a unit now: add its exposure"
    return table(
        [
            ["Debian 12", *(f"{one.name} {one.version}" for one in packages)],
            ["the package", *(format_size(one.size) for one in packages)],
            ["the package, installed", *(format_size(one.installed) for one in packages)],
            ["depends on", *(one.depends.replace(":any", "") for one in packages)],
            ["packages it brings to a system with Python", *(str(one.packages) for one in loads)],
            ["all of them", *(format_size(one.size) for one in loads)],
            ["all of them, installed", *(format_size(one.installed) for one in loads)],
            *([part, format_presence(own[part]), format_presence(other[part])] for part in PARTS),
            ["exposure, 0 to 10 (`systemd-analyze security`)", own_exposure, "no unit"],
        ]
    )


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Compare the size of the package with Debian's.")
    parser.add_argument(
        "--publish",
        type=Path,
        metavar="FILE",
        help=f"also replace the text between the lines {MARKS[0]} and {MARKS[1]} of FILE",
    )
    options = parser.parse_args()
    if not CLEAN.is_dir():
        sys.exit(f"{CLEAN} is missing: run make check-packaging first")
    output_of("make", "-s", "deb")
    (ours,) = (ROOT / "build" / "deb").glob("*.deb")
    with tempfile.TemporaryDirectory() as folder:
        # As root: apt's own user may not write to this folder.
        output_of(
            "apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", THEIRS, cwd=Path(folder)
        )
        (theirs,) = Path(folder).glob("*.deb")
        text = compare(ours, theirs)
    print(text, end="")
    if options.publish:
        sys.path.insert(0, str(ROOT / "tests" / "bench"))
        from readme import publish

        try:
            publish(options.publish, MARKS, text)
        except ValueError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
