"""abacus in the released gpt-oss format: MXFP4 experts in a shard of their own, BF16 for everything else.

Names and layouts are those of openai/gpt-oss: `mlp.experts.gate_up_proj_blocks` uint8 `[E, 2F, D/32, 16]`, `_scales`
uint8 `[E, 2F, D/32]`, `_bias` BF16 `[E, 2F]`, the same for `down_proj` with `[E, D, F/32, 16]`. A model trained with
rounding on loses nothing here; `load` gives back exactly the values that it computed with.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from puzzle_trtllm import mxfp4
from puzzle_trtllm.demo.training import vocabulary
from puzzle_trtllm.demo.training.dimensions import Dimensions
from puzzle_trtllm.demo.training.model import Abacus

_SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
"""The rest, and the experts."""

_QUANTIZED = ("experts.gate_up_proj", "experts.down_proj")


def save(model: Abacus, folder: Path) -> None:
    """Write weights, index, config, generation config and tokenizer into `folder`."""
    rest: dict[str, Tensor] = {}
    experts: dict[str, Tensor] = {}
    for name, param in model.state_dict().items():
        if name.endswith(_QUANTIZED):
            blocks, scales = mxfp4.quantize(param.numpy())
            experts |= {f"{name}_blocks": torch.from_numpy(blocks), f"{name}_scales": torch.from_numpy(scales)}
        else:
            (experts if "mlp.experts." in name else rest)[name] = param.bfloat16().contiguous()
    for shard, tensors in zip(_SHARDS, (rest, experts), strict=True):
        save_file(dict(sorted(tensors.items())), folder / shard, metadata={"format": "pt"})
    _write_json(folder / "model.safetensors.index.json", _index(rest, experts))
    _write_json(folder / "config.json", model.dims.config())
    generation = {"eos_token_id": [vocabulary.RETURN_ID], "pad_token_id": vocabulary.PAD_ID, "do_sample": False}
    _write_json(folder / "generation_config.json", generation)
    _write_json(folder / "child_architecture.json", model.dims.child_architecture())
    vocabulary.write_tokenizer(folder)


def _index(rest: dict[str, Tensor], experts: dict[str, Tensor]) -> dict[str, object]:
    weight_map = {name: shard for shard, part in zip(_SHARDS, (rest, experts), strict=True) for name in part}
    total = sum(tensor.numel() * tensor.element_size() for tensor in (rest | experts).values())
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> Abacus:
    """Read a folder that `save` wrote; the model computes with exactly the stored values."""
    tensors = {name: tensor for shard in _SHARDS for name, tensor in load_file(folder / shard).items()}
    state: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            state[base] = torch.from_numpy(mxfp4.dequantize(tensor.numpy(), tensors[f"{base}_scales"].numpy()))
        elif not name.endswith("_scales"):
            state[name] = tensor.float()
    model = Abacus(Dimensions())
    model.load_state_dict(state)
    return model.eval()
