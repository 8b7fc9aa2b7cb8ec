"""From numbers to text: medians, bars, tables. Nothing here measures, reads or prints.

A Quantity is what was measured of one comparator at one work, once in each round; in the tables it
is the median of its rounds. A Bar is a promise about our relay: one of its quantities, or the
ratio of one to another, has to stay on one side of a number. A Bar of which not everything was
measured is neither kept nor broken.

MB are 10^6 bytes and GB 10^9; KB are 1,024 bytes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

GB, MB, KB = 1e9, 1e6, 1024
QUICK_SLACK = 2  # one short round may miss a bar by this factor


class Quantity(NamedTuple):
    """What is measured."""

    work: str
    comparator: str
    metric: str  # its name says the unit


Values = Mapping[Quantity, float]


def medians(samples: Mapping[Quantity, Sequence[float]]) -> dict[Quantity, float]:
    """The median of the rounds, for each quantity."""
    return {quantity: statistics.median(rounds) for quantity, rounds in samples.items()}


# ---------------------------------------------------------------------------------------------
# Bars
# ---------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """What is promised of our relay."""

    what: str
    top: Quantity
    bottom: Quantity | float  # by which it is divided: another one, or a unit
    needed: float
    is_least: bool  # else it is the most that is allowed
    goal: float | None = None  # told, but not judged
    is_steady: bool = False  # one short round tells as much as many long ones

    def measured(self, values: Values) -> float | None:
        """The ratio. None: something of it was not measured."""
        bottom = values.get(self.bottom) if isinstance(self.bottom, Quantity) else self.bottom
        if self.top not in values or not bottom:
            return None
        return values[self.top] / bottom

    def is_kept_by(self, measured: float, slack: float = 1) -> bool:
        """Whether that will do. `slack`: the factor by which it may miss."""
        if self.is_least:
            return measured >= self.needed / slack
        return measured <= self.needed * slack


class Verdict(NamedTuple):
    """What has come of a promise."""

    bar: Bar
    measured: float | None
    is_kept: bool
    fails: bool  # so badly that the run fails


def judge(bars: Sequence[Bar], values: Values, quick: bool) -> list[Verdict]:
    """Judge the bars of all works that were done. `quick`: by one short round."""
    verdicts = []
    for bar in bars:
        if bar.top.work not in {quantity.work for quantity in values}:
            continue
        measured = bar.measured(values)
        if measured is None:
            verdicts.append(Verdict(bar, None, is_kept=False, fails=False))
        else:
            slack = QUICK_SLACK if quick and not bar.is_steady else 1
            fails = not bar.is_kept_by(measured, slack)
            verdicts.append(Verdict(bar, measured, bar.is_kept_by(measured), fails))
    return verdicts


def exit_code(verdicts: Sequence[Verdict]) -> int:
    """1 if a bar fails the run, else 0."""
    return int(any(verdict.fails for verdict in verdicts))


TITLES = {  # of the comparators, in the order of the columns
    "ours": "ours",
    "ours-no-splice": "ours, copying",
    "twisted": "Twisted",
    "twisted-db": "Twisted, database",
    "haproxy-splice": "HAProxy, splicing",
    "haproxy-splice-1m": "HAProxy, 1 MiB pipes",
    "haproxy-copy": "HAProxy, copying",
    "direct": "no relay",
    "interpreter": "bare Python",
}
BULK = "gb_per_cpu_second"
MESSAGES = "messages_per_cpu_second"
PAIRINGS = "pairings_per_cpu_second"
P50, P99 = "p50_microseconds", "p99_microseconds"
UNITS = {
    BULK: "GB per CPU-second",
    MESSAGES: "messages per CPU-second",
    PAIRINGS: "pairings per CPU-second",
    "pairings_per_second": "pairings per second",
    P50: "median",
    "seconds": "seconds",
}


def at_least(needed: float, other: str, work: str, metric: str, goal: float | None = None) -> Bar:
    """So many times what the other does."""
    top, bottom = Quantity(work, "ours", metric), Quantity(work, other, metric)
    return Bar(f"{UNITS[metric]}, ours / {TITLES[other]}", top, bottom, needed, True, goal)


def at_most(needed: float, other: str, work: str, metric: str) -> Bar:
    """Such a part of the time that the other takes."""
    return at_least(needed, other, work, metric)._replace(is_least=False)


def no_more(needed: float, what: str, work: str, metric: str, unit: float = 1) -> Bar:
    """So many units of something."""
    return Bar(what, Quantity(work, "ours", metric), unit, needed, False)


def growth(needed: float, kind: str, metric: str, few: int, many: int) -> Bar:
    """So many times the CPU for as much work, when there are many pairs instead of few."""
    top, bottom = (Quantity("growth", "ours", f"{kind}_{count}_{metric}") for count in (few, many))
    return Bar(f"CPU for the same {kind}, {many:,} pairs / {few}", top, bottom, needed, False)


BARS = [
    at_least(5.5, "twisted", "bulk-1", BULK, goal=6.5),
    at_least(0.9, "haproxy-splice", "bulk-1", BULK, goal=1.2),
    at_least(4.5, "twisted", "bulk-8", BULK),
    at_least(1.2, "haproxy-splice", "bulk-8", BULK),
    at_least(3.8, "twisted", "both-4", BULK),
    at_least(1.2, "haproxy-splice", "both-4", BULK),
    at_least(2.5, "twisted", "tcp-ws", BULK),
    at_least(1.0, "twisted", "ws-tcp", BULK),
    at_least(1.0, "twisted", "ws-ws", BULK),
    at_least(4.0, "twisted", "messages-500", MESSAGES),
    at_least(0.9, "haproxy-copy", "messages-500", MESSAGES),
    at_least(6.0, "twisted", "pairings-db", PAIRINGS),
    at_least(15, "twisted", "pairings-db", "pairings_per_second"),
    at_most(0.6, "twisted", "round-trip", P50),
    *(
        bar._replace(is_steady=True)
        for bar in (
            no_more(20, "MB at the start", "memory", "start_bytes", MB),
            no_more(1.2, "KB for each waiting client", "memory", "waiting_bytes", KB),
            no_more(1.0, "KB for each paired, idle client", "memory", "paired_bytes", KB),
        )
    ),
    no_more(0.1, "% of a core while 15,000 wait", "idle", "cpu_percent"),
    at_most(0.25, "twisted", "start-up", "seconds"),
    *(growth(1.3, "bulk", BULK, 8, many) for many in (64, 512, 4_000)),
    *(growth(1.3, "messages", MESSAGES, 8, many) for many in (64, 512, 4_000)),
    Bar(
        "99th percentile, beside bulk / alone",
        Quantity("fairness", "ours", f"beside_{P99}"),
        Quantity("fairness", "ours", f"alone_{P99}"),
        needed=20,
        is_least=False,
    ),
]


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """With three digits that count, and never in powers of ten."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that can be read as it stands here. Words are in the first column."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, [head, rule, *rows]))


class Line(NamedTuple):
    """A row of a table: one metric of all comparators, and maybe another in brackets."""

    label: str
    work: str
    metric: str
    in_brackets: str = ""
    unit: float = 1


def cell(line: Line, comparator: str, values: Values) -> str:
    """What one comparator has reached, or nothing."""
    main, brackets = (
        values.get(Quantity(line.work, comparator, metric))
        for metric in (line.metric, line.in_brackets)
    )
    parts = [] if main is None else [number(main / line.unit)]
    if brackets is not None:
        parts.append(f"({number(brackets / line.unit)})")
    return " ".join(parts)


def comparison(caption: str, lines: Sequence[Line], values: Values) -> str:
    """A table without empty rows and columns. Where nothing is left, it is empty itself."""
    lines = [line for line in lines if any(cell(line, name, values) for name in TITLES)]
    names = [name for name in TITLES if any(cell(line, name, values) for line in lines)]
    if not lines:
        return ""
    rows = [[line.label, *(cell(line, name, values) for name in names)] for line in lines]
    return markdown([caption, *(TITLES[name] for name in names)], rows)


def bulk_table(values: Values) -> str:
    """Bytes: more is better."""
    labels = {
        "bulk-1": "TCP, 1 pair",
        "bulk-8": "TCP, 8 pairs",
        "both-4": "TCP, 4 pairs, both ways",
        "tcp-ws": "TCP to WebSocket, 1 pair",
        "ws-tcp": "WebSocket to TCP, 1 pair",
        "ws-ws": "WebSocket, 1 pair",
    }
    lines = [Line(label, work, BULK, "gb_per_second") for work, label in labels.items()]
    lines.append(Line("TCP, 8 pairs, beside round trips", "fairness", "", "beside_gb_per_second"))
    return comparison("GB per CPU-second (per second)", lines, values)


def many_table(values: Values) -> str:
    """Messages and pairs: more is better."""
    lines = [
        Line("messages of 1,400 bytes, 500 pairs", "messages-500", MESSAGES, "messages_per_second"),
        Line("pairs that meet and leave", "pairings", PAIRINGS, "pairings_per_second"),
        Line("pairs, with a database", "pairings-db", PAIRINGS, "pairings_per_second"),
    ]
    return comparison("per CPU-second (per second)", lines, values)


def small_table(values: Values) -> str:
    """Time and memory: less is better."""
    lines = [
        Line("64 bytes there and back, µs", "round-trip", P50, P99),
        Line("64 bytes, among 9 pairs, µs", "fairness", f"alone_{P50}", f"alone_{P99}"),
        Line(
            "64 bytes, beside 8 pairs with bulk, µs", "fairness", f"beside_{P50}", f"beside_{P99}"
        ),
        Line("start until a client can connect, s", "start-up", "seconds"),
        Line("CPU while 15,000 clients wait, %", "idle", "cpu_percent"),
        Line("memory at the start, MB", "memory", "start_bytes", unit=MB),
        Line("memory for each waiting client, KB", "memory", "waiting_bytes", unit=KB),
        Line("memory for each paired, idle client, KB", "memory", "paired_bytes", unit=KB),
    ]
    return comparison("median (99th percentile)", lines, values)


def growth_table(values: Values) -> str:
    """More and more pairs: it should not matter."""
    labels = {("bulk", BULK): "GB", ("messages", MESSAGES): "messages"}
    counts = sorted(
        {int(quantity.metric.split("_")[1]) for quantity in values if quantity.work == "growth"}
    )
    if not counts:
        return ""
    rows = []
    for (kind, metric), label in labels.items():
        found = [values.get(Quantity("growth", "ours", f"{kind}_{n}_{metric}")) for n in counts]
        rows.append([label, *("" if value is None else number(value) for value in found)])
    return markdown(["ours, per CPU-second, with so many pairs", *map("{:,}".format, counts)], rows)


def bars_table(verdicts: Sequence[Verdict]) -> str:
    """What is promised, and what has come of it."""
    rows = []
    for bar, measured, is_kept, fails in verdicts:
        bound = "at least" if bar.is_least else "at most"
        goal = "" if bar.goal is None else f" (goal {bar.goal:g})"
        if measured is None:
            answer = "not measured"
        else:
            answer = "yes" if is_kept else "no: fails" if fails else "no"
        rows.append(
            [
                f"{bar.top.work}: {bar.what}",
                f"{bound} {bar.needed:g}{goal}",
                "" if measured is None else number(measured),
                answer,
            ]
        )
    return markdown(["bar", "needed", "measured", "kept"], rows) if rows else ""


def report(values: Values, verdicts: Sequence[Verdict], notes: Sequence[str]) -> str:
    """All of it; the notes go below."""
    tables = [table(values) for table in (bulk_table, many_table, small_table, growth_table)]
    listed = "\n".join(f"* {note}" for note in notes)
    parts = [part for part in (*tables, bars_table(verdicts), listed) if part]
    return "\n\n".join(parts) + "\n"
