"""The reference of all TOML keys, from the settings themselves: `python -m loraedit_ext.reference > docs/configuration.md`."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from common.settings import Settings
from dataset.schema import JobSettings
from loraedit_ext.config import RunConfig
from loraedit_ext.evaluation.suite.settings import SuiteSettings

HEAD = """# Configuration

Two TOMLs: the run (`edit.toml`) and the edit job (`job.toml`). Unknown keys are errors, and all errors are reported
together. Paths are relative to the TOML that names them. Any key of the run can be overridden on the command line as
`key=value`, with dots for tables and numbers for list items (`optimizer.lr=2e-4`, `stage.0.steps=50`, `model.shift=None`).

This page is made by `python -m loraedit_ext.reference` from the settings themselves.
"""


def markdown() -> str:
    """The whole page."""
    parts = [HEAD]
    pages: tuple[tuple[str, type[Settings]], ...] = (
        ("The run: edit.toml", RunConfig), ("The edit job: job.toml", JobSettings),
        ("The benchmark: overrides `suite.KEY=value` of `evaluate.py --suite scenes`", SuiteSettings),
    )  # fmt: skip
    for title, kind in pages:
        parts.append(f"\n## {title}\n")
        parts += _tables("", kind)
    return "\n".join(parts) + "\n"


def _tables(name: str, kind: type[Settings]) -> Iterator[str]:
    """One table for `kind`, then those nested in it."""
    if name:
        yield f"\n### `{name}`\n\n{(kind.__doc__ or '').strip()}\n"
    yield "| key | type | default | |\n|---|---|---|---|"
    nested = []
    for key, field in kind.model_fields.items():
        inner = _settings_of(field.annotation)
        if inner:
            many = get_origin(field.annotation) in (list, tuple)
            prefix = name.strip("[]")
            path = f"{prefix}.{key}" if prefix else key
            nested.append((f"[[{path}]]" if many else f"[{path}]", inner))
        else:
            yield f"| `{key}` | {_type(field.annotation)} | {_default(field)} | {_text(field)} |"
    for path, inner in nested:
        yield from _tables(path, inner)


def _settings_of(annotation: Any) -> type[Settings] | None:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return annotation
    return next((found for arg in get_args(annotation) if (found := _settings_of(arg))), None)


def _type(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is typing.Annotated:
        return _type(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a) for a in arguments if a is not type(None)) or "nothing"
    if origin in (list, tuple):
        return f"list of {_type(arguments[0])}" if arguments else "list"
    if origin is dict:
        return f"table of {_type(arguments[1])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "**required**"
    if field.default is None or field.default in ([], ""):
        return ""
    return f"`{str(field.default).lower()}`" if isinstance(field.default, bool) else f"`{field.default}`"


def _text(field: FieldInfo) -> str:
    return " ".join((field.description or "").split()).replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
