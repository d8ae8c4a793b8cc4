"""Writes the golden files of test_deployments.py anew: python -m tests.build.golden_deployments, then read the
diff. One folder a shipped engine config and released model: llm_args.yaml and the launch scripts.
"""

from __future__ import annotations

from pathlib import Path

from puzzle_trtllm.architecture import PuzzleArchitecture
from puzzle_trtllm.build.derived_values import to_nested
from puzzle_trtllm.build.engine_build import explain, render_llm_args
from puzzle_trtllm.build.launch import launch_scripts
from puzzle_trtllm.build.serving_copy import serving_family
from puzzle_trtllm.engine import ENGINE_CONFIG_FOLDER, load_engine_config
from puzzle_trtllm.scenario import load_scenario

DATA = Path(__file__).parents[1] / "data"
GOLDEN = DATA / "golden" / "deployments"
MODELS = {"child": DATA / "gpt-oss-puzzle-88b.config.json", "parent": DATA / "gpt-oss-120b.config.json"}
CONFIGS = sorted(
    file.stem for file in ENGINE_CONFIG_FOLDER.glob("*.yaml") if load_engine_config(file).runtime == "tensorrt_llm"
)


def deployment_files(config: str, model: str) -> dict[str, str]:
    """File name: text, as `build` writes them for one shipped config and one released model."""
    settings, architecture = load_engine_config(config), PuzzleArchitecture.from_path(MODELS[model])
    values = explain(MODELS[model], config=config)
    plugin = serving_family(architecture).trtllm_model is not None
    scripts = launch_scripts(settings, to_nested(values), load_scenario(settings.scenario), plugin=plugin)
    return {"llm_args.yaml": render_llm_args(values), **scripts}


if __name__ == "__main__":
    for config in CONFIGS:
        for model in MODELS:
            folder = GOLDEN / config / model
            folder.mkdir(parents=True, exist_ok=True)
            for name, text in deployment_files(config, model).items():
                (folder / name).write_text(text, encoding="utf-8")
