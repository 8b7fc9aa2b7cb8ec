"""Pages in a headless Chromium, driven with Playwright: https://playwright.dev/python."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from children import TIMEOUT
from test_browser import FLAGS
from test_proxies import plain_environment

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

TIMEOUT_MS = 1000 * TIMEOUT


@contextmanager
def headless(chromium: Path, python_tools: Path, folder: Path) -> Iterator[Browser]:
    """Run a Chromium in the `with` block. Its home is `folder`.

    `python_tools` is the bin folder of a venv with Playwright: see tools.python_tools.
    """
    # The venv was made with the Python that runs here, so its packages can be imported.
    (packages,) = python_tools.parent.glob("lib/python*/site-packages")
    sys.path.append(str(packages))
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        with playwright.chromium.launch(
            executable_path=chromium, args=FLAGS, env=plain_environment(folder), timeout=TIMEOUT_MS
        ) as browser:
            yield browser


def load(
    browser: Browser, url: str, width: int, height: int, scheme: str, *, has_scripts: bool = True
) -> Page:
    """Load a URL in a new window of this size, in pixels, and colour scheme: light or dark.

    The window has an own, empty profile. Its time zone is UTC.
    """
    page = browser.new_page(
        viewport={"width": width, "height": height},
        color_scheme=scheme,
        java_script_enabled=has_scripts,
        timezone_id="UTC",
    )
    page.set_default_timeout(TIMEOUT_MS)
    page.goto(url)
    return page


def complaints(page: Page) -> list[str]:
    """Return the errors and warnings so far: of scripts, of the network, and of the CSP."""
    found = [str(error) for error in page.page_errors()]
    found += [message.text for message in page.console_messages() if message.type != "log"]
    session = page.context.new_cdp_session(page)
    session.on("Audits.issueAdded", lambda event: found.append(str(event["issue"])))
    session.send("Audits.enable")  # the issues so far come before its answer
    session.detach()
    return found


def accessible(page: Page) -> list[tuple[str, str]]:
    """Return the role and the name of each node that a screen reader can see."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    return [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if not node["ignored"] and "name" in node
    ]
