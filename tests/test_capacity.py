"""The capacity model: the numbers it reads, its arithmetic, and the table in docs/growing.md."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from helpers import RELAY, TIMEOUT

BENCH = RELAY.parent / "tests" / "bench"
PERFORMANCE = RELAY.parent / "docs" / "performance.md"
GROWING = RELAY.parent / "docs" / "growing.md"


def load() -> tuple[ModuleType, ModuleType]:
    """Return two modules of tests/bench. The folder is a program, not a package."""
    sys.path.insert(0, str(BENCH))
    try:
        import capacity
        import table
    finally:
        sys.path.remove(str(BENCH))
    return capacity, table


capacity, table = load()

# Numbers of a machine for which the results are easy to compute.
MEASURED = {
    ("growth", "ours", "bulk_8_gb_per_cpu_second"): 100.0,
    ("growth", "ours", "bulk_4000_gb_per_cpu_second"): 5.0,
    ("tcp-ws", "ours", "gb_per_cpu_second"): 4.0,
    ("ws-tcp", "ours", "gb_per_cpu_second"): 0.5,
    ("ws-ws", "ours", "gb_per_cpu_second"): 1.0,
    ("pairings-db", "ours", "pairings_per_cpu_second"): 10_000.0,
    ("memory", "ours", "start_bytes"): 20e6,
    ("memory", "ours", "waiting_bytes"): 1_024.0,
    ("memory", "ours", "paired_bytes"): 2_048.0,
    # The part of HAProxy or the gateway, beside a relay alone.
    ("haproxy-bulk-512", "ours", "gb_per_cpu_second"): 10.0,
    ("haproxy-bulk-512", "haproxy-2-relays", "front_gb_per_cpu_second"): 5.0,
    ("haproxy-pairings", "ours", "pairings_per_cpu_second"): 1_000.0,
    ("haproxy-pairings", "haproxy-2-relays", "front_pairings_per_cpu_second"): 500.0,
    ("gateway-tcp-ws", "ours", "gb_per_cpu_second"): 1.0,
    ("gateway-tcp-ws", "gateway-1-relay", "front_gb_per_cpu_second"): 0.5,
    ("gateway-ws-tcp", "ours", "gb_per_cpu_second"): 0.5,
    ("gateway-ws-tcp", "gateway-1-relay", "front_gb_per_cpu_second"): 0.4,
    ("gateway-pairings", "gateway-1-relay", "front_pairings_per_cpu_second"): 200.0,
}


def write_performance(folder: Path, measured: dict[tuple[str, str, str], float] = MEASURED) -> Path:
    """Write a document with the tables that the bench makes of these numbers, and of others."""
    values = {}
    for (workload, comparator, metric), value in measured.items():
        values[table.Quantity(workload, comparator, metric)] = value
        values[table.Quantity(workload, "twisted", metric)] = value / 2
        values.setdefault(
            table.Quantity(workload, comparator, metric.removeprefix("front_")), value / 3
        )
    tables = table.report(values, [], ["a note"])
    document = folder / "performance.md"
    document.write_text(f"# Text\n\n{'{}'}\n\n{tables}\n{'{}'}\n".format(*capacity.BENCH_MARKS))
    return document


@pytest.fixture
def performance(tmp_path: Path) -> Path:
    """Return a document with MEASURED."""
    return write_performance(tmp_path)


def answer(performance: Path, *arguments: str) -> capacity.Answer:
    """Return the answer to a command line."""
    options = [f"--performance={performance}", "--median-size=100MB", *arguments]
    return capacity.answer(capacity.parse_arguments(options))


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the program."""
    command = [sys.executable, BENCH / "capacity.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT)


def test_the_numbers_of_the_bench(performance: Path) -> None:
    assert capacity.read_costs(performance) == capacity.Costs(
        seconds_per_pairing=1e-4,
        seconds_per_gb={
            (False, False): 0.2,
            (False, True): 0.25,
            (True, False): 2.0,
            (True, True): 1.0,
        },
        haproxy_seconds_per_pairing=2e-4,
        haproxy_seconds_per_gb=0.4,
        gateway_seconds_per_client=2.5e-4,
        gateway_seconds_per_gb={(False, True): 0.5, (True, False): 2.5, (True, True): 3.0},
        start_bytes=20e6,
        waiting_bytes=1_024,
        paired_bytes=2_048,
    )


def test_the_documented_tables_have_all_numbers() -> None:
    for cost in capacity.read_costs(PERFORMANCE):
        assert all(value > 0 for value in (cost.values() if isinstance(cost, dict) else [cost]))


@pytest.mark.parametrize("missing", list(MEASURED)[1:], ids=lambda key: "-".join(key))
def test_a_missing_number_is_an_error(tmp_path: Path, missing: tuple[str, str, str]) -> None:
    # Without the number for 8 pairs, which would be read in place of a missing one for 4,000.
    first = next(iter(MEASURED))
    left = {key: value for key, value in MEASURED.items() if key not in (missing, first)}
    with pytest.raises(capacity.CapacityError, match=r"has no number of '.+' in the row"):
        capacity.read_costs(write_performance(tmp_path, left))


FRONT = [key for key in MEASURED if key[2].startswith("front_")]


@pytest.mark.parametrize("missing", FRONT, ids=lambda key: "-".join(key))
def test_a_missing_number_in_brackets_is_an_error(
    tmp_path: Path, missing: tuple[str, str, str]
) -> None:
    workload, comparator, metric = missing
    left = {**MEASURED, (workload, comparator, metric.removeprefix("front_")): 1.0}
    del left[missing]
    with pytest.raises(capacity.CapacityError, match=r"has no brackets of '.+' in the row"):
        capacity.read_costs(write_performance(tmp_path, left))


def test_a_mean_of_four_kinds_of_pairs(performance: Path) -> None:
    seconds = capacity.read_costs(performance).seconds_per_gb
    assert capacity.mean_seconds(seconds, 0) == 0.2
    assert capacity.mean_seconds(seconds, 1) == 1.0
    assert capacity.mean_seconds(seconds, 0.5) == pytest.approx((0.2 + 0.25 + 2.0 + 1.0) / 4)


def test_one_relay(performance: Path) -> None:
    """1 GB in each second of the busiest hour: one transfer, which takes 100 s."""
    demand, _, plan = answer(
        performance,
        "--transfers-per-day=43200",
        "--peak-factor=2",
        "--pair-rate=10MB",
        "--websocket-share=0",
        "--machine-network=20Gbit",
        "--machine-memory=10GB",
    )
    assert (demand.transfers_per_second, demand.bytes_per_second) == (1, 1e9)
    assert (demand.pairs, demand.waiting) == (100, 60)
    assert (plan.relays, plan.gateways, plan.machines, plan.has_haproxy) == (1, 0, 1, False)
    assert plan.cores == {"relays": pytest.approx(0.2 + 1e-4), "HAProxy": 0, "gateways": 0}
    assert plan.loads["CPU"] == plan.cores["relays"]
    assert plan.stick_entries == 0
    assert plan.memory_bytes == 20e6 + 256e6 + 60 * 1_024 + 200 * 2_048
    assert plan.loads["memory"] == plan.memory_bytes / 10e9
    assert plan.loads["network"] == pytest.approx(8 / 20 * 1538 / 1448)
    assert plan.descriptors == {"relays": 260, "HAProxy": 0, "gateways": 0}
    assert plan.limiting == "network"


def test_one_relay_with_gateways(performance: Path) -> None:
    """As above, but half of the clients use WebSocket: too much for one core, with all frames."""
    arguments = ["--transfers-per-day=43200", "--peak-factor=2", "--pair-rate=10MB"]
    arguments += ["--websocket-share=0.5", "--machine-network=20Gbit"]
    _, _, plan = answer(performance, *arguments)
    assert (plan.relays, plan.gateways, plan.machines, plan.has_haproxy) == (1, 3, 1, False)
    gateways = (0.5 + 2.5 + 3.0) / 4 + 2.5e-4
    assert plan.cores == {
        "relays": pytest.approx(0.2 + 1e-4),
        "HAProxy": 0,
        "gateways": pytest.approx(gateways),
    }
    assert plan.loads["CPU"] == pytest.approx((0.2 + 1e-4 + gateways) / 8)
    # 260 connections to the relay, and two for each of 130 WebSocket clients.
    assert plan.memory_bytes == 4 * (20e6 + 256e6) + 2 * 60 * 1_024 + 2 * 200 * 2_048
    assert plan.descriptors == {"relays": 260, "HAProxy": 0, "gateways": 260}
    assert plan.stick_entries == 0


def test_more_gateways_than_cores(performance: Path) -> None:
    """The machine is busier than the one relay."""
    arguments = ["--transfers-per-day=43200", "--peak-factor=2", "--machine-network=20Gbit"]
    arguments += ["--websocket-share=0.5", "--machine-cores=3"]
    _, _, plan = answer(performance, *arguments)
    assert (plan.machines, plan.has_haproxy) == (1, False)
    assert plan.loads["CPU"] == sum(plan.cores.values()) / 3 > plan.cores["relays"]


def test_several_relays(performance: Path) -> None:
    """8 GB in each second: 1.6 cores of relays, three of them, and HAProxy."""
    _, _, plan = answer(
        performance,
        "--transfers-per-day=345600",
        "--peak-factor=2",
        "--websocket-share=0",
        "--machine-network=400Gbit",
        "--machine-cores=16",
    )
    assert (plan.relays, plan.gateways, plan.machines, plan.has_haproxy) == (3, 0, 1, True)
    assert plan.cores["HAProxy"] == pytest.approx(8 * (0.4 + 2e-4))
    assert plan.cores["gateways"] == 0
    assert plan.loads["CPU"] == pytest.approx(8 * (0.2 + 1e-4 + 0.4 + 2e-4) / 16)
    assert plan.stick_entries == 345_600
    assert plan.limiting == "CPU"


@pytest.mark.parametrize("resource", ["CPU", "network", "memory", "descriptors"])
def test_there_are_as_many_machines_as_the_limiting_resource_needs(
    performance: Path, resource: str
) -> None:
    arguments = {
        "CPU": ["--machine-network=9000Gbit", "--machine-cores=2"],
        "network": [],
        "memory": ["--machine-network=9000Gbit", "--machine-cores=64", "--machine-memory=1GB"],
        "descriptors": [
            *("--machine-network=9000Gbit", "--machine-cores=999", "--machine-memory=900TB"),
            "--waiting-minutes=10000",
        ],
    }[resource]
    found = answer(performance, "--transfers-per-day=1000000", *arguments)
    demand, machine, plan = found
    assert plan.limiting == resource
    assert plan.machines > 1
    assert max(plan.loads.values()) <= machine.max_load
    costs = capacity.read_costs(performance)
    fewer = capacity.plan_with(demand, costs, machine, plan.machines - 1)
    assert fewer.loads[resource] > machine.max_load


def test_bytes_cross_the_network_between_machines(performance: Path) -> None:
    """Of two machines, half of the tokens belong to a relay of the other one."""
    demand, machine, _ = answer(performance, "--transfers-per-day=1000")
    costs = capacity.read_costs(performance)
    one, two, many = (capacity.plan_with(demand, costs, machine, count) for count in (1, 2, 10_000))
    assert two.loads["network"] * 2 == pytest.approx(2 * one.loads["network"])
    assert many.loads["network"] * 10_000 == pytest.approx(3 * one.loads["network"], rel=1e-3)


def test_each_machine_has_a_gateway_and_a_relay(performance: Path) -> None:
    demand, machine, _ = answer(performance, "--transfers-per-day=1000")
    plan = capacity.plan_with(demand, capacity.read_costs(performance), machine, 7)
    assert (plan.relays, plan.gateways, plan.has_haproxy) == (7, 7, True)
    no_websockets = demand._replace(websocket_share=0.0)
    plan = capacity.plan_with(no_websockets, capacity.read_costs(performance), machine, 7)
    assert (plan.relays, plan.gateways, plan.descriptors["gateways"]) == (7, 0, 0)


def test_the_mean_follows_from_the_median(performance: Path) -> None:
    assert answer(performance, "--transfers-per-day=1").demand.mean_bytes == 1e9
    given = answer(performance, "--transfers-per-day=1", "--mean-size=200MB")
    assert given.demand.mean_bytes == 200e6


def test_text_and_json(performance: Path) -> None:
    options = ["--transfers-per-day=9e5", "--median-size=50MB", f"--performance={performance}"]
    text, as_json = run(*options), run(*options, "--json")
    assert text.stderr == as_json.stderr == ""
    found = json.loads(as_json.stdout)
    assert found["demand"]["transfers_per_day"] == 900_000
    assert found["machine"]["memory_bytes"] == 32e9
    assert found["plan"]["cores"]["gateways"] > 0
    rows = dict(line.split("  ", 1) for line in text.stdout.splitlines())
    rows = {label: value.strip() for label, value in rows.items()}
    assert rows["machines"] == f"{found['plan']['machines']:,}"
    assert rows["limiting resource"] == found["plan"]["limiting"]
    assert rows["gateways, of one core each"] == str(found["plan"]["gateways"])
    assert rows["HAProxies"] == rows["machines"]


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        ("--median-size=1MB", 2, "--transfers-per-day is missing"),
        ("--transfers-per-day=1", 2, "--median-size is missing"),
        ("--transfers-per-day=0 --median-size=1MB", 2, "'0' is not a finite number above 0"),
        ("--transfers-per-day=nan --median-size=1MB", 2, "'nan' is not a finite number above 0"),
        ("--transfers-per-day=inf --median-size=1MB", 2, "'inf' is not a finite number above 0"),
        ("--transfers-per-day=1 --median-size=1MB --waiting-minutes=inf", 2, "not a finite number"),
        ("--transfers-per-day=1 --median-size=1MB --pair-rate=0", 2, "must not be 0"),
        ("--transfers-per-day=1 --median-size=1MB --machine-network=0", 2, "must not be 0"),
        ("--transfers-per-day=1 --median-size=1XB", 2, "'1XB' is not a number of B, kB"),
        ("--transfers-per-day=1 --median-size=0", 2, "must not be 0"),
        ("--transfers-per-day=1 --median-size=2MB --mean-size=1MB", 2, "less than --median-size"),
        ("--transfers-per-day=1 --median-size=1MB --websocket-share=2", 2, "from 0 to 1"),
        ("--transfers-per-day=1 --median-size=1MB --peak-factor=0.9995", 2, "at least 1"),
        ("--transfers-per-day=1 --median-size=1MB --performance=none.md", 1, "none.md"),
        ("--transfers-per-day=1 --median-size=1MB --performance=README.md", 1, "has no lines"),
        ("--transfers-per-day=1e12 --median-size=1GB", 1, "not enough: network"),
        ("--transfers-per-day=1e308 --median-size=1GB", 1, "the numbers are too large"),
    ],
)
def test_an_error_is_one_line(
    arguments: str, code: int, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(RELAY.parent)
    done = run(*arguments.split())
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("capacity.py: ") and done.stderr.count("\n") == 1
    assert text in done.stderr


def test_publishing_needs_marks(tmp_path: Path) -> None:
    document = tmp_path / "growing.md"
    document.write_text("text\n")
    done = run(f"--publish={document}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("capacity.py: ") and "has no lines" in done.stderr
    assert document.read_text() == "text\n"


def test_a_share_may_be_0(performance: Path) -> None:
    for text in ("0", "0.00", "0e0"):
        found = answer(performance, "--transfers-per-day=1", f"--websocket-share={text}")
        assert found.demand.websocket_share == 0


def test_the_help_has_units_and_defaults() -> None:
    text = " ".join(run("--help").stdout.split())
    for part in ("SIZE: 500kB, 10MB, 2GiB", "20Mbit", "MINUTES", "part of", "(default: 0.6)"):
        assert part in text


def test_publishing(tmp_path: Path, performance: Path) -> None:
    document = tmp_path / "growing.md"
    document.write_text("a\n\n{}\nold\n{}\n\nb\n".format(*capacity.MARKS))
    assert run(f"--publish={document}", f"--performance={performance}").stderr == ""
    examples = capacity.examples_table(performance)
    begin, end = capacity.MARKS
    assert document.read_text() == f"a\n\n{begin}\n\n{examples}\n\n{end}\n\nb\n"


def test_the_examples_are_the_sizes_that_they_name() -> None:
    for title, text in capacity.EXAMPLES.items():
        options = capacity.parse_arguments([capacity.EXAMPLE_SIZE, *text.split()])
        month_bytes = 30 * options.transfers_per_day * options.mean_size
        size, unit = title.split()[:2]
        named = float(size) * {"TB": 1e12, "PB": 1e15}[unit]
        assert math.isclose(month_bytes, named, rel_tol=1e-3)


def test_the_table_in_the_documents() -> None:
    """It is what the script computes from the documented tables of the bench."""
    begin, end = capacity.MARKS
    after = GROWING.read_text(encoding="utf-8").partition(f"\n{begin}\n")[2]
    assert after.partition(f"\n{end}\n")[0] == f"\n{capacity.examples_table()}\n"
