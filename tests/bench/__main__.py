"""Compares relays: what they do with a second of CPU, how long they take, how much they hold.

Each row is a kind of work (works.py), which is given to each comparator (relays.py) in turn, and
that again for each round, so that a machine whose speed changes does so for all. What counts is
the median of the rounds. The relay is alone on one core; all that generates load (load.py) is on
another. The tables (table.py) go to stdout, progress to stderr.

The exit code is 1 if our relay misses a bar, or if anything went wrong. Of what cannot be had
there is a line; with RELAY_BENCH_REQUIRED=1 it is an error too.
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
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple, NoReturn

import network
import relays
import table
from load import LoadError
from readme import publish
from relays import COMPARATORS, RelayError, Unavailable
from table import Quantity
from works import FULL, QUICK, WORKS, Measured, Scale, Stage, Work

ROUNDS = 5
STEP_SECONDS = 300  # for one comparator at one work in one round; the longest needs a third
DISTURBED_PERCENT = 20  # of the machine for others; ksoftirqd alone may be 15
MARKS = ("<!-- bench -->", "<!-- end of bench -->")  # in README.md
REQUIRED = os.environ.get("RELAY_BENCH_REQUIRED") == "1"


class BenchError(Exception):
    """The run is over, with this reason."""


class Step(NamedTuple):
    """One comparator at one work in one round."""

    work: Work
    comparator: str
    round: int
    rounds: int

    def __str__(self) -> str:
        return f"{self.work.name} {self.round}/{self.rounds} {self.comparator}"


class Machine(NamedTuple):
    """What this machine has done up to a moment."""

    at: float  # monotonic seconds
    others_seconds: float  # of CPU, which neither we used nor what we have started

    @classmethod
    def now(cls) -> Machine:
        """Look: proc(5). What we have started counts as ours once it has ended.

        What counts as others': the kernel's own threads (some of the network's work is done in
        ksoftirqd), and what other virtual machines took from us.
        """
        with open("/proc/stat") as lines:
            user, nice, system, _, _, irq, softirq, steal = lines.readline().split()[1:9]
        ticks = sum(map(int, (user, nice, system, irq, softirq, steal)))
        return cls(time.monotonic(), ticks / relays.TICKS_PER_SECOND - sum(os.times()[:4]))

    def others_percent(self, since: Machine) -> float:
        """Of all cores. The kernel takes samples of that, so a few percent mean nothing."""
        available = (self.at - since.at) * (os.cpu_count() or 1)
        return max(0.0, (self.others_seconds - since.others_seconds) / available * 100)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    rows = "\n".join(f"  {work.name:<13} {work.about}" for work in WORKS)
    parser = argparse.ArgumentParser(
        prog="python3 tests/bench",
        description="Compare relays; see the head of tests/bench/__main__.py.",
        epilog=f"rows:\n{rows}\n\ncomparators:\n  {', '.join(COMPARATORS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="one short round, judged less strictly"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help=f"how many rounds (default: {ROUNDS}; quick: 1)"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="ROW",
        choices=[work.name for work in WORKS],
        help="only this row; may be given several times",
    )
    parser.add_argument(
        "--comparators",
        action="extend",
        nargs="+",
        metavar="NAME",
        choices=list(COMPARATORS),
        help="only these; may be given several times",
    )
    parser.add_argument(
        "--as-it-is",
        action="store_true",
        help="in the machine's network, with its congestion control (default: in a loopback of our"
        f" own, with {network.CONGESTION_CONTROL}, if we may)",
    )
    parser.add_argument(
        "--readme",
        type=Path,
        metavar="FILE",
        help=f"put the tables there too, between the lines {MARKS[0]} and {MARKS[1]}",
    )
    return parser.parse_args()


def say(text: str) -> None:
    """Tell of progress."""
    print(text, file=sys.stderr, flush=True)


def plan(works: Sequence[Work], comparators: Sequence[str] | None, rounds: int) -> Iterator[Step]:
    """All steps, in their order."""
    for work in works:
        of_work = min(rounds, work.most_rounds)
        for number in range(1, of_work + 1):
            for name in work.comparators:
                if not comparators or name in comparators:
                    yield Step(work, name, number, of_work)


def find_missing(steps: Sequence[Step]) -> dict[str, str]:
    """The works and comparators that cannot be had here, with the reason."""
    missing = {}
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    for work in dict.fromkeys(step.work for step in steps):
        if work.open_files > limit:
            missing[work.name] = f"ulimit -Hn is {limit:,}, and it needs {work.open_files:,}"
    for name in dict.fromkeys(step.comparator for step in steps):
        try:
            COMPARATORS[name](relays.BUILD, None)
        except Unavailable as error:
            missing[name] = str(error)
    return missing


def take(step: Step, scale: Scale) -> Measured:
    """Measure. Raises BenchError."""
    signal.alarm(STEP_SECONDS)
    try:
        with tempfile.TemporaryDirectory(prefix="step-", dir=relays.BUILD) as folder:
            return step.work.measure(Stage(COMPARATORS[step.comparator], Path(folder)), scale)
    except (LoadError, RelayError, OSError, sqlite3.Error) as error:
        raise BenchError(f"{step}: {error}") from error
    finally:
        signal.alarm(0)


def take_all(steps: Sequence[Step], scale: Scale) -> tuple[dict[Quantity, list[float]], int]:
    """Measure, one after the other: what came of each round. Raises BenchError.

    Gives also how many steps were disturbed by what else runs on the machine.
    """
    samples: dict[Quantity, list[float]] = {}
    disturbed = 0
    for step in steps:
        before = Machine.now()
        measured = take(step, scale)
        after = Machine.now()
        found = ", ".join(f"{metric} {table.number(value)}" for metric, value in measured.items())
        others_percent = after.others_percent(before)
        say(f"{step}: {after.at - before.at:.1f} s, others {others_percent:.0f} %; {found}")
        disturbed += others_percent > DISTURBED_PERCENT
        for metric, value in measured.items():
            samples.setdefault(Quantity(step.work.name, step.comparator, metric), []).append(value)
    return samples, disturbed


def hardware() -> str:
    """What this was measured on."""
    with open("/proc/cpuinfo") as lines:
        models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    model = models[0] if models else platform.machine()
    return f"{model}, {os.cpu_count()} cores, Linux {platform.release()}"


def enter_network(as_it_is: bool) -> str:
    """Go where all is measured; give what there is to say about that."""
    machines_own = network.congestion_control()
    why = "as it is"
    if not as_it_is:
        try:
            network.enter_our_own()
            why = f"in a network of our own (the machine's is {machines_own})"
        except network.NotPermitted as error:
            why = f"as the machine has it ({error})"
    return f"TCP with {network.congestion_control()}, {why}"


def make_notes(
    options: argparse.Namespace, missing: dict[str, str], where: str, disturbed: int, steps: int
) -> list[str]:
    """What has to be known about the tables. `disturbed`: so many of the steps were."""
    notes = []
    if options.quick:
        notes.append(
            "One short round: a bar fails only where it is missed by a factor of"
            f" {table.QUICK_SLACK}, but those about memory as always."
        )
    if relays.RELAY_CORE == relays.LOAD_CORE:
        notes.append("There is one core only, which the relay shares with what generates load.")
    notes += [f"{name} cannot be had: {reason}." for name, reason in missing.items()]
    if disturbed:
        notes.append(
            f"Others used more than {DISTURBED_PERCENT} % of the machine's CPU in {disturbed} of"
            f" {steps} measurements."
        )
    notes.append("; ".join([hardware(), *relays.versions(), where]))
    command = shlex.join(["python3", "tests/bench", *sys.argv[1:]])
    notes.append(f"{time.strftime('%Y-%m-%d')}: {command}")
    return notes


def give_up(number: int, frame: FrameType | None) -> NoReturn:
    """A signal: the step takes too long, or somebody wants us to end. What we started, ends."""
    if number == signal.SIGALRM:
        raise RelayError(f"not done after {STEP_SECONDS} s")
    raise BenchError("ended by a signal")


def run(options: argparse.Namespace) -> int:
    """Measure, and print: give the exit code. Raises BenchError."""
    works = [work for work in WORKS if not options.only or work.name in options.only]
    rounds = options.rounds or (1 if options.quick else ROUNDS)
    steps = list(plan(works, options.comparators, rounds))
    missing = find_missing(steps)
    for name, reason in missing.items():
        say(f"{name} cannot be had: {reason}")
    if "ours" in missing or (missing and REQUIRED):
        raise BenchError("without that there is nothing to tell")
    steps = [one for one in steps if not {one.work.name, one.comparator} & missing.keys()]
    where = enter_network(options.as_it_is)
    say(where)
    samples, disturbed = take_all(steps, QUICK if options.quick else FULL)
    values = table.medians(samples)
    verdicts = table.judge(table.BARS, values, options.quick)
    notes = make_notes(options, missing, where, disturbed, len(steps))
    print(table.report(values, verdicts, notes), end="")
    if options.readme:
        try:
            publish(options.readme, MARKS, table.report(values, [], notes))
        except ValueError as error:
            raise BenchError(str(error)) from None
    return table.exit_code(verdicts)


def main() -> int:
    """Run the program: give its exit code."""
    options = parse_arguments()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    os.sched_setaffinity(0, {relays.LOAD_CORE})
    relays.BUILD.mkdir(parents=True, exist_ok=True)
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, give_up)
    try:
        return run(options)
    except (BenchError, KeyboardInterrupt) as error:
        say(f"bench: {error or 'interrupted'}")
        return 1


sys.exit(main())
