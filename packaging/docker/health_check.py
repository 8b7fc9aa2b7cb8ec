# SPDX-License-Identifier: MIT
"""The health check of the container image: exit with 0 if the relay is healthy, else with 1.

It requests /healthz from the status listener in image.conf. The output has the reasons, and `docker
inspect` shows it. A `--status` on the command line of the relay replaces that listener. Then the
check requests / on port 4001: every port answers it, and the request leaves no record.
"""

from __future__ import annotations

import http.client
import os.path
import socket
import sys

STATUS_SOCKET = "/dev/shm/transit-relay-status.sock"  # as in image.conf
TIMEOUT_SECONDS = 4.0  # less than the timeout of HEALTHCHECK


def main() -> int:
    """Print what the relay answers, and return the exit code. Raises OSError, HTTPException."""
    relay = http.client.HTTPConnection("localhost", 4001, timeout=TIMEOUT_SECONDS)
    path = "/"
    if os.path.exists(STATUS_SOCKET):
        path = "/healthz"
        relay.sock = socket.socket(socket.AF_UNIX)
        relay.sock.settimeout(TIMEOUT_SECONDS)
        relay.sock.connect(STATUS_SOCKET)
    relay.request("GET", path)
    answer = relay.getresponse()
    print(answer.read().decode(), end="")
    return 0 if answer.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
