"""`calibrate experts`: how much each expert of each layer matters, learned from the routing of real tokens.

One forward pass over the data; a hook on every router turns its logits into each token's ranking of the experts. Only
the rankings are kept, one byte an expert and token (two above 256 experts): all that a ranked-choice election needs, a
quarter of the float32 logits. A model that does not fit in memory goes layer by layer (layer_stream.py). The result is
the importance file that `derive` reads: float32 `model.layers.{i}.mlp.experts.importance` [num_experts], larger means
keep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from puzzle_trtllm.calibration.dataset import CalibrationDataset, DataOptions, load_chosen
from puzzle_trtllm.calibration.forward import require_finite, run_dataset
from puzzle_trtllm.calibration.layer_stream import Observation, stream_layers
from puzzle_trtllm.calibration.memory import should_stream
from puzzle_trtllm.calibration.ranked_choice import elimination_order, importance_from_order
from puzzle_trtllm.calibration.tensor_file import write_tensors
from puzzle_trtllm.checkpoint import Checkpoint
from puzzle_trtllm.errors import CalibrationError
from puzzle_trtllm.models.huggingface.loading import load_causal_lm

if TYPE_CHECKING:
    from typing_extensions import Unpack

MAX_TOKENS = 65_536
METHOD = "ranked-choice-votes"
WHAT = "routing"


@dataclass(frozen=True, kw_only=True)
class ExpertCalibration:
    """What was learned, and from what."""

    out: Path
    method: str
    num_sequences: int
    num_tokens: int
    dataset_fingerprint: str
    dataset_is_bundled: bool
    parent_fingerprint: str
    votes: tuple[tuple[int, ...], ...]
    """By layer and expert: tokens that are routed to it."""

    @property
    def never_routed(self) -> tuple[tuple[int, ...], ...]:
        """By layer: the experts that no token was routed to; they are the first to go."""
        return tuple(tuple(e for e, count in enumerate(layer) if count == 0) for layer in self.votes)


def calibrate_experts(
    checkpoint: str | Path,
    out: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    stream: bool | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    **data_options: Unpack[DataOptions],
) -> ExpertCalibration:
    """Score the experts of `checkpoint` and write the importance file `out`.

    What to calibrate on: `dataset` and the other keywords of DataOptions; at most 65,536 tokens unless they say so.
    `stream` holds one layer in memory at a time; None decides by the memory that is free. The result is the same.
    Raises CalibrationError (data, activations), CheckpointError, or PuzzleError when `out` exists without `overwrite`.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise CalibrationError("exists (--overwrite replaces it)", file=out)
    source = Checkpoint.open(checkpoint)
    data = load_chosen(source, data_options, max_tokens=MAX_TOKENS)
    if should_stream(source, dtype, wanted=stream):
        rankings = stream_rankings(source, data, out=out, dtype=dtype, quiet=quiet)
    else:
        rankings = collect_rankings(load_causal_lm(source, dtype=dtype), data, quiet=quiet)
    top_k = source.architecture.experts_per_token
    scores = [importance_from_order(elimination_order(layer, top_k)) for layer in rankings]
    metadata = {
        "method": METHOD,
        "dataset_fingerprint": data.fingerprint,
        "parent_fingerprint": source.fingerprint(),
        "num_tokens": str(data.num_tokens),
    }
    write_tensors(out, {f"model.layers.{i}.mlp.experts.importance": s for i, s in enumerate(scores)}, metadata)
    return ExpertCalibration(
        out=out,
        method=METHOD,
        num_sequences=len(data.sequences),
        num_tokens=data.num_tokens,
        dataset_fingerprint=metadata["dataset_fingerprint"],
        dataset_is_bundled=data.is_bundled,
        parent_fingerprint=metadata["parent_fingerprint"],
        votes=tuple(_first_votes(layer, top_k) for layer in rankings),
    )


def collect_rankings(model: Any, dataset: CalibrationDataset, *, quiet: bool = True) -> list[NDArray[Any]]:
    """By layer: each token's experts from most to least preferred, uint8 or uint16 `[T, E]`; ties by index."""
    return _watch_routers(model, lambda watched: run_dataset(watched, dataset, what=WHAT, quiet=quiet))


def stream_rankings(
    source: Checkpoint, dataset: CalibrationDataset, *, out: Path, dtype: torch.dtype, quiet: bool = True
) -> list[NDArray[Any]]:
    """As `collect_rankings`, with one layer in memory at a time; works beside `out`."""

    def visit(model: Any, run: Callable[[Any], None], layer: int) -> Observation:
        return {"ranking": torch.from_numpy(_watch_routers(model, run, first_layer=layer)[0])}

    seen = stream_layers(source, dataset, visit, out=out, what=WHAT, dtype=dtype, quiet=quiet)
    return [layer["ranking"].numpy() for layer in seen]


def _watch_routers(model: Any, run: Callable[[Any], None], *, first_layer: int = 0) -> list[NDArray[Any]]:
    collected: list[list[NDArray[Any]]] = [[] for _ in model.model.layers]

    def watch(layer_idx: int) -> Any:
        def hook(router: Any, arguments: Any, output: Any) -> None:
            hidden_TD = arguments[0].reshape(-1, arguments[0].shape[-1])
            logits_TE = torch.nn.functional.linear(hidden_TD, router.weight, router.bias)
            require_finite(logits_TE, f"model.layers.{first_layer + layer_idx}.mlp.router")
            ranking_TE = logits_TE.argsort(dim=-1, descending=True, stable=True)
            small = np.uint8 if logits_TE.shape[-1] <= 256 else np.uint16
            collected[layer_idx].append(ranking_TE.cpu().numpy().astype(small))

        return hook

    handles = [layer.mlp.router.register_forward_hook(watch(i)) for i, layer in enumerate(model.model.layers)]
    try:
        run(model)
    finally:
        for handle in handles:
            handle.remove()
    return [np.concatenate(batches) for batches in collected]


def _first_votes(rankings_TE: NDArray[Any], top_k: int) -> tuple[int, ...]:
    return tuple(np.bincount(rankings_TE[:, :top_k].ravel(), minlength=rankings_TE.shape[1]).tolist())
