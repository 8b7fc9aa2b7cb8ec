"""What must stay true of the program's text: sections that build upon each other, and no more."""

from __future__ import annotations

import ast
import re
import subprocess
import symtable
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from helpers import RELAY, TIMEOUT

import transit_relay

SOURCE = RELAY.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
RULE = "# " + "-" * 93
HEAD = "(head)"  # what comes before the first section


class Section(NamedTuple):
    """A part of the program, from one banner to the next."""

    name: str
    first: int  # number of its first line, from 1 on
    last: int


def find_sections() -> list[Section]:
    """The head, then each section that has a banner: a rule, its name, and a rule at the end."""
    banners = [n for n, (a, b) in enumerate(zip(LINES, LINES[1:]), 1) if a == RULE and b[2:3]]
    banners = [n for n in banners if re.fullmatch("# [A-Z].*", LINES[n])]
    starts = [1, *banners]
    ends = [*(n - 1 for n in banners), len(LINES)]
    names = [HEAD, *(LINES[n][2:] for n in banners)]
    return [Section(*found) for found in zip(names, starts, ends)]


SECTIONS = find_sections()
NAMES = [section.name for section in SECTIONS]


def statements(section: Section) -> list[ast.stmt]:
    """The statements of a section."""
    return [node for node in TREE.body if section.first <= node.lineno <= section.last]


class WithoutAnnotations(ast.NodeTransformer):
    """Takes out what is never evaluated, because of `from __future__ import annotations`."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        return ast.arg(node.arg)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if node.value is None:
            return ast.copy_location(ast.Pass(), node)
        target = ast.copy_location(ast.Assign([node.target], node.value), node)
        return self.generic_visit(target)


def globals_used(table: symtable.SymbolTable) -> Iterator[str]:
    """The module's names that are used when this code runs, in all its functions and classes."""
    for symbol in table.get_symbols():
        at_the_top = table.get_type() == "module"
        if symbol.is_referenced() and (at_the_top or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from globals_used(inner)


def names_used(section: Section) -> set[str]:
    """The module's names that a section uses at run time."""
    body = [WithoutAnnotations().visit(node) for node in statements(section)]
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    return set(globals_used(symtable.symtable(text, section.name, "exec")))


def names_defined(section: Section) -> set[str]:
    """The module's names that a section defines."""
    text = ast.unparse(ast.Module(statements(section), []))
    table = symtable.symtable(text, section.name, "exec")
    return {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }


DEFINED = {section.name: names_defined(section) for section in SECTIONS}


def test_the_sections_are_found() -> None:
    """All else here stands on it."""
    assert NAMES[:2] == [HEAD, "Constants and errors"] and NAMES[-1] == "Start and stop"
    assert LINES.count(RULE) == 2 * (len(SECTIONS) - 1)
    assert {"UsageRecord", "Current", "Snapshot", "blur_size"} == DEFINED["Records"]
    assert "blur_size" in names_used(SECTIONS[NAMES.index("Records")])


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_a_section_uses_only_what_stands_above_it(section: Section) -> None:
    below = SECTIONS[SECTIONS.index(section) + 1 :]
    used = names_used(section)
    assert {
        f"{name} of {later.name}" for later in below for name in DEFINED[later.name] & used
    } == set()


def test_no_name_is_defined_in_two_sections() -> None:
    defined = [name for names in DEFINED.values() for name in names]
    assert sorted(defined) == sorted(set(defined))


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_a_section_is_short(section: Section) -> None:
    assert section.last - section.first + 1 <= 350


def test_the_core_and_the_whole_are_short() -> None:
    first = SECTIONS[NAMES.index("Session and Rendezvous")].first
    last = SECTIONS[NAMES.index("Recorder")].last
    assert last - first + 1 <= 2300
    assert len(LINES) <= 5000


def test_the_map_lists_the_sections() -> None:
    """In their order. A row of the map names a section by its first word."""
    rows = re.findall(r"^ {4}(\S.*?) {2,}\S", ast.get_docstring(TREE, clean=False) or "", re.M)
    assert [re.findall(r"\w+", row)[0] for row in rows] == [name.split()[0] for name in NAMES[1:]]
    assert all(row.replace(", ", " and ") in name for row, name in zip(rows, NAMES[1:]))


def test_a_banner_says_what_its_section_is() -> None:
    for section in SECTIONS[1:]:
        banner = LINES[section.first - 1 : LINES.index(RULE, section.first) + 1]
        assert banner[2] == "#" and 5 <= len(banner) <= 25, section.name
        assert all(line.startswith("#") for line in banner), section.name


def modules_imported(tree: ast.Module) -> set[str]:
    """The modules that a program imports, wherever in it that stands."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            modules.add(node.module)
    return modules


FRAMER = ast.parse(RELAY.with_name("ws_frames.py").read_text(encoding="utf-8"))


def test_imports_are_of_the_standard_library() -> None:
    """They work in a Python without site-packages. The one that is ours may be missing."""
    modules = modules_imported(TREE) - {"ws_frames"} | modules_imported(FRAMER)
    program = f"import {', '.join(sorted(modules))}"
    subprocess.run([sys.executable, "-ISc", program], cwd="/", timeout=TIMEOUT, check=True)


def test_the_framer_is_pure() -> None:
    """It cannot wait, look at a clock or say anything: it has nothing to do that with."""
    assert modules_imported(FRAMER) == {
        *("__future__", "binascii", "collections.abc", "hashlib", "re", "typing")
    }


def test_the_framer_is_looked_for_once() -> None:
    """At the start: later there might be another version's file."""
    imports = [node for node in ast.walk(TREE) if isinstance(node, ast.Import)]
    (ours,) = (node for node in imports if node.names[0].name == "ws_frames")
    assert any(isinstance(node, ast.Try) and ours in node.body for node in TREE.body)


def test_the_version_is_that_of_the_news() -> None:
    news = (RELAY.parent / "NEWS.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", news, re.M)
    assert heading and heading[1] == transit_relay.__version__
