"""The targets of tests/fuzz with their seeds, without atheris: `make test` runs them, too."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("fuzz")
sys.path.append(str(FUZZ))  # the folder is a program, not a package

from targets import TARGETS  # noqa: E402


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
    text = (FUZZ / "__main__.py").read_text()
    names = ", ".join(f'"{name}"' for name in TARGETS)
    assert f"NAMES = ({names})\n" in text
