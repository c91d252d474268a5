"""A small, strict subset of YAML 1.2 for configuration files; remembers the line of every key.

PyYAML's own loader speaks YAML 1.1, where `1e-3` is a string, `no` is a boolean, `010` is 8, and a key given
twice silently wins. Here plain scalars follow the core schema of YAML 1.2, keys are unique strings, and tags,
anchors and aliases are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

Scalar = str | int | float | bool | None
Value = Scalar | list["Value"] | dict[str, "Value"]

_NULL = re.compile(r"(?:~|null|Null|NULL|)\Z")
_BOOL = re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z")
_INT = re.compile(r"[-+]?[0-9]+\Z|0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?\Z"
    r"|[-+]?\.(?:inf|Inf|INF)\Z|\.(?:nan|NaN|NAN)\Z"
)
_MAX_DEPTH = 16
_MAX_DIGITS = 19  # of a 64-bit integer
_MAX_BYTES = 1 << 20


class YamlError(ValueError):
    """Text that this subset of YAML refuses; `line` counts from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.message = message


@dataclass(frozen=True)
class Document:
    """A parsed text: its value, and the line (from 1) of each key, by dotted path."""

    value: Value
    lines: Mapping[str, int]


class _Composer(yaml.SafeLoader):
    """Composes nodes only: no implicit types, every plain scalar reaches `_scalar` as it was written."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Quotes a string that any reader, of YAML 1.1 or 1.2, would take for something else."""


for _tag, _pattern in (("int", _INT), ("float", _FLOAT)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, list("-+.0123456789"))


def read_text(path: Path) -> str:
    """The text of a file, for `parse`. Raises OSError, and ValueError where it is not UTF-8 or larger than any
    configuration: a mistyped path must not fill the memory."""
    with open(path, "rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise ValueError(f"it has more than {_MAX_BYTES} bytes: is it the right file?")
    return data.decode("utf-8")


def parse(text: str) -> Document:
    """Parse one YAML document; raises YamlError. Empty text gives None."""
    try:
        _check_events(text)
        loader = _Composer(text)
        try:
            node = loader.get_single_node()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise YamlError(mark.line + 1 if mark else 1, f"not valid YAML: {what}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise YamlError(line, f"not valid YAML: character {error.character!r} is not allowed") from error
    except (ValueError, OverflowError) as error:
        if isinstance(error, YamlError):
            raise
        # PyYAML hands out-of-range \U escapes to chr() as they are.
        raise YamlError(1, f"not valid YAML: {error}") from error
    lines: dict[str, int] = {}
    value = None if node is None else _value(node, "", lines)
    return Document(value, lines)


def dump(value: Mapping[str, object]) -> str:
    """YAML text that `parse` reads back as an equal value."""
    return str(yaml.dump(dict(value), Dumper=_Dumper, sort_keys=False, width=10**6, default_flow_style=False))


def _check_events(text: str) -> None:
    """Refuse what must not reach the composer: tags, anchors, aliases, nesting that exhausts the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 1
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
            raise YamlError(line, "YAML anchors and aliases are not supported: write the value out")
        tag = getattr(event, "tag", None)
        if tag is not None:
            raise YamlError(line, f"YAML tags are not supported: remove {tag!r}")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > _MAX_DEPTH:
                raise YamlError(line, f"nested more than {_MAX_DEPTH} levels deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _value(node: yaml.Node, path: str, lines: dict[str, int]) -> Value:
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node)
    if isinstance(node, yaml.SequenceNode):
        return [_value(item, path, lines) for item in node.value]
    mapping: dict[str, Value] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
        if not isinstance(key, str):
            raise YamlError(line, f"a key must be a word, got {_shorten(_text_of(key_node))}")
        if key in mapping:
            first = lines[f"{path}{key}"]
            raise YamlError(line, f"{path}{key} is given twice, first in line {first}: remove one")
        lines[f"{path}{key}"] = line
        mapping[key] = _value(value_node, f"{path}{key}.", lines)
    return mapping


def _scalar(node: yaml.ScalarNode) -> Scalar:
    text: str = node.value
    if node.style is not None:  # quoted, or a block
        return text
    if _NULL.match(text):
        return None
    if _BOOL.match(text):
        return text.lower() == "true"
    if _INT.match(text):
        if len(text.lstrip("+-")) > _MAX_DIGITS:
            raise YamlError(node.start_mark.line + 1, f"{_shorten(text)} is too large an integer")
        return int(text, 0) if text[:2] in ("0o", "0x") else int(text)
    if _FLOAT.match(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _text_of(node: yaml.Node) -> str:
    """How a message names a node that cannot be a key."""
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else text[:37] + "..."
