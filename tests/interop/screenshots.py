"""Write pictures of the status page, as it shows a busy relay.

    python tests/interop/screenshots.py FOLDER PICTURE

FOLDER gets one file for each width and colour scheme. PICTURE, for the documentation, is one of
them with fewer colours. A server in this process serves the page with a status.json that is made
up, because a relay that has just been started has no history.
"""

from __future__ import annotations

import json
import math
import random
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import tools
from pages import headless, load

PAGE = tools.ROOT / "packaging" / "status-page" / "status.html"
SIZES = [(360, 800), (1280, 900)]
SCHEMES = ["light", "dark"]
COLOURS = "32"  # of the picture: enough for one accent colour and smooth text
NOW = 1_795_872_600.0  # 2026-11-28 13:30 UTC
UPTIME = 12 * 86400 + 9 * 3600.0  # s
DAY, TICK = 86400, 10  # s
MB, GB, TB = 10**6, 10**9, 10**12


def traffic() -> dict[str, list[int]]:
    """Return the load of made-up transfers in the day before NOW, in intervals of TICK seconds.

    There are more of them by day than by night. Most are small, and a few are very large.
    """
    chance = random.Random(7)
    length = DAY // TICK
    relayed, ended, pairs = [0.0] * length, [0] * length, [0] * length
    for start in range(length):
        hour = (NOW / 3600 - (length - start) * TICK / 3600) % 24
        activity = 0.55 - 0.45 * math.cos((hour - 3) / 24 * 2 * math.pi)  # 0.1 to 1
        if chance.random() > 0.4 * activity:
            continue
        size = chance.lognormvariate(17.2, 2.0)  # a median of 30 MB
        rate = min(45 * MB, chance.lognormvariate(15.3, 0.8))  # a median of 4.4 MB/s
        ticks = max(1, min(length - start, round(size / rate / TICK)))
        for tick in range(start, start + ticks):
            relayed[tick] += size / ticks * chance.uniform(0.8, 1.2)
            pairs[tick] += 1
        ended[start + ticks - 1] += 1
    waiting = [chance.randrange(2, 5) + count // 2 for count in pairs]
    return {
        "relayed_bytes": [round(count) for count in relayed],
        "pairs_ended": ended,
        "pairs": pairs,
        "waiting_clients": waiting,
    }


def history(ticks: dict[str, list[int]]) -> dict[str, Any]:
    """Return the histories of the last hour and the last day."""
    hour = {key: values[-3600 // TICK :] for key, values in ticks.items()}
    groups = range(0, DAY // TICK, 300 // TICK)
    day = {key: [sum(values[i : i + 300 // TICK]) for i in groups] for key, values in ticks.items()}
    for key in "pairs", "waiting_clients":  # at the end of each interval
        day[key] = ticks[key][300 // TICK - 1 :: 300 // TICK]
    return {
        "hour": {"seconds": TICK, "until": NOW, **hour},
        "day": {"seconds": 300, "until": NOW, **day},
    }


def rate(hour: dict[str, Any], seconds: int) -> dict[str, float]:
    """Return the mean rates over the last seconds of a history."""
    count = seconds // hour["seconds"]
    return {
        "bytes_per_second": sum(hour["relayed_bytes"][-count:]) / seconds,
        "pairs_per_second": sum(hour["pairs_ended"][-count:]) / seconds,
    }


def status() -> dict[str, Any]:
    """Return the content of status.json of a busy relay."""
    histories = history(traffic())
    hour = histories["hour"]
    pairs = {"tcp-tcp": 41_702, "tcp-websocket": 6_318, "websocket-websocket": 2_451}
    return {
        "version": "0.1",
        "python": "3.11.2",
        "healthy": True,
        "problems": [],
        "started_at": NOW - UPTIME,
        "taken_at": NOW,
        "uptime_seconds": UPTIME,
        "drain_seconds_left": 0.0,
        "pairs": hour["pairs"][-1],
        "waiting_clients": hour["waiting_clients"][-1],
        "waiting_tokens": hour["waiting_clients"][-1],
        "connections": 2 * hour["pairs"][-1] + hour["waiting_clients"][-1] + 3,
        "connections_by_phase": {
            "open": 2 * hour["pairs"][-1] + hour["waiting_clients"][-1] + 1,
            "flushing": 1,
            "lingering": 1,
            "closed": 0,
        },
        "max_connections": 800_000,
        "queued_bytes": 1_310_720,
        "open_descriptors": 47,
        "max_descriptors": 1_048_576,
        "pipes": 8,
        "incomplete_bytes": 3_482_118_220,
        "since_start": {
            "connections": 118_243,
            "relayed_bytes": 9_412_345_678_901,
            "relayed_bytes_by_transport": {
                "tcp": {"tcp": 8_120_345_678_901, "websocket": 611 * GB},
                "websocket": {"tcp": 493 * GB, "websocket": 188 * GB},
            },
            "pairs_ended": sum(pairs.values()),
            "pairs_ended_by_transport": pairs,
            "outcomes": {
                "happy": {"tcp": 89_722, "websocket": 11_220},
                "lonely": {"tcp": 4_120, "websocket": 1_034},
                "redundant": {"tcp": 9_310, "websocket": 402},
                "impatient": {"tcp": 12, "websocket": 0},
                "errory": {"tcp": 1_877, "websocket": 3},
                "empty": {"tcp": 523, "websocket": 8},
            },
            "limits": {
                "--handshake-timeout": 498,
                "--max-wait": 211,
                "--idle-timeout": 17,
                "--stall-timeout": 4,
                "--max-connections": 0,
                "no free file descriptor": 0,
                "--max-waiting-per-source": 39,
                "--allow": 0,
                "--monthly-quota": 0,
                "--max-memory": 2,
            },
            "handshake_failures": {
                "bad_handshake": 1_880,
                "proxy_header": 0,
                "http_400": 71,
                "http_405": 6,
                "http_426": 12,
                "http_431": 1,
                "http_503": 0,
                "not_forwarded": 0,
                "refused_behind": 0,
            },
            "faults": 0,
        },
        "rates": {str(seconds): rate(hour, seconds) for seconds in (10, 60, 300, 1800, 3600)},
        "records": {
            "--usage-db": {"written": 67_231, "dropped": 0, "waiting": 1, "failing": False},
            "--log-fd": {"written": 67_232, "dropped": 0, "waiting": 0, "failing": False},
        },
        "quota": {"month": "2026-11", "used_bytes": 21_420 * GB, "max_bytes": 30 * TB},
        "alltime": {
            "happy": {"count": 1_412_377, "bytes": 214_730 * GB},
            "lonely": {"count": 142_020, "bytes": 0},
            "redundant": {"count": 268_113, "bytes": 0},
            "impatient": {"count": 311, "bytes": 9_120},
            "errory": {"count": 51_209, "bytes": 0},
            "empty": {"count": 14_860, "bytes": 0},
        },
        "history": histories,
    }


class Server(ThreadingHTTPServer):
    """Serves the page and a status."""

    def __init__(self, status: dict[str, Any]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self._thread = threading.Thread(target=self.serve_forever, args=[0.02])
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        if self.path == "/":
            kind, body = "text/html", PAGE.read_bytes()
        else:
            kind, body = "application/json", json.dumps(self.server.status).encode()
        self.send_response(200)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass  # no log on the terminal


def write_pictures(folder: Path) -> None:
    """Write a picture of the whole page for each width and colour scheme to the folder."""
    chromium = tools.program("chromium", "chromium")
    with tempfile.TemporaryDirectory() as home, Server(status()) as server:
        url = f"http://127.0.0.1:{server.server_port}/"
        with headless(chromium, tools.python_tools(), Path(home)) as browser:
            for width, height in SIZES:
                for scheme in SCHEMES:
                    page = load(browser, url, width, height, scheme)
                    page.wait_for_selector('#state:text-is("Healthy")')
                    picture = folder / f"status-{width}-{scheme}.png"
                    page.screenshot(path=picture, full_page=True)
                    page.close()


def main(folder: Path, picture: Path) -> None:
    """Write all pictures, and the one for the documentation. Raises tools.Missing."""
    pngquant = tools.program("pngquant", "pngquant")
    folder.mkdir(parents=True, exist_ok=True)
    write_pictures(folder)
    options = ["--force", "--strip", "--nofs", "--speed", "1", "--output", picture]
    tools.run([pngquant, *options, COLOURS, folder / "status-1280-light.png"])


if __name__ == "__main__":
    try:
        main(*map(Path, sys.argv[1:]))
    except tools.Missing as error:
        sys.exit(f"screenshots: {error}")
