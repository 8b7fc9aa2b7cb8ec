"""The Dockerfile, built and run: no privileges, nothing written but the database.

The base image is a stand-in, made of a fresh bookworm, under the name that the Dockerfile asks for.
Images and containers are kept in a folder of this run.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from conftest import DEBIAN_PATH, HERE, ROOT, TIMEOUT, FreshRoot, run

DOCKERFILE = ROOT / "packaging/docker/Dockerfile"
COMPOSE = ROOT / "packaging/docker/compose.yaml"
IMAGE = "localhost/transit-relay"
# Where a container may not raise limits, as in one.
CONTAINERS_CONF = """\
[containers]
default_ulimits = ["nofile=10000:20000", "nproc=10000:10000"]
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
"""
STORAGE_CONF = """\
[storage]
driver = "overlay"
graphroot = "{folder}/images"
runroot = "{folder}/run"
"""
TRANSFER = (HERE / "transfer.py").read_text()


class Podman:
    """Stands in for Docker, with a store of its own."""

    def __init__(self, folder: Path) -> None:
        (folder / "containers.conf").write_text(CONTAINERS_CONF)
        (folder / "storage.conf").write_text(STORAGE_CONF.format(folder=folder))
        self._env = {
            "CONTAINERS_CONF": str(folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(folder / "storage.conf"),
        }

    def __call__(self, *argv: str, program: str = "podman") -> str:
        """Run a command that must succeed; give what it said on stdout."""
        return run([program, *argv], env=self._env)

    def fails(self, *argv: str) -> bool:
        """Whether a command does."""
        env = {**os.environ, "PATH": DEBIAN_PATH, **self._env}
        done = subprocess.run(["podman", *argv], env=env, capture_output=True, timeout=2 * TIMEOUT)
        return done.returncode != 0

    def logs(self, container: str) -> str:
        """What the container has said, on either stream."""
        env = {**os.environ, "PATH": DEBIAN_PATH, **self._env}
        return subprocess.run(
            ["podman", "logs", container],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=True,
            timeout=2 * TIMEOUT,
        ).stdout


@pytest.fixture(scope="module")
def podman(
    roots: Mapping[str, FreshRoot], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Podman]:
    """Where the image has been built."""
    folder = tmp_path_factory.mktemp("containers")
    podman = Podman(folder)
    (base,) = re.findall(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.M)
    run(["tar", "-C", roots["bookworm"].folder(), "-cf", folder / "base.tar", "."])
    podman("import", "--quiet", str(folder / "base.tar"), base)
    (folder / "base.tar").unlink()
    podman(
        *("build", "--pull=never", "--isolation=chroot", "--format=docker", f"--tag={IMAGE}"),
        *(f"--file={DOCKERFILE}", str(ROOT)),
        program="buildah",
    )
    yield podman
    podman("rm", "--all", "--force")
    podman("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def image(podman: Podman) -> dict[str, Any]:
    """What the image says of itself."""
    (config,) = json.loads(podman("inspect", IMAGE))
    found: dict[str, Any] = config
    return found


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    """What compose.yaml says."""
    read = "import json, sys, yaml; print(json.dumps(yaml.safe_load(sys.stdin)))"
    with COMPOSE.open() as file:
        said = subprocess.check_output(["/usr/bin/python3", "-c", read], stdin=file)
    found: dict[str, Any] = json.loads(said)
    return found


@pytest.fixture(scope="module")
def service(compose: dict[str, Any]) -> dict[str, Any]:
    """What compose.yaml says of the container."""
    found: dict[str, Any] = compose["services"]["transit-relay"]
    return found


@pytest.fixture
def container(podman: Podman, service: dict[str, Any]) -> str:
    """A container as compose.yaml has it run, but in a network of its own."""
    assert service["read_only"] is True
    options = [
        "--read-only",
        *(f"--cap-drop={one}" for one in service["cap_drop"]),
        *(f"--security-opt={one.replace(':true', '')}" for one in service["security_opt"]),
        *(f"--volume={one}" for one in service["volumes"]),
    ]
    isolated = ["--pull=never", "--network=none", "--no-healthcheck"]
    return podman("run", "--detach", *isolated, *options, IMAGE).strip()


@pytest.fixture(scope="module")
def healthcheck(image: dict[str, Any]) -> list[str]:
    """The command by which Docker asks whether it is well."""
    kind, *command = image["Healthcheck"]["Test"]
    assert kind == "CMD"
    return [str(word) for word in command]


# What of /proc/1/status tells that it may do nothing.
POWERLESS = {"Uid": "4001", "CapPrm": "0" * 16, "CapBnd": "0" * 16, "NoNewPrivs": "1"}
ROWS = """\
import sqlite3
print(*sqlite3.connect("usage.sqlite").execute("SELECT result, total_bytes FROM usage"))
"""


def test_it_relays_without_privileges(
    podman: Podman, container: str, healthcheck: list[str]
) -> None:
    tries = 100  # each takes its time
    while podman.fails("exec", container, *healthcheck):
        tries -= 1
        assert tries, podman.logs(container)
    assert podman("exec", container, "python3", "-c", TRANSFER) == "transferred\n"
    status = podman("exec", container, "cat", "/proc/1/status")
    for name, value in POWERLESS.items():
        assert re.search(rf"^{name}:\s+{value}\b", status, re.M), status
    assert podman.fails("exec", container, "touch", "/usr/share/transit-relay/x")

    podman("stop", "--time=60", container)
    assert podman("inspect", "--format={{.State.ExitCode}}", container) == "0\n"
    assert podman.logs(container).splitlines()[-2:] == ["SIGTERM: stopping", "stopped"]
    stored = ["--volume=usage:/data", "--workdir=/data", "--entrypoint=python3"]
    found = podman("run", "--rm", "--network=none", *stored, IMAGE, "-c", ROWS)
    assert found == "('happy', 3000000)\n"


def test_options_may_be_given(podman: Podman) -> None:
    assert podman("run", "--rm", "--network=none", IMAGE, "--version").startswith("transit-relay ")


def test_who_is_not_well_is_noticed(podman: Podman, healthcheck: list[str]) -> None:
    """The healthcheck, where nobody listens."""
    entry = [f"--entrypoint={healthcheck[0]}", IMAGE, *healthcheck[1:]]
    assert podman.fails("run", "--rm", "--network=none", *entry)


def test_what_the_image_says(image: dict[str, Any]) -> None:
    config = image["Config"]
    assert config["User"] == "4001:4001"
    assert list(config["ExposedPorts"]) == ["4001/tcp"]
    assert list(config["Volumes"]) == ["/var/lib/transit-relay"]


def test_compose_uses_it(compose: dict[str, Any], service: dict[str, Any]) -> None:
    build = service["build"]
    assert (COMPOSE.parent / build["context"]).resolve() == ROOT
    assert ROOT / build["dockerfile"] == DOCKERFILE
    assert service["ports"] == ["4001:4001"]
    assert list(compose["volumes"]) == ["usage"]
