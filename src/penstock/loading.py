"""Objects of the operator's own: `package.module:name` or `path/to/file.py:name` in a configuration."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType


class HookError(ValueError):
    """An object that cannot be used; the text says why, and shows the right form."""


def load_object(reference: str, arguments: Mapping[str, object] = {}) -> object:
    """Return the object that a reference names: as it is, or made by calling the class or function it names.

    Raise HookError when there is no such object, or when making it fails.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise HookError(f"{reference!r}: expected package.module:name or path/to/file.py:name")
    found: object = getattr(_load_module(reference, place), name, None)
    if found is None:
        raise HookError(f"{reference!r}: the module has no {name}")
    if inspect.iscoroutinefunction(found):
        raise HookError(f"{reference!r}: a function that makes the object is a plain def, not an async def")
    if inspect.isclass(found) or inspect.isfunction(found):
        try:
            made: object = found(**arguments)
        except Exception as exc:
            raise HookError(f"{reference!r}: making it failed: {type(exc).__name__}: {exc}") from exc
        return made
    if arguments:
        raise HookError(f"{reference!r}: it is an object already and takes no arguments")
    return found


def _load_module(reference: str, place: str) -> ModuleType:
    try:
        return _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as exc:
        raise HookError(f"{reference!r}: loading it failed: {type(exc).__name__}: {exc}") from exc


def _load_file(path: Path) -> ModuleType:
    """Run a file as a module of its own. Dataclasses and pickle look modules up by name, so it has to have one."""
    name = f"penstock_hook_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):08x}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before  # a reload that fails leaves what runs as it is
        raise
    return module
