"""The targets of tests/fuzz with their seeds, without atheris: `make test` runs them, too."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

FUZZ = Path(__file__).with_name("fuzz")
sys.path.append(str(FUZZ))  # the folder is a program, not a package

from targets import TARGETS  # noqa: E402


def load_program() -> ModuleType:
    """Return the program tests/fuzz as a module."""
    spec = importlib.util.spec_from_file_location("fuzz_program", FUZZ / "__main__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", TARGETS)
def test_the_seeds_reach_all_outcomes(name: str) -> None:
    """The checks of a seed, and the check for an unknown outcome, raise AssertionError."""
    target = TARGETS[name]
    assert {target.run(seed) for seed in target.seeds()} == target.outcomes


def test_an_unknown_outcome_is_a_failure() -> None:
    target = TARGETS["size"]
    assert target.run(b"1GB/s") == "rate"
    with pytest.raises(AssertionError, match="an unknown outcome: rate"):
        target._replace(outcomes=target.outcomes - {"rate"}).run(b"1GB/s")


def test_the_program_has_the_names_of_the_targets() -> None:
    assert list(load_program().NAMES) == list(TARGETS)


def test_a_corpus_keeps_its_newest_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = load_program()
    monkeypatch.setattr(program, "CORPUS_INPUTS", 2)
    for seconds, name in enumerate(("c", "a", "b"), 1):
        (tmp_path / name).write_bytes(b"input")
        os.utime(tmp_path / name, (seconds, seconds))
    for _ in range(2):
        program.bound(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
