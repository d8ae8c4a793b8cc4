"""YAML in, validated object out, in one place: unknown keys are errors that list the known ones."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from puzzle_trtllm.errors import ConfigError, PuzzleError
from puzzle_trtllm.plain_file import read_text

Model = TypeVar("Model", bound=BaseModel)
Error = TypeVar("Error", bound=PuzzleError)


def resolve_name(name_or_path: str | Path, folder: Path, kind: str) -> Path:
    """A path as it is; a bare name as `folder/name.yaml`. Raises ConfigError listing the known names."""
    path = Path(name_or_path)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    shipped = folder / f"{path.name.removesuffix('.yaml')}.yaml"
    if len(path.parts) == 1 and shipped.is_file():
        return shipped
    known = ", ".join(sorted(file.stem for file in folder.glob("*.yaml")))
    raise ConfigError(f"no such {kind}", file=path, expected=f"a YAML file or one of: {known}")


def read_mapping(file: Path) -> dict[Any, Any]:
    """The mapping in a YAML file. Raises ConfigError in one line."""
    text = read_text(file, ConfigError)
    try:
        value = yaml.load(text, Loader=_Loader)
    # ValueError: what looks like a date and is none; YAML nested too deep recurses.
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"not valid YAML: {' '.join(str(error).split())}", file=file) from None
    if not isinstance(value, dict):
        raise ConfigError("must be a mapping", file=file, found=type(value).__name__)
    return value


_EXPONENT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+\Z")
_OTHER_BASES = re.compile(r"[-+]?(0[0-7_]+|[1-9][0-9_]*(:[0-5]?[0-9])+)")


class _Loader(yaml.SafeLoader):
    """YAML's own rule is that keys are unique; PyYAML lets the last one win.

    Integers as YAML 1.1 has them and nobody means them are refused: 0100 is 64 there, and 1:30 is 90. Numbers that it
    takes for text, 1e3 and 1e-5, are numbers, as in YAML 1.2.
    """

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if _OTHER_BASES.fullmatch(node.value):
            problem = f"{node.value} is no decimal integer: YAML 1.1 takes it for octal or base 60"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(super().construct_yaml_int(node))

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node: yaml.MappingNode = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.composer.ComposerError(None, None, f"key {key.value!r} occurs twice", key.start_mark)
                seen.add(key.value)
        return node


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_model(file: Path, model: type[Model]) -> Model:
    """Read `file` as `model`. Raises ConfigError in one line for the first thing that is wrong."""
    return as_model(read_mapping(file), model, file, ConfigError)


def as_model(value: object, model: type[Model], file: str | Path, kind: type[Error]) -> Model:
    """What a file says, as `model`. Nothing is converted: true, "1" and 1.0 are no integers (1 is a float, too).

    Raises an error of this kind for the first thing that is wrong.
    """
    try:
        return model.model_validate(value, strict=True)
    except ValidationError as error:
        raise _first_problem(error, file, model, kind) from None


def _first_problem(error: ValidationError, file: str | Path, model: type[BaseModel], kind: type[Error]) -> Error:
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = f"one of: {', '.join(model.model_fields)}" if len(problem["loc"]) == 1 else None
        return kind("unknown key", file=file, key=key, expected=known)
    if problem["type"] == "missing":
        return kind("missing key", file=file, key=key)
    return first_problem(error, file, kind)


def first_problem(error: ValidationError, file: str | Path, kind: type[Error]) -> Error:
    """The first thing that is wrong in a file, as an error of this kind; what lacks a key is not shown whole."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"]) or None
    found = None if problem["type"] == "missing" else repr(problem["input"])
    message = problem["msg"].removeprefix("Value error, ")  # pydantic's words before those of our own checks
    return kind(message, file=file, key=key, found=found)
