"""Prometheus scrapes our relay while clients use it: the metrics, the alert rules, the dashboard.

The clients and the counters that they lead to are in status_traffic.py. They run once for all
tests of this file.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, NoReturn
from urllib.parse import urlencode

import pytest
import tools
from children import TIMEOUT, Child
from status_traffic import (
    OPENMETRICS,
    POLL_SECONDS,
    SINKS,
    Answer,
    StatusRelay,
    Traffic,
    counters,
    eventually,
)
from status_traffic import sample_name as name_of

FOLDER = tools.ROOT / "packaging" / "prometheus"
CONFIGURATION = FOLDER / "prometheus.yml"
RULES = FOLDER / "transit-relay.rules.yml"
RULE_TESTS = FOLDER / "transit-relay.rules.test.yml"
DASHBOARD = json.loads((tools.ROOT / "packaging/grafana/transit-relay.json").read_text())
QUOTA_BYTES = 10**12
SCRAPES = 60  # at least; one each second
# Two requests see different values of these samples.
VOLATILE = re.compile(
    "process_(cpu_seconds_total|resident_memory_bytes|open_fds)"
    "|transit_relay_(turn_seconds_.*|connections)"
)
SELECTOR = re.compile(r"\b(?:(?:transit_relay|process)_\w+|up\b)(?:\{[^}]*\})?")
MATCHER = re.compile(r'(\w+)=~?"([^"]*)"')

Samples = dict[str, float]  # by their names, with labels


@pytest.fixture(scope="module")
def promtool(missing: Callable[[str], NoReturn]) -> str:
    return program("promtool", missing)


def program(name: str, missing: Callable[[str], NoReturn]) -> str:
    """Return the path of a program of the package prometheus."""
    try:
        return str(tools.program(name, "prometheus"))
    except tools.Missing as error:
        missing(str(error))


class Series(NamedTuple):
    labels: dict[str, str]  # without those of the scrape
    value: float


class Prometheus(Child):
    """A Prometheus that scrapes a relay every second, by our configuration and rules."""

    def __init__(self, program: str, folder: Path, status_port: int) -> None:
        text = CONFIGURATION.read_text()
        for ours, theirs in {
            "127.0.0.1:8001": f"127.0.0.1:{status_port}",
            "- transit-relay.rules.yml": f"- {RULES}",
            ": 15s": ": 1s",
        }.items():
            assert ours in text
            text = text.replace(ours, theirs)
        configuration = folder / "prometheus.yml"
        configuration.write_text(text)
        super().__init__(
            [
                *(program, f"--config.file={configuration}"),
                *(f"--storage.tsdb.path={folder / 'data'}", "--web.listen-address=127.0.0.1:0"),
            ]
        )
        try:
            self._port = int(self.lines.until(r'msg="Listening on" address=\S+:(\d+)')[1])
            self.lines.until("Server is ready to receive web requests")
        except AssertionError:
            self.__exit__()
            raise

    def api(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of the HTTP API."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=TIMEOUT)
        try:
            connection.request("GET", f"/api/v1/{path}?{urlencode(parameters)}")
            answer = json.load(connection.getresponse())
        finally:
            connection.close()
        assert answer["status"] == "success" and not answer.get("warnings"), (parameters, answer)
        return answer["data"]

    def query(self, expression: str) -> list[Series]:
        """Evaluate an expression now."""
        data = self.api("query", query=expression)
        assert data["resultType"] == "vector", expression
        return [Series(found["metric"], float(found["value"][1])) for found in data["result"]]

    def samples(self) -> Samples:
        """Return all samples of the relay, as the relay names them."""
        found = {}
        for labels, value in self.query('{job="transit-relay", __name__=~"(transit|process).+"}'):
            for label in "job", "instance":
                del labels[label]
            found[name_of(labels.pop("__name__"), **labels)] = value
        return found

    def wait_for_scrapes(self, count: int) -> None:
        """Wait until so many scrapes have succeeded. A tenth may fail: they time out after 1 s."""
        deadline = time.monotonic() + TIMEOUT + 2 * count
        while (succeeded := self._aggregate("sum")) < count:
            assert time.monotonic() < deadline, f"{succeeded:g} scrapes have succeeded"
            time.sleep(POLL_SECONDS)
        assert self._aggregate("count") - self._aggregate("sum") <= count / 10

    def _aggregate(self, function: str) -> float:
        """Aggregate `up`, which is 1 for a scrape that succeeded and otherwise 0."""
        (series,) = self.query(f'{function}_over_time(up{{job="transit-relay"}}[1h])')
        return series.value

    def wait_for_scrape(self) -> None:
        """Wait until a scrape that begins now, or later, has succeeded."""
        began = time.time()
        when = "timestamp(transit_relay_healthy)"  # of any other expression it is the current time
        eventually(lambda: any(found.value > began for found in self.query(when)), "a scrape")


class Observed(NamedTuple):
    """A relay, what clients did with it, and what Prometheus has seen."""

    relay: StatusRelay
    prometheus: Prometheus
    traffic: Traffic
    before: Samples
    after: Samples


@pytest.fixture(scope="module")
def observed(
    our_relay: list[str],
    missing: Callable[[str], NoReturn],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Observed]:
    folder = tmp_path_factory.mktemp("prometheus")
    command = program("prometheus", missing)
    options = [
        *(f"--usage-db={folder / 'usage.sqlite'}", f"--monthly-quota={QUOTA_BYTES}"),
        *("--max-waiting-per-source=1", "--allow=127.0.0.1", "--allow=203.0.113.0/24"),
    ]
    with StatusRelay(our_relay, *options) as relay:
        with Prometheus(command, folder, relay.status_port) as prometheus:
            prometheus.wait_for_scrape()
            before = prometheus.samples()
            traffic = Traffic(relay)
            traffic.run()
            eventually(lambda: has_settled(relay, traffic), "records are written, quota counted")
            prometheus.wait_for_scrapes(SCRAPES)
            prometheus.wait_for_scrape()
            yield Observed(relay, prometheus, traffic, before, prometheus.samples())
        assert relay.terminate() == 0


def has_settled(relay: StatusRelay, traffic: Traffic) -> bool:
    """Return whether the relay has done what it does later: write records, count for the quota."""
    status = relay.status()
    is_written = not any(sink["waiting"] for sink in status["records"].values())
    return is_written and status["quota"]["used_bytes"] == sum(traffic.pair_sizes)


# The files.


@pytest.mark.parametrize(
    "arguments",
    [("check", "rules", RULES), ("test", "rules", RULE_TESTS), ("check", "config", CONFIGURATION)],
    ids=["check rules", "test rules", "check config"],
)
def test_promtool_accepts_our_files(promtool: str, arguments: tuple[object, ...]) -> None:
    with Child([promtool, *map(str, arguments)]) as child:
        child.succeed()


def test_each_alert_has_a_test_and_a_text(observed: Observed) -> None:
    tested = dict(
        re.findall(
            r"ALERTS\{alertname=\"(\w+)\", alertstate=\"firing\", (.*)\}", RULE_TESTS.read_text()
        )
    )
    rules = rules_of(observed.prometheus)
    assert set(tested) == {rule["name"] for rule in rules}
    for rule in rules:
        texts = rule["annotations"]
        assert set(texts) == {"summary", "description"}
        named = re.findall(r"\$labels\.(\w+)", "".join(texts.values()))
        assert set(named) <= {label for label, _ in MATCHER.findall(tested[rule["name"]])}
        assert rule["labels"]["severity"] in ("critical", "warning")


# The metrics.


def test_all_counters_begin_at_0(observed: Observed) -> None:
    assert counters_of(observed.before) == counters()


def counters_of(samples: Samples) -> Samples:
    """Return the counters of the relay, without those of the process."""
    return {name: value for name, value in samples.items() if re.match(r"transit_.*_total\b", name)}


def test_the_counters_show_what_the_clients_did(observed: Observed) -> None:
    assert counters_of(observed.after) == observed.traffic.counted


def test_the_gauges(observed: Observed) -> None:
    total_bytes = sum(observed.traffic.pair_sizes)
    nothing = dict.fromkeys(("pairs", "waiting_clients", "waiting_tokens", "queued_bytes"), 0)
    expected = {"quota_used_bytes": total_bytes, "quota_bytes": QUOTA_BYTES}
    found = {name: observed.after[f"transit_relay_{name}"] for name in {**nothing, **expected}}
    assert found == {**nothing, **expected}
    for what in "waiting", "failing":
        for sink in SINKS:
            assert observed.after[name_of(f"transit_relay_records_{what}", sink=sink)] == 0


@pytest.mark.parametrize(
    "name",
    ["partner_wait_seconds", "pair_duration_seconds", "pair_rate_bytes_per_second"],
)
def test_a_histogram_has_all_pairs(name: str, observed: Observed) -> None:
    buckets = buckets_of(name, observed.after)
    pairs = len(observed.traffic.pair_sizes)
    assert observed.after[f"transit_relay_{name}_count"] == buckets[float("inf")] == pairs
    assert set(buckets_of(name, observed.before).values()) == {0}


def test_the_histogram_of_sizes(observed: Observed) -> None:
    name, sizes = "pair_size_bytes", observed.traffic.pair_sizes
    assert observed.after[f"transit_relay_{name}_sum"] == sum(sizes)
    assert observed.after[f"transit_relay_{name}_count"] == len(sizes)
    buckets = buckets_of(name, observed.after)
    assert buckets == {bound: sum(size <= bound for size in sizes) for bound in buckets}
    assert len(set(buckets.values())) > 3  # the pairs are not all in one bucket


def buckets_of(histogram: str, samples: Samples) -> dict[float, float]:
    """Return the cumulative counts of a histogram by the upper bounds of its buckets."""
    pattern = re.compile(rf'transit_relay_{histogram}_bucket\{{le="(.*)"\}}')
    matches = ((pattern.fullmatch(name), value) for name, value in samples.items())
    return {float(match[1]): value for match, value in matches if match}


def test_promtool_has_no_complaint_about_the_metrics(observed: Observed, promtool: str) -> None:
    with Child([promtool, "check", "metrics"], stdin=observed.relay.get("/metrics").text) as child:
        assert (child.wait(), child.lines.rest()) == (0, [])


def test_both_formats_have_the_same_samples(observed: Observed, python_tools: Path) -> None:
    found = {}
    for form, accept in ("text", "*/*"), ("openmetrics", OPENMETRICS):
        answer = observed.relay.get("/metrics", accept)
        kind = re.search(rb"(?i)\r\ncontent-type: ([^;\r]*)", answer.head)
        assert kind and (kind[1] == b"application/openmetrics-text") == (form == "openmetrics")
        found[form] = parse(python_tools, form, answer)
    text, openmetrics = found["text"], found["openmetrics"]
    assert text.keys() == openmetrics.keys() >= counters().keys()
    changed = {name for name, value in text.items() if value != openmetrics[name]}
    assert [name for name in changed if not VOLATILE.match(name)] == []


def parse(python_tools: Path, form: str, answer: Answer) -> Samples:
    """Parse metrics with prometheus_client, which is strict about OpenMetrics."""
    script = Path(__file__).with_name("parse_metrics.py")
    argv = [str(python_tools / "python"), str(script), form]
    with Child(argv, stdin=answer.text) as child:
        child.succeed()
        samples = json.loads("".join(child.lines.seen))
    names = Counter(name_of(name, **labels) for name, labels, _ in samples)
    assert names.most_common(1)[0][1] == 1, "a sample is there twice"
    return {name_of(name, **labels): value for name, labels, value in samples}


# The rules.


def rules_of(prometheus: Prometheus) -> list[dict[str, Any]]:
    """Return our alert rules, as Prometheus has read them."""
    (group,) = prometheus.api("rules")["groups"]
    rules: list[dict[str, Any]] = group["rules"]
    return rules


def test_each_rule_is_evaluated_and_no_alert_fires(observed: Observed) -> None:
    prometheus = observed.prometheus
    eventually(
        lambda: all(rule["health"] != "unknown" for rule in rules_of(prometheus)),
        "all rules are evaluated",
    )
    for rule in rules_of(prometheus):
        assert (rule["health"], rule.get("lastError")) == ("ok", None), rule
        assert rule["state"] != "firing", rule


def test_the_relay_has_everything_that_the_rules_ask_for(observed: Observed) -> None:
    for rule in rules_of(observed.prometheus):
        observed.prometheus.query(rule["query"])
        selectors = SELECTOR.findall(rule["query"])
        assert selectors, rule
        for selector in selectors:
            found = observed.prometheus.query(selector)
            assert found, selector
            for label, values in MATCHER.findall(selector):
                assert {one.labels[label] for one in found} == set(values.split("|")), selector


# The dashboard.

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def test_the_panels_have_titles_texts_units_and_places() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    for panel in PANELS:
        assert panel["title"] and panel["description"].endswith("."), panel["id"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        is_beside = any(
            a[axis] + a[size] <= b[axis]
            for a, b in ((one, other), (other, one))
            for axis, size in (("x", "w"), ("y", "h"))
        )
        assert is_beside, (one, other)


def test_the_dashboard_shows_every_metric(observed: Observed) -> None:
    families = re.findall(r"(?m)^# TYPE (\S+) ", observed.relay.get("/metrics").text)
    assert families
    shown = " ".join(target["expr"] for panel in PANELS for target in panel["targets"])
    names = {re.sub("_bucket$", "", name) for name in re.findall(r"\b[a-z_]{6,}\b", shown)}
    assert set(families) - names == set()


def test_each_query_of_the_dashboard_has_data(observed: Observed) -> None:
    """The variables get the values that Grafana would offer."""
    prometheus = observed.prometheus
    values = {"__rate_interval": "1m", "__range": "1m"}
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert match
            found = prometheus.query(f"group by ({match[2]}) ({fill(match[1], values)})")
            values[variable["name"]] = "|".join(one.labels[match[2]] for one in found)
    for panel in PANELS:
        for target in panel["targets"]:
            found = prometheus.query(fill(target["expr"], values))
            assert found, target["expr"]
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert all(one.labels.get(label) for one in found), target


def fill(expression: str, values: dict[str, str]) -> str:
    """Put values in the place of the dashboard's variables."""
    return re.sub(r"\$(\w+)", lambda match: values[match[1]], expression)


# Privacy.


def test_no_answer_has_an_address_a_token_or_a_side(observed: Observed) -> None:
    answers = observed.traffic.answers + observed.relay.all_answers()
    text = b"".join(part for answer in answers for part in answer).decode().lower()
    assert "transit_relay_pairs" in text
    assert [secret for secret in observed.traffic.secrets if secret.lower() in text] == []
