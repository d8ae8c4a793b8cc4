"""`<engine>/plugin/puzzle_trtllm_plugin/`: what every launch path of TensorRT-LLM imports to know the child's class.

`trtllm-serve --custom_module_dirs DIR` imports DIR by its base name with DIR's parent on sys.path, and workers inherit
that path. So the package sits alone in a folder of its own, under a name that nothing else has: beside it, a folder
named like a real module would shadow that module in every worker.

Engines whose layers are alike run upstream's own gpt-oss and get no plugin.
"""

from __future__ import annotations

from pathlib import Path

PLUGIN_FOLDER = Path("plugin") / "puzzle_trtllm_plugin"

_SOURCE = '''\
"""Registers GptOssPuzzleForCausalLM with TensorRT-LLM, in whatever process imports this. By puzzle-trtllm build.

Needs puzzle_trtllm installed beside tensorrt_llm: pip install puzzle-trtllm
"""

import puzzle_trtllm.models.trtllm.modeling  # noqa: F401
'''


def write_plugin(engine: Path) -> Path:
    """Write the plugin package into an engine folder and return it."""
    folder = engine / PLUGIN_FOLDER
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(_SOURCE, encoding="utf-8")
    return folder
