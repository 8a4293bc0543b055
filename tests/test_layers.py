"""The structure of the source tree: layers, the purity of the protocol, lengths of functions, stubs of compiled code.

A package imports only from packages in the rows below it, and not from its neighbours in a row.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "penstock"

ROWS = [
    {"cli", "pytest_plugin"},
    {"operations", "supervisor", "testing"},
    {"app"},
    {"assembly"},
    {"config"},
    {"sink", "load"},
    {"server"},
    {"auth", "policy", "delivery", "relay"},
    {"cluster"},
    {"net", "dns", "spool", "state"},
    {"smtp"},
    {"control", "metrics", "reports"},
    {"journal"},
    {"transaction", "_journal"},
    {"results"},
    {"mailauth"},
    {
        "_files",
        "addresses",
        "batches",
        "breaker",
        "files",
        "forked",
        "loading",
        "message",
        "privileges",
        "reply",
        "schema",
        "sequence",
        "tokenbucket",
    },
]
"""From the top layer to the bottom."""

PURE = {
    "addresses",
    "breaker",
    "mailauth",
    "message",
    "reply",
    "results",
    "sequence",
    "transaction",
    "smtp",
    "tokenbucket",
}
IMPURE_MODULES = {"trio", "socket", "ssl", "sqlite3", "threading", "asyncio", "select", "time", "os"}
ALLOWED = {("message.py", "os"), ("message.py", "time")}
"""A message ID begins with the time and a random tag."""

FILES = sorted(path for path in SOURCE.rglob("*.py*") if path.suffix in (".py", ".pyi"))
COMPILED = sorted((SOURCE.parent.parent / "ext").glob("*.pyx"))
STUBS = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("_*.pyi"))
LONGEST_FUNCTION = 80
"""Lines."""
BORROWED = {
    "server/_pump.pyi": {"CLOSED", "NEED_DATA", "TURN_OVER", "BeginData", "EndOfMessage", "replies"},
    "net/_poller.pyi": {"deque", "reschedule", "notify_closing", "trio", "Value", "Error"},
    "smtp/_grammar.pyi": {"NO_PARAMETERS", "Mail", "MailParameters", "Path", "Recipient", "Reply", "replies"},
}  # fmt: skip
"""Names that compiled modules import from elsewhere."""


def row_of(package: str) -> int:
    return next(number for number, row in enumerate(ROWS) if package in row)


def package_of(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].partition(".")[0]


def imports_of(path: Path) -> Iterator[str]:
    """Yield the modules that a file imports, at its top or inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            assert node.module is not None
            yield node.module
            if node.module == "penstock":
                yield from (f"penstock.{alias.name}" for alias in node.names)


def is_exempt(path: Path) -> bool:
    """Return whether a file is above all layers: the public names and the entry point."""
    return path.relative_to(SOURCE).parts in (("__init__.py",), ("__main__.py",))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_a_file_imports_only_from_layers_below(path: Path) -> None:
    if is_exempt(path):
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
def test_the_protocol_uses_no_socket_clock_or_event_loop(path: Path) -> None:
    for module in imports_of(path):
        top = module.split(".")[0]
        assert top not in IMPURE_MODULES or (path.name, top) in ALLOWED, f"{path} imports {module}"


def test_only_the_assembly_imports_the_concrete_parts() -> None:
    concrete = {"penstock.delivery.maildir", "penstock.delivery.discard", "penstock.auth.users"}
    importing = {
        str(path.relative_to(SOURCE))
        for path in FILES
        for module in imports_of(path)
        if module in concrete and package_of(path) != module.split(".")[1]
    }
    # config has the settings, the sink prints the counts, `config check` and `user` read the users file.
    assert importing == {
        "app.py",
        "assembly/listeners.py",
        "assembly/relaying.py",
        "config.py",
        "cli/filecheck.py",
        "cli/sink.py",
        "cli/user.py",
    }


def functions_of(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the functions of a file, with the number of their lines."""
    if path.suffix != ".pyx":
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                yield node.name, node.end_lineno - node.lineno + 1
        return
    lines = path.read_text().splitlines()
    for start, line in enumerate(lines):
        if header := re.match(r"( *)(?:def|cpdef|cdef) (?!class )[^=(]*?(\w+)\(", line):
            yield header[2], lines_of_block(lines[start:], len(header[1]))


def lines_of_block(lines: list[str], indentation: int) -> int:
    """Return how many lines a block has that begins with the first line; the end of a signature belongs to it."""
    last = 1
    for number, line in enumerate(lines[1:], start=2):
        text = line.strip()
        if text and not text.startswith((")", "#")) and len(line) - len(line.lstrip()) <= indentation:
            break
        if len(line) - len(line.lstrip()) > indentation:
            last = number
    return last


@pytest.mark.parametrize("path", [*FILES, *COMPILED], ids=lambda path: path.name)
def test_no_function_is_too_long_to_read(path: Path) -> None:
    assert {name: lines for name, lines in functions_of(path) if lines > LONGEST_FUNCTION} == {}


def test_the_lines_of_compiled_functions_are_counted(tmp_path: Path) -> None:
    """The check above reads .pyx files by their indentation."""
    source = """\
cdef class Wire(Base):
    cdef int size

    cdef inline int first(
        self, int x
    ) noexcept nogil:
        # comment
        return x

    # the comment of the next one
    def second(self):
        cdef int y = len(self.text)

        return (
            y
        )

cpdef object third(object x):
    return x
"""
    (tmp_path / "x.pyx").write_text(source)
    assert list(functions_of(tmp_path / "x.pyx")) == [("first", 5), ("second", 6), ("third", 2)]


def test_no_async_code_is_compiled() -> None:
    pure_python = [path.with_suffix(".py") for path in SOURCE.rglob("*.pxd") if path.with_suffix(".py").exists()]
    for path in [*COMPILED, *pure_python]:
        assert "async def" not in path.read_text(), path


@pytest.mark.parametrize("stub", STUBS)
def test_a_stub_declares_what_its_module_has(stub: str) -> None:
    module = import_module("penstock." + stub.removesuffix(".pyi").replace("/", "."))
    tree = ast.parse((SOURCE / stub).read_text())
    constants = {ast.unparse(node.target): node.value for node in tree.body if isinstance(node, ast.AnnAssign)}
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    classes = {
        node.name: node
        for node in tree.body
        if isinstance(node, ast.ClassDef) and "TypingProtocol" not in map(ast.unparse, node.bases)
    }
    there = {name for name in vars(module) if not name.startswith("_")} - BORROWED.get(stub, set())
    assert {*constants, *functions, *classes} == there
    for name, value in constants.items():
        if isinstance(value, ast.Constant):
            assert getattr(module, name) == value.value, name
    for name, node in classes.items():
        declared = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
        declared |= {ast.unparse(each.target) for each in node.body if isinstance(each, ast.AnnAssign)}
        has = {each for each in vars(getattr(module, name)) if not each.startswith("__")}
        assert {each for each in declared if not each.startswith("__")} == has
