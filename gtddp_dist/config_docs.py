"""The list of configuration keys in words, generated from the schema: what `gtddp train --help` ends with."""

from __future__ import annotations

import dataclasses
import textwrap
import typing
from types import UnionType

from pydantic.fields import FieldInfo

from .config_schema import GROUPS

_SCALARS = {int: "integer", float: "number", bool: "true|false", str: "text", type(None): "null"}


@dataclasses.dataclass(frozen=True)
class OptionDoc:
    """One key of the schema."""

    key: str
    """Dotted key."""
    type: str
    """Accepted values, in words."""
    default: str
    """Default value as YAML."""
    text: str
    """What it is."""


def option_docs() -> list[OptionDoc]:
    """Every key, in the schema's order."""
    docs = []
    for group, cls in GROUPS.items():
        hints = typing.get_type_hints(cls, include_extras=True)
        fields: dict[str, FieldInfo] = cls.__pydantic_fields__  # type: ignore[attr-defined]
        for name, info in fields.items():
            docs.append(OptionDoc(f"{group}.{name}", _type_name(hints[name]), _default(info), info.description or ""))
    return docs


def render(width: int = 110) -> str:
    """The list as plain text."""
    lines = []
    for doc in option_docs():
        lines.append(f"  {doc.key} = {doc.default}   ({doc.type})")
        lines.extend(textwrap.wrap(doc.text, width, initial_indent=" " * 6, subsequent_indent=" " * 6))
    return "\n".join(lines)


def _default(info: FieldInfo) -> str:
    value = info.default
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value)


def _type_name(annotation: object) -> str:
    if isinstance(annotation, type) and annotation in _SCALARS:
        return _SCALARS[annotation]
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return f"{_type_name(args[0])} {' and '.join(_limits(args[1:]))}".strip()
    if origin is typing.Literal:
        return "|".join(str(choice) for choice in args)
    if origin in (typing.Union, UnionType):
        return ", or ".join(_type_name(arg) for arg in args)
    if origin is tuple:
        if args[1:] == (...,):
            return f"list, each {_type_name(args[0])}"
        return f"list of {len(args)}, each {_type_name(args[0])}"
    raise TypeError(f"the schema uses a type that has no name in the docs: {annotation!r}")


def _limits(metadata: tuple[object, ...]) -> list[str]:
    """Ranges among the metadata of an Annotated type."""
    limits = []
    for item in metadata:
        for limit in item.metadata if isinstance(item, FieldInfo) else (item,):
            for attribute, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
                bound = getattr(limit, attribute, None)
                if bound is not None:
                    limits.append(f"{sign} {bound}")
    return limits
