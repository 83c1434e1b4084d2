"""From flags and environment variables to a dataclass: the machinery of `settings`.

A field's metadata is its documentation; the command line is generated from it, so flag, variable and help never disagree.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, field, fields
from pathlib import Path
from typing import Any

_SPAN = re.compile("([0-9]{1,9})(?:-([0-9]{1,9}))?")
_MOST_CPUS = 4096


class SettingsError(ValueError):
    """A setting that cannot be; the message names its flag."""


def setting(
    help: str,
    default: Any = MISSING,
    *,
    parse: Callable[[str], Any] = str,
    variables: tuple[str, ...] = (),
    repeatable: bool = False,
) -> Any:
    """A field with a flag and a variable. `variables` are further environment variables that are honoured, after EPD_<NAME>.
    A `repeatable` flag may be given several times, which is the same as once with commas."""
    metadata = {"help": help, "parse": parse, "variables": variables, "repeatable": repeatable}
    return field(metadata=metadata) if default is MISSING else field(default=default, metadata=metadata)


def flag(text: str) -> bool:
    values = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}
    if text.lower() not in values:
        raise ValueError("must be true or false")
    return values[text.lower()]


def whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError("must be a whole number") from None


def number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("must be a number") from None


def words(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


def path_or_none(text: str) -> Path | None:
    return None if text in ("", "none") else Path(text)


def cpu_list(text: str) -> tuple[int, ...]:
    """`0-3,8` → (0, 1, 2, 3, 8), as taskset and the kernel write it."""
    cpus: list[int] = []
    for part in words(text):
        span = _SPAN.fullmatch(part)
        named = range(int(span[1]), int(span[2] or span[1]) + 1) if span else ()
        if not 0 < len(named) <= _MOST_CPUS:
            raise ValueError("must be a list of CPUs such as 0-3,8")
        cpus += named
    return tuple(cpus)


def add_arguments(settings: type, parser: argparse.ArgumentParser) -> None:
    """One flag for each field; what is not given on the command line is left to the environment."""
    for one in fields(settings):
        variables = ", ".join(variables_of(one))
        default = "" if one.default is MISSING or one.default == () else f", default {_shown(one.default)}"
        options: dict[str, Any] = {
            "default": None,
            "action": "append" if one.metadata["repeatable"] else "store",
            "metavar": one.name.upper(),
            "help": f"{one.metadata['help']} ({variables}{default})".replace("%", "%%"),
        }
        if one.metadata["parse"] is flag:
            options |= {"nargs": "?", "const": "true"}
        parser.add_argument(flag_name(one.name), **options)


def values_from(
    settings: type, flags: Mapping[str, str | list[str] | None], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Flags first, then the environment, then defaults. A variable that is set to nothing counts as not set. A flag that is
    given as nothing is refused, unless nothing is its default: `--artifact "$DIR"` without DIR is a mistake.

    Raises:
        SettingsError: if a value does not parse, a flag is empty, or a required one is missing.
    """
    values: dict[str, Any] = {}
    for one in fields(settings):
        from_flag = flags.get(one.name)
        given = {flag_name(one.name): ",".join(from_flag) if isinstance(from_flag, list) else from_flag}
        given |= {variable: environment.get(variable) or None for variable in variables_of(one)}
        source, text = next(((name, text) for name, text in given.items() if text is not None), ("", None))
        if text is None:
            if one.default is MISSING and one.default_factory is MISSING:
                raise SettingsError(f"{flag_name(one.name)} (or {variables_of(one)[0]}) is required")
            continue
        if not text and one.default not in ("", ()):
            raise SettingsError(f"{flag_name(one.name)} is empty; give it a value, or leave the flag out")
        try:
            values[one.name] = one.metadata["parse"](text)
        except ValueError as error:
            origin = "" if source == flag_name(one.name) else f" from {source}"
            raise SettingsError(f"{flag_name(one.name)} {error}, got {text!r}{origin}") from None
    return values


def flag_name(name: str) -> str:
    return "--" + name.replace("_", "-")


def variables_of(one: Field[Any]) -> tuple[str, ...]:
    return (f"EPD_{one.name.upper()}", *one.metadata["variables"])


def _shown(default: Any) -> str:
    return ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
