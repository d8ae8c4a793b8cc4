"""What a model is made of, layer by layer, without reading a weight: expert counts, windows, bytes of weights and KV.

A checkpoint folder gives config.json and the headers of its safetensors files; an engine folder gives its serving copy;
a config.json alone, or a hub id (for which only config.json and the index are fetched), gives the same picture computed
from the architecture. KV bytes are those of the dtype that the model would be served with: FP8 when it brings
calibrated scales or is an engine with an FP8 cache, else BF16; `kv_dtype` overrides it.

The trap: a window layer keeps min(window, n) tokens, so KV bytes of a sequence grow with n in full-attention layers
only, and bytes a token (all layers, before any window fills) is an upper bound that long sequences never reach.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from puzzle_trtllm.architecture import KvDtype, PuzzleArchitecture
from puzzle_trtllm.checkpoint import INDEX_NAME, Checkpoint, read_weight_map, resolve_folder
from puzzle_trtllm.engine import MANIFEST_NAME, Engine
from puzzle_trtllm.errors import CheckpointError, PuzzleError
from puzzle_trtllm.tensors import count_parameters, kv_scale_of, tensor_table


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The picture of one model."""

    source: str
    """What was inspected, as it was given."""
    architecture: PuzzleArchitecture
    kv_dtype: KvDtype
    tensor_bytes: Mapping[str, int]
    """Bytes of every tensor, from the files' headers or, without files, from the architecture's table."""
    kv_sequence_tokens: tuple[int, ...]
    """Sequence lengths at which KV bytes are stated; at least one."""

    @property
    def parameters(self) -> int:
        """Parameters, MX scale bytes not counted."""
        return count_parameters(self.architecture)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, file headers not counted."""
        return sum(self.tensor_bytes.values())

    def layer_weight_bytes(self, layer: int) -> int:
        """Bytes of one layer's tensors."""
        prefix = f"model.layers.{layer}."
        return sum(size for name, size in self.tensor_bytes.items() if name.startswith(prefix))

    def layer_kv_bytes(self, layer: int, num_tokens: int) -> int:
        """KV bytes that one layer keeps of a sequence of `num_tokens`."""
        window = self.architecture.blocks[layer].sliding_window
        kept = num_tokens if window is None else min(window, num_tokens)
        return kept * self.architecture.kv_bytes_per_token_and_layer(self.kv_dtype)

    def to_json(self) -> dict[str, Any]:
        """The JSON object of `inspect --json`; the plain KV figures are those of the first sequence length."""
        a, first = self.architecture, self.kv_sequence_tokens[0]
        return {
            "source": self.source,
            "num_layers": a.num_layers,
            "parameters": self.parameters,
            "weight_bytes": self.weight_bytes,
            "experts_format": a.experts_format,
            "experts_per_token": a.experts_per_token,
            "blocks": [
                {**block.to_json(), "weight_bytes": self.layer_weight_bytes(layer)}
                for layer, block in enumerate(a.blocks)
            ],
            "kv_dtype": self.kv_dtype,
            "kv_bytes_per_token": a.kv_bytes_per_token(self.kv_dtype),
            "kv_sequence_tokens": first,
            "kv_bytes_per_sequence": a.kv_bytes_per_sequence(first, self.kv_dtype),
            "kv_sequences": [
                {"kv_sequence_tokens": n, "kv_bytes_per_sequence": a.kv_bytes_per_sequence(n, self.kv_dtype)}
                for n in self.kv_sequence_tokens
            ],
        }


def inspect(path: str | Path, *, seq_lens: Sequence[int] = (), kv_dtype: KvDtype | None = None) -> Inspection:
    """Inspect a checkpoint folder, an engine folder, a config.json or a hub id; tensor data is never read.

    seq_lens: sequence lengths for KV bytes; the model's longest position if none is given.
    Raises CheckpointError, ArchitectureError or EngineError for anything damaged: headers are held against the
    architecture, so a missing shard, a missing tensor or a wrong shape does not pass.
    """
    for length in seq_lens:
        if length < 1:
            raise PuzzleError("must be at least 1 token", key="--seq-len", found=length)
    architecture, tensor_bytes, served_kv_dtype = _read(path)
    return Inspection(
        source=str(path),
        architecture=architecture,
        kv_dtype=kv_dtype or served_kv_dtype,
        tensor_bytes=tensor_bytes,
        kv_sequence_tokens=tuple(seq_lens) or (architecture.max_position_embeddings,),
    )


def _read(path: str | Path) -> tuple[PuzzleArchitecture, dict[str, int], KvDtype]:
    folder = Path(path)
    if (folder / MANIFEST_NAME).is_file():
        engine = Engine.open(folder)
        architecture, tensor_bytes, _ = _read_checkpoint(Checkpoint.open(engine.model_path))
        return architecture, tensor_bytes, engine.manifest.kv_dtype
    if folder.is_dir():
        return _read_checkpoint(Checkpoint.open(folder))
    if folder.is_file():
        return _read_config(folder)
    return _read_config(resolve_folder(path, weights=False) / "config.json")


def _read_checkpoint(checkpoint: Checkpoint) -> tuple[PuzzleArchitecture, dict[str, int], KvDtype]:
    checkpoint.validate()
    sizes = {name: entry.num_bytes for name, entry in checkpoint.tensors.items()}
    return checkpoint.architecture, sizes, _kv_dtype(sizes)


def _read_config(file: Path) -> tuple[PuzzleArchitecture, dict[str, int], KvDtype]:
    if file.suffix == ".safetensors":
        raise CheckpointError("is one file of a checkpoint", file=file, expected="its folder, or a config.json")
    architecture = PuzzleArchitecture.from_path(file)
    index = file.parent / INDEX_NAME
    names = read_weight_map(index) if index.is_file() else {}
    return architecture, {name: s.num_bytes for name, s in tensor_table(architecture).items()}, _kv_dtype(names)


def _kv_dtype(names: Iterable[str]) -> KvDtype:
    """FP8 if any of the tensors is a scale of K or V."""
    scales = (kv_scale_of(name) for name in names)
    return "fp8" if any(scale is not None and scale[1] in "kv" for scale in scales) else "bf16"
