"""The probe against the Twisted relay, and against our relay: stopped, full and behind nginx."""

from __future__ import annotations

import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import tools
from children import TIMEOUT, Child, Record, Relay
from stage import OK, Client, handshake
from test_differential import start_reference
from test_proxies import Front, Place, nginx_front

FILE = tools.ROOT / "packaging" / "probe" / "transit_relay_probe.py"
SIZE = 3_000_000  # bytes each way
RELAYED = 2 * (SIZE + 5 * 16)  # with the round trips
SHORT = TIMEOUT / 60  # s: the limit of a probe that must reach it
KINDS = ["tcp", "ws", "tcp ws", "ws tcp"]


def run_probe(*arguments: object, timeout: float = TIMEOUT) -> tuple[int, list[str]]:
    """Run the probe. Return its exit code and its output, both streams."""
    command = [sys.executable, "-W", "error", str(FILE), f"--bytes={SIZE}", f"--timeout={timeout}"]
    env = {**os.environ, "PYTHONPATH": str(tools.ROOT)}
    with Child([*command, *map(str, arguments)], env=env) as child:
        code = child.wait()
        return code, child.lines.rest()


def endpoints(relay: Relay, kinds: str) -> list[str]:
    """Return an endpoint of a relay for each kind."""
    tcp, ws = relay.ports
    return [
        {"tcp": f"tcp:127.0.0.1:{tcp}", "ws": f"ws://127.0.0.1:{ws}/"}[k] for k in kinds.split()
    ]


@pytest.fixture(scope="module")
def reference(python_tools: Path) -> Iterator[Relay]:
    with start_reference(python_tools) as relay:
        yield relay


class OurRelay(Relay):
    """Our relay, with a port for TCP clients and one for a proxy."""

    def __init__(self, command: list[str], *options: str) -> None:
        address = r"tcp:(\d+):interface=127\.0\.0\.1"
        super().__init__(
            [
                *command,
                "--port=tcp:0:interface=127.0.0.1",
                "--websocket=tcp:0:interface=127.0.0.1",
                *options,
            ],
            rf"^Transit starting on {address}, {address} \(websocket\)$",
        )


@pytest.fixture
def ours(our_relay: list[str]) -> Iterator[Relay]:
    with OurRelay(our_relay) as relay:
        yield relay


@pytest.mark.parametrize("kinds", KINDS)
def test_the_twisted_relay(kinds: str, reference: Relay) -> None:
    code, lines = run_probe(*endpoints(reference, kinds))
    assert (code, lines[0]) == (0, "transit-relay-probe: ok"), lines
    assert reference.record() == Record("happy", RELAYED, True)


def test_a_websocket_client_at_a_port_of_the_twisted_relay_for_tcp(reference: Relay) -> None:
    endpoint = f"ws://127.0.0.1:{reference.port}/"
    code, lines = run_probe(endpoint)
    refused = "the relay refused a client: bad handshake"
    assert (code, lines) == (2, [f"transit-relay-probe: {endpoint}: {refused}"])
    reference.record()


@pytest.mark.parametrize("kinds", KINDS)
def test_our_relay(kinds: str, ours: Relay) -> None:
    code, lines = run_probe(*endpoints(ours, kinds))
    assert (code, lines[0]) == (0, "transit-relay-probe: ok"), lines
    assert ours.record() == Record("happy", RELAYED, True)


@pytest.mark.parametrize("kind", ["tcp", "ws"])
def test_a_relay_that_is_stopped(kind: str, ours: Relay) -> None:
    os.kill(ours.pid, signal.SIGSTOP)
    (endpoint,) = endpoints(ours, kind)
    code, lines = run_probe(endpoint, timeout=SHORT)
    doing = {"tcp": "waiting for `ok`", "ws": "upgrading to WebSocket"}[kind]
    limit = f"no answer within {SHORT:g} s while {doing}"
    assert (code, lines) == (2, [f"transit-relay-probe: {endpoint}: {limit}"])


# Behind nginx.


def make_certificates(folder: Path, openssl: str) -> dict[str, Path]:
    """Make self-signed certificates for localhost, by name; the folder of each is for nginx."""
    found = {}
    (folder / "names").write_text("subjectAltName=DNS:localhost\n")
    for name, days in ("valid", "2"), ("expired", "-1"):
        found[name] = folder / name
        found[name].mkdir()
        new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-keyout", "privkey.pem"]
        request = [openssl, "req", "-new", *new_key, "-nodes", "-subj", "/CN=localhost"]
        tools.run([*request, "-out", "request"], found[name])
        sign = [openssl, "x509", "-req", "-in", "request", "-signkey", "privkey.pem"]
        validity = ["-days", days, "-extfile", "../names", "-out", "fullchain.pem"]
        tools.run([*sign, *validity], found[name])
    return found


@pytest.fixture(scope="module")
def certificates(certificate: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return folders with certificates. The fixture `certificate` requires openssl."""
    folder = tmp_path_factory.mktemp("certificates")
    return make_certificates(folder, str(tools.program("openssl", "openssl")))


@pytest.fixture
def front(
    request: pytest.FixtureRequest,
    nginx: Path,
    certificates: dict[str, Path],
    ours: Relay,
    tmp_path: Path,
) -> Iterator[Front]:
    """Start nginx before our relay. Its certificate is the parameter, or the valid one."""
    certificate = certificates[getattr(request, "param", "valid")]
    with nginx_front(Place(nginx, tmp_path, certificate, ours.ports[1])) as front:
        yield front


def url(front: Front, host: str = "localhost") -> str:
    return f"wss://{host}:{front.address.rpartition(':')[2]}/"


@pytest.mark.parametrize("kinds", ["wss", "wss tcp", "tcp wss"])
def test_tls_with_an_own_ca(
    kinds: str, front: Front, ours: Relay, certificates: dict[str, Path]
) -> None:
    (tcp,) = endpoints(ours, "tcp")
    ca = certificates["valid"] / "fullchain.pem"
    both = [{"wss": url(front), "tcp": tcp}[kind] for kind in kinds.split()]
    code, lines = run_probe("--ca", ca, *both)
    assert (code, lines[0]) == (0, "transit-relay-probe: ok"), lines
    assert ours.record() == Record("happy", RELAYED, True)


def test_a_ca_that_is_not_trusted(front: Front) -> None:
    code, (line,) = run_probe(url(front))
    assert code == 2 and ": wrong certificate: self" in line


def test_a_certificate_for_another_name(front: Front, certificates: dict[str, Path]) -> None:
    ca = certificates["valid"] / "fullchain.pem"
    code, (line,) = run_probe("--ca", ca, url(front, "127.0.0.1"))
    assert code == 2 and ": wrong certificate: IP address mismatch" in line


@pytest.mark.parametrize("front", ["expired"], indirect=True)
def test_a_certificate_that_has_expired(front: Front, certificates: dict[str, Path]) -> None:
    ca = certificates["expired"] / "fullchain.pem"
    code, (line,) = run_probe("--ca", ca, url(front))
    assert code == 2 and line.endswith(": wrong certificate: certificate has expired")


def test_a_tcp_client_at_a_tls_port(front: Front) -> None:
    code, (line,) = run_probe(f"tcp:{front.address}")
    assert code == 2
    answered = "an HTTP server answered with status 400; try ws:// or wss://"
    assert line.endswith(f": not a relay: {answered}")


def test_a_stopped_relay_behind_nginx(
    front: Front, ours: Relay, certificates: dict[str, Path]
) -> None:
    os.kill(ours.pid, signal.SIGSTOP)
    ca = certificates["valid"] / "fullchain.pem"
    code, (line,) = run_probe("--ca", ca, url(front), timeout=SHORT)
    limit = f"no answer within {SHORT:g} s while upgrading to WebSocket"
    assert code == 2 and line.endswith(f": {limit}")


def test_nginx_without_a_relay(front: Front, ours: Relay, certificates: dict[str, Path]) -> None:
    assert ours.terminate() == 0
    ca = certificates["valid"] / "fullchain.pem"
    code, (line,) = run_probe("--ca", ca, url(front))
    assert code == 2 and line.endswith(": the upgrade was refused: HTTP status 502")


@contextmanager
def closing_client(port: int) -> Iterator[Client]:
    """Connect a client over TCP. Close it at the end."""
    client = Client(port)
    try:
        yield client
    finally:
        client.abandon()


def test_a_full_relay(
    our_relay: list[str], nginx: Path, certificates: dict[str, Path], tmp_path: Path
) -> None:
    """A pair has both connections. It is not ended for others."""
    certificate = certificates["valid"]
    with OurRelay(our_relay, "--max-connections=2") as relay, ExitStack() as stack:
        tcp, ws = endpoints(relay, "tcp ws")
        pair = [stack.enter_context(closing_client(relay.port)) for _ in range(2)]
        for side, client in enumerate(pair):
            client.send(handshake("pair", str(side)))
        for client in pair:
            client.expect(OK)
        with nginx_front(Place(nginx, tmp_path, certificate, relay.ports[1])) as front:
            code, (line,) = run_probe("--ca", certificate / "fullchain.pem", url(front))
        assert code == 2
        assert line.endswith(": the upgrade was refused: HTTP status 503, relay full")
        for endpoint, reason in (
            (tcp, "the relay refused a client: relay full"),
            (ws, "the upgrade was refused: HTTP status 503, relay full"),
        ):
            assert run_probe(endpoint) == (2, [f"transit-relay-probe: {endpoint}: {reason}"])


def test_a_port_without_a_listener() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        endpoint = f"tcp:127.0.0.1:{bound.getsockname()[1]}"
        expected = f"transit-relay-probe: {endpoint}: connection refused"
        assert run_probe(endpoint) == (2, [expected])
