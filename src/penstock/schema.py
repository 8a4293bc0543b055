"""Settings classes to read and to describe: what the configuration and the fault plans have in common.

A settings class is a frozen msgspec.Struct whose fields have a description and bounds. Errors name the key as the file
has it, "listener[0].tls.mode", and list the keys or the words there are.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from typing import Annotated, Final, Literal, TypeVar, get_args, get_origin

import msgspec
import tomli_w

Struct = msgspec.Struct
Meta = msgspec.Meta
S = TypeVar("S", bound=Struct)
_WIDTH: Final = 118
"""Columns of a description."""
_MOST_SHOWN: Final = 40
"""Characters of a wrong word."""


class SchemaError(ValueError):
    """What is wrong with a file; the text names the key and the right form."""


def parse_table(text: str) -> dict[str, object]:
    """Read TOML. Raise SchemaError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise SchemaError(f"this is not TOML: {exc}") from exc


def convert(table: Mapping[str, object], struct: type[S]) -> S:
    """Make settings of a table. Raise SchemaError that names the key."""
    try:
        return msgspec.convert(table, struct)
    except msgspec.ValidationError as exc:
        raise SchemaError(_name_the_key(str(exc), struct)) from exc


def _name_the_key(text: str, root: type[Struct]) -> str:
    """Turn msgspec's "... - at `$.listener[0].tls`" into "listener[0].tls: ..."; list the keys there are."""
    message, _, place = text.partition(" - at `$")
    key = place.rstrip("`").lstrip(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", message)
    if unknown:
        name = unknown.group(1)
        known = ", ".join(sorted(keys_of(_struct_at(key, root))))
        return f"{key + '.' if key else ''}{name}: there is no such key; here may stand: {known}"
    choices = ", ".join(_choices_at(key, root))
    if choices:
        word = re.fullmatch(r"Invalid enum value '(.*)'", message, re.DOTALL)
        wrong = f"there is no {word.group(1)[:_MOST_SHOWN]!r}" if word else message
        return f"{key}: {wrong}; here may stand: {choices}"
    return f"{key}: {message}" if key else message


def _choices_at(key: str, root: type[Struct]) -> tuple[str, ...]:
    """Return the words that may stand at a key; none where it takes other things."""
    place, _, name = re.sub(r"\[[^]]*\]", "", key).rpartition(".")
    fields = msgspec.structs.fields(_struct_at(place, root)) if name else ()
    field = next((field for field in fields if field.encode_name == name), None)
    return () if field is None else tuple(_words_in(field.type))


def _words_in(annotation: object) -> Iterator[str]:
    """Yield the words of the Literals that an annotation names."""
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
            field = next(field for field in msgspec.structs.fields(struct) if field.name == name)
            struct = next(_structs_in(field.type))
    return struct


def _structs_in(annotation: object) -> Iterator[type[Struct]]:
    """Yield the settings classes that an annotation names."""
    if isinstance(annotation, type) and issubclass(annotation, Struct):
        yield annotation
    for argument in get_args(annotation):
        yield from _structs_in(argument)


def keys_of(struct: type[Struct]) -> list[str]:
    """Return the keys of a settings class."""
    return [field.encode_name for field in msgspec.structs.fields(struct)]


def describe(struct: type[Struct]) -> str:
    """Return the reference of all keys as TOML with the defaults, made from the settings classes themselves.

    Tables that are not there by default are comments.
    """
    return "\n".join(_describe(struct, "")).strip() + "\n"


def _describe(struct: type[Struct], place: str) -> Iterator[str]:
    """Yield the lines of a table: what it is, its keys, then the tables within it."""
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
                yield from _comment(meta.description)
            yield from (line if is_there or not line or line.startswith("#") else f"#{line}" for line in lines)


def _comment(text: str) -> list[str]:
    """Return a text as comments."""
    return textwrap.wrap(text, _WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _describe_key(field: msgspec.structs.FieldInfo) -> Iterator[str]:
    meta, default = _meta_of(field.type), _default_of(field)
    yield ""
    yield from _comment(f"{meta.description if meta else ''} {_bounds(meta)}")
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
    return tomli_w.dumps({"x": msgspec.to_builtins(value)}).removeprefix("x = ").strip().replace("\n", " ")
