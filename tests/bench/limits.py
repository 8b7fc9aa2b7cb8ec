"""Find the options that switch limits off, in the text of --help.

A limit that is added later is found without a change here.
"""

from __future__ import annotations

import re

GROUP = "what it limits"
OPTION = re.compile(r"(?:-\w[^,]*, )?(--[a-z][a-z-]*)")  # "--all N", "-a N, --all N"
HAS_ZERO = re.compile(r"[;(] ?0(?::| [a-z])")  # "; 0 switches it off", "; 0: no maximum"


def find_limits(help_text: str) -> list[str]:
    """Return the long names of the options that limit the relay and that 0 switches off.

    argparse ends each group with an empty line. It indents an option by two columns, and the lines
    of a description by more.
    """
    found = re.search(rf"^{GROUP}:\n(.*?)(?:\n\n|\Z)", help_text, re.DOTALL | re.MULTILINE)
    entries = re.split(r"^  (?=-)", found[1], flags=re.MULTILINE) if found else []
    names = []
    for entry in entries:
        option = OPTION.match(entry)
        if option and HAS_ZERO.search(" ".join(entry.split())):
            names.append(option[1])
    return names
