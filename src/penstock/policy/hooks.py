"""Policies in Python: a `module:object` of the configuration becomes a policy.

What is wrong with one (no such module, no hook_point, a method that is misspelt or takes other arguments) is said at
the start, not when the first mail comes.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final

import msgspec

from penstock.policy.base import HOOK_POINTS

_ARGUMENTS: Final = {
    "on_connect": 2,
    "on_helo": 2,
    "on_auth": 3,
    "on_mail": 3,
    "on_rcpt": 2,
    "on_message": 2,
}
"""How many arguments each hook_point gives (penstock.policy.base)."""


class HookSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy in Python, asked in the order of the file."""

    hook: Annotated[str, msgspec.Meta(description="package.module:name, or path/to/file.py:name")]
    arguments: Annotated[
        dict[str, Any], msgspec.Meta(description="Keyword arguments when the name is a class or a function")
    ] = {}
    deadline: Annotated[
        float,
        msgspec.Meta(gt=0, le=600, description="Seconds a call may take before it counts as failed (451)"),
    ] = 10.0
    concurrency: Annotated[int, msgspec.Meta(ge=1, description="Calls that may be under way at a time")] = 1000
    breaker_failures: Annotated[
        int, msgspec.Meta(ge=1, description="Failures in a row after which it is left alone for a while")
    ] = 10
    breaker_pause: Annotated[
        float,
        msgspec.Meta(ge=0, le=3600, description="Seconds it is left alone; the answer is 451 meanwhile"),
    ] = 30.0


class HookError(ValueError):
    """A hook that can not be used; the text says why and what would do."""


def load_hook(reference: str, arguments: Mapping[str, object] = {}) -> object:
    """Return the policy that a reference names: an object as it is, a class or function called with the arguments.

    Raise HookError when there is none, or when it is no policy.
    """
    place, colon, name = reference.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise HookError(f"{reference!r}: a hook looks like package.module:name or path/to/file.py:name")
    found = getattr(_load_module(reference, place), name, None)
    if found is None:
        raise HookError(f"{reference!r}: the module has no {name}")
    policy = found
    if inspect.iscoroutinefunction(found):
        raise HookError(f"{reference!r}: a function that makes a policy is a plain def, not an async def")
    if inspect.isclass(found) or inspect.isfunction(found):
        try:
            policy = found(**arguments)
        except Exception as exc:
            raise HookError(f"{reference!r}: making it failed: {type(exc).__name__}: {exc}") from exc
    elif arguments:
        raise HookError(f"{reference!r}: it is an object already and takes no arguments")
    check_policy(reference, policy)
    return policy


def _load_module(reference: str, place: str) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        path = Path(place)
        return _load_file(path)
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


def check_policy(reference: str, policy: object) -> None:
    """Raise HookError when an object is no policy; `reference` is what the error calls it."""
    methods = [name for name in dir(policy) if name.startswith("on_")]
    for name in methods:
        if name not in HOOK_POINTS:
            raise HookError(f"{reference!r}: {name} is no hook_point; there are {', '.join(HOOK_POINTS)}")
        method = getattr(policy, name)
        try:
            inspect.signature(method).bind(*[None] * _ARGUMENTS[name])
        except ValueError:
            continue  # compiled code may not tell its arguments
        except TypeError as exc:
            raise HookError(
                f"{reference!r}: {name} is called with {_ARGUMENTS[name]} arguments, see penstock.policy.base: {exc}"
            ) from exc
    if not methods:
        raise HookError(f"{reference!r}: it has none of {', '.join(HOOK_POINTS)}")
