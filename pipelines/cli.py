"""Flags and TOML files into frozen pydantic schemas; every mistake becomes one line."""

import contextlib
import difflib
import io
import json
import math
import re
import sys
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import tyro
from pydantic.fields import FieldInfo

from pipelines.errors import UserError

T = TypeVar("T", bound=pydantic.BaseModel)

_YES, _NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}

_BOX = re.compile(r"[╭╮╰╯│─]+")
# What tyro says when a schema refuses: "Error parsing model: 1 validation error for Model mask_ratio Input ..."
_REFUSED = re.compile(
    r"Error parsing (?P<section>\w+): \d+ validation errors? for \w+ (?P<told>.+?) "
    r"\[type=(?P<type>\w+), input_value=(?P<found>.*?), input_type=.*"
)


def _one_line(text: str) -> str:
    """The first paragraph of one of tyro's boxes, without the frame."""
    paragraphs: list[list[str]] = [[]]
    for line in text.splitlines():
        if re.search(r"[├─]{6}", line):
            paragraphs.append([])
        elif words := _BOX.sub(" ", line).split():
            paragraphs[-1].append(" ".join(words))
    told = [" ".join(lines) for lines in paragraphs if lines]
    return (told[0] if told else text.strip()).rstrip(".")


def reason(error: pydantic.ValidationError) -> str:
    """The first thing that a schema refuses: its key where it is one's, why, and what was found."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    found = f", found {first['input']!r}" if not isinstance(first.get("input"), dict) else ""
    return f"{where + ': ' if where else ''}{first['msg'].removeprefix('Value error, ')}{found}"


def _refusal(schema: type[pydantic.BaseModel], refused: re.Match[str]) -> str:
    section, told = refused["section"], refused["told"]
    if refused["type"] == "value_error":
        # Of a key beside the sections with its name before it.
        return told.partition("Value error, ")[2]
    name, _, rest = told.partition(" ")
    where = f"{section}.{name}" if section in schema.model_fields else name
    return f"{where}: {rest}, found {refused['found']}"


def parse(schema: type[T], *, prog: str, argv: Sequence[str] | None = None, default: T | None = None) -> T:
    """Reads command-line flags into a frozen schema.

    Args:
        schema: The pydantic model; its docstring and the ones under its fields make ``--help``.
        prog: The command's name as the user types it.
        argv: The arguments without the command; those of the process where None.
        default: Values for flags that are not given.

    Raises:
        UserError: An unknown flag or a value that does not fit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            if default is None:
                return tyro.cli(schema, prog=prog, args=arguments)
            return tyro.cli(schema, prog=prog, args=arguments, default=default)
    except pydantic.ValidationError as error:
        raise UserError(f"{reason(error)} (see {prog} --help)") from None
    except SystemExit as stop:
        if not stop.code:
            raise
        line = _one_line(told.getvalue())
        if refused := _REFUSED.match(line):
            line = _refusal(schema, refused)
        if line.startswith("Unrecognized options"):
            if switch := _switch(schema, arguments):
                line = switch
            elif near := _near_flags(schema, arguments):
                line += f"; did you mean {near}?"
        raise UserError(f"{line} (see {prog} --help)") from None


def _leaves(schema: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in schema.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, pydantic.BaseModel):
            yield from _leaves(kind, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def flag_names(schema: type[pydantic.BaseModel]) -> Iterator[str]:
    """The dotted names of a schema's leaves: file key, flag, Tune key and MLflow parameter alike."""
    return (name for name, _ in _leaves(schema))


def _spellings(name: str, field: FieldInfo) -> list[str]:
    """All that a leaf is called as a flag, with its dashes, its own name first."""
    own, others = name, []
    for told in field.metadata:
        own = prefixed(name, told.name) if getattr(told, "name", None) else own
        others += getattr(told, "aliases", None) or ()
    return [f"--{own.replace('_', '-')}", *others]


def prefixed(name: str, other: str) -> str:
    """Another name for a leaf, in its section."""
    return ".".join([*name.split(".")[:-1], other])


def _off(flag: str) -> str:
    """How a switch is turned off: --probe.at-start by --probe.no-at-start."""
    section, dot, name = flag.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{name}"


def _switch(schema: type[pydantic.BaseModel], arguments: list[str]) -> str:
    """What to write in place of a switch that was given a value, or a ``no`` at the wrong place; else empty."""
    switches = {
        spelling: names[0]
        for name, field in _leaves(schema)
        if field.annotation is bool
        for names in [_spellings(name, field)]
        for spelling in names
    }
    turned_off = {_off(flag): flag for flag in switches}
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        flag, equals, value = argument.replace("_", "-").partition("=")
        value = (value if equals else following).lower()
        if flag.startswith("--no-") and flag not in turned_off and (own := switches.get(f"--{flag[5:]}")):
            return f"Unrecognized options: {flag}; did you mean {_off(own)}?"
        positive = turned_off.get(flag, flag)
        if positive in switches and value in _YES | _NO:
            on = (value in _YES) == (flag == positive)
            own = switches[positive]
            return f"{flag} is a switch and takes no value, found '{value}': write {own if on else _off(own)}"
    return ""


def _near_flags(schema: type[pydantic.BaseModel], arguments: list[str]) -> str:
    known = [flag for name, field in _leaves(schema) for flag in _spellings(name, field)]
    known += [
        _off(flag) for name, field in _leaves(schema) if field.annotation is bool for flag in _spellings(name, field)
    ]
    for argument in arguments:
        flag = argument.split("=")[0].replace("_", "-")
        if argument.startswith("--") and flag not in known:
            near = difflib.get_close_matches(flag, known, n=2, cutoff=0.6)
            if near:
                return " or ".join(near)
    return ""


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    both = {
        k: _merged(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }
    return below | both


def load_toml(schema: type[T], path: str, default: T | None = None) -> T:
    """Reads a TOML file into a frozen schema.

    Args:
        schema: The pydantic model.
        path: The file.
        default: Values for what the file does not give; None: the schema's own.

    Raises:
        UserError: No such file, no TOML, an unknown key, or a value that does not fit.
    """
    try:
        with Path(path).open("rb") as file:
            values = tomllib.load(file)
    except FileNotFoundError:
        raise UserError(f"no configuration file '{path}'") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a TOML file: {error}") from None
    if default is not None:
        values = _merged(default.model_dump(), values)
    try:
        return schema.model_validate(values)
    except pydantic.ValidationError as error:
        raise UserError(f"{path}: {reason(error)}") from None


def parse_with_file(schema: type[T], *, prog: str, argv: Sequence[str] | None = None, default: T) -> T:
    """Reads ``--config FILE``, which goes over the defaults, and flags, which go over the file.

    Args:
        schema: The pydantic model.
        prog: The command's name as the user types it.
        argv: The arguments without the command; those of the process where None.
        default: Values for what neither gives.

    Raises:
        UserError: An unknown key or flag, or a value that does not fit.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for position, argument in enumerate(arguments):
        if argument == "--config":
            if position + 1 == len(arguments):
                raise UserError("--config needs a TOML file")
            default = load_toml(schema, arguments[position + 1], default)
            del arguments[position : position + 2]
            break
        if argument.startswith("--config="):
            default = load_toml(schema, argument.split("=", 1)[1], default)
            del arguments[position]
            break
    if "--help" in arguments or "-h" in arguments:
        print("--config FILE reads a TOML file first; flags go over it. Recipes: pipelines/recipes/*.toml\n")
    return parse(schema, prog=prog, argv=arguments, default=default)


def _toml_value(value: Any) -> str:
    # JSON's strings, finite numbers, booleans and arrays are TOML's.
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    return str(value) if isinstance(value, float) and not math.isfinite(value) else json.dumps(value)


def to_toml(config: pydantic.BaseModel, title: str) -> str:
    """A configuration as a file that ``--config`` takes, under a comment: its own keys, then its sections."""
    sections = {
        name: value
        for name in type(config).model_fields
        if isinstance(value := getattr(config, name), pydantic.BaseModel)
    }
    own = {key: value for key, value in config.model_dump().items() if key not in sections}
    lines = [f"# {title}"]
    if own:
        lines += ["", *(f"{key} = {_toml_value(value)}" for key, value in own.items())]
    for name, section in sections.items():
        lines += [f"\n[{name}]", *(f"{key} = {_toml_value(value)}" for key, value in section.model_dump().items())]
    return "\n".join(lines) + "\n"
