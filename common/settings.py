"""Closed, typed settings read from TOML: unknown keys are errors, all errors come together.

A settings class derives from `Settings`; `load_settings` reads a TOML file into it and reports each
problem with file, key, value and expectation.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from common.errors import UserError, UserErrors

SECRET_KEYS = ("api_key", "token", "password")
"""Ends of key names whose values no message repeats."""


class Settings(BaseModel):
    """Base of every settings table: closed, immutable, validated also for defaults."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    elsewhere: ClassVar[Mapping[str, str]] = {}
    """Keys that other tools have here -> what to do with them; for the message that refuses them."""

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """`save_every_n_steps = true` would mean every step."""
        kinds = set(_parts(cls.model_fields[str(info.field_name)].annotation))
        if isinstance(value, bool) and bool not in kinds and kinds & {int, float}:
            raise ValueError("expected a number, found true or false")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _nothing_is_no_path(cls, value: Any, info: ValidationInfo) -> Any:
        """`source = ""` would mean the TOML's own folder."""
        if value == "" and Path in _parts(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError("is empty, expected a path. Leave the key out if there is none")
        return value


S = TypeVar("S", bound=Settings)


def chosen(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that have a value: one that is None decides nothing, also where records are older than its key."""
    return {key: value for key, value in values.items() if value is not None}


def read_toml(path: Path) -> dict[str, Any]:
    """Parse a TOML file; a missing or malformed file is a `UserError` that names it."""
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))  # editors on Windows write a byte order mark
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file. Give the path of an existing TOML file.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: is a folder, expected a TOML file.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid TOML: {error}.") from error


def load_settings(kind: type[S], path: Path, values: dict[str, Any] | None = None) -> S:
    """Validate `values` (by default the content of the TOML at `path`) as `kind`.

    Raises:
        UserError: one or more keys are unknown, missing or of the wrong type; all are listed.
    """
    values = read_toml(path) if values is None else values
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        told: dict[str, list[str]] = {}  # a value that may be of several types has a problem with each
        for problem in error.errors():
            where, text = _describe(kind, problem, values)
            told.setdefault(where, []).append(text)
        messages = [f"{path}: {where}{'; or '.join(texts)}" for where, texts in told.items()]
        raise UserErrors(messages) if len(messages) > 1 else UserError(messages[0]) from error


def _describe(kind: type[Settings], problem: Any, values: Mapping[str, Any]) -> tuple[str, str]:
    """Where a problem is, and what it is."""
    location = _written(problem, values)
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{key}`; ", _hint(str(location[-1]), _table_at(kind, location[:-1]))
    if problem["type"] == "missing":
        return f"missing key `{key}`; ", "it is required."
    is_table = isinstance(problem["input"], dict)
    if problem["type"] in ("list_type", "tuple_type") and is_table and problem["loc"][-1] == location[-1]:
        return f"`{key}`: ", f"is one table, expected a list of them: write [[{key}]]."
    text = problem["msg"].removeprefix("Value error, ")
    if key and is_table:
        return f"`{key}`: ", text  # what is wrong stands in the text; the table is long
    value = "(not shown)" if key.endswith(SECRET_KEYS) else repr(problem["input"])
    return (f"`{key}` = {value}: " if key else "the file as a whole: "), text


def _written(problem: Any, values: Any) -> list[Any]:
    """The location of a problem as the file has it, without pydantic's names for its validators and a union's types."""
    location = []
    for part in problem["loc"]:
        if (found := _step(values, part)) is not None:
            location.append(part)
            values = found
    return [*location, problem["loc"][-1]] if problem["type"] == "missing" else location


def _step(values: Any, part: Any) -> Any:
    """What lies below a table or list under a key or index, or a key with dots that stands for nested tables; or None."""
    if isinstance(part, int):
        return values[part] if isinstance(values, list | tuple) and part < len(values) else None
    if not isinstance(values, dict):
        return None
    first, dot, rest = part.partition(".")
    return _step(values.get(first), rest) if dot and part not in values else values.get(part)


def _hint(name: str, table: type[Settings]) -> str:
    """What to do about a key that the table does not have."""
    if name in table.elsewhere:
        return table.elsewhere[name]
    close = difflib.get_close_matches(name, table.model_fields, n=1)
    return f"did you mean `{close[0]}`?" if close else f"known keys: {', '.join(sorted(table.model_fields))}."


def _table_at(kind: type[Settings], location: list[Any]) -> type[Settings]:
    """The settings table that `location` leads to."""
    for part in location:
        if field := kind.model_fields.get(part):  # else an index, or a key that is free to choose
            kind = _settings_in(field.annotation) or kind
    return kind


def _settings_in(annotation: Any) -> type[Settings] | None:
    return next((kind for kind in _parts(annotation) if isinstance(kind, type) and issubclass(kind, Settings)), None)


def _parts(annotation: Any) -> Iterator[Any]:
    """An annotation without arguments as it is; those that a union, a list or the like is made of."""
    arguments = get_args(annotation)
    if not arguments:
        yield annotation
    for argument in arguments:
        yield from _parts(argument)
