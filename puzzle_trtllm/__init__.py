"""puzzle-trtllm: take a Puzzle child architecture to a measured TensorRT-LLM deployment.

The package is a small core that names the nouns (architecture, checkpoint, engine, scenario) and the stages that live
in the repository's top-level folders: `build`, `calibration`, `serve` and `engine_configs` are symbolic links to them.
Importing this module imports nothing else, so that `puzzle-trtllm --help` answers at once.
"""

__version__ = "0.1.0"
