"""The container image, built from its Dockerfile and run as compose.yaml says, but without network.

A local image replaces the public base image, with the same name: bookworm and its Python. As in the
public image, the modules of Python are not compiled. The engine keeps all its files in a temporary
folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from children import Child
from conftest import DEBIAN_PATH, ROOT, TIMEOUT, FreshRoot, attempt, documents, run
from guests import SECRETS, LongTransfer, get, prepare, transfer
from nspawn import Reachable

import transit_relay

DOCKER = ROOT / "packaging" / "docker"
DOCKERFILE = DOCKER / "Dockerfile"
COMPOSE = DOCKER / "compose.yaml"
CONFIG = "/etc/transit-relay.conf"
STATE = "/var/lib/transit-relay"
UNWANTED = ("__pycache__", "./var/lib/apt", "./var/cache", "./usr/share/locale")

# Limits must be set: the engine's defaults may exceed the limits of this machine.
CONFIGURATION = {
    "CONTAINERS_CONF": """\
[containers]
default_ulimits = ["nofile=1024:{files}", "nproc=1024:1024"]
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
runtime = "runc"
""",
    "CONTAINERS_STORAGE_CONF": """\
[storage]
driver = "overlay"
graphroot = "{folder}/storage"
runroot = "{folder}/run"
""",
}
MOST_FILES = min(10_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])


class Engine:
    """Podman and buildah, with all their files in one folder."""

    def __init__(self, folder: Path) -> None:
        self._env = {**os.environ, "PATH": DEBIAN_PATH}
        for variable, text in CONFIGURATION.items():
            file = folder / f"{variable}.conf"
            file.write_text(text.format(folder=folder, files=MOST_FILES))
            self._env[variable] = str(file)

    def run(self, *argv: str | Path) -> str:
        """Run a command of the engine that must succeed."""
        return run(argv, env=self._env)

    def begin(self, *argv: str) -> Child:
        """Start a command of the engine. The `with` block ends it."""
        return Child(argv, env=self._env)

    def try_(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the engine. It may fail. Its stdout contains its stderr."""
        return attempt(argv, self._env, TIMEOUT)

    def inspect(self, kind: str, name: str) -> dict[str, Any]:
        """Return all properties of an image, a container or a volume."""
        (found,) = json.loads(self.run("podman", kind, "inspect", name))
        assert isinstance(found, dict)
        return found


def compose() -> dict[str, Any]:
    """Return the content of compose.yaml."""
    to_json = "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)"
    content = json.loads(run(["/usr/bin/python3", "-c", to_json, COMPOSE]))
    assert isinstance(content, dict)
    return content


def service() -> dict[str, Any]:
    """Return the one service of compose.yaml."""
    (service,) = compose()["services"].values()
    assert isinstance(service, dict)
    return service


@pytest.fixture(scope="module")
def engine(
    roots: Mapping[str, FreshRoot], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Engine]:
    """Create an engine that has a base image with the name of the public one."""
    folder = tmp_path_factory.mktemp("engine")
    engine = Engine(folder)
    base = re.findall(r"^FROM (\S+)$", DOCKERFILE.read_text(), re.M)
    assert len(base) == 1
    bookworm = roots["bookworm"].folder()
    left_out = [f"--exclude={name}" for name in UNWANTED]
    run(["tar", "-cf", folder / "base", f"--directory={bookworm}", *left_out, "."])
    try:
        engine.run("podman", "import", "--quiet", folder / "base", base[0])
        yield engine
    finally:
        engine.run("podman", "rm", "--all", "--force", "--time=0", "--volumes")
        engine.run("podman", "rmi", "--all", "--force")
        shutil.rmtree(folder)


@pytest.fixture(scope="module")
def image(engine: Engine) -> str:
    """Build the image as compose.yaml says, and return its name."""
    build = service()["build"]
    context = (DOCKER / build["context"]).resolve()
    assert (context, context / build["dockerfile"]) == (ROOT, DOCKERFILE)
    options = ["--pull=never", "--isolation=chroot", "--format=docker", "--no-cache", "--quiet"]
    name: str = service()["image"]
    engine.run("buildah", "build", *options, f"--tag={name}", f"--file={DOCKERFILE}", context)
    return name


def options_of(service: Mapping[str, Any]) -> Iterator[str]:
    """Return the options of `podman run` for the keys in compose.yaml. Other keys are an error."""
    for key, value in service.items():
        if key in ("image", "build"):
            continue
        elif key == "read_only":
            yield f"--read-only={value}".lower()
        elif key == "restart":
            yield f"--restart={value}"
        elif key == "cap_drop":
            yield from (f"--cap-drop={name}" for name in value)
        elif key == "security_opt":
            yield from (f"--security-opt={name}" for name in value)
        elif key == "volumes":
            yield from (f"--volume={volume}" for volume in value)
        elif key == "ulimits":
            yield from (f"--ulimit={name}={min(n, MOST_FILES)}" for name, n in value.items())
            yield "--ulimit=nproc=1024"  # the engine's default may be too high
        elif key == "stop_grace_period":
            yield f"--stop-timeout={value.rstrip('s')}"
        elif key == "ports":
            yield "--network=none"
        else:
            raise AssertionError(f"no test for the key {key} of compose.yaml")


class Container(Reachable):
    """A container that runs in the `with` block, by default with the options of compose.yaml."""

    def __init__(
        self, engine: Engine, *arguments: str, options: Sequence[str] = (), entrypoint: str = ""
    ) -> None:
        self._engine = engine
        options = [*(options or options_of(service())), "--pull=never", "--no-healthcheck"]
        if entrypoint:
            options.append(f"--entrypoint={entrypoint}")
        self.name = engine.run("podman", "run", "--detach", *options, *arguments).strip()
        self.leader = engine.inspect("container", self.name)["State"]["Pid"]

    def __enter__(self) -> Container:
        return self

    def __exit__(self, *_: object) -> None:
        removal = ("podman", "rm", "--force", "--time=0", self.name)
        if self._engine.try_(*removal).returncode:  # the container was stopping
            self._engine.run(*removal)

    def log(self) -> str:
        """Return its output."""
        return self._engine.try_("podman", "logs", self.name).stdout

    def await_message(self, pattern: str) -> None:
        """Wait until its output has a line that begins with a pattern."""
        with self._engine.begin("podman", "logs", "--follow", self.name) as following:
            following.lines.until(f"^{pattern}")

    def await_start(self) -> None:
        """Wait until the relay listens."""
        self.await_message("Transit starting on ")

    def reload(self) -> None:
        """Let the engine send SIGHUP, and wait until the relay has reloaded."""
        self._engine.run("podman", "kill", "--signal=HUP", self.name)
        self.await_message("Transit reloaded")

    def send_stop(self) -> None:
        """Let the engine send SIGTERM."""
        self._engine.run("podman", "kill", "--signal=TERM", self.name)

    def inside(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the container."""
        return self._engine.try_("podman", "exec", self.name, *argv)

    def stop(self) -> int:
        """Let the engine stop it, and return its exit code."""
        self._engine.run("podman", "stop", self.name)
        code: int = self._engine.inspect("container", self.name)["State"]["ExitCode"]
        return code


@contextlib.contextmanager
def relay(engine: Engine, *arguments: str, options: Sequence[str] = ()) -> Iterator[Container]:
    """Run a relay in a container. It must stop in order, and its log must not identify a client."""
    with Container(engine, *arguments, options=options) as container:
        container.await_start()
        prepare(container)
        yield container
        assert container.stop() == 0
        output = container.log()
        assert output.endswith("\nSIGTERM: stopping\nstopped\n"), output
        assert not any(secret in output for secret in SECRETS), output


def health_check(engine: Engine, image: str) -> list[str]:
    """Return the health check command of the image."""
    kind, *command = engine.inspect("image", image)["Healthcheck"]["Test"]
    assert kind == "CMD"
    return command


def recorded(engine: Engine) -> list[tuple[object, ...]]:
    """Return the rows of the usage database, in the volume of compose.yaml."""
    ((volume, _),) = compose()["volumes"].items()
    folder = engine.inspect("volume", volume)["Mountpoint"]
    with contextlib.closing(sqlite3.connect(f"{folder}/usage.sqlite")) as db:
        return db.execute("SELECT started % 3600, result FROM usage").fetchall()


def test_image_configuration(engine: Engine, image: str) -> None:
    config = engine.inspect("image", image)["Config"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", config["User"])
    assert list(config["ExposedPorts"]) == ["4001/tcp"]
    assert service()["ports"] == ["4001:4001"]
    assert [volume.split(":")[1] for volume in service()["volumes"]] == [STATE]
    assert list(config["Volumes"]) == [STATE]
    assert config["StopSignal"] == "SIGTERM"
    assert config["Labels"]["org.opencontainers.image.title"] == transit_relay.PROGRAM


def test_all_is_compiled(engine: Engine, image: str) -> None:
    """Neither the relay nor its health check compiles a module at its start."""
    _, *relay = engine.inspect("image", image)["Config"]["Entrypoint"]
    _, *health = health_check(engine, image)
    for arguments in [*relay, "--check"], health:
        command = ["podman", "run", "--rm", "--read-only", "--network=none", "--entrypoint=python3"]
        output = engine.try_(*command, "--no-healthcheck", image, "-v", *arguments).stdout
        loaded = re.findall(r"^# code object from '?(.*?)'?$", output, re.M)
        assert len(loaded) > 20, output
        assert [name for name in loaded if not name.endswith(".pyc")] == []


def test_it_relays_with_no_privilege(engine: Engine, image: str) -> None:
    with relay(engine, image) as container:
        status = Path(f"/proc/{container.leader}/status").read_text()
        fields = dict(re.findall(r"^(\w+):\t(.*)$", status, re.M))
        assert set(fields["Uid"].split()) & {"0"} == set()
        assert {fields[f"Cap{kind}"] for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb")} == {"0" * 16}
        assert fields["NoNewPrivs"] == "1"
        assert "Read-only file system" in container.inside("touch", "/usr/share/it").stdout
        for family in "IPv4", "IPv6":
            transfer(container, family=family)
        healthy = container.inside(*health_check(engine, image))
        assert (healthy.returncode, healthy.stdout) == (0, "ok\n")
    assert recorded(engine) == [(0, "happy"), (0, "happy")]


def test_options_after_the_image(engine: Engine, image: str) -> None:
    """They override the configuration file. The volume keeps the records of earlier containers."""
    before = recorded(engine)
    more = ["--port=tcp:4001", "--websocket=tcp:4002", "--blur-usage=1800"]
    with relay(engine, image, *more) as container:
        assert "to 1800 seconds" in container.log()
        transfer(container, "tcp", "ws")
        transfer(container, "ws", "ws")
    assert [mood for _, mood in recorded(engine)[len(before) :]] == ["happy", "happy"]


def test_documented_commands(engine: Engine, image: str) -> None:
    """They build the same image. The container also runs without the options of compose.yaml."""
    lines = documents().splitlines()
    build, run_it = (shlex.split(line) for line in lines if line.startswith("    docker "))
    file = str(DOCKERFILE.relative_to(ROOT))
    assert build == ["docker", "build", "--tag", image, "--file", file, "."]
    assert run_it[:4] == ["docker", "run", "--publish", "4001:4001"]
    *options, name = run_it[4:]
    with relay(engine, name, options=["--network=none", *options]) as container:
        transfer(container)


def test_another_configuration(engine: Engine, image: str, tmp_path: Path) -> None:
    """Mount it as shown in the line that is commented out in compose.yaml."""
    lines = "port tcp:4001\nusage-db :memory:\nstatus tcp:8001\n"
    (tmp_path / "transit-relay.conf").write_text(lines)
    shown = re.findall(r"^ +# - \.\.(/transit-relay\.conf:\S+)$", COMPOSE.read_text(), re.M)
    mounted = f"--volume={tmp_path}{''.join(shown)}"
    with relay(engine, image, options=["--network=none", mounted]) as container:
        assert "not blurring access times" in container.log()
        transfer(container)
        listener = container.connect("127.0.0.1", 8001, "127.0.0.1")
        assert get(listener, "/healthz") == (200, "ok\n")
        healthy = container.inside(*health_check(engine, image))
        assert (healthy.returncode, healthy.stdout) == (0, "ok\n")  # by the listener of the image
    command = ["podman", "run", "--rm", "--network=none", "--no-healthcheck", mounted, image]
    (tmp_path / "transit-relay.conf").write_text("\nno such option\n")
    refused = engine.try_(*command)
    assert refused.returncode == 2
    assert f"{CONFIG}, line 2: " in refused.stdout


def test_a_reload_of_a_configuration_in_a_folder(
    engine: Engine, image: str, tmp_path: Path
) -> None:
    """A folder is mounted, as docs/operating.md says: the container sees a file that is renamed."""
    mounted, option = re.findall(
        r"--volume /srv/relay(:/\S+) \.\.\. \S+ --config (/\S+)`", documents()
    )[0]
    tmp_path.chmod(0o755)
    config = tmp_path / Path(option).name
    config.write_text("blur-usage 1800\n")
    options = ["--network=none", f"--volume={tmp_path}{mounted}"]
    with relay(engine, image, f"--config={option}", options=options) as container:
        with LongTransfer(container) as running:
            new = tmp_path / "new"
            new.write_text("blur-usage 900\n")
            new.rename(config)
            container.reload()
            running.wait_for_rounds()
        assert "to 900 seconds" in container.log()
        assert container.leader == engine.inspect("container", container.name)["State"]["Pid"]


@pytest.mark.parametrize("endpoint", ["tcp:8001", ""])
def test_health_without_the_status_listener_of_the_image(
    engine: Engine, image: str, endpoint: str
) -> None:
    """An option replaced it or switched it off. The check then uses the port for clients."""
    with relay(engine, image, f"--status={endpoint}") as container:
        healthy = container.inside(*health_check(engine, image))
        assert healthy.returncode == 0
        assert healthy.stdout not in ("", "ok\n")
        os.kill(container.leader, signal.SIGSTOP)
        unhealthy = container.inside(*health_check(engine, image))
        os.kill(container.leader, signal.SIGCONT)
        assert unhealthy.returncode == 1


def test_it_is_unhealthy_when_the_relay_stops(engine: Engine, image: str) -> None:
    with Container(engine, image, "--drain=3600") as container:
        container.await_start()
        prepare(container)
        with LongTransfer(container):
            container.send_stop()
            container.await_message("SIGTERM: draining")
            unhealthy = container.inside(*health_check(engine, image))
            assert (unhealthy.returncode, unhealthy.stdout) == (1, "stopping\n")


def test_it_is_unhealthy_without_a_relay(engine: Engine, image: str) -> None:
    with Container(engine, image, "infinity", entrypoint="sleep") as container:
        unhealthy = container.inside(*health_check(engine, image))
        assert unhealthy.returncode == 1
        assert "ConnectionRefusedError" in unhealthy.stdout


def test_it_is_unhealthy_when_the_relay_hangs(engine: Engine, image: str) -> None:
    with Container(engine, image) as container:
        container.await_start()
        os.kill(container.leader, signal.SIGSTOP)
        unhealthy = container.inside(*health_check(engine, image))
        os.kill(container.leader, signal.SIGCONT)
        assert unhealthy.returncode == 1
        assert "TimeoutError" in unhealthy.stdout
