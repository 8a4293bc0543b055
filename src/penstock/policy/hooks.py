"""Policies in Python: loads the `module:object` of a [[check]] table.

Mistakes (an unknown module, a misspelt method, wrong arguments) are reported at the start, not when mail arrives.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from penstock.loading import HookError, load_object
from penstock.policy.base import HOOK_POINTS
from penstock.schema import suggest


class HookSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A policy in Python. Policies are called in the order of the file."""

    hook: Annotated[str, msgspec.Meta(description="Policy to load: package.module:name or path/to/file.py:name")]
    arguments: Annotated[
        dict[str, Any], msgspec.Meta(description="Keyword arguments, if the name is a class or a function")
    ] = {}
    deadline: Annotated[
        float,
        msgspec.Meta(
            gt=0,
            le=600,
            description="Seconds that a call may take; after that it has failed and the client receives 451",
        ),
    ] = 10.0
    concurrency: Annotated[int, msgspec.Meta(ge=1, description="Calls that may run at the same time")] = 1000
    breaker_failures: Annotated[
        int, msgspec.Meta(ge=1, description="Consecutive failures after which it is not called for a while")
    ] = 10
    breaker_pause: Annotated[
        float,
        msgspec.Meta(ge=0, le=3600, description="Seconds it is not called; the reply is 451 meanwhile"),
    ] = 30.0


def load_hook(reference: str, arguments: Mapping[str, object] = {}) -> object:
    """Return the policy that a reference names: an object itself, or the result of calling a class or function.

    Raise HookError when there is no such object, or when it is not a policy.
    """
    policy = load_object(reference, arguments)
    check_policy(reference, policy)
    return policy


def check_policy(reference: str, policy: object) -> None:
    """Raise HookError when an object is not a policy; the error calls it `reference`."""
    methods = [name for name in dir(policy) if name.startswith("on_")]
    for name in methods:
        if name not in HOOK_POINTS:
            raise HookError(
                f"{reference!r}: unknown hook {name}{suggest(name, HOOK_POINTS)}; available: {', '.join(HOOK_POINTS)}"
            )
        method = getattr(policy, name)
        try:
            inspect.signature(method).bind(*[None] * HOOK_POINTS[name])
        except ValueError:
            continue  # compiled code may have no signature
        except TypeError as exc:
            raise HookError(
                f"{reference!r}: {name} must take {HOOK_POINTS[name]} arguments (see penstock.policy.base): {exc}"
            ) from exc
    if not methods:
        raise HookError(f"{reference!r}: the policy has no hook; available: {', '.join(HOOK_POINTS)}")
