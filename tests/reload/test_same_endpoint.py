"""Endpoints that could get the same listening socket in a reload."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from installed import Installation, ReloadedRelay
from watched import Books

ANY_PORT = "tcp:0:interface=127.0.0.1"  # the text of the relay's first endpoint too


def test_two_endpoints_with_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps its own free port."""
    monkeypatch.chdir(tmp_path)
    with ReloadedRelay(Installation(tmp_path), "--websocket", ANY_PORT) as relay:
        relay.started()
        before = relay.web_port
        relay.reload()
        assert relay.new_port() == before != relay.port
        relay.settle(Books())
        assert relay.stop() == 0


def test_a_port_that_is_given_twice_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As at a start. The relay goes on."""
    monkeypatch.chdir(tmp_path)
    installation = Installation(tmp_path)
    with ReloadedRelay(installation) as relay:
        relay.started()
        installation.configure(f"websocket tcp:{relay.port}:interface=127.0.0.1")
        assert re.search("already in use|given twice", relay.refused())
        relay.settle(Books())
        assert relay.stop() == 0
