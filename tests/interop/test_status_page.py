"""The status page in a real browser, served by our relay."""

from __future__ import annotations

import os
import re
import signal
import socket
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import screenshots
import status_traffic
import tools
from children import TIMEOUT, Relay
from pages import accessible, complaints, headless, load
from stage import OK, handshake

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

FILE = tools.ROOT / "packaging" / "status-page" / "status.html"
LOOPBACK = "interface=127.0.0.1"
VIEWS = [(width, scheme) for width in (360, 1280) for scheme in ("light", "dark")]
CHUNK = bytes(100_000)
PACE_SECONDS = 0.05  # between two chunks: the browsers need the processor too
REFRESH_MS = 5000  # between two requests of the page: its own REFRESH_MS
OPEN_DETAILS = "document.querySelectorAll('details').forEach(one => { one.open = true; })"
TABLES = "[...document.querySelectorAll('table')].filter(table => table.checkVisibility())"
CHARTS = ["Throughput", "Ended pairs per minute", "Throughput", "Ended pairs per half hour"]

# The least contrast of a text with its background, and that text: WCAG 2.2, 1.4.3.
CONTRAST = """(() => {
    const channel = c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4;
    const luminance = ([r, g, b]) =>
        0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
    const parse = color => color.match(/[\\d.]+/g).map(Number);
    const ground = element => {
        const color = parse(getComputedStyle(element).backgroundColor);
        return color[3] === 0 ? ground(element.parentElement) : color;
    };
    const found = [];
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (texts.nextNode()) {
        const { data, parentElement: element } = texts.currentNode;
        if (!data.trim() || !element.checkVisibility()) continue;
        const style = getComputedStyle(element);
        const color = parse(element instanceof SVGElement ? style.fill : style.color);
        const [low, high] = [color, ground(element)].map(luminance).sort((a, b) => a - b);
        found.push([(high + 0.05) / (low + 0.05), data.trim()]);
    }
    return found.sort(([a], [b]) => a - b)[0];
})()"""


class StatusRelay(Relay):
    """Our relay, with a port for clients and one for status clients."""

    def __init__(self, our_relay: Sequence[str], *options: str, status_port: int = 0) -> None:
        address = r"tcp:(\d+):interface=127\.0\.0\.1"
        super().__init__(
            [
                *our_relay,
                f"--port=tcp:0:{LOOPBACK}",
                f"--status=tcp:{status_port}:{LOOPBACK}",
                *options,
            ],
            rf"^Transit starting on {address}, {address} \(status\)$",
        )
        self.url = f"http://127.0.0.1:{self.ports[1]}/"


class Pair:
    """Two clients that are matched, and a thread in which one sends to the other."""

    def __init__(self, port: int) -> None:
        self._clients = [socket.create_connection(("127.0.0.1", port), TIMEOUT) for _ in range(2)]
        self._files = [client.makefile("rb") for client in self._clients]
        for client, side in zip(self._clients, "ab"):
            client.sendall(handshake("status page", side))
        for file in self._files:
            assert file.read(len(OK)) == OK
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._transfer)
        self._thread.start()

    def _transfer(self) -> None:
        while not self._has_ended.wait(PACE_SECONDS):
            self._clients[0].sendall(CHUNK)
            assert self._files[1].read(len(CHUNK)) == CHUNK

    def __enter__(self) -> Pair:
        return self

    def __exit__(self, *_: object) -> None:
        self._has_ended.set()
        self._thread.join(TIMEOUT)
        for opened in (*self._files, *self._clients):
            opened.close()


@pytest.fixture(scope="module")
def browser(
    chromium: Path, python_tools: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Browser]:
    with headless(chromium, python_tools, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module", autouse=True)
def relay(our_relay: list[str]) -> Iterator[StatusRelay]:
    """Return a relay with a running transfer.

    It starts before all tests, because its rates are those of the last 10 s.
    """
    with StatusRelay(our_relay) as relay, Pair(relay.port):
        yield relay


@pytest.fixture
def reserved_port() -> Iterator[int]:
    """Return a port on which relays can listen one after another, and no other process.

    A socket that does not listen holds it: connections are refused while no relay is there.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def until_state(page: Page, title: str) -> None:
    page.wait_for_selector(f'#state:text-is("{title}")')


def test_one_style_and_one_script() -> None:
    """The policy of the relay has one hash for each. No other file is loaded."""
    text = FILE.read_text(encoding="utf-8")
    for element in "style", "script":
        assert len(re.findall(f"<{element}[ >]", text)) == 1
    assert not re.search(
        r"<(link|img|base|form|iframe)|\bsrc=|\bstyle=|\bon\w+=|@import|url\(", text
    )
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", text)


def pointers(value: Any, start: str = "") -> set[str]:
    """Return the JSON Pointer (RFC 6901) of each value in nested objects, below `start`."""
    if not isinstance(value, dict):
        return {start}
    found = [pointers(inner, f"{start}/{name}") for name, inner in value.items()]
    return set().union(*found)


def test_the_pictures_have_the_names_of_status_json(our_relay: list[str], tmp_path: Path) -> None:
    """The status in the pictures is made up. It has the names that the relay's has."""
    options = [f"--usage-db={tmp_path / 'usage.sqlite'}", "--monthly-quota=1TB"]
    with status_traffic.StatusRelay(our_relay, *options) as relay:  # also with --log-fd
        status_traffic.eventually(lambda: relay.status()["alltime"] is not None, "database is read")
        assert pointers(screenshots.status()) == pointers(relay.status())


def test_screen_reader(relay: StatusRelay, browser: Browser) -> None:
    page = load(browser, relay.url, 1280, 800, "light")
    until_state(page, "Healthy")
    page.evaluate(OPEN_DETAILS)
    found = accessible(page)
    names = {role: [name for other, name in found if other == role] for role, _ in found}
    assert {"banner", "main", "contentinfo"} <= {role for role, _ in found}

    charts = names["image"]
    assert [name.partition(",")[0] for name in charts] == CHARTS
    for name in charts:
        assert re.search(r", last (hour|day): \d.* in all, at most \d.*, latest \d", name)

    captions = page.evaluate(f"{TABLES}.map(table => table.caption.textContent)")
    assert sorted(names["table"]) == sorted(captions)
    assert {"Outcome", "TCP", "WebSocket", "Limit", "Throughput", "From"} <= {
        *names["columnheader"]
    }
    assert {"--max-wait", "TCP and WebSocket", "1 min", "HTTP 400"} <= {*names["rowheader"]}
    assert names["heading"][0] == "transit-relay"
    levels = page.evaluate("[...document.querySelectorAll('h1, h2, h3')].map(h => +h.tagName[1])")
    assert all(level <= before + 1 for before, level in zip(levels, levels[1:]))
    live = page.evaluate("[...document.querySelectorAll('[aria-live]')].map(e => e.id)")
    assert live == ["health"]
    page.close()


def test_without_javascript(relay: StatusRelay, browser: Browser) -> None:
    page = load(browser, relay.url, 360, 800, "light", has_scripts=False)
    found = accessible(page)
    assert any(name.startswith("This page needs JavaScript.") for _, name in found)
    links = [name for role, name in found if role == "link"]
    assert sorted(links) == sorted(["healthz", "metrics", "status.json"] * 2)
    page.close()


def test_a_violation_of_the_policy_is_seen(relay: StatusRelay, browser: Browser) -> None:
    page = load(browser, relay.url, 360, 800, "light")
    page.evaluate("document.body.setAttribute('style', 'color: red')")
    assert any("Content Security Policy" in complaint for complaint in complaints(page))
    page.close()


def test_the_reason_if_unhealthy(our_relay: list[str], browser: Browser, tmp_path: Path) -> None:
    """The usage database is locked by another program when a record comes."""
    database = tmp_path / "usage.sqlite"
    with StatusRelay(our_relay, f"--usage-db={database}") as relay:
        with closing(sqlite3.connect(database, isolation_level=None)) as lock:
            lock.execute("BEGIN EXCLUSIVE")
            with Pair(relay.port):
                pass
            relay.lines.until("database is locked; 1 records wait$")
            page = load(browser, relay.url, 360, 800, "light")
            until_state(page, "Not healthy")
            assert page.inner_text("#problems") == "records failing: --usage-db"
            cells = page.evaluate(
                "[...document.querySelector('#records tbody tr').cells].map(cell => cell.innerText)"
            )
            assert cells == ["--usage-db", "0", "1", "0", "failing"]
            assert complaints(page) == []
            page.close()


def test_a_stop_and_a_start(our_relay: list[str], browser: Browser, reserved_port: int) -> None:
    """The page shows a drain, and that the relay is away. It recovers by itself."""
    with StatusRelay(our_relay, "--drain=3600", status_port=reserved_port) as relay:
        with Pair(relay.port):
            os.kill(relay.pid, signal.SIGTERM)
            relay.lines.until("^SIGTERM: draining ")
            page = load(browser, relay.url, 1280, 800, "dark")
            page.clock.install()
            page.reload()  # now with timers that fast_forward fires early
            until_state(page, "Draining")
            assert page.inner_text("#problems") == "stopping"
            assert re.search(r"^At most .*\d (s|min|h) left for 1 pair$", page.inner_text("#drain"))
        assert relay.wait() == 0
    page.clock.fast_forward(REFRESH_MS)
    until_state(page, "The relay cannot be reached")
    assert page.inner_text("#problems") == "no connection"
    page.wait_for_selector('#age:text-matches("^Data from .*, [1-9]")')
    with StatusRelay(our_relay, status_port=reserved_port):
        page.clock.fast_forward(REFRESH_MS)
        until_state(page, "Healthy")
    page.close()


def test_a_running_transfer(relay: StatusRelay, browser: Browser) -> None:
    """The numbers move by themselves, at each width and in each colour scheme."""
    pages = [load(browser, relay.url, width, 800, scheme) for width, scheme in VIEWS]
    for page in pages:
        until_state(page, "Healthy")
    relayed = [page.inner_text("#relayed") for page in pages]
    for page, before in zip(pages, relayed):
        page.wait_for_selector(f'#relayed:not(:text-is("{before}"))')
        page.wait_for_selector('#throughput:not(:text-is("0 B/s"))')
        page.wait_for_selector("#hour .curve", state="attached")
        assert page.inner_text("#pairs") == "1"
    for page, (width, _) in zip(pages, VIEWS):
        page.evaluate(OPEN_DETAILS)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        contrast, text = page.evaluate(CONTRAST)
        assert contrast >= 4.5, text
        assert complaints(page) == []
        page.close()
