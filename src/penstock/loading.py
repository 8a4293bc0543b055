"""Loading objects that a configuration names: `package.module:name` or `path/to/file.py:name`."""

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
    """An object cannot be used. The text says why and shows the right form."""


def load_object(reference: str, arguments: Mapping[str, object] = {}) -> object:
    """Return the object of a reference: unchanged, or a class or function called with the arguments.

    Raise HookError if it does not exist or cannot be created.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise HookError(f"{reference!r}: expected package.module:name or path/to/file.py:name")
    found: object = getattr(_load_module(reference, place), name, None)
    if found is None:
        raise HookError(f"{reference!r}: the module does not define {name}")
    if inspect.iscoroutinefunction(found):
        raise HookError(f"{reference!r}: a function that creates the object must be a plain def, not async def")
    if inspect.isclass(found) or inspect.isfunction(found):
        try:
            created: object = found(**arguments)
        except Exception as exc:
            raise HookError(f"{reference!r}: creating the object failed: {type(exc).__name__}: {exc}") from exc
        return created
    if arguments:
        raise HookError(f"{reference!r}: arguments are only allowed for a class or a function")
    return found


def _load_module(reference: str, place: str) -> ModuleType:
    try:
        return _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as exc:
        raise HookError(f"{reference!r}: loading the module failed: {type(exc).__name__}: {exc}") from exc


def _load_file(path: Path) -> ModuleType:
    """Execute a file as a module. Dataclasses and pickle look modules up by name, so it needs a unique one.

    The file may import modules beside it, like a script: beside the file that a link leads to.
    """
    real = path.resolve()
    name = f"penstock_hook_{path.stem}_{zlib.crc32(str(real).encode()):08x}"
    if str(real.parent) not in sys.path:
        sys.path.append(str(real.parent))  # at the end: it replaces no installed module
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
            sys.modules[name] = before  # a failed reload leaves the running module in place
        raise
    return module
