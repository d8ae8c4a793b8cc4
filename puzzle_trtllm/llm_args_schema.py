"""TensorRT-LLM's LLM arguments, held against the recorded schema: a wrong key is found here, not on the GPU host.

`llm_args_schema.json` lists the fields of `TorchLlmArgs` and its nested classes as read in TensorRT-LLM's source. All
of those classes forbid unknown keys, so one name that a line does not have stops an engine from starting: a field is
accepted only when the engine config targets a line that has it. Types are checked as far as YAML can get them wrong;
types that are classes we did not record are let through.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.models.trtllm.upstream import ALL_LINES

SCHEMA_FILE = Path(__file__).with_name("llm_args_schema.json")
ROOT_CLASS = "TorchLlmArgs"
NEWEST_TARGET = "late"
ANY_TARGET = "any"
"""Every field of every line, for files that may have been edited for another one."""
_LATE = "_added_on_late_main"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_OPTIONAL = re.compile(r"^Optional\[(.*?)\]( \[0,1\])?$")


@cache
def fields_of(class_name: str, target: str) -> Mapping[str, str]:
    """Field name: type, of one argument class in one TensorRT-LLM line, or in ANY_TARGET."""
    entries = _schema()[class_name]
    newest = entries.get(_LATE, {}) if target in (NEWEST_TARGET, ANY_TARGET) else {}
    own = {name: entry for name, entry in entries.items() if not name.startswith("_")}
    line = entries.get("_lines", {}).get(target, {})
    types = {name: entry["type"] for name, entry in {**own, **newest}.items()} | line.get("types", {})
    return {name: kind for name, kind in types.items() if name not in line.get("absent", ())}


def argument_classes() -> tuple[str, ...]:
    """Names of the recorded classes, the root class first."""
    return tuple(name for name in _schema() if not name.startswith("_"))


def section_class(key: str) -> str | None:
    """The class of a nested section such as kv_cache_config, or None for a plain field."""
    name = _strip_optional(_schema()[ROOT_CLASS].get(key, {}).get("type", ""))
    return name if name in _schema() else None


def check_llm_args(arguments: Mapping[str, Any], *, target: str, file: str | Path) -> None:
    """Raise ConfigError at the first key that TensorRT-LLM's `LLM` would refuse, or value of another type."""
    _check_class(ROOT_CLASS, arguments, target, "", file)


def check_known_types(arguments: Mapping[str, Any], *, file: str | Path) -> None:
    """The same for a file that was checked when it was made, and edited since; what a newer line has added passes."""
    check_llm_args(arguments, target=ANY_TARGET, file=file)


@cache
def _schema() -> dict[str, Any]:
    schema: dict[str, Any] = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
    return schema


def _check_class(class_name: str, values: Mapping[str, Any], target: str, prefix: str, file: str | Path) -> None:
    fields = fields_of(class_name, target)
    for key, value in values.items():
        if key not in fields and target == ANY_TARGET:
            continue
        if key not in fields:
            raise _unknown_key(class_name, key, target, prefix, file)
        kind = _strip_optional(fields[key])
        if value is None and kind != fields[key]:
            continue
        if kind in _schema() and isinstance(value, Mapping):
            _check_class(kind, value, target, f"{prefix}{key}.", file)
        elif kind == "Dict[str,str]" and isinstance(value, Mapping):
            _check_environment(value, f"{prefix}{key}", file)
        elif not _fits(kind, value):
            raise ConfigError(
                "wrong type of an LLM argument",
                file=file,
                key=f"{prefix}{key}",
                found=json.dumps(value, default=str),
                expected=fields[key],
            )


def _check_environment(variables: Mapping[Any, Any], key: str, file: str | Path) -> None:
    """Environment variables, the only mapping of strings among the arguments; a shell must be able to export them."""
    for name, value in variables.items():
        if not isinstance(name, str) or _VARIABLE.fullmatch(name) is None:
            message = "no name of an environment variable"
            raise ConfigError(message, file=file, key=f"{key}.{name}", expected="letters, digits and _, no digit first")
        if not isinstance(value, str):
            expected = f'a string: "{value}" in quotes' if _is_number(value) else "a string"
            message = "wrong type of an LLM argument"
            raise ConfigError(
                message, file=file, key=f"{key}.{name}", found=json.dumps(value, default=str), expected=expected
            )


def _unknown_key(class_name: str, given: Any, target: str, prefix: str, file: str | Path) -> ConfigError:
    key = str(given)
    others = [line for line in ALL_LINES if key in fields_of(class_name, line)]
    if others:
        message = f"not in TensorRT-LLM's line {target}, only in {' and '.join(others)}"
        return ConfigError(message, file=file, key=prefix + key, expected="an engine without it, or another target")
    reason = _schema()[class_name].get("_not_fields", {}).get(key)
    if reason is not None:
        return ConfigError(f"not an LLM argument: {reason}", file=file, key=prefix + key)
    close = difflib.get_close_matches(key, fields_of(class_name, target), n=1)
    hint = f"; did you mean {prefix}{close[0]}?" if close else ""
    return ConfigError(f"unknown LLM argument of TensorRT-LLM's {class_name}{hint}", file=file, key=prefix + key)


def _strip_optional(kind: str) -> str:
    match = _OPTIONAL.match(kind)
    return match[1] + (match[2] or "") if match else kind


def _fits(kind: str, value: Any) -> bool:
    if kind.startswith("Literal["):
        return value in [choice.strip("'\" ") for choice in kind[len("Literal[") : -1].split(",")]
    if kind.startswith("List["):
        return isinstance(value, list) and all(_fits(kind[len("List[") : -1], item) for item in value)
    if kind.startswith("Dict[") or kind in _schema():
        return isinstance(value, Mapping)
    check = _CHECKS.get(kind) or _CHECKS.get(re.split(r"[ |]", kind)[0])
    return check is None or check(value)


def _is_integer(value: Any) -> bool:
    """One that C++ has, too."""
    return isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_CHECKS: Mapping[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "str": lambda value: isinstance(value, str),
    "int": _is_integer,
    "PositiveInt": lambda value: _is_integer(value) and value > 0,
    "NonNegativeInt": lambda value: _is_integer(value) and value >= 0,
    "float": _is_number,
    "float [0,1]": lambda value: _is_number(value) and 0 <= value <= 1,
    "NonNegativeFloat": lambda value: _is_number(value) and value >= 0,
}
