"""The text of the program: its sections, their order and sizes, and the calls between them."""

from __future__ import annotations

import ast
import copy
import dis
import itertools
import re
import subprocess
import symtable
import sys
import types
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from helpers import RELAY, TIMEOUT

import transit_relay
import ws_frames

SOURCE = RELAY.read_text(encoding="utf-8")
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)
BANNER = re.compile(r"# ([A-Z].*?) -+")  # 95 columns, then the description of the section
HEAD = "(head)"  # the lines before the first section


class Section(NamedTuple):
    """A part of the program, from one banner to the next."""

    name: str
    first: int  # number of its first line, from 1 on
    last: int


def find_sections() -> list[Section]:
    """Return the head, then each section. Its banner begins with its name."""
    banners = {n: found for n, line in enumerate(LINES, 1) if (found := BANNER.fullmatch(line))}
    starts = [1, *banners]
    ends = [*(n - 1 for n in banners), len(LINES)]
    names = [HEAD, *(found[1] for found in banners.values())]
    return [Section(*found) for found in zip(names, starts, ends)]


SECTIONS = find_sections()
NAMES = [section.name for section in SECTIONS]


def statements(section: Section) -> list[ast.stmt]:
    """Return the statements of a section."""
    return [node for node in TREE.body if section.first <= node.lineno <= section.last]


class WithoutAnnotations(ast.NodeTransformer):
    """Removes annotations. They are not evaluated (`from __future__ import annotations`)."""

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
    """Yield the module's names that this code uses when it runs, functions and classes included."""
    for symbol in table.get_symbols():
        at_the_top = table.get_type() == "module"
        if symbol.is_referenced() and (at_the_top or symbol.is_global()):
            yield symbol.get_name()
    for inner in table.get_children():
        yield from globals_used(inner)


def names_used(section: Section) -> set[str]:
    """Return the module's names that a section uses at run time."""
    body = [WithoutAnnotations().visit(copy.deepcopy(node)) for node in statements(section)]
    text = ast.unparse(ast.fix_missing_locations(ast.Module(body, [])))
    return set(globals_used(symtable.symtable(text, section.name, "exec")))


def names_defined(section: Section) -> set[str]:
    """Return the module's names that a section defines."""
    text = ast.unparse(ast.Module(statements(section), []))
    table = symtable.symtable(text, section.name, "exec")
    return {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }


DEFINED = {section.name: names_defined(section) for section in SECTIONS}


def test_the_sections_are_found() -> None:
    """The other tests depend on it."""
    assert NAMES[:2] == [HEAD, "Constants and errors"] and NAMES[-1] == "Start and stop"
    assert {len(LINES[section.first - 1]) for section in SECTIONS[1:]} == {95}
    assert {"UsageRecord", "Current", "Snapshot", "blur_size"} < DEFINED["Records"]
    assert "blur_size" in names_used(SECTIONS[NAMES.index("Records")])


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_a_section_uses_names_of_sections_above_only(section: Section) -> None:
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
    first = SECTIONS[NAMES.index("Session")].first
    last = SECTIONS[NAMES.index("Recorder")].last
    assert last - first + 1 <= 2300
    # The aim is 5,000 lines. The reload and the counters took the file beyond that.
    assert len(LINES) <= 6520


def test_the_module_docstring_lists_the_sections_in_order() -> None:
    rows = re.findall(r"^ {4}(\S.*?) {2,}\S", ast.get_docstring(TREE, clean=False) or "", re.M)
    assert [re.findall(r"\w+", row)[0] for row in rows] == [name.split()[0] for name in NAMES[1:]]
    assert all(row.replace(", ", " and ") in name for row, name in zip(rows, NAMES[1:]))


def test_each_banner_describes_its_section() -> None:
    for section in SECTIONS[1:]:
        lines = LINES[section.first - 1 : section.last]
        banner = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
        assert 2 <= len(banner) <= 20 and lines[len(banner)] == "", section.name


def modules_imported(tree: ast.Module) -> set[str]:
    """Return the modules that a program imports, in functions too."""
    modules = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level
            modules.add(node.module)
    return modules


WS_FRAMES = ast.parse(RELAY.with_name("ws_frames.py").read_text(encoding="utf-8"))


def test_imports_are_of_the_standard_library() -> None:
    """A Python without site-packages can import them. ws_frames is ours, and may be missing."""
    modules = modules_imported(TREE) - {"ws_frames"} | modules_imported(WS_FRAMES)
    program = f"import {', '.join(sorted(modules))}"
    subprocess.run([sys.executable, "-ISc", program], cwd="/", timeout=TIMEOUT, check=True)


def test_ws_frames_does_no_input_and_output() -> None:
    """None of its imports can wait, read a clock or write a message."""
    assert modules_imported(WS_FRAMES) == {
        *("__future__", "binascii", "collections.abc", "hashlib", "ipaddress", "re", "typing")
    }


def unconditional_imports() -> set[str]:
    """Return the modules that each start of the program needs."""
    plain = [node for node in TREE.body if isinstance(node, (ast.Import, ast.ImportFrom))]
    return modules_imported(ast.Module(list(plain), []))


def test_modules_that_may_be_missing_or_cost_much_are_imported_when_needed() -> None:
    """A Python can be built without sqlite3, and one file alone has no ws_frames.

    hashlib needs 3.7 MB, and dataclasses 20 ms on a small machine.
    """
    assert unconditional_imports() & {"sqlite3", "ws_frames", "hashlib", "dataclasses"} == set()
    assert {"sqlite3", "ws_frames"} <= modules_imported(TREE)


def test_ws_frames_is_imported_once_at_the_start() -> None:
    """A later import could find the file of another version."""
    imports = [node for node in ast.walk(TREE) if isinstance(node, ast.Import)]
    (ours,) = (node for node in imports if node.names[0].name == "ws_frames")
    assert any(isinstance(node, ast.Try) and ours in node.body for node in TREE.body)


# The calls that go down the file.


def class_node(name: str, tree: ast.Module = TREE) -> ast.ClassDef:
    """Return the definition of a class of a module."""
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return found


def members(name: str, tree: ast.Module = TREE) -> set[str]:
    """Return the public methods, properties and attributes of a class of a module."""
    found = set()
    for node in ast.walk(class_node(name, tree)):
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found.add(node.target.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and name_of(node.value) == "self"
        ):
            found.add(node.attr)
    return {name for name in found if not name.startswith("_")}


def name_of(node: ast.expr) -> str | None:
    """Return the last name of `a.b.name`, or `name` alone."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


def attributes_of(names: set[str], nodes: list[ast.stmt]) -> set[str]:
    """Return each X of `name.X` and `anything.name.X` in the code, for these names."""
    return {
        node.attr
        for top in nodes
        for node in ast.walk(top)
        if isinstance(node, ast.Attribute) and name_of(node.value) in names
    }


def section(name: str) -> Section:
    """Return a section by its name."""
    return SECTIONS[NAMES.index(name)]


PROTOCOLS = {
    "Session": {"session", "_session"},
    "Transport": {"transport", "_transport"},
    "Stream": {"_stream"},
}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_ws_frames_uses_of_the_relay_is_in_its_protocols(protocol: str) -> None:
    """Every member is used, and none is missing. mypy checks that the relay has them."""
    used = attributes_of(PROTOCOLS[protocol], WS_FRAMES.body)
    assert used == members(protocol, WS_FRAMES)


def test_what_a_connection_uses_of_a_framing_is_the_framing_protocol() -> None:
    """Every member is used, and none is missing."""
    users = ("Session", "Framing", "Connection", "Server", "State")
    nodes = [node for name in users for node in statements(section(name))]
    used = attributes_of({"framing"}, [*nodes, *WS_FRAMES.body])
    assert used == members("Framing", WS_FRAMES)


# Names of a section below that annotations mention: the objects that are handed up.
HANDED_UP = {
    "Records": {"Server"},
    "Rates": {"Connection", "Pair"},
    "Timers": {"Connection"},
    "Session": {"Connection", "Pair", "Rendezvous"},
    "Rendezvous": {"Server"},
    "Framing": {"Connection"},
    "Connection": {"Server"},
    "Accepting": {"Listener", "Server"},
    "Stops": {"Server"},
    "Faults": {"Server"},
    "Bulk": {"Server"},
    "Limits": {"Server"},
    "Server": {"Listener", "Recorder"},
    "Reload": {"Relay"},
}


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_annotations_name_objects_of_sections_above_or_handed_up(section: Section) -> None:
    """A type in an annotation is not evaluated, so Python accepts a later one."""
    later_sections = SECTIONS[SECTIONS.index(section) + 1 :]
    below = {name for later in later_sections for name in DEFINED[later.name]}
    annotations = [
        annotation
        for top in statements(section)
        for node in ast.walk(top)
        for annotation in (getattr(node, "annotation", None), getattr(node, "returns", None))
        if annotation is not None
    ]
    named = {node.id for top in annotations for node in ast.walk(top) if isinstance(node, ast.Name)}
    assert named & below == HANDED_UP.get(section.name, set())


def test_the_version_is_that_of_the_news() -> None:
    news = (RELAY.parent / "NEWS.md").read_text(encoding="utf-8")
    heading = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", news, re.M)
    assert heading and heading[1] == transit_relay.__version__


HOT_PATH = (
    *(transit_relay.Connection.receive, transit_relay.Connection.write, transit_relay.receive_into),
    *(transit_relay.Connection.on_ready, transit_relay.Connection.drain),
    *(transit_relay.Session.bytes_received, transit_relay.RawFraming.receive),
    *(transit_relay.BulkQueue.serve, transit_relay.BulkQueue.move, transit_relay.Server.run_once),
    *(ws_frames.WebSocketFraming.receive, ws_frames.FrameParser.receive),
    *(transit_relay.Faults.guard, transit_relay.Faults.contain, transit_relay.Faults.shed_backlog),
    *(transit_relay.Faults._note_exception, transit_relay.Server._run_turn),
)
FARTHEST_OFFSET = 256  # in instructions: larger numbers are objects that need memory


@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="each version has other offsets")
@pytest.mark.parametrize("function", HOT_PATH, ids=lambda function: function.__qualname__)
def test_a_handler_where_memory_runs_out_is_near_the_start(function: types.FunctionType) -> None:
    """See receive_into."""
    table = dis._parse_exception_table(function.__code__)  # type: ignore[attr-defined]
    assert [entry for entry in table if entry.lasti and entry.end // 2 > FARTHEST_OFFSET] == []
