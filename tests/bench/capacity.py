"""Compute how many cores, relays and machines a service needs, from docs/performance.md.

    python3 tests/bench/capacity.py --transfers-per-day 300000 --median-size 10MB

One relay serves all clients if one core is enough. If one core is enough without the frames of
WebSocket clients, gateways on the same machine take these clients, and connect to the one relay.
Otherwise each machine runs an HAProxy, relays and gateways. The gateways connect to the HAProxy of
their machine, which chooses the relay of a token among those of all machines. So most bytes cross
the network between two machines on their way to the relay and on their way back.

The CPU and the memory of a relay are those that the bench measured. The CPU of HAProxy and of
gateways is a multiple of that of a relay alone. The bench gives both the same work in the same run,
so the multiple holds on other machines too. The exception is the CPU that a gateway needs for each
client: there the gateway has pairs of WebSocket clients, and the relay alone has pairs of TCP
clients. The memory of a gateway is that of a relay with twice the connections.

Not counted: HAProxy's memory, the kernel's socket buffers, and what a pairing of WebSocket clients
costs more than one of TCP clients at a relay without gateways.

GB are 10^9 bytes. All rates are those of the busiest hour.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, NoReturn

from readme import publish
from table import GB, KB, MB, markdown, number

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.append(str(ROOT))

from transit_relay import (  # noqa: E402  (it is in ROOT)
    MAX_PIPES,
    RESERVED_FDS,
    Limits,
    parse_rate,
    parse_size,
    size_text,
)

PERFORMANCE = ROOT / "docs" / "performance.md"
BENCH_MARKS = ("<!-- bench -->", "<!-- end of bench -->")  # lines around the tables that are read
MARKS = ("<!-- capacity -->", "<!-- end of capacity -->")  # lines around the table that is written

DAY_SECONDS = 86_400
MONTH_DAYS = 30
MEAN_PER_MEDIAN = 10  # of the sizes
ETHERNET_BYTES_PER_BYTE = 1538 / 1448  # of a full frame and its gap, for each byte of payload
HAPROXY_DESCRIPTORS = {
    "waiting": 2,  # sockets
    "pair": 4 + 4,  # 4 sockets, and 2 pipes with 2 descriptors each
}
GATEWAY_DESCRIPTORS = 2  # sockets for each client
MAX_OPEN_FILES = 524_288  # of a process: LimitNOFILE in the unit
USABLE_DESCRIPTORS = MAX_OPEN_FILES - RESERVED_FDS - 2 * MAX_PIPES  # of a relay, for connections
MAX_MACHINES = 10_000


class CapacityError(Exception):
    """The answer cannot be computed; the text is the reason."""


class Demand(NamedTuple):
    """What clients do."""

    transfers_per_day: float
    mean_bytes: float
    websocket_share: float  # of all clients, senders and receivers alike
    peak_factor: float  # the busiest hour / the mean
    waiting_seconds: float  # from the first client of a pair to the second one, the mean
    pair_bytes_per_second: float  # of a transfer, the mean

    @property
    def transfers_per_second(self) -> float:
        """Return how many transfers begin in a second."""
        return self.transfers_per_day / DAY_SECONDS * self.peak_factor

    @property
    def bytes_per_second(self) -> float:
        """Return the payload."""
        return self.transfers_per_second * self.mean_bytes

    @property
    def pairs(self) -> float:
        """Return how many transfers run at one time (Little's law)."""
        return self.bytes_per_second / self.pair_bytes_per_second

    @property
    def waiting(self) -> float:
        """Return how many clients wait at one time (Little's law)."""
        return self.transfers_per_second * self.waiting_seconds


class Machine(NamedTuple):
    """A machine, and how much of it may be used."""

    cores: int
    memory_bytes: int
    network_bytes_per_second: int  # in each direction
    max_load: float  # of each resource, in the busiest hour


class Costs(NamedTuple):
    """What the programs need. The fields with `seconds` are CPU.

    The keys of the mappings are whether the sender and the receiver use WebSocket.
    """

    seconds_per_pairing: float  # of a relay, for both clients
    seconds_per_gb: Mapping[tuple[bool, bool], float]  # of a relay
    haproxy_seconds_per_pairing: float  # of HAProxy, for both clients
    haproxy_seconds_per_gb: float  # of HAProxy, for both clients
    gateway_seconds_per_client: float  # of a gateway, for each WebSocket client
    gateway_seconds_per_gb: Mapping[tuple[bool, bool], float]  # of all gateways of a pair
    start_bytes: float
    waiting_bytes: float
    paired_bytes: float  # for each of the two clients


def mean_seconds(
    seconds_per_gb: Mapping[tuple[bool, bool], float], websocket_share: float
) -> float:
    """Return the mean of the four kinds of pairs."""
    share = {True: websocket_share, False: 1 - websocket_share}
    return sum(
        share[sender] * share[receiver] * seconds
        for (sender, receiver), seconds in seconds_per_gb.items()
    )


class Plan(NamedTuple):
    """What a service needs. The loads are parts of what there is, in the busiest hour."""

    relays: int
    gateways: int
    has_haproxy: bool
    cores: Mapping[str, float]  # busy ones, by kind of process
    machines: int
    loads: Mapping[str, float]  # by resource, of the busiest process or of each machine
    memory_bytes: float  # of all relays and gateways
    descriptors: Mapping[str, float]  # of all processes of a kind
    stick_entries: float  # of a table with `expire 1d`, which `peers` share

    @property
    def limiting(self) -> str:
        """Return the resource that is used most."""
        return max(self.loads, key=self.loads.__getitem__)


class Answer(NamedTuple):
    """The inputs and the plan."""

    demand: Demand
    machine: Machine
    plan: Plan


class Cell(NamedTuple):
    """The numbers in a cell of the bench's tables."""

    number: float
    in_brackets: float  # 0: none


def read_bench(document: Path) -> dict[str, dict[str, Cell]]:
    """Return the cells of the bench's tables that begin with a number, by row and column.

    Raise CapacityError if there is no such table.
    """
    _, _, rest = document.read_text(encoding="utf-8").partition(f"\n{BENCH_MARKS[0]}\n")
    text, end, _ = rest.partition(f"\n{BENCH_MARKS[1]}\n")
    if not end:
        raise CapacityError(f"{document} has no lines {BENCH_MARKS[0]} and {BENCH_MARKS[1]}")
    found: dict[str, dict[str, Cell]] = {}
    for table in re.findall(r"(?m)(?:^\|.*\n?)+", text):
        head, _, *rows = (
            [cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()
        )
        for label, *cells in rows:
            numbers = {}
            for column, cell in zip(head[1:], cells):
                match = re.match(r"([\d.,]+)(?: \(([\d.,]+)\))?", cell)
                if match:
                    values = (float((text or "0").replace(",", "")) for text in match.groups())
                    numbers[column] = Cell(*values)
            found[label] = numbers
    return found


def read_costs(document: Path) -> Costs:
    """Return the costs by the bench's tables. Raise CapacityError if one is missing."""
    bench = read_bench(document)

    def cell(row: str, column: str) -> Cell:
        """Return two numbers.

        In the table with numbers of pairs as columns, take the last column.
        """
        columns = bench.get(row, {})
        counts = [name for name in columns if name.replace(",", "").isdigit()]
        found = columns.get(counts[-1] if counts else column)
        if not found or not found.number:
            raise CapacityError(f"{document} has no number of {column!r} in the row {row!r}")
        return found

    def ours(row: str) -> float:
        return cell(row, "ours").number

    def front_rate(row: str, column: str) -> float:
        """Return what HAProxy or the gateway does in a CPU-second of its own."""
        found = cell(row, column).in_brackets
        if not found:
            raise CapacityError(f"{document} has no brackets of {column!r} in the row {row!r}")
        return found

    def multiple(row: str, column: str) -> float:
        """Return the CPU of HAProxy or the gateway / that of a relay alone, for the same work."""
        return ours(row) / front_rate(row, column)

    pairing = 1 / ours("pairs, with a database")
    relay = {
        (False, False): 1 / ours("GB"),
        (False, True): 1 / ours("TCP to WebSocket, 1 pair"),
        (True, False): 1 / ours("WebSocket to TCP, 1 pair"),
        (True, True): 1 / ours("WebSocket, 1 pair"),
    }
    haproxy, gateway = "HAProxy, 2 relays", "gateway, 1 relay"
    to_websocket = relay[False, True] * multiple("GB from TCP to WebSocket", gateway)
    from_websocket = relay[True, False] * multiple("GB from WebSocket to TCP", gateway)
    two_websockets = front_rate("pairs of WebSocket clients", gateway)
    return Costs(
        seconds_per_pairing=pairing,
        seconds_per_gb=relay,
        haproxy_seconds_per_pairing=pairing * multiple("pairs of TCP clients", haproxy),
        haproxy_seconds_per_gb=relay[False, False]
        * multiple("GB between TCP clients, 512 pairs", haproxy),
        gateway_seconds_per_client=pairing * ours("pairs of TCP clients") / two_websockets / 2,
        gateway_seconds_per_gb={
            (False, True): to_websocket,
            (True, False): from_websocket,
            (True, True): from_websocket + to_websocket,  # of two clients, at two gateways or one
        },
        start_bytes=ours("memory at the start, MB") * MB,
        waiting_bytes=ours("memory for each waiting client, KB") * KB,
        paired_bytes=ours("memory for each paired, idle client, KB") * KB,
    )


def count_processes(cores: float, descriptors: float, max_load: float) -> int:
    """Return how many relays or gateways are needed for so much work."""
    return math.ceil(max(cores, descriptors / USABLE_DESCRIPTORS) / max_load)


def plan_with(demand: Demand, costs: Costs, machine: Machine, machines: int) -> Plan:
    """Return the plan for so many machines, also if they are too few."""
    gb_per_second = demand.bytes_per_second / GB
    websockets = demand.websocket_share
    pairing_cores = demand.transfers_per_second * costs.seconds_per_pairing
    clients = 2 * demand.pairs + demand.waiting
    cores = {
        "relays": pairing_cores + gb_per_second * mean_seconds(costs.seconds_per_gb, websockets),
        "HAProxy": 0.0,
        "gateways": 0.0,
    }
    descriptors = {"relays": clients, "HAProxy": 0.0, "gateways": 0.0}
    relays, gateways = count_processes(cores["relays"], clients, machine.max_load), 0
    is_alone = machines == relays == 1
    if not is_alone:
        cores["relays"] = pairing_cores + gb_per_second * costs.seconds_per_gb[False, False]
        relays = count_processes(cores["relays"], clients, machine.max_load)
        relays = max(relays, machines)
        cores["gateways"] = (
            2 * demand.transfers_per_second * websockets * costs.gateway_seconds_per_client
            + gb_per_second * mean_seconds(costs.gateway_seconds_per_gb, websockets)
        )
        descriptors["gateways"] = GATEWAY_DESCRIPTORS * websockets * clients
        gateways = count_processes(cores["gateways"], descriptors["gateways"], machine.max_load)
        gateways = max(gateways, machines) if websockets else 0
    has_haproxy = relays > 1
    if has_haproxy:
        cores["HAProxy"] = (
            demand.transfers_per_second * costs.haproxy_seconds_per_pairing
            + gb_per_second * costs.haproxy_seconds_per_gb
        )
        descriptors["HAProxy"] = (
            demand.pairs * HAPROXY_DESCRIPTORS["pair"]
            + demand.waiting * HAPROXY_DESCRIPTORS["waiting"]
        )
    # A gateway has two connections for each of its clients.
    connected = 1 + (2 * websockets if gateways else 0)
    memory_bytes = (
        (relays + gateways) * (costs.start_bytes + Limits().max_memory)
        + demand.waiting * connected * costs.waiting_bytes
        + 2 * demand.pairs * connected * costs.paired_bytes
    )
    # A byte enters HAProxy's machine from the client, then the relay's machine, then HAProxy's
    # machine again. With M machines, one token in M has its relay on HAProxy's own machine.
    # Gateways add nothing: they are on HAProxy's machine, or on that of the one relay.
    crossings = 1 + 2 * (1 - 1 / machines)
    wire = demand.bytes_per_second * ETHERNET_BYTES_PER_BYTE * crossings
    loads = {
        "CPU": sum(cores.values()) / (machines * machine.cores),
        "network": wire / (machines * machine.network_bytes_per_second),
        "memory": memory_bytes / (machines * machine.memory_bytes),
        "descriptors": max(
            clients / relays / USABLE_DESCRIPTORS,
            descriptors["gateways"] / max(gateways, 1) / USABLE_DESCRIPTORS,
            descriptors["HAProxy"] / machines / MAX_OPEN_FILES,
        ),
    }
    if not has_haproxy:  # the one core that the relay can use, or the machine
        loads["CPU"] = max(loads["CPU"], cores["relays"])
    return Plan(
        relays,
        gateways,
        has_haproxy,
        cores,
        machines,
        loads,
        memory_bytes,
        descriptors,
        has_haproxy * demand.transfers_per_day,
    )


def make_plan(demand: Demand, costs: Costs, machine: Machine) -> Plan:
    """Return the plan with the fewest machines. Raise CapacityError if MAX_MACHINES are too few."""
    for machines in range(1, MAX_MACHINES + 1):
        plan = plan_with(demand, costs, machine, machines)
        if max(plan.loads.values()) <= machine.max_load:
            return plan
    raise CapacityError(f"{MAX_MACHINES:,} such machines are not enough: {plan.limiting}")


# The text, the JSON and the table of the documents.


def gbit(bytes_per_second: float) -> str:
    """Return a rate in Gbit/s, as text."""
    return f"{number(bytes_per_second * 8 / 1e9)} Gbit/s"


def describe_machine(machine: Machine) -> str:
    """Return what the machine has."""
    return (
        f"{machine.cores} cores, {size_text(machine.memory_bytes)},"
        f" {machine.network_bytes_per_second * 8 / 1e9:g} Gbit/s"
    )


def describe(found: Answer) -> list[tuple[str, str]]:
    """Return the rows of a report: a label, and what there is or what is needed."""
    demand, machine, plan = found
    month_bytes = demand.transfers_per_day * MONTH_DAYS * demand.mean_bytes
    rows = [
        ("in 30 days", size_text(round(month_bytes))),
        ("transfers a day", f"{demand.transfers_per_day:,.0f}"),
        ("in the busiest hour: transfers per second", number(demand.transfers_per_second)),
        ("payload of these transfers", gbit(demand.bytes_per_second)),
        ("transfers at one time", number(demand.pairs)),
        ("clients that wait at one time", number(demand.waiting)),
        ("relays, of one core each", f"{plan.relays:,}"),
        ("gateways, of one core each", f"{plan.gateways:,}"),
        ("HAProxies", f"{plan.machines * plan.has_haproxy:,}"),
        *((f"busy cores: {name}", number(cores)) for name, cores in plan.cores.items()),
        ("memory of relays and gateways", size_text(round(plan.memory_bytes))),
        *(
            (f"descriptors: {name}", f"{math.ceil(count):,}")
            for name, count in plan.descriptors.items()
        ),
        ("stick table with `expire 1d`, entries", f"{math.ceil(plan.stick_entries):,}"),
        ("a machine", describe_machine(machine)),
        ("machines", f"{plan.machines:,}"),
    ]
    rows += [(f"load: {name}", f"{number(100 * load)} %") for name, load in plan.loads.items()]
    return [*rows, ("limiting resource", plan.limiting)]


def as_json(found: Answer) -> str:
    """Return the inputs and the plan as JSON, in bytes, seconds and parts of 1."""
    return json.dumps(
        {
            "demand": found.demand._asdict(),
            "machine": found.machine._asdict(),
            "plan": {**found.plan._asdict(), "limiting": found.plan.limiting},
        },
        indent=2,
    )


# The command line.

# The columns of the table in the documents. With a mean size of 100 MB, the transfers of 30 days
# have as many bytes as the title says.
EXAMPLES = {
    "10 TB a month": "--transfers-per-day=3333 --machine-cores=2 --machine-memory=4GB"
    " --machine-network=1Gbit",
    "1 PB a month": "--transfers-per-day=333333 --machine-cores=8 --machine-memory=32GB"
    " --machine-network=25Gbit",
    "100 PB a month": "--transfers-per-day=33333333 --machine-cores=32 --machine-memory=128GB"
    " --machine-network=100Gbit",
}
EXAMPLE_SIZE = "--median-size=10MB"  # so the mean is 100 MB


class Parser(argparse.ArgumentParser):
    """Reports an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"capacity.py: {message}\n")


def number_with(is_allowed: Callable[[float], bool], condition: str) -> Callable[[str], float]:
    """Return a parser of finite numbers. `condition`: which ones are allowed, for the error."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and is_allowed(value)):
            raise argparse.ArgumentTypeError(f"{text!r} is not a finite number {condition}")
        return value

    return parse


positive = number_with(lambda value: value > 0, "above 0")
factor = number_with(lambda value: value >= 1, "of at least 1")
share = number_with(lambda value: 0 <= value <= 1, "from 0 to 1")
positive_share = number_with(lambda value: 0 < value <= 1, "above 0, and at most 1")


def not_zero(parse: Callable[[str], int]) -> Callable[[str], int]:
    """Return a parser that refuses 0. `parse` returns the value."""

    def parse_positive(text: str) -> int:
        value = parse(text)
        if not value:
            raise argparse.ArgumentTypeError("must not be 0")
        return value

    return parse_positive


positive_size = not_zero(parse_size)  # bytes
positive_rate = not_zero(parse_rate)  # bytes per second


def make_parser() -> Parser:
    """Return the parser of the command line."""
    parser = Parser(
        prog="capacity.py",
        description="Compute what a service of relays needs, from docs/performance.md.",
        epilog="SIZE: 500kB, 10MB, 2GiB. RATE, per second: 2MB, 20Mbit, 10Gbit.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    clients = parser.add_argument_group("clients")
    clients.add_argument(
        "--transfers-per-day",
        type=positive,
        metavar="N",
        default=argparse.SUPPRESS,
        help="transfers that use the relays, the mean",
    )
    clients.add_argument(
        "--median-size",
        type=positive_size,
        metavar="SIZE",
        default=argparse.SUPPRESS,
        help="half of the transfers are smaller",
    )
    clients.add_argument(
        "--mean-size",
        type=positive_size,
        metavar="SIZE",
        default=argparse.SUPPRESS,
        help=f"the bytes of all transfers / their number (default: {MEAN_PER_MEDIAN} times the"
        " median)",
    )
    clients.add_argument(
        "--websocket-share",
        type=share,
        metavar="PART",
        default=0.1,
        help="part of the clients that use WebSocket, 0 to 1",
    )
    clients.add_argument(
        "--peak-factor",
        type=factor,
        metavar="N",
        default=3.0,
        help="transfers in the busiest hour / the mean of all hours",
    )
    clients.add_argument(
        "--waiting-minutes",
        type=positive,
        metavar="MINUTES",
        default=1.0,
        help="how long the first client of a pair waits for the second one, the mean",
    )
    clients.add_argument(
        "--pair-rate",
        type=positive_rate,
        metavar="RATE",
        default="20Mbit",
        help="how fast a transfer is, the mean",
    )
    machines = parser.add_argument_group("machines")
    machines.add_argument(
        "--machine-cores",
        type=int,
        choices=range(1, 1025),
        metavar="N",
        default=8,
        help="cores of a machine, 1 to 1024",
    )
    machines.add_argument(
        "--machine-memory", type=positive_size, metavar="SIZE", default="32GB", help="its memory"
    )
    machines.add_argument(
        "--machine-network",
        type=positive_rate,
        metavar="RATE",
        default="10Gbit",
        help="of its network card, in each direction",
    )
    machines.add_argument(
        "--max-load",
        type=positive_share,
        metavar="PART",
        default=0.6,
        help="part of each resource that may be used in the busiest hour, above 0 to 1",
    )
    output = parser.add_argument_group("input and output")
    output.add_argument(
        "--performance",
        type=Path,
        metavar="FILE",
        default=PERFORMANCE,
        help="the document with the tables of the bench",
    )
    output.add_argument(
        "--json", action="store_true", help="write JSON: bytes, seconds, parts of 1"
    )
    output.add_argument(
        "--publish",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help=f"write the table of examples to FILE, between the lines {MARKS[0]} and {MARKS[1]},"
        " and print nothing",
    )
    return parser


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    """Return the options. On an error, write one line and exit."""
    parser = make_parser()
    options = parser.parse_args(arguments)
    if "publish" not in options:
        for name in ("transfers_per_day", "median_size"):
            if name not in options:
                parser.error(f"--{name.replace('_', '-')} is missing; see --help")
        if "mean_size" not in options:
            options.mean_size = options.median_size * MEAN_PER_MEDIAN
        if options.mean_size < options.median_size:
            parser.error("--mean-size is less than --median-size")
    return options


def answer(options: argparse.Namespace) -> Answer:
    """Return the answer to a command line. Raise CapacityError if there is none."""
    demand = Demand(
        options.transfers_per_day,
        options.mean_size,
        options.websocket_share,
        options.peak_factor,
        options.waiting_minutes * 60,
        options.pair_rate,
    )
    machine = Machine(
        options.machine_cores, options.machine_memory, options.machine_network, options.max_load
    )
    plan = make_plan(demand, read_costs(options.performance), machine)
    return Answer(demand, machine, plan)


def examples_table(performance: Path = PERFORMANCE) -> str:
    """Return the table of EXAMPLES for the documents."""
    columns = []
    for text in EXAMPLES.values():
        options = parse_arguments([EXAMPLE_SIZE, *text.split(), f"--performance={performance}"])
        columns.append(dict(describe(answer(options))))
    rows = [[label, *(column[label] for column in columns)] for label in columns[0]]
    return markdown(["", *EXAMPLES], rows)


def main() -> None:
    """Answer the command line."""
    options = parse_arguments(sys.argv[1:])
    try:
        if "publish" in options:
            publish(options.publish, MARKS, examples_table(options.performance) + "\n")
            return
        found = answer(options)
    except (CapacityError, OSError, ValueError) as error:
        sys.exit(f"capacity.py: {error}")
    except OverflowError:
        sys.exit("capacity.py: the numbers are too large")
    if options.json:
        print(as_json(found))
        return
    rows = describe(found)
    width = max(len(label) for label, _ in rows)
    for label, text in rows:
        print(f"{label:<{width}}  {text}")


if __name__ == "__main__":
    main()
