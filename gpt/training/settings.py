"""Flat settings: values checked against a dataclass, read from and written to TOML.

A settings dataclass has only fields of the types bool, int, float, str, Literal[...] and `X | None`. Values come from
TOML files (typed) and from the command line (text); both pass through `convert`, so that both fail with the same words.
"""
import difflib
import json
import tomllib
import types
from dataclasses import fields
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UserError

BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
_EXPECTED = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


def field_types(cls):
    """{field name: type} of a settings dataclass, inherited fields first."""
    hints = get_type_hints(cls)
    return {field.name: hints[field.name] for field in fields(cls)}


def unknown_name(name, cls, mark=""):
    """The text "unknown ...; did you mean ...?" for a name that is no field of `cls`; `mark` is put before names."""
    near = difflib.get_close_matches(name, field_types(cls), n=1)
    hint = f"did you mean {mark}{near[0]}?" if near else "--help lists all"
    return f"unknown {'flag' if mark else 'key'} {mark}{name}; {hint}"


def convert(value, kind, what, parse=False):
    """`value` as the type `kind`, or a UserError that begins with `what`.

    An int is accepted where a float is meant; otherwise a value must have the type already: True is not 1, 1.0 is not
    1, "1" is not 1. With `parse=True` the value is text from the command line and is read as the type.
    """
    if get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        raise UserError(f"{what} must be one of {', '.join(map(str, get_args(kind)))}; got {value!r}")
    if get_origin(kind) in (Union, types.UnionType):  # X | None
        kind = next(k for k in get_args(kind) if k is not type(None))
        return None if parse and value.lower() == "none" else convert(value, kind, what, parse)
    try:
        if parse:
            return BOOLEANS[value.lower()] if kind is bool else kind(value)
        if type(value) is kind or (kind is float and type(value) is int):
            return kind(value)
    except (ValueError, KeyError):
        pass
    raise UserError(f"{what} must be {_EXPECTED[kind]}, got {value!r}")


def read_toml(path, cls):
    """The values of a TOML file of flat keys as {field: value}, each checked against the fields of `cls`.

    Raises UserError, naming the file, for broken TOML, a table, an unknown key or a wrong type; FileNotFoundError.
    """
    path = Path(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    kinds = field_types(cls)
    for key, value in content.items():
        if isinstance(value, dict):
            raise UserError(f"{path}: [{key}] is a table; keys are flat here, write them without a section")
        if key not in kinds:
            raise UserError(f"{path}: {unknown_name(key, cls)}")
    return {key: convert(value, kinds[key], f"{path}: {key}") for key, value in content.items()}


def to_toml(settings):
    """All fields of a settings dataclass as TOML, one `key = value` per line; None, which TOML lacks, is left out."""
    lines = []
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value is not None:
            lines.append(f"{field.name} = {_toml_value(value)}\n")
    return "".join(lines)


def _toml_value(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # JSON's escapes are TOML's; TOML wants DEL escaped as well
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)  # Python's repr of int and float (1e-05, inf, nan) is TOML


def differences(settings):
    """{field: value} of the fields whose value is not the class's default."""
    return {f.name: getattr(settings, f.name) for f in fields(settings) if getattr(settings, f.name) != f.default}
