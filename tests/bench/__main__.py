"""Compare relays: work per second of CPU, times, and memory.

A round gives one workload (workloads.py) to each comparator (relays.py) in turn, so that a change
of the machine's speed affects all comparators. The tables show the median of the rounds. The relay
has one core for itself; the load generator (load.py) uses another. The report (table.py) is written
to stdout, progress to stderr.

With --against DIR only these run, for more rounds: our relay with its default limits, our relay
with all limits off, and the relay in DIR ("before"), which gets no options of limits. Each round
yields a ratio ours / before for each metric; the order rotates. No metric must be worse by more
than 5 % with the default limits, or by more than 3 % without limits. If the range of the median of
the ratios contains this bar, and half its width is more than 5 % (or 3 %), the workload is repeated
once. If that is still so, it is reported as inconclusive. With --quick both bars are twice as wide,
and nothing is repeated.

The exit code is 1 if our relay misses a bar, or after an error. An unavailable comparator is
reported; with RELAY_BENCH_REQUIRED=1 it is an error too, and so is a network that does not permit
the addresses of --sources.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import shlex
import signal
import sqlite3
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import clients
import network
import relays
import table
from load import LoadError
from readme import publish
from relays import Maker, RelayError, Unavailable
from table import Quantity
from workloads import (
    COMPARISON,
    COMPARISON_QUICK,
    FULL,
    QUICK,
    WORKLOADS,
    Measured,
    Scale,
    Subject,
    Workload,
)

ROUNDS = 5
QUICK_ROUNDS = 1
COMPARISON_ROUNDS = 10
COMPARISON_QUICK_ROUNDS = 3
STEP_SECONDS = 300  # the time limit of one step; the longest needs a third
DISTURBED_PERCENT = 20  # of the machine, used by other processes; ksoftirqd alone may use 15
LOOPBACK, COUNTED = "loopback", "counted"  # values of --sources
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
MARKS = ("<!-- bench -->", "<!-- end of bench -->")  # lines in the file of --readme
REQUIRED = os.environ.get("RELAY_BENCH_REQUIRED") == "1"


class BenchError(Exception):
    """The run ends; the text is the reason."""


class Step(NamedTuple):
    """One comparator at one workload in one round."""

    workload: Workload
    comparator: str
    round: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.workload.name} {self.round}/{self.rounds} {self.comparator}"


class Machine(NamedTuple):
    """The machine's counters at one moment."""

    monotonic_seconds: float
    others_seconds: float  # of CPU, not used by us or by processes that we started

    @classmethod
    def now(cls) -> Machine:
        """Read the counters: proc(5). A process that we started counts as ours after its end.

        The kernel's threads count as others (ksoftirqd does some of the network's work), and so
        does the time that the hypervisor took.
        """
        with open("/proc/stat") as lines:
            user, nice, system, _, _, irq, softirq, steal = lines.readline().split()[1:9]
        ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
        return cls(time.monotonic(), ticks / TICKS_PER_SECOND - sum(os.times()[:4]))

    def others_percent(self, since: Machine) -> float:
        """Return the others' share of all cores. The kernel samples it, to a few percent."""
        available = (self.monotonic_seconds - since.monotonic_seconds) * (os.cpu_count() or 1)
        return max(0.0, (self.others_seconds - since.others_seconds) / available * 100)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    rows = "\n".join(f"  {workload.name:<16} {workload.about}" for workload in WORKLOADS)
    parser = argparse.ArgumentParser(
        prog="python3 tests/bench",
        description="Compare relays; see the docstring of tests/bench/__main__.py.",
        epilog=f"rows:\n{rows}\n\ncomparators:\n  {', '.join(table.TITLES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="DIR",
        help="compare only with the relay in DIR (transit_relay.py and ws_frames.py of another"
        " commit), with the default limits and with all limits off: about 30 minutes, at most 60"
        " with repeated rows; with --quick about 8 minutes",
    )
    parser.add_argument(
        "--quick", action="store_true", help="few and short rounds, judged less strictly"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        metavar="N",
        help=f"rounds (default: {ROUNDS}, quick {QUICK_ROUNDS}; with --against"
        f" {COMPARISON_ROUNDS}, quick {COMPARISON_QUICK_ROUNDS})",
    )
    parser.add_argument(
        "--only",
        action="extend",
        nargs="+",
        metavar="ROW",
        choices=[workload.name for workload in WORKLOADS],
        help="only these rows; may be repeated",
    )
    parser.add_argument(
        "--comparators",
        action="extend",
        nargs="+",
        metavar="NAME",
        choices=list(table.TITLES),
        help="only these comparators; may be repeated",
    )
    parser.add_argument(
        "--as-it-is",
        action="store_true",
        help="use the machine's network and its congestion control (default: a loopback of our"
        f" own, with {network.CONGESTION_CONTROL}, where that is permitted)",
    )
    parser.add_argument(
        "--sources",
        choices=[LOOPBACK, COUNTED],
        help="the addresses of the clients: of the loopback, which our relay exempts from limits"
        f" for each source, or of {network.COUNTED_SOURCES}, to which these limits apply (default:"
        f" {COUNTED} with --against, else {LOOPBACK}; always {LOOPBACK} in the machine's network)",
    )
    parser.add_argument(
        "--list", action="store_true", help="list the measurements in their order, and exit"
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help=f"write the tables to FILE too, between the lines {MARKS[0]} and {MARKS[1]}",
    )
    options = parser.parse_args()
    options.sources = options.sources or (COUNTED if options.against else LOOPBACK)
    if options.against:
        options.against = options.against.resolve()
        options.comparators = options.comparators or [*table.TOLERANCES, "before"]
    elif "before" in (options.comparators or []):
        parser.error("the comparator before needs --against DIR")
    least_rounds = COMPARISON_QUICK_ROUNDS if options.against else 1  # fewer have no spread
    if options.rounds is not None and options.rounds < least_rounds:
        parser.error(f"--rounds must be at least {least_rounds}")
    return options


def report_progress(text: str) -> None:
    """Write a line to stderr."""
    print(text, file=sys.stderr, flush=True)


def choose_scale(options: argparse.Namespace) -> tuple[Scale, int]:
    """Return the duration of the measurements, and the number of rounds."""
    scale, rounds = {
        (False, False): (FULL, ROUNDS),
        (False, True): (QUICK, QUICK_ROUNDS),
        (True, False): (COMPARISON, COMPARISON_ROUNDS),
        (True, True): (COMPARISON_QUICK, COMPARISON_QUICK_ROUNDS),
    }[options.against is not None, options.quick]
    return scale, options.rounds or rounds


def order(names: Sequence[str], number: int) -> list[str]:
    """Return the comparators in their order in a round. The rounds count from 1.

    An earlier place may be an advantage, and so may a certain predecessor. So the first place
    rotates, and every other round reverses the rest. In six rounds, three comparators have all
    six orders.
    """
    if not names:
        return []
    start = (number - 1) % len(names)
    first, *rest = [*names[start:], *names[:start]]
    return [first, *(rest if number % 2 else reversed(rest))]


def plan(
    workloads: Sequence[Workload], comparators: Sequence[str] | None, rounds: int
) -> Iterator[Step]:
    """Yield all steps in their order. `comparators`: only these; None: those of each workload."""
    is_comparison = "before" in (comparators or [])
    for workload in workloads:
        count = rounds if is_comparison and workload.is_compared else workload.rounds(rounds)
        first, *others = workload.comparators
        wanted = comparators or workload.comparators
        versions = ("ours-no-limits", "before") if first == "ours" else ()
        known = (first, *versions, *others)
        names = [name for name in known if name in wanted]
        if is_comparison and "before" not in names:
            continue
        for number in range(1, count + 1):
            for name in order(names, number):
                yield Step(workload, name, number, count)


def find_missing(steps: Sequence[Step], makers: Mapping[str, Maker]) -> dict[str, str]:
    """Return the unavailable workloads and comparators, with the reasons."""
    missing = {}
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for workload in dict.fromkeys(step.workload for step in steps):
        if workload.open_files > limit:
            missing[workload.name] = f"ulimit -Hn is {limit:,}, {workload.open_files:,} are needed"
    for name in dict.fromkeys(step.comparator for step in steps):
        try:
            makers[name](relays.BUILD, None)
        except Unavailable as error:
            missing[name] = str(error)
    return missing


class Run:
    """A run: the samples of all its steps so far."""

    def __init__(self, makers: Mapping[str, Maker], scale: Scale) -> None:
        self._makers = makers
        self._scale = scale
        self.samples: dict[Quantity, list[float]] = {}
        self.steps = 0
        self.disturbed_steps = 0  # other processes used much of the machine

    def measure_all(self, steps: Sequence[Step]) -> None:
        """Take the steps one after the other. Raise BenchError if one fails."""
        for step in steps:
            before = Machine.now()
            measured = self._measure(step)
            after = Machine.now()
            others_percent = after.others_percent(before)
            numbers = ", ".join(f"{name} {table.number(value)}" for name, value in measured.items())
            seconds = after.monotonic_seconds - before.monotonic_seconds
            report_progress(f"{step}: {seconds:.1f} s, others {others_percent:.0f} %; {numbers}")
            self.steps += 1
            self.disturbed_steps += others_percent > DISTURBED_PERCENT
            for metric, value in measured.items():
                quantity = Quantity(step.workload.name, step.comparator, metric)
                self.samples.setdefault(quantity, []).append(value)

    def _measure(self, step: Step) -> Measured:
        """Return the results of one step. Raise BenchError if the step fails.

        A step of another program is repeated once after an error, which is not ours.
        """
        try:
            return self._attempt(step)
        except BenchError as error:
            if step.comparator.startswith("ours"):
                raise
            report_progress(f"{error}; repeated")
        return self._attempt(step)

    def _attempt(self, step: Step) -> Measured:
        signal.alarm(STEP_SECONDS)
        try:
            with tempfile.TemporaryDirectory(prefix="step-", dir=relays.BUILD) as folder:
                subject = Subject(self._makers[step.comparator], Path(folder))
                return step.workload.measure(subject, self._scale)
        except (LoadError, RelayError, OSError, sqlite3.Error) as error:
            raise BenchError(f"{step}: {error}") from error
        finally:
            signal.alarm(0)

    def inconclusive(self) -> list[str]:
        """Return the workloads with an inconclusive comparison, by the bars of a full run."""
        comparisons = table.compare(self.samples)
        found = [one for one in comparisons if one.answer is table.Answer.INCONCLUSIVE]
        return list(dict.fromkeys(one.workload for one in found))


def hardware() -> str:
    """Return a description of this machine."""
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"


def enter_network(as_it_is: bool, sources: str) -> str:
    """Enter the network of the run, and return a description of it.

    `sources`: see --sources; the machine's network has the addresses of the loopback alone. Raise
    BenchError if it cannot have them, and RELAY_BENCH_REQUIRED is set.
    """
    of_machine = network.congestion_control()
    which, is_our_own = "in the machine's network", False
    if not as_it_is:
        try:
            network.enter_our_own()
            which = f"in a separate network namespace (the host uses {of_machine})"
            is_our_own = True
        except network.NotPermitted as error:
            which = f"in the machine's network ({error})"
    if sources == COUNTED and is_our_own:
        clients.use_counted_sources()
        which += f"; clients in {network.COUNTED_SOURCES}"
    elif sources == COUNTED:
        which += f"; no clients in {network.COUNTED_SOURCES}: no limits for each source apply"
        if REQUIRED:
            raise BenchError(which)
    return f"TCP with {network.congestion_control()}, {which}"


def make_notes(
    options: argparse.Namespace, missing: Mapping[str, str], network_text: str, done: Run
) -> list[str]:
    """Return the notes below the tables: the conditions of this run."""
    notes = []
    if options.quick and not options.against:
        notes.append(
            "One short round: a bar fails only where it is missed by a factor of"
            f" {table.QUICK_SLACK}, or {table.QUICK_DISK_SLACK} with a database, where the Twisted"
            " relay waits for the disk at each record; bars on memory have no such slack."
        )
    if options.against:
        bars = ", ".join(
            f"{table.TITLES[name]}: {tolerance * 100:g} %"
            for name, tolerance in table.tolerances(options.quick).items()
            if name in options.comparators
        )
        notes.append(
            "Ours / before is the median of the ratios of the rounds. The range contains the true"
            f" median with {table.CONFIDENCE * 100:.0f} % confidence. A metric may be worse by so"
            f" much: {bars}. Inconclusive: the range contains that bar, and half its width is more."
        )
    if "ours-no-limits" in (options.comparators or []):
        notes.append(f"Limits off: {' '.join(relays.options_without_limits())}.")
    if relays.RELAY_CORE == relays.LOAD_CORE:
        notes.append("There is only one core; the relay shares it with the load generator.")
    notes += [f"{name} is not available: {reason}." for name, reason in missing.items()]
    if done.disturbed_steps:
        notes.append(
            f"Other processes used more than {DISTURBED_PERCENT} % of the machine's CPU in"
            f" {done.disturbed_steps} of {done.steps} measurements."
        )
    notes.append("; ".join([hardware(), *relays.versions(options.against), network_text]))
    command = shlex.join(["python3", "tests/bench", *sys.argv[1:]])
    notes.append(f"{time.strftime('%Y-%m-%d')}: {command}")
    return notes


def on_signal(number: int, frame: FrameType | None) -> NoReturn:
    """Raise an exception, so that the processes of the step are ended."""
    if number == signal.SIGALRM:
        raise RelayError(f"not done after {STEP_SECONDS} s")
    raise BenchError("ended by a signal")


def run(options: argparse.Namespace) -> int:
    """Measure and print the report. Return the exit code, or raise BenchError."""
    workloads = [
        one
        for one in WORKLOADS
        if (one.name in options.only if options.only else one.is_quick or not options.quick)
    ]
    scale, rounds = choose_scale(options)
    steps = list(plan(workloads, options.comparators, rounds))
    if options.list:
        print(*steps, sep="\n")
        return 0
    relays.BUILD.mkdir(parents=True, exist_ok=True)
    bars = [bar for bar in table.BARS if bar.concerns([step.comparator for step in steps])]
    makers = relays.makers(options.against)
    missing = find_missing(steps, makers)
    for name, reason in missing.items():
        report_progress(f"{name} is not available: {reason}")
    if missing.keys() & {"ours", "ours-no-limits", "before"} or (missing and REQUIRED):
        raise BenchError("a part that the run needs is not available")
    steps = [one for one in steps if not {one.workload.name, one.comparator} & missing.keys()]
    network_text = enter_network(options.as_it_is, options.sources)
    report_progress(network_text)
    done = Run(makers, scale)
    done.measure_all(steps)
    if not options.quick and (names := done.inconclusive()):
        report_progress(f"inconclusive so far, repeated once: {', '.join(names)}")
        done.measure_all([step for step in steps if step.workload.name in names])
    values = table.medians(done.samples)
    verdicts = table.judge(bars, values, options.quick)
    comparisons = table.compare(done.samples, options.quick)
    notes = make_notes(options, missing, network_text, done)
    print(table.report(values, verdicts, notes, comparisons), end="")
    if options.readme:
        try:
            publish(options.readme, MARKS, table.report(values, [], notes))
        except ValueError as error:
            raise BenchError(str(error)) from None
    return table.exit_code(verdicts, comparisons)


def main() -> int:
    """Run the program and return its exit code."""
    options = parse_arguments()
    _, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard_limit, hard_limit))
    os.sched_setaffinity(0, {relays.LOAD_CORE})
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, on_signal)
    try:
        return run(options)
    except (BenchError, KeyboardInterrupt) as error:
        report_progress(f"bench: {error or 'interrupted'}")
        return 1


sys.exit(main())
