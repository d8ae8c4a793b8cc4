"""Writes the golden files of test_golden_engine.py anew: python -m tests.build.golden_engine, then read the diff.

One child of two layers, built for TensorRT-LLM on two GPUs: every text file of its engine folder and of its Triton
repository. Left out is what depends on the machine: versions, paths and time in engine.json, the launch scripts (golden
in deployments/ already) and the copy of model.py.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from puzzle_trtllm.build.engine_build import build_engine
from puzzle_trtllm.engine import EngineConfig
from puzzle_trtllm.serve.triton.repository import write_repository
from tests.toys import toy_architecture, write_toy_checkpoint

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "engine"
BLOCKS = [(4, 16), (2, None)]


def engine_files(folder: Path) -> dict[str, str]:
    """File name under `engine/` or `repository/`: text, with the engine's own path written as ENGINE."""
    checkpoint = write_toy_checkpoint(
        folder / "checkpoint", toy_architecture(BLOCKS), seed=0, kv_scales=[(0.5, 2.0)] * len(BLOCKS)
    )
    config = EngineConfig(runtime="tensorrt_llm", gpu="h100-80gb", num_gpus=2, kv_dtype="fp8", scenario="cpu-demo")
    engine = build_engine(checkpoint, folder / "engine", config=config)
    repository = write_repository(engine, folder / "repository", gpu_device_ids="0,1;2,3")
    manifest = json.loads((engine.path / "engine.json").read_text())
    manifest["provenance"] = {"llm_args_reasons": manifest["provenance"]["llm_args_reasons"]}
    texts = {"engine/engine.json": json.dumps(manifest, indent=1) + "\n"}
    for name in ("llm_args.yaml", "launch/environment.sh", "plugin/puzzle_trtllm_plugin/__init__.py"):
        texts[f"engine/{name}"] = (engine.path / name).read_text()
    for name in ("config.json", "generation_config.json"):
        texts[f"engine/model/{name}"] = (engine.model_path / name).read_text()
    for name in ("config.pbtxt", "1/model.yaml"):
        text = (repository / "tensorrt_llm" / name).read_text()
        texts[f"repository/{name}"] = text.replace(str(engine.path), "ENGINE")
    return texts


def golden_files() -> dict[str, str]:
    """The recorded ones; stored as .txt, so that no tool takes them for code of ours."""
    files = (file for file in GOLDEN.rglob("*.txt"))
    return {str(file.relative_to(GOLDEN)).removesuffix(".txt"): file.read_text() for file in files}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        for name, text in engine_files(Path(scratch)).items():
            file = GOLDEN / f"{name}.txt"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
