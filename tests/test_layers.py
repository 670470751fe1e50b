"""The rooms import downwards only, in the order in which CONTRIBUTING.md draws them.

The picture there is not an illustration of a list kept here: it is the list. A module that is not drawn, or drawn and
not there, fails too, so the picture cannot go stale. Every import counts: at module level, inside functions, under
`if TYPE_CHECKING`, and `import_module` with a literal name.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "zarr_dask_stream"

#: Only these modules may know the cluster's libraries.
CLUSTER_NAMES = ("cluster", "payload", "gather", "obituaries", "dask_executor")
CLUSTER_MODULES = {*(f"{PACKAGE}.engine.{name}" for name in CLUSTER_NAMES), f"{PACKAGE}.watch.dashboard"}
CLUSTER_LIBRARIES = {"dask", "distributed"}

#: Modules that compute and decide: clocks and random generators are handed to them, input and output happen elsewhere.
PURE = {
    *("grid", "selection", "shuffle", "samples", "hedging", "windows", "answers"),
    *("retry", "window", "batching", "throttle"),
    *("instructions", "waiting", "quarantine", "queueing", "copies", "isolation", "health", "dispatch", "supervisor"),
    *("account", "chunkmap", "causes", "history", "report", "snapshot", "figures", "board"),
}
IMPURE_LIBRARIES = {"asyncio", "concurrent", "logging", "secrets", "socket", "subprocess", "threading", "time"}


@dataclass(frozen=True)
class Import:
    """One import statement: which module of the package imports which dotted name, and where."""

    importer: str
    target: str
    where: str


class Tree:
    """A package on disk: its modules by dotted name, parsed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = {self._dotted(path): path for path in sorted(folder.rglob("*.py"))}
        self.parsed = {name: ast.parse(path.read_text(), str(path)) for name, path in self.files.items()}

    def _dotted(self, path: Path) -> str:
        parts = path.relative_to(self.folder.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def where(self, name: str, node: ast.AST) -> str:
        return f"{self.files[name].relative_to(self.folder.parent)}:{getattr(node, 'lineno', 1)}"

    def is_package(self, name: str) -> bool:
        return self.files[name].name == "__init__.py"

    def imports(self) -> Iterator[Import]:
        for name, tree in self.parsed.items():
            for node in ast.walk(tree):
                for target in self._targets(name, node):
                    yield Import(name, target, self.where(name, node))

    def _targets(self, name: str, node: ast.AST) -> list[str]:
        match node:
            case ast.Import(names=aliases):
                return [alias.name for alias in aliases]
            case ast.ImportFrom(names=aliases):
                base = self._base(name, node)
                members = [f"{base}.{alias.name}" for alias in aliases]
                return list(dict.fromkeys(member if member in self.files else base for member in members))
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(literal)), *_],
            ):
                return [literal]
            case _:
                return []

    def _base(self, name: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parents = name.split(".")[: (1 if self.is_package(name) else 0) - node.level or None]
        return ".".join([*parents, *([node.module] if node.module else [])])


def picture(text: str) -> list[str]:
    """Return the dotted names of the modules drawn in CONTRIBUTING.md, from top to bottom."""
    block = re.search(rf"^```\w*\n({PACKAGE}/\n.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert block, f"CONTRIBUTING.md has no code block that starts with `{PACKAGE}/`"
    drawn, room = [], ""
    for indent, name, kind in re.findall(r"^( {2,4})(\w+)(/|\.py)", block[1], re.MULTILINE):
        if kind == "/":
            room = f"{name}."
        elif name != "__init__":
            drawn.append(f"{PACKAGE}.{room if len(indent) > 2 else ''}{name}")
    return drawn


def check_drawn(tree: Tree, order: list[str]) -> list[str]:
    modules = {name for name in tree.files if not tree.is_package(name)}
    return [
        *(f"{name} is not in the picture in CONTRIBUTING.md: draw it" for name in sorted(modules - set(order))),
        *(f"{name} is in the picture in CONTRIBUTING.md but does not exist" for name in order if name not in modules),
    ]


def check_direction(tree: Tree, order: list[str]) -> list[str]:
    """A module may import what is drawn above it; no module below `__init__` may import a package's `__init__`."""
    rank = {name: position for position, name in enumerate(order)}
    findings = []
    for found in tree.imports():
        if found.target.split(".")[0] != PACKAGE or tree.is_package(found.importer):
            continue
        if found.target in tree.files and tree.is_package(found.target):
            rule = "is a re-export; import the module that defines the name"
        elif rank.get(found.target, len(order)) >= rank.get(found.importer, len(order)):
            rule = "is upward: a module may import only what the picture draws above it"
        else:
            continue
        findings.append(f"{found.where}: {found.importer} imports {found.target}, which {rule}")
    return findings


def check_cycles(tree: Tree) -> list[str]:
    graph: dict[str, set[str]] = {name: set() for name in tree.files}
    for found in tree.imports():
        if found.target in graph:
            graph[found.importer].add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [f"circular import: {' <- '.join(error.args[1])}"]
    return []


def check_cluster_libraries(tree: Tree) -> list[str]:
    allowed = ", ".join((*CLUSTER_NAMES, "dashboard"))
    return [
        f"{found.where}: {found.importer} imports {found.target}, but only {allowed} may know the cluster"
        for found in tree.imports()
        if found.target.split(".")[0] in CLUSTER_LIBRARIES and found.importer not in CLUSTER_MODULES
    ]


def _draws_from_global_generator(node: ast.AST) -> bool:
    """`random.anything` except the class `random.Random`, and `numpy.random.anything`."""
    match node:
        case ast.Attribute(value=ast.Name(id="random"), attr=attr):
            return attr != "Random"
        case ast.Attribute(value=ast.Attribute(value=ast.Name(id="np" | "numpy"), attr="random"), attr=attr):
            return attr != "Generator"
        case ast.ImportFrom(module="random", names=aliases):
            return any(alias.name != "Random" for alias in aliases)
        case _:
            return False


def check_purity(tree: Tree) -> list[str]:
    pure = {name for name in tree.files if name.rpartition(".")[2] in PURE}
    findings = [
        f"{found.where}: {found.importer} imports {found.target}, but it belongs to the pure core"
        for found in tree.imports()
        if found.importer in pure and found.target.split(".")[0] in IMPURE_LIBRARIES
    ]
    for name in sorted(pure):
        for node in ast.walk(tree.parsed[name]):
            if isinstance(node, ast.Await | ast.AsyncFor | ast.AsyncWith | ast.AsyncFunctionDef):
                findings.append(f"{tree.where(name, node)}: {name} is asynchronous, but it belongs to the pure core")
            elif _draws_from_global_generator(node):
                findings.append(f"{tree.where(name, node)}: {name} draws from a global random generator: take `rng`")
    return findings


def _all_of(node: ast.stmt) -> list[str] | None:
    match node:
        case ast.Assign(targets=[ast.Name(id="__all__")], value=ast.List() as value):
            return [str(name) for name in ast.literal_eval(value)]
        case _:
            return None


def check_re_exports(tree: Tree) -> list[str]:
    """An `__init__` holds a docstring, imports of the package's own names, and a sorted `__all__` of exactly those."""
    findings = []
    for name in filter(tree.is_package, tree.files):
        imported: list[str] = []
        listed: list[str] = []
        for position, node in enumerate(tree.parsed[name].body):
            if isinstance(node, ast.ImportFrom) and tree._base(name, node).split(".")[0] == PACKAGE:
                imported += [alias.asname or alias.name for alias in node.names]
            elif (names := _all_of(node)) is not None:
                listed = names
            elif position or not isinstance(node, ast.Expr):
                findings.append(f"{tree.where(name, node)}: only re-exports and __all__ belong into an __init__")
        if listed != sorted(listed):
            findings.append(f"{name}.__all__ is not sorted")
        if set(listed) != set(imported):
            findings.append(f"{name}.__all__ and its imports differ in {sorted(set(listed) ^ set(imported))}")
    return findings


def check(tree: Tree, order: list[str]) -> list[str]:
    return [
        *check_drawn(tree, order),
        *check_direction(tree, order),
        *check_cycles(tree),
        *check_cluster_libraries(tree),
        *check_purity(tree),
        *check_re_exports(tree),
    ]


def test_the_package_keeps_its_layers() -> None:
    order = picture((ROOT / "CONTRIBUTING.md").read_text())
    findings = check(Tree(ROOT / PACKAGE), order)
    assert not findings, "\n".join(findings)


# The checker itself, on small planted trees

ORDER = [f"{PACKAGE}.{name}" for name in ("errors", "source.grid", "engine.window", "engine.cluster", "stream")]
TIDY = {
    "__init__.py": f'"""Doc."""\n\nfrom {PACKAGE}.errors import Oops\nfrom {PACKAGE}.stream import go\n'
    '\n__all__ = ["Oops", "go"]\n',
    "errors.py": "class Oops(Exception): ...\n",
    "source/__init__.py": '"""Doc."""\n',
    "source/grid.py": f"from {PACKAGE}.errors import Oops\n",
    "engine/__init__.py": "",
    "engine/window.py": f"from random import Random\nimport random\nfrom {PACKAGE}.source.grid import Oops\n"
    "def f(rng: random.Random, other: Random): ...\n",
    "engine/cluster.py": f"import dask\nfrom distributed import Client\nfrom {PACKAGE}.engine import window\n",
    "stream.py": f"import numpy\nimport {PACKAGE}.engine.window\ndef go(): ...\n",
}


def plant(folder: Path, **changed: str) -> Tree:
    for name, text in {**TIDY, **changed}.items():
        path = folder / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return Tree(folder / PACKAGE)


def test_a_tidy_tree_has_no_findings(tmp_path: Path) -> None:
    assert check(plant(tmp_path), ORDER) == []


@pytest.mark.parametrize(
    "statement",
    [
        f"from {PACKAGE}.engine.window import x",
        f"from {PACKAGE}.engine import window",
        f"import {PACKAGE}.engine.window",
        "from ..engine.window import x",
        "from ..engine import window",
        f"def later():\n    from {PACKAGE}.engine import window",
        f"from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from {PACKAGE}.engine.window import x",
        f"from importlib import import_module\nimport_module('{PACKAGE}.engine.window')",
        f"import importlib\nimportlib.import_module('{PACKAGE}.engine.window')",
    ],
)
def test_every_kind_of_upward_import_is_found(tmp_path: Path, statement: str) -> None:
    [finding] = check_direction(plant(tmp_path, **{"source/grid.py": f"\n{statement}\n"}), ORDER)
    line = statement.count("\n") + 2
    assert finding == (
        f"{PACKAGE}/source/grid.py:{line}: {PACKAGE}.source.grid imports {PACKAGE}.engine.window, "
        "which is upward: a module may import only what the picture draws above it"
    )


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("errors.py", f"from {PACKAGE} import go\n", "is a re-export"),
        ("errors.py", f"import {PACKAGE}.errors\n", "is upward"),
        ("source/grid.py", f"from {PACKAGE}.engine.window import x\n", "circular import: "),
        (
            "stream.py",
            "import dask.array\n",
            "only cluster, payload, gather, obituaries, dask_executor, dashboard may",
        ),
        ("source/grid.py", "def f():\n    import distributed\n", "zarr_dask_stream.source.grid imports distributed"),
        ("source/grid.py", "import time\n", "imports time, but it belongs to the pure core"),
        ("engine/window.py", "async def f(): ...\n", "is asynchronous"),
        ("engine/window.py", "import random\nrandom.random()\n", "global random generator"),
        ("engine/window.py", "from random import random\n", "global random generator"),
        ("engine/window.py", "import numpy as np\nnp.random.default_rng()\n", "global random generator"),
        ("utils.py", "", "zarr_dask_stream.utils is not in the picture"),
        ("engine/__init__.py", "limit = 3\n", "only re-exports and __all__"),
        ("engine/__init__.py", "import os\n", "only re-exports and __all__"),
        ("engine/__init__.py", f"from {PACKAGE}.engine.window import x\n", "differ in ['x']"),
        ("engine/__init__.py", f"from {PACKAGE}.engine.window import a, b\n__all__ = ['b', 'a']\n", "is not sorted"),
    ],
)
def test_planted_violations_are_found(tmp_path: Path, file: str, text: str, expected: str) -> None:
    findings = check(plant(tmp_path, **{file: text}), ORDER)
    assert any(expected in finding for finding in findings), findings


def test_a_module_that_is_drawn_must_exist(tmp_path: Path) -> None:
    findings = check(plant(tmp_path), [*ORDER, f"{PACKAGE}.cli"])
    assert findings == [f"{PACKAGE}.cli is in the picture in CONTRIBUTING.md but does not exist"]


def test_the_picture_is_read_from_top_to_bottom() -> None:
    modules = ["errors.py   what", "source/     where", "  grid.py    how", "  codec.py", "", "stream.py"]
    drawing = "\n".join(["words", "```text", f"{PACKAGE}/", "  __init__.py", *(f"  {line}" for line in modules), "```"])
    assert picture(drawing) == [f"{PACKAGE}.{name}" for name in ("errors", "source.grid", "source.codec", "stream")]
