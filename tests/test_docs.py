"""Compare the documents with the program, with the files that they name, and with each other."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from helpers import RELAY

from transit_relay import ENDPOINT_FIELDS, EPILOG, make_parser, read_config

ROOT = RELAY.parent
PACKAGING = ROOT / "packaging"
MAN_PAGE = PACKAGING / "transit-relay.8"
CONF = PACKAGING / "transit-relay.conf"
DOCUMENTS = [ROOT / "README.md", ROOT / "NEWS.md", *sorted(ROOT.glob("docs/*.md"))]
NAMES = [str(document.relative_to(ROOT)) for document in DOCUMENTS]
PROGRAMS = ("caddy", "grafana", "haproxy", "nginx", "prometheus", "stunnel")
RECIPES = sorted(file for program in PROGRAMS for file in (PACKAGING / program).iterdir())

README = (ROOT / "README.md").read_text(encoding="utf-8")
OPERATING = (ROOT / "docs" / "operating.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
MAN = MAN_PAGE.read_text(encoding="utf-8")


def section_of(document: str, heading: str) -> str:
    """Return the text below a heading of the second level."""
    _, found, after = document.partition(f"\n## {heading}\n")
    assert found, heading
    return after.partition("\n## ")[0]


def code_blocks(text: str) -> list[str]:
    """Return the indented blocks, without their indentation."""
    return [re.sub("(?m)^ {4}", "", block) for block in re.findall(r"(?m)(?:^ {4}.*\n)+", text)]


def man_section(name: str) -> str:
    """Return a section of the man page."""
    return MAN.partition(f".Sh {name}\n")[2].partition("\n.Sh ")[0]


def man_displays(section: str) -> list[str]:
    """Return the literal displays of a section of the man page, without its escapes."""
    text = man_section(section)
    displays = re.findall(r"(?ms)^\.Bd -literal -offset indent\n(.*?)^\.Ed$", text)
    return [text.replace(r"\-", "-").replace(r"\e", "\\") for text in displays]


# The options: --help, README.md and the man page.


class Option(NamedTuple):
    """An option as a text describes it. `meaning` is empty where the text has its own words."""

    group: str
    name: str  # with its short form and its argument: -p, --port ENDPOINT
    default: str
    meaning: str = ""

    @classmethod
    def parse(cls, group: str, name: str, text: str) -> Option:
        """Split `text` into the meaning and the default, which stands in brackets at the end."""
        match = re.fullmatch(r"(.*) \(default: (.*)\)", " ".join(text.split()))
        assert match, text
        return cls(group.lower(), name, match[2], match[1])

    def without_meaning(self) -> Option:
        return self._replace(meaning="")

    @property
    def long_name(self) -> str:
        """The name as a configuration file spells it."""
        return re.findall("--([a-z-]+)", self.name)[0]


def options_of_help() -> list[Option]:
    """Return all options that --help lists, except --version and --help."""
    parser = make_parser()
    found = []
    for group in parser._action_groups:
        for action in group._group_actions:
            if action.dest in ("version", "help") or action.help == argparse.SUPPRESS:
                continue
            assert action.help
            argument = f" {action.metavar}" if action.metavar else ""
            name = ", ".join(action.option_strings) + argument
            text = action.help % {"default": action.default}
            found.append(Option.parse(str(group.title), name, text))
    return found


def options_of_readme() -> list[Option]:
    """Return the rows of the table of options."""
    found = []
    group = ""
    for line in section_of(README, "Options").splitlines():
        heading = re.fullmatch(r"\| \*\*(.*)\*\* \| \| \|", line)
        row = re.fullmatch(r"\| (`-[^|]*`) \| .* \| (.*) \|", line)
        if heading:
            group = heading[1].lower()
        elif row and group != "about":
            name, default = row[1].replace("`", ""), row[2].replace("`", "")
            found.append(Option(group, name, default))
    return found


def options_of_man() -> list[Option]:
    """Return the items of the section OPTIONS."""
    found = []
    for group in man_section("OPTIONS").split(".Ss ")[1:]:
        title, _, items = group.partition("\n")
        if title == "About":
            continue
        for item in items.split(".It ")[1:]:
            macros, _, text = item.partition("\n")
            name = macros.replace("Fl ", "-").replace(" ,", ",").replace(" Ar ", " ")
            found.append(Option.parse(title, name, text.partition("\n.El")[0]))
    return found


def test_all_have_the_same_options_and_defaults_in_the_same_order() -> None:
    expected = [option.without_meaning() for option in options_of_help()]
    assert len(expected) >= 13
    assert expected == options_of_readme()
    assert expected == [option.without_meaning() for option in options_of_man()]


def test_the_man_page_has_the_texts_of_help() -> None:
    assert options_of_help() == options_of_man()


@pytest.mark.parametrize("text", [EPILOG, README, MAN], ids=["help", "README", "man page"])
@pytest.mark.parametrize("kind", ENDPOINT_FIELDS)
def test_endpoints(text: str, kind: str) -> None:
    """A text shows each kind of endpoint and each field that must be named."""
    unnamed = {"address", "port", "fileno", "lockfile", "domain"}  # by position, or ignored
    assert f"{kind}:" in text
    for field in set(ENDPOINT_FIELDS[kind]) - unnamed:
        assert f"{field}=" in text


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_options_in_a_document_exist(document: Path) -> None:
    options = {name for action in make_parser()._actions for name in action.option_strings}
    assert set(re.findall("`(--[a-z-]+)", document.read_text(encoding="utf-8"))) <= options


def test_exit_codes() -> None:
    codes = dict(re.findall(r"([0-2]) ((?:stopped|the system|wrong)[^\n]*?)(?: {4}|\n)", EPILOG))
    assert codes == {
        "0": "stopped, all records written",
        "1": "the system refused, or records were lost",
        "2": "wrong command line or configuration",
    }
    items = man_section("EXIT STATUS").partition(".El")[0].split(".It ")[1:]
    rows = re.findall(r"\| ([0-9]+) \| (.*) \|\n", section_of(OPERATING, "Exit codes"))
    assert [item[0] for item in items] == [row[0] for row in rows] == list(codes)
    for item, row in zip(items, rows):
        assert item[2:].startswith(codes[item[0]])
        assert row[1].startswith(codes[row[0]])


def test_signals() -> None:
    documented = set(re.findall("SIG[A-Z0-9]+", section_of(OPERATING, "Signals")))
    for text in EPILOG, man_section("SIGNALS"):
        named = set(re.findall("SIG[A-Z0-9]+", text))
        assert "SIGTERM" in named and named <= documented


def test_commands_for_the_administrator() -> None:
    """The commands for systemd are the same in docs/operating.md and in the man page."""
    commands = code_blocks(section_of(OPERATING, "With systemd"))
    assert len(commands) == 5
    assert commands == man_displays("SYSTEMD")


def test_the_example_of_a_configuration() -> None:
    """The example is the same in README.md and in the man page."""
    (example,) = man_displays("CONFIGURATION FILE")
    assert example in code_blocks(section_of(README, "Options"))


# The files: lengths, links, names, recipes.


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) < 200


def anchor(heading: str) -> str:
    """Return the anchor that Markdown makes of a heading."""
    return re.sub("[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-")


def anchors_of(document: Path) -> set[str]:
    headings = re.findall("(?m)^#+ (.*)$", document.read_text(encoding="utf-8"))
    return {anchor(heading) for heading in headings}


def links_of(document: Path) -> Iterator[tuple[Path, str]]:
    """Yield the file and the anchor of each link to a file."""
    for target in re.findall(r"\]\(([^)]+)\)", document.read_text(encoding="utf-8")):
        if not target.startswith("https://"):
            path, _, fragment = target.partition("#")
            yield (document.parent / path if path else document), fragment


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_links(document: Path) -> None:
    for file, fragment in links_of(document):
        assert file.is_file(), file
        assert not fragment or fragment in anchors_of(file), fragment


def test_the_readme_links_every_document() -> None:
    linked = {file.resolve() for file, _ in links_of(ROOT / "README.md")}
    assert linked >= set(DOCUMENTS) - {ROOT / "README.md"}


FILE_NAME = r"(?<![\w./-])(?:(?:docs|packaging|tests)/[\w./-]*\w|\w+\.py\b|[A-Z]+\.md\b)"


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_files_that_a_document_names_exist(document: Path) -> None:
    named = re.findall(FILE_NAME, document.read_text(encoding="utf-8"))
    folders = (
        ROOT,
        PACKAGING / "status-page",
        PACKAGING / "gateway",
    )  # of a module, its name alone is enough
    assert [name for name in named if not any((one / name).exists() for one in folders)] == []


def test_a_recipe_is_a_file() -> None:
    """docs/operating.md names each recipe. No document repeats a line of one."""
    lines = {
        line.strip()
        for document in DOCUMENTS
        for line in document.read_text(encoding="utf-8").splitlines()
    }
    for recipe in RECIPES:
        assert f"`{recipe.relative_to(ROOT)}`" in OPERATING
        settings = {line.strip() for line in recipe.read_text(encoding="utf-8").splitlines()}
        shared = {line for line in settings & lines if line[:1] not in ("", "#", ";", "}")}
        assert shared == set()


# The packages: what they install of these files.


def listed(name: str) -> list[Path]:
    """Return the files and folders that a list of the Debian package names."""
    return [ROOT / line for line in (PACKAGING / "debian" / name).read_text().split()]


def installed_by_debian() -> set[str]:
    """Return the files in /usr/share/doc/transit-relay, relative to it, before compression."""
    found = set()
    for folder, paths in ("", listed("docs")), ("examples/", listed("examples")):
        for path in paths:
            files = path.iterdir() if path.is_dir() else [path]
            base = path.parent
            found |= {f"{folder}{file.relative_to(base)}" for file in files}
    for line in (PACKAGING / "debian" / "install").read_text(encoding="utf-8").splitlines():
        pattern, target = line.split()
        _, is_documentation, folder = target.partition("usr/share/doc/transit-relay/")
        if is_documentation:
            found |= {f"{folder}/{file.name}" for file in ROOT.glob(pattern)}
    return found


def test_the_debian_package_installs_the_documents_and_the_recipes() -> None:
    expected = {"README.md", "NEWS.md"}
    expected |= {str(file.relative_to(ROOT)) for file in ROOT.glob("docs/*")}
    expected |= {f"examples/{recipe.relative_to(PACKAGING)}" for recipe in RECIPES}
    expected |= {
        "examples/munin/transit-relay.conf",
        "examples/gateway.conf",
        "examples/own-listeners.conf",
    }
    assert installed_by_debian() == expected


def test_the_rpm_installs_the_same() -> None:
    spec = (PACKAGING / "rpm" / "transit-relay.spec").read_text(encoding="utf-8")
    folders: dict[str, list[str]] = {}
    for target, files in re.findall(
        r"(?m)^install -D -m 644 -t %\{buildroot\}%\{_datadir\}/doc/%\{name\}(\S*) (.*)$", spec
    ):
        folders[target.lstrip("/")] = files.split()
    installed = set()
    for folder, patterns in folders.items():
        for pattern in patterns:
            found = list(ROOT.glob(pattern))
            assert found, pattern
            installed |= {str(Path(folder, file.name)) for file in found}
    assert installed == installed_by_debian()


@pytest.mark.parametrize("file", [*DOCUMENTS, MAN_PAGE, CONF], ids=lambda file: file.name)
def test_installed_files_that_a_text_names_exist(file: Path) -> None:
    text = file.read_text(encoding="utf-8").replace(r"\-", "-")
    for name in re.findall(r"/usr/share/doc/transit-relay/([\w./-]*\w)", text):
        assert any(known == name or known.startswith(f"{name}/") for known in installed_by_debian())


@pytest.mark.parametrize("name", ["bench", "packages"])
def test_measured_tables_have_their_marks(name: str) -> None:
    """The programs that measure put their tables between these lines."""
    _, _, after = PERFORMANCE.partition(f"\n<!-- {name} -->\n")
    table, end, _ = after.partition(f"\n<!-- end of {name} -->\n")
    assert end and table.count("\n| ") > 3


# The configuration file that packages install as /etc/transit-relay.conf.


def read_conf(text: str, tmp_path: Path) -> dict[str, object]:
    file = tmp_path / "relay.conf"
    file.write_text(text)
    parser = make_parser()
    found = read_config(str(file), parser)
    options = parser.parse_args([argument for _, argument in found])
    return {name: getattr(options, name) for name, _ in found}


def test_the_packages_configuration_records_blurred(tmp_path: Path) -> None:
    assert read_conf(CONF.read_text(), tmp_path) == {
        "usage_db": "/var/lib/transit-relay/usage.sqlite",
        "blur_usage": 3600,
    }


def test_the_examples_in_it_are_valid(tmp_path: Path) -> None:
    """Read the file with each commented-out option switched on: a word, or a word and a value."""
    names = "|".join(option.long_name for option in options_of_help())
    text = re.sub(rf"(?m)^#(?=(?:{names})(?: \S+)?$)", "", CONF.read_text())
    shown = set(read_conf(text, tmp_path))
    actions = make_parser()._option_string_actions
    expected = ("--port", "--websocket", "--websocket-url", "--handshake-timeout", "--no-splice")
    assert shown >= {actions[name].dest for name in expected}
    # The unit or the init script sets these.
    assert not shown & {"daemonize", "pidfile", "user"}
