"""`<engine>/plugin/puzzle_trtllm_plugin/`: what every launch path of TensorRT-LLM imports to know the child's class.

`trtllm-serve --custom_module_dirs DIR` imports DIR by its base name with DIR's parent on sys.path, and workers inherit
that path. So the package sits alone in a folder of its own, under a name that nothing else has: beside it, a folder
named like a real module would shadow that module in every worker.

Engines whose layers are alike run upstream's own gpt-oss and get no plugin.
"""

from __future__ import annotations

from pathlib import Path

from puzzle_trtllm.engine import PLUGIN_FOLDER
from puzzle_trtllm.families import Family

_SOURCE = '''\
"""Registers {causal_lm} with TensorRT-LLM, in whatever process imports this. By puzzle-trtllm build.

Needs puzzle_trtllm installed beside tensorrt_llm: pip install puzzle-trtllm
"""

import {trtllm_model}  # noqa: F401
'''


def write_plugin(engine: Path, family: Family) -> Path:
    """Write the plugin package of a family into an engine folder and return it."""
    folder = engine / PLUGIN_FOLDER
    folder.mkdir(parents=True)
    text = _SOURCE.format(causal_lm=family.causal_lm, trtllm_model=family.trtllm_model)
    (folder / "__init__.py").write_text(text, encoding="utf-8")
    return folder
