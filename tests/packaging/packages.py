"""The package with another version, for upgrades and downgrades, or with other changes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, run

AS_NOBODY = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")


def replace_once(file: Path, pattern: str, text: str) -> None:
    """Replace the first match of a pattern in a file. There must be one."""
    changed, times = re.subn(pattern, text, file.read_text(), count=1, flags=re.MULTILINE)
    assert times == 1, f"{file}: {pattern}"
    file.write_text(changed)


def build_changed(source: Path, change: Callable[[Path], None]) -> None:
    """Clone the last commit to `source`, change its files, and build the package."""
    run(["git", "clone", "-q", "--shared", ROOT, source])
    change(source)
    run(["git", *AS_NOBODY, "commit", "-qam", "changed"], cwd=source)
    run(["make", "-s", "deb"], cwd=source, env={"DEB_BUILD_OPTIONS": "nocheck"})


def repack(deb: Path, version: str, folder: Path, pattern: str = "", text: str = "") -> Path:
    """Return a copy of a package with another version, below `folder`.

    In its program, the first match of `pattern` is replaced with `text`.
    """
    content = folder / f"content-{version}"
    run(["dpkg-deb", "--raw-extract", deb, content])
    replace_once(content / "DEBIAN/control", "^Version: .*", f"Version: {version}")
    program = content / "usr/share/transit-relay/transit_relay.py"
    upstream = version.rpartition("-")[0]
    replace_once(program, "^__version__ = .*", f'__version__ = "{upstream}"')
    if pattern:
        replace_once(program, pattern, text)
    package = folder / f"transit-relay_{version}_all.deb"
    run(["dpkg-deb", "--build", "--root-owner-group", "-Znone", content, package])
    return package
