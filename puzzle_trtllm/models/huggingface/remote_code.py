"""Remote code: a child folder that loads with `trust_remote_code=True` where this package is not installed.

transformers looks for `auto_map` in config.json and for the Python files it names beside it. The files are copies of
this package's own config and model, which import only torch and transformers. No torch is needed to write them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from puzzle_trtllm.families import GPT_OSS_PUZZLE

CONFIG_MODULE = "configuration_gpt_oss_puzzle"
MODEL_MODULE = "modeling_gpt_oss_puzzle"


def write_remote_code(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Copy the model's code into `folder` and return `config` with an `auto_map` that names it.

    Writes two Python files and leaves config.json to the caller.
    """
    for module in (CONFIG_MODULE, MODEL_MODULE):
        shutil.copyfile(Path(__file__).with_name(f"{module}.py"), folder / f"{module}.py")
    auto_map = {
        "AutoConfig": f"{CONFIG_MODULE}.GptOssPuzzleConfig",
        "AutoModel": f"{MODEL_MODULE}.GptOssPuzzleModel",
        "AutoModelForCausalLM": f"{MODEL_MODULE}.{GPT_OSS_PUZZLE.causal_lm}",
    }
    return {**config, "auto_map": auto_map}
