"""Engine measurements from files: as saved, or put together from what `bench` and `evaluate` wrote.

A name may stand for one engine measurement, or for any number of bench results (its rounds) and an evaluation, whose
efforts may come in several files; the engine's own facts then come from the engine folder that the bench was told of,
if that still holds the engine that all of them were measured on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from puzzle_trtllm.engine import Engine
from puzzle_trtllm.errors import BenchError, ConfigError
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.serve.bench.result import BenchResult
from puzzle_trtllm.serve.evaluate.result import EvaluationResult
from puzzle_trtllm.serve.report.assemble import assemble_measurement, check_engine
from puzzle_trtllm.serve.report.measurement import EngineMeasurement

KINDS = ("engine_measurement", "bench", "evaluation")
SAME_PROBLEMS = ("problems_fingerprint", "grader", "max_tokens", "decoding", "token_counts")
"""What evaluations must have in common for their efforts to stand in one frontier."""


def load_measurements(files: Mapping[str, str | Path | Sequence[str | Path]]) -> list[EngineMeasurement]:
    """Read every engine's files; the keys become the engines' names.

    Raises ConfigError for a file of no or another kind, BenchError when an engine's files do not make a measurement.
    """
    return [
        load_measurement(name, [given] if isinstance(given, (str, Path)) else list(given))
        for name, given in files.items()
    ]


def load_measurement(name: str, files: Sequence[str | Path]) -> EngineMeasurement:
    """One engine from its files; see `load_measurements`."""
    by_kind: dict[str, list[Path]] = {kind: [] for kind in KINDS}
    distinct = dict.fromkeys(map(Path, files))
    for file in distinct:
        by_kind[_kind_of(file)].append(file)
    measured, benches, evaluations = (by_kind[kind] for kind in KINDS)
    if measured and len(distinct) == 1:
        return EngineMeasurement.load(measured[0]).model_copy(update={"name": name})
    if measured or not benches:
        found = ", ".join(f"{len(found)} {kind}" for kind, found in by_kind.items() if found) or "no file"
        expected = "one engine measurement, or bench results and evaluations"
        raise BenchError("these files make no measurement", file=name, found=found, expected=expected)
    rounds = {file: BenchResult.load(file) for file in benches}
    measured_engine = rounds[benches[0]].provenance.engine
    if measured_engine is None:
        raise BenchError("made without naming the engine folder, so its bytes are unknown", file=benches[0])
    evaluation = {file: EvaluationResult.load(file) for file in evaluations}
    engine = Engine.open(measured_engine.path)
    check_engine(engine, {str(file): result for file, result in rounds.items()})
    check_engine(engine, {str(file): result for file, result in evaluation.items()})
    return assemble_measurement(
        name, engine=engine, rounds=list(rounds.values()), evaluation=_one_evaluation(evaluation)
    )


def _one_evaluation(parts: Mapping[Path, EvaluationResult]) -> EvaluationResult | None:
    """All efforts of evaluations that differ in nothing else that counts; None of none.

    Raises BenchError for other problems, graders, limits, decodings or counts, and for an effort in two files: what two
    seeds say of one engine is not pooled.
    """
    if not parts:
        return None
    (first, result), *others = parts.items()
    sources = dict.fromkeys(result.efforts, first)
    for file, part in others:
        for key in SAME_PROBLEMS:
            found, expected = getattr(part, key), getattr(result, key)
            if found != expected:
                message = f"another evaluation than {first}: one report is of one"
                raise BenchError(message, file=file, key=key, found=found, expected=expected)
        for effort in part.efforts:
            if (other := sources.setdefault(effort, file)) != file:
                raise BenchError("an effort that is evaluated in two files", file=file, key=effort, found=other)
        result = result.with_efforts(part.efforts)
    return result


def _kind_of(file: Path) -> str:
    kind = read_json_object(file, ConfigError).get("kind")
    if kind not in KINDS:
        raise ConfigError("not a measurement", file=file, key="kind", found=kind, expected=", ".join(KINDS))
    return str(kind)
