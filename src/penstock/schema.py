"""Settings classes: reading them from TOML and describing them. Used by the configuration and by fault plans.

A settings class is a frozen msgspec.Struct whose fields have a description and bounds. Errors name the key as it is
written in the file, "listener[0].tls.mode", and the allowed keys or values.
"""

from __future__ import annotations

import difflib
import re
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal, TypeVar, get_args, get_origin

import msgspec
import tomli_w

Struct = msgspec.Struct
Meta = msgspec.Meta
S = TypeVar("S", bound=Struct)
_WIDTH: Final = 118
"""Columns of a description."""
_MAX_SHOWN: Final = 40
"""Characters of a wrong value that an error message repeats."""

_KEYS: Final = re.compile(r"[,=\[\]{}\n]")
"""What ends a dotted key, or a string that looks like one."""
_MAX_PARTS: Final = 1000
"""Parts of a dotted key."""
_TOML_TYPES: Final = {
    "array": "an array",
    "bool": "true or false",
    "float": "a number",
    "int": "an integer",
    "object": "a table",
    "str": "a string",
    "null": "nothing",
}
"""What msgspec calls a type, and what an error message calls it."""
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}
_PREFIXES: Final = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_QUANTITY: Final = re.compile(r"\s*([0-9]{1,12}(?:\.[0-9]{1,6})?)\s*([a-z]{0,3}?)(?:i?b)?\s*", re.ASCII | re.IGNORECASE)


class SchemaError(ValueError):
    """A file cannot be used. The text names the key and the right form."""


def parse_table(text: str) -> dict[str, object]:
    """Read TOML. Raise SchemaError."""
    # The time that tomllib takes for a key grows with the square of its parts.
    if max(piece.count(".") for piece in _KEYS.split(text)) > _MAX_PARTS:
        raise SchemaError(f"invalid TOML: a key has more than {_MAX_PARTS} parts")
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise SchemaError(f"invalid TOML: {exc}") from exc


def convert(table: Mapping[str, object], struct: type[S]) -> S:
    """Make settings from a table. Raise SchemaError, which names the key."""
    try:
        return msgspec.convert(table, struct)
    except msgspec.ValidationError as exc:
        raise SchemaError(_Mistake(str(exc), table, struct).explain()) from exc


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" for the known word most like this one; "" if none is like it.

    >>> suggest("adress", ["address", "name"])
    ' (did you mean address?)'
    """
    found = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f" (did you mean {found[0]}?)" if found else ""


# ---- explaining mistakes


class _Mistake:
    """An error of msgspec: "Expected `int`, got `str` - at `$.listener[0].max_size`", and the table it is about."""

    def __init__(self, error: str, table: Mapping[str, object], root: type[Struct]) -> None:
        self._message, _, place = error.partition(" - at `$")
        self._key = place.rstrip("`").lstrip(".")
        self._table = table
        self._root = root

    def explain(self) -> str:
        """Return the error in the terms of the file, beginning with the key."""
        message, key = self._message, self._key
        if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", message, re.DOTALL):
            known = sorted(keys_of(_struct_at(key, self._root)))
            name = unknown[1]
            return (
                f"{_joined(key, name[:_MAX_SHOWN])}: unknown key{suggest(name, known)}; "
                f"expected one of: {', '.join(known)}"
            )
        if missing := re.fullmatch(r"Object missing required field `(.*)`", message):
            return f"{_joined(key, missing[1])}: required key is missing"
        expected = re.match(r"Expected `([a-z |]+)`", message)
        types = expected[1].split(" | ") if expected else []
        choices = _choices_at(key, self._root)
        if choices and "array" not in types:
            message = self._wrong_choice(choices)
        elif expected:
            message = self._wrong_value(types, message[expected.end() :])
        return f"{key}: {message}" if key else message

    def _wrong_choice(self, choices: tuple[str, ...]) -> str:
        value = _value_at(self._key, self._table)
        hint = suggest(value, choices) if isinstance(value, str) else ""
        return f"unknown value {_shown(value)}{hint}; expected one of: {', '.join(choices)}"

    def _wrong_value(self, types: list[str], rest: str) -> str:
        """Explain "Expected `int` >= 100" or "Expected `int`, got `str`": name the value and show the right form."""
        value = _value_at(self._key, self._table)
        name = re.sub(r"\[[^]]*\]", "", self._key)
        if types[0] == "array" and isinstance(value, dict):
            return f"expected an array of tables; write [[{name}]] instead of [{name}]"
        if types[0] == "object" and isinstance(value, list):
            return f"expected one table; write [{name}] instead of [[{name}]]"
        expected = " or ".join(_TOML_TYPES.get(each, each) for each in types if each != "null")
        if rest.startswith(", got"):
            return f"expected {expected}, not {_shown(value)}{self._example(value, types)}"
        rest = re.sub(r" of length >= 1$", " that is not empty", rest).removesuffix(".0")
        return f"expected {expected}{rest}, not {_shown(value)}"

    def _example(self, value: object, types: list[str]) -> str:
        """Return the right form of a wrong value: the number for "5d" or "25M", the default, an array."""
        if types[0] == "array":
            return f"; write [{_shown(value)}]" if isinstance(value, str) else ""
        field = _field_at(self._key, self._root)
        if field is None or not {"int", "float"} & set(types):
            return ""
        meta, default = _meta_of(field.type), _default_of(field)
        number = _number_of(value, is_time="second" in ((meta and meta.description) or "").lower())
        if number is not None:
            return f"; write {number}"
        example = str(default).removesuffix(".0") if isinstance(default, int | float) else ""
        return f"; write a number such as {example}" if example else ""


def _number_of(value: object, *, is_time: bool) -> int | None:
    """Return the seconds or octets of a text with a unit; None if it has another form."""
    found = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    factor = None if found is None else (_UNITS if is_time else _PREFIXES).get(found[2].lower())
    return None if found is None or factor is None else round(float(found[1]) * factor)


def _joined(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _shown(value: object) -> str:
    """Return a value as TOML has it, cut; a table or an array by its type."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return "an array" if value else "an empty array"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return repr(value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + "...")
    return str(value)[:_MAX_SHOWN]


def _value_at(key: str, table: Mapping[str, object]) -> object:
    """Return the value at a key such as "listener[0].tls.mode"."""
    value: Any = table
    for name, index in re.findall(r"([^.\[\]]+)|\[([0-9]+)\]", key):
        value = value[name] if name else value[int(index)]
    return value


def _field_at(key: str, root: type[Struct]) -> msgspec.structs.FieldInfo | None:
    """Return the field at a key such as "listener[0].tls.mode"; None for the file as a whole."""
    place, _, name = re.sub(r"\[[^]]*\]", "", key).rpartition(".")
    fields = msgspec.structs.fields(_struct_at(place, root))
    return next((field for field in fields if field.encode_name == name), None)


def _choices_at(key: str, root: type[Struct]) -> tuple[str, ...]:
    """Return the words allowed at a key; none if it does not take words."""
    field = _field_at(key, root) if key else None
    return () if field is None else tuple(_words_in(field.type))


def _words_in(annotation: object) -> Iterator[str]:
    """Yield the words of the Literals in an annotation."""
    if get_origin(annotation) is Literal:
        yield from (str(word) for word in get_args(annotation))
        return
    for argument in get_args(annotation):
        yield from _words_in(argument)


def _struct_at(key: str, root: type[Struct]) -> type[Struct]:
    """Return the settings class at a key such as "listener[0].tls"."""
    struct = root
    for name in re.sub(r"\[[^]]*\]", "", key).split("."):
        if name:
            field = next(field for field in msgspec.structs.fields(struct) if field.encode_name == name)
            struct = next(_structs_in(field.type))
    return struct


def _structs_in(annotation: object) -> Iterator[type[Struct]]:
    """Yield the settings classes in an annotation."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        yield annotation
    for argument in get_args(annotation):
        yield from _structs_in(argument)


# ---- describing


def keys_of(struct: type[Struct]) -> list[str]:
    """Return the keys of a settings class."""
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def describe(struct: type[Struct]) -> str:
    """Return all keys with their descriptions and defaults as TOML, made from the settings classes.

    Tables that are absent by default are commented out.
    """
    return "\n".join(_describe(struct, "")).strip() + "\n"


def _describe(struct: type[Struct], place: str) -> Iterator[str]:
    """Yield the lines of a table: its description, its keys, then its tables."""
    yield from (f"# {line.strip()}".rstrip() for line in (struct.__doc__ or "").strip().split("\n"))
    if place:
        yield place
    fields = msgspec.structs.fields(struct)
    for field in fields:
        if not list(_structs_in(field.type)):
            yield from _describe_key(field)
    for field in fields:
        for inner in _structs_in(field.type):
            path = f"{place.strip('[]')}.{field.encode_name}".lstrip(".")
            is_list = get_origin(_without_meta(field.type)) is tuple
            lines = _describe(inner, f"[[{path}]]" if is_list else f"[{path}]")
            is_there = bool(_default_of(field))
            meta = _meta_of(field.type)
            yield ""
            if meta is not None and meta.description:
                yield from comment(meta.description)
            yield from (line if is_there or not line or line.startswith("#") else f"#{line}" for line in lines)


def comment(text: str) -> list[str]:
    """Return a text as comment lines."""
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _describe_key(field: msgspec.structs.FieldInfo) -> Iterator[str]:
    meta, default = _meta_of(field.type), _default_of(field)
    yield ""
    yield from comment(f"{meta.description if meta else ''} {_bounds(meta)}")
    yield f"{field.encode_name} = {_toml_value(default)}" if default is not None else f"#{field.encode_name} ="


def _default_of(field: msgspec.structs.FieldInfo) -> object:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return None if field.default is msgspec.NODEFAULT else field.default


def _without_meta(annotation: object) -> object:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _meta_of(annotation: object) -> Meta | None:
    if get_origin(annotation) is Annotated:
        return next((item for item in get_args(annotation) if isinstance(item, Meta)), None)
    return None


def _bounds(meta: Meta | None) -> str:
    if meta is None:
        return ""
    bounds = [
        f"{sign} {value}"
        for sign, value in ((">=", meta.ge), (">", meta.gt), ("<=", meta.le), ("<", meta.lt))
        if value is not None
    ]
    return f"({', '.join(bounds)})" if bounds else ""


def _toml_value(value: object) -> str:
    """Return a value as TOML, on one line; a table must be empty."""
    if value == {}:
        return "{}"
    text = tomli_w.dumps({"x": msgspec.to_builtins(value)}).removeprefix("x = ").strip()
    return re.sub(r"\n\s+", " ", re.sub(r",?\n\]", "]", re.sub(r"\[\n\s+", "[", text)))
