"""The building is a test: a package imports only from rows below it, and neighbours never meet."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from penstock import _journal
from penstock.metrics import _histogram
from penstock.metrics import _session as _metrics
from penstock.net import _poller
from penstock.server import _pump
from penstock.smtp import _grammar, _wire

SOURCE = Path(__file__).parent.parent / "src" / "penstock"

ROWS = [
    {"cli", "pytest_plugin"},
    {"supervisor", "testing"},
    {"app"},
    {"config"},
    {"sink", "load"},
    {"server"},
    {"auth", "policy", "delivery", "relay"},
    {"net", "spool"},
    {"smtp"},
    {"metrics"},
    {"journal"},
    {"transaction", "_journal"},
    {"message", "reply", "schema", "sequence", "loading"},
]
"""From the roof to the cellar."""

PURE = {"message", "reply", "sequence", "transaction", "smtp"}
IMPURE_MODULES = {"trio", "socket", "ssl", "sqlite3", "threading", "asyncio", "select", "time", "os"}
ALLOWED = {("message.py", "os"), ("message.py", "time")}
"""Message ids begin with the time and a random tag."""

FILES = sorted(path for path in SOURCE.rglob("*.py*") if path.suffix in (".py", ".pyi"))
LONGEST_FUNCTION = 80
BORROWED = {
    "server/_pump.pyi": {"CLOSED", "NEED_DATA", "TURN_OVER"},
    "net/_poller.pyi": {"reschedule", "notify_closing", "trio", "Value", "Error"},
    "smtp/_grammar.pyi": {"NO_PARAMETERS", "Mail", "MailParameters", "Path", "Rcpt", "Recipient", "Reply", "replies"},
}  # fmt: skip
"""What compiled modules import from elsewhere."""


def row_of(package: str) -> int:
    return next(number for number, row in enumerate(ROWS) if package in row)


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].partition(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules a file imports, wherever the import stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module == "penstock":
                yield from (f"penstock.{alias.name}" for alias in node.names)


def is_public_face(path: Path) -> bool:
    return path.relative_to(SOURCE).parts in (("__init__.py",), ("__main__.py",))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_from_floors_below(path: Path) -> None:
    if is_public_face(path):
        return
    here = package_of(path)
    for module in imports_of(path):
        parts = module.split(".")
        if parts[0] != "penstock" or len(parts) == 1 or parts[1].startswith("_"):
            continue
        there = parts[1]
        if there == here:
            continue
        if not any(there in row for row in ROWS):
            assert path.name == "main.py" and there == "__version__", f"{path} imports {module}"
            continue
        assert row_of(there) > row_of(here), f"{path} imports {module}, which is not below it"


@pytest.mark.parametrize(
    "path", [path for path in FILES if package_of(path) in PURE], ids=lambda path: str(path.relative_to(SOURCE))
)
def test_the_language_touches_no_socket_clock_or_loop(path: Path) -> None:
    for module in imports_of(path):
        top = module.split(".")[0]
        assert top not in IMPURE_MODULES or (path.name, top) in ALLOWED, f"{path} imports {module}"


def test_only_app_knows_the_concrete_parts() -> None:
    concrete = {"penstock.delivery.maildir", "penstock.delivery.discard", "penstock.auth.users"}
    knowing = {
        str(path.relative_to(SOURCE))
        for path in FILES
        for module in imports_of(path)
        if module in concrete and package_of(path) != module.split(".")[1]
    }
    # The configuration takes the settings class; the sink reads the counts; `penstock user` writes the file.
    assert knowing == {"app.py", "config.py", "cli/sink.py", "cli/user.py"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_function_is_too_long_to_read(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, f"{path.name}:{node.name}"


def test_no_async_code_is_compiled() -> None:
    for path in (SOURCE.parent.parent / "ext").glob("*.pyx"):
        assert "async def" not in path.read_text(), path


@pytest.mark.parametrize(
    ("module", "stub"),
    [
        (_wire, "smtp/_wire.pyi"),
        (_grammar, "smtp/_grammar.pyi"),
        (_poller, "net/_poller.pyi"),
        (_pump, "server/_pump.pyi"),
        (_histogram, "metrics/_histogram.pyi"),
        (_journal, "_journal.pyi"),
        (_metrics, "metrics/_session.pyi"),
    ],
)
def test_a_stub_names_what_its_module_has(module: ModuleType, stub: str) -> None:
    tree = ast.parse((SOURCE / stub).read_text())
    constants = {ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and "Protocol" not in map(ast.unparse, node.bases)
    }
    there = {name for name in vars(module) if not name.startswith("_")} - BORROWED.get(stub, set())
    assert {*constants, *functions, *classes} == there
    for name, value in constants.items():
        if isinstance(value, ast.Constant):
            assert getattr(module, name) == value.value, name
    for name, node in classes.items():
        told = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        told |= {ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)}
        has = {each for each in vars(getattr(module, name)) if not each.startswith("__")}
        assert {each for each in told if not each.startswith("__")} == has
