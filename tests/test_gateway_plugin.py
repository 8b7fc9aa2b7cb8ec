"""The short form of `make gateway-test`, and a check of what it leaves out."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from typing import Any

import pytest
from helpers import RELAY, TIMEOUT

TESTS = RELAY.with_name("tests")


def gateway_files() -> list[str]:
    """Return the names of the files that `make gateway-test` runs."""
    text = RELAY.with_name("Makefile").read_text().replace("\\\n", "")
    found = re.search(
        r"(?m)^gateway_files = \$\(addprefix tests/test_,\$\(addsuffix .py,(.*)\)\)$", text
    )
    assert found
    return [f"test_{module}.py" for module in found[1].split()]


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run pytest with the plugin in a process of its own."""
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "gateway_plugin",
            "-o",
            "addopts=",
            *arguments,
        ],
        cwd=RELAY.parent,
        env={
            **os.environ,
            "PYTHONPATH": f"tests{os.pathsep}.",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            **variables,
        },
        capture_output=True,
        text=True,
        timeout=20 * TIMEOUT,
    )


def pairs(output: str) -> int:
    """Return how many pairs were forwarded."""
    found = re.search("([0-9,]+) pairs over a gateway", output)
    assert found, output
    return int(found[1].replace(",", ""))


def test_the_walk_and_some_relay_tests_pass_over_a_gateway() -> None:
    """`make gateway-test` runs all of them."""
    files = ("tests/test_walk.py", "tests/test_relay.py")
    done = run(*files, "-k", "walk or (ws and unix)", RELAY_WALK_STEPS="1000")
    assert done.returncode == 0, done.stdout
    assert pairs(done.stdout) > 40  # most of these tests of test_relay.py make one


def value_of(name: str) -> Any:
    """Return a constant of the plugin. Its import would replace the helpers of this process."""
    tree = ast.parse((TESTS / "gateway_plugin.py").read_text())
    (value,) = (
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name
    )
    return eval(ast.unparse(value))


def test_the_lists_name_tests_and_none_twice() -> None:
    listed = [entry for entries in value_of("NOT_FOR_GATEWAYS").values() for entry in entries]
    names = [entry.partition("[")[0] for entry in listed] + list(value_of("MAY_PASS_OR_FAIL"))
    assert len(names) == len(set(names))
    defined = {
        node.name
        for file in gateway_files()
        for node in ast.parse((TESTS / file).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }
    assert set(names) <= defined


@pytest.mark.parametrize("module", ["relay", "bandwidth"])
def test_each_listed_test_fails_over_a_gateway(module: str) -> None:
    """The other modules take longer: `make gateway-test` has them too."""
    done = run("-rs", "-W", "ignore", f"tests/test_{module}.py", RELAY_GATEWAY_LISTED="1")
    assert done.returncode == 0, done.stdout
    assert "fails, as it must" in done.stdout
