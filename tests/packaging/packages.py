"""Packages of other versions of the program, for upgrades and downgrades."""

from __future__ import annotations

import re
from pathlib import Path

from conftest import ROOT, run

# Whoever asks for several may do so in parallel: each is built in a clone of its own.
AS_NOBODY = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org")


def replace_once(file: Path, pattern: str, text: str) -> None:
    """Change what stands in a file exactly once."""
    changed, times = re.subn(pattern, text, file.read_text(), count=1, flags=re.MULTILINE)
    assert times == 1, f"{file}: {pattern}"
    file.write_text(changed)


def build_version(version: str, folder: Path) -> Path:
    """Build what is committed under another version (`0.0.9-1`); give the .deb, below `folder`."""
    source = folder / f"source-{version}"
    run(["git", "clone", "-q", "--shared", ROOT, source])
    upstream = version.rpartition("-")[0]
    replace_once(source / "transit_relay.py", "^__version__ = .*", f'__version__ = "{upstream}"')
    replace_once(source / "packaging/debian/changelog", r"\(.*?\)", f"({version})")
    run(["git", *AS_NOBODY, "commit", "-qam", version], cwd=source)
    run(["make", "-s", "deb"], cwd=source, env={"DEB_BUILD_OPTIONS": "nocheck"})
    (package,) = (source / "build" / "deb").glob("*.deb")
    return package
