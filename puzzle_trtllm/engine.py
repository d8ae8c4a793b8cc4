"""The engine: a self-contained folder that a runtime loads, and the config a human writes to have one built.

    engine.json       manifest: schema version, runtime, architecture, KV fold, provenance
    llm_args.yaml     the arguments of TensorRT-LLM's `LLM`, `model` left out (the loader passes `<engine>/model`)
    model/            the serving copy of the checkpoint: model_type gpt_oss, our class name in `architectures`, KV
                      scales folded into the projections, no scale tensor left, no hf_quant_config.json

What TensorRT-LLM's PyTorch backend loads is such a folder; there is no compiled engine file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.errors import ArchitectureError, ConfigError, EngineError
from puzzle_trtllm.json_files import read_json_object
from puzzle_trtllm.llm_args_schema import check_known_types
from puzzle_trtllm.models.trtllm.upstream import Line
from puzzle_trtllm.tensors import count_weight_bytes
from puzzle_trtllm.yaml_files import as_model, load_model, read_mapping, resolve_name

ENGINE_CONFIG_FOLDER = Path(__file__).parent / "engine_configs"
MANIFEST_NAME = "engine.json"
LLM_ARGS_NAME = "llm_args.yaml"
PLUGIN_FOLDER = Path("plugin") / "puzzle_trtllm_plugin"
"""Of an engine for TensorRT-LLM whose layers differ: a package that registers the child's class."""

RuntimeName = Literal["tensorrt_llm", "reference"]
FoldName = Literal["tensor", "channel", "none"]


class EngineConfig(BaseModel):
    """What a human decides about a deployment; everything else is derived by `build`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    runtime: RuntimeName
    target: Line = "1.2"
    """TensorRT-LLM line whose argument schema llm_args.yaml must satisfy."""
    gpu: str | None = None
    num_gpus: int = Field(default=1, ge=1)
    """Ranks; the reference runtime's are processes on the CPU where there are no GPUs."""
    memory_bytes: int | None = Field(default=None, ge=1)
    """Cap on weights plus KV cache of one GPU (one rank); None leaves the runtime's own limit."""
    parallel: Literal["tp", "dep"] = "tp"
    kv_dtype: KvDtype = "bf16"
    scenario: str = "cpu-demo"
    """Name or path of the scenario that sizes sequences and batches; TensorRT-LLM's engines have no default."""
    fold: FoldName = "tensor"
    quantized_q: bool | None = None
    """Whether the engine's attention makes FP8 of Q as well; a fold that takes Q beyond 448 is an error then. None is
    what the runtime does."""
    llm_args: dict[str, Any] = Field(default_factory=dict)
    """Overrides for llm_args.yaml; they win over what is derived."""

    @property
    def stores_q_in_fp8(self) -> bool:
        """`quantized_q`, or what the runtime does.

        TensorRT-LLM's attention makes FP8 of Q, at scale 1, when it reads prompts from a paged FP8 cache, as prefix
        reuse or chunked prefill has it do (attentionOp.cpp: mFP8ContextFMHA). The reference runtime never does.
        """
        if self.quantized_q is not None:
            return self.quantized_q
        return self.runtime == "tensorrt_llm" and self.kv_dtype == "fp8"


class LayerFold(BaseModel):
    """What folding did to one layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    k_scale: float
    v_scale: float
    """The checkpoint's own scales."""
    k_fold: float
    v_fold: float
    """The powers of two that went into the weights (the largest, when the fold is per channel)."""


class KvFold(BaseModel):
    """How calibrated KV scales got into the weights."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: FoldName
    layers: list[LayerFold] = Field(default_factory=list)


class EngineManifest(BaseModel):
    """engine.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: Literal[1] = 1
    runtime: RuntimeName
    kv_dtype: KvDtype
    weight_bytes: int
    memory_bytes: int | None
    """The cap given to weights plus KV cache of one rank, bytes."""
    architecture: dict[str, Any]
    """block_configs and the shared dimensions, for readers without the model folder."""
    kv_fold: KvFold
    provenance: dict[str, Any]
    """Source checkpoint path and fingerprint, engine config, tool versions."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An opened engine folder."""

    path: Path
    manifest: EngineManifest
    llm_args: dict[str, Any]

    @classmethod
    def open(cls, path: str | Path) -> Engine:
        """Read and check an engine folder. Raises EngineError."""
        folder = Path(path)
        manifest_file = folder / MANIFEST_NAME
        if not manifest_file.is_file():
            raise EngineError("missing", file=manifest_file, expected="an engine folder made by `puzzle-trtllm build`")
        manifest = as_model(read_json_object(manifest_file, EngineError), EngineManifest, manifest_file, EngineError)
        try:
            llm_args = read_mapping(folder / LLM_ARGS_NAME)
            check_known_types(llm_args, file=folder / LLM_ARGS_NAME)
        except ConfigError as error:
            raise EngineError(str(error)) from None
        if not (folder / "model" / "config.json").is_file():
            raise EngineError("missing", file=folder / "model" / "config.json")
        engine = cls(path=folder.resolve(), manifest=manifest, llm_args=llm_args)
        _check_manifest(engine)
        return engine

    @property
    def model_path(self) -> Path:
        return self.path / "model"

    @property
    def max_seq_len(self) -> int | None:
        """Prompt and answer together; None where llm_args.yaml leaves it to the runtime. Raises EngineError."""
        limit = self.llm_args.get("max_seq_len")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            file = self.path / LLM_ARGS_NAME
            raise EngineError("must be a positive integer", file=file, key="max_seq_len", found=repr(limit))
        return limit

    @property
    def kv_dtype(self) -> KvDtype:
        """What llm_args.yaml makes the runtime store."""
        return "fp8" if self.llm_args.get("kv_cache_config", {}).get("dtype") == "fp8" else "bf16"

    @property
    def architecture(self) -> PuzzleArchitecture:
        return PuzzleArchitecture.from_path(self.model_path)

    @property
    def config(self) -> Mapping[str, Any]:
        """The engine config that it was built from, as engine.json tells; empty where it does not."""
        config = self.manifest.provenance.get("engine_config")
        return config if isinstance(config, dict) else {}

    @property
    def scenario(self) -> str | None:
        """Name or path of the load that it was built for; None where engine.json does not tell."""
        name = self.config.get("scenario")
        return name if isinstance(name, str) else None


def describe(a: PuzzleArchitecture) -> dict[str, Any]:
    """An architecture as engine.json has it."""
    shared = {field.name: getattr(a, field.name) for field in fields(a) if field.name not in ("blocks", "rope")}
    return {"block_configs": [block.to_json() for block in a.blocks], **shared}


def _check_manifest(engine: Engine) -> None:
    """Measurements are told by engine.json; another file of the folder must not have served them."""
    try:
        architecture = engine.architecture
    except ArchitectureError as error:
        raise EngineError(str(error)) from None
    said, actual = _layer_by_layer(engine.manifest.architecture), _layer_by_layer(describe(architecture))
    pairs = {f"architecture.{key}": (value, actual.get(key)) for key, value in said.items()}
    weight_bytes, cap = count_weight_bytes(architecture), engine.manifest.memory_bytes
    pairs["weight_bytes"] = (engine.manifest.weight_bytes, weight_bytes)
    pairs["kv_dtype"] = (engine.manifest.kv_dtype, engine.kv_dtype)
    if cap is not None and engine.llm_args.get("tensor_parallel_size", 1) == 1:  # a rank of several holds a part
        cache_bytes = engine.llm_args.get("kv_cache_config", {}).get("max_gpu_total_bytes", 0)
        pairs["memory_bytes"] = (cap, weight_bytes + cache_bytes)
    for key, (found, expected) in pairs.items():
        if found != expected:
            message = "is not what the rest of the engine folder says"
            raise EngineError(message, file=engine.path / MANIFEST_NAME, key=key, found=found, expected=expected)


def _layer_by_layer(description: Mapping[str, Any]) -> dict[str, Any]:
    """The same with an entry for each layer: a line with all of them would show the first ones only."""
    blocks = description.get("block_configs", [])
    if not isinstance(blocks, list):
        return dict(description)
    layers = {f"block_configs[{layer}]": block for layer, block in enumerate(blocks)}
    rest = {key: value for key, value in description.items() if key != "block_configs"}
    return {"num_layers": len(blocks), **layers, **rest} if blocks else rest


def load_engine_config(name_or_path: str | Path) -> EngineConfig:
    """Load a shipped engine config by name, or any YAML file by path. Raises ConfigError."""
    return load_model(resolve_name(name_or_path, ENGINE_CONFIG_FOLDER, "engine config"), EngineConfig)
