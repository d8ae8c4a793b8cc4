"""The random gpt-oss models that our runtime is compared on: one folder with MXFP4 experts, one with the same in BF16.

    .venv/bin/python tests/bench/peers_model.py DIR [--model small|large]

Other engines hold experts in BF16 on a CPU; ours reads MXFP4. Both folders hold the same numbers.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.expert_formats import config_with_format, converted_experts
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.checkpoint_writer import PlannedTensor, copy_of, write_shards
from puzzle_trtllm.tensors import TensorSpec, is_expert_tensor, tensor_table
from tests import toys

MAX_POSITIONS = 512


def small() -> PuzzleArchitecture:
    """8 layers of hidden 256, 16 experts top-4: 58 MB in BF16, more than most caches, if not by much."""
    return _architecture(layers=8, experts=16, hidden=256, ffn=256, heads=8, kv_heads=2, head_dim=32, vocab=4096)


def large() -> PuzzleArchitecture:
    """gpt-oss' own proportions (2880, 64 and 8 heads of 64, top-4), 4 layers of 24 experts: 1.6 GB in MXFP4."""
    return _architecture(layers=4, experts=24, hidden=2880, ffn=2880, heads=64, kv_heads=8, head_dim=64, vocab=8192)


MODELS = {"small": small, "large": large}


def write_models(folder: Path, name: str) -> tuple[Path, Path]:
    """Write `folder/NAME-mxfp4` and `folder/NAME-bf16` unless they are there."""
    packed, wide = folder / f"{name}-mxfp4", folder / f"{name}-bf16"
    if not (packed / "config.json").is_file():
        _write(packed, MODELS[name]())
    if not (wide / "config.json").is_file():
        _write_twin(wide, Checkpoint.open(packed))
    return packed, wide


def _architecture(
    *, layers: int, experts: int, hidden: int, ffn: int, heads: int, kv_heads: int, head_dim: int, vocab: int
) -> PuzzleArchitecture:
    plain = toys.toy_architecture(
        [(experts, 128 if layer % 2 == 0 else None) for layer in range(layers)],
        hidden_size=hidden,
        intermediate_size=ffn,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        experts_per_token=4,
        max_position_embeddings=MAX_POSITIONS,
    )
    return replace(plain, rope=replace(plain.rope, factor=2.0, original_max_position_embeddings=MAX_POSITIONS // 2))


def _write(folder: Path, architecture: PuzzleArchitecture) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    table = tensor_table(architecture)
    write_shards(folder, [_random(name, spec, seed) for seed, (name, spec) in enumerate(table.items())])
    _write_config(folder, toys.toy_config(architecture))


def _random(name: str, spec: TensorSpec, seed: int) -> PlannedTensor:
    """Values of unit-variance layers, made when they are written."""

    def chunks() -> Iterator[np.ndarray]:
        rng = np.random.default_rng(seed)
        if name.endswith("_blocks"):
            for _ in range(spec.shape[0]):
                yield rng.integers(0, 256, spec.num_bytes // spec.shape[0], dtype=np.uint8)
        elif name.endswith("_scales"):
            # E2M1 codes at random have a standard deviation of 2.9.
            inputs = spec.shape[-1] * 32
            yield np.full(spec.num_bytes, 127 - round(np.log2(2.9 * inputs**0.5)), dtype=np.uint8)
        else:
            values = toys._random_values(name, spec.shape, rng)
            yield toys.bf16_bits(values).reshape(-1).view(np.uint8)

    return PlannedTensor(name=name, spec=spec, chunks=chunks)


def _write_twin(folder: Path, source: Checkpoint) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    planned: list[PlannedTensor] = []
    for name in tensor_table(source.architecture):
        if is_expert_tensor(name) and not name.endswith("_bias"):
            experts = range(source.entry(name).shape[0])
            planned += converted_experts(source, name, experts, "bf16")
        else:
            planned.append(copy_of(source.entry(name)))
    write_shards(folder, planned)
    _write_config(folder, config_with_format(source.config, "bf16"))


def _write_config(folder: Path, config: dict[str, object]) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [toys.RETURN_ID]}), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Write both folders and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", choices=MODELS, default="small")
    options = parser.parse_args()
    for path in write_models(options.folder, options.model):
        print(path)


if __name__ == "__main__":
    main()
