"""A page in a real browser uses its WebSockets as clients of our relay.

A server in this process serves the page (browser/page.js). The page posts its results to it.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from children import TIMEOUT, Record
from reloads import RELOADS, reload
from stage import handshake
from test_proxies import (
    HOST,
    MEBIBYTE,
    Digests,
    Group,
    Place,
    TCPClient,
    WebRelay,
    assert_crossed,
    nginx_front,
    plain_environment,
)

PAGE = Path(__file__).parent / "browser"
SIZE = 64 * MEBIBYTE  # sent by each client
LARGEST = 32 * 1024  # bytes in one message of the relay
FLAGS = [
    *["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"],
    # No connections to the Internet, and no names but that of the certificate.
    *["--disable-quic", "--disable-background-networking", "--disable-component-update"],
    *["--disable-sync", "--disable-breakpad", "--no-proxy-server"],
    f"--host-resolver-rules=MAP {HOST} 127.0.0.1, MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


class PageServer(ThreadingHTTPServer):
    """Serves the page, and queues the results that the page posts."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), PageHandler)
        self.posted: queue.Queue[Any] = queue.Queue()
        self._thread = threading.Thread(target=self.serve_forever, args=[0.02])
        self._thread.start()

    def url(self, **query: object) -> str:
        return f"http://127.0.0.1:{self.server_port}/?{urlencode(query, doseq=True)}"

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join(TIMEOUT)
        self.server_close()


class PageHandler(BaseHTTPRequestHandler):
    server: PageServer
    timeout = TIMEOUT

    FILES = {  # noqa: RUF012
        "/": ("index.html", "text/html"),
        "/page.js": ("page.js", "text/javascript"),
    }

    def do_GET(self) -> None:
        file, kind = self.FILES.get(self.path.partition("?")[0], ("", ""))
        self._answer(200 if file else 404, kind, (PAGE / file).read_bytes() if file else b"")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(204, "", b"")
        self.server.posted.put(json.loads(body))

    def _answer(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass  # no log on the terminal


class Browser(Group):
    """A Chromium with an empty profile that loads the page."""

    def __init__(
        self, chromium: Path, folder: Path, trusted: str, server: PageServer, url: str
    ) -> None:
        self._server = server
        command = [
            *[str(chromium), *FLAGS, f"--user-data-dir={folder / 'profile'}"],
            f"--ignore-certificate-errors-spki-list={trusted}",  # accept only this key
            url,
        ]
        super().__init__(command, cwd=folder, env=plain_environment(folder))

    def result(self) -> Any:
        """Wait for the next result that the page posts."""
        try:
            result = self._server.posted.get(timeout=TIMEOUT)
        except queue.Empty:
            self.kill()
            self.lines.rest()
            raise AssertionError(f"no result from the page; the browser:\n{self.lines}") from None
        assert not (isinstance(result, dict) and "error" in result), result["error"]
        return result


@pytest.fixture
def show(chromium: Path, certificate: Path, tmp_path: Path) -> Iterator[Callable[..., Browser]]:
    """Return a function that loads the page in a browser: show(scenario=..., url=..., ...)."""
    trusted = (certificate / "spki").read_text()
    with PageServer() as server, ExitStack() as running:

        def start(**query: object) -> Browser:
            url = server.url(**query)
            return running.enter_context(Browser(chromium, tmp_path, trusted, server, url))

        yield start


@pytest.fixture
def relay(our_relay: list[str]) -> Iterator[WebRelay]:
    with WebRelay(our_relay) as relay:
        yield relay


@pytest.fixture(params=["ws", "ws to --port", "wss"])
def url(
    request: pytest.FixtureRequest, relay: WebRelay, certificate: Path, tmp_path: Path
) -> Iterator[str]:
    """Return the URL of the relay: at either of its ports, or through nginx as documented."""
    if request.param == "ws":
        yield f"ws://127.0.0.1:{relay.websocket_port}/"
    elif request.param == "ws to --port":
        yield f"ws://127.0.0.1:{relay.port}/"
    else:
        nginx: Path = request.getfixturevalue("nginx")
        place = Place(nginx, tmp_path, certificate, relay.websocket_port)
        with nginx_front(place) as front:
            yield f"wss://{HOST}:{front.address.rpartition(':')[2]}/"


def hellos(token: str) -> list[str]:
    return [handshake(token, side).decode() for side in ("a", "b")]


def client_digests(report: dict[str, Any], code: int) -> Digests:
    """Check the report of a client in the page, and return its digests."""
    assert report["answer"] == "ok\n"  # a separate message
    assert report["binary"]
    assert report["bytes"] == SIZE
    assert 0 < report["largest"] <= LARGEST
    assert report["declined"]
    assert (report["code"], report["reason"], report["wasClean"]) == (code, "", True)
    return Digests(report["sent"], report["received"])


def test_two_in_a_page(url: str, relay: WebRelay, show: Callable[..., Browser]) -> None:
    browser = show(scenario="pair", url=url, size=SIZE, hello=hellos("two"))
    first, second = browser.result()
    assert_crossed(client_digests(first, 4001), client_digests(second, 1000))
    assert relay.stop() == [Record("happy", 2 * SIZE, True)]


@pytest.mark.parametrize(("last", "code"), [("stay", 1000), ("leave", 4001)])
def test_partner_over_tcp(
    last: str, code: int, url: str, relay: WebRelay, show: Callable[..., Browser]
) -> None:
    for_partner, for_page = hellos("one")
    with TCPClient(relay.port, for_partner.encode()) as partner:
        browser = show(scenario=last, url=url, size=SIZE, hello=for_page)
        digests = partner.exchange(SIZE)
        if last == "leave":
            partner.expect_end()
    assert_crossed(client_digests(browser.result(), code), digests)
    assert relay.stop() == [Record("happy", 2 * SIZE, True)]


def test_reloads(url: str, relay: WebRelay, show: Callable[..., Browser]) -> None:
    """The relay is reloaded three times while both clients send."""
    for_partner, for_page = hellos("reloads")
    with TCPClient(relay.port, for_partner.encode()) as partner:
        browser = show(scenario="stay", url=url, size=SIZE, hello=for_page)
        digests = partner.exchange(SIZE, [partial(reload, relay)] * RELOADS)
    assert_crossed(client_digests(browser.result(), 1000), digests)
    assert relay.stop() == [Record("happy", 2 * SIZE, True)]


def test_refusals(relay: WebRelay, show: Callable[..., Browser]) -> None:
    url = f"ws://127.0.0.1:{relay.websocket_port}/"
    browser = show(scenario="refusals", url=url, hello=hellos("refusals"))
    assert browser.result() == {
        "no handshake": ["bad handshake\n", 1000, "", True],
        "impatient": ["impatient\n", 1000, "", True],
        "text": [1003, "", True],
        "private code": [4999, "", True],
        "no code": [1005, "", True],  # the browser's code for a Close without a code
    }
    moods = [record.mood for record in relay.stop()]
    assert moods == ["errory", "impatient", "empty", "empty", "empty"]


def test_relay_stops(relay: WebRelay, show: Callable[..., Browser]) -> None:
    url = f"ws://127.0.0.1:{relay.websocket_port}/"
    hello, sideless = hellos("stop")[0], handshake("stop").decode().rstrip("\n")
    browser = show(scenario="stop", url=url, hello=[hello, sideless])
    assert browser.result() == "a pair"
    assert relay.stop() == [Record("happy", 0, True)]
    assert browser.result() == [["ok\n", 1001, True], ["ok\n", 1001, True]]
