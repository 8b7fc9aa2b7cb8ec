"""Fuzz the parsers guided by coverage, with atheris: `make fuzz-guided`.

Each target runs in a process of its own for a given time. It starts from the test vectors of the
other tests and from the corpus of earlier runs, in build/fuzz/corpus. An input that fails is
printed, and is saved in build/fuzz/failed. Python needs atheris and pytest.

    python tests/fuzz                              all targets
    python tests/fuzz --seconds 600 frames http    some targets, for longer
    python tests/fuzz --repeat FILE frames         one input again, without atheris
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from targets import Target

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BUILD = ROOT / "build" / "fuzz"
# The names in TARGETS. An import of the targets imports the relay, which atheris must do.
NAMES = ("handshake", "endpoint", "proxy", "forwarded", "http", "frames", "client", "size")
INPUT_SECONDS = 30  # the limit for one input
MEMORY_MB = 1024  # the limit for a process
CORPUS_INPUTS = 2000  # the limit for the corpus of a target: its inputs are executed first
STARTUP_SECONDS = 120  # the limit for the imports, the seeds and the corpus
PRINTED_BYTES = 4096  # the limit for a printed input, and for a log without an exception
# Lines of libFuzzer. `cov` is a number of code blocks or edges.
COVERAGE = re.compile(r"#(\d+)\s+DONE\s+cov: (\d+) ft: (\d+) corp: (\d+)/")
DURATION = re.compile(r"Done \d+ runs in (\d+) second")


def parse_options() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="tests/fuzz", description=__doc__.split("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=int, default=110, help="for each target (110)")
    parser.add_argument("--jobs", type=int, default=1, help="targets at the same time (1)")
    parser.add_argument("--repeat", type=Path, metavar="FILE", help="check one input and stop")
    parser.add_argument("--in-this-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.targets = list(dict.fromkeys(options.targets or NAMES))
    if not set(options.targets) <= set(NAMES):
        parser.error(f"the targets are {', '.join(NAMES)}")
    if options.seconds < 1 or options.jobs < 1:
        parser.error("--seconds and --jobs are 1 or more")
    if (options.repeat or options.in_this_process) and len(options.targets) != 1:
        parser.error("name one target")
    return options


def import_target(name: str) -> Target:
    """Import the targets, which import the relay. Return one of them."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(HERE)]
    from targets import TARGETS

    assert list(TARGETS) == list(NAMES)
    return TARGETS[name]


# One target in this process.


def fuzz(name: str, seconds: int) -> NoReturn:
    """Fuzz a target. libFuzzer ends the process: with status 0 after the time, else another."""
    import atheris

    with atheris.instrument_imports(include=["transit_relay", "ws_frames", "readings", "streams"]):
        target = import_target(name)

    def check(data: bytes) -> None:
        target.run(data)

    seeds = fresh_folder(BUILD / "seeds" / name)
    reached = set()
    for seed in target.seeds():
        path = seeds / hashlib.sha256(seed).hexdigest()
        path.write_bytes(seed)
        try:
            reached.add(target.run(seed))
        except Exception:
            failed = BUILD / "failed" / f"{name}-seed-{path.name}"
            failed.write_bytes(seed)
            # libFuzzer prints such a line for its own inputs. failure_text finds both.
            print(f"Test unit written to {failed}", file=sys.stderr)
            raise
    if reached != target.outcomes:
        raise SystemExit(f"no seed reaches these outcomes: {sorted(target.outcomes - reached)}")
    corpus = BUILD / "corpus" / name
    corpus.mkdir(parents=True, exist_ok=True)
    bound(corpus)
    dictionary = BUILD / f"{name}.dictionary"
    dictionary.write_text("".join(f'"{quoted(word)}"\n' for word in target.keywords))
    arguments = [
        f"-max_total_time={seconds}",
        f"-timeout={INPUT_SECONDS}",
        f"-rss_limit_mb={MEMORY_MB}",
        f"-max_len={target.longest}",
        "-use_value_profile=1",
        f"-dict={dictionary}",
        f"-artifact_prefix={BUILD / 'failed'}/{name}-",
    ]
    atheris.Setup([sys.argv[0], *arguments, str(corpus), str(seeds)], check)
    atheris.Fuzz()
    raise AssertionError("libFuzzer has returned")


def bound(corpus: Path) -> None:
    """Remove the oldest inputs of a corpus that has more than CORPUS_INPUTS."""
    inputs = sorted(corpus.iterdir(), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in inputs[CORPUS_INPUTS:]:
        path.unlink()


def fresh_folder(path: Path) -> Path:
    """Make a folder, or remove the files in it."""
    path.mkdir(parents=True, exist_ok=True)
    for old in path.iterdir():
        old.unlink()
    return path


def quoted(word: bytes) -> str:
    """Return a keyword in the syntax of a dictionary of libFuzzer."""
    return "".join(f"\\x{byte:02x}" for byte in word)


# All targets.


def run_target(name: str, seconds: int) -> bool:
    """Run a target in a process. Print its numbers, or its failure. Return whether it passed."""
    log = BUILD / f"{name}.log"
    command = [sys.executable, str(HERE), "--in-this-process", f"--seconds={seconds}", name]
    began = time.monotonic()
    try:
        with log.open("wb") as file:
            status: int | str = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=seconds + INPUT_SECONDS + STARTUP_SECONDS,
                check=False,
            ).returncode
    except subprocess.TimeoutExpired:
        status = "none: it took too long"
    taken = time.monotonic() - began
    text = log.read_text("utf-8", "backslashreplace")
    done, duration = COVERAGE.search(text), DURATION.search(text)
    if status == 0 and done and duration:
        runs, coverage, features, inputs = map(int, done.groups())
        per_second = runs / max(1, int(duration[1]))
        print(
            f"{name:10} ok, {runs:,} inputs, {per_second:,.0f} per second; coverage {coverage},"
            f" {features} features, a corpus of {inputs}; {taken:.0f} s in all",
            flush=True,
        )
        return True
    print(f"{name:10} FAILED, exit status {status}\n{failure_text(name, text)}", flush=True)
    return False


def failure_text(name: str, text: str) -> str:
    """Return the end of a log from the exception on, and the input that failed."""
    marks = ("=== Uncaught", "Traceback (most", "ERROR: libFuzzer")
    starts = [text.index(mark) for mark in marks if mark in text]
    lines = text[min(starts) :] if starts else text[-PRINTED_BYTES:]
    for file in re.findall("Test unit written to (.*)", text):
        data = Path(file).read_bytes()
        more = f" and {len(data) - PRINTED_BYTES} bytes more" if len(data) > PRINTED_BYTES else ""
        lines += f"\ninput: {data[:PRINTED_BYTES]!r}{more}\nsaved: {file}"
        lines += f"\nagain: {sys.executable} tests/fuzz --repeat {os.path.relpath(file)} {name}"
    return lines


def main() -> int:
    """Return the exit status: 1 if a target failed."""
    options = parse_options()
    first = options.targets[0]
    if options.repeat:
        print(import_target(first).run(options.repeat.read_bytes()))
        return 0
    try:
        import atheris  # noqa: F401
        import pytest  # noqa: F401
    except ImportError as error:
        print(f"tests/fuzz: {error}; `make fuzz-guided` installs what it needs", file=sys.stderr)
        return 2
    (BUILD / "failed").mkdir(parents=True, exist_ok=True)
    if options.in_this_process:
        fuzz(first, options.seconds)
    with (BUILD / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"tests/fuzz: another run uses {os.path.relpath(BUILD)}", file=sys.stderr)
            return 2
        with ThreadPoolExecutor(options.jobs) as pool:
            passed = list(pool.map(lambda name: run_target(name, options.seconds), options.targets))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
