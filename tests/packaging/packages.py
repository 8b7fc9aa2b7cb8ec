"""The package under other versions, for upgrades and downgrades, or with something changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from conftest import ROOT, run

AS_NOBODY = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")


def replace_once(file: Path, pattern: str, text: str) -> None:
    """Change what stands in a file; the first time, if it stands there several times."""
    changed, times = re.subn(pattern, text, file.read_text(), count=1, flags=re.MULTILINE)
    assert times == 1, f"{file}: {pattern}"
    file.write_text(changed)


def build_changed(source: Path, change: Callable[[Path], None]) -> Path:
    """Build what is committed with a change to its files, in a clone at `source`; give the .deb."""
    run(["git", "clone", "-q", "--shared", ROOT, source])
    change(source)
    run(["git", *AS_NOBODY, "commit", "-qam", "changed"], cwd=source)
    run(["make", "-s", "deb"], cwd=source, env={"DEB_BUILD_OPTIONS": "nocheck"})
    (package,) = (source / "build" / "deb").glob("*.deb")
    return package


def build_version(version: str, folder: Path) -> Path:
    """Build what is committed under another version (`0.0.9-1`); give the .deb, below `folder`."""
    upstream = version.rpartition("-")[0]

    def change(source: Path) -> None:
        program = source / "transit_relay.py"
        replace_once(program, "^__version__ = .*", f'__version__ = "{upstream}"')
        replace_once(source / "packaging/debian/changelog", r"\(.*?\)", f"({version})")

    return build_changed(folder / f"source-{version}", change)
