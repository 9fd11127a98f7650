# SPDX-License-Identifier: Apache-2.0
"""The shape of the source tree, held to what docs/architecture.md says of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "pullback"

# Package: the packages of pullback it may import besides itself; "errors" is the module of that name.
MAY_IMPORT = {
    "errors": set(),
    "model": {"errors"},
    "plan": {"errors", "model"},
    "documents": {"errors", "model"},
    "nbd": {"errors"},
    "qemu": {"errors", "model", "plan"},
    "repository": {"errors", "model"},
    "engine": {"errors", "model", "plan", "nbd", "qemu", "repository"},
    "cli": {"errors", "model", "plan", "nbd", "qemu", "repository", "engine", "documents"},
}
PURE = ("model", "plan")
# What a pure module may use of the standard library.  An allowlist: what is new is looked at once.
PURE_MODULES = {"__future__", "collections", "dataclasses", "datetime", "enum", "itertools", "json", "re", "typing"}
CLOCK = {"now", "utcnow", "today"}
LONGEST_MODULE = 399
LONGEST_FUNCTION = 40
# Functions that are longer, each with the reason.
LONG = {
    "cli.repositories.forget": "the options of a command are its signature",
    "cli.backups.backup": "the options of a command are its signature",
    "cli.restoring.restore": "the options of a command are its signature",
    "cli.exports.start": "the options of a command are its signature",
    "cli.serving.serve": "the options of a command are its signature",
    "cli.snapshots.create": "the options of a command are its signature",
}
VAGUE = {"util", "utils", "common", "helper", "helpers", "manager", "managers", "misc"}


@dataclass(frozen=True)
class Module:
    name: str
    path: Path
    text: str

    @property
    def package(self) -> str:
        """The first part of the name: ``errors``, ``model``, ... ; empty for the package pullback itself."""
        return self.name.partition(".")[0]

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    def imports(self, top: bool = False) -> Iterator[str]:
        """Everything imported in it, inside functions as well unless ``top``; for ``from a import b`` it is ``a.b``."""
        for node in ast.iter_child_nodes(self.tree) if top else ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.name} uses a relative import"
                yield from (f"{node.module}.{alias.name}" for alias in node.names)

    def own_imports(self, top: bool = False) -> set[str]:
        """The modules of pullback it imports, without the prefix ``pullback.``; "" is the package itself."""
        found = set()
        for name in self.imports(top):
            parts = name.split(".")
            if parts[0] == "pullback":
                rest = parts[1:]
                while rest and ".".join(rest) not in NAMES:
                    rest = rest[:-1]
                found.add(".".join(rest))
        return found

    def functions(self) -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
        stack: list[tuple[str, ast.AST]] = [(self.name, self.tree)]
        while stack:
            place, node = stack.pop()
            for child in ast.iter_child_nodes(node):
                inner = place
                if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inner = f"{place}.{child.name}"
                    if not isinstance(child, ast.ClassDef):
                        yield inner, child
                stack.append((inner, child))


def _modules() -> list[Module]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = list(path.relative_to(SOURCE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        found.append(Module(".".join(parts), path, path.read_text()))
    return found


MODULES = _modules()
MODULE = {module.name: module for module in MODULES}
NAMES = set(MODULE)
pure = pytest.mark.parametrize("module", [m for m in MODULES if m.package in PURE], ids=lambda m: m.name)
every = pytest.mark.parametrize("module", MODULES, ids=lambda m: m.name or "pullback")


def test_all_packages_are_there():
    packages = {module.package for module in MODULES if module.package}
    assert packages == set(MAY_IMPORT), "a package came or went: say in MAY_IMPORT and docs/architecture.md what it may"


@every
def test_packages_import_only_what_they_may(module: Module):
    allowed = MAY_IMPORT.get(module.package, {"engine", "errors"}) | {module.package}
    wrong = {name for name in module.own_imports() if name and name.partition(".")[0] not in allowed}
    assert not wrong, f"{module.name} imports {', '.join(sorted(wrong))}"


@pytest.mark.parametrize("package", ["model", "plan", "documents", "nbd", "qemu", "repository"])
def test_only_the_engine_and_the_cli_know_the_version(package: str):
    """``import pullback`` below them would be a way round the rules, once the package re-exports anything."""
    for module in MODULES:
        if module.package == package:
            assert "" not in module.own_imports(), module.name


@pure
def test_decisions_import_nothing_that_acts(module: Module):
    foreign = {name.partition(".")[0] for name in module.imports()} - {"pullback"}
    assert foreign <= PURE_MODULES, f"{module.name} imports {', '.join(sorted(foreign - PURE_MODULES))}"


@pure
def test_decisions_take_the_time_as_a_parameter(module: Module):
    names = {node.attr for node in ast.walk(module.tree) if isinstance(node, ast.Attribute)}
    assert not names & CLOCK, f"{module.name} asks the clock"


@pure
def test_decisions_open_nothing(module: Module):
    calls = {
        node.func.id for node in ast.walk(module.tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
    }
    assert not calls & {"open", "print", "input", "eval", "exec", "__import__"}, module.name


def test_no_import_cycle():
    edges = {module.name: module.own_imports() - {module.name} for module in MODULES}
    done: set[str] = set()
    while ready := {name for name, needs in edges.items() if name not in done and needs <= done}:
        done |= ready
    assert done == NAMES, f"these import each other in a circle (or what does): {', '.join(sorted(NAMES - done))}"


@every
def test_module_is_short_and_has_its_licence(module: Module):
    lines = module.text.splitlines()
    assert len(lines) <= LONGEST_MODULE, f"{module.path.name} has {len(lines)} lines"
    assert lines[0] == "# SPDX-License-Identifier: Apache-2.0"


@pytest.mark.parametrize("place", ["tests", "lab", "demo", "scripts"])
def test_everything_else_has_its_licence_too(place: str):
    first = "# SPDX-License-Identifier: Apache-2.0\n"
    without = [path.name for path in sorted((ROOT / place).rglob("*.py")) if not path.read_text().startswith(first)]
    assert not without


@every
def test_no_vague_names(module: Module):
    assert not VAGUE & set(module.name.split(".")), module.name


def test_functions_are_short():
    long = {
        name.removeprefix("."): node.end_lineno - node.lineno + 1
        for module in MODULES
        for name, node in module.functions()
        if node.end_lineno is not None and node.end_lineno - node.lineno >= LONGEST_FUNCTION
    }
    unexplained = {name: lines for name, lines in long.items() if name not in LONG}
    assert not unexplained, f"over {LONGEST_FUNCTION} lines: {unexplained}"
    assert set(LONG) <= set(long), f"short again, take them off the list: {set(LONG) - set(long)}"


ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()


def test_the_page_on_architecture_draws_every_package_and_every_decision():
    tree = ARCHITECTURE.partition("## The tree")[2].partition("## Who may")[0]
    for package in MAY_IMPORT:
        assert f"  {package}{'.py' if package == 'errors' else '/'} " in tree, package
    words = set(re.findall(r"\w+", tree))
    missing = [module.name for module in MODULES if module.package in PURE and "." in module.name]
    missing = [name for name in missing if name.split(".")[1] not in words]
    assert not missing, f"docs/architecture.md does not say what these are for: {missing}"


def test_the_page_on_architecture_names_only_what_there_is():
    dotted = set(re.findall(rf"`((?:{'|'.join(MAY_IMPORT)})(?:\.\w+)+)`", ARCHITECTURE))
    assert len(dotted) > 10
    for name in dotted - {"errors.py"}:
        module = next(one for one in sorted(MODULES, key=lambda one: -len(one.name)) if name.startswith(one.name + "."))
        defined = {place for place, _ in module.functions()}
        defined |= {f"{module.name}.{node.name}" for node in module.tree.body if isinstance(node, ast.ClassDef)}
        assert name in defined, name
    for name in re.findall(r"`((?:src|tests|[a-z]+)/[\w/]+(?:\.py)?)/?`", ARCHITECTURE):
        assert (ROOT / name).exists() or (SOURCE / name).exists(), name
