"""Several instances of the model in one server, each an engine of its own on GPUs of its own.

    gpu_device_ids "0,1;2,3"    two instances: the first on GPUs 0 and 1, the second on 2 and 3

The text is that of NVIDIA's llmapi model and stands as a parameter in config.pbtxt. Each instance is a Python stub of
its own, which learns its place from its name (`tensorrt_llm_0_1` is the second) and hides the other GPUs before torch
is imported: CUDA opens every device that it sees, and workers spawned later inherit what was open.

The trap: Triton gives a request to whichever instance it likes, so `stop` with a request id may reach another one.
Closing the stream cancels in every case.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from puzzle_trtllm.errors import ConfigError, EngineError

PARAMETER = "gpu_device_ids"
_EXPECTED = 'GPU ids like "0,1;2,3": commas within an instance, semicolons between'


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One of `count` instances; `gpu_ids` is None where nothing was said: it sees every GPU."""

    index: int = 0
    count: int = 1
    gpu_ids: tuple[str, ...] | None = None

    @property
    def labels(self) -> dict[str, str]:
        """Labels that tell its metrics from those of the others; none where there are no others."""
        return {} if self.count == 1 else {"instance": str(self.index)}


ONLY_INSTANCE = Instance()


def parse_gpu_device_ids(text: str, *, gpus_per_instance: int | None = None) -> tuple[tuple[str, ...], ...]:
    """One tuple of GPU ids an instance. Raises ConfigError for other text, a GPU named twice, or unequal numbers."""
    instances = tuple(tuple(gpu.strip() for gpu in group.split(",")) for group in text.split(";"))
    gpus = [gpu for group in instances for gpu in group]
    if not all(re.fullmatch(r"\d+|(GPU|MIG)-[0-9A-Za-z/-]+", gpu) for gpu in gpus):
        raise ConfigError("not GPU ids", key=PARAMETER, found=repr(text), expected=_EXPECTED)
    twice = sorted({gpu for gpu in gpus if gpus.count(gpu) > 1})
    if twice:
        raise ConfigError("a GPU belongs to one instance", key=PARAMETER, found=f"{', '.join(twice)} twice")
    wanted = len(instances[0]) if gpus_per_instance is None else gpus_per_instance
    for group in instances:
        if len(group) != wanted:
            reason = "GPUs an instance" if gpus_per_instance is None else "GPUs an instance, the engine's number"
            raise ConfigError(f"wrong number of {reason}", key=PARAMETER, found=",".join(group), expected=wanted)
    return instances


def instance_of(args: Mapping[str, str]) -> Instance:
    """Which instance Triton's `initialize(args)` makes. Raises EngineError when it has no GPUs of its own to use."""
    config: dict[str, Any] = json.loads(args["model_config"])
    count = sum(int(group.get("count", 1)) for group in config.get("instance_group") or [{}])
    text = ((config.get("parameters") or {}).get(PARAMETER) or {}).get("string_value") or None
    if text is None:
        if count > 1:
            raise EngineError("missing: instances would share their GPUs", file="config.pbtxt", key=PARAMETER)
        return ONLY_INSTANCE
    groups = parse_gpu_device_ids(text)
    if len(groups) != count:
        raise EngineError(
            "another number of instances", file="config.pbtxt", key=PARAMETER, found=repr(text), expected=count
        )
    name = re.search(r"_(\d+)$", args.get("model_instance_name", ""))
    index = int(name.group(1)) if name is not None and count > 1 else 0
    if index >= count:
        raise EngineError("no GPUs for this instance", key=PARAMETER, found=args["model_instance_name"], expected=count)
    return Instance(index=index, count=count, gpu_ids=groups[index])


def hide_other_gpus(instance: Instance, environment: MutableMapping[str, str]) -> None:
    """Make this process, and what it starts, see the instance's GPUs alone. Before torch is imported."""
    if instance.gpu_ids is not None:
        # The second is how TensorRT-LLM passes the choice on to MPI workers, as in NVIDIA's model.
        for variable in ("CUDA_VISIBLE_DEVICES", "TRTLLM_VISIBLE_DEVICES"):
            environment[variable] = ",".join(instance.gpu_ids)
