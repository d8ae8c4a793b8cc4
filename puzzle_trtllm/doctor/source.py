"""`doctor --source`: does a TensorRT-LLM that is not installed here fit, told from its source files alone?

Reads a checkout (or the package folder of an unpacked wheel) of the version that a GPU host will run: every row of the
plugin's table, the flags of the launch scripts, and the fields of the argument classes against those recorded for that
release line. Nothing is imported and no GPU is needed, so a table that has fallen behind is noticed on any machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from puzzle_trtllm.doctor.machine import Check, Diagnosis, Outcome, check_of_row, release_line
from puzzle_trtllm.llm_args_schema import argument_classes, fields_of
from puzzle_trtllm.models.trtllm.source_tree import SourceTree
from puzzle_trtllm.models.trtllm.upstream import COMMAND_LINES, REQUIREMENTS, Line

_ARGUMENTS = "tensorrt_llm.llmapi.llm_args"
_GROUP = "source"


def diagnose_source(folder: str | Path, *, line: Line | None = None) -> Diagnosis:
    """Hold the table against a source tree. `line` defaults to the one of the tree's own version.

    Raises ConfigError for a folder without TensorRT-LLM in it.
    """
    tree = SourceTree(folder)
    of_version = release_line(tree.version or "")
    checked = line or of_version
    found = f"{tree.version or 'unknown'} in {tree.root}, checked as line {checked or 'late'}"
    known = checked is not None
    advice = "" if known else "this project knows 1.2 and newer; --line says which one to check as"
    version = Check(group=_GROUP, name="version", outcome="ok" if known else "wrong", found=found, advice=advice)
    line = checked or "late"
    rows = [row for row in (*REQUIREMENTS, *COMMAND_LINES) if line in row.lines]
    checks = [version, *(check_of_row(tree.check(row), group=_GROUP) for row in rows), *_arguments(tree, line)]
    return Diagnosis(checks=tuple(checks))


def _arguments(tree: SourceTree, line: Line) -> Iterator[Check]:
    """Recorded argument classes against those of the tree: a field that is gone would be refused by `LLM`."""
    for name in argument_classes():
        fields = tree.fields(_ARGUMENTS, name)
        if fields is None:
            found = f"{_ARGUMENTS}.{name}: not defined"
            yield Check(group=_GROUP, name=name, outcome="wrong", found=found, advice="arguments cannot be checked")
            continue
        recorded = set(fields_of(name, line))
        gone = sorted(recorded - fields)
        new = sorted(field for field in fields - recorded if not field.startswith("_"))
        said = [f"{len(recorded & fields)} fields as recorded"]
        said += [f"gone: {', '.join(gone)}"] if gone else []
        said += [f"not recorded: {', '.join(new)}"] if new else []
        advice = "engines of this line must not set what is gone" if gone else ""
        outcome: Outcome = "note" if gone or new else "ok"
        yield Check(group=_GROUP, name=name, outcome=outcome, found="; ".join(said), advice=advice)
