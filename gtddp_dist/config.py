"""Configuration: shipped or own YAML files, `key=value` from the command line, and errors that say where.

The schema itself, with every key, type and default, is `gtddp_dist.config_schema`; its names can be imported
from here. The command line counts over the file, the file over the defaults.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path

from pydantic import ValidationError

from . import strict_yaml
from .config_schema import (
    GROUPS,
    INCONSISTENT,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Problem,
    RunConfig,
    ScheduleConfig,
    TrainConfig,
)
from .errors import ConfigError
from .registry import nearest, nearest_first

__all__ = [
    "GRID_KEYS",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "DataConfig",
    "Draft",
    "EvalConfig",
    "LogConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "RunConfig",
    "ScheduleConfig",
    "TrainConfig",
    "draft",
    "from_yaml",
    "load_config",
    "named_config",
    "shipped_configs",
    "to_yaml",
]

_COMMAND_LINE = "command line"

GRID_KEYS = ("parallel.", "train.replica_groups=")
"""Beginnings of the `key=value` words that say on which grid a run is continued."""


@dataclasses.dataclass(frozen=True)
class _Setting:
    """A value for a key, and where it was given."""

    value: strict_yaml.Value
    origin: str


@dataclasses.dataclass(frozen=True)
class Draft:
    """Settings by dotted key, with where each was given, that are not validated yet; `build` does it."""

    _settings: Mapping[str, _Setting] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()
    """Problems found so far: keys that the schema does not have, words that are no key=value."""

    def over(self, values: Mapping[str, strict_yaml.Value], origins: Mapping[str, str]) -> Draft:
        """The same with these values over it; `origins` says in messages where each of them was given."""
        settings, problems = dict(self._settings), list(self.unread)
        for key, value in values.items():
            if key in _keys():
                settings[key] = _Setting(value, origins[key])
            else:
                problems.append(_unknown(key, origins[key], in_file=False))
        return Draft(settings, tuple(problems))

    def overridden(self, overrides: Sequence[str]) -> Draft:
        """The same with `key=value` of the command line over it; of two of one key the later counts."""
        settings, problems = dict(self._settings), list(self.unread)
        for override in overrides:
            _apply_override(override, settings, problems)
        return Draft(settings, tuple(problems))

    def values(self) -> dict[str, strict_yaml.Value]:
        """What was given, by dotted key."""
        return {key: setting.value for key, setting in self._settings.items()}

    def problems(self) -> list[str]:
        """What `build` would find, one message a problem; nothing for a valid configuration."""
        found = list(self.unread)
        _build(self._settings, found)
        return found

    def build(self) -> Config:
        """The configuration. Raises ConfigError with all problems."""
        problems = list(self.unread)
        config = _build(self._settings, problems)
        if config is None:
            count = "" if len(problems) == 1 else f"{len(problems)} problems in the configuration:\n  "
            raise ConfigError(count + "\n  ".join(problems))
        return config


def draft(name_or_path: str) -> Draft:
    """The settings of a shipped config (by name) or a YAML file (by path). Raises ConfigError where it cannot be read.

    For who wants many configurations of one file; for one there is `load_config`.
    """
    text, source = _read(name_or_path)
    settings, problems = _settings_of_file(text, source)
    return Draft(settings, tuple(problems))


def load_config(name_or_path: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a shipped config (by name) or a YAML file (by path), with `key=value` overrides.

    A value is read as YAML; of two overrides of one key the later counts. Raises ConfigError with all
    problems it finds: unknown key, wrong type, out of range, options that exclude each other, no such file.
    """
    return draft(name_or_path).overridden(overrides).build()


def named_config(words: Sequence[str], command: str) -> tuple[str, Config]:
    """The name and the configuration that `words` of a command line stand for: a config, then `key=value`.

    Raises ConfigError, also where no config comes first; `command` is named then.
    """
    if not words or "=" in words[0]:
        shipped = ", ".join(shipped_configs())
        raise ConfigError(f"{command} needs a config before any key=value. Shipped configs: {shipped}")
    name, *overrides = words
    return Path(name).stem, load_config(name, overrides)


def from_yaml(text: str, source: str = "YAML text") -> Config:
    """The configuration that `to_yaml` wrote; `source` names the text in messages. Raises ConfigError."""
    settings, problems = _settings_of_file(text, source)
    return Draft(settings, tuple(problems)).build()


def to_yaml(config: Config) -> str:
    """Every key with its value, defaults included; `from_yaml` reads it back as an equal configuration."""
    groups = {
        group: {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        for group, values in dataclasses.asdict(config).items()
    }
    return strict_yaml.dump(groups)


def shipped_configs() -> list[str]:
    """Names of the configs that come with the package, which `load_config` takes without a path."""
    folder = resources.files(__package__).joinpath("configs")
    return sorted(item.name[: -len(".yaml")] for item in folder.iterdir() if item.name.endswith(".yaml"))


def _read(name_or_path: str) -> tuple[str, str]:
    """Text of a config, and how messages name it."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml") and path.name == name_or_path:
        if name_or_path in shipped_configs():
            shipped = resources.files(__package__).joinpath("configs").joinpath(f"{name_or_path}.yaml")
            return shipped.read_text(encoding="utf-8"), f"shipped config {name_or_path}"
        if not os.path.isfile(path):  # unlike Path.is_file it raises for no name, however long
            listed = ", ".join(nearest_first(name_or_path, shipped_configs()))
            raise ConfigError(
                f"no config named {name_or_path!r}. Shipped configs: {listed}. "
                "For a file of your own give its path, for example my/experiment.yaml"
            )
    try:
        return strict_yaml.read_text(path), name_or_path
    except FileNotFoundError:
        listed = ", ".join(nearest_first(path.stem, shipped_configs()))
        raise ConfigError(f"no such file: {name_or_path}. Shipped configs, given by name: {listed}") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the config {name_or_path}: {error}") from error


def _settings_of_file(text: str, source: str) -> tuple[dict[str, _Setting], list[str]]:
    """Settings by dotted key, and problems: keys that the schema does not know."""
    try:
        document = strict_yaml.parse(text)
    except strict_yaml.YamlError as error:
        raise ConfigError(f"{source}, line {error.line}: {error.message}") from error
    if document.value is None:
        raise ConfigError(f"{source} is empty: set at least one option, for example\ntrain:\n  epochs: 8")
    if not isinstance(document.value, dict):
        raise ConfigError(f"{source} must hold groups of options ('train:', ...), not {_show(document.value)}")
    settings: dict[str, _Setting] = {}
    problems: list[str] = []
    for group, values in document.value.items():
        origin = f"{source}, line {document.lines[group]}"
        if group not in GROUPS:
            problems.append(_unknown(group, origin, in_file=True))
        elif not isinstance(values, dict):
            shown = "nothing" if values is None else _show(values)
            problems.append(f"{group} ({origin}): expected options on indented lines below it, got {shown}")
        else:
            for name, value in values.items():
                key = f"{group}.{name}"
                origin = f"{source}, line {document.lines[key]}"
                if key in _keys():
                    settings[key] = _Setting(value, origin)
                else:
                    problems.append(_unknown(key, origin, in_file=True))
    return settings, problems


def _apply_override(override: str, settings: dict[str, _Setting], problems: list[str]) -> None:
    key, separator, text = override.partition("=")
    key = key.strip()
    if not separator or not key:
        problems.append(f"{override!r} ({_COMMAND_LINE}): expected key=value, for example train.epochs=4")
    elif key not in _keys():
        problems.append(_unknown(key, _COMMAND_LINE, in_file=False))
    elif not text.strip():
        problems.append(f"{key} ({_COMMAND_LINE}): no value after '='; to unset an option write {key}=null")
    else:
        try:
            settings[key] = _Setting(strict_yaml.parse(text).value, _COMMAND_LINE)
        except strict_yaml.YamlError as error:
            problems.append(f"{key} ({_COMMAND_LINE}): {error.message}; text with special characters needs quotes")


def _build(settings: Mapping[str, _Setting], problems: list[str]) -> Config | None:
    """The validated configuration; None where there are problems, and those that validation finds join them."""
    groups = {}
    for group, cls in GROUPS.items():
        values = {
            key.partition(".")[2]: setting.value for key, setting in settings.items() if key.startswith(f"{group}.")
        }
        try:
            groups[group] = cls(**values)
        except ValidationError as error:
            problems.extend(_field_problems(group, error, settings))
    if not problems:
        try:
            return Config(**groups)
        except ValidationError as error:
            problems.extend(_consistency_messages(error, settings))
    return None


def _field_problems(group: str, error: ValidationError, settings: Mapping[str, _Setting]) -> Iterable[str]:
    """One message a field: pydantic reports the alternatives of a union one by one, they are joined here."""
    expected: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        name, *rest = item["loc"]
        what = item["msg"].replace("Input should be ", "").replace("a valid tuple", "a list")
        if item["type"] in ("missing", "too_long"):
            what = "a list of another length"
        elif what.startswith(("greater than", "less than")):
            what = f"a number {what}"
        indices = [part for part in rest if isinstance(part, int)]
        if indices and item["type"] != "missing":
            what = f"at position {indices[0] + 1} {what}"
        expected.setdefault(f"{group}.{name}", []).append(what)
    for key, alternatives in expected.items():
        setting = settings[key]
        choices = " or ".join(dict.fromkeys(alternatives))
        yield f"{key} = {_show(setting.value)} ({setting.origin}): expected {choices}"


def _consistency_messages(error: ValidationError, settings: Mapping[str, _Setting]) -> Iterable[str]:
    for item in error.errors(include_url=False):
        if item["type"] != INCONSISTENT:
            raise error
        found: list[Problem] = item["ctx"]["problems"]
        for problem in found:
            given = [
                f"{key} = {_show(settings[key].value)} ({settings[key].origin})"
                for key in problem.keys
                if key in settings
            ]
            yield f"{', '.join(given or problem.keys)}: {problem.message}"


def _unknown(key: str, origin: str, *, in_file: bool) -> str:
    """Message for a key that the schema does not have."""
    if key in GROUPS:
        options = ", ".join(name for name in _keys() if name.startswith(f"{key}."))
        return f"{key} ({origin}): a group of options, not an option; its options: {options}"
    if in_file and key in _keys():
        group, _, name = key.partition(".")
        return f"{key} ({origin}): in a file write '{group}:' and, indented below it, '{name}: ...'"
    group = key.partition(".")[0]
    close = nearest(key, (*GROUPS, *_keys()) if "." not in key else _keys())
    if close:
        hint = "nearest: " + ", ".join(close)
    elif group in GROUPS:
        hint = "options there: " + ", ".join(name for name in _keys() if name.startswith(f"{group}."))
    else:
        hint = "groups: " + ", ".join(GROUPS)
    return f"{key} ({origin}): unknown key; {hint}"


def _keys() -> tuple[str, ...]:
    return tuple(f"{group}.{item.name}" for group, cls in GROUPS.items() for item in dataclasses.fields(cls))


def _show(value: object) -> str:
    """A value as messages show it, at bounded length."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(list(value)) if isinstance(value, tuple) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
