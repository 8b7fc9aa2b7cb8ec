"""What tests/bench makes of its numbers: medians, verdicts, tables. Nothing is measured here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def load_table() -> ModuleType:
    """tests/bench/table.py: the folder is a program, not a package."""
    path = Path(__file__).parent / "bench" / "table.py"
    spec = importlib.util.spec_from_file_location("bench_table", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load_table()
OURS = table.Quantity("bulk-1", "ours", table.BULK)
TWISTED = table.Quantity("bulk-1", "twisted", table.BULK)
MEMORY = table.Quantity("memory", "ours", "start_bytes")
TWICE_TWISTED = table.at_least(2, "twisted", "bulk-1", table.BULK)
TWO_MB = table.no_more(2, "MB at the start", "memory", "start_bytes", table.MB)


def test_the_median_of_the_rounds_counts() -> None:
    assert table.medians({OURS: [9.0, 1.0, 2.0], TWISTED: [1.0, 2.0]}) == {OURS: 2.0, TWISTED: 1.5}


@pytest.mark.parametrize(
    ("ours", "quick", "answer", "code"),
    [
        (2.0, False, "yes", 0),
        (1.99, False, "no: fails", 1),
        (1.99, True, "no", 0),
        (1.0, True, "no", 0),
        (0.99, True, "no: fails", 1),
    ],
)
def test_a_ratio_that_should_be_large(ours: float, quick: bool, answer: str, code: int) -> None:
    verdicts = table.judge([TWICE_TWISTED], {OURS: ours, TWISTED: 1.0}, quick)
    assert answered(verdicts) == [answer]
    assert table.exit_code(verdicts) == code


@pytest.mark.parametrize(
    ("size", "quick", "steady", "answer", "code"),
    [
        (2e6, False, False, "yes", 0),
        (2.1e6, False, False, "no: fails", 1),
        (2.1e6, True, False, "no", 0),
        (2.1e6, True, True, "no: fails", 1),
    ],
)
def test_a_number_that_should_be_small(
    size: float, quick: bool, steady: bool, answer: str, code: int
) -> None:
    bar = TWO_MB._replace(is_steady=steady)
    verdicts = table.judge([bar], {MEMORY: size}, quick)
    assert answered(verdicts) == [answer]
    assert table.exit_code(verdicts) == code


def test_what_was_not_measured_fails_nothing() -> None:
    verdicts = table.judge([TWICE_TWISTED], {OURS: 1.0}, quick=False)
    assert answered(verdicts) == ["not measured"]
    assert table.exit_code(verdicts) == 0


def test_a_work_that_nobody_did_is_not_judged() -> None:
    assert table.judge([TWICE_TWISTED, TWO_MB], {MEMORY: 1e6}, quick=False)[0].bar is TWO_MB
    assert table.judge([TWICE_TWISTED], {MEMORY: 1e6}, quick=False) == []


def answered(verdicts: list[tuple[object, ...]]) -> list[str]:
    """The last column of what is shown."""
    _, _, *rows = table.bars_table(verdicts).splitlines()
    return [row.split("|")[-2].strip() for row in rows]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.01234, "0.0123"),
        (1, "1.00"),
        (12.34, "12.3"),
        (999.6, "1,000"),
        (123_456, "123,000"),
    ],
)
def test_numbers_have_three_digits_that_count(value: float, text: str) -> None:
    assert table.number(value) == text


def test_a_table_has_only_what_was_measured() -> None:
    values = {
        OURS: 3.0,
        OURS._replace(metric="gb_per_second"): 2.0,
        TWISTED._replace(work="ws-ws"): 0.5,
        TWISTED._replace(work="round-trip", metric=table.P50): 100.0,
    }
    assert table.bulk_table(values).splitlines() == [
        "| GB per CPU-second (per second) |        ours | Twisted |",
        "| ------------------------------ | ----------: | ------: |",
        "| TCP, 1 pair                    | 3.00 (2.00) |         |",
        "| WebSocket, 1 pair              |             |   0.500 |",
    ]
    assert table.many_table(values) == table.growth_table(values) == ""


def test_growth_has_a_column_for_each_number_of_pairs() -> None:
    def bulk_with(pairs: int) -> tuple[str, ...]:
        quantity: tuple[str, ...] = table.Quantity("growth", "ours", f"bulk_{pairs}_{table.BULK}")
        return quantity

    head, _, gigabytes, messages = table.growth_table(
        {bulk_with(8): 4.0, bulk_with(4_000): 2.0}
    ).splitlines()
    assert head.split("|")[2:4] == ["    8 ", " 4,000 "]
    assert gigabytes.split("|")[2:4] == [" 4.00 ", "  2.00 "]
    assert messages.split("|")[2:4] == ["      ", "       "]


def test_every_bar_can_be_shown() -> None:
    ones = {
        quantity: 1.0
        for bar in table.BARS
        for quantity in (bar.top, bar.bottom)
        if isinstance(quantity, table.Quantity)
    }
    verdicts = table.judge(table.BARS, ones, quick=False)
    assert len(answered(verdicts)) == len(table.BARS)
    report = table.report(ones, verdicts, ["a note"])
    assert report.endswith("\n\n* a note\n")
