"""Configuration: one frozen dataclass per service, filled from three sources, later ones winning.

    TOML file, table [section]   <   environment DIPTYCH_<SECTION>__<FIELD>   <   command-line flags

The environment's double underscore keeps our names apart from the variables that Kubernetes makes
for every service of a namespace (a service `diptych-gateway` gives DIPTYCH_GATEWAY_PORT=tcp://...).
A key that no field has, and a value of the wrong type, are errors that name their source: a typing
mistake must never become a silent default.

Fields may be str, int, float, bool, Path, a Literal, or one of these or None. Each says what it is
for in `metadata={"help": ...}`; a number may be limited with `"range": (least, most)` beside it. One with
`"secret": True` has no flag, since everybody on a machine can read command lines, and is never shown.

A section that several services share has flags of its own name: --cluster-ca is `ca` in [cluster].
"""

import argparse
import difflib
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec

from services.core.errors import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value from one source, not yet checked."""

    field: str
    value: object
    key: str  # as its author wrote it: port, DIPTYCH_GATEWAY__PORT, --port
    source: str  # for messages: the file's path, "environment", "command line"
    is_text: bool  # the source has only strings: "8000" may be an int


def load_config(
    kind: type[T],
    section: str,
    *,
    file: Path | None = None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    prefix: str = "",
) -> T:
    """A `kind` from its three sources. `flags` maps field names to values, those not given left out;
    `prefix` is what their flags begin with (see add_flags).

    Raises ConfigError for an unknown key, a value of the wrong type or out of its range, a missing
    required field, and a file that cannot be read or parsed.
    """
    hints = get_type_hints(kind)
    values: dict[str, object] = {}
    for setting in _settings(section, file, environ, flags, prefix):
        if setting.field not in _names(kind):
            raise ConfigError(f"{setting.source}: unknown setting {setting.key!r}{_hint(kind, setting)}")
        field = kind.__dataclass_fields__[setting.field]
        values[setting.field] = _convert(setting, hints[setting.field], bool(field.metadata.get("secret")))
        _check_range(setting, values[setting.field], field)
    for field in fields(kind):
        if field.name not in values and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{field.name} is required: {_ways_to_set(section, field.name)}")
    return kind(**values)


def add_flags(parser: argparse.ArgumentParser, kind: type["DataclassInstance"], prefix: str = "") -> None:
    """One --field-name per field of `kind` that is no secret, or --PREFIX-field-name. Flags not given are
    absent from the parsed namespace, and values stay strings: `load_config` converts them, so each source
    gives the same errors."""
    hints = get_type_hints(kind)
    for field in fields(kind):
        if field.metadata.get("secret"):
            continue
        flag, text = _flag(prefix + field.name), _help(field)
        if _without_none(hints[field.name]) is bool:
            action = argparse.BooleanOptionalAction
            parser.add_argument(flag, action=action, default=argparse.SUPPRESS, help=text)
        else:
            metavar = _metavar(_without_none(hints[field.name]))
            parser.add_argument(flag, default=argparse.SUPPRESS, metavar=metavar, help=text)


def given_flags(
    kind: type["DataclassInstance"], parsed: argparse.Namespace, prefix: str = ""
) -> dict[str, object]:
    """Those of `parsed` that are fields of `kind` and were given: the `flags` of load_config."""
    given = vars(parsed)
    return {name: given[prefix + name] for name in _names(kind) if prefix + name in given}


def _settings(
    section: str, file: Path | None, environ: Mapping[str, str], flags: Mapping[str, object], prefix: str
) -> Iterator[Setting]:
    """All settings, the weakest source first."""
    if file is not None:
        for name, value in _table(file, section).items():
            yield Setting(name, value, name, f"{file} [{section}]", is_text=False)
    ours = f"DIPTYCH_{section.upper()}__"
    for variable, text in sorted(environ.items()):
        if variable.startswith(ours):
            yield Setting(variable.removeprefix(ours).lower(), text, variable, "environment", is_text=True)
    for name, value in flags.items():
        yield Setting(name, value, _flag(prefix + name), "command line", is_text=isinstance(value, str))


def _table(file: Path, section: str) -> dict[str, Any]:
    """The [section] of a TOML file, which may hold other services' sections too."""
    try:
        document = tomllib.loads(file.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {file}: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file} is not valid TOML: {error}") from error
    for name, value in document.items():
        if not isinstance(value, dict):
            raise ConfigError(f"{file}: {name!r} stands outside a section; move it below [{section}]")
        if name != section and difflib.get_close_matches(name, [section], cutoff=0.8):
            raise ConfigError(f"{file}: unknown section [{name}]; did you mean [{section}]?")
    table: dict[str, Any] = document.get(section, {})
    return table


def _convert(setting: Setting, hint: Any, secret: bool) -> object:
    try:
        value = msgspec.convert(setting.value, hint, strict=not setting.is_text, dec_hook=_to_path)
        if isinstance(value, float) and math.isnan(value):  # within any bounds, compared with them
            raise TypeError(f"{value} is not a number")
        return value
    except (msgspec.ValidationError, TypeError) as error:
        wanted, found = _type_name(hint), "what it is" if secret else repr(setting.value)
        raise ConfigError(f"{setting.source}: {setting.key} must be {wanted}, not {found}") from error


def _check_range(setting: Setting, value: Any, field: Field[Any]) -> None:
    limits = field.metadata.get("range")
    if limits is None or value is None:
        return
    least, most = limits
    if not least <= value <= most:
        raise ConfigError(f"{setting.source}: {setting.key} must be from {least} to {most}, not {value}")


def _to_path(kind: type, value: object) -> Path:
    if kind is not Path or not isinstance(value, str):
        raise TypeError(f"{value!r} is not a path")
    return Path(value).expanduser()


def _type_name(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " or ".join(str(choice) for choice in get_args(hint))
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(_type_name(part) for part in get_args(hint))
    names = {str: "text", int: "int", float: "number", bool: "true or false", Path: "path", NoneType: "null"}
    return names[hint]


def _metavar(hint: Any) -> str:
    """The choices as they are written, or the type's name."""
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    return _type_name(hint).upper()


def _without_none(hint: Any) -> Any:
    parts = [part for part in get_args(hint) if part is not NoneType]
    return parts[0] if get_origin(hint) in (Union, UnionType) and len(parts) == 1 else hint


def _help(field: Field[Any]) -> str:
    text = str(field.metadata.get("help", ""))
    if field.default is not MISSING and field.default not in (None, ""):
        text += f" (default: {field.default})"
    return text.replace("%", "%%")


def _hint(kind: type["DataclassInstance"], setting: Setting) -> str:
    """' (did you mean NAME?)' in the form of the setting's own source."""
    near = difflib.get_close_matches(setting.field, _names(kind), n=1, cutoff=0.5)
    if not near:
        return f"; known: {', '.join(_names(kind))}"
    if setting.source == "environment":
        return f"; did you mean {setting.key.rpartition('__')[0]}__{near[0].upper()}?"
    return f"; did you mean {_flag(near[0]) if setting.key.startswith('--') else near[0]}?"


def _ways_to_set(section: str, name: str) -> str:
    return f"pass {_flag(name)}, set DIPTYCH_{section.upper()}__{name.upper()}, or {name} in [{section}]"


def _names(kind: type["DataclassInstance"]) -> list[str]:
    return [field.name for field in fields(kind)]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
