"""Finds symbols of the table in the installed TensorRT-LLM and checks rows: exists, signature, mentions.

Import paths moved between lines, so each row names its candidates and the first that has the symbol wins. Attributes
that exist only on instances cannot be seen without a GPU; the source of the class is searched for them instead, with
the sources of its bases that belong to the same package.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.errors import EngineError
from puzzle_trtllm.models.trtllm.upstream import Requirement


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What checking one row gave."""

    requirement: Requirement
    module: str | None
    """Where the symbol was found."""
    problems: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.problems


def resolve(requirement: Requirement) -> Any:
    """The symbol of a row. Raises EngineError naming every place that was tried."""
    _, symbol, problems = _find(requirement)
    if problems:
        raise EngineError(
            f"this TensorRT-LLM does not fit the plugin: {'; '.join(problems)}; see `puzzle-trtllm doctor`",
            key=requirement.path,
        )
    return symbol


def check(requirement: Requirement) -> Finding:
    """Check one row against what is installed; never raises."""
    if not requirement.path:
        return _check_file(requirement)
    module, symbol, problems = _find(requirement)
    if not problems:
        problems = [*_signature_problems(symbol, requirement), *_source_problems(symbol, requirement)]
    return Finding(requirement=requirement, module=module, problems=tuple(problems))


def accepts(function: Any, parameter: str) -> bool:
    """True if a callable has a parameter of that name."""
    return parameter in inspect.signature(function).parameters


def _find(requirement: Requirement) -> tuple[str | None, Any, list[str]]:
    problems = []
    for name in requirement.modules:
        try:
            symbol: Any = importlib.import_module(name)
            for part in requirement.path.split("."):
                symbol = getattr(symbol, part)
        except Exception as error:  # a GPU library may fail in any way while it is imported
            problems.append(f"{name}.{requirement.path}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            return name, symbol, []
    return None, None, problems


def _check_file(requirement: Requirement) -> Finding:
    problems = []
    for name in requirement.modules:
        try:
            spec = importlib.util.find_spec(name)
            text = Path(str(spec and spec.origin)).read_text(encoding="utf-8")
        except Exception as error:  # finding a module imports its packages
            problems.append(f"{name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
        else:
            return Finding(requirement=requirement, module=name, problems=tuple(mention_problems(requirement, text)))
    return Finding(requirement=requirement, module=None, problems=tuple(problems))


def _signature_problems(symbol: Any, requirement: Requirement) -> list[str]:
    if not requirement.parameters:
        return []
    try:
        names = list(inspect.signature(symbol).parameters)
    except (TypeError, ValueError) as error:
        return [f"its signature cannot be read: {error}"]
    return parameter_problems(requirement, names)


def parameter_problems(requirement: Requirement, names: list[str]) -> list[str]:
    """What a row says against a function with these parameters."""
    missing = [name for name in requirement.parameters if name not in names]
    if missing:
        return [f"has no parameter {', '.join(missing)}; it has {', '.join(names)}"]
    order = [names.index(name) for name in requirement.parameters]
    if order != sorted(order):
        return [f"parameters in another order: {', '.join(names)}"]
    known = {"self", *requirement.parameters, *(requirement.may_have or names)}
    unknown = [name for name in names if name not in known]
    return [f"has a parameter that the plugin's own does not take: {', '.join(unknown)}"] if unknown else []


def mention_problems(requirement: Requirement, text: str) -> list[str]:
    """What a row says against this source text."""
    missing = [mention for mention in requirement.mentions if mention not in text]
    return [f"its source no longer mentions {', '.join(missing)}"] if missing else []


def _source_problems(symbol: Any, requirement: Requirement) -> list[str]:
    if not requirement.mentions:
        return []
    try:
        text = _source(symbol)
    except (OSError, TypeError) as error:
        return [f"its source cannot be read: {error}"]
    return mention_problems(requirement, text)


def _source(symbol: Any) -> str:
    if not inspect.isclass(symbol):
        return inspect.getsource(symbol)
    package = symbol.__module__.split(".")[0]
    classes = [base for base in symbol.__mro__ if base.__module__.split(".")[0] == package]
    return "\n".join(inspect.getsource(base) for base in classes)
