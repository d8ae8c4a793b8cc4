"""LLM arguments while they are derived: each with its reason, an override of the engine config always wins.

`put` returns the value that holds, so that whatever is derived from it follows an override too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from puzzle_trtllm.llm_args_schema import section_class

OVERRIDE = "llm_args of the engine config"


class DerivedValue(NamedTuple):
    """One argument, where it comes from."""

    key: str
    """Dotted: kv_cache_config.dtype."""
    value: Any
    reason: str


class Values:
    """Collects values; an override of the same key replaces the derived one."""

    def __init__(self, overrides: Mapping[str, Any]) -> None:
        self._values: list[DerivedValue] = []
        self._overrides: dict[str, Any] = {}
        for key, value in overrides.items():
            if isinstance(value, Mapping) and section_class(key) is not None:
                self._overrides.update({f"{key}.{name}": inner for name, inner in value.items()})
            else:
                self._overrides[key] = value

    def put(self, key: str, value: Any, reason: str) -> Any:
        """Record a value and return the one that holds."""
        if key in self._overrides:
            value, reason = self._overrides.pop(key), OVERRIDE
        self._values.append(DerivedValue(key, value, reason))
        return value

    def merge(self, key: str, value: Mapping[str, Any], reason: str) -> None:
        """Record a mapping whose entries an override adds to or replaces one by one."""
        own = self._overrides.pop(key, None)
        if own:
            value, reason = {**value, **own}, f"{reason}; {OVERRIDE}: {', '.join(own)}"
        self._values.append(DerivedValue(key, value, reason))

    def get(self, key: str, default: Any = None) -> Any:
        """The value that holds, recorded or still to come from an override."""
        found = (value.value for value in self._values if value.key == key)
        return next(found, self._overrides.get(key, default))

    def is_overridden(self, key: str) -> bool:
        """True while an override of the key, or of the section it names, has not been used."""
        return any(name == key or name.startswith(f"{key}.") for name in self._overrides)

    def finish(self) -> Iterator[DerivedValue]:
        """Everything recorded, then the overrides that nothing was derived for."""
        yield from self._values
        for key, value in self._overrides.items():
            yield DerivedValue(key, value, OVERRIDE)


def to_nested(values: list[DerivedValue]) -> dict[str, Any]:
    """The arguments as `LLM(**...)` takes them."""
    result: dict[str, Any] = {}
    for key, value, _ in values:
        section, _, name = key.rpartition(".")
        (result.setdefault(section, {}) if section else result)[name] = value
    return result
