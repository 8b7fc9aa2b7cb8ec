"""The Debian package: its files, lintian, piuparts, autopkgtest, and a reproducible build.

The first test that needs a long job starts all of them, two at a time. Each test waits for its job.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest
from conftest import HERE, ROOT, FreshRoot, documents, run
from figures import exposure, read_load
from packages import build_changed, replace_once

LINTIAN = [
    *("lintian", "--allow-root", "-EvIL", "+pedantic", "--profile", "debian"),
    *("--fail-on", "error,warning,info,pedantic"),
]
Job = Callable[[str], str]


@pytest.fixture(scope="module")
def job(
    deb: Path, roots: Mapping[str, FreshRoot], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Job]:
    """Return a function that waits for a long job, by its name, and returns its output."""
    folder = tmp_path_factory.mktemp("jobs")
    with ThreadPoolExecutor(2) as pool:
        jobs: dict[str, Future[str]] = {
            "trixie": pool.submit(build_and_check, roots["trixie-build"], deb.parent),
            "piuparts": pool.submit(piuparts, roots["bookworm"], deb),
            "autopkgtest": pool.submit(autopkgtest, roots["bookworm"], deb, folder / "autopkgtest"),
            "sysvinit": pool.submit(without_systemd, roots["bookworm"], deb),
            "rebuilt": pool.submit(build_elsewhere, folder / "elsewhere"),
        }
        yield lambda name: jobs[name].result()


# Its files and fields.


def test_it_is_small(deb: Path) -> None:
    assert deb.stat().st_size < 300_000


def test_documented_size(deb: Path) -> None:
    """The table that tests/packaging/figures.py writes is up to date."""
    table = documents().partition("<!-- packages -->")[2]
    versions, _, sizes = table.strip().splitlines()[:3]
    assert f" {field(deb, 'Version')} " in versions
    found = re.match(r"\| the package +\| (\d+) kB ", sizes)
    assert found and int(found[1]) == pytest.approx(deb.stat().st_size / 1000, rel=0.1)


def field(deb: Path, name: str) -> str:
    return run(["dpkg-deb", "--field", deb, name]).strip()


def test_dependencies(deb: Path) -> None:
    assert field(deb, "Depends") == "python3:any"
    assert field(deb, "Architecture") == "all"
    assert field(deb, "Recommends") == ""
    assert field(deb, "Suggests") == "munin-node"


def test_it_installs_one_package(deb: Path, roots: Mapping[str, FreshRoot]) -> None:
    roots["bookworm"].folder()
    load = read_load(deb)
    assert (load.packages, load.size) == (1, deb.stat().st_size)


FILES = """
-rw-r--r-- /etc/init.d/transit-relay x
-rw-r--r-- /etc/logrotate.d/transit-relay
-rw-r--r-- /etc/needrestart/conf.d/transit-relay.conf
-rw-r--r-- /etc/transit-relay.conf
-rw-r--r-- /etc/ufw/applications.d/transit-relay
-rw-r--r-- /lib/systemd/system/transit-relay-status.socket
-rw-r--r-- /lib/systemd/system/transit-relay-ws.socket
-rw-r--r-- /lib/systemd/system/transit-relay.service
-rw-r--r-- /lib/systemd/system/transit-relay.socket
-rw-r--r-- /lib/systemd/system/transit-relay@.service
-rw-r--r-- /lib/systemd/system/transit-relay@.socket
-rw-r--r-- /usr/bin/transit-relay-probe x
-rw-r--r-- /usr/lib/firewalld/services/transit-relay.xml
-rw-r--r-- /usr/sbin/transit-relay x
-rw-r--r-- /usr/share/doc/transit-relay/NEWS.md
-rw-r--r-- /usr/share/doc/transit-relay/README.md
-rw-r--r-- /usr/share/doc/transit-relay/changelog.Debian.gz
-rw-r--r-- /usr/share/doc/transit-relay/changelog.gz
-rw-r--r-- /usr/share/doc/transit-relay/copyright
-rw-r--r-- /usr/share/doc/transit-relay/docs/differences.md
-rw-r--r-- /usr/share/doc/transit-relay/docs/growing.md
-rw-r--r-- /usr/share/doc/transit-relay/docs/operating.md
-rw-r--r-- /usr/share/doc/transit-relay/docs/performance.md
-rw-r--r-- /usr/share/doc/transit-relay/docs/protocol.md
-rw-r--r-- /usr/share/doc/transit-relay/docs/status.png
-rw-r--r-- /usr/share/doc/transit-relay/examples/caddy/Caddyfile
-rw-r--r-- /usr/share/doc/transit-relay/examples/gateway.conf
-rw-r--r-- /usr/share/doc/transit-relay/examples/grafana/transit-relay.json
-rw-r--r-- /usr/share/doc/transit-relay/examples/haproxy/transit-relay-many.cfg
-rw-r--r-- /usr/share/doc/transit-relay/examples/haproxy/transit-relay-tcp.cfg
-rw-r--r-- /usr/share/doc/transit-relay/examples/haproxy/transit-relay.cfg
-rw-r--r-- /usr/share/doc/transit-relay/examples/munin/transit-relay.conf
-rw-r--r-- /usr/share/doc/transit-relay/examples/nginx/transit-relay-tcp.conf
-rw-r--r-- /usr/share/doc/transit-relay/examples/nginx/transit-relay.conf
-rw-r--r-- /usr/share/doc/transit-relay/examples/own-listeners.conf
-rw-r--r-- /usr/share/doc/transit-relay/examples/prometheus/prometheus.yml
-rw-r--r-- /usr/share/doc/transit-relay/examples/prometheus/transit-relay.rules.test.yml
-rw-r--r-- /usr/share/doc/transit-relay/examples/prometheus/transit-relay.rules.yml
-rw-r--r-- /usr/share/doc/transit-relay/examples/stunnel/transit-relay.conf
-rw-r--r-- /usr/share/lintian/overrides/transit-relay
-rw-r--r-- /usr/share/man/man1/transit-relay-probe.1.gz
-rw-r--r-- /usr/share/man/man8/transit-relay.8.gz
-rw-r--r-- /usr/share/munin/plugins/wormhole_transit_ x
-rw-r--r-- /usr/share/python3/runtime.d/transit-relay.rtupdate x
-rw-r--r-- /usr/share/transit-relay/status.html
-rw-r--r-- /usr/share/transit-relay/transit_relay.py
-rw-r--r-- /usr/share/transit-relay/transit_relay_gateway.py
-rw-r--r-- /usr/share/transit-relay/transit_relay_probe.py
-rw-r--r-- /usr/share/transit-relay/transit_relay_status.py
-rw-r--r-- /usr/share/transit-relay/transit_relay_sum.py
-rw-r--r-- /usr/share/transit-relay/ws_frames.py
"""


def test_files(deb: Path) -> None:
    listed = run(["dpkg-deb", "--contents", deb])
    found = re.findall(r"^(-\S+) root/root +\d+ \S+ \S+ \.(/.*)$", listed, re.M)
    expected = re.findall(r"^(-\S+) (\S+)( x)?$", FILES, re.M)
    assert sorted((name, mode) for mode, name in found) == [
        (name, mode.replace("-rw-r--r--", "-rwxr-xr-x") if executable else mode)
        for mode, name, executable in expected
    ]


def test_conffiles(deb: Path) -> None:
    assert run(["dpkg-deb", "--info", deb, "conffiles"]).split() == [
        "/etc/init.d/transit-relay",
        "/etc/logrotate.d/transit-relay",
        "/etc/needrestart/conf.d/transit-relay.conf",
        "/etc/transit-relay.conf",
        "/etc/ufw/applications.d/transit-relay",
    ]


def test_an_upgrade_restarts_nothing(deb: Path) -> None:
    """It reloads the service. Admins start the sockets for WebSocket and status."""
    script = run(["dpkg-deb", "--info", deb, "postinst"])
    assert re.findall("deb-systemd-invoke (.+?) >", script) == [
        "start 'transit-relay.socket'",
        "start 'transit-relay.service'",
    ]
    assert re.findall("deb-systemd-invoke (restart|reload) (.+?) ", script) == [
        ("reload", '"$UNIT"')
    ]
    assert "deb-systemd-helper enable 'transit-relay.socket'" in script
    for name in "ws", "status":  # not enabled by a new installation
        assert f"deb-systemd-helper debian-installed 'transit-relay-{name}.socket'" in script


# needrestart sets %nrconf before it reads the files of conf.d. A value of 0 means no restart.
NEEDRESTART = """\
our %nrconf = (override_rc => {});
defined(do $ARGV[0]) or die $@ || $!;
my $patterns = $nrconf{override_rc};
for my $unit (@ARGV[1 .. $#ARGV]) {
    print "$unit ", join(" ", map { $patterns->{$_} } grep { $unit =~ /$_/ } keys %$patterns);
}
"""


def test_needrestart_restarts_no_relay() -> None:
    """It neither restarts the service nor an instance. It may restart other units."""
    file = ROOT / "packaging" / "needrestart" / "transit-relay.conf"
    units = ["transit-relay.service", "transit-relay@1.service", "nottransit-relay.service"]
    assert run(["perl", "-wle", NEEDRESTART, file, *units]).splitlines() == [
        "transit-relay.service 0",
        "transit-relay@1.service 0",
        "nottransit-relay.service ",
    ]


def test_its_exposure_is_least(deb: Path, tmp_path: Path) -> None:
    run(["dpkg-deb", "--extract", deb, tmp_path])
    unit = tmp_path / "lib/systemd/system/transit-relay.service"
    for name in "own-listeners.conf", "gateway.conf":
        drop_in = tmp_path / "usr/share/doc/transit-relay/examples" / name
        assert exposure(unit) <= 0.2 < exposure(unit, drop_in) <= 1.1


def test_a_version_that_differs_from_the_changelog_is_refused(tmp_path: Path) -> None:
    def rename(source: Path) -> None:
        replace_once(source / "transit_relay.py", "^__version__ = .*", '__version__ = "7.8"')

    with pytest.raises(AssertionError, match=r"is 7\.8, packaging/debian/changelog 0\."):
        build_changed(tmp_path / "source", rename)


# The tools of packagers.


def test_lintian_prints_nothing(deb: Path) -> None:
    (changes,) = deb.parent.glob("*.changes")
    assert run([*LINTIAN, changes]) == ""


def test_lintian_finds_a_fault(deb: Path, tmp_path: Path) -> None:
    """Without the man page lintian fails: so it does check the package."""
    folder, faulty = tmp_path / "faulty", tmp_path / "faulty.deb"
    run(["dpkg-deb", "--raw-extract", deb, folder])
    (folder / "usr/share/man/man8/transit-relay.8.gz").unlink()
    run(["dpkg-deb", "--build", "--root-owner-group", folder, faulty])
    done = subprocess.run([*LINTIAN, faulty], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no-manual-page" in done.stdout


# Left out, because it takes 45 s. It finds imports of modules that Python has removed. On trixie,
# test_boot.py runs the relay with Python 3.13, where such an import fails.
SLOW_CHECK = "languages/python/stdlib-deprecation"
BUILD_AND_CHECK = f"""\
mkdir /build
cd /build
dpkg-source --extract /built/*.dsc source >/dev/null
(cd source; DEB_BUILD_OPTIONS=nocheck dpkg-buildpackage -us -uc >/build/log 2>&1) ||
    {{ cat log; exit 1; }}
{" ".join(LINTIAN)} --suppress-tags out-of-date-standards-version -X {SLOW_CHECK} *.changes
dpkg-deb --contents *.deb | grep -c ./usr/lib/systemd/system/transit-relay
"""


def build_and_check(trixie: FreshRoot, built: Path) -> str:
    """Build the source package on trixie, and run trixie's lintian on the result."""
    return trixie.run("sh", "-ec", BUILD_AND_CHECK, binds=[f"{built}:/built"])


def test_lintian_of_trixie_prints_nothing(job: Job) -> None:
    """lintian prints nothing. The line is the number of units, which are in /usr there."""
    assert job("trixie") == "6\n"


def build_elsewhere(folder: Path) -> str:
    """Build it in another folder, at another time, with another umask; return its folder."""
    run(["git", "clone", "-q", "--shared", ROOT, folder])
    run(
        ["sh", "-c", "umask 077; exec faketime -f +500d make -s deb"],
        cwd=folder,
        env={"TZ": "Asia/Tokyo", "HOME": "/nonexistent", "DEB_BUILD_OPTIONS": "nocheck"},
    )
    return str(folder / "build" / "deb")


def digests(folder: Path) -> dict[str, str]:
    """Return the digests of the built files, without .buildinfo and .changes: these have a date."""
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in folder.iterdir()
        if file.suffix in (".deb", ".xz", ".dsc")
    }


def build_date(folder: Path) -> float:
    """Return the time of the build in the .buildinfo."""
    (info,) = folder.glob("*.buildinfo")
    (date,) = re.findall("^Build-Date: (.*)", info.read_text(), re.M)
    return parsedate_to_datetime(date).timestamp()


def test_it_is_the_same_byte_for_byte(job: Job, deb: Path) -> None:
    first, second = deb.parent, Path(job("rebuilt"))
    assert len(digests(first)) == 4
    assert digests(second) == digests(first)
    assert build_date(second) - build_date(first) > 400 * 86_400  # faketime had an effect


def piuparts(bookworm: FreshRoot, deb: Path) -> str:
    """Let piuparts install, remove and purge it, and compare all files."""
    command = ["piuparts", "--no-eatmydata", "--keep-sources-list", "--distribution=bookworm"]
    return run([*command, f"--existing-chroot={bookworm.folder()}", deb])


def test_piuparts(job: Job) -> None:
    output = job("piuparts")
    assert "PASS: All tests." in output
    assert "WARN" not in output


# A writable root folder with devices and its own loopback interface. No process namespace: its
# process 1 would have to reap the other processes.
ISOLATED = ["unshare", "--mount", "--net"]
AUTOPKGTEST = """\
cp -a "$1" "$2"
mount --rbind /dev "$2/dev"
mount -t proc proc "$2/proc"
ip link set lo up
exec autopkgtest --copy="$3:/tmp/relay.deb" --setup-commands="dpkg -i /tmp/relay.deb" \
    --ignore-restrictions=isolation-container -B "$4" -- chroot "$2"
"""


def autopkgtest(bookworm: FreshRoot, deb: Path, copy: Path) -> str:
    """Run the package's own tests where it is installed."""
    (source,) = (folder for folder in deb.parent.iterdir() if folder.is_dir())
    arguments = [bookworm.folder(), copy, deb, f"{source}/"]
    output = run([*ISOLATED, "sh", "-ec", AUTOPKGTEST, "sh", *arguments])
    run(["rm", "-rf", copy])
    return output


def test_autopkgtest(job: Job) -> None:
    assert re.search(r"^smoke +PASS$", job("autopkgtest"), re.M)


def without_systemd(bookworm: FreshRoot, deb: Path) -> str:
    """Install, use and remove it on a system without systemd, as with sysvinit."""
    smoke = ROOT / "packaging/debian/tests/smoke"
    binds = [f"{deb}:/relay.deb", f"{smoke}:/smoke", f"{HERE}/without_systemd.sh:/script"]
    return bookworm.run("sh", "/script", binds=binds)


def test_its_init_script(job: Job) -> None:
    output = job("sysvinit")
    for line in [
        "runs as daemon",
        "is not started twice",
        "/run/transit-relay: directory of daemon, 755",
        "/run/transit-relay/status.sock: socket, 666",
        "relays",
        "reloads in the same process",
        "a refused reload says why",
        "an upgrade reloads",
        "0 are left after a stop",
        "/var/lib/transit-relay: directory of daemon, 700",
        "1 runs before the removal",
        "0 are left after the removal",
        "nothing is left",
    ]:
        assert f"\n{line}\n" in output, output
