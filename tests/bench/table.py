"""Medians, bars and tables. Nothing here measures, reads files or prints.

A Quantity is one metric of one comparator at one workload. It is measured once in each round; the
tables show the median of the rounds. A Bar is a requirement on our relay: one of its quantities, or
the ratio of two quantities, must stay on one side of a number. A Comparison puts our relay, with
its default limits or with all limits off, beside the relay of another checkout ("before"), measured
in the same rounds.

MB are 10^6 bytes, GB are 10^9 bytes, KB are 1,024 bytes.
"""

from __future__ import annotations

import enum
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

GB, MB, KB = 1e9, 1e6, 1024
QUICK_SLACK = 2  # one short round may miss a bar by this factor
# The same where a comparator waits for the disk at each record: disks vary more than processors.
QUICK_DISK_SLACK = 4


class Quantity(NamedTuple):
    """One metric of one comparator at one workload."""

    workload: str
    comparator: str
    metric: str  # the name contains the unit


Values = Mapping[Quantity, float]
Samples = Mapping[Quantity, Sequence[float]]  # one value for each round, in the order of the rounds


def medians(samples: Samples) -> dict[Quantity, float]:
    """Return the median of the rounds of each quantity."""
    return {quantity: statistics.median(rounds) for quantity, rounds in samples.items()}


# ---------------------------------------------------------------------------------------------
# Bars
# ---------------------------------------------------------------------------------------------


class Bar(NamedTuple):
    """A requirement on our relay."""

    label: str
    top: Quantity
    bottom: Quantity | float  # the divisor: another quantity, or a unit
    needed: float
    is_minimum: bool  # otherwise `needed` is a maximum
    goal: float | None = None  # shown, but not judged
    is_steady: bool = False  # one short round is as precise as several long ones
    waits_for_disk: bool = False  # the comparator does, at each record

    def measured(self, values: Values) -> float | None:
        """Return the ratio, or None if one of the two quantities was not measured."""
        bottom = values.get(self.bottom) if isinstance(self.bottom, Quantity) else self.bottom
        if self.top not in values or not bottom:
            return None
        return values[self.top] / bottom

    def is_met_by(self, measured: float, slack: float = 1) -> bool:
        """Return whether this value is good enough. It may miss by the factor `slack`."""
        if self.is_minimum:
            return measured >= self.needed / slack
        return measured <= self.needed * slack

    def concerns(self, comparators: Sequence[str]) -> bool:
        """Return whether a run with these comparators can measure both quantities."""
        return not isinstance(self.bottom, Quantity) or self.bottom.comparator in comparators


class Verdict(NamedTuple):
    """The result of a bar."""

    bar: Bar
    measured: float | None
    is_met: bool
    fails: bool  # the run fails; a quick run tolerates a small miss


def judge(bars: Sequence[Bar], values: Values, quick: bool) -> list[Verdict]:
    """Judge the bars of all measured workloads. `quick`: the values come from one short round."""
    verdicts = []
    for bar in bars:
        if bar.top.workload not in {quantity.workload for quantity in values}:
            continue
        measured = bar.measured(values)
        if measured is None:
            verdicts.append(Verdict(bar, None, is_met=False, fails=False))
        else:
            slack = QUICK_DISK_SLACK if bar.waits_for_disk else QUICK_SLACK
            if bar.is_steady or not quick:
                slack = 1
            fails = not bar.is_met_by(measured, slack)
            verdicts.append(Verdict(bar, measured, bar.is_met_by(measured), fails))
    return verdicts


TITLES = {  # of the comparators, in the order of the columns
    "ours": "ours",
    "ours-no-limits": "ours, limits off",
    "before": "before",
    "ours-no-splice": "ours, copying",
    "twisted": "Twisted",
    "twisted-db": "Twisted, database",
    "haproxy-splice": "HAProxy, splicing",
    "haproxy-splice-1m": "HAProxy, 1 MiB pipes",
    "haproxy-copy": "HAProxy, copying",
    "haproxy-1-relay": "HAProxy, 1 relay",
    "haproxy-2-relays": "HAProxy, 2 relays",
    "gateway-1-relay": "gateway, 1 relay",
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


def at_least(
    needed: float, other: str, workload: str, metric: str, goal: float | None = None
) -> Bar:
    """Require that ours divided by the other is at least this number."""
    top, bottom = Quantity(workload, "ours", metric), Quantity(workload, other, metric)
    return Bar(f"{UNITS[metric]}, ours / {TITLES[other]}", top, bottom, needed, True, goal)


def at_most(needed: float, other: str, workload: str, metric: str) -> Bar:
    """Require that ours divided by the other is at most this number."""
    return at_least(needed, other, workload, metric)._replace(is_minimum=False)


def no_more(needed: float, label: str, workload: str, metric: str, unit: float = 1) -> Bar:
    """Require that a quantity of ours is at most so many units."""
    return Bar(label, Quantity(workload, "ours", metric), unit, needed, False)


def growth(needed: float, kind: str, metric: str, few: int, many: int) -> Bar:
    """Limit the ratio of the CPU for the same work with many pairs to that with few pairs."""
    top, bottom = (Quantity("growth", "ours", f"{kind}_{count}_{metric}") for count in (few, many))
    return Bar(f"CPU for the same {kind}, {many:,} pairs / {few}", top, bottom, needed, False)


def fairness(needed: float, label: str, workload: str, metric: str, base: str) -> Bar:
    """Limit the ratio of two times of our relay at one workload."""
    top, bottom = Quantity(workload, "ours", metric), Quantity(workload, "ours", base)
    return Bar(label, top, bottom, needed, False)


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
    at_least(6.0, "twisted", "pairings-db", PAIRINGS)._replace(waits_for_disk=True),
    at_least(15, "twisted", "pairings-db", "pairings_per_second")._replace(waits_for_disk=True),
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
    fairness(
        20,
        "99th percentile, beside bulk / alone",
        "fairness",
        f"beside_{P99}",
        f"alone_{P99}",
    ),
    fairness(
        2,
        "median, beside bulk in 400 pairs / in 8 pairs",
        "fairness-400",
        f"beside_400_{P50}",
        f"beside_8_{P50}",
    ),
]


# ---------------------------------------------------------------------------------------------
# Comparison with the relay of another checkout
# ---------------------------------------------------------------------------------------------

# A metric of these comparators may be worse than that of "before" by so much. If the spread is
# larger, the ratio alone decides nothing.
TOLERANCES = {"ours": 0.05, "ours-no-limits": 0.03}
QUICK_FACTOR = 2  # the tolerances are multiplied by it if the rounds are few and short
NEEDED_SPEEDUPS: dict[str, float] = {}  # required, by workload, instead of no slowdown
CONFIDENCE = 0.95  # that the range of a comparison contains the true median


class Answer(enum.Enum):
    """The result of a comparison, or of all comparisons of one comparator."""

    MET = "yes"
    MISSED = "no: fails"
    INCONCLUSIVE = "inconclusive"


class Comparison(NamedTuple):
    """One metric of ours beside the same metric of "before", as ratios ours / before."""

    workload: str
    metric: str
    comparator: str  # ours, or ours without limits
    tolerance: float
    before: float  # the median of the rounds
    ours: float  # the same
    ratio: float  # the median of the ratios of the rounds
    low: float  # the range of this median
    high: float
    needed: float
    is_minimum: bool  # otherwise `needed` is a maximum

    @property
    def spread(self) -> float:
        """Return half the width of the range, relative to the ratio."""
        return (self.high - self.low) / 2 / self.ratio

    @property
    def answer(self) -> Answer:
        """Compare the ratio with the bar.

        It is inconclusive if the range contains the bar, and the spread exceeds the tolerance.
        """
        sides = [(value >= self.needed) == self.is_minimum for value in (self.low, self.high)]
        if self.spread > self.tolerance and sides[0] != sides[1]:
            return Answer.INCONCLUSIVE
        is_met = self.ratio >= self.needed if self.is_minimum else self.ratio <= self.needed
        return Answer.MET if is_met else Answer.MISSED


def more_is_better(metric: str) -> bool | None:
    """Return the direction of a metric, or None if its ratio is not judged.

    Amounts per second depend on the load generator too. The 99th percentiles vary too much. The
    CPU of an idle relay is almost nothing; a bar of its own limits it.
    """
    if metric.endswith("_per_cpu_second"):
        return True
    if metric.endswith(("_per_second", P99, "_percent")):
        return None
    return False


def median_range(ratios: Sequence[float]) -> tuple[float, float]:
    """Return the range that contains the true median with CONFIDENCE.

    The number of rounds below the true median has a binomial distribution. So the range extends
    from the k-th smallest to the k-th largest ratio, and the distribution yields k. Fewer than
    6 rounds yield no k; then the range extends beyond all ratios, by the factor between them.
    """
    ordered = sorted(ratios)
    count = len(ratios)
    left_out = (1 - CONFIDENCE) / 2 * 2**count  # of the 2**count cases, at each end
    k = 0
    while (left_out := left_out - math.comb(count, k)) >= 0:
        k += 1
    if k == 0:
        factor = ordered[-1] / ordered[0]
        return ordered[0] / factor, ordered[-1] * factor
    return ordered[k - 1], ordered[-k]


def tolerances(quick: bool = False) -> dict[str, float]:
    """Return the tolerance of each comparator. `quick`: the rounds are few and short."""
    factor = QUICK_FACTOR if quick else 1
    return {name: tolerance * factor for name, tolerance in TOLERANCES.items()}


def compare(samples: Samples, quick: bool = False) -> list[Comparison]:
    """Compare each metric of "before" with that of ours, with and without limits."""
    comparisons = []
    for quantity, before in samples.items():
        is_minimum = more_is_better(quantity.metric)
        if quantity.comparator != "before" or is_minimum is None:
            continue
        for name, tolerance in tolerances(quick).items():
            ours = samples.get(quantity._replace(comparator=name))
            if ours is None:
                continue
            ratios = [one / other for one, other in zip(ours, before)]
            allowed = 1 - tolerance if is_minimum else 1 + tolerance
            comparisons.append(
                Comparison(
                    quantity.workload,
                    quantity.metric,
                    name,
                    tolerance,
                    statistics.median(before),
                    statistics.median(ours),
                    statistics.median(ratios),
                    *median_range(ratios),
                    NEEDED_SPEEDUPS.get(quantity.workload, allowed),
                    is_minimum,
                )
            )
    return comparisons


def overall(comparisons: Sequence[Comparison]) -> Answer:
    """Return the worst answer. A missed bar is worse than an inconclusive comparison."""
    answers = {one.answer for one in comparisons}
    for answer in (Answer.MISSED, Answer.INCONCLUSIVE):
        if answer in answers:
            return answer
    return Answer.MET


def exit_code(verdicts: Sequence[Verdict], comparisons: Sequence[Comparison] = ()) -> int:
    """Return 1 if a bar or a comparison fails the run, else 0."""
    missed = [one for one in comparisons if one.answer is Answer.MISSED]
    return int(bool(missed) or any(verdict.fails for verdict in verdicts))


# ---------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Return the number with three significant digits, without an exponent."""
    if value == 0:
        return "0"
    digits = 2 - math.floor(math.log10(abs(value)))
    return f"{round(value, digits):,.{max(digits, 0)}f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table with padded cells. The first column is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(head, *rows)]

    def line(cells: Sequence[str]) -> str:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths)]
        return f"| {' | '.join([cells[0].ljust(widths[0]), *padded[1:]])} |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(map(line, [head, rule, *rows]))


class Line(NamedTuple):
    """A row of a table: one metric of all comparators, and a second one in brackets."""

    label: str
    workload: str
    metric: str
    in_brackets: str = ""
    unit: float = 1


def cell(line: Line, comparator: str, values: Values) -> str:
    """Return the text of one cell; it is empty if nothing was measured."""
    main, brackets = (
        values.get(Quantity(line.workload, comparator, metric))
        for metric in (line.metric, line.in_brackets)
    )
    parts = [] if main is None else [number(main / line.unit)]
    if brackets is not None:
        parts.append(f"({number(brackets / line.unit)})")
    return " ".join(parts)


def columns(caption: str, lines: Sequence[Line], values: Values) -> str:
    """Return a table with a column for each comparator, without empty rows and columns.

    The text is empty if nothing was measured.
    """
    lines = [line for line in lines if any(cell(line, name, values) for name in TITLES)]
    names = [name for name in TITLES if any(cell(line, name, values) for line in lines)]
    if not lines:
        return ""
    rows = [[line.label, *(cell(line, name, values) for name in names)] for line in lines]
    return markdown([caption, *(TITLES[name] for name in names)], rows)


def bulk_table(values: Values) -> str:
    """Return the table of bulk throughput: more is better."""
    labels = {
        "bulk-1": "TCP, 1 pair",
        "bulk-8": "TCP, 8 pairs",
        "both-4": "TCP, 4 pairs, both ways",
        "tcp-ws": "TCP to WebSocket, 1 pair",
        "ws-tcp": "WebSocket to TCP, 1 pair",
        "ws-ws": "WebSocket, 1 pair",
    }
    lines = [Line(label, name, BULK, "gb_per_second") for name, label in labels.items()]
    lines += [
        Line("TCP, 8 pairs, beside round trips", "fairness", "", "beside_gb_per_second"),
        Line(
            "mixed, 400 pairs, beside round trips", "fairness-400", "", "beside_400_gb_per_second"
        ),
    ]
    return columns("GB per CPU-second (per second)", lines, values)


def many_table(values: Values) -> str:
    """Return the table of messages and pairings: more is better."""
    lines = [
        Line("messages of 1,400 bytes, 500 pairs", "messages-500", MESSAGES, "messages_per_second"),
        Line("pairs that meet and leave", "pairings", PAIRINGS, "pairings_per_second"),
        Line("pairs, with a database", "pairings-db", PAIRINGS, "pairings_per_second"),
    ]
    return columns("per CPU-second (per second)", lines, values)


def several_table(values: Values) -> str:
    """Return the table of several processes: HAProxy or a gateway in front of relays.

    A relay alone is measured beside them.
    """
    lines = [
        Line(label, name, metric, f"front_{metric}")
        for label, name, metric in (
            ("GB between TCP clients, 8 pairs", "haproxy-bulk-8", BULK),
            ("GB between TCP clients, 512 pairs", "haproxy-bulk-512", BULK),
            ("GB from TCP to WebSocket", "gateway-tcp-ws", BULK),
            ("GB from WebSocket to TCP", "gateway-ws-tcp", BULK),
            ("pairs of TCP clients", "haproxy-pairings", PAIRINGS),
            ("pairs of WebSocket clients", "gateway-pairings", PAIRINGS),
        )
    ]
    lines += [
        Line(f"{label}, per second", name, "pairings_per_second")
        for label, name in (
            ("pairs of TCP clients", "haproxy-pairings"),
            ("pairs of WebSocket clients", "gateway-pairings"),
        )
    ]
    caption = "per CPU-second of all processes (of HAProxy or the gateway)"
    return columns(caption, lines, values)


def small_table(values: Values) -> str:
    """Return the table of times and memory: less is better."""
    lines = [
        Line("64 bytes there and back, µs", "round-trip", P50, P99),
        Line("64 bytes, among 9 pairs, µs", "fairness", f"alone_{P50}", f"alone_{P99}"),
        Line(
            "64 bytes, beside 8 pairs with bulk, µs", "fairness", f"beside_{P50}", f"beside_{P99}"
        ),
        *(
            Line(
                f"64 bytes, beside {count} pairs with mixed bulk, µs",
                "fairness-400",
                f"beside_{count}_{P50}",
                f"beside_{count}_{P99}",
            )
            for count in (8, 400)
        ),
        Line("CPU meanwhile, beside 400 pairs, %", "fairness-400", "beside_400_cpu_percent"),
        Line("start until a client can connect, s", "start-up", "seconds"),
        Line("CPU while 15,000 clients wait, %", "idle", "cpu_percent"),
        Line("memory at the start, MB", "memory", "start_bytes", unit=MB),
        Line("memory for each waiting client, KB", "memory", "waiting_bytes", unit=KB),
        Line("memory for each paired, idle client, KB", "memory", "paired_bytes", unit=KB),
    ]
    return columns("median (99th percentile)", lines, values)


def growth_table(values: Values) -> str:
    """Return the table of work per CPU-second by the number of pairs: it should not decrease."""
    labels = {("bulk", BULK): "GB", ("messages", MESSAGES): "messages"}
    counts = sorted(
        {int(quantity.metric.split("_")[1]) for quantity in values if quantity.workload == "growth"}
    )
    if not counts:
        return ""
    rows = []
    for (kind, metric), label in labels.items():
        found = [values.get(Quantity("growth", "ours", f"{kind}_{n}_{metric}")) for n in counts]
        rows.append([label, *("" if value is None else number(value) for value in found)])
    return markdown(["ours, per CPU-second, with so many pairs", *map("{:,}".format, counts)], rows)


def bars_table(verdicts: Sequence[Verdict]) -> str:
    """Return the table of the bars and their results."""
    rows = []
    for bar, measured, is_met, fails in verdicts:
        goal = "" if bar.goal is None else f" (goal {bar.goal:g})"
        if measured is None:
            answer = "not measured"
        else:
            answer = "yes" if is_met else "no: fails" if fails else "no"
        rows.append(
            [
                f"{bar.top.workload}: {bar.label}",
                f"{bound(bar.is_minimum)} {bar.needed:g}{goal}",
                "" if measured is None else number(measured),
                answer,
            ]
        )
    return markdown(["bar", "needed", "measured", "met"], rows) if rows else ""


def comparisons_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of ours beside "before"."""
    rows = [
        [
            f"{one.workload}: {one.metric}",
            TITLES[one.comparator],
            number(one.before),
            number(one.ours),
            f"{one.ratio:.3f}",
            f"{one.low:.3f} to {one.high:.3f} (±{one.spread * 100:.1f} %)",
            f"{bound(one.is_minimum)} {one.needed:g}",
            one.answer.value,
        ]
        for one in comparisons
    ]
    head = ["row", "relay", "before", "ours", "ours / before", "range", "needed", "met"]
    return markdown(head, rows) if rows else ""


def overall_table(comparisons: Sequence[Comparison]) -> str:
    """Return the table of the tolerances, with the verdict on each."""
    rows = []
    for name in TOLERANCES:
        found = [one for one in comparisons if one.comparator == name]
        if not found:
            continue
        answers = [one.answer for one in found]
        rows.append(
            [
                TITLES[name],
                f"at most {found[0].tolerance * 100:g} %",
                *(str(answers.count(answer)) for answer in Answer),
                overall(found).value,
            ]
        )
    head = ["relay", "worse than before by", "met", "missed", "inconclusive", "all met"]
    return markdown(head, rows) if rows else ""


def bound(is_minimum: bool) -> str:
    """Return the words before a bar's number."""
    return "at least" if is_minimum else "at most"


def report(
    values: Values,
    verdicts: Sequence[Verdict],
    notes: Sequence[str],
    comparisons: Sequence[Comparison] = (),
) -> str:
    """Return the whole report: the tables, and the notes below them."""
    makers = (bulk_table, many_table, several_table, small_table, growth_table)
    tables = [table(values) for table in makers]
    listed = "\n".join(f"* {note}" for note in notes)
    judged = (comparisons_table(comparisons), overall_table(comparisons), bars_table(verdicts))
    return "\n\n".join(part for part in (*tables, *judged, listed) if part) + "\n"
