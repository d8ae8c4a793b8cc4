"""ModelOpt, asked for one thing: the static FP8 scales of the KV cache, and nothing else.

Its `FP8_KV_CFG` is a fragment that must be preceded by "everything off": alone it leaves the weight and activation
quantizers of every layer on. `max` is the only algorithm that calibrates KV. ModelOpt is shown the attention modules
only: over experts its wrapper, with every quantizer off, still copies all their weights twice a forward pass (a pass of
1.45 times the plain one). Given a whole model it also puts the experts on transformers' eager path, which we do here,
so that the numbers are those of its plain run. ModelOpt talks on stdout, where our results go; what it says is dropped.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from importlib.metadata import version
from typing import Any

from torch import nn

from puzzle_trtllm.errors import CalibrationError


@contextmanager
def hushed() -> Iterator[None]:
    """Drop ModelOpt's prints and its warnings about untested versions; errors pass."""
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def calibrate_max(model: Any, forward_loop: Callable[[Any], None]) -> None:
    """Give the attention of `model` KV quantizers and run `forward_loop(model)` under max calibration.

    Every other quantizer is off. During the loop nothing is quantized: the amax are those of the exact model.
    Raises CalibrationError for a ModelOpt whose configs are not yet lists, such as the one beside TensorRT-LLM.
    """
    model.config._experts_implementation = "eager"
    attention = nn.ModuleList(layer.self_attn for layer in model.model.layers)
    with hushed():
        import modelopt.torch.quantization as mtq
        from modelopt.torch.quantization.plugins.huggingface import register_hf_attentions_on_the_fly

        kv_alone = mtq.FP8_KV_CFG["quant_cfg"]
        if not isinstance(kv_alone, list):
            found = version("nvidia-modelopt")
            raise CalibrationError("too old", key="nvidia-modelopt", found=found, expected="0.44 or newer")
        everything_off: list[Any] = [{"quantizer_name": "*", "enable": False}]
        config = {"quant_cfg": everything_off + kv_alone, "algorithm": "max"}
        register_hf_attentions_on_the_fly(model)
        mtq.quantize(attention, config, lambda _: forward_loop(model))


def layer_amax(model: Any, layer: int) -> tuple[float, float]:
    """ModelOpt's (K amax, V amax) of one layer."""
    attention = model.model.layers[layer].self_attn
    return float(attention.k_bmm_quantizer.amax), float(attention.v_bmm_quantizer.amax)


def hf_quant_config(model: Any) -> dict[str, Any]:
    """The content of hf_quant_config.json, by ModelOpt's own export code."""
    with hushed():
        from modelopt.torch.export.quant_utils import get_quant_config

        return dict(get_quant_config(model))
