"""The Triton model repository of one engine: everything tritonserver needs, generated, nothing to edit by hand.

    tensorrt_llm/config.pbtxt    names and types of the tensors (contract.py)
    tensorrt_llm/1/model.py      a few lines that hand over to puzzle_trtllm.serve.triton
    tensorrt_llm/1/model.yaml    arguments of `LLM(...)` and `triton_config` (settings.py)

    tensorrt_llm/1/engine        a link to the engine, where its path is not plain ASCII

The traps: Triton starts the Python stub through `bash -c` without quoting, so the repository's own path must not hold
a space. The engine's path may: it only occurs inside model.yaml. But the interpreter in some stubs takes its settings
from nowhere, not even the locale, and knows no file names but those of ASCII; hence the link.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from puzzle_trtllm.engine import PLUGIN_FOLDER, Engine
from puzzle_trtllm.errors import ServeError
from puzzle_trtllm.folders import atomic_folder
from puzzle_trtllm.serve.triton.contract import MODEL_NAME, render_config
from puzzle_trtllm.serve.triton.instances import parse_gpu_device_ids
from puzzle_trtllm.serve.triton.settings import MIN_OPEN_REQUESTS, MODEL_YAML, TritonConfig

_ENGINE_LINK = "engine"


def write_repository(
    engine: Engine,
    out: str | Path,
    *,
    decoupled: bool = True,
    cancellation_check_period_ms: float = 25,
    max_open_requests: int | None = None,
    step_timeout_s: float = 600,
    gpu_device_ids: str | None = None,
    runtime_module: str | None = None,
    engine_cores: Sequence[int] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write the model of `engine` into the model repository `out`, new or with other models, and return it.

    max_open_requests: that an instance takes; None: twice what its engine works on at once, at least 1,024.
    gpu_device_ids: "0,1;2,3" makes two instances, each on its own GPUs.
    step_timeout_s: after which an engine that ends no step, while requests are open, counts as dead; 0: never.
    engine_cores: those that the reference runtime computes on, instead of all that the server may use.
    Raises ConfigError for wrong GPU ids, ServeError for a path that Triton cannot use and PuzzleError when the model
    exists and is not to be overwritten.
    """
    out = Path(out).absolute()
    if shlex.quote(str(out)) != str(out):
        raise ServeError(
            "Triton starts its Python stub through a shell: only ASCII, no spaces, nothing that a shell interprets",
            file=out,
            expected="another folder; where none was named, TMPDIR names one",
        )
    link = out / MODEL_NAME / "1" / _ENGINE_LINK
    reachable = engine.path if str(engine.path).isascii() else link
    plugin = engine.path / PLUGIN_FOLDER
    triton = TritonConfig(
        decoupled=decoupled,
        cancellation_check_period_ms=cancellation_check_period_ms,
        runtime=engine.manifest.runtime,
        runtime_module=runtime_module,
        plugin=str(reachable / PLUGIN_FOLDER) if plugin.is_dir() else None,
        max_open_requests=_open_requests(engine) if max_open_requests is None else max_open_requests,
        step_timeout_s=step_timeout_s,
        vocab_size=engine.architecture.vocab_size,
    )
    config = _config_text(engine, gpu_device_ids)
    with atomic_folder(out / MODEL_NAME, overwrite=overwrite) as folder:
        version = folder / "1"
        version.mkdir()
        (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        shutil.copyfile(Path(__file__).with_name("model.py"), version / "model.py")
        if reachable == link:
            (version / _ENGINE_LINK).symlink_to(engine.path, target_is_directory=True)
        llm_args = engine.llm_args if engine_cores is None else {**engine.llm_args, "cores": [*engine_cores]}
        text = render_model_yaml(reachable / engine.model_path.name, llm_args, triton)
        (version / MODEL_YAML).write_text(text, encoding="utf-8")
    return out


def _open_requests(engine: Engine) -> int:
    """As many again may wait as the engine works on at once: a limit below that would leave GPUs idle."""
    ranks = engine.llm_args.get("tensor_parallel_size") if engine.llm_args.get("enable_attention_dp") else 1
    at_once = int(engine.llm_args.get("max_batch_size") or 0) * int(ranks or 1)  # it counts for one rank
    return max(MIN_OPEN_REQUESTS, 2 * at_once)


def _config_text(engine: Engine, gpu_device_ids: str | None) -> str:
    if gpu_device_ids is None:
        return render_config()
    num_gpus = int(engine.llm_args.get("tensor_parallel_size") or 1)  # expert and attention parallelism divide these
    instances = parse_gpu_device_ids(gpu_device_ids, gpus_per_instance=num_gpus)
    text = ";".join(",".join(gpus) for gpus in instances)
    return render_config(instance_count=len(instances), gpu_device_ids=text)


def render_model_yaml(model: Path, llm_args: Mapping[str, Any], triton: TritonConfig) -> str:
    """The text of model.yaml; keys in a fixed order, so that two builds of one engine give one text."""
    content: dict[str, Any] = {"model": "", **llm_args}
    content["model"] = str(model)
    if triton.runtime == "tensorrt_llm":
        # Without it LLM.get_stats tells nothing, and our metrics no queue; an engine config may say false.
        content.setdefault("enable_iter_perf_stats", True)
    content["triton_config"] = triton.model_dump(exclude_none=True)
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
