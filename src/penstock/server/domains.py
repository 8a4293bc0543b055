"""The domains a listener accepts mail for."""

from __future__ import annotations

from collections.abc import Sequence


class Domains:
    """The domains a listener takes mail for. An entry with a leading dot stands for all names below it."""

    def __init__(self, names: Sequence[str]) -> None:
        self._exact = frozenset(name.lower() for name in names if not name.startswith("."))
        self._below = tuple(name.lower() for name in names if name.startswith("."))

    def __contains__(self, domain: str) -> bool:
        return domain in self._exact or domain.endswith(self._below)
