"""Configurations in TOML: read strictly, on top of another, and written back so that the file alone repeats the run.

    config = read_config("run.toml")            # unknown keys and wrong types are refused by path
    write_config(config, "runs/a/config.toml")  # the resolved file has no preset and no defaults left open

TOML has no null: there, and on the command line, the text `none` stands for None, "not given".
"""

import dataclasses
import difflib
import hashlib
import tomllib
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tomli_w

from threetowers.config import RunConfig
from threetowers.errors import UsageError
from threetowers.paths import directory, from_here

T = TypeVar("T")


def replace_nested(config: T, values: dict[str, Any], where: str = "") -> T:
    """The configuration with the given keys replaced; siblings of a nested key keep their values.

    values: nested plain values as TOML gives them. Raises UsageError that names the path of the first unknown
    or ill-typed key and the nearest known one.
    """
    assert is_dataclass(config) and not isinstance(config, type)
    hints = get_type_hints(type(config))
    changes: dict[str, Any] = {}
    for key, value in values.items():
        path = f"{where}{key}"
        if key not in hints:
            raise UsageError(f"{path}: no such key{did_you_mean(key, hints)}")
        current = getattr(config, key)
        if is_dataclass(current):
            if not isinstance(value, dict):
                raise UsageError(
                    f"{path}: this is a section; write [{path}] and its keys below, not {value!r}"
                )
            changes[key] = replace_nested(current, value, f"{path}.")
        else:
            changes[key] = _coerce(value, hints[key], path)
    return dataclasses.replace(config, **changes)  # type: ignore[no-any-return]


def did_you_mean(word: str, known: Any) -> str:
    """A clause that names the nearest known word, or lists them all: '; did you mean `steps`?'."""
    known = [str(name) for name in known]
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean `{near[0]}`?" if near else f". Known: {', '.join(known)}"


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """The plain value as the annotated type, or a UsageError; int passes as float, a lone value as a 1-tuple."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Literal:
        if value not in arguments:
            raise UsageError(f"{path}: {value!r} is not one of {', '.join(map(repr, arguments))}")
        return value
    if origin is tuple:
        return _coerce_tuple(value, arguments, path)
    if origin is dict:
        if not isinstance(value, dict):
            raise UsageError(f"{path}: expected a table of keys, got {value!r}")
        return {str(k): _coerce(v, arguments[1], f"{path}.{k}") for k, v in value.items()}
    if origin in (Union, types.UnionType):
        if type(None) in arguments and value == "none":
            return None
        if any(type(value) is kind for kind in arguments):
            return value
        kinds = [kind for kind in arguments if kind is not type(None)]
        if len(kinds) == 1:
            return _coerce(value, kinds[0], path)
        names = " or ".join(kind.__name__ for kind in kinds)
        raise UsageError(f"{path}: expected {names}, got {value!r}")
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:  # bool is an int to isinstance, and `true` steps are a mistake
        raise UsageError(f"{path}: expected {hint.__name__}, got {value!r} ({type(value).__name__})")
    return value


def _coerce_tuple(value: Any, arguments: tuple[Any, ...], path: str) -> tuple[Any, ...]:
    values = list(value) if isinstance(value, list | tuple) else [value]
    open_ended = len(arguments) == 2 and arguments[1] is Ellipsis
    if open_ended and values == ["none"]:
        return ()
    if not open_ended and len(values) != len(arguments):
        raise UsageError(f"{path}: expected {len(arguments)} values, got {len(values)}")
    kinds = [arguments[0]] * len(values) if open_ended else list(arguments)
    return tuple(
        _coerce(v, kind, f"{path}[{i}]") for i, (v, kind) in enumerate(zip(values, kinds, strict=True))
    )


def read_toml(path: str | Path) -> dict[str, Any]:
    """The file's keys; raises UsageError with the line when it is not TOML."""
    path = Path(path)
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a TOML file: {error}") from None


def read_config(path: str | Path, base: RunConfig | None = None) -> RunConfig:
    """The run that a TOML file describes, on top of `base` (default: the dataclasses' own defaults)."""
    return apply_values(base or RunConfig(), read_toml(path), path)


def apply_values(config: T, values: dict[str, Any], path: str | Path) -> T:
    """`replace_nested` with the values of a file, which its errors name; its paths as seen from here."""
    try:
        return replace_nested(config, from_here(values, Path(path)))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None


def as_plain(config: Any) -> dict[str, Any]:
    """The configuration as nested values that TOML has, every key present: tuples as lists, None as `none`."""
    return {f.name: _plain(getattr(config, f.name)) for f in fields(config)}


def _plain(value: Any) -> Any:
    if is_dataclass(value):
        return as_plain(value)
    return "none" if value is None else list(value) if isinstance(value, tuple) else value


def write_config(config: RunConfig, path: str | Path) -> None:
    """Writes every key, so that the file depends on no default, and what its paths are relative to."""
    text = tomli_w.dumps({**directory(Path(path)), **as_plain(config)})
    Path(path).write_text(text, encoding="utf-8")


def config_hash(config: RunConfig) -> str:
    """Eight hex digits that differ when any key differs."""
    return hashlib.sha256(tomli_w.dumps(as_plain(config)).encode()).hexdigest()[:8]
