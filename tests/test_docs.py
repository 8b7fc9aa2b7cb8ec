"""`--help`, README.md, the man page and the configuration that packages ship tell the same."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import RELAY

from transit_relay import ENDPOINT_FIELDS, EPILOG, make_parser, read_config

ROOT = RELAY.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAN = (ROOT / "packaging" / "transit-relay.8").read_text(encoding="utf-8")
CONF = ROOT / "packaging" / "transit-relay.conf"


class Option(NamedTuple):
    """What a text says of an option. `meaning` is left out where it says it in its own words."""

    group: str
    name: str  # with what stands behind it: --port ENDPOINT
    default: str
    meaning: str = ""

    @classmethod
    def parse(cls, group: str, name: str, text: str) -> Option:
        """`text`: the meaning, and in brackets at its end the default."""
        match = re.fullmatch(r"(.*) \(default: (.*)\)", " ".join(text.split()))
        assert match, text
        return cls(group.lower(), name, match[2], match[1])

    def in_short(self) -> Option:
        return self._replace(meaning="")


def in_help() -> list[Option]:
    """All options of the program but `--version` and `--help`."""
    parser = make_parser()
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest not in ("version", "help"):
                assert action.help
                text = action.help % {"default": action.default}
                (name,) = action.option_strings
                argument = f" {action.metavar}" if action.metavar else ""
                found.append(Option.parse(str(group.title), name + argument, text))
    return found


def in_readme() -> list[Option]:
    """The rows of its tables of options."""
    found = []
    group = ""
    _, _, options = README.partition("\n## Options\n")
    for line in options.partition("\n## ")[0].splitlines():
        if re.fullmatch(r"[A-Z].*[:,].*", line) and not line.startswith(("An endpoint", "In the")):
            group = re.split("[:,]", line)[0].lower()
        row = re.fullmatch(r"\| `(--[^`]*)` \| .* \| (.*) \|", line)
        if row:
            found.append(Option(group, row[1], row[2].replace("`", "")))
    return found


def in_man() -> list[Option]:
    """The items of its section OPTIONS."""
    section = MAN.partition(".Sh OPTIONS\n")[2].partition("\n.Sh ")[0]
    found = []
    for group in section.split(".Ss ")[1:]:
        title, _, items = group.partition("\n")
        for item in items.split(".It Fl -")[1:]:
            if not item.startswith("version"):
                name, _, text = item.partition("\n")
                text = text.partition("\n.El")[0]
                found.append(Option.parse(title, "--" + name.replace(" Ar ", " "), text))
    return found


def test_all_have_the_same_options_and_defaults_in_the_same_order() -> None:
    told = [option.in_short() for option in in_help()]
    assert len(told) >= 13
    assert told == in_readme()
    assert told == [option.in_short() for option in in_man()]


def test_the_man_page_says_what_help_says() -> None:
    assert in_help() == in_man()


@pytest.mark.parametrize("text", [EPILOG, README, MAN], ids=["help", "README", "man page"])
@pytest.mark.parametrize("kind", ENDPOINT_FIELDS)
def test_endpoints(text: str, kind: str) -> None:
    unsaid = {"address", "port", "fileno", "lockfile", "domain"}  # by position, or needless
    assert f"{kind}:" in text
    for field in set(ENDPOINT_FIELDS[kind]) - unsaid:
        assert f"{field}=" in text


def test_exit_codes() -> None:
    codes = dict(re.findall(r"([0-2]) ((?:stopped|the system|wrong)[^\n]*?)(?: {4}|\n)", EPILOG))
    assert codes == {
        "0": "stopped, all records written",
        "1": "the system refused, or records were lost",
        "2": "wrong command line or configuration",
    }
    items = MAN.partition(".Sh EXIT STATUS\n")[2].partition(".El")[0].split(".It ")[1:]
    assert [item[0] for item in items] == list(codes)
    for item in items:
        assert item[2:].startswith(codes[item[0]])


def test_commands_for_the_administrator() -> None:
    """What is to be typed for systemd: the same in the man page."""
    section = README.partition("\n## With systemd\n")[2].partition("\n## ")[0]
    in_readme = re.findall(r"(?m)(?:^ {4}.*\n)+", section)
    in_man = re.findall(r"\.Bd -literal -offset indent\n(.*?)\.Ed\n", MAN, re.S)
    spelled = [block.replace(r"\-", "-").replace(r"\e", "\\") for block in in_man]
    told = [re.sub("(?m)^ {4}", "", block) for block in in_readme]
    assert len(told) == 3
    assert told == [block for block in spelled if "systemctl" in block]


# What packages put at /etc/transit-relay.conf.


def read_conf(text: str, tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "relay.conf"
    file.write_text(text)
    configured = argparse.Namespace()
    read_config(str(file), make_parser(), configured)
    return vars(configured)


def test_the_packages_configuration_records_blurred(tmp_path: Path) -> None:
    assert read_conf(CONF.read_text(), tmp_path) == {
        "usage_db": "/var/lib/transit-relay/usage.sqlite",
        "blur_usage": 3600,
    }


def test_what_it_shows_can_be_used(tmp_path: Path) -> None:
    """With the marks of comments taken off what is one word, or one and its value."""
    names = "|".join(option.name[2:].split()[0] for option in in_help())
    text = re.sub(rf"(?m)^#(?=(?:{names})(?: \S+)?$)", "", CONF.read_text())
    shown = set(read_conf(text, tmp_path))
    assert shown >= {"port", "websocket", "websocket_url", "handshake_timeout", "no_splice"}
    assert not shown & {"daemonize", "pidfile", "user"}  # the unit's, or the init script's
