"""The arithmetic, the order and the options of tests/bench. Nothing is measured here."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import random
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import TIMEOUT, RelayProcess

from transit_relay import LIMIT_OPTIONS, UsageError, make_parser, parse_arguments

BENCH = Path(__file__).parent / "bench"


def load(name: str) -> ModuleType:
    """Return a module of tests/bench. The folder is a program, not a package."""
    spec = importlib.util.spec_from_file_location(f"bench_{name}", BENCH / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table = load("table")
limits = load("limits")
OURS = table.Quantity("bulk-1", "ours", table.BULK)
NO_LIMITS = table.Quantity("bulk-1", "ours-no-limits", table.BULK)
TWISTED = table.Quantity("bulk-1", "twisted", table.BULK)
BEFORE = table.Quantity("bulk-1", "before", table.BULK)
MEMORY = table.Quantity("memory", "ours", "start_bytes")
TWICE_TWISTED = table.at_least(2, "twisted", "bulk-1", table.BULK)
TWO_MB = table.no_more(2, "MB at the start", "memory", "start_bytes", table.MB)


def test_a_value_is_the_median_of_its_rounds() -> None:
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
def test_a_minimum_of_a_ratio(ours: float, quick: bool, answer: str, code: int) -> None:
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
def test_a_maximum_of_a_number(
    size: float, quick: bool, steady: bool, answer: str, code: int
) -> None:
    bar = TWO_MB._replace(is_steady=steady)
    verdicts = table.judge([bar], {MEMORY: size}, quick)
    assert answered(verdicts) == [answer]
    assert table.exit_code(verdicts) == code


@pytest.mark.parametrize(
    ("ratio", "quick", "answer"),
    [(0.6, True, "no"), (0.4, True, "no: fails"), (0.6, False, "no: fails")],
)
def test_a_bar_beside_a_comparator_that_waits_for_the_disk(
    ratio: float, quick: bool, answer: str
) -> None:
    bar = TWICE_TWISTED._replace(waits_for_disk=True)
    verdicts = table.judge([bar], {OURS: ratio, TWISTED: 1.0}, quick)
    assert answered(verdicts) == [answer]


def test_a_bar_without_a_measurement_does_not_fail_the_run() -> None:
    verdicts = table.judge([TWICE_TWISTED], {OURS: 1.0}, quick=False)
    assert answered(verdicts) == ["not measured"]
    assert table.exit_code(verdicts) == 0


def test_a_workload_without_measurements_is_not_judged() -> None:
    assert table.judge([TWICE_TWISTED, TWO_MB], {MEMORY: 1e6}, quick=False)[0].bar is TWO_MB
    assert table.judge([TWICE_TWISTED], {MEMORY: 1e6}, quick=False) == []


def test_a_bar_on_a_comparator_that_does_not_run_is_left_out() -> None:
    assert TWICE_TWISTED.concerns(["ours", "twisted"])
    assert not TWICE_TWISTED.concerns(["ours", "before"])
    assert TWO_MB.concerns(["ours"])


def answered(verdicts: list[tuple[object, ...]]) -> list[str]:
    """Return the last column of the table of bars."""
    _, _, *rows = table.bars_table(verdicts).splitlines()
    return [row.split("|")[-2].strip() for row in rows]


@pytest.mark.parametrize(
    ("ratios", "answer", "code"),
    [
        ([1.0] * 10, "yes", 0),
        ([0.95] * 10, "yes", 0),
        ([0.949] * 10, "no: fails", 1),
        # A spread of less than 5 %: the median decides.
        ([0.93, 0.96] * 5, "no: fails", 1),
        ([0.94, 0.99] * 5, "yes", 0),
        # One outlier at each end is left out of the range.
        ([0.1, *[1.0] * 8, 9.0], "yes", 0),
        # A larger spread: the whole range decides, if it lies on one side of the bar.
        ([0.8, 1.0] * 5, "inconclusive", 0),
        ([1.0, 1.3] * 5, "yes", 0),
        ([0.5, 0.9] * 5, "no: fails", 1),
        # The range of few rounds is larger than the ratios.
        ([0.97, 1.0, 1.02], "inconclusive", 0),
        ([0.99, 1.0, 1.01], "yes", 0),
        ([0.8, 0.81, 0.82], "no: fails", 1),
    ],
)
def test_a_comparison_with_another_checkout(ratios: list[float], answer: str, code: int) -> None:
    comparisons = table.compare(
        {OURS: [2 * ratio for ratio in ratios], BEFORE: [2.0] * len(ratios)}
    )
    assert compared(comparisons) == [answer]
    assert table.exit_code([], comparisons) == code


def compared(comparisons: list[object]) -> list[str]:
    """Return the last column of the table of comparisons."""
    return [row[-1] for row in cells(table.comparisons_table(comparisons))]


def cells(text: str) -> list[list[str]]:
    """Return the cells of a table, without its head."""
    _, _, *rows = text.splitlines()
    return [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]


@pytest.mark.parametrize(
    ("ratio", "quick", "answers"),
    [
        (0.97, False, ["yes", "yes"]),
        (0.969, False, ["yes", "no: fails"]),
        (0.95, False, ["yes", "no: fails"]),
        (0.949, False, ["no: fails", "no: fails"]),
        (0.94, True, ["yes", "yes"]),
        (0.9, True, ["yes", "no: fails"]),
        (0.899, True, ["no: fails", "no: fails"]),
    ],
)
def test_each_comparator_has_a_bar_of_its_own(
    ratio: float, quick: bool, answers: list[str]
) -> None:
    rounds = {OURS: [ratio] * 10, NO_LIMITS: [ratio] * 10, BEFORE: [1.0] * 10}
    comparisons = table.compare(rounds, quick)
    assert compared(comparisons) == answers
    assert table.exit_code([], comparisons) == int("no: fails" in answers)


def test_a_spread_is_compared_with_the_bar_of_the_comparator() -> None:
    rounds = [0.93, 1.01] * 5  # a spread of 4 %: the bars are 5 % and 3 %
    comparisons = table.compare({OURS: rounds, NO_LIMITS: rounds, BEFORE: [1.0] * 10})
    assert compared(comparisons) == ["yes", "inconclusive"]


def test_the_report_names_both_bars_and_both_verdicts() -> None:
    better = OURS._replace(workload="bulk-8")
    rounds = {
        OURS: [1.0] * 10,
        NO_LIMITS: [0.8, 1.1] * 5,
        BEFORE: [1.0] * 10,
        better: [1.2] * 10,
        better._replace(comparator="ours-no-limits"): [1.2] * 10,
        better._replace(comparator="before"): [1.0] * 10,
    }
    comparisons = table.compare(rounds)
    assert cells(table.overall_table(comparisons)) == [
        ["ours", "at most 5 %", "2", "0", "0", "yes"],
        ["ours, limits off", "at most 3 %", "1", "0", "1", "inconclusive"],
    ]
    assert table.overall_table(comparisons) in table.report({}, [], [], comparisons)
    comparisons = table.compare({**rounds, NO_LIMITS._replace(workload="bulk-8"): [0.5] * 10})
    assert cells(table.overall_table(comparisons))[1][-1] == "no: fails"
    assert table.overall_table([]) == ""


def test_a_comparison_uses_the_ratios_of_the_rounds() -> None:
    [comparison] = table.compare({OURS: [1.0, 2.0, 30.0], BEFORE: [1.0, 2.0, 3.0]})
    assert (comparison.before, comparison.ours, comparison.ratio) == (2.0, 2.0, 1.0)


@pytest.mark.parametrize(("ratio", "answer"), [(1.05, "yes"), (1.06, "no: fails"), (0.5, "yes")])
def test_a_comparison_of_a_metric_that_should_be_small(ratio: float, answer: str) -> None:
    before = MEMORY._replace(comparator="before")
    comparisons = table.compare({MEMORY: [ratio * 1e7] * 10, before: [1e7] * 10})
    assert compared(comparisons) == [answer]


def test_a_comparison_may_need_a_speedup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(table.NEEDED_SPEEDUPS, OURS.workload, 1.35)
    assert compared(table.compare({OURS: [1.34] * 10, BEFORE: [1.0] * 10})) == ["no: fails"]
    assert compared(table.compare({OURS: [1.35] * 10, BEFORE: [1.0] * 10})) == ["yes"]


def test_metrics_without_a_direction_are_not_compared() -> None:
    metrics = ["gb_per_second", "beside_p99_microseconds", "cpu_percent"]
    samples = {
        table.Quantity("bulk-1", comparator, metric): [value] * 10
        for comparator, value in [("ours", 1.0), ("before", 2.0)]
        for metric in metrics
    }
    assert table.compare(samples) == []
    assert table.comparisons_table([]) == ""


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the benchmark needs Python 3.11")
def test_a_comparison_has_three_relays_and_their_order_rotates() -> None:
    options = ["--against", str(BENCH), "--rounds", "6", "--only", "start-up", "--list"]
    command = [sys.executable, BENCH, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    steps = [line.split() for line in done.stdout.splitlines()]
    assert [number for _, number, _ in steps[::3]] == [f"{n}/6" for n in range(1, 7)], done.stderr
    rounds = [tuple(name for _, _, name in steps[start : start + 3]) for start in range(0, 18, 3)]
    assert rounds[:3] == [
        ("ours", "ours-no-limits", "before"),
        ("ours-no-limits", "ours", "before"),
        ("before", "ours", "ours-no-limits"),
    ]
    assert set(rounds) == set(itertools.permutations(rounds[0]))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="the benchmark needs Python 3.11")
@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (
            [],
            [
                f"haproxy-bulk-8 1/1 {name}"
                for name in ("haproxy-1-relay", "haproxy-2-relays", "ours")
            ],
        ),
        (["--against", str(BENCH), "--rounds=3"], []),
    ],
)
def test_several_processes_are_not_compared_with_another_checkout(
    options: list[str], steps: list[str]
) -> None:
    command = [sys.executable, BENCH, "--quick", "--only", "haproxy-bulk-8", "--list", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=4 * TIMEOUT)
    assert done.stdout == "\n".join(steps) + "\n", done.stderr


# The options that switch the limits off.


def limits_of_parser() -> list[str]:
    """Return the options of the group "what it limits" whose value may be 0."""
    [group] = [one for one in make_parser()._action_groups if one.title == limits.GROUP]
    return [one.option_strings[-1] for one in group._group_actions if accepts_zero(one)]


def accepts_zero(option: argparse.Action) -> bool:
    """Return whether the option accepts 0, and parses it to a false value."""
    assert callable(option.type)
    try:
        return not option.type("0")
    except UsageError:
        return False


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_the_limits_in_the_help_are_those_of_the_relay(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    found = limits.find_limits(make_parser().format_help())
    assert found == limits_of_parser()
    assert {f"--{name.replace('_', '-')}" for name in LIMIT_OPTIONS} <= set(found)


def test_a_limit_is_found_by_its_help() -> None:
    text = """\
what it records:
  --blur N     round; 0 switches it off

what it limits:
  -a N, --all N
               at most so many; 0 switches it
               off (default: 0 s)
  -n, --new SIZE
               at most so much (0: no maximum)
  --old N      at most so many; 0 leaves it
               to the system
  --allow NETWORK
               from here only; see --all (default: 0)

about:
  --last       ends; 0 switches it off
"""
    assert limits.find_limits(text) == ["--all", "--new", "--old"]
    assert limits.find_limits("nothing") == []


def test_a_relay_starts_with_all_limits_off() -> None:
    switched_off = [f"{name}=0" for name in limits.find_limits(make_parser().format_help())]
    options = vars(parse_arguments(switched_off))
    assert not any(options[name] for name in (*LIMIT_OPTIONS, "monthly_quota"))
    with RelayProcess("--port=tcp:0:interface=127.0.0.1", *switched_off) as relay:
        relay.wait_for("Transit starting on")


@pytest.mark.parametrize("rounds", [3, 6, 10, 20])
def test_the_range_of_a_comparison_contains_the_true_median(rounds: int) -> None:
    numbers = random.Random(17)
    hits = 0
    for _ in range(2_000):
        low, high = table.median_range([numbers.gauss(1.0, 0.1) for _ in range(rounds)])
        hits += low <= 1.0 <= high
    assert hits >= 0.93 * 2_000


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
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert table.number(value) == text


def test_a_table_has_no_empty_rows_and_columns() -> None:
    values = {
        OURS: 3.0,
        OURS._replace(metric="gb_per_second"): 2.0,
        TWISTED._replace(workload="ws-ws"): 0.5,
        TWISTED._replace(workload="round-trip", metric=table.P50): 100.0,
    }
    assert table.bulk_table(values).splitlines() == [
        "| GB per CPU-second (per second) |        ours | Twisted |",
        "| ------------------------------ | ----------: | ------: |",
        "| TCP, 1 pair                    | 3.00 (2.00) |         |",
        "| WebSocket, 1 pair              |             |   0.500 |",
    ]
    assert table.many_table(values) == table.growth_table(values) == ""


def test_the_table_of_several_processes_has_all_before_the_part() -> None:
    values = {
        table.Quantity(workload, comparator, f"{prefix}{metric}"): value
        for workload, comparator, metric, values in (
            ("haproxy-bulk-8", "haproxy-1-relay", table.BULK, (4.0, 2.0)),
            ("gateway-pairings", "gateway-1-relay", table.PAIRINGS, (3_000.0, 1_000.0)),
        )
        for prefix, value in zip(("front_", ""), values)
    }
    values[table.Quantity("haproxy-bulk-8", "ours", table.BULK)] = 6.0
    assert cells(table.several_table(values)) == [
        ["GB between TCP clients, 8 pairs", "6.00", "2.00 (4.00)", ""],
        ["pairs of WebSocket clients", "", "", "1,000 (3,000)"],
    ]


def test_the_growth_table_has_a_column_for_each_number_of_pairs() -> None:
    def bulk_with(pairs: int) -> tuple[str, ...]:
        quantity: tuple[str, ...] = table.Quantity("growth", "ours", f"bulk_{pairs}_{table.BULK}")
        return quantity

    head, _, gigabytes, messages = table.growth_table(
        {bulk_with(8): 4.0, bulk_with(4_000): 2.0}
    ).splitlines()
    assert head.split("|")[2:4] == ["    8 ", " 4,000 "]
    assert gigabytes.split("|")[2:4] == [" 4.00 ", "  2.00 "]
    assert messages.split("|")[2:4] == ["      ", "       "]


def test_the_report_shows_every_bar() -> None:
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
