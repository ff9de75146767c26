"""The shape of the package: a pure core, edges that each know one outside thing, and imports that point one way."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import cdc_worker

CORE = [
    *(
        "failpoints",
        "errors",
        "lsn",
        "values",
        "protocol",
        "changes",
        "lazy",
        "wal2json",
        "documents",
        "pgoutput",
        "decoders",
        "context",
    ),
    *("activities", "profile", "templates", "rules", "history", "truth", "reconcile"),
    *("written", "transform", "recording", "kept", "watchdog"),
]

EDGES = [
    *(
        "config",
        "log",
        "console",
        "vitals",
        "postgres",
        "partitions",
        "catalog",
        "ddl",
        "checkpoint",
        "gap",
        "slot",
        "publication",
    ),
    *(
        "process",
        "fence",
        "rows",
        "journal",
        "watch",
        "replication",
        "recorder",
        "coverage",
        "ledger",
        "blocks",
        "reading",
        "segments",
        "lines",
        "sink",
        "lookups",
    ),
    *(
        "progress",
        "backfill",
        "substitutes",
        "late",
        "unplaced",
        "replay",
        "ours",
        "rewrite",
        "dead_letters",
        "skips",
        "verify",
    ),
    *(
        "cutover",
        "setup",
        "teardown",
        "switch_plugin",
        "subjects",
        "erasure",
        "feed",
        "feed_listing",
        "status",
        "checks",
        "server_checks",
        "target_checks",
        "table_checks",
        "slot_checks",
        "doctor",
        "places",
        "profile_checks",
        "profile_listing",
        "profile_trial",
        "profile_draft",
        "stop",
        "tracing",
        "stream",
        "observer",
        "metrics",
        "web",
        "service_manager",
        "worker",
        "recover",
        "binaries",
        "cluster",
        "shadow",
        "sales_day",
        "timeline",
        "demo",
        "cli",
    ),
]

DOORS = ["__init__", "__main__"]
"""They may open on everything; nothing opens on them."""

ORDER = [*CORE, *EDGES, *DOORS]

OUTSIDE = frozenset(
    {
        *("__future__", "bisect", "collections", "contextlib", "copy", "dataclasses", "datetime", "decimal", "enum"),
        *("functools", "hashlib", "heapq", "hmac", "itertools", "json", "math", "operator", "pickle", "re", "string"),
        *("struct", "types"),
        *("typing", "zlib", "msgspec", "pydantic"),
    }
)
"""What the core may import from elsewhere: nothing here knows a file, a socket, a clock, a log or an environment."""

READS_FILES = {"profile": {"tomllib", "importlib", "pathlib"}}
"""A profile is read from a file, in one function of one module."""

CLOCKS = frozenset({"now", "utcnow", "today"})
WORLDLY = frozenset({"open", "print", "input", "exec", "eval", "__import__"})

PACKAGE = Path(cdc_worker.__file__).parent
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def parsed(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text("utf-8"))


def imports(module: str) -> set[str]:
    """Full names of all that a module imports, wherever in it: `cdc_worker.lsn`, `os.path`."""
    found: set[str] = set()
    for node in ast.walk(parsed(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            assert node.module is not None
            if node.module == "cdc_worker":
                found |= {f"cdc_worker.{alias.name}" for alias in node.names}
            else:
                found.add(node.module)
    return found


def own(module: str) -> set[str]:
    """The modules of this package that a module imports. The version is no module."""
    names = {name for name in imports(module) if name.split(".")[0] == "cdc_worker"}
    return {name.removeprefix("cdc_worker.") for name in names} - {"__version__"}


def test_every_module_has_its_place() -> None:
    assert set(MODULES) - set(ORDER) == set(), "give it a place in CORE or EDGES, and in the architecture"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    before = set(ORDER[: ORDER.index(module)]) - set(DOORS)
    assert own(module) - before == set()


@pytest.mark.parametrize("module", [module for module in CORE if module in MODULES])
def test_the_core_knows_nothing_of_the_outside(module: str) -> None:
    elsewhere = {name.split(".")[0] for name in imports(module)} - {"cdc_worker"}
    assert elsewhere - OUTSIDE - READS_FILES.get(module, set()) == set()
    assert {node.id for node in ast.walk(parsed(module)) if isinstance(node, ast.Name)} & WORLDLY == set()
    assert {node.attr for node in ast.walk(parsed(module)) if isinstance(node, ast.Attribute)} & CLOCKS == set()


def test_the_core_reads_files_in_one_place() -> None:
    readers = {"read_text", "read_bytes", "iterdir", "Path", "files"}
    found = {
        function.name
        for function in ast.walk(parsed("profile"))
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
        if getattr(node, "attr", getattr(node, "id", None)) in readers
    }
    assert found == {"read", "shipped"}
