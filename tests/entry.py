"""Start the relay as the installed command does.

Python caches the bytecode of an imported module (see conftest.py), but compiles a script at each
start, which takes a third of the time of a start.
"""

import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import transit_relay  # noqa: E402

sys.exit(transit_relay.main())
