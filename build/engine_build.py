"""Build an engine: checkpoint + engine config -> a self-contained folder that a runtime loads.

    engine.json       what it is and where it came from
    llm_args.yaml     the arguments of TensorRT-LLM's `LLM`, derived (puzzle_trtllm.build.llm_args)
    model/            the serving copy, KV scales folded in   (puzzle_trtllm.build.serving_copy)
    plugin/           for TensorRT-LLM, where layers differ: registers the child's class   (.plugin_folder)
    launch/           for TensorRT-LLM: command lines ready to run   (.launch)

FP8 KV needs scales. Engines hold theirs at 1, so without a fold FP8 KV runs at unit scale: that is refused unless it is
asked for by name (fold "none" and allow_unit_scale), and then the manifest says so.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import numpy as np
import yaml

import puzzle_trtllm
from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.derived_values import DerivedValue, to_nested
from puzzle_trtllm.build.expert_layout import warn_of_cut, warn_of_end
from puzzle_trtllm.build.fold import fold_scales
from puzzle_trtllm.build.launch import write_launch_folder
from puzzle_trtllm.build.llm_args import derive_llm_args
from puzzle_trtllm.build.plugin_folder import write_plugin
from puzzle_trtllm.build.progress import byte_progress
from puzzle_trtllm.build.serving_copy import serving_family, write_serving_copy
from puzzle_trtllm.checkpoint import Checkpoint, resolve_folder
from puzzle_trtllm.checkpoint_writer import bytes_to_write
from puzzle_trtllm.engine import (
    LLM_ARGS_NAME,
    MANIFEST_NAME,
    Engine,
    EngineConfig,
    EngineManifest,
    FoldName,
    KvFold,
    describe,
    load_engine_config,
)
from puzzle_trtllm.errors import ConfigError
from puzzle_trtllm.folders import atomic_folder
from puzzle_trtllm.models.trtllm.upstream import Line
from puzzle_trtllm.output_folder import check_output_folder
from puzzle_trtllm.scenario import load_scenario
from puzzle_trtllm.terminal import warn

_LLM_ARGS_HEADER = "# Arguments of TensorRT-LLM's LLM; `model` is passed by the loader. By puzzle-trtllm build.\n"


def build_engine(
    checkpoint: str | Path,
    out: str | Path,
    *,
    config: EngineConfig | str | Path,
    fold: FoldName | None = None,
    allow_unit_scale: bool = False,
    target: Line | None = None,
    overwrite: bool = False,
    quiet: bool = True,
) -> Engine:
    """Write the engine folder `out` for `checkpoint` and open it.

    Args:
        checkpoint: parent or child, calibrated when the KV cache is FP8; a folder or a hub id.
        out: folder to create; existing and not empty is an error unless `overwrite`.
        config: an EngineConfig, the name of a shipped one, or a YAML file.
        fold: how KV scales go into the weights; the engine config's own choice when None.
        allow_unit_scale: accept FP8 KV at scale 1, with fold "none".
        target: TensorRT-LLM line to build for; the engine config's own when None.

    Raises a PuzzleError subclass in one line for anything wrong with the inputs, and leaves nothing behind.
    """
    settings, label = _load_config(config, target)
    source = Checkpoint.open(checkpoint)
    source.validate()
    values = _derive(source.architecture, settings, label)
    mode = _choose_fold(settings, fold, allow_unit_scale, label)
    _check_scales(source, mode, label)
    folding = fold_scales(source, mode, quantized_q=settings.stores_q_in_fp8)
    warnings = [*folding.warnings, *_runtime_warnings(source.architecture, settings, mode, values)]
    for line in warnings:
        warn(line, quiet=quiet)
    out = Path(out)
    num_bytes = bytes_to_write(source, out)
    others = (None if isinstance(config, EngineConfig) else config, settings.scenario)
    check_output_folder(out, source=source.path, num_bytes=num_bytes, others=others)
    with atomic_folder(out, overwrite=overwrite) as folder:
        model = folder / "model"
        model.mkdir()
        with byte_progress("build", num_bytes, quiet=quiet) as progress:
            notes = write_serving_copy(source, model, folding, progress=progress)
        served = Checkpoint.open(model)
        served.validate()
        (folder / LLM_ARGS_NAME).write_text(render_llm_args(values), encoding="utf-8")
        if settings.runtime == "tensorrt_llm":
            _write_gpu_host_files(folder, served.architecture, settings, values)
        provenance = _provenance(source, settings, values, warnings=warnings, notes=notes)
        manifest = _manifest(served, settings, folding.record, provenance)
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return Engine.open(out)


def explain(
    config_json_or_checkpoint: str | Path,
    *,
    config: EngineConfig | str | Path,
    fold: FoldName | None = None,
    allow_unit_scale: bool = False,
    target: Line | None = None,
    quiet: bool = True,
) -> list[DerivedValue]:
    """Every LLM argument that `build_engine` would write: (dotted key, value, reason).

    Needs only an architecture: a config.json, a folder with one, or a hub id. `to_nested` turns the result into the
    arguments themselves. Options, warnings and errors are those of building, as far as they show without weights.
    """
    path = Path(config_json_or_checkpoint)
    path = path if path.is_file() else resolve_folder(config_json_or_checkpoint, weights=False)
    settings, label = _load_config(config, target)
    architecture = PuzzleArchitecture.from_path(path)
    values = _derive(architecture, settings, label)
    mode = _choose_fold(settings, fold, allow_unit_scale, label)
    for line in _runtime_warnings(architecture, settings, mode, values):
        warn(line, quiet=quiet)
    return values


def render_llm_args(values: list[DerivedValue]) -> str:
    """llm_args.yaml as text: keys in the order they were derived, lists on one line."""
    text = yaml.safe_dump(to_nested(values), sort_keys=False, default_flow_style=None, width=120)
    return _LLM_ARGS_HEADER + text


def _load_config(config: EngineConfig | str | Path, target: Line | None) -> tuple[EngineConfig, str]:
    if isinstance(config, EngineConfig):
        settings, label = config, "engine config"
    else:
        settings, label = load_engine_config(config), str(config)
    return (settings if target is None else settings.model_copy(update={"target": target})), label


def _derive(architecture: PuzzleArchitecture, config: EngineConfig, label: str) -> list[DerivedValue]:
    if config.runtime == "tensorrt_llm" and "scenario" not in config.model_fields_set:
        message = "missing key: sequences and batches are sized for it"
        raise ConfigError(message, file=label, key="scenario", expected="such as long")
    try:
        scenario = load_scenario(config.scenario)
    except ConfigError as error:
        raise ConfigError(str(error), file=label, key="scenario") from None
    return derive_llm_args(architecture, config, scenario, file=label)


def _write_gpu_host_files(
    folder: Path, architecture: PuzzleArchitecture, config: EngineConfig, values: list[DerivedValue]
) -> None:
    """Plugin and launch scripts."""
    family = serving_family(architecture)
    plugin = family.trtllm_model is not None
    if plugin:
        write_plugin(folder, family)
    scenario = load_scenario(config.scenario)
    write_launch_folder(folder, architecture, config, to_nested(values), scenario, plugin=plugin)


def _choose_fold(config: EngineConfig, fold: FoldName | None, allow_unit_scale: bool, label: str) -> FoldName:
    """The fold that will be done, if the checkpoint has scales.

    Raises ConfigError for one that would do nothing, and for FP8 KV that would silently run at unit scale.
    """
    if config.kv_dtype != "fp8":
        if fold in ("tensor", "channel"):
            raise ConfigError("--fold needs an FP8 KV cache", file=label, key="kv_dtype", found=config.kv_dtype)
        return "none"
    wanted = fold or config.fold
    if wanted == "none" and not allow_unit_scale:
        raise ConfigError(
            "FP8 KV without a fold runs at unit scale",
            file=label,
            key="fold",
            found="none",
            expected="tensor or channel, or --allow-unit-scale if that is meant",
        )
    return wanted


def _check_scales(checkpoint: Checkpoint, mode: FoldName, label: str) -> None:
    if mode != "none" and not checkpoint.kv_scales:
        raise ConfigError(
            f"{label} wants an FP8 KV cache, and this checkpoint has no KV scales",
            file=checkpoint.path,
            expected="one from `calibrate kv`, or --fold none --allow-unit-scale",
        )


def _runtime_warnings(
    architecture: PuzzleArchitecture, config: EngineConfig, mode: FoldName, values: list[DerivedValue]
) -> list[str]:
    """What is unverified, or less than it could be, about an engine with these arguments."""
    warnings = []
    if config.kv_dtype == "fp8" and mode == "none":
        warnings.append("the FP8 KV cache runs at unit scale: nothing was folded")
    if config.runtime == "tensorrt_llm" and config.kv_dtype == "fp8" and (config.gpu or "").startswith("h"):
        warnings.append(
            "FP8 KV with attention sinks on Hopper is unverified in TensorRT-LLM: measure kv_dtype bf16 too"
        )
    if config.runtime == "tensorrt_llm":
        llm_args = to_nested(values)
        warnings += [*warn_of_cut(architecture, llm_args), *warn_of_end(config.target, llm_args)]
    return warnings


def _provenance(
    source: Checkpoint,
    config: EngineConfig,
    values: list[DerivedValue],
    *,
    warnings: list[str],
    notes: list[str],
) -> dict[str, Any]:
    return {
        "source": {"path": str(source.path.resolve()), "fingerprint": source.fingerprint()},
        "engine_config": {**config.model_dump(mode="json"), "scenario": _findable(config.scenario)},
        "versions": {
            "puzzle_trtllm": puzzle_trtllm.__version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
        "llm_args_reasons": {value.key: value.reason for value in values},
        "warnings": warnings,
        "notes": notes,
    }


def _findable(scenario: str) -> str:
    """A file as an absolute path: `bench --engine` reads it again, wherever it is called."""
    path = Path(scenario)
    return str(path.absolute()) if path.suffix in (".yaml", ".yml") and path.is_file() else scenario


def _manifest(served: Checkpoint, config: EngineConfig, kv_fold: KvFold, provenance: dict[str, Any]) -> EngineManifest:
    return EngineManifest(
        runtime=config.runtime,
        kv_dtype=config.kv_dtype,
        weight_bytes=served.weight_bytes,
        memory_bytes=config.memory_bytes,
        architecture=describe(served.architecture),
        kv_fold=kv_fold,
        provenance=provenance,
    )
